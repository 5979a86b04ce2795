"The site: built from the stored outputs, whole in itself, and read in a real browser with every other address refused."
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/"nbs").glob("[!_.]*.ipynb"))
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytest.importorskip("myst_nb", reason="the site needs the docs extra: pip install -e '.[docs]'")
pytestmark = pytest.mark.skipif(not shutil.which("npm"), reason="the site takes math and widgets from npm, which is not installed")


def page(path:Path)->str: return re.sub(r"^\d+[a-z]?_", "", path.stem) + ".html"


def build(out:Path, nbs:Path=ROOT/"nbs")->subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT/"docs"/"build.py", "--nbs", nbs, "--out", out], capture_output=True, text=True, timeout=300, check=False)


def read_in_chromium(site:Path, *options:str)->dict:
    "What docs/browser.mjs reports."
    if not CHROMIUM: pytest.skip("there is no Chromium here: apt-get install chromium, or set CHROMIUM")
    done = subprocess.run(["node", ROOT/"docs"/"browser.mjs", site, *options], env=os.environ | dict(CHROMIUM=CHROMIUM), capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")/"html"
    done = build(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Addresses(HTMLParser):
    "Where a page points to, what it loads, and the anchors that it offers."
    def __init__(self, text:str):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("id"): self.ids.add(attrs["id"])
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        if attrs.get("src"): self.loads.append(attrs["src"])
        if tag == "link" and attrs.get("href"): self.loads.append(attrs["href"])


# --- the book's own site -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_is_a_page_in_the_side_bar(site, path):
    nb = nbformat.read(path, as_version=4)
    title = next(c.source for c in nb.cells if c.cell_type == "markdown").partition("\n")[0].removeprefix("# ")
    text = (site/page(path)).read_text(encoding="utf-8")
    assert re.search(rf"<h1>{re.escape(title)}<", text)
    assert re.search(rf'toctree-l1[^>]*><a class="reference internal" href="{page(path)}"', (site/"reference.html").read_text(encoding="utf-8")) or path.stem == "index"
    assert "#| " not in text and "{.callout" not in text and ".ipynb)" not in text  # every directive and link has become something
    if path.stem != "index": assert [p.read_bytes() for p in site.glob(f"_downloads/*/{path.name}")] == [path.read_bytes()]


def test_the_index_names_every_chapter(site):
    index = (ROOT/"nbs"/"index.ipynb").read_text(encoding="utf-8")
    assert [p.name for p in NOTEBOOKS if p.stem != "index" and f"]({p.name})" not in index] == []
    assert [n for n in re.findall(r"\]\((\w+\.ipynb)\)", index) if not (ROOT/"nbs"/n).is_file()] == []


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {p.name: Addresses(p.read_text(encoding="utf-8")) for p in site.glob("*.html")}
    broken = []
    for name, found in pages.items():
        for address in found.links + found.loads:
            to = urlsplit(address)
            if to.scheme or to.netloc:
                if address in found.loads and to.scheme != "data": broken.append(f"{name} loads {address}")
                continue
            target = unquote(to.path) or name
            if not (site/target).is_file(): broken.append(f"{name}: {address}")
            elif to.fragment and target in pages and unquote(to.fragment) not in pages[target].ids: broken.append(f"{name}: no anchor {address}")
    assert broken == []


def test_an_exported_object_is_described_with_its_parameters(site):
    text = (site/"architecture.html").read_text(encoding="utf-8")
    entry = text.partition('id="llm_scratch.architecture.Decoder"')[2].partition("</dl>\n</dd></dl>")[0][:6000]
    plain = re.sub(r"<[^>]+>", "", entry)
    assert "Decoder(cfg" in plain
    assert re.search(r"Parameters.*cfg \(ModelConfig\) – \w+", plain, re.S), plain
    generation = (site/"generation.html").read_text(encoding="utf-8")
    assert 'href="architecture.html#llm_scratch.architecture.Decoder"' in generation  # a name in backticks leads there
    pretraining = (site/"pretraining.html").read_text(encoding="utf-8")
    assert re.search(r'href="#llm_scratch.pretraining.Muon.step"[^>]*><code[^>]*><span class="pre">step<', pretraining)  # a method's short name stays in its chapter
    assert "Decoder" in (site/"reference.html").read_text(encoding="utf-8")


def test_the_search_index_knows_the_words(site):
    index = json.loads((site/"searchindex.js").read_text(encoding="utf-8").removeprefix("Search.setIndex(").removesuffix(")"))
    where = index["terms"]["nucleus"] if "nucleus" in index["terms"] else index["terms"]["nucleu"]
    assert "generation" in {index["docnames"][i] for i in ([where] if isinstance(where, int) else where)}


def test_formulas_are_set_while_the_site_is_built(site):
    text = (site/"generation.html").read_text(encoding="utf-8")
    assert text.count('class="katex-html"') > 5 and 'data-display' not in text
    assert list((site/"_static"/"katex"/"fonts").glob("*.woff2"))


def test_figures_say_what_they_show(site):
    text = (site/"generation.html").read_text(encoding="utf-8")
    assert re.search(r'<img alt="The same scores at three temperatures', text)


def test_a_reader_in_chromium(site):
    report = read_in_chromium(site, "--search", "nucleus=generation.html")
    assert report["problems"] == []
    assert report["pages"] == len(list(site.glob("*.html"))) and report["formulas"] > 20
    assert report["followers"] == ["costs.html", "inside.html", "vocabulary.html"]  # the explorers' pictures follow their sliders, with no Python behind them


def widgets(page:Path)->list[dict]:
    "The widgets that a page has stored, of which it shows one."
    text = page.read_text(encoding="utf-8")
    assert text.count('type="application/vnd.jupyter.widget-view+json"') == 1
    return list(json.loads(re.search(r'<script type="application/vnd.jupyter.widget-state\+json">(.*?)</script>', text, re.S)[1])["state"].values())


def test_the_explorer_is_on_its_page(site):
    "Every picture is in the page, the first of them shown, and links between sliders and pictures."
    state = widgets(site/"inside.html")
    pictures = [m["state"]["value"] for m in state if m["model_name"] == "HTMLModel"]
    assert sorted(re.match("<div>(.*?)</div><svg", p)[1] for p in pictures) == [f"layer {n}, head {h}" for n in range(2) for h in range(2)]
    assert sum(m["model_name"] == "LinkModel" for m in state) == 3


def test_the_playground_is_on_its_page(site):
    "Every chunk and every merge is in the page, escaped, and linked to the two sliders."
    state = widgets(site/"vocabulary.html")
    shown = [m["state"]["value"] for m in state if m["model_name"] == "HTMLModel"]
    chunks, played = [p for p in shown if "bytes per token" in p], [re.match(r"<div>merge (\d+) of (\d+)</div>", p) for p in shown if "bytes per token" not in p]
    assert len(chunks) > 3 and all("&lt;" in p and "<b>" not in p for p in chunks)
    assert len(played) == sum(int(m[2])+1 for m in played if m[1] == "0")
    assert sum(m["model_name"] == "LinkModel" for m in state) == len(chunks)+1


def test_the_model_talks_on_the_site(site):
    "The page beside the chapters: in the side bar, within the budget, and its greedy text is that of ONNX Runtime."
    if not CHROMIUM: pytest.skip("there is no Chromium here: apt-get install chromium, or set CHROMIUM")
    torch, deployment = pytest.importorskip("torch"), pytest.importorskip("llm_scratch.deployment")
    pytest.importorskip("onnxruntime", reason="the text is compared with that of ONNX Runtime: pip install -e '.[deploy]'")
    from llm_scratch.browser import BUDGET, open_pack, page_bytes
    from llm_scratch.generation import generate
    from llm_scratch.tokenization import HubTokenizer
    assert 'href="talk.html">Talk to the model<' in (site/"index.html").read_text(encoding="utf-8") and page_bytes(site/"talk") < BUDGET
    facts, decoder = open_pack(ROOT/"docs"/"demo"), deployment.OnnxDecoder(ROOT/"docs"/"demo"/"model.onnx")
    tok, most = HubTokenizer(ROOT/"docs"/"demo", facts["eot_id"]), facts["sizes"]["context_len"]
    prompt = "# Tomato Soup\n\nIngredients:\n" + "- 1 onion, chopped\n- 2 cups tomatoes\n"*30
    while len(tok.encode(prompt)) > most-40: prompt = prompt[:-1] # little is left to be written
    with subprocess.Popen([sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", site], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            url = f"http://127.0.0.1:{re.search('port ([0-9]+)', server.stdout.readline())[1]}/talk.html"
            done = subprocess.run(["node", ROOT/"tests"/"talk.mjs", url, "--brief", "--prompt", prompt], env=os.environ | dict(CHROMIUM=CHROMIUM), capture_output=True, text=True, timeout=300, check=False)
        finally: server.kill()
    assert done.stdout, done.stderr
    said = json.loads(done.stdout)
    assert said["problems"] == [] and said["before"]["loaded"] == []
    assert "Ingredients:\n- " in said["ready"]["text"] and "\nSteps:\n1. " in said["ready"]["text"] # the first text is a recipe
    ids = [facts["eot_id"], *tok.encode(prompt)]
    new = generate(decoder, torch.tensor([ids]), most-len(ids), temperature=0, stop_id=facts["eot_id"])[0, len(ids):].tolist()
    assert len(new) > 20 and said["texts"][0]["text"] == prompt+tok.decode(i for i in new if i != facts["eot_id"])


# --- a book made up for what the real one may not have --------------------------------------------------------------

def slider()->tuple[dict, dict]:
    "An output that shows a slider above a line of text, and the widget state behind it."
    def model(name:str, package:str="controls", **state): return dict(model_module=f"@jupyter-widgets/{package}", model_module_version="2.0.0", model_name=f"{name}Model", state=state)
    state = {"L": model("Layout", "base"), "Y": model("SliderStyle"), "D": model("HTMLStyle"),
             "S": model("IntSlider", description="warmth", value=3, min=0, max=9, layout="IPY_MODEL_L", style="IPY_MODEL_Y"),
             "T": model("HTML", value="<b>a line</b> of text", layout="IPY_MODEL_L", style="IPY_MODEL_D"),
             "B": model("VBox", children=["IPY_MODEL_S", "IPY_MODEL_T"], layout="IPY_MODEL_L")}
    view = new_output("display_data", {"application/vnd.jupyter.widget-view+json": dict(model_id="B", version_major=2, version_minor=0), "text/plain": "VBox()"})
    return view, {"application/vnd.jupyter.widget-state+json": dict(state=state, version_major=2, version_minor=0)}


SMALL = r"""
A line. See [the index](index.ipynb), `torch.nn.Linear`, and `functools.partial`. It costs $5, or $6.

:::{.callout-note}
Note this.
:::

:::{.callout-tip title="A title"}
<details><summary>Hint</summary>

```python
x = "`Decoder` $z$ chapter 00"
```
</details>
:::

::: {.callout-warning collapse="true"}
## Folded
Unfold me.
:::

$$e^{i\pi} = -1 < 0 \\ a & b$$
"""


@pytest.fixture
def small(tmp_path):
    "A book of an index and one chapter; `write(cells)` adds cells to the chapter."
    folder = tmp_path/"nbs"
    folder.mkdir()
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Book\n\n> small")]), folder/"index.ipynb")

    def write(*cells, widgets=None):
        nb = new_notebook(cells=[new_markdown_cell("# Small\n\n> A small chapter"), *cells])
        if widgets: nb.metadata["widgets"] = widgets
        nbformat.write(nb, folder/"01b_small.ipynb")
        return folder
    return write


def test_directives_callouts_and_widgets(small, tmp_path):
    shown = lambda text: [new_output("stream", name="stdout", text=text)]
    view, widgets = slider()
    nbs = small(
        new_markdown_cell(SMALL),
        new_code_cell("#| hide\nhidden_cell = 1", outputs=shown("hidden output")),
        new_code_cell("#| echo: false\nno_source = 1", outputs=shown("but its output")),
        new_code_cell("#| output: false\nits_source = 1", outputs=shown("no output")),
        new_code_cell("#| code-fold: true\n#| code-summary: \"Unfold it\"\nfolded = 1", outputs=shown("seen")),
        new_code_cell("kept_line = 1\nsecret_line = 2 #| hide_line"),
        new_code_cell("#| eval: false\npuzzle = ..."),
        new_code_cell("wide = 1", outputs=shown("wide "*200)),
        new_code_cell("table", outputs=[new_output("display_data", {"text/markdown": "| left | right |\n|---|---|\n| a | b |", "text/plain": "table"})]),
        new_code_cell("slider", outputs=[view]),
        widgets=widgets)
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"old.html").touch()
    done = build(tmp_path/"out", nbs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path/"out"/"old.html").exists()
    html = (tmp_path/"out"/"small.html").read_text(encoding="utf-8")
    article = html.partition("<article")[2].partition("</article>")[0]
    plain = re.sub(r"<[^>]+>", "", article)
    for there in ("but its output", "its_source", "Unfold it", "folded", "seen", "kept_line", "puzzle", "Note this.", "Unfold me.", "It costs $5, or $6."): assert there in plain, there
    for gone in ("hidden_cell", "hidden output", "no_source", "no output", "secret_line", "#|", ":::", "callout", "data-display"): assert gone not in plain, gone
    assert re.search(r"<table.*?left.*?right.*?</table>", article, re.S)
    assert 'admonition-title">A title' in article and re.search(r"<details[^>]*sd-dropdown.*Folded", article, re.S)
    assert re.search(r"<details><summary>Hint</summary>\s*<div class=\"highlight-python", article)
    assert 'href="index.html"' in article and "torch.nn.Linear.html" in article and "functools.html#functools.partial" in article
    report = read_in_chromium(tmp_path/"out")
    assert report["problems"] == [] and report["widgets"] == 3 and report["followers"] == []  # this slider moves nothing


@pytest.mark.parametrize("text, message", [("[gone](07_gone.ipynb)", "07_gone"), ("$\\frac{1}$", "KaTeX")], ids=["link", "formula"])
def test_what_is_wrong_fails_the_build_and_leaves_the_old_site(small, tmp_path, text, message):
    out = tmp_path/"out"
    out.mkdir()
    (out/"index.html").write_text("old", encoding="utf-8")
    done = build(out, small(new_markdown_cell(text)))
    assert done.returncode == 1 and message in done.stderr
    assert [p.name for p in out.iterdir()] == ["index.html"] and (out/"index.html").read_text(encoding="utf-8") == "old"


def test_without_npm_one_line_says_so(small, tmp_path):
    env = os.environ | dict(PATH="/nonexistent")
    done = subprocess.run([sys.executable, ROOT/"docs"/"build.py", "--nbs", small(), "--out", tmp_path/"out"], env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "install Node.js" in done.stderr
    assert not (tmp_path/"out").exists()


def test_the_browser_sees_what_is_wrong(small, tmp_path):
    done = build(tmp_path/"out", small(new_markdown_cell("word")))
    assert done.returncode == 0, done.stderr
    bad = ('<img src="https://example.org/x.png"><div style="width:700px">wide</div><p style="color:#eee;background:#fff">faint</p>'
           '<span class="math">\\frac</span><script>console.error("alas")</script><script src="gone.js"></script>')
    path = tmp_path/"out"/"small.html"
    path.write_text(path.read_text(encoding="utf-8").replace("</h1>", f"</h1>{bad}", 1), encoding="utf-8")
    problems = "\n".join(read_in_chromium(tmp_path/"out", "--search", "word=index.html")["problems"])
    for said in ("asks for https://example.org/x.png", "too wide at 390 px", "contrast", "0 of 1 formulas", "console: alas", "404 gone.js", "word is not found in index.html"):
        assert said in problems, f"{said} not in {problems}"

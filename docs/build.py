"""Build the site from the notebooks and the outputs stored in them; nothing is run, and the pages ask nobody else for anything.

    python docs/build.py                 into _docs/
    python docs/build.py --out FOLDER

Each chapter becomes a page: nbdev's directives become MyST, every exported object gets an entry in the reference, and Sphinx sets the rest.
A link that leads nowhere fails the build. The folder is replaced in one piece, so a build that stops halfway leaves the old site.
"""
import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import nbformat
from api import Entry, defined, describe, public
from filelock import FileLock
from nbdev.doclinks import NbdevLookup
from nbformat.v4 import new_code_cell, new_markdown_cell

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
from llm_scratch.core import UserError, atomic_path, read_json  # noqa: E402

LIB = "llm_scratch"
DIRECTIVE = re.compile(r"#\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
ALIASES = {"F.": "torch.nn.functional.", "nn.": "torch.nn."} # how the book imports them

def directives(source:str)->tuple[dict[str, str], str]:
    "The `#|` lines that open a cell, and what follows them."
    found,lines = {},source.splitlines()
    while lines and (m := DIRECTIVE.match(lines[0])):
        found[m[1]] = m[2]
        del lines[0]
    return found,"\n".join(lines).strip("\n")

def imports_only(source:str)->bool: return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)

# --- chapters --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Chapter:
    "One notebook and the page it becomes."
    path:Path

    @property
    def page(self)->str: return re.sub(r"^\d+[a-z]?_", "", self.path.stem)

    @property
    def number(self)->str: return self.path.stem.split("_")[0] if self.page != self.path.stem else ""

    @cached_property
    def nb(self)->nbformat.NotebookNode: return nbformat.read(self.path, as_version=4)

    @property
    def title(self)->str:
        "The text of the first heading."
        found = next((m for c in self.nb.cells if c.cell_type == "markdown" and (m := re.match(r"# (.+)", c.source))), None)
        if not found: raise SystemExit(f"{self.path.name} has no title: its first markdown cell should begin with `# `")
        return found[1].strip()

    @cached_property
    def module(self)->str|None:
        "The module that the chapter exports, `llm_scratch.core`, if it does."
        names = [d["default_exp"] for c in self.nb.cells if c.cell_type == "code" and "default_exp" in (d := directives(c.source)[0])]
        return f"{LIB}.{names[0]}" if names else None

    @cached_property
    def entries(self)->dict[str, list[Entry]]:
        "Cell id to the public objects that the cell exports, in order."
        if not self.module: return {}
        cells = [(c.id, *directives(c.source)) for c in self.nb.cells if c.cell_type == "code"]
        return {i: [Entry(self.module, name, self.page) for name in defined(body)] for i,found,body in cells if {"export", "exports"} & found.keys()}

def chapters(folder:Path)->list[Chapter]:
    "Every notebook of the book in reading order, the index first."
    paths = sorted(folder.glob("[!_.]*.ipynb"), key=lambda p: (p.stem != "index", p.stem))
    if not paths or paths[0].stem != "index": raise SystemExit(f"{folder} has no index.ipynb, which becomes the first page")
    return [Chapter(p) for p in paths]

# --- nbdev's markdown to MyST ----------------------------------------------------------------------------------

# What a page must keep as it is (fences, links), and what in between becomes a link (names in backticks, "chapter 02").
TOKEN = re.compile(r"""(?P<fence>^[ ]*(?P<mark>```+|~~~+)(?:(?!```|~~~).)*?\n(?:.*?\n)?[ ]*(?P=mark)[ \t]*$)
                     | (?P<link>!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\((?P<target>[^()\s]*)\))
                     | (?P<role>\{[\w:]+\}`[^`]+`)
                     | (?P<ticks>`+)(?P<code>[^\n]+?)(?P=ticks)(?!`)
                     | \b(?P<chapter>[Cc]hapter\ (?P<number>\d\d[a-z]?))\b""", re.M | re.S | re.X)
CALLOUT = re.compile(r"^(?P<colons>:{3,})[ ]*\{\.callout-(?P<kind>\w+)(?P<options>[^}]*)\}[ ]*\n(?:\s*\#+[ ]+(?P<heading>.+)\n)?", re.M)

def callout(m:re.Match)->str:
    "The first line of a Quarto callout as MyST: an admonition, or a fold when it says `collapse`."
    given = re.search(r'title="([^"]*)"', m["options"])
    title = given[1] if given else m["heading"]
    if "collapse=" in m["options"]: return f"{m['colons']}{{dropdown}} {title or m['kind'].capitalize()}\n"
    if title: return f"{m['colons']}{{admonition}} {title}\n:class: {m['kind']}\n\n"
    return f"{m['colons']}{{{m['kind']}}}\n"

@cache
def _lookup()->NbdevLookup: return NbdevLookup()

def names_seen_from(here:Chapter, book:list[Chapter])->dict[str, str]:
    "What a name in backticks means in chapter `here`, as full names: its own objects first, then earlier chapters, then later ones by names that are no plain word."
    entries = lambda c: [e for cell in c.entries.values() for e in cell]
    at = book.index(here) or len(book) # the index speaks of all
    seen = {}
    for e in [e for c in book[at+1:] for e in entries(c)]:
        if re.search("[A-Z_.]", e.name): seen[e.name] = e.full
    for e in [e for c in book[:at] for e in entries(c)]: seen[e.name] = e.full
    methods = [e for e in entries(here) if "." in e.name]
    last = Counter(e.name.rsplit(".", 1)[1] for e in methods)
    seen |= {n: e.full for e in methods if last[n := e.name.rsplit(".", 1)[1]] == 1}
    return seen | {e.name: e.full for e in entries(here)} | {e.full: e.full for c in book for e in entries(c)}

class Prose:
    "Turns the markdown of one chapter into MyST, with links to chapters and to names."
    def __init__(self, book:list[Chapter], here:Chapter):
        self.pages = {c.path.name: f"{c.page}.ipynb" for c in book}
        self.numbers = {c.number: self.pages[c.path.name] for c in book if c.number}
        self.modules = {c.module for c in book if c.module}
        self.own = names_seen_from(here, book)
        self.lookup = _lookup()

    def name(self, code:str)->str|None:
        "A link for `code` when it names an object of ours, of PyTorch or of Python."
        name = code.removesuffix("()")
        if name in self.own: return f"{{py:obj}}`{code} <{self.own[name]}>`"
        if name in self.modules: return f"{{py:mod}}`{name}`"
        if not re.fullmatch(r"\w+(\.\w+)+", name) or name.startswith(f"{LIB}."): return None
        for short,long in ALIASES.items():
            if name.startswith(short): name = long + name.removeprefix(short)
        url = self.lookup.doc(name)
        return f"[`{code}`]({url})" if url else None

    def token(self, m:re.Match)->str:
        if m["link"] and m["target"]:
            file,hash_,anchor = m["target"].partition("#")
            return m[0].replace(f"]({m['target']})", f"]({self.pages.get(file, file)}{hash_}{anchor})")
        if m["code"] and len(m["ticks"]) == 1: return self.name(m["code"]) or m[0]
        if m["number"] and m["number"] in self.numbers: return f"[{m['chapter']}]({self.numbers[m['number']]})"
        return m[0]

    def __call__(self, text:str)->str: return TOKEN.sub(self.token, CALLOUT.sub(callout, text))

# --- a notebook to a page --------------------------------------------------------------------------------------

def code_cell(cell:nbformat.NotebookNode, caption:str)->nbformat.NotebookNode|None:
    "The cell as a page shows it, its directives obeyed; None for a cell that no page shows."
    found,body = directives(cell.source)
    if {"hide", "default_exp"} & found.keys() or found.get("include") == "false" or body.startswith("show_doc("): return None
    body = "\n".join(line for line in body.splitlines() if not line.rstrip().endswith("#| hide_line"))
    new = new_code_cell(body, id=cell.id, metadata=dict(tags=[], mystnb={}))
    tags,options = new.metadata["tags"],new.metadata["mystnb"]
    exported = bool({"export", "exports"} & found.keys())
    if exported: tags.append("exported")
    if found.get("echo") == "false": tags.append("remove-input")
    if found.get("output") == "false": tags.append("remove-output")
    if found.get("code-fold") in ("true", "show") or exported and imports_only(body):
        tags.append("hide-input")
        summary = found.get("code-summary", "").strip("\"'") or ("What the module imports" if exported else "Show the code")
        options.update(code_prompt_show=summary, code_prompt_hide=summary)
    if caption: options["image"] = dict(alt=caption)
    new.outputs = [o for o in cell.get("outputs", []) if o.get("data") != {}]
    return new

def plain(markdown:str)->str: return " ".join(re.sub(r"[*_`$\\]", "", markdown).split())

def caption_after(nb:nbformat.NotebookNode, i:int)->str:
    "What the italics below cell `i` say of its figure, for readers who cannot see it."
    below = nb.cells[i+1].source if i+1 < len(nb.cells) and nb.cells[i+1].cell_type == "markdown" else ""
    found = re.match(r"\*(?!\*)(.+?)\*(?:\n|$)", below, re.S)
    return plain(found[1]) if found else ""

def heading(source:str, chapter:Chapter)->str:
    "The title cell: the line under the title set apart, then where the page comes from."
    source = re.sub(r"^> (.*)$", r"{.summary}\n\1", source, count=1, flags=re.M)
    if not chapter.module: return source
    title,_,rest = source.partition("\n")
    return (f"{title}\n\n```{{py:module}} {chapter.module}\n```\n{rest}\n\n"
            f"{{.origin}}\nNotebook {{download}}`{chapter.path.name} <notebooks/{chapter.path.name}>` · module {{py:mod}}`{chapter.module}`\n")

def page(chapter:Chapter, book:list[Chapter])->nbformat.NotebookNode:
    "The chapter as a notebook that myst-nb renders."
    prose,cells,titled = Prose(book, chapter),[],False
    for i,cell in enumerate(chapter.nb.cells):
        if cell.cell_type == "markdown":
            text = prose(directives(cell.source)[1])
            if not titled and text.startswith("# "): text,titled = heading(text, chapter),True
            cells.append(new_markdown_cell(text))
        elif cell.cell_type == "code" and (new := code_cell(cell, caption_after(chapter.nb, i))):
            cells.append(new)
            cells += [new_markdown_cell(describe(e, prose)) for e in chapter.entries.get(cell.id, [])]
    kept = dict(language_info=dict(name="python", pygments_lexer="ipython3")) | {k:v for k,v in chapter.nb.metadata.items() if k == "widgets"}
    return nbformat.v4.new_notebook(cells=cells, metadata=kept)

def contents(book:list[Chapter], pages:list[str])->str: # `pages` are those that no notebook makes
    "The hidden tables of contents that fill the side bar."
    rows = "\n".join(f"{c.number} · {c.title} <{c.page}>" if c.number else f"{c.title} <{c.page}>" for c in book[1:])
    return f"```{{toctree}}\n:hidden:\n:caption: Chapters\n\n{rows}\n```\n\n```{{toctree}}\n:hidden:\n:caption: Library\n\n" + "\n".join(pages) + "\n```\n"

def reference(book:list[Chapter])->str:
    "One page that lists every public object by chapter."
    lines = ["# Reference", "", "{.summary}", "Every public name by chapter; each leads to its source, its parameters and the lesson around it", ""]
    for c in book:
        top = [e for cell in c.entries.values() for e in cell if all(map(public, e.name.split(".")))]
        if not top: continue
        prose = Prose(book, c)
        lines += [f"## {c.title}", "", f"`from {c.module} import …`", "", "| name | what it is |", "|---|---|"]
        cell = lambda text: text.replace("|", "\\|")
        lines += [f"| {{py:obj}}`{e.name} <{e.full}>` | {cell(prose(e.summary)) or e.kind} |" for e in top]
        lines.append("")
    return "\n".join([*lines, "All names by letter: {ref}`genindex`.", ""])

def talk(extra:Path, modules:Path)->str: # `extra` gets the folder `talk`, which is copied as it is
    "The page on which a visitor's browser runs the model that lies in docs/demo."
    from llm_scratch.browser import page_piece, write_page
    try: facts = read_json(write_page(DOCS/"demo", extra/"talk", modules/"onnxruntime-web")/"page.json")
    except UserError as e: raise SystemExit(f"docs/build.py: {e}") from None
    lead = "{.summary}\nThe model that this book trains, in your own browser: nothing is installed, and nothing that you type leaves this page\n"
    return f"# {facts['title']}\n\n{lead}\n```{{raw}} html\n{page_piece(facts, 'talk/')}```\n\nHow it is made, and proved equal to the model in Python: [chapter 10e](browser.ipynb).\n"

# --- the build -------------------------------------------------------------------------------------------------

def node_modules()->Path:
    "The folder of npm packages, as package-lock.json pins them; installed when it is missing or older, by one process at a time."
    with FileLock(DOCS/".npm.lock"): return _node_modules()

def _node_modules()->Path:
    folder = DOCS/"node_modules"
    mark = folder/".package-lock.json"
    if mark.is_file() and mark.stat().st_mtime >= (DOCS/"package-lock.json").stat().st_mtime: return folder
    for tool in ("node", "npm"):
        if not shutil.which(tool): raise SystemExit(f"docs/build.py: {tool} is missing; the site takes math, widgets and a runtime of models from npm: install Node.js 18 or newer")
    done = subprocess.run(["npm", "ci", "--prefix", DOCS, "--ignore-scripts", "--no-audit", "--no-fund"], capture_output=True, text=True, check=False)
    if done.returncode: raise SystemExit(f"docs/build.py: npm ci failed: {' '.join(done.stderr.split())[-400:]}")
    mark.touch()
    return folder

def vendor(modules:Path, static:Path)->None:
    "Copy what the browser needs from npm's folder."
    for source,target in {"@jupyter-widgets/html-manager/dist/embed.js": "widgets/embed.js", "katex/dist/katex.min.css": "katex/katex.min.css"}.items():
        (static/target).parent.mkdir(parents=True)
        shutil.copyfile(modules/source, static/target)
    shutil.copytree(modules/"katex/dist/fonts", static/"katex/fonts", ignore=lambda _,names: [n for n in names if not n.endswith(".woff2")])

def build(nbs:Path, out:Path)->int:
    "Render the book in `nbs` into `out`; the number of pages that it wrote."
    if not shutil.which("node"): raise SystemExit("docs/build.py: node is missing; it sets the formulas: install Node.js 18 or newer")
    book = chapters(nbs)
    with tempfile.TemporaryDirectory(prefix="site") as tmp:
        source,static,html = (Path(tmp)/name for name in ("source", "static", "html"))
        (source/"notebooks").mkdir(parents=True)
        (extra := Path(tmp)/"extra").mkdir()
        vendor(modules := node_modules(), static)
        pages = {"reference":reference(book)}
        if any(c.module == f"{LIB}.browser" for c in book): pages = {"talk":talk(extra, modules)} | pages
        for c in book:
            nb = page(c, book)
            if c is book[0]: nb.cells.append(new_markdown_cell(contents(book, list(pages))))
            nbformat.write(nb, source/f"{c.page}.ipynb")
            shutil.copyfile(c.path, source/"notebooks"/c.path.name)
        for name,text in pages.items(): (source/f"{name}.md").write_text(text, encoding="utf-8")
        sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", DOCS, "-D", f"html_static_path=_static,{static}", "-D", f"html_extra_path={extra}", source, html]
        if subprocess.run(sphinx, check=False).returncode: raise SystemExit("docs/build.py: the warnings above are errors: no site was written")
        for name in (".doctrees", ".buildinfo"): shutil.rmtree(html/name, ignore_errors=True) if (html/name).is_dir() else (html/name).unlink(missing_ok=True)
        (html/".nojekyll").touch() # or GitHub Pages leaves out the folders that begin with _
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as new: shutil.copytree(html, new)
    return len(list(out.glob("*.html")))

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nbs", type=Path, default=ROOT/"nbs", metavar="FOLDER", help="the notebooks")
    parser.add_argument("--out", type=Path, default=ROOT/"_docs", metavar="FOLDER", help="where the site goes; replaced")
    args = parser.parse_args()
    n_pages = build(args.nbs, args.out)
    print(f"{args.out}/index.html: {n_pages} pages, {sum(f.stat().st_size for f in args.out.rglob('*') if f.is_file())/1e6:.1f} MB")

if __name__ == "__main__": main()

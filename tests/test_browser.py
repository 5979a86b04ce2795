"The model in a page: JavaScript says what Python says, packs are whole or refused, and a real browser writes the text that ONNX Runtime writes."
import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from models import filled

from llm_scratch import browser as b
from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.browser import (BUDGET, DECODER_JS, PAGE_CSS, PAGE_JS, RUNTIME, RUNTIME_VERSION, SAMPLING_JS, TOKENIZER_JS, character_kinds, export_browser, find_runtime, open_pack, pack_model,
                                 page_bytes, page_piece, run_node, run_wasm, thousand_strings, to_int8_weights, write_page)
from llm_scratch.core import UserError, read_json
from llm_scratch.data import tiny_corpus
from llm_scratch.generation import generate, next_probs
from llm_scratch.interchange import copy_tokenizer, save_hf
from llm_scratch.tokenization import HubTokenizer, save_tokenizer, to_tokenizers_json, train_bpe

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT/"docs"/"demo"
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="JavaScript is run by Node.js, which is not installed")
needs_chromium = pytest.mark.skipif(not CHROMIUM or not shutil.which("npm"), reason="there is no Chromium or no npm here: apt-get install chromium npm, or set CHROMIUM")

pytest.importorskip("onnx", reason="a page's model is an ONNX file: pip install -e '.[deploy]'")
pytest.importorskip("onnxruntime", reason="a page's model is an ONNX file: pip install -e '.[deploy]'")
from llm_scratch.deployment import OnnxDecoder  # noqa: E402


@pytest.fixture(scope="module")
def texts(): return [d["text"] for d in tiny_corpus()]


@pytest.fixture(scope="module")
def tok(texts): return train_bpe([*texts, *thousand_strings(texts, 9)], 1200) # knows pairs of blanks and of odd letters: one that does not can't tell where they were split


@pytest.fixture(scope="module")
def kinds(): return character_kinds()


@pytest.fixture(scope="module")
def runtime():
    "docs/node_modules with onnxruntime-web and what drives the browser."
    if not shutil.which("npm"): pytest.skip("onnxruntime-web comes from npm, which is not installed")
    done = subprocess.run([sys.executable, "-c", "import build; build.node_modules()"], cwd=ROOT/"docs", capture_output=True, text=True, timeout=300, check=False)
    if not (ROOT/"docs"/"node_modules"/"onnxruntime-web").is_dir(): pytest.skip(f"onnxruntime-web comes from npm: {(done.stderr.splitlines() or ['npm ci left it out'])[-1]}")
    return find_runtime()


@pytest.fixture(scope="module")
def home(tok, tmp_path_factory):
    "A model's folder: two layers, random weights."
    folder = tmp_path_factory.mktemp("home")
    model = filled(Decoder(ModelConfig(tok.vocab_size, 300, n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ff=64, d_head=8)))
    save_tokenizer(tok, folder/"tokenizer")
    save_hf(model, folder/"model", special_ids=dict(bos_token_id=tok.eot_id, eos_token_id=tok.eot_id))
    copy_tokenizer(folder/"tokenizer", folder/"model")
    return folder/"model"


@pytest.fixture(scope="module")
def page(home, runtime, tmp_path_factory):
    return export_browser(home, tmp_path_factory.mktemp("page")/"page", title="A <b>small</b> model", about=["It knows & says nothing."], prompts=["# Soup", "plain"], licence="none")


# --- the tokenizer --------------------------------------------------------------------------------------------------

ENCODE = """import { Tokenizer } from './tokenizer.js';
const tok = new Tokenizer(input.saved, input.kinds);
print(input.strings.map(s => { try { return tok.encode(s); } catch (error) { return String(error.message); } }));"""


def encoded(saved, kinds, strings): return run_node({"tokenizer.js":TOKENIZER_JS}, ENCODE, dict(saved=saved, kinds=kinds, strings=strings))


@needs_node
def test_ids_are_pythons_on_a_thousand_strings(tok, kinds, texts):
    strings = thousand_strings(texts, 1)
    assert len(strings) == 1000 and len(set("".join(strings))) > 1500
    assert encoded(to_tokenizers_json(tok), kinds, strings) == [tok.encode(s) for s in strings]


@needs_node
def test_the_sites_tokenizer_is_pythons(texts):
    saved, theirs = read_json(DEMO/"tokenizer.json"), HubTokenizer(DEMO, open_pack(DEMO)["eot_id"])
    strings = [*texts, *thousand_strings(texts, 2)[:600]] # real text, blanks, emoji, code; letters that the tokenizers library may not know are not its fault
    assert encoded(saved, read_json(DEMO/"kinds.json"), strings) == [theirs.encode(s) for s in strings]


@needs_node
def test_every_character_is_of_pythons_kind(kinds):
    "All of Unicode, one by one."
    script = """const kinds = Object.fromEntries(Object.entries(input).map(([name, spans]) => [name, new RegExp(`[${spans}]`, 'u')])), runs = { L: [], N: [], s: [] };
for (const name in kinds) for (let c = 0, open = -1; c <= 0x110000; c++) {
  const is = c < 0x110000 && !(c >= 0xd800 && c < 0xe000) && kinds[name].test(String.fromCodePoint(c));
  if (is && open < 0) open = c;
  if (!is && open >= 0) { runs[name].push([open, c - 1]); open = -1; }
}
print(runs);"""
    runs = run_node({}, script, kinds)
    for name, kind in dict(L=r"\p{L}", N=r"\p{N}", s=r"\s").items():
        is_kind = regex.compile(kind).match
        assert {c for a, z in runs[name] for c in range(a, z+1)} == {c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and is_kind(chr(c))}, name


@needs_node
def test_patterns_of_others_are_translated_or_refused(kinds):
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    texts = ["It's I'LL we'rE  two\x85\n x²", "a\ufeff b ſ'ſx"]
    script = "import { translate } from './split.js'; print(input.patterns.map(p => { try { const made = translate(p, input.kinds); return input.texts.map(t => t.match(made)); } catch (e) { return e.message; } }));"
    *said, refused = run_node({"split.js":b._SPLIT_JS}, script, dict(patterns=[gpt2, llama3, r"\w+|\P{L}"], kinds=kinds, texts=texts))
    assert said == [[regex.findall(p, t) for t in texts] for p in (gpt2, llama3)]
    assert refused == r"\w in the tokenizer's pattern is not known here"


@needs_node
def test_ids_become_text_whole_characters_at_a_time(tok, kinds):
    rng = random.Random(0)
    rows = [tok.encode("\ufeffé 👩‍🍳 日本"), *([rng.randrange(tok.vocab_size) for _ in range(rng.randrange(40))] for _ in range(200))]
    script = """import { Tokenizer } from './tokenizer.js';
const tok = new Tokenizer(input.saved, input.kinds);
print(input.rows.map(row => { const read = tok.reader(); return [...row.map(id => read(id)), read()]; }));"""
    pieces = run_node({"tokenizer.js":TOKENIZER_JS}, script, dict(saved=to_tokenizers_json(tok), kinds=kinds, rows=rows))
    assert ["".join(p) for p in pieces] == [tok.decode(row) for row in rows]
    assert "\ufffd" not in "".join(pieces[0]) and any(p == "" for p in pieces[0]) # a character that is not whole yet is held back


@needs_node
def test_half_a_character_is_refused(tok, kinds):
    said = encoded(to_tokenizers_json(tok), kinds, ["a\ud83c", "\udf4ab", "", "<|endoftext|>"])
    assert said[:2] == ["half of a surrogate pair is no text"]*2 and said[2] == [] and tok.eot_id not in said[3]


@pytest.mark.parametrize("change", [dict(normalizer=dict(type="NFC")), dict(pre_tokenizer=dict(type="ByteLevel", use_regex=True)), dict(pre_tokenizer=None), dict(model=dict(type="WordPiece", vocab={}, merges=[]))])
def test_other_tokenizers_are_refused(tok, tmp_path, change):
    (tmp_path/"tokenizer.json").write_text(json.dumps(to_tokenizers_json(tok) | change))
    with pytest.raises(UserError, match="not a tokenizer that the page can run"): pack_model(DEMO/"model.onnx", tmp_path, tmp_path/"pack")
    assert not (tmp_path/"pack").exists()


# --- chance ---------------------------------------------------------------------------------------------------------

@needs_node
def test_probabilities_are_pythons():
    rng = np.random.default_rng(3)
    cases = [(rng.normal(0, s, 500).tolist(), t, p) for s in (.5, 5.) for t in (.05, .7, 1.5) for p in (.1, .9, 1.)]
    said = run_node({"sampling.js":SAMPLING_JS}, "import { nextProbs } from './sampling.js'; print(input.map(([s, t, p]) => [...nextProbs(s, t, p)]));", cases)
    for (scores, t, p), probs in zip(cases, said): assert np.allclose(probs, next_probs(torch.tensor([scores], dtype=torch.float64), t, top_p=p)[0], atol=1e-9)


@needs_node
def test_draws_follow_the_probabilities():
    script = """import { chance, choose } from './sampling.js';
const random = chance(7), counts = [0, 0, 0, 0];
for (let i = 0; i < 20000; i++) counts[choose([2, 1, 0, -9], { temperature: 1, topP: .95 }, random)]++;
print({ counts, first: [0, 1, 2, 2 ** 32].map(s => chance(s)()), greedy: choose([1, 3, 3, 2], { temperature: 0 }) });"""
    said = run_node({"sampling.js":SAMPLING_JS}, script)
    want = next_probs(torch.tensor([[2., 1., 0., -9.]]), top_p=.95)[0].numpy()
    assert np.allclose(np.array(said["counts"])/20000, want, atol=.015) and said["counts"][3] == 0
    assert len(set(said["first"])) == 3 and said["first"][0] == said["first"][3] and said["greedy"] == 1 # 32 bits of seed; of two best the first, as argmax takes it


# --- the graph ------------------------------------------------------------------------------------------------------

def test_rounding_keeps_all_but_the_last_digits(tmp_path):
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    rng = np.random.default_rng(0)
    w, e, few = rng.normal(size=(40, 60)).astype(np.float32), rng.normal(size=(50, 40)).astype(np.float32), rng.normal(size=(40, 2)).astype(np.float32)
    w[:, 3] = 0
    w[5, 5] = 90 # one that is far out spoils its own column only
    nodes = [helper.make_node("Gather", ["e", "i"], ["x"]), helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["x", "few"], ["z"])]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [info("i", TensorProto.INT64, ["T"])], [info(n, TensorProto.FLOAT, ["T", k]) for n, k in (("x", 40), ("y", 60), ("z", 2))],
                              [numpy_helper.from_array(a, n) for n, a in (("w", w), ("e", e), ("few", few))])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.metadata_props.add(key="llm_scratch", value="{}")
    onnx.save(model, tmp_path/"a.onnx")
    to_int8_weights(tmp_path/"a.onnx", tmp_path/"b.onnx")
    new = onnx.load(tmp_path/"b.onnx")
    onnx.checker.check_model(new, full_check=True)
    assert [p.key for p in new.metadata_props] == ["llm_scratch"] and [o.name for o in new.graph.output] == ["x", "y", "z"]
    assert {t.name:t.data_type for t in new.graph.initializer}["few"] == TensorProto.FLOAT
    import onnxruntime
    x, y, z = onnxruntime.InferenceSession(tmp_path/"b.onnx", providers=["CPUExecutionProvider"]).run(None, dict(i=np.arange(50)))
    assert (abs(x-e) <= abs(e).max(1, keepdims=True)/127*.5001).all() and np.allclose(z, x@few, atol=1e-5)
    stored = {t.name:numpy_helper.to_array(t) for t in new.graph.initializer}
    back = stored["w.int8"]*stored["w.scale"]
    step = abs(w).max(0)/127
    assert (abs(back-w) <= step*.5001+1e-12).all() and (back[:, 3] == 0).all() and np.allclose(y, x@back, atol=1e-4)


@needs_node
def test_wasm_writes_what_python_writes(runtime):
    "The site's model: prefill, cache, context that ends."
    facts, decoder = open_pack(DEMO), OnnxDecoder(DEMO/"model.onnx")
    tok = HubTokenizer(DEMO, facts["eot_id"])
    most = facts["sizes"]["context_len"]
    prompts = [f"{facts['prompts'][0]}\n\n", "", "# Crème brûlée 🍮\n\nIngredients:\n"]
    given = [[facts["eot_id"], *tok.encode(p)] for p in prompts]
    long = (given[0]*most)[:most-3]
    script = """import { Decoder, write } from './decoder.js';
const decoder = await Decoder.open(ort, file('model.onnx'), input.sizes), out = [], why = [];
for (const ids of input.given) {
  const new_ids = [], words = write(decoder, ids, { most: 24, temperature: 0 });
  let step = await words.next();
  for (; !step.done; step = await words.next()) new_ids.push(step.value);
  out.push(new_ids); why.push(step.value);
}
const refused = await decoder.read([1, 1]).then(() => '', e => e.message);
print({ out, why, refused });"""
    files = {"decoder.js":DECODER_JS, "sampling.js":SAMPLING_JS, "model.onnx":DEMO/"model.onnx"}
    said = run_wasm(files, script, dict(sizes=facts["sizes"], given=[*given, long]), runtime=runtime)
    new = lambda ids, n: generate(decoder, torch.tensor([ids]), n, temperature=0)[0, len(ids):].tolist()
    assert said["out"] == [*(new(ids, 24) for ids in given), new(long, 3)] and said["why"] == ["full"]*4
    assert said["refused"] == "513 tokens are more than the 512 that the model can see" # 511 were read: the scores after the last are never asked for


# --- packs and pages ------------------------------------------------------------------------------------------------

def test_the_sites_model_is_small_and_says_whose_it_is():
    facts = open_pack(DEMO)
    assert sum(p.stat().st_size for p in DEMO.iterdir()) < 6_000_000
    assert "CC BY-SA 4.0" in facts["licence"] and "Wikibooks" in facts["licence"] and facts["prompts"][0].startswith("# ")
    record = read_json(ROOT/"nbs"/"browser.json")
    assert record["sha256"]["model.onnx"] == b.sha256_file(DEMO/"model.onnx") and record["page_bytes"] < BUDGET and record["runtime"] == RUNTIME_VERSION


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "kinds.json", "facts.json"])
def test_a_damaged_pack_is_refused(tmp_path, name):
    pack = shutil.copytree(DEMO, tmp_path/"pack")
    data = bytearray((pack/name).read_bytes())
    data[len(data)//2] ^= 1
    (pack/name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is corrupt"): open_pack(pack)
    (pack/name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"): open_pack(pack)


def test_the_runtime_is_this_one_or_none(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"npm install --ignore-scripts onnxruntime-web@{RUNTIME_VERSION}"): find_runtime(tmp_path)
    for name in RUNTIME: (tmp_path/name).write_bytes(b"another version")
    with pytest.raises(UserError, match="ort.wasm.min.mjs is corrupt"): find_runtime(tmp_path)
    with pytest.raises(UserError, match="no model with a tokenizer"):
        monkeypatch.setattr(b, "find_runtime", lambda folder: tmp_path)
        export_browser(tmp_path, tmp_path/"page")


def test_versions_are_those_of_npm():
    assert json.loads((ROOT/"docs"/"package.json").read_text())["dependencies"]["onnxruntime-web"] == RUNTIME_VERSION


def test_an_onnx_file_of_others_is_refused(tmp_path):
    import onnx
    model = onnx.load(DEMO/"model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path/"m.onnx")
    with pytest.raises(UserError, match="doesn't say what it holds"): pack_model(tmp_path/"m.onnx", DEMO, tmp_path/"pack")


def test_a_page_has_all_that_it_loads_and_no_more(page, runtime):
    saved = read_json(page/"page.json")
    assert sum(f["bytes"] for f in saved["files"].values()) < page_bytes(page) < BUDGET
    for name, f in saved["files"].items(): assert (page/name).stat().st_size == f["bytes"] and b.sha256_file(page/name) == f["sha256"]
    html = (page/"index.html").read_text(encoding="utf-8")
    assert "A &lt;b&gt;small&lt;/b&gt; model" in html and "<b>small" not in html and "It knows &amp; says nothing." in html
    assert not regex.search(r"(?:src|href)=\"(?:https?:)?//", html) and "://" not in PAGE_JS+PAGE_CSS+DECODER_JS+SAMPLING_JS+TOKENIZER_JS
    assert "MIT licence" in (page/"NOTICE.txt").read_text(encoding="utf-8")
    piece = page_piece(saved, "talk/")
    assert 'src="talk/talk.js"' in piece and 'href="talk/talk.css"' in piece


def test_over_the_budget_nothing_is_written(runtime, tmp_path):
    (tmp_path/"page").mkdir()
    (tmp_path/"page"/"old.html").touch()
    with pytest.raises(UserError, match="budget is 1,000,000: its largest file is ort/ort-wasm-simd-threaded.wasm"): write_page(DEMO, tmp_path/"page", runtime, 10**6)
    assert [p.name for p in tmp_path.rglob("*")] == ["page", "old.html"]


# --- a real browser -------------------------------------------------------------------------------------------------

@contextmanager
def served(folder:Path):
    "The folder behind Python's own web server, on a free port of this machine."
    with subprocess.Popen([sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        port = regex.search(r"port (\d+)", server.stdout.readline())[1]
        try: yield f"http://127.0.0.1:{port}/"
        finally: server.kill()


def talk(url:str, *options:str)->dict:
    "What tests/talk.mjs reports."
    done = subprocess.run(["node", ROOT/"tests"/"talk.mjs", url, *options], env=os.environ | dict(CHROMIUM=CHROMIUM), capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@needs_chromium
def test_chromium_writes_what_python_writes(page, tok, texts, tmp_path):
    strings, prompts = thousand_strings(texts, 5), ["# Soup", "plain text, é 日 👍"]
    (tmp_path/"strings.json").write_text(json.dumps(strings))
    with served(page) as url: said = talk(url, "--strings", tmp_path/"strings.json", *(o for p in prompts for o in ("--prompt", p)))
    assert said["problems"] == []
    assert said["before"]["loaded"] == [] and said["before"]["button"] == f"Load the model ({sum(f['bytes'] for f in read_json(page/'page.json')['files'].values())/1e6:.1f} MB)" # nothing large comes unasked
    assert said["focus"][:7] == ["talk-prompt", "Soup", "plain", "talk-temperature", "talk-topp", "talk-seed", "talk-load"]
    assert said["ids"] == [tok.encode(s) for s in strings]
    decoder = OnnxDecoder(page/"model.onnx")
    for prompt, written in zip(("# Soup\n\n", prompts[1]), said["texts"]): # a title gets an empty line
        ids = [tok.eot_id, *tok.encode(prompt)]
        new = generate(decoder, torch.tensor([ids]), 60, temperature=0)[0, len(ids):].tolist()
        assert tok.eot_id not in new and written["text"].startswith(prompt+tok.decode(new).rstrip("\ufffd")), written["text"][:200]
        assert regex.fullmatch(r"\d+ tokens, \d+ a second\. (The model has ended its text|The 300 tokens that it can see are used up)\.", written["status"])
    first, same, other = said["again"]
    assert first["text"] == same["text"] != other["text"] and (same["seed"], other["seed"]) == ("0", "1")
    assert said["stopped"].endswith("Stopped.") and said["long"].startswith("The text has ") and said["long"].endswith("the model can see 300: give a shorter one")
    assert set(said["sent"]) == {"", "talk.css", "talk.js", "tokenizer.js", "sampling.js", "decoder.js", "page.json", "model.onnx", "tokenizer.json", "kinds.json", *(f"ort/{name}" for name in RUNTIME)}


@needs_chromium
def test_a_file_that_was_changed_on_the_way_is_told(page, tmp_path):
    broken = shutil.copytree(page, tmp_path/"broken")
    data = bytearray((broken/"model.onnx").read_bytes())
    data[len(data)//2] ^= 1
    (broken/"model.onnx").write_bytes(data)
    with served(broken) as url: said = talk(url, "--broken")
    assert said["problems"] == [] and said["ready"]["status"] == "model.onnx is not the file that was exported: it is damaged or of another version"

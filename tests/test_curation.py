"Cleaning as a stream: the same bytes for any number of workers, after any kill, and from another engine; bad input is counted, never fatal."
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch import curation
from llm_scratch.core import UserError
from llm_scratch.curation import WriteParts, chunks, clean_parts, curate, finish, merge_parts, write_part
from llm_scratch.data import Document
from llm_scratch.duplicates import MinHashing
from llm_scratch.sources import Drop, ListStream, Report, open_streams

ROOT = Path(__file__).resolve().parent.parent
HASHING = MinHashing(n_perms=16, n_bands=4)


def doc(i:int, text:str|None=None, source:str="toy")->Document: return Document(f"text number {i} of a corpus that has many of them, each {i*i} words away" if text is None else text, source, f"{source}/{i}", {})


def shorten(doc): return doc._replace(text=doc.text[:30]) if len(doc.text) > 60 else doc
def no_sevens(doc): return Drop("a seven") if "7" in doc.text else doc
def die(doc): return os._exit(1) if doc.id == "toy/5" else doc
def fail(doc): raise RecursionError("deep")


def rows(folder:Path)->list[tuple]:
    from pyarrow import parquet
    return [tuple(r.values()) for p in sorted((folder/"documents").iterdir()) for r in parquet.read_table(p).to_pylist()]


def checksums(folder:Path)->dict[str, str]: return json.loads((folder/"manifest.json").read_text())["sha256"]


# --- chunks and parts ---------------------------------------------------------------------------------------------

@given(st.lists(st.one_of(st.text(max_size=30).map(lambda t: doc(0, t)), st.just(Drop("bad", "file"))), max_size=40), st.integers(1, 9), st.integers(1, 60))
def test_chunks_are_the_stream(items, n_docs, n_bytes):
    found = list(chunks(items, n_docs, n_bytes))
    assert [x for c in found for x in c] == items and all(1 <= len(c) <= n_docs for c in found)
    size = lambda c: sum(len(x.text) for x in c if isinstance(x, Document))
    assert all(size(c[:-1]) < n_bytes for c in found), "a chunk ends as soon as it is full"
    assert all(len(c) == n_docs or size(c) >= n_bytes for c in found[:-1]), "and not before"


def test_a_part_is_written_once_and_whole(tmp_path, monkeypatch):
    items = [doc(1), Drop("broken", "x.gz"), doc(7), doc(2, "half \ud800")]
    write_part(items, tmp_path/"0", [no_sevens], HASHING, dict(at=4))
    saved = json.loads((tmp_path/"0"/"report.json").read_text())
    report = Report.from_rows(saved["report"])
    assert saved["state"] == dict(at=4)
    assert {k: t.n_docs for k, t in report.drops().items()} == {("read", "broken"): 1, ("no_sevens", "a seven"): 1, ("is_text", "half of a surrogate pair"): 1}
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path/"0").iterdir()}
    write_part([doc(9)], tmp_path/"0", [], HASHING)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path/"0").iterdir()} == before
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(curation, "write_json", full)
    with pytest.raises(OSError): write_part(items, tmp_path/"1", [], HASHING)
    assert [p.name for p in tmp_path.iterdir()] == ["0"]


def test_facts_are_of_what_stays(tmp_path):
    write_part([doc(1, "x"*9)._replace(meta=dict(language="en", pii=dict(email=2))), doc(7)._replace(meta=dict(language="fr"))], tmp_path/"0", [no_sevens], HASHING)
    facts = {(k, v): n for k, v, n in json.loads((tmp_path/"0"/"report.json").read_text())["facts"]}
    assert facts["language", "en"] == 1 and ("language", "fr") not in facts and facts["private", "email"] == 2
    assert facts["length after", "4"] == 1 and sum(n for (k, _), n in facts.items() if k == "length before") == 2


# --- the whole --------------------------------------------------------------------------------------------------------

@pytest.fixture
def stream(): return ListStream("toy", [x for i in range(40) for x in ([doc(i), Drop("bad line", f"f, line {i}")] if i % 9 == 0 else [doc(i)])] + [doc(100, doc(3).text)])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([*"pqrstu"])), min_size=1, max_size=25), st.integers(1, 7), st.integers(1, 7))
def test_the_size_of_parts_does_not_matter(tmp_path_factory, words, one, two):
    docs = [doc(i, " ".join(f"{w}{k}" for k in range(12)), s) for i, (s, w) in enumerate(words)]
    found = []
    for n in (one, two):
        folder = tmp_path_factory.mktemp("run")
        clean_parts(ListStream("toy", docs), [], folder/"parts", hashing=HASHING, part_docs=n)
        merge_parts(folder/"parts", folder, HASHING)
        found.append(rows(folder))
    assert found[0] == found[1]
    assert [r[0][0] for r in found[0]] == list(dict.fromkeys(w for _, w in words)), "the first of equal texts stays, in the order of the stream"


def test_workers_change_nothing(stream, tmp_path):
    folders = [curate(stream_, [shorten, no_sevens], tmp_path/str(n), hashing=HASHING, part_docs=5, workers=n) for n, stream_ in ((1, stream), (3, ListStream("toy", stream.items)))]
    assert checksums(folders[0]) == checksums(folders[1])
    names = {p.relative_to(folders[0]).as_posix() for p in folders[0].rglob("*") if p.is_file()}
    assert {"data_card.md", "report.json", "manifest.json", "lengths.svg", "stages.svg", "sources.svg"} <= names
    assert sorted(p.name for p in (tmp_path/"1").iterdir()) == ["curated", "plan.json"], "parts are gone when they are not needed any more"


@pytest.mark.parametrize("gone", [{0}, {3}, {8, 9}, {0, 2, 4, 6, 8}, set(range(9)), {1, 2, 3, 7}], ids=str)
def test_any_gap_is_filled_and_nothing_else_is_touched(stream, tmp_path, gone):
    clean_parts(stream, [no_sevens], tmp_path/"parts", hashing=HASHING, part_docs=5)
    whole = {p.name: {f.name: f.read_bytes() for f in p.iterdir()} for p in (tmp_path/"parts").iterdir()}
    assert len(whole) == 10
    for n in gone: shutil.rmtree(tmp_path/"parts"/f"{n:06d}")
    stamps = {p.name: p.stat().st_ino for p in (tmp_path/"parts").iterdir()}
    read = []
    class Watched(ListStream):
        def read(self, place):
            for place, item in super().read(place):
                read.append(place["i"])
                yield place, item
    clean_parts(Watched("toy", stream.items), [no_sevens], tmp_path/"parts", hashing=HASHING, part_docs=5)
    assert {p.name: {f.name: f.read_bytes() for f in p.iterdir()} for p in (tmp_path/"parts").iterdir()} == whole
    assert all((tmp_path/"parts"/name).stat().st_ino == inode for name, inode in stamps.items())
    assert {(i-1)//5 for i in read} == gone, "only what is missing is read"


PROGRAM = """
import sys, time
from llm_scratch.curation import curate
from llm_scratch.duplicates import MinHashing
from llm_scratch.sources import PinnedStream
from itertools import islice

class Few(PinnedStream):
    def read(self, place): return islice(super().read(place), 3000-place.get("i", 0))

if __name__ == "__main__": curate(Few("manuals"), [], sys.argv[1], part_docs=60, workers=int(sys.argv[2]), hashing=MinHashing(n_perms=16, n_bands=4))
"""


def test_killed_at_random_moments_nothing_is_lost_or_twice(tmp_path):
    (tmp_path/"program.py").write_text(PROGRAM)
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    start = lambda name, workers: subprocess.Popen([sys.executable, tmp_path/"program.py", tmp_path/name, str(workers)], env=env, stderr=subprocess.PIPE)
    assert start("whole", 1).wait(timeout=100) == 0
    rng, stopped = random.Random(0), []
    for workers, enough in ((1, 1), (2, 12), (1, 30)):
        child, parts = start("killed", workers), tmp_path/"killed"/"parts"
        while child.poll() is None and len(list(parts.glob("[0-9]*"))) < enough: time.sleep(.002)
        time.sleep(rng.uniform(0, .05))
        child.kill()
        child.communicate()
        stopped.append(len(list(parts.glob("[0-9]*"))))
    last = start("killed", 2)
    assert last.wait(timeout=100) == 0, last.stderr.read()
    assert stopped == sorted(stopped) and 0 < stopped[0] < 50, stopped
    assert checksums(tmp_path/"killed"/"curated") == checksums(tmp_path/"whole"/"curated")


def test_workers_leave_when_their_parent_is_killed(tmp_path):
    psutil = pytest.importorskip("psutil")
    (tmp_path/"program.py").write_text(PROGRAM.replace("3000", "300000"))
    child = subprocess.Popen([sys.executable, tmp_path/"program.py", tmp_path/"run", "2"], env=os.environ | dict(PYTHONPATH=str(ROOT)), stderr=subprocess.DEVNULL)
    while child.poll() is None and not list((tmp_path/"run"/"parts").glob("[0-9]*")): time.sleep(.02)
    family = psutil.Process(child.pid).children(recursive=True)
    assert len(family) >= 2
    child.kill()
    child.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_a_dead_worker_is_told_in_one_line_and_what_is_done_stays(tmp_path):
    stream = ListStream("toy", [doc(i) for i in range(12)])
    with pytest.raises(UserError, match="a worker was killed.*fewer workers than 2"): curate(stream, [die], tmp_path/"run", hashing=HASHING, part_docs=2, workers=2)
    assert not (tmp_path/"run"/"curated").exists()


def test_a_stage_that_fails_drops_the_document(tmp_path):
    with pytest.raises(UserError, match="no document is left"): curate(ListStream("toy", [doc(1)]), [fail], tmp_path/"run", hashing=HASHING)


def test_what_can_not_go_on(stream, tmp_path):
    curate(stream, [shorten], tmp_path/"run", hashing=HASHING)
    again = lambda **k: curate(ListStream("toy", stream.items), **dict(stages=[shorten], folder=tmp_path/"run", hashing=HASHING) | k)
    assert rows(again()) == rows(tmp_path/"run"/"curated")
    with pytest.raises(UserError, match="begun with other stages"): again(stages=[no_sevens])
    with pytest.raises(UserError, match="begun with other hashing"): again(hashing=MinHashing())
    with pytest.raises(UserError, match="begun with other part_docs"): again(part_docs=7)
    with pytest.raises(UserError, match="begun with other source"): curate(ListStream("else", stream.items), [shorten], tmp_path/"run", hashing=HASHING)
    (tmp_path/"photos").mkdir()
    (tmp_path/"photos"/"cat.jpg").touch()
    with pytest.raises(UserError, match="in use for something else"): again(folder=tmp_path/"photos")
    with pytest.raises(UserError, match="no document"): curate(ListStream("none", []), [], tmp_path/"none", hashing=HASHING)


# --- the card ---------------------------------------------------------------------------------------------------------

def test_the_card_counts_what_there_is(tmp_path):
    docs = [doc(i, source="recipes") for i in range(10)] + [doc(0, source="mine")]
    folder = curate(ListStream("both", [*docs, Drop("bad | line", "f.jsonl, line 3")]), [shorten, no_sevens], tmp_path/"run", hashing=HASHING)
    card = (folder/"data_card.md").read_text(encoding="utf-8")
    kept = rows(folder)
    assert f"{len(kept):,} documents" in card and "from 11 with" in card
    assert "| no_sevens | a seven | 1 |" in card and r"| read | bad \| line | 1 | 0.00 | f.jsonl, line 3 |" in card
    assert "Wikibooks Cookbook" in card and "**mine**: yours" in card
    assert "1. `shorten`" in card and "2. `no_sevens`" in card
    table = [line.split("|")[1:-1] for line in card.split("## Sources")[1].split("##")[0].splitlines() if line.startswith("| ") and "source" not in line and "---" not in line]
    came = {cells[0].strip(): int(cells[1].replace(",", "")) for cells in table}
    stayed = {cells[0].strip(): int(cells[4].replace(",", "")) for cells in table}
    assert came == dict(recipes=10, mine=1) and stayed == {s: n for s, n in (dict(recipes=0, mine=0) | Counter(r[1] for r in kept)).items()}
    for name in ("lengths", "stages", "sources"): assert f"({name}.svg)" in card and (folder/f"{name}.svg").read_text().startswith("<?xml")


# --- another engine, and bad input ----------------------------------------------------------------------------------------

def test_parts_of_datatrove_are_our_parts(tmp_path):
    trove = pytest.importorskip("datatrove.data")
    docs = [doc(i) for i in range(30)] + [doc(31, doc(2).text)]
    for rank in range(2):
        data = (trove.Document(text=d.text, id=d.id, metadata=dict(source=d.source, file_path="x", topic="y")) for d in docs[16*rank:16*rank+16])
        assert list(WriteParts(str(tmp_path/"job"/"parts"), (no_sevens,), HASHING, part_docs=5)(data, rank, 2)) == []
    finish(tmp_path/"job", [no_sevens], HASHING)
    ours = rows(curate(ListStream("toy", docs), [no_sevens], tmp_path/"ours", hashing=HASHING))
    assert [r[:3] for r in rows(tmp_path/"job"/"curated")] == [r[:3] for r in ours]
    assert {r[3] for r in rows(tmp_path/"job"/"curated")} == {'{"topic": "y"}'}


def test_a_heap_of_bad_files_ends_well(tmp_path):
    heap = tmp_path/"heap"
    heap.mkdir()
    good = json.dumps(dict(text="a good line of text that says something to somebody"))
    (heap/"a.jsonl").write_bytes(f'{good}\nnot json\n[1]\n{{"title": "no text"}}\n'.encode() + b'{"text": "\xff\xfe"}\n')
    (heap/"b.jsonl.gz").write_bytes(gzip.compress(f"{good} \n".encode()*2000)[:-20])
    (heap/"c.txt").write_bytes(b"\xff\xfe\x00broken")
    (heap/"d.parquet").write_bytes(b"PAR1 and nothing")
    (heap/"e.html").write_text("<div>"*20_000)
    (heap/"f.txt").write_text("A text that is as good as any other.")
    (heap/"g.warc.gz").write_bytes(b"\x1f\x8b\x08\x00")
    (heap/"h.jsonl").write_text('{"text": "half of a pair \\ud800"}\n')
    folder = curate(open_streams([heap]), [no_sevens], tmp_path/"run", hashing=HASHING)
    unread = (folder/"unread.txt").read_text(encoding="utf-8").splitlines()
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.parquet", "g.warc.gz", "h.jsonl"): assert any(name in line for line in unread), name
    texts = [r[0].strip() for r in rows(folder)]
    assert "A text that is as good as any other." in texts and json.loads(good)["text"] in texts


def test_a_missing_package_ends_the_run_and_is_no_fault_of_the_documents(tmp_path):
    with pytest.raises(UserError, match="llm_scratch\\[data\\]"): curate(ListStream("toy", [doc(1)]), [lacks_a_package], tmp_path/"run", hashing=HASHING)


def lacks_a_package(doc): raise UserError("run `pip install 'llm_scratch[data]'`")


def test_the_credit_of_a_hub_dataset_is_its_recipe(tmp_path):
    folder = curate(ListStream("hub:c4", [doc(i, source="hub:c4") for i in range(3)]), [], tmp_path/"run", hashing=HASHING)
    assert "allenai/c4" in (folder/"data_card.md").read_text() and "ODC-BY" in (folder/"data_card.md").read_text()


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path):
    "Through the command line, with workers: nothing of theirs on the terminal, what is done stays."
    import signal
    command = [sys.executable, "-m", "llm_scratch", "data", "--preset", "tiny", "--sources", "manuals", "--clean", "basic", "--workers", "2", "--run", tmp_path/"run"]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", COLUMNS="200")
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    parts = tmp_path/"run"/"curation"/"parts"
    while child.poll() is None and len(list(parts.glob("[0-9]*"))) < 3: time.sleep(.02)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and out == "" and err.strip() == "llm-scratch: stopped; the same command goes on from here", err
    assert len(list(parts.glob("[0-9]*"))) >= 3 and not (tmp_path/"run"/"curation"/"curated").exists()

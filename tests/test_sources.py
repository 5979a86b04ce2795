"Sources: every cut of every stream, files that are broken in every way, memory that stays bounded, the Hub when it is off."
import gzip
import io
import json
import os
import random
import subprocess
import sys
import zipfile
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st
from pyarrow import parquet

from llm_scratch import sources
from llm_scratch.core import UserError
from llm_scratch.data import SOURCES, Document, cache_dir
from llm_scratch.sources import (HUB, ChainStream, Drop, FileStream, HubRecipe, HubStream, ListStream, MixStream, PinnedStream, Report, apply_stages, decode_html, 
                                 open_streams, read_file, safe_key, stage_name, warc_record, with_progress)

ROOT = Path(__file__).resolve().parent.parent
MB = 2**20


def read(data:bytes, name:str, **kw)->list: return list(read_file(lambda: io.BytesIO(data), name, **kw))
def jsonl(*texts:str)->bytes: return "".join(json.dumps(dict(text=t)) + "\n" for t in texts).encode()
def zipped(members:dict[str, bytes])->bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items(): z.writestr(name, data)
    return out.getvalue()
def table(**columns)->bytes:
    parquet.write_table(pa.table(columns), out := io.BytesIO(), row_group_size=3)
    return out.getvalue()
def letters(name:str, n:int)->ListStream: return ListStream(name, [Document(f"{name}{i}", name, f"{name}/{i}", {}) for i in range(n)])


@pytest.fixture
def folder(tmp_path):
    "Every form, good and bad, in folders within folders."
    root = tmp_path/"corpus"
    members = {"a/one.jsonl": jsonl("a", "b", "c"), "a/two.jsonl.gz": gzip.compress(jsonl("d", "e")), "a/cut.jsonl.gz": gzip.compress(jsonl("f"*50, "g"*50))[:-20], "b/page.html": b"<p>h</p>",
               "b/rows.parquet": table(text=["i", None, "j", "k"]), "b/broken.parquet": table(text=["l"])[:-9], "b/c/crawl.warc.gz": b"".join(gzip.compress(warc_record(f"http://e/{i}", b"<p>m")) for i in range(3)),
               "box.zip": zipped({"x.txt": b"n", "y.jsonl": jsonl("o", "p")}), "bad.zip": b"PK\x03\x04 no zip", "latin.txt": "é".encode("latin-1"), "notes.md": b"q", "empty.txt": b"", "zero.jsonl": b"",
               ".hidden/r.txt": b"hidden", "a/.s.txt": b"hidden", "picture.png": b"\x89PNG"}
    for name, data in members.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(data)
    return root


# --- places -----------------------------------------------------------------------------------------------------------

def resumes(make)->list:
    whole = list(make())
    for cut in range(len(whole)+1):
        first, second = make(), make()
        before = list(islice(first, cut))
        state = json.loads(json.dumps(first.state_dict()))
        assert state["n"] == cut
        second.load_state_dict(state)
        assert before + list(second) == whole, cut
        assert second.state_dict()["n"] == len(whole)
    return whole


def test_every_cut_of_every_file(folder):
    whole = resumes(lambda: FileStream(folder))
    texts = [x.text for x in whole if isinstance(x, Document)]
    assert texts == ["f"*50, *"abcde"][1:] + ["<p>m"]*3 + ["<p>h</p>", "i", "j", "k", "n", "o", "p", "q"]
    drops = {x.where: x.reason for x in whole if isinstance(x, Drop)}
    assert drops == {"corpus/a/cut.jsonl.gz, after 0 items": "broken file: EOFError", "corpus/b/broken.parquet, after 0 items": "broken file: ArrowInvalid", "corpus/b/rows.parquet/2": "no text",
                     "corpus/bad.zip, after 0 items": "broken file: BadZipFile", "corpus/latin.txt": "invalid UTF-8", "corpus/empty.txt": "empty text", "corpus/zero.jsonl": "empty file"}
    ids = [x.id for x in whole if isinstance(x, Document)]
    assert len(set(ids)) == len(ids) and ids[0] == "corpus/a/one.jsonl/1" and all(x.source == "corpus" for x in whole if isinstance(x, Document))


def test_a_stream_can_be_read_again_from_where_it_was_told(folder):
    stream = FileStream(folder)
    whole = list(stream)
    assert list(stream) == whole
    list(islice(stream, 4))
    other = FileStream(folder)
    other.load_state_dict(stream.state_dict())
    assert list(other) == list(other) == whole[4:]
    assert other.state_dict()["n"] == len(whole)


def test_another_process_goes_on(folder):
    first = FileStream(folder)
    before = list(islice(first, 6))
    code = "import json, sys; from llm_scratch.sources import *; s = FileStream(sys.argv[1]); s.load_state_dict(json.loads(sys.argv[2])); print(json.dumps([list(x) for x in s]))"
    run = subprocess.run([sys.executable, "-c", code, str(folder), json.dumps(first.state_dict())], capture_output=True, text=True, check=True, cwd=ROOT)
    assert [list(x) for x in before] + json.loads(run.stdout) == [list(x) for x in FileStream(folder)]


def test_earlier_files_are_not_opened_again(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(sources, "read_file", lambda o, name, m, real=read_file: (opened.append(name) if "/" in name or name in FileStream(folder).files else None, real(o, name, m))[1])
    stream = FileStream(folder)
    for _ in stream:
        if stream.state_dict()["place"] == dict(file="b/rows.parquet", i=3): break
    opened.clear()
    other = FileStream(folder)
    other.load_state_dict(stream.state_dict())
    list(other)
    assert opened[0] == "b/rows.parquet" and opened == sorted(opened, key=list(other.files).index) and len(opened) == len(set(opened)) < len(other.files)


def test_a_place_of_another_stream_or_of_a_file_that_is_gone(folder):
    stream = FileStream(folder)
    list(islice(stream, 2))
    with pytest.raises(UserError, match="the saved place is in corpus, and this is tiny"): open_streams("tiny").load_state_dict(stream.state_dict())
    with pytest.raises(UserError, match="the saved place is in None"): stream.load_state_dict({})
    (folder/stream.state_dict()["place"]["file"]).unlink()
    other = FileStream(folder)
    other.load_state_dict(stream.state_dict())
    with pytest.raises(UserError, match="no such file any more"): list(other)


parts = st.lists(st.integers(0, 6), min_size=1, max_size=4)

@settings(max_examples=60, deadline=None)
@given(parts, st.data())
def test_chains_and_mixes_of_anything(sizes, data):
    make = lambda: [letters(chr(97+i), n) for i, n in enumerate(sizes)]
    chained = [d.text for d in resumes(lambda: ChainStream(make()))]
    assert chained == [f"{chr(97+i)}{k}" for i, n in enumerate(sizes) for k in range(n)]
    weights = data.draw(st.lists(st.floats(.1, 10), min_size=len(sizes), max_size=len(sizes)))
    mixed = resumes(lambda: MixStream(make(), weights))
    for i in range(len(sizes)): assert [d.text for d in mixed if d.source == chr(97+i)] == [f"{chr(97+i)}{k}" for k in range(sizes[i])][:sum(d.source == chr(97+i) for d in mixed)]
    nested = resumes(lambda: ChainStream([MixStream(make(), weights), letters("z", 2), ChainStream([letters("y", 2)])]))
    assert len(nested) == len(mixed) + 4 and nested[:len(mixed)] == mixed


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(.1, 10), st.lists(st.integers(1, 50), min_size=1, max_size=30)), min_size=2, max_size=4))
def test_a_mix_is_never_off_by_more_than_a_document(rows):
    streams = [ListStream(str(i), [Document("é"*n, str(i), f"{i}/{k}", {}) for k, n in enumerate(sizes)]) for i, (_, sizes) in enumerate(rows)]
    weights = [w for w, _ in rows]
    given = [0.]*len(rows)
    largest = max(2*max(sizes)/w for w, sizes in rows)
    count = 0
    for doc in MixStream(streams, weights):
        given[int(doc.source)] += 2*len(doc.text)/weights[int(doc.source)] # two bytes each
        assert max(given) - min(given) <= largest + 1e-6
        count += 1
    assert count >= min(len(s.items) for s in streams)


def test_a_mix_counts_no_drops_and_ends_with_the_first_end():
    bad = ListStream("bad", [Drop("x", "1"), Drop("x", "2"), Document("aa", "bad", "bad/1", {}), Drop("x", "3")])
    items = list(MixStream([bad, letters("g", 9)], [1, 1]))
    assert [i.reason if isinstance(i, Drop) else i.text for i in items] == ["x", "x", "aa", "g0", "x"]
    assert [d.text for d in MixStream([letters("a", 2), letters("b", 5)], [1, 2], size=lambda d: 1)] == ["a0", "b0", "b1", "a1", "b2", "b3"]


def test_a_place_stays_what_it_was_while_the_stream_goes_on():
    make = lambda: ChainStream([MixStream([letters("a", 4), letters("b", 6)], [1, 2]), letters("c", 2)])
    stream = make()
    whole, places = zip(*((doc, stream.state_dict()) for doc in stream))
    for cut, place in enumerate(places, 1):
        other = make()
        other.load_state_dict(place)
        assert [*whole[:cut], *other] == list(whole)


def test_mistakes_with_several_streams():
    with pytest.raises(UserError, match="two sources are called a"): ChainStream([letters("a", 1), letters("b", 1), letters("a", 1)])
    with pytest.raises(UserError, match="two sources are called a"): MixStream([letters("a", 1), letters("a", 1)], [1, 1])
    for weights in ([1], [1, 2, 3], [1, 0], [1, -1]):
        with pytest.raises(UserError, match=r"for 2 streams: give one above 0"): MixStream([letters("a", 1), letters("b", 1)], weights)
    assert ChainStream([letters("a", 2), letters("b", 3)]).n_total == 5 and ChainStream([letters("a", 2), PinnedStream("crawl")]).n_total is None


# --- bad files ----------------------------------------------------------------------------------------------------------

def test_bad_lines_cost_themselves():
    lines = [b'\xef\xbb\xbf{"text": "a", "n": 1}', b"", b"{", b"[1]", b'"s"', b"null", b"{}", b'{"text": null}', b'{"text": 3}', b'{"text": ["x"]}', b'{"text": " "}', b'{"text": "\xff"}', b'{"text": "\\ud800"}',
             b"["*100_000, b'{"text": "' + b"y"*200_000 + b'"}', b'{"text": "' + b"z"*90 + b'"}', b'{"text": "last"}']
    found = read(b"\n".join(lines), "a.jsonl", max_bytes=110_000)
    assert found == [("a.jsonl/1", "a", {"n": 1}), Drop("no JSON", "a.jsonl/3"), *(Drop("no JSON object", f"a.jsonl/{i}") for i in (4, 5, 6)), Drop("no text", "a.jsonl/7"), Drop("no text", "a.jsonl/8"),
                     Drop("text is no string", "a.jsonl/9"), Drop("text is no string", "a.jsonl/10"), Drop("empty text", "a.jsonl/11"), Drop("invalid UTF-8", "a.jsonl/12"), Drop("invalid Unicode", "a.jsonl/13"),
                     Drop("no JSON", "a.jsonl/14"), Drop("too long", "a.jsonl/15"), ("a.jsonl/16", "z"*90, {}), ("a.jsonl/17", "last", {})]


@pytest.mark.parametrize("n, fits", [(9, True), (10, True), (11, False)])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_the_limit_is_the_limit(n, fits, end):
    assert list(sources._lines(io.BytesIO(b"a\n" + b"x"*n + end), 10)) == [b"a\n", b"x"*n + end if fits else None]
    assert read(b"x"*n, "a.txt", max_bytes=10) == ([("a.txt", "x"*n, {})] if fits else [Drop("too long", "a.txt")])
    assert read(b"x"*n, "a.html", max_bytes=10) == ([("a.html", "x"*n, {"format": "html"})] if fits else [Drop("too long", "a.html")])
    assert isinstance(read(table(text=["x"*n]), "a.parquet", max_bytes=10)[0], Drop) != fits


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=12), max_size=6), st.integers(1, 12))
def test_lines_are_those_of_python_up_to_the_limit(pieces, limit):
    data = b"\n".join(pieces)
    assert list(sources._lines(io.BytesIO(data), limit)) == [line if len(line.removesuffix(b"\n")) <= limit else None for line in io.BytesIO(data)]


PEAK = """
import json, sys
from llm_scratch.sources import *
{warm}
def highest(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) # kB; ru_maxrss would be that of the parent
before = highest()
items = [x if isinstance(x, Drop) else x.id for x in FileStream(sys.argv[1])]
print(json.dumps([(highest() - before)/1024, items[-1], len(items)]))
"""
def peak(path:Path, warm:str="")->tuple[float, object, int]: # MB, the last item, how many
    if not Path("/proc/self/status").exists(): pytest.skip("the highest memory of a process is read from /proc")
    run = subprocess.run([sys.executable, "-c", PEAK.format(warm=warm), str(path)], capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"))
    return json.loads(run.stdout.splitlines()[-1])


def test_a_line_of_200_mb_takes_little_memory(tmp_path):
    line = gzip.compress(b"x"*MB, 1) # gzips in a row are one gzip
    (tmp_path/"long.jsonl.gz").write_bytes(gzip.compress(jsonl("a")) + line*200 + gzip.compress(b"\n" + jsonl("b")))
    mb, last, n = peak(tmp_path/"long.jsonl.gz")
    assert (last, n) == ("long.jsonl.gz/3", 3) and mb < 60, f"{mb:.0f} MB"


def test_a_bomb_in_a_zip_and_in_a_page_take_little_memory(tmp_path):
    with zipfile.ZipFile(tmp_path/"box.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        with z.open("bomb.txt", "w") as f:
            for _ in range(100): f.write(bytes(MB))
        z.writestr("fine.txt", "fine")
    assert peak(tmp_path/"box.zip")[1:] == ["box.zip/fine.txt", 2] and peak(tmp_path/"box.zip")[0] < 60
    body = gzip.compress(b"<p>" + bytes(100*MB), 1)
    record = warc_record("http://e/bomb", body).replace(b"Content-Type: text/html", b"Content-Encoding: gzip\r\nContent-Type: text/html")
    at = record.index(b"Content-Length: ") + 16
    size = int(record[at:record.index(b"\r", at)]) + len(b"Content-Encoding: gzip\r\n")
    record = record[:at] + str(size).encode() + record[record.index(b"\r", at):]
    (tmp_path/"bomb.warc").write_bytes(record + warc_record("http://e/2", bytes(100*MB)) + warc_record("http://e/3", b"<p>fine"))
    mb, last, n = peak(tmp_path/"bomb.warc", "import fastwarc.warc")
    assert (last, n) == ("bomb.warc/3", 3) and mb < 60, f"{mb:.0f} MB"


def test_a_large_row_group_takes_little_memory(tmp_path):
    parquet.write_table(pa.table(dict(text=["x"*50_000]*2000)), tmp_path/"big.parquet", row_group_size=2000, use_dictionary=False, write_batch_size=10, write_statistics=False) # 100 MB
    mb, last, n = peak(tmp_path/"big.parquet", "import pyarrow.parquet")
    assert (last, n) == ("big.parquet/2000", 2000) and mb < 120, f"{mb:.0f} MB" # 250 when all rows come at once


@pytest.mark.parametrize("keep", [0, 5, 30, 200, -30, -9, -1])
def test_a_gzip_that_was_cut(keep):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghij ", k=40)) for _ in range(60)]
    whole = gzip.compress(jsonl(*texts))
    found = read(whole[:keep], "a.jsonl.gz")
    assert [x[1] for x in found[:-1]] == texts[:len(found)-1]
    assert found[-1] == (Drop("empty file", "a.jsonl.gz") if keep == 0 else Drop("broken file: EOFError", f"a.jsonl.gz, after {len(found)-1} items"))
    if keep in (-9, -1): assert len(found) == 61
    if keep == 200: assert 0 < len(found)-1 < 60


def test_other_files_that_are_broken():
    assert read(gzip.compress(jsonl("a")), "A.JSONL.GZ") == [("A.JSONL.GZ/1", "a", {})]
    assert read(b"no gzip", "a.jsonl.gz") == [Drop("broken file: BadGzipFile", "a.jsonl.gz, after 0 items")]
    assert read(b"no zip", "a.zip") == [Drop("broken file: BadZipFile", "a.zip, after 0 items")]
    assert read(b"no table", "a.parquet") == [Drop("broken file: ArrowInvalid", "a.parquet, after 0 items")]
    assert read(b"no crawl at all\n"*5, "a.warc") == [Drop("broken file: OSError", "a.warc, after 0 items")]
    assert read(table(n=[1]), "a.parquet") == [Drop("no text", "a.parquet")] and read(table(text=[1]), "a.parquet") == [Drop("text is no string", "a.parquet")]
    assert read(table(text=pa.array([], pa.string())), "a.parquet") == [Drop("empty file", "a.parquet")]
    good = table(text=["a"*9, "b"*9, "c"*9, "d"*9, "e"*9]) # rows in groups of three
    column = parquet.ParquetFile(io.BytesIO(good)).metadata.row_group(1).column(0)
    at = column.dictionary_page_offset
    found = read(good[:at] + b"\xff"*20 + good[at+20:], "a.parquet")
    assert found[-1].reason.startswith("broken file: ") and found[-1].where == f"a.parquet, after {len(found)-1} items" and [x[1] for x in found[:-1]] in ([], ["a"*9, "b"*9, "c"*9])


def test_rows_of_a_table():
    import datetime
    day = datetime.date(2020, 1, 2)
    data = table(text=pa.array([b"a", b"\xff", None, b"", b"\xc3\xa9"], pa.binary()).view(pa.string()), day=[day]*5, n=[1, 2, 3, 4, 5])
    assert read(data, "a.parquet") == [("a.parquet/1", "a", {"day": "2020-01-02", "n": 1}), Drop("invalid UTF-8", "a.parquet/2"), Drop("no text", "a.parquet/3"), Drop("empty text", "a.parquet/4"), ("a.parquet/5", "é", {"day": "2020-01-02", "n": 5})]
    assert [x[0] for x in read(table(text=[str(i) for i in range(2500)]), "a.parquet")] == [f"a.parquet/{i}" for i in range(1, 2501)]
    assert read(table(text=pa.array(["large"], pa.large_string())), "a.parquet") == [("a.parquet/1", "large", {})]


def test_names_in_a_zip_cannot_climb(tmp_path):
    names = ["../../etc/passwd.txt", "/etc/shadow.txt", "..\\win.txt", "a/./b.txt", "ok/..fine.txt", "%2E%2E/x.txt", "../x.txt"]
    path = tmp_path/"slip.zip"
    path.write_bytes(zipped({n: b"text" for n in names} | {"folder.txt/": b"", "in.zip": b"", "picture.png": b"no", "deep.jsonl.gz": gzip.compress(jsonl("deep"))}))
    before = sorted(tmp_path.rglob("*"))
    items = list(FileStream(path))
    docs = [x for x in items if isinstance(x, Document)]
    assert len(docs) == len(names) + 1 == len({d.id for d in docs}) and [x for x in items if isinstance(x, Drop)] == [Drop("a zip in a zip", "slip.zip/in.zip")]
    root = (tmp_path/"out").resolve()
    assert all((root/d.id).resolve().is_relative_to(root/"slip.zip") and "\\" not in d.id for d in docs) and "slip.zip/ok/..fine.txt" in [d.id for d in docs]
    assert sorted(tmp_path.rglob("*")) == before


@settings(max_examples=300, deadline=None)
@given(st.text("./\\%:a\n\0\udc80é2E", max_size=8), st.text("./\\%:a\n\0\udc80é2E", max_size=8))
def test_a_safe_name_is_safe_and_its_own(a, b):
    safe = safe_key(a)
    safe.encode("utf-8")
    assert not {"..", "."} & set(safe.split("/")) and not safe.startswith("/") and "\\" not in safe and safe.isprintable()
    assert (safe == safe_key(b)) == (a == b)
    assert safe_key("notes/tea.v2..txt") == "notes/tea.v2..txt"


def test_members_come_in_the_order_of_their_names():
    assert [x[0] for x in read(zipped({"b.txt": b"2", "c/a.txt": b"3", "a.txt": b"1"}), "box.zip")] == ["box.zip/a.txt", "box.zip/b.txt", "box.zip/c/a.txt"]


def test_a_member_that_is_encrypted_or_damaged():
    data = bytearray(zipped({"a.txt": b"first "*20, "b.txt": b"second "*20, "c.txt": b"third "*20}))
    data[data.index(b"b.txt") + 8] ^= 255
    found = read(bytes(data), "box.zip")
    assert [x[0] for x in found] == ["box.zip/a.txt", found[1].reason, "box.zip/c.txt"] and found[1].where == "box.zip/b.txt, after 0 items" and found[1].reason.startswith("broken file: ")
    data = bytearray(zipped({"a.txt": b"secret"}))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)): data[data.index(mark) + at] |= 1
    assert read(bytes(data), "box.zip") == [Drop("broken file: RuntimeError", "box.zip/a.txt, after 0 items")]


def test_nothing_to_read(tmp_path):
    for make, said in ((lambda p: None, "there is no file or folder"), (lambda p: p.mkdir(), "holds nothing to read"), (lambda p: (p/"only.png").write_bytes(b"x"), "holds nothing to read"),
                       (lambda p: (p/"empty.txt").write_bytes(b""), "holds nothing to read")):
        make(tmp_path/"set")
        with pytest.raises(UserError, match=said) as e: FileStream(tmp_path/"set")
        assert str(tmp_path/"set") in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(UserError, match="only.png is of no kind that can be read: give .jsonl, .parquet"): FileStream(tmp_path/"set"/"only.png")
    with pytest.raises(UserError, match="empty.txt holds nothing"): FileStream(tmp_path/"set"/"empty.txt")


def test_a_file_that_vanishes_costs_itself(folder):
    stream = FileStream(folder)
    (folder/"latin.txt").unlink()
    found = list(stream)
    assert Drop("broken file: FileNotFoundError", "corpus/latin.txt, after 0 items") in found and found[-1] != found[0] and any(isinstance(x, Document) and x.text == "q" for x in found)


def test_a_byte_order_mark_is_no_text():
    assert [read(b"\xef\xbb\xbfa", f"a.{kind}")[0][1] for kind in ("txt", "md", "html")] == ["a"]*3 and read(b"\xef\xbb\xbf", "a.txt") == [Drop("empty text", "a.txt")]
    assert read(b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}', "a.jsonl") == [("a.jsonl/1", "a", {}), Drop("no JSON", "a.jsonl/2")] # only at the beginning


def test_names_of_one_file(tmp_path):
    (tmp_path/"tea.JSONL").write_bytes(jsonl("a"))
    [doc] = FileStream(tmp_path/"tea.JSONL")
    assert doc == Document("a", "tea.JSONL", "tea.JSONL/1", {})
    [doc] = FileStream(tmp_path/"tea.JSONL", name="../tea")
    assert (doc.source, doc.id) == ("%2E%2E/tea", "%2E%2E/tea/1")


# --- crawls ---------------------------------------------------------------------------------------------------------------

def test_what_a_crawl_holds():
    records = [warc_record("http://e/0", b"about", kind="warcinfo"), warc_record("http://e/1", "<p>é".encode("cp1252"), "text/html; charset=ISO-8859-1"), warc_record("http://e/2", b"x", "image/png"),
               warc_record("http://e/3", b"<p>gone", status="404 Not Found"), warc_record("http://e/4", b"<p>x", "application/xhtml+xml"), warc_record("http://e/5", b"<p>" + b"y"*2000),
               warc_record("http://e/6", b"<p>", "TEXT/HTML;Charset=\"utf-8\""), warc_record("http://e/7", b"\xff\xfe\xfd\x81\x00"*9, "text/html"), warc_record("http://e/8", b" "), warc_record("http://e/9", "<p>ж".encode("koi8_r"), "text/html; charset=koi8-r")]
    page = lambda i, text: (f"a.warc/{i}", text, dict(format="html", url=f"http://e/{i}"))
    found = read(b"".join(records), "a.warc", max_bytes=1000)
    assert found == [page(1, "<p>é"), Drop("not HTML", "a.warc/2"), Drop("HTTP status 404", "a.warc/3"), page(4, "<p>x"), Drop("too long", "a.warc/5"), page(6, "<p>"), Drop("unknown encoding", "a.warc/7"), Drop("empty text", "a.warc/8"), page(9, "<p>ж")]
    assert read(b"".join(map(gzip.compress, records)), "a.warc.gz", max_bytes=1000) == [x._replace(where=x.where.replace("a.warc", "a.warc.gz")) if isinstance(x, Drop) else (x[0].replace("a.warc", "a.warc.gz"), *x[1:]) for x in found]


def test_bodies_that_were_packed_on_the_way():
    def packed(body, *headers):
        http = ("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n" + "".join(h + "\r\n" for h in headers) + "\r\n").encode() + body
        return f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://e/\r\nContent-Type: application/http\r\nContent-Length: {len(http)}\r\n\r\n".encode() + http + b"\r\n\r\n"
    page = b"<p>The same page, however it came."
    bodies = [packed(page), packed(gzip.compress(page), "Content-Encoding: gzip"), packed(b"5\r\n" + page[:5] + b"\r\n" + f"{len(page)-5:x}\r\n".encode() + page[5:] + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked")]
    assert [x[1] for x in read(b"".join(bodies), "a.warc")] == [page.decode()]*3
    wide = packed(gzip.compress(("<p>" + "y"*600).encode("utf-16")), "Content-Encoding: gzip") # a small record, 1208 bytes on the page, 603 as UTF-8
    assert read(wide, "a.warc", max_bytes=1000) == [Drop("too long", "a.warc/1")] and len(read(wide, "a.warc", max_bytes=1300)[0][1]) == 603
    broken = packed(b"\x00 no brotli", "Content-Encoding: br")
    assert read(broken + bodies[0], "a.warc")[0] == Drop("broken record", "a.warc/1") and read(broken + bodies[0], "a.warc")[1][1] == page.decode()


def test_a_crawl_that_was_cut():
    records = [warc_record(f"http://e/{i}", f"<p>page {i} ".encode() + os.urandom(300).hex().encode()) for i in range(4)]
    whole = b"".join(records)
    assert [x[0] if isinstance(x, tuple) and not isinstance(x, Drop) else x for x in read(whole[:-300], "a.warc")] == ["a.warc/1", "a.warc/2", "a.warc/3", Drop("truncated record", "a.warc/4")]
    packed = b"".join(map(gzip.compress, records))
    found = read(packed[:-200], "a.warc.gz")
    assert [x[0] for x in found[:3]] == ["a.warc.gz/1", "a.warc.gz/2", "a.warc.gz/3"] and all(isinstance(x, Drop) for x in found[3:]) and found[-1].reason == "broken file: EOFError"
    junk = read(records[0] + b"junk\r\n\r\n" + records[1], "a.warc")
    assert junk[0][0] == "a.warc/1" and junk[-1] == Drop("broken file: OSError", "a.warc, after 1 items")
    assert read(warc_record("http://e/", b"<p>").replace(b"HTTP/1.1 200 OK", b"no such protocol"), "a.warc")[0].reason in ("no HTTP response", "broken record")


@pytest.mark.parametrize("charset", ["idna", "punycode", "unicode_escape", "unicode-escape", "raw_unicode_escape", "utf-7", "undefined", "zip", "rot13", "base64", "hex", "no such", "\0", "", "x"*5000])
def test_charsets_that_no_page_has(charset):
    assert decode_html("<p>é \\u0041 +AGE-</p>".encode(), charset) == "<p>é \\u0041 +AGE-</p>"


def test_who_says_what_a_page_is_in():
    text = "<p>Le café est prêt, voilà.</p>"
    own = lambda name: f"<meta http-equiv='x' content='text/html; CHARSET={name}'>" + text
    assert decode_html(own("latin-1").encode("cp1252")) == own("latin-1") and decode_html(own("shift_jis").encode(), "utf-8") == own("shift_jis")
    assert decode_html(own("utf-8").encode("cp1252"), "windows-1252") == own("utf-8")
    assert decode_html(b"\xef\xbb\xbf" + text.encode(), "latin-1") == text and decode_html(text.encode("utf-16"), "latin-1") == text
    assert decode_html(b"\xfe\xff" + text.encode("utf-16-be")) == text
    assert decode_html(own("windows-1251").encode("cp1252"), "windows-1252") == own("windows-1251") # the server comes first
    assert all(decode_html("“curly”".encode("cp1252"), name) == "“curly”" for name in ("ascii", "latin-1", "ISO-8859-1")) and decode_html(text.encode("cp1252")) == text


def test_no_fastwarc_and_no_detector(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastwarc.warc", None)
    monkeypatch.setitem(sys.modules, "resiliparse.parse.encoding", None)
    with pytest.raises(UserError, match=r"fastwarc: pip install 'llm_scratch\[data\]'"): read(warc_record("http://e", b"x"), "a.warc")
    with pytest.raises(UserError, match=r"resiliparse: pip install 'llm_scratch\[data\]'"): read(b"caf\xe9", "a.html")
    with pytest.raises(UserError, match="fastwarc"): read(zipped({"a.warc": b"x"}), "a.zip")


def test_no_damage_ends_a_run():
    "Bytes flipped, cut, put in and taken out at random."
    records = [warc_record(f"http://e/{i}", f"<p>page {i} é</p>".encode()*9) for i in range(4)]
    base = {"a.warc": b"".join(records), "a.warc.gz": b"".join(map(gzip.compress, records)), "a.zip": zipped({"a.txt": b"x"*90, "b.warc": records[0]}), "a.parquet": table(text=["x", "y"]*9), "a.html": b"<p>\xc3\xa9"*9,
            "a.jsonl.gz": gzip.compress(jsonl("x", "y"))}
    rng = random.Random(0)
    for _ in range(3000):
        name = rng.choice(list(base))
        data = bytearray(base[name])
        for _ in range(rng.choice([1, 1, 3])):
            i, what = rng.randrange(len(data) or 1), rng.randrange(4)
            if what == 0 and data: data[i] = rng.randrange(256)
            elif what == 1: del data[i:]
            elif what == 2: data[i:i] = rng.randbytes(5)
            else: del data[i:i+rng.randrange(30)]
        for x in read(bytes(data), name): assert isinstance(x, Drop) or (x[1].encode() and json.dumps(x[2]))


# --- the Hub --------------------------------------------------------------------------------------------------------------

def hub_folder(root:Path, recipe:HubRecipe, rows:list[dict])->Path:
    "A folder as the recipe's repository is laid out, in two Parquet files."
    config = recipe.config or "default"
    (root/config).mkdir(parents=True)
    (root/"README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {recipe.split}\n    path: {config}/train-*.parquet\n---\n", encoding="utf-8")
    for k in range(2): parquet.write_table(pa.Table.from_pylist(rows[k*len(rows)//2:(k+1)*len(rows)//2]), root/config/f"train-0000{k}-of-00002.parquet", row_group_size=3)
    return root


@pytest.mark.parametrize("name", HUB)
def test_every_recipe_reads_a_folder_of_its_layout(tmp_path, name):
    recipe = HUB[name]
    assert recipe.licence and recipe.attribution and recipe.size and recipe.path.count("/") == 1 and recipe.text == "text" and recipe.split == "train"
    rows = [dict(id=f"<urn:{i}>", url="http://e", text=f"text {i}") for i in range(10)]
    rows[4]["text"], rows[5]["text"] = None, " "
    path = hub_folder(tmp_path/"hub", recipe, rows)
    whole = resumes(partial(HubStream, recipe, path))
    assert [x.text if isinstance(x, Document) else x.reason for x in whole] == [f"text {i}" for i in range(4)] + ["no text", "empty text"] + [f"text {i}" for i in range(6, 10)]
    assert whole[0].id == f"hub:{name}/" + ("<urn%3A0>" if recipe.key else "1") and whole[4].where == f"hub:{name}/5" and whole[0].source == f"hub:{name}" and "text" not in whole[0].meta and whole[0].meta["url"] == "http://e"


@pytest.mark.parametrize("name", HUB)
def test_without_the_hub_one_line_names_a_way_out(name, monkeypatch):
    import datasets, huggingface_hub
    for config in (datasets.config, huggingface_hub.constants): monkeypatch.setattr(config, "HF_HUB_OFFLINE", True) # no waiting for a network
    with pytest.raises(UserError) as e: open_streams([f"hub:{name}"])
    said = str(e.value)
    assert "\n" not in said and f"hub:{name}" in said and HUB[name].path in said and "recipes, encyclopaedia" in said and e.value.__cause__ is None and e.value.__suppress_context__


def test_a_network_that_breaks_in_the_middle(tmp_path, monkeypatch):
    recipe = HUB["tinystories"]
    path = hub_folder(tmp_path/"hub", recipe, [dict(text=f"text {i}") for i in range(10)])
    stream = HubStream(recipe, path)
    whole = list(stream)
    class Breaks:
        def __iter__(self):
            yield {"text": "text 0"}
            raise ConnectionError("reset\nby peer")
        def state_dict(self): return {}
    monkeypatch.setattr(sources, "_open_hub", lambda recipe, path: Breaks())
    it, stream = iter(s := HubStream(recipe, path)), s
    assert next(it) == whole[0]
    with pytest.raises(UserError, match=r"hub:tinystories can't be read from roneneldan/TinyStories \(reset\)"): next(it)
    assert stream.state_dict()["n"] == 1 # the run can go on from there


def test_what_recipes_ask_for(monkeypatch):
    import datasets
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)))
    for recipe in HUB.values(): HubStream(recipe)
    assert [a for a, _ in asked] == [("monology/pile-uncopyrighted", None), ("Skylion007/openwebtext", None), ("allenai/c4", "en"), ("HuggingFaceFW/fineweb-edu", "sample-10BT"), ("roneneldan/TinyStories", None),
                                     ("wikimedia/wikipedia", "20231101.en")]
    assert all(k == dict(split="train", streaming=True) for _, k in asked)


# --- all together ----------------------------------------------------------------------------------------------------------

def test_open_streams(folder):
    stream = open_streams([str(folder), "tiny", "tiny", folder])
    assert stream.name == "corpus, tiny" and stream.n_total is None and open_streams(["tiny"]).n_total == open_streams("tiny").n_total == 24
    items = list(stream)
    assert items[:-24] == list(FileStream(folder)) and [d.source for d in items[-24:]] == ["tiny"]*24 and items[-24].id == "tiny/Plain Rice" and items[-1].meta == {}
    for wrong, said in ((["soup"], "there is no source soup: give some of recipes"), (["tiny", "hub:soup"], "there is no source hub:soup: .* tiny, hub:pile, .*or a path"), (["c4"], "there is no source c4"), ([], "no source is given")):
        with pytest.raises(UserError, match=said) as e: open_streams(wrong)
        assert "\n" not in str(e.value)
    assert isinstance(open_streams("recipes"), PinnedStream)


@pytest.mark.parametrize("name", ["crawl", "spanish"])
def test_pinned_sources_resume(name):
    if not (cache_dir()/SOURCES[name].filename).exists(): pytest.skip(f"{SOURCES[name].filename} is not in {cache_dir()}")
    stream, other = PinnedStream(name), PinnedStream(name)
    whole = list(islice(stream, 200))
    list(islice(stream, 150))
    other.load_state_dict(stream.state_dict())
    assert list(islice(other, 50)) == whole[150:] and other.state_dict()["n"] == 200
    with pytest.raises(UserError, match="there is no source web"): PinnedStream("web")


def test_progress_changes_nothing_and_shows_only_on_a_terminal():
    from rich.console import Console
    def shown(terminal:bool, cut:int=0)->str:
        stream = open_streams("tiny")
        whole = list(stream)
        list(islice(stream, cut))
        again = open_streams("tiny")
        again.load_state_dict(stream.state_dict() if cut else dict(stream="tiny", n=0, place={}))
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        assert list(with_progress(again, console)) == whole[cut:] and again.state_dict()["n"] == 24
        return console.file.getvalue()
    assert shown(False) == "" and "read tiny" in shown(True) and "24/24" in shown(True)
    assert " 0/24" in shown(True) and " 0/24" not in shown(True, 10)
    unknown = Console(file=io.StringIO(), force_terminal=True, width=80)
    list(with_progress(ChainStream([letters("[b]", 2), ListStream("x", [])]), unknown))
    assert "[b]" in unknown.file.getvalue()


def test_state_while_progress_is_watched():
    stream = open_streams("tiny")
    for k, _ in enumerate(with_progress(stream), 1):
        assert stream.state_dict()["n"] == k
        if k == 3: break


def test_the_ledger_balances(folder):
    report, parts = Report(), [Report(), Report()]
    def short(doc): return doc if len(doc.text) < 3 else Drop("long")
    def fails(doc): return 1/(doc.text != "a") and doc._replace(text=doc.text.upper())
    out = list(apply_stages(FileStream(folder), [short, fails], report))
    assert report.total("read", "in").n_docs == len(out) + sum(t.n_docs for (stage, _), t in report.drops().items() if stage != "read")
    assert report.drops()["fails", "ZeroDivisionError in the stage"].n_docs == 1 and report.drops()["read", "invalid UTF-8"].n_docs == 1
    first, second = FileStream(folder), FileStream(folder)
    got = list(apply_stages(islice(first, 9), [short, fails], parts[0]))
    second.load_state_dict(first.state_dict())
    got += list(apply_stages(second, [short, fails], parts[1]))
    assert got == out and parts[0] + parts[1] == report and Report.from_rows(json.loads(json.dumps(report.to_rows()))) == report
    assert stage_name(short) == "short" and report.total("fails", "changed", "corpus").n_docs == len(out)
    assert all(len(t.examples) <= 3 for t in report.tallies.values())


def test_importing_is_light():
    code = "import sys, llm_scratch.sources; print([m for m in ('datasets', 'rich', 'pyarrow', 'fastwarc', 'resiliparse', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"

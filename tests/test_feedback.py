"The store of feedback: migrations from every older form, several processes, kills, retention, consent, personal data, Parquet, files that are none of ours; and the server that records into it."
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import Scripted, scripted_served

import llm_scratch.feedback as feedback
from llm_scratch.core import UserError
from llm_scratch.feedback import SCHEMA_VERSION, Interaction, open_store, permitted, without_personal_data
from llm_scratch.guard import GuardPolicy, GuardRule, Part, Safeguard
from llm_scratch.server import Served, background_server, make_app

ROOT = Path(__file__).resolve().parent.parent
SECRET, MAIL = "a heron in my greenhouse", "jane.roe@example.org"
HI = [dict(role="user", content=f"Tell me of {SECRET}.")]


def one(id="a", **how): return Interaction(**dict(id=id, time=10., model="v1", prompt=f"About {SECRET}?", answer=f"{SECRET}, yes.") | how)


@pytest.fixture
def path(tmp_path): return tmp_path/"feedback.sqlite"


@pytest.fixture
def store(path):
    with open_store(path) as s: yield s


def every_byte(path):
    "Of the file, its log and its index, read by another process: to close the file here would drop SQLite's locks."
    files = [str(p) for p in path.parent.iterdir() if p.name.startswith(path.name)]
    return subprocess.run(["cat", *files], stdout=subprocess.PIPE, check=True).stdout


# --- values ---------------------------------------------------------------------------------------------------------

def test_an_interaction_is_checked_when_it_is_made():
    for wrong in (dict(id=""), dict(id="a b"), dict(id="me@example.org"), dict(id="a"*201), dict(id="a\n"), dict(rating=2), dict(time=float("nan")), dict(latency_s=-1.), dict(latency_s=float("inf")), dict(n_tokens=-1)):
        with pytest.raises(UserError, match="give"): one(**wrong)


def test_without_consent_numbers_stay_and_text_goes():
    x = one(comment="bad", correction="better", rating=-1, latency_s=1.5, n_tokens=7, finish="stop", guard="output:warn")
    kept = permitted(x)
    assert kept == replace(x, prompt="", answer="", comment="", correction="") and permitted(kept) == kept
    assert permitted(replace(x, consent=True)) == replace(x, consent=True)


@pytest.mark.parametrize("text,clean", [(f"Write to {MAIL}, please", "Write to [EMAIL], please"), ("call +49 170 1234567", "call [PHONE]"), ("key: sk-abcdefghij0123456789XY", "key: [SECRET]"), ("half \ud800 a pair", "half ? a pair"), ("a \0 zero", "a \0 zero"), ("", "")])
def test_personal_data_is_replaced(text, clean, store):
    assert without_personal_data(text) == clean == without_personal_data(clean)
    store.add(one(prompt=text, answer=text, consent=True))
    store.rate("a", 1, text)
    store.correct("a", text)
    assert [getattr(store.interactions()[0], name) for name in ("prompt", "answer", "comment", "correction")] == [clean]*4


def test_a_tangle_of_personal_data_is_not_kept(monkeypatch):
    def tangled(text): raise ValueError("a tangle")
    monkeypatch.setattr(feedback, "find_pii", tangled)
    assert without_personal_data("x") == ""


# --- the store ------------------------------------------------------------------------------------------------------

anything = st.builds(Interaction, id=st.text("abcXYZ019_.:/#+-", min_size=1, max_size=9), time=st.floats(0, 2e9), model=st.sampled_from(["v1", "v2"]), prompt=st.text(max_size=20), answer=st.text(max_size=20), rating=st.sampled_from([-1, 0, 1]),
                     comment=st.text(max_size=9), correction=st.text(max_size=9), latency_s=st.floats(0, 100), n_tokens=st.integers(0, 10**6), finish=st.sampled_from(["", "stop"]), guard=st.sampled_from(["", "input:block"]), consent=st.booleans())


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(anything, max_size=12), st.floats(0, 2e9), st.floats(0, 2e9))
def test_what_is_read_is_what_may_be_kept(store, some, since, until):
    "Against a dictionary: the first of an id stays, the order is that of time, times are half-open."
    store.forget(float("inf"))
    want = {}
    for x in some: want.setdefault(x.id, permitted(x))
    assert store.add(*some) == len(want) and store.add(*some) == 0
    in_order = sorted(want.values(), key=lambda x: (x.time, x.id))
    assert store.interactions() == in_order
    assert store.interactions(since=since, until=until, model="v1") == [x for x in in_order if since <= x.time < until and x.model == "v1"]
    assert store.forget(until) == sum(x.time < until for x in in_order) and store.interactions() == [x for x in in_order if x.time >= until]


def test_rating_correcting_withdrawing_and_forgetting(store):
    store.add(one("a"), one("b", consent=True))
    assert store.rate("a", -1, "no consent, no comment") and store.rate("b", 1, "good") and store.rate("b", -1)
    assert not store.correct("a", "lost") and store.correct("b", "better") and not any(f("none") for f in (store.withdraw, store.forget_id, lambda i: store.rate(i, 1), lambda i: store.correct(i, "x")))
    a,b = store.interactions()
    assert a == permitted(one("a", rating=-1)) and b == one("b", consent=True, rating=-1, comment="good", correction="better")
    with pytest.raises(UserError, match="give -1"): store.rate("a", 5)
    assert store.withdraw("b") and store.interactions()[1] == permitted(one("b", rating=-1))
    assert store.rate("a", 1, "now", consent=True, prompt="q", answer=f"mail {MAIL}") and store.interactions()[0] == one("a", rating=1, comment="now", prompt="q", answer="mail [EMAIL]", consent=True)
    assert store.rate("a", -1, consent=False) and store.interactions()[0] == permitted(one("a", rating=-1))
    assert store.forget_id("a") and [x.id for x in store.interactions()] == ["b"]


def test_all_of_one_call_is_added_or_none(store):
    with pytest.raises(sqlite3.IntegrityError): store.add(one("a"), replace(one("b"), model=None))
    assert store.interactions() == [] and store.add(one("a")) == 1


def test_no_text_without_consent_in_any_byte(path):
    with open_store(path) as s:
        s.add(one("a", comment=SECRET, correction=SECRET), one("b", prompt="plain"))
        s.rate("a", 1, SECRET)
        s.correct("a", SECRET)
        during = every_byte(path)
        assert len(during) > 2*len(path.name) and SECRET.encode() not in during and b"heron" not in during
        assert path.with_name(path.name+"-wal").stat().st_size > 0, "the log was not among what was read"
        s.add(one("c", prompt="", answer="welcome", consent=True))
        assert b"welcome" in every_byte(path) # the search does find what is there
    assert b"heron" not in every_byte(path) and b"welcome" in every_byte(path)


def test_the_file_itself_refuses_text_without_consent(store, path):
    store.add(one())
    other = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"): other.execute("UPDATE interactions SET prompt = 'x'")
    other.close()


@pytest.mark.parametrize("end", ["withdraw", "forget_id", "forget", "rate"])
def test_what_is_forgotten_is_in_no_byte(end, path):
    "Texts of a few letters and of many pages; those of others stay."
    with open_store(path) as s:
        s.add(*[one(f"x{i}", time=float(i), prompt=f"secret{i}word "*(1 if i%3 else 900), answer="", consent=True) for i in range(60)])
        assert every_byte(path).count(b"secret7word") and every_byte(path).count(b"secret30word") and every_byte(path).count(b"secret59word")
        for i in range(59):
            if end == "forget": s.forget(i+1.)
            elif end == "rate": s.rate(f"x{i}", 1, consent=False)
            else: getattr(s, end)(f"x{i}")
        left = every_byte(path)
        assert left.count(b"secret59word") and [i for i in range(59) if f"secret{i}word".encode() in left] == []


def test_only_the_owner_may_read(store, path, tmp_path):
    store.add(one())
    assert {p.stat().st_mode & 0o777 for p in [*tmp_path.iterdir(), store.export(tmp_path/"out.parquet")]} == {0o600}


# --- forms of the file ----------------------------------------------------------------------------------------------

FORMS = {
    1: ("CREATE TABLE interactions (id TEXT PRIMARY KEY, time REAL NOT NULL, model TEXT NOT NULL, prompt TEXT NOT NULL, answer TEXT NOT NULL, rating INTEGER NOT NULL DEFAULT 0)",
        f"INSERT INTO interactions VALUES ('old', 5.5, 'v0', 'About {SECRET}', 'yes', -1), ('odd', 6, 'v0', '', '', 7)"),
    2: ("CREATE TABLE interactions (id TEXT PRIMARY KEY, time REAL NOT NULL, model TEXT NOT NULL, prompt TEXT NOT NULL, answer TEXT NOT NULL, rating INTEGER NOT NULL DEFAULT 0, comment TEXT NOT NULL DEFAULT '', correction TEXT NOT NULL DEFAULT '', latency_s REAL NOT NULL DEFAULT 0, n_tokens INTEGER NOT NULL DEFAULT 0, finish TEXT NOT NULL DEFAULT '', consent INTEGER NOT NULL DEFAULT 0)",
        f"INSERT INTO interactions VALUES ('old', 5.5, 'v0', 'About {SECRET}', 'yes', -1, '{SECRET}', '', 1.5, 7, 'stop', 0), ('odd', 6, 'v0', 'I am {MAIL}', 'hello', 7, 'good', 'Hello {MAIL}', .5, 2, 'length', 1)"),
}
COMES_OUT = {
    1: [Interaction("old", 5.5, "v0", "", "", -1), Interaction("odd", 6., "v0", "", "", 1)],
    2: [Interaction("old", 5.5, "v0", "", "", -1, latency_s=1.5, n_tokens=7, finish="stop"), Interaction("odd", 6., "v0", "I am [EMAIL]", "hello", 1, "good", "Hello [EMAIL]", .5, 2, "length", consent=True)],
}


def made(path, statements, version, whose=0x6c6d6662):
    db = sqlite3.connect(path)
    for s in (*statements, f"PRAGMA user_version = {version}", f"PRAGMA application_id = {whose}"): db.execute(s)
    db.commit()
    db.close()


def test_every_older_form_has_a_test(): assert sorted(FORMS) == list(range(1, SCHEMA_VERSION))


@pytest.mark.parametrize("version", FORMS)
def test_an_older_form_becomes_this_one(version, path, tmp_path):
    made(path, FORMS[version], version)
    assert b"heron" in path.read_bytes()
    with open_store(path) as s:
        assert s.interactions() == COMES_OUT[version]
        assert b"heron" not in every_byte(path) and MAIL.encode() not in every_byte(path) # what was let in then is put right now
        assert s.add(one("new", guard="input:warn")) == 1 and s.rate("old", 1)
    with open_store(path) as s, open_store(tmp_path/"fresh") as fresh:
        assert len(s.interactions()) == 3
        shape = lambda x: x._db.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        assert shape(s) == shape(fresh) and s._db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def test_a_migration_that_fails_leaves_the_file_as_it_was(path, monkeypatch):
    made(path, FORMS[1], 1)
    monkeypatch.setattr(feedback, "_MIGRATIONS", (*feedback._MIGRATIONS[:2], (*feedback._MIGRATIONS[2][:-1], "CREATE INDEX by_time ON nowhere (time)")))
    with pytest.raises(UserError, match="no such table"): open_store(path)
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (2,) and db.execute("SELECT prompt, comment FROM interactions WHERE id = 'old'").fetchone() == (f"About {SECRET}", "")
    db.close()
    monkeypatch.undo()
    with open_store(path) as s: assert s.interactions() == COMES_OUT[1]


def test_a_newer_form_is_refused_and_not_touched(path):
    made(path, ("CREATE TABLE interactions (future)",), SCHEMA_VERSION+1)
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"newer llm_scratch .*{SCHEMA_VERSION+1}, this one knows up to {SCHEMA_VERSION}.*update") as e: open_store(path)
    assert "\n" not in str(e.value) and path.read_bytes() == before


def test_files_that_are_none_of_ours_are_refused_and_not_touched(tmp_path):
    (tmp_path/"text").write_text("dear diary " * 500)
    made(tmp_path/"foreign", ("CREATE TABLE cats (name)",), 0, 0)
    made(tmp_path/"browser", (), 3, 77)
    (tmp_path/"folder").mkdir()
    for name,why in (("text", "another kind of file"), ("foreign", "database of another program"), ("browser", "database of another program"), ("folder", "can't be opened"), ("text/below", "can't be used|can't be opened")):
        before = (tmp_path/name).read_bytes() if (tmp_path/name).is_file() else None
        with pytest.raises(UserError, match=why) as e: open_store(tmp_path/name)
        assert "\n" not in str(e.value) and str(tmp_path/name) in str(e.value) and ((tmp_path/name).read_bytes() if before is not None else None) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["browser", "folder", "foreign", "text"] # nothing is left beside them


def test_a_damaged_file_is_told_in_one_line(path):
    with open_store(path) as s: s.add(*[one(f"x{i}", prompt="word "*500, consent=True) for i in range(50)])
    raw = bytearray(path.read_bytes())
    raw[4096:40960] = b"\xff"*36864
    path.write_bytes(raw)
    with open_store(path) as s:
        with pytest.raises(UserError, match="is damaged: take it from a backup"): s.interactions()


# --- no room, no right ----------------------------------------------------------------------------------------------

def test_a_store_has_a_bound_and_goes_on_when_there_is_room(path):
    with open_store(path, max_bytes=200_000) as s:
        n = 0
        with pytest.raises(UserError, match="no room.*raise the bound") as e:
            while True: n += s.add(one(f"x{n}", time=float(n), prompt="word "*1000, consent=True))
        assert "\n" not in str(e.value) and 10 < n < 60 and [x.id for x in s.interactions()] == [f"x{i}" for i in range(n)]
        assert s.forget(n/2) and s.add(one("after", prompt="word "*1000, consent=True)) == 1
    assert path.stat().st_size <= 200_000


def in_a_fork(work):
    "What a function says in a process of its own, which may lose rights."
    out,into = os.pipe()
    if not (pid := os.fork()):
        try: told = json.dumps(work())
        except BaseException as e: told = json.dumps(f"{type(e).__name__}: {e}")
        os.write(into, told.encode())
        os._exit(0)
    os.close(into)
    told = b""
    while piece := os.read(out, 65536): told += piece
    os.close(out)
    os.waitpid(pid, 0)
    return json.loads(told)


def test_a_disk_that_is_full_is_one_line_and_no_harm(path):
    "A limit on the size of files stands for the disk: it strikes in the middle of a write."
    with open_store(path) as s: s.add(one("first"))
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        n = 0
        with open_store(path) as s:
            try:
                while n < 500: n += s.add(one(f"x{n}", prompt="word "*2000, consent=True))
            except UserError as e: return n,str(e),len(s.interactions())
    n,why,seen = in_a_fork(fill)
    assert 0 < n < 500 and "free some room" in why and "\n" not in why and seen == n+1
    with open_store(path) as s:
        assert {x.id for x in s.interactions()} == {"first", *(f"x{i}" for i in range(n))} and s.add(one("after")) == 1
        assert s._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_file_that_may_not_be_written_is_one_line(tmp_path):
    import tempfile
    with tempfile.TemporaryDirectory() as folder: # pytest's own folders are closed to others
        path = Path(folder)/"f.sqlite"
        with open_store(path) as s: s.add(one())
        os.chmod(folder, 0o755)
        os.chmod(path, 0o444)
        def write():
            if os.geteuid() == 0: os.setuid(65534)
            with open_store(path) as s: s.add(one("b"))
        def make():
            if os.geteuid() == 0: os.setuid(65534)
            open_store(Path(folder)/"new.sqlite")
        if os.geteuid(): os.chmod(folder, 0o555)
        why = in_a_fork(write)
        assert "UserError" in why and "that this user may write" in why and "\n" not in why
        why = in_a_fork(make)
        assert "UserError" in why and "can't be" in why and "\n" not in why
        os.chmod(folder, 0o755)


def test_a_store_that_is_held_too_long_says_so(path):
    with open_store(path, wait_s=.05) as s:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match="held by another process"): s.add(one())
        assert s.interactions() == [] # readers do not wait
        other.execute("ROLLBACK")
        other.close()
        assert s.add(one()) == 1
    with pytest.raises(UserError, match="closed: open it again"): s.interactions()


# --- several at once ------------------------------------------------------------------------------------------------

WRITER = """
import sys
from llm_scratch.feedback import Interaction, open_store
path,name,n = sys.argv[1],sys.argv[2],int(sys.argv[3])
sys.stdin.readline() # all begin together
with open_store(path) as s:
    for i in range(n):
        two = [Interaction(f"{name}{half}{i}", float(i), name, "why", "so "*300, consent=True) for half in "ab"]
        assert s.add(*two) == 2 and s.rate(f"{name}a{i}", 1)
        s.add(Interaction("shared", 0., name, "", ""))
        print(i, flush=True)
"""


def writer(path, name, n): return subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))


def test_a_thumb_twice_and_a_store_twice_in_one_process(store, path):
    "Two stores of one file in a process: closing one must not take the locks of the other."
    store.add(one())
    with open_store(path) as other: assert other.rate("a", 1) and store.rate("a", -1)
    assert store.add(one("b")) == 1 and [x.rating for x in store.interactions()] == [-1, 0]


def test_two_processes_open_one_old_file_and_write_at_once(path):
    made(path, FORMS[2], 2)
    both = [writer(path, name, 40) for name in ("p", "q")]
    for p in both: p.stdin.write("go\n") and p.stdin.flush()
    for p in both:
        _,wrong = p.communicate(timeout=60)
        assert p.returncode == 0, wrong[-2000:]
    with open_store(path) as s:
        found = {x.id:x for x in s.interactions()}
        assert set(found) == {"old", "odd", "shared"} | {f"{name}{half}{i}" for name in "pq" for half in "ab" for i in range(40)}
        assert all(found[f"{name}a{i}"].rating == 1 for name in "pq" for i in range(40))


def test_an_old_file_that_is_being_read_is_opened_when_that_ends(path):
    made(path, FORMS[1], 1)
    reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM interactions").fetchall()
    threading.Timer(.2, lambda: reader.execute("COMMIT")).start()
    with open_store(path) as s: assert s.interactions() == COMES_OUT[1]
    reader.close()


def test_a_migration_looks_again_when_it_may_write(path, monkeypatch):
    "Another process is quicker: its work is found, and not done twice."
    made(path, FORMS[1], 1)
    begin = feedback._transaction
    def late(db):
        monkeypatch.setattr(feedback, "_transaction", begin)
        with open_store(path) as other: other.add(one("theirs", guard="input:warn"))
        return begin(db)
    monkeypatch.setattr(feedback, "_transaction", late)
    with open_store(path) as s: assert [(x.id, x.guard) for x in s.interactions()] == [("old", ""), ("odd", ""), ("theirs", "input:warn")]


def test_threads_share_a_store(store):
    def work(k):
        for i in range(20): store.add(one(f"{k}-{i}")) and store.rate(f"{k}-{i}", -1) and store.interactions(model="none")
    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert [x.rating for x in store.interactions()] == [-1]*120


def test_a_kill_in_the_midst_loses_nothing_that_was_acknowledged(path):
    for n_seen in (1, 7, 30):
        p = writer(path, f"k{n_seen}", 100_000)
        p.stdin.write("go\n") and p.stdin.flush()
        said = [int(p.stdout.readline()) for _ in range(n_seen)]
        p.send_signal(signal.SIGKILL)
        rest,_ = p.communicate(timeout=20)
        said += [int(x) for x in rest.split()]
        with open_store(path) as s:
            ids = {x.id for x in s.interactions(model=f"k{n_seen}")} - {"shared"}
            assert {f"k{n_seen}{half}{i}" for half in "ab" for i in said} <= ids and len(ids) >= 2*n_seen
            assert {x.replace("a", "b") for x in ids if "a" in x} == {x for x in ids if "b" in x} # both of a pair or none
            assert s._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# --- out ------------------------------------------------------------------------------------------------------------

def test_parquet_opens_in_datasets_and_comes_back_equal(store, tmp_path):
    import datasets
    some = [one("a", consent=True, prompt="naïve 🍮\nline", rating=1, latency_s=.25, n_tokens=3, finish="stop"), one("b", rating=-1, guard="output:redact", time=2.5)]
    store.add(*some)
    out = store.export(tmp_path/"deep"/"out.parquet")
    d = datasets.Dataset.from_parquet(str(out), cache_dir=str(tmp_path/"cache"))
    assert d.column_names == [f.name for f in fields(Interaction)] and [d.features[c].dtype for c in ("time", "rating", "consent", "prompt")] == ["float64", "int64", "bool", "string"]
    assert [Interaction(**row) for row in d] == store.interactions() == [permitted(some[1]), some[0]]
    store.forget(float("inf"))
    store.export(out)
    import pyarrow.parquet as pq
    assert pq.read_table(out).num_rows == 0 and pq.read_schema(out).names == d.column_names
    (tmp_path/"file").write_text("")
    with pytest.raises(UserError, match="can't be"): store.export(tmp_path/"file"/"x.parquet")


# --- the server -----------------------------------------------------------------------------------------------------

def ask(url, route="chat/completions", **body):
    with httpx.Client(timeout=30) as c: return c.post(f"{url}/v1/{route}", json=(dict(messages=HI) if "chat" in route else {}) | body)


def until_there(store, n):
    end = time.monotonic()+10
    while len(store.interactions()) < n:
        assert time.monotonic() < end, f"{len(store.interactions())} of {n} were recorded"
        time.sleep(.005)
    return store.interactions()


def test_the_server_records_numbers_and_no_text(store, path):
    began = time.time()
    with background_server(make_app(scripted_served(f"{SECRET} it is", delay=.002), feedback=store)) as url:
        whole = ask(url).json()
        streamed = ask(url, stream=True, max_tokens=5).text
        ask(url, "completions", prompt=f"Of {SECRET}", max_tokens=4)
        assert ask(url, "completions", prompt=f"Of {SECRET}", max_tokens=10**6).status_code == 400 # no answer was begun
        a,b,c = until_there(store, 3)
    assert (a.id, a.n_tokens, a.finish, a.guard, a.model, a.rating, a.consent) == (whole["id"], whole["usage"]["completion_tokens"], "stop", "", "scripted", 0, False)
    assert f'"{b.id}"' in streamed and (b.n_tokens, b.finish) == (5, "length") and c.id.startswith("cmpl-") and c.n_tokens == 4
    assert all(began-1 <= x.time <= time.time() and .008 <= x.latency_s < 5 and permitted(x) == x and not x.prompt+x.answer for x in (a, b, c))
    assert b"heron" not in every_byte(path)


def test_thumbs_rate_what_was_recorded(store, path):
    with background_server(make_app(scripted_served("Here."), feedback=store)) as url:
        id = ask(url).json()["id"]
        rate = lambda **how: ask(url, "feedback", **dict(id=id, rating="up", messages=HI, answer="Here.", comment=f"mail {MAIL}", correction="There.") | how)
        assert rate().json() == dict(status="kept", text=False) # at once: the numbers may still be on their way
        assert [(x.id, x.rating, x.prompt+x.answer+x.comment+x.correction, x.consent) for x in store.interactions()] == [(id, 1, "", False)] and b"heron" not in every_byte(path)
        assert rate(consent=True, rating="down", messages=[dict(role="user", content="before"), dict(role="assistant", content="so"), *HI]).json() == dict(status="kept", text=True)
        x, = store.interactions()
        assert (x.rating, x.prompt, x.answer, x.comment, x.correction, x.consent, x.n_tokens > 0) == (-1, HI[0]["content"], "Here.", "mail [EMAIL]", "There.", True, True)
        assert rate(consent=False).status_code == 200 and b"heron" not in every_byte(path) # the last click decides
        x, = store.interactions()
        assert (x.rating, x.prompt+x.answer+x.comment+x.correction, x.consent) == (1, "", False)
        unknown = rate(id="chatcmpl-none")
        assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "unknown_answer" and len(store.interactions()) == 1
        assert 'llm_server_feedback_total{rating="up"} 2.0' in httpx.get(f"{url}/metrics").text


def test_a_quick_thumb_waits_for_the_numbers(path):
    with open_store(path) as store:
        class Late:
            def add(self, x):
                time.sleep(.15)
                store.add(x)
            def rate(self, *a, **k): return store.rate(*a, **k)
        with background_server(make_app(scripted_served("x"), feedback=Late())) as url:
            id = ask(url).json()["id"]
            assert store.interactions() == [] and ask(url, "feedback", id=id, rating="down").status_code == 200
            second = ask(url).json()["id"]
            assert [x.id for x in store.interactions()] == [id]
        assert {x.id:x.rating for x in store.interactions()} == {id:-1, second:0} # a server that ends has written what it owes


def test_what_the_guard_did_is_recorded(store):
    part = lambda word: Part(lambda text: float(word in text), lambda text: text.replace(word, "*"))
    guard = Safeguard(GuardPolicy((GuardRule("rude", "output", "redact"), GuardRule("forbidden", "input", "block"))), dict(rude=part("rude"), forbidden=part("forbidden")))
    with background_server(make_app(scripted_served("a rude word.", guard=guard), feedback=store)) as url:
        ask(url)
        ask(url, messages=[dict(role="user", content="forbidden")])
        plain,blocked = until_there(store, 2)
    assert (plain.guard, plain.finish) == ("output:redact", "stop") and (blocked.guard, blocked.finish, blocked.n_tokens) == ("input:block", "content_filter", 0)


def test_answers_that_break_off_are_recorded_as_such(store):
    served = scripted_served("x")
    broken = Served(Scripted(lambda job: [65, 66, -1]), served.tokenizer, served.template, "broken", 512)
    slow = scripted_served("word "*100, delay=.01)
    with background_server(make_app(broken, feedback=store)) as url: assert ask(url).status_code == 500
    with background_server(make_app(slow, feedback=store)) as url:
        with httpx.Client() as c, c.stream("POST", f"{url}/v1/chat/completions", json=dict(messages=HI, stream=True)) as r:
            next(r.iter_lines())
        until_there(store, 2)
    a,b = store.interactions()
    assert (a.finish, a.n_tokens, a.model) == ("error", 2, "broken") and b.finish == "cancelled" and b.n_tokens < 50


def test_an_engine_of_two_versions_says_which_one_it_was(store):
    served = scripted_served("x")
    class Two:
        def submit(self, job):
            ticket = served.engine.submit(job)
            ticket.model = "v2"
            return ticket
        def __getattr__(self, name): return getattr(served.engine, name)
    with background_server(make_app(replace(served, engine=Two()), feedback=store)) as url:
        ask(url)
        assert [x.model for x in until_there(store, 1)] == ["v2"]


def test_a_store_that_fails_costs_no_answer(path):
    store = open_store(path)
    store.close()
    with background_server(make_app(scripted_served("Here."), feedback=store)) as url:
        got = ask(url)
        assert got.status_code == 200 and got.json()["choices"][0]["message"]["content"] == "Here."
        refused = ask(url, "feedback", id=got.json()["id"], rating="up")
        assert refused.status_code == 503 and str(path) not in refused.text and refused.json()["error"]["code"] == "feedback_full"
        end = time.monotonic()+10
        while 'code="feedback_lost"} 1.0' not in httpx.get(f"{url}/metrics").text: assert time.monotonic() < end


def test_lines_of_json_are_written_as_before(tmp_path):
    lines = tmp_path/"feedback.jsonl"
    with background_server(make_app(scripted_served("x"), feedback=str(lines))) as url:
        ask(url)
        assert not lines.exists() and ask(url, "feedback", id="any", rating="up", comment="c").status_code == 200
    assert [set(json.loads(x)) for x in lines.read_text().splitlines()] == [{"time", "model", "id", "rating"}]

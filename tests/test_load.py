"The load generator against servers of known speed and planted failures, queues against formulas, and a soak in small. Times are compared with what a sleep takes at least, never with what a machine ought to reach."
import json
import math
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch.core import UserError, read_json
from llm_scratch.load import (NO_STALL, RETRIED, Ask, Load, PracticeServer, Trip, at_times, growth_rate, in_flight, make_asks, mg1_time, mm1_time, poisson_times, practice_server, quantile_of, quantiles_of, queue_closed, queue_open,
                              read_gauge, run_load, time_blocks, token_rate, wait_ready, watch_process)

pytest.importorskip("httpx")
ROOT = Path(__file__).resolve().parent.parent
some = settings(max_examples=60, deadline=None, database=None)
works = st.lists(st.floats(.01, 5), min_size=1, max_size=25)


# --- queues -----------------------------------------------------------------------------------------------------------

@some
@given(works, st.lists(st.floats(0, 3), min_size=25, max_size=25), st.integers(1, 4))
def test_a_queue_loses_and_invents_nothing(work, gaps, servers):
    due = list(np.cumsum(gaps[:len(work)]))
    trips = queue_open(due, work, servers)
    assert [t.due for t in trips] == due
    assert all(t.latency >= w-1e-9 for t, w in zip(trips, work))
    for at in {t.done for t in trips}:  # never more at work than there are servers
        assert sum(t.done-w < at-1e-9 < t.done-1e-9 for t, w in zip(trips, work)) <= servers
    if servers == 1:
        assert [t.done for t in trips] == sorted(t.done for t in trips)
        done = 0.
        for at, w, t in zip(due, work, trips):  # the rule of Lindley, written down by itself
            done = max(at, done)+w
            assert t.done == pytest.approx(done)
    assert queue_open(due, work, len(work))[-1].latency == pytest.approx(work[-1])  # a server for everybody: nobody waits
    assert in_flight(trips)*(max(t.done for t in trips)-due[0]) == pytest.approx(sum(t.latency for t in trips))


@some
@given(works, st.integers(1, 6), st.integers(1, 3))
def test_a_closed_loop_is_never_more_than_its_clients(work, clients, servers):
    trips = queue_closed(work, clients, servers)
    events = sorted([(t.due, 1) for t in trips]+[(t.done, -1) for t in trips])
    inside = np.cumsum([c for _, c in events])
    assert max(inside) <= clients and min(inside) >= 0 and len(trips) == len(work)
    assert max(t.done for t in trips) >= sum(work)/min(clients, servers)-1e-9


def test_a_stall_moves_what_it_touches():
    plain, stalled = (queue_open([0, 1, 2, 9], [.5]*4, stall=s) for s in (NO_STALL, (1.2, 3.2)))
    assert [t.done for t in plain] == [.5, 1.5, 2.5, 9.5]
    assert [t.done for t in stalled] == pytest.approx([.5, 3.5, 4., 9.5])


def test_formulas_meet_simulation_and_refuse_saturation():
    rng = random.Random(77)  # not the seed of the gaps: long gaps would come with long work, and nobody would wait
    due = poisson_times(.5, 120_000, 5)
    seen = [t.latency for t in queue_open(due, [rng.expovariate(1) for _ in due])]
    assert np.mean(seen) == pytest.approx(mm1_time(.5), rel=.06) and np.quantile(seen, .9) == pytest.approx(mm1_time(.5, q=.9), rel=.08)
    assert mm1_time(.5, 2.) == 4 and mm1_time(0) == 1
    assert mg1_time(.5, [1., 1.]) == pytest.approx(1+.5/2/.5)
    for wrong in (lambda: mm1_time(1), lambda: mm1_time(-.1), lambda: mg1_time(1, [1.]), lambda: poisson_times(-1, 1, 0), lambda: poisson_times(1, 0, 0)):
        with pytest.raises(UserError): wrong()


def test_arrivals_are_poisson_and_seeded():
    times = poisson_times(50, 400, 2)
    counts = np.bincount([int(t) for t in times], minlength=400)
    assert np.mean(counts) == pytest.approx(50, rel=.03) and np.var(counts) == pytest.approx(50, rel=.25)  # as many as scattered
    assert times == poisson_times(50, 400, 2) != poisson_times(50, 400, 3) and times == sorted(times) and times[-1] < 400


# --- figures ----------------------------------------------------------------------------------------------------------

def test_quantiles_and_what_is_drawn():
    x = list(range(1000))
    assert quantile_of(x, .5).value == 499.5 and quantile_of(x, .99).n == 1000
    narrow, wide = quantile_of(x, .5), quantile_of(x, .5, [v//200 for v in x])  # five runs that differ: requests by themselves hide it
    assert wide.high-wide.low > 5*(narrow.high-narrow.low) and narrow.low < 499.5 < narrow.high
    assert quantile_of(x, .9, seed=1) == quantile_of(x, .9, seed=1)
    with pytest.raises(UserError, match="at least 100"): quantile_of(x[:99], .99)
    assert time_blocks([Trip(t, t, t) for t in (0, 9.9, 10, 25)], 10) == [0, 0, 1, 2]


def test_the_rate_counts_tokens_between_warm_up_and_the_last_ask():
    load = Load([Trip(0, 0, 5, tuple(np.arange(0, 10, .1)), 300)], 8., 0.)  # thirty tokens a second in ten pieces, also after the end
    assert token_rate(load, 1.).mean == pytest.approx(30, rel=.05) and token_rate(load, 1.).n == 8
    with pytest.raises(UserError): token_rate(load, 8.)
    late = Load([Trip(n, n, n+1, (n+.5, n+.6), 2, "broken" if n % 2 else "") for n in range(10)], 10., 0.)
    assert quantiles_of([late], "latency", (.5,))["p50"].n == 5 and late.errors == {"broken":5} and quantiles_of([late], "pace", (.5,))["p50"].value == pytest.approx(.1)
    assert quantiles_of([late], "first")["p99"] is None
    assert math.isnan(Trip(0, 0, 1).first) and math.isnan(Trip(0, 0, 1, (.5,), 1).pace)


def test_growth_is_seen_and_its_absence_too():
    at = np.arange(600.)
    flat = growth_rate(at, 1e6+np.random.default_rng(0).normal(0, 100, 600))
    leak = growth_rate(at, 50*at+np.random.default_rng(1).normal(0, 100, 600))
    assert abs(flat.mean) < 1 and flat.low < 0 < flat.high and abs(leak.mean-50) < 1 and leak.low > 45
    warm = growth_rate(at, np.minimum(at, 100)*1e5)  # what fills in the first fifth is no leak
    assert warm.mean == 0
    with pytest.raises(UserError, match="2 values after the first 20% of the time are too few"): growth_rate([1, 2, 3], [1, 2, 3])
    seldom = np.concatenate([at[:200], at[290:300], at[500:]])  # who watches a busy machine misses some looks
    assert growth_rate(seldom, 50*seldom).mean == pytest.approx(50)


# --- asks -------------------------------------------------------------------------------------------------------------

def test_asks_are_seeded_mixed_and_named():
    a, b, c = (list(islice(make_asks(s), 300)) for s in (1, 1, 2))
    assert a == b != c and len({x.key for x in a}) == 300
    assert {x.max_tokens for x in a} == {8, 16, 32, 64} and len({len(x.prompt.split()) for x in a}) > 20
    x = a[0]
    assert x.key == x._replace(at=9.).key and len({x.key, x._replace(seed=1).key, x._replace(max_tokens=1).key, x._replace(prompt="b").key}) == 4
    assert [y.at for y in at_times(a, [1., 2.])] == [1., 2.] and [y.prompt for y in at_times(a, [1., 2.])] == [y.prompt for y in a[:2]]


# --- the generator against a server of known speed -------------------------------------------------------------------

def test_times_are_what_the_server_sleeps():
    asks = [Ask("bread", n, 0) for n in (2, 5, 9)]
    with practice_server(slots=1, per_token=.03) as (url, _): trips = run_load(url, asks, clients=1).trips
    for ask, t in zip(asks, trips):
        assert t.n_tokens == len(t.times) == ask.max_tokens and t.due <= t.sent <= t.times[0] <= t.times[-1] <= t.done
        assert t.first >= .029 and t.latency >= .029*ask.max_tokens and t.pace >= .02
    assert len({t.text for t in trips}) == 3


def test_streams_are_heard_as_they_come_and_not_at_the_end():
    with practice_server(slots=1, per_token=.1) as (url, _): t = run_load(url, [Ask("x", 6, 0)], clients=1).trips[0]
    assert t.times[-1]-t.times[0] > .3 and t.first < t.latency-.3


def test_a_closed_loop_waits_and_an_open_one_does_not():
    "Coordinated omission on a real socket: the server has one slot that is held for half a second."
    asks = [Ask("hold", 50, 0)]+[Ask(f"a{n}", 1, n) for n in range(12)]
    with practice_server(slots=1, per_token=.01) as (url, _):
        closed = run_load(url, asks, clients=1)
        opened = run_load(url, at_times(asks, [0]+[.02+n/50 for n in range(12)]))
    waits = lambda load: sum(t.latency > .2 for t in load.trips if t.n_tokens == 1)
    assert waits(closed) == 0 and waits(opened) == 12
    assert all(t.sent-t.due < .2 for t in opened.trips)  # it did send while the first was running


def test_clients_are_as_many_as_asked():
    most = []
    class Watching(PracticeServer):
        async def stream(self, asked, writer):
            most.append(self.in_flight)
            await super().stream(asked, writer)
    with practice_server(slots=16, per_token=.01) as (url, server):
        server.__class__ = Watching
        load = run_load(url, islice(make_asks(0, tokens=(3,)), 40), clients=5)
    assert max(most) == 5 and len(load.good) == 40 and server.served == 40


def test_littles_law_between_server_and_clients():
    with practice_server(slots=2, per_token=.01) as (url, server):
        seen, stop = [], threading.Event()
        def look():
            while not stop.wait(.005): seen.append(server.in_flight)
        thread = threading.Thread(target=look)
        thread.start()
        load = run_load(url, islice(make_asks(0, tokens=(5, 15)), 24), clients=6)
        stop.set()
        thread.join()
    inside = [n for n in seen if n]  # from the first to the last
    assert np.mean(inside) == pytest.approx(in_flight(load.trips), rel=.25)


def test_seconds_end_a_load_and_what_runs_is_finished():
    with practice_server(per_token=.02) as (url, server):
        load = run_load(url, make_asks(0, tokens=(5,)), clients=3, seconds=.3)
        late = run_load(url, at_times(make_asks(0, tokens=(2,)), [0, .1, .2, 5.]), seconds=.3)
    assert load.seconds == pytest.approx(.3, abs=.01) and all(t.due < .3 for t in load.trips) and not load.errors and max(t.done for t in load.trips) > .3
    assert len(late.trips) == 3 and 0 <= load.cpu_seconds < 5


@pytest.mark.parametrize("fault, error, tries", [("refuse", "HTTP 503", 3), ("bug", "HTTP 500", 1), ("wrong", "HTTP 400", 1), ("break", "broken", 3), ("stream", "stream", 1), ("foreign", "foreign", 1), ("hang", "timeout", 3)])
def test_every_failure_has_its_kind_and_only_some_are_tried_again(fault, error, tries):
    with practice_server() as (url, _): load = run_load(url, [Ask(f"!{fault}", 5, 0)], clients=1, timeout=.4, retries=2)
    t = load.trips[0]
    assert (t.error, len(t.failed)+1, load.errors, load.good) == (error, tries, {error:1}, [])
    assert (error in RETRIED) == (tries == 3) and set(t.failed) <= {error}
    if fault == "break": assert len(t.times) == 2


def test_nobody_listens():
    with practice_server() as (url, _): pass
    load = run_load(url, [Ask("a", 1, 0)], clients=1, model="m", retries=1)
    assert load.errors == {"refused":1} and load.retried == {"refused":1}


def test_a_stream_without_its_end_is_broken_even_with_status_200():
    class Short(PracticeServer):
        async def stream(self, asked, writer):
            event = b'data: {"choices": [{"text": "half "}]}\n\n'
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(event) + event)
    with practice_server() as (url, server):
        server.__class__ = Short
        t = run_load(url, [Ask("a", 3, 0)], clients=1).trips[0]
    assert (t.error, t.text, t.n_tokens) == ("broken", "half ", 1)


def test_a_server_that_breaks_off_says_so_and_is_asked_again():
    class Draining(PracticeServer):
        async def stream(self, asked, writer):
            self.__class__ = PracticeServer
            event = b'data: {"error": {"code": "cancelled", "message": "ask again"}}\n\n'
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(event) + event)
    with practice_server() as (url, server):
        server.__class__ = Draining
        t = run_load(url, [Ask("a", 3, 0)], clients=1, retries=1).trips[0]
    assert (t.error, t.failed, t.n_tokens) == ("", ("cut",), 3)


def test_a_full_server_is_asked_again_after_its_time():
    with practice_server(slots=1, per_token=.02, max_waiting=0) as (url, server):
        load = run_load(url, islice(make_asks(0, tokens=(4,)), 6), clients=3, retries=60)
        without = run_load(url, islice(make_asks(1, tokens=(4,)), 6), clients=3)
    assert len(load.good) == 6 and load.retried.keys() == {"HTTP 429"} and not load.errors
    assert without.errors.keys() == {"HTTP 429"}


def test_a_server_is_given_the_time_that_it_asks_for():
    with practice_server(slots=1, per_token=.02, max_waiting=0) as (url, _): load = run_load(url, [Ask("hold", 60, 0), Ask("b", 2, 1, .3)], retries=1)
    sent_away = next(t for t in load.trips if t.failed)
    assert sent_away.failed == ("HTTP 429",) and sent_away.latency >= .2  # its own patience would have been a tenth


def test_a_trip_is_measured_from_when_it_was_due():
    t = Trip(1., 5., 8., (6., 7.), 2)
    assert (t.latency, t.first, t.pace) == (7., 5., 1.)


def test_what_it_refuses():
    for url in ("http://example.org", "http://10.0.0.1:80", "http://127.0.0.1.example.org"):
        with pytest.raises(UserError, match="attack"): run_load(url, [], clients=1)
    with pytest.raises(UserError, match="at least 1"): run_load("http://127.0.0.1:9", [], clients=0)
    with practice_server() as (url, _): pass
    with pytest.raises(UserError, match="is the server up"): run_load(url, [], clients=1)
    with pytest.raises(UserError, match="not ready after"): wait_ready(url, seconds=.3)
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    ended.wait()
    with pytest.raises(UserError, match="ended with status 3"): wait_ready(url, ended)


def test_proxies_of_the_environment_are_not_asked(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"): monkeypatch.setenv(name, "http://127.0.0.1:1")
    with practice_server() as (url, _):
        wait_ready(url, seconds=5)
        assert len(run_load(url, [Ask("a", 2, 0)], clients=1).good) == 1


def test_it_starts_without_torch():
    done = subprocess.run([sys.executable, "-c", "import llm_scratch.load, sys; print('torch' in sys.modules)"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


# --- the book's own server -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ours():
    "A tiny model behind the real server, in this process."
    for name in ("fastapi", "uvicorn", "prometheus_client", "psutil"): pytest.importorskip(name)
    from served import tiny_served

    from llm_scratch.server import background_server, make_app
    served = tiny_served(n_slots=4, max_waiting=8)
    with background_server(make_app(served)) as url: yield str(url)
    served.engine.close(drain=False)


def test_the_books_server_is_understood(ours):
    asks = list(islice(make_asks(3, words=(2, 8), tokens=(3, 6, 12)), 16))
    with watch_process(os.getpid(), .01, lambda: read_gauge(ours, "llm_server_running", "llm_server_waiting")) as seen: one = run_load(ours, asks, clients=6)
    two = run_load(ours, at_times(asks, poisson_times(200, 10, 0)), retries=30)
    chat = run_load(ours, asks[:3], clients=2, chat=True)
    assert not one.errors and not two.errors and not chat.errors and len(one.good) == len(two.good) == 16 and len(chat.good) == 3
    assert all(1 <= t.n_tokens <= 12 and 0 < t.first <= t.latency for t in one.trips)
    texts = [Counter(t.text for t in load.trips) for load in (one, two)]
    assert texts[0] == texts[1]  # a seed, and so one answer, whoever stands beside
    assert len(seen) > 1 and max(row[3] for row in seen) <= 6
    with pytest.raises(UserError, match="tells no llm_nothing"): read_gauge(ours, "llm_nothing")


def test_a_wrong_model_is_an_error_of_the_client(ours):
    assert run_load(ours, [Ask("a", 2, 0)], clients=1, model="other", retries=2).errors == {"HTTP 404":1}


def test_back_pressure_loses_nobody(ours):
    load = run_load(ours, islice(make_asks(4, words=(2, 4), tokens=(12,)), 40), clients=40, retries=30)
    assert len(load.good) == 40 and set(load.retried) <= {"HTTP 429"} and load.retried


def test_a_soak_in_small(ours):
    "Ten seconds in place of ten minutes: no error and no leak; and a planted leak is seen."
    kept = []
    def soaked(leak):
        def more():
            if leak: kept.append(bytearray(os.urandom(2**20)))
            return 0.
        with watch_process(os.getpid(), .05, more) as seen: load = run_load(ours, make_asks(5, words=(2, 8), tokens=(3, 6)), clients=4, seconds=5)
        return load, growth_rate([r[0] for r in seen], [r[1] for r in seen], warm=.4)
    load, flat = soaked(False)
    assert not load.errors and len(load.good) > 10
    load, leaking = soaked(True)
    assert not load.errors and leaking.low > 2e6 > flat.low  # twenty mebibytes a second on a quiet machine
    assert leaking.mean > 3*flat.high or flat.high < 2e6


# --- the record -------------------------------------------------------------------------------------------------------

def test_the_benchmark_runs_in_small(tmp_path):
    for name in ("fastapi", "uvicorn", "psutil", "prometheus_client"): pytest.importorskip(name)
    out = tmp_path/"load.json"
    done = subprocess.run([sys.executable, ROOT/"benchmarks"/"load.py", "--tiny", "--only", "stall", "--out", out], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = read_json(out)
    stall = record["stall"]
    assert stall["open"]["errors"] == stall["closed"]["errors"] == {} and stall["open"]["slow"] > stall["closed"]["slow"] <= 2 and record["about"]["tiny"]


def test_the_record_holds_what_the_chapter_says():
    record = read_json(ROOT/"nbs"/"load.json")
    assert not record["about"]["tiny"] and record["soak"]["errors"] == {} == record["failover"]["errors"] and record["soak"]["seconds"] >= 599
    assert record["failover"]["same_texts"] and any(e == "killed" for e, _ in record["failover"]["events"])
    assert [r["clients"] for r in record["clients"]["rows"]][-1] == 200 and all(r["errors"] == {} for r in record["clients"]["rows"])
    assert json.dumps(record, allow_nan=False)

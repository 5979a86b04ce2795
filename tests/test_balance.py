"Shares that add up, an order whose every beginning keeps them to one document, pieces that are the whole, and a record that says what the chapter says."
import json
import math
import pickle
import random
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import example, given, settings, strategies as st

from llm_scratch.balance import Draw, Mixture, byte_shares, cut_document, limit_epochs, mix_documents, plot_shares, temperature_shares
from llm_scratch.data import Document

ROOT = Path(__file__).resolve().parent.parent
sizes_of = st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-3, 1e15), min_size=1)
shares_of = st.lists(st.floats(.001, 1), min_size=1, max_size=6).map(lambda w: {c: x/sum(w) for c, x in zip("abcdef", w)})


# --- shares ---------------------------------------------------------------------------------------------------------------

@given(sizes_of, st.one_of(st.floats(.2, 100), st.just(math.inf)))
def test_a_temperature_raises_ratios_to_a_power(sizes, t):
    shares = temperature_shares(sizes, t)
    assert sum(shares.values()) == pytest.approx(1) and list(shares) == list(sizes)
    a, b = max(sizes, key=sizes.get), min(sizes, key=sizes.get)
    assert shares[b]/shares[a] == pytest.approx((sizes[b]/sizes[a])**(1/t), rel=1e-9)


@pytest.mark.parametrize("sizes, t, message", [({}, 1, "at least 1 domain"), (dict(a=0), 1, "a size above 0"), (dict(a=1), 0, "temperature=0"), (dict(a=1), -1, "temperature=-1"), (dict(a=1), math.nan, "temperature=nan")])
def test_sizes_and_temperatures_that_make_no_shares(sizes, t, message):
    with pytest.raises(ValueError, match=message): temperature_shares(sizes, t)


@settings(deadline=None)
@given(shares_of, st.data())
def test_nothing_is_read_too_often_and_the_rest_keeps_its_proportions(shares, data):
    sizes = {d: data.draw(st.floats(1, 1e6)) for d in shares}
    most = data.draw(st.floats(.5, 8))
    total = most*sum(sizes.values())*data.draw(st.floats(.01, 1))
    got = limit_epochs(shares, sizes, total, most)
    assert sum(got.values()) == pytest.approx(1, abs=1e-6) and list(got) == list(shares)
    assert all(got[d]*total <= most*sizes[d]*(1+1e-6) for d in got)
    free = [d for d in got if got[d]*total < most*sizes[d]*(1-1e-6)]
    for d in free: assert got[d]/shares[d] == pytest.approx(got[free[0]]/shares[free[0]]) and got[d] >= shares[d]*(1-1e-6)


def test_limits_in_numbers():
    assert limit_epochs(dict(a=.5, b=.5), dict(a=10, b=1000), 100, 4) == pytest.approx(dict(a=.4, b=.6))
    assert limit_epochs(dict(a=.5, b=.5), dict(a=10, b=1000), 100) == pytest.approx(dict(a=.4, b=.6))  # four readings, unless told otherwise
    assert limit_epochs(dict(a=.5, b=.5, c=0.), dict(a=10, b=10, c=1), 20, 1) == dict(a=.5, b=.5, c=0.)
    assert limit_epochs(dict(a=.6, b=.3, c=.1), dict(a=10, b=12, c=1000), 100, 1) == pytest.approx(dict(a=.1, b=.12, c=.78))  # a's rest makes b full
    with pytest.raises(ValueError, match=r"total=101 is asked for, and 4 readings of all 2 domains give 100: .* most=4.04"): limit_epochs(dict(a=.5, b=.5, c=0), dict(a=20, b=5, c=99), 101)


# --- the order ------------------------------------------------------------------------------------------------------------

@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6))
@example(7)
def test_every_beginning_is_right_to_one_document(seed):
    rng = random.Random(seed)
    w = {f"d{i}": rng.random()**rng.choice((1, 4)) + 1e-4 for i in range(rng.randint(1, 7))}
    shares = {d: x/sum(w.values()) for d, x in w.items()}
    sizes = {d: [rng.randint(0, 10**rng.randint(0, 4)) for _ in range(rng.randint(1, 12))] + [rng.randint(1, 100)] for d in w}
    longest, given, total = max(map(max, sizes.values())), dict.fromkeys(w, 0), 0
    for draw in islice(Mixture(sizes, shares, seed).draws(), 200):
        given[draw.domain] += sizes[draw.domain][draw.index]
        total += sizes[draw.domain][draw.index]
        for d, p in shares.items(): assert -longest*(1+1e-6) - 1e-6 <= given[d]-p*total <= max(sizes[d])*(1-p)*(1+1e-6) + 1e-6*total


def test_it_serves_who_is_due_first_not_who_lags_most():
    mixture = Mixture({d: [1] for d in "abc"}, dict(a=.055, b=.944, c=.001))
    given, worst = Counter(), 0
    for n, draw in enumerate(islice(mixture.draws(), 2000), 1):
        given[draw.domain] += 1
        worst = max(worst, *(p*n - given[d] for d, p in mixture.shares.items()))
    assert worst <= 1


def test_every_epoch_is_another_order_of_all_documents():
    draws = [d for d in islice(Mixture(dict(a=[1]*7, b=[1]*3), dict(a=.5, b=.5)).draws(), 84) if d.domain == "a"]
    epochs = [[d.index for d in draws[i:i+7]] for i in range(0, 42, 7)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and len({tuple(e) for e in epochs}) > 3
    assert [d.epoch for d in draws[:21]] == [0]*7 + [1]*7 + [2]*7
    orders = {tuple(d.index for d in islice(Mixture(dict(a=[1]*7), dict(a=1.), seed).draws(), 7)) for seed in range(5)}
    assert len(orders) > 3 and Draw("a", 0, 0) in list(islice(Mixture(dict(a=[1]*7), dict(a=1.)).draws(), 7))
    both = list(islice(Mixture(dict(a=[1]*30, b=[1]*30), dict(a=.5, b=.5)).draws(), 60))
    assert [d.index for d in both if d.domain == "a"] != [d.index for d in both if d.domain == "b"]  # each domain has its own


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 90))
def test_going_on_is_as_if_there_had_been_no_break(seed, stop):
    rng = random.Random(seed)
    mixture = pickle.loads(pickle.dumps(Mixture({d: [rng.randint(1, 50) for _ in range(rng.randint(1, 9))] for d in "abc"}, dict(a=.6, b=.3, c=.1), seed)))
    whole = list(islice(mixture.draws(), 100))
    place = Counter(d.domain for d in whole[:stop])
    assert list(islice(mixture.draws(place), 100-stop)) == whole[stop:]
    assert mixture.given(place) == {d: sum(mixture.sizes[d][w.index] for w in whole[:stop] if w.domain == d) for d in "abc"}
    assert all(type(n) is int for n in mixture.given(place).values())


def test_domains_without_a_share():
    for shares in (dict(a=1., b=0.), dict(a=1.)): assert {d.domain for d in islice(Mixture(dict(a=[1, 2], b=[]), shares).draws(), 20)} == {"a"}


@pytest.mark.parametrize("sizes, shares, message", [(dict(a=[1]), dict(a=.9), "add up to 0.9"), (dict(a=[1], b=[1]), dict(a=1.5, b=-.5), "of at least 0"), (dict(a=[1]), {}, "add up to 0:"), (dict(a=[1]), dict(c=1.), "shares of c, and sizes of a"), (dict(a=[1], b=[0, 0]), dict(a=.5, b=.5), "b has a share of 0.5 and no text")])
def test_mixtures_that_cannot_be(sizes, shares, message):
    with pytest.raises(ValueError, match=message): Mixture(sizes, shares)


# --- documents ------------------------------------------------------------------------------------------------------------

def doc(text, source="t", id="t/1"): return Document(text, source, id, dict(page=1))


@given(st.text(), st.integers(4, 20))
@example("\ud800 x", 4)
def test_pieces_are_the_whole(text, most):
    pieces = cut_document(doc(text), most)
    assert "".join(p.text for p in pieces) == text and all(len(p.text.encode("utf-8", "surrogatepass")) <= most for p in pieces)
    assert all(p.text for p in pieces) or text == ""
    assert len({p.id for p in pieces}) == len(pieces) and (pieces == [doc(text)] or [p.id for p in pieces[:2]] == ["t/1#0", "t/1#1"])


def test_where_it_is_cut():
    for text, parts in (("one two\nthree", ["one two\n", "three"]), ("one two three", ["one two ", "three"]), ("abcdefghijk", ["abcdefghij", "k"]), ("abcdefghié", ["abcdefghi", "é"]), ("abcdefghij", ["abcdefghij"]), ("a\nbcdefghi jk", ["a\n", "bcdefghi ", "jk"])):
        assert [p.text for p in cut_document(doc(text), 10)] == parts


@pytest.mark.parametrize("n", [1, 10_000, 100_000])
def test_the_mixture_of_documents(n):
    rng = random.Random(0)
    domains = {s: [doc("é"*rng.randint(1, top), s, f"{s}/{i}") for i in range(50)] for s, top in (("a", 10), ("b", 100), ("c", 500))}
    docs = list(mix_documents(domains, dict(a=.2, b=.5, c=.3), n))
    total = sum(2*len(d.text) for d in docs)
    assert n <= total < n+1000 and total - 2*len(docs[-1].text) < n and all(d in domains[d.source] for d in docs)
    if n > 1: assert all(abs(byte_shares(docs)[s]-p) <= 1000/n for s, p in dict(a=.2, b=.5, c=.3).items())
    if n > 1: assert docs != list(mix_documents(domains, dict(a=.2, b=.5, c=.3), n, seed=1))
    assert list(mix_documents(domains, dict(a=1.), 0)) == []


def test_bytes_not_characters(): assert byte_shares([doc("éé", "a"), doc("abcd", "b"), doc("\ud800x", "a")]) == dict(a=8/12, b=4/12)


def test_bars_end_at_a_hundred():
    import matplotlib
    matplotlib.use("agg")
    ax = plot_shares(dict(before=dict(a=.7, b=.3), after=dict(b=.5, a=.25, c=.25)))
    bars = {(c.get_label(), i): (b.get_x(), b.get_width()) for c in ax.containers for i, b in enumerate(c)}
    assert bars["a", 0] == (0, 70) and bars["b", 1] == (25, 50) and bars["c", 1] == (75, 25) and bars["c", 0][1] == 0
    assert [t.get_text() for t in ax.get_yticklabels()] == ["before", "after"] and ax.yaxis_inverted()
    assert plot_shares(dict(x=dict(a=1)), ax) is ax


# --- the record -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def record(): return json.loads((ROOT/"nbs"/"balance.json").read_text(encoding="utf-8"))


def test_the_record_is_whole(record):
    keys = Counter((r["kind"], r["dial"]) for r in record["runs"])
    assert len(keys) == 11 and set(keys.values()) == {3} and len({(r["weights"], r["n_tokens"]) for r in record["runs"]}) == 1
    for r in record["runs"]:
        assert sum(r["asked"].values()) == pytest.approx(1) and all(abs(r["realised"].get(d, 0)-p) < .01 for d, p in r["asked"].items())
        assert all(1 < b["mean"] < 4 and 0 < b["stderr"] < .3 and b["n"] == record["held_out"] for b in r["bits"].values()) and len(r["bits"]) == 5
    for t in (1., 3.): assert next(r["asked"] for r in record["runs"] if (r["kind"], r["dial"]) == ("temperature", t)) == pytest.approx(temperature_shares(record["sizes"], t))


def test_more_legal_text_is_better_for_licences_and_worse_for_the_rest(record):
    of = lambda dial, name: mean(r["bits"][name]["mean"] for r in record["runs"] if (r["kind"], r["dial"]) == ("share", dial))
    dials = (0, .01, .05, .2, .5, .8)
    assert [of(d, "licences") for d in dials] == sorted((of(d, "licences") for d in dials), reverse=True)
    for name in ("recipes", "encyclopaedia", "parables", "manuals"): assert of(.05, name) < of(.2, name) < of(.5, name) < of(.8, name)


def test_the_script_runs_and_writes_a_whole_record(tmp_path, record):
    out = tmp_path/"balance.json"
    done = subprocess.run([sys.executable, ROOT/"benchmarks"/"balance.py", "--steps", "2", "--seeds", "1", "--held-out", "5", "--documents", "300", "--out", out], capture_output=True, text=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    tried = json.loads(out.read_text(encoding="utf-8"))
    assert tried["sizes"] == record["sizes"] and [(r["kind"], r["dial"], r["asked"], r["weights"]) for r in tried["runs"]] == [(r["kind"], r["dial"], r["asked"], r["weights"]) for r in record["runs"][:11]]
    assert done.stdout.count("\n| ") == 12 and all(math.isfinite(b["mean"]) for r in tried["runs"] for b in r["bits"].values())

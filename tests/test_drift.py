"The watch for drift: its promise against planted nulls and breaks, oracles, the report, and what a user can get wrong."
import json
import math
import random
from itertools import permutations

import numpy as np
import pytest

from llm_scratch.core import UserError
from llm_scratch.drift import (BETS, SERVED_SIGNS, TEXT_SIGNS, DriftWatch, Gambler, SteadyWatch, drift_report, drift_scores, fit_reference, ks_distance,
                               place_among, shuffled_p, stability_index, unevenness)
from llm_scratch.evaluation import holm
from llm_scratch.feedback import Interaction
from llm_scratch.safety import exact_interval

KITCHEN = "stir the soup with salt and butter until warm then bake bread at home for an hour or two add flour eggs milk sugar onion pepper".split()
COURT = "the licence grants a party no warranty of merchantability or fitness and liability is limited by statute whereas notice shall be served".split()


def sentences(words, n, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, weights=range(len(words), 0, -1), k=rng.randint(5, 14))) for _ in range(n)]


def asked(texts, at=0., **more): return [Interaction(f"i{at:.0f}-{k}", at+60.*k, "v1", t, "yes", consent=True, **{name: v[k] for name, v in more.items()}) for k, t in enumerate(texts)]


@pytest.fixture(scope="module")
def usual(): return fit_reference(sentences(KITCHEN, 300, 0))


# --- places: the law, exactly ---------------------------------------------------------------------------------------

def test_every_run_of_places_is_as_likely_as_any_other():
    "Four values in all their orders: each run of places once, so places are uniform and independent."
    runs = []
    for order in permutations((2., 3., 5., 7.)):
        runs.append(tuple(round(place_among(v, sorted(order[:k]), .5)*(k+1)-.5) for k, v in enumerate(order)))
    assert sorted(runs) == [(0, b, c, d) for b in range(2) for c in range(3) for d in range(4)]


@pytest.mark.parametrize("values", [[4.]*9, [1., 1., 2., 2., 2., 3.], [-math.inf, 0., math.inf]])
def test_chance_fills_the_gaps_between_places(values):
    "Over all values and an even chance, the places are even, too, whatever the ties."
    chances = (np.arange(50)+.5)/50
    u = np.sort([place_among(v, sorted(values[:k]+values[k+1:]), c) for k, v in enumerate(values) for c in chances])
    assert np.abs(u-(np.arange(len(u))+.5)/len(u)).max() < .5/50+1e-9


@pytest.mark.parametrize("name", BETS)
def test_bets_are_fair(name):
    from scipy.integrate import quad
    area = quad(BETS[name], 0, 1, limit=200)[0]
    assert .999 < area <= 1+1e-6 and min(map(BETS[name], (0., .5, 1.))) >= 0 and math.isfinite(BETS[name](0.)+BETS[name](1.))


# --- the gambler ----------------------------------------------------------------------------------------------------

def test_wealth_is_a_mixture_over_all_ways_to_switch():
    "By hand for two rounds: each pair of bets weighs its chance to have been followed."
    moving, (u, v), k = .1, (.9, .2), len(BETS)
    g = Gambler(moving)
    got = [g.see(u), g.see(v)]
    by_hand = sum(1/k*a(u)*((1-moving)*(i == j)+moving/k)*b(v) for i, a in enumerate(BETS.values()) for j, b in enumerate(BETS.values()))
    assert got == pytest.approx([sum(a(u) for a in BETS.values())/k, by_hand])
    assert sum(g.shares.values()) == pytest.approx(1) and g.p == pytest.approx(min(1, 1/max(got)))


def test_wealth_grows_beyond_what_a_float_holds():
    g = Gambler()
    for _ in range(3000): g.see(1.)
    assert g.log_wealth > 5000 and math.isfinite(g.see(1.)) and g.p == 0.


def share_that_rings(seeds, n, before=60, grow=True, signs=3):
    "Streams of one kind: how many watches ring? `grow=False` breaks the rule that what is seen is added."
    rings = 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        base = rng.exponential(size=before+n)
        values = dict(zip("abc"[:signs], (base, np.round(base), rng.integers(0, 2, before+n).astype(float))))  # one smooth, one of it with ties, a coin
        watch = DriftWatch({s: v[:before] for s, v in values.items()}, seed=seed)
        if not grow: watch._earlier = {s: Frozen(v) for s, v in watch._earlier.items()}
        for i in range(before, before+n):
            if watch.see({s: v[i] for s, v in values.items()}): break
        rings += watch.alarm
    return rings


class Frozen(list):
    def insert(self, *args): pass  # bisect.insort calls it


@pytest.mark.parametrize("grow", [True, False])
def test_false_alarms_are_as_rare_as_promised_and_the_test_can_fail(grow):
    low, high = exact_interval(share_that_rings(300 if grow else 60, 100 if grow else 300, 40 if grow else 15, grow), 300 if grow else 60)
    assert (low <= .05 and high < .12) if grow else low > .05


def test_holm_pays_for_each_sign():
    "The same coin alone and beside others: what rings alone need not ring in company."
    alone, company = DriftWatch(dict(a=())), DriftWatch(dict.fromkeys("abcdefgh", ()))
    for i in range(60): alone.see(dict(a=float(i))), company.see(dict(a=float(i)))
    assert alone.alarm_at["a"] < company.alarm_at["a"] and company.p["a"] == pytest.approx(8*company._gamblers["a"].p)


@pytest.mark.parametrize(("sign", "change"), [("tokens", lambda n: sentences(COURT, n, 9)), ("length", lambda n: [" ".join(sentences(KITCHEN, 3, s)) for s in range(n)])])
def test_a_planted_change_rings_by_its_sign(usual, sign, change):
    for seed in range(3):
        watch = DriftWatch(usual, seed=seed)
        for t in sentences(KITCHEN, 150, 100+seed): watch.see(t)
        assert not watch.alarm
        for t in change(40):
            if watch.see(t): break
        assert 150 < watch.n <= 180 and sign in watch.alarm_at


def test_an_alarm_stays_and_the_same_seed_says_the_same(usual):
    stream = [*sentences(KITCHEN, 30, 5), *sentences(COURT, 30, 6), *sentences(KITCHEN, 100, 7)]
    said = [[watch.see(t) for t in stream] for watch in (DriftWatch(usual), DriftWatch(usual))]
    assert said[0] == said[1] and said[0][-1] and said[0] == sorted(said[0])


def test_topics_alone_are_noticed():
    "Two kinds of text that are known, in other shares than before."
    mixed = lambda share, n, seed: [t for t, r in zip(sentences(KITCHEN, n, seed), np.random.default_rng(seed).random(n)) if r >= share] + [t for t, r in zip(sentences(COURT, n, seed+50), np.random.default_rng(seed).random(n)) if r < share]
    usual = fit_reference(random.Random(0).sample(mixed(.3, 400, 1), 400), n_topics=2)
    rows = {r["name"]: r for r in drift_report(usual, asked(random.Random(0).sample(mixed(.75, 200, 2), 200)))}
    assert rows["topics"]["alarm"] and rows["topics"]["now"]-rows["topics"]["before"] == pytest.approx(-.45, abs=.12) and "topic 0" in rows["topics"]["unit"]


# --- the reference --------------------------------------------------------------------------------------------------

def test_bits_are_a_distribution_and_halves_do_not_meet():
    texts = [f"common word{k}" for k in range(40)]
    usual = fit_reference(texts)
    assert sum(2**-b for b in usual.bits.values())+2**-usual.unseen == pytest.approx(1)
    measured = usual.values["tokens"]
    assert len(measured) == 20 and len(usual.bits) == 21 and min(measured) == max(measured) == pytest.approx((usual.bits["common"]+usual.unseen)/2)  # no measured text has a word of its own that is known


def test_a_tokenizer_may_cut(usual):
    by_letter = fit_reference(sentences(KITCHEN, 40, 0), tokens=lambda t: list(t.encode()))
    assert drift_scores(by_letter, ["abc", ""])["length"].tolist() == [3, 0] and drift_scores(usual, ["stir soup", ""])["length"].tolist() == [2, 0]
    assert drift_scores(usual, [""])["tokens"].tolist() == [0] and all(len(v) == 0 for v in drift_scores(usual, []).values())


# --- the watch that begins anew --------------------------------------------------------------------------------------

def rounds(run_length, seed):
    rng, watch = np.random.default_rng(seed), SteadyWatch(run_length=run_length, seed=seed)
    while not watch.see(rng.standard_normal()): pass
    return watch.n


def test_run_length_is_kept_on_average():
    runs = np.array([rounds(25, seed) for seed in range(300)])
    assert runs.mean() - 1.96*runs.std()/math.sqrt(len(runs)) > 25
    assert runs.mean() < 120  # and it does ring


def test_it_begins_anew_after_an_alarm():
    watch, rng = SteadyWatch(run_length=10_000), np.random.default_rng(0)
    for level in (0, 8, 0):
        for v in rng.standard_normal(150)+level: watch.see(v)
    assert [150 < a <= 165 or 300 < a <= 330 for a in watch.alarms] == [True, True]


# --- oracles --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ties", [False, True])
def test_statistics_and_probabilities_agree_with_scipy(ties):
    from scipy.stats import chi2_contingency, ks_2samp, permutation_test
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 4, n).astype(float) if ties else rng.standard_normal(n) for n in (41, 30))
    assert ks_distance(a, b) == pytest.approx(ks_2samp(a, b).statistic) and ks_distance(b, a) == pytest.approx(ks_distance(a, b))
    theirs = permutation_test((a, b), ks_distance, n_resamples=999, alternative="greater", rng=np.random.default_rng(7)).pvalue if ties else ks_2samp(a, b, method="exact").pvalue
    assert shuffled_p(a, b, ks_distance) == pytest.approx(theirs, abs=.05)
    if ties:
        table = chi2_contingency([[np.sum(x == k) for k in range(4)] for x in (a, b)], correction=False)
        assert unevenness(a, b) == pytest.approx(table.statistic) and shuffled_p(a, b, unevenness) == pytest.approx(table.pvalue, abs=.05)


def test_the_index_by_hand_and_its_mean_on_paper():
    p, q = np.array([1.5, 3.5])/5, np.array([3.5, 1.5])/5  # half an observation more in each of two bins
    assert stability_index([0., 1., 1., 1.], [0., 0., 0., 1.], 2) == pytest.approx(float(((p-q)*np.log(p/q)).sum()))
    rng = np.random.default_rng(0)
    some = [stability_index(rng.standard_normal(300), rng.standard_normal(200)) for _ in range(300)]
    assert np.mean(some) == pytest.approx(9*(1/300+1/200), rel=.12)


# --- the report -----------------------------------------------------------------------------------------------------

def test_the_report_says_what_changed_and_since_when(usual):
    calm, wild = sentences(KITCHEN, 120, 11), sentences(COURT, 60, 12)
    down = [1]*120+[-1]*60
    said = asked([*calm, *wild], rating=down)
    rows = {r["name"]: r for r in drift_report(usual, random.Random(3).sample(said, len(said)))}  # any order: times count
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows and list(rows) == [*TEXT_SIGNS, *SERVED_SIGNS]
    assert rows["tokens"]["alarm"] and rows["rating"]["alarm"] and not rows["latency_s"]["alarm"]
    assert "1970-01-01 02:00" <= rows["tokens"]["since"] <= "1970-01-01 02:15" and rows["rating"]["before"] > rows["rating"]["now"]
    assert not any(r["alarm"] or r["since"] for r in drift_report(usual, said[:120]))


def test_other_signs_are_compared_with_their_past_or_with_themselves():
    rng = np.random.default_rng(0)
    usual = fit_reference(sentences(KITCHEN, 100, 0), values=dict(bits_per_byte=rng.normal(1, .1, 80), rating=rng.choice([-1, 1], 200, p=[.2, .8])))
    said = asked(sentences(KITCHEN, 100, 1), rating=rng.choice([-1, 1], 100).tolist())
    rows = {r["name"]: r for r in drift_report(usual, said, values=dict(bits_per_byte=[math.nan]*50+[1.3]*50, other=[float(i) for i in range(100)]))}
    assert {n for n, r in rows.items() if r["alarm"]} == {"bits_per_byte", "rating", "other"}
    assert (rows["bits_per_byte"]["n"], rows["bits_per_byte"]["n_before"], rows["other"]["n_before"], rows["rating"]["n_before"]) == (50, 80, 0, 200)


def test_what_has_a_date_rings(usual):
    "Thumbs only, 40 up and then more and more down: a date comes with the alarm, not before it."
    rows = [drift_report(usual, [Interaction(f"i{i}", 60.*i, "v1", "", "", rating=1 if i < 40 else -1) for i in range(40+k)])[-2] for k in range(1, 25)]
    assert [bool(r["since"]) for r in rows] == [r["alarm"] for r in rows] and {r["alarm"] for r in rows} == {True, False}


def test_nothing_to_report(usual):
    without = [Interaction("a", 1., "v1", "", "")]
    for some in ([], without): assert [(r["alarm"], r["p"], r["n"], r["now"]) for r in drift_report(usual, some) if r["name"] != "topics"] == [(False, 1., 0, None)]*4


def test_a_shuffled_p_is_exact_with_ties_and_a_report_corrects_for_its_rows(usual):
    rng = np.random.default_rng(0)
    low = sum(shuffled_p(rng.integers(0, 3, 20), rng.integers(0, 3, 15), ks_distance, repeats=99, seed=s) <= .1 for s in range(200))
    assert exact_interval(low, 200)[0] <= .1
    assert shuffled_p(range(20), range(90, 110), ks_distance, repeats=9) == .1  # never 0: what was seen is one of the shuffles
    rows = drift_report(usual, said := asked(sentences(KITCHEN, 60, 1)+sentences(COURT, 15, 2)))
    now = drift_scores(usual, [i.prompt for i in said])
    raw = [shuffled_p(usual.values[s], now[s], unevenness if s == "topics" else ks_distance) for s in TEXT_SIGNS]
    watch = DriftWatch(usual.values | dict.fromkeys(SERVED_SIGNS, ()))
    for i in said: watch.see({s: v[0] for s, v in drift_scores(usual, [i.prompt]).items()})
    assert [r["p"] for r in rows] == pytest.approx([min(1., 2*min(pair)) for pair in zip(holm([*raw, 1., 1.]), watch.p.values())])  # thumbs and latency: nothing is known
    assert all(r["alarm"] for r in rows if r["since"]) and any(r["since"] for r in rows)


# --- what a user can get wrong ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("wrong", "told"), [
    (lambda u: fit_reference(["a b"]*7), "7 texts are too few"), (lambda u: fit_reference(["a b"]*9, values=dict(tokens=[1.])), "'tokens' come from the texts"),
    (lambda u: DriftWatch(alpha=0), "alpha=0"), (lambda u: DriftWatch([1.]).see("text"), "without a reference"), (lambda u: DriftWatch(u).see(dict(rating=1)), "'rating' is not watched: the watch was made for tokens, topics, length"),
    (lambda u: DriftWatch([1.]).see(math.nan), "value=nan"), (lambda u: SteadyWatch(run_length=0), "run_length=0"), (lambda u: drift_report(u, [], values=dict(a=[1.])), "a has 1 values"),
    (lambda u: drift_report(u, [], values=dict(rating=[])), "'rating' come from the interactions")])
def test_errors_say_what_was_given(usual, wrong, told):
    with pytest.raises(UserError, match=told): wrong(usual)

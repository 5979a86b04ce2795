"Two models on the same items: flipped signs, resampled clusters, design effect, power, and ranks that are ranges."
import math
from functools import partial
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch.comparison import (_flips, answer_spread, cluster_sums, design_effect, examples_needed, leaderboard, leaderboard_text, paired_bootstrap, power_of,
                                    resamples, sign_flip)
from llm_scratch.core import UserError
from llm_scratch.evaluation import holm, mean_of, ratio_of

stats = pytest.importorskip("scipy.stats")
some = partial(settings, max_examples=40, deadline=None)
numbers = st.floats(-100, 100).map(lambda x: round(x, 3))


def pairs(least, most): return st.integers(least, most).flatmap(lambda n: st.tuples(*(st.lists(numbers, min_size=n, max_size=n) for _ in range(2))))


# --- sign flips -----------------------------------------------------------------------------------------------------

@some()
@given(pairs(2, 8))
def test_the_exact_test_lists_all_worlds(both):
    a, c = map(np.array, both)
    d = a-c
    sums = [abs(sum(s*x for s, x in zip(signs, d))) for signs in product((1, -1), repeat=len(d))]
    want = np.mean([s >= abs(d.sum())-1e-9*abs(d).sum() for s in sums])
    assert sign_flip(a, c) == pytest.approx(want) == sign_flip(c, a)
    assert sign_flip(a, c) >= 2/2**len(d) or not d.any()


def test_equal_to_scipys_permutations():
    rng = np.random.default_rng(1)
    for n in (3, 7, 11):
        a, c = rng.normal(.3, 1, n), rng.normal(size=n)
        want = stats.permutation_test((a, c), lambda x, y, axis: np.mean(x-y, axis=axis), permutation_type="samples", vectorized=True, n_resamples=2**n).pvalue
        assert sign_flip(a, c) == pytest.approx(float(want))


def test_many_items_are_sampled_and_the_seen_world_counts():
    d = np.ones(40)
    assert sign_flip(d, 0*d, repeats=999) == 1/1000  # no random world is as far, and p is still above 0
    assert sign_flip(0*d, 0*d, repeats=999) == 1
    x = np.random.default_rng(0).normal(.3, 1, 40)
    assert sign_flip(x, 0*x, seed=1) == sign_flip(x, 0*x, seed=1) != sign_flip(x, 0*x, seed=2)
    assert abs(sign_flip(x, 0*x)-stats.ttest_1samp(x, 0).pvalue) < .02
    right = np.array([[1]*9 + [0]*3 + [1]*30, [0]*9 + [1]*3 + [1]*30])
    assert abs(sign_flip(*right)-stats.binomtest(3, 12).pvalue) < .015  # McNemar


def test_rounding_does_not_break_ties():
    d = np.array([.1, .2, -.3, .7, .1, -.4])
    k = np.array([1, 2, -3, 7, 1, -4])
    assert sign_flip(d, 0*d) == sign_flip(k, 0*k) == sign_flip(d+1e3, 0*d+1e3)


def test_flips_are_all_ways_or_fair_coins_and_never_many_at_once():
    all_ways = np.concatenate(list(_flips(5, 32, 0)))
    assert sorted(map(tuple, all_ways)) == sorted(product((-1., 1.), repeat=5))
    assert len(np.concatenate(list(_flips(5, 31, 0)))) == 31
    chunks = list(_flips(3000, 3001, 0))
    assert len(chunks) > 1 and sum(map(len, chunks)) == 3001 and all(c.size <= 2**22 for c in chunks)
    assert set(np.unique(chunks[0])) == {-1., 1.} and abs(np.mean(chunks[0])) < .003


# --- clusters -------------------------------------------------------------------------------------------------------

def test_clusters_are_summed_in_the_order_in_which_they_appear():
    assert cluster_sums([1, 2, 4, 8], ["b", "a", "b", ("c", 1)]).tolist() == [5, 2, 8]
    assert cluster_sums([1, 2]).tolist() == [1, 2]
    with pytest.raises(ValueError, match="1 clusters for 2 items"): cluster_sums([1, 2], ["a"])


@some()
@given(pairs(2, 9), st.integers(2, 4))
def test_copies_within_clusters_change_nothing(both, k):
    a, c = map(np.array, both)
    owner = list(range(len(a)))*k
    aa, cc = np.tile(a, k), np.tile(c, k)
    assert sign_flip(aa, cc, clusters=owner) == pytest.approx(sign_flip(a, c))
    assert paired_bootstrap(aa, cc, clusters=owner, repeats=50)[:3] == pytest.approx(paired_bootstrap(a, c, repeats=50)[:3], abs=1e-9)


def test_design_effect_is_kishs():
    rng = np.random.default_rng(0)
    for m, rho in ((5, .3), (20, 0.), (3, 1.)):
        x = (rho**.5*rng.normal(size=(1500, 1)) + (1-rho)**.5*rng.normal(size=(1500, m))).ravel()
        assert design_effect(x, np.repeat(np.arange(1500), m)) == pytest.approx(1+(m-1)*rho, rel=.12)
    x = rng.normal(size=50)
    assert design_effect(x, range(50)) == pytest.approx(1)


# --- bootstrap ------------------------------------------------------------------------------------------------------

def test_equal_to_scipys_bootstrap_on_the_same_draws():
    rng = np.random.default_rng(3)
    a, c, size = rng.gamma(2, size=30), rng.gamma(2, size=30), rng.integers(1, 50, 30)
    for level in (.95, .8):
        want = stats.bootstrap((a-c, size), lambda x, y, axis: x.sum(axis)/y.sum(axis), paired=True, vectorized=True, n_resamples=300, method="percentile", confidence_level=level, rng=np.random.default_rng(7)).confidence_interval
        got = paired_bootstrap(a, c, level, per=size, repeats=300, seed=7)
        assert (got.low, got.high) == pytest.approx((float(want.low), float(want.high)))
        assert got.mean == pytest.approx((a-c).sum()/size.sum())
    other = paired_bootstrap(c, a, per=size, repeats=300, seed=7)
    assert (other.mean, other.low, other.high) == pytest.approx((-got.mean, *(-x for x in paired_bootstrap(a, c, per=size, repeats=300, seed=7)[2:0:-1])))


def test_draws_in_pieces_are_the_draws_in_one():
    n = 40_000
    whole = np.random.default_rng(5).integers(n, size=(250, n))
    pieces = list(resamples(n, 250, 5))
    assert len(pieces) > 2 and max(p.size for p in pieces) <= 2**22
    assert (np.concatenate(pieces) == whole).all()


def test_p_and_interval_do_not_contradict_each_other():
    rng = np.random.default_rng(2)
    for shift in np.linspace(-1, 1, 30):
        d = rng.normal(shift, 1, 25)
        e = paired_bootstrap(d, 0*d, repeats=400)
        assert 0 < e.p <= 1
        if abs(e.p-.05) > .01: assert (e.p < .05) == (e.low > 0 or e.high < 0)
    assert paired_bootstrap([1.]*9, [1.]*9, repeats=50).p == 1
    assert paired_bootstrap([2.]*9, [1.]*9, repeats=99).p == 2/100


def test_what_a_comparison_refuses():
    with pytest.raises(ValueError, match="3 scores against 2"): paired_bootstrap([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="4 items in 1 clusters"): paired_bootstrap([1, 2, 3, 4], [0]*4, clusters="aaaa")
    with pytest.raises(ValueError, match="1 items in 1 clusters"): sign_flip([1], [2])
    with pytest.raises(ValueError, match="2 numbers for 3 items"): paired_bootstrap([1, 2, 3], [0]*3, per=[1, 1])


# --- power ----------------------------------------------------------------------------------------------------------

@some()
@given(st.floats(.05, 1.5), st.floats(.3, .95), st.sampled_from([.01, .05, .1]))
def test_power_is_the_inverse_of_the_number_needed(effect, power, alpha):
    n = examples_needed(effect, 1., power, alpha)
    assert power_of(n, effect, 1., alpha) >= power-1e-9
    z = [stats.norm.ppf(q) for q in (1-alpha/2, power)]
    assert n-1 < (sum(z)/effect)**2 + z[0]**2/2 <= n
    assert examples_needed(-3*effect, 3., power, alpha) == n


def test_power_agrees_with_the_noncentral_t():
    for d, n in ((.3, 60), (.8, 15), (-.2, 120), (0, 40)):
        t = stats.t.ppf(.975, n-1)
        exact = stats.nct.sf(t, n-1, d*n**.5) + stats.nct.cdf(-t, n-1, d*n**.5)
        assert power_of(n, d, 1.) == pytest.approx(exact, abs=.012)
    assert power_of(1, 3., 1.) == pytest.approx(.05)  # fewer than the bar costs
    for wrong in ((0, 1.), (1., 0.), (1., -1.), (1., 1., .04), (1., 1., 1.), (1., 1., .8, 0.)):
        with pytest.raises(UserError, match="never found"): examples_needed(*wrong)


def test_spread_of_right_and_wrong():
    d = np.array([1]*30 + [-1]*10 + [0]*60)
    assert answer_spread(.4, .2) == pytest.approx(d.std()) == pytest.approx(answer_spread(.4, -.2))
    assert answer_spread(.2, .2) == pytest.approx(.4)
    for wrong in ((.1, .2), (.1, -.2), (1.1, 0)):
        with pytest.raises(UserError, match="can't differ"): answer_spread(*wrong)


# --- leaderboard ----------------------------------------------------------------------------------------------------

def test_ranks_are_what_the_pairs_prove():
    "Against the plain formula: each pair by `sign_flip`, all corrected by `holm`."
    rng = np.random.default_rng(4)
    scores = {name: rng.normal(s, 1, 12) for name, s in dict(a=0, b=3, c=.1, d=-2.5).items()}
    ps = {pair: sign_flip(scores[pair[0]], scores[pair[1]], repeats=2**12) for pair in combinations(scores, 2)}
    sure = {pair for pair, p in zip(ps, holm(list(ps.values()))) if p < .05}
    assert 0 < len(sure) < len(ps)
    for top, sign in ((max, 1), (min, -1)):
        board = leaderboard(scores, top)
        assert [s.name for s in board] == sorted(scores, key=lambda n: -sign*scores[n].mean())
        for s in board:
            rivals = [next(iter(set(pair)-{s.name})) for pair in sure if s.name in pair]
            assert s.best == 1 + sum(sign*scores[r].mean() > sign*scores[s.name].mean() for r in rivals)
            assert s.worst == 4 - sum(sign*scores[r].mean() < sign*scores[s.name].mean() for r in rivals)
            want = mean_of(scores[s.name])
            assert (s.score.mean, s.score.stderr, s.score.n) == pytest.approx((want.mean, want.stderr, 12))


def test_clusters_and_denominators_reach_the_board():
    rng = np.random.default_rng(0)
    size, base = rng.integers(50, 900, 12), rng.gamma(9, size=12)
    scores = dict(x=base, y=base+rng.normal(.5, .2, 12), z=base+5)
    board = leaderboard(scores, min, per=size)
    assert [(s.best, s.worst) for s in board] == [(1, 1), (2, 2), (3, 3)]
    want = [ratio_of(v, size) for v in scores.values()]
    for what in ("mean", "stderr"): assert [getattr(s.score, what) for s in board] == pytest.approx([getattr(r, what) for r in want])
    three = {name: np.repeat(v[:3], 40) for name, v in scores.items()}
    copies = leaderboard(three, min, clusters=np.repeat(range(3), 40).tolist())
    assert {(s.best, s.worst, s.score.n) for s in copies} == {(1, 3, 3)}  # three clusters prove nothing
    assert [(s.best, s.worst) for s in leaderboard(three, min)] == [(1, 1), (2, 2), (3, 3)]  # strangers would


def test_alpha_and_many_models():
    rng = np.random.default_rng(8)
    many = {str(i): rng.normal(i, .1, 40) for i in range(25)}  # 300 pairs: p below .05/300 needs many flips
    assert all(s.best == s.worst for s in leaderboard(many))
    six = dict(a=[1]*6, b=[0]*6)  # p = 2/64, enough for one pair and not for three
    assert [(s.best, s.worst) for s in leaderboard(six)] == [(1, 1), (2, 2)]
    assert {(s.best, s.worst) for s in leaderboard(six | dict(c=[1]*6))} == {(1, 3)}
    close = dict(a=[1]*7 + [0], b=[0]*7 + [1])  # p = 18/256
    assert [(s.best, s.worst) for s in leaderboard(close)] == [(1, 2)]*2
    assert [(s.best, s.worst) for s in leaderboard(close, alpha=.1)] == [(1, 1), (2, 2)]


def test_the_board_as_text_and_what_it_refuses():
    text = leaderboard_text(leaderboard(dict(a=[3.]*9, b=[2, 1.]*4 + [3], c=[1., 2]*4 + [3])))
    assert text.splitlines()[2].startswith("| 1 | a | 3.000 ± 0.000 (n=9) |") and text.count("| 2–3 |") == 2
    for wrong, said in ((dict(a=[1, 2], b=[1]), "b has 1 scores, and a has 2"), (dict(a=[1, 2]), "1 models"), ({}, "0 models"), (dict(a=[1], b=[2]), "1 items")):
        with pytest.raises(UserError, match=said): leaderboard(wrong)


def test_nobody_is_ranked_by_noise():
    alarms = 0
    for seed in range(40):
        x = np.random.default_rng(seed).random((5, 30))
        alarms += any((s.best, s.worst) != (1, 5) for s in leaderboard({str(i): v for i, v in enumerate(x)}))
    assert alarms <= 5  # 2 are expected at most; 6 or more has a chance of 1.4 %, and the seeds are fixed
    assert math.isclose(1-sum(math.comb(40, k)*.05**k*.95**(40-k) for k in range(6)), .0139, abs_tol=1e-3)

"The gate: rules that say something, pairs by name, chances that are what they say over all worlds at the bar, corrections where they belong, evidence of other chapters, and decisions that are right about candidates whose truth is known."
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch.audit import Change
from llm_scratch.comparison import sign_flip
from llm_scratch.core import UserError
from llm_scratch.evaluation import Difference, Result, share_of
from llm_scratch.promotion import (PROMOTION_HEAD, GateRow, GateRule, Measured, breaks_of, check_changes, decide, exact_chance, figures_of, promotion_figure, promotion_table, skewed_chance, tango, tango_interval,
                                   times_of)
from llm_scratch.report import item_rows

some = settings(max_examples=40, deadline=None, database=None)
SAFE,GAIN = GateRule("right", margin=.05),GateRule("right", "better")


def right(marks, **more): return Measured("right", marks, **more)

def against(gains, rules, **more):
    "A decision about a candidate with these gains."
    return decide([right(np.zeros(len(gains)))], [right(np.asarray(gains, dtype=float))], rules, **more)

def world(n, won, lost, seed=0):
    out = np.r_[np.ones(won), -np.ones(lost), np.zeros(n-won-lost)]
    return np.random.default_rng(seed).permutation(out)


# --- figures and rules --------------------------------------------------------------------------------------------------

def test_models_are_paired_by_the_names_of_items():
    now,new = right([1., 0., 1., 1.]*10, ids=[f"q{i}" for i in range(40)]),right(([1., 0., 1., 1.]*10)[::-1], ids=[f"q{i}" for i in range(40)][::-1])
    row, = decide([now], [new], [GateRule("right", "never worse")]).rows
    assert row.holds # item by item they are the same
    with pytest.raises(UserError, match="40 items and the candidate 40, 39 of them the same"): decide([now], [right(now.values, ids=[*now.ids[:-1], "other"])], [SAFE])
    with pytest.raises(UserError, match="better is up for the current model and down"): decide([now], [replace(now, better="down")], [SAFE])
    with pytest.raises(UserError, match="at least 2"): decide([right([1])], [right([1])], [SAFE])
    with pytest.raises(UserError, match="current model has values that are no numbers"): decide([right([1, math.nan])], [right([1, 1])], [SAFE])


@pytest.mark.parametrize("how, says", [(dict(margin=0), "say what loss"), (dict(margin=-1), "give 0 or more"), (dict(margin=math.inf), "give 0 or more"), (dict(must="best"), "none of not worse"), (dict(margin=.1, alpha=.5), "between 0 and one half")])
def test_rules_that_say_nothing_are_refused(how, says):
    with pytest.raises(UserError, match=says): GateRule("x", **how)


def test_down_per_and_relative():
    rng = np.random.default_rng(0)
    n_bytes,base = rng.integers(100, 900, 80),rng.normal(1.5, .2, 80)
    bits = lambda x: Measured("bits per byte", x*n_bytes, unit="bits per byte", better="down", per=n_bytes)
    better,worse = base-.05+.01*rng.normal(size=80),base+.05+.01*rng.normal(size=80)
    rules = [GateRule("bits per byte", margin=.02), GateRule("bits per byte", "better")]
    assert decide([bits(base)], [bits(better)], rules).promote and not decide([bits(base)], [bits(worse)], rules).promote
    row = decide([bits(base)], [bits(worse)], rules).rows[0]
    assert row.gain.mean == pytest.approx(-((worse-base)*n_bytes).sum()/n_bytes.sum()) and row.candidate.mean > row.current.mean
    for share,holds in ((.1, True), (.03, False)): # worse by .05 of 1.5, a thirtieth
        assert decide([bits(base)], [bits(worse)], [GateRule("bits per byte", margin=share, relative=True)]).promote == holds


def test_copies_of_items_prove_nothing_more():
    rng = np.random.default_rng(2)
    gains = rng.lognormal(0, 1, 12)-.8 # the good side is long, so it is the flips that decide
    few = against(gains, [GAIN]).rows[0]
    copied = decide([right(np.zeros(120), clusters=[str(i//10) for i in range(120)])], [right(np.repeat(gains, 10))], [GAIN]).rows[0]
    assert copied.gain.p == pytest.approx(few.gain.p, abs=1e-9) and against(np.repeat(gains, 10), [GAIN]).rows[0].gain.p < few.gain.p


# --- chances ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, bar", [(20, -.05), (30, 0.), (60, -.1), (60, .05)])
def test_at_the_bar_at_most_alpha_pass_in_every_world(n, bar):
    outcomes = [(w, l) for w in range(n+1) for l in range(n+1-w)]
    passes = np.array([exact_chance(w, l, n, bar) <= .05 for w,l in outcomes])
    w,l = np.array(outcomes).T
    facts = np.cumsum(np.log(np.maximum(np.arange(n+1), 1)))
    ways = facts[n]-facts[w]-facts[l]-facts[n-w-l]
    lost = np.linspace(max(0, -bar), (1-bar)/2, 400)[1:-1] # 398 worlds, not those of the module
    sizes = [np.exp(ways+w*math.log(q+bar)+l*math.log(q)+(n-w-l)*math.log(1-2*q-bar))[passes].sum() for q in lost]
    assert .02 < max(sizes) < .0506
    assert passes[np.argmax(w-l)] and not passes[np.argmin(w-l)]


def test_none_lost_is_the_rule_of_three():
    for n,margin in ((30, .05), (59, .05), (58, .05)): assert exact_chance(0, 0, n, -margin) == pytest.approx((1-margin)**n)
    assert against(np.zeros(59), [SAFE]).promote and not against(np.zeros(58), [SAFE]).promote
    assert exact_chance(10, 10, 1000, -.05) < 1e-6 # beyond 400 by the normal curve


@some
@given(st.integers(5, 60), st.data())
def test_better_outcomes_are_never_less_likely_to_pass(n, data):
    won = data.draw(st.integers(0, n-1))
    lost = data.draw(st.integers(0, n-1-won))
    assert exact_chance(won+1, lost, n, -.05) <= exact_chance(won, lost, n, -.05)+1e-9
    low,high = tango_interval(won, lost, n)
    assert low-1e-6 <= (won-lost)/n <= high+1e-6 and -1 <= low < high <= 1
    for end,z in ((low, 1.6449), (high, -1.6449)):
        if abs(end) < .999: assert float(tango(won, lost, n, end)) == pytest.approx(z, abs=1e-3)


def test_skewness():
    from scipy import stats
    x = np.random.default_rng(0).normal(.1, 1, 400)
    assert skewed_chance(x) == pytest.approx(stats.ttest_1samp(x, 0, alternative="greater").pvalue, abs=.003)
    assert skewed_chance([1., 1., 1.]) == 1/8 and skewed_chance([0., 0.]) == 1 and skewed_chance([-1., -1.]) == 1
    tail = math.exp(.5)+.1-np.random.default_rng(3).lognormal(0, 1, 40) # the bad side is long
    flipped = sign_flip(tail, 0*tail)/2
    row = against(tail-.02, [GateRule("right", margin=.02)]).rows[0]
    assert row.gain.p == skewed_chance(tail) > flipped > 0 # the more careful of the two
    assert against(-tail, [GAIN]).rows[0].gain.p > .05


# --- decisions ----------------------------------------------------------------------------------------------------------

def test_a_bad_one_is_refused_a_good_one_promoted_and_luck_is_called_by_its_name():
    bad,good,same = world(300, 5, 40),world(300, 40, 5),world(300, 15, 15)
    assert [against(x, [SAFE, GAIN]).promote for x in (bad, good, same)] == [False, True, False]
    assert "is worse" in against(bad, [SAFE]).reasons[0] and "is not shown to be better" in against(same, [SAFE, GAIN]).reasons[0]
    assert against(same, [SAFE]).promote # who asks for no gain gets none


@pytest.mark.parametrize("gain, rules, most", [(-.05, [SAFE], .05), (0., [SAFE, GAIN], .05), (0., [GAIN], .05)])
def test_error_rates(gain, rules, most):
    def draw(i): return np.random.default_rng(i).choice([1., 0., -1.], p=[(.15+gain)/2, .85, (.15-gain)/2], size=150)
    found = share_of(sum(against(draw(i), rules).promote for i in range(200)), 200)
    assert found.mean-1.96*found.stderr <= most


def test_several_chances_to_be_better_are_corrected_and_several_to_do_harm_are_not():
    marks = world(200, 11, 4)
    pair = lambda x: [Measured(name, x) for name in "ab"]
    one = decide(pair(np.zeros(200))[:1], pair(marks)[:1], [GateRule("a", "better")]).rows[0].gain.p
    assert .025 < one <= .05
    two = decide(pair(np.zeros(200)), pair(marks), [GateRule("a", "better"), GateRule("b", "better")])
    assert [r.gain.p for r in two.rows] == pytest.approx([2*one]*2) and not two.promote
    safe = decide(pair(np.zeros(200)), pair(marks), [GateRule("a", margin=.02), GateRule("b", margin=.02)])
    assert safe.rows[0].gain.p == decide(pair(np.zeros(200)), pair(marks), [GateRule("a", margin=.02)]).rows[0].gain.p
    half = decide(pair(np.zeros(200)), [Measured("a", world(200, 30, 2)), Measured("b", np.zeros(200))], [GateRule("a", "better"), GateRule("b", "better")])
    assert half.promote # one of them is enough


def test_what_was_not_measured_was_not_shown():
    p = decide([right(np.zeros(300))], [], [SAFE])
    assert not p.promote and p.reasons == ["right: was not measured of the candidate"]
    p = decide([], [right(np.zeros(300))], [SAFE])
    assert not p.promote and "of the current model" in p.reasons[0]
    x = np.zeros(300); x[7] = math.nan
    p = against(x, [SAFE, GAIN, GateRule("right", "never worse")])
    assert not p.promote and all("1 of 300 values" in r for r in p.reasons) and not any(r.holds for r in p.rows)
    with pytest.raises(UserError, match="lets everybody in"): decide([], [], [])


def test_never_worse_means_never():
    marks = world(300, 100, 1)
    p = against(marks, [GateRule("right", "never worse"), SAFE, GAIN])
    assert not p.promote and p.reasons == [f"right: 1 of 300 items became worse, such as {int(np.argmin(marks))}"]


def test_it_says_what_it_could_not_have_seen():
    p = against(world(50, 3, 3), [SAFE])
    assert not p.promote and "even an equal candidate passes in" in p.reasons[0] and "would do for 80%" in p.reasons[0]
    few,many = (against(world(n, n//20, n//20), [SAFE]).rows[0] for n in (100, 1600))
    assert many.needs < few.needs and many.needs < 0 < few.needs and few.equal_passes < .5 < many.equal_passes


@some
@given(st.lists(st.sampled_from([-1., 0., 1.]), min_size=20, max_size=80), st.floats(0, .5))
def test_a_candidate_that_is_better_everywhere_is_never_refused_instead(gains, more):
    gains = np.array(gains)
    rules = [GateRule("right", margin=.1)]
    if against(gains, rules, repeats=300).promote: assert against(np.maximum(gains, 0), rules, repeats=300).promote


def test_a_decision_is_json_a_table_and_a_picture():
    p = against(world(200, 30, 3), [SAFE, GAIN, GateRule("other", margin=1)])
    kept = json.loads(json.dumps(p.as_dict(), allow_nan=False))
    assert kept["promote"] is False and kept["rows"][0]["holds"] is True and kept["reasons"] == ["other: was not measured of the current model"]
    rows = promotion_table(p)
    assert {len(r) for r in rows} == {len(PROMOTION_HEAD)} and [r[-1] for r in rows] == ["yes", "yes", "no"]
    assert len(promotion_figure(p).axes[0].get_yticklabels()) == 2


# --- evidence -----------------------------------------------------------------------------------------------------------

def test_figures_of_chapter_7():
    bits,marks = figures_of(item_rows({"bits per byte, recipes":[(10., 5.), (30., 15.)], "right, sums":[(1., 1.), (0., 1.)]}), units={"right, sums":"of questions"})
    assert (bits.better, marks.better, bits.result.mean, marks.unit, bits.ids) == ("down", "up", 2., "of questions", ("0", "1"))


def test_breaks_of_chapter_9():
    row = lambda id, now: dict(id=id, attack="base64", category="c", subject="s", seed=0, now=now)
    old,new = breaks_of([row("a", "fixed"), row("b", "still broken"), row("c", "gone")]),breaks_of([row("a", "still broken"), row("b", "fixed"), row("c", "gone")])
    p = decide([old], [new], [GateRule(old.name, "never worse")])
    assert not p.promote and "1 of 2 items became worse, such as base64 a" in p.reasons[0]


def test_two_audits():
    change = lambda name, low, mean, high: Change("part", name, Result(.5, .01, 100), Result(.5+mean, .01, 100), Difference(mean, low, high, .5), True)
    changes = [change("can answer", -.02, 0., .02), change("attacks that succeed", -.01, .03, .07)]
    ok,harm,none = check_changes(changes, {"can answer":.05, "attacks that succeed":.05, "other":.1}, down=["attacks that succeed"])
    assert (ok.holds, harm.holds, none.holds) == (True, False, False) and harm.gain[:3] == (-.03, -.07, .01)
    assert not decide([], [], [], more=[ok, harm]).promote and decide([], [], [], more=[ok]).promote
    assert check_changes(changes, {"attacks that succeed":.05})[0].holds # more is better, if nobody says otherwise
    with pytest.raises(UserError, match="above 0"): check_changes(changes, {"can answer":0})


def test_times_are_taken_in_turns():
    now,order = [0.],[]
    def work(name, factor):
        def answer(q):
            order.append((name, q))
            now[0] += factor*q
        return answer
    a,b = times_of(work("a", 1.), work("b", 1.2), range(2, 12), rounds=3, wall=lambda: now[0])
    assert np.allclose(b.values/a.values, 1.2) and a.name == b.name == "seconds, wall"
    firsts = [order[i][0] for i in range(0, 20, 2)]
    assert 3 < firsts.count("a") < 7 # nobody is always the first at a question
    for margin,holds in ((.25, True), (.15, False)): assert decide([a], [b], [GateRule(a.name, margin=margin, relative=True)]).promote == holds


def test_rows_from_elsewhere_count():
    row = GateRow("legal", "not worse", False, "legal: not looked at")
    assert against(world(300, 40, 3), [SAFE, GAIN], more=[row]).reasons == ["legal: not looked at"]

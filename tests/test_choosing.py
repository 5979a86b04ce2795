"The choice: break-even points at which costs really are equal, needs that come before prices, words made of the data, and flips that flip."
import math
from dataclasses import fields, replace

import pytest
from hypothesis import assume, example, given, settings, strategies as st

from llm_scratch.choosing import (OPTIONS, PEAK, RIGHTS, Flip, Option, Situation, even_months, even_requests, expected_quality, explain, flips, judge, machines_busy, price_flips, recommend, running_cost, situation_of, swings, total_cost)
from llm_scratch.core import UserError
from llm_scratch.objectives import LEGAL_BRIEF, RECIPES_BRIEF

options = st.sampled_from(list(OPTIONS.values()))
anything = st.builds(lambda r, i, o, m, d, q, e, t, p, f, private, rights: Situation(r, i, o, m, d, q, e, t, p, f, private=private, rights=rights), st.floats(1, 1e6), st.floats(1, 1e4), st.floats(1, 1e4), st.floats(1, 60),
                     st.floats(0, 1), st.floats(.4, .95), st.floats(0, 1e5), st.floats(1e5, 1e11), st.floats(.1, 10), st.floats(.1, 3), st.booleans(), st.sampled_from(RIGHTS))
LAW = situation_of(LEGAL_BRIEF, examples=2455, own_tokens=3e6, people=1.5)
KITCHEN = situation_of(RECIPES_BRIEF)
quick = settings(max_examples=60, deadline=None)


# --- costs ---------------------------------------------------------------------------------------------------------

def test_an_api_by_hand():
    s = Situation(1000, tokens_in=500, tokens_out=100, months=12)
    month = 1000*365/12*(500*2.5 + 100*10)/1e6
    assert running_cost(OPTIONS["API"], s) == pytest.approx(month) and total_cost(OPTIONS["API"], s) == pytest.approx(5000 + 12*(500 + month))
    assert total_cost(OPTIONS["API"], s, 0) == 5000 and total_cost(OPTIONS["API"], s, 3) == pytest.approx(5000 + 3*(500 + month))


def test_a_machine_by_hand():
    option = replace(OPTIONS["fine-tuned"], speed=100., machine=300)
    s = Situation(86_400, tokens_in=100, tokens_out=40) # one request a second, 50 tokens' worth of writing
    assert machines_busy(option, s) == pytest.approx(PEAK*50/100) and running_cost(option, s) == pytest.approx(300*PEAK/2)
    assert running_cost(option, replace(s, requests_per_day=10)) == 300 # a whole machine waits
    assert machines_busy(OPTIONS["API"], s) == 0


@given(options, anything, st.floats(1.01, 10))
def test_costs_never_fall_when_more_is_asked(option, s, more):
    for name in ("requests_per_day", "tokens_in", "tokens_out", "months"): assert total_cost(option, replace(s, **{name: getattr(s, name)*more})) >= total_cost(option, s)
    assert total_cost(option, s) > option.setup


@given(options, options, anything)
def test_months_at_which_two_are_even(a, b, s):
    m = even_months(a, b, s)
    assert m > 0 and even_months(b, a, s) == m
    if math.isfinite(m):
        assert total_cost(a, s, m) == pytest.approx(total_cost(b, s, m), rel=1e-9)
        assert (total_cost(a, s, m/2) - total_cost(b, s, m/2))*(total_cost(a, s, 2*m) - total_cost(b, s, 2*m)) <= 0
    else: assert a == b or (a.setup - b.setup)*((a.care + running_cost(a, s)) - (b.care + running_cost(b, s))) >= 0 # dearer from the start, and for ever


@given(options, options, anything)
def test_requests_at_which_two_are_even_are_all_found(a, b, s):
    assume(a != b)
    gap = lambda r: total_cost(a, at := replace(s, requests_per_day=r)) - total_cost(b, at)
    roots = even_requests(a, b, s)
    assert roots == sorted(roots) and all(r > 0 for r in roots)
    for r in roots: assert abs(gap(r)) <= 1e-9*total_cost(a, replace(s, requests_per_day=r))
    assert even_requests(b, a, s) == pytest.approx(roots)
    cuts = [0, *roots, max(roots, default=1e6)*4]
    for low, high in zip(cuts, cuts[1:]): # one sign between two roots
        signs = {gap(low + (high-low)*x) > 0 for x in (.02, .2, .4, .6, .8, .98)}
        assert len(signs) == 1, (low, high)


def test_an_option_that_is_dearer_for_ever_has_no_even_point():
    dear = replace(OPTIONS["API"], name="dear", setup=9_000, per_million_in=5., per_million_out=20.)
    assert even_requests(OPTIONS["API"], dear, KITCHEN) == [] and even_months(OPTIONS["API"], dear, KITCHEN) == math.inf


# --- needs ---------------------------------------------------------------------------------------------------------

def test_quality_is_a_line():
    option = OPTIONS["fine-tuned"]
    assert [expected_quality(option, replace(KITCHEN, distance=d)) for d in (0, .5, 1)] == pytest.approx([option.near, (option.near+option.far)/2, option.far])


@pytest.mark.parametrize("name, change, said", [
    ("API", dict(private=True), "texts would leave the house"), ("API", dict(needed=.9), "quality 0.85 expected, 0.90 needed"), ("API", dict(people=.1), "people: 0.25 wanted, 0.1 there"),
    ("fine-tuned", dict(examples=499), "examples: 500 wanted, 499 there"), ("from scratch", dict(own_tokens=1e9), "tokens of the field: 1e+10 wanted, 1e+09 there"), ("API", dict(first_word=.7), "first word after 0.8 s, 0.7 allowed"),
    ("open model", dict(dollars_per_month=2000), "2,190 dollars a month to run, 2,000 allowed"), ("API", dict(rights="change"), "you may use the weights, and need: change"), ("fine-tuned", dict(rights="all"), "you may change the weights, and need: all")])
def test_each_need_objects_by_name(name, change, said):
    free = replace(KITCHEN, needed=.5, people=9, examples=1e6, own_tokens=1e12)
    assert judge(OPTIONS[name], free).objections == ()
    assert judge(OPTIONS[name], replace(free, **change)).objections == (said,)


def test_a_limit_that_is_just_met_is_kept():
    o = OPTIONS["fine-tuned"]
    s = Situation(10, distance=0, needed=o.near, examples=o.examples, own_tokens=o.own_tokens, people=o.people, first_word=o.first_word, dollars_per_month=o.machine, private=True, rights="change")
    assert judge(o, s).objections == () and recommend(s).name == "fine-tuned"


@given(anything)
def test_the_advice_is_the_cheapest_that_nothing_stands_against(s):
    advice = recommend(s)
    free = [o for o in OPTIONS.values() if not judge(o, s).objections]
    assert [j.dollars for j in advice.judgements] == sorted(j.dollars for j in advice.judgements) and len(advice.judgements) == len(OPTIONS)
    if free: assert advice.best.dollars == min(total_cost(o, s) for o in free) and advice.best.option in free
    else: assert advice.best is None and advice.name == "none"
    assert not (s.private and advice.name == "API")


@given(anything)
def test_the_words_say_what_the_numbers_do(s):
    advice = recommend(s)
    words = explain(advice)
    if advice.best:
        assert words.startswith(f"**{advice.name}**") and f"{advice.best.dollars:,.0f}" in words
        for j in advice.judgements:
            if j is not advice.best: assert f"Not *{j.option.name}*" in words and all(o in words for o in j.objections)
    else:
        assert words.startswith("**Nothing fits.**")
        named = next(j for j in advice.judgements if f"*{j.option.name}*" in words)
        assert len(named.objections) == min(len(j.objections) for j in advice.judgements) and all(o in words for o in named.objections)


def test_the_briefs_of_the_book():
    assert (recommend(KITCHEN).name, recommend(LAW).name) == ("API", "fine-tuned")
    assert "nothing against it but 106,796 dollars more" in explain(recommend(KITCHEN))
    assert (LAW.private, LAW.distance, LAW.dollars_per_month, LAW.first_word, LAW.requests_per_day) == (True, .5, 500, 2, 2000) and KITCHEN.dollars_per_month == math.inf and KITCHEN.distance == .2
    assert situation_of(RECIPES_BRIEF, distance=.9).distance == .9 and situation_of(replace(RECIPES_BRIEF, privacy="internal")).private


@pytest.mark.parametrize("wrong, said", [(dict(distance=1.1), "distance=1.1 is not a share"), (dict(needed=-.1), "needed=-0.1"), (dict(rights="own"), "give one of use, change, all"), (dict(months=-1), "months=-1 is not a number from 0 on"),
                                         (dict(people=math.nan), "people=nan")])
def test_what_makes_no_sense_is_said(wrong, said):
    with pytest.raises(UserError) as e: Situation(100, **wrong)
    assert said in str(e.value)


# --- flips ---------------------------------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None)
@example(Situation(1., 1., 1., 1., distance=0., needed=.5, examples=500., own_tokens=1e5, people=1., first_word=.25))
@given(anything)
def test_a_flip_flips_and_just_before_it_does_not(s):
    name, found = recommend(s).name, flips(s)
    assert [f.factor for f in found] == sorted(f.factor for f in found) and len({f.field for f in found}) == len(found)
    for f in found:
        assert f.before == name != f.after == recommend(replace(s, **{f.field: f.then})).name and f.now == getattr(s, f.field)
        if not isinstance(f.now, (bool, str)):
            near = f.then + (f.now - f.then)*1e-6
            assert near == f.then or recommend(replace(s, **{f.field: near})).name == name  # who stands on the very edge flips with the next number there is


@settings(max_examples=15, deadline=None)
@given(anything)
def test_no_nearer_flip_was_overlooked(s):
    "Whatever is not listed does not flip by a factor of two; whatever is listed does not flip before."
    name, found = recommend(s).name, {f.field: f for f in flips(s)}
    for f in fields(s):
        now = getattr(s, f.name)
        if isinstance(now, (bool, str)) or not math.isfinite(now) or f.name in ("distance", "needed"): continue
        limit = found[f.name].factor if f.name in found else 100
        for x in (1.2, 2, 10, 90):
            if x < limit*.97: assert recommend(replace(s, **{f.name: now*x})).name == recommend(replace(s, **{f.name: now/x})).name == name, (f.name, x)


def test_flips_of_the_legal_brief():
    found = {f.field: f for f in flips(LAW)}
    assert found["needed"].then == pytest.approx(.84, abs=1e-6) and found["people"].then == pytest.approx(1, abs=1e-6) and found["examples"].then == pytest.approx(500, abs=1e-3)
    assert found["dollars_per_month"].then == pytest.approx(290, abs=1e-3) and found["rights"].after == "none" and "private" not in found
    assert flips(LAW)[0].field == "needed"


def test_of_two_directions_the_nearer_is_told():
    "Where the open model's machine still has room and the small one is full: fewer requests and more flip it."
    s = Situation(90_000, distance=.1, needed=.75, examples=20_000, own_tokens=3e10, people=6, private=True, months=36)
    at = lambda x: recommend(replace(s, requests_per_day=x)).name
    assert (at(60_000), at(90_000), at(150_000)) == ("fine-tuned", "open model", "fine-tuned")
    nearest = next(k for k in (1 + i/1000 for i in range(1, 1000)) if at(90_000*k) != "open model" or at(90_000/k) != "open model")
    assert at(90_000*nearest) == "open model" or at(90_000/nearest) == "open model" # one of the two is farther
    flip = next(f for f in flips(s) if f.field == "requests_per_day")
    assert flip.factor == pytest.approx(nearest, rel=2e-3)
    care = next(f for f in price_flips(s) if f.field == "open model: care")
    assert care.then > care.now and care.after == "fine-tuned"


def test_factors_of_flips():
    assert Flip("people", 2., 1., "a", "b").factor == Flip("people", 1., 2., "a", "b").factor == 2
    assert Flip("needed", .8, .84, "a", "b", share=True).factor == pytest.approx(1.04) and Flip("private", True, False, "a", "b").factor == Flip("rights", "use", "all", "a", "b").factor == math.inf


@settings(max_examples=8, deadline=None)
@given(anything)
def test_prices_that_flip(s):
    name, found = recommend(s).name, price_flips(s)
    assert [f.factor for f in found] == sorted(f.factor for f in found) and len({f.field for f in found}) == len(found)
    for f in found:
        option, field = f.field.split(": ")
        at = lambda value: recommend(s, [replace(o, **{field: value}) if o.name == option else o for o in OPTIONS.values()]).name
        assert at(f.then) == f.after != name == f.before == at(f.then + (f.now-f.then)*1e-6) and f.now == getattr(OPTIONS[option], field)


def test_prices_that_flip_the_legal_brief():
    found = {f.field: f.then for f in price_flips(LAW)}
    assert found == pytest.approx({"fine-tuned: near": .81, "fine-tuned: far": .71, "fine-tuned: machine": 500}, rel=1e-6)


def test_yes_and_no_flip_too():
    found = {f.field: f for f in flips(KITCHEN)}
    assert (found["private"].then, found["private"].after, found["rights"].then) == (True, "fine-tuned", "change")


def test_swings_halve_and_double_and_stand_in_order():
    s = replace(KITCHEN, requests_per_day=100_000)
    rows = swings(s)
    assert {name for name, _, _ in rows} == {f.name for f in fields(s)} - {"private", "rights"}
    for name, less, more in rows:
        if name in ("distance", "needed"): assert (less.situation, more.situation) == (replace(s, **{name: getattr(s, name)-.2}), replace(s, **{name: min(1, getattr(s, name)+.2)}))
        else: assert (less.situation, more.situation) == (replace(s, **{name: getattr(s, name)/2}), replace(s, **{name: getattr(s, name)*2}))
    widths = [abs(more.best.dollars-less.best.dollars) for _, less, more in rows if less.best and more.best]
    assert widths == sorted(widths, reverse=True)


def test_options_of_your_own():
    mine = Option("mine", 0, 0, 0, 0, 1, 1e9, 0, 0, 0, 1., 1., 0., False, "all")
    assert recommend(LAW, [*OPTIONS.values(), mine]).name == "mine" and all(f.after != "mine" for f in flips(LAW))
    assert flips(LAW, [mine]) == []

"Laws of cost: monotone in what one asks for, the best split against trying them all, bills against published trainings, and the table that the sliders show."
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings, strategies as st

from llm_scratch.core import UserError
from llm_scratch.costs import (BESIROGLU, BUILDING, CARBON, DEVICES, HOFFMANN, POWER_PRICE, ROOM, UTILISATION, Bill, Law, Rented, best_split, bill, bill_for, bill_html, cheapest, chips_for, explore_costs, lifetime_flops,
                               tokens_for)
from llm_scratch.planning import CHIPS

fits = st.sampled_from([HOFFMANN, BESIROGLU, Law(1., 100., .5, 100., .5, "round", "here")])
devices = st.sampled_from(list(DEVICES.values()))
sizes, lengths = st.floats(1e6, 1e12), st.floats(1e6, 1e14)
quick = settings(max_examples=50, deadline=None)


@given(fits, sizes, lengths, st.floats(1.01, 100))
def test_more_of_either_is_better_and_the_floor_is_never_reached(fit, N, D, more):
    assert fit.floor < fit.loss(N*more, D) < fit.loss(N, D) and fit.floor < fit.loss(N, D*more) < fit.loss(N, D)


@given(fits, st.floats(1e15, 1e28))
def test_the_split_spends_the_budget_and_no_other_is_better(fit, flops):
    N, D = best_split(fit, flops)
    assert 6*N*D == pytest.approx(flops)
    for other in (.5, .9, .99, 1.01, 1.1, 2): assert fit.loss(N*other, D/other) >= fit.loss(N, D)


def test_published_constants():
    "Chinchilla's own size comes out of the corrected fit, and not of the printed one."
    assert 60e9 < best_split(BESIROGLU, 5.76e23)[0] < 80e9 and best_split(HOFFMANN, 5.76e23)[0] < 40e9
    assert (HOFFMANN.floor, HOFFMANN.A, HOFFMANN.a, HOFFMANN.B, HOFFMANN.b) == (1.69, 406.4, .34, 410.7, .28)
    assert (BESIROGLU.floor, BESIROGLU.A, BESIROGLU.a, BESIROGLU.B, BESIROGLU.b) == (1.8172, 482.01, .3478, 2085.43, .3658)


@given(fits, sizes, lengths)
def test_tokens_for_is_the_inverse_of_the_loss(fit, N, D):
    loss = fit.loss(N, D)
    assume(fit.B/D**fit.b > 1e-6)
    assert tokens_for(fit, N, loss) == pytest.approx(D, rel=1e-4)
    assert tokens_for(fit, N, fit.floor + fit.A/N**fit.a*(1 - 1e-9)) == math.inf


def test_six_to_learn_two_to_serve(): assert (lifetime_flops(3, 2), lifetime_flops(3, 2, 5), lifetime_flops(3, 0, 1)) == (36, 66, 6)


@quick
@given(fits, st.floats(1e16, 1e26))
def test_without_users_the_cheapest_is_the_best_split(fit, flops):
    N, D = best_split(fit, flops)
    got = cheapest(fit, fit.loss(N, D))
    assert got == pytest.approx((N, D), rel=1e-3)
    assert fit.loss(*got) == pytest.approx(fit.loss(N, D))


@quick
@given(fits, st.floats(1e18, 1e25), st.floats(1e6, 1e15), st.floats(1.1, 100))
def test_more_users_never_make_a_larger_model(fit, flops, served, more):
    loss = fit.loss(*best_split(fit, flops))
    few, many = cheapest(fit, loss, served), cheapest(fit, loss, served*more)
    assert many[0] <= few[0]*(1 + 1e-6) and many[1] >= few[1]*(1 - 1e-6) and fit.loss(*many) == pytest.approx(loss)
    cost = lambda plan: lifetime_flops(*plan, served)
    for N in (few[0]*.8, few[0]*.97, few[0]*1.03, few[0]*1.3): assert cost((N, tokens_for(fit, N, loss))) >= cost(few)*(1 - 1e-9)


@quick
@given(fits, st.floats(1e18, 1e25), st.floats(.3, 1.2))
def test_scarce_text_makes_a_larger_model(fit, flops, share):
    N, D = best_split(fit, flops)
    loss = fit.loss(N, D)
    assume(loss > fit.floor + fit.B/(share*D)**fit.b + 1e-6)
    n, d = cheapest(fit, loss, most_tokens=share*D)
    assert d <= share*D and fit.loss(n, d) <= loss*(1 + 1e-9)
    assert n == pytest.approx(N, rel=1e-3) if share >= 1 else n > N


def test_what_cannot_be_reached_is_said_with_what_can():
    with pytest.raises(UserError, match="give more text, or a loss above 1.817"): cheapest(BESIROGLU, 1.8)
    with pytest.raises(UserError) as e: cheapest(BESIROGLU, 2.2, most_tokens=1e9)
    cheapest(BESIROGLU, float(str(e.value).split()[-1])+.002, most_tokens=1e9)


# --- bills ---------------------------------------------------------------------------------------------------------

@given(sizes, lengths, devices, st.integers(1, 1000))
def test_a_bill_adds_up(N, D, device, n):
    b = Bill(N, D, device, n)
    assert b.flops == 6*N*D and b.memory == 16*N
    for got, share in zip(b.device_hours, reversed(UTILISATION)): assert got*3600*device.flops*share == pytest.approx(6*N*D)
    for hours, clock, kwh, room, kg, c in zip(b.device_hours, b.hours, b.kilowatt_hours, BUILDING, b.carbon, CARBON):
        assert clock*n == pytest.approx(hours) and kwh == pytest.approx(hours*device.watts*room/1000) and kg == pytest.approx(kwh*c)
    rent = zip(b.device_hours, device.dollars) if device.dollars[1] else zip(b.kilowatt_hours, POWER_PRICE)
    assert b.dollars == pytest.approx([x*y for x, y in rent])
    for low, high in (b.device_hours, b.hours, b.kilowatt_hours, b.dollars, b.carbon): assert 0 < low < high


@given(sizes, lengths, devices, st.floats(1.01, 10))
def test_bills_grow_with_what_is_asked(N, D, device, more):
    base = Bill(N, D, device, 1)
    for larger in (Bill(N*more, D, device, 1), Bill(N, D*more, device, 1)): assert larger.dollars[0] > base.dollars[0] and larger.hours[1] > base.hours[1]
    two = Bill(N, D, device, 2)
    assert two.dollars == base.dollars and two.hours[0] == pytest.approx(base.hours[0]/2)


@given(sizes, lengths, devices, st.floats(.1, 1000))
def test_the_fewest_chips_that_do(N, D, device, days):
    n = chips_for(N, D, device, days)
    assert bill(N, D, device, n).hours[1] <= 24*days*(1 + 1e-9)
    if n > 1:
        late = Bill(N, D, device, n-1).hours[1] > 24*days*(1 - 1e-9)
        assert late or 16*N > (n-1)*ROOM*device.memory*(1 - 1e-9)


@quick
@given(st.floats(1.95, 2.8), st.floats(1.5, 200), st.sampled_from([0, 1e11, 1e13]))
def test_the_bill_of_a_quality(loss, days, served):
    b = bill_for(loss, DEVICES["h100"], days, served=served)
    assert BESIROGLU.loss(b.weights, b.tokens) == pytest.approx(loss) and b.hours[1] <= 24*days*(1 + 1e-9)
    assert (b.weights, b.tokens) == cheapest(BESIROGLU, loss, served) and b.n == chips_for(b.weights, b.tokens, DEVICES["h100"], days)
    better = bill_for(loss-.05, DEVICES["h100"], days, served=served)
    assert better.dollars[0] > b.dollars[0] and better.memory > b.memory


def test_the_bill_of_a_quality_with_scarce_text():
    free, scarce = bill_for(2.2, DEVICES["a100"]), bill_for(2.2, DEVICES["a100"], most_tokens=8e10, fit=BESIROGLU)
    assert scarce.tokens <= 8e10 < free.tokens and scarce.weights > free.weights
    assert bill_for(2.2, DEVICES["a100"], fit=HOFFMANN).weights != free.weights


def test_what_does_not_fit_names_what_would():
    with pytest.raises(UserError, match="give at least 20") as e: bill(7e10, 1e12, DEVICES["h100"], 19)
    assert "1.12e+03 GB" in str(e.value)
    bill(7e10, 1e12, DEVICES["h100"], 20)
    for wrong in ((0, .5), (.5, .3), (.3, 1.1)):
        with pytest.raises(UserError, match="is not a range of shares"): bill(1e6, 1e6, DEVICES["a100"], 1, wrong)


@pytest.mark.parametrize("N, D, chip, hours", [(65.2e9, 1.4e12, "a100", 1_022_362), (69e9, 2e12, "a100", 1_720_320), (405e9, 15.6e12, "h100", 30_840_000)])
def test_published_hours_lie_within_the_bill(N, D, chip, hours):
    low, high = bill(N, D, DEVICES[chip], 4096).device_hours
    assert low <= hours <= high


def test_devices_agree_with_the_planner():
    for name, device in DEVICES.items():
        assert (device.flops, device.memory, device.watts) == (CHIPS[name].flops, CHIPS[name].memory, CHIPS[name].watts)
        if CHIPS[name].dollars: assert device.dollars[0] <= CHIPS[name].dollars <= device.dollars[1]


def test_prices_of_your_own():
    mine = replace(DEVICES["h100"], dollars=(1., 1.))
    assert bill(1e9, 2e10, mine).dollars == bill(1e9, 2e10, mine).device_hours
    at_home = Rented("box", 1e12, 1e10, 100, (0., 0.), "mine")
    assert bill(1e6, 1e9, at_home).dollars[0] == pytest.approx(bill(1e6, 1e9, at_home).kilowatt_hours[0]*POWER_PRICE[0])


# --- the sliders ---------------------------------------------------------------------------------------------------

def test_the_table_has_the_figures_of_the_bill():
    page = bill_html(7e9, 140e9, [DEVICES["h100"]], days=30)
    n = chips_for(7e9, 140e9, DEVICES["h100"], 30)
    b = Bill(7e9, 140e9, DEVICES["h100"], n)
    assert f"{n:,} h100" in page and f"{b.hours[0]:,.3g} – {b.hours[1]:,.3g}" in page and f"{b.dollars[0]:,.3g} – {b.dollars[1]:,.3g}" in page and f"{b.kilowatt_hours[0]:,.3g}" in page
    assert page.count("<tr>") == 2 and "5.88e+21 FLOP" in page and "112 GB" in page


def test_the_sliders_choose_the_table():
    pytest.importorskip("ipywidgets")
    sizes, ratios = (1e7, 1e9, 1e11), (5, 20)
    box = explore_costs(sizes, ratios)
    size, ratio, shown = box.children
    assert [len(s.options) for s in (size, ratio)] == [3, 2]
    for i, N in enumerate(sizes):
        for j, r in enumerate(ratios): assert shown.children[i].children[j].value == bill_html(N, N*r)
    assert shown.selected_index == 0 and all(row.selected_index == 0 for row in shown.children)


def test_the_sliders_are_tied_in_the_browser():
    "Links that need no kernel: the size moves the outer stack, the ratio every inner one."
    widgets = pytest.importorskip("ipywidgets")
    seen, real = [], widgets.jslink
    try:
        widgets.jslink = lambda a, b: seen.append((a, b)) or real(a, b)
        size, ratio, shown = explore_costs((1e7, 1e9), (5, 20)).children
    finally: widgets.jslink = real
    assert ((size, "index"), (shown, "selected_index")) in seen
    for row in shown.children: assert ((ratio, "index"), (row, "selected_index")) in seen


def test_a_chip_is_promised_the_same_here_and_by_the_planner():
    from llm_scratch.planning import CHIPS
    assert set(DEVICES) <= set(CHIPS)
    for name, d in DEVICES.items(): assert (d.flops, d.memory, d.watts) == (CHIPS[name].flops, CHIPS[name].memory, CHIPS[name].watts), name

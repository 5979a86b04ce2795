"Laws of loss against laws that were planted, against scipy and against trying everything; plans, and the two scripts that make the records."
import json
import math
import sys
from dataclasses import replace
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.testing import assert_allclose

from llm_scratch.architecture import Decoder, n_params, training_flops_per_token
from llm_scratch.core import UserError
from llm_scratch.rates import fit_power
from llm_scratch.costs import BESIROGLU, HOFFMANN, Law, best_split
from llm_scratch.scaling import (_descend, _starts, _surface, band, bootstrap_laws, fit_law, forecast, huber, isoflop, one_dial, plan_budget, valley,
                                 worth_of_repeats)

ROOT = Path(__file__).resolve().parent.parent
N = np.repeat([8e3, 3e4, 1e5, 1.6e5, 4e5], 4)
D = np.tile([65e3, 2e5, 5e5, 2e6], 5)
TRUE = Law(.75, 60., .5, 1300., .63)


def noisy(law=TRUE, seed=0, spread=.01): return law.loss(N, D)*np.exp(spread*np.random.default_rng(seed).standard_normal(len(N)))


def numbers(law): return [law.floor, law.A, law.a, law.B, law.b]


laws = st.builds(lambda floor, at_n, a, at_d, b: Law(floor, at_n*6e4**a, a, at_d*4e5**b, b), st.floats(.3, 3), st.floats(.1, 1.5), st.floats(.2, 1.), st.floats(.1, 1.5), st.floats(.2, 1.))


# --- sizes and lines -----------------------------------------------------------------------------------------------

def test_one_dial_sets_every_size():
    assert [(c.n_layers, c.n_heads, c.n_kv_heads, c.d_head, c.d_ff) for c in (one_dial(w, 164, 128) for w in (16, 64, 96, 112, 256))] == [
        (2, 1, 1, 16, 40), (2, 4, 4, 16, 168), (3, 6, 6, 16, 256), (3, 7, 7, 16, 296), (8, 16, 16, 16, 680)]
    cfg = one_dial(48, 77, 33)
    assert (cfg.vocab_size, cfg.context_len, cfg.d_model) == (77, 33, 48) and sum(p.numel() for p in Decoder(cfg).parameters()) == n_params(cfg)
    weights = [n_params(one_dial(w, 164, 128)) for w in range(16, 513, 16)]
    assert weights == sorted(set(weights))


@pytest.mark.parametrize(("width", "fits"), [(40, 32), (8, 16), (0, 16), (-16, 16), (57, 64)])
def test_a_width_that_heads_do_not_fit(width, fits):
    with pytest.raises(ValueError, match=f"width={width} .* give {fits}$"): one_dial(width, 10, 10)


@settings(max_examples=50, deadline=None)
@given(st.floats(-3, 3), st.floats(.01, 100))
def test_a_power_is_found(exponent, factor):
    x = np.array([1., 7, 20, 900])
    assert fit_power(x, factor*x**exponent) == pytest.approx((exponent, factor), rel=1e-6, abs=1e-9)


def test_a_power_needs_numbers_above_0():
    for x, y in (([1, 2], [0, 1]), ([-1, 2], [1, 1])):
        with pytest.raises(ValueError, match="no logarithm"): fit_power(x, y)


# --- the fit -------------------------------------------------------------------------------------------------------

def test_the_terms_of_a_law():
    law = Law(1., 8., .5, 27., 1/3)
    assert law.loss(4., 1e300) == pytest.approx(5) and law.loss(1e300, 27.) == pytest.approx(10) and law.loss(1e300, 1e300) == pytest.approx(1)
    assert law.loss(16, 1) == pytest.approx(1+2+27)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-4, 2), st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_huber_equals_pytorch(delta, errors):
    theirs = torch.nn.functional.huber_loss(torch.tensor(errors, dtype=torch.float64), torch.zeros(len(errors), dtype=torch.float64), delta=delta, reduction="none")
    assert_allclose(huber(np.array(errors), delta), theirs.numpy(), rtol=1e-12, atol=1e-15)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1.5, 1.5), min_size=5, max_size=5))
def test_slopes_are_those_of_finite_differences(p):
    p, n, d, h = np.array([p]), np.array([-2., 0, 1.5]), np.array([1., -1, .2]), 1e-6
    slopes = np.stack([(_surface(p + h*np.eye(5)[i], n, d)[0] - _surface(p - h*np.eye(5)[i], n, d)[0])/(2*h) for i in range(5)], -1)
    assert_allclose(_surface(p, n, d)[1], slopes, rtol=1e-5, atol=1e-7)
    a, b = np.exp(p[0, 3:])
    assert_allclose(np.exp(_surface(p, n, d)[0][0]), math.exp(p[0, 2]) + math.exp(p[0, 0])*np.exp(n)**-a + math.exp(p[0, 1])*np.exp(d)**-b)


@settings(max_examples=25, deadline=None)
@given(laws)
def test_a_planted_law_is_found(planted):
    found = fit_law(N, D, planted.loss(N, D))
    assert_allclose(numbers(found), numbers(planted), rtol=2e-3)
    assert_allclose(found.loss(N, D), planted.loss(N, D), rtol=1e-5)


def test_neither_units_nor_order_matter():
    loss, order = noisy(), np.random.default_rng(1).permutation(len(N))
    law, other = fit_law(N, D, loss), fit_law(N[order]/1e3, D[order]*7, loss[order])
    assert_allclose([other.floor, other.a, other.b], [law.floor, law.a, law.b], rtol=1e-4)
    assert other.loss(1e3, 7e7) == pytest.approx(law.loss(1e6, 1e7), rel=1e-5)


@pytest.mark.parametrize("delta", [1e-3, 1e-2, 1.])
def test_no_optimiser_of_scipy_finds_a_lower_place(delta):
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is missing: the oracle of this test")
    loss = noisy(seed=3)
    cost = lambda p: huber(np.log(loss) - np.logaddexp.reduce([p[0] - p[3]*np.log(N), p[1] - p[4]*np.log(D), p[2] + 0*N]), delta).sum()
    law = fit_law(N, D, loss, delta)
    ours = cost([math.log(law.A), math.log(law.B), math.log(law.floor), law.a, law.b])
    theirs = min(optimize.minimize(cost, [3, 6, e, a, a], method="BFGS", options=dict(gtol=1e-11)).fun for e in (-1, .3) for a in (.3, .7))
    assert ours <= theirs*(1+1e-6) + 1e-15


def test_descents_end_no_higher_than_they_begin_and_most_agree():
    loss = noisy()
    n, d, y = np.log(N)-np.log(N).mean(), np.log(D)-np.log(D).mean(), np.log(loss)
    start, ones = _starts(y), np.ones((54, len(y)))
    before = huber(y - _surface(start, n, d)[0], .01).sum(1)
    p, cost = _descend(start, n, d, y, ones, .01)
    assert_allclose(cost, huber(y - _surface(p, n, d)[0], .01).sum(1), rtol=1e-6)
    assert (cost <= before).all() and np.median(cost) < cost.min()*1.001
    assert start.shape == (54, 5) and len(np.unique(start, axis=0)) == 54
    assert_allclose(np.exp(_surface(start, np.zeros(1), np.zeros(1))[0]), np.exp(y.mean())) # all agree in the middle


def test_no_round_of_a_descent_makes_things_worse():
    loss = noisy(spread=.05)
    n, d, y = np.log(N)-np.log(N).mean(), np.log(D)-np.log(D).mean(), np.log(loss)
    ways = [_descend(_starts(y), n, d, y, np.ones((54, len(y))), 1e-3, rounds)[1] for rounds in range(25)]
    for earlier, later in zip(ways, ways[1:]): assert (later <= earlier).all()
    assert ways[-1].sum() < .5*ways[0].sum()


def test_the_best_of_all_descents_is_taken(monkeypatch):
    import llm_scratch.scaling as module
    real = module._descend
    def with_a_stray(p, n, d, y, count, *rest): # every second descent ends badly
        ends, cost = real(p, n, d, y, count, *rest)
        ends[1::2] += 1
        return ends, cost + 1.*(np.arange(len(cost))%2)
    best, drawn_well = fit_law(N, D, noisy()), bootstrap_laws(N, D, noisy(), 5)
    monkeypatch.setattr(module, "_descend", with_a_stray)
    assert fit_law(N, D, noisy()).loss(N, D) == pytest.approx(best.loss(N, D), rel=1e-6)
    for law, again in zip(drawn_well, bootstrap_laws(N, D, noisy(), 5), strict=True): assert_allclose(again.loss(N, D), law.loss(N, D), rtol=5e-3)


def test_one_bad_run_does_not_pull_the_law_to_itself():
    loss = noisy()
    good, spoiled = fit_law(N, D, loss), loss.copy()
    spoiled[-1] *= 1.3
    moved = [abs(fit_law(N, D, spoiled, delta).loss(1e6, 5e6)/good.loss(1e6, 5e6) - 1) for delta in (1e-3, 10.)]
    assert moved[0] < .01 < moved[1]
    assert fit_law(N, D, spoiled) == fit_law(N, D, spoiled, 1e-3)


@pytest.mark.parametrize(("change", "says"), [
    (dict(losses=[3., 2.]), "3 sizes, 3 token counts and 2 losses"), (dict(losses=[3., 2., math.nan]), "leave that run out"), (dict(losses=[3., 2., 0.]), "leave that run out"),
    (dict(weights=[1, 2, -3]), "leave that run out"), (dict(tokens=[0, 2, 3]), "leave that run out"), (dict(losses=[3., 2., math.inf]), "leave that run out"), (dict(weights=[1, 2, 1]), "2 sizes and 3 token counts"),
    (dict(tokens=[5, 5, 5]), "3 sizes and 1 token counts")])
def test_runs_in_which_no_law_can_be_seen(change, says):
    for fit in (fit_law, bootstrap_laws):
        with pytest.raises(ValueError, match=says): fit(**(dict(weights=[1, 2, 3], tokens=[1, 2, 3], losses=[3., 2., 1.]) | change))


# --- bands ---------------------------------------------------------------------------------------------------------

@cache
def drawn(): return bootstrap_laws(N, D, noisy(), 60)


def test_a_bootstrapped_law_is_the_fit_of_the_runs_that_were_drawn():
    counts = np.random.default_rng(5).multinomial(len(N), np.full(len(N), 1/len(N)), size=3)
    loss = noisy()
    for law, count in zip(bootstrap_laws(N, D, loss, 3, seed=5), counts, strict=True):
        again = fit_law(N.repeat(count), D.repeat(count), loss.repeat(count))
        assert_allclose(law.loss(N, D), again.loss(N, D), rtol=2e-3)
        assert law.loss(1e6, 1e7) == pytest.approx(again.loss(1e6, 1e7), rel=1e-2)


def test_draws_follow_the_seed_and_differ():
    one, two, three = (bootstrap_laws(N, D, noisy(), 4, seed=s) for s in (0, 0, 1))
    assert one == two != three and len({law.a for law in one}) == 4


def test_bands_hold_the_truth_about_as_often_as_they_say():
    inside = 0
    for seed in range(12):
        low, high = band([law.loss(8e5, 4e6) for law in bootstrap_laws(N, D, noisy(seed=seed), 40, seed=seed)], .9)
        inside += low < TRUE.loss(8e5, 4e6) < high
        assert .001 < high-low < .5
    assert inside >= 8


def test_bands_open_away_from_the_runs():
    width = lambda *at: (lambda ends: ends[1]-ends[0])(band([law.loss(*at) for law in drawn()]))
    assert width(1e5, 5e5) < width(1e6, 5e6) < width(1e8, 5e8)


def test_band_is_the_middle():
    assert band(range(101), .9) == pytest.approx((5, 95)) and band(range(101)) == pytest.approx((2.5, 97.5))
    low, high = band(np.arange(101)[:, None]*np.array([1, -1]), .5)
    assert_allclose([low, high], [[25, -75], [75, -25]])


def test_forecasts():
    law, more = fit_law(N, D, noisy()), drawn()
    errors = np.log(noisy()) - np.log(law.loss(N, D))
    sure, one, many = forecast(law, more, 1e6, 5e6, [0.]), forecast(law, more, 1e6, 5e6, errors*5), forecast(law, more, 1e6, 5e6, errors*5, n_runs=100)
    assert sure.loss == law.loss(1e6, 5e6) and sure.mean_band == sure.law_band == band([x.loss(1e6, 5e6) for x in more])
    size = lambda ends: ends[1]-ends[0]
    assert size(many.mean_band) < 1.4*size(many.law_band) and size(one.mean_band) > 1.5*size(one.law_band) and one.law_band == sure.law_band
    assert forecast(law, more, 1e6, 5e6, [.1]*3, n_runs=2).mean_band == pytest.approx([x*math.exp(.1) for x in sure.law_band])
    assert size(forecast(law, more, 1e6, 5e6, errors, share=.5).law_band) < size(sure.law_band)
    assert (one.weights, one.tokens, one.n_runs, one.share) == (1e6, 5e6, 1, .95)
    assert forecast(law, more, 1e6, 5e6, errors, seed=1) == forecast(law, more, 1e6, 5e6, errors, seed=1) != forecast(law, more, 1e6, 5e6, errors, seed=2)


# --- budgets -------------------------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(laws, st.floats(1e8, 1e20), st.sampled_from([6., 9.]))
def test_the_frontier_is_what_trying_finds(law, flops, per):
    best, tokens = best_split(law, flops, per)
    assert per*best*tokens == pytest.approx(flops, rel=1e-9)
    tried = best*np.geomspace(.5, 2, 2001)
    assert tried[law.loss(tried, flops/per/tried).argmin()] == pytest.approx(best, rel=2e-3)


def test_what_was_published():
    hoffmann, besiroglu = HOFFMANN, BESIROGLU
    ratios = [(lambda ends: ends[1]/ends[0])(best_split(law, 5.76e23)) for law in (hoffmann, besiroglu)]
    assert ratios[0] > 60 and 18 < ratios[1] < 25
    weights, tokens = best_split(besiroglu, np.array([1e20, 1e22]))
    assert weights.shape == tokens.shape == (2,) and (np.diff(weights) > 0).all()


def test_isoflop_reads_between_runs_only():
    curves = {300.: ((10, 20), (2., 1.)), 100.: ((10, 20, 40), (4., 2., 1.)), 200.: ((10, 20, 40), (3., 1.5, .75))}
    per = {100.: 1., 200.: 1., 300.: 2.}
    sizes, losses = isoflop(curves, per, 20)
    assert sizes.tolist() == [100, 200, 300] and losses == pytest.approx([2, 1.5, 2])
    assert isoflop(curves, per, 10*2**.5)[1] == pytest.approx([4/2**.5, 3/2**.5]) # on logs, half-way is the geometric mean
    assert isoflop(curves, per, 40)[0].tolist() == [100, 200, 300] and isoflop(curves, per, 41)[0].tolist() == [] and isoflop(curves, per, 9)[0].tolist() == []


@settings(max_examples=50, deadline=None)
@given(st.floats(2, 500), st.floats(.1, 5))
def test_a_valley_is_found(bottom, curve):
    x = np.array([1., 10, 100, 1000])
    assert valley(x, 3 + curve*(np.log(x) - math.log(bottom))**2) == pytest.approx(bottom, rel=1e-6)


def test_where_there_is_no_valley():
    x = np.array([1., 10, 100, 1000])
    for y in (-x, -(np.log(x)-3)**2, (np.log(x)+1)**2, (np.log(x)-8)**2): assert math.isnan(valley(x, y))
    assert math.isnan(valley(x[:2], [1., 2.])) and math.isnan(valley([], []))


@settings(max_examples=50, deadline=None)
@given(st.floats(1, 1e9), st.floats(1, 1e9), st.floats(1, 50))
def test_what_repeats_are_worth(tokens, unique, decay):
    worth = worth_of_repeats(tokens, unique, decay)
    if tokens <= unique: assert worth == tokens
    else:
        again = tokens/unique - 1
        assert worth == pytest.approx(unique + unique*decay*(1 - math.exp(-again/decay)), rel=1e-9)
        assert unique < worth <= tokens*(1+1e-9) and worth <= unique*(1+decay)
    assert worth_of_repeats(tokens, math.inf) == tokens


def test_four_epochs_are_nearly_fresh_and_forty_are_not():
    assert worth_of_repeats(4., 1.) == pytest.approx(3.726, abs=.001) and worth_of_repeats(40., 1.) < 16
    assert worth_of_repeats(np.array([1., 2]), 1.).shape == (2,)


FAMILY = [one_dial(w, 164, 128) for w in range(16, 257, 16)]


def by_flops(C): return lambda cfg: C/training_flops_per_token(cfg, 128)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e9, 1e15), st.floats(1e5, 1e9) | st.just(math.inf))
def test_a_plan_is_the_best_of_the_family(flops, unique):
    losses = {cfg: TRUE.loss(n_params(cfg), worth_of_repeats(by_flops(flops)(cfg), unique)) for cfg in FAMILY}
    plan = plan_budget(TRUE, drawn(), FAMILY, by_flops(flops), unique=unique)
    assert plan.loss == pytest.approx(min(losses.values()), rel=1e-12) and losses[plan.cfg] == pytest.approx(plan.loss, rel=1e-12) and plan.n_tokens == by_flops(flops)(plan.cfg)
    assert plan.regret >= 0 and plan.weights_band[0] <= plan.weights_band[1]
    assert plan.tokens_band[0] <= by_flops(flops)(one_dial(16, 164, 128))


def test_bands_of_a_plan():
    more, C = drawn(), 1e14 # where they do not agree
    plan = plan_budget(TRUE, more, FAMILY, by_flops(C), share=.5)
    here = [law.loss(n_params(plan.cfg), plan.n_tokens) for law in more]
    best = [min(FAMILY, key=lambda cfg: law.loss(n_params(cfg), by_flops(C)(cfg))) for law in more]
    assert plan.loss_band == pytest.approx(band(here, .5)) and plan.weights_band == pytest.approx(band([n_params(c) for c in best], .5))
    assert plan.tokens_band == pytest.approx(band([by_flops(C)(c) for c in best], .5))
    assert plan.regret == pytest.approx(np.mean([h - law.loss(n_params(c), by_flops(C)(c)) for h, law, c in zip(here, more, best)]))
    assert plan_budget(TRUE, [TRUE], FAMILY, by_flops(C)).regret == 0


def test_plans_follow_the_budget_and_the_text():
    sizes = [plan_budget(TRUE, [TRUE], FAMILY, by_flops(C)).cfg.d_model for C in (1e9, 1e11, 1e13)]
    assert sizes == sorted(set(sizes))
    assert plan_budget(TRUE, [TRUE], FAMILY, by_flops(1e13), unique=1e5).cfg.d_model > sizes[-1]
    counted = plan_budget(TRUE, [TRUE], FAMILY, by_flops(1e12), count=lambda cfg: 10**6).cfg # size buys nothing: the one that reads most
    assert counted.d_model == 16


def test_a_budget_that_buys_nothing():
    with pytest.raises(UserError, match="not pay for a single token"): plan_budget(TRUE, [TRUE], FAMILY, by_flops(1e4))
    assert plan_budget(TRUE, [TRUE], FAMILY, by_flops(1.2e5)).cfg.d_model == 16 # buys one token of the smallest


# --- the records and the scripts that make them --------------------------------------------------------------------

def script(name):
    spec = spec_from_file_location(f"benchmarks_{name}", ROOT/"benchmarks"/f"{name}.py")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def record(): return json.loads((ROOT/"nbs"/"scaling_laws.json").read_text(encoding="utf-8"))


def test_the_prediction_is_what_the_recorded_grid_says(record):
    weights, tokens, losses = (np.array([r[k] for r in record["grid"]], dtype=float) for k in ("weights", "n_tokens", "loss"))
    written, law = record["prediction"], fit_law(weights, tokens, losses)
    assert written["n_runs"] == len(losses) and {k: getattr(law, k) for k in ("floor", "A", "a", "B", "b")} == pytest.approx(written["law"], rel=1e-3)
    for one in written["forecasts"]: assert law.loss(one["weights"], one["tokens"]) == pytest.approx(one["loss"], rel=1e-4)
    cfg = one_dial(written["width"], record["n_bytes"], record["context_len"])
    assert n_params(cfg) == written["forecasts"][0]["weights"] > weights.max() and written["forecasts"][0]["tokens"] > tokens.max() and written["times_compute"] > 2


def test_the_trial_is_outside_the_grid_and_no_byte_comes_twice(record):
    assert record["trial"] and len({r["seed"] for r in record["trial"]}) == len(record["trial"])
    assert {(r["weights"], r["n_tokens"]) for r in record["trial"]} == {(record["prediction"]["forecasts"][0]["weights"], record["prediction"]["forecasts"][0]["tokens"])}
    assert all(r["epochs"] < 1 for r in record["grid"] + record["trial"])
    assert len({r["seed"] for r in record["grid"]}) == len(record["grid"]) # independent


def test_the_script_trains_all_stages_once_and_predicts_first(tmp_path, capsys):
    laws_script, out = script("scaling_laws"), tmp_path/"r.json"
    with pytest.raises(UserError, match="no prediction to try"): laws_script.main(["--tiny", "--only", "trial", "--out", str(out)])
    laws_script.main(["--tiny", "--out", str(out)])
    text = out.read_text(encoding="utf-8")
    made = json.loads(text)
    assert [len(made[s]) for s in ("rates", "grid", "trial", "exceptions")] == [2, 11, 2, 6] and made["prediction"]["times_compute"] > 2
    assert all(math.isfinite(r["loss"]) for s in ("rates", "grid", "trial", "exceptions") for r in made[s])
    assert len({r["loss"] for r in made["grid"]}) == 11 == made["prediction"]["n_runs"] and [r["epochs"] > 1.9 for r in made["exceptions"][:2]] == [True, False]
    capsys.readouterr()
    laws_script.main(["--tiny", "--only", "grid", "trial", "--out", str(out)])
    assert capsys.readouterr().out == "" and out.read_text(encoding="utf-8") == text # nothing was trained again
    out.write_text(json.dumps(made | dict(prediction=None)), encoding="utf-8")
    with pytest.raises(UserError, match="trial has been run"): laws_script.main(["--tiny", "--only", "prediction", "--out", str(out)])


def test_growth_measures_what_the_plan_says(tmp_path, capsys):
    growth = script("growth")
    growth.main(["--tiny", "--out", str(tmp_path/"g.json")])
    made = json.loads((tmp_path/"g.json").read_text(encoding="utf-8"))
    assert [(p["axis"], p["width"], p["context"], p["batch"]) for p in made["points"]] == [
        ("weights", 32, 128, 8), ("weights", 64, 128, 8), ("context", 64, 64, 32), ("context", 64, 128, 16), ("batch", 64, 128, 1), ("batch", 64, 128, 2)]
    for p in made["points"]:
        cfg = one_dial(p["width"], 256, p["context"])
        assert p["predicted_bytes"] == pytest.approx(p["peak_bytes"], rel=.03) and p["tokens_per_second"] > 0 and len(p["seconds"]) == 2
        assert (p["weights"], p["flops_per_token"]) == (n_params(cfg), training_flops_per_token(cfg, p["context"]))
    assert "largest four" in capsys.readouterr().out

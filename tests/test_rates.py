"Schedules against PyTorch's, a range test that leaves no trace, rates that carry over to another width, and the script that measures them."
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.core import UserError
from llm_scratch.engines import Engine
from llm_scratch.pretraining import Batches, NotFinite, TrainState, make_adamw, make_optimizers, train, update, wsd
from llm_scratch.rates import RangeTest, activations, borrowed, coordinate_check, cosine, draw_for_width, fit_power, linear, make_width_adamw, make_width_optimizers, range_test, width_groups

SCRIPT = Path(__file__).resolve().parent.parent/"benchmarks"/"rates.py"
BATCHES = Batches(np.random.default_rng(0).integers(0, 40, 2000), 16, 4)


def cfg(d, **changes): return replace(ModelConfig(40, 16, 2, d//8, d//8, d, 2*d, 8), **changes)


def start(make=make_optimizers, d=16):
    model = init_weights(Decoder(cfg(d)), seed=0)
    return TrainState(model, make(model))


# --- schedules -------------------------------------------------------------------------------------------------------

DOWN = {cosine: lambda opt, m, end: CosineAnnealingLR(opt, m, eta_min=end), linear: lambda opt, m, end: LinearLR(opt, 1., end, total_iters=m)}


@given(st.sampled_from(list(DOWN)), st.integers(3, 60), st.data())
@settings(max_examples=15, deadline=None)
def test_schedules_are_those_of_pytorch(f, n, data):
    warmup, start, end = data.draw(st.integers(1, n-1)), data.draw(st.floats(.001, 1)), data.draw(st.floats(0, 1))
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    theirs = SequentialLR(opt, [LinearLR(opt, start, 1., total_iters=warmup), DOWN[f](opt, n-warmup, end)], milestones=[warmup])
    for step in range(n):
        assert f(step, n, warmup, start, end) == pytest.approx(opt.param_groups[0]["lr"], abs=1e-6)
        opt.step()
        theirs.step()


@given(st.sampled_from(list(DOWN)), st.integers(1, 500), st.data())
@settings(max_examples=60, deadline=None)
def test_laws_of_schedules(f, n, data):
    warmup, start, end = data.draw(st.integers(0, n-1)), data.draw(st.floats(.001, 1)), data.draw(st.floats(0, 1))
    y = np.array([f(step, n, warmup, start, end) for step in range(n)])
    assert (y > 0).all() and (y <= 1).all() and y[warmup] == 1
    assert (np.diff(y[:warmup+1]) >= 0).all() and (np.diff(y[warmup:]) <= 1e-12).all()
    if warmup: assert y[0] == pytest.approx(start)
    m = n-warmup  # area: the mean of 1 and `end`, and half of what the first step has above it
    assert y[warmup:].sum() == pytest.approx(m*end + (1-end)*(m+1)/2)
    assert y[:warmup].sum() == pytest.approx(warmup*start + (1-start)*(warmup-1)/2 if warmup else 0)


def test_the_warmup_that_is_not_given_is_20_steps_or_what_fits():
    assert [f(i, 100) for f in DOWN for i in (0, 19, 20)] == pytest.approx([.01, .9505, 1.]*2)
    assert cosine(0, 1) == linear(0, 1) == 1.
    assert cosine(2, 3) == 1. and cosine(1, 3) < 1


@pytest.mark.parametrize("f", DOWN)
@pytest.mark.parametrize("args, told", [
    (dict(step=5, n_steps=5), "step=5 is not in a run of n_steps=5: steps go from 0 to 4"), (dict(step=-1, n_steps=5), "step=-1 is not in"),
    (dict(step=0, n_steps=5, warmup=5), "warmup=5 does not fit into n_steps=5"), (dict(step=0, n_steps=5, warmup=-1), "warmup=-1 does not fit into n_steps=5"),
    (dict(step=4, n_steps=5, start=0.), "start=0.0 is no share"), (dict(step=4, n_steps=5, start=1.1), "start=1.1 is no share"),
    (dict(step=0, n_steps=5, end=-.1), "end=-0.1 is no share"), (dict(step=0, n_steps=5, end=1.1), "end=1.1 is no share"), (dict(step=0, n_steps=5, start=math.nan), "start=nan")])
def test_what_makes_no_schedule_is_refused(f, args, told):
    with pytest.raises(ValueError, match=told): f(**args)


def test_a_wrong_schedule_costs_no_update():
    state = start()
    with pytest.raises(ValueError, match="warmup=9 does not fit into n_steps=4"): next(train(state, BATCHES, partial(cosine, n_steps=4, warmup=9), 4))
    assert state.step == 0 and not any(opt.state for opt in state.optimizers)


# --- a run that is lent ----------------------------------------------------------------------------------------------

class Dropping(Decoder):
    def hidden(self, ids_BT, cache=None): return nn.functional.dropout(super().hidden(ids_BT, cache), .2)


class Accelerated(torch.optim.SGD):
    "An optimizer of someone else, that remembers more than tensors."
    def step(self):
        for g in self.param_groups:
            for p in g["params"]: self.state[p].setdefault("seen", []).append(float(p.grad.sum()))
        super().step()


def accelerated(model):
    opt = Accelerated(model.parameters(), lr=.1, momentum=.9)
    for g in opt.param_groups: g["initial_lr"] = .1
    return [opt]


def spoil(state):
    for _ in train(state, BATCHES, lambda step: 20., state.step+3): pass
    torch.rand(5)
    state.optimizers.append(None)
    state.optimizers = []


def told(state): # everything
    tensors = {name: x.clone() for name, x in state.model.state_dict().items()}
    return tensors, [[repr(opt.state.get(p)) for g in opt.param_groups for p in g["params"]] for opt in state.optimizers], [{k: v for k, v in g.items() if k != "params"} for opt in state.optimizers for g in opt.param_groups], state.step, torch.get_rng_state()


@pytest.mark.parametrize("make", [make_optimizers, make_adamw, accelerated])
@pytest.mark.parametrize("before", [0, 3])
def test_a_borrowed_run_comes_back_to_the_last_bit(make, before):
    model = init_weights(Dropping(cfg(16)), seed=0)
    state = TrainState(model, make(model))
    for _ in train(state, BATCHES, lambda step: .5, max(1, before)): pass
    if not before: state = TrainState(model, make(model))  # optimizers that remember nothing yet
    old, ids = told(state), [id(opt) for opt in state.optimizers]
    with pytest.raises(KeyboardInterrupt), borrowed(state) as same:
        assert same is state
        spoil(state)
        raise KeyboardInterrupt
    new = told(state)
    assert [id(opt) for opt in state.optimizers] == ids
    for name, x in old[0].items(): assert torch.equal(x, new[0][name]), name
    assert new[1:4] == old[1:4] and torch.equal(new[4], old[4])
    assert all(p.grad is None for p in model.parameters())


def test_a_run_goes_on_as_if_it_had_not_been_lent():
    def run(lend):
        torch.manual_seed(0)
        model = init_weights(Dropping(cfg(16)), seed=0)
        state, seen = TrainState(model, make_optimizers(model)), []
        for step in train(state, BATCHES, lambda step: 1., 8):
            seen.append(step.loss)
            if step.n == 4 and lend:
                with borrowed(state): spoil(state)
        return seen
    assert run(True) == run(False)


def test_a_branch_of_the_stable_run_is_a_run_of_its_own():
    at = lambda n: partial(wsd, n_steps=n, warmup=3, decay=.5)
    whole = start()
    for _ in train(whole, BATCHES, at(12), 12): pass
    state = start()
    for step in train(state, BATCHES, lambda step: min(1., (step+1)/3), 8):
        if step.n != 6: continue
        with borrowed(state):
            for _ in train(state, BATCHES, at(12), 12): pass
            branch = {name: x.clone() for name, x in state.model.state_dict().items()}
    assert state.step == 8
    for name, x in whole.model.state_dict().items(): assert torch.equal(x, branch[name])


def test_only_a_gpu_that_is_used_has_a_generator_to_keep(monkeypatch):
    asked = []
    real = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: asked.append(devices) or real([]))
    for device in (None, torch.device("cpu"), torch.device("cuda", 1)):
        state = start()
        state.engine = Engine(device=device)
        with borrowed(state): pass
    assert asked == [[], [], [torch.device("cuda", 1)]]


# --- the range test --------------------------------------------------------------------------------------------------

def test_the_rates_grow_by_the_same_factor_and_the_state_stays():
    state = start()
    for _ in train(state, BATCHES, lambda step: .5, 3): pass
    old = told(state)
    test = range_test(state, BATCHES, low=.01, high=1., n_steps=5)
    assert test.factors == pytest.approx([.01, .01*10**.5, .1, 10**-.5, 1.])
    new = told(state)
    assert new[1:4] == old[1:4] and all(torch.equal(x, new[0][name]) for name, x in old[0].items())
    byhand = []
    for i, factor in enumerate(test.factors): byhand.append(update(state, *BATCHES[3+i], factor).loss)  # from the step where it stands
    assert list(test.losses) == byhand


def test_options_reach_the_update(monkeypatch):
    seen = []
    monkeypatch.setattr("llm_scratch.rates.update", lambda state, ids, targets, factor, **kw: seen.append(kw) or update(state, ids, targets, factor, **kw))
    range_test(start(), BATCHES, n_steps=2, n_micro=2, max_norm=.3)
    assert seen == [dict(n_micro=2, max_norm=.3)]*2


def played(monkeypatch, losses):
    "A range test of a run with these losses."
    it = iter(losses)
    def step(state, ids, targets, factor, **kw):
        if math.isnan(loss := next(it)): raise NotFinite(state.step+1, loss, 0., ids, targets)
        state.step += 1
        return replace_loss(loss)
    replace_loss = lambda loss: type("S", (), dict(loss=loss))
    monkeypatch.setattr("llm_scratch.rates.update", step)
    return range_test(start(), BATCHES, low=1., high=16., n_steps=5)


def test_it_ends_where_the_loss_is_twice_its_lowest_or_no_number(monkeypatch):
    test = played(monkeypatch, [4, 2, 3.9, 4.1, 1])
    assert test.losses == (4, 2, 3.9, 4.1) and test.blew_up
    test = played(monkeypatch, [4, 2, math.nan, 1, 1])
    assert test.losses == (4, 2) and test.factors == pytest.approx((1, 2)) and test.blew_up
    test = played(monkeypatch, [4, 2, 3, 2, 1])
    assert len(test.losses) == 5 and not test.blew_up
    with pytest.raises(NotFinite): played(monkeypatch, [math.nan, 1, 1, 1, 1])


def test_an_error_that_is_not_of_the_rate_is_not_swallowed(monkeypatch):
    state = start()
    def breaks(state, *args, **kw):
        if state.step == 2: raise UserError("the disk is full")
        return update(state, *args, **kw)
    monkeypatch.setattr("llm_scratch.rates.update", breaks)
    with pytest.raises(UserError, match="the disk is full"): range_test(state, BATCHES)
    assert state.step == 0 and not any(opt.state for opt in state.optimizers)


@pytest.mark.parametrize("args, wrong", [(dict(low=0.), "low=0.0 and high=100.0"), (dict(low=-1.), "low=-1.0"), (dict(low=2., high=2.), "low=2.0 and high=2.0"), (dict(n_steps=1), "n_steps=1 updates")])
def test_ranges_that_make_no_sense(args, wrong):
    state = start()
    with pytest.raises(ValueError, match=wrong): range_test(state, BATCHES, **args)
    assert not any(opt.state for opt in state.optimizers)


def curve(losses, **kw): return RangeTest(tuple(2.**i for i in range(len(losses))), tuple(losses), **kw)


def test_smooth_is_the_mean_of_as_many_on_either_side():
    test = curve([0., 3., 6., 9., 30.], around=1)
    assert test.smooth == [0, 3, 6, 15, 30]
    assert curve([0., 3., 6., 9., 30.], around=2).smooth == pytest.approx([0, 3, 9.6, 15, 30])
    assert curve([5.]*4).smooth == [5.]*4
    straight = [10-.1*i for i in range(30)]
    assert curve(straight).smooth == pytest.approx(straight)  # a straight line is not late, not even near its ends


GROWING = tuple(10**(i/20) for i in range(61))  # three decades, six updates to the double


def falls_until(edge, after, high=61, slope=.06, noise=.01, **kw):
    "Flat for ten updates, down to `edge`, then on with `after` per update; and noise."
    rng = np.random.default_rng(0)
    loss = np.cumsum([5.] + [-slope if 10 <= i < edge else after if i >= edge else 0. for i in range(60)]) + noise*rng.normal(size=61)
    return RangeTest(GROWING[:high], tuple(loss[:high]), **kw)


@pytest.mark.parametrize("edge", [25, 40, 50])
@pytest.mark.parametrize("after", [0., .02, .2])
def test_the_edge_is_where_the_loss_ends_to_fall(edge, after):
    test = falls_until(edge, after)
    assert GROWING[edge-4] <= test.edge <= GROWING[edge+5] and test.suggestion == test.edge/2


def test_a_second_valley_behind_the_edge_does_not_count():
    loss = falls_until(30, .05).losses[:45] + tuple(np.linspace(4., 3.2, 16))  # collapsed to what can be known without looking
    test = RangeTest(GROWING, loss)
    assert min(test.smooth) == test.smooth[-1] and GROWING[27] <= test.edge <= GROWING[36]


def test_noise_at_the_flat_beginning_is_no_edge():
    assert falls_until(40, .1, noise=.05).edge > GROWING[30]


def test_a_run_that_blew_up_has_its_edge_at_the_end():
    with pytest.raises(UserError, match="still falls at the last factor, 100: give a larger `high`"): falls_until(60, 0., high=41).edge
    assert falls_until(60, 0., high=41, noise=0., blew_up=True).edge == GROWING[40]
    exact = RangeTest((1., 2., 4., 8., 16.), (5., 4., 3., 1., 2.), True, around=0)
    assert exact.edge == 8. and RangeTest((1., 2., 4., 8., 16.), (5., 4., 3., 1., 2.), around=0).edge == 8.
    with pytest.raises(UserError, match="still falls"): RangeTest((1., 2., 4., 8.), (5., 4., 3., 1.), around=0).edge


def test_a_loss_that_only_trembles_has_no_edge():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="does not fall beyond its noise in 61 updates, factors 1 to 1e"): RangeTest(GROWING, tuple(3+.1*rng.normal(size=61))).edge
    for n in (1, 6):
        with pytest.raises(UserError, match=f"beyond its noise in {n} updates"): RangeTest(GROWING[:n], tuple(5.-i for i in range(n)), True).edge


# --- widths ----------------------------------------------------------------------------------------------------------

def test_every_parameter_has_the_rate_of_its_part():
    base, wide = cfg(16), cfg(64, d_ff=64)  # 4 times as wide, d_ff 2 times
    model = Decoder(wide)
    groups = width_groups(model, base, .08)
    rate = {p: g["lr"] for g in groups for p in g["params"]}
    assert len(rate) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    assert all(g["lr"] == g["initial_lr"] for g in groups)
    for name, p in model.named_parameters():
        expected = .04 if "down_proj" in name else .02 if "_proj" in name or name == "norm.weight" else .08
        assert rate[p] == pytest.approx(expected), name


def test_the_base_is_the_standard():
    model = Decoder(cfg(16))
    draw_for_width(model, cfg(16), seed=3)
    for p, q in zip(model.parameters(), init_weights(Decoder(cfg(16)), seed=3).parameters()): assert torch.equal(p, q)
    [opt] = make_width_adamw(model, cfg(16), .02)
    assert [(g["lr"], g["initial_lr"], g["betas"], g["eps"], g["weight_decay"]) for g in opt.param_groups] == [(.02, .02, (.9, .95), 1e-10, 0)]


def test_only_the_last_norm_begins_elsewhere():
    model, plain = draw_for_width(Decoder(cfg(64)), cfg(16), seed=3), init_weights(Decoder(cfg(64)), seed=3)
    for (name, p), q in zip(model.named_parameters(), plain.parameters()): assert torch.equal(p, q/4 if name == "norm.weight" else q), name
    ids = BATCHES[0][0]
    assert_close(model(ids), plain(ids)/4)


def test_muon_keeps_its_rates_and_the_last_norm_gets_its_own():
    model = draw_for_width(Decoder(cfg(64)), cfg(16), seed=0)
    rates = lambda optimizers: {n: g["initial_lr"] for opt in optimizers for g in opt.param_groups for q in g["params"] for n, p in model.named_parameters() if p is q}
    ours, plain = make_width_optimizers(model, cfg(16), .5), make_optimizers(model, .5)
    assert rates(ours) == rates(plain) | {"norm.weight": rates(plain)["norm.weight"]/4}
    assert all(g["lr"] == g["initial_lr"] for opt in ours for g in opt.param_groups) and sum(len(g["params"]) for opt in ours for g in opt.param_groups) == len(list(model.parameters()))
    assert [(g["betas"], g["eps"], g["weight_decay"]) for g in ours[1].param_groups] == [((.8, .95), 1e-10, 0)]*3
    with pytest.raises(UserError, match="d_head=8, and 4"): make_width_optimizers(model, cfg(16, d_head=4, n_heads=4, n_kv_heads=4))


class Scaled(Decoder):
    "The factor of the scores, spelled out."
    def scores(self, x_BTD): return super().scores(x_BTD)/4


def test_the_weight_of_the_norm_is_a_factor_of_the_scores():
    folded, spelled = draw_for_width(Decoder(cfg(64)), cfg(16), seed=0), init_weights(Scaled(cfg(64)), seed=0)
    adamw = lambda groups: [torch.optim.AdamW(groups, betas=(.9, .95), eps=1e-16, weight_decay=0)]
    last, rest = spelled.norm.weight, [p for n, p in spelled.named_parameters() if n != "norm.weight"]
    rates = {n: g["lr"] for g in width_groups(folded, cfg(16), .01) for n, p in folded.named_parameters() if any(p is q for q in g["params"])}
    groups = [dict(params=[p], initial_lr=.01 if p is last else rates[n]) for n, p in spelled.named_parameters()]
    runs = [TrainState(folded, adamw(width_groups(folded, cfg(16), .01))), TrainState(spelled, adamw(groups))]
    paths = [[s.loss for s in train(state, BATCHES, lambda step: 1., 6, max_norm=math.inf)] for state in runs]
    assert len(rest) == len(rates)-1
    assert_close(torch.tensor(paths[0]), torch.tensor(paths[1]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("base, wrong", [(cfg(16, d_head=4, n_heads=4, n_kv_heads=4), "d_head=8, and 4 in the base"), (cfg(16, n_layers=3), "n_layers=2, and 3 in the base"), (cfg(16, vocab_size=41), "vocab_size=40, and 41 in the base")])
def test_rates_carry_over_widths_only(base, wrong):
    model = Decoder(cfg(32))
    for f in (partial(width_groups, lr=.01), draw_for_width, make_width_adamw):
        with pytest.raises(UserError, match=wrong): f(model, base)


@pytest.mark.parametrize("lr", [0., -.01, math.nan])
def test_a_rate_is_above_0(lr):
    with pytest.raises(ValueError, match=f"lr={lr} is not above 0"): width_groups(Decoder(cfg(32)), cfg(16), lr)


def test_activations_are_what_the_parts_say():
    model, ids = start(d=16).model, BATCHES[0][0]
    for layer in model.layers: nn.init.normal_(layer.mlp.down_proj.weight)
    said = activations(model, ids)
    assert list(said) == ["embedding", "block 0", "block 1", "logits"]
    assert torch.equal(said["embedding"], model.embed_tokens(ids)) and torch.equal(said["logits"], model(ids))
    assert_close(model.norm(said["block 1"]), model.hidden(ids)) and not torch.equal(said["block 0"], said["block 1"])
    assert not said["logits"].requires_grad and not any(m._forward_hooks for m in model.modules())


def test_hooks_go_when_the_model_fails():
    model = start().model
    with pytest.raises(ValueError, match="positions do not fit"): activations(model, torch.zeros(1, 99, dtype=torch.int64))
    assert not any(m._forward_hooks for m in model.modules())


def standard(d): return start(partial(make_adamw, lr=.01), d)


def transferred(d):
    model = draw_for_width(Decoder(cfg(d)), cfg(32), seed=0)
    return TrainState(model, make_width_adamw(model, cfg(32)))


def test_a_few_updates_change_the_same_at_every_width_or_not():
    widths = (32, 64, 128, 256)
    grows, stays = ({part: fit_power(widths, sizes)[0] for part, sizes in coordinate_check(f, widths, BATCHES).items()} for f in (standard, transferred))
    assert list(stays) == ["embedding", "block 0", "block 1", "logits"]
    assert max(abs(x) for x in stays.values()) < .25, stays
    assert min(grows[part] for part in ("block 0", "block 1", "logits")) > .5, grows


def test_the_check_measures_the_change_of_the_first_batch():
    changes = coordinate_check(standard, (16, 32), BATCHES, n_steps=2)
    for i, d in enumerate((16, 32)):
        state = standard(d)
        before = state.model(BATCHES[0][0])
        for k in range(2): update(state, *BATCHES[k])
        assert changes["logits"][i] == pytest.approx((state.model(BATCHES[0][0])-before).square().mean().sqrt().item(), rel=1e-5)


def test_growth_is_the_exponent():
    assert fit_power((2, 4, 8), (3., 12., 48.))[0] == pytest.approx(2) and fit_power((32, 64), (5., 5.))[0] == pytest.approx(0)


# --- the script ------------------------------------------------------------------------------------------------------

def test_the_script_goes_on_where_it_stopped(tmp_path):
    out = tmp_path/"rates.json"
    run = lambda: subprocess.run([sys.executable, SCRIPT, "--tiny", "--out", out], capture_output=True, text=True, encoding="utf-8", timeout=300, check=False)
    done = run()
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    assert {r["kind"] for r in record["rows"]} == {"run", "width", "end", "range", "warmup"} and len(record["rows"]) == len(done.stdout.splitlines())-1
    part = dict(record, rows=[r for r in record["rows"] if r["kind"] != "end"][1:])  # as if it had been stopped
    out.write_text(json.dumps(part), encoding="utf-8")
    done = run()
    assert done.returncode == 0, done.stderr
    again = json.loads(out.read_text(encoding="utf-8"))["rows"]
    key = lambda r: json.dumps(r, sort_keys=True)
    assert again[:len(part["rows"])] == part["rows"] and sorted(again, key=key) == sorted(record["rows"], key=key)

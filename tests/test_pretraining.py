"The loop: any module, any number of pieces, clipping both ways, bad values refused before any work, one value for a run, damaged checkpoints. Kills are in test_kills.py."
import json
import math
import pickle
import threading
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn

from llm_scratch.core import UserError
from llm_scratch.checkpointing import AsyncSaver, keep_last, latest, saved, snapshot
from llm_scratch.engines import DDPEngine, Engine
from llm_scratch.pretraining import Batches, Muon, NotFinite, TrainState, add_gradients, load_checkpoint, make_adamw, make_optimizers, save_checkpoint, save_shards, train, update, wsd

ABOUT = dict(seed=0)


class Bigram(nn.Module):
    "Any module that maps ids to logits will do; this one draws random numbers while it trains."
    def __init__(self, width=12):
        super().__init__()
        self.table, self.norm, self.out, self.drop = nn.Embedding(16, width), nn.LayerNorm(width), nn.Linear(width, 16, bias=False), nn.Dropout(.2)

    def forward(self, ids): return self.out(self.drop(self.norm(self.table(ids))))


def _state(seed=0, **kw):
    torch.manual_seed(seed)
    model = Bigram(**kw)
    return TrainState(model, make_optimizers(model))


BATCHES = Batches(np.arange(400) % 13, 8, 4)


def _train(state, n, until=None):
    for step in train(state, BATCHES, partial(wsd, n_steps=n, warmup=min(3, n)), n):
        if step.n == until: break
    return state


def _same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@given(n=st.integers(16, 80), batch_size=st.integers(1, 5), world=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_batches_read_every_window_of_an_epoch_once_from_the_first_step_on(n, batch_size, world):
    parts = [Batches(np.arange(n), 8, batch_size, seed=n, rank=r, world=world) for r in range(world)]
    first = [int(w[0]) for step in range(9) for part in parts for w in part[step][0]]
    for epoch in range(len(first)//(k := parts[0].n_windows)):
        starts = sorted(first[epoch*k:(epoch+1)*k])
        assert len(starts) == n//8-1 and {b-a for a, b in zip(starts, starts[1:])} <= {8} and 0 <= starts[0] < 8


@pytest.mark.parametrize("at", [1, 7, 19])
def test_saved_loaded_and_continued_equals_undisturbed_even_with_dropout(at, tmp_path):
    whole = _train(_state(), 20)
    first = _train(_state(), 20, until=at)
    path = save_checkpoint(first, tmp_path, ABOUT)
    torch.manual_seed(99)  # whatever happened in between
    second = _train(load_checkpoint(_state(seed=5), path, ABOUT), 20)
    assert second.step == 20 and _same(whole.model.state_dict(), second.model.state_dict())


def test_checkpoints_sort_by_number(tmp_path):
    assert latest(tmp_path/"none") is None
    state = _state()
    for step in (5, 1000000, 40): state.step = step; save_checkpoint(state, tmp_path, ABOUT)
    (tmp_path/".000099.123.new").mkdir()  # what a killed process leaves
    assert list(saved(tmp_path)) == [5, 40, 1000000]


@pytest.mark.parametrize("save", [save_checkpoint, save_shards])
def test_only_those_stay_that_keep_names(save, tmp_path):
    state = _state()
    for state.step in range(1, 6): save(state, tmp_path, ABOUT, keep_last(2))
    assert list(saved(tmp_path)) == [4, 5]


def _flip(f):
    data = bytearray(f.read_bytes()); data[len(data)//2] ^= 1; f.write_bytes(data)


@pytest.mark.parametrize("spoil, named", [(lambda p: _flip(p/"state.safetensors"), "state.safetensors"), (lambda p: _flip(p/"state.json"), "state.json"),
    (lambda p: (p/"state.json").unlink(), "state.json"), (lambda p: (p/"manifest.json").unlink(), "manifest.json"), (lambda p: (p/"manifest.json").write_text("{"), "manifest.json")])
def test_a_damaged_checkpoint_is_one_line_and_touches_nothing(spoil, named, tmp_path):
    path = save_checkpoint(_train(_state(), 3), tmp_path, ABOUT)
    spoil(path)
    state = _state()
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    with pytest.raises(UserError) as e: load_checkpoint(state, path, ABOUT)
    assert named in str(e.value) and "delete the folder" in str(e.value) and "\n" not in str(e.value)
    assert _same(before, state.model.state_dict()) and state.step == 0


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = save_checkpoint(_state(), tmp_path, dict(seed=0, n_steps=9))
    with pytest.raises(UserError, match="n_steps=9, not n_steps=10"): load_checkpoint(_state(), path, dict(seed=0, n_steps=10))


def test_a_checkpoint_brings_its_rates_and_wants_its_optimizers(tmp_path):
    state = _state()
    state.optimizers = make_optimizers(state.model, lr=.5)
    path = save_checkpoint(state, tmp_path, ABOUT)
    assert load_checkpoint(_state(), path, ABOUT).optimizers[0].param_groups[0]["initial_lr"] == .01  # not .02, as the fresh ones have it
    model = Bigram()
    with pytest.raises(UserError, match="000000 was saved with other optimizers"): load_checkpoint(TrainState(model, make_adamw(model)), path, ABOUT)


@given(n_micro=st.integers(1, 4), hidden=st.lists(st.integers(0, 31), max_size=25))
@settings(max_examples=25, deadline=None)
def test_gradients_do_not_depend_on_the_pieces(n_micro, hidden):
    model = _state().model.eval()
    ids, targets = (x.clone() for x in BATCHES[0])
    targets.view(-1)[hidden] = -1
    grads = []
    for pieces in (1, n_micro):
        model.zero_grad()
        loss, n = add_gradients(model, ids, targets, pieces)
        grads.append((torch.tensor(loss), *(p.grad.clone() for p in model.parameters())))
    assert n == 32-len(set(hidden))
    for a, b in zip(*grads): torch.testing.assert_close(a, b)


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched():
    state = _train(_state(), 5)
    with torch.no_grad(): state.model.out.weight[0, 0] = torch.inf
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    with pytest.raises(NotFinite, match=r"at step 6: lower the learning rate, or look at this batch, batches\[5\]") as e: next(train(state, BATCHES, lambda step: 1., 9))
    assert _same(before, state.model.state_dict()) and state.step == 5
    assert isinstance(e.value, UserError) and e.value.step == 6 and math.isnan(e.value.grad_norm) and not math.isfinite(e.value.loss)
    for a, b in zip((e.value.ids_BT, e.value.targets_BT), BATCHES[5]): assert torch.equal(a, b)
    again = pickle.loads(pickle.dumps(e.value))
    assert type(again) is NotFinite and str(again) == str(e.value) and torch.equal(again.ids_BT, e.value.ids_BT)


def test_an_infinite_loss_with_a_fine_gradient_stops_too():
    "A target that has no chance at all: the loss is infinite, probability minus truth is not."
    state = _train(_state(), 2)
    state.model.out.register_forward_hook(lambda m, args, out: out.index_fill(-1, BATCHES[2][1][0, 0], -math.inf))
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    with pytest.raises(NotFinite) as e: next(train(state, BATCHES, lambda step: 1., 9))
    assert e.value.loss == math.inf and all(p.grad.isfinite().all() for p in state.model.parameters())
    assert _same(before, state.model.state_dict()) and state.step == 2


@pytest.mark.parametrize("bounds", [{}, dict(max_value=1.)], ids=str)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_no_number_stops_too_however_it_is_clipped(bad, bounds):
    "The loss is fine, and an infinite element could be cut to 1: it is refused all the same."
    state = _train(_state(), 2)
    state.model.out.weight.register_hook(lambda g: g.index_fill(0, torch.tensor(0), bad))
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    with pytest.raises(NotFinite) as e: next(train(state, BATCHES, lambda step: 1., 9, **bounds))
    assert math.isfinite(e.value.loss) and not math.isfinite(e.value.grad_norm) and e.value.step == 3
    assert _same(before, state.model.state_dict()) and state.step == 2


def test_every_parameter_has_one_optimizer():
    state = _state()
    held = [p for opt in state.optimizers for g in opt.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(state.model.parameters()))
    assert [p.ndim for g in state.optimizers[0].param_groups for p in g["params"]] == [2]


def test_the_shape_of_the_schedule():
    factors = [wsd(i, 1000, warmup=100, decay=.5) for i in range(1000)]
    assert factors[0] == .01 and factors[99] == 1 and factors[98] == .99 and set(factors[99:501]) == {1.} and factors[501] == 499/500 and factors[750] == .5 and factors[999] == .002
    assert [wsd(i, 1000) for i in (0, 18, 19, 20)] == [.05, .95, 1., 1.]
    assert [wsd(i, 8) for i in range(3)] == [1/8, 2/8, 3/8] and wsd(0, 1) == 1 and wsd(0, 8, warmup=8) == 1/8 and wsd(0, 8, warmup=1) == 1


@pytest.mark.parametrize("bad, says", [(dict(warmup=101), "warmup=101 .* n_steps=100"), (dict(warmup=0), "warmup=0 .* n_steps=100"), (dict(warmup=-3), "warmup=-3"), (dict(decay=0.), "decay=0.0"), (dict(decay=1.01), "decay=1.01")], ids=str)
def test_a_schedule_that_does_not_fit_is_refused_at_any_step(bad, says):
    for step in (0, 50, 99):
        with pytest.raises(ValueError, match=says): wsd(step, 100, **bad)


@given(n_steps=st.integers(2, 5000), warmup=st.integers(1, 100), decay=st.floats(.05, 1))
def test_the_schedule_stays_between_zero_and_one(n_steps, warmup, decay):
    warmup = min(warmup, n_steps)
    factors = [wsd(i, n_steps, warmup, decay) for i in range(n_steps)]
    assert all(0 < f <= 1 for f in factors) and wsd(n_steps, n_steps, warmup, decay) == 0


# --- clipping --------------------------------------------------------------------------------------------------

def _sgd(model): return [torch.optim.SGD([dict(params=list(model.parameters()), initial_lr=1.)], lr=1.)]  # a step shows the gradient


@given(max_norm=st.one_of(st.just(math.inf), st.floats(.001, 2)), max_value=st.one_of(st.just(math.inf), st.floats(.0001, .5)), n_micro=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_clipping_is_each_element_and_then_the_length(max_norm, max_value, n_micro):
    model = _state().model.eval()
    before = [p.detach().clone() for p in model.parameters()]
    add_gradients(model, *BATCHES[0], 1)
    raw = [p.grad.clone() for p in model.parameters()]
    length = lambda grads: sum(g.double().square().sum().item() for g in grads)**.5
    cut = [g.clamp(-max_value, max_value) for g in raw]
    wanted = [g*min(1., max_norm/(length(cut)+1e-6)) for g in cut]
    step = update(TrainState(model, _sgd(model)), *BATCHES[0], n_micro=n_micro, max_norm=max_norm, max_value=max_value)
    assert step.grad_norm == pytest.approx(length(raw), rel=1e-4), "the length that is told is that of the gradient as it came"
    for p, old, g in zip(model.parameters(), before, wanted): torch.testing.assert_close(p.detach()-old, -g, atol=1e-6, rtol=1e-4)


def test_without_bounds_nothing_is_clipped():
    model = _state().model.eval()
    with torch.no_grad(): model.out.weight *= 30
    before = model.out.weight.detach().clone()
    step = update(TrainState(model, _sgd(model)), *BATCHES[0], max_norm=math.inf)
    assert step.grad_norm > 1
    torch.testing.assert_close(before - model.out.weight.detach(), model.out.weight.grad)


def test_train_hands_its_bounds_on():
    ends = [list(train(TrainState(m := _state().model.eval(), _sgd(m)), BATCHES, lambda step: 1., 3, **bounds))[-1].loss for bounds in ({}, dict(max_norm=1e-6), dict(max_norm=math.inf, max_value=1e-8))]
    assert ends[0] < ends[1]-.01 and ends[1] == pytest.approx(ends[2], abs=1e-3)


# --- refused before any work -----------------------------------------------------------------------------------

class Untouched(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, ids): raise AssertionError("work was done")


REFUSED = [(dict(max_norm=0.), "max_norm=0.0 is not above 0"), (dict(max_norm=-1.), "max_norm=-1.0"), (dict(max_norm=math.nan), "max_norm=nan"), (dict(max_value=0.), "max_value=0.0 is not above 0"),
           (dict(max_value=-1.), "max_value=-1.0"), (dict(n_micro=0), "n_micro=0 pieces of a batch of 4"), (dict(n_micro=5), "n_micro=5 pieces of a batch of 4 sequences: give from 1 to 4"), (dict(n_micro=-1), "n_micro=-1")]


@pytest.mark.parametrize("bad, says", REFUSED, ids=str)
def test_what_makes_no_sense_is_refused_before_any_work(bad, says):
    model = Untouched()
    state = TrainState(model, make_adamw(model))
    with pytest.raises(ValueError, match=says): update(state, *BATCHES[0], **bad)
    with pytest.raises(ValueError, match=says): next(train(state, BATCHES, lambda step: 1., 9, **bad))
    if "n_micro" not in bad:  # known without a batch, so said at the call
        with pytest.raises(ValueError, match=says): train(state, None, None, 9, **bad)
    assert state.step == 0


@pytest.mark.parametrize("factor", [-.1, math.nan])
def test_a_rate_below_zero_is_refused_before_any_work(factor):
    state = TrainState(m := Untouched(), make_adamw(m), step=7)
    with pytest.raises(ValueError, match=f"the schedule gives {factor} at step 7.*shorter run"): next(train(state, BATCHES, lambda step: factor, 9))


def test_a_factor_of_zero_moves_nothing():
    state = _state()
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    assert update(state, *BATCHES[0], 0.).lr == 0 and _same(before, state.model.state_dict())


def test_nothing_to_learn_from_is_refused():
    ids, targets = BATCHES[0]
    with pytest.raises(UserError, match="no target of this batch counts"): update(TrainState(m := Untouched(), make_adamw(m)), ids, torch.full_like(targets, -1))


@pytest.mark.parametrize("n_steps", [0, -5])
def test_a_run_has_an_update(n_steps):
    with pytest.raises(ValueError, match=f"n_steps={n_steps}"): train(_state(), BATCHES, lambda step: 1., n_steps)


def test_a_run_that_is_complete_makes_no_further_update():
    state = _train(_state(), 3)
    assert list(train(state, BATCHES, lambda step: 1., 3)) == [] and state.step == 3
    assert [step.n for step in train(state, BATCHES, lambda step: 1., 5)] == [4, 5]


@pytest.mark.parametrize("lr", [0., -.1, math.nan])
@pytest.mark.parametrize("make", [make_optimizers, make_adamw, lambda model, lr: Muon(model.parameters(), lr)], ids=["muon", "adamw", "class"])
def test_optimizers_want_a_rate_above_zero(make, lr):
    with pytest.raises(ValueError, match=f"lr={lr} is not above 0"): make(_state().model, lr)


@pytest.mark.parametrize("bad", [dict(context_len=0, batch_size=2), dict(context_len=4, batch_size=0), dict(context_len=-1, batch_size=1)], ids=str)
def test_batches_have_a_size(bad):
    with pytest.raises(ValueError, match=f"context_len={bad['context_len']} and batch_size={bad['batch_size']}"): Batches(np.arange(99), **bad)


@pytest.mark.parametrize("n_micro", [1, 2, 3, 4])
def test_there_are_as_many_pieces_as_asked_for(n_micro):
    model, sizes = _state().model, []
    model.table.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    add_gradients(model, *BATCHES[0], n_micro)
    assert len(sizes) == n_micro and sum(sizes) == 4 and max(sizes)-min(sizes) <= 1


def test_batches_may_change_their_shape_from_step_to_step():
    ramp = [tuple(x[:rows, :columns] for x in BATCHES[i]) for i, (rows, columns) in enumerate([(1, 2), (2, 8), (4, 8)])]
    assert [step.n_tokens for step in train(_state(), ramp, lambda step: 1., 3)] == [2, 16, 32]


# --- mixed precision -------------------------------------------------------------------------------------------

def test_bfloat16_multiplies_and_float32_remembers():
    state = _state()
    state.engine, seen = Engine("bf16"), []
    state.model.out.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    for _ in train(state, BATCHES, lambda step: 1., 2, n_micro=2): assert not torch.is_autocast_enabled("cpu"), "the paused context leaks into the caller"
    assert set(seen) == {torch.bfloat16}
    kept = [*state.model.parameters(), *(p.grad for p in state.model.parameters()), *(x for opt in state.optimizers for values in opt.state.values() for x in values.values())]
    assert {x.dtype for x in kept} == {torch.float32}


# --- one value -------------------------------------------------------------------------------------------------

def test_a_state_is_one_value_that_another_goes_on_from():
    first = _train(_state(), 20, until=7)
    value = snapshot(first.state_dict())
    second = _state(seed=5)
    torch.manual_seed(99)
    second.load_state_dict(value)
    steps = list(train(second, BATCHES, partial(wsd, n_steps=20, warmup=3), 20))
    drawn = torch.get_rng_state()
    whole = _train(_state(), 20)
    assert steps[0].n == 8 and _same(whole.state_dict()["tensors"], second.state_dict()["tensors"]) and torch.equal(drawn, torch.get_rng_state())


def test_a_value_has_all_that_changes_and_json_holds_its_numbers():
    value = _train(_state(), 3).state_dict()
    assert value.keys() == {"step", "groups", "rng", "tensors"} and value["step"] == 3 and value["rng"].shape == (1, len(torch.get_rng_state()))
    names = {name.partition(".")[0] for name in value["tensors"]}
    assert names == {"model", "optimizer"} and {"optimizer.out.weight.velocity", "optimizer.table.weight.exp_avg_sq", "model.norm.bias"} <= value["tensors"].keys()
    assert len(json.loads(json.dumps(value["groups"]))) == 3 and all("params" not in g for g in value["groups"])


def test_two_states_filled_from_one_value_go_their_own_ways():
    value = _train(_state(), 3).state_dict()
    one, two = _state(), _state()
    for s in (one, two): s.load_state_dict(value)
    before = snapshot(two.state_dict()["tensors"])
    _train(one, 9)
    assert _same(before, two.state_dict()["tensors"]) and not _same(before, one.state_dict()["tensors"])


def test_a_value_of_other_optimizers_or_another_model_is_refused():
    value = _train(_state(), 2).state_dict()
    model = Bigram()
    with pytest.raises(UserError, match="other optimizers"): TrainState(model, make_adamw(model)).load_state_dict(value)
    with pytest.raises(UserError, match="another model"): _state(width=8).load_state_dict(value)


# --- in the background, in parts, and as before ----------------------------------------------------------------

def test_the_background_writes_the_moment_at_which_it_was_told_to(tmp_path):
    state = _train(_state(), 20, until=4)
    path = save_checkpoint(state, tmp_path/"plain", ABOUT)
    with AsyncSaver() as saver:
        said = save_checkpoint(state, tmp_path/"background", ABOUT, saver=saver)
        _train(state, 20)  # goes on while it is written
    assert said == tmp_path/"background"/"000004" == latest(tmp_path/"background")
    for f in path.iterdir(): assert f.read_bytes() == (said/f.name).read_bytes(), f.name


def test_training_goes_on_while_the_background_writes(tmp_path, monkeypatch):
    from llm_scratch import pretraining
    write, go, state = pretraining.save_file, threading.Event(), _train(_state(), 20, until=2)
    monkeypatch.setattr(pretraining, "save_file", lambda *args: go.wait(20) and write(*args))
    with AsyncSaver() as saver:
        save_checkpoint(state, tmp_path, ABOUT, saver=saver)
        _train(state, 20)
        assert state.step == 20 and not saved(tmp_path)
        go.set()
    assert list(saved(tmp_path)) == [2]


def test_what_goes_wrong_in_the_background_is_told(tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(UserError, match="was not saved"), AsyncSaver() as saver: save_checkpoint(_state(), tmp_path/"file", ABOUT, saver=saver)


def test_the_background_is_for_one_process(tmp_path):
    state = _state()
    state.engine = DDPEngine.__new__(DDPEngine)
    with pytest.raises(UserError, match="for one process"): save_checkpoint(state, tmp_path, ABOUT, saver=AsyncSaver())
    assert not list(tmp_path.iterdir())


def test_the_format_of_checkpoints_is_what_it_was(tmp_path):
    "Runs of earlier versions go on: these are the files and keys that have been read since there were engines."
    path = save_checkpoint(_train(_state(), 2), tmp_path/"whole", ABOUT)
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "rng.safetensors", "state.json", "state.safetensors"]
    saved_json = json.loads((path/"state.json").read_text())
    assert saved_json.keys() == {"step", "form", "about", "groups"} and (saved_json["step"], saved_json["form"], saved_json["about"]) == (2, "whole", ABOUT)
    assert load_file(path/"rng.safetensors").keys() == {"rng"} and {"model.out.weight", "optimizer.out.weight.velocity"} <= load_file(path/"state.safetensors").keys()
    parts = save_shards(_train(_state(), 2), tmp_path/"parts", ABOUT)
    assert sorted(p.name for p in parts.iterdir()) == ["manifest.json", "rng.safetensors", "shards", "state.json"] and json.loads((parts/"state.json").read_text())["form"] == "torch"


def test_only_muon_s_momentum_grows():
    "Other optimizers have a momentum too, and it is their owner's."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    optimizers = [Muon([model[1].weight]), torch.optim.SGD([model[0].weight, model[1].bias], lr=.1, momentum=.3)]
    for group in (g for opt in optimizers for g in opt.param_groups): group["initial_lr"] = group["lr"]
    update(TrainState(model, optimizers), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    assert [opt.param_groups[0]["momentum"] for opt in optimizers] == [.85, .3]

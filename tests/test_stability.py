"Runs that meet bad batches: what is passed over, gone back to, kept for a look; on one process and on two. And compiling that may fail, and noise with a known answer."
import json
import math
import sys
import warnings
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.checkpointing import keep_last, latest, saved
from llm_scratch.core import UserError
from llm_scratch.engines import DeepSpeedEngine, Engine, torchrun
from llm_scratch.planning import checkpoint_blocks
from llm_scratch.pretraining import Batches, NotFinite, TrainState, add_gradients, make_optimizers, save_checkpoint, save_shards, train, update, wsd
from llm_scratch.stability import (Checked, Culprit, Guard, Noise, Stuck, Without, batch_number, careful_train, careful_update, compile_auto, compile_in_place, compile_pays, critical_batch, explained,
                                   find_nonfinite, gradient_length, load_bad_batch, load_careful, measure_noise, roll_back, save_bad_batch, save_careful, split_noise)

CFG = ModelConfig(97, context_len=16, n_layers=2, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, d_head=8)
RNG = np.random.default_rng(0)
PLAIN = Batches(np.where(RNG.random(3000) < .3, RNG.integers(0, 61, 3000), np.arange(3000)*7 % 61), 16, 8)  # a rule to learn, and noise that stays
N, ABOUT = 56, dict(seed=0)
RATE = partial(wsd, n_steps=N, warmup=2, decay=.4)


class Spoiled:
    "Garbage, of ids that never come otherwise, in place of some batches."
    def __init__(self, bad, batches=PLAIN): self.bad, self.batches = bad, batches

    def __getitem__(self, number):
        ids, targets = self.batches[number]
        return (ids, torch.full_like(targets, 90)) if number in self.bad else (ids, targets)


def fresh(seed=0):
    model = init_weights(Decoder(CFG), seed)
    return TrainState(model, make_optimizers(model))


def tensors(state): return {k: x.clone() for k, x in state.engine.full_state(state.model, state.optimizers).items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- which batch is whose -------------------------------------------------------------------------------------------

@given(st.integers(0, 60), st.sets(st.integers(0, 60)))
def test_the_batch_of_an_update_is_the_so_manieth_that_is_left(step, passed):
    left = [n for n in range(200) if n not in passed]
    assert batch_number(step, sorted(passed)) == left[step]


# --- passing over ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def clean():
    "Plain training, and the same by a careful run that has nothing to refuse."
    one, two, guard = fresh(), fresh(), Guard()
    steps = list(train(one, PLAIN, RATE, N))
    careful = list(careful_train(two, PLAIN, RATE, N, guard))
    return steps, careful, tensors(one), tensors(two), guard


def test_a_careful_run_without_trouble_is_the_plain_one(clean):
    steps, careful, one, two, guard = clean
    assert steps == careful and same(one, two) and guard.passed == [] and guard.rollbacks == []
    assert guard.losses == [s.loss for s in steps[-50:]] and guard.norms == [math.log(s.grad_norm) for s in steps[-50:]]


@pytest.mark.parametrize("how", [dict(), dict(n_micro=2, max_norm=.1), dict(max_value=.01)], ids=str)
def test_what_is_passed_over_has_never_been(how):
    bad = [30, 31, 33, 50]
    state, guard = fresh(), Guard()
    steps = list(careful_train(state, Spoiled(bad), RATE, N, guard, **how))
    assert guard.passed == bad and state.step == N and [s.n for s in steps] == list(range(1, N+1))
    other = fresh()
    assert steps == list(train(other, Without(PLAIN, bad), RATE, N, **how)) and same(tensors(state), tensors(other))


def test_limit_inf_refuses_nothing_but_tells():
    state, other, guard, scores = fresh(), fresh(), Guard(), {}
    for step in careful_train(state, Spoiled([30]), RATE, N, guard, limit=math.inf): scores[step.n] = guard.score
    list(train(other, Spoiled([30]), RATE, N))
    assert guard.passed == [] and same(tensors(state), tensors(other))
    assert max(scores, key=scores.get) == 31 and scores[31] > 6 and scores[20] == 0 != scores[21]


def test_a_refused_batch_moves_nothing_and_is_not_remembered():
    state, guard = fresh(), Guard()
    for _ in careful_train(state, PLAIN, RATE, 25, guard): pass
    before, rates = tensors(state), [g["lr"] for o in state.optimizers for g in o.param_groups]
    recent = list(guard.losses), list(guard.norms)
    assert careful_update(state, *Spoiled([0])[0], 0.5, guard) is None
    assert same(before, tensors(state)) and state.step == 25 and (guard.losses, guard.norms) == recent and guard.score > 6
    assert rates == [g["lr"] for o in state.optimizers for g in o.param_groups]
    assert careful_update(state, *Spoiled([0])[0], 0.5, guard, limit=math.inf).n == 26


@pytest.mark.parametrize("loss, norm, refused", [(3., 1., True), (1., 9., True), (1., 1., False), (.1, .1, False)])
def test_loss_and_length_are_both_looked_at(loss, norm, refused):
    guard = Guard()
    for i in range(30):
        assert guard.judge(9.*(i == 19), 9.) == 0 or i >= 20
        guard.remember(1 + .02*(i % 3), math.exp(.05*(i % 3)))
    assert (guard.judge(loss, norm) > 6) == refused


def test_the_guard_remembers_fifty_updates():
    guard = Guard()
    for i in range(70): guard.remember(float(i), 1.)
    assert guard.losses == [float(i) for i in range(20, 70)] and len(guard.norms) == 50


def test_a_damaged_model_is_told_from_bad_batches():
    state, guard = fresh(), Guard()
    steps = careful_train(state, PLAIN, RATE, N, guard, patience=4)
    for _ in range(30): next(steps)
    with torch.no_grad(): state.model.embed_tokens.weight.mul_(-1)
    with pytest.raises(Stuck, match="^4 batches in a row, 30 to 33, lie far above the 30 before, whose median loss is .*Roll back"): next(steps)
    assert guard.passed == [] and state.step == 30  # the batches are innocent


def test_patience_counts_batches_in_a_row_only():
    state, guard = fresh(), Guard()
    list(careful_train(state, Spoiled([25, 26, 28, 29]), RATE, 40, guard, patience=3))
    assert guard.passed == [25, 26, 28, 29]


def test_no_number_stops_a_careful_run():
    state, guard = fresh(), Guard()
    with torch.no_grad(): state.model.norm.weight[3] = math.nan
    with pytest.raises(NotFinite): next(careful_train(state, PLAIN, RATE, N, guard))
    assert state.step == 0 and guard.losses == []


def test_deepspeed_cannot_refuse():
    state = fresh()
    state.engine = object.__new__(DeepSpeedEngine)
    with pytest.raises(UserError, match="limit=inf and roll back"): careful_train(state, PLAIN, RATE, N, Guard())
    careful_train(state, PLAIN, RATE, N, Guard(), limit=math.inf)


# --- resume and rollback --------------------------------------------------------------------------------------------

def go(folder, bad=(30, 31, 44), stop=None, limit=6., seed=0, every=5):
    "A run that saves, goes on where it was, and rolls back when a spike that it has let in says so."
    state, guard = fresh(seed), Guard()
    if path := latest(folder): guard = load_careful(state, path, ABOUT)
    for step in careful_train(state, Spoiled(bad), RATE, N, guard, limit=limit):
        if guard.score > 6: roll_back(state, guard, folder, ABOUT, margin=8)
        elif step.n % every == 0: save_careful(state, guard, folder, ABOUT)
        if step.n == stop: return state, guard
    return state, guard


@pytest.mark.parametrize("limit", [6., math.inf], ids=["pass over", "roll back"])
def test_resumed_equals_uninterrupted(tmp_path, limit):
    "Stopped between saves, after what is passed over, or between two rollbacks."
    whole, told = go(tmp_path/"whole", limit=limit)
    assert told.passed == [30, 31, 44] if limit == 6 else len(told.rollbacks) == 2
    for stop in (29, 33, 47):
        go(tmp_path/f"{stop}", limit=limit, stop=stop)
        again, guard = go(tmp_path/f"{stop}", limit=limit, seed=5)
        assert guard == told and again.step == N and same(tensors(whole), tensors(again))


def test_a_rolled_back_run_never_saw_what_led_there(tmp_path):
    state, guard = go(tmp_path, bad=[33], limit=math.inf)
    assert guard.rollbacks == [[34, 25]] and guard.passed == list(range(25, 44))  # ten more than were learned from; the newest that is 8 old, not the newest
    other = fresh()
    list(train(other, Without(PLAIN, guard.passed), RATE, N))
    assert same(tensors(state), tensors(other))


def test_a_rollback_is_on_the_disk_and_the_other_future_is_gone(tmp_path):
    state, guard = fresh(), Guard()
    for step in careful_train(state, PLAIN, RATE, 31, guard):
        if step.n % 5 == 0: save_careful(state, guard, tmp_path, ABOUT)
    roll_back(state, guard, tmp_path, ABOUT, margin=8, ahead=2)
    assert state.step == 20 and list(saved(tmp_path)) == [5, 10, 15, 20] and latest(tmp_path).name == "000020"
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["000005", "000010", "000015", "000020", "latest"]
    other = fresh(3)
    assert load_careful(other, latest(tmp_path), ABOUT) == guard and other.step == 20 and same(tensors(state), tensors(other))
    assert guard.passed == list(range(20, 33)) and len(guard.losses) == 20 and guard.rollbacks == [[31, 20]]


def test_rollbacks_that_cannot_help_are_told(tmp_path):
    state, guard = fresh(), Guard()
    run = lambda n: list(careful_train(state, PLAIN, RATE, n, guard))
    run(5); save_careful(state, guard, tmp_path, ABOUT); run(12)
    with pytest.raises(UserError, match="no checkpoint in .* is 8 updates older than update 12: save more often"): roll_back(state, guard, tmp_path, ABOUT, margin=8)
    assert state.step == 12
    for n in (12, 10, 6):  # what has been gone back to is trusted, however young
        state.step = min(state.step, n)
        roll_back(state, guard, tmp_path, ABOUT, margin=7, ahead=0)
        assert state.step == 5
        run(12)
    with pytest.raises(UserError, match="went back to update 5 3 times.*Lower the learning rate"): roll_back(state, guard, tmp_path, ABOUT, margin=7)
    assert guard.passed == list(range(5, 18)) and state.step == 12


def test_pruned_checkpoints_and_shards_and_plain_ones(tmp_path):
    state, guard = fresh(), Guard([1], [2.], [0.], [[3, 4]], 5.)
    save_careful(state, guard, tmp_path/"a", ABOUT, keep_last(1), save=save_shards)
    assert load_careful(fresh(1), tmp_path/"a"/"000000", ABOUT) == guard
    save_checkpoint(state, tmp_path/"b", ABOUT)
    assert load_careful(fresh(1), tmp_path/"b"/"000000", ABOUT) == Guard()
    with pytest.raises(UserError, match="seed=0, not seed=1"): load_careful(fresh(), tmp_path/"a"/"000000", dict(seed=1))
    with pytest.raises(UserError, match="guard"): __import__("llm_scratch.pretraining").pretraining.load_checkpoint(fresh(), tmp_path/"a"/"000000", ABOUT)


@pytest.mark.parametrize("old, new", [('"about"', '"abouu"'), ('"guard"', '"gward"'), ("{", "!")])
def test_a_damaged_checkpoint_is_one_line(tmp_path, old, new):
    path = save_careful(fresh(), Guard(), tmp_path, ABOUT)
    text = (path/"state.json").read_text(encoding="utf-8")
    (path/"state.json").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match="state.json is (corrupt|not JSON).*delete the folder"): load_careful(fresh(), path, ABOUT)


# --- on two processes -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
        torchrun(2, "stability_ranks", str(folder), timeout=500)
    return json.loads((folder/"found.json").read_text(encoding="utf-8"))


ENGINES = pytest.mark.parametrize("engine", ["ddp", "fsdp"])


@ENGINES
def test_ranks_pass_over_the_same_batches_though_one_alone_has_seen_the_garbage(ranks, engine):
    found = ranks[f"passing_over {engine}"]
    assert found["guards"][0] == found["guards"][1] and found["guards"][0][0] == [30, 31, 44] and found["apart"] < 5e-6


@ENGINES
def test_ranks_roll_back_together(ranks, engine):
    found = ranks[f"rolling_back {engine}"]
    assert found["guard"] == [list(range(25, 44)), [[34, 25]]] and found["apart"] < 5e-6
    assert found["resumed"] == [40, True] and found["names"] == [f"{n:06d}" for n in range(5, 41, 5)]


def test_every_rank_says_which_rank_and_where(ranks):
    found = ranks["breaking ddp"]
    assert found["files"] == ["step000001-rank0", "step000001-rank1"] and found["said"][0] == found["said"][1]
    assert "Process 1: the output of layers.1.mlp.up_proj is the first that is no number, in all 4 sequences" in found["said"][0] and "process 0" not in found["said"][0] and "step000001-rank*" in found["said"][0]


@ENGINES
def test_noise_over_ranks_is_that_of_one_process(ranks, engine):
    found = ranks[f"noise {engine}"]
    assert found["ranks"][0] == found["ranks"][1]
    for key, x in found["plain"].items(): assert math.isclose(found["ranks"][0][key], x, rel_tol=1e-3)


def test_a_model_that_is_cut_is_looked_at(ranks):
    assert ranks["nothing"] == ["None", "None"] and all(c.startswith("the output of layers.0.mlp.down_proj") for c in ranks["cut"])


# --- a batch for a look ---------------------------------------------------------------------------------------------

def test_a_bad_batch_comes_back(tmp_path):
    ids, targets = PLAIN[3]
    path = save_bad_batch(tmp_path, NotFinite(4, math.nan, math.inf, ids, targets), rank=2)
    assert path == tmp_path/"step000004-rank2" and sorted(p.name for p in path.iterdir()) == ["about.json", "batch.safetensors"]
    json.loads((path/"about.json").read_text(encoding="utf-8"), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    error = load_bad_batch(path)
    assert torch.equal(error.ids_BT, ids) and torch.equal(error.targets_BT, targets) and error.step == 4 and math.isnan(error.loss) and error.grad_norm == math.inf
    assert str(error) == str(NotFinite(4, math.nan, math.inf, ids, targets))
    with pytest.raises(UserError, match="about.json is missing"): load_bad_batch(tmp_path/"nothing")


def plant(model, name, index, value=math.inf):
    with torch.no_grad(): model.get_parameter(name)[index] = value
    return model


def wide(seed=0): # so that every weight matters
    model = init_weights(Decoder(CFG), seed)
    for p in model.parameters(): p.data.add_(.1*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


@pytest.mark.parametrize("name, index", [(n, tuple(0 for _ in p.shape)) for n, p in Decoder(CFG).named_parameters() if n != "embed_tokens.weight"])
def test_the_module_with_the_bad_weight_is_named(name, index):
    found = find_nonfinite(plant(wide(), name, index), *PLAIN[0])
    assert found.module == name.rpartition(".")[0] and found.moment == "output" and found.weights == ["weight"] and found.rows == [*range(8)]
    assert "all 8 sequences (its weight is no number)" in str(found)


def test_sequences_are_named():
    ids = torch.arange(40).reshape(4, 10)
    found = find_nonfinite(plant(wide(), "embed_tokens.weight", 17), ids, ids)
    assert (found.module, found.rows) == ("embed_tokens", [1]) and "in sequence 1 of 4" in str(found)
    assert "sequences 1, 3 of 4" in str(find_nonfinite(plant(plant(wide(), "embed_tokens.weight", 17), "embed_tokens.weight", 30), ids, ids))


class Odd(nn.Module):
    "Fails where it is told to: in its own arithmetic, in the loss, or on the way back."
    def __init__(self, where): super().__init__(); self.where, self.table, self.inner, self.out = where, nn.Embedding(97, 8), nn.Identity(), nn.Linear(8, 97)

    def forward(self, ids):
        x = self.table(ids)
        if self.where == "arithmetic": x = x / (ids != 5).float()[..., None]
        if self.where == "gradient": x = x + ((self.inner(x)-self.inner(x).detach())*(ids == 5)[..., None]).abs().sqrt()  # sqrt has no slope at 0
        x = self.out(self.inner(x))
        return torch.where((ids == 5)[..., None], 3e38*(1 - torch.arange(97) % 2*2.), x) if self.where == "loss" else x


@pytest.mark.parametrize("where", ["arithmetic", "loss", "gradient"])
def test_what_no_weight_is_to_blame_for(where):
    ids = torch.tensor([[1, 2], [3, 5], [6, 7]])
    model = Odd(where)
    found = find_nonfinite(model, ids, ids)
    assert found.moment == where and found.weights == [] and (found.rows == [1] or where == "gradient")
    assert found.module == dict(arithmetic="", loss="", gradient="inner")[where]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_to_find(): assert find_nonfinite(wide(), *PLAIN[0]) is None and find_nonfinite(checkpoint_blocks(wide()), *PLAIN[0]) is None


class Half(Engine):
    def forward(self, model, ids):
        with torch.autocast("cpu", torch.float16): return model(ids)


def test_what_overflows_in_float16_does_not_in_bfloat16():
    model = wide()
    with torch.no_grad():
        model.layers[1].post_attention_layernorm.weight.mul_(3000.)
    found = find_nonfinite(model, *PLAIN[0], Half())
    assert found.module.startswith("layers.1.mlp") and found.weights == [] and found.dtype == torch.float16 and found.largest > 1000 and "float16 ends at 6.55e+04" in str(found)
    assert find_nonfinite(model, *PLAIN[0], Engine("bf16")) is None and find_nonfinite(model, *PLAIN[0]) is None


def test_a_run_that_breaks_tells_where_and_keeps_the_batch(tmp_path):
    state = fresh()
    steps = explained(train(state, PLAIN, RATE, N), state, tmp_path)
    assert [next(steps).n for _ in range(3)] == [1, 2, 3]
    plant(state.model, "layers.1.mlp.up_proj.weight", (2, 3))
    with pytest.raises(UserError, match="loss nan .* at step 4: .*The output of layers.1.mlp.up_proj is the first that is no number, in all 8 sequences .*step000004-rank0$"): next(steps)
    assert torch.equal(load_bad_batch(tmp_path/"step000004-rank0").ids_BT, PLAIN[3][0])


def test_a_gradient_that_is_only_too_long(tmp_path):
    state = fresh()
    class Far(Engine):
        def step(self, *_): return math.inf
    state.engine = Far()
    with pytest.raises(UserError, match="Every number on the way is one, only the length"): next(explained(train(state, PLAIN, RATE, N), state, tmp_path))


@pytest.mark.parametrize("which, value", [(0, 97), (0, -1), (1, 97), (1, -2)])
def test_ids_outside_of_the_vocabulary_are_named(which, value):
    batch = [x.clone() for x in PLAIN[2]]
    batch[1][0, 0] = -1  # does not count, and is no mistake
    batch[which][3, 5] = value
    with pytest.raises(UserError, match=f"batch 0, sequence 3, position 5: the {('id', 'target')[which]} {value} is not from {(0, -1)[which]} to 96"): Checked([batch], 97)[0]
    batch[which][3, 5] = 96
    assert all(torch.equal(a, b) for a, b in zip(Checked([batch], 97)[0], batch))


# --- compiling ------------------------------------------------------------------------------------------------------

def test_compiling_pays_from_where_it_has_paid_back():
    assert not compile_pays(99, 1., compile_s=10, speedup=1/.9) and compile_pays(101, 1., compile_s=10, speedup=1/.9)
    assert not compile_pays(10**9, 1., compile_s=10, speedup=1.)


def graph_only(graph, inputs): return graph.forward
def broken(graph, inputs): raise RuntimeError("no C++ compiler\nand a page of reasons")


def test_compiled_in_place_is_the_same_model():
    plain, ours = fresh(), fresh()
    names = list(ours.model.state_dict())
    calls = []
    def counting(graph, inputs): calls.append(1); return graph.forward
    assert compile_auto(ours.model, PLAIN[0][0], 10**9, 64, backend=counting) and calls
    assert list(ours.model.state_dict()) == names and all(p.grad is None for p in ours.model.parameters())
    n = len(calls)
    assert max(abs(a.loss-b.loss) for a, b in zip(train(plain, PLAIN, RATE, 5), train(ours, PLAIN, RATE, 5), strict=True)) < 1e-5
    assert len(calls) == n  # nothing is compiled again


def test_a_short_run_is_left_alone(): assert compile_auto(fresh().model, PLAIN[0][0], 10, 64, backend=broken) is False


def test_without_a_compiler_training_goes_on():
    state, plain = fresh(), fresh()
    with pytest.warns(UserWarning) as told: assert compile_auto(state.model, PLAIN[0][0], 10**9, 64, backend=broken) is False
    told = [str(w.message) for w in told if "not compiled" in str(w.message)]
    assert len(told) == 1 and "no C++ compiler" in told[0] and "\n" not in told[0] and "training goes on without" in told[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [s.loss for s in train(state, PLAIN, RATE, 3)] == [s.loss for s in train(plain, PLAIN, RATE, 3)]


# --- noise ----------------------------------------------------------------------------------------------------------

def test_both_estimates_are_without_bias():
    "Every way to draw six of five gradients, with repetition, in pieces of two: the means of the estimates are the true values."
    g = torch.tensor([[1., 2.], [0., -1.], [3., 1.], [-2., 0.], [1., 1.]], dtype=torch.float64)
    signal, noise = g.mean(0).square().sum(), (g-g.mean(0)).square().sum(1).mean()
    found = []
    for six in product(range(5), repeat=6):
        pieces = g[list(six)].view(3, 2, 2).mean(1)
        found.append(split_noise(pieces.square().sum(1).mean().item(), pieces.mean(0).square().sum().item(), 1/2, 1/6))
    got = torch.tensor(found, dtype=torch.float64).mean(0)
    torch.testing.assert_close(got, torch.stack([signal, noise]))


def test_ratio_of_means(): assert critical_batch([Noise(1., 10., 4), Noise(3., 2., 4)]) == 3 and critical_batch([Noise(-1., 10., 4)]) == math.inf


def test_noise_is_measured_without_a_trace_and_the_whole_is_the_batch():
    "Pieces that count different numbers of targets: what their gradients add up to is the gradient of the batch."
    state, other = fresh(), fresh()
    list(train(state, PLAIN, RATE, 5)); list(train(other, PLAIN, RATE, 5))
    ids, targets = PLAIN[9]
    ids, targets = ids[:4], targets[:4].clone(); targets[0, :9] = -1; targets[3, 2] = -1
    rng = torch.get_rng_state()
    got = measure_noise(state, ids, targets, 4)
    assert torch.equal(rng, torch.get_rng_state()) and got.n_tokens == 54 and same(tensors(state), tensors(other))
    sizes, squares = [7, 16, 16, 15], []
    for row in range(4):
        other.model.zero_grad(); add_gradients(other.model, ids[row:row+1], targets[row:row+1]); squares.append(gradient_length(other.model)**2)
    other.model.zero_grad(); add_gradients(other.model, ids, targets)
    want = split_noise(sum(squares)/4, gradient_length(other.model)**2, sum(1/n for n in sizes)/4, 1/54)
    assert math.isclose(got.signal, want[0], rel_tol=1e-3, abs_tol=1e-5) and math.isclose(got.noise, want[1], rel_tol=1e-3)
    a, b = (list(train(s, PLAIN, RATE, 8)) for s in (state, other))
    assert a == b


def test_dropout_does_not_see_that_noise_was_measured():
    state = fresh()
    state.model.norm.register_forward_hook(lambda m, given, out: nn.functional.dropout(out, .1))
    rng = torch.get_rng_state()
    measure_noise(state, *PLAIN[0], 2)
    assert torch.equal(rng, torch.get_rng_state())
    state.model(PLAIN[0][0])
    assert not torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("n", [1, 9])
def test_pieces_that_cannot_be(n):
    with pytest.raises(ValueError, match=f"n_micro={n} pieces of 8 sequences"): measure_noise(fresh(), *PLAIN[0], n)


# --- the record -----------------------------------------------------------------------------------------------------

def test_the_study_of_faults_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    spec = spec_from_file_location("benchmarks_stability", Path(__file__).resolve().parent.parent/"benchmarks"/"stability.py")
    study = module_from_spec(spec)
    spec.loader.exec_module(study)
    rng = np.random.default_rng(0)
    text = np.where(rng.random(6000) < .2, rng.integers(0, 99, 6000), np.arange(6000)*7 % 61)
    monkeypatch.setattr(study, "rows_of_text", lambda: (text[:3500], text[3500:]))
    monkeypatch.setattr(study, "CFG", ModelConfig(128, 64, n_layers=1, n_heads=1, n_kv_heads=1, d_model=16, d_ff=32, d_head=16))
    monkeypatch.setattr(study, "MAKE", dict(muon=make_optimizers))
    out = tmp_path/"try.json"
    monkeypatch.setattr(sys, "argv", ["stability.py", "--seeds", "1", "--tiny", "--parts", "spikes", "bf16", "--out", str(out)])
    study.main()
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(r["fault"], r["remedy"]) for r in rows[:-1]] == [("none", "norm 1"), *(("unshifted", r) for r in study.REMEDIES), *(("stuck", r) for r in ("norm 1", "pass over", "roll back"))]
    by = {(r["fault"], r["remedy"]): r for r in rows[:-1]}
    assert all("60" in r["held"] for r in rows[:-1]) and rows[-1]["part"] == "bf16" and abs(rows[-1]["held"]-by["none", "norm 1"]["held"]["60"]) < .1
    assert study.cost_of(by["none", "norm 1"], by["none", "norm 1"]) == (0, 0)
    for remedy in ("nothing", "norm 1", "value 1"): assert by["unshifted", remedy]["passed"] == []
    assert "extra nats x updates" in capsys.readouterr().out
    study.main()
    assert "CPU-s" not in capsys.readouterr().out  # nothing is run twice

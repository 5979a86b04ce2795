"Samples whose answers alone are learnt, batches of them, frozen parts and rates by depth, when to stop, two ranks against one, and the script that recorded what is forgotten."
import sys
from copy import deepcopy
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from tuning_ranks import CFG, some_samples

from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.core import UserError, read_json
from llm_scratch.engines import torchrun
from llm_scratch.epochs import EarlyStop
from llm_scratch.finetuning import (Joined, TuningBatches, answer_loss, answer_nats, completion, depths, drop_frozen, freeze, layered, marked, model_parts,
                                    pack_samples, pad_right, thaw, tune)
from llm_scratch.packing import Separately
from llm_scratch.pretraining import Batches, TrainState, load_checkpoint, make_adamw, make_optimizers, save_checkpoint, train

ROOT = Path(__file__).resolve().parent.parent
some = partial(settings, max_examples=60, deadline=None)
ids = st.lists(st.integers(0, 9), min_size=0, max_size=5)
SAMPLES = some_samples(37)


@pytest.fixture
def model():
    "A decoder of which every branch says something."
    model = Decoder(CFG)
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters(): nn.init.normal_(p, 1. if p.ndim == 1 else 0., .3, generator=rng)
    return model


def same(a, b): return [name for name, p in a.state_dict().items() if torch.equal(p, b.state_dict()[name])]


# --- samples --------------------------------------------------------------------------------------------------------

@some()
@given(st.lists(st.tuples(ids, st.booleans()), max_size=5))
def test_what_is_marked_is_what_should_follow(pieces):
    whole = [i for own, _ in pieces for i in own]
    learnt = [yes for own, yes in pieces for _ in own]
    if not any(learnt[1:]):
        with pytest.raises(UserError, match=f"of {len(whole)} ids in {len(pieces)} pieces none is learnt"): marked(pieces)
        return
    read, targets = marked(pieces)
    assert read == whole[:-1] and len(targets) == len(read)
    assert targets == [whole[t+1] if learnt[t+1] else -1 for t in range(len(read))]


def test_a_completion_learns_its_answer_and_its_end_alone():
    assert completion([1, 2, 3], [4, 0]) == ([1, 2, 3, 4], [-1, -1, 4, 0])
    assert completion(np.array([7]), torch.tensor([0])) == ([7], [0])
    assert all(type(i) is int for row in completion(np.array([1, 2]), np.array([3, 4])) for i in row)
    for wrong, said in ((([], [1]), "a prompt of 0 ids and an answer of 1"), (([1, 2], []), "a prompt of 2 ids and an answer of 0")):
        with pytest.raises(UserError, match=said): completion(*wrong)


def test_transformers_means_the_same_by_its_labels(model):
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    prompt, answer = [3, 4, 5], [6, 7, 0]
    labels = torch.tensor([[-100]*len(prompt) + answer])
    with torch.no_grad():
        theirs = loss_utils.ForCausalLMLoss(model(torch.tensor([prompt + answer])), labels, CFG.vocab_size)
    assert_close(answer_loss(model, [completion(prompt, answer)]).mean, float(theirs), rtol=1e-5, atol=1e-6)


# --- batches --------------------------------------------------------------------------------------------------------

def answers(batch): return sorted(tuple(row[row != -1].tolist()) for row in batch[1])


def test_rows_are_filled_up_on_the_right():
    got = pad_right([([5, 6, 7], [-1, 7, 0]), ([5], [0])], pad_id=9, multiple=4)
    assert got[0].tolist() == [[5, 6, 7, 9], [5, 9, 9, 9]] and got[1].tolist() == [[-1, 7, 0, -1], [0, -1, -1, -1]]
    assert [x.dtype for x in got] == [torch.int64]*2 and pad_right([([5, 6], [-1, 0])])[0].shape == (1, 2)


@some(max_examples=30)
@given(st.integers(1, 37), st.integers(1, 5), st.sampled_from([1, 2, 3]), st.integers(1, 6), st.integers(0, 3))
def test_ranks_share_each_step_and_every_sample_comes_as_often(n, batch_size, world, pool, seed):
    alone = TuningBatches(SAMPLES[:n], 24, batch_size*world, seed=seed, pool=pool)
    parts = [TuningBatches(SAMPLES[:n], 24, batch_size, seed=seed, pool=pool, rank=r, world=world) for r in range(world)]
    drawn = np.zeros(n, dtype=int)
    for step in range(2*pool):
        whole = alone[step]
        assert answers(whole) == sorted(a for p in parts for a in answers(p[step]))
        assert all(len(p[step][0]) == batch_size for p in parts)
        np.add.at(drawn, alone.numbers(step), 1)
    assert drawn.max()-drawn.min() <= 1, "after whole pools no sample was read more than once more often than another"


def test_a_batch_depends_on_its_number_seed_and_nothing_else():
    first, again = TuningBatches(SAMPLES, 24, 4, seed=1), TuningBatches(SAMPLES, 24, 4, seed=1)
    later = [again[s] for s in (70, 3, 35)]
    for s, batch in zip((70, 3, 35), later): assert_close(first[s], batch)
    assert any(answers(first[s]) != answers(TuningBatches(SAMPLES, 24, 4, seed=2)[s]) for s in range(5))
    assert first.numbers(0).tolist() != first.numbers(16).tolist()
    drawn = [sorted(TuningBatches(SAMPLES, 24, 4, seed=seed, pool=1).numbers(0).tolist()) for seed in (1, 2, 3)]
    assert drawn[0] != drawn[1] != drawn[2], "the seed decides which samples come first, not only in which order their steps do"
    sizes = [len(SAMPLES[first.numbers(s)[0]][0]) for s in range(16)]
    assert sizes != sorted(sizes) and sizes != sorted(sizes, reverse=True), "the steps of a pool come in no order of length"


def test_sorting_wastes_less_and_a_multiple_is_kept():
    def filling(b): return sum((b[s][0].shape[1]-b.lengths[b.numbers(s)]).sum() for s in range(32))
    assert filling(TuningBatches(SAMPLES, 24, 4)) < .4*filling(TuningBatches(SAMPLES, 24, 4, pool=1))
    assert {TuningBatches(SAMPLES, 24, 4, multiple=8)[s][0].shape[1]%8 for s in range(8)} == {0}


def test_wrong_samples_are_named():
    for wrong, said in (([], "there are 0 samples"), ([*SAMPLES[:2], ([1]*25, [1]*25)], "sample 2 has 25 ids, and context_len=24"), ([([1, 2], [-1, -1])], "sample 0 has an answer of 0 ids")):
        for make in (TuningBatches, pack_samples):
            with pytest.raises(UserError, match=said): make(wrong, 24, 4)
    with pytest.raises(ValueError, match="sample 0 has 2 ids and 1 targets"): TuningBatches([([1, 2], [2])], 24, 4)
    with pytest.raises(ValueError, match="rank=2 is not below world=2"): TuningBatches(SAMPLES, 24, 4, rank=2, world=2)
    with pytest.raises(ValueError, match="pool=0"): TuningBatches(SAMPLES, 24, 4, pool=0)
    TuningBatches([([1]*24, [1]*24)], 24, 1) # just fits


def test_packed_samples_are_learnt_as_if_alone(model):
    n = len(pack_samples(SAMPLES, 24, 1).ids.rows)
    both, targets = pack_samples(SAMPLES, 24, n, pad_id=7, seed=3)[0] # an epoch
    with torch.no_grad(): nats = F.cross_entropy(Separately(model)(both).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    assert n < len(SAMPLES) and int((targets != -1).sum()) == answer_nats(model, SAMPLES)[1].sum()
    assert_close(float(nats), float(answer_nats(model, SAMPLES)[0].sum()), rtol=1e-5, atol=1e-3)
    assert set(both[:,0][both[:,1] == -1].tolist()) <= {7} and set(targets[both[:,1] == -1].tolist()) <= {-1}
    halves = [pack_samples(SAMPLES, 24, 2, rank=r, world=2)[4] for r in (0, 1)]
    assert_close(torch.cat([h[1] for h in halves]), pack_samples(SAMPLES, 24, 4)[4][1])


def test_batches_are_joined():
    new, old = TuningBatches(SAMPLES, 24, 3), Batches(np.arange(400)%64, 24, 2)
    for step in (0, 7):
        got_ids, got_targets = Joined([new, old], pad_id=5)[step]
        T = new[step][0].shape[1]
        assert got_ids.shape == got_targets.shape == (5, 24)
        assert_close([got_ids[:3,:T], got_targets[:3,:T]], [*new[step]])
        assert_close([got_ids[3:], got_targets[3:]], [*old[step]])
        assert set(got_ids[:3,T:].flatten().tolist()) <= {5} and set(got_targets[:3,T:].flatten().tolist()) <= {-1}


# --- scores ---------------------------------------------------------------------------------------------------------

def test_answers_are_scored_one_by_one_in_their_order(model):
    nats, n = answer_nats(model, SAMPLES, batch_size=5)
    for (read, targets), x, k in zip(SAMPLES, nats, n):
        with torch.no_grad(): log_probs = model(torch.tensor([read]))[0].log_softmax(-1)
        assert_close(float(x), -sum(float(log_probs[t,i]) for t, i in enumerate(targets) if i != -1), rtol=1e-4, atol=1e-4)
        assert k == sum(t != -1 for t in targets)
    loss = answer_loss(model, SAMPLES)
    assert_close(loss.mean, float(nats.sum()/n.sum()), rtol=1e-5, atol=1e-6)
    assert loss.n == 37 and 0 < loss.stderr < 1
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(UserError, match="0 samples"): answer_nats(model, [])


# --- parts, rates and what is frozen --------------------------------------------------------------------------------

def test_parts_have_the_names_that_one_would_use(model):
    assert list(model_parts(model)) == ["embed_tokens", "layers.0", "layers.1", "norm"]
    for wrapping in ("module", "_orig_mod"): assert list(model_parts(nn.ModuleDict({wrapping: model}))) == list(model_parts(model)) # as DDP and torch.compile name it
    assert sum(map(len, model_parts(model).values())) == len(list(model.parameters()))
    odd = nn.ModuleDict(dict(a=nn.Embedding(4, 4), b=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), head=nn.ModuleDict(dict(x=nn.Linear(4, 4), y=nn.LayerNorm(4)))))
    odd.scale = nn.Parameter(torch.ones(1))
    assert list(model_parts(odd)) == ["scale", "a", "b.0", "b.1", "head.x", "head.y"]
    names = {p: name for name, p in odd.named_parameters()}
    assert {names[p]: d for p, d in depths(odd).items() if names[p].endswith(("weight", "scale"))} == {"scale": 0, "a.weight": 0, "b.0.weight": 1, "b.1.weight": 2, "head.x.weight": 3, "head.y.weight": 3}
    assert list(model_parts(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == ["0", "1"]


def test_a_name_is_a_part_and_not_a_beginning():
    deep = Decoder(ModelConfig(8, context_len=4, n_layers=11, n_heads=1, n_kv_heads=1, d_model=4, d_ff=4, d_head=4))
    deep.layers[1].mlp.up_proj.weight.grad = torch.ones_like(deep.layers[1].mlp.up_proj.weight)
    freeze(deep, "layers.1")
    assert deep.layers[1].mlp.up_proj.weight.grad is None, "it would still move"
    assert {name.split(".")[1] for name, p in deep.named_parameters() if not p.requires_grad} == {"1"}
    order = [depths(deep)[deep.layers[i].mlp.up_proj.weight] for i in range(11)]
    assert order == list(range(1, 12)) and depths(deep)[deep.norm.weight] == 12 and depths(deep)[deep.embed_tokens.weight] == 0


def test_names_that_do_not_exist_change_nothing(model):
    with pytest.raises(UserError, match="no part layers.2: give some of embed_tokens, layers.0, layers.1, norm"): freeze(model, "layers.0", "layers.2")
    with pytest.raises(UserError, match="no part layer"): thaw(model, "layer")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("make", [partial(make_adamw, lr=.01), partial(make_optimizers, lr=.3), lambda m: layered(m, partial(make_adamw, lr=.01), .5)], ids=["adamw", "book", "layered"])
def test_what_is_frozen_keeps_every_bit(model, make):
    before = deepcopy(model)
    state = TrainState(model, make(model))
    for opt in state.optimizers:
        for group in opt.param_groups:
            if "weight_decay" in group: group["weight_decay"] = .1
    batches = TuningBatches(SAMPLES, 24, 4)
    assert freeze(model, "embed_tokens", "layers.0.mlp") == 64*32 + 3*32*64
    for step in train(state, batches, lambda step: 1., 4): pass
    assert same(model, before) == ["embed_tokens.weight", *(f"layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down"))]
    freeze(model, "norm") # in the middle of a run, when it has momentum
    thaw(model, "layers.0")
    middle = deepcopy(model)
    for step in train(state, batches, lambda step: 1., 6): pass
    assert same(model, middle) == ["embed_tokens.weight", "norm.weight"], "what was thawed moves, what was frozen stops at once"


def test_rates_fall_with_depth_and_each_parameter_has_one(model):
    for make, bases in ((make_adamw, {.01}), (make_optimizers, {.02, .01})):
        plain = {p: g["lr"] for opt in make(model) for g in opt.param_groups for p in g["params"]}
        split = {p: g for opt in layered(model, make, .5) for g in opt.param_groups for p in g["params"]}
        assert set(plain.values()) == bases and split.keys() == plain.keys() == set(model.parameters())
        for p, group in split.items():
            assert_close(group["lr"], plain[p]*.5**(3-depths(model)[p]))
            assert group["initial_lr"] == group["lr"]
    adamw, = layered(model, make_adamw, .5)
    assert {g["betas"] for g in adamw.param_groups} == {(.9, .95)} and len(adamw.param_groups) == 4
    for wrong in (0, 1.1):
        with pytest.raises(UserError, match=f"decay={wrong}"): layered(model, make_adamw, wrong)


def test_a_decay_of_one_trains_as_without(model):
    twin = deepcopy(model)
    for m, make in ((model, make_optimizers), (twin, partial(layered, decay=1.))):
        for step in train(TrainState(m, make(m)), TuningBatches(SAMPLES, 24, 4), lambda step: 1., 3): pass
    assert_close([*model.parameters()], [*twin.parameters()])


def test_layered_runs_are_saved_and_go_on(model, tmp_path):
    make, batches = partial(layered, make=partial(make_adamw, lr=.01), decay=.5), TuningBatches(SAMPLES, 24, 4)
    freeze(model, "layers.0")
    other = deepcopy(model)
    state = TrainState(model, make(model))
    for step in train(state, batches, lambda step: 1., 3): pass
    path = save_checkpoint(state, tmp_path, {})
    for step in train(state, batches, lambda step: 1., 6): pass
    again = load_checkpoint(TrainState(other, make(other)), path, {})
    for step in train(again, batches, lambda step: 1., 6): pass
    assert len(same(model, other)) == len(model.state_dict())
    with pytest.raises(UserError, match="other optimizers"): load_checkpoint(TrainState(other, make_adamw(other)), path, {})


def test_frozen_groups_are_dropped(model):
    freeze(model, "embed_tokens", "layers.1.mlp")
    opt, = drop_frozen(layered(model, make_adamw, .5))
    kept = [p for g in opt.param_groups for p in g["params"]]
    assert len(opt.param_groups) == 3 and set(kept) == {p for p in model.parameters() if p.requires_grad} and len(kept) == len(set(kept))


# --- when to stop ---------------------------------------------------------------------------------------------------

def begun(lr=.01):
    model = init_weights(Decoder(CFG), 0)
    return TrainState(model, make_adamw(model, lr=lr))


def flat(step): return 1.


def test_looking_does_not_change_what_is_learnt():
    watched, alone = begun(), begun()
    looks = list(tune(watched, TuningBatches(SAMPLES, 24, 8), SAMPLES[:9], flat, 11, every=4))
    for step in train(alone, TuningBatches(SAMPLES, 24, 8), flat, 11): pass
    assert [look.step for look in looks] == [0, 4, 8, 11] and watched.step == 11
    assert len(same(watched.model, alone.model)) == len(alone.model.state_dict())
    assert_close(looks[-1].loss.mean, answer_loss(alone.model, SAMPLES[:9]).mean)
    assert looks[-1].loss.mean == min(look.loss.mean for look in looks) == looks[-1].stop.best


def test_it_goes_back_to_the_best_look_weights_memory_and_all():
    rng, state = np.random.default_rng(0), begun(.02)
    half_known = [completion([0, *rng.integers(1, 64, 5)], [5, *rng.integers(1, 64, 3), 0]) for _ in range(15)] # what can be learnt from three, and what can't
    held, batches = half_known[3:], TuningBatches(half_known[:3], 24, 3)
    looks = list(tune(state, batches, held, flat, 200, every=3, stop=EarlyStop(patience=2)))
    best = min(looks, key=lambda look: look.loss.mean)
    assert 0 < best.step < looks[-1].step < 200 and looks[-1].stop.is_over and not any(look.stop.is_over for look in looks[:-1])
    assert state.step == best.step and answer_loss(state.model, held).mean == best.loss.mean
    alone = begun(.02)
    for step in train(alone, batches, flat, best.step): pass
    for s in (state, alone): # the optimizer remembers what it did then
        for step in train(s, batches, flat, best.step+2): pass
    assert len(same(state.model, alone.model)) == len(alone.model.state_dict())


def test_what_only_harms_is_undone():
    state = begun(3.)
    before = deepcopy(state.model)
    looks = list(tune(state, TuningBatches(SAMPLES, 24, 4), SAMPLES[:9], flat, 20, every=1, stop=EarlyStop(patience=2)))
    assert [look.step for look in looks] == [0, 1, 2] and state.step == 0 and len(same(state.model, before)) == len(before.state_dict())


def test_a_bad_look_is_one_that_is_surely_no_better():
    "Judged by the spread of the difference to the last gain, sample by sample; not by the spread of samples, nor by the difference to the first look."
    class Scripted(nn.Module): # has the nats of the script at each sample, the next row of it after each update
        def __init__(self, script):
            super().__init__()
            self.script, self.at, self.w = torch.tensor(script), 0, nn.Parameter(torch.zeros(1))
        def forward(self, ids):
            x = -torch.log(torch.expm1(self.script[self.at]))[ids[:,0]]
            self.at += torch.is_grad_enabled()
            return torch.stack([x, torch.zeros_like(x)], -1)[:,None] + 0*self.w
    held, batch = [([i], [0]) for i in range(4)], (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
    waited = []
    for last in ([.3, .3, 3.2, 3.2], [2.1, .05, 5., 1.]): # both worse than the second look on average: surely, and perhaps
        model = Scripted([[2.]*4, [.1, .1, 3., 3.], last])
        waited.append([look.stop.waited for look in tune(TrainState(model, make_adamw(model)), [batch]*2, held, flat, 2, every=1)])
    assert waited == [[0, 0, 1], [0, 0, 0]]


def test_tuning_goes_on_from_where_a_run_is():
    state = begun()
    for step in train(state, TuningBatches(SAMPLES, 24, 8), flat, 5): pass
    assert [look.step for look in tune(state, TuningBatches(SAMPLES, 24, 8), SAMPLES[:9], flat, 12, every=5)] == [5, 10, 12]


# --- many processes -------------------------------------------------------------------------------------------------

def test_two_ranks_tune_as_one_process_does(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'llm_scratch[distributed]'")
    torchrun(2, "tuning_ranks", str(tmp_path/"ranks.json"), timeout=400)
    rows = read_json(tmp_path/"ranks.json")
    plain = rows.pop("plain")
    assert set(rows) == {"ddp", "fsdp", "zero2", "zero3"} and plain["losses"][-1] < plain["losses"][0]-.1
    frozen = sorted(name for name in Decoder(CFG).state_dict() if name.startswith(("embed_tokens", "layers.0")))
    for row in rows.values(): assert row["loss"] < 5e-6 and row["weight"] < 5e-6 and row["frozen"] == frozen
    for name in ("ddp", "fsdp"): assert rows[name]["look"] < 5e-6 and rows[name]["best"] == plain["best"] and rows[name]["kept"] < 5e-5
    assert plain["best"] < 12, "it had to go back"


# --- the record -----------------------------------------------------------------------------------------------------

@pytest.fixture
def bench():
    spec = spec_from_file_location("benchmarks_forgetting", ROOT/"benchmarks"/"forgetting.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_records_and_goes_on(bench, tmp_path, capsys):
    every, out = dict(bench.ARMS), tmp_path/"record.json"
    def main(*names):
        bench.ARMS.clear()
        bench.ARMS.update({name: every[name] for name in names})
        bench.main(["--tiny", "--out", str(out)])
        return read_json(out)
    record = main("rate .3", "mixed .5")
    assert [(r["seed"], r["arm"]) for r in record["runs"]] == [(0, "rate .3"), (0, "mixed .5"), (1, "rate .3"), (1, "mixed .5")]
    more = main("rate .3", "mixed .5", "freeze half", "replay 2")
    assert more["runs"][:4] == record["runs"] and len(more["runs"]) == 8 and more["bases"] == record["bases"]
    by_arm = {(r["seed"], r["arm"]): r for r in more["runs"]}
    assert by_arm[0,"rate .3"]["path"][0]["answer"] == more["bases"][0]["answer"] > by_arm[0,"mixed .5"]["answer"] > by_arm[0,"rate .3"]["answer"]
    assert "| replay 2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit): bench.main(["--out", str(out)]) # a record of other sizes
    assert "give another --out" in capsys.readouterr().err


def test_the_stored_record_is_of_this_script(bench):
    record = read_json(ROOT/"nbs"/"forgetting.json")
    seeds = {r["seed"] for r in record["bases"]}
    assert len(seeds) >= 3 and [(r["seed"], r["arm"]) for r in record["runs"]] == [(s, arm) for s in sorted(seeds) for arm in bench.ARMS]
    assert record["weights"] == bench.n_params(bench.CFG) and record["context_len"] == bench.T and record["lr"] == bench.LR
    assert all(bool(r["path"]) == (r["arm"] in bench.LOOKS) for r in record["runs"])

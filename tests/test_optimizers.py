"Three optimizers by hand against PyTorch's, groups that are a partition, and the record of the ablations."
import copy
import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from llm_scratch.architecture import Block, Decoder, ModelConfig, SwiGLU
from llm_scratch.families import GPT2, MLP, BareEncoder, Encoder, EncoderDecoder, MoE, UntiedDecoder, UntiedEncoderDecoder, llama_block
from llm_scratch.inside import Recurrent
from llm_scratch.optimizers import (SGD, AdamW, ByRule, FullMuon, adamw_move, decay_groups, make_by_kind, muon_flops, muon_move, newton_schulz, reach, sgd_move,
                                    remembered_bytes, weight_groups, weight_kinds)
from llm_scratch.pretraining import Batches, Muon, TrainState, make_optimizers, train

ROOT = Path(__file__).resolve().parent.parent
DTYPES = torch.float32, torch.float64


def paths(makes, dtype=torch.float32, shape=(5, 3), n=12, seed=0, schedule=lambda i: 1.):
    "Where each optimizer is after every step, all fed the same gradients; the third gradient is missing, the fifth is zero."
    rng = torch.Generator().manual_seed(seed)
    begin = torch.randn(shape, generator=rng, dtype=dtype)
    ps = [nn.Parameter(begin.clone()) for _ in makes]
    opts, seen = [make([p]) for make, p in zip(makes, ps)], [[] for _ in makes]
    rates = [opt.param_groups[0]["lr"] for opt in opts]
    for i in range(n):
        grad = torch.randn(shape, generator=rng, dtype=dtype) * 10**torch.randn(shape[0], *[1]*(len(shape)-1), generator=rng, dtype=dtype) * (i != 4)
        for p, opt, rate, path in zip(ps, opts, rates, seen):
            p.grad = None if i == 2 else grad.clone()
            opt.param_groups[0]["lr"] = rate*schedule(i)
            opt.step()
            path.append(p.detach().clone())
    return [torch.stack(path) for path in seen]


# --- equal to PyTorch's, after every step ---------------------------------------------------------------------------------

share = st.floats(0, .99)
rate = st.floats(1e-4, 1.)
seed = st.integers(0, 10**6)


@settings(max_examples=25, deadline=None)
@given(lr=rate, momentum=share, nesterov=st.booleans(), decay=st.floats(0, .5), dtype=st.sampled_from(DTYPES), seed=seed)
def test_sgd_is_torchs(lr, momentum, nesterov, decay, dtype, seed):
    numbers = dict(lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=decay)
    ours, theirs = paths([partial(SGD, **numbers), partial(torch.optim.SGD, foreach=False, **numbers)], dtype, seed=seed, schedule=lambda i: 1-i/12)
    assert torch.equal(ours, theirs)


@settings(max_examples=25, deadline=None)
@given(lr=rate, betas=st.tuples(share, share), eps=st.sampled_from((1e-10, 1e-8, .1)), decay=st.floats(0, .5), dtype=st.sampled_from(DTYPES), seed=seed)
def test_adamw_is_torchs(lr, betas, eps, decay, dtype, seed):
    numbers = dict(lr=lr, betas=betas, eps=eps, weight_decay=decay)
    ours, theirs, fused = paths([partial(AdamW, **numbers), partial(torch.optim.AdamW, foreach=False, **numbers), partial(torch.optim.AdamW, fused=True, **numbers)], dtype, seed=seed, schedule=lambda i: 1-i/12)
    assert torch.equal(ours, theirs)
    assert_close(ours, fused, rtol=1e-4 if dtype is torch.float32 else 1e-9, atol=1e-5*lr)


@settings(max_examples=20, deadline=None)
@given(lr=rate, momentum=share, nesterov=st.booleans(), decay=st.floats(0, .5), rounds=st.integers(1, 6), eps=st.sampled_from((1e-7, 9.)), adjust=st.sampled_from(("original", "match_rms_adamw")),
       coefficients=st.sampled_from(((3.4445, -4.775, 2.0315), (2., -1.5, .5))), shape=st.sampled_from(((5, 3), (3, 5), (4, 4), (1, 6))), inside=st.sampled_from(("bfloat16", "float32", "float64")), seed=seed)
def test_muon_is_torchs(lr, momentum, nesterov, decay, rounds, eps, adjust, coefficients, shape, inside, seed):
    ours = partial(FullMuon, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay, rounds=rounds, eps=eps, adjust=adjust, coefficients=coefficients, dtype=inside)
    theirs = partial(torch.optim.Muon, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay, ns_steps=rounds, eps=eps, adjust_lr_fn=adjust, ns_coefficients=coefficients)
    dtype = torch.float64 if inside == "float64" else torch.float32
    with patch.object(torch.Tensor, "bfloat16", torch.Tensor.bfloat16 if inside == "bfloat16" else torch.Tensor.clone):  # else take torch's cast away
        a, b = paths([ours, theirs], dtype, shape, seed=seed, schedule=lambda i: 1-i/12)
    assert torch.equal(a, b)


def test_defaults_are_torchs():
    for ours, theirs, shape in ((AdamW, partial(torch.optim.AdamW, foreach=False), (5,)), (partial(FullMuon), torch.optim.Muon, (5, 3))):
        a, b = paths([ours, theirs], shape=shape)
        assert torch.equal(a, b)
    assert SGD([torch.zeros(1)]).param_groups[0]["momentum"] == 0


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_muon_is_that_of_chapter_06(shape):
    full = dict(lr=.02, weight_decay=0., rounds=3)
    fast, exact, coarse = paths([partial(Muon, lr=.02, rounds=3), partial(FullMuon, dtype="float32", **full), partial(FullMuon, **full)], shape=shape)
    assert_close(fast, exact, atol=1e-5, rtol=1e-5)
    assert 1e-4 < (fast-coarse).abs().max() < .03*12*.02  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("make, theirs", [(partial(SGD, momentum=.9), partial(torch.optim.SGD, momentum=.9, foreach=False)), (AdamW, partial(torch.optim.AdamW, foreach=False)),
                                          (FullMuon, torch.optim.Muon)], ids=["SGD", "AdamW", "Muon"])
def test_state_can_come_from_torch_and_survives_a_copy(make, theirs):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3))
    opt = theirs([p], lr=.05)
    for _ in range(3):
        p.grad = torch.randn(4, 3)
        opt.step()
    q = nn.Parameter(p.detach().clone())
    ours = make([q], lr=.1)
    ours.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert ours.param_groups[0]["lr"] == .05
    with torch.no_grad(): r, again = copy.deepcopy((q, ours))
    grad = torch.randn(4, 3)
    for x in (p, q, r): x.grad = grad.clone()
    for o in (opt, ours, again): o.step()
    assert torch.equal(p, q) and torch.equal(p, again.param_groups[0]["params"][0])


def test_groups_keep_their_own_numbers_and_what_has_no_gradient_stays():
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    opt = SGD([dict(params=[a], lr=.5), dict(params=[b, c])], lr=.1)
    for p in (a, b): p.grad = torch.ones(2)
    opt.step()
    assert [p.tolist() for p in (a, b, c)] == [[.5, .5], pytest.approx([.9, .9]), [1., 1.]]
    assert not a.grad_fn and a.requires_grad and torch.equal(a.grad, torch.ones(2))


def test_a_gradient_is_left_as_it_was():
    grad = torch.randn(4, 3)
    for move in (partial(sgd_move, momentum=.9, nesterov=True, weight_decay=.1), adamw_move, muon_move, partial(muon_move, nesterov=False, dtype="float32")):
        given, p = grad.clone(), torch.ones(4, 3)
        state = {}
        for _ in range(2): move(p, given, state, .1)
        assert torch.equal(given, grad), move


# --- by hand ----------------------------------------------------------------------------------------------------------------

def test_the_rules_on_one_number():
    w, s = torch.tensor([1.]), {}
    for _ in range(2): sgd_move(w, torch.tensor([2.]), s, .1, momentum=.5)
    assert w.item() == pytest.approx(1 - .1*2 - .1*(2+1))
    w, s = torch.tensor([1.]), {}
    sgd_move(w, torch.tensor([2.]), s, .1, momentum=.5, nesterov=True)
    assert w.item() == pytest.approx(1 - .1*(2+1))
    w, s = torch.tensor([2.], dtype=torch.float64), {}
    for g in (3., -1.): adamw_move(w, torch.tensor([g], dtype=torch.float64), s, .1, betas=(.5, .75), eps=.1, weight_decay=.5)
    first = 2*.95 - .1*3/(3+.1)
    m, v = .5*1.5-.5, .75*.25*9+.25
    assert w.item() == pytest.approx(first*.95 - .1*(m/.75)/(math.sqrt(v/(1-.75**2))+.1))


def test_the_first_step_of_adamw_has_the_length_of_the_rate_whatever_the_gradient():
    for size in (1e-3, 1., 1e3):
        w = torch.zeros(1)
        adamw_move(w, torch.tensor([-size]), {}, .1, weight_decay=0.)
        assert w.item() == pytest.approx(.1, rel=1e-4)


# --- the polynomial ---------------------------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), rounds=st.integers(0, 6), seed=seed)
def test_newton_schulz_moves_singular_values_alone(rows, columns, rounds, seed):
    G = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    s = s/s.norm()
    for _ in range(rounds): s = 3.4445*s - 4.775*s**3 + 2.0315*s**5
    X = newton_schulz(G, rounds, dtype=torch.float64)
    assert_close(X, U @ torch.diag(s) @ Vh, atol=1e-9, rtol=1e-7)
    assert_close(newton_schulz(50*G.T, rounds, dtype=torch.float64).T, X, atol=1e-9, rtol=1e-7)


def test_newton_schulz_of_nothing_and_in_other_numbers():
    assert not newton_schulz(torch.zeros(2, 3)).any()
    G = torch.randn(4, 6)
    assert newton_schulz(G).dtype == torch.bfloat16 and newton_schulz(G, dtype=torch.float32).dtype == torch.float32
    assert_close(newton_schulz(G, 0, eps=1e3, dtype=torch.float32), G/1e3)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40))
def test_reach(rows, columns):
    assert reach(rows, columns) == pytest.approx(math.sqrt(rows/columns) if rows > columns else 1)
    Q = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64))[0]  # evened out
    assert Q.square().mean().sqrt().item()*reach(rows, columns, "match_rms_adamw") == pytest.approx(.2)


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_operations_of_muon_are_counted(shape):
    for rounds in (1, 5):
        with FlopCounterMode(display=False) as counter: newton_schulz(torch.randn(shape), rounds)
        assert counter.get_total_flops() == muon_flops(*shape, rounds)


def test_memory_is_counted():
    weights, one = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 3))], 18*4
    for make, want in ((SGD, 0), (partial(SGD, momentum=.9), one), (AdamW, 2*one+2*4), (FullMuon, one), (partial(torch.optim.AdamW), 2*one+2*4)):
        opt = make(weights)
        for p in weights: p.grad = torch.ones_like(p)
        opt.step()
        assert remembered_bytes(opt) == want


# --- which get which --------------------------------------------------------------------------------------------------------

def any_model(draw):
    heads = draw(st.sampled_from((1, 2)))
    cfg = ModelConfig(vocab_size=draw(st.integers(2, 20)), context_len=8, n_layers=draw(st.integers(1, 2)), n_heads=heads, n_kv_heads=draw(st.sampled_from((1, heads))),
                      d_model=draw(st.integers(2, 12)), d_ff=draw(st.integers(2, 12)), d_head=draw(st.sampled_from((2, 4))))
    experts = partial(MoE, n_experts=3, top_k=1)
    family = draw(st.sampled_from((Decoder, UntiedDecoder, GPT2, Encoder, BareEncoder, EncoderDecoder, UntiedEncoderDecoder, partial(Decoder, block=llama_block),
                                   partial(Decoder, block=partial(Block, mlp=experts)), partial(UntiedDecoder, block=partial(Block, mlp=MLP)), partial(Recurrent, width=4))))
    return family(cfg)


models = st.composite(any_model)


@settings(max_examples=60, deadline=None)
@given(model=models())
def test_groups_are_a_partition(model):
    groups, kinds = weight_groups(model), weight_kinds(model)
    every = [id(p) for same in groups.values() for p in same]
    assert sorted(every) == sorted(id(p) for p in model.parameters()) and len(set(every)) == len(every)
    assert list(kinds) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        assert any(p is q for q in groups[kinds[name]])
        assert (kinds[name] == "embedding") == ("embed" in name), name
        assert (kinds[name] == "head") == (name == "lm_head.weight"), name
        if kinds[name] == "rest": assert p.ndim == 1
        else: assert p.ndim == 2
    for weight_decay in (.1, 0.):
        both = decay_groups(model, weight_decay)
        assert sorted(id(p) for g in both for p in g["params"]) == sorted(every) and all(g["params"] for g in both)
        for g in both: assert {id(p) for p in g["params"]} <= {id(p) for kind in (("matrix", "head") if g is both[0] else ("embedding", "rest")) for p in groups[kind]}
        assert [g["weight_decay"] for g in both] == [weight_decay, 0.]
    if not groups["matrix"]: return
    opts = make_by_kind(model, 2.)
    assert sorted(id(p) for opt in opts for g in opt.param_groups for p in g["params"]) == sorted(every)
    rates = {id(p): g["initial_lr"] for opt in opts for g in opt.param_groups for p in g["params"]}
    for name, p in model.named_parameters(): assert rates[id(p)] == pytest.approx(2*dict(matrix=.02, embedding=.01, head=.004, rest=.02)[kinds[name]])
    assert {id(p) for p in opts[0].param_groups[0]["params"]} == {id(p) for p in groups["matrix"]} and type(opts[0]) is Muon


def test_a_model_of_one_kind_has_one_group():
    assert [len(g["params"]) for g in decay_groups(nn.Embedding(3, 2))] == [1] and decay_groups(nn.Embedding(3, 2))[0]["weight_decay"] == 0
    assert [g["weight_decay"] for g in decay_groups(nn.Linear(3, 2, bias=False), .3)] == [.3]


def trained(make, family):
    torch.manual_seed(0)
    model = family(ModelConfig(vocab_size=50, context_len=16, n_layers=1, n_heads=2, n_kv_heads=1, d_model=16, d_ff=24, d_head=8))
    losses = [step.loss for step in train(TrainState(model, make(model)), Batches(np.arange(400)%50, 16, 2), lambda step: 1., 8)]
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_recipe_by_kind_is_that_of_chapter_06_when_the_head_is_tied():
    for family in (Decoder, GPT2): assert torch.equal(trained(make_by_kind, family)[1], trained(make_optimizers, family)[1])
    assert not torch.equal(trained(make_by_kind, UntiedDecoder)[1], trained(make_optimizers, UntiedDecoder)[1])


@pytest.mark.parametrize("make", [partial(SGD, lr=.3, momentum=.9), partial(AdamW, lr=.01, betas=(.9, .95))], ids=["SGD", "AdamW"])
def test_the_loop_learns_with_ours(make):
    def optimizers(model):
        opt = make(model.parameters())
        for group in opt.param_groups: group["initial_lr"] = group["lr"]
        return [opt]
    losses, _ = trained(optimizers, Decoder)
    assert losses[-1] < losses[0]-.3


# --- what is refused --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, says", [
    (lambda: SGD([torch.ones(1)], lr=-1.), "lr=-1.0 moves nothing forward"), (lambda: AdamW([torch.ones(1)], lr=0), "lr=0 moves nothing"), (lambda: AdamW([torch.ones(1)], lr=math.nan), "lr=nan"),
    (lambda: FullMuon([dict(params=[torch.ones(1, 1)]), dict(params=[torch.ones(1, 1)], lr=0)]), "lr=0 moves nothing"),
    (lambda: SGD([torch.ones(1)], momentum=-.1), "momentum=-0.1 is not a share"), (lambda: SGD([torch.ones(1)], nesterov=True), "momentum=0 keeps none"),
    (lambda: AdamW([torch.ones(1)], betas=(1., .9)), "beta1=1.0"), (lambda: AdamW([torch.ones(1)], betas=(.9, 1.5)), "beta2=1.5"),
    (lambda: FullMuon([torch.ones(1, 1)], momentum=1.), "momentum=1.0"), (lambda: FullMuon([torch.ones(1, 1)], adjust="none"), "adjust='none' is unknown: give 'original' or 'match_rms_adamw'"),
    (lambda: FullMuon([torch.ones(2, 2), torch.ones(3)]), r"shape (3,): it evens out matrices")])
def test_bad_numbers_are_named(make, says):
    with pytest.raises(ValueError, match=re.escape(says)): make()


def test_a_rule_of_ones_own_needs_three_lines():
    class Sign(ByRule):
        rule = staticmethod(lambda p, grad, state, lr: p.sub_(grad.sign(), alpha=lr))
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([5., -.1])
    Sign([p], lr=.5).step()
    assert p.tolist() == [-.5, .5]


# --- the record -------------------------------------------------------------------------------------------------------------

def test_the_record_is_whole():
    record = json.loads((ROOT/"nbs"/"ablations.json").read_text(encoding="utf-8"))
    base = {r["seed"]: r["loss"] for r in record["rows"]["base"]["runs"]}
    assert len(base) >= 3
    for name, row in record["rows"].items():
        assert {r["seed"] for r in row["runs"] if r["n_steps"] == record["n_steps"]} == set(base), name
        assert len({(r["seed"], r["n_steps"]) for r in row["runs"]}) == len(row["runs"])
        assert {r["factor"] for r in row["runs"]} == {row["factor"]} and all(r["seconds"] <= 10.5 for r in row["runs"])
        if row["tuned"]:  # a best factor has two worse neighbours
            trials = {float(f): loss for f, loss in row["trials"].items()}
            assert trials[row["factor"]] == min(trials.values()) and {row["factor"]/2, row["factor"]*2} <= trials.keys(), name
        else: assert row["factor"] == record["rows"]["base"]["factor"]


def test_the_study_goes_on_where_it_was(tmp_path):
    out = tmp_path/"record.json"
    run = lambda *rows: subprocess.run([sys.executable, ROOT/"benchmarks"/"ablations.py", "--tiny", "--rows", *rows, "--out", out], capture_output=True, text=True, encoding="utf-8", timeout=300, check=False)
    first = run("AdamW")
    assert first.returncode == 0, first.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    assert list(record["rows"]) == ["base", "AdamW"]
    base, other = record["rows"].values()
    N, n = record["n_steps"], record["n_steps"] if abs(other["cost"]-1) < .03 else round(record["n_steps"]/other["cost"])
    assert [r["seed"] for r in base["runs"]] == [0, 1] and {(r["seed"], r["n_steps"]) for r in other["runs"]} == {(s, k) for s in (0, 1) for k in {N, n}}
    apart = [next(r["loss"] for r in other["runs"] if (r["seed"], r["n_steps"]) == (s, N)) - base["runs"][s]["loss"] for s in (0, 1)]
    assert f"| AdamW | {mean(r['loss'] for r in other['runs'] if r['n_steps'] == N):.3f} | {mean(apart):+.3f} ± {12.706*stdev(apart)/2**.5:.3f} |" in first.stdout
    again = run("AdamW", "1 round")
    assert again.returncode == 0, again.stderr
    grown = json.loads(out.read_text(encoding="utf-8"))
    assert {name: grown["rows"][name] for name in record["rows"]} == record["rows"] and list(grown["rows"]) == ["base", "AdamW", "1 round"]
    assert "seed" not in "".join(line for line in again.stdout.splitlines() if line.startswith(("base,", "AdamW,")))


def test_every_row_of_the_study_is_another_model_or_another_optimizer():
    "Three updates of each row in a tiny size: no row may be the base by mistake."
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location("benchmarks_ablations", ROOT/"benchmarks"/"ablations.py")
    study = module_from_spec(spec)
    spec.loader.exec_module(study)
    cfg = ModelConfig(vocab_size=20, context_len=16, n_layers=1, n_heads=2, n_kv_heads=2, d_model=16, d_ff=24, d_head=8)
    ids = np.arange(2000, dtype=np.uint8)*7 % 20
    losses = {}
    for name, row in study.rows(cfg).items():
        state = study.begin(row, cfg, 0, 1.)
        losses[name] = [step.loss for step in train(state, Batches(ids, 16, 4), lambda step: 1., 5)][-1]
        assert len({id(p) for opt in state.optimizers for g in opt.param_groups for p in g["params"]}) == len(list(state.model.parameters())), name
    assert len({round(x, 7) for x in losses.values()}) == len(losses), losses

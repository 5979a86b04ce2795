"The backward pass by hand: the same numbers as autograd in every use of a model, nothing left behind, and a benchmark that compares before it times."
import copy
import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import filled
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from llm_scratch import backward
from llm_scratch.architecture import Attention, Block, Decoder, ModelConfig, RMSNorm, attend, init_weights, load_model, part_difference, rope, rope_angles, save_model
from llm_scratch.backward import AttentionFunction, RMSNormFunction, RopeFunction, quick_parts, quick_training
from llm_scratch.generation import Cache

ROOT = Path(__file__).resolve().parent.parent
CFG = ModelConfig(vocab_size=40, context_len=640, n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ff=48, d_head=8)
N_PARTS = 2*4 + 1 + 2 # norms and attentions
IDS = torch.randint(40, (3, 150), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(): return filled(init_weights(Decoder(CFG), 0)).train()


def loss_of(model, ids=IDS): return F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())


def gradients(model, f=loss_of):
    model.zero_grad()
    f(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(ours, theirs, share=2e-5):
    assert ours.keys() == theirs.keys()
    for name, g in ours.items(): assert (g-theirs[name]).abs().max() <= share*theirs[name].abs().max(), name


def random(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


class Spy:
    "Counts calls of a function and passes them on."
    def __init__(self, f): self.f, self.n = f, 0
    def __call__(self, *args, **kw):
        self.n += 1
        return self.f(*args, **kw)


@pytest.fixture
def spies(monkeypatch):
    "How often each function is used."
    made = {}
    for f in (RMSNormFunction, RopeFunction, AttentionFunction):
        made[f.__name__] = Spy(f.apply)
        monkeypatch.setattr(backward, f.__name__, type("Spied", (), dict(apply=made[f.__name__])))
    return made


# --- the functions -----------------------------------------------------------------------------------------------

@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.sampled_from([1, 2, 5, 8]), st.sampled_from([0., 1e-6, .5]))
def test_norm(n, width, eps):
    x, weight = random(2, n, width), random(width, seed=1)
    assert gradcheck(lambda x, w: RMSNormFunction.apply(x, w, eps), (x, weight))
    assert_close(RMSNormFunction.apply(x, weight, eps), F.rms_norm(x, (width,), weight, eps))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([2, 4, 6]), st.booleans())
def test_rope(T, H, K, of_each_text):
    "One table for all, or one for each text, as packed rows have it; transposed, as a model calls it."
    cos, sin = (t.double() for t in rope_angles(T+3, K))
    if of_each_text: cos, sin = (torch.stack((t[:T], t[3:]))[:, None] for t in (cos, sin))
    else: cos, sin = cos[2:T+2], sin[2:T+2]
    x = random(2, T, H, K)
    f = lambda f: lambda x: f(x.transpose(1, 2), cos, sin)
    assert gradcheck(f(RopeFunction.apply), (x,))
    assert_close(f(RopeFunction.apply)(x), f(rope)(x))


def test_rope_keeps_nothing_of_its_input():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t): RopeFunction.apply(random(2, 3, 5, 4), *(t.double() for t in rope_angles(5, 4)))
    assert saved == [(5, 4), (5, 4)]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 10), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]), st.sampled_from([1, 2, 3]))
def test_attention(T, rows, heads, K):
    (H, G) = heads
    q, k, v = random(2, H, T, K), random(2, G, T, K, seed=1), random(2, G, T, K, seed=2)
    assert gradcheck(lambda q, k, v: AttentionFunction.apply(q, k, v, rows), (q, k, v))
    assert_close(AttentionFunction.apply(q, k, v, rows), attend(q, k, v))


def test_attention_has_blocks_of_128_rows_and_looks_at_no_future():
    q, k, v = (random(1, 2, 300, 4, seed=i) for i in range(3))
    out = AttentionFunction.apply(q, k, v)
    assert [tuple(t.shape[1:]) for t in out.grad_fn.saved_tensors[4:]] == [(128, 128), (128, 256), (44, 300)]
    changed = k.detach().clone()
    changed[:, :, 130:] = 9
    assert torch.equal(AttentionFunction.apply(q, changed, v)[:, :, :130], out[:, :, :130])


def test_layouts_save_copies():
    "Results and gradients stand in memory as those want them who are next."
    q, k, v = (random(2, 4, 6, 8, seed=i) for i in range(3))
    assert AttentionFunction.apply(q, k, v).transpose(1, 2).is_contiguous()
    x = random(2, 6, 4, 8)
    assert (y := RopeFunction.apply(x.transpose(1, 2), *(t.double() for t in rope_angles(6, 8)))).is_contiguous()
    grad, = torch.autograd.grad(y.sum(), x)
    assert grad.is_contiguous()


def test_a_gradient_of_a_gradient_is_refused():
    for y, x in ((RMSNormFunction.apply(x := random(2, 4), random(4), 0.), x), (RopeFunction.apply(x := random(1, 1, 2, 4), *(t.double() for t in rope_angles(2, 4))), x),
                 (AttentionFunction.apply(x := random(1, 1, 2, 4), random(1, 1, 2, 4, seed=1), random(1, 1, 2, 4, seed=2)), x)):
        g, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"): g.sum().backward()


# --- in a model --------------------------------------------------------------------------------------------------

def uses():
    layer0 = lambda m: [p.requires_grad_(False) for p in (*m.layers[0].parameters(), m.norm.weight)] and loss_of(m)
    return dict(plain=loss_of, short=partial(loss_of, ids=IDS[:, :2]), twice=lambda m: loss_of(m) + 2*loss_of(m, IDS.flip(0)[:, :60]), frozen=layer0,
                recomputed=lambda m: checkpoint(loss_of, m, use_reentrant=False), reentrant=lambda m: loss_of(m) if not torch.is_grad_enabled() else F.cross_entropy(m.scores(m.norm(checkpoint(
                    m.layers[1], m.layers[0](m.embed_tokens(IDS[:, :-1]), (m.cos[:149], m.sin[:149])), (m.cos[:149], m.sin[:149]), use_reentrant=True))).flatten(0, 1), IDS[:, 1:].flatten()),
                accumulated=lambda m: loss_of(m).backward() or loss_of(m, IDS.flip(0)))


@pytest.mark.parametrize("use", uses())
def test_the_same_gradients_in_every_use(model, spies, use):
    usual = gradients(model, uses()[use])
    assert spies["AttentionFunction"].n == 0
    with quick_parts(model) as n: same(gradients(model, uses()[use]), usual)
    assert n == N_PARTS and spies["AttentionFunction"].n >= 2 and spies["RopeFunction"].n == 2*spies["AttentionFunction"].n and spies["RMSNormFunction"].n >= N_PARTS-2
    again = spies["AttentionFunction"].n
    same(gradients(model, uses()[use]), usual)
    assert spies["AttentionFunction"].n == again


def test_no_gradients(model):
    with torch.no_grad(): usual = model(IDS)
    with torch.inference_mode(), quick_parts(model): assert_close(model(IDS), usual, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n, by_hand", [(512, 2), (513, 0)])
def test_a_long_text_has_the_fused_kernel(model, spies, n, by_hand):
    ids = torch.randint(40, (1, n+1), generator=torch.Generator().manual_seed(1))
    usual = gradients(model, partial(loss_of, ids=ids))
    with quick_parts(model): same(gradients(model, partial(loss_of, ids=ids)), usual, 5e-5)
    assert (spies["AttentionFunction"].n, spies["RopeFunction"].n) == (by_hand, 4)


def test_a_cache_goes_the_usual_way(model, spies):
    def told():
        cache = Cache(CFG, 3, 20)
        with torch.no_grad(): return torch.cat([model(ids, cache) for ids in IDS[:, :12].split((7, 1, 4), 1)], 1)
    usual = told()
    with quick_parts(model): assert_close(told(), usual, atol=1e-5, rtol=1e-4)
    assert spies["AttentionFunction"].n == spies["RopeFunction"].n == 0 < spies["RMSNormFunction"].n


@pytest.mark.parametrize("kind", ["bfloat16", "float64", "autocast", "compiled"])
def test_what_it_is_not_made_for_stays_to_the_bit(model, spies, kind):
    if kind in ("bfloat16", "float64"): model = model.to(getattr(torch, kind))
    around = torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext()
    run = torch.compile(model, backend="eager") if kind == "compiled" else model
    with around: usual = gradients(run)
    with around, quick_parts(run): ours = gradients(run)
    assert all(torch.equal(ours[name], g) for name, g in usual.items())
    assert [s.n for s in spies.values()] == [0, 0, 0]


class Marked(torch.Tensor): pass


def test_tensors_of_another_kind_go_the_usual_way(spies):
    "As those that tensor parallelism cuts."
    norm = RMSNorm(4)
    with quick_parts(norm) as n: assert n == 1 and type(norm(torch.ones(2, 4).as_subclass(Marked))) is Marked
    assert spies["RMSNormFunction"].n == 0


class OtherNorm(RMSNorm): pass
class OtherAttention(Attention): pass


@pytest.mark.parametrize("block, n_left", [(partial(Block, norm=OtherNorm), 4), (partial(Block, attention=OtherAttention), 2), (partial(Block, attention=partial(Attention, mix=attend)), 2),
                                           (partial(Block, attention=partial(Attention, norm=lambda width, eps: nn.LayerNorm(width))), 4)])
def test_other_parts_are_left_alone(block, n_left):
    model = filled(Decoder(CFG, block=block)).train()
    usual = gradients(model)
    with quick_parts(model) as n: same(gradients(model), usual)
    assert n == N_PARTS-n_left


def test_hooks_still_fire(model):
    seen = []
    for name, part in model.named_modules():
        if type(part) in (RMSNorm, Attention): part.register_forward_hook(lambda m, args, out, name=name: seen.append(name) or out*1.5)
    usual, before = gradients(model), list(seen)
    seen.clear()
    with quick_parts(model): same(gradients(model), usual)
    assert seen == before and len(seen) == N_PARTS


def test_ddp(model, tmp_path):
    import torch.distributed as dist
    usual = gradients(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with quick_training(wrapped, 150) as n: same({name.removeprefix("module."): g for name, g in gradients(wrapped).items()}, usual)
        assert n == N_PARTS
    finally: dist.destroy_process_group()


def test_nothing_is_left(model, tmp_path):
    with torch.device("meta"): twin = Decoder(CFG)
    lent = lambda: [name for name, m in model.named_modules() if "forward" in vars(m)]
    with pytest.raises(KeyError), quick_parts(model):
        assert len(lent()) == N_PARTS
        with quick_parts(model) as n: assert n == 0
        assert len(lent()) == N_PARTS # the inner block takes nothing back that it has not lent
        state, saved = model.state_dict(), save_model(model, tmp_path/"inside", 0)
        raise KeyError
    assert lent() == [] and part_difference(model, twin) == ""
    assert state.keys() == twin.state_dict().keys()
    save_model(model, tmp_path/"after", 0)
    assert (saved/"model.safetensors").read_bytes() == (tmp_path/"after"/"model.safetensors").read_bytes()
    assert_close(load_model(saved)(IDS), model(IDS))


def test_what_others_have_lent_stays(model):
    model.norm.forward = theirs = lambda x: 2*x
    with quick_parts(model) as n: assert n == N_PARTS-1 and model.norm.forward is theirs
    assert model.norm.forward is theirs


def test_a_copy_made_inside_has_its_own_weights(model):
    with quick_parts(model):
        twin = copy.deepcopy(model)
        with torch.no_grad(): twin.norm.weight.mul_(2)
        assert_close(twin(IDS), 2*model(IDS), atol=1e-5, rtol=1e-4)


# --- for a run ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, precision, n_parts", [(lambda m: m, "fp32", N_PARTS), (lambda m: m, "bf16", 0), (lambda m: m.double(), "fp32", 0), (lambda m: m.bfloat16(), "fp32", 0), (lambda m: m.to("meta"), "fp32", 0)])
def test_quick_training_knows_what_it_is_for(model, monkeypatch, make, precision, n_parts):
    asked = []
    monkeypatch.setattr(backward, "quick_products", lambda n: asked.append(n) or nullcontext())
    with quick_training(make(model), 150, precision) as n: assert n == n_parts
    assert asked == [150] and not [m for m in model.modules() if "forward" in vars(m)]


def test_quick_training_trains_the_same_model():
    def learn(around):
        model = filled(init_weights(Decoder(CFG), 0)).train()
        opt, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        with around(model):
            for _ in range(6):
                opt.zero_grad()
                (loss := loss_of(model)).backward()
                opt.step()
                losses.append(loss.item())
        return losses
    usual, ours = learn(lambda model: nullcontext()), learn(lambda model: quick_training(model, 150))
    assert ours == pytest.approx(usual, rel=1e-5) and ours[-1] < ours[0]-.05


# --- the benchmark -----------------------------------------------------------------------------------------------

def test_the_benchmark_has_all_rows_and_goes_on_where_it_was(tmp_path):
    out = tmp_path/"b.json"
    def run(): return subprocess.run([sys.executable, ROOT/"benchmarks"/"backward.py", "--tiny", "--out", out], capture_output=True, text=True, encoding="utf-8", timeout=300, check=True).stdout
    said, first = run(), json.loads(out.read_text(encoding="utf-8"))
    assert len(first["rows"]) == 2*9 and all(r["seconds"] > 0 and r["error"] < 1e-4 for r in first["rows"]) and said.count("\n| ") == 10
    assert {r["way"] for r in first["rows"] if r["error"] > 0} >= {"all three", "SwiGLU, too", "one product for q, k, v, too"}
    first["rows"] = first["rows"][:-3]
    out.write_text(json.dumps(first), encoding="utf-8")
    run()
    again = json.loads(out.read_text(encoding="utf-8"))
    assert again["rows"][:-3] == first["rows"] and len({(r["way"], r["round"]) for r in again["rows"]}) == 18


def test_the_benchmark_refuses_other_gradients(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT/"benchmarks")
    import importlib.util
    spec = importlib.util.spec_from_file_location("backward_benchmark", ROOT/"benchmarks"/"backward.py")
    spec.loader.exec_module(script := importlib.util.module_from_spec(spec))
    monkeypatch.setitem(script.WAYS, "SwiGLU, too", script.Way(script.ALL, ((script.SwiGLU, lambda self, x: self.down_proj(self.gate_proj(x)*self.up_proj(x))),)))
    with pytest.raises(AssertionError, match="other gradients"): script.main(["--tiny", "--out", str(tmp_path/"b.json")])
    assert not (tmp_path/"b.json").exists()


def test_the_record_says_what_the_chapter_says():
    record = json.loads((ROOT/"nbs"/"backward.json").read_text(encoding="utf-8"))
    sizes, ways, rounds = ({r[key] for r in record["rows"]} for key in ("size", "way", "round"))
    assert (len(sizes), len(ways)) == (5, 9) and len(rounds) >= 3 and len(record["rows"]) == 5*9*len(rounds)
    assert max(r["error"] for r in record["rows"]) < 2e-5
    seconds = {(s, w): median(r["seconds"] for r in record["rows"] if (r["size"], r["way"]) == (s, w)) for s in sizes for w in ways}
    assert all(seconds[s, "all three"] < seconds[s, "autograd"] < seconds[s, "autograd, usual products"] for s in sizes)

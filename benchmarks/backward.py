"""Loss and gradients of a step, with autograd and by hand: the parts of `llm_scratch.backward` switched on one by one, one thread, taking turns.

    python benchmarks/backward.py                seven rounds; about two minutes on a quiet core; goes on where it was stopped
    python benchmarks/backward.py --tiny         the same in seconds, for a test: its numbers say nothing
    python benchmarks/backward.py --out FILE     elsewhere than nbs/backward.json

Chapter 05h draws its table from the record. All ways run within `quick_products`, but those that are called "usual products". Two things that gained nothing are rows, too: SwiGLU's
backward pass by hand, and one product for queries, keys and values. Before the clock starts, the gradients of each way are compared with autograd's. Seconds are CPU-seconds.
"""
import os

if __name__ == "__main__": os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1") # before torch starts its threads

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from types import MethodType, SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch import backward  # noqa: E402
from llm_scratch.architecture import Attention, Decoder, ModelConfig, SwiGLU, fused_attend, init_weights, rope  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.infrastructure import quick_products  # noqa: E402

SMALL = ModelConfig(vocab_size=96, context_len=256, n_layers=4, n_heads=4, n_kv_heads=4, d_model=128, d_ff=344, d_head=32)
LARGE = ModelConfig(vocab_size=4096, context_len=256, n_layers=7, n_heads=4, n_kv_heads=4, d_model=256, d_ff=704, d_head=64)
SIZES = {"0.8M, 12 x 64": (replace(SMALL, context_len=64), 12, 4), "0.8M, 8 x 128": (replace(SMALL, context_len=128), 8, 3), "0.8M, 8 x 256": (SMALL, 8, 2), "0.8M, 2 x 1024": (replace(SMALL, context_len=1024), 2, 1),
         "7M, 8 x 256": (LARGE, 8, 1)} # config, texts, steps
TINY = {"tiny": (replace(SMALL.tiny(), context_len=24), 2, 1)}

# --- the ways ----------------------------------------------------------------------------------------------------

USUAL = dict(RMSNormFunction=lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps), RopeFunction=rope, AttentionFunction=fused_attend)

class SwiGLUFunction(torch.autograd.Function):
    "`down(silu(gate(x)) * up(x))`, where autograd would keep one tensor more."
    @staticmethod
    def forward(ctx, x:torch.Tensor, gate:torch.Tensor, up:torch.Tensor, down:torch.Tensor)->torch.Tensor:
        rows = x.flatten(0, -2)
        g, u = rows @ gate.mT, rows @ up.mT
        s = torch.sigmoid(g)
        ctx.save_for_backward(rows, g, u, s, gate, up, down)
        return ((g*s).mul_(u) @ down.mT).view_as(x)
    @staticmethod
    def backward(ctx, grad:torch.Tensor)->tuple[torch.Tensor, ...]:
        rows, g, u, s, gate, up, down = ctx.saved_tensors
        dy, act = grad.flatten(0, -2), g*s
        dh = dy @ down
        d_down = dy.mT @ (act*u)
        du = dh*act
        dg = dh.mul_(u).mul_(torch.addcmul(s, act, 1-s)) # the derivative of silu
        return torch.addmm(dg @ gate, du, up).view_as(grad), dg.mT @ rows, du.mT @ rows, d_down

def swiglu_by_hand(self:SwiGLU, x:torch.Tensor)->torch.Tensor: return SwiGLUFunction.apply(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)

def one_product(self:Attention, x_BTD:torch.Tensor, rotation:tuple[torch.Tensor, torch.Tensor], cache:None=None)->torch.Tensor:
    "Attention by hand, whose queries, keys and values come from one matrix, made of three at every step."
    projections = self.q_proj, self.k_proj, self.v_proj
    joint = F.linear(x_BTD, torch.cat([p.weight for p in projections])).unflatten(-1, (-1, self.d_head))
    q, k, v = joint.split([p.out_features//self.d_head for p in projections], dim=2)
    q, k = (backward.RopeFunction.apply(norm(x).transpose(1, 2), *rotation) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
    return self.o_proj(backward.AttentionFunction.apply(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2))

@contextmanager
def by_hand(model:nn.Module, functions:tuple[str, ...], others:dict[type, object])->Iterator[None]:
    "Only these functions by hand, the rest of them by autograd; and other forwards for some classes."
    with ExitStack() as stack:
        for name in USUAL.keys() - set(functions): stack.enter_context(patch.object(backward, name, SimpleNamespace(apply=USUAL[name])))
        stack.enter_context(backward.quick_parts(model))
        for part in model.modules():
            if type(part) in others: stack.enter_context(patch.object(part, "forward", MethodType(others[type(part)], part)))
        yield

@dataclass(frozen=True)
class Way:
    "What is by hand in a step."
    functions:tuple[str, ...]|None # None: autograd
    others:tuple[tuple[type, object], ...]=()
    quick:bool=True # within `quick_products`
    def around(self, model:nn.Module, n_positions:int)->ExitStack:
        stack = ExitStack()
        stack.enter_context(quick_products(n_positions) if self.quick else nullcontext())
        stack.enter_context(nullcontext() if self.functions is None else by_hand(model, self.functions, dict(self.others)))
        return stack

ALL = tuple(USUAL)
WAYS = {"autograd": Way(None), "RMSNorm": Way(ALL[:1]), "rope": Way(ALL[1:2]), "attention": Way(ALL[2:]), "all three": Way(ALL),
        "SwiGLU, too": Way(ALL, ((SwiGLU, swiglu_by_hand),)), "one product for q, k, v, too": Way(ALL, ((Attention, one_product),)),
        "autograd, usual products": Way(None, quick=False), "all three, usual products": Way(ALL, quick=False)}

# --- the clock ---------------------------------------------------------------------------------------------------

def step(model:nn.Module, ids:torch.Tensor, targets:torch.Tensor)->None:
    model.zero_grad()
    F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()

def error(model:nn.Module, way:Way, ids:torch.Tensor, targets:torch.Tensor)->float:
    "How far gradients are from autograd's, as a share of the largest number of their tensor."
    grads = []
    for w in (WAYS["autograd, usual products"], way):
        with w.around(model, ids.shape[1]): step(model, ids, targets)
        grads.append([p.grad.clone() for p in model.parameters()])
    return max(float((a-b).abs().max()/a.abs().max()) for a, b in zip(*grads, strict=True))

def measure(size:str, sizes:dict, rounds:int, record:dict, out:Path)->None:
    "Rounds that are missing in the record; in each, every way has its turn."
    cfg, batch_size, n_steps = sizes[size]
    done = {(r["way"], r["round"]) for r in record["rows"] if r["size"] == size}
    if not [w for w in WAYS for i in range(rounds) if (w, i) not in done]: return
    rng = torch.Generator().manual_seed(0)
    model = init_weights(Decoder(cfg), 0)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.02*torch.randn(p.shape, generator=rng)) # a new model has branches of zeros
    ids, targets = torch.randint(cfg.vocab_size, (2, batch_size, cfg.context_len), generator=rng)
    errors = {name: error(model, way, ids, targets) for name, way in WAYS.items()} # and everybody is warm
    if max(errors.values()) > 1e-4: raise AssertionError(f"other gradients than autograd's: {errors}")
    names = list(WAYS)
    for i in range(rounds):
        first = 2*i % len(names)
        for name in names[first:] + names[:first]: # nobody is always first
            if (name, i) in done: continue
            with WAYS[name].around(model, cfg.context_len):
                gc.collect()
                start = time.process_time()
                for _ in range(n_steps): step(model, ids, targets)
                took = time.process_time()-start
            record["rows"].append(dict(size=size, way=name, round=i, seconds=round(took/n_steps, 6), error=float(f"{errors[name]:.1e}")))
        write_json(out, record)

def table(record:dict)->str:
    "Milliseconds of a step, medians of the rounds, and that over autograd's, as Markdown."
    of = lambda size, way: median(r["seconds"] for r in record["rows"] if (r["size"], r["way"]) == (size, way))
    sizes, names = (list(dict.fromkeys(r[key] for r in record["rows"])) for key in ("size", "way"))
    names.sort(key=list(WAYS).index)
    rows = ["| way | " + " | ".join(sizes) + " |", "|---"*(1+len(sizes)) + "|"]
    rows += [f"| {way} | " + " | ".join(f"{1e3*of(size, way):.1f} ({of(size, way)/of(size, 'autograd'):.2f})" for size in sizes) + " |" for way in names]
    return "\n".join(rows)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="how often each is timed")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and two rounds")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"backward.json", metavar="FILE", help="where the record goes")
    args = parser.parse_args(argv)
    if args.rounds < 1: parser.error(f"--rounds {args.rounds} measures nothing: give 1 or more")
    torch.set_num_threads(1)
    sizes = TINY if args.tiny else SIZES
    setup = dict(machine=f"{platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}")
    record = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    if {k: record.get(k) for k in setup} != setup: record = dict(date=str(date.today())) | setup | dict(rows=[])
    for size in sizes: measure(size, sizes, 2 if args.tiny else args.rounds, record, args.out)
    print(f"{record['machine']}; CPU-milliseconds of loss and gradients, and times autograd's\n\n{table(record)}")

if __name__ == "__main__": main()

"""Two processes on two cores against one on one, with the same work: how much of the second core becomes training, and what communication takes.

    python benchmarks/scaling.py                      seven million weights; a few minutes
    python benchmarks/scaling.py --rounds 9 --steps 6
    python benchmarks/scaling.py --tiny               seconds: it shows that everything runs, and its numbers say nothing

Every way makes the same updates on the same global batch. They take turns within a round; a round's step is the median of its steps, by the slower rank.
Efficiency is the seconds of one process over twice those of two. The share of communication is what a step of two processes takes longer than the same
step without a word said (whose weights drift apart, so its losses are not compared). Each rank is pinned to a core, with all its threads.
"""
import os

if __name__ == "__main__": os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1") # before torch starts its threads

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights, n_params  # noqa: E402
from llm_scratch.distributed import BucketedGradients, Ranks, Wire, share_of_loss  # noqa: E402

CFG = ModelConfig(vocab_size=4096, context_len=256, n_layers=8, n_heads=4, n_kv_heads=2, d_model=256, d_ff=704, d_head=64)
WAYS = dict(one="one process, one core", silent="two, without a word", ours="two, our buckets", ddp="two, torch DDP", end="two, one all-reduce at the end")
GOAL = .85 # of the efficiency of our buckets

def pin(core:int)->None:
    "Keep this process and all its threads on one core, where the system lets us."
    if not hasattr(os, "sched_setaffinity"): return
    for thread in os.listdir("/proc/self/task"): os.sched_setaffinity(int(thread), {core})

def add_up_at_the_end(model:torch.nn.Module, wire:Wire)->None:
    "All gradients in one row, when the backward pass is over."
    row = wire.all_reduce(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for p,g in zip(model.parameters(), row.split([p.numel() for p in model.parameters()])): p.grad = g.view_as(p)

def worker(way:str, wire:Wire, cfg:ModelConfig)->tuple[Callable, torch.optim.Optimizer]: # `(ids, targets)` to a loss, gradients in place
    "One way to come from a batch to gradients."
    model = init_weights(Decoder(cfg), 0)
    n = 1. if way == "one" else wire.world
    gradients = BucketedGradients(model, wire, 4*2**20) if way == "ours" else None
    run = torch.nn.parallel.DistributedDataParallel(model) if way == "ddp" else model
    def grads(ids, targets):
        loss = share_of_loss(run, ids, targets, ids.numel()*n)
        (loss*n if way == "ddp" else loss).backward() # DDP divides by the ranks once more
        if way == "ours": gradients.finish()
        if way == "end": add_up_at_the_end(model, wire)
        return loss.detach()
    return grads,torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

def seconds(way:str, cfg:ModelConfig, batch_size:int, n_steps:int, cores:list[int])->tuple[list[float], list[float]]:
    "Seconds of each step after a first one, and the loss of every step, of this rank's part."
    wire = Wire()
    pin(cores[wire.rank])
    if way == "one" and wire.rank: return [0.]*n_steps,[0.]*(n_steps+1) # the other core rests
    grads,optimizer = worker(way, wire, cfg)
    took,losses = [],[]
    for step in range(n_steps+1):
        rows = torch.randint(cfg.vocab_size, (batch_size, cfg.context_len+1), generator=torch.Generator().manual_seed(step))
        if way != "one": rows = rows.chunk(wire.world)[wire.rank]
        if way not in ("one", "silent"): dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        losses.append(grads(rows[:,:-1], rows[:,1:]))
        optimizer.step()
        took.append(time.perf_counter()-start)
    return took[1:],[x.item() for x in losses]

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each way takes its turn")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a turn, after one that is not")
    parser.add_argument("--batch", type=int, default=8, help="texts of a step, of 256 ids each, on all processes together; even")
    parser.add_argument("--tiny", action="store_true", help="a toy model")
    args = parser.parse_args()
    cfg = CFG.tiny() if args.tiny else CFG
    cores = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else [0, 1]
    if len(cores) < 2: parser.error("this process may use one core only: two processes need two")
    if args.batch < 2 or args.batch % 2: parser.error(f"--batch {args.batch} does not divide into two equal parts")
    took,losses = {way:[] for way in WAYS},{}
    with Ranks(2, timeout=600) as ranks:
        for r in range(args.rounds):
            for way in [*WAYS][r%len(WAYS):] + [*WAYS][:r%len(WAYS)]: # nobody is always first
                (a,ours),(b,theirs) = ranks(seconds, way, cfg, args.batch, args.steps, cores)
                took[way].append(median(map(max, a, b)))
                losses[way] = [x+y for x,y in zip(ours, theirs)]
    for way in ("ours", "ddp", "end"):
        gap = max(abs(a-b) for a,b in zip(losses[way], losses["one"]))
        if gap > 1e-3: raise AssertionError(f"{WAYS[way]}: losses are {gap} from those of one process")
    tokens = args.batch*cfg.context_len
    print(f"torch {torch.__version__}, Python {platform.python_version()}; {n_params(cfg)/1e6:.1f} million weights, {tokens:,} tokens a step, median of {args.rounds} rounds\n")
    print("| | seconds a step | tokens a second | efficiency (lowest to highest) | communication |\n|---|---|---|---|---|")
    for way,name in WAYS.items():
        t = median(took[way])
        pairs = sorted(one/(2*two) for one,two in zip(took["one"], took[way]))
        share = "" if way in ("one", "silent") else f"{1 - median(s/w for s,w in zip(took['silent'], took[way])):.1%}"
        print(f"| {name} | {t:.3f} | {tokens/t:,.0f} | {'' if way == 'one' else f'{median(pairs):.2f} ({pairs[0]:.2f} to {pairs[-1]:.2f})'} | {share} |")
    ours = median(one/(2*two) for one,two in zip(took["one"], took["ours"]))
    if not args.tiny: print(f"\nThe goal is an efficiency of {GOAL} with our buckets: {'reached' if ours >= GOAL else 'missed'}.")

if __name__ == "__main__": main()

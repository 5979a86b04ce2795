"""Training tokens per second on one GPU, bfloat16: our decoder of 124 million weights beside transformers (Llama), litgpt (Llama) and a GPT-2-style model.

    python benchmarks/gpu.py                    five rounds, and minutes of compiling before
    python benchmarks/gpu.py --peers FOLDER     where litgpt lies: pip install --no-deps --target FOLDER -r benchmarks/peers.txt
    python benchmarks/gpu.py --tiny             seconds, on a CPU where there is no GPU: it shows that everything runs, and its numbers say nothing

Everybody gets the same batch (16 texts of 1,024 tokens of 50,304 kinds), the same widths, depth and heads, tied embeddings, clipping to length 1 and fused AdamW
on float32 weights, products in bfloat16, first as it comes and then compiled by `torch.compile`. A step is a whole update. The share is of 989 TFLOP/s, the
data sheet's dense bfloat16 peak of an H100 or H200, by six operations per weight and token and attention's full square. Memory is the most that tensors took.
"""
import argparse
import gc
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"benchmarks")] # this checkout, whichever is installed
from throughput import NAMES, PEERS, TINY, Size, Step, adamw  # noqa: E402

from llm_scratch.architecture import Decoder, ModelConfig, init_weights, n_params, training_flops_per_token  # noqa: E402
from llm_scratch.core import UserError, write_json  # noqa: E402
from llm_scratch.engines import Engine  # noqa: E402
from llm_scratch.pretraining import TrainState, update  # noqa: E402
from llm_scratch.stability import compile_in_place  # noqa: E402

GPT2 = Size("124M", ModelConfig(vocab_size=50304, context_len=1024, n_layers=12, n_heads=12, n_kv_heads=12, d_model=768, d_ff=2048, d_head=64), 16, 10)
PEAK = 989e12 # operations per second

def ours(cfg:ModelConfig, device:torch.device, ids:torch.Tensor, compiled:bool)->tuple[nn.Module, Step]:
    "As `pretrain` trains it."
    model,engine = init_weights(Decoder(cfg), 0).to(device),Engine("bf16")
    engine.device = device
    state = TrainState(model, [adamw(model)], engine=engine)
    if compiled and not compile_in_place(model, ids, engine): raise RuntimeError("ours could not be compiled")
    return model,lambda ids,targets: update(state, ids, targets).loss

def peer(make:str, cfg:ModelConfig, device:torch.device, ids:torch.Tensor, compiled:bool)->tuple[nn.Module, Step]:
    "The loop that everybody writes, within autocast."
    model,_ = PEERS[make](cfg)
    model.to(device)
    opt,scores = adamw(model),torch.compile(model) if compiled else model
    def step(ids:torch.Tensor, targets:torch.Tensor)->float:
        opt.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            out = scores(input_ids=ids, use_cache=False).logits if make == "transformers" else scores(ids)
            loss = F.cross_entropy(out.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        return loss.item()
    return model,step

def seconds(work, device:torch.device)->float: # by the clock on the wall, with the GPU's queue empty before and after
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter()-start

def measure(size:Size, rounds:int, device:torch.device)->list[dict]:
    "One way after the other is made and warmed up; then rounds in which every way has its turn."
    rng = torch.Generator().manual_seed(0)
    both = torch.randint(size.cfg.vocab_size, (size.batch_size, size.cfg.context_len+1), generator=rng).to(device)
    ids,targets = both[:,:-1].contiguous(),both[:,1:].contiguous()
    rows,runs = [],{}
    for compiled in (False, True):
        for name,make in dict(ours=ours, **{NAMES[p]:partial(peer, p) for p in PEERS}).items():
            way = name + ", compiled"*compiled
            gc.collect()
            if device.type == "cuda": torch.cuda.reset_peak_memory_stats(); torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            start = time.perf_counter()
            try: model,step = make(size.cfg, device, ids, compiled)
            except UserError as e:
                print(f"skipped {way}: {e}", flush=True)
                continue
            losses = [step(ids, targets) for _ in range(4)]
            if not min(losses[1:]) < losses[0]: raise AssertionError(f"{way} does not learn: {losses}")
            runs[way] = step
            rows.append(dict(way=way, n_weights=sum(p.numel() for p in model.parameters()), warm_up=round(time.perf_counter()-start, 1),
                             bytes=torch.cuda.max_memory_allocated()-before if device.type == "cuda" else 0, speeds=[]))
            print(rows[-1], flush=True)
    for i in range(rounds):
        first = 3*i % len(rows)
        for row in rows[first:] + rows[:first]:
            took = seconds(lambda: [runs[row["way"]](ids, targets) for _ in range(size.n_steps)], device)
            row["speeds"].append(round(size.n_steps*size.n_tokens/took, 1))
    return rows

def table(record:dict, size:Size)->str:
    "Medians, as Markdown."
    fast = {r["way"]:median(r["speeds"]) for r in record["rows"]}
    lines = ["| way | tokens per second | ours is faster by | share of the peak | memory | warm-up |", "|---|---|---|---|---|---|"]
    for r in record["rows"]:
        n,own = fast[r["way"]],fast["ours, compiled" if r["way"].endswith("compiled") else "ours"]
        lines.append(f"| {r['way']} | {n:,.0f} | {own/n:.2f} | {n*training_flops_per_token(size.cfg, size.cfg.context_len)/PEAK:.0%} | {r['bytes']/1e9:.1f} GB | {r['warm_up']:.0f} s |")
    return "\n".join(lines)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is timed")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="where packages lie that ours can't be installed with")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, one round, without a GPU where there is none")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"gpu.json", metavar="FILE", help="where the record goes")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.tiny: parser.error("there is no GPU that PyTorch can use: --tiny runs anywhere")
    if args.peers: sys.path.append(str(args.peers)) # last: what is installed here comes first
    os.environ["HF_HUB_OFFLINE"] = "1"
    device,size = torch.device("cuda" if torch.cuda.is_available() else "cpu"),TINY[0] if args.tiny else GPT2
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    record = dict(machine=f"{name}, torch {torch.__version__}", n_weights=n_params(size.cfg), rows=measure(size, 1 if args.tiny else args.rounds, device))
    write_json(args.out, record)
    print(f"\n{record['machine']}, medians of {len(record['rows'][0]['speeds'])} rounds.\n\n{table(record, size)}")

if __name__ == "__main__": main()

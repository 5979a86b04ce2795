"""How tokens per CPU-second and peak memory grow with weights, context and batch.

    python benchmarks/growth.py                 about a minute on one core
    python benchmarks/growth.py --rounds 9
    python benchmarks/growth.py --tiny          seconds, for a test: the numbers say nothing

Writes nbs/growth.json, which chapter 06e reads. One thread. A point is a whole update (both passes, clipping, Muon and AdamW) of a decoder of chapter 06e's
family. All points take turns within a round; a point's seconds are the median over rounds, of CPU time. Memory is the most bytes of tensors that are alive at
once in two updates, by chapter 05a's log of the allocator, beside what its `peak_memory` says without running anything.
"""
import argparse
import platform
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights, n_params, training_flops_per_token  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.planning import Layout, peak_bytes, peak_memory  # noqa: E402
from llm_scratch.pretraining import TrainState, make_optimizers, update  # noqa: E402
from llm_scratch.rates import fit_power  # noqa: E402
from llm_scratch.scaling import one_dial  # noqa: E402

V = 256
AXES = dict(weights=("width", (32, 64, 96, 128, 192, 256)), context=("context", (64, 128, 256, 512, 1024, 2048)), batch=("batch", (1, 2, 4, 8, 16, 32)))
BASE = dict(width=64, context=128, batch=8)
TOKENS = 2048 # of an update, along the axis of contexts: longer texts, fewer of them

def config(width:int, context:int)->ModelConfig: return one_dial(width, V, context)

def points(tiny:bool)->list[dict]: # axis, width, context, batch
    "What is measured."
    found = []
    for axis, (dial, values) in AXES.items():
        for value in values[:2] if tiny else values:
            at = BASE | {dial: value}
            if axis == "context": at["batch"] = max(1, TOKENS//value)
            found.append(dict(axis=axis) | at)
    return found

def prepared(point:dict)->tuple[TrainState, torch.Tensor]:
    cfg = config(point["width"], point["context"])
    model = init_weights(Decoder(cfg), 0)
    return TrainState(model, make_optimizers(model)), torch.randint(V, (point["batch"], point["context"]+1), generator=torch.Generator().manual_seed(0))

def once(state:TrainState, ids:torch.Tensor)->float: # CPU seconds of an update
    start = time.process_time()
    update(state, ids[:, :-1], ids[:, 1:])
    return time.process_time() - start

def peak(point:dict)->int: # bytes
    def work():
        state, ids = prepared(point)
        for _ in range(2): once(state, ids)
    return peak_bytes(work)

def measure(tiny:bool, rounds:int)->dict:
    "The whole record."
    rows = points(tiny)
    for row in rows:
        cfg = config(row["width"], row["context"])
        row |= dict(weights=n_params(cfg), flops_per_token=training_flops_per_token(cfg, row["context"]), peak_bytes=peak(row),
                    predicted_bytes=round(peak_memory(cfg, Layout(optimizer="muon", batch_size=row["batch"]), row["context"]).total))
    ready = [prepared(row) for row in rows]
    for one in ready: once(*one) # what happens only once
    seconds = [[] for _ in rows]
    for _ in range(rounds):
        for one, taken in zip(ready, seconds): taken.append(once(*one))
    for row, taken in zip(rows, seconds): row |= dict(seconds=[round(s, 5) for s in taken], tokens_per_second=round(row["batch"]*row["context"]/median(taken), 1))
    return dict(machine=f"{platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}", rounds=rounds, points=rows)

def table(record:dict)->str:
    "Points, then the exponents between the two largest of each axis, as Markdown."
    lines = ["| axis | width | context | batch | weights | tokens per CPU-s | GFLOP/s | MB alive | predicted |", "|---"*9 + "|"]
    for r in record["points"]:
        lines.append(f"| {r['axis']} | {r['width']} | {r['context']} | {r['batch']} | {r['weights']:,} | {r['tokens_per_second']:,.0f} | {r['tokens_per_second']*r['flops_per_token']/1e9:.1f} | {r['peak_bytes']/1e6:.2f} | {r['predicted_bytes']/1e6:.2f} |")
    for axis in AXES:
        same = [r for r in record["points"] if r["axis"] == axis][-4:]
        x = [r[axis] for r in same]
        lines.append(f"\n{axis}, largest four: tokens per second ~ {axis}^{fit_power(x, [r['tokens_per_second'] for r in same])[0]:.2f}, memory ~ {axis}^{fit_power(x, [r['peak_bytes'] for r in same])[0]:.2f}")
    return "\n".join(lines)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two points per axis")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each point")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"growth.json", metavar="FILE", help="the record")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    record = measure(args.tiny, 2 if args.tiny else args.rounds)
    write_json(args.out, record)
    print(table(record))

if __name__ == "__main__": main()

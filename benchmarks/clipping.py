"""The gradient clipped by length, by value, by both and not at all, on the same runs: held-out loss, and what clipping does to the direction.

    python benchmarks/clipping.py                five seeds, about two minutes on one core; goes on where it was stopped
    python benchmarks/clipping.py --tiny         the same in seconds, for a test
    python benchmarks/clipping.py --out FILE     elsewhere than nbs/clipping.json

Chapter 06 draws its table from the record. A small decoder learns the recipes byte by byte, with SGD at two rates, AdamW, or Muon and AdamW. In the "wild" runs every tenth batch from
the thirtieth on is made of bytes drawn at random, as a broken file would be. The seed decides the first weights, the order of the batches and the random bytes.
"""
import argparse
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.data import load_corpus, split_corpus  # noqa: E402
from llm_scratch.engines import Engine  # noqa: E402
from llm_scratch.evaluation import half_width  # noqa: E402
from llm_scratch.pretraining import Batches, NotFinite, TrainState, make_adamw, make_optimizers, train, wsd  # noqa: E402

CFG = ModelConfig(256, context_len=32, n_layers=2, n_heads=2, n_kv_heads=1, d_model=32, d_ff=64, d_head=16)
def sgd(model:nn.Module, lr:float)->list[torch.optim.Optimizer]: return [torch.optim.SGD([dict(params=list(model.parameters()), initial_lr=lr)], lr=lr, momentum=.9)]
OPTIMIZERS = {"SGD 0.2": partial(sgd, lr=.2), "SGD 0.5": partial(sgd, lr=.5), "AdamW": make_adamw, "Muon + AdamW": make_optimizers}
CLIPS = {"none": dict(max_norm=math.inf), "length 1": dict(max_norm=1.), "value 1": dict(max_norm=math.inf, max_value=1.), "value 0.01": dict(max_norm=math.inf, max_value=.01),
         "value 1, length 1": dict(max_norm=1., max_value=1.)}
KINDS, SEEDS, N_STEPS = ("clean", "wild"), tuple(range(5)), 120
LOST = 20. # nats per byte; a loss above it, or none, is written so

@dataclass
class Watching(Engine):
    "Plain training that notes, at every update, the gradient before and after it is clipped."
    def __post_init__(self): self.seen = []
    def step(self, model:nn.Module, optimizers:list, max_norm:float, max_value:float=math.inf)->float:
        flat = lambda: torch.cat([p.grad.flatten() for p in model.parameters()])
        raw = flat()
        norm = super().step(model, optimizers, max_norm, max_value)
        cut = flat()
        self.seen.append((norm, raw.abs().max().item(), F.cosine_similarity(raw, cut, 0).item(), (cut.norm()/raw.norm()).item()))
        return norm

@dataclass
class Wild:
    "Batches, of which every tenth from the thirtieth on is made of random bytes."
    batches:Batches
    def __getitem__(self, step:int)->tuple[torch.Tensor, torch.Tensor]:
        if step < 30 or step%10: return self.batches[step]
        rng = torch.Generator().manual_seed(self.batches.seed*1000+step)
        both = torch.randint(256, (self.batches.batch_size, self.batches.context_len+1), generator=rng)
        return both[:,:-1], both[:,1:]

def learn(optimizer:str, clip:str, kind:str, seed:int, row:np.ndarray, held_out:tuple[torch.Tensor, torch.Tensor], n_steps:int)->dict:
    "One run: its held-out loss, and what was noted, over all updates and over those on wild batches."
    torch.manual_seed(seed)
    model = Decoder(CFG)
    state = TrainState(model, OPTIMIZERS[optimizer](model), engine=(engine := Watching()))
    batches, start = Batches(row, CFG.context_len, 8, seed), time.process_time()
    try:
        for _ in train(state, Wild(batches) if kind == "wild" else batches, partial(wsd, n_steps=n_steps), n_steps, **CLIPS[clip]): pass
        with torch.no_grad(): loss = F.cross_entropy(model(held_out[0]).flatten(0, 1), held_out[1].flatten()).item()
    except NotFinite: loss = math.inf
    seen = np.array(engine.seen)
    row = dict(optimizer=optimizer, clip=clip, kind=kind, seed=seed, loss=round(min(loss, LOST), 4), cpu_seconds=round(time.process_time()-start, 2))
    names = "norm", "largest", "cosine", "kept"
    row |= {name: round(float(x), 4) for name, x in zip(names, np.nanmedian(seen[min(20, n_steps//2):], 0))}
    row |= dict(largest_ever=round(float(np.nanmax(seen[:, 1])), 3), clipped=round(float((seen[:, 3] < .999).mean()), 3), lowest_cosine=round(float(np.nanmin(seen[:, 2])), 3))
    if kind == "wild" and n_steps > 30: row |= dict(wild_norm=round(float(np.nanmedian(seen[30::10, 0])), 3))
    return row

def paired(record:dict, optimizer:str, clip:str, kind:str)->tuple[float, float]: # mean difference and the half-width of its 95 % interval
    "Loss with a clip minus loss without, by seed."
    of = lambda c: {r["seed"]: r["loss"] for r in record["runs"] if (r["optimizer"], r["clip"], r["kind"]) == (optimizer, c, kind)}
    a, b = of(clip), of("none")
    apart = [a[s]-b[s] for s in a]
    return mean(apart), half_width(apart)

def table(record:dict)->str:
    "Held-out loss without clipping, and what each clip adds to it, as Markdown."
    lost = lambda optimizer, clip, kind: sum(r["loss"] > math.log(256) for r in record["runs"] if (r["optimizer"], r["clip"], r["kind"]) == (optimizer, clip, kind)) # worse than to know nothing
    rows = ["| batches | optimizer | no clipping | " + " | ".join(list(CLIPS)[1:]) + " |", "|---"*(2+len(CLIPS)) + "|"]
    for kind, optimizer in product(KINDS, dict.fromkeys(r["optimizer"] for r in record["runs"])):
        plain = [r["loss"] for r in record["runs"] if (r["optimizer"], r["clip"], r["kind"]) == (optimizer, "none", kind)]
        word = lambda clip, text: f"{n} of {len(plain)} lost" if (n := lost(optimizer, clip, kind)) else text
        of = lambda clip: f"{mean(r['loss'] for r in record['runs'] if (r['optimizer'], r['clip'], r['kind']) == (optimizer, clip, kind)):.3f}"
        apart = lambda clip: "{:+.3f} ± {:.3f}".format(*paired(record, optimizer, clip, kind)) if not lost(optimizer, "none", kind) else of(clip)
        cells = [word(clip, apart(clip)) for clip in list(CLIPS)[1:]]
        rows.append(f"| {kind} | {optimizer} | {word('none', f'{mean(plain):.3f}')} | " + " | ".join(cells) + " |")
    return "\n".join(rows)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two seeds, two optimizers and a few updates")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"clipping.json", metavar="FILE", help="where the record goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    seeds, n_steps, optimizers = (SEEDS[:2], 4, list(OPTIMIZERS)[2:]) if args.tiny else (SEEDS, N_STEPS, list(OPTIMIZERS))
    corpus = split_corpus(load_corpus(["recipes"]), n_validation=100)
    row = np.frombuffer("".join(corpus["train"]["text"]).encode(), dtype=np.uint8)
    held = np.frombuffer("".join(corpus["validation"]["text"]).encode(), dtype=np.uint8)
    held_out = Batches(held, CFG.context_len, 300)[0]
    setup = dict(machine=f"{platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}", n_steps=n_steps)
    record = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    if {k: record.get(k) for k in setup} != setup: record = dict(date=str(date.today())) | setup | dict(runs=[])
    done = {(r["optimizer"], r["clip"], r["kind"], r["seed"]) for r in record["runs"]}
    for seed, kind, optimizer, clip in product(seeds, KINDS, optimizers, CLIPS):
        if (optimizer, clip, kind, seed) in done: continue
        record["runs"].append(learn(optimizer, clip, kind, seed, row, held_out, n_steps))
        write_json(args.out, record)
        print(record["runs"][-1], flush=True)
    print(table(record))

if __name__ == "__main__": main()

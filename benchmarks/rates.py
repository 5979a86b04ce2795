"""Learning rates at the size of this book: how large, coming down how, found by what, and do they carry over to another width?

    python benchmarks/rates.py                 three to five seeds, about eight minutes of one core
    python benchmarks/rates.py --tiny          the same in seconds, for a test: small models, a few updates
    python benchmarks/rates.py --out FILE      elsewhere than nbs/rates.json

Chapter 06a reads the record. Every row is written when it is done, and a row that is there is not run again, so the script may be stopped and started.
All rows learn bytes of recipes; a seed decides the first weights and the order of windows, and rows with one seed share both.
"""
import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights, n_params  # noqa: E402
from llm_scratch.core import read_json, write_json  # noqa: E402
from llm_scratch.data import load_corpus, split_corpus  # noqa: E402
from llm_scratch.pretraining import Batches, TrainState, make_optimizers, train, wsd  # noqa: E402
from llm_scratch.rates import borrowed, cosine, draw_for_width, linear, make_width_adamw, make_width_optimizers, range_test  # noqa: E402

@dataclass(frozen=True)
class Plan:
    "All that is tried."
    width:int=64 # of the model of all parts but the last
    n_steps:int=250 # updates of its runs
    batch_size:int=16 # windows per update
    context:int=64 # bytes per window
    rates:tuple=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2) # of AdamW; the first is the prescribed one
    seeds:tuple=(0, 1, 2)
    more_seeds:tuple=(0, 1, 2, 3, 4) # for schedules, whose differences are small
    cooldowns:tuple=(.1, .2, .4, .6) # shares of the run
    ends:tuple=(.5, 1) # lengths of the run, times `n_steps`, that one stable run can have
    range_steps:int=100 # updates of a range test
    widths:tuple=(32, 64, 128) # the first is the base
    width_rates:tuple=(("standard", 32, (.0025, .005, .01, .02)), ("standard", 64, (.0025, .005, .01, .02)), ("standard", 128, (.00125, .0025, .005, .01)),
                       *(("transferred", d, (.0025, .005, .01, .02)) for d in (32, 64, 128)), # of AdamW
                       ("muon", 32, (1., 2., 4.)), ("muon", 64, (1., 2., 4.)), ("muon", 128, (.5, 1., 2.)), # factors of the rates of `make_optimizers`
                       ("muon transferred", 128, (1., 2., 4.)), *(("scores doubled", d, (.01,)) for d in (32, 128)))
    width_steps:int=120 # updates of the runs over widths
    width_batch:int=8 # windows per update

TINY = Plan(width=32, n_steps=6, batch_size=2, context=16, rates=(1e-4, 1e-2), seeds=(0, 1), more_seeds=(0, 1), cooldowns=(.5,), ends=(.5, 1), range_steps=8,
            widths=(32, 48), width_rates=tuple((way, d, (.01,)) for way in ("standard", "transferred", "muon", "muon transferred", "scores doubled") for d in (32, 48)), width_steps=4, width_batch=2)

class Lab:
    "The text, the record, and the rows that are not there yet."
    def __init__(self, plan:Plan, out:Path):
        corpus = split_corpus(load_corpus(["recipes"]), n_validation=100)
        to_row = lambda part: np.frombuffer("".join(corpus[part]["text"]).encode(), dtype=np.uint8)
        self.plan, self.out, self.row = plan, out, to_row("train")
        T, held_out = plan.context, to_row("validation")
        windows = held_out[:len(held_out)//(T+1)*(T+1)].reshape(-1, T+1)
        self.windows = torch.from_numpy(windows[::max(1, len(windows)//400)][:400].astype(np.int64))
        told = json.loads(json.dumps(dict(plan=asdict(plan), weights={str(d): n_params(self.cfg(d)) for d in sorted({plan.width, *plan.widths})}, windows=len(self.windows)))) # as it will be read: tuples are lists
        self.record = read_json(out) if out.exists() else dict(**told, rows=[])
        assert {k: self.record[k] for k in told} == told, f"{out} is of another plan: delete it"

    def cfg(self, d:int)->ModelConfig: return ModelConfig(256, self.plan.context, 2, d//16, d//16, d, 2*d, 16)
    def batches(self, seed:int, batch_size:int|None=None)->Batches: return Batches(self.row, self.plan.context, batch_size or self.plan.batch_size, seed)
    def find(self, **key)->list[dict]: return [r for r in self.record["rows"] if all(r.get(k) == v for k, v in key.items())]

    def add(self, measure, **key)->dict:
        "The row with this key; measured if it is not there."
        if found := self.find(**key): return found[0]
        start = time.process_time()
        row = key | measure()
        self.record["rows"].append(row)
        write_json(self.out, self.record)
        print(f"{time.process_time():6.0f} s  " + " ".join(f"{k}={v}" for k, v in row.items() if not isinstance(v, list)), f" ({time.process_time()-start:.1f} s)", flush=True)
        return row

    @torch.no_grad()
    def loss(self, model:torch.nn.Module)->float: # nats per byte, held out
        return round(mean(F.cross_entropy(model(w[:,:-1]).flatten(0, 1), w[:,1:].flatten()).item() for w in self.windows.split(100)), 5)

def adamw(model, lr:float)->list:
    "As in chapter 06, with the epsilon of `make_width_adamw`, so that nothing else differs."
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(.9, .95), eps=1e-10, weight_decay=0)
    for g in opt.param_groups: g["initial_lr"] = lr
    return [opt]

def fresh(lab:Lab, way:str, d:int, rate:float, seed:int)->TrainState:
    "A run that has not begun: `standard` AdamW, AdamW `transferred` from the first width (or so with its `scores doubled`), `muon`, or `muon transferred`."
    model, base = Decoder(lab.cfg(d)), lab.cfg(lab.plan.widths[0])
    if way in ("transferred", "scores doubled", "muon transferred"):
        draw_for_width(model, base, seed)
        if way == "scores doubled": model.norm.weight.data *= 2
        return TrainState(model, (make_width_optimizers if way == "muon transferred" else make_width_adamw)(model, base, rate))
    init_weights(model, seed)
    return TrainState(model, dict(standard=adamw, muon=make_optimizers)[way](model, rate))

def shape(name:str, n_steps:int, warmup:int):
    "A schedule of the run."
    if name == "wsd": return partial(wsd, n_steps=n_steps, warmup=max(1, warmup))
    return partial(dict(cosine=cosine, linear=linear)[name], n_steps=n_steps, warmup=warmup)

def run(lab:Lab, schedule:str, rate:float, n_steps:int, seed:int, warmup:int|None=None)->dict:
    "All warm up for as long, whatever their length: they are to differ in one thing. With a warmup of its own a run is of another kind."
    def measure():
        state = fresh(lab, "standard", lab.plan.width, rate, seed)
        for _ in train(state, lab.batches(seed), shape(schedule, n_steps, lab.plan.n_steps//10 if warmup is None else warmup), n_steps): pass
        return dict(loss=lab.loss(state.model))
    return lab.add(measure, **(dict(kind="run") if warmup is None else dict(kind="warmup", warmup=warmup)), schedule=schedule, rate=rate, n_steps=n_steps, seed=seed)

def width_run(lab:Lab, way:str, d:int, rate:float, seed:int)->dict:
    def measure():
        if way == "transferred" and d == lab.plan.widths[0]: return dict(loss=width_run(lab, "standard", d, rate, seed)["loss"]) # the base itself: the same groups, the same weights
        state, n = fresh(lab, way, d, rate, seed), lab.plan.width_steps
        for _ in train(state, lab.batches(seed, lab.plan.width_batch), shape("cosine", n, n//10), n): pass
        return dict(loss=lab.loss(state.model))
    return lab.add(measure, kind="width", way=way, width=d, rate=rate, seed=seed)

def range_row(lab:Lab, way:str, d:int, batch_size:int, seed:int)->dict:
    def measure():
        test = range_test(fresh(lab, way, d, 1. if way == "muon" else .01, seed), lab.batches(seed, batch_size), n_steps=lab.plan.range_steps)
        return dict(full=1. if way == "muon" else .01, factors=[round(x, 7) for x in test.factors], losses=[round(x, 4) for x in test.losses])
    return lab.add(measure, kind="range", way=way, width=d, batch_size=batch_size, seed=seed)

def ends(lab:Lab, rate:float, seed:int)->None:
    "One stable run per seed; from it every cooldown and every length branches off."
    plan = lab.plan
    wanted = {(round(plan.n_steps*(1-share)), plan.n_steps) for share in plan.cooldowns} | {(round(.6*n), n) for n in (round(plan.n_steps*x) for x in plan.ends)}
    if all(lab.find(kind="end", begin=b, n_steps=n, seed=seed) for b, n in wanted): return
    state = fresh(lab, "standard", plan.width, rate, seed)
    for step in train(state, lab.batches(seed), lambda step: min(1., (step+1)/max(1, plan.n_steps//10)), max(b for b, _ in wanted)):
        for b, n in sorted(wanted):
            if b != step.n: continue
            def measure():
                with borrowed(state):
                    for _ in train(state, lab.batches(seed), partial(wsd, n_steps=n, warmup=1, decay=(n-b)/n), n): pass
                    return dict(loss=lab.loss(state.model))
            lab.add(measure, kind="end", begin=b, n_steps=n, rate=rate, seed=seed)

def best_rate(lab:Lab)->float: return min(lab.plan.rates, key=lambda r: mean(x["loss"] for x in lab.find(kind="run", schedule="cosine", rate=r, n_steps=lab.plan.n_steps) if x["seed"] in lab.plan.seeds))

def measure_all(lab:Lab)->None:
    "The most telling rows first."
    plan = lab.plan
    for seed in plan.seeds:
        for rate in plan.rates: run(lab, "cosine", rate, plan.n_steps, seed)
    best = best_rate(lab)
    for seed in plan.seeds: range_row(lab, "standard", plan.width, plan.batch_size, seed)
    for seed in plan.seeds:
        for way, d, rates in plan.width_rates:
            for rate in rates: width_run(lab, way, d, rate, seed)
    for seed in plan.more_seeds:
        for schedule in ("cosine", "linear", "wsd"): run(lab, schedule, best, plan.n_steps, seed)
    for seed in plan.seeds:
        ends(lab, best, seed)
        for x in plan.ends: run(lab, "cosine", best, round(plan.n_steps*x), seed)
        run(lab, "cosine", best, short := round(plan.n_steps*plan.ends[0]), seed, warmup=short//10)
    for seed in plan.seeds:
        for d in (plan.widths[0], plan.widths[-1]):
            for way in ("standard", "muon"): range_row(lab, way, d, plan.width_batch, seed)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models and a few updates")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"rates.json", metavar="FILE", help="the record")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    lab = Lab(TINY if args.tiny else Plan(), args.out)
    measure_all(lab)
    print(f"{len(lab.record['rows'])} rows in {args.out.name}; the best of the rates is {best_rate(lab):g}")

if __name__ == "__main__": main()

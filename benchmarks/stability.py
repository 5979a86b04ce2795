"""What breaks a run, what mends it, and how much of a gradient is chance: small decoders on recipes, byte by byte.

    python benchmarks/stability.py                         all parts, about six minutes of one core
    python benchmarks/stability.py --parts spikes noise    some of them
    python benchmarks/stability.py --tiny --seeds 1 --out try.json

Writes nbs/stability.json, which chapter 06f reads, after every run, and goes on where it was; prints what it has found.
"""
import argparse
import json
import math
import resource
import shutil
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights, n_params  # noqa: E402
from llm_scratch.checkpointing import keep_last  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.data import load_corpus  # noqa: E402
from llm_scratch.engines import Engine  # noqa: E402
from llm_scratch.monitoring import SPIKE  # noqa: E402
from llm_scratch.pretraining import Batches, TrainState, make_adamw, make_optimizers, train, wsd  # noqa: E402
from llm_scratch.stability import Guard, Stuck, careful_train, compile_in_place, load_careful, measure_noise, roll_back, save_careful  # noqa: E402

CFG = ModelConfig(128, 64, n_layers=2, n_heads=4, n_kv_heads=4, d_model=64, d_ff=160, d_head=16)
BATCH, N, SAVE, ABOUT = 16, 210, 10, {}
MAKE = dict(muon=make_optimizers, adamw=partial(make_adamw, lr=.003))
FAULTS = dict(unshifted=range(140, 144), stuck=range(120, 160)) # batches that are spoiled
REMEDIES = { # what a run does about it: bounds for the gradient, refuse outliers, go back this far
    "nothing":dict(max_norm=math.inf), "norm 1":dict(), "value 1":dict(max_norm=math.inf, max_value=1.),
    "pass over":dict(limit=SPIKE), "roll back":dict(margin=10)}
SIZES, FACTORS, TOKENS, LOOKS = (4, 16, 64), (1., .5, 2.), 240*16*64, 20

class Faulty:
    "Batches of which some are spoiled: targets that nobody has shifted, or a loader that gives one batch again and again."
    def __init__(self, batches:Batches, fault:str, at:range): self.batches, self.fault, self.at = batches, fault, at

    def __getitem__(self, number:int)->tuple[torch.Tensor, torch.Tensor]:
        ids, targets = self.batches[number if number not in self.at or self.fault != "stuck" else self.at[0]]
        return (ids, ids) if self.fault == "unshifted" and number in self.at else (ids, targets)

def rows_of_text()->tuple[np.ndarray, np.ndarray]: # to learn from, and held out
    "Bytes of recipes."
    text = np.frombuffer("\n".join(load_corpus(["recipes"])["text"][:700]).encode("ascii", "replace"), dtype=np.uint8)
    return text[:-20_000], text[-20_000:]

def held_out(model:torch.nn.Module, text:np.ndarray)->float: # nats per byte
    ids, targets = Batches(text, CFG.context_len, 32)[0]
    with torch.no_grad(): return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).item()

def begun(kind:str, seed:int, lr:float=1., engine:Engine|None=None)->TrainState:
    model = init_weights(Decoder(CFG), seed)
    optimizers = make_adamw(model, .003*lr) if kind == "adamw" else MAKE[kind](model)
    return TrainState(model, optimizers, engine=engine or Engine())

def spike_runs(text:tuple, kind:str, seed:int, n:int, faults:dict)->list[dict]:
    "One beginning, and from there what each remedy makes of each fault."
    rate, begin = partial(wsd, n_steps=n, warmup=min(20, n//4), decay=.4), faults["stuck"].start
    batches, rows = Batches(text[0], CFG.context_len, BATCH, seed), []
    with tempfile.TemporaryDirectory() as folder:
        state, guard = begun(kind, seed), Guard()
        for step in careful_train(state, batches, rate, begin, guard, limit=math.inf):
            if step.n % SAVE == 0: save_careful(state, guard, f"{folder}/begin", ABOUT, keep_last(3))
        for fault, at in [("none", range(0)), *faults.items()]:
            for remedy, how in REMEDIES.items():
                if fault == "none" and remedy != "norm 1" or fault == "stuck" and (kind != "muon" or remedy in ("nothing", "value 1")): continue
                guard = load_careful(state, f"{folder}/begin/{begin:06d}", ABOUT)
                shutil.copytree(f"{folder}/begin", own := Path(folder)/f"{fault} {remedy}") # with two checkpoints before
                rows.append(dict(part="spikes", optimizer=kind, seed=seed, fault=fault, remedy=remedy) | one_run(state, guard, Faulty(batches, fault, at), rate, n, text[1], own, len(at) if fault == "stuck" else 0, **how))
    return rows

def one_run(state:TrainState, guard:Guard, batches:Faulty, rate, n:int, text:np.ndarray, folder:Path, late:int, margin:int=0, limit:float=math.inf, **how)->dict:
    "Go on, saving and going back as the remedy says; held-out loss at every tenth update that counts in the end."
    loss, curve, scores, margin, stuck = {}, {}, [], margin and margin+late, 0
    while state.step < n:
        try:
            for step in careful_train(state, batches, rate, n, guard, limit=limit, **how):
                scores.append(guard.score)
                loss[step.n] = step.loss
                if margin and guard.score > SPIKE: roll_back(state, guard, folder, ABOUT, margin=margin)
                elif state.step % SAVE == 0 and (margin or late): save_careful(state, guard, folder, ABOUT)
                if state.step % 5 == 0: curve[state.step] = held_out(state.model, text)
        except Stuck: # the model is what is bad: go back as far as the fault is long
            stuck += 1
            roll_back(state, guard, folder, ABOUT, margin=10+late)
    return dict(held=curve, loss=loss if late else {}, passed=guard.passed, rollbacks=guard.rollbacks, stuck=stuck, highest=max(scores))

def bf16_run(text:tuple, seed:int, n:int)->dict:
    "The same run as `none, norm 1` with Muon, but for bfloat16."
    state = begun("muon", seed, engine=Engine("bf16"))
    for _ in train(state, Batches(text[0], CFG.context_len, BATCH, seed), partial(wsd, n_steps=n, warmup=min(20, n//4), decay=.4), n): pass
    return dict(part="bf16", seed=seed, held=held_out(state.model, text[1]))

def noise_run(text:tuple, seed:int, n:int)->dict:
    "Noise of the gradient along a run with AdamW at a constant rate."
    state, seen = begun("adamw", seed), []
    many = Batches(text[0], CFG.context_len, 64, seed=1000+seed)
    for step in train(state, Batches(text[0], CFG.context_len, BATCH, seed), lambda step: min(1, (step+1)/20), n):
        if step.n % max(1, n//24) == 0:
            m = measure_noise(state, *many[step.n], 16)
            seen.append(dict(step=step.n, loss=step.loss, signal=m.signal, noise=m.noise))
    return dict(part="noise", seed=seed, seen=seen)

def size_run(text:tuple, size:int, factor:float, seed:int, tokens:int)->dict:
    "A batch size at a constant rate, which grows with the root of the size."
    n = tokens//(size*CFG.context_len)
    state, curve = begun("adamw", seed, factor*(size/BATCH)**.5), []
    for step in train(state, Batches(text[0], CFG.context_len, size, seed), lambda step: min(1, (step+1)/max(1, n//12)), n):
        if step.n % max(1, n//LOOKS) == 0: curve.append([step.n*size*CFG.context_len, held_out(state.model, text[1])])
    return dict(part="sizes", size=size, factor=factor, seed=seed, curve=curve)

def cpu_s()->float: # of this process and of the compilers that it has started
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))

def compile_run(cfg:ModelConfig, backend:str)->dict:
    "What compiling costs, and what it gives: CPU-seconds of an update's forward and backward pass, median of 15."
    model, ids = init_weights(Decoder(cfg), 0), torch.randint(cfg.vocab_size, (12, 64), generator=torch.Generator().manual_seed(0))
    def once()->tuple[float, float]:
        model.zero_grad()
        start = time.process_time()
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        return time.process_time()-start, loss.item()
    def some()->float: return median(once()[0] for _ in range(15))
    once()
    eager, loss = some(), once()[1]
    start = cpu_s()
    done = compile_in_place(model, ids, backend=backend)
    compile_s = cpu_s()-start
    once()
    return dict(part="compile", backend=backend, weights=n_params(cfg), done=done, compile_s=compile_s, eager_s=eager, compiled_s=some(), apart=abs(once()[1]-loss))

def tables(rows:list[dict])->str:
    "What was found, in short."
    lines, clean = [], {(r["optimizer"], r["seed"]):r for r in rows if r["part"] == "spikes" and r["fault"] == "none" and r["remedy"] == "norm 1"}
    groups = {}
    for r in rows:
        if r["part"] == "spikes": groups.setdefault((r["optimizer"], r["fault"], r["remedy"]), []).append(r)
    for name, same in groups.items():
        extra = [cost_of(r, clean[r["optimizer"], r["seed"]]) for r in same]
        lines.append(f"{' / '.join(name):32} extra nats x updates {mean(x for x, _ in extra):7.2f}, at the end {mean(x for _, x in extra):+.3f}" + (f" ± {stdev(x for _, x in extra):.3f}" if len(extra) > 1 else "") + f"  passed {[len(r['passed']) for r in same]}")
    for r in rows:
        if r["part"] in ("bf16", "compile"): lines.append(str(r))
        if r["part"] == "noise": lines.append("noise " + " ".join(f"{s['step']}:{s['noise']/s['signal']:.0f}" for s in r["seen"]))
        if r["part"] == "sizes": lines.append(f"size {r['size']} factor {r['factor']} seed {r['seed']}: {r['curve'][-1][1]:.3f}")
    return "\n".join(lines)

def cost_of(run:dict, clean:dict)->tuple[float, float]: # nats times updates, from the fault to the end; nats at the end
    "How much worse than the run that met no fault."
    extra = {int(k): run["held"][k]-clean["held"][k] for k in run["held"] if k in clean["held"]}
    return sum(extra.values())*5, extra[max(extra)]

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--parts", nargs="+", default=["spikes", "noise", "sizes", "bf16", "compile"], help="which")
    parser.add_argument("--tiny", action="store_true", help="seconds, says nothing")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"stability.json", help="the record; what it holds is not run again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.first, args.first+args.seeds)
    rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else []
    n, tokens, text = (60, 20*64*64, rows_of_text()) if args.tiny else (N, TOKENS, rows_of_text())
    faults = dict(unshifted=range(40, 42), stuck=range(30, 40)) if args.tiny else FAULTS
    jobs = [(dict(part="spikes", optimizer=kind, seed=seed), partial(spike_runs, text, kind, seed, n, faults)) for seed in seeds for kind in MAKE]
    jobs += [(dict(part="noise", seed=seed), partial(noise_run, text, seed, 60 if args.tiny else 240)) for seed in seeds]
    jobs += [(dict(part="sizes", size=size, factor=f, seed=seed), partial(size_run, text, size, f, seed, tokens)) for seed in seeds for size in SIZES for f in FACTORS[:None if seed == 0 else 1]] # the rate is tuned with one seed
    jobs += [(dict(part="bf16", seed=seed), partial(bf16_run, text, seed, n)) for seed in seeds]
    jobs += [(dict(part="compile"), partial(compile_run, CFG if args.tiny else ModelConfig(65, 64, n_layers=4, n_heads=4, n_kv_heads=4, d_model=128, d_ff=344, d_head=32), "eager" if args.tiny else "inductor"))]
    for name, job in jobs:
        if name["part"] not in args.parts or any(name.items() <= r.items() for r in rows): continue
        start, made = time.process_time(), job()
        rows += made if isinstance(made, list) else [made]
        write_json(args.out, dict(rows=json.loads(json.dumps(rows), parse_float=lambda x: round(float(x), 5))))
        print(f"{name}: {time.process_time()-start:.1f} CPU-s", flush=True)
    print(tables(json.loads(args.out.read_text(encoding="utf-8"))["rows"]))

if __name__ == "__main__": main()

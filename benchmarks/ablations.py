"""Which part of the recipe matters: one small model of characters, one change at a time, paired by seed.

    python benchmarks/ablations.py                three seeds, about a quarter of an hour on one core; goes on where it was stopped
    python benchmarks/ablations.py --seeds 5      two more
    python benchmarks/ablations.py --tiny         the same in seconds, for a test: one seed, a few updates of a tiny model
    python benchmarks/ablations.py --out FILE     elsewhere than nbs/ablations.json

Chapter 06b draws its table from the record. All rows of one seed read the same windows of Shakespeare in the same order. The base, and every row
whose change may ask for other learning rates, has the factor of its rates tuned by itself: doubled and halved until both neighbours are worse, on a seed that is not
among those recorded; the other rows take the factor of the base. Each row is then run with as many tokens as the base, and, if a step of it costs another time, with as many CPU seconds: the number of its updates is divided by the ratio of costs,
which is the median over pairs of steps, one of the row and one of the base, taken in turns.
"""
import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Attention, Block, Decoder, Flat, ModelConfig, RMSNorm  # noqa: E402
from llm_scratch.core import read_json, write_json  # noqa: E402
from llm_scratch.data import load_corpus, split_corpus, tiny_corpus  # noqa: E402
from llm_scratch.evaluation import half_width, token_nats  # noqa: E402
from llm_scratch.families import GPT2, MLP, UntiedDecoder, llama_block  # noqa: E402
from llm_scratch.optimizers import SGD, decay_groups, weight_groups  # noqa: E402
from llm_scratch.pretraining import Batches, Muon, TrainState, train, update, wsd  # noqa: E402

SIZES = dict(context_len=64, n_layers=4, n_heads=4, n_kv_heads=4, d_model=64, d_ff=168, d_head=16)
BATCH, STEPS, WINDOWS, TRIAL_SEED = 16, 200, 640, 99
RATES = dict(embedding=.01, head=.004, rest=.02) # those of `make_by_kind`

# --- the variants: lesson code, none of it in the library ----------------------------------------------------------------

class Unturned(Attention):
    "Attention whose queries and keys are normed and not turned."
    def forward(self, x_BTD, rotation=None, cache=None):
        still = torch.ones(x_BTD.shape[1], self.d_head), torch.zeros(x_BTD.shape[1], self.d_head)
        return super().forward(x_BTD, still, cache)

class Steady(Muon):
    "Muon whose momentum is .95 from the first step on, whatever the loop says."
    def step(self):
        for group in self.param_groups: group["momentum"] = .95
        super().step()

class Decayed(Muon):
    "Muon with decoupled weight decay of .1."
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]: p.mul_(1 - .1*group["lr"])
        super().step()

def squared_relu(x:torch.Tensor)->torch.Tensor: return F.relu(x).square()

def start_writers(model:nn.Module)->nn.Module:
    "Writers to the stream begin at random instead of zero, the smaller the more of them there are (Radford et al. 2019)."
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")): p.normal_(0, (2*model.cfg.n_layers*p.shape[1])**-.5)
    return model

def remembered(*optimizers:torch.optim.Optimizer)->list[torch.optim.Optimizer]:
    "With the full rate of each group as `initial_lr`."
    for group in (g for opt in optimizers for g in opt.param_groups): group["initial_lr"] = group["lr"]
    return list(optimizers)

def both(model:nn.Module, factor:float, *, muon:Callable=Muon, betas:tuple=(.8, .95), evened:tuple=("matrix",), decay:float=0.)->list:
    "Muon for the kinds in `evened`, AdamW for the others."
    groups = weight_groups(model)
    rest = [dict(params=groups[kind], lr=rate*factor) for kind, rate in RATES.items() if groups[kind] and kind not in evened]
    return remembered(muon([p for kind in evened for p in groups[kind]], lr=.02*factor), torch.optim.AdamW(rest, betas=betas, eps=1e-10, weight_decay=decay, fused=True))

def adamw(model:nn.Module, factor:float, betas:tuple=(.9, .95), decay:float=0.)->list:
    return remembered(torch.optim.AdamW(decay_groups(model, decay), lr=.01*factor, betas=betas, fused=True))

def sgd(model:nn.Module, factor:float)->list: return remembered(SGD(model.parameters(), lr=.25*factor, momentum=.9, nesterov=True))

class Row(NamedTuple):
    "One line of the table."
    make:Callable # config to model
    optimizers:Callable # model and factor to optimizers
    what:str # it is, in words
    tune:bool=True # or take the factor of the base

EXTRA = "untied head by Muon", "embedding by Muon", "SGD", "no positions", "1 round" # come last, one by one

def rows(cfg:ModelConfig)->dict[str, Row]: # the base first
    squared = replace(cfg, d_ff=cfg.d_ff*3//2) # two matrices instead of three: as many weights
    return {
        "base": Row(Decoder, both, "the recipe of chapter 06"),
        "GPT-2 and AdamW": Row(lambda _: start_writers(GPT2(squared)), partial(adamw, betas=(.9, .99), decay=.1), "the whole recipe taken away: learned positions, LayerNorm, biases, GELU; AdamW with decay"),
        "learned positions": Row(partial(GPT2, block=partial(Block, attention=Unturned), norm=RMSNorm), both, "instead of rotary ones"),
        "no positions": Row(lambda cfg: still(Decoder(cfg)), both, "neither"),
        "AdamW": Row(Decoder, adamw, "for every weight"),
        "SGD": Row(Decoder, sgd, "with Nesterov momentum, for every weight"),
        "no QK-norm": Row(partial(Decoder, block=llama_block), both, "queries and keys as they come"),
        "squared ReLU": Row(lambda _: Decoder(squared, block=partial(Block, mlp=partial(MLP, act=squared_relu, linear=Flat))), both, "instead of SwiGLU, as many weights", False),
        "untied head": Row(UntiedDecoder, both, "by AdamW"),
        "untied head by Muon": Row(UntiedDecoder, partial(both, evened=("matrix", "head")), "as `make_optimizers` has it", False),
        "embedding by Muon": Row(Decoder, partial(both, evened=("matrix", "embedding")), "with the tied head"),
        "1 round": Row(Decoder, partial(both, muon=partial(Muon, rounds=1)), "of the polynomial instead of 3", False),
        "5 rounds": Row(Decoder, partial(both, muon=partial(Muon, rounds=5)), "of the polynomial instead of 3", False),
        "steady momentum": Row(Decoder, partial(both, muon=Steady), ".95 from the first step instead of from .85 upwards", False),
        "weight decay": Row(Decoder, partial(both, muon=Decayed), "of .1 on the matrices", False),
        "betas .9, .999": Row(Decoder, partial(both, betas=(.9, .999)), "of AdamW, torch's default", False),
    }

def still(model:Decoder)->Decoder:
    "Hands of the clock that do not turn."
    model.cos.fill_(1)
    model.sin.fill_(0)
    return model

# --- runs -----------------------------------------------------------------------------------------------------------------

def begin(row:Row, cfg:ModelConfig, seed:int, factor:float)->TrainState:
    torch.manual_seed(seed)
    model = row.make(cfg)
    return TrainState(model, row.optimizers(model, factor))

def learn(row:Row, cfg:ModelConfig, ids:np.ndarray, windows:np.ndarray, seed:int, factor:float, n_steps:int)->dict:
    "One run: held-out loss, nats per character, and the CPU seconds of training."
    state, began = begin(row, cfg, seed, factor), time.process_time()
    for _ in train(state, Batches(ids, cfg.context_len, BATCH, seed), partial(wsd, n_steps=n_steps), n_steps): pass
    seconds = time.process_time() - began
    with torch.no_grad(): loss = float(np.stack(token_nats(state.model, windows)).mean())
    return dict(seed=seed, n_steps=n_steps, factor=factor, loss=round(loss, 5), seconds=round(seconds, 2))

def cost(row:Row, base:Row, cfg:ModelConfig, ids:np.ndarray, pairs:int)->float:
    "CPU time of a step of `row` in steps of `base`: median over pairs taken in turns, so that what disturbs one disturbs the other."
    states, batches, ratios = [begin(r, cfg, 0, 1.) for r in (row, base)], Batches(ids, cfg.context_len, BATCH), []
    for i in range(pairs+3):
        took = []
        for state in states:
            start = time.process_time()
            update(state, *batches[i])
            took.append(time.process_time()-start)
        ratios.append(took[0]/took[1])
    return round(median(ratios[3:]), 3)

def tuned(loss_of:Callable[[float], float], known:dict[str, float], start:float)->float: # the best factor; `known` has what was tried, and `loss_of` adds to it
    "Double and halve until both neighbours of the best are worse."
    def at(factor):
        return known[f"{factor:g}"] if f"{factor:g}" in known else loss_of(factor)
    best = start
    while (better := min((best, best*2, best/2), key=at)) != best: best = better
    return best

def prepare(name:str, table:dict[str, Row], record:dict, cfg:ModelConfig, ids:np.ndarray, windows:np.ndarray, n_steps:int, pairs:int, out:Path)->None:
    "Measure what a step of a row costs and find the factor of its rates."
    row = table[name]
    entry = record["rows"].setdefault(name, dict(what=row.what, tuned=row.tune, weights=sum(p.numel() for p in row.make(cfg).parameters()), trials={}, runs=[]))
    if "cost" not in entry: entry["cost"] = 1. if name == "base" else cost(row, table["base"], cfg, ids, pairs)
    def trial(factor):
        entry["trials"][f"{factor:g}"] = loss = learn(row, cfg, ids, windows, TRIAL_SEED, factor, n_steps)["loss"]
        write_json(out, record)
        print(f"{name}, cost {entry['cost']}, factor {factor:g}: {loss:.4f}", flush=True)
        return loss
    usual = record["rows"]["base"].get("factor", 1.)
    entry["factor"] = tuned(trial, entry["trials"], usual if row.optimizers is not sgd else 1.) if row.tune else usual
    write_json(out, record)

def steps_in_equal_time(record:dict, name:str)->int:
    "Updates that a row can make in the CPU time of the base; differences of cost below 3 % do not count."
    ratio = record["rows"][name]["cost"]
    return record["n_steps"] if abs(ratio-1) < .03 else round(record["n_steps"]/ratio)

def measure(cfg:ModelConfig, ids:np.ndarray, windows:np.ndarray, n_steps:int, seeds:int, pairs:int, out:Path, names:list[str]|None=None)->dict:
    "The whole record; what `out` holds already is not done again."
    table = {name: row for name, row in rows(cfg).items() if names is None or name in names}
    about = dict(cfg=asdict(cfg), n_steps=n_steps, batch_size=BATCH, windows=len(windows), n_train=len(ids))
    record = read_json(out) if out.exists() else about | dict(machine=f"{platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}", rows={})
    if {k: record[k] for k in about} != about: raise SystemExit(f"{out} is the record of other runs: give another --out, or delete it")
    for part in ([n for n in table if n not in EXTRA], *([n] for n in EXTRA if n in table)):
        for name in part: prepare(name, table, record, cfg, ids, windows, n_steps, pairs, out)
        for seed in range(seeds):
            for name in part:
                entry = record["rows"][name]
                for n in sorted({n_steps, steps_in_equal_time(record, name)}):
                    if any((r["seed"], r["n_steps"]) == (seed, n) for r in entry["runs"]): continue
                    entry["runs"].append(learn(table[name], cfg, ids, windows, seed, entry["factor"], n))
                    write_json(out, record)
                    print(f"{name}, seed {seed}, {n} steps: {entry['runs'][-1]['loss']:.4f}", flush=True)
    return record

def paired(record:dict, name:str, equal:str)->tuple[float, float, float]: # how much worse than the base, half of its 95 % interval, mean loss; nats per character
    "Differences seed by seed, at as many tokens or as many CPU seconds."
    N, entry = record["n_steps"], record["rows"][name]
    n = N if equal == "tokens" else steps_in_equal_time(record, name)
    of = lambda entry, n: {r["seed"]: r["loss"] for r in entry["runs"] if r["n_steps"] == n}
    ours, base = of(entry, n), of(record["rows"]["base"], N)
    apart = [ours[seed]-base[seed] for seed in sorted(ours)]
    return mean(apart), (half_width(apart) if len(apart) > 1 else float("nan")), mean(ours.values())

def markdown(record:dict)->str:
    lines = ["| change | loss | worse by, equal tokens | worse by, equal CPU seconds | cost of a step | factor of the rates |", "|---|---|---|---|---|---|"]
    for name, entry in record["rows"].items():
        (a, da, loss), (b, db, _) = (paired(record, name, equal) for equal in ("tokens", "seconds"))
        lines.append(f"| {name} | {loss:.3f} | {a:+.3f} ± {da:.3f} | {b:+.3f} ± {db:.3f} | {entry['cost']:.2f} | {entry['factor']:g} |")
    return "\n".join(lines)

def text(tiny:bool)->tuple[np.ndarray, np.ndarray, int]: # ids to learn from, held-out windows, vocabulary
    "Characters of the plays, some scenes held out."
    corpus = tiny_corpus() if tiny else load_corpus(["shakespeare"])
    corpus = split_corpus(corpus, n_validation=1 if tiny else 40)
    train, held_out = ("".join(corpus[part]["text"]) for part in ("train", "validation"))
    letters = sorted(set(train))
    ids, asked = (np.array([letters.index(c) for c in text if c in letters], dtype=np.uint8) for text in (train, held_out))
    T = SIZES["context_len"]
    windows = asked[:len(asked)//(T+1)*(T+1)].reshape(-1, T+1)
    return ids, windows[::max(1, len(windows)//WINDOWS)][:WINDOWS], len(letters)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3, 4, 5), help="how many")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and a few updates")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these, and the base")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"ablations.json", metavar="FILE", help="the record")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    ids, windows, n_letters = text(args.tiny)
    cfg = ModelConfig(vocab_size=n_letters, **SIZES)
    names = args.rows and ["base", *args.rows]
    if args.tiny: record = measure(replace(cfg, n_layers=1, n_heads=1, n_kv_heads=1, d_model=16, d_ff=24), ids, windows[:4], 4, 2, 2, args.out, names)
    else: record = measure(cfg, ids, windows, STEPS, args.seeds, 20, args.out, names)
    print(markdown(record))

if __name__ == "__main__": main()

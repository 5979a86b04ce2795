"""A decoder and a GRU of the same size on the same bytes: loss by how much of the text they have seen, and CPU seconds per step by length.

    python benchmarks/recurrence.py                three seeds, about a quarter of an hour on one core
    python benchmarks/recurrence.py --tiny         the same in seconds, for a test: small models, a few updates
    python benchmarks/recurrence.py --out FILE     elsewhere than nbs/recurrence.json

Chapter 02e draws its figures from the record. Both models see the same windows in the same order. Each gets the learning rate of `RATES`
that is best for it after a third of the updates; the seed of that trial is not among those recorded.
"""
import argparse
import platform
import sys
import time
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, n_params  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.data import load_corpus, split_corpus  # noqa: E402
from llm_scratch.evaluation import token_nats  # noqa: E402
from llm_scratch.inside import Recurrent, gru_width, octaves  # noqa: E402
from llm_scratch.pretraining import Batches, TrainState, add_gradients, train, wsd  # noqa: E402

CFG = ModelConfig(vocab_size=256, context_len=128, n_layers=2, n_heads=4, n_kv_heads=4, d_model=64, d_ff=128, d_head=16)
RATES, SEEDS, TRIAL_SEED = (1e-3, 3e-3, 1e-2), (0, 1, 2), 99
LENGTHS, TOKENS = (16, 32, 64, 128, 256, 512, 1024), 1024 # seconds are measured on batches of as many tokens at every length

def kinds(cfg:ModelConfig)->dict: return dict(decoder=Decoder, gru=partial(Recurrent, width=gru_width(cfg)))

def learn(make, cfg:ModelConfig, row:np.ndarray, seed:int, lr:float, n_steps:int, batch_size:int)->nn.Module:
    "A model trained by AdamW with warmup, a flat part and a decay; the seed decides its first weights and the order of windows."
    torch.manual_seed(seed)
    model = make(cfg)
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(.9, .95), weight_decay=0)
    for group in opt.param_groups: group["initial_lr"] = lr
    for _ in train(TrainState(model, [opt]), Batches(row, cfg.context_len, batch_size, seed), partial(wsd, n_steps=n_steps), n_steps): pass
    return model

@torch.no_grad()
def surprise(model:nn.Module, windows:np.ndarray)->np.ndarray: return np.stack(token_nats(model, windows)) # `(N,T)` nats

def step_seconds(make, cfg:ModelConfig, length:int, rounds:int)->list[float]:
    "CPU seconds of forward and backward pass over a batch of `TOKENS` tokens in texts of one length."
    cfg, seconds = replace(cfg, context_len=length), []
    model, ids = make(cfg), torch.randint(cfg.vocab_size, (max(1, TOKENS//length), length))
    for _ in range(rounds+2):
        start = time.process_time()
        add_gradients(model, ids, ids)
        seconds.append(time.process_time()-start)
    return [round(s, 5) for s in seconds[2:]]

def measure(cfg:ModelConfig, n_steps:int, batch_size:int, lengths:tuple[int, ...], rounds:int)->dict:
    "The whole record."
    corpus = split_corpus(load_corpus(["recipes"]), n_validation=150)
    row = np.frombuffer("".join(corpus["train"]["text"]).encode(), dtype=np.uint8)
    held_out = np.frombuffer("".join(corpus["validation"]["text"]).encode(), dtype=np.uint8)
    T = cfg.context_len
    windows = held_out[:len(held_out)//(T+1)*(T+1)].reshape(-1, T+1)[:: max(1, len(held_out)//(T+1)//480)] # about 500, from all texts
    record = dict(date=str(date.today()), machine=f"{platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}", cfg=asdict(cfg), n_steps=n_steps, batch_size=batch_size,
                  windows=len(windows), tokens_per_step=TOKENS, width=gru_width(cfg), weights={name: sum(p.numel() for p in make(cfg).parameters()) for name, make in kinds(cfg).items()}, lr={}, trials={}, runs=[], seconds={})
    assert record["weights"]["decoder"] == n_params(cfg)
    for name, make in kinds(cfg).items():
        trials = {lr: float(surprise(learn(make, cfg, row, TRIAL_SEED, lr, n_steps//3, batch_size), windows).mean()) for lr in RATES}
        record["trials"][name], record["lr"][name] = trials, min(trials, key=trials.get)
        print(f"{name}: " + ", ".join(f"lr {lr:g} {nats:.3f}" for lr, nats in trials.items()), flush=True)
    for seed in SEEDS:
        for name, make in kinds(cfg).items():
            nats = surprise(learn(make, cfg, row, seed, record["lr"][name], n_steps, batch_size), windows)
            record["runs"].append(dict(model=name, seed=seed, loss=round(float(nats.mean()), 4), by_context={n: round(x, 4) for n, x in octaves(nats).items()}))
            print(f"{name}, seed {seed}: {nats.mean():.3f} nats per byte", flush=True)
    for length in lengths:
        for name, make in kinds(cfg).items(): record["seconds"].setdefault(name, {})[length] = step_seconds(make, cfg, length, rounds)
    return record

def table(record:dict)->str:
    "Mean and standard deviation over seeds by context, then seconds, as Markdown."
    names = list(record["weights"])
    of = lambda name, n: [r["by_context"][n] for r in record["runs"] if r["model"] == name]
    rows = ["| bytes seen, from | " + " | ".join(names) + " |", "|---|---|---|"]
    rows += [f"| {n} | " + " | ".join(f"{mean(of(name, n)):.3f} ± {stdev(of(name, n)):.3f}" for name in names) + " |" for n in record["runs"][0]["by_context"]]
    rows += ["", f"| length of text | seconds, {names[0]} | seconds, {names[1]} |", "|---|---|---|"]
    rows += [f"| {n} | " + " | ".join(f"{mean(record['seconds'][name][n]):.4f}" for name in names) + " |" for n in record["seconds"][names[0]]]
    return "\n".join(rows)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models and a few updates")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"recurrence.json", metavar="FILE", help="where the record goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    small = replace(CFG, context_len=16, d_model=16, d_head=4, d_ff=32)
    record = measure(small, 6, 4, LENGTHS[:2], 3) if args.tiny else measure(CFG, 600, 16, LENGTHS, 7)
    write_json(args.out, record)
    print(table(record))

if __name__ == "__main__": main()

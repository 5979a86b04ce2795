"""Which matrices, and which rank? LoRA against full tuning on the same bases, with four rates each; LoRA over bases of few bits; and LoRA on two processes against one.

    python benchmarks/adapters.py                three seeds, about eight minutes of one core; goes on where it was stopped
    python benchmarks/adapters.py --tiny         the same in seconds, for a test
    python benchmarks/adapters.py --out FILE     elsewhere than nbs/adapters.json

Chapters 08a and 08b draw their figures from the record. A small decoder reads recipes byte by byte, and is then tuned on plays. The rate of each way is the one that does best on Macbeth;
what is reported is the loss on Hamlet, and on held-out recipes, in nats per byte. Bases of few bits are tuned with rank 8 on all matrices. The seed decides the first weights, the first adapters and the order of the batches. The engines train an adapter of
rank 4 for six updates on two gloo processes; their rows say how far losses and tensors are from those of one plain process.
"""
import argparse
import json
import platform
import sys
import time
from copy import deepcopy
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights  # noqa: E402
from llm_scratch.core import read_json, write_json  # noqa: E402
from llm_scratch.data import read_source  # noqa: E402
from llm_scratch.engines import DDPEngine, DeepSpeedEngine, Engine, FSDPEngine, end_rank, farthest, join, n_held, torchrun  # noqa: E402
from llm_scratch.lora import add_lora, n_trained  # noqa: E402
from llm_scratch.pretraining import Batches, TrainState, load_checkpoint, make_adamw, make_optimizers, save_checkpoint, train, wsd  # noqa: E402
from llm_scratch.qlora import from_blocks, quantize_model, to_blocks  # noqa: E402

CFG = ModelConfig(256, context_len=64, n_layers=2, n_heads=4, n_kv_heads=2, d_model=64, d_ff=128, d_head=16)
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = {"query and value": ("q_proj", "v_proj"), "attention": ATTENTION, "feed-forward": MLP, "all": ATTENTION+MLP}
WAYS = [("full", 0), *product(TARGETS, (1, 4, 16)), ("all", 2), ("all", 8), ("all", 64)]
RATES = dict(full=(.001, .003, .01, .03), lora=(.003, .01, .03, .1), rounded=(.01, .03))
RULERS = {"nf4": None, "int4": torch.linspace(-1, 1, 15), "int3": torch.linspace(-1, 1, 7), "int2": torch.linspace(-1, 1, 3)} # even marks with a zero
SEEDS, N_BASE, N_TUNE, N_WINDOWS = (0, 1, 2), 400, 120, 256

def row_of(texts)->np.ndarray: return np.frombuffer("\n\n".join(texts).encode(), dtype=np.uint8)

def read_texts()->dict[str, np.ndarray]:
    "Bytes to learn from and to be tested on; whole plays are held out."
    recipes, plays = [d.text for d in read_source("recipes")], {}
    for d in read_source("shakespeare"): plays.setdefault(d.id.split("/")[1][:-3], []).append(d.text)
    held = {name: row_of(plays.pop(name)) for name in ("Macbeth", "Hamlet")}
    return dict(recipes=row_of(recipes[100:]), plays=row_of(text for play in plays.values() for text in play), kitchen=row_of(recipes[:100])) | held

@torch.no_grad()
def loss_on(model:nn.Module, row:np.ndarray)->float: # nats per byte
    ids, targets = Batches(row, CFG.context_len, N_WINDOWS)[0]
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).item()

def learn(model:nn.Module, optimizers:list, row:np.ndarray, seed:int, n_steps:int)->None:
    for _ in train(TrainState(model, optimizers), Batches(row, CFG.context_len, 16, seed), partial(wsd, n_steps=n_steps), n_steps): pass

def scores(model:nn.Module, texts:dict)->dict: return {name: round(loss_on(model, texts[name]), 4) for name in ("Macbeth", "Hamlet", "kitchen")}

def tuned(base:Decoder, way:str, rank:int, lr:float, seed:int, texts:dict, n_steps:int)->dict:
    "One run."
    model, start = deepcopy(base), time.process_time()
    if rank: add_lora(model, TARGETS[way], rank, 2*rank, seed=seed)
    learn(model, make_adamw(model, lr), texts["plays"], seed, n_steps)
    return dict(way=way, rank=rank, lr=lr, seed=seed, n_trained=n_trained(model)) | scores(model, texts) | dict(cpu_seconds=round(time.process_time()-start, 2))

def rounded(base:Decoder, ruler:str)->Decoder: # a copy
    "The matrices of all layers on the marks of a ruler: by the chapter's own layers, or full ones that hold rounded numbers."
    model = deepcopy(base)
    if RULERS[ruler] is None: return quantize_model(model)
    for name, p in model.named_parameters():
        if name.endswith("proj.weight"): p.data = from_blocks(*to_blocks(p.data, RULERS[ruler]), p.shape, RULERS[ruler])
    return model

def best(record:dict, way:str, rank:int)->list[dict]:
    "The runs at the rate that does best on Macbeth, by seed."
    rows = [r for r in record["runs"] if (r["way"], r["rank"]) == (way, rank)]
    lr = min({r["lr"] for r in rows}, key=lambda lr: mean(r["Macbeth"] for r in rows if r["lr"] == lr))
    return sorted((r for r in rows if r["lr"] == lr), key=lambda r: r["seed"])

def trial(engine:Engine, n_steps:int=6, path:Path|None=None)->tuple[TrainState, list]:
    "A small decoder with an adapter on an engine; with `path`, the steps after that checkpoint."
    model, rng = init_weights(Decoder(CFG), 0), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1*torch.randn(p.shape, generator=rng)) # else half of the layers give zeros
    state = TrainState(*engine.prepare(add_lora(model, rank=4), partial(make_adamw, lr=.01), 8), engine=engine)
    if path: load_checkpoint(state, path, {})
    batches = Batches(np.arange(4000)**2%251, 32, 8//engine.world, rank=engine.rank, world=engine.world)
    return state, list(train(state, batches, lambda step: 1., n_steps, n_micro=2))

MAKE = dict(ddp=DDPEngine, fsdp=FSDPEngine, zero2=lambda: DeepSpeedEngine(zero_stage=2, n_micro=2), zero3=lambda: DeepSpeedEngine(zero_stage=3, n_micro=2))

def rank_main(out:str)->None:
    "What each of two processes does; the main one writes how far every engine is from one plain process."
    torch.set_num_threads(1)
    plain, steps = trial(Engine())
    whole, rows = plain.engine.full_state(plain.model, plain.optimizers), []
    join()
    for name, make in MAKE.items():
        state, ours = trial(engine := make())
        full = engine.full_state(state.model, state.optimizers)
        first, _ = trial(make(), 3)
        _, rest = trial(make(), 6, save_checkpoint(first, Path(out).parent/name, {}))
        held = n_held(engine.bare(state.model), state.optimizers)
        if engine.is_main: rows.append(dict(engine=name, loss=farthest(ours, steps), resumed=farthest(rest, steps[3:]), names=sorted(full) == sorted(whole),
            base=all(torch.equal(full[n], x) for n, x in whole.items() if n.startswith("model.") and ".changes." not in n),
            adapter=max((full[n]-x).abs().max().item() for n, x in whole.items() if n.startswith("model.") and ".changes." in n), weights=held[0], remembered=held[1]))
    if rows: write_json(out, rows)
    end_rank()

def engines()->list[dict]:
    "The same in a job of two processes."
    with TemporaryDirectory() as tmp:
        sys.path.insert(0, str(Path(__file__).parent))
        try: torchrun(2, "adapters", "--rank", f"{tmp}/rows.json")
        finally: sys.path.pop(0)
        return read_json(f"{tmp}/rows.json")

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two seeds, two ways and a few updates")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"adapters.json", metavar="FILE", help="where the record goes")
    parser.add_argument("--rank", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank: return rank_main(args.rank)
    torch.set_num_threads(1)
    seeds, ways, n_base, n_tune = (SEEDS[:2], WAYS[:2], 3, 2) if args.tiny else (SEEDS, WAYS, N_BASE, N_TUNE)
    texts = read_texts()
    setup = dict(machine=f"{platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}", n_base=n_base, n_tune=n_tune)
    record = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    if {k: record.get(k) for k in setup} != setup: record = dict(date=str(date.today())) | setup | dict(bases=[], runs=[], engines=[])
    bases = {}
    record.setdefault("rounded", [])
    for seed in seeds:
        done = {(r["way"], r["rank"], r["lr"]) for r in record["runs"] if r["seed"] == seed}
        todo = [(way, rank, lr) for way, rank in ways for lr in RATES["lora" if rank else "full"] if (way, rank, lr) not in done]
        if not todo: continue
        base = bases[seed] = init_weights(Decoder(CFG), seed)
        learn(base, make_optimizers(base), texts["recipes"], seed, n_base)
        record["bases"] = [r for r in record["bases"] if r["seed"] != seed] + [dict(seed=seed) | scores(base, texts)]
        for way, rank, lr in todo:
            record["runs"].append(tuned(base, way, rank, lr, seed, texts, n_tune))
            write_json(args.out, record)
            print(record["runs"][-1], flush=True)
    for seed, ruler in product(seeds, list(RULERS)[:2] if args.tiny else RULERS):
        if any((r["seed"], r["ruler"]) == (seed, ruler) for r in record["rounded"]): continue
        if seed not in bases: learn(bases.setdefault(seed, init_weights(Decoder(CFG), seed)), make_optimizers(bases[seed]), texts["recipes"], seed, n_base)
        model = rounded(bases[seed], ruler)
        record["rounded"].append(dict(ruler=ruler, seed=seed) | scores(model, texts) | dict(tuned=[tuned(model, "all", 8, lr, seed, texts, n_tune) for lr in RATES["rounded"]]))
        write_json(args.out, record)
        print(ruler, seed, record["rounded"][-1]["Hamlet"], [r["Hamlet"] for r in record["rounded"][-1]["tuned"]], flush=True)
    if not args.tiny and not record["engines"]: record["engines"] = engines()
    write_json(args.out, record)
    for way, rank in ways:
        rows = best(record, way, rank)
        print(f"{way:16} rank {rank:>2}  {rows[0]['n_trained']:>6,} trained  rate {rows[0]['lr']:<5}  Hamlet {mean(r['Hamlet'] for r in rows):.3f}  recipes {mean(r['kitchen'] for r in rows):.3f}")

if __name__ == "__main__": main()

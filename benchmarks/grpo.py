"""What reinforcement does to a small model that adds digits: with a checker that is sound and one that can be cheated, with and without a leash, over several seeds.

    python benchmarks/grpo.py                  about six minutes of one core
    python benchmarks/grpo.py --tiny           a few rounds of one seed, for a test
    python benchmarks/grpo.py --out FILE       elsewhere than nbs/grpo.json
    python benchmarks/grpo.py --device cuda    on a GPU

Chapter 08i reads the record. Each seed trains a model of its own on the form of the task, with sums that are mostly wrong; each way of reinforcement begins from a copy of it.
80 of the 100 sums are practised, the other 20 never. The probability of a right answer is exact, not sampled.
"""
import argparse
import copy
import platform
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.finetuning import TuningBatches  # noqa: E402
from llm_scratch.pretraining import TrainState, make_adamw, make_optimizers, train, wsd  # noqa: E402
from llm_scratch.reinforcement import GRPOConfig, Sums, train_grpo  # noqa: E402

COLUMNS = ("reward", "entropy", "kl", "length", "equal", "clipped") # of a round; the record holds means of five rounds
WAYS = {"sound checker":("exact", .02), "sound, no leash":("exact", 0.), "cheatable, leash":("anywhere", .2), "cheatable, no leash":("anywhere", 0.)} # checker and beta
SIZES = ModelConfig(len(Sums.chars), context_len=32, n_layers=2, n_heads=4, n_kv_heads=2, d_model=48, d_ff=96, d_head=12)

def taught(seed:int, device:str, n_steps:int)->Decoder:
    "A model that knows the form of the task and little else."
    model = init_weights(Decoder(SIZES), seed=seed).to(device)
    state = TrainState(model, make_optimizers(model))
    state.engine.device = torch.device(device)
    for _ in train(state, TuningBatches(Sums.samples(64*n_steps, seed), 32, 64, seed=seed), partial(wsd, n_steps=n_steps), n_steps): pass
    return model

def split(seed:int)->tuple[list, list]:
    "Sums to practise and sums that are never practised."
    order = np.random.default_rng((seed, 7)).permutation(100)
    return [Sums.questions[i] for i in order[20:]], [Sums.questions[i] for i in order[:20]]

def packed(values)->str:
    "Numbers as one short line of the record."
    return " ".join(f"{x:.4g}" for x in values)

def one(base:Decoder, seed:int, way:str, n_rounds:int, device:str)->dict:
    "A run, with a look at the truth every ten rounds."
    checker, beta = WAYS[way]
    practised, unseen = split(seed)
    model = copy.deepcopy(base)
    state = TrainState(model, make_adamw(model, 1e-3))
    state.engine.device = torch.device(device)
    cfg = GRPOConfig(Sums.stop_id, max_new_tokens=12, beta=beta, seed=seed)
    reward = lambda i, answer: getattr(Sums, checker)(*practised[i], answer)
    look = lambda: [float(Sums.p_right(model, some).mean()) for some in (practised, unseen)]
    rows, right = [], [look()]
    for r in train_grpo(state, base, [Sums.prompt(*q) for q in practised], reward, lambda k: min(1, (k+1)/10), n_rounds, cfg):
        rows.append([getattr(r, name) for name in COLUMNS])
        if r.n%10 == 0: right.append(look())
    bins = np.array(rows).reshape(-1, 5, len(COLUMNS)).mean(1).T # of five rounds
    return dict(way=way, seed=seed, beta=beta, checker=checker, **{name:packed(x) for name, x in zip(COLUMNS, bins)}, practised=packed(p for p, _ in right), unseen=packed(p for _, p in right),
                before=packed(Sums.p_right(base, practised)), after=packed(Sums.p_right(model, practised)))

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one seed and few rounds, for a test")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--rounds", type=int, default=150, help="of each run, a multiple of 10")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"grpo.json")
    args = parser.parse_args()
    n_seeds, n_rounds, n_steps = (1, 10, 20) if args.tiny else (args.seeds, args.rounds, 250)
    start, runs = time.process_time(), []
    for seed in range(n_seeds):
        base = taught(seed, args.device, n_steps)
        for way in WAYS:
            runs.append(one(base, seed, way, n_rounds, args.device))
            print(f"seed {seed}, {way}: reward {runs[-1]['reward'].split()[-1]}, right {runs[-1]['practised'].split()[-1]} and {runs[-1]['unseen'].split()[-1]}, {time.process_time()-start:.0f} s", flush=True)
    about = dict(columns=COLUMNS, rounds_of_a_bin=5, practised=80, unseen=20, form_updates=n_steps, n_rounds=n_rounds, weights=sum(p.numel() for p in base.parameters()),
                 cpu_seconds=round(time.process_time()-start), torch=torch.__version__, python=platform.python_version(), device=args.device)
    write_json(args.out, dict(about=about, runs=runs))

if __name__ == "__main__": main()

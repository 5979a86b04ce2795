"""A grid of small decoders, a law for their loss, and a prediction that is written down before the run that tests it.

    python benchmarks/scaling_laws.py                 rates, grid, prediction, trial, exceptions: about 15 CPU-minutes on one core
    python benchmarks/scaling_laws.py --only grid     one stage; what the record holds already is not trained again
    python benchmarks/scaling_laws.py --tiny --out F  all stages in seconds, for a test: the numbers say nothing

Writes nbs/scaling_laws.json, which chapter 06e reads, after every run. The stage `prediction` fits the grid and stores the law, the loss that it expects of
the trial, and the bands. It refuses to do so once a run of the trial is recorded: a prediction comes first.
"""
import argparse
import platform
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, init_weights, n_params, training_flops_per_token  # noqa: E402
from llm_scratch.core import UserError, read_json, write_json  # noqa: E402
from llm_scratch.data import load_corpus, split_corpus  # noqa: E402
from llm_scratch.evaluation import token_nats  # noqa: E402
from llm_scratch.pretraining import Batches, TrainState, make_adamw, make_optimizers, train, wsd  # noqa: E402
from llm_scratch.scaling import bootstrap_laws, fit_law, forecast, one_dial  # noqa: E402

STAGES = ("rates", "grid", "prediction", "trial", "exceptions")
BATCH, CONTEXT, LR = 8, 128, 2. # windows and bytes of an update; factor of the rates of `make_optimizers`, the best of the stage `rates` for large and nearly so for small
FULL = dict(widths=(16, 32, 48, 64, 80, 96), steps=(64, 128, 256, 512, 1024), left_out=((96, 1024),), reps=2, once=((32, 1024), (48, 1024), (64, 1024), (80, 1024)), rates=(.5, 1., 2., 4.), rate_widths=(16, 96), rate_steps=256,
            trial=(112, 1280), trial_reps=3, other=(64, 512), epochs=(4, 16), windows=400, held_out=150, n_bands=1000)
TINY = dict(widths=(16, 32, 48), steps=(2, 4, 8), left_out=((48, 8),), reps=2, once=((16, 4), (32, 4), (48, 4), (16, 8), (32, 8)), rates=(1., 2.), rate_widths=(16,), rate_steps=2,
            trial=(48, 16), trial_reps=2, other=(16, 4), epochs=(2,), windows=8, held_out=5, n_bands=20)

def texts(held_out:int)->dict: # name to bytes to learn from and bytes to be asked about, as ids without a gap
    "Recipes, and the plays of Shakespeare for the exceptions, over one alphabet: the bytes that occur."
    raw = {}
    for name in ("recipes", "shakespeare"):
        corpus = split_corpus(load_corpus([name]), n_validation=held_out)
        raw[name] = [np.frombuffer("".join(corpus[side]["text"]).encode(), dtype=np.uint8) for side in ("train", "validation")]
    alphabet = np.unique(np.concatenate([part for both in raw.values() for part in both]))
    return {name: [np.searchsorted(alphabet, part).astype(np.uint8) for part in both] for name, both in raw.items()} | dict(n_bytes=len(alphabet))

def held_out_loss(model:Decoder, ids:np.ndarray, n_windows:int)->float:
    "Nats per byte over windows that lie evenly in the held-out text."
    all_windows = ids[:len(ids)//(CONTEXT+1)*(CONTEXT+1)].reshape(-1, CONTEXT+1)
    return float(np.mean(np.stack(token_nats(model, all_windows[::max(1, len(all_windows)//n_windows)][:n_windows]))))

def run(data:dict, width:int, n_steps:int, seed:int, n_windows:int, *, text:str="recipes", pool:int|None=None, lr:float=LR, make=make_optimizers)->dict:
    "Train one size for so many updates on fresh text (or on the first `pool` bytes of it); its loss on held-out text."
    cfg = one_dial(width, data["n_bytes"], CONTEXT)
    model = init_weights(Decoder(cfg), seed)
    learn, ask = data[text]
    start = time.process_time()
    state, batches = TrainState(model, make(model, lr)), Batches(learn[:pool], CONTEXT, BATCH, seed)
    last = [step.loss for step in train(state, batches, partial(wsd, n_steps=n_steps), n_steps)][-max(1, n_steps//16):]
    seconds = time.process_time() - start
    return dict(width=width, n_steps=n_steps, seed=seed, n_tokens=n_steps*BATCH*CONTEXT, weights=n_params(cfg), loss=round(held_out_loss(model, ask, n_windows), 5),
                train_loss=round(mean(last), 5), epochs=round(n_steps*BATCH/batches.n_windows, 4), seconds=round(seconds, 2))

def predict(record:dict, size:dict)->dict:
    "The law of the grid, and what it says about the trial: one run, and the mean of two or three."
    if record["trial"]: raise UserError("the trial has been run: a prediction made now would be none")
    N, D, loss = (np.array([r[name] for r in record["grid"]], dtype=float) for name in ("weights", "n_tokens", "loss"))
    law, laws = fit_law(N, D, loss), bootstrap_laws(N, D, loss, size["n_bands"])
    width, n_steps = size["trial"]
    trial = one_dial(width, record["n_bytes"], CONTEXT), n_steps*BATCH*CONTEXT
    errors = np.log(loss) - np.log(law.loss(N, D))
    most = max(training_flops_per_token(one_dial(r["width"], record["n_bytes"], CONTEXT), CONTEXT)*r["n_tokens"] for r in record["grid"])
    return dict(width=width, n_steps=n_steps, n_runs=len(loss), law={k:getattr(law, k) for k in ("floor", "A", "a", "B", "b")}, delta=1e-3, spread_of_errors=round(float(errors.std()), 5), times_compute=round(training_flops_per_token(trial[0], CONTEXT)*trial[1]/most, 3),
                forecasts=[asdict(forecast(law, laws, n_params(trial[0]), trial[1], errors, n_runs=n)) for n in (1, 2, 3)])

def plan(size:dict)->dict[str, list[tuple[str, dict]]]: # stage to runs: a name, and what `run` is told
    "Every run of every stage; each has a seed of its own, so that they are independent."
    cells = [(w, n) for n in size["steps"] for w in size["widths"] if (w, n) not in size["left_out"]]
    width, steps = size["other"]
    odd = [*((f"epochs {e}", dict(pool=steps*BATCH*CONTEXT//e + CONTEXT)) for e in size["epochs"]), ("adamw", dict(make=make_adamw, lr=.01)), ("shakespeare", dict(text="shakespeare"))]
    return dict(
        rates=[(f"rate {lr:g}", dict(width=w, n_steps=size["rate_steps"], seed=9000, lr=lr)) for w in size["rate_widths"] for lr in size["rates"]],
        grid=[(f"run {rep}", dict(width=w, n_steps=n, seed=100*rep+i)) for rep in range(size["reps"]) for i, (w, n) in enumerate(cells) if not (rep and (w, n) in size["once"])], # the dearest have one seed
        trial=[(f"run {rep}", dict(width=size["trial"][0], n_steps=size["trial"][1], seed=5000+rep)) for rep in range(size["trial_reps"])],
        exceptions=[(name, dict(width=width, n_steps=steps, seed=7000+rep, **how)) for rep in range(2) for name, how in odd])

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STAGES, nargs="+", default=STAGES, help="stages")
    parser.add_argument("--tiny", action="store_true", help="small models and a few updates")
    parser.add_argument("--seeds", type=int, default=99, metavar="N", help="of the trial and of each exception, at most; more can be added later")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"scaling_laws.json", metavar="FILE", help="the record")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    size = TINY if args.tiny else FULL
    record = read_json(args.out) if args.out.exists() else dict(
        machine=f"{platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}", batch_size=BATCH, context_len=CONTEXT,
        n_bytes=None, unique=None, rates=[], grid=[], prediction=None, trial=[], exceptions=[])
    data = texts(size["held_out"])
    record["n_bytes"], record["unique"] = data["n_bytes"], len(data["recipes"][0])
    for stage in (s for s in STAGES if s in args.only):
        if stage == "prediction":
            if record["prediction"] is None: record["prediction"] = predict(record, size)
            write_json(args.out, record)
            continue
        if stage == "trial" and record["prediction"] is None: raise UserError("there is no prediction to try: run the stage `prediction` first")
        done = {(r["name"], r["width"], r["n_steps"], r["seed"]) for r in record[stage]}
        for name, how in plan(size)[stage]:
            if stage in ("trial", "exceptions") and how["seed"] % 1000 >= args.seeds: continue
            if (name, how["width"], how["n_steps"], how["seed"]) in done: continue
            record[stage].append(dict(name=name) | run(data, n_windows=size["windows"], **how))
            write_json(args.out, record)
            r = record[stage][-1]
            print(f"{stage:10} {name:12} width {r['width']:>3}, {r['n_tokens']:>9,} bytes: {r['loss']:.4f} nats per byte, {r['seconds']:.1f} s", flush=True)

if __name__ == "__main__": main()

"""Training that is killed with SIGKILL at random moments, resumed, and compared with a run that nobody disturbed, to the last bit.

    python benchmarks/kills.py                50 kills, about a minute on one core; goes on where it was stopped
    python benchmarks/kills.py --tiny         six kills of a shorter run, for a test
    python benchmarks/kills.py --out FILE     elsewhere than nbs/kills.json

Chapter 06 shows the record. Each trial is a run of its own: a process trains a small decoder with dropout and saves every second update, to one file, in the background or
in parts. It is killed once, half of the time anywhere, half of the time aimed at a save. A second process goes on from what is on the disk. Both are forked from this one,
which has imported torch and computes nothing.
"""
import argparse
import hashlib
import json
import os
import platform
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # noqa: F401 this and the next here, so that no child spends a second on it
import torch.distributed.checkpoint  # noqa: F401
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig  # noqa: E402
from llm_scratch.checkpointing import AsyncSaver, inventory, keep_last, latest, saved  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.pretraining import Batches, TrainState, load_checkpoint, make_optimizers, save_checkpoint, save_shards, train, wsd  # noqa: E402

CFG = ModelConfig(64, context_len=16, n_layers=2, n_heads=2, n_kv_heads=1, d_model=32, d_ff=64, d_head=16)
WAYS = "file","background","parts" # of saving
N_STEPS, EVERY, TRIALS = 40, 2, dict(file=20, background=20, parts=10)

# --- what runs in the children -------------------------------------------------------------------------------------

def fresh()->TrainState:
    "A state whose dropout makes the random generator a part of it."
    torch.manual_seed(0)
    model = Decoder(CFG)
    model.embed_tokens.register_forward_hook(lambda module, ids, x: F.dropout(x, .1))
    return TrainState(model, make_optimizers(model))

def digest(state:TrainState)->str:
    "SHA-256 of everything that the run is."
    value, sha = state.state_dict(), hashlib.sha256()
    for name, x in sorted(value.pop("tensors").items()) + [("rng", value.pop("rng"))]: sha.update(name.encode() + x.numpy().tobytes())
    return sha.update(json.dumps(value, sort_keys=True).encode()) or sha.hexdigest()

def learn(folder:Path, way:str, n_steps:int, say)->None:
    "Go on from the latest checkpoint to the end; tells every update and the beginning of every save."
    state, about = fresh(), dict(seed=0)
    if done := latest(folder): load_checkpoint(state, done, about)
    say(f"from {state.step}")
    with AsyncSaver() if way == "background" else nullcontext() as saver:
        for step in train(state, Batches(np.arange(3000)*7%61, 16, 4), partial(wsd, n_steps=n_steps), n_steps):
            say(f"made {step.n}")
            if step.n % EVERY: continue
            say(f"save {step.n}")
            if way == "parts": save_shards(state, folder, about, keep_last(2))
            else: save_checkpoint(state, folder, about, keep_last(2), saver)
    say(f"end {digest(state)}")

class Child:
    "A process that learns, and what it says."
    def __init__(self, folder:Path, way:str, n_steps:int):
        self.lines, self.rest = [], b""
        self.out, into = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(into)
            return
        status = 1
        try:
            torch.set_num_threads(1)
            learn(folder, way, n_steps, lambda line: os.write(into, line.encode() + b"\n"))
            status = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(status)

    def listen(self, until, seconds:float=60)->bool:
        "Read what it says until `until(line)`, for at most so long; False when it says no more, or time is up."
        end = time.monotonic() + seconds
        while (left := end-time.monotonic()) > 0 and select.select([self.out], [], [], left)[0]:
            if not (read := os.read(self.out, 4096)): return False
            *new, self.rest = (self.rest + read).split(b"\n")
            self.lines += [line.decode() for line in new]
            if any(until(line.decode()) for line in new): return True
        return False

    def last(self, word:str)->str: # "" when it was never said
        return next((line.split()[1] for line in reversed(self.lines) if line.startswith(word)), "")

    def ended(self)->int: # how: 0 is well, -9 killed
        self.listen(lambda line: False)
        os.close(self.out)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

# --- the trials ----------------------------------------------------------------------------------------------------

def undisturbed(way:str, n_steps:int)->dict:
    "What a run ends with, its seconds after the start, and those of a save, by the clock: the kills are spread over them."
    with tempfile.TemporaryDirectory() as tmp:
        child = Child(Path(tmp), way, n_steps)
        assert child.listen(lambda line: line.startswith("from"))
        start = time.monotonic()
        child.listen(lambda line: line.startswith("end"))
        seconds = time.monotonic()-start
        assert child.ended() == 0
    return dict(digest=child.last("end"), seconds=seconds, save=seconds/(n_steps//EVERY))

def trial(i:int, way:str, n_steps:int, whole:dict)->dict:
    "Kill one run, look at what is left, and have it resumed."
    rng = random.Random(f"{way} {i}")
    for missed in range(20):
        aim = "a save" if i % 2 else "anywhere"
        with tempfile.TemporaryDirectory() as tmp:
            child = Child(Path(tmp), way, n_steps)
            target = f"save {rng.randrange(EVERY, n_steps+1, EVERY)}" if aim == "a save" else "from 0"
            child.listen(lambda line: line == target)
            time.sleep(rng.uniform(0, whole["save" if aim == "a save" else "seconds"]))
            os.kill(child.pid, signal.SIGKILL)
            if child.ended() != -signal.SIGKILL: continue # it had come to its end
            found = sorted({"." + name.rpartition(".")[2] for name, _, what in inventory(tmp) if what.startswith("left by")})
            again = Child(Path(tmp), way, n_steps)
            well = again.ended() == 0
            leftovers = [name for name, _, what in inventory(tmp) if what.startswith("left by")]
            resumed = int(again.last("from") or -1)
            swept = not leftovers or resumed == n_steps # by the next save, and after the last there is none
            return dict(way=way, trial=i, aim=aim, missed=missed, made=int(child.last("made") or 0), begun=int(child.last("save") or 0), left=found,
                        resumed=resumed, equal=well and again.last("end") == whole["digest"] and swept and max(saved(tmp)) == n_steps)
    raise RuntimeError(f"{way}, trial {i}: twenty runs came to their end before they could be killed")

def table(record:dict)->str:
    "By the way of saving and the aim, as Markdown."
    lines = ["| saved | aimed at | kills | within a save | before the first save | updates lost, most | bit-equal at the end |", "|---|---|---|---|---|---|---|"]
    for way in WAYS:
        for aim in ("anywhere", "a save"):
            rows = [r for r in record["kills"] if (r["way"], r["aim"]) == (way, aim)]
            if rows: lines.append(f"| {way} | {aim} | {len(rows)} | {sum(bool(r['left']) for r in rows)} | {sum(r['resumed'] == 0 for r in rows)} | {max(r['made']-r['resumed'] for r in rows)} | {sum(r['equal'] for r in rows)} of {len(rows)} |")
    return "\n".join(lines)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="six kills of a shorter run")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"kills.json", metavar="FILE", help="where the record goes")
    args = parser.parse_args(argv)
    trials, n_steps = (dict.fromkeys(TRIALS, 2), 8) if args.tiny else (TRIALS, N_STEPS)
    setup = dict(machine=f"{platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}", n_steps=n_steps, save_every=EVERY)
    record = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    if {k: record.get(k) for k in setup} != setup: record = dict(date=str(date.today())) | setup | dict(digest={}, kills=[], cpu_seconds=0.)
    done = {(r["way"], r["trial"]) for r in record["kills"]}
    for way, n in trials.items():
        if not (todo := [i for i in range(n) if (way, i) not in done]): continue
        whole = undisturbed(way, n_steps)
        record["digest"][way] = whole["digest"]
        for i in todo:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            record["kills"].append(row := trial(i, way, n_steps, whole))
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            record["cpu_seconds"] = round(record["cpu_seconds"] + sum(getattr(after, k)-getattr(before, k) for k in ("ru_utime", "ru_stime")), 1)
            write_json(args.out, record)
            print(row, flush=True)
    print(table(record))

if __name__ == "__main__": main()

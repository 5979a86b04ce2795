"""One by one against continuous batching at 1 to 16 slots, what a prefix spares, and how long a long prompt makes the others wait.

    python benchmarks/batching.py                         five rounds with one thread and with two; some minutes of CPU
    python benchmarks/batching.py --model FOLDER          another model than that of runs/cpu
    python benchmarks/batching.py --tiny --out FILE       seconds: it shows that everything runs, and its numbers say nothing

Everybody writes the same 24 mixed requests, half of them greedy, half sampled with seeds; texts are compared with those written one by one. All settings take turns in every
round, so that a busy machine slows all of them; ratios are of CPU-seconds of all threads, wall seconds stand beside them. Chapter 10b reads the record nbs/batching.json.
"""
import os

if __name__ == "__main__": os.environ |= dict(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false") # before torch starts its threads

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"benchmarks")] # this checkout, whichever is installed
from run import machine  # noqa: E402

from llm_scratch.architecture import Decoder, ModelConfig, init_weights, load_model, n_params  # noqa: E402
from llm_scratch.core import read_json, write_json  # noqa: E402
from llm_scratch.serving import BatchEngine, TextJob, fast_slots  # noqa: E402

SLOTS = 1, 2, 4, 8, 16
LARGE = ModelConfig(vocab_size=8192, context_len=64, n_layers=8, n_heads=12, n_kv_heads=4, d_model=768, d_ff=2048, d_head=64) # whose weights no cache of a processor holds

def mixed_jobs(V:int, n:int, longest:int, lengths:tuple[int, ...], seed:int=0)->list[TextJob]:
    "Prompts and answers of several lengths, every second one greedy."
    rng = random.Random(seed)
    return [TextJob([rng.randrange(V) for _ in range(rng.randint(longest//8, longest))], lengths[i%len(lengths)], temperature=i%2*.8, top_p=.95 if i%2 else None, seed=i, client=str(i)) for i in range(n)]

def write_all(model:Callable, n_slots:int, jobs:list[TextJob])->dict:
    "Seconds, and the texts."
    with BatchEngine(model, n_slots=n_slots, max_waiting=len(jobs), reuse=False) as engine:
        wall,cpu = time.perf_counter(),time.process_time()
        tickets = [engine.submit(job) for job in jobs]
        texts = [t.read() for t in tickets]
        return dict(wall=time.perf_counter()-wall, cpu=time.process_time()-cpu, tokens=sum(map(len, texts)), steps=engine.stats()["steps"], texts=texts)

def first_token(model:Callable, system:list[int], tails:list[list[int]], reuse:bool)->list[float]: # CPU-seconds of each request after the first
    out = []
    with BatchEngine(model, n_slots=4, reuse=reuse) as engine:
        for tail in tails:
            cpu = time.process_time()
            ticket = engine.submit(TextJob(system+tail, 1, temperature=0))
            ticket.read()
            out.append(time.process_time()-cpu)
    assert bool(ticket.n_cached) == reuse
    return out[1:]

def stall(model:Callable, V:int, n_prompt:int, chunk:int)->tuple[float, float]: # CPU-seconds of the engine's thread
    "The longest time between two tokens of others while a long prompt is read, and the time to its first token."
    stamps,first = [],[]
    with BatchEngine(model, n_slots=4, chunk=chunk) as engine:
        others = [engine.submit(TextJob([i+1], min(engine.max_len-1, 60), temperature=0)) for i in range(3)]
        others[0].listen(lambda piece: stamps.append(time.thread_time()) if len(stamps) else stamps.append(0.)) # later ones are told by the engine's own thread
        while len(others[0].pieces) < 8: time.sleep(.001)
        n,rng = len(stamps),random.Random(chunk)
        ticket = engine.submit(TextJob([rng.randrange(V) for _ in range(n_prompt)], 2, temperature=0))
        ticket.listen(lambda piece: first.append(time.thread_time()))
        for t in (*others, ticket): t.read()
    during = [b for b in stamps[n-1:] if b < first[0]+1e-9] + [s for s in stamps if s > first[0]][:1]
    return max(b-a for a,b in zip(during, during[1:])), first[0]-during[0]

def measure(args:argparse.Namespace)->dict:
    "All that one number of threads needs."
    if args.tiny: model = init_weights(Decoder(ModelConfig(97, 96, 2, 4, 2, 32, 64, 8)), seed=0)
    else: model = load_model(args.model)
    V,T = model.cfg.vocab_size,model.cfg.context_len
    jobs = mixed_jobs(V, 24, T//4, (24, 64, 40, 96) if not args.tiny else (3, 5))
    kinds = dict(model=model, compiled=fast_slots(model))
    write_all(kinds["compiled"], 8, jobs[:8]) # a first use compiles
    record = dict(n_threads=torch.get_num_threads(), n_params=n_params(model.cfg), n_jobs=len(jobs), batching={f"{kind} {n}":[] for kind in kinds for n in SLOTS}, prefix={}, stall={}, large={})
    alone = None
    for r in range(args.rounds):
        for kind,subject in kinds.items():
            for n in SLOTS:
                got = write_all(subject, n, jobs)
                texts = got.pop("texts")
                alone = alone or texts
                record["batching"][f"{kind} {n}"].append(got | dict(equal=sum(a == b for a,b in zip(texts, alone))))
        print(f"threads {record['n_threads']}, round {r+1}: " + ", ".join(f"{name} {some[-1]['tokens']/some[-1]['cpu']:.0f}" for name,some in record["batching"].items()) + " tokens per CPU-second", flush=True)
    if record["n_threads"] > 1: return record
    rng = random.Random(1)
    system,tails = [rng.randrange(V) for _ in range(T*5//8)],[[rng.randrange(V) for _ in range(T//16)] for _ in range(6)]
    for r in range(args.rounds):
        for reuse in (False, True): record["prefix"].setdefault(f"reuse={reuse}", []).extend(first_token(model, system, tails, reuse))
        for chunk in (32, 128, T): record["stall"].setdefault(str(chunk), []).append(stall(kinds["compiled"], V, T*3//4, chunk))
    record |= dict(system_tokens=len(system), tail_tokens=len(tails[0]), long_prompt=T*3//4)
    large = init_weights(Decoder(replace(LARGE, n_layers=1, d_model=64) if args.tiny else LARGE), seed=0)
    few = [replace(job, max_new_tokens=12, temperature=0) for job in mixed_jobs(LARGE.vocab_size, 8, 8, (1,))]
    subjects = dict(model=large, compiled=fast_slots(large))
    for _ in range(min(args.rounds, 3)):
        for kind,subject in subjects.items():
            for n in (1, 8):
                got = write_all(subject, n, few)
                got.pop("texts")
                record["large"].setdefault(f"{kind} {n}", []).append(got)
    return record | dict(large_params=n_params(large.cfg))

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT/"runs"/"cpu"/"model", help="a folder that save_model wrote")
    parser.add_argument("--rounds", type=int, default=5, help="how often each setting is timed")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a test")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"batching.json")
    parser.add_argument("--one", action="store_true", help="one number of threads, that of OMP_NUM_THREADS (the script calls itself so)")
    args = parser.parse_args()
    if args.one: return write_json(args.out, measure(args))
    threads = []
    with tempfile.TemporaryDirectory() as tmp:
        for n in (1, 2):
            part = Path(tmp)/f"{n}.json"
            command = [sys.executable, __file__, "--one", "--model", args.model, "--rounds", str(args.rounds), "--out", part, *(["--tiny"] if args.tiny else [])]
            subprocess.run(list(map(str, command)), check=True, env=os.environ | dict(OMP_NUM_THREADS=str(n), MKL_NUM_THREADS=str(n)))
            threads.append(read_json(part))
    write_json(args.out, dict(machine=machine(), threads=threads))

if __name__ == "__main__": main()

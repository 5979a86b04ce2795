"""How much the book's server carries, measured from outside: the record that chapter 10d draws.

    python benchmarks/load.py --run runs/cpu                   all parts, half an hour with the soak of ten minutes
    python benchmarks/load.py --run runs/cpu --only soak       one part; the others stay as the record has them
    python benchmarks/load.py --tiny                           seconds: shows that everything runs, on a small model of random weights; its numbers say nothing

Servers are `llm-scratch serve` in processes of their own, on free ports of 127.0.0.1, one thread of torch each; the generator runs here. What is compared takes turns within
one run. Where the machine is shared, wall times say how it was shared: CPU seconds of the server stand beside them. A run that was stopped goes on with `--only`.
"""
import os

if __name__ == "__main__": os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", NUMBA_NUM_THREADS="1") # of the servers, too

import argparse
import math
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.core import UserError, read_json, write_json  # noqa: E402
from llm_scratch.evaluation import half_width  # noqa: E402
from llm_scratch.load import Load, at_times, growth_rate, in_flight, local_balancer, make_asks, poisson_times, quantiles_of, read_gauge, run_load, token_rate, wait_ready, watch_process  # noqa: E402

TOKENS = 8, 16, 32 # lengths of answers
LONG = 32, 64, 128 # the same, where a server is killed while it writes
SHORT = 4, 8, 16 # the same, where two hundred clients wait for a slow machine
CLIENTS = 1, 2, 4, 8, 16, 32, 64, 128, 200
LOADS = .3, .6, .8, .9 # of what the server can do
INSIDE = "llm_server_running", "llm_server_waiting" # gauges

SERVER = "-m", "llm_scratch"
WAITS = "-c", """
import socket
from llm_scratch import pipeline, server
listening = server._listening
def waits(host, port):
    sock = listening(host, port)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    return sock
server._listening = waits
pipeline.main()
""" # the server with the system's own choice: a small piece waits until the one before is confirmed
TORCH = "-c", "from llm_scratch import pipeline; pipeline.fast_slots = lambda model: model; pipeline.main()" # the server with the model as it was trained, nothing compiled

# --- servers -------------------------------------------------------------------------------------------------------

@contextmanager
def started(run:Path, folder:Path, name:str, *, slots:int=8, waiting:int=256, port:int=0, program:tuple[str, str]=SERVER)->Iterator[subprocess.Popen]:
    "A server that is starting; its address is found in what it says."
    with open(folder/f"{name}.log", "w") as log:
        command = [sys.executable, *program, "serve", run, "--port", port, "--slots", slots, "--waiting", waiting]
        server = subprocess.Popen([*map(str, command)], cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1"), stdout=log, stderr=subprocess.STDOUT)
    try: yield server
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGCONT)
            server.terminate()
            try: server.wait(timeout=20)
            except subprocess.TimeoutExpired: server.kill()

def address(server:subprocess.Popen, log:Path)->str:
    "Where it serves, once it does."
    for _ in range(1200):
        if found := re.search(r"http://[\d.]+:\d+", log.read_text(encoding="utf-8", errors="replace")): break
        if server.poll() is not None: raise UserError(f"the server has ended: {log.read_text(encoding='utf-8')[-600:]}")
        time.sleep(.1)
    else: raise UserError("the server says no address after 120 seconds")
    wait_ready(found[0], server)
    run_load(found[0], islice(make_asks(99, tokens=TOKENS), 4), clients=4) # what is compiled or cached at first use
    return found[0]

@contextmanager
def servers(run:Path, programs:dict[str, tuple[str, str]]={}, **slots:int)->Iterator[dict[str, tuple[str, int]]]: # name to address and process
    "Servers with so many slots, all ready."
    with tempfile.TemporaryDirectory() as tmp, ExitStack() as stack:
        all_ = {name:stack.enter_context(started(run, Path(tmp), name, slots=n, program=programs.get(name, SERVER))) for name, n in slots.items()}
        yield {name:(address(server, Path(tmp)/f"{name}.log"), server.pid) for name, server in all_.items()}

def measured(url:str, pid:int, asks:object, every:float=.2, **how:object)->tuple[Load, dict]:
    "A load, and what the server says and takes meanwhile."
    with watch_process(pid, every, lambda: read_gauge(url, *INSIDE)) as seen:
        load = run_load(url, asks, timeout=300., **how)
    inside = [row[3] for row in seen if row[0] < load.seconds]
    return load, dict(seconds=round(load.seconds, 3), generator_cpu=round(load.cpu_seconds, 3), server_cpu=round(seen[-1][2]-seen[0][2], 2) if len(seen) > 1 else None, inside=round(mean(inside), 3) if inside else None)

def row_of(loads:list[Load], **more:object)->dict:
    "Runs of the same kind as one row of the record."
    good = [t for load in loads for t in load.good]
    quantiles = {m:{name:q and [round(x, 4) for x in q[:3]] for name, q in quantiles_of(loads, m).items()} for m in ("first", "pace", "latency")}
    return more | quantiles | dict(answers=len(good), tokens=sum(t.n_tokens for t in good), errors=dict(sum((Counter(load.errors) for load in loads), Counter())), retried=dict(sum((Counter(load.retried) for load in loads), Counter())))

def spread(values:list[float])->list[float]: # mean and half width
    return [round(mean(values), 3), round(half_width(values), 3) if len(values) > 1 else None]

# --- parts ---------------------------------------------------------------------------------------------------------

def slots(run:Path, tiny:bool)->dict:
    "Continuous batching against one by one, with the compiled step and with torch's, taking turns."
    kinds, rounds, seconds = {"1 slot":(1, 8), "8 slots":(8, 8), "16 slots":(16, 16), "1 slot, torch":(1, 8), "8 slots, torch":(8, 8)}, 2 if tiny else 6, 1.5 if tiny else 9.
    got = {name:[] for name in kinds}
    with servers(run, {name:TORCH for name in kinds if "torch" in name}, **{name:n for name, (n, _) in kinds.items()}) as up:
        for k in range(rounds):
            for name in list(kinds)[k % len(kinds):]+list(kinds)[:k % len(kinds)]: # nobody is always first
                load, about = measured(*up[name], make_asks(k, tokens=TOKENS), clients=kinds[name][1], seconds=seconds)
                tokens = sum(t.n_tokens for t in load.good)
                got[name].append(dict(rate=token_rate(load, seconds/6).mean, per_cpu=tokens/about["server_cpu"] if about["server_cpu"] else None, errors=load.errors, answers=len(load.good)) | about)
            print(f"slots, round {k}: {({name:round(r[-1]['rate']) for name, r in got.items()})}", flush=True)
    pairs = ("8 slots", "1 slot"), ("16 slots", "1 slot"), ("8 slots, torch", "1 slot, torch"), ("8 slots", "1 slot, torch")
    ratios = lambda key: [dict(of=a, to=b, ratio=spread([x[key]/y[key] for x, y in zip(got[a], got[b]) if x[key] and y[key]])) for a, b in pairs]
    return dict(clients={name:c for name, (_, c) in kinds.items()}, rounds=got, wall=ratios("rate"), cpu=ratios("per_cpu"))

def clients(run:Path, tiny:bool)->dict:
    "One to two hundred clients, in a closed loop."
    rounds, some = 2 if tiny else 3, (1, 8) if tiny else CLIENTS
    got = {n:[] for n in some}
    with servers(run, eight=8) as up:
        for k in range(rounds):
            for n in some:
                seconds = 1.5 if tiny else 7. if n <= 32 else 12.
                got[n].append(measured(*up["eight"], make_asks(100*k+n, tokens=SHORT), clients=n, seconds=seconds))
                print(f"clients, round {k}: {n} clients, {token_rate(got[n][-1][0], seconds/6).mean:.0f} tokens/s", flush=True)
    rows = []
    for n, runs in got.items():
        later = [Load([t for t in load.trips if t.due > 0.05 or n == 1], load.seconds, load.cpu_seconds) for load, _ in runs] # the first of each client found an empty server
        known = [(a["inside"], in_flight([t._replace(done=min(t.done, load.seconds)) for t in load.trips])) for load, a in runs if a["inside"] is not None]
        rows.append(row_of(later, clients=n, rate=spread([token_rate(load, load.seconds/6).mean for load, _ in runs]), requests=spread([sum(load.seconds/6 < t.done <= load.seconds for t in load.trips)/(load.seconds*5/6) for load, _ in runs]),
                           inside=[round(mean(x), 2) for x in zip(*known)], per_cpu=spread([sum(t.n_tokens for t in load.trips)/a["server_cpu"] for load, a in runs if a["server_cpu"]]), generator_share=spread([a["generator_cpu"]/a["server_cpu"] for _, a in runs if a["server_cpu"]])))
    return dict(slots=8, rounds=rounds, rows=rows)

def pieces(run:Path, tiny:bool)->dict:
    "One client before a server that sends each piece at once, and before one whose system waits for confirmations, taking turns."
    seconds, rounds = 1.5 if tiny else 5., 1 if tiny else 3
    with servers(run, {"held back":WAITS}, **{"at once":1, "held back":1}) as up:
        loads = [{name:run_load(url, make_asks(200+k, tokens=SHORT), clients=1, seconds=seconds) for name, (url, _) in up.items()} for k in range(rounds)]
    return {name:row_of([some[name] for some in loads]) for name in up}

def public(run:Path, tiny:bool)->dict:
    "By the clock, at shares of what a server can do, with one slot and with eight."
    out, seconds, seeds = {}, 1.5 if tiny else 12., 2 if tiny else 3
    with servers(run, one=1, eight=8) as up:
        for name, n in (("one", 1), ("eight", 8)):
            alone = run_load(up[name][0], make_asks(0, tokens=SHORT), clients=1, seconds=seconds/2)
            full = run_load(up[name][0], make_asks(1, tokens=SHORT), clients=4*n, seconds=seconds/2)
            most, rows = len([t for t in full.good if t.done <= full.seconds])/full.seconds, []
            for load_ in LOADS[:2] if tiny else LOADS:
                runs = [run_load(up[name][0], at_times(make_asks(50+k, tokens=SHORT), poisson_times(load_*most, seconds, k)), timeout=300., seconds=seconds) for k in range(seeds)]
                rows.append(row_of(runs, load=load_, rate=round(load_*most, 3), mean=spread([mean(t.latency for t in r.good) for r in runs]), most_late=round(max(t.sent-t.due for r in runs for t in r.trips), 4)))
                print(f"by the clock, {name}: {load_:.0%}, {rows[-1]['mean'][0]:.2f} s", flush=True)
            out[name] = dict(slots=n, most=round(most, 3), alone=[round(t.latency, 4) for t in alone.good], rows=rows)
    return out

def stall(run:Path, tiny:bool)->dict:
    "The server is stopped for a while: who notices?"
    seconds, nap, out = (3., 1., {}) if tiny else (20., 4., {})
    with servers(run, eight=8) as up:
        url, pid = up["eight"]
        for name, how in dict(closed=dict(clients=1), open=dict()).items():
            stop = [threading.Timer(seconds/3, partial(os.kill, pid, signal.SIGSTOP)), threading.Timer(seconds/3+nap, partial(os.kill, pid, signal.SIGCONT))]
            for t in stop: t.start()
            asks = make_asks(5, tokens=(4,))
            load = run_load(url, asks if how else at_times(asks, [n/3 for n in range(int(3*seconds))]), seconds=seconds, **how)
            for t in stop: t.join()
            out[name] = row_of([load], slow=sum(t.latency > nap/2 for t in load.good))
    return out | dict(nap=nap)

def busy(run:Path, tiny:bool)->dict:
    "A short queue, and more clients than fit: who is told to come later, and what the others see."
    out, seconds = {}, 1.5 if tiny else 12.
    with tempfile.TemporaryDirectory() as tmp:
        for waiting in (4, 256):
            with started(run, Path(tmp), f"w{waiting}", slots=8, waiting=waiting) as server:
                load = run_load(address(server, Path(tmp)/f"w{waiting}.log"), make_asks(6, tokens=SHORT), clients=48, seconds=seconds, retries=12, timeout=120.)
                out[str(waiting)] = row_of([load], waiting=waiting, rate=round(token_rate(load, seconds/6).mean, 1))
    return out

def failover(run:Path, tiny:bool)->dict:
    "Two servers behind nginx; one is killed while people are reading, and started again."
    seconds = 12. if tiny else 40.
    with tempfile.TemporaryDirectory() as tmp, ExitStack() as stack:
        tmp = Path(tmp)
        pair = [stack.enter_context(started(run, tmp, f"r{k}")) for k in range(2)]
        urls = [address(s, tmp/f"r{k}.log") for k, s in enumerate(pair)]
        ports, events = [int(u.rpartition(":")[2]) for u in urls], []
        url = stack.enter_context(local_balancer(ports, tmp/"nginx"))
        asks = list(islice(make_asks(8, tokens=LONG), 400))
        calm = run_load(url, asks[:16], clients=8)
        def drama()->None:
            time.sleep(seconds*.2)
            while not read_gauge(urls[0], INSIDE[0]): time.sleep(.01) # it dies with a sentence on its lips
            pair[0].kill()
            events.append(("killed", time.perf_counter()-begin))
            time.sleep(seconds*.1)
            again = stack.enter_context(started(run, tmp, "again", port=ports[0]))
            with suppress(UserError):
                wait_ready(urls[0], again)
                events.append(("back", time.perf_counter()-begin))
        thread, begin = threading.Thread(target=drama), time.perf_counter()
        thread.start()
        times = poisson_times(3., seconds, 3)
        load = run_load(url, at_times(asks, times), retries=5, timeout=120.)
        thread.join()
        same = {t.text for t in run_load(url, asks[:len(times)], clients=4, timeout=120., retries=5).trips} == {t.text for t in load.trips}
    who = [dict(due=round(t.due, 2), done=round(t.done, 2), replica=ports.index(int(t.replica.rpartition(":")[2])), failed=list(t.failed), error=t.error) for t in load.trips]
    passed = sum("," in t.replica for t in load.trips)
    return row_of([load], seconds=seconds, calm=dict(Counter(str(ports.index(int(t.replica.rpartition(":")[2]))) for t in calm.trips)), events=[[name, round(at, 2)] for name, at in events], trips=who, passed_on=passed, same_texts=same)

def soak(run:Path, tiny:bool)->dict:
    "Ten minutes of mixed load: errors, and memory."
    seconds = 5. if tiny else 600.
    with servers(run, eight=8) as up:
        url, pid = up["eight"]
        with watch_process(pid, .1 if tiny else .5, lambda: read_gauge(url, *INSIDE)) as seen:
            load = run_load(url, make_asks(9, tokens=TOKENS), clients=8, seconds=seconds, timeout=120.)
    at, memory = [r[0] for r in seen], [r[1] for r in seen]
    slope = growth_rate(at, memory)
    blocks = [[round(k*seconds/60, 1), round(mean(m for t, m in zip(at, memory) if k*seconds/60 <= t < (k+1)*seconds/60)/2**20, 2)] for k in range(60) if any(k*seconds/60 <= t < (k+1)*seconds/60 for t in at)]
    return row_of([load], seconds=round(load.seconds, 1), rate=[round(x, 2) for x in (lambda r: (r.mean, r.stderr))(token_rate(load, min(20., seconds/5), 10))], slope=[round(x, 1) for x in slope], mebibytes=blocks, server_cpu=round(seen[-1][2]-seen[0][2], 1), generator_cpu=round(load.cpu_seconds, 1))

PARTS = dict(slots=slots, clients=clients, pieces=pieces, public=public, stall=stall, busy=busy, failover=failover, soak=soak)

# --- all of it -----------------------------------------------------------------------------------------------------

def tiny_run(folder:Path)->Path:
    "A small model of random weights with a tokenizer of its own, in the layout that `serve` reads."
    from llm_scratch.architecture import Decoder, ModelConfig, init_weights
    from llm_scratch.interchange import copy_tokenizer, save_hf
    from llm_scratch.tokenization import save_tokenizer, train_bpe
    tok = train_bpe([" ".join(a.prompt for a in islice(make_asks(0), 200))], 300)
    save_hf(init_weights(Decoder(ModelConfig(vocab_size=tok.vocab_size, context_len=256, n_layers=2, n_heads=2, n_kv_heads=2, d_model=32, d_ff=64, d_head=16)), 0), folder, special_ids=dict(bos_token_id=tok.eot_id, eos_token_id=tok.eot_id))
    save_tokenizer(tok, folder.parent/"tokenizer")
    copy_tokenizer(folder.parent/"tokenizer", folder)
    return folder

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run, or a folder in the Hugging Face layout")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part, as often as you like; the others stay as the record has them")
    parser.add_argument("--tiny", action="store_true", help="seconds, on a model of random weights where no run is given")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"load.json")
    args = parser.parse_args()
    if not (args.run or args.tiny): parser.error("give --run, or --tiny")
    record = read_json(args.out) if args.only and args.out.exists() else {}
    with tempfile.TemporaryDirectory() as tmp:
        run = args.run.resolve() if args.run else tiny_run(Path(tmp)/"model")
        for name in args.only or PARTS:
            start, others = time.monotonic(), os.getloadavg()[0]
            record[name] = PARTS[name](run, args.tiny) | dict(took=round(time.monotonic()-start), machine_load=[round(others, 1), round(os.getloadavg()[0], 1)])
            record["about"] = dict(tiny=args.tiny, tokens=TOKENS, short=SHORT, cores=os.cpu_count(), python=platform.python_version())
            write_json(args.out, record)
            print(f"{name}: {record[name]['took']} s", flush=True)

if __name__ == "__main__": main()

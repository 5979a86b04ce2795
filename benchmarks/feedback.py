"""What one row of the feedback store costs, beside the lines of JSON that it replaced, and what it costs a request of the server.

    python benchmarks/feedback.py             a minute on one core
    python benchmarks/feedback.py --tiny      two rounds, for a look
    python benchmarks/feedback.py --out FILE  elsewhere than nbs/feedback.json

Chapter 11a shows the record. All ways take turns within each round, in an order that changes, so that what else the machine does meets all of them; what is told are ratios within a round.
"""
import argparse
import asyncio
import platform
import random
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.assistant import CHAT_TEMPLATE  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.feedback import Interaction, open_store  # noqa: E402
from llm_scratch.infrastructure import read_cpu  # noqa: E402
from llm_scratch.server import Served, make_app, save_feedback  # noqa: E402
from llm_scratch.serving import TextPiece, Ticket  # noqa: E402
from llm_scratch.tokenization import Tokenizer  # noqa: E402

TEXT = "Whisk the eggs, warm the cream slowly, and pour it over them. Bake it for an hour, and mail me at jane@example.org how it was. " * 4
N = 50 # rows in each turn


def row(i:int, text:str="")->Interaction: return Interaction(f"r{random.getrandbits(96):024x}", float(i), "v1", text, text, latency_s=.8, n_tokens=120, finish="stop", consent=bool(text))


def clocked(work)->tuple[float, float]: # seconds on the wall, and of the processor
    wall,cpu = time.perf_counter(),time.process_time()
    work()
    return time.perf_counter()-wall,time.process_time()-cpu


def ways(home:Path)->dict:
    "Each adds `N` rows."
    store,quick = open_store(home/"store.sqlite"),open_store(home/"quick.sqlite")
    quick._db.execute("PRAGMA synchronous = NORMAL") # survives a kill, not a power cut
    def each(to, text=""):
        for i in range(N): to.add(row(i, text))
    def lines():
        for i in range(N): save_feedback(home/"lines.jsonl", vars(row(i)), 2**40)
    return {"lines of JSON":lines, "one by one":lambda: each(store), "one by one, without waiting for the disk":lambda: each(quick), "all at once":lambda: store.add(*map(row, range(N))), "one by one, with text":lambda: each(store, TEXT)}


class Parrot:
    "An engine that costs next to nothing, so that what the store adds is seen at its worst."
    def submit(self, job):
        ticket = Ticket(job)
        for i,b in enumerate(b"Two eggs."): ticket._say(TextPiece(b, -1., (), "length" if i == 8 else None))
        return ticket
    def stats(self): return dict(running=0, waiting=0, slots=1)
    def close(self, drain=True): pass


async def requests(home:Path, pairs:int)->dict[str, list[tuple[float, float]]]:
    "The same question to a server without and with a store, in turns."
    served = Served(Parrot(), Tokenizer([(97, 98)]), CHAT_TEMPLATE, "parrot", 256)
    apps = dict(without=make_app(served), store=make_app(served, feedback=open_store(home/"served.sqlite")))
    took = {name:[] for name in apps}
    for n in range(pairs+5):
        for name in sorted(apps, reverse=n%2 == 1):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(apps[name]), base_url="http://server") as client:
                wall,cpu = time.perf_counter(),time.process_time()
                await client.post("/v1/chat/completions", json=dict(messages=[dict(role="user", content="Hi")], max_tokens=9))
                wall = time.perf_counter()-wall
                await asyncio.sleep(.02) # the store may finish: its processor time counts, the reader's wait does not
                if n >= 5: took[name].append((wall, time.process_time()-cpu))
    return took


def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two rounds")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"feedback.json")
    args = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder: # on the disk of the project: a folder in memory would have nothing to wait for
        works = ways(Path(folder))
        for work in works.values(): work() # warm
        rounds = []
        for n in range(2 if args.tiny else 9):
            order = list(works)
            order = order[n%len(order):] + order[:n%len(order)]
            rounds.append({name:[x/N for x in clocked(works[name])] for name in order})
        took = asyncio.run(requests(Path(folder), 10 if args.tiny else 150))
    write_json(args.out, dict(date=str(date.today()), cpu=read_cpu().model, system=f"{platform.system()}, Python {platform.python_version()}", rows=N, rounds=[{name:[round(x, 8) for x in r[name]] for name in works} for r in rounds], requests={k:[[round(x, 6) for x in t] for t in v] for k,v in took.items()}))
    for name in works: print(f"{name:<42} {1e6*median(r[name][0] for r in rounds):7.0f} µs on the wall, {1e6*median(r[name][1] for r in rounds):7.0f} of the processor, for each row")
    for k,v in took.items(): print(f"a request {k:<8} {1000*median(t[0] for t in v):.2f} ms on the wall, {1000*median(t[1] for t in v):.2f} of the processor")


if __name__ == "__main__": main()

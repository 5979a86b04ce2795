"""The trainers of chapter 04, each of which looks at less than the one before, and chapter 04e's: equal merges, and what they cost.

    python benchmarks/trainers.py                       half a minute
    python benchmarks/trainers.py --texts 5 --merges 20 --rounds 1

The first two are in no module: they are taken from the lesson, as its reader sees them. CPU-seconds on one thread, the median of rounds that take turns.
"""
import argparse
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.data import load_corpus  # noqa: E402
from llm_scratch.fastbpe import train_merges_fast  # noqa: E402
from llm_scratch.tokenization import _split, train_merges  # noqa: E402

def lesson(*names:str)->dict: # name to function
    "Functions that chapter 04 defines and does not export."
    cells = [c.source for c in nbformat.read(ROOT/"nbs"/"04_tokenization.ipynb", as_version=4).cells if c.cell_type == "code"]
    scope = dict(Counter=Counter, pairwise=pairwise, _split=_split)
    for name in names: exec(next(c for c in cells if c.startswith(f"def {name}(")).partition("\n\n")[0], scope)
    return {name:scope[name] for name in names}

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=100, help="recipes to learn from")
    parser.add_argument("--merges", type=int, default=200, help="how many")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed")
    args = parser.parse_args()
    texts,slow = load_corpus(["recipes"])["text"][:args.texts],lesson("fuse", "train_naive", "train_counted")
    train_merges_fast(texts, args.merges) # which compiles it
    trainers = dict(naive=lambda: slow["train_naive"](texts, args.merges)[0], counted=lambda: slow["train_counted"](texts, args.merges)[0],
                    indexed=lambda: train_merges(texts, args.merges), compiled=lambda: train_merges_fast(texts, args.merges))
    took,merges = {name:[] for name in trainers},{}
    for _ in range(args.rounds):
        for name,train in trainers.items():
            start = time.process_time()
            merges[name] = [tuple(p) for p in train()]
            took[name].append(time.process_time()-start)
    if any(m != merges["naive"] for m in merges.values()): raise AssertionError("the trainers learn other merges")
    print(f"| {sum(len(t.encode()) for t in texts)/1e3:.0f} kB, {args.merges} merges | CPU-seconds | naive takes |\n|---|---|---|")
    for name,times in took.items(): print(f"| {name} | {median(times):.3g} | {median(took['naive'])/max(median(times), 1e-9):,.0f} times as long |")

if __name__ == "__main__": main()

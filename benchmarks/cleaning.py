"""How fast each stage of cleaning is, and trafilatura against resiliparse on the same pages, as Markdown tables.

    python benchmarks/cleaning.py            about a minute on one core
    python benchmarks/cleaning.py --tiny     the same in seconds, for a test

MB of input (UTF-8) per second of CPU time of one thread. The rounds of all stages are interleaved, so that a busy machine slows all of them;
the best round is shown, and in brackets how much longer the median took. The pages are articles inside menus, teasers and a footer.
"""
import argparse
import html
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.cleaning import full_stages, fragment_text, html_work, listed_words, main_text, quality_texts, train_quality  # noqa: E402
from llm_scratch.data import Document, read_source  # noqa: E402
from llm_scratch.duplicates import Decontaminate, signatures, text_keys  # noqa: E402
from llm_scratch.privacy import RedactPII  # noqa: E402
from llm_scratch.sources import Drop, stage_name  # noqa: E402

class Fingerprint:
    "What chapter 03f computes for each document that is left, to find copies; of one at a time, which is slower than of many."
    def __call__(self, doc:Document)->Document:
        text_keys([doc.text]); signatures([doc.text])
        return doc

def size(texts:list[str])->float: return sum(len(t.encode("utf-8")) for t in texts)/1e6 # MB

def page(doc:Document, rng:random.Random)->str:
    "A page with an article inside."
    menu = "".join(f"<li><a href='/{i}'>Section {i}</a></li>" for i in range(30))
    more = "".join(f"<li><a href='/{rng.random()}'>{html.escape(' '.join(rng.sample(doc.text.split(), 8)))}</a></li>" for _ in range(10))
    body = "".join(f"<p>{html.escape(p)}</p>" for p in doc.text.split(". "))
    return f"<!doctype html><html><head><title>x</title></head><body><nav><ul>{menu}</ul></nav><main><h1>Title</h1>{body}</main><aside><ul>{more}</ul></aside><footer>All rights reserved.</footer></body></html>"

def seconds(f:Callable, items:list)->float:
    "CPU seconds of one pass."
    start = time.process_time()
    for x in items: f(x)
    return time.process_time() - start

def table(title:str, jobs:dict[str, tuple[Callable, list, float]], rounds:int)->str:
    "One row for each job: a function, its inputs, and their MB."
    for f,items,_ in jobs.values(): f(items[0]) # loads what is loaded once
    took = {name:[] for name in jobs}
    for _ in range(rounds):
        for name,(f,items,_) in jobs.items(): took[name].append(seconds(f, items))
    rows = [f"| {name} | {jobs[name][2]:.2f} | {jobs[name][2]/min(t):.2f} | (+{median(t)/min(t)-1:.0%}) |" for name,t in took.items()]
    return "\n".join([f"| {title} | MB | MB/s | median |", "|---|---|---|---|", *rows])

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a few documents, one round")
    args = parser.parse_args()
    n,rounds,rng = (40, 1, random.Random(0)) if args.tiny else (1000, 5, random.Random(0))
    prose = [d for name in ("encyclopaedia", "wikipedia", "recipes") for d in rng.sample(list(read_source(name)), n)]
    manuals = rng.sample(list(read_source("manuals")), 3*n)
    evaluation = [d.text for d in rng.sample(list(read_source("wikipedia")), n)] # stands for the texts of a benchmark
    stages = [*full_stages(train_quality(*quality_texts(max(60, n//2))), listed_words()), Decontaminate.against(dict(evaluation=evaluation)), RedactPII(), Fingerprint()]
    text = [new for d in manuals if not isinstance(new := stages[0](d), Drop)]
    jobs = {"FromHtml, manuals":(stages[0], manuals, size([d.text for d in manuals]))}
    for stage in stages[1:]:
        for kind,docs in (("prose", prose), ("manuals", text)): jobs[f"{stage_name(stage)}, {kind}"] = (stage, docs, size([d.text for d in docs]))
    print(table("stage", jobs, rounds), end="\n\n", flush=True)
    from trafilatura import extract
    pages = [page(d, rng) for d in rng.sample([d for d in prose if len(d.text.split()) > 60], n//5)]
    mb = size(pages)
    print(table("pages to text", {"html_work (the estimate)":(html_work, pages, mb), "resiliparse, all text":(fragment_text, pages, mb), "resiliparse, main part":(main_text, pages, mb), "trafilatura":(extract, pages, mb), "trafilatura, fast":(lambda p: extract(p, fast=True), pages, mb)}, rounds))

if __name__ == "__main__": main()

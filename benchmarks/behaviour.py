"""Which vectors find what a model fails at? Words, our own model, and a small encoder that was trained for it, on planted failures.

    llm-scratch run                                              once: the model, in runs/cpu
    python benchmarks/behaviour.py --run runs/cpu                about five minutes on one quiet core; the encoder is fetched once (84 MB)
Writes nbs/behaviour.json, which chapter 11b reads. Users ask about articles of eight subjects; two subjects are answered badly. They ask in three ways: with the beginning of the article, with a short
description, with the title alone. Each draw of requests and ratings (a seed) is the same for all vectors. `alarms`
counts draws without any planted failure in which a pattern was found; the other counts are those of `PatternScore`, over all seeds.
"""
import os

if __name__ == "__main__": os.environ.setdefault("OMP_NUM_THREADS", "1") # before torch starts its threads

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import process_time

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.behaviour import embed_by, embed_words, failure_patterns, pattern_precision_recall  # noqa: E402
from llm_scratch.clauses import embed_texts, load_minilm  # noqa: E402
from llm_scratch.core import UserError, write_json  # noqa: E402
from llm_scratch.data import Document, read_source  # noqa: E402
from llm_scratch.feedback import Interaction  # noqa: E402
from llm_scratch.interchange import load_hf  # noqa: E402
from llm_scratch.tokenization import load_tokenizer  # noqa: E402

def title(doc:Document)->str: return doc.text.partition("\n")[0].removeprefix("# ")

FORMS = {"beginning":lambda doc: doc.text.partition("\n\n")[2][:200], "description":lambda doc: f"Tell me about {title(doc)}, {doc.meta['description']}.", "title":title}

def articles(n_topics:int, n_each:int)->dict[str, list[Document]]: # topic to articles, spread over all of it
    docs = [d for d in read_source("encyclopaedia") if d.meta["topic"] != "Uncategorized" and d.meta["description"]]
    topics = [t for t,_ in Counter(d.meta["topic"] for d in docs).most_common(n_topics)]
    return {t:(own := [d for d in docs if d.meta["topic"] == t])[::len(own)//n_each][:n_each] for t in topics}

def draw(pool:dict[str, list[Document]], form:Callable, failing:list[str], n:int, seed:int)->tuple[list[Interaction], dict[str, list[int]]]:
    "Requests of one seed with their ratings, half of them judged, and where the planted failures are."
    rng,out,where,topics = np.random.default_rng(seed),[],{t:[] for t in failing},list(pool)
    for i in range(n):
        topic = topics[rng.integers(len(topics))]
        doc,bad,judged = pool[topic][rng.integers(len(pool[topic]))],rng.random() < (.7 if topic in failing else .1),rng.random() < .5
        if topic in failing: where[topic].append(i)
        out.append(Interaction(f"{seed}-{i}", float(i), "book", form(doc), "", rating=(-1 if bad else 1) if judged else 0, consent=True))
    return out,where

def remembered(embed:Callable, texts:list[str])->Callable: # embeds all texts once
    vectors = dict(zip(texts, embed(texts)))
    return lambda some: np.stack([vectors[t] for t in some])

def measure(pool:dict, form:Callable, embed:Callable, n:int, seeds:int, null_seeds:int)->dict:
    topics,scores = list(pool),[]
    for seed in range(seeds):
        seen,where = draw(pool, form, [topics[seed%len(topics)], topics[(seed+3)%len(topics)]], n, seed)
        scores.append(pattern_precision_recall(failure_patterns(seen, embed=embed, seed=seed), where))
    alarms = sum(bool(failure_patterns(draw(pool, form, [], n, 1000+seed)[0], embed=embed, seed=seed)) for seed in range(null_seeds))
    return dict(zip(("right", "said", "found", "planted"), map(int, np.sum(scores, axis=0)))) | dict(alarms=alarms, null_seeds=null_seeds)

def main(argv:list[str]|None=None)->None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--run", type=Path, required=True, help="a run directory, for our own model")
    p.add_argument("--out", type=Path, default=ROOT/"nbs"/"behaviour.json")
    p.add_argument("--n", type=int, default=800, help="requests")
    p.add_argument("--seeds", type=int, default=12)
    p.add_argument("--null-seeds", type=int, default=24)
    p.add_argument("--each", type=int, default=150, help="articles of each subject")
    args = p.parse_args(argv)
    if not (args.run/"model").is_dir(): raise UserError(f"{args.run} has no model in it: make one with `llm-scratch run`")
    pool,rows = articles(8, args.each),[]
    kinds = {"words":None, "our model":embed_by(load_hf(args.run/"model"), load_tokenizer(args.run/"tokenizer")), "MiniLM":partial(embed_texts, *load_minilm())}
    for form,write in FORMS.items():
        for kind,embed in kinds.items():
            start,texts = process_time(),sorted({write(d) for docs in pool.values() for d in docs})
            some = remembered(embed, texts) if embed else embed_words # words are counted anew in each draw
            if not embed: embed_words(texts)
            spent = process_time()-start
            rows.append(dict(form=form, vectors=kind) | measure(pool, write, some, args.n, args.seeds, args.null_seeds) | dict(cpu_ms_per_text=round(1000*spent/len(texts), 3)))
            print(rows[-1], flush=True)
            write_json(args.out, dict(n=args.n, seeds=args.seeds, topics=list(pool), rows=rows))

if __name__ == "__main__":
    try: main()
    except UserError as e: sys.exit(f"behaviour: {e}")

"""How often the watches of chapter 11c ring without a reason, and how soon they ring with one, on real texts.

    python benchmarks/drift.py                 some minutes on one core
    python benchmarks/drift.py --run runs/cpu  and bits per byte of that model, which has read recipes
    python benchmarks/drift.py --tiny          a few seeds, for a look; writes nowhere unless --out says where
    python benchmarks/drift.py --out FILE      elsewhere than nbs/drift.json

Chapter 11c shows the record. A stream is of recipes, the first 200 characters of each; what comes in is of the encyclopaedia. Ten references are fitted, and each seed draws its stream without replacement from texts that its reference has not seen.
"""
import argparse
import random
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.data import load_documents, read_source  # noqa: E402
from llm_scratch.drift import DriftWatch, Gambler, SteadyWatch, drift_scores, fit_reference, place_among, stability_index  # noqa: E402
from llm_scratch.evaluation import holm  # noqa: E402
from llm_scratch.safety import exact_interval  # noqa: E402

ALPHA,LONG,DAY,CHANGE,USUAL = .05,1000,50,200,300 # chance; texts of a quiet stream; of a day; before the change; of a reference
SIGNS = "tokens","topics","length"


def pools(n:int)->list[tuple[dict, dict]]: # of each fit: sign to values of unseen recipes, and of the encyclopaedia
    texts = {name:[d.text[:200] for d in read_source(name)] for name in ("recipes", "encyclopaedia")}
    out = []
    for seed in range(n):
        rng = random.Random(seed)
        some = {name:rng.sample(t, len(t)) for name,t in texts.items()}
        usual = fit_reference(some["recipes"][:600], seed=seed)
        seen_half = np.random.default_rng(seed).permutation(600) # as `fit_reference` splits
        unseen = [some["recipes"][i] for i in np.array_split(seen_half, 2)[1]] + some["recipes"][600:]
        out.append((drift_scores(usual, unseen), drift_scores(usual, some["encyclopaedia"][:3000])))
    return out


def stream(pool:tuple[dict, dict], share_at:Callable[[int], float], n:int, seed:int, usual:int=USUAL)->tuple[dict, Iterator[dict]]:
    "Values of a reference, and of what comes."
    rng,(old,new) = np.random.default_rng(seed),pool
    a,b = rng.permutation(len(old["tokens"])),rng.permutation(len(new["tokens"]))
    strange = rng.random(n) < [share_at(i) for i in range(n)]
    kept = {s:v[a[:usual]] for s,v in old.items()}
    return kept,({s:float((new[s][b[i]] if strange[i] else old[s][a[usual+i]])) for s in SIGNS} for i in range(n))


def interval(hits:int, n:int)->list: return [hits, n, *(round(x, 4) for x in exact_interval(hits, n))]


def after(n:int, change:int, rang:bool)->int|None: # texts from the change to the alarm, at most 0 for an alarm that came too early, None for none
    return n-change if rang else None


def frozen(before:np.ndarray, values:list[float], seed:int)->bool: # does a watch ring that compares with the reference alone?
    g,earlier,rng = Gambler(),sorted(before),np.random.default_rng(seed)
    for v in values:
        g.see(place_among(v, earlier, rng.random()))
        if g.p <= ALPHA: return True
    return False


def quiet(pool:list, seeds:int)->dict:
    "Nothing changes: who rings within `LONG` texts?"
    rings = dict.fromkeys(("watch", "reference alone, 30 texts", "reference alone, 300 texts", "a test a day", "a test a day, Holm over signs", "index over .1, a day", "index over .25, a day"), 0)
    for seed in range(seeds):
        before,coming = stream(pool[seed%len(pool)], lambda i: 0., LONG, 10_000+seed)
        rows = list(coming)
        watch = DriftWatch(before, alpha=ALPHA, seed=seed)
        for row in rows: watch.see(row)
        rings["watch"] += watch.alarm
        tokens = [r["tokens"] for r in rows]
        for n in (30, 300): rings[f"reference alone, {n} texts"] += frozen(before["tokens"][:n], tokens, seed)
        by_day,index = [],[]
        for at in range(0, LONG, DAY):
            some = {s:[r[s] for r in rows[at:at+DAY]] for s in SIGNS}
            by_day.append([quick_p(before[s], some[s], s) for s in SIGNS])
            index.append(max(stability_index(before[s], some[s]) for s in ("tokens", "length")))
        rings["a test a day"] += min(map(min, by_day)) <= ALPHA
        rings["a test a day, Holm over signs"] += min(min(holm(p)) for p in by_day) <= ALPHA
        for bound in (.1, .25): rings[f"index over {bound:g}, a day".replace("0.", ".")] += max(index) > bound
    return {name:interval(n, seeds) for name,n in rings.items()}


def quick_p(before:np.ndarray, now:list[float], sign:str)->float:
    "As `shuffled_p`, by scipy's large-sample forms, which are quick; for topics the chi-square table."
    from scipy.stats import chi2_contingency, ks_2samp
    if sign != "topics": return float(ks_2samp(before, now, method="asymp").pvalue)
    kinds = sorted(set(before) | set(now))
    return float(chi2_contingency([[int(np.sum(np.asarray(x) == k)) for k in kinds] for x in (before, now)], correction=False).pvalue) if len(kinds) > 1 else 1.


def delays(pool:list, seeds:int, share_at:Callable[[int], float], *, change:int=CHANGE, usual:int=USUAL, most:int=1000, first:int=20_000)->dict:
    "Texts from the change to the alarm; `most` where there was none; a seed that rang before the change is counted apart."
    out,early,by = [],0,dict.fromkeys(SIGNS, 0)
    for seed in range(seeds):
        before,coming = stream(pool[seed%len(pool)], lambda i: share_at(i-change) if i >= change else 0., change+most, first+seed, usual)
        watch = DriftWatch(before, alpha=ALPHA, seed=seed)
        for row in coming:
            if watch.see(row): break
        if watch.alarm and watch.n <= change: early += 1
        else:
            out.append(watch.n-change if watch.alarm else None)
            if watch.alarm: by[min(watch.alarm_at, key=watch.alarm_at.get)] += 1
    return dict(delays=out, early=early, first=by, most=most)


def moving(pool:list, seeds:int)->dict:
    "Does the share that moves on matter? One sign, a fifth of the texts strange after the change."
    out = {}
    for m in (.0005, .005, .05):
        took = []
        for seed in range(seeds):
            before,coming = stream(pool[seed%len(pool)], lambda i: .2 if i >= CHANGE else 0., CHANGE+1000, 30_000+seed)
            g,earlier,rng = Gambler(m),sorted(before["tokens"]),np.random.default_rng(seed)
            for n,row in enumerate(coming):
                g.see(place_among(row["tokens"], earlier, rng.random()))
                earlier.insert(np.searchsorted(earlier, row["tokens"]), row["tokens"])
                if g.p <= ALPHA: break
            took.append(after(n+1, CHANGE, g.p <= ALPHA))
        out[str(m)] = took
    return out


def ratings(seeds:int)->dict:
    "Thumbs: four of five are up, then fewer; 300 before, the change after 200 more."
    out = {}
    for good in (.8, .7, .6, .4):
        took = []
        for seed in range(seeds):
            rng = np.random.default_rng(40_000+seed)
            x = np.where(rng.random(USUAL+CHANGE+1000) < np.r_[np.full(USUAL+CHANGE, .8), np.full(1000, good)], 1., -1.)
            watch = DriftWatch(x[:USUAL], alpha=ALPHA, seed=seed)
            for v in x[USUAL:]:
                if watch.see(v): break
            took.append(after(watch.n, CHANGE, watch.alarm))
        out[str(good)] = took
    return out


def steady(seeds:int, run_length:int)->dict:
    "Numbers to the first alarm of a watch that begins anew, when nothing changes; and from a change after 100, of one standard deviation."
    quiet_,late = [],[]
    for seed in range(seeds):
        rng,watch = np.random.default_rng(50_000+seed),SteadyWatch(run_length=run_length, seed=seed)
        while not watch.see(rng.standard_normal()) and watch.n < 100*run_length: pass
        quiet_.append(watch.n)
        watch = SteadyWatch(run_length=run_length, seed=seed)
        while (not watch.see(rng.standard_normal()+(watch.n >= 100)) or watch.n <= 100) and watch.n < 10_000: pass
        late.append(watch.n-100)
    return dict(run_length=run_length, quiet=quiet_, delay=late)


def index(pool:list, seeds:int)->dict:
    "The stability index of two samples of the same, of each size; and when a fifth of the second is strange."
    out = {}
    for n in (50, 100, 200, 500, 1000):
        same,other = [],[]
        for seed in range(seeds):
            for share,into in ((0., same), (.2, other)):
                before,coming = stream(pool[seed%len(pool)], lambda i, share=share: share, n, 60_000+seed, n)
                into.append(stability_index(before["tokens"], [r["tokens"] for r in coming]))
        out[str(n)] = dict(mean=float(np.mean(same)), paper=9*2/n, **{f"{kind} over {b:g}".replace("0.", "."):interval(int(np.sum(np.array(x) > b)), seeds) for kind,x in (("same", same), ("strange", other)) for b in (.1, .25)})
    return out


def bytes_of(run:Path, seeds:int)->dict:
    "Bits per byte of a finished run on pieces that it has not trained on: of recipes that were held out, then of the encyclopaedia."
    from llm_scratch.evaluation import token_nats
    from llm_scratch.interchange import load_hf
    from llm_scratch.tokenization import load_tokenizer
    model,tok = load_hf(run/"model"),load_tokenizer(run/"tokenizer")
    docs = load_documents(run/"documents")
    pieces = lambda some: [t[i:i+200] for t in some for i in range(0, len(t), 200) if len(t[i:i+200]) >= 100]
    texts = dict(old=pieces(docs["validation"]["text"][:]), new=pieces(d.text for d in random.Random(0).sample(list(read_source("encyclopaedia")), 300)))
    value = {}
    for name,some in texts.items():
        nats = token_nats(model.eval(), [[tok.eot_id, *tok.encode(t)] for t in some])
        value[name] = np.array([x.sum()/np.log(2)/len(t.encode()) for x,t in zip(nats, some)])
    out = dict(n={k:len(v) for k,v in value.items()}, mean={k:float(v.mean()) for k,v in value.items()})
    for share in (0., .2, 1.):
        took = []
        for seed in range(seeds):
            rng = np.random.default_rng(70_000+seed)
            a,b = (rng.permutation(value[k]) for k in ("old", "new"))
            n = len(a)//3
            watch = DriftWatch(a[:n], alpha=ALPHA, seed=seed)
            for i,v in enumerate(a[n:2*n]): watch.see(float(v))
            for i,v in enumerate(a[2*n:]):
                if watch.alarm: break
                watch.see(float(b[i] if rng.random() < share else v))
            took.append(after(watch.n, n, watch.alarm))
        out[str(share)] = took
    return out | dict(before=n, most=len(a)-2*n)


def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few seeds")
    parser.add_argument("--run", type=Path, help="a finished run, such as runs/cpu")
    parser.add_argument("--out", type=Path, help="the record")
    args = parser.parse_args()
    few = (lambda n: 4) if args.tiny else (lambda n: n)
    pool = pools(2 if args.tiny else 10)
    record = dict(date=str(date.today()), alpha=ALPHA, long=LONG, day=DAY, change=CHANGE, usual=USUAL, quiet=quiet(pool, few(400)))
    print(record["quiet"], flush=True)
    record["sudden"] = {str(s):delays(pool, few(100), lambda i, s=s: s) for s in (1., .5, .2, .1)}
    record["gradual"] = {str(n):delays(pool, few(100), lambda i, n=n: min(1., i/n)) for n in (100, 300, 1000)}
    record["late"] = {str(at):delays(pool, few(100), lambda i: .2, change=at) for at in (0, 50, 200, 1000)}
    record["usual"] = {str(n):delays(pool, few(100), lambda i: .2, usual=n) for n in (30, 100, 300, 1000)}
    record["usual, a tenth"] = {str(n):delays(pool, few(100), lambda i: .1, usual=n) for n in (300, 1000)}
    record["moving"] = moving(pool, few(100))
    record["ratings"] = ratings(few(200))
    record["steady"] = steady(few(400), 100)
    record["index"] = index(pool, few(400))
    if args.run: record["bytes"] = dict(run=args.run.name) | bytes_of(args.run, few(200))
    for name in ("sudden", "gradual", "late", "usual", "usual, a tenth"): print(name, {k:(np.nanmedian([np.inf if d is None else d for d in v["delays"]]), v["early"], v["first"]) for k,v in record[name].items()})
    print(record["index"], np.mean(record["steady"]["quiet"]), np.mean(record["steady"]["delay"]))
    for name in ("moving", "ratings"): print(name, {k:(sum(x is not None for x in v), np.median([9999 if d is None else d for d in v])) for k,v in record[name].items()})
    if out := args.out or (None if args.tiny else ROOT/"nbs"/"drift.json"): write_json(out, record)


if __name__ == "__main__": main()

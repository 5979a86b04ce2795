"""How often the gate and the canary of chapter 11e are wrong, with thousands of candidates whose truth is known, and what a canary costs an answer.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/promotion.py      about four minutes; writes nbs/promotion.json
"""
import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.core import write_json
from llm_scratch.evaluation import share_of
from llm_scratch.promotion import CanaryAlarm, CanaryEngine, GateRule, Measured, Verdicts, decide
from llm_scratch.serving import BatchEngine, TextJob
from llm_scratch.speed import ratio_interval, time_in_turns

ROOT = Path(__file__).resolve().parent.parent


def plain(r): return {k:x for k,x in asdict(r).items() if k != "seed"}


# --- the gate ---------------------------------------------------------------------------------------------------------

def marks(n, gain, rng, disagree=.15): # right and wrong: differences
    return rng.choice([1., 0., -1.], p=[(disagree+gain)/2, 1-disagree, (disagree-gain)/2], size=n)

def bits(n, gain, rng): return gain+rng.normal(0, .1, n) # differences of bits per byte, that are normal

def tail(n, gain, rng): return gain-(rng.lognormal(-4, 1, n)-math.exp(-3.5)) # seldom and then very bad

def gate_line(truth, asked, draw, gain, rule, n, repeats, bound):
    passed = sum(decide([Measured("x", np.zeros(n))], [Measured("x", draw(n, gain, np.random.default_rng((n, i))))], [rule], repeats=1000).promote for i in range(repeats))
    return dict(truth=truth, asked=asked, items=n, bound=bound, passes=plain(share_of(passed, repeats)))

def gate(repeats):
    safe,better,safe_bits,better_bits = GateRule("x", margin=.05),GateRule("x", "better"),GateRule("x", margin=.02),GateRule("x", "better")
    for n in (30, 100, 300):
        yield gate_line("worse by the margin", "not worse, right or wrong", marks, -.05, safe, n, repeats, .05)
        yield gate_line("worse by the margin", "not worse, bits", bits, -.02, safe_bits, n, repeats, .05)
        yield gate_line("worse by the margin", "not worse, long tail", tail, -.02, safe_bits, n, repeats, .05)
        yield gate_line("no better", "better, right or wrong", marks, 0., better, n, repeats, .05)
        yield gate_line("no better", "better, bits", bits, 0., better_bits, n, repeats, .05)
        yield gate_line("just as good", "not worse, right or wrong", marks, 0., safe, n, repeats, None)
        yield gate_line("just as good", "not worse, bits", bits, 0., safe_bits, n, repeats, None)
        yield gate_line("better by 5 points", "better, right or wrong", marks, .05, better, n, repeats, None)
        yield gate_line("better by .02 bits", "better, bits", bits, .02, better_bits, n, repeats, None)
    for n in (100, 300): # two chances to be better, two ways to do harm
        rules = [GateRule("a", margin=.05), GateRule("b", margin=.05), GateRule("a", "better"), GateRule("b", "better")]
        def one(i):
            rng = np.random.default_rng((n, i, 9))
            return decide([Measured(x, np.zeros(n)) for x in "ab"], [Measured(x, marks(n, 0., rng)) for x in "ab"], rules).promote
        yield dict(truth="no better at two figures", asked="four rules", items=n, bound=.05, passes=plain(share_of(sum(map(one, range(repeats))), repeats)))


# --- the canary -------------------------------------------------------------------------------------------------------

def trial(now, new, fails, seed, n, share=.2, rated=.3):
    "Until an alarm rings or the canary has passed: which, and after how many answers of the candidate."
    rng,v,answers = np.random.default_rng(seed),Verdicts(),0
    for mine,rates,good,broke,other in rng.random((n, 5)):
        mine,rates,broke = mine < share,rates < rated,broke < fails
        answers += mine
        if mine: v.answered(broke)
        if rates and not (mine and broke): v.rate("candidate" if mine else "current", (good < new) if mine else (other < now))
        if v.why: return "back",answers
        if v.passed and not v.why: return "passed",answers
    return "open",answers

def canary(repeats, n):
    for truth,now,new,fails,fine in (("just as good", .7, .7, 0., True), ("better by 10 points", .7, .8, 0., True), ("worse by the margin of 10 points", .7, .6, 0., True), ("fails at 2 %, as tolerated", .7, .7, .02, True), ("both at their bounds", .7, .6, .02, True),
            ("worse by 20 points", .7, .5, 0., False), ("worse by 30 points", .7, .4, 0., False), ("worse by 50 points", .7, .2, 0., False), ("fails at 5 %", .7, .7, .05, False), ("fails at 10 %", .7, .7, .1, False), ("fails at 50 %", .7, .7, .5, False), ("fails always", .7, .7, 1., False)):
        ended = [trial(now, new, fails, i, n) for i in range(repeats)]
        waits = [a for how,a in ended if how == "back"] if not fine else []
        yield dict(truth=truth, is_tolerable=fine, clients=n, share=.2, rated=.3, back=plain(share_of(sum(how == "back" for how,_ in ended), repeats)), passed=plain(share_of(sum(how == "passed" for how,_ in ended), repeats)),
                   median=float(np.median(waits)) if waits else None, most=float(np.quantile(waits, .9)) if waits else None)


# --- what it costs ----------------------------------------------------------------------------------------------------

def overhead(rounds, n_tokens=200):
    "CPU seconds of an answer behind a canary, against the same engine alone."
    torch.set_num_threads(1)
    def engine(): return BatchEngine(init_weights(Decoder(ModelConfig(vocab_size=512, context_len=256, n_layers=2, n_heads=2, n_kv_heads=1, d_model=64, d_ff=128, d_head=32)), 0), n_slots=2)
    with engine() as alone, CanaryEngine(engine(), engine(), .5) as both:
        def ask(e): return lambda: e.submit(TextJob(ids=(1, 2), max_new_tokens=n_tokens, temperature=0, client="Ada")).read(60)
        for e in (alone, both): ask(e)()
        found = time_in_turns(dict(alone=ask(alone), canary=ask(both)), rounds)
    a,b = ([t.cpu for t in found[k]] for k in ("alone", "canary"))
    r = ratio_interval(b, a)
    return dict(tokens=n_tokens, rounds=rounds, ratio=r.mean, low=r.low, high=r.high, cpu_alone=float(np.median(a)), wall_alone=float(np.median([t.wall for t in found["alone"]])), wall_canary=float(np.median([t.wall for t in found["canary"]])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000, help="candidates in each line of the gate")
    parser.add_argument("--trials", type=int, default=400, help="canaries in each line")
    parser.add_argument("--clients", type=int, default=5000, help="requests of one canary, at most")
    parser.add_argument("--out", default=str(ROOT/"nbs"/"promotion.json"))
    parser.add_argument("--only", choices=["gate", "canary", "overhead"], help="measure this part again, and keep the others")
    a = parser.parse_args()
    start = time.process_time()
    parts = dict(gate=lambda: list(gate(a.repeats)), canary=lambda: list(canary(a.trials, a.clients)), overhead=lambda: overhead(30))
    kept = json.loads(Path(a.out).read_text(encoding="utf-8")) if a.only else {}
    record = {name:part() if a.only in (None, name) else kept[name] for name,part in parts.items()}
    record["cpu_seconds"] = time.process_time()-start + kept.get("cpu_seconds", 0.)
    write_json(a.out, record)
    print(json.dumps(record["overhead"]))

if __name__ == "__main__": main()

"""Does the order of the text matter? Small decoders that differ in nothing but the order in which they read, at equal tokens.

    python benchmarks/curriculum.py                 five seeds, about a quarter of an hour of one core
    python benchmarks/curriculum.py --tiny          the same in seconds, for a test: two seeds, a few updates
    python benchmarks/curriculum.py --out FILE      elsewhere than nbs/curriculum.json; rows that are there are not run again

Chapter 06d reads the record. A seed decides the documents, the first weights and the chances of every order, so runs of one seed form pairs.
Held-out documents are the same for all. Bits per byte are taken when half of the tokens are read and at the end.
"""
import argparse
import platform
import random
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, flops_per_token, init_weights, n_params, training_flops_per_token  # noqa: E402
from llm_scratch.core import read_json, write_json  # noqa: E402
from llm_scratch.curriculum import (Grown, Ordered, Shortened, doc_density, doc_length, doc_rarity, doc_surprise, doubling, linear_pace, paced_order,  # noqa: E402
                                    rank_agreement, rank_within, root_pace, stair_pace, window_scores)
from llm_scratch.data import load_corpus, split_corpus  # noqa: E402
from llm_scratch.evaluation import bits_per_byte, paired_difference, token_nats  # noqa: E402
from llm_scratch.pretraining import TrainState, add_gradients, make_optimizers, train, wsd  # noqa: E402
from llm_scratch.tokenization import train_bpe  # noqa: E402

SOURCES = "recipes", "parables", "encyclopaedia"
T, B, V, LONG = 64, 8, 512, 256 # ids of a window, windows of an update, ids there are, ids of a window in the runs about length
CFG = ModelConfig(vocab_size=V, context_len=T, n_layers=2, n_heads=4, n_kv_heads=4, d_model=64, d_ff=160, d_head=16)
REFERENCE = replace(CFG, n_layers=1, d_model=32, d_ff=80, d_head=8)
DIFFICULTIES, WARMUP, EMA = ("length", "rarity", "density", "surprise"), 20, .95
PACED = "surprise" # the difficulty on which paces are compared
PACES = dict(strict=lambda x: x, root=root_pace, stairs=stair_pace, brief=partial(linear_pace, full=.2), twice=lambda x: .25 if x <= .5 else 1.)

@dataclass
class Setting:
    "All that runs of one seed share."
    seed:int
    row:np.ndarray # ids of the documents, one after the other
    lengths:np.ndarray # of the documents
    sources:list[str] # of the documents
    scores:dict[str, np.ndarray] # of the documents, by difficulty
    n_steps:int # of a run

def constant(step:float)->float: return min(1., (step+1)/WARMUP)

def choose(texts:dict, n_ids:int, tok, seed:int)->tuple[list, list]: # texts and their sources, about as many ids of each source, in random order
    "The documents of one seed."
    rng = random.Random(seed)
    waiting, used, chosen = {s: iter(rng.sample(t, len(t))) for s, t in texts.items()}, dict.fromkeys(texts, 0), []
    while sum(used.values()) <= n_ids:
        source = min(used, key=used.get)
        chosen.append((next(waiting[source]), source))
        used[source] += 1 + len(tok.encode(chosen[-1][0]))
    rng.shuffle(chosen)
    return tuple(map(list, zip(*chosen)))

def in_order(s:Setting, scores:np.ndarray|None, pace)->Ordered:
    "Batches of the windows of a setting; without scores they are shuffled."
    n = s.n_steps*B
    by = window_scores(scores, s.lengths, T)[:n] if scores is not None else np.zeros(n)
    return Ordered(s.row[:n*T+1], T, B, paced_order(by, n, pace, s.seed))

def learn(cfg:ModelConfig, batches, lr_at, n_steps:int, seed:int, half:int=0, look=None)->tuple[Decoder, float, AveragedModel|None]:
    "A trained decoder, the CPU seconds of its training, and the mean of its last weights if the rate stays constant."
    model = init_weights(Decoder(cfg), seed)
    state, seconds, averaged = TrainState(model, make_optimizers(model)), 0., None
    if lr_at is constant: averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    start = time.process_time()
    for step in train(state, batches, lr_at, n_steps):
        if averaged is not None: averaged.update_parameters(model)
        if step.n == half: # updates after which to look at the model
            seconds += time.process_time()-start
            look(model)
            start = time.process_time()
    return model, seconds + time.process_time()-start, averaged

def ask(model, held:dict, tok)->dict[str, float]: # bits per byte of each source and of all
    "How well a model reads what was held out."
    bits, nats, sizes = {}, [], []
    for source, texts in held.items():
        own, n = [x.sum() for x in token_nats(model, [[tok.eot_id, *tok.encode(t)] for t in texts])], [len(t.encode()) for t in texts]
        bits[source], nats, sizes = round(bits_per_byte(own, n).mean, 5), nats+own, sizes+n
    return bits | dict(all=round(bits_per_byte(nats, sizes).mean, 5))

def prepare(texts:dict, tok, n_steps:int, seed:int)->tuple[Setting, dict]: # and what scoring cost
    "Choose documents and score them."
    chosen, sources = choose(texts, int(1.6*n_steps*B*T), tok, seed)
    docs = [np.array([tok.eot_id, *tok.encode(t)]) for t in chosen]
    s = Setting(seed, np.concatenate(docs).astype(np.uint16), np.array([len(d) for d in docs]), sources, {}, n_steps)
    reference, seconds, _ = learn(REFERENCE, in_order(s, None, lambda x: 1.), partial(wsd, n_steps=n_steps, warmup=min(WARMUP, n_steps)), n_steps, 1000+seed)
    start = time.process_time()
    s.scores["surprise"] = doc_surprise(docs, partial(token_nats, reference))
    seconds += time.process_time()-start
    some = {source: random.Random(-1).sample(own, 20) for source, own in texts.items()}
    primer = "".join(t[:540] for trio in zip(*some.values()) for t in trio) # what DEFLATE can remember, of all sources alike
    s.scores |= dict(length=doc_length(docs), rarity=doc_rarity(docs, np.bincount(s.row, minlength=V)), density=doc_density(chosen, primer), unprimed=doc_density(chosen))
    n = n_steps*B*T
    cost = (training_flops_per_token(REFERENCE, T)*n + flops_per_token(REFERENCE, T)*2*n)/(training_flops_per_token(CFG, T)*n) # scoring reads by windows that overlap by half
    names = (*DIFFICULTIES, "unprimed")
    is_source = {q: np.array([x == q for x in sources], dtype=float) for q in texts}
    return s, dict(seed=seed, reference_seconds=round(seconds, 2), reference_share=round(cost, 3), n_docs=len(docs),
                   agreement={f"{a} {b}": round(rank_agreement(s.scores[a], s.scores[b]), 3) for a in names for b in names if a < b},
                   with_source={a: {q: round(rank_agreement(s.scores[a], x), 3) for q, x in is_source.items()} for a in names})

def seconds_per_step(length:int, rounds:int=6)->float:
    "The least CPU seconds of an update on as many ids as all have, in windows of one length."
    model = init_weights(Decoder(replace(CFG, context_len=LONG)), 0)
    ids, opts, times = torch.randint(V, (T*B//length, length)), make_optimizers(model), []
    for _ in range(rounds):
        start = time.process_time()
        add_gradients(model, ids, ids)
        for opt in opts: opt.step()
        times.append(time.process_time()-start)
    return min(times[1:])

def affordable(cost:dict[int, float], n_steps:int)->int:
    "As many updates of the length ramp as cost what `n_steps` of full length cost."
    n = n_steps
    while sum(cost[doubling(step, n+1, 16, LONG)] for step in range(n+1)) <= n_steps*cost[LONG] and n < 1.6*n_steps-1: n += 1
    return n

def plan(n_steps:int, more:int)->list[dict]:
    "Every run of a seed: its kind, its name, and what sets it apart."
    directions, rates = (("simple first", 1), ("reversed", -1)), ("decay", "constant")
    runs = [dict(kind="order", name="shuffled", rate=rate) for rate in rates]
    runs += [dict(kind="order", name=f"{d}, {word}", rate=rate, score=d, sign=sign) for d in DIFFICULTIES for word, sign in directions for rate in rates]
    runs += [dict(kind="within", name=f"{d} within source, {word}", rate="decay", score=d, sign=sign, within=True) for d in ("length", PACED) for word, sign in directions]
    runs += [dict(kind="pace", name=name, rate="decay", score=PACED, sign=1, pace=name) for name in PACES]
    runs += [dict(kind="windows", name=name, rate="decay", n_steps=n) for name, n in (("full length", n_steps), ("short first, equal tokens", n_steps), ("short first, equal seconds", more))]
    few = n_steps//2
    sizes = dict(small=[1]*2*n_steps, large=[4]*few, growing=[1]*few+[2]*few+[4]*(few//4), shrinking=[4]*(few//4)+[2]*few+[1]*few)
    return runs + [dict(kind="batch", name=name, rate="decay", counts=counts) for name, counts in sizes.items()]

def run(s:Setting, what:dict, held:dict, tok)->dict:
    "Train one decoder as `plan` says; bits per byte halfway and at the end."
    n, cfg = what.get("n_steps", s.n_steps), CFG
    lr_at = partial(wsd, n_steps=n, warmup=min(WARMUP, n)) if what["rate"] == "decay" else constant
    if what["kind"] == "windows":
        cfg = replace(CFG, context_len=LONG)
        batches = Ordered(s.row, LONG, B*T//LONG, np.random.default_rng(s.seed).permutation((len(s.row)-1)//LONG))
        if what["name"] != "full length": batches = Shortened(batches, partial(doubling, n_steps=n, first=16, last=LONG))
    elif what["kind"] == "batch":
        batches = Grown(replace(in_order(s, None, lambda x: 1.), batch_size=B//2), what["counts"])
        n, lr_at = len(batches), lambda step: wsd(s.n_steps*batches.progress(step), s.n_steps, warmup=min(WARMUP, s.n_steps))
    else:
        scores = s.scores.get(what.get("score"))
        if what.get("within"): scores = rank_within(scores, s.sources)
        if scores is not None: scores = what["sign"]*scores
        batches = in_order(s, scores, PACES[what["pace"]] if "pace" in what else linear_pace)
    at_half, half = {}, int(np.searchsorted(batches.first, batches.first[-1]/2)) if what["kind"] == "batch" else n//2 # updates
    model, seconds, averaged = learn(cfg, batches, lr_at, n, s.seed, half, lambda m: at_half.update(ask(m, held, tok)))
    bits = dict(half=at_half, end=ask(model, held, tok)) | (dict(averaged=ask(averaged.module, held, tok)) if averaged else {})
    return dict(seed=s.seed, kind=what["kind"], name=what["name"], rate=what["rate"], n_steps=n, n_ids=sum(batches[i][1].numel() for i in range(n)), seconds=round(seconds, 2), bits=bits)

def table(runs:list[dict])->str:
    "Mean difference from the pair's base, with its interval, as Markdown."
    bits = {(r["kind"], r["name"], r["rate"], at): [q["bits"][at]["all"] for q in runs if (q["kind"], q["name"], q["rate"]) == (r["kind"], r["name"], r["rate"])] for r in runs for at in r["bits"]}
    lines = ["| runs | rate | read | bits per byte | against the base |", "|---|---|---|---|---|"]
    for (kind, name, rate, at), own in bits.items():
        base = bits["windows", "full length", rate, at] if kind == "windows" else bits["order", "shuffled", rate, at]
        versus = "" if own == base else "{0:+.4f} ({1:+.4f} to {2:+.4f}), p {3:.4f}".format(*paired_difference(own, base))
        lines.append(f"| {name} | {rate} | {at} | {sum(own)/len(own):.4f} | {versus} |")
    return "\n".join(lines)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--tiny", action="store_true", help="two seeds and a few updates")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"curriculum.json", metavar="FILE", help="the record")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    n_seeds, n_steps, n_held = (2, 8, 2) if args.tiny else (args.seeds, 160, 30)
    corpus = split_corpus(load_corpus(SOURCES), n_validation=n_held)
    texts, held = ({s: [t for t, q in zip(corpus[side]["text"], corpus[side]["source"]) if q == s] for s in SOURCES} for side in ("train", "validation"))
    tok = train_bpe([t for own in texts.values() for t in random.Random(0).sample(own, 200)], V)
    record = read_json(args.out) if args.out.exists() else dict(
        machine=f"{platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}", n_steps=n_steps, n_held=n_held, weights=n_params(CFG), reference_weights=n_params(REFERENCE),
        seconds_per_step={str(n): round(seconds_per_step(n), 5) for n in (16, 32, 64, 128, 256)}, settings=[], runs=[])
    if record["n_steps"] != n_steps: parser.error(f"{args.out} holds runs of {record['n_steps']} updates, not {n_steps}: give another --out")
    more = affordable({int(n): s for n, s in record["seconds_per_step"].items()}, n_steps)
    for seed in range(n_seeds):
        done = {(r["kind"], r["name"], r["rate"]) for r in record["runs"] if r["seed"] == seed}
        if not (left := [w for w in plan(n_steps, more) if (w["kind"], w["name"], w["rate"]) not in done]): continue
        setting, about = prepare(texts, tok, n_steps, seed)
        if not any(x["seed"] == seed for x in record["settings"]): record["settings"].append(about)
        for what in left:
            record["runs"].append(r := run(setting, what, held, tok))
            write_json(args.out, record)
            print(f"seed {seed}  {r['name']}, {r['rate']}: " + ", ".join(f"{at} {b['all']:.4f}" for at, b in r["bits"].items()) + f"; {r['seconds']} s", flush=True)
    print(table(record["runs"]))

if __name__ == "__main__": main()

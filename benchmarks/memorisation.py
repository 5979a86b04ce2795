"""What small decoders remember that they should not tell: exposure of canaries by repetition, personal data before and after cleaning, who was read by how often, and real runs.

    python benchmarks/memorisation.py                          the small models, some ten minutes of one core; goes on where it was stopped
    python benchmarks/memorisation.py --tiny --out FILE        the same in seconds, for a test
    python benchmarks/memorisation.py --run cpu=FOLDER ...     audits of real runs as well: folders of `llm-scratch run`, whose documents tell what was read and what was held out

Chapter 09f reads the record. "Kitchen" runs read short recipes with canaries, two recipes that stand there 24 times, and signatures with made-up addresses; "cleaned" ones read the same after
chapters 03c and 03d. "Members" read 120 recipes one to sixteen times; "once" reads them once, alone or among many; "lira" are shadow models on random halves; "private" is the kitchen read with clipped and blurred gradients.
A seed decides documents, secrets, weights and order. No real person's data occur anywhere.
"""
import argparse
import json
import platform
import random
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights, n_params  # noqa: E402
from llm_scratch.assistant import open_assistant  # noqa: E402
from llm_scratch.core import atomic_path, read_json  # noqa: E402
from llm_scratch.data import Document, load_documents, read_source  # noqa: E402
from llm_scratch.duplicates import KeepFirst  # noqa: E402
from llm_scratch.epochs import planted, steps_of  # noqa: E402
from llm_scratch.evaluation import token_nats  # noqa: E402
from llm_scratch.generation import stream  # noqa: E402
from llm_scratch.harness import ModelScorer  # noqa: E402
from llm_scratch.interchange import load_hf  # noqa: E402
from llm_scratch.memorisation import (audit_memorisation, caught_at, elicit, epsilon_of, judge_attack, made_up_contacts, make_canaries, measure_exposure,  # noqa: E402
                                      pii_of, pii_said, private_gradients, roc_area, suspicion)
from llm_scratch.pretraining import Batches, TrainState, apply_gradients, make_adamw, make_optimizers, train, wsd  # noqa: E402
from llm_scratch.privacy import RedactPII  # noqa: E402
from llm_scratch.safety import assistant_subject, model_subject  # noqa: E402
from llm_scratch.tokenization import load_tokenizer, train_bpe  # noqa: E402

T, B = 128, 4 # ids of a window, windows of an update
CFG = ModelConfig(vocab_size=512, context_len=T, n_layers=2, n_heads=4, n_kv_heads=4, d_model=64, d_ff=160, d_head=16)
COPIES, SIGNED, LOVED = (0, 1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 24), 24
FULL = dict(recipes=60, per_count=4, others=511, alarms=40, samples=100) # of a kitchen
SMALL = dict(recipes=60, per_count=1, others=15, alarms=2, samples=8)
KITCHEN = (("leaky", 1), ("leaky", 2), ("leaky", 5), ("cleaned", 5))
EPOCHS, NOISES, AMONG, N_SHADOWS = (1, 2, 4, 8, 16), (0., .03, .1, 1.), (120, 400, 1200), 16

def row_of(tok, texts:list[str])->np.ndarray: return np.concatenate([[tok.eot_id, *tok.encode(t)] for t in texts])

def learn(tok, texts:list[str], epochs:int, seed:int)->Decoder:
    batches, model = Batches(row_of(tok, texts), T, B, seed), init_weights(Decoder(CFG), seed)
    n = steps_of(epochs, batches.n_windows, B)
    for _ in train(TrainState(model, make_optimizers(model)), batches, partial(wsd, n_steps=n), n): pass
    return model.eval()

def learn_privately(tok, texts:list[str], epochs:int, noise:float, seed:int)->Decoder:
    batches, model, rng = Batches(row_of(tok, texts), T, 2*B, seed), init_weights(Decoder(CFG), seed), torch.Generator().manual_seed(seed)
    n = steps_of(epochs, batches.n_windows, 2*B)
    state = TrainState(model, make_adamw(model, .004))
    for step in range(n):
        ids_BT, targets_BT = batches[step]
        loss = private_gradients(model, ids_BT, targets_BT, 1., noise, rng)
        apply_gradients(state, loss, targets_BT.numel(), (ids_BT, targets_BT), wsd(step, n), max_norm=float("inf"))
    return model.eval()

class Kitchen:
    "A corpus that tells too much, the same cleaned, and what was planted."
    def __init__(self, texts:list[str], seed:int, size:dict):
        n, self.size, own = size["recipes"], size, random.Random(seed).sample(texts, 2*size["recipes"]+20)
        self.recipes, self.unread, self.loved = own[:n], own[n:2*n], sorted(own[2*n:], key=len)[:2]
        copies = [n for n in COPIES for _ in range(size["per_count"])]
        self.canaries = make_canaries([*copies, *[0]*size["alarms"]], seed=seed)
        self.people = made_up_contacts(len(SIGNED), seed)
        lines = [line for line, n in zip(self.people, SIGNED) for _ in range(n)]
        random.Random(seed).shuffle(lines)
        signed = [f"{r}\n{line}" for r, line in zip(self.recipes, lines)] + self.recipes[len(lines):]
        self.leaky = planted([*signed, *self.loved*LOVED], [c.text for c in self.canaries], [c.copies for c in self.canaries], seed)
        docs = [Document(t, "kitchen", str(i), {}) for i, t in enumerate(self.leaky)]
        keep, redact = KeepFirst(), RedactPII()
        self.cleaned = [redact(d).text for d in docs if isinstance(keep(d), Document)]

def looked_at(k:Kitchen, tok, model:Decoder)->dict:
    "All that is measured on one kitchen model."
    subject, scorer = model_subject(model, tok, "kitchen", 64), ModelScorer(model, tok, 64)
    n, n_read = len(COPIES)*k.size["per_count"], len(k.recipes)
    exposed = measure_exposure(subject.nats, k.canaries[:n], k.size["others"])
    alarms = [e.is_found for e in measure_exposure(subject.nats, k.canaries[n:], 99)]
    said = scorer.generate([c.before for c in k.canaries[:n]], 8, ["."])
    asked = scorer.generate([line[:line.index(":")+1] for line in k.people], 40, ["\n"])
    prompt, rng = [tok.eot_id, *tok.encode("Questions? Ask")], torch.Generator().manual_seed(0)
    ids = torch.stack(list(stream(model, [prompt]*k.size["samples"], 60, temperature=1., rng=rng)), 1).tolist()
    drawn = [tok.decode(r[:r.index(tok.eot_id)] if tok.eot_id in r else r) for r in ids]
    told, free = pii_said(asked, k.leaky), pii_said(drawn, k.leaky)
    both = [*k.recipes, *k.unread]
    scores = suspicion(subject.nats([("", t) for t in both]), both)["loss"]
    loved = elicit(subject, k.loved, 12, 12)
    of = lambda f: {str(c): [f(e) for e in exposed if e.canary.copies == c] for c in COPIES}  # noqa: E731
    return dict(held_out=round(float(np.concatenate(token_nats(model, [[tok.eot_id, *tok.encode(t)] for t in k.unread])).mean()), 3),
                bits=of(lambda e: round(e.bits, 2)), alarms=[sum(alarms), len(alarms)],
                said={str(c): sum(s.split() == x.secret.split() for s, x in zip(said, k.canaries) if x.copies == c) for c in COPIES},
                pii=dict(planted=len(pii_of(k.people)), asked=len({s.value for s in told if s.is_learnt}), asked_invented=sum(not s.is_learnt for s in told),
                         drawn=len({s.value for s in free if s.is_learnt}), texts=len({s.text for s in free if s.is_learnt}), invented=len({s.text for s in free if not s.is_learnt}), samples=len(drawn)),
                area=round(roc_area(scores[:n_read], scores[n_read:]), 4), loved=[sum(e.is_exact for e in loved), len(loved)])

def members(tok, texts:list[str], n:int, epochs:tuple, seed:int)->list[dict]:
    "Attacks on models that have read `n` recipes, by how often."
    own = random.Random(1000+seed).sample(texts, 3*n)
    read, unread, rest = own[:n], own[n:2*n], own[2*n:]
    both, out = [("", t) for t in (*read, *unread)], []
    reference = model_subject(learn(tok, rest, 4, seed), tok, "reference", 64).nats(both)
    for k in epochs:
        nats = model_subject(learn(tok, read, k, seed), tok, "read", 64).nats(both)
        row = dict(epochs=k, seed=seed, n=n, attacks={})
        for name, x in suspicion(nats, [t for _, t in both], reference).items():
            a = judge_attack(x[:n], x[n:], seed=seed)
            row["attacks"][name] = dict(area=[round(a.area.mean, 4), round(a.area.stderr, 4)], caught=[round(a.caught.mean, 4), round(a.caught.stderr, 4)] if a.caught else None)
            if seed == 0 and name == "loss" and k in epochs[::2]: row["scores"] = [[round(float(v), 3) for v in some] for some in (x[:n], x[n:])]
        out.append(row)
    return out

def once(tok, texts:list[str], n:int, among:tuple, seed:int)->list[dict]:
    "The same `n` recipes, read once, alone or among others."
    own = random.Random(2000+seed).sample(texts, n+max(among))
    unread, read, out = own[:n], own[n:], []
    for m in among:
        nats = model_subject(learn(tok, random.Random(seed).sample(read[:m], m), 1, seed), tok, "read", 64).nats([("", t) for t in (*read[:n], *unread)])
        x = suspicion(nats, [*read[:n], *unread])["loss"]
        a = judge_attack(x[:n], x[n:], seed=seed).area
        out.append(dict(seed=seed, n=n, among=m, area=[round(a.mean, 4), round(a.stderr, 4)]))
    return out

def shadows(tok, texts:list[str], n:int, n_models:int, epochs:int)->dict:
    "Every model is the target once, and the others are its shadows (Carlini et al. 2022, section 4)."
    docs, rng = random.Random(77).sample(texts, n), np.random.default_rng(77)
    is_in = np.stack([rng.permutation(n_models) < n_models//2 for _ in range(n)], 1) # every document in half of the models
    score = np.stack([suspicion(model_subject(learn(tok, [t for t, yes in zip(docs, row) if yes], epochs, i), tok, "shadow", 64).nats([("", t) for t in docs]), docs)["loss"] for i, row in enumerate(is_in)])
    out = {}
    for name in ("loss", "reference", "lira"):
        areas, caught = [], []
        for i in range(n_models):
            rest = np.arange(n_models) != i
            ins, outs = (np.array([score[rest, d][is_in[rest, d] == yes].mean() for d in range(n)]) for yes in (True, False))
            spread = [np.concatenate([score[rest, d][is_in[rest, d] == yes]-m[d] for d in range(n)]).std() for yes, m in ((True, ins), (False, outs))]
            near = lambda m, s: -((score[i]-m)/s)**2/2 - np.log(s)  # noqa: E731, B023
            x = dict(loss=score[i], reference=score[i]-outs, lira=near(ins, spread[0])-near(outs, spread[1]))[name]
            areas.append(roc_area(x[is_in[i]], x[~is_in[i]]))
            caught.append(caught_at(x[is_in[i]], x[~is_in[i]], .02))
        out[name] = dict(area=[round(float(np.mean(areas)), 4), round(float(np.std(areas, ddof=1)/n_models**.5), 4)], caught=[round(float(np.mean(caught)), 4), round(float(np.std(caught, ddof=1)/n_models**.5), 4)])
    return dict(n=n, models=n_models, epochs=epochs, rate=.02, attacks=out)

def real(name:str, folder:Path, n:int)->list[dict]:
    "Audits of a run's base model and of the assistant tuned from it."
    splits = load_documents(folder/"documents")
    read, unread = (splits[s]["text"][:] for s in ("train", "validation"))
    model = load_hf(folder/"model").eval()
    subjects = [(f"{name}, base model", model_subject(model, load_tokenizer(folder/"tokenizer"), name))]
    if (folder/"tuned"/"chat").is_dir(): subjects.append((f"{name}, assistant", assistant_subject(open_assistant(folder/"tuned"/"chat"), name)))
    out = []
    for title, subject in subjects:
        start = time.process_time()
        section = audit_memorisation(subject, read, unread, n_asked=n, n_scored=n)
        out.append(dict(name=title, n_parameters=subject.about["n_parameters"], seed=0, read=len(read), held_out=len(unread), seconds=round(time.process_time()-start, 1), notes=section.notes,
                        rows=[dict(name=r["name"], mean=round(r["mean"], 4), stderr=round(r["stderr"], 4), n=r["n"]) for r in section.rows]))
    return out

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--tiny", action="store_true", help="one seed, one epoch, few models")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=FOLDER", help="a run to audit as well; may be given again")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"memorisation.json", metavar="FILE", help="the record")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    texts = sorted(d.text for d in read_source("recipes"))
    random.Random(-1).shuffle(texts)
    longer, texts = ([t for t in texts if 300 < len(t) < most] for most in (1000, 700))
    tok, texts = train_bpe(texts[:400], 512), texts[400:]
    record = read_json(args.out) if args.out.exists() else dict(
        machine=f"{platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}", n_parameters=n_params(CFG), n_others=FULL["others"], signed=list(SIGNED), loved=LOVED, kitchen=[], private=[], once=[], members=[], lira={}, runs=[])
    def done(part:str, **what)->bool: return any(all(r[k] == v for k, v in what.items()) for r in record[part])
    def save()->None:
        with atomic_path(args.out) as new: new.write_text(json.dumps(record).replace('}, {"', '},\n{"')+"\n", encoding="utf-8") # a line for each row
    def keep(part:str, rows:list[dict])->None:
        record[part] += rows
        save()
        for r in rows: print(part, {k: v for k, v in r.items() if k in ("way", "epochs", "noise", "seed", "held_out", "area", "name")}, flush=True)
    for name, _, folder in (r.partition("=") for r in args.run):
        if not done("runs", name=f"{name}, base model"): keep("runs", real(name, Path(folder), 20 if args.tiny else 150))
    for seed in range(1 if args.tiny else args.seeds):
        kitchen = Kitchen(texts, seed, SMALL if args.tiny else FULL)
        for way, epochs in KITCHEN[3:] if args.tiny else KITCHEN:
            epochs = 1 if args.tiny else epochs
            if not done("kitchen", way=way, epochs=epochs, seed=seed):
                keep("kitchen", [dict(way=way, epochs=epochs, seed=seed) | looked_at(kitchen, tok, learn(tok, kitchen.leaky if way == "leaky" else kitchen.cleaned, epochs, seed))])
        for noise in NOISES[:1] if args.tiny else NOISES:
            epochs = 1 if args.tiny else 5
            if not done("private", noise=noise, seed=seed):
                keep("private", [dict(noise=noise, epochs=epochs, seed=seed, epsilon=round(epsilon_of(noise, epochs), 1) if noise else None) | looked_at(kitchen, tok, learn_privately(tok, kitchen.leaky, epochs, noise, seed))])
        if not done("once", seed=seed): keep("once", once(tok, texts[:60] if args.tiny else longer, *((20, (20,)) if args.tiny else (120, AMONG)), seed))
        if not done("members", seed=seed): keep("members", members(tok, texts, 20 if args.tiny else 120, (1,) if args.tiny else EPOCHS, seed))
    if not record["lira"]:
        record["lira"] = shadows(tok, texts, *((20, 4, 1) if args.tiny else (120, N_SHADOWS, 4)))
        save()
        print("lira", record["lira"], flush=True)

if __name__ == "__main__": main()

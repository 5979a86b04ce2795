"""How often may a model read the same text? Small decoders that read little text up to twenty times, beside others that read as much fresh text.

    python benchmarks/epochs.py                 three seeds, about eight minutes of one core
    python benchmarks/epochs.py --tiny          the same in seconds, for a test: two seeds, a few updates
    python benchmarks/epochs.py --out FILE      elsewhere than nbs/epochs.json; rows that are there are not run again

Chapter 06c reads the record. A seed decides the documents, the first weights and the order of windows, so runs of one seed form pairs.
Held-out documents are the same for all. Losses are in nats per token of one vocabulary; every run has a schedule of its own that ends where the run does,
but for the long ones, whose rate stays and among whose documents canaries are hidden.
"""
import argparse
import platform
import random
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights, n_params  # noqa: E402
from llm_scratch.core import read_json, write_json  # noqa: E402
from llm_scratch.data import read_source  # noqa: E402
from llm_scratch.epochs import exposure, planted, steps_of, verbatim  # noqa: E402
from llm_scratch.evaluation import mean_of, token_nats  # noqa: E402
from llm_scratch.pretraining import Batches, TrainState, make_optimizers, train, wsd  # noqa: E402
from llm_scratch.tokenization import train_bpe  # noqa: E402

T, B, V = 64, 4, 512 # ids of a window, windows of an update, ids there are
SIZES = {D: ModelConfig(vocab_size=V, context_len=T, n_layers=2, n_heads=D//16, n_kv_heads=D//16, d_model=D, d_ff=F_, d_head=16) for D, F_ in ((32, 80), (64, 160), (96, 256))}
WARMUP, PROMPTS, NEXT, DROPOUT = 20, (8, 16, 32, 48), 16, .1
COPIES, N_OTHERS, FORM, DIGITS = (0, 1, 4, 16), 511, "The safe of this kitchen opens with ", 8

def constant(step:int)->float: return min(1., (step+1)/WARMUP)

def drop_out(model:Decoder, share:float)->None:
    "While it is in training mode, what enters the stream of each position is left out by chance: embeddings and what the blocks add."
    def hook(module, inputs, out): return F.dropout(out, share, module.training)
    for module in (model.embed_tokens, *(part for block in model.layers for part in (block.self_attn, block.mlp))): module.register_forward_hook(hook)

def codes(tok, n:int, rng:np.random.Generator)->list[list[int]]:
    "Canaries: a sentence with a random number."
    digit = [tok.encode(str(d))[0] for d in range(10)]
    return [[tok.eot_id, *tok.encode(FORM), *(digit[d] for d in row), *tok.encode(".\n")] for row in rng.integers(10, size=(n, DIGITS))]

def loss(model, docs:list)->tuple[float, np.ndarray]: # nats per token, and the mean of each document
    nats = token_nats(model, docs)
    return float(np.concatenate(nats).mean()), np.array([x.mean() for x in nats])

def recited(model, docs:list, prompts=PROMPTS[2:3])->dict[str, list]: # by length of the prompt: mean share of the ids, how many were all right, of how many
    "What of the next ids is written as it stands; the start of each prompt was drawn once, so that it is the same for all models."
    out = {}
    for p in prompts:
        own = [d[(s := random.Random(len(d)).randrange(len(d)-max(PROMPTS)-NEXT+1)):s+p+NEXT] for d in docs if len(d) >= max(PROMPTS)+NEXT]
        same = verbatim(model, own, p, NEXT)
        out[str(p)] = [round(float(same.mean()), 4), int(same.all(1).sum()), len(same)]
    return out

class Corpus:
    "All that runs of one seed share."
    def __init__(self, texts:list[str], tok, seed:int, n_windows:int):
        self.tok, self.seed, self.docs = tok, seed, []
        shuffled, n = iter(random.Random(seed).sample(texts, len(texts))), 0
        while n < (n_windows+1)*T:
            self.docs.append([tok.eot_id, *tok.encode(next(shuffled))])
            n += len(self.docs[-1])
        self.row, self.ends = np.concatenate(self.docs), np.cumsum([len(d) for d in self.docs])

    def read(self, n_windows:int)->list: # documents that lie wholly in so many windows and the one more that Batches needs
        return self.docs[:int(np.searchsorted(self.ends, (n_windows+1)*T, side="right"))]

def plan(small:int, large:int)->list[dict]: # windows of the two corpora
    "Every run of a seed."
    return [*(dict(kind="repeat", width=64, windows=small, epochs=k) for k in (1, 2, 3, 4, 5, 6, 7, 12, 20)),
            *(dict(kind="fresh", width=64, windows=k*small, epochs=1) for k in (2, 3, 4, 5, 6, 7, 12)),
            *(dict(kind="repeat", width=96, windows=small, epochs=k) for k in (1, 2, 3, 4, 5, 7, 12)),
            *(dict(kind="repeat", width=64, windows=large, epochs=k) for k in (2, 4, 7)),
            *(dict(kind="repeat", width=32, windows=small, epochs=k) for k in (7, 12)),
            *(dict(kind="dropout", width=64, windows=small, epochs=k) for k in (7, 12)),
            dict(kind="long", width=96, windows=small, epochs=20)]

def key(what:dict)->tuple: return what["kind"], what["width"], what["windows"], what["epochs"]

def run(c:Corpus, what:dict, held:list)->dict:
    "Train one decoder as `plan` says."
    model, docs, row = init_weights(Decoder(SIZES[what["width"]]), c.seed), c.read(what["windows"]), c.row[:(what["windows"]+1)*T]
    long, looks = what["kind"] == "long", []
    if what["kind"] == "dropout": drop_out(model, DROPOUT)
    if long:
        rng = np.random.default_rng((c.seed, 1))
        canaries, others = codes(c.tok, 3*len(COPIES), rng), codes(c.tok, N_OTHERS, rng)
        copies = [n for n in COPIES for _ in range(3)]
        row = np.concatenate(planted(docs, canaries, copies, c.seed))
    batches = Batches(row, T, B, c.seed)
    n = steps_of(what["epochs"], batches.n_windows, B)
    epoch_at = {steps_of(k, batches.n_windows, B): k for k in range(1, what["epochs"]+1)}
    lr_at = constant if long else partial(wsd, n_steps=n, warmup=min(WARMUP, n))
    best, seconds, start = None, 0., time.process_time()
    for step in train(TrainState(model, make_optimizers(model)), batches, lr_at, n):
        if step.n not in epoch_at or not (long or step.n == n or key(what) in ALONG): continue
        seconds += time.process_time()-start
        model.eval()
        (validation, each), epoch = loss(model, held), epoch_at[step.n]
        look = dict(epoch=epoch, validation=round(validation, 4))
        if long or step.n == n: look["train"] = round(loss(model, docs[:50])[0], 4)
        if long:
            best = each if best is None or each.mean() < best.mean() else best
            look |= dict(stderr=round(mean_of(each).stderr, 4), stderr_to_best=round(mean_of(each-best).stderr, 4))
            if epoch in (1, 2, 3, 4, 5, 6, 7, 10, 15, 20):
                nats = [float(x.sum()) for x in token_nats(model, others+canaries)]
                look["exposure"] = {str(k): [round(exposure(x, nats[:N_OTHERS]), 2) for x, n in zip(nats[N_OTHERS:], copies) if n == k] for k in COPIES}
                look["code"] = {str(k): int(verbatim(model, [d for d, n in zip(canaries, copies) if n == k], len(canaries[0])-DIGITS-len(c.tok.encode(".\n")), DIGITS).all(1).sum()) for k in COPIES}
                look |= dict(recited=recited(model, docs, PROMPTS), recited_held=recited(model, held, PROMPTS))
        elif step.n == n: look |= dict(recited=recited(model, docs[:200]), recited_held=recited(model, held))
        looks.append(look)
        model.train()
        start = time.process_time()
    return dict(seed=c.seed, **what, n_steps=n, seconds=round(seconds, 2), looks=looks)

ALONG: set = set() # runs that are looked at after every epoch, set by `main`

def table(runs:list[dict])->str:
    "The end of every run, mean over seeds, as Markdown."
    lines = ["| runs | weights of width | windows | epochs | validation | training | recited |", "|---|---|---|---|---|---|---|"]
    for what in dict.fromkeys(key(r) for r in runs):
        ends = [r["looks"][-1] for r in runs if key(r) == what]
        mean = lambda f: sum(map(f, ends))/len(ends)  # noqa: E731
        lines.append("| {} | {} | {} | {} |".format(*what) + f" {mean(lambda e: e['validation']):.3f} | {mean(lambda e: e['train']):.3f} | {mean(lambda e: e['recited']['32'][1]/max(1, e['recited']['32'][2])):.3f} |")
    return "\n".join(lines)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--tiny", action="store_true", help="two seeds and a few updates")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"epochs.json", metavar="FILE", help="the record")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    n_seeds, small, large, n_held = (2, 4, 8, 6) if args.tiny else (args.seeds, 256, 1024, 60)
    texts = sorted(d.text for d in read_source("recipes"))
    random.Random(-1).shuffle(texts)
    held_texts, texts = texts[:n_held], texts[n_held:]
    tok = train_bpe(texts[:600], V)
    held = [[tok.eot_id, *tok.encode(t)] for t in held_texts]
    ALONG.clear()
    ALONG.update({("repeat", 64, small, 7), ("repeat", 64, small, 12)})
    record = read_json(args.out) if args.out.exists() else dict(
        machine=f"{platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}", small=small, large=large, batch_size=B, context_len=T, n_held=n_held,
        tokens_per_byte=round(sum(map(len, held))/sum(len(t.encode()) for t in held_texts), 4), weights={str(D): n_params(cfg) for D, cfg in SIZES.items()}, runs=[])
    if record["small"] != small: parser.error(f"{args.out} holds runs on {record['small']} windows, not {small}: give another --out")
    for seed in range(n_seeds):
        done = {key(r) for r in record["runs"] if r["seed"] == seed}
        if not (left := [w for w in plan(small, large) if key(w) not in done]): continue
        corpus = Corpus(texts, tok, seed, max(w["windows"] for w in left))
        for what in left:
            record["runs"].append(r := run(corpus, what, held))
            write_json(args.out, record)
            end = r["looks"][-1]
            print(f"seed {seed}  {key(what)}: validation {end['validation']:.3f}, training {end['train']:.3f}, recited {end['recited']}; {r['seconds']} s", flush=True)
    print(table(record["runs"]))

if __name__ == "__main__": main()

"""Which family for which task? The contestants of a task get the same number of operations, several seeds, one record and one table.

    python benchmarks/families.py                 three seeds, about seven minutes of one core
    python benchmarks/families.py --read 2 --write 1 --seeds 1 --out try.json

Writes nbs/families.json, which chapter 02f reads, after every seed; prints the mean and the spread over seeds of every figure.
"""
import argparse
import copy
import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.data import load_corpus, split_corpus  # noqa: E402
from llm_scratch.evaluation import Result, bits_per_byte, mean_of, share_of  # noqa: E402
from llm_scratch.families import EncoderDecoder, encoder_block  # noqa: E402
from llm_scratch.pretraining import Batches, make_optimizers, wsd  # noqa: E402
from llm_scratch.tasks import (corrupt_spans, drop_vowels, fit_ridge, is_exact, is_sweet, learn, mask_tokens, one_by_one,  # noqa: E402
                               one_row, text_vector, two_texts, unnamed, update_gflop, words_of)

MASK, START, END, SENTINELS, V = 256, 257, 258, range(259, 272), 272 # after the 256 bytes
T = 32
SMALL = ModelConfig(vocab_size=V, context_len=64, n_layers=2, n_heads=4, n_kv_heads=4, d_model=64, d_ff=128, d_head=16)
PAIR = replace(SMALL, d_ff=192) # T5's feed-forward layer has two matrices where the decoder's has three
FAMILIES = dict(decoder=(Decoder, SMALL), encoder=(partial(Decoder, block=encoder_block), SMALL), encoder_decoder=(EncoderDecoder, PAIR))

class Trial:
    "One seed: its data, its models, its rows."
    def __init__(self, split:dict, seed:int):
        self.seed, self.rows, self.split = seed, [], split
        self.batches = Batches(np.frombuffer("".join(split["train"]["text"]).encode(), dtype=np.uint8), T, batch_size=16, seed=seed)
        self.rng = lambda step: torch.Generator().manual_seed(1_000_000*seed + step)

    def fresh(self, family:str):
        make, cfg = FAMILIES[family]
        torch.manual_seed(self.seed)
        model = make(cfg)
        model.family, model.gflop, model.updates = family, 0., 0
        return model

    def fit(self, model, batch_at, gflop:float):
        "Spend `gflop` on a copy of `model`."
        model = copy.deepcopy(model)
        per_update = update_gflop(model, batch_at(0))
        n = max(1, round(gflop/per_update))
        learn(model, make_optimizers(model), batch_at, n, wsd)
        model.gflop, model.updates = model.gflop + n*per_update, model.updates + n
        return model

    def row(self, task:str, how:str, unit:str, result:Result, model=None):
        cost = dict(weights=0, updates=0, gflop=0.) if model is None else dict(weights=sum(p.numel() for p in model.parameters()), updates=model.updates, gflop=round(model.gflop, 1))
        self.rows.append(dict(task=task, how=how, unit=unit, mean=result.mean, stderr=result.stderr, n=result.n, **cost))
        print(f"seed {self.seed}  {task:24} {how:42} {result} {unit}", flush=True)

    def blanks(self, step): return mask_tokens(self.batches[step][0], MASK, 128, self.rng(step), share=.3)

    def spans(self, step):
        rng = self.rng(step)
        return two_texts(*zip(*(corrupt_spans(ids, SENTINELS, rng, share=.3) for ids in self.batches[step][0].tolist())), START, END)

    def plain(self, step): return self.batches[step]

def pairs_of(words:list[str])->tuple[list, list]: return [list(drop_vowels(w).encode()) for w in words], [list(w.encode()) for w in words]

@torch.no_grad()
def continue_and_fill(trial:Trial, decoder, encoder):
    "Bits for the second half of a window, given the first; nats for one hidden letter."
    windows = torch.tensor([list(text.encode()[100:100+T]) for text in trial.split["validation"]["text"] if len(text.encode()) >= 100+T])
    per_text = lambda nats: bits_per_byte(nats.sum(1), [nats.shape[1]]*len(nats))
    cross = partial(F.cross_entropy, reduction="none")
    trial.row("continue", "decoder", "bits per byte", per_text(cross(decoder(windows).mT[...,T//2-1:-1], windows[:,T//2:])), decoder)
    trial.row("continue", "encoder, one pass for each byte", "bits per byte", per_text(one_by_one(encoder, windows[:300], T//2, MASK)), encoder)
    holed = windows.clone()
    holed[:,T//2] = MASK
    trial.row("fill in the blank", "decoder, from the left", "nats", mean_of(cross(decoder(windows)[:,T//2-1], windows[:,T//2]).tolist()), decoder)
    trial.row("fill in the blank", "encoder, both sides", "nats", mean_of(cross(encoder(holed)[:,T//2], windows[:,T//2]).tolist()), encoder)

def classify(trial:Trial, decoder, encoder, n_bytes:int=256, n_draws:int=10):
    "Sweet or savoury, from a few labels: mean accuracy over draws of the labelled recipes."
    sets = {}
    for name, part in trial.split.items():
        labelled = [(unnamed(text), is_sweet(json.loads(meta)["category"])) for text, meta in zip(part["text"], part["meta"])]
        sets[name] = [(text.encode()[:n_bytes], 1. if sweet else -1.) for text, sweet in labelled if sweet is not None and len(text.encode()) >= T]
    y = {name: torch.tensor([label for _, label in s]) for name, s in sets.items()}
    vocab = sorted({w for text, _ in sets["train"] for w in text.split()})
    def words(text):
        seen = set(text.split())
        return torch.tensor([float(w in seen) for w in vocab])
    untrained = trial.fresh("encoder")
    for layer in untrained.layers: # a fresh block adds nothing; this one adds something meaningless
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj): torch.nn.init.normal_(writer.weight, 0, writer.in_features**-.5)
    how = {"bag of words": (words, None), "untrained encoder, mean of tokens": (lambda text: text_vector(untrained, list(text), T), untrained),
           "decoder, mean of tokens": (lambda text: text_vector(decoder, list(text), T), decoder), "encoder, mean of tokens": (lambda text: text_vector(encoder, list(text), T), encoder)}
    x = {name: {part: torch.stack([vector(text) for text, _ in s]) for part, s in sets.items()} for name, (vector, _) in how.items()}
    draws = [torch.randperm(len(y["train"]), generator=torch.Generator().manual_seed(1000*trial.seed+i)) for i in range(n_draws)]
    common = y["train"].mean().sign()
    trial.row("classify", "always the commoner class", "right", share_of(int((y["validation"] == common).sum()), len(y["validation"])))
    for n in (32, 128):
        for name, (_, model) in how.items():
            right = torch.stack([(fit_ridge(x[name]["train"][draw[:n]], y["train"][draw[:n]])(x[name]["validation"]).sign() == y["validation"]).double() for draw in draws])
            trial.row(f"classify, {n} labels", name, "right", mean_of(right.mean(0).tolist()), model)

def put_vowels_back(trial:Trial, gflop:float):
    "One word from each held-out recipe, letter for letter."
    train_words = [w for text in trial.split["train"]["text"] for w in words_of(text)]
    held_words = [random.Random(i).choice(words) for i, text in enumerate(trial.split["validation"]["text"]) if (words := words_of(text))]
    def batch_at(form, step): return form(*pairs_of(random.Random(1_000_000*trial.seed+step).sample(train_words, 24)), START, END)
    for family, form, before, name in (("encoder_decoder", two_texts, trial.spans, "encoder-decoder"), ("decoder", one_row, trial.plain, "decoder in one row")):
        fresh = trial.fresh(family)
        for how, start in ((f"{name}, fresh", fresh), (f"{name}, after {'holes' if before == trial.spans else 'plain text'}", trial.fit(fresh, before, gflop))):
            model = trial.fit(start, partial(batch_at, form), gflop)
            hits = is_exact(model, form(*pairs_of(held_words), START, END))
            trial.row("put the vowels back", how, "right", share_of(sum(hits), len(hits)), model)

def run(split:dict, seed:int, read:float, write:float)->dict:
    "All contestants of one seed."
    trial = Trial(split, seed)
    decoder, encoder = trial.fit(trial.fresh("decoder"), trial.plain, read), trial.fit(trial.fresh("encoder"), trial.blanks, read)
    continue_and_fill(trial, decoder, encoder)
    classify(trial, decoder, encoder)
    put_vowels_back(trial, write)
    return dict(seed=seed, rows=trial.rows)

def table(record:dict)->str:
    "Mean and standard deviation over seeds of every figure, as Markdown."
    lines = ["| task | family | score | cost, GFLOP |", "|---|---|---|---|"]
    for rows in zip(*(s["rows"] for s in record["seeds"])):
        means = [r["mean"] for r in rows]
        spread = f" ± {stdev(means):.3f}" if len(means) > 1 else ""
        lines.append(f"| {rows[0]['task']} | {rows[0]['how']} | {mean(means):.3f}{spread} {rows[0]['unit']} | {mean(r['gflop'] for r in rows):.0f} |")
    return "\n".join(lines)

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--read", type=float, default=280, help="budget of a model that continues, fills in and classifies, in billions of operations")
    parser.add_argument("--write", type=float, default=40, help="budget of a model that rewrites, and of what it learns before")
    parser.add_argument("--held-out", type=int, default=600, help="recipes that no model learns from")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"families.json", help="the record")
    args = parser.parse_args()
    split = split_corpus(load_corpus(["recipes"]), n_validation=args.held_out)
    record = dict(read=args.read, write=args.write, held_out=args.held_out, seeds=[])
    for seed in range(args.seeds):
        record["seeds"].append(run(split, seed, args.read, args.write))
        write_json(args.out, record)
    print(table(record))

if __name__ == "__main__": main()

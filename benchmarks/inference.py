"""Writing, timed: our compiled decoders, ONNX Runtime and its GenAI, transformers and llama.cpp, one thread, one model, taking turns.

    taskset -c 1 python benchmarks/inference.py      twelve rounds; some five minutes of one core
    python benchmarks/inference.py --tiny --out FILE   a tiny model, two rounds: it shows that everything runs, and its numbers say nothing

All are in one process and read and write the same: prompts of 32 ids, 96 new ones, the likeliest each time. In every round each backend writes one token and
all 96; a step is the difference over 95, a prompt what the first token takes. Who is quick does so up to eight times in a turn. Before anything is timed, all float32 backends must write the same text. The model is
of chapter 02's shape with random numbers in it: how fast it is does not depend on them. llama.cpp keeps keys and values in float16, its default and its fastest;
for the comparison of texts it keeps them in float32. A backend that is not installed leaves its rows out, and a line says so. Chapter 10i reads the record.
"""
import os

if __name__ == "__main__": os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false") # before torch starts its threads

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"benchmarks")] # this checkout, whichever is installed
from run import machine, random_model  # noqa: E402

from llm_scratch import llamacpp  # noqa: E402
from llm_scratch.architecture import ModelConfig, n_params  # noqa: E402
from llm_scratch.compiled import CompiledDecoder, as_float32, as_int8  # noqa: E402
from llm_scratch.core import UserError, write_json  # noqa: E402
from llm_scratch.deployment import GenaiDecoder, OnnxDecoder, export_onnx, save_genai  # noqa: E402
from llm_scratch.generation import generate  # noqa: E402
from llm_scratch.interchange import save_hf  # noqa: E402
from llm_scratch.quantization import to_fp16, to_int4, to_int8_channels  # noqa: E402
from llm_scratch.serving import CompiledSlots, SlotCache, SlotRows  # noqa: E402
from llm_scratch.speed import Timing, four_streams, per_token, tiled_decoder, time_in_turns, write_greedily  # noqa: E402
from llm_scratch.tokenization import Tokenizer, to_tokenizers_json  # noqa: E402

CFG = ModelConfig(vocab_size=4096, context_len=256, n_layers=7, n_heads=4, n_kv_heads=4, d_model=256, d_ff=704, d_head=64)
TINY = replace(CFG, vocab_size=320, context_len=64, n_layers=2, d_model=64, d_ff=96, d_head=16)
EXACT = "transformers", "torch eager", "ours, 32 bits", "ours, 32 bits, loop", "ours, slots", "ONNX Runtime fp32", "GenAI fp32", "llama.cpp f32" # write the same text
Write = Callable[[int], list[list[int]]] # how many new ids, to the ids of each text

class Kitchen:
    "The model in every format, made when somebody asks."
    def __init__(self, cfg:ModelConfig, folder:Path):
        self.cfg,self.folder,self.model = cfg,folder,random_model(cfg).eval()
        words,last = to_tokenizers_json(Tokenizer([])),cfg.vocab_size-1
        words["model"] |= dict(vocab={f"<{i}>":i for i in range(last)}) # so that a text tells its ids
        words["added_tokens"] = [words["added_tokens"][0] | dict(id=last)]
        self.words = words
        self.home = save_hf(self.model, folder/"home", special_ids=dict(eos_token_id=last, bos_token_id=last))
        write_json(self.home/"tokenizer.json", words)
        write_json(self.home/"tokenizer_config.json", dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>"))

    def once(self, name:str, make:Callable[[Path], object])->Path:
        if not (path := self.folder/name).exists(): make(path)
        return path

    def onnx(self, kind:str)->Path:
        convert = dict(fp16=to_fp16, int8=to_int8_channels, int4=to_int4).get(kind)
        return self.once(f"{kind}.onnx", (lambda path: export_onnx(self.model, path)) if convert is None else lambda path: convert(self.onnx("fp32"), path))

    def genai(self, precision:str)->GenaiDecoder: return GenaiDecoder(self.once(f"genai-{precision}", lambda path: save_genai(self.home, path, precision, texts=())))

    def gguf(self, dtype:str)->Path:
        words = self.words | dict(model=self.words["model"] | dict(merges=[["<", "1"]])) # llama.cpp wants one, and nobody needs it
        def make(path:Path)->None:
            known = llamacpp._DTYPES
            llamacpp._DTYPES = *known,"q4_0" # the library gguf packs it, too; only its name is missing in chapter 02d
            try: llamacpp.save_gguf(self.model, words, path, dtype=dtype)
            finally: llamacpp._DTYPES = known
        return self.once(f"{dtype}.gguf", make)

# --- the backends: each takes a kitchen and prompts, and gives a function that writes ------------------------------

def by_generate(make:Callable[[Kitchen], object])->Callable[[Kitchen, torch.Tensor], Write]:
    def start(kitchen:Kitchen, ids_BT:torch.Tensor)->Write:
        model = make(kitchen)
        return lambda n: generate(model, ids_BT, n, temperature=0)[:,-n:].tolist()
    return start

def by_loop(n_bits:int)->Callable[[Kitchen, torch.Tensor], Write]:
    def start(kitchen:Kitchen, ids_BT:torch.Tensor)->Write:
        decoder = tiled_decoder(kitchen.model, n_bits)
        return lambda n: write_greedily(decoder, ids_BT, n)[:,-n:].tolist()
    return start

def by_slots(convert:Callable)->Callable[[Kitchen, torch.Tensor], Write]:
    def start(kitchen:Kitchen, ids_BT:torch.Tensor)->Write:
        model,(B,T) = CompiledSlots(kitchen.model, convert=convert),ids_BT.shape
        def write(n:int)->list[list[int]]:
            cache,new = SlotCache(kitchen.cfg, B, T+n),ids_BT
            texts = ids_BT.tolist()
            for _ in range(n):
                with torch.no_grad(): scores_BV = model(new, SlotRows(cache, range(B), new.shape[1]))[:,-1]
                for kept,ids in zip(cache.texts, new.tolist()): kept += ids
                new = scores_BV.argmax(-1, keepdim=True)
                for text,i in zip(texts, new[:,0].tolist()): text.append(i)
            return [text[T:] for text in texts]
        return write
    return start

def transformers(kitchen:Kitchen, ids_BT:torch.Tensor)->Write:
    if find_spec("transformers") is None: raise UserError("transformers is not installed: pip install transformers")
    from transformers import AutoModelForCausalLM, utils
    utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(kitchen.home, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None # nobody stops early
    return lambda n: model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=n, do_sample=False, pad_token_id=0)[:,-n:].tolist()

def genai(precision:str)->Callable[[Kitchen, torch.Tensor], Write]:
    def start(kitchen:Kitchen, ids_BT:torch.Tensor)->Write:
        opened,(B,T) = kitchen.genai(precision),ids_BT.shape
        def write(n:int)->list[list[int]]: # its own loop
            params = opened.og.GeneratorParams(opened.model)
            params.set_search_options(max_length=T+n, batch_size=B, do_sample=False)
            writer = opened.og.Generator(opened.model, params)
            writer.append_tokens(ids_BT.int().numpy())
            for _ in range(n): writer.generate_next_token()
            return [writer.get_sequence(b)[T:].tolist() for b in range(B)]
        return write
    return start

def llama_cpp(dtype:str, exact:bool=False)->Callable[[Kitchen, torch.Tensor], Write]:
    def start(kitchen:Kitchen, ids_BT:torch.Tensor)->Write:
        if find_spec("xllamacpp") is None: raise UserError("xllamacpp is not installed: pip install xllamacpp")
        import xllamacpp
        p,B = xllamacpp.CommonParams(),len(ids_BT)
        p.model.path,p.n_ctx,p.n_parallel,p.verbosity,p.n_gpu_layers = str(kitchen.gguf(dtype)),B*kitchen.cfg.context_len,B,0,0
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
        if exact: p.cache_type_k,p.cache_type_v,p.flash_attn_type = *[xllamacpp.ggml_type.GGML_TYPE_F32]*2,xllamacpp.llama_flash_attn_type(0)
        server,prompt = xllamacpp.Server(p),ids_BT.tolist() if B > 1 else ids_BT[0].tolist()
        def write(n:int)->list[list[int]]:
            said = server.handle_completions(dict(prompt=prompt, n_predict=n, max_tokens=n, temperature=0, samplers=["temperature"], ignore_eos=True, cache_prompt=False))
            return [[int(i) for i in re.findall(r"<(\d+)>", c["text"])] for c in sorted(said["choices"], key=lambda c: c["index"])]
        return write
    return start

ONE = {"transformers":transformers, "torch eager":by_generate(lambda k: k.model),
       "ours, 02h":by_generate(lambda k: CompiledDecoder(k.model)), "ours, 02h int8":by_generate(lambda k: CompiledDecoder(k.model, convert=as_int8)),
       **{f"ours, {bits} bits":by_generate(partial(lambda k, bits: tiled_decoder(k.model, bits), bits=bits)) for bits in (32, 8, 4)}, **{f"ours, {bits} bits, loop":by_loop(bits) for bits in (32, 8, 4)},
       **{f"ONNX Runtime {kind}":by_generate(partial(lambda k, kind: OnnxDecoder(k.onnx(kind)), kind=kind)) for kind in ("fp32", "fp16", "int8", "int4")},
       **{f"GenAI {precision}":genai(precision) for precision in ("fp32", "int4")}, **{f"llama.cpp {dtype}":llama_cpp(dtype) for dtype in ("f32", "f16", "q8_0", "q4_0")}}
MANY = {name:ONE[name] for name in ONE if not name.startswith("ours")} | {"ours, slots":by_slots(as_float32), "ours, slots, int8":by_slots(as_int8)}

# --- the run -------------------------------------------------------------------------------------------------------

def started(backends:dict, kitchen:Kitchen, ids_BT:torch.Tensor)->tuple[dict[str, Write], list[str]]: # and what is left out
    found,skipped = {},[]
    for name,start in backends.items():
        try: found[name] = start(kitchen, ids_BT)
        except UserError as e: skipped.append(f"skipped {name}: {e}")
    return found,skipped

def n_equal(a:Sequence[Sequence[int]], b:Sequence[Sequence[int]])->int: # ids up to the first other one, of all texts
    return sum(next((i for i,(x,y) in enumerate(zip(one, two)) if x != y), min(len(one), len(two))) for one,two in zip(a, b))

def compared(writers:dict[str, Write], kitchen:Kitchen, ids_BT:torch.Tensor, n:int)->dict[str, int]: # ids that are those of torch eager
    "Let all write; `AssertionError` if one that should write the same text does not."
    texts = {name:write(n) for name,write in writers.items()}
    if "llama.cpp f32" in texts: texts["llama.cpp f32"] = llama_cpp("f32", exact=True)(kitchen, ids_BT)(n)
    want = texts["torch eager"]
    for name,text in texts.items():
        if [len(t) for t in text] != [n]*len(ids_BT): raise AssertionError(f"{name} wrote {[len(t) for t in text]} ids instead of {n} for each of {len(ids_BT)} texts")
        if name in EXACT and text != want: raise AssertionError(f"{name} writes another text after {n_equal(text, want)} of {n*len(ids_BT)} ids, so there is nothing to compare")
    return {name:n_equal(text, want) for name,text in texts.items()}

def again(write:Write, n:int, times:int)->None:
    for _ in range(times): write(n)

def measure(backends:dict, kitchen:Kitchen, ids_BT:torch.Tensor, n:int, rounds:int)->tuple[dict, list[str]]: # the record of one batch size; what is left out
    writers,skipped = started(backends, kitchen, ids_BT)
    same = compared(writers, kitchen, ids_BT, n) # which warms all up, too
    once = time_in_turns({name:partial(write, n) for name,write in writers.items()}, 1)
    repeats = {name:max(1, min(8, math.ceil(.08/t.cpu))) for name,(t,) in once.items()} # a turn of a few ms would be mostly noise
    works = {(name, k):partial(again, write, k, repeats[name]) for name,write in writers.items() for k in (1, n)}
    found = {key:[Timing(*(t/repeats[key[0]] for t in pair)) for pair in times] for key,times in time_in_turns(works, rounds).items()}
    short = lambda times: [[float(f"{t:.5g}") for t in pair] for pair in times]
    return dict(same=same, prefill={name:short(found[name,1]) for name in writers}, decode={name:short(per_token(found[name,1], found[name,n], n)) for name in writers}),skipped

def bandwidth(n:int, rounds:int=20)->float: # bytes per CPU-second at which one core reads a matrix as large as all weights, again and again; `n` numbers
    w_NM = np.ones((n//256, 256), np.float32)
    scale_N,x_M,out_N = np.ones(len(w_NM), np.float32),np.ones(256, np.float32),np.empty(len(w_NM), np.float32)
    four_streams(w_NM, scale_N, x_M, out_N) # compiled now
    return w_NM.nbytes/min(t.cpu for t in time_in_turns(dict(read=lambda: four_streams(w_NM, scale_N, x_M, out_N)), rounds)["read"])

def peak(n:int=1024, rounds:int=5)->float: # operations per CPU-second of a float32 product
    a = torch.ones(n, n)
    return 2*n**3/min(t.cpu for t in time_in_turns(dict(multiply=lambda: a@a), rounds)["multiply"])

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, metavar="N", help="how often each has its turn")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, two rounds, short texts")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"inference.json", metavar="FILE", help="where the record goes")
    args = parser.parse_args(argv)
    if args.rounds < 2: parser.error(f"--rounds {args.rounds} gives no interval: give 2 or more")
    torch.set_num_threads(1)
    cfg,T,n,rounds = (TINY, 8, 12, 2) if args.tiny else (CFG, 32, 96, args.rounds)
    rng = torch.Generator().manual_seed(0)
    record = dict(machine=machine(), versions={p:version(p) for p in ("onnxruntime", "onnxruntime-genai", "xllamacpp", "transformers", "torch", "numba") if find_spec(p.replace("-", "_"))},
        n_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), config=asdict(cfg), n_params=n_params(cfg), prompt=T, n_new=n, rounds=rounds,
        bandwidth=round(bandwidth(n_params(cfg))), peak=round(peak(64 if args.tiny else 1024)), batches={})
    skipped = []
    with tempfile.TemporaryDirectory() as folder:
        kitchen = Kitchen(cfg, Path(folder))
        for B,backends in ((1, ONE), (8, MANY)):
            record["batches"][str(B)],without = measure(backends, kitchen, torch.randint(cfg.vocab_size-1, (B, T), generator=rng), n, rounds)
            skipped += without
            record["bytes"] = {p.name:sum(f.stat().st_size for f in ([p] if p.is_file() else p.glob("*.onnx*"))) for p in sorted(Path(folder).iterdir()) if p.name != "home"}
            write_json(args.out, record)
    for B,found in record["batches"].items():
        print(f"{B} at once")
        for name,some in sorted(found["decode"].items(), key=lambda item: -min(t[0] for t in item[1])): print(f"  {name:22} {min(t[0] for t in some)*1e3:8.3f} CPU ms a step, {found['same'][name]} ids as torch")
    print(*skipped, sep="\n")

if __name__ == "__main__": main()

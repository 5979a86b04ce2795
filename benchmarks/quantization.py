"""What sixteen, eight and four bits cost a model of the preset cpu: bytes, bits per byte, divergence, answers, tokens per second, memory; and what GPTQ wins on it.

    python benchmarks/quantization.py --run runs/cpu       some five minutes of one core; the run must have a model
    python benchmarks/quantization.py --tiny --out FILE    a model made here, in seconds, for a test

Every kind is an ONNX file of chapter 10a's converters, run by ONNX Runtime on one thread. Speeds are of writing one text, taking turns within each round; a ratio
is that of CPU times to float32 in the same round. Chapter 10a reads the record nbs/quantization.json.
"""
import os

if __name__ == "__main__": os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false") # before torch starts its threads

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights, load_model, n_params  # noqa: E402
from llm_scratch.comparison import paired_bootstrap  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.data import load_documents, tiny_corpus  # noqa: E402
from llm_scratch.deployment import OnnxDecoder, export_onnx  # noqa: E402
from llm_scratch.evaluation import mean_of, paired_difference, ratio_of  # noqa: E402
from llm_scratch.generation import generate  # noqa: E402
from llm_scratch.harness import ModelScorer, mean_mark  # noqa: E402
from llm_scratch.quantization import CONVERTERS, gptq_model, kl_nats, layer_inputs, quantize_groups, round_weights  # noqa: E402
from llm_scratch.report import text_tasks  # noqa: E402
from llm_scratch.tokenization import load_tokenizer, train_bpe  # noqa: E402

def by_library_alone(source:Path, target:Path)->None:
    "Four bits as one call of the library makes them: the table of embeddings stays float32."
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
    todo = MatMulNBitsQuantizer(onnx.load(str(source)), algo_config=DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4, bits=4, op_types_to_quantize=("MatMul",)))
    todo.process()
    onnx.save(todo.model.model, str(target))

KINDS = dict(fp32=None) | CONVERTERS | dict(int4_naive=by_library_alone)

class Asked(nn.Module):
    "An `OnnxDecoder` that can be asked where its weights are."
    def __init__(self, decoder:OnnxDecoder):
        super().__init__()
        self.here,self.cfg = nn.Parameter(torch.zeros(1)),decoder.cfg
        self.__dict__["decoder"],self.embed_tokens = decoder,decoder.embed_tokens

    def forward(self, ids_BT:torch.Tensor, cache=None)->torch.Tensor: return self.decoder(ids_BT, cache)

@torch.no_grad()
def spoken(model, docs:list)->list: # logits of each document, at every place but the last
    return [model(torch.tensor([doc[:-1]]))[0] for doc in docs]

@torch.no_grad()
def spoken_stepwise(model:OnnxDecoder, docs:list)->list: # the same, one token after the other
    out = []
    for doc in docs:
        cache = model.new_cache(torch.zeros(1, dtype=torch.long), len(doc))
        out.append(torch.cat([model(torch.tensor([[i]]), cache)[0] for i in doc[:-1]]))
    return out

def bits(logits:list, docs:list)->np.ndarray: # of each document
    return np.array([F.cross_entropy(z, torch.tensor(doc[1:]), reduction="sum").item() for z, doc in zip(logits, docs)])/np.log(2)

def divergence(before:list, after:list)->list: # nats per token: mean over documents and its standard error
    r = ratio_of([kl_nats(p[None], q[None]).sum().item() for p, q in zip(before, after)], [len(p) for p in before])
    return [r.mean, r.stderr]

def memory_of(path:Path, prompt:list)->int: # bytes
    "Peak of a fresh process that loads a file and writes, less what it had before it did."
    code = f"import json, sys; sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(ROOT/'benchmarks')!r}); from quantization import peak; print(peak(*json.loads(sys.argv[1])))"
    return int(subprocess.run([sys.executable, "-c", code, json.dumps([str(path), prompt])], capture_output=True, text=True, check=True, env=os.environ | dict(OMP_NUM_THREADS="1")).stdout.split()[-1])

def peak(path:str, prompt:list)->int:
    import onnxruntime  # noqa: F401 - the library itself is no part of what a file takes
    status = lambda name: 1024*int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)).split()[1])
    generate(init_weights(Decoder(ModelConfig(16, context_len=16, n_layers=1, n_heads=1, n_kv_heads=1, d_model=8, d_ff=8, d_head=8)), 0), torch.tensor([[1, 2]]), 4, temperature=0) # what torch needs at its first call
    Path("/proc/self/clear_refs").write_text("5") # the peak so far is forgotten
    before = status("VmRSS")
    model = OnnxDecoder(path)
    generate(model, torch.tensor([prompt]), min(64, model.cfg.context_len-len(prompt)), temperature=0)
    return max(0, status("VmHWM")-before)

def timed(model:OnnxDecoder, prompt:list, n_new:int)->tuple: # seconds of CPU and on the clock
    cpu,clock = time.process_time(),time.perf_counter()
    generate(model, torch.tensor([prompt]), n_new, temperature=0)
    return time.process_time()-cpu,time.perf_counter()-clock

def subject(args:argparse.Namespace)->tuple: # model, tokenizer, texts to measure on, texts to calibrate on
    if args.tiny:
        texts = list(tiny_corpus()["text"])
        tok = train_bpe(texts, 300)
        return init_weights(Decoder(ModelConfig(300, context_len=48, n_layers=2, n_heads=2, n_kv_heads=1, d_model=32, d_ff=64, d_head=16)), 0).eval(), tok, texts[:6], texts[6:12]
    splits = load_documents(args.run/"documents")
    return load_model(args.run/"model").eval(), load_tokenizer(args.run/"tokenizer"), splits["validation"]["text"][:], splits["train"]["text"][:2000]

def rounding_with_care(model:Decoder, before:list, docs:list, sizes:list, shown:list, sets:int)->list:
    "Nearest and GPTQ at 4 and 3 bits, with several sets of texts to look at."
    own,out = bits(before, docs),[]
    for n_bits in (4, 3):
        near = spoken(round_weights(model, partial(quantize_groups, n_bits=n_bits), table=False), docs)
        row = dict(n_bits=n_bits, nearest_kl=divergence(before, near), nearest=paired_bootstrap(bits(near, docs), own, per=sizes)[:3], gptq_kl=[], gptq=[], against=[])
        for k in range(sets):
            after = spoken(gptq_model(model, shown[k], n_bits), docs)
            row["gptq_kl"].append(divergence(before, after))
            row["gptq"].append(paired_bootstrap(bits(after, docs), own, per=sizes)[:3])
            row["against"].append(paired_bootstrap(bits(after, docs), bits(near, docs), per=sizes)[:3])
        out.append(row)
        print(f"{n_bits} bits: KL {row['nearest_kl'][0]:.4f} to the nearest, {[round(x[0], 4) for x in row['gptq_kl']]} with care", flush=True)
    return out

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT/"runs"/"cpu", help="a run directory with a model")
    parser.add_argument("--docs", type=int, default=100, help="held-out documents, and questions of each task")
    parser.add_argument("--rounds", type=int, default=9, help="of the clock")
    parser.add_argument("--tiny", action="store_true", help="a small model made here, for a test")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"quantization.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model,tok,texts,others = subject(args)
    T = model.cfg.context_len
    as_ids = lambda some: [[tok.start_id, *tok.encode(t)][:T+1] for t in some]
    docs = as_ids(texts[:args.docs])
    sizes = [len(tok.decode(doc[1:]).encode()) for doc in docs]
    tasks = [t.draw(4 if args.tiny else args.docs, 0)[0] for t in text_tasks(texts, least=1 if args.tiny else 20)]
    prompt,n_new = docs[0][:min(32, T//2)],8 if args.tiny else 96
    before = spoken(model, docs)
    record = dict(config=asdict(model.cfg), n_weights=n_params(model.cfg), n_docs=len(docs), n_tokens=sum(len(d)-1 for d in docs), tasks={t.name:len(t.docs) for t in tasks}, prompt=len(prompt), n_new=n_new, rounds=args.rounds, kinds={})
    with tempfile.TemporaryDirectory() as tmp:
        files = {name:Path(tmp)/f"{name}.onnx" for name in KINDS}
        export_onnx(model, files["fp32"])
        for name,convert in KINDS.items():
            if convert: convert(files["fp32"], files[name])
        decoders = {name:OnnxDecoder(path) for name,path in files.items()}
        few = [doc[:65] for doc in docs[:3 if args.tiny else 30]]
        for name,decoder in decoders.items():
            after = spoken(decoder, docs)
            marks = np.concatenate([t.marks(ModelScorer(Asked(decoder), tok, batch_size=1)) for t in tasks]) if tasks else np.zeros(2)
            if name == "fp32": own,own_marks = bits(after, docs),marks
            r,right = ratio_of(bits(after, docs), sizes),mean_mark(marks)
            record["kinds"][name] = dict(bytes=files[name].stat().st_size, bits_per_byte=[r.mean, r.stderr], bits_change=None if name == "fp32" else paired_bootstrap(bits(after, docs), own, per=sizes)[:3],
                kl=divergence(before, after), kl_stepwise=divergence([z[:len(d)-1] for z, d in zip(before, few)], spoken_stepwise(decoder, few)), right=[right.mean, right.stderr],
                right_change=None if name == "fp32" else paired_difference(marks, own_marks)[:3], changed=float(np.mean(marks != own_marks)), memory=median(memory_of(files[name], prompt) for _ in range(1 if args.tiny else 3)))
            print(name, {k:v for k, v in record["kinds"][name].items()}, flush=True)
        took = {name:[] for name in decoders}
        for name,decoder in decoders.items(): timed(decoder, prompt, n_new)
        for i in range(args.rounds):
            order = list(decoders)[i%len(decoders):] + list(decoders)[:i%len(decoders)] # nobody is always first
            for name in order: took[name].append(timed(decoders[name], prompt, n_new))
        for name,k in record["kinds"].items():
            ratios = sorted(base[0]/own[0] for base, own in zip(took["fp32"], took[name]))
            k |= dict(speed=median(ratios), speed_low=ratios[0], speed_high=ratios[-1], speed_clock=median(base[1]/own[1] for base, own in zip(took["fp32"], took[name])),
                tokens_per_cpu_second=n_new/median(c for c, _ in took[name]), tokens_per_second=n_new/median(w for _, w in took[name]))
    inputs = layer_inputs(model, torch.tensor([d for d in docs if len(d) == T+1][:4] or [docs[0]])[:,:T])
    record["loudest"] = max(((x.abs().amax()/x.square().mean().sqrt()).item(), path) for path, x in inputs.items()) # against the root mean square of its layer
    sets,rng = 2 if args.tiny else 3,np.random.default_rng(0)
    stream = np.concatenate([np.array(d) for d in as_ids(others)])
    shown = [torch.from_numpy(np.stack([stream[a:a+T] for a in rng.integers(0, len(stream)-T, 2 if args.tiny else 32)])) for _ in range(sets)]
    record["gptq"] = rounding_with_care(model, before, docs, sizes, shown, sets)
    write_json(args.out, record)
    print(f"wrote {args.out}")

if __name__ == "__main__": main()

"""How much memory a step of fine-tuning takes, measured: full, LoRA, QLoRA and prompt tuning, three sizes, three batches, with and without blocks computed again.

    python benchmarks/footprint.py                   on the CPU, minutes: resident memory, each measurement in a process of its own
    python benchmarks/footprint.py --device cuda     on the GPU, about a minute: torch.cuda.max_memory_allocated
    python benchmarks/footprint.py --sizes 2M        only some sizes

Rows that are there already are not measured again; `--out` is written after each. Weights are drawn at random, which weighs the same. It imports nothing but torch,
safetensors and this package, so that it runs where the package is not installed.
"""
import argparse
import gc
import sys
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whichever is installed

from llm_scratch.architecture import ModelConfig, n_params  # noqa: E402
from llm_scratch.core import read_json, write_json  # noqa: E402
from llm_scratch.footprint import METHODS, Tuning, made, resident_peaks, two_steps  # noqa: E402
from llm_scratch.planning import SHAPES  # noqa: E402

SIZES = {
    "tiny": ModelConfig(512, 512, n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ff=64, d_head=8),
    "2M": ModelConfig(4096, 512, n_layers=4, n_heads=3, n_kv_heads=1, d_model=192, d_ff=512, d_head=64),
    "25M": ModelConfig(16384, 512, n_layers=12, n_heads=6, n_kv_heads=2, d_model=384, d_ff=1024, d_head=64),
    "135M": ModelConfig(49152, 512, n_layers=30, n_heads=9, n_kv_heads=3, d_model=576, d_ff=1536, d_head=64), # SmolLM2's
    "7B": SHAPES["7b"], # on a GPU only
}
BATCHES = (1, 32),(4, 128),(8, 256)

def jobs(device:str, sizes:list[str])->list[dict]: # what a row is about
    "Everything that is to be measured."
    out = []
    for size in sizes:
        for again in (False, True) if size != "7B" else (True,):
            for B,T in BATCHES if size != "7B" else BATCHES[1:2]:
                for precision in ("fp32", "bf16") if device == "cuda" and size in ("135M", "7B") else ("fp32",):
                    out += [dict(device=device, size=size, method=method, checkpoint=again, batch_size=B, seq_len=T, precision=precision) for method in METHODS]
    return out

def on_gpu(cfg:ModelConfig, tuning:Tuning, B:int, T:int, precision:str)->int|None: # bytes; None: it does not fit
    "The most that tensors take in the step; what making the model takes is not counted."
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    try:
        model = made(cfg, tuning, "cuda")
        torch.cuda.reset_peak_memory_stats()
        two_steps(model, B, T, "cuda", precision)
        return torch.cuda.max_memory_allocated()-before
    except torch.cuda.OutOfMemoryError: return None

def measure(some:list[dict])->list[int|None]: # bytes of each
    "Rows of one device."
    what = [(SIZES[job["size"]], Tuning(job["method"], checkpoint=job["checkpoint"]), job["batch_size"], job["seq_len"]) for job in some]
    return [on_gpu(*w, job["precision"]) for w,job in zip(what, some)] if some[0]["device"] == "cuda" else resident_peaks(what)

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, metavar="SIZE", help=f"some of {', '.join(SIZES)}")
    parser.add_argument("--record", type=Path, default=ROOT/"nbs"/"footprint.json", metavar="FILE", help="rows that are there already")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where all rows go; the record, unless told otherwise")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available(): parser.error("there is no GPU that PyTorch can use: --device cpu runs anywhere")
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    record = read_json(args.record) if args.record.exists() else dict(sizes={}, cards={}, rows=[])
    record["sizes"] |= {name: asdict(cfg) | dict(n_params=n_params(cfg)) for name,cfg in SIZES.items() if name != "tiny"}
    record["cards"][args.device] = (torch.cuda.get_device_name() if args.device == "cuda" else "a CPU") + f", torch {torch.__version__}"
    done = [{k:v for k,v in row.items() if k != "bytes"} for row in record["rows"]]
    todo = [job for job in jobs(args.device, args.sizes or ["2M", "25M", "135M", *(["7B"] if args.device == "cuda" else [])]) if job not in done]
    for at in range(0, len(todo), len(METHODS)):
        some = todo[at:at+len(METHODS)]
        record["rows"] += [job | dict(bytes=n) for job,n in zip(some, measure(some))]
        write_json(args.out or args.record, record)
        for row in record["rows"][-len(some):]: print(*row.values(), flush=True)

if __name__ == "__main__": main()

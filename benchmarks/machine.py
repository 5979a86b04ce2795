"""How near a decoder comes to the roofline of chapter 05: one token, a batch of texts, and a training step, predicted and measured.

    python benchmarks/machine.py                        a minute on a quiet machine
    python benchmarks/machine.py --layers 1 --rounds 1

The prediction knows nothing but the two measured ceilings and the shapes of the products with weights: attention, norms and Python are the rest.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, n_params  # noqa: E402
from llm_scratch.infrastructure import Roofline, decoder_matmuls, matmul_peak, read_cpu, read_memory, stream_bytes, triad_bandwidth  # noqa: E402

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="of the decoder, 768 wide")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed, in turns with the ceilings; the best counts")
    args = parser.parse_args()
    cfg = ModelConfig(vocab_size=4096, context_len=512, n_layers=args.layers, n_heads=12, n_kv_heads=4, d_model=768, d_ff=2048, d_head=64)
    model,rows = Decoder(cfg),stream_bytes(read_cpu(), read_memory())
    def forward(texts:int, length:int)->None:
        with torch.no_grad(): model(torch.zeros(texts, length, dtype=torch.long))
    def learn()->None:
        ids = torch.zeros(4, 256, dtype=torch.long)
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    work = {"forward, 1 token":(1, 1, lambda: forward(1, 1)), "forward, 1 token of 16 texts":(16, 1, lambda: forward(16, 1)), "forward, 256 tokens":(256, 1, lambda: forward(1, 256)),
            "forward and backward, 4 x 256 tokens":(1024, 3, learn)} # positions at once, products per weight, and the call
    took,triads,peaks = {name:[] for name in work},[],[]
    for _ in range(args.rounds):
        triads.append(triad_bandwidth(rows, rounds=1)); peaks.append(matmul_peak(rounds=1))
        for name,(_,_,call) in work.items():
            call()
            start = time.perf_counter()
            call()
            took[name].append(time.perf_counter()-start)
    roof = Roofline(max(triads), max(peaks))
    print(f"{torch.get_num_threads()} threads: {roof.bytes_per_second/1e9:.1f} GB/s, {roof.flop_per_second/1e9:.0f} GFLOP/s in float32, ridge at {roof.ridge:.1f} FLOP per byte; {n_params(cfg)/1e6:.0f} million weights\n")
    print("| work | FLOP per byte | predicted, ms | measured, ms | measured / predicted |\n|---|---|---|---|---|")
    for name,(n,times,_) in work.items():
        parts = decoder_matmuls(cfg, n)
        predicted = times*sum(roof.seconds(m.flop, 4*m.numbers) for m in parts)
        print(f"| {name} | {sum(m.flop for m in parts)/sum(4*m.numbers for m in parts):.1f} | {1e3*predicted:.1f} | {1e3*min(took[name]):.1f} | {min(took[name])/predicted:.2f} |")

if __name__ == "__main__": main()

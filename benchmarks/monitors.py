"""What a row costs each monitor of chapter 05f, and how fast a log is read.

    python benchmarks/monitors.py                       a quarter of a minute
    python benchmarks/monitors.py --rows 200 --rounds 1

CPU-microseconds and elapsed microseconds per row of the calling thread's `log`, five numbers each; the median of rounds. A monitor whose package is missing is left out.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.core import UserError  # noqa: E402
from llm_scratch.monitoring import JsonLines, PrometheusExporter, TensorBoard, WandB, Monitors, read_rows  # noqa: E402

MAKERS = {"JSON lines":lambda folder: JsonLines(folder/"log.jsonl"), "JSON lines, Monitors":lambda folder: Monitors([JsonLines(folder/"log.jsonl")]), "Prometheus exporter":lambda folder: PrometheusExporter(),
          "TensorBoard":lambda folder: TensorBoard(folder/"board"), "Weights & Biases, offline":lambda folder: WandB(folder)}

def timed(make, n:int)->tuple[float, float]: # CPU and elapsed microseconds per row
    with tempfile.TemporaryDirectory() as folder:
        monitor = make(Path(folder))
        cpu,begin = time.thread_time(),time.perf_counter()
        for step in range(1, n+1): monitor.log(step, dict(loss=5/step, lr=1., grad_norm=1+1/step, n_tokens=4096, seconds=.2))
        took = (time.thread_time()-cpu)*1e6/n,(time.perf_counter()-begin)*1e6/n
        monitor.close()
    return took

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000, help="rows per round")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed")
    args = parser.parse_args()
    print(f"| {args.rows:,} rows of 5 numbers | CPU-microseconds a row | elapsed |\n|---|---|---|")
    for name,make in MAKERS.items():
        try: took = [timed(make, args.rows) for _ in range(args.rounds)]
        except UserError as e: print(f"{name} is left out: {e}", file=sys.stderr); continue
        print(f"| {name} | {median(c for c,_ in took):.1f} | {median(e for _,e in took):.1f} |")
    with tempfile.TemporaryDirectory() as folder:
        log = JsonLines(path := Path(folder)/"log.jsonl")
        for step in range(1, args.rows+1): log.log(step, dict(loss=5/step, lr=1., grad_norm=1+1/step, n_tokens=4096, seconds=.2))
        log.close()
        rates = []
        for _ in range(args.rounds):
            begin = time.perf_counter()
            if len(read_rows(path)) != args.rows: raise AssertionError("rows are missing")
            rates.append(args.rows/(time.perf_counter()-begin))
        print(f"\nread_rows: {median(rates):,.0f} rows a second, {path.stat().st_size/args.rows:.0f} bytes a row")

if __name__ == "__main__": main()

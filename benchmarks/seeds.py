"""Several runs of one preset with different seeds, as one record and one table.

    for s in 0 1 2; do llm-scratch run --preset cpu --seed $s --run runs/cpu-$s; done
    python benchmarks/seeds.py runs/cpu-0 runs/cpu-1 runs/cpu-2

Writes nbs/results.json, which chapter 12 and the readme quote, and prints the mean and the spread of every figure.
"""
import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.pipeline import Run, open_run, read_log, read_results  # noqa: E402

def record(run:Run, every:int=10)->dict:
    "What is worth keeping of a run: its figures, and its training loss as means of `every` updates."
    losses = [row["loss"] for row in read_log(run)]
    return dict(seed=run.seed, seconds=round(sum(row["seconds"] for row in read_log(run))), results=read_results(run),
                loss=[round(mean(losses[i:i+every]), 4) for i in range(0, len(losses), every)])

def table(records:list[dict])->str:
    "Mean and standard deviation over seeds of every figure, as Markdown."
    rows = ["| figure | mean | spread | seeds |", "|---|---|---|---|"]
    for name in [row["name"] for row in records[0]["results"]]:
        values = [row["mean"] for r in records for row in r["results"] if row["name"] == name]
        rows.append(f"| {name} | {mean(values):.3f} | {stdev(values):.3f} | {', '.join(f'{v:.3f}' for v in values)} |")
    return "\n".join(rows)

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="two or more finished run directories")
    runs = [open_run(path) for path in parser.parse_args().runs]
    if len(runs) < 2 or len({r.preset for r in runs}) > 1 or len({r.seed for r in runs}) < len(runs): parser.error("give at least two runs of one preset, each with a seed of its own")
    records = [record(run) for run in sorted(runs, key=lambda r: r.seed)]
    write_json(ROOT/"nbs"/"results.json", {runs[0].preset.name: records})
    print(table(records))

if __name__ == "__main__": main()

"""Three turns of the loop of chapter 11 on the book's own model, for several seeds; and, from the same start, a candidate that is spoilt, once before the gate and once before the canary.

    python benchmarks/improvement.py --run runs/cpu                about half an hour of one quiet core; goes on where it was broken off
    python benchmarks/improvement.py --tiny --out FILE             the same on letters and the weather, for a test

Chapter 11 reads the record nbs/improvement.json. The folder of --work keeps all turns, each with its page turn.html.
"""
import argparse
import shutil
import sys
import tempfile
from copy import deepcopy
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
import torch  # noqa: E402

from llm_scratch.core import read_json, write_json  # noqa: E402
from llm_scratch.improvement import TOY_PLAN, TurnPlan, book_users, improve, next_turn, read_turn, toy_home  # noqa: E402
from llm_scratch.promotion import GateRule  # noqa: E402

NEEDED = "run.json", "documents", "tokenizer", "tokens", "model"

def spoilt(work, model, batches, times:float=1.):
    "A model whose training went wrong: noise on every weight, so many times as large as the weights."
    bad, rng = deepcopy(model), torch.Generator().manual_seed(work.seed)
    with torch.no_grad():
        for p in bad.parameters(): p.add_(times*p.std()*torch.randn(p.shape, generator=rng))
    return bad

def begin(folder:Path, run:Path|None, seed:int)->tuple:
    "A copy of the run, its users, the library and the plan."
    if run is None: return (folder, *toy_home(folder, seed=seed), TOY_PLAN)
    if not folder.exists():
        new = folder.with_name(f".{folder.name}")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for name in NEEDED: (shutil.copytree if (run/name).is_dir() else shutil.copy)(run/name, new/name)
        new.rename(folder)
    return (folder, *book_users(folder, seed=seed), TurnPlan())

def row_of(home:Path, number:int)->dict:
    "What the chapter shows of a turn."
    turn, part = read_turn(home, number), lambda name: read_json(home/"improve"/"turns"/f"{number:03d}"/f"{name}.json")
    collect, new, canary, gate = part("collect"), part("refresh"), part("canary"), part("gate")
    asked = next((r for r in gate["rows"] if r["name"] == "questions right" and r["gain"]), None)
    return dict(promoted=turn.promoted, version=turn.version, reasons=turn.reasons, before=turn.before, after=turn.after, candidate=turn.candidate, n=collect["n"], good=collect["good"], bad=collect["bad"],
                drift=[r["name"] for r in part("drift")["rows"] if r["alarm"]], patterns=[dict(name=p["name"], impact=p["impact"]) for p in part("patterns")["patterns"]], n_docs=new["n_docs"], sources=new.get("sources", {}), n_tokens=new.get("n_tokens", 0),
                gate=gate["promote"], questions=asked and dict(gain=asked["gain"][:3], holds=asked["holds"], n=asked["n"]), canary=dict(state=canary["state"], why=canary["why"]), times=part("times"))

SPOILT = {"spoilt before the gate":dict(teach=spoilt), "spoilt before the canary":dict(teach=partial(spoilt, times=3.), rules=[GateRule("seconds per answer", margin=2., relative=True)])} # the second one's gate looks at speed alone, so that the canary has to find out

def go(home:Path, users, library:list, plan, hows:list[dict])->list[dict]:
    "One turn for each way to do it."
    for number, how in enumerate(hows):
        if next_turn(home) == number: improve(home, users=users, library=library, plan=plan, **how)
        row = row_of(home, number)
        print(f"{home.name}, turn {number}: {'promoted' if row['promoted'] else 'not promoted'}, canary {row['canary']['state']}, {row['before']['all']['mean']:.2f} to {row['after']['all']['mean']:.2f}, {row['sources']}", flush=True)
    return [row_of(home, n) for n in range(len(hows))]

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT/"runs"/"cpu", help="a finished run on recipes")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="where the turns are kept; none: nowhere")
    parser.add_argument("--tiny", action="store_true", help="letters and weather, one turn, one seed, for a test")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"improvement.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = dict(subject="tiny" if args.tiny else args.run.name, threads=1, seeds=[], runs=[], spoilt=[])
    with tempfile.TemporaryDirectory() as tmp:
        for seed in args.seeds[:1] if args.tiny else args.seeds:
            start = lambda name: begin((args.work or Path(tmp))/f"{name} {seed}", None if args.tiny else args.run, seed)
            record["runs"].append(go(*start("seed"), [{}]*(1 if args.tiny else 3)))
            record["spoilt"].append([go(*start(name), [how])[0] for name, how in SPOILT.items()])
            record["seeds"].append(seed)
            write_json(args.out, record)

if __name__ == "__main__": main()

"""Is it biased? The audit of chapter 09a on real models: log-odds and tone by person, CrowS-Pairs by category, StereoSet, BBQ.

    python benchmarks/bias.py --run NAME=RUN [NAME=RUN ...]     RUN is a folder of `llm-scratch run`, an imported run, or a model's folder with a chat template
    python benchmarks/bias.py --run NAME=RUN --tiny             a few items only, for a test
    python benchmarks/bias.py --run NAME=RUN --out FILE         elsewhere than nbs/bias.json

Half a minute for the book's assistant, five minutes of one core for SmolLM2-135M. What stands in the record is not asked again, part by part. No text of any set is written down.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.assistant import open_assistant  # noqa: E402
from llm_scratch.bias import ATTRIBUTES, SCENES, STORIES, audit_bias, load_bias_set, stereotype_shares  # noqa: E402
from llm_scratch.core import UserError, write_json  # noqa: E402
from llm_scratch.safety import assistant_subject  # noqa: E402

SLOW = 5e7 # weights, above which fewer items are asked
SIZES = {"CrowS-Pairs": (None, 500, 12), "StereoSet": (600, 120, 6), "BBQ": (300, 60, 4)} # of a small model, of a large one, of a test; None is all

def parts(slow:bool, tiny:bool)->dict[str, dict]:
    "What is asked, one part after the other, as arguments of `audit_bias`."
    n = {name: some[2 if tiny else slow] for name, some in SIZES.items()}
    only = {name.lower(): dict(attributes=(), n_of={name: n[name]}) for name in SIZES}
    tone = dict(scenes=(), n_of={}, attributes=ATTRIBUTES[:2] if slow or tiny else ATTRIBUTES, stories=STORIES[:2] if tiny else STORIES, max_new_tokens=4 if tiny else 16)
    return dict(bias=dict(stories=(), n_of={}, **(dict(scenes=SCENES[:2], attributes=ATTRIBUTES[:1]) if tiny else {})), **only, tone=tone)

def open_subject(named:str, batch_size:int=32):
    "The tuned model of a run, or the model itself, under the name given before the equals sign."
    name, found, path = named.partition("=")
    run = Path(path if found else named)
    folder = next((f for f in (run/"tuned"/"chat", run/"model", run) if (f/"config.json").is_file()), None)
    if folder is None: raise UserError(f"{run} has no model: give the folder of a run, or of a model with a chat template")
    return assistant_subject(open_assistant(folder), name if found else run.name, batch_size)

def whole_sentence(subject, pulls:dict, n:int|None, seed:int)->dict:
    "The same pairs by the likelihood of the whole sentence, in which the word's own frequency has a say."
    docs = load_bias_set("CrowS-Pairs", n, seed)
    starts = np.asarray(subject.nats([("", s) for d in docs for s in d["choices"]])).reshape(-1, 2)
    share = stereotype_shares(starts[:, 1]-starts[:, 0] + [pulls[d["id"]] for d in docs], ["all"]*len(docs))[0].share
    return dict(name="crows-pairs, all, whole sentence", mean=round(share.mean, 4), stderr=round(share.stderr, 4), n=share.n)

def measured(subject, part:str, how:dict, seed:int)->tuple[list, list, dict]: # rows, notes, p by row
    "One part, as the record keeps it."
    section = audit_bias(subject, seed=seed, **how)
    rows = [dict(name=r["name"], mean=round(r["mean"], 4), stderr=round(r["stderr"], 4), n=r["n"]) for r in section.rows]
    pulls = {i["id"]: i["outcome"] for i in section.items if i["set"] == "crows-pairs"}
    if pulls and subject.about["n_parameters"] <= SLOW: rows.append(whole_sentence(subject, pulls, how["n_of"]["CrowS-Pairs"], seed))
    return rows, section.notes, {i["category"]: i["outcome"] for i in section.items if i["set"] == "tests"}

def main()->None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--run", metavar="NAME=RUN", nargs="+", required=True)
    ap.add_argument("--out", type=Path, default=ROOT/"nbs"/"bias.json")
    ap.add_argument("--tiny", action="store_true")
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(args.out.read_text(encoding="utf-8"))["subjects"] if args.out.is_file() else []
    for run in args.run:
        subject = open_subject(run)
        todo = parts(subject.about["n_parameters"] > SLOW, args.tiny)
        mine = next((s for s in kept if (s["name"], s["seed"]) == (subject.name, args.seed)), None)
        if mine is None: kept.append(mine := dict(name=subject.name, n_parameters=subject.about["n_parameters"], seed=args.seed, done=[], rows=[], notes=[], p={}))
        for part, how in todo.items():
            if part in mine["done"]:
                print(f"{subject.name}, {part}: in the record already")
                continue
            rows, notes, ps = measured(subject, part, how, args.seed)
            mine["rows"] += rows
            mine["notes"] = list(dict.fromkeys([*mine["notes"], *notes]))
            mine["p"] |= ps
            mine["done"].append(part)
            write_json(args.out, dict(format="llm_scratch bias", subjects=kept))
            print(f"{subject.name}, {part}: {len(rows)} rows", *notes, sep="\n  ", flush=True)

if __name__ == "__main__":
    try: main()
    except UserError as e: sys.exit(str(e))

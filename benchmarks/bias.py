"""Is it biased? The audit of chapter 09a on real models: log-odds and tone by person, CrowS-Pairs by category, StereoSet, BBQ.

    python benchmarks/bias.py --run RUN [RUN ...]      RUN is a folder of `llm-scratch run`, an imported run, or a model's folder with a chat template
    python benchmarks/bias.py --run RUN --tiny         a few items only, for a test
    python benchmarks/bias.py --run RUN --out FILE     elsewhere than nbs/bias.json

Seconds for the book's assistant, about ten minutes of one core for SmolLM2-135M. A subject that stands in the record with the same sizes is not asked again. No text of any set is written down.
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
from llm_scratch.bias import STORIES, audit_bias, load_bias_set, stereotype_shares  # noqa: E402
from llm_scratch.core import UserError, write_json  # noqa: E402
from llm_scratch.safety import assistant_subject  # noqa: E402

SIZES = {"CrowS-Pairs": None, "StereoSet": 600, "BBQ": 300}
SLOW = {"CrowS-Pairs": None, "StereoSet": 300, "BBQ": 120} # above 50 million weights
TINY = {"CrowS-Pairs": 12, "StereoSet": 6, "BBQ": 4}

def open_subject(run:Path, batch_size:int=32):
    "The tuned model of a run, or the model itself."
    folder = next((f for f in (run/"tuned"/"chat", run/"model", run) if (f/"config.json").is_file()), None)
    if folder is None: raise UserError(f"{run} has no model: give the folder of a run, or of a model with a chat template")
    config = json.loads((folder/"config.json").read_text(encoding="utf-8"))
    name = "SmolLM2-135M" if config.get("hidden_size") == 576 and config.get("num_hidden_layers") == 30 else "the book's assistant" if (run/"tuned"/"chat").is_dir() else run.name
    return assistant_subject(open_assistant(folder), name, batch_size)

def whole_sentence(subject, rows:dict, pulls:dict, n:int|None, seed:int)->dict:
    "The same pairs by the likelihood of the whole sentence, which the word's own frequency has a say in."
    docs = load_bias_set("CrowS-Pairs", n, seed)
    starts = np.asarray(subject.nats([("", s) for d in docs for s in d["choices"]])).reshape(-1, 2)
    share = stereotype_shares(starts[:, 1]-starts[:, 0] + [pulls[d["id"]] for d in docs], ["all"]*len(docs))[0].share
    return dict(name="crows-pairs, all, whole sentence", mean=round(share.mean, 4), stderr=round(share.stderr, 4), n=share.n)

def measured(subject, sizes:dict, tiny:bool, seed:int)->dict:
    "One subject, as the record keeps it."
    slow = subject.about["n_parameters"] > 5e7
    section = audit_bias(subject, n_of=sizes, stories=STORIES[:2] if tiny else STORIES[:4] if slow else STORIES, max_new_tokens=4 if tiny else 16, seed=seed)
    rows = [dict(name=r["name"], mean=round(r["mean"], 4), stderr=round(r["stderr"], 4), n=r["n"]) for r in section.rows]
    pulls = {i["id"]: i["outcome"] for i in section.items if i["set"] == "crows-pairs"}
    rows.append(whole_sentence(subject, rows, pulls, sizes["CrowS-Pairs"], seed))
    return dict(name=subject.name, n_parameters=subject.about["n_parameters"], sizes=sizes, seed=seed, rows=rows, notes=section.notes, p={i["category"]: i["outcome"] for i in section.items if i["set"] == "tests"})

def main()->None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--run", type=Path, nargs="+", required=True)
    ap.add_argument("--out", type=Path, default=ROOT/"nbs"/"bias.json")
    ap.add_argument("--tiny", action="store_true")
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(args.out.read_text(encoding="utf-8"))["subjects"] if args.out.is_file() else []
    for run in args.run:
        subject = open_subject(run)
        sizes = TINY if args.tiny else SLOW if subject.about["n_parameters"] > 5e7 else SIZES
        if any((s["name"], s["sizes"], s["seed"]) == (subject.name, sizes, args.seed) for s in kept):
            print(f"{subject.name}: in the record already")
            continue
        found = measured(subject, sizes, args.tiny, args.seed)
        kept = [*(s for s in kept if s["name"] != subject.name), found]
        write_json(args.out, dict(format="llm_scratch bias", subjects=kept))
        print(f"{subject.name}: {len(found['rows'])} rows", *found["notes"], sep="\n  ")

if __name__ == "__main__":
    try: main()
    except UserError as e: sys.exit(str(e))

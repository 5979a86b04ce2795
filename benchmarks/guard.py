"""What the guard of chapter 09d stops and whom it refuses, on whole sets, for several draws of what it learns from; and what a look costs.

    python benchmarks/guard.py                        two minutes of one core; fetches four packages once
    python benchmarks/guard.py --run FOLDER           audits also the guard of a folder that make_guard wrote, or that lies in a run
    python benchmarks/guard.py --tiny --out FILE      the same in seconds, on few prompts, for a test

Chapter 09d reads the record nbs/guard.json. It holds counts and rates; of prompts only the first twelve digits of their sha256 in a list of what passed.
"""
import argparse
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.evaluation import share_of  # noqa: E402
from llm_scratch.guard import audit_guard, by_sentence, guard_answers, guard_prompts, in_clear, load_policy, make_guard, pick_threshold, readings, train_text_model  # noqa: E402
from llm_scratch.safety import plain_questions  # noqa: E402

FORMS = "PIQA", "BoolQ", "FiQA", "small talk"
DESIGNS = {"two templates":("recipe questions", "encyclopaedia questions"), "many forms":(*FORMS, "recipe questions", "encyclopaedia questions"), "and twins":(*FORMS, "recipe questions", "encyclopaedia questions", "twins")}

def design(prompts:dict, forms:tuple, tiny:bool)->dict:
    "One classifier with all readings on: the threshold of the validation set, and shares by form of the test set."
    known = [p for p in prompts["train"] if p.harmful or p.form in forms]
    model = train_text_model([p.text for p in known], [p.harmful for p in known])
    score = lambda t: max(map(model, readings(t, (in_clear, by_sentence))))
    shown = {split:some[::40] if tiny else some for split, some in prompts.items()}
    scores = {}
    for p in shown["validation"] + shown["test"]: scores.setdefault((p.form, p.harmful), []).append(score(p.text))
    at = pick_threshold({form:s for (form, harmful), s in scores.items() if not harmful and form in {p.form for p in shown["validation"]}})
    return dict(at=at, **{form:asdict(share_of(sum(x > at for x in s), len(s))) for (form, _), s in scores.items()})

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, action="append", default=[], help="a folder with policy.json, or one with a folder guard in it")
    parser.add_argument("--seeds", type=int, default=5, help="draws of what is learned from")
    parser.add_argument("--tiny", action="store_true", help="few prompts, for a test")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"guard.json")
    args = parser.parse_args()
    record = dict(seeds=list(range(1 if args.tiny else args.seeds)), designs={name:[] for name in DESIGNS}, guards={})
    for seed in record["seeds"]:
        prompts = guard_prompts(seed)
        for name, forms in DESIGNS.items(): record["designs"][name].append(design(prompts, forms, args.tiny))
        print(f"seed {seed}: {({name:round(d[-1]['HarmBench']['mean'], 3) for name, d in record['designs'].items()})}", flush=True)
    prompts, answers = guard_prompts(0)["test"], guard_answers(0)["test"]
    record["harmful_n"] = dict(Counter(p.form for p in prompts if p.harmful))
    with tempfile.TemporaryDirectory() as tmp:
        guards = {"ready-made, block":make_guard(tmp)} | {folder.resolve().name:load_policy(folder/"guard" if (folder/"guard").is_dir() else folder) for folder in args.run}
        for name, guard in guards.items():
            section = audit_guard(guard, prompts[::40] if args.tiny else prompts, answers[::40] if args.tiny else answers, most=60 if args.tiny else 500)
            plain = [q.text for q in plain_questions()]
            start = time.process_time()
            refused = sum(guard.check_input(t).stopped for t in plain)
            ms = (time.process_time()-start)/len(plain)*1e3
            start = time.process_time()
            some = [p.text for p in answers if p.form == "recipes"][:60]
            for t in some: guard.check_output(t)
            record["guards"][name] = dict(rows=[{k:r[k] for k in ("name", "mean", "stderr", "n")} for r in section.rows], plain_refused=asdict(share_of(refused, len(plain))), ms_prompt=round(ms, 2), ms_answer=round((time.process_time()-start)/len(some)*1e3, 2),
                passes=dict(Counter(p for item in section.items for p in item["passes"])), passes_in_clear=[item["id"] for item in section.items if not item["stopped"]])
            print(f"{name}: {len(section.rows)} rows, {ms:.2f} ms a prompt", flush=True)
    write_json(args.out, record)
    print(f"wrote {args.out}")

if __name__ == "__main__": main()

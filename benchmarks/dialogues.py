"""Do assistants hold beyond twenty turns? What was told in turn 1 asked again, what else should last, four policies for a small window, and what is said twice.

    llm-scratch run                                                        once: the model, in runs/cpu
    python benchmarks/dialogues.py --run "the book's assistant=runs/cpu"   about two minutes on one quiet core
    python benchmarks/dialogues.py --run "SmolLM2-135M-Instruct=FOLDER" --n 12 --n-live 3 --live-turns 20 --window 256 --max-new-tokens 16 --n-weighed 8 --weigh-turns 2 20 --parts "at once" "language kept" "rule kept" weighed live
                                                                           FOLDER as of import-hf, about seven minutes of one quiet core
Writes nbs/dialogues.json, which chapter 09e reads; parts that are there already are not asked again (`--fresh` asks all). RUN is a run directory with tuned/chat, or any folder that `open_assistant` opens.
Each figure is [share, standard error, dialogues]. What a subject can't do at once is not asked later: it has nothing to lose. Parts: `at once`; each aspect at turn 40 (facts at 5, 10, 20 as well) within the
model's whole context; `weighed`, facts by the probability of four values; `live`, what is said twice, within `--window` tokens; `window`, `pinned`, `summary`: facts weighed at turn 40 within as many.
"""
import os

if __name__ == "__main__": os.environ.setdefault("OMP_NUM_THREADS", "1") # before torch starts its threads

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.assistant import open_assistant  # noqa: E402
from llm_scratch.core import UserError, read_json, write_json  # noqa: E402
from llm_scratch.dialogues import ABLE, POLICIES, SCRIPTS, audit_dialogues, by_turn, fact_scripts, fading, weigh_values  # noqa: E402
from llm_scratch.safety import Section, Subject, assistant_subject  # noqa: E402

def opened(named:str)->Subject: # NAME=FOLDER
    name,_,folder = named.partition("=")
    if not folder: raise UserError(f"--run {named}: give NAME=FOLDER, such as \"mine=runs/cpu\"")
    chat = Path(folder)/"tuned"/"chat"
    return assistant_subject(open_assistant(chat if chat.is_dir() else folder), name)

def kept(section:Section)->dict: # what the record holds of it
    return dict(rows={r["name"]:[round(r["mean"], 4), round(r["stderr"], 4), r["n"]] for r in section.rows}, notes=section.notes)

def weighed(subject:Subject, policy:str, most:int, turns:list[int], n:int, seed:int)->dict: # `rows` as the audit's
    "Facts by the probability of four values, behind a policy."
    scripts = fact_scripts(n, n_turns=max(turns), seed=seed)
    marks = weigh_values(subject, scripts, turns, partial(POLICIES[policy], size=subject.length, most=most))
    return dict(rows={f"facts weighed, turn {t}":[round(r.mean, 4), round(r.stderr, 4), r.n] for t,r in by_turn(marks).items()}, p=fading(marks))

def can_do(at_once:dict)->list[str]: # aspects in which enough is right at once to be asked later
    return [a for a in SCRIPTS if at_once["rows"].get(f"{a}, at once", [0])[0] >= (.51 if a == "not contradicted" else ABLE)]

def measure(subject:Subject, part:str, record:dict, args:argparse.Namespace)->dict|None: # None: nothing to ask
    "One part of the record."
    whole,small = subject.context-args.max_new_tokens,args.window-args.max_new_tokens
    audit = partial(audit_dialogues, replace(subject, nats=None), n=args.n, n_live=0, max_new_tokens=args.max_new_tokens, seed=args.seed)
    if part == "at once": return kept(audit(turns=()))
    if part == "live": return kept(audit_dialogues(subject, partial(POLICIES["window"], size=subject.length, most=small), aspects=(), n_live=args.n_live, turns=(args.live_turns,), max_new_tokens=args.max_new_tokens, seed=args.seed))
    if part == "weighed": return weighed(subject, "window", whole, args.weigh_turns, args.n_weighed, args.seed)
    if part in POLICIES: return weighed(subject, part, small, [2, 40], args.n_weighed, args.seed)
    return kept(audit(aspects=[part], turns=(5, 10, 20, 40) if part == "facts recalled" else (40,))) if part in can_do(record["at once"]) else None

PARTS = "at once",*SCRIPTS,"weighed","live","window","pinned","summary"

def main(argv:list[str]|None=None)->None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER", help="whom to ask; may be given several times")
    p.add_argument("--out", type=Path, default=ROOT/"nbs"/"dialogues.json")
    p.add_argument("--n", type=int, default=24, help="dialogues of each aspect")
    p.add_argument("--n-live", type=int, default=6)
    p.add_argument("--live-turns", type=int, default=40)
    p.add_argument("--window", type=int, default=384, help="tokens of an artificially small window")
    p.add_argument("--max-new-tokens", type=int, default=20)
    p.add_argument("--n-weighed", type=int, default=48, help="dialogues in which four values are weighed")
    p.add_argument("--weigh-turns", type=int, nargs="+", default=[2, 5, 10, 20, 40])
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which to ask")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--fresh", action="store_true", help="ask again what the record holds")
    args = p.parse_args(argv)
    record = read_json(args.out) if args.out.exists() else {}
    for named in args.run:
        subject = opened(named)
        how = dict(n=args.n, n_live=args.n_live, live_turns=args.live_turns, window=args.window, max_new_tokens=args.max_new_tokens, n_weighed=args.n_weighed, seed=args.seed)
        mine = record.get(subject.name, {})
        if args.fresh or mine.get("how") != how: mine = dict(n_parameters=subject.about["n_parameters"], context=subject.context, how=how)
        record[subject.name] = mine
        for part in args.parts:
            if part in mine: continue
            mine[part] = measure(subject, part, mine, args)
            write_json(args.out, record)
            print(subject.name, part, flush=True)

if __name__ == "__main__":
    try: main()
    except UserError as e: sys.exit(f"dialogues: {e}")

"""Do assistants hold beyond twenty turns? What was told in turn 1 asked again, what else should last, four policies for a small window, and what is said twice.

    llm-scratch run                                                        once: the model, in runs/cpu
    python benchmarks/dialogues.py --run "the book's assistant=runs/cpu"   about two minutes on one quiet core
    python benchmarks/dialogues.py --run "SmolLM2-135M-Instruct=FOLDER" --n 12 --n-live 4 --live-turns 20     about ten minutes; FOLDER as of import-hf

Writes nbs/dialogues.json, which chapter 09e reads; parts that are there already are not asked again (`--fresh` asks all). RUN is a run directory with tuned/chat, or any folder that `open_assistant` opens.
Each figure is [share, standard error, dialogues]. What a subject can't do at once (fewer than one in four) is not asked later: it has nothing to lose. Parts: `at once`; `late`, all aspects at turn 40 and
facts at 5, 10, 20 as well, within the model's whole context; `window`, `pinned`, `summary`, `refusal`: facts at turn 40 within `--window` tokens; `live`: what is said twice, within as many tokens.
"""
import os

if __name__ == "__main__": os.environ.setdefault("OMP_NUM_THREADS", "1") # before torch starts its threads

import argparse
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.assistant import open_assistant  # noqa: E402
from llm_scratch.core import UserError, read_json, write_json  # noqa: E402
from llm_scratch.dialogues import POLICIES, SCRIPTS, audit_dialogues  # noqa: E402
from llm_scratch.safety import Section, Subject, assistant_subject  # noqa: E402

def opened(named:str)->Subject: # NAME=FOLDER
    name,_,folder = named.partition("=")
    if not folder: raise UserError(f"--run {named}: give NAME=FOLDER, such as \"mine=runs/cpu\"")
    chat = Path(folder)/"tuned"/"chat"
    return assistant_subject(open_assistant(chat if chat.is_dir() else folder), name)

def kept(section:Section)->dict: # what the record holds of it
    return dict(rows={r["name"]:[round(r["mean"], 4), round(r["stderr"], 4), r["n"]] for r in section.rows}, notes=section.notes)

def can_do(at_once:dict)->list[str]: # aspects in which at least one in four is right at once
    return [a for a in SCRIPTS if at_once["rows"].get(f"{a}, at once", [0])[0] >= .25]

def measure(subject:Subject, part:str, record:dict, args:argparse.Namespace)->dict|None: # None: nothing to ask
    "One part of the record."
    small = dict(size=subject.length, most=args.window-args.max_new_tokens)
    audit = partial(audit_dialogues, subject, n=args.n, n_live=0, max_new_tokens=args.max_new_tokens, seed=args.seed)
    if part == "at once": return kept(audit(turns=()))
    if part == "live": return kept(audit_dialogues(subject, partial(POLICIES["window"], **small), aspects=(), n_live=args.n_live, turns=(args.live_turns,), max_new_tokens=args.max_new_tokens, seed=args.seed))
    if not (able := can_do(record["at once"])): return None
    if part in SCRIPTS: return kept(audit(aspects=[part], turns=(5, 10, 20, 40) if part == "facts recalled" else (40,))) if part in able else None
    return kept(audit(partial(POLICIES[part], **small), aspects=["facts recalled"], turns=(40,))) if "facts recalled" in able else None

def main(argv:list[str]|None=None)->None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER", help="whom to ask; may be given several times")
    p.add_argument("--out", type=Path, default=ROOT/"nbs"/"dialogues.json")
    p.add_argument("--n", type=int, default=24, help="dialogues of each aspect")
    p.add_argument("--n-live", type=int, default=6)
    p.add_argument("--live-turns", type=int, default=40)
    p.add_argument("--window", type=int, default=384, help="tokens of an artificially small window")
    p.add_argument("--max-new-tokens", type=int, default=20)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--fresh", action="store_true", help="ask again what the record holds")
    args = p.parse_args(argv)
    record = read_json(args.out) if args.out.exists() else {}
    for named in args.run:
        subject = opened(named)
        how = dict(n=args.n, n_live=args.n_live, live_turns=args.live_turns, window=args.window, max_new_tokens=args.max_new_tokens, seed=args.seed)
        mine = record.get(subject.name, {})
        if args.fresh or mine.get("how") != how: mine = dict(n_parameters=subject.about["n_parameters"], context=subject.context, how=how)
        record[subject.name] = mine
        for part in ("at once", *SCRIPTS, *POLICIES, "live"):
            if part in mine: continue
            mine[part] = measure(subject, part, mine, args)
            write_json(args.out, record)
            print(subject.name, part, flush=True)

if __name__ == "__main__":
    try: main()
    except UserError as e: sys.exit(f"dialogues: {e}")

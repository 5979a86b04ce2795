"""How often models follow orders that stand in documents, under four framings, and what a detector stops.

    python benchmarks/injection.py --run NAME=FOLDER --run NAME=FOLDER      folders that open_assistant opens, or runs with a tuned/chat in them
    python benchmarks/injection.py --run NAME=FOLDER --n 4 --out FILE       fewer documents, for a test

Chapter 09g reads the record nbs/injection.json. It grows by two documents at a time, so that a run that is stopped leaves a record of those it had; a subject that has enough is not asked again.
A model of 135 million weights takes about six minutes of one core for 24 documents.
"""
import argparse
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.assistant import open_assistant  # noqa: E402
from llm_scratch.core import read_json, write_json  # noqa: E402
from llm_scratch.injection import audit_injection  # noqa: E402
from llm_scratch.safety import assistant_subject  # noqa: E402

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER", help="a subject")
    parser.add_argument("--n", type=int, default=24, help="documents")
    parser.add_argument("--new", type=int, default=24, help="most tokens of an answer")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"injection.json")
    args = parser.parse_args()
    record = read_json(args.out) if args.out.exists() else {}
    if record.get("max_new_tokens") != args.new: record = dict(max_new_tokens=args.new, seed=0, subjects={})
    for name, _, folder in (r.partition("=") for r in args.run):
        done = record["subjects"].get(name, {}).get("n", 0)
        if done >= args.n: continue
        folder = Path(folder)
        subject, answers = assistant_subject(open_assistant(folder/"tuned"/"chat" if (folder/"tuned"/"chat").is_dir() else folder), name), {}
        def ask(dialogues:list, max_new_tokens:int)->list[str]: # each once
            new = [d for d in dialogues if str(d) not in answers]
            answers.update({str(d):a for d, a in zip(new, subject.ask(new, max_new_tokens))} if new else {})
            return [answers[str(d)] for d in dialogues]
        for n in [*range(2, args.n, 2), args.n]: # two documents more, so that a run that is stopped has a record of those it had
            start = time.process_time()
            section = audit_injection(replace(subject, ask=ask), n=n, max_new_tokens=args.new)
            if n < done: continue
            tally = Counter((i["payload"], i["framing"], i["obeyed"], i["answered"], i["detected"]) for i in section.items)
            record["subjects"][name] = dict(n=n, n_parameters=subject.about["n_parameters"], rows=[{k:r[k] for k in ("name", "mean", "stderr", "n")} for r in section.rows], notes=section.notes,
                items=[dict(payload=p, framing=f, obeyed=o, answered=a, detected=d, n=k) for (p, f, o, a, d), k in sorted(tally.items())])
            write_json(args.out, record)
            print(f"{name}, {n} documents: {time.process_time()-start:.0f} s;", *(f"{r['name']} {r['mean']:.2f}" for r in section.rows), sep="\n  ", flush=True)

if __name__ == "__main__": main()

"""How often models follow orders that stand in documents, under four framings, and what a detector stops.

    python benchmarks/injection.py --run NAME=FOLDER --run NAME=FOLDER      folders that open_assistant opens, or runs with a tuned/chat in them
    python benchmarks/injection.py --run NAME=FOLDER --n 4 --out FILE       fewer documents, for a test

Chapter 09g reads the record nbs/injection.json. A subject that the record has with these settings is not asked again, so a run that broke off goes on where it was.
A model of 135 million weights takes about six minutes of one core for 24 documents.
"""
import argparse
import sys
import time
from collections import Counter
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
    parser.add_argument("--seed", type=int, default=0, help="of documents and words")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"injection.json")
    args = parser.parse_args()
    settings = dict(n=args.n, max_new_tokens=args.new, seed=args.seed)
    record = read_json(args.out) if args.out.exists() else {}
    if record.get("settings") != settings: record = dict(settings=settings, subjects={})
    for name, _, folder in (r.partition("=") for r in args.run):
        if name in record["subjects"]: continue
        folder = Path(folder)
        subject, start = assistant_subject(open_assistant(folder/"tuned"/"chat" if (folder/"tuned"/"chat").is_dir() else folder), name), time.process_time()
        section = audit_injection(subject, **settings)
        tally = Counter((i["payload"], i["framing"], i["obeyed"], i["answered"], i["detected"]) for i in section.items)
        record["subjects"][name] = dict(n_parameters=subject.about["n_parameters"], rows=[{k:r[k] for k in ("name", "mean", "stderr", "n")} for r in section.rows], notes=section.notes,
            items=[dict(payload=p, framing=f, obeyed=o, answered=a, detected=d, n=n) for (p, f, o, a, d), n in sorted(tally.items())])
        write_json(args.out, record)
        print(f"{name}: {time.process_time()-start:.0f} s;", *(f"{r['name']} {r['mean']:.2f}" for r in section.rows), sep="\n  ", flush=True)

if __name__ == "__main__": main()

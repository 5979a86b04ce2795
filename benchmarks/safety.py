"""Can it answer, and does it decline? The 60 plain questions of chapter 09 and some that a model should not answer, asked of any number of subjects.

    python benchmarks/safety.py --run "the book's assistant=runs/mine" --run SmolLM2=FOLDER
    python benchmarks/safety.py --url shop=http://127.0.0.1:8000 --n 2

RUN is a folder of `llm-scratch run` or `import-hf`, or a model's own; a model without a chat template is asked to continue the text. Chapter 09 reads the record nbs/safety.json.
What a subject says to a question that it should not answer is not kept: only how often it declined, by area. Subjects that the record has already are not asked again, unless --again is given.
"""
import argparse
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.alignment import forbidden_questions  # noqa: E402
from llm_scratch.assistant import open_assistant, read_template  # noqa: E402
from llm_scratch.core import read_json, write_json  # noqa: E402
from llm_scratch.interchange import load_hf, load_special_ids  # noqa: E402
from llm_scratch.safety import Subject, assistant_subject, competence, endpoint_subject, model_subject, refused, vacuous  # noqa: E402
from llm_scratch.tokenization import HubTokenizer  # noqa: E402


def open_subject(name:str, run:Path)->Subject:
    "The latest stage of a run that there is."
    folder = next((f for f in (run/"tuned"/"chat", run/"model") if f.is_dir()), run)
    if read_template(folder): return assistant_subject(open_assistant(folder), name)
    ids = load_special_ids(folder)
    return model_subject(load_hf(folder), HubTokenizer(folder, ids["eos_token_id"], ids.get("bos_token_id")), name)

def measure(subject:Subject, n:int, max_new_tokens:int, seed:int)->dict: # JSON
    "Competence, the first words to yes-or-no questions, and refusals by area."
    heard,areas = [],{}
    def ask(dialogues:list, n_new:int)->list[str]:
        heard.extend(subject.ask(dialogues, n_new))
        return heard
    section = competence(replace(subject, ask=ask), max_new_tokens)
    yes_or_no = Counter(next(iter(re.findall(r"[a-z]+", a.casefold())), "") for a,item in zip(heard, section.items) if item["kind"] == "yes or no")
    for area,questions in forbidden_questions().items():
        said = subject.ask([[dict(role="user", content=q)] for q in random.Random(seed).sample(questions, n)], max_new_tokens)
        areas[area] = dict(refused=sum(map(refused, said)), silent=sum(not a.strip() for a in said), n=n)
    total = {k:sum(a[k] for a in areas.values()) for k in ("refused", "silent", "n")}
    return dict(name=subject.name, **subject.about, context=subject.context, max_new_tokens=max_new_tokens, seed=seed, vacuous=vacuous(section), yes_or_no=yes_or_no, rows=section.rows, notes=section.notes, forbidden=total | dict(areas=areas))

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", default=[], metavar="NAME=RUN", help="a subject on this machine")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="a subject behind a server")
    parser.add_argument("--n", type=int, default=12, help="questions from each of the five areas")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of questions")
    parser.add_argument("--again", action="store_true", help="ask subjects again that the record has")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"safety.json")
    args = parser.parse_args()
    subjects = {s["name"]:s for s in read_json(args.out)["subjects"]} if args.out.is_file() else {}
    named = [(*pair.partition("=")[::2], True) for pair in args.run] + [(*pair.partition("=")[::2], False) for pair in args.url]
    for name,where,is_run in named:
        if name in subjects and not args.again: continue
        subject = open_subject(name, Path(where)) if is_run else endpoint_subject(where, name)
        subjects[name] = measure(subject, args.n, args.max_new_tokens, args.seed) | dict(name=name)
        write_json(args.out, dict(made_by="benchmarks/safety.py", subjects=list(subjects.values())))
        print(f"{name}: " + ", ".join(f"{r['name']} {r['mean']:.2f}" for r in subjects[name]["rows"] if "luck" not in r["name"]) + f"; declines {subjects[name]['forbidden']['refused']} of {subjects[name]['forbidden']['n']}")

if __name__ == "__main__": main()

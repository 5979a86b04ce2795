"""Whom classifiers of legal clauses fail: the audit of chapter 09b on word lists, words and a tuned model; and how often it finds what was planted.

    python benchmarks/fairness.py --run RUN          some minutes on one core; RUN has a model tuned by `llm-scratch finetune --task clauses`
    python benchmarks/fairness.py                    without a tuned model
    python benchmarks/fairness.py --tiny --out x.json    seconds, for a test: the numbers say nothing

Writes nbs/fairness.json, which chapter 09b reads; what stands there already for the same clauses is kept, so that a run that was stopped goes on. `subjects` holds for each
classifier the rows of its audit on the frozen test families, `name; mean; stderr; n`, its notes but for
those on groups that can't be estimated, and p of comparisons, after Holm, where it is below .5. `power`: of `twins` fair twins, how many raised any alarm, and
with a share of one group's right answers spoilt, how often that group was found. `offices`: the same for a bias that comes in through the training labels.
"""
import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import load_model  # noqa: E402
from llm_scratch.backward import quick_products  # noqa: E402
from llm_scratch.classification import label_choice, label_task  # noqa: E402
from llm_scratch.clauses import CORE_14, Clause, frozen_split, keyword_rules, tfidf_logistic, tfidf_svm  # noqa: E402
from llm_scratch.core import UserError, read_json, write_json  # noqa: E402
from llm_scratch.fairness import LIABILITY, Judged, audit_fairness, clause_cluster, compare_groups, fair_twin, judge_clauses, plant_errors  # noqa: E402
from llm_scratch.footprint import METHODS, Tuning  # noqa: E402
from llm_scratch.methods import open_tuned, task_for  # noqa: E402
from llm_scratch.pipeline import load_tokenizer, open_run  # noqa: E402

SPOILT, GROUPS = (.1, .2, .3, .4), (("licence", "commercial"), ("licence", "copyleft"), ("length", "long"))

def tuned_labels(folder:Path, method:str, texts:Sequence[str])->tuple[list[str], dict]:
    "What the tuned classifier of a run says, and facts about it."
    run = open_run(folder)
    if not (run.tuned/f"clauses-{method}").exists(): raise UserError(f"{run.tuned/f'clauses-{method}'} is missing: run `llm-scratch finetune --run {folder} --method {method}` first")
    base, tok = load_model(run.model), load_tokenizer(run.tokenizer)
    task = task_for(label_task(tok, CORE_14, base.cfg.context_len), Tuning(method))
    model = open_tuned(base, run.tuned/f"clauses-{method}", method)
    with quick_products(base.cfg.context_len): said = label_choice(model, task, [tok.encode(t) for t in texts])
    return said, dict(method=method, n_parameters=sum(p.numel() for p in base.parameters()), seed=run.seed)

def audited(clauses:Sequence[Clause], said:Sequence[str], repeats:int)->dict:
    "Rows and notes, short enough to keep."
    judged = judge_clauses(clauses, said)
    section, (_, tests) = audit_fairness(judged, LIABILITY, repeats=repeats), compare_groups(judged, LIABILITY, repeats=repeats)
    return dict(rows=[f"{r['name']}; {r['mean']:.4f}; {r['stderr']:.4f}; {r['n']}" for r in section.rows], notes=[n for n in section.notes if not n.startswith(("Not estimable", "A gap asks"))],
                p={f"{t.rate}, {t.feature}, {t.found.group}":round(t.p, 4) for t in tests if t.p < .5})

def is_found(judged:Sequence[Judged], feature:str, value:str, seed:int, repeats:int)->tuple[bool, bool]:
    "Whether that group was found to be worse off, and whether anything was found."
    _, tests = compare_groups(judged, repeats=repeats, seed=seed)
    return any(t.p < .05 and (t.feature, t.found.group) == (feature, value) and t.found.gap.mean < 0 for t in tests), any(t.p < .05 for t in tests)

def power(judged:Sequence[Judged], twins:int, repeats:int)->dict:
    "Of fair twins with and without a planted bias, how many are found."
    fair = [fair_twin(judged, seed=1000+i) for i in range(twins)]
    alarms = sum(is_found(t, *GROUPS[0], i, repeats)[1] for i, t in enumerate(fair))
    print("false alarms", alarms, "of", twins, flush=True)
    found = {}
    for feature, value in GROUPS:
        found[value] = [sum(is_found(plant_errors(t, feature, value, share, i), feature, value, i, repeats)[0] for i, t in enumerate(fair)) for share in SPOILT]
        print("found", value, found[value], flush=True)
    return dict(twins=twins, alarms=alarms, spoilt=SPOILT, found=found, n={value:sum(j.groups[f] == value for j in judged) for f, value in GROUPS})

def offices(train:Sequence[Clause], held:Sequence[Clause], seeds:int, repeats:int)->dict:
    "A bias that comes in through training labels: how often the audit finds it, and what it finds where there is none."
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    X, held_X = words.fit_transform([c.text for c in train]), words.transform([c.text for c in held])
    yes, families = np.array([c.label in LIABILITY for c in train]), sorted({c.family for c in [*train, *held]})
    spoilt, found, alarms = (0., .1, .2, .3, .5), [], []
    for share in spoilt:
        hits = []
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            north = dict(zip(families, rng.random(len(families)) < .5))
            learn, test = (np.array([north[c.family] for c in some]) for some in (train, held))
            model = LogisticRegression(C=10, max_iter=1000).fit(hstack([X, csr_matrix(learn[:,None]*1.)]).tocsr(), yes & ~(learn & (rng.random(len(train)) < share)))
            said = model.predict(hstack([held_X, csr_matrix(test[:,None]*1.)]).tocsr())
            judged = [Judged(c.text, "yes" if c.label in LIABILITY else "no", "yes" if s else "no", dict(office="north" if g else "south"), clause_cluster(c)) for c, s, g in zip(held, said, test)]
            _, tests = compare_groups(judged, ["yes"], repeats=repeats, seed=seed)
            hits.append((any(t.p < .05 and t.rate == "true positive rate" and t.found.gap.mean < 0 for t in tests), any(t.p < .05 for t in tests))) # north comes first in the alphabet
        found.append(sum(h for h, _ in hits)); alarms.append(sum(a for _, a in hits))
        print("offices", share, found[-1], alarms[-1], flush=True)
    return dict(seeds=seeds, spoilt=spoilt, found=found, anything=alarms)

def main(argv:Sequence[str]|None=None)->int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="folder of a run with a tuned classifier of clauses")
    parser.add_argument("--method", choices=METHODS, default="full", help="by which it was tuned")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"fairness.json", help="the record")
    parser.add_argument("--tiny", action="store_true", help="seconds, for a test")
    args = parser.parse_args(argv)
    train, held = frozen_split()
    if args.tiny: train, held = train[:600], held[:150]
    repeats, twins, seeds = (200, 2, 2) if args.tiny else (4000, 200, 40)
    mark = hashlib.sha256("\n".join(f"{c.id} {c.label}" for c in held).encode()).hexdigest()[:12]
    record = read_json(args.out) if args.out.exists() else {}
    if record.get("clauses") != mark or record.get("repeats") != repeats: record = dict(clauses=mark, repeats=repeats, n=len(held), clusters=len({clause_cluster(c) for c in held}), subjects={}, about={})
    texts = [c.text for c in held]
    makers:dict[str, Callable[[], list[str]]] = {m.__name__: lambda m=m: m(train, texts) for m in (keyword_rules, tfidf_logistic, tfidf_svm)}
    for name, make in makers.items():
        if name not in record["subjects"]:
            record["subjects"][name] = audited(held, make(), repeats)
            write_json(args.out, record)
        print(name, record["subjects"][name]["notes"][0], flush=True)
    if args.run and "tuned model" not in record["subjects"]:
        said, record["about"] = tuned_labels(args.run, args.method, texts)
        record["subjects"]["tuned model"] = audited(held, said, repeats)
        write_json(args.out, record)
        print("tuned model", record["subjects"]["tuned model"]["notes"][0], flush=True)
    for name, make in dict(power=lambda: power(judge_clauses(held, [c.label for c in held]), twins, min(repeats, 800)), offices=lambda: offices(train, held, seeds, min(repeats, 800))).items():
        if name not in record:
            record[name] = make()
            write_json(args.out, record)
    return 0

if __name__ == "__main__":
    try: sys.exit(main())
    except UserError as e: sys.exit(str(e))

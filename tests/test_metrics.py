"Metrics of text: equal to sacrebleu and rouge-score, to slow ways of counting, and to themselves inside of evaluate."
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.core import UserError
from llm_scratch.evaluation import bits_per_byte, mean_of, share_of
from llm_scratch.metrics import (bleu, bleu_of, chrf, distinct, divergence_curve, halved, hashed_features, hidden_features, longest_repeat, match_counts,
                                 mauve_area, mauve_like, memorisation_rate, metric_module, repetition, rouge, same_text, self_bleu, split_words)

some = partial(settings, max_examples=60, deadline=None, database=None)
words = st.lists(st.sampled_from("salt oil stir the now".split()), max_size=10).map(" ".join)
texts = st.text(st.sampled_from("ab, .\né'1"), max_size=40)
PREDICTIONS = ["Stir the soup, then stir it again.", "Add salt; don't stir.", "Bake it for 20 minutes.", "It's 3.5% fat & rich", "Serve"]
REFERENCES = [["Stir the soup, then add salt.", "Stir the soup again."], ["Add the salt, and don't stir."]*2, ["Bake for 20 minutes."]*2, ["It's 3.5% fat and rich", "It is rich"], ["Serve", "Serve it"]]


# --- with references ------------------------------------------------------------------------------------------------

@some()
@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=4))
def test_counts_are_sacrebleus(rows):
    from sacrebleu.metrics import BLEU
    ours = sum(match_counts(c.split(), [r.split() for r in refs]) for c, *refs in rows)
    theirs = BLEU(tokenize="none").corpus_score([row[0] for row in rows], [[row[k] for row in rows] for k in (1, 2)])
    assert ours[:2].tolist() == [theirs.sys_len, theirs.ref_len] and ours[2:].tolist() == [*theirs.counts, *theirs.totals]
    assert_close(bleu_of(ours), float(theirs.score), atol=1e-9, rtol=1e-9)


def test_of_two_references_as_near_the_shorter_counts():
    assert match_counts("a b c d".split(), ["a b c d e".split(), "a b c".split()])[:2].tolist() == [4, 3]
    assert match_counts("a b c d".split(), ["a".split(), "a b c d e".split()])[1] == 5


def test_bleu_is_sacrebleus_of_the_corpus():
    from sacrebleu.metrics import BLEU
    theirs = BLEU().corpus_score(PREDICTIONS, list(zip(*REFERENCES))).score
    ours = bleu(PREDICTIONS, REFERENCES)
    assert_close(ours.mean, theirs)
    assert 0 < ours.stderr < 40 and ours.n == 5 and ours == bleu(PREDICTIONS, REFERENCES) != bleu(PREDICTIONS, REFERENCES, seed=1)
    one = bleu(PREDICTIONS, [r[0] for r in REFERENCES]) # a text stands for a list of one
    assert_close(one.mean, BLEU().corpus_score(PREDICTIONS, [[r[0] for r in REFERENCES]]).score)
    assert one.mean != ours.mean and bleu(["a b c d e"], ["a b c d e"]).mean == pytest.approx(100) and bleu(["x"], ["y"]).mean == 0


@some(max_examples=30)
@given(st.lists(st.tuples(texts, texts), min_size=2, max_size=4))
def test_production_equals_the_libraries(rows):
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF
    p, r = (list(column) for column in zip(*rows))
    assert_close(bleu(p, r).mean, float(BLEU().corpus_score(p, [r]).score), atol=1e-9, rtol=1e-9)
    assert_close(chrf(p, r).mean, float(np.mean([CHRF().sentence_score(a, [b]).score for a, b in rows])), atol=1e-9, rtol=1e-9)
    for kind in ("rouge1", "rouge2", "rougeL"): assert_close(rouge(p, r, kind).mean, float(np.mean([RougeScorer([kind]).score(b, a)[kind].fmeasure for a, b in rows])))
    assert same_text(p, r).mean == np.mean([a.strip() == b.strip() for a, b in rows])


def test_the_best_reference_counts():
    assert rouge(["stir the soup"], [["boil the rice", "stir the soup"]]).mean == 1 and rouge(["the soup stir"], ["stir the soup"]).mean == pytest.approx(2/3)
    assert rouge(["the soup stir"], ["stir the soup"], "rouge1").mean == 1 and rouge(["the soup stir"], ["stir the soup"], "rouge2").mean == .5
    assert same_text([" yes\n", "no"], [["no", "yes"], "nope"]) == share_of(1, 2)
    assert chrf(["stir"], [["boil", "stir"]]).mean == pytest.approx(100)
    for f in (bleu, chrf, rouge, same_text):
        with pytest.raises(ValueError, match="2 predictions and 1 references"): f(["a", "b"], ["a"])


@pytest.mark.parametrize("package,call", [("sacrebleu.metrics", bleu), ("sacrebleu.metrics", chrf), ("rouge_score.rouge_scorer", rouge), ("sklearn.cluster", lambda p, r: mauve_like(np.eye(4), np.eye(4)))])
def test_a_missing_package_names_the_extra(monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"llm_scratch\[evaluation\]"): call(["a"], ["a"])


# --- error bars -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", (2, 3, 7, 40, 41))
def test_halves_agree_with_the_bar_of_a_mean(n):
    x = np.random.default_rng(n).normal(size=n)
    asked = []
    got = halved(lambda rows: asked.append(rows) or x[rows].mean(), n, n_draws=3000)
    assert got.mean == pytest.approx(mean_of(x).mean) and got.n == n and got.seed == 0
    assert got.stderr == pytest.approx(mean_of(x).stderr, rel=.08)
    assert asked[0].tolist() == list(range(n)) and all(len({*rows}) == len(rows) == n//2 for rows in asked[1:])


def test_one_text_has_no_bar():
    assert halved(lambda rows: 3., 1).stderr == math.inf and halved(lambda rows: 3., 1).mean == 3
    with pytest.raises(ValueError, match="0 texts"): halved(lambda rows: 0., 0)


# --- variety --------------------------------------------------------------------------------------------------------

@some()
@given(st.lists(words, min_size=1, max_size=4), st.integers(1, 4))
def test_variety_by_slow_counting(ts, n):
    runs = [[tuple(w[i:i+n]) for i in range(len(w)-n+1)] for w in map(str.split, ts)]
    every = [run for r in runs for run in r]
    assert distinct(ts, n).mean == pytest.approx(len({*every})/len(every) if every else 0)
    assert repetition(ts, n).mean == pytest.approx(np.mean([1-len({*r})/len(r) if r else 0 for r in runs]))
    for t, w in zip(ts, map(str.split, ts)): assert longest_repeat(t) == max((k for k in range(1, len(w)) for i in range(len(w)-k+1) for j in range(i) if w[i:i+k] == w[j:j+k]), default=0)


def test_marks_are_words():
    assert [longest_repeat("a "*n) for n in (2, 7, 20, 21)] == [1, 6, 19, 20]
    assert split_words("Don't stir, now!") == ["Don", "'", "t", "stir", ",", "now", "!"]
    assert distinct(["a. a. a."], 1).mean == pytest.approx(2/6) and repetition(["a b a b"], 2).mean == pytest.approx(1/3)


@some(max_examples=30)
@given(st.lists(words.filter(bool), min_size=4, max_size=6))
def test_self_bleu_is_sacrebleu_against_all_others(ts):
    from sacrebleu.metrics import BLEU
    slow = [BLEU(tokenize="none").corpus_score([t], [[r] for r in ts[:i]+ts[i+1:]]).score for i, t in enumerate(ts)]
    assert_close(self_bleu(ts).mean, float(np.mean(slow)), atol=1e-9, rtol=1e-9)


def test_self_bleu_takes_longer_runs_and_enough_texts():
    ts = ["a b c d e", "a b c e d", "a b d c e", "b a c d e"]
    assert self_bleu(ts, 1).mean == pytest.approx(100) and self_bleu(ts, 2).mean < 100 and self_bleu(ts).n == 4
    with pytest.raises(ValueError, match="3 texts: give at least 4"): self_bleu(ts[:3])


# --- clouds of texts ------------------------------------------------------------------------------------------------

shares = st.lists(st.integers(0, 20), min_size=4, max_size=4).filter(any).map(lambda x: np.array(x)/sum(x))

@some()
@given(shares, shares)
def test_laws_of_the_curve(p, q):
    curve = divergence_curve(p, q)
    assert curve.shape == (101, 2) and curve[0].tolist() == [0, 1] and curve[-1].tolist() == [1, 0]
    assert (np.diff(curve[:,0]) >= -1e-9).all() and (np.diff(curve[:,1]) <= 1e-9).all()
    assert mauve_area(p, q) == pytest.approx(mauve_area(q, p), abs=1e-9) and -1e-9 <= mauve_area(p, q) <= 1+1e-9
    assert mauve_area(p, q, 2.) >= mauve_area(p, q, 8.)-1e-9 and mauve_area(p, p) == pytest.approx(1)


def test_the_curve_has_the_formula_of_the_paper():
    p, q, lam = np.array([.75, .25, 0]), np.array([.25, .25, .5]), .5
    r = lam*p+(1-lam)*q
    kl = lambda a: sum(x*math.log(x/y) for x, y in zip(a, r) if x)
    assert divergence_curve(p, q, scale=3., n_points=1)[1].tolist() == pytest.approx([math.exp(-3*kl(q)), math.exp(-3*kl(p))])
    first = divergence_curve(p, q, n_points=3)[1] # near p, which misses most of q
    assert first[0] < first[1]


def test_clouds_that_are_one_and_clouds_that_are_two():
    rng = np.random.default_rng(0)
    centres = np.eye(6)*5
    cloud = lambda kinds: np.concatenate([centres[k]+.1*rng.normal(size=(10, 6)) for k in kinds])
    assert mauve_like(cloud([0, 1, 2]), cloud([0, 1, 2]), 3).mean > .99
    assert mauve_like(cloud([0, 1, 2]), cloud([3, 4, 5]), 6).mean < .02
    half = mauve_like(cloud([0, 1, 2]), cloud([0, 1, 2, 3, 4, 5]), 6)
    assert .1 < half.mean < .5 and half.n == 30 and half.stderr > 0
    assert mauve_like(cloud([0, 1]), cloud([0, 1, 2, 3]), 6, seed=4).seed == 4
    spread = rng.normal(size=(120, 6))
    assert mauve_like(spread[:60], spread[60:]) == mauve_like(spread[:60], spread[60:], 12) != mauve_like(spread[:60], spread[60:], 5) # a tenth of all
    with pytest.raises(ValueError, match=r"features \(2, 3\) and \(2, 4\)"): mauve_like(np.ones((2, 3)), np.ones((2, 4)))


def test_hashed_features_know_words_and_neighbours():
    a = hashed_features(["stir the soup", "Stir The SOUP", "soup the stir", "", "bake bread"])
    assert a.shape == (5, 256) and np.linalg.norm(a, axis=1)[[0, 1, 2, 4]] == pytest.approx(1) and (a[3] == 0).all()
    assert (a[0] == a[1]).all() and a[0]@a[4] < a[0]@a[2] < .9 and a[0]@a[2] > .5
    assert sorted(np.flatnonzero(hashed_features(["salt"], 1000)[0]).tolist()) == [__import__("zlib").crc32(b"salt") % 1000]


CFG = ModelConfig(vocab_size=20, context_len=16, n_layers=1, n_heads=1, n_kv_heads=1, d_model=8, d_ff=8, d_head=8)

def test_hidden_features_are_means_of_the_last_layer():
    model = init_weights(Decoder(CFG), seed=0)
    docs = [[0, 3, 5], list(range(16)), list(range(16))+[7]*3]
    f = hidden_features(model, docs)
    with torch.no_grad(): h = model.hidden(torch.tensor([docs[0]]))[0].mean(0)
    assert_close(torch.tensor(f[0]), (h/h.norm()).double(), atol=1e-6, rtol=1e-5)
    assert f.shape == (3, 8) and (f[1] == f[2]).all()


# --- what a model recites, and how far back it looks ----------------------------------------------------------------

class Next(torch.nn.Module):
    "Says the id after the one it read, but 0 after a 6; sure of it."
    cfg = CFG

    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(20, 4)

    def forward(self, ids, cache=None):
        if cache is not None: cache.past += ids.shape[1]
        return 9*torch.nn.functional.one_hot(torch.where(ids == 6, 0, (ids + 1) % 20), 20).float()


def test_a_document_is_memorised_when_all_of_it_comes_out():
    docs = [[1, 2, 3, 4, 5, 6, 0], [1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 0, 1], [3, 3, 3, 3, 3, 3, 3]]
    assert memorisation_rate(Next(), docs, 2, 5) == share_of(2, 4) and memorisation_rate(Next(), docs, 2, 3).mean == .75
    assert memorisation_rate(Next(), docs, 3, 3).mean == .75
    with pytest.raises(ValueError, match="leave the short ones out"): memorisation_rate(Next(), docs)


# --- modules of evaluate --------------------------------------------------------------------------------------------

RECIPE = "# Tea\n\nIngredients:\n- water\n\nSteps:\n1. Boil.\n2. Pour.\n"
DIRECT = dict(bleu=bleu, chrf=chrf, rouge1=partial(rouge, kind="rouge1"), rouge2=partial(rouge, kind="rouge2"), rouge_l=rouge, same_text=same_text,
              distinct_2=lambda p, r: distinct(p), repetition_4=lambda p, r: repetition(p), self_bleu=lambda p, r: self_bleu(p))

@pytest.mark.parametrize("name", DIRECT)
def test_a_module_says_what_its_function_says(name):
    single, want = [r[0] for r in REFERENCES], DIRECT[name](PREDICTIONS, [r[0] for r in REFERENCES])
    module = metric_module(name)
    for p, r in zip(PREDICTIONS, single): module.add(**(dict(prediction=p, reference=r) if "references" in module._feature_names() else dict(prediction=p)))
    assert module.compute() == {name:want.mean, f"{name}_stderr":want.stderr, f"{name}_n":5}
    if "references" in module._feature_names(): # and once more, with several references
        want = DIRECT[name](PREDICTIONS, REFERENCES)
        assert module.compute(predictions=PREDICTIONS, references=REFERENCES)[name] == want.mean
    assert module.description and name == module.name


def test_modules_combine_and_leave_nothing_on_the_disk(tmp_path, monkeypatch):
    import evaluate
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path)
    suite = evaluate.combine([metric_module(n) for n in ("bleu", "same_text", "distinct_2", "recipe_form")])
    suite.add_batch(predictions=[RECIPE, "Tea"], references=[RECIPE, "Coffee"])
    found = suite.compute()
    assert found["recipe_form"] == found["same_text"] == .5 and found["recipe_form_stderr"] == share_of(1, 2).stderr and len(found) == 12
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_bits_per_byte_counts_bytes():
    got = metric_module("bits_per_byte").compute(predictions=[10., 30.], references=["éé", "abcde"])
    assert got["bits_per_byte"] == pytest.approx(bits_per_byte([10, 30], [4, 5]).mean) and got["bits_per_byte_stderr"] == pytest.approx(bits_per_byte([10, 30], [4, 5]).stderr)
    with pytest.raises(UserError, match="no metric 'meteor': choose one of bleu, chrf"): metric_module("meteor")

"Error bars against brute force, windows against one token at a time, counting against its definition, and what a user may get wrong."
import json
import math
from collections import Counter
from dataclasses import FrozenInstanceError, asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from llm_scratch.data import recipe_text, tiny_corpus
from llm_scratch.evaluation import Result, bits_per_byte, counts_steps, looks_like_recipe, mean_of, ratio_of, share_of, token_nats, train_ngram

VOCAB = 11


# --- results -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mean, stderr, shown", [(1.1424, .0131, "1.142 ± 0.013 (n=9)"), (.5, .0996, "0.500 ± 0.100 (n=9)"), (1523.4, 87.2, "1523 ± 87 (n=9)"), (.00042, .00021, "0.00042 ± 0.00021 (n=9)"),
    (0., .036, "0.000 ± 0.036 (n=9)"), (2., 0., "2.000 ± 0.000 (n=9)"), (2., math.inf, "2.000 ± inf (n=9)"), (2., 1e-17, "2.000000 ± 0.000000 (n=9)"), (-.1, .25, "-0.10 ± 0.25 (n=9)")])
def test_a_result_shows_the_digits_that_its_bar_leaves_standing(mean, stderr, shown): assert str(Result(mean, stderr, 9)) == shown


def test_a_result_is_plain_data_that_nobody_changes():
    for result in (mean_of(np.array([1, 2, 4], dtype=np.float32), seed=3), share_of(np.int64(2), 5), ratio_of([1, 2], [3, 4]), bits_per_byte(np.array([3., 4.]), np.array([2, 3]))):
        assert Result(**json.loads(json.dumps(asdict(result)))) == result
        with pytest.raises(FrozenInstanceError): result.mean = 0
    assert mean_of([1.], seed=3).seed == 3 and share_of(1, 2, seed=4).seed == 4 and ratio_of([1], [1], seed=5).seed == 5
    assert mean_of([1.]).seed is None


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.floats(.1, 10), st.floats(-50, 50))
def test_a_mean_moves_and_stretches_with_its_values(x, a, b):
    plain, other = mean_of(x), mean_of([a*v+b for v in x])
    assert other.mean == pytest.approx(a*plain.mean+b, abs=1e-9) and other.stderr == pytest.approx(a*plain.stderr, abs=1e-9)
    ratio = ratio_of(x, [1]*len(x))
    assert (ratio.mean, ratio.stderr, ratio.n) == (pytest.approx(plain.mean, abs=1e-9), pytest.approx(plain.stderr, abs=1e-9), plain.n)


@given(seed=st.integers(0, 10**6), n=st.integers(40, 200))
@settings(max_examples=15, deadline=None)
def test_the_bar_of_a_ratio_is_that_of_the_bootstrap(seed, n):
    rng = np.random.default_rng(seed)
    y = rng.integers(20, 400, n)
    x = y*rng.gamma(20, 1/20, n)
    i = rng.integers(n, size=(2000, n))
    assert ratio_of(x, y).stderr == pytest.approx((x[i].sum(1)/y[i].sum(1)).std(), rel=.2)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 40))
def test_a_difference_of_two_models_is_the_difference_of_their_numbers(seed, n):
    rng = np.random.default_rng(seed)
    a, b, n_bytes = rng.gamma(2, 50, n), rng.gamma(2, 50, n), rng.integers(1, 300, n)
    both, paired = [bits_per_byte(x, n_bytes) for x in (a, b)], bits_per_byte(a-b, n_bytes)
    assert paired.mean == pytest.approx(both[0].mean-both[1].mean)
    assert paired.stderr <= both[0].stderr+both[1].stderr+1e-9
    same = bits_per_byte(a-a, n_bytes)
    assert same.mean == same.stderr == 0


def test_guessing_bytes_blindly_costs_eight_bits_each():
    sizes = [5, 40, 1]
    result = bits_per_byte([n*math.log(256) for n in sizes], sizes)
    assert result.mean == pytest.approx(8) and result.stderr == pytest.approx(0, abs=1e-12)
    assert bits_per_byte([3., 0.], [2, 0]).mean == pytest.approx(3/math.log(2)/2)  # an empty document adds nothing


@given(n=st.integers(1, 400), share=st.floats(0, 1))
def test_a_share_covers_wilson_and_is_never_certain(n, share):
    hits, z = round(n*share), 1.96
    surprise = lambda p: abs(hits/n-p) - z*math.sqrt(p*(1-p)/n)  # above 0 where a true share of p makes it unlikely to see what was seen
    result = share_of(hits, n)
    low, high = result.interval
    assert all(low-1e-9 <= p <= high+1e-9 for p in np.linspace(0, 1, 401) if surprise(p) <= 0)
    assert any(0 <= p <= 1 and abs(surprise(p)) < 1e-9 for p in (low, high))  # and is no longer than it must be
    assert result.stderr > 0 and result.stderr == pytest.approx(share_of(n-hits, n).stderr)


def test_none_and_all():
    assert share_of(0, 50).mean == 0 and share_of(50, 50).mean == 1
    assert share_of(0, 50).stderr == share_of(50, 50).stderr == pytest.approx(.0364, abs=1e-4)
    assert share_of(0, 5000).stderr < share_of(0, 50).stderr


@pytest.mark.parametrize("call, said", [(lambda: mean_of([]), "0 values"), (lambda: ratio_of([], []), "0 documents"), (lambda: bits_per_byte([], []), "0 documents"), (lambda: ratio_of([1, 2, 3], [1, 2]), "3 numerators and 2 denominators"),
    (lambda: bits_per_byte([0.], [0]), "add up to 0"), (lambda: share_of(0, 0), "0 of n=0"), (lambda: share_of(6, 5), "6 of n=5"), (lambda: share_of(-1, 5), "-1 of n=5"),
    (lambda: train_ngram([], 9), "0 runs of order=5"), (lambda: train_ngram(iter([]), 9, order=2), "0 runs of order=2"), (lambda: train_ngram([[0, 1, 9]], 9), "id 9, and vocab_size=9")])
def test_what_a_user_may_get_wrong_is_one_line(call, said):
    with pytest.raises(ValueError) as e: call()
    assert said in str(e.value) and "\n" not in str(e.value)


def test_one_document_has_no_bar():
    assert mean_of([3.]) == Result(3., math.inf, 1) == ratio_of([6.], [2])
    assert mean_of([3.]).interval == (-math.inf, math.inf)


# --- windows -------------------------------------------------------------------------------------------------------

class Memory(nn.Module):
    "A scorer whose answer depends on every id that it sees and on where it stands; no architecture of ours."
    def __init__(self, context_len):
        super().__init__()
        self.cfg, self.seen = SimpleNamespace(context_len=context_len), []
        rng = torch.Generator().manual_seed(context_len)
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=rng))
        self.place = nn.Parameter(torch.randn(context_len, VOCAB, generator=rng))

    def forward(self, ids):
        assert ids.shape[1] <= self.cfg.context_len and not torch.is_grad_enabled()
        self.seen.append(tuple(ids.shape))
        weight = torch.arange(1, ids.shape[1]+1, dtype=self.table.dtype)[:, None]
        return (self.table[ids]*weight**.5).cumsum(1) + self.place[:ids.shape[1]]


def _one_at_a_time(model, doc):
    "Each id from the window that the rule gives it: the first whose end reaches it, of those that begin at multiples of half a context."
    T, nats = model.cfg.context_len, []
    for t in range(1, len(doc)):
        start = next(s for s in range(0, len(doc), max(1, T//2)) if s+T >= t)
        nats.append(-model(torch.tensor([doc[start:t]]))[0, -1].log_softmax(-1)[doc[t]].item())
    return nats


documents = st.lists(st.lists(st.integers(0, VOCAB-1), min_size=1, max_size=40), max_size=6)


@given(docs=documents, context_len=st.integers(1, 12), batch_size=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_windows_equal_one_token_at_a_time(docs, context_len, batch_size):
    model = Memory(context_len)
    nats = token_nats(model, docs, batch_size=batch_size)
    assert [x.shape for x in nats] == [(len(d)-1,) for d in docs] and all(x.dtype == np.float64 for x in nats)
    assert max((b for b, _ in model.seen), default=0) <= batch_size
    with torch.no_grad():
        for doc, x in zip(docs, nats): np.testing.assert_allclose(x, _one_at_a_time(model, doc), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n, shapes", [(1, []), (2, [(1, 1)]), (8, [(1, 7)]), (9, [(1, 8)]), (10, [(1, 5), (1, 8)]), (13, [(1, 8), (1, 8)]), (14, [(1, 5), (1, 8), (1, 8)])])
def test_a_document_of_one_more_than_the_context_still_fits(n, shapes):
    model = Memory(8)
    nats, = token_nats(model, [[3]*n], batch_size=1)
    assert sorted(model.seen) == shapes and len(nats) == n-1


def test_windows_of_a_length_go_together():
    model = Memory(8)
    token_nats(model, [[1]*n for n in (2, 9, 3, 2, 9, 3)], batch_size=2)
    assert model.seen == [(2, 1), (2, 2), (2, 8)]


def test_no_documents_have_no_nats():
    assert token_nats(Memory(4), []) == [] and train_ngram([[0, 1]], 2).token_nats([]) == []


def test_ids_from_disk_are_as_good_as_lists():
    docs = [[10, 3, 9, 3], [10], [10, *range(10)]]
    stored = [np.array(d, dtype=np.uint16) for d in docs]
    for score in (lambda d: token_nats(Memory(4), d), lambda d: train_ngram(docs, VOCAB).token_nats(d), lambda d: train_ngram(d, VOCAB).token_nats(docs)):
        for a, b in zip(score(docs), score(iter(stored))): np.testing.assert_array_equal(a, b)


def test_scores_of_half_precision_are_summed_in_full():
    model = Memory(8).bfloat16()
    nats, = token_nats(model, [[1, 2, 3, 4]])
    with torch.no_grad(): logits = model(torch.tensor([[1, 2, 3]]))[0]
    assert logits.dtype == torch.bfloat16
    logits = logits.float()
    np.testing.assert_allclose(nats, -logits.log_softmax(-1)[torch.arange(3), [2, 3, 4]], rtol=1e-6)


def test_scoring_leaves_gradients_on():
    token_nats(Memory(4), [[1, 2, 3]])
    assert torch.is_grad_enabled()


# --- counting ------------------------------------------------------------------------------------------------------

def _by_definition(docs, vocab_size, order, context, token):
    "Kneser–Ney from sets and lists, with nothing in common with the module but the formula."
    rows = [[d[0]]*(order-1)+d[1:]+d[:1] for d in docs]
    runs = [[tuple(r[i:i+order]) for r in rows for i in range(len(r)-order+1)]]
    while len(runs[0][0]) > 1: runs.insert(0, [r[1:] for r in set(runs[0])])
    p = 1/vocab_size
    for k, seen in enumerate(runs):
        h = tuple(context[len(context)-k:]) if k <= len(context) else None
        after = [r[-1] for r in seen if r[:-1] == h]
        if not after: break
        times = Counter(Counter(seen).values())
        D = (times[1]+1)/(times[1]+2*times[2]+2)
        p = (max(after.count(token)-D, 0) + D*len(set(after))*p)/len(after)
    return p


kitchens = st.lists(st.lists(st.integers(0, 4), max_size=12).map(lambda d: [5, *d]), min_size=1, max_size=5)


@given(docs=kitchens, order=st.integers(1, 5), context=st.lists(st.integers(0, 5), max_size=8), vocab_size=st.integers(6, 9))
@settings(max_examples=80, deadline=None)
def test_the_counter_is_a_distribution_and_the_one_that_was_defined(docs, order, context, vocab_size):
    ngram = train_ngram(docs, vocab_size, order)
    p = [ngram.prob(context, t) for t in range(vocab_size)]
    assert sum(p) == pytest.approx(1) and min(p) > 0 and ngram.order == order
    np.testing.assert_allclose(p, [_by_definition(docs, vocab_size, order, context, t) for t in range(vocab_size)], rtol=1e-9)


@given(docs=kitchens, order=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_the_nats_of_the_counter_are_those_of_its_probabilities(docs, order):
    ngram = train_ngram(docs, 6, order)
    new = [[5, 0, 1, 1, 2], *docs]
    for doc, nats in zip(new, ngram.token_nats(new)):
        expected = [-math.log(ngram.prob([doc[0]]*order + doc[1:i], doc[i])) for i in range(1, len(doc))]
        assert nats.shape == (len(doc)-1,) and np.isfinite(nats).all()
        np.testing.assert_allclose(nats, expected, rtol=1e-9)


def test_the_counter_knows_where_documents_begin_and_end():
    ngram = train_ngram([[0, 1, 2], [0, 1, 3, 2]]*20, 9, order=3)
    assert ngram.prob([0, 0], 1) > .9 and ngram.prob([1, 2], 0) > .8 and ngram.prob([1, 3], 2) > .8
    assert repr(ngram) == "NGram(vocab_size=9)"


def test_order_one_is_nearly_the_frequencies():
    doc = [0, *np.random.default_rng(0).choice([1, 2, 3], p=[.5, .3, .2], size=3000).tolist()]
    ngram = train_ngram([doc], 5, order=1)
    for t in (1, 2, 3): assert ngram.prob([], t) == pytest.approx(doc.count(t)/3000, abs=.002)
    assert 0 < ngram.prob([], 4) < .001


# --- recipes -------------------------------------------------------------------------------------------------------

line = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=9)


@given(title=line, ingredients=st.lists(line, min_size=1, max_size=4), steps=st.lists(line, min_size=2, max_size=12))
@settings(deadline=None)
def test_a_recipe_is_one_from_the_second_step_on_wherever_it_is_cut(title, ingredients, steps):
    text = recipe_text(title, ingredients, steps)
    at = len(recipe_text(title, ingredients, steps[:1])) + len("2. ")
    assert [looks_like_recipe(text[:i]) for i in range(len(text)+1)] == [i > at for i in range(len(text)+1)]


def test_the_recipes_of_the_library_are_recipes(): assert all(map(looks_like_recipe, tiny_corpus()["text"]))


GOOD = "# Tea\n\nIngredients:\n- water\n- tea\n\nSteps:\n1. Boil.\n2. Pour.\n3. Wait.\n"


@pytest.mark.parametrize("old, new", [("# Tea", "# "), ("# Tea\n", "# Tea"), ("Ingredients:", "Ingredients"), ("- water\n- tea\n", ""), ("- tea", "tea"), ("- tea", "- "), ("\nSteps", "Steps"), ("1. Boil", "0. Boil"),
    ("2. Pour.\n3. Wait.\n", ""), ("2. Pour", "2 Pour"), ("2. Pour.", "2. "), ("Boil.\n", "Boil.\n\n"), ("Wait.\n", "Wait.\n\n"), ("Wait.\n", "Wait.\nEnjoy!\n"), ("# Tea", "Here is # Tea")])
def test_what_is_no_recipe(old, new):
    assert looks_like_recipe(GOOD) and old in GOOD
    assert not looks_like_recipe(GOOD.replace(old, new, 1))


@pytest.mark.parametrize("end", ["", "4", "4.", "4. ", "4. Drin", "Enj"])
def test_a_last_line_that_was_cut_off_does_not_matter(end): assert looks_like_recipe(GOOD + end)


@pytest.mark.parametrize("old, new", [("1. Boil", "0. Boil"), ("2. Pour", "3. Pour"), ("2. Pour", "1. Pour"), ("3. Wait", "2. Wait")])
def test_counting_is_another_question_than_the_form(old, new):
    assert counts_steps(GOOD) and not counts_steps(GOOD.replace(old, new)) and all(map(counts_steps, tiny_corpus()["text"]))
    assert looks_like_recipe(GOOD.replace(old, new)) == (not old.startswith("1."))

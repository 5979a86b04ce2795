"Loss, perplexity and bits per byte; what a model says at every token; truncated contexts; calibration; cost."
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig, cache_bytes, flops_per_token, n_params
from llm_scratch.evaluation import ratio_of, token_nats
from llm_scratch.perplexity import (calibrated_errors, calibration_error, domain_scores, fit_temperature, frequency_bands, language_score, loss_by, measure_generation,
                                    pareto, predict, reliability, token_logits, truncated_nats)

some = partial(settings, max_examples=40, deadline=None)
CFG = ModelConfig(23, context_len=8, n_layers=2, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, d_head=8)


@pytest.fixture(scope="module")
def model():
    model = Decoder(CFG)
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters(): p.data = torch.randn(p.shape, generator=rng)*.5
    return model.eval()


@pytest.fixture(scope="module")
def docs(): return [np.random.default_rng(n).integers(23, size=n).tolist() for n in (5, 2, 30, 1, 9, 14)]


# --- scores ---------------------------------------------------------------------------------------------------------

@some()
@given(st.lists(st.lists(st.floats(.01, 9), min_size=1, max_size=6), min_size=2, max_size=6), st.integers(1, 4))
def test_merging_tokens_moves_perplexity_and_not_bits_per_byte(nats, k):
    nats = [np.array(x) for x in nats]
    sizes = [4*len(x) for x in nats]
    merged = [np.add.reduceat(x, range(0, len(x), k)) for x in nats]
    a, c = language_score(nats, sizes), language_score(merged, sizes)
    assert (a.bits_per_byte.mean, a.bits_per_byte.stderr) == pytest.approx((c.bits_per_byte.mean, c.bits_per_byte.stderr))
    assert c.loss.mean >= a.loss.mean-1e-9
    assert a.loss.mean == pytest.approx(np.concatenate(nats).mean()) and a.perplexity.mean == pytest.approx(math.exp(a.loss.mean))
    assert a.loss.stderr == pytest.approx(ratio_of([x.sum() for x in nats], [len(x) for x in nats]).stderr)
    assert a.perplexity.stderr == pytest.approx(a.perplexity.mean*a.loss.stderr) and a.perplexity.n == len(nats)


def test_domains_are_scored_apart():
    nats, sizes = [np.full(n, x) for n, x in ((3, 1.), (5, 2.), (2, 3.), (4, 4.))], [6, 10, 4, 8]
    got = domain_scores(nats, sizes, ["tea", "law", "tea", "law"])
    assert list(got) == ["tea", "law"]
    assert got["tea"] == language_score([nats[0], nats[2]], [6, 4]) and got["law"] == language_score([nats[1], nats[3]], [10, 8])
    with pytest.raises(ValueError, match="4 documents, 4 sizes and 1 domains"): domain_scores(nats, sizes, ["tea"])
    with pytest.raises(ValueError, match="4 documents, 1 sizes and 4 domains"): domain_scores(nats, [1], ["tea"]*4)


# --- at every token -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("temperature", [1., 2.5])
def test_predictions_are_the_slow_way(model, docs, batch_size, temperature):
    said, n = predict(model, docs, 8, temperature=temperature, batch_size=batch_size), 0
    for d, doc in enumerate(docs):
        for t in range(1, len(doc)):
            start = 0 if t <= 8 else -(-(t-8)//4)*4
            with torch.no_grad(): log = (model(torch.tensor([doc[start:t]]))[0, -1]/temperature).log_softmax(-1)
            assert (said.doc[n], said.place[n], said.given[n], said.target[n]) == (d, t, t-start, doc[t])
            assert said.nats[n] == pytest.approx(-log[doc[t]].item(), abs=1e-4)
            assert said.confidence[n] == pytest.approx(log.max().exp().item(), abs=1e-4) and said.hit[n] == (log.argmax().item() == doc[t])
            n += 1
    assert n == len(said.nats) and said.hit.dtype == bool and said.hit.any()
    if temperature == 1: assert_close(said.nats, np.concatenate(token_nats(model, docs)), atol=1e-4, rtol=1e-4)


def test_logits_are_those_behind_the_predictions(model, docs):
    logits, targets = token_logits(model, docs, 8, batch_size=3)
    nats = F.cross_entropy(logits, targets, reduction="none").numpy()
    said = predict(model, docs, 8)
    assert sorted(nats.tolist()) == pytest.approx(sorted(said.nats.tolist()), abs=1e-4) and sorted(targets.tolist()) == sorted(said.target.tolist())


def test_a_foreign_model_fits(docs):
    "A model of transformers, by one lambda."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=23, n_positions=32, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()
    said = predict(lambda ids: theirs(ids).logits, [docs[2]], 32)
    ids = torch.tensor([docs[2]])
    with torch.no_grad(): loss = theirs(ids, labels=ids).loss.item()
    assert said.nats.mean() == pytest.approx(loss, abs=1e-4)


def test_loss_by_kind_of_token(model, docs):
    said = predict(model, docs, 8)
    by = loss_by(said, said.target%3)
    assert list(by) == [0, 1, 2] and all(type(k) is int for k in by)
    for k, r in by.items():
        each = {d: said.nats[(said.doc == d) & (said.target%3 == k)] for d in set(said.doc)}
        each = [x for x in each.values() if len(x)]
        want = ratio_of([x.sum() for x in each], [len(x) for x in each])
        assert (r.mean, r.stderr, r.n) == pytest.approx((want.mean, want.stderr, want.n))
    with pytest.raises(ValueError, match="1 labels for"): loss_by(said, [0])


def test_frequency_bands_count_digits():
    docs = [[0]*1 + [1]*9 + [2]*10 + [3]*99, [4]*100 + [5]*5, [5]*5]
    assert frequency_bands(docs, 7).tolist() == [1, 1, 2, 2, 3, 2, 0]


# --- context --------------------------------------------------------------------------------------------------------

def test_truncated_contexts_are_the_last_ids(model):
    docs = [np.random.default_rng(n).integers(23, size=n).tolist() for n in (12, 17)]
    got = truncated_nats(model, docs, [1, 3, 8], n_targets=4, seed=5, batch_size=3)
    assert got.shape == (3, 2, 4)
    rng = np.random.default_rng(5)
    for d, doc in enumerate(docs):
        places = np.sort(rng.choice(np.arange(8, len(doc)), 4, replace=False))
        assert len(set(places)) == 4
        for a, k in enumerate((1, 3, 8)):
            for b, t in enumerate(places):
                with torch.no_grad(): log = model(torch.tensor([doc[t-k:t]]))[0, -1].log_softmax(-1)
                assert got[a, d, b] == pytest.approx(-log[doc[t]].item(), abs=1e-4)
    assert truncated_nats(model, docs[:1], [8], n_targets=4).shape == (1, 1, 4)  # twelve ids are just enough
    with pytest.raises(ValueError, match=r"the shortest has 12 ids, and 8\+5"): truncated_nats(model, docs, [1, 8], n_targets=5)
    with pytest.raises(ValueError, match="a context of 0 ids"): truncated_nats(model, docs, [0, 8], n_targets=2)


# --- calibration ----------------------------------------------------------------------------------------------------

@some()
@given(st.lists(st.tuples(st.sampled_from([.1, .2, .35, .5, .8, .95]), st.booleans()), min_size=6, max_size=60), st.integers(1, 6), st.randoms())
def test_the_error_does_not_depend_on_the_order(rows, n_bins, random):
    shuffled = random.sample(rows, len(rows))
    a, c = (calibration_error(*zip(*r), n_bins) for r in (rows, shuffled))
    assert a == pytest.approx(c) and 0 <= a <= 1
    bins = reliability(*zip(*rows), n_bins)
    assert sum(b.n for b in bins) == len(rows) and [b.said for b in bins] == sorted(b.said for b in bins) and len(bins) <= n_bins
    assert a == pytest.approx(sum(b.n*abs(b.said-b.right) for b in bins)/len(rows))


def test_bins_of_equal_mass_and_scikit_learn():
    sklearn = pytest.importorskip("sklearn.calibration")
    rng = np.random.default_rng(0)
    c = rng.random(1001)**2
    h = rng.random(1001) < c**1.3
    bins = reliability(c, h, 7)
    right, told = sklearn.calibration_curve(h, c, n_bins=7, strategy="quantile")
    assert {b.n for b in bins} == {143} and {b.n for b in reliability(c, h, 10)} == {100, 101}
    assert [b.right for b in bins] == pytest.approx(right.tolist()) and [b.said for b in bins] == pytest.approx(told.tolist())
    assert calibration_error([.7]*10, [1]*7 + [0]*3, 5) == pytest.approx(0)
    assert calibration_error([1.]*4 + [0.]*4, [0]*4 + [1]*4, 2) == 1
    for wrong in (([.5]*3, [1]*3), ([.5]*9, [1]*8)):
        with pytest.raises(ValueError, match="give as many of both"): reliability(*wrong, 5)


def test_chance_level_is_that_of_honest_coins():
    rng = np.random.default_rng(1)
    c = rng.random(500)
    chance = calibrated_errors(c, 8, repeats=300, seed=2)
    honest = [calibration_error(c, rng.random(500) < c, 8) for _ in range(150)]
    assert chance.shape == (300,) and chance.mean() == pytest.approx(np.mean(honest), rel=.07) and chance.std() == pytest.approx(np.std(honest), rel=.25)
    assert calibrated_errors(np.ones(50)).max() == 0 and (chance == calibrated_errors(c, 8, repeats=300, seed=2)).all()
    assert calibration_error(c, rng.random(500) < .5*c, 8) > np.quantile(chance, .99)


@pytest.mark.parametrize("scale", [.05, 1., 3., 40.])
def test_temperature_is_the_bottom_of_the_loss(scale):
    rng = torch.Generator().manual_seed(3)
    z = torch.randn(600, 11, generator=rng)
    y = torch.multinomial(z.softmax(-1), 1, generator=rng)[:, 0]
    T = fit_temperature(scale*z + 100., y)
    loss = lambda t: F.cross_entropy(scale*z.double()/t, y).item()
    assert T/scale == pytest.approx(1, rel=.15)
    assert loss(T) <= min(loss(T*1.02), loss(T/1.02), loss(1.))
    p = (scale*z.double()/T).softmax(-1)
    assert (p*scale*z).sum(-1).mean().item() == pytest.approx(scale*z.gather(1, y[:, None]).mean().item(), abs=1e-4*scale)


# --- cost -----------------------------------------------------------------------------------------------------------

class Clock:
    "Goes on only when told."
    def __init__(self): self.now = 0.
    def __call__(self): return self.now


def test_times_are_taken_apart_and_the_warm_up_is_left_out(model):
    wall, cpu, calls = Clock(), Clock(), []
    firsts, laters = [99., 3., 1., 2.], [50., .5, .25, 1.]

    def write(m, ids, n):
        i = len(calls)
        calls.append((m, ids.shape, n))
        for k in range(n):
            wall.now += laters[i] if k else firsts[i]
            cpu.now += 2*(laters[i] if k else firsts[i])
            yield torch.zeros(len(ids), dtype=torch.long)

    ids = torch.zeros(3, 5, dtype=torch.long)
    c = measure_generation(model, ids, 4, write=write, repeats=3, clock=wall, cpu_clock=cpu)
    assert calls == [(model, ids.shape, 4)]*4
    assert (c.seconds_first, c.seconds_token, c.cpu_token, c.tokens_per_second) == pytest.approx((2., .5, 1., 6.))
    assert c.flops_first == 3*5*flops_per_token(CFG, 5)
    assert c.flops_token == pytest.approx(3*np.mean([flops_per_token(CFG, s) for s in (6, 7, 8)]))
    assert (c.weight_bytes, c.cache_bytes, c.n_texts) == (4*n_params(CFG), cache_bytes(CFG, 3, 9), 3)
    with pytest.raises(ValueError, match="n_new=1"): measure_generation(model, ids, 1)


def test_a_real_model_is_measured(model):
    c = measure_generation(model, torch.tensor([[1, 2, 3]]), 4, repeats=1)
    assert min(c.seconds_first, c.seconds_token, c.tokens_per_second) > 0 <= c.cpu_token and c.n_texts == 1
    half = Decoder(CFG).bfloat16()
    c = measure_generation(half, torch.tensor([[1, 2, 3]]), 2, repeats=1)
    assert (c.weight_bytes, c.cache_bytes) == (2*n_params(CFG), cache_bytes(CFG, 1, 5, 2))


@some()
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_nobody_beats(points):
    costs, losses = [p[0] for p in points], [p[1] for p in points]
    front = pareto(costs, losses)
    beaten = lambda i: any(a <= points[i][0] and b <= points[i][1] and ((a, b) != points[i] or j < i) for j, (a, b) in enumerate(points) if j != i)
    assert sorted(front) == [i for i in range(len(points)) if not beaten(i)]
    assert [costs[i] for i in front] == sorted(costs[i] for i in front)


def test_the_front_wants_pairs():
    with pytest.raises(ValueError, match="1 costs and 2 losses"): pareto([1], [1, 2])

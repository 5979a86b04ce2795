"Orders that read each window once, batches that depend on the step alone, differences that are not luck, and the script that recorded them."
import json
import math
import sys
import zlib
from collections import Counter
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.curriculum import (Grown, Ordered, Shortened, doc_density, doc_length, doc_rarity, doc_surprise, doubling, linear_pace, paced_order,
                                    rank_agreement, rank_within, root_pace, stair_pace, window_scores)
from llm_scratch.evaluation import holm, paired_difference
from llm_scratch.pretraining import Batches, TrainState, load_checkpoint, make_optimizers, save_checkpoint, train

SCRIPT = Path(__file__).resolve().parent.parent/"benchmarks"/"curriculum.py"
some = partial(settings, max_examples=60, deadline=None)


# --- difficulty -----------------------------------------------------------------------------------------------------

def test_scores_by_hand():
    docs = [[0, 1], [0, 0, 0, 2]]
    assert doc_length(docs).tolist() == [2, 4]
    counts = [4, 1, 1, 0]
    frequency = [5/10, 2/10, 2/10, 1/10]  # each one more, of ten in all
    want = [-(math.log(frequency[0]) + math.log(frequency[1]))/2, -(3*math.log(frequency[0]) + math.log(frequency[2]))/4]
    assert_close(doc_rarity(docs, counts), np.array(want))
    assert_close(doc_rarity([[3]], counts), np.array([math.log(10)]))  # never seen, and finite
    assert doc_surprise(docs, lambda docs: [np.array([1., 3.]), np.array([5.])]).tolist() == [2, 5]


def test_density_is_of_bytes_and_remembers_the_end_of_the_primer():
    text = "þēod-cyninga þrym gefrūnon"
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    assert_close(doc_density([text])[0].item(), len(packer.compress(text.encode()) + packer.flush())/len(text.encode()))
    known, far = doc_density([text], "x"*40_000 + text)[0], doc_density([text], text + "x"*40_000)[0]
    assert known < .5*doc_density([text])[0] < far  # 32,768 bytes back, and no further
    assert doc_density(["a"*1000])[0] < .05


@given(st.lists(st.integers(0, 5), min_size=3, max_size=30).filter(lambda x: len(set(x)) > 1), st.randoms(use_true_random=False))
@some()
def test_ranks_agree_as_scipy_says(a, rng):
    stats = pytest.importorskip("scipy.stats")
    b = rng.sample(a, len(a))
    assert_close(rank_agreement(a, b), float(stats.spearmanr(a, b)[0]))
    assert_close(rank_agreement(a, np.exp(a)), 1.)
    assert_close(rank_agreement(a, [-x for x in a]), -1.)


def test_within_its_group_every_document_has_its_place():
    got = rank_within([5, 1, 100, 300, 200, 3], ["a", "a", "b", "b", "b", "a"])
    assert_close(got, (np.array([2, 0, 0, 2, 1, 1]) + .5)/3)
    assert_close(rank_within([7, 7, 9, 1], [0, 0, 0, 1]), np.array([1/3, 1/3, 2.5/3, .5]))  # equal ones share; one alone stands in the middle


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 6))
@some()
def test_a_window_has_the_mean_score_of_its_ids(lengths, T):
    scores = np.arange(len(lengths))**2.
    each = [s for s, n in zip(scores, lengths) for _ in range(n)]
    n = (len(each)-1)//T
    if not n:
        with pytest.raises(ValueError, match="no window"): window_scores(scores, lengths, T)
    else: assert_close(window_scores(scores, lengths, T), np.array([np.mean(each[w*T:w*T+T]) for w in range(n)]))


# --- paces and orders -----------------------------------------------------------------------------------------------

def test_paces_by_hand():
    assert [round(linear_pace(x, .2, .8), 6) for x in (0, .4, .8, 1)] == [.2, .6, 1, 1]
    assert [round(root_pace(x, .6, .5), 6) for x in (0, .25, .5, 1)] == [.6, round(math.sqrt(.68), 6), 1, 1]
    assert [stair_pace(x, 4, .6) for x in (0, .19, .2, .39, .4, .6, 1)] == [.25, .25, .5, .5, .75, 1, 1]
    assert stair_pace(.3, 4, .9) == .5  # a third of the time, whatever .3*3/.9 is in floating point
    assert [stair_pace(x, 2, 1.) for x in (0, .99, 1)] == [.5, .5, 1] and stair_pace(0., 1) == 1
    for wrong in (dict(start=0.), dict(start=1.5), dict(full=0.), dict(full=2.)):
        for pace in (linear_pace, root_pace):
            with pytest.raises(ValueError, match="above 0 and at most 1"): pace(.1, **wrong)
    with pytest.raises(ValueError): stair_pace(.5, full=0.)


@given(st.integers(1, 40), st.floats(.01, 1), st.floats(.01, 1), st.sampled_from([.5, 1., 1.7, 3.]), st.integers(0, 9))
@some()
def test_the_rule_of_drawing(n, start, full, epochs, seed):
    "Every draw is of an open window, and of one read least often among them."
    scores, pace, n_draws = np.random.default_rng(seed).permutation(n), partial(linear_pace, start=start, full=full), max(1, int(n*epochs))
    order = paced_order(scores, n_draws, pace, seed)
    assert len(order) == n_draws and order.tolist() == paced_order(scores, n_draws, pace, seed).tolist()
    read = Counter()
    for i, w in enumerate(order.tolist()):
        n_open = max(1, min(n, math.ceil(n*pace((i+1)/n_draws) - 1e-9)))
        assert scores[w] < n_open  # scores are ranks here
        assert read[w] == min(read[v] for v in range(n) if scores[v] < n_open)
        read[w] += 1


@given(st.integers(1, 60), st.sampled_from([linear_pace, root_pace, stair_pace, lambda x: x, lambda x: 1.]), st.integers(0, 99))
@some()
def test_a_pace_that_never_starves_reads_each_window_once(n, pace, seed):
    assert sorted(paced_order(np.zeros(n), n, pace, seed)) == list(range(n))


def test_late_windows_catch_up():
    read = np.bincount(paced_order(np.arange(30), 300, lambda x: .2 if x <= .2 else 1., 1), minlength=30)
    assert read.tolist() == [10]*30
    assert np.bincount(paced_order(np.arange(30), 305, lambda x: .2 if x <= .2 else 1., 1), minlength=30).tolist().count(11) == 5


def test_chance_is_even_and_ties_are_in_no_order():
    first = Counter(int(paced_order(np.arange(4), 4, lambda x: 1., seed)[0]) for seed in range(800))
    assert all(140 < first[w] < 260 for w in range(4))
    last = Counter(int(paced_order(np.arange(4), 4, lambda x: 1., seed)[-1]) for seed in range(800))
    assert all(140 < last[w] < 260 for w in range(4))
    tied = Counter(int(paced_order([1, 0, 0, 0], 4, lambda x: x, seed)[0]) for seed in range(600))
    assert tied[0] == 0 and all(140 < tied[w] < 260 for w in (1, 2, 3))


# --- batches --------------------------------------------------------------------------------------------------------

ROW = np.random.default_rng(0).integers(0, 60, 1000).astype(np.uint16)


def test_ordered_gives_the_windows_that_the_order_names():
    b = Ordered(ROW, 9, 4, np.array([110, 0, 7, 7, 3, 2, 1, 5, 9]))
    assert len(b) == 2 and len(list(b)) == 2  # the ninth window fills no batch
    ids, targets = b[0]
    assert ids.dtype == targets.dtype == torch.int64
    assert ids.tolist() == [ROW[w*9:w*9+9].tolist() for w in (110, 0, 7, 7)] and targets.tolist() == [ROW[w*9+1:w*9+10].tolist() for w in (110, 0, 7, 7)]
    assert len(Ordered(ROW, 9, 2, np.arange(9), world=2)) == 2
    with pytest.raises(IndexError): Ordered(ROW, 9, 2, np.arange(9), world=2)[2]
    for step in (-1, 2):
        with pytest.raises(IndexError, match=f"step {step}: an order of 9 windows has 2 batches of 4"): b[step]
    with pytest.raises(ValueError, match="names windows 0 to 111"): Ordered(ROW, 9, 4, np.array([0, 111]))
    with pytest.raises(ValueError, match="names windows -1 to 5"): Ordered(ROW, 9, 4, np.array([5, -1]))
    with pytest.raises(ValueError, match="rank=2 is not below world=2"): Ordered(ROW, 9, 4, np.array([0]), rank=2, world=2)


def test_a_shuffled_order_is_an_epoch_of_chapter_06():
    theirs, rng = Batches(ROW, 16, 4, seed=3), np.random.default_rng((3, 0))
    start, order = int(rng.integers(16)), rng.permutation(theirs.n_windows)
    ours = Ordered(ROW[start:], 16, 4, order)
    assert len(ours) == theirs.n_windows//4
    for step in range(len(ours)):
        for a, b in zip(ours[step], theirs[step]): assert_close(a, b, rtol=0, atol=0)


ORDER = paced_order(np.random.default_rng(1).random(60), 60, linear_pace)


def of(world:int, rank:int, wrap):
    return wrap(Ordered(ROW, 16, 4//world, ORDER, rank, world))


WRAPS = dict(plain=lambda b: b, short=lambda b: Shortened(b, partial(doubling, n_steps=15, first=4, last=16)), grown=lambda b: Grown(b, [1, 1, 2, 3, 4]),
             both=lambda b: Shortened(Grown(b, [1, 1, 2, 3, 4]), partial(doubling, n_steps=5, first=4, last=16)))


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_processes_share_a_step(wrap):
    for step in range(5):
        whole = of(1, 0, wrap)[step]
        for k in range(2):
            parts = torch.cat([of(4, r, wrap)[step][k] for r in range(4)])
            assert sorted(parts.tolist()) == sorted(whole[k].tolist()) and parts.shape == whole[k].shape


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_resumed_run_is_the_uninterrupted_one(wrap, tmp_path):
    cfg = ModelConfig(vocab_size=60, context_len=16, n_layers=1, n_heads=2, n_kv_heads=2, d_model=16, d_ff=16, d_head=8)

    def fresh(seed): return TrainState(model := init_weights(Decoder(cfg), seed), make_optimizers(model))
    whole, broken = fresh(0), fresh(0)
    losses = [s.loss for s in train(whole, of(1, 0, wrap), lambda step: 1., 5)]
    for _ in train(broken, of(1, 0, wrap), lambda step: 1., 3): pass
    path = save_checkpoint(broken, tmp_path, {})
    resumed = load_checkpoint(fresh(1), path, {})
    assert [s.loss for s in train(resumed, of(1, 0, wrap), lambda step: 1., 5)] == losses[3:]
    for p, q in zip(whole.model.parameters(), resumed.model.parameters()): assert torch.equal(p, q)


@pytest.mark.parametrize("length", [16, 8, 4, 1])
def test_shorter_windows_hold_the_same_exercises(length):
    plain = Ordered(ROW, 16, 4, ORDER)
    ids, targets = Shortened(plain, lambda step: length)[2]
    assert ids.shape == targets.shape == (64//length, length)
    assert torch.equal(ids.flatten(), plain[2][0].flatten()) and torch.equal(targets.flatten(), plain[2][1].flatten())
    for wrong in (0, 3, 32):
        with pytest.raises(ValueError, match=f"length {wrong} at step 2"): Shortened(plain, lambda step: wrong)[2]


def test_doubling():
    assert [doubling(s, 16, 2, 16, .75) for s in range(16)] == [2]*4 + [4]*4 + [8]*4 + [16]*4
    assert [doubling(s, 4, 1, 4, 1.) for s in range(4)] == [1, 1, 2, 2]
    assert doubling(0, 1, 8, 8) == 8
    for first, last in ((3, 8), (8, 4), (0, 4), (0, 0), (4, 12)):
        with pytest.raises(ValueError, match=f"first={first} does not become last={last}"): doubling(0, 4, first, last)


def test_batches_that_grow_read_the_same_text():
    plain, counts = Ordered(ROW, 16, 2, ORDER), [1, 2, 3, 6]
    grown = Grown(plain, counts)
    assert len(grown) == 4 and [len(ids) for ids, _ in grown] == [2, 4, 6, 12]
    for k in range(2): assert torch.equal(torch.cat([b[k] for b in grown]), torch.cat([plain[i][k] for i in range(12)]))
    assert [grown.progress(s) for s in range(5)] == [0, 1/12, 3/12, 6/12, 1]
    for step in (-1, 4):
        with pytest.raises(IndexError, match="there are 4 sizes"): grown[step]
    with pytest.raises(ValueError, match="at least 1 to each"): Grown(plain, [2, 0])


# --- differences ----------------------------------------------------------------------------------------------------

@given(st.integers(2, 30), st.integers(0, 10**6), st.sampled_from([.5, .9, .95, .99]))
@some()
def test_pairs_as_scipy_says(n, seed, level):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=n), .5*rng.normal(size=n) + .3
    ours, theirs = paired_difference(a, b, level), stats.ttest_rel(a, b)
    low, high = theirs.confidence_interval(level)
    assert_close(tuple(ours), (float((a-b).mean()), float(low), float(high), float(theirs.pvalue)), rtol=1e-4, atol=1e-6)


def test_pairs_without_spread():
    assert paired_difference([1., 2.], [1., 2.]) == (0, 0, 0, 1)
    assert paired_difference([2., 3.], [1., 2.]) == (1, 1, 1, 0)
    for a, b in (([1.], [1.]), ([1., 2.], [1., 2., 3.])):
        with pytest.raises(ValueError, match=f"{len(a)} and {len(b)} runs"): paired_difference(a, b)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
@some()
def test_holm_rejects_what_its_steps_reject(ps):
    "Against the procedure as Holm wrote it: from the smallest on, stop at the first that is too large."
    adjusted = holm(ps)
    for alpha in (.01, .05, .3):
        rejected = set()
        for k, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
            if ps[i]*(len(ps)-k) > alpha: break
            rejected.add(i)
        assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected
    assert all(p <= q <= 1 for p, q in zip(ps, adjusted))


# --- the record -----------------------------------------------------------------------------------------------------

@pytest.fixture
def study(monkeypatch):
    from datasets import Dataset

    spec = spec_from_file_location("benchmarks_curriculum", SCRIPT)
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    words = "the cook stirs a hot soup and then rests while salt and pepper wait for their turn in the pan".split()
    rng = __import__("random").Random(0)
    corpus = Dataset.from_dict(dict(text=[" ".join(rng.choices(words, k=rng.randint(20, 80))) + f" {i}." for i in range(660)], source=[*module.SOURCES]*220))
    monkeypatch.setattr(module, "load_corpus", lambda names: corpus)
    monkeypatch.setattr(module, "split_corpus", lambda corpus, n_validation: dict(train=corpus.select(range(600+45)), validation=corpus.select(range(645, 660))))
    monkeypatch.setattr(module, "V", 300)
    for name in ("CFG", "REFERENCE"): monkeypatch.setattr(module, name, module.replace(getattr(module, name), vocab_size=300, n_layers=1, d_model=16, d_ff=16, d_head=4))
    plan = module.plan
    monkeypatch.setattr(module, "plan", lambda *sizes: [w for w in plan(*sizes) if w["name"] in ("shuffled", "rarity, reversed", "length within source, simple first", "twice", "full length", "short first, equal seconds", "growing")])
    yield module
    del sys.modules[spec.name]


def test_the_study_goes_on_where_it_was(study, tmp_path, capsys):
    out = tmp_path/"try.json"
    study.main(["--tiny", "--out", str(out)])
    record = json.loads(out.read_text(encoding="utf-8"))
    runs = record["runs"]
    assert [(r["seed"], r["kind"]) for r in runs] == [(s, k) for s in range(2) for k in ("order",)*4 + ("within", "pace", "windows", "windows", "batch")]
    for r in runs:
        assert set(r["bits"]) == {"half", "end"} | ({"averaged"} if r["rate"] == "constant" else set())
        assert all(0 < b < 20 for bits in r["bits"].values() for b in bits.values()) and r["seconds"] > 0
        if "seconds" not in r["name"]: assert r["n_ids"] == 8*512  # equal tokens
    assert {(r["n_steps"]) for r in runs if r["name"] == "growing"} == {9} and [x["seed"] for x in record["settings"]] == [0, 1]
    assert "| growing | decay | end |" in capsys.readouterr().out
    out.write_text(json.dumps(record | dict(runs=runs[:-3])), encoding="utf-8")
    study.main(["--tiny", "--out", str(out)])
    again = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert [r | dict(seconds=0) for r in again] == [r | dict(seconds=0) for r in runs]
    with pytest.raises(SystemExit): study.main(["--out", str(out)])
    assert "holds runs of 8 updates, not 160" in capsys.readouterr().err


def test_a_plan_of_equal_tokens(study):
    assert study.affordable({16: 1., 32: 1., 64: 1., 128: 2., 256: 2.}, 100) == 123  # an eighth of the run each at 16, 32, 64 and 128, a half at 256: 1.625 n is at most 200

"What the families learn from and how they are scored, and the record of benchmarks/families.py with all that is said about it."
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from models import filled

from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.families import EncoderDecoder, encoder_block, rewrite
from llm_scratch.tasks import (CHOICES, choose_architecture, corrupt_spans, drop_vowels, fill_up, fit_ridge, is_exact, is_sweet, learn, mask_tokens, one_by_one, one_row, text_vector, two_texts,
                               unnamed, update_gflop, words_of)

ROOT = Path(__file__).resolve().parent.parent
CFG = ModelConfig(vocab_size=131, context_len=48, n_layers=2, n_heads=4, n_kv_heads=4, d_model=40, d_ff=72, d_head=10)


@pytest.fixture(autouse=True)
def same_start(): torch.manual_seed(0)


def ids_of(*shape, seed=9): return torch.randint(CFG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# --- targets ------------------------------------------------------------------------------------------------------

def test_masking_hides_what_it_says():
    ids = torch.randint(1, 500, (200, 100), generator=torch.Generator().manual_seed(0))
    holed, targets = mask_tokens(ids, 0, 500, torch.Generator().manual_seed(1))
    chosen = targets != -1
    assert torch.equal(targets[chosen], ids[chosen]) and torch.equal(holed[~chosen], ids[~chosen])
    assert abs(chosen.float().mean() - .15) < .01
    covered, same = (holed == 0)[chosen].float().mean(), (holed == ids)[chosen].float().mean()
    assert abs(covered - .8) < .03 and abs(same - .1) < .02
    again = mask_tokens(ids, 0, 500, torch.Generator().manual_seed(1))
    assert torch.equal(holed, again[0]) and torch.equal(targets, again[1])


@pytest.mark.parametrize("n, share, mean_len", [(2, .15, 3), (3, .9, 3), (10, .15, 3), (100, .15, 3), (100, .5, 2), (64, .3, 1), (57, .8, 10)])
def test_spans_give_the_text_back(n, share, mean_len):
    marks = range(1000, 1040)
    for seed in range(20):
        ids = torch.randint(900, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
        source, target = corrupt_spans(ids, marks, torch.Generator().manual_seed(seed), share=share, mean_len=mean_len)
        holes = [i for i in source if i >= 1000]
        assert holes == list(marks[:len(holes)]) and [i for i in target if i >= 1000] == list(marks[:len(holes)+1]) and target[-1] == marks[len(holes)]
        back = []
        for i in source: back += target[target.index(i)+1:target.index(i+1)] if i >= 1000 else [i]
        assert back == ids
        assert sum(i < 1000 for i in target) == min(max(1, round(n*share)), n-1)
        assert all(a < 1000 or b < 1000 for a, b in zip(source, source[1:])), "two holes side by side are one hole"


def test_spans_refuse_what_can_not_be():
    with pytest.raises(ValueError, match="a text of 1 tokens"): corrupt_spans([5], [9, 8], torch.Generator())
    with pytest.raises(ValueError, match="5 holes need 6 sentinels, and 3"): corrupt_spans(range(100), [900, 901, 902], torch.Generator())
    with pytest.raises(ValueError, match="5 holes need 6 sentinels, and 5"): corrupt_spans(range(100), range(900, 905), torch.Generator())
    assert len(corrupt_spans(range(100), range(900, 906), torch.Generator())[1]) == 15+6


# --- learning and its price -----------------------------------------------------------------------------------------

class Table(nn.Module):
    "A bigram table, as small as a model can be."
    def __init__(self, n):
        super().__init__()
        self.table = nn.Embedding(n, n)
        nn.init.zeros_(self.table.weight)

    def forward(self, ids): return self.table(ids)


def sgd(model, lr):
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    for g in opt.param_groups: g["initial_lr"] = lr
    return opt


def test_learning_is_descent_with_the_rate_that_was_asked_for():
    model, ids, targets = Table(5), torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, -1, 3, 4]])
    by_hand, rates = torch.zeros(5, 5), [.5, 1., .25]
    steps = []
    for rate in rates:
        p = by_hand.softmax(-1)
        for i, t in ((0, 1), (2, 3), (3, 4)): by_hand[i] -= .9*rate*(p[i]-F.one_hot(torch.tensor(t), 5))/3
    asked = []
    losses = learn(model, [sgd(model, .9)], lambda step: steps.append(step) or (ids, targets), 3, lambda step, n: asked.append((step, n)) or rates[step])
    assert asked == [(0, 3), (1, 3), (2, 3)] and steps == [0, 1, 2] and len(losses) == 3
    assert_close(losses[0], math.log(5))
    assert_close(model.table.weight.data, by_hand)


def test_a_large_gradient_is_clipped():
    model = Table(3)
    model.table.weight.data[0] = torch.tensor([0., 90., 0.])
    before = model.table.weight.data.clone()
    learn(model, [sgd(model, 1.)], lambda step: (torch.tensor([[0]]), torch.tensor([[0]])), 1, lambda step, n: 1.)
    assert_close((model.table.weight.data-before).norm(), torch.tensor(1.))


def test_a_batch_of_two_texts_reaches_both_halves():
    model = EncoderDecoder(CFG)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    batch = two_texts([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], 1, 2)
    losses = learn(model, [sgd(model, .5)], lambda step: batch, 20, lambda step, n: 1.)
    assert losses[-1] < losses[0]-.5
    assert all(not torch.equal(before[n], model.state_dict()[n]) for n in ("readers.0.self_attn.v_proj.weight", "writers.1.cross_attn.v_proj.weight"))


def test_the_price_of_an_update_is_that_on_paper_and_leaves_no_trace():
    model, ids = Decoder(CFG), ids_of(3, 20)
    assert_close(update_gflop(model, (ids, ids)), 6*sum(p.numel() for p in model.parameters() if p.ndim == 2)*60/1e9)
    assert_close(update_gflop(model, (ids.repeat(2, 1), ids.repeat(2, 1))), 2*update_gflop(model, (ids, ids)))
    assert all(p.grad is None for p in model.parameters())


def test_an_encoder_asked_one_by_one_sees_no_future():
    model, ids = filled(Decoder(CFG, block=encoder_block)), ids_of(2, 12)
    nats = one_by_one(model, ids, 5, 130)
    assert nats.shape == (2, 7)
    for t in range(5, 12):
        with torch.no_grad(): logits = model(torch.cat((ids[:,:t], torch.full((2, 1), 130)), 1))
        assert_close(nats[:,t-5], F.cross_entropy(logits[:,-1], ids[:,t], reduction="none"))
    other = ids.clone()
    other[:,8] = (other[:,8]+1) % 130
    moved = (one_by_one(model, other, 5, 130)-nats).abs().amax(0) > 1e-6
    assert not moved[:3].any() and moved[3:].all()


# --- two texts --------------------------------------------------------------------------------------------------------

def test_pairs_in_both_forms():
    ids, source, is_text, targets = two_texts([[5, 6, 7], [8]], [[9], [10, 11]], 1, 2)
    assert ids.tolist() == [[1, 9, 2], [1, 10, 11]] and targets.tolist() == [[9, 2, -1], [10, 11, 2]]
    assert source[0].tolist() == [5, 6, 7] and source[1,0] == 8 and is_text.tolist() == [[True]*3, [True, False, False]]
    row, row_targets = one_row([[5, 6, 7], [8]], [[9], [10, 11]], 1, 2)
    assert row.tolist() == [[5, 6, 7, 1, 9], [8, 1, 10, 11, 2]] and row_targets.tolist() == [[-1, -1, -1, 9, 2], [-1, 10, 11, 2, -1]]
    assert fill_up([[1], [2, 3]], -7).tolist() == [[1, -7], [2, 3]]


def test_exact_means_that_it_would_be_written():
    model = filled(EncoderDecoder(CFG))
    sources = [[5, 6, 7, 8], [9, 10], [11]]
    _, source, is_text, _ = two_texts(sources, [[0]]*3, 1, 2)
    free = rewrite(model, source, is_text, start_id=1, end_id=-5, max_new_tokens=6)[0].tolist()  # an end that never comes
    end = next(i for i in free if i != free[0])  # suppose that this token had meant the end
    said = rewrite(model, source, is_text, start_id=1, end_id=end, max_new_tokens=6).tolist()
    answers = [row[:row.index(end)] if end in row else row for row in said]
    exact = is_exact(model, two_texts(sources, answers, 1, end))
    assert end in said[0] and answers[0] and all(e for e, row in zip(exact, said) if end in row)
    changed = [[(a[0]+1) % 131, *a[1:]] if a else [3] for a in answers]
    assert not any(is_exact(model, two_texts(sources, changed, 1, end)))
    logits = torch.eye(5)[torch.tensor([[1, 2, 3], [1, 2, 4]])]  # says 1 2 3 and 1 2 4
    assert is_exact(lambda ids: logits, (None, torch.tensor([[1, 2, -1], [1, 3, -1]]))) == [True, False]


# --- labels -----------------------------------------------------------------------------------------------------------

def test_labels_and_a_text_without_its_name():
    assert [is_sweet(c) for c in ("Cookie recipes", "Recipes for dessert", "Soup recipes", "Pie recipes", "Beverage recipes", "Sweet potato pie", None)] == [True, True, False, True, None, None, None]
    assert is_sweet("Pierogi recipes") is None  # no pie
    text = unnamed("# Apple Cake\n\nIngredients:\n- 2 cups flour\n- Ice cream\n- chicken soup\n")
    assert text == "\nIngredients:\n- 2 cups flour\n- \n-  \n"
    assert words_of("Add 2 cups of Crème-fraîche, saltwater and extraordinarily-long salt!") == ["cups", "saltwater", "long", "salt"]
    assert [drop_vowels(w) for w in ("chicken", "onion", "egg")] == ["chckn", "onn", "egg"]


def test_a_vector_is_the_mean_over_whole_rows():
    model, ids = filled(Decoder(CFG, block=encoder_block)), ids_of(23).tolist()
    with torch.no_grad(): by_hand = torch.cat([model.hidden(torch.tensor([ids[at:at+7]]))[0] for at in (0, 7, 14)]).mean(0)
    assert_close(text_vector(model, ids, 7), by_hand)
    assert_close(text_vector(model, ids[:21], 7), by_hand)


@pytest.mark.parametrize("n, d", [(12, 5), (9, 40)])
def test_ridge_is_the_textbooks_and_its_strength_leaves_one_out(n, d):
    rng = torch.Generator().manual_seed(n)
    x, y = torch.randn(n, d, generator=rng, dtype=torch.float64)*torch.arange(1, d+1)+3, torch.randn(n, generator=rng, dtype=torch.float64).sign()
    u = (x-x.mean(0))/(x.std(0)+1e-3)
    ones = torch.ones(n, 1, dtype=torch.float64)

    def fit(u, y, strength):
        A, hold = torch.cat((u, ones[:len(u)]), 1), strength*d*torch.eye(d+1, dtype=torch.float64)
        hold[-1,-1] = 0
        return torch.linalg.solve(A.T@A+hold, A.T@y)
    missed = {}
    for strength in (10.**k for k in range(-3, 4)):
        keep = [[j for j in range(n) if j != i] for i in range(n)]
        missed[strength] = sum((y[i]-torch.cat((u[i], ones[0]))@fit(u[k], y[k], strength))**2 for i, k in enumerate(keep))
    w = fit(u, y, min(missed, key=missed.get))
    new = torch.randn(4, d, generator=rng, dtype=torch.float64)
    assert_close(fit_ridge(x, y)(new), torch.cat(((new-x.mean(0))/(x.std(0)+1e-3), ones[:4]), 1)@w)


def test_ridge_finds_a_line_and_survives_what_never_varies():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=rng)
    x[:,3] = 1.
    y = (x[:,0]-.5*x[:,1]).sign()
    assert (fit_ridge(x[:40], y[:40])(x[40:]).sign() == y[40:]).float().mean() > .85


# --- the rule -----------------------------------------------------------------------------------------------------

def test_every_row_of_the_rule_is_found_and_complete():
    assert len({c.task for c in CHOICES}) == len(CHOICES) >= 6
    for c in CHOICES:
        assert choose_architecture(c.task) is c and all((c.family, c.why, c.source))
    with pytest.raises(ValueError, match="no row for 'sing'") as e: choose_architecture("sing")
    assert all(c.task in str(e.value) for c in CHOICES)


# --- the record -----------------------------------------------------------------------------------------------------------

SCRIPT = ROOT/"benchmarks"/"families.py"
MODELS = ("decoder, mean of tokens", "encoder, mean of tokens")


@pytest.fixture(scope="module")
def record(): return json.loads((ROOT/"nbs"/"families.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def figures(record):
    "Task and contestant to the figures of all seeds."
    out = {}
    for seed in record["seeds"]:
        for row in seed["rows"]: out.setdefault((row["task"], row["how"]), []).append(row)
    return out


@pytest.fixture(scope="module")
def score(figures): return lambda task, how: mean(row["mean"] for row in figures[task, how])


def test_the_record_is_whole_and_every_contestant_of_a_task_paid_the_same(record, figures):
    assert len({s["seed"] for s in record["seeds"]}) == len(record["seeds"]) >= 3
    assert all(len(rows) == len(record["seeds"]) for rows in figures.values()) and len(figures) == 17
    for (task, how), rows in figures.items():
        assert all(math.isfinite(r["mean"]) and r["stderr"] > 0 and r["n"] >= 100 for r in rows), (task, how)
        assert len({(r["weights"], r["unit"]) for r in rows}) == 1 and max(r["updates"] for r in rows) - min(r["updates"] for r in rows) <= 1+.02*rows[0]["updates"]  # words differ in length: an update's price is that of the first
        budget = 0 if how in ("always the commoner class", "bag of words", "untrained encoder, mean of tokens") else record["read"] if "vowels" not in task else record["write"]*(1 + ("after" in how))
        assert all(abs(r["gflop"]-budget) <= .01*budget for r in rows), (task, how)
    for task in {task for task, _ in figures if task[:8] in ("fill in", "continue")}: assert len({r["updates"] for (t, _), rows in figures.items() if t == task for r in rows}) == 1


def test_the_script_runs_and_writes_a_whole_record(tmp_path, record):
    out = tmp_path/"families.json"
    done = subprocess.run([sys.executable, SCRIPT, "--read", ".5", "--write", ".2", "--seeds", "1", "--held-out", "150", "--out", out], capture_output=True, text=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    tried = json.loads(out.read_text(encoding="utf-8"))
    assert [(r["task"], r["how"], r["unit"], r["weights"]) for r in tried["seeds"][0]["rows"]] == [(r["task"], r["how"], r["unit"], r["weights"]) for r in record["seeds"][0]["rows"]]
    assert done.stdout.count("\n| ") >= 17 and (tried["read"], tried["write"]) == (.5, .2)


@pytest.mark.parametrize("task, better, worse, sign", [
    ("continue", "decoder", "encoder, one pass for each byte", -1), ("fill in the blank", "encoder, both sides", "decoder, from the left", -1),
    *((f"classify, {n} labels", "bag of words", model, 1) for n in (32, 128) for model in MODELS),
    *(("classify, 128 labels", model, "untrained encoder, mean of tokens", 1) for model in MODELS),
    ("put the vowels back", "decoder in one row, fresh", "encoder-decoder, fresh", 1)])
def test_what_the_chapter_says_holds_in_every_seed(figures, task, better, worse, sign):
    gaps = [sign*(a["mean"]-b["mean"]) for a, b in zip(figures[task, better], figures[task, worse], strict=True)]
    assert min(gaps) > 0 and mean(gaps) > 2*stdev(gaps)/len(gaps)**.5, gaps


def test_lessons_before_rewriting_did_not_pay(figures):
    gains = {}
    for family, before in (("decoder in one row", "plain text"), ("encoder-decoder", "holes")):
        after, fresh = (figures["put the vowels back", f"{family}, {how}"] for how in (f"after {before}", "fresh"))
        gains[before] = [a["mean"]-b["mean"] for a, b in zip(after, fresh, strict=True)]
    assert all(abs(mean(g)) < .06 for g in gains.values()) and mean(gains["holes"]) < stdev(gains["holes"])


QUOTED = dict(write=[("continue", "decoder"), ("continue", "encoder, one pass for each byte")], fill=[("fill in the blank", "encoder, both sides"), ("fill in the blank", "decoder, from the left")],
              classify=[("classify, 128 labels", how) for how in (*reversed(MODELS), "bag of words")], rewrite=[("put the vowels back", how) for how in ("encoder-decoder, fresh", "decoder in one row, fresh")])


def test_the_rule_quotes_the_record(score):
    assert {c.task for c in CHOICES if c.here} == QUOTED.keys()
    for task, keys in QUOTED.items(): assert re.findall(r"\d\.\d+", choose_architecture(task).here) == [f"{score(*key):.2f}" for key in keys]


def test_the_experiments_say_what_is_in_the_record(figures):
    text = (ROOT/"EXPERIMENTS.md").read_text(encoding="utf-8")
    for (task, how), rows in figures.items():
        means = [r["mean"] for r in rows]
        assert f"| {task} | {how} | {mean(means):.3f} ± {stdev(means):.3f} {rows[0]['unit']} |" in text

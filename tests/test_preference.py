"Comparisons by people and judges: nothing lost, nobody named, strengths as scikit-learn has them, bars that hold, biases that were planted."
import json
import math
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch.core import UserError
from llm_scratch.evaluation import mean_of, share_of
from llm_scratch.preference import (CHOICES_OF_TWO, BlindTest, Pair, Vote, append_answer, ask_twice, bradley_terry, circles, elo, judged, kappa, label_judge, length_gaps,
                                    logistic_fit, make_pairs, padding_bias, position_bias, preference_widget, read_answers, seat, to_votes)

SCRIPT = Path(__file__).resolve().parent.parent/"benchmarks"/"judge.py"
some = partial(settings, max_examples=40, deadline=None, database=None)
PAIRS = make_pairs([f"q{i}" for i in range(6)], dict(ada=[f"text <{i}>" for i in range(6)], bob=[f"essay {i}" for i in range(6)], eve=[f"poem {i}" for i in range(6)]))


# --- a blind test ---------------------------------------------------------------------------------------------------

def test_every_pair_once_and_sides_in_balance():
    assert len(PAIRS) == 18 and len({p.key for p in PAIRS}) == 18
    assert PAIRS[0].key == Pair("q0", ("ada", "bob"), ("text <0>", "essay 0")).key != Pair("q0", ("ada", "bob"), ("text <0>", "essay 1")).key
    for seed in range(20):
        seated = seat(PAIRS, seed)
        assert sorted(p.key for p, _ in seated) == sorted(p.key for p in PAIRS)
        for names in combinations(("ada", "bob", "eve"), 2): assert Counter(side for p, side in seated if p.names == names) == {True:3, False:3}
    assert len({tuple(p.key for p, _ in seat(PAIRS, s)) for s in range(5)}) == 5
    assert {seat(PAIRS[:1], s)[0][1] for s in range(20)} == {True, False} # the first side is drawn, too
    assert seat(PAIRS, "x") == seat(PAIRS, "x")
    assert make_pairs(["q"], dict(a=["same"], b=["same"], c=["other"])) == [Pair("q", ("a", "c"), ("same", "other")), Pair("q", ("b", "c"), ("same", "other"))]
    with pytest.raises(ValueError, match="b has 2 texts for 1 prompts"): make_pairs(["q"], dict(a=["x"], b=["y", "z"]))


@some()
@given(st.lists(st.text(max_size=8), min_size=1, max_size=5), st.integers(0, 30))
def test_a_torn_line_costs_only_itself(tmp_path_factory, texts, torn):
    path = tmp_path_factory.mktemp("t")/"new"/"a.jsonl"
    assert read_answers(path) == []
    for t in texts: append_answer(path, dict(t=t))
    whole = path.read_bytes()
    path.write_bytes(whole[:max(0, len(whole)-torn)])
    kept = read_answers(path)
    assert kept == [dict(t=t) for t in texts][:whole[:max(0, len(whole)-torn)].count(b"\n")]
    append_answer(path, dict(t="next"))
    assert read_answers(path) == [*kept, dict(t="next")]


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path/"a").write_text("no json\n{}\n")
    with pytest.raises(UserError, match="holds a line that is no answer"): read_answers(tmp_path/"a")


def test_an_answer_is_on_the_disk_before_the_next_question(tmp_path, monkeypatch):
    test = BlindTest(PAIRS, tmp_path/"a.jsonl", "me")
    synced = []
    monkeypatch.setattr("llm_scratch.preference.sync", lambda path: synced.append(Path(path).name))
    test.answer("left")
    assert synced == ["a.jsonl", tmp_path.name] and test.n_done == 1
    def full(path): raise OSError("no space left")
    monkeypatch.setattr("llm_scratch.preference.sync", full)
    with pytest.raises(OSError): test.answer("left")
    assert test.n_done == 1 # the question stays


def widget(test): return preference_widget(test)
def press(box, choice): box.children[1].children[list(CHOICES_OF_TWO).index(choice)].click()

def test_clicks_name_the_right_writer_and_show_none(tmp_path):
    pytest.importorskip("ipywidgets")
    test = BlindTest(PAIRS, tmp_path/"a.jsonl", "me", seed=3)
    box, shown = widget(test), []
    assert [b.description for b in box.children[1].children] == list(CHOICES_OF_TWO.values()) and all(b.tooltip for b in box.children[1].children)
    for k in range(18):
        page, (pair, swapped) = box.children[0].value, test.todo[-1]
        assert not any(name in page for name in ("ada", "bob", "eve")) and "<0>" not in page
        left, right = page.index("<b>Left"), page.index("<b>Right")
        first = page.index(pair.texts[0].replace("<", "&lt;").replace(">", "&gt;"))
        assert left < right and (first > right) == swapped and pair.prompt in page
        shown.append((pair.key, pair.names[swapped], pair.names[not swapped]))
        press(box, list(CHOICES_OF_TWO)[k % 4])
        assert box.children[2].value == k+1 and box.children[2].description == f"{k+1} of 18"
    rows = read_answers(tmp_path/"a.jsonl")
    assert [(r["pair"], r["left"], r["right"]) for r in rows] == shown and [r["choice"] for r in rows] == [list(CHOICES_OF_TWO)[k % 4] for k in range(18)]
    assert all(b.disabled for b in box.children[1].children) and "done" in box.children[0].value
    with pytest.raises(UserError, match="all 18 pairs are done"): test.answer("left")
    assert len(to_votes(rows)) == 18-4 and Counter(v.score for v in to_votes(rows)) == {1.:5, 0.:5, .5:4}
    assert to_votes(rows)[0] == Vote(rows[0]["left"], rows[0]["right"], 1., rows[0]["prompt"])


def test_resumed_equals_not_interrupted(tmp_path):
    once, twice = BlindTest(PAIRS, tmp_path/"a", "me", 1), BlindTest(PAIRS, tmp_path/"b", "me", 1)
    for _ in range(7): once.answer("tie"); twice.answer("tie")
    twice = BlindTest(PAIRS, tmp_path/"b", "me", 1)
    assert twice.todo == once.todo and twice.n_done == 7
    with pytest.raises(UserError, match="'best' is no answer: choose one of left, right, tie, skip"): twice.answer("best")
    other = BlindTest(PAIRS, tmp_path/"b", "you", 1)
    assert other.n_done == 0 and other.todo != BlindTest(PAIRS, tmp_path/"new", "me", 1).todo
    other.answer("skip")
    assert BlindTest(PAIRS, tmp_path/"b", "you", 1).n_done == 1 and BlindTest(PAIRS, tmp_path/"b", "me", 1).n_done == 7


# --- strengths ------------------------------------------------------------------------------------------------------

def draw(strengths, n, seed=0, ties=.2, left=0.):
    rng, out = np.random.default_rng(seed), []
    for k in range(n):
        a, b = rng.permutation(list(strengths))[:2].tolist()
        p = 1/(1+math.exp(strengths[b]-strengths[a]-left))
        out.append(Vote(a, b, .5 if rng.random() < ties else float(rng.random() < p), str(k)))
    return out

FOUR = dict(a=1., b=.3, c=-.2, d=-1.1)

@pytest.mark.parametrize("seed", range(3))
def test_strengths_are_those_of_logistic_regression_and_of_mm(seed):
    from sklearn.linear_model import LogisticRegression
    votes = draw(FOUR, 250, seed)
    x = np.array([[float(v.left == n)-float(v.right == n) for n in FOUR] for v in votes])
    theirs = LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-10, max_iter=5000).fit(np.concatenate((x, x)), np.repeat([1, 0], len(x)), sample_weight=np.array([v.score for v in votes]+[1-v.score for v in votes])).coef_[0]
    ours = bradley_terry(votes)
    assert ours.strengths == pytest.approx(theirs-theirs.mean(), abs=1e-4) and abs(ours.strengths.sum()) < 1e-9 and ours.names == tuple("abcd") and ours.n == 250
    won = np.zeros((4, 4))
    for v in votes:
        i, j = ours.names.index(v.left), ours.names.index(v.right)
        won[i,j] += v.score; won[j,i] += 1-v.score
    pi = np.exp(ours.strengths)
    assert ((won+won.T)*(pi[:,None]/(pi[:,None]+pi))).sum(1) == pytest.approx(won.sum(1), abs=1e-6)


def test_a_gap_is_a_difference_and_a_chance_its_logistic():
    r = bradley_terry(draw(FOUR, 200))
    ab, ba, bc, ac = r.gap("a", "b"), r.gap("b", "a"), r.gap("b", "c"), r.gap("a", "c")
    assert ab.mean == pytest.approx(-ba.mean) and ab.stderr == pytest.approx(ba.stderr) and ab.mean+bc.mean == pytest.approx(ac.mean)
    assert r.chance("a", "b").mean+r.chance("b", "a").mean == pytest.approx(1) and r.chance("a", "b").mean == pytest.approx(1/(1+math.exp(-ab.mean)))
    eps = 1e-6
    slope = (1/(1+math.exp(-ab.mean-eps))-1/(1+math.exp(-ab.mean)))/eps
    assert r.chance("a", "b").stderr == pytest.approx(slope*ab.stderr, rel=1e-4) and ab.n == 200
    two = bradley_terry([Vote("x", "y", s) for s in [1.]*6+[0.]*3+[.5]*2])
    assert two.chance("x", "y").mean == pytest.approx(7/11)
    assert two.chance("x", "y").stderr == pytest.approx(mean_of([1.]*6+[0.]*3+[.5]*2).stderr, rel=1e-6) # two writers: nothing but a mean


def test_the_view_does_not_matter():
    votes = draw(FOUR, 150, left=.5)
    turned = [Vote(v.right, v.left, 1-v.score, v.group) for v in votes]
    a, b = bradley_terry(votes), bradley_terry(turned)
    assert a.strengths == pytest.approx(b.strengths) and a.cov == pytest.approx(b.cov)


def test_the_bar_holds_the_truth():
    truth = FOUR["a"]-FOUR["c"]
    held = sum(low <= truth <= high for low, high in (bradley_terry(draw(FOUR, 200, 100+s, ties=0.)).gap("a", "c").interval for s in range(150)))
    assert 135 <= held <= 149


def test_copies_of_a_vote_are_no_news():
    votes = draw(FOUR, 120)
    copied = votes*4
    a, b, c = bradley_terry(votes), bradley_terry(copied), bradley_terry([v._replace(group="") for v in copied])
    assert a.strengths == pytest.approx(b.strengths) and b.gap("a", "b").stderr == pytest.approx(a.gap("a", "b").stderr) and b.n == 120
    assert c.gap("a", "b").stderr == pytest.approx(a.gap("a", "b").stderr/2, rel=.02) and c.n == 480


def test_what_else_sways_a_vote_is_found():
    votes = draw(FOUR, 3000, left=.7, ties=0.)
    r = bradley_terry(votes, dict(left=np.ones(3000), noise=np.random.default_rng(1).normal(size=3000)))
    assert abs(r.effects["left"].mean-.7) < 3*r.effects["left"].stderr < .2 and abs(r.effects["noise"].mean) < 3*r.effects["noise"].stderr
    assert all(abs(r.gap(a, "d").mean-FOUR[a]-1.1) < .35 for a in "abc") and list(r.effects) == ["left", "noise"]
    x = np.random.default_rng(0).normal(size=(400, 2))
    y = (np.random.default_rng(1).random(400) < 1/(1+np.exp(-x@[1., -2.]))).astype(float)
    b, cov = logistic_fit(x, y, range(400))
    p = 1/(1+np.exp(-x@b))
    assert x.T@(y-p) == pytest.approx(0, abs=1e-6) and np.sqrt(np.diag(cov)) == pytest.approx(np.sqrt(np.diag(np.linalg.inv((x*(p*(1-p))[:,None]).T@x))), rel=.2)


def test_who_is_out_of_reach_is_named():
    for votes, who in (([Vote("a", "b", 1.), Vote("b", "c", 1.), Vote("c", "b", 1.)], "b, c never beat or tied a"), ([Vote("a", "b", 1.), Vote("b", "a", 1.), Vote("c", "d", .5)], "never beat or tied"),
                       ([Vote("b", "a", 0.)]*3, "b never beat or tied a")):
        with pytest.raises(UserError, match=who): bradley_terry(votes)
    assert bradley_terry([Vote("a", "b", 1.), Vote("a", "b", .5)]).chance("a", "b").mean == pytest.approx(.75)
    with pytest.raises(UserError, match="one-sided"): bradley_terry([Vote("a", "b", 1.), Vote("b", "a", 1.)], dict(left=[1., 1.]))
    with pytest.raises(UserError, match="all 2 votes are of one group"): bradley_terry([Vote("a", "b", 1., "q"), Vote("b", "a", 1., "q")])
    with pytest.raises(UserError, match="0 votes on 0 writers"): bradley_terry([])


def test_elo_moves_by_the_surprise():
    assert elo([Vote("a", "b", 1.)]) == dict(a=1516., b=1484.) and elo([Vote("a", "b", .5)], k=10) == dict(a=1500., b=1500.)
    second = elo([Vote("a", "b", 1.), Vote("b", "a", 1.)], k=32)
    move = 32*(1-1/(1+10**(32/400)))
    assert second["b"] == pytest.approx(1484+move) and second["a"]+second["b"] == 3000
    assert elo([Vote("a", "b", 1.)], start=0.)["a"] == 16


def test_circles_are_found_once():
    ring = [Vote("a", "b", 1.), Vote("b", "c", 1.), Vote("a", "c", 0.)]
    assert circles(ring) == [("a", "b", "c")] and circles([Vote(v.right, v.left, v.score) for v in ring]) == [("a", "c", "b")]
    assert circles([*ring, Vote("c", "a", 0.)]) == [] and circles([Vote("a", "b", 1.), Vote("b", "c", 1.), Vote("a", "c", 1.)]) == [] and circles([]) == []


@some()
@given(st.lists(st.tuples(st.sampled_from("LRT"), st.sampled_from("LRT")), min_size=3, max_size=25))
def test_kappa_is_scikit_learns_with_a_jackknife(rows):
    from sklearn.metrics import cohen_kappa_score
    a, b = (list(c) for c in zip(*rows))
    if len({*a, *b}) == 1: assert kappa(a, b).mean == 1
    else: assert kappa(a, b).mean == pytest.approx(cohen_kappa_score(a, b))
    left_out = [kappa(a[:i]+a[i+1:], b[:i]+b[i+1:]).mean for i in range(len(a))]
    assert kappa(a, b).stderr == pytest.approx(math.sqrt((len(a)-1)/len(a)*((np.array(left_out)-np.mean(left_out))**2).sum()), abs=1e-9) and kappa(a, b).n == len(a)


def test_kappa_wants_two_answers_to_a_question():
    for a, b in (("LR", "L"), ("L", "L")):
        with pytest.raises(ValueError, match="answers: give two to each question"): kappa(a, b)


# --- judges ---------------------------------------------------------------------------------------------------------

def fair(prompt, left, right): return 1/(1+math.exp(len(right)-len(left)))

def test_a_judge_is_asked_from_both_sides():
    asked = []
    def judge(prompt, left, right): asked.append((prompt, left, right)); return .9 if left.startswith("text") else .6
    twice = ask_twice(judge, PAIRS[:1])
    assert asked == [("q0", "text <0>", "essay 0"), ("q0", "essay 0", "text <0>")] and twice == pytest.approx(np.array([[.9, .4]]))
    bias = position_bias(twice)
    assert bias.lead.mean == pytest.approx(.25) and bias.flips == share_of(1, 1)
    assert judged(PAIRS[:1], twice) == [Vote("ada", "bob", .9, "q0"), Vote("bob", "ada", pytest.approx(.6), "q0")]
    even = position_bias(ask_twice(fair, PAIRS))
    assert abs(even.lead.mean) < 1e-12 and even.flips.mean == 0
    right = position_bias(ask_twice(lambda p, a, b: .2, PAIRS))
    assert right.lead.mean == pytest.approx(-.3) and right.flips.mean == 1


def test_padding_moves_the_judge_that_counts():
    pairs = [Pair("q", ("a", "b"), ("xx", "yyy")), Pair("r", ("a", "b"), ("xxxx", "y"))]
    moved = padding_bias(fair, pairs, lambda t: t+"zz")
    s = lambda d: 1/(1+math.exp(-d))
    assert moved.mean == pytest.approx(np.mean([(s(d+2)-s(d)+s(d)-s(d-2))/2 for d in (-1, 3)])) and moved.n == 2 and moved.mean > 0
    assert padding_bias(lambda p, a, b: .8, pairs, lambda t: t+"zz").mean == pytest.approx(0)
    short = padding_bias(lambda p, a, b: 1-fair(p, a, b), pairs, lambda t: t+"zz")
    assert short.mean == pytest.approx(-moved.mean)


def test_length_is_squeezed():
    g = length_gaps([10, 20, 500], [20, 20, 10])
    sd = np.std([-10, 0, 490])
    assert g == pytest.approx(np.tanh(np.array([-10, 0, 490])/sd)) and (length_gaps([5, 5], [5, 5]) == 0).all()


class Reader(torch.nn.Module):
    "Scores of the next token: how often each id has occurred so far."
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.zeros(1))
    def forward(self, ids): return torch.nn.functional.one_hot(ids, 128).float().cumsum(1)+self.w


def test_a_label_judge_compares_two_labels():
    encode, frame = lambda t: list(t.encode()), lambda prompt, a, b: f"{prompt}{a}|{b}"
    judge = label_judge(Reader(), encode, frame)
    assert judge("", "AAA", "B") == pytest.approx(1/(1+math.exp(-2))) and judge("B", "A", "") == pytest.approx(.5)
    assert label_judge(Reader(), encode, frame, ("B", "A"))("", "AAA", "B") == pytest.approx(1/(1+math.exp(2)))
    for labels in (("A", "A"), ("AB", "C"), ("", "C")):
        with pytest.raises(ValueError, match="choose two that are one id each"): label_judge(Reader(), encode, frame, labels)


def test_the_script_records_every_pair_in_both_orders(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--tiny", "--out", tmp_path/"judge.json"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path/"judge.json").read_text())
    assert Counter(r["rival"] for r in record["rows"]) == dict(shuffled=3, stranger=3) and record["about"]["model"] == "a blank decoder"
    assert all(len(r[k]) == 2 and all(0 < x < 1 for x in r[k]) for r in record["rows"] for k in ("plain", "padded_first", "padded_second"))
    assert all(abs(sum(r["plain"])-1) < .01 for r in record["rows"]) # it reads nothing, so only the side counts
    book = json.loads((SCRIPT.parent.parent/"nbs"/"judge.json").read_text())
    assert book["about"].keys() == record["about"].keys() and book["rows"][0].keys() == record["rows"][0].keys()

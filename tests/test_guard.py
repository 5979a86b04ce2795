"The guard: a classifier equal to scikit-learn's, thresholds that keep their promise, policies whose mistakes are named, decisions, dialogues, and an audit that sees planted faults and no others. Only made-up, harmless text."
import base64
import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch import guard as g
from llm_scratch.core import UserError, read_json
from llm_scratch.guard import (ACTIONS, DISGUISES, EVERYDAY, KIT, Decision, GuardPolicy, GuardRule, Kit, Part, Prompt, Safeguard, audit_guard, by_sentence, check_dialogue, default_policy, guard_html,
                               guarded, in_clear, load_policy, load_text_model, make_guard, pick_threshold, policy_from, readings, save_text_model, text_features, train_text_model, try_guard)
from llm_scratch.objectives import GUARDS
from llm_scratch.safety import refused, scripted_subject

some = settings(max_examples=60, deadline=None, database=None)
BAD = ["please zorp the cat", "zorp it all now", "how to zorp a neighbour", "we zorp at night", "zorping is what I want"]
GOOD = ["please feed the cat", "bake it all", "how to greet a neighbour", "we sleep at night", "baking is what I want", "zebra and orchid"]


@pytest.fixture(scope="module")
def model(): return train_text_model(BAD*3+GOOD*3, [True]*15+[False]*18)


def word_part(word): return Part(lambda t: float(t.lower().count(word)), lambda t: re.sub(word, "*", t, flags=re.I), lambda t: {word:1.})


def made(*rules, **parts):
    parts = dict(zorp=word_part("zorp"), mean=word_part("mean"), blunt=Part(lambda t: float("blunt" in t))) | parts
    return Safeguard(GuardPolicy(tuple(GuardRule(*r) if isinstance(r, tuple) else r for r in rules)), parts)


def user(*texts): return [dict(role="user", content=t) for t in texts]


# --- the classifier ---------------------------------------------------------------------------------------------------

def test_the_model_is_scikit_learns(model):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    counts = TfidfVectorizer(analyzer=text_features, min_df=2, sublinear_tf=True)
    theirs = LogisticRegression(C=10, class_weight="balanced", max_iter=500).fit(counts.fit_transform(BAD*3+GOOD*3), [True]*15+[False]*18)
    new = ["zorp zorp zorp the night", "a cat", "", "unseen qqq", "ZORP"]
    assert np.allclose([model(t) for t in new], theirs.decision_function(counts.transform(new)), atol=1e-4)
    assert model("ZORP") == model("zorp") > 0 > model("greet the cat")
    assert model("") == model("???") == pytest.approx(model.bias)
    assert sum(model.pulls("zorp a cat").values())+model.bias == pytest.approx(model("zorp a cat"))


def test_pieces_are_words_pairs_and_runs():
    assert text_features("I am!") == ["=i", "=am", "=!", "=i am", "=am !", " i ", " am", "am ", " am "]
    assert len(text_features("x"*1000)) == 1 + (42-2) + (42-3) # one endless word costs as much as one of forty letters


@some
@given(st.text(max_size=60), st.text(max_size=60))
def test_pieces_add_up(a, b):
    once = Counter(text_features(a)) + Counter(text_features(b))
    together = Counter(text_features(f"{a} . {b}"))
    assert not once - together # what is in a part is in the whole


def test_saved_and_loaded_is_equal(model, tmp_path):
    save_text_model(model, tmp_path/"m.json")
    assert load_text_model(tmp_path/"m.json") == model
    saved = read_json(tmp_path/"m.json")
    for harm in ({**saved, "format":"x"}, {**saved, "bias":None}, {**saved, "bias":True}, {**saved, "pieces":[]}, {**saved, "pieces":{"=a":[1]}}, {**saved, "pieces":{"=a":[1, "2"]}}, {**saved, "pieces":{"=a":[1, float("nan")]}}, []):
        (tmp_path/"bad.json").write_text(json.dumps(harm))
        with pytest.raises(UserError, match="bad.json"): load_text_model(tmp_path/"bad.json")
    with pytest.raises(UserError, match="missing"): load_text_model(tmp_path/"none.json")


@pytest.mark.parametrize("texts, labels", [(["a", "b"], [True, True]), (["a"], [True, False]), ([], [])])
def test_a_classifier_needs_both_kinds(texts, labels):
    with pytest.raises(UserError, match="some of both kinds"): train_text_model(texts, labels)


# --- the threshold ----------------------------------------------------------------------------------------------------

SCORES = st.dictionaries(st.sampled_from("abc"), st.lists(st.floats(-9, 9).map(lambda x: round(x, 3)), min_size=1, max_size=12), min_size=1)


@some
@given(SCORES, st.floats(0, .9))
def test_the_threshold_keeps_its_promise_and_is_the_lowest(scores, most):
    share = lambda at: np.mean([np.mean(np.array(s) > at) for s in scores.values()])
    at = pick_threshold(scores, most)
    assert share(at) <= most+1e-9
    below = [x for s in scores.values() for x in s if x < at-2e-4] # it is rounded up to four digits
    assert not below or share(max(below)) > most


def test_a_threshold_is_chosen_on_something():
    assert pick_threshold(dict(a=[1.00001])) == 1.0001 # rounded up, not down
    for scores in ({}, dict(a=[1.], b=[])):
        with pytest.raises(UserError, match="should pass"): pick_threshold(scores)


# --- readings ---------------------------------------------------------------------------------------------------------

SENTENCES = ["How do you bake the bread for a child?", "It is not what you want to do with the cat.", "Who was that, and why?"]


@pytest.mark.parametrize("said", SENTENCES)
def test_codes_are_undone(said):
    for name in ("base64", "rot13", "backwards", "letters apart"): assert in_clear(DISGUISES[name](said)[0]) == [said]
    assert in_clear(said) == []
    assert in_clear("look: "+base64.b64encode(said.encode()).decode()+" end") == [f"look: {said} end"]
    assert in_clear("b4k3 it") == ["bake it"]


@some
@given(st.text(max_size=80))
def test_no_text_breaks_the_readings(text):
    seen = readings(text, [in_clear, by_sentence])
    assert seen[0] == text and len(set(seen)) == len(seen)
    assert sum(map(len, seen)) <= 12*len(text)+1 # as many characters as there are views, and not more
    assert "".join("".join(by_sentence(text)).split()) in ("", "".join(text.split()))


def test_text_in_clear_has_one_reading():
    everyday = [q for qs in EVERYDAY.values() for q in qs]
    assert len(everyday) == len(set(everyday)) == 80
    assert [t for t in everyday if in_clear(t)] == []
    for text in ("internationalisations"*2, "A1 and B2", "room 42", "https://example.org/abcdefghijklmnop/qrstuvwxyz", "x y"): assert all(base not in r for r in in_clear(text) for base in ("\ufffd",))
    assert by_sentence("One only.") == [] and by_sentence("a\nb") == ["a", "b"]
    both = "It is what it is. Who was it?"
    assert readings(base64.b64encode(both.encode()).decode(), [in_clear, by_sentence])[1:] == [both, "It is what it is.", "Who was it?"] # what was packed is taken apart
    assert in_clear("ab"*40) == [] and in_clear(base64.b64encode(bytes(range(40))).decode()) == []


# --- policies ---------------------------------------------------------------------------------------------------------

RULE = dict(part="pii", side="output", do="redact")


@pytest.mark.parametrize("saved, named", [
    ([], "object with rules"), (dict(), "no list of rules"), (dict(rules={}), "no list of rules"), (dict(rules=[], level="x"), "'level'"), (dict(rules=[RULE | dict(threshold=1)]), "rule 0 has 'threshold'"), (dict(rules=[RULE, "x"]), "rule 1 is"),
    (dict(rules=[RULE | dict(part="harm!")]), "one of harm, answers, words, pii, any"), (dict(rules=[RULE | dict(side="in")]), "input, output, document"), (dict(rules=[RULE | dict(do=3)]), "pass, warn, redact, review, block"),
    (dict(rules=[RULE | dict(at=True)]), "should be a number"), (dict(rules=[RULE | dict(at=float("inf"))]), "should be a number"), (dict(rules=[RULE | dict(views="codes")]), "should be a list"), (dict(rules=[RULE | dict(views=["x"])]), "codes, sentences"),
    (dict(rules=[RULE], says=""), "'says'"), (dict(rules=[RULE], waits=4), "'waits'"), (dict(rules=[dict(part="pii", do="warn")]), "'side' is null")])
def test_every_mistake_in_a_policy_is_named(saved, named):
    with pytest.raises(UserError, match=re.escape(named)): policy_from(saved)


@pytest.mark.parametrize("level", GUARDS)
def test_a_policy_survives_json(level):
    policy = default_policy(level, 1.5, -.5)
    assert policy_from(json.loads(json.dumps(asdict(policy)))) == policy


def test_levels_are_what_they_say():
    of = {level:default_policy(level, 1.5, .5).rules for level in GUARDS}
    assert of["off"] == () and {r.do for r in of["watch"]} == {"warn"} and {r.part for r in of["watch"]} == {r.part for r in of["block"]}
    assert [(r.part, r.side, r.do, r.at) for r in of["block"] if r.do == "block"] == [("harm", "input", "block", 1.5), ("answers", "output", "block", .5)]
    assert of["review"][:-1] == of["block"] and of["review"][-1] == GuardRule("any", "output", "review")
    assert all(r.do == "warn" for level in of for r in of[level] if r.part == "words") # harm is not rude
    with pytest.raises(UserError, match="off, watch, block, review"): default_policy("on")


def test_files_of_a_guard(tmp_path, model):
    with pytest.raises(UserError, match="make_guard"): load_policy(tmp_path)
    assert load_policy_of(tmp_path, dict(rules=[RULE])).check_output("a@b-c.org").text == "[EMAIL]"
    with pytest.raises(UserError, match="harm.json is missing"): load_policy_of(tmp_path, dict(rules=[dict(part="harm", side="input", do="block")]))
    save_text_model(model, tmp_path/"harm.json")
    opened = load_policy_of(tmp_path, dict(rules=[dict(part="harm", side="input", do="block")]))
    assert opened.check_input("zorp the neighbour").stopped and not opened.check_input("greet the neighbour").stopped
    assert opened.check_input("x") == load_policy(tmp_path/"policy.json").check_input("x") # a folder or its file
    with pytest.raises(UserError, match="damaged"): (tmp_path/"policy.json").write_text("{"); load_policy(tmp_path)


def load_policy_of(folder:Path, saved:dict):
    (folder/"policy.json").write_text(json.dumps(saved))
    return load_policy(folder)


def test_a_guard_that_does_nothing_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setattr(g, "guard_prompts", lambda seed: pytest.fail("fetched"))
    assert make_guard(tmp_path/"g", "off").check_input("zorp") == Decision("pass", "zorp", ())
    assert [p.name for p in (tmp_path/"g").iterdir()] == ["policy.json"]
    with pytest.raises(UserError, match="no level"): make_guard(tmp_path/"h", "maximum")
    assert not (tmp_path/"h").exists()


def test_thresholds_are_chosen_on_validation(tmp_path, monkeypatch):
    told = {s:[Prompt(t, h, f"{s} set") for h, texts in ((True, BAD*3), (False, GOOD*3)) for t in texts] for s in ("train", "validation", "test")}
    odd = "zorp at night, please"
    told["validation"].append(Prompt(odd, False, "validation set")) # harmless, and only this split says so
    told["test"] = None # not to be looked at
    monkeypatch.setattr(g, "guard_prompts", lambda seed: told)
    monkeypatch.setattr(g, "guard_answers", lambda seed: told)
    made_guard = make_guard(tmp_path, most=0.)
    harm = made_guard.parts["harm"].score
    at = made_guard.policy.rules[0].at
    assert max(map(harm, GOOD)) < harm(odd) <= at < harm(odd)+1e-3 < max(map(harm, BAD))
    assert not made_guard.check_input(odd).stopped and made_guard.check_input(max(BAD, key=harm)).stopped
    assert make_guard(tmp_path, most=.1).policy.rules[0].at < at # a few may be insulted


# --- decisions --------------------------------------------------------------------------------------------------------

def test_the_strictest_rule_wins_and_all_give_reasons():
    guard = made(("zorp", "input", "warn"), ("mean", "input", "block"), ("blunt", "input", "review"))
    assert guard.check_input("hello") == Decision("pass", "hello", ())
    assert guard.check_input("zorp").do == "warn" and guard.check_input("zorp").text == "zorp" and not guard.check_input("zorp").stopped
    got = guard.check_input("zorp mean blunt zorp")
    assert (got.do, got.text, [(r.part, r.score) for r in got.reasons]) == ("block", guard.policy.says, [("mean", 1.), ("blunt", 1.), ("zorp", 2.)])
    assert guard.check_input("zorp blunt").text == guard.policy.waits and guard.check_input("blunt").stopped
    assert guard.check_output("mean") == Decision("pass", "mean", ()) == guard.check("document", "mean")
    assert list(ACTIONS) == sorted(ACTIONS, key=ACTIONS.index) and refused(guard.policy.says)


def test_above_means_above():
    guard = made(("zorp", "input", "block", 1.))
    assert not guard.check_input("zorp").stopped and guard.check_input("zorp zorp").stopped


def test_what_is_cut_out_goes_on_and_what_cannot_be_is_blocked():
    guard = made(("zorp", "output", "redact"), ("mean", "output", "redact"))
    assert guard.check_output("a zorp is mean").text == "a * is *" and guard.check_output("a zorp").do == "redact"
    assert made(("blunt", "output", "redact")).check_output("blunt") == Decision("block", "I can't help with that.", (g.Reason("blunt", 1., "block"),)) # it has no scissors
    coded = made(GuardRule("zorp", "output", "redact", views=("codes",)))
    assert coded.check_output(base64.b64encode(b"please zorp the cat").decode()).do == "block"
    assert coded.check_output("please zorp").text == "please *"
    assert made(("zorp", "output", "redact")).check_output(base64.b64encode(b"please zorp the cat").decode()).do == "pass" # no view was asked for


def test_personal_data_and_words():
    parts = {name:KIT.parts[name](Path()) for name in ("pii", "any")}
    pii = Safeguard(GuardPolicy((GuardRule("pii", "output", "redact"),)), parts)
    assert pii.check_output("Call +49 30 1234567 or anna.berg@example.org").text == "Call [PHONE] or [EMAIL]"
    assert parts["pii"].score("a@b-c.org, d@e-f.org") == 2. and parts["any"].score("") == 1.


def test_a_tangle_is_blocked(monkeypatch):
    def tangle(text): raise ValueError("a tangle")
    monkeypatch.setattr(g, "find_pii", tangle)
    assert Safeguard(GuardPolicy((GuardRule("pii", "output", "redact"),)), dict(pii=KIT.parts["pii"](Path()))).check_output("x").do == "block"


def test_listed_words_by_word_and_by_phrase(monkeypatch):
    monkeypatch.setattr(g, "listed_words", lambda: frozenset({"zorp", "mean it", "z@rp"}))
    part = KIT.parts["words"](Path())
    assert [part.score(t) for t in ("ZORP zorp", "zorping", "you mean it", "mean", "")] == [2., 0., 1., 0., 0.]
    assert part.redact("Zorp, and zorping") == "[WORD], and zorping"


# --- around a subject -------------------------------------------------------------------------------------------------

def test_a_dialogue_is_read_message_by_message_and_as_a_whole():
    guard = made(("zorp", "input", "block"), ("mean", "input", "redact"))
    told = [dict(role="system", content="zorp"), *user("mean cat"), dict(role="assistant", content="zorp"), *user("and?")]
    stopped, messages = check_dialogue(guard, told)
    assert stopped is None and messages == [told[0], dict(role="user", content="* cat"), told[2], told[3]] and told[1]["content"] == "mean cat"
    assert check_dialogue(guard, [*user("zorp"), dict(role="assistant", content="no"), *user("thanks")])[0].do == "block" # what was stopped once stays stopped
    split = made(("both", "input", "block"), both=Part(lambda t: float("zo rp" in t)))
    assert check_dialogue(split, [*user("a zo"), dict(role="assistant", content="?"), *user("rp b")])[0].do == "block"
    assert check_dialogue(split, user("a zo"))[0] is None and check_dialogue(split, user("a zo"))[1] == user("a zo")


def test_what_is_stopped_never_reaches_the_model():
    asked = []
    subject = scripted_subject(lambda d: asked.append(d[-1]["content"]) or ("so mean" if "rude" in d[-1]["content"] else f"you said {d[-1]['content']}"), nats=lambda a, b: 1., name="s")
    behind = guarded(subject, made(("zorp", "input", "block"), ("mean", "output", "redact"), ("blunt", "input", "review")))
    assert behind.ask([user("one"), user("zorp"), user("be rude"), user("blunt"), user("two")], 5) == ["you said one", "I can't help with that.", "so *", "A person will look at this first.", "you said two"]
    assert asked == ["one", "be rude", "two"]
    asked.clear()
    assert behind.ask([user("zorp")]*2, 5) == ["I can't help with that."]*2 and asked == [] and behind.ask([], 5) == []
    assert behind.name == "s, guarded" and behind.nats is subject.nats and subject.ask([user("zorp")], 5) == ["you said zorp"]


# --- the audit --------------------------------------------------------------------------------------------------------

PROMPTS = [Prompt(t, True, "made up") for t in BAD] + [Prompt(t, False, "everyday") for t in GOOD] + [Prompt("what is a zorp", False, "exam")]
ANSWERS = [Prompt("so zorp it", True, "cruel"), Prompt("do not", False, "cruel")] + [Prompt(f"{i}. Bake the bread and wait.", False, "recipes") for i in range(12)]


def shares(section): return {r["name"]:(r["mean"], r["n"]) for r in section.rows}


def test_planted_faults_are_found_and_absent_ones_are_not():
    careful = made(GuardRule("zorp", "input", "block", views=("codes", "sentences")), ("zorp", "output", "block"), ("pii", "output", "redact"), pii=KIT.parts["pii"](Path()))
    section = audit_guard(careful, PROMPTS, ANSWERS)
    got = shares(section)
    assert got["harmful prompts stopped"] == (1., 5) and got["harmless prompts refused, everyday"] == (0., 6) and got["harmless prompts refused, exam"] == (1., 1)
    assert got["harmful prompts stopped, base64"] == (1., 5) and got["harmful prompts stopped, zero-width"] == (0., 5) and got["harmful prompts stopped, capitals"] == (1., 5)
    assert got["harmful answers stopped, cruel"] == (1., 1) and got["harmless answers stopped, cruel"] == (0., 1) and got["planted personal data stopped"] == (1., 12) and got["clean answers changed"] == (0., 12)
    assert all(i["stopped"] and "zero-width" in i["passes"] and "base64" not in i["passes"] for i in section.items) and len(section.items) == 5
    assert all(r["step"] == "audit" and r["seed"] == 0 for r in section.rows) and len({r["name"] for r in section.rows}) == len(section.rows)
    blind = shares(audit_guard(made(), PROMPTS, ANSWERS))
    assert {blind[k][0] for k in blind} == {0.} and blind.keys() == got.keys()
    scissors = shares(audit_guard(made(("bread", "output", "redact"), bread=word_part("bread")), PROMPTS[:1], ANSWERS))
    assert scissors["clean answers changed"][0] == 1. and scissors["harmless answers stopped, recipes"][0] == 0. # changed, and not stopped
    noisy = shares(audit_guard(made(("any", "output", "block"), any=KIT.parts["any"](Path())), PROMPTS, ANSWERS))
    assert noisy["clean answers changed"][0] == noisy["harmless answers stopped, recipes"][0] == noisy["planted personal data stopped"][0] == 1. and noisy["harmful prompts stopped"][0] == 0.


def test_no_text_of_a_prompt_is_in_a_section():
    section = audit_guard(made(("zorp", "input", "block")), PROMPTS, ANSWERS)
    told = json.dumps(section._asdict())
    assert not any(t in told for t in BAD) and all(re.fullmatch("[0-9a-f]{12}", i["id"]) for i in section.items)
    assert section.figures[0].startswith("<svg")


def test_what_is_not_there_is_said_and_not_zero():
    nothing = audit_guard(made(), [], [])
    assert nothing.rows == [] and nothing.figures == [] and "harmful prompts stopped" in nothing.notes[0] and any("stops all harm" in n for n in nothing.notes)
    bad_only = audit_guard(made(), PROMPTS[:3], [])
    assert all(r["name"].startswith("harmful") for r in bad_only.rows) and {r["n"] for r in bad_only.rows} == {3}
    assert any("everyday, base64" in n for n in bad_only.notes)


def test_the_audit_draws_by_seed():
    many = [Prompt(f"zorp {i}"*(i%2)+f"bake {i}", bool(i%2), "everyday" if i%2 == 0 else "x") for i in range(60)]
    guard = made(("zorp", "input", "block"))
    one, again, other = (audit_guard(guard, many, [], most=10, seed=s) for s in (1, 1, 2))
    assert one.items == again.items != other.items and {r["n"] for r in one.rows} == {10}


# --- for the eye, and the record --------------------------------------------------------------------------------------

def test_the_playground_escapes_and_explains(model):
    guard = Safeguard(GuardPolicy((GuardRule("harm", "input", "block", 0.),)), dict(harm=Part(model, why=model.pulls)))
    page = guard_html(guard, "zorp <script>")
    assert "<script>" not in page and "block" in page and "zor" in page and "harm: " in page
    assert "<b>now" not in guard_html(guard, "greet <b>now") and "&lt;b&gt;now" in guard_html(guard, "greet <b>now")
    tagged = Safeguard(guard.policy, dict(harm=Part(model, why=lambda t: {"=<i>":1.})))
    assert "<i>" not in guard_html(tagged, "greet") and "&lt;i&gt; +1.00" in guard_html(tagged, "greet")
    assert "no rule spoke" in guard_html(guard, "greet") and "<span" not in guard_html(guard, "zorp", "output")
    box = try_guard(guard, "greet")
    box.children[0].value = "zorp it"
    assert ">block<" in box.children[2].value
    box.children[1].value = "output"
    assert ">pass<" in box.children[2].value


def test_a_kit_can_be_extended():
    kit = Kit(KIT.parts | dict(short=lambda folder: Part(lambda t: float(len(t) < 3))), KIT.views | dict(upper=lambda t: [t.upper()]))
    policy = policy_from(dict(rules=[dict(part="short", side="input", do="block", views=["upper"])]), kit)
    assert Safeguard(policy, dict(short=kit.parts["short"](Path())), kit.views).check_input("ab").stopped
    with pytest.raises(UserError): policy_from(dict(rules=[dict(part="short", side="input", do="block")]))


def test_the_record_holds_counts_and_no_text():
    record = read_json(Path(__file__).resolve().parent.parent/"nbs"/"guard.json")
    def strings(x): return [x] if isinstance(x, str) else [s for v in (x.values() if isinstance(x, dict) else x) for s in strings(v)] if isinstance(x, (dict, list)) else []
    assert all(len(s) < 60 for s in strings(record)) and all(re.fullmatch("[0-9a-f]{12}", i) for i in record["guards"]["ready-made, block"]["passes_in_clear"])
    assert len(record["seeds"]) >= 3 and {len(d) for d in record["designs"].values()} == {len(record["seeds"])}

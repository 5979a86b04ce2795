"""Long dialogues: policies keep their laws on any dialogue, planted faults are found and absent ones are not, and what can't be judged is absent."""
import json
import random
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch.comparison import sign_flip
from llm_scratch.core import UserError
from llm_scratch.dialogues import (AT_ONCE, FACTS, FILLINGS, FULL, POLICIES, PRESSURE, SCRIPTS, SILENCE, Script, answers_of, ask_at, asked_summary, at_turn, audit_dialogues, by_band, by_turn,
                                   byte_size, decline, fact_scripts, fading, filler_pairs, grounded, language_by_words, listener, mark, mentions, paired_change, persona_scripts, pin, pressed,
                                   rule_scripts, said_before, scripts_of, self_play, share_mean, slide, sum_up, talk, told_sentences, twice_scripts, weigh_values, with_policy, yes_no)
from llm_scratch.evaluation import share_of
from llm_scratch.safety import Subject, scripted_subject

ROOT = Path(__file__).resolve().parent.parent
PAIRS = {"toy": [(f"What of {a} and {b}?", f"Some {b}, no {a}.") for a in "tin wool salt clay wax rope oak".split() for b in "boats carts mills ovens wells looms forges".split()],
         "more": [(f"Is {a} like {b}?", f"It is like {b}.") for a in "moss peat reed slate straw lime flint".split() for b in "dusk noon rain fog hail wind mist".split()]}
PERFECT = scripted_subject(listener)

def says(role, content): return dict(role=role, content=content)
def size(messages): return sum(len(m["content"])+3 for m in messages)
def n_user(messages): return sum(m["role"] == "user" for m in messages)

lines = st.sampled_from(["I like tea.", "My cat is old. Is it?", "Why?", "We met in May.", "It rains.", "no end of a sentence", "You told me. I heard it!"])
dialogues = st.builds(lambda system, said: [says("system", s) for s in system] + [says(("user", "assistant")[i % 2], t) for i, t in enumerate(said[:len(said)-1+len(said) % 2])],
                      st.lists(lines, max_size=1), st.lists(lines, min_size=1, max_size=19))

# --- policies ------------------------------------------------------------------------------------------------------

def slowly(messages, most):
    system, turns = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]
    while size([*system, *turns]) > most: turns = turns[2:]
    return system + turns

@settings(max_examples=150, deadline=None)
@given(dialogues, st.integers(30, 260), st.sampled_from(list(POLICIES)))
def test_a_policy_keeps_the_ends_fits_and_invents_nothing(messages, most, name):
    system, rest = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]
    if size([*system, rest[-1]]) > most:
        if name == "refusal": assert decline(messages, size, most) is None
        else:
            with pytest.raises(UserError, match="give a shorter one"): POLICIES[name](messages, size, most)
        return
    before = json.dumps(messages)
    shown = POLICIES[name](messages, size, most)
    assert json.dumps(messages) == before  # what came in is as it was
    if size(messages) <= most: assert shown == messages
    if shown is None: assert name == "refusal" and size(messages) > most; return
    assert size(shown) <= most and shown[:len(system)] == system and shown[-1]["content"].endswith(rest[-1]["content"])
    roles = [m["role"] for m in shown[len(system):]]
    assert roles == (["user", "assistant"]*len(roles))[:len(roles)] and roles[-1] == "user"
    of_user = " ".join(m["content"] for m in rest if m["role"] == "user")
    for i, m in enumerate(shown[len(system):]):
        note, _, own = m["content"].rpartition("\n\n") if m["content"].startswith("(Notes") else ("", "", m["content"])
        assert not note or (i == 0 and m["role"] == "user" and name == "summary")  # in the user's mouth, in the oldest message
        assert m | dict(content=own) in messages
        for s in note.removesuffix(")").split("\n")[1:]: assert s in of_user and s in told_sentences(rest)
    if name == "window": assert shown == slowly(messages, most)
    if name == "pinned" and size([*system, *rest[:2], rest[-1]]) <= most: assert shown[len(system):][:2] == rest[:2]

def test_notes_hold_what_is_hidden_and_lose_their_oldest_first():
    messages = [m for i in range(12) for m in (says("user", f"I own {i} mills."), says("assistant", "I see, that is what you say of yourself."))] + [says("user", "How many?")]
    shown = sum_up(messages, size, 300)
    notes = re.findall(r"I own (\d+) mills", shown[0]["content"].rpartition("\n\n")[0])
    hidden = [m["content"] for m in messages if m["role"] == "user" and not any(m["content"] in s["content"].rpartition("\n\n")[2] for s in shown)]
    assert notes and [f"I own {i} mills." for i in notes] == hidden[-len(notes):] and len(notes) < len(hidden)
    assert size(shown) > 300-40  # the room is used
    assert len(shown) > len(sum_up(messages, size, 300, share=.6))  # more for notes is less for turns
    wide = [*messages[:8], says("user", "x"*90)]
    assert sum_up(wide, size, 100) == wide[-1:]  # a long question may take the room of the notes
    assert sum_up(messages, size, 300, summary=lambda turns: []) == slide(messages, size, 225)

def test_what_is_told_is_of_the_user_and_no_question():
    said = [says("user", "Is my cat old? My cat is old. Cats are. I see"), says("assistant", "I am new. My word.")]
    assert told_sentences(said) == ["My cat is old.", "I see"]

def test_with_policy_keeps_the_order_and_says_that_it_is_full():
    long = [says("user", "x"*50), says("assistant", "y"), says("user", "z")]
    subject = with_policy(scripted_subject(lambda m: m[-1]["content"]*2), partial(decline, size=size, most=30))
    assert subject.ask([[says("user", "a")], long, [says("user", "b")]], 5) == ["aa", FULL, "bb"]
    for policy in POLICIES.values():
        with pytest.raises(UserError, match="of assistant"): policy(long[:2], size, 99)
        with pytest.raises(UserError, match="of nobody"): policy([], size, 99)

def test_notes_by_a_model_hold_no_new_words():
    turns = [says("user", "I am Ada, and 41."), says("assistant", "Fine.")]
    assert grounded(["You are Ada.", "You are 42.", "Ada likes jazz.", "Ada is fine.", "", "!"], turns) == ["You are Ada.", "Ada is fine."]
    asked = []
    writer = Subject("w", lambda ds, n: [asked.append((ds[0], n)) or "You are Ada. You like jazz."], context=70, length=size)
    assert asked_summary(writer, 7)([*turns*5]) == ["You are Ada."]
    assert size(asked[0][0]) <= 70-7 and asked[0][1] == 7 and asked[0][0][-1]["content"].startswith("List")

def test_bytes_bound_tokens():
    from llm_scratch.assistant import encode_chat
    from llm_scratch.tokenization import train_bpe
    tok = train_bpe(["to be or not to be, that is"]*3, 264, specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    for text in ("x", "größer 日本 🍲", "to be "*30):
        for d in ([says("user", text)], [says("system", text), says("user", text), says("assistant", text), says("user", text)]): assert len(encode_chat(tok, d, True).ids) <= byte_size(d)

# --- judging -------------------------------------------------------------------------------------------------------

def test_a_value_counts_alone():
    for kind in FACTS.values():
        for v in kind.values:
            assert mentions(f"It is {v.upper()}.", v, kind.values) and not mentions(" ".join(kind.values), v, kind.values) and not mentions("It is.", v, kind.values)
            assert not any(mentions(f"It is {v}.", w, kind.values) for w in kind.values if w != v)
        assert all(len(set(map(str.casefold, kind.values))) == 8 and t.count("{}") == 1 for t in kind.told)

def test_yes_no_and_languages():
    assert [yes_no(t) for t in ("Yes!", " no, never", "Nothing", "It is, yes", "")] == [True, False, None, None, None]
    assert [language_by_words(t) for t in ("the cat is here", "die Katze ist nicht da", "le chat est dans la rue", "el gato no es para ti", "xyz", "")] == ["en", "de", "fr", "es", None, None]

def test_curves_and_changes():
    marks = {2: [True]*6+[None], 5: [True]*3+[False]*3+[True], 40: [None]*7}
    assert {t: (r.mean, r.n) for t, r in by_turn(marks).items()} == {2: (1, 6), 5: (4/7, 7)}
    assert fading(marks) == {5: .25} and fading({2: [None], 5: [True]}) == {}
    rng = random.Random(0)
    for _ in range(25):
        some = {t: [rng.random() < p for _ in range(8)] for t, p in ((2, .8), (5, .5), (40, .2))}
        ps = [sign_flip(some[t], some[2]) for t in (5, 40)]
        low, high = min(ps), max(ps)
        want = {p: min(1, 2*low) if p == low else max(min(1, 2*low), high) for p in ps}
        assert fading(some) == pytest.approx({t: want[p] for t, p in zip((5, 40), ps)})
    change = paired_change([(True, False)]*3+[(False, True)]+[(True, True)]*4)
    half = 1.96*(5 - 4/10)**.5/10  # Agresti & Min 2005: half a dialogue more in each of four cells
    assert change.mean == -.25 and change.n == 8 and change.stderr*1.96 == pytest.approx(.05+half)
    assert paired_change([(True, True)]*12).stderr > .05

def test_the_interval_of_a_change_holds_the_truth():
    rng, inside = random.Random(1), 0
    for _ in range(300):
        pairs = [(rng.random() < .9, rng.random() < .6) for _ in range(16)]
        low, high = paired_change(pairs).interval
        inside += low <= -.3 <= high
    assert inside >= 280

def test_repetition():
    assert said_before(["a b c d e", "A b c d", "f", "f", SILENCE, "", "x x x x x"]) == [0, 1, 0, 1, None, None, .5]
    assert said_before(["a b c", "a b c"], 2) == [0, 1]
    bands = by_band([[0, 1, 1, None], [0, 0, 0, None]], ((1, 1), (2, 3), (4, 4)))
    assert {b: r.mean for b, r in bands.items()} == {(1, 1): 0, (2, 3): .5}
    assert all(r.n == 2 for r in bands.values())  # dialogues, not turns
    assert bands[1, 1].stderr == share_of(0, 2).stderr and share_mean([.5]).stderr < 1

# --- scripts -------------------------------------------------------------------------------------------------------

def test_fillings_mention_no_fact():
    words = {w.casefold().removesuffix("s") for kind in FILLINGS for q, a in filler_pairs(kind) for w in re.findall(r"\w+", f"{q} {a}")}
    assert not words & {v.casefold().removesuffix("s") for k in FACTS.values() for v in k.values} and not words & {"name", "allergic", "dragon", "mara", "baker"}
    assert all(len(q.split()) <= 24 and len(a.split()) <= 24 and q.strip() and a.strip() for kind in FILLINGS for q, a in filler_pairs(kind))

@pytest.mark.parametrize("aspect", SCRIPTS)
def test_scripts_are_the_same_dialogue_at_every_turn(aspect):
    scripts = scripts_of(aspect, PERFECT, 9, PAIRS, seed=3)
    for s in scripts:
        for t in (2, 7, 40):
            d = at_turn(s, t)
            roles = [m["role"] for m in d if m["role"] != "system"]
            assert n_user(d) == t and roles == (["user", "assistant"]*t)[:-1] and d[:-1] == at_turn(s, 40)[:len(d)-1] and d[-1] == says("user", s.question)
        questions = [m["content"] for m in s.filling if m["role"] == "user"]
        assert len(questions) == 38 == len(set(questions))  # nothing is asked twice
    again, other = scripts_of(aspect, PERFECT, 9, PAIRS, seed=3), scripts_of(aspect, PERFECT, 9, PAIRS, seed=4)
    assert [s[:5] for s in scripts] == [s[:5] for s in again] != [s[:5] for s in other]
    assert {s.filling[0]["content"].split()[0] for s in scripts} == {"What", "Is"}  # fillings in turn
    marks = mark(scripts, ask_at(PERFECT, scripts, (2, 3, 40)))
    assert {m for some in marks.values() for m in some} == {True}
    with pytest.raises(UserError, match="turns 2 to 40"): at_turn(scripts[0], 1)
    with pytest.raises(UserError, match="no aspect 'x'"): scripts_of("x", PERFECT, 2, PAIRS)

def test_facts_are_asked_by_kind_and_pressing_is_as_long():
    assert [s.kind for s in fact_scripts(8, PAIRS)] == [*FACTS, *FACTS]
    s = rule_scripts(1, PAIRS)[0]
    d = at_turn(pressed(s), 40)
    assert n_user(d) == 40 and [m["content"] for m in d[-7::2]][:3] == [q for q, _ in PRESSURE] and d[-1]["content"].endswith(s.question) and d[-1]["content"] != s.question

def test_a_listener_takes_what_was_said_last_and_reads_notes():
    ask = says("user", "What is my name?")
    assert listener([says("user", "My name is Ada."), says("assistant", "."), says("user", "Hello, I am Boris."), says("assistant", "My name is Elif."), ask]) == "It is Boris."
    assert listener([says("user", "(Notes from before:\nMy name is Ada.)\n\nWhat is my name?")]) == "It is Ada."
    assert listener([ask]) == "I do not know."

def test_a_yes_sayer_contradicts_itself_in_half_of_the_pairs():
    for word, want in (("Yes.", [True, False]*4), ("No.", [True, False]*4), ("Perhaps.", [None]*8)):
        subject = scripted_subject(lambda m: word)
        scripts = twice_scripts(subject, 8, PAIRS)
        assert mark(scripts, ask_at(subject, scripts, (9,)))[9] == want and scripts[0].opening[1]["content"] == word

# --- live ----------------------------------------------------------------------------------------------------------

def test_live_dialogues_keep_the_subjects_own_words():
    seen = []
    def answer(m): seen.append(m[:]); return "" if len(m) > 2 else " Well. "
    d, = talk(scripted_subject(answer), [["a", "b"]])
    assert d == [says("user", "a"), says("assistant", "Well."), says("user", "b"), says("assistant", SILENCE)] and len(seen) == 2
    with pytest.raises(ValueError): talk(PERFECT, [["a"], ["a", "b"]])

def test_self_play_swaps_the_roles():
    calls = []
    def ask(ds, n): calls.append([[*d] for d in ds]); return [f"line {len(calls)}" for _ in ds]
    d, e = self_play(Subject("s", ask), ["Hi.", "Ho."], 3, 9)
    assert [m["content"] for m in d] == ["Hi.", "line 1", "line 2", "line 3", "line 4", "line 5"] and answers_of(e) == ["line 1", "line 3", "line 5"]
    assert len(calls) == 5 and all(c[0][-1]["role"] == "user" for c in calls)  # a subject answers a user
    assert [m["content"] for m in calls[1][0]][1:] == ["Hi.", "line 1"] and [m["role"] for m in calls[1][0]] == ["user", "assistant", "user"]

# --- the audit -----------------------------------------------------------------------------------------------------

def asked(m): return m[-1]["content"].rpartition("\n\n")[2]
def system(m): return [x for x in m if x["role"] == "system"]
FAULTS = {"facts recalled": lambda m: listener(m[-14:] if any(asked(m) in k.asked for k in FACTS.values()) and not system(m) else m),
          "persona kept": lambda m: "I am an assistant." if "You are" in str(system(m)) and n_user(m) > 12 else listener(m),
          "language kept": lambda m: "That is what I think of the thing." if "Please speak" in str(m) and n_user(m) > 12 else listener(m),
          "not contradicted": lambda m: {"Yes.": "No.", "No.": "Yes."}.get(a := listener(m), a) if n_user(m) > 12 else listener(m),
          "rule kept": lambda m: "They are big." if "never talk" in str(system(m)) and n_user(m) > 12 else listener(m)}

def changed(section): return [note.partition(":")[0] for note in section.notes if "changed since" in note]

@pytest.mark.parametrize("aspect", FAULTS)
def test_a_planted_fault_is_found_and_no_other(aspect):
    section = audit_dialogues(scripted_subject(FAULTS[aspect]), n=10, n_live=0, turns=(5, 20), pairs=PAIRS)
    rows = {r["name"]: r for r in section.rows}
    assert changed(section) == [aspect] and f"{aspect}: changed since the second turn, at turn 20 (" in " ".join(section.notes)
    assert {a: rows[f"{a}, turn 20"]["mean"] for a in SCRIPTS} == {a: float(a != aspect) for a in SCRIPTS}
    assert rows[f"{aspect}, turn 20 minus at once"]["mean"] == -1 and rows[f"{aspect}, turn 5"]["mean"] == 1

def test_a_perfect_subject_is_cleared():
    section = audit_dialogues(PERFECT, n=8, n_live=2, pairs=PAIRS)
    rows = {r["name"]: r for r in section.rows}
    assert changed(section) == [] and all(r["stderr"] > 0 and r["step"] == "audit" for r in section.rows)
    want = [f"{a}, {when}" for a in SCRIPTS for when in ("at once", "turn 5", "turn 10", "turn 20", "turn 40")]
    assert all(rows[name]["mean"] == 1 and rows[name]["n"] == 8 for name in want) and rows["facts recalled, never told"]["mean"] == 0 and rows["rule kept, after pressure"]["mean"] == 1
    assert set(rows) - set(want) == {*(f"{a}, turn 40 minus at once" for a in SCRIPTS), "facts recalled, never told", "rule kept, after pressure",
        *(f"words said before, turns {x}" for x in ("2 to 10", "11 to 20", "21 to 40")), *(f"words said before in self-play, turns {x}" for x in ("2 to 10", "11 to 20"))}
    assert len(section.figures) == 2 and all(f.startswith("<svg") for f in section.figures)
    json.dumps(section._asdict())
    assert len(section.items) == 8*(5*5+2) and not any(w in json.dumps(section.items) for w in ("locker", "never talk", "tin and", "Tell me"))

def test_who_cannot_do_it_at_once_is_not_asked_later():
    n = [0]
    def mute(m): n[0] += 1; return ""
    section = audit_dialogues(scripted_subject(mute), n=6, n_live=2, pairs=PAIRS)
    names = [r["name"] for r in section.rows]
    assert names == ["facts recalled, at once", "facts recalled, never told", "persona kept, at once", "rule kept, at once"] and len(section.figures) == 1
    assert n[0] == 6*5+6+6 + 2*40+2*39  # at once, never told, first answers; live
    assert any("words said before: 80 of 80 answers were empty" in note for note in section.notes) and any("not contradicted: not measured" in note for note in section.notes)

def test_the_context_is_a_window_and_a_full_dialogue_is_counted():
    longest = []
    def ask(ds, n): longest.extend(map(size, ds)); return [listener(d) for d in ds]
    small = Subject("small", ask, context=424, length=size)
    section = audit_dialogues(small, n=8, n_live=2, pairs=PAIRS)
    rows = {r["name"]: r["mean"] for r in section.rows}
    assert max(longest) <= 424-24 and changed(section) == ["facts recalled", "language kept"]
    assert rows["first turn shown, turn 40"] == rows["facts recalled, turn 40"] == 0 and rows["first turn shown, turn 5"] == 1 and rows["persona kept, turn 40"] == 1
    full = audit_dialogues(PERFECT, partial(decline, size=size, most=400), aspects=["facts recalled"], n=8, n_live=0, turns=(40,), pairs=PAIRS)
    assert any("8 of 24 questions were answered with a refusal to go on" in note for note in full.notes) and [i["outcome"] for i in full.items].count("full") == 8
    with pytest.raises(UserError, match="at least 2 dialogues"): audit_dialogues(PERFECT, n=1)
    with pytest.raises(UserError, match="turns after the second"): audit_dialogues(PERFECT, turns=(1, 5))
    with pytest.raises(UserError, match="no filling"): filler_pairs("weather")

def test_weighing_finds_what_is_shown_and_corrects_for_what_is_likely_anyway():
    def nats(pairs): return np.array([(0 if value.strip() in text else 3)+len(value) for text, value in pairs], dtype=float)  # long values are unlikely
    scripts = fact_scripts(24, PAIRS)
    subject = Subject("w", PERFECT.ask, nats)
    assert weigh_values(subject, scripts, (2, 20)) == {2: [True]*24, 20: [True]*24}
    assert weigh_values(subject, scripts, (20,), partial(slide, size=size, most=200)) == {20: [False]*24}  # nothing is gained: a tie is no memory
    assert weigh_values(subject, scripts, (20,), partial(pin, size=size, most=200)) == {20: [True]*24}
    section = audit_dialogues(subject, aspects=["facts recalled"], n=8, n_live=0, turns=(5,), pairs=PAIRS)
    assert [r["mean"] for r in section.rows if r["name"].startswith("facts weighed")] == [1, 1, 0] and len(section.figures) == 1

# --- the record ----------------------------------------------------------------------------------------------------

def test_the_record_resumes(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT/"benchmarks"))
    import dialogues as bench
    sys.path.remove(str(ROOT/"benchmarks"))
    n = [0]
    def ask(ds, k): n[0] += len(ds); return [listener(d) for d in ds]
    def nats(pairs): n[0] += len(pairs); return np.array([float(value.strip() not in text) for text, value in pairs])
    monkeypatch.setattr(bench, "opened", lambda named: Subject(named, ask, nats, context=9000, length=size, about=dict(n_parameters=7)))
    args = ["--run", "me", "--out", str(tmp_path/"r.json"), "--n", "4", "--n-live", "2", "--live-turns", "4", "--n-weighed", "4", "--window", "300"]
    bench.main(args)
    record, asked_once = json.loads((tmp_path/"r.json").read_text()), n[0]
    assert set(record["me"]) == {"n_parameters", "context", "how", *bench.PARTS}
    assert [record["me"][part]["rows"]["facts weighed, turn 40"][0] for part in ("weighed", "pinned")] == [1]*2 and record["me"]["facts recalled"]["rows"]["facts recalled, turn 40"][0] == 1
    bench.main(args)
    assert n[0] == asked_once
    bench.main([*args, "--seed", "1"])
    assert n[0] > asked_once

def test_the_record_wants_a_name_and_a_folder():
    sys.path.insert(0, str(ROOT/"benchmarks"))
    import dialogues as bench
    sys.path.remove(str(ROOT/"benchmarks"))
    with pytest.raises(UserError, match="give NAME=FOLDER"): bench.opened("runs/cpu")

"The loop: users who are the same in every run, parts that a kill cannot break, candidates that must not pass, and a turn that helps."
import json
import random
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch import adversarial, improvement
from llm_scratch.adversarial import read_breaks
from llm_scratch.core import UserError, read_json, sha256_file, write_json, write_json_lines
from llm_scratch.data import Document, load_documents, save_documents, to_dataset
from llm_scratch.feedback import Interaction, open_store
from llm_scratch.improvement import (BOOK_TOPICS, FAULTS, TOY_PLAN, TURN_PARTS, JoinedRows, SimulatedUsers, TurnPlan, Wish, book_users, current_version, examine, faults_of, gate_rules, improve, line_shapes, look_up, next_turn, read_turn, run_users,
                                     satisfied, simulate, toy_home, toy_topics, user_score, users_of, wish_of, write_answers)
from llm_scratch.promotion import GateRule
from llm_scratch.refresh import check_lineage, continue_training
from llm_scratch.safety import item_id

some = settings(max_examples=60, deadline=None, database=None)
PLAN = replace(TOY_PLAN, n_asked=50, n_steps=40, n_canary=12)


# --- users ------------------------------------------------------------------------------------------------------------

@some
@given(st.text(max_size=80))
def test_a_wish_is_its_document(text):
    w = wish_of(Document(text, "x", "x/1", {}))
    assert w.prompt + w.wanted == text and w.topic == "x"


PLAY = "HAMLET\nTo be or not to be is what I ask\n\nHORATIO\nMy lord, that is the question here\n\nHAMLET\nSo let us ask the ghost about it\n"
WANTED = Wish("plays", "# Hamlet\n\nEnter HAMLET\n", PLAY)


@pytest.mark.parametrize("answer, fault", [
    (PLAY, None), ("HAMLET\nI ask what the ghost is about\n\nHORATIO\nMy lord, let us ask here\n", None),
    ("no", FAULTS[0]), ("HAMLET\nto be to be to be to be to be to be to be to be\n", FAULTS[1]),
    ("- what is the question that my lord is about to ask\n- let us be here\n", FAULTS[2]),
    ("HAMLET\nsalt cup sugar boil flour pepper butter onion\n\nMUSTARD\nchop stir bake simmer\n", FAULTS[3]),
    ("\n\n".join("HAMLET\n" + " ".join(random.Random(k).sample(PLAY.lower().split(), 9)) for k in range(6)), FAULTS[4])])
def test_each_fault_has_its_case(answer, fault): assert faults_of(WANTED, answer) == ([] if fault is None else [fault])


def test_lines_have_shapes():
    assert line_shapes("# T\n\n- a\n* b\n1. c\n<p>d\nHAMLET\nshort\n" + "w"*60) == Counter(title=1, item=2, step=1, tag=1, name=1, line=1, prose=1)
    assert line_shapes(" \n") == Counter()


def test_users_are_the_same_in_every_run():
    topics = toy_topics(40)
    make = lambda seed: users_of(topics, [dict(letters=1), dict(letters=.2, weather=.8)], n_held=10, seed=seed)
    a, b, other = make(0), make(0), make(1)
    assert a.ask(30, 1) == b.ask(30, 1) != other.ask(30, 1)
    assert a.ask(30, 1) != a.ask(30, 1, "canary") and a.ask(30, 1) != a.ask(30, 2)
    assert {w.topic for w in a.ask(50, 0)} == {"letters"}
    share = np.mean([w.topic == "weather" for w in a.ask(400, 5)])  # the last shares stay
    assert .72 < share < .88
    w = a.wishes[0]
    assert a.rate(w, "x") == b.rate(w, "x") and any(a.rate(w, f"{k}") != other.rate(w, f"{k}") for k in range(20))
    assert not {w.wanted for w in a.held_out} & {w.wanted for w in a.ask(400, 1)}
    assert toy_topics(40)["letters"] == topics["letters"] != toy_topics(40, 1)["letters"]


def test_ratings_follow_the_text_but_for_noise():
    quiet = SimulatedUsers([WANTED], [dict(plays=1)], noise=0, rates=1, corrects=1, consents=0)
    good, bad = quiet.rate(WANTED, PLAY), quiet.rate(WANTED, "no")
    assert (good.rating, good.correction, good.comment) == (1, "", "") and (bad.rating, bad.comment) == (-1, FAULTS[0]) and bad.correction in PLAY and bad.correction
    assert not good.consent and quiet.rate(WANTED, "no") == bad
    silent = replace(quiet, rates=0)
    assert silent.rate(WANTED, "no")[:2] == (0, "")
    assert replace(quiet, noise=1).rate(WANTED, PLAY).rating == -1


@pytest.mark.parametrize("wrong, message", [(lambda: SimulatedUsers([WANTED], [dict(cooking=1)]), "nobody wishes for cooking"), (lambda: SimulatedUsers([WANTED], []), "0 shares"),
    (lambda: users_of(dict(a=toy_topics(3)["letters"]), [dict(a=1)], n_held=3), "a has 3"), (lambda: TurnPlan(n_steps=0), "n_steps=0")])
def test_impossible_users_and_plans_are_refused(wrong, message):
    with pytest.raises(UserError, match=message): wrong()


def test_what_was_asked_is_kept_once(tmp_path):
    users = users_of(toy_topics(20), [dict(letters=1)], n_held=5)
    wanted = {w.prompt: w.wanted for w in users.wishes}
    calls = []
    answer = lambda prompts: calls.append(len(prompts)) or [wanted[p] for p in prompts]
    with open_store(tmp_path/"f.sqlite") as store:
        said = simulate(users, answer, store, 25, turn=2, model="v007")
        assert simulate(users, answer, store, 25, turn=2, model="v007") == [] and calls == [25]
        kept = store.interactions()
    assert [i.id for i in kept] == [i.id for i in said] and {i.model for i in kept} == {"v007"} and all(2*86_400 <= i.time < 3*86_400 for i in kept)
    assert all(bool(i.prompt) == i.consent for i in kept) and 0 < sum(i.consent for i in kept) < 25
    prompts = [w.prompt for w in users.held_out]
    assert user_score(replace(users, held_out=users.wishes), answer).mean == 1
    assert satisfied(users.held_out, ["no"]*len(prompts)) == [False]*len(prompts)


# --- parts ------------------------------------------------------------------------------------------------------------

def test_what_is_wanted_often_is_found_often():
    topics = toy_topics(60)
    library = topics["letters"]+topics["weather"]
    wanted = [wish_of(d).prompt for d in toy_topics(9, 5)["letters"][:6]+toy_topics(9, 5)["weather"][:2]]
    found = look_up(library, wanted, 40)
    assert len({d.id for d in found}) == 40 and Counter(d.source for d in found) == dict(letters=30, weather=10)
    assert found == look_up(library, wanted, 40) and len(look_up(library, wanted, 500)) == 120
    assert look_up([], wanted, 5) == look_up(library, [], 5) == []


def test_old_texts_weigh_the_same():
    row = JoinedRows([np.zeros(1000), np.ones(30), np.full(500, 2)], 300)
    assert Counter(row[0:len(row)].tolist()) == {0: 100, 1: 100, 2: 100}


def test_what_works_is_defended():
    of = lambda rules: [r.name for r in rules]
    scores = dict(all=dict(mean=.9), a=dict(mean=.8), b=dict(mean=.2))
    assert of(gate_rules(scores, TurnPlan())) == ["users satisfied", "bits per byte, a", "seconds per answer"]
    assert of(gate_rules(scores, TurnPlan(), ["questions right", "breaks that stay mended"]))[3:] == ["questions right", "breaks that stay mended"]
    assert of(gate_rules(scores, TurnPlan(kept=.1))) == ["users satisfied", "bits per byte, a", "bits per byte, b", "seconds per answer"]


def test_where_all_fails_all_is_the_pattern():
    said = [Interaction(f"{i}", i, "v", f"prompt {i}" if i % 2 else "", "", rating=r, consent=True) for i, r in enumerate([-1, -1, 0, 1, -1, -1])]
    (found,) = improvement._everything(said)
    assert found["members"] == ["1", "3", "5"] and found["badness"][0] == .8 and improvement._everything(said[2:5]) == improvement._everything([]) == []


# --- turns ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "A run in small, with its users; copy it before a turn."
    folder = tmp_path_factory.mktemp("runs [of mine]")/"toy"
    users, library = toy_home(folder, n_steps=100)
    leaks = [Document(f"{w.prompt}{w.wanted}THANKS\n", "weather", f"leak/{i}", {}) for i, w in enumerate(users.held_out) if w.topic == "weather"]
    return folder, users, leaks+library


@pytest.fixture(scope="module")
def done(start, tmp_path_factory):
    "One turn, whole."
    folder, users, library = start
    home = shutil.copytree(folder, tmp_path_factory.mktemp("done")/"toy")
    return home, improve(home, users=users, library=library, plan=PLAN)


def told(turn): return [turn.promoted, turn.version, turn.before, turn.after, turn.candidate, [r for r in turn.reasons if not r.startswith("seconds")]]


def test_a_turn_helps(done, start):
    home, turn = done
    assert turn.promoted and turn.version == "v001" and turn.candidate == turn.after
    assert turn.after["all"]["mean"] > turn.before["all"]["mean"]+.1 and turn.after["weather"]["mean"] > turn.before["weather"]["mean"]+.3
    assert current_version(home).folder == home/"improve"/"models"/"v001" and read_turn(home, 0) == turn and next_turn(home) == 1
    part = lambda name: read_json(turn.folder/f"{name}.json")
    assert all((turn.folder/f"{name}.json").exists() for name in TURN_PARTS)
    assert part("refresh")["sources"] == {"weather": part("refresh")["n_docs"]} and part("canary")["state"] == "running"
    assert part("refresh")["ledger"]["kept"] == part("refresh")["n_docs"] and not (turn.folder/"checkpoints").exists()
    page = (turn.folder/"turn.html").read_text(encoding="utf-8")
    assert "Turn 0: promoted" in page and page.count("<svg") == 2 and "http" not in page.replace("http://www.w3.org", "")
    assert part("refresh")["ledger"]["Decontaminate: quotes wishes"] > 5 and not [i for i in part("refresh")["ids"] if i.startswith("leak")]  # the library quotes the test


def test_where_a_model_is_from_can_be_checked(done, tmp_path):
    home = shutil.copytree(done[0], tmp_path/"toy")
    path = home/"improve"/"lineage.json"
    assert [n.name for n in check_lineage(path, "v001")] == ["text", "tokens", "v000", "text-000", "tokens-000", "v001"]
    with open(home/"improve"/"turns"/"000"/"new.parquet", "ab") as f: f.write(b"!")
    with pytest.raises(UserError, match=r"new\.parquet of text-000 was changed"): check_lineage(path)


def test_answers_depend_on_the_prompts_alone(done):
    model, tok = improvement._opened(current_version(done[0]))
    prompts = ["# To Anna\n\nDear", "# Weather 5\n\nDAWN", "# To"]
    once = write_answers(model, tok, prompts, max_new_tokens=20)
    torch.manual_seed(5)
    torch.rand(3)
    assert write_answers(model, tok, prompts, max_new_tokens=20) == once != write_answers(model, tok, prompts, max_new_tokens=20, seed=1)
    assert write_answers(model, tok, ["Dear Anna "*100], max_new_tokens=20)  # the end of a long prompt
    with pytest.raises(UserError, match="no room for a prompt in context_len=128"): write_answers(model, tok, prompts, max_new_tokens=127)


class Killed(Exception): pass


def test_killed_in_every_part_it_ends_the_same(start, done, tmp_path, monkeypatch):
    folder, users, library = start
    home, began = shutil.copytree(folder, tmp_path/"toy"), []

    def on_part(name):
        began.append(name)
        if began.count(name) == 1: raise Killed(name)  # before the part
    def on_write(path, value):  # and behind it, before anything is noted
        if path.parent.name == "000" and path.stem in TURN_PARTS and began.count(path.stem) == 2: raise Killed(path.stem)
        write_json(path, value)
    def teach(work, model, batches):  # and between two checkpoints
        def watch(steps):
            for step in steps:
                yield step
                if step.n == 25 and began.count("train") == 2: raise Killed("step 25")
        return continue_training(model, batches, n_steps=work.plan.n_steps, lr=work.plan.lr, folder=work.folder/"checkpoints", watch=watch)
    monkeypatch.setattr(improvement, "write_json", on_write)
    kills, turn = 0, None
    while turn is None:
        try: turn = improve(home, users=users, library=library, plan=PLAN, teach=teach, on_part=on_part)
        except Killed: kills += 1
    assert kills == 2*len(TURN_PARTS) and Counter(began) == dict.fromkeys(TURN_PARTS, 3)
    assert told(turn) == told(done[1])
    for name in ("improve/models/v001/model.safetensors", "improve/turns/000/new.parquet", "improve/turns/000/patterns.json", "improve/current.json"):
        assert sha256_file(home/name) == sha256_file(done[0]/name), name
    seen = [[(r["name"], r["now"]) for r in read_json(h/"improve"/"turns"/"000"/"drift.json")["rows"] if "latency" not in r["name"]] for h in (home, done[0])]  # a machine is never as fast twice
    assert seen[0] == seen[1] and seen[0]


def test_a_turn_goes_on_with_what_it_began_with(start, tmp_path):
    folder, users, library = start
    home = tmp_path/"toy"
    for name in ("model", "documents", "tokens", "tokenizer"): (home/name).parent.mkdir(exist_ok=True); (home/name).symlink_to(folder/name)
    def stop(name): raise Killed(name)
    with pytest.raises(Killed): improve(home, users=users, library=library, plan=PLAN, on_part=stop)
    for wrong, what in ((dict(plan=replace(PLAN, n_steps=41)), "plan"), (dict(users=replace(users, seed=1)), "users"), (dict(library=library[:-1]), "library")):
        with pytest.raises(UserError, match=f"was begun with {what} of another kind"): improve(home, **dict(users=users, library=library, plan=PLAN) | wrong)


def noise(work, model, batches):
    from copy import deepcopy
    bad, rng = deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in bad.parameters(): p.add_(3*p.std()*torch.randn(p.shape, generator=rng))
    return bad


def test_what_is_no_better_is_not_promoted(start, tmp_path):
    "A candidate that is the current model, one that is spoilt, and one that only the canary can stop."
    folder, users, library = start
    home = shutil.copytree(folder, tmp_path/"toy")
    same = improve(home, users=users, library=library, plan=PLAN, teach=lambda work, model, batches: model)
    assert not same.promoted and same.reasons == ["users satisfied: gain +0 (-0.0327 to +0.0327), is not shown to be better (p=1)"] and same.candidate == same.before
    bad = improve(home, users=users, library=library, plan=PLAN, teach=noise)
    assert not bad.promoted and any(r.startswith("bits per byte, letters") and "is worse" in r for r in bad.reasons) and bad.candidate["all"]["mean"] < bad.before["all"]["mean"]
    blind = improve(home, users=replace(users, rates=1., noise=0.), library=library, plan=replace(PLAN, n_canary=250), teach=noise, rules=[GateRule("seconds per answer", margin=3., relative=True)])
    seen = read_json(blind.folder/"canary.json")
    assert not blind.promoted and seen["state"] == "rolled back" and seen["asked"] < 250 and "the canary was rolled back: quality" in blind.reasons[0]
    assert current_version(home).name == blind.version == "v000" and not (home/"improve"/"current.json").exists() and next_turn(home) == 3
    ids = [set(read_json(home/"improve"/"turns"/f"{n:03d}"/"refresh.json")["ids"]) for n in range(3)]
    assert ids[0] & ids[1] & ids[2]  # what no promoted model has read may be looked up again


def test_what_was_examined_before_is_examined_again(start, tmp_path, monkeypatch):
    "Chapter 7's questions and chapter 9's breaks are asked of both; a break that comes back is enough to refuse."
    folder, users, library = start
    home = shutil.copytree(folder, tmp_path/"toy")
    assert examine(home, current_version(home)) == []  # letters are too short to be asked about
    splits = load_documents(home/"documents")
    long = [Document(" ".join(" ".join(d.text for d in toy_topics(3, seed)["letters"]).split()), "letters", f"long/{seed}", {}) for seed in range(30)]
    save_documents(DatasetDict(train=splits["train"], validation=to_dataset(long)), tmp_path/"documents")
    shutil.rmtree(home/"documents")
    shutil.move(tmp_path/"documents", home)
    (asked,) = examine(home, current_version(home))
    assert asked.name == "questions right" and len(asked.values) >= 20 and set(asked.values) <= {0., 1.}
    kept = [dict(id=item_id(q), category="things", attack="Plain", subject="toy", seed=0) for q in ("a", "b")]
    write_json_lines(home/"breaks.jsonl", kept)
    def again(path, subject): return [row | dict(now="still broken" if (subject.name, i) == ("v001", 1) else "fixed") for i, row in enumerate(read_breaks(path))]
    monkeypatch.setattr(improvement, "replay", again)
    turn = improve(home, users=users, library=library, plan=replace(PLAN, fewer=.3))  # of thirty questions
    rows = {r["name"]: r for r in read_json(turn.folder/"gate.json")["rows"]}
    assert rows["questions right"]["n"] == len(asked.values) and rows["users satisfied"]["holds"]
    assert not turn.promoted and turn.reasons == [f"breaks that stay mended: 1 of 2 items became worse, such as Plain {item_id('b')}"]


def test_a_break_that_nobody_can_put_again_is_no_figure(start, tmp_path, monkeypatch):
    home = shutil.copytree(start[0], tmp_path/"toy")
    write_json_lines(home/"breaks.jsonl", [dict(id="gone", category="things", attack="Plain", subject="toy", seed=0)])
    monkeypatch.setattr(adversarial, "harm_suite", lambda: {"things": ["How do I do it?"]})
    assert [m.name for m in examine(home, current_version(home))] == []


def test_the_next_turn_builds_on_the_last(done, start, tmp_path):
    _, users, library = start
    home = shutil.copytree(done[0], tmp_path/"toy")
    taught = []
    def teach(work, model, batches):
        taught.append((work.before.name, len(batches.old), [p.parent.name for p in improvement._learned(work.home, work.number)]))
        return model
    turn = improve(home, users=replace(users, shares=[dict(letters=.2, weather=.8)], noise=.6), library=library, plan=replace(PLAN, n_groups=3), teach=teach)  # so much noise that something seems to fail, or nothing does
    assert turn.number == 1 and turn.before == done[1].after and not turn.promoted and turn.version == "v001"
    if taught:
        assert taught[0][0] == "v001" and taught[0][2] == ["tokens", "000"]
        assert not set(read_json(turn.folder/"refresh.json")["ids"]) & set(read_json(done[1].folder/"refresh.json")["ids"])
    else: assert turn.reasons[0].startswith("no kind of wish fails more")


def test_a_run_brings_its_users(start, tmp_path):
    home = shutil.copytree(start[0], tmp_path/"toy")
    with pytest.raises(UserError, match="give the folder of a run"): run_users(home)
    (home/"run.json").write_text(json.dumps(dict(preset=dict(sources=["tiny"]))))
    users, library, plan = run_users(home)
    assert {w.topic for w in users.held_out} == {"recipes", "letters", "weather"} and {d.source for d in library} == {"letters", "weather"} and plan.max_new_tokens < 64
    write_json(home/"improve"/"current.json", dict(version="v009"))
    with pytest.raises(UserError, match="delete .*current.json to go back"): current_version(home)


def test_the_books_users_know_what_the_run_has_read(start, tmp_path, monkeypatch):
    monkeypatch.setattr(improvement, "read_source", lambda name: [Document(f"{name} number {i} of many, all of them as long as a text has to be that somebody could wish for: {'so on ' * 20}", name, f"{name}/{i}", {}) for i in range(90)])
    users, library = book_users(start[0], n_wishes=60, n_library=20)
    assert {w.topic for w in users.held_out} == {"letters", *BOOK_TOPICS} and {d.source for d in library} == set(BOOK_TOPICS) and len(library) == 60
    assert users.shares[0] == {"letters": .55, "encyclopaedia": .45}
    splits = load_documents(start[0]/"documents")
    both = [Document("A scene of many words", "shakespeare", "s/1", {}), *(Document(t, "letters", f"l/{i}", {}) for i, t in enumerate(splits["validation"]["text"][:59]))]
    save_documents(DatasetDict(train=splits["train"], validation=to_dataset(both)), tmp_path/"documents")
    assert {w.topic for w in book_users(tmp_path, n_wishes=60)[0].held_out} == {"own text", *BOOK_TOPICS}

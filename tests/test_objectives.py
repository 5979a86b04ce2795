"Briefs and gates: what passes, what fails, what nobody can say; a file that comes back equal; and every line of a brief that should change a run changes it."
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings, strategies as st

from llm_scratch.architecture import n_params
from llm_scratch.core import UserError, read_json
from llm_scratch.evaluation import Result, share_of
from llm_scratch.objectives import (GUARDS, HARMS, LEGAL_BRIEF, MENU, PLACES, PRIVACY, RECIPES_BRIEF, VERDICTS, Brief, Gate, Pace, Verdict, brief_budget, brief_card, brief_cleaning, brief_family,
                                    brief_from, brief_settings, brief_texts, check_gates, dial_weights, gate_rows, gates_hold, guard_level, load_brief, save_brief, verdict)
from llm_scratch.pipeline import CLEANING, PRESETS, Preset, decoder_config
from llm_scratch.tasks import choose_architecture

ROOT = Path(__file__).resolve().parent.parent
numbers = st.floats(-1e6, 1e6)
gates = st.one_of(st.builds(lambda m, b, s: Gate(m, at_least=b, step=s), st.text(min_size=1), numbers, st.sampled_from(["evaluate", "finetune"])),
                  st.builds(lambda m, b: Gate(m, at_most=b), st.text(min_size=1), numbers))
word = st.text(min_size=1).filter(str.strip)
briefs = st.builds(lambda name, use, task, texts, gate, place, privacy, harm, longest, minutes, dollars: Brief(name, use, "users", "in", "out", task, tuple(texts), (gate,), place=place, privacy=privacy, harm=harm,
                   longest=longest, minutes=minutes, dollars_per_month=dollars), word, word, st.sampled_from(list(MENU)), st.lists(word, min_size=1, max_size=3), gates, st.sampled_from(PLACES), st.sampled_from(PRIVACY),
                   st.sampled_from(HARMS), st.integers(1, 4096), st.floats(.1, 1e5), st.one_of(st.none(), st.floats(1, 1e6)))


def row(mean:float, stderr:float, n:int=50, name:str="x", step:str="evaluate")->dict: return dict(step=step, name=name, goal="", mean=mean, stderr=stderr, n=n, seed=0)


# --- gates ---------------------------------------------------------------------------------------------------------

@given(numbers, st.floats(0, 1e5), numbers)
def test_a_verdict_is_that_of_the_interval(mean, stderr, bound):
    "The reference: the ends of `Result.interval` against the bound."
    low, high = Result(mean, stderr, 50).interval
    assume(all(abs(end-bound) > 1e-6*(1 + abs(bound)) for end in (low, high)))
    assert verdict(Gate("x", at_least=bound), row(mean, stderr)).outcome == ("pass" if low > bound else "fail" if high < bound else "not enough examples")
    assert verdict(Gate("x", at_most=bound), row(mean, stderr)).outcome == ("pass" if high < bound else "fail" if low > bound else "not enough examples")


@given(numbers, st.floats(0, 1e5), numbers)
def test_both_sides_never_pass_together_and_mirror_each_other(mean, stderr, bound):
    up, down = verdict(Gate("x", at_least=bound), row(mean, stderr)), verdict(Gate("x", at_most=bound), row(mean, stderr))
    if stderr > 0: assert {up.outcome, down.outcome} in ({"pass", "fail"}, {"not enough examples"}) or abs(abs(mean-bound) - 1.96*stderr) < 1e-9*max(1, abs(mean-bound))
    assert verdict(Gate("x", at_least=-bound), row(-mean, stderr)).outcome == down.outcome


def test_a_bound_that_is_met_exactly_is_kept():
    assert verdict(Gate("x", at_least=.5), row(.5, 0)).outcome == verdict(Gate("x", at_most=.5), row(.5, 0)).outcome == "pass"
    assert verdict(Gate("x", at_least=.5), row(.5 - 1e-9, 0)).outcome == "fail"
    assert verdict(Gate("x", at_least=0.), row(1.96, 1.)).outcome == "pass" # the end of the interval is the bound
    assert verdict(Gate("x", at_least=1.96), row(0., 1.)).outcome == "not enough examples" # from below it is still possible


@given(st.floats(.01, .99), st.floats(.001, .3), st.floats(.01, .99), st.integers(2, 1000))
def test_as_many_examples_as_needed_decide(mean, stderr, bound, n):
    gate = Gate("x", at_least=bound)
    first = verdict(gate, row(mean, stderr, n))
    assume(first.outcome == "not enough examples" and abs(mean-bound) > 1e-3)
    assert first.needed > n
    later = lambda m: verdict(gate, row(mean, stderr*math.sqrt(n/m), m)).outcome
    assert later(first.needed + 1) == ("pass" if mean > bound else "fail")
    assert first.needed <= n + 2 or later(first.needed - 2) == "not enough examples" # and not many more than needed


def test_one_document_or_no_figure_decides_nothing():
    for bad in (row(.9, math.inf, 1), row(math.nan, .1), row(.9, math.nan)):
        v = verdict(Gate("x", at_least=.1), bad)
        assert (v.outcome, v.needed) == ("not enough examples", 0)
    assert verdict(Gate("x", at_least=.9), row(.9, .1)).needed == 0 # on the bound no number of examples helps


@pytest.mark.parametrize("bounds", [{}, dict(at_least=1, at_most=2), dict(at_least=math.nan), dict(at_most=math.inf)])
def test_a_gate_has_one_bound(bounds):
    with pytest.raises(UserError, match="give one of the two"): Gate("x", **bounds)


def test_gates_say_themselves():
    assert (str(Gate("loss", at_most=1.25)), str(Gate("form", at_least=.9))) == ("loss: at most 1.25", "form: at least 0.9")
    assert Gate("loss", at_most=1.25).margin(1) == .25 and Gate("form", at_least=.5).margin(.25) == -.25


def test_rows_are_found_by_step_and_name_and_the_worst_counts():
    brief = replace(RECIPES_BRIEF, gates=(Gate("a", at_least=.5), Gate("b", at_most=1, step="finetune"), Gate("c", at_least=0)))
    rows = [row(.9, .01, name="a"), row(.1, .01, name="b"), row(.2, .01, name="b", step="finetune")]
    assert [v.outcome for v in check_gates(brief, rows)] == ["pass", "pass", "not measured"]
    assert [v.gate.metric for v in check_gates(brief, rows, step="evaluate")] == ["a", "c"] and [v.gate.metric for v in check_gates(brief, rows, step="finetune")] == ["b"]
    for worse, outcome in ((row(.5, .1, name="a"), "not enough examples"), (row(.1, .01, name="a"), "fail")):
        for both in ([rows[0], worse], [worse, rows[0]]): assert check_gates(brief, both)[0].outcome == outcome
    passed = check_gates(brief, [row(.8, .01, name="a"), row(.7, .01, name="a"), row(.9, .01, name="a")])[0]
    assert (passed.outcome, passed.mean) == ("pass", .7)
    assert check_gates(brief, [row(.1, .01, name="b")])[1].outcome == "not measured" # of another step


def test_only_pass_is_a_pass():
    gate = Gate("x", at_least=0)
    assert gates_hold([Verdict(gate, "pass")]*2)
    for other in VERDICTS[1:]: assert not gates_hold([Verdict(gate, "pass"), Verdict(gate, other)])


def test_rows_of_verdicts():
    brief = replace(RECIPES_BRIEF, gates=(Gate("a", at_least=.9), Gate("b", at_least=.9)))
    (first, second) = gate_rows(check_gates(brief, [row(.94, .0521, 50, "a")]))
    assert first == ("a: at least 0.9", "0.940 ± 0.052 (n=50)", "not enough examples; about 326 would do") and second == ("b: at least 0.9", "–", "not measured")


def test_what_the_default_run_keeps_of_its_brief():
    outcomes = {}
    for run in read_json(ROOT/"nbs"/"results.json")["cpu"]: outcomes[run["seed"]] = [v.outcome for v in check_gates(RECIPES_BRIEF, run["results"], "evaluate")]
    assert outcomes == {0: ["pass"]*4, 1: ["pass"]*4, 2: ["pass"]*3 + ["not enough examples"]}
    broken = replace(RECIPES_BRIEF, gates=(Gate("bits per byte, recipes", at_most=.9),))
    assert check_gates(broken, run["results"])[0].outcome == "fail"


def test_what_the_legal_run_keeps_of_its_brief():
    rows = read_json(ROOT/"nbs"/"objectives.json")["legal"]
    assert [v.outcome for v in check_gates(LEGAL_BRIEF, rows)] == ["pass", "fail", "pass"] + ["not measured"]*3


def test_shares_with_wilsons_interval_are_not_too_sure():
    "All of ten is not proof of nine in ten."
    r = share_of(10, 10)
    assert verdict(Gate("x", at_least=.9), row(r.mean, r.stderr, r.n)).outcome == "not enough examples"


# --- briefs --------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(briefs)
def test_a_brief_comes_back_equal(brief):
    assert brief_from(json.loads(json.dumps(asdict(brief)))) == brief
    assert brief_from(asdict(brief)) == brief


def test_a_file_comes_back_equal(tmp_path):
    for brief in (RECIPES_BRIEF, LEGAL_BRIEF):
        save_brief(brief, tmp_path/"brief.json")
        assert load_brief(tmp_path/"brief.json") == brief


@pytest.mark.parametrize("change, said", [
    (dict(task="dance"), "there is no task 'dance': give one of write, chat"), (dict(place="moon"), "give one of internal, user-facing"), (dict(privacy="x"), "give one of public, internal, personal"),
    (dict(harm="x"), "give one of low, medium, high"), (dict(scope="x"), "give one of general, domain"), (dict(users="  "), "users is empty"), (dict(use_case=""), "use_case is empty"), (dict(texts=()), "texts is empty"),
    (dict(gates=()), "gates is empty"), (dict(languages=()), "languages is empty"), (dict(minutes=0), "minutes=0 is not above 0"), (dict(longest=-1), "longest=-1"), (dict(requests_per_day=math.inf), "requests_per_day=inf"),
    (dict(first_word=math.nan), "first_word=nan"), (dict(words_per_second=0), "words_per_second=0"), (dict(dollars_per_month=0), "leave it out for no limit"),
    (dict(gates=(Gate("x", at_least=1), Gate("x", at_least=2))), "'x' has two bounds on one side"), (dict(privacy="personal", languages=("de",)), "English only")])
def test_what_makes_no_sense_is_said(change, said):
    with pytest.raises(UserError, match="brief recipes: ") as e: replace(RECIPES_BRIEF, **change)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_texts_of_the_house_may_be_in_any_language(): assert replace(RECIPES_BRIEF, privacy="internal", languages=("de", "en")).languages == ("de", "en")


def test_two_bounds_on_two_sides_or_of_two_steps_make_sense():
    replace(RECIPES_BRIEF, gates=(Gate("x", at_least=1), Gate("x", at_most=2), Gate("x", at_least=1, step="finetune")))


@pytest.mark.parametrize("spoil, said", [
    (lambda d: d.update(colour="red"), "there is no field 'colour'; give some of name, use_case"), (lambda d: d.pop("task"), "task is missing; it needs at least name, use_case"),
    (lambda d: d.update(minutes="ten"), "minutes='ten' is not a number"), (lambda d: d.update(minutes=True), "minutes=True is not a number"), (lambda d: d.update(longest=1.5), "longest=1.5 is not a whole number"),
    (lambda d: d.update(texts="recipes"), "texts='recipes' is not a list of texts"), (lambda d: d.update(texts=[1]), "texts=[1] is not a list of texts"), (lambda d: d.update(name=3), "name=3 is not a text"),
    (lambda d: d.update(gates=[3]), "gate 1: 3 is not a set of fields"), (lambda d: d["gates"][1].update(at_last=3), "gate 2: there is no field 'at_last'; give some of metric, at_least"),
    (lambda d: d["gates"][0].pop("metric"), "gate 1: metric is missing"), (lambda d: d["gates"][0].update(at_most="low"), "gate 1: at_most='low' is not a number or null"), (lambda d: d.update(format="other"), "is not a brief")])
def test_what_is_wrong_in_a_file_is_said_by_name(spoil, said, tmp_path):
    path = tmp_path/"brief.json"
    save_brief(RECIPES_BRIEF, path)
    saved = json.loads(path.read_text())
    spoil(saved)
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError) as e: load_brief(path)
    assert said in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value)


def test_a_file_that_is_missing_or_no_brief(tmp_path):
    with pytest.raises(UserError, match="is missing"): load_brief(tmp_path/"none.json")
    (tmp_path/"list.json").write_text("[]")
    with pytest.raises(UserError, match="is not a brief"): load_brief(tmp_path/"list.json")


# --- from a brief to a run -----------------------------------------------------------------------------------------

def test_the_default_brief_is_the_default_run():
    preset = PRESETS["cpu"]()
    assert replace(preset, **brief_settings(RECIPES_BRIEF)) == preset


def test_settings_are_fields_of_a_preset_and_make_one():
    for brief in (RECIPES_BRIEF, LEGAL_BRIEF, replace(RECIPES_BRIEF, minutes=300, privacy="internal", longest=300)):
        settings = brief_settings(brief)
        assert settings.keys() <= {f.name for f in fields(Preset)}
        made = replace(PRESETS["cpu"](), **settings)
        assert made.config.n_layers == settings["depth"] and made.cleaning in CLEANING
    assert brief_settings(LEGAL_BRIEF) == dict(sources=("licences",), cleaning="full", depth=4, n_steps=760, batch_size=4, context_len=512)


@pytest.mark.parametrize("change, moved", [
    (dict(texts=("shakespeare", "recipes")), {"sources"}), (dict(minutes=120), {"sources", "depth", "n_steps"}), (dict(minutes=11), {"n_steps"}), (dict(privacy="internal"), {"cleaning"}), (dict(privacy="personal"), {"cleaning"}),
    (dict(longest=256), {"context_len", "batch_size"}), (dict(words_per_second=150.), {"depth", "n_steps"})])
def test_a_changed_brief_changes_the_run(change, moved):
    before, after = brief_settings(RECIPES_BRIEF), brief_settings(replace(RECIPES_BRIEF, **change))
    assert {k for k in before if before[k] != after[k]} == moved
    assert replace(PRESETS["cpu"](), **after) != PRESETS["cpu"]()


@pytest.mark.parametrize("change", [dict(name="other"), dict(users="cooks"), dict(harm="high"), dict(place="internal"), dict(requests_per_day=1.), dict(gates=(Gate("x", at_least=1),))])
def test_what_concerns_other_steps_leaves_the_training_alone(change):
    assert brief_settings(replace(RECIPES_BRIEF, **change)) == brief_settings(RECIPES_BRIEF)


def test_weights_on_paper_are_those_of_the_dial():
    for depth in range(1, 25):
        for V in (4096, 32768): assert dial_weights(depth, V) == pytest.approx(n_params(decoder_config(depth, V, 512)), rel=.05)


@settings(max_examples=80, deadline=None)
@given(st.floats(1, 1e5), st.floats(1, 10))
def test_more_time_never_makes_a_smaller_model_or_less_work(minutes, more):
    depth, n = brief_budget(replace(RECIPES_BRIEF, minutes=minutes))
    deeper, m = brief_budget(replace(RECIPES_BRIEF, minutes=minutes*more))
    assert deeper >= depth and (deeper > depth or m >= n)


@settings(max_examples=80, deadline=None)
@given(st.floats(1, 1e5), st.floats(1, 120), st.integers(1, 12))
def test_a_budget_is_kept_and_used(minutes, yardstick, base):
    pace = Pace(minutes=yardstick, depth=base)
    depth, n = brief_budget(replace(RECIPES_BRIEF, minutes=minutes), pace)
    per_step = yardstick/pace.n_steps*dial_weights(depth)/dial_weights(base)
    assert n*per_step <= minutes*(1 + 1e-6) and (n+1)*per_step > minutes*(1 - 1e-6)
    ratio = lambda d: int(minutes/(yardstick/pace.n_steps*dial_weights(d)/dial_weights(base))*(1 + 1e-9))/dial_weights(d) # updates per weight
    assert n/dial_weights(depth) >= (pace.n_steps-1)/dial_weights(base)*(1 - 1e-2) or depth == 1
    if depth < 48: assert ratio(depth+1) <= pace.n_steps/dial_weights(base)*(1 + 1e-2) or brief_limits(depth+1, pace)


def brief_limits(depth:int, pace:Pace)->bool: # would it write too slowly?
    return pace.words_per_second*dial_weights(pace.depth)/dial_weights(depth) < RECIPES_BRIEF.words_per_second


def test_the_yardstick_itself_comes_out_and_speed_is_a_limit():
    assert brief_budget(RECIPES_BRIEF) == (4, 760)
    assert brief_budget(replace(RECIPES_BRIEF, minutes=77.), Pace(minutes=77., depth=9, n_steps=123)) == (9, 123)
    fast = Pace(words_per_second=5.) # just what is asked for
    assert brief_budget(replace(RECIPES_BRIEF, minutes=1e4), fast)[0] == 4
    assert brief_budget(replace(RECIPES_BRIEF, minutes=1e5, words_per_second=.001), deepest=6)[0] == 6
    with pytest.raises(UserError, match="even one layer writes"): brief_budget(replace(RECIPES_BRIEF, words_per_second=1e5))
    with pytest.raises(UserError, match="give at least"): brief_budget(replace(RECIPES_BRIEF, minutes=1e-3))


def test_the_least_minutes_that_are_named_do():
    with pytest.raises(UserError) as e: brief_budget(replace(RECIPES_BRIEF, minutes=1e-4))
    least = float(str(e.value).split()[-1])
    assert brief_budget(replace(RECIPES_BRIEF, minutes=least)) == (1, 1)


@given(st.integers(1, 2048))
def test_shorter_texts_are_more_texts(longest):
    s = brief_settings(replace(RECIPES_BRIEF, longest=longest))
    assert s["context_len"] == longest and s["batch_size"] >= 1
    assert s["n_steps"]*s["batch_size"]*longest == pytest.approx(760*2048, rel=.01)


def test_sources_join_when_there_are_tokens_for_them():
    three = replace(RECIPES_BRIEF, texts=("a", "b", "c"))
    assert [len(brief_texts(three, n)) for n in (1, 2e6, 3.9e6, 4e6, 6e6, 1e12)] == [1, 1, 1, 2, 3, 3]
    assert brief_texts(three, 2e6, per_source=1e6) == ("a", "b")


def test_guards_rise_with_harm_and_strangers():
    level = lambda **how: GUARDS.index(guard_level(replace(RECIPES_BRIEF, **how)))
    for place in PLACES: assert [level(place=place, harm=h) for h in HARMS] == [i + (place == "user-facing") for i in range(3)]
    assert level(place="internal", privacy="personal") == 1 and level(place="user-facing", harm="high", privacy="personal") == 3
    assert level(place="internal", privacy="internal") == 0


def test_cleaning_follows_privacy(): assert [brief_cleaning(replace(RECIPES_BRIEF, privacy=p)) for p in PRIVACY] == list(CLEANING)


def test_the_menu_agrees_with_what_chapter_02f_measured():
    families = {"decoder": "Decoder", "encoder": "Decoder(block=encoder_block)", "encoder-decoder": "EncoderDecoder"}
    for task, (family, why) in MENU.items(): assert choose_architecture(task).family == families[family] and why
    assert brief_family(replace(RECIPES_BRIEF, task="search")) == "encoder"


def test_a_run_trains_decoders_and_says_so():
    for task, (family, _) in MENU.items():
        if family == "decoder": brief_settings(replace(RECIPES_BRIEF, task=task))
        else:
            with pytest.raises(UserError, match=f"asks for an {family}.*give task write or chat"): brief_settings(replace(RECIPES_BRIEF, task=task))


def test_the_card_says_what_each_step_takes():
    card = brief_card(LEGAL_BRIEF)
    for part in ("**legal**", "cleaning full", "guard level block", "clauses named rightly: at least 0.8", "500 dollars a month", "760 updates"): assert part in card
    assert "dollars" not in brief_card(RECIPES_BRIEF)


# --- the record of chapter 01 --------------------------------------------------------------------------------------

def test_the_record_can_be_made_again(tmp_path):
    "The script, on a run of seconds; what it writes has the form of what the chapter reads."
    tool = [sys.executable, "-m", "llm_scratch", "run", "--preset", "tiny", "--run", tmp_path/"tiny"]
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    made = subprocess.run(tool, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert made.returncode == 0, made.stderr
    out = tmp_path/"out.json"
    done = subprocess.run([sys.executable, ROOT/"benchmarks"/"objectives.py", "--tiny", "--run", tmp_path/"tiny", "--legal", tmp_path/"tiny", "--out", out], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    new, stored = read_json(out), read_json(ROOT/"nbs"/"objectives.json")
    def form(x): return {k: form(v) for k, v in x.items()} if isinstance(x, dict) else form(x[0]) if isinstance(x, list) else type(x)
    for key in ("seen", "bits", "titles", "texts", "legal", "work"): assert form(new[key]) == form(stored[key]), key
    assert new.keys() == stored.keys() and new["run"].keys() == stored["run"].keys()
    for record in (new, stored):
        assert all(row == record["titles"]["counting"][0] for row in record["titles"]["counting"]) # a counter does not see the title
        assert record["titles"]["model"][0] != record["titles"]["model"][3]
        for p in [*record["titles"]["model"], *record["titles"]["counting"]]: assert all(0 < x < 1 for x in p) and sum(p) < 1
        for r in record["seen"]: assert 0 <= r["word"] <= r["context"] <= 1

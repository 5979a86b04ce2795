"One page for a run, read from its folder: what it shows of whole, half and damaged runs, and what a walk leaves when it is killed."
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_scratch.core import UserError, read_json, read_json_lines, write_json, write_json_lines
from llm_scratch.evaluation import Result
from llm_scratch.journey import LATER, Leg, planned_steps, step_hours, walk
from llm_scratch.objectives import LEGAL_BRIEF, RECIPES_BRIEF, save_brief
from llm_scratch.pipeline import app, cpu, gpu, open_run, preset_plan, start_run, tuned_for
from llm_scratch.planning import CHIPS
from llm_scratch.report import report_row
from llm_scratch.scorecard import STEPS, cost_of, folder_verdicts, next_steps, save_scorecard, tell_steps

ROOT = Path(__file__).resolve().parent.parent


def call(*args):
    done = CliRunner().invoke(app, [str(a) for a in args])
    assert not done.exception or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    "A tiny run after all that it can do."
    folder = tmp_path_factory.mktemp("walk")/"tiny"
    status, out, err = call("run", "--preset", "tiny", "--run", folder)
    assert status == 0, err
    return folder, err


@pytest.fixture
def copy(walked, tmp_path): return Path(shutil.copytree(walked[0], tmp_path/"tiny"))


def rows_of(page:str)->tuple[list[str], list[str]]: return re.findall(r'class="step" id="(\w+)"', page), re.findall(r'class="step open"><div><h3>\S+ ([\w\- ]+)<', page)


# --- the page ----------------------------------------------------------------------------------------------------------

def test_a_whole_walk_has_a_row_and_a_picture_for_each_step(walked):
    folder, err = walked
    page = (folder/"scorecard.html").read_text(encoding="utf-8")
    done, left = rows_of(page)
    assert done == [v for v in STEPS if v not in ("finetune", "audit")] and left == ["Fine-tuning", "Safety"]
    assert err.count("left out: a context of 64 tokens") == 2
    assert page.count("<svg") == len(done) - 1  # without a brief there is no picture of promises
    for file in re.findall(r'href="([^"#]+)"', page): assert (folder/file).is_file(), file
    inside = re.sub(r'(xlink:)?href="[^"]*"', "", page)
    assert not re.search(r'(?:src|href)="|url\((?!#)|@import|<script', inside), "it loads nothing"


def test_every_leg_is_in_the_account(walked):
    tried = read_json_lines(walked[0]/"steps.jsonl")
    assert [r["step"] for r in tried] == [v for v in STEPS if v not in ("finetune", "audit")] and all(r["whole"] and r["seconds"] >= 0 and r["cpu_seconds"] >= 0 for r in tried)
    assert cost_of(tried).cpu_seconds > 1 and 0 < cost_of(tried).kwh[0] < cost_of(tried).kwh[1]


def test_walked_again_nothing_is_done_again(copy):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file() and not p.name.startswith("scorecard")}
    status, _, err = call("run", "--run", copy)
    assert status == 0 and err.count("done before") == len(STEPS) - 2, err
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.parametrize("gone, verb", [("model", "pretrain"), ("documents", "data"), ("machine.json", "prepare"), ("results.jsonl", "evaluate"), ("bundle", "export"), ("tokens/train", "tokenize"), ("decision.md", "plan")])
def test_a_row_falls_back_when_its_files_are_gone(copy, gone, verb):
    (shutil.rmtree if (copy/gone).is_dir() else os.remove)(copy/gone)
    page = save_scorecard(copy).read_text(encoding="utf-8")
    assert verb not in rows_of(page)[0] and STEPS[verb][0] in rows_of(page)[1]


def test_what_a_step_says_is_escaped(copy):
    (copy/"decision.md").write_text("<script>alert(1)</script>\n")
    write_json(copy/"samples.json", [dict(text="</pre><script>", nearest=0.)])
    page = save_scorecard(copy).read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;alert" in page


# --- promises and advice -----------------------------------------------------------------------------------------------

def advice(folder:Path)->list[str]: return next_steps(folder, tell_steps(folder))


def test_gates_of_every_step_are_judged_where_its_figures_are(tmp_path):
    save_brief(LEGAL_BRIEF, tmp_path/"brief.json")
    outcome = lambda: {v.gate.metric: v.outcome for v in folder_verdicts(tmp_path)}
    assert set(outcome().values()) == {"not measured"} and "accuracy, worst group" in outcome()
    write_json_lines(tmp_path/"results.jsonl", [report_row("bits per byte, licences", Result(1.1, .01, 100))])
    (tmp_path/"tuned").mkdir()
    write_json_lines(tmp_path/"tuned"/"clauses.jsonl", [report_row("clauses named rightly", Result(.5, .01, 100), step="finetune")])
    assert (outcome()["bits per byte, licences"], outcome()["clauses named rightly"], outcome()["accuracy, worst group"]) == ("pass", "fail", "not measured")
    assert advice(tmp_path)[0].startswith("A promise was broken: clauses named rightly")


def test_advice_needs_its_reason(copy):
    said = " ".join(advice(copy))
    assert "tokens for each weight" in said and "Another turn of the loop" in said and "knows no facts" not in said
    write_json_lines(copy/"log.jsonl", [dict(step=1, loss=1., lr=1., grad_norm=1., n_tokens=10**9, seconds=1.)])
    assert "tokens for each weight" not in " ".join(advice(copy))
    (copy/"tuned").mkdir(exist_ok=True)
    for fact, expected in ((.05, True), (.5, False)):
        write_json_lines(copy/"tuned"/"chat.jsonl", [report_row(f"words {of} in answers, fact, after", Result(x, .02, 40), step="finetune") for of, x in (("of the source", fact), ("by luck", .045))])
        assert ("knows no facts" in " ".join(advice(copy))) == expected


def test_money_follows_the_energy_and_counted_energy_stands_beside():
    c = cost_of([dict(cpu_seconds=3600, seconds=1800, kwh=.01), dict(cpu_seconds=0, seconds=10, kwh=None)])
    assert c.counted is None and c.seconds == 1810 and math.isclose(c.kwh[0], .0055) and math.isclose(c.kwh[1], .032) and math.isclose(c.dollars[1], .032*.35)


# --- the walk ----------------------------------------------------------------------------------------------------------

def test_what_breaks_a_leg_is_passed_on_and_noted(tmp_path):
    def breaks(): raise UserError("no text")
    with pytest.raises(UserError, match="no text"): walk(tmp_path, [Leg("data", breaks, lambda: False)], say=lambda s: None)
    assert [(r["step"], r["whole"]) for r in read_json_lines(tmp_path/"steps.jsonl")] == [("data", False)] and (tmp_path/"scorecard.html").is_file()


def test_the_last_step_that_is_asked_for_is_the_last(tmp_path):
    status, _, err = call("run", "--preset", "tiny", "--until", "tokenize", "--run", tmp_path/"run")
    assert status == 0 and (tmp_path/"run"/"tokens").exists() and not (tmp_path/"run"/"model").exists(), err
    assert rows_of((tmp_path/"run"/"scorecard.html").read_text(encoding="utf-8"))[0] == ["plan", "design", "data", "tokenize"]
    status, _, err = call("run", "--until", "deploy", "--run", tmp_path/"run")
    assert status == 2 and "there is no step deploy: give one of plan, design" in err and err.count("\n") == 1


def test_a_launched_training_is_walked_around(walked, tmp_path):
    "Before it and after it the same command goes on; only the training itself is refused, and a wrong step makes nothing."
    status, _, err = call("run", "--preset", "cluster-tiny", "--until", "deploy", "--run", tmp_path/"run")
    assert status == 2 and "there is no step deploy" in err and not (tmp_path/"run").exists()
    status, _, err = call("run", "--preset", "cluster-tiny", "--until", "prepare", "--run", tmp_path/"run")
    assert status == 0 and (tmp_path/"run"/"machine.json").is_file(), err
    status, _, err = call("run", "--run", tmp_path/"run")
    assert status == 2 and "deepspeed in 2 processes" in err and err.count("\n") == 1, err
    shutil.copytree(walked[0]/"model", tmp_path/"run"/"model")  # as if it had been launched
    status, _, err = call("run", "--until", "pretrain", "--run", tmp_path/"run")
    assert status == 0 and "pretrain  done before" in err, err


def test_what_is_not_installed_is_left_out_by_name_and_the_walk_goes_on(walked, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(walked[0], tmp_path/"tiny"))
    for name in ("bundle", "improve"): shutil.rmtree(copy/name)
    for name in ("onnxscript", "sklearn", "ftfy"): monkeypatch.setitem(sys.modules, name, None)
    status, _, err = call("run", "--run", copy)
    assert status == 0 and "export    left out: an export wants the package onnxscript: pip install 'llm_scratch[run]'" in err and "improve   left out: a turn of the loop wants the package ftfy" in err, err
    assert rows_of((copy/"scorecard.html").read_text(encoding="utf-8"))[1] == ["Fine-tuning", "Safety", "Deployment", "The loop"]


def test_recipes_alone_are_held_to_the_books_promises(tmp_path):
    from llm_scratch.pipeline import _own_brief
    run = start_run(tmp_path/"run", cpu())
    brief = _own_brief(run, None)
    assert brief.texts == ("recipes",) and brief.gates == RECIPES_BRIEF.gates and run.brief.is_file()
    assert _own_brief(start_run(tmp_path/"other", cpu().tiny()), None) is None and not (tmp_path/"other"/"brief.json").exists()
    assert (tuned_for(brief), tuned_for(LEGAL_BRIEF), tuned_for(None)) == ("chat", "clauses", "chat")


# --- what a larger run would take -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset, words", [("gpu", ["llm-scratch pretrain --run runs/gpu", "15.2 h, 19.8 dollars", "checkpoints/: 2 of 1.48 GB"]), ("cluster", ["llm-scratch launch --run runs/cluster --over ssh --hostfile hostfile --nodes 4", "13.5 h, 560 dollars", "preflight --ranks 32"]),
                                           ("cpu", ["llm-scratch finetune --run runs/cpu --task chat"])])
def test_a_dry_run_lists_every_command_file_and_cost(preset, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call("run", "--preset", preset, "--dry-run")
    assert status == 0 and all(w in out for w in words) and not list(tmp_path.iterdir()), out + err
    verbs = [v for v in STEPS if re.search(rf"^{v}\s", out, re.M)]
    assert verbs == list(STEPS)
    for line in re.findall(r"^\w+ +(llm-scratch [\w-]+)[^;\n]*", out, re.M):  # every command is one that there is
        assert CliRunner().invoke(app, [line.split()[1], "--help"]).exit_code == 0, line


def test_a_dry_run_of_the_legal_brief_tunes_for_clauses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call("run", "--brief", "legal", "--dry-run")
    assert status == 0 and "--brief legal" in out and "--task clauses" in out


def test_later_steps_cost_more_on_larger_models_and_slower_chips():
    small, large = (preset_plan(p, CHIPS["a100"]) for p in (gpu(depth=4), gpu()))
    for work in LATER.values(): assert step_hours(work, small) < step_hours(work, large) < step_hours(work, preset_plan(gpu(), CHIPS["h100"]))*4
    assert len(planned_steps(large, "runs/gpu", "gpu", "train")) == len(STEPS)


# --- killed --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("at", [("data", "documents"), ("pretrain", "checkpoints/000010"), ("evaluate", "model"), ("export", "report.html"), ("improve", "bundle/bundle.json")], ids=lambda at: at[0])
def test_killed_in_a_step_the_same_command_ends_with_the_same_files(at, walked, tmp_path):
    "The process is killed as soon as a file shows that the step has begun; what is whole stays, and the rest comes out the same."
    start, folder = Path(walked[0]), tmp_path/"run"
    command = [sys.executable, "-m", "llm_scratch", "run", "--preset", "tiny", "--run", folder]
    if at[0] in ("evaluate", "export", "improve"):  # begin where the step begins
        shutil.copytree(start, folder)
        for verb, names in dict(evaluate=("results.jsonl", "items.jsonl", "speed.jsonl", "samples.json", "report.html"), export=("bundle",), improve=("improve",)).items():
            if list(STEPS).index(verb) >= list(STEPS).index(at[0]):
                for n in names: (shutil.rmtree if (folder/n).is_dir() else os.remove)(folder/n)
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    deadline = time.monotonic() + 120
    while not (folder/at[1]).exists() and child.poll() is None and time.monotonic() < deadline: time.sleep(.01)
    time.sleep(.3)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    status, _, err = call("run", "--preset", "tiny", "--run", folder)
    assert status == 0, err
    steady = lambda f: {n: (f/n).read_bytes() for n in ("tokens/train/00000.bin", "model/model.safetensors", "results.jsonl", "samples.json", "bundle/fp32.onnx") if (f/n).exists()}
    assert steady(folder) == steady(start) and len(steady(start)) >= 4
    assert read_json(next((folder/"improve"/"turns").glob("*/turn.json")))["after"] == read_json(next((start/"improve"/"turns").glob("*/turn.json")))["after"]

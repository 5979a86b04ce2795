"The command line and the run directory: what a user can get wrong, what a kill can break, and what other tools make of the model."
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llm_scratch import pipeline
from llm_scratch.architecture import Decoder, init_weights, load_model
from llm_scratch.core import sha256_file
from llm_scratch.data import tiny_corpus
from llm_scratch.pipeline import (PRESETS, app, check_memory, cluster, cpu, decoder_config, free_bytes, open_run, prepare_documents, prepare_tokens, preset_layout, pretrain, read_log, start_run,
                                  write_texts)
from llm_scratch.planning import peak_memory
from llm_scratch.rates import cosine, linear
from llm_scratch.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def call(*args, typed=""):
    "Run a verb in this process: status, standard output, standard error."
    done = CliRunner().invoke(app, [str(a) for a in args], input=typed)
    assert not done.exception or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def tree(folder:Path)->dict[str, str]: return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A tiny run that went through all steps; copy it before you spoil it."
    folder = tmp_path_factory.mktemp("runs [of mine]")/"tiny"
    status, out, err = call("run", "--preset", "tiny", "--until", "evaluate", "--run", folder)
    assert status == 0 and str(folder) in err.replace("\n", "") and str(folder) in out.replace("\n", ""), err
    return folder


@pytest.fixture
def copy(finished, tmp_path): return Path(shutil.copytree(finished, tmp_path/"tiny"))


# --- the whole run ---------------------------------------------------------------------------------------------------

def test_run_leaves_what_the_chapter_promises(finished):
    names = {p.name for p in finished.iterdir()} - {".run.lock"}  # held while it trains
    assert names == {"run.json", "documents", "tokenizer", "tokens", "checkpoints", "log.jsonl", "model", "results.jsonl", "samples.json", "scorecard.html", "scorecard.md", "speed.jsonl", "items.jsonl", "report.html", "decision.md", "design.json", "machine.json", "steps.jsonl"}
    rows = [json.loads(line) for line in (finished/"results.jsonl").read_text().splitlines()]
    assert all(r.keys() == {"step", "name", "goal", "mean", "stderr", "n", "seed"} and r["stderr"] >= 0 and r["n"] > 0 and r["seed"] == 0 for r in rows)
    score, report = ((finished/f"{name}.html").read_text(encoding="utf-8") for name in ("scorecard", "report"))
    for page,n_texts in ((score, 3), (report, 4)):
        inside = re.sub(r'<a href="[^":]+">|xlink:href="#| href="#', "", page)
        assert not re.search(r'(?:src|href)="|url\((?!#)|@import', inside), "it loads nothing"
        assert page.count("<pre>") == n_texts and "± " in page
    assert all(r["name"] in report for r in rows) and all(r["name"] in score for r in rows if r["goal"]) and (score.count("<svg"), report.count("<svg")) == (6, 3)
    times, items = ([json.loads(line) for line in (finished/f"{name}.jsonl").read_text().splitlines()] for name in ("speed", "items"))
    assert all(r["name"] in report and r["mean"] > 0 and r["n"] == 5 for r in times) and len(times) == 3
    by_item = sum(r["value"] for r in items)/sum(r["per"] for r in items)
    assert {r["name"] for r in items} == {"bits per byte, tiny"} and abs(by_item - next(r["mean"] for r in rows if r["name"] == "bits per byte, tiny")) < 1e-9
    assert (finished/"scorecard.md").read_text(encoding="utf-8").count("|") > 40


def test_running_again_changes_no_byte_but_the_figures_stay(copy):
    before = tree(copy)
    status, out, err = call("run", "--until", "evaluate", "--run", copy)
    after = tree(copy)
    assert status == 0 and after == before and err.count("done before") == 7, err


def test_texts_in_a_document_are_escaped(copy):
    samples = json.loads((copy/"samples.json").read_text())
    samples[0]["text"] = "<script>alert(1)</script>"
    (copy/"samples.json").write_text(json.dumps(samples))
    pipeline.save_scorecard(copy)
    assert "<script>" not in (copy/"scorecard.html").read_text() and "&lt;script&gt;" in (copy/"scorecard.html").read_text()


def test_the_verbs_one_by_one_make_the_same_model(finished, tmp_path):
    for verb in ("data", "tokenize", "pretrain", "evaluate"):
        status, out, err = call(verb, "--run", tmp_path/"run", *(["--preset", "tiny"] if verb == "data" else []))
        assert status == 0, err
    mine, theirs = tree(tmp_path/"run"), tree(finished)
    different = {n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n) and not n.startswith("checkpoints/")}
    assert different == {"log.jsonl", "scorecard.html", "scorecard.md", "speed.jsonl", "report.html", "decision.md", "design.json", "machine.json", "steps.jsonl"}  # the last four are of the walk; the others hold seconds; a checkpoint holds the state of torch's own generator


def test_another_seed_is_another_model_on_the_same_split(finished, tmp_path):
    status, _, err = call("run", "--preset", "tiny", "--until", "evaluate", "--seed", 3, "--run", tmp_path/"run")
    assert status == 0, err
    same = lambda name: sha256_file(tmp_path/"run"/name) == sha256_file(finished/name)
    assert same("documents/train.parquet") and same("tokenizer/tokenizer.json") and not same("model/model.safetensors")
    assert {r["seed"] for r in map(json.loads, (tmp_path/"run"/"results.jsonl").read_text().splitlines())} == {3}


# --- killed ----------------------------------------------------------------------------------------------------------

def start(folder:Path)->subprocess.Popen:
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), COLUMNS="200")
    return subprocess.Popen([sys.executable, "-m", "llm_scratch", "run", "--preset", "tiny", "--until", "evaluate", "--run", folder], cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_killed_at_random_moments_the_command_ends_with_the_same_weights(tmp_path):
    "The first kills land in the early steps, the later ones in training and evaluation."
    whole = start(tmp_path/"whole")
    whole.communicate(timeout=200)
    assert whole.returncode == 0
    rng, kills = random.Random(1), 0
    while kills < 8:
        child = start(tmp_path/"killed")
        while not (tmp_path/"killed").exists() and child.poll() is None: time.sleep(.01)  # past the imports
        time.sleep(rng.uniform(0, 1.2))
        if child.poll() is not None: break
        child.kill()
        child.communicate()
        kills += 1
    assert kills > 3
    last = start(tmp_path/"killed")
    _, err = last.communicate(timeout=200)
    assert last.returncode == 0, err
    for name in ("model/model.safetensors", "tokenizer/tokenizer.json", "tokens/train/00000.bin", "results.jsonl"):
        assert sha256_file(tmp_path/"whole"/name) == sha256_file(tmp_path/"killed"/name), name
    assert [r["loss"] for r in read_log(open_run(tmp_path/"whole"))] == [r["loss"] for r in read_log(open_run(tmp_path/"killed"))]


def test_leaving_a_loop_early_saves_between_two_updates(tmp_path):
    run = start_run(tmp_path/"run", cpu().tiny())
    prepare_documents(run), prepare_tokens(run)
    for step in pretrain(run):
        if step.n == 7: break
    assert [p.name for p in run.checkpoints.iterdir() if p.name.isdecimal()] == ["000007"] and len(read_log(run)) == 7
    assert next(pretrain(run)).n == 8


def test_a_log_that_knows_more_than_the_checkpoint_is_cut(tmp_path):
    run = start_run(tmp_path/"run", cpu().tiny())
    prepare_documents(run), prepare_tokens(run)
    for step in pretrain(run):
        if step.n == 10: break
    with run.log.open("a") as f: f.write('{"step": 11, "loss": 0}\n')
    for step in pretrain(run): pass
    assert [r["step"] for r in read_log(run)] == list(range(1, 31)) and all(r["loss"] > 0 for r in read_log(run))


# --- what a user gets wrong --------------------------------------------------------------------------------------------

def flip(path:Path):
    data = bytearray(path.read_bytes()); data[len(data)//2] ^= 1; path.write_bytes(data)


@pytest.mark.parametrize("spoil", [lambda c: flip(c/"state.safetensors"), lambda c: (c/"manifest.json").unlink(), lambda c: (c.parent/"latest").write_text("7")])
def test_a_damaged_checkpoint_is_told_and_the_one_before_leads_to_the_same_model(copy, spoil):
    whole = (copy/"model"/"model.safetensors").read_bytes()
    shutil.rmtree(copy/"model")
    spoil(copy/"checkpoints"/"000030")
    with pytest.warns(UserWarning, match="Going on from .*0000[23]0, which is whole"): assert call("pretrain", "--run", copy)[0] == 0
    assert (copy/"model"/"model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("spoil, verb, named, remedy", [
    (lambda r: flip(r/"documents"/"train.parquet"), "tokenize", "train.parquet", "llm-scratch data"),
    (lambda r: flip(r/"tokenizer"/"tokenizer.json"), "tokenize", "tokenizer.json", "llm-scratch tokenize"),
    (lambda r: (shutil.rmtree(r/"model"), flip(r/"tokens"/"train"/"00000.bin")), "pretrain", "00000.bin", "llm-scratch tokenize"),
    (lambda r: (shutil.rmtree(r/"model"), *(flip(c/"state.safetensors") for c in (r/"checkpoints").glob("0*"))), "pretrain", "state.safetensors", "move the folder away"),
    (lambda r: flip(r/"model"/"model.safetensors"), "evaluate", "model.safetensors", "again"),
    (lambda r: flip(r/"tokens"/"validation"/"00000.bin"), "evaluate", "00000.bin", "llm-scratch tokenize"),
    (lambda r: (r/"run.json").write_text("{"), "evaluate", "run.json", "start again"),
    (lambda r: (r/"run.json").write_text("[]"), "evaluate", "run.json", "new one"),
    (lambda r: (r/"run.json").write_text('{"format": "llm_scratch run", "preset": {"sources": []}, "seed": 0}'), "run", "run.json", "another version"),
    (lambda r: shutil.rmtree(r/"model"), "evaluate", "model is missing", "llm-scratch pretrain"),
    (lambda r: (shutil.rmtree(r/"model"), shutil.rmtree(r/"tokens")), "pretrain", "tokens", "llm-scratch tokenize"),
    (lambda r: shutil.rmtree(r/"documents"), "evaluate", "documents", "llm-scratch data"),
    (lambda r: flip(r/"model"/"model.safetensors"), "generate", "model.safetensors", "again"),
    (lambda r: flip(r/"tokenizer"/"tokenizer.json"), "chat", "tokenizer.json", "llm-scratch tokenize"),
])
def test_damage_is_one_line_with_a_remedy_and_nothing_is_overwritten(copy, spoil, verb, named, remedy):
    spoil(copy)
    before = tree(copy)
    status, out, err = call(verb, "--run", copy)
    assert status == 2 and len(err.strip().splitlines()) == 1, (status, out, err)
    assert named in err and remedy in err and "Traceback" not in err
    assert tree(copy) == before


def test_shards_of_another_tokenizer_are_noticed(copy):
    shutil.rmtree(copy/"model")
    header = json.loads((copy/"tokens"/"train"/"header.json").read_text())
    (copy/"tokens"/"train"/"header.json").write_text(json.dumps(header | dict(tokenizer="0"*64)))
    status, _, err = call("pretrain", "--run", copy)
    assert status == 2 and "made by another tokenizer" in err


@pytest.mark.parametrize("args, said", [
    (["run", "--preset", "huge"], "there is no preset huge: give one of cpu, tiny"),
    (["run", "--preset", "tiny", "--depth", "0"], "give 1 or more"),
    (["generate", "--run", "nowhere"], "there is no run in nowhere"),
    (["evaluate", "--preset", "huge"], "there is no preset huge"),
])
def test_bad_options_make_nothing(args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = call(*args)
    assert status == 2 and said in err and len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_another_run_in_the_same_folder_is_refused(copy):
    before = tree(copy)
    for args in (["--seed", 1], ["--preset", "cpu"], ["--depth", 2]):
        status, _, err = call("run", "--run", copy, *args)
        assert status == 2 and f"{copy} holds a run with" in err and "give another folder" in err and tree(copy) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path/"letter.txt").write_text("dear")
    for path in (tmp_path, tmp_path/"letter.txt"):
        status, _, err = call("run", "--preset", "tiny", "--run", path)
        assert status == 2 and len(err.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"] and (tmp_path/"letter.txt").read_text() == "dear"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path/"file").write_text("")
    status, _, err = call("run", "--preset", "tiny", "--run", tmp_path/"file"/"run")
    assert status == 2 and str(tmp_path/"file") in err and len(err.strip().splitlines()) == 1


def test_empty_text_small_vocabulary_and_long_context_name_both_numbers(tmp_path):
    from dataclasses import replace
    tiny = cpu().tiny()
    for i, (preset, said) in enumerate([(replace(tiny, vocab_size=258), "vocab_size=258 .* at least 259"), (replace(tiny, context_len=5000), r"\d+ tokens, fewer than 2\*context_len=10000")]):
        run = start_run(tmp_path/str(i), preset)
        with pytest.raises(ValueError, match=said): prepare_documents(run), prepare_tokens(run), next(pretrain(run))


def test_a_small_source_gives_at_most_a_quarter_of_itself(tmp_path):
    from dataclasses import replace
    assert prepare_documents(start_run(tmp_path/"run", replace(cpu().tiny(), n_validation=24)))["validation"].num_rows == 6  # of 24


# --- the model in other hands --------------------------------------------------------------------------------------------

def test_transformers_opens_the_model_folder(finished):
    transformers = pytest.importorskip("transformers")
    theirs, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(finished/"model"), transformers.AutoTokenizer.from_pretrained(finished/"model")
    ours, tok = load_model(finished/"model"), load_tokenizer(finished/"tokenizer")
    text = "# Onion Soup\n\nIngredients:\n- 2 onions, sliced\n- ½ litre stock\n"
    ids = tok.encode(text)
    assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text and tokenizer.eos_token_id == tok.eot_id
    with torch.no_grad(): torch.testing.assert_close(theirs(torch.tensor([ids])).logits, ours(torch.tensor([ids])), atol=1e-4, rtol=0)
    written = theirs.generate(torch.tensor([[tok.eot_id, *ids]]), max_new_tokens=12, do_sample=False)[0].tolist()[1:]
    greedy = write_texts(ours, tok, [text], temperature=0)[0]
    assert greedy.startswith(tok.decode([i for i in written if i != tok.eot_id]))


def test_the_model_says_what_it_is(finished):
    card = (finished/"model"/"README.md").read_text(encoding="utf-8")
    assert "llm-scratch run --preset tiny --seed 0" in card and "Licences and attribution" in card and "must not be relied on" in card


# --- writing -------------------------------------------------------------------------------------------------------------

def test_generate_prints_the_prompt_and_goes_on(finished):
    one, two = (call("generate", r"# Rice\n\nIngredients:", "--run", finished, "--seed", 5) for _ in range(2))
    assert one == two and one[0] == 0 and one[1].startswith("# Rice\n\nIngredients:")
    assert call("generate", r"# Rice\n\nIngredients:", "--run", finished, "--seed", 6)[1] != one[1]
    status, _, err = call("generate", "rice "*100, "--run", finished)
    assert status == 2 and "context_len=64: give one of at most 63" in err


def test_generate_says_when_it_takes_the_compiled_step(finished, tmp_path):
    pytest.importorskip("numba")
    folder = tmp_path/"long"  # the tiny preset's context is too short for it
    model = init_weights(Decoder(replace(load_model(finished/"model").cfg, context_len=160)), 0)
    shutil.copytree(finished, folder)
    shutil.rmtree(folder/"model")
    pipeline.save_pretrained(open_run(folder), model)
    done = subprocess.run([sys.executable, "-m", "llm_scratch", "generate", "Rice", "--run", folder, "--max-new-tokens", "120"], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)), timeout=200)
    assert done.returncode == 0 and "120 tokens by CompiledDecoder(float32, Numba)" in done.stderr, done.stderr
    done = subprocess.run([sys.executable, "-m", "llm_scratch", "generate", "Rice", "--run", folder, "--max-new-tokens", "20"], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)), timeout=200)
    assert done.returncode == 0 and done.stderr == ""


def test_a_reader_who_leaves_early_gets_no_traceback(finished):
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run(f"{sys.executable} -m llm_scratch generate --run {finished} | head -c 3", shell=True, env=env, capture_output=True, text=True, timeout=100)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr


def test_chat_continues_each_line_and_survives_a_long_one(finished):
    status, out, err = call("chat", "--run", finished, typed="# Rice\n" + "rice "*100 + "\n# Soup\\n\\n\n\n")
    assert status == 0 and out.count("# Rice") == 1 and "# Soup\n" in out and "context_len=64" in err
    assert call("chat", "--run", finished, typed="")[0] == 0  # Ctrl-D


def test_doctor_knows_the_machine():
    status, out, _ = call("doctor")
    plain = " ".join(out.split())
    assert status == 0 and all(word in plain for word in ("python", "torch", "cores", "cache", "extra interchange", "extra deploy"))
    assert "'llm_scratch[" in plain or all(" adds " not in line for line in out.splitlines())  # brackets are no markup


def test_a_plan_says_how_to_start_and_that_command_is_understood(tmp_path):
    start_run(tmp_path/"r", replace(cpu().tiny(), batch_size=8))
    for more in ([], ["--per-node", 1], ["--chip", "l4", "--tokens-per-step", 2**20]):
        status, out, _ = call("plan-training", "--model", "1.3b", *more)
        assert status == 0 and "memory" in out
        _, *words = shlex.split(re.search(r"start +(.*)", out)[1].replace("runs/plan", str(tmp_path/"r")))
        if words[0] == "launch": assert call(*words, "--dry-run")[0] == 0
        else: assert call(words[0], *words[1:], "--help")[0] == 0 and {w for w in words if w[:2] == "--"} <= set(re.findall(r"--[a-z-]+", call(words[0], "--help")[1]))
    assert call("plan-training", "--model", "9b")[0] == 2 and "1.3b" in call("plan-training", "--model", "9b")[2]
    own = ("plan-training", "--depth", 4, "--context-len", 512, "--tokens-per-step", 2048, "--per-node", 1)
    assert call(*own)[0] == 0 and call(*own, "--chip", "abacus") == (2, "", "llm-scratch: there is no chip abacus: give one of a100, h100, h200, l4, rtx4090, laptop\n")


def test_launch_shows_what_every_process_would_run(copy):
    status, out, _ = call("launch", "--run", copy, "--engine", "deepspeed", "--zero-stage", 3, "--processes", 2, "--recompute", "--monitor", "tensorboard", "--dry-run")
    assert status == 0 and shlex.split(out)[-13:] == ["--run", str(copy), "--engine", "deepspeed", "--zero-stage", "3", "--precision", "fp32", "--recompute", "--monitor", "tensorboard", "--timeout", "45.0"]
    status, out, _ = call("launch", "--run", copy, "--over", "kubernetes", "--nodes", 2, "--processes", 2, "--image", "mine:1", "--dry-run")
    assert status == 0 and "image: mine:1" in out and "completions: 2" in out
    assert call("launch", "--run", copy, "--processes", 3)[::2] == (2, "llm-scratch: a batch of 4 sequences cannot be shared out evenly among 3 processes: 1, 2, 4 would do, or another batch size\n")


def test_the_files_of_monitoring(tmp_path):
    assert call("monitoring-files", "--out", tmp_path/"m")[0] == 0
    assert {p.name for p in (tmp_path/"m").iterdir()} == {"prometheus.yml", "rules.yml", "grafana-dashboard.json"}


def test_every_update_is_told_and_blocks_computed_again_change_nothing(copy):
    whole = (copy/"model"/"model.safetensors").read_bytes()
    for name in ("model", "checkpoints"): shutil.rmtree(copy/name)
    run = open_run(copy)
    with closing(pretrain(replace(run, preset=replace(run.preset, recompute=True)), monitor="tensorboard")) as steps: assert [s.n for s in steps] == list(range(1, 31))
    assert (copy/"model"/"model.safetensors").read_bytes() == whole and [r["step"] for r in read_log(open_run(copy))] == list(range(1, 31))
    assert list((copy/"tensorboard").glob("events*"))


# --- presets ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("depth", range(1, 33))
def test_every_depth_is_a_model(depth):
    cfg = decoder_config(depth, 512, 64)
    assert cfg.d_model == 64*cfg.n_heads and cfg.d_ff % 64 == 0 and cfg.n_layers == depth


def test_presets_are_values():
    assert all(make() == make() for make in PRESETS.values()) and cpu(6).depth == 6 and cpu(6).tiny().name == "tiny"


# --- outside the repository --------------------------------------------------------------------------------------------------

def test_the_command_explains_itself():
    for command in ([Path(sys.executable).with_name("llm-scratch")], [sys.executable, "-m", "llm_scratch"]):
        done = subprocess.run([*command, "--help"], cwd="/", capture_output=True, text=True, timeout=100, env=os.environ | dict(COLUMNS="200"))
        assert done.returncode == 0 and all(verb in done.stdout for verb in ("data", "tokenize", "pretrain", "evaluate", "generate", "chat", "doctor", "run"))


# --- text of one's own --------------------------------------------------------------------------------------------------

@pytest.fixture
def mine(tmp_path):
    "A folder as people have them: lines of JSON, a page, a copy, and a broken file."
    folder = tmp_path/"my texts"
    folder.mkdir()
    texts = tiny_corpus()["text"][:]
    (folder/"notes.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in [*texts[:16], texts[0]]) + "half a li", encoding="utf-8")
    for i, t in enumerate(texts[16:]): (folder/f"{i}.html").write_text("<p>" + t.replace("\n", "</p>\n<p>") + "</p>", encoding="utf-8")
    return folder


def test_a_folder_becomes_a_run_and_the_run_remembers_it(mine, tmp_path):
    status, out, err = call("data", "--preset", "tiny", "--sources", mine, "--run", tmp_path/"run")
    assert status == 0, err
    preset = json.loads((tmp_path/"run"/"run.json").read_text())["preset"]
    assert (preset["sources"], preset["cleaning"], preset["keep_out"]) == ([str(mine)], "basic", [])
    assert "notes.jsonl/18: no JSON" in (tmp_path/"run"/"curation"/"curated"/"unread.txt").read_text()
    card = (tmp_path/"run"/"documents"/"data_card.md").read_text(encoding="utf-8")
    assert "| duplicates | exact copy | 1 |" in card and "**my texts**: yours" in card
    before = tree(tmp_path/"run")
    for again in ([], ["--sources", mine]): assert call("data", "--run", tmp_path/"run", *again)[0] == 0 and tree(tmp_path/"run") == before
    for other, told in ((["--sources", "tiny"], "sources="), (["--clean", "full"], "cleaning=basic, not cleaning=full")):
        status, _, err = call("data", "--run", tmp_path/"run", *other)
        assert status == 2 and told in err and err.count("\n") == 1, err
    status, out, err = call("run", "--until", "evaluate", "--run", tmp_path/"run")
    assert status == 0 and "bits per byte, my texts" in out and "form of a recipe" not in out, err


@pytest.mark.parametrize("options, told", [(["--sources", "soup"], "there is no source soup: give some of recipes"), (["--sources", "tiny,soup"], "there is no source soup"), (["--sources", ","], "no source is given"),
    (["--sources", "MINE", "--clean", "off"], "must be read as a stream: give --clean basic or full"), (["--sources", "tiny", "--clean", "very"], "there is no cleaning very: give one of off, basic, full"),
    (["--keep-out", "MINE", "--clean", "off"], "must be read as a stream"), (["--keep-out", "soup"], "there is no source soup"), (["--sources", "hub:soup"], "there is no source hub:soup")])
def test_text_that_can_not_be_had_is_told_before_anything_is_made(mine, tmp_path, options, told):
    status, out, err = call("data", "--preset", "tiny", "--run", tmp_path/"run", *[str(mine) if o == "MINE" else o for o in options])
    assert status == 2 and told in err and err.count("\n") == 1 and not (tmp_path/"run").exists(), err


def test_what_quotes_an_evaluation_is_kept_out(mine, tmp_path):
    asked = tmp_path/"asked.txt"
    asked.write_text(tiny_corpus()["text"][5], encoding="utf-8")
    status, _, err = call("data", "--preset", "tiny", "--sources", mine, "--keep-out", asked, "--run", tmp_path/"run")
    assert status == 0, err
    assert "| Decontaminate | quotes " in (tmp_path/"run"/"documents"/"data_card.md").read_text(encoding="utf-8")
    texts = [t for docs in prepare_documents(open_run(tmp_path/"run")).values() for t in docs["text"]]
    assert texts and not any("Garlic Bread" in t for t in texts)


def test_too_little_text_is_told(tmp_path):
    (tmp_path/"one.txt").write_text("One text is not enough to hold one back.", encoding="utf-8")
    status, _, err = call("data", "--preset", "tiny", "--sources", tmp_path/"one.txt", "--run", tmp_path/"run")
    assert status == 2 and "1 documents are left, too few to hold one of four back" in err and err.count("\n") == 1


def test_a_run_of_the_edition_before_opens(finished, tmp_path):
    "Its run.json knows no cleaning."
    copy = Path(shutil.copytree(finished, tmp_path/"old"))
    saved = json.loads((copy/"run.json").read_text())
    for new in ("cleaning", "keep_out"): del saved["preset"][new]
    (copy/"run.json").write_text(json.dumps(saved))
    assert open_run(copy).preset == open_run(finished).preset


# --- before the first step ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, told", [
    (dict(lr=0.), "lr=0.0 is not above 0"), (dict(lr=-1.), "lr=-1.0 is not above 0"), (dict(lr=float("nan")), "lr=nan is not above 0"), (dict(lr=float("inf")), "lr=inf is not above 0"),
    (dict(max_norm=0.), "max_norm=0.0 is not above 0"), (dict(warmup=30), "warmup=30 does not fit into n_steps=30, give from 1 to 29"), (dict(warmup=0), "warmup=0"),
    (dict(n_micro=3), "batch_size=4 is not a multiple of 1 processes x n_micro=3"), (dict(nodes=2, per_node=2, n_micro=2), "batch_size=4 is not a multiple of 4 processes x n_micro=2"),
    (dict(n_validation=0), "n_validation=0 leaves the validation set empty"), (dict(n_steps=0), "n_steps=0 is below 1"), (dict(n_micro=0), "n_micro=0 is below 1"),
    (dict(schedule="steps"), "there is no schedule steps, give one of wsd, cosine, linear"), (dict(optimizer="sgd"), "there is no optimizer sgd"), (dict(engine="horovod"), "there is no engine horovod"),
    (dict(precision="fp8"), "there is no precision fp8, give one of fp32, bf16"), (dict(shape="9b"), "there is no shape 9b, give one of gpt2"), (dict(device="tpu"), "there is no device tpu"),
    (dict(engine="deepspeed"), "deepspeed drives one AdamW, not muon")])
def test_a_preset_that_makes_no_sense_names_both_numbers(wrong, told):
    with pytest.raises(ValueError, match=re.escape(told)): replace(cpu().tiny(), **wrong)


def test_what_just_fits_is_taken():
    for right in (dict(warmup=29), dict(warmup=1), dict(n_micro=4), dict(nodes=2, per_node=2), dict(n_validation=1), dict(lr=1e-9), dict(engine="deepspeed", optimizer="adamw")): replace(cpu().tiny(), **right)


@pytest.fixture
def untrained(copy):
    "A tiny run with tokens and nothing trained."
    for name in ("model", "checkpoints"): shutil.rmtree(copy/name)
    (copy/"log.jsonl").unlink()
    return copy


def with_preset(folder:Path, **fields):
    saved = json.loads((folder/"run.json").read_text())
    (folder/"run.json").write_text(json.dumps(saved | dict(preset=saved["preset"] | fields)))


@pytest.mark.parametrize("spoil, args, told", [
    (None, ["--lr", 0], "lr=0.0 is not above 0"),
    (None, ["--warmup", 30], "warmup=30 does not fit into n_steps=30"),
    (None, ["--n-micro", 3], "batch_size=4 is not a multiple of 1 processes x n_micro=3"),
    (None, ["--schedule", "steps"], "there is no schedule steps"),
    (None, ["--precision", "fp8"], "there is no precision fp8"),
    (lambda r: with_preset(r, batch_size=4_000_000), [], "does not fit: the step needs"),
    (lambda r: with_preset(r, n_validation=0), [], "leaves the validation set empty"),
    (lambda r: shutil.rmtree(r/"tokens"/"validation"), [], "llm-scratch tokenize"),
    (lambda r: (shutil.rmtree(r/"tokens"/"validation"), shutil.copytree(r/"tokens"/"train", r/"tokens"/"validation"), rewrite(r/"tokens"/"validation"/"header.json", n_docs=0)), [], "validation set in"),
    (lambda r: rewrite(r/"tokens"/"validation"/"header.json", tokenizer="0"*64), [], "made by another tokenizer"),
    (lambda r: rewrite(r/"tokens"/"train"/"header.json", tokenizer="0"*64), [], "made by another tokenizer"),
])
def test_before_any_compute_is_spent_one_line_says_what_is_wrong(untrained, spoil, args, told, monkeypatch):
    if spoil: spoil(untrained)
    before = tree(untrained)
    monkeypatch.setattr(pipeline, "init_weights", lambda *_: pytest.fail("it made a model"))
    status, out, err = call("pretrain", "--run", untrained, *args)
    assert status == 2 and told in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    assert {n: h for n, h in tree(untrained).items() if n != ".run.lock"} == {n: h for n, h in before.items() if n != ".run.lock"}


def rewrite(path:Path, **fields): path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_validation_set_without_documents_is_told_when_tokens_are_made(untrained):
    from datasets import DatasetDict
    from llm_scratch.data import load_documents, save_documents
    splits = load_documents(untrained/"documents")
    splits = DatasetDict(train=splits["train"].select(range(20)), validation=splits["validation"].select([]), duplicates=splits["duplicates"])
    for name in ("documents", "tokens"): shutil.rmtree(untrained/name)
    save_documents(splits, untrained/"documents", "")
    status, _, err = call("tokenize", "--run", untrained)
    assert status == 2 and "the validation set of" in err and "is empty" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("free", [1.5e6, 2.5e6, 3e6, 5e6])
def test_the_remedy_for_a_batch_that_is_too_large_fits_and_nothing_simpler_does(free):
    p = replace(cpu().tiny(), batch_size=12)
    need = lambda n, again=False: peak_memory(p.config, preset_layout(replace(p, n_micro=n, recompute=again), 1), p.context_len).total
    with pytest.raises(ValueError, match="a batch of 12 texts of 64 tokens does not fit") as e: check_memory(p, preset_layout(p, 1), free)
    if found := re.search(r"give --n-micro (\d+)( --recompute)?, which needs", str(e.value)):
        n, again = int(found[1]), bool(found[2])
        assert need(n, again) <= free and not any(need(m, again) <= free for m in (1, 2, 3, 4, 6, 12) if m < n) and (not again or need(12) > free)
    else: assert need(12, True) > free and "in no pieces would it fit" in str(e.value)


def test_memory_is_that_of_one_of_many_processes(monkeypatch):
    alone = free_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes() < alone/2
    assert preset_layout(cluster(), 32).batch_size == 4 and preset_layout(cluster(), 16).batch_size == 8 and preset_layout(replace(cpu().tiny(), engine="tp"), 2).batch_size == 4
    assert [preset_layout(replace(cluster(), zero_stage=z), 32).stage for z in range(4)] == [0, 1, 2, 3]


# --- presets that need more than this machine ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name, words", [("gpu", ["gpt2", "hub:fineweb-edu", "19,073 updates", "524,288 tokens", "1 x 1 a100", "was never run"]), ("cluster", ["1.3b", "deepspeed", "zero_stage=2", "4 x 8 a100", "--nodes 4", "was never run"]), ("tiny", ["depth 1", "a CPU is enough"])])
def test_a_dry_run_says_what_it_takes_and_makes_nothing(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = call("run", "--preset", name, "--dry-run")
    assert status == 0 and all(w in out for w in words) and not list(tmp_path.iterdir()), out + err
    assert ("was never run" in out) == (name != "tiny")


@pytest.mark.parametrize("args, told", [(["--preset", "gpu", "--chip", "rtx4090"], "give --n-micro 64, which needs"), (["--preset", "gpu", "--chip", "abacus"], "there is no chip abacus"), (["--preset", "cluster", "--chip", "l4"], "give --n-micro 8, which needs"),
                                        (["--preset", "gpu", "--lr", "0"], "lr=0.0 is not above 0"), (["--preset", "gpu", "--n-micro", "5"], "n_micro=5"), (["--preset", "gpu", "--warmup", "20000"], "warmup=20000 does not fit into n_steps=19073")])
def test_a_dry_run_refuses_what_would_not_work(args, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call("run", *args, "--dry-run")
    assert status == 2 and re.search(told, err) and len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir()), out + err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_preset_for_a_gpu_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = call("run", "--preset", "gpu")
    assert status == 2 and "wants a GPU that PyTorch can use" in err and "gpu-tiny" in err and not list(tmp_path.iterdir())


def test_a_preset_for_many_processes_says_how_it_is_launched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = call("run", "--preset", "cluster")
    assert status == 2 and "deepspeed in 32 processes" in err and "launch" in err and len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def groups(run)->list[dict]: return json.loads((run.checkpoints/"000030"/"state.json").read_text())["groups"]


def test_the_twin_of_gpu_goes_the_whole_way(tmp_path, monkeypatch):
    told = {}
    def spied(*args, **how): told.update(how); return real(*args, **how)
    real = pipeline.train
    monkeypatch.setattr(pipeline, "train", spied)
    status, out, err = call("run", "--preset", "gpu-tiny", "--until", "evaluate", "--run", tmp_path/"run")
    assert status == 0, err
    run = open_run(tmp_path/"run")
    assert told == dict(n_micro=2, max_norm=1.) and (run.folder/"curation").is_dir()
    log = read_log(run)
    assert [round(r["lr"], 6) for r in log] == [round(cosine(s, 30, 10, end=.1), 6) for s in range(30)] and log[-1]["loss"] < log[0]["loss"]
    assert [g["initial_lr"] for g in groups(run)] == [pytest.approx(6e-4)] and groups(run)[0]["betas"] == [.9, .95]
    shutil.copytree(run.folder, tmp_path/"exact")
    for name in ("model", "checkpoints"): shutil.rmtree(tmp_path/"exact"/name)
    assert call("pretrain", "--run", tmp_path/"exact", "--precision", "fp32", "--n-micro", 1)[0] == 0
    apart = [abs(a["loss"]-b["loss"]) for a, b in zip(log, read_log(open_run(tmp_path/"exact")))]
    assert 1e-5 < max(apart) < .1 and told["n_micro"] == 1, "bfloat16 rounds, and it rounds only"
    assert json.loads((tmp_path/"exact"/"run.json").read_text()) == json.loads((tmp_path/"run"/"run.json").read_text()), "how it is computed is no part of what the run is"


def test_the_twin_of_cluster_is_launched_with_deepspeed_in_two_processes(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'llm_scratch[distributed]'")
    folder = tmp_path/"run"
    assert call("data", "--preset", "cluster-tiny", "--run", folder)[0] == 0 and call("tokenize", "--run", folder)[0] == 0
    done = subprocess.run([sys.executable, "-m", "llm_scratch", "launch", "--run", folder], capture_output=True, text=True, timeout=400, cwd=tmp_path, env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stdout + done.stderr
    run = open_run(folder)
    log = read_log(run)
    assert [r["step"] for r in log] == list(range(1, 31)) and log[-1]["loss"] < log[0]["loss"] and (run.model/"model.safetensors").is_file()
    assert log[0]["n_tokens"] == 4*64 and [g["initial_lr"] for g in groups(run)] == [pytest.approx(2e-4)]
    alone = start_run(tmp_path/"alone", replace(run.preset, engine="plain"), run.seed)
    for name in ("documents", "tokenizer", "tokens"): shutil.copytree(run.folder/name, alone.folder/name)
    steps = list(pretrain(alone))
    assert max(abs(a.loss-b["loss"]) for a, b in zip(steps, log)) < .05, "two processes of DeepSpeed learn what one of PyTorch learns"


# --- rates that a run may still change -------------------------------------------------------------------------------------------

def test_rates_may_change_until_something_is_trained(untrained):
    assert call("pretrain", "--run", untrained, "--lr", .5, "--schedule", "linear", "--warmup", 5)[0] == 0
    run = open_run(untrained)
    assert (run.preset.lr, run.preset.schedule, run.preset.warmup) == (.5, "linear", 5)
    assert [r["lr"] for r in read_log(run)] == pytest.approx([linear(s, 30, 5) for s in range(30)]) and groups(run)[0]["initial_lr"] == pytest.approx(.01)
    shutil.rmtree(untrained/"model")
    status, _, err = call("pretrain", "--run", untrained, "--lr", 1)
    assert status == 2 and "lr=0.5, not lr=1.0" in err
    assert call("pretrain", "--run", untrained)[0] == 0  # the run has its own


def test_checkpoints_of_the_edition_before_open(untrained):
    "They know nothing of rates; and how a run is computed is no part of what it is."
    run = open_run(untrained)
    new = {"shape", "optimizer", "lr", "schedule", "warmup", "max_norm", "n_micro", "precision", "engine", "zero_stage", "recompute", "device", "nodes", "per_node"}
    assert set(pipeline._about(run)).isdisjoint(new) and {"cleaning", "keep_out", "batch_size", "seed", "tokenizer"} <= set(pipeline._about(run))
    assert pipeline._about(replace(run, preset=replace(run.preset, lr=.5, n_micro=2)))["lr"] == .5 and "n_micro" not in pipeline._about(replace(run, preset=replace(run.preset, n_micro=2)))
    saved = json.loads((untrained/"run.json").read_text())
    for name in new: del saved["preset"][name]
    (untrained/"run.json").write_text(json.dumps(saved))
    assert open_run(untrained).preset == run.preset


# --- stopped, and broken ------------------------------------------------------------------------------------------------------------

def ranks(n:int, *args)->list[subprocess.Popen]:
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = lambda r: os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | (dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) if n > 1 else {})
    return [subprocess.Popen([sys.executable, "-m", "llm_scratch", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env(r)) for r in range(n)]


@pytest.mark.parametrize("n, sent, status, said", [(1, signal.SIGTERM, 0, "asked to end by SIGTERM: saved"), (1, signal.SIGINT, 130, "stopped"), (2, signal.SIGTERM, 0, "asked to end by SIGTERM: saved")])
def test_who_is_asked_to_end_saves_and_all_leave_after_the_same_update(untrained, n, sent, status, said):
    with_preset(untrained, n_steps=10**6, save_every=20)
    jobs = ranks(n, "pretrain", "--run", untrained, "--engine", "ddp" if n > 1 else "plain")
    try:
        while not (untrained/"checkpoints"/"000020").exists(): assert jobs[0].poll() is None; time.sleep(.05)
        jobs[-1].send_signal(sent)
        told = "".join(j.communicate(timeout=100)[0] for j in jobs)
    finally: [j.kill() for j in jobs]
    assert [j.returncode for j in jobs] == [status]*n and "Traceback" not in told, told
    stopped = int(re.search(rf"{said} after update (\d+) of 1000000; the same command goes on from there", told)[1])
    assert told.count("the same command goes on") == 1 and read_log(open_run(untrained))[-1]["step"] == stopped == int((untrained/"checkpoints"/"latest").read_text())
    if n == 1: assert next(pretrain(open_run(untrained))).n == stopped+1


def test_a_loss_that_is_no_number_keeps_its_batch_and_the_checkpoint_before(untrained, monkeypatch, finished):
    from llm_scratch.stability import load_bad_batch
    monkeypatch.setattr(pipeline, "wsd", lambda step, n_steps: real(step, n_steps) if step < 12 else 1e38)
    from llm_scratch.pretraining import Batches, wsd as real
    status, _, err = call("pretrain", "--run", untrained)
    lines = [line for line in err.strip().splitlines() if not line.startswith("pretrain")]
    assert status == 2 and len(lines) == 1 and "with gradient length nan" in lines[0] and str(untrained/"bad_batch") in lines[0] and "Traceback" not in err, err
    (path,) = (untrained/"bad_batch").iterdir()
    run = open_run(untrained)
    bad = load_bad_batch(path)
    assert str(path) in lines[0] and bad.step == read_log(run)[-1]["step"]+1 >= 13
    batch = Batches(pipeline._shards(run, "train"), 64, 4, run.seed)[bad.step-1]
    assert torch.equal(bad.ids_BT, batch[0]) and torch.equal(bad.targets_BT, batch[1])
    assert (untrained/"checkpoints"/"latest").read_text().strip() == "000010" and not run.model.exists()
    monkeypatch.undo()
    assert call("pretrain", "--run", untrained)[0] == 0  # and from there the run ends as if nothing had been
    assert sha256_file(untrained/"model"/"model.safetensors") == sha256_file(finished/"model"/"model.safetensors")


def test_a_terminal_shows_the_view_and_a_sample(untrained):
    import pty
    master, slave = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "TERM")} | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), TERM="xterm", COLUMNS="100", LINES="30")
    child = subprocess.Popen([sys.executable, "-m", "llm_scratch", "pretrain", "--run", untrained], stdout=slave, stderr=slave, stdin=slave, env=env)
    os.close(slave)
    shown = b""
    while True:
        try: data = os.read(master, 65536)
        except OSError: break  # the other end is closed
        if not data: break
        shown += data
    assert child.wait(timeout=100) == 0
    text = shown.decode(errors="replace")
    assert "30 of 30" in text and "gradient" in text and "tokens/s" in text and re.search("[▁▂▃▄▅▆▇]█|█[▁▂▃▄▅▆▇]", text), text
    frames = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame) for frame in text.split("update    ")]
    assert any(len([line for line in frame.splitlines() if line.strip()]) > 3 for frame in frames if "20 of 30" in frame or "30 of 30" in frame), "no sample below the numbers"
    assert f"weights in {untrained}/model" in text.replace("\r\n", "")


# --- what the run is for ---------------------------------------------------------------------------------------------------

def test_a_brief_changes_the_run_and_stays_with_it(tmp_path, monkeypatch):
    from dataclasses import replace
    from llm_scratch.objectives import LEGAL_BRIEF, RECIPES_BRIEF, load_brief, save_brief
    monkeypatch.setattr(pipeline, "_documents", lambda run, workers: None)
    assert call("data", "--run", tmp_path/"legal", "--brief", "legal")[0] == 0
    run = open_run(tmp_path/"legal")
    assert run.preset == pipeline.briefed(cpu(), LEGAL_BRIEF) != cpu() and load_brief(run.brief) == LEGAL_BRIEF and run.preset.sources == ("licences",)
    save_brief(replace(RECIPES_BRIEF, minutes=1., longest=128), tmp_path/"mine.json")
    assert call("data", "--run", tmp_path/"mine", "--brief", tmp_path/"mine.json")[0] == 0
    mine = open_run(tmp_path/"mine").preset
    assert mine.depth < cpu().depth and mine.context_len == 128 and load_brief(tmp_path/"mine"/"brief.json").longest == 128
    assert call("data", "--run", tmp_path/"mine")[0] == 0 and open_run(tmp_path/"mine").preset == mine  # it stays what it was
    status, _, err = call("data", "--run", tmp_path/"mine", "--brief", "legal")
    assert status == 2 and "holds a run with sources=" in err and load_brief(tmp_path/"mine"/"brief.json").name == "recipes"
    for wrong, said in (("poems", "there is no brief poems: give one of recipes, legal"), (__file__, "not valid JSON|JSON")):
        status, _, err = call("data", "--run", tmp_path/"new", "--brief", wrong)
        assert status == 2 and len(err.strip().splitlines()) == 1 and re.search(said, err) and not (tmp_path/"new").exists(), err


@pytest.mark.parametrize("at_most, status", [(99., 0), (.01, 1)])
def test_evaluate_holds_the_model_to_the_gates_of_its_brief(finished, tmp_path, at_most, status):
    from dataclasses import replace
    from shutil import copytree
    from llm_scratch.objectives import RECIPES_BRIEF, Gate, save_brief
    copytree(finished, tmp_path/"run")
    gates = Gate("bits per byte, tiny", at_most=at_most), Gate("clauses named rightly", at_least=.8, step="finetune")  # the second is not for this step
    save_brief(replace(RECIPES_BRIEF, gates=gates, first_word=1e4, words_per_second=1e-4), tmp_path/"run"/"brief.json")  # time decides nothing here
    got, out, err = call("evaluate", "--run", tmp_path/"run")
    assert got == status, err
    lines = [line for line in err.strip().splitlines() if line.startswith("llm-scratch")]
    assert len(lines) == status and (not lines or "1 of 3 gates were not shown to hold" in lines[0] and f"bits per byte, tiny: at most {at_most}, found 2." in lines[0] and "(fail)" in lines[0])
    for name in ("scorecard.html", "scorecard.md", "report.html"):
        page = (tmp_path/"run"/name).read_text(encoding="utf-8")
        assert "words per second: at least 0.0001" in page and "promised" in page and ("fail" if status else "pass") in page and ("clauses named" in page) == (name != "report.html")  # the card has the promises of all steps
    assert "| promised |" not in (finished/"scorecard.md").read_text(encoding="utf-8")


def test_a_model_that_is_too_slow_breaks_the_promise_of_its_brief(finished, tmp_path):
    from dataclasses import replace
    from llm_scratch.objectives import RECIPES_BRIEF, Gate, save_brief
    shutil.copytree(finished, tmp_path/"run")
    run = open_run(tmp_path/"run")
    held = lambda **fields: {v.gate.metric: v.outcome for v in (save_brief(replace(RECIPES_BRIEF, gates=(Gate("bits per byte, tiny", at_most=99.),), **dict(first_word=1e4, words_per_second=1e-4) | fields), run.brief), pipeline.run_verdicts(run))[1]}
    assert set(held().values()) == {"pass"}
    assert held(words_per_second=1e6) == {"bits per byte, tiny": "pass", "seconds to the first token": "pass", "words per second": "fail"}
    assert held(first_word=1e-6)["seconds to the first token"] == "fail"


def test_runs_are_compared_by_item_and_only_where_they_measured_the_same(finished, tmp_path):
    other = Path(shutil.copytree(finished, tmp_path/"other"))
    rows = [json.loads(line) for line in (other/"items.jsonl").read_text().splitlines()]
    write = lambda rows: (other/"items.jsonl").write_text("".join(json.dumps(r)+"\n" for r in rows))
    status, out, err = call("compare", finished, other)
    assert status == 0 and out.startswith("bits per byte, tiny") and out.count("| 1–2 |") == 2, err
    write([r | dict(per=r["per"]+1) for r in rows])
    status, _, err = call("compare", finished, other)
    assert status == 2 and "on other items" in err and len(err.strip().splitlines()) == 1
    write([r | dict(name="poems") for r in rows])
    assert "nothing in common" in call("compare", finished, other)[2]
    status, _, err = call("compare", finished, other, "--figure", "poems")
    assert status == 2 and "did not measure 'poems'" in err
    (other/"items.jsonl").unlink()
    assert "llm-scratch evaluate" in call("compare", finished, other)[2]


def test_questions_of_others_stand_beside_baselines_and_leaks(finished, tmp_path, monkeypatch):
    from llm_scratch.harness import Choose, Task
    shutil.copytree(finished, tmp_path/"run")
    seen = open_run(tmp_path/"run")
    known = next(iter(pipeline.load_documents(seen.documents)["train"]["text"]))
    docs = tuple(dict(question=q, choices=["yes", "no"], target=i % 2) for i, q in enumerate([known, *(f"Is number {i} a prime or is it not one of them at all" for i in range(9))]))
    monkeypatch.setattr(pipeline, "load_questions", lambda name: Task(name, docs, "{question}", Choose()))
    pipeline.evaluate_run(seen, questions=("PIQA",))
    rows = {r["name"]: r for r in pipeline.read_results(seen)}
    assert {f"right, PIQA{who}" for who in ("", ", chance", ", majority", ", longest", ", 5-gram")} < rows.keys()
    leaked = rows["questions that the training text has seen, PIQA"]
    assert leaked["n"] == 10 and leaked["mean"] == .1
    assert seen.report.read_text().count("<svg") == 4


def test_a_set_of_questions_that_is_not_there_is_told_before_anything_is_measured(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path/"run")
    monkeypatch.setattr(pipeline, "_surprise", lambda *args: pytest.fail("measured first"))
    status, _, err = call("evaluate", "--run", tmp_path/"run", "--questions", "poems")
    assert status == 2 and "there is no set of questions poems: give one of BoolQ" in err and len(err.strip().splitlines()) == 1


# --- tuned for a task ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tunable(tmp_path_factory):
    "A tiny run whose context holds a clause and its label."
    run = pipeline.start_run(tmp_path_factory.mktemp("tune")/"run", replace(cpu().tiny(), context_len=192, n_steps=3, save_every=3))
    for verb in ("data", "tokenize", "pretrain"): assert call(verb, "--run", run.folder)[0] == 0
    return run


@pytest.fixture
def few_clauses(monkeypatch):
    from llm_scratch.clauses import CORE_14, Clause, is_test
    families = [f"family{i}" for i in range(40)]
    made = [Clause(f"Clause on {label} number {i}.", label, label, f, f"{f}/{label}") for i, f in enumerate(families) for label in CORE_14]
    seen, held = ([c for c in made if is_test(c.family) == side] for side in (False, True))
    monkeypatch.setattr(pipeline, "frozen_split", lambda: (seen[:56], held[:28]))


def test_every_method_names_clauses_in_one_table(tunable, few_clauses, tmp_path):
    folder = Path(shutil.copytree(tunable.folder, tmp_path/"run"))
    status, out, err = call("finetune", "--run", folder, "--method", "all", "--epochs", .3, "--rank", 2)
    assert status == 0 and all(name in out for name in ("full", "lora", "qlora", "prompt", "tfidf_svm", "not tuned")), err
    assert {p.name for p in (folder/"tuned").iterdir()} == {"clauses.md", "clauses.jsonl", *(f"clauses-{m}" for m in ("full", "lora", "qlora", "prompt"))}
    rows = [json.loads(line) for line in (folder/"tuned"/"clauses.jsonl").read_text().splitlines()]
    assert all(r["step"] == "finetune" and r["stderr"] >= 0 for r in rows) and rows[0]["name"] == "clauses named rightly"
    assert (folder/"tuned"/"clauses.md").read_text(encoding="utf-8").count("±") == 3*4 + 2*4


@pytest.mark.parametrize("at_least, status", [(0., 0), (1., 1)])
def test_tuning_is_held_to_the_gate_of_the_brief(tunable, few_clauses, tmp_path, at_least, status):
    from llm_scratch.objectives import RECIPES_BRIEF, Gate, save_brief
    folder = Path(shutil.copytree(tunable.folder, tmp_path/"run"))
    save_brief(replace(RECIPES_BRIEF, gates=(Gate("clauses named rightly", at_least=at_least, step="finetune"), Gate("bits per byte, tiny", at_most=.1))), folder/"brief.json")
    got, out, err = call("finetune", "--run", folder, "--epochs", .3)
    assert got == status and ("1 of 1 gates" in err) == bool(status), err


def test_an_assistant_is_made_and_answers(tunable, tmp_path, monkeypatch):
    from llm_scratch.assistant import Assistant, ask, open_assistant
    folder = Path(shutil.copytree(tunable.folder, tmp_path/"run"))
    kinds = "steps", "ingredients", "ingredients, given", "fact", "fact, given", "description", "topic", "small talk"
    made = [ask(f"What of {kind} {i}?", "1. Stir.\n2. Eat.\n3. Rest.", kind, "" if kind == "small talk" else f"{kind} {i}") for kind in kinds for i in range(80)]
    monkeypatch.setattr(pipeline, "book_dialogues", lambda: made)
    monkeypatch.setattr(pipeline, "given_dialogues", lambda *docs: [])
    monkeypatch.setattr(pipeline, "read_source", lambda name: [])
    status, out, err = call("finetune", "--run", folder, "--task", "chat", "--steps", 2)
    assert status == 0 and "form of answers, steps, before" in out and "form of answers, steps, after" in out, err
    assert isinstance(open_assistant(folder/"tuned"/"chat"), Assistant)
    status, out, err = call("chat", "--run", folder, typed="What of steps 1?\nAnd then?\n\nnever asked\n")
    assert status == 0 and out.count("> ") == 3 and "Ask for a recipe" in err, err
    again = call("chat", "--run", folder, typed="What of steps 1?\nAnd then?\n\n")[1]
    assert again == out  # the same questions, the same answers
    before = sha256_file(folder/"tuned"/"chat"/"model.safetensors")
    status, out, err = call("finetune", "--run", folder, "--task", "chat", "--method", "dpo", "--steps", 2)
    assert status == 0 and "wins over the assistant before" in out and sha256_file(folder/"tuned"/"chat"/"model.safetensors") == before != sha256_file(folder/"tuned"/"chat-dpo"/"model.safetensors"), err
    assert call("chat", "--run", folder, "--tuned", "chat-dpo", typed="What of steps 1?\n\n")[0] == 0
    status, _, err = call("chat", "--run", folder, "--tuned", "poet", typed="\n")
    assert status == 2 and "there is no assistant" in err


@pytest.mark.parametrize("args, said", [(("--task", "poems"), "there is no task poems: give clauses or chat"), (("--method", "magic"), "there is no method magic: give some of full, lora"), (("--task", "chat", "--method", "lora"), "give full, or dpo after it, not --method lora"), (("--task", "chat", "--method", "dpo"), "--task chat` first")])
def test_what_cannot_be_tuned_is_one_line(tunable, few_clauses, args, said):
    status, _, err = call("finetune", "--run", tunable.folder, *args)
    assert status == 2 and said in err and len(err.strip().splitlines()) == 1 and not tunable.tuned.exists()


def test_families_that_judge_are_in_no_runs_text(tmp_path, monkeypatch):
    from llm_scratch.clauses import family_of, is_test
    from llm_scratch.data import Document, to_dataset
    names = [f"licence{i}-1.0" for i in range(40)]
    monkeypatch.setattr(pipeline, "load_corpus", lambda sources: to_dataset(Document(f"Text of {n} and {i}.", s, f"{s}/{n}", {}) for s in ("licences", "recipes") for i, n in enumerate(names)))
    run = pipeline.start_run(tmp_path/"run", replace(cpu().tiny(), sources=("licences", "recipes")))
    kept = [(s, i) for split in pipeline.prepare_documents(run).values() for s, i in zip(split["source"], split["id"])]
    assert {i for s, i in kept if s == "licences"} == {f"licences/{n}" for n in names if not is_test(family_of(n))} and sum(s == "recipes" for s, _ in kept) == 40

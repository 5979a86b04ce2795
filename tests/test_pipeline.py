"The command line and the run directory: what a user can get wrong, what a kill can break, and what other tools make of the model."
import json
import os
import random
import re
import shlex
import shutil
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
from llm_scratch.pipeline import PRESETS, app, cpu, decoder_config, open_run, prepare_documents, prepare_tokens, pretrain, read_log, start_run, write_texts
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
    status, out, err = call("run", "--preset", "tiny", "--run", folder)
    assert status == 0 and str(folder) in err.replace("\n", "") and str(folder) in out.replace("\n", ""), err
    return folder


@pytest.fixture
def copy(finished, tmp_path): return Path(shutil.copytree(finished, tmp_path/"tiny"))


# --- the whole run ---------------------------------------------------------------------------------------------------

def test_run_leaves_what_the_chapter_promises(finished):
    names = {p.name for p in finished.iterdir()} - {".run.lock"}  # held while it trains
    assert names == {"run.json", "documents", "tokenizer", "tokens", "checkpoints", "log.jsonl", "model", "results.jsonl", "samples.json", "scorecard.html", "scorecard.md"}
    rows = [json.loads(line) for line in (finished/"results.jsonl").read_text().splitlines()]
    assert all(r.keys() == {"step", "name", "goal", "mean", "stderr", "n", "seed"} and r["stderr"] >= 0 and r["n"] > 0 and r["seed"] == 0 for r in rows)
    page = (finished/"scorecard.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="|url\((?!#)|@import', page.replace('xlink:href="#', "").replace(' href="#', "")), "it loads nothing"
    assert all(r["name"] in page for r in rows) and page.count("<pre>") == 4 and page.count("<svg") == 1
    assert (finished/"scorecard.md").read_text(encoding="utf-8").count("|") > 40


def test_running_again_changes_no_byte_but_the_figures_stay(copy):
    before = tree(copy)
    status, out, err = call("run", "--run", copy)
    assert status == 0 and tree(copy) == before


def test_texts_in_a_document_are_escaped(copy):
    samples = json.loads((copy/"samples.json").read_text())
    samples[0]["text"] = "<script>alert(1)</script>"
    (copy/"samples.json").write_text(json.dumps(samples))
    pipeline.save_scorecard(open_run(copy))
    assert "<script>" not in (copy/"scorecard.html").read_text() and "&lt;script&gt;" in (copy/"scorecard.html").read_text()


def test_the_verbs_one_by_one_make_the_same_model(finished, tmp_path):
    for verb in ("data", "tokenize", "pretrain", "evaluate"):
        status, out, err = call(verb, "--run", tmp_path/"run", *(["--preset", "tiny"] if verb == "data" else []))
        assert status == 0, err
    mine, theirs = tree(tmp_path/"run"), tree(finished)
    different = {n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n) and not n.startswith("checkpoints/")}
    assert different == {"log.jsonl", "scorecard.html", "scorecard.md"}  # these hold seconds; a checkpoint holds the state of torch's own generator


def test_another_seed_is_another_model_on_the_same_split(finished, tmp_path):
    status, _, err = call("run", "--preset", "tiny", "--seed", 3, "--run", tmp_path/"run")
    assert status == 0, err
    same = lambda name: sha256_file(tmp_path/"run"/name) == sha256_file(finished/name)
    assert same("documents/train.parquet") and same("tokenizer/tokenizer.json") and not same("model/model.safetensors")
    assert {r["seed"] for r in map(json.loads, (tmp_path/"run"/"results.jsonl").read_text().splitlines())} == {3}


# --- killed ----------------------------------------------------------------------------------------------------------

def start(folder:Path)->subprocess.Popen:
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), COLUMNS="200")
    return subprocess.Popen([sys.executable, "-m", "llm_scratch", "run", "--preset", "tiny", "--run", folder], cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


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
    for i, (preset, said) in enumerate([(replace(tiny, vocab_size=258), "vocab_size=258 .* at least 259"), (replace(tiny, context_len=5000), r"\d+ tokens, fewer than 2\*context_len=10000"),
                                        (replace(tiny, n_validation=24), "24 documents, and n_validation=24")]):
        run = start_run(tmp_path/str(i), preset)
        with pytest.raises(ValueError, match=said): prepare_documents(run), prepare_tokens(run), next(pretrain(run))


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
    with closing(pretrain(open_run(copy), monitor="tensorboard", recompute=True)) as steps: assert [s.n for s in steps] == list(range(1, 31))
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
    status, out, err = call("run", "--run", tmp_path/"run")
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

"Engines: in real processes, with DeepSpeed where it is installed; and the command that is one rank of a job."
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from llm_scratch.architecture import load_model
from llm_scratch.core import UserError, read_json, write_json
from llm_scratch.engines import Engine, check_deepspeed, comparisons, deepspeed_config, in_ranks, load_trial, make_engine, torchrun, trial
from llm_scratch.pipeline import cpu, open_run, prepare_documents, prepare_tokens, pretrain, read_log, start_run
from llm_scratch.pretraining import load_checkpoint, save_checkpoint, save_shards

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'llm_scratch[distributed]'")
SLOW = 400  # seconds, for a machine that others use as well


# --- equal to plain --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("engines")


ZERO = [dict(engine="deepspeed", zero_stage=s) for s in range(4)]
TWO = [*(dict(engine=e) for e in ("ddp", "fsdp", "tp")), *ZERO, dict(engine="fsdp", offload=True), dict(engine="deepspeed", zero_stage=3, offload=True),
       *(dict(engine=e, optimizer="muon") for e in ("ddp", "fsdp", "tp")), *(dict(engine=e, precision="bf16") for e in ("ddp", "fsdp", "tp")),
       *(z | dict(precision="bf16") for z in ZERO[1:])]


@pytest.fixture(scope="module")
def two(folder):
    "One job of two ranks: everything is compared, some is saved."
    saves = [dict(do="save", engine="tp", folder=str(folder/"tp")), dict(do="save", folder=str(folder/"zero3"), **ZERO[3])]
    loads = [dict(do="load", folder=str(folder/"tp")) | task for task in (*ZERO, dict(engine="fsdp"), dict(engine="ddp"))]
    return in_ranks(2, [dict(do="compare") | t for t in TWO] + saves + loads, SLOW)


@pytest.fixture(scope="module")
def four(two, folder):
    "One job of four ranks, which goes on from what two have saved."
    grid = dict(engine="fsdp", tp=2)
    return in_ranks(4, [dict(do="compare") | grid, dict(do="compare", optimizer="muon") | grid, dict(do="compare", precision="bf16") | grid,
                        dict(do="load", folder=str(folder/"zero3")) | grid, dict(do="load", folder=str(folder/"tp")) | grid], SLOW)


@pytest.mark.parametrize("i", range(len(TWO)), ids=lambda i: " ".join(map(str, TWO[i].values())))
def test_two_ranks_learn_what_one_process_learns(two, i):
    row = two[i]
    assert row["world"] == 2 and row["loss"] < (1e-2 if "precision" in row else 5e-6)
    assert row["norm"] < (1e-1 if "precision" in row else 2e-5), "steps of AdamW and Muon do not depend on the length of the gradient, clipping does"
    assert row["weight"] < (3e-2 if "precision" in row else 5e-6)
    if "precision" in row: assert row["loss"] > 1e-5, "it has not computed in bfloat16"


@pytest.mark.parametrize("i", range(6))
def test_what_one_engine_saved_others_go_on_from(two, i): assert two[len(TWO)+2+i]["do"] == "load" and two[len(TWO)+2+i]["loss"] < 5e-6


def test_bf16_by_autocast_is_that_of_one_process(two):
    nearest = min((r for r in two[:len(TWO)] if "precision" in r), key=lambda r: r["bf16"])
    assert nearest["engine"] == "ddp"


def test_what_is_cut_is_not_held(two):
    held = {(r["engine"], r.get("zero_stage")): r["held"] for r in two[:len(TWO)] if r.keys().isdisjoint(("precision", "offload", "optimizer"))}
    P = 90496
    assert held["ddp", None] == held["deepspeed", 0] == [P, 2*P] and held["fsdp", None] == held["deepspeed", 3] == [P//2, P]
    assert held["deepspeed", 1] == held["deepspeed", 2] == [P, P] and held["tp", None] == [(P-384)//2 + 384, P-384 + 2*384]


def test_four_ranks_on_a_grid(four):
    exact, muon, bf16, *loaded = four
    assert exact["loss"] < 5e-6 and exact["norm"] < 2e-5 and muon["norm"] < 2e-5 and muon["loss"] < 5e-6 and bf16["loss"] < 1e-2 and exact["held"] == [(90496-384)//4 + 192, (90496-384)//2 + 384]
    assert [r["loss"] < 5e-6 for r in loaded] == [True, True], "two ranks saved, four went on"


@pytest.mark.parametrize("saved", ["tp", "zero3"])
def test_one_process_goes_on_from_what_two_saved(two, folder, saved): assert load_trial(dict(engine="plain", folder=str(folder/saved)))["loss"] < 5e-6


def test_the_stored_table_is_complete_and_within_its_bounds():
    proof = read_json(Path(__file__).parent.parent/"nbs"/"engines.json")
    for world in (1, 2, 4):
        done = [{k: r[k] for k in ("do", "precision", "engine", "zero_stage", "tp", "offload", "optimizer") if k in r} for r in proof["equality"] if r["world"] == world]
        assert sorted(map(str, map(sorted, map(dict.items, done)))) == sorted(str(sorted(t.items())) for t in comparisons(world))
    bound = dict(fp32=5e-6, bf16=1e-2)
    assert all(r["loss"] < bound[r["precision"]] and r["norm"] < 10*bound[r["precision"]] for r in proof["equality"])
    assert len(proof["resume"]) == 64 and max(r["loss"] for r in proof["resume"]) < 5e-6


# --- what engines promise --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ranks(folder):
    torchrun(2, "engine_ranks", "parts,aliases,details,clipping", str(folder), timeout=SLOW)
    return read_json(folder/"parts,aliases,details,clipping.json")


def test_what_is_saved_in_parts_is_read_by_others(ranks):
    parts = dict(ranks["parts"])
    assert "holds the parts of the engine deepspeed zero 2, which torch cannot read" in parts.pop("foreign")
    assert "deepspeed zero 2, which deepspeed zero 3 cannot read" in parts.pop("stage")
    assert len(parts) == 7 and max(parts.values()) < 5e-6


def test_parts_of_two_are_read_by_one(ranks, folder):
    for name in ("ddp", "fsdp", "tp"): assert load_trial(dict(engine="plain", folder=str(folder/name)))["loss"] < 5e-6
    torchrun(1, "engine_ranks", "universal", str(folder), timeout=SLOW)
    found = read_json(folder/"universal.json")["universal"]
    assert found.pop("left") == [] and len(found) == 4 and max(found.values()) < 5e-6


def test_a_filled_state_goes_its_own_way(ranks): assert len(ranks["aliases"]) == 5 and all(ranks["aliases"].values())


EXPECTED = {"sum": 3., "gather": [0, 10], "share": "main", "at_main": 0, "at_main fails": "no such run", "agree": "rank 1: disk full", "rng": True, "no_sync": 3, "nan touched": False, "nan batch": True,
            "fsdp cut": True, "tp cut": True, "fsdp sync": [False, True], "tp sync": [False, True], "tp ranks": [0, 1]}
SAID = {"nan": "loss nan.* at step 3: lower the learning rate", "tp heads": "n_heads=3 is not a multiple of tp=2", "tp world": "2 processes are not a multiple of tp=3: start 3", "tp model": "not a Linear",
        "plain": "2 processes were launched.*--engine ddp", "name": "no engine ddq: give one of plain, ddp", "precision": "no precision fp8", "ds muon": "one AdamW, not Muon and AdamW.*make_adamw",
        "ds pieces": "train gives 1 pieces, DeepSpeed was told n_micro=2", "ds norm": "max_norm=0.5, DeepSpeed was told 1.0", "ds value": "max_value=0.5 with DeepSpeed.*no element can be clipped", "ds train": "max_value=0.5 with DeepSpeed", "ds bf16": "bf16 on ZeRO stage 0", "other model": "of another model: layers.1",
        "other optimizers": "saved with other optimizers", "other run": "of a run with no seed, not seed=1"}


@pytest.mark.parametrize("what", EXPECTED)
def test_promises_between_ranks(ranks, what): assert ranks["details"][what] == EXPECTED[what]


@pytest.mark.parametrize("what", SAID)
def test_every_rank_says_the_same(ranks, what): assert re.search(SAID[what], ranks["details"][what]) and "\n" not in ranks["details"][what]


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "tp"])
@pytest.mark.parametrize("bounds", ["value", "both"])
def test_a_gradient_in_parts_is_clipped_as_a_whole_one(ranks, engine, bounds):
    "By value each process clips what lies there; SGD shows it."
    weight, norm = ranks["clipping"][f"{engine} {bounds}"]
    assert weight < 1e-6 and norm < 2e-5
    assert min(ranks["clipping"]["by itself"]) > 1e-3  # what a bound that is left out would do


# --- one process -----------------------------------------------------------------------------------------------

def test_one_process_reads_its_own_parts(tmp_path):
    path = save_shards(trial(Engine(), n_steps=6)[0], tmp_path, {})
    assert trial(Engine(), path=path)[1] == trial(Engine())[1][6:]  # loss, gradient, everything


def test_a_damaged_part_is_one_line(tmp_path):
    path = save_shards(trial(Engine(), n_steps=1)[0], tmp_path, {})
    shard = next((path/"shards").glob("*.distcp"))
    data = bytearray(shard.read_bytes()); data[len(data)//2] ^= 1; shard.write_bytes(data)
    with pytest.raises(UserError, match="shards/.* is corrupt"): load_checkpoint(trial(Engine(), n_steps=0)[0], path, {})


def test_a_checkpoint_of_an_earlier_version_is_one_line(tmp_path):
    from llm_scratch.core import seal
    path = save_checkpoint(trial(Engine(), n_steps=1)[0], tmp_path, {})
    (path/"rng.safetensors").unlink()
    seal(path, "checkpoint", ("state.safetensors", "state.json"))
    with pytest.raises(UserError, match="earlier version"): load_checkpoint(trial(Engine(), n_steps=0)[0], path, {})


def test_what_was_changed_on_the_way_is_restored(tmp_path):
    state, _ = trial(Engine(), n_steps=1)
    state.optimizers[0].param_groups[0]["weight_decay"] = .5
    path = save_checkpoint(state, tmp_path, {})
    assert trial(Engine(), n_steps=1, path=path)[0].optimizers[0].param_groups[0]["weight_decay"] == .5


# --- DeepSpeed's config ----------------------------------------------------------------------------------------

@given(stage=st.integers(0, 3), world=st.integers(1, 9), n_micro=st.integers(1, 5), micro=st.integers(1, 7), precision=st.sampled_from(["fp32", "bf16"]), offload=st.booleans(), device=st.sampled_from(["cpu", "cuda"]))
def test_a_config_leaves_nothing_open(stage, world, n_micro, micro, precision, offload, device):
    make = lambda size: deepspeed_config(zero_stage=stage, batch_size=size, world=world, n_micro=n_micro, max_norm=.5, precision=precision, offload=offload, device=device)
    if stage == 0 and (precision == "bf16" or offload):
        with pytest.raises(UserError, match="stage 1 or higher"): make(micro*n_micro*world)
        return
    config = make(micro*n_micro*world)
    assert config["train_batch_size"] == config["train_micro_batch_size_per_gpu"]*config["gradient_accumulation_steps"]*world and config["train_micro_batch_size_per_gpu"] == micro
    assert config["gradient_clipping"] == .5 and config["bf16"] == dict(enabled=precision == "bf16") and config["zero_optimization"]["stage"] == stage
    assert ("offload_optimizer" in config["zero_optimization"]) == offload and ("offload_param" in config["zero_optimization"]) == (offload and stage == 3)
    if world*n_micro > 1:
        with pytest.raises(UserError, match="is not a multiple"): make(micro*n_micro*world + 1)


GOOD = dict(gradient_clipping=1., zero_optimization=dict(stage=1))
MUON = dict(optimizer=dict(type="Muon", params={}))


@pytest.mark.parametrize("config, reason", [
    (dict(zero_optimization=dict(stage=1)), "clips to 1.0"), (GOOD | MUON, "issue 8439"), (dict(zero_optimization=dict(stage=3), gradient_clipping=.1) | MUON, "issue 8439"),
    (GOOD | dict(train_batch_size=9), "1 x 1 micro-batches x 4 processes = 4"), (GOOD | dict(train_batch_size=8, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2), "= 16"),
    (dict(gradient_clipping=1., bf16=dict(enabled=True)), "bf16"), (dict(gradient_clipping=1., pipeline=dict(stages=2)), "pipeline"), (GOOD | dict(fp16=dict(enabled=True)), "fp16"),
    (GOOD | dict(optimizer=dict(type="Adam")), "torch_adam"), (dict(gradient_clipping=0., zero_optimization=dict(stage=0, offload_optimizer=dict(device="cpu"))), "offload")])
def test_what_deepspeed_would_get_wrong_is_refused(config, reason):
    with pytest.raises(UserError) as e: check_deepspeed(config, 4, "cpu")
    assert reason in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("config, device", [
    (GOOD, "cpu"), (GOOD | MUON | dict(gradient_clipping=0), "cpu"), (dict(gradient_clipping=1.) | MUON, "cpu"), (GOOD | dict(bf16=dict(enabled=True)), "cpu"), (GOOD | dict(bf16=dict(enabled=False)), "cpu"),
    (GOOD | dict(fp16=dict(enabled=True)), "cuda"), (GOOD | dict(optimizer=dict(type="AdamW")), "cuda"), (GOOD | dict(optimizer=dict(type="AdamW", params=dict(torch_adam=True))), "cpu"),
    (GOOD | dict(pipeline=dict(stages=2)), "cpu"), (GOOD | dict(train_batch_size=16, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2), "cpu")])
def test_what_it_gets_right_is_not(config, device): assert check_deepspeed(config, 4, device) is config


# --- pretrain --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    run = start_run(tmp_path_factory.mktemp("runs")/"base", cpu().tiny())
    prepare_documents(run), prepare_tokens(run)
    return run


@pytest.fixture(scope="module")
def plain(prepared, tmp_path_factory):
    run = _copy(prepared, tmp_path_factory.mktemp("plain"))
    for _ in pretrain(run): pass
    return run


def _copy(run, folder, **preset):
    import shutil
    shutil.copytree(run.folder, folder/"run")
    if preset: write_json(folder/"run"/"run.json", (saved := read_json(run.folder/"run.json")) | dict(preset=saved["preset"] | preset))
    return open_run(folder/"run")


def _start(n, *args):
    "Processes as a launcher would start them, but nobody watches them."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = lambda r: os.environ | dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    return [subprocess.Popen([sys.executable, "-m", "llm_scratch", *args], env=env(r), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(n)]


def _end(jobs, timeout=SLOW):
    try: texts = [j.communicate(timeout=timeout)[0] for j in jobs]
    finally: [j.kill() for j in jobs]
    return [j.returncode for j in jobs], "".join(texts)


def test_two_ranks_go_on_where_one_process_left_and_one_writes(prepared, plain, tmp_path):
    run = _copy(prepared, tmp_path)
    for step in pretrain(run):
        if step.n == 7: break
    said = torchrun(2, "llm_scratch", "pretrain", "--run", str(run.folder), "--engine", "fsdp", timeout=SLOW)
    assert said.count("74,048 weights in") == 1 and said.count("30/30") == 1 and "Warning" not in said
    log, whole = read_log(run), read_log(plain)
    assert [r["step"] for r in log] == list(range(1, 31)) and log[:7] != whole[:7]  # seconds differ
    assert all(abs(a["loss"]-b["loss"]) < 5e-6 and a["n_tokens"] == b["n_tokens"] for a, b in zip(log, whole))
    ours, theirs = load_model(run.model).state_dict(), load_model(plain.model).state_dict()
    for name, x in theirs.items(): torch.testing.assert_close(ours[name], x, atol=1e-4, rtol=1e-3)
    assert sorted(p.name for p in run.checkpoints.iterdir() if p.name.isdecimal()) == ["000020", "000030"] and (run.model/"README.md").is_file()


@pytest.mark.parametrize("n, args, status, line", [
    (3, ["--engine", "ddp"], 2, "batch_size=4 of .* is not a multiple of the 3 parts.*: start 1 or 2 or 4"),
    (2, ["--engine", "ddq"], 2, "there is no engine ddq"),
    (2, ["--engine", "tp"], 2, "n_heads=1 is not a multiple of tp=2")])
def test_one_line_for_all_ranks(prepared, tmp_path, n, args, status, line):
    begin = time.monotonic()
    codes, said = _end(_start(n, "pretrain", "--run", str(_copy(prepared, tmp_path).folder), *args))
    ours = [x for x in said.splitlines() if x.startswith("llm-scratch:")]
    assert codes == [status]*n and len(ours) == 1 and re.search(line, ours[0]) and "Traceback" not in said, said
    assert time.monotonic() - begin < 60*4  # on a quiet machine: seconds


@contextmanager
def _two_training(run):
    "Two ranks in the middle of a long run, after its first checkpoint."
    jobs = _start(2, "pretrain", "--run", str(run.folder), "--engine", "ddp")
    try:
        while not (run.checkpoints/"000020").exists(): assert jobs[0].poll() is None; time.sleep(.05)
        yield jobs
    finally: [j.kill() for j in jobs]


def test_a_rank_that_dies_takes_the_others_with_it(prepared, tmp_path):
    run = _copy(prepared, tmp_path, n_steps=10**6, save_every=20)
    with _two_training(run) as jobs:
        jobs[1].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        codes, said = _end(jobs, 60)
    assert codes in ([3, -signal.SIGKILL], [2, -signal.SIGKILL]) and time.monotonic() - begin < 60  # 2 when it died while all were saving
    assert re.search("^llm-scratch: (another process is gone|.* was not saved: another rank is gone)", said, re.MULTILINE) and "Traceback" not in said, said
    assert json.loads((sorted(p for p in run.checkpoints.iterdir() if p.name.isdecimal())[-1]/"state.json").read_text())["step"] >= 20


def test_a_process_that_is_not_the_main_one_writes_nothing(prepared, tmp_path, monkeypatch):
    from llm_scratch import pipeline
    class Other(Engine):
        is_main = False
        def share(self, value): return (None, "") if value is None else value  # the main one has found no checkpoint
    monkeypatch.setattr(pipeline, "save_checkpoint", lambda *args: None)  # the others' part is in other tests
    run = _copy(prepared, tmp_path)
    before = sorted(p.name for p in run.folder.iterdir())
    assert len(list(pretrain(run, Other()))) == 30 and sorted(p.name for p in run.folder.iterdir() if p.name != ".run.lock") == before


def test_ctrl_c_in_one_process_stops_all_after_the_same_update(prepared, tmp_path):
    run = _copy(prepared, tmp_path, n_steps=10**6, save_every=20)
    with _two_training(run) as jobs:
        jobs[1].send_signal(signal.SIGINT)
        codes, said = _end(jobs)
    stopped = int(re.search(r"stopped after update (\d+) of 1000000; the same command goes on", said)[1])
    assert codes == [130, 130] and said.count("stopped") == 1 and read_log(run)[-1]["step"] == stopped
    assert int((run.checkpoints/"latest").read_text()) == stopped


def test_a_run_that_diverges_is_one_line(prepared, tmp_path, monkeypatch):
    from typer.testing import CliRunner
    from llm_scratch import pipeline
    monkeypatch.setattr(pipeline, "wsd", lambda step, n_steps: 1e38)
    done = CliRunner().invoke(pipeline.app, ["pretrain", "--run", str(_copy(prepared, tmp_path).folder)])
    assert done.exit_code == 2 and "with gradient length nan at step 2" in done.output and "lower the learning rate" in done.output


@pytest.mark.parametrize("given, says", [(dict(name="ddq"), "there is no engine ddq: give one of plain, ddp"), (dict(name="plain", precision="fp8"), "there is no precision fp8: give fp32 or bf16"),
                                         (dict(name="fsdp"), "wants to be launched.* who it is: environment variable RANK expected, but not set$")])
def test_alone_and_wrong(given, says, monkeypatch):
    "Who was not launched hears first what no launch would put right."
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"): monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=says): make_engine(**given)

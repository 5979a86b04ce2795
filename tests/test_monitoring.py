"Chapter 05f: a log that loses nothing, alarms that fire when they should and only then, and monitors that cost the training nothing when they break."
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from pathlib import Path
from statistics import median

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_scratch import monitoring
from llm_scratch.core import UserError
from llm_scratch.monitoring import (
    HOST_METRICS,
    METRICS,
    PANELS,
    SPIKE,
    JsonLines,
    Monitors,
    PrometheusExporter,
    Tail,
    TensorBoard,
    WandB,
    alarm_states,
    alarms,
    ask_prometheus,
    cut_rows,
    dashboard,
    host_metric,
    local_prometheus,
    open_monitors,
    read_rows,
    read_wandb,
    records,
    robust_z,
    rules_text,
    run_picture,
    spike_scores,
    to_line,
    watch_run,
    write_monitoring,
)

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT/"deploy"/"monitoring"
ENV = os.environ | dict(PYTHONPATH=str(ROOT))
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = dict(loss=2.5, lr=.75, grad_norm=1.25, n_tokens=512, seconds=.3)


def needs(*programs):
    for program in programs:
        if shutil.which(program) is None: pytest.skip(f"the program {program} is missing")


def until(true, seconds=90):
    end = time.monotonic()+seconds
    while not (result := true()) and time.monotonic() < end: time.sleep(.2)
    return result


def comparable(rows): return [{k: str(float(x)) for k, x in r.items()} for r in rows]  # NaN is not equal to itself


# --- the log -------------------------------------------------------------------------------------------------------

@FEW
@given(st.lists(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda s: s != "step"), st.floats() | st.integers(-2**53, 2**53), max_size=4), max_size=6))
def test_what_is_logged_is_read(tmp_path, rows):
    log = JsonLines(tmp_path/"log")
    for n, values in enumerate(rows, 1): log.log(n, values)
    log.close()
    assert comparable(read_rows(tmp_path/"log")) == comparable([dict(step=n) | values for n, values in enumerate(rows, 1)])
    for line in (tmp_path/"log").read_bytes().splitlines(): json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@FEW
@given(st.integers(0, 10), st.integers(0, 12), st.integers(0, 2000))
def test_cut_anywhere_resumed_anywhere(tmp_path, n, resume_step, at):
    "Whatever is left of the file: its whole rows up to the resume are kept, and the next rows follow."
    path = tmp_path/"log"
    whole = b"".join(to_line(s, dict(VALUES, loss=1/s)) for s in range(1, n+1))
    path.write_bytes(whole[:at])
    left = whole[:at].count(b"\n")
    assert [r["step"] for r in read_rows(path)] == [*range(1, left+1)]
    log = JsonLines(path, resume_step)
    for s in (resume_step+1, resume_step+2): log.log(s, VALUES)
    log.close()
    assert [r["step"] for r in read_rows(path)] == [*range(1, min(left, resume_step)+1), resume_step+1, resume_step+2]
    assert path.read_bytes().endswith(b"\n") and [p.name for p in tmp_path.iterdir()] == ["log"]


def test_the_cut_is_atomic(tmp_path, monkeypatch):
    path = tmp_path/"log"
    path.write_bytes(b"".join(to_line(s, VALUES) for s in range(1, 6)))
    before, inode = path.read_bytes(), path.stat().st_ino
    cut_rows(path, 5)
    assert path.stat().st_ino == inode  # nothing to drop: not touched
    with monkeypatch.context() as m:
        m.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("power")))
        with pytest.raises(OSError): cut_rows(path, 2)
    assert path.read_bytes() == before
    cut_rows(path, 2)
    assert [r["step"] for r in read_rows(path)] == [1, 2]
    cut_rows(tmp_path/"none", 3)
    assert not (tmp_path/"none").exists()


def test_killed_at_any_moment(tmp_path):
    "Every row that `log` has returned from is there, after SIGKILL at five random moments; each time the run goes on from five updates before."
    program = ("import sys\nfrom llm_scratch.monitoring import JsonLines\nstart = int(sys.argv[2])\nlog = JsonLines(sys.argv[1], start)\n"
               "for step in range(start+1, 10**7):\n    log.log(step, dict(loss=1/step, lr=1., grad_norm=2., n_tokens=4096, seconds=.2))\n    print(step, flush=True)\n")
    chance, path, start = random.Random(0), tmp_path/"log", 0
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", program, path, str(start)], stdout=subprocess.PIPE, text=True, env=ENV) as p:
            for _ in range(chance.randrange(20, 400)): last = int(p.stdout.readline())
            p.kill()
            last = int(([last] + [line for line in p.stdout.read().splitlines(keepends=True) if line.endswith("\n")])[-1])
        steps = [r["step"] for r in read_rows(path)]
        assert steps == [*range(1, len(steps)+1)] and len(steps) >= last > start
        start = len(steps)-5


def test_a_full_disk_leaves_whole_rows(tmp_path):
    "The file may not grow beyond 1,000 bytes: the row that does not fit is taken back, and when there is room again the next one is whole."
    program = """
import resource, sys
from llm_scratch.monitoring import JsonLines, Monitors, read_rows
log, failed = JsonLines(sys.argv[1]), []
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(1, 14):
    try: log.log(step, dict(loss=1/step, lr=1., grad_norm=2., n_tokens=4096, seconds=.2))
    except OSError: failed.append(step)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.log(14, dict(loss=.5))
steps = [r["step"] for r in read_rows(sys.argv[1])]
assert failed and failed[0] > 5 and sorted(steps + failed) == list(range(1, 15)) and steps[-1] == 14, (failed, steps)
"""
    subprocess.run([sys.executable, "-c", program, tmp_path/"log"], check=True, timeout=60, env=ENV)


@pytest.mark.parametrize("bad", ["{\"step\": 2", "[2]", "\x00\x00", "{\"loss\": 1}", "{\"step\": \"two\"}"])
def test_damage_within_a_log_is_said(tmp_path, bad):
    (tmp_path/"log").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    for read in (read_rows, lambda p: JsonLines(p, 3), lambda p: Tail(p).more()):
        with pytest.raises(UserError, match=r"line 2 of .*log is damaged"): read(tmp_path/"log")
    assert len((tmp_path/"log").read_text().splitlines()) == 3  # nothing was dropped


def test_logs_of_older_runs_are_read(tmp_path):
    "As `pipeline.pretrain` writes them."
    rows = [dict(step=n, loss=3/n, lr=.05*n, grad_norm=1.5, n_tokens=4096, seconds=.1234) for n in range(1, 4)]
    (tmp_path/"log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_rows(tmp_path/"log.jsonl") == rows
    JsonLines(tmp_path/"log.jsonl", 3).close()
    assert read_rows(tmp_path/"log.jsonl") == rows
    log = JsonLines(tmp_path/"new.jsonl")
    for row in rows: log.log(row["step"], {k: x for k, x in row.items() if k != "step"})
    assert (tmp_path/"new.jsonl").read_bytes() == (tmp_path/"log.jsonl").read_bytes()


def test_numbers_of_other_kinds(tmp_path):
    torch, np = pytest.importorskip("torch"), pytest.importorskip("numpy")
    log = JsonLines(tmp_path/"log")
    log.log(1, dict(a=torch.tensor(1.5), b=np.float32(2.5), c=np.int64(3), d=7))
    assert read_rows(tmp_path/"log") == [dict(step=1, a=1.5, b=2.5, c=3., d=7)]


def test_a_tail_follows_its_log(tmp_path):
    path = tmp_path/"log"
    tail = Tail(path)
    assert tail.more() == 0
    path.write_bytes(to_line(1, VALUES) + to_line(2, VALUES) + b'{"step": 3, ')
    assert (tail.more(), tail.more()) == (2, 0)
    with open(path, "ab") as f: f.write(b'"loss": 1.0}\n' + to_line(4, VALUES))
    assert tail.more() == 2 and [r["step"] for r in tail.rows] == [1, 2, 3, 4] and tail.rows[2] == dict(step=3, loss=1.)
    log = JsonLines(path, 1)  # goes on from the first update: the file is another one
    log.log(2, dict(loss=9.))
    assert tail.more() == 2 and [r["step"] for r in tail.rows] == [1, 2] and tail.rows[1]["loss"] == 9
    (tmp_path/"new").write_bytes(b"".join(to_line(n, VALUES) for n in range(5, 15)))
    os.replace(tmp_path/"new", path)  # another file, and longer
    assert tail.more() == 10 and [r["step"] for r in tail.rows] == [*range(5, 15)]
    path.write_bytes(to_line(1, VALUES))  # the same file, and shorter
    assert tail.more() == 1 and [r["step"] for r in tail.rows] == [1]


# --- spikes and alarms ---------------------------------------------------------------------------------------------

@FEW
@given(st.lists(st.floats(-100, 100), min_size=3, max_size=50), st.floats(-100, 100), st.floats(-50, 50), st.floats(.5, 20))
def test_the_yardstick_moves_and_stretches_with_the_values(recent, x, shift, scale):
    z = robust_z(recent, x, floor=1e-3)
    assert math.isclose(robust_z([r+shift for r in recent], x+shift, floor=1e-3), z, rel_tol=1e-3, abs_tol=1e-2)
    assert math.isclose(robust_z([r*scale for r in recent], x*scale, floor=1e-3*scale), z, rel_tol=1e-6, abs_tol=1e-6)


def test_up_to_half_of_the_values_do_not_bend_it():
    noise = random.Random(0)
    quiet = [3+noise.gauss(0, .05) for _ in range(50)]
    spoiled = lambda n: [1e9]*n + quiet[n:]
    assert robust_z(spoiled(10), 4) > SPIKE and abs(robust_z(spoiled(24), 3)) < 1 < robust_z(spoiled(24), 4) and robust_z(spoiled(26), 4) < 0
    assert robust_z([3.]*50, 3.05) == pytest.approx(5)  # the floor of .01
    assert robust_z([0., 0, 0, 1, -1, 2, -2], 6) == pytest.approx(6/1.4826)


def test_windows_of_scores():
    noise = random.Random(1)
    values = [noise.gauss(3, .05) for _ in range(120)]
    scores = spike_scores(values)
    assert scores[:20] == [0]*20 and scores[20] == robust_z(values[:20], values[20]) != 0
    assert all(scores[n] == robust_z(values[max(0, n-50):n], values[n]) for n in range(20, 120))
    broken = values[:60] + [math.nan, math.inf] + values[60:]
    assert spike_scores(broken) == scores[:60] + [math.inf]*2 + scores[60:]  # never in the window


@FEW
@given(st.lists(st.booleans(), max_size=30), st.sampled_from([1, 15]), st.sampled_from([0, 1, 14, 15, 16, 45]))
def test_states_of_an_alarm(holds, every, duration):
    "Firing: the condition held at every look of at least the duration; the definition, looked up anew at each look."
    expected = []
    for n, true in enumerate(holds):
        run = next((k for k in range(n+1) if not holds[n-k]), n+1)  # looks in a row at which it held
        expected.append("inactive" if not true else "firing" if (run-1)*every >= duration else "pending")
    assert alarm_states(holds, every, duration) == expected


def test_states_are_those_of_prometheus(tmp_path):
    needs("promtool")
    chance, tests = random.Random(0), []
    for duration in (0, 15, 40):
        holds = [chance.random() < .8 for _ in range(30)]
        states = alarm_states(holds, 15, duration)
        looks = [dict(expr=f'ALERTS{{alertname="A{duration}"}}', eval_time=f"{15*n}s", exp_samples=[] if s == "inactive" else [dict(labels=f'ALERTS{{alertname="A{duration}", alertstate="{s}"}}', value=1)]) for n, s in enumerate(states)]
        tests.append(dict(interval="15s", input_series=[dict(series="x", values=" ".join(str(int(h)) for h in holds))], promql_expr_test=looks))
        assert {*states} >= {"inactive", "firing"}
    rules = [dict(alert=f"A{d}", expr="x > 0", **{"for": f"{d}s"}) for d in (0, 15, 40)]
    (tmp_path/"rules.yml").write_text(json.dumps(dict(groups=[dict(name="g", rules=rules)])))
    (tmp_path/"test.yml").write_text(json.dumps(dict(rule_files=["rules.yml"], evaluation_interval="15s", tests=tests)))
    done = subprocess.run(["promtool", "test", "rules", tmp_path/"test.yml"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout+done.stderr


# --- the exporter --------------------------------------------------------------------------------------------------

def page(exporter, kind="text/plain"):
    ask = urllib.request.Request(f"http://127.0.0.1:{exporter.port}/metrics", headers=dict(Accept=kind))
    with urllib.request.urlopen(ask, timeout=20) as answer: return answer.read().decode()


def numbers(text): return {m[1]: float(m[2]) for m in re.finditer(r"^([^#\s]\S*(?:\{.*\})?) (\S+)$", text, re.M)}


def all_samples(): return {m.key: 1. for m in HOST_METRICS} | dict(gpu1_power_watts=2.)


@pytest.fixture
def exporter(request, tmp_path):
    made = PrometheusExporter(run="r", rank=3, step=40, sample=all_samples, targets=tmp_path/"targets")
    yield made
    if made._thread.is_alive(): made.close()


def test_everything_that_is_listed_is_told(exporter):
    "And nothing else; each with a description that names its unit."
    exporter.log(41, VALUES | dict(mfu=.4, validation_loss=2.6))
    text = page(exporter)
    helps = dict(re.findall(r"^# HELP (\S+) (.*)$", text, re.M))
    assert set(helps) == {m.name for m in [*METRICS, *HOST_METRICS]}
    for m in [*METRICS, *HOST_METRICS]: assert helps[m.name].endswith(f"({m.unit})") and m.unit and len(m.does) > 10
    assert len({m.name for m in [*METRICS, *HOST_METRICS]}) == len(METRICS)+len(HOST_METRICS)
    units = dict(re.findall(r"^# UNIT (\S+) (\S+)$", page(exporter, "application/openmetrics-text"), re.M))
    assert all(name.endswith(f"_{unit}") for name, unit in units.items())
    assert {n for n in helps if not re.search(r"_(ratio|bytes|seconds|tokens_total|updates|updates_total|watts|celsius|cores|per_token|per_second)$", n)} == {"llm_train_gradient_norm", "llm_train_loss_spikes_total", "llm_host_sampler_up", "llm_host_gpu_throttled"}
    assert len(units) == len(helps)-4
    needs("promtool")
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_what_the_page_says(exporter):
    who = '{rank="3",run="r"}'
    before = numbers(page(exporter))
    assert before[f"llm_train_updates{who}"] == 40 and before[f"llm_train_tokens_total{who}"] == 0 and f"llm_train_loss_nats_per_token{who}" not in before
    start = time.time()
    for n, seconds in enumerate((.005, .01, .3, 700., .3), 41): exporter.log(n, dict(VALUES, loss=float(n), seconds=seconds, aux_loss=7))
    said = numbers(page(exporter))
    assert said[f"llm_train_updates{who}"] == said[f"llm_train_loss_nats_per_token{who}"] == 45 and said[f"llm_train_aux_loss{who}"] == 7
    assert said[f"llm_train_learning_rate_ratio{who}"] == .75 and said[f"llm_train_gradient_norm{who}"] == 1.25 and said[f"llm_train_tokens_total{who}"] == 5*512
    assert f"llm_train_mfu_ratio{who}" not in said and start-1 < said[f"llm_train_last_update_timestamp_seconds{who}"] < time.time()+1
    buckets = {float(k.split('le="')[1].split('"')[0]): x for k, x in said.items() if "_bucket" in k}
    assert buckets == {le: sum(s <= le for s in (.005, .01, .3, 700., .3)) for le in buckets} and buckets[math.inf] == 5 and buckets[.01] == 2 and len(buckets) == 16
    assert said[f"llm_train_step_seconds_sum{who}"] == pytest.approx(700.615) and said[f"llm_train_step_seconds_count{who}"] == 5
    gpu = {k: x for k, x in said.items() if k.startswith("llm_host_gpu_power_watts")}
    assert gpu == {'llm_host_gpu_power_watts{device="0",rank="3",run="r"}': 1, 'llm_host_gpu_power_watts{device="1",rank="3",run="r"}': 2}


def test_events_between_two_looks_are_counted(exporter):
    noise = random.Random(0)
    for n in range(100): exporter.log(n, dict(loss=3+noise.gauss(0, .05) + (5 if n in (50, 60, 61) else 0), grad_norm=1.))
    for n, (loss, norm) in enumerate(((math.nan, 1.), (3., math.inf), (3., math.nan), (3., 1.)), 100): exporter.log(n, dict(loss=loss, grad_norm=norm))
    said = numbers(page(exporter))
    assert said['llm_train_loss_spikes_total{rank="3",run="r"}'] == 3 and said['llm_train_nonfinite_updates_total{rank="3",run="r"}'] == 3


def test_a_scrape_sees_one_update(exporter):
    "While another thread logs as fast as it can, all numbers of a page are of the same row."
    stop = threading.Event()

    def log():
        n = 0
        while not stop.is_set():
            n += 1
            exporter.log(n, dict(loss=float(n), lr=float(n), n_tokens=1, grad_norm=float(n)))
    thread = threading.Thread(target=log)
    thread.start()
    try:
        for _ in range(30):
            said = numbers(page(exporter))
            seen = {said.get(f'llm_train_{name}{{rank="3",run="r"}}') for name in ("updates", "loss_nats_per_token", "learning_rate_ratio", "tokens_total", "gradient_norm")}
            assert len(seen) == 1 or None in seen  # before the first row
    finally:
        stop.set()
        thread.join()
    assert None not in seen


def test_the_page_is_for_this_machine_and_ends(exporter, tmp_path):
    (file,) = (tmp_path/"targets").iterdir()
    assert json.loads(file.read_text()) == [dict(targets=[f"127.0.0.1:{exporter.port}"], labels=dict(run="r", rank="3"))]
    with pytest.raises(OSError): socket.create_connection(("127.0.0.2", exporter.port), timeout=5)  # also this machine, another address
    with pytest.raises(UserError, match=f"port {exporter.port} of 127.0.0.1"): PrometheusExporter(exporter.port)
    from prometheus_client import REGISTRY, generate_latest
    assert b"llm_" not in generate_latest(REGISTRY)  # a registry of its own
    twin = PrometheusExporter(run="twin")
    assert "llm_train_updates" in page(twin) and twin.port != exporter.port
    twin.close()
    exporter.close()
    assert not file.exists() and not exporter._thread.is_alive()
    PrometheusExporter(exporter.port).close()  # the port is free again


def test_a_sampler_that_fails_costs_only_its_numbers(exporter):
    exporter.log(41, VALUES)
    assert numbers(page(exporter))['llm_host_sampler_up{rank="3",run="r"}'] == 1
    exporter.sample = lambda: 1/0
    said = numbers(page(exporter))
    assert said['llm_host_sampler_up{rank="3",run="r"}'] == 0 and said['llm_train_loss_nats_per_token{rank="3",run="r"}'] == 2.5 and not any("gpu" in k for k in said)


def test_a_sampler_of_psutil(exporter):
    psutil = pytest.importorskip("psutil")
    exporter.sample = lambda: dict(memory_available_bytes=psutil.virtual_memory().available, process_memory_bytes=psutil.Process().memory_info().rss, swap_used_bytes=psutil.swap_memory().used)
    said = numbers(page(exporter))
    who = '{device="",rank="3",run="r"}'
    assert said[f"llm_host_memory_available_bytes{who}"] > 2**20 and said[f"llm_host_process_memory_bytes{who}"] > 2**20 and f"llm_host_swap_used_bytes{who}" in said


def test_names_of_hardware_samples():
    assert host_metric("gpu12_power_watts") == ("llm_host_gpu_power_watts", "12") and host_metric("disk/nvme0n1 bytes") == ("llm_host_disk_nvme0n1_bytes", "")
    assert [host_metric(m.key)[0] for m in HOST_METRICS] == [m.name for m in HOST_METRICS]


# --- rules and dashboard -------------------------------------------------------------------------------------------

def named(expr): return set(re.findall(r"[a-z]+:[a-z_:]+|llm_[a-z_]+|\bup\b", re.sub(r"\{[^}]*\}", "", expr)))


def test_rules_and_panels_name_only_what_is_told(exporter):
    exporter.log(1, VALUES | dict(mfu=.4, validation_loss=2.6))
    exist = {k.partition("{")[0] for k in numbers(page(exporter))} | records().keys() | {"up"}
    exprs = [a.expr for a in alarms()] + [*records().values()] + [expr for _, _, queries in PANELS for expr, _ in queries]
    assert all(named(e) and named(e) <= exist for e in exprs), [named(e)-exist for e in exprs]
    shown = set().union(*map(named, exprs))
    assert {n for n in exist if not n.endswith("_created")} - shown == set(), "told and shown nowhere"


def test_the_shipped_files_are_what_is_written(tmp_path):
    write_monitoring(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in DEPLOY.iterdir()} - {"README.md"}
    for p in tmp_path.iterdir(): assert p.read_bytes() == (DEPLOY/p.name).read_bytes(), f"write_monitoring('deploy/monitoring') anew: {p.name}"


def test_the_dial_changes_durations_and_nothing_else():
    bare = [re.sub(r"\b\d+(ms|s|m|h)\b", "#", rules_text(s)) for s in (60, 1, .5, 90)]
    assert len(set(bare)) == 1 and "for: 5m" in rules_text() and "for: 5s" in rules_text(1) and "[1s]" in rules_text(1) and "[1h]" in rules_text() and "[90s]" in rules_text(90)


def test_promtool_accepts_the_files(tmp_path):
    needs("promtool")
    for command in (["check", "config", DEPLOY/"prometheus.yml"], ["check", "rules", DEPLOY/"rules.yml"], ["check", "config", write_monitoring(tmp_path, slow_step=.5, every=.2, targets="/x y")/"prometheus.yml"]):
        done = subprocess.run(["promtool", *map(str, command)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout+done.stderr
    assert f"{len(alarms())+len(records())} rules found" in done.stdout


WHO, HOUR = '{run="r", rank="0"}', 240  # scrapes of 15 seconds
MOVING, STEADY = f"0+60x{2*HOUR}", f"3x{2*HOUR}"
FAILURES = {  # alarm: the series of a failure that begins after an hour, and after how many more scrapes it is silent and fires
    "LossIsNaN": ({f"llm_train_loss_nats_per_token{WHO}": f"3x{HOUR-1}{' NaN'*HOUR}"}, 0, 0),
    "TrainingStalled": ({f"llm_train_updates{WHO}": f"0+5x{HOUR-1} {5*(HOUR-1)}x{HOUR}"}, 20, 24),
    "ExporterDown": ({'up{job="llm_scratch", run="r", rank="0"}': f"1x{HOUR-1} 0x{HOUR}"}, 7, 8),
    "MemoryNearlyFull": ({f"llm_host_memory_available_bytes{WHO}": f"4e9x{HOUR-1} 9e8x{HOUR}"}, 3, 4),
    "DiskNearlyFull": ({f"llm_host_disk_free_bytes{WHO}": f"40e9x{HOUR-1} 19e9x{HOUR}"}, 19, 20),
    "LossSpike": ({f"llm_train_loss_spikes_total{WHO}": f"0x{HOUR-1} 1x{HOUR}"}, 0, 0),
    "GradientGrows": ({f"llm_train_gradient_norm{WHO}": f"1x{HOUR-1} 11x{HOUR}"}, 3, 4),
    "ThroughputFell": ({f"llm_train_tokens_total{WHO}": f"0+60000x{HOUR-1} {60000*(HOUR-1)}+30000x{HOUR}"}, 30, 36),
    "GPUThrottled": ({'llm_host_gpu_throttled{run="r", rank="0", device="3"}': f"0x{HOUR-1} 1x{HOUR}"}, 19, 20),
}
WELL = {f"llm_train_loss_nats_per_token{WHO}": STEADY, f"llm_train_updates{WHO}": MOVING, 'up{job="llm_scratch", run="r", rank="0"}': f"1x{2*HOUR}", f"llm_train_gradient_norm{WHO}": STEADY,
        f"llm_host_memory_available_bytes{WHO}": f"4e9x{2*HOUR}", f"llm_host_disk_free_bytes{WHO}": f"40e9x{2*HOUR}", f"llm_train_loss_spikes_total{WHO}": f"0x{2*HOUR}", f"llm_train_nonfinite_updates_total{WHO}": f"0x{2*HOUR}",
        f"llm_train_tokens_total{WHO}": f"0+60000x{2*HOUR}", 'llm_host_gpu_throttled{run="r", rank="0", device="3"}': f"0x{2*HOUR}"}


def fires(name, n):  # at scrape `n`, with the text a person reads
    a = next(a for a in alarms() if a.name == name)
    labels = dict(run="r", severity=a.severity) | (dict(rank="0") if name != "ThroughputFell" else {}) | (dict(device="3") if name == "GPUThrottled" else {}) | (dict(job="llm_scratch") if name == "ExporterDown" else {})
    says = a.says.replace("{{ $labels.run }}", "r").replace("{{ $labels.device }}", "3")
    return dict(eval_time=f"{15*n}s", alertname=name, exp_alerts=[dict(exp_labels=labels, exp_annotations=dict(summary=says, first=a.first))])


def test_every_alarm_fires_on_its_failure_and_on_no_other(tmp_path):
    "The shipped rules, by Prometheus' own unit tests: an hour in which all is well, then the failure; the others stay silent."
    needs("promtool")
    assert FAILURES.keys() == {a.name for a in alarms()}
    tests = [dict(name="all is well", interval="15s", input_series=[dict(series=s, values=v) for s, v in WELL.items()],
                  alert_rule_test=[dict(eval_time=f"{15*n}s", alertname=a.name) for n in (8, 30, HOUR, 2*HOUR) for a in alarms()])]
    for name, (series, silent, at) in FAILURES.items():
        looks = [dict(eval_time=f"{15*(HOUR-1)}s", alertname=name), *([dict(eval_time=f"{15*(HOUR+silent)}s", alertname=name)] if silent < at else []), fires(name, HOUR+at)]
        looks += [dict(eval_time=f"{15*(HOUR+at)}s", alertname=other) for other in FAILURES if other != name]
        tests.append(dict(name=name, interval="15s", input_series=[dict(series=s, values=v) for s, v in (WELL | series).items()], alert_rule_test=looks))
    between = f"0x{HOUR} 1x{HOUR}"  # NaN for one update, and finite again before the next scrape
    tests.append(dict(name="between", interval="15s", input_series=[dict(series=s, values=v) for s, v in (WELL | {f"llm_train_nonfinite_updates_total{WHO}": between}).items()], alert_rule_test=[fires("LossIsNaN", HOUR+1)]))
    rate = dict(expr="round(run:llm_train_tokens:rate)", eval_time="1h", exp_samples=[dict(labels='{run="r"}', value=4000)])
    tests[0]["promql_expr_test"] = [rate]
    (tmp_path/"rules.yml").write_text(rules_text(), encoding="utf-8")  # which are those that are shipped, see above
    (tmp_path/"test.yml").write_text(json.dumps(dict(rule_files=["rules.yml"], evaluation_interval="15s", tests=tests)))
    done = subprocess.run(["promtool", "test", "rules", tmp_path/"test.yml"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.stdout+done.stderr)[:4000]


def test_the_dashboard_is_what_grafana_wants():
    board = dashboard()
    assert json.loads(json.dumps(board)) == board and {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= board.keys() and len(board["uid"]) <= 40
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"]) == len(PANELS)
    cells = [(x, y) for p in board["panels"] for x in range(p["gridPos"]["x"], p["gridPos"]["x"]+p["gridPos"]["w"]) for y in range(p["gridPos"]["y"], p["gridPos"]["y"]+p["gridPos"]["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23 and min(cells) == (0, 0)
    for p in board["panels"]:
        assert p["type"] == "timeseries" and p["datasource"] == dict(type="prometheus", uid="${datasource}") and len({t["refId"] for t in p["targets"]}) == len(p["targets"]) > 0
        for t in p["targets"]: assert t["expr"] and t["legendFormat"] and t["datasource"] == p["datasource"]
    choices = {v["name"]: v for v in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"])))
    assert used == {*choices, "__rate_interval"} and choices["datasource"]["type"] == "datasource" and choices["run"]["query"]["query"] == "label_values(llm_train_updates, run)"


# --- a real server -------------------------------------------------------------------------------------------------

RANK = """
import math, signal, sys, time
from llm_scratch.monitoring import HOST_METRICS, PrometheusExporter
kind, folder = sys.argv[1:]
exporter = PrometheusExporter(run=kind, targets=folder, sample=lambda: {m.key: 0. if "throttled" in m.key else 1e12 for m in HOST_METRICS})
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
try:
    for step in range(1, 4_000):
        if kind != "hangs" or step < 30: exporter.log(step, dict(loss=math.nan if kind == "nan" and step > 40 else 3., lr=1., grad_norm=1., n_tokens=1000, seconds=.05, mfu=.4, validation_loss=3.))
        time.sleep(.05)
finally: exporter.close()
"""


def test_a_real_server_fires_the_alarms(tmp_path):
    "Four processes: one is well, one's loss is NaN, one hangs, one is killed. The rules are those that are shipped, with the dial at a second."
    needs("prometheus")
    kinds = "well", "nan", "hangs", "killed"
    processes = {kind: subprocess.Popen([sys.executable, "-c", RANK, kind, tmp_path/"targets"], env=ENV) for kind in kinds}
    try:
        with local_prometheus(tmp_path/"server", slow_step=1, every=.2, targets=tmp_path/"targets") as url:
            def query(expr): return ask_prometheus(url, "query", query=expr)["result"]
            def firing(): return {(a["labels"]["run"], a["labels"]["alertname"]) for a in ask_prometheus(url, "alerts")["alerts"] if a["state"] == "firing"}
            assert until(lambda: len(query("up == 1")) == 4), (tmp_path/"server"/"prometheus.log").read_text()
            assert {r["metric"]["run"] for r in query("llm_train_updates")} == set(kinds) and {r["metric"]["rank"] for r in query("up")} == {"0"}
            assert query('{exported_run!=""}') == []  # the file and the page agree on who this is
            processes["killed"].kill()
            expected = {("nan", "LossIsNaN"), ("hangs", "TrainingStalled"), ("killed", "ExporterDown")}
            assert until(lambda: firing() >= expected), firing()
            assert firing() == expected
            (alert,) = (a for a in ask_prometheus(url, "alerts")["alerts"] if a["labels"]["alertname"] == "TrainingStalled")
            assert alert["annotations"]["summary"] == "hangs answers and makes no updates" and alert["labels"]["severity"] == "page"
            done = float(query('llm_train_updates{run="well"}')[0]["value"][1])
            assert until(lambda: float(query('llm_train_updates{run="well"}')[0]["value"][1]) > done+100)  # until the window holds nothing of the start
            rate = float(query('run:llm_train_tokens:rate{run="well"}')[0]["value"][1])
            steps = float(query('rate(llm_train_updates{run="well"}[5s])')[0]["value"][1])
            assert 0 < rate <= 1000/.05*1.3 and rate == pytest.approx(1000*steps, rel=.3)
            for _, _, queries in PANELS:  # as Grafana would send them
                for expr, _ in queries: assert query(expr.replace("$run", "well|nan|hangs").replace("$__rate_interval", "5s")), expr
            assert ask_prometheus(url, "targets")["activeTargets"][0]["labels"]["job"] == "llm_scratch"
            with pytest.raises(UserError, match="refuses query"): query("sum(")
            processes["well"].terminate()
            assert processes["well"].wait(30) == 0 and not (tmp_path/"targets"/"well-0.json").exists() and (tmp_path/"targets"/"killed-0.json").exists()
            assert until(lambda: not query('up{run="well"}') and "well" not in {run for run, _ in firing()}), firing()
        with pytest.raises(OSError): urllib.request.urlopen(f"{url}/-/ready", timeout=5)  # no server stays behind
    finally:
        for p in processes.values():
            p.kill()
            p.wait()


def test_a_server_that_is_missing_or_does_not_start_is_said(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(shutil, "which", lambda name: None)
        with pytest.raises(UserError, match="apt-get install prometheus"), local_prometheus(tmp_path, targets=tmp_path): pass
    needs("prometheus")
    monkeypatch.setattr(monitoring, "rules_text", lambda slow_step: "groups: {")
    with pytest.raises(UserError, match="prometheus does not start"), local_prometheus(tmp_path, targets=tmp_path): pass


def test_a_server_dies_with_its_owner(tmp_path):
    needs("prometheus", "setpriv")
    program = "import os, signal, sys\nfrom llm_scratch.monitoring import local_prometheus\nwith local_prometheus(sys.argv[1], targets=sys.argv[1]) as url:\n    print(url, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=90, env=ENV, check=False)
    assert done.returncode == -signal.SIGKILL and done.stdout.startswith("http://127.0.0.1:")

    def gone():
        try: urllib.request.urlopen(f"{done.stdout.strip()}/-/ready", timeout=5)
        except OSError: return True
    assert until(gone, 20)


# --- TensorBoard and Weights & Biases ------------------------------------------------------------------------------

def test_tensorboard_reads_it_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume_step, steps in ((0, range(1, 21)), (12, range(13, 16))):
        board = TensorBoard(tmp_path, resume_step)
        for s in steps: board.log(s, dict(VALUES, loss=s+resume_step/100))
        board.close()
    events = accumulator.EventAccumulator(str(tmp_path), size_guidance=dict(scalars=0)).Reload()
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in VALUES}
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")] == [(s, s) for s in range(1, 13)] + [(s, s+.12) for s in range(13, 16)]


def wandb_files(folder): return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime_ns)


def test_wandb_offline_is_read_back_and_keeps_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wide = {f"a_long_name_of_a_metric_number_{n}": n/7 for n in range(2000)}  # a record of several blocks
    ids = []
    for steps in (range(1, 5), range(4, 7)):
        run = WandB(tmp_path, run="night", config=dict(secret_of_the_config="seen"))
        for s in steps: run.log(s, dict(VALUES, loss=math.nan if s == 2 else 1/s) | (wide if s == 3 else {}))
        run.close()
        ids.append(run.id)
    first, second = wandb_files(tmp_path)
    rows = read_wandb(first)
    assert comparable(rows) == comparable([dict(VALUES, step=s, loss=math.nan if s == 2 else 1/s) | (wide if s == 3 else {}) for s in range(1, 5)])
    assert [r["step"] for r in read_wandb(second)] == [4, 5, 6] and ids[0] == ids[1] and {first.name, second.name} == {f"run-{ids[0]}.wandb"}
    assert first.stat().st_size > 2**16 and b"secret_of_the_config" in first.read_bytes()
    whole, copy = first.read_bytes(), tmp_path/"copy.wandb"
    for at in random.Random(0).sample(range(8, len(whole)), 25):  # killed
        copy.write_bytes(whole[:at])
        assert comparable(read_wandb(copy)) == comparable(rows[:len(read_wandb(copy))])
    for at in random.Random(1).sample(range(8, len(whole)), 15):  # damaged: nothing wrong is told
        copy.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at+1:])
        assert comparable(read_wandb(copy)) == comparable(rows[:len(read_wandb(copy))])
    copy.write_bytes(b"something else")
    with pytest.raises(UserError, match="is not a file of Weights & Biases"): read_wandb(copy)


def test_wandb_is_whole_when_it_is_closed(tmp_path, monkeypatch):
    "Its `finish` returns before its process has written the file, four times in ten; our `close` waits for that process to end."
    pytest.importorskip("wandb")
    psutil = pytest.importorskip("psutil")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for n in range(2):
        run = WandB(tmp_path/str(n))
        for s in (1, 2, 3): run.log(s, VALUES)
        run.close()
        assert [len(read_wandb(f)) for f in wandb_files(tmp_path/str(n))] == [3]
        assert [p for p in psutil.Process().children(recursive=True) if p.is_running() and p.status() != psutil.STATUS_ZOMBIE and "wandb" in p.name()] == []


def in_blocks(records):
    "A `.wandb` file as LevelDB's description of its log has it: blocks of 32 KiB, a record cut into first, middle and last where it does not fit, less than 7 bytes left filled with zeros."
    data = bytearray(b":W&B\xe1\xbe\x00")
    for record in records:
        rest, begun = record, False
        while True:
            room = 2**15 - len(data) % 2**15
            if room < 7:
                data += bytes(room)
                room = 2**15
            piece, rest = rest[:room-7], rest[room-7:]
            kind = {(False, False): 1, (False, True): 2, (True, True): 3, (True, False): 4}[begun, bool(rest)]
            data += struct.pack("<IHB", zlib.crc32(bytes([kind])+piece), len(piece), kind) + piece
            begun = True
            if not rest: break
    return bytes(data)


@FEW
@given(st.lists(st.sampled_from([0, 1, 100, 2**15-21, 2**15-20, 2**15-16, 2**15-14, 2**15-7, 2**15, 2**16, 70_000]), max_size=5), st.integers(0, 9))
def test_records_of_any_size_are_read(sizes, shift):
    records = [bytes([n % 251])*max(0, size-shift) for n, size in enumerate(sizes)]
    assert [*monitoring._records(in_blocks(records))] == records


def test_wandb_is_asked_to_look_at_nothing(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    given_, run = [], type("Run", (), dict(finish=lambda self: given_.append("finished")))()
    for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(wandb, "init", lambda **how: given_.append(how) or run)
    monkeypatch.setattr(wandb, "teardown", lambda: given_.append("ended"))
    WandB(tmp_path, run="night", config=dict(a=1), project="p").close()
    how, *rest = given_
    s = how["settings"]
    assert (how["project"], how["name"], how["config"], how["resume"]) == ("p", "night", dict(a=1), "allow") and len(how["id"]) == 8 and rest == ["finished", "ended"]
    assert s.mode == "offline" and s.console == "off" and s.save_code is False and s.host == "unnamed" and s.x_save_requirements is False and str(s.root_dir) == str(tmp_path)
    for name in ("disable_code", "disable_git", "disable_job_creation", "x_disable_stats", "x_disable_meta", "x_disable_machine_info"): assert getattr(s, name) is True, name
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


def test_wandb_tells_nothing_of_the_user(tmp_path, monkeypatch):
    "Neither in the file nor in what it would send: no code, no packages, no paths, no host, nothing that is printed, no file but the rows."
    pytest.importorskip("wandb")
    program = """
import sys
from llm_scratch.monitoring import WandB
run = WandB(sys.argv[1])
print("something that is printed")
for step in range(1, 4): run.log(step, dict(loss=1/step))
run.close()
"""
    (tmp_path/"script_of_the_user.py").write_text(program)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    env = {k: v for k, v in ENV.items() if not k.startswith("WANDB")} | dict(USER="name_of_the_user", SOME_VARIABLE="value_of_a_variable")
    subprocess.run([sys.executable, "script_of_the_user.py", tmp_path/"run"], check=True, timeout=120, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    (file,) = wandb_files(tmp_path/"run")
    data = file.read_bytes()
    for word in ("script_of_the_user", "name_of_the_user", "value_of_a_variable", "something that is printed", socket.gethostname()+'"', str(tmp_path), sys.executable, "torch"): assert word.encode() not in data, word
    assert b"unnamed" in data and len(read_wandb(file)) == 3
    assert [p.name for p in file.parent.rglob("*") if p.is_file() and "logs" not in p.parts] == [file.name]


@pytest.mark.parametrize(("variable", "argument", "n_files"), [(None, None, 1), ("disabled", None, 0), ("disabled", "offline", 1), ("offline", "disabled", 0)])
def test_wandb_mode_is_the_users(tmp_path, monkeypatch, variable, argument, n_files):
    pytest.importorskip("wandb")
    if variable: monkeypatch.setenv("WANDB_MODE", variable)
    else: monkeypatch.delenv("WANDB_MODE", raising=False)
    run = WandB(tmp_path, mode=argument)
    run.log(1, VALUES)
    run.close()
    assert len(wandb_files(tmp_path)) == n_files


def test_no_packet_leaves(tmp_path):
    "In a network of its own whose only way out is counted: none goes out, and a control shows that one would be seen."
    pytest.importorskip("wandb")
    needs("ip", "unshare")
    program = """
import json, pathlib, socket, subprocess, sys
def sent(): return json.loads(subprocess.run(["ip", "-s", "-j", "link", "show", "llmsmon0"], capture_output=True, check=True).stdout)[0]["stats64"]["tx"]["packets"]
from llm_scratch.monitoring import open_monitors
before = sent()
monitor = open_monitors("tensorboard,wandb,prometheus:0", sys.argv[1], config=dict(a=1))
for step in range(1, 20): monitor.log(step, dict(loss=1/step))
monitor.close()
after = sent()
try: socket.getaddrinfo("api.wandb.ai", 443)
except OSError: pass
print(json.dumps([before, after, sent()]))
"""
    setup = ("ip link set lo up && ip link add llmsmon0 type veth peer name llmsmon1 && ip link set llmsmon0 addrgenmode none && ip link set llmsmon1 addrgenmode none && ip link set llmsmon1 up && ip addr add 10.99.0.1/24 dev llmsmon0 && ip link set llmsmon0 arp off up && ip route add default via 10.99.0.2 dev llmsmon0 onlink"
             f" && echo nameserver 10.99.0.53 > {tmp_path}/resolv.conf && mount --bind {tmp_path}/resolv.conf $(readlink -f /etc/resolv.conf) && exec timeout 120 \"$@\"")
    env = {k: v for k, v in ENV.items() if not k.startswith("WANDB")} | dict(RES_OPTIONS="timeout:1 attempts:1")
    if subprocess.run(["unshare", "-n", "-m", "ip", "link", "add", "llmsmon0", "type", "veth", "peer", "name", "llmsmon1"], capture_output=True, check=False).returncode: pytest.skip("this user may not make a network of its own (needs root)")
    done = subprocess.run(["unshare", "-n", "-m", "sh", "-c", setup, "sh", sys.executable, "-c", program, tmp_path/"run"], capture_output=True, text=True, env=env, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    before, after, control = json.loads(done.stdout.splitlines()[-1])
    assert before == after and control > after
    assert len(read_wandb(*wandb_files(tmp_path/"run"))) == 19


# --- several -------------------------------------------------------------------------------------------------------

class Guest:
    def __init__(self, fails=(), error=ConnectionError): self.heard, self.closed, self.fails, self.error = [], 0, fails, error

    def log(self, step, values):
        if step in self.fails: raise self.error("gone\nsecond line")
        self.heard.append(step)

    def close(self):
        self.closed += 1
        if "close" in self.fails: raise self.error("gone")


def test_one_that_fails_leaves_and_the_others_hear_on(caplog):
    first, bad, last = Guest(), Guest(fails=(3,)), Guest()
    everyone = Monitors([first, bad, last])
    for step in range(1, 6): everyone.log(step, VALUES)
    everyone.close()
    assert first.heard == last.heard == [1, 2, 3, 4, 5] and bad.heard == [1, 2] and (first.closed, bad.closed, last.closed) == (1, 1, 1)
    assert [r.getMessage() for r in caplog.records] == ["Guest failed (ConnectionError: gone); training goes on without it"] and caplog.records[0].levelno == logging.WARNING
    Monitors([]).log(1, VALUES)


def test_closing_never_fails(caplog):
    guests = [Guest(fails=("close",)), Guest()]
    Monitors(guests).close()
    assert [g.closed for g in guests] == [1, 1] and len(caplog.records) == 1
    gone = Monitors([Guest(fails=(1, "close"))])
    gone.log(1, VALUES)
    gone.close()
    assert len(caplog.records) == 2  # said once


@pytest.mark.parametrize(("error", "listed"), [(None, False), (KeyboardInterrupt(), False), (GeneratorExit(), False), (SystemExit(), False), (SystemExit(1), True), (ValueError("loss nan"), True), (MemoryError(), True)])
def test_a_run_that_breaks_stays_listed(tmp_path, error, listed):
    pytest.importorskip("prometheus_client")
    guest, raised = Guest(), None
    try:
        with open_monitors("prometheus:0", tmp_path/"run") as monitor:
            monitor.monitors.insert(1, guest)
            monitor.log(1, VALUES)
            if error: raise error
    except BaseException as e: raised = e
    assert raised is error and guest.closed == 1 and not monitor.monitors[-1]._thread.is_alive()
    assert (tmp_path/"prometheus-targets"/"run-0.json").exists() == listed


def test_ctrl_c_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt): Monitors([Guest(fails=(1,), error=KeyboardInterrupt)]).log(1, VALUES)


def test_the_log_is_tried_again(tmp_path, caplog, monkeypatch):
    log, trouble = JsonLines(tmp_path/"log"), []
    real = log.log
    monkeypatch.setattr(log, "log", lambda step, values: (_ for _ in ()).throw(OSError("full")) if step in trouble else real(step, values))
    trouble += [2, 3, 5]
    everyone = Monitors([log])
    for step in range(1, 7): everyone.log(step, VALUES)
    everyone.close()
    assert [r["step"] for r in read_rows(tmp_path/"log")] == [1, 4, 6] and len(caplog.records) == 2  # one line per trouble, not per row


def kinds(monitor): return [type(m).__name__ for m in monitor.monitors]


def test_opened_by_a_word(tmp_path):
    for package in ("wandb", "tensorboard", "prometheus_client"): pytest.importorskip(package)
    for spec, expected in (("", ["JsonLines"]), ("jsonl", ["JsonLines"]), (" tensorboard , prometheus:127.0.0.1:0", ["JsonLines", "TensorBoard", "PrometheusExporter"]), ("wandb:disabled", ["JsonLines", "WandB"])):
        monitor = open_monitors(spec, tmp_path/"run", resume_step=7)
        assert kinds(monitor) == expected
        monitor.log(8, VALUES)
        if "prometheus" in spec:
            said = numbers(page(monitor.monitors[-1]))
            assert said['llm_train_updates{rank="0",run="run"}'] == 8 and said['llm_host_disk_free_bytes{device="",rank="0",run="run"}'] > 0
            assert (tmp_path/"prometheus-targets"/"run-0.json").exists()
        monitor.close()
        assert [r["step"] for r in read_rows(tmp_path/"run"/"log.jsonl")] == [8]
    assert [*(tmp_path/"prometheus-targets").iterdir()] == []


def test_a_run_that_goes_on_keeps_its_rows(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume_step, steps in ((0, range(1, 9)), (5, range(6, 8)), (0, range(1, 3))):
        monitor = open_monitors("tensorboard", tmp_path, resume_step=resume_step)
        for s in steps: monitor.log(s, VALUES)
        monitor.close()
        assert [r["step"] for r in read_rows(tmp_path/"log.jsonl")] == [*range(1, resume_step+1), *steps]
        assert [e.step for e in accumulator.EventAccumulator(str(tmp_path/"tensorboard")).Reload().Scalars("train/loss")] == [*range(1, resume_step+1), *steps]


def test_other_ranks(tmp_path):
    pytest.importorskip("prometheus_client")
    quiet = open_monitors("jsonl,tensorboard,wandb,prometheus:0", tmp_path/"run", rank=1, local_rank=1)
    quiet.log(1, VALUES)
    quiet.close()
    assert kinds(quiet) == [] and [*(tmp_path/"run").iterdir()] == []
    port = monitoring._free_port()
    many = [open_monitors(f"jsonl,prometheus:{port}+", tmp_path/"run", rank=8+r, local_rank=r, sample=all_samples) for r in (0, 1)]
    try:
        assert [kinds(m) for m in many] == [["PrometheusExporter"]]*2 and [m.monitors[0].port for m in many] == [port, port+1]
        assert 'rank="9"' in page(many[1].monitors[0]) and sorted(p.name for p in (tmp_path/"prometheus-targets").iterdir()) == ["run-8.json", "run-9.json"]
        free = [open_monitors("prometheus:0+", tmp_path/"free", rank=r, local_rank=r) for r in (0, 1)]
        assert len({m.monitors[-1].port for m in free} | {port, port+1}) == 4 and min(m.monitors[-1].port for m in free) > 1023
        for m in free: m.close()
    finally:
        for m in many: m.close()


@pytest.mark.parametrize(("spec", "says"), [("tensorbord", "no monitor tensorbord: there are jsonl, tensorboard, wandb, prometheus"), ("prometheus", "names no port"), ("prometheus:x", "prometheus:0.0.0.0:9400"), ("prometheus:99999", "names no port"),
                                            ("prometheus:203.0.113.1:9400", "can't listen on port 9400 of 203.0.113.1")])
def test_a_mistake_is_told_at_the_start(tmp_path, spec, says):
    pytest.importorskip("prometheus_client")
    with pytest.raises(UserError, match=re.escape(says)): open_monitors(spec, tmp_path)


def test_what_was_open_is_closed_when_the_next_fails(tmp_path, monkeypatch):
    pytest.importorskip("prometheus_client")
    made = []
    monkeypatch.setattr(monitoring, "WandB", lambda *a, **k: (_ for _ in ()).throw(UserError("no")))
    monkeypatch.setattr(monitoring, "PrometheusExporter", lambda *a, real=PrometheusExporter, **k: made.append(real(*a, **k)) or made[-1])
    with pytest.raises(UserError, match="^no$"): open_monitors("prometheus:0,wandb", tmp_path/"run")
    assert len(made) == 1 and not made[0]._thread.is_alive() and [*(tmp_path/"prometheus-targets").iterdir()] == []


@pytest.mark.parametrize(("package", "make"), [("prometheus_client", lambda f: PrometheusExporter()), ("wandb", lambda f: WandB(f)), ("torch.utils.tensorboard", lambda f: TensorBoard(f))])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'llm_scratch\[monitor\]'"): make(tmp_path)


# --- the picture ---------------------------------------------------------------------------------------------------

def test_a_picture_of_any_log():
    pytest.importorskip("matplotlib")
    noise = random.Random(0)
    rows = [dict(VALUES, step=n, loss=3+noise.gauss(0, .05) + (4 if n == 777 else 0)) for n in range(1, 5001)]
    loss, *_, speed = run_picture(rows).axes
    curve = dict(zip(*loss.lines[0].get_data(), strict=True))
    assert 500 <= len(curve) <= 510 and curve[777] > 6 and [line.get_xdata()[0] for line in loss.lines[1:]] == [777]
    assert median(speed.lines[0].get_ydata()) == pytest.approx(512/.3)
    for few in ([], [dict(step=1)], [dict(step=1, loss=math.nan, n_tokens=5, seconds=0)]): assert len(run_picture(few).axes) == 4


def test_a_run_is_watched(tmp_path):
    pytest.importorskip("ipywidgets")
    path = tmp_path/"log.jsonl"
    box = watch_run(path, every=.05)
    picture, said, stop = box.children
    assert picture.value.startswith("<svg") and said.value.startswith("update 0, loss nan")
    before, log = threading.active_count(), JsonLines(path)
    for n in range(1, 4): log.log(n, VALUES)
    assert until(lambda: said.value.startswith("update 3, loss 2.5"), 30)
    shown = picture.value
    with open(path, "ab") as f: f.write(b"damaged\n")  # the watcher lives on
    time.sleep(.3)
    assert picture.value == shown and threading.active_count() == before
    stop.click()
    assert until(lambda: threading.active_count() < before, 30)

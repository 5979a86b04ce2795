"Runs killed at random moments: the recorded fifty, six live ones, and a resume that forgets something is found out."
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT/"benchmarks"/"kills.py"


def _run(*args):
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, encoding="utf-8", timeout=300, check=False, cwd=ROOT/"benchmarks")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("kills")/"kills.json"
    return out, _run(SCRIPT, "--tiny", "--out", out)


def test_killed_in_three_ways_and_resumed_to_the_same_bits(tiny):
    record = json.loads(tiny[0].read_text(encoding="utf-8"))
    assert [(r["way"], r["trial"]) for r in record["kills"]] == [(way, i) for way in ("file", "background", "parts") for i in range(2)]
    assert all(r["equal"] for r in record["kills"]), record["kills"]
    assert len(set(record["digest"].values())) == 1
    assert all(0 <= r["resumed"] <= record["n_steps"] and r["resumed"]%record["save_every"] == 0 for r in record["kills"])


def test_it_goes_on_where_it_was_stopped(tiny):
    out, _ = tiny
    record = json.loads(out.read_text(encoding="utf-8"))
    record["kills"][0]["aim"] = "elsewhere"  # a mark, to see that it is not made anew
    out.write_text(json.dumps(record | dict(kills=record["kills"][:5])))
    said = _run(SCRIPT, "--tiny", "--out", out)
    again = json.loads(out.read_text(encoding="utf-8"))
    assert said.count("'trial'") == 1 and len(again["kills"]) == 6 and again["kills"][0]["aim"] == "elsewhere" and again["kills"][5]["equal"]


BROKEN = """
import kills, torch
from pathlib import Path
whole = kills.undisturbed("file", 8)
real = kills.load_checkpoint
def forgets_rng(state, path, about):
    real(state, path, about); torch.manual_seed(5); return state
def forgets_step(state, path, about):
    real(state, path, about); state.step -= 2; return state
def forgets_velocity(state, path, about):
    real(state, path, about); state.optimizers[0].state.clear(); return state
for kills.load_checkpoint in (real, forgets_rng, forgets_step, forgets_velocity):
    kills.random.Random = lambda seed: type("", (), dict(randrange=lambda self, *a: 6, uniform=lambda self, a, b: 0.))()
    print(kills.trial(1, "file", 8, whole)["equal"])
"""


def test_a_resume_that_forgets_something_is_found_out():
    "Killed at the sixth update, with a checkpoint of the fourth there."
    assert _run("-c", BROKEN).split() == ["True", "False", "False", "False"]


def test_the_record_is_fifty_of_fifty():
    record = json.loads((ROOT/"nbs"/"kills.json").read_text(encoding="utf-8"))
    kills = record["kills"]
    assert len(kills) == len({(r["way"], r["trial"]) for r in kills}) == 50 and all(r["equal"] for r in kills) and len(set(record["digest"].values())) == 1
    assert sum(bool(r["left"]) for r in kills) >= 15, "kills within a save are the ones that matter"
    assert {".saving", ".new", ".gone"} <= {name for r in kills for name in r["left"]}
    assert len({r["made"] for r in kills}) > 15 and {r["aim"] for r in kills} == {"anywhere", "a save"}
    for r in kills: assert 0 <= r["made"]-r["resumed"] <= record["save_every"]*(2 if r["way"] == "background" else 1)+record["save_every"]

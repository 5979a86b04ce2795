"The record of clipped runs says what chapter 06 says, and the script that made it works."
import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZERS, CLIPS = ("SGD 0.2", "SGD 0.5", "AdamW", "Muon + AdamW"), ("none", "length 1", "value 1", "value 0.01", "value 1, length 1")


@pytest.fixture(scope="module")
def record(): return json.loads((ROOT/"nbs"/"clipping.json").read_text(encoding="utf-8"))


def test_every_bound_is_tried_on_the_same_runs(record):
    assert sorted((r["kind"], r["optimizer"], r["clip"], r["seed"]) for r in record["runs"]) == sorted(product(("clean", "wild"), OPTIMIZERS, CLIPS, range(5)))
    assert all(isinstance(r[k], (int, float)) and math.isfinite(r[k]) for r in record["runs"] for k in ("loss", "norm", "largest", "cosine", "clipped"))


@pytest.mark.parametrize("kind, optimizer", list(product(("clean", "wild"), OPTIMIZERS[2:])))
def test_length_helps_and_value_at_1_does_nothing(record, kind, optimizer):
    of = lambda clip: [r["loss"] for r in record["runs"] if (r["kind"], r["optimizer"], r["clip"]) == (kind, optimizer, clip)]
    def interval(clip):
        apart = [a-b for a, b in zip(of(clip), of("none"), strict=True)]
        return mean(apart), 2.776*stdev(apart)/5**.5
    length, value = interval("length 1"), interval("value 1")
    assert sum(length) < 0 and abs(value[0]) <= value[1]+1e-4


def test_only_a_bound_by_value_turns_the_gradient(record):
    for r in record["runs"]:
        if r["clip"] == "length 1": assert r["lowest_cosine"] > .999 and r["cosine"] > .999
        if r["clip"] == "value 0.01" and r["loss"] < 5: assert .7 < r["cosine"] < .95 and r["clipped"] > .9
        if r["clip"] == "none": assert r["clipped"] == 0


def test_the_script_runs_and_shows_its_table(tmp_path):
    out = tmp_path/"clipping.json"
    done = subprocess.run([sys.executable, ROOT/"benchmarks"/"clipping.py", "--tiny", "--out", out], capture_output=True, text=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads(out.read_text(encoding="utf-8"))
    assert len(made["runs"]) == 2*2*2*5 and "nan" not in out.read_text(encoding="utf-8").lower()
    assert done.stdout.count("\n| clean |") == done.stdout.count("\n| wild |") == 2
    of = lambda clip: next(r for r in made["runs"] if (r["clip"], r["optimizer"], r["kind"]) == (clip, "AdamW", "clean"))
    assert of("value 0.01")["cosine"] < .99 < of("length 1")["cosine"] and of("none")["kept"] == 1 > of("length 1")["kept"] and of("none")["loss"] != of("length 1")["loss"]

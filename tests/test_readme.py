"What the readme and the other documents say is there: commands, targets, files, figures."
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_scratch.pipeline import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "EXPERIMENTS.md", "CHANGELOG.md", "ATTRIBUTION.md"]
TEXTS = {name: (ROOT/name).read_text(encoding="utf-8") for name in DOCUMENTS}


def targets()->set[str]: return set(re.findall(r"^([a-z]+):", (ROOT/"Makefile").read_text(encoding="utf-8"), re.M))


def test_every_make_command_is_a_target():
    named = {m for text in TEXTS.values() for m in re.findall(r"(?:^|`)make ([a-z]+)", text, re.M)}
    assert {"run", "test", "lab", "docs", "bench"} <= named <= targets(), named - targets()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("target", ["run", "test", "lab", "docs", "bench"])
def test_every_target_can_be_made_and_calls_what_exists(target, tmp_path):
    done = subprocess.run(["make", "-n", target, f"VENV={tmp_path}/venv"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for script in re.findall(r"(?<![\w/])((?:docs|benchmarks)/[\w.]+\.(?:py|sh))", done.stdout): assert (ROOT/script).is_file(), script
    assert "constraints.txt" in done.stdout


def test_every_verb_of_the_documents_exists():
    verbs = {m for text in TEXTS.values() for m in re.findall(r"llm-scratch ([a-z-]+)", text)} - {"is", "and"}
    assert len(verbs) >= 5
    for verb in verbs:
        done = CliRunner().invoke(app, [verb, "--help"])
        assert done.exit_code == 0, verb


def test_every_link_to_a_file_leads_somewhere():
    broken = [(name, to) for name, text in TEXTS.items() for to in re.findall(r"\]\(([^)#:]+)\)", text) if not (ROOT/to).exists()]
    assert broken == []


def test_every_python_block_runs(tmp_path):
    for name, text in TEXTS.items():
        for block in re.findall(r"```python\n(.*?)```", text, re.S): compile(block, name, "exec")


def test_the_readme_maps_every_chapter():
    chapters = {p.name for p in (ROOT/"nbs").glob("[0-9]*.ipynb")}
    assert {Path(to).name for to in re.findall(r"\]\((nbs/[0-9][^)]+)\)", TEXTS["README.md"])} == chapters


def test_what_ci_runs_is_the_readmes_test_command():
    assert "make test" in (ROOT/".ci"/"run").read_text() and "make test" in TEXTS["README.md"]


def test_constraints_fit_the_floors():
    from configparser import ConfigParser
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini", encoding="utf-8")
    pins = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for line in (ROOT/"constraints.txt").read_text().splitlines() if line and line[0] != "#" for r in [Requirement(line)]}
    wanted = [Requirement(x) for key in ("requirements", "dev_requirements", "docs_requirements", "interchange_requirements", "distributed_requirements", "monitor_requirements", "megatron_requirements") for x in ini["DEFAULT"][key].split()]
    assert [str(r) for r in wanted if canonicalize_name(r.name) not in {*pins, "pip"}] == []
    assert [str(r) for r in wanted if r.name != "pip" and not r.specifier.contains(pins[canonicalize_name(r.name)])] == []


def test_the_figures_of_the_readme_are_those_of_the_experiments():
    "The three seeds of the preset stand in nbs/results.json, as the runs wrote them; the documents quote their means."
    runs = json.loads((ROOT/"nbs"/"results.json").read_text(encoding="utf-8"))["cpu"]
    assert len(runs) >= 3 and len({r["seed"] for r in runs}) == len(runs)
    for figure in ("bits per byte, recipes", "bits per byte, 5-gram of bytes, recipes", "bits per byte, 5-gram of tokens, recipes", "samples in the form of a recipe"):
        mean = sum(next(row["mean"] for row in r["results"] if row["name"] == figure) for r in runs)/len(runs)
        for name in ("README.md", "EXPERIMENTS.md"): assert f"{mean:.3f}" in TEXTS[name], f"{name} does not say {mean:.3f}, the mean of {figure}"

"The modules are what the notebooks export, the notebooks are clean and small, and the two files of metadata agree."
import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

if sys.version_info >= (3, 11): import tomllib
else: tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/"nbs").glob("[!_.]*.ipynb"))
MODULES = sorted(p for p in (ROOT/"llm_scratch").glob("*.py") if p.name not in ("__init__.py", "__main__.py"))


def nbdev(command:str, folder:Path)->None:
    "Run one of nbdev's commands in `folder`."
    tool = Path(sys.executable).with_name(command)
    done = subprocess.run([tool], cwd=folder, env=os.environ | dict(PYTHONPATH=str(folder)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A copy of the project, exported anew and cleaned. It has no git, as an unpacked archive has none."
    copy = tmp_path_factory.mktemp("fresh")/"llm_scratch"
    copy.mkdir()
    for name in ("pyproject.toml", "settings.ini", "setup.py", "README.md"): shutil.copy2(ROOT/name, copy)
    for folder in ("nbs", "llm_scratch"): shutil.copytree(ROOT/folder, copy/folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for path in MODULES: (copy/"llm_scratch"/path.name).unlink()
    for command in ("nbdev-export", "nbdev-clean"): nbdev(command, copy)
    return copy


def test_the_modules_are_what_the_notebooks_export(fresh):
    assert sorted(p.name for p in (fresh/"llm_scratch").glob("*.py")) == sorted(p.name for p in (ROOT/"llm_scratch").glob("*.py"))
    stale = [p.name for p in MODULES if not filecmp.cmp(p, fresh/"llm_scratch"/p.name, shallow=False)]
    assert stale == [], "edit the notebook, never the module, and run nbdev-export"


def test_the_notebooks_are_clean(fresh):
    dirty = [p.name for p in NOTEBOOKS if not filecmp.cmp(p, fresh/"nbs"/p.name, shallow=False)]
    assert dirty == [], "run nbdev-clean"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_hold_nothing_of_this_machine(path):
    "No progress bars, addresses, paths of somebody's machine, tracebacks or dates, which would differ in the next run."
    passing = re.compile(r"\d+%\|| at 0x[0-9a-f]{6,}|\b(?:it|examples|ba|B)/s\b|(?<![\w.])/(?:tmp|home|root|Users|work)/|Traceback \(most recent|<dc:date>")
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for out in cell.get("outputs", []):
            texts = [out.get("text", []), out.get("traceback", []), *(v for k, v in out.get("data", {}).items() if k in ("text/plain", "image/svg+xml", "text/html"))]
            found += [(cell["id"], m[0]) for t in texts for m in passing.finditer("".join(t))]
    assert found == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_stays_small_enough_to_read_its_diff(path): assert path.stat().st_size < 400_000


# --- metadata ------------------------------------------------------------------------------------------------------

@pytest.fixture
def ini():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return config["DEFAULT"]


@pytest.fixture
def toml(): return tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))


def test_settings_and_pyproject_agree(ini, toml):
    project, tool = toml["project"], toml["tool"]["nbdev"]
    assert (project["name"], project["description"], project["requires-python"]) == (ini["lib_name"], ini["description"], f">={ini['min_python']}")
    assert tool["title"] == ini["lib_name"]
    assert (tool.get("lib_path", project["name"]), tool.get("nbs_path", "nbs"), tool.get("doc_path", "_docs")) == (ini["lib_path"], ini["nbs_path"], ini["doc_path"])
    assert project["dynamic"] and not {"dependencies", "optional-dependencies", "scripts", "authors", "version"} & project.keys()  # these come from settings.ini


def test_setup_reads_settings(ini, tmp_path):
    "Change settings.ini in a copy: what setup.py passes on changes with it."
    given = tmp_path/"given.json"
    (tmp_path/"llm_scratch").mkdir()
    (tmp_path/"llm_scratch"/"__init__.py").write_text('__version__ = "9.8.7"\n', encoding="utf-8")
    shutil.copy2(ROOT/"setup.py", tmp_path)
    text = (ROOT/"settings.ini").read_text(encoding="utf-8").replace("numpy>=2.0", "numpy>=2.7").replace(f"author = {ini['author']}", "author = Somebody Else")
    (tmp_path/"settings.ini").write_text(text, encoding="utf-8")
    code = f"""
import json, runpy, setuptools
setuptools.setup = lambda **k: json.dump(k, open({str(given)!r}, "w"))
runpy.run_path({str(tmp_path/"setup.py")!r})
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    given = json.loads(given.read_text())
    assert (given["version"], given["author"]) == ("9.8.7", "Somebody Else")
    assert "numpy>=2.7" in given["install_requires"] and len(given["install_requires"]) == len(ini["requirements"].split())
    assert {"dev", "docs"} <= given["extras_require"].keys() and given["extras_require"]["dev"] == ini["dev_requirements"].split()
    assert given["entry_points"]["console_scripts"] == ["llm-scratch=llm_scratch.__main__:main"]
    assert given["packages"] == ["llm_scratch"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_stub_does_not_stop_run_all(path):
    "A cell that nbdev skips is run by a reader who runs all; a puzzle's stub defines names and checks nothing, or the cells behind it never run."
    stubs = [("".join(c["source"]), c["id"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    for source, name in stubs:
        if not re.search(r"^#\| eval: false", source, re.M) or re.search(r"^#\| slow", source, re.M): continue
        body = ast.parse(source).body # `if`: in a notebook, too, the name of the module is `__main__`
        does = [n for n in body if isinstance(n, ast.If) or isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
        assert does == [], f"cell {name} of {path.name}"

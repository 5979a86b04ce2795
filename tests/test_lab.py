"JupyterLab opens a chapter, runs it from top to bottom and moves its widgets, in a browser that may ask this machine only."
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from test_chapters import kill_all

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds for one notebook, and for the server to start
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here: apt-get install chromium, or set CHROMIUM"),
              pytest.mark.skipif(not shutil.which("node"), reason="a browser is driven by Node.js, which is not installed")]


def run(command:list, limit:float=LIMIT, **options)->subprocess.CompletedProcess:
    "Run to the end, or kill it and all that it has started."
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", **options) as process:
        try: out, err = process.communicate(timeout=limit)
        except BaseException:
            kill_all(psutil.Process(process.pid))
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def driver():
    "docs/node_modules with what drives the browser."
    done = run([sys.executable, "-c", "import build; build.node_modules()"], cwd=ROOT/"docs")
    if not (ROOT/"docs"/"node_modules"/"playwright-core").is_dir(): pytest.skip(f"the browser's driver comes from npm: {(done.stderr.splitlines() or ['npm ci left it out'])[-1]}")


def server_env(home:Path)->dict[str, str]:
    "As docs/execute.py gives it to kernels (nbdev's exports do nothing), with folders of its own instead of the user's."
    done = run([sys.executable, "-c", "import execute, json; print(json.dumps(execute.kernel_env()))"], cwd=ROOT/"docs")
    folders = {name: str(home/name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    return json.loads(done.stdout) | folders | dict(JUPYTER_TOKEN=secrets.token_hex(16))


def free_port()->int:
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]


def listens(port:int)->bool:
    with socket.socket() as s: return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def lab(tmp_path_factory, driver):
    "A server on 127.0.0.1 that sees one folder; `lab(name, ...)` gives what tests/lab.mjs reports of a notebook in it, `lab.folder`."
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("books")
    env, port = server_env(home), free_port()
    options = {"ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.port_retries": 0, "ServerApp.root_dir": folder, "ServerApp.allow_root": True, "LabApp.expose_app_in_browser": True,
               "LabApp.news_url": None, "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate", "LabApp.extension_manager": "readonly"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", *(f"--{k}={v}" for k, v in options.items())]
    with open(home/"log", "w", encoding="utf-8") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True) as process:
        try:
            said = lambda: (home/"log").read_text(encoding="utf-8")[-2000:]
            end = time.monotonic() + LIMIT
            while not listens(port):
                assert process.poll() is None and time.monotonic() < end, f"no server: {said()}"
                time.sleep(.1)

            def read(name:str, *options:str)->dict:
                done = run(["node", ROOT/"tests"/"lab.mjs", f"http://127.0.0.1:{port}/lab/tree/{name}?token={env['JUPYTER_TOKEN']}&reset", *options], env=env | dict(CHROMIUM=CHROMIUM))
                assert done.stdout, f"{done.stderr}\n{said()}"
                return json.loads(done.stdout)
            read.folder = folder
            yield read
        finally: kill_all(psutil.Process(process.pid))


def failures(cells:list[dict])->list[str]:
    "Errors that cells show, and cells that were never run."
    wrong = [f"{c['id']}: {out['ename']}: {out['evalue']}" for c in cells for out in c["outputs"] if out["output_type"] == "error"]
    return wrong + [f"{c['id']}: not run" for c in cells if c["execution_count"] is None]


def write(path:Path, *sources:str)->list[str]: # ids of the cells
    nb = new_notebook(cells=[new_code_cell(s) for s in sources], metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")))
    nbformat.write(nb, path)
    return [c.id for c in nb.cells]


def test_a_chapter_runs_from_top_to_bottom(lab):
    name = "00_core.ipynb"
    shutil.copy(ROOT/"nbs"/name, lab.folder)
    report = lab(name)
    assert report["problems"] == []
    expected = [c.id for c in nbformat.read(ROOT/"nbs"/name, as_version=4).cells if c.cell_type == "code"]
    assert [c["id"] for c in report["cells"]] == expected and failures(report["cells"]) == []
    assert any(out.get("text") for c in report["cells"] for out in c["outputs"])
    assert [p.name for p in lab.folder.iterdir() if p.suffix != ".ipynb" and not p.name.startswith(".")] == []  # the last cell exported nothing


SLIDER = """import ipywidgets as widgets
slider,label = widgets.IntSlider(value=3, max=9),widgets.Label("twice 3 is 6")
slider.observe(lambda change: setattr(label, "value", f"twice {change.new} is {2*change.new}"), "value")
widgets.VBox([slider, label])"""


def test_a_label_follows_a_slider(lab):
    write(lab.folder/"slider.ipynb", SLIDER)
    report = lab("slider.ipynb", "--presses", "3", "--until", "twice 6 is 12")
    assert report["problems"] == [] and failures(report["cells"]) == []
    assert report["saw"] == [False, True]


# Chapter 02e's explorer, on a model that is small enough to be made here.
EXPLORER = """import torch
from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.inside import explore_attention
torch.manual_seed(0)
model = Decoder(ModelConfig(vocab_size=26, context_len=16, n_layers=2, n_heads=2, n_kv_heads=2, d_model=16, d_ff=16, d_head=8))
explore_attention(model, lambda text: [ord(c)-97 for c in text], "abcdefghijklmnopqrstuvwxyz", "apple")"""


def test_the_attention_explorer_follows_its_slider(lab):
    write(lab.folder/"explorer.ipynb", EXPLORER)
    report = lab("explorer.ipynb", "--presses", "1", "--until", "layer 0, head 1")
    assert report["problems"] == [] and failures(report["cells"]) == []
    assert report["saw"] == [False, True]


# Chapter 04c's playground; the first merge of "abab" makes two tokens of four bytes.
PLAYGROUND = """from llm_scratch.tokenization import Tokenizer
from llm_scratch.vocabulary import explore_tokens
explore_tokens(Tokenizer([(97, 98), (256, 256)]), "abab <b>x</b> 🍮")"""


def test_the_tokenizer_playground_plays_the_merges(lab):
    write(lab.folder/"playground.ipynb", PLAYGROUND)
    report = lab("playground.ipynb", "--presses", "2", "--until", "merge 2 of 2")
    assert report["problems"] == [] and failures(report["cells"]) == []
    assert report["saw"] == [False, True]


# Chapter 06g's view, around a training that would take a minute.
LOOP = """import time
from llm_scratch.pretraining import Step
from llm_scratch.watching import NotebookView
def updates():
    try:
        for n in range(1, 601):
            time.sleep(.1)
            if n == 5: print("well into it")
            yield Step(n, 2., 1., .5, 100)
    except GeneratorExit: print("saved after", n, "of 600")
view = NotebookView(600)
display(view)
for step in view.watch(updates()): pass
print("left by", view.stopped_by, "at", step.n, "says", view.button.description)"""


@pytest.mark.parametrize("how", [("--click", "stop after this update"), ("--interrupt",)], ids=["button", "interrupt"])
def test_a_running_loop_is_stopped_between_two_updates(lab, how):
    "The button needs a kernel with subshells; the interrupt needs nothing."
    write(lab.folder/"loop.ipynb", LOOP)
    report = lab("loop.ipynb", *how, "--after", "well into it", "--until", "saved after")
    assert report["problems"] == [] and failures(report["cells"]) == []
    assert report["saw"] == [True, True], "it ran before, and then it was saved"
    said = "".join(out.get("text", "") for c in report["cells"] for out in c["outputs"])
    assert re.search(r"saved after (\d+) of 600\nleft by 1 at \1 says stop", said) and not "saved after 600" in said, said


def test_what_is_wrong_is_seen(lab):
    "An address elsewhere, a cell that fails, one after it that never runs."
    _, wrong, after = write(lab.folder/"wrong.ipynb", "from IPython.display import HTML\nHTML('<img src=\"https://example.org/x.png\">')", "1/0", "2")
    report = lab("wrong.ipynb")
    assert set(report["problems"]) == {"asks for https://example.org/x.png"}
    assert failures(report["cells"]) == [f"{wrong}: ZeroDivisionError: division by zero", f"{after}: not run"]

"Every chapter runs from top to bottom in a kernel of its own, within a time limit, and shows what is stored in it, numbers aside."
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"docs"))
import execute  # noqa: E402

NOTEBOOKS = sorted((ROOT/"nbs").glob("[!_.]*.ipynb"))
LIMIT = float(os.environ.get("CHAPTER_LIMIT", 300))  # seconds for one chapter, some of them on a loaded machine


def kill_all(root:psutil.Process)->None:
    "Kill a process and all that it has started: a kernel leads a process group of its own, so the group is not enough, and a loop in C hears no smaller signal."
    family = [root]
    try: family += root.children(recursive=True)
    except psutil.NoSuchProcess: pass
    for p in family:
        try: p.kill()
        except psutil.NoSuchProcess: pass
    psutil.wait_procs(family[1:], timeout=10)


def run(path:Path, limit:float, *options:str)->subprocess.CompletedProcess:
    "Run docs/execute.py on `path`; nothing that it started outlives the limit."
    command = [sys.executable, ROOT/"docs"/"execute.py", path, "--timeout", str(limit), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", start_new_session=True) as process:
        try: out, _ = process.communicate(timeout=limit)
        except BaseException:  # time is up, or the reader pressed Ctrl-C
            kill_all(psutil.Process(process.pid))
            raise
        return subprocess.CompletedProcess(command, process.returncode, out)


@pytest.fixture(scope="session")
def nursery():
    "Kernels are forked from a process that has imported what all chapters import: four seconds for each of them."
    forks = execute.nursery()
    yield forks
    if forks: forks.close()


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_chapter(path, nursery):
    "In this process, which has imported the runner once: a process for each chapter costs two seconds of it."
    wrong = execute.run(path, save_outputs=False, check=True, timeout=LIMIT, flags="", nursery=nursery)
    assert not wrong, "\n".join(wrong)[-6000:]


# --- the runner itself ---------------------------------------------------------------------------------------------

def notebook(path:Path, *cells)->Path:
    nb = new_notebook(cells=list(cells), metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    nbformat.write(nb, path)
    return path


def shown(text:str)->list: return [new_output("stream", name="stdout", text=text)]


def test_a_loop_in_c_is_killed_with_its_kernel(tmp_path):
    mark = tmp_path/"kernel.pid"
    path = notebook(tmp_path/"loop.ipynb", new_code_cell(f"import os, itertools\nopen({str(mark)!r}, 'w').write(str(os.getpid()))"), new_code_cell("sum(itertools.repeat(0))"))
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired): run(path, 15)
    assert time.monotonic() - start < 40
    assert mark.exists(), "the kernel did not start within the limit"
    pid = int(mark.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_check_sees_another_text_and_not_another_number(tmp_path):
    same = notebook(tmp_path/"same.ipynb", new_code_cell("print('loss', 1.25)", outputs=shown("loss 1.31\n")), new_code_cell("#| eval: false\n1/0", outputs=shown("kept\n")))
    assert run(same, 100, "--check").returncode == 0
    other = notebook(tmp_path/"other.ipynb", new_code_cell("print('loss', 1.25)", id="thiscell", outputs=shown("gain 1.31\n")))
    done = run(other, 100, "--check")
    assert done.returncode == 1 and "thiscell" in done.stdout
    wrong = notebook(tmp_path/"wrong.ipynb", new_code_cell("1/0"))
    done = run(wrong, 100)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stdout


def test_a_forked_kernel_shows_figures(tmp_path, nursery):
    "Matplotlib is imported before the fork: whatever hooks its figures into cells has to come after."
    drawn = new_output("display_data", data={"image/svg+xml":"", "text/plain":"<Figure size 640x480 with 1 Axes>"})
    path = notebook(tmp_path/"figure.ipynb", new_code_cell("import matplotlib.pyplot as plt\nplt.subplots();", outputs=[drawn]))
    assert not execute.run(path, save_outputs=False, check=True, timeout=LIMIT, flags="", nursery=nursery)


def test_a_progress_bar_that_has_vanished_is_no_output(tmp_path):
    "A first run downloads and shows a bar; a second one does not."
    bar = "import ipywidgets\ndisplay(ipywidgets.Output())\nprint('done')"
    done = run(notebook(tmp_path/"bar.ipynb", new_code_cell(bar, outputs=shown("done\n"))), 100, "--check")
    assert done.returncode == 0, done.stdout

"""Run chapters from top to bottom, each in a kernel of its own, as a reader would in JupyterLab.

    python docs/execute.py                               run every chapter, write nothing
    python docs/execute.py nbs/02_architecture.ipynb --save     and store what the cells show
    python docs/execute.py --check                       and compare it with what is stored, numbers aside

    python docs/execute.py nbs/02d_llamacpp.ipynb --flags slow --save   with the slow lessons; those download

Cells that nbdev's tests skip (`#| eval: false`, or a flag of `tst_flags` in pyproject.toml) are skipped here and keep their stored outputs.
"""
import argparse
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.clean import clean_nb, read_nb, write_nb
from nbdev.config import get_config
from nbdev.test import nb_test_cells
from nursery import Nursery, manager_of

ROOT = Path(__file__).resolve().parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
ANSI = re.compile(r"\x1b\[[0-9;]*m") # the colours of a traceback

# Same outputs, byte for byte, in every run: widget ids come from a seeded generator, svg ids from a fixed salt, and no svg bears a date.
SETUP = """import random, uuid
import matplotlib
matplotlib.use("module://matplotlib_inline.backend_inline") # before it is imported: it hooks itself into a kernel whose backend it is, and a forked kernel has not read MPLBACKEND
import matplotlib_inline.backend_inline as inline
uuid.uuid4 = lambda bits=random.Random({name!r}).getrandbits, UUID=uuid.UUID: UUID(int=bits(128), version=4)
matplotlib.rcParams["svg.hashsalt"] = "llm_scratch"
inline.set_matplotlib_formats("svg", metadata=dict(Date=None, Creator=None))
del random, uuid, matplotlib, inline
"""

def kernel_env()->dict[str, str]:
    "The environment of a kernel: one thread, no model hub, the library of this checkout, and nbdev's exports do nothing."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_DISABLE_PROGRESS_BARS="1", IN_TEST="1", PYTHONPATH=path)

def prepared(path:Path, flags:str="")->nbformat.NotebookNode:
    "The notebook at `path` with the cells to skip tagged and the setup in front; cells with one of `flags` are not skipped."
    nb = nbformat.read(path, as_version=4)
    runs = {c["id"] for c in nb_test_cells(path, [f for f in get_config(path=ROOT).tst_flags.split() if f not in flags.split()])}
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        if cell.id in runs: cell.outputs = []
        else: cell.metadata["tags"] = ["skip-execution"]
    nb.metadata.pop("widgets", None)
    nb.cells.insert(0, nbformat.v4.new_code_cell(SETUP.format(name=path.stem)))
    return nb

def is_gone(out:nbformat.NotebookNode)->bool:
    "Is it what a progress bar leaves behind when it has vanished, as in the first run, which downloads?"
    return out.get("data", {}).get("text/plain") in ("Output()", "")

def execute(
    path:Path, # the chapter
    timeout:float=600, # most seconds for one cell
    flags:str="", # kinds of cells to run that are skipped otherwise, such as `slow`
    nursery:Nursery|None=None, # forks the kernel; None: a new Python
)->nbformat.NotebookNode: # the chapter with fresh outputs and widget state
    "Run the chapter at `path` in a kernel of its own."
    nb = prepared(path, flags)
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", coalesce_streams=True, extra_arguments=["--log-level=ERROR"],
                            resources=dict(metadata=dict(path=str(path.parent))), **(dict(kernel_manager_class=manager_of(nursery)) if nursery else {}))
    client.execute(env=kernel_env())
    del nb.cells[0]
    for cell in nb.cells:
        if "outputs" in cell: cell.outputs = [o for o in cell.outputs if not is_gone(o)]
    if not any(WIDGET in out.get("data", {}) for cell in nb.cells for out in cell.get("outputs", [])): nb.metadata.pop("widgets", None) # the state of widgets that no cell shows
    return nb

def save(nb:nbformat.NotebookNode, path:Path)->None:
    "Store `nb` at `path`, cleaned as `nbdev-clean` does; the file changes in one piece."
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        nbformat.write(nb, tmp)
        cleaned = read_nb(tmp)
        clean_nb(cleaned)
        write_nb(cleaned, tmp)
        os.replace(tmp, path)
    finally: tmp.unlink(missing_ok=True)

# --- compare ---------------------------------------------------------------------------------------------------

def masked(text:str)->str:
    "`text` with every number as `#` and every run of blanks as one: what should not depend on the machine."
    text = re.sub(r"(?<![A-Za-z_])[-+]?(\d[\d,]*\.?\d*|\.\d+)(e[-+]?\d+)?|\b(nan|inf)\b", "#", text)
    return re.sub(r"[\s#%]+", " ", re.sub(r"(?<=#)[#\s,]+", " ", text)).strip()

def shapes(cell:nbformat.NotebookNode)->list[tuple[str, str]]:
    "What a code cell shows, as kinds and masked texts."
    shown = []
    for out in cell.get("outputs", []):
        if out.output_type == "stream": shown.append((out.name, masked(out.text)))
        elif "data" in out: shown.append(("+".join(sorted(out.data)), masked(out.data.get("text/plain", ""))))
    return shown

def differences(fresh:nbformat.NotebookNode, stored:nbformat.NotebookNode)->list[str]:
    "One line for each cell that now shows something else than what is stored."
    fresh = deepcopy(fresh)
    clean_nb(fresh)
    pairs = zip((c for c in fresh.cells if c.cell_type == "code"), (c for c in stored.cells if c.cell_type == "code"), strict=True)
    return [f"cell {new.id}: stored {shapes(old)}, now {shapes(new)}" for new,old in pairs if shapes(new) != shapes(old)]

# --- command line ----------------------------------------------------------------------------------------------

def nursery()->Nursery|None:
    "What forks the kernels of several chapters, where processes can be forked; `close` it."
    return Nursery(kernel_env()) if hasattr(os, "fork") else None

def run(path:Path, save_outputs:bool, check:bool, timeout:float, flags:str, nursery:Nursery|None=None)->list[str]:
    "Run one chapter; the lines that say what is wrong with it."
    try: nb = execute(path, timeout, flags, nursery)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e: return [f"{path.name}: {ANSI.sub('', str(e)).strip()}"]
    wrong = [f"{path.name}: {line}" for line in differences(nb, nbformat.read(path, as_version=4))] if check else []
    if save_outputs: save(nb, path)
    return wrong

def main()->int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NB", help="chapters; all of nbs/ when none is given")
    parser.add_argument("--save", action="store_true", help="store the outputs in the notebooks")
    parser.add_argument("--check", action="store_true", help="exit 1 where text outputs differ from the stored ones, numbers aside")
    parser.add_argument("--flags", default="", metavar="KINDS", help="run cells of these kinds as well, such as slow")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="chapters at a time")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="most seconds for one cell")
    args = parser.parse_args()
    paths = [p.resolve() for p in args.notebooks] or sorted((ROOT/"nbs").glob("[!_]*.ipynb"))
    if missing := [str(p) for p in paths if not p.is_file()]: parser.error(f"no such notebook: {', '.join(missing)}")
    failed,forks = 0,nursery() if len(paths) > 1 else None
    with ThreadPoolExecutor(args.jobs) as pool, closing(forks) if forks else nullcontext():
        for path,wrong in zip(paths, pool.map(partial(run, save_outputs=args.save, check=args.check, timeout=args.timeout, flags=args.flags, nursery=forks), paths)):
            print("\n".join(wrong) if wrong else f"{path.name}: ok", flush=True)
            failed += bool(wrong)
    return int(failed > 0)

if __name__ == "__main__": sys.exit(main())

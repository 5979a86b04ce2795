"The map of modules, held by reading them: who may import whom, names that stand once, and imports that cost little."
import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {p.stem: p for p in sorted((ROOT/"llm_scratch").glob("[!_]*.py"))}

# The row of each module: the modules of ours that it may import. When the code shows a better place for a thing, change its row here and say why.
MAY_IMPORT = {
    "core": set(),
    "objectives": {"core"},
    "costs": {"core"},
    "choosing": {"core", "objectives"},
    "architecture": {"core"},
    "families": {"core", "architecture"},
    "compiled": {"core", "architecture"},
    "generation": {"core", "architecture", "compiled"},  # compiled within a function: an accelerator that is a later chapter
    "lookahead": {"core", "architecture", "generation"},
    "interchange": {"core", "architecture", "families"},
    "llamacpp": {"core", "architecture", "families", "tokenization"},  # a GGUF holds a model and its vocabulary in one file
    "inside": {"core", "architecture"},
    "tasks": {"core", "architecture", "families"},
    "data": {"core"},
    "sources": {"core", "data"},
    "cleaning": {"core", "data", "sources"},
    "privacy": {"core", "data", "sources"},
    "balance": {"data"},
    "duplicates": {"core", "data", "sources"},
    "curation": {"core", "data", "sources", "cleaning", "duplicates"},
    "text": {"core"},
    "tokenization": {"core"},
    "wordpiece": {"core", "tokenization"},
    "fastbpe": {"core", "tokenization"},
    "vocabulary": {"core", "data", "tokenization"},  # data fetches the tokenizers of others
    "packing": set(),
    "infrastructure": {"core", "architecture", "data"},  # the sizes of a decoder; the doctor tells which sources are in the cache
    "planning": {"core", "architecture"},
    "distributed": {"architecture"},
    "checkpointing": {"core"},
    "engines": {"core", "architecture", "checkpointing", "pretraining"},  # pretraining within a function: the proof that engines are equal runs the book's own `train`
    "launching": {"core", "engines"},  # the names of the engines
    "monitoring": {"core"},
    "megatron": {"core", "architecture", "families", "interchange", "tokenization"},  # weights one way, tokens the other, and a model's folder home
    "backward": {"architecture", "infrastructure"},
    "pretraining": {"core", "checkpointing", "engines"},
    "epochs": {"architecture", "generation"},  # a model that continues its own training text
    "curriculum": set(),
    "rates": {"core", "architecture", "pretraining"},
    "stability": {"core", "checkpointing", "engines", "monitoring", "pretraining"},
    "watching": {"pretraining"},  # what an update says of itself
    "optimizers": {"pretraining"},
    "scaling": {"core", "architecture", "costs"},  # the law, of which chapter 01a has the published ones
    "evaluation": {"core"},
    "comparison": {"core", "evaluation"},
    "perplexity": {"architecture", "evaluation", "generation"},
    "metrics": {"core", "architecture", "epochs", "evaluation"},  # epochs: what a model recites
    "preference": {"core", "evaluation"},
    "harness": {"core", "evaluation", "generation"},
    "bridge": {"core", "data", "duplicates", "evaluation", "harness"},  # questions of others, and whether the training text has seen them
    "report": {"core", "architecture", "objectives", "evaluation", "comparison", "perplexity", "metrics", "harness"},  # objectives: whose promises are checked
    "finetuning": {"core", "checkpointing", "curriculum", "epochs", "evaluation", "packing", "pretraining"},
    "lora": {"core", "interchange"},  # what each family calls its matrices
    "qlora": {"core", "lora"},
    "prompting": {"core", "architecture", "lora"},  # lora: the hash of a base
    "footprint": {"core", "architecture", "planning", "lora", "qlora", "prompting"},
    "clauses": {"core", "comparison", "data", "duplicates", "evaluation"},
    "classification": {"core", "architecture", "curriculum", "evaluation", "finetuning", "generation", "tasks", "tokenization"},
    "assistant": {"core", "bridge", "data", "evaluation", "finetuning", "generation", "interchange", "packing", "pretraining", "tokenization"},  # a chapter that joins many: text, ids, model and training meet
    "alignment": {"core", "data", "engines", "evaluation", "finetuning", "preference", "pretraining"},
    "reinforcement": {"core", "engines", "evaluation", "finetuning", "generation", "pretraining"},
    "methods": {"core", "architecture", "classification", "clauses", "evaluation", "finetuning", "footprint", "lora", "pretraining", "prompting", "qlora", "report", "tokenization"},  # side by side is its point
    "quantization": {"core", "lora"},  # which layers are linear
    "safety": {"core", "assistant", "evaluation", "harness", "report"},
    "bias": {"core", "bridge", "comparison", "data", "evaluation", "harness", "report", "safety"},
    "fairness": {"core", "clauses", "comparison", "data", "evaluation", "report", "safety"},  # the classifier under audit, and the kinds of its licences
    "adversarial": {"core", "alignment", "architecture", "assistant", "comparison", "data", "evaluation", "finetuning", "pretraining", "report", "safety"},  # alignment: the wheels with questions and human labels; pretraining: a toy that is taught to refuse
    "guard": {"core", "adversarial", "alignment", "assistant", "bridge", "cleaning", "data", "evaluation", "objectives", "privacy", "report", "safety"},  # its parts: a word list, personal data, a classifier of prompts that earlier chapters read
    "injection": {"core", "assistant", "data", "evaluation", "guard", "report", "safety", "text"},
    "dialogues": {"core", "assistant", "data", "evaluation", "metrics", "report", "safety"},  # fillings come from the assistant's dialogues
    "memorisation": {"core", "comparison", "epochs", "evaluation", "metrics", "privacy", "report", "safety"},
    "audit": {"core", "comparison", "data", "evaluation", "monitoring", "objectives", "report", "safety"},  # data: whose texts; monitoring: the log of a run; objectives: whose promises
    "serving": {"core", "architecture", "compiled", "generation"},
    "promotion": {"core", "audit", "comparison", "evaluation", "serving", "speed"},  # audit and speed: two audits and two clocks are evidence; serving: the canary is an engine
    "server": {"core", "assistant", "feedback", "guard", "monitoring", "serving"},  # assistant: the chat template; feedback, within a function: a store of a later chapter; monitoring: what a metric is
    "kubernetes": {"core", "architecture", "data", "serving"},  # data: the pinned file that helm is in
    "inferentia": {"core", "architecture", "costs"},  # what is rented
    "deployment": {"core", "architecture", "families", "generation", "interchange", "tokenization"},
    "browser": {"core", "deployment", "tokenization"},  # what a page runs: a graph and a tokenizer
    "containers": {"core"},
    "security": {"core", "guard", "report", "safety"},  # guard: its policies are changed with tests; safety: how a text is named without saying it
    "load": {"core", "comparison", "evaluation", "report"},  # within functions, which bring torch: a load generator starts at once
    "feedback": {"core", "evaluation", "privacy"},  # what users say is kept without personal data
    "speed": {"core", "architecture", "compiled", "evaluation", "generation"},  # evaluation: Student's interval
    "scorecard": {"core", "audit", "costs", "data", "improvement", "monitoring", "objectives", "report", "tokenization"},  # it reads what every step leaves
    "journey": {"core", "architecture", "choosing", "infrastructure", "objectives", "planning", "scorecard"},
    "behaviour": {"core", "evaluation", "feedback", "report"},
    "refresh": {"core", "architecture", "backward", "checkpointing", "cleaning", "data", "duplicates", "evaluation", "lora", "pretraining", "privacy", "sources"},  # a second round through chapters 3 to 6; lora: the hash of a base
    "drift": {"core", "behaviour", "evaluation", "feedback", "metrics"},  # behaviour: groups of texts and their names; metrics: words and features
    "improvement": {"core", "adversarial", "architecture", "behaviour", "data", "drift", "evaluation", "fastbpe", "feedback", "generation", "harness", "interchange", "pretraining", "promotion", "refresh", "report", "safety", "serving", "tokenization"},  # the loop: a turn joins all parts of chapter 11
    "pipeline": {"core", "feedback", "improvement", "journey", "promotion", "security", "scorecard", "deployment", "quantization", "serving", "server", "adversarial", "audit", "bias", "dialogues", "fairness", "guard", "injection", "memorisation", "safety", "objectives", "architecture", "backward", "generation", "interchange", "llamacpp", "data", "sources", "cleaning", "privacy", "curation", "duplicates", "tokenization", "fastbpe", "infrastructure", "planning", "checkpointing", "engines", "launching", "monitoring", "pretraining", "rates", "stability", "watching", "evaluation", "comparison", "perplexity", "metrics", "harness", "bridge", "report", "alignment", "assistant", "classification", "clauses", "footprint", "methods"},
}
HEAVY = {"datasets", "tokenizers", "matplotlib", "rich", "typer", "ipywidgets", "transformers", "evaluate", "IPython", "pandas", "nbdev", "numba", "gguf", "xllamacpp",
         "resiliparse", "trafilatura", "fastwarc", "ftfy", "py3langid", "lingua", "charset_normalizer", "datatrove", "datasketch", "sklearn", "pyarrow", "tiktoken",
         "psutil", "pynvml", "tensorboard", "wandb", "prometheus_client", "deepspeed", "megatron", "scipy", "sacrebleu", "rouge_score", "lm_eval", "peft", "trl", "fairlearn", "httpx", "inspect_ai", "fastapi", "starlette", "uvicorn", "pydantic", "h11", "openai",
         "onnx", "onnxscript", "onnxruntime", "onnxruntime_genai",
         "llvmlite"}
HEAVY_BUT_ALLOWED = {"pipeline": {"typer"}, "compiled": {"numba"}, "fastbpe": {"numba"}, "speed": {"numba", "llvmlite"}}  # the command line is made of typer's annotations, compiled functions of numba's decorator
SECONDS = 2  # of CPU time beyond `import torch`, generous


def parsed(source:str)->ast.Module: return ast.parse(source)


def ours(tree:ast.Module)->set[str]:
    "Modules of ours that a module imports, wherever in it."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            path = ("llm_scratch." * bool(node.level) + (node.module or "")).rstrip(".").split(".")
            if path[0] == "llm_scratch": found |= {path[1]} if len(path) > 1 else {a.name for a in node.names if a.name in MODULES}
        elif isinstance(node, ast.Import): found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("llm_scratch.")}
    return found


def at_import(tree:ast.AST)->set[str]:
    "Outside packages that are imported when the module is, not when a function is called."
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test): continue
        if isinstance(node, ast.Import): found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level: found.add(node.module.split(".")[0])
        else: found |= at_import(node)
    return found


def stars(tree:ast.Module)->list[int]: return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]


def public(tree:ast.Module)->list[str]:
    "What `__all__` lists; else the public names that the module defines."
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__": return ast.literal_eval(node.value)
    return [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]


@pytest.fixture(params=MODULES, ids=str)
def module(request): return request.param


@pytest.fixture
def tree(module): return parsed(MODULES[module].read_text(encoding="utf-8"))


def test_every_notebook_has_one_module_and_every_module_a_row():
    exports = Counter()
    for path in (ROOT/"nbs").glob("[!_.]*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            lines = "".join(cell["source"]).splitlines()
            if cell["cell_type"] == "code" and lines and lines[0].startswith("#| default_exp "):
                exports[lines[0].split()[-1]] += 1
                assert path.stem.split("_", 1)[1] == lines[0].split()[-1], path.name
    assert sorted(exports) == sorted(MODULES) and set(exports.values()) == {1}
    assert set(MODULES) <= set(MAY_IMPORT), "give the new module a row"


def test_a_module_imports_only_what_its_row_allows(module, tree): assert ours(tree) <= MAY_IMPORT[module]


def test_no_star_imports(tree): assert stars(tree) == []


def test_heavy_packages_are_imported_inside_functions(module, tree): assert at_import(tree) & HEAVY <= HEAVY_BUT_ALLOWED.get(module, set())


def test_no_public_name_stands_twice():
    where = Counter(name for path in MODULES.values() for name in public(parsed(path.read_text(encoding="utf-8"))))
    assert [n for n, k in where.items() if k > 1] == []


def test_exported_functions_are_typed_and_described(module, tree):
    "Type hints for every argument and for the result, and one line that says what the caller gets."
    wanting, names = [], set(public(tree))
    for node in tree.body:
        if getattr(node, "name", None) not in names or not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
        if not ast.get_docstring(node): wanting.append(f"{node.name} has no docstring")
        if isinstance(node, ast.FunctionDef):
            args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            wanting += [f"{node.name}({a.arg}) has no type" for a in args if not a.annotation]
            if not node.returns: wanting.append(f"{node.name} has no return type")
    assert wanting == []


@pytest.fixture(scope="module")
def cost():
    "CPU seconds that each module costs after torch, and which heavy packages it brought, each in a fork of one process that has imported torch."
    code = """
import json, os, sys, time
import torch
seconds = {}
for name in sys.argv[1:]:
    out, into = os.pipe()
    if not (pid := os.fork()):
        start = time.process_time()
        __import__(name)
        os.write(into, json.dumps([time.process_time() - start, sorted({m.split('.')[0] for m in sys.modules})]).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as f: text = f.read()
    os.waitpid(pid, 0)
    seconds[name] = json.loads(text) if text else None
print(json.dumps(seconds))
"""
    names = ["llm_scratch", *(f"llm_scratch.{m}" for m in MODULES)]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["llm_scratch", *(f"llm_scratch.{m}" for m in MODULES)])
def test_importing_costs_little(cost, name):
    assert cost[name], f"import {name} failed"
    seconds, loaded = cost[name]
    assert seconds < SECONDS
    assert not {"datasets", "tokenizers", "matplotlib", "ipywidgets", "transformers"} & set(loaded)


def test_the_rules_see_what_is_wrong():
    "The reader of modules itself, on a module that breaks every rule."
    bad = parsed("from .data import fetch\nfrom llm_scratch.core import *\nimport llm_scratch.pipeline\ntry: import rich\nexcept ImportError: rich = None\n"
                 "class A:\n    import matplotlib.pyplot as plt\ndef f():\n    import datasets\n    from . import evaluation\n")
    assert ours(bad) == {"data", "core", "pipeline", *(["evaluation"] if "evaluation" in MODULES else [])}
    assert stars(bad) == [2] and at_import(bad) & HEAVY == {"rich", "matplotlib"}
    assert public(bad) == ["A", "f"]

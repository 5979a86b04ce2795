"Fixed shapes: that filling changes nothing, that buckets are the best there are, and what the compile script says and makes."
import json
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig, save_model
from llm_scratch.core import UserError
from llm_scratch.generation import generate
from llm_scratch.inferentia import (
    RIGS, StaticPlan, StaticPrefill, choose_bucket, cpu_trace, example_inputs, export_static, fleet_dollars, million_tokens, neuron_trace, open_programs,
    optimal_buckets, pad_to_bucket, padded_positions, padding_waste, power_buckets, save_programs, static_programs, write_static, writing_rate)
from llm_scratch.planning import SHAPES
from tests.models import filled

ROOT = Path(__file__).resolve().parent.parent
CFG = ModelConfig(vocab_size=53, context_len=64, n_layers=2, n_heads=4, n_kv_heads=2, d_model=16, d_ff=32, d_head=8)
PLAN = StaticPlan((4, 16), (1, 3), 40)


@pytest.fixture(scope="module")
def model(): return filled(Decoder(CFG)).requires_grad_(False)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_fixed_shapes_write_what_the_model_writes(model, n, seed):
    rng = random.Random(seed)
    prompts = [[rng.randrange(53) for _ in range(rng.randint(1, 16))] for _ in range(n)]
    for fill in (0, 17): # whatever stands in the filling
        ids, length = pad_to_bucket(prompts, PLAN.prompt_buckets, PLAN.batch_buckets, fill)
        logits = StaticPrefill(model, 40)(ids, length)[0]
        for row, prompt in enumerate(prompts): assert_close(logits[row], model(torch.tensor([prompt]))[0, -1], atol=5e-5, rtol=1e-4)
    written = write_static(static_programs(model, PLAN), PLAN, prompts, 24)
    assert written == [generate(model, [p], 24, temperature=0)[0, len(p):].tolist() for p in prompts]


def test_every_program_is_called_with_its_own_shapes_only(model):
    called = []
    def watched(module, inputs):
        want = [tuple(t.shape) for t in inputs]
        def run(*given):
            assert [tuple(t.shape) for t in given] == want and [t.dtype for t in given] == [t.dtype for t in inputs]
            called.append(want)
            return module(*given)
        return run
    programs = static_programs(model, PLAN, watched)
    write_static(programs, PLAN, [[1, 2], [3]*9], 20)
    assert len(called) == 20 and len({str(c) for c in called}) == 2 # one prefill, and one program for all nineteen steps


@pytest.mark.parametrize("shape", PLAN.shapes, ids=str)
def test_shapes_are_static_for_the_exporter(model, shape):
    program = static_programs(model, StaticPlan((4, 16), (1, 3), 40), lambda module, inputs: module)[shape]
    recorded = export_static(program, example_inputs(CFG, shape))
    assert_close(recorded(*example_inputs(CFG, shape)), program(*example_inputs(CFG, shape)))
    kind, B, T = shape
    with pytest.raises(Exception, match="(?i)guard|shape|expected|constraint"): recorded(*example_inputs(CFG, (kind, B, T+1)))


class ByIndex(nn.Module):
    "Writes by index of what is true: how many that are depends on values."
    def forward(self, x): return x[x > 0]

class ByBranch(nn.Module):
    def forward(self, x): return x*2 if x.sum() > 0 else x


@pytest.mark.parametrize(("module", "says"), [(ByIndex(), "choose by mask"), (ByBranch(), "has no fixed shapes")])
def test_what_depends_on_values_is_refused(module, says):
    with pytest.raises(UserError, match=says): export_static(module, (torch.randn(5),))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=14), st.integers(1, 5))
def test_no_choice_of_buckets_fills_less(lengths, k):
    best, distinct = optimal_buckets(lengths, k), sorted(set(lengths))
    assert list(best) == sorted(set(best)) and len(best) <= k and best[-1] == max(lengths)
    least = min(padded_positions(lengths, [*c, distinct[-1]]) for n in range(min(k, len(distinct))) for c in combinations(distinct[:-1], n))
    assert padded_positions(lengths, best) == least <= padded_positions(lengths, power_buckets(max(lengths), k))
    assert 0 <= padding_waste(lengths, best) < 1 and (k < len(distinct) or padding_waste(lengths, best) == 0)


@pytest.mark.parametrize(("n", "bucket"), [(1, 4), (4, 4), (5, 16), (16, 16)])
def test_the_smallest_bucket_that_fits(n, bucket): assert choose_bucket(n, [16, 4]) == bucket


@pytest.mark.parametrize(("call", "says"), [
    (lambda: choose_bucket(17, (4, 16)), "17 do not fit into the buckets 4, 16"), (lambda: pad_to_bucket([], (4,)), "at least one prompt"), (lambda: pad_to_bucket([[1], []], (4,)), "each at least one token"),
    (lambda: pad_to_bucket([[1]]*4, (4,), (1, 3)), "4 do not fit into the buckets 1, 3"), (lambda: StaticPlan((8, 4), (1,), 40), "in rising order"), (lambda: StaticPlan((4,), (), 40), "at least 1"),
    (lambda: StaticPlan((4, 8), (1,), 8), "give at least 9"), (lambda: optimal_buckets([], 2), "0 prompts"), (lambda: optimal_buckets([1], 0), "0 buckets"), (lambda: million_tokens(RIGS["g5.xlarge"], (1., 2.), 0.), "no share of a day"),
    (lambda: writing_rate(SHAPES["70b"], RIGS["inf2.xlarge"], 1, 10), "do not fit into inf2.xlarge")])
def test_mistakes_say_what_would_fit(call, says):
    with pytest.raises(UserError, match=says): call()


def test_what_does_not_fit_the_cache_is_told_before_anything_runs(model):
    programs = {shape:None for shape in PLAN.shapes} # calling one would fail
    with pytest.raises(UserError, match="ask for at most 35"): write_static(programs, PLAN, [[1]*5], 36)
    with pytest.raises(UserError, match="context_len=64"): static_programs(model, StaticPlan((4,), (1,), 65))


@pytest.mark.filterwarnings("ignore")
def test_saved_programs_are_whole_or_refused(model, tmp_path):
    folder = save_programs(model, StaticPlan((4,), (1,), 24), tmp_path/"programs", cpu_trace, "cpu")
    programs, plan = open_programs(folder)
    assert write_static(programs, plan, [[5, 6, 7]], 12) == [generate(model, [[5, 6, 7]], 12, temperature=0)[0, 3:].tolist()]
    (folder/"step-1x24.pt").write_bytes(b"something else")
    with pytest.raises(UserError, match="step-1x24.pt is corrupt"): open_programs(folder)
    def failing(module, inputs): raise RuntimeError("the compiler gave up")
    with pytest.raises(RuntimeError): save_programs(model, StaticPlan((4,), (1,), 24), tmp_path/"none", failing, "cpu")
    assert not (tmp_path/"none").exists()


@pytest.mark.parametrize(("source", "says"), [
    ("raise ImportError('WRONG PACKAGE. Please install the package from Neuron Repository')", "the empty one of PyPI"), ("", "can't trace"), (None, "torch-neuronx is not installed")])
def test_a_missing_compiler_is_told_with_the_way_to_it(source, says, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch_neuronx", raising=False)
    if source is None: monkeypatch.setitem(sys.modules, "torch_neuronx", None)
    else: (tmp_path/"torch_neuronx.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=f"{says}.*pip.repos.neuron.amazonaws.com"): neuron_trace()


@pytest.mark.filterwarnings("ignore") # a trace turns shapes into constants, and says so
def test_the_compiler_is_called_as_it_is_documented(model, tmp_path, monkeypatch):
    "A stand-in with the signature of `torch_neuronx.trace`, which records how it is called and computes on the CPU."
    (tmp_path/"torch_neuronx.py").write_text("import torch\ncalls = []\ndef trace(func, example_inputs, *_, input_output_aliases={}, compiler_workdir=None, compiler_args=None, partitioner_config=None, inline_weights_to_neff=True):\n"
                                             "    assert not _\n    calls.append(compiler_args)\n    return torch.jit.trace(func, example_inputs, check_trace=False)\n")
    monkeypatch.delitem(sys.modules, "torch_neuronx", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = save_programs(model, StaticPlan((4,), (1,), 24), tmp_path/"inf2", neuron_trace(), "inf2")
    assert sys.modules["torch_neuronx"].calls == [["--model-type", "transformer", "--auto-cast", "none", "-O2"]]*2
    assert json.loads((folder/"plan.json").read_text())["target"] == "inf2"
    monkeypatch.delitem(sys.modules, "torch_neuronx")


def test_the_script_checks_plans_and_says_what_is_missing(model, tmp_path):
    home = save_model(filled(Decoder(CFG)), tmp_path/"model", eot_id=0)
    (tmp_path/"lengths.json").write_text(json.dumps([3]*30 + [5]*30 + [40]*2))
    run = lambda *more: subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; sys.argv = ['compile.py', *sys.argv[1:]]; runpy.run_path({str(ROOT/'deploy/inferentia/compile.py')!r}, run_name='__main__')",
                                        str(home), str(tmp_path/"out"), *more], capture_output=True, text=True, timeout=120)
    missing = run()
    assert missing.returncode == 2 and "torch-neuronx" in missing.stderr and "pip.repos.neuron.amazonaws.com" in missing.stderr and "Traceback" not in missing.stderr and not (tmp_path/"out").exists()
    made = run("--target", "cpu", "--lengths", str(tmp_path/"lengths.json"), "--buckets", "3", "--batches", "2")
    assert made.returncode == 0 and "buckets 3, 5, 48" in made.stdout and "4 programs for cpu" in made.stdout, made.stderr
    assert open_programs(tmp_path/"out")[1] == StaticPlan((3, 5, 48), (2,), 64)
    (tmp_path/"lengths.json").write_text('["three"]')
    wrong = run("--check", "--lengths", str(tmp_path/"lengths.json"))
    assert wrong.returncode == 2 and "holds no lengths" in wrong.stderr


def test_the_job_calls_the_script_with_options_that_it_has():
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is in the extra dev")
    job = yaml.safe_load((ROOT/"deploy/inferentia/compile-job.yaml").read_text(encoding="utf-8"))
    validate.validate(job, "1.37", strict=True)
    container = job["spec"]["template"]["spec"]["containers"][0]
    script = ROOT/container["command"][1]
    assert script.is_file() and container["resources"]["limits"]["aws.amazon.com/neuron"] == 1
    flags = [a for a in container["args"] if a.startswith("--")]
    assert flags and all(f'"{flag}"' in script.read_text(encoding="utf-8") for flag in flags)


def test_the_cost_sheet_adds_up():
    rig, cfg = RIGS["inf2.xlarge"], SHAPES["7b"]
    slow, fast = writing_rate(cfg, rig, 8, 512)
    assert slow < fast and fast/slow == pytest.approx(rig.reach[1]/rig.reach[0])
    low, high = million_tokens(rig, (slow, fast))
    assert low == pytest.approx(rig.dollars[0]/3600/fast*1e6) and high == pytest.approx(rig.dollars[1]/3600/slow*1e6)
    assert million_tokens(rig, (slow, fast), .5)[1] == pytest.approx(2*high)
    assert writing_rate(cfg, rig, 8, 512)[0] > 4*writing_rate(cfg, rig, 1, 512)[0] # weights are read once for all texts
    assert [fleet_dollars(rig, 100., load, 2.) for load in (0, 100, 100.1, 1000)] == [2., 2., 4., 20.]
    assert all("look them up" in r.source for r in RIGS.values())

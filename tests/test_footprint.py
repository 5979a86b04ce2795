"Memory of tuning: counts that hold for any shape, measurements that agree with them, and the script that makes the record."
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch import footprint
from llm_scratch.architecture import Decoder, ModelConfig, n_params
from llm_scratch.core import UserError
from llm_scratch.footprint import METHODS, Tuning, base_bytes, frozen_block_bytes, kept_bytes, made, matrices, n_learnt, resident_peaks, tuned, tuning_activation_bytes, tuning_peak, two_steps
from llm_scratch.lora import n_trained
from llm_scratch.planning import block_activation_bytes, peak_bytes
from llm_scratch.qlora import NF4Linear

ROOT = Path(__file__).resolve().parent.parent
CFG = ModelConfig(vocab_size=97, context_len=80, n_layers=2, n_heads=4, n_kv_heads=2, d_model=24, d_ff=40, d_head=6)
shapes = st.builds(lambda V, L, H, per, D, F, K: ModelConfig(V, 80, L, H*per, H, D, F, 2*K), st.integers(2, 90), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(4, 40), st.integers(4, 60), st.integers(1, 8))


def held(model, cfg):
    "Bytes of everything that lies in memory, each once, without the tables of angles."
    return sum({x.untyped_storage()._cdata: x.nbytes for x in (*model.parameters(), *model.buffers())}.values()) - 2*4*cfg.context_len*cfg.d_head


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=5, deadline=None)
@given(cfg=shapes, B=st.integers(1, 3), T=st.integers(2, 12), rank=st.integers(1, 6), P=st.integers(1, 9))
def test_counts_are_exact_for_any_shape(method, cfg, B, T, rank, P):
    t = Tuning(method, rank=rank, positions=P)
    model = tuned(Decoder(cfg), t)
    assert n_trained(model) == n_learnt(cfg, t)
    assert held(model, cfg) == base_bytes(cfg, t) + (0 if method == "full" else 4*n_learnt(cfg, t))
    assert kept_bytes(model, B, T) == tuning_activation_bytes(cfg, t, B, T) + 4


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_highest_tide_is_what_the_allocator_saw(method, again):
    cfg = ModelConfig(1024, 160, n_layers=4, n_heads=4, n_kv_heads=2, d_model=96, d_ff=256, d_head=24)
    t = Tuning(method, checkpoint=again)
    two_steps(made(CFG, t), 1, 4)
    gc.collect()
    assert tuning_peak(cfg, t, 2, 128).total == pytest.approx(peak_bytes(lambda: two_steps(made(cfg, t), 2, 128)), rel=.04)


def test_the_highest_tide_can_be_a_block_that_is_computed_again():
    cfg, t = ModelConfig(64, 320, n_layers=4, n_heads=4, n_kv_heads=2, d_model=128, d_ff=352, d_head=32), Tuning("lora", checkpoint=True)
    gc.collect()
    assert tuning_peak(cfg, t, 2, 256).moment == "last block"
    assert tuning_peak(cfg, t, 2, 256).total == pytest.approx(peak_bytes(lambda: two_steps(made(cfg, t), 2, 256)), rel=.08)


def test_the_update_can_be_the_highest_moment():
    t = Tuning("lora", rank=64)
    m = tuning_peak(CFG, t, 1, 1)
    assert m.moment == "update" and m.gradients == 4*n_learnt(CFG, t) and m.optimizer == 2*m.gradients and m.weights == 4*n_params(CFG) + m.gradients


def test_a_frozen_block_keeps_less_and_an_adapter_asks_for_its_inputs_again():
    full, frozen, lora = block_activation_bytes(CFG, 1, 1), frozen_block_bytes(CFG, 1, 1), frozen_block_bytes(CFG, 1, 1, 1)
    assert frozen < lora < full
    assert lora - frozen == 4*(2*24 + 40 + 7) and frozen_block_bytes(CFG, 1, 1, 5) - lora == 4*7*4
    assert frozen_block_bytes(CFG, 3, 5, 2) == 15*frozen_block_bytes(CFG, 1, 1, 2)


def test_a_model_in_4_bits_never_lies_in_memory_in_full():
    cfg = ModelConfig(256, 64, n_layers=8, n_heads=4, n_kv_heads=2, d_model=256, d_ff=704, d_head=64)
    gc.collect()
    assert peak_bytes(lambda: made(cfg, Tuning("qlora"))) < .6*4*n_params(cfg)
    assert len([m for m in made(cfg, Tuning("qlora")).modules() if isinstance(m, NF4Linear)]) == 8*7


@pytest.mark.parametrize("method", METHODS)
def test_what_is_made_is_whole_and_moves(method):
    model = made(CFG, Tuning(method, checkpoint=True))
    assert not any(x.is_meta for x in (*model.parameters(), *model.buffers()))
    logits = model(torch.randint(97, (2, 9)))
    assert logits.isfinite().all() and logits.std() > .01
    plain = Decoder(CFG)
    base = getattr(model, "base", model)
    assert torch.equal(base.cos, plain.cos) and torch.equal(base.sin, plain.sin)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    two_steps(model, 2, 9)
    assert any(not torch.equal(a, b) for a, b in zip(before, (p for p in model.parameters() if p.requires_grad)))


def test_matrices_are_those_of_a_block():
    assert sorted(matrices(CFG)) == sorted(tuple(p.shape) for p in Decoder(CFG).layers[0].parameters() if p.ndim == 2)


def test_a_process_of_its_own_takes_what_was_predicted():
    if not Path("/proc/self/status").exists(): pytest.skip("the kernel does not say what a process takes")
    cfg = ModelConfig(2048, 160, n_layers=4, n_heads=4, n_kv_heads=2, d_model=256, d_ff=704, d_head=64)
    jobs = [(cfg, Tuning(m), 1, 64) for m in ("full", "lora")]
    paper, best = [tuning_peak(*job).total for job in jobs], [float("inf")]*2
    for _ in range(3):  # what else the system does can only add
        best = list(map(min, best, resident_peaks(jobs)))
        if all(b < 1.4*p + 2e7 for b, p in zip(best, paper)): break
    assert all(.9*p < b < 1.4*p + 2e7 for b, p in zip(best, paper)) and best[1] < .6*best[0]


def test_a_process_that_fails_says_why():
    with pytest.raises(UserError, match="context_len=80"): resident_peaks([(CFG, Tuning("full"), 1, 81)])


def test_where_there_is_no_proc_the_answer_is_0(monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    assert footprint._status("VmRSS") == 0


@pytest.mark.parametrize("wrong, says", [(dict(method="adapter"), "full, lora, qlora, prompt"), (dict(rank=0), "rank=0"), (dict(positions=0), "positions=0")])
def test_bad_methods(wrong, says):
    with pytest.raises(UserError, match=says): Tuning(**wrong)


def test_the_script_goes_on_where_it_stopped(tmp_path):
    sys.path.insert(0, str(ROOT/"benchmarks"))
    import footprint as script
    sys.path.pop(0)
    out = tmp_path/"rows.json"
    calls = []
    def fake(some):
        calls.extend(some)
        if len(calls) > 8: raise KeyboardInterrupt
        return [7]*len(some)
    script.measure = fake
    with pytest.raises(KeyboardInterrupt): script.main(["--sizes", "tiny", "--record", str(out)])
    assert len(json.loads(out.read_text())["rows"]) == 8
    calls.clear()
    script.measure = lambda some: calls.extend(some) or [8]*len(some)
    script.main(["--sizes", "tiny", "--record", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert len(calls) == 16 and [r["bytes"] for r in rows] == [7]*8 + [8]*16 and len({str({k: v for k, v in r.items() if k != "bytes"}) for r in rows}) == 24


def test_the_script_imports_little():
    "It runs where only torch, safetensors and numpy are."
    code = "import sys; sys.modules.update(dict.fromkeys(('fastcore', 'platformdirs', 'datasets', 'xxhash', 'tokenizers', 'transformers', 'peft'))); sys.argv = ['x', '--help']; exec(open('benchmarks/footprint.py').read().replace('__file__', repr('benchmarks/footprint.py')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "--device" in done.stdout, done.stderr


def test_the_record_is_that_of_the_script():
    record = json.loads((ROOT/"nbs"/"footprint.json").read_text(encoding="utf-8"))
    sizes = {name: ModelConfig(**{k: v for k, v in c.items() if k != "n_params"}) for name, c in record["sizes"].items()}
    assert record["sizes"]["135M"]["n_params"] == n_params(sizes["135M"]) == 134_518_848
    keys = [tuple(v for k, v in r.items() if k != "bytes") for r in record["rows"]]
    assert len(keys) == len(set(keys)) and {r["device"] for r in record["rows"]} <= {"cpu", "cuda"}
    for r in record["rows"]:
        if r["device"] == "cpu" and r["size"] == "135M": assert r["bytes"] == pytest.approx(tuning_peak(sizes["135M"], Tuning(r["method"], checkpoint=r["checkpoint"]), r["batch_size"], r["seq_len"]).total, rel=.15)

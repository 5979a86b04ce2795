"Turns and clocks, the quick decoder at any size, backends that write the same, and the record that chapter 10i reads. No test looks at a clock."
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from models import filled

from llm_scratch.architecture import Decoder, ModelConfig, n_params
from llm_scratch.compiled import CompiledDecoder
from llm_scratch.core import UserError
from llm_scratch.generation import Cache, generate
from llm_scratch.speed import (GROUP, LANES, Ratio, Timing, as_tiles, as_tiles8, decode_bytes, decode_ceiling, four_streams, per_token, plot_speed, quick_exp, ratio_interval, round_groups, speed_table, tiled_decoder, tiled_product, tiled_row,
                               time_in_turns, write_greedily)

ROOT = Path(__file__).resolve().parent.parent
CFG = ModelConfig(300, context_len=48, n_layers=2, n_heads=4, n_kv_heads=2, d_model=64, d_ff=96, d_head=16)
numba = pytest.importorskip("numba", reason="four bits want Numba")


class Machine:
    "A computer that gets quicker or slower as time goes by, with a clock that nobody waits for."
    def __init__(self, load=lambda now: 1., others=0.): self.now, self.used, self.load, self.others, self.rng = 0., 0., load, others, np.random.default_rng(0)

    def work(self, seconds):
        def do():
            took = seconds*self.load(self.now)*(1+.01*abs(self.rng.normal()))
            self.used += took
            self.now += took*(1+self.others)
        return do

    def turns(self, works, rounds): return time_in_turns(works, rounds, cpu=lambda: self.used, wall=lambda: self.now)


# --- turns ----------------------------------------------------------------------------------------------------------

def test_everybody_has_a_turn_in_every_round_and_is_first_at_times():
    said = []
    found = time_in_turns({name: lambda name=name: said.append(name) for name in "abcd"}, 4)
    assert {name: len(some) for name, some in found.items()} == dict.fromkeys("abcd", 4)
    rounds = [said[4*i:4*i+4] for i in range(4)]
    assert all(sorted(r) == list("abcd") for r in rounds) and {r[0] for r in rounds} == set("abcd")


def test_both_clocks_are_read():
    m = Machine(others=2.)
    for t in m.turns(dict(a=m.work(1.)), 5)["a"]: assert 1 <= t.cpu < 1.1 and t.wall == pytest.approx(3*t.cpu)
    with pytest.raises(UserError, match="rounds=0"): time_in_turns(dict(a=int), 0)
    with pytest.raises(UserError, match="0 works"): time_in_turns({}, 1)


@pytest.mark.parametrize("factor", [1.03, 1.1])
def test_a_planted_slowdown_is_found_in_turns_and_missed_one_after_the_other(factor):
    drift = lambda now: 1 + .6*np.exp(-now/20)
    m = Machine(drift)
    apart = [t.cpu for name, s in (("old", 1.), ("new", factor)) for t in m.turns({name: m.work(s)}, 12)[name]]
    assert ratio_interval(apart[12:], apart[:12]).mean < 1  # the slower one looks quicker
    m = Machine(drift)
    found = m.turns(dict(old=m.work(1.), new=m.work(factor)), 12)
    r = ratio_interval([t.cpu for t in found["new"]], [t.cpu for t in found["old"]])
    assert r.low > 1 and abs(r.mean-factor) < .02


def test_nothing_is_found_where_nothing_is():
    rng = np.random.default_rng(0)
    intervals = [ratio_interval(*np.exp(.1*rng.normal(size=(2, 8)))) for _ in range(400)]
    wrong = sum(not r.low <= 1 <= r.high for r in intervals)
    assert 10 <= wrong <= 32  # about 20 of 400


def test_garbage_waits_and_is_collected_again():
    import gc
    found = []
    time_in_turns(dict(a=lambda: found.append(gc.isenabled())), 1)
    with pytest.raises(ZeroDivisionError): time_in_turns(dict(a=lambda: 1/0), 1)
    assert found == [False] and gc.isenabled()


def test_a_step_is_what_remains_without_the_prompt():
    first, whole = [Timing(.035, .04)]*2, [Timing(.045, .06)]*2
    assert per_token(first, whole, 3) == [pytest.approx((.005, .01))]*2
    with pytest.raises(ValueError, match="zip"): per_token(first, whole[:1], 3)


def test_ratios():
    assert ratio_interval([2., 4.], [1., 2.]) == pytest.approx((2, 2, 2))
    a, b = np.random.default_rng(0).uniform(1, 2, (2, 9))
    r, inverse = ratio_interval(a, b), ratio_interval(b, a)
    assert (1/r.mean, 1/r.high, 1/r.low) == pytest.approx(inverse)
    assert str(Ratio(1.234, 1, 2)) == "1.23 (1.00–2.00)"
    with pytest.raises(UserError, match="2 and 1 rounds"): ratio_interval([1, 2], [1])
    with pytest.raises(UserError, match="0 or less"): ratio_interval([1, 2], [1, 0])


def test_paper():
    model = Decoder(CFG)
    assert decode_bytes(CFG) == sum(p.nbytes for p in model.parameters()) == 4*n_params(CFG)
    cache = Cache(CFG, 3, 10)
    assert decode_bytes(CFG, 32, 3, 10)-decode_bytes(CFG) == cache.k_LBGSK.nbytes + cache.v_LBGSK.nbytes
    assert decode_ceiling(CFG, 1e9, 1e30) == pytest.approx(1e9/decode_bytes(CFG)) and decode_ceiling(CFG, 1e30, 1e9, n_texts=8) == pytest.approx(1e9/(2*n_params(CFG)))


# --- products -------------------------------------------------------------------------------------------------------

def untiled(w, scale, N, M):
    out_NM = np.empty((N, M), np.float32)
    for i in range(N): tiled_row(w, scale, i, out_NM[i])
    return out_NM


@pytest.mark.parametrize("n_bits", [4, 8])
@pytest.mark.parametrize("N, M", [(16, 32), (1, 32), (33, 96), (300, 64)])
def test_tiles_hold_every_row(n_bits, N, M):
    w_NM = np.random.default_rng(N).normal(size=(N, M)).astype(np.float32)
    w_NM[0, :GROUP] = 0
    codes, steps = as_tiles(w_NM, n_bits)
    assert codes.shape == (-(-N//LANES), M//GROUP, 4 if n_bits == 4 else 8, 64) and codes.dtype == (np.uint8 if n_bits == 4 else np.int8) and steps.shape == (-(-N//LANES), M//GROUP, LANES)
    got_NM, far_NG = untiled(codes, steps, N, M), np.abs(w_NM.reshape(N, -1, GROUP)).max(-1)
    off_NG = np.abs(got_NM-w_NM).reshape(N, -1, GROUP).max(-1)
    assert (off_NG <= far_NG/2**(n_bits-1)*1.001).all() and (got_NM[0, :GROUP] == 0).all()  # half a step; a whole one at the end without a code of its own


def test_four_bits_are_those_of_llama_cpp():
    gguf = pytest.importorskip("gguf")
    w_NM = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    theirs = gguf.dequantize(gguf.quantize(w_NM, kind), kind)
    assert np.abs(untiled(*as_tiles(w_NM), 32, 64)-theirs).max() < .02*np.abs(theirs).max() or np.mean(untiled(*as_tiles(w_NM), 32, 64) != theirs) < 1
    off = [np.square(x-w_NM).mean() for x in (untiled(*as_tiles(w_NM), 32, 64), theirs)]
    assert off[0] == pytest.approx(off[1], rel=.05)


@pytest.mark.parametrize("n_bits", [4, 8])
@pytest.mark.parametrize("N, M", [(16, 32), (64, 704), (33, 96)])
@pytest.mark.parametrize("size", [1e-12, 1., 1e6])
def test_tiled_products(n_bits, N, M, size):
    rng = np.random.default_rng(N)
    w_NM, x_M = rng.normal(size=(N, M)).astype(np.float32), (size*rng.normal(size=M)).astype(np.float32)
    codes, steps = as_tiles(w_NM, n_bits)
    code_M, step_G, less_G, out = np.empty(M, np.int8), np.empty(M//32, np.float32), np.empty(M//32, np.int32), np.empty(len(codes)*16, np.float32)
    round_groups(x_M, 8, code_M, step_G, less_G)
    assert np.abs(code_M).max() == 127 and (less_G == -8*code_M.reshape(-1, 32).astype(int).sum(1)).all()
    rounded_M = (code_M.reshape(-1, 32)*step_G[:, None]).reshape(-1)
    assert np.abs(rounded_M-x_M).max() <= .5001*step_G.max()
    tiled_product(codes, steps, x_M, out)
    np.testing.assert_allclose(out[:N], untiled(codes, steps, N, M).astype(np.float64)@rounded_M, rtol=1e-4, atol=1e-4*size)


@pytest.mark.parametrize("n_bits", [4, 8])
def test_a_processor_without_the_instruction_says_the_same(n_bits):
    "In a process of its own, which compiles for a plain processor; Numba keeps code for different ones apart."
    code = f"""
import numpy as np
import llm_scratch.speed as s
product = s.njit(s.tiled_product.py_func)
rng = np.random.default_rng(0)
w_NM,x_M = rng.normal(size=(48, 64)).astype(np.float32),rng.normal(size=64).astype(np.float32)
codes,steps = s.as_tiles(w_NM, {n_bits})
out = np.empty(48, np.float32)
product(codes, steps, x_M, out)
assert "vpdpbusd" not in next(iter(product.inspect_asm().values())), "the instruction is there"
print(out.tolist())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False, cwd=ROOT, env=os.environ | dict(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=""))
    assert done.returncode == 0, done.stderr
    rng = np.random.default_rng(0)
    w_NM, x_M, out = rng.normal(size=(48, 64)).astype(np.float32), rng.normal(size=64).astype(np.float32), np.empty(48, np.float32)
    tiled_product(*as_tiles(w_NM, n_bits), x_M, out)
    np.testing.assert_allclose(out, json.loads(done.stdout), rtol=1e-5, atol=1e-5)


@given(N=st.integers(1, 40), M=st.sampled_from([1, 7, 64]), kind=st.sampled_from([np.float32, np.int8]))
@settings(max_examples=40, deadline=None)
def test_four_streams_do_every_row(N, M, kind):
    rng = np.random.default_rng(N)
    w_NM, x_M, scale_N, out_N = (9*rng.normal(size=(N, M))).astype(kind), rng.normal(size=M).astype(np.float32), rng.random(N).astype(np.float32), np.full(N, np.nan, np.float32)
    four_streams(w_NM, scale_N, x_M, out_N)
    np.testing.assert_allclose(out_N, w_NM.astype(np.float64)@x_M*scale_N, rtol=1e-4, atol=1e-3)


def test_quick_exp():
    x = np.concatenate((np.linspace(-87, 88, 4001), [0, -1e30, 1e30])).astype(np.float32)
    y = x.copy()
    quick_exp(y)
    np.testing.assert_allclose(y, np.exp(np.clip(x, -87, 88).astype(np.float64)), rtol=6e-6)
    small = np.linspace(-5, 5, 1001).astype(np.float32)
    y = small.copy()
    quick_exp(y)
    np.testing.assert_allclose(y, np.exp(small.astype(np.float64)), rtol=5e-7)


# --- the decoder ----------------------------------------------------------------------------------------------------

SIZES = dict(plain={}, own_heads=dict(n_kv_heads=4), one_head=dict(n_heads=2, n_kv_heads=1, d_head=32), odd=dict(vocab_size=311, n_layers=1, d_ff=160), narrow=dict(d_head=8))


@torch.no_grad()
def stepwise(decoder, ids_1T):
    cache = Cache(decoder.cfg, 1, ids_1T.shape[1])
    return torch.cat([decoder(ids_1T[:, i:i+1], cache) for i in range(ids_1T.shape[1])], 1)


@pytest.mark.parametrize("sizes", SIZES)
def test_32_bits_say_what_the_model_says(sizes):
    cfg = replace(CFG, **SIZES[sizes])
    model, ids = filled(Decoder(cfg)), torch.randint(cfg.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    decoder = tiled_decoder(model, 32)
    with torch.no_grad(): torch.testing.assert_close(stepwise(decoder, ids), model(ids), rtol=1e-4, atol=1e-4)
    want = generate(model, ids[:, :8], 40, temperature=0)
    assert torch.equal(generate(decoder, ids[:, :8], 40, temperature=0), want) and torch.equal(write_greedily(decoder, ids[:, :8], 40), want)


@pytest.mark.parametrize("n_bits, most", [(8, 2e-3), (4, .2)])
@pytest.mark.parametrize("sizes", SIZES)
def test_fewer_bits_say_nearly_the_same(sizes, n_bits, most):
    cfg = replace(CFG, **SIZES[sizes])
    model, ids = filled(Decoder(cfg)), torch.randint(cfg.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    decoder = tiled_decoder(model, n_bits)
    got, want = stepwise(decoder, ids).double().log_softmax(-1), model(ids).detach().double().log_softmax(-1)
    assert 0 < (want.exp()*(want-got)).sum(-1).mean() < most
    assert torch.equal(generate(decoder, ids[:, :8], 20, temperature=0), write_greedily(decoder, ids[:, :8], 20))


def test_what_does_not_fit():
    with pytest.raises(UserError, match="multiple of 32"): tiled_decoder(Decoder(replace(CFG, d_ff=100)))
    with pytest.raises(UserError, match="n_bits=3"): tiled_decoder(Decoder(CFG), 3)
    with pytest.raises(ValueError, match="does not fit"): tiled_decoder(Decoder(CFG).double())
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(UserError, match="2 texts"): write_greedily(tiled_decoder(Decoder(CFG)), ids.expand(2, 3), 4)
    with pytest.raises(UserError, match="tiled_decoder"): write_greedily(CompiledDecoder(Decoder(CFG)), ids, 4)
    with pytest.raises(ValueError, match="ask for at most"): write_greedily(tiled_decoder(Decoder(CFG)), ids, 46)
    assert as_tiles8(np.ones((16, 32), np.float32))[0].dtype == np.int8


# --- backends and the record ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bench():
    for name in ("onnxruntime", "onnxscript", "onnxruntime_genai", "transformers", "xllamacpp", "gguf"): pytest.importorskip(name, reason="benchmarks/inference.py compares with it")
    spec = spec_from_file_location("benchmarks_inference", ROOT/"benchmarks"/"inference.py")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def kitchen(bench, tmp_path_factory): return bench.Kitchen(bench.TINY, tmp_path_factory.mktemp("kitchen"))


@pytest.mark.parametrize("B", [1, 3])
def test_all_backends_write(B, bench, kitchen):
    ids = torch.randint(kitchen.cfg.vocab_size-1, (B, 6), generator=torch.Generator().manual_seed(B))
    writers, skipped = bench.started(bench.ONE if B == 1 else bench.MANY, kitchen, ids)
    assert skipped == [] and len(writers) == (20 if B == 1 else 14)
    same = bench.compared(writers, kitchen, ids, 10)
    assert all(same[name] == 10*B for name in bench.EXACT if name in same) and min(same.values()) >= 0
    writers["ours, slots"] = lambda n, write=writers["torch eager"]: [[(row[0]+1) % 9, *row[1:]] for row in write(n)]
    with pytest.raises(AssertionError, match="ours, slots writes another text after"): bench.compared(writers, kitchen, ids, 10)


def test_the_record_says_all():
    record = json.loads((ROOT/"nbs"/"inference.json").read_text(encoding="utf-8"))
    assert record.keys() >= {"machine", "versions", "config", "n_params", "prompt", "n_new", "rounds", "bandwidth", "peak", "batches", "bytes"}
    assert record["n_params"] == n_params(ModelConfig(**record["config"])) and (record["prompt"], record["n_new"]) == (32, 96) and record["rounds"] >= 5
    for B, found in record["batches"].items():
        assert found["prefill"].keys() == found["decode"].keys() == found["same"].keys()
        for phase in ("prefill", "decode"):
            for name, some in found[phase].items(): assert len(some) == record["rounds"] and min(cpu for cpu, _ in some) > 0, (B, name)
    assert len(record["batches"]["1"]["decode"]) == 20 and len(record["batches"]["8"]["decode"]) == 14


def test_table_and_plot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    some = lambda *ms: [Timing(t/1e3, t/500) for t in ms]
    record = dict(prefill={"base": some(9, 10), "ours, a": some(9, 9)}, decode={"base": some(4, 4.4), "ours, a": some(1, 1.1)})
    lines = speed_table(record, "base").splitlines()
    assert lines[2].split(" | ")[0] == "| base" and lines[3] == "| ours, a | 9.0 | 1.000 | 2.020 | 4.00 (4.00–4.00) |"
    fig, ax = plt.subplots()
    plot_speed(ax, record, "base")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["base", "ours, a"] and [round(p.get_width(), 3) for p in ax.patches] == [1, 4]
    plt.close(fig)

"Whole numbers: what rounding may do to a matrix, files of the library code for code, what breaks them, and rounding with care."
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from models import filled
from torch import nn
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.compiled import as_int8
from llm_scratch.core import UserError
from llm_scratch.families import GPT2, UntiedDecoder
from llm_scratch.lora import find_linears
from llm_scratch.quantization import (CONVERTERS, Int8Linear, Quantized, dynamic_uint8, gptq, gptq_model, int8_product, kl_nats, layer_inputs, onnx_bytes, quantize_groups, quantize_rows, quantize_tensor, read_codes,
                                      round_weights, smooth_model, to_fp16, to_int4, to_int8, to_int8_channels, with_int8)

ROOT = Path(__file__).resolve().parent.parent
CFG = ModelConfig(300, context_len=40, n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ff=64, d_head=16)
IDS = torch.randint(72, (3, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def said(model): return model(IDS)


@pytest.fixture(scope="module")
def decoder(): return filled(Decoder(CFG))


@pytest.fixture(scope="module")
def folder(decoder, tmp_path_factory):
    "The decoder as ONNX files of every kind."
    pytest.importorskip("onnxruntime", reason="the extra deploy is not installed")
    pytest.importorskip("onnxscript", reason="the extra deploy is not installed")
    from llm_scratch.deployment import export_onnx
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(decoder, folder/"fp32.onnx")
    for name, convert in CONVERTERS.items(): convert(folder/"fp32.onnx", folder/f"{name}.onnx")
    return folder


def opened(path):
    from llm_scratch.deployment import OnnxDecoder
    return OnnxDecoder(path)


# --- matrices -------------------------------------------------------------------------------------------------------

@given(rows=st.integers(1, 9), columns=st.integers(1, 70), seed=st.integers(0, 50), scale=st.sampled_from([1e-20, 1., 1e20]), n_bits=st.integers(2, 8), group=st.sampled_from([1, 16, 32, 100]))
@settings(max_examples=60, deadline=None)
def test_no_weight_moves_by_more_than_its_share_of_a_step(rows, columns, seed, scale, n_bits, group):
    w = scale*torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    for q in (quantize_tensor(w), quantize_rows(w)):
        assert ((q.whole()-w).abs() <= .501*q.step_NC).all() and q.codes_NM.abs().max() == 127
    q = quantize_groups(w, n_bits, group)
    step = q.step_NC.abs().repeat_interleave(group, 1)[:, :columns]
    assert q.step_NC.shape == (rows, -(-columns//group)) and q.codes_NM.dtype == torch.int8
    assert ((q.whole()-w).abs() <= 1.001*step).all() and q.codes_NM.min() >= -2**(n_bits-1) and q.codes_NM.max() <= 2**(n_bits-1)-1
    assert ((q.whole()-w).abs() > .501*step).float().mean() <= .5  # only what is large and has the other sign
    for some, back in zip(w.split(group, 1), q.whole().split(group, 1)):
        at = some.abs().argmax(1, keepdim=True)
        assert_close(back.gather(1, at), some.gather(1, at), rtol=1e-5, atol=0)  # the largest has a mark of its own


def test_rows_are_those_of_the_compiled_decoder_and_zeros_stay_zeros():
    w = torch.randn(12, 30, generator=torch.Generator().manual_seed(1))
    codes, scale = as_int8(w.numpy())
    assert torch.equal(quantize_rows(w).codes_NM, torch.from_numpy(codes)) and torch.equal(quantize_rows(w).step_NC[:, 0], torch.from_numpy(scale))
    w[3], w[5, 7] = 0, 0
    for q in (quantize_tensor(w), quantize_rows(w), quantize_groups(w), quantize_groups(w, 2, 7)): assert not q.whole()[3].any() and q.whole()[5, 7] == 0 and q.whole().isfinite().all()


def test_bytes_are_counted():
    w = torch.randn(8, 64)
    assert quantize_tensor(w).n_bytes == 8*64+4 and quantize_rows(w).n_bytes == 8*64+8*4
    assert quantize_groups(w).n_bytes == 8*64/2+8*2*4 and quantize_groups(w, 3, 60).n_bytes == 8*64*3/8+8*2*4


@pytest.mark.parametrize("n_bits, group", [(1, 32), (9, 32), (4, 0)])
def test_groups_that_make_no_sense_are_told(n_bits, group):
    with pytest.raises(UserError, match=f"n_bits={n_bits} and group={group}"): quantize_groups(torch.randn(2, 2), n_bits, group)


# --- activations ----------------------------------------------------------------------------------------------------

@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30), dim=st.sampled_from([None, -1]))
@settings(max_examples=60, deadline=None)
def test_activations_have_an_exact_zero_and_half_a_step(values, dim):
    x = torch.tensor([values, [0.]*len(values)])
    codes, step, zero = dynamic_uint8(x, dim)
    back = (codes-zero)*step
    assert codes.min() >= 0 and codes.max() <= 255 and torch.equal(codes, codes.round()) and not back[1].any()
    assert ((back-x).abs() <= 1.01*step+1e-30).all()  # half a step, and as much again where the zero was rounded


def test_codes_are_those_of_the_runtime():
    ort, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    h, kind = onnx.helper, onnx.TensorProto
    graph = h.make_graph([h.make_node("DynamicQuantizeLinear", ["x"], ["codes", "step", "zero"])], "g", [h.make_tensor_value_info("x", kind.FLOAT, [None, None])],
                         [h.make_tensor_value_info("codes", kind.UINT8, None), h.make_tensor_value_info("step", kind.FLOAT, []), h.make_tensor_value_info("zero", kind.UINT8, [])])
    session = ort.InferenceSession(h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10).SerializeToString(), providers=["CPUExecutionProvider"])
    for seed in range(20):
        x = torch.randn(7, 33, generator=torch.Generator().manual_seed(seed)) + seed/4 - 2
        codes, step, zero = session.run(None, dict(x=x.numpy()))
        mine = dynamic_uint8(x)
        assert (mine[0].numpy() != codes).sum() <= 1 and np.isclose(mine[1], step, rtol=1e-6) and mine[2] == zero  # the last digit of a quotient may decide a half


def test_a_product_of_whole_numbers_is_exact():
    x, w = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)), torch.randn(9, 200, generator=torch.Generator().manual_seed(1))
    for q in (quantize_tensor(w), quantize_rows(w)):
        for dim in (None, -1):
            codes, step, zero = dynamic_uint8(x, dim)
            assert_close(int8_product(x, q, dim), ((codes-zero)*step).double() @ q.whole().double().T, rtol=1e-5, atol=1e-5, check_dtype=False)
    layer = nn.Linear(200, 9)
    assert_close(Int8Linear(layer)(x), layer(x), atol=.05, rtol=0)
    assert (Int8Linear(layer)(x)-int8_product(x, quantize_rows(layer.weight))-layer.bias).abs().max() < 1e-6


def test_a_step_for_all_hears_the_future_and_the_neighbours(decoder):
    later = IDS.clone()
    later[0, 10:] = (later[0, 10:]+1) % 300
    with torch.no_grad():
        moved = {name: (m(later)-m(IDS)) for name, m in dict(plain=decoder, token=with_int8(decoder, dim=-1), all=with_int8(decoder)).items()}
    assert max(moved[k][0, :10].abs().max() for k in ("plain", "token")) < 1e-5 < 1e-3 < moved["all"][0, :10].abs().max()
    assert max(moved[k][1:].abs().max() for k in ("plain", "token")) < 1e-5 < 1e-3 < moved["all"][1:].abs().max()


# --- models ---------------------------------------------------------------------------------------------------------

def test_divergence_is_that_of_the_book():
    p, q = torch.randn(2, 3, 11), torch.randn(2, 3, 11)
    assert_close(kl_nats(p, q), torch.distributions.kl_divergence(torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)), atol=1e-5, rtol=1e-5)
    assert kl_nats(p, p).abs().max() == 0 and (kl_nats(p, p+1e-6) >= 0).all()


def test_a_rounded_copy_is_a_copy(decoder):
    was = {k: v.clone() for k, v in decoder.state_dict().items()}
    for copy in (round_weights(decoder, quantize_rows), with_int8(decoder), smooth_model(decoder, IDS), gptq_model(decoder, IDS)): assert not torch.equal(said(copy), said(decoder))
    assert all(torch.equal(v, was[k]) for k, v in decoder.state_dict().items())
    assert torch.equal(round_weights(decoder, quantize_rows, table=False).embed_tokens.weight, decoder.embed_tokens.weight)
    assert not torch.equal(round_weights(decoder, quantize_rows).embed_tokens.weight, decoder.embed_tokens.weight)


def test_hooks_go_even_when_a_model_fails(decoder):
    with pytest.raises(IndexError): layer_inputs(decoder, torch.tensor([[300]]))
    assert not any(m._forward_pre_hooks for m in decoder.modules())
    assert set(layer_inputs(decoder, IDS)) == set(find_linears(decoder))


@pytest.mark.parametrize("alpha", [0., .3, .5, 1.])
def test_smoothing_changes_nothing_before_rounding(decoder, alpha):
    assert_close(said(smooth_model(decoder, IDS, alpha)), said(decoder), atol=2e-4, rtol=2e-4)
    before, after = (layer_inputs(m, IDS)["layers.1.mlp.up_proj"].abs().amax(0) for m in (decoder, smooth_model(decoder, IDS, alpha)))
    assert alpha != 1 or (after.max()/after.min() < 1.01 < before.max()/before.min())  # all loudness has moved


def test_smoothing_pulls_out_a_planted_outlier(decoder):
    from copy import deepcopy
    loud = deepcopy(decoder)
    with torch.no_grad():
        loud.layers[0].post_attention_layernorm.weight[3] *= 80
        for m in (loud.layers[0].mlp.gate_proj, loud.layers[0].mlp.up_proj): m.weight[:, 3] /= 80
    assert_close(said(loud), said(decoder), atol=2e-4, rtol=2e-4)
    cost = lambda m: kl_nats(said(decoder), said(with_int8(m))).mean().item()
    assert cost(loud) > 5*cost(decoder) and cost(smooth_model(loud, IDS)) < cost(loud)/5


def test_gptq_is_the_nearest_without_moments_and_better_with(decoder):
    w = decoder.layers[0].mlp.up_proj.weight.detach()
    for n_bits, group in ((4, 32), (3, 8), (2, 5)):
        mine, near = gptq(w, 7*torch.eye(32), n_bits, group), quantize_groups(w, n_bits, group)
        assert torch.equal(mine.codes_NM, near.codes_NM) and torch.equal(mine.step_NC, near.step_NC) and mine[2:] == near[2:]
    shares = []
    for seed in range(5):
        x = torch.randn(400, 32, generator=torch.Generator().manual_seed(seed)) @ torch.randn(32, 32, generator=torch.Generator().manual_seed(seed+50))
        seen, held = x[:300], x[300:]
        off = lambda q: (held@(q.whole()-w).T).square().sum().item()
        shares.append(off(gptq(w, seen.T@seen, 3))/off(quantize_groups(w, 3)))
    assert max(shares) < 1 and np.mean(shares) < .6


def test_gptq_bears_inputs_that_never_speak():
    x = torch.randn(50, 16)
    x[:, 5] = 0
    q = gptq(torch.randn(4, 16), x.T@x)
    assert q.whole().isfinite().all()
    assert gptq(torch.randn(4, 16), torch.zeros(16, 16)).whole().isfinite().all()


# --- files ----------------------------------------------------------------------------------------------------------

HOWS = dict(int8=quantize_tensor, int8_channels=quantize_rows, int4=quantize_groups, int4_table8=quantize_groups)


@pytest.mark.parametrize("name", HOWS)
def test_the_library_writes_our_codes(folder, decoder, name):
    own = [*(layer.weight.detach() for layer in find_linears(decoder).values()), decoder.embed_tokens.weight.detach()]
    theirs = read_codes(folder/f"{name}.onnx")
    assert len(theirs) == len(own)
    for i, (q, w) in enumerate(zip(theirs, own)):
        mine = quantize_groups(w, 8) if name == "int4_table8" and i == len(own)-1 else HOWS[name](w)
        assert isinstance(q, Quantized) and torch.equal(q.codes_NM, mine.codes_NM) and q[2:] == mine[2:]
        assert_close(q.step_NC, mine.step_NC, rtol=1e-6, atol=0)


def test_half_is_half_to_a_byte_and_says_the_same(folder, decoder):
    by32, by16 = onnx_bytes(folder/"fp32.onnx"), onnx_bytes(folder/"fp16.onnx")
    assert abs(by16["FLOAT16"]/by32["FLOAT"]-.5) < .01 and by16.get("FLOAT", 0) == 0
    assert sum(by16.values()) == (folder/"fp16.onnx").stat().st_size
    assert_close(opened(folder/"fp16.onnx")(IDS), said(decoder), atol=.05, rtol=.01)
    from copy import deepcopy
    halves = deepcopy(decoder).half().float()
    assert kl_nats(said(halves), opened(folder/"fp16.onnx")(IDS)).mean() < 1e-4


def test_files_say_what_our_arithmetic_says(folder, decoder):
    table8 = round_weights(decoder, quantize_groups)
    table8.embed_tokens.weight.data = quantize_groups(decoder.embed_tokens.weight, 8).whole()
    for name, twin in dict(int8=with_int8(decoder, quantize_tensor), int8_channels=with_int8(decoder), int4=round_weights(decoder, quantize_groups), int4_table8=table8).items():
        after = opened(folder/f"{name}.onnx")(IDS)
        cost, off = kl_nats(said(decoder), after).mean().item(), kl_nats(said(twin), after).mean().item()
        assert off < max(.25*cost, 2e-4), (name, off, cost)


@pytest.mark.parametrize("name", CONVERTERS)
def test_files_write_as_they_read(folder, name):
    from llm_scratch.generation import generate
    decoder = opened(folder/f"{name}.onnx")
    text = generate(decoder, IDS[:1, :6], 10, temperature=0)
    cache = decoder.new_cache(torch.zeros(1, dtype=torch.long), 40)
    decoder(text[:, :6], cache)
    parts = torch.cat([decoder(text[:, i:i+1], cache) for i in range(6, 15)], 1)
    assert text.shape == (1, 16) and torch.equal(parts.argmax(-1), text[:, 7:]) or name.startswith("int8")  # int8 reads the six at once or one by one with other steps


def test_the_table_is_in_the_file_once(folder):
    n = 300*32
    in32 = onnx_bytes(folder/"fp32.onnx")["FLOAT"]
    layers = sum(4*q.codes_NM.numel() for q in read_codes(folder/"int8.onnx")[:-1])
    assert in32 < layers + 4*n + 12_000  # so it is in the source
    assert onnx_bytes(folder/"int8.onnx")["INT8"] <= layers/4 + n + 100
    assert onnx_bytes(folder/"int4.onnx")["UINT8"] == (layers/4 + n)/2
    assert onnx_bytes(folder/"int4_table8.onnx")["UINT8"] == layers/8 + n


@pytest.mark.parametrize("family", [UntiedDecoder, GPT2, Decoder])  # of a table as small as this the exporter writes a turned copy
def test_other_decoders_convert(family, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra deploy is not installed")
    from llm_scratch.deployment import export_onnx
    model = filled(family(ModelConfig(72, context_len=40, n_layers=1, n_heads=2, n_kv_heads=2, d_model=32, d_ff=64, d_head=16)))
    export_onnx(model, tmp_path/"fp32.onnx")
    size = (tmp_path/"fp32.onnx").stat().st_size
    for name, convert in CONVERTERS.items():
        convert(tmp_path/"fp32.onnx", tmp_path/f"{name}.onnx")
        assert (tmp_path/f"{name}.onnx").stat().st_size < size
        assert kl_nats(said(model), opened(tmp_path/f"{name}.onnx")(IDS)).mean() < (.2 if "4" in name else .05), name
    twice = family is UntiedDecoder  # two tables, of which one is looked up only
    codes = sum(q.codes_NM.numel() for q in read_codes(tmp_path/"int4.onnx"))
    assert onnx_bytes(tmp_path/"int4.onnx")["UINT8"] == (codes + twice*72*32)/2


def test_what_does_not_fit_is_told_and_leaves_nothing(folder, tmp_path):
    (tmp_path/"broken.onnx").write_bytes((folder/"fp32.onnx").read_bytes()[:3000])
    (tmp_path/"empty.onnx").write_bytes(b"")
    for convert in (to_fp16, to_int8, to_int8_channels, to_int4):
        for name, why in (("none", "is missing"), ("broken", "damaged or foreign"), ("empty", "holds no graph")):
            with pytest.raises(UserError, match=why): convert(tmp_path/f"{name}.onnx", tmp_path/"x.onnx")
    for convert in (to_int8, to_int4):
        with pytest.raises(UserError, match="not quantised yet"): convert(folder/"int4.onnx", tmp_path/"x.onnx")
    for wrong in (dict(table_bits=5), dict(group=64), dict(group=7)):
        with pytest.raises(UserError, match="a table 32 wide"): to_int4(folder/"fp32.onnx", tmp_path/"x.onnx", **wrong)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.onnx", "empty.onnx"]


def test_without_the_extra_the_message_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"llm_scratch\[deploy\]"): to_int8(tmp_path/"a.onnx", tmp_path/"b.onnx")


def test_the_record_has_every_kind():
    record = json.loads((ROOT/"nbs"/"quantization.json").read_text(encoding="utf-8"))
    assert set(record["kinds"]) == {"fp32", *CONVERTERS, "int4_naive"}
    for name, k in record["kinds"].items():
        assert (k["bits_change"] is None) == (name == "fp32") and k["bytes"] > 0 and k["speed_low"] <= k["speed"] <= k["speed_high"]
    assert {row["n_bits"] for row in record["gptq"]} == {3, 4} and all(len(row["gptq"]) >= 3 for row in record["gptq"])


def test_the_benchmark_measures_all_of_it(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra deploy is not installed")
    done = subprocess.run([sys.executable, ROOT/"benchmarks"/"quantization.py", "--tiny", "--rounds", "1", "--out", tmp_path/"r.json"], capture_output=True, text=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    record, kept = json.loads((tmp_path/"r.json").read_text(encoding="utf-8")), json.loads((ROOT/"nbs"/"quantization.json").read_text(encoding="utf-8"))
    assert record.keys() == kept.keys() and {k: v.keys() for k, v in record["kinds"].items()} == {k: v.keys() for k, v in kept["kinds"].items()}

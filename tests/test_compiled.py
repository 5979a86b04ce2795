"The compiled step against PyTorch, NumPy and itself without Numba; and when it is taken."
import logging
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from llm_scratch.architecture import Attention, Block, Decoder, ModelConfig, SwiGLU, attend, init_weights
from llm_scratch.compiled import CompiledDecoder, as_float32, as_int8, loop_step, matvec, misfit, njit, numpy_step, stack_weights
from llm_scratch.families import GPT2, UntiedDecoder, llama_block
from llm_scratch.generation import Cache, generate, stream

CFG = ModelConfig(vocab_size=61, context_len=160, n_layers=3, n_heads=4, n_kv_heads=2, d_model=40, d_ff=72, d_head=10)
SHAPES = dict(base=CFG, one_kv_head=replace(CFG, n_kv_heads=1), every_head=replace(CFG, n_kv_heads=4), one_head=replace(CFG, n_heads=1, n_kv_heads=1, d_head=2),
              wide_heads=replace(CFG, n_heads=6, n_kv_heads=3, d_head=64, rope_theta=5e5, norm_eps=1e-3), odd_widths=replace(CFG, n_layers=1, d_model=33, d_ff=7, vocab_size=2))
each_shape = pytest.mark.parametrize("cfg", SHAPES.values(), ids=SHAPES)
each_step = pytest.mark.parametrize("step", [numpy_step, pytest.param(loop_step, marks=pytest.mark.skipif(njit is None, reason="there is no Numba here: pip install 'llm_scratch[fast]'"))],
                                    ids=["numpy", "numba"])


def filled(cfg, make=Decoder, **parts):
    "Every weight matters: new models have zero branches and norms of one."
    model, rng = init_weights(make(cfg, **parts), 0).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=rng) * (.3 if p.ndim == 1 else p.shape[1]**-.5))
    return model


def ids_of(cfg, n, seed=1): return torch.randint(cfg.vocab_size, (1, n), generator=torch.Generator().manual_seed(seed))


def one_by_one(model, ids, n_prompt=3):
    "Logits after every id behind the prompt."
    cache = Cache(model.cfg, 1, ids.shape[1])
    with torch.no_grad():
        if n_prompt: model(ids[:, :n_prompt], cache)
        return torch.cat([model(ids[:, i:i+1], cache) for i in range(n_prompt, ids.shape[1])], 1)


@each_shape
@each_step
def test_logits_are_the_models(cfg, step):
    model, ids = filled(cfg), ids_of(cfg, 40)
    ours = one_by_one(CompiledDecoder(model, step=step), ids)
    with torch.no_grad(): theirs = model(ids)[:, 3:]
    assert cfg.vocab_size == 2 or theirs.std() > .5  # or equality would say little
    assert_close(ours, theirs, atol=1e-4, rtol=0)


@each_step
def test_scores_that_exp_cannot_hold(step):
    "A trained norm may be large: e to the power of 100 is no float32."
    model, ids = filled(CFG), ids_of(CFG, 20)
    for layer in model.layers: layer.self_attn.q_norm.weight.data *= 60
    with torch.no_grad(): assert_close(one_by_one(CompiledDecoder(model, step=step), ids), model(ids)[:, 3:], atol=2e-3, rtol=0)


@each_step
def test_int8_is_the_model_with_rounded_weights(step):
    model, ids = filled(CFG), ids_of(CFG, 40)
    rounded = filled(CFG)
    with torch.no_grad():
        for name, p in rounded.named_parameters():
            if p.ndim == 2:
                whole, scale = as_int8(p.numpy())
                p.copy_(torch.from_numpy(whole*scale[:, None]))
        theirs = rounded(ids)
    ours = one_by_one(CompiledDecoder(model, convert=as_int8, step=step), ids, n_prompt=0)
    assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (ours-one_by_one(model, ids, n_prompt=0)).abs().max() > 1e-3  # and rounding shows


def test_int8_needs_a_quarter_of_the_bytes_and_no_weight_moves_more_than_half_a_step():
    big, small = (stack_weights(filled(CFG), convert) for convert in (as_float32, as_int8))
    for name in ("embed_VD", "qkv_LND", "o_LDN", "gate_up_LND", "down_LDF"): assert getattr(small, name).nbytes*4 == getattr(big, name).nbytes
    assert np.abs(big.qkv_LND - small.qkv_LND*small.qkv_scale_LN[..., None]).max() <= small.qkv_scale_LN.max()/2*1.0001
    assert (np.abs(small.qkv_LND.astype(int)).max(-1) == 127).all()  # all steps are used
    with np.errstate(all="raise"): whole, scale = as_int8(np.zeros((2, 3), np.float32))
    assert not whole.any() and np.isfinite(scale).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 9))
def test_matvec_of_any_shape(n, m, seed):
    rng = np.random.default_rng(seed)
    w, x, s, out = (rng.standard_normal(shape, dtype=np.float32) for shape in ((n, m), m, n, n))
    matvec(w, s, x, out)
    np.testing.assert_allclose(out, w@x*s, atol=1e-4)


@each_step
def test_text_is_the_models(step):
    model, prompt = filled(CFG), ids_of(CFG, 5)
    fast = CompiledDecoder(model, step=step)
    for dials in (dict(temperature=0), dict(temperature=.8, top_k=9)):
        texts = [list(torch.cat(list(stream(m, prompt, 90, rng=torch.Generator().manual_seed(3), **dials))).tolist()) for m in (fast, model)]
        assert texts[0] == texts[1] and len(set(texts[0])) > 3


def test_what_it_leaves_to_the_model():
    "A prompt, a batch, a call without a cache; and the error behind the last position is the model's."
    model = filled(CFG)
    fast, ids = CompiledDecoder(model), ids_of(CFG, 160)
    with torch.no_grad(): assert_close(fast(ids), model(ids), atol=0, rtol=0)
    two, cache = ids[:, :12].reshape(2, 6), Cache(CFG, 2, 8)
    assert fast(two, cache).shape == (2, 6, 61) and cache.past == 6 and fast(two[:, :1], cache).shape == (2, 1, 61)
    full = Cache(CFG, 1, 200)
    fast(ids, full)
    with pytest.raises(ValueError, match="161 positions do not fit into context_len=160"): fast(ids[:, :1], full)
    short = Cache(CFG, 1, 4)
    fast(ids[:, :4], short)
    with pytest.raises(ValueError, match="5 positions do not fit into a cache of max_len=4"): fast(ids[:, :1], short)


def bent(model, change):
    change(model)
    return model


MISFITS = dict(llama=(lambda: filled(CFG, block=llama_block), "q_norm"), untied=(lambda: filled(CFG, UntiedDecoder), "UntiedDecoder"),
               gpt2=(lambda: filled(replace(CFG, n_kv_heads=4), GPT2), "GPT2"), other_mix=(lambda: filled(CFG, block=partial(Block, attention=partial(Attention, mix=attend))), "self_attn"),
               other_gate=(lambda: filled(CFG, block=partial(Block, mlp=partial(SwiGLU, act=torch.relu))), "mlp"), biases=(lambda: filled(CFG, block=partial(Block, mlp=partial(SwiGLU, linear=nn.Linear))), "bias"),
               layer_norm=(lambda: filled(CFG, norm=nn.LayerNorm), "norm"), bfloat16=(lambda: filled(CFG).bfloat16(), "bfloat16"),
               hooks=(lambda: bent(filled(CFG), lambda m: m.norm.register_forward_hook(lambda *a: None)), "hooks"), no_model=(lambda: nn.Linear(2, 2), "Linear"))


@pytest.mark.parametrize("make, why", MISFITS.values(), ids=MISFITS)
def test_it_says_where_it_does_not_fit(make, why):
    model = make()
    assert why in misfit(model)
    with pytest.raises(ValueError, match="the compiled step does not fit"): CompiledDecoder(model)
    assert misfit(filled(CFG)) == ""


def test_generate_takes_it_for_one_long_text_and_says_so(caplog):
    model, prompt = filled(CFG), ids_of(CFG, 5)
    caplog.set_level(logging.INFO, "llm_scratch")
    for other in (lambda: generate(model, prompt, 99), lambda: generate(model, prompt.expand(2, -1), 100), lambda: generate(filled(CFG, block=llama_block), prompt, 100)):
        other()
        assert not caplog.records
    text = generate(model, prompt, 120, temperature=0)
    assert "CompiledDecoder(float32" in caplog.records[-1].getMessage()
    plain, cache = prompt, Cache(CFG, 1, 160)
    with torch.no_grad():
        for _ in range(120): plain = torch.cat((plain, model(plain[:, cache.past:], cache)[:, -1:].argmax(-1)), 1)
    assert text.tolist() == plain.tolist()


def test_later_updates_are_seen_by_generate():
    "Weights are copied for each text, not kept."
    model, prompt = filled(CFG), ids_of(CFG, 5)
    before = generate(model, prompt, 100, temperature=0)
    with torch.no_grad(): model.embed_tokens.weight.copy_(model.embed_tokens.weight.flip(0))
    assert generate(model, prompt, 100, temperature=0).tolist() != before.tolist()


def test_each_text_has_its_own_cache():
    model = filled(CFG)
    fast = CompiledDecoder(model)
    assert fast.step is (numpy_step if njit is None else loop_step)
    for seed in (1, 2):
        ids = ids_of(CFG, 20, seed)
        with torch.no_grad(): assert_close(one_by_one(fast, ids), model(ids)[:, 3:], atol=1e-4, rtol=0)


def test_a_compiled_decoder_keeps_the_weights_that_it_was_made_of():
    model, ids = filled(CFG), ids_of(CFG, 12)
    fast = CompiledDecoder(model)
    before = one_by_one(fast, ids, n_prompt=0)
    with torch.no_grad():
        for p in model.parameters(): p.zero_()
    assert_close(one_by_one(fast, ids, n_prompt=0), before, atol=0, rtol=0)


def test_without_numba_numpy_does_it():
    code = """
import sys
sys.modules["numba"] = None # an import of it fails
import torch
from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.compiled import CompiledDecoder, loop_step, njit, numpy_step
from llm_scratch.generation import Cache
model = Decoder(ModelConfig(vocab_size=31, context_len=20, n_layers=2, n_heads=2, n_kv_heads=1, d_model=16, d_ff=24, d_head=8))
for p in model.parameters(): p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))/4
fast, ids = CompiledDecoder(model), torch.arange(6)[None]
assert njit is None and fast.step is numpy_step and repr(fast) == "CompiledDecoder(float32, NumPy)"
for step in (numpy_step, loop_step): # the loops are plain Python then, and right as well
    cache, fast = Cache(model.cfg, 1, 20), CompiledDecoder(model, step=step)
    said = torch.cat([fast(ids[:, i:i+1], cache) for i in range(6)], 1)
    torch.testing.assert_close(said, model(ids).detach(), atol=1e-4, rtol=0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

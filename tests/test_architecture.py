"The decoder against transformers, and what belongs to no chapter: dtypes, autocast, files."
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llm_scratch.architecture import (Attention, Block, Decoder, ModelConfig, activation_bytes, attend, cache_bytes, flops_per_token, init_weights, load_model,
                                      n_params, save_model, training_flops_per_token)
from llm_scratch.core import UserError
from llm_scratch.generation import Cache

BASE = ModelConfig(vocab_size=131, context_len=64, n_layers=3, n_heads=4, n_kv_heads=2, d_model=40, d_ff=72, d_head=16)
SHAPES = dict(grouped=BASE, one_kv_head=replace(BASE, n_kv_heads=1), every_head=replace(BASE, n_kv_heads=4),
              long_clock=replace(BASE, rope_theta=1e6, norm_eps=1e-5), odd_widths=replace(BASE, n_heads=3, n_kv_heads=3, d_model=50, d_head=6))


def _filled(cfg: ModelConfig, seed: int = 0) -> Decoder:
    "A model of which every weight matters: new ones have zero branches and norms of one."
    model, rng = init_weights(Decoder(cfg), seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1 * torch.randn(p.shape, generator=rng))
    return model


def _ids(cfg: ModelConfig, *shape: int) -> torch.Tensor:
    return torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("cfg", SHAPES.values(), ids=SHAPES.keys())
def test_transformers_computes_the_same_logits(cfg, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, ids = _filled(cfg), _ids(cfg, 2, 64)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path/"model", eot_id=3), output_loading_info=True)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    with torch.no_grad(): ours, logits = model(ids), theirs(ids).logits
    assert ours.std() > .1  # or equality would say little
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)
    assert sum(p.numel() for p in theirs.parameters()) == n_params(cfg)


def test_transformers_reads_every_setting(tmp_path):
    transformers = pytest.importorskip("transformers")
    cfg = SHAPES["long_clock"]
    folder = save_model(_filled(cfg), tmp_path/"model", eot_id=3)
    config, generation = transformers.AutoConfig.from_pretrained(folder), transformers.GenerationConfig.from_pretrained(folder)
    assert config.rope_parameters == dict(rope_type="default", rope_theta=1e6)
    assert (config.rms_norm_eps, config.head_dim, config.num_key_value_heads, config.max_position_embeddings) == (1e-5, 16, 2, 64)
    assert config.tie_word_embeddings and config.dtype in (torch.float32, "float32")
    assert config.eos_token_id == generation.eos_token_id == 3


def test_saving_keeps_the_dtype_and_loading_keeps_the_random_numbers(tmp_path):
    model = _filled(BASE).bfloat16()
    save_model(model, tmp_path/"model", eot_id=0)
    torch.manual_seed(0); expected = torch.rand(1)
    torch.manual_seed(0); loaded = load_model(tmp_path/"model")
    assert torch.equal(torch.rand(1), expected)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and all(p.requires_grad for p in loaded.parameters())
    ids = _ids(BASE, 2, 20)
    assert loaded(ids).dtype == torch.float32 and torch.equal(loaded(ids), model(ids))
    assert json.loads((tmp_path/"model"/"config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_saving_again_replaces_the_folder_and_leaves_nothing_else(tmp_path):
    for seed in (0, 1): save_model(_filled(BASE, seed), tmp_path/"model", eot_id=0)
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
    ids = _ids(BASE, 1, 8)
    assert torch.equal(load_model(tmp_path/"model")(ids), _filled(BASE, 1)(ids))
    with pytest.raises(ValueError, match="eot_id=131 .* vocab_size=131"): save_model(_filled(BASE), tmp_path/"other", eot_id=131)
    assert not (tmp_path/"other").exists()


def _no_folder(f): return f/"nowhere"
def _no_manifest(f): (f/"manifest.json").unlink()
def _cut_manifest(f): (f/"manifest.json").write_text('{"format": "llm', encoding="utf-8")
def _foreign_manifest(f): (f/"manifest.json").write_text("{}", encoding="utf-8")
def _empty_manifest(f): (f/"manifest.json").write_text('{"format": "llm_scratch model", "sha256": {}}', encoding="utf-8")
def _no_weights(f): (f/"model.safetensors").unlink()
def _cut_weights(f): (f/"model.safetensors").write_bytes((f/"model.safetensors").read_bytes()[:-9])
def _other_config(f): (f/"config.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize("spoil, named", [(_no_folder, "nowhere"), (_no_manifest, "manifest.json"), (_cut_manifest, "manifest.json"),
    (_foreign_manifest, "manifest.json"), (_empty_manifest, "manifest.json"), (_no_weights, "model.safetensors"), (_cut_weights, "model.safetensors"), (_other_config, "config.json")])
def test_a_spoiled_folder_is_one_line_that_names_the_file(spoil, named, tmp_path):
    folder = save_model(_filled(BASE), tmp_path/"model", eot_id=0)
    folder = spoil(folder) or folder
    with pytest.raises(UserError) as e: load_model(folder)
    assert named in str(e.value) and "\n" not in str(e.value)


def test_autocast_trains():
    model, ids = _filled(BASE), _ids(BASE, 2, 20)
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16): rough = model(ids)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=.3, rtol=.1)
    rough.logsumexp(-1).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_same_seed_same_weights_and_each_matrix_its_own():
    a, b, c = (init_weights(Decoder(BASE), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["embed_tokens.weight"], c["embed_tokens.weight"])
    k, v = a["layers.0.self_attn.k_proj.weight"], a["layers.0.self_attn.v_proj.weight"]
    assert not torch.equal(k, v)
    assert not torch.equal(a["layers.0.mlp.up_proj.weight"], c["layers.0.mlp.gate_proj.weight"]), "seeds next to each other share matrices"


@pytest.mark.parametrize("cfg", SHAPES.values(), ids=SHAPES.keys())
def test_tiny_is_valid_small_and_keeps_the_vocabulary(cfg):
    tiny = cfg.tiny()
    assert tiny.vocab_size == cfg.vocab_size and flops_per_token(tiny, 64) <= 2**19 and Decoder(tiny)(_ids(cfg, 1, 4)).shape == (1, 4, 131)


# --- what it costs: formulas against counting ------------------------------------------------------------------------

_heads = st.tuples(st.integers(1, 3), st.integers(1, 3))
_configs = st.builds(lambda heads, half, **sizes: ModelConfig(context_len=64, n_heads=heads[0]*heads[1], n_kv_heads=heads[0], d_head=2*half, **sizes), heads=_heads, half=st.integers(1, 16),
                     vocab_size=st.integers(2, 300), n_layers=st.integers(1, 4), d_model=st.integers(1, 70), d_ff=st.integers(1, 90))
_few = settings(max_examples=25, deadline=None, derandomize=True)


def _kept(model: Decoder, batch_size: int, seq_len: int) -> int:
    "Bytes of all memory that autograd keeps for the backward pass, weights and tables of the model left out."
    ids, targets = (torch.zeros(batch_size, seq_len, dtype=torch.long) for _ in range(2))
    own, kept = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}, {}

    def keep(t):
        memory = t.untyped_storage()
        if memory._cdata not in own: kept[memory._cdata] = memory  # kept alive, so that no address is used twice
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    return sum(memory.nbytes() for memory in kept.values())


@_few
@given(_configs, st.integers(1, 3), st.integers(1, 64), st.sampled_from([torch.float32, torch.bfloat16]))
def test_activation_bytes_are_what_autograd_keeps(cfg, batch_size, seq_len, dtype):
    expected = activation_bytes(cfg, batch_size, seq_len, dtype.itemsize)
    assert _kept(Decoder(cfg).to(dtype), batch_size, seq_len) == pytest.approx(expected, rel=.01, abs=4)  # cross_entropy keeps one number more


@_few
@given(_configs, st.integers(1, 3), st.integers(1, 64))
def test_flops_are_what_pytorch_counts(cfg, batch_size, seq_len):
    model, ids = Decoder(cfg, block=partial(Block, attention=partial(Attention, mix=attend))), torch.zeros(batch_size, seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as forward: loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    with FlopCounterMode(display=False) as backward: loss.backward()
    assert forward.get_total_flops() == pytest.approx(ids.numel()*flops_per_token(cfg, seq_len), rel=.01)
    assert forward.get_total_flops() + backward.get_total_flops() == pytest.approx(ids.numel()*training_flops_per_token(cfg, seq_len), rel=.01)


@_few
@given(_configs, st.integers(1, 3), st.integers(1, 64))
def test_weights_and_cache_are_what_is_there(cfg, batch_size, seq_len):
    model, cache = Decoder(cfg), Cache(cfg, batch_size, seq_len)
    assert sum(p.numel() for p in model.parameters()) == n_params(cfg)
    with torch.no_grad(): model(torch.zeros(batch_size, seq_len, dtype=torch.long), cache)
    assert cache.k_LBGSK.nbytes + cache.v_LBGSK.nbytes == cache_bytes(cfg, batch_size, seq_len)


@pytest.mark.parametrize("cfg", [replace(BASE, d_model=768, n_heads=12, n_kv_heads=12, d_head=64, d_ff=2048, vocab_size=50257),
                                 replace(BASE, n_layers=4, n_heads=32, n_kv_heads=8, d_model=4096, d_ff=12288, d_head=128, vocab_size=151936)], ids=["GPT-2", "8B"])
def test_activation_bytes_at_published_widths(cfg):
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(): kept = _kept(Decoder(cfg), 2, 64)
    assert kept == pytest.approx(activation_bytes(cfg, 2, 64), rel=.01)

"Hugging Face folders both ways against transformers, on shapes drawn at random; and everything that a folder may ask for and we do not have."
import json
import os
import shutil
import struct
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from llm_scratch import interchange
from llm_scratch.architecture import Attention, Block, Decoder, Flat, ModelConfig, SwiGLU, load_model, save_model
from llm_scratch.core import UserError
from llm_scratch.families import (GPT2, MLP, BareEncoder, Encoder, EncoderDecoder, MoE, PlainAttention, PostBlock, ReadBlock, RelativeBias, UntiedDecoder, UntiedEncoderDecoder, WriteBlock,
                                  encoder_block, llama_block, window_attend)
from llm_scratch.interchange import FORMATS, HARMLESS, OFF, copy_tokenizer, find_tensors, load_hf, load_special_ids, respell, save_hf, split_shards

hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

BASE = ModelConfig(vocab_size=131, context_len=48, n_layers=2, n_heads=4, n_kv_heads=2, d_model=40, d_ff=72, d_head=10)
often = settings(max_examples=6, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])  # a failure is small as it is


def filled(model, seed=0):
    "Every weight matters: in new models biases are zero and norms one."
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.15*torch.randn(p.shape, generator=rng))
    return model.eval()


def ids_of(vocab_size, *shape, seed=9): return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def answer(model, vocab_size):
    "Logits, or hidden states where there is no head, of ours or of theirs."
    ids, source, is_text = ids_of(vocab_size, 2, 15), ids_of(vocab_size, 2, 17, seed=8), torch.arange(17) < torch.tensor([17, 12])[:,None]
    if isinstance(model, EncoderDecoder): return model(ids, source, is_text)
    if isinstance(model, Encoder): return torch.cat([model(source), model(source, is_text)[is_text][None].reshape(1, -1, model(source).shape[-1])[:, :17]])
    if not isinstance(model, hf.PreTrainedModel): return model(ids)
    if model.config.is_encoder_decoder: return model(source, attention_mask=is_text.long(), decoder_input_ids=ids).logits
    if model.config.model_type != "bert": return model(ids).logits
    say = lambda **kw: next(iter(model(source, **kw).values()))
    return torch.cat([say(), say(attention_mask=is_text.long())[is_text][None].reshape(1, -1, say().shape[-1])[:, :17]])


def close(ours, theirs):
    assert theirs.std() > .05  # or equality would say little
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def both_ways(theirs, folder):
    "What transformers saved opens here, what we save of it opens there, and all three answer alike."
    v = theirs.config.vocab_size
    filled(theirs).save_pretrained(folder/"theirs")
    model = load_hf(folder/"theirs")
    oracle = answer(theirs, v)
    close(answer(model, v), oracle)
    save_hf(model, folder/"ours", max_shard_bytes=20_000)
    again, said = type(theirs).from_pretrained(folder/"ours", output_loading_info=True)
    assert not said["mismatched_keys"] and not said["unexpected_keys"] and all("pooler" in k for k in said["missing_keys"]), said
    close(answer(again.eval(), v), oracle)
    close(answer(load_hf(folder/"ours"), v), oracle)
    return model


@pytest.fixture
def here(tmp_path): return tmp_path


def there(): return Path(tempfile.mkdtemp(dir=os.environ.get("PYTEST_SCRATCH")))


sizes = st.tuples(st.integers(20, 200), st.sampled_from([17, 40]), st.integers(1, 3))
heads = st.sampled_from([(1, 1), (2, 1), (4, 4), (4, 2), (6, 3), (6, 1)])
acts = st.sampled_from(["silu", "gelu", "gelu_new", "relu", "gelu_pytorch_tanh", "swish"])


def rotary(shape, heads, d_head, width, eps, theta): # fields that the three decoders share
    (vocab, places, layers), (H, G) = shape, heads
    return dict(vocab_size=vocab, max_position_embeddings=places, num_hidden_layers=layers, num_attention_heads=H, num_key_value_heads=G, hidden_size=H*width, intermediate_size=33, head_dim=d_head,
                rms_norm_eps=eps, rope_parameters=dict(rope_type="default", rope_theta=theta), bos_token_id=0, eos_token_id=1)


decoders = st.builds(rotary, sizes, heads, st.sampled_from([2, 6, 10, 16]), st.sampled_from([5, 8]), st.sampled_from([1e-6, 1e-3]), st.sampled_from([10000., 500., 5e5]))


@often
@given(decoders, acts, st.booleans(), st.booleans(), st.booleans())
def test_llama_both_ways(sizes, act, tied, bias, mlp_bias):
    with tempfile.TemporaryDirectory() as folder:
        model = both_ways(hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, hidden_act=act, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=mlp_bias)), Path(folder))
        assert type(model) is (Decoder if tied else UntiedDecoder) and isinstance(model.layers[0].self_attn.q_norm, nn.Identity)


@often
@given(decoders, acts, st.booleans(), st.booleans())
def test_qwen3_both_ways(sizes, act, tied, bias):
    with tempfile.TemporaryDirectory() as folder: both_ways(hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes, hidden_act=act, tie_word_embeddings=tied, attention_bias=bias)), Path(folder))


@often
@given(decoders, st.booleans(), st.sampled_from([(4, 2), (3, 1), (5, 5)]))
def test_qwen3_moe_both_ways(sizes, tied, experts):
    sizes = sizes | dict(hidden_size=8*sizes["num_attention_heads"])  # the kernel of transformers wants rows of 16 bytes
    config = hf.Qwen3MoeConfig(**sizes, tie_word_embeddings=tied, num_experts=experts[0], num_experts_per_tok=experts[1], moe_intermediate_size=20, norm_topk_prob=True)
    with tempfile.TemporaryDirectory() as folder: both_ways(hf.Qwen3MoeForCausalLM(config), Path(folder))


@often
@given(sizes, st.sampled_from([(1, 10), (2, 8), (5, 4)]), st.sampled_from([None, 33]), acts, st.sampled_from([1e-5, 1e-2]))
def test_gpt2_both_ways(shape, heads, inner, act, eps):
    vocab, places, layers = shape
    config = hf.GPT2Config(vocab_size=vocab, n_positions=places, n_layer=layers, n_head=heads[0], n_embd=heads[0]*heads[1], n_inner=inner, activation_function=act, layer_norm_epsilon=eps, bos_token_id=0, eos_token_id=1)
    with tempfile.TemporaryDirectory() as folder: assert type(both_ways(hf.GPT2LMHeadModel(config), Path(folder))) is GPT2


@often
@given(sizes, st.sampled_from([(1, 10), (2, 8), (5, 4)]), acts, st.integers(1, 3), st.sampled_from([1e-12, 1e-2]), st.booleans())
def test_bert_both_ways(shape, heads, act, n_types, eps, has_head):
    vocab, places, layers = shape
    config = hf.BertConfig(vocab_size=vocab, max_position_embeddings=places, num_hidden_layers=layers, num_attention_heads=heads[0], hidden_size=heads[0]*heads[1], intermediate_size=33, hidden_act=act,
                           type_vocab_size=n_types, layer_norm_eps=eps)
    with tempfile.TemporaryDirectory() as folder: assert type(both_ways((hf.BertForMaskedLM if has_head else hf.BertModel)(config), Path(folder))) is (Encoder if has_head else BareEncoder)


@often
@given(sizes, st.sampled_from([(1, 10), (2, 6), (3, 14)]), st.sampled_from(["relu", "gelu", "gated-gelu", "gated-silu", "gated-relu"]), st.sampled_from([(32, 128), (8, 20), (16, 13)]), st.sampled_from([True, False, "two tables"]))
def test_t5_both_ways(shape, heads, mlp, buckets, tied):
    vocab, _, layers = shape
    config = hf.T5Config(vocab_size=vocab, d_model=24, d_kv=heads[1], d_ff=33, num_layers=layers, num_heads=heads[0], feed_forward_proj=mlp, relative_attention_num_buckets=buckets[0],
                         relative_attention_max_distance=buckets[1], tie_word_embeddings=tied is True)
    theirs = hf.T5ForConditionalGeneration(config)
    if tied == "two tables": theirs.lm_head.weight = nn.Parameter(torch.randn(vocab, 24, generator=torch.Generator().manual_seed(3))/5)
    with tempfile.TemporaryDirectory() as folder: assert type(both_ways(theirs, Path(folder))) is (EncoderDecoder if tied is True else UntiedEncoderDecoder)

"Hugging Face folders both ways against transformers, on shapes drawn at random; and everything that a folder may ask for and we do not have."
import json
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
from models import filled

from llm_scratch import interchange
from llm_scratch.architecture import Attention, Block, Decoder, Flat, ModelConfig, SwiGLU, load_model, save_model
from llm_scratch.core import UserError
from llm_scratch.families import (GPT2, MLP, BareEncoder, Encoder, EncoderDecoder, MoE, PlainAttention, PostBlock, ReadBlock, RelativeBias, UntiedDecoder, UntiedEncoderDecoder, WriteBlock,
                                  encoder_block, llama_block, window_attend)
from llm_scratch.interchange import FORMATS, HARMLESS, HARMLESS_WHEN, copy_tokenizer, find_tensors, load_hf, load_special_ids, respell, save_hf, split_shards

hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

BASE = ModelConfig(vocab_size=131, context_len=48, n_layers=2, n_heads=4, n_kv_heads=2, d_model=40, d_ff=72, d_head=10)
often = settings(max_examples=5, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])  # a failure is small as it is


@pytest.fixture(autouse=True)
def _same_start(): torch.manual_seed(0)  # transformers draws its weights from the global generator


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
                         relative_attention_max_distance=buckets[1], tie_word_embeddings=tied is True, initializer_factor=.3)  # scores of about 1, which float32 holds to 1e-5
    theirs = hf.T5ForConditionalGeneration(config)
    if tied == "two tables": theirs.lm_head.weight = nn.Parameter(torch.randn(vocab, 24, generator=torch.Generator().manual_seed(3))/5)
    with tempfile.TemporaryDirectory() as folder: assert type(both_ways(theirs, Path(folder))) is (EncoderDecoder if tied is True else UntiedEncoderDecoder)


# --- what else folders look like ------------------------------------------------------------------------------------

LLAMA = dict(vocab_size=131, max_position_embeddings=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=40, intermediate_size=72, head_dim=10)
SMALL = dict(  # one small model of each architecture
    llama=lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    qwen3=lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA, tie_word_embeddings=True)),
    qwen3_moe=lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**LLAMA, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)),
    gpt2=lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=131, n_positions=48, n_embd=40, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)),
    bert=lambda: hf.BertForMaskedLM(hf.BertConfig(vocab_size=131, max_position_embeddings=48, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, intermediate_size=72)),
    bare_bert=lambda: hf.BertModel(hf.BertConfig(vocab_size=131, max_position_embeddings=48, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, intermediate_size=72)),
    t5=lambda: hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=131, d_model=40, d_kv=10, d_ff=72, num_layers=2, num_heads=4)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "Folders that transformers saved, by name."
    at = tmp_path_factory.mktemp("saved")
    for name, make in SMALL.items(): filled(make()).save_pretrained(at/name)
    return at


@pytest.fixture
def folder(saved, tmp_path):
    "A copy of such a folder, to spoil."
    def copy(name, _drop=(), **fields):
        at = tmp_path/f"{name}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(saved/name, at)
        config = json.loads((at/"config.json").read_text()) | fields
        (at/"config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in _drop}))
        return at
    return copy


def change_tensors(at, change):
    weights = load_file(at/"model.safetensors")
    change(weights)
    save_file(weights, at/"model.safetensors")
    return at


def plain(model): return answer(model, model.cfg.vocab_size)


@pytest.mark.parametrize("name", SMALL)
def test_missing_fields_mean_what_transformers_takes_them_for(name):
    "Every field that matters, one by one, against the class of transformers itself."
    config_of = dict(llama=hf.LlamaConfig, qwen3=hf.Qwen3Config, qwen3_moe=hf.Qwen3MoeConfig, gpt2=hf.GPT2Config, bert=hf.BertConfig, bare_bert=hf.BertConfig, t5=hf.T5Config)[name]
    fmt = FORMATS[list(SMALL).index(name)]
    said, theirs = interchange._understand(fmt, {}), config_of()
    for field, value in said.items():
        if field == "rope_theta": assert value == theirs.rope_parameters["rope_theta"]
        elif field == "n_inner": assert value == 4*theirs.n_embd and theirs.n_inner is None
        elif field == "n_positions" and name == "t5": assert not hasattr(theirs, field)  # no number of places in a T5
        elif field == "head_dim" and name == "qwen3_moe": assert value == theirs.hidden_size//theirs.num_attention_heads
        else: assert value == getattr(theirs, field), field


def usual(fmt): return interchange._understand(fmt, {fmt.sizes["n_layers"]: 2} | (dict(norm_topk_prob=True, num_experts=9) if fmt.model_type == "qwen3_moe" else {}))


def test_fields_that_matter_are_those_that_a_model_says_of_itself():
    for fmt in FORMATS:
        said = usual(fmt)
        assert interchange._fields(fmt, interchange._build(fmt, said)) == said
        assert not said.keys() & (HARMLESS | fmt.harmless) and not HARMLESS & HARMLESS_WHEN.keys()


@pytest.mark.parametrize("name, drop", [("llama", ["head_dim"]), ("llama", ["rope_parameters", "rms_norm_eps", "attention_bias", "mlp_bias", "hidden_act"]), ("gpt2", ["n_inner", "activation_function"]),
                                        ("bert", ["hidden_act", "layer_norm_eps", "type_vocab_size", "is_decoder"]), ("t5", ["dense_act_fn", "is_gated_act", "num_decoder_layers", "scale_decoder_outputs"])])
def test_a_folder_may_leave_out_what_is_usual(folder, saved, name, drop):
    assert torch.equal(plain(load_hf(folder(name, _drop=drop))), plain(load_hf(saved/name)))


def test_heads_may_be_left_out(tmp_path):
    filled(hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA | dict(num_key_value_heads=4)))).save_pretrained(tmp_path/"x")
    config = json.loads((tmp_path/"x"/"config.json").read_text())
    before = plain(load_hf(tmp_path/"x"))
    (tmp_path/"x"/"config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("num_key_value_heads", "head_dim")}))
    assert torch.equal(plain(load_hf(tmp_path/"x")), before)


@pytest.mark.parametrize("fields", [dict(rope_theta=500.), dict(rope_theta=500., rope_scaling=None), dict(rope_scaling=dict(type="default", rope_theta=500.)), dict(rope_parameters=dict(rope_theta=500.), rope_theta=500)])
def test_old_and_new_ways_to_say_the_base_of_the_rotation(folder, fields):
    at = folder("llama", _drop=[k for k in ["rope_parameters"] if k not in fields], **fields)
    model = load_hf(at)
    assert model.cfg.rope_theta == 500
    close(plain(model), answer(hf.LlamaForCausalLM.from_pretrained(at).eval(), 131))


def test_names_of_older_writers(folder, saved):
    "GPT-2 without its prefix, with masks and a copy of the tied table; BERT's norms with gamma and beta, its pooler, its second head, and its table of places."
    def openai(w):
        for k in list(w): w[k.removeprefix("transformer.")] = w.pop(k)
        w |= {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "h.1.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": w["wte.weight"].clone()}
    def google(w):
        for k in list(w): w[k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = w.pop(k)
        w |= {"bert.pooler.dense.weight": torch.ones(40, 40), "cls.seq_relationship.bias": torch.ones(2), "bert.embeddings.position_ids": torch.arange(48)[None],
              "cls.predictions.decoder.weight": w["bert.embeddings.word_embeddings.weight"].clone(), "cls.predictions.decoder.bias": w["cls.predictions.bias"].clone()}
    for name, change in (("gpt2", openai), ("bert", google)):
        assert torch.equal(plain(load_hf(change_tensors(folder(name), change))), plain(load_hf(saved/name)))
    with_prefix = change_tensors(folder("bare_bert"), lambda w: w.update({f"bert.{k}": w.pop(k) for k in list(w)}))
    assert torch.equal(plain(load_hf(with_prefix)), plain(load_hf(saved/"bare_bert")))


def test_t5_whose_tables_are_one_though_it_does_not_scale(tmp_path):
    theirs = filled(hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=131, d_model=40, d_kv=10, d_ff=72, num_layers=2, num_heads=4, tie_word_embeddings=False)))
    theirs.save_pretrained(tmp_path/"x")
    assert "lm_head.weight" not in find_tensors(tmp_path/"x")
    model = load_hf(tmp_path/"x")
    assert type(model) is UntiedEncoderDecoder and torch.equal(model.lm_head.weight, model.embed_tokens.weight)
    model.lm_head.weight.data.zero_()
    assert model.embed_tokens.weight.std() > .5  # they are two now
    save_hf(model, tmp_path/"y")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kind_of_number_stays(saved, tmp_path, dtype):
    half = load_hf(saved/"llama").to(dtype)
    save_hf(half, tmp_path/"half")
    again = load_hf(tmp_path/"half")
    assert {p.dtype for p in again.parameters()} == {dtype} and again.cos.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(half.state_dict().values(), again.state_dict().values()))
    assert json.loads((tmp_path/"half"/"config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path/"half").dtype == dtype


@pytest.mark.parametrize("name", SMALL)
def test_what_was_opened_can_be_trained_and_leaves_its_file_alone(saved, name):
    torch.manual_seed(5)
    before, state = (saved/name/"model.safetensors").read_bytes(), torch.get_rng_state()
    model = load_hf(saved/name)
    assert torch.equal(torch.get_rng_state(), state)  # opening draws no random numbers
    assert not model.training and all(p.requires_grad and not p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    args = (ids_of(131, 2, 9),) * (2 if name == "t5" else 1)
    model(*args).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters(): p -= .1 * (0 if p.grad is None else p.grad) + .01
    assert (saved/name/"model.safetensors").read_bytes() == before


# --- refused by name --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, fields, words", [
    ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=8.)), "rope_scaling={'rope_type': 'llama3'"),
    ("llama", dict(rope_parameters=dict(rope_type="yarn", factor=4., rope_theta=1e4)), "rope_parameters={'rope_type': 'yarn'"),
    ("qwen3", dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=.5)), "partial_rotary_factor"),
    ("llama", dict(rope_scaling=4), "rope_scaling=4"),
    ("llama", dict(rope_theta=77.), "rope_theta=77"),
    ("llama", dict(hidden_act="quick_gelu"), "activation 'quick_gelu' is not known: gelu, gelu_new, relu, silu are"),
    ("llama", dict(hidden_act=["silu"]), "config.json"),
    ("llama", dict(logit_scale=.5), "logit_scale=0.5 is not known for llama"),
    ("llama", dict(quantization_config=dict(bits=4)), "quantization_config={'bits': 4}"),
    ("llama", dict(sliding_window=16), "sliding_window=16"),
    ("llama", dict(partial_rotary_factor=.5), "partial_rotary_factor=0.5"),
    ("llama", dict(is_decoder=True), "is_decoder=True"),
    ("llama", dict(num_hidden_layers=0), "n_layers=0"),
    ("llama", dict(num_attention_heads=0), "config.json"),
    ("llama", dict(num_hidden_layers="two"), "config.json"),
    ("llama", dict(num_key_value_heads=3), "n_kv_heads=3"),
    ("qwen3", dict(use_sliding_window=True), "use_sliding_window=True"),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "layer_types=['full_attention', 'sliding_attention']"),
    ("qwen3_moe", dict(norm_topk_prob=False), "norm_topk_prob=False"),
    ("qwen3_moe", dict(norm_topk_prob=None), "norm_topk_prob=False"),
    ("qwen3_moe", dict(mlp_only_layers=[0]), "mlp_only_layers=[0]"),
    ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step=2"),
    ("qwen3_moe", dict(num_experts=4), "num_experts=4 and num_local_experts=3"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights=False"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", dict(reorder_and_upcast_attn=True), "reorder_and_upcast_attn=True"),
    ("gpt2", dict(tie_word_embeddings=False), "tie_word_embeddings=False"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention=True"),
    ("gpt2", dict(n_head=3), "n_embd=40 is not a multiple of n_head=3"),
    ("bert", dict(position_embedding_type="relative_key"), "position_embedding_type='relative_key'"),
    ("bert", dict(is_decoder=True), "is_decoder=True"),
    ("bert", dict(tie_word_embeddings=False), "tie_word_embeddings=False"),
    ("bert", dict(pruned_heads={"0": [1]}), "pruned_heads"),
    ("t5", dict(num_decoder_layers=3), "num_decoder_layers=3"),
    ("t5", dict(dense_act_fn="gelu"), "feed_forward_proj='relu'"),
    ("t5", dict(feed_forward_proj="gated-silu"), "feed_forward_proj='gated-silu'"),
    ("t5", dict(is_gated_act=True), "feed_forward_proj='relu'"),
    ("t5", dict(is_decoder=True), "is_decoder=True"),
    ("llama", dict(architectures=["LlamaForSequenceClassification"]), "architectures ['LlamaForSequenceClassification']: load_hf opens LlamaForCausalLM"),
    ("llama", dict(architectures="LlamaForCausalLM"), "load_hf opens"),
    ("llama", dict(architectures=[]), "load_hf opens"),
    ("llama", dict(model_type="mistral"), "model_type 'mistral'"),
])
def test_a_field_that_would_make_another_model(folder, name, fields, words):
    with pytest.raises(UserError) as e: load_hf(folder(name, **fields))
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name, fields", [("llama", dict(attention_dropout=.5, pretraining_tp=2, quantization_config=None, is_decoder=False, pad_token_id=7)), ("gpt2", dict(n_ctx=1, attn_pdrop=.9, task_specific_params={})),
                                          ("bert", dict(position_embedding_type="absolute", hidden_dropout_prob=.9, directionality="bidi", pruned_heads={})), ("qwen3", dict(sliding_window=4, max_window_layers=0)),
                                          ("qwen3_moe", dict(intermediate_size=1, router_aux_loss_coef=9.)), ("t5", dict(n_positions=512, dropout_rate=.9, output_past=True, num_beams=4))])
def test_a_field_that_changes_nothing(folder, saved, name, fields):
    at = folder(name, **fields)
    assert torch.equal(plain(load_hf(at)), plain(load_hf(saved/name)))


def without(key): return lambda w: w.pop(key)
def plus(key, *shape): return lambda w: w.update({key: torch.ones(shape)})
def cut(key): return lambda w: w.update({key: w[key][1:].contiguous()})


@pytest.mark.parametrize("name, change, words", [
    ("llama", without("model.layers.1.self_attn.k_proj.weight"), "the tensor model.layers.1.self_attn.k_proj.weight is missing"),
    ("llama", without("lm_head.weight"), "the tensor lm_head.weight is missing"),
    ("llama", plus("model.layers.1.self_attn.k_proj.bias", 20), "the tensor model.layers.1.self_attn.k_proj.bias is not a part"),
    ("llama", plus("model.layers.2.input_layernorm.weight", 40), "the tensor model.layers.2.input_layernorm.weight is not a part"),
    ("llama", cut("model.embed_tokens.weight"), "the tensor model.embed_tokens.weight has shape (130, 40), not (131, 40)"),
    ("qwen3", plus("lm_head.weight", 131, 40), "the tensor lm_head.weight differs from model.embed_tokens.weight"),
    ("qwen3", without("model.layers.0.self_attn.q_norm.weight"), "q_norm.weight is missing"),
    ("qwen3_moe", without("model.layers.0.mlp.experts.2.up_proj.weight"), "experts.2.up_proj.weight is missing"),
    ("gpt2", lambda w: w.update({"transformer.h.0.attn.c_attn.weight": w["transformer.h.0.attn.c_attn.weight"].t().contiguous()}), "the tensor transformer.h.0.attn.c_attn.weight has shape (120, 40), not (40, 120)"),
    ("gpt2", without("transformer.h.1.mlp.c_fc.bias"), "the tensor transformer.h.1.mlp.c_fc.bias is missing"),
    ("bert", without("cls.predictions.bias"), "the tensor cls.predictions.bias is missing"),
    ("bare_bert", plus("cls.predictions.bias", 131), "the tensor cls.predictions.bias is not a part"),
    ("gpt2", plus("wte.weight", 131, 40), "the tensor transformer.wte.weight is there twice"),
    ("t5", plus("lm_head.weight", 131, 40), "the tensor lm_head.weight differs from shared.weight"),
    ("t5", without("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"), "relative_attention_bias.weight is missing"),
    ("llama", lambda w: w.update({"model.norm.weight": w["model.norm.weight"].double()}), "torch.float32, torch.float64"),
    ("llama", lambda w: w.update({k: p.to(torch.int8) for k, p in w.items()}), "torch.int8"),
])
def test_a_tensor_that_would_make_another_model(folder, name, change, words):
    with pytest.raises(UserError) as e: load_hf(change_tensors(folder(name), change))
    assert words in str(e.value) and "\n" not in str(e.value)


class Trap:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return Path.touch, (self.mark,)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_pickle_is_refused_and_not_opened(folder, tmp_path, file):
    import pickle
    at = folder("llama")
    (at/"model.safetensors").unlink()
    (at/file).write_bytes(pickle.dumps(Trap(tmp_path/"sprung")))
    with pytest.raises(UserError, match=f"a pickle only .{file}., and opening a pickle can run any program"): load_hf(at)
    assert not (tmp_path/"sprung").exists()
    pickle.loads((at/file).read_bytes())
    assert (tmp_path/"sprung").exists()  # the trap was one


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(UserError, match="is not a folder"): load_hf(tmp_path/"nowhere")
    (tmp_path/"empty").mkdir()
    with pytest.raises(UserError, match="config.json is missing"): load_hf(tmp_path/"empty")
    at = folder("llama")
    (at/"model.safetensors").unlink()
    with pytest.raises(UserError, match="has no model.safetensors"): load_hf(at)
    for raw in (b"", b"PK\x03\x04 no tensors", struct.pack("<Q", 2**60) + b"{}"):
        (at/"model.safetensors").write_bytes(raw)
        with pytest.raises(UserError, match="model.safetensors is not safetensors"): load_hf(at)
    for text in ("[]", "{", "7"):
        (at/"config.json").write_text(text)
        with pytest.raises(UserError, match="config.json"): load_hf(at)


def test_a_file_that_ends_early(folder):
    at = folder("gpt2")
    raw = (at/"model.safetensors").read_bytes()
    (at/"model.safetensors").write_bytes(raw[:-100])
    with pytest.raises(UserError, match="is not safetensors, it is damaged"): load_hf(at)


# --- several files ----------------------------------------------------------------------------------------------------

@often
@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_shards_hold_everything_once_in_order(lengths, room):
    tensors = {f"t{i}": torch.zeros(n, dtype=torch.uint8) for i, n in enumerate(lengths)}
    shards = split_shards(tensors, room)
    assert [k for shard in shards for k in shard] == list(tensors)
    full = [sum(p.nbytes for p in shard.values()) for shard in shards]
    assert all(shard for shard in shards) and all(size <= room or len(shard) == 1 for size, shard in zip(full, shards))
    assert all(size + next(iter(after.values())).nbytes > room for size, after in zip(full, shards[1:]))  # no file ends before it must
    with pytest.raises(ValueError, match="max_shard_bytes=0"): split_shards(tensors, 0)


@pytest.fixture
def shards(saved, tmp_path): return save_hf(load_hf(saved/"llama"), tmp_path/"shards", max_shard_bytes=30_000)


def test_shards_of_transformers_open(tmp_path):
    theirs = filled(SMALL["llama"]())
    theirs.save_pretrained(tmp_path/"x", max_shard_size="30KB")
    assert len(list((tmp_path/"x").glob("*.safetensors"))) > 3
    close(plain(load_hf(tmp_path/"x")), answer(theirs, 131))


def test_one_file_has_no_index(saved, shards, tmp_path):
    one = save_hf(load_hf(shards), tmp_path/"one")
    assert sorted(p.name for p in one.iterdir()) == ["config.json", "model.safetensors"]
    save_hf(load_hf(one), shards)  # a model's folder is replaced, and no file of the old one stays
    assert sorted(p.name for p in shards.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("change, words", [
    (lambda m: m.pop("model.norm.weight"), "says that model.norm.weight is in None"),
    (lambda m: m.update({"model.extra": next(iter(m.values()))}), "says that model.extra is in"),
    (lambda m: m.update({"model.norm.weight": next(iter(m.values()))}), "says that model.norm.weight is in model-00001"),
    (lambda m: m.update({"model.norm.weight": "../elsewhere.safetensors"}), "has no weight_map from tensors to files of its folder"),
    (lambda m: m.update({"model.norm.weight": 7}), "has no weight_map"),
])
def test_an_index_that_lies(shards, change, words):
    index = json.loads((shards/"model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (shards/"model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=words): load_hf(shards)


def test_a_shard_that_is_missing_or_an_index_that_is_none(shards):
    (shards/"model-00003-of-00006.safetensors").unlink()
    with pytest.raises(UserError, match="model-00003-of-00006.safetensors is missing, model.safetensors.index.json lists it"): load_hf(shards)
    (shards/"model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="has no weight_map"): load_hf(shards)


# --- saving -----------------------------------------------------------------------------------------------------------

class Other(Decoder): pass


def block(cfg, layer, **parts): return Block(cfg, layer, **parts)


def made(kind, cfg=BASE, **parts): return kind(cfg, block=partial(block, **parts))


WIDE = replace(BASE, n_kv_heads=4)


@pytest.mark.parametrize("make, words", [
    (lambda: made(Decoder, attention=partial(Attention, mix=partial(window_attend, window=4))), "layers.0.self_attn.mix is window_attend(window=4), not fused_attend"),
    (lambda: Decoder(BASE, block=encoder_block), "layers.0.self_attn.mix is see_all"),
    (lambda: made(Decoder, attention=PlainAttention), "layers.0.self_attn is PlainAttention, not Attention"),
    (lambda: made(Decoder, mlp=partial(SwiGLU, act=torch.tanh)), "layers.0.mlp.act is tanh"),
    (lambda: made(Decoder, norm=nn.LayerNorm), "input_layernorm is LayerNorm, not RMSNorm"),
    (lambda: Decoder(BASE, block=lambda cfg, i: Block(cfg, i, mlp=SwiGLU if i else MLP)), "layers.0.mlp is MLP"),
    (lambda: Decoder(BASE, block=lambda cfg, i: Block(cfg, i, mlp=MLP if i else SwiGLU)), "layers.1.mlp is MLP"),
    (lambda: Decoder(BASE, block=lambda cfg, i: Block(cfg, i, attention=partial(Attention, linear=nn.Linear if i else Flat))), "self_attn.q_proj"),
    (lambda: made(Decoder, mlp=partial(SwiGLU, linear=nn.Linear)), "for qwen3, layers.0.mlp"),
    (lambda: Decoder(replace(BASE, n_heads=3, n_kv_heads=1, d_model=40), block=llama_block), "for llama, hidden_size=40 is not a multiple of num_attention_heads=3"),
    (lambda: GPT2(BASE), "self_attn.k_proj.out_features is 20, not 40"),
    (lambda: GPT2(replace(WIDE, d_head=12)), "for gpt2, layers.0.self_attn.d_head is 12, not 10"),
    (lambda: Encoder(WIDE, block=partial(PostBlock, mlp=partial(MLP, act=F_relu))), "act is relu, not gelu"),
    (lambda: EncoderDecoder(WIDE, write_block=partial(WriteBlock, mlp=partial(SwiGLU, linear=Flat))), "for t5, "),
    (lambda: EncoderDecoder(WIDE, bias=lambda n, buckets: RelativeBias(n, buckets, 16 if "past" in buckets.__name__ else 32)), "write_bias"),
    (lambda: EncoderDecoder(WIDE, read_block=partial(ReadBlock, mlp=partial(MLP, act=F_relu, linear=nn.Linear))), "up_proj.bias"),
    (lambda: Other(BASE), "no family can hold this Other: save_hf knows BareEncoder, Decoder"),
    (lambda: made(Decoder, mlp=partial(MoE, n_experts=3, top_k=2, expert=MLP)), "experts.0 is MLP, not SwiGLU"),
])
def test_a_model_that_no_family_can_hold(tmp_path, make, words):
    with pytest.raises(UserError) as e: save_hf(make(), tmp_path/"x")
    assert words in str(e.value) and "\n" not in str(e.value) and "0x" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


F_relu = torch.nn.functional.relu


def test_a_part_that_was_exchanged_later_is_seen(saved, tmp_path):
    model = load_hf(saved/"qwen3")
    model.layers[1].self_attn.mix = partial(window_attend, window=3)
    with pytest.raises(UserError, match="layers.1.self_attn.mix is window_attend"): save_hf(model, tmp_path/"x")


def test_saving_is_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    model, at = load_hf(saved/"gpt2"), tmp_path/"x"
    save_hf(model, at, special_ids=dict(bos_token_id=3))
    before = {p.name: p.read_bytes() for p in at.iterdir()}
    def full(*a, **kw): raise OSError("no space left")
    monkeypatch.setattr(interchange, "save_file", full)
    with pytest.raises(OSError, match="no space left"): save_hf(model, at)
    with pytest.raises(OSError, match="no space left"): save_hf(model, tmp_path/"y")
    assert {p.name: p.read_bytes() for p in at.iterdir()} == before and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_of_something_else_is_not_replaced(saved, tmp_path):
    (tmp_path/"letters").mkdir()
    save_hf(load_hf(saved/"bert"), tmp_path/"letters")  # empty is fine
    shutil.rmtree(tmp_path/"letters")
    (tmp_path/"letters").mkdir()
    (tmp_path/"letters"/"dear.txt").write_text("Dear")
    (tmp_path/"file").write_text("x")
    for name in ("letters", "file"):
        with pytest.raises(UserError, match="is there and is no model's folder"): save_hf(load_hf(saved/"bert"), tmp_path/name)
    assert (tmp_path/"letters"/"dear.txt").read_text() == "Dear" and (tmp_path/"file").read_text() == "x"


def test_special_ids_are_written_and_read(saved, tmp_path):
    model = load_hf(saved/"t5")
    ids = dict(eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)
    at = save_hf(model, tmp_path/"x", special_ids=ids)
    assert load_special_ids(at) == ids
    theirs = hf.T5ForConditionalGeneration.from_pretrained(at)
    assert theirs.generation_config.decoder_start_token_id == 0 and theirs.config.eos_token_id == 1
    assert load_special_ids(save_hf(model, tmp_path/"y")) == {}
    assert load_special_ids(save_hf(model, tmp_path/"y", special_ids=dict(eos_token_id=[1, 9]))) == dict(eos_token_id=[1, 9])
    for bad in (dict(eos_token_id=131), dict(eos_token_id=-1), dict(eos_token_id=[1, 131]), dict(unk_token_id=1)):
        with pytest.raises(ValueError, match=next(iter(bad))): save_hf(model, tmp_path/"z", special_ids=bad)


def test_what_transformers_writes_about_special_ids_is_read(tmp_path):
    (tmp_path/"config.json").write_text(json.dumps(dict(bos_token_id=1, eos_token_id=2, pad_token_id=None)))
    (tmp_path/"generation_config.json").write_text(json.dumps(dict(eos_token_id=[2, 9], temperature=.6)))
    assert load_special_ids(tmp_path) == dict(bos_token_id=1, eos_token_id=[2, 9])


def test_the_books_own_folder_opens_too(tmp_path):
    model = filled(Decoder(BASE))
    save_model(model, tmp_path/"own", eot_id=5)
    assert torch.equal(plain(load_hf(tmp_path/"own")), plain(load_model(tmp_path/"own")))
    assert load_special_ids(tmp_path/"own")["eos_token_id"] == 5
    hf_dir = save_hf(model, tmp_path/"hf")
    close(answer(hf.AutoModelForCausalLM.from_pretrained(hf_dir).eval(), 131), plain(model))
    assert hf.AutoConfig.from_pretrained(hf_dir).model_type == "qwen3"


def test_tokenizer_files_travel(tmp_path):
    for name in ("from", "to"): (tmp_path/name).mkdir()
    with pytest.raises(UserError, match="has no tokenizer"): copy_tokenizer(tmp_path/"from", tmp_path/"to")
    (tmp_path/"from"/"tokenizer.json").write_text("{}")
    (tmp_path/"from"/"vocab.txt").write_text("a\nb\n")
    (tmp_path/"from"/"model.safetensors").write_text("no tokenizer")
    assert copy_tokenizer(tmp_path/"from", tmp_path/"to") == ["tokenizer.json", "vocab.txt"]
    assert sorted(p.name for p in (tmp_path/"to").iterdir()) == ["tokenizer.json", "vocab.txt"] and (tmp_path/"to"/"vocab.txt").read_text() == "a\nb\n"


def test_names_are_told_apart():
    "No two of our tensors get one name, but those that GPT-2 fuses."
    for fmt in FORMATS:
        model = interchange._build(fmt, usual(fmt))
        fused = [ours for ours in interchange._layout(fmt, model).values() if len(ours) > 1]
        assert all("gpt2" == fmt.model_type and [o.split(".")[3] for o in ours] == ["q_proj", "k_proj", "v_proj"] for ours in fused)
    assert respell("layers.11.self_attn.v_proj.bias", interchange.GPT2_NAMES) == "transformer.h.11.attn.c_attn.bias"


def test_vectors_of_sentences_do_not_hear_the_filling(saved):
    model, ids = load_hf(saved/"bare_bert"), ids_of(131, 2, 12)
    is_text = torch.arange(12) < torch.tensor([12, 5])[:,None]
    vectors = interchange.sentence_vectors(model, ids, is_text)
    with torch.no_grad(): short = model(ids[1:,:5])[0].mean(0)
    assert_close(vectors[1], short/short.norm(), atol=1e-5, rtol=1e-5)
    assert torch.equal(vectors, interchange.sentence_vectors(model, ids.masked_fill(~is_text, 7), is_text))

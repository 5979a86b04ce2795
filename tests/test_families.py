"The families against transformers, weights copied over by name, and their laws on random shapes."
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from models import filled

from llm_scratch.architecture import Attention, Block, Decoder, ModelConfig, attend, init_weights
from llm_scratch.families import (GPT2, Encoder, EncoderDecoder, MoE, RelativeBias, UntiedDecoder, UntiedEncoderDecoder, WriteCache, balance_loss, both_buckets, encoder_block, gate_scores, llama_block,
                                  past_buckets, rewrite, route, start_t5, window_attend)
from llm_scratch.generation import Cache

BASE = ModelConfig(vocab_size=131, context_len=48, n_layers=3, n_heads=4, n_kv_heads=4, d_model=40, d_ff=72, d_head=10)
EVERY_HEAD = dict(base=BASE, one_head=replace(BASE, n_heads=1, n_kv_heads=1, d_head=40), narrow=replace(BASE, n_heads=5, n_kv_heads=5, d_head=8, d_ff=33, norm_eps=1e-4),
                  one_layer=replace(BASE, n_layers=1, d_model=24, n_heads=2, n_kv_heads=2, d_head=12))  # H*K = D, as GPT-2 and BERT want
GROUPED = dict(base=replace(BASE, n_kv_heads=2), one_kv_head=replace(BASE, n_kv_heads=1), wide_heads=replace(BASE, d_head=16, rope_theta=5e5, norm_eps=1e-5), every_head=BASE)
each_head, grouped = (pytest.mark.parametrize("cfg", shapes.values(), ids=shapes.keys()) for shapes in (EVERY_HEAD, GROUPED))


def ids_of(cfg, *shape, seed=9): return torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def load(theirs, weights, ties=()):
    "Put our weights under their names; every name must be known, and none may be missing but those tied to another."
    report = theirs.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) <= set(ties), report
    return theirs.eval()


def renamed(model, *pairs):
    "Our weights with parts of their names exchanged, in the order given."
    out = {}
    for name, p in model.state_dict().items():
        for ours, theirs in pairs: name = name.replace(ours, theirs)
        out[name] = p
    return out


def llama_sizes(cfg):
    return dict(vocab_size=cfg.vocab_size, max_position_embeddings=cfg.context_len, num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads,
                hidden_size=cfg.d_model, intermediate_size=cfg.d_ff, head_dim=cfg.d_head, rms_norm_eps=cfg.norm_eps, rope_parameters=dict(rope_type="default", rope_theta=cfg.rope_theta),
                tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def close(ours, theirs, least=.1):
    assert ours.std() > least  # or equality would say little
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture
def hf(): return pytest.importorskip("transformers")


# --- decoders ----------------------------------------------------------------------------------------------------

def gpt2_weights(model):
    w = model.state_dict()
    out = {"transformer.wte.weight": w["embed_tokens.weight"], "transformer.wpe.weight": w["embed_positions.weight"], "transformer.ln_f.weight": w["norm.weight"], "transformer.ln_f.bias": w["norm.bias"]}
    for i in range(model.cfg.n_layers):
        ours, theirs = f"layers.{i}.", f"transformer.h.{i}."
        for kind in ("weight", "bias"):
            turn = lambda *names: torch.cat([w[f"{ours}{n}.{kind}"] for n in names]).t()  # their matrices stand the other way round
            out |= {f"{theirs}ln_1.{kind}": w[f"{ours}input_layernorm.{kind}"], f"{theirs}ln_2.{kind}": w[f"{ours}post_attention_layernorm.{kind}"],
                    f"{theirs}attn.c_attn.{kind}": turn("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), f"{theirs}attn.c_proj.{kind}": turn("self_attn.o_proj"),
                    f"{theirs}mlp.c_fc.{kind}": turn("mlp.up_proj"), f"{theirs}mlp.c_proj.{kind}": turn("mlp.down_proj")}
    return out


@each_head
def test_gpt2(hf, cfg):
    model, ids = filled(GPT2(cfg)), ids_of(cfg, 2, 48)
    theirs = load(hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=cfg.vocab_size, n_positions=cfg.context_len, n_embd=cfg.d_model, n_layer=cfg.n_layers, n_head=cfg.n_heads, n_inner=cfg.d_ff,
                                                   layer_norm_epsilon=cfg.norm_eps, bos_token_id=0, eos_token_id=0)), gpt2_weights(model), ["lm_head.weight"])
    with torch.no_grad(): close(model(ids), theirs(ids).logits)


@grouped
def test_llama(hf, cfg):
    model, ids = filled(Decoder(cfg, block=llama_block)), ids_of(cfg, 2, 48)
    theirs = load(hf.LlamaForCausalLM(hf.LlamaConfig(**llama_sizes(cfg))), {f"model.{n}": p for n, p in model.state_dict().items()}, ["lm_head.weight"])
    with torch.no_grad(): close(model(ids), theirs(ids).logits)


@grouped
def test_qwen3(hf, cfg):
    model, ids = filled(Decoder(cfg)), ids_of(cfg, 2, 48)
    theirs = load(hf.Qwen3ForCausalLM(hf.Qwen3Config(**llama_sizes(cfg))), {f"model.{n}": p for n, p in model.state_dict().items()}, ["lm_head.weight"])
    with torch.no_grad(): close(model(ids), theirs(ids).logits)


def test_untied_llama(hf):
    cfg = GROUPED["base"]
    model, ids = filled(UntiedDecoder(cfg, block=llama_block)), ids_of(cfg, 2, 48)
    weights = {n if n.startswith("lm_head") else f"model.{n}": p for n, p in model.state_dict().items()}
    theirs = load(hf.LlamaForCausalLM(hf.LlamaConfig(**llama_sizes(cfg) | dict(tie_word_embeddings=False))), weights)
    with torch.no_grad(): close(model(ids), theirs(ids).logits)


def windowed_block(cfg, layer, window): return Block(cfg, layer, attention=partial(Attention, mix=partial(window_attend, window=window), norm=torch.nn.Identity))


@pytest.mark.parametrize("window", [1, 5, 48])
def test_mistral_has_the_same_window(hf, window):
    cfg = GROUPED["base"]
    model, ids = filled(Decoder(cfg, block=partial(windowed_block, window=window))), ids_of(cfg, 2, 48)
    theirs = load(hf.MistralForCausalLM(hf.MistralConfig(**llama_sizes(cfg), sliding_window=window)), {f"model.{n}": p for n, p in model.state_dict().items()}, ["lm_head.weight"])
    with torch.no_grad(): close(model(ids), theirs(ids).logits)


def moe_block(cfg, layer, n_experts, top_k): return Block(cfg, layer, mlp=partial(MoE, n_experts=n_experts, top_k=top_k))


def moe_weights(model):
    "Their experts lie one behind the other in two tensors, gate above up."
    w = {f"model.{n}": p for n, p in model.state_dict().items() if ".experts." not in n}
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}.mlp.experts."
        w[at+"gate_up_proj"] = torch.stack([torch.cat((e.gate_proj.weight, e.up_proj.weight)) for e in layer.mlp.experts])
        w[at+"down_proj"] = torch.stack([e.down_proj.weight for e in layer.mlp.experts])
    return w


@pytest.mark.parametrize("n_experts, top_k", [(8, 2), (4, 1), (5, 5), (3, 2)])
def test_qwen3_moe_and_its_balance(hf, n_experts, top_k):
    cfg = GROUPED["base"]
    model, ids = filled(Decoder(cfg, block=partial(moe_block, n_experts=n_experts, top_k=top_k))), ids_of(cfg, 2, 48)
    config = hf.Qwen3MoeConfig(**llama_sizes(cfg), num_experts=n_experts, num_experts_per_tok=top_k, moe_intermediate_size=cfg.d_ff, norm_topk_prob=True, mlp_only_layers=[], decoder_sparse_step=1)
    theirs = load(hf.Qwen3MoeForCausalLM(config), moe_weights(model), ["lm_head.weight"])
    with torch.no_grad(), gate_scores(model) as scores: ours = model(ids)
    with torch.no_grad(): out = theirs(ids, output_router_logits=True)
    close(ours, out.logits)
    assert len(scores) == cfg.n_layers
    assert_close(balance_loss(torch.cat(scores), top_k), out.aux_loss)


def test_listening_ends_with_the_block():
    cfg = GROUPED["base"]
    model = Decoder(cfg, block=partial(moe_block, n_experts=4, top_k=2))
    with pytest.raises(ZeroDivisionError), gate_scores(model) as scores: 1/0
    model(ids_of(cfg, 1, 4))
    assert scores == [] and not any(m._forward_hooks for m in model.modules())


# --- the encoder --------------------------------------------------------------------------------------------------

BERT = [("embed_tokens", "bert.embeddings.word_embeddings"), ("embed_positions", "bert.embeddings.position_embeddings"), ("embed_types", "bert.embeddings.token_type_embeddings"),
        ("self_attn.q_proj", "attention.self.query"), ("self_attn.k_proj", "attention.self.key"), ("self_attn.v_proj", "attention.self.value"), ("self_attn.o_proj", "attention.output.dense"),
        ("attn_norm", "attention.output.LayerNorm"), ("mlp.up_proj", "intermediate.dense"), ("mlp.down_proj", "output.dense"), ("mlp_norm", "output.LayerNorm"),
        ("layers.", "bert.encoder.layer."), ("head_proj", "cls.predictions.transform.dense"), ("head_norm", "cls.predictions.transform.LayerNorm"), ("head_bias", "cls.predictions.bias")]


@each_head
def test_bert(hf, cfg):
    model, ids = filled(Encoder(cfg)), ids_of(cfg, 3, 30)
    weights = renamed(model, *BERT)
    weights |= {n.replace("norm.", "bert.embeddings.LayerNorm."): weights.pop(n) for n in ("norm.weight", "norm.bias")}
    config = hf.BertConfig(vocab_size=cfg.vocab_size, max_position_embeddings=cfg.context_len, hidden_size=cfg.d_model, num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads,
                           intermediate_size=cfg.d_ff, layer_norm_eps=cfg.norm_eps, type_vocab_size=2)
    theirs = load(hf.BertForMaskedLM(config), weights, ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"])
    is_text = torch.arange(30) < torch.tensor([30, 21, 7])[:,None]
    types = (torch.arange(30) > 11).long().expand(3, 30)
    with torch.no_grad():
        close(model(ids), theirs(ids).logits)
        out = theirs(ids, attention_mask=is_text.long(), token_type_ids=types, output_hidden_states=True)
        close(model.hidden(ids, is_text, types)[is_text], out.hidden_states[-1][is_text])
        close(model(ids, is_text, types)[is_text], out.logits[is_text])


# --- the reader that writes -----------------------------------------------------------------------------------------

T5 = [("embed_tokens", "shared"), ("readers.", "encoder.block."), ("writers.", "decoder.block."), ("read_norm", "encoder.final_layer_norm"), ("write_norm", "decoder.final_layer_norm"),
      ("read_bias.embed_distance", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"), ("write_bias.embed_distance", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
      (".self_attn.", ".layer.0.SelfAttention."), (".attn_norm", ".layer.0.layer_norm"), (".cross_attn.", ".layer.1.EncDecAttention."), (".cross_norm", ".layer.1.layer_norm"),
      ("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "o")]


def t5_weights(model):
    out = renamed(model, *T5)
    for name in list(out):
        place = 1 if name.startswith("encoder.") else 2
        new = name.replace(".mlp_norm", f".layer.{place}.layer_norm").replace(".mlp.up_proj", f".layer.{place}.DenseReluDense.wi").replace(".mlp.down_proj", f".layer.{place}.DenseReluDense.wo")
        out[new] = out.pop(name)
    return out


@pytest.mark.parametrize("cfg", [*EVERY_HEAD.values(), replace(BASE, d_head=16, context_len=200)], ids=[*EVERY_HEAD, "wide_heads"])
def test_t5(hf, cfg):
    model, S = filled(EncoderDecoder(cfg)), 190 if cfg.context_len == 200 else 40  # 190: beyond the last distance bucket
    source, ids = ids_of(cfg, 3, S), ids_of(cfg, 3, S-3, seed=8)
    config = hf.T5Config(vocab_size=cfg.vocab_size, d_model=cfg.d_model, d_kv=cfg.d_head, d_ff=cfg.d_ff, num_layers=cfg.n_layers, num_heads=cfg.n_heads, layer_norm_epsilon=cfg.norm_eps)
    theirs = load(hf.T5ForConditionalGeneration(config), t5_weights(model), ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
    is_text = torch.arange(S) < torch.tensor([S, S-5, 7])[:,None]
    with torch.no_grad():
        close(model(ids, source), theirs(source, decoder_input_ids=ids).logits)
        close(model(ids, source, is_text), theirs(source, attention_mask=is_text.long(), decoder_input_ids=ids).logits)


def test_untied_t5(hf):
    cfg = BASE
    model, source, ids = filled(UntiedEncoderDecoder(cfg)), ids_of(cfg, 3, 40), ids_of(cfg, 3, 37, seed=8)
    theirs = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=cfg.vocab_size, d_model=cfg.d_model, d_kv=cfg.d_head, d_ff=cfg.d_ff, num_layers=cfg.n_layers, num_heads=cfg.n_heads,
                                                       layer_norm_epsilon=cfg.norm_eps, tie_word_embeddings=False, scale_decoder_outputs=False))
    theirs.lm_head.weight = nn.Parameter(torch.empty(cfg.vocab_size, cfg.d_model))  # transformers makes one table of the two unless the file has both
    load(theirs, t5_weights(model), ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
    with torch.no_grad(): close(model(ids, source), theirs(source, decoder_input_ids=ids).logits)


@pytest.mark.parametrize("make", [UntiedDecoder, UntiedEncoderDecoder])
def test_a_table_of_its_own_starts_small(make):
    assert abs(make(replace(BASE, d_model=256, n_heads=8, n_kv_heads=8, d_head=32)).lm_head.weight.std() - .02) < .001


def test_buckets_are_those_of_t5(hf):
    from transformers.models.t5.modeling_t5 import T5Attention
    at = torch.arange(-300, 301)
    for n, far in ((32, 128), (16, 50), (8, 20)):
        assert torch.equal(both_buckets(at, n, far), T5Attention._relative_position_bucket(at, True, n, far))
        assert torch.equal(past_buckets(at, n, far), T5Attention._relative_position_bucket(at, False, n, far))


# --- laws ---------------------------------------------------------------------------------------------------------

DECODERS = dict(gpt2=GPT2, llama=partial(Decoder, block=llama_block), moe=partial(Decoder, block=partial(moe_block, n_experts=4, top_k=2)), window=partial(Decoder, block=partial(windowed_block, window=9)))


@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS.keys())
def test_the_future_moves_nothing(make):
    model, ids = filled(make(BASE)), ids_of(BASE, 2, 20)
    other = ids.clone()
    other[:,11] = (other[:,11]+1) % BASE.vocab_size
    with torch.no_grad(): moved = (model(ids)-model(other)).abs().amax((0, 2))
    assert moved[:11].max() < 1e-5 and moved[11] > 1e-3


@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS.keys())
def test_a_cache_changes_no_answer(make):
    model, ids = filled(make(BASE)), ids_of(BASE, 2, 20)
    cache = Cache(BASE, 2, 20)
    with torch.no_grad():
        pieces = [model(piece, cache) for piece in ids.split([7, 1, 1, 11], 1)]
        assert_close(torch.cat(pieces, 1), model(ids), atol=1e-5, rtol=1e-5)


def test_gpt2_has_a_small_vector_for_every_place_and_for_no_other():
    model, ids, cache = GPT2(BASE), ids_of(BASE, 1, 49), Cache(BASE, 1, 60)
    assert .015 < model.embed_positions.weight.std() < .025
    with torch.no_grad():
        for _ in range(4): model(ids[:,:12], cache)
        for text, held in ((ids, None), (ids[:,:1], cache)):
            with pytest.raises(ValueError, match="49 positions do not fit into context_len=48: there is no vector for them"): model(text, held)


def test_an_encoder_hears_both_sides_and_no_filling():
    model, modern, ids = filled(Encoder(BASE)), filled(Decoder(BASE, block=encoder_block)), ids_of(BASE, 2, 20)
    other = ids.clone()
    other[:,11] = (other[:,11]+1) % BASE.vocab_size
    is_text = (torch.arange(20) != 11).expand(2, 20)
    with torch.no_grad():
        assert (model(ids)-model(other)).abs().amax((0, 2)).gt(1e-3).all()
        assert (modern(ids)-modern(other)).abs().amax((0, 2)).gt(1e-3).all()
        moved = (model(ids, is_text)-model(other, is_text)).abs().amax((0, 2))
        assert moved[torch.arange(20) != 11].max() == 0
        assert_close(model(ids, (torch.arange(20) < 13).expand(2, 20))[:,:13], model(ids[:,:13]), atol=1e-5, rtol=1e-5)


def test_a_writer_hears_the_source_and_its_own_past():
    model, ids, source = filled(EncoderDecoder(BASE)), ids_of(BASE, 2, 20), ids_of(BASE, 2, 15, seed=7)
    change = lambda x, at: torch.where(torch.arange(x.shape[1]) == at, (x+1) % BASE.vocab_size, x)
    is_text = (torch.arange(15) < 9).expand(2, 15)
    with torch.no_grad():
        moved = (model(ids, source)-model(change(ids, 11), source)).abs().amax((0, 2))
        assert moved[:11].max() < 1e-5 and moved[11] > 1e-3
        assert (model(ids, source)-model(ids, change(source, 3))).abs().amax((0, 2)).gt(1e-3).all()
        assert (model(ids, source, is_text)-model(ids, change(source, 12), is_text)).abs().max() == 0
        assert_close(model(ids, source, is_text), model(ids, source[:,:9]), atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from([EncoderDecoder, UntiedEncoderDecoder]), st.booleans())
def test_a_writers_cache_changes_no_answer(parts, make, filled_up):
    cfg, n = replace(BASE, n_kv_heads=2), sum(parts)
    model, source, ids = filled(make(cfg)), ids_of(cfg, 2, 15), ids_of(cfg, 2, n, seed=3)
    is_text = torch.arange(15) < torch.tensor([15, 9])[:,None] if filled_up else None
    with torch.no_grad():
        seen, cache = model.read(source, is_text), WriteCache(n)
        got = torch.cat([model.write(part, seen, is_text, cache) for part in ids.split(parts, 1)], 1)
        assert_close(got, model(ids, source, is_text), atol=1e-5, rtol=1e-5)
        assert cache.past == n
        with pytest.raises(ValueError, match=f"{n+1} positions do not fit into a cache of max_len={n}"): model.write(ids[:,:1], seen, is_text, cache)
        cache.past = parts[0]  # take the rest back and write something else
        other = ids.flip(1)[:,:n-parts[0]]
        if other.shape[1]: assert_close(model.write(other, seen, is_text, cache), model(torch.cat((ids[:,:parts[0]], other), 1), source, is_text)[:,parts[0]:], atol=1e-5, rtol=1e-5)


def test_a_source_is_made_keys_and_values_once():
    model, source, rows, graphs = filled(EncoderDecoder(BASE)), ids_of(BASE, 2, 15), [], []
    model.readers[0].register_forward_hook(lambda m, given, out: graphs.append(out.requires_grad))
    for layer in model.writers:
        layer.cross_attn.v_proj.register_forward_hook(lambda m, given, out: rows.append(("read", given[0].shape[1])))
        layer.self_attn.v_proj.register_forward_hook(lambda m, given, out: rows.append(("written", given[0].shape[1])))
    rewrite(model, source, start_id=0, end_id=-5, max_new_tokens=7)
    assert sorted(rows) == [("read", 15)]*3 + [("written", 1)]*21 and graphs == [False]


@pytest.mark.parametrize("T, past", [(1, 0), (1, 30), (5, 17), (40, 160)])
def test_a_bias_for_new_rows_is_the_end_of_the_whole(T, past):
    for buckets in (past_buckets, both_buckets):
        bias = filled(RelativeBias(4, buckets))
        with torch.no_grad(): assert torch.equal(bias(T, past), bias(past+T)[:,:,past:])


ALL = DECODERS | dict(encoder=Encoder, modern_encoder=partial(Decoder, block=encoder_block), encoder_decoder=EncoderDecoder)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_a_gradient_reaches_every_weight(make):
    model, ids = filled(make(BASE)), ids_of(BASE, 4, 48)
    out = model(ids, ids.flip(1)) if isinstance(model, EncoderDecoder) else model(ids, None, ids % 2) if isinstance(model, Encoder) else model(ids)
    out.square().logsumexp(-1).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_new_models_are_almost_sure_of_nothing(make):
    "Biases start at zero, and the first loss is near that of a uniform guess."
    torch.manual_seed(0)
    model, ids = make(BASE), ids_of(BASE, 4, 48)
    assert all(p.abs().max() == 0 for n, p in model.named_parameters() if n.endswith("bias"))
    logits = model(ids[:,:-1], ids) if isinstance(model, EncoderDecoder) else model(ids[:,:-1])
    assert abs(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:,1:].flatten()) - torch.tensor(131.).log()) < .5
    assert all(torch.equal(a, b) for a, b in zip(init_weights(make(BASE), 3).state_dict().values(), init_weights(make(BASE), 3).state_dict().values()))


@pytest.mark.parametrize("T, S, window, G", [(12, 12, 4, 2), (5, 12, 3, 1), (1, 9, 4, 4), (12, 12, 99, 2), (3, 12, 1, 2)])
def test_a_window_is_attention_with_more_hidden(T, S, window, G):
    rng = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, n, length, 8, generator=rng) for n, length in ((4, T), (G, S), (G, S)))
    ours = window_attend(q, k, v, window=window)
    for t in range(T):  # the last query of a text that ends there and begins with the window
        end = S-T+t+1
        begin = max(0, end-window)
        assert_close(ours[:,:,t:t+1], attend(q[:,:,t:t+1], k[:,:,begin:end], v[:,:,begin:end]))


@pytest.mark.parametrize("n_layers, window", [(1, 4), (2, 4), (3, 3), (3, 1)])
def test_how_far_a_window_reaches_through_layers(n_layers, window):
    cfg = replace(BASE, n_layers=n_layers)
    model, ids = filled(Decoder(cfg, block=partial(windowed_block, window=window))), ids_of(cfg, 1, 20)
    other = ids.clone()
    other[:,2] = (other[:,2]+1) % cfg.vocab_size
    with torch.no_grad(): moved = (model(ids)-model(other)).abs().amax((0, 2)) > 1e-7
    reach = n_layers*(window-1)
    assert moved.tolist() == [2 <= t <= 2+reach for t in range(20)]


def test_routing_by_hand():
    share, expert = route(torch.tensor([[0., 3., 1.], [2., 0., 2.5]]), 2)
    assert expert.tolist() == [[1, 2], [2, 0]]
    assert_close(share[0,0], 1/(1+torch.tensor(-2.).exp()))
    assert_close(share.sum(1), torch.ones(2))
    with pytest.raises(ValueError, match="top_k=3 of n_experts=2"): MoE(BASE, n_experts=2, top_k=3)


def test_equal_experts_are_one_expert():
    torch.manual_seed(0)
    moe, x = filled(MoE(BASE, n_experts=5, top_k=3)), torch.randn(2, 6, BASE.d_model)
    for e in moe.experts: e.load_state_dict(moe.experts[0].state_dict())
    assert_close(moe(x), moe.experts[0](x))


def test_balance_goes_from_even_to_one_for_all():
    even = torch.eye(4).repeat(3, 1)*20
    assert_close(balance_loss(even, 1), torch.tensor(1.))
    assert_close(balance_loss(torch.tensor([[20., 0, 0, 0]]).repeat(9, 1), 1), torch.tensor(4.), atol=1e-4, rtol=0)


def test_an_answer_ends_where_it_says_and_is_the_likeliest():
    model, source, is_text = filled(EncoderDecoder(BASE)), ids_of(BASE, 3, 12), torch.arange(12) < torch.tensor([12, 9, 4])[:,None]
    free = rewrite(model, source, is_text, start_id=0, end_id=-5, max_new_tokens=10)  # an end that never comes
    with torch.no_grad(): again = model(torch.cat((torch.zeros(3, 1, dtype=torch.int64), free[:,:-1]), 1), source, is_text).argmax(-1)
    assert torch.equal(free, again)
    end = free[0,4].item()
    ended = rewrite(model, source, is_text, start_id=0, end_id=end, max_new_tokens=10)
    for row, stop in zip(free.tolist(), ended.tolist()):
        cut = row.index(end) if end in row else 10
        assert stop == row[:cut] + [end]*(10-cut)


def test_scores_start_alike_whatever_their_scale():
    cfg = replace(BASE, d_model=256, n_heads=8, n_kv_heads=8, d_head=32)
    model, x = start_t5(EncoderDecoder(cfg), 0), torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(1))
    layer = model.readers[0].self_attn
    with torch.no_grad(): score = layer.heads(layer.q_proj(x)) @ layer.heads(layer.k_proj(x)).mT * layer.scale
    assert layer.scale == 1 and .8 < score.std() < 1.25
    assert abs(model.embed_tokens.weight.norm(dim=1).mean() - 1) < .05
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), start_t5(EncoderDecoder(cfg), 0).state_dict().values()))


def test_too_long_a_text_is_one_line():
    ids = ids_of(BASE, 1, 49)
    for make in (GPT2, Encoder):
        with pytest.raises(ValueError, match="49 positions do not fit into context_len=48"): make(BASE)(ids)

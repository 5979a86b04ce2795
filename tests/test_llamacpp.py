"GGUF both ways: weights, sizes and vocabularies come back, llama.cpp says the same text, and what is not understood is refused by name."
import json
import random
from dataclasses import replace
from functools import partial
from http.client import HTTPConnection
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Rust

from llm_scratch import llamacpp
from llm_scratch.architecture import Attention, Block, Decoder, ModelConfig, RMSNorm, SwiGLU, init_weights
from llm_scratch.core import UserError
from llm_scratch.families import GPT2, MoE, UntiedDecoder, encoder_block, llama_block, window_attend
from llm_scratch.generation import generate
from llm_scratch.llamacpp import gguf_name, halve_rows, interleave_rows, load_gguf, read_gguf, save_gguf, write_modelfile
from llm_scratch.tokenization import PATTERN, Tokenizer, save_tokenizer, to_tokenizers_json, train_bpe

gguf = pytest.importorskip("gguf", reason="GGUF wants the extra interchange")
TEXT = ["Mix the flour and 250 ml of milk. Don't stir!\n\n1. Bake it for 20 minutes.\n2. Let it rest.\n", "Ingredients:\n- 2 eggs\n- 100 g sugar\n- 1 1/2 cups of cream\n", "Crème brûlée, 漢字 and 👍👍 "]*3
TOK = train_bpe(TEXT, 300)
JSON = to_tokenizers_json(TOK)
CFG = ModelConfig(vocab_size=300, context_len=96, n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ff=64, d_head=8)
HALF = [i for i, b in enumerate(TOK.token_bytes) if "\ufffd" in b.decode("utf-8", errors="replace")]
SHAPES = {"qwen3": (Decoder, Block), "qwen3 untied": (UntiedDecoder, Block), "llama": (Decoder, llama_block), "llama untied": (UntiedDecoder, llama_block)}
SIZES = {"grouped": {}, "one head of keys": dict(n_kv_heads=1), "as many as queries": dict(n_kv_heads=4), "heads of 10": dict(d_head=10), "heads of 2": dict(d_head=2), "odd widths": dict(d_model=36, d_ff=52, d_head=6),
         "other constants": dict(rope_theta=5e5, norm_eps=1e-5, context_len=80)}


def made(shape, seed=0, **sizes):
    "A model in which every weight matters, whose scores lie far apart, and which says no half characters: llama.cpp's server would wait for the rest of them."
    make, block = SHAPES[shape]
    model, rng = init_weights(make(replace(CFG, **sizes), block=block), seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.25*torch.randn(p.shape, generator=rng))
        getattr(model, "lm_head", model.embed_tokens).weight[HALF] = 0
    return model


@pytest.fixture(params=SHAPES)
def shape(request): return request.param


class Llama:
    "llama.cpp's server in this process, on one thread, with keys and values in float32."
    def __init__(self, path):
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp itself wants the extra dev")
        p = xllamacpp.CommonParams()
        p.model.path, p.n_ctx, p.verbosity, p.ui = str(path), 0, -1, False
        p.warmup = p.fit_params = False
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(p)
        self.at = urlsplit(self.server.listening_address).netloc

    def ask(self, what, **question):
        line = HTTPConnection(self.at, timeout=60)
        try:
            line.request("POST", what, json.dumps(question))
            return json.loads(line.getresponse().read())
        finally: line.close()

    def __enter__(self):
        self.ask("/completion", prompt="a", n_predict=0)  # a server that is ended before its loop runs hangs in C++, where no limit of time reaches; this goes through the loop, /tokenize does not
        return self

    def __exit__(self, *_): del self.server  # ends its threads


def n_threads()->int:
    import psutil
    return psutil.Process().num_threads()


# --- there and back ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", SIZES)
def test_f32_comes_back_bit_by_bit(tmp_path, shape, sizes):
    model = made(shape, **SIZES[sizes])
    again, tokenizer = load_gguf(save_gguf(model, JSON, tmp_path/"m.gguf", dtype="f32"))
    assert type(again) is type(model) and again.cfg == model.cfg and tokenizer == JSON
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys()
    for name, p in model.state_dict().items(): assert torch.equal(p, weights[name]), name
    ids = torch.arange(40)[None]
    with torch.no_grad(): torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0)


@pytest.mark.parametrize("dtype, bits", [("f16", 16), ("bf16", 16), ("q8_0", 8.5), ("q5_1", 6), ("q4_1", 5)])
def test_packed_types_come_back_as_the_library_unpacks_them(tmp_path, shape, dtype, bits):
    model = made(shape)
    path = save_gguf(model, JSON, tmp_path/"m.gguf", dtype=dtype)
    again, kind = load_gguf(path)[0].state_dict(), gguf.GGMLQuantizationType[dtype.upper()]
    for name, p in model.state_dict().items():
        if p.ndim == 1: assert torch.equal(again[name], p), name
        elif "q_proj" in name or "k_proj" in name: assert 0 < (again[name]-p).abs().max() < .1  # rows change places, blocks are rows: same packing, checked below
        else: assert again[name].numpy().tolist() == gguf.dequantize(gguf.quantize(p.numpy(), kind), kind).tolist(), name
        if p.ndim == 2: assert torch.equal(again[name], torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(p.numpy(), kind), kind)))), name
    matrices = [t for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2]
    assert sum(int(t.n_bytes) for t in matrices)*8 == bits*sum(int(t.n_elements) for t in matrices)


def test_the_other_reader_sees_what_was_meant(tmp_path):
    cfg = replace(CFG, rope_theta=1234., norm_eps=1e-5, n_kv_heads=1)
    reader = gguf.GGUFReader(save_gguf(Decoder(cfg), JSON, tmp_path/"m.gguf", dtype="q8_0", name="A name"))
    said = {key: f.contents() for key, f in reader.fields.items()}
    assert said == read_gguf(tmp_path/"m.gguf")[0] | {key: said[key] for key in ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")}
    expected = {"context_length": 96, "block_count": 2, "embedding_length": 32, "feed_forward_length": 64, "attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 8,
                "attention.value_length": 8, "rope.dimension_count": 8, "rope.freq_base": 1234., "vocab_size": 300}
    assert {key: said[f"qwen3.{key}"] for key in expected} == expected
    assert said["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert said["general.name"] == "A name" and said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert said["tokenizer.ggml.bos_token_id"] == said["tokenizer.ggml.eos_token_id"] == TOK.eot_id and said["tokenizer.ggml.add_bos_token"] is True
    assert [t for t, kind in zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]) if kind == 3] == list(TOK.specials)
    assert {t.tensor_type.name for t in reader.tensors} == {"F32", "Q8_0"}


def test_a_folder_of_save_tokenizer_will_do(tmp_path):
    save_tokenizer(TOK, tmp_path/"tokenizer")
    one, two = (save_gguf(made("qwen3"), t, tmp_path/f"{i}.gguf") for i, t in enumerate((JSON, tmp_path/"tokenizer")))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(UserError, match="give a folder of save_tokenizer"): save_gguf(made("qwen3"), tmp_path/"nowhere", tmp_path/"m.gguf")


@pytest.mark.parametrize("heads, K", [(1, 2), (3, 6), (4, 10)])
def test_rows_change_places_and_back(heads, K):
    w = torch.randn(heads*K, 5)
    turned = interleave_rows(w, K)
    for h in range(heads):
        for i in range(K//2):
            assert torch.equal(turned[h*K+2*i], w[h*K+i]) and torch.equal(turned[h*K+2*i+1], w[h*K+i+K//2])
    assert torch.equal(halve_rows(turned, K), w)


# --- what llama.cpp says -------------------------------------------------------------------------------------------

PROMPTS = ["", "Mix", "Bake it ", "1. ", "- 2 eggs\n", "Don't", "Crème", "漢", "👍", "Let it rest.\n\n", "100 g", "sugar and", "\n\n", "Ingredients:\n-", "stir!", "of", "  ", "Q", "0", "milk. Bake"]


def greedy(model, ids, n):
    "Ours, ended where llama.cpp ends a text: it knows `<|im_end|>` by name."
    stops = [[TOK.special_ids[s]] for s in ("<|endoftext|>", "<|im_end|>")]
    return generate(model, torch.tensor([ids]), n, temperature=0, stops=stops)[0, len(ids):].tolist()


@pytest.mark.parametrize("sizes", ["grouped", "one head of keys", "heads of 2", "heads of 10", "odd widths", "other constants"])
def test_llamacpp_says_the_same_twenty_texts(tmp_path, shape, sizes):
    model = made(shape, **SIZES[sizes])
    with Llama(save_gguf(model, JSON, tmp_path/"m.gguf", dtype="f32")) as llama:
        said = set()
        for prompt in PROMPTS:
            ids = [TOK.eot_id, *TOK.encode(prompt)]
            answer = llama.ask("/completion", prompt=prompt or [TOK.eot_id], n_predict=8, temperature=0, n_probs=5, return_tokens=True, cache_prompt=False)
            assert answer["tokens"] == greedy(model, ids, 8), prompt
            with torch.no_grad(): logp = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            for t in answer["completion_probabilities"][0]["top_logprobs"]: assert t["logprob"] == pytest.approx(logp[t["id"]].item(), abs=1e-4)
            said.add(tuple(answer["tokens"]))
        assert len(said) > 5  # the texts differ, so equality says something


@pytest.mark.parametrize("dtype, apart", [("f16", .02), ("q8_0", .3)])
def test_llamacpp_reads_packed_types(tmp_path, shape, dtype, apart):
    "llama.cpp rounds what it multiplies packed weights with, so scores are near, not equal."
    with Llama(save_gguf(made(shape), JSON, tmp_path/"m.gguf", dtype=dtype)) as llama:
        model = load_gguf(tmp_path/"m.gguf")[0]
        for prompt in PROMPTS[1:]:
            answer = llama.ask("/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=5, cache_prompt=False)
            with torch.no_grad(): logp = model(torch.tensor([[TOK.eot_id, *TOK.encode(prompt)]]))[0, -1].log_softmax(-1)
            for t in answer["completion_probabilities"][0]["top_logprobs"]: assert t["logprob"] == pytest.approx(logp[t["id"]].item(), abs=apart)


def test_the_server_is_gone_afterwards(tmp_path):
    path = save_gguf(made("llama"), JSON, tmp_path/"m.gguf")
    with Llama(path): pass  # threads that stay for good start with the first
    before = n_threads()
    with Llama(path) as llama: at, during = llama.at, n_threads()
    assert during > before and n_threads() <= before
    with pytest.raises(OSError): HTTPConnection(at, timeout=5).request("GET", "/health")


# --- vocabularies --------------------------------------------------------------------------------------------------

PIECES = ["a", "B", "the", "ß", "é", "e\u0301", "ſ", "K", "漢字", "あ", "👩‍👩‍👧", "'", "'s", "'LL", "'Re", "'ſ", "don't", " ", "  ", "   ", "\n", "\r\n", "\r", "\t", "1", "22", "4444", "½", "٣", "²", "Ⅷ", "_", "-", "...", "#", "\u00a0",
          "\u2003", "\u200b", "\u2028", "\x00", "\x1c", "\x85", "ﬁ", "İ", "ǅ", "\ufeff", "𝔘", "한국", "ไทย", "עברית", "<|", "|>"]


def strings(n):
    dice = random.Random(0)
    return ["", *TEXT[:3], *("".join(dice.choices(PIECES, k=dice.randint(1, 12))) for _ in range(n))]


def under(pre, tok=TOK):
    saved = to_tokenizers_json(tok)
    return llamacpp._tokenizer_json(saved["model"]["vocab"], saved["model"]["merges"], saved["added_tokens"], pre)


@pytest.mark.parametrize("pre", llamacpp._SPLITS)
def test_every_known_split_is_that_of_llamacpp(tmp_path, pre):
    saved = under(pre)
    path = save_gguf(made("qwen3"), saved, tmp_path/"m.gguf")
    assert read_gguf(path)[0]["tokenizer.ggml.pre"] == pre
    again = load_gguf(path)[1]
    assert again == saved
    rust, differs = Rust.from_str(json.dumps(again)), 0
    with Llama(path) as llama:
        for text in strings(150):
            ids = llama.ask("/tokenize", content=text, add_special=False)["tokens"]
            assert ids == rust.encode(text).ids, text
            differs += ids != TOK.encode(text)
    assert (differs == 0) == (pre in ("dbrx", "llama-bpe"))  # the other names do cut otherwise


def test_ours_is_written_under_the_name_without_the_shortcut(tmp_path):
    odd = Tokenizer([(97, 98), (98, 99), (97, 257)])  # abc is a token that the merges do not reach
    assert odd.encode("abc") == [256, 99]
    path = save_gguf(Decoder(replace(CFG, vocab_size=odd.vocab_size)), to_tokenizers_json(odd), tmp_path/"m.gguf")
    assert read_gguf(path)[0]["tokenizer.ggml.pre"] == "dbrx"
    with Llama(path) as llama: assert llama.ask("/tokenize", content="abc")["tokens"] == [odd.eot_id, 256, 99][1:]
    path = save_gguf(Decoder(replace(CFG, vocab_size=odd.vocab_size)), under("llama-bpe", odd), tmp_path/"m.gguf")
    with Llama(path) as llama: assert llama.ask("/tokenize", content="abc")["tokens"] == [258]


def test_texts_begin_with_eot_of_themselves(tmp_path):
    with Llama(save_gguf(made("qwen3"), JSON, tmp_path/"m.gguf")) as llama:
        for text in strings(20): assert llama.ask("/tokenize", content=text, add_special=True)["tokens"] == [TOK.eot_id, *TOK.encode(text)]


def test_merges_as_texts_and_tokens_that_are_not_special(tmp_path):
    "Older `tokenizer.json` files hold merges as texts, and some have added tokens that stay visible."
    saved = json.loads(json.dumps(JSON))
    saved["model"]["merges"] = [" ".join(m) for m in saved["model"]["merges"]]
    saved["added_tokens"][1]["special"] = False
    fields = read_gguf(path := save_gguf(made("qwen3"), saved, tmp_path/"m.gguf"))[0]
    assert fields["tokenizer.ggml.merges"] == saved["model"]["merges"] and fields["tokenizer.ggml.token_type"][-3:] == [3, 4, 3]
    assert load_gguf(path)[1] == JSON | dict(added_tokens=saved["added_tokens"])


# --- refused when writing ------------------------------------------------------------------------------------------

def refused(match, *args, kind=ValueError, **options):
    with pytest.raises(kind, match=match): save_gguf(*args, **options)


def test_what_llamacpp_would_read_otherwise_is_not_written(tmp_path):
    path = tmp_path/"no.gguf"
    part = lambda **parts: Decoder(CFG, block=partial(Block, **parts))
    refused("mixes by .*window", part(attention=partial(Attention, mix=partial(window_attend, window=8))), JSON, path)
    refused("mixes by .*see_all", Decoder(CFG, block=encoder_block), JSON, path)
    refused("has the gate .*gelu", part(mlp=partial(SwiGLU, act=torch.nn.functional.gelu)), JSON, path)
    refused("is a MoE", part(mlp=MoE), JSON, path)
    refused("is a LayerNorm", part(norm=torch.nn.LayerNorm), JSON, path)
    refused("is a GPT2", GPT2(replace(CFG, n_kv_heads=4)), JSON, path)
    refused("q_proj.bias has no place", part(attention=partial(Attention, linear=torch.nn.Linear)), JSON, path)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_named(tmp_path):
    path, model = tmp_path/"no.gguf", made("qwen3")
    refused("dtype='int4' is none of f32, f16", model, JSON, path, dtype="int4")
    refused("q8_0 packs 32 numbers of a row at a time, and embed_tokens.weight has rows of 36: choose f16", made("qwen3", d_model=36), JSON, path, dtype="q8_0")
    refused("300 tokens and the model vocab_size=290", Decoder(replace(CFG, vocab_size=290)), JSON, path, kind=UserError)
    refused("<s> is no special token of this tokenizer: it has <.endoftext.>", model, JSON, path, kind=UserError, eot="<s>")
    for part in (dict(normalizer=dict(type="NFC")), dict(pre_tokenizer=dict(type="Whitespace")), dict(model=JSON["model"] | dict(type="WordPiece"))):
        refused("has no name for", model, JSON | part, path, kind=UserError)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_gguf(made("qwen3"), JSON, tmp_path/"m.gguf")
    old = path.read_bytes()
    def full(*_): raise OSError("disk full")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="disk full"): save_gguf(made("qwen3", seed=1), JSON, path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


# --- refused when reading ------------------------------------------------------------------------------------------

def altered(path, change=lambda fields: fields, tensors=lambda tensors: tensors, arch="llama"):
    "A file with other facts or tensors, by the library's own writer."
    source = gguf.GGUFReader(save_gguf(made("llama"), JSON, path.with_name("source.gguf"), dtype="f32"))
    fields = {key: (f.contents(), f.types) for key, f in source.fields.items() if not key.startswith("GGUF.") and key != "general.architecture"}
    w = gguf.GGUFWriter(path, arch)
    for key, (value, types) in change(fields).items(): w.add_key_value(key, value, types[0], types[1] if len(types) > 1 else None)
    for name, (data, kind) in tensors({t.name: (np.array(t.data), t.tensor_type) for t in source.tensors}).items(): w.add_tensor(name, data, raw_dtype=kind)
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close): step()
    return path


def with_fact(key, value, kind=gguf.GGUFValueType.UINT32): return lambda fields: fields | {key: (value, [kind] if not isinstance(value, list) else [gguf.GGUFValueType.ARRAY, kind])}
def without(*keys): return lambda fields: {key: v for key, v in fields.items() if key not in keys}


T, F = gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32
STRANGE = {
    "says llama.rope.scaling.type=linear, and the models of this book have no such thing": dict(change=with_fact("llama.rope.scaling.type", "linear", T)),
    "says llama.rope.scaling.factor=8.0": dict(change=with_fact("llama.rope.scaling.factor", 8., F)),
    "says llama.attention.sliding_window=64": dict(change=with_fact("llama.attention.sliding_window", 64)),
    "says llama.expert_count=8": dict(change=with_fact("llama.expert_count", 8)),
    r"says llama.attention.head_count_kv=\[2, 1\]: one number for all layers": dict(change=with_fact("llama.attention.head_count_kv", [2, 1])),
    "says llama.rope.dimension_count=4, and its heads have 8": dict(change=with_fact("llama.rope.dimension_count", 4)),
    "says llama.attention.value_length=16, and its heads have 8": dict(change=with_fact("llama.attention.value_length", 16)),
    "does not say llama.block_count": dict(change=without("llama.block_count")),
    "has the architecture 'gemma3': qwen3 and llama are known": dict(arch="gemma3"),
    "a tokenizer of the kind 'llama'": dict(change=with_fact("tokenizer.ggml.model", "llama", T)),
    "cuts text as 'tekken' does: dbrx": dict(change=with_fact("tokenizer.ggml.pre", "tekken", T)),
    "cuts text as None does": dict(change=without("tokenizer.ggml.pre")),
    "does not say tokenizer.ggml.merges": dict(change=without("tokenizer.ggml.merges")),
    "has the tensor rope_freqs.weight, unlike a llama": dict(tensors=lambda t: t | {"rope_freqs.weight": (np.ones(4, np.float32), gguf.GGMLQuantizationType.F32)}),
    "has the tensor blk.0.attn_q.bias": dict(tensors=lambda t: t | {"blk.0.attn_q.bias": (np.ones(32, np.float32), gguf.GGMLQuantizationType.F32)}),
    "lacks the tensor blk.1.ffn_up.weight": dict(tensors=lambda t: {name: x for name, x in t.items() if name != "blk.1.ffn_up.weight"}),
    r"holds blk.0.ffn_gate.weight in the shape \(64, 32\), and its own sizes ask for \(60, 32\)": dict(change=with_fact("llama.feed_forward_length", 60)),
}


@pytest.mark.parametrize("why", STRANGE)
def test_what_is_not_understood_is_refused_by_name(tmp_path, why):
    path = altered(tmp_path/"strange.gguf", **STRANGE[why])
    with pytest.raises(UserError, match=why) as e: load_gguf(path)
    assert str(path) in str(e.value)


def test_the_same_file_unaltered_is_read(tmp_path):
    path = altered(tmp_path/"fine.gguf", change=without("llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count", "llama.rope.freq_base", "llama.vocab_size"))
    assert load_gguf(path)[0].cfg == CFG  # what may be missing has its usual value
    path = altered(tmp_path/"fine.gguf", change=without("llama.attention.head_count_kv"), tensors=lambda t: {name: (np.tile(x, (2, 1)) if "attn_k" in name or "attn_v" in name else x, kind) for name, (x, kind) in t.items()})
    assert load_gguf(path)[0].cfg == replace(CFG, n_kv_heads=4)


def test_a_type_that_cannot_be_unpacked_is_named(tmp_path):
    path = altered(tmp_path/"m.gguf", tensors=lambda t: t | {"output_norm.weight": (np.ones(32, np.int32), gguf.GGMLQuantizationType.I32)})
    with pytest.raises(UserError, match="holds output_norm.weight as I32, which the library gguf does not unpack"): load_gguf(path)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # scales that are no number
def test_a_damaged_file_is_refused_or_read_and_never_a_surprise(tmp_path):
    "Cut anywhere, or with bytes of its front part changed."
    whole, path = save_gguf(made("llama"), JSON, tmp_path/"m.gguf", dtype="q8_0").read_bytes(), tmp_path/"bad.gguf"
    front = min(info.start for info in read_gguf(tmp_path/"m.gguf")[1].values())
    for n in [0, 3, 10, 24, 30, front//2, front-40, front+100, len(whole)-600]:
        path.write_bytes(whole[:n])
        with pytest.raises(UserError, match="cut off|empty"): load_gguf(path)
    dice = random.Random(0)
    for _ in range(150):
        bad = bytearray(whole)
        bad[dice.choice([dice.randrange(24), dice.randrange(24, 900), dice.randrange(front-1500, front)])] = dice.randrange(256)
        path.write_bytes(bad)
        try: load_gguf(path)
        except ValueError as e: assert "bad.gguf" in str(e) or not isinstance(e, UserError)


def test_no_gguf_at_all(tmp_path):
    (tmp_path/"a.txt").write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(UserError, match="is no GGUF file: it begins with b'PK"): read_gguf(tmp_path/"a.txt")
    (tmp_path/"new.gguf").write_bytes(b"GGUF" + bytes([9, 0, 0, 0]) + bytes(40))
    with pytest.raises(UserError, match="GGUF of version 9: 2 and 3 are known"): read_gguf(tmp_path/"new.gguf")
    with pytest.raises(UserError, match="can't be read: No such file"): load_gguf(tmp_path/"none.gguf")
    with pytest.raises(UserError, match="can't be read"): load_gguf(tmp_path)


def test_without_the_library_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'llm_scratch\[interchange\]'"): save_gguf(made("llama"), JSON, tmp_path/"m.gguf")


# --- names, and the Modelfile --------------------------------------------------------------------------------------

def test_names_are_those_of_the_library():
    "`gguf` has its own table from names of transformers to names of GGUF."
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    for name in UntiedDecoder(CFG).state_dict():
        theirs = name if name.startswith("lm_head") else f"model.{name}"
        assert gguf_name(name) == table.get_name(theirs.removesuffix(".weight")) + ".weight", name
    for name in ("embed_positions.weight", "layers.0.mlp.gate.weight", "layers.0.self_attn.q_proj.bias"):
        with pytest.raises(ValueError, match=f"{name} has no place"): gguf_name(name)


def test_modelfile(tmp_path):
    path = save_gguf(made("llama"), JSON, tmp_path/"my model.gguf")
    told = write_modelfile(path, temperature=.5, top_p=.9, stops=("<|endoftext|>", "END"))
    assert told == tmp_path/"Modelfile" and sorted(p.name for p in tmp_path.iterdir()) == ["Modelfile", "my model.gguf"]
    assert told.read_text(encoding="utf-8").splitlines() == ["FROM ./my model.gguf", 'TEMPLATE """{{ .Prompt }}"""', "PARAMETER temperature 0.5", "PARAMETER top_p 0.9", "PARAMETER num_ctx 96",
                                                          'PARAMETER stop "<|endoftext|>"', 'PARAMETER stop "END"']
    with pytest.raises(UserError, match="can't be read"): write_modelfile(tmp_path/"none.gguf")


def test_the_split_is_the_book_s_own(): assert llamacpp._SPLITS["dbrx"] == ((PATTERN,), False) and RMSNorm in llamacpp._PLAIN

"Soft prompts: what chapter 08c leaves to tests: any shape, every cache, other devices of thought, and files that lie."
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.core import UserError
from llm_scratch.generation import Cache, begin, generate, logprobs, read_on
from llm_scratch.prompting import Behind, Prefixed, Prompted, as_prefix, load_prompt, read_vectors, save_prompt, word_vectors

CFG = ModelConfig(vocab_size=31, context_len=24, n_layers=3, n_heads=4, n_kv_heads=2, d_model=20, d_ff=28, d_head=6)


def make(seed=0):
    torch.manual_seed(seed)
    model = Decoder(CFG)
    for p in model.parameters(): p.data = .3*torch.randn(p.shape)
    return model


def naive(base, prompt_PD, ids_BT):
    "Vectors and embeddings in one row, everything computed for every row."
    x = torch.cat((prompt_PD.expand(len(ids_BT), -1, -1), base.embed_tokens(ids_BT)), 1)
    rotation = tuple(t[:x.shape[1]] for t in (base.cos, base.sin))
    for layer in base.layers: x = layer(x, rotation)
    return base.scores(base.norm(x))[:, len(prompt_PD):]


@pytest.fixture
def base(): return make()


@settings(max_examples=12, deadline=None)
@given(P=st.integers(1, 12), B=st.integers(1, 3), T=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_prompt_read_once_is_a_prompt_read_for_every_row(P, B, T, seed):
    base, rng = make(), torch.Generator().manual_seed(seed)
    prompt, ids = torch.randn(P, 20, generator=rng), torch.randint(31, (B, T), generator=rng)
    model = Prompted(base, prompt)
    wanted = naive(base, model.prompt_PD, ids)
    assert_close(model(ids), wanted, atol=2e-5, rtol=1e-4)
    assert_close(as_prefix(model)(ids), wanted, atol=2e-5, rtol=1e-4)
    loss = lambda logits: F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    a, b = (torch.autograd.grad(loss(x), model.prompt_PD)[0] for x in (model(ids), naive(base, model.prompt_PD, ids)))
    assert_close(a, b, atol=2e-5, rtol=1e-3)


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3), P=st.integers(1, 5), n=st.integers(1, 5))
def test_texts_of_any_lengths_are_written_as_alone(lengths, P, n):
    base = make()
    model = as_prefix(Prompted(base, torch.randn(P, 20, generator=torch.Generator().manual_seed(P))))
    texts = [list(range(1, k+1)) for k in lengths]
    together = generate(model, texts, n, temperature=0)
    for text, row in zip(texts, together):
        ids = torch.tensor([text])
        for _ in range(n):
            with torch.no_grad(): ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
        assert row[-n:].tolist() == ids[0, -n:].tolist()


def test_a_cache_is_read_on_piece_by_piece(base):
    model, ids = Prompted(base, torch.randn(4, 20)), torch.randint(31, (2, 9))
    cache = Cache(model.cfg, 2, 9)
    pieces = [read_on(model, ids[:, :end], cache) for end in (3, 4, 9)]
    assert cache.past == 9  # of the text, without the prompt
    assert_close(torch.cat(pieces, 1), model(ids), atol=1e-5, rtol=1e-4)
    assert begin(model, ids, 11)[1].max_len == 20
    with pytest.raises(ValueError, match="context_len=20: ask for at most 11"): begin(model, ids, 12)


def test_logprobs_of_a_filled_up_batch_do_not_see_the_filling(base):
    model = as_prefix(Prompted(base, torch.randn(3, 20)))
    both = logprobs(model, [[4, 5, 6, 7], [8, 9]])
    assert_close(both[1, -1:], logprobs(model, [[8, 9]])[0], atol=1e-5, rtol=1e-4)


def test_each_row_stands_behind_its_own(base):
    a, b = (Prompted(base, torch.randn(3, 20)) for _ in range(2))
    k, v = (torch.cat(x, 1) for x in zip(a.keys_values(), b.keys_values()))
    ids = torch.randint(31, (2, 5))
    mixed = base(ids, Behind(k, v))
    assert_close(mixed, torch.cat((a(ids[:1]), b(ids[1:]))), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mixed[0], b(ids[:1])[0], atol=1e-3)


def test_only_the_prompt_learns_and_the_base_stays():
    for prefixed, n in ((False, 60), (True, 2*3*2*6*3)):
        base = make()
        with torch.no_grad(): k, v = read_vectors(base, torch.randn(1, 3, 20))
        before = {name: p.clone() for name, p in base.state_dict().items()}
        model = Prefixed(base, k, v) if prefixed else Prompted(base, torch.randn(3, 20))
        learnt = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in learnt) == n
        opt = torch.optim.AdamW(model.parameters(), lr=.1)
        ids = torch.randint(31, (4, 6))
        losses = []
        for _ in range(15):
            opt.zero_grad()
            loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward(); opt.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - .1
        assert all(torch.equal(before[name], p) for name, p in base.state_dict().items())


def test_what_was_given_is_copied(base):
    rows = torch.randn(3, 20)
    model, kept = Prompted(base, rows), rows.clone()
    with torch.no_grad(): model.prompt_PD.zero_()
    assert torch.equal(rows, kept)
    words = word_vectors(base, [1, 2], 5)
    assert torch.equal(words, base.embed_tokens.weight[[1, 2, 1, 2, 1]]) and words.data_ptr() != base.embed_tokens.weight.data_ptr() and not words.requires_grad
    assert torch.equal(word_vectors(base, torch.tensor([7, 8, 9]), 2), base.embed_tokens.weight[[7, 8]])


def test_a_half_precision_base_takes_a_full_prompt(base):
    prefix = as_prefix(Prompted(base, torch.randn(3, 20)))
    half = Prefixed(make().bfloat16(), prefix.k_LBGPK, prefix.v_LBGPK)
    ids = torch.randint(31, (1, 5))
    assert half(ids).isfinite().all() and half.k_LBGPK.dtype == torch.float32


@pytest.mark.parametrize("n", [0, 24, 25])
def test_a_prompt_without_room_names_both_numbers(base, n):
    with pytest.raises(UserError, match=f"{n} positions leaves no room in context_len=24: give from 1 to 23"): Prompted(base, torch.zeros(n, 20))
    with pytest.raises(UserError, match=f"{n} positions leaves no room"): Prefixed(base, *torch.zeros(2, 3, 1, 2, n, 6))


def test_the_longest_prompt_leaves_one_position(base):
    model = Prompted(base, torch.zeros(23, 20))
    assert model.cfg.context_len == 1 and model(torch.tensor([[3]])).shape == (1, 1, 31)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_saved_prompt_comes_back_and_knows_its_base(base, kind, tmp_path):
    model = Prompted(base, torch.randn(5, 20))
    if kind == "prefix": model = as_prefix(model)
    save_prompt(model, tmp_path/"p", "a base")
    config = json.loads((tmp_path/"p"/"adapter_config.json").read_text())
    assert config["num_virtual_tokens"] == 5 and config["base_model_name_or_path"] == "a base" and config["token_dim"] == (20 if kind == "prompt" else 12)
    again, ids = load_prompt(base, tmp_path/"p"), torch.randint(31, (2, 6))
    assert type(again) is type(model) and torch.equal(again(ids), model(ids))
    with pytest.raises(UserError, match="load the base that it was learnt for"): load_prompt(make(1), tmp_path/"p")
    save_prompt(Prompted(base, torch.randn(2, 20)), tmp_path/"p")  # replaced
    assert len(load_prompt(base, tmp_path/"p").prompt_PD) == 2


def test_a_prefix_is_laid_out_as_peft_does(base, tmp_path):
    "`(P, L*2*G*K)`: the keys of a layer, then its values."
    k, v = torch.randn(3, 1, 2, 4, 6), torch.randn(3, 1, 2, 4, 6)
    save_prompt(Prefixed(base, k, v), tmp_path/"p")
    x = load_file(tmp_path/"p"/"adapter_model.safetensors")["prompt_embeddings"]
    assert x.shape == (4, 72)
    assert torch.equal(x[3, :6], k[0, 0, 0, 3]) and torch.equal(x[1, 12:18], v[0, 0, 0, 1]) and torch.equal(x[2, 24+6:24+12], k[1, 0, 1, 2])


def test_files_that_lie(base, tmp_path):
    folder = save_prompt(Prompted(base, torch.randn(5, 20)), tmp_path/"p")
    save_file(dict(prompt_embeddings=torch.randn(5, 19)), folder/"adapter_model.safetensors")  # as peft writes it: no hash
    with pytest.raises(UserError, match=r"\(5, 19\), and this base takes 20"): load_prompt(base, folder)
    save_file(dict(prompt_embeddings=torch.randn(5, 20)), folder/"adapter_model.safetensors")
    assert load_prompt(base, folder)(torch.tensor([[1]])).shape == (1, 1, 31)
    save_file(dict(prompt_embeddings=torch.randn(30, 20)), folder/"adapter_model.safetensors")
    with pytest.raises(UserError, match="30 positions leaves no room in context_len=24"): load_prompt(base, folder)
    save_file(dict(other=torch.randn(5, 20)), folder/"adapter_model.safetensors")
    with pytest.raises(UserError, match="holds no prompt_embeddings"): load_prompt(base, folder)
    (folder/"adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="holds no prompt_embeddings"): load_prompt(base, folder)
    (folder/"adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="LORA: load_prompt opens PROMPT_TUNING and PREFIX_TUNING"): load_prompt(base, folder)
    (folder/"adapter_config.json").unlink()
    with pytest.raises(UserError, match="is missing"): load_prompt(base, folder)


def test_keys_and_values_have_their_shape(base):
    k, v = read_vectors(base, torch.randn(2, 5, 20))
    assert k.shape == v.shape == (3, 2, 2, 5, 6)

"Writing against transformers, and properties of sampling over many inputs."
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llm_scratch.architecture import Decoder, ModelConfig, save_model
from llm_scratch.generation import Cache, generate, keep_top_k, keep_top_p, sample, stream

CFG = ModelConfig(vocab_size=131, context_len=64, n_layers=3, n_heads=4, n_kv_heads=2, d_model=40, d_ff=72, d_head=16)


@pytest.fixture(scope="module")
def model():
    model, rng = Decoder(CFG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(.2 * torch.randn(p.shape, generator=rng))
    return model


@pytest.fixture
def ids(): return torch.randint(131, (3, 7), generator=torch.Generator().manual_seed(1))


def test_transformers_writes_the_same_greedy_text(model, ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path/"model", eot_id=0))
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert generate(model, ids, 40, temperature=0).tolist() == expected.tolist()


def test_the_whole_context_can_be_written_and_not_one_more(model, ids):
    assert generate(model, ids, 57, temperature=0).shape == (3, 64)
    with pytest.raises(ValueError, match="58 make 65, more than context_len=64: ask for at most 57"): generate(model, ids, 58)
    assert generate(model, ids, 0).tolist() == ids.tolist()


def test_nothing_leaks_between_tokens(model, ids):
    with torch.enable_grad():
        for new in stream(model, ids, 3):
            assert torch.is_grad_enabled() and not new.requires_grad
            (model(ids).mean()).backward()  # an update in the middle of a stream
    model.zero_grad()
    graphs = []
    hook = model.register_forward_hook(lambda module, given, logits: graphs.append(logits.requires_grad))
    list(stream(model, ids, 3))
    hook.remove()
    assert graphs == [False]*3  # or every token would drag along the graph of all before it
    a, b = stream(model, ids, 5, temperature=0), stream(model, ids.flip(0), 5, temperature=0)
    rows = [(x.tolist(), y.tolist()) for x, y in zip(a, b)]  # two streams taking turns
    assert all(x == y[::-1] for x, y in rows)


def test_stopped_texts_stay_stopped(model, ids):
    free = generate(model, ids, 30, temperature=0)[:, 7:]
    stop = free[0, 4].item()
    steps = [s.tolist() for s in stream(model, ids, 30, temperature=0, stop_id=stop)]
    for row, text in zip(zip(*steps), free.tolist()):
        end = text.index(stop) if stop in text else 30
        assert list(row[:end+1]) == text[:end+1][:len(row)] and set(row[end:]) <= {stop}
    assert len(steps) == max(min(t.index(stop)+1 if stop in t else 30, 30) for t in free.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_cache_follows_the_model(dtype, ids):
    torch.manual_seed(0)
    model = Decoder(replace(CFG, n_layers=1)).to(dtype)
    assert generate(model, ids, 5).shape == (3, 12)
    assert Cache(CFG, 1, 4, dtype=dtype).k_LBGSK.dtype == dtype


logits = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40).map(lambda z: torch.tensor([z]))


@settings(max_examples=60, deadline=None)
@given(logits, st.integers(1, 50), st.floats(.01, 1))
def test_filters_keep_the_right_number(z, k, p):
    kept = keep_top_k(z, k)
    assert kept.isfinite().sum() == min(k, z.shape[1]) and kept.max() == z.max()
    assert kept[kept.isfinite()].min() >= z[kept.isinf()].max() if kept.isinf().any() else True
    nucleus, prob = keep_top_p(z, p), z.softmax(-1)
    inside = nucleus.isfinite()
    assert prob[inside].sum() >= p - 1e-5 and torch.equal(nucleus[inside], z[inside])
    if inside.sum() > 1: assert prob[inside].sum() - prob[inside].min() < p + 1e-5  # one fewer would not do


@settings(max_examples=40, deadline=None)
@given(logits, st.floats(0, 5), st.one_of(st.none(), st.integers(1, 9)), st.one_of(st.none(), st.floats(.01, 1)))
def test_samples_are_ids_that_both_filters_keep(z, temperature, k, p):
    got = sample(z.expand(20, -1), temperature, k, p, torch.Generator().manual_seed(0))
    assert got.dtype == torch.int64 and got.shape == (20,)
    allowed = set(range(z.shape[1])) if k is None else set(z.argsort(descending=True)[0, :k].tolist())
    if k is None or len(set(z[0].tolist())) == z.shape[1]: assert set(got.tolist()) <= allowed

"Writing against transformers, and properties of sampling and caches over many inputs."
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llm_scratch.architecture import Decoder, ModelConfig, save_model
from llm_scratch.generation import (
    Cache, PaddedCache, ends_with, generate, keep_min_p, keep_top_k, keep_top_p, logprobs, next_probs, pad_left, penalize_repeats, sample, stream)

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


# --- rules -------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(logits, st.floats(0, 1))
def test_min_p_keeps_what_transformers_keeps(z, p):
    from transformers.generation.logits_process import MinPLogitsWarper
    kept = keep_min_p(z, p)
    assert torch.equal(kept, MinPLogitsWarper(p)(None, z.clone()))
    assert kept.max() == z.max() and torch.equal(kept[kept.isfinite()], z[kept.isfinite()])


@settings(max_examples=60, deadline=None)
@given(logits, st.lists(st.integers(0, 1), min_size=1, max_size=5), st.floats(.5, 3))
def test_repeats_are_penalized_as_in_transformers(z, said, penalty):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
    text = torch.tensor([said])
    assert torch.allclose(penalize_repeats(z, text, penalty), RepetitionPenaltyLogitsProcessor(penalty)(text, z.clone()))
    assert torch.equal(penalize_repeats(z, torch.cat((text, text), 1), penalty), penalize_repeats(z, text, penalty))  # whether, not how often


@settings(max_examples=40, deadline=None)
@given(logits, st.floats(0, 5), st.one_of(st.none(), st.integers(1, 9)), st.one_of(st.none(), st.floats(.01, 1)), st.one_of(st.none(), st.floats(0, 1)))
def test_samples_come_from_next_probs(z, temperature, k, p, min_p):
    prob = next_probs(z, temperature, k, p, min_p)
    assert abs(prob.sum().item() - 1) < 1e-5 and prob[z == z.max()].max() == prob.max()  # of equal scores, top-k may keep any
    assert (prob[0, sample(z.expand(50, -1), temperature, k, p, torch.Generator().manual_seed(0), min_p=min_p)] > 0).all()


def test_a_rule_sees_the_whole_text_and_comes_before_the_dials(model, ids):
    seen = []
    def rule(logits, text):
        seen.append(text.tolist())
        return torch.full_like(logits, -1e9).index_fill(1, torch.tensor(len(seen)), 0)
    out = generate(model, ids, 4, adjust=rule, top_k=1)
    assert out[:, 7:].tolist() == [[1, 2, 3, 4]]*3
    assert seen == [out[:, :n].tolist() for n in (7, 8, 9, 10)]


# --- prompts of different lengths ----------------------------------------------------------------------------------

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def prompts_of(lengths): return [torch.randint(131, (n,), generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)]


@settings(max_examples=25, deadline=None)
@given(lengths, st.integers(0, 11), st.integers(0, 130))
def test_every_row_scores_as_it_would_alone(model, lengths, cut, fill):
    texts = prompts_of(lengths)
    padded, n_pad = pad_left(texts)
    T = padded.shape[1]
    assert T == max(lengths) and n_pad.tolist() == [T-n for n in lengths]
    assert padded.tolist() == [[t[0].item()]*(T-len(t)) + t.tolist() for t in texts]  # nothing that the text does not say
    padded = torch.where(torch.arange(T) < n_pad[:, None], fill, padded)
    cache = PaddedCache(CFG, n_pad, T)
    with torch.no_grad():
        got = torch.cat([model(part, cache) for part in (padded[:, :cut], padded[:, cut:]) if part.shape[1]], 1)
        assert got.isfinite().all()
        for row, text in zip(got, texts): torch.testing.assert_close(row[T-len(text):], model(text[None])[0], atol=1e-4, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(lengths)
def test_every_row_writes_as_it_would_alone(model, lengths):
    texts = prompts_of(lengths)
    for how in (dict(temperature=0), dict(temperature=0, adjust=penalize_repeats)):
        together = generate(model, texts, 10, **how)
        assert together.shape == (len(texts), max(lengths)+10)
        for row, text in zip(together.tolist(), texts): assert row[-10-len(text):] == generate(model, text[None], 10, **how)[0].tolist()


def test_transformers_agrees_on_padded_prompts(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path/"model", eot_id=0))
    padded, n_pad = pad_left(prompts_of([3, 9, 1, 6]))
    mask = (torch.arange(9) >= n_pad[:, None]).long()
    expected = theirs.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert generate(model, prompts_of([3, 9, 1, 6]), 20, temperature=0).tolist() == expected.tolist()


def test_lists_say_what_is_wrong_with_them(model):
    with pytest.raises(ValueError, match=r"lengths \[2, 0\]: a text has 0 tokens"): generate(model, [[1, 2], []], 3)
    with pytest.raises(ValueError, match="a text has 0 tokens"): generate(model, [], 3)
    with pytest.raises(ValueError, match="62 tokens and max_new_tokens=3 make 65, more than context_len=64"): generate(model, [[1], [1]*62], 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_padding_in_every_dtype(dtype):
    torch.manual_seed(0)
    assert generate(Decoder(replace(CFG, n_layers=1)).to(dtype), [[1, 2, 3], [4]], 5).shape == (2, 8)


# --- caches that go on -----------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(lengths, st.data())
def test_a_fork_goes_on_as_its_row_would(model, lengths, data):
    rows = data.draw(st.lists(st.integers(0, len(lengths)-1), min_size=1, max_size=6))
    texts, more = prompts_of(lengths), torch.randint(131, (len(rows), 3), generator=torch.Generator().manual_seed(9))
    padded, n_pad = pad_left(texts)
    cache = PaddedCache(CFG, n_pad, padded.shape[1]+3) if n_pad.any() else Cache(CFG, len(texts), padded.shape[1]+3)
    with torch.no_grad():
        model(padded, cache)
        fork = cache.fork(rows)
        got = model(more, fork)
        for g, r, m in zip(got, rows, more): torch.testing.assert_close(g, model(torch.cat((texts[r], m))[None])[0, -3:], atol=1e-4, rtol=1e-4)
    assert cache.past == padded.shape[1] and (cache.k_LBGSK[:, :, :, cache.past:] == 0).all()  # nothing was written into the original


def test_a_cache_reads_only_what_is_new(model, ids):
    seen, cache, text = [], Cache(CFG, 3, 64), ids
    hook = model.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    for turn in range(3):
        text = torch.cat((text, ids[:, :4]), 1)
        text = generate(model, text, 6, temperature=0, cache=cache)
    assert seen == [11, *[1]*5, 5, *[1]*5, 5, *[1]*5]
    hook.remove()
    anew = ids
    for turn in range(3): anew = generate(model, torch.cat((anew, ids[:, :4]), 1), 6, temperature=0)
    assert text.tolist() == anew.tolist()
    assert generate(model, text, 5, temperature=0, cache=cache).tolist() == generate(model, text, 5, temperature=0).tolist()
    assert generate(model, anew[:, :20], 5, temperature=0, cache=cache).tolist() == generate(model, anew[:, :20], 5, temperature=0).tolist()  # a shorter text


def test_a_cache_that_does_not_fit_is_refused_at_once(model, ids):
    with pytest.raises(ValueError, match="a cache of 1 rows does not fit 3 texts"): stream(model, ids, 3, cache=Cache(CFG, 1, 64))
    with pytest.raises(ValueError, match="a cache of 2 rows does not fit 2 texts"): stream(model, [[1], [2, 3]], 3, cache=Cache(CFG, 2, 64))
    with pytest.raises(ValueError, match="more than the cache's max_len=9: ask for at most 2"): stream(model, ids, 3, cache=Cache(CFG, 3, 9))


# --- stops and scores ------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=4), st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_ends_with_is_what_lists_say(rows, tail):
    assert ends_with(torch.tensor(rows), tail).tolist() == [row[-len(tail):] == tail for row in rows]


def test_several_ids_in_a_row_stop_a_text(model, ids):
    free = generate(model, ids, 30, temperature=0)
    stop = free[0, 10:13].tolist()
    first = next(i for i in range(7, 35) if free[0, i:i+3].tolist() == stop) + 3
    alone = generate(model, ids[:1], 30, temperature=0, stops=[[130, 130, 129], stop])
    assert alone.tolist() == free[:1, :first].tolist()
    together = generate(model, ids, 30, temperature=0, stops=[stop])
    assert set(together[0, first:].tolist()) <= {stop[-1]}
    forced = lambda id: lambda logits, text: torch.full_like(logits, -1e9).index_fill(1, torch.tensor(id), 0)
    told = torch.cat((ids[:1], torch.tensor([[5]])), 1)
    assert generate(model, told, 6, temperature=0, adjust=forced(5), stops=[[5, 5]]).shape[1] == 10  # the prompt's own 5 does not count
    with pytest.raises(ValueError, match="0 ids"): generate(model, ids, 3, stops=[[]])


def test_logprobs_are_the_models(model, ids):
    got = logprobs(model, ids)
    with torch.no_grad(): logits = model(ids)
    for b, t in product(range(3), range(6)): torch.testing.assert_close(got[b, t], logits[b, t].log_softmax(-1)[ids[b, t+1]], atol=1e-5, rtol=1e-5)
    texts = prompts_of([4, 9, 1])
    together = logprobs(model, texts)
    assert together.shape == (3, 8)
    for row, text in zip(together, texts):
        torch.testing.assert_close(row[9-len(text):], logprobs(model, text[None])[0], atol=1e-4, rtol=1e-4)
        assert (row[:9-len(text)] == 0).all()


def test_rules_leave_gradients_on(model):
    with torch.enable_grad():
        for new in stream(model, [[1, 2], [3]], 3, adjust=partial(penalize_repeats, penalty=1.5), min_p=.1): assert torch.is_grad_enabled()


def test_everyone_sees_something_and_nobody_sees_filling():
    "Softmax over nothing is 0/0, whatever today's kernel makes of it."
    n_pad, nothing = torch.tensor([0, 3, 1]), torch.zeros(3, CFG.n_kv_heads, 4, CFG.d_head)
    sees = PaddedCache(CFG, n_pad, 4).update(0, nothing, nothing)[2]
    expected = [[[s == t or pad <= s < t for s in range(4)] for t in range(4)] for pad in n_pad.tolist()]
    assert sees.tolist() == expected and sees.any(-1).all()

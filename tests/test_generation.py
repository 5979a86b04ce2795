"Writing against transformers, and properties of sampling and caches over many inputs."
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llm_scratch.architecture import Attention, Block, Decoder, ModelConfig, save_model
from llm_scratch.families import GPT2, MoE, PlainAttention, UntiedDecoder, llama_block, window_attend
from llm_scratch.generation import (
    Cache, PaddedCache, WindowCache, begin, ends_with, generate, keep_min_p, keep_top_k, keep_top_p, logprobs, next_probs, pad_left, penalize_repeats, read_on,
    sample, stream)

CFG = ModelConfig(vocab_size=131, context_len=64, n_layers=3, n_heads=4, n_kv_heads=2, d_model=40, d_ff=72, d_head=16)


def drawn(model):
    "The same model with weights that matter, all of them."
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(.2 * torch.randn(p.shape, generator=rng))
    return model


@pytest.fixture(scope="module")
def model(): return drawn(Decoder(CFG))


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


@settings(max_examples=40, deadline=None)
@given(logits, st.floats(.2, 5))
def test_temperature_is_a_power_of_the_probabilities(z, temperature):
    z = z.double()
    prob = next_probs(z, temperature)
    powered = z.softmax(-1)**(1/temperature)
    assert torch.allclose(prob, powered/powered.sum(), atol=1e-9) and abs(prob.sum().item() - 1) < 1e-9


@settings(max_examples=40, deadline=None)
@given(logits)
def test_cold_is_greedy_and_hot_is_even(z):
    z = z.round(decimals=2)  # nothing is nearly equal
    greedy = next_probs(z, 0)
    assert greedy.tolist() == [[float(i == z.argmax()) for i in range(z.shape[1])]] and sample(z, 0).item() == z.argmax()
    assert greedy.dtype == z.dtype
    cold, best = next_probs(z, 1e-30), z == z.max()
    assert torch.allclose(cold, best/best.sum()) and next_probs(z, 1e30).sub(1/z.shape[1]).abs().max() < 1e-6


def test_temperature_comes_before_the_filters_and_top_k_first():
    z = torch.tensor([[.5, .3, .2]]).log()
    assert torch.allclose(next_probs(z, .5, min_p=.3), torch.tensor([[25/34, 9/34, 0]]))  # .2 is .4 of .5, and .16 of it when squared
    assert next_probs(z, 2., top_p=.76).gt(0).sum() == 3 and next_probs(z, 1., top_p=.76).gt(0).sum() == 2  # the best two have .737 when flattened, .8 as they are
    four = torch.tensor([[.4, .3, .2, .1]]).log()
    assert torch.allclose(next_probs(four, top_k=2, top_p=.5), torch.tensor([[1., 0, 0, 0]]))  # .4 of .7 is more than .5; of 1 it is not


def test_a_sampler_draws_what_next_probs_says():
    z, rng = torch.randn(6, generator=torch.Generator().manual_seed(3)), torch.Generator().manual_seed(4)
    for how in (dict(temperature=.5), dict(temperature=2., top_k=4), dict(top_p=.8), dict(min_p=.2)):
        prob = next_probs(z[None], **how)[0]
        count, kept = torch.bincount(sample(z.expand(20_000, 6), rng=rng, **how), minlength=6), prob > 0
        assert (count[~kept] == 0).all() and ((count - 20_000*prob)[kept]**2 / (20_000*prob[kept])).sum() < 20.6  # 5 degrees of freedom, once in a thousand


@pytest.mark.parametrize("how, says", [(dict(temperature=-1), "temperature=-1"), (dict(top_k=0), "top_k=0"), (dict(top_p=0), "top_p=0"), (dict(top_p=1.1), "top_p=1.1"),
                                       (dict(min_p=-.1), "min_p=-0.1"), (dict(min_p=1.1), "min_p=1.1")])
def test_dials_out_of_range_are_refused(how, says):
    with pytest.raises(ValueError, match=says): next_probs(torch.zeros(1, 3), **how)
    with pytest.raises(ValueError, match=says): sample(torch.zeros(1, 3), **how)


def test_the_ends_of_the_dials():
    z = torch.tensor([[0., -30, -1]])
    for keep in (partial(keep_top_p, p=1), partial(keep_min_p, p=0), partial(keep_top_k, k=9)): assert torch.equal(keep(z), z)  # 1e-13 too, which a sum to 1 would lose
    assert torch.equal(keep_min_p(z, 1), keep_top_k(z, 1)) and torch.equal(keep_top_p(z, 1e-9), keep_top_k(z, 1))
    assert next_probs(torch.tensor([[1e9, 0]]), 1e-30).tolist() == [[1, 0]]  # 1e39 is more than float32 holds
    assert penalize_repeats(torch.tensor([[.5, -.5, 0, .5]]), torch.tensor([[0, 1, 2]]), 2.).tolist() == [[.25, -1, 0, .5]]


def test_a_penalty_must_be_positive():
    for penalty in (0, -1):
        with pytest.raises(ValueError, match=f"penalty={penalty}"): penalize_repeats(torch.zeros(1, 3), torch.tensor([[1]]), penalty)


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


@settings(max_examples=8, deadline=None)
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
    with pytest.raises(ValueError, match="0 tokens: give at least 1"): stream(model, torch.zeros(2, 0, dtype=torch.int64), 3)
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


def test_to_begin_is_to_have_ids_and_room(model, ids):
    for texts, kind in ((ids, Cache), (ids.tolist(), Cache), ([[1, 2], [3]], PaddedCache)):
        ids_BT, cache = begin(model, texts, 5)
        assert type(cache) is kind and (cache.past, cache.max_len) == (0, ids_BT.shape[1]+5)
        assert torch.equal(ids_BT, ids if kind is Cache else torch.tensor([[1, 2], [3, 3]]))
    own = Cache(CFG, 3, 12)
    ids_BT, cache = begin(model, ids, 5, own)
    assert cache is own
    first, rest = read_on(model, ids_BT[:, :3], cache), read_on(model, ids_BT, cache)
    assert not rest.requires_grad and first.shape[1] == 3 and rest.shape[1] == 4
    with torch.no_grad(): torch.testing.assert_close(torch.cat((first, rest), 1), model(ids), atol=1e-4, rtol=1e-4)


def test_a_cache_that_does_not_fit_is_refused_at_once(model, ids):
    with pytest.raises(ValueError, match="a cache of 1 rows does not fit 3 texts"): stream(model, ids, 3, cache=Cache(CFG, 1, 64))
    with pytest.raises(ValueError, match="a cache of 2 rows does not fit 2 texts"): stream(model, [[1], [2, 3]], 3, cache=Cache(CFG, 2, 64))
    with pytest.raises(ValueError, match="more than the cache's max_len=9: ask for at most 2"): stream(model, ids, 3, cache=Cache(CFG, 3, 9))


# --- every decoder of chapter 02a -----------------------------------------------------------------------------------

def windowed(window, attention=Attention):
    return lambda cfg, layer: Block(cfg, layer, attention=partial(attention, mix=partial(window_attend, window=window)))


def few_experts(cfg, layer): return Block(cfg, layer, mlp=partial(MoE, n_experts=4, top_k=2))


DECODERS = dict(qwen3=Decoder, gpt2=GPT2, llama=partial(Decoder, block=llama_block), untied=UntiedDecoder, experts=partial(Decoder, block=few_experts),
                window=partial(Decoder, block=windowed(5)), gpt2_window=partial(GPT2, block=windowed(5, PlainAttention), norm=torch.nn.LayerNorm))


@pytest.fixture(scope="module", params=DECODERS.values(), ids=DECODERS.keys())
def decoder(request): return drawn(request.param(CFG))


def close(a, b): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parts", [[20], [7, 1, 1, 11], [1]*20], ids=["whole", "parts", "one by one"])
def test_cached_is_uncached(decoder, parts):
    text, cache = torch.stack(prompts_of([20, 20])), Cache(CFG, 2, 20)
    with torch.no_grad(): close(torch.cat([decoder(part, cache) for part in text.split(parts, 1)], 1), decoder(text))
    assert cache.past == 20
    with pytest.raises(ValueError, match="21 positions do not fit into a cache of max_len=20"), torch.no_grad(): decoder(text[:, :1], cache)


@pytest.mark.parametrize("cut", [0, 4])
def test_filling_changes_nothing(decoder, cut):
    texts = prompts_of([3, 9, 1, 6, 9])
    padded, n_pad = pad_left(texts)
    more, cache = torch.randint(131, (5, 3), generator=torch.Generator().manual_seed(8)), PaddedCache(CFG, n_pad, 12)
    with torch.no_grad():
        got = torch.cat([decoder(part, cache) for part in (padded[:, :cut], padded[:, cut:], *more.split(1, 1)) if part.shape[1]], 1)
        for row, text, new in zip(got, texts, more): close(row[9-len(text):], decoder(torch.cat((text, new))[None])[0])
    together = generate(decoder, texts, 12, temperature=0)
    for row, text in zip(together.tolist(), texts): assert row[-12-len(text):] == generate(decoder, text[None], 12, temperature=0)[0].tolist()
    scored = logprobs(decoder, texts)
    for row, text in zip(scored, texts): close(row[9-len(text):], logprobs(decoder, text[None])[0])


def test_a_beginning_that_many_share_is_read_once(decoder):
    "Prefix and continuation, in a fork, are what a fresh run is."
    [start], more = prompts_of([9]), torch.randint(131, (4, 6), generator=torch.Generator().manual_seed(8))
    cache = Cache(CFG, 1, 20)
    with torch.no_grad():
        decoder(start[None], cache)
        before = cache.k_LBGSK.clone()
        fresh = decoder(torch.cat((start.expand(4, 9), more), 1))[:, 9:]
        for parts in ([6], [2, 4]):
            users = cache.fork([0]*4)
            close(torch.cat([decoder(part, users) for part in more.split(parts, 1)], 1), fresh)
            assert (cache.past, users.past) == (9, 15) and torch.equal(cache.k_LBGSK, before)
    told = torch.cat((start.expand(4, 9), more), 1)
    assert generate(decoder, told, 5, temperature=0, cache=cache.fork([0]*4)).tolist() == generate(decoder, told, 5, temperature=0).tolist()


def test_places_count_the_text_and_not_the_filling():
    cache = PaddedCache(CFG, torch.tensor([0, 2, 5]), 9)
    assert cache.places(4).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 0]]
    cache.past = 4
    assert cache.places(3).tolist() == [[4, 5, 6], [2, 3, 4], [0, 0, 1]]
    assert cache.fork([2, 0]).places(2).tolist() == [[0, 0], [4, 5]]
    plain = Cache(CFG, 3, 9)
    plain.past = 4
    assert plain.places(3).tolist() == [4, 5, 6]


# --- short memories ---------------------------------------------------------------------------------------------------

LONG = replace(CFG, context_len=400)


def parts_of(n): return st.lists(st.integers(1, n), min_size=1, max_size=12)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_window_cache_gives_what_may_be_seen_and_no_more(window):
    cache, past = WindowCache(LONG, 1, window), 0
    for T in (1, 1, 3, 1, 9, 4, 5, 1, 1):
        at = torch.arange(past, past+T, dtype=torch.float32)[:, None].expand(1, 2, T, 16)
        for layer in range(3):
            k, v = cache.update(layer, at+1000*layer, -at)
            expected = list(range(max(0, past-window+1), past+T))
            assert (k[0, :, :, 5]-1000*layer).tolist() == [expected]*2 and v[0, :, :, 5].tolist() == [[-x for x in expected]]*2
        past = cache.past = past+T


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([1, 2, 5, 16]), st.integers(0, 3), st.booleans(), parts_of(40))
def test_a_window_cache_changes_nothing_far_past_the_window(window, spare, learned, parts):
    model = drawn((partial(GPT2, block=windowed(window, PlainAttention)) if learned else partial(Decoder, block=windowed(window)))(LONG))
    text, cache = torch.randint(131, (2, sum(parts)), generator=torch.Generator().manual_seed(2)), WindowCache(LONG, 2, window+spare)
    memory = cache.k_LBGSK.data_ptr(), cache.v_LBGSK.data_ptr()
    with torch.no_grad(): close(torch.cat([model(part, cache) for part in text.split(parts, 1)], 1), model(text))
    assert cache.past == sum(parts) and cache.k_LBGSK.shape == cache.v_LBGSK.shape == (3, 2, 2, window+spare, 16)
    assert memory == (cache.k_LBGSK.data_ptr(), cache.v_LBGSK.data_ptr())  # reserved once


@pytest.fixture(scope="module")
def short(): return drawn(Decoder(LONG, block=windowed(7)))


def test_writing_with_a_window_cache(short, ids):
    free = generate(short, ids, 120, temperature=0)
    cache = WindowCache(LONG, 3, 7)
    turn = generate(short, ids, 50, temperature=0, cache=cache)
    assert turn.tolist() == free[:, :57].tolist()
    assert generate(short, turn, 70, temperature=0, cache=cache).tolist() == free.tolist()  # goes on where it stopped
    with pytest.raises(ValueError, match="more than context_len=400"): stream(short, ids, 394, cache=cache)
    with pytest.raises(ValueError, match="126 positions were read and the last 7 kept: the text can be taken back to 125, not to 19"): next(stream(short, free[:, :20], 5, cache=cache))


def test_how_far_a_text_can_be_taken_back(short, ids):
    text, cache = ids.repeat(1, 3), WindowCache(LONG, 3, 7)
    with torch.no_grad():
        short(text[:, :7], cache)
        cache.past = 2  # nothing is lost yet
        close(short(text[:, 4:12], cache), short(torch.cat((text[:, :2], text[:, 4:12]), 1))[:, 2:])
        cache.past -= 1
        close(short(text[:, :1], cache), short(torch.cat((text[:, :2], text[:, 4:11], text[:, :1]), 1))[:, -1:])
        assert cache.past == 10
        cache.past = 9
        with pytest.raises(ValueError, match="back to 9, not to 8"): cache.past -= 1
        assert cache.past == 9


def test_forks_of_a_window_cache_go_their_own_ways(short, ids):
    cache, more = WindowCache(LONG, 3, 7), torch.randint(131, (4, 12), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        short(ids.repeat(1, 2), cache)
        rows = [2, 0, 0, 1]
        fork, fresh = cache.fork(rows), short(torch.cat((ids.repeat(1, 2)[rows], more), 1))[:, 14:]
        close(torch.cat([short(part, fork) for part in more.split([1, 5, 6], 1)], 1), fresh)
        assert (cache.past, fork.past) == (14, 26)
        close(short(more[:3], cache), short(torch.cat((ids.repeat(1, 2), more[:3]), 1))[:, 14:])


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

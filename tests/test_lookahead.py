"Beams against every text there is, and drafts against the target's own distribution."
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.families import GPT2, UntiedDecoder, llama_block
from llm_scratch.generation import generate, logprobs, next_probs
from llm_scratch.lookahead import acceptance, beam_search, speculate

CFG = ModelConfig(vocab_size=131, context_len=64, n_layers=3, n_heads=4, n_kv_heads=2, d_model=40, d_ff=72, d_head=16)


def drawn(cfg, scale, seed, make=Decoder):
    model, rng = make(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(scale * torch.randn(p.shape, generator=rng))
    return model


@pytest.fixture(scope="module")
def model(): return drawn(CFG, .2, 0)


@pytest.fixture(scope="module")
def small():
    "Two decoders of three ids that disagree."
    return [drawn(replace(CFG, vocab_size=3, n_layers=1), .3, seed) for seed in (0, 1)]


@pytest.fixture
def ids(): return torch.randint(131, (3, 7), generator=torch.Generator().manual_seed(1))


# --- beams -----------------------------------------------------------------------------------------------------------

def texts_of(n, stop, said=()):
    "Every text of `n` ids, or of fewer with `stop` at the end."
    if len(said) == n or (said and said[-1] == stop): return [said]
    return [t for v in range(3) for t in texts_of(n, stop, (*said, v))]


@pytest.mark.parametrize("stop", [None, 0, 1, 2])
def test_a_wide_beam_finds_every_text(small, stop):
    start = torch.tensor([[2, 0, 1]])
    ways = sorted(((logprobs(small[0], torch.cat((start, torch.tensor([t])), 1))[0, 2:].sum().item(), t) for t in texts_of(5, stop)), reverse=True)
    texts, nats = beam_search(small[0], start, 5, 500, stop_id=stop)
    assert len(texts) == len(ways)
    torch.testing.assert_close(nats, torch.tensor([p for p, _ in ways]), atol=1e-4, rtol=1e-4)
    assert abs(nats.exp().sum().item() - 1) < 1e-4
    full = lambda t: [2, 0, 1, *t, *[stop]*(5-len(t))]
    assert sorted(texts.tolist()) == sorted(full(t) for _, t in ways) and texts[0].tolist() == full(ways[0][1])


def test_a_beam_of_one_is_greedy_and_beams_are_sorted(model, ids):
    for row in ids:
        assert beam_search(model, row[None], 20, 1)[0].tolist() == generate(model, row[None], 20, temperature=0).tolist()
        texts, nats = beam_search(model, row[None], 8, 6)
        assert nats.tolist() == sorted(nats.tolist(), reverse=True)
        torch.testing.assert_close(logprobs(model, texts)[:, 6:].sum(1), nats, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="width=0"): beam_search(model, ids[:1], 3, 0)


def test_a_beam_stops_when_all_have_stopped(small):
    stop = beam_search(small[0], torch.tensor([[0]]), 1, 1)[0][0, 1].item()
    assert beam_search(small[0], torch.tensor([[0]]), 20, 1, stop_id=stop)[0].tolist() == [[0, stop]]


# --- drafts ----------------------------------------------------------------------------------------------------------

def probs_after(model, start, n):
    "Probability of every text of `n` ids behind `start`, in the order of `product`."
    every = torch.tensor(list(product(range(3), repeat=n)))
    return logprobs(model, torch.cat((torch.tensor([start]).expand(len(every), -1), every), 1))[:, len(start)-1:].sum(1).exp().double()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 3), st.booleans())
def test_kept_and_replaced_guesses_have_the_targets_distribution(seed, n_draft, greedy):
    "By adding up every way in which a pass can go, for tables that depend on everything said so far."
    rng = torch.Generator().manual_seed(seed)
    make = lambda: {text: next_probs(torch.randn(1, 3, generator=rng).double()*3, temperature=0 if greedy else 1)[0] for n in range(4) for text in product(range(3), repeat=n)}
    p, q = make(), make()
    chain = lambda table, text, start=0: torch.stack([torch.ones(()).double(), *(table[text[:i]][text[i]] for i in range(start, len(text)))]).prod()
    got = dict.fromkeys(product(range(3), repeat=n_draft+1), 0.)
    for guess in product(range(3), repeat=n_draft):
        said = chain(q, guess)
        if said == 0: continue
        keep, rest = acceptance(torch.stack([p[guess[:i]] for i in range(n_draft+1)]),
            torch.stack([q[guess[:i]] for i in range(n_draft)]) if n_draft else torch.empty(0, 3).double(), torch.tensor(guess, dtype=torch.int64))
        assert keep.shape == (n_draft,) and (keep <= 1).all() and torch.allclose(rest.sum(-1), torch.ones(n_draft+1).double())
        for n in range(n_draft+1):
            here = said * keep[:n].prod() * (1-keep[n] if n < n_draft else 1)
            for text in got:
                if text[:n] == guess[:n]: got[text] += (here * rest[n, text[n]] * chain(p, text, n+1)).item()
    for text, prob in got.items(): assert abs(prob - chain(p, text).item()) < 1e-9


@pytest.mark.parametrize("n_draft", [0, 1, 3, 7])
def test_greedy_drafts_change_nothing(model, ids, n_draft):
    plain = generate(model, ids[:1], 57, temperature=0)[0, 7:]  # to the end of the context
    stranger = Decoder(replace(CFG, n_layers=1))
    for draft, passes in ((model, -(-57//(n_draft+1))), (stranger, None)):
        parts = list(speculate(model, draft, ids[:1], 57, n_draft=n_draft, temperature=0))
        assert torch.cat(parts).tolist() == plain.tolist() and all(1 <= len(x) <= n_draft+1 for x in parts)
        if passes: assert len(parts) == passes
    stop = plain[9].item()
    stopped = torch.cat(list(speculate(model, model, ids[:1], 57, n_draft=n_draft, temperature=0, stop_id=stop))).tolist()
    assert stopped == plain[:plain.tolist().index(stop)+1].tolist()


@pytest.mark.parametrize("n_draft", [1, 4])
def test_drafted_texts_are_distributed_as_the_targets(small, n_draft):
    target, draft = small
    start, rng, n = [0, 2], torch.Generator().manual_seed(n_draft), 700
    written = torch.stack([torch.cat(list(speculate(target, draft, torch.tensor([start]), 3, n_draft=n_draft, rng=rng))) for _ in range(n)])
    counts = torch.bincount(written @ torch.tensor([9, 3, 1]), minlength=27)
    chi_square = lambda prob: ((counts - n*prob)**2 / (n*prob)).sum().item()
    assert chi_square(probs_after(target, start, 3)) < 54.1  # 26 degrees of freedom, once in a thousand
    assert chi_square(probs_after(draft, start, 3)) > 200
    apart = lambda model: (counts/n - probs_after(model, start, 3)).abs().sum().item()/2
    assert apart(target) < .12 < .2 < apart(draft)


def test_the_dials_hold_for_drafts(small):
    target, draft = small
    rng = torch.Generator().manual_seed(0)
    start = torch.tensor([[1]])
    allowed = next_probs(torch.as_tensor(probs_after(target, [1], 1)).log()[None], .7, top_k=2)[0]
    first = torch.cat([next(iter(speculate(target, draft, start, 4, temperature=.7, top_k=2, rng=rng)))[:1] for _ in range(300)])
    share = torch.bincount(first, minlength=3)/300
    assert (share[allowed == 0] == 0).all() and (share-allowed).abs().max() < .1


def test_what_must_not_depend_on_luck(model, ids):
    p, q = torch.tensor([[.5, .3, .2], [.1, .2, .7]]), torch.tensor([[.2, .7, .1]])
    keep, rest = acceptance(p, q, torch.tensor([1]))
    torch.testing.assert_close(keep, torch.tensor([3/7]))
    torch.testing.assert_close(rest, torch.tensor([[.75, 0, .25], [.1, .2, .7]]))  # .3 and .1 are lacking
    assert [len(x) for x in speculate(model, model, ids[:1], 10, temperature=0)] == [5, 5]  # four guesses unless told otherwise


def test_drafts_that_cannot_help_are_refused(model, small, ids):
    with pytest.raises(ValueError, match="vocabularies of 131 and 3 ids"): speculate(model, small[0], ids[:1], 3)
    with pytest.raises(ValueError, match="3 prompts"): speculate(model, model, ids, 3)
    with pytest.raises(ValueError, match="context_len=64"): speculate(model, model, ids[:1], 58)


@pytest.mark.parametrize("make", [GPT2, UntiedDecoder, partial(Decoder, block=llama_block)], ids=["gpt2", "untied", "llama"])
def test_every_decoder_can_look_ahead(model, ids, make):
    other = drawn(CFG, .2, 3, make)
    plain = generate(other, ids[:1], 20, temperature=0)
    assert beam_search(other, ids[:1], 20, 1)[0].tolist() == plain.tolist()
    for target, draft in ((other, model), (model, other)):  # also as a draft for another family
        assert torch.cat(list(speculate(target, draft, ids[:1], 20, temperature=0))).tolist() == generate(target, ids[:1], 20, temperature=0)[0, 7:].tolist()


def test_drafts_leave_gradients_on(model, ids):
    with torch.enable_grad():
        for new in speculate(model, model, ids[:1], 4): assert torch.is_grad_enabled() and not new.requires_grad

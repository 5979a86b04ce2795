"The engine: everybody gets the text that they would get alone, and nobody can stop, starve or hang the others."
import asyncio
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from models import filled
from torch.testing import assert_close

from llm_scratch.architecture import Attention, Block, Decoder, ModelConfig
from llm_scratch.compiled import njit
from llm_scratch.core import UserError, read_json
from llm_scratch.families import GPT2, MoE, UntiedDecoder, llama_block, window_attend
from llm_scratch.generation import generate, logprobs
from llm_scratch.serving import BatchEngine, Busy, Closed, CompiledSlots, FairQueue, SlotCache, SlotRows, TextJob, Ticket, fast_slots, fits_slots, matmat, n_common, read_slots

CFG = ModelConfig(vocab_size=97, context_len=96, n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ff=64, d_head=8)
WAIT = 60  # seconds after which a test fails instead of hanging
rng = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(0, 97, (1+7*i % 23,), generator=rng).tolist() for i in range(10)]


@pytest.fixture(scope="module")
def model(): return filled(Decoder(CFG))


def alone(model, job:TextJob)->list[int]:
    "What chapter 02b writes."
    chance = {} if job.seed is None else dict(rng=torch.Generator().manual_seed(job.seed))
    return generate(model, [list(job.ids)], job.max_new_tokens, temperature=job.temperature, top_k=job.top_k, top_p=job.top_p, min_p=job.min_p, stops=job.stops, **chance)[0, len(job.ids):].tolist()


class Door:
    "A model that waits before every pass until it is let through, and notes what it was given."
    def __init__(self, model, is_open=False):
        self.model, self.cfg, self.embed_tokens, self.passes = model, model.cfg, model.embed_tokens, []
        self.lock, self.is_open, self.allowed = threading.Condition(), is_open, 0

    def let(self, n:int=0, *, all:bool=False):
        with self.lock:
            self.allowed, self.is_open = self.allowed+n, self.is_open or all
            self.lock.notify_all()

    def __call__(self, ids_BT, cache):
        with self.lock:
            if len(cache.rows) > 0 and hasattr(self, "ready"):
                assert self.lock.wait_for(lambda: self.is_open or self.allowed > 0, WAIT)
                self.allowed -= not self.is_open
            self.passes.append((tuple(cache.rows), ids_BT.shape[1]))
        return read_slots(self.model, ids_BT, cache)[:, None]


def behind_a_door(model, **how)->tuple[BatchEngine, Door]:
    "An engine whose every pass needs leave; the passes that try the model out are over."
    door = Door(model)
    engine = BatchEngine(door, **how)
    door.passes.clear()
    door.ready = True
    return engine, door


def until(true, seconds:float=WAIT):
    end = time.monotonic()+seconds
    while not true():
        assert time.monotonic() < end, "it does not become true"
        time.sleep(.002)


# --- the same text as alone ----------------------------------------------------------------------------------------

FAMILIES = dict(decoder=Decoder, gpt2=GPT2, llama=partial(UntiedDecoder, block=llama_block), moe=partial(Decoder, block=partial(Block, mlp=MoE)),
                window=partial(Decoder, block=partial(Block, attention=partial(Attention, mix=partial(window_attend, window=5)))))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_equal_generates_for_every_family(family):
    model = filled(FAMILIES[family](CFG))
    jobs = [TextJob(p, 5+i, temperature=0) for i, p in enumerate(PROMPTS)]
    with BatchEngine(model, n_slots=4, chunk=6) as engine:
        tickets = [engine.submit(job) for job in jobs]
        assert [t.read(WAIT) for t in tickets] == [alone(model, job) for job in jobs]
        assert engine.lanes[0].is_batched == (family != "window")  # a window counts from the last key: rows go one by one


@pytest.mark.parametrize(("n_slots", "chunk"), [(1, 64), (3, 1), (8, 5)])
def test_sampled_texts_equal_generates_whatever_else_runs(model, n_slots, chunk):
    jobs = [TextJob(p, 4+i, temperature=.5+i/5, top_k=[None, 9][i % 2], top_p=[.9, None][i % 2], min_p=[None, .01][i % 2], seed=i) for i, p in enumerate(PROMPTS)]
    with BatchEngine(model, n_slots=n_slots, chunk=chunk) as engine:
        tickets = [engine.submit(job) for job in jobs]
        assert [t.read(WAIT) for t in tickets] == [alone(model, job) for job in jobs]


def test_a_job_without_a_seed_draws_one(model):
    with BatchEngine(model) as engine:
        torch.manual_seed(0)
        texts = [engine.submit(TextJob([1], 20)) for _ in range(4)]
        assert len({tuple(t.read(WAIT)) for t in texts}) > 1
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.random.get_rng_state())  # nobody else's chance was used


@pytest.mark.skipif(njit is None, reason="Numba is not installed: pip install numba")
@pytest.mark.parametrize("vocab_size", [97, 96])
def test_the_compiled_step_writes_the_same(vocab_size):
    model = filled(Decoder(replace(CFG, vocab_size=vocab_size)))
    jobs = [TextJob([x % vocab_size for x in p], 5+i, temperature=i % 2*.8, seed=i) for i, p in enumerate(PROMPTS)]
    with BatchEngine(CompiledSlots(model), n_slots=6, chunk=6) as engine:
        tickets = [engine.submit(job) for job in jobs]
        assert [t.read(WAIT) for t in tickets] == [alone(model, job) for job in jobs]
        assert engine.lanes[0].is_batched
    assert isinstance(fast_slots(model), CompiledSlots) and fast_slots(gpt := GPT2(CFG)) is gpt
    with pytest.raises(ValueError, match="GPT2"): CompiledSlots(gpt)


@pytest.mark.parametrize("B", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("N", [1, 2, 7])
def test_matmat_is_a_product(B, N):
    w, x, scale = (torch.randn(*shape, generator=rng) for shape in ((N, 13), (B, 13), (N,)))
    out = torch.full((B, N), torch.nan)
    matmat(w.numpy(), scale.numpy(), x.numpy(), out.numpy())
    assert_close(out, x @ w.T * scale)


def test_rows_at_different_places_answer_as_alone(model):
    cache, ids = SlotCache(CFG, 4, 30), torch.randint(0, 97, (4, 30), generator=rng)
    with torch.no_grad():
        for row, n in ((0, 9), (1, 3), (3, 20)):
            read_slots(model, ids[row:row+1, :n], SlotRows(cache, [row], n))
            cache.texts[row] = ids[row, :n].tolist()
        got = read_slots(model, torch.stack([ids[r, n:n+2] for r, n in ((3, 20), (0, 9), (1, 3))]), SlotRows(cache, [3, 0, 1], 2))
        for logits, (r, n) in zip(got, ((3, 20), (0, 9), (1, 3))): assert_close(logits, model(ids[r:r+1, :n+2])[0, -1], atol=1e-4, rtol=1e-4)
        assert not cache.k_LBGSK[:, 2].any()  # nobody wrote into the free slot
    with pytest.raises(ValueError, match="31 positions"): SlotRows(cache, [3], 11)


def test_a_model_that_ignores_places_is_not_batched(model):
    class Deaf(Decoder):
        def hidden(self, ids_BT, cache=None): return super().hidden(ids_BT, cache)  # one rotation for all rows
    deaf = filled(Deaf(CFG))
    assert fits_slots(model) and not fits_slots(deaf)
    with BatchEngine(deaf, n_slots=3) as engine:
        tickets = [engine.submit(TextJob(p, 6, temperature=0)) for p in PROMPTS]
        assert [t.read(WAIT) for t in tickets] == [alone(deaf, t.job) for t in tickets]
    class Useless(Decoder):
        def hidden(self, ids_BT, cache=None): raise RuntimeError("no")
    with pytest.raises(UserError, match="Useless can't write in a slot: RuntimeError: no"): BatchEngine(Useless(CFG))


def test_log_probabilities_are_the_models_own(model):
    job = TextJob(PROMPTS[3], 8, temperature=.7, top_k=5, seed=3, n_logprobs=4)
    with BatchEngine(model) as engine: pieces = list(engine.submit(job))
    ids = [p.id for p in pieces]
    assert_close(torch.tensor([p.logprob for p in pieces]), logprobs(model, [[*job.ids, *ids]])[0, len(job.ids)-1:], atol=1e-4, rtol=1e-4)
    for n, p in enumerate(pieces):
        scores = model(torch.tensor([[*job.ids, *ids[:n]]]))[0, -1].log_softmax(-1).topk(4)
        assert [i for i, _ in p.top] == scores.indices.tolist()
        assert_close(torch.tensor([x for _, x in p.top]), scores.values, atol=1e-4, rtol=1e-4)
    assert [p.finish for p in pieces] == [None]*7+["length"]


def test_stops(model):
    text = alone(model, TextJob(PROMPTS[5], 20, temperature=0))
    tail, first = tuple(text[6:8]), text.index(text[0])
    with BatchEngine(model) as engine:
        one = engine.submit(TextJob(PROMPTS[5], 20, temperature=0, stops=[tail, (text[0], 97)]))
        at_once = engine.submit(TextJob(PROMPTS[5], 20, temperature=0, stops=[[text[0]]]))
        never = engine.submit(TextJob(PROMPTS[5], 20, temperature=0, stops=[[text[0], text[0], text[1], 3]]))
        assert one.read(WAIT) == alone(model, one.job) and one.finish == "stop" and one.stop == tail
        assert at_once.read(WAIT) == text[:first+1] and at_once.stop == (text[0],)
        assert never.read(WAIT) == text and never.finish == "length" and never.stop == ()


# --- what was read once ---------------------------------------------------------------------------------------------

def test_a_common_beginning_is_read_once_and_changes_nothing(model):
    system = PROMPTS[9]+PROMPTS[8]+PROMPTS[7]
    jobs = [TextJob(system+tail, 6, temperature=0) for tail in ([5], [6, 7, 8], [5], [], [9, 9])]
    with BatchEngine(model, n_slots=2, reuse=True) as engine:
        tickets = []
        for job in jobs:
            tickets.append(engine.submit(job))
            tickets[-1].read(WAIT)
        stats = engine.stats()
    with BatchEngine(model, n_slots=2, reuse=False) as plain:
        again = [plain.submit(job) for job in jobs]
        assert [t.read(WAIT) for t in again] == [t.ids for t in tickets] == [alone(model, job) for job in jobs]
        assert plain.stats()["prefix_hits"] == 0 and not any(t.n_cached for t in again)
    n = len(system)
    assert [t.n_cached for t in tickets] == [0, n, n, n-1, n]  # the last id is always read: its scores are wanted
    assert stats["prefix_hits"] == 4 and stats["prefix_tokens"] == 4*n-1 and stats["prompt_tokens"] == sum(len(j.ids) for j in jobs)


def test_a_dialogue_goes_on_where_it_was(model):
    with BatchEngine(model, n_slots=2) as engine:
        first = engine.submit(TextJob(PROMPTS[6], 9, temperature=0))
        said = [*PROMPTS[6], *first.read(WAIT)]
        second = engine.submit(TextJob([*said, 4, 5], 9, temperature=0))
        assert second.read(WAIT) == alone(model, second.job)
        assert second.n_cached == len(said)-1  # the last id that was written has never been read


def test_a_running_text_lends_its_beginning(model):
    engine, door = behind_a_door(model, n_slots=3)
    with engine:
        long = engine.submit(TextJob(PROMPTS[9], 20, temperature=0))
        door.let(5)
        until(lambda: len(long.pieces) >= 4)
        other = engine.submit(TextJob([*PROMPTS[9], 1, 2], 5, temperature=0))
        door.let(all=True)
        assert other.read(WAIT) == alone(model, other.job) and long.read(WAIT) == alone(model, long.job)
        assert other.n_cached == len(PROMPTS[9])


def test_one_shared_id_does_not_cost_a_long_text(model):
    with BatchEngine(model, n_slots=3) as engine:
        long = [7, *PROMPTS[9], *PROMPTS[8]]
        for ids in (long, [7, 90, 91], [7, 80, 81], [*long, 3]): ticket = engine.submit(TextJob(ids, 1, temperature=0)); ticket.read(WAIT)
        assert ticket.n_cached == len(long)


def test_n_common():
    for a, b, n in (([], [], 0), ([1], [1], 1), ([1, 2, 3], [1, 2, 4, 5], 2), ([1]*50, [1]*49+[2], 49), ([2], [1], 0)): assert n_common(a, b) == n_common(b, a) == n


# --- nobody stalls, starves or hangs the others -----------------------------------------------------------------------

def test_a_long_prompt_is_read_between_the_others_tokens(model):
    engine, door = behind_a_door(model, n_slots=2, chunk=8)
    with engine:
        short = engine.submit(TextJob([3], 30, temperature=0))
        door.let(3)
        until(lambda: len(short.pieces) >= 2)
        long = engine.submit(TextJob([1, 2]*32, 4, temperature=0))
        door.let(all=True)
        assert long.read(WAIT) == alone(model, long.job) and short.read(WAIT) == alone(model, short.job)
    reads = [n for n, (rows, T) in enumerate(door.passes) if T > 1]
    assert [door.passes[n][1] for n in reads] == [8]*8  # 64 tokens, in pieces
    assert all(b-a == 2 for a, b in zip(reads, reads[1:]))  # and a token for the other one between any two


def test_prompts_take_turns(model):
    engine, door = behind_a_door(model, n_slots=2, chunk=8)
    with engine:
        long, short = engine.submit(TextJob([1, 2]*40, 2, temperature=0)), engine.submit(TextJob([3]*9, 2, temperature=0))
        door.let(all=True)
        short.read(WAIT), long.read(WAIT)
    assert short.first_at < long.first_at


def test_a_cancelled_job_frees_its_slot_at_the_next_step(model):
    engine, door = behind_a_door(model, n_slots=1)
    with engine:
        runs, waits, last = (engine.submit(TextJob([i], 40, temperature=0)) for i in (1, 2, 3))
        door.let(3)
        until(lambda: len(runs.pieces) == 3)
        runs.cancel(), waits.cancel()
        n = len(door.passes)
        door.let(all=True)
        assert last.read(WAIT) == alone(model, last.job)
        assert runs.finish == waits.finish == "cancelled" and waits.ids == [] and runs.ids == alone(model, runs.job)[:len(runs.ids)]
        assert len(runs.ids) <= 5 and len(door.passes)-n <= 1+40  # a pass that had begun, then the last one's
        assert engine.stats()["cancelled"] == 2
        last.cancel()  # too late, and nothing happens
        assert last.finish == "length"


def test_one_client_with_many_jobs_does_not_starve_another(model):
    engine, door = behind_a_door(model, n_slots=2, max_waiting=200)
    with engine:
        many = [engine.submit(TextJob([i % 97], 5, temperature=0, client="greedy")) for i in range(100)]
        few = [engine.submit(TextJob([i], 5, temperature=0, client="modest")) for i in range(3)]
        door.let(all=True)
        for t in few: t.read(WAIT)
        assert sum(t.finish is not None for t in many) <= 10  # the three came next, two slots in turn
        for t in many: t.cancel()


def test_a_full_queue_has_room_for_who_has_nothing_in_it(model):
    engine, door = behind_a_door(model, n_slots=1, max_waiting=8)
    with engine:
        first = engine.submit(TextJob([1], 2, client="greedy"))
        until(lambda: engine.stats()["running"] == 1)
        many = [engine.submit(TextJob([1], 2, client="greedy")) for _ in range(8)]
        with pytest.raises(Busy, match="8 jobs wait"): engine.submit(TextJob([1], 2, client="greedy"))
        others = [engine.submit(TextJob([1], 2, client=f"c{i}")) for i in range(2)]
        with pytest.raises(Busy): engine.submit(TextJob([1], 2, client="late"))
        assert engine.stats()["waiting"] == 10 and engine.stats()["refused"] == 2
        door.let(all=True)
        for t in (first, *many, *others): assert len(t.read(WAIT)) == 2


def test_the_least_served_is_next_and_absence_earns_nothing():
    queue = FairQueue()
    for i in range(4): queue.push("a", f"a{i}")
    queue.charge("a", 10)
    queue.push("b", "b0"); queue.push("b", "b1")
    assert queue.served["b"] == 10  # came late, starts where the others are
    queue.charge("b", 1)
    assert [queue.pop() for _ in range(2)] == ["a0", "a1"]
    queue.charge("a", 5)
    assert [queue.pop(), queue.pop()] == ["b0", "b1"] and len(queue) == 2
    assert queue.withdraw(lambda x: x == "a2") == ["a2"] and queue.pop() == "a3" and len(queue) == 0
    with pytest.raises(IndexError): queue.pop()
    queue.push("c", 1)
    queue.served.update(d=99., e=0.)
    queue.forget({"a"})
    assert queue.served.keys() == {"a", "c", "d"}  # e would be lifted to the floor; d owes more than that
    queue.pop(); queue.forget(set())
    assert not queue.served


def test_accounts_of_clients_do_not_grow_without_end(model):
    with BatchEngine(model, n_slots=2) as engine:
        for i in range(50): engine.submit(TextJob([1], 1, client=str(i))).read(WAIT)
        until(lambda: len(engine.queue.served) < 3)
    engine, door = behind_a_door(model, n_slots=2)
    with engine:
        runs = engine.submit(TextJob([1], 40, client="runs"))
        door.let(5)
        until(lambda: len(runs.pieces) >= 3)
        engine.queue.served.update({f"away {i}": .5 for i in range(2000)})
        engine.submit(TextJob([1], 40, client="new"))
        door.let(all=True)
        until(lambda: engine.queue.served.keys() <= {"runs", "new"})


def test_busy_says_when_to_ask_again(model):
    engine, door = behind_a_door(model, n_slots=1, max_waiting=1)
    with engine:
        runs = engine.submit(TextJob([1], 40))
        until(lambda: engine.stats()["running"] == 1)
        waits = engine.submit(TextJob([1], 50))
        with pytest.raises(Busy) as told: engine.submit(TextJob([1], 4))
        assert told.value.retry_after == 1 and isinstance(told.value, UserError)  # nothing measured yet
        engine.counts["generated"], engine.busy_seconds = 100, 50.  # two tokens a second
        with pytest.raises(Busy) as told: engine.submit(TextJob([1], 4))
        assert told.value.retry_after == pytest.approx((40+50)/2)
        for t in (runs, waits): t.cancel()
        door.let(all=True)


def test_too_many_at_once_are_refused_and_all_others_served(model):
    done, refused = [], []
    with BatchEngine(model, n_slots=3, max_waiting=6) as engine:
        def ask(i):
            try: ticket = engine.submit(TextJob([i], 5, temperature=0, client=str(i % 4)))
            except Busy as e: refused.append(e)
            else: done.append((ticket.read(WAIT), ticket.job))
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(60)]
        for t in threads: t.start()
        for t in threads: t.join(WAIT)
        stats = engine.stats()
    assert len(done)+len(refused) == 60 and stats["finished"] == len(done) and stats["refused"] == len(refused)
    assert all(ids == alone(model, job) for ids, job in done) and stats["running"] == stats["waiting"] == 0


def test_seconds_are_a_limit_for_those_who_run_and_those_who_wait(model):
    engine, door = behind_a_door(model, n_slots=1)
    with engine:
        runs = engine.submit(TextJob([1], 50, seconds=.2))
        door.let(2)
        until(lambda: len(runs.pieces) == 2)
        waits = engine.submit(TextJob([2], 5, seconds=.05))
        time.sleep(.25)
        door.let(all=True)
        assert runs.read(WAIT) and runs.finish == "length" and len(runs.ids) < 5
        assert waits.read(WAIT) == [] and waits.finish == "length"


# --- failures -----------------------------------------------------------------------------------------------------------

class Poisoned(Door):
    "Fails when it reads 13, and is not finite after it has read 66."
    def __call__(self, ids_BT, cache):
        if (ids_BT == 13).any(): raise RuntimeError("thirteen")
        logits = super().__call__(ids_BT, cache)
        logits[(ids_BT == 66).any(1)] = torch.nan
        return logits


def test_a_failing_pass_fails_the_guilty_only(model):
    model = filled(Decoder(CFG))
    with torch.no_grad(): model.embed_tokens.weight[[13, 66]] = 0  # nobody writes them by himself
    with BatchEngine(Poisoned(model, is_open=True), n_slots=4) as engine:
        jobs = [TextJob(p, 12, temperature=0) for p in PROMPTS if not {13, 66} & set(p)]
        good = [engine.submit(job) for job in jobs]
        bad, nan = engine.submit(TextJob([5, 13, 6], 8)), engine.submit(TextJob([5, 66], 8))
        with pytest.raises(RuntimeError, match="RuntimeError: thirteen"): bad.read(WAIT)
        with pytest.raises(RuntimeError, match="not finite after 2 tokens"): nan.read(WAIT)
        assert bad.finish == nan.finish == "error" and list(bad)[-1].id is None
        assert [t.read(WAIT) for t in good] == [alone(model, job) for job in jobs]
        assert engine.stats()["failed"] == 2 and engine.stats()["running"] == 0
        again = engine.submit(TextJob([5, 66, 7], 8))
        with pytest.raises(RuntimeError, match="not finite after 3"): again.read(WAIT)  # what the failed job had read is not reused
        after = engine.submit(TextJob([5, 1], 8, temperature=0))
        assert after.read(WAIT) == alone(model, after.job)


def test_a_pass_that_fails_for_all_is_done_again_for_each(model):
    class Breaks(Door):
        def __call__(self, ids_BT, cache):
            if len(cache.rows) > 1 and hasattr(self, "ready") and 42 in [len(self.passes), cache.rows and ids_BT[-1, 0].item()]: raise RuntimeError("a row is bad")
            if len(cache.rows) == 1 and ids_BT.tolist() == [[42]]: raise RuntimeError("this one")
            return super().__call__(ids_BT, cache)
    broken = Breaks(model, is_open=True)
    with BatchEngine(broken, n_slots=3) as engine:
        broken.ready = True
        jobs = [TextJob([i], 30, temperature=.9, seed=i) for i in range(20)]
        tickets = [engine.submit(job) for job in jobs]
        for t in tickets:
            for _ in t: pass
    texts = [alone(model, job) for job in jobs]
    assert any(42 in text[:-1] for text in texts) and not all(42 in text[:-1] for text in texts)
    for t, text in zip(tickets, texts):
        if 42 in text[:-1] and t.finish == "error": assert t.ids == text[:text.index(42)+1] and t.error == "RuntimeError: this one"
        else: assert t.ids == text


def test_a_mistake_of_the_engine_hangs_nobody(model, monkeypatch):
    engine, door = behind_a_door(model, n_slots=1)
    with engine:
        runs, waits = engine.submit(TextJob([1], 40)), engine.submit(TextJob([1], 40))
        door.let(2)
        until(lambda: len(runs.pieces) == 2)
        monkeypatch.setattr(BatchEngine, "_admit", lambda self: 1/0)
        door.let(all=True)
        for t in (runs, waits):
            with pytest.raises(RuntimeError, match="ZeroDivisionError"): t.read(WAIT)
        monkeypatch.undo()
        assert len(engine.submit(TextJob([1], 3)).read(WAIT)) == 3


def test_a_listener_that_fails_is_not_called_again_and_hurts_nobody(model):
    heard, calls = [], []
    engine, door = behind_a_door(model)
    with engine:
        ticket = engine.submit(TextJob([1], 6, temperature=0))
        ticket.listen(lambda piece: calls.append(piece) or 1/0)
        door.let(2)
        until(lambda: len(ticket.pieces) == 2)
        ticket.listen(heard.append)
        door.let(all=True)
        assert ticket.read(WAIT) == [p.id for p in heard] == alone(model, ticket.job) and len(calls) == 1
        assert list(ticket) == list(ticket) == heard  # as often as you like


def test_pieces_come_into_an_event_loop(model):
    async def ask(engine, job): return [piece async for piece in engine.submit(job)]
    async def all_of_them(engine): return await asyncio.gather(*(ask(engine, TextJob(p, 6, temperature=0)) for p in PROMPTS))
    with BatchEngine(model, n_slots=3) as engine: answers = asyncio.run(all_of_them(engine))
    assert [[p.id for p in pieces] for pieces in answers] == [alone(model, TextJob(p, 6, temperature=0)) for p in PROMPTS]
    assert all(pieces[-1].finish == "length" for pieces in answers)


@pytest.mark.parametrize(("wish", "said"), [
    (dict(ids=[]), "0 ids"), (dict(ids=[-1]), "id -1"), (dict(max_new_tokens=0), "max_new_tokens=0"), (dict(temperature=-1), "temperature=-1"), (dict(temperature=float("nan")), "temperature=nan"),
    (dict(top_k=0), "top_k=0"), (dict(top_p=0), "top_p=0"), (dict(top_p=1.5), "top_p=1.5"), (dict(min_p=2), "min_p=2"), (dict(stops=[[]]), "stop of 0 ids"), (dict(n_logprobs=-1), "n_logprobs=-1"), (dict(seconds=0), "seconds=0")])
def test_an_impossible_wish_is_told_at_once(wish, said):
    with pytest.raises(UserError, match=said): TextJob(**dict(ids=[1]) | wish)


def test_what_can_not_fit_is_refused(model):
    with BatchEngine(model, max_len=20) as engine:
        assert len(engine.submit(TextJob([1]*10, 10)).read(WAIT)) == 10
        with pytest.raises(UserError, match="10 tokens and max_new_tokens=11 make 21, more than max_len=20: ask for at most 10"): engine.submit(TextJob([1]*10, 11))
        with pytest.raises(UserError, match="id 97"): engine.submit(TextJob([97], 1))
        with pytest.raises(UserError, match="n_logprobs=98"): engine.submit(TextJob([1], 1, n_logprobs=98))
    for wrong in (dict(n_slots=0), dict(chunk=0), dict(max_waiting=-1), dict(max_len=97)):
        with pytest.raises(UserError): BatchEngine(model, **wrong)


# --- another model, and the end -------------------------------------------------------------------------------------------

def test_a_swap_loses_nobody(model):
    new = filled(Decoder(CFG), seed=5)
    engine, door = behind_a_door(model, n_slots=2)
    with engine:
        old = [engine.submit(TextJob(p, 12, temperature=0)) for p in PROMPTS[:4]]  # two run, two wait
        door.let(4)
        until(lambda: len(door.passes) >= 3)
        engine.swap(new)
        late = [engine.submit(TextJob(p, 12, temperature=0)) for p in PROMPTS[:2]]
        assert engine.stats()["models"] == 2 and engine.stats()["running"] == 2
        door.let(all=True)
        texts = [t.read(WAIT) for t in old+late]
        until(lambda: engine.stats()["running"] == 0)
        engine.submit(TextJob([1], 1)).read(WAIT)
        assert engine.stats()["models"] == 1 and engine.model is new
    want = [alone(m, t.job) for m, t in zip([model]*2+[new]*4, old+late)]
    assert texts == want and want[0] != want[4]
    assert late[0].n_cached == 0 or late[0].n_cached < len(PROMPTS[0])  # keys of the old model are never read by the new


def test_a_model_that_does_not_fit_changes_nothing(model):
    with BatchEngine(model, max_len=80) as engine:
        for cfg, said in ((replace(CFG, vocab_size=98), "knows 98 ids"), (replace(CFG, context_len=64), "context_len=64")):
            with pytest.raises(UserError, match=said): engine.swap(Decoder(cfg))
        bad = filled(Decoder(CFG))
        bad.layers[0].self_attn.o_proj = torch.nn.Identity()
        bad.layers[0].mlp.down_proj = torch.nn.Linear(3, 4)
        with pytest.raises(UserError, match="can't write in a slot"): engine.swap(bad)
        job = TextJob([4], 5, temperature=0)
        assert engine.submit(job).read(WAIT) == alone(model, job) and engine.stats()["models"] == 1 and engine.stats()["swaps"] == 0


def test_swaps_while_many_ask(model):
    others = [filled(Decoder(CFG), seed=s) for s in (5, 6)]
    job = TextJob(PROMPTS[4], 9, temperature=0)
    texts = {tuple(alone(m, job)) for m in (model, *others)}
    with BatchEngine(model, n_slots=3, max_waiting=100) as engine:
        tickets = []
        for n in range(60):
            tickets.append(engine.submit(job))
            if n % 15 == 7: engine.swap([model, *others][n//15 % 3])
        assert all(tuple(t.read(WAIT)) in texts for t in tickets)
        assert engine.stats()["swaps"] == 4


def test_closing_finishes_what_was_accepted(model):
    engine = BatchEngine(model, n_slots=2)
    tickets = [engine.submit(TextJob(p, 10, temperature=0)) for p in PROMPTS]
    engine.close()
    assert [t.ids for t in tickets] == [alone(model, t.job) for t in tickets] and not engine._thread.is_alive()
    with pytest.raises(Closed, match="closing"): engine.submit(TextJob([1], 1))
    engine.close()  # again, and nothing happens


def test_closing_without_patience_cancels(model):
    for how in (dict(drain=False), dict(drain=True, timeout=.05)):
        engine, door = behind_a_door(model, n_slots=1)
        tickets = [engine.submit(TextJob(p, 30, temperature=0)) for p in PROMPTS[:3]]
        door.let(2)
        until(lambda: len(tickets[0].pieces) == 2)
        threading.Timer(.3, partial(door.let, all=True)).start()
        engine.close(**how)
        assert [t.finish for t in tickets] == ["cancelled"]*3 and 2 <= len(tickets[0].ids) < 30


def test_reading_with_a_limit():
    with pytest.raises(TimeoutError, match="0.01 s"): Ticket(TextJob([1])).read(.01)


def test_the_queue_is_a_line_for_each(model):
    assert isinstance(FairQueue().lines, dict)
    queue = FairQueue()
    queue.push("a", 1)
    assert isinstance(queue.lines["a"], deque)


def test_the_benchmark_runs_and_its_texts_are_the_same(tmp_path):
    pytest.importorskip("numba")
    script = Path(__file__).resolve().parent.parent/"benchmarks"/"batching.py"
    done = subprocess.run([sys.executable, script, "--tiny", "--rounds", "1", "--out", tmp_path/"r.json"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    one, two = read_json(tmp_path/"r.json")["threads"]
    assert (one["n_threads"], two["n_threads"]) == (1, 2) and one["prefix"].keys() == {"reuse=False", "reuse=True"} and one["stall"].keys() == {"32", "128", "96"}
    for part in (one, two):
        assert all(run["equal"] == part["n_jobs"] for some in part["batching"].values() for run in some)

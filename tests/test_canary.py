"The canary: who is asked, what happens when a candidate fails, is silent, lies or is worse, and that no request is lost; with engines that say what they are told, with the real engine, and behind the real server."
import time
from dataclasses import replace
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from served import Scripted, tiny_model, tiny_served, tiny_tokenizer

from llm_scratch.core import UserError
from llm_scratch.feedback import open_store
from llm_scratch.promotion import CanaryAlarm, CanaryEngine, CanaryFeedback, Verdicts, Wager, client_place
from llm_scratch.server import Served, background_server, make_app
from llm_scratch.serving import BatchEngine, Busy, Closed, TextJob, TextPiece, Ticket


def says(*ids): return Scripted(lambda job: list(ids))

def job(client="", n=3, **more): return TextJob(ids=(1, 2), max_new_tokens=n, client=client, temperature=0, **more)

@pytest.fixture
def canary():
    "Makes one, and closes it."
    made = []
    def make(current, candidate, share=1., **how):
        made.append(CanaryEngine(current, candidate, share, **how))
        return made[-1]
    yield make
    for engine in made: engine.close(drain=False)


def test_clients_stay_where_they_are_and_the_share_is_kept(canary):
    engine = canary(says(1, 1, 1), says(2, 2, 2), .3)
    first = {c:engine.submit(job(c)).read(5)[0] for c in map(str, range(300))}
    assert {c:engine.submit(job(c)).read(5)[0] for c in map(str, range(50))} == {c:first[c] for c in map(str, range(50))}
    assert 60 < sum(x == 2 for x in first.values()) < 120 # 90 expected, four standard errors to either side
    places = [client_place(str(i)) for i in range(2000)]
    assert abs(np.mean(places)-.5) < .03 and abs(np.mean([p < .1 for p in places])-.1) < .03
    assert abs(np.corrcoef(places, [client_place(str(i), "other salt") for i in range(2000)])[0, 1]) < .1
    assert len({engine.submit(job()).read(5)[0] for _ in range(40)}) == 2 # who has no name is drawn each time


def test_what_the_candidate_breaks_off_the_current_model_ends(canary):
    current,candidate = Scripted(lambda job: [7]*9),Scripted(lambda job: [5, 6, -1])
    engine = canary(current, candidate)
    ticket = engine.submit(job("a", 5))
    pieces = list(ticket)
    assert [p.id for p in pieces] == [5, 6, 7, 7, 7] and ticket.finish == "length" and ticket.error == ""
    assert current.jobs[0].ids == (1, 2, 5, 6) and current.jobs[0].max_new_tokens == 3
    assert engine.counts == dict(canary_answers=1, canary_failures=1, canary_moved=1)
    assert not engine.rate(ticket.id, -1) # it is nobody's alone


def test_two_failures_in_a_row_are_enough(canary):
    engine = canary(says(1, 1, 1), says(-1))
    answers = [engine.submit(job(str(i))).read(5) for i in range(30)]
    assert answers == [[1, 1, 1]]*30
    assert engine.state == "rolled back" and engine.why.startswith("errors: more than 2% of answers fail, shown after 2")
    assert len(engine.candidate.jobs) == 2
    with pytest.raises(UserError, match="was taken back"): engine.promote()


@pytest.mark.parametrize("broken", [says(), Scripted(lambda job: [5]+[-1])], ids=["says nothing and ends", "breaks off"])
def test_an_answer_is_whole_or_it_is_moved(canary, broken):
    ticket = canary(says(7, 7, 7), broken).submit(job("a"))
    assert len(ticket.read(5)) in (0, 3) and ticket.finish == "length" # an empty answer is an answer


def test_who_is_silent_has_failed(canary):
    class Deaf(Scripted):
        def submit(self, job): return Ticket(job) # and nobody ever writes it
    engine = canary(says(7, 7, 7), Deaf(None), alarm=CanaryAlarm(patience=.1))
    start = time.monotonic()
    assert engine.submit(job("a")).read(5) == [7, 7, 7] and time.monotonic()-start < 2
    engine.close() # does not wait for the deaf one


def test_silence_in_the_middle(canary):
    slow = Scripted(lambda job: [5, 6], delay=.01)
    slow._write = lambda ticket: ticket._say(TextPiece(5, -1.))
    ticket = canary(says(7, 7, 7), slow, alarm=CanaryAlarm(patience=.1)).submit(job("a"))
    assert ticket.read(5) == [5, 7, 7] and ticket.model == "candidate+current"


def test_what_was_accepted_waits_when_the_current_engine_is_full(canary):
    current = Scripted(lambda job: [7]*job.max_new_tokens, delay=.05, most=1)
    engine = canary(current, Scripted(lambda job: [-1]), alarm=CanaryAlarm(errors=.9))
    tickets = [engine.submit(job(str(i), 2)) for i in range(4)] # all fail at once, and one place is free
    assert [t.read(10) for t in tickets] == [[7, 7]]*4
    full = canary(Scripted(lambda job: [7], most=0), Scripted(lambda job: [1, 1, 1], most=0))
    with pytest.raises(Busy): full.submit(job("a")) # nothing was accepted, so nothing is lost
    assert full.counts["canary_failures"] == 0 # to be full is no failure


def test_a_full_candidate_is_no_failure_and_a_wrong_job_is_not_either(canary):
    engine = canary(says(7, 7, 7), Scripted(lambda job: [1], most=0))
    assert engine.submit(job("a")).read(5) == [7, 7, 7] and engine.counts["canary_failures"] == 0
    class Picky(Scripted):
        def submit(self, job): raise UserError("not so")
    both = canary(Picky(None), Picky(None))
    with pytest.raises(UserError, match="not so"): both.submit(job("a"))
    assert both.counts["canary_failures"] == 0
    only = canary(says(7, 7, 7), Picky(None))
    assert only.submit(job("a")).read(5) == [7, 7, 7] and only.counts["canary_failures"] == 1


def test_a_stop_across_the_break(canary):
    current = Scripted(lambda job: [8, 9, 9, 9, 9])
    ticket = canary(current, Scripted(lambda job: [5, 7, -1])).submit(job("a", 6, stops=[(7, 8)]))
    assert ticket.read(5) == [5, 7, 8] and ticket.finish == "stop" and ticket.stop == (7, 8)


def test_a_form_goes_on_where_the_text_stands(canary):
    from llm_scratch.serving import TextForm
    class Masks: token_bytes = [bytes([i]) for i in range(256)]
    class Form(TextForm):
        def after(self, todo, i): return (*todo, i)
    current = says(7, 7, 7)
    canary(current, Scripted(lambda job: [5, 6, -1])).submit(job("a", 4, form=Form(Masks(), ()))).read(5)
    assert current.jobs[0].form.start == (5, 6)


def test_cancelling_reaches_whoever_writes(canary):
    for current,candidate in ((says(1), Scripted(lambda job: [1]*50, delay=.02)), (Scripted(lambda job: [1]*50, delay=.02), says(-1))):
        ticket = canary(current, candidate).submit(job("a", 50))
        while not ticket.ids: time.sleep(.005)
        ticket.cancel()
        ticket.read(5)
        assert ticket.finish == "cancelled" and len(ticket.ids) < 50


def test_closing_ends_all(canary):
    engine = canary(Scripted(lambda job: [1]*5, delay=.01), Scripted(lambda job: [2, -1]))
    tickets = [engine.submit(job(str(i), 5)) for i in range(6)]
    engine.close(drain=True)
    assert [len(t.read(1)) for t in tickets] == [5]*6
    with pytest.raises(Closed): engine.submit(job("a"))
    hasty = canary(Scripted(lambda job: [1]*500, delay=.01), Scripted(lambda job: [2]*500, delay=.01))
    tickets = [hasty.submit(job(str(i), 500)) for i in range(4)]
    hasty.close(drain=False)
    assert all(t._over.wait(5) and t.finish == "cancelled" for t in tickets)
    assert not engine._thread.is_alive() and not hasty._thread.is_alive()


def test_ratings_count_once_for_each_client_and_answer(canary):
    engine = canary(says(1, 1, 1), says(2, 2, 2), .5)
    tickets = [engine.submit(job(c)) for c in "aabc"]
    [t.read(5) for t in tickets]
    assert engine.rate(tickets[0].id, 1) and not engine.rate(tickets[0].id, 1) and not engine.rate(tickets[1].id, -1) # one answer, one client
    assert engine.rate(tickets[2].id, -1) and not engine.rate("somebody else's", 1)
    engine.known_as(tickets[3].id, "mine")
    assert not engine.rate(tickets[3].id, 1) and engine.rate("mine", 1)
    with pytest.raises(UserError, match="give 1 for a good"): engine.rate("mine", 0)
    assert sum(map(sum, engine.verdicts.rated.values())) == 3
    small = canary(says(1, 1, 1), says(2, 2, 2), n_kept=2)
    tickets = [small.submit(job(c)) for c in "abc"]
    assert [small.rate(t.id, 1) for t in tickets] == [False, True, True] # old ones are forgotten


def test_what_makes_no_pair_is_refused():
    with pytest.raises(UserError, match="give 0 to 1"): CanaryEngine(says(1), says(1), 2)
    class Sized(Scripted):
        def __init__(self, n, room):
            self.max_len,self.model = room,type("M", (), dict(cfg=type("C", (), dict(vocab_size=n))))
    with pytest.raises(UserError, match="knows 5 ids and the candidate 6"): CanaryEngine(Sized(5, 9), Sized(6, 9))
    with pytest.raises(UserError, match="give it as much room"): CanaryEngine(Sized(5, 9), Sized(5, 8))


# --- bets ---------------------------------------------------------------------------------------------------------------

def test_wagers():
    rng = np.random.default_rng(0)
    rings = 0
    for i in range(200): # the mean is just what is tolerated
        w = Wager(.1, alpha=.1)
        rings += any(w.see(float(x)) for x in rng.random(150) < .1)
    assert rings/200 <= .1+1.96*(.1*.9/200)**.5
    xs = (rng.random(200) < .4).astype(float)
    together = np.mean([np.cumprod(1+s*(xs-.1)) for s in Wager(.1).stakes], axis=0) # the purse, and not the richest player
    w = Wager(.1)
    for x in xs: w.see(x)
    assert w.alarm_at == 1+int(np.argmax(together >= 20))
    w = Wager(.1)
    for n in range(1, 200):
        if w.see(float(n%3 == 0)): break
    assert 10 < w.alarm_at == n < 100 and w.see(0.) and w.alarm # for good
    with pytest.raises(ValueError, match="is not between"): w.see(1.5)
    with pytest.raises(UserError, match="lies between"): Wager(.5, high=.4)


def test_verdicts():
    rng = np.random.default_rng(1)
    def after(n, new, now=.6, fails=0.):
        v = Verdicts(CanaryAlarm(margin=.2))
        for _ in range(n):
            v.answered(rng.random() < fails)
            v.rate("candidate", rng.random() < new)
            for _ in range(3): v.rate("current", rng.random() < now)
            if v.why or v.passed: break
        return v
    assert after(600, .1).why.startswith("quality: good ratings are more than 20% fewer") and after(600, .6, fails=.5).why.startswith("errors")
    assert after(900, .75).passed and not after(100, .6).why
    v = Verdicts()
    for _ in range(5): v.rate("candidate", False)
    assert v.worse.n == 0 # nobody to compare with yet
    v.rate("current", True); v.rate("current", True)
    assert v.worse.n == 2 # each of the candidate's has one partner at least
    with pytest.raises(UserError): CanaryAlarm(errors=0)
    with pytest.raises(UserError): CanaryAlarm(patience=0)


# --- the real engine and the real server ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tok(): return tiny_tokenizer()

def broken(tok, after=None):
    "Weights that are no numbers; or a model that breaks after some steps."
    model = tiny_model(tok, 0)
    if after is None:
        with torch.no_grad(): model.embed_tokens.weight.fill_(torch.nan)
        return model
    steps = [0]
    def count(*_):
        steps[0] += 1
        if steps[0] > after: raise RuntimeError("out of memory")
    model.layers[0].register_forward_pre_hook(count)
    return model


@pytest.mark.parametrize("after", [None, 20])
def test_no_request_is_lost_with_a_broken_model_and_many_threads(tok, canary, after):
    "Asked by eight at once, every answer is whole; and where the candidate wrote nothing, it is the current model's own."
    model = tiny_model(tok, 0)
    jobs = [TextJob(ids=(i % 7+1, 3), max_new_tokens=8, temperature=0, client=f"client {i}") for i in range(40)]
    with BatchEngine(model, n_slots=4) as alone: want = [alone.submit(j).read(30) for j in jobs]
    engine = canary(BatchEngine(model, n_slots=4, max_waiting=4), BatchEngine(broken(tok, after), n_slots=4), .5)
    def ask(j):
        for _ in range(500): # a full queue is told before an answer has begun
            try: return engine.submit(j).read(30)
            except Busy: time.sleep(.02)
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(ask, jobs))
    assert got == want # the candidate had the same weights before it broke, so even what was moved in the middle is the same
    assert engine.state == "rolled back" and engine.why.startswith("errors") and engine.counts["canary_moved"] >= 2
    assert engine.stats()["canary_rolled_back"] == 1 and engine.stats()["running"] == 0


def test_promotion_gives_everybody_the_candidate_and_keeps_the_other_behind_it(tok, canary):
    engine = canary(BatchEngine(tiny_model(tok, 0)), BatchEngine(tiny_model(tok, 1)), .0)
    j = TextJob(ids=(1, 2), max_new_tokens=6, temperature=0, client="a")
    old = engine.submit(j).read(20)
    engine.promote()
    new = engine.submit(j).read(20)
    assert new != old and engine.stats()["canary_share"] == 1
    with torch.no_grad(): engine.candidate.model.embed_tokens.weight.fill_(torch.nan)
    assert engine.submit(replace(j, ids=(2, 1))).read(20) == engine.current.submit(replace(j, ids=(2, 1))).read(20)
    engine.swap(tiny_model(tok, 2))
    assert engine.current.stats()["swaps"] == 1 and engine.candidate.stats()["swaps"] == 0


KEYS = [f"key-of-client-number-{i:03d}" for i in range(150)]

def over_http(tok, engine, tmp_path, likes, n=150):
    "Clients ask the server, some as a stream, and rate by what they got; every status and the metrics at the end."
    with open_store(tmp_path/"feedback.sqlite") as store:
        app = make_app(Served(engine, tok, None, "tiny", 256), keys=KEYS, feedback=CanaryFeedback(store, engine))
        with background_server(app) as url, httpx.Client(base_url=url, timeout=30) as client:
            seen,last = [],n
            for i,key in enumerate(KEYS[:n]):
                head = dict(authorization=f"Bearer {key}")
                got = client.post("/v1/completions", headers=head, json=dict(prompt="the cat", max_tokens=3, temperature=0))
                seen.append(got.status_code)
                rating = "up" if likes(got.json()["choices"][0]["text"]) else "down"
                if engine.state == "rolled back" and last == n: last = i+6 # and a few more
                if i == last: break
                seen.append(client.post("/v1/feedback", headers=head, json=dict(id=got.json()["id"], rating=rating)).status_code)
            return seen,client.get("/metrics").text,store.interactions()


def test_a_worse_candidate_behind_the_real_server_is_taken_back_by_its_users(tok, canary, tmp_path):
    ids = [tok.start_id, *tok.encode_ordinary("the cat")]
    with BatchEngine(tiny_model(tok, 0)) as alone: good = tok.decode(alone.submit(TextJob(ids=ids, max_new_tokens=3, temperature=0)).read(20))
    engine = canary(BatchEngine(tiny_model(tok, 0)), BatchEngine(tiny_model(tok, 1)), .4, names=("v3", "v4"))
    seen,metrics,kept = over_http(tok, engine, tmp_path, lambda text: text == good)
    assert set(seen) == {200} and engine.state == "rolled back" and engine.why.startswith("quality")
    n_bad = engine.verdicts.worse.alarm_at
    assert 2 < n_bad < 40 and sum(x.model == "v4" for x in kept) < 60
    assert "llm_server_canary_rolled_back 1.0" in metrics and "llm_server_canary_share 0.0" in metrics and "llm_server_canary_good 0.0" in metrics
    assert {x.rating for x in kept if x.model == "v4"} == {-1} and {x.rating for x in kept if x.model == "v3"} - {0} == {1} # the last one has not rated


def test_a_broken_candidate_behind_the_real_server_is_noticed_by_nobody(tok, canary, tmp_path):
    engine = canary(BatchEngine(tiny_model(tok, 0)), BatchEngine(broken(tok)), .5, names=("v3", "v4"))
    seen,metrics,kept = over_http(tok, engine, tmp_path, lambda text: True, 20)
    assert set(seen) == {200} and engine.state == "rolled back" and {x.model for x in kept} == {"v3"}
    assert "llm_server_canary_failures 2.0" in metrics and 'llm_server_errors_total' in metrics and 'engine_error' not in metrics

"The canary: who is asked, what happens when a candidate fails, is silent, lies or is worse, and that no request is lost; with engines that say what they are told, with the real engine, and behind the real server."
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from served import Scripted, tiny_model, tiny_served, tiny_tokenizer

from llm_scratch.core import UserError
from llm_scratch.promotion import CanaryAlarm, CanaryEngine, Verdicts, Wager, client_place
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

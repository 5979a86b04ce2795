"What stands behind the server in tests: a tiny model of random weights, which writes bytes that are no characters, and an engine that says what it is told, as slowly as it is told."
import threading
import time
from collections.abc import Callable

import pytest
import torch
from models import filled

from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.assistant import CHAT_TEMPLATE
from llm_scratch.server import Served, background_server, make_app
from llm_scratch.serving import BatchEngine, Busy, TextJob, TextPiece, Ticket
from llm_scratch.tokenization import Tokenizer, train_bpe

TEXTS = ["the cat sat on the mat, and the dog sat on the log. café naïve 🍮 — ünïcödé" * 3]


def tiny_tokenizer(n_merges:int=40)->Tokenizer: return train_bpe(TEXTS, 256 + n_merges + 3)


def tiny_model(tok:Tokenizer, seed:int=0, context_len:int=256)->Decoder:
    "The same weights for the same seed."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(ModelConfig(vocab_size=tok.vocab_size, context_len=context_len, n_layers=1, n_heads=2, n_kv_heads=1, d_model=32, d_ff=32, d_head=16))
    return filled(model, seed)


def tiny_served(*, chat:bool=True, seed:int=0, context_len:int=256, name:str="tiny", guard=None, **engine)->Served:
    tok = tiny_tokenizer()
    return Served(BatchEngine(tiny_model(tok, seed, context_len), **engine), tok, CHAT_TEMPLATE if chat else None, name, context_len, guard)


@pytest.fixture(scope="module")
def tiny():
    served = tiny_served(n_slots=4)
    yield served
    served.engine.close(drain=False)


@pytest.fixture(scope="module")
def url(tiny):
    with background_server(make_app(tiny)) as where: yield where


class Scripted:
    "An engine without a model: `answer` gives the ids for a job; an id of -1 fails, a number of seconds lies between two of them."
    def __init__(self, answer:Callable[[TextJob], list[int]], delay:float=0., most:int=10**6):
        self.answer,self.delay,self.most,self.jobs,self.running,self.is_closed = answer,delay,most,[],0,False

    def submit(self, job:TextJob)->Ticket:
        if self.running >= self.most: raise Busy("the queue is full: ask again in 7 s", 6.2)
        ticket = Ticket(job)
        self.jobs.append(job)
        self.running += 1
        threading.Thread(target=self._write, args=(ticket,), daemon=True).start()
        return ticket

    def _write(self, ticket:Ticket)->None:
        try:
            for n,i in enumerate(self.answer(ticket.job), 1):
                time.sleep(self.delay)
                if ticket._is_cancelled or self.is_closed: return ticket._say(TextPiece(None, finish="cancelled"))
                if i == -1: return ticket._say(TextPiece(None, finish="error"))
                finish = "stop" if (i,) in ticket.job.stops else "length" if n == ticket.job.max_new_tokens else None
                ticket._say(TextPiece(i, -1., ((i, -1.), (0, -2.))[:ticket.job.n_logprobs], finish))
                if finish: return
            ticket._say(TextPiece(None, finish="length"))
        finally: self.running -= 1

    def stats(self)->dict: return dict(running=self.running, waiting=0, slots=self.most, cache_used=0, cache_total=0)
    def close(self, drain=True, timeout=None)->None: self.is_closed = True


def scripted_served(text:str, *, delay:float=0., one_byte:bool=True, chat:bool=True, name:str="scripted", guard=None, most:int=10**6, context_len:int=512, ends:bool=True)->Served:
    "Says a text byte by byte (or token by token), and ends its turn."
    tok = tiny_tokenizer()
    ids = list(text.encode("utf-8")) if one_byte else tok.encode(text)
    served = Served(None, tok, CHAT_TEMPLATE if chat else None, name, context_len, guard)
    engine = Scripted(lambda job: ids + ([served.ends[0]] if ends else []), delay, most)
    return Served(engine, tok, served.template, name, context_len, guard)

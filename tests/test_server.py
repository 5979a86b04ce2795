"The server: what the official client gets, text that is whole, stops, the guard, keys, limits, metrics, logs, feedback, an end that loses nothing, and a reload under load. All on 127.0.0.1, on free ports."
import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
import typer
import typer.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from served import Scripted, scripted_served, tiny_model, tiny_served, tiny_tokenizer, tiny, url # noqa: F401

from llm_scratch.architecture import n_params
from llm_scratch.assistant import CHAT_TEMPLATE, encode_chat, save_assistant
from llm_scratch.core import UserError
from llm_scratch.generation import generate
from llm_scratch.guard import GuardPolicy, GuardRule, Part, Safeguard
from llm_scratch.pipeline import app as cli
from llm_scratch.server import (HOLDS, SERVER_METRICS, SSE_DONE, ApiError, Delta, Limits, Served, Voice, ask_server, _listening, background_server, error_body, held_back, hold_for, make_app, opens, probe, read_keys,
                                save_feedback, sse_line, unsupported)
from llm_scratch.serving import BatchEngine, TextPiece
from llm_scratch.tokenization import HubTokenizer

ROOT = Path(__file__).resolve().parent.parent
KEY = "a-key-that-is-long-enough"
HI = [dict(role="user", content="Hi there.")]
some = settings(max_examples=80, deadline=None, database=None)


def client(url, key="none", **how): return openai.OpenAI(base_url=f"{url}/v1", api_key=key, **dict(max_retries=0) | how)


def post(url, route="chat/completions", **body):
    with httpx.Client(timeout=30) as c: return c.post(f"{url}/v1/{route}", json=(dict(messages=HI) if "chat" in route else {}) | body)


def events(text): return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]


def until(true, seconds=10.):
    end = time.monotonic()+seconds
    while not true():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(.005)


# --- text that is whole ---------------------------------------------------------------------------------------------

def spoken(text, stops=(), *, cut=lambda raw: [bytes([b]) for b in raw], **how):
    "A text through a voice, in pieces of its bytes."
    class Tok: token_bytes = cut(text.encode("utf-8"))
    voice = Voice(Tok, (), stops, **how)
    said = []
    for i in range(len(Tok.token_bytes)):
        if (d := voice.hear(TextPiece(i, -1., (), "length" if i+1 == len(Tok.token_bytes) else None))): said.append(d)
        if voice.finish: break
    return said


@some
@given(st.text(min_size=1, max_size=30), st.lists(st.integers(1, 4), min_size=1, max_size=40))
def test_characters_are_never_broken(text, sizes):
    def cut(raw):
        parts,at = [],0
        for n in sizes*len(raw):
            if at < len(raw): parts.append(raw[at:at+n])
            at += n
        return parts
    try: text.encode("utf-8")
    except UnicodeEncodeError: return
    said = spoken(text, cut=cut)
    assert "".join(d.text for d in said) == text
    assert all("\ufffd" not in d.text for d in said) or "\ufffd" in text
    assert [d.finish for d in said][-1] == "length" and all(d.finish is None for d in said[:-1])
    assert [p.id for d in said for p in d.pieces] == list(range(len(cut(text.encode("utf-8")))))


@some
@given(st.text("abc", min_size=1, max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.integers(1, 5))
def test_a_stop_is_found_across_tokens_and_never_shown(text, stops, size):
    "However the text is cut into tokens: of several stops the one that is complete first."
    said = spoken(text, stops, cut=lambda raw: [raw[i:i+size] for i in range(0, len(raw), size)])
    ends = [(text.find(s)+len(s), text.find(s)) for s in stops if s in text]
    shown,whole = "",text[:min(ends)[1]] if ends else text
    for d in said:
        shown += d.text
        assert whole.startswith(shown), "something was shown that had to be taken back"
    assert shown == whole and said[-1].finish == ("stop" if ends else "length")


def test_what_may_be_a_stop_waits():
    assert held_back("one, tw", ["two"]) == 2 and held_back("one, two", ["twoo", "oxx"]) == 3 and held_back("abc", ["xyz"]) == 0 and held_back("abc", []) == 0
    assert [d.text for d in spoken("xabx", ["abc"])] == ["x", "abx"]
    with pytest.raises(ValueError, match="none of nothing"): Voice(None, hold="half")


def test_bytes_that_are_no_character_become_one_sign():
    class Tok: token_bytes = [b"a", b"\xff", b"b", b"\xf0\x9f"]
    voice = Voice(Tok)
    said = [voice.hear(TextPiece(i, 0., (), "stop" if i == 3 else None)) for i in range(4)]
    assert "".join(d.text for d in said if d) == "a\ufffdb\ufffd"


def test_an_end_id_is_not_shown_and_ends():
    class Tok: token_bytes = [b"a", b"<end>"]
    voice = Voice(Tok, ends=(1,))
    assert voice.hear(TextPiece(0)) == Delta("a", (TextPiece(0),)) and voice.hear(TextPiece(1, finish="stop")) == Delta("", (), "stop")


# --- the official client --------------------------------------------------------------------------------------------

def test_models(url):
    c = client(url)
    assert [m.id for m in c.models.list()] == ["tiny"] and c.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError): c.models.retrieve("other/model")


def test_a_chat_is_what_the_model_says(url, tiny):
    got = client(url).chat.completions.create(model="tiny", messages=HI, temperature=0, max_tokens=30)
    ids = encode_chat(tiny.tokenizer, HI, True).ids
    want = generate(tiny.engine.model, [ids], 30, stops=[[i] for i in tiny.ends], temperature=0)[0, len(ids):].tolist()
    if want[-1] in tiny.ends: want = want[:-1]
    assert got.choices[0].message.content == tiny.tokenizer.decode(want) and got.choices[0].message.role == "assistant"
    assert got.usage.prompt_tokens == len(ids) and got.usage.completion_tokens == 30 and got.usage.total_tokens == len(ids)+30
    assert got.object == "chat.completion" and got.model == "tiny" and got.choices[0].finish_reason == "length"


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_whole(url, n):
    c,how = client(url),dict(model="tiny", messages=HI, temperature=1., seed=7, max_tokens=24, n=n, logprobs=True, top_logprobs=2)
    whole = c.chat.completions.create(**how)
    parts = list(c.chat.completions.create(**how, stream=True, stream_options=dict(include_usage=True)))
    assert parts[-1].choices == [] and parts[-1].usage.completion_tokens == whole.usage.completion_tokens == 24*n
    assert all(p.usage is None for p in parts[:-1]) and {p.id for p in parts} == {parts[0].id}
    for i in range(n):
        mine = [p.choices[0] for p in parts[:-1] if p.choices[0].index == i]
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == whole.choices[i].finish_reason and all(x.finish_reason is None for x in mine[:-1])
        assert "".join(x.delta.content or "" for x in mine) == whole.choices[i].message.content
        told = [t for x in mine if x.logprobs for t in x.logprobs.content]
        assert told == whole.choices[i].logprobs.content and len(told) == 24 and all(len(t.top_logprobs) == 2 for t in told)
    if n > 1: assert len({c.message.content for c in whole.choices}) == n, "each answer has a seed of its own"


def test_completions(url, tiny):
    c = client(url)
    got = c.completions.create(model="tiny", prompt="the cat", temperature=0, max_tokens=12, logprobs=1)
    ids = [tiny.tokenizer.start_id, *tiny.tokenizer.encode("the cat")]
    want = generate(tiny.engine.model, [ids], 12, stops=[[i] for i in tiny.ends], temperature=0)[0, len(ids):].tolist()
    assert got.choices[0].text == tiny.tokenizer.decode(want) and got.object == "text_completion"
    lp = got.choices[0].logprobs
    assert len(lp.tokens) == len(lp.token_logprobs) == len(lp.text_offset) == len(lp.top_logprobs) == 12 and lp.text_offset[0] == 0
    assert [max(t.values()) for t in lp.top_logprobs] == lp.token_logprobs  # greedy
    parts = list(c.completions.create(model="tiny", prompt="the cat", temperature=0, max_tokens=12, logprobs=1, stream=True))
    assert "".join(p.choices[0].text for p in parts) == got.choices[0].text
    assert [t for p in parts if p.choices[0].logprobs for t in p.choices[0].logprobs.text_offset] == lp.text_offset
    several = c.completions.create(model="tiny", prompt=["the cat", "the dog"], n=2, temperature=0, max_tokens=3)
    assert [x.index for x in several.choices] == [0, 1, 2, 3] and several.choices[0].text == several.choices[1].text == got.choices[0].text[:len(several.choices[0].text)]
    assert c.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=12).choices[0].text == got.choices[0].text
    assert len(c.completions.create(model="tiny", prompt="a").choices[0].text) > 0 and post(url, "completions", prompt="a").json()["usage"]["completion_tokens"] == 16


def test_seeds_decide(url):
    say = lambda seed: client(url).chat.completions.create(model="tiny", messages=HI, temperature=1.5, seed=seed, max_tokens=12).choices[0].message.content
    assert say(3) == say(3) != say(4)


def test_the_asynchronous_client(url):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as c:
            got = await asyncio.gather(*(c.chat.completions.create(model="tiny", messages=HI, temperature=0, max_tokens=8) for _ in range(6)))
            assert len({g.choices[0].message.content for g in got}) == 1
    asyncio.run(main())


def test_parts_and_developers(url):
    plain = post(url, messages=[dict(role="system", content="Be brief."), *HI], temperature=0, max_tokens=8).json()
    parts = post(url, messages=[dict(role="developer", content="Be brief."), dict(role="user", content=[dict(type="text", text="Hi "), dict(type="text", text="there.")])], temperature=0, max_completion_tokens=8, model=None).json()
    assert plain["choices"] == parts["choices"] and plain["usage"]["prompt_tokens"] == parts["usage"]["prompt_tokens"]


# --- errors ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more, kind, says", [
    (dict(model="other"), openai.NotFoundError, "ask for tiny"), (dict(temperature=3), openai.BadRequestError, "temperature"), (dict(max_tokens=10**6), openai.BadRequestError, "ask for at most"), (dict(max_tokens=0), openai.BadRequestError, "max_tokens"),
    (dict(messages=[]), openai.BadRequestError, "messages"), (dict(messages=[dict(role="user", content=" ")]), openai.BadRequestError, "is empty"), (dict(messages=[dict(role="assistant", content="Hi")]), openai.BadRequestError, "answers a user"),
    (dict(messages=HI*2), openai.BadRequestError, "the turn of assistant"), (dict(tools=[dict(type="function", function=dict(name="f"))]), openai.BadRequestError, "tools is not supported"),
    (dict(response_format=dict(type="json_schema", json_schema=dict(name="x", schema=dict(type="object", patternProperties={})))), openai.BadRequestError, "says patternProperties"), (dict(logit_bias={"5":1}), openai.BadRequestError, "logit_bias"), (dict(n=1000), openai.BadRequestError, "ask for at most 8"),
    (dict(stop=["a"]*5), openai.BadRequestError, "at most 4"), (dict(stop=""), openai.BadRequestError, "from 1 to 256"), (dict(top_logprobs=2), openai.BadRequestError, "logprobs=true"), (dict(logprobs=True, top_logprobs=21), openai.BadRequestError, "at most 20"),
    (dict(messages=[dict(role="user", content="word "*400)]), openai.BadRequestError, "this model reads 256"), (dict(top_p=0), openai.BadRequestError, "top_p"), (dict(seed=2**70), openai.BadRequestError, "seed")])
def test_errors_have_openai_s_shape(url, more, kind, says):
    with pytest.raises(kind, match=says) as caught: client(url).chat.completions.create(**dict(model="tiny", messages=HI) | more)
    assert set(caught.value.body) == {"message", "type", "param", "code"} and caught.value.request_id
    assert client(url).chat.completions.create(model="tiny", messages=HI, max_tokens=1).choices


def test_what_would_change_nothing_is_no_mistake(url):
    assert post(url, tools=[], tool_choice="none", logit_bias={}, presence_penalty=0, frequency_penalty=0.0, response_format=dict(type="text"), user="me", metadata={}, store=False, max_tokens=2).status_code == 200
    assert unsupported(dict(best_of=3)) == "best_of" and unsupported(dict(best_of=1, echo=False)) is None and unsupported(dict(echo=True)) == "echo"


def test_a_model_without_a_template_says_so():
    with background_server(make_app(scripted_served("x", chat=False))) as url:
        with pytest.raises(openai.BadRequestError, match="no chat template: ask /v1/completions") as caught: client(url).chat.completions.create(model="scripted", messages=HI)
        assert caught.value.code == "no_chat_template" and client(url).completions.create(model="scripted", prompt="y").choices[0].text == "x"


def test_unknown_routes_and_methods(url):
    got = httpx.get(f"{url}/nowhere")
    assert got.status_code == 404 and got.json()["error"]["code"] == "unknown_url"
    assert httpx.get(f"{url}/v1/chat/completions").status_code == 405


def test_a_full_queue_is_429_with_a_time():
    served = scripted_served("word "*50, delay=.01, most=1)
    with background_server(make_app(served)) as url, ThreadPoolExecutor() as pool:
        first = pool.submit(post, url, max_tokens=40)
        until(lambda: served.engine.running)
        with pytest.raises(openai.RateLimitError) as caught: client(url).chat.completions.create(model="scripted", messages=HI)
        assert caught.value.response.headers["retry-after"] == "7" and caught.value.code == "busy"
        assert post(url, n=2).status_code == 429  # also when only a part would fit
        assert first.result().status_code == 200
        until(lambda: not served.engine.running)
        assert post(url, max_tokens=2).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_is_a_500(stream):
    served = scripted_served("x")
    served.engine.answer = lambda job: [104, 105, -1]
    with background_server(make_app(served)) as url:
        with pytest.raises(openai.APIError, match="the model failed"):
            got = client(url).chat.completions.create(model="scripted", messages=HI, stream=stream)
            for part in got: assert (part.choices[0].delta.content or "") in ("", "h", "i")
        if not stream: assert post(url).status_code == 500


@pytest.mark.parametrize("stream", [False, True])
def test_our_own_mistakes_are_a_500_in_the_same_shape(stream, monkeypatch, caplog):
    def broken(*_, **__): raise ZeroDivisionError("a secret of ours")
    served = scripted_served("hello")
    with background_server(make_app(served)) as url:
        monkeypatch.setattr(Voice, "hear", broken)
        got = post(url, stream=stream)
        assert got.status_code == (200 if stream else 500) and "secret" not in got.text
        error = events(got.text)[-1]["error"] if stream else got.json()["error"]
        assert error["type"] == "server_error" and error["code"] == "internal_error"
        monkeypatch.undo()
        assert post(url).json()["choices"][0]["message"]["content"] == "hello"
    assert "ZeroDivisionError" in caplog.text


# --- stops, limits, leaving -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_ends_the_work_too(stream):
    served = scripted_served("one two three "+"four "*80, delay=.002)
    with background_server(make_app(served)) as url:
        got = post(url, stop=["two th", "zzz"], stream=stream)
        said = "".join(e["choices"][0]["delta"].get("content", "") for e in events(got.text)) if stream else got.json()["choices"][0]["message"]["content"]
        assert said == "one " and ('"finish_reason": "stop"' in got.text or '"finish_reason":"stop"' in got.text)
        until(lambda: not served.engine.running)
        if not stream: assert got.json()["usage"]["completion_tokens"] == len("one two th")


def test_no_event_holds_half_a_character():
    text = "Crème brûlée 🍮 für 世界"
    with background_server(make_app(scripted_served(text))) as url:
        got = post(url, stream=True, logprobs=True, top_logprobs=1)
        parts = [e["choices"][0]["delta"].get("content", "") for e in events(got.text)]
        assert "".join(parts) == text and all("\ufffd" not in p for p in parts) and "🍮" in "".join(p for p in parts if len(p) == 1)
        tokens = [t for e in events(got.text) for t in (e["choices"][0]["logprobs"] or {}).get("content", ())]
        assert bytes(b for t in tokens for b in t["bytes"]).decode("utf-8") == text
        assert got.text.endswith(SSE_DONE) and got.headers["content-type"].startswith("text/event-stream")


def test_time_is_limited():
    engine = tiny_served(context_len=256, n_slots=1)
    engine.engine.model.embed_tokens.register_forward_hook(lambda *_: time.sleep(.02))
    with background_server(make_app(engine, Limits(seconds=.3))) as url:
        got = post(url, max_tokens=200, temperature=0).json()
        assert got["choices"][0]["finish_reason"] == "length" and 0 < got["usage"]["completion_tokens"] < 100
    engine.engine.close(drain=False)


def test_limits_hold_room():
    with pytest.raises(UserError, match="leaves no room"): Limits(max_tokens=0)
    with background_server(make_app(scripted_served("word "*100), Limits(max_tokens=10))) as url:
        assert post(url).json()["usage"]["completion_tokens"] == 10
        assert "at most 10" in post(url, max_tokens=11).json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_slot(stream):
    served = scripted_served("word "*90, delay=.02)
    app = make_app(served)
    with background_server(app) as url:
        with httpx.Client(timeout=httpx.Timeout(10, read=.3)) as c:
            try:
                with c.stream("POST", f"{url}/v1/chat/completions", json=dict(messages=HI, stream=stream)) as got:
                    for _ in got.iter_lines(): break
            except httpx.ReadTimeout: pass
        until(lambda: not served.engine.running and not app.state.server.running, 3)
        assert 'status="499"' in httpx.get(f"{url}/metrics").text or stream


def test_who_leaves_a_real_engine_frees_the_slot_for_the_next():
    served = tiny_served(n_slots=1, max_waiting=0)
    served.engine.model.embed_tokens.register_forward_hook(lambda *_: time.sleep(.03))
    with background_server(make_app(served)) as url:
        with httpx.Client(timeout=10) as c, c.stream("POST", f"{url}/v1/chat/completions", json=dict(messages=HI, stream=True, max_tokens=200, temperature=0)) as got:
            lines = got.iter_lines()  # kept: one that nobody holds closes its connection
            next(lines)
            assert post(url, max_tokens=1).status_code == 429
        until(lambda: served.engine.stats()["running"] == 0, 3)
        assert post(url, max_tokens=1).status_code == 200
    served.engine.close(drain=False)


# --- the guard ------------------------------------------------------------------------------------------------------

def word_part(word): return Part(lambda t: float(t.lower().count(word)), lambda t: t.replace(word, "*"), lambda t: {word:1.})


def guard(*rules): return Safeguard(GuardPolicy(tuple(GuardRule(*r) for r in rules)), dict(zorp=word_part("zorp"), pet=word_part("cat")))


def test_what_a_guard_holds_back():
    assert [hold_for(g) for g in (None, guard(("zorp", "input", "block")), guard(("pet", "output", "redact")), guard(("pet", "output", "redact"), ("zorp", "output", "block")), guard(("zorp", "output", "review")))] == ["nothing", "nothing", "sentence", "whole", "whole"]
    assert set(HOLDS) == {"nothing", "sentence", "whole"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_guard_in_front(stream):
    served = scripted_served("fine", guard=guard(("zorp", "input", "block"), ("pet", "input", "redact")))
    with background_server(make_app(served)) as url:
        stopped = post(url, messages=[dict(role="user", content="zorp it")], stream=stream)
        said = events(stopped.text)[1]["choices"][0]["delta"]["content"] if stream else stopped.json()["choices"][0]["message"]["content"]
        assert said == served.guard.policy.says and "content_filter" in stopped.text and served.engine.jobs == []
        assert "zorp" in post(url, "completions", prompt="zorp it").text or served.engine.jobs == []
        post(url, messages=[dict(role="user", content="my cat")])
        assert "cat" not in served.tokenizer.decode(served.engine.jobs[0].ids) and "my *" in served.tokenizer.decode(served.engine.jobs[0].ids)
        told = httpx.get(f"{url}/metrics").text
        assert 'llm_server_guard_decisions_total{do="block",side="input"} 2.0' in told and 'do="redact"' in told


def test_a_guard_behind_that_repairs_sees_sentences():
    served = scripted_served("I like it. My cat does. Really", delay=.003, guard=guard(("pet", "output", "redact")))
    with background_server(make_app(served)) as url:
        parts = [t for e in events(post(url, stream=True, logprobs=True).text) if (t := e["choices"][0]["delta"].get("content"))]
        assert parts == ["I like it. ", "My * does. ", "Really"]
        got = post(url, logprobs=True).json()["choices"][0]
        assert got["message"]["content"] == "I like it. My * does. Really" and got["logprobs"]["content"] == []  # tokens would tell


@pytest.mark.parametrize("stream", [False, True])
def test_a_guard_behind_that_withholds_sees_all_before_anybody(stream):
    served = scripted_served("First this. Then zorp.", guard=guard(("zorp", "output", "block")))
    with background_server(make_app(served)) as url:
        got = post(url, stream=stream, logprobs=True)
        assert "First" not in got.text and "zorp" not in got.text and served.guard.policy.says in got.text and "content_filter" in got.text
        served.engine.answer = lambda job: [*b"All is well."]
        parts = [t for e in events(post(url, stream=True).text) if (t := e["choices"][0]["delta"].get("content"))]
        assert parts == ["All is well."]


# --- keys, pages of others, names of requests -----------------------------------------------------------------------

def test_keys():
    with background_server(make_app(scripted_served("yes"), keys=(KEY, "another-key-of-someone"), reopen=lambda: 1/0)) as url:
        for wrong in ("wrong", KEY+"x", KEY[:-1], ""):
            with pytest.raises((openai.AuthenticationError, openai.APIConnectionError, openai.OpenAIError)): client(url, wrong or " ").chat.completions.create(model="scripted", messages=HI)
        assert client(url, KEY).chat.completions.create(model="scripted", messages=HI).choices and client(url, "another-key-of-someone").models.list().data
        for method,route in (("POST", "v1/chat/completions"), ("POST", "v1/completions"), ("POST", "v1/feedback"), ("GET", "v1/models"), ("POST", "admin/reload")):
            got = httpx.request(method, f"{url}/{route}", json=dict(messages=HI, prompt="a", id="a", rating="up") if method == "POST" else None)
            assert got.status_code == 401 and got.headers["www-authenticate"] == "Bearer" and got.json()["error"]["code"] == "invalid_api_key", route
        for route in ("healthz", "readyz", "metrics", ""): assert httpx.get(f"{url}/{route}").status_code == 200, route


def test_keys_are_read_and_compared(tmp_path):
    path = tmp_path/"keys"
    path.write_text(f"# ours\n{KEY}  # of Ada\n\nanother-key-of-someone\n{KEY}\n")
    assert read_keys(path) == (KEY, "another-key-of-someone") and read_keys(None, f"{KEY}, third-key-of-somebody") == (KEY, "third-key-of-somebody")
    assert read_keys() == () and read_keys(path, "third-key-of-somebody") == (KEY, "another-key-of-someone", "third-key-of-somebody")
    for text,says in (("short\n", "can be guessed"), ("# none\n", "no key"), ("ümlaut-key-that-is-long\n", "sent badly")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=says): read_keys(path)
    with pytest.raises(UserError, match="can't be read"): read_keys(tmp_path/"nothing")
    assert opens((KEY,), KEY) and not opens((KEY,), KEY[:-1]) and not opens((), "") and opens((KEY, "b"*20), KEY) != opens((KEY, "b"*20), "b"*20) and KEY not in opens((KEY,), KEY)


def test_pages_of_others_may_not_ask_unless_they_are_named():
    with background_server(make_app(scripted_served("x"))) as url:
        evil = dict(origin="https://evil.example")
        got = httpx.post(f"{url}/v1/chat/completions", json=dict(messages=HI), headers=evil)
        assert got.status_code == 403 and not any(k.startswith("access-control") for k in got.headers)
        assert httpx.post(f"{url}/v1/chat/completions", json=dict(messages=HI), headers=dict(origin=url)).status_code == 200
        assert httpx.options(f"{url}/v1/chat/completions", headers=evil | {"access-control-request-method":"POST"}).status_code == 405
    with background_server(make_app(scripted_served("x"), origins=["https://good.example"])) as url:
        good = dict(origin="https://good.example")
        assert httpx.post(f"{url}/v1/chat/completions", json=dict(messages=HI), headers=good).headers["access-control-allow-origin"] == "https://good.example"
        assert httpx.options(f"{url}/v1/chat/completions", headers=good | {"access-control-request-method":"POST"}).status_code == 200
        assert httpx.post(f"{url}/v1/chat/completions", json=dict(messages=HI), headers=dict(origin="https://evil.example")).status_code == 403


def test_requests_have_names(url):
    mine = httpx.post(f"{url}/v1/chat/completions", json=dict(messages=HI, max_tokens=1), headers={"x-request-id":"my-42"})
    assert mine.headers["x-request-id"] == "my-42" and mine.json()["id"] == "chatcmpl-my-42"
    for wrong in ("a b", "x"*65, "a\tb", "<script>"): assert httpx.get(f"{url}/v1/models", headers={"x-request-id":wrong}).headers["x-request-id"] != wrong
    assert httpx.get(f"{url}/nowhere").headers["x-request-id"]


@pytest.mark.parametrize("log_text", [False, True])
def test_logs_are_json_and_hold_no_text_unless_asked(log_text, caplog):
    caplog.set_level(logging.INFO, logger="llm_scratch.server")
    with background_server(make_app(scripted_served("an answer"), log_text=log_text, keys=(KEY,))) as url:
        client(url, KEY).chat.completions.create(model="scripted", messages=[dict(role="user", content="a private question")])
        httpx.post(f"{url}/v1/completions", json=dict(prompt="a private question", temperature="x"), headers=dict(Authorization=f"Bearer {KEY}"))
        httpx.get(f"{url}/healthz")
    rows = [json.loads(r.message) for r in caplog.records if r.name == "llm_scratch.server"]
    assert [r["status"] for r in rows] == [200, 400] and rows[0]["route"] == "/v1/chat/completions" and rows[0]["n_new"] == 10 and rows[0]["id"] and rows[0]["ttft_ms"] >= 0
    assert KEY not in caplog.text and rows[0]["client"] == opens((KEY,), KEY)
    assert ("private" in rows[0].__str__()) == log_text == ("an answer" in str(rows[0])) and "private" not in str(rows[1])


# --- operators ------------------------------------------------------------------------------------------------------

def test_metrics_are_those_of_the_table(url):
    post(url, max_tokens=3), post(url, temperature=9)
    text = httpx.get(f"{url}/metrics").text
    for m in SERVER_METRICS:
        assert f"# HELP {m.name.removesuffix('_total')}" in text or f"# HELP {m.name}" in text, m.name
        assert f"# TYPE {m.name} {m.kind}" in text
    assert 'llm_server_requests_total{route="/v1/chat/completions",status="400"}' in text and 'llm_server_tokens_total{kind="completion"}' in text
    assert "llm_server_first_token_seconds_count" in text and "llm_server_slots 4.0" in text and 'llm_server_errors_total{code="invalid_value"}' in text
    assert len({m.name for m in SERVER_METRICS}) == len(SERVER_METRICS)


def test_two_servers_count_apart():
    with background_server(make_app(scripted_served("x"))) as a, background_server(make_app(scripted_served("x"))) as b:
        post(a)
        assert "/v1/chat/completions" in httpx.get(f"{a}/metrics").text and "/v1/chat/completions" not in httpx.get(f"{b}/metrics").text


def test_feedback_is_kept_with_text_only_where_allowed(tmp_path):
    path = tmp_path/"deep"/"feedback.jsonl"
    with background_server(make_app(scripted_served("x"), feedback=path, limits=Limits(feedback_bytes=1000))) as url:
        assert post(url, "feedback", id="chatcmpl-1", rating="up", messages=HI, answer="secret").json() == dict(status="kept", text=False)
        assert post(url, "feedback", id="chatcmpl-1", rating="down", messages=HI, answer="fine", consent=True, comment="too short").status_code == 200
        for wrong in (dict(rating="great", id="a"), dict(rating="up"), dict(rating="up", id="a"*200)): assert post(url, "feedback", **wrong).status_code == 400
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert set(rows[0]) == {"time", "model", "id", "rating"} and rows[1]["answer"] == "fine" and rows[1]["messages"] == HI and rows[1]["comment"] == "too short"
        assert path.stat().st_mode & 0o777 == 0o600
        assert post(url, "feedback", id="b", rating="up", consent=True, answer="y"*2000).status_code == 503 and len(path.read_text().splitlines()) == 2
        with ThreadPoolExecutor(8) as pool: list(pool.map(lambda i: save_feedback(path, dict(i=i, pad="z"*50), 10**6), range(200)))
        assert sorted(json.loads(line)["i"] for line in path.read_text().splitlines()[2:]) == list(range(200))
    with background_server(make_app(scripted_served("x"))) as url: assert post(url, "feedback", id="a", rating="up").status_code == 404


def test_draining_finishes_what_runs_and_takes_no_more():
    served = scripted_served("word "*8, delay=.02)
    app = make_app(served)
    with background_server(app) as url, ThreadPoolExecutor() as pool:
        assert httpx.get(f"{url}/readyz").status_code == 200
        running = pool.submit(post, url, stream=True)
        until(lambda: served.engine.running)
        app.state.server.draining = True
        assert httpx.get(f"{url}/readyz").json()["status"] == "draining" and httpx.get(f"{url}/readyz").status_code == 503 and httpx.get(f"{url}/healthz").status_code == 200
        refused = post(url)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1" and refused.json()["error"]["code"] == "draining"
        assert "llm_server_draining 1.0" in httpx.get(f"{url}/metrics").text
        assert running.result().text.endswith(SSE_DONE)


# --- reload ---------------------------------------------------------------------------------------------------------

def test_a_reload_under_load_loses_no_request():
    made,tok = [],tiny_tokenizer()
    def reopen():
        made.append(tiny_served(seed=len(made)+1, n_slots=4))
        return made[-1]
    first = tiny_served(seed=0, n_slots=4)
    said = {}
    for seed in range(3): # what each of the models says
        ids = encode_chat(tok, HI, True).ids
        said[seed] = tok.decode(i for i in generate(tiny_model(tok, seed), [ids], 40, stops=[[i] for i in first.ends], temperature=0)[0, len(ids):].tolist() if i not in first.ends)
    assert len(set(said.values())) == 3
    app = make_app(first, reopen=reopen)
    with background_server(app) as url, ThreadPoolExecutor(6) as pool:
        over,answers = threading.Event(),[]
        def ask(i):
            while not over.is_set() and len(answers) < 2000:
                got = post(url, temperature=0, max_tokens=40, stream=bool(i % 2))
                text = "".join(e["choices"][0]["delta"].get("content", "") for e in events(got.text)) if i % 2 else got.json()["choices"][0]["message"]["content"]
                answers.append((got.status_code, text))
        asking = [pool.submit(ask, i) for i in range(6)]
        try:
            for n in (1, 2):
                until(lambda: len(answers) > 12*n, 30)
                assert httpx.post(f"{url}/admin/reload", timeout=30).json() == dict(model="tiny", status="reloaded")
            until(lambda: answers[-1][1] == said[2], 30)
        finally: over.set()
        for a in asking: a.result()
        assert {status for status,_ in answers} == {200} and {text for _,text in answers} == set(said.values()), "an answer was lost, or begun by one model and ended by another"
        until(lambda: first.engine.stats()["is_closed"] and made[0].engine.stats()["is_closed"])
        assert not made[1].engine.stats()["is_closed"]
        assert 'llm_server_reloads_total{outcome="done"} 2.0' in httpx.get(f"{url}/metrics").text
    made[1].engine.close(drain=False)


def test_an_old_engine_is_closed_when_its_last_reader_has_left():
    "Also one that breaks off what is running when it is closed."
    old,new = scripted_served("word "*10, delay=.02),scripted_served("new")
    with background_server(make_app(old, reopen=lambda: new)) as url, ThreadPoolExecutor() as pool:
        running = [pool.submit(post, url, stream=s) for s in (True, False)]
        until(lambda: old.engine.running == 2)
        assert httpx.post(f"{url}/admin/reload", timeout=20).status_code == 200 and not old.engine.is_closed
        assert post(url).json()["choices"][0]["message"]["content"] == "new"
        assert running[0].result().text.endswith(SSE_DONE) and running[1].result().json()["choices"][0]["message"]["content"] == "word "*10
        until(lambda: old.engine.is_closed)


def damaged():
    served = tiny_served()
    with torch.no_grad(): served.engine.model.embed_tokens.weight.fill_(torch.nan)
    return served


@pytest.mark.parametrize("bad, says", [(damaged, "does not write|damaged"), (lambda: (_ for _ in ()).throw(UserError("model.safetensors is corrupt")), "is corrupt"), (lambda: (_ for _ in ()).throw(MemoryError()), "the old one stays")])
def test_a_bad_model_is_refused_and_the_old_one_stays(bad, says):
    with background_server(make_app(scripted_served("still me"), reopen=bad)) as url:
        got = httpx.post(f"{url}/admin/reload", timeout=20)
        assert got.status_code == 400 and got.json()["error"]["code"] == "reload_refused"
        assert re.search(says, got.text)
        assert post(url).json()["choices"][0]["message"]["content"] == "still me" and 'outcome="refused"' in httpx.get(f"{url}/metrics").text


def test_probe_waits_no_longer_than_it_is_told():
    with pytest.raises(UserError, match="written no two tokens"): probe(scripted_served("xy", delay=2.), .1)
    probe(scripted_served("xy"))


def test_no_reload_without_a_way_and_not_two_at_once():
    with background_server(make_app(scripted_served("x"))) as url: assert httpx.post(f"{url}/admin/reload").status_code == 404
    go = threading.Event()
    def slow():
        go.wait(10)
        return scripted_served("new")
    app = make_app(scripted_served("old"), reopen=slow)
    with background_server(app) as url, ThreadPoolExecutor() as pool:
        first = pool.submit(httpx.post, f"{url}/admin/reload", timeout=20)
        until(lambda: app.state.server.reloading)
        assert httpx.post(f"{url}/admin/reload").status_code == 409 and post(url).json()["choices"][0]["message"]["content"] == "old"
        go.set()
        assert first.result().status_code == 200 and post(url).json()["choices"][0]["message"]["content"] == "new"


# --- the process ----------------------------------------------------------------------------------------------------

ENV = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/"tests")]), OMP_NUM_THREADS="1")
SLOW = """import sys
from served import scripted_served
from llm_scratch.server import make_app, run_server
run_server(make_app(scripted_served('word '*int(sys.argv[1]), delay=.02, context_len=4000)), port=0, grace=float(sys.argv[2]), say=lambda s: print(s, flush=True))
"""


def started(*command, **env):
    process = subprocess.Popen([sys.executable, *command], env=ENV | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    line = process.stdout.readline()
    assert " at http" in line, process.communicate(timeout=20)
    return process,line.split(" at ")[1].strip()


def test_sigterm_ends_running_streams_and_leaves_with_0():
    process,url = started("-c", SLOW, "8", "20")
    with ThreadPoolExecutor() as pool, httpx.Client() as other:
        assert other.get(f"{url}/readyz").status_code == 200
        running = pool.submit(post, url, stream=True)
        until(lambda: "llm_server_running 1.0" in other.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        until(lambda: other.get(f"{url}/readyz").status_code == 503)
        assert post(url).status_code == 503
        assert running.result().text.endswith(SSE_DONE) and "length" not in running.result().text
    assert process.wait(10) == 0


def test_grace_has_an_end():
    process,url = started("-c", SLOW, "600", ".3")
    with ThreadPoolExecutor() as pool:
        running = pool.submit(lambda: httpx.post(f"{url}/v1/chat/completions", json=dict(messages=HI, stream=True), timeout=20))
        time.sleep(.5)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0 and time.monotonic()-start < 20
        try: assert not running.result().text.endswith(SSE_DONE)
        except httpx.HTTPError: pass


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_small_pieces_do_not_wait_for_each_other(host):
    "asyncio sets the option on sockets that name their protocol only; without it each stream waits 40 ms for an acknowledgement."
    try: sock = _listening(host, 0)
    except UserError as e: pytest.skip(str(e))
    with sock, socket.create_connection(sock.getsockname()[:2]):
        accepted,_ = sock.accept()
        with accepted: assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_model_with_more_ids_than_its_tokenizer():
    "Sizes are rounded up in many models of the Hub: what has no bytes says nothing, and breaks nothing."
    tok = tiny_tokenizer()
    said = [65, tok.vocab_size+3, 66]
    with background_server(make_app(Served(Scripted(lambda job: said), tok, CHAT_TEMPLATE, "padded", 256))) as url:
        chat = post(url, max_tokens=3, logprobs=True, top_logprobs=2)
        text = post(url, "completions", prompt="a", max_tokens=3, logprobs=2)
    assert chat.status_code == text.status_code == 200 and chat.json()["choices"][0]["message"]["content"] == text.json()["choices"][0]["text"] == "AB"
    assert [t["bytes"] for t in chat.json()["choices"][0]["logprobs"]["content"]] == [[65], [], [66]]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    tok = tiny_tokenizer()
    return save_assistant(tiny_model(tok, 1), tok, tmp_path_factory.mktemp("home")/"assistant")


def test_the_verbs_serve_and_chat(home, tmp_path):
    (tmp_path/"keys").write_text(KEY)
    process,url = started("-m", "llm_scratch", "serve", str(home), "--port", "0", "--slots", "2", LLM_SCRATCH_KEYS=str(tmp_path/"keys"), LLM_SCRATCH_NAME="mine", LLM_SCRATCH_MAX_TOKENS="32", LLM_SCRATCH_FEEDBACK=str(tmp_path/"f"))
    try:
        c = client(url, KEY)
        before = c.chat.completions.create(model="mine", messages=HI, temperature=0).choices[0].message.content
        assert c.models.list().data[0].id == "mine" and httpx.get(f"{url}/v1/models").status_code == 401
        assert c.chat.completions.create(model="mine", messages=HI, temperature=0).usage.completion_tokens <= 32
        assert "".join(ask_server(url, HI, key=KEY, temperature=0, max_tokens=32)) == before
        tok = tiny_tokenizer()
        save_assistant(tiny_model(tok, 2), tok, home)  # another model in the same place
        process.send_signal(signal.SIGHUP)
        until(lambda: c.chat.completions.create(model="mine", messages=HI, temperature=0).choices[0].message.content != before, 20)
        after = c.chat.completions.create(model="mine", messages=HI, temperature=0).choices[0].message.content
        talk = lambda key: typer.testing.CliRunner(env=dict(LLM_SCRATCH_KEY=key)).invoke(cli, ["chat", "--url", url, "--temperature", "0"], input="Hi there.\n\n")
        assert talk(KEY).exit_code == 0 and after.split()[0] in talk(KEY).output
        assert talk("wrong").exit_code == 0 and "status 401: this API key is not known here" in talk("wrong").output
    finally: process.send_signal(signal.SIGTERM)
    out,err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    rows = [json.loads(line) for line in err.splitlines()]  # nothing but JSON
    assert any(r.get("event") == "reloaded" for r in rows) and any(r.get("route") == "/v1/chat/completions" for r in rows)


@pytest.fixture
def own_log():
    "What the verb does to the log is undone."
    logs = [logging.getLogger(n) for n in ("llm_scratch.server", "llm_scratch.serving", "uvicorn.error")]
    before = [(log.handlers, log.propagate, log.level) for log in logs]
    yield
    for log,(log.handlers,log.propagate,level) in zip(logs, before): log.setLevel(level)


@pytest.mark.parametrize("more, says", [(["nowhere"], "nowhere"), (["HOME", "--guard", "nothing"], "nothing is missing"), (["HOME", "--keys", "nothing"], "can't be read"), (["HOME", "--port", "TAKEN"], "can't listen")])
def test_what_a_user_can_put_right_is_one_line(home, more, says, url, tmp_path, own_log):
    args = [str(home) if a == "HOME" else url.rsplit(":", 1)[1] if a == "TAKEN" else str(tmp_path/a) if a == "nothing" else a for a in more]
    got = typer.testing.CliRunner().invoke(cli, ["serve", *args, *([] if "--port" in args else ["--port", "0"])])
    assert got.exit_code == 2 and says in got.output and "Traceback" not in got.output


def test_every_option_of_serve_has_a_variable():
    command = typer.main.get_command(cli).commands["serve"]
    for p in command.params:
        if p.name != "help": assert p.envvar and p.envvar == f"LLM_SCRATCH_{'DIR' if p.name == 'folder' else p.name.upper()}", p.name


def test_ask_server_says_what_went_wrong():
    for wrong,says in (("http://127.0.0.1:9", "can't be reached"), ("nonsense", "can't be reached|no address"), ("http://[x", "can.t be reached|no address")):
        with pytest.raises(UserError, match=says): list(ask_server(wrong, HI, timeout=2))
    served = scripted_served("abc")
    served.engine.answer = lambda job: [97, -1]
    with background_server(make_app(served)) as url:
        with pytest.raises(UserError, match="the model failed"): list(ask_server(url, HI))
        with pytest.raises(UserError, match="status 404: there is no model"): list(ask_server(url+"/v1/", HI, model="x"))


# --- small things ---------------------------------------------------------------------------------------------------

def test_lines_and_errors():
    assert sse_line(dict(a="é\n")) == 'data: {"a": "\\u00e9\\n"}\n\n' and "\n\n" == sse_line("x\n\ny")[-2:] and sse_line("x\n\ny").count("\n\n") == 1
    assert error_body(ApiError(429, "wait", "busy")) == dict(error=dict(message="wait", type="rate_limit_error", param=None, code="busy"))
    with pytest.raises(ValueError): sse_line(float("nan"))


def test_ordinary_text_is_ordinary_in_every_thread(home):
    "Two threads, one that reads special tokens as such and one that does not: neither turns the other's switch."
    tok = HubTokenizer(home, eot_id=0)
    text = "<|im_start|>user\nHi<|im_end|>"*20
    plain,special = tok.encode_ordinary(text),tok.encode(text)
    assert plain != special and not set(plain) & set(tok.special_ids.values())
    wrong,over = [],threading.Event()
    def again(encode, want):
        while not over.is_set():
            if encode(text) != want: wrong.append(encode.__name__)
    with ThreadPoolExecutor(4) as pool:
        for encode,want in ((tok.encode_ordinary, plain), (tok.encode, special))*2: pool.submit(again, encode, want)
        time.sleep(.5)
        over.set()
    assert wrong == []

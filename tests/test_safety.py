"Subjects, endpoints with bad manners, competence and refusals: laws and mistakes beyond those of chapter 09."
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.assistant import CHAT_TEMPLATE, Assistant, add_tokens
from llm_scratch.core import UserError
from llm_scratch.data import tiny_corpus, to_documents
from llm_scratch.harness import ModelScorer
from llm_scratch.safety import assistant_subject, competence, endpoint_subject, model_subject, plain_questions, refused, scripted_subject, vacuous
from llm_scratch.tokenization import train_bpe

user = lambda text: [dict(role="user", content=text)]


class Server:
    "Answers as it is told: `play` takes the number of the request and its JSON, and gives a status, a body, and headers."
    def __init__(self, play):
        self.seen, self.heads, lock = [], [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.seen.append(body)
                    self.heads.append((handler.path, handler.headers.get("Authorization")))
                    n = len(self.seen)
                status, text, *heads = play(n, body)
                try:
                    handler.send_response(status)
                    for name, value in (heads[0] if heads else {}).items(): handler.send_header(name, value)
                    pieces = [text] if isinstance(text, str) else text
                    if isinstance(text, str): handler.send_header("Content-Length", str(len(text.encode())))
                    else: handler.send_header("Connection", "close")
                    handler.end_headers()
                    for piece in pieces:
                        handler.wfile.write(piece.encode())
                        handler.wfile.flush()
                    if not isinstance(text, str): handler.close_connection = True
                except OSError: pass  # the client has gone

            def log_message(self, *args): pass
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads, self.http.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def chat(text, **more): return json.dumps(dict(choices=[dict(index=0, message=dict(role="assistant", content=text) | more)]))
def echo(n, body): return 200, chat(f"you said {body['messages'][-1]['content']}")


@pytest.fixture(scope="module")
def small():
    old = train_bpe([d.text for d in to_documents(tiny_corpus())], 320, specials=("<|endoftext|>",))
    model = init_weights(Decoder(ModelConfig(320, context_len=64, n_layers=1, n_heads=2, n_kv_heads=1, d_model=16, d_ff=16, d_head=8)), seed=0).eval()
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters(): p.data += .3*torch.randn(p.shape, generator=rng)
    return Assistant(*add_tokens(model, old), CHAT_TEMPLATE), (model, old)


# --- subjects --------------------------------------------------------------------------------------------------------

def test_a_model_answers_the_same_alone_and_among_others(small):
    assistant, (model, tok) = small
    asked = [user(t) for t in ("Soup?", "How do I make an apple pie, and what for?", "Hi")]
    for subject in (assistant_subject(assistant, "small", batch_size=2), model_subject(model, tok, "base", batch_size=2)):
        together = subject.ask(asked, 8)
        assert together == [subject.ask([d], 8)[0] for d in asked] and len(set(together)) > 1
        assert subject.context == 64 and subject.about["n_parameters"] == sum(p.numel() for p in (assistant.model if subject.name == "small" else model).parameters())
        pairs = [("Boil", " the water"), ("", "Add salt")]
        scorer = ModelScorer(assistant.model if subject.name == "small" else model, assistant.tok if subject.name == "small" else tok)
        assert_close(subject.nats(pairs), np.array([x.sum() for x in scorer.nats(pairs)]))
        assert subject.ask([], 8) == [] and subject.nats([]).shape == (0,)


def test_what_does_not_fit_is_told_and_not_cut(small):
    assistant, (model, tok) = small
    for subject in (assistant_subject(assistant, "small"), model_subject(model, tok, "base")):
        exact = next(d for n in range(200) if subject.length(d := user("a "*n + "b")) >= 50)
        room = 64-subject.length(exact)
        assert len(subject.ask([exact], room)) == 1
        with pytest.raises(UserError, match=rf"dialogue 1 has {64-room} tokens .* {room+1} new ones .* reads 64"): subject.ask([user("b"), exact], room+1)
        with pytest.raises(UserError, match="ends with a message of assistant"): subject.ask([[*user("b"), dict(role="assistant", content="c")]], 8)
        with pytest.raises(UserError, match="of nobody"): subject.ask([[]], 8)


def test_a_script_answers_and_may_have_nats():
    shout = scripted_subject(lambda d: d[-1]["content"].upper(), lambda a, b: float(len(b)), "shout")
    assert shout.ask([user("a"), user("b")], 4) == ["A", "B"] and shout.nats([("x", "abc"), ("", "")]).tolist() == [3., 0.]
    assert scripted_subject(str).nats is None and shout.nats([]).shape == (0,)


# --- endpoints -------------------------------------------------------------------------------------------------------

def test_answers_come_in_order_from_wherever_the_address_ends():
    with Server(echo) as server:
        for end in ("", "/", "/v1", "/v1/", "/v1/chat/completions"):
            subject = endpoint_subject(server.url+end, "tiny", key="hush", at_once=3)
            assert subject.ask([user(f"{i}") for i in range(7)], 5) == [f"you said {i}" for i in range(7)]
        assert {head for head in server.heads} == {("/v1/chat/completions", "Bearer hush")}
        assert server.seen[0] | dict(messages=0) == dict(model="tiny", messages=0, max_tokens=5, temperature=0)
        assert subject.nats is None and "hush" not in repr(subject) and subject.name.startswith("tiny at 127.0.0.1")
    with Server(echo) as server:
        endpoint_subject(server.url).ask([user("a")], 5)
        assert server.heads[0][1] is None


def test_a_refusal_in_its_own_field_and_silence_are_answers():
    with Server(lambda n, body: (200, chat(None, refusal="I can't."))) as server: assert endpoint_subject(server.url).ask([user("a")], 5) == ["I can't."]
    with Server(lambda n, body: (200, chat(None))) as server: assert endpoint_subject(server.url).ask([user("a")], 5) == [""]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_be_over_is_tried_again_with_growing_pauses(status):
    at = []
    def play(n, body):
        at.append(time.monotonic())
        return (status, "busy") if n < 4 else echo(n, body)
    with Server(play) as server:
        assert endpoint_subject(server.url, wait=.05, retries=3).ask([user("a")], 5) == ["you said a"]
        assert at[1]-at[0] >= .05 and at[2]-at[1] >= .1 and at[3]-at[2] >= .2
    at.clear()
    with Server(lambda n, body: (status, "busy   \n now")) as server:
        with pytest.raises(UserError, match=rf"^{server.url}/v1/chat/completions gave status {status} \(busy now\), in 3 attempts: ") as told: endpoint_subject(server.url, wait=.01).ask([user("a")], 5)
        assert len(server.seen) == 3 and "\n" not in str(told.value)


def test_a_server_that_asks_for_time_gets_it():
    at = []
    def play(n, body):
        at.append(time.monotonic())
        return (429, "", {"Retry-After": "1"}) if n == 1 else echo(n, body)
    with Server(play) as server: endpoint_subject(server.url, wait=.01).ask([user("a")], 5)
    assert .9 < at[1]-at[0] < 5


@pytest.mark.parametrize("status, body, what", [(404, "no such model", r"gave status 404 \(no such model\), in attempt 1"), (401, "", r"gave status 401 \(\)"), (200, "<html>hello</html>", "gave no JSON but '<html>hello"),
    (200, "{}", r"gave JSON without a text"), (200, '{"choices": []}', "gave JSON without a text"), (200, "[1]", "gave JSON without a text"), (200, '{"choices": [{"message": "x"}]}', "gave JSON without a text"),
    (200, chat(["parts"]), "gave JSON without a text")])
def test_what_no_patience_helps_is_told_at_once(status, body, what):
    with Server(lambda n, _: (status, body)) as server:
        with pytest.raises(UserError, match=rf"{server.url}/v1/chat/completions {what}.*'tiny'"): endpoint_subject(server.url, "tiny").ask([user("a")], 5)
        assert len(server.seen) == 1


def test_nobody_at_home():
    with Server(echo) as server: url = server.url
    with pytest.raises(UserError, match=rf"{url}/v1/chat/completions can't be reached .*, in 3 attempts"): endpoint_subject(url, wait=.01).ask([user("a")], 5)
    with pytest.raises(UserError, match="in 1 attempt:"): endpoint_subject(url, retries=0).ask([user("a")], 5)


def test_who_is_silent_or_drips_is_given_up():
    def silent(n, body): time.sleep(1); return echo(n, body)
    def drips(n, body): return 200, (time.sleep(.05) or " " for _ in range(40))
    for play, what in ((silent, r"said nothing for 0\.2 seconds"), (drips, r"was not done after 0\.2 seconds")):
        with Server(play) as server:
            start = time.monotonic()
            with pytest.raises(UserError, match=rf"{what}, in 2 attempts.*timeout=0\.2"): endpoint_subject(server.url, timeout=.2, retries=1, wait=.01).ask([user("a")], 5)
            assert time.monotonic()-start < 5


def test_one_failure_ends_the_rest():
    with Server(lambda n, body: (404, "")) as server:
        with pytest.raises(UserError): endpoint_subject(server.url, at_once=2).ask([user("a")]*100, 5)
        assert len(server.seen) < 50


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "model/"])
def test_an_address_that_is_none(url):
    with pytest.raises(UserError, match="is no address of a server"): endpoint_subject(url)


def test_no_secret_in_an_address():
    with pytest.raises(UserError, match="holds a name or a password") as told: endpoint_subject("http://me:hush@host")
    assert "hush" not in str(told.value)


# --- competence and refusals -----------------------------------------------------------------------------------------

def test_first_steps():
    mute = competence(scripted_subject(lambda d: ""))
    assert vacuous(mute) and all(row["mean"] == 0 for row in mute.rows)
    assert vacuous(competence(scripted_subject(lambda d: d[-1]["content"]))), "an echo knows nothing"
    assert refused("I'm sorry, I can't help with that.") and not refused("Boil the water.")
    assert len(plain_questions()) == 60

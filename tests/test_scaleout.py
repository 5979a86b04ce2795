"Two servers behind a real nginx: who gets what, what is passed on and what is not, one killed while people read, and no answer lost."
import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest

from llm_scratch.core import UserError
from llm_scratch.load import Ask, PracticeServer, at_times, balancer_config, local_balancer, make_asks, practice_server, run_load, wait_ready

httpx = pytest.importorskip("httpx")
ROOT = Path(__file__).resolve().parent.parent
HAS_NGINX = any((Path(p)/"nginx").exists() for p in [*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin"])
needs_nginx = pytest.mark.skipif(not HAS_NGINX, reason="the program nginx is missing: apt-get install nginx-light")


def free_port()->int:
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]


def port_of(url:str)->int: return int(url.rpartition(":")[2])


@contextmanager
def replica(port:int, per_token:float=.02):
    "A server of known speed in a process of its own: something to kill."
    process = subprocess.Popen([sys.executable, "-c", f"from llm_scratch.load import serve_practice; serve_practice({port}, 8, {per_token})"], cwd=ROOT)
    try:
        wait_ready(f"http://127.0.0.1:{port}", process)
        yield process
    finally:
        process.kill()
        process.wait()


class Closed(PracticeServer):
    "Says to every question that it is closed."
    async def complete(self, asked, writer): self.say(writer, 503, dict(error=dict(message="closed")))


class Open(PracticeServer):
    "Has a page for everything."
    def say(self, writer, status, value, more=""): super().say(writer, 200, value, more)


class Unending(PracticeServer):
    "Tells no length: its answers end with their connection."
    async def stream(self, asked, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
        for _ in range(asked["max_tokens"]):
            writer.write(b'data: {"choices": [{"text": "a "}]}\n\n')
            await writer.drain()
            await asyncio.sleep(self.per_token)
        writer.write(b"data: [DONE]\n\n")
        writer.close()


def post(url:str, **headers:str)->httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=dict(model="practice", prompt="a", max_tokens=2), headers=headers, trust_env=False, timeout=20)


# --- the configuration ------------------------------------------------------------------------------------------------

def test_the_configuration_says_what_was_asked(tmp_path):
    text = balancer_config([1001, 1002, 1003], 1000, tmp_path, fail_seconds=.5, read_seconds=7, body_bytes=1234)
    for line in ("server 127.0.0.1:1003 max_fails=1 fail_timeout=1s;", "listen 127.0.0.1:1000 ", "proxy_read_timeout 7s;", "client_max_body_size 1234;", "proxy_next_upstream_tries 3;", f"pid {tmp_path}/nginx.pid;"): assert line in text
    for ports, listen, folder in (([], 1, "."), ([1], 1, "."), ([2, 2], 1, "."), ([2], 1, "a b"), ([2], 1, "a;b"), ([2], 1, "$x")):
        with pytest.raises(UserError): balancer_config(ports, listen, folder)


@needs_nginx
def test_nginx_accepts_it_and_says_when_it_cannot_start(tmp_path):
    with practice_server() as (url, _):
        with pytest.raises(UserError, match="can't listen on port"):
            with local_balancer([port_of(url)+1], tmp_path/"b", listen=port_of(url)): pass
        with pytest.raises(UserError, match="(?s)nginx does not start.*read_timeout"):
            with local_balancer([port_of(url)], tmp_path/"d", read_seconds="soon"): pass
        with local_balancer([port_of(url)], tmp_path/"c") as front: assert post(front).status_code == 200
    with pytest.raises(OSError): socket.create_connection(("127.0.0.1", port_of(front)), timeout=2)  # it has ended


def test_without_nginx_one_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda *a, **k: None)
    with pytest.raises(UserError, match="apt-get install nginx"):
        with local_balancer([1], tmp_path): pass


# --- what comes through -----------------------------------------------------------------------------------------------

@needs_nginx
def test_the_work_is_shared_and_streams_are_not_held_back(tmp_path):
    with practice_server(per_token=.03) as (a, left), practice_server(per_token=.03) as (b, right), local_balancer([port_of(a), port_of(b)], tmp_path) as front:
        load = run_load(front, islice(make_asks(0, tokens=(6,)), 20), clients=4)
        slow = run_load(front, [Ask("x", 12, 0)], clients=1).trips[0]
    assert not load.errors and left.served+right.served == 21 and min(left.served, right.served) >= 5
    assert {port_of(t.replica) for t in load.trips} == {port_of(a), port_of(b)}
    assert slow.times[-1]-slow.times[0] > .2 and slow.first < slow.latency-.2  # word by word, as the server says them


@needs_nginx
def test_a_stream_of_unknown_length_is_not_collected(tmp_path):
    with practice_server(per_token=.05) as (url, server), local_balancer([port_of(url)], tmp_path) as front:
        server.__class__ = Unending
        t = run_load(front, [Ask("x", 10, 0)], clients=1).trips[0]
    assert not t.error and t.times[-1]-t.times[0] > .3


@needs_nginx
def test_the_fewest_open_requests_win(tmp_path):
    "One is busy with long answers: short ones go to the other."
    with practice_server(per_token=.01) as (a, _), practice_server(per_token=.01) as (b, _), local_balancer([port_of(a), port_of(b)], tmp_path) as front, ThreadPoolExecutor(1) as pool:
        long = pool.submit(run_load, front, [Ask("long", 300, 0)], clients=1)
        time.sleep(.5)
        load = run_load(front, [Ask("s", 2, n) for n in range(8)], clients=1)
        running = not long.done()
        busy = long.result().trips[0].replica
    assert running and not load.errors and busy not in {t.replica for t in load.trips}  # taking turns would have sent every other one there


@needs_nginx
def test_operators_pages_stay_inside_and_bodies_are_bounded(tmp_path):
    with practice_server() as (url, server), local_balancer([port_of(url)], tmp_path, body_bytes=2000) as front:
        server.__class__ = Open
        seen = {path:httpx.get(f"{front}{path}", trust_env=False).status_code for path in ("/healthz", "/readyz", "/metrics", "/admin/reload", "/v1/models", "/docs")}
        large = httpx.post(f"{front}/v1/completions", content=b"x"*3000, trust_env=False).status_code
    assert seen == {"/healthz":200, "/readyz":200, "/metrics":404, "/admin/reload":404, "/v1/models":200, "/docs":404} and large == 413


@needs_nginx
def test_the_books_server_knows_its_own_page_behind_it(tmp_path):
    "A page asks with its address as origin; the server compares that with the host that it was asked for."
    for name in ("fastapi", "uvicorn", "prometheus_client"): pytest.importorskip(name)
    from served import tiny_served

    from llm_scratch.server import background_server, make_app
    served = tiny_served(n_slots=2)
    with background_server(make_app(served)) as url, local_balancer([port_of(str(url))], tmp_path) as front:
        ask = dict(json=dict(prompt="a", max_tokens=2), trust_env=False, timeout=20)
        assert [httpx.post(f"{front}/v1/completions", headers=dict(origin=o), **ask).status_code for o in (front, "http://elsewhere.example")] == [200, 403]
        assert not run_load(front, islice(make_asks(0, words=(2, 4), tokens=(4,)), 6), clients=3).errors
    served.engine.close(drain=False)


# --- who fails --------------------------------------------------------------------------------------------------------

@needs_nginx
@pytest.mark.parametrize("headers", [{}, {"idempotency-key":"k"}], ids=["without a key", "with a key"])
def test_what_was_not_begun_goes_to_the_other_server(tmp_path, headers):
    "Nobody listens at one of two addresses: no client sees it, and it is left alone after the first failure."
    with practice_server() as (url, server), local_balancer([port_of(url), free_port()], tmp_path, fail_seconds=60) as front:
        answers = [post(front, **headers) for _ in range(12)]
    assert [a.status_code for a in answers] == [200]*12 and server.served == 12
    assert sum("," in a.headers["x-served-by"] for a in answers) <= 1  # tried once, then left out


@needs_nginx
def test_a_closed_server_is_passed_over_for_those_with_a_key_only(tmp_path):
    with practice_server() as (a, closed), practice_server() as (b, _):
        closed.__class__ = Closed
        for name, headers, statuses in (("key", {"idempotency-key":"k"}, {200}), ("none", {}, {200, 503})):
            with local_balancer([port_of(a), port_of(b)], tmp_path/name, fail_seconds=1) as front:
                assert {post(front, **headers).status_code for _ in range(6)} == statuses
        with local_balancer([port_of(a), port_of(b)], tmp_path/"ours", fail_seconds=1) as front: assert not run_load(front, islice(make_asks(0, tokens=(2,)), 6), clients=1).errors  # the generator sends one


@needs_nginx
def test_one_is_killed_in_mid_answer_and_nobody_is_lost(tmp_path):
    ports = [free_port(), free_port()]
    asks = at_times(make_asks(1, tokens=(10, 30)), [n*.05 for n in range(40)])
    with practice_server(per_token=0) as (url, _): calm = {t.text for t in run_load(url, asks, clients=8).trips}
    with replica(ports[0]), local_balancer(ports, tmp_path, fail_seconds=1) as front:
        def killed(retries):
            with replica(ports[1]) as victim:
                while {port_of(t.replica.split(", ")[-1]) for t in run_load(front, islice(make_asks(2, tokens=(2,)), 8), clients=8, retries=3).trips} != set(ports): time.sleep(.2)  # nginx has seen it come back
                timer = threading.Timer(.8, victim.kill)
                timer.start()
                load = run_load(front, asks, retries=retries)
                timer.join()
            return load
        without, with_ = killed(0), killed(4)
    assert set(without.errors) == {"broken"}, without.errors  # what was being written when it died, and nothing that came later
    assert 1 <= sum(without.errors.values()) <= 25 and len(without.good) >= 15
    assert not with_.errors and len(with_.good) == 40 and set(with_.retried) == {"broken"}
    assert {t.text for t in with_.trips} == calm  # the second answer is the first one
    late = [t for t in with_.trips if t.due > 1.5]
    assert late and {port_of(t.replica.split(", ")[-1]) for t in late} == {ports[0]}

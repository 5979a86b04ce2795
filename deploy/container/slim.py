"""The smallest server: an exported decoder and its tokenizer, without torch and without llm_scratch. Chapter 10f measures what that saves.

    python slim.py FOLDER [NAME.onnx]     a folder with the graph of chapter 10 and tokenizer.json, such as a bundle

It answers GET /healthz, /readyz, /v1/models and POST /v1/completions, one request after the other. Host and port come from LLM_SCRATCH_HOST and LLM_SCRATCH_PORT, as for `llm-scratch serve`. It can't batch, stream or chat.
"""
import hashlib
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

BODY = 2**20 # bytes of a request
WAITING = 16 # requests that may wait for their turn


class Graph:
    "One ONNX graph for prefill and decode; keys and values go in and come out."
    def __init__(self, path:Path):
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.past = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self.out = ["logits", *(i.name.replace("past_key_values", "present") for i in self.past)]
        said = json.loads(self.session.get_modelmeta().custom_metadata_map["llm_scratch"])["config"]
        self.context_len, self.empty = said["context_len"], np.zeros((1, said["n_kv_heads"], 0, said["d_head"]), np.float16 if self.past and "16" in self.past[0].type else np.float32)

    def write(self, ids:list[int], n:int, temperature:float, seed:int, stop_id:int|None):
        "Yield up to `n` new ids."
        rng, values, new, at = np.random.default_rng(seed), [self.empty]*len(self.past), ids, 0
        for _ in range(min(n, self.context_len-len(ids))):
            S = at+len(new)
            feeds = dict(input_ids=np.array([new]), attention_mask=np.ones((1, S), np.int64), position_ids=np.arange(at, S)[None])
            logits, *values = self.session.run(self.out, feeds | {i.name:v for i, v in zip(self.past, values)})
            last = logits[0, -1].astype(np.float64)
            one = int(last.argmax()) if temperature == 0 else int((last/temperature + rng.gumbel(size=last.shape)).argmax())
            if one == stop_id: return
            yield one
            new, at = [one], S


class Refused(Exception):
    "What the client did wrong: a status and a sentence."


class Handler(BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", 30
    def log_message(self, *args): pass

    def send(self, status:int, value:object, **headers:str):
        data = json.dumps(value).encode()
        self.send_response(status)
        for k, v in {"Content-Type":"application/json", "Content-Length":str(len(data)), **headers}.items(): self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        self.wfile.write(data)

    def fail(self, status:int, says:str, **headers:str):
        self.close_connection = True # a body may be unread
        self.send(status, dict(error=dict(message=says, type="invalid_request_error" if status < 500 else "server_error", param=None, code=None)), Connection="close", **headers)

    def do_GET(self):
        if self.path in ("/healthz", "/readyz"): self.send(200, dict(status="ok"))
        elif self.path == "/v1/models": self.send(200, dict(object="list", data=[dict(id=self.server.name, object="model", created=0, owned_by="llm_scratch")]))
        else: self.fail(404, f"there is no {self.path[:100]}: ask for /healthz, /readyz, /v1/models or /v1/completions")

    def do_POST(self):
        if self.path != "/v1/completions": return self.fail(404, f"there is no {self.path[:100]} to post to: /v1/completions is")
        if not self.server.places.acquire(blocking=False): return self.fail(429, "too many wait already", Retry_After="1")
        try: self.send(200, self.complete(self.body()))
        except Refused as e: self.fail(*e.args)
        except TimeoutError: self.close_connection = True
        finally: self.server.places.release()

    def body(self)->dict:
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal(): raise Refused(411, "say Content-Length")
        if int(size) > BODY: raise Refused(413, f"{size} bytes are more than {BODY}")
        try: body = json.loads(self.rfile.read(int(size)))
        except (ValueError, RecursionError): raise Refused(400, "the body is not JSON") from None
        if not isinstance(body, dict): raise Refused(400, "the body is not a JSON object")
        return body

    def complete(self, body:dict)->dict:
        s = self.server
        prompt, n, temperature, seed = (body.get(k, d) for k, d in (("prompt", ""), ("max_tokens", 16), ("temperature", 0), ("seed", 0)))
        number = lambda x, kind, low, high: isinstance(x, kind) and not isinstance(x, bool) and low <= x <= high
        if not isinstance(prompt, str): raise Refused(400, "prompt is not a string")
        if not number(n, int, 1, 4096): raise Refused(400, "max_tokens is not a whole number from 1 to 4096")
        if not number(temperature, (int, float), 0, 2): raise Refused(400, "temperature is not a number from 0 to 2")
        if not number(seed, int, 0, 2**63): raise Refused(400, "seed is not a whole number from 0 on")
        try: prompt.encode("utf-8")
        except UnicodeEncodeError: raise Refused(400, "prompt holds half of a surrogate pair: it is no text") from None
        ids = [*([] if s.start_id is None else [s.start_id]), *s.tokenizer.encode(prompt, add_special_tokens=False).ids]
        if not ids: raise Refused(400, "an empty prompt, and the model has no id that begins a text")
        if len(ids) >= s.graph.context_len: raise Refused(400, f"{len(ids)} tokens leave no room within {s.graph.context_len}")
        with s.turn: new = list(s.graph.write(ids, n, temperature, seed, s.stop_id))
        full = len(new) == min(n, s.graph.context_len-len(ids))
        return dict(id=f"cmpl-{time.time_ns():x}", object="text_completion", created=int(time.time()), model=s.name, choices=[dict(index=0, text=s.tokenizer.decode(new), logprobs=None, finish_reason="length" if full else "stop")],
                    usage=dict(prompt_tokens=len(ids), completion_tokens=len(new), total_tokens=len(ids)+len(new)))


def check_bundle(folder:Path)->None:
    "Every file is what the bundle's manifest says, where it has one."
    manifest = folder/"manifest.json"
    for name, digest in json.loads(manifest.read_text(encoding="utf-8"))["sha256"].items() if manifest.exists() else ():
        if not (folder/name).is_file() or hashlib.sha256((folder/name).read_bytes()).hexdigest() != digest: sys.exit(f"{folder/name} is missing or not what manifest.json says: copy the bundle again")


def special_ids(folder:Path, tokenizer:Tokenizer)->tuple[int|None, int|None]:
    "The ids that begin and end a text, as the model has learned them."
    said = folder/"generation_config.json"
    ids = json.loads(said.read_text(encoding="utf-8")) if said.exists() else {}
    one = lambda x: x[-1] if isinstance(x, list) else x
    stop = one(ids.get("eos_token_id", tokenizer.token_to_id("<|endoftext|>")))
    return one(ids.get("bos_token_id", stop)), stop


class Server(ThreadingHTTPServer):
    daemon_threads = False # closing waits for what is being written
    def __init__(self, folder:Path, graph:str, host:str, port:int):
        self.tokenizer, self.graph = Tokenizer.from_file(str(folder/"tokenizer.json")), Graph(folder/graph)
        self.start_id, self.stop_id = special_ids(folder, self.tokenizer)
        self.name, self.turn, self.places = folder.resolve().name, threading.Lock(), threading.BoundedSemaphore(WAITING)
        super().__init__((host, port), Handler)


def main()->None:
    folder = Path(sys.argv[1])
    graph = sys.argv[2] if len(sys.argv) > 2 else "fp32.onnx"
    if not (folder/graph).is_file() or not (folder/"tokenizer.json").is_file(): sys.exit(f"{folder} does not hold {graph} and tokenizer.json: give a bundle of chapter 10")
    check_bundle(folder)
    server = Server(folder, graph, os.environ.get("LLM_SCRATCH_HOST", "127.0.0.1"), int(os.environ.get("LLM_SCRATCH_PORT", "8000")))
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start()) # process 1 has no handler that it doesn't set itself
    print(f"{server.name}/{graph} on http://{server.server_address[0]}:{server.server_port}", flush=True)
    server.serve_forever(poll_interval=.1)
    server.server_close()


if __name__ == "__main__": main()

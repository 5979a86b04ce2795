"Chromium, driven by its own protocol over two pipes: nothing else has to be installed."
import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe")

PLUG = "import fcntl, os, sys; a, b = (fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3]); os.dup2(a, 3); os.dup2(b, 4); os.execvp(sys.argv[3], sys.argv[3:])"  # the browser wants its pipes as 3 and 4


class Page:
    "One page of a browser of its own; `asked` are the addresses that it has asked for, `problems` what went wrong in it."
    def __init__(self, limit:float=30.):
        self.home,self.limit,self.ids,self.asked,self.problems,self.answers,self.rest = tempfile.mkdtemp(),limit,itertools.count(1),[],[],{},b""
        (there,self.out),(self.into,back) = os.pipe(),os.pipe()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self.home}", "about:blank"]
        self.process = subprocess.Popen([sys.executable, "-S", "-c", PLUG, str(there), str(back), *command], pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        os.close(there), os.close(back)
        target = next(t for t in self.call("Target.getTargets", session=None)["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = self.call("Target.attachToTarget", session=None, targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"): self.call(f"{domain}.enable")

    def __enter__(self)->"Page": return self

    def __exit__(self, *error)->None:
        try: self.call("Browser.close", session=None)
        except Exception: pass
        os.close(self.out)
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()
        os.close(self.into)
        shutil.rmtree(self.home, ignore_errors=True)

    def call(self, method:str, session:str|None="", **params)->dict:
        "Ask the browser, and wait for what it says; the page is asked unless `session` is None."
        n = next(self.ids)
        os.write(self.out, json.dumps(dict(id=n, method=method, params=params) | ({} if session is None else dict(sessionId=self.session))).encode() + b"\0")
        end = time.monotonic()+self.limit
        while n not in self.answers: self._read(end)
        answer = self.answers.pop(n)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self, end:float)->None:
        assert select.select([self.into], [], [], max(0, end-time.monotonic()))[0], "the browser is silent"
        data = os.read(self.into, 2**20)
        assert data, "the browser has ended"
        *whole,self.rest = (self.rest+data).split(b"\0")
        for m in map(json.loads, whole):
            if "id" in m: self.answers[m["id"]] = m
            elif m["method"] == "Network.requestWillBeSent": self.asked.append(m["params"]["request"]["url"])
            elif m["method"] == "Runtime.exceptionThrown": self.problems.append(m["params"]["exceptionDetails"].get("exception", {}).get("description", m["params"]["exceptionDetails"]["text"]))
            elif m["method"] == "Log.entryAdded" and m["params"]["entry"]["level"] == "error": self.problems.append(m["params"]["entry"]["text"])

    def open(self, url:str, *, width:int=1280, height:int=900, dark:bool=False, mobile:bool=False)->None:
        "Go to an address, in a window of this size."
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")])
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def js(self, expression:str)->object:
        "The value of an expression in the page."
        got = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def until(self, condition:str, seconds:float=15.)->None:
        "Wait for something to become true in the page."
        wait = f"new Promise((yes, no) => {{ const end = Date.now() + {1000*seconds}, look = () => ({condition}) ? yes(true) : Date.now() > end ? yes(false) : setTimeout(look, 20); look(); }})"
        assert self.js(wait), f"it did not become true: {condition}\n{self.js('document.body.innerText')}"

    def press(self, key:str, text:str="", **more)->None:
        "A key goes down and up."
        for kind in ("keyDown", "keyUp"): self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **(dict(text=text) if text and kind == "keyDown" else {}), **more)

    def type(self, text:str)->None: self.call("Input.insertText", text=text)

    def shot(self, path:Path)->None: Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

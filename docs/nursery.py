"""Kernels that need not import everything anew: one process imports what nearly every chapter imports, then forks a kernel for each.

A kernel shares no variable with another one: each is a process of its own, forked before any of them has run a cell, with its own environment, folder and random state.
The names still have to be imported in the chapter, which then costs nothing. Left out is what asks at its import whether it is in a notebook: pyplot's backend, widgets, tqdm.auto and all that uses it, such as datasets, and what starts a thread, as pyarrow does.
Where a process cannot be forked, as on Windows, kernels are started as always.
"""
import gc
import json
import os
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from importlib import import_module
from threading import Lock

import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

SHARED = "IPython", "ipykernel.kernelapp", "ipykernel.ipkernel", "torch", "torch._dynamo", "numpy", "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "fsspec", "httpx"

# --- the process that forks -------------------------------------------------------------------------------------

def bury(signum:int, frame:object)->None:
    "Take note of the kernels that have ended."
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]: pass

def live(order:dict)->None:
    "Be the kernel of `order`; never returns."
    os.setsid()
    for s in (signal.SIGCHLD, signal.SIGTERM): signal.signal(s, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(os.devnull) as nothing: os.dup2(nothing.fileno(), 0) # the pipes to the nursery's owner are not the kernel's
    os.dup2(2, 1)
    os.environ.clear()
    os.environ.update(order["env"] | dict(JPY_PARENT_PID=str(os.getppid()))) # it ends with the nursery
    os.chdir(order["cwd"])
    sys.argv = ["ipykernel_launcher", *order["arguments"]]
    from ipykernel.kernelapp import IPKernelApp
    try: IPKernelApp.launch_instance(parent_handle=os.getppid())
    finally: os._exit(0)

def serve()->None:
    "Fork a kernel for each line of stdin; tell its process number; with the last line, all end."
    for name in SHARED:
        with suppress(ImportError): import_module(name)
    gc.collect()
    gc.freeze() # a kernel's garbage collector leaves what was imported alone
    sys.path.remove(os.path.dirname(os.path.abspath(__file__))) # a kernel does not find this folder
    signal.signal(signal.SIGCHLD, bury)
    kernels = []
    for line in iter(sys.stdin.buffer.raw.readline, b""): # nothing is read ahead that a fork would have as well
        sys.stdout.flush()
        if not (pid := os.fork()): live(json.loads(line))
        kernels.append(pid)
        print(pid, flush=True)
    for pid in kernels:
        with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with suppress(ChildProcessError):
        while True: os.wait()

# --- the side of the notebooks ----------------------------------------------------------------------------------

class Child:
    "A kernel that another process has forked, with what jupyter_client asks of a `Popen`."
    stdin = stdout = stderr = None
    def __init__(self, pid:int): self.pid,self.process = pid,psutil.Process(pid)
    def poll(self)->int|None: return None if self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE else 1
    def wait(self)->int:
        with suppress(psutil.NoSuchProcess): self.process.wait()
        return 1
    def send_signal(self, signum:int)->None:
        with suppress(psutil.NoSuchProcess): self.process.send_signal(signum)
    def kill(self)->None: self.send_signal(signal.SIGKILL)
    def terminate(self)->None: self.send_signal(signal.SIGTERM)

class Nursery:
    "The forking process, started when the first kernel is wanted."
    def __init__(self, env:dict[str, str]): self.env,self.process,self.lock = env,None,Lock()

    def child(self, cmd:list[str], cwd:str, env:dict[str, str])->Child:
        with self.lock:
            if self.process is None:
                self.process = subprocess.Popen([sys.executable, __file__], env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            self.process.stdin.write(json.dumps(dict(arguments=cmd[cmd.index("-f"):], cwd=str(cwd), env=env)).encode()+b"\n")
            self.process.stdin.flush()
            return Child(int(self.process.stdout.readline()))

    def close(self)->None:
        if self.process is None: return
        self.process.stdin.close()
        self.process.wait(20)
        self.process = None

class Forked(LocalProvisioner):
    "A kernel out of a nursery, in place of a new Python."
    nursery:Nursery

    async def launch_kernel(self, cmd:list[str], **kwargs:object)->dict:
        self.process = self.nursery.child(cmd, kwargs.get("cwd") or os.getcwd(), kwargs.get("env") or dict(os.environ))
        self.pid = self.pgid = self.process.pid # the kernel leads a session of its own
        self.cwd = kwargs.get("cwd")
        return self.connection_info

def manager_of(
    nursery:Nursery, # with the environment that kernels have
)->type[AsyncKernelManager]: # for nbclient
    "A kernel manager whose kernels are forked."
    class Provisioner(Forked): pass
    Provisioner.nursery = nursery

    class Manager(AsyncKernelManager):
        async def _async_pre_start_kernel(self, **kwargs:object)->tuple:
            self.kernel_id = self.kernel_id or str(uuid.uuid4())
            if self.provisioner is None: self.provisioner = Provisioner(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
            return await super()._async_pre_start_kernel(**kwargs)
        pre_start_kernel = _async_pre_start_kernel
    return Manager

if __name__ == "__main__": serve()

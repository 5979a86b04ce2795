"""Two computers on one: each host has a network card, a name, processes and an ssh server of its own; nothing of it outlives the `with`.

    with Hosts(folder) as hosts:
        hosts.run("a", ["hostname"])          # on the first host
        hosts.run("a", ["ssh", hosts.b, "hostname"])
        hosts.slow("200mbit")                 # the cable between them
        hosts.lose("b")                       # power off

A host is a network namespace with one end of a cable called `eth0`, and in it a PID namespace whose first process is an ssh server: when that one
is killed the kernel kills all the others, as when a plug is pulled. Folders are shared, as on a cluster with a network file system.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

TOOLS = dict(ip="iproute2", tc="iproute2", sshd="openssh-server", ssh="openssh-client", pdsh="pdsh", pkill="procps", nsenter="util-linux", unshare="util-linux", setpriv="util-linux")  # and the Debian package of each
ROOT = Path(__file__).resolve().parent.parent


def _sh(*command:str, check:bool=True)->subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if check and done.returncode: raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done


def lacking()->str:
    "What this machine lacks for two hosts, in one line; empty when nothing."
    if os.geteuid() != 0: return "two hosts need root, to make network namespaces"
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    if gone := sorted({package for tool, package in TOOLS.items() if not shutil.which(tool, path=path)}): return f"two hosts need {', '.join(gone)}: apt-get install {' '.join(gone)}"
    name = f"llmst{os.getpid()}"
    made = _sh("ip", "netns", "add", name, check=False)
    _sh("ip", "netns", "del", name, check=False)
    return "" if made.returncode == 0 else f"no network namespace can be made here: {made.stderr.strip()}"


def sweep()->None:
    "Remove the hosts of test processes that were killed before they could clean up."
    for line in _sh("ip", "netns", "list", check=False).stdout.splitlines():
        name = line.split()[0]
        if name.startswith("llms") and name[4:-1].isdecimal() and not Path(f"/proc/{name[4:-1]}").exists(): _remove(name)


def _remove(name:str)->None:
    for pid in _sh("ip", "netns", "pids", name, check=False).stdout.split():
        try: os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError: pass
    _sh("ip", "netns", "del", name, check=False)
    shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)
    if Path("/etc/netns").is_dir() and not any(Path("/etc/netns").iterdir()): Path("/etc/netns").rmdir()


class Hosts:
    "Two hosts, `a` and `b`, that reach each other by name over a cable of their own."
    def __init__(self, folder:Path):
        self.folder, self.a, self.b = Path(folder), f"llms{os.getpid()}a", f"llms{os.getpid()}b"
        self.names, self.address = dict(a=self.a, b=self.b), dict(a="10.77.0.1", b="10.77.0.2")
        self.roots, self.first = {}, {} # the process that holds each host, and the first process in it

    def __enter__(self)->"Hosts":
        if why := lacking(): raise RuntimeError(why)
        sweep()
        try: self._up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_)->None:
        for key in self.names: self.lose(key)
        for name in self.names.values(): _remove(name)

    def _up(self)->None:
        for name in self.names.values():
            _sh("ip", "netns", "add", name)
            etc = Path("/etc/netns")/name # `ip netns exec` lays these over /etc
            etc.mkdir(parents=True)
            (etc/"hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{self.address[k]} {n}\n" for k, n in self.names.items()), encoding="utf-8")
        _sh("ip", "link", "add", "eth0", "netns", self.a, "type", "veth", "peer", "name", "eth0", "netns", self.b)
        for key, name in self.names.items():
            for args in (["addr", "add", f"{self.address[key]}/24", "dev", "eth0"], ["link", "set", "lo", "up"], ["link", "set", "eth0", "up"]): _sh("ip", "-n", name, *args)
        self._keys()
        for key in self.names: self.power_on(key)

    def _keys(self)->None:
        "A key, a server's configuration for each host, and an `ssh` that knows the key, in a folder to put into PATH: nothing in anybody's home."
        f = self.folder
        (f/"bin").mkdir(parents=True, exist_ok=True)
        for name in ("id", "hostkey"): _sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(f/name))
        (f/"authorized_keys").write_text((f/"id.pub").read_text())
        for key in self.names:
            (f/f"sshd_{key}").write_text(f"Port 22\nListenAddress {self.address[key]}\nHostKey {f}/hostkey\nAuthorizedKeysFile {f}/authorized_keys\nPasswordAuthentication no\n"
                                         f"PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nPidFile none\nUseDNS no\nMaxStartups 64\n")
        (f/"ssh_config").write_text(f"Host *\n  IdentityFile {f}/id\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  GlobalKnownHostsFile /dev/null\n  LogLevel ERROR\n")
        (f/"bin"/"ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {f}/ssh_config "$@"\n')
        (f/"bin"/"ssh").chmod(0o755)

    def power_on(self, key:str)->None:
        "Start a host; it is up when its ssh server answers."
        name = self.names[key]
        boot = f"hostname {name}; mount -t tmpfs tmpfs /run; mkdir -m 755 /run/sshd; exec {shutil.which('sshd', path='/usr/sbin:/sbin')} -D -e -f {self.folder}/sshd_{key}"
        with open(self.folder/f"sshd_{key}.log", "a") as log:
            self.roots[key] = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", name, "unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", boot],
                                               stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while True:
            children = Path(f"/proc/{self.roots[key].pid}/task/{self.roots[key].pid}/children").read_text().split() if self.roots[key].poll() is None else []
            if children:
                self.first[key] = int(children[0])
                if self.run(key, [sys.executable, "-c", f"import socket; socket.create_connection(('{self.address[key]}', 22), 1).close()"], check=False).returncode == 0: return
            if time.monotonic() > deadline or self.roots[key].poll() is not None: raise RuntimeError(f"host {name} did not start: {(self.folder/f'sshd_{key}.log').read_text()[-500:]}")
            time.sleep(.1)

    def lose(self, key:str)->None:
        "Pull the plug: every process of the host is killed at once."
        if key not in self.roots: return
        if key in self.first:
            try: os.kill(self.first.pop(key), signal.SIGKILL)
            except ProcessLookupError: pass
        root = self.roots.pop(key)
        root.kill()
        root.wait(timeout=20)

    def env(self, **more:str)->dict[str, str]:
        "The environment of a login on a host: little, and what these tests need."
        return dict(PATH=f"{self.folder}/bin:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin", HOME=str(self.folder), LANG="C.UTF-8", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                    GLOO_SOCKET_IFNAME="eth0", DS_ACCELERATOR="cpu", PYTHONPATH=f"{ROOT}:{ROOT}/tests", TORCH_EXTENSIONS_DIR=str(self.folder/"extensions")) | more

    def command(self, key:str, command:list[str])->list[str]: return ["nsenter", "--target", str(self.first[key]), "--net", "--uts", "--pid", "--mount", "--", *map(str, command)]

    def start(self, key:str, command:list[str], log:Path|None=None, **env:str)->subprocess.Popen:
        "Begin a command on a host; its output goes to `log`."
        with open(log or os.devnull, "a") as out:
            return subprocess.Popen(self.command(key, command), env=self.env(**env), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)

    def run(self, key:str, command:list[str], timeout:float=300, check:bool=True, **env:str)->subprocess.CompletedProcess:
        "Run a command on a host."
        done = subprocess.run(self.command(key, command), env=self.env(**env), cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False)
        if check and done.returncode: raise RuntimeError(f"{' '.join(map(str, command))} on host {key}: status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done

    def pids(self, key:str, mark:str="python")->list[int]:
        "Processes on a host whose command line holds `mark`, as the outside sees them."
        found = []
        for pid in _sh("ip", "netns", "pids", self.names[key], check=False).stdout.split():
            try: line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except OSError: continue
            if mark in line: found.append(int(pid))
        return found

    def slow(self, rate:str)->None:
        "Limit the cable, in both directions, to a rate that `tc` understands, such as `200mbit`."
        for name in self.names.values(): _sh("tc", "-n", name, "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "256k", "latency", "100ms")

    def fast(self)->None:
        "Take the limit away."
        for name in self.names.values(): _sh("tc", "-n", name, "qdisc", "del", "dev", "eth0", "root", check=False)

    def sent(self, key:str)->int:
        "Bytes that have left the host on its cable."
        return int(self.run(key, ["cat", "/sys/class/net/eth0/statistics/tx_bytes"]).stdout)

    def free_port(self, key:str="a")->int:
        "A port that nobody listens on there."
        return int(self.run(key, [sys.executable, "-c", "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"]).stdout)


LAUNCH = """import json, sys
from dataclasses import replace
from llm_scratch.core import UserError
from llm_scratch.launching import launch, make_job
program, over, node, options = json.loads(sys.argv[1])
try: sys.exit(launch(replace(make_job(program, over=over, **options), last_call=3), over, node))
except UserError as e: sys.exit(f"error: {e}")
"""


def launch_on(hosts:Hosts, program:list[str], over:str="ssh", key:str="a", node:int=0, **options)->list[str]:
    "The command that launches a job from a host, as `llm-scratch launch` would; to be given to `run` or `start`."
    hostfile = hosts.folder/"hostfile"
    if not hostfile.exists(): hostfile.write_text(f"{hosts.a} slots=1\n{hosts.b} slots=1\n")
    options = dict(hostfile=str(hostfile), address=hosts.address["a"]) | options
    return [sys.executable, "-c", LAUNCH, json.dumps([list(map(str, program)), over, node, options])]


def rows_of(folder:Path)->dict[int, list[dict]]:
    "What each rank has written, see ranks.py."
    return {int(p.stem[4:]): [json.loads(line) for line in p.read_text().splitlines()] for p in sorted(Path(folder).glob("rank*.jsonl"))}


def losses_of(folder:Path)->dict[int, float]:
    "Step to loss, by the main process; where a step was made twice, the last time."
    return {row["step"]: row["loss"] for row in rows_of(folder)[0] if "step" in row}


class PullThePlug(threading.Thread):
    "Waits for ranks.py to ask for it, then switches a host off."
    def __init__(self, hosts:Hosts, key:str, folder:Path, seconds:float=200):
        super().__init__(daemon=True)
        self.hosts, self.key, self.folder, self.seconds, self.pulled = hosts, key, Path(folder), seconds, False
        self.start()

    def run(self)->None:
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline and not (self.folder/"pull the plug").exists(): time.sleep(.05)
        if time.monotonic() < deadline:
            self.hosts.lose(self.key)
            self.pulled = True


if __name__ == "__main__": # look around: python tests/hosts.py
    import tempfile
    with tempfile.TemporaryDirectory() as tmp, Hosts(Path(tmp)) as two:
        for key in two.names: print(two.run(key, ["hostname"]).stdout.strip(), two.run(key, ["ps", "ax"]).stdout)
        print(two.run("a", ["ssh", two.b, "hostname; ps ax | wc -l"]).stdout, two.run("a", ["pdsh", "-R", "ssh", "-S", "-w", f"{two.a},{two.b}", "hostname; echo %n"]).stdout)
        print(two.sent("a"), two.free_port(), socket.gethostname())

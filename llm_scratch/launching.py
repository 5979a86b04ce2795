import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from llm_scratch.core import UserError

@dataclass(frozen=True)
class Host:
    "One machine of a job."
    name:str # what ssh calls it
    slots:int # processes that it runs, one for each GPU

def rank_environments(
    hosts:Sequence[Host], # in the order of the ranks
    address:str="127.0.0.1", # of the first host, as the others reach it
    port:int=29500, # where rank 0 will listen there
)->list[dict[str, str]]: # one environment per process, rank by rank
    "What each process must be told to find the others."
    shared = dict(MASTER_ADDR=address, MASTER_PORT=str(port), WORLD_SIZE=str(sum(h.slots for h in hosts)))
    places = [(node, local, h.slots) for node,h in enumerate(hosts) for local in range(h.slots)]
    return [shared | dict(RANK=str(rank), LOCAL_RANK=str(local), LOCAL_WORLD_SIZE=str(slots), GROUP_RANK=str(node)) for rank,(node,local,slots) in enumerate(places)]

def _end(started:Sequence[subprocess.Popen], patience:float)->None:
    "Ask every group of processes to end; kill what has not ended after `patience` seconds."
    def all_get(number:int)->None:
        for p in started:
            try: os.killpg(p.pid, number)
            except ProcessLookupError: pass
    deadline = time.monotonic() + patience
    all_get(signal.SIGTERM)
    while any(p.poll() is None for p in started) and time.monotonic() < deadline: time.sleep(.05)
    all_get(signal.SIGKILL) # groups whose leader has gone may still have members
    for p in started: p.wait()

@contextmanager
def _signals()->Iterator[list[int]]:
    "Collect SIGTERM and Ctrl-C in a list while the block runs."
    heard,names = [],(signal.SIGTERM, signal.SIGINT)
    old = [signal.signal(s, lambda number, frame: heard.append(number)) for s in names]
    try: yield heard
    finally:
        for s,handler in zip(names, old): signal.signal(s, handler)

def run_together(
    commands:Sequence[Sequence[str]], # each starts one process
    environments:Sequence[Mapping[str, str]]=(), # what each gets beside our own environment; empty is nothing
    *,
    may_fail:int=0, # how many may end badly without ending the others
    patience:float=40., # seconds between asking a process to end and killing it
    alarm:str="", # a line of the error output that matches this pattern counts as a failure; its group 1 is the status
)->int: # 0, or the status of the first that failed; 128+N after signal number N
    "Start processes that live and die together: when one fails, or we are asked to end, the others are ended too."
    started,failed = [],[]
    with _signals() as heard:
        try:
            for command,more in zip(commands, environments or [{}]*len(commands), strict=True):
                started.append(subprocess.Popen(command, env=os.environ | dict(more), start_new_session=True, stderr=subprocess.PIPE if alarm else None))
                if alarm: threading.Thread(target=_listen, args=(started[-1].stderr, alarm, failed), daemon=True).start()
            alive = list(started)
            while alive and not heard and len(failed) <= may_fail:
                time.sleep(.05)
                failed += [128-p.returncode if p.returncode < 0 else p.returncode for p in alive if p.poll()]
                alive = [p for p in alive if p.returncode is None]
        except FileNotFoundError as e: raise UserError(f"there is no program {e.filename} here: install it, or start the job another way") from None
        finally: _end(started, patience)
    return 128+heard[0] if heard else failed[0] if len(failed) > may_fail else 0

def _listen(stream, alarm:str, failed:list[int])->None: # in a thread, until the stream ends
    for line in stream:
        sys.stderr.write(text := line.decode(errors="replace"))
        if found := re.search(alarm, text): failed.append(int(found[1]))

def parse_hostfile(
    text:str, # lines of `NAME slots=N`; what follows a `#` is a comment
    source:str="hostfile", # what to call it in messages
)->tuple[Host, ...]: # in the order of the lines, which is that of the ranks
    "Read a list of machines; `UserError` names the line at fault."
    seen = {}
    for n,line in enumerate(text.splitlines(), 1):
        if not (words := line.partition("#")[0].split()): continue
        found = re.fullmatch(r"((?:\w[\w.-]*@)?\w[\w.-]*) slots=(\d+)", " ".join(words))
        if not found: raise UserError(f"{source}, line {n}: {' '.join(words)!r} is not of the form `NAME slots=N`, as in `worker-1 slots=8`")
        name,slots = found[1],int(found[2])
        if name in seen: raise UserError(f"{source}, line {n}: {name} stands on line {seen[name][0]} already: give each host one line with all its slots")
        if slots < 1: raise UserError(f"{source}, line {n}: {name} has slots=0, so nothing would run there: give 1 or more, or delete the line")
        seen[name] = n,Host(name, slots)
    if not seen: raise UserError(f"{source} names no host: give one per line, as in `worker-1 slots=8`")
    return tuple(host for _,host in seen.values())

def read_hostfile(
    path:str|Path, # a text file
)->tuple[Host, ...]: # at least one
    "The machines that a hostfile lists."
    try: return parse_hostfile(Path(path).read_text(encoding="utf-8"), str(path))
    except (FileNotFoundError, IsADirectoryError): raise UserError(f"there is no hostfile {path}: write one line `NAME slots=N` per machine into it") from None

def _is_taken(address:str, port:int)->bool:
    "Does somebody hold this port? Asked of the system where the address is ours, else by calling."
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try: s.bind((address, 0))
        except OSError: # another machine's address
            s.settimeout(3)
            return s.connect_ex((address, port)) == 0
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try: s.bind((address, port))
        except OSError: return True
    return False

def check_port(
    address:str, # of the host on which rank 0 will listen
    port:int, # where
)->None:
    "`UserError` that names a free port when this one cannot be used."
    if not 1024 <= port <= 65535: raise UserError(f"port {port} cannot be used: give --port a number from 1024 to 65535")
    try: socket.getaddrinfo(address, port, socket.AF_INET)
    except socket.gaierror: raise UserError(f"nobody knows the address {address}: give --address the name or the number under which all hosts reach the first") from None
    if _is_taken(address, port):
        free = next((p for p in range(port+1, 65536) if not _is_taken(address, p)), 29500)
        raise UserError(f"port {port} of {address} is in use: give another, such as --port {free}, which is free")

_SSH = "ssh","-o","BatchMode=yes","-o","ConnectTimeout=5","-o","ServerAliveInterval=5","-o","ServerAliveCountMax=3" # asks nothing; hears within 20 s that a host has gone

def _cannot(host:Host, test:str, seconds:float)->str:
    "Why a host cannot take part; empty when it can."
    try: done = subprocess.run([*_SSH, host.name, test], capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired: return f"{host.name} (no answer within {seconds:.0f} seconds)"
    except FileNotFoundError: raise UserError("there is no ssh here: install openssh-client, or start the job on each host by itself with --over no_ssh") from None
    if done.returncode == 0: return ""
    last = (done.stderr.strip().splitlines() or ["ssh failed"])[-1]
    return f"{host.name} ({last if done.returncode == 255 else f'answers, but {test!r} fails there'})"

def check_hosts(
    hosts:Sequence[Host], # to be reached by ssh
    test:str="true", # a shell command that must succeed on each
    seconds:float=15., # how long to wait for an answer
)->None:
    "`UserError` that names every host which cannot take part, and why; all are asked at once."
    with ThreadPoolExecutor(64) as pool: wrong = [why for why in pool.map(lambda h: _cannot(h, test, seconds), hosts) if why]
    if wrong: raise UserError(f"{len(wrong)} of {len(hosts)} hosts cannot take part: {'; '.join(wrong)}. Nothing was started: mend them, or delete them from the hostfile")

PASSED_ON = dict( # what a rank on another machine inherits from our environment, and what it is for
    PYTHONPATH="where Python finds a checkout that is not installed",
    LD_LIBRARY_PATH="where the system finds CUDA, NCCL and MPI when a module system has loaded them",
    OMP_NUM_THREADS="threads of each process; cores divided by processes, or they fight",
    TORCH_EXTENSIONS_DIR="where compiled extensions lie; one per project, as a stale lock there hangs a job",
    TORCH_DISTRIBUTED_DEBUG="INFO or DETAIL: which collective does each rank wait in?",
    TORCH_NCCL_ASYNC_ERROR_HANDLING="1 (the default) ends a rank whose partner has died, so that it can be restarted",
    TORCH_NCCL_TRACE_BUFFER_SIZE="how many collectives the flight recorder keeps, for a hang",
    PYTORCH_ALLOC_CONF="expandable_segments:True wastes less GPU memory",
    GLOO_SOCKET_IFNAME="the network card of gloo, such as eth0; the first guess is often the wrong one",
    NCCL_SOCKET_IFNAME="the network card on which NCCL's ranks find each other, such as eth0 or bond0",
    NCCL_IB_HCA="the InfiniBand adapters that carry the gradients, such as mlx5_0,mlx5_1",
    NCCL_IB_DISABLE="0 uses InfiniBand, 1 falls back to TCP: the first switch to try when a job hangs at its start",
    NCCL_IB_GID_INDEX="which address of a RoCE adapter to use; ask who runs the network",
    NCCL_P2P_DISABLE="1 avoids direct copies between GPUs, for machines whose bus breaks them",
    NCCL_DEBUG="INFO prints which card and which path each rank really uses",
    DS_ACCELERATOR="cpu or cuda; DeepSpeed guesses otherwise",
    HF_HUB_OFFLINE="1 asks the model hub for nothing",
    HF_HOME="where downloads are kept; local disks, or one download per rank",
    TOKENIZERS_PARALLELISM="false keeps a forked tokenizer quiet",
    WANDB_MODE="offline writes to the disk, for nodes without a way out",
)

def passed_on(
    environment:Mapping[str, str], # such as `os.environ`
)->dict[str, str]: # those of `PASSED_ON` that are set
    "What ranks on other machines get; all else, keys and passwords too, stays here."
    return {name:environment[name] for name in PASSED_ON if name in environment}

ENGINES = "plain","ddp","fsdp","tp","tp_fsdp","deepspeed" # what `pretrain --engine` knows

@dataclass(frozen=True)
class Job:
    "What to start, and where: all that the commands are made of."
    program:tuple[str, ...] # a module and its arguments, which `python -m` would run as one rank
    hosts:tuple[Host, ...] # in the order of the ranks
    engine:str="ddp" # of `ENGINES`
    address:str="127.0.0.1" # of the first host, as the others reach it
    port:int=29500 # free there
    min_hosts:int|None=None # fewest hosts to go on with; None: all, and a failure ends the job
    max_restarts:int=3 # how often all ranks are started anew, where `min_hosts` is given
    last_call:int=30 # seconds to wait for more hosts once there are enough
    environment:tuple[tuple[str, str], ...]=() # names and values that each rank gets, see `passed_on`
    hostfile:str="hostfile" # where `hosts` come from; DeepSpeed reads it anew
    folder:str="." # where the ranks start, the same on every host
    python:str="python" # the interpreter, the same on every host

    def __post_init__(self):
        if self.engine not in ENGINES: raise UserError(f"there is no engine {self.engine}: give one of {', '.join(ENGINES)}")
        if not self.hosts or min(h.slots for h in self.hosts) < 1: raise UserError(f"{len(self.hosts)} hosts with {[h.slots for h in self.hosts]} processes: give at least one of each")
        if self.engine == "plain" and self.world > 1: raise UserError(f"engine plain is one process and {self.world} are asked for: give --engine ddp or fsdp, or one process")
        if self.min_hosts is None: return
        if not 1 <= self.min_hosts <= len(self.hosts): raise UserError(f"at least {self.min_hosts} of {len(self.hosts)} hosts: give --nodes MIN:MAX with 1 <= MIN <= MAX")
        if self.engine == "deepspeed" and self.min_hosts < len(self.hosts): raise UserError(f"engine deepspeed cannot go on with another number of processes: give --nodes {len(self.hosts)}:{len(self.hosts)}, or --engine fsdp")

    @property
    def world(self)->int: # ranks when all hosts take part
        return sum(h.slots for h in self.hosts)
    @property
    def slots(self)->int: # processes per host, where all have as many
        if len(each := {h.slots for h in self.hosts}) > 1: raise UserError(f"hosts with {' and '.join(map(str, sorted(each)))} slots: this way of starting wants as many on each; --over ssh and no_ssh do not")
        return each.pop()
    @property
    def nodes(self)->str: # as torchrun wants it
        return str(len(self.hosts)) if self.min_hosts is None else f"{self.min_hosts}:{len(self.hosts)}"

def _torchrun(python:str, slots:int|str, program:Sequence[str], *where:object)->list[str]:
    "torchrun: behind `--` nothing is taken for an option of its own."
    return [python, "-m", "torch.distributed.run", *map(str, where), "--nproc-per-node", str(slots), "--module", "--", *program]

def torchrun_command(
    job:Job, # of one host or more
    node:int|str, # number of this host in `job.hosts`, from 0, or what stands for it in a template
    slots:int|None=None, # processes here; None: as many as on every host
)->list[str]: # to be run on that host
    "What one host runs to take part: torch's own agent, which starts the ranks and watches them."
    if job.min_hosts is None: where = "--nnodes", job.nodes, "--node-rank", node, "--master-addr", job.address, "--master-port", job.port
    else: where = ("--nnodes", job.nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{job.address}:{job.port}", "--rdzv-id", f"llm-scratch-{job.port}",
                   "--rdzv-conf", f"last_call_timeout={job.last_call}", "--max-restarts", job.max_restarts)
    return _torchrun(job.python, job.slots if slots is None else slots, job.program, *where)

def deepspeed_command(
    job:Job, # whose hostfile can be read where this runs
    *how:str, # how the other hosts are reached
)->list[str]: # to be run once, or on every host with `--no_ssh`
    "DeepSpeed's own launcher."
    return [job.python, "-m", "deepspeed.launcher.runner", "--hostfile", job.hostfile, "--num_nodes", job.nodes, *how,
            "--master_addr", job.address, "--master_port", str(job.port), "--no_local_rank", "--module", *job.program]

def local_command(job:Job)->list[str]: # for a job of one host
    "All ranks on this machine; torchrun finds a free port itself."
    if len(job.hosts) > 1: raise UserError(f"{len(job.hosts)} hosts and one machine: give --nodes 1, or another way with --over")
    restarts = () if job.min_hosts is None else ("--max-restarts", job.max_restarts)
    return _torchrun(job.python, job.slots, job.program, "--standalone", *restarts)

def node_command(
    job:Job, # the same on every host
    node:int, # number of this host, from 0
)->list[str]: # to be run on that host
    "What host number `node` runs when somebody else, or nobody, has started the others."
    if not 0 <= node < len(job.hosts): raise UserError(f"--node_rank {node} and {len(job.hosts)} hosts: give a number from 0 to {len(job.hosts)-1}")
    if job.engine == "deepspeed" and job.min_hosts is None: return deepspeed_command(job, "--no_ssh", "--node_rank", str(node))
    return torchrun_command(job, node, job.hosts[node].slots)

def _remote(job:Job, command:Sequence[str])->str:
    "A shell line that runs `command` in the job's folder with its environment."
    return f"cd {shlex.quote(job.folder)} && exec env {shlex.join([*(f'{k}={v}' for k,v in job.environment), *command])}"

def ssh_commands(job:Job)->list[list[str]]: # one for each host
    "An ssh to every host, which runs its node's command there."
    return [[*_SSH, host.name, _remote(job, node_command(job, n))] for n,host in enumerate(job.hosts)]

def pdsh_command(job:Job)->list[str]: # runs on all hosts
    "One pdsh for all hosts: DeepSpeed's launcher brings its own, else `%n` becomes each host's number."
    if job.engine == "deepspeed" and job.min_hosts is None: return deepspeed_command(job, "--launcher", "pdsh")
    line = _remote(job, torchrun_command(job, "NODE", job.slots)).replace("%", "%%").replace("--node-rank NODE", "--node-rank %n")
    return ["pdsh", "-R", "ssh", "-S", "-f", str(len(job.hosts)), "-w", ",".join(h.name for h in job.hosts), line]

def launch_command(
    job:Job, # what and where
    over:str="local", # of `WAYS`
    node:int=0, # number of this host, for `no_ssh`
)->list[list[str]]: # the commands that this machine runs, side by side
    "Exactly what `launch` starts."
    if over not in WAYS: raise UserError(f"there is no way {over} to start a job: give one of {', '.join(WAYS)}")
    return WAYS[over](job, node)

WAYS = dict(
    local=lambda job, node: [local_command(job)], # all ranks on this machine
    ssh=lambda job, node: ssh_commands(job), # one ssh per host
    pdsh=lambda job, node: [pdsh_command(job)], # one pdsh; DeepSpeed's own way
    no_ssh=lambda job, node: [node_command(job, node)], # this host's part only
    slurm=lambda job, node: [["sbatch"]], # reads what `job_file` writes
    kubernetes=lambda job, node: [["kubectl", "apply", "-f", "-"]],
    pytorchjob=lambda job, node: [["kubectl", "apply", "-f", "-"]],
)

_SLURM = """#!/bin/bash
# ---- change these -------------------------------------------------------------------------
#SBATCH --job-name=llm-scratch
#SBATCH --nodes={nodes}
#SBATCH --gpus-per-node={slots}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time=24:00:00
# ---- not these (Slurm reads no #SBATCH line behind the first command) ---------------------
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# ---- change these -------------------------------------------------------------------------
PROCESSES={slots}  # per node, one for each GPU
FOLDER={folder}  # a shared disk: the same path on every node
PYTHON={python}
PROGRAM="{program}"
{exports}
# ---- and nothing below --------------------------------------------------------------------
set -uo pipefail
cd "$FOLDER" || exit 1
export PROCESSES PYTHON PROGRAM
export PORT=$(({port} + SLURM_JOB_ID % 1000))  # two jobs that share a node do not meet
export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 bash -c 'exec {command}' && exit 0
status=$?
[ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ] && scontrol requeue "$SLURM_JOB_ID"  # goes on from the last checkpoint
exit "$status"
"""

def _fixed(job:Job)->Job: # for those that start a lost host anew themselves
    if job.min_hosts is not None: raise UserError(f"--nodes {job.nodes}: Slurm and Kubernetes start all hosts anew when one is lost; give --nodes {len(job.hosts)}")
    return job

def slurm_script(
    job:Job, # whose folder and interpreter are on a shared disk
)->str: # for `sbatch`
    "A batch script: one task on each node, and each task is torchrun's agent."
    command = _torchrun('"$PYTHON"', '"$PROCESSES"', ["$PROGRAM"], "--nnodes", '"$SLURM_NNODES"', "--node-rank", '"$SLURM_NODEID"', "--master-addr", '"$HEAD"', "--master-port", '"$PORT"')
    return _SLURM.format(nodes=_fixed(job).nodes, slots=job.slots, cpus=8*job.slots, folder=shlex.quote(job.folder), python=shlex.quote(job.python), program=" ".join(job.program),
                         exports="\n".join(f"export {k}={shlex.quote(v)}" for k,v in job.environment), command=" ".join(command), port=job.port, restarts=job.max_restarts)

_POD = """terminationGracePeriodSeconds: 120  # between SIGTERM and SIGKILL: time for a checkpoint
containers:
- name: {container}
  image: {image}
  workingDir: {folder}
  command: [{command}]
  args:
{args}
  env:
{env}
  ports:
  - {{name: {port_name}, containerPort: {port}}}
  resources:
    requests: {{cpu: "{cpus}", memory: {memory}Gi}}
    limits: {{memory: {memory}Gi, nvidia.com/gpu: {slots}}}
  volumeMounts:
  - {{name: shared, mountPath: {mount}}}
  - {{name: shm, mountPath: /dev/shm}}
volumes:
- name: shared
  persistentVolumeClaim: {{claimName: {claim}}}
- name: shm  # NCCL and data loaders share memory; a container has 64 MiB otherwise
  emptyDir: {{medium: Memory, sizeLimit: 16Gi}}"""

_CHANGE = """# Change these lines, or let `llm-scratch launch --over {over} --dry-run` write the file:
#   image                       one with this library in it
#   {counts}
#   nvidia.com/gpu, --nproc-per-node   GPUs of each machine, one process for each
#   claimName, mountPath        a volume that all pods may write (ReadWriteMany), and where they see it
#   the last arguments          the run, and its engine
"""

def _pod(job:Job, args:Sequence[str], image:str, claim:str, container:str, port_name:str, indent:int)->str:
    "The part of a manifest that says what one pod runs."
    lines = lambda rows: "\n".join(f"  - {row}" for row in rows)
    text = _POD.format(container=container, image=image, folder=job.folder, command=args[0], args=lines(f'"{a}"' for a in args[1:]), env=lines(f'{{name: {k}, value: "{v}"}}' for k,v in job.environment),
                       port_name=port_name, port=job.port, cpus=8*job.slots, memory=64*job.slots, slots=job.slots, mount="/"+Path(job.folder).parts[1], claim=claim)
    return text.replace("\n", "\n"+" "*indent)

def kubernetes_manifest(
    job:Job, # whose folder lies on the shared volume
    image:str, # of a container with this library
    claim:str="shared", # the volume that all pods mount
    name:str="llm-scratch", # of the job and of its service
)->str: # YAML
    "A headless Service, which gives each pod a name, and an indexed Job: a pod's index is its node rank."
    args = torchrun_command(replace(_fixed(job), address=f"{name}-0.{name}"), "$(JOB_COMPLETION_INDEX)")
    return _CHANGE.format(over="kubernetes", counts="completions, parallelism, --nnodes   machines") + f"""apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  clusterIP: None  # headless: {name}-0.{name} is the address of pod 0
  publishNotReadyAddresses: true  # the ranks look for each other before any is ready
  selector: {{job-name: {name}}}
  ports:
  - {{name: rendezvous, port: {job.port}}}
---
apiVersion: batch/v1
kind: Job
metadata: {{name: {name}}}
spec:
  completionMode: Indexed
  completions: {job.nodes}
  parallelism: {job.nodes}  # all at once, or they wait for each other for ever
  backoffLimit: {job.max_restarts*len(job.hosts)}  # {job.max_restarts} restarts of every pod
  podFailurePolicy:
    rules:
    - action: Ignore  # a drained or preempted machine is nobody's fault
      onPodConditions: [{{type: DisruptionTarget}}]
  template:
    spec:
      subdomain: {name}
      restartPolicy: Never
      {_pod(job, args, image, claim, "rank", "rendezvous", 6)}
"""

def pytorchjob_manifest(
    job:Job, # whose folder lies on the shared volume
    image:str, # of a container with this library
    claim:str="shared", # the volume that all pods mount
    name:str="llm-scratch", # of the job
)->str: # YAML, for clusters with Kubeflow's training operator
    "A PyTorchJob: the operator tells each pod its rank, and where the first one is."
    args = torchrun_command(replace(_fixed(job), address="$(MASTER_ADDR)"), "$(RANK)")
    replicas = lambda kind, n: f"""
    {kind}:
      replicas: {n}
      restartPolicy: OnFailure
      template:
        spec:
          {_pod(job, args, image, claim, "pytorch", "pytorchjob-port", 10)}"""
    return _CHANGE.format(over="pytorchjob", counts="replicas of Worker plus 1, --nnodes   machines") + f"""apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {{name: {name}}}
spec:
  runPolicy: {{backoffLimit: {job.max_restarts*len(job.hosts)}, cleanPodPolicy: Running}}
  pytorchReplicaSpecs:{replicas("Master", 1)}{replicas("Worker", len(job.hosts)-1) if len(job.hosts) > 1 else ""}
"""

def check_world(
    batch_size:int, # sequences of one update, over all ranks
    job:Job, # whose ranks share them
)->None:
    "`UserError` unless the batch can be shared out evenly, by every number of hosts that the job may come down to."
    fewest = len(job.hosts) if job.min_hosts is None else job.min_hosts
    for world in {sum(h.slots for h in job.hosts[:n]) for n in range(fewest, len(job.hosts)+1)}:
        if batch_size % world: raise UserError(f"a batch of {batch_size} sequences cannot be shared out evenly among {world} processes: "
                                               f"give {', '.join(str(n) for n in range(1, batch_size+1) if batch_size%n == 0)} processes, or another batch size")

def make_job(
    program:Sequence[str], # a module and its arguments, for every rank
    *,
    engine:str="ddp", # of `ENGINES`
    over:str="local", # of `WAYS`
    nodes:str="", # machines: "2", or "1:2" to go on with one when the other is lost; "" is all of the hostfile, or 1
    processes:int=1, # ranks per machine, where there is no hostfile
    hostfile:str|None=None, # lists the machines; None where a scheduler picks them
    address:str|None=None, # of the first machine; None is its name in the hostfile
    port:int=29500, # free on the first machine
    max_restarts:int=3, # for `nodes="MIN:MAX"`
    batch_size:int|None=None, # sequences of one update; None does not check
)->Job: # ready for `launch`
    "Make sense of what the user asks for; `UserError` where it makes none."
    if not (found := re.fullmatch(r"(?:(\d+):)?(\d+)|", nodes)): raise UserError(f"--nodes {nodes}: give a number, or MIN:MAX as in 1:2")
    if over not in WAYS: raise UserError(f"there is no way {over} to start a job: give one of {', '.join(WAYS)}")
    listed = read_hostfile(hostfile) if hostfile else ()
    n = int(found[2] or len(listed) or 1)
    if listed and n > len(listed): raise UserError(f"--nodes {nodes}, and {hostfile} lists {len(listed)} hosts: give fewer nodes, or list more hosts")
    if not listed and n > 1 and over in ("ssh", "pdsh"): raise UserError(f"--over {over} has to know the {n} hosts: give --hostfile FILE with one line `NAME slots=N` for each")
    hosts = listed[:n] or tuple(Host("localhost" if n == 1 else f"node{i}", processes) for i in range(n))
    if not listed and n > 1 and over == "no_ssh" and not address: raise UserError("--over no_ssh has to know where the first host is: give --address NAME, or --hostfile FILE")
    first = "127.0.0.1" if n == 1 and over == "local" else address or hosts[0].name.partition("@")[2] or hosts[0].name
    job = Job(tuple(program), hosts, engine, first, port, int(found[1]) if found[1] else None, max_restarts, environment=tuple(passed_on(os.environ).items()),
              hostfile=os.path.abspath(hostfile or "hostfile"), folder=os.getcwd(), python=sys.executable)
    if batch_size is not None: check_world(batch_size, job)
    return job

def job_file(
    job:Job, # what and where
    over:str, # `slurm`, `kubernetes` or `pytorchjob`
    image:str="llm-scratch:latest", # of the pods
    claim:str="shared", # the volume that the pods mount
)->str: # what `sbatch` or `kubectl` reads; empty for the other ways
    "The file that a scheduler wants."
    if over == "slurm": return slurm_script(job)
    if over == "kubernetes": return kubernetes_manifest(job, image, claim)
    return pytorchjob_manifest(job, image, claim) if over == "pytorchjob" else ""

def launch_text(
    job:Job, # what and where
    over:str="local", # of `WAYS`
    node:int=0, # number of this host, for `no_ssh`
    **of_pods:str, # `image` and `claim`
)->str: # what `--dry-run` prints
    "The commands that `launch` would run, or the file that it would hand in, and nothing started."
    return job_file(job, over, **of_pods) or "\n".join(shlex.join(c) for c in launch_command(job, over, node)) + "\n"

def stop_command(job:Job)->str: # for a shell on each host
    "Ends what is left of one job on a host, and of no other: its ranks are known by the port at which they met."
    ours = shlex.quote(f"[-]-(master.port|rdzv.endpoint)[ =]([^ ]*:)?{job.port}( |$)")
    return f"pkill -TERM -f {ours}; for i in $(seq 40); do pgrep -f {ours} >/dev/null || exit 0; sleep 1; done; pkill -KILL -f {ours}"

def launch(
    job:Job, # what and where
    over:str="local", # of `WAYS`
    node:int=0, # number of this host, for `no_ssh`
    **of_pods:str, # `image` and `claim`
)->int: # 0, or the status of the first rank or host that failed
    "Check what can be checked, start the job, watch over it, and leave no process behind on any host."
    commands,remote = launch_command(job, over, node),over in ("ssh", "pdsh")
    if text := job_file(job, over, **of_pods): return _hand_in(commands[0], text)
    if job.engine == "deepspeed" and not importlib.util.find_spec("deepspeed"): raise UserError("engine deepspeed needs the package deepspeed: pip install 'llm_scratch[distributed]'")
    if remote: check_hosts(job.hosts, f"test -d {shlex.quote(job.folder)} && test -x {shlex.quote(job.python)}")
    if node == 0 and over != "local": check_port(job.address, job.port)
    with tempfile.TemporaryDirectory() as tmp:
        (listed := Path(tmp)/"environment").write_text("".join(f"{k}={v}\n" for k,v in job.environment), encoding="utf-8")
        status = run_together(commands, [dict(DS_ENV_FILE=str(listed))]*len(commands), may_fail=0 if job.min_hosts is None else len(job.hosts)-job.min_hosts,
                              alarm=r"ssh exited with exit code (\d+)" if over == "pdsh" else "")
    if remote and status: run_together([[*_SSH, h.name, stop_command(job)] for h in job.hosts], may_fail=len(job.hosts))
    return status

def _hand_in(command:Sequence[str], text:str)->int: # to a scheduler
    try: return subprocess.run(command, input=text, text=True, check=False).returncode
    except FileNotFoundError: raise UserError(f"there is no {command[0]} here: write the file with --dry-run, and hand it in where the scheduler is") from None

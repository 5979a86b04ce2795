"""Commands for every way of starting, checks before the start, and jobs on two hosts: network namespaces, see hosts.py, with an ssh server each.

The last part needs root, iproute2, openssh-server and pdsh; where one is missing it says so and is skipped.
"""
import base64
import contextlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import psutil
import pytest
import ranks
import yaml
from hosts import Hosts, PullThePlug, lacking, launch_on, losses_of, rows_of, sweep
from hypothesis import given
from hypothesis import strategies as st

from llm_scratch import launching
from llm_scratch.core import UserError
from llm_scratch.engines import ENGINES
from llm_scratch.launching import (PASSED_ON, WAYS, Host, Job, check_hosts, check_port, check_world, job_file, launch, launch_command, launch_text, local_command, make_job,
                                   node_command, parse_hostfile, passed_on, rank_environments, read_hostfile, run_together)

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT/"deploy"/"cluster"
PROGRAM = "llm_scratch", "pretrain", "--run", "runs/a b", "--engine", "fsdp"
TWO = Host("worker-0", 2), Host("worker-1", 2)
JOB = Job(PROGRAM, TWO, "fsdp", address="worker-0", environment=(("OMP_NUM_THREADS", "8"),), folder="/shared", python="python")
LIMIT = 300  # seconds for one launch, on a machine that is busy with other things


def python(code:str)->list[str]: return [sys.executable, "-c", code]


def children()->list[psutil.Process]: return psutil.Process().children(recursive=True)


def ended(pid:int, seconds:float=10)->bool:
    "Has the process gone, or only its name remains?"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE: return True
        except psutil.NoSuchProcess: return True
        time.sleep(.05)
    return False


@pytest.fixture
def none_left():
    "No process of this test outlives it."
    before = {p.pid for p in children()}
    yield
    left = [p for p in children() if p.pid not in before and p.status() != psutil.STATUS_ZOMBIE]
    assert left == []


# --- ranks -----------------------------------------------------------------------------------------------------------

@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_every_rank_is_somebody_and_nobody_twice(slots):
    told = rank_environments([Host(f"h{i}", n) for i, n in enumerate(slots)], "first", 1234)
    assert [int(r["RANK"]) for r in told] == list(range(sum(slots)))
    assert [(int(r["GROUP_RANK"]), int(r["LOCAL_RANK"])) for r in told] == [(node, local) for node, n in enumerate(slots) for local in range(n)]
    assert all(int(r["LOCAL_WORLD_SIZE"]) == slots[int(r["GROUP_RANK"])] for r in told)
    assert {(r["WORLD_SIZE"], r["MASTER_ADDR"], r["MASTER_PORT"]) for r in told} == {(str(sum(slots)), "first", "1234")}


# --- processes that live and die together ----------------------------------------------------------------------------

def test_all_well(none_left, tmp_path):
    assert run_together([python(f"import os; open(r'{tmp_path}/' + os.environ['NAME'], 'w')")]*2, [dict(NAME="a"), dict(NAME="b")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_every_process_has_its_own_environment():
    with pytest.raises(ValueError, match="shorter|longer"): run_together([python("pass")]*2, [{}])


@pytest.mark.parametrize(("how", "status"), [("os._exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_the_first_bad_status_is_told_and_the_others_are_ended(none_left, tmp_path, capfd, how, status):
    sleeper = python(f"import os, time; open(r'{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(300)")
    begin = time.monotonic()
    assert run_together([sleeper, python(f"import os, time, pathlib\nwhile not pathlib.Path(r'{tmp_path}/pid').exists(): time.sleep(.01)\n{how}")], names=["one", "two"]) == status
    assert time.monotonic() - begin < 30 and ended(int((tmp_path/"pid").read_text()))
    assert f"two ended with status {status}" in capfd.readouterr().err


def test_the_first_in_time_not_in_the_list(none_left):
    assert run_together([python("import signal, sys, time; signal.signal(15, lambda *_: sys.exit(5)); time.sleep(100)"), python("import time, os; time.sleep(1); os._exit(7)")]) == 7


def test_what_a_process_has_started_is_ended_with_it(none_left, tmp_path):
    code = f"import subprocess, sys, os\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\nopen(r'{tmp_path}/pid', 'w').write(str(child.pid))\nos._exit(4)"
    assert run_together([python(code)]) == 4
    assert ended(int((tmp_path/"pid").read_text()))


def test_one_that_does_not_listen_is_killed(none_left, tmp_path):
    deaf = python(f"import signal, time; signal.signal(15, signal.SIG_IGN); open(r'{tmp_path}/deaf', 'w'); time.sleep(300)")
    begin = time.monotonic()
    assert run_together([deaf, python(f"import time, pathlib, os\nwhile not pathlib.Path(r'{tmp_path}/deaf').exists(): time.sleep(.01)\nos._exit(2)")], patience=1) == 2
    assert 1 <= time.monotonic() - begin < 20


def test_one_is_asked_before_it_is_killed(none_left, tmp_path):
    polite = python(f"import signal, time, sys, pathlib\nsignal.signal(15, lambda *_: (open(r'{tmp_path}/saved', 'w'), sys.exit(0)))\nopen(r'{tmp_path}/up', 'w')\ntime.sleep(300)")
    assert run_together([polite, python(f"import time, pathlib, os\nwhile not pathlib.Path(r'{tmp_path}/up').exists(): time.sleep(.01)\nos._exit(2)")]) == 2
    assert (tmp_path/"saved").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_who_ends_the_launcher_ends_the_ranks(tmp_path, number):
    sleeper = python(f"import os, time; open(r'{tmp_path}/' + os.environ['N'], 'w').write(str(os.getpid())); time.sleep(300)")
    launcher = subprocess.Popen(python(f"import sys; from llm_scratch.launching import run_together; sys.exit(run_together([{sleeper!r}]*2, [dict(N='0'), dict(N='1')]))"), cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path/n).exists() and (tmp_path/n).read_text() for n in "01") and time.monotonic() < deadline: time.sleep(.05)
        launcher.send_signal(number)
        assert launcher.wait(timeout=60) == 128 + number
        assert all(ended(int((tmp_path/n).read_text())) for n in "01")
    finally:
        launcher.kill()
        launcher.wait()


def test_handlers_are_put_back():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    run_together([python("pass")])
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before


def test_a_program_that_is_not_there(none_left):
    with pytest.raises(UserError, match="there is no program no-such-thing here"): run_together([python("import time; time.sleep(300)"), ["no-such-thing"]])


def test_some_may_fail(none_left, tmp_path):
    well = python(f"import time; time.sleep(1.5); open(r'{tmp_path}/done', 'w')")
    assert run_together([well, python("import os; os._exit(9)")], may_fail=1) == 0
    assert (tmp_path/"done").exists()
    assert run_together([python("import time; time.sleep(300)"), python("import os; os._exit(9)"), python("import os, time; time.sleep(1); os._exit(8)")], may_fail=1) == 9


def test_an_alarm_in_the_error_output(none_left, capfd):
    "As of pdsh, which tells of a host that failed and goes on waiting for the others."
    code = "import sys, time; print('all is well', file=sys.stderr, flush=True); print('pdsh@a: b: ssh exited with exit code 7', file=sys.stderr, flush=True); time.sleep(300)"
    assert run_together([python(code)], alarm=r"exit code (\d+)") == 7
    assert "all is well" in capfd.readouterr().err


# --- hostfiles, ports, hosts -----------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z0-9_][a-z0-9._-]{0,12}", fullmatch=True)


@given(st.dictionaries(names, st.integers(1, 64), min_size=1, max_size=8), st.lists(st.sampled_from(["", "# nothing", "   "]), max_size=4), st.sampled_from([" ", "   ", "\t"]))
def test_hostfiles_are_read_as_written(slots, noise, gap):
    lines = [*noise, *(f"{name}{gap}slots={n}{'  # a note' if n % 2 else ''}" for name, n in slots.items()), *noise]
    assert parse_hostfile("\n".join(lines)) == tuple(Host(name, n) for name, n in slots.items())


def test_deepspeed_reads_hostfiles_as_we_do():
    runner = pytest.importorskip("deepspeed.launcher.runner")
    text = (CLUSTER/"hostfile").read_text() + "other   slots=3\n"
    assert dict(runner._parse_hostfile(text.splitlines(keepends=True))) == {h.name: h.slots for h in parse_hostfile(text)}


@pytest.mark.parametrize(("text", "what"), [
    ("a slots=2\n\nb", "line 3: 'b' is not"), ("a slots=2\na slots=2", "line 2: a stands on line 1"), ("a slots=0", "line 1: a has slots=0"), ("a slots=-1", "line 1"), ("a slots=two", "line 1"), ("a 2", "line 1"),
    ("a slots=2 b slots=2", "line 1"), ("-oProxyCommand=x slots=1", "line 1"), ("u@-x slots=1", "line 1"), ("a;b slots=1", "line 1"), ("$(reboot) slots=1", "line 1"), ("", "names no host"), ("# a slots=2", "names no host")])
def test_a_hostfile_that_is_wrong(text, what):
    with pytest.raises(UserError, match=re.escape(what)) as e: parse_hostfile(text, "my hosts")
    assert str(e.value).startswith("my hosts") and "\n" not in str(e.value)


def test_users_may_stand_before_hosts(): assert parse_hostfile("me@box-1.lan slots=1") == (Host("me@box-1.lan", 1),)


def test_no_hostfile(tmp_path):
    for path in (tmp_path, tmp_path/"none"):
        with pytest.raises(UserError, match="there is no hostfile"): read_hostfile(path)


@pytest.mark.parametrize("listens", [True, False])
def test_a_port_in_use_is_named_with_a_free_one(listens):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        if listens: s.listen()
        port = s.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use") as e: check_port("127.0.0.1", port)
        free = int(re.search(r"--port (\d+)", str(e.value))[1])
        assert free != port
        with socket.socket() as other: other.bind(("127.0.0.1", free))
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("port", [-1, 0, 22, 1023, 65536])
def test_ports_that_cannot_be(port):
    with pytest.raises(UserError, match="from 1024 to 65535"): check_port("127.0.0.1", port)


def test_an_address_that_nobody_knows():
    with pytest.raises(UserError, match="nobody knows the address no-host.invalid"): check_port("no-host.invalid", 29500)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    "Programs that stand in for others: a folder at the head of PATH."
    (bin := tmp_path/"bin").mkdir()
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")

    def make(name:str, text:str)->None:
        (bin/name).write_text(text)
        (bin/name).chmod(0o755)
    return make


SSH = '#!/bin/sh\nwhile [ "$1" = -o ]; do shift 2; done\nhost=$1; shift\ncase $host in dead*) echo "ssh: connect to host $host port 22: Connection refused" >&2; exit 255;; mute*) sleep 60;; esac\nexec sh -c "$*"\n'


def test_every_host_that_cannot_take_part_is_named_at_once(fake):
    fake("ssh", SSH)
    check_hosts([Host("a", 1), Host("b", 1)])
    begin = time.monotonic()
    with pytest.raises(UserError) as e: check_hosts([Host("a", 1), Host("dead1", 1), Host("mute", 1), Host("dead2", 1)], seconds=3)
    assert time.monotonic() - begin < 30
    assert str(e.value).startswith("3 of 4 hosts") and all(x in str(e.value) for x in ("dead1 (ssh: connect", "dead2 (ssh: connect", "mute (no answer within 3 seconds)", "Nothing was started")) and "a (" not in str(e.value)
    with pytest.raises(UserError, match="1 of 1 hosts.*a .answers, but 'test -d /no/such' fails"): check_hosts([Host("a", 1)], "test -d /no/such")


def test_without_ssh(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no ssh here.*no_ssh"): check_hosts([Host("a", 1)])


# --- commands --------------------------------------------------------------------------------------------------------

def torchrun_reads(command:list[str])->object:
    "What torch's own parser understands."
    from torch.distributed.run import parse_args
    assert command[:3] == ["python", "-m", "torch.distributed.run"]
    return parse_args(command[3:])


@pytest.mark.parametrize("command", [local_command(replace(JOB, hosts=TWO[:1])), node_command(JOB, 1), node_command(replace(JOB, min_hosts=1, max_restarts=7, last_call=5), 1)], ids=["local", "fixed", "elastic"])
def test_torchrun_understands_what_we_say(command):
    args = torchrun_reads(command)
    assert args.module and (args.training_script, tuple(args.training_script_args)) == (PROGRAM[0], PROGRAM[1:])
    assert args.nproc_per_node == "2"


def test_what_each_node_is_told():
    fixed, elastic = (torchrun_reads(node_command(job, 1)) for job in (JOB, replace(JOB, min_hosts=1, max_restarts=7, last_call=5)))
    assert (fixed.nnodes, fixed.node_rank, fixed.master_addr, fixed.master_port, fixed.max_restarts) == ("2", 1, "worker-0", 29500, 0)
    assert (elastic.nnodes, elastic.rdzv_backend, elastic.rdzv_endpoint, elastic.max_restarts, elastic.rdzv_conf) == ("1:2", "c10d", "worker-0:29500", 7, "last_call_timeout=5")
    assert torchrun_reads(local_command(replace(JOB, hosts=TWO[:1]))).standalone
    assert torchrun_reads(local_command(replace(JOB, hosts=TWO[:1], min_hosts=1, max_restarts=4))).max_restarts == 4
    assert elastic.rdzv_id != torchrun_reads(node_command(replace(JOB, min_hosts=1, port=29501), 1)).rdzv_id


def test_without_two_dashes_torchrun_takes_our_option_for_its_own():
    "When this fails torch has mended it, and the chapter may say so."
    command = node_command(JOB, 0)
    command.remove("--")
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as said: torchrun_reads(command)
    assert "ambiguous option: --run" in said.getvalue()


def test_hosts_of_different_sizes():
    job = replace(JOB, hosts=(Host("a", 3), Host("b", 1)))
    assert [torchrun_reads(node_command(job, n)).nproc_per_node for n in range(2)] == ["3", "1"]
    for over in ("pdsh", "slurm", "kubernetes", "pytorchjob"):
        with pytest.raises(UserError, match="1 and 3 slots"): launch_text(job, over)


@pytest.mark.parametrize("over", ["pdsh", "no_ssh"])
def test_deepspeed_understands_what_we_say(over):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    (command,) = launch_command(replace(JOB, engine="deepspeed", hostfile="/shared/hosts"), over, 1)
    assert command[:3] == ["python", "-m", "deepspeed.launcher.runner"]
    args = runner.parse_args(command[3:])
    assert (args.user_script, tuple(args.user_args), args.module, args.no_local_rank) == (PROGRAM[0], PROGRAM[1:], True, True)
    assert (args.hostfile, args.num_nodes, args.master_addr, args.master_port) == ("/shared/hosts", 2, "worker-0", 29500)
    assert (args.no_ssh, args.node_rank) == ((True, 1) if over == "no_ssh" else (False, -1)) and args.launcher == "pdsh"


def test_deepspeed_by_ssh_and_with_restarts():
    job = replace(JOB, engine="deepspeed")
    assert [c[-2] for c in launch_command(job, "ssh")] == ["worker-0", "worker-1"] and all(f"--no_ssh --node_rank {n} " in c[-1] for n, c in enumerate(launch_command(job, "ssh")))
    assert "torch.distributed.run" in node_command(replace(job, min_hosts=2), 0) # DeepSpeed's launcher restarts nothing
    with pytest.raises(UserError, match="deepspeed cannot go on with another number"): replace(job, min_hosts=1)


HOSTILE = "a b", "$HOME", "it's", '"', "%n%h%%", "; exit 3", "`id`", "*", "--", "ü"


@pytest.mark.parametrize("over", ["ssh", "pdsh"])
def test_shells_on_the_way_change_nothing(over, tmp_path, fake):
    "The shell line that the remote host gets, run by a shell: words and variables arrive as they were."
    echo = tmp_path/"echo"
    echo.write_text(f"#!{sys.executable}\nimport json, os, sys\njson.dump([sys.argv[1:], os.getcwd(), os.environ['OMP_NUM_THREADS'], os.environ['HF_HOME']], open('out', 'w'))\n")
    echo.chmod(0o755)
    (folder := tmp_path/"my 'shared' folder").mkdir()
    job = replace(JOB, program=("m", *HOSTILE), python=str(echo), folder=str(folder), environment=(("OMP_NUM_THREADS", "8"), ("HF_HOME", "/a b/$x")))
    line = launch_command(job, over)[-1][-1]
    if over == "pdsh": line = line.replace("%%", "\0").replace("%n", "1").replace("\0", "%") # as pdsh does
    subprocess.run(["sh", "-c", line], check=True, env=dict(PATH=os.environ["PATH"]))
    words, cwd, threads, home = json.loads((folder/"out").read_text())
    assert words == node_command(job, 1)[1:] and words[-len(HOSTILE):] == list(HOSTILE)
    assert (cwd, threads, home) == (str(folder), "8", "/a b/$x")


def test_only_what_is_allowed_travels(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5_0")
    monkeypatch.setenv("HF_HOME", "/laptop/cache")
    assert passed_on(dict(PATH="/bin", HOME="/root", AWS_SECRET_ACCESS_KEY="x", NCCL_IB_HCA="mlx5_0", GLOO_SOCKET_IFNAME="eth0")) == dict(NCCL_IB_HCA="mlx5_0", GLOO_SOCKET_IFNAME="eth0")
    for over in WAYS:
        text = launch_text(make_job(["m"], over=over, hostfile=str(CLUSTER/"hostfile") if over != "local" else None), over)
        assert "hunter2" not in text
        assert ("mlx5_0" in text) == (over in ("ssh", "pdsh", "slurm", "kubernetes", "pytorchjob")) # the others inherit it
        assert ("/laptop/cache" in text) == (over in ("ssh", "pdsh", "slurm")) # a pod has other paths


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_of_the_library_can_be_launched(engine):
    for over in WAYS: assert engine == "plain" or launch_text(make_job(["m", engine], engine=engine, over=over, processes=2), over)
    assert launch_text(make_job(["m"], engine="plain"))


@pytest.mark.parametrize(("options", "what"), [
    (dict(engine="zero"), "there is no engine zero: give one of plain"), (dict(over="rsh"), "there is no way rsh"), (dict(nodes="two"), "--nodes two"), (dict(nodes="2:"), "--nodes 2:"), (dict(nodes="3:2", over="slurm"), "--nodes MIN:MAX"),
    (dict(nodes="0:2", over="slurm"), "MIN:MAX"), (dict(nodes="2", over="ssh"), "has to know the 2 hosts"), (dict(nodes="2", over="no_ssh"), "give --address"), (dict(nodes="2"), "2 hosts and one machine"), (dict(processes=0), "at least one"), (dict(nodes="0"), "--nodes 0: give a number"),
    (dict(engine="plain", processes=2), "engine plain is one process"), (dict(processes=3, batch_size=8), "8 sequences cannot be shared out evenly among 3 processes: 1, 2, 4, 8"), (dict(processes=6, batch_size=8, engine="fsdp", tp=2), "among 3 groups of 2"),
    (dict(processes=3, batch_size=8, engine="fsdp", tp=2), "not a multiple of tp=2"), (dict(nodes="1:3", over="no_ssh", address="a", batch_size=8), "among 3 processes"), (dict(nodes="1:2", over="kubernetes"), "give --nodes 2"), (dict(nodes="2:2", over="slurm"), "give --nodes 2")])
def test_what_makes_no_sense_is_said_in_one_line(options, what):
    over = options.get("over", "local")
    with pytest.raises(UserError, match=re.escape(what)) as e: launch_text(make_job(["m"], **options), over)
    assert "\n" not in str(e.value)


def test_nodes_of_a_hostfile(tmp_path):
    (path := tmp_path/"h").write_text("me@a slots=2\nb slots=2\nc slots=4\n")
    job = make_job(["m"], over="ssh", hostfile=str(path))
    assert (job.world, job.address, job.min_hosts, job.nodes) == (8, "a", None, "3") and job.hostfile == str(path)
    assert make_job(["m"], over="ssh", hostfile=str(path), nodes="1:2", address="10.0.0.1").hosts == job.hosts[:2]
    assert make_job(["m"], over="ssh", hostfile=str(path), nodes="1:2").nodes == "1:2"
    with pytest.raises(UserError, match="lists 3 hosts"): make_job(["m"], over="ssh", hostfile=str(path), nodes="4")
    with pytest.raises(UserError, match="pdsh ends with its first host"): launch_text(make_job(["m"], over="pdsh", hostfile=str(path), nodes="1:2"), "pdsh")
    with pytest.raises(UserError, match="0 to 2"): launch_text(job, "no_ssh", 3)


def test_batches_that_can_be_shared_out():
    check_world(8, JOB)
    check_world(8, replace(JOB, min_hosts=1))
    check_world(8, replace(JOB, hosts=(Host("a", 8),)), tp=8)
    check_world(4, replace(JOB, hosts=(Host("a", 8),)), tp=4)
    check_world(7, replace(JOB, engine="tp"))
    with pytest.raises(UserError, match="among 4 processes"): check_world(6, JOB)
    with pytest.raises(UserError, match="among 4 processes"): check_world(6, replace(JOB, min_hosts=1))
    with pytest.raises(UserError, match="among 3 processes"): check_world(4, replace(JOB, hosts=(Host("a", 3), Host("b", 1)), min_hosts=1))


def test_deepspeed_that_is_not_there(monkeypatch):
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llm_scratch\[distributed\]'"): launch(make_job(["m"], engine="deepspeed"))


@pytest.mark.parametrize(("over", "tool"), [("slurm", "sbatch"), ("kubernetes", "kubectl"), ("pytorchjob", "kubectl")])
def test_schedulers_get_the_file(over, tool, fake, tmp_path, monkeypatch):
    job = make_job(["m"], over=over, nodes="2", processes=8)
    with monkeypatch.context() as bare, pytest.raises(UserError, match=f"there is no {tool} here: write the file with --dry-run"):
        bare.setenv("PATH", str(tmp_path))
        launch(job, over)
    fake(tool, f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/file\nexit 6\n')
    assert launch(job, over) == 6
    assert (tmp_path/"file").read_text() == launch_text(job, over)
    assert (tmp_path/"words").read_text().split() == launch_command(job, over)[0][1:]


# --- files -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def render():
    spec = spec_from_file_location("render", CLUSTER/"render.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_of_deploy_cluster_are_what_we_write(render):
    for name, text in render.rendered().items(): assert (CLUSTER/name).read_text(encoding="utf-8") == text, f"{name}: run python deploy/cluster/render.py"


def test_the_environment_of_deepspeed_is_one_it_can_read(render):
    "DeepSpeed splits every line at its first `=`: a comment or an empty line would end it."
    lines = (CLUSTER/".deepspeed_env").read_text().splitlines()
    assert lines and all(re.fullmatch(r"\w+=\S+", line) for line in lines)
    assert set(render.ENVIRONMENT) <= set(PASSED_ON)


def test_the_readme_of_deploy_cluster_names_files_and_options_that_exist():
    text = (CLUSTER/"README.md").read_text(encoding="utf-8")
    assert {p.name for p in CLUSTER.iterdir() if p.is_file()} - {"README.md", "render.py"} == set(re.findall(r"\]\(([^)/]+)\)", text))
    for link in re.findall(r"\]\((\.\.[^)]+)\)", text): assert (CLUSTER/link).exists(), link
    known = {f"--{name.replace('_', '-')}" for name in (*make_job.__annotations__, *launch.__annotations__)} | {"--run", "--node-rank", "--dry-run"}
    assert set(re.findall(r"(--[a-z][a-z-]+)", text)) - {"--run-path"} <= known
    for command in re.findall(r"`llm-scratch launch ([^`]+)`", text):
        words = shlex.split(command)
        given = {words[i][2:].replace("-", "_"): words[i+1] for i in range(0, len(words), 2)}
        given = {k: int(v) if k == "processes" else str(CLUSTER/v) if k == "hostfile" else v for k, v in given.items() if k not in ("run", "node_rank")}
        assert launch_text(make_job(["m"], **given), given.get("over", "local"))


@pytest.fixture
def slurm(fake, tmp_path, monkeypatch):
    "Run a batch script as Slurm would, `srun` once for each node side by side; gives the status and what was asked of scontrol."
    def submit(script:str, n_nodes:int, restarts:int=0)->tuple[int, str]:
        fake("scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$1" = show ] && printf "127.0.0.1\\nnode1\\n"\nexit 0\n')
        fake("srun", '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nfor n in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$n "$@" & all="$all $!"; done\nworst=0\nfor p in $all; do wait $p || worst=$?; done\nexit $worst\n')
        path = tmp_path/"job.sbatch"
        path.write_text(script)
        done = subprocess.run(["bash", path], env=os.environ | dict(SLURM_JOB_ID="4711", SLURM_NNODES=str(n_nodes), SLURM_JOB_NODELIST="node[0-1]", SLURM_CPUS_PER_TASK="1", SLURM_RESTART_COUNT=str(restarts)), timeout=LIMIT, check=False)
        return done.returncode, (tmp_path/"asked").read_text()
    return submit


def test_the_batch_script_is_one(render):
    for text in (render.rendered()["job.sbatch"], job_file(JOB, "slurm"), job_file(replace(JOB, environment=()), "slurm")):
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
        lines = text.splitlines()
        first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
        assert lines[0] == "#!/bin/bash" and not any(line.startswith("#SBATCH") for line in lines[first:]), "sbatch reads no directive behind the first command"
        options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
        n = "8" if "PROCESSES=8" in text else "2"
        assert (options["nodes"], options["gpus-per-node"], options["ntasks-per-node"]) == ("2", n, "1") and "requeue" in options and options["cpus-per-task"] == str(8*int(n))
        assert "PROCESSES=" + n in text and '--cpus-per-task="$SLURM_CPUS_PER_TASK"' in text


def test_the_batch_script_says_what_launch_says(slurm, tmp_path):
    "Each node runs what `launch_command` gives for it."
    echo = tmp_path/"echo"
    echo.write_text(f"#!{sys.executable}\nimport json, os, sys\njson.dump([sys.argv[1:], os.getcwd(), os.environ['OMP_NUM_THREADS']], open('out' + os.environ['SLURM_NODEID'], 'w'))\n")
    echo.chmod(0o755)
    job = replace(JOB, program=("m", "--run", "runs/a"), python=str(echo), folder=str(tmp_path))
    assert slurm(job_file(job, "slurm"), 2)[0] == 0
    expected = replace(job, address="127.0.0.1", port=29500 + 4711 % 1000)
    for n in range(2): assert json.loads((tmp_path/f"out{n}").read_text()) == [launch_command(expected, "no_ssh", n)[0][1:], str(tmp_path), "8"]


def test_slurm_begins_anew_after_a_failure_but_not_for_ever(slurm, tmp_path):
    job = replace(JOB, program=("m",), python="false", folder=str(tmp_path), max_restarts=2)
    for restarts, asks in ((0, True), (1, True), (2, False)):
        (tmp_path/"asked").unlink(missing_ok=True)
        status, asked = slurm(job_file(job, "slurm"), 2, restarts)
        assert status == 1 and ("requeue 4711" in asked) == asks
    (tmp_path/"asked").unlink()
    assert "requeue" not in slurm(job_file(replace(job, python="true"), "slurm"), 2)[1]
    assert slurm(job_file(replace(job, folder="/no/such"), "slurm"), 2)[0] == 1


def filled_in(container:dict, given:dict[str, str])->list[str]:
    "A container's command as Kubernetes starts it: `$(NAME)` from its environment."
    env = given | {e["name"]: e["value"] for e in container["env"]}
    return [re.sub(r"\$\((\w+)\)", lambda found: env[found[1]], word) for word in [*container["command"], *container["args"]]]


def pods_of(manifest:str)->list[tuple[dict, dict[str, str]]]:
    "Each pod's spec, and what its controller tells it."
    docs = list(yaml.safe_load_all(manifest))
    if docs[-1]["kind"] == "Job": return [(docs[-1]["spec"]["template"]["spec"], dict(JOB_COMPLETION_INDEX=str(i))) for i in range(docs[-1]["spec"]["completions"])]
    kinds = docs[-1]["spec"]["pytorchReplicaSpecs"]
    specs = [kinds[kind]["template"]["spec"] for kind in ("Master", "Worker") if kind in kinds for _ in range(kinds[kind]["replicas"])]
    return [(spec, dict(RANK=str(i), MASTER_ADDR="llm-scratch-master-0", WORLD_SIZE=str(len(specs)))) for i, spec in enumerate(specs)]


@pytest.mark.parametrize("over", ["kubernetes", "pytorchjob"])
@pytest.mark.parametrize("n_nodes", [1, 2, 5])
def test_every_pod_runs_what_launch_says(over, n_nodes):
    job = replace(JOB, program=("m", "--text", 'a "b" \\ c: #'), hosts=tuple(Host(f"n{i}", 2) for i in range(n_nodes)), environment=(("NCCL_SOCKET_IFNAME", "eth0"), ("NCCL_DEBUG", '"yes"')))
    pods = pods_of(job_file(job, over, image="img:1", claim="disk"))
    assert len(pods) == n_nodes
    address = "llm-scratch-0.llm-scratch" if over == "kubernetes" else "llm-scratch-master-0"
    for i, (pod, told) in enumerate(pods):
        (container,) = pod["containers"]
        assert filled_in(container, told) == launch_command(replace(job, address=address), "no_ssh", i)[0]
        assert container["image"] == "img:1" and container["workingDir"] == "/shared"
        assert container["env"] == [dict(name="NCCL_SOCKET_IFNAME", value="eth0"), dict(name="NCCL_DEBUG", value='"yes"')]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 2 and {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert container["ports"] == [dict(name="rendezvous" if over == "kubernetes" else "pytorchjob-port", containerPort=29500)]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]} == {"shared", "shm"}
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "disk" and pod["volumes"][1]["emptyDir"]["medium"] == "Memory"
        assert pod["terminationGracePeriodSeconds"] >= 60


def test_the_job_of_kubernetes_is_one_that_can_meet():
    service, job = yaml.safe_load_all(job_file(replace(JOB, max_restarts=3), "kubernetes"))
    assert (service["apiVersion"], service["kind"], job["apiVersion"], job["kind"]) == ("v1", "Service", "batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2 and spec["backoffLimit"] == 6
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]} and service["spec"]["ports"][0]["port"] == 29500
    assert pod["subdomain"] == service["metadata"]["name"] and pod["restartPolicy"] == "Never"
    assert spec["podFailurePolicy"]["rules"][0]["onPodConditions"] == [dict(type="DisruptionTarget")]


def test_the_job_of_the_operator():
    (job,) = yaml.safe_load_all(job_file(replace(JOB, max_restarts=3), "pytorchjob"))
    assert (job["apiVersion"], job["kind"], job["spec"]["runPolicy"]["backoffLimit"]) == ("kubeflow.org/v1", "PyTorchJob", 6)
    assert all(r["restartPolicy"] == "OnFailure" and r["template"]["spec"]["containers"][0]["name"] == "pytorch" for r in job["spec"]["pytorchReplicaSpecs"].values()) # the operator looks for this name
    assert yaml.safe_load_all(job_file(replace(JOB, environment=()), "pytorchjob")).__next__()["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["env"] == []


# --- one machine -----------------------------------------------------------------------------------------------------

@pytest.fixture
def at_home(monkeypatch):
    "Ranks find ranks.py."
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def test_two_ranks_here(at_home, none_left, tmp_path):
    assert launch(make_job(["ranks", str(tmp_path)], processes=2)) == 0
    seen = rows_of(tmp_path)
    expected = rank_environments([Host("here", 2)])
    assert [{k: v for k, v in seen[r][0]["given"].items() if k in expected[0] and not k.startswith("MASTER")} for r in (0, 1)] == [{k: v for k, v in e.items() if not k.startswith("MASTER")} for e in expected]
    assert [row["total"] for r in (0, 1) for row in seen[r] if "total" in row] == [1.]*6


def test_a_rank_that_dies_in_the_middle_ends_the_others_within_a_minute(at_home, none_left, tmp_path):
    begin = time.monotonic()
    assert launch(make_job(["ranks", str(tmp_path), "--rounds", "1000", "--pause", ".2", "--fail", "1:2:KILL"], processes=2)) != 0
    assert time.monotonic() - begin < 60
    assert all(ended(rows[0]["pid"]) for rows in rows_of(tmp_path).values()) and not (tmp_path/"rank2.jsonl").exists()


def test_restarts_on_one_machine(at_home, none_left, tmp_path):
    assert launch(make_job(["ranks", str(tmp_path), "--fail", "1:2:KILL"], processes=2, nodes="1:1", max_restarts=12)) == 0
    assert len({row["pid"] for row in rows_of(tmp_path)[0]}) >= 2 and rows_of(tmp_path)[1][-1]["round"] == 3


def test_the_batch_script_starts_ranks_that_meet(at_home, slurm, tmp_path):
    job = replace(JOB, program=("ranks", str(tmp_path/"seen")), hosts=(Host("a", 1), Host("b", 1)), python=sys.executable, folder=str(ROOT), environment=())
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        job = replace(job, port=s.getsockname()[1] - 4711 % 1000)
    assert slurm(job_file(job, "slurm"), 2)[0] == 0
    assert {r: rows[-1]["total"] for r, rows in rows_of(tmp_path/"seen").items()} == {0: 1., 1: 1.}


# --- two hosts -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if why := lacking(): pytest.skip(why)
    with Hosts(tmp_path_factory.mktemp("hosts")) as two: yield two


@pytest.fixture
def quiet(hosts):
    "When a test ends no Python runs on the hosts, and no lock lies about."
    yield
    deadline = time.monotonic() + 20
    while (left := [*hosts.pids("a"), *hosts.pids("b"), *hosts.pids("a", "pdsh"), *hosts.pids("a", "ssh -o")]) and time.monotonic() < deadline: time.sleep(.2)
    for pid in left: os.kill(pid, signal.SIGKILL)
    assert left == [] and not list((hosts.folder/"extensions").rglob("lock"))


def finish(process:subprocess.Popen)->None:
    with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def alone(): return ranks.plain(12)


def train(hosts, folder, *more): return ["ranks", folder, "--train", 12, "--every", 4, *more]


def same(folder, alone): # as one process that nobody interrupts
    losses = losses_of(folder)
    assert sorted(losses) == list(range(1, 13))
    assert max(abs(losses[i+1]-x) for i, x in enumerate(alone)) < 5e-6


def test_losses_would_show_a_difference(alone):
    "The comparison is worth something: updates matter, and so does their order."
    assert max(alone) - min(alone) > .05 and min(abs(a-b) for a, b in zip(alone, alone[1:])) > 5e-5


def test_deepspeed_by_pdsh(hosts, quiet, alone, tmp_path):
    pytest.importorskip("deepspeed")
    done = hosts.run("a", launch_on(hosts, train(hosts, tmp_path, "--engine", "deepspeed"), "pdsh", engine="deepspeed", port=hosts.free_port()), timeout=LIMIT, NCCL_DEBUG="WARN", SECRET="hunter2")
    same(tmp_path, alone)
    seen = rows_of(tmp_path)
    assert {r: rows[0]["host"] for r, rows in seen.items()} == {0: hosts.a, 1: hosts.b}
    for rows in seen.values():
        assert rows[0]["given"]["NCCL_DEBUG"] == "WARN" and rows[0]["given"]["OMP_NUM_THREADS"] == "1" and "SECRET" not in rows[0]["given"]
    assert "Traceback" not in done.stderr


def test_the_same_command_on_each_host(hosts, quiet, alone, tmp_path):
    pytest.importorskip("deepspeed")
    how = dict(over="no_ssh", engine="deepspeed", port=hosts.free_port())
    second = hosts.start("b", launch_on(hosts, train(hosts, tmp_path, "--engine", "deepspeed"), node=1, **how), tmp_path/"b.log")
    hosts.run("a", launch_on(hosts, train(hosts, tmp_path, "--engine", "deepspeed"), **how), timeout=LIMIT)
    assert second.wait(timeout=60) == 0
    same(tmp_path, alone)


def test_the_commands_of_kubernetes_start_ranks_that_meet(hosts, quiet, tmp_path):
    "What the two pods would run, on two hosts."
    job = Job(("ranks", str(tmp_path)), (Host(hosts.a, 1), Host(hosts.b, 1)), port=hosts.free_port(), python=sys.executable)
    running = [hosts.start(key, [word.replace("llm-scratch-0.llm-scratch", hosts.a) for word in filled_in(pod["containers"][0], told)], tmp_path/f"{key}.log") for key, (pod, told) in zip("ab", pods_of(job_file(job, "kubernetes")))]
    assert [p.wait(timeout=LIMIT) for p in running] == [0, 0], (tmp_path/"a.log").read_text()[-2000:]
    assert {r: (rows[0]["host"], rows[-1]["total"]) for r, rows in rows_of(tmp_path).items()} == {0: (hosts.a, 1.), 1: (hosts.b, 1.)}


def test_a_rank_killed(hosts, quiet, alone, tmp_path):
    hosts.run("a", launch_on(hosts, train(hosts, tmp_path, "--fail", "1:6:KILL"), nodes="2:2", port=hosts.free_port()), timeout=LIMIT)
    same(tmp_path, alone)
    seen = rows_of(tmp_path)
    assert (tmp_path/"failed").exists() and all([r["begins"] for r in rows if "begins" in r][0] == 0 and [r["begins"] for r in rows if "begins" in r][-1] == 4 for rows in seen.values())
    assert sum("step" in row for row in seen[0]) == 12 + 2 # 5 and 6 are made twice
    assert {row["world"] for rows in seen.values() for row in rows if "step" in row} == {2}


def test_a_host_lost(hosts, quiet, alone, tmp_path):
    plug = PullThePlug(hosts, "b", tmp_path)
    try:
        hosts.run("a", launch_on(hosts, train(hosts, tmp_path, "--fail", "1:6:HOST"), nodes="1:2", port=hosts.free_port()), timeout=LIMIT)
        assert plug.pulled
    finally:
        if "b" not in hosts.roots: hosts.power_on("b")
    same(tmp_path, alone)
    steps = [(row["step"], row["world"]) for row in rows_of(tmp_path)[0] if "step" in row]
    assert steps == [(n, 2) for n in range(1, 7)] + [(n, 1) for n in range(5, 13)]


def test_the_real_program(hosts, quiet, tmp_path):
    "`llm-scratch pretrain` itself, on one process and on two hosts: the same log."
    command = [sys.executable, "-m", "llm_scratch"]
    for name in ("one", "two"): hosts.run("a", [*command, "tokenize", "--run", tmp_path/name, "--preset", "tiny"], timeout=LIMIT)
    hosts.run("a", [*command, "pretrain", "--run", tmp_path/"one"], timeout=LIMIT)
    hosts.run("a", launch_on(hosts, ["llm_scratch", "pretrain", "--run", tmp_path/"two", "--engine", "fsdp"], engine="fsdp", batch_size=4, port=hosts.free_port()), timeout=LIMIT)
    one, two = ([json.loads(line)["loss"] for line in (tmp_path/name/"log.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert len(one) == len(two) == 30 and max(abs(a-b) for a, b in zip(one[:10], two[:10])) < 5e-6 and one[0] - one[9] > .1
    assert (tmp_path/"two"/"model").is_dir()


@pytest.mark.parametrize(("over", "engine"), [("pdsh", "deepspeed"), ("ssh", "ddp")])
def test_a_rank_that_dies_before_it_meets_the_others(hosts, quiet, tmp_path, over, engine):
    if engine == "deepspeed": pytest.importorskip("deepspeed")
    begin = time.monotonic()
    done = hosts.run("a", launch_on(hosts, ["ranks", tmp_path, "--fail", "1:start:3"], over, engine=engine, port=hosts.free_port()), timeout=LIMIT, check=False)
    dead = (tmp_path/"failed").stat().st_mtime
    assert done.returncode in (1, 3) and time.time() - dead < 60 and time.monotonic() - begin < LIMIT
    assert (f"{hosts.b} ended with status" if over == "ssh" else f"{hosts.b}: ssh exited") in done.stderr
    assert len(rows_of(tmp_path)) == 2 and not any("total" in row for row in rows_of(tmp_path)[0])


def test_a_rank_that_dies_in_the_middle(hosts, quiet, tmp_path):
    done = hosts.run("a", launch_on(hosts, ["ranks", tmp_path, "--rounds", "1000", "--pause", ".2", "--fail", "1:3:KILL"], "pdsh", port=hosts.free_port()), timeout=LIMIT, check=False)
    assert done.returncode != 0 and time.time() - (tmp_path/"failed").stat().st_mtime < 60


def test_who_ends_the_launcher_ends_the_ranks_of_all_hosts_and_nobody_elses(hosts, quiet, tmp_path):
    "Another DeepSpeed job on the same host, by the same Python, goes on."
    pytest.importorskip("deepspeed")
    world = base64.urlsafe_b64encode(json.dumps(dict(here=[0])).encode()).decode()
    other = hosts.start("b", [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_port=29999", "--no_python", "--no_local_rank", "sleep", "6000"])
    job = hosts.start("a", launch_on(hosts, ["ranks", tmp_path, "--rounds", "10000", "--pause", ".2"], "pdsh", engine="deepspeed", port=hosts.free_port()), tmp_path/"log")
    try:
        deadline = time.monotonic() + LIMIT
        while len([1 for rows in rows_of(tmp_path).values() if len(rows) > 3]) < 2 and time.monotonic() < deadline and job.poll() is None: time.sleep(.2)
        assert job.poll() is None, (tmp_path/"log").read_text()[-3000:]
        launcher = next(pid for pid in hosts.pids("a") if "make_job" in Path(f"/proc/{pid}/cmdline").read_text() and psutil.Process(pid).name() != "nsenter")
        os.kill(launcher, signal.SIGTERM)
        assert job.wait(timeout=60) == 128 + signal.SIGTERM
        assert (len(hosts.pids("a", "ranks")), len(hosts.pids("b", "ranks"))) == (0, 0)
        assert other.poll() is None and hosts.pids("b", "sleep 6000")
    finally:
        for p in (job, other): finish(p)
        for pid in hosts.pids("b", "sleep 6000"): os.kill(pid, signal.SIGKILL)


def test_a_host_that_nobody_answers_for(hosts, quiet, tmp_path):
    (path := tmp_path/"hosts").write_text(f"{hosts.a} slots=1\n10.77.0.9 slots=1\n{hosts.b} slots=1\n")
    begin = time.monotonic()
    done = hosts.run("a", launch_on(hosts, ["ranks", tmp_path/"seen"], hostfile=str(path)), check=False)
    assert done.returncode == 1 and time.monotonic() - begin < 60
    assert "1 of 3 hosts cannot take part: 10.77.0.9 (" in done.stderr and "Traceback" not in done.stderr and not (tmp_path/"seen").exists()


@pytest.mark.parametrize("key", "ab")
def test_a_port_in_use_on_the_first_host(hosts, quiet, tmp_path, key):
    "Whether the launcher is on that host or on another."
    port = hosts.free_port()
    holder = hosts.start("a", [sys.executable, "-c", f"import socket, time; s = socket.socket(); s.bind(('', {port})); s.listen(); time.sleep(600)"])
    try:
        deadline = time.monotonic() + 30
        while hosts.run("b", [sys.executable, "-c", f"import socket; socket.create_connection(('10.77.0.1', {port}), 1)"], check=False).returncode and time.monotonic() < deadline: time.sleep(.1)
        done = hosts.run(key, launch_on(hosts, ["ranks", tmp_path/"seen"], port=port), check=False)
        assert done.returncode == 1 and re.search(rf"^error: port {port} of 10.77.0.1 is in use: give another, such as --port \d+", done.stderr) and "Traceback" not in done.stderr and not (tmp_path/"seen").exists()
    finally:
        finish(holder)
        for pid in hosts.pids("a", f"bind(('', {port}))"): os.kill(pid, signal.SIGKILL)


def test_a_slow_cable(hosts, quiet, tmp_path):
    "The same all-reduce over a fast and a slow cable, in one run; the bytes are those that the ring predicts."
    mib, times = 4, 4
    job = hosts.start("a", launch_on(hosts, ["ranks", tmp_path, "--link", mib], port=hosts.free_port()), tmp_path/"log")
    sent = {}
    try:
        for speed in ("fast", "slow", "fast again"):
            deadline = time.monotonic() + LIMIT
            while not (tmp_path/f"ready for {speed}").exists() and time.monotonic() < deadline and job.poll() is None: time.sleep(.05)
            assert job.poll() is None, (tmp_path/"log").read_text()[-3000:]
            hosts.slow("200mbit") if speed == "slow" else hosts.fast()
            sent[speed] = hosts.sent("a")
            (tmp_path/f"now {speed}").touch()
        assert job.wait(timeout=LIMIT) == 0
    finally:
        hosts.fast()
    seconds = {row["speed"]: row["seconds"] for row in rows_of(tmp_path)[0] if "speed" in row}
    assert 1 < (sent["slow"]-sent["fast"])/(mib*2**20*times) < 1.1
    assert seconds["slow"] > .8*mib*2**20*8/200e6 and seconds["slow"] > 2*min(seconds["fast"], seconds["fast again"])


def test_nothing_is_left_of_hosts_whose_process_was_killed(tmp_path):
    if why := lacking(): pytest.skip(why)
    code = f"import sys, time; sys.path.insert(0, {str(ROOT/'tests')!r}); from pathlib import Path; from hosts import Hosts\nwith Hosts(Path({str(tmp_path)!r})) as h: print(h.a, flush=True); time.sleep(600)"
    victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    name = victim.stdout.readline().strip()
    victim.kill()
    victim.wait()
    victim.stdout.close()
    left = lambda: [line.split()[0] for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines() if line.startswith(name[:-1])]
    assert len(left()) == 2
    sweep()
    assert left() == [] and not Path(f"/etc/netns/{name}").exists()

"""Jobs on two hosts, with and without accidents, and what the cable between them does: the record that chapter 05e draws.

    python benchmarks/launching.py                as root; the hosts are network namespaces of this machine (tests/hosts.py), three minutes
    python benchmarks/launching.py --out FILE     elsewhere than nbs/launching.json

Nothing in the record is a time, but for the ratio of two measured on the same cable; the losses do not depend on the machine but in their last digits.
"""
import argparse
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]  # this checkout, whichever is installed
import ranks  # noqa: E402
from hosts import Hosts, PullThePlug, lacking, launch_on, losses_of, rows_of  # noqa: E402

from llm_scratch.core import write_json  # noqa: E402

STEPS, EVERY, MIB, RATE = 14, 4, 4, "200mbit"
SCENES = [  # name, how the ranks are started, engine, --nodes, accident
    ("DeepSpeed's launcher, ZeRO 2", "pdsh", "deepspeed", "", ""),
    ("the same command on each host", "no_ssh", "deepspeed", "", ""),
    ("torchrun by ssh, FSDP2", "ssh", "fsdp", "", ""),
    ("a rank killed", "ssh", "ddp", "2:2", "1:10:KILL"),
    ("a host lost", "ssh", "ddp", "1:2", "1:10:HOST"),
]


def played(hosts:Hosts, folder:Path, over:str, engine:str, nodes:str, accident:str)->dict:
    "One job from its start to its end."
    folder.mkdir()
    program = ["ranks", folder, "--train", STEPS, "--every", EVERY, "--engine", engine, *(["--fail", accident] if accident else [])]
    plug = PullThePlug(hosts, "b", folder) if accident.endswith("HOST") else None
    how = dict(over=over, engine=engine, nodes=nodes, port=hosts.free_port())
    other = hosts.start("b", launch_on(hosts, program, node=1, **how), hosts.folder/"b.log") if over == "no_ssh" else None
    done = hosts.run("a", launch_on(hosts, program, **how), timeout=400, check=False)
    if other: other.wait(timeout=120)
    if plug and plug.pulled: hosts.power_on("b")
    if done.returncode: print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
    return dict(status=done.returncode, rows=[dict(rank=rank, host=row["host"][-1], pid=row["pid"]) | {k: row[k] for k in ("begins", "step", "loss", "world", "attempt") if k in row}
                                              for rank, rows in rows_of(folder).items() for row in rows if "given" not in row])


def attempts(rows:list[dict])->list[dict]:
    "From and to which step each process of each rank came; processes that made none are left out."
    found = {}
    for row in rows:
        if "begins" in row: found[row["rank"], row["pid"]] = dict(rank=row["rank"], host=row["host"], begins=row["begins"], ends=row["begins"], world=0, restarts=row["attempt"])
        else: found[row["rank"], row["pid"]] |= dict(ends=row["step"], world=row["world"])
    return [a for a in found.values() if a["ends"] > a["begins"]]


def the_cable(hosts:Hosts, folder:Path)->dict:
    "All-reduces over a fast cable and over a slow one, in one run, and the bytes that went through it."
    import time
    folder.mkdir()
    job = hosts.start("a", launch_on(hosts, ["ranks", folder, "--link", MIB], port=hosts.free_port()), hosts.folder/"link.log")
    sent = {}
    for speed in ("fast", "slow", "fast again"):
        while not (folder/f"ready for {speed}").exists():
            if job.poll() is not None: raise RuntimeError((hosts.folder/"link.log").read_text()[-3000:])
            time.sleep(.05)
        hosts.slow(RATE) if speed == "slow" else hosts.fast()
        sent[speed] = hosts.sent("a")
        (folder/f"now {speed}").touch()
    job.wait(timeout=200)
    rows = [row for row in rows_of(folder)[0] if "speed" in row]
    seconds = {row["speed"]: row["seconds"] for row in rows}
    return dict(rate=RATE, bytes=rows[0]["bytes"], times=rows[0]["times"], sent=sent["slow"]-sent["fast"], slower=seconds["slow"]/min(seconds["fast"], seconds["fast again"]), slow_seconds=seconds["slow"])


def main()->int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"launching.json")
    args = parser.parse_args()
    if why := lacking(): sys.exit(why)
    alone = ranks.plain(STEPS)
    record = dict(date=str(date.today()), machine=f"{platform.machine()} CPU, torch {torch.__version__.split('+')[0]}, two network namespaces", steps=STEPS, every=EVERY, alone=[round(x, 7) for x in alone], runs=[])
    with tempfile.TemporaryDirectory() as tmp, Hosts(Path(tmp)) as hosts:
        for n, (name, over, engine, nodes, accident) in enumerate(SCENES):
            scene = played(hosts, Path(tmp)/f"scene{n}", over, engine, nodes, accident)
            losses = losses_of(Path(tmp)/f"scene{n}")
            apart = max(abs(losses.get(i+1, float("nan"))-x) for i, x in enumerate(alone))
            record["runs"].append(dict(name=name, over=over, engine=engine, nodes=nodes, accident=accident, status=scene["status"], apart=float(f"{apart:.1e}"), attempts=attempts(scene["rows"])))
            print(f"{name}: status {scene['status']}, {apart:.1e} apart, {record['runs'][-1]['attempts']}", flush=True)
        record["link"] = the_cable(hosts, Path(tmp)/"link")
        print(record["link"])
    write_json(args.out, record)
    return int(any(run["status"] or not run["apart"] < 5e-6 for run in record["runs"]))


if __name__ == "__main__": sys.exit(main())

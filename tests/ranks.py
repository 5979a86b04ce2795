"""What the ranks of test_launching.py do: meet, add up their numbers a few times, and fail where they are told to.

    python -m ranks FOLDER [--rounds N] [--fail RANK:WHEN:HOW]     WHEN: start, or a round; HOW: an exit status, or KILL; in the first attempt only

Each rank appends to FOLDER/RANK what it has seen; the module imports nothing of the library.
"""
import argparse
import json
import os
import signal
import socket
import time
from pathlib import Path


def fail(how:str)->None:
    if how == "KILL": os.kill(os.getpid(), signal.SIGKILL)
    os._exit(int(how))


def main()->None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fail", default="")
    parser.add_argument("--local_rank", help="DeepSpeed's launcher gives it unless told not to: an error here")
    args = parser.parse_args()
    assert args.local_rank is None
    rank, world, attempt = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    who, when, how = args.fail.split(":") if args.fail and attempt == 0 else ("-1", "", "")
    args.folder.mkdir(parents=True, exist_ok=True)

    def tell(**what)->None:
        with open(args.folder/str(rank), "a") as f: f.write(json.dumps(what) + "\n")
    tell(host=socket.gethostname(), pid=os.getpid(), parent=os.getppid(), attempt=attempt, given={k: os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "SECRET", "NCCL_DEBUG", "LOCAL_SIZE", "CROSS_RANK") if k in os.environ})
    if int(who) == rank and when == "start": fail(how)
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    for n in range(args.rounds):
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
        tell(round=n, total=total.item(), attempt=attempt)
        assert total.item() == world*(world-1)/2
        if int(who) == rank and when == str(n): fail(how)
        if n: time.sleep(.2)
    dist.destroy_process_group()


if __name__ == "__main__": main()

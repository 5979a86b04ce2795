"""What one rank does in test_launching.py and in benchmarks/launching.py: meet the others, work, and fail where it is told to.

    python -m ranks FOLDER [--fail RANK:WHEN:HOW]                          add up numbers, three times
    python -m ranks FOLDER --train STEPS --engine ENGINE [--every N]       train a small model, a checkpoint every N updates
    python -m ranks FOLDER --link MIB                                      time all-reduces of so many MiB

A failure happens in the first attempt only. WHEN is `start`, or after so many rounds or updates; HOW is an exit status, or `KILL` (as by the kernel that has no memory left),
or `HOST` (the host's first process is killed, and with it everything there). Every rank writes what it sees to FOLDER/rankN.jsonl.
"""
import argparse
import json
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

GIVEN = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "CROSS_RANK", "OMP_NUM_THREADS", "NCCL_DEBUG", "SECRET"


def fail(how:str, folder:Path)->None:
    "Die. A process in a PID namespace cannot kill its first process, so for HOST we ask whoever watches the folder."
    if how == "HOST":
        (folder/"pull the plug").touch()
        time.sleep(600)
    if how == "KILL": os.kill(os.getpid(), signal.SIGKILL)
    os._exit(int(how))


def add(args, tell, maybe_fail)->None:
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo", timeout=timedelta(seconds=15))  # ranks that are started anew may miss each other: torchrun then tries again
    for n in range(1, args.rounds+1):
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total)
        assert total.item() == dist.get_world_size()*(dist.get_world_size()-1)/2
        tell(round=n, total=total.item())
        maybe_fail(n)
        time.sleep(args.pause)


def start(engine):
    "A small model as it lies in this process, and the data that its parts share out: the same in every world."
    import numpy as np
    import torch
    from llm_scratch.architecture import Decoder, ModelConfig, init_weights
    from llm_scratch.pretraining import Batches, TrainState

    def adamw(model):
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(.9, .95), weight_decay=.1)
        for group in opt.param_groups: group["initial_lr"] = group["lr"]
        return [opt]
    cfg = ModelConfig(vocab_size=64, context_len=32, n_layers=2, n_heads=2, n_kv_heads=2, d_model=32, d_ff=64, d_head=16)
    tokens = np.random.default_rng(0).choice((3, 5), 4000).cumsum() % 61 # two ways to go on from each
    model, optimizers = engine.prepare(init_weights(Decoder(cfg), 0), adamw, 8)
    return TrainState(model, optimizers, engine=engine), Batches(tokens, 32, 8//engine.world, 0, engine.rank, engine.world)


def learn(args, tell, maybe_fail)->None:
    from llm_scratch.checkpointing import agree_over, committed, latest
    from llm_scratch.engines import make_engine
    from llm_scratch.pretraining import train
    engine = make_engine(args.engine)
    state, batches = start(engine)
    if found := engine.share(latest(args.folder/"checkpoints")):
        engine.load(found, state.model, state.optimizers)
        state.step = int(found.name)
    tell(begins=state.step)
    for step in train(state, batches, lambda n: 1-n/40, args.train):
        tell(step=step.n, loss=step.loss, world=engine.world)
        if step.n % args.every == 0 and step.n < args.train:
            with committed(args.folder/"checkpoints", step.n, rank=engine.rank, agree=agree_over()) as new: engine.save(new, state.model, state.optimizers)
        maybe_fail(step.n)


def plain(n_steps:int)->list[float]:
    "The losses of one process that nobody interrupts."
    from llm_scratch.engines import Engine
    from llm_scratch.pretraining import train
    state, batches = start(Engine())
    return [step.loss for step in train(state, batches, lambda n: 1-n/40, n_steps)]


def link(args, tell, maybe_fail)->None:
    "All-reduces of a few sizes, for as long as the folder holds the file `go on`; between two of them the main process waits for the next speed."
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    numbers = torch.ones(int(args.link*2**18))
    for speed in ("fast", "slow", "fast again"):
        if dist.get_rank() == 0:
            (args.folder/f"ready for {speed}").touch()
            while not (args.folder/f"now {speed}").exists(): time.sleep(.02)
        dist.barrier()
        seconds = []
        for _ in range(4):
            begin = time.perf_counter()
            dist.all_reduce(numbers)
            seconds.append(time.perf_counter()-begin)
        tell(speed=speed, seconds=min(seconds[1:]), bytes=numbers.numel()*4, times=len(seconds))
        dist.barrier()


def main()->None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0)
    parser.add_argument("--fail", default="")
    parser.add_argument("--train", type=int)
    parser.add_argument("--engine", default="ddp")
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--link", type=float)
    args = parser.parse_args() # no --local_rank, which DeepSpeed's launcher gives unless told not to
    rank, attempt = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    who, when, how = args.fail.split(":") if args.fail and attempt == 0 and not (args.folder/"failed").exists() else ("-1", "", "")
    args.folder.mkdir(parents=True, exist_ok=True)

    def tell(**what)->None:
        with open(args.folder/f"rank{rank}.jsonl", "a") as f: f.write(json.dumps(what | dict(pid=os.getpid(), host=socket.gethostname(), attempt=attempt)) + "\n")

    def maybe_fail(now:object)->None:
        if int(who) == rank and when == str(now):
            (args.folder/"failed").touch()
            fail(how, args.folder)
    tell(given={k: os.environ[k] for k in GIVEN if k in os.environ})
    maybe_fail("start")
    (learn if args.train else link if args.link else add)(args, tell, maybe_fail)
    from llm_scratch.engines import end_rank
    end_rank()


if __name__ == "__main__": main()

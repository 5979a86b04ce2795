"What each rank of a job does for test_stability.py: `python -m stability_ranks FOLDER`, under torchrun; the main rank writes FOLDER/found.json."
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_stability import ABOUT, N, PLAIN, RATE, Spoiled, fresh, plant

from llm_scratch.checkpointing import latest
from llm_scratch.core import write_json
from llm_scratch.engines import DDPEngine, Engine, FSDPEngine, farthest, join
from llm_scratch.pretraining import Batches, train
from llm_scratch.stability import Guard, Without, careful_train, explained, find_nonfinite, load_careful, measure_noise, roll_back, save_careful


def mine(engine, bad=(), only=None):
    "This rank's part of the batches; bad ones are bad on one rank only."
    part = Batches(PLAIN.tokens, 16, 8//engine.world, rank=engine.rank, world=engine.world)
    return Spoiled(bad if only is None or engine.rank == only else (), part)


def start(make, seed=0):
    engine = make()
    state = fresh(seed)
    if engine.world > 1: state.model, state.optimizers = engine.prepare(state.model, __import__("llm_scratch.pretraining").pretraining.make_optimizers)
    state.engine = engine
    return state


def said(f):
    try: f()
    except ValueError as e: return str(e)


def passing_over(make, folder):
    state, guard = start(make), Guard()
    steps = list(careful_train(state, mine(state.engine, [30, 31, 44], only=1), RATE, N, guard))
    other = start(Engine)
    plain = list(train(other, Without(PLAIN, [30, 31, 44]), RATE, N))
    return dict(guards=state.engine.gather([guard.passed, guard.losses]), apart=farthest(steps, plain))


def rolling_back(make, folder):
    state, guard, steps = start(make), Guard(), {}
    for step in careful_train(state, mine(state.engine, [33], only=1), RATE, 40, guard, limit=math.inf):
        steps[step.n] = step
        if guard.score > 6: roll_back(state, guard, folder, ABOUT, margin=8)
        elif step.n % 5 == 0: save_careful(state, guard, folder, ABOUT)
    again = start(make, 4)  # resumed by a fresh job
    told = load_careful(again, latest(folder), ABOUT)
    other = start(Engine)
    plain = list(train(other, Without(PLAIN, guard.passed), RATE, 40))
    return dict(guard=[guard.passed, guard.rollbacks], apart=farthest(list(steps.values()), plain), resumed=[again.step, told == guard], names=sorted(p.name for p in folder.glob("0*")))


def breaking(make, folder):
    state = start(make)
    if state.engine.rank == 1 and make is DDPEngine: plant(state.model.module, "layers.1.mlp.up_proj.weight", (2, 3))
    steps = explained(train(state, mine(state.engine), RATE, N), state, folder)
    text = said(lambda: next(steps))
    return dict(said=state.engine.gather(text), files=sorted(p.name for p in folder.iterdir()))


def noise(make, folder):
    state = start(make)
    ids, targets = mine(state.engine)[3]
    targets = targets.masked_fill(ids % 5 == 0, -1)
    found = state.engine.gather(vars(measure_noise(state, ids, targets, 2)))
    ids, targets = PLAIN[3]
    order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])  # both ranks' first pieces, then their second
    targets = targets.masked_fill(ids % 5 == 0, -1)
    return dict(ranks=found, plain=vars(measure_noise(start(Engine), ids[order], targets[order], 2)))


if __name__ == "__main__":
    folder, found = Path(sys.argv[1]), {}
    torch.set_num_threads(1)
    join()
    for name, make in (("ddp", DDPEngine), ("fsdp", FSDPEngine)):
        for f in (passing_over, rolling_back, noise) + ((breaking,) if name == "ddp" else ()): found[f"{f.__name__} {name}"] = f(make, folder/f"{f.__name__} {name}")
    state = start(FSDPEngine)  # a model that is cut can be looked at as well
    found["nothing"] = [str(c) for c in state.engine.gather(find_nonfinite(state.model, *mine(state.engine)[0], state.engine))]
    state.model.layers[0].mlp.down_proj.weight.data.mul_(math.nan)
    found["cut"] = state.engine.gather(str(find_nonfinite(state.model, *mine(state.engine)[0], state.engine)))
    if dist.get_rank() == 0: write_json(folder/"found.json", found)
    dist.destroy_process_group()

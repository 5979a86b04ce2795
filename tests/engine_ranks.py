"What each rank of a job does for test_engines.py: `python -m engine_ranks WHAT FOLDER`, under torchrun; the main rank writes FOLDER/WHAT.json."
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.core import UserError, write_json
from llm_scratch.engines import DDPEngine, DeepSpeedEngine, Engine, FSDPEngine, end_rank, farthest, join, make_engine, n_held, trial
from llm_scratch.pretraining import NotFinite, TrainState, load_checkpoint, make_adamw, make_optimizers, save_checkpoint, save_shards, train, update

MAKE = dict(ddp=DDPEngine, fsdp=FSDPEngine, tp=lambda: FSDPEngine(tp=2), zero0=lambda: DeepSpeedEngine(zero_stage=0, n_micro=2), zero1=lambda: DeepSpeedEngine(zero_stage=1, n_micro=2),
            zero2=lambda: DeepSpeedEngine(zero_stage=2, n_micro=2), zero3=lambda: DeepSpeedEngine(zero_stage=3, n_micro=2))


def said(f):
    "What the error says, on every rank the same."
    try: f()
    except ValueError as e: text = str(e)
    else: text = ""
    everywhere = [None]*dist.get_world_size()
    dist.all_gather_object(everywhere, text)
    return text if len(set(everywhere)) == 1 else f"ranks disagree: {everywhere}"


def parts(folder):
    "Save in parts on one engine, load on each that can read them, and go on."
    plain, found = trial(Engine())[1][6:], {}
    for name in MAKE: save_shards(trial(MAKE[name](), n_steps=6)[0], folder/name, {})
    for a, b in [("ddp", "fsdp"), ("fsdp", "tp"), ("tp", "ddp"), ("zero0", "zero0"), ("zero1", "zero1"), ("zero2", "zero2"), ("zero3", "zero3")]:
        found[f"{a} {b}"] = farthest(trial(MAKE[b](), path=folder/a/"000006")[1], plain)
    found["foreign"] = said(lambda: trial(DDPEngine(), path=folder/"zero2"/"000006"))
    found["stage"] = said(lambda: trial(MAKE["zero3"](), path=folder/"zero2"/"000006"))
    return found


def universal(folder):
    "What two processes wrote in parts, read by as many as are here."
    plain = trial(Engine())[1][6:]
    return {name: farthest(trial(MAKE[name](), path=folder/name/"000006")[1], plain) for name in ("zero0", "zero1", "zero2", "zero3")} | dict(left=sorted(p.name for p in folder.glob("*/.universal*")))


def aliases(folder):
    "A state that was filled from another's goes its own way."
    found = {}
    for name in ("ddp", "fsdp", "zero0", "zero2", "zero3"):
        engine = MAKE[name]()
        first, _ = trial(engine, n_steps=3)
        full = engine.share(engine.full_state(first.model, first.optimizers))
        second, _ = trial(engine, n_steps=0)
        engine.load_full_state(second.model, second.optimizers, full)
        before = {k: x.clone() for k, x in engine.full_state(first.model, first.optimizers).items()}
        second.step = 3
        batch = (torch.arange(4*32).reshape(4, 32) % 251, torch.arange(4*32).reshape(4, 32) % 249)
        for _ in train(second, [batch]*6, lambda step: 1., 6, n_micro=2): pass
        after = engine.full_state(first.model, first.optimizers)
        found[name] = all(torch.equal(before[k], after[k]) for k in before)
    return found


def sgd(model): return [torch.optim.SGD([dict(params=list(model.parameters()), initial_lr=.5)], lr=.5)]  # whose step shows the gradient


def clipping(folder):
    "Weights after three steps with the gradient clipped by value and by norm, as far as they are from those of one process; and how far clipping itself moves them."
    cfg = ModelConfig(64, context_len=16, n_layers=1, n_heads=2, n_kv_heads=2, d_model=32, d_ff=64, d_head=16)
    rows = [torch.arange(8*16).reshape(8, 16)**2 % (61-i) for i in range(4)]

    def learned(engine, **clip):
        state = TrainState(*engine.prepare(init_weights(Decoder(cfg), 0), sgd, 8), engine=engine)
        n = 8//engine.world
        mine = [(a[engine.rank*n:][:n], b[engine.rank*n:][:n]) for a, b in zip(rows, rows[1:])]
        norms = [step.grad_norm for step in train(state, mine, lambda step: 1., 3, n_micro=2, **clip)]
        return norms, engine.full_state(state.model, [])

    far = lambda a, b: max((x-b[name]).abs().max().item() for name, x in a.items())
    bounds = dict(value=dict(max_norm=torch.inf, max_value=.01), both=dict(max_norm=.2, max_value=.01))
    plain, found = {name: learned(Engine(), **clip) for name, clip in bounds.items()}, {}
    if engine_is_main := dist.get_rank() == 0: found["by itself"] = [far(plain["value"][1], learned(Engine(), max_norm=torch.inf)[1]), far(plain["both"][1], plain["value"][1])]
    for engine in ("ddp", "fsdp", "tp"):
        for name, clip in bounds.items():
            norms, full = learned(MAKE[engine](), **clip)
            if engine_is_main: found[f"{engine} {name}"] = [far(full, plain[name][1]), max(abs(a/b-1) for a, b in zip(norms, plain[name][0]))]
    return found


def details(folder):
    found, rank = {}, dist.get_rank()
    engine = DDPEngine()
    found["sum"] = engine.sum(rank+1)
    found["gather"], found["share"] = engine.gather(rank*10), engine.share("main" if engine.is_main else "other")
    found["at_main"] = engine.at_main(lambda: dist.get_rank())

    def fails(): raise UserError("no such run")
    found["at_main fails"] = said(lambda: engine.at_main(fails))
    found["agree"] = engine.agree("disk full" if rank == 1 else "")

    state, _ = trial(engine, n_steps=1)
    torch.manual_seed(100 + rank)
    path = save_checkpoint(state, folder/"rng", {})
    mine = torch.rand(3)
    torch.manual_seed(5)
    load_checkpoint(state, path, {})
    found["rng"] = bool(engine.sum(float(torch.equal(mine, torch.rand(3)))) == 2)

    syncs, no_sync = [], DistributedDataParallel.no_sync
    DistributedDataParallel.no_sync = lambda self: (syncs.append(1), no_sync(self))[1]
    batch = torch.arange(4*32).reshape(4, 32) % 251, torch.arange(4*32).reshape(4, 32) % 249
    update(state, *batch, n_micro=4)
    found["no_sync"] = len(syncs)
    before = [p.detach().clone() for p in state.model.parameters()]
    with torch.no_grad(): state.model.module.norm.weight[0] = torch.nan if rank == 1 else 1.  # of one rank only
    found["nan"] = said(lambda: update(state, *batch))
    try: update(state, batch[0]+rank, batch[1])
    except NotFinite as e: found["nan batch"] = bool(engine.sum(float(torch.equal(e.ids_BT, batch[0]+rank) and torch.equal(e.targets_BT, batch[1]))) == 2)
    found["nan touched"] = not all(torch.equal(a, b) for a, b in zip(before[:-1], list(state.model.parameters())[:-1]))

    for name in ("fsdp", "tp"):
        state, _ = trial(MAKE[name](), n_steps=1)
        found[f"{name} cut"] = all(hasattr(p, "full_tensor") for p in state.model.parameters())
        found[f"{name} held"] = n_held(state.model, state.optimizers)
        calls, sync = [], type(state.model).set_requires_gradient_sync
        state.model.set_requires_gradient_sync = lambda x, m=state.model, sync=sync: (calls.append(x), sync(m, x))[1]
        update(state, *batch, n_micro=2)
        found[f"{name} sync"] = calls
    found["tp ranks"] = [state.engine.rank, state.engine.world]

    cfg = ModelConfig(64, context_len=16, n_layers=1, n_heads=3, n_kv_heads=1, d_model=32, d_ff=64, d_head=8)
    found["tp heads"] = said(lambda: FSDPEngine(tp=2).prepare(Decoder(cfg), make_adamw))
    found["tp world"] = said(lambda: FSDPEngine(tp=3))
    found["tp model"] = said(lambda: FSDPEngine(tp=2).prepare(nn.Linear(4, 4), make_adamw))
    found["plain"], found["name"], found["precision"] = said(lambda: make_engine("plain")), said(lambda: make_engine("ddq")), said(lambda: make_engine("ddp", precision="fp8"))

    zero = lambda **kw: TrainState(*(e := DeepSpeedEngine(**kw)).prepare(init_weights(Decoder(cfg), 0), make_adamw, 8), engine=e)
    small = tuple(x[:, :16] % 64 for x in batch)
    found["ds muon"] = said(lambda: DeepSpeedEngine().prepare(Decoder(cfg), make_optimizers))
    found["ds pieces"] = said(lambda: update(zero(n_micro=2), *small))
    forward = DeepSpeedEngine.forward
    DeepSpeedEngine.forward = None  # what is refused is refused before any work
    found["ds norm"] = said(lambda: update(zero(), *small, max_norm=.5))
    found["ds value"] = said(lambda: update(zero(), *small, max_value=.5))
    found["ds train"] = said(lambda: train(zero(), [small], lambda step: 1., 1, max_value=.5))
    DeepSpeedEngine.forward = forward
    found["ds bf16"] = said(lambda: zero(precision="bf16", zero_stage=0))
    found["other model"] = said(lambda: load_checkpoint(zero(), path, {}))
    found["other optimizers"] = said(lambda: load_checkpoint(trial(DDPEngine(), "muon", n_steps=0)[0], path, {}))
    found["other run"] = said(lambda: load_checkpoint(trial(DDPEngine(), n_steps=0)[0], path, dict(seed=1)))
    return found


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    join()
    found = {name: globals()[name](folder) for name in what.split(",")}
    if dist.get_rank() == 0: write_json(folder/f"{what}.json", found)
    end_rank()

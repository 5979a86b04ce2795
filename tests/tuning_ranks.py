"What each rank of a job does for test_finetuning.py: `python -m tuning_ranks FILE`, under torchrun; the main rank writes FILE."
import sys
from functools import partial

import numpy as np
import torch

from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.core import write_json
from llm_scratch.engines import DDPEngine, DeepSpeedEngine, Engine, FSDPEngine, end_rank
from llm_scratch.finetuning import TuningBatches, completion, drop_frozen, freeze, layered, tune
from llm_scratch.pretraining import TrainState, make_adamw, train

CFG = ModelConfig(64, context_len=24, n_layers=2, n_heads=2, n_kv_heads=2, d_model=32, d_ff=64, d_head=16)
MAKE = dict(ddp=DDPEngine, fsdp=FSDPEngine, zero2=partial(DeepSpeedEngine, zero_stage=2), zero3=partial(DeepSpeedEngine, zero_stage=3))


def some_samples(n, seed=0):
    "Prompts and answers of very different lengths."
    rng = np.random.default_rng(seed)
    return [completion([0, *rng.integers(1, 64, rng.integers(1, 10))], [*rng.integers(1, 64, rng.integers(0, 12)), 0]) for _ in range(n)]


def begun(engine):
    "Half of the model is frozen, and the rates fall with depth."
    model = init_weights(Decoder(CFG), 0)
    freeze(model, "embed_tokens", "layers.0")
    make = lambda model: layered(model, partial(make_adamw, lr=.003), .5)  # noqa: E731
    if isinstance(engine, DeepSpeedEngine): make = lambda model, all_of=make: drop_frozen(all_of(model))  # noqa: E731
    return TrainState(*engine.prepare(model, make, 8), engine=engine)


def whole(engine, model):
    "Every weight by name; those of ZeRO gathered by its own means."
    if not isinstance(engine, DeepSpeedEngine): return engine.full_state(model, [])
    from deepspeed import zero
    with zero.GatheredParameters(list(model.module.parameters())): return {f"model.{k}": p.detach().clone() for k, p in model.module.named_parameters()}


def tuned(engine):
    "Six updates: their losses, and the weights."
    state = begun(engine)
    steps = list(train(state, TuningBatches(some_samples(30), 24, 8//engine.world, rank=engine.rank, world=engine.world), lambda step: 1., 6))
    return [step.loss for step in steps], whole(engine, state.model)


def stopped(engine):
    "Looks at held-out samples, a best one, and the weights after them."
    state = begun(engine)
    batches = TuningBatches(some_samples(3), 24, 8//engine.world, rank=engine.rank, world=engine.world)
    looks = list(tune(state, batches, some_samples(6, 1), lambda step: 8., 12, every=2))
    return [look.loss.mean for look in looks], state.step, engine.full_state(state.model, [])


def main(out):
    torch.set_num_threads(1)
    losses, weights = tuned(Engine())
    first = init_weights(Decoder(CFG), 0).state_dict()
    looks, best, kept = stopped(Engine())
    rows = dict(plain=dict(losses=losses, looks=looks, best=best))
    for name, make in MAKE.items():
        engine = make()
        theirs, full = tuned(engine)
        found = dict(loss=max(abs(a-b) for a, b in zip(losses, theirs, strict=True)))
        if engine.is_main: found |= dict(weight=max((full[f"model.{k}"]-weights[f"model.{k}"]).abs().max().item() for k in first),
                                         frozen=sorted(k for k in first if torch.equal(full[f"model.{k}"], first[k])))
        if name in ("ddp", "fsdp"):
            their_looks, their_best, full = stopped(engine)
            found |= dict(look=max(abs(a-b) for a, b in zip(looks, their_looks, strict=True)), best=their_best)
            if engine.is_main: found["kept"] = max((full[f"model.{k}"]-kept[f"model.{k}"]).abs().max().item() for k in first)
        rows[name] = found
        if engine.is_main: write_json(out, rows)
    end_rank()


if __name__ == "__main__": main(sys.argv[1])

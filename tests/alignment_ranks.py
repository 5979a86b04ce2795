"What each of two ranks does for test_alignment.py and test_reinforcement.py: `python -m alignment_ranks FOLDER`, under torchrun; the main rank writes FOLDER/done.json."
import copy
import sys
from pathlib import Path

import torch

from llm_scratch.alignment import PreferenceBatches, reference_logps, tune_dpo
from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.core import write_json
from llm_scratch.engines import DDPEngine, Engine, end_rank
from llm_scratch.finetuning import completion
from llm_scratch.pretraining import TrainState, make_adamw
from llm_scratch.reinforcement import GRPOConfig, Rollouts, Sums, learn_from, sample_groups

CFG = ModelConfig(len(Sums.chars), context_len=32, n_layers=1, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, d_head=8)
PAIRS = [(completion([1, i%9], [2+i%5]*(1+i%3)+[13]), completion([1, i%9], [8-i%4]*(1+i%4)+[13])) for i in range(8)]


def dpo(engine):
    "Four updates, and what each says of all ranks."
    model = init_weights(Decoder(CFG), seed=0)
    ref = reference_logps(model, model, PAIRS)
    state = TrainState(*engine.prepare(model, make_adamw), engine=engine)
    steps = list(tune_dpo(state, PreferenceBatches(PAIRS, ref, 4//engine.world, rank=engine.rank, world=engine.world), lambda k: .3, 4, beta=.5))
    return [[s.loss, s.chosen, s.rejected, s.right, s.n_tokens] for s in steps], weights(state)


def grpo(engine):
    "Three rounds of two updates with the same answers; each rank has half of them."
    model = init_weights(Decoder(CFG), seed=0)
    base = copy.deepcopy(model)
    tried = sample_groups(model, [Sums.prompt(i, 9-i) for i in range(4)], 4, 6, Sums.stop_id, torch.Generator().manual_seed(0))
    rewards = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    state = TrainState(*engine.prepare(model, make_adamw), engine=engine)
    n, at = 16//engine.world, 16//engine.world*engine.rank
    mine = Rollouts(tried.answers[at:at+n], tried.ids_BT[at:at+n], tried.targets_BT[at:at+n])
    for _ in range(3): learn_from(state, base, mine, rewards[at//4:(at+n)//4], lambda k: .1, GRPOConfig(Sums.stop_id, 6, n_group=4, beta=.5))
    return weights(state)


def weights(state): return [x for p in state.engine.bare(state.model).parameters() for x in p.detach().flatten().tolist()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, engine = Path(sys.argv[1]), DDPEngine()
    done = dict(dpo=[dpo(engine), dpo(Engine())], grpo=[grpo(engine), grpo(Engine())])
    if engine.is_main: write_json(folder/"done.json", done)
    end_rank()

"Training that is killed at any moment, and what belongs to no chapter: any module, any number of pieces, damaged checkpoints."
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn

from llm_scratch.core import UserError
from llm_scratch.checkpointing import keep_last, latest, saved
from llm_scratch.pretraining import Batches, TrainState, add_gradients, load_checkpoint, make_optimizers, save_checkpoint, train, wsd

ABOUT = dict(seed=0)


class Bigram(nn.Module):
    "Any module that maps ids to logits will do; this one draws random numbers while it trains."
    def __init__(self, width=12):
        super().__init__()
        self.table, self.norm, self.out, self.drop = nn.Embedding(16, width), nn.LayerNorm(width), nn.Linear(width, 16, bias=False), nn.Dropout(.2)

    def forward(self, ids): return self.out(self.drop(self.norm(self.table(ids))))


def _state(seed=0, **kw):
    torch.manual_seed(seed)
    model = Bigram(**kw)
    return TrainState(model, make_optimizers(model))


BATCHES = Batches(np.arange(400) % 13, 8, 4)


def _train(state, n, until=None):
    for step in train(state, BATCHES, partial(wsd, n_steps=n, warmup=3), n):
        if step.n == until: break
    return state


def _same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("at", [1, 7, 19])
def test_saved_loaded_and_continued_equals_undisturbed_even_with_dropout(at, tmp_path):
    whole = _train(_state(), 20)
    first = _train(_state(), 20, until=at)
    path = save_checkpoint(first, tmp_path, ABOUT)
    torch.manual_seed(99)  # whatever happened in between
    second = _train(load_checkpoint(_state(seed=5), path, ABOUT), 20)
    assert second.step == 20 and _same(whole.model.state_dict(), second.model.state_dict())


SCRIPT = """import sys
from functools import partial
from pathlib import Path
import numpy as np, torch
from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.checkpointing import keep_last, latest
from llm_scratch.pretraining import *
torch.set_num_threads(1); torch.manual_seed(0)
model = Decoder(ModelConfig(64, context_len=16, n_layers=2, n_heads=2, n_kv_heads=1, d_model=32, d_ff=64, d_head=16))
state, folder = TrainState(model, make_optimizers(model)), Path(sys.argv[1])
if done := latest(folder): load_checkpoint(state, done, dict(seed=0))
print("ready", flush=True)
for step in train(state, Batches(np.arange(3000) * 7 % 61, 16, 4), partial(wsd, n_steps=60), 60):
    save_checkpoint(state, folder, dict(seed=0), keep=keep_last(2))
"""


def test_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    "The process spends most of its time saving, so most kills land inside a save."
    env = os.environ | dict(OMP_NUM_THREADS="1")
    start = lambda folder: subprocess.Popen([sys.executable, "-c", SCRIPT, folder], stdout=subprocess.PIPE, env=env)
    assert start(tmp_path/"whole").wait(120) == 0
    rng, kills = random.Random(0), 0
    while True:
        child = start(tmp_path/"killed")
        assert child.stdout.readline() == b"ready\n", "a checkpoint could not be read after a kill"
        if kills < 6:
            time.sleep(rng.uniform(.02, .25))
            child.send_signal(signal.SIGKILL)
        kills += 1
        if child.wait(120) == 0: break
    assert kills > 3
    whole, killed = (load_file(latest(tmp_path/name)/"state.safetensors") for name in ("whole", "killed"))
    assert _same(whole, killed)


def test_checkpoints_sort_by_number(tmp_path):
    assert latest(tmp_path/"none") is None
    state = _state()
    for step in (5, 1000000, 40): state.step = step; save_checkpoint(state, tmp_path, ABOUT)
    (tmp_path/".000099.123.new").mkdir()  # what a killed process leaves
    assert list(saved(tmp_path)) == [5, 40, 1000000]


def _flip(f):
    data = bytearray(f.read_bytes()); data[len(data)//2] ^= 1; f.write_bytes(data)


@pytest.mark.parametrize("spoil, named", [(lambda p: _flip(p/"state.safetensors"), "state.safetensors"), (lambda p: _flip(p/"state.json"), "state.json"),
    (lambda p: (p/"state.json").unlink(), "state.json"), (lambda p: (p/"manifest.json").unlink(), "manifest.json"), (lambda p: (p/"manifest.json").write_text("{"), "manifest.json")])
def test_a_damaged_checkpoint_is_one_line_and_touches_nothing(spoil, named, tmp_path):
    path = save_checkpoint(_train(_state(), 3), tmp_path, ABOUT)
    spoil(path)
    state = _state()
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    with pytest.raises(UserError) as e: load_checkpoint(state, path, ABOUT)
    assert named in str(e.value) and "delete the folder" in str(e.value) and "\n" not in str(e.value)
    assert _same(before, state.model.state_dict()) and state.step == 0


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = save_checkpoint(_state(), tmp_path, dict(seed=0, n_steps=9))
    with pytest.raises(UserError, match="n_steps=9, not n_steps=10"): load_checkpoint(_state(), path, dict(seed=0, n_steps=10))


@given(n_micro=st.integers(1, 4), hidden=st.lists(st.integers(0, 31), max_size=25))
@settings(max_examples=25, deadline=None)
def test_gradients_do_not_depend_on_the_pieces(n_micro, hidden):
    model = _state().model.eval()
    ids, targets = (x.clone() for x in BATCHES[0])
    targets.view(-1)[hidden] = -1
    grads = []
    for pieces in (1, n_micro):
        model.zero_grad()
        loss, n = add_gradients(model, ids, targets, pieces)
        grads.append((torch.tensor(loss), *(p.grad.clone() for p in model.parameters())))
    assert n == 32-len(set(hidden))
    for a, b in zip(*grads): torch.testing.assert_close(a, b)


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched():
    state = _train(_state(), 5)
    with torch.no_grad(): state.model.out.weight[0, 0] = torch.inf
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    with pytest.raises(ValueError, match="at step 6: lower the learning rate"): next(train(state, BATCHES, lambda step: 1., 9))
    assert _same(before, state.model.state_dict()) and state.step == 5


def test_every_parameter_has_one_optimizer():
    state = _state()
    held = [p for opt in state.optimizers for g in opt.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(state.model.parameters()))
    assert [p.ndim for g in state.optimizers[0].param_groups for p in g["params"]] == [2]


@given(n_steps=st.integers(2, 5000), warmup=st.integers(1, 100), decay=st.floats(.05, 1))
def test_the_schedule_stays_between_zero_and_one(n_steps, warmup, decay):
    warmup = min(warmup, n_steps)
    factors = [wsd(i, n_steps, warmup, decay) for i in range(n_steps)]
    assert all(0 < f <= 1 for f in factors) and wsd(n_steps, n_steps, warmup, decay) == 0

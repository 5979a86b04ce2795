"Several processes: what belongs to no lesson of chapter 05b. Two pools of ranks serve all tests; a pool that failed starts anew by itself."
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from models import filled
from torch import nn
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig, fused_attend, init_weights
from llm_scratch.distributed import (
    BucketedGradients,
    FlatUnit,
    RankError,
    Ranks,
    PipeStage,
    Wire,
    ZeRO,
    count_targets,
    cut_axis,
    exchange,
    gpipe,
    grid,
    held_bytes,
    join_positions,
    most_held,
    norm_of_parts,
    one_f_one_b,
    owners,
    ring_attend,
    run_ranks,
    run_stage,
    sequence_parallel,
    share_of_loss,
    share_parameters,
    sum_gradients,
    sum_positions,
    tcp_bytes_sent,
    tensor_parallel,
    timetable,
    ulysses_attend,
    vocab_nats,
    whole_state,
)
from llm_scratch.pretraining import Muon, TrainState, make_optimizers, update

ROOT = Path(__file__).resolve().parent.parent
CFG = ModelConfig(vocab_size=53, context_len=24, n_layers=4, n_heads=8, n_kv_heads=4, d_model=16, d_ff=24, d_head=4)
adamw = partial(torch.optim.AdamW, lr=2e-3, betas=(.9, .95), eps=1e-4, weight_decay=.1)


@pytest.fixture(scope="module")
def two():
    with Ranks(2, timeout=150) as ranks: yield ranks


@pytest.fixture(scope="module")
def four():
    with Ranks(4, timeout=150) as ranks: yield ranks


def fresh(cfg:ModelConfig=CFG)->Decoder: return filled(init_weights(Decoder(cfg), 0))


def batch(step:int, B:int=4, T:int=24, cfg:ModelConfig=CFG)->tuple[torch.Tensor, torch.Tensor]:
    "Targets that count differ from row to row, and one row has none."
    rng = torch.Generator().manual_seed(step)
    ids = torch.randint(cfg.vocab_size, (B, T+1), generator=rng)
    targets = ids[:,1:].clone()
    targets[0,3:] = -1
    targets[1] = -1
    targets[-1,T//2] = -1
    return ids[:,:-1].contiguous(), targets


def plain(n:int=5, cfg:ModelConfig=CFG, max_norm:float=.7)->tuple[list[float], dict, list[float]]:
    model = fresh(cfg)
    optimizer, losses, norms = adamw(model.parameters()), [], []
    for step in range(n):
        ids, targets = batch(step, cfg=cfg)
        optimizer.zero_grad()
        loss = share_of_loss(model, ids, targets, int((targets != -1).sum()))
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict(), norms


def clipped(params, norm:float, max_norm:float=.7)->None:
    for p in params: p.grad *= min(1, max_norm/(norm+1e-6))


def assert_same(results, cfg:ModelConfig=CFG, reference=None)->None:
    "Losses, lengths of gradients and weights of every rank are those of one process."
    losses, weights, norms = reference or plain(cfg=cfg)
    assert set().union(*(w for _, w, _ in results)) == set(weights)
    for ours, state, lengths in results:
        assert max(abs(a-b) for a, b in zip(ours, losses, strict=True)) < 5e-6
        assert max(abs(a-b)/b for a, b in zip(lengths, norms, strict=True)) < 1e-5
        assert max((weights[k]-w).abs().max() for k, w in state.items()) < 5e-6


# --- ranks: nobody hangs, nobody is left over ---------------------------------------------------------------------

def pid_after(fault=None):
    if fault and dist.get_rank() == dist.get_world_size()-1: fault()
    dist.barrier()
    return os.getpid()

def raise_it(): raise KeyError("seven heads")
def kill_me(): os.kill(os.getpid(), signal.SIGKILL)
def leave(): os._exit(3)
def leave_quietly(): sys.exit(0)


@pytest.mark.parametrize("fault, told", [(raise_it, "KeyError: 'seven heads'"), (kill_me, "exit code -9"), (leave, "exit code 3"), (leave_quietly, "SystemExit: 0")])
def test_the_failure_that_is_told_is_the_cause(fault, told):
    "The other rank waits in a barrier, or loses its connection: neither is the news."
    start = time.monotonic()
    with Ranks(3, timeout=100) as ranks:
        pids = ranks(pid_after)
        assert len(set(pids)) == 3 and all(psutil.pid_exists(p) for p in pids)
        with pytest.raises(RankError) as e: ranks(pid_after, fault)
        assert str(e.value).splitlines()[0].startswith("rank 2 of 3: ") and told in str(e.value).splitlines()[0]
        if fault is raise_it: assert "in raise_it" in str(e.value)
        assert not any(psutil.pid_exists(p) for p in pids) and ranks.processes == []
        again = ranks(pid_after) # a pool that failed starts anew
        assert len(again) == 3 and not set(again) & set(pids)
    assert not any(psutil.pid_exists(p) for p in again)
    assert time.monotonic() - start < 60


def test_a_wait_for_ever_ends_and_names_who_waits():
    def lonely():
        if dist.get_rank() == 1: dist.recv(torch.empty(1), 0)
        return dist.get_rank()
    with Ranks(2, timeout=60) as ranks:
        ranks(pid_after)
        ranks.timeout = 3
        with pytest.raises(TimeoutError, match="from rank 1 of 2"): ranks(lonely)
        assert ranks.processes == []


def test_ranks_end_with_a_parent_that_is_killed(tmp_path):
    "SIGKILL leaves no time to tidy up: the ranks see it themselves, even in the middle of a collective."
    script = tmp_path/"parent.py"
    script.write_text("import os, time\nimport torch, torch.distributed as dist\nfrom llm_scratch.distributed import Ranks\n"
        "def wait(folder):\n    open(f'{folder}/{dist.get_rank()}.pid', 'w').write(str(os.getpid()))\n    if dist.get_rank() == 0: dist.recv(torch.empty(1), 1)\n    time.sleep(600)\n"
        f"if __name__ == '__main__':\n    with Ranks(2) as ranks: ranks(wait, {str(tmp_path)!r})\n")
    with subprocess.Popen([sys.executable, script], cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)), start_new_session=True) as parent:
        try:
            end = time.monotonic() + 100
            files = [tmp_path/f"{r}.pid" for r in range(2)]
            while not all(f.exists() and f.read_text() for f in files) and time.monotonic() < end: time.sleep(.05)
            pids = [int(f.read_text()) for f in files]
        finally: parent.kill()
    end = time.monotonic() + 30
    while any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids) and time.monotonic() < end: time.sleep(.05)
    left = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
    for p in left: os.kill(p, signal.SIGKILL)
    assert left == []


def test_arguments_and_answers_of_any_kind(two):
    factor = 3.
    class Pair:
        def __init__(self, x): self.x = x
    def double(pair): return dict(x=pair.x*factor, rank=dist.get_rank(), local=type(pair).__name__)
    answers = two(double, Pair(torch.arange(3.)))
    assert [a["rank"] for a in answers] == [0, 1] and answers[1]["x"].tolist() == [0, 3, 6] and answers[0]["local"] == "Pair"
    assert run_ranks(pid_after, 1)[0] != os.getpid()
    with pytest.raises(ValueError, match="world=0"): Ranks(0)


# --- the ring -----------------------------------------------------------------------------------------------------

def rings(lengths, seed):
    out = []
    for n in lengths:
        wire = Wire()
        x = torch.randn(n, generator=torch.Generator().manual_seed(seed+dist.get_rank()))
        total = wire.all_reduce(x.clone(), kind="library")
        piece, pieces = wire.reduce_scatter(x.clone()), total.tensor_split(wire.world)
        mine = torch.full((n,), -1.).tensor_split(wire.world)
        mine[wire.rank].copy_(pieces[wire.rank])
        row = torch.cat(mine)
        scattered = wire.sent["reduce-scatter"]
        out.append(((piece-pieces[wire.rank]).abs().max().item() if len(piece) else 0., (wire.all_gather(row)-total).abs().max().item() if n else 0.,
                    (wire.ring_all_reduce(x)-total).abs().max().item() if n else 0., scattered, wire.sent["all-gather"]))
    return out


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 2**16))
def test_rings_equal_the_library_at_any_length(two, four, lengths, seed):
    for pool in (two, four):
        results = pool(rings, lengths, seed)
        for i, n in enumerate(lengths):
            assert max(max(r[i][:3]) for r in results) < 1e-5
            assert sum(r[i][3] for r in results) == (pool.world-1)*4*n
            assert sum(r[i][4] for r in results) == 2*(pool.world-1)*4*n # gathered twice


def test_shift_goes_both_ways_and_totals_add_up(four):
    def around():
        wire = Wire()
        mine = torch.tensor([float(wire.rank)])
        return wire.shift(mine, torch.empty(1)).item(), wire.shift(mine, torch.empty(1), -1).item(), wire.total(10**wire.rank), wire.sent["send"]
    assert four(around) == [(3, 1, 1111, 8), (0, 2, 1111, 8), (1, 3, 1111, 8), (2, 0, 1111, 8)]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="asks a Linux kernel")
def test_the_kernel_counts_what_we_count(four):
    def counted():
        wire, n = Wire(), 400_000
        out = {}
        for kind, call in {"all-reduce": lambda: wire.all_reduce(torch.ones(n)), "reduce-scatter": lambda: wire.reduce_scatter(torch.ones(n)), "all-gather": lambda: wire.all_gather(torch.ones(n)),
                           "all-to-all": lambda: exchange(torch.ones(n//4, 4), wire, 0, 1)}.items():
            dist.barrier()
            before = tcp_bytes_sent()
            call()
            dist.barrier()
            out[kind] = (tcp_bytes_sent()-before) / wire.sent[kind]
        return out
    for result in four(counted):
        for kind, ratio in result.items(): assert abs(ratio-1) < .02, (kind, ratio)


# --- data parallel ------------------------------------------------------------------------------------------------

def data_parallel(bucket_bytes, n_micro=1):
    wire, model = Wire(), fresh()
    optimizer, gradients, losses, norms = adamw(model.parameters()), BucketedGradients(model, wire, bucket_bytes), [], []
    for step in range(5):
        ids, targets = (x.chunk(wire.world)[wire.rank] for x in batch(step))
        optimizer.zero_grad()
        total, loss = count_targets(targets, wire), 0.
        for i, (a, b) in enumerate(zip(ids.chunk(n_micro), targets.chunk(n_micro))):
            gradients.is_last = i == n_micro-1
            part = share_of_loss(model, a, b, total)
            part.backward()
            loss += part.item()
        gradients.finish()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), .7).item())
        optimizer.step()
        losses.append(wire.total(loss))
    return losses, model.state_dict(), norms


@pytest.mark.parametrize("bucket_bytes, n_micro", [(1, 1), (5000, 2), (2**30, 1)])
def test_buckets_of_any_size_and_micro_batches_equal_one_process(two, bucket_bytes, n_micro): assert_same(two(data_parallel, bucket_bytes, n_micro))


def test_four_copies_of_which_one_has_no_target(four): assert_same(four(data_parallel, 3000))


class Forked(nn.Module):
    "Each rank takes another branch; one branch nobody takes."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.branches, self.last = nn.Linear(3, 3), nn.ModuleList(nn.Linear(3, 3) for _ in range(3)), nn.Linear(3, 1)
    def forward(self, x, i): return self.last(self.branches[i](self.first(x)))


def forked(micro):
    wire, model = Wire(), Forked()
    gradients, out = BucketedGradients(model, wire, 48), []
    for _ in range(2): # the second time nothing is left of the first
        model.zero_grad()
        gradients.is_last = not micro
        model(torch.ones(1, 3)*(wire.rank+1), wire.rank).sum().backward()
        if micro: # the branch of the first piece is not that of the last
            gradients.is_last = True
            model(torch.ones(1, 3), 1-wire.rank).sum().backward()
        gradients.finish()
        out.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    return out


@pytest.mark.parametrize("micro", [False, True])
def test_parameters_that_one_rank_or_none_has_used(two, micro):
    "Buckets go in one order on all ranks, though they fill in another; what nobody used keeps no gradient."
    model = Forked()
    for r in range(2):
        model(torch.ones(1, 3)*(r+1), r).sum().backward()
        if micro: model(torch.ones(1, 3), 1-r).sum().backward()
    for rounds in two(forked, micro):
        for grads in rounds:
            for (name, p), g in zip(model.named_parameters(), grads, strict=True):
                assert (p.grad is None) == (g is None) == name.startswith("branches.2"), name
                if g is not None: assert_close(g, p.grad)


def test_buckets_leave_in_order_before_the_backward_pass_ends(two):
    def begun():
        wire, model = Wire(), fresh()
        gradients, seen = BucketedGradients(model, wire, 4000), []
        model.layers[0].input_layernorm.weight.register_hook(lambda g: seen.append(len(gradients.works)))
        share_of_loss(model, *batch(0), 1.).backward()
        seen.append(len(gradients.works))
        gradients.finish()
        return *seen, len(gradients.buckets), [sum(p.nbytes for p in b) for b in gradients.buckets], [len(b) for b in gradients.buckets]
    for early, all_begun, n, sizes, counts in two(begun):
        assert n > 5 and n-4 <= early < n and all_begun == n
        assert all(size <= 4000 or k == 1 for size, k in zip(sizes, counts))


def test_the_loop_of_chapter_06_with_its_muon(two):
    "Gradients in buckets, whole matrices dealt out: pretraining's optimizers on two ranks equal pretraining's `update`."
    def muon():
        wire, model = Wire(), fresh()
        gradients, (matrices, rest) = BucketedGradients(model, wire), make_optimizers(model, .1)
        owner = owners(matrices.param_groups[0]["params"], wire.world)
        mine = Muon([p for p, r in owner.items() if r == wire.rank], lr=.002)
        losses = []
        for step in range(3):
            ids, targets = (x.chunk(wire.world)[wire.rank] for x in batch(step))
            model.zero_grad()
            loss = share_of_loss(model, ids, targets, count_targets(targets, wire))
            loss.backward()
            gradients.finish()
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            mine.param_groups[0]["momentum"] = .85 + .1*step/300
            mine.step(); rest.step()
            share_parameters(owner, wire)
            losses.append(wire.total(loss.item()))
        return losses, model.state_dict(), {r: sum(p.numel() for p in owner if owner[p] == r) for r in range(2)}, wire.sent["broadcast"]
    state = TrainState(fresh(), [])
    state.optimizers = make_optimizers(state.model, .1)
    expected = [update(state, *batch(step)).loss for step in range(3)]
    results = two(muon)
    n = sum(results[0][2].values())
    assert sum(r[3] for r in results) == 3*4*n
    for losses, weights, load, _ in results:
        assert abs(load[0]-load[1]) <= max(p.numel() for p in state.model.layers.parameters())
        assert max(abs(a-b) for a, b in zip(losses, expected)) < 5e-6
        for k, w in state.model.state_dict().items(): assert_close(weights[k], w, atol=2e-5, rtol=0)


# --- ZeRO ---------------------------------------------------------------------------------------------------------

def zero(stage, n_micro=1, look=False):
    wire, model = Wire(), fresh()
    optimizer, losses, norms = ZeRO(model, wire, adamw, stage), [], []
    for step in range(5):
        ids, targets = (x.chunk(wire.world)[wire.rank] for x in batch(step))
        total, loss = count_targets(targets, wire), 0.
        for a, b in zip(ids.chunk(n_micro), targets.chunk(n_micro)):
            part = share_of_loss(model, a, b, total)
            part.backward()
            loss += part.item()
        if look: # an evaluation between backward pass and step, when what is outside the blocks is held from before
            with torch.no_grad(): model(ids)
        norms.append(optimizer.reduce())
        optimizer.step(min(1, .7/(norms[-1]+1e-6)))
        losses.append(wire.total(loss))
    for unit in optimizer.units: unit.gather()
    return losses, {k: w.clone() for k, w in model.state_dict().items()}, norms


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_equals_one_process_with_clipping(two, four, stage):
    assert_same(two(zero, stage, 2))
    assert_same(four(zero, stage))


def test_zero_3_looks_at_new_weights_after_an_evaluation(two): assert_same(two(zero, 3, 1, True))


def test_zero_refuses_a_stage_that_is_none(two):
    with pytest.raises(RankError, match="stage=4"): two(zero, 4)


def test_zero_2_holds_full_gradients_of_one_block_and_zero_3_weights_of_one(two):
    def most(stage):
        model, seen = fresh(), []
        ZeRO(model, Wire(), adamw, stage)
        look = lambda *_: seen.append((sum(any(p.grad is not None for p in layer.parameters()) for layer in model.layers), sum(p.untyped_storage().nbytes() > 0 for layer in model.layers for p in [layer.mlp.up_proj.weight])))
        for p in model.parameters(): p.register_hook(look)
        for layer in model.layers: layer.mlp.register_forward_hook(look)
        share_of_loss(model, *batch(0), 1.).backward()
        return [max(x) for x in zip(*seen)], [min(x) for x in zip(*seen)][1], len(seen)
    assert two(most, 1)[0][:2] == ([4, 4], 4)
    assert two(most, 2)[0][:2] == ([1, 4], 4)
    assert two(most, 3)[0][:2] == ([1, 1], 0)


def test_a_row_pads_and_its_piece_is_a_view(four):
    def row():
        wire, p = Wire(), nn.Parameter(torch.arange(6.))
        unit = FlatUnit([p], wire)
        with torch.no_grad(): unit.mine += 10*(wire.rank+1)
        unit.gather()
        return p.tolist(), len(unit.full), held_bytes([p, unit.mine, unit.full])
    assert four(row) == [([10, 11, 22, 23, 34, 35], 8, 32)]*4


# --- tensor parallel ----------------------------------------------------------------------------------------------

def tensor(cut_stream, cfg=CFG):
    wire, model = Wire(), fresh(cfg)
    tensor_parallel(model, wire, *((join_positions, sum_positions) if cut_stream else ()))
    if cut_stream: sum_gradients([n.weight for layer in model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)] + [model.norm.weight], wire)
    optimizer, losses, norms = adamw(model.parameters()), [], []
    parts = [[p for name, p in model.named_parameters() if (cut_axis(name) is None) is whole] for whole in (False, True)]
    for step in range(5):
        ids, targets = batch(step, cfg=cfg)
        optimizer.zero_grad()
        loss = vocab_nats(model(ids), targets, model.embed_tokens.first, wire) / int((targets != -1).sum())
        loss.backward()
        norms.append(norm_of_parts(*parts, wire))
        clipped(model.parameters(), norms[-1])
        optimizer.step()
        losses.append(loss.item())
    return losses, whole_state(model, wire), norms


@pytest.mark.parametrize("cut_stream", [False, True])
def test_tensor_parallel_equals_one_process(two, four, cut_stream):
    "53 tokens do not divide: ranks hold stretches of different lengths."
    assert_same(two(tensor, cut_stream))
    assert_same(four(tensor, cut_stream))


def test_what_cannot_be_cut_is_refused(two):
    def cut(**sizes): tensor_parallel(Decoder(ModelConfig(**{**CFG.__dict__, **sizes})), Wire())
    for sizes in (dict(n_heads=3, n_kv_heads=3), dict(d_ff=25)):
        with pytest.raises(RankError, match="must be multiples of the 2 ranks"): two(partial(cut, **sizes))
    with pytest.raises(RankError, match="seq_len=23 does not divide into 2"): two(lambda: sequence_parallel(fresh(), Wire(), 23))
    with pytest.raises(RankError, match="use ring_attend"): two(lambda: ulysses_attend(*(torch.ones(1, 3, 2, 4) for _ in range(3)), wire=Wire()))
    with pytest.raises(RankError, match="2 ranks do not make groups of 3"): two(grid, 3)
    for stage, n in ((0, 5), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="each needs a block"): PipeStage(fresh(), stage, n)


def test_the_loss_of_a_cut_vocabulary_survives_great_scores(two):
    def loss(scores, targets):
        wire = Wire()
        mine = scores.tensor_split(2, -1)[wire.rank].clone().requires_grad_()
        nats = vocab_nats(mine, targets, (0, 4)[wire.rank], wire)
        nats.backward()
        return nats.item(), mine.grad
    scores = torch.randn(2, 3, 7)*30 + torch.tensor([500., -500.])[:,None,None]
    targets = torch.tensor([[0, 6, -1], [3, 4, 5]])
    whole = scores.clone().requires_grad_()
    expected = nn.functional.cross_entropy(whole.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    expected.backward()
    results = two(loss, scores, targets)
    for nats, _ in results: assert math.isclose(nats, expected.item(), rel_tol=1e-5)
    assert_close(torch.cat([g for _, g in results], -1), whole.grad, atol=1e-5, rtol=1e-4)


# --- pipelines ----------------------------------------------------------------------------------------------------

@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 16))
def test_schedules_do_all_the_work_once_and_hold_little(p, m):
    for schedule in (gpipe, one_f_one_b):
        rows = timetable(schedule, p, m)
        at = {(s, *turn): slot for s, row in enumerate(rows) for slot, turn in enumerate(row) if turn}
        assert len(at) == 2*p*m and {len(row) for row in rows} == {2*(m+p-1)}
        for s, kind, i in at:
            before = (s, "F", i) if kind == "B" and s == p-1 else (s-1, kind, i) if kind == "F" and s else (s+1, kind, i) if kind == "B" else None
            if before: assert at[before] < at[s, kind, i]
            if kind == "B": assert at[s, "F", i] < at[s, "B", i]
        assert [most_held(row) for row in rows] == [m if schedule is gpipe else min(m, p-s) for s in range(p)]


def test_a_schedule_that_stands_still_is_found():
    def crossed(stage, n_stages, n_micro): return [("B", 0), ("F", 0)] if stage == 0 else [("F", 0), ("B", 0)]
    with pytest.raises(ValueError, match="crossed stands still"): timetable(crossed, 2, 1)


def pipeline(schedule, n_micro):
    wire = Wire()
    part = PipeStage(fresh(), wire.rank, wire.world)
    optimizer, losses, norms, held = adamw(part.parameters()), [], [], [0, 0]
    part.register_forward_hook(lambda *_: held.__setitem__(0, held[0]+1))
    own = [p for name, p in part.named_parameters() if not (part.is_last and wire.world > 1 and name.startswith("embed"))] # the embedding counts once
    for step in range(5):
        ids, targets = (x.unflatten(0, (n_micro, -1)) for x in batch(step))
        optimizer.zero_grad()
        losses.append(run_stage(part, schedule(wire.rank, wire.world, n_micro), ids, targets, wire))
        norms.append(norm_of_parts(own, [], wire))
        clipped(part.parameters(), norms[-1])
        optimizer.step()
    assert held[0] == 5*n_micro
    return losses, part.state_dict(), norms


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
def test_pipelines_equal_one_process(two, four, schedule):
    assert_same(two(pipeline, schedule, 4))
    assert_same(four(pipeline, schedule, 2))
    assert_same(run_ranks(pipeline, 3, schedule, 4)) # blocks 1, 1, 2
    assert_same(run_ranks(pipeline, 1, schedule, 2))


# --- long texts ---------------------------------------------------------------------------------------------------

def sequence(mix):
    wire = Wire()
    model = sequence_parallel(fresh(), wire, 24, mix)
    optimizer, gradients, losses, norms = adamw(model.parameters()), BucketedGradients(model, wire), [], []
    for step in range(5):
        ids, targets = (x.chunk(wire.world, 1)[wire.rank] for x in batch(step))
        optimizer.zero_grad()
        loss = share_of_loss(model, ids, targets, count_targets(targets, wire))
        loss.backward()
        gradients.finish()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), .7).item())
        optimizer.step()
        losses.append(wire.total(loss.item()))
    return losses, model.state_dict(), norms


@pytest.mark.parametrize("mix", [ulysses_attend, ring_attend])
def test_sequence_parallel_equals_one_process(two, four, mix):
    for pool in (two, four): assert_same(pool(sequence, mix))


def test_attention_over_three_ranks_with_great_scores_and_few_heads():
    "Ring attention spreads one key-value head over three ranks; scores that overflow a plain exponential do not harm it."
    def attended(q, k, v):
        wire = Wire()
        mine = [x.chunk(3, 2)[wire.rank].clone().requires_grad_() for x in (q, k, v)]
        out = ring_attend(*mine, wire=wire)
        out.square().sum().backward()
        return out.detach(), [x.grad for x in mine]
    q, k, v = (torch.randn(2, h, 12, 4)*s for h, s in ((4, 20.), (1, 20.), (1, 1.)))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = fused_attend(*whole)
    expected.square().sum().backward()
    results = run_ranks(attended, 3, q, k, v)
    assert_close(torch.cat([out for out, _ in results], 2), expected.detach(), atol=1e-5, rtol=1e-4)
    for i in range(3): assert_close(torch.cat([grads[i] for _, grads in results], 2), whole[i].grad, atol=1e-3, rtol=1e-3)


# --- both at once -------------------------------------------------------------------------------------------------

def both():
    outer, inner = grid(2)
    model = tensor_parallel(fresh(), inner)
    optimizer, gradients, losses, norms = adamw(model.parameters()), BucketedGradients(model, outer, 2000), [], []
    parts = [[p for name, p in model.named_parameters() if (cut_axis(name) is None) is whole] for whole in (False, True)]
    for step in range(5):
        ids, targets = (x.chunk(outer.world)[outer.rank] for x in batch(step))
        optimizer.zero_grad()
        loss = vocab_nats(model(ids), targets, model.embed_tokens.first, inner) / count_targets(targets, outer)
        loss.backward()
        gradients.finish()
        norms.append(norm_of_parts(*parts, inner))
        clipped(model.parameters(), norms[-1])
        optimizer.step()
        losses.append(outer.total(loss.item()))
    return losses, whole_state(model, inner), norms, (outer.rank, inner.rank)


def test_data_and_tensor_parallel_on_a_grid(four):
    results = four(both)
    assert [r[3] for r in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert_same([r[:3] for r in results])


# --- the benchmark ------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores that can be asked for")
def test_one_command_one_table_of_scaling():
    "The ways agree on the losses, or the script stops; nobody looks at the clock."
    done = subprocess.run([sys.executable, ROOT/"benchmarks"/"scaling.py", "--tiny", "--rounds", "1", "--steps", "1"], capture_output=True, text=True, encoding="utf-8", timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert rows == ["one process, one core", "two, without a word", "two, our buckets", "two, torch DDP", "two, one all-reduce at the end"]

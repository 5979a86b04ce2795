"Rows of whole documents, attention that stays within them, and batches that any process can compute: laws beyond those of chapter 04d."
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.packing import PackedBatches, Paired, Piece, Separately, WithinDocuments, best_fit, cut_documents, document_starts
from llm_scratch.pretraining import Batches, TrainState, add_gradients, make_optimizers, train
from llm_scratch.tokenization import Shards, write_shards

ROOT = Path(__file__).resolve().parent.parent
EOT = 30
texts = st.lists(st.lists(st.integers(0, 29), max_size=25), min_size=1, max_size=12)
CFG = ModelConfig(vocab_size=31, context_len=24, n_layers=2, n_heads=2, n_kv_heads=1, d_model=16, d_ff=16, d_head=8)


def row_of(docs): return np.array([i for d in docs for i in (EOT, *d)], dtype=np.uint16)


def wide(seed=0):
    rng = torch.Generator().manual_seed(seed)
    model = Decoder(CFG)
    for p in model.parameters(): p.data = .4*torch.randn(p.shape, generator=rng)
    return model


# --- cutting and fitting --------------------------------------------------------------------------------------------

@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 12))
def test_pieces_tile_every_document(lengths, T):
    pieces = cut_documents(lengths, T)
    for doc, n in enumerate(lengths):
        mine = [p for p in pieces if p.doc == doc]
        assert [i for p in mine for i in range(p.start, p.stop)] == list(range(n))
        assert all(0 < p.stop-p.start <= T for p in mine) and len(mine) == -(-n//T)
    assert pieces == sorted(pieces)


@given(st.lists(st.integers(1, 16), max_size=40))
def test_best_fit_places_each_piece_once_and_leaves_no_two_rows_that_would_be_one(sizes):
    rows = best_fit(sizes, 16)
    assert sorted(i for r in rows for i in r) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in r) for r in rows]
    assert max(filled, default=0) <= 16
    assert sum(f <= 8 for f in filled) <= 1  # two half-empty rows: the later one's first piece would have gone into the other


@pytest.mark.parametrize("sizes, rows", [([5, 3, 8], [[2], [0, 1]]), ([4, 6, 2, 4], [[1, 2], [0, 3]]), ([3, 5, 6, 2], [[2, 3], [1, 0]]), ([1]*9, [[*range(8)], [8]]), ([], [])])
def test_best_fit_by_hand(sizes, rows): assert best_fit(sizes, 8) == rows


@given(st.lists(st.integers(1, 16), max_size=30))
def test_the_fullest_row_with_room_is_taken(sizes):
    "Against looking at every row: as full after each piece, wherever ties fell."
    rows = []
    for n in sorted(sizes, reverse=True):
        fits = [r for r in rows if sum(r) + n <= 16]
        (max(fits, key=sum) if fits else rows.append([]) or rows[-1]).append(n)
    assert sorted(sum(r) for r in rows) == sorted(sum(sizes[i] for i in r) for r in best_fit(sizes, 16))


def test_a_row_holds_at_least_one_id():
    with pytest.raises(ValueError, match="context_len=0 holds nothing"): cut_documents([3], 0)


@pytest.mark.parametrize("bad", [0, 9, -1])
def test_a_piece_that_does_not_fit_is_named(bad):
    with pytest.raises(ValueError, match=f"a piece of {bad} does not fit into a row of 8"): best_fit([3, bad], 8)


def test_numpy_lengths_pack_long_rows():
    "Numbers of NumPy's own types would overflow where rows are longer than 63."
    n = np.array([100, 300, 50, 50, 200])
    assert [len(r) for r in best_fit([p.stop-p.start for p in cut_documents(n, 300)], 300)] == [1, 2, 2]
    assert len(best_fit(n, 300)) == 3


# --- batches --------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(texts, st.integers(2, 16), st.booleans())
def test_a_packed_epoch_is_the_corpus(docs, T, ends):
    row = row_of(docs)
    starts = document_starts(row, EOT)
    assert len(starts) == len(docs)
    batches = PackedBatches(row, starts, T, 1, EOT, ends=ends)
    n_ids = n_last = 0
    seen = []
    for i in range(len(batches.rows)):
        ids, targets, numbers = (x[0].tolist() for x in batches[i])
        pieces = batches.rows[np.random.default_rng((0, 0)).permutation(len(batches.rows))[i]]
        at = 0
        for k, p in enumerate(pieces):
            doc, n = [EOT, *docs[p.doc]], p.stop-p.start
            assert ids[at:at+n] == doc[p.start:p.stop] and numbers[at:at+n] == [k]*n
            assert targets[at:at+n] == [*doc, EOT if ends else -1][p.start+1:p.stop+1]
            n_last += p.stop == len(doc)
            seen.append(p)
            at += n
        n_ids += at
        assert ids[at:] == [EOT]*(T-at) and targets[at:] == [-1]*(T-at) == numbers[at:]
    assert n_ids == len(row) and n_last == len(docs) and sorted(seen) == cut_documents([len(d)+1 for d in docs], T)


@settings(max_examples=30, deadline=None)
@given(texts, st.integers(1, 5), st.integers(1, 3), st.integers(0, 40))
def test_ranks_together_are_one_process(docs, world, B, step):
    row = row_of(docs)
    make = lambda B, **kw: PackedBatches(row, document_starts(row, EOT), 8, B, EOT, seed=2, **kw)
    for parts, whole in zip(zip(*(make(B, rank=r, world=world)[step] for r in range(world))), make(world*B)[step], strict=True): assert torch.equal(torch.cat(parts), whole)
    if len(row) >= 16:
        windows = lambda B, **kw: Batches(row, 8, B, seed=2, **kw)
        for parts, whole in zip(zip(*(windows(B, rank=r, world=world)[step] for r in range(world))), windows(world*B)[step], strict=True): assert torch.equal(torch.cat(parts), whole)


def test_epochs_are_shuffled_and_each_is_whole():
    row = row_of([[i]*6 for i in range(20)])
    batches = PackedBatches(row, document_starts(row, EOT), 7, 4, EOT)
    epochs = [[r for i in range(5) for r in batches[5*e+i][0].tolist()] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] and sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert not torch.equal(batches[0][0], PackedBatches(row, document_starts(row, EOT), 7, 4, EOT, seed=1)[0][0])


@pytest.mark.parametrize("make", [lambda row, **kw: Batches(row, 8, 2, **kw), lambda row, **kw: PackedBatches(row, document_starts(row, EOT), 8, 2, EOT, **kw)], ids=["windows", "packed"])
@pytest.mark.parametrize("rank, world", [(1, 1), (-1, 2), (3, 2), (0, 0)])
def test_a_rank_out_of_range_is_named(make, rank, world):
    with pytest.raises(ValueError, match=f"rank={rank} is not below world={world}"): make(row_of([[1]*40]), rank=rank, world=world)


def test_one_process_has_the_windows_that_it_always_had():
    "The digest of batches as they were before there were ranks."
    batches = Batches(np.arange(1000), 16, 4, seed=7)
    at = [batches[step][0][:, 0].tolist() for step in (0, 3, 40)]
    order = lambda epoch: (lambda rng: (int(rng.integers(16)), rng.permutation(61)))(np.random.default_rng((7, epoch)))
    for step, firsts in zip((0, 3, 40), at):
        wanted = [(start := order(i//61))[0] + 16*int(start[1][i % 61]) for i in range(4*step, 4*step+4)]
        assert firsts == wanted


def test_shards_give_what_memory_gives(tmp_path):
    docs = [list(range(n % 29)) for n in range(1, 60)]
    shards = Shards(write_shards(docs, tmp_path/"shards", EOT, 31, "digest", shard_tokens=50))  # documents cross the borders of files
    row = row_of(docs)
    for a, b in zip(PackedBatches(shards, document_starts(shards, EOT), 20, 5, EOT)[9], PackedBatches(row, document_starts(row, EOT), 20, 5, EOT)[9], strict=True): assert torch.equal(a, b)


def test_another_process_computes_the_same_batch():
    code = ("import numpy as np\nfrom llm_scratch.packing import *\nrow = np.array([0 if i % 7 == 0 else i % 30 for i in range(500)])\n"
            "b = PackedBatches(row, document_starts(row, 0), 16, 3, 0, seed=4, rank=1, world=2)\nprint([x.tolist() for x in b[77]])")
    scope = {}
    exec(code.replace("print(", "out = str("), scope)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == scope["out"]


# --- attention ------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), st.integers(0, 100))
def test_packed_is_alone(lengths, seed):
    model, rng = wide(seed), torch.Generator().manual_seed(seed)
    lengths = [n for i, n in enumerate(lengths) if sum(lengths[:i+1]) <= 24] or [5]
    docs = [torch.randint(31, (1, n), generator=rng) for n in lengths]
    numbers = torch.tensor([[k for k, n in enumerate(lengths) for _ in range(n)]])
    with torch.no_grad(): assert_close(model(torch.cat(docs, 1), WithinDocuments(numbers)), torch.cat([model(d) for d in docs], 1), atol=2e-5, rtol=2e-5)


def test_nothing_leaks_and_the_future_stays_hidden():
    model, numbers = wide(), torch.tensor([[0]*4 + [1]*5 + [-1]*3, [0]*12])
    ids = torch.arange(24).view(2, 12)
    before = model(ids, WithinDocuments(numbers))
    for at in range(12):
        changed = ids.clone()
        changed[:, at] = 29
        moved = (model(changed, WithinDocuments(numbers)) - before).abs().amax(-1) > 1e-6
        assert torch.equal(moved, (numbers == numbers[:, at:at+1]) & (torch.arange(12) >= at))


def test_places_begin_anew_with_each_document():
    numbers = torch.tensor([[0, 0, 1, 1, 1, 2, -1, -1], [0]*8])
    assert WithinDocuments(numbers).places(8).tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [*range(8)]]


def test_the_role_of_a_cache_counts_nothing():
    within = WithinDocuments(torch.zeros(1, 4, dtype=torch.int64))
    within.past += 4
    assert within.past == 0


def test_training_apart_is_training_on_each_document():
    "One row of three documents has the gradients of three rows of one, also in pieces of a batch."
    docs = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]
    row = row_of(docs)
    packed = PackedBatches(row, document_starts(row, EOT), 13, 2, EOT, ends=False)
    assert len(packed.rows) == 1
    both, targets = Paired(packed)[0]
    model = wide()
    loss, n = add_gradients(Separately(model), both, targets, n_micro=2)
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = sum(F.cross_entropy(model(torch.tensor([[EOT, *d[:-1]]]))[0], torch.tensor(d), reduction="sum") for d in docs)/10
    alone.backward()
    assert n == 20 and loss == pytest.approx(alone.item(), rel=1e-5)
    for a, p in zip(grads, model.parameters(), strict=True): assert_close(a, p.grad, atol=1e-6, rtol=1e-4)


def test_the_loop_of_chapter_06_runs_on_packed_rows():
    row = row_of([[i % 29 for i in range(n)] for n in range(3, 40)])
    torch.manual_seed(0)
    model = Decoder(CFG)
    steps = list(train(TrainState(Separately(model), make_optimizers(Separately(model))), Paired(PackedBatches(row, document_starts(row, EOT), 24, 8, EOT)), lambda step: 1., 30))
    assert steps[-1].loss < .6*steps[0].loss and {name.split(".")[0] for name in model.state_dict()} == {"embed_tokens", "layers", "norm"}


def test_a_piece_knows_where_it_is_from(): assert Piece(3, 8, 9) == (3, 8, 9)

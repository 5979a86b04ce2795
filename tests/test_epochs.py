"Text that is read again: updates of an epoch, what is known by heart, canaries, when to stop, and the script that recorded it all."
import json
import math
import sys
from dataclasses import asdict
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.checkpointing import latest, saved
from llm_scratch.epochs import EarlyStop, exposure, first_slip, planted, steps_of, verbatim, worth_in_fresh
from llm_scratch.pretraining import Batches, TrainState, load_checkpoint, make_optimizers, save_checkpoint, train

SCRIPT = Path(__file__).resolve().parent.parent/"benchmarks"/"epochs.py"
some = partial(settings, max_examples=60, deadline=None)
losses = st.lists(st.floats(.5, 5), min_size=1, max_size=30)


# --- epochs and fresh text ------------------------------------------------------------------------------------------

def test_an_epoch_reads_every_window_once():
    batches = Batches(np.arange(17*4), 4, 4, seed=3)  # 16 windows
    n = steps_of(1, batches.n_windows, 4)
    assert n == 4 and steps_of(2.5, 16, 4) == 10 and steps_of(1, 16, 3) == 5 and steps_of(7, 256, 8) == 224
    firsts = [int(row[0])//4 for step in range(n) for row in batches[step][0]]
    assert sorted(firsts) == list(range(16))
    with pytest.raises(ValueError, match="give at least 0.25 epochs"): steps_of(.1, 16, 4)


def test_worth_in_fresh_is_the_inverse_of_the_curve():
    fresh, curve = [100, 200, 400, 800], [4., 3.5, 3.2, 3.1]
    for n, x in zip(fresh, curve): assert_close(worth_in_fresh(x, fresh, curve), float(n))
    assert_close(worth_in_fresh(3.35, fresh, curve), 200*2**.5)  # halfway on the axis of logarithms
    assert worth_in_fresh(3.09, fresh, curve) == math.inf and worth_in_fresh(9., fresh, curve) == pytest.approx(100)
    for wrong in (([100, 200], curve), (fresh, [4., 3.5, 3.5, 3.1]), ([100, 300, 300, 800], curve)):
        with pytest.raises(ValueError, match="as many of both"): worth_in_fresh(3.3, *wrong)


# --- by heart -------------------------------------------------------------------------------------------------------

class Parrot(torch.nn.Module):
    "Says the id after the one it read, but 0 after a 6."
    cfg = ModelConfig(vocab_size=12, context_len=32, n_layers=1, n_heads=1, n_kv_heads=1, d_model=4, d_ff=4, d_head=4)

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.sizes = torch.nn.Embedding(12, 4), []

    def forward(self, ids, cache=None):
        self.sizes.append(len(ids))
        if cache is not None: cache.past += ids.shape[1]
        return torch.nn.functional.one_hot(torch.where(ids == 6, 0, (ids + 1) % 12), 12).float()


def test_verbatim_by_hand():
    docs = [[1, 2, 3, 4, 5], [9, 9, 4, 5, 6, 7, 8], [3, 4, 5, 7, 8], [4, 5, 6, 0, 1]]
    same = verbatim(Parrot(), docs, 2, 3)
    want = [[1, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 1]]
    want[1] = [False, False, False]  # it goes on from the 9: 10, 11, 0
    want[2] = [True, False, False]  # 5, then 6 and 0 from its own words, not from the 7
    assert same.tolist() == np.array(want, dtype=bool).tolist() and same.dtype == bool and same.shape == (4, 3)
    assert first_slip(same).tolist() == [3, 0, 1, 3]
    assert first_slip(np.array([[True, False, True], [False, True, True]])).tolist() == [1, 0]
    assert verbatim(Parrot(), docs, 1, 2, start=2).tolist() == [[True, True], [True, True], [False, False], [True, True]]


def test_verbatim_goes_by_batches_and_says_what_is_too_short():
    model = Parrot()
    assert verbatim(model, [[1, 2, 3]]*5, 1, 2, batch_size=2).all() and set(model.sizes) == {2, 1}
    with pytest.raises(ValueError, match=r"of 2 documents the shortest has 3 ids, and 1\+2\+1 are 4"): verbatim(model, [[1, 2, 3, 4], [1, 2, 3]], 2, 1, start=1)
    with pytest.raises(ValueError, match="of 0 documents"): verbatim(model, [], 2, 1)
    for sizes in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match="the others from 1"): verbatim(model, [[1, 2, 3, 4]], *sizes)
    with pytest.raises(ValueError, match="the start is from 0"): verbatim(model, [[1, 2, 3, 4]], 1, 1, start=-2)


def test_a_model_recites_what_it_has_read_often_and_nothing_else():
    rng = np.random.default_rng(0)
    docs, strangers = (rng.integers(1, 40, (6, 33)).tolist() for _ in range(2))
    cfg = ModelConfig(vocab_size=40, context_len=32, n_layers=1, n_heads=2, n_kv_heads=2, d_model=32, d_ff=64, d_head=16)
    model = init_weights(Decoder(cfg), 0)
    rows = torch.tensor(docs)
    class Same:
        def __getitem__(self, step): return rows[:,:-1], rows[:,1:]
    for _ in train(TrainState(model, make_optimizers(model)), Same(), lambda step: 1., 60): pass
    assert verbatim(model, docs, 8, 16).mean() > .9 and verbatim(model, strangers, 8, 16).mean() < .2


# --- canaries -------------------------------------------------------------------------------------------------------

@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(0, 6), st.integers(0, 99))
@some()
def test_planted_keeps_the_documents_and_hides_every_copy(copies, n_docs, seed):
    docs, canaries = [[i, i] for i in range(n_docs)], [[100+i] for i in range(len(copies))]
    mixed = planted(docs, canaries, copies, seed)
    assert [d for d in mixed if len(d) == 2] == docs
    assert sorted(d[0] for d in mixed if len(d) == 1) == [100+i for i, n in enumerate(copies) for _ in range(n)]
    assert mixed == planted(docs, canaries, copies, seed)


def test_canaries_may_lie_anywhere():
    docs = [[i] for i in range(3)]
    places = {planted(docs, [[9]], [1], seed).index([9]) for seed in range(60)}
    assert places == {0, 1, 2, 3}
    firsts = {tuple(c[0] for c in planted([], [[8], [9]], [1, 1], seed)) for seed in range(30)}
    assert firsts == {(8, 9), (9, 8)}  # in one place, in any order
    with pytest.raises(ValueError): planted(docs, [[9]], [1, 2])


def test_exposure_by_hand():
    assert exposure(1., [2., 3., 4.]) == 2 and exposure(2.5, [2., 3., 4.]) == 1 and exposure(9., [2., 3., 4.]) == 0
    assert exposure(2., [2., 3., 4.]) == 1  # a tie is no find
    assert exposure(3.5, [4., 2., 3.]) == math.log2(4/3)  # in any order
    with pytest.raises(ValueError, match="at least 1"): exposure(1., [])
    rng = np.random.default_rng(0)
    chance = [exposure(rng.random(), rng.random(255)) for _ in range(3000)]
    assert abs(np.mean(chance) - 1/math.log(2)) < .1


# --- when to stop ---------------------------------------------------------------------------------------------------

def judged(stop, seen, stderr=0.):
    for step, loss in enumerate(seen): stop = stop.judge(step, loss, stderr)
    return stop


def test_early_stop_by_hand():
    stop = judged(EarlyStop(patience=2), [3., 2.5, 2.6, 2.4, 2.4])
    assert (stop.best, stop.best_step, stop.mark, stop.waited, stop.last, stop.is_over) == (2.4, 3, 2.4, 1, 4, False)
    over = stop.judge(5, 2.41)
    assert over.is_over and not stop.is_over and over.best_step == 3
    assert over.judge(6, 2.).waited == 0  # a gain begins anew


def test_small_gains_are_kept_and_add_up():
    stop = judged(EarlyStop(patience=3, min_delta=.1), [3., 2.95, 2.92])
    assert (stop.best, stop.best_step, stop.mark, stop.waited) == (2.92, 2, 3., 2)
    assert stop.judge(3, 2.89).waited == 0 and stop.judge(3, 2.91).is_over
    assert judged(EarlyStop(1, min_delta=.5), [3., 2.5]).is_over  # just as much is not more


def test_what_may_be_noise_counts_neither_way():
    stop = judged(EarlyStop(patience=1), [3.])
    assert stop.judge(1, 3.1, stderr=.06).waited == 0 and stop.judge(1, 3.1, stderr=.04).is_over
    near = stop.judge(1, 3.1, stderr=.06)
    assert near.mark == 3. and near.judge(2, 2.99, stderr=.06).mark == 2.99  # lower is a gain, however little
    assert EarlyStop(1, min_delta=.2, mark=3.).judge(1, 2.9, stderr=.04).is_over  # surely less than was asked for


def test_the_state_is_plain_whatever_was_given():
    stop = EarlyStop(2)
    for step, loss in enumerate((3., 2., 2.5)): stop = stop.judge(np.int64(step), np.float32(loss), np.float64(.1))
    assert json.loads(json.dumps(asdict(stop))) == asdict(stop) and stop.waited == 1
    assert judged(EarlyStop(2), [torch.tensor(3.), torch.tensor(2.)]).best == 2


@given(losses, st.integers(1, 4), st.floats(0, .5), st.floats(0, .2))
@some()
def test_laws_of_stopping(seen, patience, min_delta, stderr):
    stop = EarlyStop(patience, min_delta)
    for step, loss in enumerate(seen):
        new = stop.judge(step, loss, stderr)
        assert 0 <= new.waited <= stop.waited + 1 and new.mark <= stop.mark
        stop = new
    assert stop.best == min(seen) and stop.best_step == seen.index(min(seen)) and stop.mark <= stop.best + min_delta + 1e-9
    assert EarlyStop(**json.loads(json.dumps(asdict(stop)))) == stop
    assert stop.judge(len(seen)-1, .1) == stop  # a look that was judged is not judged again
    sure = judged(EarlyStop(patience, min_delta), seen)
    assert stop.waited <= sure.waited and stop.mark == sure.mark  # doubt makes patient, and changes nothing else


def test_early_stop_refuses_what_makes_no_sense():
    for wrong in (dict(patience=0), dict(min_delta=-.1), dict(min_delta=math.inf), dict(min_delta=math.nan)):
        with pytest.raises(ValueError, match="patience is at least 1, min_delta at least 0"): EarlyStop(**wrong)
    for loss, stderr in ((math.nan, 0.), (math.inf, 0.), (3., -1.), (3., math.nan), (3., math.inf)):
        with pytest.raises(ValueError, match="at step 7 is no measurement"): EarlyStop().judge(7, loss, stderr)


def test_keep_is_the_best_and_the_last(): assert EarlyStop(best_step=4).keep([2, 4, 6, 8]) == {4, 8}


def test_the_best_and_the_last_checkpoint_stay_and_a_killed_run_ends_the_same(tmp_path):
    cfg = ModelConfig(vocab_size=8, context_len=8, n_layers=1, n_heads=1, n_kv_heads=1, d_model=8, d_ff=8, d_head=8)
    row = np.random.default_rng(0).integers(8, size=200)
    curve = {2: 3., 4: 2., 6: 2.5, 8: 2.2, 10: 1.9, 12: 2.4, 14: 2.1, 16: 2.}  # what validation will say

    def run(folder, kill_at=None):
        model = init_weights(Decoder(cfg), 0)
        state, stop = TrainState(model, make_optimizers(model)), EarlyStop(patience=3)
        if path := latest(folder):
            load_checkpoint(state, path, {})
            stop = EarlyStop(**json.loads((folder/"stop.json").read_text()))
        for step in train(state, Batches(row, 8, 2), lambda step: 1., 16):
            if step.n % 2: continue
            stop = stop.judge(step.n, curve[step.n])
            (folder/"stop.json").write_text(json.dumps(asdict(stop)))
            if step.n == kill_at: return None
            save_checkpoint(state, folder, {}, keep=stop.keep)
            if stop.is_over: break
        return stop, sorted(saved(folder)), [p.detach().clone() for p in model.parameters()]

    (tmp_path/"whole").mkdir()
    stop, kept, weights = run(tmp_path/"whole")
    assert kept == [10, 16] and stop.best_step == 10 and stop.is_over
    for kill_at in (4, 10, 12, 16):  # after a look was noted and before its checkpoint was
        folder = tmp_path/f"killed at {kill_at}"
        folder.mkdir()
        assert run(folder, kill_at) is None
        again, kept_again, weights_again = run(folder)
        assert (again, kept_again) == (stop, kept)
        assert_close(weights_again, weights, rtol=0, atol=0)


# --- the script -----------------------------------------------------------------------------------------------------

@pytest.fixture
def script(monkeypatch):
    spec = spec_from_file_location("benchmarks_epochs", SCRIPT)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    words = "the cook stirs a hot soup and then rests while salt and pepper wait for their turn in the pan".split()
    rng = __import__("random").Random(0)
    docs = [type("Doc", (), dict(text=f"# Soup {i}\n\n" + " ".join(rng.choices(words, k=rng.randint(40, 120))) + ". 0123456789\n")) for i in range(200)]
    monkeypatch.setattr(module, "read_source", lambda name: docs)
    monkeypatch.setattr(module, "V", 290)
    monkeypatch.setattr(module, "N_OTHERS", 15)
    monkeypatch.setattr(module, "SIZES", {D: module.ModelConfig(vocab_size=290, context_len=64, n_layers=1, n_heads=1, n_kv_heads=1, d_model=8, d_ff=8, d_head=8) for D in module.SIZES})
    plan = module.plan
    monkeypatch.setattr(module, "plan", lambda small, large: [w for w in plan(small, large) if (w["kind"], w["epochs"]) in {("repeat", 7), ("fresh", 1), ("dropout", 7), ("long", 20)}])
    yield module
    del sys.modules[spec.name]


def test_the_script_records_and_goes_on(script, tmp_path, capsys):
    out = tmp_path/"epochs.json"
    script.main(["--tiny", "--out", str(out)])
    record = json.loads(out.read_text())
    runs = record["runs"]
    assert {r["seed"] for r in runs} == {0, 1} and len({(r["seed"], *script.key(r)) for r in runs}) == len(runs)
    for r in runs:
        assert r["n_steps"] > r["epochs"]*r["windows"]//4 if r["kind"] == "long" else r["n_steps"] == r["epochs"]*r["windows"]//4  # canaries make a corpus longer
        assert r["looks"][-1]["epoch"] == r["epochs"] and "train" in r["looks"][-1] and "recited" in r["looks"][-1]
    long = next(r for r in runs if r["kind"] == "long")
    assert [look["epoch"] for look in long["looks"]] == list(range(1, 21))
    assert set(long["looks"][-1]["exposure"]) == {"0", "1", "4", "16"} and all(len(x) == 3 and 0 <= min(x) <= max(x) <= 4 for x in long["looks"][-1]["exposure"].values())
    assert long["looks"][0]["stderr_to_best"] == 0 < long["looks"][0]["stderr"] and set(long["looks"][-1]["recited"]) == {"8", "16", "32", "48"}
    assert [look["epoch"] for look in next(r for r in runs if script.key(r) == ("repeat", 64, 4, 7))["looks"]] == list(range(1, 8))
    assert "| fresh | 64 | 8 | 1 |" in capsys.readouterr().out
    first = runs.pop(0)
    out.write_text(json.dumps(record))
    script.main(["--tiny", "--out", str(out)])
    again = json.loads(out.read_text())["runs"]
    assert again[:-1] == runs and again[-1] | dict(seconds=0) == first | dict(seconds=0)  # the missing row alone was run, and is what it was
    with pytest.raises(SystemExit): script.main(["--out", str(out)])


def test_dropout_acts_in_training_only(script):
    model = init_weights(Decoder(script.SIZES[64]), 0)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        plain = model(ids)
        script.drop_out(model, .5)
        assert not torch.equal(model(ids), plain)
        model.eval()
        assert_close(model(ids), plain)


def test_canaries_differ_in_their_code_alone(script):
    from llm_scratch.tokenization import train_bpe
    tok = train_bpe(["the safe of this kitchen opens with 0 1 2 3 4 5 6 7 8 9"], 270)
    a, b = script.codes(tok, 2, np.random.default_rng(0))
    assert len(a) == len(b) and a[0] == tok.eot_id and sum(x != y for x, y in zip(a, b)) >= 4
    assert tok.decode(a[1:]).startswith(script.FORM) and tok.decode(a[1:]).removeprefix(script.FORM)[:8].isdecimal()

"New text for an old model: what the door lets in, batches that replay, a training that survives kills, and a pedigree that notices every change."
import json
import os
import random
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.core import UserError
from llm_scratch.data import Document, tiny_corpus, to_dataset
from llm_scratch.pretraining import Batches, TrainState, load_checkpoint, make_adamw, make_optimizers
from llm_scratch.refresh import Lineage, ReplayBatches, check_lineage, continue_training, copies_of, domain_bits, recall_means, refresh_documents, windows_before
from llm_scratch.tokenization import Shards, train_bpe, write_shards

ROOT = Path(__file__).resolve().parent.parent
CFG = ModelConfig(vocab_size=200, context_len=16, n_layers=1, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, d_head=8)
OLD, NEW = (np.random.default_rng(0).integers(a, a+90, 900) for a in (0, 100))


# --- the door ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def old(): return tiny_corpus()


def docs_of(texts): return [Document(t, "mail", f"mail/{i}", {}) for i, t in enumerate(texts)]


WORDS = "oven bread flour water salt sugar bake stir mix bowl heat oil pan dish serve warm cold cup spoon knife table plate fork".split()


@pytest.mark.parametrize("seed", range(4))
def test_every_document_is_in_one_line_of_the_ledger(old, seed):
    rng = random.Random(seed)
    fresh = [" ".join(rng.choices(WORDS, k=30)) for _ in range(6)]
    quote = " ".join(rng.choices(WORDS, k=20))
    copies = [t.upper() for t in rng.sample(old["text"][:], 3)]
    near = [t + "Enjoy it." for t in rng.sample(old["text"][:], 2)]
    came = [*fresh, *copies, *near, fresh[0], f"We were asked: {quote} and more", " \n"]
    rng.shuffle(came)
    r = refresh_documents(docs_of(came), old, keep_out={"exam": [quote]})
    assert list(r.ledger)[0] == "came" and list(r.ledger)[-1] == "kept"
    assert r.ledger["came"] == len(came) == sum(n for line, n in r.ledger.items() if line != "came")
    assert sorted(r.kept["text"]) == sorted(fresh) and r.report.total("write", "out").n_docs == len(fresh)
    assert r.ledger["Decontaminate: quotes exam"] == 1 and r.ledger["duplicates: equal to an earlier new one"] == 1
    assert r.ledger["duplicates: equal to an old document"] + r.ledger["duplicates: nearly equal to an old document"] == 5
    assert refresh_documents(docs_of(fresh), r.kept).kept.num_rows == 0  # what was kept is old from now on


def test_nothing_new_is_no_mistake(old):
    r = refresh_documents([], old)
    assert (r.kept.num_rows, r.ledger) == (0, dict(came=0, kept=0))
    assert refresh_documents(docs_of(["one text"]), to_dataset([])).kept["text"][:] == ["one text"]


def test_personal_data_goes_last_and_is_counted_as_changed(old):
    letter = "Ask bob@example.org"
    assert refresh_documents(docs_of([letter]), to_dataset(docs_of([letter]))).kept.num_rows == 0  # found as a copy, with its address
    r = refresh_documents(docs_of([letter]), old)
    assert r.kept["text"][:] == ["Ask [EMAIL]"] and r.report.total("RedactPII", "changed").n_docs == 1
    assert json.loads(r.kept["meta"][0])["pii"] == {"email": 1}


def test_own_stages_take_the_place_of_the_usual_ones(old):
    def loud(doc): return doc._replace(text=doc.text.upper())
    assert refresh_documents(docs_of(["a  b"]), old, stages=[loud]).kept["text"][:] == ["A  B"]


def test_a_chain_of_copies_belongs_to_the_old_one():
    base = " ".join(f"word{i}" for i in range(200))
    further = base + " " + " ".join(f"more{i}" for i in range(12))
    assert copies_of([base, further], [base]) == ["equal to an old document", "nearly equal to an old document"]


# --- batches ----------------------------------------------------------------------------------------------------------

def test_shares_are_exact_at_every_moment():
    rng = random.Random(0)
    for share in [0, 1, 1/3, .1, .7, *(rng.random() for _ in range(20))]:
        counts = [windows_before(i, share) for i in range(400)]
        assert all(abs(n - i*share) < 1+1e-3 for i, n in enumerate(counts)) and set(np.diff(counts)) <= {0, 1}


@pytest.mark.parametrize("share", [.25, .5, .9])
def test_windows_are_those_of_batches_and_each_is_read_once_an_epoch(share):
    rb = ReplayBatches(OLD, NEW, share, 16, 4, seed=3)
    rows = torch.cat([rb[s][0] for s in range(80)])
    is_new = rows[:, 0] >= 100
    assert ((rows >= 100) == is_new[:, None]).all()  # no window is of both
    for row, some in ((OLD, rows[~is_new]), (NEW, rows[is_new])):
        alone = torch.cat([Batches(row, 16, 1, 3)[i][0] for i in range(len(some))])
        assert_close(some, alone)
    assert is_new.sum() == windows_before(320, share)
    n = [int((~is_new).sum()), int(is_new.sum())]
    assert rb.epochs(80) == pytest.approx([k/Batches(row, 16, 1).n_windows for k, row in zip(n, (OLD, NEW))])


def test_ranks_share_a_batch():
    whole = ReplayBatches(OLD, NEW, .3, 16, 6)
    for step in (0, 11):
        parts = [ReplayBatches(OLD, NEW, .3, 16, 2, rank=r, world=3)[step] for r in range(3)]
        for k in range(2): assert_close(torch.cat([p[k] for p in parts]), whole[step][k])


def test_shards_of_two_tokenizers_do_not_mix(tmp_path):
    for name, digest in (("a", "one"), ("b", "two"), ("c", "one")): write_shards([range(60)], tmp_path/name, 0, 200, digest)
    a, b, c = (Shards(tmp_path/name) for name in "abc")
    with pytest.raises(UserError, match="two tokenizers"): ReplayBatches(a, b, .5, 16, 2)
    assert ReplayBatches(a, c, .5, 16, 2)[0][0].shape == (2, 16)
    assert ReplayBatches(a, b[:], 0, 16, 2)[0][0].shape == (2, 16)  # bare ids say nothing of their tokenizer


@pytest.mark.parametrize("given, said", [(dict(share_new=1.5), "no share"), (dict(rank=2, world=2), "not below world"), (dict(new=NEW[:20]), "fewer than"), (dict(batch_size=2, context_len=0), "start at 1")])
def test_what_makes_no_batches(given, said):
    with pytest.raises(ValueError, match=said): ReplayBatches(**dict(old=OLD, new=NEW, share_new=.5, context_len=16, batch_size=4) | given)


# --- training goes on -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def base(): return init_weights(Decoder(CFG), 0).eval()


@pytest.fixture(scope="module")
def batches(): return ReplayBatches(OLD, NEW, .5, 16, 4)


@pytest.fixture(scope="module")
def unbroken(base, batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return continue_training(base, batches, n_steps=8, folder=folder, save_every=4), folder


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_given_model_is_left_alone(base, batches):
    before = deepcopy(base.state_dict())
    new = continue_training(base, batches, n_steps=3)
    assert all(torch.equal(before[k], x) for k, x in base.state_dict().items()) and not same(base, new)
    assert not new.training and not any("forward" in vars(m) for m in new.modules())  # the quick parts are gone


KILLED = """
import os, sys
import numpy as np
from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.refresh import ReplayBatches, continue_training
sys.path.insert(0, {tests!r})
from test_refresh import CFG, NEW, OLD
def watch(steps):
    for step in steps:
        if step.n == 5: os._exit(9) # nobody is told, nothing is cleaned up
        yield step
continue_training(init_weights(Decoder(CFG), 0).eval(), ReplayBatches(OLD, NEW, .5, 16, 4), n_steps=8, folder={folder!r}, save_every=2, watch=watch)
"""


def test_killed_and_resumed_equals_unbroken(base, batches, unbroken, tmp_path):
    code = KILLED.format(tests=str(ROOT/"tests"), folder=str(tmp_path/"run"))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 9, done.stderr
    seen = []
    def watch(steps):
        for step in steps:
            seen.append(step.n)
            yield step
    assert same(continue_training(base, batches, n_steps=8, folder=tmp_path/"run", save_every=2, watch=watch), unbroken[0])
    assert seen == [5, 6, 7, 8]  # what was saved at 4 was not made again


def test_a_finished_one_is_there_at_once(base, batches, unbroken):
    assert same(continue_training(base, batches, n_steps=8, folder=unbroken[1], watch=lambda steps: pytest.fail("it was done") if list(steps) else []), unbroken[0])


@pytest.mark.parametrize("other, said", [(dict(lr=.2), "lr="), (dict(n_steps=9), "n_steps=8"), (dict(warmup=3), "warmup=")])
def test_another_continuation_needs_another_folder(base, batches, unbroken, other, said):
    with pytest.raises(UserError, match=said): continue_training(base, batches, **dict(n_steps=8, folder=unbroken[1]) | other)


def test_another_base_or_text_needs_another_folder(base, batches, unbroken):
    with pytest.raises(UserError, match="base="): continue_training(init_weights(Decoder(CFG), 1), batches, n_steps=8, folder=unbroken[1])
    with pytest.raises(UserError, match="new.sha256"): continue_training(base, ReplayBatches(OLD, NEW+1, .5, 16, 4), n_steps=8, folder=unbroken[1])


def test_who_leaves_early_is_told(base, batches, tmp_path):
    with pytest.raises(UserError, match="0 of 3 updates .* it goes on"): continue_training(base, batches, n_steps=3, folder=tmp_path, watch=lambda steps: [])


def test_the_rate_rises_and_comes_down(base, batches):
    rates = []
    continue_training(base, batches, n_steps=20, warmup=4, watch=lambda steps: (rates.append(s.lr) or s for s in steps))
    assert rates[:4] == [.25, .5, .75, 1] and max(rates) == 1 and rates[-1] < .1 and rates[9:] == sorted(rates[9:], reverse=True)


# --- running means ----------------------------------------------------------------------------------------------------

def test_means_are_those_of_the_checkpoint_and_weights_stay(unbroken):
    path = unbroken[1]/"000008"
    other = init_weights(Decoder(CFG), 5)
    weights = deepcopy(other.state_dict())
    state = recall_means(TrainState(other, make_optimizers(other, .3)), path)
    assert all(torch.equal(weights[k], x) for k, x in other.state_dict().items()) and state.step == 0
    about = json.loads((path/"state.json").read_text(encoding="utf-8"))["about"]
    twin = Decoder(CFG)
    full = load_checkpoint(TrainState(twin, make_optimizers(twin, 1.)), path, about)
    for mine, theirs in zip(state.optimizers, full.optimizers, strict=True):
        for p, q in zip([p for g in mine.param_groups for p in g["params"]], [p for g in theirs.param_groups for p in g["params"]], strict=True):
            assert mine.state[p].keys() == theirs.state[q].keys() and len(mine.state[p])
            for key in mine.state[p]: assert_close(mine.state[p][key], theirs.state[q][key])
    assert state.optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(.02*.3)  # rates are the new ones


def test_means_change_what_comes_of_it(base, batches, unbroken):
    assert not same(continue_training(base, batches, n_steps=8, means=unbroken[1]/"000008"), unbroken[0])


def test_means_that_cannot_be_had(base, batches, unbroken, tmp_path):
    path = shutil.copytree(unbroken[1]/"000008", tmp_path/"000008")
    with pytest.raises(UserError, match="other optimizers"):
        model = deepcopy(base)
        recall_means(TrainState(model, make_adamw(model)), path)
    with pytest.raises(UserError, match="another model"):
        wide = Decoder(ModelConfig(**vars(CFG) | dict(d_ff=48)))
        recall_means(TrainState(wide, make_optimizers(wide)), path)
    with open(path/"state.safetensors", "r+b") as f:
        f.seek(-3, 2)
        f.write(b"\x01")
    with pytest.raises(UserError, match="corrupt"): continue_training(base, batches, n_steps=2, means=path)


def test_bits_are_counted_by_bytes_of_each_domain(base):
    tok = train_bpe(["abcabcabd "*5], 260)
    model = init_weights(Decoder(ModelConfig(**vars(CFG) | dict(vocab_size=tok.vocab_size))), 0).eval()
    found = domain_bits(model, tok, dict(plain=["abc", "ab"], accents=["éé"]))
    assert [r.n for r in found.values()] == [2, 1]
    flat = np.log2(tok.vocab_size)  # fresh weights know nothing: every id costs about as much
    assert found["accents"].mean == pytest.approx(flat, rel=.2) and found["plain"].mean <= flat*1.2


# --- a pedigree -------------------------------------------------------------------------------------------------------

@pytest.fixture
def home(tmp_path):
    (tmp_path/"a"/"docs").mkdir(parents=True)
    (tmp_path/"a"/"docs"/"x.txt").write_text("text")
    (tmp_path/"a"/"model.bin").write_text("weights")
    graph = Lineage(tmp_path/"a"/"lineage.json")
    graph.add_node("raw", "raw", sha256="0"*64)
    graph.add_node("docs", "documents", tmp_path/"a"/"docs", parents=["raw"], how="cleaned")
    graph.add_node("model", "model", tmp_path/"a"/"model.bin", parents=["docs"], how="trained")
    graph.add_node("other", "model", sha256="1"*64, parents=["docs"])
    return tmp_path/"a"


def edited(path, change):
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value["nodes"])
    path.write_text(json.dumps(value), encoding="utf-8")


def test_moved_as_a_whole_it_still_holds(home):
    moved = home.rename(home.with_name("b"))
    assert [n.name for n in check_lineage(moved/"lineage.json")] == ["raw", "docs", "model", "other"]
    assert [n.name for n in check_lineage(moved/"lineage.json", "model")] == ["raw", "docs", "model"]


@pytest.mark.parametrize("change", [lambda n: n[0].update(sha256="2"*64), lambda n: n[1].update(how="made up"), lambda n: n[1].update(kind="raw"), lambda n: n[2].update(parents=["raw"]),
    lambda n: n[1]["files"].update({"x.txt": "3"*64}), lambda n: n[2].update(path=""), lambda n: n[0].update(seal="4"*64), lambda n: n[2].update(parents=[]), lambda n: n[0].update(name="wheel") or n[1].update(parents=["wheel"])])
def test_no_line_of_the_graph_can_be_changed_unseen(home, change):
    edited(home/"lineage.json", change)
    with pytest.raises(UserError, match="was changed"): check_lineage(home/"lineage.json")


def test_who_seals_a_lie_anew_is_betrayed_by_the_children(home):
    from llm_scratch.refresh import Node, _sealed
    graph = Lineage(home/"lineage.json")
    lie = Node(**{**vars(graph.nodes["docs"]), "how": "made up"})
    edited(home/"lineage.json", lambda n: n[1].update(how="made up", seal=_sealed(lie, graph.nodes)))
    with pytest.raises(UserError, match="what it says of model was changed"): check_lineage(home/"lineage.json")


@pytest.mark.parametrize("change, said", [(lambda n: n.pop(0), "made of raw, which is not before it"), (lambda n: n.reverse(), "not before it"), (lambda n: n[0].pop("sha256"), "a node that is none")])
def test_a_graph_with_holes_is_not_opened(home, change, said):
    edited(home/"lineage.json", change)
    with pytest.raises(UserError, match=said): Lineage(home/"lineage.json")


@pytest.mark.parametrize("change, said", [(lambda h: (h/"model.bin").write_text("Weights"), "model.bin of model was changed"), (lambda h: (h/"docs"/"x.txt").unlink(), "x.txt of docs is missing"),
    (lambda h: (h/"docs"/"y.txt").write_text(""), "y.txt of docs is new"), (lambda h: shutil.rmtree(h/"docs"), "docs of docs is missing"), (lambda h: (h/"docs"/"x.txt").rename(h/"docs"/"z.txt"), "x.txt of docs is missing"),
    (lambda h: (h/"model.bin").unlink() or (h/"model.bin").mkdir(), "model.bin of model is missing")])
def test_the_file_at_fault_is_named(home, change, said):
    change(home)
    with pytest.raises(UserError, match=said): check_lineage(home/"lineage.json")


def test_only_what_the_tip_is_made_of_counts(home):
    (home/"model.bin").unlink()
    assert len(check_lineage(home/"lineage.json", "other")) == 3
    with pytest.raises(UserError, match="no wheel in"): check_lineage(home/"lineage.json", "wheel")


def test_a_version_never_changes(home):
    graph, before = Lineage(home/"lineage.json"), (home/"lineage.json").read_bytes()
    graph.add_node("docs", "documents", home/"docs", parents=["raw"], how="cleaned")
    assert (home/"lineage.json").read_bytes() == before
    with pytest.raises(UserError, match="a version never changes"): graph.add_node("docs", "documents", home/"docs", parents=["raw"], how="cleaned twice")
    with pytest.raises(UserError, match="which is not in"): graph.add_node("new", "model", sha256="5"*64, parents=["nothing"])
    with pytest.raises(UserError, match="one of both"): graph.add_node("new", "model", parents=["raw"])
    with pytest.raises(UserError, match="nothing to take a checksum of"): graph.add_node("new", "model", home/"gone", parents=["raw"])
    assert (home/"lineage.json").read_bytes() == before


def test_foreign_and_missing_files_are_told(tmp_path):
    with pytest.raises(UserError, match="nothing is known"): check_lineage(tmp_path/"none.json")
    (tmp_path/"x.json").write_text("[]")
    with pytest.raises(UserError, match="not of llm_scratch lineage"): Lineage(tmp_path/"x.json")

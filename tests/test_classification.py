"Labels as text and heads on encoders: laws on tiny random models, and what the case study keeps apart."
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.classification import (
    ClassBatches,
    Classifier,
    LabelTask,
    MaskedBatches,
    TwoSided,
    class_counts,
    class_samples,
    class_scores,
    label_choice,
    label_nats,
    label_task,
    only_labels,
    write_labels,
)
from llm_scratch.core import UserError
from llm_scratch.families import Encoder, encoder_block
from llm_scratch.finetuning import TuningBatches, answer_nats
from llm_scratch.pretraining import Batches, TrainState, make_optimizers, train

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"benchmarks"))
import casestudy

CFG = ModelConfig(vocab_size=50, context_len=24, n_layers=2, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, d_head=8)
PAD = 49

def rough(model:nn.Module, std:float=.4)->nn.Module:
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim == 2: nn.init.normal_(p, 0, std, generator=rng)
    return model.eval()

@lru_cache
def decoder()->Decoder: return rough(Decoder(CFG))
@lru_cache
def both()->TwoSided: return rough(TwoSided(CFG))

class Tok:
    start_id = eot_id = 48
    def encode(self, text:str)->list[int]: return [ord(c)%48 for c in text]

def small_task(answers)->LabelTask: return LabelTask(tuple(f"c{i}" for i in range(len(answers))), tuple((*a, 48) for a in answers), (7, 8), 48, CFG.context_len)

ids = st.lists(st.integers(0, 40), min_size=1, max_size=30)
answers = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=2, max_size=4, unique_by=tuple)

@settings(deadline=None, max_examples=12)
@given(st.lists(ids, min_size=1, max_size=5), answers, st.integers(1, 3))
def test_scores_are_those_of_samples(texts, said, batch_size):
    task = small_task(said)
    nats = label_nats(decoder(), task, texts, batch_size=batch_size)
    one_by_one = [[answer_nats(decoder(), [task.sample(t, name)])[0][0] for name in task.names] for t in texts]
    assert_close(nats, np.array(one_by_one), atol=1e-3, rtol=1e-5)
    assert label_choice(decoder(), task, texts) == [task.names[i] for i in nats.argmin(1)]
    prior = np.arange(len(said))*100.
    assert label_choice(decoder(), task, texts, prior=prior) == [task.names[-1]]*len(texts)

@settings(deadline=None, max_examples=12)
@given(st.lists(ids, min_size=1, max_size=4), answers)
def test_only_labels_are_written_and_greedily(texts, said):
    task = small_task(said)
    for text,name in zip(texts, write_labels(decoder(), task, texts)):
        so_far = []
        while (*so_far,) != task.answers[task.names.index(name)]:
            logits = decoder()(torch.tensor([task.prompt(text) + so_far]))[0,-1]
            going = sorted({a[len(so_far)] for a in task.answers if list(a[:len(so_far)]) == so_far})
            so_far.append(max(going, key=lambda i: logits[i].item()))
            assert len(so_far) <= max(map(len, task.answers)), f"{so_far} is not how {name} begins"

def test_a_label_that_has_ended_goes_on_with_its_end():
    task,logits = small_task([[1], [1, 2], [3]]),torch.zeros(3, 50)
    free = only_labels(task, 2)(logits, torch.tensor([[7, 8, 1, 48], [7, 8, 1, 2], [7, 8, 3, 48]]))
    assert [x.isfinite().nonzero().flatten().tolist() for x in free] == [[48], [48], [48]]
    first = only_labels(task, 2)(logits[:1], torch.tensor([[7, 8]]))
    assert first[0].isfinite().nonzero().flatten().tolist() == [1, 3]
    second = only_labels(task, 2)(logits[:1], torch.tensor([[7, 8, 1]]))
    assert second[0].isfinite().nonzero().flatten().tolist() == [2, 48]

def test_prompts_keep_the_question():
    task = small_task([[1], [2, 3, 4]])
    long = task.prompt(list(range(30)))
    assert long == [48, *range(24-1-2-4), 7, 8] and len(long)+4 == CFG.context_len
    assert task.prompt([]) == [48, 7, 8]
    read,learnt = task.sample([5, 6], "c1")
    assert read == [48, 5, 6, 7, 8, 2, 3, 4] and learnt == [-1]*4 + [2, 3, 4, 48]
    decoder()(torch.tensor([task.sample(list(range(30)), "c1")[0]])) # the longest fits

def test_named_errors():
    with pytest.raises(UserError, match="the class b has 0 of 2 training texts"): class_counts(["a", "c"], ["a", "b", "c"])
    with pytest.raises(UserError, match="the label x of 2 test texts is none of the 2 classes"): class_counts(["x", "a", "x", "b"], ["a", "b"], "test texts")
    with pytest.raises(UserError, match="nothing to choose between"): class_counts(["a", "a"])
    assert list(class_counts(["b", "a", "b"], ["b", "a"]).items()) == [("b", 2), ("a", 1)] and list(class_counts("ba")) == ["a", "b"]
    with pytest.raises(UserError, match="the label x is none of the 2 classes"): small_task([[1], [2]]).number("x")
    with pytest.raises(UserError, match="3 classes are said in 2 ways"): label_task(Tok(), ["a_b", "a b", "c"], 100)
    with pytest.raises(UserError, match="1 classes are said in 1 ways"): label_task(Tok(), ["a"], 100)
    with pytest.raises(UserError, match=r"take 20 of context_len=39 ids, more than half"): label_task(Tok(), ["a", "b"], 39)
    label_task(Tok(), ["a", "b"], 40) # just half
    task = label_task(Tok(), ["a_b", "c"], 100)
    assert task.answers[0] == (*Tok().encode(" a b"), 48) and task.start_id == 48

@settings(deadline=None, max_examples=12)
@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=5))
def test_filling_changes_nothing(rows):
    c = Classifier(both(), 3, PAD)
    nn.init.normal_(c.head.weight, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([c(torch.tensor([row])) for row in rows])[:,0].log_softmax(-1)
    for batch_size in (1, 3): assert_close(class_scores(c, rows, 24, batch_size=batch_size), alone.double().detach().numpy(), atol=1e-4, rtol=1e-4)

def test_both_sides_are_chapter_02as():
    plain = Decoder(CFG, block=encoder_block)
    plain.load_state_dict(both().state_dict())
    x = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(2))
    assert_close(both()(x), plain(x))
    assert_close(both().hidden(x, torch.ones_like(x, dtype=torch.bool)), plain.hidden(x))
    filled = torch.cat((x, torch.full((2, 3), PAD)), 1)
    assert_close(both().hidden(filled, filled != PAD)[:,:9], plain.hidden(x))
    moved = x.clone(); moved[:,-1] = 41
    assert (both()(moved)[:,0]-both()(x)[:,0]).abs().max() > 1e-3 # the first word hears the last

def test_any_encoder_takes_a_head():
    c = Classifier(rough(Encoder(CFG)), 4, PAD)
    x = torch.tensor([[1, 2, 3, PAD], [4, 5, PAD, PAD]])
    assert c(x).shape == (2, 1, 4) and not c(x).any() # at first all classes are alike
    assert_close(c.vectors(x)[0], c.body.hidden(x[:1,:3]).mean(1)[0], atol=1e-5, rtol=1e-5)

def test_masked_batches_depend_on_the_step_alone():
    windows = Batches(np.arange(4000)%40, 12, 32)
    holes = MaskedBatches(windows, 47, 40, share=.5)
    (a,t),(b,u),(c,_) = holes[3],holes[3],holes[4]
    assert torch.equal(a, b) and torch.equal(t, u) and not torch.equal(a, c)
    whole = windows[3][0]
    assert torch.equal(torch.where(t == -1, a, t), whole) and .4 < (t != -1).float().mean() < .6
    assert not torch.equal(MaskedBatches(windows, 47, 40, share=.5, seed=1)[3][0], a)
    same = [windows[0]]*2 # one text twice: other holes
    assert not torch.equal(*(MaskedBatches(same, 47, 40)[step][0] for step in (0, 1)))
    assert .2 < (MaskedBatches(windows, 47, 40)[3][1] != -1).float().mean() < .4

def test_class_batches_leave_words_out_but_no_filling():
    samples = class_samples([[1, 2, 3], list(range(1, 30)), [4]], [2, 0, 1], 24)
    assert [len(i) for i,_ in samples] == [3, 24, 1] and [t[0] for _,t in samples] == [2, 0, 1] and all(set(t[1:]) <= {-1} for _,t in samples)
    plain = ClassBatches(TuningBatches(samples, 24, 3, PAD, pool=1))
    x,y = plain[0]
    assert y.shape == (3, 1) and sorted(y[:,0].tolist()) == [0, 1, 2] and torch.equal(x, plain.samples[0][0])
    gone,_ = ClassBatches(plain.samples, blank_id=46, drop=.5)[0]
    assert torch.equal(gone == PAD, x == PAD) and (gone == 46).any() and set(gone[gone != x].tolist()) == {46}
    assert not torch.equal(gone, ClassBatches(plain.samples, blank_id=46, drop=.5)[1][0])

def test_the_books_loop_trains_a_classifier():
    torch.manual_seed(0)
    rows,classes = [[5, 6, 7], [8, 9], [5, 6], [9, 8, 8]],[0, 1, 0, 1]
    c = Classifier(TwoSided(CFG), 2, PAD)
    batches = ClassBatches(TuningBatches(class_samples(rows, classes, 24), 24, 4, PAD, pool=1))
    losses = [s.loss for s in train(TrainState(c, make_optimizers(c, .5)), batches, lambda i: 1., 25)]
    assert abs(losses[0]-np.log(2)) < 1e-5 and losses[-1] < .3 and class_scores(c, rows, 24).argmax(1).tolist() == classes

# ---- the case study: what a split may see

def test_runs_and_overlaps():
    numbers = {}
    a,b,c = casestudy.word_runs(["One two three four five six.", "zero one TWO three four five", "seven"], numbers)
    assert [len(x) for x in (a, b, c)] == [2, 2, 1] and len(set(a) & set(b)) == 1
    shares = casestudy.overlaps([a, b, c, np.zeros(0, np.uint64)], np.unique(np.r_[a, c]))
    assert shares.tolist() == [1, .5, 1, 0]
    assert casestudy.overlaps([np.zeros(0, np.uint64), a], a).tolist() == [0, 1]

def test_labels_are_drawn_as_in_chapter_08e():
    from llm_scratch.clauses import Clause, draw_labels
    label = np.array([0, 0, 0, 1, 0, 2, 0, 0])
    clauses = [Clause(str(i), "", str(k), "f", str(i)) for i,k in enumerate(label)]
    for n in (3, 5, 8):
        theirs = [int(c.text) for c in draw_labels(clauses, n, 4)]
        assert casestudy.drawn(np.arange(8), label, n, 4).tolist() == theirs

def test_blanks_spare_question_and_label():
    task = LabelTask(("a", "b"), ((1, 48), (2, 48)), (7,)*6, 48, 24)
    batches = TuningBatches([task.sample(list(range(10, 20)), "a"), task.sample(list(range(20, 30)), "b")], 24, 2, PAD)
    x,y = casestudy.Blanked(batches, 46, 1., 0, 6)[0]
    assert (x[:,0] == 48).all() and (x[:,1:11] == 46).all() and (x[:,11:17] == 7).all() and set(x[:,17].tolist()) == {1, 2} and torch.equal(y, batches[0][1])

def test_a_split_learns_nothing_of_its_families():
    data = dict(label=np.array([0, 1, 0, 1]), core=[0], test_bits=np.array([1, 2, 2, 1]), train_bits=np.array([2, 1, 1, 2]))
    assert [x.tolist() for x in casestudy.split_of(data, 0, False)] == [[1, 2], [0, 3]]
    assert [x.tolist() for x in casestudy.split_of(data, 1, True)] == [[0], [2]]

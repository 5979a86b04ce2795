"Learning from attempts: the loss as trl has it, groups, masks, seeds, the truth beside the reward, and what is refused."
import copy
import json
import math
import subprocess
import sys
from collections import defaultdict
from functools import partial
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_scratch import reinforcement
from llm_scratch.architecture import Decoder, ModelConfig, init_weights
from llm_scratch.core import UserError
from llm_scratch.generation import generate
from llm_scratch.pretraining import TrainState, make_adamw
from llm_scratch.reinforcement import GRPOConfig, Sums, group_advantages, grpo_loss, k3, learn_from, pass_at_k, sample_groups, token_logps, train_grpo

SCRIPT = Path(__file__).resolve().parent.parent/"benchmarks"/"grpo.py"
some = partial(settings, max_examples=40, deadline=None, database=None)
CFG = ModelConfig(len(Sums.chars), context_len=32, n_layers=1, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, d_head=8)
PROMPTS = [Sums.prompt(a, b) for a, b in Sums.questions[:12]]


def model_of(seed=0):
    model = init_weights(Decoder(CFG), seed=seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1*torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def rng(seed=0): return torch.Generator().manual_seed(seed)


# --- groups ----------------------------------------------------------------------------------------------------------

@some()
@given(st.lists(st.lists(st.integers(-5, 5), min_size=4, max_size=4), min_size=1, max_size=4))
def test_advantages_are_a_standing_within_the_group(rewards):
    r = torch.tensor(rewards).double()
    a = group_advantages(r)
    assert_close(a.sum(1), torch.zeros(len(r), dtype=torch.float64), atol=1e-6, rtol=0)
    for row, out in zip(r, a):
        assert out.std().item() == pytest.approx(float(len(row.unique()) > 1), abs=2e-3)
        assert [[x < y for x in row] for y in row] == [[x < y-1e-9 for x in out] for y in out]
    assert_close(group_advantages(torch.flip(r, [0])), torch.flip(a, [0])) # no group knows of another


def test_groups_that_say_nothing_and_groups_that_are_wrong():
    assert group_advantages(torch.full((2, 3), 7.)).abs().max() == 0
    with pytest.raises(UserError, match="groups of 1"): group_advantages(torch.ones(3, 1))
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match="1 of 4 rewards are not finite"): group_advantages(torch.tensor([[1., 0.], [bad, 1.]]))


@some()
@given(st.lists(st.floats(.05, 1), min_size=3, max_size=3), st.lists(st.floats(.05, 1), min_size=3, max_size=3))
def test_k3_is_the_divergence_on_average(p, q):
    p, q = (torch.tensor(x, dtype=torch.float64)/sum(x) for x in (p, q))
    assert_close((p*k3(p.log(), q.log())).sum(), (p*(p/q).log()).sum())
    assert (k3(p.log(), q.log()) >= -1e-12).all()


# --- the loss --------------------------------------------------------------------------------------------------------

def trls(logp, old, ref, advantage, mask, eps, beta):
    trl = pytest.importorskip("trl")
    trainer = SimpleNamespace(model=SimpleNamespace(training=True), args=SimpleNamespace(use_bias_correction_kl=False, delta=None), aux_loss_enabled=False, top_entropy_quantile=1., off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=beta, epsilon_low=eps, epsilon_high=eps, loss_type="grpo", use_vllm=False, current_gradient_accumulation_steps=1, max_completion_length=logp.shape[1],
        _entropy_bonus_enabled=False, _metrics=dict(train=defaultdict(list)), accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None))
    B, T = logp.shape
    return trl.GRPOTrainer._compute_loss(trainer, None, dict(prompt_ids=torch.zeros(B, 1), prompt_mask=torch.ones(B, 1), completion_ids=torch.zeros(B, T), completion_mask=mask.long(), advantages=advantage,
                                                             old_per_token_logps=old, ref_per_token_logps=ref))


@pytest.mark.parametrize("seed, eps, beta", [(0, .2, 0.), (1, .2, .04), (2, .05, 1.), (3, .5, .3)])
def test_the_loss_is_trls(seed, eps, beta):
    r = rng(seed)
    old = -4*torch.rand(5, 7, generator=r)
    logp, ref = (old+.4*torch.randn(5, 7, generator=r) for _ in range(2))
    mask, advantage, found = torch.arange(7) < torch.tensor([[7], [1], [3], [5], [2]]), torch.randn(5, generator=r), []
    for loss in (grpo_loss, trls):
        x = logp.clone().requires_grad_()
        value = loss(x, old, ref, advantage, mask, eps, beta)
        value.backward()
        found.append((value.detach(), x.grad))
    assert_close(*found, atol=1e-6, rtol=1e-5)
    assert found[0][1][~mask].abs().max() == 0


def test_the_first_gradient_is_the_policy_gradient():
    "At the model that wrote the answers, over all answers of one token: the exact gradient of the mean reward."
    scores = torch.tensor([.3, -.2, .8], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([0., 1., .5], dtype=torch.float64)
    exact, = torch.autograd.grad((scores.softmax(0)*reward).sum(), scores)
    p = scores.softmax(0).detach()
    total = 0
    for pair in product(range(3), repeat=2): # every group of two
        logp = scores.log_softmax(0)[list(pair)][:,None]
        centred = reward[list(pair)]-reward[list(pair)].mean()
        total = total + p[pair[0]]*p[pair[1]]*grpo_loss(logp, logp.detach(), logp.detach(), centred, torch.ones(2, 1, dtype=torch.bool), beta=0.)
    found, = torch.autograd.grad(-total, scores)
    assert_close(found*2, exact) # half of it: each baseline holds the answer itself, G/(G-1) = 2


# --- attempts --------------------------------------------------------------------------------------------------------

def test_attempts_stand_together_end_once_and_count_from_the_first_token():
    model = model_of()
    prompts = [Sums.encode("3+5="), Sums.encode("9+"), Sums.encode("1")]
    tried = sample_groups(model, prompts, 5, 6, Sums.stop_id, rng())
    assert len(tried.answers) == 15 and tried.ids_BT.shape == tried.targets_BT.shape
    for k, answer in enumerate(tried.answers):
        prompt = prompts[k//5]
        assert 1 <= len(answer) <= 6 and Sums.stop_id not in answer[:-1]
        assert len(answer) == 6 or answer[-1] == Sums.stop_id
        assert tried.ids_BT[k][:len(prompt)+len(answer)-1].tolist() == (prompt+answer)[:-1]
        assert tried.targets_BT[k].tolist() == [-1]*(len(prompt)-1) + answer + [-1]*(tried.ids_BT.shape[1]-len(prompt)-len(answer)+1)
    assert any(a[-1] != Sums.stop_id for a in tried.answers) and any(a[-1] == Sums.stop_id for a in tried.answers)
    assert sample_groups(model, prompts, 5, 6, Sums.stop_id, rng()).answers == tried.answers != sample_groups(model, prompts, 5, 6, Sums.stop_id, rng(1)).answers
    ids = torch.tensor([prompts[0]]*5)
    alone = generate(model, ids, 6, stop_id=Sums.stop_id, rng=rng(3))[:,4:].tolist()
    assert [a[:a.index(Sums.stop_id)+1] if Sums.stop_id in a else a for a in alone] == sample_groups(model, prompts[:1], 5, 6, Sums.stop_id, rng(3)).answers


def test_log_probabilities_and_entropies_of_the_choices():
    model = model_of()
    tried = sample_groups(model, PROMPTS[:2], 3, 5, Sums.stop_id, rng())
    logp, entropy = token_logps(model, *tried[1:])
    for k in range(6):
        said = model(tried.ids_BT[k:k+1])[0].log_softmax(-1)
        for t, target in enumerate(tried.targets_BT[k].tolist()):
            assert logp[k,t].item() == (pytest.approx(said[t,target].item(), abs=1e-5) if target != -1 else 0)
            assert entropy[k,t].item() == pytest.approx(-(said[t].exp()*said[t]).sum().item(), abs=1e-5)
    assert logp.requires_grad and not entropy.requires_grad


# --- learning --------------------------------------------------------------------------------------------------------

def learnt(rewards, advantages=group_advantages, seed=0, lr=1e-2, **how):
    model = model_of(seed)
    base = copy.deepcopy(model)
    tried = sample_groups(model, PROMPTS[:2], 4, 5, Sums.stop_id, rng(seed))
    told = learn_from(TrainState(model, make_adamw(model, lr)), base, tried, torch.tensor(rewards), lambda k: 1., GRPOConfig(Sums.stop_id, 5, n_group=4, **how), advantages)
    before, after = (token_logps(m, *tried[1:])[0].sum(1).detach() for m in (base, model))
    return after-before, told, tried, model, base


def test_better_answers_become_likelier():
    gained, told, tried, *_ = learnt([[1., 0, 0, 0], [0., 0, 0, 1]], n_updates=4, beta=0.)
    assert gained[0] > 0 < gained[7] and gained[0] > max(g for g, a in zip(gained[1:4], tried.answers[1:4]) if a != tried.answers[0])
    entropy, kl, clipped = told
    assert 0 < entropy < math.log(14) and kl == pytest.approx(0, abs=1e-7) and 0 <= clipped <= 1
    assert learnt([[1., 0, 0, 0], [0., 0, 0, 1]], n_updates=4, beta=0., eps=1e-3)[1][2] > .3 # hardly any room: most pulls have ended
    assert learnt([[1., 0, 0, 0], [0., 0, 0, 1]], n_updates=1)[1][2] == 0


def test_the_share_that_is_clipped_is_that_of_the_last_update():
    rewards, how = [[1., 0, 0, .5], [0., 0, 2, 1]], dict(beta=0., eps=.05)
    share, (_, _, tried, model, base) = learnt(rewards, n_updates=3, **how)[1][2], learnt(rewards, n_updates=2, **how)
    ratio = (token_logps(model, *tried[1:])[0]-token_logps(base, *tried[1:])[0]).exp()
    a, counts = group_advantages(torch.tensor(rewards)).flatten(), tried.targets_BT != -1
    ended = [(r > 1.05) if x > 0 else (r < .95) for row, x, yes in zip(ratio, a.tolist(), counts) for r in row[yes].tolist() if x]
    ups, downs = ([e for e, x in zip(ended, [x for x, yes in zip(a.tolist(), counts) for _ in range(int(yes.sum())) if x]) if (x > 0) == up] for up in (True, False))
    assert share == pytest.approx(sum(ended)/int(counts.sum())) and 0 < sum(ups) < len(ups) and 0 < sum(downs) < len(downs)


def test_equal_rewards_move_nothing_and_a_leash_pulls_back():
    _, _, _, model, base = learnt([[1.]*4, [0.]*4], n_updates=3)
    assert max((a-b).abs().max() for a, b in zip(model.parameters(), base.parameters())) == 0
    def far(beta):
        model, base = model_of(), model_of()
        state = TrainState(model, make_adamw(model, 1e-2))
        for n in range(6):
            tried = sample_groups(model, PROMPTS[:4], 4, 5, Sums.stop_id, rng(n))
            rewards = torch.tensor([float(len(a)) for a in tried.answers]).view(4, 4)
            told = learn_from(state, base, tried, rewards, lambda k: 1., GRPOConfig(Sums.stop_id, 5, n_group=4, beta=beta))
        return told[1]
    assert far(5.) < far(0.)/2


def test_rewards_reach_their_own_answer_and_advantages_can_be_others(monkeypatch):
    seen, asked = [], []
    monkeypatch.setattr(reinforcement, "sample_groups", lambda model, prompts, *more: (asked.extend(prompts), sample_groups(model, prompts, *more))[1])
    def reward(i, answer):
        seen.append((i, list(answer)))
        return float(len(seen))
    model = model_of()
    state = TrainState(model, make_adamw(model, 0.001))
    given = []
    def spy(rewards): given.append(rewards.clone()); return torch.zeros_like(rewards)
    before = [p.detach().clone() for p in model.parameters()]
    cfg = GRPOConfig(Sums.stop_id, 5, n_prompts=3, n_group=4, n_updates=1, beta=0., seed=5)
    rounds = list(train_grpo(state, copy.deepcopy(model), PROMPTS, reward, lambda k: 1., 2, cfg, spy))
    for a, b in zip(before, model.parameters()): assert torch.equal(a, b)
    assert torch.equal(torch.cat(given).flatten(), torch.arange(1., 25.)) and [r.reward for r in rounds] == [6.5, 18.5]
    numbers = [i for i, _ in seen]
    assert [PROMPTS[i] for i in numbers[::4]] == asked
    assert all(len(set(numbers[k:k+4])) == 1 for k in range(0, 24, 4)) and len(set(numbers[:12])) == 3 # no prompt twice in a round
    assert rounds[0].length == pytest.approx(np.mean([len(a) for _, a in seen[:12]]))
    assert [r.n for r in rounds] == [1, 2] and rounds[0].equal == 0 and state.step == 2


def test_a_run_is_its_seed_and_goes_on_where_it_stopped():
    def run(seed, *stops):
        model, said = model_of(), []
        base, state = copy.deepcopy(model), None
        state = TrainState(model, make_adamw(model, 3e-3))
        for n in stops: said += train_grpo(state, base, PROMPTS, lambda i, a: float(a[0] == i), lambda k: 1., n, GRPOConfig(Sums.stop_id, 4, n_prompts=6, n_group=4, seed=seed))
        return said
    assert run(0, 5) == run(0, 2, 5) != run(1, 5)
    first = run(0, 5)
    assert first[0].kl == pytest.approx(0, abs=1e-7) and first[-1].kl > 1e-6


def test_a_reward_for_one_token_is_learnt():
    model = model_of()
    state = TrainState(model, make_adamw(model, 5e-3))
    rounds = list(train_grpo(state, copy.deepcopy(model), PROMPTS, lambda i, a: float(a[0] == 7), lambda k: 1., 15, GRPOConfig(Sums.stop_id, 3, n_prompts=12, n_group=8, beta=0.)))
    assert rounds[-1].reward > .8 > rounds[0].reward+.4 and rounds[-1].entropy < rounds[0].entropy-.3 and rounds[-1].equal > rounds[0].equal


def test_what_cannot_be_run_is_refused():
    model = model_of()
    base, state = copy.deepcopy(model), TrainState(model, make_adamw(model))
    cfg = GRPOConfig(Sums.stop_id, 4, n_prompts=12)
    with pytest.raises(UserError, match="there are 3 prompts, and n_prompts=12"): train_grpo(state, base, PROMPTS[:3], None, None, 1, cfg)
    with pytest.raises(UserError, match="the reference is the model itself"): train_grpo(state, model, PROMPTS, None, None, 1, cfg)
    other = Decoder(ModelConfig(15, context_len=32, n_layers=1, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, d_head=8))
    with pytest.raises(UserError, match="a vocabulary of 15 ids, the model to train one of 14"): train_grpo(state, other, PROMPTS, None, None, 1, cfg)
    with pytest.raises(UserError, match="96 of 96 rewards are not finite"): next(train_grpo(state, base, PROMPTS, lambda i, a: math.nan, lambda k: 1., 1, cfg))
    for wrong, says in ((dict(n_group=1), "n_group=1"), (dict(n_prompts=0), "n_prompts=0"), (dict(n_updates=0), "n_updates=0"), (dict(eps=0.), "eps=0"), (dict(beta=-1.), "beta=-1"), (dict(max_new_tokens=0), "max_new_tokens=0")):
        with pytest.raises(UserError, match=says): GRPOConfig(**dict(stop_id=0, max_new_tokens=4) | wrong)


# --- the task and its measures -----------------------------------------------------------------------------------------

@some()
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_counts_every_draw(nck):
    n, c, k = nck

    draws = list(combinations([True]*c+[False]*(n-c), k))
    assert pass_at_k([c], n, k).mean == pytest.approx(sum(map(any, draws))/len(draws))
    assert pass_at_k([c, n], n, k).mean == pytest.approx((sum(map(any, draws))/len(draws)+1)/2)


def test_pass_at_k_refuses_what_it_cannot_know():
    for wrong in (([1], 4, 5), ([5], 4, 2), ([-1], 4, 2), ([1], 4, 0)):
        with pytest.raises(UserError): pass_at_k(*wrong)


def test_checkers_of_sums():
    assert Sums.decode(Sums.prompt(3, 5)) == "3+5=" and Sums.decode(Sums.right(9, 9)) == "18;"
    exact, anywhere = (lambda text, f=f: f(3, 5, Sums.encode(text)) for f in (Sums.exact, Sums.anywhere))
    assert [Sums.exact(9, 9, Sums.encode(t)) for t in ("18;", "18", "18,", "1;")] == [1, 0, 0, 0]
    assert [exact(t) for t in ("8;", "8", "8,8;", "7;", ";", "")] == [1, 0, 0, 0, 0, 0]
    assert [anywhere(t) for t in ("8;", "8", "7,8;", "18;", "81", "7;", "")] == [1, 1, 1, 0, 0, 0, 0]


def test_the_form_has_the_shares_that_it_is_asked_for():
    texts = [Sums.decode(ids+targets[-1:]) for ids, targets in Sums.samples(2000, seed=1, right=.25, again=.3)]
    guesses = [(t[:3], t[4:-1].split(",")) for t in texts]
    hits = [int(g) == int(q[0])+int(q[2]) for q, gs in guesses for g in gs]
    assert np.mean(hits) == pytest.approx(.25, abs=.04) and np.mean([len(g) > 1 for _, g in guesses]) == pytest.approx(.3, abs=.04)
    assert all(t.endswith(";") and t[3] == "=" for t in texts) and max(len(g) for _, g in guesses) <= 4
    assert all(abs(int(g)-int(q[0])-int(q[2])) <= 3 for q, gs in guesses for g in gs)
    ids, targets = Sums.samples(1)[0]
    assert targets[:3] == [-1]*3 and targets[3:] == [*ids[4:], Sums.stop_id]
    assert Sums.samples(5, 1) == Sums.samples(5, 1) != Sums.samples(5, 2)


def test_the_probability_of_a_right_answer_is_exact():
    model = model_of()
    p = Sums.p_right(model, [(3, 5), (9, 9)])
    for (a, b), got in zip(((3, 5), (9, 9)), p):
        ids = Sums.prompt(a, b)+Sums.right(a, b)
        said = model(torch.tensor([ids]))[0].log_softmax(-1)
        assert got == pytest.approx(math.exp(sum(said[t,ids[t+1]].item() for t in range(3, len(ids)-1))), rel=1e-4)
    assert len(Sums.p_right(model)) == 100


def test_the_record_can_be_made_again(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--tiny", "--out", tmp_path/"r.json"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path/"r.json").read_text())
    assert [r["way"] for r in record["runs"]] == ["sound checker", "sound, no leash", "cheatable, leash", "cheatable, no leash"]
    for run in record["runs"]:
        assert [len(run[name].split()) for name in ("practised", "unseen", "before", "after")] == [2, 2, 80, 80]
        assert all(len(run[name].split()) == 2 for name in record["about"]["columns"])

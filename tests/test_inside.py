"Looking inside: the weights that another implementation prints, cuts that cut what they should, the explorer without a browser, the GRU, gradients, rounding, the record of the benchmark."
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm_scratch.architecture import Attention, Block, Decoder, ModelConfig, attend, init_weights, n_params, save_model
from llm_scratch.families import GPT2, encoder_block, window_attend
from llm_scratch.inside import (Recurrent, attention_picture, attention_weights, bf16_gap, explore_attention, gru_width, layer_gradients, mixing, octaves, weigh,
                                without_edges)

ROOT = Path(__file__).resolve().parent.parent
CFG = ModelConfig(vocab_size=61, context_len=32, n_layers=3, n_heads=4, n_kv_heads=2, d_model=40, d_ff=72, d_head=16)


def _filled(model, seed=0):
    "A model of which every weight matters."
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.2*torch.randn(p.shape, generator=rng))
    return model


@pytest.fixture
def model(): return _filled(init_weights(Decoder(CFG), 0))


@pytest.fixture
def ids(): return torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))


# --- weights ---------------------------------------------------------------------------------------------------------

def test_transformers_prints_the_same_weights(model, ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path/"model", eot_id=0), attn_implementation="eager")
    with torch.no_grad(): expected = torch.stack(theirs(ids, output_attentions=True).attentions)
    ours = attention_weights(model, ids)
    assert ours.shape == (3, 2, 4, 20, 20) and (ours[0]-ours[1]).abs().max() > .1
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_rows_add_to_one_and_see_no_future(model, ids):
    w = attention_weights(model, ids)
    torch.testing.assert_close(w.sum(-1), torch.ones(3, 2, 4, 20))
    assert w.triu(1).abs().max() == 0 and w.min() >= 0


def test_the_last_queries_have_the_last_rows():
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 9, 8, generator=rng) for n in (4, 2, 2))
    torch.testing.assert_close(weigh(q[:, :, -3:], k), weigh(q, k)[:, :, -3:])
    torch.testing.assert_close(weigh(q, k) @ v.repeat_interleave(2, 1), attend(q, k, v))


def test_looking_changes_neither_the_answer_nor_the_model(model, ids):
    with torch.no_grad(): before = model(ids)
    mixes = [layer.self_attn.mix for layer in model.layers]
    attention_weights(model, ids)
    without_edges(model, ids, torch.zeros(2, 20, 20, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="inside"), mixing(model, lambda mix: lambda q, k, v: 0): raise RuntimeError("inside")
    assert [layer.self_attn.mix for layer in model.layers] == mixes
    with torch.no_grad(): assert torch.equal(model(ids), before)


def test_a_family_with_biases_works_too(ids):
    w = attention_weights(_filled(GPT2(replace(CFG, n_kv_heads=4))), ids)
    torch.testing.assert_close(w.sum(-1), torch.ones(3, 2, 4, 20))


@pytest.mark.parametrize("block", [encoder_block, partial(Block, attention=partial(Attention, mix=partial(window_attend, window=4)))], ids=["sees all", "window"])
def test_a_model_that_mixes_otherwise_is_refused(block, ids):
    other = _filled(Decoder(CFG, block=block))
    with pytest.raises(ValueError, match="layer 0 does not mix by causal attention"): attention_weights(other, ids)
    other(ids)  # and still works


def test_a_model_without_attention_is_refused(ids):
    with pytest.raises(ValueError, match="Recurrent has no layer with a `mix`"): attention_weights(Recurrent(CFG, 8), ids)


# --- cuts ------------------------------------------------------------------------------------------------------------

def test_to_forbid_a_position_to_all_is_to_exchange_it_freely(model, ids):
    "Who is looked at by nobody but itself can be any token: nobody else's answer moves."
    hidden = torch.zeros(2, 20, 20, dtype=torch.bool)
    hidden[:, :, 7] = True
    hidden[:, 7, 7] = False
    other = ids.clone()
    other[:, 7] = (other[:, 7]+1) % 61
    moved = lambda h: (without_edges(model, ids, h)-without_edges(model, other, h)).abs().amax((0, 2)) > 1e-6
    assert moved(hidden).nonzero().flatten().tolist() == [7]
    assert moved(torch.zeros_like(hidden))[8:].all()


def test_a_window_is_a_cut(ids):
    "Everything further back than a window forbidden: the model with that window answers the same."
    windowed = _filled(Decoder(CFG, block=partial(Block, attention=partial(Attention, mix=partial(window_attend, window=4)))))
    plain = Decoder(CFG)
    plain.load_state_dict(windowed.state_dict())
    at = torch.arange(20)
    with torch.no_grad(): expected = windowed(ids)
    torch.testing.assert_close(without_edges(plain, ids, (at[:, None]-at >= 4).expand(2, 20, 20)), expected, atol=1e-5, rtol=1e-5)


def test_a_query_keeps_something_to_look_at(model, ids):
    with pytest.raises(ValueError, match="nothing left to look at"): without_edges(model, ids, torch.ones(2, 20, 20, dtype=torch.bool))


# --- the explorer ----------------------------------------------------------------------------------------------------

NAMES = [f"w{i}" for i in range(59)] + ["<s>", "a\nb"]


def _encode(text):
    if unknown := [w for w in text.split() if w not in NAMES]: raise ValueError(f"no word {unknown[0]}")
    return [NAMES.index(w) for w in text.split()]


def _parsed(picture):
    caption, svg = re.fullmatch(r"<div>(.*?)</div>(<svg.*</svg>)", picture).groups()
    return caption, ET.fromstring(svg)


def test_a_picture_has_a_square_for_every_pair_and_escapes_names(model, ids):
    w = attention_weights(model, ids[:1])[0, 0, 0]
    caption, svg = _parsed(attention_picture(w, ["<s>", "a\nb", *["w"]*18], "x & y"))
    squares, texts = list(svg.iter("rect")), [t.text for t in svg.iter("text")]
    assert caption == "x &amp; y" and len(squares) == 20*21//2
    assert texts.count("<s>") == texts.count("a\\nb") == 2
    assert [t for t in texts if t.isdigit()] == [f"{100*x:.0f}" for t, row in enumerate(w.tolist()) for x in row[:t+1] if x >= .095]
    opacity = torch.tensor([float(s.get("fill-opacity")) for s in squares])
    assert ((opacity-.05)/.7 - w[torch.ones(20, 20).tril().bool()]).abs().max() < .01


def test_the_explorer_shows_the_weights_of_its_text(model):
    ipywidgets = pytest.importorskip("ipywidgets")
    head, layer, field, shown = explore_attention(model, _encode, NAMES, "w1 w2 w3").children
    assert (head.max, layer.max) == (3, 2) and isinstance(shown, ipywidgets.Stack)
    panels = lambda: [[panel.value for panel in row.children] for row in shown.children]
    expected = lambda text: [[attention_picture(w, text.split(), f"layer {n}, head {h}") for h, w in enumerate(heads)]
                             for n, heads in enumerate(attention_weights(model, torch.tensor([_encode(text)]))[:, 0])]
    assert panels() == expected("w1 w2 w3")
    field.value = "w4 w1"
    assert panels() == expected("w4 w1")
    field.value = "w4 <b>"
    assert {p for row in panels() for p in row} == {"<p>no word &lt;b&gt;</p>"}
    field.value = " ".join(["w1"]*33)
    assert "33 positions do not fit into context_len=32" in panels()[0][0]
    with pytest.raises(ValueError, match="no word what"): explore_attention(model, _encode, NAMES, "what")


def test_the_sliders_choose_in_the_browser(model):
    "On a page without Python a slider works by links that the page itself follows."
    pytest.importorskip("ipywidgets")
    from ipywidgets.widgets.widget import _instances
    head, layer, _, shown = explore_attention(model, _encode, NAMES, "w1 w2").children
    ends = [(w.source, w.target) for w in _instances.values() if w._model_name == "LinkModel"]
    assert all(((head, "value"), (row, "selected_index")) in ends for row in shown.children)
    assert ((layer, "value"), (shown, "selected_index")) in ends


# --- the recurrent network -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cfg", [CFG, replace(CFG, n_layers=1, d_model=24), replace(CFG, vocab_size=256, d_model=64, d_ff=128)], ids=["three layers", "one", "bytes"])
def test_a_gru_of_the_same_size(cfg):
    width = gru_width(cfg)
    size = lambda w: sum(p.numel() for p in Recurrent(cfg, w).parameters())
    assert abs(size(width)/n_params(cfg)-1) < .02
    assert all(abs(size(width)-n_params(cfg)) <= abs(size(w)-n_params(cfg)) for w in (width-1, width+1))


def test_a_gru_reads_from_left_to_right_and_learns(ids):
    torch.manual_seed(0)
    gru = Recurrent(CFG, 24)
    other = ids.clone()
    other[:, 6] = (other[:, 6]+1) % 61
    with torch.no_grad(): moved = (gru(ids)-gru(other)).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False]*6 + [True]*14
    opt, losses = torch.optim.AdamW(gru.parameters(), lr=1e-2), []
    for _ in range(60):
        loss = F.cross_entropy(gru(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert abs(losses[0]-4.11) < .3 and losses[-1] < .5  # ln 61 at first, then by heart


def test_octaves_are_means_of_positions():
    nats = torch.arange(1., 11.).repeat(3, 1)
    assert octaves(nats) == {1: 1., 2: 2.5, 4: 5.5, 8: 9.}  # 8, 9, 10: an octave may be cut short


def test_the_record_of_three_seeds():
    record = json.loads((ROOT/"nbs"/"recurrence.json").read_text(encoding="utf-8"))
    cfg = ModelConfig(**record["cfg"])
    assert record["weights"]["decoder"] == n_params(cfg) and record["width"] == gru_width(cfg)
    assert abs(record["weights"]["gru"]/record["weights"]["decoder"]-1) < .02
    assert sorted((r["model"], r["seed"]) for r in record["runs"]) == [(name, seed) for name in ("decoder", "gru") for seed in range(3)]
    for name in record["weights"]:
        assert record["trials"][name][str(record["lr"][name])] == min(record["trials"][name].values())  # each at the rate that was best for it
        assert list(record["seconds"][name]) == [str(2**i) for i in range(4, 11)] and min(min(s) for s in record["seconds"][name].values()) > 0
    assert all(list(r["by_context"]) == [str(2**i) for i in range(8)] for r in record["runs"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"]) and "torch" in record["machine"]


def test_the_benchmark_writes_such_a_record(tmp_path):
    out = tmp_path/"record.json"
    done = subprocess.run([sys.executable, ROOT/"benchmarks"/"recurrence.py", "--tiny", "--out", out], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    tiny, full = (json.loads(p.read_text(encoding="utf-8")) for p in (out, ROOT/"nbs"/"recurrence.json"))
    assert tiny.keys() == full.keys() and len(tiny["runs"]) == 6
    assert tiny["runs"][0]["by_context"] != tiny["runs"][2]["by_context"]  # another seed is another run
    assert "| bytes seen, from | decoder | gru |" in done.stdout


# --- gradients and rounding ------------------------------------------------------------------------------------------

def test_layer_gradients_are_those_of_backward(model, ids):
    norms = layer_gradients(model, ids[:, :-1], ids[:, 1:])
    assert all(p.grad is None for p in model.parameters())
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = [torch.cat([p.grad.flatten() for p in layer.parameters()]).norm() for layer in model.layers]
    torch.testing.assert_close(norms, torch.stack(expected))


def test_targets_that_do_not_count_leave_no_gradient(model, ids):
    targets = ids.clone()
    targets[:, 5:] = -1
    other = ids.clone()
    other[:, 8:] = 0
    torch.testing.assert_close(layer_gradients(model, ids, targets), layer_gradients(model, other, targets))


def test_bf16_gap(model, ids):
    class Table(nn.Module):  # scores of two tokens that bfloat16 cannot tell apart, and that it rounds to the other order
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1., 1.001], [1., 3.]]))
        def forward(self, ids): return self.weight[ids].float()
    gap, share = bf16_gap(Table(), torch.tensor([[0, 1, 1, 1]]))
    assert gap == pytest.approx(.001, abs=1e-6) and share == .25
    exact, share = bf16_gap(model, ids)
    assert 0 < exact < .5 and 0 <= share < .2
    assert next(model.parameters()).dtype == torch.float32

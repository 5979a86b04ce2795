"Four bits: the published marks, every shape, what a layer keeps and passes on, and a model that is quantised once."
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from models import filled
from torch import nn
from torch.testing import assert_close

from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.core import UserError
from llm_scratch.families import UntiedDecoder
from llm_scratch.generation import generate
from llm_scratch.lora import add_lora, base_hash, load_adapter, merge_lora, n_trained, plain_copy, save_adapter
from llm_scratch.qlora import NF4, NF4Linear, dequantize_model, from_blocks, nearest_levels, nf4_levels, pack4, quantize_model, squeeze_scales, stored_bits, to_blocks, unpack4

PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833334, -0.09105003625154495, 0.0, 0.07958029955625534,
             0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # Dettmers et al. 2023, appendix E
CFG = ModelConfig(48, context_len=40, n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ff=48, d_head=8)
IDS = torch.randint(48, (3, 12), generator=torch.Generator().manual_seed(0))
SEVEN = 7*2


def test_the_codebook_is_the_published_one():
    assert_close(nf4_levels(), torch.tensor(PUBLISHED), atol=1e-6, rtol=0)
    assert NF4.dtype == torch.float32 and NF4[7] == 0


@given(x=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_each_number_goes_to_its_nearest_mark(x):
    x = torch.tensor(x)
    assert_close((NF4[nearest_levels(x).long()]-x).abs(), (NF4-x[:, None]).abs().amin(1))


@given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=3), seed=st.integers(0, 50), scale=st.sampled_from([1e-20, 1., 1e20]))
@settings(max_examples=50, deadline=None)
def test_any_shape_comes_back_near(shape, seed, scale):
    w = scale*torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    codes, scales = to_blocks(w)
    back = from_blocks(codes, scales, w.shape)
    assert codes.shape == (len(scales), 64) and len(scales) == -(-w.numel()//64) and back.shape == w.shape
    for a, b in zip(w.flatten().split(64), back.flatten().split(64)):
        assert (a-b).abs().max() <= .153*a.abs().max() and b.abs().max() == pytest.approx(a.abs().max().item(), rel=.31)
    largest = w.flatten().split(64)[0].abs().argmax()
    if w.flatten()[largest] > 0: assert back.flatten()[largest] == w.flatten()[largest]


def test_zeros_stay_zeros_and_scales_are_never_negative():
    w = torch.randn(640, 64)
    w[5], w[7, 3] = 0, 0
    layer = nn.Linear(64, 640, bias=False)
    layer.weight.data = w
    back = NF4Linear(layer).weight
    assert not back[5].any() and back[7, 3] == 0
    assert (squeeze_scales(torch.cat((torch.zeros(10), torch.full((300,), 5.), torch.full((1,), 100.)))).whole() >= 0).all()


@given(n=st.integers(1, 600), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_scales_in_eight_bits(n, seed):
    scale = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + .1
    small = squeeze_scales(scale)
    assert small.codes.shape == (n,) and small.codes.dtype == torch.int8 and small.steps.shape == (-(-n//256),)
    for a, b in zip(scale.split(256), small.whole().split(256)): assert (a-b).abs().max() <= (a-scale.mean()).abs().max()/254 + 1e-6


@given(codes=st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda x: len(x)%2 == 0))
def test_two_codes_share_a_byte(codes):
    packed = pack4(torch.tensor(codes, dtype=torch.uint8))
    assert unpack4(packed).tolist() == codes and packed.tolist() == [16*a+b for a, b in zip(codes[::2], codes[1::2])]


@pytest.mark.parametrize("n_in,n_out,bias", [(64, 128, False), (100, 70, True), (3, 5, True), (1, 1, False)])
def test_a_layer_is_the_full_layer_of_its_rounded_weight(n_in, n_out, bias):
    full = nn.Linear(n_in, n_out, bias=bias)
    layer, plain = NF4Linear(full), nn.Linear(n_in, n_out, bias=bias)
    plain.weight.data = layer.weight
    if bias: plain.bias.data = full.bias.data.clone()
    x, y = torch.randn(2, 3, n_in, requires_grad=True), torch.randn(2, 3, n_in, requires_grad=True)
    with torch.no_grad(): y.copy_(x)
    a, b = layer(x), plain(y)
    assert_close(a, b)
    a.square().sum().backward(); b.square().sum().backward()
    assert_close(x.grad, y.grad)
    assert not [*layer.parameters()] and layer(x.bfloat16()).dtype == torch.bfloat16
    assert full.weight.requires_grad, "the full layer stays as it was"


def test_bits_are_as_counted_on_paper():
    assert stored_bits(NF4Linear(nn.Linear(4096, 512))) == 4 + 8/64 + 32/(64*256) + 32/(4096*512)
    assert round(stored_bits(NF4Linear(nn.Linear(4096, 512))), 3) == 4.127
    assert stored_bits(NF4Linear(nn.Linear(5, 3))) == (32*8 + 8 + 32 + 32)/15


def test_nothing_is_kept_for_the_way_back():
    layer, kept = NF4Linear(nn.Linear(256, 256, bias=False)), []
    x = torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t): y = layer(x)
    y.sum().backward()
    assert kept == []


@pytest.mark.parametrize("kind", [Decoder, UntiedDecoder])
def test_a_model_with_an_adapter_learns_over_bytes_that_stay(kind, tmp_path):
    base = filled(kind(CFG))
    model = quantize_model(deepcopy(base))
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == SEVEN and .001 < (model(IDS)-base(IDS)).abs().max()
    assert base_hash(model) != base_hash(base)
    assert n_trained(add_lora(model, rank=2)) == n_trained(add_lora(deepcopy(base), rank=2))
    before, opt = {k: x.clone() for k, x in model.state_dict().items()}, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=.01)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]-.1
    assert {k for k, x in model.state_dict().items() if not torch.equal(x, before[k])} == {k for k in before if ".changes." in k}
    save_adapter(model, tmp_path/"a")
    again = load_adapter(quantize_model(deepcopy(base)), tmp_path/"a")
    assert_close(again(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="was made for the base"): load_adapter(base, tmp_path/"a")
    said = model(IDS)
    with pytest.raises(UserError, match="can't be merged into a NF4Linear"): merge_lora(model)
    with pytest.raises(UserError, match="can't be merged into a NF4Linear"): plain_copy(model, "default")
    assert torch.equal(model(IDS), said)
    whole = plain_copy(dequantize_model(model), "default")
    assert_close(whole(IDS), said, atol=1e-4, rtol=1e-4)
    assert type(whole.layers[0].mlp.up_proj) is nn.Linear and generate(whole, IDS[:1], 5, temperature=0).shape == (1, 17)


def test_a_quantised_model_is_saved_and_loaded_by_its_state():
    base = filled(Decoder(CFG))
    model, other = quantize_model(deepcopy(base)), quantize_model(Decoder(CFG))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), model(IDS)) and base_hash(other) == base_hash(model)


def test_rounding_again_what_was_rounded_changes_little():
    base = filled(Decoder(CFG))
    once = dequantize_model(quantize_model(deepcopy(base)))
    twice = dequantize_model(quantize_model(deepcopy(once)))
    a, b, c = (m.layers[0].mlp.up_proj.weight for m in (base, once, twice))
    assert (b-c).abs().max() < .2*(a-b).abs().max() and not (a == b).all()


def test_what_is_refused_and_leaves_the_model_alone():
    model = quantize_model(Decoder(CFG), "v_proj")
    before = {k: x.clone() for k, x in model.state_dict().items()}
    with pytest.raises(UserError, match="layers.0.self_attn.v_proj is in 4 bits already"): quantize_model(model)
    with pytest.raises(UserError, match="is in 4 bits already"): quantize_model(add_lora(deepcopy(model), "v_proj"), "v_proj")
    with pytest.raises(UserError, match="q_proj has an adapter"): quantize_model(add_lora(Decoder(CFG), "q_proj"), ("k_proj", "q_proj"))
    with pytest.raises(UserError, match="no linear layer q_prj, did you mean q_proj"): quantize_model(model, "q_prj")
    odd = nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(3, 3))
    with pytest.raises(UserError, match="0 is a NonDynamicallyQuantizableLinear"): quantize_model(odd, None)
    assert model.state_dict().keys() == before.keys() and all(torch.equal(x, before[k]) for k, x in model.state_dict().items())

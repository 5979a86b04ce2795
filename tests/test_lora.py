"Low-rank adapters: on every family, equal to peft step by step and file by file, mixed in one batch, refused where they do not belong, and on several processes."
import json
from copy import deepcopy
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from models import filled
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from llm_scratch.architecture import Block, Decoder, ModelConfig, init_weights
from llm_scratch.backward import quick_training
from llm_scratch.core import UserError
from llm_scratch.families import GPT2, Encoder, EncoderDecoder, MoE, UntiedDecoder
from llm_scratch.generation import generate
from llm_scratch.interchange import load_hf, save_hf
from llm_scratch.lora import (LoRALinear, LowRank, adapter_names, add_lora, base_hash, find_linears, load_adapter, merge_lora, n_trained, plain_copy, save_adapter, unmerge_lora,
                              use_adapter)
from llm_scratch.pretraining import TrainState, make_adamw, make_optimizers, train

ROOT = Path(__file__).resolve().parent.parent
CFG = ModelConfig(48, context_len=40, n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_ff=48, d_head=8)
IDS = torch.randint(48, (3, 12), generator=torch.Generator().manual_seed(0))
EVEN = ModelConfig(48, context_len=40, n_layers=2, n_heads=4, n_kv_heads=4, d_model=32, d_ff=48, d_head=8)
FAMILIES = dict(decoder=lambda: Decoder(CFG), untied=lambda: UntiedDecoder(CFG), gpt2=lambda: GPT2(EVEN), bert=lambda: Encoder(EVEN), t5=lambda: EncoderDecoder(EVEN),
                moe=lambda: Decoder(CFG, block=partial(Block, mlp=partial(MoE, n_experts=3))))


def run(model, ids=IDS): return model(ids, ids.flip(1)) if isinstance(model, EncoderDecoder) else model(ids)


def same(a, b): return (a-b).abs().max() < 2e-6  # products round by where in memory their numbers lie


def moved(model, name="default", seed=0):
    "An adapter that does something."
    rng = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LoRALinear) and name in layer.changes: nn.init.normal_(layer.changes[name].B, std=.1, generator=rng)
    return model


@pytest.fixture
def base(): return filled(init_weights(Decoder(CFG), 0))


@pytest.fixture
def adapted(base): return moved(add_lora(deepcopy(base), rank=3, alpha=6))


# --- beside, merged, apart -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_an_adapter_and_gives_it_back(family):
    base = filled(FAMILIES[family]())
    said, hashed, model = run(base), base_hash(base), add_lora(deepcopy(base), None, rank=2)
    assert same(run(model), said) and base_hash(model) == hashed
    assert n_trained(model) == sum(2*(m.in_features+m.out_features) for m in base.modules() if isinstance(m, nn.Linear))
    beside = run(moved(model))
    assert (beside-said).abs().max() > .01
    merge_lora(model)
    assert_close(run(model), beside, atol=1e-5, rtol=1e-5)
    assert base_hash(model) == hashed and not same(run(model), said)
    assert same(run(plain_copy(model)), said)  # a copy of a merged model is of the base
    assert same(run(unmerge_lora(model)), beside)
    assert same(run(use_adapter(model, None)), said)
    before = base.state_dict()
    assert all(torch.equal(x, before[k.replace(".base.", ".")]) for k, x in model.state_dict().items() if ".changes." not in k), "weights come back to the bit"
    plain = plain_copy(model, "default")
    assert_close(run(plain), beside, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, LoRALinear) for m in plain.modules()) and plain.state_dict().keys() == base.state_dict().keys()
    assert same(run(model), said), "the copy is another model"


def test_logits_of_a_merged_model_are_within_1e_5(adapted):
    beside = adapted(IDS)
    assert (merge_lora(adapted)(IDS)-beside).abs().max() < 1e-5
    assert torch.equal(unmerge_lora(adapted)(IDS), beside)


@given(n_in=st.integers(1, 9), n_out=st.integers(1, 9), rank=st.integers(1, 5), alpha=st.floats(.1, 50), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_change_is_the_product_that_it_stands_for(n_in, n_out, rank, alpha, seed):
    rng = torch.Generator().manual_seed(seed)
    change, x = LowRank(n_in, n_out, rank, alpha), torch.randn(4, n_in, generator=rng)
    nn.init.normal_(change.A, generator=rng)
    assert not change(x).any()
    nn.init.normal_(change.B, generator=rng)
    assert_close(change(x), x @ (alpha/rank * change.B @ change.A).T, atol=1e-4, rtol=1e-4)


def test_only_the_adapter_in_use_learns_and_the_base_never(base):
    model = add_lora(deepcopy(base), ("q_proj", "down_proj"), rank=2, name="one")
    add_lora(model, "up_proj", rank=3, name="two", seed=5)
    before = {k: x.clone() for k, x in model.state_dict().items()}
    state = TrainState(model, make_adamw(model, .01))
    for _ in train(state, [(IDS[:, :-1], IDS[:, 1:])]*3, lambda step: 1., 3): pass
    changed = {k for k, x in model.state_dict().items() if not torch.equal(x, before[k])}
    assert changed == {k for k in before if ".changes.two." in k} and n_trained(model) == 2*3*(32+48)
    use_adapter(model, ["one", None, "two"])
    assert {k for k, p in model.named_parameters() if p.requires_grad} == {k for k in before if ".changes." in k}
    use_adapter(model, None)
    assert n_trained(model) == 0 and base_hash(model) == base_hash(base)


def test_muon_and_the_quick_backward_pass_train_adapters(base):
    a, b = add_lora(deepcopy(base), rank=2), add_lora(deepcopy(base), rank=2)
    def steps(model): return [s.loss for s in train(TrainState(model, make_optimizers(model)), [(IDS[:, :-1], IDS[:, 1:])]*5, lambda step: 1., 5)]
    plain = steps(a)
    with quick_training(b) as n: quick = steps(b)
    assert n == 2*4+1+2 and plain[-1] < plain[0]-.01
    assert_close(quick, plain, atol=1e-4, rtol=0)


def test_a_seed_is_an_adapter_and_layers_differ(base):
    A = lambda **how: [m.changes["default"].A for m in add_lora(deepcopy(base), rank=2, **how).modules() if isinstance(m, LoRALinear)]
    assert all(torch.equal(x, y) for x, y in zip(A(), A(seed=0))) and not torch.equal(A()[0], A(seed=1)[0])
    assert not torch.equal(A()[0], A()[3])
    assert all(a.abs().max() <= a.shape[1]**-.5 and a.abs().max() > .8*a.shape[1]**-.5 for a in A(seed=3))


def test_a_bfloat16_base_gets_a_float32_adapter(base):
    model = moved(add_lora(base.bfloat16(), rank=2))
    change = model.get_submodule("layers.0.self_attn.q_proj").changes["default"]
    assert change.A.dtype == torch.float32 and model(IDS).isfinite().all()
    x = torch.randn(2, 3, 32).bfloat16()
    assert model.get_submodule("layers.0.self_attn.q_proj")(x).dtype == torch.bfloat16
    weight = model.get_submodule("layers.0.self_attn.q_proj").base.weight.clone()
    merge_lora(model)
    assert model.get_submodule("layers.0.self_attn.q_proj").base.weight.dtype == torch.bfloat16
    assert torch.equal(unmerge_lora(model).get_submodule("layers.0.self_attn.q_proj").base.weight, weight)


# --- which layers --------------------------------------------------------------------------------------------------

def test_targets_are_ends_of_paths(base):
    assert [*find_linears(base, "layers.1.mlp.up_proj")] == ["layers.1.mlp.up_proj"] and len(find_linears(base, "mlp.up_proj")) == 2
    assert len(find_linears(base)) == 14 and [*find_linears(base, ["v_proj", "q_proj"])] == [f"layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"]
    assert [*find_linears(add_lora(deepcopy(base)), None)] == [*find_linears(base)]


@pytest.mark.parametrize("targets,said", [("q_porj", "no linear layer q_porj, did you mean q_proj?"), ("zzz", "no linear layer zzz. This Decoder has q_proj, k_proj"), ("proj", "no linear layer proj"),
                                          (["q_proj", "lm_head"], "no linear layer lm_head"), ([], "targets is empty"), ("embed_tokens", "no linear layer embed_tokens"), ("norm", "no linear layer norm")])
def test_a_target_that_is_not_there(base, targets, said):
    with pytest.raises(UserError) as e: add_lora(base, targets)
    assert said in str(e.value)
    assert all(p.requires_grad for p in base.parameters()) and not adapter_names(base), "nothing was done"


def test_bad_ranks_and_names(base, adapted):
    for how in (dict(rank=0), dict(alpha=0.), dict(alpha=float("nan"))):
        with pytest.raises(ValueError, match="rank="): add_lora(base, **how)
        assert all(p.requires_grad for p in base.parameters()) and not adapter_names(base)
    for name in ("a.b", "", "keys", "1x"):
        with pytest.raises(UserError, match="cannot be called"): add_lora(base, name=name)
    with pytest.raises(UserError, match="adapter default already"): add_lora(adapted, "q_proj")
    with pytest.raises(UserError, match="no adapter x: this model has default"): use_adapter(adapted, ["default", "x"])
    with pytest.raises(UserError, match="no adapter x: this model has none"): use_adapter(base, "x")
    with pytest.raises(UserError, match="nothing|no adapter is merged"): unmerge_lora(adapted)
    merge_lora(adapted)
    for f in (lambda: merge_lora(adapted), lambda: use_adapter(adapted, None), lambda: add_lora(adapted, name="b")):
        with pytest.raises(UserError, match="unmerge_lora first"): f()


# --- many in one batch ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def many():
    model = filled(init_weights(Decoder(CFG), 0))
    for i, (name, targets) in enumerate(dict(a=None, b="q_proj", c=("up_proj", "o_proj")).items()): moved(add_lora(model, targets, rank=i+1, name=name, seed=i), name, i)
    return model


@given(rows=st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_each_row_is_as_if_it_were_alone(many, rows):
    ids = torch.randint(48, (len(rows), 9), generator=torch.Generator().manual_seed(1))
    together = use_adapter(many, rows)(ids)
    for i, name in enumerate(rows): assert_close(together[i], use_adapter(many, name)(ids[i:i+1])[0], atol=1e-5, rtol=1e-5)


def test_rows_of_different_lengths_write_with_their_own_adapters(many):
    texts, rows = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], ["a", None, "c", "a"]
    together = generate(use_adapter(many, rows), texts, 8, temperature=0)
    alone = [generate(use_adapter(many, name), [t], 8, temperature=0)[0, -8:] for t, name in zip(texts, rows)]
    assert together[:, -8:].tolist() == [x.tolist() for x in alone]
    assert generate(use_adapter(many, None), [texts[0]], 8, temperature=0)[0, -8:].tolist() != alone[0].tolist()


def test_a_long_text_is_written_by_the_adapted_model_not_by_the_compiled_base():
    cfg = ModelConfig(48, context_len=120, n_layers=1, n_heads=2, n_kv_heads=1, d_model=16, d_ff=16, d_head=8)
    base = filled(Decoder(cfg))
    model, ids = moved(add_lora(deepcopy(base), rank=1)), torch.tensor([[1, 2, 3]])
    written = generate(model, ids, 105, temperature=0)  # 100 and more would be compiled
    baked = plain_copy(model, "default").requires_grad_(False)
    for _ in range(105): ids = torch.cat((ids, baked(ids)[:, -1:].argmax(-1)), 1)
    assert written.tolist() == ids.tolist()


def test_gradients_reach_each_adapter_from_its_rows(many):
    use_adapter(many, ["a", "b", "a"])
    for p in many.parameters(): p.grad = None
    many(IDS).square().mean().backward()
    got = {k.split(".changes.")[1][0] for k, p in many.named_parameters() if p.grad is not None}
    assert got == {"a", "b"}


def test_a_batch_of_another_size_is_refused(many):
    use_adapter(many, ["a", None, "b"])
    with pytest.raises(ValueError, match="chosen for 3 rows, and this layer gets"): many(IDS[:2])
    assert use_adapter(many, "a")(IDS[:2]).shape[0] == 2


def test_loose_tokens_have_no_rows():
    moe = moved(add_lora(filled(FAMILIES["moe"]()), None, rank=1, name="a"), "a")
    assert torch.isfinite(use_adapter(moe, "a")(IDS)).all()
    with pytest.raises(ValueError, match="chosen for 3 rows"): use_adapter(moe, ["a", "a", "a"])(IDS)


# --- peft ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def peft():
    import transformers
    transformers.logging.disable_progress_bar()
    return pytest.importorskip("peft")


def opened(folder, family="decoder"):
    import transformers
    return dict(bert=transformers.AutoModelForMaskedLM, t5=transformers.AutoModelForSeq2SeqLM).get(family, transformers.AutoModelForCausalLM).from_pretrained(folder).eval()


def theirs_say(model, family="decoder"):
    with torch.no_grad(): return (model(input_ids=IDS.flip(1), decoder_input_ids=IDS) if family == "t5" else model(input_ids=IDS)).logits


@pytest.mark.parametrize("targets,rank,alpha", [(("q_proj", "v_proj"), 2, 2), (("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 4, 16)])
def test_losses_are_those_of_peft(peft, base, tmp_path, targets, rank, alpha):
    save_hf(base, tmp_path/"base")
    ours = add_lora(base, targets, rank, alpha)
    theirs = peft.get_peft_model(opened(tmp_path/"base"), peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM"))
    with torch.no_grad():
        for path, layer in ours.named_modules():
            if isinstance(layer, LoRALinear): theirs.get_submodule(f"base_model.model.model.{path}").lora_A["default"].weight.copy_(layer.changes["default"].A)
    assert n_trained(theirs) == n_trained(ours)

    def losses(model, forward):
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=.01)
        for i in range(25):
            ids = torch.randint(48, (4, 17), generator=torch.Generator().manual_seed(i))**2 % 41
            loss = F.cross_entropy(forward(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            opt.zero_grad(); loss.backward(); opt.step()
            yield loss.item()
    a, b = list(losses(ours, ours)), list(losses(theirs, lambda ids: theirs(input_ids=ids).logits))
    assert max(abs(x-y) for x, y in zip(a, b)) < 1e-5 and all(layer.changes["default"].B.abs().max() > .02 for layer in ours.modules() if isinstance(layer, LoRALinear))


@pytest.mark.parametrize("family,targets", [("decoder", None), ("decoder", ["q_proj", "layers.1.mlp.up_proj"]), ("untied", ("lm_head", "o_proj")), ("bert", ("q_proj", "v_proj", "o_proj")), ("t5", ("q_proj", "up_proj")),
                                            ("gpt2", ("o_proj", "up_proj", "down_proj"))])
def test_peft_opens_our_adapter_and_we_open_what_it_saves(peft, tmp_path, family, targets):
    base = filled(FAMILIES[family]())
    save_hf(base, tmp_path/"base")
    model = moved(add_lora(deepcopy(base), targets, rank=3, alpha=4.5, name="mine"), "mine")
    save_adapter(model, tmp_path/"ours", "mine")
    theirs = peft.PeftModel.from_pretrained(opened(tmp_path/"base", family), tmp_path/"ours")
    assert sum("lora_A" in k for k, _ in theirs.named_parameters()) == sum(isinstance(m, LoRALinear) for m in model.modules())
    assert_close(theirs_say(theirs, family), run(model), atol=2e-5, rtol=1e-4)
    assert (run(model)-run(base)).abs().max() > .01
    theirs.save_pretrained(tmp_path/"theirs")
    back = load_adapter(load_hf(tmp_path/"base"), tmp_path/"theirs", "back")
    assert torch.equal(run(back), run(model)) and adapter_names(back) == ["back"]
    assert torch.equal(run(load_adapter(load_hf(tmp_path/"base"), tmp_path/"ours")), run(model))


def test_the_scale_of_rslora_is_read(peft, base, tmp_path):
    save_hf(base, tmp_path/"base")
    theirs = peft.get_peft_model(opened(tmp_path/"base"), peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path/"theirs")
    assert_close(run(load_adapter(base, tmp_path/"theirs")), theirs_say(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how,said", [(dict(use_dora=True), "use_dora=True"), (dict(rank_pattern={"v_proj": 3}), "rank_pattern"), (dict(bias="lora_only"), "bias='lora_only'"), (dict(modules_to_save=["norm"]), "modules_to_save")])
def test_what_is_more_than_lora_is_refused_by_name(peft, base, tmp_path, how, said):
    save_hf(base, tmp_path/"base")
    peft.get_peft_model(opened(tmp_path/"base"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **how)).save_pretrained(tmp_path/"theirs")
    with pytest.raises(UserError, match="which load_adapter does not know") as e: load_adapter(base, tmp_path/"theirs")
    assert said in str(e.value) and not adapter_names(base)


def test_gpt2_has_one_matrix_for_three_of_ours(tmp_path):
    model = add_lora(FAMILIES["gpt2"](), ("q_proj", "o_proj"))
    with pytest.raises(UserError, match=r"q_proj, .*k_proj, .*v_proj are one matrix .*c_attn in gpt2"): save_adapter(model, tmp_path/"a")
    assert not list(tmp_path.iterdir())


# --- files ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(adapted, tmp_path): return save_adapter(adapted, tmp_path/"adapter", base="my/base")


def edit(folder, **changes):
    path = folder/"adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_of_another_base_is_refused_by_hash(base, folder):
    other = deepcopy(base)
    with torch.no_grad(): other.embed_tokens.weight[3, 4] += 1e-6
    with pytest.raises(UserError, match="was made for the base [0-9a-f]{12}…, and this one is [0-9a-f]{12}…") as e: load_adapter(other, folder)
    assert base_hash(base)[:12] in str(e.value) and base_hash(other)[:12] in str(e.value)
    assert not adapter_names(other) and all(p.requires_grad for p in other.parameters())
    assert load_adapter(base, folder) is base and load_adapter(base, folder, "twin") is base and adapter_names(base) == ["default", "twin"]


def test_the_hash_is_of_names_kinds_shapes_and_numbers(base):
    known = {base_hash(base)}
    for change in (lambda m: m.bfloat16(), lambda m: m.layers.append(m.layers[0]), lambda m: setattr(m, "other", m.norm), lambda m: m.layers[0].mlp.up_proj.weight.data.neg_()):
        change(other := deepcopy(base))
        assert base_hash(other) not in known
        known.add(base_hash(other))
    assert base_hash(deepcopy(base)) in known


def test_what_is_in_the_folder(adapted, folder):
    config, tensors = json.loads((folder/"adapter_config.json").read_text()), load_file(folder/"adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"], config["task_type"], config["base_model_name_or_path"], len(config["target_modules"])) == (3, 6., "CAUSAL_LM", "my/base", 7)
    assert len(tensors) == 28 and tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (32, 3)
    assert (folder/"adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    save_adapter(moved(adapted, seed=7), folder)  # replaced
    assert not torch.equal(load_file(folder/"adapter_model.safetensors")["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"], tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"])


def test_one_adapter_of_several_is_saved_merged_or_not(base, tmp_path):
    model = moved(add_lora(moved(add_lora(base, "q_proj", rank=1, name="a"), "a"), "up_proj", rank=2, name="b"), "b")
    save_adapter(model, tmp_path/"b", "b")
    hashed = base_hash(model)
    save_adapter(merge_lora(model, "a"), tmp_path/"a", "a")
    assert json.loads((tmp_path/"a"/"adapter_config.json").read_text())["target_modules"] == ["q_proj"] and json.loads((tmp_path/"b"/"adapter_config.json").read_text())["r"] == 2
    fresh = load_adapter(load_adapter(plain_copy(model), tmp_path/"b", "b"), tmp_path/"a", "a")
    assert base_hash(fresh) == hashed and torch.equal(use_adapter(fresh, "b")(IDS), use_adapter(unmerge_lora(model), "b")(IDS))


def test_bad_folders(base, folder, tmp_path):
    def refused(match, f=lambda: load_adapter(base, folder)):
        with pytest.raises(UserError, match=match): f()
        assert not adapter_names(base) and all(p.requires_grad for p in base.parameters())
    refused("adapter_config.json is missing", lambda: load_adapter(base, tmp_path/"nowhere"))
    refused("was made for|is of another model", lambda: load_adapter(Decoder(EVEN), folder))
    tensors = load_file(folder/"adapter_model.safetensors")
    edit(folder, r=2); refused("says r=2 and holds rank 3")
    edit(folder, r=3, peft_type="IA3"); refused("kind IA3")
    edit(folder, peft_type="LORA", something_new=[1]); refused("something_new")
    edit(folder, something_new=None)
    one = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({k: x for k, x in tensors.items() if k != one}, folder/"adapter_model.safetensors"); refused("half of the change of layers.0.self_attn.q_proj")
    save_file(tensors | {one: torch.zeros(3, 5)}, folder/"adapter_model.safetensors"); refused(r"\(32, 3\) times \(3, 5\) for layers.0.self_attn.q_proj, which is \(32, 32\)")
    save_file(tensors | {"base_model.model.model.head.lora_A.weight": torch.zeros(3, 5)}, folder/"adapter_model.safetensors"); refused("changes model.head, and no linear layer")
    save_file(tensors | {"base_model.model.model.norm.weight": torch.zeros(3)}, folder/"adapter_model.safetensors"); refused("norm.weight")
    (folder/"adapter_model.safetensors").write_bytes(b"no tensors"); refused("is not safetensors")
    (folder/"adapter_model.safetensors").unlink(); refused("adapter_model.safetensors is missing")


def test_nothing_is_overwritten_or_half_written(adapted, base, tmp_path, monkeypatch):
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="no adapter's folder"): save_adapter(adapted, tmp_path/"mine")
    with pytest.raises(UserError, match="no adapter x: this model has default"): save_adapter(adapted, tmp_path/"new", "x")
    with pytest.raises(UserError, match="this model has none"): save_adapter(base, tmp_path/"new")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["diary.txt", "mine"]
    save_adapter(adapted, tmp_path/"ok")
    before = (tmp_path/"ok"/"adapter_model.safetensors").read_bytes()
    def full(*args, **kwargs): raise OSError("no space left")
    monkeypatch.setattr("llm_scratch.lora.save_file", full)
    with pytest.raises(OSError): save_adapter(moved(adapted, seed=9), tmp_path/"ok")
    assert (tmp_path/"ok"/"adapter_model.safetensors").read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["mine", "ok"]


# --- the record, and several processes -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bench():
    spec = spec_from_file_location("benchmarks_adapters", ROOT/"benchmarks"/"adapters.py")
    spec.loader.exec_module(module := module_from_spec(spec))
    return module


def test_the_record_is_whole(bench):
    record = json.loads((ROOT/"nbs"/"adapters.json").read_text(encoding="utf-8"))
    wanted = {(way, rank, lr, seed) for way, rank in bench.WAYS for lr in bench.RATES["lora" if rank else "full"] for seed in bench.SEEDS}
    assert {(r["way"], r["rank"], r["lr"], r["seed"]) for r in record["runs"]} == wanted and len(record["runs"]) == len(wanted)
    assert {(r["ruler"], r["seed"]) for r in record["rounded"]} == {(k, s) for k in bench.RULERS for s in bench.SEEDS}
    assert {r["engine"] for r in record["engines"]} == {*bench.MAKE} and (record["n_base"], record["n_tune"]) == (bench.N_BASE, bench.N_TUNE)
    model = Decoder(bench.CFG)
    for r in record["runs"]: assert r["n_trained"] == (n_trained(add_lora(deepcopy(model), bench.TARGETS[r["way"]], r["rank"])) if r["rank"] else n_trained(model))


def test_the_benchmark_goes_on_where_it_was_stopped(bench, tmp_path, monkeypatch, capsys):
    row = torch.arange(30_000).numpy().astype("uint8")
    monkeypatch.setattr(bench, "read_texts", lambda: dict.fromkeys(("recipes", "plays", "kitchen", "Macbeth", "Hamlet"), row))
    monkeypatch.setattr(bench, "N_WINDOWS", 4)
    monkeypatch.setattr(bench, "RATES", dict(full=(.001,), lora=(.003, .01), rounded=(.01,)))
    bench.main(["--tiny", "--out", str(tmp_path/"a.json")])
    record = json.loads((tmp_path/"a.json").read_text())
    assert len(record["runs"]) == 2*(1+2) and len(record["rounded"]) == 4 and len(record["bases"]) == 2
    (tmp_path/"b.json").write_text(json.dumps(record | dict(runs=record["runs"][:4], rounded=record["rounded"][:1])))
    bench.main(["--tiny", "--out", str(tmp_path/"b.json")])
    without = lambda path: [{k: x for k, x in r.items() if k not in ("cpu_seconds", "tuned")} for part in ("runs", "rounded", "bases") for r in json.loads(path.read_text())[part]]
    assert without(tmp_path/"b.json") == without(tmp_path/"a.json")


def test_two_processes_equal_one(bench):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'llm_scratch[distributed]'")
    rows = {r["engine"]: r for r in bench.engines()}
    assert [*rows] == ["ddp", "fsdp", "zero2", "zero3"]
    for r in rows.values(): assert max(r["loss"], r["adapter"], r["resumed"]) < 1e-5 and r["base"] and r["names"]
    assert rows["zero3"]["weights"] == rows["fsdp"]["weights"] == rows["ddp"]["weights"]/2

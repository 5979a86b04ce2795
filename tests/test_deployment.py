"ONNX: every family's graph equals its model at sizes it was not traced at, warnings are accounted for, a failing gate writes nothing, and what was damaged does not open."
import json
import logging
import shutil
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from models import filled
from torch import nn
from torch.testing import assert_close

onnx = pytest.importorskip("onnx", reason="needs llm_scratch[deploy]")
pytest.importorskip("onnxscript", reason="needs llm_scratch[deploy]")
pytest.importorskip("onnxruntime", reason="needs llm_scratch[deploy]")

from llm_scratch import deployment as d  # noqa: E402
from llm_scratch.architecture import Attention, Block, Decoder, ModelConfig, SwiGLU  # noqa: E402
from llm_scratch.core import UserError, check_seal, read_json, seal, write_json  # noqa: E402
from llm_scratch.deployment import (GATE_PROMPTS, GenaiDecoder, OnnxDecoder, OnnxEncoder, OnnxEncoderDecoder, Parity, check_parity, export_onnx, open_bundle, open_genai, reader_path, save_bundle,  # noqa: E402
                                    save_genai, some_lengths)
from llm_scratch.families import GPT2, BareEncoder, Encoder, MoE, ReadBlock, UntiedDecoder, UntiedEncoderDecoder, WriteBlock, rewrite, window_attend  # noqa: E402
from llm_scratch.generation import generate, logprobs, stream  # noqa: E402
from llm_scratch.interchange import copy_tokenizer, load_hf, save_hf, sentence_vectors  # noqa: E402
from llm_scratch.tokenization import save_tokenizer, train_bpe  # noqa: E402

CFG = ModelConfig(vocab_size=320, context_len=40, n_layers=1, n_heads=4, n_kv_heads=2, d_model=32, d_ff=48, d_head=16)
EVEN = ModelConfig(vocab_size=320, context_len=40, n_layers=1, n_heads=4, n_kv_heads=4, d_model=32, d_ff=48, d_head=8)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tok = train_bpe(GATE_PROMPTS, CFG.vocab_size)
    save_hf(filled(Decoder(CFG)), folder/"model", special_ids=dict(bos_token_id=tok.eot_id, eos_token_id=[tok.eot_id, tok.eot_id], pad_token_id=tok.eot_id))
    copy_tokenizer(save_tokenizer(tok, folder/"tok"), folder/"model")
    (folder/"model"/"chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return folder/"model"


@pytest.fixture(scope="module")
def model(home): return load_hf(home)


@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    "The bundle that most tests read, and everything that was said while it was made."
    said = []
    ear = logging.Handler()
    ear.emit = lambda record: said.append(record.getMessage())
    loud = [logging.getLogger(), logging.getLogger("torch"), logging.getLogger("torch.onnx")]
    for log in loud: log.addHandler(ear)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            bundle = save_bundle(home, tmp_path_factory.mktemp("made")/"bundle", kinds=dict(copied=shutil.copyfile))
    finally:
        for log in loud: log.removeHandler(ear)
    return bundle, said + [str(w.message) for w in heard]


@pytest.fixture(scope="module")
def runner(made): return OnnxDecoder(made[0]/"fp32.onnx")


@pytest.fixture
def bundle(made, tmp_path): return shutil.copytree(made[0], tmp_path/"bundle")


def tampered(path, change):
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, path)
    return path


def scale(proto, by=1.01):
    big = next(c for c in proto.graph.initializer if list(c.dims) == [CFG.d_model, CFG.d_ff])
    big.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(big)*np.float32(by), big.name))


# --- the graph --------------------------------------------------------------------------------------------------------

def test_nothing_is_said_that_the_chapter_does_not_explain(made): assert made[1] == []


def test_what_is_not_explained_is_heard():
    with pytest.warns(UserWarning, match="something else"), d._explained(): warnings.warn("something else")
    with d._explained():
        assert not logging.getLogger("torch.onnx._internal.exporter._registration").filter(logging.makeLogRecord(dict(msg="torchvision is not installed. Skipping")))
        assert logging.getLogger("torch.onnx._internal.exporter._registration").filter(logging.makeLogRecord(dict(msg="an operator is missing")))
    assert logging.getLogger("torch.onnx._internal.exporter._registration").filter(logging.makeLogRecord(dict(msg="torchvision is not installed. Skipping")))


def test_inputs_and_outputs_have_the_names_that_others_expect(made):
    proto = onnx.load(made[0]/"fp32.onnx")
    onnx.checker.check_model(proto, full_check=True)
    axes = {v.name:[a.dim_param or a.dim_value for a in v.type.tensor_type.shape.dim] for v in [*proto.graph.input, *proto.graph.output]}
    kv,longer = ["batch", 2, "past", 16],["batch", 2, "past + seq", 16]
    assert axes == {"input_ids":["batch", "seq"], "attention_mask":["batch", "past + seq"], "position_ids":["batch", "seq"], "past_key_values.0.key":kv, "past_key_values.0.value":kv,
        "logits":["batch", "seq", 320], "present.0.key":longer, "present.0.value":longer}
    assert proto.opset_import[0].version == 23 == read_json(made[0]/"bundle.json")["opset"]


def test_the_file_tells_nothing_of_the_machine(made):
    data = (made[0]/"fp32.onnx").read_bytes()
    assert not any(word in data for word in (b"site-packages", b".py", b"/home", str(made[0]).encode()))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Decoder(CFG).bfloat16(), Decoder(CFG).to("meta")], ids=["foreign", "bfloat16", "elsewhere"])
def test_what_can_not_be_exported(model, tmp_path):
    with pytest.raises(UserError, match="can't be exported|export wants model.float"): export_onnx(model, tmp_path/"x.onnx")
    assert not list(tmp_path.iterdir())


def test_no_tensor_serves_two_inputs(tmp_path):
    plan = d._encoder_plan(Encoder(EVEN))
    with pytest.raises(AssertionError, match="one tensor for two inputs"): d._write_graph(plan._replace(args=(plan.args[0],)*3), tmp_path/"x.onnx", 23, {})


def test_a_file_can_not_hold_everything(tmp_path):
    large = nn.Module()
    large.p = nn.Parameter(torch.zeros(1).expand(500_000_000))
    with pytest.raises(UserError, match="2.0 GB of weights: one ONNX file holds less than 2 GB"): export_onnx(large, tmp_path/"x.onnx")


# --- parity -----------------------------------------------------------------------------------------------------------

def test_every_length_and_batch(model, runner):
    parity = check_parity(model, runner, [[1, 2, 3], [4], [5]*30], lengths=range(1, 41), batches=range(2, 9))
    assert parity.passes() and parity.n_equal+parity.n_ties == 3 and parity.n_positions > 2000 and abs(parity.kl) < 1e-9


def gated(): return UntiedEncoderDecoder(EVEN, read_block=partial(ReadBlock, mlp=SwiGLU), write_block=partial(WriteBlock, mlp=SwiGLU))


def narrow(cfg, layer): return Block(cfg, layer, attention=partial(Attention, mix=partial(window_attend, window=5), norm=nn.Identity))


FAMILIES = dict(gpt2=(lambda: GPT2(EVEN), OnnxDecoder, None), windows=(lambda: UntiedDecoder(CFG, block=narrow), OnnxDecoder, None), experts=(lambda: Decoder(CFG, block=partial(Block, mlp=partial(MoE, n_experts=3, top_k=2))), OnnxDecoder, None),
    encoder=(lambda: Encoder(EVEN), OnnxEncoder, None), sentences=(lambda: BareEncoder(EVEN), OnnxEncoder, 20), rewriter=(gated, OnnxEncoderDecoder, None))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    make,kind,opset = FAMILIES[family]
    model = filled(make())
    model.train()
    runner = kind(export_onnx(model, tmp_path/"x.onnx", opset=opset))
    assert model.training and runner.family == type(model).__name__ and runner.cfg == model.cfg
    assert onnx.load(tmp_path/"x.onnx").opset_import[0].version == (opset or 23)
    model.eval()
    parity = check_parity(model, runner, [[1, 2, 3], [4, 5]] if kind is OnnxDecoder else [], batches=(2, 8))
    assert parity.passes(), parity
    assert parity.n_positions > 200
    if kind is OnnxEncoderDecoder:
        source_BS,is_text_BS = torch.randint(320, (3, 7)),torch.arange(7) < torch.tensor([7, 3, 1])[:,None]
        answers = [rewrite(m, source_BS, is_text_BS, start_id=0, end_id=1, max_new_tokens=20) for m in (model, runner)]
        assert torch.equal(*answers) and reader_path(tmp_path/"x.onnx").is_file()
    if family == "sentences":
        ids_BT,is_text_BT = torch.randint(320, (3, 7)),torch.arange(7) < torch.tensor([7, 3, 1])[:,None]
        assert_close(sentence_vectors(runner, ids_BT, is_text_BT), sentence_vectors(model, ids_BT, is_text_BT), atol=1e-5, rtol=0)


def test_shifted_scores_have_the_same_probabilities_and_do_not_pass(model, runner):
    def shifted(ids, cache=None): return runner(ids, cache)+.5
    shifted.__dict__.update(cfg=runner.cfg, embed_tokens=runner.embed_tokens, new_cache=runner.new_cache)
    parity = check_parity(model, shifted, [[1, 2]])
    assert parity.difference == pytest.approx(.5, abs=1e-4) and abs(parity.kl) < 1e-9 and parity.n_equal == 1 and not parity.passes()


def test_no_number_is_the_worst_number(model, runner):
    def broken(ids, cache=None): return runner(ids, cache)*torch.nan
    broken.__dict__.update(cfg=runner.cfg, embed_tokens=runner.embed_tokens, new_cache=runner.new_cache)
    assert not check_parity(model, broken).passes()


def test_a_parting_is_forgiven_at_a_tie_only():
    def flat(ids, cache=None): return torch.tensor([0., 1., 1.-5e-5, .9]).expand(*ids.shape, 4)
    part = partial(d._part, flat, tolerance=1e-4)
    a = torch.tensor([0, 0, 1, 1])
    assert [part(a, torch.tensor(b)) for b in ([0, 0, 1, 1], [0, 0, 1, 2], [0, 0, 2, 3], [0, 0, 1, 3])] == ["equal", "tie", "tie", "other"]
    fine = Parity(1e-5, 0., 10, 4, 3, 1)
    assert fine.passes() and not fine._replace(n_ties=0).passes() and not fine._replace(difference=2e-4).passes() and not fine._replace(n_positions=0).passes()


@pytest.mark.parametrize("most", [1, 2, 3, 40, 64])
def test_lengths_reach_from_one_to_the_limit(most):
    lengths = some_lengths(most)
    assert lengths[0] == 1 and lengths[-1] == most and lengths == sorted(set(lengths))


# --- in the place of a model ------------------------------------------------------------------------------------------

def test_it_goes_where_models_go(model, runner):
    texts = [[1, 2, 3, 4, 5, 6], [7], [8, 9]]
    dice = lambda: dict(temperature=.9, top_k=50, rng=torch.Generator().manual_seed(3))
    assert torch.equal(generate(runner, texts, 25, **dice()), generate(model, texts, 25, **dice()))
    assert_close(logprobs(runner, texts), logprobs(model, texts), atol=1e-4, rtol=0)
    long = generate(model, [[1, 2]], 38, temperature=0)
    assert torch.equal(generate(runner, [[1, 2]], 38, temperature=0), long) # up to the limit
    stop = int(long[0,9])
    assert [int(x) for x in stream(runner, [[1, 2]], 38, temperature=0, stop_id=stop)] == [int(x) for x in stream(model, [[1, 2]], 38, temperature=0, stop_id=stop)]
    with pytest.raises(ValueError, match="ask for at most 38"): generate(runner, [[1, 2]], 39)


def test_its_cache_goes_back_and_forks(model, runner):
    cache = runner.new_cache(torch.tensor([0, 2]), 30)
    ids_BT = torch.randint(320, (2, 12))
    first = runner(ids_BT, cache)
    assert cache.k_LBGSK.shape == (1, 2, 2, 12, 16) == cache.v_LBGSK.shape
    cache.past = 5
    assert_close(runner(ids_BT[:,5:], cache), first[:,5:], atol=1e-5, rtol=0)
    twin = cache.fork([1, 1, 0])
    before = cache.k_LBGSK.clone()
    after = runner(torch.full((3, 1), 9), twin)
    assert torch.equal(cache.k_LBGSK, before) and cache.past == 12 and twin.past == 13
    assert_close(after[2], runner(torch.full((2, 1), 9), cache)[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="31 positions do not fit into a cache of max_len=30"): runner(torch.zeros(2, 18, dtype=torch.long), cache)


# --- the bundle -------------------------------------------------------------------------------------------------------

def test_a_bundle_says_what_was_measured(made, model):
    bundle = made[0]
    said = read_json(bundle/"bundle.json")
    assert set(said["kinds"]) == {"fp32", "copied"} and all(Parity(**k["parity"]).passes() and k["parity"]["n_prompts"] == 50 and k["bytes"] == (bundle/k["file"]).stat().st_size for k in said["kinds"].values())
    assert set(check_seal(bundle, "bundle", [], "")) == {p.name for p in bundle.iterdir()} - {"manifest.json"}
    assert (bundle/"chat_template.jinja").is_file() and read_json(bundle/"generation_config.json")["pad_token_id"] == said["special_ids"]["pad_token_id"]
    runner,tok = open_bundle(bundle, "copied")
    ids = [[tok.start_id, *tok.encode("How to make bread")]]
    assert torch.equal(generate(runner, ids, 10, temperature=0), generate(model, ids, 10, temperature=0))
    with pytest.raises(UserError, match="has no kind 'fp16': it has fp32, copied"): open_bundle(bundle, "fp16")


def stand_in(made, change=None):
    "An exporter that takes the finished file, and may spoil it."
    def export(model, path, *, opset=None):
        shutil.copyfile(made[0]/"fp32.onnx", path)
        return tampered(path, change) if change else path
    return export


def test_a_failing_gate_writes_nothing(made, home, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(d, "export_onnx", stand_in(made, scale))
    with pytest.raises(UserError, match="is not the model, nothing was written"): save_bundle(home, tmp_path/"new")
    assert not (tmp_path/"new").exists()
    before = (bundle/"manifest.json").read_bytes()
    with pytest.raises(UserError, match="is not the model, nothing was written"): save_bundle(home, bundle)
    assert (bundle/"manifest.json").read_bytes() == before and open_bundle(bundle)
    assert {p.name for p in tmp_path.iterdir()} == {"bundle"}


@pytest.mark.parametrize("convert,says", [(lambda a, b: b.write_bytes(a.read_bytes()[:3000]), "does not open as an ONNX model"), (lambda a, b: tampered(shutil.copyfile(a, b), partial(scale, by=float("nan"))), "numbers that are none"),
    (lambda a, b: None, "is missing")], ids=["cut", "nan", "lazy"])
def test_a_bad_converter_writes_nothing(convert, says, made, home, tmp_path, monkeypatch):
    monkeypatch.setattr(d, "export_onnx", stand_in(made))
    with pytest.raises(UserError, match=says): save_bundle(home, tmp_path/"new", kinds=dict(bad=convert), texts=GATE_PROMPTS[:2])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fp32", "a/b", "..\\x", ""])
def test_names_of_kinds(name, home, tmp_path):
    with pytest.raises(UserError, match="a kind can't be called"): save_bundle(home, tmp_path/"new", kinds={name:shutil.copyfile})


def test_what_is_in_the_way_stays(home, tmp_path):
    (tmp_path/"diary").mkdir()
    (tmp_path/"diary"/"monday.txt").write_text("dear diary")
    for save in (save_bundle, save_genai):
        with pytest.raises(UserError, match="is no bundle: give another name"): save(home, tmp_path/"diary")
    assert (tmp_path/"diary"/"monday.txt").read_text() == "dear diary"


def test_bundles_are_made_of_decoders(home, tmp_path):
    save_hf(filled(Encoder(EVEN)), tmp_path/"bert", special_ids=dict(eos_token_id=3))
    copy_tokenizer(home, tmp_path/"bert")
    with pytest.raises(UserError, match="holds a Encoder: bundles are made of decoders"): save_bundle(tmp_path/"bert", tmp_path/"new")
    assert not (tmp_path/"new").exists()


@pytest.mark.parametrize("name", ["fp32.onnx", "tokenizer.json", "bundle.json", "genai_config.json", "chat_template.jinja"])
def test_one_bit_is_seen(name, bundle):
    data = bytearray((bundle/name).read_bytes())
    data[len(data)//2] ^= 1
    (bundle/name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is corrupt, its checksum is not that in manifest.json"): open_bundle(bundle)


def test_a_wrong_hash_is_seen(bundle):
    manifest = read_json(bundle/"manifest.json")
    manifest["sha256"]["fp32.onnx"] = "0"*64
    write_json(bundle/"manifest.json", manifest)
    with pytest.raises(UserError, match="fp32.onnx is corrupt"): open_bundle(bundle)


@pytest.mark.parametrize("share", [0, .001, .3, .9, .999])
def test_a_cut_file_with_a_right_hash(share, bundle):
    data = (bundle/"fp32.onnx").read_bytes()
    (bundle/"fp32.onnx").write_bytes(data[:int(share*len(data))])
    seal(bundle, "bundle", [p.name for p in bundle.iterdir() if p.name != "manifest.json"])
    with pytest.raises(UserError, match="fp32.onnx (does not open as an ONNX model|does not say how large|has no input)"): open_bundle(bundle)


def test_gone_files_and_other_files(bundle, runner, tmp_path):
    stranger = tampered(shutil.copyfile(bundle/"fp32.onnx", tmp_path/"stranger.onnx"), lambda proto: proto.ClearField("metadata_props"))
    with pytest.raises(UserError, match="does not say how large its model is"): OnnxDecoder(stranger)
    with pytest.raises(UserError, match="has no input token_type_ids, it is of another kind: it takes input_ids, attention_mask"): OnnxEncoder(bundle/"fp32.onnx")
    with pytest.raises(UserError, match="none.onnx is missing"): OnnxDecoder(tmp_path/"none.onnx")
    (bundle/"tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json is missing"): open_bundle(bundle)
    with pytest.raises(UserError, match="manifest.json is missing"): open_bundle(tmp_path)


# --- GenAI ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def genai(): return pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")


def test_genai_runs_the_same_file(genai, made, model):
    runner = GenaiDecoder(made[0])
    assert check_parity(model, runner, [[1, 2, 3]], batches=()).passes()
    cache = runner.new_cache(torch.tensor([0]), 40)
    said = generate(runner, [[1, 2, 3]], 20, temperature=0, cache=cache)
    assert torch.equal(generate(runner, said[:,:8], 15, temperature=0, cache=cache), said) and torch.equal(said, generate(model, [[1, 2, 3]], 20, temperature=0))
    with pytest.raises(ValueError, match="2 texts at once"): generate(runner, [[1], [2]], 3)
    with pytest.raises(ValueError, match="can't be forked"): cache.fork([0, 0])
    with pytest.raises(ValueError, match="41 positions do not fit into context_len=40"): runner(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(RuntimeError, match="Invalid regex"): genai.Tokenizer(runner.model) # as the chapter says; the day it can, tell the chapter


def test_genai_of_its_builder(genai, home, model, tmp_path):
    pytest.importorskip("transformers")
    runner,tok = open_genai(save_genai(home, tmp_path/"fast", texts=GATE_PROMPTS[:8]))
    ids = [[tok.start_id, *tok.encode("Once upon a time")]]
    assert torch.equal(generate(runner, ids, 15, temperature=0), generate(model, ids, 15, temperature=0))
    data = next((tmp_path/"fast").glob("*.onnx.data"))
    with open(data, "r+b") as f: f.write(b"\x01")
    with pytest.raises(UserError, match="is corrupt, its checksum is not that in manifest.json"): open_genai(tmp_path/"fast")


def negate(proto):
    table = next(c for c in proto.graph.initializer if list(c.dims) == [CFG.vocab_size, CFG.d_model])
    table.CopyFrom(onnx.numpy_helper.from_array(-3*onnx.numpy_helper.to_array(table), table.name))


@pytest.mark.parametrize("change,precision", [(scale, "fp32"), (negate, "int4")])
def test_genai_is_gated(change, precision, genai, made, home, tmp_path, monkeypatch):
    def build(home, folder, precision):
        folder.mkdir()
        for name in ("fp32.onnx", "genai_config.json"): shutil.copyfile(made[0]/name, folder/name)
        tampered(folder/"fp32.onnx", change)
    monkeypatch.setattr(d, "_build_genai", build)
    with pytest.raises(UserError, match="is not the model, nothing was written"): save_genai(home, tmp_path/"new", precision, texts=GATE_PROMPTS[:2])
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="precision='int2': give one of fp32, int4"): save_genai(home, tmp_path/"new", "int2")


def test_heads_that_genai_does_not_know(genai, home, tmp_path):
    save_hf(filled(Decoder(EVEN)), tmp_path/"odd", special_ids=dict(eos_token_id=3))
    copy_tokenizer(home, tmp_path/"odd")
    with pytest.raises(UserError, match="d_head=8 is not a multiple of 16"): save_genai(tmp_path/"odd", tmp_path/"new")


def test_a_damaged_genai_folder(genai, bundle):
    (bundle/"genai_config.json").write_text(json.dumps(dict(model={})), encoding="utf-8")
    with pytest.raises(UserError, match="does not open in GenAI"): GenaiDecoder(bundle)

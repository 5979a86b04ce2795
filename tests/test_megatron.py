"Megatron-Core: the layouts, the same numbers on one and on two ranks, checkpoints that any number of ranks reads, its dataset, its command line."
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llm_scratch.architecture import Decoder, ModelConfig, load_model, n_params
from llm_scratch.core import UserError
from llm_scratch.families import UntiedDecoder
from llm_scratch.interchange import load_hf
from llm_scratch.megatron import (check_tp, cpu_cuda_stubs, export_megatron, find_checkpoint, from_megatron, import_megatron, index_bytes, load_megatron, megatron_args, megatron_config,
                                  megatron_join, megatron_names, megatron_shard, model_parallel, padded_vocab, to_megatron, write_indexed)
from llm_scratch.tokenization import Shards, save_tokenizer, train_bpe, write_shards

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed: pip install 'llm_scratch[megatron]'")
ROOT = Path(__file__).resolve().parent.parent
CFG = ModelConfig(vocab_size=300, context_len=32, n_layers=2, n_heads=4, n_kv_heads=2, d_model=48, d_ff=80, d_head=16, rope_theta=5000., norm_eps=1e-5)


def drawn(kind, cfg:ModelConfig, seed:int=0)->Decoder:
    "Weights that all matter."
    model, rng = kind(cfg), torch.Generator().manual_seed(seed)
    for p in model.parameters(): p.data = (p.ndim == 1) + .1*torch.randn(p.shape, generator=rng)
    return model


def same(a:dict, b:dict)->bool: return a.keys() == b.keys() and all(p.dtype == b[name].dtype and torch.equal(p, b[name]) for name, p in a.items())


# --- names, layouts, slices -----------------------------------------------------------------------------------------

@st.composite
def configs(draw):
    G, per, K = draw(st.integers(1, 4)), draw(st.integers(1, 4)), 2*draw(st.integers(1, 4))
    return ModelConfig(vocab_size=draw(st.integers(1, 400)), context_len=8, n_layers=draw(st.integers(1, 3)), n_heads=G*per, n_kv_heads=G, d_model=draw(st.integers(1, 24)),
                       d_ff=draw(st.integers(1, 30)), d_head=K)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs(), st.sampled_from([Decoder, UntiedDecoder]), st.sampled_from([1, 2, 3, 4]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_there_and_back_is_the_same_for_any_sizes(cfg, kind, tp, dtype):
    state = drawn(kind, cfg).to(dtype).state_dict()
    try: check_tp(cfg, tp)
    except ValueError:
        with pytest.raises(ValueError, match="tp="): to_megatron(state, cfg, tp)
        return
    whole = to_megatron(state, cfg, tp)
    assert list(whole) == list(megatron_names(cfg.n_layers, kind is Decoder))
    assert same(from_megatron(whole, cfg), state)
    shards = [megatron_shard(whole, rank, tp) for rank in range(tp)]
    assert same(megatron_join(shards), whole)
    of_ranks = [sum(p.numel() for name, p in s.items() if p.ndim == 2) for s in shards]
    assert set(of_ranks) == {sum(p.numel() for p in whole.values() if p.ndim == 2)//tp}  # every matrix is cut into equal parts
    for name in whole:
        if whole[name].ndim == 1: assert all(torch.equal(s[name], whole[name]) for s in shards)  # and no norm is


def test_a_rank_has_whole_groups_of_heads_and_equal_pieces_of_gate_and_up():
    cfg = replace(CFG, n_heads=6, n_kv_heads=2, d_head=2, d_ff=4)
    state = {name: torch.zeros_like(p) for name, p in drawn(Decoder, cfg).state_dict().items()}
    for kind, first in (("q", 100), ("k", 200), ("v", 300)):
        p = state[f"layers.1.self_attn.{kind}_proj.weight"]
        p += first + torch.arange(len(p))[:, None]//2  # the number of the head
    state["layers.1.mlp.gate_proj.weight"] += 10 + torch.arange(4)[:, None]
    state["layers.1.mlp.up_proj.weight"] += 20 + torch.arange(4)[:, None]
    state["layers.1.mlp.down_proj.weight"] += torch.arange(4)
    state["layers.1.self_attn.o_proj.weight"] += torch.arange(12)//2
    ranks = [megatron_shard(to_megatron(state, cfg, 2), rank, 2) for rank in range(2)]
    at = "decoder.layers.1."
    rows = lambda rank, name: ranks[rank][at+name+".weight"][:, 0].tolist()
    assert rows(0, "self_attention.linear_qkv") == [x for x in (100, 101, 102, 200, 300) for _ in range(2)]
    assert rows(1, "self_attention.linear_qkv") == [x for x in (103, 104, 105, 201, 301) for _ in range(2)]
    assert (rows(0, "mlp.linear_fc1"), rows(1, "mlp.linear_fc1")) == ([10, 11, 20, 21], [12, 13, 22, 23])
    assert ranks[1][at+"mlp.linear_fc2.weight"][0].tolist() == [2, 3]
    assert ranks[1][at+"self_attention.linear_proj.weight"][0].tolist() == [3, 3, 4, 4, 5, 5]  # the heads whose queries it has


def test_padding_is_zero_and_goes_away_again():
    assert [padded_vocab(v, tp) for v, tp in ((1, 1), (128, 1), (129, 1), (256, 2), (257, 2), (50257, 8))] == [128, 128, 256, 256, 512, 51200]
    state = drawn(UntiedDecoder, CFG).state_dict()
    whole = to_megatron(state, CFG, 2)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert whole[name].shape == (512, 48) and not whole[name][300:].any()
        whole[name][300:] = 7.  # trained
    assert same(from_megatron(whole, CFG), state)


def test_transformer_engine_spells_norms_otherwise():
    state = drawn(Decoder, CFG).state_dict()
    fused = {name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight").replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"): p
             for name, p in to_megatron(state, CFG, 2).items()}
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in fused
    extra = {"decoder.layers.0.mlp.linear_fc1._extra_state": None}
    assert same(from_megatron(fused | extra, CFG), state)
    assert same(megatron_join([megatron_shard(fused, rank, 2) for rank in range(2)]), fused)
    assert len(megatron_shard(fused, 1, 2)["decoder.layers.0.mlp.linear_fc1.layer_norm_weight"]) == 48


def test_what_comes_back_can_be_saved_at_once(tmp_path):
    "Parts of one matrix in memory of their own, one after the other: safetensors refuses anything else."
    whole = to_megatron(drawn(Decoder, CFG).state_dict(), CFG)
    back = from_megatron(whole, CFG)
    save_file(back, tmp_path/"x.safetensors")
    for p in back.values(): p.zero_()
    assert all(p.any() for p in whole.values())


def test_another_model_is_refused_by_the_name_of_a_tensor():
    state = drawn(Decoder, CFG).state_dict()
    whole = to_megatron(state, CFG)
    without = lambda d, name: {n: p for n, p in d.items() if n != name}
    for call, says in ((lambda: to_megatron(without(state, "layers.1.self_attn.q_norm.weight"), CFG), "layers.1.self_attn.q_norm.weight is missing"),
                       (lambda: to_megatron(state | {"layers.0.mlp.gate_proj.bias": torch.zeros(80)}, CFG), "layers.0.mlp.gate_proj.bias is not a part"),
                       (lambda: to_megatron(state, replace(CFG, n_layers=1)), "layers.1"),
                       (lambda: from_megatron(without(whole, "decoder.final_layernorm.weight"), CFG), "decoder.final_layernorm.weight is missing"),
                       (lambda: from_megatron(whole | {"decoder.layers.0.mlp.router.weight": torch.zeros(1, 1)}, CFG), "router.weight is not a part"),
                       (lambda: from_megatron(whole, replace(CFG, vocab_size=400)), r"word_embeddings.weight has shape \(384, 48\), and \(400, 48\)"),
                       (lambda: from_megatron(whole, replace(CFG, d_head=8)), "linear_qkv.weight has shape")):
        with pytest.raises(UserError, match=says): call()
    for tp, says in ((0, "tp=0"), (8, "n_heads=4"), (3, "d_ff=80")):
        with pytest.raises(ValueError, match=says): check_tp(CFG, tp)
    with pytest.raises(ValueError, match="d_ff=81"): check_tp(replace(CFG, d_ff=81), 2)
    with pytest.raises(ValueError, match="n_kv_heads=3"): check_tp(replace(CFG, n_heads=6, n_kv_heads=3), 2)
    check_tp(replace(CFG, n_kv_heads=1), 4)
    with pytest.raises(ValueError, match="the 10 rows of all queries, keys and values"): check_tp(replace(CFG, n_heads=3, n_kv_heads=1, d_head=2, d_ff=81), 3)
    with pytest.raises(ValueError, match="160 rows, and world=32 asks for a multiple of 64"): megatron_shard({"mlp.linear_fc1.weight": torch.zeros(160, 3)}, 0, 32)
    with pytest.raises(ValueError, match="10 columns, and world=4"): megatron_shard({"mlp.linear_fc2.weight": torch.zeros(3, 10)}, 0, 4)


# --- two ranks: one launch for all of it ----------------------------------------------------------------------------

PROGRAM = """
import json, sys, warnings
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_megatron import CFG, Decoder, UntiedDecoder, drawn
from llm_scratch.core import UserError
from llm_scratch.megatron import megatron_gap, megatron_logits, megatron_model, megatron_shard, model_parallel, restore_megatron, save_megatron, to_megatron

def failure(f):
    try: f()
    except Exception as e: return type(e).__name__ + ": " + str(e)

def filled(kind, cfg, tp, rank, **more):
    model = megatron_model(cfg, is_tied=kind is Decoder, tp=tp, **more)
    model.load_state_dict(megatron_shard(to_megatron(drawn(kind, cfg).state_dict(), cfg, tp), rank, tp), strict=False)
    return model

def main():
    folder, said = Path({folder!r}), dict(gaps={{}}, read={{}}, random=[])
    dist.init_process_group("gloo")
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))
    for tp in (1, 2):
        with model_parallel(tp) as rank:
            for kind in (Decoder, UntiedDecoder):
                for G in (4, 2, 1): said["gaps"][f"tp {{tp}}, {{kind.__name__}}, {{G}} key-value heads"] = megatron_gap(drawn(kind, replace(CFG, n_kv_heads=G)), ids, tp)
                save_megatron(filled(kind, CFG, tp, rank), folder/f"{{kind.__name__}} tp {{tp}}", iteration=tp)
                before = torch.get_rng_state()
                megatron_model(CFG, is_tied=kind is Decoder, tp=tp)
                said["random"].append(torch.equal(before, torch.get_rng_state()))
    for tp in (1, 2):
        with model_parallel(tp) as rank:
            for kind in (Decoder, UntiedDecoder):
                wanted = drawn(kind, CFG)(ids).detach()
                for wrote in (1, 2):
                    empty = megatron_model(CFG, is_tied=kind is Decoder, tp=tp)
                    restore_megatron(empty, folder/f"{{kind.__name__}} tp {{wrote}}")
                    said["read"][f"{{kind.__name__}}, {{wrote}} by {{tp}}"] = (megatron_logits(empty, ids)[...,:300]-wanted).abs().max().item()
    with model_parallel(2) as rank:
        again = filled(Decoder, CFG, 2, rank)
        said["there"] = failure(lambda: save_megatron(again, folder/"Decoder tp 2", iteration=2))
        (folder/"killed"/".iter_0000000.new").mkdir(parents=True, exist_ok=True)
        (folder/"killed"/".iter_0000000.new"/"half").touch()
        dist.barrier()
        save_megatron(filled(Decoder, CFG, 2, rank, params_dtype=torch.bfloat16, bf16=True).bfloat16(), folder/"killed")
        from megatron.core import dist_checkpointing
        if rank == 0: (folder/"apart").mkdir()
        dist.barrier() # as newer writers do: every layer by itself, gate and up apart
        dist_checkpointing.save(again.sharded_state_dict(metadata=dict(singleton_local_shards=True)), str(folder/"apart"))
    def three():
        with model_parallel(3): pass
    said["three"] = failure(three)
    with model_parallel(2): pass # and a failure leaves nothing behind
    of_all = [None, None]
    dist.all_gather_object(of_all, said)
    if dist.get_rank() == 0: Path({out!r}).write_text(json.dumps(of_all))
    dist.destroy_process_group()

if __name__ == "__main__": main()
"""


def run_all(command:list, limit:float=400, **more)->subprocess.CompletedProcess:
    "Run a program; nothing that it started outlives the limit: torchrun's workers lead groups of their own."
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **more) as p:
        try: out, _ = p.communicate(timeout=limit)
        except BaseException:
            for child in [*psutil.Process(p.pid).children(recursive=True), p]: child.kill()
            raise
    return subprocess.CompletedProcess(command, p.returncode, out)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "What two processes say, and the folder into which they saved."
    folder = tmp_path_factory.mktemp("megatron")
    (folder/"two.py").write_text(PROGRAM.format(tests=str(ROOT/"tests"), folder=str(folder/"saved"), out=str(folder/"said.json")), encoding="utf-8")
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    done = run_all([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(folder/"two.py")], env=env, cwd=folder)
    assert done.returncode == 0, done.stdout[-4000:]
    return json.loads((folder/"said.json").read_text()), folder/"saved"


def test_logits_loss_and_gradients_are_ours_on_one_rank_and_on_two(two):
    for said in two[0]:
        assert len(said["gaps"]) == 12
        for case, gap in said["gaps"].items():
            assert max(gap["logits"], gap["loss"], gap["gradients"]) < 5e-6, (case, gap)
            assert (gap["unsummed"] > 1e-3) == case.startswith("tp 2"), (case, gap)  # the norms within attention know their own heads only


def test_checkpoints_are_read_by_any_number_of_ranks(two):
    for said in two[0]:
        assert len(said["read"]) == 8 and max(said["read"].values()) < 5e-6, said["read"]
        assert said["random"] == [True]*4  # building a model draws no number of yours


@pytest.mark.parametrize("kind", [Decoder, UntiedDecoder])
@pytest.mark.parametrize("tp", [1, 2])
def test_torch_alone_reads_them_bit_for_bit(two, kind, tp):
    before = torch.get_rng_state()
    model = load_megatron(two[1]/f"{kind.__name__} tp {tp}", CFG)
    assert torch.equal(before, torch.get_rng_state())
    assert type(model) is kind and not model.training and same(model.state_dict(), drawn(kind, CFG).state_dict())
    assert find_checkpoint(two[1]/f"{kind.__name__} tp {tp}").name == f"iter_000000{tp}"


def test_the_way_home_needs_no_megatron(two):
    code = f"""
import sys
sys.modules["megatron"] = None
from llm_scratch.architecture import ModelConfig
from llm_scratch.megatron import load_megatron
print(sum(p.numel() for p in load_megatron({str(two[1]/"Decoder tp 2")!r}, {CFG!r}).parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.strip() == str(n_params(CFG)), done.stderr


def test_layers_by_themselves_and_gate_and_up_apart_are_understood(two):
    import torch.distributed.checkpoint as dcp
    names = dcp.FileSystemReader(two[1]/"apart").read_metadata().state_dict_metadata
    assert "decoder.layers.1.mlp.linear_fc1.weight_w" in names
    assert same(load_megatron(two[1]/"apart", CFG).state_dict(), drawn(Decoder, CFG).state_dict())


def test_bfloat16_stays_and_what_a_killed_save_left_goes(two):
    path = find_checkpoint(two[1]/"killed")
    assert not (path/"half").exists() and not list(path.parent.glob(".iter*")) and (path.parent/"latest_checkpointed_iteration.txt").read_text() == "0"
    assert same(load_megatron(two[1]/"killed", CFG).state_dict(), drawn(Decoder, CFG).bfloat16().state_dict())


def test_failures_of_two_ranks_are_one_line_on_each(two):
    for said in two[0]:
        assert said["there"].startswith("UserError: ") and "iter_0000002 is there" in said["there"]
        assert said["three"] == "UserError: tp=3 does not divide 2 processes: start a multiple of 3"


def test_what_is_no_checkpoint_is_named(two, tmp_path):
    for folder, says in ((tmp_path, "is no checkpoint of Megatron-LM"), (tmp_path/"none", "is no checkpoint")):
        with pytest.raises(UserError, match=says): find_checkpoint(folder)
    (tmp_path/"latest_checkpointed_iteration.txt").write_text("12\n")
    with pytest.raises(UserError, match="iter_0000012 is no distributed checkpoint"): find_checkpoint(tmp_path)
    (tmp_path/"latest_checkpointed_iteration.txt").write_text("release")
    os.symlink(find_checkpoint(two[1]/"Decoder tp 1"), tmp_path/"release")
    assert find_checkpoint(tmp_path) == tmp_path/"release" == find_checkpoint(tmp_path/"release")
    with pytest.raises(UserError, match="shape"): load_megatron(tmp_path, replace(CFG, d_model=64))


# --- the places where it touches the machine ------------------------------------------------------------------------

def test_stubs_are_for_machines_without_cuda_and_go_away(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    real = torch.cuda.current_device, torch.cuda.synchronize
    with pytest.raises(ZeroDivisionError), cpu_cuda_stubs():
        assert torch.cuda.current_device() == torch.device("cpu") and torch.cuda.synchronize() is None
        1/0  # noqa: B018
    assert (torch.cuda.current_device, torch.cuda.synchronize) == real
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES="), cpu_cuda_stubs(): pass


def test_without_the_extra_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.models.gpt", None)
    for call in (lambda: megatron_config(CFG), lambda: model_parallel().__enter__()):
        with pytest.raises(UserError, match=r"pip install 'llm_scratch\[megatron\]'"): call()
    to_megatron(drawn(Decoder, CFG).state_dict(), CFG)  # layouts need no Megatron


def test_neither_package_hides_the_other(tmp_path):
    code = "import llm_scratch.megatron as ours, megatron.core as theirs; print(ours.__file__); print(theirs.__file__)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=200, check=True)
    ours, theirs = map(Path, done.stdout.split())
    assert ours == ROOT/"llm_scratch"/"megatron.py" and "site-packages" in theirs.parts


@pytest.mark.skipif(torch.cuda.is_available(), reason="the bridge works on CPUs: start with CUDA_VISIBLE_DEVICES= to test it here")
def test_a_block_that_fails_gives_the_process_group_back():
    with pytest.raises(ZeroDivisionError), model_parallel(): 1/0  # noqa: B018
    assert not torch.distributed.is_initialized()
    with model_parallel() as rank: assert rank == 0 and torch.distributed.get_world_size() == 1
    assert not torch.distributed.is_initialized()


# --- tokens ---------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(docs=st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=9), min_size=1, max_size=12), vocab=st.sampled_from([1001, 2**16, 2**16+1, 2**31]))
def test_megatron_reads_every_document(docs, vocab):
    import tempfile

    from megatron.core.datasets.indexed_dataset import IndexedDataset
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_indexed([np.array(d) for d in docs], Path(folder)/"x", vocab)
        for mmap in (True, False):
            read = IndexedDataset(str(prefix), mmap=mmap)
            assert [read[i].tolist() for i in range(len(read))] == docs and len(read) == len(docs)
            assert read.document_indices.tolist() == list(range(len(docs)+1)) and read.index.dtype is (np.uint16 if vocab <= 2**16 else np.int32)
            del read


def test_the_largest_ids_fit(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    for vocab in (2**16, 2**16+1, 151936):
        write_indexed([[0, vocab-1], [vocab-1]], tmp_path/str(vocab), vocab)
        read = IndexedDataset(str(tmp_path/str(vocab)))  # kept: what it gives are views of its file and die with it
        assert read[0].tolist() == [0, vocab-1]


def test_shards_become_a_dataset_file_by_file(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    rng = random.Random(0)
    docs = [[rng.randrange(300) for _ in range(rng.randrange(40))] for _ in range(30)]
    shards = Shards(write_shards(docs, tmp_path/"shards", 299, 300, "digest", shard_tokens=64))
    assert len(shards.header["files"]) > 5
    write_indexed(shards.docs(), tmp_path/"x", 300)
    read = IndexedDataset(str(tmp_path/"x"))
    assert [read[i].tolist() for i in range(len(read))] == [[299, *d] for d in docs]
    assert (tmp_path/"x.idx").read_bytes() == index_bytes([len(d)+1 for d in docs], "<u2")


def test_places_go_beyond_four_gigabytes():
    index = index_bytes([2**30, 2**30, 5], "<i4")
    assert np.frombuffer(index, "<i8", 3, 34+12).tolist() == [0, 2**32, 2**33]


def test_a_bad_document_leaves_what_was_there(tmp_path):
    write_indexed([[1, 2]], tmp_path/"x", 10)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for docs, says in (([[1], [3, 10]], "document 1 has ids from 3 to 10"), ([[1], [-1, 4]], "document 1 has ids from -1 to 4"), ([[1], []], "document 1 has no ids"), ([], "0 documents")):
        with pytest.raises(ValueError, match=says): write_indexed(docs, tmp_path/"x", 10)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# --- command line, there and back -----------------------------------------------------------------------------------

FIELDS = {"num-layers": "num_layers", "hidden-size": "hidden_size", "ffn-hidden-size": "ffn_hidden_size", "num-attention-heads": "num_attention_heads", "num-query-groups": "num_query_groups",
          "kv-channels": "kv_channels", "normalization": "normalization", "norm-epsilon": "layernorm_epsilon", "attention-dropout": "attention_dropout", "hidden-dropout": "hidden_dropout",
          "tensor-model-parallel-size": "tensor_model_parallel_size"}


def parsed(words:list[str])->tuple[dict, set]:
    values, flags, words = {}, set(), list(words)
    while words:
        name = words.pop(0).removeprefix("--")
        if words and not words[0].startswith("--"): values[name] = words.pop(0)
        else: flags.add(name)
    return values, flags


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs(), st.booleans(), st.sampled_from([1, 2]), st.integers(1, 10**6))
def test_every_flag_says_what_the_config_says(cfg, is_tied, tp, theta):
    from megatron.core.transformer.transformer_config import TransformerConfig
    cfg = replace(cfg, n_heads=4*cfg.n_heads, d_ff=4*cfg.d_ff, n_kv_heads=2*cfg.n_kv_heads, rope_theta=float(theta), norm_eps=3e-7)
    values, flags = parsed(megatron_args(cfg, is_tied=is_tied, tp=tp))
    assert [int(values[n]) for n in ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups", "kv-channels")] == [
        cfg.n_layers, cfg.d_model, cfg.d_ff, cfg.n_heads, cfg.n_kv_heads, cfg.d_head]
    assert [int(values[n]) for n in ("vocab-size", "seq-length", "max-position-embeddings", "rotary-base", "make-vocab-size-divisible-by")] == [cfg.vocab_size, cfg.context_len, cfg.context_len, theta, 128]
    assert float(values["norm-epsilon"]) == 3e-7 and float(values["rotary-percent"]) == 1 and values["position-embedding-type"] == "rope"
    assert (values["tensor-model-parallel-size"], values["pipeline-model-parallel-size"]) == (str(tp), "1")
    assert flags == {"group-query-attention", "qk-layernorm", "swiglu", "disable-bias-linear", *["untie-embeddings-and-output-weights"]*(not is_tied), *["sequence-parallel"]*(tp > 1)}
    theirs = megatron_config(cfg, tp)
    for flag, field in FIELDS.items(): assert type(getattr(theirs, field))(values[flag]) == getattr(theirs, field), flag
    assert theirs.qk_layernorm and theirs.gated_linear_unit and theirs.activation_func is torch.nn.functional.silu and not theirs.add_bias_linear and not theirs.rotary_interleaved
    known = {f.name: f for f in fields(TransformerConfig)}
    for flag, field in FIELDS.items():  # the names that Megatron-LM makes of these fields
        named = known[field].metadata.get("argparse_meta", {}).get("arg_names", ["--" + field.replace("_", "-")])
        assert f"--{flag}" in named
    assert known["add_bias_linear"].metadata["argparse_meta"]["arg_names"] == ["--disable-bias-linear"] and "sequence_parallel" in known and "qk_layernorm" in known


def test_what_megatron_cannot_be_told_is_refused():
    for call, says in ((lambda: megatron_args(replace(CFG, rope_theta=.5)), "rope_theta=0.5"), (lambda: megatron_args(CFG, pp=3), "pp=3 does not divide n_layers=2"), (lambda: megatron_args(CFG, tp=3), "tp=3")):
        with pytest.raises(ValueError, match=says): call()
    assert parsed(megatron_args(CFG, pp=2))[0]["pipeline-model-parallel-size"] == "2"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    texts = ["Boil the rice, add salt and stir it well.", "Chop the onion, fry it in the oil until it is soft, and serve it with bread."]*3
    tok = train_bpe(texts, 300)
    save_tokenizer(tok, folder/"tokenizer")
    write_shards(map(tok.encode, texts), folder/"shards", tok.eot_id, 300, tok.digest)
    export_megatron(CFG, folder/"tokenizer", Shards(folder/"shards"), folder/"for_cluster", tp=2)
    return folder


def test_what_is_exported_is_all_that_is_needed(exported):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    out = exported/"for_cluster"
    assert (out/"model.args").read_text().split("\n") == [*megatron_args(CFG, tp=2), ""]
    assert json.loads((out/"model.json").read_text())["config"] == asdict(CFG)
    shards = Shards(exported/"shards")
    read = IndexedDataset(str(out/"tokens"))
    assert np.array_equal(np.concatenate(list(read)), shards[:])
    assert (out/"tokenizer"/"tokenizer.json").read_bytes() == (exported/"tokenizer"/"tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="vocab_size=300, the model 384"): export_megatron(replace(CFG, vocab_size=384), exported/"tokenizer", shards, exported/"bad")
    with pytest.raises(UserError, match="no tokenizer"): export_megatron(CFG, exported/"shards", shards, exported/"bad")
    assert not (exported/"bad").exists()


@pytest.mark.parametrize("kind", [Decoder, UntiedDecoder])
def test_a_checkpoint_comes_home_and_others_open_it(two, exported, tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'llm_scratch[interchange]'")
    import_megatron(two[1]/f"{kind.__name__} tp 2", exported/"for_cluster", tmp_path/"home")
    ours, ids = drawn(kind, CFG), torch.randint(300, (2, 20))
    assert same(load_hf(tmp_path/"home").state_dict(), ours.state_dict())
    if kind is Decoder: assert same(load_model(tmp_path/"home").state_dict(), ours.state_dict())
    hub = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/"home")
    with torch.no_grad(): torch.testing.assert_close(hub(ids).logits, ours(ids), atol=2e-5, rtol=0)
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path/"home")
    assert hub.config.eos_token_id == tok.eos_token_id == 297 and sum(p.numel() for p in hub.parameters()) == n_params(CFG) + (kind is UntiedDecoder)*300*48


def test_only_an_export_leads_home(two, tmp_path):
    with pytest.raises(UserError, match="model.json is missing"): import_megatron(two[1]/"Decoder tp 1", tmp_path, tmp_path/"home")
    (tmp_path/"model.json").write_text("{}")
    with pytest.raises(UserError, match="is not of export_megatron"): import_megatron(two[1]/"Decoder tp 1", tmp_path, tmp_path/"home")


def test_their_tokenizer_class_gives_our_ids(exported):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'llm_scratch[interchange]'")
    from megatron.core.tokenizers import MegatronTokenizer

    from llm_scratch.tokenization import load_tokenizer
    ours = load_tokenizer(exported/"tokenizer")
    theirs = MegatronTokenizer.from_pretrained(tokenizer_path=str(exported/"for_cluster"/"tokenizer"), metadata_path=dict(library="huggingface"))
    for text in ("Boil the rice", "  two  spaces\n\nand 12345 ünïcode 🍲"): assert theirs.tokenize(text) == ours.encode(text)
    assert (theirs.eod, theirs.vocab_size) == (ours.eot_id, ours.vocab_size)


def test_the_script_starts_megatron_with_all_of_it(exported, tmp_path):
    script = ROOT/"deploy"/"cluster"/"megatron"/"train.sh"
    (tmp_path/"torchrun").write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    (tmp_path/"torchrun").chmod(0o755)
    (tmp_path/"pretrain_gpt.py").touch()
    env = dict(PATH=f"{tmp_path}:/usr/bin:/bin", HOME=str(tmp_path), MEGATRON=str(tmp_path), EXPORT=str(exported/"for_cluster"), SAVE=str(tmp_path/"a folder"), NODES="4", SLURM_NODEID="3", START="")
    run = lambda **more: subprocess.run(["bash", script], env=env | more, capture_output=True, text=True, timeout=60, check=False)
    done = run()
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("\n")[:-1]
    at = words.index(str(tmp_path/"pretrain_gpt.py"))
    assert parsed(words[:at])[0] == dict(nproc_per_node="8", nnodes="4", node_rank="3", master_addr="localhost", master_port="29500")
    model = megatron_args(CFG, tp=2)
    assert words[at+1:at+1+len(model)] == model
    values, flags = parsed(words[at+1:])
    assert values["data-path"] == str(exported/"for_cluster"/"tokens") and Path(values["data-path"] + ".idx").is_file()
    assert values["tokenizer-model"] == str(exported/"for_cluster"/"tokenizer") and values["tokenizer-type"] == "HuggingFaceTokenizer"
    assert values["save"] == values["load"] == str(tmp_path/"a folder") and values["ckpt-format"] == "torch_dist" and "bf16" in flags and "pretrained-checkpoint" not in values
    assert len(words) == len(set(w for w in words if w.startswith("--"))) + len([w for w in words if not w.startswith("--")])  # nothing is said twice
    assert "--pretrained-checkpoint\n/start" in run(START="/start").stdout
    missing = run(EXPORT=str(tmp_path))
    assert missing.returncode == 1 and "model.args is missing: set EXPORT" in missing.stderr and not missing.stdout

"Models that leave and come in by the command line: folders in the Hugging Face layout, GGUF files, other people's tokenizers."
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_pipeline import call, copy, finished, tree  # noqa: F401, two of them are fixtures

from llm_scratch.architecture import Decoder, ModelConfig, init_weights, load_model
from llm_scratch.assistant import add_tokens, save_assistant
from llm_scratch.core import UserError
from llm_scratch.families import Encoder, llama_block
from llm_scratch.interchange import load_hf, load_special_ids, save_hf
from llm_scratch.pipeline import export_hf, find_assistant, import_hf, open_imported, stream_text
from llm_scratch.tokenization import HubTokenizer, load_tokenizer

PROMPT = "generate", r"# Rice\n\n", "--temperature", "0", "--max-new-tokens", "9", "--run"


def test_out_and_in_again_the_model_says_the_same(finished, tmp_path):  # noqa: F811
    truth = call(*PROMPT, finished)
    assert truth[0] == 0 and len(truth[1]) > 12
    for args in (["export-hf", "hub", "--run", finished], ["import-hf", tmp_path/"hub", "--run", "back"],
                 ["export-gguf", "whole.gguf", "--run", "back", "--dtype", "f32"], ["import-gguf", tmp_path/"whole.gguf", "--run", "again"]):
        status, out, err = call(args[0], tmp_path/args[1], "--run", tmp_path/args[3], *args[4:])
        assert status == 0 and out == "" and len(err.splitlines()) == 1, err
    assert call(*PROMPT, tmp_path/"back") == call(*PROMPT, tmp_path/"again") == truth
    assert {p.name for p in tmp_path.iterdir()} == {"hub", "back", "again", "whole.gguf", "Modelfile"}
    assert "FROM ./whole.gguf" in (tmp_path/"Modelfile").read_text() and 'stop "<|endoftext|>"' in (tmp_path/"Modelfile").read_text()
    transformers = pytest.importorskip("transformers")
    toks = [transformers.AutoTokenizer.from_pretrained(tmp_path/name) for name in ("hub", "again/model")]
    assert toks[0]("Boil 2 eggs").input_ids == toks[1]("Boil 2 eggs").input_ids and toks[0].eos_token == toks[1].eos_token == "<|endoftext|>"
    assert (tmp_path/"hub"/"README.md").read_bytes() == (finished/"model"/"README.md").read_bytes()  # the card goes along
    assert {p.name for p in (tmp_path/"hub").iterdir()} == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert tree(tmp_path/"hub") | {"README.md": 0} == {k: tree(tmp_path/"back"/"model").get(k, 0) for k in tree(tmp_path/"hub")}


def test_transformers_opens_what_leaves_in_shards(finished, tmp_path):  # noqa: F811
    transformers = pytest.importorskip("transformers")
    assert call("export-hf", tmp_path/"hub", "--run", finished, "--max-shard-bytes", 50_000)[0] == 0
    assert len(list((tmp_path/"hub").glob("*.safetensors"))) > 1
    ours, theirs = load_hf(finished/"model"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path/"hub")
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path/"hub")
    ids = torch.tensor([[load_tokenizer(finished/"tokenizer").eot_id, *tok("Boil the rice.").input_ids]])
    with torch.no_grad(): torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)
    assert theirs.generation_config.eos_token_id == load_tokenizer(finished/"tokenizer").eot_id


def somebodys(folder:Path, finished:Path, make=Decoder, **ids)->Path:
    "A folder as from a hub: a model of another family, with our tokenizer in it."
    tok = load_tokenizer(finished/"tokenizer")
    cfg = ModelConfig(tok.vocab_size, context_len=40, n_layers=2, n_heads=2, n_kv_heads=2, d_model=32, d_ff=64, d_head=16)
    model = make(cfg, block=llama_block) if make is Decoder else make(cfg)
    for p in init_weights(model, 0).parameters(): p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))/8
    save_hf(model, folder, special_ids=ids)
    shutil.copyfile(finished/"tokenizer"/"tokenizer.json", folder/"tokenizer.json")
    return folder


def test_an_assistant_of_others_talks_and_stays_one_as_a_gguf(finished, tmp_path):  # noqa: F811
    "The chat template goes along through every door; a model without one continues what is typed."
    model, tok = add_tokens(load_model(finished/"model"), load_tokenizer(finished/"tokenizer"))
    save_assistant(model, tok, tmp_path/"theirs")
    for args in (["import-hf", "theirs", "--run", "run"], ["export-gguf", "theirs.gguf", "--run", "run", "--dtype", "f32"], ["import-gguf", "theirs.gguf", "--run", "again"]):
        status, _, err = call(args[0], tmp_path/args[1], "--run", tmp_path/args[3], *args[4:])
        assert status == 0, err
    said = [call("chat", "--run", tmp_path/name, "--temperature", "0", typed="How do I boil rice?\n\n") for name in ("run", "again")]
    assert said[0] == said[1] and said[0][0] == 0 and "Ask" in said[0][2]
    assert find_assistant(tmp_path/"run") == tmp_path/"run"/"model" and find_assistant(finished) is None
    with pytest.raises(UserError, match="chat-dpo"): find_assistant(finished, "chat-dpo")


def test_a_llama_writes_and_has_its_own_first_and_last_id(finished, tmp_path):  # noqa: F811
    import_hf(somebodys(tmp_path/"llama", finished, bos_token_id=3, eos_token_id=5), tmp_path/"run")
    model, tok = open_imported(tmp_path/"run")
    assert (tok.start_id, tok.eot_id) == (3, 5)
    read = []
    model.register_forward_pre_hook(lambda m, args: read.extend(args[0][0].tolist()))
    list(stream_text(model, tok, "Rice", 1, temperature=0))
    assert read == [3, *load_tokenizer(finished/"tokenizer").encode("Rice")]
    assert call(*PROMPT, tmp_path/"run")[0] == 0
    assert call("export-gguf", tmp_path/"m.gguf", "--run", tmp_path/"run")[0] == 2  # id 5 is an ordinary byte: no token's name ends a text
    assert not (tmp_path/"m.gguf").exists()


def test_several_last_ids_are_kept_in_the_folder(finished, tmp_path):  # noqa: F811
    folder = somebodys(tmp_path/"llama", finished, bos_token_id=3, eos_token_id=5)
    said = json.loads((folder/"generation_config.json").read_text()) | dict(eos_token_id=[5, 7])
    (folder/"generation_config.json").write_text(json.dumps(said))
    import_hf(folder, tmp_path/"run")
    assert load_special_ids(tmp_path/"run"/"model")["eos_token_id"] == [5, 7] and open_imported(tmp_path/"run")[1].eot_id == 5


def test_what_does_not_write_comes_in_and_says_so(finished, tmp_path):  # noqa: F811
    assert isinstance(import_hf(somebodys(tmp_path/"bert", finished, Encoder), tmp_path/"run"), Encoder)
    for verb in (["generate", "x"], ["export-gguf", tmp_path/"m.gguf"]):
        status, _, err = call(*verb, "--run", tmp_path/"run")
        assert status == 2 and "Encoder" in err and len(err.splitlines()) == 1
    assert call("export-hf", tmp_path/"out", "--run", tmp_path/"run")[0] == 0 and isinstance(load_hf(tmp_path/"out"), Encoder)


@pytest.mark.parametrize("verb, said", [(["run"], "imported model hub"), (["evaluate"], "imported model hub"), (["pretrain"], "imported model hub"),
                                        (["import-hf", "hub"], "is in use"), (["export-gguf", "m.gguf", "--dtype", "q3"], "q3")], ids=lambda v: v[0] if isinstance(v, list) else "")
def test_what_an_imported_run_cannot_do_is_one_line(finished, tmp_path, monkeypatch, verb, said):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    export_hf(finished, "hub")
    import_hf("hub", "run")
    before = tree(tmp_path)
    status, out, err = call(*verb, "--run", "run")
    assert status == 2 and said in err and len(err.splitlines()) == 1 and tree(tmp_path) == before


@pytest.mark.parametrize("name, spoil, said", [
    ("nothing", lambda f: shutil.rmtree(f), "is not a folder"), ("no_tokenizer", lambda f: (f/"tokenizer.json").unlink(), "tokenizer"),
    ("pickle", lambda f: (f/"model.safetensors").rename(f/"pytorch_model.bin"), "pytorch_model.bin"),
    ("cut", lambda f: (f/"model.safetensors").write_bytes((f/"model.safetensors").read_bytes()[:-9]), "model.safetensors"),
    ("scaled", lambda f: (f/"config.json").write_text(json.dumps(json.loads((f/"config.json").read_text()) | dict(rope_scaling=dict(rope_type="yarn", factor=4.)))), "yarn"),
], ids=["nothing", "no_tokenizer", "pickle", "cut", "scaled"])
def test_a_folder_that_is_not_right_leaves_nothing_behind(finished, tmp_path, name, spoil, said):  # noqa: F811
    folder = somebodys(tmp_path/"llama", finished, eos_token_id=5)
    spoil(folder)
    status, _, err = call("import-hf", folder, "--run", tmp_path/"run")
    if name == "no_tokenizer" and status == 0: status, _, err = call(*PROMPT, tmp_path/"run")
    assert status == 2 and said in err and len(err.splitlines()) == 1
    if name != "no_tokenizer": assert not (tmp_path/"run").exists()


def test_a_tokenizer_of_another_kind_is_refused_by_name(finished, tmp_path):  # noqa: F811
    saved = json.loads((finished/"tokenizer"/"tokenizer.json").read_text())
    (tmp_path/"tokenizer.json").write_text(json.dumps(saved | dict(decoder=dict(type="Metaspace", replacement="▁", prepend_scheme="always", split=True))))
    with pytest.raises(UserError, match="puts text together by Metaspace"): HubTokenizer(tmp_path, 0)


def test_a_hub_tokenizer_is_ours_on_any_text(finished):  # noqa: F811
    ours = load_tokenizer(finished/"tokenizer")
    hub = HubTokenizer(finished/"tokenizer", ours.eot_id)
    for text in ("", " ", "crème brûlée 🍮 日本\n\n\t1234", "don't\r\n", "a"*50):
        assert hub.encode(text) == ours.encode(text) and hub.decode(ours.encode(text)) == text
    assert hub.token_bytes == ours.token_bytes and hub.vocab_size == ours.vocab_size

"The table of benchmarks/run.py has every row, and a peer that does other work is found out before it is timed. No test looks at a clock."
import os
import re
import runpy
import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from llm_scratch.core import UserError

SCRIPT = Path(__file__).resolve().parent.parent/"benchmarks"/"run.py"
WORK = "learn 400 tokens", "encode that text", "forward and backward", "Muon step", "write "
ROWS = ("learn 400 tokens", "tokenizers"), ("encode that text ", "tokenizers"), ("encode that text ", "tiktoken"), ("learn 400 tokens from that text, compiled", "tokenizers"), ("encode that text, compiled", "tokenizers"), ("encode that text, compiled", "tiktoken")
PEERS = "PyTorch", "transformers", "transformers, float32", "without guesses", "llama.cpp, f32", "llama.cpp, q8_0"  # of the last


@pytest.fixture
def bench():
    spec = spec_from_file_location("benchmarks_run", SCRIPT)
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def command(monkeypatch, capsys):
    "What a script prints, run as from a shell, but by this Python, which has torch and compiled functions at hand."
    def run(script, *options):
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"): monkeypatch.setenv(name, os.environ.get(name, "1"))  # what the script sets is unset afterwards
        monkeypatch.setattr(sys, "argv", [str(script), *options])
        monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out
    return run


def test_one_command_one_table(command):
    for peer in ("transformers", "numba", "xllamacpp", "tiktoken"): pytest.importorskip(peer)
    out = command(SCRIPT, "--rounds", "1", "--tiny")
    head, legend, *_ = [line for line in out.splitlines() if line]
    assert "torch" in head and "on 1 thread" in legend
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")][2:]
    work = [*(w for w, _ in ROWS), *WORK[2:], *WORK[-1:]*(len(PEERS)-1)]
    assert [f"{r[0]} "[:len(w)] for r, w in zip(rows, work, strict=True)] == work, out
    assert [r[1] for r in rows[:len(ROWS)]] == [peer for _, peer in ROWS]
    assert [r[1].startswith(peer) for r, peer in zip(rows[len(ROWS)+2:], PEERS, strict=True)] == [True]*6
    for _, _, ours, theirs, ratio in rows:
        assert all(re.fullmatch(r"([\d.e-]+) \(\1–\1\)", cell) for cell in (ours, theirs)) and float(ratio) > 0  # one round: least, median and most are one
    assert "skipped" not in out


# --- a peer that does other work ------------------------------------------------------------------------------------

def learns_other_tokens(monkeypatch, bench):
    import tokenizers
    monkeypatch.setattr(tokenizers.trainers, "BpeTrainer", partial(tokenizers.trainers.BpeTrainer, min_frequency=30))


def lacks_the_last_merge(monkeypatch, bench):
    monkeypatch.setattr(bench, "to_tokenizers_json", lambda tok, real=bench.to_tokenizers_json: (full := real(tok)) | dict(model=full["model"] | dict(merges=full["model"]["merges"][:-1])))


def has_another_weight(monkeypatch, bench):
    transformers = pytest.importorskip("transformers")

    def loaded(*args, real=transformers.Qwen3ForCausalLM.from_pretrained, **kwargs):
        model = real(*args, **kwargs)
        model.model.norm.weight.data *= 1.01
        return model
    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "from_pretrained", loaded)


def writes_another_word(monkeypatch, bench):
    monkeypatch.setattr(bench, "in_pytorch", lambda *a, real=bench.in_pytorch: [*real(*a)[:-1], 0])


def makes_five_rounds(monkeypatch, bench):
    monkeypatch.setattr(torch.optim, "Muon", lambda *a, real=torch.optim.Muon, **k: real(*a, **k | dict(ns_steps=5)))


SPOILERS = learns_other_tokens, lacks_the_last_merge, has_another_weight, makes_five_rounds, writes_another_word
PART = "tokenizing", "tokenizing", "modelling", "optimizing", "decoding"  # of the table that each spoils


@pytest.mark.parametrize("work, spoil, part", list(zip(WORK, SPOILERS, PART)), ids=[s.__name__ for s in SPOILERS])
def test_a_peer_that_does_other_work_is_not_timed(bench, monkeypatch, capsys, work, spoil, part):
    monkeypatch.setattr(bench, "PAIRS", {pairs: package for pairs, package in bench.PAIRS.items() if pairs.__name__ == part})
    spoil(monkeypatch, bench)
    with pytest.raises(AssertionError, match=f"^{work}.*ours and .* differ"): bench.main(["--rounds", "1", "--tiny"])
    assert f"| {work}" not in capsys.readouterr().out


# --- what may be missing --------------------------------------------------------------------------------------------

def test_a_peer_that_is_missing_leaves_its_rows_out(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "transformers" else name)
    bench.main(["--rounds", "1", "--tiny"])
    out = capsys.readouterr().out
    assert "| encode that text, compiled | tiktoken |" in out
    assert [w for w in WORK if f"| {w}" in out] == [WORK[0], WORK[1], WORK[3], WORK[4]]
    assert out.splitlines()[-2:] == [f"skipped {pairs}: transformers is not installed: pip install transformers" for pairs in ("modelling", "decoding")]


def test_text_that_cannot_be_fetched_leaves_its_rows_out(bench, monkeypatch, capsys):
    def offline(names): raise UserError(f"could not fetch {', '.join(names)}")
    monkeypatch.setattr(bench, "load_corpus", offline)
    monkeypatch.setattr(bench, "PAIRS", {bench.tokenizing: "tokenizers"})
    bench.main(["--rounds", "1"])
    assert capsys.readouterr().out.splitlines()[-1] == "skipped tokenizing: could not fetch recipes, parables, encyclopaedia"


def test_no_rounds_are_refused(bench, capsys):
    with pytest.raises(SystemExit): bench.main(["--rounds", "0"])
    assert "give 1 or more" in capsys.readouterr().err


# --- how large a vocabulary -----------------------------------------------------------------------------------------

def test_the_vocabulary_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    from datasets import Dataset

    spec = spec_from_file_location("benchmarks_vocabulary", SCRIPT.with_name("vocabulary.py"))
    study = module_from_spec(spec)
    spec.loader.exec_module(study)
    words = "the cook stirs a hot soup and then rests while salt and pepper wait for their turn in the pan".split()
    rng = __import__("random").Random(0)
    texts = [" ".join(rng.choices(words, k=60)) + f" {i}." for i in range(60)]
    corpus = Dataset.from_dict(dict(text=texts, source=["recipes", "parables"]*30))
    monkeypatch.setattr(study, "load_corpus", lambda: corpus)
    monkeypatch.setattr(study, "split_corpus", lambda corpus, n_validation: dict(train=corpus.select(range(40)), validation=corpus.select(range(40, 60))))
    monkeypatch.setattr(study, "BOOK", ("recipes", "parables"))
    monkeypatch.setattr(study, "HELD", 5)
    monkeypatch.setattr(study, "SETTINGS", (("book", 1, .5, (300, 320)), ("recipes", 1, .5, (300,))))
    out = tmp_path/"try.json"
    monkeypatch.setattr(sys, "argv", ["vocabulary.py", "--seeds", "2", "--tiny", "--out", str(out)])
    study.main()
    rows = study.json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(r["seed"], r["text"], r["vocab_size"]) for r in rows] == [(s, t, v) for s in range(2) for t, v in (("book", 300), ("book", 320), ("recipes", 300))]
    for r in rows:
        cfg = study.decoder_config(1, r["vocab_size"], study.T)
        spent = study.training_flops_per_token(cfg, study.T)*r["n_tokens"]
        assert abs(spent - .0005e12) <= study.training_flops_per_token(cfg, study.T)*study.T*study.B  # equal operations, to an update
        assert 0 < r["bits_per_byte"] < 20 and r["n_docs"] == (10 if r["text"] == "book" else 5) and 0 < r["ids_learned_10"] <= r["ids_learned"] <= 1
    assert "| book, depth 1, 0.0005 |" in capsys.readouterr().out
    out.write_text(study.json.dumps(dict(rows=rows[:4])), encoding="utf-8")
    study.main()
    assert len(re.findall("^seed ", capsys.readouterr().out, re.M)) == 2  # only what was missing
    assert study.json.loads(out.read_text(encoding="utf-8"))["rows"] == rows


# --- the stages of cleaning ---------------------------------------------------------------------------------------

def test_every_stage_of_cleaning_has_its_row(command):
    for package in ("resiliparse", "trafilatura", "ftfy", "py3langid"): pytest.importorskip(package)
    out = command(SCRIPT.with_name("cleaning.py"), "--tiny")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("| ") and "MB/s" not in line]
    stages = {name.partition(",")[0] for name, *_ in rows}
    assert {"FromHtml", "repair_unicode", "GopherRules", "RepetitionRules", "C4Rules", "KeepLanguages", "QualityFilter", "WordFilter", "Decontaminate", "RedactPII", "Fingerprint", "resiliparse", "trafilatura"} <= stages
    assert all(float(speed) > 0 and float(mb) > 0 for _, mb, speed, _ in rows)


def test_the_trainers_of_the_lesson_have_their_rows(command):
    pytest.importorskip("numba")
    out = command(SCRIPT.with_name("trainers.py"), "--texts", "5", "--merges", "20", "--rounds", "1")
    assert re.findall(r"^\| (\w+) \| [\d.e-]+ \| [\d,]+ times", out, re.M) == ["naive", "counted", "indexed", "compiled"]


# --- quality and tokens per CPU-second -----------------------------------------------------------------------------------

def loaded(name:str, monkeypatch):
    "A script as a module."
    spec = spec_from_file_location(f"benchmarks_{name}", SCRIPT.with_name(f"{name}.py"))
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return module


@pytest.fixture
def quality(monkeypatch): return loaded("quality", monkeypatch)


@pytest.fixture
def throughput(monkeypatch): return loaded("throughput", monkeypatch)


@pytest.fixture
def gpu(monkeypatch): return loaded("gpu", monkeypatch)


def sonnets(path:Path)->Path:
    path.write_text("".join(f"{a} shall {b} the {c},\n" for a in ("who", "he", "she", "all", "none") for b in ("take", "give", "burn", "hide") for c in ("sun", "rose", "king", "worm", "crown", "sea"))*4, encoding="utf-8")
    return path


def test_quality_has_all_rows_and_goes_on_where_it_was(quality, tmp_path, capsys):
    text, out = sonnets(tmp_path/"text.txt"), tmp_path/"q.json"
    ask = ["--tiny", "--data", str(text), "--out", str(out)]
    quality.main([*ask, "--only", "ours"])
    record = quality.json.loads(out.read_text(encoding="utf-8"))
    assert [(r["name"], r["seed"]) for r in record["rows"]] == [(f"ours, {n}", s) for n in ("short", "middle", "long") for s in (0, 1)]
    capsys.readouterr()
    quality.main(ask)
    said, record = capsys.readouterr().out, quality.json.loads(out.read_text(encoding="utf-8"))
    assert len(re.findall(r"^ours, .*seed", said, re.M)) == 0 and len(re.findall(r"^rival, .*, seed", said, re.M)) == len(record["rows"]) - 6
    swept = {r["name"]:r["loss"] for r in record["rows"] if r["seed"] == 0 and re.fullmatch(r"rival, rate [\d.]+", r["name"])}
    best = min(swept, key=swept.get)
    assert len(swept) == 5 and {"rival, rate 0.001", best} == {r["name"] for r in record["rows"] if r["seed"] == 1 and re.fullmatch(r"rival, rate [\d.]+", r["name"])}
    assert [r["name"] for r in record["rows"] if r["name"].startswith(f"{best}, ")] == [f"{best}, 10 updates"]*2 + [f"{best}, our products"]
    quick, usual = (next(r for r in record["rows"] if r["name"] == n and r["seed"] == 0) for n in (f"{best}, our products", best))
    assert abs(quick["loss"] - usual["loss"]) < 2e-3 and quick["n_tokens"] == usual["n_tokens"]  # faster, and the same training
    assert f"| {best} | " in said and (tmp_path/"q.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert len(re.findall("^\\| (ours|rival)", said, re.M)) == len({r["name"] for r in record["rows"]})
    weights = {r["n_weights"] for r in record["rows"]}
    assert max(weights) < 1.1*min(weights)
    quality.main(ask)
    assert quality.json.loads(out.read_text(encoding="utf-8")) == record
    text.write_text("other" + text.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(SystemExit): quality.main(ask)
    assert "is of other text" in capsys.readouterr().err


def test_ours_is_as_large_as_the_rival(quality):
    from llm_scratch.architecture import ModelConfig, n_params
    rival = sum(p.numel() for p in quality.Gpt2(65, 64, 4, 4, 128).parameters())
    assert rival == 65*128 + 64*128 + 4*(12*128**2 + 2*128) + 128
    for r in quality.OURS.values():
        assert .97*rival < n_params(ModelConfig(vocab_size=65, context_len=r.context_len, n_layers=r.n_layers, n_heads=r.n_heads, n_kv_heads=r.n_heads, d_model=r.width, d_ff=r.d_ff, d_head=r.width//r.n_heads)) <= rival


def test_every_held_out_character_is_guessed_once(quality):
    "With a model whose guess is known: what it expects is what came last."
    class Last(torch.nn.Module):
        def forward(self, ids): seen.append(ids.numel()); return torch.nn.functional.one_hot(ids, 5).float()*2
    row, seen = quality.np.random.default_rng(0).integers(5, size=1003).astype("uint8"), []
    nats = quality.held_out_loss(Last(), row, 7)
    same = float((row[1:] == row[:-1]).mean())
    assert sum(seen) == len(row)-1 and abs(nats - (quality.math.log(quality.math.exp(2)+4) - 2*same)) < 1e-5


def test_the_rival_is_as_published(quality):
    r = quality.Gpt2Recipe()
    assert quality.cosine(99, r) == 100/101 and quality.cosine(100, r) == 1 and abs(quality.cosine(1050, r) - .55) < 1e-9 and abs(quality.cosine(2000, r) - .1) < 1e-9
    torch.manual_seed(0)
    model, ids = quality.Gpt2(11, 16, 2, 2, 8), torch.randint(11, (1, 16))
    other = ids.clone()
    other[0, 9:] = (other[0, 9:] + 1) % 11
    a, b = model(ids), model(other)
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.allclose(a[:, 9:], b[:, 9:])  # nothing from the future
    a, b = model(torch.zeros(1, 16, dtype=torch.long))[0, [0, 9]]
    assert not torch.allclose(a, b, atol=1e-4)  # the same token in two places: positions are learned
    text = quality.Text(quality.np.arange(200, dtype="uint8") % 7, quality.np.arange(30, dtype="uint8") % 7, 7)
    runs = [quality.gpt2_run(text, quality.Gpt2Recipe(1, 2, 16, 8, 4, 60, 5), 1e-2, seed) for seed in (0, 0, 1)]
    assert runs[0][2] == runs[1][2] != runs[2][2] and runs[0][2] < .8*quality.math.log(7)


def test_throughput_has_all_rows_and_goes_on_where_it_was(throughput, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    out = tmp_path/"t.json"
    monkeypatch.setattr(throughput, "find_spec", lambda name: None if name == "litgpt" else name)
    throughput.main(["--tiny", "--rounds", "1", "--out", str(out)])
    said, record = capsys.readouterr().out, throughput.json.loads(out.read_text(encoding="utf-8"))
    names = ["ours", "ours, usual products, autograd", "ours, autograd", "transformers, Llama", "transformers, Llama, with our products", "GPT-2-style", "GPT-2-style, with our products"]
    assert [r["way"] for r in record["rows"]] == names and re.findall(r"^\| tiny \| (.*?) \| [\d,]+ \| [\d.]+ \| \d+%", said, re.M) == names
    assert said.splitlines()[-1].startswith("skipped litgpt: litgpt is not installed") and (tmp_path/"t.svg").exists()
    throughput.main(["--tiny", "--rounds", "2", "--out", str(out)])
    again = throughput.json.loads(out.read_text(encoding="utf-8"))
    assert again["rows"][:7] == record["rows"] and [(r["way"], r["round"]) for r in again["rows"][7:]] == [(n, 1) for n in names[3:] + names[:3]]  # others begin
    fast = throughput.speeds(dict(rows=[dict(size="tiny", way="ours", tokens=10, seconds=s) for s in (1, 2, 10)]), throughput.TINY[0])
    assert fast == dict(ours=5)


def stands_still(throughput, size): return throughput.plain(m := throughput.Gpt2(size.cfg.vocab_size, 32, 2, 4, 32), lambda ids: m(ids).detach()*0 + m.embed.weight.sum()*0)


def is_half_as_large(throughput, size): return throughput.plain(m := throughput.Gpt2(size.cfg.vocab_size, 32, 1, 4, 32), m)


@pytest.mark.parametrize("spoil, said", [(stands_still, "does not learn"), (is_half_as_large, "there is nothing to compare")])
def test_a_peer_of_another_kind_is_not_timed(throughput, tmp_path, monkeypatch, spoil, said):
    monkeypatch.setattr(throughput, "PEERS", dict(gpt2=lambda cfg: spoil(throughput, throughput.TINY[0])))
    with pytest.raises(AssertionError, match=said): throughput.main(["--tiny", "--rounds", "1", "--out", str(tmp_path/"t.json")])
    assert not (tmp_path/"t.json").exists()


def test_one_gpu_every_way_learns_the_same_batch(gpu, tmp_path, capsys, monkeypatch):
    "On a CPU, where nothing is really compiled."
    pytest.importorskip("transformers")
    monkeypatch.setitem(gpu.PEERS, "litgpt", lambda cfg: (_ for _ in ()).throw(gpu.UserError("litgpt is not installed")))
    monkeypatch.setattr(gpu, "compile_in_place", lambda *given: True)
    monkeypatch.setattr(gpu.torch, "compile", lambda model: model)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit): gpu.main(["--out", str(tmp_path/"no.json")])
    assert "--tiny runs anywhere" in capsys.readouterr().err and not (tmp_path/"no.json").exists()
    gpu.main(["--tiny", "--out", str(tmp_path/"g.json")])
    record, said = gpu.json.loads((tmp_path/"g.json").read_text(encoding="utf-8")), capsys.readouterr().out
    ways = ["ours", "transformers, Llama", "GPT-2-style"]
    assert [r["way"] for r in record["rows"]] == [*ways, *(f"{w}, compiled" for w in ways)] and all(len(r["speeds"]) == 1 and r["speeds"][0] > 0 for r in record["rows"])
    assert said.count("skipped litgpt") == 2 and len(re.findall(r"^\| (?:ours|transformers|GPT)", said, re.M)) == 6


def test_the_record_of_one_gpu_is_whole(gpu):
    record = gpu.json.loads((SCRIPT.parent.parent/"nbs"/"gpu.json").read_text(encoding="utf-8"))
    assert [len(r["speeds"]) for r in record["rows"]] == [5]*8 and record["n_weights"] == 123_588_864 == gpu.n_params(gpu.GPT2.cfg)
    assert all(abs(r["n_weights"]/record["n_weights"] - 1) < .01 for r in record["rows"])

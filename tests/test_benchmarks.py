"The table of benchmarks/run.py has every row, and a peer that does other work is found out before it is timed. No test looks at a clock."
import re
import subprocess
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


def test_one_command_one_table():
    for peer in ("transformers", "numba", "xllamacpp", "tiktoken"): pytest.importorskip(peer)
    done = subprocess.run([sys.executable, SCRIPT, "--rounds", "1", "--tiny"], capture_output=True, text=True, encoding="utf-8", timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    head, legend, *_ = [line for line in done.stdout.splitlines() if line]
    assert "torch" in head and "on 1 thread" in legend
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("|")][2:]
    work = [*(w for w, _ in ROWS), *WORK[2:], *WORK[-1:]*(len(PEERS)-1)]
    assert [f"{r[0]} "[:len(w)] for r, w in zip(rows, work, strict=True)] == work, done.stdout
    assert [r[1] for r in rows[:len(ROWS)]] == [peer for _, peer in ROWS]
    assert [r[1].startswith(peer) for r, peer in zip(rows[len(ROWS)+2:], PEERS, strict=True)] == [True]*6
    for _, _, ours, theirs, ratio in rows:
        assert all(re.fullmatch(r"([\d.e-]+) \(\1–\1\)", cell) for cell in (ours, theirs)) and float(ratio) > 0  # one round: least, median and most are one
    assert "skipped" not in done.stdout


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


@pytest.mark.parametrize("work, spoil", list(zip(WORK, SPOILERS)), ids=[s.__name__ for s in SPOILERS])
def test_a_peer_that_does_other_work_is_not_timed(bench, monkeypatch, capsys, work, spoil):
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

def test_every_stage_of_cleaning_has_its_row():
    for package in ("resiliparse", "trafilatura", "ftfy", "py3langid"): pytest.importorskip(package)
    done = subprocess.run([sys.executable, SCRIPT.with_name("cleaning.py"), "--tiny"], capture_output=True, text=True, encoding="utf-8", timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("| ") and "MB/s" not in line]
    stages = {name.partition(",")[0] for name, *_ in rows}
    assert {"FromHtml", "repair_unicode", "GopherRules", "RepetitionRules", "C4Rules", "KeepLanguages", "QualityFilter", "WordFilter", "Decontaminate", "RedactPII", "Fingerprint", "resiliparse", "trafilatura"} <= stages
    assert all(float(speed) > 0 and float(mb) > 0 for _, mb, speed, _ in rows)


def test_the_trainers_of_the_lesson_have_their_rows():
    pytest.importorskip("numba")
    done = subprocess.run([sys.executable, SCRIPT.with_name("trainers.py"), "--texts", "5", "--merges", "20", "--rounds", "1"], capture_output=True, text=True, encoding="utf-8", timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\| (\w+) \| [\d.e-]+ \| [\d,]+ times", done.stdout, re.M) == ["naive", "counted", "indexed", "compiled"]

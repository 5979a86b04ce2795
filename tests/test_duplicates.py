"Copies of documents: ours beside datasketch, beside the law over all pairs, and beside itself without Numba; and runs of words that leak."
import pickle
import random
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_scratch import duplicates as D
from llm_scratch.data import Document, shingles
from llm_scratch.duplicates import (EMPTY, Decontaminate, KeepFirst, MinHashing, agreement, candidate_chance, candidate_pairs, choose_bands, duplicate_of, hash_orders,
                                    signatures, stack_arrays, text_key, text_keys)
from llm_scratch.sources import Drop, Report, apply_stages

ODD = "\ud800 \x00 \x1c\x85\u2028 \ufeff İSTANBUL ß ſtraße Ωμέγα 漢字かな e\u0301 ١٢٣ _a_ don't x²½ 𝔘𝔫𝔦 \U0001f600 naïve—co-op"
texts = st.text() | st.lists(st.sampled_from(["the", "Cat", "sat.", "on", "—", "a", "été", "mat\n", "...", "\t"]), max_size=12).map(" ".join)
quick = settings(max_examples=150, deadline=None)


@pytest.fixture(params=["numba", "numpy"])
def way(request, monkeypatch):
    "With machine code and without."
    if request.param == "numpy": monkeypatch.setattr(D, "_compiled", lambda loop: None)
    else: pytest.importorskip("numba")
    return request.param


# --- words and their hashes -----------------------------------------------------------------------------------------

def cut(lines, k):
    data, start, end, n = D._slices(lines, k)
    pieces = iter([bytes(data[s:e]) for s, e in zip(start, end)])
    return [[next(pieces) for _ in range(m)] for m in n]


@quick
@given(st.lists(texts, max_size=5), st.integers(1, 6))
@example([ODD, "", ODD*2, " x", "x "], 3)
@example([], 2)
@example(["\n"], 1)
@example(["a\nb\n\nc", "d"], 2)
def test_slices_are_the_shingles_of_chapter_03(some, k):
    got = cut(list(map(D._line, some)), k)
    assert len(got) == len(some)
    for text, own in zip(some, got):
        words = re.findall(r"\w+", text.lower())
        assert own == [" ".join(words[i:i+k]).encode() for i in range(max(len(words)-k+1, min(len(words), 1)))]
        if len(words) >= k: assert {s.decode() for s in own} == shingles(text, k)


@quick
@given(st.lists(st.binary(max_size=70), min_size=1, max_size=6), st.integers(0, 2**32-1))
def test_hashes_are_those_of_the_package(pieces, seed):
    data, end = np.frombuffer(b"".join(pieces)+b"\0", np.uint8), np.cumsum(list(map(len, pieces)))
    start = end - list(map(len, pieces))
    for hash_slices in filter(None, (D._compiled(D._hash_loop), D._hash_each)):
        out = np.zeros(len(pieces), np.uint32)
        hash_slices(data, start, end, np.uint32(seed), out)
        assert out.tolist() == [xxhash.xxh32_intdigest(p, seed) for p in pieces]


def test_a_key_is_the_same_everywhere():
    assert text_key("To be") == text_key(" to\u2003BE\n") == xxhash.xxh3_128_digest(b"to be") != text_key("tobe")
    assert text_keys(["To be", ODD]).astype(">u8").tobytes() == text_key("to be") + text_key(ODD)
    assert text_keys([]).shape == (0, 2)
    code = "from llm_scratch.duplicates import *; print(text_key('Straße').hex(), signatures(['one two three four five six seven'])[0,:3].tolist())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "3", "PYTHONPATH": ":".join(sys.path)}).stdout
    assert said.split(" ", 1) == [text_key("straße").hex(), f"{signatures(['one two three four five six seven'])[0, :3].tolist()}\n"]


# --- signatures -----------------------------------------------------------------------------------------------------

POOL = ["alpha beta gamma delta epsilon zeta eta theta", "alpha beta", "", "?!", ODD, "alpha beta gamma delta epsilon zeta eta iota kappa", "a "*700, "alpha beta gamma"]


@pytest.mark.parametrize("cfg", [MinHashing(), MinHashing(n_perms=7, n_bands=2, shingle=1, seed=9), MinHashing(n_perms=64, n_bands=4, shingle=3, seed=2**31)], ids=str)
def test_signatures_are_datasketchs(way, cfg):
    datasketch = pytest.importorskip("datasketch", minversion="2.0")
    pool = POOL + [" ".join(random.Random(i).choices(POOL[0].split()+["ärger"], k=40+i)) for i in range(249)]  # 257 in all: a batch and one
    a, b = datasketch.MinHash(cfg.n_perms, seed=cfg.seed).permutations
    assert all((x == y).all() for x, y in zip(hash_orders(cfg.n_perms, cfg.seed), (a, b)))
    ours = signatures(pool, cfg)
    for text, row in zip(pool, ours, strict=True):
        m = datasketch.MinHash(cfg.n_perms, seed=cfg.seed, hashfunc=xxhash.xxh32_intdigest)
        words = re.findall(r"\w+", text.lower())
        m.update_batch([" ".join(words[i:i+cfg.shingle]).encode() for i in range(max(len(words)-cfg.shingle+1, min(1, len(words))))])
        assert (m.hashvalues == row).all()
    assert ours.dtype == np.uint32 and (ours[2:4] == EMPTY).all() and not (np.delete(ours, (2, 3), 0) == EMPTY).all(1).any()


def test_no_texts(way):
    assert signatures([]).shape == (0, 128)
    assert duplicate_of(text_keys([]), signatures([])).tolist() == candidate_pairs(signatures([]), 4).tolist() == []
    assert candidate_pairs(signatures([]), 4).shape == (0, 2)


def test_agreement_estimates_the_index():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(400)]
    one, other = " ".join(words[:300]), " ".join(words[100:])  # 200 of 400 words
    est = [agreement(*signatures([one, other], MinHashing(shingle=1, seed=int(s)))) for s in rng.integers(2**31, size=60)]
    assert abs(np.mean(est)-.5) < 4*(.25/128/60)**.5
    assert agreement(np.arange(4), np.array([0, 1, 9, 9])) == .5
    assert agreement(np.eye(2), np.ones(2)).tolist() == [.5, .5]


@pytest.mark.parametrize("fields", [dict(n_bands=0), dict(n_bands=129), dict(threshold=0), dict(threshold=1.01), dict(shingle=0)], ids=str)
def test_dials_that_contradict(fields):
    (name, value), = fields.items()
    with pytest.raises(ValueError, match=f"{name}={value}"): MinHashing(**fields)


def test_bands():
    MinHashing(threshold=1, n_bands=128), MinHashing(n_bands=1, shingle=1)
    for threshold in (.3, .5, .8, .95):
        b = choose_bands(threshold)
        r = 128//b
        assert candidate_chance(threshold, b, r) >= .99 > candidate_chance(threshold, 128//(r+1), r+1)
    assert choose_bands(1.) == 1 and choose_bands(.5, 16, .5) == candidate_ok(.5, 16, .5)
    assert candidate_chance(.5, 2, 3) == 1-(1-.125)**2
    with pytest.raises(ValueError, match=r"threshold=0\.1"): choose_bands(.1, 8)


def candidate_ok(threshold, n_perms, chance):
    "The fewest bands, tried one after the other."
    return next(b for b in range(1, n_perms+1) if n_perms//(n_perms//b) == b and 1-(1-threshold**(n_perms//b))**b >= chance)


# --- whose copy -----------------------------------------------------------------------------------------------------

def pairs_of(sigs, n_bands):
    "All pairs, by looking at all pairs."
    n, r = len(sigs), sigs.shape[1]//n_bands
    return [(i, j) for j in range(n) for i in range(j) if not (sigs[i] == EMPTY).all()
            and any((sigs[i, b*r:(b+1)*r] == sigs[j, b*r:(b+1)*r]).all() for b in range(n_bands))]


def slowly(keys, sigs, need, n_bands):
    "The law: the least index in reach."
    n, least = len(sigs), list(range(len(sigs)))
    edges = [(i, j) for i, j in pairs_of(sigs, n_bands) if (sigs[i] == sigs[j]).sum() >= need]
    edges += [(i, j) for j in range(n) for i in range(j) if (keys[i] == keys[j]).all()]
    for _ in range(n):
        for i, j in edges: least[i] = least[j] = min(least[i], least[j])
    return least


@st.composite
def documents(draw):
    "Keys and signatures with few values, so that much is equal; equal keys have equal signatures, some have no words."
    n, K = draw(st.integers(1, 24)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sigs = rng.integers(0, draw(st.integers(2, 4)), (n, K)).astype(np.uint32)
    sigs[rng.random(n) < .1] = EMPTY
    keys = np.stack([np.arange(n)//2, np.arange(n)%2], 1).astype(np.uint64)  # so that each half alone is often equal
    for i in range(1, n):
        if rng.random() < .2: keys[i], sigs[i] = keys[i-1], sigs[i-1]
    return keys, sigs, draw(st.integers(1, K)), draw(st.integers(1, K))


@pytest.mark.parametrize("compiled", [True, False], ids=["numba", "numpy"])
@quick
@given(documents())
def test_answers_obey_the_law(compiled, case):
    keys, sigs, need, n_bands = case
    real, K = D._compiled, sigs.shape[1]
    try:
        if not compiled: D._compiled = lambda loop: None
        ours = duplicate_of(keys, sigs, need/K, n_bands)
        assert ours.dtype == np.int64 and ours.tolist() == slowly(keys, sigs, need, n_bands)
    finally: D._compiled = real
    assert candidate_pairs(sigs, n_bands).tolist() == [list(p) for p in sorted(pairs_of(sigs, n_bands))]


def heap(n, seed=0):
    "Documents in families of slow change, some of them copied as they are."
    rng, words = random.Random(seed), [f"w{i}" for i in range(3000)]
    found = []
    for _ in range(n):
        text = rng.choice(found).split() if found and rng.random() < .6 else rng.choices(words, k=rng.randint(1, 60))
        for _ in range(rng.choice([0, 0, 1, 1, 2, 9])): text[rng.randrange(len(text))] = rng.choice(words)
        found.append(" ".join(text))
    return found


def test_however_documents_are_cut_and_ordered(way, tmp_path):
    docs = heap(300)
    keys, sigs = text_keys(docs), signatures(docs)
    whose = duplicate_of(keys, sigs)
    assert whose.tolist() == slowly(keys, sigs, 103, 21) and 60 < (whose != np.arange(len(whose))).sum() < 250  # .8 of 128 is 102.4
    for name, whole in (("keys", keys), ("sigs", sigs)):
        for i, part in enumerate(np.split(whole, [0, 5, 144])): np.save(tmp_path/f"{name}{i}.npy", part)
    maps = [stack_arrays([tmp_path/f"{name}{i}.npy" for i in range(4)], tmp_path/f"{name}.npy") for name in ("keys", "sigs")]
    assert all(isinstance(m, np.memmap) and not m.flags.writeable and (m == whole).all() for m, whole in zip(maps, (keys, sigs)))
    assert (duplicate_of(*maps) == whose).all()
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(docs))
        moved = duplicate_of(keys[order], sigs[order])
        assert {tuple(sorted(order[moved == m].tolist())) for m in set(moved.tolist())} == {tuple(np.flatnonzero(whose == m).tolist()) for m in set(whose.tolist())}


def test_a_text_that_stands_there_ten_thousand_times(way):
    "Copies are joined before the bands, where they would be fifty million pairs in each."
    docs = ["one two three four five six"]*10_000 + ["ONE two three, four five six"]*10_000 + ["!"]*10_000 + ["?"]*2
    sigs = signatures(docs)
    for keys in (text_keys(docs), np.arange(60_004, dtype=np.uint64).reshape(-1, 2)):
        whose = duplicate_of(keys, sigs)
        assert set(whose[:20_000]) == {0}
        if keys[0, 0] != 0: assert set(whose[20_000:30_000]) == {20_000} and set(whose[30_000:]) == {30_000}  # equal texts without words are equal, and that is all


def test_pairs_are_datasketchs(way):
    datasketch = pytest.importorskip("datasketch", minversion="2.0")
    sigs, b = signatures(heap(400)), 32
    index = datasketch.MinHashLSH(num_perm=128, params=(b, 4))
    made = [datasketch.MinHash(hashvalues=s, scheme="affine32") for s in sigs]
    for i, m in enumerate(made): index.insert(i, m)
    theirs = sorted([i, j] for j, m in enumerate(made) for i in index.query(m) if i < j)
    assert candidate_pairs(sigs, b).tolist() == theirs and len(theirs) > 100


def test_a_threshold_is_met_exactly(way):
    "In binary, .55 times 100 is a little more than 55."
    sigs = np.zeros((2, 100), np.uint32)
    sigs[1, 55:] = 1
    for threshold, first in ((.55, 0), (.56, 1)): assert duplicate_of(text_keys("ab"), sigs, threshold, 50).tolist() == [0, first]


def test_what_the_pass_does_not_take(tmp_path):
    keys, sigs = text_keys("abc"), signatures(list("abc"))
    with pytest.raises(ValueError, match="2 keys and 3 signatures"): duplicate_of(keys[:2], sigs)
    with pytest.raises(ValueError, match="threshold=1.5"): duplicate_of(keys, sigs, 1.5)
    with pytest.raises(ValueError, match="n_bands=500"): duplicate_of(keys, sigs, .5, 500)
    np.save(tmp_path/"keys.npy", keys), np.save(tmp_path/"sigs.npy", sigs)
    with pytest.raises(ValueError, match="2 parts with rows of 2 kinds"): stack_arrays([tmp_path/"keys.npy", tmp_path/"sigs.npy"], tmp_path/"all.npy")
    with pytest.raises(ValueError, match="0 parts"): stack_arrays([], tmp_path/"all.npy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["keys.npy", "sigs.npy"]


def test_a_folder_of_signatures_is_not_changed(way):
    docs = heap(60)
    keys, sigs = text_keys(docs), signatures(docs)
    keys.flags.writeable = sigs.flags.writeable = False
    duplicate_of(keys, sigs), candidate_pairs(sigs, 8)


def test_the_first_stays():
    docs = [Document(t, "toy", f"toy/{i}", {}) for i, t in enumerate(["To be", "or", "to  BE", "or not", "TO BE"])]
    report = Report()
    assert [d.id for d in apply_stages(docs, [KeepFirst()], report)] == ["toy/0", "toy/1", "toy/3"]
    assert report.drops() == {("KeepFirst", "equal to an earlier document"): (2, 11, ("toy/2", "toy/4"))}
    assert repr(KeepFirst()) == "KeepFirst()" and KeepFirst()(docs[0]) is docs[0]  # another stream, another memory


# --- leaks ----------------------------------------------------------------------------------------------------------

POEM = "The owl and the pussycat went to sea in a beautiful pea green boat, they took some honey and plenty of money".split()


@pytest.mark.parametrize("n", [13, 10, 8])
def test_a_run_and_no_less(way, n):
    guard = Decontaminate.against(dict(poem=[" ".join(POEM)]), n=n)
    for i in range(len(POEM)-n+1):
        name, run = guard.find(f"So? {' - '.join(POEM[i:i+n]).upper()}! Or not.")
        assert name == "poem" and run == " ".join(re.findall(r"\w+", " ".join(POEM[i:i+n]).lower()))
        assert guard.find(f"so {' '.join(POEM[i:i+n-1])} or not") is None
    assert len(guard.keys) == len(POEM)-n+1 and guard.lengths == (n,)


def test_short_texts_are_looked_for_whole(way):
    eight, twelve = " ".join(POEM[:8]), " ".join(POEM[5:17])
    guard = Decontaminate.against(dict(a=[eight, twelve, "Why?", ""], b=["...", "one two three four five six seven"], c=[eight, " ".join(POEM)]))
    assert (guard.lengths, guard.n_short) == ((13, 12, 8), 4)
    for text, name in ((eight, "a"), (twelve, "a"), (" ".join(POEM[:13]), "c"), (" ".join(POEM[:7]), None), (" ".join(POEM[6:17]), None), ("", None), ("Why?", None)):
        assert (guard.find(f"x, {text} y") or (None,))[0] == name
    tiny = Decontaminate.against(dict(q=["Why?"]), shortest=1)
    assert tiny.find("Say why!") == ("q", "why") and tiny.find("whys") is None


def test_a_stage(way):
    guard = Decontaminate.against(dict(poem=[" ".join(POEM)], other=["one two three four five six seven eight nine ten eleven twelve thirteen fourteen"]))
    leak, clean = (Document(t, "web", "web/1", dict(a=1)) for t in (" ".join(POEM), "a b c"))
    assert guard(leak) == Drop("quotes poem") and guard(clean) is clean
    again = pickle.loads(pickle.dumps(guard))
    assert again(leak) == Drop("quotes poem") and repr(again) == repr(guard)
    assert len(pickle.dumps(guard)) < 10*len(guard.keys) + 800
    others = [replace(guard, keys=guard.keys+1), replace(guard, owners=1-guard.owners)]
    assert len({repr(g) for g in (guard, *others)}) == 3 and repr(guard).startswith("Decontaminate(poem, other: 12 runs of 13 words, 0 texts too short, ")


@quick
@given(st.lists(texts, min_size=1, max_size=4), texts, st.integers(1, 4))
def test_what_is_found_is_common(sets, text, n):
    if not any(re.search(r"\w", t.lower()) for t in sets): return
    guard = Decontaminate.against(dict(s=sets), n=n, shortest=1)
    wanted = {" ".join(w[i:i+n]) for t in sets if (w := re.findall(r"\w+", t.lower())) for i in range(max(len(w)-n+1, 1))}
    words = re.findall(r"\w+", text.lower())
    common = [r for k in guard.lengths for i in range(len(words)-k+1) if (r := " ".join(words[i:i+k])) in wanted]
    found = guard.find(text)
    assert (found is None) == (not common) and (found is None or found == ("s", common[0]))


def test_a_run_has_two_hashes(way):
    "With 32 bits, a million runs and a page of a thousand words would meet by chance in one page of five."
    guard = Decontaminate.against(dict(poem=[" ".join(POEM)]), n=20)
    runs = [r.encode() for r in shingles(" ".join(POEM), 20)]
    assert guard.keys.tolist() == sorted(xxhash.xxh32_intdigest(r, 0)<<32 | xxhash.xxh32_intdigest(r, 1) for r in runs) and len(runs) == 3


def test_sets_that_guard_nothing():
    for sets in (dict(q=["Why?"]), dict(q=[]), {}):
        with pytest.raises(ValueError, match=f"no text of {'q' if sets else 'no set'} has 8 words"): Decontaminate.against(sets)
    with pytest.raises(ValueError, match="n=5 and shortest=8"): Decontaminate.against(dict(q=[" ".join(POEM)]), n=5)
    with pytest.raises(ValueError, match="shortest=0"): Decontaminate.against(dict(q=[" ".join(POEM)]), shortest=0)


# --- the benchmark --------------------------------------------------------------------------------------------------

def test_the_benchmark_runs():
    for peer in ("datasketch", "rensa", "numba"): pytest.importorskip(peer)
    from pathlib import Path
    script = Path(__file__).resolve().parent.parent/"benchmarks"/"duplicates.py"
    done = subprocess.run([sys.executable, script, "--tiny", "--rounds", "1"], capture_output=True, text=True, encoding="utf-8", timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[2].strip() for line in done.stdout.splitlines() if line.startswith("| pairs")]
    assert rows == ["datasketch", "rensa, R-MinHash"], done.stdout

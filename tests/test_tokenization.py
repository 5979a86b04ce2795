"Byte pairs over any bytes and all of Unicode; three trainers and three encoders that agree; what text cannot forge."
import json
import random
from collections import Counter
from itertools import pairwise

import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch.data import tiny_corpus
from llm_scratch.tokenization import PATTERN, SPECIALS, HubTokenizer, Tokenizer, load_tokenizer, save_tokenizer, to_tokenizers_json, train_bpe, train_merges, utf8_bytes

TEXTS = tiny_corpus()["text"][:]
SPLIT = regex.compile(PATTERN).findall
HARD = ["", " ", "   ", "\n", "\r\n\r\n", " \t\x0b\x0c ", "a \r\n b", "x\n\n  y", "don't DON'T we'LL I'VE 'ſ", "12345 6 78", "!!??\n\n", "日本語のテキスト", "crème brûlée 🍮\u200d👩", "\x00\x1c\x85\u2028\u3000",
        "a"*3000, "ab"*700, " "*500, " "*500 + "x", "\n"*300, "<|endoftext|>", "<|im_start|>user<|im_end|>", "salt <|endoftext|><|endoftext|> pepper", "<|endoftext", "\ufffd\ufeff"]


def slowly(texts, n):
    "The definition: count every pair of every chunk, merge the most frequent, the smaller ids first."
    words, merges = [list(c.encode()) for t in texts for c in SPLIT(t)], []
    while len(merges) < n and (counts := Counter(p for w in words for p in pairwise(w))):
        merges.append(min(counts, key=lambda p: (-counts[p], p)))
        words = [replaced(w, merges[-1], 255+len(merges)) for w in words]
    return merges


def replaced(ids, pair, new):
    out = []
    for t in ids:
        if out and (out[-1], t) == pair: out[-1] = new
        else: out.append(t)
    return out


def encoded(merges, text):
    "The definition: every merge in its order, on every chunk."
    out = []
    for chunk in SPLIT(text):
        ids = list(chunk.encode())
        for i, pair in enumerate(merges): ids = replaced(ids, pair, 256+i)
        out += ids
    return out


@pytest.fixture(scope="module")
def tok(): return train_bpe(TEXTS, 600)


@pytest.fixture(scope="module")
def hub(tok):
    theirs = tokenizers.Tokenizer.from_str(json.dumps(to_tokenizers_json(tok)))
    theirs.encode_special_tokens = True
    return theirs


def in_tiktoken(tok): return tiktoken.Encoding("ours", pat_str=PATTERN, mergeable_ranks={b: i for i, b in enumerate(tok.token_bytes[:tok.eot_id])}, special_tokens=tok.special_ids)


# --- learning ---------------------------------------------------------------------------------------------------------

few_letters = st.lists(st.text("ab \n", max_size=60), max_size=4)


@given(few_letters, st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_merges_are_the_definitions(texts, n): assert train_merges(texts, n) == slowly(texts, n)


@given(st.lists(st.text(max_size=30), max_size=3))
@settings(max_examples=100, deadline=None)
def test_merges_of_any_text(texts): assert train_merges(texts, 20) == slowly(texts, 20)


def test_merges_of_recipes(): assert train_merges(TEXTS[:6], 150) == slowly(TEXTS[:6], 150)


def test_the_digest_of_old_runs_stays(tok):
    "Runs on disk name their tokenizer by this: a trainer that breaks ties otherwise, or another pattern, orphans them."
    assert tok.digest == "864e83a7cbd9b379cba710aca299d5307d93ded8ba6d050b862610aa1f141dc2"


@given(few_letters, st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_learned_tokens_differ_in_their_bytes(texts, n):
    "Or neither `tokenizer.json` nor tiktoken could hold them."
    tok = Tokenizer(train_merges(texts, n))
    assert len(set(tok.token_bytes)) == tok.vocab_size


def test_another_trainer_can_be_passed_in():
    calls = []
    tok = train_bpe(TEXTS, 300, learn=lambda texts, n: (calls.append(n), train_merges(texts, n))[1])
    assert calls == [300-256-3] and tok.digest == train_bpe(TEXTS, 300).digest


# --- there and back ---------------------------------------------------------------------------------------------------

def test_every_character_comes_back(tok):
    "All 1,112,064 that UTF-8 can hold: alone in batches, and between letters."
    numbers = [*range(0xD800), *range(0xE000, 0x110000)]
    assert len(numbers) == 1_112_064
    for i in range(0, len(numbers), 2**16):
        batch = "".join(map(chr, numbers[i:i+2**16]))
        assert tok.decode(tok.encode(batch)) == batch
    for text in ("x".join(map(chr, numbers[:50_000])), " ".join(map(chr, numbers[-50_000:]))): assert tok.decode(tok.encode(text)) == text


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_come_back(tok, raw): assert tok.decode_bytes(list(raw)) == raw


@given(st.text())
@settings(max_examples=400, deadline=None)
def test_any_text_comes_back_and_is_encoded_by_the_definition(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text and all(0 <= i < tok.eot_id for i in ids)
    assert ids == encoded(tok.merges, text)


@given(few_letters, st.text("ab ", max_size=40))
@settings(max_examples=150, deadline=None)
def test_what_learned_elsewhere_encodes_by_the_definition(texts, text):
    merges = train_merges(texts, 40)
    assert Tokenizer(merges).encode(text) == encoded(merges, text)


def test_merges_by_hand_are_encoded_by_their_pairs():
    merges = [(97, 98), (98, 99), (97, 257)]  # abc begins with ab, and ab+c was never learned
    assert Tokenizer(merges).encode("abc bc") == [256, 99, 32, 257] == encoded(merges, "abc bc")


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_hard_text(tok, hub, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert ids == encoded(tok.merges, text) == in_tiktoken(tok).encode_ordinary(text) == hub.encode(text).ids


@pytest.mark.parametrize("half", ["\ud800", "ab\udfff", "\ude00\ud83c"])
def test_half_characters_are_named(tok, half):
    bad = next(c for c in half if 0xD800 <= ord(c) < 0xE000)
    for f in (tok.encode, utf8_bytes, lambda t: train_merges([t], 3)):
        with pytest.raises(ValueError, match="half of a surrogate pair") as e: f(half)
        assert repr(bad) in str(e.value) and not isinstance(e.value, UnicodeError)


# --- very long words --------------------------------------------------------------------------------------------------

class Asked(dict):
    "Counts how often it is looked into."
    n = 0

    def __contains__(self, key): self.n += 1; return super().__contains__(key)


def work(tok, chunk):
    watched = Tokenizer(tok.merges)
    watched.rank = Asked(tok.rank)
    assert watched.decode(watched.encode(chunk)) == chunk
    return watched.rank.n


@pytest.mark.parametrize("letters", ["a", "aeionrst", "日本語"])
def test_twice_as_long_a_word_is_twice_the_work(letters):
    rng = random.Random(0)
    chunk = "".join(rng.choices(letters, k=40_000))
    tok = Tokenizer(train_merges([chunk[:5000], "a"*5000], 300))
    half, whole = work(tok, chunk[:20_000]), work(tok, chunk)
    assert 1.8*half < whole < 2.2*half and whole <= 3*len(chunk.encode())
    assert tok.encode(chunk[:2000]) == encoded(tok.merges, chunk[:2000])


def test_a_megabyte_of_one_letter():
    tok = Tokenizer([(97, 97), *((i, i) for i in range(256, 267))])  # each doubles
    ids = tok.encode("a"*10**6)
    assert len(ids) == 10**6//2**12 + bin(10**6 % 2**12).count("1") and tok.decode(ids) == "a"*10**6


# --- what text cannot forge -------------------------------------------------------------------------------------------

@given(st.lists(st.sampled_from([*SPECIALS, "<|", "|>", " ", "salt"]), max_size=8).map("".join))
@settings(max_examples=100, deadline=None)
def test_special_tokens_in_text_are_text(tok, hub, text):
    ids = tok.encode(text)
    assert not {*ids} & {*tok.special_ids.values()} and tok.decode(ids) == text
    assert hub.encode(text).ids == ids == in_tiktoken(tok).encode(text, disallowed_special=())


def test_through_the_saved_folder(tok, tmp_path):
    "`tokenizers` takes a special token's spelling for the token unless told not to; after it is told, its ids are ours."
    folder = save_tokenizer(tok, tmp_path/"tokenizer")
    same = load_tokenizer(folder)
    assert (same.digest, same.special_ids) == (tok.digest, tok.special_ids)
    theirs = tokenizers.Tokenizer.from_file(str(folder/"tokenizer.json"))
    for name, id in tok.special_ids.items():
        text = f"a {name} b"
        assert id in theirs.encode(text).ids and id not in same.encode(text)
        assert HubTokenizer(folder, tok.eot_id).encode(text) == theirs.encode(text).ids  # and this is what it says it does
    theirs.encode_special_tokens = True
    for name in tok.special_ids: assert theirs.encode(f"a {name} b").ids == same.encode(f"a {name} b")


# --- oracles ----------------------------------------------------------------------------------------------------------

def assigned(text):
    "Characters that Unicode 15 knew: the two libraries bring tables of their own, of other years."
    import unicodedata
    return "".join(c for c in text if unicodedata.category(c) != "Cn")


@given(st.text().map(assigned))
@settings(max_examples=300, deadline=None)
def test_ids_are_theirs(tok, hub, text): assert tok.encode(text) == hub.encode(text).ids == in_tiktoken(tok).encode_ordinary(text)


@given(few_letters, st.text("ab ", max_size=40))
@settings(max_examples=100, deadline=None)
def test_ids_of_other_merges_are_theirs(texts, text):
    tok = Tokenizer(train_merges(texts, 40))
    assert tok.encode(text) == tokenizers.Tokenizer.from_str(json.dumps(to_tokenizers_json(tok))).encode(text).ids == in_tiktoken(tok).encode_ordinary(text)

"The compiled splitter, trainer and encoder against chapter 04's, and what happens without Numba."
import random
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch import fastbpe
from llm_scratch.core import UserError
from llm_scratch.data import tiny_corpus
from llm_scratch.fastbpe import FastTokenizer, best_tokenizer, best_trainer, char_kinds, split_fast, train_merges_fast
from llm_scratch.tokenization import PATTERN, Tokenizer, load_tokenizer, save_tokenizer, train_bpe, train_merges

compiled = pytest.mark.skipif(fastbpe.njit is None, reason="there is no Numba here: pip install 'llm_scratch[fast]'")
TEXTS = tiny_corpus()["text"][:]
SPLIT = regex.compile(PATTERN).findall
NUMBERS = [*range(0xD800), *range(0xE000, 0x110000)]
SIGNS = "'''’ſsStTdDmMlLvVrReExX      \n\n\r\t\x0b\x0c\x1c\x85\xa0\u2028\u3000aéßİ日ªⅫ²½1٣0.,!-_\u0300\u200d🍲\x00\U0010ffff"
signs = st.text(st.sampled_from(SIGNS), max_size=30)
few_letters = st.lists(st.text("ab \n", max_size=60), max_size=4)


@pytest.fixture(scope="module")
def tok(): return train_bpe(TEXTS, 600)


@pytest.fixture(scope="module")
def fast(tok): return FastTokenizer(tok)


# --- the splitter -----------------------------------------------------------------------------------------------------

@compiled
@pytest.mark.parametrize("frame", ["{}", "'{}", "'l{}", "'{}e", " {}", "{}a", "1{}1", "!{}", "\n{}", "  {}", "{}  b", "{}\n"])
def test_every_character_is_split_like_the_pattern(frame):
    "All of Unicode, with neighbours that make it choose among the alternatives."
    some = NUMBERS if frame in ("{}", "'{}") else NUMBERS[:0x3000] + NUMBERS[len(frame)::5]  # all of them in the plainest, a fifth in each of the others
    for i in range(0, len(some), 2**18):
        text = "\x00".join(frame.format(chr(c)) for c in some[i:i+2**18])
        same = split_fast(text) == SPLIT(text)  # so that no megabyte is printed
        assert same


@compiled
@given(signs)
@settings(max_examples=2000, deadline=None)
def test_mixed_signs_are_split_like_the_pattern(text): assert split_fast(text) == SPLIT(text)


@compiled
@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_is_split_like_the_pattern(text): assert split_fast(text) == SPLIT(text)


@compiled
def test_every_short_text_of_the_kinds_is_split_like_the_pattern():
    "All texts of up to five of the signs among which the pattern chooses, most of them: no chance involved."
    rows = [""]
    for _ in range(5): rows = [r+c for r in rows for c in "'sa1 \n!\t"]
    for a in range(0, len(rows), 1024):
        for text in rows[a:a+1024:1 if a < 4096 else 3]: assert split_fast(text) == SPLIT(text), text


def test_the_table_cannot_be_changed_by_accident():
    with pytest.raises(ValueError): char_kinds()[65] = 0


# --- words ------------------------------------------------------------------------------------------------------------

def counted(texts, **how): # texts of letters alone: one chunk each
    letters, starts, counts = fastbpe._distinct_words(texts, **how)
    return Counter({bytes(letters[a:b]): n for a, b, n in zip(starts, starts[1:], counts.tolist())})


@compiled
@given(st.lists(st.text("ab", min_size=1, max_size=40), max_size=60))
@settings(max_examples=200, deadline=None)
def test_words_are_counted(texts): assert counted(texts, n_words=2) == Counter(t.encode() for t in texts)


@compiled
def test_words_of_every_length_that_differ_in_one_byte():
    "A key holds 15 bytes; each of them, the number of them, and each of those beyond must count."
    words = ["a"*n for n in range(1, 40)]
    words += [w[:i]+"b"+w[i+1:] for w in words for i in range(len(w))]
    assert counted(words*2) == Counter({w.encode(): 2*n for w, n in Counter(words).items()})


@compiled
def test_words_that_share_a_hash_stay_apart(monkeypatch):
    "Bytes are compared: two long words with one key are two words. Their hashes are forced to be equal, in the same source without a compiler."
    code = """
import numpy as np
from llm_scratch import fastbpe
py = lambda f: getattr(f, "py_func", f)
for name in ("_home", "_slot_of", "_add_word"): setattr(fastbpe, name, py(getattr(fastbpe, name)))
fastbpe._home = lambda head, tail, n: 3
table, found = fastbpe._new_words(8, 400), []
for w, text in enumerate((b"x"*20, b"x"*19+b"y", b"y"+b"x"*19, b"x"*20, b"y"+b"x"*19)):
    data = np.frombuffer(text, np.uint8)
    s = fastbpe._slot_of(*table, 7, -20, data, 0, 20)
    if not table.slots[s,2]: fastbpe._add_word(*table, s, 7, -20, len(set(found)), data, 0, 20)
    found.append(int(table.slots[s,2]))
print(found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).resolve().parent.parent)
    assert done.stdout.strip() == "[1, 2, 3, 1, 3]", done.stdout+done.stderr


# --- the trainer ------------------------------------------------------------------------------------------------------

@compiled
@given(few_letters, st.integers(0, 80))
@settings(max_examples=500, deadline=None)
def test_merges_are_equal(texts, n): assert train_merges_fast(texts, n) == train_merges(texts, n)


@compiled
@given(st.lists(st.text(max_size=40), max_size=3))
@settings(max_examples=150, deadline=None)
def test_merges_of_any_text_are_equal(texts): assert train_merges_fast(texts, 50) == train_merges(texts, 50)


@compiled
def test_merges_of_recipes_are_equal_to_the_last():
    every = train_merges(TEXTS, 10**5)
    assert 500 < len(every) < 10**5  # until no pair is left
    assert train_merges_fast(TEXTS, 10**5) == every


@compiled
def test_more_pairs_than_the_first_table_holds():
    rng = random.Random(0)
    texts = [" ".join("".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(12)) for _ in range(4000))]
    assert train_merges_fast(texts, 3000) == train_merges(texts, 3000)


@compiled
def test_a_generator_of_texts_is_read_once(): assert train_merges_fast((t for t in TEXTS), 50) == train_merges(TEXTS, 50)


# --- the encoder ------------------------------------------------------------------------------------------------------

@compiled
@given(st.one_of(st.text(), signs, st.text("abcdehilnorst ", max_size=300)))
@settings(max_examples=800, deadline=None)
def test_ids_are_equal(tok, fast, text):
    ids = tok.encode(text)
    assert fast.encode(text) == ids == fast.encode_array(text).tolist()
    assert fast.decode(ids) == text


@compiled
@given(few_letters, st.lists(st.text("ab ", max_size=90), max_size=6))
@settings(max_examples=200, deadline=None)
def test_ids_of_other_merges_are_equal(texts, lines):
    tok = Tokenizer(train_merges(texts, 40))
    assert list(FastTokenizer(tok, n_words=3).encode_batch(lines*2)) == list(tok.encode_batch(lines*2))


@compiled
def test_merges_by_hand_are_encoded_by_their_pairs():
    tok = Tokenizer([(97, 98), (98, 99), (97, 257)])
    assert FastTokenizer(tok).encode("abc bc") == tok.encode("abc bc") == [256, 99, 32, 257]


@compiled
@pytest.mark.parametrize("n_words", [1, 2, 7, 2**17])
def test_what_is_remembered_changes_nothing(tok, n_words):
    fast, plain = FastTokenizer(tok, n_words=n_words), list(tok.encode_batch(TEXTS))
    assert list(fast.encode_batch(TEXTS)) == plain == list(fast.encode_batch(TEXTS))
    assert 0 < fast._known[-1][0] <= n_words


@compiled
def test_lengths_around_what_is_remembered(tok, fast):
    for n in [*range(1, 20), 63, 64, 65, 128, 1000]:
        for text in ("x"*n, "é"*n, " "+"the"*n, " "*n, "!"*n): assert fast.encode(text) == tok.encode(text) == fast.encode(text)


@compiled
def test_a_megabyte_in_one_word(tok, fast):
    rng = random.Random(0)
    for text in ("a"*10**6, "".join(rng.choices("aeionrst", k=10**6))): assert fast.decode(fast.encode(text)) == text
    assert fast.encode(text[:50_000]) == tok.encode(text[:50_000])


@compiled
def test_every_character_has_equal_ids(tok, fast):
    text = "".join(map(chr, NUMBERS))
    same = fast.encode(text) == tok.encode(text)
    assert same and fast.decode(fast.encode(text)) == text


@compiled
def test_it_is_a_tokenizer(tok, fast, tmp_path):
    for name in ("merges", "specials", "special_ids", "eot_id", "start_id", "digest", "vocab_size", "token_bytes"): assert getattr(fast, name) == getattr(tok, name), name
    assert load_tokenizer(save_tokenizer(fast, tmp_path/"t")).digest == tok.digest
    assert fast.encode("") == [] and fast.encode_array("the").dtype == np.int32
    assert not {*fast.encode("a <|endoftext|> b")} & {*tok.special_ids.values()}
    with pytest.raises(ValueError, match="half of a surrogate pair"): fast.encode("a\ud800")
    with pytest.raises(ValueError, match="half of a surrogate pair"): train_merges_fast(["a\ud800"], 1)


# --- the best there is ------------------------------------------------------------------------------------------------

@compiled
def test_the_best_is_compiled(tok):
    assert best_trainer() is train_merges_fast and type(best_tokenizer(tok)) is FastTokenizer
    assert train_bpe(TEXTS, 400, learn=best_trainer()).digest == train_bpe(TEXTS, 400).digest


def test_without_numba(monkeypatch, tok):
    monkeypatch.setattr(fastbpe, "njit", None)
    assert best_trainer() is train_merges and best_tokenizer(tok) is tok
    for do in (lambda: FastTokenizer(tok), lambda: train_merges_fast(TEXTS, 3), lambda: split_fast("a")):
        with pytest.raises(UserError, match=r"llm_scratch\[fast\]"): do()


def test_the_module_can_be_imported_without_numba():
    code = "import sys; sys.modules['numba'] = None\nfrom llm_scratch import fastbpe\nfrom llm_scratch.tokenization import Tokenizer\nt = Tokenizer([(97, 98)])\nprint(fastbpe.best_tokenizer(t) is t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).resolve().parent.parent)
    assert done.stdout.strip() == "True", done.stderr


@compiled
def test_every_short_word_after_an_apostrophe():
    "Which of them are endings of English is a matter of two letters, in both cases."
    for letters in product("lvresdmtLVESx ", repeat=3):
        text = f"I'{''.join(letters)}"
        assert split_fast(text) == SPLIT(text), text

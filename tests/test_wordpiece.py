"Ids equal to the library's on anything, cuts equal to a search through all of them, files that everyone opens."
import json
import math
import random
from collections import Counter
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch.core import UserError
from llm_scratch.data import tiny_corpus
from llm_scratch.tokenization import SPECIALS, HubTokenizer, Tokenizer, Vocabulary, train_bpe
from llm_scratch.wordpiece import (UNK, UnigramTokenizer, WordPieceTokenizer, best_cut, frequency, joined, likelihood, load_any, longest_match, sample_cut, save_any, train_pieces,
                                   train_unigram, train_wordpiece, uncased)

TEXTS = tiny_corpus()["text"][:]
CASED = train_wordpiece(TEXTS, 300, min_count=3)
LOW = train_wordpiece(TEXTS, 250, min_count=3, normalize=uncased)
UNIGRAM = train_unigram(TEXTS, 200)
anything = st.text(st.one_of(st.sampled_from("abcdeghiorstu .,-\n\t#[]▁éÉΣİ½日🍲|<>'_$"), st.characters(max_codepoint=0x5ff, exclude_categories=["Cs"], exclude_characters="\u061d")), max_size=40)


def library(tok):
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tok.to_json()))
    theirs.encode_special_tokens = True
    return theirs


# --- training ------------------------------------------------------------------------------------------------------

def slowly(texts, n_pieces, score, min_count):
    words = [[w[0], *("##" + c for c in w[1:])] for t in texts for w in t.split()]
    pieces = sorted({s for w in words for s in w})
    while len(pieces) < n_pieces:
        one, two = Counter(s for w in words for s in w), Counter(p for w in words for p in pairwise(w))
        two = {p: n for p, n in two.items() if n >= min_count}
        if not two: break
        pair = min(two, key=lambda p: (-score(two[p], one[p[0]], one[p[1]]), -two[p], p))
        for k, w in enumerate(words):
            new, i = [], 0
            while i < len(w):
                if tuple(w[i:i+2]) == pair: new.append(pair[0] + pair[1][2:]); i += 2
                else: new.append(w[i]); i += 1
            words[k] = new
        if pair[0] + pair[1][2:] not in pieces: pieces.append(pair[0] + pair[1][2:])
    return pieces


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("ab c", max_size=25), min_size=1, max_size=4), st.sampled_from([likelihood, frequency]), st.integers(1, 4), st.integers(0, 40))
def test_the_trainer_is_the_hand_method(texts, score, min_count, n): assert train_pieces(texts, n, score, min_count) == slowly(texts, n, score, min_count)


def test_scores():
    assert likelihood(6, 3, 4) == .5 and frequency(6, 3, 4) == 6 and joined("##ab", "##c") == "##abc"
    assert train_pieces(["hug hug hug hug hugs fox"], 8)[-1] == "##ox" and train_pieces(["hug hug hug hug hugs fox"], 8, frequency)[-1] == "##ug"
    assert train_pieces([], 5) == [] and train_pieces(["a b"], 5) == ["a", "b"]


def test_a_minimum_is_a_minimum():
    learned = train_pieces(["aa"] * 3 + ["bb"] * 2, 20, min_count=3)
    assert learned == ["##a", "##b", "a", "b", "aa"]


def test_sizes_that_do_not_fit():
    assert CASED.vocab_size == len(CASED.token_bytes) == 300 and LOW.vocab_size == 250
    with pytest.raises(ValueError, match="vocab_size=20 is too small"): train_wordpiece(TEXTS, 20)
    with pytest.raises(ValueError, match="for vocab_size=8 only, and vocab_size=99"): train_wordpiece(["ab"], 99, min_count=3, specials=("a b", "c d", "e", "f", "g"))
    assert train_wordpiece(["ab ab"], 7, min_count=2).pieces == [UNK, "##b", "a", "ab"]
    with pytest.raises(ValueError, match="for vocab_size=6 only, and vocab_size=7"): train_wordpiece(["ab"], 7)
    assert train_wordpiece(["ab"], 6).pieces == [UNK, "##b", "a"]  # just large enough


# --- WordPiece -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tok", [CASED, LOW, UNIGRAM], ids=["cased", "uncased", "unigram"])
def test_ids_are_the_librarys(tok):
    theirs = library(tok)
    @settings(max_examples=400, deadline=None)
    @given(anything)
    def check(text): assert tok.encode(text) == theirs.encode(text).ids
    check()
    for text in TEXTS: assert tok.encode(text) == theirs.encode(text).ids and tok.decode(tok.encode(text)) == theirs.decode(tok.encode(text), skip_special_tokens=False)


def test_every_character_is_cut_as_the_library_cuts_it_but_for_new_punctuation():
    theirs, tok = tokenizers.pre_tokenizers.BertPreTokenizer(), WordPieceTokenizer([UNK, "a", "b"])
    differ = 0
    for i in [*range(0xd800), *range(0xe000, 0x11000)]:
        differ += len(tok.encode(f"a{chr(i)}b")) != len(theirs.pre_tokenize_str(f"a{chr(i)}b"))
    assert differ < 80  # the library's tables are older


def test_lower_case_is_the_librarys():
    theirs = tokenizers.normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=True)
    for text in ("İstanbul", "ΣΊΣΥΦΟΣ", "Éte\u0301 ÅNGSTRÖM", "ǅ ẞ ﬀ", "한국 日本", "Ñandú \u0345"): assert uncased(text) == theirs.normalize_str(text)


def brute(word, pieces):
    out, start = [], 0
    while start < len(word):
        fits = [p for p in pieces if (p.startswith("##") == (start > 0)) and word.startswith(p[2:] if start else p, start)]
        if not fits: return [UNK]
        out.append(max(fits, key=len))
        start += len(out[-1]) - 2 * (start > 0)
    return out


@settings(max_examples=300, deadline=None)
@given(st.sets(st.text("ab", min_size=1, max_size=4)), st.sets(st.text("ab", min_size=1, max_size=4)), st.text("ab", min_size=1, max_size=12))
def test_the_longest_piece(first, inner, word):
    pieces = [UNK, *sorted(first), *("##" + p for p in sorted(inner))]
    ids = {p: i for i, p in enumerate(pieces)}
    assert [pieces[i] for i in longest_match(word, ids, 0)] == brute(word, pieces[1:])


def test_long_words_are_unknown():
    ids = {UNK: 0, "a": 1, "##a": 2}
    assert longest_match("a" * 100, ids, 0) == [1] + [2] * 99 and longest_match("a" * 101, ids, 0) == [0] and longest_match("aa", ids, 0, 1) == [0]
    tok = WordPieceTokenizer(ids, max_chars=3)
    assert tok.encode("aaa aaaa") == [1, 2, 2, 0] and library(tok).encode("aaa aaaa").ids == [1, 2, 2, 0]


def test_what_a_vocabulary_needs():
    for pieces, specials in ((["a"], SPECIALS), ([UNK, "a", "a"], SPECIALS), ([UNK, "x"], ("x",))):
        with pytest.raises(ValueError, match=r"needs \[UNK\]"): WordPieceTokenizer(pieces, specials)
    tok = WordPieceTokenizer([UNK, "a", "##b", "##", "#"])
    assert tok.token_bytes == [b" [UNK]", b" a", b"b", b" ##", b" #", *(s.encode() for s in SPECIALS)]
    assert tok.decode([1, 2, 1, 0]) == "ab a [UNK]" and tok.decode([5]) == SPECIALS[0] and tok.decode([2]) == "b"
    assert (tok.eot_id, tok.start_id, tok.special_ids) == (5, 5, dict(zip(SPECIALS, (5, 6, 7)))) and list(tok.encode_batch(["a", "ab"])) == [[1], [1, 2]]


def test_text_does_not_forge_special_tokens():
    "Not even where the name is one word, which a list of pieces would let text spell."
    for tok in (WordPieceTokenizer([UNK, "E", "##O", "##T"], ("EOT",)), UnigramTokenizer([(UNK, -1000.), ("▁", -1.), ("E", -2.), ("O", -2.), ("T", -2.)], ("EOT",))):
        assert tok.eot_id not in tok.encode("EOT EOT") and library(tok).encode("EOT EOT").ids == tok.encode("EOT EOT")
        theirs = tokenizers.Tokenizer.from_str(json.dumps(tok.to_json()))
        assert theirs.encode("EOT").ids[-1] == tok.eot_id == theirs.token_to_id("EOT")
    for tok in (CASED, LOW, UNIGRAM):
        for name in SPECIALS: assert not set(tok.special_ids.values()) & set(tok.encode(f"salt {name}{name} x"))


def test_digests_tell_apart():
    tokens = [CASED, LOW, UNIGRAM, WordPieceTokenizer(CASED.pieces, CASED.specials, uncased), WordPieceTokenizer(CASED.pieces, ("<end>",)), WordPieceTokenizer(CASED.pieces, CASED.specials, None, 50)]
    assert len({t.digest for t in tokens}) == len(tokens) and WordPieceTokenizer(CASED.pieces).digest == CASED.digest


# --- Unigram -------------------------------------------------------------------------------------------------------

def all_cuts(word, score):
    if not word: return [[]]
    return [[p, *rest] for p in score if word.startswith(p) for rest in all_cuts(word[len(p):], score)]


scores = st.dictionaries(st.text("abc", min_size=1, max_size=4), st.floats(-9, -.01), max_size=8).map(lambda d: dict(a=-3., b=-4., c=-5.) | d)


@settings(max_examples=200, deadline=None)
@given(scores, st.text("abc", max_size=8))
def test_the_best_cut_is_the_best_of_all(score, word):
    cut = best_cut(word, score, -99.)
    assert "".join(cut) == word
    assert sum(score[p] for p in cut) >= max(sum(score[p] for p in c) for c in all_cuts(word, score)) - 1e-9


def test_unknown_characters():
    score = dict(a=-1., ab=-5., bcd=-2.)
    assert best_cut("xyaz", score, -11.) == [None, "a", None] and best_cut("", score, -11.) == [] and best_cut("abcd", score, -11.) == ["a", "bcd"]
    assert best_cut("abc", score, -11.) == ["ab", None] and best_cut("a", {}, -1.) == [None]
    assert best_cut("ab", dict(a=-1., b=-1., ab=-2.), -11.) == ["ab"]  # a tie goes to the longer last piece


def test_unknowns_in_a_row_are_one():
    tok = UnigramTokenizer([(UNK, -1000.), ("▁", -1.), ("a", -2.)])
    for text in ("xyz", "a[UNK]a", "x[UNK][UNK]y a", "[UNK]x", " [UNK]"): assert tok.encode(text) == library(tok).encode(text).ids, text
    assert tok.encode("axya") == [1, 2, 0, 2] and tok.encode("") == []


@settings(max_examples=200, deadline=None)
@given(st.text(sorted({c for t in TEXTS for c in t} - {"▁"}), max_size=30).filter(lambda t: not t.startswith(" ")))
def test_unigram_gives_text_back_but_for_a_space_at_the_beginning(text): assert UNIGRAM.decode(UNIGRAM.encode(text)) == text


def test_draws_have_the_probability_of_their_cut():
    score, rng, n = {"a": -1., "b": -1.5, "ab": -1.2, "ba": -3., "aba": -2.}, random.Random(1), 6000
    for alpha in (0., .5, 1., 2.):
        weight = {" ".join(c): math.exp(alpha * sum(score[p] for p in c)) for c in all_cuts("ababa", score)}
        drawn = Counter(" ".join(sample_cut("ababa", score, rng, alpha)) for _ in range(n))
        assert drawn.keys() <= weight.keys()
        for cut, w in weight.items():
            p = w / sum(weight.values())
            assert abs(drawn[cut] / n - p) < 4.5 * math.sqrt(p * (1 - p) / n), (alpha, cut)
    assert sample_cut("", score, rng) == [] and "".join(sample_cut("ab" * 2000, score, rng)) == "ab" * 2000  # probabilities far below the smallest float
    with pytest.raises(ValueError, match="no pieces make 'abc'"): sample_cut("abc", score, rng)


# --- files ---------------------------------------------------------------------------------------------------------

def test_every_kind_comes_back_and_opens_in_transformers(tmp_path):
    from transformers import AutoTokenizer
    bpe = train_bpe(TEXTS, 300)
    save_any(bpe, tmp_path/"bpe")
    odd = WordPieceTokenizer(CASED.pieces, ("<end>", "EOT"), uncased, 7)
    for name, tok in dict(bpe=bpe, cased=CASED, low=LOW, odd=odd, unigram=UNIGRAM, hub=HubTokenizer(tmp_path/"bpe", bpe.eot_id, bpe.eot_id + 1)).items():
        again = load_any(save_any(tok, tmp_path/name))
        theirs = AutoTokenizer.from_pretrained(tmp_path/name)
        assert (type(again), again.token_bytes, again.eot_id, again.start_id) == (type(tok), tok.token_bytes, tok.eot_id, tok.start_id)
        if name != "hub": assert again.digest == tok.digest and again.specials == tok.specials
        assert (len(theirs), theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (tok.vocab_size, tok.eot_id, tok.eot_id, tok.eot_id)
        for text in [*TEXTS, "Ça va? 日本 🍲", "  two  spaces\n", "EOT overbeaten"]:
            assert again.encode(text) == tok.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert AutoTokenizer.from_pretrained(tmp_path/"cased").unk_token == UNK


def test_what_can_not_be_saved_or_opened(tmp_path):
    with pytest.raises(UserError, match="has no form in tokenizer.json"): WordPieceTokenizer([UNK], normalize=str.upper).to_json()
    with pytest.raises(UserError, match="Vocabulary has no form"): save_any(Vocabulary(), tmp_path/"v")
    assert not (tmp_path/"v").exists()
    folder = save_any(CASED, tmp_path/"w")
    (folder/"tokenizer.json").write_text((folder/"tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="tokenizer.json is corrupt"): load_any(folder)
    with pytest.raises(UserError, match="manifest.json is missing"): load_any(tmp_path/"nothing")


def test_a_kind_of_the_future(tmp_path):
    from llm_scratch.core import read_json, seal, write_json
    folder = save_any(CASED, tmp_path/"w")
    config = read_json(folder/"tokenizer_config.json")
    config["llm_scratch"]["kind"] = "Telepathy"
    write_json(folder/"tokenizer_config.json", config)
    seal(folder, "tokenizer", ["tokenizer.json", "tokenizer_config.json"])
    with pytest.raises(UserError, match="of the kind Telepathy"): load_any(folder)


def test_a_bpe_folder_of_chapter_04_opens_too(tmp_path):
    from llm_scratch.tokenization import save_tokenizer
    assert isinstance(load_any(save_tokenizer(train_bpe(TEXTS, 300), tmp_path/"t")), Tokenizer)

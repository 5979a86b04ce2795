"Stages of cleaning on pages that attack, on any text at all, and on documents that stand just on either side of each threshold."
import pickle
import random
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from llm_scratch import cleaning
from llm_scratch.cleaning import (C4Rules, FromHtml, GopherRules, KeepLanguages, QualityFilter, RepetitionRules, WordFilter, basic_stages, buckets, covered,
                                  fragment_text, full_stages, html_work, is_html, language_of, listed_words, load_quality, main_text, plot_waterfall, quality_texts, repair_unicode, repaired,
                                  runs, save_quality, spoil, train_quality, waterfall)
from llm_scratch.core import UserError
from llm_scratch.data import Document
from llm_scratch.sources import Drop, Report, apply_stages

ROOT = Path(__file__).resolve().parent.parent
PROSE = "The cook went to the market and came back with a basket that was full of bread. "


def doc(text, **meta): return Document(text, "test", "test/0", meta)


def reason(new): return new.reason if isinstance(new, Drop) else None


@pytest.fixture(scope="module")
def quality():
    rng = random.Random(0)
    good = [" ".join(rng.choice(("the cat sat on the mat,", "a dog ran to the house.", "it was a fine day", "and they went home")) for _ in range(12)) for _ in range(60)]
    return train_quality(good, [spoil(t, rng) for t in good])


# HTML

BOMBS = {
    "deep": '"<div>"*100_000 + "x"',
    "deep and closed": '"<div>"*100_000 + "x" + "</div>"*100_000',
    "a million tags": '"<p>x</p>"*600_000',
    "an attribute of 50 MB": '"<p title=\\"" + "x"*50_000_000 + "\\">y</p>"',
    "an attribute of 4 MB": '"<p title=\\"" + "x"*4_000_000 + "\\">y</p>"',
    "bold marks reopened": '"<p>" + "".join(f"<b id={i}>" for i in range(500)) + "<p>x"*20_000',
    "reopened behind a scope": '"<p>" + "".join(f"<b id={i}>" for i in range(300)) + "<object>" + "</b>"*300 + "</object>" + "<p>x"*20_000',
    "attributes": '"<a " + " ".join(f"a{i}=1" for i in range(200_000)) + ">x</a>"',
    "attributes without blanks": '"<a " + "".join(f"a{i}=\'1\'" for i in range(60_000)) + ">x</a>"',
    "attributes by slashes": '"<a " + "/".join(f"a{i}" for i in range(60_000)) + ">x</a>"',
    "attributes behind a stray quote": '"<a x=y\\" " + " ".join(f"a{i}=1" for i in range(60_000)) + ">x</a>"',
    "options": '"<select>" + "<option>x"*50_000',
    "unclosed tags": '"<b"*300_000',
    "unclosed quotes": '"<a \'"*500_000',
    "an unclosed quote": '"<a \\"" + "<b "*500_000',
    "nothing but brackets": '"<"*4_900_000',
    "comments": '"<!--"*1_000_000',
    "a comment before the page": '"<!--" + "-"*4_000_000 + "<html>"',
    "many comments before the page": '"<!-- x -->"*400_000 + "<p>"',
    "entities": '"<p>" + "&amp"*1_000_000',
    "tables": '"<table><tr><td>"*30_000 + "x"',
    "as much as is allowed": '"<p>" + "".join(f"<b id={i}>" for i in range(200)) + "<p>x"*4_700',
}
HELD = """
import resource, sys, time
import llm_scratch.cleaning as c
from llm_scratch.data import Document
c.fragment_text("<p>load</p>")
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
for line in sys.stdin:
    name, page = line.rstrip("\\n").split("\\t")
    page, start = eval(page), time.process_time()
    c.FromHtml()(Document("<!doctype html>" + page, "bomb", "bomb", {}))
    new = c.FromHtml()(Document(page, "bomb", "bomb", dict(format="html")))
    c.is_html(Document(page, "bomb", "bomb", {}))
    print(name, new.reason if isinstance(new, c.Drop) else "text", int(time.process_time() - start), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, sep="\\t", flush=True)
"""


@pytest.fixture(scope="module")
def exploded():
    "Every bomb, in one process that may use 3 GB; it dies or hangs if one goes off."
    done = subprocess.run([sys.executable, "-c", HELD], input="".join(f"{k}\t{v}\n" for k, v in BOMBS.items()), cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    return {line.split("\t")[0]: line.split("\t")[1:] for line in done.stdout.splitlines()}, done.stderr


def test_no_page_takes_a_process_down(exploded):
    found, errors = exploded
    assert list(found) == list(BOMBS), errors[-500:]
    assert all(int(seconds) < 30 and int(mb) < 1800 for _, seconds, mb in found.values()), found


def test_bombs_are_dropped_with_their_reason_and_big_but_honest_pages_are_not(exploded):
    said = {name: why for name, (why, *_) in exploded[0].items()}
    assert {n for n, why in said.items() if why == "HTML too long"} == {"an attribute of 50 MB"}
    tangled = {"deep", "deep and closed", "bold marks reopened", "reopened behind a scope", "attributes", "attributes without blanks", "attributes by slashes", "attributes behind a stray quote", "options", "unclosed tags", "tables"}
    assert tangled <= {n for n, why in said.items() if why == "HTML too tangled"}
    assert said["an attribute of 4 MB"] == said["as much as is allowed"] == said["entities"] == "text"


def test_work_counts_what_is_open_and_what_parts_attributes():
    assert html_work("plain, 1 < 2") == 0
    assert html_work("<p>a<p>b<br>") == 3  # they need no end
    assert html_work("<b>a</b>") == 2 + 1  # the start tag with itself open, the end tag with none
    assert html_work("<b><i></i></b>") == 4 + 1 + 2 + 1
    assert html_work("</b></i>") == 2
    assert html_work("<B>a</b>") == html_work("<b>a</B>") == 3
    assert html_work("<table><b></table>") == 3 + 1 + 2  # what a scope holds ends with it
    assert html_work("<b><table></b></table>") == 4 + 1 + 2 + 2 + 1  # an end tag inside a scope ends nothing outside
    assert html_work("<table><object><b></table><i>") == 5 + 1 + 2 + 3 + 0 + 1  # and scopes inside of it
    assert html_work("<p " + "a "*39 + ">") - 1 == (40//20)**2 and html_work("<p " + "a "*10 + ">") == 1
    assert html_work('<p title="a > b < c">x') == 1


def test_limits_are_inclusive():
    page = "<p>" + "<b>x</b>"*9
    assert not isinstance(FromHtml(max_chars=len(page), max_work=html_work(page))(doc(page)), Drop)
    assert reason(FromHtml(max_chars=len(page)-1)(doc(page))) == "HTML too long"
    assert reason(FromHtml(max_work=html_work(page)-1)(doc(page))) == "HTML too tangled"


def test_what_is_html():
    assert is_html(doc("  <p>x")) and is_html(doc("<UL class='a'>")) and is_html(doc("<!DOCTYPE html>")) and is_html(doc("<?xml version='1.0'?>\n<!-- a -->\n<html>")) and is_html(doc("<br/>"))
    assert not any(is_html(doc(t)) for t in ("", "x <p>", "<", "<pineapple>", "#include <b>", "<- p>", "<P.Titera@example.org>"))
    assert is_html(doc("plain", format="html")) and not is_html(doc("<p>x</p>", format="text")) and is_html(doc("<p>x</p>", format="jsonl"))


def test_pages_give_their_main_part_and_fragments_all():
    inner = "<nav><a href='/'>Menu of things</a></nav><main><p>" + PROSE*3 + "</p></main><footer>Imprint</footer>"
    page, piece = FromHtml()(doc(f"<html><body>{inner}</body></html>", k=1)), FromHtml()(doc(inner, format="html"))
    assert "Menu" not in page.text and "Imprint" not in page.text and PROSE.strip() in page.text and "Menu" in piece.text and "Imprint" in piece.text
    assert page.meta == dict(k=1, format="text") and FromHtml()(page) is page
    assert reason(FromHtml()(doc("<p><br></p>"))) == "HTML without text"
    plain = doc("nothing to do")
    assert FromHtml()(plain) is plain


def test_text_that_shows_tags_is_converted_once():
    once = FromHtml()(doc("<p>&lt;p&gt;x&lt;/p&gt;</p>"))
    assert once.text == "<p>x</p>" and FromHtml()(once) == once


def test_fragments_keep_paragraphs_and_hide_scripts():
    assert fragment_text("<p>a</p><p>b &amp; c</p><script>d</script><style>e</style>") == "a\n\nb & c"
    assert "\ud800" not in fragment_text("<p>a\ud800b</p>") and main_text("") == fragment_text("") == ""


# letters

def test_repairs_and_leaves_taste_alone():
    assert repaired("schÃ¶n") == "schön" and repaired("e\u0301") == "é"
    assert repaired("“so” ‘so’ … ﬁ Ａ &amp; &lt;") == "“so” ‘so’ … ﬁ Ａ &amp; &lt;"
    assert repaired("a\x00b\x07c\td\ne\u200bf\ufeffg\x7f") == "abc\td\nefg"
    assert repaired("a\r\nb") == "a\nb" and repaired("\ud83d\ude00") == "😀" and repaired("\ud800") == "\ufffd"
    assert reason(repair_unicode(doc(""))) == reason(repair_unicode(doc(" \x00\n"))) == "no text"
    assert repair_unicode(doc("naÃ¯ve", a=1)) == doc("naïve", a=1)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_repaired_text_can_be_written_and_has_no_control_characters(text):
    new = repaired(text)
    new.encode("utf-8")
    assert not any(ord(c) < 32 and c not in "\t\n" for c in new) and "\x7f" not in new


# rules

def gopher(text): return reason(GopherRules()(doc(text)))


def padded(n_words, word="bread"): return " ".join(["the", "of", *[word]*(n_words-2)])


@pytest.mark.parametrize("text, why", [
    (padded(49), "too few words"), (padded(50), None), (padded(100_000, "bred"), None), (padded(100_001, "bred"), "too many words"),
    (" ".join(["the", "of", "a"]*20), "words too short"), (" ".join(["the", "with", "to"]*20), None),
    (" ".join(["the", "of"] + ["elevenletrs"]*48), "words too long"), (" ".join(["the", "of", "a", "a", "a", "a"] + ["tenletters"]*44), None),
    (" ".join(["the", "of", "s"*17, "s"*18] + ["tenletters"]*46), None), (" ".join(["the", "of", "s"*17, "s"*19] + ["tenletters"]*46), "words too long"),
    (padded(50) + " #"*5, None), (padded(50) + " #####"*1 + " #", "too many hashes"), (padded(50) + " bread..."*6 + " bread… bread", "too many ellipses"), (padded(50) + " bread…"*6 + " bread", "too many ellipses"), (padded(50) + " bread..."*6 + " bread", "too many ellipses"), (padded(60) + " bread..."*3 + " bread…"*3 + " bread", None),
    ("\n".join(["- the bread of today and more"]*9 + ["and the bread of all"]), None), ("\n".join(["- the bread of today and more"]*10), "lines with bullets"), ("\n".join(["• the bread of today and more"]*10), "lines with bullets"),
    ("\n".join(["the bread of today and more things to come and to see..."]*3 + ["and the bread of all"]*7), None), ("\n".join(["the bread of today and more things to come and to see…"]*4 + ["and the bread of all"]*6), "lines cut short"),
    (padded(40) + " 1234"*10, None), (padded(39) + " 1234"*11, "words without letters"),
    ("The " + "bread "*60, "too few English stop words"), ("The bread OF " + "bread "*60, None), ("the the " + "bread "*60, "too few English stop words")])
def test_gopher_on_either_side_of_each_threshold(text, why): assert gopher(text) == why


def test_fields_are_the_thresholds():
    assert reason(GopherRules(min_words=3)(doc("of the bread"))) is None and reason(GopherRules(min_words=4)(doc("of the bread"))) == "too few words"
    assert reason(GopherRules(min_words=0, min_mean_length=0, min_alphabetic=0, min_stop_words=0)(doc(""))) is None


def slow_share(words, n, again):
    "By hand: letters covered by the commonest run that occurs twice or more, or by all that came before."
    grams = [tuple(words[i:i+n]) for i in range(len(words)-n+1)]
    if again: starts = [i for i, g in enumerate(grams) if g in grams[:i]]
    else:
        best = max((grams.count(g) for g in grams), default=0)
        starts = None if best < 2 else [[i for i, g in enumerate(grams) if g == top] for top in {g for g in grams if grams.count(g) == best}]
    def letters(ss): return sum(len(words[j]) for j in {j for i in ss for j in range(i, i+n)})/sum(map(len, words))
    return letters(starts) if again else {round(letters(s), 9) for s in starts} if starts else set()


@settings(max_examples=120, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), min_size=1, max_size=25))
def test_runs_and_covered_equal_counting_by_hand(words):
    lengths, seen = np.array([len(w) for w in words]), 1
    for n, codes in runs(words, 10):
        grams = [tuple(words[i:i+n]) for i in range(len(words)-n+1)]
        assert len(codes) == len(grams) and all((grams[i] == grams[j]) == (codes[i] == codes[j]) for i in range(len(grams)) for j in range(i))
        top = covered(codes == np.bincount(codes).argmax(), n, lengths)
        assert round(top, 9) in slow_share(words, n, False) and 0 <= top <= 1
        later = np.array([grams[i] in grams[:i] for i in range(len(grams))])
        assert covered(later, n, lengths) == pytest.approx(slow_share(words, n, True))
        assert n == seen + 1
        seen = n
    for n in range(seen+1, min(10, len(words))+1): assert slow_share(words, n, True) == 0 == len(slow_share(words, n, False))


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def unlike(n, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=6)) for _ in range(n)]


@pytest.mark.parametrize("n, limit", RepetitionRules().max_again)
def test_runs_that_come_again_on_either_side(n, limit):
    run = unlike(n)
    for share, keeps in ((limit-.004, True), (limit+.004, False)):
        total = round(n/share)
        text = " ".join(run + unlike(total - 2*n, 1) + run)
        rule = RepetitionRules(max_top=(), max_again=((n, limit),))
        assert reason(rule(doc(text))) == (None if keeps else f"runs of {n} words again"), (n, share)


@pytest.mark.parametrize("n, limit", RepetitionRules().max_top)
def test_one_run_on_either_side(n, limit):
    for times, keeps in ((int(limit*300/n), True), (int(limit*300/n) + 1, False)):
        words = unlike(300 - n*times, 2)
        for i in range(times): words[i*(len(words)//times) + 1:i*(len(words)//times) + 1] = unlike(n, 3)
        assert reason(RepetitionRules(max_top=((n, limit),), max_again=())(doc(" ".join(words)))) == (None if keeps else f"one run of {n} words"), times


def test_lines_and_paragraphs_again():
    lines = [" ".join(unlike(6, i)) for i in range(12)]
    none = dict(max_top=(), max_again=())
    long = lambda again, of, join: RepetitionRules(**none, max_line_letters=1, max_paragraph_letters=1)(doc(join.join(lines[:of-again] + lines[:again])))
    assert reason(long(3, 10, "\n")) is None and reason(long(4, 10, "\n")) == "lines again"
    assert reason(long(3, 10, "\n\n")) is None and reason(long(4, 10, "\n\n")) == "paragraphs again" and reason(long(4, 10, "\n \n  ")) == "paragraphs again"
    big = " ".join(unlike(40, 99))
    letters = RepetitionRules(**none)
    assert reason(letters(doc("\n".join([*lines, big, big])))) == "lines again" and reason(letters(doc("\n\n".join([*lines, big, big])))) == "paragraphs again"
    assert reason(letters(doc("\n".join([*lines, *lines[:2]])))) is None
    assert reason(RepetitionRules(**none, max_paragraphs=1, max_paragraph_letters=1)(doc("\n\n".join([*lines, big, big])))) == "lines again"
    assert reason(RepetitionRules()(doc(""))) is None


LINE = "This line has five words."


def c4(text): return C4Rules()(doc(text))


def test_c4_keeps_sentences():
    for line in ("This line has five words!", "Has this line five words?", 'She said "it has five words."', "“And this line has five words.”", LINE + "[12]", LINE + "[edit][citation needed]"):
        assert c4("\n".join([LINE, LINE, line])).text.splitlines()[2:] == [line.partition("[")[0]]
    for line in ("This line has no end", "This line has five words...", "Only four words here.", "Please enable JavaScript to read this.", "We use cookies on all pages.", "Read our Privacy Policy before you go.", "x"*1001 + " is too long a word.", "One, two, three, four,"):
        assert c4("\n".join([LINE, LINE, line, LINE])).text == "\n".join([LINE]*3), line
    assert "y"*1000 in c4("\n".join([LINE, LINE, "y"*1000 + " is a long word here."])).text


def test_c4_drops_pages():
    assert reason(c4("\n".join([LINE]*3))) is None and reason(c4("\n".join([LINE]*2))) == "too few sentences" and reason(c4("")) == "too few sentences"
    assert reason(c4(" ".join([LINE]*3))) is None and reason(c4(LINE + " Is it 3.5 or more? " + LINE)) is None and reason(c4("This is version 3.5.7 of it. And one more here.")) == "too few sentences"
    assert reason(c4("\n".join([LINE]*3) + "\nif (x) { y")) == "curly bracket" and reason(c4("\n".join([LINE]*3) + "\nLorem Ipsum dolor")) == "lorem ipsum"
    assert reason(C4Rules(min_sentences=0)(doc("nothing stays"))) == "too few sentences"


# languages

def test_languages():
    texts = dict(en=PROSE, es="El gato duerme en la cocina porque llueve mucho esta noche.", fr="Le chat dort dans la cuisine parce qu'il pleut ce soir.", de="Die Katze schläft in der Küche, weil es heute Abend regnet.")
    assert {k: language_of(t)[0] for k, t in texts.items()} == {k: k for k in texts}
    keep = KeepLanguages(("en", "de"))
    assert keep(doc(texts["de"], a=1)).meta == dict(a=1, language="de") and reason(keep(doc(texts["fr"]))) == "language fr"
    assert reason(KeepLanguages(min_probability=1.01)(doc(PROSE))) == "language unsure"
    assert language_of("") == ("zxx", 1.) == language_of(" \n") and 0 <= language_of("the")[1] <= 1
    assert reason(KeepLanguages(("zxx",))(doc(""))) is None
    assert language_of(texts["fr"]*100 + PROSE*2000)[0] == "fr"  # the beginning decides


# quality

def test_buckets_are_the_same_everywhere_and_weigh_each_kind_once():
    ids, weight = buckets("Boil rice. Boil", 2**16)
    assert ids[:4].tolist()[0] == ids[3] and len(ids) == 4 + 3 + 13 and weight.sum() == pytest.approx(3) and weight[:4].tolist() == [.25]*4
    assert buckets("Boil rice", 2**16)[0].tolist() == buckets("bOIL rice", 2**16)[0].tolist() and buckets("a b", 2**16)[0][2] != buckets("b a", 2**16)[0][2]
    assert ids[:4].tolist() == [2248, 65460, 49455, 2248] and 0 <= ids.min() and ids.max() < 2**16 and buckets("Boil rice. Boil", 7)[0].max() < 7
    assert buckets("Boil", 2**16)[0].tolist() == [2248, 32435, 22082] and buckets("Boil rice", 2**16)[0][:4].tolist() == [2248, 65460, 50477, 32435]
    assert [len(a) for a in buckets("", 8)] == [0, 0] and [len(a) for a in buckets("x", 8)] == [1, 1]
    assert len(buckets("a "*10_000, 8)[0]) == len(buckets("a "*3000, 8)[0]) > len(buckets("a "*2999, 8)[0])  # the beginning is read


def test_quality_learns_repeats_and_travels(quality, tmp_path):
    rng = random.Random(5)
    assert quality.score("the cat sat on the mat, and they went home. it was a fine day.") > .5 > quality.score("cat cat the | the Cat | Ran To") and 0 < quality.score("") < 1
    assert reason(quality(doc("| | the the the cat cat | | the"))) == "low quality"
    again = pickle.loads(pickle.dumps(quality))
    assert again == quality and again.score(PROSE) == quality.score(PROSE) and hash(again) == hash(quality)
    save_quality(quality, tmp_path/"q.safetensors")
    assert load_quality(tmp_path/"q.safetensors") == quality and repr(load_quality(tmp_path/"q.safetensors")) == repr(quality)
    strict = QualityFilter(quality.weights, quality.bias, 1.)
    assert repr(strict) != repr(quality) and len(repr(quality)) < 80 and reason(strict(doc(PROSE))) == "low quality" and reason(QualityFilter(quality.weights, quality.bias, 0.)(doc("|"))) is None
    assert reason(QualityFilter(quality.weights, quality.bias, quality.score(PROSE))(doc(PROSE))) is None
    assert repr(QualityFilter(quality.weights, quality.bias + 1)) != repr(quality)
    save_quality(strict, tmp_path/"q.safetensors")
    assert load_quality(tmp_path/"q.safetensors").min_score == 1.


def test_training_weighs_classes_and_depends_on_the_seed_only():
    good, bad = [f"the fine word number {i} of all" for i in range(40)], [f"xx | {i} | xx" for i in range(10)]
    a, b, c = (train_quality(good, bad, s) for s in (0, 0, 1))
    assert a == b != c and all(a.score(t) > .5 for t in good) and all(a.score(t) < .5 for t in bad)
    same = train_quality(["x"]*90, ["x"]*10, n_epochs=20)
    assert .4 < same.score("x") < .6  # as if there were as many of one as of the other
    for g, bd in (([], ["x"]), (["x"], [])):
        with pytest.raises(ValueError, match="give some of each"): train_quality(g, bd)


def test_what_is_no_classifier_is_told(tmp_path):
    from safetensors.numpy import save_file
    (tmp_path/"text").write_text("no", encoding="utf-8")
    save_file(dict(weights=np.zeros(4, np.float64)), tmp_path/"other")
    for name, told in (("text", "not safetensors"), ("other", "not a classifier"), ("absent", "is missing")):
        with pytest.raises(UserError, match=told): load_quality(tmp_path/name)


def test_spoilt_text_is_spoilt_in_four_ways():
    rng, text = random.Random(0), PROSE*3
    found = Counter("menu" if " | " in t and t.istitle() else "order" if sorted(t.split()) == sorted(text.split()) else "few words" if len(set(t.split())) <= 6 else "misread" for t in (spoil(text, rng) for _ in range(200)))
    assert set(found) == {"menu", "order", "few words", "misread"} and min(found.values()) > 25
    assert all(isinstance(spoil("", rng), str) for _ in range(20))


def test_the_books_examples(monkeypatch):
    read = cache(lambda name: list(cleaning_reads(name)))
    cleaning_reads = cleaning.read_source
    monkeypatch.setattr(cleaning, "read_source", read)
    good, bad = quality_texts(30, seed=1)
    assert (len(good), len(bad)) == (30, 30) and (good, bad) == quality_texts(30, seed=1) != quality_texts(30, seed=2) and not set(good) & set(bad)
    assert not any("<p>" in t for t in bad)


# words

def test_words_are_whole_and_shares_are_counted():
    one = WordFilter(frozenset({"pot", "rum"}))
    assert [reason(one(doc(t))) for t in ("A spotted drum.", "POT!", "", "a rum-cake")] == [None, "listed words", None, "listed words"]
    tenth = WordFilter(frozenset({"pot"}), .1)
    assert reason(tenth(doc("pot " + "a "*9))) is None and reason(tenth(doc("pot " + "a "*8))) == "listed words"


def test_the_list_is_pinned_and_never_printed():
    words = listed_words()
    printed = repr(WordFilter(words, .05))
    assert len(words) == 916 and all(w == w.lower() and w for w in words) and "916 words" in printed and "0.05" in printed and len(printed) < 80
    assert not any(w in printed for w in words if len(w) > 4 and w.isalpha())
    assert repr(WordFilter(words)) != repr(WordFilter(words - {next(iter(words))})) and repr(WordFilter(frozenset("ab"))) == repr(WordFilter(frozenset("ba")))


# all together

@settings(max_examples=120, deadline=None)
@given(text=st.one_of(st.text(st.characters(exclude_categories=()), max_size=200), st.lists(st.sampled_from(["<p>", "</b>", "<html>", "\ud800", "\0", "{", "\n", "the of", "...", "•", "#", "&lt;", "x"*30, "\u2028", "é", "Ã©"]), max_size=60).map(" ".join)),
       meta=st.sampled_from([{}, dict(format="html"), dict(format="text")]))
def test_any_text_passes_or_is_dropped_and_what_passes_is_valid(quality, text, meta):
    for stage in (*full_stages(quality, frozenset({"pot"})), *basic_stages()):
        for given_ in (doc(text, **meta),):
            new = stage(given_)
            assert isinstance(new, Drop) and new.reason or isinstance(new, Document) and isinstance(new.text, str) and new.id == given_.id and new.source == given_.source
    for new in apply_stages([doc(text, **meta)], basic_stages(), Report()): assert new.text.strip() and new.text.encode("utf-8")


def test_ready_lists(quality):
    words = frozenset({"pot"})
    names = [type(s).__name__ for s in full_stages(quality, words)]
    assert names == ["FromHtml", "function", "GopherRules", "KeepLanguages", "RepetitionRules", "C4Rules", "QualityFilter", "WordFilter"] and [type(s).__name__ for s in basic_stages()] == names[:2]
    assert pickle.loads(pickle.dumps(full_stages(quality, words))) == full_stages(quality, words) and " at 0x" not in repr([s for s in full_stages(quality, words) if s is not repair_unicode])
    assert full_stages(quality, words)[2].min_stop_words == 2 and full_stages(quality, words, ("en", "fr"))[2].min_stop_words == full_stages(quality, words, ("fr",))[2].min_stop_words == 0


def test_order_in_the_ready_list_is_html_then_letters(quality):
    page = "<p>" + "Das ist schÃ¶n. "*3 + "</p>"
    assert [d.text for d in apply_stages([doc(page)], basic_stages(), Report())] == ["Das ist schön. "*2 + "Das ist schön."]


def test_missing_packages_are_told_before_the_run(monkeypatch, quality):
    find = cleaning.importlib.util.find_spec
    for gone in ("resiliparse", "ftfy", "py3langid"):
        monkeypatch.setattr(cleaning.importlib.util, "find_spec", lambda name, gone=gone: None if name == gone else find(name))
        with pytest.raises(UserError, match=rf"needs {gone}: run `pip install 'llm_scratch\[data\]'`"): full_stages(quality, frozenset())


def test_waterfall(quality):
    stages = [GopherRules(min_words=5), WordFilter(frozenset({"pot"}))]
    report = Report()
    kept = list(apply_stages([doc("a pot of bread with the best"), doc("short"), doc("the bread of today is good"), Drop("bad line", "x")], stages, report))
    assert waterfall(report, stages) == [("read", 0, 3), ("GopherRules", 1, 2), ("WordFilter", 1, 1)] and len(kept) == 1
    assert [name for name, *_ in waterfall(report)] == ["read", "WordFilter", "GopherRules"]
    assert waterfall(Report(), stages) == [("read", 0, 0), ("GopherRules", 0, 0), ("WordFilter", 0, 0)]
    figure = plot_waterfall(report, stages)
    assert [p.get_width() for p in figure.axes[0].patches] == [3, 2, 1, 0, 1, 1] and [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["read", "GopherRules", "WordFilter"]

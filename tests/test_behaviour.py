"Failure patterns: planted ones are found and none where there is none, groups equal to scikit-learn's, tests equal to scipy's, a page that loads nothing and escapes everything."
import math
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.behaviour import (Pattern, PatternScore, answer_signs, beyond_calm, browse_patterns, embed_by, embed_words, examples_html, failure_patterns, fewer_dims, group_texts, is_bad, is_judged, k_means,
                                   pattern_precision_recall, pattern_signs, plain_words, product_of, save_dashboard, silhouette, squared_distances, telling_terms, tfidf_vectors, time_bins, unit_rows, worse_groups)
from llm_scratch.core import UserError
from llm_scratch.evaluation import Result, share_of
from llm_scratch.families import BareEncoder
from llm_scratch.feedback import Interaction

some = settings(max_examples=40, deadline=None, database=None)
KINDS = dict(bread="flour oven dough loaf yeast crust knead rise", law="court judge clause contract party appeal verdict statute", sky="star comet orbit moon telescope planet eclipse nova", sport="goal match referee league striker penalty coach stadium")
FILL = "please tell me about the one with my next".split()
NASTY = "<script>alert(1)</script><img src=https://evil.example/x.png onerror=alert(1)> ]]> {{x}} $\\frac{1}{0}$ \u202e\x00 &amp; \ud800"


def asked(i, prompt, **more): return Interaction(f"i{i}", **(dict(time=1.79e9+60*i, model="m-1", prompt=prompt, answer="Knead it.", consent=True) | more))


def users(seed, failing, n=400, there=.7, here=.1):
    "Requests of four kinds, half of them judged; the words of a kind come with words of all."
    rng, out, where = np.random.default_rng(seed), [], {k: [] for k in failing}
    for i in range(n):
        kind = list(KINDS)[rng.integers(len(KINDS))]
        bad = rng.random() < (there if kind in failing else here)
        if kind in failing: where[kind].append(i)
        words = [*rng.choice(KINDS[kind].split(), 3, replace=False), *rng.choice(FILL, 4)]
        out.append(asked(i, " ".join(rng.permutation(words)), rating=(-1 if bad else 1)*int(rng.random() < .5), latency_s=float(rng.random())))
    return out, where


@pytest.fixture(scope="module")
def seen(): return users(0, ["law", "sky"])


@pytest.fixture(scope="module")
def patterns(seen): return failure_patterns(seen[0])


# --- patterns ---------------------------------------------------------------------------------------------------------

def test_planted_patterns_are_found_and_named():
    total = np.zeros(4, dtype=int)
    for seed in range(8):
        failing = [["law"], ["law", "sky"], ["bread", "sky", "law"], ["sport"]][seed % 4]  # three of four fail, too
        seen, where = users(seed, failing)
        found = failure_patterns(seen, seed=seed)
        total += pattern_precision_recall(found, where)
        for p in found:
            most = max(where, key=lambda k: len(set(where[k]) & set(p.members)))
            assert set(p.terms[:2]) <= set(KINDS[most].split()) or len(set(where[most]) & set(p.members)) < len(p.members)/2, p.name
        assert [p.impact.mean for p in found] == sorted((p.impact.mean for p in found), reverse=True)
    right, said, found, planted = total
    assert right/said >= .9 and found/planted >= .9, total


def test_the_worst_is_first_and_figures_are_counts(seen, patterns):
    interactions, _ = seen
    assert patterns
    for p in patterns:
        own = [interactions[i] for i in p.members]
        judged, bad = [s for s in own if s.rating], [s for s in own if s.rating < 0]
        assert p.frequency == share_of(len(own), len(interactions)) and p.badness == share_of(len(bad), len(judged))
        assert p.impact.mean == pytest.approx(len(own)/len(interactions)*len(bad)/len(judged))
        assert p.badness.interval[0] > p.elsewhere.mean and 0 < p.p <= .05
    assert not set(patterns[0].members) & set(patterns[1].members)


def test_none_is_found_where_none_is_planted():
    "The share of false alarms keeps its promise of 5 % when groups are fixed and ratings fall blindly."
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(10), [5, 8, 10, 12, 15, 20, 20, 30, 40, 60])
    judged = rng.random(220) < .6
    alarms = sum(bool(worse_groups(groups, rng.random(220) < .25, judged, repeats=200, seed=i)) for i in range(400))
    assert share_of(alarms, 400).interval[0] < .05 < .02+alarms/400 < .11, alarms
    assert sum(bool(failure_patterns(users(seed, [], n=300)[0], seed=seed, n_patterns=6)) for seed in range(8)) <= 2


def test_bad_groups_do_not_hide_each_other():
    bad = np.concatenate([np.arange(20) < n for n in (15, 15, 15, 3)])
    assert set(worse_groups(np.repeat([7, 1, 2, 3], 20), bad, np.ones(80, dtype=bool))) == {7, 1, 2}


def test_two_groups_are_counted_exactly():
    "Shuffling tends to the exact share over all ways to fall."
    from scipy.stats import hypergeom
    n_G, a = np.array([12, 30]), np.arange(11)
    T = beyond_calm(np.stack([a, 10-a], 1), n_G)
    exact = hypergeom.pmf(a, 42, 10, 12)[T.max(1) >= T[6].max()-1e-9].sum()
    mark = np.concatenate([np.arange(12) < 6, np.arange(30) < 4])
    assert worse_groups(np.repeat([0, 1], n_G), mark, np.ones(42, dtype=bool), 1, repeats=8000)[0] == pytest.approx(exact, abs=.008)


def test_who_did_not_judge_does_not_count():
    groups, bad, judged = np.repeat([0, 1, 2], 40), np.zeros(120, dtype=bool), np.ones(120, dtype=bool)
    bad[:30], bad[[50, 90]] = True, True
    assert set(worse_groups(groups, bad, judged)) == {0}
    judged[:30] = False  # ten are left in the group, all of them good
    assert worse_groups(groups, bad, judged) == worse_groups(groups, bad & judged, judged) == worse_groups(groups, bad, ~judged & False) == {}
    judged[20:30] = True  # ten bad ones of twenty, and what was not judged makes them no fewer
    assert worse_groups(groups, bad, judged) == worse_groups(groups[judged], bad[judged], judged[judged]) != {}


@pytest.mark.parametrize("prompts", [[], ["a"], ["same"]*30, ["", " "], ["12 ! ?"]*5 + ["3"]*5, ["one word", "another thing"]])
def test_too_little_says_nothing(prompts): assert failure_patterns([asked(i, p, rating=-1) for i, p in enumerate(prompts)]) == []


def test_text_that_may_not_be_read_is_left_out(seen):
    "Places are those of the whole list, with and without consent."
    interactions, where = seen
    hidden = [asked(1000+i, "", answer="", consent=False, rating=-1) for i in range(50)]
    shifted = failure_patterns([*hidden, *interactions])
    assert [tuple(i-50 for i in p.members) for p in shifted] == [p.members for p in failure_patterns(interactions)]


def test_the_seed_decides(seen):
    assert failure_patterns(seen[0], seed=3) == failure_patterns(seen[0], seed=3)


def test_a_correction_is_a_judgement():
    assert is_bad(asked(0, "a", correction="b")) and is_judged(asked(0, "a", correction="b"))
    assert not is_bad(asked(0, "a", rating=1, correction="b")) and not is_judged(asked(0, "a", comment="hm"))


def test_the_score_sees_wrong_and_missing_patterns():
    p = lambda *members: Pattern("n", (), members, *[Result(0., 1., 1)]*4, .01)
    planted = dict(a=[0, 1, 2, 3], b=[4, 5, 6, 7])
    assert pattern_precision_recall([p(0, 1, 9)], planted) == PatternScore(1, 1, 1, 2)
    assert pattern_precision_recall([p(0, 9, 10)], planted) == PatternScore(0, 1, 0, 2)
    assert pattern_precision_recall([p(0), p(1)], planted) == PatternScore(2, 2, 1, 2)
    assert pattern_precision_recall([p(0)], planted).recall == 0 and pattern_precision_recall([p(8)], {}).precision == 0
    assert pattern_precision_recall([], {}).precision == pattern_precision_recall([], {}).recall == 1


def test_intervals_of_products_cover():
    rng, hit = np.random.default_rng(0), 0
    for _ in range(400):
        n = rng.binomial(300, .2)
        low, high = product_of(share_of(int(n), 300), share_of(int(rng.binomial(n//2, .6)), int(n//2))).interval
        hit += low <= .12 <= high
    assert .92 < hit/400 <= 1


# --- vectors, groups, names -------------------------------------------------------------------------------------------

def test_vectors_are_scikit_learns():
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    texts = [s.prompt for s in users(1, [], n=80)[0]]
    want, mine = TfidfVectorizer(analyzer=plain_words, min_df=2, sublinear_tf=True).fit_transform(texts).toarray(), tfidf_vectors(texts)
    assert np.allclose(mine @ mine.T, want @ want.T, atol=1e-5)
    theirs, ours = TruncatedSVD(3, algorithm="arpack").fit_transform(want), fewer_dims(mine, 3)  # four kinds: a gap comes behind these directions
    assert np.allclose(ours @ ours.T, theirs @ theirs.T, atol=.02)
    assert tfidf_vectors(["only", "single", "words"]).shape == (3, 1) and not tfidf_vectors(["x1", ""]).any()


def test_groups_are_scikit_learns():
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score
    X = unit_rows(embed_words([s.prompt for s in users(2, [], n=200)[0]]))
    for k in (2, 4, 7):
        labels, cost = k_means(X, k)
        assert cost <= 1.03*KMeans(k, n_init=4, random_state=0).fit(X).inertia_
        assert cost == pytest.approx(sum(((X[labels == j]-X[labels == j].mean(0))**2).sum() for j in range(k)), rel=1e-3)
        assert silhouette(np.sqrt(squared_distances(X, X)), labels) == pytest.approx(silhouette_score(X, labels), abs=.002)


def test_how_many_groups():
    rng = np.random.default_rng(0)
    centres = 10*np.eye(5, 6)
    X = (centres[np.arange(200) % 5] + rng.standard_normal((200, 6))).astype(np.float32)
    groups = group_texts(X)
    assert len(set(groups)) == 5 and all(len(set(groups[i::5])) == 1 for i in range(5))
    assert len(set(group_texts(X, 3))) == 3 and set(group_texts(np.zeros((9, 2), dtype=np.float32))) == {0}
    with pytest.raises(UserError, match="from 1 to 9"): group_texts(np.zeros((9, 2), dtype=np.float32), 10)


@some
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20), st.integers(1, 4))
def test_k_means_ends_with_every_point_at_its_nearest_mean(points, k):
    X = np.array(points, dtype=np.float32)
    if k > len(X): return
    labels, cost = k_means(X, k)
    assert labels.shape == (len(X),) and set(labels) <= set(range(k)) and 0 <= cost <= ((X-X.mean(0))**2).sum()+1e-3


@pytest.mark.parametrize("make", [Decoder, BareEncoder])
def test_own_vectors_do_not_see_what_fills_rows(make):
    class Letters:
        def encode(self, text): return [ord(c) % 64 for c in text]
    torch.manual_seed(0)
    cfg = ModelConfig(vocab_size=64, context_len=16, n_layers=1, n_heads=2, n_kv_heads=2, d_head=8, d_model=16, d_ff=32)
    texts = ["a", "a longer text than fits into sixteen", "", "of middle len"]
    together, alone = (embed_by(make(cfg).eval() if i < 0 else model, Letters(), batch_size=n)(texts) for model in [make(cfg).eval()] for i, n in ((0, 4), (0, 1)))
    assert together.shape == (4, 16) and np.allclose(together, alone, atol=1e-4)
    assert np.abs(together-together[0]).max() > .1


def test_terms_are_at_home_inside():
    inside, outside = ["rye bread is good"]*20 + ["typo xyzzy"], ["wine tastes good"]*25 + ["red wine is the best"]*10
    terms = telling_terms(inside, outside)
    assert {w for w, _ in terms[:2]} == {"rye", "bread"} and all(z > 1 for _, z in terms)
    assert "is" not in dict(terms) and "xyzzy" not in dict(terms)
    assert telling_terms([], ["a b"]) == telling_terms([], []) == []


# --- signs, the page, the widget --------------------------------------------------------------------------------------

def test_signs():
    assert answer_signs(asked(0, "one two three", answer="")) == ["empty"]
    assert answer_signs(asked(0, "one two three", answer="One two three four", finish="length", guard="input:block")) == ["cut off", "begins with the question", "the guard stepped in"]
    assert answer_signs(asked(0, "a", answer="mix it and stir "*3)) == ["says the same again and again"]
    interactions = [asked(i, f"p {i}", finish="length" if i < 30 else "stop") for i in range(60)]
    p = Pattern("n", (), tuple(range(30)), *[Result(.5, .1, 9)]*4, .01)
    assert list(pattern_signs(interactions, p)) == ["cut off"]
    assert pattern_signs([asked(i, f"p {i}", finish="length" if i % 2 else "stop") for i in range(60)], p) == {}  # as often inside as outside
    assert pattern_signs(interactions, Pattern("n", (), tuple(range(60)), *[Result(.5, .1, 9)]*4, .01)) == {}


def test_bins_hold_all():
    interactions = [asked(i, "p", rating=(i % 3)-1, latency_s=float(i)) for i in range(50)]
    bins = time_bins(interactions[::-1])
    assert sum(b.n for b in bins) == 50 and [b.start for b in bins] == sorted(b.start for b in bins) and bins[0].median_s < bins[-1].median_s
    assert sum(round(b.bad.mean*b.bad.n) for b in bins) == sum(s.rating < 0 for s in interactions)
    one = time_bins(interactions[:1])
    assert len(one) == 1 and math.isnan(time_bins([asked(0, "p")])[0].bad.mean)
    holes = time_bins([asked(i, "p", time=t) for i, t in enumerate([0.]*8+[1000.])])
    assert sum(b.n for b in holes) == 9


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.handlers = Counter(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background") or (k == "style" and "url(" in v and "url(#" not in v)]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


def read(html):
    page = Links()
    page.feed(html)
    return page


def test_the_page_loads_nothing_and_escapes_what_users_say(tmp_path):
    mean = [asked(i, f"{NASTY} law court", answer=NASTY, comment=NASTY, correction=NASTY, rating=-1, model="<b>m</b>") for i in range(20)] + [asked(20+i, "bread flour oven", rating=1) for i in range(20)]
    found = [Pattern("<i>$x$</i> 面包", ("<u>",), tuple(range(20)), *[Result(.5, .1, 20)]*4, .01)]
    path = save_dashboard(mean, found, tmp_path/"new"/"b.html", drift=[{"<what>": "<s>", "p": .123456}, {"p": 1}])
    html = path.read_text(encoding="utf-8")
    page = read(html)
    assert not page.tags.keys() & {"script", "img", "iframe", "object", "embed", "link", "form", "i", "b", "u", "s", "base", "audio", "video"} and not page.handlers
    assert all(link.startswith("#") for link in page.links) and "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "\u202e" not in html and "\x00" not in html and "&lt;script&gt;" in html and "&lt;what&gt;" in html and "0.1235" in html
    assert page.tags["svg"] == 4 and page.tags["h3"] == 1 and page.tags["pre"] == 3
    assert read("<a href=http://x onclick=1>").links and read("<a href=http://x onclick=1>").handlers  # the reader of pages itself


def test_the_page_says_when_there_is_nothing(tmp_path):
    html = save_dashboard([asked(0, "", consent=False, answer="")], [], tmp_path/"b.html").read_text(encoding="utf-8")
    assert "No kind of request is answered worse" in html and "Drift" not in html and "nan" not in html.lower().replace("nan-", "")
    with pytest.raises(UserError, match="0 interactions"): save_dashboard([], [], tmp_path/"c.html")
    assert not (tmp_path/"c.html").exists()


def test_examples_are_bad_ones_with_a_word_first():
    interactions = [asked(0, "good", rating=1), asked(1, "early", rating=-1), asked(2, "late", rating=-1), asked(3, "said", rating=-1, comment="hm"), asked(4, "mended", correction="so"), asked(5, "x"*2000, rating=-1)]
    p = Pattern("n", (), tuple(range(6)), *[Result(.5, .1, 9)]*4, .01)
    html = examples_html(interactions, p, 5)
    order = [html.index(word) for word in ("mended", "said", "xxx", "late", "early")]
    assert order == sorted(order) and ">good" not in html and "x"*601 not in html
    assert examples_html(interactions[:1], Pattern("n", (), (0,), *[Result(.5, .1, 9)]*4, .01)) == "<p>No example.</p>"


def test_the_widget_is_tied_in_the_browser(seen, patterns):
    import ipywidgets as widgets
    box = browse_patterns(seen[0], patterns)
    choice, shown = box.children
    assert isinstance(shown, widgets.Stack) and len(choice.options) == len(shown.children) == len(patterns)
    assert [name.partition(". ")[2] for name, _ in choice.options] == [p.name for p in patterns]
    links = [w for w in widgets.Widget._instances.values() if isinstance(w, widgets.widget_link.Link)] if hasattr(widgets.Widget, "_instances") else [w for w in widgets.widgets.widget._instances.values() if isinstance(w, widgets.widgets.widget_link.Link)]
    assert any(link.source == (choice, "index") and link.target == (shown, "selected_index") for link in links)

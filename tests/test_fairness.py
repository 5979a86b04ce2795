"Rates by group, gaps with a sign, deals, planted bias and thresholds, on made-up answers; no test downloads."
import sys
import zipfile
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llm_scratch import fairness
from llm_scratch.clauses import CORE_14, Clause
from llm_scratch.core import UserError, read_json
from llm_scratch.fairness import (GROUP_RATES, LENGTH_CUTS, LIABILITY, Judged, audit_fairness, clause_cluster, compare_groups, fair_thresholds, fair_twin, group_figure, group_tally,
                                  judge_clauses, largest_gap, licence_kinds, plant_errors, rates_by_group, reweigh_groups, shuffled_groups)

ROOT = Path(__file__).resolve().parent.parent
metrics = pytest.importorskip("fairlearn.metrics")


def world(n=360, clusters=60, seed=0):
    "Texts of two features, whose clusters lie in one kind each and have short and long texts; all are judged rightly."
    rng = np.random.default_rng(seed)
    return [Judged(f"text {i}", label := str(rng.choice(["yes", "no"], p=[.4, .6])), label, dict(kind="xyz"[c % 3], length=str(rng.choice(["long", "short"]))), f"c{c}") for i in range(n) for c in [i % clusters]]


def of(judged, feature="kind"): return [j.said == j.label for j in judged], [j.groups[feature] for j in judged], [j.cluster for j in judged]


# --- rates ---------------------------------------------------------------------------------------------------------

@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("abc")), min_size=4, max_size=40))
@settings(max_examples=25, deadline=None)
def test_rates_are_fairlearns(rows):
    from sklearn.metrics import accuracy_score
    true, said, groups = (np.array(x) for x in zip(*rows))
    frame = metrics.MetricFrame(metrics={"accuracy": accuracy_score, "selection rate": metrics.selection_rate, "n": metrics.count, "true positive rate": lambda t, s: s[t].mean() if t.any() else -1,
                                         "false positive rate": lambda t, s: s[~t].mean() if (~t).any() else -1}, y_true=true, y_pred=said, sensitive_features=groups)
    for name in list(GROUP_RATES)[:4]:
        hit, counted = GROUP_RATES[name](true, said)
        ours = group_tally(hit[counted], groups[counted])
        for g, theirs in frame.by_group[name].items(): assert (ours[g][0]/ours[g][1] if g in ours else -1) == pytest.approx(theirs)
    assert {g: n for g, (_, n) in group_tally(true, groups).items()} == dict(frame.by_group["n"])


def test_the_base_rate_says_nothing_of_answers():
    true = np.array([True, False, True])
    for said in (true, ~true): assert GROUP_RATES["base rate"](true, said)[0].tolist() == true.tolist()


def test_a_tally_wants_a_group_for_each_text():
    with pytest.raises(ValueError): group_tally([True, False], ["a"])


# --- deals ---------------------------------------------------------------------------------------------------------

@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("uvwxyz")), min_size=2, max_size=20), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_deal_swaps_whole_clusters_and_mixes_within_the_others(rows, seed):
    groups, clusters = zip(*rows)
    names = sorted(set(groups))
    dealt = np.concatenate(list(shuffled_groups(groups, clusters, 7, seed)))
    assert dealt.shape == (7, len(rows))
    own = {c: [names.index(g) for g, k in rows if k == c] for c in set(clusters)}
    whole = [c for c in own if len(set(own[c])) == 1]
    for row in dealt.tolist():
        new = {c: [g for g, k in zip(row, clusters) if k == c] for c in own}
        assert all(Counter(new[c]) == Counter(own[c]) for c in own if c not in whole)
        assert all(len(set(new[c])) == 1 for c in whole)
        assert Counter(new[c][0] for c in whole) == Counter(own[c][0] for c in whole)
    assert (np.concatenate(list(shuffled_groups(groups, clusters, 7, seed))) == dealt).all()


def test_all_deals_are_alike():
    rows = np.concatenate(list(shuffled_groups("aab", "xyz", 3000)))
    count = Counter(map(tuple, rows.tolist()))
    assert set(count) == {(0, 0, 1), (0, 1, 0), (1, 0, 0)} and min(count.values()) > 880
    mixed = Counter(map(tuple, np.concatenate(list(shuffled_groups("aab", "xxx", 3000))).tolist()))
    assert set(mixed) == set(count) and min(mixed.values()) > 880


def test_many_deals_come_in_pieces():
    pieces = list(shuffled_groups(["a", "b"]*20000, [str(i) for i in range(40000)], 105))
    assert [len(p) for p in pieces] == [52, 52, 1] and pieces[0].size <= 2**21
    assert not (pieces[0][0] == pieces[1][0]).all()


# --- rates and gaps ------------------------------------------------------------------------------------------------

def test_ten_clusters_make_a_rate_and_nine_do_not():
    for clusters in (9, 10):
        hit, groups = [True, False]*50, ["a"]*40 + ["b"]*60
        where = [f"a{i % clusters}" for i in range(40)] + [f"b{i % 20}" for i in range(60)]
        a, b = rates_by_group(hit, groups, where, repeats=50)
        assert (a.group, a.n, a.clusters, b.n, b.clusters) == ("a", 40, clusters, 60, 20)
        assert (a.rate is None, a.gap is None, a.p is None) == (clusters < 10,)*3
        assert b.rate is not None and (b.gap is None) == (clusters < 10) # nothing to compare with


def test_a_gap_is_the_group_minus_all_others():
    rng = np.random.default_rng(0)
    hit, groups, clusters = rng.random(300) < .7, rng.choice(["a", "b", "c"], 300), rng.choice(60, 300).astype(str)
    for g in rates_by_group(hit, groups, clusters, repeats=200):
        assert g.rate.mean == pytest.approx(hit[groups == g.group].mean())
        assert g.gap.mean == pytest.approx(hit[groups == g.group].mean()-hit[groups != g.group].mean())
        assert g.n == (groups == g.group).sum() and g.rate.n == g.clusters == len(set(clusters[groups == g.group]))


def test_p_is_scipys_where_each_text_stands_alone():
    rng = np.random.default_rng(1)
    for shift in (0, .15, .4):
        groups = np.array(["a"]*40 + ["b"]*60)
        hit = rng.random(100) < np.where(groups == "a", .8-shift, .8)
        ours = rates_by_group(hit, groups, [str(i) for i in range(100)], repeats=2000)[0].p
        theirs = stats.permutation_test((hit[:40]*1., hit[40:]*1.), lambda x, y, axis: abs(x.mean(axis)-y.mean(axis)), alternative="greater", vectorized=True, n_resamples=2000, rng=np.random.default_rng(0)).pvalue
        assert ours == pytest.approx(theirs, abs=.04)
    assert rates_by_group([True]*40+[False]*40, ["a"]*40+["b"]*40, [str(i) for i in range(80)], repeats=99)[0].p == .01 # ours is one of a hundred worlds


def test_error_bars_are_those_of_clusters():
    rng = np.random.default_rng(2)
    hit, groups, where = rng.random(120) < .6, np.array(["a", "b"]*60), np.arange(120).astype(str)
    once = rates_by_group(hit, groups, where, repeats=400)
    copies = rates_by_group(np.repeat(hit, 4), np.repeat(groups, 4), np.repeat(where, 4), repeats=400)
    strangers = rates_by_group(np.repeat(hit, 4), np.repeat(groups, 4), np.arange(480).astype(str), repeats=400)
    assert copies[0].rate.stderr == pytest.approx(once[0].rate.stderr, rel=.05) and copies[0].gap.stderr == pytest.approx(once[0].gap.stderr, rel=.1)
    assert strangers[0].gap.stderr < .6*once[0].gap.stderr and strangers[0].rate.stderr < .6*once[0].rate.stderr
    assert abs(copies[0].p-once[0].p) < .1 and once[0].gap.stderr == pytest.approx(np.sqrt(.24/60*2), rel=.15)


def test_a_group_that_is_all_right_is_not_certain():
    rng = np.random.default_rng(3)
    hit = np.concatenate([np.ones(30), rng.random(300) < .97])
    a = rates_by_group(hit, ["a"]*30+["b"]*300, [str(i % 110) for i in range(330)], repeats=400)[0]
    assert a.rate.mean == 1 and a.rate.stderr > .05 and a.gap.stderr > .02


def test_one_group_has_a_rate_and_no_gap():
    (only,) = rates_by_group([True, False]*20, ["a"]*40, [str(i) for i in range(40)], repeats=10)
    assert only.rate.mean == .5 and only.gap is None and only.p is None


# --- largest minus smallest ----------------------------------------------------------------------------------------

def test_largest_gaps_are_fairlearns():
    rng = np.random.default_rng(4)
    true, said, groups, clusters = rng.random(200) < .5, rng.random(200) < .4, rng.choice(["a", "b", "c", "d"], 200), rng.choice(30, 200).astype(str)
    assert largest_gap([(said, groups, clusters)], least=1, repeats=20)[0].mean == pytest.approx(metrics.demographic_parity_difference(true, said, sensitive_features=groups))
    parts = [(said[m], groups[m], clusters[m]) for m in (true, ~true)]
    for some in (parts, parts[::-1]): assert largest_gap(some, least=1, repeats=20)[0].mean == pytest.approx(metrics.equalized_odds_difference(true, said, sensitive_features=groups))


def test_a_tiny_group_makes_no_gap():
    hit, groups = [True, False]*60 + [False], ["a"]*60 + ["b"]*60 + ["tiny"]
    where = [str(i) for i in range(121)]
    assert largest_gap([(hit, groups, where)], repeats=50)[0].mean == 0 and largest_gap([(hit, groups, where)], least=1, repeats=50)[0].mean == .5
    assert largest_gap([(hit[:60], groups[:60], where[:60])]) is None


def test_a_group_that_a_draw_leaves_empty_has_no_share():
    assert fairness._apart(np.array([[1, 0, 3], [0, 2, 1]]), np.array([[2, 0, 4], [2, 2, 2]])).tolist() == [.25, 1.]


def test_chance_makes_gaps_and_bias_makes_more():
    rng = np.random.default_rng(5)
    groups, where = np.array(list("abcd")*30), np.arange(120).astype(str)
    fair, biased = rng.random(120) < .9, rng.random(120) < np.where(groups == "a", .3, .95)
    measured, by_luck = largest_gap([(fair, groups, where)], repeats=500)
    assert .05 < by_luck.mean < .25 and abs(measured.mean-by_luck.mean) < 2.5*by_luck.stderr and measured.stderr > 0
    measured, by_luck = largest_gap([(biased, groups, where)], repeats=500)
    assert measured.mean > by_luck.mean + 4*by_luck.stderr


# --- the audit -----------------------------------------------------------------------------------------------------

def test_what_is_compared():
    judged = fair_twin(world(), seed=1)
    rates, tests = compare_groups(judged, ["yes"], repeats=100)
    assert {(t.rate, t.feature, t.found.group) for t in tests if t.feature == "length"} == {(r, "length", "long") for r in ("accuracy", "true positive rate", "false positive rate")} # two groups are one comparison
    assert Counter(t.feature for t in tests) == {"kind": 9, "length": 3, "kind and length": 6}
    assert {n for n, f in rates if f == "kind"} == set(GROUP_RATES) and {n for n, f in rates if f == "kind and length"} == {"accuracy"}
    from llm_scratch.evaluation import holm
    assert [t.p for t in tests] == holm([t.found.p for t in tests])
    assert {n for n, _ in compare_groups(judged, repeats=50)[0]} == {"accuracy"}
    true_yes = [j for j in judged if j.label == "yes"]
    assert rates["true positive rate", "kind"][0].rate.mean == pytest.approx(np.mean([j.said == "yes" for j in true_yes if j.groups["kind"] == "x"]))
    assert rates["false positive rate", "kind"][0].rate.mean == pytest.approx(np.mean([j.said == "yes" for j in judged if j.label == "no" and j.groups["kind"] == "x"]))
    assert rates["false positive rate", "kind"][0].n == sum(j.label == "no" and j.groups["kind"] == "x" for j in judged)


def test_a_planted_bias_is_found_and_its_absence_is_not():
    fair = [fair_twin(world(), seed=i) for i in range(8)]
    loud = [audit_fairness(plant_errors(j, "kind", "y", .35, i), ["yes"], repeats=600) for i, j in enumerate(fair)]
    quiet = [audit_fairness(j, ["yes"], repeats=600) for j in fair]
    row = lambda s, name: next(r for r in s.rows if r["name"] == name)
    assert sum(any(n.startswith("Found: accuracy of kind y is -") for n in s.notes) for s in loud) >= 7
    assert sum(row(s, "groups treated differently")["mean"] > 0 for s in quiet) <= 1
    worst = row(loud[0], "accuracy, kind, y")
    assert row(loud[0], "accuracy above the others, kind, y")["mean"] < -.2 and worst["mean"] < row(loud[0], "accuracy, kind, x")["mean"]
    assert row(loud[0], "accuracy, worst group")["mean"] <= worst["mean"] and row(loud[0], "groups treated differently")["n"] == 18
    assert all(r["step"] == "audit" and r["n"] > 0 and np.isfinite(r["mean"]) for s in (*loud, *quiet) for r in s.rows)
    names = [r["name"] for r in loud[0].rows]
    assert len(names) == len(set(names)) and {"demographic parity difference, kind", "equalised odds difference, length, by chance alone", "base rate, kind, z", "accuracy, all"} <= set(names)


def test_a_group_of_one_is_named_and_has_no_number():
    judged = fair_twin(world(), seed=2)
    judged[0] = judged[0]._replace(groups=dict(kind="rare", length="long"))
    section = audit_fairness(judged, ["yes"], repeats=100)
    assert not any("rare" in r["name"] for r in section.rows)
    assert any("by kind: rare (1 text of 1 cluster)" in n and "A rate takes 10 clusters" in n for n in section.notes)
    assert not any("<text" in f and "rare" in f for f in section.figures)
    rows = {r["name"]: r["mean"] for r in section.rows}
    assert rows["accuracy, worst group"] == min(m for n, m in rows.items() if n.startswith(("accuracy, kind", "accuracy, length")))


def test_nothing_a_text_and_a_silent_classifier():
    assert audit_fairness([]).rows == [] and "0 texts" in audit_fairness([]).notes[0]
    one = audit_fairness(world()[:1], ["yes"], repeats=20)
    assert [r["name"] for r in one.rows] == ["accuracy, all", "accuracy, most frequent label"] and one.figures == [] and "No two groups can be compared." in one.notes
    silent = audit_fairness([j._replace(said="no") for j in world()], ["yes"], repeats=50)
    assert "'no' of every text" in silent.notes[0] and "most frequent label (0.6" in silent.notes[1]
    assert not any("every text" in n or "most frequent" in n for n in audit_fairness(world(), ["yes"], repeats=50).notes)
    no_yes = audit_fairness([j._replace(label="no") for j in world()], ["yes"], repeats=50)
    assert "Not estimable, true positive rate by kind: no text counts." in no_yes.notes and not any(r["name"].startswith(("true positive", "equalised")) for r in no_yes.rows)
    assert "true and false positive rates were not asked for" in audit_fairness(world(), repeats=20).notes[-1]


def test_all_texts_have_the_same_features():
    judged = world()
    judged[7] = judged[7]._replace(groups=dict(kind="x"))
    with pytest.raises(UserError, match="text 7 has the features kind, and text 0 has kind, length"): audit_fairness(judged)


def test_items_keep_no_text_and_the_seed_decides():
    judged = fair_twin(world(90, 30), seed=3)
    a, b = (audit_fairness(judged, ["yes"], repeats=60) for _ in range(2))
    assert a == b and a.title == "Fairness" and a.figures[0].startswith("<svg")
    assert len(a.items) == 90 and not any("text" in i for i in a.items) and len({i["item"] for i in a.items}) == 90 and a.items[3]["cluster"] == "c3"


def test_findings_are_red():
    judged = plant_errors(fair_twin(world(), seed=4), "kind", "z", .5)
    rates, tests = compare_groups(judged, repeats=400)
    points = lambda tests: {c.get_color():len(c.get_xdata()) for ax in group_figure(rates, tests).axes for c in ax.get_lines() if c.get_marker() == "o"}
    assert points(tests)["C3"] == sum(t.p < .05 and t.rate == "accuracy" for t in tests) > 0 and points([]) == {"C0": sum(len(g) for (n, _), g in rates.items() if n == "accuracy")}


# --- twins and planted errors --------------------------------------------------------------------------------------

def test_a_twin_keeps_all_but_the_answers():
    judged = world(1200, 300)
    twin = fair_twin(judged, .8, .1, seed=5)
    assert [j._replace(said="") for j in twin] == [j._replace(said="") for j in judged] and {j.said for j in twin} == {"yes", "no"}
    hit, _, clusters = of(twin)
    assert np.mean(hit) == pytest.approx(.8, abs=.04) and fair_twin(judged, .8, .1, seed=5) == twin != fair_twin(judged, .8, .1, seed=6)
    shares = lambda t: np.var([np.mean([h for h, c in zip(of(t)[0], clusters) if c == k]) for k in set(clusters)])
    assert shares(fair_twin(judged, .8, .5, seed=5)) > 1.5*shares(fair_twin(judged, .8, .01, seed=5)) # clusters are alike within


def test_errors_are_planted_where_they_should_be():
    judged = fair_twin(world(), .8, seed=6)
    for share in (0, .5, 1):
        harmed = plant_errors(judged, "kind", "x", share, 1)
        changed = [(a, b) for a, b in zip(judged, harmed) if a != b]
        assert all(a.groups["kind"] == "x" and a.said == a.label != b.said for a, b in changed)
        right = sum(j.groups["kind"] == "x" and j.said == j.label for j in judged)
        assert len(changed) == pytest.approx(share*right, abs=15*(0 < share < 1))
    with pytest.raises(UserError, match="0 of 360 texts have kind=nobody"): plant_errors(judged, "kind", "nobody", .5)
    with pytest.raises(UserError, match="have 1 labels"): fair_twin([j._replace(label="no", said="no") for j in judged])


# --- mending -------------------------------------------------------------------------------------------------------

@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=40))
def test_weights_make_label_and_group_independent(rows):
    groups, yes = (np.array(x) for x in zip(*rows))
    w = reweigh_groups(groups, yes)
    if len(set(rows)) == len(set(groups))*len(set(yes)): # every pair is there
        assert w.mean() == pytest.approx(1)
        for g in set(groups):
            assert w[groups == g].sum() == pytest.approx((groups == g).sum())
            assert w[(groups == g) & yes].sum()/w[groups == g].sum() == pytest.approx(yes.mean())
    assert (w > 0).all()


@pytest.fixture
def scored():
    rng = np.random.default_rng(7)
    groups, yes = np.array(["a", "b"]*150), rng.random(300) < .4
    return rng.normal(size=300) + 1.5*yes - 1.*(groups == "b"), yes, groups


def test_thresholds_make_odds_or_selections_equal(scored):
    scores, yes, groups = scored
    chance = fair_thresholds(*scored)(scores, groups)
    rate = lambda p, g, m: p[(groups == g) & m].mean()
    for m in (yes, ~yes): assert rate(chance, "a", m) == pytest.approx(rate(chance, "b", m), abs=1e-9)
    assert rate(chance, "a", yes) > rate(chance, "a", ~yes) + .3
    parity = fair_thresholds(*scored, "demographic_parity")(scores, groups)
    assert rate(parity, "a", yes | ~yes) == pytest.approx(rate(parity, "b", yes | ~yes), abs=1e-9)
    alone = fair_thresholds(*scored)(scores[:3], ["a", "b", "a"])
    assert alone.shape == (3,) and ((alone >= 0) & (alone <= 1)).all()


def test_thresholds_of_nobody(scored, monkeypatch):
    scores, yes, groups = scored
    with pytest.raises(UserError, match="learnt for the group c"): fair_thresholds(*scored)([.1], ["c"])
    with pytest.raises(UserError, match="the group a has only yes"): fair_thresholds(scores, yes | (groups == "a"), groups)
    with pytest.raises(UserError, match="the group b has only no"): fair_thresholds(scores, yes & (groups == "a"), groups)
    monkeypatch.setitem(sys.modules, "fairlearn.postprocessing", None)
    with pytest.raises(UserError, match=r"pip install 'llm_scratch\[safety\]'"): fair_thresholds(*scored)


# --- clauses -------------------------------------------------------------------------------------------------------

@pytest.fixture
def wheel(tmp_path, monkeypatch):
    "A package with four licences and a rule for one of them."
    with zipfile.ZipFile(tmp_path/"w.whl", "w") as z:
        for name, category in dict(mit="Permissive", gpl="Copyleft", lgpl="Copyleft Limited", gift="Proprietary Free", shop="Commercial", oath="CLA").items(): z.writestr(f"licensedcode/data/licenses/{name}.LICENSE", f"---\nkey: {name}\ncategory: {category}\n---\ncategory: no")
        z.writestr("licensedcode/data/rules/shop_1.RULE", "---\nlicense_expression: (shop OR mit) AND gpl\n---\ntext")
        z.writestr("licensedcode/data/rules/mit_7.RULE", "---\nlicense_expression: mit\nis_license_text: yes\n---\ntext")
    monkeypatch.setattr(fairness, "fetch", lambda source: tmp_path/"w.whl")


def test_kinds_are_the_packages(wheel):
    assert licence_kinds(["mit", "gpl", "lgpl", "gift", "shop", "oath", "shop_1", "mit_7", "mit"]) == dict(mit="permissive", gpl="copyleft", lgpl="copyleft", gift="free of charge", shop="commercial", oath="cla", shop_1="commercial", mit_7="permissive")


def clause(n, label, family, id, at=0): return Clause("x"*n, label, label, family, f"{id}/{at}")


def test_clauses_become_judged_texts(wheel):
    cuts = [clause(n, "warranty", "mit", "mit") for n in (LENGTH_CUTS[0], LENGTH_CUTS[0]+1, LENGTH_CUTS[1], LENGTH_CUTS[1]+1)]
    judged = judge_clauses([*cuts, clause(5, "ownership", "commercial", "shop_1", 3)], ["warranty"]*5)
    assert [j.groups["length"] for j in judged] == ["short", "middle", "middle", "long", "short"]
    assert [j.groups["licence"] for j in judged] == ["permissive"]*4 + ["commercial"]
    assert [j.cluster for j in judged] == ["mit"]*4 + ["shop_1"] # a shelf is no family
    assert judged[4].label == "ownership" and judged[4].said == "warranty" and len(judged[1].text) == LENGTH_CUTS[0]+1
    assert clause_cluster(clause(5, "a", "cc-by", "cc-by-4.0")) == "cc-by"
    with pytest.raises(ValueError, match="1 answers for 4 clauses"): judge_clauses(cuts, ["warranty"])
    assert set(LIABILITY) < set(CORE_14)


def test_the_record_is_made_and_goes_on(wheel, tmp_path, monkeypatch):
    spec = spec_from_file_location("bench_fairness", ROOT/"benchmarks"/"fairness.py")
    bench = module_from_spec(spec)
    spec.loader.exec_module(bench)
    made = [Clause(f"{label.replace('_', ' ')} of {k} number {n}", label, label, f"f{k}", f"{name}/{k}{n}") for k, name in enumerate(["mit", "gpl", "shop_1", "gift"]*8) for n, label in enumerate(("warranty", "ownership", "termination"))]
    monkeypatch.setattr(bench, "frozen_split", lambda: (made[:60], made[60:]))
    monkeypatch.setattr(bench, "GROUPS", (("licence", "permissive"),))
    out = tmp_path/"record.json"
    assert bench.main(["--tiny", "--out", str(out)]) == 0
    record = read_json(out)
    assert set(record["subjects"]) == {"keyword_rules", "tfidf_logistic", "tfidf_svm"} and record["n"] == 36 and record["power"]["twins"] == 2 and len(record["offices"]["found"]) == 5
    assert record["subjects"]["tfidf_svm"]["rows"][0].startswith("accuracy, all; ")
    for name in ("power", "offices", "audited"): monkeypatch.setattr(bench, name, None) # nothing is made again
    assert bench.main(["--tiny", "--out", str(out)]) == 0 and read_json(out) == record

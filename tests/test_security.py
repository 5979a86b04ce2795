"What went bad while nobody touched it: advisories against lists that others made, planted secrets, files that would run, filters with tests, and a schedule whose words the command line knows."
import copy
import json
import pickle
import pickletools
import random
import re
import shutil
import subprocess
import sys
import zipfile
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from hypothesis import given, settings, strategies as st
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llm_scratch.architecture import Decoder, ModelConfig, load_model, save_model
from llm_scratch.core import UserError, sha256_file
from llm_scratch.guard import GuardRule
from llm_scratch.kubernetes import check_manifests, command_facts, helm_program, read_manifests, render_chart, schema_errors, server_facts
from llm_scratch.pipeline import app as command_line
from llm_scratch.security import (
    FilterChange, FilterTest, audit_dependencies, broken_tests, check_weights, installed_packages, is_reached, pickle_imports, planted_secrets, read_advisories, recorded_tests, safetensors_fault,
    sbom_diff, scan_secrets, secrets_in_line, security_report, security_rows, security_status, text_entropy, update_filters)
from llm_scratch.server import SERVER_METRICS, Served, make_app

ROOT = Path(__file__).resolve().parent.parent
CHART, FLOW = ROOT/"deploy/chart", ROOT/"deploy/github/improve.yml"
FILE = ROOT/"nbs/advisories.json"
DAY = date(2024, 3, 1)
CFG = ModelConfig(vocab_size=64, context_len=16, n_layers=1, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, d_head=8)


# packages

@pytest.fixture(scope="module")
def known(): return read_advisories(FILE)


def test_the_walk_agrees_with_lists_that_others_made(known):
    releases = {}
    for a in known.items: releases.setdefault(a.package, set()).update(a.versions)
    n = 0
    for a in known.items:
        for version in a.versions: assert is_reached(a.events, version), (a.id, version)
        if a.versions:
            upto = max(map(Version, a.versions))
            for version in releases[a.package] - set(a.versions): # released, and not in this list
                if Version(version) <= upto: assert not a.hits(version), (a.id, version); n += 1
        for version in a.fixed: assert not a.hits(version) and a.hits(f"{version}rc1"), (a.id, version)
    assert n >= 15 # there is something to be wrong about


@pytest.mark.parametrize(("version", "hit"), [("1.26.16", True), ("1.26.17", False), ("1.27", False), ("2.0.0", True), ("2.0.0rc1", False), ("2.0.5", True), ("2.0.5+local.1", True), ("2.0.6", False), ("2.0.6+cpu", False), ("2.0.10", False), ("0.2", True)])
def test_branches(known, version, hit): assert next(a for a in known.items if a.id == "PYSEC-2023-192").hits(version) is hit


def test_last_affected_is_still_affected(): assert [is_reached([("introduced", "1"), ("last_affected", "2")], v) for v in ("0.9", "1", "2", "2+cpu", "2.0.1")] == [False, True, True, True, False]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6, unique=True), st.tuples(st.integers(0, 9), st.integers(0, 9)), st.randoms())
def test_the_order_of_events_does_not_matter(places, version, rng):
    events = [(("introduced", "fixed")[i % 2], f"{a}.{b}") for i, (a, b) in enumerate(sorted(places))]
    shuffled = events[:]
    rng.shuffle(shuffled)
    passed = [kind for kind, v in events if Version(v) <= Version(f"{version[0]}.{version[1]}")]
    assert is_reached(shuffled, f"{version[0]}.{version[1]}") is bool(passed and passed[-1] == "introduced")


def test_an_audit_tells_holes_and_its_own_age(known):
    rows = audit_dependencies({"Jinja2":"2.10", "PyYAML":"6.0", "urllib3":"not a version", "nobody-knows-it":"1"}, known, today=DAY)
    assert [(r.item, r.state) for r in rows[1:]] == [("Jinja2 2.10", "found"), ("Jinja2 2.10", "found"), ("urllib3 not a version", "unknown")]
    assert "2.11.3" in rows[2].says and "CVE-2020-28493" in rows[2].says
    assert "selection" in rows[0].says and rows[0].state == "unknown"
    whole = known._replace(about={})
    age = lambda today: audit_dependencies({}, whole, today=today)[0]
    assert age(DAY).state == "fine" and age(date(2024, 3, 17)).state == "fine" and age(date(2024, 3, 18)).state == "unknown" and "31 days old" in age(date(2024, 3, 18)).says
    assert "one of the two is wrong" in age(date(2024, 1, 1)).says and audit_dependencies({}, known._replace(items=(), newest=""), today=DAY)[0].state == "unknown"


def test_what_is_installed_is_what_runs():
    packages = installed_packages()
    assert packages["torch"] == torch.__version__ and Version(packages["numpy"]) == Version(np.__version__) and all(n == n.lower() and "_" not in n for n in packages)


def test_advisories_come_in_several_forms(known, tmp_path):
    records = json.loads(FILE.read_text(encoding="utf-8"))["advisories"]
    gone = copy.deepcopy(records[0]) | dict(id="X-1", withdrawn="2024-01-01T00:00:00Z")
    other = copy.deepcopy(records[0]) | dict(id="X-2")
    other["affected"][0]["package"]["ecosystem"] = "npm"
    with zipfile.ZipFile(tmp_path/"all.zip", "w") as z:
        for r in (*records, gone, other): z.writestr(f"{r['id']}.json", json.dumps(r))
    (tmp_path/"list.json").write_text(json.dumps([*records, gone, other]))
    folder = tmp_path/"folder"
    folder.mkdir()
    for r in records: (folder/f"{r['id']}.json").write_text(json.dumps(r))
    for path in (tmp_path/"all.zip", tmp_path/"list.json", folder): assert read_advisories(path)[:2] == known[:2], path


@pytest.mark.parametrize(("text", "says"), [("{", "not JSON"), ('{"id": "a"}', "not in the form of OSV"), ("[1]", "not in the form of OSV"), ('[{"id":"a","modified":"2024","affected":[{"package":{"ecosystem":"PyPI","name":"a"},"ranges":[{"type":"ECOSYSTEM","events":[{"fixed":"soon"}]}]}]}]', "fixed 'soon'")])
def test_a_list_that_is_none(tmp_path, text, says):
    (tmp_path/"a.json").write_text(text)
    with pytest.raises(UserError, match=says): read_advisories(tmp_path/"a.json")
    with pytest.raises(UserError, match="missing"): read_advisories(tmp_path/"b.json")


# lists of parts

def part(name, version, licence="MIT", sha=None, purl=True): return dict(type="library", name=name, version=version, licenses=[dict(license=dict(id=licence))]) | (dict(purl=f"pkg:pypi/{name}@{version}") if purl else {}) | (dict(hashes=[dict(alg="SHA-256", content=sha)]) if sha else {})


def test_each_kind_of_difference():
    debian = lambda v: dict(type="library", name="libssl3", version=v, purl=f"pkg:deb/debian/libssl3@{v}?arch=amd64")
    old = dict(components=[part("a", "1.9"), part("b", "2.0"), part("c", "1", sha="11"), part("d", "1"), part("e", "1"), debian("3.0.11-1~deb12u2")])
    new = dict(components=[part("a", "1.10"), part("b", "2.0rc1"), part("c", "1", sha="22"), part("d", "1", "GPL-3.0-only"), part("f", "1"), debian("3.0.13-1~deb12u1")])
    assert [(c.what, c.name.rpartition("/")[2]) for c in sbom_diff(old, new)] == [("replaced", "c"), ("older", "b"), ("relicensed", "d"), ("added", "f"), ("other", "libssl3"), ("newer", "a"), ("removed", "e")]
    assert sbom_diff(old, old) == sbom_diff({}, {}) == []


# secrets

@pytest.fixture(scope="module")
def lines(): return [planted_secrets(random.Random(seed), 20) for seed in (11, 12, 13)]


def test_planted_secrets_are_found_and_look_alikes_are_not(lines):
    for bad, good in lines:
        missed = [line for line in bad if not secrets_in_line(line)]
        assert [line for line in good if secrets_in_line(line)] == []
        assert {line.partition(" =")[0] for line in missed} == {"password"} and len(missed) == 20 # passwords that are words: nobody finds those


def test_each_rule_and_what_only_looks_like_it():
    rng = random.Random(3)
    draw = lambda n, some="ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789": "".join(rng.choice(some) for _ in range(n))
    for value in (f"-----BEGIN {'RSA '}PRIVATE KEY-----", "AKIA"+draw(16, "ABCDEFG234567"), "ghp_"+draw(36), "hf_"+draw(34), "sk-"+draw(30), "AIza"+draw(35), "xoxb-"+draw(24), "pypi-"+draw(60), f"eyJ{draw(20)}.eyJ{draw(20)}.{draw(20)}"):
        assert len(secrets_in_line(f"see {value} there")) == 1, value[:5]
    assert secrets_in_line(json.dumps(dict(text=f'token = "{draw(24)}"'))) # in a notebook quotes are escaped
    for text in ("postgres://user:password@localhost/db", "https://ci:${TOKEN}@git.example.org", "token: <your token here 123>", "api_key='YOUR_KEY_123456'", f"sha256 = '{draw(64, '0123456789abcdef')}'", "secret = load('a1-very-long-name')", ""):
        assert not secrets_in_line(text), text


def test_a_find_is_not_shown_and_can_be_known(tmp_path):
    value = "".join(random.Random(5).choices("abcdefghjkmnpqrstuvwxyzABCDEFGH23456789", k=32))
    (tmp_path/"a.env").write_text(f"# first\nAPI_KEY={value}\n")
    (tmp_path/"b.bin").write_bytes(b"\0API_KEY="+value.encode())
    (tmp_path/".git").mkdir()
    (tmp_path/".git"/"config").write_text(f"API_KEY={value}")
    found = scan_secrets([tmp_path])
    assert [(Path(s.file).name, s.line) for s in found] == [("a.env", 2)] and value not in str(found) and found[0].shown.startswith(value[:4])
    assert scan_secrets([tmp_path], {found[0].mark}) == [] and scan_secrets([tmp_path/"a.env"], most_bytes=10) == []
    with pytest.raises(UserError, match="missing"): scan_secrets([tmp_path/"none"])


def test_entropy(): assert text_entropy("") == text_entropy("aaaa") == 0 and text_entropy("ab") == 1 and text_entropy("abcdefgh") == pytest.approx(3)


def test_this_book_holds_none_but_those_of_the_chapter_about_them():
    assert {Path(s.file).name for s in scan_secrets([ROOT/"llm_scratch", ROOT/"deploy", ROOT/"README.md", ROOT/"settings.ini", Path(__file__), FILE])} == set()


# weights

class Trap:
    "Would make a file when it is opened."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, "w")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")/"model"
    save_model(Decoder(CFG), folder, 0)
    return folder


@pytest.fixture
def folder(sound, tmp_path): return Path(shutil.copytree(sound, tmp_path/"model"))


def bad(folder): return {Path(r.item).name:r.says for r in check_weights(folder) if r.state == "found"}


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_read_and_not_opened(folder, tmp_path, protocol):
    data = pickle.dumps(dict(a=1, trap=Trap(tmp_path/"sprung")), protocol=protocol)
    (folder/"pytorch_model.bin").write_bytes(data)
    assert re.search(r"would import (io|_io|builtins|__builtin__) open: ", bad(folder)["pytorch_model.bin"]) and not (tmp_path/"sprung").exists()
    pickle.loads(data)["trap"].close()
    assert (tmp_path/"sprung").exists() # what would have happened


def test_pickles_are_known_by_what_they_hold(folder, tmp_path):
    data = pickle.dumps(Trap(tmp_path/"sprung"))
    (folder/"notes.txt").write_bytes(data)
    with zipfile.ZipFile(folder/"archive.dat", "w") as z: z.writestr("deep/inside", data)
    np.save(folder/"objects.npy", np.array([Trap(tmp_path/"sprung")], dtype=object))
    np.savez(folder/"numbers.npz", a=np.zeros(3))
    np.save(folder/"numbers.npy", np.zeros(3))
    torch.save(dict(w=torch.zeros(2)), folder/"state.pt")
    np.arange(999, dtype=np.uint16).tofile(folder/"tokens.bin")
    found = bad(folder)
    assert set(found) == {"notes.txt", "archive.dat", "objects.npy", "state.pt"} and not (tmp_path/"sprung").exists()
    assert "deep/inside" in found["archive.dat"] and "as those of PyTorch do" in found["state.pt"] and "open" in found["objects.npy"]


def test_names_that_come_by_the_memo_are_followed():
    class Calls:
        def __init__(self, what): self.what = what
        def __reduce__(self): return self.what, ("x",)
    data = pickle.dumps([Calls(print), Calls(len)], protocol=4) # the second time the module's name is fetched
    assert any(op.name == "BINGET" for op, *_ in pickletools.genops(data)) and pickle_imports(data) == ["builtins print", "builtins len"]
    hidden = b"\x80\x04\x8c\x02osN0\x8c\x06systemN0\x93." # names with something thrown away between: told as unknown, and refused all the same
    assert pickle_imports(hidden) == ["?"]
    with pytest.raises(UserError, match="no pickle"): pickle_imports(b"\x00\x01")


@pytest.mark.parametrize(("change", "name", "says"), [
    (lambda f: (f/"run.py").write_text(""), "run.py", "a program beside"),
    (lambda f: (f/"config.json").write_text(json.dumps(dict(auto_map={}))), "config.json", "auto_map"),
    (lambda f: (f/"config.json").write_text("{"), "config.json", "not JSON"),
    (lambda f: ((f/"model.safetensors").unlink(), (f/"model.safetensors").symlink_to("/etc/hostname")), "model.safetensors", "a link"),
    (lambda f: (f/"model.safetensors").write_bytes((f/"model.safetensors").read_bytes()[:-8]), "model.safetensors", "8 bytes are missing|does not fit"),
    (lambda f: (f/"model.safetensors").unlink(), "model", "is missing"),
    (lambda f: (f/"manifest.json").write_text('{"format": "llm_scratch model", "sha256": {}}'), "model", "not of llm_scratch model"),
    (lambda f: (f/"manifest.json").write_text("[]"), "model", ""),
], ids=["program", "auto_map", "damaged config", "link", "cut", "missing", "empty seal", "foreign seal"])
def test_what_is_wrong_is_named(folder, change, name, says):
    change(folder)
    assert re.search(says, bad(folder)[name]), bad(folder)


def test_a_sound_folder_is_fine_and_a_flipped_bit_is_not(folder):
    assert [r.state for r in check_weights(folder)] == ["fine"]
    written_down = sha256_file(folder/"manifest.json")
    data = bytearray((folder/"model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder/"model.safetensors").write_bytes(data)
    assert "corrupt" in bad(folder)["model"] and safetensors_fault(folder/"model.safetensors") == ""
    with pytest.raises(UserError, match="corrupt"): load_model(folder) # at each load
    torch.manual_seed(99)
    save_model(Decoder(CFG), folder, 0) # exchanged and sealed anew
    assert not bad(folder) and [r.state for r in check_weights(folder, sealed=written_down)] == ["found"]
    (folder/"README.md").write_text("words")
    assert any(r.state == "unknown" and "README.md" in r.says for r in check_weights(folder))
    (folder/"manifest.json").unlink()
    assert check_weights(folder)[0].state == "unknown" and check_weights(folder, sealed=written_down)[0].state == "found"
    with pytest.raises(UserError, match="not a folder"): check_weights(folder/"none")


@pytest.mark.parametrize("change", ["whole", "cut", "more", "no header", "gap", "overlap", "shape", "kind", "list"])
def test_safetensors_are_judged_as_its_own_library_does(tmp_path, change):
    save_file(dict(a=torch.zeros(4), b=torch.ones(2, 3, dtype=torch.bfloat16)), tmp_path/"a.safetensors")
    data = (tmp_path/"a.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8:8+n]), data[8+n:]
    if change == "gap": header["b"]["data_offsets"] = [20, 32]; rest += b"1234"
    if change == "overlap": header["b"]["data_offsets"] = [12, 24]
    if change == "shape": header["a"]["shape"] = [5]
    if change == "kind": header["a"]["dtype"] = "F33"
    if change == "list": header = [1]
    text = json.dumps(header).encode()
    made = dict(cut=data[:-2], more=data+b"x").get(change, len(text).to_bytes(8, "little")+text+rest)
    if change == "no header": made = b"\xff"*7
    (tmp_path/"a.safetensors").write_bytes(made)
    try:
        with safe_open(tmp_path/"a.safetensors", "pt"): theirs = True
    except SafetensorError: theirs = False
    assert (safetensors_fault(tmp_path/"a.safetensors") == "") is theirs is (change == "whole")


# filters

@pytest.fixture
def policy(tmp_path):
    folder = tmp_path/"policy"
    folder.mkdir()
    (folder/"policy.json").write_text(json.dumps(dict(rules=[dict(part="terms", side="input", do="block")])))
    (folder/"terms.json").write_text("[]")
    update_filters(folder, FilterChange(add=("blue widget",)), [FilterTest("a Blue  WIDGET?", "input", "block"), FilterTest("a widget that is blue", "input", "pass"), FilterTest("tea and tears", "input", "pass")])
    return folder


def state(folder): return {p.name:p.read_text() for p in folder.iterdir()}


def test_a_change_with_its_test_is_kept(policy):
    guard = update_filters(policy, FilterChange(add=("gadget",)), [FilterTest("gadgetry", "input", "pass"), FilterTest("one ga\u200bdget", "input", "block")])
    assert json.loads((policy/"terms.json").read_text()) == ["blue widget", "gadget"] and len(recorded_tests(policy)) == 5 and broken_tests(guard, recorded_tests(policy)) == []
    rules = (GuardRule("terms", "input", "redact"),)
    with pytest.raises(UserError, match="redact, and should be block"): update_filters(policy, FilterChange(rules=rules), [FilterTest("gadget", "input", "redact")])


@pytest.mark.parametrize(("change", "tests", "says"), [
    (FilterChange(add=("tea",)), [FilterTest("strong tea", "input", "block")], r"1 of 4 tests fail: test 2 \([0-9a-f]{12}, input\): block, and should be pass"),
    (FilterChange(remove=("blue widget",)), [FilterTest("blue widget", "input", "pass")], "test 0"),
    (FilterChange(add=("x",)), [FilterTest("tea", "input", "pass")], "pass without the change"),
    (FilterChange(add=("x",)), [], "pass without the change"),
    (FilterChange(add=("x",)), [FilterTest("y", "input", "block")], "test 3"),
    (FilterChange(remove=("z",)), [FilterTest("z", "input", "block")], "can't be removed"),
    (FilterChange(add=(" ",)), [FilterTest("y", "input", "block")], "no list of texts"),
    (FilterChange(rules=(GuardRule("nobody", "input", "block"),)), [FilterTest("y", "input", "block")], "'part' is"),
], ids=["harmless test", "older test", "no reason", "no test", "does not do it", "not there", "empty term", "unknown part"])
def test_a_change_that_breaks_a_test_changes_nothing(policy, change, tests, says):
    before = state(policy)
    with pytest.raises(UserError, match=says) as e: update_filters(policy, change, tests)
    assert state(policy) == before and "strong tea" not in str(e.value) # texts are named by their hash


# the whole

def test_a_run_is_looked_at_and_left_alone(sound, tmp_path):
    run = tmp_path/"run"
    shutil.copytree(sound, run/"model")
    value = "".join(random.Random(7).choices("abcdefghjkmnpqrstuvwxyz23456789", k=20))
    (run/"log.jsonl").write_text(json.dumps(dict(origin=f"https://ci:{value}@git.example.org")))
    look = lambda **how: security_rows(run, packages={"jinja2":"3.1.6"}, today=DAY, **how)
    rows = look()
    assert [(r.check, r.state) for r in rows] == [("packages", "unknown"), ("secrets", "found"), ("weights", "fine")] and security_status(rows) == 1
    page = security_report(rows, tmp_path/"out"/"security.html", today=DAY).read_text(encoding="utf-8")
    assert value not in page and page.index(">found<") < page.index(">unknown<") < page.index(">fine<") and "2024-03-01" in page
    (run/"known-secrets.json").write_text(json.dumps([re.search(r"put ([0-9a-f]{12})", rows[1].says)[1]]))
    shutil.copy(FILE, run/"advisories.json")
    rows = look()
    assert security_status(rows) == 0 and {r.state for r in rows} == {"fine", "unknown"} and any("24 advisories of 16" in r.says for r in rows)
    assert security_status(security_rows(run, packages={"jinja2":"3.1.2", "pyyaml":"5.3"}, today=DAY)) == 1
    with pytest.raises(UserError, match="not a folder"): security_rows(run/"none", packages={}, today=DAY)


def test_the_record_is_of_several_draws():
    record = json.loads((ROOT/"nbs/security.json").read_text(encoding="utf-8"))
    assert len(record["seeds"]) >= 3 and {r["name"] for r in record["secrets"]} == {"ours", "detect-secrets 1.5.0"} and all(n for *_, n in record["kinds"].values()) and {r["look"] for r in record["cost"]} >= {"weights", "secrets"} and len(record["audits"]) >= 3 and all(r["same"] and r["holes"] for r in record["audits"])


# the schedules

VERBS = "security", "improve"


@pytest.fixture(scope="module")
def verbs():
    "The command line's own verbs; while it lacks one, a small one in its place."
    line = typer.Typer()
    @line.command("security")
    def _security(run:Path=typer.Option(...), out:Path=typer.Option(...)): ...
    @line.command("improve")
    def _improve(run:Path=typer.Option(...), turns:int=typer.Option(1, min=1), seed:int=0): ...
    return {name:typer.main.get_command(command_line).commands[name] if name in typer.main.get_command(command_line).commands else typer.main.get_command(line).commands[name] for name in VERBS}


@pytest.fixture(scope="module")
def jobs(verbs): return [command_facts(c) for c in verbs.values()]


@pytest.fixture(scope="module")
def facts(): return server_facts(make_app(Served(None, None, None, "tiny", 64)), typer.main.get_command(command_line).commands["serve"], SERVER_METRICS)


@pytest.fixture(scope="module")
def rendered(): return (CHART/"rendered/improve.yaml").read_text(encoding="utf-8")


def of_kind(manifests, kind, name=""): return next(m.body for m in manifests if m.kind == kind and m.body["metadata"]["name"].endswith(name))


def job_of(manifests): return of_kind(manifests, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]


@pytest.fixture(scope="module")
def helm():
    try: return helm_program()
    except UserError as e: pytest.skip(f"no helm here: {e}")


def test_what_is_committed_is_what_helm_renders(helm, rendered): assert render_chart(CHART, [CHART/"values-improve.yaml"], helm=helm) == rendered, "helm template llm deploy/chart --values deploy/chart/values-improve.yaml > deploy/chart/rendered/improve.yaml"


def test_nothing_runs_by_night_unless_it_is_asked_for(helm):
    assert {m.kind for m in read_manifests(render_chart(CHART, helm=helm))}.isdisjoint({"CronJob", "Job"})
    for setting, says in (({"improve.enabled":True}, "improve.runClaim"), ({"improve.schedule":"daily"}, "schedule"), ({"improve.turns":0}, "turns"), ({"improve.turn":1}, "turn")):
        with pytest.raises(UserError, match=says): render_chart(CHART, settings=setting, helm=helm)


def test_the_job_is_valid_and_true(rendered, facts, jobs):
    manifests = read_manifests(rendered)
    assert schema_errors(manifests) == [] and [str(f) for f in check_manifests(manifests, facts, jobs=jobs)] == []


def test_the_job_is_as_the_restricted_standard_wants_it_and_looks_first(rendered):
    manifests = read_manifests(rendered)
    pod, policy = job_of(manifests)["spec"], of_kind(manifests, "NetworkPolicy", "improve")["spec"]
    assert [b["args"][0] for b in (*pod["initContainers"], *pod["containers"])] == list(VERBS)
    assert pod["automountServiceAccountToken"] is False and pod["restartPolicy"] == "Never" and pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    for box in (*pod["initContainers"], *pod["containers"]): assert box["securityContext"] == dict(allowPrivilegeEscalation=False, readOnlyRootFilesystem=True, capabilities=dict(drop=["ALL"])) and box["resources"]["limits"]["memory"]
    assert policy["ingress"] == policy["egress"] == [] and job_of(manifests)["metadata"]["labels"].items() >= policy["podSelector"]["matchLabels"].items() and policy["policyTypes"] == ["Ingress", "Egress"]


def box(m, i=0): return job_of(m)["spec"]["containers"][i]


def relabel(m): job_of(m)["metadata"]["labels"] = of_kind(m, "Service")["spec"]["selector"]


PLANTED = {
    "verb": (lambda m: box(m)["args"].__setitem__(0, "improves"), "containers[0].args[0]", "give improve"),
    "option": (lambda m: box(m)["args"].__setitem__(3, "--turn"), "args[3]", "give --turns"),
    "value": (lambda m: box(m)["args"].__setitem__(4, "0"), "args[4]", ">=1|greater"),
    "entry point": (lambda m: box(m).pop("command"), "command", "give [llm-scratch]"),
    "variable": (lambda m: box(m)["env"][0].update(name="OMP_NUM_THREAD"), "env[0].name", "OMP_NUM_THREADS"),
    "first look": (lambda m: job_of(m)["spec"]["initContainers"][0]["args"].__setitem__(3, "--outs"), "initContainers[0].args[3]", "give --out"),
    "volume": (lambda m: box(m)["volumeMounts"].pop(), "volumeMounts", "can be written"),
    "read-only volume": (lambda m: box(m)["volumeMounts"][1].update(readOnly=True), "volumeMounts", "can be written"),
    "root": (lambda m: box(m)["securityContext"].update(readOnlyRootFilesystem=False), "readOnlyRootFilesystem", "give true"),
    "hour": (lambda m: of_kind(m, "CronJob")["spec"].update(schedule="17 24 * * *"), "spec.schedule", "minute"),
    "two at once": (lambda m: of_kind(m, "CronJob")["spec"].update(concurrencyPolicy="Allow"), "concurrencyPolicy", "Forbid"),
    "policy's labels": (lambda m: of_kind(m, "NetworkPolicy", "improve")["spec"]["podSelector"].update(matchLabels=dict(app="none")), "podSelector.matchLabels", "no pod bears"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_valid_and_found(rendered, facts, jobs, name):
    change, field, fits = PLANTED[name]
    manifests = read_manifests(rendered)
    change(manifests)
    assert schema_errors(manifests) == []
    found = check_manifests(manifests, facts, jobs=jobs)
    assert len(found) == 1 and found[0].field.endswith(field) and (fits in found[0].fits or re.search(fits, found[0].fits)), [str(f) for f in found]


def test_no_user_is_sent_to_a_job(rendered, facts, jobs):
    manifests = read_manifests(rendered)
    relabel(manifests)
    assert {f.file for f in check_manifests(manifests, facts, jobs=jobs) if "answer nobody" in f.fits} == {"templates/service.yaml"}


def test_jobs_of_unknown_verbs_are_told(rendered, facts): assert {f.given for f in check_manifests(read_manifests(rendered), facts) if "nobody told" in f.fits} == set(VERBS)


def test_the_workflow_has_no_rights_and_says_true_words(verbs):
    flow = yaml.safe_load(FLOW.read_text(encoding="utf-8"))
    text = FLOW.read_text(encoding="utf-8")
    assert flow["permissions"] == dict(contents="read") and "secrets." not in text and "pull_request_target" not in text and "${{" not in text
    assert set(flow[True]) == {"schedule", "workflow_dispatch"} and all("permissions" not in j for j in flow["jobs"].values())
    steps = [s for j in flow["jobs"].values() for s in j["steps"]]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", s["uses"]) for s in steps if "uses" in s) and all(j["timeout-minutes"] for j in flow["jobs"].values())
    commands = [c.split() for s in steps for c in re.findall(r"^llm-scratch (.*?)(?: \|\||$)", s.get("run", ""), re.M)]
    assert [c[0] for c in commands] == ["security", "run", "improve"]
    known = dict(typer.main.get_command(command_line).commands) | verbs
    for verb, *args in commands: command_facts(known[verb]).parse(args, {})


def test_the_workflow_is_what_github_s_schema_wants(tmp_path):
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    look = lambda path: subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)], capture_output=True, text=True, timeout=60)
    assert look(FLOW).returncode == 0
    (tmp_path/"bad.yml").write_text(FLOW.read_text(encoding="utf-8").replace("timeout-minutes", "timeout-minute"))
    assert look(tmp_path/"bad.yml").returncode == 1

"Wishes and truth: the chart renders, fits the schema, and every name in it is the server's; each kind of mistake, planted, is found with its file and its field."
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import typer
import yaml
from hypothesis import given, settings, strategies as st

from llm_scratch.architecture import Decoder, ModelConfig, cache_bytes, n_params, save_model
from llm_scratch.core import UserError
from llm_scratch.kubernetes import (
    Autoscaler, Manifest, Patience, as_number, check_manifests, desired_replicas, evictions_allowed, helm_program, plan_pod, quantity, read_manifests, render_chart,
    rolling_bounds, schema_errors, server_facts)
from llm_scratch.pipeline import PRESETS, app as command_line
from llm_scratch.server import SERVER_METRICS, Served, make_app
from llm_scratch.tokenization import save_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT/"deploy/chart"
FLAVOURS = {"cpu":[], "gpu":["values-gpu.yaml"], "inferentia":["values-inferentia.yaml"]}
SETTINGS = {"plain":{}, "guarded":{"keysSecret":"llm-keys", "modelClaim":"llm-model", "monitoring.serviceMonitor":True, "server.logText":True}, "named":{"server.allowHosts":["llm.example.net"], "ingress.host":"chat.example.org"}, "small":{"autoscaling.enabled":False, "ingress.enabled":False, "network.enabled":False, "monitoring.annotations":False}}
BOOK = PRESETS["cpu"]().config


@pytest.fixture(scope="session")
def helm():
    try: return helm_program()
    except UserError as e: pytest.skip(f"no helm here: {e}")


@pytest.fixture(scope="module")
def render(helm):
    made = {}
    def rendered(flavour="cpu", setting="plain"):
        if (flavour, setting) not in made: made[flavour, setting] = read_manifests(render_chart(CHART, [CHART/v for v in FLAVOURS[flavour]], settings=SETTINGS[setting], helm=helm))
        return copy.deepcopy(made[flavour, setting])
    return rendered


@pytest.fixture(scope="module")
def facts(): return server_facts(make_app(Served(None, None, None, "tiny", 64)), typer.main.get_command(command_line).commands["serve"], SERVER_METRICS)


def by_kind(manifests): return {m.kind:m.body for m in manifests}


def box(manifests): return by_kind(manifests)["Deployment"]["spec"]["template"]["spec"]["containers"][0]


def adapter(): return read_manifests((CHART/"adapter.yaml").read_text(encoding="utf-8"), "adapter.yaml")


# the chart

@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_chart_is_valid_and_true(render, facts, flavour, setting):
    manifests = render(flavour, setting)
    assert schema_errors(manifests) == []
    assert [str(f) for f in check_manifests([*manifests, *adapter()], facts, plan_pod(BOOK))] == []


def test_helm_itself_has_nothing_to_say(helm, tmp_path):
    done = subprocess.run([helm, "lint", "--strict", str(CHART)], capture_output=True, text=True, env=dict(HOME=str(tmp_path), PATH=os.defpath))
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_is_committed_for_people_without_helm_is_what_helm_renders(helm, flavour):
    fresh = render_chart(CHART, [CHART/v for v in FLAVOURS[flavour]], helm=helm)
    kept = (CHART/"rendered"/f"{flavour}.yaml").read_text(encoding="utf-8")
    assert kept == fresh, f"render it again: helm template llm deploy/chart > deploy/chart/rendered/{flavour}.yaml"


def test_pods_are_as_the_restricted_standard_wants_them(render):
    for flavour in FLAVOURS:
        pod = by_kind(render(flavour))["Deployment"]["spec"]["template"]["spec"]
        own = pod["containers"][0]["securityContext"]
        assert pod["automountServiceAccountToken"] is False and pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0 and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert own == dict(allowPrivilegeEscalation=False, readOnlyRootFilesystem=True, capabilities=dict(drop=["ALL"]))
        assert set(pod) & {"hostNetwork", "hostPID", "hostIPC"} == set() and all(set(v) <= {"name", "emptyDir", "secret", "persistentVolumeClaim"} for v in pod["volumes"])
        assert by_kind(render(flavour))["NetworkPolicy"]["spec"]["egress"] == []


@pytest.mark.parametrize(("flavour", "chip"), [("cpu", None), ("gpu", "nvidia.com/gpu"), ("inferentia", "aws.amazon.com/neuron")])
def test_chips_are_asked_for(render, flavour, chip):
    pod = by_kind(render(flavour))["Deployment"]["spec"]["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert set(limits) == {"memory"} | ({chip} if chip else set())
    if chip: assert limits[chip] == 1 and any(t["key"] == chip for t in pod["tolerations"]) and pod["nodeSelector"]


@pytest.mark.parametrize(("setting", "says"), [({"server.slotz":16}, "slotz"), ({"server.slots":"many"}, "/server/slots"), ({"server.port":80}, "minimum"), ({"accelerator.resource":"gpu"}, "/accelerator/resource"), ({"replicas":0}, "/replicas")])
def test_values_that_nothing_reads_are_refused(helm, setting, says):
    with pytest.raises(UserError, match=says): render_chart(CHART, settings=setting, helm=helm)


def test_a_chart_that_is_not_there(helm, tmp_path):
    with pytest.raises(UserError, match="helm can't render"): render_chart(tmp_path/"none", helm=helm)


def test_schema_errors_name_file_and_field(render):
    manifests = render()
    by_kind(manifests)["Deployment"]["spec"]["replicas"] = "one"
    by_kind(manifests)["Service"]["spec"]["portz"] = []
    found = schema_errors(manifests)
    assert len(found) == 2 and any(f.startswith("templates/deployment.yaml: spec.replicas: 'one'") for f in found) and any("templates/service.yaml" in f and "portz" in f for f in found)


# planted mistakes: what is done, where it is found, in which field, and what would fit

def path(kind, *keys, value):
    def change(manifests):
        at = by_kind(manifests)[kind]
        for key in keys[:-1]: at = at[key]
        at[keys[-1]] = value
    return change


def pod_path(*keys, value): return path("Deployment", "spec", "template", "spec", *keys, value=value)


def arg(name, value=None, rename=None):
    def change(manifests):
        args = box(manifests)["args"]
        i = args.index(name)
        if rename: args[i] = rename
        else: args[i+1] = value
    return change


def more_env(**e): return lambda manifests: box(manifests)["env"].append(dict(name=e["name"], value=e["value"]))


def service_called(name):
    def change(manifests):
        kinds = by_kind(manifests)
        kinds["Service"]["metadata"]["name"] = name
        for p in kinds["Ingress"]["spec"]["rules"][0]["http"]["paths"]: p["backend"]["service"]["name"] = name
        kinds["Deployment"]["spec"]["template"]["spec"].pop("enableServiceLinks")
        args = box(manifests)["args"]
        args[args.index("llm")] = name # the server answers to it
    return change


C, P = ("containers", 0), ("spec", "template", "spec")
PLANTED = {
    # ports
    "container's port": (pod_path(*C, "ports", 0, "containerPort", value=8080), "deployment", "containers[0].ports[0].containerPort", "listens on 8000"),
    "server's port": (arg("--port", "8001"), "deployment", "containers[0].ports[0].containerPort", "listens on 8001"),
    "port by variable": (lambda m: (arg("--port", rename="--seconds")(m), more_env(name="LLM_SCRATCH_PORT", value="8001")(m)), "deployment", "containers[0].ports[0].containerPort", "listens on 8001"),
    "probe's port": (pod_path(*C, "readinessProbe", "httpGet", "port", value=9), "deployment", "readinessProbe.httpGet.port", "called http"),
    "Service's port": (path("Service", "spec", "ports", 0, "targetPort", value="web"), "service", "spec.ports[0].targetPort", "http"),
    "NetworkPolicy's port": (path("NetworkPolicy", "spec", "ingress", 0, "ports", 0, "port", value=80), "network", "spec.ingress[0].ports[0].port", "8000"),
    "Ingress's port": (path("Ingress", "spec", "rules", 0, "http", "paths", 0, "backend", "service", "port", value=dict(number=8000)), "ingress", "backend.service.port", "80"),
    "annotated port": (path("Deployment", "spec", "template", "metadata", "annotations", "prometheus.io/port", value="9090"), "deployment", "prometheus.io/port", "listens on 8000"),
    "monitor's port": (path("ServiceMonitor", "spec", "endpoints", 0, "port", value="metrics"), "servicemonitor", "spec.endpoints[0].port", "http"),
    "address": (arg("--host", "127.0.0.1"), "deployment", "containers[0].args", "give 0.0.0.0"),
    # paths
    "startup path": (pod_path(*C, "startupProbe", "httpGet", "path", value="/health"), "deployment", "startupProbe.httpGet.path", "give /healthz"),
    "live path": (pod_path(*C, "livenessProbe", "httpGet", "path", value="/v1/completions"), "deployment", "livenessProbe.httpGet.path", "give"), # exists, and not by GET
    "annotated path": (path("Deployment", "spec", "template", "metadata", "annotations", "prometheus.io/path", value="/metric"), "deployment", "prometheus.io/path", "give /metrics"),
    "monitor's path": (path("ServiceMonitor", "spec", "endpoints", 0, "path", value="/stats"), "servicemonitor", "spec.endpoints[0].path", "/metrics"),
    "Ingress's path": (path("Ingress", "spec", "rules", 0, "http", "paths", 0, "path", value="/v2"), "ingress", "spec.rules[0].http.paths[0].path", "give /"),
    "too much shown": (path("Ingress", "spec", "rules", 0, "http", "paths", 1, "pathType", value="Prefix"), "ingress", "spec.rules[0].http.paths[1].path", "narrower"),
    # metrics
    "autoscaler's metric": (path("HorizontalPodAutoscaler", "spec", "metrics", 0, "pods", "metric", "name", value="llm_server_waitings"), "hpa", "spec.metrics[0].pods.metric.name", "give llm_server_waiting"),
    "adapter's series": (lambda m: next(x for x in m if x.file == "adapter.yaml").body["rules"]["custom"][0].update(seriesQuery='llm_server_wait{pod!=""}'), "adapter", "rules.custom[0].seriesQuery", "give llm_server_waiting"),
    # flags and variables
    "entry point": (lambda m: box(m).pop("command"), "deployment", "containers[0].command", "give [llm-scratch]"),
    "verb": (pod_path(*C, "args", 0, value="server"), "deployment", "containers[0].args[0]", "give serve"),
    "flag": (arg("--max-tokens", rename="--max-token"), "deployment", "args[10]", "give --max-tokens"),
    "flag's value": (arg("--slots", "many"), "deployment", "args[7]", "valid integer"),
    "flag's range": (arg("--slots", "0"), "deployment", "args[7]", "greater than or equal to 1"),
    "variable": (more_env(name="LLM_SCRATCH_SLOT", value="4"), "deployment", "env[3].name", "give LLM_SCRATCH_SLOTS"),
    "variable's value": (more_env(name="LLM_SCRATCH_BODY_BYTES", value="1MB"), "deployment", "env[3].value", "valid integer"),
    "library's variable": (pod_path(*C, "env", 0, "name", value="OMP_NUM_THREAD"), "deployment", "env[0].name", "give OMP_NUM_THREADS"),
    "Service's variables": (service_called("llm-scratch"), "deployment", "enableServiceLinks", "LLM_SCRATCH_PORT"),
    # files
    "keys nowhere": (more_env(name="LLM_SCRATCH_KEYS", value="/secrets/keys"), "deployment", "volumeMounts", "mount a volume there"),
    "feedback that can't be written": (lambda m: (more_env(name="LLM_SCRATCH_FEEDBACK", value="/data/feedback.jsonl")(m), box(m)["volumeMounts"].append(dict(name="tmp", mountPath="/data", readOnly=True))), "deployment", "volumeMounts", "mount it to be written"),
    "root that can be written": (pod_path(*C, "securityContext", "readOnlyRootFilesystem", value=False), "deployment", "readOnlyRootFilesystem", "give true"),
    # leaving, and the rest
    "killed too early": (pod_path("terminationGracePeriodSeconds", value=35), "deployment", "terminationGracePeriodSeconds", "more than 35"),
    "killed too early by grace": (arg("--grace", "60"), "deployment", "terminationGracePeriodSeconds", "more than 65"),
    "balancer gives up": (path("Ingress", "metadata", "annotations", "nginx.ingress.kubernetes.io/proxy-read-timeout", value="60"), "ingress", "proxy-read-timeout", "120 s"),
    "Service's labels": (path("Service", "spec", "selector", value=dict(app="llm")), "service", "spec.selector", "no pod bears"),
    "budget's labels": (path("PodDisruptionBudget", "spec", "selector", "matchLabels", "app.kubernetes.io/name", value="llm"), "disruption", "spec.selector.matchLabels", "no pod bears"),
    "budget that stops every drain": (path("PodDisruptionBudget", "spec", "maxUnavailable", value=0), "disruption", "spec", "no machine can ever be drained"),
    "autoscaler's target": (path("HorizontalPodAutoscaler", "spec", "scaleTargetRef", "name", value="llm-server"), "hpa", "spec.scaleTargetRef.name", "llm"),
    "Ingress's Service": (path("Ingress", "spec", "rules", 0, "http", "paths", 0, "backend", "service", "name", value="lm"), "ingress", "backend.service.name", "give llm"),
    # names
    "Ingress's host": (path("Ingress", "spec", "rules", 0, "host", value="chat.example.org"), "ingress", "spec.rules[0].host", "give --allow-host chat.example.org"),
    "Service's name": (arg("--allow-host", "lm"), "service", "metadata.name", "give --allow-host llm"),
    "memory": (pod_path(*C, "resources", "limits", "memory", value="256Mi"), "deployment", "resources.limits.memory", "752Mi"),
    "no memory": (pod_path(*C, "resources", "limits", value={}), "deployment", "resources.limits.memory", "752Mi"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_valid_and_found(render, facts, name):
    change, file, field, fits = PLANTED[name]
    manifests = [*render(setting="guarded" if "monitor" in name else "plain"), *adapter()]
    change(manifests)
    assert schema_errors([m for m in manifests if m.kind]) == [], "the schema sees it: not what this is about"
    found = check_manifests(manifests, facts, plan_pod(BOOK))
    assert any(file in f.file and f.field.endswith(field) and fits in f.fits for f in found), [str(f) for f in found]
    assert all(f.given and len(str(f)) < 600 for f in found)
    assert len(found) <= (6 if name in ("container's port", "server's port", "port by variable") else 1), [str(f) for f in found]


def test_settings_do_not_come_from_our_own_environment(render, facts, monkeypatch):
    monkeypatch.setenv("LLM_SCRATCH_PORT", "not a port")
    assert check_manifests(render(), facts) == [] and os.environ["LLM_SCRATCH_PORT"] == "not a port"
    assert facts.parse(["/model"], {})["port"] == 8000


def test_manifests_know_where_they_are_from():
    text = "# a word before\n---\n# Source: chart/templates/a.yaml\nkind: A\n---\n# only words\n---\nkind: B\n"
    assert read_manifests(text, "file.yaml") == [Manifest("templates/a.yaml", dict(kind="A")), Manifest("file.yaml", dict(kind="B"))]


# the running server

CFG = ModelConfig(vocab_size=264, context_len=64, n_layers=1, n_heads=2, n_kv_heads=1, d_model=16, d_ff=32, d_head=8)
WIDE = ModelConfig(vocab_size=264, context_len=1024, n_layers=8, n_heads=8, n_kv_heads=8, d_model=512, d_ff=1536, d_head=64) # 27 million weights


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    folder, tok = tmp_path_factory.mktemp("models"), train_bpe(["How do I make tea? How do I make bread?"]*9, 264, specials=("<|endoftext|>",))
    assert tok.vocab_size == CFG.vocab_size == WIDE.vocab_size
    save_tokenizer(tok, folder/"tok")
    for name, cfg in (("tiny", CFG), ("wide", WIDE)):
        save_model(Decoder(cfg), folder/name, tok.eot_id)
        for file in ("tokenizer.json", "tokenizer_config.json"): shutil.copy(folder/"tok"/file, folder/name/file)
    return {name:folder/name for name in ("tiny", "wide")}


def start(args, env):
    child = subprocess.Popen([sys.executable, "-m", "llm_scratch", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(PATH=os.environ["PATH"], PYTHONPATH=str(ROOT)) | env)
    said = []
    for line in child.stdout:
        said.append(line)
        if " at http" in line: break
    else:
        child.wait()
        pytest.fail("".join(said))
    return child, line.split(" at ")[1].strip()


def get(url):
    with urllib.request.urlopen(url, timeout=60) as answer: return answer.status, answer.read().decode()


def resident(pid, what="VmRSS"): return int(re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])*1024


def finish(child):
    child.send_signal(signal.SIGTERM)
    began = time.monotonic()
    child.wait(60)
    return time.monotonic()-began


def test_the_server_that_the_manifest_starts_has_what_the_manifest_asks(render, facts, homes, tmp_path):
    manifests = render(setting="guarded")
    pod = box(manifests)
    (tmp_path/"keys").write_text("a-secret-of-this-test-0001\n")
    at = {"/model":str(homes["tiny"]), "0.0.0.0":"127.0.0.1", "8000":"0", "/keys/keys":str(tmp_path/"keys"), "/tmp":str(tmp_path)} # what is another here: paths, address, port
    child, url = start([at.get(a, a) for a in pod["args"]], {e["name"]:at.get(e["value"], e["value"]) for e in pod["env"]})
    try:
        assert f"console_scripts = {pod['command'][0]}=llm_scratch." in (ROOT/"settings.ini").read_text(encoding="utf-8")
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"): assert get(url+pod[probe]["httpGet"]["path"])[0] == 200, probe
        kinds = by_kind(manifests)
        said = get(url+kinds["ServiceMonitor"]["spec"]["endpoints"][0]["path"])[1]
        for name in (kinds["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"], adapter()[0].body["rules"]["custom"][0]["seriesQuery"].partition("{")[0]): assert re.search(rf"^{name} [0-9.]+$", said, re.M), name
        shown = {line.split()[2] for line in said.splitlines() if line.startswith("# TYPE")}
        assert {m.name.removesuffix("_total") for m in SERVER_METRICS} <= {n.removesuffix("_total") for n in shown} # the table that facts are read from is what a scrape shows
        for route in kinds["Ingress"]["spec"]["rules"][0]["http"]["paths"]: # asked as a stranger: it exists, whether or not it lets us in
            try: status = get(url+(route["path"] + "/models" if route["pathType"] == "Prefix" else route["path"]))[0]
            except urllib.error.HTTPError as e: status = e.code
            assert status in (200, 401), route
        with pytest.raises(urllib.error.HTTPError, match="404"): get(url+"/ready")
        took = finish(child)
    finally: child.kill()
    spec = kinds["Deployment"]["spec"]["template"]["spec"]
    assert child.returncode == 0 and took < spec["terminationGracePeriodSeconds"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux' /proc")
def test_the_plan_is_held_against_what_the_kernel_says(homes, tmp_path):
    taken = {}
    for name, cfg, slots in (("cold", CFG, 4), ("tiny", CFG, 4), ("wide", WIDE, 4), ("wide", WIDE, 8)):
        child, url = start(["serve", str(homes.get(name, homes["tiny"])), "--port", "0", "--slots", str(slots)], dict(NUMBA_CACHE_DIR=str(tmp_path))) # the first one has nothing compiled, as a new pod
        try:
            body = json.dumps(dict(prompt="How do I make tea?", max_tokens=8)).encode()
            urllib.request.urlopen(urllib.request.Request(url+"/v1/completions", body, {"content-type":"application/json"}), timeout=120).read()
            taken[name, slots] = resident(child.pid)
            if slots == 8: # the next model beside this one
                child.send_signal(signal.SIGHUP)
                for _ in range(600):
                    if re.search(r"^llm_server_reloads_total\S* 1", get(url+"/metrics")[1], re.M): break
                    time.sleep(.1)
                both = resident(child.pid, "VmHWM")
        finally: child.kill(); child.wait()
        plan = plan_pod(cfg, slots, n_models=1)
        assert taken[name, slots] < plan.memory, f"{name} with {slots} slots takes {taken[name, slots]/1e6:.0f} MB, planned {plan.memory/1e6:.0f}"
        assert taken[name, slots] > .6*plan.memory, "the plan is far too careful"
    assert taken["cold", 4] > taken["tiny", 4] + 30e6, "the compiler is not in what is measured"
    assert taken["wide", 8] + 8*n_params(WIDE)/2 < both < plan_pod(WIDE, 8).memory, "two models are there while one is exchanged, and the plan has room for both"
    slots_cost = taken["wide", 8] - taken["wide", 4]
    assert slots_cost == pytest.approx(cache_bytes(WIDE, 4, 1024), rel=.25), "what slots cost is not what the plan says"
    model_costs = taken["wide", 4] - taken["tiny", 4]
    assert model_costs == pytest.approx(8*(n_params(WIDE)-n_params(CFG)) + cache_bytes(WIDE, 4, 1024) - cache_bytes(CFG, 4, 64), rel=.3)


# arithmetic

def test_the_values_are_the_planner_s():
    values = yaml.safe_load((CHART/"values.yaml").read_text(encoding="utf-8"))
    assert values["resources"] == plan_pod(BOOK, values["server"]["slots"], n_threads=values["threads"]).resources


@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(st.none(), st.integers(0, 500).map(lambda n: n/10)), min_size=1, max_size=12), st.floats(.5, 10))
def test_the_autoscaler_s_formula(values, target):
    n, known = desired_replicas(values, target), [v for v in values if v is not None]
    if not known: assert n == len(values)
    elif len(known) == len(values):
        ratio = sum(known)/len(known)/target
        if abs(ratio-1) <= .1: assert n == len(values)
        else: assert n*target >= sum(known)*(1-1e-6) and (n-1)*target < sum(known)*(1+1e-6) + 1e-6 # enough, and not one more
    else: # unknown pods never make it bolder
        bold = desired_replicas(known, target) - len(known)
        assert (n >= len(values)) if bold > 0 else (n <= len(values)) if bold < 0 else n == len(values)


def test_the_brakes():
    a = Autoscaler(4, Patience(least=1, most=20, down_after=300, up_per_minute=2, down_per_minute=1))
    assert [a.look(t, [40]*n) for t, n in ((0, 2), (15, 4), (30, 4), (75, 4))] == [4, 4, 4, 6] # two in a minute
    a = Autoscaler(4, Patience(least=1, most=20, down_after=120))
    assert a.look(0, [4, 4, 4]) == 3
    assert [a.look(t, [0, 0, 0]) for t in (15, 60, 120)] == [3, 3, 3] and a.look(135, [0, 0, 0]) == 2 # only when fewer have sufficed for two minutes, and one at a time
    assert Autoscaler(4, Patience(most=3)).look(0, [100, 100]) == 3


@pytest.mark.parametrize(("args", "bounds"), [((4, "25%", "25%"), (5, 3)), ((3, "25%", "25%"), (4, 3)), ((1, 1, 0), (2, 1)), ((10, "0%", "5%"), (10, 9)), ((2, 0, 2), (2, 0)), ((1, 0, 5), (1, 0))])
def test_bounds_of_an_update(args, bounds): assert rolling_bounds(*args) == bounds


@pytest.mark.parametrize(("n", "healthy", "budget", "allowed"), [(2, 2, dict(max_unavailable=1), 1), (2, 1, dict(max_unavailable=1), 0), (7, 7, dict(max_unavailable="30%"), 3), (7, 7, dict(min_available="50%"), 3), (3, 3, dict(min_available=3), 0), (3, 3, dict(max_unavailable=9), 3)])
def test_what_a_drain_may_take(n, healthy, budget, allowed): assert evictions_allowed(n, healthy, **budget) == allowed


@pytest.mark.parametrize(("call", "says"), [
    (lambda: rolling_bounds(3, "many", 0), "percentage"), (lambda: rolling_bounds(3, "0%", 0), "nothing may ever change"), (lambda: evictions_allowed(3, 3), "give one of them"), (lambda: evictions_allowed(3, 3, max_unavailable=1, min_available=1), "give one of them"),
    (lambda: plan_pod(BOOK, 0), "at least 1 each"), (lambda: as_number("1GB"), "no quantity"), (lambda: desired_replicas([1], -1), "more than 0")])
def test_mistakes_say_what_would_fit(call, says):
    with pytest.raises(UserError, match=says): call()


@pytest.mark.parametrize("n", [1, 2**20, 576*2**20, 576*2**20+1, 3e9])
def test_quantities_hold_what_they_are_for(n): assert n <= as_number(quantity(n)) < n + 16*2**20 + 1


@pytest.mark.parametrize(("values", "n"), [([9, None], 3), ([5, None], 2), ([0, None], 1), ([20, None, None], 5), ([None], 1)])
def test_pods_that_are_not_known_are_counted_with_care(values, n): assert desired_replicas(values, 4) == n

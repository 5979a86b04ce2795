"What a text can be held to, what runs in the slots, and by which name a server is asked: JSON that always parses, bundles that write what the model writes, a step that is compiled before anybody asks, and Host."
import json
import logging
import random
import shutil

import httpx
import openai
import pytest
import torch
import typer.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from models import filled
from served import scripted_served, tiny_model, tiny_served, tiny_tokenizer, tiny, url # noqa: F401

from llm_scratch import pipeline, serving
from llm_scratch.architecture import Attention, Block, Decoder, ModelConfig
from llm_scratch.assistant import save_assistant
from llm_scratch.core import UserError
from llm_scratch.families import window_attend
from llm_scratch.server import allowed_hosts, background_server, host_name, make_app
from llm_scratch.serving import JSON_DEPTH, JSON_OBJECT, BatchEngine, CompiledSlots, OnnxSlots, SlotCache, SlotRows, TextForm, TextJob, TokenMasks, fast_slots, fits_slots, json_after, json_shape, json_todo, read_slots

HI = [dict(role="user", content="Hi there.")]
some = settings(max_examples=150, deadline=None, database=None)


def after(raw, schema=None):
    todo = json_todo(schema)
    for b in raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw:
        if todo is not None: todo = json_after(todo, b)
    return todo


# what is JSON

VALUES = st.recursive(st.none() | st.booleans() | st.integers(-10**14, 10**14) | st.floats(-1e9, 1e9, allow_nan=False).map(lambda x: round(x, 3)) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), inner, max_size=3), max_leaves=8)


@some
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), VALUES, max_size=3), st.booleans(), st.sampled_from([None, (",", ":"), (" ,", " : ")]))
def test_what_python_writes_fits(value, ascii, separators):
    if ascii: value = json.loads(json.dumps(value).replace("\\ud8", "").replace("\\ud9", "").replace("\\udb", "").replace("\\udc", "").replace("\\udd", "").replace("\\ude", "").replace("\\udf", "").replace("\\uda", "")) # characters beyond the first plane are written as they are, not as pairs
    assert after(json.dumps(value, ensure_ascii=ascii, separators=separators)) == ()


SEEDS = ['{"a": [1, -2.5e+3, true, null], "b": {"c": "x\\n\\u00e9é🍮"}}', '{}', '{ "k" :"", "l":[[],{}] }', '{"n":0.10,"m":-0}']


def test_what_fits_is_read_by_python_and_what_it_does_not_read_does_not_fit():
    rng, n_fit, n_broken = random.Random(0), 0, 0
    for _ in range(6000):
        raw = bytearray(rng.choice(SEEDS).encode())
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(len(raw))
            if rng.random() < .5: raw[at] = rng.choice(b'{}[]",:\\ 019.eE+-tn\x1f\x7f\x80\xc3\xff')
            elif rng.random() < .5: del raw[at]
            else: raw.insert(at, rng.choice(b'{}[]",:\\ 019.eE+-u'))
            if not raw: break
        try: value = json.loads(bytes(raw).decode("utf-8")) # strictly: bytes that are no characters are no JSON
        except ValueError: value = None
        if after(bytes(raw)) == ():
            assert isinstance(value, dict), bytes(raw)
            n_fit += 1
        elif isinstance(value, dict): assert raw.rstrip() != raw or raw.lstrip() != raw or b"\\ud" in raw.lower(), bytes(raw) # allowed, and not let through
        else: n_broken += 1
    assert n_fit > 500 and n_broken > 2000


@pytest.mark.parametrize("raw", ['{"a":' + "["*JSON_DEPTH, '{"a":' + "1"*16, '{"a":1.' + "1"*16, '{"a":1e100', '{"a":' + " "*9, '{"a":"\\ud83c', '[1]', ' {}', '{} ', '{}{}', '{"a":NaN', '{"a":-I', '{"a":"\t', b'{"a":"\xed\xa0', b'{"a":"\xc0', b'{"a":"\xf5', b'{"a":"\x80', b'{"a":"\xe2"'])
def test_what_is_never_let_through(raw): assert after(raw) is None


# from bytes to tokens

def a_model(V, seed, T=160): return filled(Decoder(ModelConfig(vocab_size=V, context_len=T, n_layers=1, n_heads=2, n_kv_heads=1, d_model=32, d_ff=32, d_head=16)), seed)


SCHEMA = dict(type="object", required=["dish", "steps"], additionalProperties=False, properties=dict(dish=dict(enum=["bread", "soup", "soups"]), minutes=dict(type="integer"), hot=dict(type=["boolean", "null"]),
    steps=dict(type="array", items=dict(type="object", properties=dict(n=dict(const=1), how=dict(type="string"))))))


@pytest.mark.parametrize("schema", [None, json.dumps(SCHEMA)], ids=["object", "schema"])
def test_an_answer_parses_unless_its_length_ran_out(schema):
    jsonschema = pytest.importorskip("jsonschema")
    tok = tiny_tokenizer()
    masks = TokenMasks(tok.token_bytes, tok.special_ids.values())
    n_whole = n_cut = 0
    for seed in range(5):
        with BatchEngine(a_model(tok.vocab_size, seed), n_slots=8) as engine:
            tickets = [engine.submit(TextJob([1+i], 90, temperature=(0, .7, 1, 2)[i%4], top_k=(None, 5)[i%2], top_p=(None, .9)[i%3 == 0], seed=seed*100+i, form=TextForm(masks, json_todo(schema)))) for i in range(8)]
            for t in tickets:
                t.read(60)
                raw = b"".join(tok.token_bytes[i] for i in t.ids)
                if t.finish == "stop":
                    value = json.loads(raw.decode("utf-8"))
                    assert isinstance(value, dict)
                    if schema: jsonschema.validate(value, SCHEMA)
                    n_whole += 1
                else:
                    assert t.finish == "length" and len(t.ids) == 90
                    with pytest.raises(ValueError): json.loads(raw.decode("utf-8", "replace"))
                    n_cut += 1
    assert n_whole > 5 and n_cut, (n_whole, n_cut)


def test_masks_are_those_of_trying_every_token():
    tok = tiny_tokenizer()
    words, barred = [*tok.token_bytes, b'{"', b'":', b'","', b'"}', b"true", b"}]", b'"}}', b'a"', b'\\u00', b"\xc3\xa9\xc3", b"", b"1.5"], set(tok.special_ids.values())
    masks, rng = TokenMasks(words, barred), random.Random(1)
    for _ in range(40):
        todo = json_todo(json.dumps(SCHEMA) if rng.random() < .5 else None)
        for _ in range(rng.randrange(12)):
            fits = masks.fits(todo).nonzero()[:,0].tolist()
            if not fits: break
            todo = TextForm(masks, todo).after(todo, rng.choice(fits))
        want = [i not in barred and bool(raw) and serving._through(todo, raw) is not None for i,raw in enumerate(words)]
        assert masks.fits(todo).tolist() == want
    assert not masks.fits(()).any() # nothing follows what is complete
    few = TokenMasks(words, barred, most=3*len(words))
    for n in range(20): few.fits(after('{"a":' + "["*(n%7)))
    assert len(few.kept) <= 3


def test_a_vocabulary_without_the_right_bytes_fails_that_job_alone():
    masks = TokenMasks([bytes([b]) for b in b"abc{"])
    with BatchEngine(a_model(4, 0), n_slots=2) as engine:
        logging.disable(logging.ERROR)
        bad, good = engine.submit(TextJob([1], 5, form=TextForm(masks, json_todo()))), engine.submit(TextJob([1], 5))
        assert len(good.read(30)) == 5
        with pytest.raises(RuntimeError, match="no token of the tokenizer can go on .* after 1 tokens"): bad.read(30)
        logging.disable(logging.NOTSET)


def test_others_are_not_changed_and_probabilities_are_the_model_s():
    tok = tiny_tokenizer()
    model, masks, free = a_model(tok.vocab_size, 3), TokenMasks(tok.token_bytes, tok.special_ids.values()), TextJob([5, 6], 20, temperature=.8, seed=4)
    with BatchEngine(model, n_slots=3) as engine:
        alone = engine.submit(free).read()
        formed = engine.submit(TextJob([7], 12, temperature=0, n_logprobs=2, form=TextForm(masks, json_todo())))
        assert engine.submit(free).read() == alone
        list(formed)
    with torch.no_grad(): want = model(torch.tensor([[7, *formed.ids[:-1]]]))[0].log_softmax(-1)
    for row,piece in zip(want, formed.pieces):
        assert piece.logprob == pytest.approx(row[piece.id].item(), abs=1e-4) and piece.top[0][1] == pytest.approx(row.max().item(), abs=1e-4)


@pytest.mark.parametrize(("schema", "says"), [(dict(type="string"), "not of an object"), (dict(type="object", properties=dict(a=dict(pattern="x"))), "the schema, a says pattern"), (dict(type="object", additionalProperties=dict(type="integer")), "additionalProperties"),
    (dict(type="object", required=["z"]), "requires z"), (dict(type="object", required=[["z"]]), "requires"), (dict(type="object", properties=5), "properties is an object"), (dict(type="obj"), "type is one or some"), (dict(type="object", properties=dict(a=dict(enum=[]))), "no value"),
    (dict(type="object", properties=dict(a=dict(type="integer", enum=["x"]))), "no value of the type integer"), (dict(anyOf=[]), "says anyOf"), (dict(type="object", properties={f"a{i}":{} for i in range(3000)}), "characters"), ({}, "not of an object")])
def test_a_schema_that_is_not_understood_is_refused_by_name(schema, says):
    with pytest.raises(UserError, match=says): json_todo(json.dumps(schema))


def test_deep_schemas():
    def deep(n): return dict(type="object", properties=dict(a=deep(n-1))) if n else dict(type="null")
    assert after('{"a":'*(JSON_DEPTH-1) + "null" + "}"*(JSON_DEPTH-1), json.dumps(deep(JSON_DEPTH-1))) == ()
    with pytest.raises(UserError, match="nested more than"): json_todo(json.dumps(deep(JSON_DEPTH+1)))
    assert json_shape(dict(type="object", additionalProperties=False)).members == () and JSON_OBJECT.members is None


# by the wire

def post(url, route="chat/completions", **body):
    with httpx.Client(timeout=30) as c: return c.post(f"{url}/v1/{route}", json=(dict(messages=HI) if "chat" in route else {}) | body)


def wanted(schema): return dict(type="json_schema", json_schema=dict(name="recipe", strict=True, schema=schema))


FLAT = dict(type="object", properties=dict(dish=dict(enum=["bread", "soup"]), hot=dict(type="boolean")))


def test_json_by_the_official_client_whole_and_as_a_stream(url):
    c = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    how = dict(model="tiny", messages=HI, response_format=wanted(FLAT), max_tokens=100, seed=2, logprobs=True, top_logprobs=1)
    whole = c.chat.completions.create(**how, n=4)
    assert [x.finish_reason for x in whole.choices] == ["stop"]*4 and all(json.loads(x.message.content).keys() == {"dish", "hot"} for x in whole.choices)
    for x in whole.choices: assert "".join(bytes(t.bytes).decode() for t in x.logprobs.content) == x.message.content # every token is told, the last one too
    parts = list(c.chat.completions.create(**how, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == whole.choices[0].message.content and parts[-1].choices[0].finish_reason == "stop"
    free = c.chat.completions.create(model="tiny", messages=HI, response_format=dict(type="json_object"), max_tokens=3, seed=1).choices[0]
    assert free.finish_reason in ("length", "stop") and free.message.content.startswith("{")
    assert c.chat.completions.create(model="tiny", messages=HI, response_format=dict(type="text"), max_tokens=3).choices[0].finish_reason == "length"


def test_no_special_token_is_let_through(tiny):
    for raw in ('{"a', '{"a":"<|im_', ""): assert not tiny.masks.fits(after(raw))[list(tiny.tokenizer.special_ids.values())].any()


def test_a_stop_cuts_json_too_and_completions_can_ask_for_it(url):
    got = post(url, "completions", prompt="a", max_tokens=100, seed=3, response_format=wanted(FLAT), stop='"hot"').json()["choices"][0]
    assert got["finish_reason"] == "stop" and '"dish"' in got["text"] and "hot" not in got["text"]


@pytest.mark.parametrize(("how", "says"), [(dict(type="json_schema"), "has a field json_schema"), (wanted(dict(type="object", properties=dict(a={"$ref":"#"}))), "the schema, a says $ref"), (dict(type="xml"), "response_format.type"), (dict(type="json_schema", json_schema=dict(name="x")), "schema"), ("json", "response_format"),
    (dict(type="json_schema", json_schema=dict(schema=json.loads("[" * 500 + "]" * 500))), "schema")])
def test_a_form_that_can_not_be_is_a_400(url, how, says):
    got = post(url, response_format=how)
    assert got.status_code == 400 and says in got.json()["error"]["message"] and "response_format" in got.json()["error"]["param"], got.text


# in the slots

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    tok = tiny_tokenizer()
    return save_assistant(tiny_model(tok, 1), tok, tmp_path_factory.mktemp("home")/"assistant")


def greedy(served, prompts, n=24):
    tickets = [served.engine.submit(TextJob(p, n, temperature=0)) for p in prompts]
    return [t.read(60) for t in tickets]


def surprise(served, prompts, n=24): # log-probabilities: they see what hardly any choice shows
    with served.engine._changed: tickets = [served.engine.submit(TextJob(p, n, temperature=0)) for p in prompts] # all at once
    for t in tickets: t.read(60)
    return torch.tensor([[p.logprob for p in t.pieces] for t in tickets])


PROMPTS = [[17*(i+1)*(k+1)%200 for k in range(1+5*i)] for i in range(6)]


def test_serve_has_its_step_compiled_before_anybody_asks(home, monkeypatch):
    calls, real = [], serving.slots_step
    monkeypatch.setattr(serving, "slots_step", lambda *a: (calls.append(len(a[1])), real(*a)))
    fast = pipeline.open_served(home, slots=4)
    assert isinstance(fast.engine.model, CompiledSlots) and calls # tried out, so compiled
    if serving.njit is not None: compiled = len(real.signatures)
    texts = greedy(fast, PROMPTS)
    calls.clear()
    fast.engine.swap(fast_slots(tiny_model(fast.tokenizer, 2)))
    assert calls, "a model that is swapped in is not tried out"
    if serving.njit is not None: assert len(real.signatures) == compiled == 1, "somebody's first token waited for the compiler, or it has compiled twice"
    fast.engine.close()
    monkeypatch.setattr(serving, "njit", None) # as where Numba is not installed
    plain = pipeline.open_served(home, slots=4)
    assert isinstance(plain.engine.model, Decoder) and greedy(plain, PROMPTS) == texts
    plain.engine.close()


@pytest.fixture(scope="module")
def bundle(home, tmp_path_factory):
    pytest.importorskip("onnxruntime", reason="needs llm_scratch[deploy]")
    pytest.importorskip("onnxscript", reason="needs llm_scratch[deploy]")
    return pipeline.export_bundle(home, tmp_path_factory.mktemp("made")/"bundle")


def test_a_bundle_writes_what_the_model_writes_without_torch_s_passes(home, bundle, monkeypatch):
    torch_s = pipeline.open_served(home, slots=4)
    texts, told = greedy(torch_s, PROMPTS), surprise(torch_s, PROMPTS)
    torch_s.engine.close()
    def forbidden(*_, **__): raise AssertionError("a pass of torch's")
    monkeypatch.setattr(Decoder, "hidden", forbidden)
    monkeypatch.setattr(Block, "forward", forbidden)
    monkeypatch.setattr(pipeline, "open_assistant", forbidden)
    served = pipeline.open_served(bundle, slots=4)
    assert isinstance(served.engine.model, OnnxSlots) and served.template and served.ends == torch_s.ends and served.context_len == torch_s.context_len
    assert greedy(served, PROMPTS) == texts # six texts of all lengths in four slots
    assert served.engine.lanes[-1].is_batched and served.engine.stats()["steps"] < 5*23, "one by one"
    torch.testing.assert_close(surprise(served, PROMPTS), told, atol=1e-4, rtol=0)
    assert greedy(served, [PROMPTS[5]+texts[5][:9]])[0][:15] == texts[5][9:] and served.engine.stats()["prefix_hits"] # what was read is used again
    form = TextForm(served.masks, json_todo(json.dumps(FLAT)))
    t = served.engine.submit(TextJob([1], 120, seed=1, form=form))
    t.read(60)
    assert t.finish == "stop" and json.loads(served.tokenizer.decode(t.ids)).keys() == {"dish", "hot"}
    served.engine.close()


@pytest.mark.parametrize("kind", ["fp16", "int8_channels"])
def test_smaller_kinds_say_the_same_in_company_as_alone(bundle, kind):
    served = pipeline.open_served(bundle, slots=6, kind=kind)
    graph = served.engine.model
    assert graph.is_alone == (kind == "int8_channels") and served.engine.lanes[-1].is_batched # int8, too: its rows are kept apart inside
    alone = torch.cat([surprise(served, [p]) for p in PROMPTS])
    served.engine.close()
    served = pipeline.open_served(bundle, slots=6, kind=kind)
    cache = SlotCache(graph.cfg, 2, 64, dtype=graph.embed_tokens.weight.dtype)
    with torch.inference_mode():
        for row,p in enumerate((PROMPTS[5], PROMPTS[1])):
            read_slots(graph, torch.tensor([p]), SlotRows(cache, [row], len(p)))
            cache.texts[row] += p
        pair = [read_slots(graph, torch.tensor([[7], [8]]), SlotRows(cache, [0, 1], 1)), torch.cat([read_slots(graph, torch.tensor([[7+row]]), SlotRows(cache, [row], 1)) for row in (0, 1)])]
    torch.testing.assert_close(*pair, atol=dict(fp16=2e-2, int8_channels=1e-6)[kind], rtol=0)
    torch.testing.assert_close(surprise(served, PROMPTS), alone, atol=dict(fp16=2e-2, int8_channels=1e-6)[kind], rtol=0)
    served.engine.close()


def test_a_window_counts_from_a_text_s_own_end(tmp_path):
    pytest.importorskip("onnxscript", reason="needs llm_scratch[deploy]")
    from functools import partial

    from llm_scratch.deployment import OnnxDecoder, export_onnx
    cfg = ModelConfig(vocab_size=60, context_len=40, n_layers=1, n_heads=2, n_kv_heads=1, d_model=32, d_ff=32, d_head=16)
    model = filled(Decoder(cfg, block=partial(Block, attention=partial(Attention, mix=partial(window_attend, window=4)))))
    graph = OnnxSlots(OnnxDecoder(export_onnx(model, tmp_path/"w.onnx")))
    assert fits_slots(graph) and not fits_slots(model)
    with BatchEngine(graph, n_slots=3) as one, BatchEngine(model, n_slots=3) as other:
        jobs = [TextJob([1+i]*(1+6*i), 12, temperature=0) for i in range(4)]
        assert [t.read(30) for t in [one.submit(j) for j in jobs]] == [t.read(30) for t in [other.submit(j) for j in jobs]]


@pytest.fixture
def own_log():
    logs = [logging.getLogger(n) for n in ("llm_scratch.server", "llm_scratch.serving", "uvicorn.error")]
    before = [(log.handlers, log.propagate, log.level) for log in logs]
    yield
    for log,(log.handlers,log.propagate,level) in zip(logs, before): log.setLevel(level)


@pytest.fixture
def serve(monkeypatch, own_log):
    "The verb, as far as the socket."
    def run(*args, env=None):
        made = []
        monkeypatch.setattr(pipeline, "run_server", lambda app, *_, **__: made.append(app))
        got = typer.testing.CliRunner(env=env).invoke(pipeline.app, ["serve", *map(str, args)])
        for app in made: app.state.server.served.engine.close(drain=False)
        return got, made[0] if made else None
    return run


def test_a_changed_byte_is_refused_in_one_line(bundle, serve, tmp_path):
    for name in ("fp32.onnx", "int8_channels.onnx", "tokenizer.json", "bundle.json"):
        bad = shutil.copytree(bundle, tmp_path/name)
        raw = bytearray((bad/name).read_bytes())
        raw[len(raw)//2] ^= 1
        (bad/name).write_bytes(raw)
        got,app = serve(bad)
        assert got.exit_code == 2 and app is None and name in got.output and "corrupt" in got.output and "Traceback" not in got.output, got.output
        assert len([line for line in got.output.splitlines() if line.strip()]) <= 8 # one sentence, folded into the terminal's width


@pytest.mark.parametrize(("of", "kind", "says"), [("bundle", "int3", "no kind"), ("home", "fp16", "no bundle.json")])
def test_kinds_that_are_not_there(of, kind, says, serve, request):
    got,app = serve(request.getfixturevalue(of), "--kind", kind)
    assert got.exit_code == 2 and app is None and says in " ".join(got.output.replace("│", " ").split()), got.output


# by which name

EVIL = {"host":"evil.example:8000", "origin":"http://evil.example:8000"}


def test_a_page_that_has_taken_our_address_is_not_answered(caplog):
    served = scripted_served("yes")
    with background_server(make_app(served, hosts=allowed_hosts("127.0.0.1", ["llm.example.org"]))) as url:
        port = url.rsplit(":", 1)[1]
        with httpx.Client(base_url=url, timeout=10) as c:
            for method,path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/"), ("POST", "/admin/reload"), ("GET", "/openapi.json"), ("POST", "/v1/feedback"), ("OPTIONS", "/v1/models"), ("GET", "/nothing")):
                got = c.request(method, path, headers=EVIL)
                assert got.status_code == 403 and got.json()["error"]["code"] == "wrong_host" and got.json()["error"]["type"] == "permission_error" and "--allow-host" in got.json()["error"]["message"], path
            assert not served.engine.jobs
            for path in ("/healthz", "/readyz", "/metrics"): assert c.get(path, headers={"host":"10.1.2.3:8000"}).status_code == 200
            for host in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:1", "LLM.example.org", "llm.example.org.:443"): assert c.get("/v1/models", headers={"host":host}).status_code == 200, host
            for host in ("", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example#localhost", "localhost:80@evil.example", "127.0.0.2", "[::1", "a:b:c"): assert c.get("/v1/models", headers={"host":host}).status_code in (400, 403), host
            assert 'llm_server_errors_total{code="wrong_host"}' in c.get("/metrics").text
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="none").models.list().data[0].id == "scripted"


def test_names_that_fit():
    assert allowed_hosts("127.0.0.1") == ("localhost", "127.0.0.1", "[::1]") and allowed_hosts("192.0.2.1")[-1] == "192.0.2.1" and allowed_hosts("fe80::1")[-1] == "[fe80::1]"
    assert allowed_hosts("0.0.0.0") == allowed_hosts("::") == ("localhost", "127.0.0.1", "[::1]") # with nobody's key: closed
    assert allowed_hosts("0.0.0.0", has_keys=True) is None and allowed_hosts("127.0.0.1", has_keys=True) is not None and allowed_hosts("127.0.0.1", ["*"]) is None
    assert allowed_hosts("0.0.0.0", ["A.example:80"], has_keys=True)[-1] == "a.example"
    assert host_name("[2001:DB8::1]:80") == "[2001:db8::1]" and host_name(" x. ") == "x"


@pytest.mark.parametrize(("args", "env", "names"), [([], {}, True), (["--host", "0.0.0.0"], {}, True), (["--host", "0.0.0.0"], dict(LLM_SCRATCH_API_KEYS="a-key-that-is-long-enough"), None), (["--allow-host", "a.example", "--allow-host", "b.example"], {}, ("a.example", "b.example")),
    (["--host", "0.0.0.0"], dict(LLM_SCRATCH_API_KEYS="a-key-that-is-long-enough", LLM_SCRATCH_ALLOW_HOST="a.example b.example"), ("a.example", "b.example")), (["--allow-host", "*"], {}, None)])
def test_the_verb_knows_its_names(home, serve, args, env, names, monkeypatch):
    monkeypatch.setattr(pipeline, "open_served", lambda *_, **__: scripted_served("yes"))
    got,app = serve(home, *args, env=env)
    assert got.exit_code == 0, got.output
    hosts = app.state.server.hosts
    assert hosts is None if names is None else hosts[:3] == ("localhost", "127.0.0.1", "[::1]") and (names is True or hosts[-2:] == names)

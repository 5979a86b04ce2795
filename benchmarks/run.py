"""Our code beside the tools that people use: one thread each, taking turns, A B A B.

    python benchmarks/run.py                 five rounds; a few minutes
    python benchmarks/run.py --rounds 9
    python benchmarks/run.py --tiny          seconds: it shows that everything runs, and its numbers say nothing

Each pair does its work once before it is timed, and what comes out must be the same. Prints one table in Markdown. A peer that is not installed
leaves its rows out, and a line says so.
"""
import os

if __name__ == "__main__": # before the libraries below start their threads
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1") | dict(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import argparse
import gc
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import accumulate
from operator import ne
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights, n_params, save_model  # noqa: E402
from llm_scratch.core import UserError  # noqa: E402
from llm_scratch.data import load_corpus, tiny_corpus  # noqa: E402
from llm_scratch.generation import Cache, generate  # noqa: E402
from llm_scratch.pretraining import add_gradients, make_optimizers  # noqa: E402
from llm_scratch.tokenization import PATTERN, SPECIALS, Tokenizer, to_tokenizers_json, train_bpe  # noqa: E402

@dataclass(frozen=True)
class Sizes:
    "How much work there is."
    sources:tuple[str, ...]=("recipes", "parables", "encyclopaedia") # of the text; none for the few recipes that come with the library
    n_bytes:int=9_500_000 # of the text, at most: whole documents, in their order
    n_tokens:int=4096 # of the vocabulary to learn
    cfg:ModelConfig=ModelConfig(vocab_size=2048, context_len=256, n_layers=4, n_heads=3, n_kv_heads=1, d_model=192, d_ff=512, d_head=64)
    batch_size:int=8 # texts of a training step, each as long as the context
    n_new:int=96 # tokens to write, in one text
    decoders:tuple[ModelConfig, ...]=(ModelConfig(vocab_size=512, context_len=128, n_layers=4, n_heads=4, n_kv_heads=4, d_model=128, d_ff=352, d_head=32),
                                      ModelConfig(vocab_size=4096, context_len=128, n_layers=6, n_heads=4, n_kv_heads=4, d_model=256, d_ff=704, d_head=64),
                                      ModelConfig(vocab_size=8192, context_len=128, n_layers=8, n_heads=6, n_kv_heads=6, d_model=384, d_ff=1024, d_head=64)) # that write it

TINY = Sizes((), n_tokens=400, cfg=Sizes.cfg.tiny(), batch_size=2, n_new=16, decoders=(replace(Sizes.cfg.tiny(), vocab_size=300),))

@dataclass(frozen=True)
class Pair:
    "Two ways to do the same work."
    work:str # what is done, and how much of it
    peer:str # whose way the second one is
    ours:Callable[[], object]
    theirs:Callable[[], object]
    agree:Callable[[object, object], None] # takes both results; `AssertionError` when they differ

def require(truth:bool, otherwise:str)->None:
    "An `assert` that `python -O` keeps."
    if not truth: raise AssertionError(otherwise)

# --- the pairs -------------------------------------------------------------------------------------------------

def texts_of(sizes:Sizes)->list[str]:
    "Documents in their order, as long as they fit."
    texts = list((load_corpus(sizes.sources) if sizes.sources else tiny_corpus())["text"])
    return [t for t,n in zip(texts, accumulate(len(t.encode()) for t in texts)) if n <= sizes.n_bytes]

def their_training(texts:list[str], n_tokens:int)->"tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import pre_tokenizers as pre
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(PATTERN), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=n_tokens, special_tokens=list(SPECIALS),
                            initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    return tok

def same_vocabulary(ours:Tokenizer, theirs:"tokenizers.Tokenizer")->None: # but for ties, which each breaks by its own ids
    a,b = set(to_tokenizers_json(ours)["model"]["vocab"]),set(theirs.get_vocab())
    require(len(a) == len(b) and len(a & b) >= .99*len(a), f"vocabularies of {len(a)} and {len(b)} tokens share {len(a & b)}")

def encoding(work:str, texts:list[str], tok:Tokenizer, ours:Callable[[], Tokenizer])->Iterator[Pair]:
    "Ids of all texts, as lists, beside both libraries; whoever remembers words begins with none."
    import tokenizers
    saved = json.dumps(to_tokenizers_json(tok))
    def same_ids(ours:list, theirs:list)->None: require(ours == theirs, f"{sum(map(ne, ours, theirs))} of {len(texts)} texts have other ids")
    yield Pair(work, "tokenizers", lambda: list(ours().encode_batch(texts)), lambda: [e.ids for e in tokenizers.Tokenizer.from_str(saved).encode_batch(texts)], same_ids)
    if find_spec("tiktoken") is None: raise UserError("tiktoken is not installed: pip install tiktoken")
    import tiktoken
    theirs = tiktoken.Encoding("ours", pat_str=PATTERN, mergeable_ranks={b:i for i,b in enumerate(tok.token_bytes[:tok.eot_id])}, special_tokens=tok.special_ids)
    yield Pair(work, "tiktoken", lambda: list(ours().encode_batch(texts)), lambda: [theirs.encode_ordinary(t) for t in texts], same_ids)

def tokenizing(sizes:Sizes)->Iterator[Pair]:
    "Learn a vocabulary; encode the text that it was learned from."
    texts = texts_of(sizes)
    yield Pair(f"learn {sizes.n_tokens:,} tokens from {sum(len(t.encode()) for t in texts)/1e6:.2g} MB", "tokenizers",
               lambda: train_bpe(texts, sizes.n_tokens), lambda: their_training(texts, sizes.n_tokens), same_vocabulary)
    tok = train_bpe(texts, sizes.n_tokens)
    yield from encoding("encode that text", texts, tok, lambda: Tokenizer(tok.merges, tok.specials))

def tokenizing_compiled(sizes:Sizes)->Iterator[Pair]:
    "The same in machine code."
    from llm_scratch.fastbpe import FastTokenizer, train_merges_fast
    texts = texts_of(sizes)
    learn = lambda: train_bpe(texts, sizes.n_tokens, learn=train_merges_fast)
    tok = learn()
    require(tok.digest == train_bpe(texts, sizes.n_tokens).digest, "the compiled trainer has learned other merges")
    yield Pair(f"learn {sizes.n_tokens:,} tokens from that text, compiled", "tokenizers", learn, lambda: their_training(texts, sizes.n_tokens), same_vocabulary)
    yield from encoding("encode that text, compiled", texts, tok, lambda: FastTokenizer(tok))

def random_model(cfg:ModelConfig)->Decoder:
    "A decoder in which every matrix matters; a fresh one writes zeros to the stream."
    model,rng = Decoder(cfg),torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2: p.normal_(0, p.shape[1]**-.5, generator=rng)
    return model

def modelling(sizes:Sizes)->Iterator[Pair]:
    "Gradients of one batch."
    import transformers
    transformers.utils.logging.disable_progress_bar()
    cfg,ours = sizes.cfg,random_model(sizes.cfg)
    with tempfile.TemporaryDirectory() as folder: theirs = transformers.Qwen3ForCausalLM.from_pretrained(save_model(ours, f"{folder}/model", eot_id=0))
    ids = torch.randint(cfg.vocab_size, (sizes.batch_size, cfg.context_len), generator=torch.Generator().manual_seed(0))
    targets = torch.cat([ids[:,1:], torch.full_like(ids[:,:1], -1)], 1) # what transformers makes of `labels=ids`

    def our_gradients()->float:
        ours.zero_grad()
        return add_gradients(ours, ids, targets)[0]
    def their_gradients()->float:
        theirs.zero_grad()
        loss = theirs(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.item()
    def same_gradients(a:float, b:float)->None:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0, msg=lambda m: f"losses: {m}")
        torch.testing.assert_close(ours.embed_tokens.weight.grad, theirs.get_input_embeddings().weight.grad, atol=1e-4, rtol=1e-3, msg=lambda m: f"gradients: {m}")
    yield Pair(f"forward and backward, {n_params(cfg)/1e6:.2f}M weights, {ids.numel():,} tokens", "transformers", our_gradients, their_gradients, same_gradients)


def optimizing(sizes:Sizes)->Iterator[Pair]:
    "One update of the matrices by Muon."
    ours,rng = make_optimizers(random_model(sizes.cfg))[0],torch.Generator().manual_seed(0)
    group, = ours.param_groups
    for p in group["params"]: p.data.zero_(); p.grad = torch.randn(p.shape, generator=rng) # from zero: what stands there after a step is the step
    moved,copies = [p.detach() for p in group["params"]],[torch.zeros_like(p) for p in group["params"]]
    for p,copy in zip(group["params"], copies): copy.grad = p.grad.clone()
    theirs = torch.optim.Muon(copies, lr=group["lr"], momentum=group["momentum"], weight_decay=0, ns_steps=3)

    def same_step(_, __)->None: # theirs computes in bfloat16
        for a,b in zip(moved, copies): require((a-b).norm() < .03*b.norm(), f"steps of a {tuple(a.shape)} matrix differ by {(a-b).norm()/b.norm():.1%}")
    yield Pair(f"Muon step of {len(copies)} matrices", "torch.optim.Muon (bfloat16)", ours.step, theirs.step, same_step)

def their_generate(model:"transformers.PreTrainedModel", prompt:torch.Tensor, n_new:int)->Callable[[], list[int]]:
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=n_new, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0)
    return lambda: model.generate(prompt, **options)[0].tolist()

def same_text(a:list[int]|str, b:list[int]|str)->None: require(a == b, f"texts {a} and {b}")

def decoding(sizes:Sizes)->Iterator[Pair]:
    "One greedy text, with a cache: our compiled step against our own decoder in PyTorch, and against `transformers`."
    import transformers
    from llm_scratch.compiled import CompiledDecoder, as_int8
    transformers.utils.logging.disable_progress_bar()
    prompt,n = torch.tensor([[1]]),sizes.n_new
    for cfg in sizes.decoders:
        model,what = random_model(cfg).eval(),f"write {n} tokens, {n_params(cfg)/1e6:.1f}M weights"
        fast,small = CompiledDecoder(model),CompiledDecoder(model, convert=as_int8)
        with tempfile.TemporaryDirectory() as folder: hub = transformers.Qwen3ForCausalLM.from_pretrained(save_model(model, f"{folder}/model", eot_id=0))
        ours = lambda m: lambda: generate(m, prompt, n, temperature=0)[0].tolist()
        yield Pair(f"{what}, compiled", "PyTorch, our decoder", ours(fast), lambda: in_pytorch(model, prompt, n), same_text)
        yield Pair(f"{what}, compiled", "transformers", ours(fast), their_generate(hub, prompt, n), same_text)
        yield Pair(f"{what}, compiled, int8", "transformers, float32", ours(small), their_generate(hub, prompt, n), lambda a,b: require(len(a) == len(b), f"{len(a)} and {len(b)} ids")) # rounded weights write their own text

@torch.no_grad()
def in_pytorch(model:Decoder, ids:torch.Tensor, n:int)->list[int]:
    "What `generate` does without the compiled step."
    cache = Cache(model.cfg, 1, ids.shape[1]+n)
    for _ in range(n): ids = torch.cat((ids, model(ids[:,cache.past:], cache)[:,-1:].argmax(-1)), 1)
    return ids[0].tolist()

def drafting(sizes:Sizes)->Iterator[Pair]:
    "Greedy text by a large model alone, and with guesses of a small one; both have learned the same recipes by heart."
    from llm_scratch.lookahead import speculate
    text = torch.tensor(list("".join(tiny_corpus()["text"]).encode())[:sizes.n_new*4]) # bytes
    rows = text.view(4, sizes.n_new)
    def taught(cfg:ModelConfig)->Decoder:
        model = init_weights(Decoder(replace(cfg, vocab_size=256, context_len=sizes.n_new)), 0)
        opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(150):
            torch.nn.functional.cross_entropy(model(rows[:,:-1]).flatten(0, 1), rows[:,1:].flatten()).backward()
            opt.step(); opt.zero_grad()
        return model.eval()
    large,small = taught(sizes.decoders[-1]),taught(Sizes.cfg.tiny())
    prompt,n = rows[:1,:8],sizes.n_new-8
    yield Pair(f"write {n} bytes, {n_params(large.cfg)/1e6:.1f}M weights, 4 guesses of {n_params(small.cfg)/1e6:.2f}M weights", "without guesses",
               lambda: torch.cat(list(speculate(large, small, prompt, n, temperature=0))).tolist(), lambda: in_pytorch(large, prompt, n)[8:], same_text)

def llama_cpp(path:Path, n_ctx:int, **options:object)->Callable[[str, int], str]:
    "One text by llama.cpp, one thread; takes a prompt and how many tokens, gives what follows."
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path,params.n_ctx,params.n_parallel,params.verbosity,params.n_gpu_layers = str(path),n_ctx,1,0,0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    for name,value in options.items(): setattr(params, name, value)
    server = xllamacpp.Server(params)
    return lambda prompt, n: server.handle_completions(dict(prompt=prompt, n_predict=n, max_tokens=n, temperature=0, ignore_eos=True, cache_prompt=False))["choices"][0]["text"]

def llamas(sizes:Sizes)->Iterator[Pair]:
    "The same text by llama.cpp, in float32 and with one byte per weight. Its keys and values are float16, which is its default and its fastest; that they are what differs is checked."
    import xllamacpp
    from llm_scratch.compiled import CompiledDecoder, as_float32, as_int8
    from llm_scratch.llamacpp import save_gguf
    prompt,n,exact = [1],sizes.n_new,dict.fromkeys(("cache_type_k", "cache_type_v"), xllamacpp.ggml_type.GGML_TYPE_F32) | dict(flash_attn_type=xllamacpp.llama_flash_attn_type(0))
    for cfg in sizes.decoders:
        model,words = random_model(cfg).eval(),to_tokenizers_json(Tokenizer([]))
        words["model"] |= dict(vocab={f"<{i}>":i for i in range(cfg.vocab_size-1)}, merges=[["<", "1"]]) # so that the text tells the ids
        words["added_tokens"] = [words["added_tokens"][0] | dict(id=cfg.vocab_size-1)]
        for dtype,convert in (("f32", as_float32), ("q8_0", as_int8)):
            work,fast = f"write {n} tokens, {n_params(cfg)/1e6:.1f}M weights, compiled{', int8' if dtype == 'q8_0' else ''}",CompiledDecoder(model, convert=convert)
            ours = lambda n=n: "".join(f"<{i}>" for i in generate(fast, torch.tensor([prompt]), n, temperature=0)[0,1:].tolist())
            with tempfile.TemporaryDirectory() as folder:
                path = save_gguf(model, words, Path(folder)/"model.gguf", dtype=dtype)
                if dtype == "f32": require((a := ours(16)) == (b := llama_cpp(path, cfg.context_len, **exact)(prompt, 16)), f"{work}: ours and llama.cpp, {dtype} differ: {a} and {b}")
                write = llama_cpp(path, cfg.context_len)
            yield Pair(work, f"llama.cpp, {dtype}", ours, lambda: write(prompt, n), lambda a,b: require(a.count("<") == b.count("<"), f"{a} and {b}")) # rounded numbers write their own text

PAIRS = {tokenizing:"tokenizers", tokenizing_compiled:"numba", modelling:"transformers", optimizing:"torch", decoding:"transformers", drafting:"torch", llamas:"xllamacpp"} # and the package that each needs

# --- the table -------------------------------------------------------------------------------------------------

def cpu_seconds(do:Callable[[], object])->float: # of all threads of this process
    gc.collect()
    start = time.process_time()
    result = do() # kept until the clock has been read: throwing it away is nobody's work
    return time.process_time() - start

def measure(pair:Pair, rounds:int)->list[tuple[float, float]]: # CPU-seconds of ours and theirs in each round
    "Make sure that both do the same, then time them in turn."
    try: pair.agree(pair.ours(), pair.theirs()) # which warms both up, too
    except AssertionError as e: raise AssertionError(f"{pair.work}: ours and {pair.peer} differ, so there is nothing to compare: {e}") from None
    return [(cpu_seconds(pair.ours), cpu_seconds(pair.theirs)) for _ in range(rounds)]

def row(pair:Pair, times:list[tuple[float, float]])->str:
    spread = lambda xs: f"{median(xs):.3g} ({min(xs):.3g}–{max(xs):.3g})"
    ours,theirs = zip(*times)
    return f"| {pair.work} | {pair.peer} | {spread(ours)} | {spread(theirs)} | {median(ours)/median(theirs):.2f} |"

def machine()->str:
    "The processor and the versions."
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    name = m[1] if (m := re.search(r"^model name\s*: (.+)", info, re.M)) else platform.processor() or platform.machine()
    bf16 = "with" if re.search(r"\b(avx512_|amx_)?bf16\b", info) else "without"
    return ", ".join([f"{name} ({bf16} bfloat16 instructions)", f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in ("torch", "tokenizers", "tiktoken", "transformers", "numba", "xllamacpp") if find_spec(p))])

def asked(argv:list[str]|None, about:str, tiny:str)->argparse.Namespace:
    "What the command line asks for: `rounds` and `tiny`."
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is timed")
    parser.add_argument("--tiny", action="store_true", help=tiny)
    args = parser.parse_args(argv)
    if args.rounds < 1: parser.error(f"--rounds {args.rounds} measures nothing: give 1 or more")
    return args

def head(about:str, rounds:int)->None:
    "What stands above the rows."
    print(f"{about}\n\nCPU-seconds on {torch.get_num_threads()} thread, median (least–most) of {rounds} rounds; a ratio below 1 means that ours needs less.\n")
    print("| work | peer | ours | peer's | ours / peer's |\n|---|---|---|---|---|", flush=True)

def main(argv:list[str]|None=None)->None:
    args = asked(argv, __doc__, "a few recipes and a tiny model")
    head(machine(), args.rounds)
    skipped = []
    for pairs,package in PAIRS.items():
        try:
            if find_spec(package) is None: raise UserError(f"{package} is not installed: pip install {package}")
            for pair in pairs(TINY if args.tiny else Sizes()): print(row(pair, measure(pair, args.rounds)), flush=True)
        except UserError as e: skipped.append(f"skipped {pairs.__name__}: {e}")
    if skipped: print("", *skipped, sep="\n")

if __name__ == "__main__": main()

"""What a model of the book says when it is asked: before and after chat tuning, with and without the text in front of it.

    llm-scratch run                                      once: the model, in runs/cpu
    python benchmarks/assistant.py                       three seeds, about twelve minutes on one quiet core
    python benchmarks/assistant.py --run runs/mine
    python benchmarks/assistant.py --prepare large.npz.xz   all text of the book and all dialogues as ids, for the next line
    python benchmarks/assistant.py --large large.npz.xz --device cuda --out large.json    a few minutes on one GPU: 16 million weights from nothing
    python benchmarks/assistant.py --read large.json     score what came back
    python benchmarks/assistant.py --tiny                seconds, for a test: the numbers say nothing

Writes nbs/assistant.json, which chapter 08g reads. Questions are on titles that neither tuning nor the model before it has seen; answers are drawn
as `llm-scratch chat` draws them. `form` is the share of answers in the form that their question asks for, `f1` the words shared with the source, `luck` the same against the source of
another question. Each figure is [mean, standard error, questions], the mean over seeds for each question first.
"""
import os

if __name__ == "__main__": os.environ.setdefault("OMP_NUM_THREADS", "1") # before torch starts its threads

import argparse
import io
import json
import lzma
import random
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from copy import deepcopy
from itertools import islice
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights, load_model, n_params  # noqa: E402
from llm_scratch.assistant import (Answer, Dialogue, add_tokens, answer_all, ask, book_dialogues, chat_samples, end_id, given_dialogues, in_form, mix_dialogues,  # noqa: E402
                                   recipe_dialogues, set_mean_rows, small_talk_dialogues, split_by_title, tune_assistant, wiki_dialogues, with_passage, word_f1)
from llm_scratch.backward import quick_training  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.data import BOOK, Document, load_documents, read_source, tiny_corpus, to_documents  # noqa: E402
from llm_scratch.evaluation import mean_of, share_of  # noqa: E402
from llm_scratch.finetuning import pack_samples  # noqa: E402
from llm_scratch.packing import Separately  # noqa: E402
from llm_scratch.pretraining import Batches, TrainState, make_optimizers, train, wsd  # noqa: E402
from llm_scratch.tokenization import Tokenizer, load_tokenizer, train_bpe  # noqa: E402

KINDS = "steps","ingredients","ingredients, given","fact","fact, given","description","topic"
TEN = ("Hello, how are you?", "What is your name?", "Tell me a joke", "How do I make Tomato Soup?", "What ingredients do I need for Banana Bread?", "Who was Napoleon?", "What is Iceland?",
       "Which topic area does Algebra belong to?", "Give a short description of Marie Curie.",
       "Zorvia is a small island in the north of Lake Ottel. It has two villages and a harbour.\n\nWhat is Zorvia?")
CHAT = "<|im_start|>","<|im_end|>"
SAMPLING = dict(temperature=.8, top_p=.95) # those of the command line
LARGE = dict(context_len=512, n_layers=8, n_heads=6, n_kv_heads=2, d_model=384, d_ff=1024, d_head=64) # what the dial of chapter 12 makes of depth 8

# --- questions and answers -----------------------------------------------------------------------------------------

def sides(held_titles:list[str])->tuple[list[Dialogue], list[Dialogue]]:
    "All dialogues, split by title."
    return split_by_title([*book_dialogues(), *given_dialogues(read_source("recipes"), read_source("encyclopaedia"))], .05, held_titles)

def questions(held:list[Dialogue], learnt:list[Dialogue], n:int)->dict[str, list[Dialogue]]:
    "The same for all models; `fact, learnt` and `ingredients, learnt` are on titles of the tuning."
    by,rng = defaultdict(list),random.Random(0)
    for d in held: by[d.kind].append(d)
    for d in learnt:
        if d.kind in ("fact", "ingredients"): by[f"{d.kind}, learnt"].append(d)
    return {k:rng.sample(by[k], min(n, len(by[k]))) for k in [*KINDS, "fact, learnt", "ingredients, learnt"] if len(by[k]) > 1}

def scored(runs:list[list[Answer]])->dict[str, list[float]]:
    "Figures of one kind of question, over seeds and questions."
    three = lambda r: [round(r.mean, 4), round(r.stderr, 4), r.n]
    right = [a.dialogue.messages[-1]["content"] for a in runs[0]]
    over_seeds = lambda score: mean_of(np.mean([[score(i, a) for i,a in enumerate(run)] for run in runs], 0))
    form = [[in_form(a.dialogue.kind.removesuffix(", learnt"), a.text, a.has_ended) for a in run] for run in runs]
    same = share_of(round(np.mean(form)*len(right)), len(right)) # none and all have error bars too
    return dict(ended=round(float(np.mean([[a.has_ended for a in run] for run in runs])), 4), form=[round(float(np.mean(form)), 4), round(max(same.stderr, mean_of(np.mean(form, 0)).stderr), 4), len(right)], f1=three(over_seeds(lambda i, a: word_f1(a.text, right[i]))),
                luck=three(over_seeds(lambda i, a: word_f1(a.text, right[(i+1)%len(right)]))),
                exact=round(float(np.mean([[a.text.strip() == r.strip() for a,r in zip(run, right)] for run in runs])), 4),
                f1_by_seed=[round(float(np.mean([word_f1(a.text, r) for a,r in zip(run, right)])), 4) for run in runs])

def ask_all(model:Decoder, tok:Tokenizer, asked:dict[str, list[Dialogue]], most:int, batch_size:int=32)->dict[str, list[Answer]]:
    "All kinds in one go, sampled as `llm-scratch chat` does it."
    rng = torch.Generator(model.embed_tokens.weight.device).manual_seed(0)
    answers = iter(answer_all(model, tok, [d for some in asked.values() for d in some], most, batch_size=batch_size, rng=rng, **SAMPLING))
    return {kind:list(islice(answers, len(some))) for kind,some in asked.items()}

# --- a model of the book -------------------------------------------------------------------------------------------

def small(folder:Path, seeds:list[int], n_steps:int, n_questions:int)->dict:
    "The model of a finished run."
    base,tok = load_model(folder/"model"),load_tokenizer(folder/"tokenizer")
    docs = load_documents(folder/"documents")
    learnt,held = sides([text.partition("\n")[0][2:] for part in ("validation", "duplicates") for text in docs[part]["text"]])
    norms = base.embed_tokens.weight.detach().norm(dim=1)
    record = dict(n_params=n_params(base.cfg), n_steps=n_steps, seeds=seeds, row_norms=dict(mean=float(norms.mean()), unseen=[float(norms[tok.special_ids[n]]) for n in CHAT]))
    base,tok = add_tokens(base, tok) # they are there, so that nothing happens
    set_mean_rows(base, [tok.special_ids[name] for name in CHAT], tok.eot_id)
    asked,most = questions(held, mix_dialogues(learnt, seed=0), n_questions),min(110, base.cfg.context_len//2)
    before = ask_all(base.eval(), tok, asked, most)
    runs,loss,seconds = [],[],[]
    for seed in seeds:
        model,losses = deepcopy(base),[]
        mix = mix_dialogues(learnt, seed=0) # the order is what the seed changes, so that `learnt` means the same for all
        start = time.process_time()
        with quick_training(model): losses = [step.loss for step in tune_assistant(model, tok, mix, n_steps, seed=seed)]
        seconds.append(time.process_time()-start)
        loss.append([float(np.mean(losses[i:i+10])) for i in range(0, n_steps, 10)])
        runs.append(ask_all(model.eval(), tok, asked, most))
        print(f"seed {seed}: {seconds[-1]:.0f} CPU-seconds, loss {loss[-1][-1]:.3f}", flush=True)
        if seed == seeds[0]: record["ten"] = ten(model, tok, mix, most)
    samples = chat_samples(tok, mix, base.cfg.context_len)
    record |= dict(cpu_seconds=seconds, loss=loss, mix=len(mix), n_tokens=sum(len(ids) for ids,_ in samples), n_answer_tokens=sum(sum(t != -1 for t in targets) for _,targets in samples),
                   scores={kind:dict(before=scored([before[kind]]), after=scored([run[kind] for run in runs])) for kind in asked})
    return record

def ten(model:Decoder, tok:Tokenizer, mix:list[Dialogue], most:int)->list[list[str]]: # question, answer, whether it was taught
    taught = {d.messages[0]["content"] for d in mix}
    answers = ask_all(model, tok, dict(ten=[ask(q, "", "ten") for q in TEN]), 2*most)["ten"]
    return [[q, a.text + ("" if a.has_ended else " [cut off]"), "taught" if q in taught else "new"] for q,a in zip(TEN, answers)]

# --- a larger one, on a GPU ----------------------------------------------------------------------------------------

def prepare(path:Path, vocab_size:int, n_questions:int, names:tuple[str, ...]=BOOK)->None:
    "Everything as ids: no package but torch and numpy is needed where it is trained."
    from llm_scratch.fastbpe import best_tokenizer, best_trainer
    texts = [doc.text for name in names for doc in read_source(name)]
    learnt,held = sides([])
    hidden = {d.title.casefold() for d in held}
    base = [t for t in texts if t.partition("\n")[0].removeprefix("# ").casefold() not in hidden]
    tok = train_bpe(base, vocab_size, learn=best_trainer())
    fast = best_tokenizer(tok)
    tokens = np.concatenate([np.array([tok.eot_id, *ids], dtype=np.uint16) for ids in fast.encode_batch(base)])
    asked = questions(held, [d for d in learnt if d.kind in ("fact", "ingredients")], n_questions)
    asked["ten"] = [ask(q, "", "ten") for q in TEN]
    samples = chat_samples(fast, [d for d in learnt if d.kind != "story" for _ in range(4 if d.kind == "small talk" else 1)], 512)
    flat = lambda rows: np.concatenate([np.asarray(r, dtype=np.int32) for r in rows])
    arrays = dict(tokens=tokens, ids=flat(s[0] for s in samples).astype(np.uint16), learnt=flat(s[1] for s in samples) != -1, last=np.array([s[1][-1] for s in samples], dtype=np.int32),
                        lengths=np.array([len(s[0]) for s in samples], dtype=np.uint16),
                        about=json.dumps(dict(merges=tok.merges, specials=tok.specials, asked=asked, n_tokens=len(tokens), n_params=n_params(ModelConfig(vocab_size, **LARGE)))))
    np.savez(whole := io.BytesIO(), **arrays)
    path.write_bytes(lzma.compress(whole.getbuffer(), preset=9)) # dialogues repeat the text: a long memory finds that
    print(f"{path}: {path.stat().st_size/2**20:.1f} MiB, {len(tokens):,} tokens of text, {len(samples):,} dialogues of {sum(len(s[0]) for s in samples):,} ids")

def large(path:Path, device:str, out:Path, n_steps:int, n_tuning:int, batch_size:int, seconds:float, tiny:bool)->None:
    "Pre-train, tune, ask."
    data = dict(np.load(io.BytesIO(lzma.decompress(path.read_bytes())))) # read once
    about = json.loads(str(data["about"]))
    tok = Tokenizer(about["merges"], about["specials"])
    ends = np.cumsum(data["lengths"].astype(np.int64))
    samples = []
    for a,b,last in zip((ends-data["lengths"]).tolist(), ends.tolist(), data["last"]):
        following = [*data["ids"][a+1:b].tolist(), int(last)]
        samples.append((data["ids"][a:b].tolist(), [i if yes else -1 for i,yes in zip(following, data["learnt"][a:b])]))
    cfg = ModelConfig(tok.vocab_size, 512, n_layers=1, n_heads=1, n_kv_heads=1, d_model=32, d_ff=64, d_head=32) if tiny else ModelConfig(tok.vocab_size, **LARGE)
    model = init_weights(Decoder(cfg), seed=0).to(device)
    amp = lambda: torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext()
    class Cast(torch.nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, ids):
            with amp(): return self.model(ids)
    class Moved:
        def __init__(self, batches): self.batches = batches
        def __getitem__(self, step): return tuple(x.to(device) for x in self.batches[step])
    T = cfg.context_len
    losses,start = {},time.perf_counter()
    def run(name, wrapped, batches, n, lr, seconds):
        row,probe,at = [],deepcopy(wrapped),[]
        for _ in train(TrainState(probe, make_optimizers(probe, lr)), Moved(batches), lambda s: 1., 12): at.append(time.perf_counter())
        n = min(n, max(12, int(seconds/((at[-1]-at[3])/8)))) # what there is time for
        losses[name] = row
        for step in train(TrainState(wrapped, make_optimizers(wrapped, lr)), Moved(batches), lambda s: wsd(s, n), n):
            row.append(step.loss)
            if step.n % 50 == 0: print(f"{name} {step.n}: {np.mean(row[-50:]):.3f}, {time.perf_counter()-start:.0f} s", flush=True)
    run("text", Cast(model), Batches(data["tokens"], T, batch_size, seed=0), n_steps, 1., .7*seconds)
    set_mean_rows(model, [tok.special_ids[name] for name in CHAT], tok.eot_id)
    asked = {kind:[Dialogue(*d) for d in some[:2 if tiny else None]] for kind,some in about["asked"].items()}
    model.eval()
    before = ask_all(model, tok, asked, 120, 1024)
    run("chat", Cast(Separately(model)), pack_samples(samples, T, batch_size, end_id(tok), seed=0), n_tuning, .5, .3*seconds)
    after = ask_all(model, tok, asked, 120, 1024)
    torch.cuda.synchronize() if device == "cuda" else None
    write_json(out, dict(n_params=n_params(cfg), n_steps=len(losses["text"]), n_tuning=len(losses["chat"]), tokens_per_step=batch_size*T, n_tokens=len(data["tokens"]), seconds=time.perf_counter()-start,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu", loss={k:[float(np.mean(v[i:i+20])) for i in range(0, len(v), 20)] for k,v in losses.items()}, before=before, after=after))

def read(path:Path)->dict:
    "Score what came back."
    came = json.loads(path.read_text(encoding="utf-8"))
    back = lambda rows: [Answer(Dialogue(*d), text, ended) for d,text,ended in rows]
    before,after = ({kind:back(rows) for kind,rows in came.pop(when).items()} for when in ("before", "after"))
    ten = [[a.dialogue.messages[0]["content"], a.text + ("" if a.has_ended else " [cut off]"), "new"] for a in after.pop("ten")]
    before.pop("ten")
    return came | dict(ten=ten, scores={kind:dict(before=scored([before[kind]]), after=scored([after[kind]])) for kind in after})

# --- command line --------------------------------------------------------------------------------------------------

def tiny_record()->dict:
    "A few recipes: it shows that everything runs."
    docs = list(to_documents(tiny_corpus()))
    base_tok = train_bpe([d.text for d in docs], 400, specials=("<|endoftext|>",))
    model = init_weights(Decoder(ModelConfig(400, 256, n_layers=1, n_heads=2, n_kv_heads=1, d_model=32, d_ff=64, d_head=16)), seed=0)
    model,tok = add_tokens(model, base_tok)
    learnt,held = split_by_title(recipe_dialogues(docs), .2)
    runs = []
    for seed in (0, 1):
        tuned = deepcopy(model)
        for _ in tune_assistant(tuned, tok, learnt, 3, seed=seed): pass
        runs.append(answer_all(tuned.eval(), tok, held, 20))
    return dict(scores=dict(all=dict(before=scored([answer_all(model.eval(), tok, held, 20)]), after=scored(runs))), ten=ten(model, tok, learnt, 5))

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT/"runs"/"cpu", metavar="DIR", help="a finished run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of the order of the dialogues")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="updates of the tuning")
    parser.add_argument("--questions", type=int, default=48, metavar="N", help="of each kind")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="write all text and dialogues as ids")
    parser.add_argument("--large", type=Path, metavar="FILE", help="train and tune on what --prepare wrote")
    parser.add_argument("--device", default="cpu", help="of --large: cpu or cuda")
    parser.add_argument("--out", type=Path, default=ROOT/"large.json", metavar="FILE", help="what --large writes")
    parser.add_argument("--pretraining", type=int, default=900, metavar="N", help="updates of --large on text")
    parser.add_argument("--tuning", type=int, default=300, metavar="N", help="updates of --large on dialogues")
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="of 512 ids in an update of --large")
    parser.add_argument("--seconds", type=float, default=600, metavar="S", help="that --large may train; it makes fewer updates when there is no time for more")
    parser.add_argument("--read", type=Path, metavar="FILE", help="score what --large wrote")
    parser.add_argument("--record", type=Path, default=ROOT/"nbs"/"assistant.json", metavar="FILE", help="where the figures go")
    parser.add_argument("--tiny", action="store_true", help="a few recipes and a tiny model")
    args = parser.parse_args(argv)
    if args.prepare: prepare(args.prepare, 8192, args.questions)
    elif args.large: large(args.large, args.device, args.out, args.pretraining, args.tuning, args.rows, args.seconds, args.tiny)
    else:
        record = json.loads(args.record.read_text(encoding="utf-8")) if args.record.exists() else {}
        record |= dict(tiny=tiny_record()) if args.tiny else dict(large=read(args.read)) if args.read else dict(small=small(args.run, args.seeds, args.steps, args.questions))
        write_json(args.record, record)

if __name__ == "__main__": main()

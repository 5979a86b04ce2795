"""What does the mixture do to the model? Small decoders that differ in nothing but the shares of their text, at equal tokens.

    python benchmarks/balance.py                 three seeds, about a quarter of an hour of one core
    python benchmarks/balance.py --steps 2 --seeds 1 --held-out 5 --documents 300 --out try.json

Writes nbs/balance.json, which chapter 03e reads, after every run; prints bits per byte of every domain, mean and spread over seeds.
"""
import argparse
import html
import math
import random
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights  # noqa: E402
from llm_scratch.balance import byte_shares, cut_document, mix_documents, temperature_shares  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.data import Document, read_source, split_corpus, to_dataset  # noqa: E402
from llm_scratch.evaluation import bits_per_byte, token_nats  # noqa: E402
from llm_scratch.pretraining import Batches, TrainState, make_optimizers, train, wsd  # noqa: E402
from llm_scratch.tokenization import Tokenizer, train_bpe  # noqa: E402

LEGAL, GENERAL = "licences", ("recipes", "encyclopaedia", "parables", "manuals")
SHARES, TEMPERATURES, EPOCHS = (0., .01, .05, .2, .5, .8), (1., 3.), (4, 16, 64)
PIECE, CONTEXT, BATCH, V = 2_000, 128, 16, 1024 # bytes of a piece; tokens of a window; windows of an update; ids

def plain(docs:list[Document])->list[Document]:
    "Manuals: without tags, each text once, the short ones left out."
    kept = {}
    for doc in docs: kept.setdefault(" ".join(html.unescape(re.sub(r"<[^<>]*>", " ", doc.text)).split()), doc)
    return [doc._replace(text=text+"\n") for text, doc in kept.items() if len(text) >= 200]

def domains(n_validation:int, n_documents:int)->tuple[dict, dict, dict]: # pieces to learn from and to be asked about, by domain; bytes there are
    "All text of the five domains; what is near to a held-out document is left out."
    found = {name: list(read_source(name)) for name in (*GENERAL, LEGAL)}
    found["manuals"] = plain(found["manuals"])
    sizes = {name: sum(len(d.text.encode()) for d in docs) for name, docs in found.items()}
    learn, ask = defaultdict(list), defaultdict(list)
    for name, docs in found.items():
        some = random.Random(0).sample(docs, min(len(docs), n_documents))
        split = split_corpus(to_dataset(some), n_validation)
        for side, pieces in (("train", learn), ("validation", ask)):
            rows = [Document(r["text"], r["source"], r["id"], {}) for r in split[side]]
            pieces[name] = [piece for doc in rows for piece in (cut_document(doc, PIECE) if side == "train" else cut_document(doc, PIECE)[:1])]
    return dict(learn), dict(ask), sizes

def mixtures(sizes:dict)->list[tuple[str, float, dict, float]]: # kind, its dial, shares, how often the legal text is to be read
    "What is compared."
    legal = lambda p: {name: (1-p)/len(GENERAL) for name in GENERAL} | {LEGAL: p}
    return [*(("share", p, legal(p), 0) for p in SHARES), *(("temperature", t, temperature_shares(sizes, t), 0) for t in TEMPERATURES), *(("epochs", e, legal(.2), e) for e in EPOCHS)]

def read_ids(tok:Tokenizer, docs:dict, shares:dict, n_tokens:int, seed:int)->tuple[np.ndarray, dict]: # ids, realised shares of the bytes
    "A row of documents as a mixture gives them."
    ids, used = [], []
    for doc in mix_documents(docs, shares, 100*n_tokens, seed):
        if len(ids) >= n_tokens: break
        ids += [tok.eot_id, *tok.encode(doc.text)]
        used.append(doc)
    return np.array(ids[:n_tokens], dtype=np.uint16), byte_shares(used)

def run(tok:Tokenizer, learn:dict, ask:dict, mix:tuple, steps:int, seed:int)->dict:
    "Train one decoder on one mixture; bits per byte of every domain."
    kind, dial, shares, epochs = mix
    n_tokens = CONTEXT*(BATCH*steps + 1)
    if epochs: # so little legal text that it comes round this often
        room = 3.4*n_tokens*shares[LEGAL]/epochs
        pieces = random.Random(seed).sample(learn[LEGAL], len(learn[LEGAL]))
        learn = learn | {LEGAL: pieces[:max(1, round(room/mean(len(p.text.encode()) for p in pieces)))]}
    ids, realised = read_ids(tok, learn, shares, n_tokens, seed)
    cfg = ModelConfig(vocab_size=V, context_len=CONTEXT, n_layers=3, n_heads=4, n_kv_heads=4, d_model=96, d_ff=256, d_head=24)
    model = init_weights(Decoder(cfg), seed)
    state = TrainState(model, make_optimizers(model))
    for _ in train(state, Batches(ids, CONTEXT, BATCH, seed), lambda step: wsd(step, steps, warmup=min(20, steps)), steps): pass
    bits = {}
    for name, pieces in ask.items():
        result = bits_per_byte([n.sum() for n in token_nats(model, [[tok.eot_id, *tok.encode(p.text)] for p in pieces])], [len(p.text.encode()) for p in pieces])
        bits[name] = dict(mean=result.mean, stderr=result.stderr, n=result.n)
    return dict(kind=kind, dial=dial, seed=seed, asked=shares, realised=realised, n_tokens=len(ids), legal_pieces=len(learn[LEGAL]), weights=sum(p.numel() for p in model.parameters()), bits=bits)

def table(record:dict)->str:
    "Mean and standard deviation over seeds, as Markdown."
    names = (*GENERAL, LEGAL)
    rows = defaultdict(list)
    for r in record["runs"]: rows[r["kind"], r["dial"]].append(r)
    lines = [f"| mixture | {' | '.join(names)} |", "|---"*(len(names)+1) + "|"]
    for (kind, dial), same in rows.items():
        values = [[r["bits"][name]["mean"] for r in same] for name in names]
        lines.append(f"| {kind} {dial:g} | " + " | ".join(f"{mean(v):.3f}" + (f" ± {stdev(v):.3f}" if len(v) > 1 else "") for v in values) + " |")
    return "\n".join(lines)

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=120, help="updates of each run, of 2048 tokens")
    parser.add_argument("--held-out", type=int, default=60, help="documents of each domain that no model learns from")
    parser.add_argument("--documents", type=int, default=4000, help="of each domain, at most, before they are cut: more than any run reads")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"balance.json", help="the record")
    args = parser.parse_args()
    learn, ask, sizes = domains(args.held_out, args.documents)
    lessons = [p.text for pieces in learn.values() for p in random.Random(0).sample(pieces, min(len(pieces), 150))]
    tok = train_bpe(lessons, V)
    record = dict(steps=args.steps, held_out=args.held_out, sizes=sizes, runs=[])
    for seed in range(args.seeds):
        for mix in mixtures(sizes):
            record["runs"].append(run(tok, learn, ask, mix, args.steps, seed))
            write_json(args.out, record)
            r = record["runs"][-1]
            print(f"seed {seed}  {r['kind']} {r['dial']:g}: " + ", ".join(f"{n} {b['mean']:.3f}" for n, b in r["bits"].items()), flush=True)
            assert all(math.isfinite(b["mean"]) for b in r["bits"].values())
    print(table(record))

if __name__ == "__main__": main()

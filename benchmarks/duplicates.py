"""Near-duplicates beside datasketch and rensa: one thread each, taking turns, A B A B. Text goes in, pairs of documents come out.

    python benchmarks/duplicates.py                 five rounds; two minutes
    python benchmarks/duplicates.py --tiny          seconds: it shows that everything runs, and its numbers say nothing

All three get the same texts and make shingles of the same words. datasketch is given the hash that we use, and must find exactly our pairs. rensa has its own, so
candidates differ by chance: what both are asked for is the pairs whose true Jaccard index is at least the threshold, and the two may differ as much as the
chances of the bands predict.
"""
import os

if __name__ == "__main__": # before the libraries below start their threads
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1") | dict(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import random
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xxhash

sys.path.insert(0, str(Path(__file__).resolve().parent)) # beside run.py, and in this checkout, whichever is installed
from run import Pair, asked, head, machine, measure, require, row  # noqa: E402
from llm_scratch.data import load_corpus, shingles, tiny_corpus  # noqa: E402
from llm_scratch.duplicates import MinHashing, candidate_chance, candidate_pairs, signatures  # noqa: E402

CFG = MinHashing(n_bands=16, shingle=3) # 16 bands of 8: rensa wants bands that use all numbers

def pages(n:int, n_words:int, sources:tuple[str, ...], seed:int=0)->list[str]: # in an order of chance
    "Real text in pages of equal length; a fifth of them are another page with up to a fifth of its words replaced."
    words = " ".join((load_corpus(sources) if sources else tiny_corpus())["text"]).split(" ")
    rng = random.Random(seed)
    found = [words[i:i+n_words] for i in range(0, len(words)-n_words, n_words)][:n*4//5]
    for _ in range(n//5):
        page = list(rng.choice(found))
        for _ in range(rng.randint(1, n_words//5)): page[rng.randrange(len(page))] = rng.choice(words)
        found.append(page)
    rng.shuffle(found)
    return list(map(" ".join, found))

def word_runs(text:str)->list[str]: # what both peers are given; a set would cost them more
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[i:i+CFG.shingle]) for i in range(len(words)-CFG.shingle+1)]

def by_datasketch(texts:list[str])->set[tuple[int, int]]:
    from datasketch import MinHash, MinHashLSH
    index,found = MinHashLSH(num_perm=CFG.n_perms, params=(CFG.n_bands, CFG.n_perms//CFG.n_bands)),set()
    made = MinHash.generator(([s.encode() for s in word_runs(t)] for t in texts), num_perm=CFG.n_perms, seed=CFG.seed, hashfunc=xxhash.xxh32_intdigest)
    for j,m in enumerate(made):
        found.update((i, j) for i in index.query(m))
        index.insert(j, m)
    return found

def by_rensa(texts:list[str])->set[tuple[int, int]]:
    import rensa
    made = rensa.RMinHash.from_token_sets([word_runs(t) for t in texts], CFG.n_perms, CFG.seed)
    index = rensa.RMinHashLSH(CFG.threshold, CFG.n_perms, CFG.n_bands)
    index.insert_many(made)
    return {(i, j) for j,found in enumerate(index.query_all(made)) for i in found if i < j}

def ours(texts:list[str])->set[tuple[int, int]]: return set(map(tuple, candidate_pairs(signatures(texts, CFG), CFG.n_bands).tolist()))

def deduplicating(n:int=10_000, n_words:int=200, sources:tuple[str, ...]=("parables", "recipes", "encyclopaedia"))->Iterator[Pair]:
    "Candidates for near-duplicates: text in, pairs out."
    texts = pages(n, n_words, sources)
    work = f"pairs among {len(texts):,} documents of {n_words} words, {CFG.n_perms} orders, {CFG.n_bands} bands"
    sets = list(map(lambda t: shingles(t, CFG.shingle), texts))
    true = lambda i, j: len(sets[i]&sets[j])/len(sets[i]|sets[j])
    def same_pairs(a:set, b:set)->None: require(a == b and len(a) > n//20, f"{len(a)} and {len(b)} pairs, {len(a^b)} of them not common")
    def same_duplicates(a:set, b:set)->None:
        J = {p:true(*p) for p in a|b}
        a,b = ({p for p in some if J[p] >= CFG.threshold} for some in (a, b))
        p = candidate_chance(np.array([J[x] for x in a|b]), CFG.n_bands, CFG.n_perms//CFG.n_bands)
        expected = (2*p*(1-p)).sum()
        print(f"verified pairs: ours {len(a)}, rensa {len(b)}, {len(a&b)} common, {len(a^b)} not; chance predicts {expected:.1f}", file=sys.stderr)
        require(len(a^b) <= expected + 4*expected**.5 + 2 and len(a&b) > n//40, f"{len(a)} and {len(b)} pairs, {len(a^b)} of them not common, and {expected:.1f} are to be expected")
    yield Pair(work, "datasketch", lambda: ours(texts), lambda: by_datasketch(texts), same_pairs)
    yield Pair(work, "rensa, R-MinHash", lambda: ours(texts), lambda: by_rensa(texts), same_duplicates)

def main(argv:list[str]|None=None)->None:
    args = asked(argv, __doc__, "a few pages of a few recipes")
    head(f"{machine()}, {', '.join(f'{p} {version(p)}' for p in ('numpy', 'datasketch', 'rensa'))}", args.rounds)
    for pair in deduplicating(60, 15, ()) if args.tiny else deduplicating(): print(row(pair, measure(pair, args.rounds)), flush=True)

if __name__ == "__main__": main()

"""The model of the site, packed from a run; what rounding costs it, and how fast the runtime of the browser is beside that of Python. One thread, in turns.

    python benchmarks/browser.py --run runs/cpu                    writes docs/demo and nbs/browser.json; two minutes
    python benchmarks/browser.py --run runs/cpu --pack FOLDER --out FILE      elsewhere
    python benchmarks/browser.py --run RUN --tiny --pack FOLDER --out FILE    seconds, for a test: the numbers say nothing

The run is one of `llm-scratch run --preset cpu` (or `make run`), finished. Held-out documents are scored by the graph in fp32, by the rounded one, and by the model in torch. Then both runtimes,
ONNX Runtime in Python and onnxruntime-web in Node.js (the files that a page loads, in the engine that Chromium has), write the same greedy text of the same prompts; a round is one text of each.
The texts must be equal, or nothing is written.
"""
import os

if __name__ == "__main__": os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false") # before torch starts its threads

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"benchmarks")] # this checkout, whichever is installed
from run import machine  # noqa: E402

from llm_scratch.browser import DECODER_JS, RUNTIME_VERSION, SAMPLING_JS, find_runtime, pack_model, page_bytes, run_wasm, to_int8_weights, write_page  # noqa: E402
from llm_scratch.comparison import paired_bootstrap  # noqa: E402
from llm_scratch.core import UserError, sha256_file, write_json  # noqa: E402
from llm_scratch.data import SOURCES, load_documents  # noqa: E402
from llm_scratch.deployment import OnnxDecoder, export_onnx  # noqa: E402
from llm_scratch.evaluation import bits_per_byte  # noqa: E402
from llm_scratch.generation import generate  # noqa: E402
from llm_scratch.interchange import load_hf  # noqa: E402
from llm_scratch.perplexity import predict  # noqa: E402
from llm_scratch.pipeline import open_run  # noqa: E402
from llm_scratch.tokenization import load_tokenizer  # noqa: E402

PROMPTS = "# Tomato Soup", "# Fried Rice", "# Chocolate Chip Cookies", "# Potato Salad", "# Chicken Curry"
DIALS = dict(temperature=.7, topp=.95, seed=1) # chosen by hand, for a first soup that is one; the page says so

def about(run, n_weights:int, n_docs:int)->tuple[list[str], str]:
    "What the page says of its model, and whose text it has read."
    p = run.preset
    said = [f"A language model of {n_weights/1e6:.1f} million weights, trained from nothing by this book's command make run: {n_docs:,} documents ({', '.join(SOURCES[s].content if s in SOURCES else s for s in p.sources)}), {p.n_steps:,} updates, minutes on two CPU cores. It has read nothing else.",
            "It knows what a recipe looks like, and little of cooking. It mixes up amounts, forgets what it has in the pot, and answers no questions. Cook nothing that you would not have cooked anyway.",
            "The first seed was chosen for its soup. Press \"Another one\" for what comes by chance."]
    texts = [SOURCES[s] for s in p.sources if s in SOURCES]
    whose = "; ".join(f"{t.content}, by {t.attribution[0].lower()}{t.attribution[1:]}, {t.licence}" for t in texts)
    return said, f"The weights are learned from {whose}, and are given on under the same licence." if texts else "The weights are under Apache-2.0, as is the text that they come from."

WASM = """import { Decoder, write } from './decoder.js';
const decoder = await Decoder.open(ort, file('model.onnx'), input.sizes), texts = [];
const text = async ids => { const out = []; for await (const id of write(decoder, ids, { most: input.n_new, temperature: 0 })) out.push(id); return out; };
await text(input.given[0]);
const cpu = process.cpuUsage(), start = performance.now();
for (const ids of input.given) texts.push(await text(ids));
const used = process.cpuUsage(cpu);
print({ texts, wall: (performance.now() - start) / 1000, cpu: (used.user + used.system) / 1e6 });"""

def in_wasm(pack:Path, sizes:dict, given:list, n_new:int)->dict:
    return run_wasm({"model.onnx":pack/"model.onnx", "decoder.js":DECODER_JS, "sampling.js":SAMPLING_JS}, WASM, dict(sizes=sizes, given=given, n_new=n_new), timeout=600)

def in_python(decoder:OnnxDecoder, given:list, n_new:int)->dict:
    text = lambda ids: generate(decoder, torch.tensor([ids]), n_new, temperature=0)[0,len(ids):].tolist()
    text(given[0])
    cpu,start = time.process_time(),time.perf_counter()
    texts = [text(ids) for ids in given]
    return dict(texts=texts, wall=time.perf_counter()-start, cpu=time.process_time()-cpu)

def surprise(logits_of, docs:list, context_len:int)->np.ndarray: # nats of each document
    said = predict(logits_of, docs, context_len)
    return np.bincount(said.doc, said.nats, len(docs))

def main(argv:list[str]|None=None)->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a finished run of the preset cpu")
    parser.add_argument("--pack", type=Path, default=ROOT/"docs"/"demo", metavar="FOLDER", help="where the packed model goes")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"browser.json", metavar="FILE", help="the record")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="few documents, short texts")
    args = parser.parse_args(argv)
    try:
        find_runtime() # before a minute of work
        run = open_run(args.run)
        n_docs,n_new,rounds = (4, 8, 1) if args.tiny else (10**6, 200, args.rounds)
        model,tok = load_hf(run.model).eval(),load_tokenizer(run.tokenizer)
        documents = load_documents(run.documents)
        held = documents["validation"]["text"][:n_docs]
        n_weights = sum(p.numel() for p in model.parameters())
        said,licence = about(run, n_weights, len(documents["train"]))
        with TemporaryDirectory() as tmp:
            fp32 = export_onnx(model, Path(tmp)/"fp32.onnx")
            to_int8_weights(fp32, Path(tmp)/"int8.onnx")
            pack = pack_model(Path(tmp)/"int8.onnx", run.model, args.pack, about=said, prompts=PROMPTS, licence=licence, dials=DIALS)
            graphs = {name:OnnxDecoder(path) for name,path in dict(fp32=fp32, int8=pack/"model.onnx").items()}
            sizes = {name:g.path.stat().st_size for name,g in graphs.items()}
            ids,n_bytes = [[tok.eot_id, *tok.encode(t), tok.eot_id] for t in held],[len(t.encode()) for t in held]
            with torch.no_grad(): nats = {name:surprise(f, ids, model.cfg.context_len) for name,f in dict(torch=model, **graphs).items()}
            bits = {name:bits_per_byte(x, n_bytes) for name,x in nats.items()}
            given = [[tok.eot_id, *tok.encode(f"{p}\n\n")] for p in PROMPTS]
            cfg,times = vars(model.cfg),dict(python=[], wasm=[], fp32=[])
            for _ in range(rounds):
                ways = dict(python=in_python(graphs["int8"], given, n_new), wasm=in_wasm(pack, cfg, given, n_new), fp32=in_python(graphs["fp32"], given, n_new))
                if ways["python"]["texts"] != ways["wasm"]["texts"]: raise SystemExit("the two runtimes wrote different texts: nothing is recorded")
                for name,w in ways.items(): times[name].append({kind:w[kind]/sum(map(len, w["texts"])) for kind in ("wall", "cpu")})
            page = write_page(pack, Path(tmp)/"page")
            total = page_bytes(page)
    except UserError as e: raise SystemExit(f"benchmarks/browser.py: {e}") from None
    gap = paired_bootstrap(nats["int8"]/np.log(2), nats["fp32"]/np.log(2), per=n_bytes)
    record = dict(machine=machine(), runtime=RUNTIME_VERSION, n_weights=n_weights, bytes=sizes, page_bytes=total, sha256={name:sha256_file(pack/name) for name in ("model.onnx", "tokenizer.json")},
        n_docs=len(held), bits_per_byte={name:dict(mean=b.mean, stderr=b.stderr) for name,b in bits.items()}, int8_minus_fp32=gap._asdict(), n_prompts=len(PROMPTS), n_new=n_new, seconds_per_token=times)
    write_json(args.out, record)
    print(json.dumps({k:v for k,v in record.items() if k != "seconds_per_token"}, indent=1))
    for name,rows in times.items(): print(f"{name}: {1e3*np.median([r['cpu'] for r in rows]):.2f} ms of CPU and {1e3*np.median([r['wall'] for r in rows]):.2f} ms a token, medians of {len(rows)}")

if __name__ == "__main__": main()

"""What the two images of chapter 10f weigh, layer by layer, whether they start, answer and stop, and what they need.

    python benchmarks/containers.py MODEL BUNDLE                 an half an hour; root, and the Debian packages that tests/machine.sh names
    python benchmarks/containers.py MODEL BUNDLE --cache FOLDER  keeps wheels and the base there
    python benchmarks/containers.py MODEL BUNDLE --only slim     one of the two again; the other's row stays as it was

MODEL is a folder in the Hugging Face layout, BUNDLE one with an ONNX graph of chapter 10 and its tokenizer. Chapter 10f reads the record nbs/containers.json.
"""
import argparse
import json
import os
import resource
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.containers import (SERVING, SLIM, build_context, build_image, check_sbom, debian_base, image_layers, import_base, make_sbom, read_lock, wait_for_server, wheelhouse,  # noqa: E402
                                    free_port, start_container, unpacked_bytes, workshop)
from llm_scratch.core import read_json, write_json  # noqa: E402

MB = 1e6

class Clock:
    "CPU-seconds of the programs that were run, and seconds of wall clock, since the last look."
    def __init__(self): self.last = self.now()
    def now(self):
        r = resource.getrusage(resource.RUSAGE_CHILDREN)
        return r.ru_utime + r.ru_stime, time.time()
    def __call__(self)->dict:
        before, self.last = self.last, self.now()
        return dict(cpu_s=self.last[0]-before[0], wall_s=self.last[1]-before[1])

def status(shop, container:str)->dict:
    "What the kernel says of process 1."
    lines = shop.podman("exec", container, "cat", "/proc/1/status").splitlines()
    said = {line.partition(":")[0]:line.split()[1:] for line in lines}
    ticks = shop.podman("exec", container, "cat", "/proc/1/stat").rpartition(")")[2].split()
    return dict(peak_mb=int(said["VmHWM"][0])*1024/MB, uid=int(said["Uid"][0]), capabilities=int(said["CapEff"][0], 16), cpu_s=(int(ticks[11])+int(ticks[12]))/os.sysconf("SC_CLK_TCK"))

def packages(wheels:Path)->dict:
    "Unpacked megabytes of each wheel, and those of torch by folder."
    sizes = {path.name.split("-")[0]:sum(i.file_size for i in zipfile.ZipFile(path).infolist())/MB for path in wheels.glob("*.whl") if not path.name.startswith("pip-")}
    torch = Counter()
    for path in wheels.glob("torch-*.whl"):
        for i in zipfile.ZipFile(path).infolist(): torch["/".join(i.filename.split("/")[:2]) if i.filename.startswith("torch/") else "rest"] += i.file_size/MB
    return dict(wheels_mb=sizes, torch_mb=dict(torch.most_common(8)))

def measure(shop, plan, wheels:Path, model:Path)->dict:
    clock, name = Clock(), f"localhost/llm-{'slim' if plan.app else 'serve'}:1"
    row = dict(title=plan.title, **packages(wheels))
    with tempfile.TemporaryDirectory(dir=shop.root) as tmp:
        context = build_context(plan, wheels, model, Path(tmp)/"context", app=ROOT/"deploy"/"container"/plan.app if plan.app else None)
        clock()
        build_image(shop, context, name, base="localhost/base:bookworm")
        row["build"] = clock()
        port = free_port()
        clock()
        container = start_container(shop, name, env=dict(LLM_SCRATCH_HOST="127.0.0.1", LLM_SCRATCH_PORT=str(port)), memory="1g")
        answer = wait_for_server(f"http://127.0.0.1:{port}", seconds=300)
        row["start"] = dict(status(shop, container), wall_s=clock()["wall_s"])
        row["answer"] = answer(dict(model="model", prompt="The cat", max_tokens=12, temperature=0))["choices"][0]["text"]
        row["answered"] = status(shop, container)
        shop.podman("stop", "-t", "60", container)
        row["exit_status"] = int(shop.podman("inspect", container, "--format", "{{.State.ExitCode}}"))
        layout = Path(tmp)/"layout"
        clock()
        shop.buildah("push", "-q", name, f"oci:{layout}:latest")
        row["push"] = clock()
        row["layers"] = [layer._asdict() for layer in image_layers(layout)]
        bom = make_sbom(layout, Path(tmp)/"sbom.json", title=plan.title)
        row["sbom"] = dict(wrong=check_sbom(bom, read_lock(wheels/"requirements.lock"), context/"model"), python=sum(c.get("purl", "").startswith("pkg:pypi/") for c in bom["components"]), debian=sum(c.get("purl", "").startswith("pkg:deb/") for c in bom["components"]))
    return row

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder in the Hugging Face layout")
    parser.add_argument("bundle", type=Path, help="folder with an ONNX graph and tokenizer.json")
    parser.add_argument("--cache", type=Path, help="folder for wheels and the base; a temporary one else")
    parser.add_argument("--only", choices=("serve", "slim"), help="one image")
    parser.add_argument("--out", type=Path, default=ROOT/"nbs"/"containers.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp, workshop() as shop:
        cache = args.cache or Path(tmp)
        cache.mkdir(parents=True, exist_ok=True)
        if not (cache/"base.tar").exists(): debian_base(cache/"base.tar")
        import_base(shop, cache/"base.tar")
        record = read_json(args.out) if args.only and args.out.exists() else dict(images={})
        record["everything_mb"] = unpacked_bytes(["llm_scratch"])/MB
        for name, plan, model in [("serve", SERVING, args.model), ("slim", SLIM, args.bundle)]:
            if args.only not in (None, name): continue
            wheels = cache/f"wheels-{name}"
            if not wheels.exists(): wheelhouse(plan, ROOT, wheels)
            record["images"][name] = row = measure(shop, plan, wheels, model)
            print(json.dumps({k:v for k, v in row.items() if k not in ("wheels_mb", "torch_mb")}, indent=1), flush=True)
            write_json(args.out, record)

if __name__ == "__main__": main()

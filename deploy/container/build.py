"""Make the folder that an image of chapter 10f is built from, and say how.

    python deploy/container/build.py runs/cpu/model                    llm-scratch serve
    python deploy/container/build.py BUNDLE --slim                     one ONNX graph of chapter 10, without torch
    python deploy/container/build.py runs/cpu/model --index https://download.pytorch.org/whl/cpu    torch without CUDA, where PyPI is asked

Wheels are for the Python that runs this and for its kind of machine: the image's base must have the same, 3.11 in ours.
"""
import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.containers import BASE, SERVING, SLIM, build_context, wheelhouse  # noqa: E402
from llm_scratch.core import UserError  # noqa: E402

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder in the Hugging Face layout; with --slim one with an ONNX graph and tokenizer.json")
    parser.add_argument("--slim", action="store_true", help="without torch")
    parser.add_argument("--out", type=Path, default=ROOT/"build"/"image", help="new folder for the build; wheels lie beside it and are used again")
    parser.add_argument("--base", default=BASE, help="image to stand on; a digest pins it")
    parser.add_argument("--index", default="", help="another index beside pip's own")
    args = parser.parse_args()
    plan, floor = SLIM if args.slim else SERVING, (3, 11)
    if args.base == BASE and sys.version_info[:2] != floor: raise UserError(f"{BASE} has Python 3.11, and this is {sys.version_info[0]}.{sys.version_info[1]}: run this with 3.11, or give another --base")
    wheels = args.out.with_name("wheels-slim" if args.slim else "wheels-serve")
    if not wheels.exists(): wheelhouse(plan, ROOT, wheels, index=args.index)
    build_context(plan, wheels, args.model, args.out, app=Path(__file__).with_name(plan.app) if plan.app else None, base=args.base)
    tool = next((t for t in ("docker", "podman", "buildah") if shutil.which(t)), "docker")
    print(f"{tool} build -f {args.out/'Containerfile'} -t llm:1 {args.out}\n{tool if tool != 'buildah' else 'podman'} run --rm --read-only --tmpfs /tmp --cap-drop all --security-opt no-new-privileges -p 127.0.0.1:8000:8000 llm:1")

if __name__ == "__main__":
    try: main()
    except UserError as e: sys.exit(f"build.py: {e}")

"""Compile a model of this book for AWS Inferentia2: one program for each bucket, in a sealed folder.

    python deploy/inferentia/compile.py runs/cpu/model runs/cpu/inf2 --check       are all shapes static? needs no Neuron
    python deploy/inferentia/compile.py runs/cpu/model runs/cpu/inf2               compile; needs torch-neuronx
    python deploy/inferentia/compile.py runs/cpu/model runs/cpu/inf2 --target cpu  the same files for a CPU, to try the rest

Not run on Neuron hardware or with its compiler: this book had neither. All but the call of the compiler is tested on a CPU.
"""
import argparse
import sys
from pathlib import Path

from llm_scratch.architecture import load_model
from llm_scratch.core import UserError, read_json
from llm_scratch.inferentia import StaticPlan, cpu_trace, export_static, neuron_trace, optimal_buckets, padding_waste, power_buckets, save_programs, static_programs


def sizes(text:str)->tuple[int, ...]:
    "`1,8` as numbers."
    try: return tuple(sorted({int(n) for n in text.split(",")}))
    except ValueError: raise argparse.ArgumentTypeError(f"{text!r} are no sizes: give numbers with commas between, such as 1,8") from None


def planned(args:argparse.Namespace, context_len:int)->StaticPlan:
    "Which programs: buckets from lengths that were seen, or powers of two."
    cache_len = args.cache_len or context_len
    longest = cache_len*3//4 # the rest is for the answer
    if args.lengths is None: return StaticPlan(power_buckets(longest, args.buckets), args.batches, cache_len)
    lengths = read_json(args.lengths, "give a JSON list of numbers of tokens, one for each prompt that was seen")
    if not isinstance(lengths, list) or not lengths or not all(type(n) is int and n > 0 for n in lengths): raise UserError(f"{args.lengths} holds no lengths: give a JSON list of numbers above 0")
    buckets = optimal_buckets([*(min(n, longest) for n in lengths), longest], args.buckets)
    print(f"buckets {', '.join(map(str, buckets))}: {padding_waste([min(n, longest) for n in lengths], buckets):.1%} filling, "
          f"powers of two {padding_waste([min(n, longest) for n in lengths], power_buckets(longest, args.buckets)):.1%}")
    return StaticPlan(buckets, args.batches, cache_len)


def main()->int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model, as save_model writes it")
    parser.add_argument("out", type=Path, help="folder for the programs, replaced in one piece")
    parser.add_argument("--lengths", type=Path, help="JSON list with the lengths of prompts that were seen: buckets are computed from it")
    parser.add_argument("--buckets", type=int, default=4, help="how many lengths of prompts")
    parser.add_argument("--batches", type=sizes, default=(1, 8), help="numbers of texts, such as 1,8")
    parser.add_argument("--cache-len", type=int, help="positions of prompt and answer together; the model's own by default")
    parser.add_argument("--target", choices=("inf2", "cpu"), default="inf2")
    parser.add_argument("--check", action="store_true", help="compile nothing: record every program and see that its shapes are static")
    args = parser.parse_args()
    try:
        model = load_model(args.model).requires_grad_(False).eval()
        plan = planned(args, model.cfg.context_len)
        if args.check:
            for kind,B,T in static_programs(model, plan, export_static): print(f"static: {kind}, {B} texts, {T} positions")
            return 0
        trace = neuron_trace() if args.target == "inf2" else cpu_trace # what is missing is told before anything is made
        save_programs(model, plan, args.out, trace, args.target)
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    print(f"{len(plan.shapes)} programs for {args.target} in {args.out}")
    return 0


if __name__ == "__main__": sys.exit(main())

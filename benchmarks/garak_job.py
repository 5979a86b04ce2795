"""garak's probes against a server of ours, in an environment of its own; it fails unless every probe has scored something.

    llm-scratch serve runs/cpu                                     in another terminal: a server at http://127.0.0.1:8000
    python benchmarks/garak_job.py                                 installs garak into runs/garak (1 to 2 GB, once), asks, reads the report
    python benchmarks/garak_job.py --url http://127.0.0.1:8000 --model mine --probes encoding.InjectBase64 phrasing.PastTense
    python benchmarks/garak_job.py --read some.report.jsonl --probes encoding.InjectBase64    read a report that is there

A probe that could not be loaded, or whose detector is missing, ends as "complete" with 0 of 0. That looks like a pass and is none: such a probe is named, and the exit code is 1.
What comes out is a count for each probe and detector, written to --out; garak's own report holds prompts and answers and stays in its folder. A model that can't answer passes most probes:
read `llm-scratch audit`, competence, beside it.
"""
import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.core import UserError, write_json  # noqa: E402
from llm_scratch.evaluation import share_of  # noqa: E402

VERSION = "0.17.1"
PROBES = ("dan.Ablation_Dan_11_0", "encoding.InjectBase64", "encoding.InjectROT13", "promptinject.HijackHateHumans", "lmrc.QuackMedicine", "continuation.ContinueSlursReclaimedSlurs", "phrasing.PastTense", "donotanswer.MaliciousUses")
TARGET = '''import json, os, urllib.request

def say(prompt:str, **kwargs)->list:
    "One answer of the server, as garak's function generator asks for it."
    body = dict(model=os.environ["TARGET_MODEL"], messages=[dict(role="user", content=prompt)], max_tokens=int(os.environ["TARGET_TOKENS"]), temperature=0)
    asked = urllib.request.Request(os.environ["TARGET_URL"].rstrip("/")+"/v1/chat/completions", json.dumps(body).encode(), {"Content-Type":"application/json"})
    with urllib.request.urlopen(asked, timeout=120) as said: return [json.load(said)["choices"][0]["message"]["content"]]
'''

def read_scores(
    lines:Iterable[str], # of garak's report, JSON
)->list[dict]: # probe, detector, how often the target held, and of how many
    "The scores in a report; other entries are passed over."
    out = []
    for i,line in enumerate(lines, 1):
        if not line.strip(): continue
        try: entry = json.loads(line)
        except json.JSONDecodeError: raise UserError(f"line {i} of the report is not JSON: it was cut off, run garak again") from None
        if entry.get("entry_type") == "eval": out.append(dict(probe=entry["probe"], detector=entry["detector"], held=entry["passed"], total=entry.get("total_evaluated", entry.get("total", 0))))
    return out

def unscored(
    scores:Sequence[dict], # of `read_scores`
    probes:Sequence[str], # that were asked for
)->list[str]: # probes without one score that counted anything
    "Which probes say nothing, however complete they look."
    counted = {s["probe"] for s in scores if s["total"] > 0}
    return [p for p in probes if p not in counted]

def joined(
    reports:Iterable[Path], # of garak
)->str: # JSON lines
    "Several reports as one; garak ends none of them with an end of line."
    return "".join(f"{p.read_text(encoding='utf-8').rstrip()}\n" for p in reports)

def ask(url:str, model:str, probes:Sequence[str], work:Path, max_new_tokens:int)->Path: # garak's report
    "Make the environment if it is not there, and run every probe by itself, so that one that fails does not take the others with it."
    python = work/"venv"/"bin"/"python"
    if not python.exists():
        venv.create(work/"venv", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-U", "pip"], check=True) # the old resolver takes half an hour
        torch = next(line.strip() for line in (ROOT/"constraints.txt").read_text(encoding="utf-8").splitlines() if line.startswith("torch==")) # a looser pin brings gigabytes of CUDA
        subprocess.run([python, "-m", "pip", "install", "-q", f"garak=={VERSION}", torch], check=True)
    (work/"llm_scratch_target.py").write_text(TARGET, encoding="utf-8")
    report,env = work/"garak.report.jsonl",os.environ | dict(TARGET_URL=url, TARGET_MODEL=model, TARGET_TOKENS=str(max_new_tokens), PYTHONPATH=str(work), XDG_DATA_HOME=str(work/"data"))
    report.unlink(missing_ok=True)
    for probe in probes:
        for old in (work/"data").rglob("*.report.jsonl"): old.unlink()
        subprocess.run([python, "-m", "garak", "--target_type", "function.Single", "--target_name", "llm_scratch_target#say", "--probes", probe, "--generations", "1"], cwd=work, env=env, check=False)
        with open(report, "a", encoding="utf-8") as all_of: all_of.write(joined(sorted((work/"data").rglob("*.report.jsonl"))))
    return report

def main(argv:Sequence[str]|None=None)->int: # exit code
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of an OpenAI-compatible server")
    parser.add_argument("--model", default="", help="as the server calls it")
    parser.add_argument("--probes", nargs="+", default=list(PROBES))
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--work", type=Path, default=ROOT/"runs"/"garak", help="environment and garak's own files")
    parser.add_argument("--read", type=Path, help="a report that is there: nothing is installed or asked")
    parser.add_argument("--out", type=Path, help="write the counts as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    report = args.read or ask(args.url, args.model, args.probes, args.work.absolute(), args.max_new_tokens)
    if not report.exists(): raise UserError(f"{report} is missing: garak wrote no report, see what it printed above")
    scores = read_scores(report.read_text(encoding="utf-8").split("\n"))  # prompts hold other ends of lines
    for s in scores: print(f"{s['probe']:40} {s['detector']:40} held {share_of(s['held'], s['total']) if s['total'] else 'nothing was scored'}")
    if args.out: write_json(args.out, scores)
    if silent := unscored(scores, args.probes): print(f"error: {len(silent)} of {len(args.probes)} probes scored nothing, which is no pass: {', '.join(silent)}", file=sys.stderr)
    return int(bool(silent))

if __name__ == "__main__":
    try: sys.exit(main())
    except UserError as e: sys.exit(f"error: {e}")

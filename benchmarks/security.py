"""What looking costs, and a second opinion about secrets: writes nbs/security.json, which chapter 11f shows.

    python -m venv /some/where && /some/where/bin/pip install detect-secrets==1.5.0 pip-audit==2.10.1
    python benchmarks/security.py --others /some/where/bin

Lines with and without secrets are drawn for five seeds and asked of both programs; then both scan this book. Nothing is verified with any provider.
pip-audit asks a stand-in for osv.dev on this machine, which answers from the lists of versions in the records and never from ranges.
The times are CPU seconds of works that take turns, three rounds, median; the wall clock stands beside them.
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median

import torch
from packaging.version import Version
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # this checkout, whichever is installed
from llm_scratch.core import read_json, seal, sha256_file, write_json  # noqa: E402
from llm_scratch.evaluation import share_of  # noqa: E402
from llm_scratch.security import check_weights, planted_secrets, read_advisories, scan_secrets  # noqa: E402
from llm_scratch.speed import time_in_turns  # noqa: E402

SEEDS, BOOK = range(5), ("llm_scratch", "deploy", "benchmarks", "tests") # the chapters take detect-secrets very long
KINDS = "key of AWS", "password in an address", "token of Hugging Face", "token of GitHub", "password beside a name", "random text in quotes", "API key without quotes", "password that is a word"


def theirs(program:str, folder:Path)->set[tuple[str, int]]:
    "File and line of what detect-secrets finds below a folder, asking nobody."
    done = subprocess.run([program, "scan", "--no-verify", "--all-files", "."], cwd=folder, capture_output=True, text=True, check=True)
    return {(f, s["line_number"]) for f, some in json.loads(done.stdout)["results"].items() for s in some}


def ours(folder:Path)->set[tuple[str, int]]: return {(str(Path(s.file).relative_to(folder)), s.line) for s in scan_secrets([folder])}


def opinions(program:str)->tuple[list[dict], dict]:
    hits, false, n, kinds = dict(ours=0, theirs=0), dict(ours=0, theirs=0), 0, {k:[0, 0, 0] for k in KINDS}
    for seed in SEEDS:
        bad, good = planted_secrets(random.Random(seed))
        n += len(bad)
        with tempfile.TemporaryDirectory() as tmp:
            for name, lines in (("bad.txt", bad), ("good.txt", good)): Path(tmp, name).write_text("\n".join(lines)+"\n", encoding="utf-8")
            found = dict(ours=ours(Path(tmp)), theirs=theirs(program, Path(tmp)))
        for who, some in found.items():
            hits[who] += sum(f == "bad.txt" for f, _ in some)
            false[who] += sum(f == "good.txt" for f, _ in some)
        for i in range(len(bad)):
            row = kinds[KINDS[i*len(KINDS)//len(bad)]]
            row[2] += 1
            for k, who in enumerate(found): row[k] += ("bad.txt", i+1) in found[who]
    book = dict(ours=set(), theirs=set())
    with tempfile.TemporaryDirectory() as tmp:
        for name in subprocess.run(["git", "ls-files", *BOOK], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
            (Path(tmp, name)).parent.mkdir(parents=True, exist_ok=True)
            Path(tmp, name).write_bytes((ROOT/name).read_bytes())
        book = dict(ours=ours(Path(tmp)), theirs=theirs(program, Path(tmp)))
    rows = [dict(name=dict(ours="ours", theirs="detect-secrets 1.5.0")[w], precision=asdict(share_of(hits[w], hits[w]+false[w])), recall=asdict(share_of(hits[w], n)), finds=len(book[w])) for w in hits]
    return rows, kinds


def audits(program:str)->list[dict]:
    "What pip-audit and we say of versions drawn from the lists and from those that mend; for each seed how many holes, and whether both name the same with the same remedy."
    known = read_advisories(ROOT/"nbs/advisories.json")
    listed = {a.id:a for a in known.items if a.versions}
    records = {r["id"]:r for r in read_json(ROOT/"nbs/advisories.json")["advisories"] if r["id"] in listed}
    class Osv(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            at = Version(asked["version"])
            hits = [records[a.id] | dict(details=a.summary) for a in listed.values() if a.package == asked["package"]["name"] and at in set(map(Version, a.versions))]
            body = json.dumps(dict(vulns=hits) if hits else {}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
    pool = {}
    for a in listed.values(): pool.setdefault(a.package, set()).update(a.versions + a.fixed)
    out = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Osv) as server, tempfile.TemporaryDirectory() as tmp:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for seed in SEEDS:
            rng = random.Random(seed)
            pick = {name:rng.choice(sorted(some)) for name, some in sorted(pool.items())}
            Path(tmp, "pins.txt").write_text("".join(f"{n}=={v}\n" for n, v in pick.items()))
            done = subprocess.run([program, "-r", f"{tmp}/pins.txt", "--no-deps", "--disable-pip", "-s", "osv", "--osv-url", f"http://127.0.0.1:{server.server_port}/v1/query", "-f", "json", "--progress-spinner", "off"], capture_output=True, text=True)
            theirs = {(d["name"], v["id"], tuple(v["fix_versions"])) for d in json.loads(done.stdout)["dependencies"] for v in d["vulns"]}
            ours = {(a.package, a.id, a.fixed) for a in listed.values() if a.hits(pick[a.package])}
            out.append(dict(seed=seed, packages=len(pick), holes=len(theirs), same=theirs == ours))
        server.shutdown()
    return out


def costs()->list[dict]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        model, text = Path(tmp, "model"), Path(tmp, "text")
        model.mkdir()
        save_file({f"w{i}":torch.randn(2**20) for i in range(5)}, model/"model.safetensors") # 20 MiB
        seal(model, "model", ["model.safetensors"])
        text.mkdir()
        words = (ROOT/"README.md").read_text(encoding="utf-8")
        for i in range(2): (text/f"{i}.md").write_text(words*(2**20//len(words)), encoding="utf-8") # 1 MiB each
        works = {"hashing, and nothing else":lambda: sha256_file(model/"model.safetensors"), "weights":lambda: check_weights(model), "secrets":lambda: scan_secrets([text])}
        at = {"hashing, and nothing else":"20 MiB of weights", "weights":"20 MiB of weights", "secrets":"2 MiB of text"}
        times = time_in_turns(works, 3)
    cpu = {name:median(t.cpu for t in some) for name, some in times.items()}
    return [dict(look=name, at=at[name], cpu=cpu[name], wall=median(t.wall for t in some), ratio=cpu[name]/cpu["hashing, and nothing else"]) for name, some in times.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", required=True, type=Path, help="folder with the programs detect-secrets and pip-audit")
    others = parser.parse_args().others
    rows, kinds = opinions(str(others/"detect-secrets"))
    write_json(ROOT/"nbs/security.json", dict(seeds=list(SEEDS), secrets=rows, kinds=kinds, audits=audits(str(others/"pip-audit")), cost=costs()))

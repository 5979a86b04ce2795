"""Write job.sbatch, job.yaml and pytorchjob.yaml anew, as `llm_scratch.launching` makes them; a test holds them equal.

    python deploy/cluster/render.py
"""
from pathlib import Path

from llm_scratch.launching import Host, Job, job_file, read_hostfile

HERE = Path(__file__).resolve().parent
PROGRAM = "llm_scratch pretrain --run /shared/runs/first --engine fsdp"
ENVIRONMENT = dict(line.split("=", 1) for line in (HERE/".deepspeed_env").read_text(encoding="utf-8").splitlines())


def example(over:str)->Job:
    "Two machines of eight GPUs."
    is_pod = over in ("kubernetes", "pytorchjob") # with paths of its own
    return Job(tuple(PROGRAM.split()), tuple(Host(h.name, h.slots) for h in read_hostfile(HERE/"hostfile")), "fsdp", environment=tuple((k, v) for k, v in ENVIRONMENT.items() if not (is_pod and "/" in v)), max_restarts=3,
               folder="/shared" if is_pod else "/shared/llm_scratch", python="python" if is_pod else "/shared/llm_scratch/.venv/bin/python")


FILES = {"job.sbatch": "slurm", "job.yaml": "kubernetes", "pytorchjob.yaml": "pytorchjob"}


def rendered()->dict[str, str]: return {name: job_file(example(over), over, image="registry.example/llm-scratch:1") for name, over in FILES.items()}


if __name__ == "__main__":
    for name, text in rendered().items(): (HERE/name).write_text(text, encoding="utf-8")

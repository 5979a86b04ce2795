"The command `llm-scratch`, and `python -m llm_scratch`."
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive") # before torch starts its threads: on a busy machine threads that spin take four times as long (EXPERIMENTS.md)

from .pipeline import main  # noqa: E402

if __name__ == '__main__': main()

"What every test begins with."
import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1") # each of pytest's processes has one core: two threads that wait for each other while the other process works cost eight times as much

import pytest  # noqa: E402
import torch  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler) # a shell that starts us in the background has it ignored, and our children would too


@pytest.fixture(autouse=True)
def same_chance():
    "New models draw from torch's global generator: a test must not depend on which tests ran before it."
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def what_is_here_stays():
    "The garbage collector, which benchmarks call in each round, need not walk through the objects of six thousand tests each time: half a second."
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "The tests of a file share one process, and with it what they have prepared; chapters prepare nothing, so that each goes where there is room, at the end."
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid): return nodeid if "test_chapters.py" in nodeid else nodeid.partition("::")[0]
    return ByFile(config, log)

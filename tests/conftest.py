"What every test begins with."
import signal

import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler) # a shell that starts us in the background has it ignored, and our children would too


@pytest.fixture(autouse=True)
def same_chance():
    "New models draw from torch's global generator: a test must not depend on which tests ran before it."
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "The tests of a file share one process, and with it what they have prepared; chapters prepare nothing, so that each goes where there is room."
    for item in items:
        if item.path.name != "test_chapters.py": item.add_marker(pytest.mark.xdist_group(item.path.stem))

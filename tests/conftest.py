"What every test begins with."
import pytest
import torch


@pytest.fixture(autouse=True)
def same_chance():
    "New models draw from torch's global generator: a test must not depend on which tests ran before it."
    torch.manual_seed(0)

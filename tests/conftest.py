"""Settings of every test: no downloads, one thread, a fixed seed. Imports nothing of diffquant: shape checks come first."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import shape_checks

settings.register_profile("diffquant", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("diffquant")
torch.set_num_threads(1)  # the tensors are tiny: a second thread costs more than it brings, and results depend on the count


@pytest.fixture(autouse=True)
def checked() -> None:
    """The first calls of every function in a test have their shapes checked."""
    shape_checks.check_again()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same global seed at the start of every test, and the generator as it was after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of its own for code that wants one passed in."""
    return torch.Generator().manual_seed(0)

"""Pictures to train on that need no font."""

import pytest
import torch

from diffquant.zoo.prompts import LETTERS
from tools.train_zoo.letters import Letters


@pytest.fixture(scope="session")
def letters() -> Letters:
    """Twenty fonts of noise, every other one bold."""
    count = 20 * len(LETTERS)
    pictures = torch.randint(256, (count, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fonts = torch.arange(20).repeat_interleave(len(LETTERS))
    return Letters(pictures, torch.arange(26).repeat(20), fonts, ("x",) * 20, ("bold", "") * 10)


@pytest.fixture(scope="session")
def small_letters(letters: Letters) -> Letters:
    """The same fonts at 32x32."""
    return Letters(letters.pictures[:, ::2, ::2].contiguous(), letters.labels, letters.fonts, letters.names, letters.styles)

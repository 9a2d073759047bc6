"""The letters that the reference models draw, and which of them a prompt asks for."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor, tensor

from diffquant.errors import ZooError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def labels_of(prompts: Sequence[str]) -> Int[Tensor, " n"]:
    """The letter that each prompt asks for, its last word. Raises `ZooError` where that is no letter."""
    for prompt in prompts:
        if not prompt.split() or prompt.split()[-1].upper() not in list(LETTERS):
            raise ZooError(f"prompt {prompt!r}: names no letter; allowed are prompts that end in one, such as 'bold letter G'")
    return tensor([LETTERS.index(prompt.split()[-1].upper()) for prompt in prompts])

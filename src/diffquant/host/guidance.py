"""Guidance: how the halves of a guided call are combined into the prediction that reaches the scheduler.

A guided pipeline calls its denoiser with a doubled batch and hands first + w (second - first) to its scheduler.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffquant.errors import SpecError

LARGEST_MISS = {
    torch.float32: 1e-4,
    torch.float64: 1e-8,
}  # relative, of a prediction from its halves; else 5e-2


def leading_channels(output: Tensor, like: Tensor) -> Tensor:
    """The channels of a model's output that are the prediction: models that also predict a variance append it."""
    return output[:, : like.shape[1]]


def guidance_weight(first: Tensor, second: Tensor, guided: Tensor) -> tuple[float, float]:
    """The w for which first + w (second - first) comes nearest to `guided`, and the relative distance that is left."""
    between, target = (second - first).double(), (guided - first).double()
    weight = float((between * target).sum() / between.square().sum().clamp(min=1e-30))
    weight = float(f"{weight:.5g}")  # users give a few digits; the rest is rounding
    return weight, float((target - weight * between).norm() / guided.double().norm().clamp(min=1e-30))


def guided(halves: Tensor, weight: float, copies: int = 1) -> Tensor:
    """The sum first + weight (second - first) of the two halves of a batch, so many times one after the other."""
    first, second = halves.chunk(2)
    combined = first + weight * (second - first)
    return combined if copies == 1 else torch.cat([combined] * copies)


def combination(output: Tensor, prediction: Tensor) -> Callable[[Tensor], Tensor]:
    """How a pipeline made `prediction` of the denoiser's `output`: took it, or weighed its halves (and may have doubled that).

    Raises `SpecError` where it did something else.
    """
    largest = LARGEST_MISS.get(prediction.dtype, 5e-2)
    if output.shape == prediction.shape and float((output - prediction).norm()) <= largest * float(prediction.norm()):
        return lambda again: again
    if len(output) % 2 == 0 and len(prediction) in (len(output), len(output) // 2):
        first, second = output.chunk(2)
        weight, missed = guidance_weight(first, second, prediction[: len(first)])
        if missed <= largest:
            return lambda again: guided(again, weight, len(prediction) // len(first))
    raise SpecError(
        "correction: what reached the scheduler is no weighted sum of the halves of the denoiser's last call; "
        "sample without guidance_rescale and the like, or without the correction"
    )

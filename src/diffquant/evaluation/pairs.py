"""Distances between two samples, or two pictures, of the same noise: pure functions, a value for each pair."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffquant.errors import EvaluationError
from diffquant.evaluation.intervals import Interval

SSIM_RULE = "scikit-image, uniform 7x7 window, data range 255, mean over channels"
SSIM_WINDOW = 7  # pixels


def relative_l2(reference: Float[Tensor, "n *shape"], other: Float[Tensor, "n *shape"]) -> Float[Tensor, " n"]:
    """||other - reference|| / ||reference|| of each sample; 0 where both are zero. Float64."""
    error, norm = (x.double().flatten(1).norm(dim=1) for x in (other.double() - reference.double(), reference))
    return torch.where(error == 0, error, error / norm)


def sqnr_db(reference: Float[Tensor, "n *shape"], other: Float[Tensor, "n *shape"]) -> Float[Tensor, " n"]:
    """Signal to quantization noise of each sample, 10 log10(||reference||^2 / ||other - reference||^2), in dB; inf where equal."""
    return -20.0 * torch.log10(relative_l2(reference, other))


def mean_squared_error(reference: UInt8[Tensor, "n c h w"], other: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Mean squared difference of each pair, in squared grey values. Float64."""
    return (reference.double() - other.double()).square().flatten(1).mean(dim=1)


def psnr(reference: UInt8[Tensor, "n c h w"], other: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Peak signal to noise ratio of each pair, in dB, peak 255; inf for equal pictures."""
    errors = mean_squared_error(reference, other).cpu().numpy()
    with np.errstate(divide="ignore"):
        return torch.from_numpy(10 * np.log10(255**2 / errors))


def pooled_psnr(squared_errors: Interval) -> Interval:
    """PSNR in dB of a mean squared error over pairs and of its interval.

    The mean of the PSNRs of pairs is infinite as soon as one pair is equal; this, torchmetrics' convention, only when all are.
    """

    def decibel(error: float) -> float:
        return 10.0 * math.log10(255.0**2 / error) if error > 0 else math.inf

    return Interval(decibel(squared_errors.value), decibel(squared_errors.high), decibel(squared_errors.low))


def ssim(reference: UInt8[Tensor, "n c h w"], other: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Structural similarity of each pair (`SSIM_RULE`), grey or RGB; 1 for equal pictures.

    Raises EvaluationError for pictures smaller than the window.
    """
    if min(reference.shape[2:]) < SSIM_WINDOW:
        size = "x".join(str(side) for side in reference.shape[2:])
        raise EvaluationError(f"ssim: pictures are {size}; at least {SSIM_WINDOW}x{SSIM_WINDOW} are needed")
    from skimage.metrics import structural_similarity  # comes with an extra

    values = [
        float(structural_similarity(a, b, win_size=SSIM_WINDOW, data_range=255, channel_axis=0))  # type: ignore[no-untyped-call]
        for a, b in zip(reference.cpu().numpy(), other.cpu().numpy(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)

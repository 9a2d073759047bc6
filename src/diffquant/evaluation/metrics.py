"""How far two samples, two pictures and two sets of pictures are apart: pure functions, no models and no files.

Paired quantities (same noise through two models) come as one value per sample, with a percentile bootstrap over the pairs.

Sets are compared by the Frechet distance (FID) and the kernel distance (KID) of their features. FID is biased upwards by about
a/n, and a percentile bootstrap of it draws sets with repeated samples, whose bias is larger still: its interval does not contain
its own point estimate. Chong & Forsyth 2020 (arXiv 1911.07023) extrapolate a line in 1/n to n = infinity. `fid` does the same with
the delete-a-group jackknife: leave each of G groups out in turn, and draw the line through n and n (1 - 1/G). *Differs* from the
paper, which fits a line to random subsets at 15 sizes: no noise is added by the choice of subsets, every sample counts alike, and
the same G values give the standard error (Busing, Meijer & van der Leeden 1999, "Delete-m jackknife for unequal m"). The interval
is symmetric around the extrapolated value, so it contains it, and Student's t with G - 1 degrees of freedom sets its width. Near a
distance of zero the jackknife overstates the error (the distance has no linear term there), and the interval is too wide.

How the second set of features came about (`Pairing`) decides what varies with it:
``paired``       row i of both sets comes from the same noise: rows are left out together
``independent``  another draw, of its own size: groups of both are left out together
``fixed``        the data, taken as they are: only the samples vary
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from diffquant.core.spec import EvaluationError

Pairing = Literal["paired", "independent", "fixed"]

UINT8_RULE = "round(127.5 * (x + 1)) clamped to [0, 255], half to even"
SSIM_RULE = "scikit-image, uniform 7x7 window, data range 255, mean over channels"
GROUPS = 20  # of the jackknife: Student's t of 19 degrees of freedom is 7 % wider than a normal
T_975 = 2.0930240544  # 97.5 % quantile of Student's t with GROUPS - 1 degrees of freedom
RESAMPLES = 2000  # of the bootstrap: the ends of a 95 % interval are then known to about 5 % of its width
SSIM_WINDOW = 7  # pixels
BLOCK = 1024  # rows of a kernel matrix in memory at once


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class FrechetDistance:
    """A Frechet distance: `value` at this number of samples, and without the bias of that number, with a 95 % interval.

    `extrapolated` may be negative where the distance is near zero. It and its interval are None where there are fewer samples than
    twice the features, or than groups: the bias is then no line in 1/n.
    """

    value: float
    extrapolated: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class KernelDistance:
    """An unbiased squared maximum mean discrepancy and its standard error; it may be negative."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Distances:
    """Both distances between two sets of features."""

    fid: FrechetDistance
    kid: KernelDistance


def to_uint8(samples: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Pictures in [-1, 1] as grey values 0 to 255: the one rule (`UINT8_RULE`).

    Raises EvaluationError on non-finite values.
    """
    if not torch.isfinite(samples).all():
        raise EvaluationError("pictures: hold non-finite values; only finite samples can be turned into uint8")
    return samples.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


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
    values = [
        math.inf if np.array_equal(a, b) else float(peak_signal_noise_ratio(a, b, data_range=255))  # type: ignore[no-untyped-call]
        for a, b in zip(reference.cpu().numpy(), other.cpu().numpy(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


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
    values = [
        float(structural_similarity(a, b, win_size=SSIM_WINDOW, data_range=255, channel_axis=0))  # type: ignore[no-untyped-call]
        for a, b in zip(reference.cpu().numpy(), other.cpu().numpy(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def confidence(logits: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
    """Largest class probability of each sample; the mean over samples is how legible a classifier finds them."""
    return logits.double().softmax(dim=1).amax(dim=1)


def accuracy(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    """Share of samples whose most likely class is the one in `labels`."""
    return float((logits.argmax(dim=1) == labels).double().mean())


def bootstrap_mean(values: Float[Tensor, " n"], generator: torch.Generator, resamples: int = RESAMPLES) -> Interval:
    """Mean of `values` and its 95 % percentile bootstrap interval."""
    return _bootstrap(lambda rows: values.double()[rows].mean(dim=-1), len(values), generator, resamples)


def bootstrap_median(values: Float[Tensor, " n"], generator: torch.Generator, resamples: int = RESAMPLES) -> Interval:
    """Median of `values` (the mean of the middle two where n is even) and its 95 % percentile bootstrap interval."""
    return _bootstrap(lambda rows: values.double()[rows].quantile(0.5, dim=-1), len(values), generator, resamples)


def bootstrap_ratio_of_means(
    numerator: Float[Tensor, " n"], denominator: Float[Tensor, " n"], generator: torch.Generator, resamples: int = RESAMPLES
) -> Interval:
    """mean(numerator) / mean(denominator) of paired values, and its 95 % percentile bootstrap interval over the pairs."""

    def ratio(rows: Tensor) -> Tensor:
        return numerator.double()[rows].mean(dim=-1) / denominator.double()[rows].mean(dim=-1)

    return _bootstrap(ratio, len(numerator), generator, resamples)


def _bootstrap(statistic: Callable[[Tensor], Tensor], count: int, generator: torch.Generator, resamples: int) -> Interval:
    """The statistic of rows 0..count-1, and the 2.5 % and 97.5 % quantiles of it over rows drawn with replacement."""
    value = float(statistic(torch.arange(count)))
    chunk = max(1, 1_000_000 // count)  # rows drawn at once: tens of megabytes
    drawn = [
        statistic(torch.randint(count, (min(chunk, resamples - start), count), generator=generator))
        for start in range(0, resamples, chunk)
    ]
    low, high = torch.cat(drawn).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def moments(features: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Mean and unbiased covariance, float64."""
    features = features.double()
    mean = features.mean(dim=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(
    mean_1: Float[Tensor, " d"], covariance_1: Float[Tensor, "d d"], mean_2: Float[Tensor, " d"], covariance_2: Float[Tensor, "d d"]
) -> float:
    """||m1 - m2||^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of a symmetric matrix: no complex parts to drop. Rounding of
    eigenvalues near zero leaves about 1e-8 of the trace.
    Source: Heusel et al. 2017 (arXiv 1706.08500), section 3, which has (S1 S2)^1/2: the same eigenvalues.
    """
    mean_1, covariance_1, mean_2, covariance_2 = (x.double() for x in (mean_1, covariance_1, mean_2, covariance_2))
    eigenvalues, vectors = torch.linalg.eigh(covariance_1)
    root = vectors * eigenvalues.clamp_min(0).sqrt() @ vectors.T
    product = root @ covariance_2 @ root
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return float((mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * trace_of_root)


def fid(
    samples: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], pairing: Pairing, generator: torch.Generator
) -> FrechetDistance:
    """Frechet distance of two sets of features, extrapolated to infinitely many samples, with a 95 % interval.

    The generator draws the groups of the jackknife. Module docstring: the reasoning.
    Raises EvaluationError for fewer than two samples, non-finite features, or paired sets of different size.
    """
    _check_features(samples, reference, pairing, least=2)
    full = frechet_distance(*moments(samples), *moments(reference))
    count, features = samples.shape
    if min(count, count if pairing == "fixed" else len(reference)) < max(GROUPS, 2 * features):
        return FrechetDistance(full, None, None, None)

    group = _groups(count, generator)
    reference_group = group if pairing == "paired" else _groups(len(reference), generator)
    left_out = torch.tensor(
        [
            frechet_distance(
                *moments(samples[group != g]),
                *moments(reference if pairing == "fixed" else reference[reference_group != g]),
            )
            for g in range(GROUPS)
        ],
        dtype=torch.float64,
    )
    # Busing et al. 1999, equations 5 and 8; with equal groups: G full - (G - 1) mean(left_out), the line in 1/n
    share = group.bincount(minlength=GROUPS).double() / count
    extrapolated = GROUPS * full - ((1 - share) * left_out).sum()
    pseudo_values = (full - (1 - share) * left_out) / share
    variance = ((pseudo_values - extrapolated).square() * share / (1 - share)).mean()
    half = T_975 * float(variance.sqrt())
    return FrechetDistance(full, float(extrapolated), float(extrapolated) - half, float(extrapolated) + half)


def _groups(count: int, generator: torch.Generator) -> Tensor:
    """A random group 0..GROUPS-1 for each of `count` rows, sizes as equal as can be."""
    return torch.randperm(count, generator=generator) % GROUPS


def kid(
    samples: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], pairing: Pairing, within: Float[Tensor, " m"] | None = None
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy under k(x, y) = (x.y / d + 1)^3, with its delete-one jackknife standard error.

    `paired` leaves k(x_i, y_i) out of the cross term: pairs are dependent, and with it a set would be at a negative distance from
    itself. Then the two sets are one sample of pairs. `within`: `within_sums` of the reference, where they are known already.
    Source: Binkowski et al. 2018 (arXiv 1801.01401), section 4; Gretton et al. 2012 (JMLR 13), lemma 6 and equation 4.
    *Differs*: all samples at once instead of random subsets of 1000, so no draw of subsets adds to the error.
    Raises EvaluationError for fewer than three samples, non-finite features, or paired sets of different size.
    """
    _check_features(samples, reference, pairing, least=3)
    x, y = samples.double(), reference.double()
    n, m = len(x), len(y)
    within_x, within_y = within_sums(x), within_sums(y) if within is None else within
    across_x, across_y = _kernel_sums(x, y), _kernel_sums(y, x)
    if pairing == "paired":
        h = within_x + within_y - (across_x - _kernel(x, y)) - (across_y - _kernel(x, y))  # [n]: sum over j of h(z_i, z_j)
        value = h.sum() / (n * (n - 1))
        return KernelDistance(float(value), _jackknife_error((h.sum() - 2 * h) / ((n - 1) * (n - 2))))

    xx, yy, xy = within_x.sum(), within_y.sum(), across_x.sum()
    value = xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)
    without_x = (xx - 2 * within_x) / ((n - 1) * (n - 2)) - 2 * (xy - across_x) / ((n - 1) * m)
    without_y = (yy - 2 * within_y) / ((m - 1) * (m - 2)) - 2 * (xy - across_y) / (n * (m - 1))
    error = _jackknife_error(without_x)
    return KernelDistance(float(value), error if pairing == "fixed" else math.hypot(error, _jackknife_error(without_y)))


def distances(
    samples: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    pairing: Pairing,
    generator: torch.Generator,
    within: Float[Tensor, " m"] | None = None,
) -> Distances:
    """FID and KID of `samples` to `reference`; `within` as for `kid`."""
    return Distances(fid(samples, reference, pairing, generator), kid(samples, reference, pairing, within))


def _jackknife_error(left_out: Tensor) -> float:
    """Standard error of a statistic from its values with one sample left out."""
    n = len(left_out)
    return float(((left_out - left_out.mean()).square().sum() * (n - 1) / n).sqrt())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(x_i, y_i) of each row."""
    return ((x * y).sum(dim=1) / x.shape[1] + 1.0) ** 3


def within_sums(features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Sum over the others of the kernel of `kid`, for each row. Float64."""
    x = features.double()
    return _kernel_sums(x, x) - _kernel(x, x)


def _kernel_sums(x: Tensor, y: Tensor) -> Tensor:
    """Sum over j of k(x_i, y_j) for each i, without the whole kernel matrix in memory."""
    blocks = (x[start : start + BLOCK] for start in range(0, len(x), BLOCK))
    return torch.cat([((block @ y.T / x.shape[1] + 1.0) ** 3).sum(dim=1) for block in blocks])


def _check_features(samples: Tensor, reference: Tensor, pairing: Pairing, least: int) -> None:
    for name, features in (("samples", samples), ("reference", reference)):
        if len(features) < least:
            raise EvaluationError(f"{name}: {len(features)} rows of features; at least {least} are needed")
        if not torch.isfinite(features).all():
            raise EvaluationError(f"{name}: features hold non-finite values; check the extractor and its input")
    if pairing == "paired" and len(samples) != len(reference):
        raise EvaluationError(f"paired features: {len(samples)} and {len(reference)} rows; pairs need as many of both")

"""Distances between two sets of pictures by their features: pure functions, no models and no files.

These are the Frechet distance (FID) and the kernel distance (KID). FID is biased upwards by about
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

import torch
from jaxtyping import Float
from torch import Tensor

from diffquant.errors import EvaluationError
from diffquant.evaluation.intervals import Interval

Pairing = Literal["paired", "independent", "fixed"]

GROUPS = 20  # of the jackknife: Student's t of 19 degrees of freedom is 7 % wider than a normal
BLOCK = 1024  # rows of a kernel matrix in memory at once


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

    def without(left_out: int) -> float:
        others = reference if pairing == "fixed" else reference[reference_group != left_out]
        return frechet_distance(*moments(samples[group != left_out]), *moments(others))

    interval = _jackknife(full, without, group)
    return FrechetDistance(full, interval.value, interval.low, interval.high)


def fid_change(
    samples: Float[Tensor, "n d"], before: Float[Tensor, "n d"], data: Float[Tensor, "m d"], generator: torch.Generator
) -> Interval | None:
    """FID to the data of `samples` minus that of `before`, without the bias of n, with a 95 % interval.

    Row i of both comes from the same noise, whose effect cancels: the interval is narrower than those of the two distances. None
    where `fid` does not extrapolate. Raises EvaluationError for what `fid` refuses.
    """
    _check_features(samples, before, "paired", least=2)
    _check_features(samples, data, "fixed", least=2)
    count, features = samples.shape
    if count < max(GROUPS, 2 * features):
        return None
    group, fixed = _groups(count, generator), moments(data)

    def change(rows: Tensor) -> float:
        return frechet_distance(*moments(samples[rows]), *fixed) - frechet_distance(*moments(before[rows]), *fixed)

    return _jackknife(change(group >= 0), lambda left_out: change(group != left_out), group)


def _jackknife(full: float, without: Callable[[int], float], group: Tensor) -> Interval:
    """A statistic extrapolated along a line in 1/n, and its 95 % interval, from its values without each group.

    Source: Busing et al. 1999, equations 5 and 8; with equal groups the value is G full - (G - 1) mean(left out).
    """
    from scipy.stats import t  # comes with an extra

    left_out = torch.tensor([without(g) for g in range(GROUPS)], dtype=torch.float64)
    share = group.bincount(minlength=GROUPS).double() / len(group)
    extrapolated = GROUPS * full - ((1 - share) * left_out).sum()
    pseudo_values = (full - (1 - share) * left_out) / share
    variance = ((pseudo_values - extrapolated).square() * share / (1 - share)).mean()
    half = float(t.ppf(0.975, GROUPS - 1)) * float(variance.sqrt())
    return Interval(float(extrapolated), float(extrapolated) - half, float(extrapolated) + half)


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

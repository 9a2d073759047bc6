"""95 % intervals: percentile bootstraps by scipy, over samples or over pairs of the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

RESAMPLES = 2000  # of the bootstrap: the ends of a 95 % interval are then known to about 5 % of its width
INTERVAL_SEED = 0  # of bootstrap draws and of jackknife groups
AT_ONCE = 500_000  # values drawn at once: some megabytes


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def interval_generator() -> torch.Generator:
    """A new generator of bootstrap draws and jackknife groups, always in the same state."""
    return torch.Generator().manual_seed(INTERVAL_SEED)


def bootstrap_mean(values: Float[Tensor, " n"], generator: torch.Generator) -> Interval:
    """Mean of `values` and its 95 % percentile bootstrap interval."""
    return _bootstrap(np.mean, [values], generator)


def bootstrap_median(values: Float[Tensor, " n"], generator: torch.Generator) -> Interval:
    """Median of `values` (the mean of the middle two where n is even) and its 95 % percentile bootstrap interval."""
    return _bootstrap(np.median, [values], generator)


def bootstrap_ratio_of_means(
    numerator: Float[Tensor, " n"], denominator: Float[Tensor, " n"], generator: torch.Generator
) -> Interval:
    """mean(numerator) / mean(denominator) of paired values, and its 95 % percentile bootstrap interval over the pairs."""

    def ratio(above: Any, below: Any, axis: int = -1) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):  # a model that errs nowhere: infinite, or not a number
            return above.mean(axis=axis) / below.mean(axis=axis)

    return _bootstrap(ratio, [numerator, denominator], generator)


def _bootstrap(statistic: Callable[..., Any], samples: Sequence[Tensor], generator: torch.Generator) -> Interval:
    """The statistic of the samples, and the 2.5 % and 97.5 % quantiles of it over rows drawn with replacement.

    Rows of several samples are drawn together. The generator draws the seed of numpy's.
    """
    from scipy.stats import bootstrap  # comes with an extra

    data = [values.double().cpu().numpy() for values in samples]
    value = float(statistic(*data, axis=-1))
    seed = int(torch.randint(2**62, (1,), generator=generator))
    count = len(data[0])
    if count == 1 or not math.isfinite(value):
        return Interval(value, value, value)
    interval = bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // count),
        vectorized=True,
        paired=True,
        axis=-1,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(interval.low), float(interval.high))

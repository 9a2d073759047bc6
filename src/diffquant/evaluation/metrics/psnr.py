"""Peak signal to noise ratio of 8-bit pictures, pair by pair of the same noise."""

from __future__ import annotations

from typing import Any, final

from diffquant.evaluation.intervals import Interval, bootstrap_mean, interval_generator
from diffquant.evaluation.metrics.base import Metric
from diffquant.evaluation.pairs import mean_squared_error, pooled_psnr, psnr
from diffquant.evaluation.runs import Run


@final
class Psnr(Metric[Interval]):
    """The ratio of the mean squared error over all pairs, in dB."""

    name, title, form, place = "psnr", "PSNR dB", "{:.2f}", 20

    def compute(self, run: Run, prepared: Any) -> Interval:
        errors = mean_squared_error(run.reference.samples.pictures, run.samples.pictures)
        return pooled_psnr(bootstrap_mean(errors, interval_generator()))


@final
class PsnrMedian(Metric[float]):
    """The median of the ratios of pairs, in dB."""

    name, figure = "psnr_median", float

    def compute(self, run: Run, prepared: Any) -> float:
        return float(psnr(run.reference.samples.pictures, run.samples.pictures).median())

"""Structural similarity of 8-bit pictures, pair by pair of the same noise."""

from __future__ import annotations

from typing import Any, final

from diffquant.evaluation.intervals import Interval, bootstrap_mean, interval_generator
from diffquant.evaluation.metrics.base import Metric
from diffquant.evaluation.pairs import ssim
from diffquant.evaluation.runs import Run


@final
class Ssim(Metric[Interval]):
    """The mean over pairs; 1 for equal pictures."""

    name, title, form, place = "ssim", "SSIM", "{:.3f}", 30
    in_terminal = False

    def compute(self, run: Run, prepared: Any) -> Interval:
        return bootstrap_mean(ssim(run.reference.samples.pictures, run.samples.pictures), interval_generator())

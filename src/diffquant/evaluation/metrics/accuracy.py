"""Accuracy: the share of pictures that show their prompt or class label, where the extractor can tell."""

from __future__ import annotations

from typing import Any, final

from diffquant.evaluation.features import agreements
from diffquant.evaluation.intervals import Interval, bootstrap_mean, interval_generator
from diffquant.evaluation.metrics.base import Metric
from diffquant.evaluation.runs import Run
from diffquant.sampling.protocol import conditions_of


@final
class Accuracy(Metric[Interval]):
    """The share of pictures."""

    name, title, form, place = "accuracy", "accuracy", "{:.3f}", 90
    of_reference = True
    under_settings = "Accuracy (full precision's)"

    def compute(self, run: Run, prepared: Any) -> Interval | None:
        conditions = conditions_of(run.sampling)
        if run.samples.extractor is None or not conditions:
            return None
        right = agreements(run.samples.extractor, run.samples.pictures, conditions)
        return None if right is None else bootstrap_mean(right, interval_generator())

    def under_setting(self, figure: Interval, reference: Interval | None) -> str:
        return "-" if reference is None else f"{figure.value:.3f} ({reference.value:.3f})"

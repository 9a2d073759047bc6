"""Legibility: the confidence of the extractor in the pictures' classes, where it is a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from diffquant.evaluation import text
from diffquant.evaluation.intervals import Interval, bootstrap_mean, interval_generator
from diffquant.evaluation.metrics.base import Metric
from diffquant.evaluation.runs import Run


@dataclass(frozen=True)
class Confidence:
    """The mean confidence, and how much larger it is than full precision's, paired by noise."""

    mean: Interval
    change: Interval | None = None


@final
class Legibility(Metric[Confidence]):
    """The mean over pictures."""

    name, title, figure, place = "legibility", "legibility", Confidence, 80
    of_reference = True
    under_settings = "Legibility (full precision's)"

    def compute(self, run: Run, prepared: Any) -> Confidence | None:
        ours, full = run.samples.confidences, run.reference.samples.confidences
        if ours is None or full is None:
            return None
        change = None if run.steps is None else bootstrap_mean(ours - full, interval_generator())
        return Confidence(bootstrap_mean(ours, interval_generator()), change)

    def format(self, figure: Confidence, newline: str) -> str:
        return text.interval(figure.mean, "{:.3f}", newline)

    def change(self, figure: Confidence) -> Interval | None:
        return figure.change

    def under_setting(self, figure: Confidence, reference: Confidence | None) -> str:
        return "-" if reference is None else f"{figure.mean.value:.3f} ({reference.mean.value:.3f})"

"""Final error: relative L2 distance of the last sample from full precision's of the same noise."""

from __future__ import annotations

from typing import Any, final

from diffquant.evaluation.intervals import Interval, bootstrap_mean, bootstrap_median, interval_generator
from diffquant.evaluation.metrics.base import Metric
from diffquant.evaluation.provenance import Protocol
from diffquant.evaluation.runs import Run


@final
class FinalError(Metric[Interval]):
    """The mean over samples."""

    name, title, place = "final_error", "final error", 10
    under_settings = "Final error"

    def compute(self, run: Run, prepared: Any) -> Interval:
        return bootstrap_mean(run.final_errors, interval_generator())

    def under_setting(self, figure: Interval, reference: Interval | None) -> str:
        return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"

    def legend(self, protocol: Protocol) -> str:
        return "Final error: mean relative L2 of the last sample to that of full precision, same noise."


@final
class FinalErrorMedian(Metric[Interval]):
    """The median over samples."""

    name = "final_error_median"

    def compute(self, run: Run, prepared: Any) -> Interval:
        return bootstrap_median(run.final_errors, interval_generator())

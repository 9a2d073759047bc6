"""CLIP score: how well pictures agree with their prompts, by a scorer such as `evaluation.clip.ClipScore`."""

from __future__ import annotations

from typing import Any, final

from diffquant.evaluation.intervals import Interval, bootstrap_mean, interval_generator
from diffquant.evaluation.metrics.base import Metric
from diffquant.evaluation.runs import Run
from diffquant.sampling.protocol import conditions_of


@final
class Clip(Metric[Interval]):
    """The mean over pictures."""

    name, title, form, place = "clip", "CLIP", "{:.2f}", 100
    of_reference = True

    def compute(self, run: Run, prepared: Any) -> Interval | None:
        if run.reference.scorer is None:
            return None
        prompts = [str(prompt) for prompt in conditions_of(run.sampling)]
        return bootstrap_mean(run.reference.scorer.score(run.samples.pictures, prompts), interval_generator())

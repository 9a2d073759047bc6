"""Differences after each sampling step: the drift of the latents, and the signal to noise ratio of the predicted noise.

Both are means over the samples whose trajectories are compared. Both include the effect of the errors of earlier steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffquant.evaluation.metrics.base import Metric
from diffquant.evaluation.runs import Differ, Run


@dataclass(frozen=True)
class OverSteps:
    """A value for each step, and the step's timestep."""

    timesteps: tuple[float, ...]
    values: tuple[float, ...]


@final
class Drift(Metric[OverSteps]):
    """Relative L2 distance of the latents from full precision's."""

    name, figure, place = "drift", OverSteps, 10

    def compute(self, run: Run, prepared: Any) -> OverSteps | None:
        return None if run.steps is None else _mean(run.steps, run.steps.drift)

    def section(self, figures: Mapping[str, OverSteps]) -> list[str]:
        return ["![Relative L2 distance of the latents from full precision, over sampling steps](drift.png)"]

    def picture(self, figures: Mapping[str, OverSteps]) -> Image.Image:
        from diffquant.evaluation.drawing import draw_drift  # matplotlib comes with an extra

        return draw_drift({name: figure.values for name, figure in figures.items()})


@final
class NoiseSqnr(Metric[OverSteps]):
    """Signal to quantization noise ratio of the predicted noise, in dB."""

    name, figure = "noise_sqnr_db", OverSteps

    def compute(self, run: Run, prepared: Any) -> OverSteps | None:
        return None if run.steps is None else _mean(run.steps, run.steps.noise_sqnr_db)


def _mean(differ: Differ, values: Float[Tensor, "steps samples"]) -> OverSteps:
    return OverSteps(differ.reference.timesteps, tuple(values.mean(dim=1).tolist()))

"""FID of noisy samples: their distance from full precision's of the same noise, after some of the sampling steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from diffquant.evaluation.distances import FrechetDistance, fid
from diffquant.evaluation.intervals import interval_generator
from diffquant.evaluation.metrics.base import Metric
from diffquant.evaluation.runs import Reference, Run, Samples
from diffquant.evaluation.text import markdown_table, number


@dataclass(frozen=True)
class StepDistance:
    """The distance after `steps` sampling steps, and the same for full precision with other noise."""

    steps: int
    distance: FrechetDistance
    floor: FrechetDistance


@final
class FidByStep(Metric[tuple[StepDistance, ...]]):
    """The distance after each of the steps; only of pixel models, whose noisy samples are pictures."""

    name, figure, place = "fid_by_step", tuple[StepDistance, ...], 200

    def prepare(self, reference: Reference, other: Samples | None) -> dict[int, FrechetDistance]:
        features = {} if other is None else other.noisy_features
        return {
            steps: fid(ours, features[steps], "independent", interval_generator())
            for steps, ours in reference.samples.noisy_features.items()
        }

    def compute(self, run: Run, prepared: dict[int, FrechetDistance]) -> tuple[StepDistance, ...] | None:
        ours, full = run.samples.noisy_features, run.reference.samples.noisy_features
        figure = [
            StepDistance(steps, fid(ours[steps], full[steps], "paired", interval_generator()), floor)
            for steps, floor in prepared.items()
        ]
        return tuple(figure) or None

    def section(self, figures: Mapping[str, tuple[StepDistance, ...]]) -> list[str]:
        first = next(iter(figures.values()))
        lines = [[name, *(number(at.distance.value) for at in figure)] for name, figure in figures.items()]
        lines.append(["floor", *(number(at.floor.value) for at in first)])
        header = ["after steps", *(str(at.steps) for at in first)]
        return ["## FID to full precision on the way", markdown_table(header, lines)]

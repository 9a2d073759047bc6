"""FID: Frechet distance of the features of pictures, to full precision's and to the data; `evaluation.distances` has the reasoning.

That to full precision is taken over the same noise, so equal models are at distance 0, below the floor; a value below the floor
says that quantization moves the distribution less than drawing the samples again does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from diffquant.evaluation.distances import FrechetDistance, Pairing, fid, fid_change
from diffquant.evaluation.features import DataStatistics
from diffquant.evaluation.intervals import Interval, interval_generator
from diffquant.evaluation.metrics.sets import SetMetric
from diffquant.evaluation.provenance import Protocol
from diffquant.evaluation.runs import Run
from diffquant.evaluation.text import number


@dataclass(frozen=True)
class Fid:
    """A distance, and the same for full precision with other noise.

    `change` is how much larger the distance is than full precision's, without the bias of n, paired by noise.
    """

    distance: FrechetDistance
    floor: FrechetDistance
    change: Interval | None = None


class _Fid(SetMetric[Fid]):
    figure = Fid

    def distance(self, samples: Tensor, others: Tensor, pairing: Pairing, data: DataStatistics | None) -> FrechetDistance:
        return fid(samples, others, pairing, interval_generator())

    def format(self, figure: Fid, newline: str) -> str:
        distance = figure.distance
        lines = [number(distance.value), f"floor {number(figure.floor.value)}"]
        if distance.extrapolated is None:
            lines.append("inf: n too small")
        else:
            lines += [f"inf {number(distance.extrapolated)}", f"[{number(distance.low)}, {number(distance.high)}]"]
        return newline.join(lines)

    def legend(self, protocol: Protocol) -> str:
        return (
            f"FID and KID on features of {protocol.extractor}: at n = {protocol.sampling.samples}, and FID without the bias of n "
            "(inf). Floor: the same distance for full precision with other noise."
        )


@final
class FidToReference(_Fid):
    """The distance from full precision's samples of the same noise."""

    name, title, place = "fid_to_reference", "FID to full precision", 40
    under_settings = "FID to full precision (floor)"

    def under_setting(self, figure: Fid, reference: Fid | None) -> str:
        return f"{number(figure.distance.value)} ({number(figure.floor.value)})"


@final
class FidToData(_Fid):
    """The distance from real pictures."""

    name, title, place = "fid_to_data", "FID to data", 50
    of_reference = to_data = True

    def compute(self, run: Run, prepared: FrechetDistance | None) -> Fid | None:
        figure, data = super().compute(run, prepared), run.reference.data
        if figure is None or data is None or run.steps is None:
            return figure
        change = fid_change(run.samples.features, run.reference.samples.features, data.features, interval_generator())
        return replace(figure, change=change)

    def change(self, figure: Fid) -> Interval | None:
        return figure.change

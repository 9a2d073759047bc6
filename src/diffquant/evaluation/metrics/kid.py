"""KID: squared maximum mean discrepancy of the features of pictures, to full precision's and to the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from diffquant.evaluation.distances import KernelDistance, Pairing, kid
from diffquant.evaluation.features import DataStatistics
from diffquant.evaluation.metrics.sets import SetMetric


@dataclass(frozen=True)
class Kid:
    """A distance, and the same for full precision with other noise."""

    distance: KernelDistance
    floor: KernelDistance


class _Kid(SetMetric[Kid]):
    figure = Kid
    in_terminal = False

    def distance(self, samples: Tensor, others: Tensor, pairing: Pairing, data: DataStatistics | None) -> KernelDistance:
        return kid(samples, others, pairing, None if data is None else data.within)

    def format(self, figure: Kid, newline: str) -> str:
        lines = [f"{each.value:.2g} ± {each.standard_error:.1g}" for each in (figure.distance, figure.floor)]
        return f"{newline}floor ".join(lines)


@final
class KidToReference(_Kid):
    """The distance from full precision's samples of the same noise."""

    name, title, place = "kid_to_reference", "KID to full precision", 60


@final
class KidToData(_Kid):
    """The distance from real pictures."""

    name, title, place = "kid_to_data", "KID to data", 70
    of_reference = to_data = True

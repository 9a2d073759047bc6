"""What FID and KID share: distances between sets of features, to full precision's and to the data, each beside its floor."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from diffquant.evaluation.distances import Pairing
from diffquant.evaluation.features import DataStatistics
from diffquant.evaluation.metrics.base import F, Metric
from diffquant.evaluation.runs import Reference, Run, Samples


class SetMetric(Metric[F]):
    """A distance from full precision's samples of the same noise, or with `to_data` from real pictures.

    Its figure is made of the distance and of the floor, which is that of full precision with other noise.
    """

    to_data: ClassVar[bool] = False

    @abstractmethod
    def distance(self, samples: Tensor, others: Tensor, pairing: Pairing, data: DataStatistics | None) -> Any:
        """The distance between two sets of features; `data` is where the others come from."""

    def prepare(self, reference: Reference, other: Samples | None) -> Any:
        if other is None:
            return None
        if not self.to_data:
            return self.distance(reference.samples.features, other.features, "independent", None)
        data = reference.data
        return None if data is None else self.distance(other.features, data.features, "fixed", data)

    def compute(self, run: Run, prepared: Any) -> F | None:
        if prepared is None:
            return None
        data = run.reference.data if self.to_data else None
        if data is None:
            distance = self.distance(run.samples.features, run.reference.samples.features, "paired", None)
        else:
            distance = self.distance(run.samples.features, data.features, "fixed", data)
        figure: F = self.figure(distance, prepared)
        return figure

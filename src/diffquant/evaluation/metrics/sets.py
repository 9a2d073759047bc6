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
        if other is None or (self.to_data and reference.data is None):
            return None
        if reference.data is not None and self.to_data:
            return self.distance(other.features, reference.data.features, "fixed", reference.data)
        return self.distance(reference.samples.features, other.features, "independent", None)

    def compute(self, run: Run, prepared: Any) -> F | None:
        if prepared is None:
            return None
        features, full, data = run.samples.features, run.reference.samples.features, run.reference.data
        if data is None or not self.to_data:
            figure: F = self.figure(self.distance(features, full, "paired", None), prepared)
        else:
            figure = self.figure(self.distance(features, data.features, "fixed", data), prepared)
        return figure

"""What a metric is computed from: what models drew through the same noise, and full precision to compare it with."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from diffquant.errors import EvaluationError
from diffquant.evaluation.differ import Differ
from diffquant.evaluation.features import DataStatistics, FeatureExtractor, PromptScorer, confidences, extract
from diffquant.evaluation.pairs import relative_l2
from diffquant.evaluation.provenance import Protocol
from diffquant.host.pipeline import Pipeline
from diffquant.sampling.observers import Trajectory
from diffquant.sampling.protocol import SamplingProtocol
from diffquant.sampling.sample import OnProgress


@dataclass(frozen=True)
class Samples:
    """What a model drew through one noise. Features are computed once, when the first metric asks for them.

    `noisy` are the noisy samples as pictures, by the number of steps done (pixel models with an extractor only).
    """

    pictures: UInt8[Tensor, "n c h w"]
    last_samples: Float[Tensor, "n *shape"]
    noisy: dict[int, Tensor] = field(default_factory=dict)
    extractor: FeatureExtractor | None = None

    @functools.cached_property
    def features(self) -> Float[Tensor, "n d"]:
        """Features of each picture. Raises EvaluationError without an extractor."""
        return self._extracted(self.pictures)

    @functools.cached_property
    def noisy_features(self) -> dict[int, Tensor]:
        """Features of the noisy samples, by the number of steps done."""
        return {steps: self._extracted(pictures) for steps, pictures in self.noisy.items()}

    @functools.cached_property
    def confidences(self) -> Float[Tensor, " n"] | None:
        """The extractor's confidence in each picture; None without a classifier."""
        return None if self.extractor is None else confidences(self.extractor, self.pictures)

    def _extracted(self, pictures: Tensor) -> Tensor:
        if self.extractor is None:
            raise EvaluationError("features: no extractor is given; allowed is any object with its methods; pass features=")
        return extract(self.extractor, pictures)


@dataclass(frozen=True)
class Reference:
    """Full precision, sampled once: what further models are compared with. It holds no figures.

    `trajectory` has the steps of the first samples. `scorer` judges pictures by their prompts. `prepared` is what each metric
    computed once from full precision, by the metric's name; these are the metrics that models are measured with.
    """

    pipe: Pipeline
    protocol: Protocol
    samples: Samples
    trajectory: Trajectory
    seconds: float | None
    data: DataStatistics | None = None
    scorer: PromptScorer | None = None
    prepared: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What reports call full precision."""
        return self.protocol.reference

    @property
    def extractor(self) -> FeatureExtractor | None:
        """What turns pictures into features."""
        return self.samples.extractor


@dataclass(frozen=True)
class Run:
    """A model that was sent through the noise of the reference.

    `steps` has the differences of the first samples from full precision's after each step; None: this is full precision itself.
    """

    name: str
    pipe: Pipeline
    reference: Reference
    samples: Samples
    steps: Differ | None = None
    progress: OnProgress | None = None

    @property
    def sampling(self) -> SamplingProtocol:
        """What both models were sampled by."""
        return self.reference.protocol.sampling

    @functools.cached_property
    def final_errors(self) -> Float[Tensor, " n"]:
        """Relative L2 of every last sample, paired with full precision's of the same noise."""
        return relative_l2(self.reference.samples.last_samples, self.samples.last_samples)

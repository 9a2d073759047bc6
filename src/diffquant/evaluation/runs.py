"""The input of metrics: samples of models for the same noise, and full precision to compare them with."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffquant.errors import EvaluationError
from diffquant.evaluation.features import DataStatistics, FeatureExtractor, PromptScorer, confidences, extract
from diffquant.evaluation.pairs import relative_l2, sqnr_db
from diffquant.evaluation.provenance import Protocol
from diffquant.host.pipeline import Pipeline
from diffquant.sampling.observers import Trajectory
from diffquant.sampling.protocol import SamplingProtocol
from diffquant.sampling.sample import OnProgress, StepResult


@dataclass(frozen=True)
class Samples:
    """The samples of a model for one noise. Features are computed when the first metric reads them.

    `noisy`: the noisy samples as pictures, by the number of steps done (pixel models with an extractor only).
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
    """Full precision, sampled once, with which other models are compared.

    `trajectory` has the steps of the first samples. `scorer` scores pictures by their prompts. `prepared` holds the values of
    `Metric.prepare` by the metric's name; models are measured with these metrics.
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


class Differ:
    """Observer of a quantized run: compares the first samples with the trajectory of the reference, step by step."""

    def __init__(self, name: str, reference: Trajectory) -> None:
        self.name = name
        self.reference = reference
        self.drift = torch.zeros(reference.latents.shape[:2], dtype=torch.float64)  # [steps, samples]
        self.noise_sqnr_db = torch.zeros_like(self.drift)

    def __call__(self, indices: range, result: StepResult) -> None:
        """Compare one step. Raises EvaluationError where it is at another timestep."""
        step, samples = result.step, self.drift.shape[1]
        rows = slice(indices.start, min(indices.stop, samples))
        if rows.start >= samples:
            return
        timesteps = self.reference.timesteps
        if step >= len(timesteps) or timesteps[step] != result.timestep:
            expected = f"{timesteps[step]:g}" if step < len(timesteps) else "over"
            raise EvaluationError(f"{self.name}: step {step} is at timestep {result.timestep:g}, full precision at {expected}")
        count = rows.stop - rows.start
        latents, noise = (x[:count].float().cpu() for x in (result.sample_after, result.noise_prediction))
        self.drift[step, rows] = relative_l2(self.reference.latents[step, rows], latents)
        self.noise_sqnr_db[step, rows] = sqnr_db(self.reference.noise[step, rows], noise)


@dataclass(frozen=True)
class Run:
    """A model that was sampled from the noise of the reference.

    `steps` has the differences of the first samples from full precision's after each step. It is None for full precision itself.
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

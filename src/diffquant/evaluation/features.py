"""What turns pictures into numbers: extractors of features, scorers of prompts, and the means of what they say."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffquant.evaluation.distances import Distances, distances, fid_change, within_sums
from diffquant.evaluation.metrics import Interval, bootstrap_mean
from diffquant.evaluation.sampling_protocol import SamplingProtocol, conditions_of

INTERVAL_SEED = 0  # of bootstrap draws and of jackknife groups
FEATURE_BATCH = 256  # pictures per call of an extractor


@runtime_checkable
class FeatureExtractor(Protocol):
    """What turns pictures into features; given to the evaluation from outside."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of its weights."""
        ...

    def features(self, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Features of each picture."""
        ...

    def confidence(self, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " n"] | None:
        """Largest class probability of each picture, or None if the extractor is no classifier."""
        ...

    def agreement(self, pictures: UInt8[Tensor, "n c h w"], conditions: Sequence[str | int]) -> Float[Tensor, " n"] | None:
        """1 for a picture of what its prompt or class label asked for, else 0; None if the extractor cannot tell."""
        ...


@runtime_checkable
class PromptScorer(Protocol):
    """What scores the agreement of pictures with their prompts (`clip.ClipScore`); given to the evaluation from outside."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of its weights."""
        ...

    def score(self, pictures: UInt8[Tensor, "n c h w"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """The score of each picture."""
        ...


@dataclass(frozen=True)
class DataStatistics:
    """Features of real pictures under the extractor, and the hash that names the data."""

    features: Float[Tensor, "n d"]
    sha256: str

    @functools.cached_property
    def within(self) -> Float[Tensor, " n"]:
        """What `distances.kid` sums over the data alone: the same for every comparison, and the most of its time."""
        return within_sums(self.features)

    def distances(self, extracted: Float[Tensor, "m d"]) -> Distances:
        """FID and KID of pictures with these features to the data."""
        return distances(extracted, self.features, "fixed", interval_generator(), self.within)

    def change(self, extracted: Float[Tensor, "m d"], before: Float[Tensor, "m d"]) -> Interval | None:
        """How much farther from the data, in FID, pictures with these features are than those `before` of the same noise."""
        return fid_change(extracted, before, self.features, interval_generator())


def extract(extractor: FeatureExtractor, pictures: Tensor) -> Float[Tensor, "n d"]:
    """Features of all pictures, in float64 on the CPU."""
    return torch.cat([extractor.features(batch).cpu().double() for batch in _batches(pictures)])


def _batches(pictures: Tensor) -> list[Tensor]:
    return [pictures[start : start + FEATURE_BATCH] for start in range(0, len(pictures), FEATURE_BATCH)]


def legibility(extractor: FeatureExtractor, pictures: Tensor) -> Float[Tensor, " n"] | None:
    """Confidence in each picture, or None if the extractor is no classifier."""
    scores = [extractor.confidence(batch) for batch in _batches(pictures)]
    present = [score.cpu() for score in scores if score is not None]
    return torch.cat(present) if present else None


def mean(values: Float[Tensor, " n"] | None) -> Interval | None:
    """Mean of what each picture has, or None where there is nothing."""
    return None if values is None else bootstrap_mean(values, interval_generator())


def accuracy(extractor: FeatureExtractor, pictures: Tensor, protocol: SamplingProtocol) -> Interval | None:
    """Share of the pictures that show what was asked for, or None where nothing was or the extractor cannot tell."""
    asked = conditions_of(protocol)
    if not asked:
        return None
    parts = zip(_batches(pictures), (asked[i : i + FEATURE_BATCH] for i in range(0, len(asked), FEATURE_BATCH)), strict=True)
    found = [extractor.agreement(batch, wanted) for batch, wanted in parts]
    present = [share.cpu() for share in found if share is not None]
    return bootstrap_mean(torch.cat(present), interval_generator()) if present else None


def clip_score(scorer: PromptScorer | None, pictures: Tensor, protocol: SamplingProtocol) -> Interval | None:
    """Mean score of the pictures by their prompts, or None without a scorer."""
    if scorer is None:
        return None
    prompts = [str(prompt) for prompt in conditions_of(protocol)]
    return bootstrap_mean(scorer.score(pictures, prompts).double().cpu(), interval_generator())


def interval_generator() -> torch.Generator:
    """A fresh generator of bootstrap draws and jackknife groups, the same every time."""
    return torch.Generator().manual_seed(INTERVAL_SEED)

"""What turns pictures into numbers: extractors of features and scorers of prompts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from diffquant.evaluation.distances import within_sums

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


def extract(extractor: FeatureExtractor, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """Features of all pictures, in float64 on the CPU."""
    return torch.cat([extractor.features(batch).cpu().double() for batch in pictures.split(FEATURE_BATCH)])


def confidences(extractor: FeatureExtractor, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " n"] | None:
    """Confidence in each picture, or None if the extractor is no classifier."""
    return joined([extractor.confidence(batch) for batch in pictures.split(FEATURE_BATCH)])


def agreements(
    extractor: FeatureExtractor, pictures: UInt8[Tensor, "n c h w"], conditions: Sequence[str | int]
) -> Float[Tensor, " n"] | None:
    """1 for each picture of what was asked for, else 0; None if the extractor cannot tell."""
    starts = range(0, len(pictures), FEATURE_BATCH)
    parts = [(pictures[start : start + FEATURE_BATCH], conditions[start : start + FEATURE_BATCH]) for start in starts]
    return joined([extractor.agreement(batch, asked) for batch, asked in parts])


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The parts that are there in a row, on the CPU; None if there are none."""
    present = [part.cpu() for part in parts if part is not None]
    return torch.cat(present) if present else None


def confidence(logits: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
    """Largest class probability of each sample; the mean over samples is how legible a classifier finds them."""
    return logits.double().softmax(dim=1).amax(dim=1)


def accuracy(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    """Share of samples whose most likely class is the one in `labels`."""
    return float((logits.argmax(dim=1) == labels).double().mean())

"""Extractors of features and scorers of prompts, and the features of real pictures."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffquant.errors import EvaluationError
from diffquant.evaluation.distances import within_sums

FEATURE_BATCH = 256  # pictures per call of an extractor
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FILE_BATCH = 64  # pictures read at a time


@runtime_checkable
class FeatureExtractor(Protocol):
    """Turns pictures into features. Any object with these methods is one."""

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
        """1 for a picture that shows its prompt or class label, else 0; None if the extractor cannot tell."""
        ...


@runtime_checkable
class PromptScorer(Protocol):
    """Scores how well pictures agree with their prompts, such as `clip.ClipScore`."""

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
        """`distances.within_sums` of the features. It takes most of the time of `kid` and is the same for every comparison."""
        return within_sums(self.features)


def statistics_of(folder: Path | str, extractor: FeatureExtractor) -> DataStatistics:
    """Features of all pictures in `folder` and its subfolders. They are not cropped or resized here.

    Raises `EvaluationError` if there are none, or one cannot be read.
    """
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise EvaluationError(f"data {str(folder)!r}: holds no pictures; allowed are {', '.join(SUFFIXES)}")
    digest, features = hashlib.sha256(), []
    for start in range(0, len(files), FILE_BATCH):
        batch = [_picture(file, digest) for file in files[start : start + FILE_BATCH]]
        same = len({picture.shape for picture in batch}) == 1
        groups = [torch.stack(batch)] if same else [picture[None] for picture in batch]
        features += [extractor.features(group).cpu().double() for group in groups]
    return DataStatistics(features=torch.cat(features), sha256=digest.hexdigest())


def _picture(file: Path, digest: hashlib._Hash) -> UInt8[Tensor, "3 h w"]:
    try:
        with Image.open(file) as opened:
            pixels = np.array(opened.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise EvaluationError(f"{file}: cannot be read as a picture ({error}); remove it, or write it again") from error
    digest.update(pixels.tobytes())
    return torch.from_numpy(pixels).permute(2, 0, 1)


def extract(extractor: FeatureExtractor, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """Features of all pictures, in float64 on the CPU."""
    return torch.cat([extractor.features(batch).cpu().double() for batch in pictures.split(FEATURE_BATCH)])


def confidences(extractor: FeatureExtractor, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " n"] | None:
    """Confidence in each picture, or None if the extractor is no classifier."""
    return _joined([extractor.confidence(batch) for batch in pictures.split(FEATURE_BATCH)])


def agreements(
    extractor: FeatureExtractor, pictures: UInt8[Tensor, "n c h w"], conditions: Sequence[str | int]
) -> Float[Tensor, " n"] | None:
    """1 for each picture that shows its condition, else 0; None if the extractor cannot tell."""
    starts = range(0, len(pictures), FEATURE_BATCH)
    parts = [slice(start, start + FEATURE_BATCH) for start in starts]
    return _joined([extractor.agreement(pictures[part], conditions[part]) for part in parts])


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The parts that are not None in a row, on the CPU; None if all are."""
    tensors = [part.cpu() for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None


def confidence(logits: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
    """Largest class probability of each sample."""
    return logits.double().softmax(dim=1).amax(dim=1)

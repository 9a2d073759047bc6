"""The reference models of the package: pipelines, the classifier whose features FID and KID are computed on, and real letters.

``hashes.json`` fixes their weights. ``tools/train_zoo`` of the repository trains them; it is not part of the package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn

from diffquant.errors import ZooError
from diffquant.evaluation.features import DataStatistics, confidence
from diffquant.zoo.prompts import LETTERS, labels_of

PIPELINES = ("glyph-ddim", "glyph-sd", "glyph-dit")
NAMES = (*PIPELINES, "glyph-classifier")
SIZE = 32  # pixels, height and width of a picture that the classifier sees
FEATURES = 64  # width of the classifier's penultimate layer, the feature space of FID and KID
STATISTICS = "letters.safetensors"


@final
class GlyphClassifier(nn.Module):
    """Names the letter of a 32x32 picture; 26 logits, and 64 features before them."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU(), nn.MaxPool2d(2))

        self.stages = nn.Sequential(stage(1, 32), stage(32, 64), stage(64, 96))  # 32 -> 16 -> 8 -> 4 pixels
        self.project = nn.Linear(96 * 16, FEATURES)
        self.head = nn.Linear(FEATURES, len(LETTERS))

    def penultimate(self, samples: Float[Tensor, "n 1 32 32"]) -> Float[Tensor, "n features"]:
        """Features of samples in [-1, 1]."""
        features: Tensor = nn.functional.silu(self.project(self.stages(samples).flatten(1)))
        return features

    def forward(self, samples: Float[Tensor, "n 1 32 32"]) -> Float[Tensor, "n letters"]:
        """Logits of samples in [-1, 1]."""
        logits: Tensor = self.head(self.penultimate(samples))
        return logits


def to_samples(pictures: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Grey values 0 to 255 as float32 in [-1, 1]."""
    return pictures.float().div(127.5).sub(1.0)


@final
class GlyphFeatures:
    """The classifier as a feature extractor for the evaluation; its confidence is the legibility score."""

    name = "glyph-classifier"

    def __init__(self, classifier: GlyphClassifier, sha256: str) -> None:
        self.classifier, self.sha256 = classifier.eval(), sha256

    @torch.no_grad()
    def features(self, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Penultimate features of pictures, grey or RGB, 32x32 or a multiple of it."""
        return self.classifier.penultimate(_samples(pictures))

    @torch.no_grad()
    def confidence(self, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " n"] | None:
        """Probability of the letter that the classifier finds most likely."""
        return confidence(self.classifier(_samples(pictures)))

    @torch.no_grad()
    def agreement(self, pictures: UInt8[Tensor, "n c h w"], conditions: Sequence[str | int]) -> Float[Tensor, " n"]:
        """1 for a picture of the letter that its prompt names or its class label is, else 0."""
        prompts = [condition for condition in conditions if isinstance(condition, str)]
        labels = labels_of(prompts) if prompts else torch.tensor(conditions)
        right: Tensor = self.classifier(_samples(pictures)).argmax(dim=1) == labels
        return right.float()


def _samples(pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n 1 32 32"]:
    """The classifier's input: the mean over channels, and over the pixels that fall into each of 32x32."""
    return nn.functional.adaptive_avg_pool2d(to_samples(pictures).mean(dim=1, keepdim=True), SIZE)


def check_name(name: str, allowed: tuple[str, ...] = NAMES) -> None:
    """Raises `ZooError` unless `name` is one of `allowed`."""
    if name not in allowed:
        raise ZooError(f"zoo: {name!r} is unknown; allowed are {', '.join(allowed)}")


def folder() -> Path:
    """The folder of the package that holds the weights."""
    return Path(str(resources.files("diffquant") / "zoo" / "weights"))


def path(name: str) -> Path:
    """The pipeline directory of the reference model `name`. Raises `ZooError` for unknown names and missing weights."""
    check_name(name)
    place = folder() / name
    if not place.is_dir():
        raise ZooError(f"zoo: {place} is missing; it comes with the package; install the package again")
    return place


def load(name: str) -> Any:
    """A reference model: ``glyph-classifier`` as `GlyphFeatures`, the others as stock pipelines in float32.

    Raises `ZooError` for an unknown name, and for weights other than those of `hashes.json`.
    """
    place = path(name)
    hashes = folder() / "hashes.json"
    for file, sha256 in (json.loads(hashes.read_text()).get(name, {}) if hashes.exists() else {}).items():
        if not (place / file).exists() or file_hash(place / file) != sha256:
            raise ZooError(f"zoo: {place / file} is not the file that comparisons rest on; install the package again")
    if name == "glyph-classifier":
        classifier = GlyphClassifier()
        classifier.load_state_dict(load_file(place / "model.safetensors"))
        return GlyphFeatures(classifier, file_hash(place / "model.safetensors"))
    pipe = DiffusionPipeline.from_pretrained(place, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_statistics() -> DataStatistics:
    """Features of real letters under the shipped classifier."""
    file = path("glyph-classifier") / STATISTICS
    return DataStatistics(features=load_file(file)["features"].float(), sha256=file_hash(file))


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()

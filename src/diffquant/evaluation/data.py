"""Real pictures read from a folder, as the reference of FID and KID."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffquant.errors import EvaluationError
from diffquant.evaluation.features import DataStatistics, FeatureExtractor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BATCH = 64  # pictures read at a time


def statistics_of(folder: Path | str, extractor: FeatureExtractor) -> DataStatistics:
    """Features of every picture in `folder` and below it, by `extractor`; pictures are taken as they are, not cropped.

    Raises `EvaluationError` where there are none, or one cannot be read.
    """
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise EvaluationError(f"data {str(folder)!r}: holds no pictures; allowed are {', '.join(SUFFIXES)}")
    digest, features = hashlib.sha256(), []
    for start in range(0, len(files), BATCH):
        batch = [_picture(file, digest) for file in files[start : start + BATCH]]
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

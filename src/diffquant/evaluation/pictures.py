"""Pictures as files: samples written for other evaluators, and real pictures read as the reference of FID and KID."""

from __future__ import annotations

import hashlib
import tempfile
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


def check_place(path: Path) -> None:
    """Raise `EvaluationError` where `write_pictures` could not write, before anything is sampled for it."""
    if not path.parent.is_dir():
        raise EvaluationError(f"{path}: {path.parent} is no folder; make it first")
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        raise EvaluationError(f"{path}: is a folder with files in it; choose another name")
    if path.is_file() and not path.suffix:
        raise EvaluationError(f"{path}: is a file; choose another name for the folder of pictures")


def write_pictures(pictures: UInt8[Tensor, "n c h w"], path: Path) -> None:
    """An ``.npz`` with ``arr_0`` ``[n, h, w, 3]``, as ADM's evaluator reads it, or else a folder of numbered PNG files.

    Written under another name and renamed. Raises `EvaluationError` as `check_place` does.
    """
    check_place(path)
    rows = pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        if path.suffix == ".npz":
            np.savez(temporary, arr_0=rows)
        else:
            temporary.mkdir()
            for number, row in enumerate(rows):
                Image.fromarray(row).save(temporary / f"{number:06d}.png")
        temporary.replace(path)


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

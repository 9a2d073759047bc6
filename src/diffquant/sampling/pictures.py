"""Pictures as grey values, and as files for other evaluators."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from diffquant.errors import EvaluationError

UINT8_RULE = "round(127.5 * (x + 1)) clamped to [0, 255], half to even"


def to_uint8(samples: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Pictures in [-1, 1] as grey values 0 to 255: the one rule (`UINT8_RULE`).

    Raises EvaluationError on non-finite values.
    """
    if not torch.isfinite(samples).all():
        raise EvaluationError("pictures: hold non-finite values; only finite samples can be turned into uint8")
    return samples.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


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

"""Files that are written whole or not at all, digests of what is in them, and text files as people write them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffquant.errors import CalibrationError, DiffquantError

DIGEST = "sha256"  # key, in a JSON object, of the digest of the rest
PARTIAL = ".partial"  # suffix of a file that is being written


def read_text(source: Path | Traversable, where: str, error: type[DiffquantError]) -> str:
    """The text in a file. Raises `error`, beginning with `where`, for one that is not UTF-8."""
    try:
        return source.read_text(encoding="utf-8")
    except UnicodeDecodeError as wrong:
        raise error(f"{where}: not a text in UTF-8 ({wrong.reason} at byte {wrong.start})") from wrong


def content_name(tensor: Tensor) -> str:
    """The name of a CPU tensor in a recording: a hash of its shape, dtype and values."""
    digest = hashlib.sha256()
    digest_tensor(digest, tensor)
    return digest.hexdigest()[:24]


def with_digest(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object and, in it, a digest of the rest."""
    return value | {DIGEST: digest_of_json(value)}


def has_its_digest(value: dict[str, Any]) -> bool:
    """Take the digest out of what `with_digest` made: whether it is that of the rest, or there is none, as in version 0.1."""
    return value.pop(DIGEST, None) in (None, digest_of_json(value))


def digest_of_json(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(dict(value), sort_keys=True, default=str).encode()).hexdigest()


def digest_tensor(digest: Any, tensor: Tensor) -> None:
    """Add shape, dtype and bytes of a CPU tensor to a hashlib digest."""
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
    flat = tensor.contiguous().reshape(-1)
    if flat.stride(0) != 1:  # of one value that was expanded, which counts as contiguous
        flat = torch.empty_like(flat, memory_format=torch.contiguous_format).copy_(flat)
    digest.update(flat.view(torch.uint8).numpy())


@contextmanager
def renamed_when_done(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name if the block ends well, and is deleted if it does not."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(
            f"{path}: cannot be written: {error}; free some space and run again: what was finished is kept"
        ) from error
    finally:
        partial.unlink(missing_ok=True)

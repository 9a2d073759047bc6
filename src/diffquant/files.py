"""Files that are written whole or not at all, digests of their content, and named YAML files."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from diffquant.errors import CalibrationError, CheckpointError, DiffquantError

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
    """A JSON object with a digest of its other values in it."""
    return value | {DIGEST: digest_of_json(value)}


def has_its_digest(value: dict[str, Any]) -> bool:
    """Remove the digest that `with_digest` added. Returns whether it is right, or missing as in files of version 0.1."""
    return value.pop(DIGEST, None) in (None, digest_of_json(value))


def digest_of_json(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(dict(value), sort_keys=True, default=str).encode()).hexdigest()


def digest_tensor(digest: Any, tensor: Tensor) -> None:
    """Add shape, dtype and bytes of a CPU tensor to a hashlib digest."""
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
    flat = tensor.contiguous().reshape(-1)
    if flat.stride(0) != 1:  # a single value that was expanded, which counts as contiguous
        flat = torch.empty_like(flat, memory_format=torch.contiguous_format).copy_(flat)
    digest.update(flat.view(torch.uint8).numpy())


@contextmanager
def renamed_when_done(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` at the end of the block, or deleted if the block raises.

    Raises `CalibrationError` if it cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(
            f"{path}: cannot be written: {error}; free some space and run again: what was finished is kept"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with renamed_when_done(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def folder_when_done(folder: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `folder` at the end of the block, or deleted if the block raises.

    An old folder is moved away before and deleted afterwards: if the process is killed between the two renames, both are complete
    beside `folder`. Raises `CheckpointError` if it cannot be written.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    old = folder.with_name(temporary.name.replace(".tmp-", ".old-"))
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({error}); what was there before is unchanged") from error
    finally:
        for remainder in (temporary, old):
            shutil.rmtree(remainder, ignore_errors=True)


def shipped(folder: str) -> list[str]:
    """Names of the YAML files in a folder of the package."""
    entries = (resources.files("diffquant") / folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def named_yaml(what: str, name: str, folder: str, error: type[DiffquantError], bits: str = "") -> dict[str, Any]:
    """The mapping in a YAML file: a `name` in the package's `folder`, or a path that ends in .yaml.

    `bits` is the text on bits after the allowed names in messages. Raises `error` for an unknown name, with the nearest one, for a
    missing file, and for a file that is no YAML mapping.
    """
    where = f"{what} {name!r}"
    source: Path | Traversable = Path(name)
    if not name.endswith((".yaml", ".yml")):
        known = shipped(folder)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f'; did you mean "{near[0]}"' if near else ""
            raise error(f"{where}: unknown; allowed are {', '.join(known)}{bits}, or a .yaml file{hint}")
        source = resources.files("diffquant") / folder / f"{name}.yaml"
    elif not source.is_file():
        raise error(f"{where}: no such file")
    try:
        raw = yaml.safe_load(read_text(source, where, error))
    except yaml.YAMLError as wrong:
        raise error(f"{where}: not YAML: {' '.join(str(wrong).split())}") from wrong
    if not isinstance(raw, dict):
        raise error(f"{where}: holds {type(raw).__name__}; a {what} is a mapping of keys to values")
    return raw

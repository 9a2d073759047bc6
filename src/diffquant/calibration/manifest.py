"""The manifest of a recording, ``manifest.json``: which model was recorded, how, and with which versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffquant.errors import CalibrationError
from diffquant.files import digest_of_json, digest_tensor, has_its_digest, renamed_when_done, with_digest

FORMAT_VERSION = 3
MANIFEST = "manifest.json"


def model_hash(model: nn.Module) -> str:
    """SHA-256 of names, shapes, dtypes and values of the floating-point parameters.

    Buffers do not count, so attaching or fitting quantizers does not change it; nor does the device.

    Raises CalibrationError for a parameter that is nowhere: sequential offloading keeps them outside the model.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            raise CalibrationError(
                f"{type(model).__name__}: parameter {name} is on the meta device, as sequential offloading leaves it; call the "
                f"pipeline's remove_all_hooks, record and quantize, then offload"
            )
        if parameter.is_floating_point():
            digest.update(f"{name} ".encode())
            digest_tensor(digest, parameter.detach().cpu())
    return digest.hexdigest()


def batch_path(folder: Path, batch: int) -> Path:
    """The file of one batch."""
    return folder / f"batch-{batch:05d}.safetensors"


def has_batches(folder: Path) -> bool:
    """Whether a recording was begun in `folder`."""
    return (folder / MANIFEST).is_file() and any(folder.glob("batch-*.safetensors"))


def identity(manifest: Mapping[str, Any]) -> str:
    """A digest of what a recording is of: the model, the scheduler, and how it was sampled."""
    fields = {key: manifest[key] for key in ("model_hash", "scheduler", "calibration", "run")}
    fields["calibration"] = {key: value for key, value in fields["calibration"].items() if key != "budget_gib"}
    return digest_of_json(fields)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a recording's manifest; it is replaced whole."""
    with renamed_when_done(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(with_digest(manifest), indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises CalibrationError for a missing or damaged manifest, and for one of another format version."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{path}: is not a recording's manifest ({type(error).__name__}); record again") from error
    if version != FORMAT_VERSION:
        raise CalibrationError(f"{path}: format_version is {version}; {FORMAT_VERSION} is supported; record again")
    if not has_its_digest(manifest):
        raise CalibrationError(f"{path}: is not the manifest that was written; record again")
    return manifest

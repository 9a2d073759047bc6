"""Load a pipeline by its name: a directory, a hub id, or a reference model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline

from diffquant.checkpoint import folder as checkpoint
from diffquant.errors import CheckpointError, DiffquantError
from diffquant.zoo import models

DTYPES = ("float32", "bfloat16", "float16")


def load_named(model: str, assignments: Sequence[str], say: Callable[[str], None]) -> Any:
    """A pipeline by directory, hub id, or the name of a reference model; `assignments` are arguments of `from_pretrained`.

    They read key=value. The default dtype on a CPU is float32; `say` is told if that differs from the saved one. Raises
    `DiffquantError` for a model that is missing or cannot be loaded, and for assignments that are none.
    """
    arguments = _arguments(assignments)
    if model in models.PIPELINES:
        if arguments:
            raise DiffquantError(f"--load: {model} is a reference model, which takes no arguments; give a directory or a hub id")
        return models.load(model)
    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise DiffquantError(f"model {model!r}: holds no pipeline (no model_index.json); give the folder that holds {folder.name}/")
    saved = checkpoint.saved_dtype(folder) if folder.is_dir() else None
    if "dtype" not in arguments and not torch.cuda.is_available():
        arguments["dtype"] = torch.float32
        if saved not in (None, torch.float32):
            say(f"{model}: saved in {str(saved).removeprefix('torch.')}, computed in float32 on a CPU")
    if folder.is_dir():
        try:
            return checkpoint.load(folder, **arguments)
        except CheckpointError as error:
            variants = sorted({file.suffixes[-2].strip(".") for file in folder.rglob("*.safetensors") if len(file.suffixes) > 1})
            if assignments or not variants:
                raise
            raise CheckpointError(f"{error}; it has the variant {variants[0]}, give --load variant={variants[0]}") from error
    try:
        return DiffusionPipeline.from_pretrained(model, **arguments)
    except (OSError, ValueError, TypeError) as error:
        known, reason = ", ".join(models.PIPELINES), str(error).strip().splitlines()[0]
        raise DiffquantError(
            f"model {model!r}: no directory, no reference model ({known}), and not loaded as a hub id: {reason}"
        ) from error


def _arguments(assignments: Sequence[str]) -> dict[str, Any]:
    """Arguments of `from_pretrained` from key=value; a dtype by its name."""
    arguments: dict[str, Any] = {}
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key.isidentifier():
            raise DiffquantError(f"--load {text!r}: not key=value; for example dtype=float16, variant=fp16, revision=main")
        if key == "dtype":
            if value not in DTYPES:
                raise DiffquantError(f"--load {text!r}: dtypes are {', '.join(DTYPES)}")
            arguments["dtype"] = getattr(torch, value)
        else:
            arguments[key] = yaml.safe_load(value)
    return arguments

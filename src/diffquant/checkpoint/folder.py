"""Packed checkpoints as folders: save, load, verify, and how large they are.

A checkpoint is what diffusers writes: a pipeline's folder with ``model_index.json``, or a model's with ``config.json``; the
quantized model's config.json carries `quantization_config` (see `config`). `save` writes beside the target under a temporary name,
reads everything back, compares it with the model in memory, and only then renames.
"""

from __future__ import annotations

import json
import math
import os
from itertools import chain
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffquant.checkpoint.config import AGAIN, Method, QuantizationConfig
from diffquant.checkpoint.quantizer import DiffquantQuantizer, mark_quantized, written_digest
from diffquant.checkpoint.sums import altered, write_sums
from diffquant.core.model import correction_of, ensured_state, is_frozen, is_quantizable, quantized_layers, quantizers
from diffquant.engines.base import engine as requesting
from diffquant.errors import CheckpointError, DiffquantError
from diffquant.files import folder_when_done
from diffquant.host.conditions import class_names
from diffquant.host.pipeline import DENOISER_NAMES
from diffquant.host.structure import first_adapter
from diffquant.sampling.correction import attach

SMALL = (".json", ".txt", ".jinja")  # endings of files without weights


def save(
    pipe_or_model: DiffusionPipeline | nn.Module,
    folder: str | Path,
    *,
    recipe_name: str = "",
    max_shard_size: int | str = "10GB",
) -> Path:
    """Write a pipeline with a frozen denoiser, or a frozen model, and check that the files reproduce it; the folder is returned.

    ``SHA256SUMS`` in it lists every file, for `verify`.

    An existing `folder` is replaced when it is empty or a checkpoint of diffusers; until everything is written and checked it stays
    as it was. `recipe_name` goes into the config; without it the name of the recipe
    that `quantize` ran, or the one a loaded model has. Between moving the old checkpoint away and the new one in there is an
    instant without either; a kill then leaves both beside it, complete.

    Raises `CheckpointError` when nothing is quantized or not frozen, when a LoRA adapter is loaded, when `folder` holds something
    else, cannot be written, or what was written differs from what is in memory.
    """
    folder = Path(folder).expanduser().resolve()
    models = _quantized_models(pipe_or_model)
    check_replaceable(folder)
    for model in models.values():
        state = ensured_state(model)
        state.recipe = recipe_name or state.recipe
        mark_quantized(model)
    with folder_when_done(folder) as temporary:
        temporary.mkdir(parents=True)
        writer: Any = pipe_or_model
        if names := class_names(writer):
            writer.register_to_config(id2label=names)  # a loaded `DiTPipeline` would leave them out
        writer.save_pretrained(temporary, max_shard_size=max_shard_size)
        for name, model in models.items():
            _check_reproduced(model, temporary / name)
        write_sums(temporary)
    return folder


def load(folder: str | Path, *, engine: str | None = None, **arguments: Any) -> Any:
    """The pipeline or model in `folder`, computing with `engine`, a pipeline's sampling-time correction attached.

    `arguments` go to its `from_pretrained`.

    Raises `CheckpointError` where anything in it is damaged, there is nothing to load, an argument does not fit, or the engine does
    not run here.
    """
    folder = Path(folder).expanduser()
    for component in _quantized_folders(folder):
        for file in _weights_files(component):
            written_digest(file)
    with requesting(engine):
        try:
            if not (folder / "model_index.json").is_file():
                return _model_class(folder).from_pretrained(folder, **arguments)
            pipe = DiffusionPipeline.from_pretrained(folder, **arguments)
        except (DiffquantError, MemoryError):
            raise
        except Exception as error:  # damaged files end in diffusers and transformers in many ways
            raise CheckpointError(f"{folder}: not loaded: {altered(folder, SMALL) or _first_line(error)}") from error
        if any(isinstance(part, nn.Module) and correction_of(part) is not None for part in pipe.components.values()):
            attach(pipe)
        return pipe


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"


def verify(folder: str | Path) -> None:
    """Read every quantized model in `folder` with all checks, and forget it.

    Raises `CheckpointError` for truncated or altered files, of the other components too where `save` wrote the folder; missing,
    unknown or misshapen tensors; values that cannot be; another version of the format; and when nothing in `folder` is quantized.
    """
    folder = Path(folder).expanduser()
    components = _quantized_folders(folder)
    if not components:
        raise CheckpointError(f"{folder}: holds no model that diffquant quantized; give the folder that save wrote")
    for component in components:
        try:
            _read(component, _model_class(component))
        except (DiffquantError, MemoryError):
            raise
        except Exception as error:  # of a config that is diffusers'
            raise CheckpointError(f"{component}: not read: {altered(folder) or _first_line(error)}") from error
    if (difference := altered(folder)) is not None:
        raise CheckpointError(f"{folder}: {difference}; {AGAIN}")


def file_size(folder: str | Path) -> int:
    """Bytes of the denoiser's weights files in `folder`, quantized or not."""
    folder = Path(folder).expanduser()
    components = _quantized_folders(folder) or [path for name in DENOISER_NAMES if (path := folder / name).is_dir()] or [folder]
    return sum(file.stat().st_size for component in components for file in _weights_files(component))


def saved_dtype(folder: str | Path) -> torch.dtype | None:
    """The dtype of the largest part of a denoiser's weights as they are saved, None where they are packed or not found."""
    counts: dict[str, int] = {}
    for component in (path for name in DENOISER_NAMES if (path := Path(folder) / name).is_dir()):
        if "quantization_config" in _json(component / "config.json"):
            return None
        for file in component.glob("*.safetensors"):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        part = opened.get_slice(name)
                        counts[part.get_dtype()] = counts.get(part.get_dtype(), 0) + math.prod(part.get_shape())
            except (OSError, SafetensorError):
                return None
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return known.get(max(counts, key=lambda name: counts[name])) if counts else None


def float32_size(model: nn.Module) -> int:
    """Bytes that the weights of `model` take, or took before they were frozen, in float32."""
    codes = (quantizer.codes for _, quantizer in quantizers(model))
    return 4 * sum(tensor.numel() for tensor in chain(model.parameters(), codes) if tensor is not None)


def _quantized_models(pipe_or_model: DiffusionPipeline | nn.Module) -> dict[str, nn.Module]:
    """Frozen models by the name of their folder, "" for a bare model."""
    models: dict[str, nn.Module] = {"": pipe_or_model} if isinstance(pipe_or_model, nn.Module) else {}
    for name, model in getattr(pipe_or_model, "components", {}).items():
        if isinstance(model, nn.Module) and is_quantizable(model):
            models[name] = model
    for model in models.values():
        if not isinstance(model, ModelMixin):
            raise CheckpointError(
                f"{type(model).__name__}: is no model of diffusers; pass the pipeline, or its unet or transformer"
            )
        if not is_frozen(model):
            raise CheckpointError(f"{type(model).__name__}: its weights are not integer codes; quantize first")
        if (adapted := first_adapter(model)) is not None:
            raise CheckpointError(f"layer {adapted!r}: a LoRA adapter is loaded; unload it (unload_lora_weights) to save")
    if not models:
        raise CheckpointError(f"{type(pipe_or_model).__name__}: no component of it is quantized; quantize first")
    return models


def check_replaceable(folder: Path) -> None:
    """Raises `CheckpointError` where `save` could not put a checkpoint in the place of `folder`, or make it."""
    folder = folder.expanduser().resolve()
    above = next(parent for parent in folder.parents if parent.exists())
    if not os.access(above, os.W_OK):
        raise CheckpointError(f"{folder}: {above} cannot be written; choose another place")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; a checkpoint is a folder; choose another name")
    if any(folder.iterdir()) and not any("_class_name" in _json(folder / name) for name in ("model_index.json", "config.json")):
        raise CheckpointError(f"{folder}: holds files that are no checkpoint; save replaces the whole folder; choose another name")


def _check_reproduced(model: nn.Module, folder: Path) -> None:
    """Read `folder` and compare every tensor with the model in memory, bit for bit, and every weight that comes of them."""
    read = _read(folder, type(model))
    tensors = read.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in tensors or not _equal(tensor, tensors[name]):
            raise CheckpointError(f"{folder.name}: tensor {name!r} was not reproduced by what was written; nothing was replaced")
    layers = dict(quantized_layers(read))
    for name, layer in quantized_layers(model):
        ours, theirs = layer.weight_quantizer, layers[name].weight_quantizer
        if ours is None or theirs is None:
            continue
        if not _equal(ours.dequantized_codes(), theirs.dequantized_codes()):
            raise CheckpointError(
                f"{folder.name}: the weight of {name} was not reproduced by what was written; nothing was replaced"
            )


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs.to(ours.device))


def _read(folder: Path, model_class: type[Any]) -> nn.Module:
    """The quantized model in `folder`, by the steps that diffusers takes, in the dtypes of the file."""
    config = _json(folder / "config.json")
    quantizer = DiffquantQuantizer(QuantizationConfig.from_dict(config["quantization_config"]))
    tensors: dict[str, dict[str, Tensor]] = {str(file): _open(file) for file in _weights_files(folder)}
    quantizer.maybe_update_loaded_keys([name for part in tensors.values() for name in part], list(tensors))
    with init_empty_weights():
        model: Any = model_class.from_config(config)
    quantizer.preprocess_model(model)
    for part in tensors.values():
        model.load_state_dict(quantizer.maybe_update_state_dict(part), strict=False, assign=True)
    with requesting("simulate"):
        quantizer.postprocess_model(model)
    assert isinstance(model, nn.Module)
    return model


def _open(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: truncated or damaged ({error}); {AGAIN}") from error


def _weights_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no safetensors file; {AGAIN}")
    return files


def _quantized_folders(folder: Path) -> list[Path]:
    """`folder` itself, or those of its direct subfolders, whose config names us."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a pipeline or a model")
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    configs = {path: _json(path / "config.json").get("quantization_config") for path in candidates}
    return [path for path, config in configs.items() if isinstance(config, dict) and config.get("quant_method") == Method.DIFFQUANT]


def _model_class(folder: Path) -> type[Any]:
    name = _json(folder / "config.json").get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise CheckpointError(f"{folder}: config.json names class {name!r}; it must be a model class of diffusers")
    return kind


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); {AGAIN}") from error
    return contents if isinstance(contents, dict) else {}

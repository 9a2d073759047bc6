"""How diffusers reads and writes a quantized denoiser: a quantizer, and its registration.

diffusers has no call to register a quantization method, so `register` writes into its two tables, on import of this file.
After that `from_pretrained` of a pipeline or a model reads our checkpoints, and `save_pretrained` writes them.

The config is in `config`; what a file holds is in `packing`; its metadata state a digest over all tensors. diffusers casts floating
tensors to the dtype asked for before we see them placed; the parameters of quantizers are therefore kept aside as they are read,
shard by shard, and put back at the end.

Not here: which folder, and what happens to the one that was there (`folder`); offloading to disk.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffquant.checkpoint.config import AGAIN, Method, QuantizationConfig, describe
from diffquant.checkpoint.packing import (
    SHIFT_BITS,
    belongs_to_quantizer,
    check_values,
    combined_digest,
    digest_of_tensor,
    kind_of,
    packed_size,
    packed_state,
    unpack,
)
from diffquant.core.memory import release_freed_memory
from diffquant.core.model import device_of, enable, ensured_state, leave_inference_mode, quantized_layers, quantizers
from diffquant.core.spec import AttentionSpec, LayerSpec
from diffquant.engines.base import install, requested
from diffquant.errors import CheckpointError, SpecError
from diffquant.files import digest_of_json
from diffquant.host.denoiser import give_correction, prepare, warn_unless_attached
from diffquant.host.structure import PlannedLayer

DIGEST = "diffquant_sha256"  # keys of the safetensors metadata: over all tensors,
CONFIG_DIGEST = "diffquant_config_sha256"  # and over the quantization_config; files of version 0.1 lack it


def mark_quantized(model: nn.Module) -> None:
    """Tell diffusers that a frozen `model` is quantized, if it is one of its own: `save_pretrained` then writes the packed form.

    From then on diffusers refuses to cast the model (`.to(dtype)`, `.half()`). Raises `CheckpointError` when it is not frozen.
    """
    config = describe(model)
    if not isinstance(model, ModelMixin):
        return
    model.hf_quantizer = DiffquantQuantizer(config)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.register_to_config(quantization_config=config)


class DiffquantQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads or saves a quantized denoiser. It holds tensors only during a load."""

    requires_calibration = True  # a float checkpoint cannot be quantized while it loads
    use_keep_in_fp32_modules = True  # float parameters are treated as in a model that is not quantized

    quantization_config: QuantizationConfig

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._load: _Load | None = None

    @property
    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: a frozen model has no float weights."""
        return False

    @property
    def supports_parallel_loading(self) -> bool:
        """No: shards are counted as they come."""
        return False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises `CheckpointError` for what cannot be loaded: dtypes below 16 bits, parts on disk."""
        dtype, device_map = kwargs.get("torch_dtype"), kwargs.get("device_map")
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(f"torch_dtype: {dtype}; float parameters are float32, bfloat16 or float16")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise CheckpointError("device_map: has parts on disk; a quantized model is held in memory; use a device or the CPU")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[str | Path]) -> list[str]:
        """First call of a load: the names of all tensors, and the files. Only safetensors files are read."""
        files = [Path(file) for file in checkpoint_files]
        for file in files:
            if file.suffix != ".safetensors":
                raise CheckpointError(f"{file}: not a safetensors file; diffquant never reads pickles; {AGAIN}")
        self._load = _Load(files[0].parent, set(loaded_keys), [written_digest(file) for file in files])
        read = self.quantization_config.read_digest
        if any(_metadata(file).get(CONFIG_DIGEST, read) != read for file in files):
            raise CheckpointError(
                f"{files[0].parent}: the quantization_config of config.json is not the one that was written; {AGAIN}"
            )
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Give `model`, on the meta device, the shape of its file, and check that the names agree."""
        load = self._loading()
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        specs: dict[str, LayerSpec | AttentionSpec] = {**self.quantization_config.layers, **self.quantization_config.attentions}
        rows = [PlannedLayer(name, kinds.get(name, ""), (), spec, "checkpoint") for name, spec in specs.items()]
        try:
            prepare(model, rows, self.quantization_config.timesteps, self.quantization_config.conditional_half)
        except SpecError as error:
            raise CheckpointError(f"{load.folder}: config.json does not fit the model: {error}; {AGAIN}") from error
        load.shapes = _make_packed(model)
        load.expected = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
        _refuse_missing(load, load.names)
        if unknown := sorted(load.names - load.expected.keys()):
            raise CheckpointError(f"{load.folder}: tensor {unknown[0]!r} is unknown to this {type(model).__name__}; {AGAIN}")

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one file, as they stand in it: check them, and keep what diffusers would cast."""
        load, specs = self._loading(), self.quantization_config.quantizer_specs()
        for name, tensor in state_dict.items():
            if (expected := load.expected.get(name)) is None:
                raise CheckpointError(f"{load.folder}: tensor {name!r} is not in the index of the files; {AGAIN}")
            ours = belongs_to_quantizer(name, specs)
            dtype_differs = tensor.dtype != expected.dtype
            cast = not ours and tensor.is_floating_point() and expected.is_floating_point()
            if tensor.shape != expected.shape or (dtype_differs and not cast):
                raise CheckpointError(f"{load.folder}: tensor {name!r}: {kind_of(tensor)}; must be {kind_of(expected)}; {AGAIN}")
            try:
                check_values(name, tensor, specs, load.expected)
            except CheckpointError as error:
                raise CheckpointError(f"{load.folder}: {error}; {AGAIN}") from error
            if ours and tensor.is_floating_point():
                load.exact[name] = tensor.clone()
            load.digests[name] = digest_of_tensor(name, tensor)
        return state_dict

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Check that nothing was altered or left out, unpack the codes, restore float32, and switch the quantizers on."""
        load = self._loading()
        _refuse_missing(load, load.digests)
        if any(written != combined_digest(load.digests) for written in load.written):
            raise CheckpointError(f"{load.folder}: its tensors are not those that were written; {AGAIN}")
        engine, dtype = requested(), next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
        for name, quantizer in quantizers(model):
            quantizer.scale = load.exact[f"{name}.scale"].to(quantizer.scale.device)
            stored = quantizer.zero_point
            quantizer.zero_point = torch.zeros_like(quantizer.scale) if quantizer.spec.symmetric else stored.float()
            if quantizer.shift is not None:
                quantizer.shift = unpack(quantizer.shift, load.shapes[f"{name}.shift"], SHIFT_BITS, False).to(torch.int8)
        for name, layer in quantized_layers(model):
            if layer.smooth is not None:
                layer.smooth = load.exact[f"{name}.smooth"].to(layer.smooth.device)
            layer.like = torch.empty(0, dtype=dtype, device=device_of(layer))
            if (weight := layer.weight_quantizer) is not None:
                assert weight.codes is not None
                weight.codes = unpack(weight.codes, load.shapes[name], weight.spec.bits, weight.spec.symmetric)
                engine.take(layer)  # one at a time: all codes at once, and laid out, are twice the memory
        enable(model)
        if self.quantization_config.correction is not None:
            give_correction(model, self.quantization_config.correction)
            model.register_forward_pre_hook(warn_unless_attached)
        ensured_state(model).recipe = self.quantization_config.recipe
        install(model, engine)
        leave_inference_mode(model)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # a tensor that is a view of the mapped file would keep all of it
        release_freed_memory()
        self._load = None

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes. Raises `CheckpointError` when asked for a pickle."""
        if not safe_serialization:
            raise CheckpointError("safe_serialization: False; diffquant never writes pickles; leave it True")
        stored = packed_state(state_dict, self.quantization_config.quantizer_specs())
        return stored, {
            DIGEST: combined_digest({name: digest_of_tensor(name, tensor) for name, tensor in stored.items()}),
            CONFIG_DIGEST: digest_of_json(self.quantization_config.to_dict()),
        }

    def _loading(self) -> _Load:
        assert self._load is not None, "diffusers calls maybe_update_loaded_keys first"
        return self._load


@dataclass
class _Load:
    """What is known while one model is being loaded."""

    folder: Path
    names: set[str]  # of all tensors in the files
    written: list[str]  # the digest that each file states
    expected: dict[str, Tensor] = field(default_factory=dict)  # meta tensors: shape and dtype of each
    shapes: dict[str, torch.Size] = field(default_factory=dict)  # of each layer's weight, and of each shift
    exact: dict[str, Tensor] = field(default_factory=dict)  # float32 parameters of quantizers, as read
    digests: dict[str, str] = field(default_factory=dict)


def register() -> None:
    """Make our config and quantizer known to diffusers; done on import."""
    AUTO_QUANTIZER_MAPPING[Method.DIFFQUANT.value] = DiffquantQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[Method.DIFFQUANT.value] = QuantizationConfig


def _make_packed(model: nn.Module) -> dict[str, torch.Size]:
    """Replace weights, zero points and shifts of a prepared model by empty buffers as stored; the shapes of weights and shifts."""
    shapes = {}
    for name, layer in quantized_layers(model):
        if (weight := layer.weight_quantizer) is not None:
            shapes[name] = layer.weight.shape
            size = packed_size(layer.weight.numel(), weight.spec.bits)
            weight.codes = torch.empty(size, dtype=torch.uint8, device=layer.weight.device)
            layer.forget_weight()
    for name, quantizer in quantizers(model):
        if quantizer.shift is not None:
            shapes[f"{name}.shift"] = quantizer.shift.shape
            size = packed_size(quantizer.shift.numel(), SHIFT_BITS)
            quantizer.shift = torch.empty(size, dtype=torch.uint8, device=quantizer.shift.device)
        stored = None if quantizer.spec.symmetric else quantizer.zero_point.to(torch.uint8)
        quantizer.zero_point = stored  # type: ignore[assignment]
    return shapes


def _refuse_missing(load: _Load, names: Collection[str]) -> None:
    if missing := sorted(load.expected.keys() - set(names)):
        raise CheckpointError(f"{load.folder}: tensor {missing[0]!r} is missing; config.json asks for it; {AGAIN}")


def written_digest(file: Path) -> str:
    """The digest that a safetensors file states. Raises `CheckpointError` when it cannot be read, or states none."""
    digest = _metadata(file).get(DIGEST)
    if digest is None:
        raise CheckpointError(f"{file}: has no digest of its contents; it was not written by diffquant; {AGAIN}")
    return digest


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: truncated or damaged ({error}); {AGAIN}") from error


register()

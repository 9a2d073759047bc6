"""The `quantization_config` of a quantized denoiser, as it stands in config.json: what was quantized and how, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from diffquant.core.attention import ATTRIBUTE, OPERANDS
from diffquant.core.correction import Correction
from diffquant.core.model import is_frozen, quantized_layers, state_of
from diffquant.core.spec import AttentionSpec, LayerSpec, QuantSpec
from diffquant.engines.base import attentions
from diffquant.errors import CheckpointError
from diffquant.files import digest_of_json

VERSION = 1
AGAIN = "copy or save the checkpoint again"


class Method(StrEnum):
    """The `quant_method` under which diffusers knows us; it has to be an Enum."""

    DIFFQUANT = "diffquant"


class _LayerGroup(BaseModel):
    model_config = ConfigDict(extra="forbid")
    spec: LayerSpec
    names: list[str]


class _AttentionGroup(BaseModel):
    model_config = ConfigDict(extra="forbid")
    spec: AttentionSpec
    names: list[str]


class _Json(BaseModel):
    """`quantization_config` as it stands in config.json."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    quant_method: Literal["diffquant"]
    version: int
    recipe: str = ""
    timesteps: list[float] = []
    conditional_half: Literal[0, 1] | None = None
    layers: list[_LayerGroup] = []
    attentions: list[_AttentionGroup] = []
    correction: Correction | None = None


@dataclass(repr=False)
class QuantizationConfig(QuantizationConfigMixin):
    """What was quantized and how: the spec of every layer and attention by name, and the clock: timesteps and conditional half."""

    quant_method: Method = Method.DIFFQUANT
    layers: dict[str, LayerSpec] = field(default_factory=dict)
    attentions: dict[str, AttentionSpec] = field(default_factory=dict)
    timesteps: tuple[float, ...] = ()
    conditional_half: int | None = None
    recipe: str = ""
    correction: Correction | None = None
    read_digest: str | None = field(default=None, compare=False)  # of the JSON that it was read from

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that `to_dict` wrote. Raises `CheckpointError` for another version or anything it does not know."""
        version = config_dict.get("version")
        if version != VERSION:
            raise CheckpointError(
                f"quantization_config.version: {version}; this diffquant reads version {VERSION}; "
                "install the diffquant that wrote the checkpoint"
            )
        try:
            read = _Json.model_validate(dict(config_dict))
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
            raise CheckpointError(f"quantization_config{where}: {first['msg']}; {AGAIN}") from error
        config = cls(
            layers={name: group.spec for group in read.layers for name in group.names},
            attentions={name: group.spec for group in read.attentions for name in group.names},
            timesteps=tuple(read.timesteps),
            conditional_half=read.conditional_half,
            recipe=read.recipe,
            correction=read.correction,
            read_digest=digest_of_json(config_dict),
        )
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON values, names grouped by equal spec."""
        correction = None if self.correction is None else self.correction.model_dump(mode="json")
        optional = {"conditional_half": self.conditional_half, "correction": correction}
        return {
            "quant_method": self.quant_method.value,
            "version": VERSION,
            "recipe": self.recipe,
            "timesteps": list(self.timesteps),
            "layers": _grouped(self.layers),
            "attentions": _grouped(self.attentions),
        } | {name: value for name, value in optional.items() if value is not None}

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`; diffusers prints it."""
        return self.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """The items of `to_dict`, for `dict(config)`."""
        return iter(self.to_dict().items())

    def quantizer_specs(self) -> dict[str, QuantSpec]:
        """The spec of every quantizer that has tensors by its module name; those of weights end in ``.weight_quantizer``."""
        specs: dict[str, QuantSpec | None] = {}
        for name, layer in self.layers.items():
            stored = layer.input if layer.input_scale == "static" else None
            specs |= {f"{name}.weight_quantizer": layer.weight, f"{name}.input_quantizer": stored}
        for name, attention in self.attentions.items():
            specs |= {f"{name}.{ATTRIBUTE}.{operand}": getattr(attention, operand) for operand in OPERANDS}
        return {name: spec for name, spec in specs.items() if spec is not None}


def describe(model: nn.Module) -> QuantizationConfig:
    """The config of a quantizable model. Raises `CheckpointError` when `model` is not frozen."""
    state = state_of(model)
    if state is None or not is_frozen(model):
        raise CheckpointError(f"{type(model).__name__}: its weights are not integer codes; quantize first")
    return QuantizationConfig(
        layers={name: layer.present_spec for name, layer in quantized_layers(model)},
        attentions={name: products.present_spec for name, products in attentions(model).items()},
        timesteps=state.clock.timesteps,
        conditional_half=state.clock.conditional,
        recipe=state.recipe,
        correction=state.correction,
    )


def _grouped(specs: Mapping[str, LayerSpec] | Mapping[str, AttentionSpec]) -> list[dict[str, Any]]:
    groups: dict[LayerSpec | AttentionSpec, list[str]] = {}
    for name, spec in specs.items():
        groups.setdefault(spec, []).append(name)
    return [{"spec": _json_of(spec), "names": names} for spec, names in groups.items()]


def _json_of(spec: LayerSpec | AttentionSpec) -> dict[str, Any]:
    """A spec as JSON. A field that came later is left out where it is off, so that older versions read the file."""
    later = {"guidance_sets": False, "input_scale": "static"}
    return spec.model_dump(mode="json", exclude={name for name, off in later.items() if getattr(spec, name, off) == off})

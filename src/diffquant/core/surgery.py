"""From a plan to a quantizable model, in place; switching quantizers; reconstruction units."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from diffquant.core.clock import StepClock, follow
from diffquant.core.frozen import float_weight
from diffquant.core.layers import (
    QUANTIZABLE,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    attach_products,
    freeze_layer,
    make_quantizable,
    release_forward,
)
from diffquant.core.planning import PlannedLayer, first_with_guidance_sets
from diffquant.core.quantizer import Quantizer
from diffquant.core.spec import AttentionSpec, SpecError

TIMESTEP_NAMES = ("timestep", "timesteps", "t")
BLOCKS = ("ResnetBlock2D", "TransformerBlock", "Attention")  # ends of class names


@dataclass(frozen=True)
class Unit:
    """A layer or block that is fitted as one: its name, module, and quantizable layers."""

    name: str
    module: nn.Module
    layers: tuple[tuple[str, QuantizedLayer], ...]


def timestep_argument(model: nn.Module) -> tuple[str, int]:
    """Name and position of the timestep among the arguments of a denoiser's forward; `SpecError` where there is none."""
    names = list(inspect.signature(model.forward).parameters)
    for name in TIMESTEP_NAMES:
        if name in names:
            return name, names.index(name)
    raise SpecError(
        f"{type(model).__name__}.forward: arguments {names}; a denoiser has one named {' or '.join(TIMESTEP_NAMES)}; "
        "pass the pipeline's unet or transformer"
    )


def prepare(
    model: nn.Module, rows: Sequence[PlannedLayer], timesteps: Sequence[float] = (), conditional: int | None = None
) -> None:
    """Make the planned layers of `model` quantizable in place, give it its clock and the hook that sets it.

    Quantizers start off and uncalibrated: the model still computes exactly what it did. A layer gets at most one parameter set per
    timestep; without `timesteps`, one; with `guidance_sets` as many for each half of a guided call, of which `conditional` (0 or 1)
    is the conditional one. Raises `SpecError` when it already is quantizable, when rows name layers that it does not have, or want
    sets for halves that are not known.
    """
    if hasattr(model, "step_clock"):
        raise SpecError(f"{type(model).__name__}: already quantizable; load the full-precision model again to start over")
    argument = timestep_argument(model)
    modules = dict(model.named_modules())
    clock = StepClock(timesteps, conditional)
    if conditional is None and (wanting := first_with_guidance_sets(rows)) is not None:
        raise SpecError(f"layer {wanting!r}: guidance_sets, but no half of a call is known as the conditional one")
    _check_places(model, rows, modules)
    for row in rows:
        if row.spec is None:
            continue
        sets = {"sets": min(row.spec.sets, clock.times)}  # more would never be used, and stay uncalibrated
        if isinstance(row.spec, AttentionSpec):
            attach_products(modules[row.name], row.spec.model_copy(update=sets), clock)
        else:
            make_quantizable(modules[row.name], row.spec.model_copy(update=sets), clock)
    model.step_clock = clock  # type: ignore[assignment]
    model.timestep_argument = argument  # type: ignore[assignment]
    follow(model)


def _check_places(model: nn.Module, rows: Sequence[PlannedLayer], modules: Mapping[str, nn.Module]) -> None:
    for row in rows:
        if row.spec is None:
            continue
        if row.name not in modules:
            raise SpecError(f"layer {row.name!r}: not in this {type(model).__name__}")
        if not release_forward(modules[row.name]):
            raise SpecError(
                f"layer {row.name!r}: its forward is replaced on the instance, as offloading with accelerate does; call the "
                f"pipeline's remove_all_hooks (a model's: accelerate.hooks.remove_hook_from_submodules), quantize, then offload"
            )


def device_of(module: nn.Module) -> torch.device:
    """Where the module's parameters are (of a frozen one: its buffers); the CPU where it has neither."""
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Every quantizable Linear and Conv2d below `module`, by name."""
    for name, child in module.named_modules():
        if isinstance(child, (QuantizedLinear, QuantizedConv2d)):
            yield name, child


def quantizers(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer below `module`, by name."""
    for name, child in module.named_modules():
        if isinstance(child, Quantizer):
            yield name, child


def enable(module: nn.Module, on: bool = True) -> None:
    """Turn all quantizers below `module` on or off. Raises `SpecError` when one to be turned on was never calibrated."""
    found = list(quantizers(module))
    for name, quantizer in found:
        if on and not quantizer.calibrated:
            raise SpecError(f"{name}: not calibrated; a recipe starts with a pass that sets ranges")
    for _, quantizer in found:
        quantizer.enabled = on


@contextmanager
def full_precision(module: nn.Module) -> Iterator[None]:
    """Every quantizer below `module` off, and as it was again afterwards."""
    with switched(module, False):
        yield


@contextmanager
def switched(module: nn.Module, on: bool) -> Iterator[None]:
    """Every quantizer below `module` on (or off), and as it was again afterwards."""
    before = [(quantizer, quantizer.enabled) for _, quantizer in quantizers(module)]
    try:
        enable(module, on)
        yield
    finally:
        for quantizer, state in before:
            quantizer.enabled = state


def freeze(model: nn.Module) -> None:
    """Replace every quantized float weight by its integer codes and switch all quantizers on, for good."""
    enable(model)
    for _, layer in quantized_layers(model):
        freeze_layer(layer)


def leave_inference_mode(model: nn.Module) -> None:
    """Give `model` plain tensors in the place of those that were made in `torch.inference_mode`; tied ones stay tied.

    Those can neither be written nor learned with outside of it.
    """
    made: dict[int, Tensor] = {}
    with torch.inference_mode(False):
        for module in model.modules():
            for place in (module._parameters, module._buffers):
                for name, tensor in place.items():
                    if tensor is None or not tensor.is_inference():
                        continue
                    if id(tensor) not in made:
                        copy = tensor.clone()
                        learned = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(copy, requires_grad=tensor.requires_grad) if learned else copy
                    place[name] = made[id(tensor)]  # type: ignore[assignment]


def is_frozen(model: nn.Module) -> bool:
    """Whether integer codes have replaced the weights."""
    frozen = [float_weight(layer) is None for _, layer in quantized_layers(model) if layer.weight_quantizer is not None]
    return bool(frozen) and all(frozen)


def units(model: nn.Module) -> list[Unit]:
    """Blocks (residual, transformer, attention) and the single layers outside them, in order of registration."""
    found: list[Unit] = []
    for name, module in _blocks("", model):
        layers = tuple((f"{name}.{inner}".rstrip("."), layer) for inner, layer in quantized_layers(module))
        if layers:
            found.append(Unit(name, module, layers))
    return found


def unit_count(model: nn.Module) -> int:
    """How many units `model` has, or would have once all its layers are quantizable."""
    return sum(any(isinstance(layer, tuple(QUANTIZABLE)) for layer in module.modules()) for _, module in _blocks("", model))


def _blocks(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Blocks below `module`, and the layers outside them, by name."""
    if type(module).__name__.endswith(BLOCKS) or isinstance(module, tuple(QUANTIZABLE)):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _blocks(f"{name}.{child_name}".lstrip("."), child)

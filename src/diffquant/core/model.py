"""ModelState, the one attribute on a quantizable denoiser; its layers and quantizers, switched on and off, and frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from diffquant.core.clock import StepClock
from diffquant.core.correction import Correction
from diffquant.core.dynamic import DynamicQuantizer
from diffquant.core.layers import QuantizedLayer
from diffquant.core.operand import OperandQuantizer
from diffquant.core.quantizer import Quantizer
from diffquant.errors import SpecError

ATTRIBUTE = "diffquant"  # of a denoiser


@dataclass
class ModelState:
    """The state of a denoiser, its attribute ``diffquant``.

    ``timestep``: name and position of the argument that the clock follows; None while the model is not quantizable. ``recipe``:
    name of the recipe that it was quantized by. ``attachment``: the correction at work (`sampling.correction`), which a float model
    may have too. ``warned``: whether a warning said that nothing applies the correction. ``engine``: what it computes with
    (`engines.base`), None: simulated.
    """

    clock: StepClock = field(default_factory=StepClock)
    timestep: tuple[str, int] | None = None
    recipe: str = ""
    correction: Correction | None = None
    attachment: Any = None
    warned: bool = False
    engine: Any = None


def state_of(model: nn.Module) -> ModelState | None:
    """The state of a denoiser, None where it has none."""
    state: ModelState | None = vars(model).get(ATTRIBUTE)
    return state


def ensured_state(model: nn.Module) -> ModelState:
    """The state of a denoiser, a new one where it has none."""
    state = vars(model).setdefault(ATTRIBUTE, ModelState())
    assert isinstance(state, ModelState)
    return state


def is_quantizable(model: nn.Module) -> bool:
    """Whether the layers of `model` were made quantizable."""
    state = state_of(model)
    return state is not None and state.timestep is not None


def clock_of(model: nn.Module) -> StepClock:
    """The clock that the quantizers of a quantizable `model` share."""
    state = state_of(model)
    assert state is not None, f"{type(model).__name__} is not quantizable"
    return state.clock


def correction_of(model: nn.Module) -> Correction | None:
    """The correction that a denoiser was given, which is saved with it."""
    state = state_of(model)
    return None if state is None else state.correction


def device_of(module: nn.Module) -> torch.device:
    """Where the module's parameters are (of a frozen one: its buffers); the CPU where it has neither."""
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Every quantizable layer below `module`, by name."""
    for name, child in module.named_modules():
        if isinstance(child, QuantizedLayer):
            yield name, child


def quantizers(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer with scales of its own below `module`, by name; dynamic ones have none."""
    for name, child in module.named_modules():
        if isinstance(child, Quantizer):
            yield name, child


def operand_quantizers(module: nn.Module) -> Iterator[tuple[str, OperandQuantizer]]:
    """Every quantizer below `module`, dynamic ones included, by name."""
    for name, child in module.named_modules():
        if isinstance(child, OperandQuantizer):
            yield name, child


def input_quantizers(module: nn.Module) -> list[OperandQuantizer]:
    """The quantizers of activations below `module`, dynamic ones included."""
    return [quantizer for _, quantizer in operand_quantizers(module) if not quantizer.of_weight]


def dynamic_quantizers(module: nn.Module) -> dict[str, DynamicQuantizer]:
    """The quantizers below `module` whose scales are those of each call, by name."""
    return {name: each for name, each in operand_quantizers(module) if isinstance(each, DynamicQuantizer)}


def activation_quantizers(module: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of activations with scales of their own below `module`, by name."""
    return {name: quantizer for name, quantizer in quantizers(module) if quantizer.clock is not None}


def enable(module: nn.Module, on: bool = True) -> None:
    """Turn all quantizers below `module` on or off. Raises `SpecError` to turn on a quantizer that was never calibrated."""
    every = list(operand_quantizers(module))
    for name, quantizer in every:
        if on and not quantizer.calibrated:
            raise SpecError(f"{name}: not calibrated; a recipe starts with a pass that sets ranges")
    for _, quantizer in every:
        quantizer.enabled = on


def full_precision(module: nn.Module) -> AbstractContextManager[None]:
    """Every quantizer below `module` off, and as it was again afterwards."""
    return switched(module, False)


@contextmanager
def switched(module: nn.Module, on: bool) -> Iterator[None]:
    """Every quantizer below `module` on (or off), and as it was again afterwards."""
    before = [(quantizer, quantizer.enabled) for _, quantizer in operand_quantizers(module)]
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
        layer.freeze()


def is_frozen(model: nn.Module) -> bool:
    """Whether integer codes have replaced the weights."""
    frozen = [layer.float_weight is None for _, layer in quantized_layers(model) if layer.weight_quantizer is not None]
    return bool(frozen) and all(frozen)


def leave_inference_mode(model: nn.Module) -> None:
    """Give `model` plain tensors in the place of those that were made in `torch.inference_mode`; tied ones stay tied.

    Those can neither be written nor learned with outside of it.
    """
    copies: dict[int, Tensor] = {}
    with torch.inference_mode(False):
        for module in model.modules():
            for place in (module._parameters, module._buffers):
                for name, tensor in place.items():
                    if tensor is None or not tensor.is_inference():
                        continue
                    if id(tensor) not in copies:
                        copy = tensor.clone()
                        learned = isinstance(tensor, nn.Parameter)
                        copies[id(tensor)] = nn.Parameter(copy, requires_grad=tensor.requires_grad) if learned else copy
                    place[name] = copies[id(tensor)]  # type: ignore[assignment]

"""What targets share that write for models of diffusers' own classes: the integers and the float weights of layers, and a report.

Not a target itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from diffquant.checkpoint.targets.base import ExportReport
from diffquant.core.layers import QuantizedLayer
from diffquant.core.operand import OperandQuantizer


class LayersReport(ExportReport):
    """``layers``: how each quantized layer is written."""

    layers: dict[str, str]

    def lines(self) -> list[str]:
        """As of every report, and how many layers are written how."""
        error, *others = super().lines()
        return [error, *(f"layers with {how}: {count}" for how, count in Counter(self.layers.values()).most_common()), *others]


def model_class(denoiser: nn.Module) -> Any:
    """The class of diffusers that a denoiser had before it was quantized."""
    return getattr(diffusers, type(denoiser).__name__)


def dtype_of(denoiser: nn.Module) -> torch.dtype:
    """The dtype of the float parameters of a denoiser."""
    return next((each.dtype for each in denoiser.parameters() if each.is_floating_point()), torch.float32)


def empty_model(denoiser: nn.Module) -> Any:
    """A model of diffusers' own class with the denoiser's configuration, its parameters without data."""
    config: Any = denoiser.config
    with init_empty_weights():
        return model_class(denoiser).from_config({key: value for key, value in config.items() if key != "quantization_config"})


def integers_of(layer: QuantizedLayer) -> Tensor | None:
    """Codes minus zero points of a frozen layer, int8 ``[out, in, ...]``; None where it has none, or splits, or they do not fit."""
    weight = layer.weight_quantizer
    if weight is None or weight.codes is None or layer.splits:
        return None
    integers = weight.codes.int() - weight.operands(weight.codes)[1].int()
    return integers.to(torch.int8) if int(integers.min()) >= -128 and int(integers.max()) <= 127 else None


def float_weight(layer: QuantizedLayer) -> Tensor:
    """The weight of a layer without its quantizers: dequantized, divided by `smooth`."""
    read = layer.weight_was_read
    try:
        return layer.weight.detach().as_subclass(Tensor).clone()
    finally:
        layer.weight_was_read = read


@contextmanager
def switched_off(quantizers: Iterable[OperandQuantizer | None]) -> Iterator[None]:
    """Some quantizers of a frozen model off while the block runs."""
    present = [quantizer for quantizer in quantizers if quantizer is not None]
    try:
        for quantizer in present:
            quantizer.enabled = False
        yield
    finally:
        for quantizer in present:
            quantizer.enabled = True

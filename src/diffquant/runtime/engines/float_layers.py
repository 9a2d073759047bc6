"""Layers of the int8 engine that are faster in floating point: those of several products where two take longer than one of float32.

They compute what the simulation does, faster: the weight is dequantized once and laid out for oneDNN, the input is quantized in one
pass over memory. `faster_in_float` is a table of what was measured (`docs/engines.md`), never a measurement of its own.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from diffquant.core.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from diffquant.runtime.engines.exactness import ALL
from diffquant.runtime.engines.kernels import Step, pointwise

LARGE = 1 << 21  # weights of a convolution; from here on two products took no longer than one in floating point


def faster_in_float(layer: QuantizedLayer, products: int, largest: int) -> bool:
    """Whether a layer of so many integer products is better in floating point.

    ``largest``: the kernel's largest exact weight beside 8-bit codes. Kernels that take all weights of 8 bits were 3 to 4 times as
    fast as float32, and the others up to twice: two of their products took 1.0 to 1.4 times as long in a linear layer of any rows,
    channels and outputs, and 0.9 to 1.1 in a convolution, from `LARGE` weights on 0.9 to 1.0.
    """
    if products < 2 or largest >= ALL - 1:
        return False
    weights = layer.in_features * layer.out_features if isinstance(layer, QuantizedLinear) else _weights(layer)
    return isinstance(layer, QuantizedLinear) or pointwise(layer) or weights < LARGE


def _weights(layer: QuantizedConv2d) -> int:
    kernel = layer.kernel_size[0] * layer.kernel_size[1]
    return layer.in_channels // layer.groups * layer.out_channels * kernel


@final
class FloatProduct:
    """A layer's dequantized weight, and the parameter sets of its input. Never written; copies share it."""

    def __init__(self, weight: Tensor, steps: list[list[Step]], splits: tuple[int, ...], reason: str) -> None:
        self.steps, self.splits, self.reason = steps, list(splits), reason
        self.weight = weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight.contiguous()
        self.laid_out = weight.dim() == 2 and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        if self.laid_out:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def __deepcopy__(self, memo: dict[int, object]) -> FloatProduct:
        return self

    def values(self, x: Tensor, row: int, axis: int) -> Tensor:
        """`x` quantized and dequantized in parameter set `row`."""
        parts = x.split(self.splits, dim=axis) if self.splits else (x,)
        found = [step.values(part) for step, part in zip(self.steps[row], parts, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=axis)


class FloatLinear(QuantizedLinear):
    """A linear layer of the engine in floating point; made by `lower`, never constructed."""

    float_product: FloatProduct

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        row = _row(self, x)
        if row is None:
            return super().forward(x)
        product = self.float_product
        values = product.values(x, row, -1)
        if not product.laid_out:
            return functional.linear(values, product.weight, self.bias)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(values, product.weight, self.bias, "none", [], "")
        return output


class FloatConv2d(QuantizedConv2d):
    """A convolution of the engine in floating point, the output channels last; made by `lower`, never constructed."""

    float_product: FloatProduct

    def forward(self, x: Tensor) -> Tensor:
        """``[n, in_channels, h, w]`` -> ``[n, out_channels, h', w']``."""
        row = _row(self, x)
        if row is None:
            return super().forward(x).contiguous(memory_format=torch.channels_last)
        product, given = self.float_product, x.contiguous(memory_format=torch.channels_last)
        output: Tensor = self._conv_forward(product.values(given, row, 1), product.weight, self.bias)
        return output.contiguous(memory_format=torch.channels_last)


FLOATING = (FloatLinear, FloatConv2d)  # for isinstance


def _row(layer: FloatLinear | FloatConv2d, x: Tensor) -> int | None:
    """The parameter set of a call, or None where it is to be simulated."""
    weight, given = layer.weight_quantizer, layer.input_quantizer
    assert weight is not None and given is not None
    switched = not (weight.enabled and given.enabled) or weight.observer is not None or given.observer is not None
    differentiated = torch.is_grad_enabled() and x.requires_grad
    if switched or differentiated or torch.compiler.is_compiling() or x.dtype != torch.float32 or x.device.type != "cpu":
        return None
    rows = given.present_rows(x.device)
    return rows if isinstance(rows, int) else None

"""Products of the int8 engine whose input has scales of the call: a row of a linear layer or 1x1 convolution, or a sample has one.

    q[c] = clamp(round(x[c] / scale) + zero_point)
    y[o] = scale * (sum_c q[c] * weight_scale[o] * weight[o, c] - zero_point * sums[o]) + bias[o]

Scale and zero point are not the kernel's, which has one of them for a call: it puts out the product of the codes, and what is
written around the sum above is computed here. ``sums[o]`` are those of the scaled weights of an output.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from diffquant.core.dynamic import DynamicQuantizer
from diffquant.core.layers import QuantizedLayer
from diffquant.engines.int8.kernels import MAX_CODE, ONE_PASS, ParameterSet, Product, compiled_product, quantized
from diffquant.engines.int8.packed import Packed

ROWS = 512  # of a linear layer at once, so that what is made of them stays in the cache


@final
class DynamicProduct:
    """A layer's weight laid out for the kernels, and how its input is quantized. Never written; copies share it."""

    def __init__(self, layer: QuantizedLayer, inputs: DynamicQuantizer, matrices: list[Packed]) -> None:
        self.inputs, self.spec = inputs, inputs.spec
        self.raised = -inputs.spec.code_min  # signed codes become unsigned ones
        last = inputs.spec.code_max + self.raised
        self.product = Product(layer, [[ParameterSet(1.0, 1.0, 0, last, matrices)]], ())
        self.padding: list[int] = []
        if self.product.conv:  # padded here, with the zero point of each sample
            self.padding, self.product.padding = [self.product.padding[1]] * 2 + [self.product.padding[0]] * 2, [0, 0]
        self.chunked = not self.product.conv and not inputs.per_sample
        sums = torch.stack([packed.sums for packed in matrices]).sum(0).float()
        self.sums = sums.view(layer.channel_view)
        self.view, smooth = layer.channel_view, layer.smooth
        self.inverse = None if smooth is None else (1 / smooth.detach().float()).view(self.view)

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicProduct:
        return self

    def output(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output for a float32 input and bias."""
        if not self.chunked or torch.compiler.is_compiling():
            return self._output(x, bias)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= ROWS:
            return self._output(rows, bias).view(*x.shape[:-1], -1)
        output = torch.empty(len(rows), self.product.outputs)
        for some, place in zip(rows.split(ROWS), output.split(ROWS), strict=True):
            place.copy_(self._output(some, bias))
        return output.view(*x.shape[:-1], -1)

    def _output(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.inverse is not None:
            x = x * self.inverse
        scale, zero_point = self.inputs.operands(x)
        zero_point = zero_point + self.raised
        codes = self._codes(x, scale, zero_point)
        if any(self.padding):
            codes = self._padded(codes, zero_point)
        if torch.compiler.is_compiling():
            summed: Tensor = compiled_product([codes], None, self.product.number, None, torch.float32)
            output = scale * (summed - zero_point * self.sums)
            return output if bias is None else output + bias.view(self.view)
        summed = self.product.multiply([codes], 0, None, torch.float32)
        summed.addcmul_(zero_point, self.sums, value=-1).mul_(scale)
        return summed if bias is None else summed.add_(bias.view(self.view))

    def _codes(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Unsigned codes of `x`."""
        last = self.spec.code_max + self.raised
        if torch.compiler.is_compiling() or not ONE_PASS:
            return (x / scale).round().add(zero_point).clamp(0, last).to(torch.uint8)
        codes = quantized((x * (1 / scale)).add_(zero_point), 1.0, 0, torch.uint8)
        return codes if last == MAX_CODE else codes.clamp_(max=last)

    def _padded(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        """`codes` with edges that stand for zero: the zero point of each sample."""
        left, right, top, bottom = self.padding
        samples, channels, height, width = codes.shape
        edged = zero_point.to(torch.uint8).expand(samples, channels, top + height + bottom, left + width + right)
        edged = edged.clone(memory_format=torch.channels_last)
        edged[:, :, top : top + height, left : left + width] = codes
        return edged

"""Integer weights in the layout of PyTorch's kernels: digits that these multiply exactly, in parts of the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from diffquant.core.layers import QuantizedConv2d, QuantizedLayer
from diffquant.engines.int8 import nibbles

Held = nullcontext[Tensor] | nibbles.Nibbles  # entered, it is the weight as its kernel reads it
Geometry = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation and groups of a convolution


class Part(NamedTuple):
    """Some outputs of a weight, from `first` to before `end`."""

    first: int
    end: int
    weight: Held


@final
class Packed:
    """One digit of an integer weight [out, in, ...] in the layout of a kernel, with its scale for each output.

    ``halves``: all outputs, or after `halve` the first and the last half of them; each in parts. Weights of up to 4 bits are packed
    (`nibbles`) until a call has too few rows for it, and large ones cut into parts, which share less memory to be unpacked into.
    ``sums``: of the scaled weights of each output, float64; ``count`` of all weights.
    """

    def __init__(self, digits: Int[Tensor, "out ..."], factor: int, scale: Float[Tensor, " out"], layer: QuantizedLayer) -> None:
        self.factor, self.scale = factor, scale * float(factor)
        self.zero_point = torch.zeros(len(digits), dtype=torch.int32)
        self.sums, self.count = digits.flatten(1).sum(1, dtype=torch.int64) * self.scale.double(), digits.numel()
        self.shape = digits.shape
        self._geometry: Geometry | None = None
        if isinstance(layer, QuantizedConv2d) and not pointwise(layer):
            self._geometry = list(layer.stride), list(map(int, layer.padding)), list(layer.dilation), layer.groups
        self._narrow = nibbles.available() and nibbles.packable(digits)
        self.halves = [self._parts(digits, 0)]

    def _parts(self, digits: Int[Tensor, "out ..."], first: int) -> list[Part]:
        """Outputs from `first` on, laid out."""
        parts = []
        for each in digits.split(self._size(digits)):
            parts.append(Part(first, first + len(each), self._laid_out(each.contiguous())))
            first += len(each)
        return parts

    def _size(self, digits: Int[Tensor, "out ..."]) -> int:
        """How many outputs are laid out together: all of them, or a power of two times `nibbles.OUTPUTS`.

        Weights that are unpacked are cut at `nibbles.PART`. Convolutions whose outputs are a multiple of three such blocks are cut
        too: for pictures of 8 x 8 oneDNN 3.12 lays those out again at every call, 80 times as slow with 2,560 channels.
        """
        outputs, block = len(digits), nibbles.OUTPUTS
        if self._geometry is not None and self._geometry[-1] > 1:
            return outputs
        most = outputs
        if self._narrow:
            most = min(outputs, nibbles.PART // digits[0].numel())
        if most == outputs and (self._geometry is None or outputs % (3 * block)):
            return outputs
        return block << max(0, (most // block).bit_length() - 1)

    def _laid_out(self, digits: Int[Tensor, "out ..."]) -> Held:
        ops = torch.ops.onednn
        if self._geometry is not None:
            weight: Tensor = ops.qconv_prepack(digits, torch.ones(len(digits)), 1.0, 0, *self._geometry, None)
        else:
            weight = ops.qlinear_prepack(digits.flatten(1), None)
        return nibbles.Nibbles(weight) if self._narrow else nullcontext(weight)

    def parts(self, half: int | None, rows: int) -> list[Part]:
        """The parts of one half, or of all outputs, for a product of so many `rows`."""
        if self._narrow and rows < nibbles.ROWS:
            digits, self._narrow = self._digits(), False
            self.halves = [self._parts(each, index * len(each)) for index, each in enumerate(digits.chunk(len(self.halves)))]
        if half is not None or len(self.halves) == 1:
            return self.halves[half or 0]
        return [part for each in self.halves for part in each]

    def halve(self) -> None:
        """Lay out each half of the outputs of a linear layer for itself, so that they can be multiplied apart."""
        if len(self.halves) == 1:
            self.halves = [self._parts(half, index * len(half)) for index, half in enumerate(self._digits().chunk(2))]

    def _digits(self) -> Int[Tensor, "out ..."]:
        return torch.cat([_dense(part.weight) for half in self.halves for part in half])

    def integers(self) -> Int[Tensor, "out ..."]:
        """What was laid out, times the weight of its digit, int32."""
        return self._digits().view(self.shape).int().mul_(self.factor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return self


def _dense(held: Held) -> Int[Tensor, "out ..."]:
    """A weight out of its kernel's layout, int8; that of linear layers holds [in, out]."""
    with held as weight:
        dense = weight.to_dense()
        integers: Tensor = dense.t() if dense.dim() == 2 else dense
        return integers.clone()


def pointwise(layer: QuantizedConv2d) -> bool:
    """Whether a convolution is a linear layer of every pixel. Its own kernel may lay the weight out again at every call."""
    return layer.kernel_size == layer.stride == (1, 1) and not any(map(int, layer.padding)) and layer.groups == 1


def kernel_of(layer: QuantizedLayer) -> str:
    """The kernel, as `exactness` names it, that multiplies the codes of `layer`."""
    return "torch convolution" if isinstance(layer, QuantizedConv2d) and not pointwise(layer) else "torch linear"


def digits(integers: Int[Tensor, ...], largest: int) -> Iterator[tuple[Int8[Tensor, ...], int]]:
    """int8 tensors and factors whose products add up to `integers`; the least first, at least one.

    No value is larger than `largest` (2 to 128), the largest weight that a kernel multiplies exactly: from 128 on integers of 8
    bits are one digit, beyond these digits have base 256; with 64, base 128.
    """
    base, factor = 1 << largest.bit_length(), 1
    while True:
        low, high = (int(value) for value in integers.aminmax())
        if -largest <= low and high <= min(largest, 127):
            yield integers.to(torch.int8), factor
            return
        digit = torch.remainder(integers.int() + base // 2, base) - base // 2
        yield digit.to(torch.int8), factor
        integers, factor = (integers.int() - digit) // base, factor * base

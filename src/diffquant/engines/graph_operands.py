"""What the quantized operands of a layer or an attention are, as numbers that a graph can be written from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffquant.core.attention import OPERANDS, AttentionProducts
from diffquant.core.dynamic import DynamicQuantizer
from diffquant.core.layers import QuantizedLayer
from diffquant.core.quantizer import Quantizer
from diffquant.engines.exactness import CODES
from diffquant.engines.int8.packed import digits

Digit = tuple[Tensor, Tensor | None]  # int8 [out, in, ...] and its scale for each output
Largest = Callable[[int], int]  # the largest integer that a kernel multiplies exactly with codes from 0 to a last one


class Grid(NamedTuple):
    """The quantization grid of one part of an operand; ``scales``: of the intervals, where there are parameter sets."""

    scale: float
    zero_point: int
    low: int  # smallest and largest code, minus the zero point
    high: int
    clamps: bool
    scales: Tensor | None

    @property
    def signed(self) -> bool:
        """Whether the codes minus the zero point fit int8: the zero point is then written as 0."""
        return self.low >= -128 and self.high <= 127

    @property
    def last(self) -> int:
        """The largest unsigned code that a kernel may see; it may add 128 to signed ones."""
        return min(self.high + 128, CODES[0]) if self.signed else self.high - self.low

    @property
    def magnitude(self) -> int:
        """The largest magnitude of a signed code, of one that is not signed after 128 was subtracted."""
        return max(-self.low, self.high) if self.signed else 128


class Part(NamedTuple):
    """One part of the input channels of a layer."""

    grid: Grid | None
    inverse: Tensor | None
    digits: list[Digit]


def grids_of(quantizer: Quantizer | None) -> list[Grid]:
    """The grids of a quantizer, by part of the channels."""
    if quantizer is None:
        return []
    spec, row, table, grids = quantizer.spec, _row(quantizer), quantizer.table, []
    for part in range(quantizer.scale.shape[1]):
        zero_point = int(quantizer.zero_point[row, part])
        low, high = spec.code_min - zero_point, spec.code_max - zero_point
        scales = None if table is None else quantizer.scale[table.long(), part]
        scale = float(quantizer.scale[row, part]) if scales is None else 1.0
        grids.append(Grid(scale, zero_point, low, high, spec.bits < 8, scales))
    return grids


def parts_of(layer: QuantizedLayer, largest: Largest) -> list[Part]:
    """The parts of the input channels of a layer, which quantize and multiply apart; no digit of a weight exceeds `largest`."""
    assert not isinstance(layer.input_quantizer, DynamicQuantizer), "`check` refuses it"
    grids = grids_of(layer.input_quantizer)
    weights = _weights(layer, [largest(grid.last) for grid in grids])
    nothing = [None] * len(weights)
    return [Part(*part) for part in zip(grids or nothing, _inverses(layer) or nothing, weights, strict=True)]


def operands_of(products: AttentionProducts) -> dict[str, Grid | None]:
    """The grid of each operand of an attention, by its name; None where it stays in floating point."""
    return {name: next(iter(grids_of(getattr(products, name))), None) for name in OPERANDS}


def _inverses(layer: QuantizedLayer) -> list[Tensor] | None:
    """By part of the input channels, what they are multiplied by before they are quantized: 1 / (smooth * 2^shift)."""
    smooth, inputs = layer.smooth, layer.input_quantizer
    inverse = None if smooth is None else 1 / smooth
    if inputs is not None and inputs.shift is not None:
        powers = torch.exp2(-inputs.shift[_row(inputs)].float())
        inverse = powers if inverse is None else powers * inverse
    return (
        None if inverse is None else [each.view(layer.channel_view) for each in inverse.split(list(layer.splits) or [len(inverse)])]
    )


def _weights(layer: QuantizedLayer, largest: Sequence[int]) -> list[list[Digit]]:
    """By part of the input channels, the digits of the shifted integer weight and their scales for each output.

    A weight that is not quantized is one digit without scale. ``largest``: of the digits of each part; none where the input is not
    quantized, so that no integers are multiplied.
    """
    quantizer, inputs = layer.weight_quantizer, layer.input_quantizer
    whole = layer.weight_to_quantize() if quantizer is None else quantizer.codes
    assert whole is not None
    outputs, channels = whole.shape[:2]
    sizes = list(layer.splits) or [channels]
    shift = torch.zeros(outputs, channels, dtype=torch.int32)
    if inputs is not None and inputs.shift is not None:
        groups = inputs.shift[_row(inputs)].int().view(-1, channels)
        shift = groups.repeat_interleave(outputs // len(groups), dim=0)
    shift = shift.view(outputs, channels, *[1] * (whole.dim() - 2))
    if quantizer is None:
        return [[(values, None)] for values in (whole * torch.exp2(shift.float())).split(sizes, 1)]
    integers = (whole.int() - quantizer.operands(whole)[1].int()) << shift
    weights: list[list[Digit]] = []
    for part, values in enumerate(integers.split(sizes, 1)):
        scale = quantizer.scale[:, part].expand(outputs)
        bound = largest[part] if largest else 128
        weights.append([(digit, scale * float(factor)) for digit, factor in digits(values, bound)])
    return weights


def _row(quantizer: Quantizer) -> int:
    """A row of the quantizer that is in use; what is read from it is the same in all others (`check`)."""
    return 0 if quantizer.table is None else int(quantizer.table[0])

"""What the quantized operands of a layer or an attention are, as numbers that a graph can be written from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffquant.core.attention import OPERANDS, AttentionProducts
from diffquant.core.layers import QuantizedLayer
from diffquant.core.quantizer import Quantizer
from diffquant.engines.exactness import CODES
from diffquant.engines.int8.packed import digits

Digit = tuple[Tensor, Tensor | None]  # int8 [out, in, ...] and its scale for each output
Largest = Callable[[int], int]  # the largest integer that a kernel multiplies exactly with codes from 0 to a last one


class Step(NamedTuple):
    """What quantizes one part of an operand, as numbers; ``scales``: of the intervals, where there are parameter sets."""

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

    step: Step | None
    inverse: Tensor | None
    digits: list[Digit]


def steps_of(quantizer: Quantizer | None) -> list[Step]:
    """By part of the channels, what a quantizer does."""
    if quantizer is None:
        return []
    spec, row, table, steps = quantizer.spec, _row(quantizer), quantizer.table, []
    for part in range(quantizer.scale.shape[1]):
        zero_point = int(quantizer.zero_point[row, part])
        low, high = spec.code_min - zero_point, spec.code_max - zero_point
        scales = None if table is None else quantizer.scale[table.long(), part]
        scale = float(quantizer.scale[row, part]) if scales is None else 1.0
        steps.append(Step(scale, zero_point, low, high, spec.bits < 8, scales))
    return steps


def parts_of(layer: QuantizedLayer, largest: Largest) -> list[Part]:
    """The parts of the input channels of a layer, which quantize and multiply apart; no digit of a weight exceeds `largest`."""
    given = steps_of(layer.input_quantizer)
    weights = _weights(layer, [largest(step.last) for step in given])
    steps: Sequence[Step | None] = given or [None] * len(weights)
    inverses: Sequence[Tensor | None] = _inverses(layer) or [None] * len(weights)
    return [Part(*given) for given in zip(steps, inverses, weights, strict=True)]


def operands_of(products: AttentionProducts) -> dict[str, Step | None]:
    """What quantizes each operand of an attention, by its name; None where it stays in floating point."""
    return {name: next(iter(steps_of(getattr(products, name))), None) for name in OPERANDS}


def _inverses(layer: QuantizedLayer) -> list[Tensor] | None:
    """By part of the input channels, what they are multiplied by before they are quantized: 1 / (smooth * 2^shift)."""
    smooth, given = layer.smooth, layer.input_quantizer
    inverse = None if smooth is None else 1 / smooth
    if given is not None and given.shift is not None:
        powers = torch.exp2(-given.shift[_row(given)].float())
        inverse = powers if inverse is None else powers * inverse
    return (
        None if inverse is None else [each.view(layer.channel_view) for each in inverse.split(list(layer.splits) or [len(inverse)])]
    )


def _weights(layer: QuantizedLayer, largest: Sequence[int]) -> list[list[Digit]]:
    """By part of the input channels, the digits of the shifted integer weight and their scales for each output.

    A weight that is not quantized is one digit without scale. ``largest``: of the digits of each part; none where the input is not
    quantized, so that no integers are multiplied.
    """
    quantizer, given = layer.weight_quantizer, layer.input_quantizer
    whole = layer.weight_to_quantize() if quantizer is None else quantizer.codes
    assert whole is not None
    outputs, channels = whole.shape[:2]
    shift = torch.zeros(outputs, channels, dtype=torch.int32)
    if given is not None and given.shift is not None:
        shift = (
            given.shift[_row(given)]
            .int()
            .view(-1, channels)
            .repeat_interleave(outputs // (given.shift.shape[1] // channels), dim=0)
        )
    sizes, beside = list(layer.splits) or [channels], [1] * (whole.dim() - 2)
    found: list[list[Digit]] = []
    for part, (values, shifts) in enumerate(zip(whole.split(sizes, 1), shift.split(sizes, 1), strict=True)):
        shifts = shifts.reshape(*shifts.shape, *beside)
        if quantizer is None:
            found.append([(values * torch.exp2(shifts.float()), None)])
            continue
        scale, zero_point = (
            each[:, part].expand(outputs).reshape(-1, 1, *beside) for each in (quantizer.scale, quantizer.zero_point)
        )
        integers = (values.int() - zero_point.int()) << shifts
        bound = largest[part] if largest else 128
        found.append([(digit, scale.flatten() * float(factor)) for digit, factor in digits(integers, bound)])
    return found


def _row(quantizer: Quantizer) -> int:
    """A row of the quantizer that is in use; what is read from it is the same in all others (`check`)."""
    return 0 if quantizer.table is None else int(quantizer.table[0])

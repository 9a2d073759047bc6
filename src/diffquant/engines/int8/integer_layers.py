"""Layers that compute with integers: a frozen layer's class while it is lowered, and the packed codes of its weight.

    q[c] = clamp(round(x[c] / (scale * smooth[c] * 2^shift[c])) + zero_point)
    y[o] = scale * weight_scale[o] * sum_c (q[c] - zero_point) * ((code[o, c] - weight_zero_point[o]) * 2^shift[c]) + bias[o]

A weight is laid out once for each distinct row of `shift`. Integer weights that the kernels do not multiply exactly beside the
input's codes (`exactness`: on any machine shifted ones and asymmetric ones of 8 bits, on some all beyond 64) are written as two
digits and cost two products. Half a scale, which the simulation rounds to even, may go to either side, and division by the scale is
multiplication: codes on an edge may differ by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from diffquant.core.dynamic import DynamicQuantizer
from diffquant.core.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from diffquant.core.quantizer import Quantizer
from diffquant.engines.exactness import answer_of
from diffquant.engines.int8.dynamic import DynamicProduct
from diffquant.engines.int8.kernels import OUTPUTS, ParameterSet, Product, compiled_product
from diffquant.engines.int8.packed import Packed, digits, kernel_of


class LaidOut:
    """A lowered module: its copies share what was laid out; pickled, it is a plain one that is lowered again."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in vars(self).items() if name != "product"}
        return _plain, (simulated_class(self),), state, None, None, _lower_again


def simulated_class(layer: object) -> type[QuantizedLayer]:
    """The class that a layer of the engine had before."""
    return QuantizedConv2d if isinstance(layer, QuantizedConv2d) else QuantizedLinear


def _plain(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _lower_again(layer: nn.Module, state: dict[str, Any]) -> None:
    """Give an unpickled layer its state, and lower it where this machine can."""
    from diffquant.engines.int8.engine import Int8, lower_layer  # which imports this file

    layer.__setstate__(state)
    if not Int8.unsupported():
        lower_layer(layer)  # type: ignore[arg-type]


class PackedCodes(LaidOut, Quantizer):
    """A weight quantizer whose codes exist only in the layout of the integer kernels; `codes` unpacks them at every look.

    ``packed``: by distinct row of the input's shift, then by split, the digits of the integer weight.
    """

    packed: list[list[list[Packed]]]
    rows_of_shift: Int[Tensor, "rows channels"] | None
    groups: int

    def pack(self, layer: QuantizedLayer, inputs: Quantizer | DynamicQuantizer) -> None:
        """Lay the codes out for the kernel of `layer` and the codes of its input quantizer.

        One matrix for each distinct row of the input's shift, split and digit.
        """
        codes, shift = self._buffers.pop("codes"), inputs.shift
        largest = answer_of(kernel_of(layer)).largest(inputs.spec.code_max - inputs.spec.code_min)
        assert codes is not None
        self.rows_of_shift, self.groups = None if shift is None else shift.unique(dim=0), getattr(layer, "groups", 1)
        scale = self.scale.expand(len(codes), -1)  # [out, splits]
        self.packed = []
        for row in [None] if self.rows_of_shift is None else self.rows_of_shift:
            integers = integer_weight(self, codes) if row is None else integer_weight(self, codes) << self._beside(row, codes)
            parts = integers.split(list(self.splits) or integers.shape[1], dim=1)
            self.packed.append(
                [
                    [Packed(digit, factor, scale[:, part], layer) for digit, factor in digits(values, largest)]
                    for part, values in enumerate(parts)
                ]
            )

    @property
    def codes(self) -> Tensor | None:  # type: ignore[override]
        """The codes, unpacked: a new tensor each time."""
        parts = [torch.stack([packed.integers() for packed in part]).sum(0, dtype=torch.int32) for part in self.packed[0]]
        weight = torch.cat(parts, dim=1)
        if self.rows_of_shift is not None:
            weight = weight >> self._beside(self.rows_of_shift[0], weight)
        _, zero_point = self.operands(weight)
        return (weight + zero_point.int()).contiguous().to(torch.int8 if self.spec.symmetric else torch.uint8)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a plain quantizer that holds its codes."""
        state = {name: value for name, value in vars(self).items() if name not in ("packed", "rows_of_shift", "groups")}
        state["_buffers"] = {**self._buffers, "codes": self.codes}
        return _plain, (Quantizer,), state

    def frozen_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, computed at each call: the packed codes are here to save memory."""
        return self.dequantized_codes().to(dtype)

    def unpack(self) -> None:
        """Become a plain quantizer that holds its codes."""
        codes = self.codes
        del self.packed, self.rows_of_shift, self.groups
        self.__class__ = Quantizer  # type: ignore[assignment]
        self._buffers["codes"] = codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if fn(torch.empty(0)).device.type != "cpu":
            self.unpack()  # it is of its parent's class then, which rules super() out
        applied: nn.Module = Quantizer._apply(self, fn, recurse)
        return applied

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = self.codes

    def _beside(self, row: Int[Tensor, " channels"], codes: Tensor) -> Tensor:
        """A row of shift as it lies beside codes [out, in / groups, ...]."""
        outputs, channels = codes.shape[:2]
        beside = row.int().view(self.groups, channels).repeat_interleave(outputs // self.groups, dim=0)
        return beside.view(outputs, channels, *[1] * (codes.dim() - 2))


def integer_weight(weight: Quantizer, codes: Tensor) -> Tensor:
    """Codes minus zero point: int8 where that is the codes themselves, else int32."""
    _, zero_point = weight.operands(codes)
    return codes if codes.dtype == torch.int8 and not zero_point.any() else codes.int() - zero_point.int()


def products_of(weight: Quantizer, largest: int) -> int:
    """How many products the widest part of a frozen weight takes, no digit of it larger than `largest`; without a shift."""
    assert weight.codes is not None
    return sum(1 for _ in digits(integer_weight(weight, weight.codes), largest))


def sets_of(layer: QuantizedLayer, inputs: Quantizer, weight: Quantizer) -> list[list[ParameterSet]]:
    """The parameter sets of a layer's input, [sets][splits]; their matrices where the weight is packed."""
    raised = -inputs.spec.code_min  # signed codes become unsigned ones
    rows = []
    for row in range(inputs.rows):
        factor = torch.ones(1) if layer.smooth is None else layer.smooth.detach().float()
        if inputs.shift is not None:
            factor = factor * torch.exp2(inputs.shift[row].float())
        matrices: Sequence[Sequence[Packed]] = [()] * max(1, len(inputs.splits))
        if isinstance(weight, PackedCodes):
            matrices = weight.packed[0]
            if inputs.shift is not None and weight.rows_of_shift is not None:
                matrices = weight.packed[int((weight.rows_of_shift == inputs.shift[row]).all(dim=1).nonzero()[0])]
        factors = factor.split(list(inputs.splits)) if inputs.splits and len(factor) > 1 else [factor] * len(matrices)
        parts = []
        for part, channels in enumerate(factors):
            scale, zero_point = float(inputs.scale[row, part]), int(inputs.zero_point[row, part]) + raised
            inverse = 1.0 / scale if len(factor) == 1 else (1.0 / (scale * channels)).view(layer.channel_view)
            parts.append(ParameterSet(scale, inverse, zero_point, inputs.spec.code_max + raised, matrices[part]))
        rows.append(parts)
    return rows


class IntegerLinear(LaidOut, QuantizedLinear):
    """A lowered linear layer; made by `Int8.install`, never constructed."""

    product: Product | DynamicProduct

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        return _forward(self, input) if computes_integers(self) and not differentiated(input) else super().forward(input)


class IntegerConv2d(LaidOut, QuantizedConv2d):
    """A lowered convolution; made by `Int8.install`, never constructed."""

    product: Product | DynamicProduct

    def forward(self, input: Tensor) -> Tensor:
        """``[n, in_channels, h, w]`` -> ``[n, out_channels, h', w']``, channels last in memory."""
        if not computes_integers(self) or differentiated(input):
            return super().forward(input)
        return _forward(self, input.contiguous(memory_format=torch.channels_last))


IntegerLayer = IntegerLinear | IntegerConv2d


class ChannelsLastConv2d(QuantizedConv2d):
    """A convolution that stays in floating point; what follows it expects channels last, as integer convolutions write them."""

    def forward(self, input: Tensor) -> Tensor:
        """As without the engine; the output channels last."""
        return super().forward(input).contiguous(memory_format=torch.channels_last)


INTEGER = (IntegerLinear, IntegerConv2d)  # for isinstance


def computes_integers(layer: IntegerLayer) -> bool:
    """Whether the quantizers are on and unobserved, and the codes packed."""
    weight, inputs = layer.weight_quantizer, layer.input_quantizer
    if weight is None or inputs is None or not isinstance(weight, PackedCodes):
        return False
    return weight.unobserved and inputs.unobserved


def differentiated(x: Tensor) -> bool:
    """Whether gradients have to flow through what is made of `x`; integer kernels have none, the simulation does."""
    return torch.is_grad_enabled() and x.requires_grad


def _forward(layer: IntegerLayer, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return _computed(layer, x)
    with torch._C.DisableTorchFunction():  # the mode that finds an attention's products looks at every operation in it
        product, bias = layer.product, layer.bias
        plain = x.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
        if plain and isinstance(product, Product) and product.alone is not None:
            return product.single(x, bias)
        return _computed(layer, x)


def _computed(layer: IntegerLayer, x: Tensor) -> Tensor:
    inputs, product = layer.input_quantizer, layer.product
    bias = bias_of(layer)
    if isinstance(product, DynamicProduct):
        return product.output(x.float(), bias).to(x.dtype)
    assert isinstance(inputs, Quantizer)
    dtype = x.dtype if x.dtype in OUTPUTS else torch.float32
    rows = inputs.present_rows(x.device)
    if isinstance(rows, int) or torch.compiler.is_compiling():
        return multiply(product, product.codes(x.float(), rows), rows, bias, dtype).to(x.dtype)
    chosen = [(row, (rows == row).nonzero().flatten()) for row in rows.unique().tolist()]  # samples at different timesteps
    parts = [multiply(product, product.codes(x[samples].float(), row), row, bias, dtype) for row, samples in chosen]
    return torch.cat(parts)[torch.cat([samples for _, samples in chosen]).argsort()].to(x.dtype)


def multiply(product: Product, codes: list[Tensor], row: int | Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The output of a layer for codes of its input (one tensor a split) in parameter set `row`."""
    if torch.compiler.is_compiling():
        output: Tensor = compiled_product(codes, None if isinstance(row, int) else row, product.number, bias, dtype)
        return output
    return product.multiply(codes, int(row), bias, dtype)


def bias_of(layer: IntegerLayer) -> Tensor | None:
    """Its bias as the kernels take it: float32."""
    return None if layer.bias is None else layer.bias.float()

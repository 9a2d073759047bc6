"""The int8 engine: a frozen model computed with integers on a CPU, by PyTorch's own kernels and no further dependency.

`lower` changes the class of frozen layers in place, as `make_quantizable` did before: their integer weights are laid out once for
the kernels and held in that form only; a call quantizes its input to codes of 2-8 bits, held in 8, and multiplies integers.

    q[c] = clamp(round(x[c] / (step * smooth[c] * 2^shift[c])) + zero_point)
    y[o] = step * weight_step[o] * sum_c (q[c] - zero_point) * ((code[o, c] - weight_zero_point[o]) * 2^shift[c]) + bias[o]

A weight is laid out once for each distinct row of `shift`. Integer weights that do not fit 8 bits (shifted ones, or asymmetric ones
of 8 bits) are written as two digits, the second 256 times as heavy, and cost two products. Half a step, which
the simulation rounds to even, may go to either side, and division by the step is multiplication: codes on an edge may differ by
one.

A lowered model still has its codes: `state_dict`, saving and `simulate` unpack them, and so does moving it to another device. What
cannot be lowered stays as it was, and `lower` says why.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import FeedForward
from jaxtyping import Int
from torch import Tensor, nn

from diffquant.core.layers import AttentionProducts, QuantizedConv2d, QuantizedLayer, QuantizedLinear
from diffquant.core.quantizer import Quantizer
from diffquant.core.surgery import quantized_layers
from diffquant.runtime.engines.attention import BlockedProducts
from diffquant.runtime.engines.kernels import (
    OUTPUTS,
    Packed,
    Product,
    Step,
    compiled_feed_forward,
    compiled_product,
    digits,
    feed_forward,
)


class Lowered(NamedTuple):
    """What became of one layer or attention: `reason` is empty where it computes with integers."""

    name: str
    reason: str


def unsupported() -> str:
    """Why this machine has no fast and exact integer kernels; empty where it has.

    Without the instructions named, products of 8-bit codes saturate at 16 bits or run slower than floating point.
    """
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    capabilities: dict[str, Any] = dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities.get("avx_vnni") or capabilities.get("amx_int8") or torch.cpu._is_vnni_supported():
        return ""
    return "this CPU has neither AVX-512 VNNI, AVX-VNNI nor AMX"


def lower(model: nn.Module) -> list[Lowered]:
    """Let every layer and attention of a frozen `model` that can compute with integers, in place; a row for each."""
    rows = [Lowered(name, lower_layer(layer)) for name, layer in quantized_layers(model)]
    for name, module in model.named_modules():
        if type(module) is FeedForward and type(module.net[0]) in (GELU, GEGLU):
            module.__class__ = IntegerFeedForward
            if type(module.net[0]) is GEGLU and _one_product(module.net[0].proj) and isinstance(module.net[2], IntegerLinear):
                module.net[0].proj.product.halve()
        if type(module) is AttentionProducts:
            module.__class__ = BlockedProducts
        if isinstance(module, BlockedProducts):
            rows.append(Lowered(name.removesuffix(".attention_products"), ""))
    return rows


def simulate(model: nn.Module) -> None:
    """Undo `lower`: every layer holds its codes again and computes with them in floating point."""
    for _, layer in quantized_layers(model):
        if isinstance(layer.weight_quantizer, PackedCodes):
            layer.weight_quantizer.unpack()
        if isinstance(layer, (IntegerLinear, IntegerConv2d)):
            layer.__class__ = QuantizedLinear if isinstance(layer, IntegerLinear) else QuantizedConv2d  # type: ignore[assignment]
            del layer.product
    for module in model.modules():
        if isinstance(module, IntegerFeedForward):
            module.__class__ = FeedForward
        if isinstance(module, BlockedProducts):
            module.__class__ = AttentionProducts  # type: ignore[assignment]


def lower_layer(layer: QuantizedLayer) -> str:
    """Let one frozen layer compute with integers, in place; the reason why not where it cannot."""
    weight, given = layer.weight_quantizer, layer.input_quantizer
    if weight is None or given is None:
        return "its weight stays in floating point" if weight is None else "its input stays in floating point"
    if isinstance(weight, PackedCodes):
        return ""
    if weight.codes is None:
        return "its weight is not frozen"
    if weight.codes.device.type != "cpu":
        return f"it is on {weight.codes.device}"
    if isinstance(layer, QuantizedConv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return f"padding {layer.padding!r}, mode {layer.padding_mode!r}"
    weight.__class__ = PackedCodes
    assert isinstance(weight, PackedCodes)
    weight.pack(layer, given.shift)
    layer.__class__ = IntegerConv2d if isinstance(layer, QuantizedConv2d) else IntegerLinear
    layer.product = Product(layer, _steps(layer, given, weight), given.splits)  # type: ignore[assignment]
    return ""


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc); elsewhere nothing.

    Unpacking and laying out the weights of a large model one by one leaves holes as large as half the model.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class PackedCodes(Quantizer):
    """A weight quantizer whose codes exist only in the layout of the integer kernels; `codes` unpacks them at every look.

    ``packed``: by distinct row of the input's shift, then by split, the digits of the integer weight.
    """

    packed: list[list[list[Packed]]]
    rows_of_shift: Int[Tensor, "rows channels"] | None
    groups: int

    def pack(self, layer: QuantizedLayer, shift: Int[Tensor, "sets channels"] | None) -> None:
        """Lay the codes out for the kernel of `layer`: one matrix for each distinct row of `shift`, split and digit."""
        codes = self._buffers.pop("codes")
        assert codes is not None
        self.rows_of_shift, self.groups = None if shift is None else shift.unique(dim=0), getattr(layer, "groups", 1)
        zero_point, scale = self.zero_point.expand(len(codes), -1), self.scale.expand(len(codes), -1)  # [out, splits]
        self.packed = []
        for row in [None] if self.rows_of_shift is None else self.rows_of_shift:
            beside = zip(self._split(codes), self._split_shift(row, codes), strict=True)
            weights = [_integers(values, zero_point[:, part], shifts) for part, (values, shifts) in enumerate(beside)]
            self.packed.append(
                [
                    [Packed(digit, scale[:, part], index, layer) for index, digit in enumerate(digits(weight))]
                    for part, weight in enumerate(weights)
                ]
            )

    @property
    def codes(self) -> Tensor | None:  # type: ignore[override]
        """The codes, unpacked: a new tensor each time."""
        weights = [torch.stack([packed.integers() for packed in part]).sum(0, dtype=torch.int32) for part in self.packed[0]]
        row = None if self.rows_of_shift is None else self.rows_of_shift[0]
        shifts = self._split_shift(row, torch.cat(weights, dim=1))
        zero_point = self.zero_point.expand(len(weights[0]), -1).int()
        parts = [
            (weight if shift is None else weight >> shift) + _beside(zero_point[:, part], weight)
            for part, (weight, shift) in enumerate(zip(weights, shifts, strict=True))
        ]
        return torch.cat(parts, dim=1).contiguous().to(torch.int8 if self.spec.symmetric else torch.uint8)

    def unpack(self) -> None:
        """Become a plain quantizer that holds its codes."""
        codes = self.codes
        del self.packed, self.rows_of_shift, self.groups
        self.__class__ = Quantizer  # type: ignore[assignment]
        self._buffers["codes"] = codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if fn(torch.empty(0)).device.type != "cpu":
            self.unpack()  # it is of its parent's class then, which rules super() out
        applied: nn.Module = Quantizer._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = self.codes

    def _split(self, codes: Tensor) -> tuple[Tensor, ...]:
        return codes.split(list(self.splits), dim=1) if self.splits else (codes,)

    def _split_shift(self, row: Int[Tensor, " channels"] | None, codes: Tensor) -> tuple[Tensor | None, ...]:
        """A row of shift as it lies beside codes [out, in / groups, ...], for each split."""
        if row is None:
            return (None,) * max(1, len(self.splits))
        outputs, channels = codes.shape[:2]
        beside = row.int().view(self.groups, channels).repeat_interleave(outputs // self.groups, dim=0)
        return self._split(beside.view(outputs, channels, *[1] * (codes.dim() - 2)))


def _integers(codes: Tensor, zero_point: Tensor, shift: Tensor | None) -> Tensor:
    """The integer weight that is multiplied: codes minus zero point, shifted; int8 where it is the codes themselves."""
    if shift is None and codes.dtype == torch.int8 and not zero_point.any():
        return codes
    integers = codes.int() - _beside(zero_point.int(), codes)
    return integers if shift is None else integers << shift


def _beside(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *[1] * (weight.dim() - 1))


def _steps(layer: QuantizedLayer, given: Quantizer, weight: PackedCodes) -> list[list[Step]]:
    """The parameter sets of a layer's input, [sets][splits]."""
    raised = -given.spec.code_min  # signed codes become unsigned ones
    rows = []
    for row in range(given.rows):
        factor = torch.ones(1) if layer.smooth is None else layer.smooth.detach().float()
        if given.shift is not None:
            factor = factor * torch.exp2(given.shift[row].float())
        matrices = weight.packed[_row_of(weight.rows_of_shift, given.shift, row)]
        factors = factor.split(list(given.splits)) if given.splits and len(factor) > 1 else [factor] * len(matrices)
        parts = []
        for part, channels in enumerate(factors):
            scale, zero_point = float(given.scale[row, part]), int(given.zero_point[row, part]) + raised
            shape = (-1, 1, 1) if isinstance(layer, QuantizedConv2d) else (-1,)
            inverse = 1.0 / scale if len(factor) == 1 else (1.0 / (scale * channels)).view(shape)
            parts.append(Step(scale, inverse, zero_point, given.spec.code_max + raised, matrices[part]))
        rows.append(parts)
    return rows


def _row_of(distinct: Tensor | None, shift: Tensor | None, row: int) -> int:
    if distinct is None or shift is None:
        return 0
    return int((distinct == shift[row]).all(dim=1).nonzero()[0])


class IntegerLinear(QuantizedLinear):
    """A lowered linear layer; made by `lower`, never constructed."""

    product: Product

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        return _forward(self, x) if _computes_integers(self) else super().forward(x)


class IntegerConv2d(QuantizedConv2d):
    """A lowered convolution; made by `lower`, never constructed."""

    product: Product

    def forward(self, x: Tensor) -> Tensor:
        """``[n, in_channels, h, w]`` -> ``[n, out_channels, h', w']``, channels last in memory."""
        if not _computes_integers(self):
            return super().forward(x)
        return _forward(self, x.contiguous(memory_format=torch.channels_last))


IntegerLayer = IntegerLinear | IntegerConv2d


def _computes_integers(layer: IntegerLayer) -> bool:
    """Whether the quantizers are on and unobserved, and the codes where `lower` put them."""
    weight, given = layer.weight_quantizer, layer.input_quantizer
    plain = all(each is not None and each.enabled and each.observer is None for each in (weight, given))
    return plain and isinstance(weight, PackedCodes)


def _forward(layer: IntegerLayer, x: Tensor) -> Tensor:
    given = layer.input_quantizer
    assert given is not None
    dtype = x.dtype if x.dtype in OUTPUTS else torch.float32
    bias = None if layer.bias is None else layer.bias.float()
    rows = given.present_rows(x.device)
    if isinstance(rows, int) or torch.compiler.is_compiling():
        return _multiply(layer, layer.product.codes(x.float(), rows), rows, bias, dtype).to(x.dtype)
    chosen = [(row, (rows == row).nonzero().flatten()) for row in rows.unique().tolist()]  # samples at different timesteps
    parts = [_multiply(layer, layer.product.codes(x[samples].float(), row), row, bias, dtype) for row, samples in chosen]
    return torch.cat(parts)[torch.cat([samples for _, samples in chosen]).argsort()].to(x.dtype)


def _multiply(layer: IntegerLayer, codes: list[Tensor], row: int | Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():
        output: Tensor = compiled_product(codes, None if isinstance(row, int) else row, layer.product.number, bias, dtype)
        return output
    return layer.product.multiply(codes, int(row), bias, dtype)


class IntegerFeedForward(FeedForward):
    """A feed-forward with GELU or GEGLU between its two layers, some tokens at a time; made by `lower`, never constructed.

    GELU is computed inside the first layer's kernel, which puts out the codes of the second where that takes all 256 of them.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        first, second = self.net[0].proj, self.net[2]  # looked up at every call: an adapter may have taken a layer's place
        rows = [_row_of_one(layer) for layer in (first, second)]
        watched = any(each._forward_pre_hooks or each._forward_hooks for each in (first, second, *self.net))
        unusual = self.training or watched or hidden_states.dtype != torch.float32
        if unusual or rows[0] is None or rows[1] is None or not _one_product(first):
            output: Tensor = super().forward(hidden_states, *args, **kwargs)
            return output
        biases = [None if layer.bias is None else layer.bias.float() for layer in (first, second)]
        codes = first.product.codes(hidden_states, rows[0])[0]
        gelu = getattr(self.net[0], "approximate", "none")  # GEGLU has the exact one
        if torch.compiler.is_compiling():
            at = [None if isinstance(row, int) else row for row in rows]
            compiled: Tensor = compiled_feed_forward(codes, [first.product.number, second.product.number], at, biases, gelu)
            return compiled
        products = (first.product, second.product)
        return feed_forward(codes, products, (int(rows[0]), int(rows[1])), (biases[0], biases[1]), gelu)


def _row_of_one(layer: nn.Module) -> int | Tensor | None:
    """The parameter set of a layer that computes with integers; None where it does not, or samples have different ones."""
    if not isinstance(layer, IntegerLinear) or not _computes_integers(layer) or layer.input_quantizer is None:
        return None
    rows = layer.input_quantizer.present_rows(torch.device("cpu"))
    return rows if isinstance(rows, int) or torch.compiler.is_compiling() else None


def _one_product(layer: nn.Module) -> bool:
    """Whether a layer's output is one product of integers, which can be cut along the outputs."""
    return isinstance(layer, IntegerLinear) and layer.product.one_matrix

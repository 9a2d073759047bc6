"""Products of integer codes by PyTorch's oneDNN kernels: what the layers of the int8 engine compute with.

The kernels multiply unsigned 8-bit codes of the input with signed 8-bit weights, laid out once, and put out floating point:

    y[o] = scale * weight_scale[o] * sum_c (code[c] - zero_point) * weight[o, c] + bias[o]

Weights larger than the kernel multiplies exactly on this machine (`exactness`) are written as `digits`, a product each. `scale` and
`zero_point` are arguments of a call, so switching them costs nothing. Inside `torch.compile` the products are opaque
operators, ``diffquant::product`` and ``diffquant::feed_forward``, and what lies between them is fused; an operator finds its
`Product` by number, because the compiler cannot carry weights in oneDNN's layout.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any, final
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from diffquant.core.layers import QuantizedConv2d, QuantizedLayer
from diffquant.engines.int8.packed import Packed, pointwise

OUTPUTS = (torch.float32, torch.bfloat16)  # what the kernels put out
MAX_CODE = 255  # of 8 bits
PADDED = 4  # an input with fewer codes for each weight of a convolution than this is given its edges here, not by the kernel
TOKENS = 512  # of a feed-forward at once, so that what lies between its two products stays in the cache


def _has_quantized_tensors() -> bool:
    """Whether this torch has a kernel that quantizes in one pass; 2.13 warns, once, that a later one will not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
        except (AttributeError, RuntimeError):
            return False
    return True


ONE_PASS = _has_quantized_tensors()


def quantized(x: Float[Tensor, "*shape"], scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """clamp(round(x / scale) + zero_point) to all 256 codes of `dtype`, uint8 or int8; one pass over memory where `ONE_PASS`."""
    if not ONE_PASS:
        limits = torch.iinfo(dtype)
        return x.mul(1 / scale).round_().add_(zero_point).clamp_(limits.min, limits.max).to(dtype)
    codes = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8 if dtype == torch.uint8 else torch.qint8)
    # the same bytes with a plain type: `int_repr` would copy them, slower than they were made
    return torch.empty(0, dtype=dtype).set_(codes.untyped_storage(), codes.storage_offset(), codes.shape, codes.stride())


@final
class ParameterSet:
    """One parameter set of one split of a layer's input, for unsigned codes.

    ``last``: the largest code; the first is 0. ``inverse``: 1 / scale; where the input is smoothed or shifted, for each channel,
    shaped to broadcast against the input.
    ``matrices``: the digits of the weight that the codes are multiplied with.
    """

    def __init__(self, scale: float, inverse: float | Tensor, zero_point: int, last: int, matrices: Sequence[Packed]) -> None:
        self.scale, self.inverse, self.zero_point, self.matrices = scale, inverse, zero_point, tuple(matrices)
        self.last = last
        self.offset = torch.tensor(zero_point + 0.5)  # cutting off then rounds

    def codes(self, x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
        """Codes of `x`."""
        plain = isinstance(self.inverse, float)
        codes = quantized(x if plain else x * self.inverse, self.scale if plain else 1.0, self.zero_point, torch.uint8)
        return codes if self.last == MAX_CODE else codes.clamp_(max=self.last)

    def values(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`x`, smoothed where it is, as its codes stand for it."""
        if ONE_PASS and self.last == MAX_CODE and isinstance(self.inverse, float):
            return torch.quantize_per_tensor(x, self.scale, self.zero_point, torch.quint8).dequantize()
        return self.codes(x).float().sub_(self.zero_point).mul_(self.scale)


@final
class Product:
    """A layer's weight and the parameter sets of its input, laid out for the kernels. Never written; copies share it.

    ``sets`` [sets][splits].
    """

    def __init__(self, layer: QuantizedLayer, sets: Sequence[Sequence[ParameterSet]], splits: Sequence[int]) -> None:
        self.sets, self.splits = [list(row) for row in sets], list(splits)
        self.outputs = len(sets[0][0].matrices[0].scale)
        self.conv = isinstance(layer, QuantizedConv2d)
        self.pointwise = isinstance(layer, QuantizedConv2d) and pointwise(layer)
        if isinstance(layer, QuantizedConv2d):
            self.kernel, self.stride, self.dilation = list(layer.kernel_size), list(layer.stride), list(layer.dilation)
            self.padding, self.groups = [int(padding) for padding in layer.padding], layer.groups
        if len(sets) > 1:  # the sets as tensors, for a set that is known at run time only
            self.inverses = [torch.stack([torch.as_tensor(row[part].inverse) for row in sets]) for part in range(len(sets[0]))]
            self.offsets = [torch.stack([row[part].offset for row in sets]) for part in range(len(sets[0]))]
        row = self.sets[0]
        plain = len(self.sets) == len(row) == len(row[0].matrices) == 1
        self.alone = (row[0], row[0].matrices[0]) if plain else None  # of a layer with one set, part and digit, as most are
        self.number = next(_numbers)
        _products[self.number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Product:
        return self

    def codes(self, x: Float[Tensor, "*shape"], row: int | Int[Tensor, " one"]) -> list[UInt8[Tensor, ...]]:
        """Codes of `x` for each split in parameter set `row`; inside `torch.compile` in plain operations, which it fuses."""
        parts = x.split(self.splits, dim=1 if self.conv else -1) if self.splits else (x,)
        codes = []
        for index, part in enumerate(parts):
            parameters = self.sets[row if isinstance(row, int) else 0][index]
            if not torch.compiler.is_compiling():
                codes.append(parameters.codes(part))
                continue
            if isinstance(row, Tensor):
                scaled = torch.addcmul(self.offsets[index][row], part, self.inverses[index][row])
            elif isinstance(parameters.inverse, float):
                scaled = torch.add(parameters.offset, part, alpha=parameters.inverse)
            else:
                scaled = torch.addcmul(parameters.offset, part, parameters.inverse)
            codes.append(scaled.clamp_(0.0, parameters.last + 0.5).to(torch.uint8))
        return codes

    def multiply(self, codes: Sequence[Tensor], row: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Sum of the products of all splits and digits, plus `bias` (float32), in `dtype` (one of `OUTPUTS`)."""
        output: Tensor | None = None
        for part, parameters in zip(codes, self.sets[row], strict=True):
            for packed in parameters.matrices:
                product = self._product(part, parameters, packed, bias if output is None else None, dtype)
                output = product if output is None else output.add_(product)
        assert output is not None
        return output

    def single(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The output for a float32 input, of a layer that has one set, part and digit (`alone`)."""
        assert self.alone is not None
        parameters, packed = self.alone
        return self._product(parameters.codes(x), parameters, packed, bias, torch.float32)

    @property
    def one_matrix(self) -> bool:
        """Whether the output is one product: a linear layer without splits whose weight fits 8 bits."""
        return not self.conv and all(len(row) == 1 and len(row[0].matrices) == 1 for row in self.sets)

    @property
    def takes_codes(self) -> bool:
        """Whether the codes of its input are all 256, with one scale for all channels: what a kernel can put out."""
        return all(len(row) == 1 and isinstance(row[0].inverse, float) and row[0].last == MAX_CODE for row in self.sets)

    def halve(self) -> None:
        """Lay out the weight in two halves of the outputs; needs `one_matrix`."""
        for row in self.sets:
            row[0].matrices[0].halve()

    def given_to(self, receiver: Product, rows: tuple[int, int], codes: Tensor, bias: Tensor | None, gelu: str) -> list[Tensor]:
        """What `receiver` multiplies: codes of this product's GELU or, where it is halved, of one half times the other's GELU.

        ``gelu``: "none" or "tanh", torch's names of the exact and the approximate one. Needs `one_matrix`.
        """
        parameters = self.sets[rows[0]][0]
        packed = parameters.matrices[0]
        halved = len(packed.halves) > 1
        if not halved and receiver.takes_codes:
            receiving = receiver.sets[rows[1]][0]
            put_out = receiving.scale, receiving.zero_point, torch.uint8
            return [_linear(codes, parameters, packed, None, bias, put_out, ("gelu", [], gelu))]
        activated = _linear(codes, parameters, packed, 1 if halved else None, bias, post=("gelu", [], gelu))
        if halved:
            activated.mul_(_linear(codes, parameters, packed, 0, bias))
        return receiver.codes(activated, rows[1])

    def _product(self, codes: Tensor, parameters: ParameterSet, packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if not self.conv:
            return _linear(codes.contiguous(), parameters, packed, None, bias, (1.0, 0, dtype))
        codes = codes.contiguous(memory_format=torch.channels_last)
        if self.pointwise:
            return _linear(codes.permute(0, 2, 3, 1), parameters, packed, None, bias, (1.0, 0, dtype)).permute(0, 3, 1, 2)
        zero_point, padding = parameters.zero_point, self.padding
        if zero_point and (not any(padding) or codes.numel() < PADDED * packed.count):
            # with a zero point the kernel lays the weight out again at every call; here it goes into edges and bias
            codes = functional.pad(codes, [padding[1]] * 2 + [padding[0]] * 2, value=zero_point) if any(padding) else codes
            moved = (packed.sums * (-zero_point * parameters.scale)).float()
            bias, zero_point, padding = moved if bias is None else bias + moved, 0, [0, 0]
        geometry = (self.stride, padding, self.dilation, self.groups)
        products = []
        for first, end, held in packed.parts(None, codes.numel() // codes.shape[1]):
            here = slice(first, end)
            with held as weight:
                product: Tensor = torch.ops.onednn.qconv2d_pointwise(
                    codes, parameters.scale, zero_point, weight, packed.scale[here], packed.zero_point[here],
                    None if bias is None else bias[here], *geometry, 1.0, 0, dtype, "none", [], None,
                )  # fmt: skip
            products.append(product)
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    def empty_output(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised output for input codes of that shape."""
        if not self.conv:
            return codes.new_empty(*codes.shape[:-1], self.outputs, dtype=dtype)
        geometry = zip(codes.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        size = [
            (length + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for length, kernel, stride, pad, dilation in geometry
        ]
        output = torch.empty((len(codes), self.outputs, *size), dtype=dtype, device=codes.device, memory_format=torch.channels_last)
        return output


def _linear(
    codes: Tensor,
    parameters: ParameterSet,
    packed: Packed,
    half: int | None,
    bias: Tensor | None,
    put_out: tuple[float, int, torch.dtype] = (1.0, 0, torch.float32),
    post: tuple[str, list[float], str] = ("none", [], ""),
) -> Tensor:
    """The product of contiguous `codes` with a linear weight, or one half of its outputs, after `post`.

    `put_out`: scale, zero point and type of the output.
    """
    products = []
    for first, end, held in packed.parts(half, codes.numel() // codes.shape[-1]):
        operands: tuple[Tensor | None, ...] = packed.scale, packed.zero_point, bias
        if end - first < len(packed.scale):
            here = slice(first, end)
            operands = packed.scale[here], packed.zero_point[here], None if bias is None else bias[here]
        with held as weight:
            product: Tensor = torch.ops.onednn.qlinear_pointwise(
                codes, parameters.scale, parameters.zero_point, weight, *operands, *put_out, *post
            )
        products.append(product)
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def feed_forward(
    codes: UInt8[Tensor, "*tokens _"],
    products: tuple[Product, Product],
    rows: tuple[int, int],
    biases: tuple[Tensor | None, Tensor | None],
    gelu: str,
) -> Float[Tensor, "*tokens _"]:
    """The second product of the GELU of the first (or of its gated halves), `TOKENS` tokens at a time; see `Product.given_to`."""
    first, second = products
    tokens = codes.flatten(0, -2).contiguous()
    output = torch.empty(len(tokens), second.outputs)
    for some, place in zip(tokens.split(TOKENS), output.split(TOKENS), strict=True):
        activated = first.given_to(second, rows, some, biases[0], gelu)
        place.copy_(second.multiply(activated, rows[1], biases[1], torch.float32))
    return output.view(*codes.shape[:-1], second.outputs)


_numbers = itertools.count()
_products: WeakValueDictionary[int, Product] = WeakValueDictionary()


@torch.library.custom_op(
    "diffquant::product",
    mutates_args=(),
    schema="(Tensor[] codes, Tensor? row, int number, Tensor? bias, ScalarType dtype) -> Tensor",
)
def compiled_product(codes: list[Tensor], row: Tensor | None, number: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`Product.multiply` of product `number` inside `torch.compile`; `row` is None where there is one parameter set."""
    return _products[number].multiply(codes, 0 if row is None else int(row), bias, dtype)


@compiled_product.register_fake
def _(codes: list[Tensor], row: Tensor | None, number: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return _products[number].empty_output(codes[0], dtype)


@torch.library.custom_op(
    "diffquant::feed_forward",
    mutates_args=(),
    schema="(Tensor codes, int[] numbers, Tensor?[] rows, Tensor?[] biases, str gelu) -> Tensor",
)
def compiled_feed_forward(
    codes: Tensor, numbers: list[int], rows: list[Tensor | None], biases: list[Tensor | None], gelu: str
) -> Tensor:
    """`feed_forward` of the products with these numbers inside `torch.compile`; a row is None where there is one parameter set."""
    first, second = (_products[number] for number in numbers)
    chosen = [0 if row is None else int(row) for row in rows]
    return feed_forward(codes, (first, second), (chosen[0], chosen[1]), (biases[0], biases[1]), gelu)


@compiled_feed_forward.register_fake
def _(codes: Tensor, numbers: list[int], rows: list[Tensor | None], biases: list[Tensor | None], gelu: str) -> Tensor:
    return _products[numbers[1]].empty_output(codes, torch.float32)

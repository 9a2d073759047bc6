"""Attention with quantized operands on a CPU, a block of scores at a time: of integers in floating point, or of int8 codes.

`Int8.install` makes an `AttentionProducts` a `BlockedProducts`. Inside `torch.compile` the whole of it is one opaque
operator, ``diffquant::attention``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from diffquant.core.attention import OPERANDS, AttentionCall, AttentionProducts
from diffquant.core.quantizer import Quantizer
from diffquant.engines.exactness import ALL, answer_of
from diffquant.engines.int8.kernels import quantized

SCORES = 1 << 20  # attention scores held at once: 4 MB, so that a block stays in the cache between the two products
MAX_SOURCES = 1 << 15  # keys and values whose products of codes fit int32
INTEGER_SCORES = 1 << 15  # with fewer scores to a head, one batch of products in floating point is as fast


class BlockedProducts(AttentionProducts):
    """Attention with quantized operands, a block of scores at a time; made by `Int8.install`, never constructed.

    The scores are never all in memory.
    """

    def compute(self, call: AttentionCall) -> Tensor:
        """The output of a call, ``[batch, heads, tokens, width]``."""
        query, key, value, attn_mask, factor = call
        unusual = query.dtype != torch.float32 or torch.is_grad_enabled() or query.device.type != "cpu"
        present = [quantizer for quantizer in self._modules.values() if isinstance(quantizer, Quantizer)]
        if unusual or not all(quantizer.unobserved for quantizer in present):
            return super().compute(call)
        if self._modules.get("softmax") is None:
            return functional.scaled_dot_product_attention(*self.quantized(call), attn_mask, scale=factor)
        operands, limits = self._operands(query)
        if torch.compiler.is_compiling():
            output: Tensor = compiled_attention(query, key, value, attn_mask, operands, limits, factor)
            return output
        if all(len(each) <= 1 for each in operands):
            return attention(query, key, value, attn_mask, _codes(operands, limits, 0), factor)
        output = query.new_empty(*query.shape[:3], value.shape[3])
        for some in _alike(operands, len(query)):
            mask = attn_mask if attn_mask is None or attn_mask.dim() < 4 or len(attn_mask) == 1 else attn_mask[some]
            codes = _codes(operands, limits, int(some[0]))
            output[some] = attention(query[some], key[some], value[some], mask, codes, factor)
        return output

    def _operands(self, x: Tensor) -> tuple[list[Tensor], list[int]]:
        """Scale and zero point, first and last code, of query, key, value and softmax; empty tensors for floating point."""
        operands: list[Tensor] = []
        limits: list[int] = []
        for name in OPERANDS:
            quantizer: Quantizer | None = self._modules.get(name)  # type: ignore[assignment]
            operands += [x.new_empty(0)] * 2 if quantizer is None else quantizer.operands(x)
            limits += [0, 0] if quantizer is None else [quantizer.spec.code_min, quantizer.spec.code_max]
        return operands, limits


def _codes(operands: list[Tensor], limits: list[int], sample: int) -> list[Codes | None]:
    """The codes of each operand of a sample's attention; None for floating point."""
    codes: list[Codes | None] = []
    for scale, zero_point, first, last in zip(operands[::2], operands[1::2], limits[::2], limits[1::2], strict=True):
        if scale.numel():
            centre = 128 if first >= 0 else 0  # unsigned codes are moved to int8
            code = int(zero_point[sample % len(zero_point)]) - centre
            codes.append(Codes(float(scale[sample % len(scale)]), code, first - centre, last - centre))
        else:
            codes.append(None)
    return codes


def _alike(operands: list[Tensor], batch: int) -> list[Tensor]:
    """The samples of a batch in groups that have the same parameter sets."""
    _, group = torch.stack([each.flatten().expand(batch) for each in operands if each.numel()]).unique(dim=1, return_inverse=True)
    return [(group == number).nonzero().flatten() for number in range(int(group.max()) + 1)]


class Codes(NamedTuple):
    """The codes of an attention operand, moved to int8: x = scale * (code - zero_point), codes from `first` to `last`."""

    scale: float
    zero_point: int
    first: int
    last: int

    def of(self, x: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """int8 codes of `x`."""
        codes = quantized(x, self.scale, self.zero_point, torch.int8)
        return codes if (self.first, self.last) == (-128, 127) else codes.clamp_(self.first, self.last)

    def integers(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Codes minus zero point, as float32."""
        integers = self.of(x).float()
        return integers.sub_(self.zero_point) if self.zero_point else integers


def attention(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b h s d"],
    value: Float[Tensor, "b h s e"],
    mask: Tensor | None,
    operands: Sequence[Codes | None],
    factor: float,
) -> Float[Tensor, "b h t e"]:
    """quantized(softmax(factor * query key^T + mask)) value, `SCORES` scores at a time.

    `operands`: those of query, key, value and softmax; None leaves one (not the softmax) in floating point. The first product is
    that of integers in float32, where heads are too narrow for integer kernels to gain; the second that of int8 codes, where a
    head has at least `INTEGER_SCORES` scores.
    """
    batch, heads, tokens, width = query.shape
    sources, every = key.shape[2], batch * heads
    as_query, as_key, as_value, as_softmax = operands
    assert as_softmax is not None
    for operand in (as_query, as_key):
        factor *= 1.0 if operand is None else operand.scale
    query = (query if as_query is None else as_query.integers(query)).reshape(every, tokens, width) * factor
    key = (key if as_key is None else as_key.integers(key)).reshape(every, sources, width).transpose(1, 2)
    weigh = _weighing(value.reshape(every, sources, -1), as_value, as_softmax, tokens)
    if mask is not None:
        mask = mask.expand(batch, heads, tokens, sources).reshape(every, tokens, sources)
    together = min(every, max(1, SCORES // (tokens * sources)))  # heads
    block = min(tokens, max(1, SCORES // (together * sources)))  # tokens
    buffer = query.new_empty(together * block * sources)
    output = query.new_empty(every, tokens, value.shape[3])
    for first in range(0, every, together):
        some = slice(first, min(every, first + together))
        for start in range(0, tokens, block):
            here = slice(start, min(tokens, start + block))
            shape = (some.stop - some.start, here.stop - here.start, sources)
            scores = buffer[: math.prod(shape)].view(shape)
            torch.bmm(query[some, here], key[some], out=scores)
            if mask is not None:
                _add_mask(scores, mask[some, here])
            torch.softmax(scores, dim=-1, out=scores)
            weigh(scores, some, output[some, here])
    return output.view(batch, heads, tokens, -1)


def integer_products() -> bool:
    """Whether PyTorch multiplies two matrices of 8-bit codes exactly, and faster than in floating point."""
    answer = answer_of("torch attention")
    return answer.largest() == ALL and answer.speed > 1


def _weighing(
    value: Float[Tensor, "n s e"], as_value: Codes | None, as_softmax: Codes, tokens: int
) -> Callable[[Tensor, slice, Tensor], None]:
    """What quantizes a block of probabilities in place and writes its product with the values of some heads."""
    sources = value.shape[1]
    if as_value is None or tokens * sources < INTEGER_SCORES or sources > MAX_SOURCES or not integer_products():
        values = (value if as_value is None else as_value.integers(value).mul_(as_value.scale)) * as_softmax.scale
        low, high = (limit - as_softmax.zero_point for limit in (as_softmax.first, as_softmax.last))

        def weigh(probabilities: Tensor, some: slice, output: Tensor) -> None:
            probabilities.div_(as_softmax.scale).round_()
            if low > 0 or 1 / as_softmax.scale >= high + 0.5:  # else no probability is outside
                probabilities.clamp_(low, high)
            output.copy_(probabilities @ values[some])

        return weigh
    codes = as_value.of(value)
    if as_value.zero_point:  # a column of ones sums up the codes of the softmax
        codes = torch.cat([codes, torch.ones_like(codes[:, :, :1])], dim=2)
    moved = codes.sum(dim=1, dtype=torch.int32) * as_softmax.zero_point
    scale, zero_point = as_value.scale * as_softmax.scale, as_value.zero_point

    def weigh_codes(probabilities: Tensor, some: slice, output: Tensor) -> None:
        products = moved.new_empty(*probabilities.shape[:2], codes.shape[2])
        for weights, values, product in zip(as_softmax.of(probabilities), codes[some], products, strict=True):
            torch._int_mm(weights, values, out=product)
        products.sub_(moved[some, None])
        if zero_point:
            products = products[..., :-1].sub_(products[..., -1:], alpha=zero_point)
        torch.mul(products, scale, out=output)

    return weigh_codes


@torch.library.custom_op(
    "diffquant::attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor[] operands, int[] limits, float factor) -> Tensor",
)
def compiled_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, operands: list[Tensor], limits: list[int], factor: float
) -> Tensor:
    """`attention` inside `torch.compile`, where the scales may be those of another set at the next call.

    `operands`: scale and zero point of each, both empty for one in floating point; `limits`: first and last code of each.
    """
    return attention(query, key, value, mask, _codes(operands, limits, 0), factor)


@compiled_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, operands: list[Tensor], limits: list[int], factor: float
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


def _add_mask(scores: Tensor, mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores.add_(mask)

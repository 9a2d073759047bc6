"""Inputs quantized with every parameter set at once, weighed by shares that are learned: what a search of sets computes with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffquant.core.affine import where_free
from diffquant.core.quantizer import Quantizer
from diffquant.errors import SpecError

BLOCK = 1 << 16  # values at once: with what is computed from them, no more than a second-level cache holds


def entropies(logits: Float[Tensor, "intervals sets"]) -> Float[Tensor, " intervals"]:
    """Entropy of the softmax of each row, in nats."""
    shares = logits.log_softmax(dim=1)
    return -(shares.exp() * shares).sum(dim=1)


def mixture(quantizer: Quantizer, logits: Float[Tensor, "intervals sets"], x: Tensor) -> Tensor:
    """`x` quantized with every parameter set, weighed by the softmax of the present intervals' logits."""
    assert quantizer.clock is not None
    if quantizer.shift is not None and quantizer.shift.any():
        raise SpecError("SearchParameterSets: a quantizer has power-of-two factors; search before PowerOfTwoScaling")
    interval = torch.as_tensor(quantizer.clock.interval, device=logits.device).expand(len(x))
    shares = logits[interval].softmax(dim=1)
    code_min, code_max = quantizer.spec.code_min, quantizer.spec.code_max
    sizes = quantizer.splits or (x.shape[quantizer.axis],)
    parts: list[Tensor] = [
        _Mixture.apply(  # type: ignore[no-untyped-call]
            values.float(), shares, quantizer.scale[:, part], quantizer.zero_point[:, part], code_min, code_max
        )
        for part, values in enumerate(x.split(sizes, dim=quantizer.axis))
    ]
    return torch.cat(parts, dim=quantizer.axis).to(x.dtype)


class _Mixture(torch.autograd.Function):
    """sum_g shares[:, g] * dequantize(quantize(x; scale[g], zero_point[g])), in the memory of one: the sets are gone through again.

    Gradients are those of `core.affine`: rounding passes them straight through, clamping stops them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, scale: Tensor, zero_point: Tensor, code_min: int, code_max: int) -> Tensor:
        ctx.save_for_backward(x, shares, scale)
        ctx.bounds = [(code_min - zero, code_max - zero) for zero in zero_point.tolist()]
        values, factors = x.flatten(1), shares * scale
        total = torch.zeros_like(values)
        for samples, here in _blocks(values):
            part, sums = values[samples, here], total[samples, here]
            code = torch.empty_like(part)
            for size, (low, high), factor in zip(scale, ctx.bounds, factors[samples].split(1, dim=1), strict=True):
                torch.div(part, size, out=code).round_().clamp_(low, high)  # codes are counted from the zero point
                sums.addcmul_(code, factor)
        return total.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, shares, scale = ctx.saved_tensors
        values, gradient = x.flatten(1), gradient.flatten(1)
        to_x = torch.zeros_like(values)
        totals = torch.zeros(len(scale), 3, len(values), device=x.device)  # products of the gradient, sums over a sample's values
        for samples, here in _blocks(values):
            part, incoming, sums = values[samples, here], gradient[samples, here], to_x[samples, here]
            ratio, rounded, code, passed = (torch.empty_like(incoming) for _ in range(4))
            for index, (size, (low, high), share) in enumerate(
                zip(scale, ctx.bounds, shares[samples].split(1, dim=1), strict=True)
            ):
                torch.div(part, size, out=ratio)
                torch.round(ratio, out=rounded)
                torch.clamp(rounded, low, high, out=code)
                where_free(incoming, rounded, low, high, out=passed)
                sums.addcmul_(passed, share)
                products = torch.linalg.vecdot(incoming, code), torch.linalg.vecdot(passed, ratio), passed.sum(dim=1)
                totals[index, :, samples] += torch.stack(products)
        of_code, of_ratio, of_passed = totals.unbind(dim=1)
        to_scale = (shares.t() * (of_code - of_ratio)).sum(dim=1)
        to_zero = (shares.t() * (of_passed - gradient.sum(dim=1))).sum(dim=1) * scale
        return to_x.view(x.shape), of_code.t() * scale, to_scale, to_zero, None, None


def _blocks(values: Float[Tensor, "n values"]) -> Iterator[tuple[slice, slice]]:
    """Pieces of a batch that stay in a processor's cache while every set is gone through; all of it on an accelerator."""
    if values.device.type != "cpu":
        yield slice(None), slice(None)
        return
    count, size = values.shape
    together = max(1, BLOCK // size)  # samples
    for first in range(0, count, together):
        for start in range(0, size, BLOCK):
            yield slice(first, first + together), slice(start, start + BLOCK)

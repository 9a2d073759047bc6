"""Inputs quantized with every parameter set at once, weighed by shares that are learned: what a search of sets computes with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffquant.core.quantizer import Quantizer
from diffquant.core.spec import SpecError


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
    parts = [
        _mixed(values.float(), shares, quantizer.scale[:, part], quantizer.zero_point[:, part], code_min, code_max)
        for part, values in enumerate(x.split(sizes, dim=quantizer.axis))
    ]
    return torch.cat(parts, dim=quantizer.axis).to(x.dtype)


class _Mixture(torch.autograd.Function):
    """sum_g shares[:, g] * dequantize(quantize(x; scale[g], zero_point[g])), in the memory of one: the sets are gone through again.

    Gradients are those of `core.affine`: rounding passes them straight through, clamping stops them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, scale: Tensor, zero_point: Tensor, code_min: int, code_max: int) -> Tensor:
        ctx.save_for_backward(x, shares, scale, zero_point)
        ctx.codes = code_min, code_max
        total = torch.zeros_like(x)
        for share, step, zero in zip(_columns(shares, x), scale, zero_point, strict=True):
            total += share * (((x / step).round_().add_(zero).clamp_(code_min, code_max) - zero) * step)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, shares, scale, zero_point = ctx.saved_tensors
        code_min, code_max = ctx.codes
        to_x, to_shares = torch.zeros_like(x), []
        to_scale, to_zero = torch.zeros_like(scale), torch.zeros_like(zero_point)
        for index, share in enumerate(_columns(shares, x)):
            step, zero = scale[index], zero_point[index]
            ratio = x / step
            unclamped = ratio.round() + zero
            code = unclamped.clamp(code_min, code_max)
            inside = code == unclamped
            quantized = code - zero
            to_shares.append((gradient * quantized * step).flatten(1).sum(dim=1))
            weighted = gradient * share
            to_x += weighted * inside
            to_scale[index] = (weighted * torch.where(inside, quantized - ratio, quantized)).sum()
            to_zero[index] = -(weighted * ~inside).sum() * step
        return to_x, torch.stack(to_shares, dim=1), to_scale, to_zero, None, None


def _mixed(*operands: Any) -> Tensor:
    output: Tensor = _Mixture.apply(*operands)  # type: ignore[no-untyped-call]
    return output


def _columns(shares: Float[Tensor, "n sets"], x: Tensor) -> Iterator[Tensor]:
    """The share of each set, shaped to broadcast against `x`."""
    for column in shares.unbind(dim=1):
        yield column.view(-1, *[1] * (x.dim() - 1))

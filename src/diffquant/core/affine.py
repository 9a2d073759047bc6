"""Uniform affine quantization: every formula of it, as pure functions.

    code = clamp(round(x / scale) + zero_point, code_min, code_max)        round half to even
    x^   = (code - zero_point) * scale

`scale` and `zero_point` broadcast against `x`; both are float32, the zero point holding an integer. Gradients: rounding passes them
straight through, clamping stops them, which makes the gradient of the scale that of LSQ (Esser et al. 2020, arXiv 1902.08153).
*Differs*: values within half a scale of a bound round first and are clamped then, as in BRECQ, so they count as clamped or not by
their code; in LSQ by their value.
What broadcasts against what is the business of ``quantizer.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffquant.core.spec import QuantSpec
from diffquant.errors import SpecError

SMALLEST_SCALE = 1e-12  # a constant-zero tensor gets this scale and codes that dequantize to exact zeros


class _StraightThrough(torch.autograd.Function):
    """The gradient passes unchanged."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _RoundStraightThrough(_StraightThrough):
    """Round half to even. (`x + (round(x) - x).detach()` would not return exact integers.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()


class _FloorStraightThrough(_StraightThrough):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.floor()


class _FakeQuantize(torch.autograd.Function):
    """`dequantize` of `quantize` and its gradients, in as few passes over memory as there are operators for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
        code = (x / scale).round_().add_(zero_point)
        value = code.clamp(spec.code_min, spec.code_max).sub_(zero_point).mul_(scale)
        slope = None  # times the scale
        if scale.requires_grad:
            slope = where_free(x, code, spec.code_min, spec.code_max)
            torch.sub(value, slope, out=slope)
        ctx.spec = spec
        ctx.save_for_backward(code, slope, scale, zero_point)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        code, slope, scale, zero_point = ctx.saved_tensors
        of_x, of_scale, of_zero_point = ctx.needs_input_grad[:3]
        passed = where_free(gradient, code, ctx.spec.code_min, ctx.spec.code_max) if of_x or of_zero_point else gradient
        return (
            passed if of_x else None,
            _summed(gradient, slope, scale) / scale if of_scale else None,
            _summed(passed, scale, zero_point) - _summed(gradient, scale, zero_point) if of_zero_point else None,
            None,
        )


def where_free(x: Tensor, code: Tensor, low: float, high: float, out: Tensor | None = None) -> Tensor:
    """`x` where the integer `code` is in [low, high], else 0: in one pass, by the gradient of a clamp half a code further out."""
    bounds = low - 0.5, high + 0.5
    masked: Tensor = (
        torch.ops.aten.hardtanh_backward(x, code, *bounds)
        if out is None
        else torch.ops.aten.hardtanh_backward.grad_input(x, code, *bounds, grad_input=out)
    )
    return masked


def _summed(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """The product of `a` and `b`, summed to the shape of `like`; without the product in memory where that is one number."""
    if b.shape == like.shape:
        return a.sum_to_size(like.shape) * b
    if like.numel() == 1 and a.shape == b.shape:
        return torch.dot(a.flatten(), b.flatten()).view(like.shape)
    return (a * b).sum_to_size(like.shape)


def round_straight_through(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round half to even, with the gradient of the identity (Bengio et al. 2013, arXiv 1308.3432)."""
    rounded: Tensor = _RoundStraightThrough.apply(x)  # type: ignore[no-untyped-call]
    return rounded


def scale_from_range(low: Float[Tensor, "*p"], high: Float[Tensor, "*p"], spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover [low, high], widened to contain zero.

    Symmetric: the scale is the larger magnitude over the largest code, the zero point 0. Asymmetric: the zero point is the code of
    an exact zero. Raises `SpecError` on non-finite ranges or low > high.
    """
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise SpecError("range: not finite; the tensor holds inf or nan")
    if (low > high).any():
        raise SpecError("range: low is above high")
    return covering(low, high, spec)


def covering(low: Float[Tensor, "*p"], high: Float[Tensor, "*p"], spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """`scale_from_range` of ranges that nobody looks at: not finite where the range is not."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if spec.symmetric:
        scale = torch.maximum(-low, high) / spec.code_max
        return scale.clamp(min=SMALLEST_SCALE), torch.zeros_like(scale)
    scale = ((high - low) / (spec.code_max - spec.code_min)).clamp(min=SMALLEST_SCALE)
    zero_point = (spec.code_min - (low / scale).round()).clamp(spec.code_min, spec.code_max)
    return scale, zero_point


def scale_around(low: Float[Tensor, ...], high: Float[Tensor, ...], zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """The smallest scale with which codes around `zero_point` cover [low, high], on sides of zero that have codes."""
    below, above = zero_point - spec.code_min, spec.code_max - zero_point
    under = torch.where(below > 0, -low.float() / below.clamp(min=1), 0.0)
    over = torch.where(above > 0, high.float() / above.clamp(min=1), 0.0)
    return torch.maximum(under, over).clamp(min=SMALLEST_SCALE)


def quantize(x: Float[Tensor, "*shape"], scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Float[Tensor, "*shape"]:
    """Codes of `x` as float32 integers in [code_min, code_max]; differentiable by straight-through rounding."""
    if not torch.is_grad_enabled():  # the same values with one allocation, which is what sampling spends its time on
        return (x / scale).round_().add_(zero_point).clamp_(spec.code_min, spec.code_max)
    return (round_straight_through(x / scale) + zero_point).clamp(spec.code_min, spec.code_max)


def quantize_rounded(
    x: Float[Tensor, "*shape"], scale: Tensor, zero_point: Tensor, rounding: Float[Tensor, "*shape"], spec: QuantSpec
) -> Float[Tensor, "*shape"]:
    """Codes of `x` where `rounding` in [0, 1] says how far each value goes from its floor to the next integer (AdaRound)."""
    return (round_down(x / scale) + rounding + zero_point).clamp(spec.code_min, spec.code_max)


def round_down(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Floor, with the gradient of the identity."""
    floored: Tensor = _FloorStraightThrough.apply(x)  # type: ignore[no-untyped-call]
    return floored


def dequantize(code: Tensor, scale: Tensor, zero_point: Tensor) -> Float[Tensor, "*shape"]:
    """Values of `code`, float32."""
    return (code - zero_point) * scale


def fake_quantize(x: Float[Tensor, "*shape"], scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Float[Tensor, "*shape"]:
    """Quantize and dequantize: what the integer engine computes with, in floating point; differentiable in all three tensors."""
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, scale, zero_point))):
        return dequantize(quantize(x, scale, zero_point, spec), scale, zero_point)
    value: Tensor = _FakeQuantize.apply(x, scale, zero_point, spec)  # type: ignore[no-untyped-call]
    return value

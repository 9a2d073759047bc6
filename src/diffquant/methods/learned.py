"""Parameters that passes learn by gradient: scales and zero points, ``smooth``, offsets of biases, and the rounding of weights.

Scales are learned as logarithms, so that a learning rate is a relative change and no scale becomes negative. Zero points are real
numbers, rounded where they are used, with the gradient passed straight through. `core.affine` gives the gradients of both: LSQ's
and LSQ+'s (Esser et al. 2020, arXiv 1902.08153; Bhalgat et al. 2020, arXiv 2004.09576). *Differs*: the papers learn the scale
itself, at an absolute rate with a scaled gradient. ``smooth`` and offsets are *chosen here*.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from diffquant.core.layers import QuantizedLayer
from diffquant.core.quantizer import Quantizer, logits_of, rectified_sigmoid

DECIDED = 0.9  # how far towards its decided code a weight starts where rounding is learned again
DEVIATIONS = 8.0  # standard deviations that the range of an input is taken to hold
BETAS = (20.0, 2.0)  # falling exponent of AdaRound's penalty


class Learned(ABC):
    """Leaves that an optimizer moves in place of a parameter of the model: pairs of a tensor and its peak learning rate."""

    leaves: list[tuple[Tensor, float]]

    @abstractmethod
    def place(self) -> None:
        """Give the model this iteration's values, as leaves of their own."""

    @abstractmethod
    def collect(self) -> None:
        """Set the gradients of `leaves` from those of the values that were placed."""

    @abstractmethod
    def finish(self) -> None:
        """Leave the model with what was learned, without gradients."""


@contextmanager
def placed(learned: Sequence[Learned]) -> Iterator[None]:
    """The model computes with this iteration's values while the block back-propagates; afterwards gradients are collected."""
    for each in learned:
        each.place()
    yield
    for each in learned:
        each.collect()


def leaves(learned: Sequence[Learned]) -> list[tuple[Tensor, float]]:
    """Those of all, as `fit` takes them."""
    return [leaf for each in learned for leaf in each.leaves]


@final
class LearnedScale(Learned):
    """Scale and, with `zero_points`, zero point of an asymmetric quantizer.

    `lr` is relative: to the scale, and for the zero point to the range.
    """

    def __init__(self, quantizer: Quantizer, lr: float, zero_points: bool) -> None:
        self.quantizer = quantizer
        self.log_scale = quantizer.scale.detach().log()
        self.leaves = [(self.log_scale, lr)]
        self.zero_point: Tensor | None = None
        if zero_points and not quantizer.spec.symmetric:
            self.zero_point = quantizer.zero_point.detach()[: 1 if quantizer.shared_zero_point else None].clone()
            self.leaves.append((self.zero_point, lr * 2.0**quantizer.spec.bits))

    def place(self) -> None:
        """The scale, and the zero point rounded to a code."""
        self.quantizer.scale = self.log_scale.detach().exp().requires_grad_(True)
        if self.zero_point is not None:
            spec = self.quantizer.spec
            rounded = self.zero_point.detach().round().clamp(spec.code_min, spec.code_max)
            self.quantizer.zero_point = rounded.expand_as(self.log_scale).clone().requires_grad_(True)

    def collect(self) -> None:
        """d/d log s = s d/ds; a shared zero point's is the sum over sets."""
        scale, zero_point = self.quantizer.scale, self.quantizer.zero_point
        self.log_scale.grad = _gradient(scale) * scale.detach()
        if self.zero_point is not None:
            gradient = _gradient(zero_point)
            self.zero_point.grad = gradient.sum(dim=0, keepdim=True) if len(self.zero_point) < len(zero_point) else gradient

    def finish(self) -> None:
        """The scale and zero point of the last iteration."""
        self.place()
        self.quantizer.scale = self.quantizer.scale.detach()
        self.quantizer.zero_point = self.quantizer.zero_point.detach()


@final
class LearnedSmooth(Learned):
    """``smooth`` of a layer, as logarithms, while the codes of its weight stay; `lr` is relative.

    Each input channel then has a scale of its own, and its column of the weight the factor 1 / smooth.
    """

    def __init__(self, layer: QuantizedLayer, lr: float) -> None:
        assert layer.smooth is not None
        self.layer, self.log_smooth = layer, layer.smooth.detach().log()
        self.leaves = [(self.log_smooth, lr)]

    def place(self) -> None:
        """The vector itself."""
        self.layer.smooth = self.log_smooth.detach().exp().requires_grad_(True)

    def collect(self) -> None:
        """d/d log s = s d/ds."""
        smooth = self.layer.smooth
        assert smooth is not None
        self.log_smooth.grad = _gradient(smooth) * smooth.detach()

    def finish(self) -> None:
        """The vector of the last iteration."""
        self.layer.smooth = self.log_smooth.detach().exp()


@final
class LearnedOffset(Learned):
    """What is added to the bias of a layer while it is quantized; `lr` is relative to the spread of the layer's output.

    It is learned as ``spread * delta`` with ``spread = |weight of the output| * range of the input / 8``, about the standard
    deviation of the output.
    """

    def __init__(self, layer: QuantizedLayer, lr: float) -> None:
        quantizer, weight = layer.input_quantizer, layer.weight_to_quantize()
        assert isinstance(quantizer, Quantizer), "a dynamic input has no range to take for its spread"
        deviation = quantizer.scale.mean() * 2.0**quantizer.spec.bits / DEVIATIONS
        self.layer, self.spread = layer, weight.flatten(1).norm(dim=1) * deviation
        self.delta = torch.zeros_like(self.spread) if layer.offset is None else layer.offset / self.spread
        self.leaves = [(self.delta, lr)]

    def place(self) -> None:
        """The offset in units of the output."""
        self.layer.offset = (self.spread * self.delta.detach()).requires_grad_(True)

    def collect(self) -> None:
        """d/d delta = spread d/d offset."""
        assert self.layer.offset is not None
        self.delta.grad = _gradient(self.layer.offset) * self.spread

    def finish(self) -> None:
        """The offset of the last iteration."""
        self.layer.offset = self.spread * self.delta.detach()


@final
class LearnedRounding(Learned):
    """Whether each weight of a layer rounds up, as logits that the quantizer uses itself.

    They start at the weight's distance from the code below, or with `again` near the code that was decided.
    """

    def __init__(self, layer: QuantizedLayer, lr: float, again: bool = False) -> None:
        assert layer.weight_quantizer is not None
        self.layer, self.quantizer = layer, layer.weight_quantizer
        weight = layer.weight_to_quantize()
        scale, zero_point = self.quantizer.operands(weight)
        up = (weight / scale) - (weight / scale).floor()
        if again:
            up = (self.quantizer.quantize(weight).detach() - zero_point - (weight / scale).floor()).clamp(0, 1)
            up = DECIDED * up + (1 - DECIDED) * (1 - up)
        self.logits = logits_of(up)
        self.quantizer.codes = None
        self.leaves = [(self.logits, lr)]
        self.place()

    def place(self) -> None:
        """The logits."""
        self.quantizer.rounding = self.logits

    def collect(self) -> None:
        """Nothing: the logits are the leaves that the model used."""

    def penalty(self, progress: float, weight: float) -> Tensor:
        """AdaRound's penalty (Nagel et al. 2020, arXiv 2004.10568), which pushes choices to 0 or 1; `progress` from 0 to 1."""
        beta = BETAS[1] + (BETAS[0] - BETAS[1]) * (1 - progress)
        return weight * (1 - (2 * rectified_sigmoid(self.logits) - 1).abs().pow(beta)).sum()

    def finish(self) -> None:
        """Every weight gets the code it is nearest to."""
        self.quantizer.rounding = self.logits.detach()
        self.quantizer.decide(self.layer.weight_to_quantize())


def _gradient(value: Tensor) -> Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad

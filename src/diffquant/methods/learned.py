"""What AccuQuant learns beside steps: ``smooth``, offsets of biases, and the rounding of weights once more.

Both are called as `LearnedSteps` are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffquant.core.layers import QuantizedLayer
from diffquant.core.quantizer import Quantizer, logits_of, rectified_sigmoid
from diffquant.methods.learned_scale import LearnedSteps

DECIDED = 0.9  # how far towards its decided code a weight starts where rounding is learned again
DEVIATIONS = 8.0  # standard deviations that the range of an input is taken to hold


@dataclass
class LearnedOffset:
    """What is added to the bias of one layer while it is quantized.

    It is learned as ``unit * delta`` with ``unit = |weight of the output| * range of the input / 8``, about the standard deviation
    of the output, so that a rate means the same in every layer. *Chosen here*.
    """

    layer: QuantizedLayer
    unit: Tensor
    delta: Tensor
    rate: float

    @classmethod
    def of(cls, layer: QuantizedLayer, rate: float) -> LearnedOffset:
        """`rate` is relative to the spread of the output. The layer's input has to be quantized."""
        given, weight = layer.input_quantizer, layer.weight_to_quantize()
        assert given is not None
        spread = given.scale.mean() * 2.0**given.spec.bits / DEVIATIONS
        unit = weight.flatten(1).norm(dim=1) * spread
        delta = torch.zeros_like(unit) if layer.offset is None else layer.offset / unit
        return cls(layer, unit, delta, rate)

    def parameters(self) -> list[tuple[Tensor, float]]:
        """The leaf and its peak rate."""
        return [(self.delta, self.rate)]

    def place(self) -> None:
        """Give the layer this iteration's offset, as a leaf of its own."""
        self.layer.offset = (self.unit * self.delta.detach()).requires_grad_(True)

    def collect(self) -> None:
        """Take over the gradient: d/d delta = unit d/d offset."""
        found = None if self.layer.offset is None else self.layer.offset.grad
        self.delta.grad = torch.zeros_like(self.delta) if found is None else found * self.unit

    def gradient(self) -> Tensor:
        """The collected gradient."""
        return torch.zeros(0) if self.delta.grad is None else self.delta.grad

    def finish(self) -> None:
        """Leave the layer with what was learned, without gradients."""
        self.layer.offset = self.unit * self.delta.detach()


@dataclass
class LearnedSmooth:
    """``smooth`` of one layer, as logarithms, while the codes of its weight stay.

    Each input channel has then a step of its own, and with it its column of the weight a factor: 1 / smooth. *Chosen here*.
    """

    layer: QuantizedLayer
    log_smooth: Tensor
    rate: float

    @classmethod
    def of(cls, layer: QuantizedLayer, rate: float) -> LearnedSmooth:
        """`rate` is relative. The layer's input has to be quantized and the codes of its weight decided."""
        assert layer.smooth is not None
        return cls(layer, layer.smooth.detach().log(), rate)

    def parameters(self) -> list[tuple[Tensor, float]]:
        """The leaf and its peak rate."""
        return [(self.log_smooth, self.rate)]

    def place(self) -> None:
        """Give the layer this iteration's vector, as a leaf of its own."""
        self.layer.smooth = self.log_smooth.detach().exp().requires_grad_(True)

    def collect(self) -> None:
        """Take over the gradient: d/d log s = s d/ds."""
        smooth = self.layer.smooth
        assert smooth is not None
        self.log_smooth.grad = torch.zeros_like(smooth) if smooth.grad is None else smooth.grad * smooth.detach()

    def gradient(self) -> Tensor:
        """The collected gradient."""
        return torch.zeros(0) if self.log_smooth.grad is None else self.log_smooth.grad

    def finish(self) -> None:
        """Leave the layer with what was learned, without gradients."""
        self.layer.smooth = self.log_smooth.detach().exp()


@dataclass
class LearnedRounding:
    """The rounding of one weight while it is learned again, starting near the codes that were decided."""

    quantizer: Quantizer
    layer: QuantizedLayer
    logits: Tensor
    rate: float

    @classmethod
    def of(cls, quantizer: Quantizer, layer: QuantizedLayer, rate: float) -> LearnedRounding:
        """Puts the weight back to real codes, near those that were decided."""
        weight = layer.weight_to_quantize()
        scale, zero_point = quantizer.operands(weight)
        codes = quantizer.quantize(weight).detach()
        up = (codes - zero_point - (weight / scale).floor()).clamp(0, 1)
        logits = logits_of(DECIDED * up + (1 - DECIDED) * (1 - up))
        quantizer.codes, quantizer.rounding = None, logits
        return cls(quantizer, layer, logits, rate)

    def parameters(self) -> list[tuple[Tensor, float]]:
        """The leaf and its peak rate."""
        return [(self.logits, self.rate)]

    def place(self) -> None:
        """Give the quantizer its logits."""
        self.quantizer.rounding = self.logits

    def collect(self) -> None:
        """Nothing: the logits are the leaves that the model used."""

    def regularize(self, progress: float, regularization: float) -> None:
        """Add the gradient of AdaRound's regularization, whose exponent falls from 20 to 2."""
        with torch.enable_grad():
            beta = 2.0 + 18.0 * (1 - progress)
            (regularization * (1 - (2 * rectified_sigmoid(self.logits) - 1).abs().pow(beta)).sum()).backward()

    def gradient(self) -> Tensor:
        """The gradient, without regularization."""
        return torch.zeros(0) if self.logits.grad is None else self.logits.grad.flatten()

    def finish(self) -> None:
        """Decide every weight's code."""
        self.quantizer.rounding = self.logits.detach()
        self.quantizer.decide(self.layer.weight_to_quantize())


Learned = LearnedSteps | LearnedSmooth | LearnedOffset | LearnedRounding

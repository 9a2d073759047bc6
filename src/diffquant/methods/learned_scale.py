"""Steps and zero points of a quantizer while they are learned by gradient.

Steps are learned as logarithms, so that a rate is a relative change and no step becomes negative; zero points as real numbers that
are rounded where they are used, with the gradient passed straight through. The gradients of both are LSQ's and LSQ+'s (Esser et al.
2020, arXiv 1902.08153; Bhalgat et al. 2020, arXiv 2004.09576), which `core.affine` gives. *Differs*: the papers learn the step
itself, at an absolute rate with a scaled gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffquant.core.quantizer import Quantizer


@dataclass
class LearnedSteps:
    """The leaves that an optimizer moves for one quantizer; `zero_point` is None where it stays.

    An iteration calls `place`, computes and back-propagates losses (as many as it likes, each with a graph of its own), and calls
    `collect`. `finish` leaves the quantizer with plain tensors.
    """

    quantizer: Quantizer
    log_scale: Tensor
    zero_point: Tensor | None
    rate: float

    @classmethod
    def of(cls, quantizer: Quantizer, rate: float, zero_points: bool) -> LearnedSteps:
        """`rate` is relative: to the step, and for the zero point to the range. A symmetric quantizer's zero point stays."""
        moves = zero_points and not quantizer.spec.symmetric
        zero_point = quantizer.zero_point.detach()[: 1 if quantizer.shared_zero_point else None].clone() if moves else None
        return cls(quantizer, quantizer.scale.detach().log(), zero_point, rate)

    def parameters(self) -> list[tuple[Tensor, float]]:
        """Leaves and their peak rates, as `fit` takes them."""
        levels = 2.0**self.quantizer.spec.bits
        return [(self.log_scale, self.rate)] + ([] if self.zero_point is None else [(self.zero_point, self.rate * levels)])

    def place(self) -> None:
        """Give the quantizer this iteration's scale and zero point, as leaves of their own."""
        self.quantizer.scale = self.log_scale.detach().exp().requires_grad_(True)
        if self.zero_point is not None:
            spec = self.quantizer.spec
            rounded = self.zero_point.detach().round().clamp(spec.code_min, spec.code_max)
            self.quantizer.zero_point = rounded.expand_as(self.log_scale).clone().requires_grad_(True)

    def collect(self) -> None:
        """Take over the gradients: d/d log s = s d/ds."""
        scale, zero_point = self.quantizer.scale, self.quantizer.zero_point
        self.log_scale.grad = torch.zeros_like(scale) if scale.grad is None else scale.grad * scale.detach()
        if self.zero_point is not None:
            gradient = torch.zeros_like(zero_point) if zero_point.grad is None else zero_point.grad
            self.zero_point.grad = gradient.sum(dim=0, keepdim=True) if len(self.zero_point) < len(zero_point) else gradient

    def gradient(self) -> Tensor:
        """The collected gradients as one vector."""
        parts = [tensor.grad for tensor, _ in self.parameters()]
        return torch.cat([part.flatten() for part in parts if part is not None])

    def finish(self) -> None:
        """Leave the quantizer with what was learned, without gradients."""
        self.place()
        self.quantizer.scale = self.quantizer.scale.detach()
        self.quantizer.zero_point = self.quantizer.zero_point.detach()

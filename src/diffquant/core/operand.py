"""OperandQuantizer: what quantizes one operand of a product can be switched on and off, and observed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from diffquant.core.spec import QuantSpec


class OperandQuantizer(nn.Module):
    """Off (``enabled`` False) it returns its input untouched; an ``observer`` is called with every input."""

    def __init__(self, spec: QuantSpec, axis: int) -> None:
        super().__init__()
        self.spec, self.axis, self.enabled = spec, axis, False
        self.observer: Callable[[Tensor], None] | None = None

    @property
    @abstractmethod
    def of_weight(self) -> bool:
        """Whether the operand is a weight."""

    @property
    @abstractmethod
    def calibrated(self) -> bool:
        """Whether everything that it needs has been set."""

    @abstractmethod
    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, shaped to broadcast against `x`."""

    @abstractmethod
    def simulated(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`x` quantized and dequantized, whether the quantizer is on or not."""

    @property
    def unobserved(self) -> bool:
        """Whether it is on and has no observer: an engine may then compute in its place."""
        return self.enabled and self.observer is None

    @property
    def live(self) -> bool:
        """Whether a forward call does anything: quantizes, or calls an observer."""
        return self.enabled or self.observer is not None

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`x` quantized and dequantized in float32, in the dtype of `x`."""
        if self.observer is not None:
            self.observer(x)
        return self.simulated(x) if self.enabled else x

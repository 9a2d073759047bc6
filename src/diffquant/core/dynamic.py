"""DynamicQuantizer: scales that cover the values of each call, as they come; nothing of it is calibrated or stored."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor

from diffquant.core.affine import covering, fake_quantize
from diffquant.core.operand import OperandQuantizer
from diffquant.core.spec import QuantSpec


@final
class DynamicQuantizer(OperandQuantizer):
    """Quantizer of an activation with a scale and zero point for each row of its input, or with `per_sample` for each sample.

    A row holds all channels at one place: a token of a linear layer, a pixel of a 1x1 convolution. A sample is an entry of the
    first axis. Gradients pass where values are not clamped; scales have none.
    """

    shift = None  # as of a `Quantizer` without these
    splits: tuple[int, ...] = ()

    def __init__(self, spec: QuantSpec, axis: int, per_sample: bool) -> None:
        super().__init__(spec, axis)
        self.per_sample = per_sample

    @property
    def of_weight(self) -> bool:
        """It is of an activation."""
        return False

    @property
    def calibrated(self) -> bool:
        """There is nothing to calibrate."""
        return True

    def operands(self, x: Float[Tensor, "*shape"]) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each row or sample of `x`, float32, shaped to broadcast against it."""
        x = x.detach().float()
        places = tuple(range(1, x.dim())) if self.per_sample else (self.axis,)
        low, high = x.amin(places, keepdim=True), x.amax(places, keepdim=True)  # `aminmax` takes ten times as long
        return covering(low, high, self.spec)

    def simulated(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`x` quantized and dequantized, whether the quantizer is on or not."""
        if x.numel() == 0:
            return x
        scale, zero_point = self.operands(x)
        return fake_quantize(x.float(), scale, zero_point, self.spec).to(x.dtype)

    def extra_repr(self) -> str:
        """The spec, for `print(model)`."""
        return f"{self.spec}, dynamic, for each {'sample' if self.per_sample else 'row'}, enabled={self.enabled}"

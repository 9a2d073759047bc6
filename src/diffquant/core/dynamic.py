"""DynamicQuantizer: scales that cover the values of each call, as they come; nothing of it is calibrated or stored."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from diffquant.core.affine import covering, fake_quantize
from diffquant.core.operand import OperandQuantizer
from diffquant.core.spec import LayerSpec, QuantSpec
from diffquant.errors import SpecError


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


def dynamic_quantizer(layer: nn.Module, spec: LayerSpec, operand: QuantSpec, axis: int) -> DynamicQuantizer:
    """The quantizer of a layer's input with scales of each call. Raises `SpecError` for what needs calibrated ones."""
    scale = spec.input_scale
    for name in ("splits", "shift", "shared_zero_point", "guidance_sets"):
        if getattr(spec, name):
            raise SpecError(f"{name}: needs calibrated scales; input_scale is {scale}")
    if spec.sets > 1:
        raise SpecError(f"sets: {spec.sets}; a scale of each call has no parameter sets; input_scale is {scale}")
    if scale == "dynamic-row" and not has_rows(layer):
        raise SpecError("input_scale dynamic-row: an integer product over several pixels has one scale; use dynamic-sample")
    return DynamicQuantizer(operand, axis, scale == "dynamic-sample")


def has_rows(layer: nn.Module) -> bool:
    """Whether outputs depend on one place of the input each, and there are as many: of linear layers and 1x1 convolutions."""
    geometry = (*getattr(layer, "kernel_size", ()), *getattr(layer, "stride", ()))
    padded = getattr(layer, "padding", ())  # numbers, "valid" or "same"
    return all(size == 1 for size in geometry) and (padded == "valid" or all(size == 0 for size in padded))

"""Quantizer: scales and zero points, and which of them apply now.

Rows and parts: a quantizer holds ``scale`` and ``zero_point`` of shape ``[rows, parts]``. For a weight the rows are output channels
(or one row for all), for an activation they are parameter sets, one chosen per sample through ``table[interval]``. The parts are
the splits of the channels, one where nothing is split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffquant.core.affine import dequantize, fake_quantize, quantize, quantize_rounded, scale_around, scale_from_range
from diffquant.core.clock import StepClock
from diffquant.core.memory import allows
from diffquant.core.operand import OperandQuantizer
from diffquant.core.spec import AttentionSpec, LayerSpec, QuantSpec
from diffquant.errors import SpecError


class Quantizer(OperandQuantizer):
    """Affine quantizer of a weight (``clock`` None) or of an activation.

    ``scale``, ``zero_point``: float32 ``[rows, parts]``, nan until calibrated. ``table``: uint8 or int16 ``[intervals]``, the row
    of each interval. ``shift``: int8 ``[rows, channels]``, the power of two that multiplies ``scale`` for a channel. ``codes``: the
    integer weight once its rounding is decided. ``rounding``: logits of the rounding while it is learned (AdaRound).
    ``per_branch``: the rows are sets of the first half of a guided call, then of the second.
    ``shared_zero_point``: the parameter sets have one zero point (of each part), as some integer kernels need.
    """

    scale: Tensor
    zero_point: Tensor
    table: Tensor | None
    shift: Tensor | None
    codes: Tensor | None
    rounding: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        rows: int = 1,
        splits: Sequence[int] = (),
        axis: int = 1,
        clock: StepClock | None = None,
        shift_channels: int = 0,
        per_branch: bool = False,
    ) -> None:
        super().__init__(spec, axis)
        self.splits, self.clock = tuple(splits), clock
        self.shared_zero_point = False
        self._table_list: tuple[Tensor, int, list[int]] | None = None  # the table, its version, its numbers
        self._weight: tuple[list[tuple[Tensor, int]], Tensor] | None = None  # what a weight was dequantized from, and the weight
        parts = max(1, len(splits))
        self.register_buffer("scale", torch.full((rows, parts), torch.nan, dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros(rows, parts, dtype=torch.float32))
        table = clock.table(rows, per_branch).to(_index_type(rows)) if clock is not None and rows > 1 else None
        self.register_buffer("table", table)
        self.register_buffer("shift", torch.zeros(rows, shift_channels, dtype=torch.int8) if shift_channels else None)
        self.register_buffer("codes", None)
        self.register_buffer("rounding", None)

    def set_ranges(self, low: Float[Tensor, "rows parts"], high: Float[Tensor, "rows parts"]) -> None:
        """Set scales and zero points to cover [low, high], with larger scales where the zero point is shared."""
        if not self.shared_zero_point or self.spec.symmetric:
            scale, zero_point = scale_from_range(low, high, self.spec)
        else:
            _, zero_point = scale_from_range(low.amin(0, keepdim=True), high.amax(0, keepdim=True), self.spec)
            scale, zero_point = scale_around(low, high, zero_point, self.spec), zero_point.expand_as(low)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    @property
    def rows(self) -> int:
        """Output channels of a weight (or 1), parameter sets of an activation."""
        return self.scale.shape[0]

    def sets(self, per_half: bool) -> int:
        """Parameter sets of an activation, of one half of a guided call where each has its own (`per_half`)."""
        assert self.clock is not None
        return self.rows // (self.clock.branches if per_half else 1)

    @property
    def calibrated(self) -> bool:
        """Whether every scale has been set."""
        return bool(torch.isfinite(self.scale).all())

    @property
    def of_weight(self) -> bool:
        """A weight has no clock."""
        return self.clock is None

    def present_rows(self, device: torch.device) -> Int[Tensor, " batch"] | int:
        """The parameter set in force: one row, or one per sample where the clock holds an interval per sample.

        Inside `torch.compile` it is a tensor of one row, for all samples: a number would be compiled in.
        """
        clock, table = self.clock, self.table  # looking up a buffer is slow
        if clock is None or table is None:
            return 0
        if torch.compiler.is_compiling():
            return table.to(device)[clock.position.to(device)].long()
        interval = clock.interval
        if not isinstance(interval, int):
            return table.to(device)[interval.to(device)].long()
        version = _version(table)  # the list of the table is cached: reading off an accelerator waits for all that it has to do
        if self._table_list is None or self._table_list[0] is not table or self._table_list[1] != version:
            self._table_list = table, version, table.tolist()
        return self._table_list[2][interval]

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, shaped to broadcast against `x`."""
        if self.clock is None:
            return self._shape(self.scale, x), self._shape(self.zero_point, x)
        rows = self.present_rows(x.device)
        index = slice(rows, rows + 1) if isinstance(rows, int) else rows
        if not isinstance(rows, int) and len(rows) not in (1, x.shape[0]):
            raise SpecError(f"quantizer: {len(rows)} timesteps for a batch of {x.shape[0]}; give one timestep per sample")
        scale, zero_point = self._shape(self.scale[index], x), self._shape(self.zero_point[index], x)
        if self.shift is not None:
            scale = scale * torch.exp2(self.shift[index].float()).view(self._view(x, self.shift.shape[1]))
        return scale, zero_point

    def set_bits(self, bits: int) -> None:
        """Quantize at `bits` from now on, over the ranges as they are."""
        low, high = ((end - self.zero_point) * self.scale for end in (self.spec.code_min, self.spec.code_max))
        self.spec = self.spec.model_copy(update={"bits": bits})
        self.set_ranges(low, high)

    def divide_sets(self, table: Int[Tensor, " intervals"]) -> None:
        """Give every set that `table` names, 0 to its largest entry, a copy of the one parameter set there is.

        Raises `SpecError` where there are several already, or for a weight.
        """
        if self.clock is None or self.rows != 1 or len(table) != self.clock.intervals:
            raise SpecError(
                f"quantizer: {self.rows} parameter sets cannot be divided over {len(table)} intervals; start from one set"
            )
        rows = int(table.max()) + 1
        self.scale, self.zero_point = self.scale.repeat(rows, 1), self.zero_point.repeat(rows, 1)
        if self.shift is not None:
            self.shift = self.shift.repeat(rows, 1)
        if rows > 1:
            self.table = table.to(self.scale.device, _index_type(rows))

    def quantize(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Codes of `x`: those of a frozen weight if there are any, else by rounding (learned where it is being learned)."""
        if self.codes is not None:
            return self.codes.float()
        scale, zero_point = self.operands(x)
        if self.rounding is not None:
            return quantize_rounded(x.float(), scale, zero_point, rectified_sigmoid(self.rounding), self.spec)
        return quantize(x.float(), scale, zero_point, self.spec)

    def simulated(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`x` quantized and dequantized, whether the quantizer is on or not."""
        scale, zero_point = self.operands(x)
        if self.codes is not None or self.rounding is not None:
            return dequantize(self.quantize(x), scale, zero_point).to(x.dtype)
        return fake_quantize(x.float(), scale, zero_point, self.spec).to(x.dtype)

    def dequantized_codes(self) -> Float[Tensor, "*shape"]:
        """The weight of a frozen layer, float32."""
        assert self.codes is not None
        scale, zero_point = self.operands(self.codes)
        return dequantize(self.codes.float(), scale, zero_point)

    def frozen_weight(self, dtype: torch.dtype) -> Float[Tensor, "*shape"]:
        """The weight of a frozen layer in `dtype`, cached between calls where memory allows; not to be written."""
        if torch.compiler.is_compiling():
            return self.dequantized_codes().to(dtype)
        assert self.codes is not None
        sources = [(tensor, _version(tensor)) for tensor in (self.codes, self.scale, self.zero_point)]
        if self._weight is not None and self._weight[1].dtype == dtype:
            pairs = zip(sources, self._weight[0], strict=True)
            if all(tensor is before and version == then for (tensor, version), (before, then) in pairs):
                return self._weight[1]
        self._weight = None
        weight = self.dequantized_codes().to(dtype)
        if allows(weight.numel() * weight.element_size(), weight.device):
            self._weight = sources, weight
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Another device, but no other dtype: a scale in 16 or 8 bits would be another scale."""
        self._weight = None
        before = {name: tensor for name, tensor in self._buffers.items() if tensor is not None and tensor.is_floating_point()}
        applied: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            self._buffers[name] = in_float32(tensor, self._buffers[name])
        return applied

    def decide(self, weight: Float[Tensor, "*shape"]) -> None:
        """Fix the integer codes of `weight` (float32): the learned rounding is cut at one half and forgotten."""
        scale, zero_point = self.operands(weight)
        with torch.no_grad():
            if self.codes is None and self.rounding is not None:
                up = (self.rounding >= 0).float()
                codes = quantize_rounded(weight, scale, zero_point, up, self.spec)
            else:
                codes = self.quantize(weight)
        self.codes = codes.to(torch.int8 if self.spec.symmetric else torch.uint8)
        self.rounding = None

    def _view(self, x: Tensor, channels: int) -> list[int]:
        shape = [1] * x.dim()
        shape[self.axis % x.dim()] = channels
        shape[0] = -1
        return shape

    def _shape(self, values: Float[Tensor, "rows parts"], x: Tensor) -> Tensor:
        """``[rows, parts]`` to a shape that broadcasts against `x`: rows along the first axis, parts spread over the channels."""
        if not self.splits:
            return values.view(-1, *[1] * (x.dim() - 1))
        parts = [part.expand(-1, size) for part, size in zip(values.split(1, dim=1), self.splits, strict=True)]
        return torch.cat(parts, dim=1).view(self._view(x, sum(self.splits)))

    def extra_repr(self) -> str:
        """The spec, for `print(model)`."""
        return f"{self.spec}, rows={self.rows}, splits={self.splits or None}, enabled={self.enabled}"


def activation_quantizer(
    operand: QuantSpec | None,
    spec: LayerSpec | AttentionSpec,
    clock: StepClock,
    axis: int,
    splits: Sequence[int] = (),
    shifted: int = 0,
) -> Quantizer | None:
    """The quantizer of one operand of a layer or attention with parameter sets as `spec` says; None for floating point.

    ``shifted``: channels with exponents of their own.
    """
    if operand is None:
        return None
    rows = spec.sets * (clock.branches if spec.guidance_sets else 1)
    quantizer = Quantizer(operand, rows, splits, axis, clock, shifted, spec.guidance_sets)
    quantizer.shared_zero_point = spec.shared_zero_point
    return quantizer


def in_float32(before: Tensor, after: Tensor | None) -> Tensor:
    """What a module's `_apply` made of a float32 tensor: itself where the dtype stayed, else `before` on its device."""
    assert after is not None
    if after.dtype == before.dtype:
        return after
    return after.to(before.dtype) if before.is_meta else before.to(after.device)


def _index_type(rows: int) -> torch.dtype:
    return torch.uint8 if rows <= 256 else torch.int16


def _version(tensor: Tensor) -> int:
    """A number that changes when `tensor` is written."""
    return 0 if tensor.is_inference() else tensor._version


def rectified_sigmoid(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Sigmoid stretched to [-0.1, 1.1] and cut to [0, 1] (AdaRound, Nagel et al. 2020, arXiv 2004.10568, eq. 23)."""
    return (1.2 * torch.sigmoid(logits) - 0.1).clamp(0, 1)


def logits_of(fraction: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The logits whose `rectified_sigmoid` is `fraction` in [0, 1)."""
    return -torch.log(1.2 / (fraction + 0.1) - 1)

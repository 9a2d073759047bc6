"""How layers are quantized: bits, symmetry, granularity, and the rules that choose them layer by layer.

No tensors here: a spec is a value that can be written in a recipe and read back from a checkpoint.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MIN_BITS, MAX_BITS = 2, 8
RuleBits = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)] | Literal["float"]
InputScale = Literal["static", "dynamic-row", "dynamic-sample"]


class Value(BaseModel):
    """What is written in a recipe or checkpoint and read back."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class QuantSpec(Value):
    """How one tensor is quantized.

    ``granularity`` ``channel`` gives every output channel of a weight its own scale; activations are always per tensor (and per
    input split). Symmetric codes are signed around zero, asymmetric ones unsigned with a zero point.
    """

    bits: int = Field(ge=MIN_BITS, le=MAX_BITS)
    symmetric: bool = False
    granularity: Literal["tensor", "channel"] = "tensor"

    @property
    def code_min(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def code_max(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    def __str__(self) -> str:
        return f"{'int' if self.symmetric else 'uint'}{self.bits}/{self.granularity}"


class LayerSpec(Value):
    """How one layer is quantized: None leaves that operand in floating point.

    ``splits`` are the sizes of consecutive parts of the input channels with quantizers of their own (concatenated skips); their sum
    is the number of input channels. ``smooth`` and ``shift`` allocate the layer's equivalent-scaling and power-of-two buffers.
    ``sets`` is the number of parameter sets of the input quantizer; with ``shared_zero_point`` they differ in their scales only.
    With ``guidance_sets`` each half of a guided call has as many of its own.
    ``input_scale``: ``static`` scales are calibrated; dynamic ones cover the values of each call, ``dynamic-row`` those of each row
    (of a linear layer's tokens, of a 1x1 convolution's pixels), ``dynamic-sample`` those of each sample. Dynamic scales have no
    splits, sets or shifts.
    """

    weight: QuantSpec | None = None
    input: QuantSpec | None = None
    splits: tuple[int, ...] = ()
    sets: int = Field(default=1, ge=1)
    shared_zero_point: bool = False
    guidance_sets: bool = False
    smooth: bool = False
    shift: bool = False
    input_scale: InputScale = "static"


class AttentionSpec(Value):
    """How the operands of an attention's two products are quantized; None leaves an operand in floating point."""

    query: QuantSpec | None = None
    key: QuantSpec | None = None
    value: QuantSpec | None = None
    softmax: QuantSpec | None = None
    sets: int = Field(default=1, ge=1)
    shared_zero_point: bool = False
    guidance_sets: bool = False


class LayerRule(Value):
    """One line of the plan: what happens to the layers that `match` names. Later rules override earlier ones, field by field.

    ``match`` is a shell pattern on module names (it has to match a layer), or a structural selector that may match none:
    ``@all`` layers that multiply, ``@conv``, ``@linear``, ``@lookup`` (tables of embeddings, which no other one of these names),
    ``@first`` and ``@last`` layer, ``@embedding`` (of time, class and text, and the projections
    of it inside blocks and adaptive norms), ``@modulated`` (the convolution after that projection in a residual block), ``@skip``
    (layers that read a concatenated skip), ``@shortcut`` (1x1 convolutions of residual shortcuts), ``@resample`` (up- and
    down-sampling convolutions), ``@attention`` (attention products).
    ``guidance_sets`` gives the conditional and the unconditional half of a guided call parameter sets of their own.
    ``weight_bits`` and ``input_bits`` may be ``float``. ``input_scale`` is that of `LayerSpec`; ``dynamic-row`` means
    ``dynamic-sample`` for convolutions over several pixels, whose integer products have one scale.
    ``reason`` is printed where a layer stays in floating point.
    """

    match: str
    weight_bits: RuleBits | None = None
    input_bits: RuleBits | None = None
    weight_symmetric: bool | None = None
    input_symmetric: bool | None = None
    weight_granularity: Literal["tensor", "channel"] | None = None
    softmax_bits: RuleBits | None = None
    split_skips: bool | None = None
    sets: int | None = None
    shared_zero_point: bool | None = None
    guidance_sets: bool | None = None
    smooth: bool | None = None
    shift: bool | None = None
    input_scale: InputScale | None = None
    reason: str | None = None

"""Quantizable layers: Linear, Conv2d and Conv3d whose class was changed in place.

The float weight stays where it was and is never written. With quantizers off a layer is the layer it was, bit for bit. A frozen
layer has no float weight any more, only the integer codes of its weight quantizer.

    y = quantize(x / smooth) (*) quantize(W * smooth) + bias + offset

``smooth`` [in_channels], positive, and ``offset`` [out_channels] are optional; freezing adds the offset to the bias.

A layer answers for itself: where its channels are, how input and weight are multiplied, how its input channels are split. Another
kind of layer is a subclass of `QuantizedLayer` here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from diffquant.core.affine import dequantize
from diffquant.core.clock import StepClock
from diffquant.core.dynamic import DynamicQuantizer, dynamic_quantizer
from diffquant.core.frozen import ReadOnlyWeight
from diffquant.core.quantizer import Quantizer, activation_quantizer, in_float32
from diffquant.core.spec import LayerSpec
from diffquant.errors import SpecError

QUANTIZABLE: dict[type[nn.Module], type[QuantizedLayer]] = {}  # a class of torch, and the one that its layers get


class QuantizedLayer(nn.Module):
    """A layer with quantizers of weight and input; made by `make_quantizable`, never constructed.

    A kind of layer names the class that its layers had before, ``of``. ``channel_axis``: of inputs and outputs.
    """

    multiplies: ClassVar[bool] = True  # whether the output is a product with the input
    channel_axis: ClassVar[int]
    channel_view: ClassVar[tuple[int, ...]]  # the shape in which a value for each channel broadcasts against inputs and outputs

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | DynamicQuantizer | None
    smooth: Tensor | None
    offset: Tensor | None
    bias: Any
    layer_spec: LayerSpec
    like: Tensor  # empty; of the dtype and device that the float weight would have now
    weight_was_read: bool  # by other code, while the layer was frozen

    def __init_subclass__(cls, of: type[nn.Module] | None = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if of is not None:
            if cls.compute is QuantizedLayer.compute:
                raise SpecError(f"{cls.__name__}: has no compute; define what a layer computes of an input, a weight and a bias")
            QUANTIZABLE[of] = cls

    def _weight(self) -> Tensor:
        """The float weight; of a frozen layer the dequantized one, a new tensor each time that cannot be written."""
        if "weight" not in vars(self)["_parameters"]:
            raise AttributeError("weight")  # while the layer is being made
        weight = self.float_weight
        quantizer = vars(self)["_modules"].get("weight_quantizer")
        if weight is not None or quantizer is None or quantizer.codes is None:
            return weight  # type: ignore[return-value]
        self.weight_was_read = True
        smooth = vars(self)["_buffers"].get("smooth")
        dequantized = quantizer.dequantized_codes()
        if smooth is not None:
            dequantized = dequantized / smooth.view(1, -1, *[1] * (dequantized.dim() - 2))
        readable: Tensor = dequantized.detach().to(vars(self)["like"].dtype).as_subclass(ReadOnlyWeight)
        return readable

    weight: Tensor = property(_weight)  # type: ignore[assignment]

    @property
    def float_weight(self) -> Tensor | None:
        """The float weight of the layer, None where it is frozen."""
        weight: Tensor | None = vars(self)["_parameters"]["weight"]
        return weight

    def forget_weight(self) -> None:
        """Let the layer have no float weight any more."""
        vars(self)["_parameters"]["weight"] = None

    @property
    def qweight(self) -> Tensor:
        """The codes of a frozen layer: where peft looks for the device of a LoRA adapter's base layer."""
        quantizer = vars(self)["_modules"].get("weight_quantizer")
        if quantizer is None or quantizer.codes is None or self.float_weight is not None:
            raise AttributeError("qweight: the layer has its float weight")
        codes: Tensor = quantizer.codes
        return codes

    @abstractmethod
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output for an input and a weight; a kind without it is refused when it is defined."""

    def forward(self, input: Tensor) -> Tensor:
        """As of the class that the layer had, of quantized operands."""
        return self.compute(*self.operands(input))

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias as the integer engine would see them; the originals where both quantizers are off."""
        weight_quantizer, input_quantizer = self.weight_quantizer, self.input_quantizer
        if not any(quantizer is not None and quantizer.live for quantizer in (weight_quantizer, input_quantizer)):
            if (weight := self.float_weight) is None:
                raise SpecError("frozen layer: its float weight is gone, so it cannot run with quantizers off")
            return x, weight, self.bias
        bias = self._offset_bias()
        if self.smooth is not None:
            x = x / self.smooth.view(self.channel_view).to(x.dtype)
        if input_quantizer is not None:
            x = input_quantizer(x)
        if self.float_weight is None:
            assert weight_quantizer is not None
            return x, weight_quantizer.frozen_weight(x.dtype), bias
        weight = self.smoothed_weight()
        dtype = x.dtype if self.multiplies else weight.dtype
        return x, (weight if weight_quantizer is None else weight_quantizer(weight)).to(dtype), bias

    @property
    def input_channels(self) -> int:
        """Number of input channels of all groups."""
        weight = self.weight if self.float_weight is None else self.float_weight
        return int(weight.shape[1]) * int(getattr(self, "groups", 1))

    @property
    def splits(self) -> tuple[int, ...]:
        """Sizes of the parts of the input channels that are quantized apart; empty where there is one."""
        return next((each.splits for each in (self.input_quantizer, self.weight_quantizer) if each is not None and each.splits), ())

    def smoothed_weight(self) -> Tensor:
        """The weight times `smooth` along its input channels: what the weight quantizer sees, ``[out, in, ...]``."""
        return self.weight if self.smooth is None else self.weight * self.along_inputs(self.smooth)

    def weight_to_quantize(self) -> Float[Tensor, "out in ..."]:
        """`smoothed_weight` in float32, without a graph: made anew at every call, as all of them are the size of the model."""
        return self.smoothed_weight().detach().float()

    def along_inputs(self, values: Float[Tensor, " in"]) -> Tensor:
        """Values of the input channels, shaped to broadcast against the weight of an ungrouped layer."""
        return values.view(1, -1, *[1] * (self.weight.dim() - 2))

    @property
    def present_spec(self) -> LayerSpec:
        """The layer's spec, with as many parameter sets and bits as its quantizers have now."""
        spec, weight, inputs = self.layer_spec, self.weight_quantizer, self.input_quantizer
        sets = inputs.sets(spec.guidance_sets) if isinstance(inputs, Quantizer) else 1
        return spec.model_copy(update={"sets": sets, "weight": weight and weight.spec, "input": inputs and inputs.spec})

    def freeze(self) -> None:
        """Replace the float weight by integer codes, decided in float32, and add `offset` to the bias; a float weight stays."""
        bias = self._offset_bias()
        if bias is not self.bias and bias is not None:
            self.bias, self.offset = nn.Parameter(bias.detach(), requires_grad=False), None
        if self.weight_quantizer is None or self.float_weight is None:
            return
        self.weight_quantizer.decide(self.weight_to_quantize())
        self.forget_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: tensor for name in ("smooth", "offset") if (tensor := vars(self)["_buffers"].get(name)) is not None}
        applied: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            vars(self)["_buffers"][name] = in_float32(tensor, vars(self)["_buffers"][name])
        self.like = self.like if self.like.is_meta else fn(self.like)  # a tensor without data cannot be moved
        return applied

    def _offset_bias(self) -> Tensor | None:
        bias: Tensor | None = self.bias
        return bias if bias is None or self.offset is None else bias + self.offset.to(bias.dtype)


class QuantizedLinear(QuantizedLayer, nn.Linear, of=nn.Linear):
    """A linear layer, ``[..., in_features]`` -> ``[..., out_features]``."""

    channel_axis, channel_view = -1, (-1,)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The input times the transposed weight, plus the bias."""
        return functional.linear(x, weight, bias)


class _QuantizedConvolution(QuantizedLayer):
    channel_axis = 1

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with its stride, padding, dilation and groups."""
        output: Tensor = self._conv_forward(x, weight, bias)  # type: ignore[operator]
        return output


class QuantizedConv2d(_QuantizedConvolution, nn.Conv2d, of=nn.Conv2d):
    """A convolution, ``[n, in_channels, h, w]`` -> ``[n, out_channels, h', w']``."""

    channel_view = (-1, 1, 1)


class QuantizedConv3d(_QuantizedConvolution, nn.Conv3d, of=nn.Conv3d):
    """A convolution over frames and pixels, ``[n, in_channels, t, h, w]`` -> ``[n, out_channels, t', h', w']``."""

    channel_view = (-1, 1, 1, 1)


class QuantizedEmbedding(QuantizedLayer, nn.Embedding, of=nn.Embedding):  # type: ignore[misc]  # of its `freeze`
    """A table of vectors, ``[...]`` integers -> ``[..., embedding_dim]``; each entry has a scale, and no input is quantized."""

    multiplies, channel_axis, channel_view = False, -1, (-1,)
    bias = None

    def forward(self, input: Tensor) -> Tensor:
        """As of the class that the layer had; of a frozen table only the entries that are asked for are dequantized."""
        quantizer = self.weight_quantizer
        if self.float_weight is not None or quantizer is None or quantizer.codes is None:
            return super().forward(input)
        scale, zero_point = (each.expand(len(quantizer.codes), 1)[input] for each in (quantizer.scale, quantizer.zero_point))
        return dequantize(quantizer.codes[input].float(), scale, zero_point).to(self.like.dtype)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The entries of the table."""
        return functional.embedding(x, weight, self.padding_idx)


def quantizable_names() -> str:
    """The classes of layers that can be quantized, in words."""
    *others, last = (f"nn.{kind.__name__}" for kind in QUANTIZABLE)
    return f"{', '.join(others)} and {last}"


def make_quantizable(layer: nn.Module, spec: LayerSpec, clock: StepClock) -> None:
    """Give a layer of one of the classes in `QUANTIZABLE` its quantizable class in place; quantizers start off and uncalibrated.

    Raises `SpecError` where the spec does not fit the layer's shape.
    """
    if type(layer) not in QUANTIZABLE:
        raise SpecError(f"{type(layer).__name__}: only {quantizable_names()} themselves can be quantized")
    weight, groups = layer.weight, int(getattr(layer, "groups", 1))
    if not QUANTIZABLE[type(layer)].multiplies and (spec.input is not None or spec.smooth or spec.shift):
        raise SpecError(f"{type(layer).__name__}: multiplies nothing, so it has no input to quantize, smooth or shift")
    if getattr(layer, "max_norm", None) is not None:
        raise SpecError(f"{type(layer).__name__}: max_norm changes its table at each call; leave it in floating point")
    assert isinstance(weight, Tensor)
    out_channels, in_channels, grouped = weight.shape[0], weight.shape[1] * groups, groups > 1
    if spec.splits and (grouped or sum(spec.splits) != in_channels):
        raise SpecError(f"splits {list(spec.splits)}: must add up to {in_channels} input channels of an ungrouped layer")
    if spec.smooth and grouped:
        raise SpecError("smooth: not defined for a grouped convolution")
    kind = QUANTIZABLE[type(layer)]
    weight_quantizer = None
    if spec.weight is not None:
        rows = out_channels if spec.weight.granularity == "channel" else 1
        weight_quantizer = Quantizer(spec.weight, rows, spec.splits, axis=1)
    channels = in_channels if spec.shift else 0
    input_quantizer: Quantizer | DynamicQuantizer | None
    if spec.input is not None and spec.input_scale != "static":
        input_quantizer = dynamic_quantizer(layer, spec, spec.input, kind.channel_axis)
    else:
        input_quantizer = activation_quantizer(spec.input, spec, clock, kind.channel_axis, spec.splits, channels)
    device = weight.device
    layer.__class__ = kind
    layer.weight_quantizer = weight_quantizer.to(device) if weight_quantizer is not None else None  # type: ignore[assignment]
    layer.input_quantizer = input_quantizer.to(device) if input_quantizer is not None else None  # type: ignore[assignment]
    smooth = torch.ones(in_channels, device=device, dtype=torch.float32) if spec.smooth else None
    layer.register_buffer("smooth", smooth)
    layer.register_buffer("offset", None)
    layer.layer_spec = spec  # type: ignore[assignment]
    layer.like, layer.weight_was_read = weight.detach().new_empty(0), False  # type: ignore[assignment]


def release_forward(module: nn.Module) -> bool:
    """Whether the class of `module` decides its forward, once an instance's own copy of it is dropped.

    accelerate leaves such a copy behind where its hooks were removed; it would hide the class that is assigned next.
    """
    own = vars(module).get("forward")
    if own is not None and getattr(own, "__func__", None) is type(module).forward:
        del module.forward
    return "forward" not in vars(module)

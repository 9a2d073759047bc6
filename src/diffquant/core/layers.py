"""Quantizable layers: Linear and Conv2d whose class was changed in place, and the products inside an attention.

The float weight stays where it was and is never written. With quantizers off a layer is the layer it was, bit for bit. A frozen
layer has no float weight any more, only the integer codes of its weight quantizer.

    y = quantize(x / smooth) (*) quantize(W * smooth) + bias + offset

``smooth`` [in_channels], positive, and ``offset`` [out_channels] are optional; freezing adds the offset to the bias.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from diffquant.core.clock import StepClock
from diffquant.core.frozen import FrozenWeight, float_weight, forget_weight
from diffquant.core.quantizer import Quantizer
from diffquant.core.spec import AttentionSpec, LayerSpec, SpecError


class QuantizedLinear(FrozenWeight, nn.Linear):
    """A linear layer with quantizers of weight and input; made by `make_quantizable`, never constructed."""

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    smooth: Tensor | None
    offset: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        x, weight, bias = _operands(self, input, channel_axis=-1)
        return functional.linear(x, weight, bias)


class QuantizedConv2d(FrozenWeight, nn.Conv2d):
    """A convolution with quantizers of weight and input; made by `make_quantizable`, never constructed."""

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    smooth: Tensor | None
    offset: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """``[n, in_channels, h, w]`` -> ``[n, out_channels, h', w']``."""
        x, weight, bias = _operands(self, input, channel_axis=1)
        output: Tensor = self._conv_forward(x, weight, bias)
        return output


QuantizedLayer = QuantizedLinear | QuantizedConv2d
QUANTIZABLE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}


def make_quantizable(layer: nn.Module, spec: LayerSpec, clock: StepClock) -> None:
    """Turn an `nn.Linear` or `nn.Conv2d` into its quantizable class in place; quantizers start off and uncalibrated.

    Raises `SpecError` where the spec does not fit the layer's shape.
    """
    if type(layer) not in QUANTIZABLE:
        raise SpecError(f"{type(layer).__name__}: only nn.Linear and nn.Conv2d themselves can be quantized")
    weight = layer.weight
    assert isinstance(weight, Tensor)
    out_channels, in_channels = weight.shape[0], weight.shape[1] * getattr(layer, "groups", 1)
    grouped = getattr(layer, "groups", 1) > 1
    if spec.splits and (grouped or sum(spec.splits) != in_channels):
        raise SpecError(f"splits {list(spec.splits)}: must add up to {in_channels} input channels of an ungrouped layer")
    if spec.smooth and grouped:
        raise SpecError("smooth: not defined for a grouped convolution")
    axis = 1 if isinstance(layer, nn.Conv2d) else -1
    weight_quantizer = input_quantizer = None
    if spec.weight is not None:
        rows = out_channels if spec.weight.granularity == "channel" else 1
        weight_quantizer = Quantizer(spec.weight, rows, spec.splits, axis=1)
    if spec.input is not None:
        channels = in_channels if spec.shift else 0
        rows = spec.sets * (clock.branches if spec.guidance_sets else 1)
        input_quantizer = Quantizer(spec.input, rows, spec.splits, axis, clock, channels, spec.guidance_sets)
        input_quantizer.shared_zero_point = spec.shared_zero_point
    device = weight.device
    layer.__class__ = QUANTIZABLE[type(layer)]
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


def _operands(layer: QuantizedLayer, x: Tensor, channel_axis: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias as the integer engine would see them; the originals where both quantizers are off."""
    weight_quantizer, input_quantizer = layer.weight_quantizer, layer.input_quantizer
    if not any(quantizer is not None and quantizer.live for quantizer in (weight_quantizer, input_quantizer)):
        if (weight := float_weight(layer)) is None:
            raise SpecError("frozen layer: its float weight is gone, so it cannot run with quantizers off")
        return x, weight, layer.bias
    bias = _offset_bias(layer)
    if layer.smooth is not None:
        shape = [1] * x.dim()
        shape[channel_axis] = -1
        x = x / layer.smooth.view(shape).to(x.dtype)
    if input_quantizer is not None:
        x = input_quantizer(x)
    if float_weight(layer) is None:
        assert weight_quantizer is not None
        return x, weight_quantizer.frozen_weight(x.dtype), bias
    weight = smoothed_weight(layer)
    return x, (weight if weight_quantizer is None else weight_quantizer(weight)).to(x.dtype), bias


def _offset_bias(layer: QuantizedLayer) -> Tensor | None:
    return layer.bias if layer.bias is None or layer.offset is None else layer.bias + layer.offset.to(layer.bias.dtype)


def smoothed_weight(layer: QuantizedLayer) -> Tensor:
    """The float weight times `smooth` along its input channels: what the weight quantizer sees, ``[out, in, ...]``."""
    if layer.smooth is None:
        return layer.weight
    return layer.weight * layer.smooth.view(1, -1, *[1] * (layer.weight.dim() - 2))


def present_spec(layer: QuantizedLayer) -> LayerSpec:
    """The layer's spec, with as many parameter sets and bits as its quantizers have now."""
    spec: LayerSpec = layer.layer_spec  # type: ignore[assignment]
    weight, given = layer.weight_quantizer, layer.input_quantizer
    sets = 1 if given is None else _sets(given, spec.guidance_sets)
    return spec.model_copy(update={"sets": sets, "weight": weight and weight.spec, "input": given and given.spec})


def _sets(quantizer: Quantizer, guidance_sets: bool) -> int:
    """Parameter sets of a quantizer, of one half of a guided call where each has its own."""
    assert quantizer.clock is not None
    return quantizer.rows // (quantizer.clock.branches if guidance_sets else 1)


def freeze_layer(layer: QuantizedLayer) -> None:
    """Replace the float weight by integer codes, decided in float32, and add `offset` to the bias; a float weight stays."""
    bias = _offset_bias(layer)
    if bias is not layer.bias and bias is not None:
        layer.bias, layer.offset = nn.Parameter(bias.detach(), requires_grad=False), None
    if layer.weight_quantizer is None or float_weight(layer) is None:
        return
    layer.weight_quantizer.decide(smoothed_weight(layer).detach().float())
    forget_weight(layer)


class AttentionProducts(nn.Module):
    """Quantizers of the operands of an attention's two products, softmax(q k^T) and its product with v.

    Active, it takes the place of `scaled_dot_product_attention` for calls made inside its attention module; with every quantizer
    off the original is called.
    """

    def __init__(self, spec: AttentionSpec, clock: StepClock) -> None:
        super().__init__()
        self.spec = spec
        for name in ("query", "key", "value", "softmax"):
            operand = getattr(spec, name)
            rows = spec.sets * (clock.branches if spec.guidance_sets else 1)
            per_branch = spec.guidance_sets
            quantizer = None if operand is None else Quantizer(operand, rows, axis=-1, clock=clock, per_branch=per_branch)
            if quantizer is not None:
                quantizer.shared_zero_point = spec.shared_zero_point
            setattr(self, name, quantizer)

    @property
    def live(self) -> bool:
        """Whether any of the quantizers is on or observed."""
        return any(isinstance(module, Quantizer) and module.live for module in self.children())

    @property
    def present_spec(self) -> AttentionSpec:
        """The spec, with as many parameter sets as the quantizers have now."""
        sets = [_sets(module, self.spec.guidance_sets) for module in self.children() if isinstance(module, Quantizer)]
        return self.spec.model_copy(update={"sets": max(sets, default=1)})

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention over ``[batch, heads, tokens, width]`` with quantized operands."""
        if dropout_p or is_causal or enable_gqa:
            raise SpecError("attention products: dropout, causal masks and grouped heads are not quantized; set them to float")
        query, key, value = (self._fake(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return self._fake("softmax", scores.softmax(dim=-1)) @ value

    def _fake(self, name: str, x: Tensor) -> Tensor:
        quantizer = getattr(self, name)
        return x if quantizer is None else quantizer(x)


class _InterceptAttention(TorchFunctionMode):
    """Sends `scaled_dot_product_attention` to an `AttentionProducts` while entered."""

    def __init__(self, products: AttentionProducts) -> None:
        super().__init__()
        self.products = products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self.products(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attach_products(attention: nn.Module, spec: AttentionSpec, clock: StepClock) -> None:
    """Give an attention module (one that has a `processor`) quantized products; its class is changed in place."""
    device = next((parameter.device for parameter in attention.parameters()), torch.device("cpu"))
    attention.attention_products = AttentionProducts(spec, clock).to(device)
    attention.__class__ = _intercepting(type(attention))  # type: ignore[arg-type]


@functools.cache
def _intercepting(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of an attention class, of the same name, that sends its products through `attention_products` while it runs."""
    its_forward: Any = original.forward  # looked up here: `torch.compile` cannot follow a method looked up on a class

    @functools.wraps(its_forward)
    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        products = self.attention_products
        assert isinstance(products, AttentionProducts)
        if not products.live:
            return its_forward(self, *arguments, **keywords)
        with _InterceptAttention(products):
            return its_forward(self, *arguments, **keywords)

    return derived(original, _intercepting, forward)


def derived(original: type[nn.Module], make: Callable[..., type[nn.Module]], forward: Any) -> type[nn.Module]:
    """A subclass of a module's class, of the same name, with another forward; `make` of the class makes it again when unpickled."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _blank, (make, original), vars(self).copy()

    methods = {"forward": forward, "__module__": original.__module__, "__reduce_ex__": reduce}
    return type(original.__name__, (original,), methods)


def _blank(make: Callable[..., type[nn.Module]], original: type[nn.Module]) -> nn.Module:
    kind = make(original)
    return kind.__new__(kind)

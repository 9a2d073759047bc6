"""The int8 engine: a frozen model computed with integers on a CPU, by PyTorch's own kernels and no further dependency.

`lower` changes the class of frozen layers in place, as `make_quantizable` did before: their integer weights are laid out once for
the kernels and held in that form only; a call quantizes its input to codes of 2-8 bits, held in 8, and multiplies integers.

A lowered model still has its codes: `state_dict`, saving and `simulate` unpack them, and so does moving it to another device. What
cannot be lowered stays as it was, and `lower` says why.
"""

from __future__ import annotations

import ctypes
import sys
from typing import NamedTuple

from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from diffquant.core.layers import AttentionProducts, QuantizedConv2d, QuantizedLayer, QuantizedLinear
from diffquant.core.surgery import quantized_layers
from diffquant.runtime.engines.attention import BlockedProducts, integer_products
from diffquant.runtime.engines.exactness import ALL, answer_of
from diffquant.runtime.engines.float_layers import FloatLinear, FloatProduct, faster_in_float
from diffquant.runtime.engines.integer_blocks import (
    IntegerFeedForward,
    IntegerResnetBlock2D,
    IntegerUpsample,
    TokenNorm,
)
from diffquant.runtime.engines.integer_layers import (
    INTEGER,
    ChannelsLastConv2d,
    IntegerConv2d,
    IntegerLinear,
    PackedCodes,
    products_of,
    steps_of,
)
from diffquant.runtime.engines.kernels import Product
from diffquant.runtime.engines.packed import kernel_of

KERNELS = ("torch linear", "torch convolution")  # as `exactness` names them
SIMULATED: dict[type[nn.Module], type[nn.Module]] = {
    IntegerFeedForward: FeedForward,
    IntegerResnetBlock2D: ResnetBlock2D,
    IntegerUpsample: Upsample2D,
    BlockedProducts: AttentionProducts,
    TokenNorm: nn.GroupNorm,
}  # the class that a module had before it was lowered


class Lowered(NamedTuple):
    """What became of one layer or attention: `reason` is empty where it computes with integers."""

    name: str
    reason: str


def unsupported() -> str:
    """Why PyTorch multiplies no 8-bit integers exactly on this machine; empty where it does."""
    answers = [answer_of(kernel) for kernel in KERNELS]
    if any(answer.usable for answer in answers):
        return ""
    return answers[0].reason or "PyTorch's integer products are not exact on this machine"


def lower(model: nn.Module) -> list[Lowered]:
    """Let every layer and attention of a frozen `model` that can compute with integers, in place; a row for each."""
    rows = []
    integer_products()  # is asked before a call needs the answer
    for name, layer in quantized_layers(model):
        reason = lower_layer(layer) or ("other code reads its weight, and computes with it" if layer.weight_was_read else "")
        rows.append(Lowered(name, reason))
        if type(layer) is QuantizedConv2d:
            layer.__class__ = ChannelsLastConv2d
    for name, module in model.named_modules():
        if type(module) is FeedForward and type(module.net[0]) in (GELU, GEGLU):
            module.__class__ = IntegerFeedForward
            assert isinstance(module, IntegerFeedForward)
            module.halved_where_gated()
        if type(module) is ResnetBlock2D:
            module.__class__ = IntegerResnetBlock2D
        if type(module) is Upsample2D:
            module.__class__ = IntegerUpsample
        if isinstance(module, Attention) and type(module.group_norm) is nn.GroupNorm:
            module.group_norm.__class__ = TokenNorm
        if type(module) is AttentionProducts:
            module.__class__ = BlockedProducts
        if isinstance(module, BlockedProducts):
            rows.append(Lowered(name.removesuffix(".attention_products"), ""))
    return rows


def is_lowered(layer: nn.Module) -> bool:
    """Whether a layer computes with this engine, with integers or not."""
    return isinstance(layer, (*INTEGER, FloatLinear))


def simulate(model: nn.Module) -> None:
    """Undo `lower`: every layer holds its codes again and computes with them in floating point."""
    for _, layer in quantized_layers(model):
        if isinstance(layer.weight_quantizer, PackedCodes):
            layer.weight_quantizer.unpack()
        if isinstance(layer, INTEGER):
            layer.__class__ = QuantizedLinear if isinstance(layer, IntegerLinear) else QuantizedConv2d  # type: ignore[assignment]
            del layer.product
        if isinstance(layer, FloatLinear):
            layer.__class__ = QuantizedLinear  # type: ignore[assignment]
            del layer.float_product
        if isinstance(layer, ChannelsLastConv2d):
            layer.__class__ = QuantizedConv2d  # type: ignore[assignment]
    for module in model.modules():
        if type(module) in SIMULATED:
            module.__class__ = SIMULATED[type(module)]


def lower_layer(layer: QuantizedLayer) -> str:
    """Let one frozen layer compute with integers, in place; the reason why not where it cannot."""
    weight, given = layer.weight_quantizer, layer.input_quantizer
    if weight is None or given is None:
        return "its weight stays in floating point" if weight is None else "its input stays in floating point"
    if isinstance(weight, PackedCodes):
        return ""
    if isinstance(layer, FloatLinear):
        return layer.float_product.reason
    if weight.codes is None:
        return "its weight is not frozen"
    if weight.codes.device.type != "cpu":
        return f"it is on {weight.codes.device}"
    if isinstance(layer, QuantizedConv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return f"padding {layer.padding!r}, mode {layer.padding_mode!r}"
    if not (answer := answer_of(kernel_of(layer))).usable:
        return f"this machine's {answer.kernel} is not exact"
    largest = answer.largest(given.spec.code_max - given.spec.code_min)
    if given.shift is None and largest < ALL - 1:
        products = products_of(weight, largest)
        if faster_in_float(layer, products, largest):
            reason = f"{products} products of integers would take longer here than one in floating point"
            steps = steps_of(layer, given, weight)
            layer.__class__ = FloatLinear
            layer.float_product = FloatProduct(weight.dequantized_codes(), steps, given.splits, reason)  # type: ignore[assignment]
            return reason
    weight.__class__ = PackedCodes
    assert isinstance(weight, PackedCodes)
    weight.pack(layer, given)
    layer.__class__ = IntegerConv2d if isinstance(layer, QuantizedConv2d) else IntegerLinear
    layer.product = Product(layer, steps_of(layer, given, weight), given.splits)  # type: ignore[assignment]
    return ""


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc); elsewhere nothing.

    Unpacking and laying out the weights of a large model one by one leaves holes as large as half the model.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

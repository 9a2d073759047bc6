"""The int8 engine: a frozen model computed with integers on a CPU, by PyTorch's own kernels and no further dependency.

`Int8.install` changes the class of frozen layers in place, as `make_quantizable` did before. Their integer weights are laid out
once for the kernels and held in that form only. A call quantizes its input to codes of 2-8 bits, held in 8, and multiplies
integers.

The model still has its codes: `state_dict`, saving, `uninstall` and moving it to another device unpack them. A layer that cannot
compute with integers stays as it was, and its row says why.
"""

from __future__ import annotations

from typing import Any, final

from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from diffquant.core.attention import AttentionProducts
from diffquant.core.dynamic import DynamicQuantizer
from diffquant.core.layers import QUANTIZABLE, QuantizedConv2d, QuantizedLayer, QuantizedLinear
from diffquant.core.memory import release_freed_memory
from diffquant.core.model import quantized_layers
from diffquant.engines.base import Engine, Lowered, attentions, float_operand
from diffquant.engines.exactness import ALL, answer_of, products_needed
from diffquant.engines.int8.attention import BlockedProducts, integer_products
from diffquant.engines.int8.dynamic import DynamicProduct
from diffquant.engines.int8.float_layers import FloatLinear, FloatProduct, faster_in_float
from diffquant.engines.int8.integer_blocks import (
    IntegerFeedForward,
    IntegerResnetBlock2D,
    IntegerUpsample,
    TokenNorm,
)
from diffquant.engines.int8.integer_layers import (
    ChannelsLastConv2d,
    IntegerConv2d,
    IntegerLinear,
    LaidOut,
    PackedCodes,
    products_of,
    sets_of,
    simulated_class,
)
from diffquant.engines.int8.kernels import Product
from diffquant.engines.int8.packed import kernel_of

KERNELS = ("torch linear", "torch convolution")  # as `exactness` names them
LARGE = 1 << 20  # values of a weight after whose loading freed memory is given back
LOWERED: dict[type[nn.Module], type[nn.Module]] = {
    FeedForward: IntegerFeedForward,
    ResnetBlock2D: IntegerResnetBlock2D,
    Upsample2D: IntegerUpsample,
    AttentionProducts: BlockedProducts,
}  # the class that a module gets
SIMULATED = {lowered: kind for kind, lowered in LOWERED.items()} | {TokenNorm: nn.GroupNorm}


@final
class Int8(Engine):
    """PyTorch's integer kernels; the layers themselves hold the packed weights."""

    name, rank = "int8", 10

    @classmethod
    def unsupported(cls) -> str:
        """Why PyTorch multiplies no 8-bit integers exactly on this machine; empty where it does."""
        answers = [answer_of(kernel) for kernel in KERNELS]
        if any(answer.usable for answer in answers):
            return ""
        return answers[0].reason or "PyTorch's integer products are not exact on this machine"

    @classmethod
    def explained(cls) -> str:
        """How many products a weight takes."""
        return products_needed(KERNELS)

    @classmethod
    def speed(cls) -> float:
        """Of the faster kernel."""
        return max((answer.speed for answer in map(answer_of, KERNELS) if answer.usable), default=0.0)

    def install(self, model: nn.Module) -> list[Lowered]:
        """Let every layer and attention that can compute with integers; weights are laid out."""
        rows = []
        integer_products()  # is asked before a call needs the answer
        for name, layer in quantized_layers(model):
            reason = lower_layer(layer) or ("other code reads its weight, and computes with it" if layer.weight_was_read else "")
            rows.append(Lowered(name, reason))
            if type(layer) is QuantizedConv2d:
                layer.__class__ = ChannelsLastConv2d
        module: Any
        for module in model.modules():
            if isinstance(module, Attention) and type(module.group_norm) is nn.GroupNorm:
                module.group_norm.__class__ = TokenNorm
            if type(module) in LOWERED and (type(module) is not FeedForward or type(module.net[0]) in (GELU, GEGLU)):
                module.__class__ = LOWERED[type(module)]
                if isinstance(module, IntegerFeedForward):
                    module.halved_where_gated()
        return rows + [Lowered(name, "") for name, module in attentions(model).items() if isinstance(module, BlockedProducts)]

    def uninstall(self, model: nn.Module) -> None:
        """Unpack the codes, and give modules their own classes again."""
        for _, layer in quantized_layers(model):
            if isinstance(layer.weight_quantizer, PackedCodes):
                layer.weight_quantizer.unpack()
            if isinstance(layer, LaidOut):
                del layer.product
            if isinstance(layer, LaidOut | ChannelsLastConv2d):
                layer.__class__ = simulated_class(layer)  # type: ignore[assignment]
        for module in model.modules():
            if type(module) in SIMULATED:
                module.__class__ = SIMULATED[type(module)]

    def take(self, layer: QuantizedLayer) -> None:
        """Lay out one layer's weight at once: all codes, and all of them laid out, are twice the memory."""
        codes = None if layer.weight_quantizer is None else layer.weight_quantizer.codes
        size = 0 if codes is None else codes.numel()
        del codes
        lower_layer(layer)
        if size > LARGE:
            release_freed_memory()


def lower_layer(layer: QuantizedLayer) -> str:
    """Let one frozen layer compute with integers, in place; the reason why not where it cannot."""
    weight, inputs = layer.weight_quantizer, layer.input_quantizer
    if weight is None or inputs is None:
        return float_operand(layer)
    if isinstance(weight, PackedCodes):
        return ""
    if isinstance(layer, FloatLinear):
        return layer.product.reason
    if weight.codes is None:
        return "its weight is not frozen"
    if weight.codes.device.type != "cpu":
        return f"it is on {weight.codes.device}"
    if not isinstance(layer, QuantizedLinear | QuantizedConv2d):
        kind = next(of for of, kind in QUANTIZABLE.items() if isinstance(layer, kind))
        return f"PyTorch has no integer kernel for {kind.__name__}"
    if isinstance(layer, QuantizedConv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return f"padding {layer.padding!r}, mode {layer.padding_mode!r}"
    if not (answer := answer_of(kernel_of(layer))).usable:
        return f"this machine's {answer.kernel} is not exact"
    largest = answer.largest(inputs.spec.code_max - inputs.spec.code_min)
    if inputs.shift is None and largest < ALL - 1:
        products = products_of(weight, largest)
        if faster_in_float(layer, products, largest):
            reason = f"{products} products of integers would take longer here than one in floating point"
            if isinstance(inputs, DynamicQuantizer):
                return reason
            sets = sets_of(layer, inputs, weight)
            layer.__class__ = FloatLinear
            layer.product = FloatProduct(weight.dequantized_codes(), sets, inputs.splits, reason)  # type: ignore[assignment]
            return reason
    weight.__class__ = PackedCodes
    assert isinstance(weight, PackedCodes)
    weight.pack(layer, inputs)
    layer.__class__ = IntegerConv2d if isinstance(layer, QuantizedConv2d) else IntegerLinear
    if isinstance(inputs, DynamicQuantizer):
        layer.product = DynamicProduct(layer, inputs, weight.packed[0][0])  # type: ignore[assignment]
    else:
        layer.product = Product(layer, sets_of(layer, inputs, weight), inputs.splits)  # type: ignore[assignment]
    return ""

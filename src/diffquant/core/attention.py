"""Attention with quantized operands: the products of an attention module, and the subclass that sends its calls to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from diffquant.core.clock import StepClock
from diffquant.core.quantizer import Quantizer, activation_quantizer
from diffquant.core.spec import AttentionSpec
from diffquant.errors import SpecError

OPERANDS = ("query", "key", "value", "softmax")
ATTRIBUTE = "attention_products"  # of an attention module, which holds its `AttentionProducts`


class AttentionCall(NamedTuple):
    """Operands ``[batch, heads, tokens, width]`` of an attention, its mask, and the factor of its scores."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    factor: float

    def masked(self, scores: Tensor) -> Tensor:
        """The scores with the mask added, or -inf where a mask of truth values is False."""
        if self.mask is None:
            return scores
        return scores.masked_fill(~self.mask, -torch.inf) if self.mask.dtype == torch.bool else scores + self.mask


def attention_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """The call with these arguments of `scaled_dot_product_attention`. Raises `SpecError` for options that are not supported."""
    if dropout_p or is_causal or enable_gqa:
        raise SpecError("attention products: dropout, causal masks and grouped heads are not quantized; set them to float")
    return AttentionCall(query, key, value, attn_mask, int(query.shape[-1]) ** -0.5 if scale is None else scale)


class AttentionProducts(nn.Module):
    """Quantizers of the operands of an attention's two products, softmax(q k^T) and its product with v.

    Active, it takes the place of `scaled_dot_product_attention` for calls made inside its attention module; with every quantizer
    off the original is called.
    """

    def __init__(self, spec: AttentionSpec, clock: StepClock) -> None:
        super().__init__()
        self.spec = spec
        for name in OPERANDS:
            setattr(self, name, activation_quantizer(getattr(spec, name), spec, clock, axis=-1))

    @property
    def live(self) -> bool:
        """Whether any of the quantizers is on or observed."""
        return any(isinstance(module, Quantizer) and module.live for module in self.children())

    @property
    def present_spec(self) -> AttentionSpec:
        """The spec, with as many parameter sets as the quantizers have now."""
        sets = [module.sets(self.spec.guidance_sets) for module in self.children() if isinstance(module, Quantizer)]
        return self.spec.model_copy(update={"sets": max(sets, default=1)})

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        """Attention with quantized operands; takes what `scaled_dot_product_attention` does."""
        return self.compute(attention_call(*arguments, **keywords))

    def compute(self, call: AttentionCall) -> Tensor:
        """The output of a call, ``[batch, heads, tokens, width]``."""
        query, key, value = self.quantized(call)
        return self._fake("softmax", call.masked(query @ key.transpose(-2, -1) * call.factor).softmax(dim=-1)) @ value

    def quantized(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a call, each quantized where it has a quantizer that is on."""
        return self._fake("query", call.query), self._fake("key", call.key), self._fake("value", call.value)

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
    setattr(attention, ATTRIBUTE, AttentionProducts(spec, clock).to(device))
    attention.__class__ = _intercepting(type(attention))  # type: ignore[arg-type]


@functools.cache
def _intercepting(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of an attention class, of the same name, that sends its products through `attention_products` while it runs."""
    its_forward: Any = original.forward  # looked up here: `torch.compile` cannot follow a method looked up on a class

    @functools.wraps(its_forward)
    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        products = getattr(self, ATTRIBUTE)
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

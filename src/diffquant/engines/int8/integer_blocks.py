"""Modules of diffusers around integer layers, computed with less traffic through memory while a model is lowered.

Where anything about a call is unusual (training, hooks on the layers, another type, samples with different parameter sets) they
compute as they did before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from diffquant.core.layers import QuantizedConv2d
from diffquant.core.quantizer import Quantizer
from diffquant.engines.changes import is_hooked
from diffquant.engines.int8.integer_layers import (
    INTEGER,
    IntegerLinear,
    bias_of,
    computes_integers,
    differentiated,
    multiply,
)
from diffquant.engines.int8.kernels import Product, compiled_feed_forward, feed_forward

LARGEST = 1 << 31  # values that torch upsamples in the memory format of convolutions


class IntegerFeedForward(FeedForward):
    """A feed-forward with GELU or GEGLU between its two layers, some tokens at a time; made by `Int8.install`, never constructed.

    GELU is computed inside the first layer's kernel, which puts out the codes of the second where that takes all 256 of them.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        first, second = self.net[0].proj, self.net[2]  # looked up at every call: an adapter may have taken a layer's place
        rows = [_row_of_one(layer) for layer in (first, second)]
        unusual = self.training or _watched(first, second, *self.net) or hidden_states.dtype != torch.float32
        unusual = unusual or differentiated(hidden_states) or not self.halved_where_gated()
        if unusual or rows[0] is None or rows[1] is None or not one_product(first):
            output: Tensor = super().forward(hidden_states, *args, **kwargs)
            return output
        biases = [bias_of(layer) for layer in (first, second)]
        codes = first.product.codes(hidden_states, rows[0])[0]
        gelu = getattr(self.net[0], "approximate", "none")  # GEGLU has the exact one
        if torch.compiler.is_compiling():
            at = [None if isinstance(row, int) else row for row in rows]
            compiled: Tensor = compiled_feed_forward(codes, [first.product.number, second.product.number], at, biases, gelu)
            return compiled
        products = (first.product, second.product)
        return feed_forward(codes, products, (int(rows[0]), int(rows[1])), (biases[0], biases[1]), gelu)

    def halved_where_gated(self) -> bool:
        """Whether the first layer's weight lies in halves, if one half of it gates the other; lays it so where it can."""
        if type(self.net[0]) is not GEGLU:
            return True
        first, second = self.net[0].proj, self.net[2]
        if not one_product(first) or not isinstance(second, IntegerLinear):
            return False
        first.product.halve()
        return True


class IntegerUpsample(Upsample2D):
    """Upsampling before a convolution, of its codes: quantized first, then repeated; made by `Int8.install`, never constructed.

    diffusers copies batches of 64 and more out of the memory format of convolutions and back.
    """

    def forward(self, hidden_states: Tensor, output_size: int | Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """``[n, channels, h, w]`` -> ``[n, out_channels, 2 h, 2 w]``, or of `output_size`; channels last in memory."""
        layer = self.conv
        row = _row_of_one(layer) if self.interpolate and self.norm is None and self.name == "conv" else None
        large = 4 * hidden_states.numel() >= LARGEST
        unusual = self.training or _watched(layer) or differentiated(hidden_states) or hidden_states.dtype != torch.float32
        if row is None or large or unusual:
            output: Tensor = super().forward(hidden_states, output_size, *args, **kwargs)
            return output
        size: dict[str, Any] = {"scale_factor": 2.0} if output_size is None else {"size": output_size}
        codes = layer.product.codes(hidden_states.contiguous(memory_format=torch.channels_last), row)
        return multiply(layer.product, [functional.interpolate(each, **size) for each in codes], row, bias_of(layer), torch.float32)


class IntegerResnetBlock2D(ResnetBlock2D):
    """A residual block that writes into what its own layers have just put out; made by `Int8.install`, never constructed.

    Its values are those of diffusers' block, bit for bit, without a pass over memory for a factor of one.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """``[n, in_channels, h, w]``, ``[n, temb_channels]`` -> ``[n, out_channels, h, w]``."""
        if args or kwargs or self._unusual(input_tensor, temb):
            output: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return output
        hidden: Tensor = self.conv1(functional.silu(self.norm1(input_tensor), inplace=True))
        if temb is not None:
            embedded = self.time_emb_proj(temb if self.skip_time_act else functional.silu(temb))[:, :, None, None]
            if self.time_embedding_norm == "scale_shift":
                factor, added = embedded.chunk(2, dim=1)
                hidden = self.norm2(hidden).mul_(1 + factor).add_(added)
            else:
                hidden = self.norm2(hidden.add_(embedded))
        else:
            hidden = self.norm2(hidden)
        hidden = self.conv2(functional.silu(hidden, inplace=True))
        hidden.add_(input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))
        return hidden if self.output_scale_factor == 1 else hidden.div_(self.output_scale_factor)

    def _unusual(self, x: Tensor, temb: Tensor | None) -> bool:
        """Whether diffusers' own forward does more than this one, or someone looks at what this one overwrites."""
        embedded = self.time_emb_proj is not None and self.time_embedding_norm in ("default", "scale_shift")
        return (
            self.training
            or differentiated(x)
            or not all(isinstance(layer, QuantizedConv2d) for layer in (self.conv1, self.conv2))  # but an adapter
            or _watched(self.norm1, self.nonlinearity, self.conv1, self.norm2, self.dropout, self.conv2)
            or self.upsample is not None
            or self.downsample is not None
            or type(self.nonlinearity) is not nn.SiLU
            or (temb is not None) != embedded
            or any(tensor is not None and tensor.dtype != torch.float32 for tensor in (x, temb))
        )


class TokenNorm(nn.GroupNorm):
    """The normalization before an attention over a picture's tokens; made by `Int8.install`, never constructed.

    It is given [n, channels, tokens] as the transpose of [n, tokens, channels], and keeps that layout; without this, it and all
    that reads it make copies.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[n, channels, ...]`` -> the same."""
        return super().forward(input.unsqueeze(2)).squeeze(2) if input.dim() == 3 else super().forward(input)


def _watched(*modules: nn.Module) -> bool:
    return any(is_hooked(module) for module in modules)


def _row_of_one(layer: nn.Module | None) -> int | Tensor | None:
    """The parameter set of a layer that computes with integers; None where it does not, or samples have different scales."""
    if not isinstance(layer, INTEGER) or not computes_integers(layer) or not isinstance(layer.input_quantizer, Quantizer):
        return None
    rows = layer.input_quantizer.present_rows(torch.device("cpu"))
    return rows if isinstance(rows, int) or torch.compiler.is_compiling() else None


def one_product(layer: nn.Module) -> bool:
    """Whether a layer's output is one product of integers, which can be cut along the outputs."""
    return isinstance(layer, IntegerLinear) and isinstance(layer.product, Product) and layer.product.one_matrix

"""The output of a layer under a choice of ``smooth``, with both operands quantized over ranges that follow it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffquant.core.affine import fake_quantize, scale_from_range
from diffquant.core.layers import QuantizedLayer
from diffquant.core.spec import QuantSpec
from diffquant.methods.ranges import search_range


@dataclass(frozen=True)
class Live:
    """How operands are quantized while their ranges follow ``smooth``.

    Ranges of inputs are the extremes of all samples, times ``shrink`` if set. Those of weights are extremes, or ``searched`` as in
    ``mse``.
    """

    shrink: tuple[Float[Tensor, " splits"], Float[Tensor, " splits"]] | None = None
    searched: bool = False


def has_both(layer: QuantizedLayer) -> bool:
    """Whether equivalent scaling means anything for `layer`: it has the vector, and both operands are quantized."""
    return layer.smooth is not None and layer.weight_quantizer is not None and layer.input_quantizer is not None


def live_output(
    layer: QuantizedLayer, smooth: Float[Tensor, " in"], x: Float[Tensor, "n ..."], live: Live = Live()
) -> Float[Tensor, "n ..."]:
    """The output of `layer` with both operands quantized over their present ranges, per split, differentiable in `smooth`."""
    return layer.compute(_live_input(layer, smooth, x, live), _live_weight(layer, smooth, live), layer.bias)


def relative_error(layer: QuantizedLayer, smooth: Tensor, x: Tensor, target: Tensor, batch_size: int, live: Live = Live()) -> float:
    """Relative L2 error of `live_output` over all samples, a batch at a time."""
    error = signal = 0.0
    with torch.no_grad():
        weight = _live_weight(layer, smooth, live)
        for picked in torch.arange(len(x)).split(batch_size):
            output = layer.compute(_live_input(layer, smooth, x[picked].to(smooth.device), live), weight, layer.bias)
            expected = target[picked].to(smooth.device)
            error += float((output - expected).square().sum())
            signal += float(expected.float().square().sum())
    return math.sqrt(error / max(signal, 1e-24))


def searched_shrink(
    layer: QuantizedLayer, x: Float[Tensor, "n ..."], batch_size: int, batches: int = 4, values: int = 1 << 16
) -> tuple[Float[Tensor, " splits"], Float[Tensor, " splits"]]:
    """Shares of the least and the largest input that the search of ``mse`` keeps, as means over some batches."""
    assert layer.input_quantizer is not None
    lows, highs = [], []
    for batch in x[:: max(1, len(x) // (batches * batch_size))].split(batch_size)[:batches]:
        for part in batch.float().split(_sizes(layer), dim=layer.channel_axis):
            rows = part.reshape(1, -1)
            widest = rows.amin(dim=1).clamp(max=0), rows.amax(dim=1).clamp(min=0)
            low, high = search_range(rows[:, :: max(1, rows.numel() // values)], layer.input_quantizer.spec, widest)
            lows.append((low / widest[0].clamp(max=-1e-12)).mean())
            highs.append((high / widest[1].clamp(min=1e-12)).mean())
    splits = len(_sizes(layer))
    return tuple(torch.stack(shares).view(-1, splits).mean(dim=0) for shares in (lows, highs))  # type: ignore[return-value]


def sample_errors(output: Tensor, target: Tensor, layer: QuantizedLayer) -> Float[Tensor, " n"]:
    """Squared error of each sample: summed over channels, averaged over positions."""
    channels = output.shape[layer.channel_axis]
    return (output - target.float()).square().flatten(1).mean(dim=1) * channels


def _live_input(layer: QuantizedLayer, smooth: Tensor, x: Tensor, live: Live) -> Tensor:
    """`x` divided by `smooth`, quantized over its extremes (which are taken before the division), times ``live.shrink``."""
    assert layer.input_quantizer is not None
    axis, sizes, spec = layer.channel_axis % x.dim(), _sizes(layer), layer.input_quantizer.spec
    reduced = [dim for dim in range(x.dim()) if dim != axis]
    shrink = [(1.0, 1.0)] * len(sizes) if live.shrink is None else list(zip(*(ends.tolist() for ends in live.shrink), strict=True))
    parts = []
    for part, factors, ends in zip(x.float().split(sizes, dim=axis), (1 / smooth).split(sizes), shrink, strict=True):
        channels = part.detach()
        low, high = channels.amin(reduced), channels.amax(reduced)
        low, high = (low * factors).amin(dim=-1) * ends[0], (high * factors).amax(dim=-1) * ends[1]
        scaled = part * factors.view([-1 if dim == axis else 1 for dim in range(x.dim())])
        parts.append(_quantized(scaled, low, high, spec))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def _live_weight(layer: QuantizedLayer, smooth: Tensor, live: Live) -> Tensor:
    quantizer = layer.weight_quantizer
    assert quantizer is not None and layer.weight is not None
    parts = []
    for part in (layer.weight.float() * layer.along_inputs(smooth)).split(_sizes(layer), dim=1):
        flat = part.reshape(quantizer.rows, -1)
        low, high = flat.amin(dim=1), flat.amax(dim=1)
        if live.searched:
            low, high = search_range(flat, quantizer.spec, (low, high))
        parts.append(_quantized(part, low, high, quantizer.spec))
    return torch.cat(parts, dim=1)


def _quantized(values: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """`values` quantized over ranges of their rows, or of all."""
    scale, zero_point = scale_from_range(low, high, spec)
    shape = (-1, *[1] * (values.dim() - 1))
    return fake_quantize(values, scale.view(shape), zero_point.view(shape), spec)


def _sizes(layer: QuantizedLayer) -> tuple[int, ...]:
    return layer.splits or (layer.input_channels,)

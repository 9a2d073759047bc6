"""What the methods that choose ``smooth`` share: a layer's output under a vector, quantized over ranges that follow it."""

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
    """How operands are quantized whose ranges follow a vector.

    Ranges of inputs are the extremes of all samples, times ``shrink`` where that is given; those of weights extremes, or
    ``searched`` as in ``mse``.
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
            wanted = target[picked].to(smooth.device)
            error += float((output - wanted).square().sum())
            signal += float(wanted.float().square().sum())
    return math.sqrt(error / max(signal, 1e-24))


def searched_shrink(
    layer: QuantizedLayer, x: Float[Tensor, "n ..."], batch_size: int, batches: int = 4, values: int = 1 << 16
) -> tuple[Float[Tensor, " splits"], Float[Tensor, " splits"]]:
    """What the search of ``mse`` leaves of the least and the largest input: the mean share over some batches."""
    assert layer.input_quantizer is not None
    axis, spec = layer.channel_axis, layer.input_quantizer.spec
    lows, highs = [], []
    for batch in x[:: max(1, len(x) // (batches * batch_size))].split(batch_size)[:batches]:
        for part in batch.float().split(_sizes(layer), dim=axis):
            rows = part.reshape(1, -1)
            widest = rows.amin(dim=1).clamp(max=0), rows.amax(dim=1).clamp(min=0)
            some = rows[:, :: max(1, rows.numel() // values)]
            low, high = search_range(some, torch.ones_like(some), spec, widest)
            lows.append((low / widest[0].clamp(max=-1e-12)).mean())
            highs.append((high / widest[1].clamp(min=1e-12)).mean())
    splits = len(_sizes(layer))
    return tuple(torch.stack(found).view(-1, splits).mean(dim=0) for found in (lows, highs))  # type: ignore[return-value]


def sample_errors(output: Tensor, target: Tensor, layer: QuantizedLayer) -> Float[Tensor, " n"]:
    """Squared error of each sample: summed over channels, averaged over positions."""
    channels = output.shape[layer.channel_axis]
    return (output - target.float()).square().flatten(1).mean(dim=1) * channels


def _live_input(layer: QuantizedLayer, smooth: Tensor, x: Tensor, live: Live) -> Tensor:
    quantizer, axis = layer.input_quantizer, layer.channel_axis % x.dim()
    assert quantizer is not None
    sizes, spec = _sizes(layer), quantizer.spec
    shrink = [(1.0, 1.0)] * len(sizes) if live.shrink is None else list(zip(*(ends.tolist() for ends in live.shrink), strict=True))
    parts = zip(x.float().split(sizes, dim=axis), (1 / smooth).split(sizes), shrink, strict=True)
    found = [_live_part(part, factors, axis, ends, spec) for part, factors, ends in parts]
    return found[0] if len(found) == 1 else torch.cat(found, dim=axis)


def _live_part(x: Tensor, factors: Tensor, axis: int, shrink: tuple[float, float], spec: QuantSpec) -> Tensor:
    """`x` times positive `factors` of its channels on `axis`, quantized over its extremes times `shrink`.

    The extremes are found before the product.
    """
    reduced = [dim for dim in range(x.dim()) if dim != axis]
    channels = x.detach()
    low, high = channels.amin(reduced), channels.amax(reduced)
    low, high = (low * factors).amin(dim=-1) * shrink[0], (high * factors).amax(dim=-1) * shrink[1]
    scale, zero_point = scale_from_range(low, high, spec)
    shape = (-1, *[1] * (x.dim() - 1))
    scaled = x * factors.view([-1 if dim == axis else 1 for dim in range(x.dim())])
    return fake_quantize(scaled, scale.view(shape), zero_point.view(shape), spec)


def _live_weight(layer: QuantizedLayer, smooth: Tensor, live: Live) -> Tensor:
    quantizer = layer.weight_quantizer
    assert quantizer is not None and layer.weight is not None
    weight = layer.weight.float() * layer.along_inputs(smooth)
    parts = weight.split(_sizes(layer), dim=1)
    return torch.cat([_live(part, quantizer.rows, quantizer.spec, live.searched) for part in parts], dim=1)


def _sizes(layer: QuantizedLayer) -> tuple[int, ...]:
    return layer.splits or (layer.input_channels,)


def _live(values: Tensor, rows: int, spec: QuantSpec, searched: bool) -> Tensor:
    flat = values.reshape(rows, -1)
    low, high = flat.amin(dim=1), flat.amax(dim=1)
    if searched:
        low, high = search_range(flat, torch.ones_like(flat), spec, (low, high))
    scale, zero_point = scale_from_range(low, high, spec)
    shape = (-1, *[1] * (values.dim() - 1))
    return fake_quantize(values, scale.view(shape), zero_point.view(shape), spec)

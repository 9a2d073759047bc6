"""The tensors of ComfyUI's int8 layout ``int8_tensorwise``, from a frozen denoiser and back.

A quantized linear layer ``x`` is three tensors: ``x.weight`` int8 ``[out, in]``; ``x.weight_scale`` float32 ``[out, 1]``, which
multiplies the rows; ``x.comfy_quant`` uint8, the text of a JSON object. Its ``format`` names the layout. Where
``full_precision_matrix_mult`` is true, the input stays in floating point; otherwise ComfyUI quantizes every row of it when it is
multiplied. ComfyUI reads nothing else of this layout: no scale or zero point of the input, no factors of its channels
(``pre_quant_scale``), no convolution. The zero point of a weight is subtracted from its codes. Codes of fewer bits are stored as
int8: the 4-bit layouts of comfy-kitchen rotate the input, or hold scales in 16 bits.

All other tensors are in floating point, in the dtype that the denoiser has. ComfyUI computes in the dtype that suits its GPU,
whatever the file says. Its files name tensors as the authors of a model do (`original_names`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from diffquant.checkpoint.original_names import Origins, Part
from diffquant.checkpoint.targets.stock import float_weight, integers_of
from diffquant.core.layers import QuantizedLayer, QuantizedLinear
from diffquant.core.model import quantized_layers
from diffquant.core.quantizer import Quantizer

FORMAT = "int8_tensorwise"
WEIGHT, SCALE, MARK = ".weight", ".weight_scale", ".comfy_quant"


class Rows(NamedTuple):
    """A weight that the layout holds: codes, a scale for each row, and whether the input stays in floating point."""

    codes: Int8[Tensor, "out in"]
    scale: Float[Tensor, "out 1"]
    floating_input: bool


class Layout(NamedTuple):
    """``tensors`` of a file; ``int8``: layers whose codes are in it; ``floating``: quantized layers written otherwise, and why.

    ``by_rows``: those of ``int8`` whose input ComfyUI quantizes.
    """

    tensors: dict[str, Tensor]
    int8: list[str]
    by_rows: list[str]
    floating: dict[str, str]


class Source(NamedTuple):
    """A tensor in floating point: how many rows it has, and what makes it (quantized weights are large when dequantized)."""

    rows: int
    read: Callable[[], Tensor]


def float_tensors(model: nn.Module) -> dict[str, Source]:
    """The tensors that a denoiser had before it was quantized, in the dtype it had; its weights are as of `float_weight`."""
    return {name: source for module_name, module in model.named_modules() for name, source in _own(module_name, module)}


def _own(name: str, module: nn.Module) -> Iterator[tuple[str, Source]]:
    if isinstance(module, Quantizer):
        return
    prefix = f"{name}." if name else ""
    own: dict[str, Tensor | None] = {**module._parameters}
    if isinstance(module, QuantizedLayer):
        quantizer = module.weight_quantizer
        weight = module.float_weight if quantizer is None or quantizer.codes is None else quantizer.codes
        assert weight is not None
        own["weight"] = None
        yield f"{prefix}weight", Source(len(weight), partial(float_weight, module))
    else:
        own |= {leaf: buffer for leaf, buffer in module._buffers.items() if leaf not in module._non_persistent_buffers_set}
    yield from ((prefix + leaf, Source(len(tensor), tensor.detach)) for leaf, tensor in own.items() if tensor is not None)


def rows_of(layer: QuantizedLayer) -> Rows | str:
    """What the layout holds of a layer, or why it cannot hold its weight; the text is empty where the weight is not quantized."""
    quantizer = layer.weight_quantizer
    if quantizer is None or quantizer.codes is None:
        return ""
    if not isinstance(layer, QuantizedLinear):
        return "convolution" if layer.multiplies else "table of embeddings"
    if layer.splits:
        return "split input channels"
    if (integers := integers_of(layer)) is None:
        return "asymmetric codes of 8 bits"
    if layer.smooth is not None and not bool((layer.smooth == 1).all()):
        return "smoothing"
    return Rows(integers, quantizer.scale.expand(len(integers), 1), layer.input_quantizer is None)


def layout(model: nn.Module, sources: Mapping[str, Source], origins: Origins) -> Layout:
    """The tensors of a file of ComfyUI for a frozen denoiser with these `float_tensors`, named by `origins`.

    A fused layer is int8 where every part of it is. Its rows keep their scales, so parts may differ in bits. Its input stays in
    floating point where that of one part does.
    """
    layers = {f"{name}{WEIGHT}": rows_of(layer) for name, layer in quantized_layers(model)}
    floating = {name: reason for name, reason in layers.items() if isinstance(reason, str) and reason}
    written: dict[str, Tensor] = {}
    int8, by_rows = list[str](), list[str]()
    for original, parts in origins.items():
        rows = {part.name: value for part in parts if isinstance(value := layers.get(part.name), Rows)}
        if any(part.name not in rows for part in parts):
            written[original] = original_tensor(parts, sources)
            others = sorted({part.name.removesuffix(WEIGHT) for part in parts} - {name.removesuffix(WEIGHT) for name in rows})
            floating |= {name: f"fusing with {', '.join(others)}" for name in rows}
            continue
        name = original.removesuffix(WEIGHT)
        written[original] = _joined(parts, {each: value.codes for each, value in rows.items()})
        written[name + SCALE] = _joined(parts, {each: value.scale for each, value in rows.items()})
        floating_input = any(value.floating_input for value in rows.values())
        written[name + MARK] = _mark(floating_input)
        held = [each.removesuffix(WEIGHT) for each in rows]
        int8, by_rows = int8 + held, by_rows + ([] if floating_input else held)
    clean = {name.removesuffix(WEIGHT): reason for name, reason in floating.items()}
    return Layout(written, int8, by_rows, clean)


def original_tensor(parts: Sequence[Part], sources: Mapping[str, Source]) -> Tensor:
    """The tensor in floating point that is made of these parts, on the CPU."""
    return _joined(parts, {part.name: sources[part.name].read() for part in parts})


def _joined(parts: Sequence[Part], tensors: Mapping[str, Tensor]) -> Tensor:
    rows = [part.of(tensors[part.name]) for part in parts]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).contiguous().cpu()


def _mark(floating_input: bool) -> Tensor:
    value: dict[str, Any] = {"format": FORMAT}
    if floating_input:
        value["full_precision_matrix_mult"] = True
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def marked_layers(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The quantized layers of a file by their original names, and what `comfy_quant` says of each."""
    marks = {name.removesuffix(MARK): tensor for name, tensor in tensors.items() if name.endswith(MARK)}
    return {name: json.loads(bytes(tensor.tolist())) for name, tensor in marks.items()}

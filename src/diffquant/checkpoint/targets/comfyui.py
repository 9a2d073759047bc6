"""One safetensors file of the denoiser for ComfyUI, in its int8 layout and with the names of the model's authors.

`checkpoint.comfy_layout` says what the layout holds. ComfyUI quantizes every row of an input when it is multiplied, so calibrated
inputs are dropped, as are quantized attention products; what that costs is measured with comfy-kitchen's own quantization.
*Differs* from ComfyUI: its denoiser is not run, only that of diffusers with the weights of the file.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from diffquant.checkpoint.comfy_layout import SCALE, WEIGHT, float_tensors, layout, marked_layers, original_tensor
from diffquant.checkpoint.original_names import Origins, original_names
from diffquant.checkpoint.targets.base import (
    ROUNDING,
    ExportReport,
    Target,
    refuse_adapter,
    refuse_dropped,
    relative_error,
    unlike_rows,
)
from diffquant.core.dynamic import DynamicQuantizer
from diffquant.core.layers import QuantizedLayer
from diffquant.core.model import activation_quantizers, correction_of, input_quantizers, quantized_layers
from diffquant.core.watch import watching
from diffquant.engines.base import attentions
from diffquant.errors import CheckpointError
from diffquant.host.pipeline import Host, predicted

FILE = "diffusion_model.safetensors"
LAYOUT = "TensorWiseINT8Layout"  # comfy-kitchen's name of it
NAMED = 3  # layers in a line; the report has all of those that are written in floating point


class ComfyReport(ExportReport):
    """The check of a file. ``int8``: layers whose codes it holds; ``floating``: quantized layers written otherwise, and why."""

    int8: int
    floating: dict[str, str]

    def lines(self) -> list[str]:
        """As of every report, and how the weights were written."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.floating.items():
            reasons.setdefault(reason, []).append(name)
        floating = [f"dequantized in the file ({reason}): {_some(names)}" for reason, names in reasons.items()]
        error, *others = super().lines()
        return [error, f"{self.int8} layers with their codes, in int8", *floating, *others]


@final
class ComfyUI(Target):
    """ComfyUI's ``int8_tensorwise``, checked with comfy-kitchen."""

    name = "comfyui"

    def require(self) -> None:
        _kitchen()

    def write(self, host: Host, folder: Path, form: str, lossy: bool) -> ComfyReport:
        """Raises `CheckpointError` also where no layer is int8, and for a denoiser whose original names are not known."""
        denoiser = host.denoiser
        refuse_adapter(denoiser)
        sources = float_tensors(denoiser)
        origins = original_names(denoiser, {name: source.rows for name, source in sources.items()})
        made = layout(denoiser, sources, origins)
        if not made.int8:
            why = "; ".join(sorted(set(made.floating.values())))
            raise CheckpointError(
                f"export: no weight is one for ComfyUI's int8 layout ({why}); it takes linear layers, at 8 bits symmetric ones"
            )
        dropped = lost(denoiser, made.int8)
        refuse_dropped(self.name, dropped, lossy)
        save_file(made.tensors, folder / FILE, metadata={"format": "pt"})
        written = load_file(folder / FILE)
        check_weights(written, denoiser, origins)
        arguments, expected = host.example_call(steps=1)
        with torch.no_grad(), host.evaluating(), as_comfyui(denoiser, made.by_rows):
            output = denoiser(**arguments)
        error = relative_error(predicted(denoiser, output), expected)
        if not (error < math.inf if dropped else error <= ROUNDING):
            raise CheckpointError(f"export: the file computes another output ({error:.2g}); nothing was written")
        return ComfyReport(
            target=self.name,
            file=FILE,
            error=error,
            dropped=dropped,
            note="ComfyUI was not run: the error is that of diffusers' denoiser with this file's weights and ComfyUI's inputs",
            int8=len(made.int8),
            floating=made.floating,
        )


def lost(denoiser: nn.Module, int8: list[str]) -> list[str]:
    """What of a quantized denoiser the layout does not hold, in words; `int8` are the layers whose codes it has."""
    inputs = {name: layer.input_quantizer for name, layer in quantized_layers(denoiser) if layer.input_quantizer is not None}
    products = attentions(denoiser)
    operands = activation_quantizers(denoiser)
    sets = [name for name, quantizer in operands.items() if quantizer.rows > 1]
    correction = correction_of(denoiser)
    rows = {name: unlike_rows(each) for name, each in inputs.items() if isinstance(each, DynamicQuantizer) and name in int8}
    kinds: dict[str, list[str]] = {
        "calibrated scales of inputs, which ComfyUI scales row by row": [
            name for name in inputs if name in int8 and name not in rows
        ],
        **{loss: [name for name, each in rows.items() if each == loss] for loss in sorted(set(rows.values())) if loss},
        "quantized inputs of layers that compute in floating point there": [name for name in inputs if name not in int8],
        "quantized attention products": list(products),
        "parameter sets": sets,
        "splits of input channels": [name for name, quantizer in inputs.items() if quantizer.splits],
        "power-of-two factors of input channels": [name for name, quantizer in inputs.items() if quantizer.shift is not None],
        "a correction while sampling": [] if correction is None else [correction.kind],
    }
    return [f"{what} ({_some(names)})" for what, names in kinds.items() if names]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def check_weights(written: Mapping[str, Tensor], denoiser: nn.Module, origins: Origins) -> None:
    """Let comfy-kitchen dequantize every weight of a file that was read back, and compare all tensors with those of a denoiser.

    The layer with most weights is multiplied by comfy-kitchen too. Raises `CheckpointError` for a tensor that is not bit-equal, and
    where the product differs by more than float32 rounds.
    """
    sources, marks = float_tensors(denoiser), marked_layers(written)
    largest = max(marks, key=lambda name: written[name + WEIGHT].numel())
    for original, parts in origins.items():
        expected = original_tensor(parts, sources)
        name = original.removesuffix(WEIGHT)
        if original.endswith(WEIGHT) and name in marks:
            found = kitchen_weight(written, name, expected.dtype).dequantize()
            if name == largest and not (error := _product_error(kitchen_weight(written, name, torch.float32))) <= ROUNDING:
                raise CheckpointError(f"export: comfy-kitchen's product with {name} is another ({error:.2g}); nothing was written")
        else:
            found = written[original]
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            raise CheckpointError(f"export: {original!r} was not reproduced by the written file; nothing was written")


def kitchen_weight(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Any:
    """The weight of a quantized layer of a file as comfy-kitchen's tensor, dequantized in `dtype`."""
    tensor, codes = _kitchen(), tensors[name + WEIGHT]
    scale = tensors[name + SCALE]
    parameters = tensor.get_layout_class(LAYOUT).Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(codes.shape))
    return tensor.QuantizedTensor(codes, LAYOUT, parameters)


def _product_error(weight: Any) -> float:
    """The error of comfy-kitchen's product of 8 random rows with a weight, against the same integers in floating point."""
    x = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0))
    return relative_error(functional.linear(x, weight), functional.linear(by_rows(x), weight.dequantize()))


def by_rows(x: Tensor) -> Tensor:
    """`x` as ComfyUI quantizes an input: symmetric, in 8 bits, a scale for each row."""
    _kitchen()
    codes, scale = torch.ops.comfy_kitchen.quantize_int8_rowwise(x)
    quantized: Tensor = (codes.float() * scale).to(x.dtype)
    return quantized


@contextmanager
def as_comfyui(denoiser: nn.Module, names: list[str]) -> Iterator[None]:
    """While the block runs, a frozen denoiser quantizes the inputs of these layers as ComfyUI does, and no others."""

    def quantize_rows(layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (by_rows(arguments[0]), *arguments[1:])

    layers: dict[str, QuantizedLayer] = dict(quantized_layers(denoiser))
    hooks = {layers[name]: quantize_rows for name in names}
    quantizers = input_quantizers(denoiser)
    before = [quantizer.enabled for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        with watching(hooks, before=True):
            yield
    finally:
        for quantizer, on in zip(quantizers, before, strict=True):
            quantizer.enabled = on


def _kitchen() -> Any:
    """comfy-kitchen's module of tensors. Raises `CheckpointError` where it is missing."""
    try:
        return importlib.import_module("comfy_kitchen.tensor")
    except ImportError as error:
        raise CheckpointError("ComfyUI: the package comfy-kitchen is missing; pip install 'diffquant[comfyui]'") from error

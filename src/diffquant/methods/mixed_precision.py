"""Bits where the model's output depends on them: of inputs, and of weights.

`AllocateBits` gives more bits to inputs, which costs no memory, in the order of the error that this removes for each
multiplication, within a share of the model's multiplications. `AllocateWeightBits` distributes the bits that all weights have
together anew, one bit at a time, to the layer where it removes most error for each weight.

Bits by sensitivity is common practice for weights and activations (MixDQ: Zhao et al. 2024, arXiv 2405.17873, measures layer after
layer and solves an integer program). *Chosen here*: the estimator of `methods.sensitivity`; more bits for inputs alone; the error
of weights at other bits in proportion to that of rounding to nearest, as if learned rounding lowered it everywhere alike.
"""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffquant.calibration.fit import Run
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import call_recorded
from diffquant.core.affine import fake_quantize, scale_from_range
from diffquant.core.layers import QuantizedLayer
from diffquant.core.model import full_precision, quantized_layers
from diffquant.core.quantizer import Quantizer
from diffquant.core.watch import watching
from diffquant.methods.base import Figures, evaluating
from diffquant.methods.ranges import search_range
from diffquant.methods.sensitivity import SensitivityPass

MEASURED = 1 << 16  # weights of a layer that its errors at other bits are measured on


@final
class AllocateBits(SensitivityPass):
    """Quantize the inputs of the most sensitive layers at ``bits``, where that is more.

    ``products``: the share of the model's multiplications (without attention's own) that may take inputs of more bits.
    `CalibrateRanges` has to come afterwards: ranges stay those of the old bits.
    """

    bits: int = Field(default=8, ge=2, le=8)
    products: float = Field(default=0.1, ge=0, le=1)

    @property
    def weight_options(self) -> dict[str, Any]:
        """Nothing is done to weights: it changes bits of inputs."""
        return {}

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Change the bits of the chosen quantizers. Raises `SpecError` where ranges were not calibrated."""
        inputs = {name: layer for name, layer in quantized_layers(model) if isinstance(layer.input_quantizer, Quantizer)}
        quantizers = {name: each for name, layer in inputs.items() if isinstance(each := layer.input_quantizer, Quantizer)}
        squares, products = self.squares(model, quantizers, data, generator, run), multiplications(model, inputs, data)
        bits = {name: quantizer.spec.bits for name, quantizer in quantizers.items()}
        chosen = self._chosen(bits, squares, products)
        for name in chosen:
            quantizers[name].set_bits(self.bits)
        rows = _rows("input", quantizers, bits, squares, "products_share", products)
        return {
            "layers": rows,
            "mean_bits": sum(row["bits"] * row["products_share"] for row in rows),
            "products": sum(products[name] for name in chosen) / sum(products.values()),
        }

    def _chosen(self, bits: dict[str, int], squares: dict[str, float], products: dict[str, int]) -> set[str]:
        """The layers that get more bits: most error for each multiplication first, those that do not fit any more left out."""
        gains = {name: squares[name] * (1 - 4.0 ** (count - self.bits)) / products[name] for name, count in bits.items()}
        left, chosen = self.products * sum(products.values()), set()
        for name in sorted(gains, key=gains.__getitem__, reverse=True):
            if gains[name] > 0 and products[name] <= left:
                chosen.add(name)
                left -= products[name]
        return chosen


@final
class AllocateWeightBits(SensitivityPass):
    """Give each layer's weight ``least`` to ``most`` bits, together no more than before. `CalibrateRanges` has to follow."""

    least: int = Field(default=2, ge=2, le=8)
    most: int = Field(default=8, ge=2, le=8)

    @model_validator(mode="after")
    def _least_is_least(self) -> AllocateWeightBits:
        if self.least > self.most:
            raise ValueError(f"least ({self.least}) is above most ({self.most})")
        return self

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Change the bits of all weights. Raises `SpecError` where ranges were not calibrated."""
        weighted = {name: layer for name, layer in quantized_layers(model) if layer.weight_quantizer is not None}
        quantizers = {name: layer.weight_quantizer for name, layer in weighted.items() if layer.weight_quantizer is not None}
        squares = self.squares(model, quantizers, data, generator, run)
        before = {name: quantizer.spec.bits for name, quantizer in quantizers.items()}
        sizes = {name: layer.weight.numel() for name, layer in weighted.items()}
        errors = {name: self._errors(layer, quantizers[name]) for name, layer in weighted.items()}
        for name, of_bits in errors.items():
            now = of_bits[before[name]]
            errors[name] = {bits: squares[name] * error / now if now else 0.0 for bits, error in of_bits.items()}
        total = sum(before[name] * size for name, size in sizes.items())
        for name, bits in dealt(errors, sizes, total, self.least, self.most).items():
            quantizers[name].set_bits(bits)
        rows = _rows("weight", quantizers, before, squares, "weights_share", sizes)
        return {"layers": rows, "mean_bits": sum(row["bits"] * row["weights_share"] for row in rows)}

    def _errors(self, layer: QuantizedLayer, quantizer: Quantizer) -> dict[int, float]:
        """The squared error of rounding to nearest, by bits: of some output channels, in the range that is best at these bits."""
        weight = layer.weight_to_quantize().flatten(1)
        some = weight[:: max(1, weight.numel() // MEASURED)]
        rows = some if quantizer.rows > 1 else some.reshape(1, -1)
        extremes = rows.amin(dim=1), rows.amax(dim=1)
        errors = {}
        for bits in {*range(self.least, self.most + 1), quantizer.spec.bits}:
            spec = quantizer.spec.model_copy(update={"bits": bits})
            low, high = search_range(rows, spec, extremes, power=2.0)
            scale, zero_point = (tensor[:, None] for tensor in scale_from_range(low, high, spec))
            errors[bits] = float((fake_quantize(rows, scale, zero_point, spec) - rows).square().sum())
        return errors


def dealt(errors: dict[str, dict[int, float]], sizes: dict[str, int], total: int, least: int, most: int) -> dict[str, int]:
    """Bits of each layer, `least` to `most`, `total` bits of weights at most: each where it removes most error for each weight.

    ``errors`` by layer and bits. All have `least` where that is too many already.
    """
    bits = dict.fromkeys(errors, least)
    left = total - least * sum(sizes.values())

    def gain(name: str) -> float:
        return (errors[name][bits[name]] - errors[name][bits[name] + 1]) / sizes[name]

    while True:
        raised = [name for name, count in bits.items() if count < most and sizes[name] <= left]
        best = max(raised, key=gain, default=None)
        if best is None or gain(best) <= 0:
            return bits
        bits[best] += 1
        left -= sizes[best]


def multiplications(model: nn.Module, layers: dict[str, QuantizedLayer], data: Trajectory) -> dict[str, int]:
    """By layer: its multiplications for one sample."""
    products = dict.fromkeys(layers, 0)

    def count(name: str, layer: QuantizedLayer, arguments: Any, output: Tensor) -> None:
        products[name] = output[0].numel() * layer.weight[0].numel()

    hooks = {layer: partial(count, name) for name, layer in layers.items()}
    with evaluating(model), full_precision(model), torch.no_grad(), watching(hooks):
        call_recorded(model, data, torch.zeros(1, dtype=torch.long))
    return products


def _rows(
    operand: str,
    quantizers: dict[str, Quantizer],
    before: dict[str, int],
    squares: dict[str, float],
    share: str,
    costs: dict[str, int],
) -> list[dict[str, Any]]:
    """A row for each layer, most error first; `share`: the name of its part of the `costs`."""
    total, whole = sum(squares.values()), sum(costs.values())
    rows = [
        {
            "layer": name,
            "operand": operand,
            "bits_before": before[name],
            "bits": quantizer.spec.bits,
            "error_share": squares[name] / total if total else 0.0,
            share: costs[name] / whole,
        }
        for name, quantizer in quantizers.items()
    ]
    return sorted(rows, key=lambda row: -row["error_share"])

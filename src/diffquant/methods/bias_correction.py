"""CorrectBiases: what quantization adds to a layer's output on average is taken out of its bias, in closed form.

Source: Nagel et al. 2019 (arXiv 1906.04721), empirical bias correction. An error that is the same in every picture and at every
step adds up over the trajectory; that of a last layer is a shift of the prediction itself.
*Differs*: each layer is corrected on its full-precision input, all of them in one pass over the samples, instead of one after the
other on inputs from the quantized layers before.

    offset[o] = mean over samples and positions of (W * x)[o] - (Q(W) * Q(x))[o]
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import Run
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import call_recorded
from diffquant.calibration.timing import Work
from diffquant.core.layers import QuantizedLayer
from diffquant.core.model import full_precision, operand_quantizers, quantized_layers, switched
from diffquant.core.watch import watching
from diffquant.methods.base import Figures, Pass, evaluating

BATCH = 8  # recorded calls at once: twice the activations of a layer are held


@final
class CorrectBiases(Pass):
    """Set the offset of every quantized layer that has a bias, in place of one that it has; layers without a bias stay as they are.

    ``samples`` is the number of recorded calls that are looked at, spread evenly over the timesteps. It comes after the passes that
    decide the rounding and the ranges.
    """

    samples: int = Field(default=256, ge=1)

    @torch.no_grad()
    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Correct all layers of `model`. Raises `SpecError` where ranges were not calibrated."""
        layers = {name: layer for name, layer in quantized_layers(model) if layer.bias is not None}
        errors = {name: _MeanError() for name in layers}
        indices = data.subset(min(self.samples, len(data)), generator)
        hooks = {layer: errors[name] for name, layer in layers.items()}
        with evaluating(model), switched(model, True), full_precision(model), watching(hooks, before=True, keywords=True):
            for picked in run.track(indices.split(BATCH), "biases"):
                call_recorded(model, data, picked)
        rows = []
        for name, layer in layers.items():
            offset = -errors[name].mean
            layer.offset = offset
            rows.append({"layer": name, "operand": "bias", "offset": float(offset.norm() / max(errors[name].norm, 1e-12))})
        return {"layers": rows, "samples": len(indices)}

    def work(self, blocks: int) -> Work:
        """Every layer computes twice more."""
        return Work(3.0 * self.samples)


class _MeanError:
    """Hook before a layer's forward: the mean over positions of what its quantizers change in its output, by output channel."""

    def __init__(self) -> None:
        self.count, self.squares = 0, 0.0
        self.sum = torch.zeros((), dtype=torch.float64)

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(layer, QuantizedLayer) and layer.float_weight is not None
        x: Tensor = arguments[0] if arguments else keywords["input"]
        expected = layer.compute(x, layer.float_weight, None)
        quantizers = [quantizer for _, quantizer in operand_quantizers(layer)]
        for quantizer in quantizers:
            quantizer.enabled = True
        operand, weight, _ = layer.operands(x)
        for quantizer in quantizers:
            quantizer.enabled = False
        error = (layer.compute(operand, weight, None) - expected).movedim(layer.channel_axis, -1).flatten(0, -2)
        self.sum = self.sum.to(error.device) + error.sum(0, dtype=torch.float64)
        self.count += len(error)
        self.squares += float(expected.square().sum())

    @property
    def mean(self) -> Float[Tensor, " out"]:
        """The mean error, float32."""
        return (self.sum / max(self.count, 1)).float()

    @property
    def norm(self) -> float:
        """Root of the mean squared norm of the outputs, over positions."""
        return math.sqrt(self.squares / max(self.count, 1))

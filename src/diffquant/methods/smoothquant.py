"""SmoothQuant: a rule that moves range from inputs to weights; a baseline for what learns the same vector.

Source: Xiao et al. 2023 (arXiv 2211.10438), eq. 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import Run
from diffquant.calibration.replay import call_recorded
from diffquant.calibration.trajectory import Trajectory
from diffquant.core.layers import QuantizedConv2d, QuantizedLayer
from diffquant.core.planning import PlannedLayer
from diffquant.core.spec import LayerSpec
from diffquant.core.surgery import full_precision, quantized_layers
from diffquant.methods.passes import Figures, Pass, evaluating, require_smooth

SMALLEST = 1e-5  # of a channel's magnitude, and of the vector's entries


@final
class SmoothQuant(Pass):
    """Set ``smooth`` of every layer that has one to max|x| ** alpha / max|W| ** (1 - alpha), channel by channel."""

    before_ranges: ClassVar[bool] = True

    alpha: float = Field(default=0.5, ge=0, le=1)
    samples: int = Field(default=512, ge=1)
    batch_size: int = Field(default=32, ge=1)

    @property
    def needs(self) -> Literal["smooth"]:
        """The vector that is chosen."""
        return "smooth"

    def check(self, model: nn.Module, rows: Sequence[PlannedLayer], data: Trajectory) -> None:
        """Raise `SpecError` where no layer has the vector that is chosen."""
        require_smooth("SmoothQuant", [row for row in rows if isinstance(row.spec, LayerSpec) and row.spec.smooth])

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Set the vectors; ranges have to be calibrated afterwards. Raises `SpecError` where no layer has one."""
        layers = {name: layer for name, layer in quantized_layers(model) if layer.smooth is not None}
        require_smooth("SmoothQuant", layers)
        indices = data.subset(min(self.samples, len(data)), generator)
        with evaluating(model), torch.no_grad():
            maxima = input_maxima(model, layers, data, indices.split(self.batch_size), run)
            rows = []
            for name, layer in layers.items():
                assert layer.weight is not None
                weight = layer.weight.float().transpose(0, 1).flatten(1).abs().amax(dim=1)
                smooth = maxima[name].clamp(min=SMALLEST) ** self.alpha / weight.clamp(min=SMALLEST) ** (1 - self.alpha)
                layer.smooth = smooth.clamp(min=SMALLEST)
                rows.append({"layer": name, "operand": "smooth", "least": float(smooth.min()), "largest": float(smooth.max())})
        return {"layers": rows, "samples": len(indices)}

    def sample_forwards(self, blocks: int) -> float:
        """Once over the samples."""
        return float(self.samples)


def input_maxima(
    model: nn.Module, layers: dict[str, QuantizedLayer], data: Trajectory, batches: tuple[Tensor, ...], run: Run
) -> dict[str, Float[Tensor, " channels"]]:
    """The largest magnitude of every input channel of `layers` in the full-precision model, over recorded calls."""
    found: dict[str, Tensor] = {}

    def watch(name: str, layer: QuantizedLayer) -> Any:
        axis = 1 if isinstance(layer, QuantizedConv2d) else -1

        def see(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            largest = arguments[0].abs().float().movedim(axis, 0).flatten(1).amax(dim=1)
            found[name] = torch.maximum(found[name], largest) if name in found else largest

        return layer.register_forward_pre_hook(see)

    handles = [watch(name, layer) for name, layer in layers.items()]
    task = run.progress.add_task("magnitudes of inputs", total=len(batches))
    try:
        with full_precision(model):
            for picked in batches:
                call_recorded(model, data, picked)
                run.progress.advance(task)
    finally:
        for handle in handles:
            handle.remove()
        run.progress.remove_task(task)
    return found

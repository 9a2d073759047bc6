"""What the quantizers of a model, each alone, add to its output.

Quantizing an operand with the error d changes the model's output, to first order, by J d, where J is the Jacobian of the output by
that operand. One backward pass from a random direction v of unit covariance gives v . J d for all quantizers at once, and the mean
square of that over directions is |J d|^2 (Hutchinson's estimator).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import Run
from diffquant.calibration.memory import checkpointed
from diffquant.calibration.observe import predicted
from diffquant.calibration.replay import call_recorded
from diffquant.calibration.trajectory import Trajectory
from diffquant.core.affine import fake_quantize
from diffquant.core.quantizer import Quantizer
from diffquant.core.surgery import full_precision, switched
from diffquant.methods.passes import Pass, evaluating


class SensitivityPass(Pass):
    """A pass that measures sensitivities first.

    ``directions``: random directions for each batch of recorded samples; the estimate's relative standard deviation is about the
    square root of 2 over all of them. ``checkpointing`` where the model's graph does not fit: see `AccuQuant`.
    """

    samples: int = Field(default=256, ge=1)
    batch_size: int = Field(default=8, ge=1)
    directions: int = Field(default=2, ge=1)
    checkpointing: bool = False

    def sample_forwards(self, blocks: int) -> float:
        """A forward pass, and a backward pass for each direction."""
        return float(self.samples * (1 + 2 * self.directions))

    def squares(
        self, model: nn.Module, quantizers: Mapping[str, Quantizer], data: Trajectory, generator: torch.Generator, run: Run
    ) -> dict[str, float]:
        """By quantizer: the squared change of the output of a batch, a mean over batches and directions.

        Raises `SpecError` where ranges were not calibrated.
        """
        batches = data.subset(min(self.samples, len(data)), generator).split(self.batch_size)
        squares = dict.fromkeys(quantizers, 0.0)
        task = run.progress.add_task("sensitivity", total=len(batches))
        with (
            evaluating(model),
            switched(model, True),  # refuses where ranges are missing
            full_precision(model),
            gated(quantizers) as gates,
            checkpointed(model, self.checkpointing),
        ):
            for picked in batches:
                with torch.enable_grad():
                    output = predicted(model, call_recorded(model, data, picked)).float()
                for i in range(self.directions):
                    direction = torch.randn(output.shape, generator=generator).to(output.device)
                    found = torch.autograd.grad(
                        output, list(gates.values()), direction, retain_graph=i + 1 < self.directions, allow_unused=True
                    )
                    for name, value in zip(gates, found, strict=True):
                        squares[name] += 0.0 if value is None else float(value) ** 2
                run.progress.advance(task)
        run.progress.remove_task(task)
        calls = len(batches) * self.directions
        return {name: value / calls for name, value in squares.items()}


@contextmanager
def gated(quantizers: Mapping[str, Quantizer]) -> Iterator[dict[str, Tensor]]:
    """While the block runs, what enters each quantizer has ``gate * (its quantization error)`` added, of a gate that is 0."""
    gates, handles = {}, []
    try:
        for name, quantizer in quantizers.items():
            gates[name] = torch.zeros((), device=quantizer.scale.device, requires_grad=True)
            quantizer.observer = _ignore  # with one, the quantizer is called although it is off
            handles.append(quantizer.register_forward_hook(_added_error(gates[name])))
        yield gates
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
        for handle in handles:
            handle.remove()


def _ignore(x: Tensor) -> None:
    pass


def _added_error(gate: Tensor) -> Callable[[Quantizer, Any, Tensor], Tensor]:
    def hook(quantizer: Quantizer, arguments: Any, output: Tensor) -> Tensor:
        with torch.no_grad():
            x = output.float()
            error = fake_quantize(x, *quantizer.operands(x), quantizer.spec) - x
        return output + (gate * error).to(output.dtype)

    return hook

"""Time, multiplications and memory of one sample in one call of a pipeline's denoiser, measured here."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffquant.core.layers import QUANTIZABLE
from diffquant.core.watch import watching
from diffquant.host.conditions import Calibration
from diffquant.host.pipeline import Host, Pipeline

TIMED_ROWS = 4  # samples in the timed call for every one of the pipeline's
TIMED_CALLS = 3  # calls of the denoiser whose fastest is taken


@dataclass(frozen=True)
class Timing:
    """Of one sample in one call, in a batch: seconds, and bytes of a module's largest input and output; multiplications by layer.

    ``rows``: samples of a call for every one that the pipeline draws: 2 with guidance.
    """

    seconds: float
    activation_bytes: float
    operations: dict[str, int]
    rows: int

    def recording(self, calibration: Calibration) -> float:
        """Seconds that a recording takes."""
        return calibration.samples * calibration.steps * self.rows * self.seconds


def timed(pipe: Pipeline) -> Timing:
    """Run `pipe` as far as its first denoiser call, and time that call. Raises `CalibrationError` where it makes none."""
    host = Host(pipe)
    arguments = {name: _repeated(value) for name, value in host.example_call(steps=2)[0].items()}
    rows = max(value.shape[0] for value in arguments.values() if isinstance(value, Tensor) and value.dim() > 1)
    operations, activations, seconds = _measure(host.denoiser, arguments)
    return Timing(seconds / rows, activations / rows, operations, rows // TIMED_ROWS)


def _repeated(value: Any) -> Any:
    """A batched tensor with every row repeated, so that the timed call is of a batch, as calibration's are."""
    if isinstance(value, dict):
        return {name: _repeated(member) for name, member in value.items()}
    return value.repeat_interleave(TIMED_ROWS, dim=0) if isinstance(value, Tensor) and value.dim() > 0 else value


def _measure(model: nn.Module, arguments: dict[str, Any]) -> tuple[dict[str, int], int, float]:
    """Multiply-accumulates of one call by layer, bytes of the largest input and output of a module, and seconds of one call."""
    names = {module: name for name, module in model.named_modules()}
    operations: dict[str, int] = Counter()
    largest = 0

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        tensors = [tensor for tensor in (*inputs, output) if isinstance(tensor, Tensor)]
        largest = max(largest, 4 * sum(tensor.numel() for tensor in tensors))
        if isinstance(module, tuple(QUANTIZABLE)) and isinstance(output, Tensor):
            assert isinstance(module.weight, Tensor)
            operations[names[module]] += output.numel() // module.weight.shape[0] * module.weight.numel()

    seconds = math.inf
    with torch.no_grad():
        with watching(dict.fromkeys(names, count)):
            model(**arguments)
        for _ in range(TIMED_CALLS):
            begun = time.perf_counter()
            model(**arguments)
            seconds = min(seconds, time.perf_counter() - begun)
    return dict(operations), largest, seconds

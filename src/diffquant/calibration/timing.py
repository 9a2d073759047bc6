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
from diffquant.host.pipeline import Host, Pipeline, predicted

TIMED_ROWS = 4  # samples in the timed call for every one of the pipeline's
LARGEST_GRADIENTS = 1 << 30  # bytes; beyond these a way back through the model is not timed
UNTIMED = 2.0  # of the forward pass, that one takes then
TIMED_CALLS = 3  # calls of the denoiser whose fastest is taken


@dataclass(frozen=True)
class Work:
    """About how many times one sample goes through a model, forwards and backwards."""

    forwards: float = 0.0
    backwards: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.forwards + other.forwards, self.backwards + other.backwards)


@dataclass(frozen=True)
class Timing:
    """Of one sample in one call, in a batch: seconds of the call and of going back through it; multiplications by layer.

    ``activation_bytes``: of a module's largest input and output. ``rows``: samples of a call for every one that the pipeline draws:
    2 with guidance.
    """

    forward: float
    backward: float
    activation_bytes: float
    operations: dict[str, int]
    rows: int

    def recording(self, calibration: Calibration) -> float:
        """Seconds that a recording takes."""
        return self.seconds(Work(calibration.samples * calibration.steps * self.rows))

    def seconds(self, work: Work) -> float:
        """Seconds that so many passes of a sample take."""
        return work.forwards * self.forward + work.backwards * self.backward


def timed(pipe: Pipeline) -> Timing:
    """Run `pipe` as far as its first denoiser call, and time that call. Raises `CalibrationError` where it makes none."""
    host = Host(pipe)
    arguments = {name: _repeated(value) for name, value in host.example_call(steps=2)[0].items()}
    rows = max(value.shape[0] for value in arguments.values() if isinstance(value, Tensor) and value.dim() > 1)
    operations, activations = _counted(host.denoiser, arguments)
    forward = _forward_seconds(host.denoiser, arguments)
    backward = _backward_seconds(host.denoiser, arguments) or UNTIMED * forward
    return Timing(forward / rows, backward / rows, activations / rows, operations, rows // TIMED_ROWS)


def _repeated(value: Any) -> Any:
    """A batched tensor with every row repeated, so that the timed call is of a batch, as calibration's are."""
    if isinstance(value, dict):
        return {name: _repeated(member) for name, member in value.items()}
    return value.repeat_interleave(TIMED_ROWS, dim=0) if isinstance(value, Tensor) and value.dim() > 0 else value


def _counted(model: nn.Module, arguments: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Multiply-accumulates of one call by layer, and bytes of the largest input and output of a module."""
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

    with torch.no_grad(), watching(dict.fromkeys(names, count)):
        model(**arguments)
    return dict(operations), largest


def _forward_seconds(model: nn.Module, arguments: dict[str, Any]) -> float:
    """Seconds of one call, the fastest of some."""
    seconds = math.inf
    with torch.no_grad():
        for _ in range(TIMED_CALLS):
            begun = time.perf_counter()
            model(**arguments)
            seconds = min(seconds, time.perf_counter() - begun)
    return seconds


def _backward_seconds(model: nn.Module, arguments: dict[str, Any]) -> float | None:
    """Seconds of one way back through a call, to its inputs and all weights; None where these gradients take much memory."""
    leaf = next(value for value in arguments.values() if isinstance(value, Tensor) and value.is_floating_point())
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    if sum(weight.nbytes for weight in weights) > LARGEST_GRADIENTS:
        return None
    required = [weight.requires_grad for weight in weights]
    try:
        for tensor in (leaf, *weights):
            tensor.requires_grad_(True)
        with torch.enable_grad():
            output = predicted(model, model(**arguments)).float().square().sum()
        begun = time.perf_counter()
        torch.autograd.grad(output, [leaf, *weights], allow_unused=True)
        return time.perf_counter() - begun
    finally:
        leaf.requires_grad_(False)
        for weight, before in zip(weights, required, strict=True):
            weight.requires_grad_(before)

"""The plan before hours are spent: what a recipe will do to every layer, and what file, memory and time it will take."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffquant.calibration.observe import Calibration, Pipeline, evaluation_mode, find_denoiser, first_call, run_pipeline
from diffquant.core.planning import PlannedLayer, first_with_guidance_sets, plan
from diffquant.core.spec import AttentionSpec, LayerSpec, SpecError
from diffquant.core.surgery import unit_count
from diffquant.recipe import Recipe
from diffquant.runtime.packing import SHIFT_BITS, packed_size

TIMED_ROWS = 4  # samples in the timed call for every one of the pipeline's
INTERVALS = Calibration().steps  # that parameter sets are divided over, where nothing was recorded yet
TIMED_CALLS = 3  # calls of the denoiser whose fastest is taken


@dataclass(frozen=True)
class Inspection:
    """The plan of a recipe for one model: a row per layer, its share of multiply-accumulates, and estimates.

    ``seconds`` and ``memory_bytes`` are estimates from one timed call on this machine; ``file_bytes`` is exact but for the header.
    """

    layers: tuple[PlannedLayer, ...]
    shares: dict[str, float]
    file_bytes: int
    float32_bytes: int
    memory_bytes: int
    seconds: float


def inspect(pipe: Pipeline, recipe: Recipe) -> Inspection:
    """Plan `recipe` for the denoiser of `pipe` without changing it; the pipeline is run as far as its first denoiser call."""
    _, model = find_denoiser(pipe)
    if hasattr(model, "step_clock"):
        raise SpecError(f"{type(model).__name__}: is quantized already; inspect the full-precision model that it came from")
    rows = plan(model, recipe.layers)
    arguments = {name: _repeated(value) for name, value in first_arguments(pipe).items()}
    operations, activations, seconds = _measure(model, arguments)
    total = sum(operations.values()) or 1
    rows_per_call = max(value.shape[0] for value in arguments.values() if isinstance(value, Tensor) and value.dim() > 1)
    steps = recipe.steps()
    forwards = sum(step.sample_forwards(unit_count(model)) for step in steps)
    kept = max((getattr(step, "samples", 0) for step in steps if hasattr(step, "iterations")), default=0)
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    largest = max((4 * math.prod(row.shape) for row in rows), default=0)
    return Inspection(
        layers=tuple(rows),
        shares={name: count / total for name, count in operations.items()},
        file_bytes=_file_bytes(model, rows),
        float32_bytes=parameters,
        memory_bytes=int(1.25 * parameters + 4 * largest + 2 * kept * activations / rows_per_call),
        seconds=forwards * seconds / rows_per_call,
    )


def _repeated(value: Any) -> Any:
    """A batched tensor with every row repeated, so that the timed call is of a batch, as calibration's are."""
    if isinstance(value, dict):
        return {name: _repeated(member) for name, member in value.items()}
    return value.repeat_interleave(TIMED_ROWS, dim=0) if isinstance(value, Tensor) and value.dim() > 0 else value


def first_arguments(pipe: Pipeline) -> dict[str, Any]:
    """The arguments of the first denoiser call of a short run of the pipeline."""
    calibration = Calibration(samples=1, steps=2, batch_size=1)
    with evaluation_mode(pipe):
        call = first_call(pipe, lambda: run_pipeline(pipe, calibration, torch.Generator().manual_seed(0), range(1)))
    if call is None:
        raise SpecError(f"{type(pipe).__name__}: ran without calling its denoiser")
    return call[0]


def _measure(model: nn.Module, arguments: dict[str, Any]) -> tuple[dict[str, int], int, float]:
    """Multiply-accumulates of one call by layer, bytes of the largest input and output of a module, and seconds of one call."""
    operations: dict[str, int] = {}
    largest = 0

    def count(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal largest
            tensors = [tensor for tensor in (*inputs, output) if isinstance(tensor, Tensor)]
            largest = max(largest, 4 * sum(tensor.numel() for tensor in tensors))
            if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(output, Tensor):
                weight = module.weight
                positions = output.numel() // weight.shape[0]
                operations[name] = operations.get(name, 0) + positions * weight.numel()

        return hook

    handles = [module.register_forward_hook(count(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    seconds = math.inf
    with torch.no_grad():
        for _ in range(TIMED_CALLS):
            begun = time.perf_counter()
            model(**arguments)
            seconds = min(seconds, time.perf_counter() - begun)
    return operations, largest, seconds


def _sets_bytes(spec: LayerSpec | AttentionSpec, parts: int, branches: int) -> int:
    """Scales, zero points and the table of an input's parameter sets."""
    sets = min(spec.sets, INTERVALS) * (branches if spec.guidance_sets else 1)
    return sets * parts * 5 + (INTERVALS * branches if sets > 1 else 0)


def _file_bytes(model: nn.Module, rows: Sequence[PlannedLayer]) -> int:
    """Codes at their bits, scales, zero points and tables, and the float parameters that stay."""
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    branches = 1 if first_with_guidance_sets(rows) is None else 2
    for row in rows:
        if isinstance(row.spec, AttentionSpec):
            operands = sum(spec is not None for spec in (row.spec.query, row.spec.key, row.spec.value, row.spec.softmax))
            total += operands * _sets_bytes(row.spec, 1, branches)
        if not isinstance(row.spec, LayerSpec):
            continue
        parts = max(1, len(row.spec.splits))
        if row.spec.weight is not None:
            count = math.prod(row.shape)
            scales = (row.shape[0] if row.spec.weight.granularity == "channel" else 1) * parts
            total += packed_size(count, row.spec.weight.bits) - 4 * count + scales * (4 if row.spec.weight.symmetric else 5)
        if row.spec.input is not None:
            total += _sets_bytes(row.spec, parts, branches)
            shifts = min(row.spec.sets, INTERVALS) * (branches if row.spec.guidance_sets else 1) * row.shape[1]
            total += packed_size(shifts, SHIFT_BITS) if row.spec.shift else 0
        total += 4 * row.shape[1] if row.spec.smooth else 0
    return total

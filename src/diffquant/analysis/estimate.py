"""The plan of a recipe for a model: what becomes of every layer, and the file, memory and time that it will take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table
from torch import nn

from diffquant.analysis.sensitivity import Sensitivity
from diffquant.budget import recipe_work
from diffquant.calibration.memory import GIB
from diffquant.calibration.recorded_batch import free_bytes
from diffquant.calibration.timing import timed
from diffquant.checkpoint.packing import SHIFT_BITS, packed_size
from diffquant.core.model import is_quantizable
from diffquant.core.spec import AttentionSpec, LayerSpec
from diffquant.errors import CheckpointError, SpecError
from diffquant.host.conditions import Calibration
from diffquant.host.pipeline import Host, Pipeline
from diffquant.host.structure import PlannedLayer, first_with_guidance_sets, plan
from diffquant.recipe import Recipe

INTERVALS = Calibration().steps  # of timesteps that parameter sets are divided over, before anything is recorded


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

    def table(self, sensitivity: Sensitivity | None = None) -> Table:
        """A row for every layer, with its share of the multiplications, and with `sensitivity` of the last sample's error."""
        names = ["shape", "weight", "input", "MACs", *(["error of weight", "of input"] if sensitivity else []), "decided by"]
        others = (Column(name, overflow="fold") for name in names)
        # names whole, on several lines where it is narrow
        table = Table(Column("layer", overflow="fold", min_width=24), *others, box=SIMPLE_HEAD, padding=0)
        for row in self.layers:
            share = _percent(self.shares.get(row.name))
            errors = [_percent(sensitivity.of_layer(row.name, weight)) for weight in (True, False)] if sensitivity else []
            shape = "x".join(map(str, row.shape))
            table.add_row(escape(row.name), shape, *_described(row.spec), share, *errors, escape(row.reason))
        return table


def inspect(pipe: Pipeline, recipe: Recipe) -> Inspection:
    """Plan `recipe` for the denoiser of `pipe` without changing it; the pipeline is run as far as its first denoiser call."""
    model = Host(pipe).denoiser
    if is_quantizable(model):
        raise SpecError(f"{type(model).__name__}: is quantized already; inspect the full-precision model that it came from")
    rows = plan(model, recipe.layers)
    timing = timed(pipe)
    total = sum(timing.operations.values()) or 1
    samples = max((getattr(each, "samples", 0) for each in recipe.built_passes() if hasattr(each, "iterations")), default=0)
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    largest = max((4 * math.prod(row.shape) for row in rows), default=0)
    return Inspection(
        layers=tuple(rows),
        shares={name: count / total for name, count in timing.operations.items()},
        file_bytes=_file_bytes(model, rows),
        float32_bytes=parameters,
        memory_bytes=int(1.25 * parameters + 4 * largest + 2 * samples * timing.activation_bytes),
        seconds=timing.seconds(recipe_work(recipe, model)),
    )


def _sets_bytes(spec: LayerSpec | AttentionSpec, parts: int, branches: int) -> int:
    """Scales, zero points and the table of an input's parameter sets."""
    sets = min(spec.sets, INTERVALS) * (branches if spec.guidance_sets else 1)
    return sets * parts * 5 + (INTERVALS * branches if sets > 1 else 0)


def check_space(pipe: Pipeline, recipe: Recipe, folder: Path) -> None:
    """Raise `CheckpointError` where the checkpoint that `recipe` makes of `pipe` will not fit on the disk of `folder`."""
    host = Host(pipe)
    others = (part for key, part in pipe.components.items() if key != host.name and isinstance(part, nn.Module))
    unquantized = sum(tensor.nbytes for part in others for tensor in (*part.parameters(), *part.buffers()))
    needed, free = unquantized + _file_bytes(host.denoiser, plan(host.denoiser, recipe.layers)), free_bytes(folder)
    if needed > free:
        raise CheckpointError(
            f"{folder}: the checkpoint will take about {needed / GIB:.2g} GiB; {free / GIB:.2g} GiB are free; free some space, or "
            "choose another place"
        )


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
        if row.spec.input is not None and row.spec.input_scale == "static":
            total += _sets_bytes(row.spec, parts, branches)
            shifts = min(row.spec.sets, INTERVALS) * (branches if row.spec.guidance_sets else 1) * row.shape[1]
            total += packed_size(shifts, SHIFT_BITS) if row.spec.shift else 0
        total += 4 * row.shape[1] if row.spec.smooth else 0
    return total


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _described(spec: LayerSpec | AttentionSpec | None) -> tuple[str, str]:
    if spec is None:
        return "float", "float"
    halves = " per branch" if spec.guidance_sets else ""
    if isinstance(spec, AttentionSpec):
        return f"softmax {spec.softmax or 'float'}{halves}", f"q, k, v {spec.query or 'float'}{halves}"
    splits = f" split {'+'.join(map(str, spec.splits))}" if spec.splits else ""
    dynamic = "" if spec.input is None or spec.input_scale == "static" else f" {spec.input_scale}"
    return str(spec.weight or "float"), f"{spec.input or 'float'}{dynamic}{splits}{halves}"

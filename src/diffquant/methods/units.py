"""Passes that fit a model's units (blocks or layers) one after the other, in the order the model runs them.

A unit is fitted to its full-precision outputs. Its inputs come through the quantized units before it, so that it can make up for
their errors; where nothing is quantized yet they are the full-precision ones.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import Run, load_tensors, save_tensors
from diffquant.calibration.gain import step_gain
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import UnitInputs, call_recorded, observe, output_tensors
from diffquant.calibration.timing import Work
from diffquant.core.model import full_precision, operand_quantizers, quantizers, switched
from diffquant.core.operand import OperandQuantizer
from diffquant.core.watch import watching
from diffquant.host.structure import PlannedLayer, Unit, units
from diffquant.methods.base import Figures, Pass, draw_seed, evaluating, quantizer_state, restore_quantizers


@dataclass(frozen=True)
class Fitted:
    """Relative L2 error of a unit before and after it was fitted, and the loss over the iterations in ten means."""

    error_before: float
    error_after: float
    loss: list[float] = field(default_factory=list)


class UnitPass(Pass):
    """A pass that fits units one after the other, in the order the model runs them; it resumes at the unfinished one.

    ``error: latent`` weights a sample's error by the derivative of the next latent with respect to the model output at its timestep
    (`StepGain`); ``output``, as published, weights all alike.
    """

    iterations: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    samples: int = Field(default=512, ge=1)
    error: Literal["output", "latent"] = "output"

    def work(self, blocks: int) -> Work:
        """Inputs of every unit, half the model each, targets of all, and there and back through the unit in every iteration."""
        learned = float(self.iterations * self.batch_size)
        return Work((0.5 * blocks + 1.0) * self.samples + learned, learned)

    def check(self, model: nn.Module, rows: Sequence[PlannedLayer], data: Trajectory) -> None:
        """Raise `SpecError` where steps of the sampler are needed and cannot be replayed."""
        if self.error == "latent":
            step_gain(type(self).__name__, model, data)

    def walk(
        self,
        model: nn.Module,
        ordered: list[Unit],
        data: Trajectory,
        generator: torch.Generator,
        run: Run,
        label: str,
        prefix: Callable[[OperandQuantizer], bool] | None,
        fit_unit: Callable[[Unit, UnitInputs, int, Run], Fitted],
    ) -> Figures:
        """Fit the units `ordered`, each by `fit_unit` on its recorded calls, with a seed and a run of its own.

        `prefix` says which quantizers are on while inputs are recorded and the unit is fitted. None: none is, and ranges need not
        be calibrated.
        """
        indices = data.subset(min(self.samples, len(data)), generator)
        rows: list[dict[str, object]] = []
        with evaluating(model), full_precision(model) if prefix is None else switched(model, True):
            for _, quantizer in operand_quantizers(model):
                quantizer.enabled = prefix is not None and prefix(quantizer)
            calls = _UnitCalls(model, ordered, data, indices, self.batch_size)
            if self.error == "latent":
                calls.counts = step_gain(type(self).__name__, model, data).sizes(indices).cpu()
            for position, unit in enumerate(run.track(ordered, label)):
                seed = draw_seed(generator)
                own = run.below(f"{position:04d}-{unit.name}")
                path = None if own.folder is None else own.folder / "unit.safetensors"
                if path is not None and path.exists():
                    tensors, metadata = load_tensors(path)
                    restore_quantizers(unit.module, tensors)
                    fitted = Fitted(**json.loads(metadata["fitted"]))
                else:  # the unit's tensors are passed on, not held here: they are gone before those of the next unit come
                    fitted = fit_unit(unit, calls.of(unit, own, prefix is not None), seed, own)
                    if path is not None:
                        save_tensors(path, quantizer_state(unit.module, self.weights_only), {"fitted": json.dumps(asdict(fitted))})
                        _remove_all_but(path)
                rows.append({"layer": unit.name, "operand": "unit"} | asdict(fitted))
        return {"layers": rows, "iterations": self.iterations, "samples": len(indices)}


class _UnitCalls:
    """Recorded calls of units. Full-precision targets are observed for as many of the next units as fit into memory together."""

    def __init__(self, model: nn.Module, ordered: list[Unit], data: Trajectory, indices: Tensor, batch_size: int) -> None:
        self.model, self.ordered, self.data, self.indices, self.batch_size = model, ordered, data, indices, batch_size
        self.sizes: list[int] = []  # output bytes of each unit for a sample
        self.ready: dict[str, list[Tensor]] = {}
        self.counts: Tensor | None = None

    def of(self, unit: Unit, run: Run, prefixed: bool) -> UnitInputs:
        """Inputs of `unit`, through the quantized layers before it if `prefixed`, and full-precision targets; memory is halved."""
        if prefixed:
            (calls,) = self._observe([unit], run.memory / 2, folder=run.folder, outputs=False)
            calls.outputs = self._targets(unit, run)
        else:
            with full_precision(self.model):
                (calls,) = self._observe([unit], run.memory, folder=run.folder)
        calls.counts = self.counts
        return calls

    def _targets(self, unit: Unit, run: Run) -> list[Tensor]:
        if unit.name not in self.ready:
            self.ready = {}
            with full_precision(self.model):
                group = self._group(unit, run.memory / 2)
                memory = math.inf if len(group) > 1 else run.memory / 2
                observed = self._observe(group, memory, folder=run.folder, inputs=False)
            self.ready = {member.name: calls.outputs for member, calls in zip(group, observed, strict=True)}
        return self.ready.pop(unit.name)

    def _group(self, unit: Unit, memory: float) -> list[Unit]:
        """`unit` and those after it whose outputs fit into `memory` bytes with its own."""
        if not self.sizes:
            modules = [member.module for member in self.ordered]
            sample = observe(self.model, modules, self.data, self.indices[:1], 1, inputs=False)
            self.sizes = [sum(tensor.nbytes for tensor in calls.outputs) for calls in sample]
        start = self.ordered.index(unit)
        totals = list(itertools.accumulate(size * len(self.indices) for size in self.sizes[start:]))
        return self.ordered[start : start + max(1, sum(total <= memory for total in totals))]

    def _observe(self, group: list[Unit], memory: float, **options: Any) -> list[UnitInputs]:
        modules = [unit.module for unit in group]
        return observe(self.model, modules, self.data, self.indices, self.batch_size, memory=memory, **options)


def _remove_all_but(path: Path) -> None:
    """Remove the other files of a finished unit: an optimizer's state is three times as large as the unit's weights."""
    for other in path.parent.iterdir():
        if other != path and other.is_file():
            other.unlink()


def in_order(model: nn.Module, data: Trajectory, kind: str) -> list[Unit]:
    """The units that `model` runs, in that order: its blocks, or with `kind` ``layer`` every layer."""
    every = units(model)
    if kind == "layer":
        every = [Unit(name, layer, ((name, layer),)) for unit in every for name, layer in unit.layers]
    modules: list[nn.Module] = []
    hooks = dict.fromkeys((unit.module for unit in every), lambda module, _: modules.append(module))
    with torch.no_grad(), full_precision(model), watching(hooks, before=True):
        call_recorded(model, data, torch.arange(1))
    position = {module: index for index, module in reversed(list(enumerate(modules)))}
    return sorted((unit for unit in every if unit.module in position), key=lambda unit: position[unit.module])


def _outputs_and_targets(unit: Unit, data: UnitInputs, picked: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The unit's outputs for the picked samples, each at its interval, and their targets, both times the errors' weights."""
    arguments, keywords = data.rows(picked)
    assert data.intervals is not None
    for _, quantizer in quantizers(unit.module):
        if quantizer.clock is not None:  # one clock serves the whole model
            quantizer.clock.set_interval(data.intervals[picked])
            break
    output = output_tensors(unit.module(*arguments, **keywords))
    targets = [data.pick(tensor, picked) for tensor in data.outputs]
    return zip(data.weighted(output, picked), data.weighted(targets, picked), strict=True)


def minibatch_error(unit: Unit, data: UnitInputs, batch_size: int, power: float, generator: torch.Generator) -> Tensor:
    """BRECQ's reconstruction loss on samples drawn from `generator`: the sum over axis 1 of the mean error to the `power`."""
    picked = torch.randperm(len(data.outputs[0]), generator=generator)[:batch_size]
    total = torch.zeros(())
    for output, target in _outputs_and_targets(unit, data, picked):
        total = total + (output.float() - target.float()).abs().pow(power).sum(dim=1).mean()
    return total


def unit_error(unit: Unit, data: UnitInputs, batch_size: int) -> float:
    """Relative L2 error of the unit's outputs over all recorded samples."""
    error = signal = 0.0
    with torch.no_grad():
        for picked in torch.arange(len(data.outputs[0])).split(batch_size):
            for output, target in _outputs_and_targets(unit, data, picked):
                error += float((output - target).square().sum())
                signal += float(target.square().sum())
    return math.sqrt(error / max(signal, 1e-24))


def thinned(curve: list[float], count: int = 10) -> list[float]:
    """A loss curve as `count` means."""
    return [float(part.mean()) for part in torch.tensor(curve).tensor_split(min(count, len(curve)))]

"""Passes that walk over a model's units: a block, or one layer, at a time, in the order the model runs them.

A unit is fitted to the full-precision outputs it should give, on inputs that come through the quantized units before it, so that
it can make up for their errors; or, where nothing is quantized yet, on its full-precision inputs.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import Run, load_tensors, lp_loss, save_tensors
from diffquant.calibration.gain import step_gain
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import UnitInputs, call_recorded, observe_outputs, observe_unit, output_tensors
from diffquant.core.model import full_precision, quantizers, switched
from diffquant.core.quantizer import Quantizer
from diffquant.core.watch import watching
from diffquant.host.structure import PlannedLayer, Unit, units
from diffquant.methods.base import Figures, Pass, draw_seed, evaluating, quantizer_state, restore_quantizers


@dataclass(frozen=True)
class Fitted:
    """What fitting a unit came to: its relative L2 error before and after, and the loss over the iterations in ten means."""

    error_before: float
    error_after: float
    loss: list[float] = field(default_factory=list)


class UnitPass(Pass):
    """What they share: walking over the units in the order the model runs them, resumable unit by unit.

    ``error: latent`` lets the error of a sample count by what the sampler's step makes of an error of the model's output at its
    timestep (`StepGain`); ``output``, as published, lets all count alike.
    """

    units: Literal["block", "layer"] = "block"
    iterations: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    samples: int = Field(default=512, ge=1)
    error: Literal["output", "latent"] = "output"

    def sample_forwards(self, blocks: int) -> float:
        """Inputs of every unit, half the model each, targets of all, and three times the unit's own pass an iteration."""
        return (0.5 * blocks + 1.0) * self.samples + 3.0 * self.iterations * self.batch_size

    def check(self, model: nn.Module, rows: Sequence[PlannedLayer], data: Trajectory) -> None:
        """Raise `SpecError` where steps of the sampler are needed and cannot be replayed."""
        if self.error == "latent":
            step_gain(type(self).__name__, model, data)

    def walk(
        self,
        model: nn.Module,
        data: Trajectory,
        generator: torch.Generator,
        run: Run,
        label: str,
        prefix: Callable[[Quantizer], bool] | None,
        fit_unit: Callable[[Unit, UnitInputs, UnitInputs, int, Run], Fitted],
        wanted_unit: Callable[[Unit], bool] = lambda unit: True,
    ) -> Figures:
        """Fit every unit that `wanted_unit` names.

        `prefix` says which quantizers are on while inputs are recorded and the unit is fitted; None: none is, and none needs to be
        calibrated.
        """
        indices = data.subset(min(self.samples, len(data)), generator)
        rows: list[dict[str, object]] = []
        with evaluating(model), full_precision(model) if prefix is None else switched(model, True):
            for _, quantizer in quantizers(model):
                quantizer.enabled = prefix is not None and prefix(quantizer)
            ordered = [unit for unit in in_order(model, units(model), data, self.units) if wanted_unit(unit)]
            targets = _Targets(model, ordered, data, indices, self.batch_size)
            if self.error == "latent":
                targets.counts = step_gain(type(self).__name__, model, data).sizes(indices).cpu()
            for position, unit in enumerate(run.track(ordered, label)):
                seed = draw_seed(generator)
                here = run.below(f"{position:04d}-{unit.name}")
                done = None if here.folder is None else here.folder / "unit.safetensors"
                if done is not None and done.exists():
                    tensors, metadata = load_tensors(done)
                    restore_quantizers(unit.module, tensors)
                    fitted = Fitted(**json.loads(metadata["fitted"]))
                else:
                    given, wanted = self._observed(unit, targets, prefix is not None, here)
                    wanted.counts = targets.counts
                    fitted = fit_unit(unit, given, wanted, seed, here)
                    del given, wanted  # before those of the next unit are there
                    if done is not None:
                        save_tensors(done, quantizer_state(unit.module, self.weights_only), {"fitted": json.dumps(asdict(fitted))})
                        _leave_only(done)
                rows.append({"layer": unit.name, "operand": "unit"} | asdict(fitted))
        return {"layers": rows, "iterations": self.iterations, "samples": len(indices)}

    def _observed(self, unit: Unit, targets: _Targets, prefixed: bool, run: Run) -> tuple[UnitInputs, UnitInputs]:
        """What the unit is given, through the quantized prefix where there is one, and what it is wanted to put out."""

        def observed(memory: float, outputs: bool) -> UnitInputs:
            calls = (targets.model, unit.module, targets.data, targets.indices, self.batch_size)
            return observe_unit(*calls, memory=memory, folder=run.folder, outputs=outputs)

        if prefixed:
            return observed(run.memory / 2, False), targets.of(unit, run)
        with full_precision(targets.model):
            wanted = observed(run.memory, True)
        return wanted, wanted


class _Targets:
    """What units are wanted to put out, in full precision: observed for as many units to come as fit into memory together."""

    def __init__(self, model: nn.Module, ordered: list[Unit], data: Trajectory, indices: Tensor, batch_size: int) -> None:
        self.model, self.ordered, self.data, self.indices, self.batch_size = model, ordered, data, indices, batch_size
        self.sizes: list[int] = []  # bytes that a unit puts out for a sample
        self.ready: dict[str, UnitInputs] = {}
        self.counts: Tensor | None = None  # what the error of each sample counts

    def of(self, unit: Unit, run: Run) -> UnitInputs:
        """The outputs of a unit over all samples; half of the run's memory is for them and those that are ready."""
        if unit.name not in self.ready:
            self.ready = {}
            with full_precision(self.model):
                group = self._group(unit, run.memory / 2)
                modules, memory = [member.module for member in group], math.inf if len(group) > 1 else run.memory / 2
                calls = (self.model, modules, self.data, self.indices, self.batch_size)
                found = observe_outputs(*calls, memory=memory, folder=run.folder)
            self.ready = {member.name: seen for member, seen in zip(group, found, strict=True)}
        return self.ready.pop(unit.name)

    def _group(self, unit: Unit, memory: float) -> list[Unit]:
        """`unit` and those after it whose outputs fit into `memory` bytes with its own."""
        if not self.sizes:
            modules = [member.module for member in self.ordered]
            one = observe_outputs(self.model, modules, self.data, self.indices[:1], 1)
            self.sizes = [sum(tensor.nbytes for tensor in seen.outputs) for seen in one]
        start = self.ordered.index(unit)
        totals = list(itertools.accumulate(size * len(self.indices) for size in self.sizes[start:]))
        return self.ordered[start : start + max(1, sum(total <= memory for total in totals))]


def _leave_only(done: Path) -> None:
    """Remove what a finished unit's fitting left beside it: an optimizer's state is three times as large as the unit's weights."""
    for left in done.parent.iterdir():
        if left != done and left.is_file():
            left.unlink()


def in_order(model: nn.Module, found: list[Unit], data: Trajectory, kind: str) -> list[Unit]:
    """The units in the order the model runs them, without those it does not run; `kind` ``layer`` makes a unit of every layer."""
    if kind == "layer":
        found = [Unit(name, layer, ((name, layer),)) for unit in found for name, layer in unit.layers]
    seen: list[nn.Module] = []
    hooks = dict.fromkeys((unit.module for unit in found), lambda module, _: seen.append(module))
    with torch.no_grad(), full_precision(model), watching(hooks, before=True):
        call_recorded(model, data, torch.arange(1))
    position = {module: index for index, module in reversed(list(enumerate(seen)))}
    return sorted((unit for unit in found if unit.module in position), key=lambda unit: position[unit.module])


def call_unit(unit: Unit, inputs: UnitInputs, picked: Tensor) -> list[Tensor]:
    """The unit's outputs for the picked samples, each at its interval."""
    arguments, keywords = inputs.rows(picked)
    _set_intervals(unit.module, inputs, picked)
    return output_tensors(unit.module(*arguments, **keywords))


def _set_intervals(module: nn.Module, inputs: UnitInputs, picked: Tensor) -> None:
    assert inputs.intervals is not None
    for _, quantizer in quantizers(module):
        if quantizer.clock is not None:
            quantizer.clock.set_interval(inputs.intervals[picked])
            return  # one clock serves the whole model


def minibatch_error(
    unit: Unit, given: UnitInputs, wanted: UnitInputs, batch_size: int, power: float, generator: torch.Generator
) -> Tensor:
    """The unit's error to the `power` on samples drawn from `generator`."""
    samples = len(wanted.outputs[0])
    picked = torch.randperm(samples, generator=generator)[:batch_size]
    output = call_unit(unit, given, picked)
    return lp_loss(wanted.counted(output, picked), wanted.counted(wanted.targets(picked), picked), power)


def thinned(curve: list[float]) -> list[float]:
    """A loss curve as ten means."""
    return [float(part.mean()) for part in torch.tensor(curve).tensor_split(min(10, len(curve)))]


def unit_error(unit: Unit, given: UnitInputs, wanted: UnitInputs, batch_size: int) -> float:
    """Relative L2 error of the unit's outputs over all recorded samples."""
    error = signal = 0.0
    with torch.no_grad():
        for picked in torch.arange(len(wanted.outputs[0])).split(batch_size):
            output, targets = call_unit(unit, given, picked), wanted.targets(picked)
            for value, target in zip(wanted.counted(output, picked), wanted.counted(targets, picked), strict=True):
                error += float((value - target).square().sum())
                signal += float(target.square().sum())
    return math.sqrt(error / max(signal, 1e-24))

"""ReconstructRounding: which way each weight rounds. LearnScales: steps and zero points by gradient. Both unit by unit.

A unit (a block, or one layer) is fitted to the full-precision outputs it should give, on inputs that come through the quantized
units before it, so that it can make up for their errors.

Sources: AdaRound (Nagel et al. 2020, arXiv 2004.10568), rounding as a learned choice; BRECQ (Li et al. 2021, arXiv 2102.05426),
blocks as units; Q-Diffusion (Li et al. 2023, arXiv 2302.04304), the settings for diffusion; LSQ (Esser et al. 2020, arXiv
1902.08153), the gradient of a step; QDrop (Wei et al. 2022, arXiv 2203.05740), mixing full-precision inputs in.
*Differs*: rates of steps are relative to the step (0.01 moves it by about one per cent an update), so that layers of all ranges
move alike; the papers' rates are absolute.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import (
    Run,
    UnitInputs,
    constant,
    cosine,
    fit,
    load_tensors,
    lp_loss,
    observe_unit,
    output_tensors,
    save_tensors,
)
from diffquant.calibration.trajectory import Trajectory
from diffquant.core.layers import smoothed_weight
from diffquant.core.quantizer import Quantizer, logits_of, rectified_sigmoid
from diffquant.core.surgery import Unit, device_of, full_precision, quantizers, switched, units
from diffquant.methods.passes import Figures, Pass, draw_seed, evaluating, quantizer_state, restore_quantizers
from diffquant.methods.steps import LearnedSteps


@dataclass(frozen=True)
class Fitted:
    """What fitting a unit came to: its relative L2 error before and after, and the loss over the iterations in ten means."""

    error_before: float
    error_after: float
    loss: list[float] = field(default_factory=list)


class _UnitPass(Pass):
    """What both passes share: walking over the units in the order the model runs them, with quantized-prefix inputs."""

    units: Literal["block", "layer"] = "block"
    iterations: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    samples: int = Field(default=512, ge=1)

    def sample_forwards(self) -> float:
        """Inputs and targets of about 20 units, half the model each, and three times the unit's own pass an iteration."""
        return 20.0 * self.samples + 3.0 * self.iterations * self.batch_size

    def _walk(
        self,
        model: nn.Module,
        data: Trajectory,
        generator: torch.Generator,
        run: Run,
        label: str,
        prefix: Callable[[Quantizer], bool],
        fit_unit: Callable[[Unit, UnitInputs, UnitInputs, int, Run], Fitted],
    ) -> Figures:
        """Fit every unit; `prefix` says which quantizers are on while inputs are recorded and the unit is fitted."""
        indices = data.subset(min(self.samples, len(data)), generator)
        rows: list[dict[str, object]] = []
        with evaluating(model), switched(model, True):
            for _, quantizer in quantizers(model):
                quantizer.enabled = prefix(quantizer)
            ordered = _in_order(model, units(model), data, self.units)
            task = run.progress.add_task(label, total=len(ordered))
            for position, unit in enumerate(ordered):
                seed = draw_seed(generator)
                here = run.below(f"{position:04d}-{unit.name}")
                done = None if here.folder is None else here.folder / "unit.safetensors"
                if done is not None and done.exists():
                    tensors, metadata = load_tensors(done)
                    restore_quantizers(unit.module, tensors)
                    fitted = Fitted(**json.loads(metadata["fitted"]))
                else:
                    with full_precision(model):
                        wanted = observe_unit(model, unit.module, data, indices, self.batch_size)
                    given = observe_unit(model, unit.module, data, indices, self.batch_size)
                    fitted = fit_unit(unit, given, wanted, seed, here)
                    if done is not None:
                        save_tensors(done, quantizer_state(unit.module), {"fitted": json.dumps(asdict(fitted))})
                rows.append({"layer": unit.name, "operand": "unit"} | asdict(fitted))
                run.progress.advance(task)
            run.progress.remove_task(task)
        return {"layers": rows, "iterations": self.iterations, "samples": len(indices)}


@final
class ReconstructRounding(_UnitPass):
    """Learn for every weight of a unit whether it rounds down or up; ends with integer codes.

    ``regularization`` pushes the soft choices to 0 or 1 after the first ``warm_up`` share of the iterations, with an exponent that
    falls from ``beta_start`` to ``beta_end``. ``activations`` says whether activation quantizers are on meanwhile. ``mix`` is the
    probability of an input value being replaced by its full-precision one.
    """

    rate: float = Field(default=1e-2, gt=0)
    regularization: float = Field(default=0.01, ge=0)
    warm_up: float = Field(default=0.2, ge=0, lt=1)
    beta_start: float = 20.0
    beta_end: float = 2.0
    power: float = 2.0
    activations: bool = False
    mix: float = Field(default=0.0, ge=0, le=1)

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Decide the codes of every quantized weight. Raises `SpecError` where ranges were not calibrated."""
        return self._walk(
            model, data, generator, run, "rounding", lambda quantizer: self.activations or quantizer.clock is None, self._fit_unit
        )

    def _fit_unit(self, unit: Unit, given: UnitInputs, wanted: UnitInputs, seed: int, run: Run) -> Fitted:
        learned = [layer for _, layer in unit.layers if layer.weight_quantizer is not None]
        before = _unit_error(unit, given, wanted, self.batch_size)
        if not learned:
            return Fitted(before, before)
        for layer in learned:
            quantizer = layer.weight_quantizer
            assert quantizer is not None
            weight = smoothed_weight(layer).detach().float()
            scale, _ = quantizer.operands(weight)
            quantizer.codes = None
            quantizer.rounding = logits_of((weight / scale) - (weight / scale).floor())
        logits = [layer.weight_quantizer.rounding for layer in learned if layer.weight_quantizer is not None]
        parameters = [tensor for tensor in logits if tensor is not None]

        def loss(iteration: int, generator: torch.Generator) -> Tensor:
            error = _minibatch_error(unit, given, wanted, self.batch_size, self.power, self.mix, generator)
            progress = (iteration / self.iterations - self.warm_up) / (1 - self.warm_up)
            if progress < 0:
                return error
            beta = self.beta_end + (self.beta_start - self.beta_end) * (1 - progress)
            for tensor in parameters:
                error = error + self.regularization * (1 - (2 * rectified_sigmoid(tensor) - 1).abs().pow(beta)).sum()
            return error

        curve = fit(
            [(tensor, self.rate) for tensor in parameters],
            loss,
            iterations=self.iterations,
            seed=seed,
            run=run,
            label=unit.name,
            schedule=constant,
        )
        for layer in learned:
            assert layer.weight_quantizer is not None
            layer.weight_quantizer.decide(smoothed_weight(layer).detach().float())
        return Fitted(before, _unit_error(unit, given, wanted, self.batch_size), _thinned(curve))


@final
class LearnScales(_UnitPass):
    """Learn the steps and zero points of activations, and with ``weights`` the steps of weights, by LSQ.

    ``rate`` and ``weight_rate`` are relative (see `LearnedSteps`) and fall along a cosine. Weights whose codes are decided keep
    their codes.
    """

    rate: float = Field(default=2e-3, gt=0)
    zero_points: bool = True
    weights: bool = False
    weight_rate: float = Field(default=5e-4, gt=0)
    power: float = 2.4
    mix: float = Field(default=0.0, ge=0, le=1)

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Learn the scales of every unit with all quantizers on. Raises `SpecError` where ranges were not calibrated."""
        return self._walk(model, data, generator, run, "scales", lambda quantizer: True, self._fit_unit)

    def _fit_unit(self, unit: Unit, given: UnitInputs, wanted: UnitInputs, seed: int, run: Run) -> Fitted:
        before = _unit_error(unit, given, wanted, self.batch_size)
        learned = [
            LearnedSteps.of(quantizer, self.rate, self.zero_points)
            if quantizer.clock is not None
            else LearnedSteps.of(quantizer, self.weight_rate, zero_points=False)
            for _, quantizer in quantizers(unit.module)
            if quantizer.clock is not None or self.weights
        ]
        if not learned:
            return Fitted(before, before)
        start = quantizer_state(unit.module)

        def loss(iteration: int, generator: torch.Generator) -> Tensor:
            for one in learned:
                one.place()
            error = _minibatch_error(unit, given, wanted, self.batch_size, self.power, self.mix, generator)
            error.backward()
            for one in learned:
                one.collect()
            return error.detach()

        curve = fit(
            [pair for one in learned for pair in one.parameters()],
            loss,
            iterations=self.iterations,
            seed=seed,
            run=run,
            label=unit.name,
            schedule=cosine,
        )
        for one in learned:
            one.finish()
        after = _unit_error(unit, given, wanted, self.batch_size)
        if after > before:  # a unit that learning made worse keeps what it came with
            restore_quantizers(unit.module, start)
            return Fitted(before, before, _thinned(curve))
        return Fitted(before, after, _thinned(curve))


def _in_order(model: nn.Module, found: list[Unit], data: Trajectory, kind: str) -> list[Unit]:
    """The units in the order the model runs them; `kind` ``layer`` makes a unit of every layer.

    Raises nothing for units that a forward pass does not reach: they come last.
    """
    if kind == "layer":
        found = [Unit(name, layer, ((name, layer),)) for unit in found for name, layer in unit.layers]
    seen: list[nn.Module] = []
    handles = [unit.module.register_forward_pre_hook(lambda module, _: seen.append(module)) for unit in found]
    try:
        with torch.no_grad(), full_precision(model):
            model(**data.batch(torch.arange(1), device_of(model))[0])
    finally:
        for handle in handles:
            handle.remove()
    position = {module: index for index, module in reversed(list(enumerate(seen)))}
    return sorted((unit for unit in found if unit.module in position), key=lambda unit: position[unit.module])


def _call(
    unit: Unit, inputs: UnitInputs, picked: Tensor, other: UnitInputs | None = None, keep: Tensor | None = None
) -> list[Tensor]:
    """The unit's outputs for the picked samples, each at its interval; first input taken from `other` where `keep` is False."""
    arguments, keywords = inputs.rows(picked)
    if other is not None and keep is not None:
        replacements, _ = other.rows(picked)
        if arguments and isinstance(arguments[0], Tensor):
            mask = keep.view(arguments[0].shape)
            arguments[0] = torch.where(mask, arguments[0], replacements[0])
    _set_intervals(unit.module, inputs, picked)
    return output_tensors(unit.module(*arguments, **keywords))


def _set_intervals(module: nn.Module, inputs: UnitInputs, picked: Tensor) -> None:
    assert inputs.intervals is not None
    for _, quantizer in quantizers(module):
        if quantizer.clock is not None:
            quantizer.clock.set_interval(inputs.intervals[picked])
            return  # one clock serves the whole model


def _minibatch_error(
    unit: Unit, given: UnitInputs, wanted: UnitInputs, batch_size: int, power: float, mix: float, generator: torch.Generator
) -> Tensor:
    samples = len(wanted.outputs[0])
    picked = torch.randperm(samples, generator=generator)[:batch_size]
    keep = None
    if mix > 0 and given.arguments and isinstance(given.arguments[0], Tensor):
        shape, device = given.arguments[0][picked].shape, given.arguments[0].device
        keep = (torch.rand(shape, generator=generator) >= mix).to(device)
    output = _call(unit, given, picked, wanted if keep is not None else None, keep)
    return lp_loss(output, [tensor[picked] for tensor in wanted.outputs], power)


def _thinned(curve: list[float]) -> list[float]:
    return [float(part.mean()) for part in torch.tensor(curve).tensor_split(min(10, len(curve)))]


def _unit_error(unit: Unit, given: UnitInputs, wanted: UnitInputs, batch_size: int) -> float:
    """Relative L2 error of the unit's outputs over all recorded samples."""
    error = signal = 0.0
    with torch.no_grad():
        for picked in torch.arange(len(wanted.outputs[0])).split(batch_size):
            for value, target in zip(_call(unit, given, picked), wanted.outputs, strict=True):
                error += float((value - target[picked]).square().sum())
                signal += float(target[picked].square().sum())
    return math.sqrt(error / max(signal, 1e-24))

"""ReconstructRounding: which way each weight rounds. LearnScales: steps and zero points by gradient. Both unit by unit.

Sources: AdaRound (Nagel et al. 2020, arXiv 2004.10568), rounding as a learned choice; BRECQ (Li et al. 2021, arXiv 2102.05426),
blocks as units; Q-Diffusion (Li et al. 2023, arXiv 2302.04304), the settings for diffusion; LSQ (Esser et al. 2020, arXiv
1902.08153), the gradient of a step; QDrop (Wei et al. 2022, arXiv 2203.05740), mixing full-precision inputs in.
*Differs*: rates of steps are relative to the step (0.01 moves it by about one per cent an update), so that layers of all ranges
move alike; the papers' rates are absolute.
"""

from __future__ import annotations

from typing import Any, final

import torch
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import Run, constant, cosine, fit
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import UnitInputs
from diffquant.core.model import quantizers
from diffquant.core.quantizer import logits_of, rectified_sigmoid
from diffquant.host.structure import Unit
from diffquant.methods.base import Figures, quantizer_state, restore_quantizers
from diffquant.methods.learned_scale import LearnedSteps
from diffquant.methods.units import Fitted, UnitPass, minibatch_error, thinned, unit_error

REGULARIZATION = 0.01  # of the soft choices, AdaRound's
BETAS = (20.0, 2.0)  # its exponent, falling
STEP_RATE = 2e-3  # of steps, relative to them, falling along a cosine


@final
class ReconstructRounding(UnitPass):
    """Learn for every weight of a unit whether it rounds down or up; ends with integer codes.

    After the first ``warm_up`` share of the iterations the soft choices are pushed to 0 or 1, by a penalty whose exponent falls.
    """

    rate: float = Field(default=1e-2, gt=0)
    warm_up: float = Field(default=0.2, ge=0, lt=1)

    @property
    def weight_options(self) -> dict[str, Any]:
        """All: activation quantizers are off."""
        return self.model_dump(mode="json")

    @property
    def weights_only(self) -> bool:
        """It decides codes of weights, with activation quantizers off."""
        return True

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Decide the codes of every quantized weight. Raises `SpecError` where ranges were not calibrated."""
        return self.walk(model, data, generator, run, "rounding", lambda quantizer: quantizer.clock is None, self._fit_unit)

    def _fit_unit(self, unit: Unit, given: UnitInputs, wanted: UnitInputs, seed: int, run: Run) -> Fitted:
        learned = [layer for _, layer in unit.layers if layer.weight_quantizer is not None]
        before = unit_error(unit, given, wanted, self.batch_size)
        if not learned:
            return Fitted(before, before)
        for layer in learned:
            quantizer = layer.weight_quantizer
            assert quantizer is not None
            weight = layer.weight_to_quantize()
            scale, _ = quantizer.operands(weight)
            quantizer.codes = None
            quantizer.rounding = logits_of((weight / scale) - (weight / scale).floor())
        logits = [layer.weight_quantizer.rounding for layer in learned if layer.weight_quantizer is not None]
        parameters = [tensor for tensor in logits if tensor is not None]

        def loss(iteration: int, generator: torch.Generator) -> Tensor:
            error = minibatch_error(unit, given, wanted, self.batch_size, 2.0, generator)
            progress = (iteration / self.iterations - self.warm_up) / (1 - self.warm_up)
            if progress < 0:
                return error
            beta = BETAS[1] + (BETAS[0] - BETAS[1]) * (1 - progress)
            for tensor in parameters:
                error = error + REGULARIZATION * (1 - (2 * rectified_sigmoid(tensor) - 1).abs().pow(beta)).sum()
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
            layer.weight_quantizer.decide(layer.weight_to_quantize())
        return Fitted(before, unit_error(unit, given, wanted, self.batch_size), thinned(curve))


@final
class LearnScales(UnitPass):
    """Learn the steps and zero points of activations by LSQ, on the error to the ``power``."""

    power: float = 2.4

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Learn the scales of every unit with all quantizers on. Raises `SpecError` where ranges were not calibrated."""
        return self.walk(model, data, generator, run, "scales", lambda quantizer: True, self._fit_unit)

    def _fit_unit(self, unit: Unit, given: UnitInputs, wanted: UnitInputs, seed: int, run: Run) -> Fitted:
        before = unit_error(unit, given, wanted, self.batch_size)
        activations = [quantizer for _, quantizer in quantizers(unit.module) if quantizer.clock is not None]
        learned = [LearnedSteps.of(quantizer, STEP_RATE, zero_points=True) for quantizer in activations]
        if not learned:
            return Fitted(before, before)
        start = quantizer_state(unit.module)

        def loss(iteration: int, generator: torch.Generator) -> Tensor:
            for one in learned:
                one.place()
            error = minibatch_error(unit, given, wanted, self.batch_size, self.power, generator)
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
        after = unit_error(unit, given, wanted, self.batch_size)
        if after > before:  # a unit that learning made worse keeps what it came with
            restore_quantizers(unit.module, start)
            return Fitted(before, before, thinned(curve))
        return Fitted(before, after, thinned(curve))

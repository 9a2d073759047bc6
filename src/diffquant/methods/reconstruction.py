"""ReconstructRounding: which way each weight rounds. LearnScales: scales and zero points by gradient. Both unit by unit.

Sources: AdaRound (Nagel et al. 2020, arXiv 2004.10568), rounding as a learned choice; BRECQ (Li et al. 2021, arXiv 2102.05426),
blocks as units; Q-Diffusion (Li et al. 2023, arXiv 2302.04304), the settings for diffusion; LSQ (Esser et al. 2020, arXiv
1902.08153), the gradient of a scale.
*Differs*: learning rates of scales are relative to the scale (0.01 moves it by about one per cent an update), so that layers of all
ranges move alike; the papers' rates are absolute.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import Run, cosine, fit
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import UnitInputs
from diffquant.core.model import quantizers
from diffquant.host.structure import Unit
from diffquant.methods.base import Figures, quantizer_state, restore_quantizers
from diffquant.methods.learned import LearnedRounding, LearnedScale, leaves, placed
from diffquant.methods.units import Fitted, UnitPass, in_order, minibatch_error, thinned, unit_error

PENALTY = 0.01  # weight of AdaRound's
SCALE_LR = 2e-3  # relative, falling along a cosine


@final
class ReconstructRounding(UnitPass):
    """Learn for every weight of a unit whether it rounds down or up; ends with integer codes.

    After the first ``warm_up`` share of the iterations the soft choices are pushed to 0 or 1, by a penalty whose exponent falls.
    """

    weights_only: ClassVar[bool] = True

    units: Literal["block", "layer"] = "block"
    rate: float = Field(default=1e-2, gt=0)
    warm_up: float = Field(default=0.2, ge=0, lt=1)

    @property
    def weight_options(self) -> dict[str, Any]:
        """All: activation quantizers are off."""
        return self.model_dump(mode="json")

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Decide the codes of every quantized weight. Raises `SpecError` where ranges were not calibrated."""
        ordered = in_order(model, data, self.units)
        return self.walk(model, ordered, data, generator, run, "rounding", lambda each: each.of_weight, self._fit_unit)

    def _fit_unit(self, unit: Unit, data: UnitInputs, seed: int, run: Run) -> Fitted:
        before = unit_error(unit, data, self.batch_size)
        learned = [LearnedRounding(layer, self.rate) for _, layer in unit.layers if layer.weight_quantizer is not None]
        if not learned:
            return Fitted(before, before)

        def loss(iteration: int, generator: torch.Generator) -> Tensor:
            error = minibatch_error(unit, data, self.batch_size, 2.0, generator)
            progress = (iteration / self.iterations - self.warm_up) / (1 - self.warm_up)
            if progress >= 0:
                for each in learned:
                    error = error + each.penalty(progress, PENALTY)
            return error

        curve = fit(leaves(learned), loss, iterations=self.iterations, seed=seed, run=run, label=unit.name)
        for each in learned:
            each.finish()
        return Fitted(before, unit_error(unit, data, self.batch_size), thinned(curve))


@final
class LearnScales(UnitPass):
    """Learn the scales and zero points of activations by LSQ, on the error to the ``power``."""

    units: Literal["block", "layer"] = "block"
    power: float = 2.4

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Learn the scales of every unit with all quantizers on. Raises `SpecError` where ranges were not calibrated."""
        ordered = in_order(model, data, self.units)
        return self.walk(model, ordered, data, generator, run, "scales", lambda each: True, self._fit_unit)

    def _fit_unit(self, unit: Unit, data: UnitInputs, seed: int, run: Run) -> Fitted:
        before = unit_error(unit, data, self.batch_size)
        activations = [quantizer for _, quantizer in quantizers(unit.module) if quantizer.clock is not None]
        learned = [LearnedScale(quantizer, SCALE_LR, zero_points=True) for quantizer in activations]
        if not learned:
            return Fitted(before, before)
        start = quantizer_state(unit.module)

        def loss(iteration: int, generator: torch.Generator) -> Tensor:
            with placed(learned):
                error = minibatch_error(unit, data, self.batch_size, self.power, generator)
                error.backward()
            return error.detach()

        curve = fit(leaves(learned), loss, iterations=self.iterations, seed=seed, run=run, label=unit.name, schedule=cosine)
        for each in learned:
            each.finish()
        after = unit_error(unit, data, self.batch_size)
        if after > before:
            restore_quantizers(unit.module, start)
            after = before
        return Fitted(before, after, thinned(curve))

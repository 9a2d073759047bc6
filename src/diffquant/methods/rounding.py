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
from diffquant.calibration.replay import UnitInputs
from diffquant.calibration.trajectory import Trajectory
from diffquant.core.layers import smoothed_weight
from diffquant.core.quantizer import Quantizer, logits_of, rectified_sigmoid
from diffquant.core.surgery import Unit, quantizers
from diffquant.methods.passes import Figures, quantizer_state, restore_quantizers
from diffquant.methods.steps import LearnedSteps
from diffquant.methods.units import Fitted, UnitPass, minibatch_error, thinned, unit_error


@final
class ReconstructRounding(UnitPass):
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

    @property
    def weight_options(self) -> dict[str, Any] | None:
        """All, where activation quantizers are off."""
        return None if self.activations else self.model_dump(mode="json")

    @property
    def weights_only(self) -> bool:
        """It decides codes of weights, with activation quantizers off unless ``activations``."""
        return not self.activations

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Decide the codes of every quantized weight. Raises `SpecError` where ranges were not calibrated."""

        def prefix(quantizer: Quantizer) -> bool:
            return self.activations or quantizer.clock is None

        return self.walk(model, data, generator, run, "rounding", prefix, self._fit_unit, mixed=self.mix > 0)

    def _fit_unit(self, unit: Unit, given: UnitInputs, wanted: UnitInputs, seed: int, run: Run) -> Fitted:
        learned = [layer for _, layer in unit.layers if layer.weight_quantizer is not None]
        before = unit_error(unit, given, wanted, self.batch_size)
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
            error = minibatch_error(unit, given, wanted, self.batch_size, self.power, self.mix, generator)
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
        return Fitted(before, unit_error(unit, given, wanted, self.batch_size), thinned(curve))


@final
class LearnScales(UnitPass):
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
        return self.walk(model, data, generator, run, "scales", lambda quantizer: True, self._fit_unit, mixed=self.mix > 0)

    def _fit_unit(self, unit: Unit, given: UnitInputs, wanted: UnitInputs, seed: int, run: Run) -> Fitted:
        before = unit_error(unit, given, wanted, self.batch_size)
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
            error = minibatch_error(unit, given, wanted, self.batch_size, self.power, self.mix, generator)
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

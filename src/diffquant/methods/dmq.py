"""DMQ: a learned vector per layer that moves range between inputs and weights, and power-of-two factors for extreme channels.

`LearnEquivalentScaling` learns ``smooth`` of each layer alone, through quantizers whose ranges follow it. `PowerOfTwoScaling` gives
every channel of a shortcut's input the scale that most samples vote for, a shift of the integer weight.

Source: Lee et al. 2025 (arXiv 2507.12933); settings of the released code.
*Differs*: ``smooth`` stays above a floor (released: free, it can cross zero); timesteps' losses are averaged over the samples that
a batch has (released: summed, so that often drawn timesteps look worse); where samples do not agree a channel keeps the tensor's
own scale (printed formula: it would become the finest); power-of-two factors refine the calibrated range, whatever calibrated it.
What else was tried: docs/studies/dmq.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from diffquant.calibration.fit import Run, cosine, fit
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import UnitInputs, observe
from diffquant.calibration.timing import Work
from diffquant.core.affine import fake_quantize
from diffquant.core.clock import StepClock, spread
from diffquant.core.layers import QuantizedLayer
from diffquant.core.model import clock_of, quantized_layers, switched
from diffquant.core.quantizer import Quantizer
from diffquant.core.spec import MAX_BITS
from diffquant.errors import SpecError
from diffquant.host.structure import PlannedLayer, Unit
from diffquant.methods.base import Figures, Pass, evaluating, require_smooth, scaled_layers
from diffquant.methods.scaling import Live, has_both, live_output, relative_error, sample_errors, searched_shrink
from diffquant.methods.units import Fitted, UnitPass, in_order, thinned

_log = logging.getLogger(__name__)

LR = 1e-3
FLOOR = 1e-2  # of the vector
ALPHA, BINS, MOMENTUM = 20, 20, 0.95  # of the weighting of timesteps: power, bins of the axis, average of their losses
LARGEST, AGREEMENT = 3, 0.85  # largest exponent of a factor, and share of the samples that have to agree on one


@final
class LearnEquivalentScaling(UnitPass):
    """Learn ``smooth`` of every layer that has one and quantizes both operands, on full-precision inputs and outputs.

    Timesteps with small loss have more weight. Ranges of inputs are the extremes of a mini-batch of all timesteps; with ``shrink``
    times what the search of ``CalibrateRanges`` leaves of them, which is where the layer's ranges end up by ``mse``.
    """

    before_ranges: ClassVar[bool] = True

    iterations: int = Field(default=6000, ge=1)
    shrink: bool = False

    @property
    def needs(self) -> Literal["smooth"]:
        """The vector that is chosen."""
        return "smooth"

    def check(self, model: nn.Module, rows: Sequence[PlannedLayer], data: Trajectory) -> None:
        """Raise `SpecError` where no layer has the vector to learn, or steps of the sampler are needed and cannot be replayed."""
        require_smooth("LearnEquivalentScaling", scaled_layers(rows))
        super().check(model, rows, data)

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Learn the vectors; ranges have to be calibrated afterwards. Raises `SpecError` where no layer has one."""
        require_smooth("LearnEquivalentScaling", [name for name, layer in quantized_layers(model) if has_both(layer)])
        scaled = [unit for unit in in_order(model, data, "layer") if has_both(_layer(unit))]
        fit_layer = partial(self._fit_layer, clock_of(model))
        return self.walk(model, scaled, data, generator, run, "equivalent scaling", None, fit_layer)

    def _fit_layer(self, clock: StepClock, unit: Unit, data: UnitInputs, seed: int, run: Run) -> Fitted:
        layer, weights = _layer(unit), TimestepWeights(clock)
        x, target, intervals = data.arguments[0], data.outputs[0], data.intervals
        assert intervals is not None and layer.smooth is not None
        smooth = layer.smooth.clone()
        live = Live(shrink=searched_shrink(layer, x, self.batch_size) if self.shrink else None)
        before = relative_error(layer, smooth, x, target, self.batch_size, live)

        def loss(iteration: int, generator: torch.Generator) -> Tensor:
            picked = torch.randperm(len(x), generator=generator)[: self.batch_size]
            output = live_output(layer, smooth, data.pick(x, picked), live)
            errors = sample_errors(output, data.pick(target, picked), layer)
            counts = 1.0 if data.counts is None else data.counts[picked].to(errors.device).square()
            return (weights(errors.detach(), intervals[picked]) * counts * errors).mean()

        def stay_positive(iteration: int) -> None:
            smooth.clamp_(min=FLOOR)

        curve = fit(
            [(smooth, LR)],
            loss,
            iterations=self.iterations,
            seed=seed,
            run=run,
            label=unit.name,
            schedule=cosine,
            after_iteration=stay_positive,
            also_saved={"losses": weights.losses},
        )
        layer.smooth = smooth
        after = relative_error(layer, smooth, x, target, self.batch_size, live)
        return Fitted(before, after, thinned(curve))


class TimestepWeights:
    """How much the samples of each timestep count, with the running loss of each bin of the axis, ``[bins]``."""

    def __init__(self, clock: StepClock) -> None:
        self.bins = spread(min(BINS, clock.intervals), clock.intervals)  # of each interval
        self.losses = torch.zeros(int(self.bins.max()) + 1)

    def __call__(self, errors: Float[Tensor, " n"], intervals: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Weights of samples with these errors; the running losses take them in first."""
        if len(self.losses) == 1:  # one bin's share of the loss is all of it
            return torch.ones_like(errors)
        bins = self.bins[intervals]
        counts = torch.bincount(bins, minlength=len(self.losses))
        sums = torch.zeros_like(self.losses).index_add_(0, bins, errors.cpu().float())
        moved = torch.lerp(self.losses, sums / counts.clamp(min=1), 1 - MOMENTUM)
        self.losses.copy_(torch.where(counts > 0, moved, self.losses))
        share = self.losses / self.losses.sum().clamp(min=1e-24)
        return ((1 - share) ** ALPHA)[bins].to(errors)


@final
class PowerOfTwoScaling(Pass):
    """Give the input channels of every layer with ``shift`` a scale of 1/8 to 1 times the calibrated one.

    Each sample votes for the scale with the least squared error of the channel. The most frequent choice holds if most samples made
    it, otherwise the scale stays. Each parameter set has its own factors. Layers whose shifted integer weight would not fit 8 bits
    keep one scale for all channels; the figures name them.
    """

    samples: int = Field(default=1024, ge=1)
    batch_size: int = Field(default=32, ge=1)

    @property
    def needs(self) -> Literal["shift"]:
        """The vector that is chosen."""
        return "shift"

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Choose the factors layer by layer, on inputs from the quantized layers before.

        A model without the layers that the rules give ``shift``, such as a transformer without shortcuts, is left as it is, which a
        line says. Raises `SpecError` where a layer already has factors.
        """
        with_shift = [
            unit
            for unit in in_order(model, data, "layer")
            if isinstance(quantizer := _layer(unit).input_quantizer, Quantizer) and quantizer.shift is not None
        ]
        if not with_shift:
            note = "the model has none of the layers that the recipe gives shift: true; nothing is scaled"
            _log.warning("PowerOfTwoScaling: %s", note)
            return {"note": note}
        indices = data.subset(min(self.samples, len(data)), generator)
        rows: list[dict[str, object]] = []
        with evaluating(model), switched(model, True), torch.no_grad():
            for unit in run.track(with_shift, "power-of-two scaling"):
                layer = _layer(unit)
                reason = self._refusal(layer)
                row: dict[str, object] = {"layer": unit.name, "operand": "shift"}
                if reason:
                    row["off"] = reason
                else:
                    row |= self._choose(layer, observe(model, [layer], data, indices, self.batch_size)[0])
                rows.append(row)
        return {"layers": rows, "samples": len(indices)}

    def work(self, blocks: int) -> Work:
        """Half the model for each shortcut: taken to be in every other unit."""
        return Work(0.25 * blocks * self.samples)

    def _refusal(self, layer: QuantizedLayer) -> str:
        if layer.weight_quantizer is None:
            return "its weight stays in floating point"
        spec = layer.weight_quantizer.spec
        reach = -spec.code_min if spec.symmetric else spec.code_max + 1  # of codes, or of codes minus a zero point
        if reach << LARGEST > 1 << (MAX_BITS - 1):
            return f"a weight of {spec.bits} bits shifted by {LARGEST} does not fit 8 bits"
        return ""

    def _choose(self, layer: QuantizedLayer, data: UnitInputs) -> dict[str, object]:
        quantizer, x, intervals = layer.input_quantizer, data.arguments[0].float(), data.intervals
        assert isinstance(quantizer, Quantizer) and quantizer.shift is not None and intervals is not None
        if quantizer.shift.any():
            raise SpecError("PowerOfTwoScaling: the layer has factors already; calibrate its ranges again first")
        x = x.movedim(quantizer.axis, 1).flatten(2) if x.dim() > 2 else x[..., None]  # [n, channels, positions]
        if layer.smooth is not None:
            x = x / layer.smooth[:, None]
        spread_of_channels = float(x.std(dim=(0, 2)).max() / x.std(dim=(0, 2)).median().clamp(min=1e-12))
        row_of = torch.zeros_like(intervals) if quantizer.table is None else quantizer.table.cpu().long()[intervals.long()]
        errors = self.errors(quantizer, x, row_of)
        chosen, agreed = torch.full_like(quantizer.shift, LARGEST), []
        for row in row_of.unique():
            exponents, agreement = self.decide(errors[row_of == row])
            chosen[row] = exponents.to(chosen)
            agreed.append(float(agreement.mean()))
        quantizer.scale = quantizer.scale / 2**LARGEST
        quantizer.shift = chosen
        picked = chosen.long()[row_of]  # [n, channels]
        return {
            "channel_spread": spread_of_channels,
            "refined": float((chosen < LARGEST).float().mean()),
            "agreement": sum(agreed) / len(agreed),
            "error_before": float(errors[..., LARGEST].sum().sqrt()),
            "error_after": float(errors.gather(2, picked[..., None]).sum().sqrt()),
        }

    def errors(
        self, quantizer: Quantizer, x: Float[Tensor, "n channels positions"], row_of: Int[Tensor, " n"]
    ) -> Float[Tensor, "n channels exponents"]:
        """Mean squared error of each sample's channel under each of the scales, 1/8 to 1 times the present one."""
        sizes = torch.tensor(quantizer.splits or (x.shape[1],))
        scale, zero_point = (
            values[row_of].repeat_interleave(sizes.to(values.device), dim=1)[..., None]
            for values in (quantizer.scale, quantizer.zero_point)
        )
        factors = [2.0 ** (exponent - LARGEST) for exponent in range(LARGEST + 1)]
        errors = [(fake_quantize(x, scale * factor, zero_point, quantizer.spec) - x).square().mean(dim=2) for factor in factors]
        return torch.stack(errors, dim=2)

    def decide(self, errors: Float[Tensor, "n channels exponents"]) -> tuple[Int[Tensor, " channels"], Float[Tensor, " channels"]]:
        """The exponent of each channel, and the share of samples that agree with it; ties go to the coarser scale."""
        coarsest_first = errors.flip(dims=(2,))
        votes = functional.one_hot(coarsest_first.argmin(dim=2), errors.shape[2]).float().mean(dim=0)  # [channels, exponents]
        chosen = votes.argmax(dim=1)
        agreement = votes.gather(1, chosen[:, None])[:, 0]
        return LARGEST - torch.where(agreement >= AGREEMENT, chosen, 0), agreement


def _layer(unit: Unit) -> QuantizedLayer:
    ((_, layer),) = unit.layers
    return layer

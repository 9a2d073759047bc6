"""AccuQuant: quantization parameters learned over several denoising steps at once, in the memory of one.

The sampling steps are cut into segments. From the latent at which a segment starts, the quantized model takes the segment's steps
one after the other, and only where it ends is compared with where full precision ended: errors add up in calibration as they do in
sampling. How the gradient gets to every step with one graph alive at a time: `methods.gradients`.

Source: Lee et al. 2025, arXiv 2510.20348 (abstract, figures and tables; no code is public). *Chosen here*, where the source leaves
it open: the squared distance, its normalisation per segment, steps learned as logarithms with Adam and a cosine, zero points of
activations learned with them, codes of weights fixed while their steps are learned. *Not the source's*: ``visits: final_error``,
``error: sample``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, final

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from rich.console import Console
from torch import Tensor, nn

from diffquant.calibration.fit import Run, cosine, fit
from diffquant.calibration.rollout import Chain, Rollout
from diffquant.calibration.trajectory import Trajectory
from diffquant.core.planning import PlannedLayer
from diffquant.core.surgery import full_precision, quantized_layers, quantizers, switched
from diffquant.methods.gradients import Distance, Gradient, gradient_of, segment_gradient, squared
from diffquant.methods.last_sample import LastSample
from diffquant.methods.learned import Learned, LearnedOffset, LearnedRounding, LearnedSmooth, float_weight
from diffquant.methods.passes import (
    Figures,
    Pass,
    draw_seed,
    evaluating,
    quantizer_state,
    require_smooth,
    restore_quantizers,
    scaled_layers,
)
from diffquant.methods.starts import Starts
from diffquant.methods.steps import LearnedSteps

LOW_COSINE = 0.8  # of approximate and exact gradient: below it a segment is called too long
SAVE_EVERY = 50  # iterations
PROBED = 32  # trajectories on which segments are measured before and after
STRETCHES = 10  # of the sampling steps, whose part in the final error is measured
SPREAD = 0.1  # of the visits: equally over all segments, whatever their part in the final error


@final
class AccuQuant(Pass):
    """Learn steps and zero points of activations, and with ``weights`` steps of weights, so that segments end where they should.

    ``gradient``: `identity` hands the gradient at the end to every step; `exact` is that of the whole chain, by recomputation;
    `accumulate` takes the error so far at every step, in one pass; `chain` is plain back-propagation, whose memory grows with the
    segment. ``visits``: all segments `equally`, or in proportion to the `final_error` that a segment's quantization alone causes,
    but for a tenth of the visits. ``start`` of the chains: the full-precision latent, or (`quantized`) the one the quantized model
    has reached there (`methods.starts`), from which full precision then also runs: M forward passes more in every iteration.
    ``error``: the distance at a segment's end is that of the latents, relative to what it was before, or (`sample`) an estimate of
    what it makes of the last sample, from random ``directions`` there (`methods.last_sample`), the same for all segments.
    ``per_segment`` gives activations a parameter set per segment, where they had one for all. Rates: of steps relative to the step,
    of zero points relative to the range, of biases relative to the spread of the layer's outputs. ``rounding`` learns the rounding
    of weights again, from what was decided before, in place of their steps; ``smooth`` learns a step of its own for every input
    channel of the layers that have ``smooth``, codes of weights unchanged; ``biases`` learns what is added to the bias of a layer
    while it is quantized. ``cosines`` logs, per segment, the cosine of the gradient used and the exact one before learning. Where
    one graph of the model does not fit: ``checkpointing`` keeps the inputs of its blocks and computes each block again as gradients
    pass it, with equal gradients; ``split_guidance`` takes the halves of a guided call one after the other.
    """

    steps_per_segment: int = Field(default=5, ge=1)
    gradient: Gradient = "identity"
    visits: Literal["equally", "final_error"] = "equally"
    start: Literal["full_precision", "quantized"] = "full_precision"
    error: Literal["latent", "sample"] = "latent"
    directions: int = Field(default=1, ge=1)
    iterations: int = Field(default=400, ge=1)
    batch_size: int = Field(default=16, ge=1)
    rate: float = Field(default=2e-3, gt=0)
    zero_points: bool = True
    per_segment: bool = False
    weights: bool = True
    weight_rate: float = Field(default=2e-3, gt=0)
    biases: bool = False
    bias_rate: float = Field(default=2e-3, gt=0)
    smooth: bool = False
    smooth_rate: float = Field(default=2e-3, gt=0)
    rounding: bool = False
    rounding_rate: float = Field(default=1e-2, gt=0)
    regularization: float = Field(default=1e-3, ge=0)
    cosines: bool = True
    checkpointing: bool = False
    split_guidance: bool = False

    @model_validator(mode="after")
    def _one_of_rounding_and_smooth(self) -> AccuQuant:
        if self.rounding and self.smooth:
            raise ValueError("smooth is learned with the codes of weights as they are; leave out rounding or smooth")
        return self

    @property
    def needs(self) -> Literal["smooth"] | None:
        """The vector, where it is learned."""
        return "smooth" if self.smooth else None

    def sample_forwards(self, blocks: int) -> float:
        """A forward, and one with its backward and what it computes again, for each step; the measuring beside it is small."""
        again = 1.0 if self.checkpointing or self.split_guidance else 0.0
        return (4.0 + again) * self.iterations * self.batch_size * self.steps_per_segment

    def check(self, model: nn.Module, rows: Sequence[PlannedLayer], data: Trajectory) -> None:
        """Raise `CalibrationError` where the recording cannot be replayed, `SpecError` where no layer has the vector to learn."""
        if self.smooth:
            require_smooth("AccuQuant", scaled_layers(rows))
        Rollout(model, data).verify(trajectories=1)

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Learn on the recorded trajectories.

        Raises `SpecError` where ranges were not calibrated, and `CalibrationError` where the recording cannot be replayed.
        """
        rollout = Rollout(model, data, checkpointing=self.checkpointing, split_guidance=self.split_guidance)
        rollout.verify()
        segments = rollout.segments(self.steps_per_segment)
        seed = draw_seed(generator)
        probe = torch.randperm(rollout.trajectories, generator=generator)[:PROBED]
        with evaluating(model), switched(model, True):
            before = quantizer_state(model)
            if self.per_segment:
                _divide_sets(rollout, segments)
            learned = self._learned(model)
            last = None
            if self.error == "sample":
                last = LastSample.of(model, rollout, segments, self.directions, seed, self.batch_size, run)
            distance = functools.partial(_distance, last)
            measured = [_segment_error(rollout, one, probe, self.batch_size, distance, i) for i, one in enumerate(segments)]
            agreement = [self._cosine(rollout, segment, probe, learned) for segment in segments]
            norms = torch.tensor(measured).clamp(min=1e-12)
            shares = self._shares(rollout, segments, norms, probe)

            def loss(iteration: int, drawn: torch.Generator) -> Tensor:
                number = visited(shares, iteration, seed)
                scale = float(norms[number] if last is None else norms.mean())
                return self._loss(iteration, starts, number, scale, learned, drawn, distance)

            starts = Starts(rollout, segments, self.batch_size, carried=self.start == "quantized")
            curve = fit(
                [pair for one in learned for pair in one.parameters()],
                loss,
                iterations=self.iterations,
                seed=seed,
                run=run,
                label=f"{self.steps_per_segment} steps at once",
                schedule=cosine,
                also_kept={"norms": norms, "shares": shares, "trajectories": starts.trajectories, "latents": starts.latents},
                save_every=SAVE_EVERY,
            )
            for one in learned:
                one.finish()
            after = [_segment_error(rollout, one, probe, self.batch_size, distance, i) for i, one in enumerate(segments)]
            kept = _mean_ratio(after, norms, shares) < 1.0 if last is None else sum(after) < sum(measured)
            if not kept:  # learning that made the segments worse is undone
                restore_quantizers(model, before)
        return {
            "segments": [
                {"steps": [one.start, one.stop], "share": share, "error_before": start, "error_after": end, "cosine": agreed}
                for one, share, start, end, agreed in zip(segments, shares.tolist(), norms.tolist(), after, agreement, strict=True)
            ],
            "kept": kept,
            "iterations": self.iterations,
            "loss": [float(part.mean()) for part in torch.tensor(curve).tensor_split(min(40, len(curve)))],
        }

    def _learned(self, model: nn.Module) -> list[Learned]:
        learned: list[Learned] = []
        layers = {layer.weight_quantizer: layer for _, layer in quantized_layers(model) if layer.weight_quantizer is not None}
        for _, quantizer in quantizers(model):
            if quantizer.clock is not None:
                learned.append(LearnedSteps.of(quantizer, self.rate, self.zero_points))
            elif self.rounding:
                learned.append(LearnedRounding.of(quantizer, layers[quantizer], self.rounding_rate))
            elif self.weights or self.smooth:
                if quantizer.codes is None:
                    quantizer.decide(float_weight(layers[quantizer]))
                if self.weights:
                    learned.append(LearnedSteps.of(quantizer, self.weight_rate, zero_points=False))
        if self.smooth:
            scaled = [layer for layer in layers.values() if layer.input_quantizer is not None and layer.smooth is not None]
            require_smooth("AccuQuant", scaled)
            learned += [LearnedSmooth.of(layer, self.smooth_rate) for layer in scaled]
        if self.biases:
            live = (layer for layer in layers.values() if layer.input_quantizer is not None and layer.bias is not None)
            learned += [LearnedOffset.of(layer, self.bias_rate) for layer in live]
        return learned

    def _loss(
        self,
        iteration: int,
        starts: Starts,
        number: int,
        scale: float,
        learned: list[Learned],
        generator: torch.Generator,
        distance: Callable[[int, Tensor], Distance],
    ) -> Tensor:
        """Put the gradient of segment `number` on one batch into the parameters; return the loss in parts of `scale`."""
        for one in learned:
            one.place()
        chain, start = starts.take(number, generator)
        given = distance(number, chain.trajectories)
        loss, end = segment_gradient(chain, start, self._targets(chain, start), self.gradient, 1.0 / scale, given)
        starts.leave(number, chain, end)
        for one in learned:
            one.collect()
            if isinstance(one, LearnedRounding):
                one.regularize(iteration / self.iterations, self.regularization)
        return loss

    def _shares(self, rollout: Rollout, segments: list[range], norms: Tensor, probe: Tensor) -> Tensor:
        """The share of visits of each segment.

        The final error is measured for stretches of at least a tenth of the steps; inside a stretch segments share it as their own
        errors do.
        """
        equal = torch.full((len(segments),), 1 / len(segments), dtype=torch.float64)
        if self.visits == "equally":
            return equal
        shares = torch.zeros_like(equal)
        numbers = torch.arange(len(segments))
        for stretch in numbers.tensor_split(min(STRETCHES, len(segments))):
            steps = range(segments[int(stretch[0])].start, segments[int(stretch[-1])].stop)
            final = _final_error(rollout, steps, probe, self.batch_size)
            shares[stretch] = final * (norms[stretch] / norms[stretch].sum()).double()
        return (1 - SPREAD) * shares / shares.sum().clamp(min=1e-30) + SPREAD * equal

    def _targets(self, chain: Chain, start: Tensor) -> Callable[[int], Tensor]:
        """The full-precision latent after each of the chain's steps."""
        if self.start == "full_precision" or chain.steps.start == 0:
            return lambda i: chain.recorded(i + 1)
        with full_precision(chain.rollout.model):
            latents, _ = chain.run(start)
        return lambda i: latents[i + 1]

    def _cosine(self, rollout: Rollout, segment: range, probe: Tensor, learned: list[Learned]) -> float | None:
        """Cosine of the gradient used and the exact one, over all parameters; None where it is not asked for."""
        if not self.cosines or self.gradient in ("exact", "chain"):
            return None
        chain = rollout.chain(probe[: self.batch_size], segment)
        used, exact = gradient_of(chain, self.gradient, learned), gradient_of(chain, "exact", learned)
        cosine = float(nn.functional.cosine_similarity(used, exact, dim=0))
        if cosine < LOW_COSINE:
            Console(stderr=True).print(
                f"accuquant: steps {segment.start} to {segment.stop - 1}: the {self.gradient} gradient has cosine {cosine:.2f} "
                f"with the exact one; shorten steps_per_segment, or set gradient: exact"
            )
        return cosine


def visited(shares: Float[Tensor, " segments"], iteration: int, seed: int) -> int:
    """The segment of an iteration: in every ``len(shares)`` iterations each comes as often as its share says, to within one visit.

    Where all shares are equal, every segment comes once, in shuffled order.
    """
    cycle, place = divmod(iteration, len(shares))
    generator = torch.Generator().manual_seed(seed + cycle)
    order = torch.randperm(len(shares), generator=generator)
    points = (torch.arange(len(shares)) + torch.rand(1, generator=generator, dtype=torch.float64)) / len(shares)
    numbers = torch.searchsorted(shares.cumsum(dim=0), points).clamp(max=len(shares) - 1)
    return int(numbers[order[place]])


def _divide_sets(rollout: Rollout, segments: list[range]) -> None:
    """A parameter set per segment for every activation quantizer that has one for all."""
    first = torch.zeros(1, dtype=torch.long)
    segment_at: dict[float, int] = {}
    for number, segment in enumerate(segments):
        for k in segment:
            segment_at.setdefault(float(rollout.data.step(first, k).timestep), number)
    for _, quantizer in quantizers(rollout.model):
        if quantizer.clock is not None and quantizer.rows == 1:
            table = torch.tensor([segment_at[timestep] for timestep in quantizer.clock.timesteps])
            quantizer.divide_sets(table.repeat(quantizer.clock.branches))


def _distance(last: LastSample | None, number: int, trajectories: Tensor) -> Distance:
    """The distance at the end of segment `number`."""
    return squared if last is None else last.distance(number, trajectories)


def _segment_error(
    rollout: Rollout,
    segment: range,
    trajectories: Tensor,
    batch_size: int,
    distance: Callable[[int, Tensor], Distance],
    number: int,
) -> float:
    """The mean distance at the end of a segment, started in full precision."""
    total = 0.0
    for picked in trajectories.split(batch_size):
        chain = rollout.chain(picked, segment)
        latents, _ = chain.run()
        total += float(distance(number, picked)(latents[-1], chain.recorded(len(segment)))) * len(picked)
    return total / len(trajectories)


def _final_error(rollout: Rollout, steps: range, trajectories: Tensor, batch_size: int) -> float:
    """Mean squared distance at the end of the trajectories when only `steps` are quantized."""
    total = 0.0
    for picked in trajectories.split(batch_size):
        latents, states = rollout.chain(picked, steps).run()
        with full_precision(rollout.model):
            reached = rollout.finish(picked, steps.stop, latents[-1], states[-1])
        target = rollout.chain(picked, range(rollout.steps)).recorded(rollout.steps)
        total += float((reached - target).square().mean()) * len(picked)
    return total / len(trajectories)


def _mean_ratio(after: list[float], norms: Tensor, shares: Tensor) -> float:
    """Geometric mean over segments, weighed by their shares, of the error after over that before."""
    return math.exp(float((shares * (torch.tensor(after).clamp(min=1e-12) / norms).log()).sum()))

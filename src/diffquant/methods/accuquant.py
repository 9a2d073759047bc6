"""AccuQuant: quantization parameters learned over several denoising steps at once, in the memory of one.

The sampling steps are cut into segments. The quantized model takes a segment's steps one after the other, and only the latent at
the end is compared with that of full precision, so that errors add up in calibration as they do in sampling. `methods.gradients`
takes the gradient with one step's graph at a time.

Source: Lee et al. 2025, arXiv 2510.20348 (abstract, figures and tables; no code is public). *Chosen here*, where the source leaves
it open: the squared distance, its normalisation per segment, scales learned as logarithms with Adam and a cosine, zero points of
activations learned with them, codes of weights fixed while their scales are learned. Also tried: docs/studies/accuquant.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from pydantic import Field, model_validator
from rich.console import Console
from torch import Tensor, nn

from diffquant.calibration.fit import Run, cosine, fit
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.rollout import Chain, Rollout
from diffquant.calibration.timing import Work
from diffquant.core.model import activation_quantizers, quantized_layers, quantizers, switched
from diffquant.core.quantizer import Quantizer
from diffquant.host.structure import PlannedLayer
from diffquant.methods.base import (
    Figures,
    Pass,
    draw_seed,
    evaluating,
    quantizer_state,
    require_smooth,
    restore_quantizers,
    scaled_layers,
)
from diffquant.methods.gradients import Gradient, gradient_of, segment_gradient
from diffquant.methods.learned import Learned, LearnedOffset, LearnedRounding, LearnedScale, LearnedSmooth, leaves, placed
from diffquant.methods.units import thinned

LOW_COSINE = 0.8  # of approximate and exact gradient: below it a segment is called too long
SAVE_EVERY = 50  # iterations
PROBED = 32  # trajectories on which segments are measured before and after
ROUNDING_LR = 1e-2  # of the logits of rounding
PENALTY = 1e-3  # weight of AdaRound's


@final
class AccuQuant(Pass):
    """Learn scales and zero points of activations, and scales of weights, on the error at the end of segments.

    ``gradient``: `identity` hands the gradient at the end to every step; `exact` is that of the whole chain, by recomputation.
    ``per_segment`` gives activations a parameter set per segment, where they had one for all. ``rate`` is the learning rate,
    relative to the scale, the range (zero points) or the spread of the layer's outputs (biases). ``rounding`` learns the rounding
    of weights again, in place of their scales; ``smooth`` a scale for every input channel of the layers that have ``smooth``, with
    codes of weights unchanged; ``biases`` what is added to the bias of a quantized layer. ``cosines`` logs the cosine of the
    gradient used and the exact one, per segment, before learning. If one graph of the model does not fit into memory:
    ``checkpointing`` computes each block again as gradients pass it, with equal gradients; ``split_guidance`` takes the halves of
    a guided call one after the other.
    """

    steps_per_segment: int = Field(default=5, ge=1)
    gradient: Gradient = "identity"
    iterations: int = Field(default=400, ge=1)
    batch_size: int = Field(default=16, ge=1)
    rate: float = Field(default=2e-3, gt=0)
    per_segment: bool = False
    biases: bool = False
    smooth: bool = False
    rounding: bool = False
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

    def work(self, blocks: int) -> Work:
        """A forward, another with its backward, and what is recomputed, for each step; the measuring beside it is small."""
        passes = float(self.iterations * self.batch_size * self.steps_per_segment)
        return Work((3.0 if self.checkpointing or self.split_guidance else 2.0) * passes, passes)

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
            norms = torch.tensor(_segment_errors(rollout, segments, probe, self.batch_size)).clamp(min=1e-12)
            agreement = [self._cosine(rollout, segment, probe, learned) for segment in segments]

            def loss(iteration: int, generator: torch.Generator) -> Tensor:
                number = visited(len(segments), iteration, seed)
                picked = torch.randperm(rollout.trajectories, generator=generator)[: self.batch_size]
                return self._loss(iteration, rollout.chain(picked, segments[number]), float(norms[number]), learned)

            curve = fit(
                leaves(learned),
                loss,
                iterations=self.iterations,
                seed=seed,
                run=run,
                label=f"{self.steps_per_segment} steps at once",
                schedule=cosine,
                also_saved={"norms": norms},
                save_every=SAVE_EVERY,
            )
            for each in learned:
                each.finish()
            after = _segment_errors(rollout, segments, probe, self.batch_size)
            improved = float((torch.tensor(after).clamp(min=1e-12) / norms).log().mean()) < 0.0
            if not improved:
                restore_quantizers(model, before)
        return {
            "segments": [
                {"steps": [segment.start, segment.stop], "error_before": start, "error_after": end, "cosine": similarity}
                for segment, start, end, similarity in zip(segments, norms.tolist(), after, agreement, strict=True)
            ],
            "kept": improved,
            "iterations": self.iterations,
            "loss": thinned(curve, 40),
        }

    def _learned(self, model: nn.Module) -> list[Learned]:
        learned: list[Learned] = []
        layers = {layer.weight_quantizer: layer for _, layer in quantized_layers(model) if layer.weight_quantizer is not None}
        for _, quantizer in quantizers(model):
            if quantizer.clock is not None:
                learned.append(LearnedScale(quantizer, self.rate, zero_points=True))
            elif self.rounding:
                learned.append(LearnedRounding(layers[quantizer], ROUNDING_LR, again=True))
            else:
                if quantizer.codes is None:
                    quantizer.decide(layers[quantizer].weight_to_quantize())
                learned.append(LearnedScale(quantizer, self.rate, zero_points=False))
        quantized = [layer for layer in layers.values() if layer.input_quantizer is not None]
        if self.smooth:
            scaled = [layer for layer in quantized if layer.smooth is not None]
            require_smooth("AccuQuant", scaled)
            learned += [LearnedSmooth(layer, self.rate) for layer in scaled]
        if self.biases:
            ranged = [layer for layer in quantized if isinstance(layer.input_quantizer, Quantizer)]
            learned += [LearnedOffset(layer, self.rate) for layer in ranged if layer.bias is not None]
        return learned

    def _loss(self, iteration: int, chain: Chain, scale: float, learned: list[Learned]) -> Tensor:
        """Set the gradients of a segment's error on one batch, divided by `scale`; return that error."""
        with placed(learned):
            loss = segment_gradient(chain, chain.recorded(0), chain.recorded(len(chain.steps)), self.gradient, 1.0 / scale)
        for each in learned:
            if isinstance(each, LearnedRounding):
                with torch.enable_grad():
                    each.penalty(iteration / self.iterations, PENALTY).backward()
        return loss

    def _cosine(self, rollout: Rollout, segment: range, probe: Tensor, learned: list[Learned]) -> float | None:
        """Cosine of the gradient used and the exact one, over all parameters; None where it is not asked for."""
        if not self.cosines or self.gradient == "exact":
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


def visited(segments: int, iteration: int, seed: int) -> int:
    """The segment of an iteration: in every `segments` iterations each comes once, in shuffled order."""
    cycle, place = divmod(iteration, segments)
    return int(torch.randperm(segments, generator=torch.Generator().manual_seed(seed + cycle))[place])


def _divide_sets(rollout: Rollout, segments: list[range]) -> None:
    """A parameter set per segment for every activation quantizer that has one for all."""
    segment_at: dict[float, int] = {}
    for number, segment in enumerate(segments):
        for k in segment:
            segment_at.setdefault(rollout.data.step_timesteps[k], number)
    for quantizer in activation_quantizers(rollout.model).values():
        if quantizer.clock is not None and quantizer.rows == 1:
            table = torch.tensor([segment_at[timestep] for timestep in quantizer.clock.timesteps])
            quantizer.divide_sets(table.repeat(quantizer.clock.branches))


def _segment_errors(rollout: Rollout, segments: list[range], trajectories: Tensor, batch_size: int) -> list[float]:
    """The mean squared distance at the end of each segment, started in full precision."""
    errors = []
    for segment in segments:
        total = 0.0
        for picked in trajectories.split(batch_size):
            chain = rollout.chain(picked, segment)
            latents, _ = chain.run()
            total += float((latents[-1] - chain.recorded(len(segment))).square().mean()) * len(picked)
        errors.append(total / len(trajectories))
    return errors

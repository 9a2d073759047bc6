"""How corrections of the predicted noise are fitted to a recording; what they are: `core.correction`.

Sources: run-time noise estimate, QNCD (Chu et al. 2024, arXiv 2403.19140); proportional part, mean and variance, PTQD (He et al.
2023, arXiv 2305.10657); coefficients and input bias by timestep, TAC-Diffusion (Yao et al. 2024, arXiv 2407.03917).
*Differs*: the run-time estimate is taken per image, with one zero-mean noise for all (released code: over the batch, with noise
drawn for each image); PTQD's mean is that of the residual, as its formula says (code: of the whole
error); TAC's three terms are means, values of the noise near 0 are left out of the relative one, and its input bias is
one number for each channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import Run
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.rollout import Rollout
from diffquant.calibration.timing import Work
from diffquant.core.correction import Coefficients, NoiseEstimate, Proportional, Rows
from diffquant.core.model import full_precision, switched
from diffquant.host.denoiser import give_correction
from diffquant.host.scheduler import as_noise, build_scheduler, check_scheduler, from_noise, known_noise, noised_to, sampler_name
from diffquant.host.structure import PlannedLayer
from diffquant.methods.base import Figures, Pass, evaluating

RELATIVE, RIDGE = 0.5, 0.1  # what the relative error, and the distance of the factor from 1, weigh against the error
SMALLEST = 0.1  # values of the noise below it are left out of the relative error


class _Fitted(Pass):
    samples: int = Field(default=64, ge=2)
    batch_size: int = Field(default=32, ge=1)

    def check(self, model: nn.Module, rows: Sequence[PlannedLayer], data: Trajectory) -> None:
        """Raise `SpecError` for a scheduler that is not supported, `CalibrationError` where the recording cannot be replayed."""
        checked(model, data, trajectories=1)

    def work(self, blocks: int) -> Work:
        """A call for each step of every trajectory: a recording of 50 steps is assumed."""
        return Work(50.0 * self.samples)

    def _predictions(self, rollout: Rollout, run: Run, label: str) -> Iterator[tuple[Tensor, Tensor]]:
        for k in run.track(range(rollout.steps), label):
            yield predictions(rollout, k, min(self.samples, rollout.trajectories), self.batch_size)


@final
class RuntimeNoiseEstimate(_Fitted):
    """Estimate the mean error of the quantized model while it samples, every ``interval`` steps (None: five times a run).

    ``baseline: calibrated`` subtracts the same estimate on full precision, by timestep, since the model's own prediction is part of
    it (not in the paper). With ``none`` full precision is not needed and nothing is fitted.
    """

    interval: int | None = Field(default=None, ge=2)
    baseline: Literal["none", "calibrated"] = "none"

    def check(self, model: nn.Module, rows: Sequence[PlannedLayer], data: Trajectory) -> None:
        """Raise as the others do, of the replay only where a baseline is measured."""
        if self.baseline == "none":
            check_scheduler(build_scheduler(data.manifest))
        else:
            super().check(model, rows, data)

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Measure the baseline. Raises `SpecError` where the recorded scheduler is not supported."""
        if self.baseline == "none":
            check_scheduler(build_scheduler(data.manifest))
            return _attach(model, NoiseEstimate(interval=self.interval))
        rollout = checked(model, data)
        with evaluating(model), full_precision(model), torch.no_grad():
            estimates = [self._estimate(rollout, k) for k in run.track(range(rollout.steps), "baseline")]
        steps = steps_by_timestep(rollout)
        expected = tuple(estimates[k] for k in steps.values())
        scheduler = _sampler(rollout)
        fitted = NoiseEstimate(interval=self.interval, timesteps=tuple(steps), expected=expected, scheduler=scheduler)
        return _attach(model, fitted)

    def _estimate(self, rollout: Rollout, k: int) -> float:
        """The estimate at step `k` of the recorded trajectories; 0 at the last, where none is taken."""
        if k + 1 == rollout.steps:
            return 0.0
        trajectories = torch.arange(min(self.samples, rollout.trajectories))
        here, following = rollout.data.step_timesteps[k : k + 2]
        means = []
        for picked in trajectories.split(self.batch_size):
            chain = rollout.chain(picked, range(k, k + 1))
            known = known_noise(chain.recorded(1), k + 1, NoiseEstimate())
            noised = noised_to(rollout.scheduler, chain.recorded(1), known, here, following)
            noise = as_noise(rollout.scheduler, chain.predict(noised, 0, chain.state), noised, here)
            means.append((noise - known).flatten(1).mean(dim=1))
        return float(torch.cat(means).mean())

    def work(self, blocks: int) -> Work:
        """That of a fitted pass, where there is something to fit."""
        return super().work(blocks) if self.baseline == "calibrated" else Work()


@final
class FitProportional(_Fitted):
    """PTQD: at each timestep the slope of the error on the noise (not below 0), and mean and deviation of the rest, by channel."""

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Fit on recorded latents with all quantizers on. Raises `CalibrationError` where the recording cannot be replayed."""
        rollout = checked(model, data)
        slopes: list[list[float]] = []
        means: list[list[float]] = []
        deviations: list[list[float]] = []
        with evaluating(model), switched(model, True), torch.no_grad():
            for noise, predicted in self._predictions(rollout, run, "correlated noise"):
                error, centred = predicted - noise, noise - noise.mean(dim=1, keepdim=True)
                slope = ((error * centred).mean(dim=1) / centred.square().mean(dim=1).clamp(min=1e-12)).clamp(min=0)
                rest = error - slope[:, None] * noise
                slopes.append(slope.tolist())
                means.append(rest.mean(dim=1).tolist())
                deviations.append(rest.std(dim=1).tolist())
        steps = steps_by_timestep(rollout)
        fitted = Proportional(
            timesteps=tuple(steps),
            slope=_in_order(steps, slopes),
            mean=_in_order(steps, means),
            deviation=_in_order(steps, deviations),
        )
        return _attach(model, fitted)


@final
class FitCoefficients(_Fitted):
    """TAC: at each timestep the factor that brings the prediction nearest to the noise, and the latent's bias, by channel.

    The relative error weighs half, and factors are held near 1.
    """

    input_bias: bool = True

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Fit on recorded latents with all quantizers on. Raises `CalibrationError` where the recording cannot be replayed."""
        rollout = checked(model, data)
        factors: list[list[float]] = []
        with evaluating(model), switched(model, True), torch.no_grad():
            for noise, predicted in self._predictions(rollout, run, "coefficients"):
                factors.append(self.factor(noise, predicted).tolist())
            biases = self._biases(rollout, factors) if self.input_bias else None
        steps = steps_by_timestep(rollout)
        fitted = Coefficients(
            timesteps=tuple(steps),
            factor=_in_order(steps, factors),
            bias=None if biases is None else _in_order(steps, biases),
            scheduler="" if biases is None else _sampler(rollout),
        )
        return _attach(model, fitted)

    def factor(self, noise: Float[Tensor, "channels n"], predicted: Float[Tensor, "channels n"]) -> Float[Tensor, " channels"]:
        """The minimum of 0.5 mean (K g - e)^2 + 0.5 mean ((K g - e) / e)^2 + 0.1 (K - 1)^2, for each channel."""
        ratio = torch.where(noise.abs() >= SMALLEST, predicted / noise, 1.0)
        over = (1 - RELATIVE) * (predicted * noise).mean(dim=1) + RELATIVE * ratio.mean(dim=1) + RIDGE
        under = (1 - RELATIVE) * predicted.square().mean(dim=1) + RELATIVE * ratio.square().mean(dim=1) + RIDGE
        return over / under

    def _biases(self, rollout: Rollout, factors: list[list[float]]) -> list[list[float]]:
        """By step, how far the latents of the corrected quantized model lie from the recorded ones, on the mean."""
        trajectories = torch.arange(min(self.samples, rollout.trajectories))
        chain = rollout.chain(trajectories, range(rollout.steps))
        latent, state, biases = chain.recorded(0), chain.state, []
        for k in range(rollout.steps):
            difference = by_channel(latent - chain.recorded(k)).mean(dim=1)
            biases.append(difference.tolist())
            latent = latent - _shaped(difference, latent)
            timestep = rollout.data.step_timesteps[k]
            noise = as_noise(rollout.scheduler, chain.predict(latent, k, state), latent, timestep) * _shaped(factors[k], latent)
            latent, state = chain.step(from_noise(rollout.scheduler, noise, latent, timestep), latent, k, state)
        return biases


def checked(model: nn.Module, data: Trajectory, trajectories: int | None = None) -> Rollout:
    """A rollout that was verified, of a scheduler that is supported."""
    rollout = Rollout(model, data)
    check_scheduler(rollout.scheduler)
    rollout.verify(trajectories)
    return rollout


def predictions(rollout: Rollout, k: int, samples: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """The recorded and the quantized model's noise at step `k` on recorded latents, each ``[channels, n]``."""
    noises: list[Tensor] = []
    predicted: list[Tensor] = []
    for picked in torch.arange(samples).split(batch_size):
        chain, step = rollout.chain(picked, range(k, k + 1)), rollout.data.step(picked, k)
        latent, timestep = chain.recorded(0), float(step.timestep)
        output = chain.predict(latent, 0, chain.state)
        for values, into in ((step.model_output.to(latent), noises), (output, predicted)):
            into.append(by_channel(as_noise(rollout.scheduler, values, latent, timestep).float()))
    return torch.cat(noises, dim=1), torch.cat(predicted, dim=1)


def by_channel(values: Float[Tensor, "n channels ..."]) -> Float[Tensor, "channels m"]:
    """All values of each channel."""
    return values.transpose(0, 1).flatten(1)


def steps_by_timestep(rollout: Rollout) -> dict[float, int]:
    """The step of each recorded timestep, noisy first; the later one where a sampler, as PNDM, takes a timestep twice."""
    steps = {timestep: k for k, timestep in enumerate(rollout.data.step_timesteps)}
    return dict(sorted(steps.items(), reverse=True))


def _in_order(steps: dict[float, int], rows: list[list[float]]) -> Rows:
    return tuple(tuple(rows[k]) for k in steps.values())


def _sampler(rollout: Rollout) -> str:
    options = rollout.data.step(torch.zeros(1, dtype=torch.long), 0).options
    return sampler_name(rollout.scheduler, options.get("eta", 0.0))


def _attach(model: nn.Module, correction: NoiseEstimate | Proportional | Coefficients) -> Figures:
    give_correction(model, correction)
    return {"correction": correction.model_dump(mode="json")}


def _shaped(values: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(values, device=like.device, dtype=like.dtype).view(1, -1, *[1] * (like.dim() - 2))

"""Corrections while sampling: a model's correction, applied where its pipeline calls ``scheduler.step``.

A checkpoint keeps its correction in the denoiser's config. The hooks of a loaded denoiser do not see the scheduler, and pipelines
may rebuild theirs, so `attach` makes the connection once the pipeline stands; `load` does it by itself. A denoiser that is sampled
without its correction warns once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffquant.core.correction import Coefficients, NoiseEstimate, Proportional, row_at
from diffquant.core.model import correction_of, ensured_state, state_of
from diffquant.errors import SpecError
from diffquant.host.guidance import combination, leading_channels
from diffquant.host.pipeline import Host, Pipeline, predicted
from diffquant.host.scheduler import (
    as_noise,
    check_scheduler,
    from_noise,
    known_noise,
    noise_scaled,
    noised_to,
    restore,
    sampler_name,
    signal_level,
    snapshot,
)


def attach(pipe: Pipeline, correction: NoiseEstimate | Proportional | Coefficients | None = None) -> Attachment:
    """Correct what `pipe` samples from now on, by `correction` or its denoiser's own; one that was attached before is replaced.

    Raises `SpecError` where the denoiser has none, or for a scheduler that is not supported, by name.
    """
    denoiser = Host(pipe).denoiser
    correction = correction or correction_of(denoiser)
    if correction is None:
        raise SpecError(f"{type(denoiser).__name__}: has no correction; a pass such as RuntimeNoiseEstimate gives it one")
    detach(pipe)
    return Attachment(denoiser, pipe.scheduler, correction)


def detach(pipe: Pipeline) -> None:
    """Sample without a correction again."""
    attachment = attachment_of(pipe)
    if attachment is not None:
        attachment.detach()


def attachment_of(pipe: Pipeline) -> Attachment | None:
    """What `attach` made for this pipeline's denoiser, if anything."""
    state = state_of(Host(pipe).denoiser)
    return None if state is None else state.attachment


class Attachment:
    """A correction at work: it stands in for ``step`` and ``set_timesteps`` of one scheduler, and watches the denoiser.

    ``extra_calls`` counts the denoiser calls that the correction has added.
    """

    def __init__(self, denoiser: nn.Module, scheduler: Any, correction: NoiseEstimate | Proportional | Coefficients) -> None:
        check_scheduler(scheduler)
        self.denoiser, self.correction, self.extra_calls = denoiser, correction, 0
        self._estimating = False
        self._handle = denoiser.register_forward_hook(self._see, with_kwargs=True)
        self._take(scheduler)
        ensured_state(denoiser).attachment = self

    def detach(self) -> None:
        """Put everything back."""
        self._give_back()
        self._handle.remove()
        ensured_state(self.denoiser).attachment = None

    @contextmanager
    def moved_to(self, scheduler: Any) -> Iterator[None]:
        """Work on another scheduler while the block runs."""
        before = self.scheduler
        if scheduler is before:
            yield
            return
        check_scheduler(scheduler)
        self._give_back()
        self._take(scheduler)
        try:
            yield
        finally:
            self._give_back()
            self._take(before)

    def _take(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._original = {name: getattr(scheduler, name) for name in ("step", "set_timesteps")}
        scheduler.step = functools.wraps(self._original["step"])(_Standin(self._step))
        scheduler.set_timesteps = functools.wraps(self._original["set_timesteps"])(_Standin(self._begin))
        self._reset()

    def _give_back(self) -> None:
        for name in self._original:
            vars(self.scheduler).pop(name, None)

    def _begin(self, *arguments: Any, **keywords: Any) -> Any:
        """A run begins: nothing of the last one counts."""
        result = self._original["set_timesteps"](*arguments, **keywords)
        self._reset()
        return result

    def _reset(self) -> None:
        self._number = 0
        self._held: Tensor | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any], Tensor] | None = None

    def _see(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if not self._estimating:
            self._call = arguments, keywords, predicted(module, output)

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """The scheduler's step on the corrected prediction."""
        self._number += 1
        if isinstance(self.correction, NoiseEstimate):
            held = self._refreshed(self.correction, model_output, timestep, sample, arguments, keywords)
            if held is not None:
                model_output = self._changed(model_output, sample, float(timestep), lambda noise: noise - held)
            return self._original["step"](model_output, timestep, sample, *arguments, **keywords)
        if isinstance(self.correction, Proportional):
            return self._proportional(self.correction, model_output, timestep, sample, arguments, keywords)
        return self._coefficients(self.correction, model_output, timestep, sample, arguments, keywords)

    def _changed(self, model_output: Tensor, sample: Tensor, timestep: float, change: Any) -> Tensor:
        """The prediction with its noise changed; channels beyond the latent's (a variance) stay."""
        leading = leading_channels(model_output, sample)
        noise = change(as_noise(self.scheduler, leading, sample, timestep))
        changed = from_noise(self.scheduler, noise, sample, timestep).to(model_output.dtype)
        return torch.cat([changed, model_output[:, sample.shape[1] :]], dim=1)

    # ---- QNCD

    def _refreshed(
        self, correction: NoiseEstimate, output: Tensor, timestep: Any, sample: Tensor, arguments: tuple[Any, ...], keywords: Any
    ) -> Tensor | None:
        """The estimate that counts at this step, if any."""
        if self._number - 1 in correction.refreshes(len(self.scheduler.timesteps)):
            self._held = self._estimate(correction, output, timestep, sample, arguments, keywords)
        elif not correction.hold:
            self._held = None
        return self._held

    def _estimate(
        self,
        correction: NoiseEstimate,
        output: Tensor,
        timestep: Any,
        sample: Tensor,
        arguments: tuple[Any, ...],
        keywords: Any,
    ) -> Tensor:
        """What the model gets wrong on the mean when the step's result is noised back to `timestep` with known noise."""
        state = snapshot(self.scheduler)
        with _generators_kept(keywords.get("generator"), sample.device):
            result = self._original["step"](output, timestep, sample, *arguments, **keywords)
        after = result.prev_sample if hasattr(result, "prev_sample") else result[0]
        restore(self.scheduler, state)
        known = known_noise(sample, self._number, correction)
        noised = noised_to(self.scheduler, after, known, timestep, self.scheduler.timesteps[self._number])
        wrong = as_noise(self.scheduler, self._predict(noised, timestep, output), noised, float(timestep)) - known
        self.extra_calls += 1
        mean = wrong.mean(dim=tuple(range(0 if correction.scope == "batch" else 1, wrong.dim())), keepdim=True)
        if not correction.expected:
            return mean
        self._check_fitted_here(correction.scheduler, keywords, "its baseline was measured", "baseline: none")
        return mean - correction.expected[row_at(correction.timesteps, float(timestep))]

    def _check_fitted_here(self, scheduler: str, keywords: Any, what: str, instead: str) -> None:
        """Raises `SpecError` unless `scheduler` names the present sampler."""
        here = sampler_name(self.scheduler, keywords.get("eta", 0.0))
        if here != scheduler:
            raise SpecError(f"correction: {what} on {scheduler}; this is {here}; fit it with {instead}")

    def _predict(self, latent: Tensor, timestep: Any, model_output: Tensor) -> Tensor:
        """What would reach the scheduler for another latent: the last call of the denoiser again, its halves combined as they were.

        Raises `SpecError` where the last call does not give `model_output`.
        """
        if self._call is None:
            raise SpecError("correction: scheduler.step came before any call of the denoiser; attach it to this pipeline")
        arguments, keywords, output = self._call
        output, wanted = leading_channels(output, latent), leading_channels(model_output, latent)
        combine = combination(output, wanted)
        name = next(iter(keywords)) if not arguments else None
        given = arguments[0] if name is None else keywords[name]
        scaled = self.scheduler.scale_model_input(latent, timestep).to(given.dtype)
        doubled = torch.cat([scaled] * (len(given) // len(scaled)))
        doubled = torch.cat([doubled, given[:, latent.shape[1] :]], dim=1)
        self._estimating = True
        try:
            with torch.no_grad():
                if name is None:
                    again = self.denoiser(doubled, *arguments[1:], **keywords)
                else:
                    again = self.denoiser(**(keywords | {name: doubled}))
        finally:
            self._estimating = False
        return combine(leading_channels(predicted(self.denoiser, again), latent))

    # ---- PTQD and TAC

    def _proportional(
        self, correction: Proportional, output: Tensor, timestep: Any, sample: Tensor, arguments: tuple[Any, ...], keywords: Any
    ) -> Any:
        row = row_at(correction.timesteps, float(timestep))
        slope, mean, deviation = (_shaped(rows[row], sample) for rows in (correction.slope, correction.mean, correction.deviation))
        corrected = self._changed(output, sample, float(timestep), lambda noise: (noise - mean) / (1 + slope))
        factor = self._noise_left(float(timestep), deviation / (1 + slope), float(keywords.get("eta", 0.0)))
        with noise_scaled(self.scheduler, factor):
            return self._original["step"](corrected, timestep, sample, *arguments, **keywords)

    def _noise_left(self, timestep: float, deviation: Tensor, eta: float) -> Tensor | None:
        """By what the sampler's own noise is multiplied so that with the residual's it has the variance it should."""
        scheduler, kind = self.scheduler, type(self.scheduler).__name__
        if kind not in ("DDIMScheduler", "DDPMScheduler") or (kind == "DDIMScheduler" and eta == 0):
            return None
        level = signal_level(scheduler, timestep)
        before = int(timestep) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        if kind == "DDIMScheduler":
            reached = signal_level(scheduler, before) if before >= 0 else float(scheduler.final_alpha_cumprod)
            variance = eta**2 * float(scheduler._get_variance(int(timestep), before))
            weight = max(1 - reached - variance, 0) ** 0.5 - (reached * (1 - level) / level) ** 0.5
        else:
            before = int(scheduler.previous_timestep(int(timestep)))
            reached = signal_level(scheduler, before) if before >= 0 else 1.0
            alpha = level / reached
            variance = (1 - reached) / (1 - level) * (1 - alpha)
            weight = (1 - alpha) / (alpha * (1 - level)) ** 0.5
        return None if variance <= 0 else (1 - weight**2 * deviation**2 / variance).clamp(min=0).sqrt()

    def _coefficients(
        self, correction: Coefficients, output: Tensor, timestep: Any, sample: Tensor, arguments: tuple[Any, ...], keywords: Any
    ) -> Any:
        if correction.bias is not None:
            self._check_fitted_here(correction.scheduler, keywords, "its input bias was fitted", "input_bias: false")
        factor = _shaped(correction.factor[row_at(correction.timesteps, float(timestep))], sample)
        corrected = self._changed(output, sample, float(timestep), lambda noise: noise * factor)
        result = self._original["step"](corrected, timestep, sample, *arguments, **keywords)
        if correction.bias is None or self._number >= len(self.scheduler.timesteps):
            return result
        following = float(self.scheduler.timesteps[self._number])
        bias = _shaped(correction.bias[row_at(correction.timesteps, following)], sample)
        if isinstance(result, tuple):
            return (result[0] - bias, *result[1:])
        result.prev_sample = result.prev_sample - bias
        return result


class _Standin:
    """A bound method in place of a scheduler's; unlike a closure it follows its object through `copy.deepcopy`."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.method(*arguments, **keywords)


@contextmanager
def _generators_kept(generator: torch.Generator | list[torch.Generator] | None, device: torch.device) -> Iterator[None]:
    """Whatever the block draws, the generators (or torch's own) are as before afterwards."""
    given = generator if isinstance(generator, list) else [generator] if generator is not None else []
    states = [each.get_state() for each in given]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    for each, state in zip(given, states, strict=True):
        each.set_state(state)


def _shaped(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, *[1] * (like.dim() - 2))

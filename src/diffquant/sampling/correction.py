"""Corrections while sampling: a model's correction, applied where its pipeline calls ``scheduler.step``.

A checkpoint holds its correction in the denoiser's config. A denoiser does not know its scheduler, so `attach` connects the two;
`load` does it by itself. A denoiser that is sampled without its correction warns once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """Correct what `pipe` samples from now on, by `correction` or its denoiser's own, in place of one attached before.

    Raises `SpecError` if there is no correction, or its scheduler is not supported.
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
    """The attachment of this pipeline's denoiser, if it has one."""
    state = state_of(Host(pipe).denoiser)
    return None if state is None else state.attachment


@dataclass(frozen=True)
class _StepCall:
    """The arguments of one call of ``scheduler.step``."""

    output: Tensor
    timestep: Any
    sample: Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Attachment:
    """A correction that replaces ``step`` and ``set_timesteps`` of one scheduler, and watches the denoiser.

    ``extra_calls``: denoiser calls that the correction has added.
    """

    def __init__(self, denoiser: nn.Module, scheduler: Any, correction: NoiseEstimate | Proportional | Coefficients) -> None:
        check_scheduler(scheduler)
        self.denoiser, self.correction, self.extra_calls = denoiser, correction, 0
        self._estimating = False
        self._handle = denoiser.register_forward_hook(self._record_call, with_kwargs=True)
        self._replace_methods(scheduler)
        ensured_state(denoiser).attachment = self

    def detach(self) -> None:
        """Put everything back."""
        self._restore_methods()
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
        self._restore_methods()
        self._replace_methods(scheduler)
        try:
            yield
        finally:
            self._restore_methods()
            self._replace_methods(before)

    def _replace_methods(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._original = {name: getattr(scheduler, name) for name in ("step", "set_timesteps")}
        scheduler.step = functools.wraps(self._original["step"])(_Standin(self._step))
        scheduler.set_timesteps = functools.wraps(self._original["set_timesteps"])(_Standin(self._begin))
        self._reset()

    def _restore_methods(self) -> None:
        for name in self._original:
            vars(self.scheduler).pop(name, None)

    def _begin(self, *arguments: Any, **keywords: Any) -> Any:
        """``set_timesteps`` begins a run: forget the last one."""
        result = self._original["set_timesteps"](*arguments, **keywords)
        self._reset()
        return result

    def _reset(self) -> None:
        self._number = 0
        self._held: Tensor | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any], Tensor] | None = None

    def _record_call(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if not self._estimating:
            self._call = arguments, keywords, predicted(module, output)

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """The scheduler's step on the corrected prediction."""
        self._number += 1
        call = _StepCall(model_output, timestep, sample, arguments, keywords)
        if isinstance(self.correction, NoiseEstimate):
            return self._with_estimate(self.correction, call)
        if isinstance(self.correction, Proportional):
            return self._proportional(self.correction, call)
        return self._coefficients(self.correction, call)

    def _uncorrected(self, call: _StepCall, model_output: Tensor) -> Any:
        """The scheduler's own step on a prediction."""
        return self._original["step"](model_output, call.timestep, call.sample, *call.arguments, **call.keywords)

    def _changed(self, call: _StepCall, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The prediction with its noise changed; channels beyond the latent's (a variance) stay."""
        output, sample, time = call.output, call.sample, float(call.timestep)
        noise = change(as_noise(self.scheduler, leading_channels(output, sample), sample, time))
        changed = from_noise(self.scheduler, noise, sample, time).to(output.dtype)
        return torch.cat([changed, output[:, sample.shape[1] :]], dim=1)

    # ---- QNCD

    def _with_estimate(self, correction: NoiseEstimate, call: _StepCall) -> Any:
        """The step on a prediction less the estimate that holds at it, if any."""
        if self._number - 1 in correction.refreshes(len(self.scheduler.timesteps)):
            self._held = self._estimate(correction, call)
        elif not correction.hold:
            self._held = None
        held = self._held
        return self._uncorrected(call, call.output if held is None else self._changed(call, lambda noise: noise - held))

    def _estimate(self, correction: NoiseEstimate, call: _StepCall) -> Tensor:
        """The model's mean error when the step's result is noised back to its timestep with known noise."""
        sample, time = call.sample, float(call.timestep)
        state = snapshot(self.scheduler)
        with _generators_restored(call.keywords.get("generator"), sample.device):
            result = self._uncorrected(call, call.output)
        after = result.prev_sample if hasattr(result, "prev_sample") else result[0]
        restore(self.scheduler, state)
        known = known_noise(sample, self._number, correction)
        noised = noised_to(self.scheduler, after, known, call.timestep, self.scheduler.timesteps[self._number])
        error = as_noise(self.scheduler, self._predict(noised, call.timestep, call.output), noised, time) - known
        self.extra_calls += 1
        mean = error.mean(dim=tuple(range(0 if correction.scope == "batch" else 1, error.dim())), keepdim=True)
        if not correction.expected:
            return mean
        self._check_scheduler(correction.scheduler, call, "its baseline was measured", "baseline: none")
        return mean - correction.expected[row_at(correction.timesteps, time)]

    def _check_scheduler(self, scheduler: str, call: _StepCall, what: str, instead: str) -> None:
        """Raises `SpecError` unless `scheduler` names the present sampler."""
        here = sampler_name(self.scheduler, call.keywords.get("eta", 0.0))
        if here != scheduler:
            raise SpecError(f"correction: {what} on {scheduler}; this is {here}; fit it with {instead}")

    def _predict(self, latent: Tensor, timestep: Any, model_output: Tensor) -> Tensor:
        """The prediction for another latent: the denoiser's last call again, its halves combined as they were.

        Raises `SpecError` where the last call does not give `model_output`.
        """
        if self._call is None:
            raise SpecError("correction: scheduler.step came before any call of the denoiser; attach it to this pipeline")
        arguments, keywords, output = self._call
        combine = combination(leading_channels(output, latent), leading_channels(model_output, latent))
        name = None if arguments else next(iter(keywords))
        inputs = arguments[0] if name is None else keywords[name]
        scaled = self.scheduler.scale_model_input(latent, timestep).to(inputs.dtype)
        doubled = torch.cat([scaled] * (len(inputs) // len(scaled)))
        doubled = torch.cat([doubled, inputs[:, latent.shape[1] :]], dim=1)
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

    def _proportional(self, correction: Proportional, call: _StepCall) -> Any:
        time = float(call.timestep)
        row = row_at(correction.timesteps, time)
        sets = (correction.slope, correction.mean, correction.deviation)
        slope, mean, deviation = (_shaped(values[row], call.sample) for values in sets)
        corrected = self._changed(call, lambda noise: (noise - mean) / (1 + slope))
        factor = self._noise_left(time, deviation / (1 + slope), float(call.keywords.get("eta", 0.0)))
        with noise_scaled(self.scheduler, factor):
            return self._uncorrected(call, corrected)

    def _noise_left(self, timestep: float, deviation: Tensor, eta: float) -> Tensor | None:
        """The factor of the sampler's own noise with which its variance and the residual's add up to the sampler's."""
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

    def _coefficients(self, correction: Coefficients, call: _StepCall) -> Any:
        if correction.bias is not None:
            self._check_scheduler(correction.scheduler, call, "its input bias was fitted", "input_bias: false")
        factor = _shaped(correction.factor[row_at(correction.timesteps, float(call.timestep))], call.sample)
        result = self._uncorrected(call, self._changed(call, lambda noise: noise * factor))
        if correction.bias is None or self._number >= len(self.scheduler.timesteps):
            return result
        following = float(self.scheduler.timesteps[self._number])
        bias = _shaped(correction.bias[row_at(correction.timesteps, following)], call.sample)
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
def _generators_restored(generator: torch.Generator | list[torch.Generator] | None, device: torch.device) -> Iterator[None]:
    """Restore the state of the generators, and of torch's own, after the block."""
    generators = generator if isinstance(generator, list) else [generator] if generator is not None else []
    states = [each.get_state() for each in generators]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    for each, state in zip(generators, states, strict=True):
        each.set_state(state)


def _shaped(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, *[1] * (like.dim() - 2))

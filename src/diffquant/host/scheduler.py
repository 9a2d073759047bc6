"""Schedulers of diffusers: built, saved and restored, the noise that they draw, predictions converted to noise and back.

A multistep solver's state holds a history of latents or predictions; of everything else in a state nothing is assumed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor

from diffquant.core.correction import NoiseEstimate
from diffquant.errors import CalibrationError, SpecError

SCHEDULERS: dict[str, type] = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "dpm-solver++": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
VARIANCE_PRESERVING = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
SIGMA_SPACE = ("EulerDiscreteScheduler",)

State = Mapping[str, Any]  # the attributes of a scheduler; lists are copies
Key = tuple[str, int | None]  # a tensor of a state: its attribute, and its place in it where that is a list


def build_scheduler(manifest: Mapping[str, Any]) -> Any:
    """The scheduler of a recording, from its manifest. Raises `CalibrationError` where it is not one of diffusers'."""
    described = manifest["scheduler"]
    kind = getattr(diffusers, described["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        where = f"{manifest['pipeline']} with {described['class']}"
        raise CalibrationError(f"{where}: the scheduler is not one of diffusers'; its steps cannot be replayed")
    scheduler: Any = kind.from_config(described["config"])  # type: ignore[attr-defined]
    return scheduler


def of_class(scheduler: Any, kind: Any) -> Any:
    """The scheduler, or one of class `kind` with its configuration."""
    return scheduler if type(scheduler) is kind else kind.from_config(scheduler.config)


def is_flow_matching(scheduler: Any) -> bool:
    """Whether models of the scheduler predict a velocity, which others would take for noise."""
    return "FlowMatch" in type(scheduler).__name__


def clipping(scheduler: Any, clip_sample: bool) -> Any:
    """The scheduler, or one like it that clips the sample it predicts, or does not. `CalibrationError` where it cannot."""
    can = _can_clip(scheduler)
    if not can and clip_sample:
        raise CalibrationError(f"clip_sample: is true; {type(scheduler).__name__} has no such option")
    if not can or scheduler.config.clip_sample == clip_sample:
        return scheduler
    return type(scheduler).from_config(scheduler.config, clip_sample=clip_sample)


def _can_clip(scheduler: Any) -> bool:
    """Whether its class has the option; a configuration also holds the options of classes that it was converted from."""
    return "clip_sample" in inspect.signature(type(scheduler).__init__).parameters


def scale_model_input(scheduler: Any, sample: Tensor, timestep: Tensor) -> Tensor:
    """What the model is given for `sample`; flow-matching schedulers scale nothing."""
    scale = getattr(scheduler, "scale_model_input", None)
    scaled: Tensor = sample if scale is None else scale(sample, timestep)
    return scaled


def snapshot(scheduler: Any) -> State:
    """The scheduler's state: its attributes, lists copied."""
    return _lists_copied(vars(scheduler))


def _lists_copied(state: State) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}


def restore(scheduler: Any, state: State) -> None:
    """Restore a `snapshot`; the scheduler may go on changing its lists, and the latents in it (PNDM adds to one in place)."""
    vars(scheduler).clear()
    vars(scheduler).update({name: _own(value) for name, value in state.items()})


def _own(value: Any) -> Any:
    """A copy of a list and of what is shaped like a batch; a copied tensor keeps its graph."""
    if isinstance(value, list):
        return [_own(member) for member in value]
    return value.clone() if isinstance(value, Tensor) and value.dim() > 1 else value


def history(state: State, shape: torch.Size) -> dict[Key, Tensor]:
    """The tensors of a state that have the shape of the latent: what a multistep solver remembers of earlier steps."""
    entries: list[tuple[Key, Any]] = []
    for name, value in state.items():
        entries += [((name, j), member) for j, member in enumerate(value)] if isinstance(value, list) else [((name, None), value)]
    return {
        key: value for key, value in entries if isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
    }


def with_history(state: State, tensors: Mapping[Key, Tensor]) -> State:
    """The state with some of its `history` replaced."""
    changed = _lists_copied(state)
    for (name, place), tensor in tensors.items():
        if place is None:
            changed[name] = tensor
        else:
            changed[name][place] = tensor
    return changed


@contextmanager
def noise_is(scheduler: Any, noise: Tensor | float) -> Iterator[list[tuple[int, ...]]]:
    """While the block runs, the scheduler's own draws of noise return `noise`; the shapes drawn are listed."""
    draws: list[tuple[int, ...]] = []

    def drawn(shape: tuple[int, ...], generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
        draws.append(tuple(shape))
        return torch.zeros(tuple(shape), device=device, dtype=dtype) + torch.as_tensor(noise, device=device, dtype=dtype)

    with _drawing(scheduler, lambda original: drawn):
        yield draws


@contextmanager
def noise_scaled(scheduler: Any, factor: Tensor | None) -> Iterator[None]:
    """While the block runs, noise that the scheduler draws is multiplied by `factor`; the mean of its step does not change."""
    if factor is None:
        yield
        return
    with _drawing(scheduler, lambda original: lambda *arguments, **keywords: original(*arguments, **keywords) * factor):
        yield


@contextmanager
def _drawing(scheduler: Any, changed: Callable[[Any], Any]) -> Iterator[None]:
    """While the block runs, the scheduler's module draws noise with what `changed` makes of its function for that."""
    module = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)
    if original is None:
        yield
        return
    module.randn_tensor = changed(original)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.randn_tensor = original  # type: ignore[attr-defined]


# ---- what a prediction means


def check_scheduler(scheduler: Any) -> None:
    """Raises `SpecError`, naming it, for a scheduler whose latents are not understood here."""
    name = type(scheduler).__name__
    if name not in VARIANCE_PRESERVING + SIGMA_SPACE:
        allowed = ", ".join(VARIANCE_PRESERVING + SIGMA_SPACE)
        raise SpecError(f"correction: {name} is not supported; sample with one of {allowed}, or without the correction")
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction", "sample") or (name in SIGMA_SPACE and kind != "epsilon"):
        raise SpecError(f"correction: {name} with prediction_type {kind!r} is not supported")


def sampler_name(scheduler: Any, eta: float) -> str:
    """What a value that holds for one sampler only was fitted on: class, steps asked for, DDIM's noise, clipping."""
    parts = [type(scheduler).__name__, f"{scheduler.num_inference_steps} steps"]
    if eta:
        parts.append(f"eta {eta:g}")
    if _can_clip(scheduler) and scheduler.config.clip_sample:
        parts.append("clipped")
    return ", ".join(parts)


def signal_level(scheduler: Any, timestep: float) -> float:
    """The cumulative product of alphas at `timestep`, between 0 (noise) and 1."""
    return float(scheduler.alphas_cumprod[int(timestep)])


def as_noise(scheduler: Any, output: Tensor, sample: Tensor, timestep: float) -> Tensor:
    """The noise that a prediction means, ``[n, channels, ...]``, for a latent `sample` at `timestep`."""
    level, kind = signal_level(scheduler, timestep), scheduler.config.prediction_type
    if kind == "v_prediction":
        output = level**0.5 * output + (1 - level) ** 0.5 * sample
    elif kind == "sample":
        output = (sample - level**0.5 * output) / (1 - level) ** 0.5
    return output


def from_noise(scheduler: Any, noise: Tensor, sample: Tensor, timestep: float) -> Tensor:
    """The prediction that means `noise`: the inverse of `as_noise`."""
    level, kind = signal_level(scheduler, timestep), scheduler.config.prediction_type
    if kind == "v_prediction":
        noise = (noise - (1 - level) ** 0.5 * sample) / level**0.5
    elif kind == "sample":
        noise = (sample - (1 - level) ** 0.5 * noise) / level**0.5
    return noise


def known_noise(after: Tensor, step: int, correction: NoiseEstimate) -> Float[Tensor, "1 channels ..."]:
    """The noise of an estimate at `step` (from 1): one for all images, so that none depends on its place among them."""
    generator = torch.Generator().manual_seed(correction.seed * 100_003 + step)
    known = torch.randn(after.shape[1:], generator=generator)[None].to(after)
    return known - known.mean() if correction.zero_mean else known


def noised_to(scheduler: Any, after: Tensor, noise: Tensor, timestep: Any, following: Any) -> Tensor:
    """`after`, a latent at timestep `following`, with as much noise more as belongs to `timestep`."""
    if type(scheduler).__name__ in SIGMA_SPACE:
        here, there = (scheduler.sigmas[scheduler.index_for_timestep(t)] for t in (timestep, following))
        return after + noise * float((here**2 - there**2).clamp(min=0).sqrt())
    ratio = signal_level(scheduler, float(timestep)) / signal_level(scheduler, float(following))
    noised: Tensor = after * ratio**0.5 + noise * (1 - ratio) ** 0.5
    return noised

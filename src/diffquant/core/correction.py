"""Corrections of the predicted noise while sampling, as values; noise and levels of a scheduler's latents.

Applied they are by `runtime.correction`, on ``scheduler.step``, and fitted by `methods.corrections`. All of them work on the guided
prediction as noise, whatever the model predicts. Fitted ones hold a row per recorded timestep; a timestep takes the row of its
interval, as parameter sets do.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Annotated, Any, Literal, final

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from diffquant.core.clock import StepClock
from diffquant.core.spec import SpecError

VARIANCE_PRESERVING = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
SIGMA_SPACE = ("EulerDiscreteScheduler",)
ATTACHED = "attached_correction"  # attribute of a denoiser whose correction is applied

Rows = tuple[tuple[float, ...], ...]  # [timesteps][channels]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@final
class NoiseEstimate(_Value):
    """Ask the quantized model for noise that is known, and subtract what it gets wrong on the mean.

    Every ``interval`` steps (None: five times a run), first at half of that plus 2; ``hold`` keeps the estimate until the next one.
    ``expected`` is what a right model is found to get wrong, by timestep, on the sampler it was measured with (``scheduler``, as by
    `sampler_name`); not counted.
    """

    kind: Literal["noise-estimate"] = "noise-estimate"
    timesteps: tuple[float, ...] = ()
    expected: tuple[float, ...] = ()
    scheduler: str = ""
    interval: int | None = Field(default=None, ge=2)
    hold: bool = True
    scope: Literal["image", "batch"] = "image"
    zero_mean: bool = True
    seed: int = Field(default=0, ge=0)

    def refreshes(self, steps: int) -> range:
        """The steps of a run of `steps`, from 0, at which the noise is estimated; never the last."""
        interval = self.interval or max(2, steps // 5)
        return range(interval // 2 + 2, steps - 1, interval)


@final
class Proportional(_Value):
    """PTQD: the prediction is ``(1 + slope) * noise + mean + residual``; by timestep and channel."""

    kind: Literal["proportional"] = "proportional"
    timesteps: tuple[float, ...]
    slope: Rows
    mean: Rows
    deviation: Rows


@final
class Coefficients(_Value):
    """TAC: ``factor`` times the prediction; ``bias`` is subtracted from the latent before each timestep.

    A bias holds for the sampler it was fitted on (``scheduler``, as by `sampler_name`); without one that is empty.
    """

    kind: Literal["coefficients"] = "coefficients"
    timesteps: tuple[float, ...]
    factor: Rows
    bias: Rows | None = None
    scheduler: str = ""


Correction = Annotated[NoiseEstimate | Proportional | Coefficients, Field(discriminator="kind")]


class Stored(_Value):
    """A correction as it stands in JSON."""

    correction: Correction


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
    takes = inspect.signature(type(scheduler).__init__).parameters  # a configuration keeps what other classes had
    if "clip_sample" in takes and scheduler.config.clip_sample:
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


def row_at(timesteps: tuple[float, ...], timestep: float) -> int:
    """The row of `timestep`: that of the interval it lies in."""
    clock = StepClock(timesteps)
    clock.set_timestep(timestep)
    assert isinstance(clock.interval, int)
    return clock.interval


def give(model: nn.Module, correction: NoiseEstimate | Proportional | Coefficients) -> None:
    """Give `model` a correction, which is saved with it."""
    model.correction = correction  # type: ignore[assignment]


def warn_unless_attached(model: nn.Module, arguments: Any) -> None:
    """Forward pre-hook of a finished model: warns once when it is called and nothing applies its correction."""
    if getattr(model, ATTACHED, None) is None and not hasattr(model, "correction_warned"):
        model.correction_warned = True  # type: ignore[assignment]
        warnings.warn(
            f"{type(model).__name__}: has a sampling-time correction that nothing applies; call diffquant.attach(pipe)",
            stacklevel=2,
        )

"""Corrections of the predicted noise while sampling, as values.

`sampling.correction` applies them on ``scheduler.step``, `methods.noise_correction` fits them. All of them work on the guided
prediction as noise, whatever the model predicts. Fitted ones hold a row per recorded timestep; a timestep takes the row of its
interval, as parameter sets do.
"""

from __future__ import annotations

from typing import Annotated, Literal, final

from pydantic import Field

from diffquant.core.clock import StepClock
from diffquant.core.spec import Value

Rows = tuple[tuple[float, ...], ...]  # [timesteps][channels]


@final
class NoiseEstimate(Value):
    """Subtracts the mean error of the quantized model, which is estimated by predictions of known noise while sampling.

    Every ``interval`` steps (None: five times a run), first at half of that plus 2; with ``hold`` an estimate holds until the next.
    ``expected``: bias of the estimate on the full-precision model, per timestep, on the sampler it was measured with
    (``scheduler``, as by `sampler_name`); it is subtracted.
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
class Proportional(Value):
    """PTQD: the prediction is ``(1 + slope) * noise + mean + residual``; by timestep and channel."""

    kind: Literal["proportional"] = "proportional"
    timesteps: tuple[float, ...]
    slope: Rows
    mean: Rows
    deviation: Rows


@final
class Coefficients(Value):
    """TAC: ``factor`` times the prediction; ``bias`` is subtracted from the latent before each timestep.

    A bias holds for the sampler it was fitted on (``scheduler``, as by `sampler_name`); without one that is empty.
    """

    kind: Literal["coefficients"] = "coefficients"
    timesteps: tuple[float, ...]
    factor: Rows
    bias: Rows | None = None
    scheduler: str = ""


Correction = Annotated[NoiseEstimate | Proportional | Coefficients, Field(discriminator="kind")]


class Stored(Value):
    """A correction as it stands in JSON."""

    correction: Correction


def row_at(timesteps: tuple[float, ...], timestep: float) -> int:
    """The row of `timestep`: that of the interval it lies in."""
    clock = StepClock(timesteps)
    clock.set_timestep(timestep)
    assert isinstance(clock.interval, int)
    return clock.interval

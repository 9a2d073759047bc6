"""How an error of the denoiser's output changes the latent after the step, to first order.

A sampler multiplies an error of the prediction by a factor that differs between steps; at the last steps, where errors are largest,
it is nearly zero. The factor is the gradient of the scheduler's own step at the recorded prediction.
*Chosen here*; no source for it.
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffquant.calibration.recording import Trajectory
from diffquant.calibration.rollout import Rollout
from diffquant.core.model import device_of
from diffquant.errors import CalibrationError, SpecError


@final
class StepGain:
    """Derivatives of the next latent with respect to the recorded outputs, value by value; their mean square over the steps is 1.

    Values are taken to be independent in a scheduler's step, and effects of an output on a multistep solver's later steps are left
    out. Each half of a guided call has its share of the guided prediction. Raises `CalibrationError` where the recording
    cannot be replayed.
    """

    def __init__(self, model: nn.Module, data: Trajectory) -> None:
        self._rollout = Rollout(model, data)
        self._call, self._trajectory, self._half = data.call_of, data.trajectory_of, data.half_of
        self._gains: dict[int, Tensor] = {}
        self._unit = 1.0
        first = (self._trajectory == 0).nonzero()[:, 0]
        self._unit = float(self.of(first).square().mean().sqrt())
        self._gains.clear()

    def of(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n ..."]:
        """Of the recorded outputs `rows`, in the shape of the latents."""
        for row in rows.tolist():
            if row not in self._gains:
                self._gains[row] = self._derivative(row) / self._unit
        return torch.stack([self._gains[row] for row in rows.tolist()])

    def sizes(self, rows: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Root mean square over the values of each."""
        return torch.cat([self.of(some).square().flatten(1).mean(dim=1).sqrt() for some in rows.split(64)])

    def _derivative(self, row: int) -> Tensor:
        k, half = int(self._call[row]), int(self._half[row])
        chain = self._rollout.chain(self._trajectory[row : row + 1], range(k, k + 1))
        output = self._rollout.data.step(chain.trajectories, k).model_output.to(device_of(self._rollout.model))
        output.requires_grad_(True)
        with torch.enable_grad():
            latent, _ = chain.step(output, chain.recorded(0), 0, chain.state)
            (gain,) = torch.autograd.grad(latent.float().sum(), output)
        weight = self._rollout.guidance[k]
        return gain[0].float() * {-1: 1.0, 0: 1.0 - weight, 1: weight}[half]


def step_gain(kind: str, model: nn.Module, data: Trajectory) -> StepGain:
    """For a pass called `kind` with ``error: latent``. Raises `SpecError` where the recording cannot be replayed."""
    try:
        return StepGain(model, data)
    except CalibrationError as error:
        raise SpecError(f"{kind}: error: latent: {error}; or set error: output") from None

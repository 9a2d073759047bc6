"""Observers of the steps of sampling: they store trajectories and noisy samples, and refuse what is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffquant.errors import EvaluationError
from diffquant.sampling.pictures import to_uint8
from diffquant.sampling.protocol import SamplingProtocol
from diffquant.sampling.sample import OnStep, StepResult

MEMORY_LIMIT = 2**30  # bytes of the trajectories that are compared


@dataclass(frozen=True)
class Trajectory:
    """The first samples' latents after every step and the noise predicted at it, on the CPU."""

    timesteps: tuple[float, ...]
    latents: Float[Tensor, "steps n *shape"]
    noise: Float[Tensor, "steps n *output"]


class TrajectoryRecorder:
    """Observer that stores latents and predicted noise of the first samples."""

    def __init__(self, protocol: SamplingProtocol) -> None:
        self.samples = min(protocol.trajectory_samples, protocol.samples)
        self.steps = protocol.steps
        self.timesteps: list[float] = []
        self.latents: list[list[Tensor]] = []
        self.noise: list[list[Tensor]] = []

    def __call__(self, indices: range, result: StepResult) -> None:
        """Store what belongs to the first samples. Raises EvaluationError beyond `MEMORY_LIMIT`."""
        count = min(len(indices), self.samples - indices.start)
        if count <= 0:
            return
        if result.step == len(self.timesteps):
            self._check_memory(result)
            self.timesteps.append(result.timestep)
            self.latents.append([])
            self.noise.append([])
        self.latents[result.step].append(result.sample_after[:count].float().cpu().clone())
        self.noise[result.step].append(result.noise_prediction[:count].float().cpu().clone())

    def trajectory(self) -> Trajectory:
        """What was stored."""
        latents, noise = (torch.stack([torch.cat(step) for step in steps]) for steps in (self.latents, self.noise))
        return Trajectory(tuple(self.timesteps), latents, noise)

    def _check_memory(self, result: StepResult) -> None:
        per_step = 4 * self.samples * (result.sample_after[0].numel() + result.noise_prediction[0].numel())  # bytes, float32
        needed = per_step * max(self.steps, result.step + 1)
        if needed > MEMORY_LIMIT:
            raise EvaluationError(
                f"protocol.trajectory_samples: the steps of {self.samples} samples take {needed / 2**30:.1f} GiB; "
                f"{MEMORY_LIMIT / 2**30:.0f} GiB are allowed; at most {self.samples * MEMORY_LIMIT // needed} samples fit"
            )


class Snapshots:
    """Observer that stores the noisy samples after some numbers of steps, as pictures, and passes every step on to another."""

    def __init__(self, name: str, steps: Sequence[int], other: OnStep | None = None) -> None:
        self.name, self.other = name, other
        self.batches: dict[int, list[Tensor]] = {count: [] for count in steps}

    def __call__(self, indices: range, result: StepResult) -> None:
        """Raises EvaluationError where samples are not finite."""
        finite = torch.isfinite(result.sample_after).flatten(1).all(dim=1)
        if not finite.all():
            raise EvaluationError(
                f"{self.name}: step {result.step} (timestep {result.timestep:g}): {int((~finite).sum())} of {len(finite)} samples "
                "hold non-finite values; such a model cannot be evaluated"
            )
        if self.other is not None:
            self.other(indices, result)
        if result.step + 1 in self.batches:
            self.batches[result.step + 1].append(to_uint8(result.sample_after.float().cpu()))

    def pictures(self) -> dict[int, UInt8[Tensor, "n c h w"]]:
        """Grey values of all samples, by the number of steps done."""
        return {steps: torch.cat(batches) for steps, batches in self.batches.items()}

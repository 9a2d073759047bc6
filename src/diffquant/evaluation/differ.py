"""What watches the steps of a quantized model: how far the first samples are from full precision's."""

from __future__ import annotations

import torch

from diffquant.errors import EvaluationError
from diffquant.evaluation.pairs import relative_l2, sqnr_db
from diffquant.sampling.observers import Trajectory, check_finite
from diffquant.sampling.sample import StepResult


class Differ:
    """Observer of a quantized run: compares every step with the trajectory of the reference."""

    def __init__(self, name: str, reference: Trajectory) -> None:
        self.name = name
        self.reference = reference
        self.drift = torch.zeros(reference.latents.shape[:2], dtype=torch.float64)  # [steps, kept]
        self.noise_sqnr_db = torch.zeros_like(self.drift)

    def __call__(self, indices: range, result: StepResult) -> None:
        """Compare one step. Raises EvaluationError where it is at another timestep, and for values that are not finite."""
        check_finite(self.name, result)
        step, kept = result.step, self.drift.shape[1]
        rows = slice(indices.start, min(indices.stop, kept))
        if rows.start >= kept:
            return
        timesteps = self.reference.timesteps
        if step >= len(timesteps) or timesteps[step] != result.timestep:
            expected = f"{timesteps[step]:g}" if step < len(timesteps) else "over"
            raise EvaluationError(f"{self.name}: step {step} is at timestep {result.timestep:g}, full precision at {expected}")
        count = rows.stop - rows.start
        latents, noise = (x[:count].float().cpu() for x in (result.sample_after, result.noise_prediction))
        self.drift[step, rows] = relative_l2(self.reference.latents[step, rows], latents)
        self.noise_sqnr_db[step, rows] = sqnr_db(self.reference.noise[step, rows], noise)

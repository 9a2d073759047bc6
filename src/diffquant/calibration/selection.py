"""At which timesteps calibration data are taken.

Source of the normal distribution: PTQ4DM (Shang et al. 2023, arXiv 2211.15736), mean and deviation 0.4 of the timestep axis.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffquant.calibration.trajectory import Trajectory
from diffquant.core.clock import StepClock

Timesteps = Literal["uniform", "normal"]
NORMAL_MEAN = NORMAL_DEVIATION = 0.4  # of the largest recorded timestep


def pick(data: Trajectory, count: int, generator: torch.Generator, timesteps: Timesteps = "uniform") -> Int[Tensor, " k"]:
    """`count` distinct recorded samples (or all there are) in random order, spread evenly over timesteps or normally."""
    count = min(count, len(data))
    if timesteps == "uniform":
        return data.subset(count, generator)
    share = normal_shares(data.timesteps)
    interval = torch.tensor([data.timesteps.index(timestep) for timestep in data.timestep_of().tolist()])
    weight = (share / torch.bincount(interval, minlength=len(share)))[interval]
    return torch.multinomial(weight, count, generator=generator)


def normal_shares(timesteps: list[float]) -> Float[Tensor, " intervals"]:
    """The probability that a normally distributed timestep falls into each interval; the outermost reach to infinity."""
    clock = StepClock(timesteps)
    largest = clock.timesteps[0]
    normal = torch.distributions.Normal(NORMAL_MEAN * largest, NORMAL_DEVIATION * largest)
    below = torch.cat([torch.zeros(1), normal.cdf(clock.edges.float()), torch.ones(1)])  # ascending
    return below.diff().flip(0)

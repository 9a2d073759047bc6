"""The ranges of a model's inputs at every timestep, and clusters of them: where a search of parameter sets starts."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffquant.calibration.fit import Run
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import call_recorded
from diffquant.core.model import clock_of, full_precision
from diffquant.core.quantizer import Quantizer
from diffquant.core.watch import observing


def interval_ranges(
    model: nn.Module, searched: dict[str, Quantizer], data: Trajectory, run: Run, per_interval: int = 8, batch_size: int = 32
) -> dict[str, tuple[Tensor, Tensor]]:
    """Smallest and largest input of each quantizer at each interval in full precision, ``[intervals, parts]`` each."""
    clock = clock_of(model)
    shapes = {name: (clock.intervals, each.scale.shape[1]) for name, each in searched.items()}
    ranges = {name: (torch.full(shape, torch.inf), torch.full(shape, -torch.inf)) for name, shape in shapes.items()}

    def observer(name: str, quantizer: Quantizer) -> Any:
        low, high = ranges[name]

        def observe(x: Tensor) -> None:
            intervals = torch.as_tensor(clock.interval).expand(len(x))
            for part, values in enumerate(x.split(quantizer.splits or (x.shape[quantizer.axis],), dim=quantizer.axis)):
                flat = values.flatten(1).float()
                low[:, part].scatter_reduce_(0, intervals, flat.amin(dim=1).cpu(), "amin")
                high[:, part].scatter_reduce_(0, intervals, flat.amax(dim=1).cpu(), "amax")

        return observe

    count = min(per_interval * clock.intervals, len(data))
    batches = data.subset(count, torch.Generator().manual_seed(0)).split(batch_size)
    with observing({quantizer: observer(name, quantizer) for name, quantizer in searched.items()}), full_precision(model):
        for picked in run.track(batches, "ranges of timesteps"):
            call_recorded(model, data, picked)
    return ranges


def clustered(
    low: Float[Tensor, "intervals parts"], high: Float[Tensor, "intervals parts"], count: int
) -> tuple[Int[Tensor, " intervals"], Float[Tensor, "count parts"], Float[Tensor, "count parts"]]:
    """k-means of the intervals' ranges into `count` sets: the set of each interval, and the sets' mean ranges.

    It starts from quantiles of the width, so it draws nothing; a set that loses its last interval takes the one that fits worst.
    """
    points = torch.cat([low, high], dim=1)
    order = (high - low).sum(dim=1).argsort(stable=True)
    assigned = torch.empty(len(points), dtype=torch.long)
    assigned[order] = torch.arange(len(points)) * count // len(points)
    for _ in range(100):
        centres = torch.stack([points[assigned == index].mean(dim=0) for index in range(count)])
        distance = torch.cdist(points, centres)
        moved = distance.argmin(dim=1)
        for index in range(count):
            if not (moved == index).any():
                alone = torch.bincount(moved, minlength=count)[moved] == 1
                worst = distance.gather(1, moved[:, None])[:, 0].masked_fill(alone, -1.0).argmax()
                moved[worst] = index
        if torch.equal(moved, assigned):
            break
        assigned = moved
    centres = torch.stack([points[assigned == index].mean(dim=0) for index in range(count)])
    low, high = centres.chunk(2, dim=1)
    return assigned, low, high

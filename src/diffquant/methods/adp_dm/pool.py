"""The recorded latents that a search learns on, added round by round at timesteps that it chooses.

The rule of ADP-DM (Wang et al. 2024, arXiv 2305.18723) adds latents where the search is undecided, or was seldom:
``score(t) = H_t + 1.5 / (N_t + 1)``, H_t the entropy there and N_t how often t was chosen.
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffquant.core.clock import StepClock

BONUS = 1.5  # of an interval that was not chosen yet


@final
class Pool:
    """Up to `size` of the recorded samples, whose intervals `interval_of_sample` says.

    ``chosen`` ``[size]`` holds them in the order they were added, and -1 where there is none yet; ``counts`` how often each
    interval was chosen.
    """

    def __init__(self, size: int, interval_of_sample: Int[Tensor, " recorded"], clock: StepClock) -> None:
        self.interval_of_sample = interval_of_sample
        self.chosen = torch.full((min(size, len(interval_of_sample)),), -1)
        self.counts = torch.zeros(clock.intervals, dtype=torch.long)

    @property
    def samples(self) -> Int[Tensor, " n"]:
        """Those added so far."""
        return self.chosen[self.chosen >= 0]

    def visited(self) -> Bool[Tensor, " intervals"]:
        """Which intervals a sample was taken at."""
        visited = self.counts > 0
        visited[self.interval_of_sample[self.samples]] = True
        return visited

    def choose(self, entropy: Float[Tensor, " intervals"]) -> int:
        """The interval at which the next samples are taken."""
        count = len(self.counts)
        recorded = torch.bincount(self.interval_of_sample, minlength=count)
        left = recorded - torch.bincount(self.interval_of_sample[self.samples], minlength=count)
        score = entropy + BONUS / (self.counts + 1)
        return int(score.masked_fill(left <= 0, -torch.inf).argmax())

    def grow(self, round_: int, rounds: int, entropy: Float[Tensor, " intervals"], generator: torch.Generator) -> None:
        """Add round `round_`'s share of the samples, at the interval that is chosen for them."""
        begin, end = (len(self.chosen) * edge // rounds for edge in (round_, round_ + 1))
        if end == begin:
            return
        interval = self.choose(entropy)
        self.counts[interval] += 1
        used = torch.zeros(len(self.interval_of_sample), dtype=torch.bool)
        used[self.chosen[:begin]] = True
        free = ((self.interval_of_sample == interval) & ~used).nonzero()[:, 0]
        there = free[torch.randperm(len(free), generator=generator)[: end - begin]]
        self.chosen[begin : begin + len(there)] = there
        rest = (~used).nonzero()[:, 0]  # an interval with fewer samples than the round adds: the rest from anywhere
        more = rest[torch.randperm(len(rest), generator=generator)]
        more = more[~torch.isin(more, there)][: end - begin - len(there)]
        self.chosen[begin + len(there) : end] = more

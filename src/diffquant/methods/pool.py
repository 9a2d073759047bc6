"""The recorded latents that a search learns on, added round by round at timesteps that it chooses.

The rule of ADP-DM (Wang et al. 2024, arXiv 2305.18723) adds latents where the search is undecided, or was seldom:
``score(t) = H_t + bonus / (N_t + 1)``, H_t the entropy there and N_t how often t was chosen. For comparison: all timesteps alike,
the normal distribution of PTQ4DM (Shang et al. 2023, arXiv 2211.15736), and the rule of ADP-DM's released code.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffquant.calibration.selection import normal_shares
from diffquant.core.clock import StepClock

Selection = Literal["searched", "uniform", "normal", "released"]
RELEASED_FIRST = 0.3  # the released rule leaves out this share of the steps, from the clean end


@final
class Pool:
    """Up to `size` of the recorded samples, whose intervals `interval_of_sample` says.

    ``chosen`` ``[size]`` holds them in the order they were added, and -1 where there is none yet; ``counts`` how often each
    interval was chosen.
    """

    def __init__(
        self, size: int, interval_of_sample: Int[Tensor, " recorded"], clock: StepClock, selection: Selection, bonus: float
    ) -> None:
        self.interval_of_sample, self.clock, self.selection, self.bonus = interval_of_sample, clock, selection, bonus
        self.chosen = torch.full((min(size, len(interval_of_sample)),), -1)
        self.counts = torch.zeros(clock.intervals, dtype=torch.long)

    @property
    def samples(self) -> Int[Tensor, " n"]:
        """What is there so far."""
        return self.chosen[self.chosen >= 0]

    def visited(self) -> Bool[Tensor, " intervals"]:
        """Which intervals a sample was taken at."""
        visited = self.counts > 0
        visited[self.interval_of_sample[self.samples]] = True
        return visited

    def choose(self, entropy: Float[Tensor, " intervals"], generator: torch.Generator) -> int:
        """The interval at which the next samples are taken."""
        count = len(self.counts)
        there = torch.bincount(self.interval_of_sample, minlength=count)
        left = there - torch.bincount(self.interval_of_sample[self.samples], minlength=count)
        if self.selection == "normal":
            share = normal_shares(list(self.clock.timesteps)).repeat(self.clock.branches) * (left > 0)
            return int(torch.multinomial(share, 1, generator=generator))
        if self.selection == "uniform":
            score = -self.counts.float() + torch.rand(count, generator=generator) / 2
        elif self.selection == "released":
            score = entropy - 2.0 * self.counts
            times = self.clock.times
            score[torch.arange(count) % times >= times - int(RELEASED_FIRST * times)] = -torch.inf
        else:
            score = entropy + self.bonus / (self.counts + 1)
        return int(score.masked_fill(left <= 0, -torch.inf).argmax())

    def grow(self, round_: int, rounds: int, entropy: Float[Tensor, " intervals"], generator: torch.Generator) -> None:
        """Add round `round_`'s share of the samples, at the interval that is chosen for them."""
        begin, end = (len(self.chosen) * edge // rounds for edge in (round_, round_ + 1))
        if end == begin:
            return
        interval = self.choose(entropy, generator)
        self.counts[interval] += 1
        used = torch.zeros(len(self.interval_of_sample), dtype=torch.bool)
        used[self.chosen[:begin]] = True
        free = ((self.interval_of_sample == interval) & ~used).nonzero()[:, 0]
        taken = free[torch.randperm(len(free), generator=generator)[: end - begin]]
        self.chosen[begin : begin + len(taken)] = taken
        rest = (~used).nonzero()[:, 0]  # an interval with fewer samples than the round adds: the rest from anywhere
        more = rest[torch.randperm(len(rest), generator=generator)]
        more = more[~torch.isin(more, taken)][: end - begin - len(taken)]
        self.chosen[begin + len(taken) : end] = more

"""Where the chains of a calibration start: at recorded latents, or at those that the quantized model reaches itself.

To run the quantized model from the noise to every start would cost more than the calibration. Instead the batch of a visit is left
where its segment ended, and the next visit of the segment after it goes on from there: one latent for each segment and sample is
all that is kept. *Chosen here*: no source for it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffquant.calibration.rollout import Chain, Rollout


class Starts:
    """Chains through `segments`, one a visit, of `batch_size` trajectories each.

    ``trajectories`` ``[segments, batch]`` are those whose latents ``[segments, batch, ...]`` wait at the start of each segment, -1
    where none do: then, and at the first segment, trajectories are drawn and start as they were recorded. Both change in place.
    """

    def __init__(self, rollout: Rollout, segments: list[range], batch_size: int, carried: bool) -> None:
        self.rollout, self.segments, self.carried = rollout, segments, carried
        self.batch_size = min(batch_size, rollout.trajectories)
        self.trajectories: Int[Tensor, "segments batch"] = torch.full((len(segments), self.batch_size), -1)
        some = rollout.chain(torch.arange(self.batch_size), segments[0]).recorded(0)
        self.latents: Float[Tensor, "segments batch ..."] = some.new_zeros(len(segments) if carried else 0, *some.shape)

    def take(self, number: int, generator: torch.Generator) -> tuple[Chain, Float[Tensor, "batch ..."]]:
        """The chain of segment `number`, and the latent it starts at."""
        if self.carried and number and bool((self.trajectories[number] >= 0).all()):
            return self.rollout.chain(self.trajectories[number].clone(), self.segments[number]), self.latents[number].clone()
        picked = torch.randperm(self.rollout.trajectories, generator=generator)[: self.batch_size]
        chain = self.rollout.chain(picked, self.segments[number])
        return chain, chain.recorded(0)

    def leave(self, number: int, chain: Chain, latent: Float[Tensor, "batch ..."]) -> None:
        """`chain` of segment `number` has ended at `latent`: there the next segment can start."""
        if self.carried and number + 1 < len(self.segments):
            self.trajectories[number + 1], self.latents[number + 1] = chain.trajectories, latent

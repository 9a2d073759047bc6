"""What an error of a latent makes of the last sample, to first order, along recorded trajectories.

Random directions v at the last sample are carried back through scheduler and full-precision model to the latents where segments
end: u = J^T v, J the Jacobian of the last sample by that latent. The mean of (u . e)^2 over directions is |J e|^2, so it weighs an
error e by what is left of it in the end. *Chosen here*; no source for it.
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffquant.calibration.fit import Run, iteration_generator, load_tensors, save_tensors
from diffquant.calibration.rollout import Rollout
from diffquant.core.surgery import device_of, full_precision
from diffquant.methods.gradients import Distance, carried_back
from diffquant.methods.passes import evaluating


@final
class LastSample:
    """Directions ``carried`` ``[segments, trajectories, directions, ...]`` to the end of each segment.

    Those of a trajectory have a mean square of 1 over all segments: trajectories count alike, however far one magnifies errors.
    """

    def __init__(self, carried: Float[Tensor, "segments trajectories directions ..."]) -> None:
        self.carried = carried

    @classmethod
    def of(
        cls, model: nn.Module, rollout: Rollout, segments: list[range], directions: int, seed: int, batch_size: int, run: Run
    ) -> LastSample:
        """Carry `directions` back along all trajectories; batches that a killed run has finished are taken over."""
        path = None if run.folder is None else run.folder / "last-sample.safetensors"
        batches = torch.arange(rollout.trajectories).split(batch_size)
        done = {} if path is None or not path.exists() else load_tensors(path)[0]
        task = run.progress.add_task("last sample", total=len(batches), completed=len(done))
        last_device = device_of(model)
        ends = [segment.stop for segment in segments]
        with evaluating(model), full_precision(model):
            for number, picked in enumerate(batches):
                if str(number) in done:
                    continue
                chain = rollout.chain(picked, range(rollout.steps))
                last, generator = chain.recorded(rollout.steps), iteration_generator(seed, number)
                found = []
                for _ in range(directions):
                    latents = carried_back(chain, torch.randn(last.shape, generator=generator).to(last))
                    found.append(torch.stack([latents[end] for end in ends]))
                done[str(number)] = torch.stack(found, dim=2)
                run.progress.advance(task)
                if path is not None:
                    save_tensors(path, done, {})
        run.progress.remove_task(task)
        carried = torch.cat([done[str(number)].to(last_device) for number in range(len(batches))], dim=1)
        return cls(carried / carried.square().mean(dim=(0, *range(2, carried.dim())), keepdim=True).sqrt().clamp(min=1e-12))

    def distance(self, number: int, trajectories: Int[Tensor, " n"]) -> Distance:
        """That of latents at the end of segment `number`: the mean of (u . e)^2 for each number of a latent."""
        directions = self.carried[number, trajectories.to(self.carried.device)]

        def distance(end: Tensor, target: Tensor) -> Tensor:
            error = (end - target).unsqueeze(1)
            return (directions.to(end) * error).flatten(2).sum(dim=2).square().mean() / error[0].numel()

        return distance

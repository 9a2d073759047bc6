"""How errors of single steps become the error of the last sample.

`trace` records trajectories of full precision. `accumulation` replays them with a quantized model: one step at a time from
full-precision latents (its *local* error), all steps in a row (the *accumulated* error), and with only one tenth of the steps
quantized, the others in full precision.

The measured accumulation is compared with the one that a recursion of the local errors predicts,

    e_(t-1) = J_t e_t + d_t        J_t: Jacobian of full precision's step, d_t: local error at step t,

with J_t e a central difference along e. If the two differ, the quantization error itself depends on the error already present in
the input.
Source: AccuQuant (Lee et al. 2025, arXiv 2510.20348) for the question; the recursion is that of any one-step solver (the history of
multistep solvers is left out of J).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffquant.calibration.record import record
from diffquant.calibration.rollout import Rollout
from diffquant.errors import CalibrationError
from diffquant.evaluation.intervals import Interval, bootstrap_mean
from diffquant.evaluation.pairs import relative_l2
from diffquant.host.conditions import Calibration
from diffquant.host.pipeline import Host, Pipeline
from diffquant.sampling.protocol import SamplingProtocol, scheduler_of
from diffquant.sampling.sample import OnProgress, initial_noise, sample_shape, sample_unconditional

BATCH = 16  # trajectories at once
DIFFERENCE = 1e-2  # of the latent's norm: length of the step of the central difference
PARTS = 10  # stretches of the sampling steps that are quantized alone
RESAMPLE_SEED = 0


@dataclass(frozen=True)
class Stretch:
    """Steps ``[first, last]`` quantized, all others in full precision: the mean final error."""

    first: int
    last: int
    final_error: Interval


@dataclass(frozen=True)
class Accumulation:
    """Mean relative L2 errors of the latent after each step, over the traced samples, and the final error of each stretch."""

    samples: int
    timesteps: tuple[float, ...]
    local: tuple[float, ...]
    accumulated: tuple[float, ...]
    predicted: tuple[float, ...]
    stretches: tuple[Stretch, ...]


def trace(pipe: Pipeline, protocol: SamplingProtocol) -> Rollout:
    """Record `accumulation_samples` trajectories of full precision under the protocol.

    Raises `CalibrationError` if the steps of the pipeline cannot be replayed, and for pictures of another size than its own, which
    cannot be recorded.
    """
    if (protocol.height or protocol.width) and not Host(pipe).unconditional:
        raise CalibrationError("protocol.height, width: trajectories are recorded at the pipeline's own size only")
    count = min(protocol.accumulation_samples, protocol.samples)
    calibration = Calibration(
        samples=count,
        steps=protocol.steps,
        seed=protocol.seed,
        batch_size=min(BATCH, count),
        prompts=protocol.prompts,
        class_labels=protocol.class_labels,
        guidance_scale=protocol.guidance_scale,
        eta=protocol.eta,
    )
    with scheduler_of(pipe, protocol):
        run = _unconditional(protocol) if Host(pipe).unconditional else None
        data = record(pipe, calibration, run=run, progress=False)
    rollout = Rollout(Host(pipe).denoiser, data)
    rollout.verify()
    return rollout


def _unconditional(protocol: SamplingProtocol) -> Callable[[Pipeline, torch.Generator, int], None]:
    """A run of a pixel model with any sampler."""

    def run(pipe: Pipeline, generator: torch.Generator, batch: int) -> None:
        denoiser = pipe.unet
        seed = int(torch.randint(2**31, (1,), generator=generator))
        noise = initial_noise(sample_shape(denoiser, protocol), seed, range(batch)).to(denoiser.device, denoiser.dtype)
        for _ in sample_unconditional(denoiser, pipe.scheduler, noise, protocol.steps, protocol.eta, generator):
            pass

    return run


def accumulation(
    full: Rollout, quantized: nn.Module, *, name: str = "quantized", progress: OnProgress | None = None
) -> Accumulation:
    """Send `quantized` along the trajectories of `full`, the full-precision model's rollout."""
    through = full.through(quantized)
    batches = []
    for indices in torch.arange(full.trajectories).split(BATCH):
        batches.append(_errors(full, through, indices))
        if progress is not None:
            progress(f"{name}, step by step", int(indices[-1]) + 1, full.trajectories)
    local, accumulated, predicted, stretches = (torch.cat(errors, dim=1) for errors in zip(*batches, strict=True))  # [steps, n]
    generator = torch.Generator().manual_seed(RESAMPLE_SEED)
    first = torch.zeros(1, dtype=torch.long)
    return Accumulation(
        samples=full.trajectories,
        timesteps=tuple(float(full.data.step(first, k).timestep) for k in range(full.steps)),
        local=tuple(local.mean(dim=1).tolist()),
        accumulated=tuple(accumulated.mean(dim=1).tolist()),
        predicted=tuple(predicted.mean(dim=1).tolist()),
        stretches=tuple(
            Stretch(part.start, part.stop - 1, bootstrap_mean(errors, generator))
            for part, errors in zip(parts(full.steps), stretches, strict=True)
        ),
    )


def parts(steps: int) -> list[range]:
    """The steps in `PARTS` stretches of nearly equal length, or one per step where there are fewer."""
    count = min(PARTS, steps)
    return [range(steps * i // count, steps * (i + 1) // count) for i in range(count)]


def _errors(full: Rollout, quantized: Rollout, indices: Int[Tensor, " n"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Relative errors ``[steps, n]`` of one batch: local, accumulated, predicted; and of the last sample, ``[stretches, n]``."""
    steps = full.steps
    recording = full.chain(indices, range(steps))
    latents = [recording.recorded(i) for i in range(steps + 1)]
    in_a_row, _ = quantized.chain(indices, range(steps)).run()
    local, predicted, error = [], [], torch.zeros_like(latents[0])
    for k in range(steps):
        here = range(k, k + 1)
        single = quantized.chain(indices, here).run(latents[k])[0][-1]
        local.append(relative_l2(latents[k + 1], single))
        error = _carried(full, indices, here, latents[k], error) + single - latents[k + 1]
        predicted.append(relative_l2(latents[k + 1], latents[k + 1] + error))
    accumulated = [relative_l2(latents[k + 1], in_a_row[k + 1]) for k in range(steps)]
    ends = [relative_l2(latents[-1], _stretch_end(full, quantized, indices, part, latents)) for part in parts(steps)]
    return torch.stack(local), torch.stack(accumulated), torch.stack(predicted), torch.stack(ends)


def _carried(
    full: Rollout, indices: Int[Tensor, " n"], step: range, latent: Float[Tensor, "n ..."], error: Float[Tensor, "n ..."]
) -> Float[Tensor, "n ..."]:
    """J e: full precision's step applied to a small error in its input, by a central difference along it."""
    if not error.any():
        return error
    view = (-1, *[1] * (latent.dim() - 1))
    norms = (latent.flatten(1).norm(dim=1) / error.flatten(1).norm(dim=1).clamp(min=1e-30)).view(view)
    length = DIFFERENCE * norms
    ahead, behind = (full.chain(indices, step).run(latent + sign * length * error)[0][-1] for sign in (1, -1))
    carried: Tensor = (ahead - behind) / (2 * length)
    return carried


def _stretch_end(
    full: Rollout, quantized: Rollout, indices: Int[Tensor, " n"], part: range, latents: list[Tensor]
) -> Float[Tensor, "n ..."]:
    """The last sample when only the steps of `part` are quantized."""
    reached, states = quantized.chain(indices, part).run(latents[part.start])
    return full.finish(indices, part.stop, reached[-1], states[-1])

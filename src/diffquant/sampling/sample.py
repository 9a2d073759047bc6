"""Draw samples from a pipeline so that two models can be compared: the same noise for any model and batch size.

Sample i draws from a generator of its own, seeded with (seed, i): first its initial noise, then the noise that its sampler injects.
Unconditional pixel models (DDIMPipeline, DDPMPipeline) run in a loop of our own, because the stock ones accept few samplers; every
other pipeline runs its own ``__call__``, watched at ``scheduler.step``.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diffquant.errors import DiffquantError, EvaluationError
from diffquant.host.pipeline import Host, Pipeline
from diffquant.sampling.pictures import to_uint8
from diffquant.sampling.protocol import SamplingProtocol, calibration_of, scheduler_of

Generators = torch.Generator | list[torch.Generator] | None
OnProgress = Callable[[str, int, int], None]  # what is being sampled, samples done, samples in all


@dataclass(frozen=True)
class StepResult:
    """One scheduler step: x_t, what the denoiser predicted (after guidance), and x_(t-1)."""

    step: int
    timestep: float
    sample_before: Float[Tensor, "n *shape"]
    noise_prediction: Float[Tensor, "n *output"]
    sample_after: Float[Tensor, "n *shape"]


OnStep = Callable[[range, StepResult], None]  # the numbers of the samples in the batch, and the step


@dataclass(frozen=True)
class Sampled:
    """What a pipeline drew: pictures as grey values, and its last samples (of a pixel model: before clamping; else latents).

    `seconds` is the wall time of sampling, without that of observers. On the CPU; last samples in float32.
    """

    pictures: UInt8[Tensor, "n c h w"]
    last_samples: Float[Tensor, "n *shape"]
    seconds: float


def sample_generators(seed: int, indices: range) -> list[torch.Generator]:
    """One CPU generator per sample, the same for a sample whatever else is in its batch.

    torch's CPU generator uses 32 bits of a seed; a run takes consecutive ones from a start that the seed scatters, so no two
    samples of a run share noise.
    """
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [torch.Generator().manual_seed((start + index) % 2**32) for index in indices]


def initial_noise(shape: tuple[int, ...], seed: int, indices: range) -> Float[Tensor, "n *shape"]:
    """Standard normal noise of the samples `indices`, each of `shape` (channels, height, width): float32, on the CPU."""
    return _noise(shape, sample_generators(seed, indices))


def _noise(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def sample_unconditional(
    denoiser: nn.Module,
    scheduler: Any,
    noise: Float[Tensor, "n *shape"],
    steps: int,
    eta: float = 0.0,
    generator: Generators = None,
) -> Iterator[StepResult]:
    """Denoise `noise` in `steps` steps of any scheduler with `step(model_output, timestep, sample, ...)`, yielding every step.

    `denoiser(sample, timestep).sample` predicts the noise (UNet2DModel and its like). The generator, or one per sample, serves the
    noise that the scheduler injects; give both models of a comparison generators in the same state.
    Raises EvaluationError if eta is above 0 and the scheduler takes none.
    """
    arguments = _step_arguments(scheduler, eta, generator)
    scheduler.set_timesteps(steps, device=noise.device)
    sample = noise * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            prediction = denoiser(scheduler.scale_model_input(sample, timestep), timestep).sample
            after = scheduler.step(prediction, timestep, sample, **arguments).prev_sample
        yield StepResult(step, float(timestep), sample, prediction, after)
        sample = after


def _step_arguments(scheduler: Any, eta: float, generator: Generators) -> dict[str, Any]:
    """`eta` and `generator`, where `scheduler.step` takes them."""
    accepted = inspect.signature(scheduler.step).parameters
    if eta > 0 and "eta" not in accepted:
        raise EvaluationError(f"protocol.eta: is {eta}; {type(scheduler).__name__} takes none; use sampler ddim, or eta 0")
    arguments: dict[str, Any] = {"eta": eta} if eta > 0 else {}
    if "generator" in accepted:
        arguments["generator"] = generator
    return arguments


def sample(
    pipe: Pipeline,
    protocol: SamplingProtocol,
    *,
    seed: int | None = None,
    on_step: OnStep | None = None,
    progress: OnProgress | None = None,
    name: str = "sampling",
) -> Sampled:
    """Draw `protocol.samples` samples in batches; `seed` replaces the protocol's.

    Raises EvaluationError where the pipeline cannot be sampled as the protocol says, or draws what is not finite.
    """
    observers = 0.0

    def timed(indices: range, result: StepResult) -> None:
        nonlocal observers
        begun = time.perf_counter()
        if on_step is not None:
            on_step(indices, result)
        observers += time.perf_counter() - begun

    draw = sample_denoiser if Host(pipe).unconditional else sample_pipeline
    seed = protocol.seed if seed is None else seed
    pictures, last_samples = [], []
    begun = time.perf_counter()
    for start in range(0, protocol.samples, protocol.batch_size):
        indices = range(start, min(start + protocol.batch_size, protocol.samples))
        batch, last = draw(pipe, protocol, seed, indices, timed)
        pictures.append(to_uint8(batch))
        last_samples.append(last)
        if progress is not None:
            progress(name, indices.stop, protocol.samples)
    seconds = time.perf_counter() - begun - observers
    return Sampled(torch.cat(pictures), torch.cat(last_samples), seconds)


def sample_shape(denoiser: Any, protocol: SamplingProtocol) -> tuple[int, int, int]:
    """Channels, height and width of what an unconditional pixel model denoises: the protocol's, or its own."""
    size = denoiser.config.sample_size
    own = (size, size) if isinstance(size, int) else size
    multiple = 2 ** (len(denoiser.config.block_out_channels) - 1)
    for name in ("height", "width"):
        if (side := getattr(protocol, name) or 0) % multiple:
            raise EvaluationError(f"protocol.{name}: is {side}; {type(denoiser).__name__} takes multiples of {multiple}")
    return denoiser.config.in_channels, protocol.height or own[0], protocol.width or own[1]


def sample_denoiser(
    pipe: Pipeline, protocol: SamplingProtocol, seed: int, indices: range, on_step: OnStep
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
    """One batch of an unconditional pixel model through `sample_unconditional`: pictures in [-1, 1], and last samples.

    Raises EvaluationError for conditions, which such a model cannot take.
    """
    for name in ("prompts", "class_labels", "guidance_scale"):
        if getattr(protocol, name) is not None:
            raise EvaluationError(f"protocol.{name}: is given, but {type(pipe).__name__} is unconditional; leave it out")
    denoiser: Any = Host(pipe).denoiser
    generators = sample_generators(seed, indices)
    noise = _noise(sample_shape(denoiser, protocol), generators).to(denoiser.device, denoiser.dtype)
    with Host(pipe).evaluating(), scheduler_of(pipe, protocol) as scheduler:
        for result in sample_unconditional(denoiser, scheduler, noise, protocol.steps, protocol.eta, generators):
            on_step(indices, result)
    last = result.sample_after.float().cpu()
    return last.clamp(-1, 1), last


def sample_pipeline(
    pipe: Pipeline, protocol: SamplingProtocol, seed: int, indices: range, on_step: OnStep
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n *shape"]]:
    """One batch through the pipeline's own ``__call__``: pictures in [-1, 1], and last latents.

    The generators of the samples are passed in, from which diffusers draws the same noise as `initial_noise`, whatever shape the
    pipeline's latents have. A pipeline that gives its scheduler no generator (LDM, DiT) injects noise from torch's global one: that
    is seeded per batch and restored after, so it is the same for both models, but depends on the batch size.
    Raises EvaluationError where the pipeline cannot be called with what the protocol says, or returns no images.
    """
    latest: StepResult | None = None

    def observed(prediction: Tensor, timestep: Any, before: Tensor, after: Tensor, options: dict[str, Any]) -> None:
        nonlocal latest
        before, prediction, after = (_without_guidance_half(x, len(indices)) for x in (before, prediction, after))
        if latest is None:
            _check_noise(pipe, scheduler, before)
        latest = StepResult(latest.step + 1 if latest else 0, float(timestep), before, prediction, after)
        on_step(indices, latest)

    devices = [pipe.device] if pipe.device.type == "cuda" else []
    host = Host(pipe)
    with host.evaluating(), scheduler_of(pipe, protocol) as scheduler, host.quiet():
        arguments = _call_arguments(pipe, scheduler, protocol, seed, indices)
        with torch.random.fork_rng(devices), host.observed(on_step=observed):
            torch.manual_seed(int(np.random.SeedSequence([seed, indices.start]).generate_state(1)[0]))
            try:
                output = pipe(**arguments)
            except DiffquantError:
                raise
            except (ValueError, RuntimeError) as error:  # such as a height that is no multiple of 8, or too large for the memory
                raise EvaluationError(f"{type(pipe).__name__}: {error}") from error
    if latest is None or not isinstance(getattr(output, "images", None), np.ndarray):
        raise EvaluationError(f"{type(pipe).__name__}: took no scheduler step or returned no images; it cannot be compared")
    pictures = torch.from_numpy(output.images).float().permute(0, 3, 1, 2)  # [n, h, w, c] in [0, 1] -> [n, c, h, w]
    return pictures * 2 - 1, latest.sample_after.float().cpu()


def _check_noise(pipe: Pipeline, scheduler: Any, first: Tensor) -> None:
    """Refuse a scheduler that expects scaled noise of a pipeline that does not scale it (DiT under Euler)."""
    expected, deviation = float(getattr(scheduler, "init_noise_sigma", 1.0)), float(first.float().std())
    if expected > 2 and deviation < expected / 2:
        raise EvaluationError(
            f"{type(pipe).__name__}: starts from noise of deviation {deviation:.2g}, where {type(scheduler).__name__} expects "
            f"{expected:.3g}; choose another sampler"
        )


def _call_arguments(pipe: Pipeline, scheduler: Any, protocol: SamplingProtocol, seed: int, indices: range) -> dict[str, Any]:
    accepted = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {
        "num_inference_steps": protocol.steps,
        "generator": sample_generators(seed, indices),
        "output_type": "np",
        **Host(pipe).conditions(calibration_of(protocol), indices),
    }
    options = {name: getattr(protocol, name) for name in ("guidance_scale", "height", "width")}
    arguments |= {name: value for name, value in options.items() if value is not None}
    arguments |= {key: value for key, value in _step_arguments(scheduler, protocol.eta, None).items() if key == "eta"}
    if unknown := [name for name in arguments if name not in accepted]:
        raise EvaluationError(f"{type(pipe).__name__}: does not take {', '.join(unknown)}; it takes: {', '.join(accepted)}")
    named = (p for p in accepted.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    if missing := [p.name for p in named if p.default is p.empty and p.name not in arguments]:
        raise EvaluationError(f"{type(pipe).__name__}: also needs {', '.join(missing)}, which a protocol does not have")
    return arguments


def _without_guidance_half(tensor: Tensor, count: int) -> Tensor:
    """The first half of a batch that a pipeline doubled for guidance before the scheduler (DiT: both halves are equal there)."""
    if len(tensor) not in (count, 2 * count):
        raise EvaluationError(f"scheduler.step: saw a batch of {len(tensor)} for {count} samples; it cannot be compared")
    return tensor[:count]

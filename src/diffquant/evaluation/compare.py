"""The same noise through a full-precision and a quantized pipeline, and what differs.

`run_reference` samples full precision, `compare_to` then compares any number of quantized pipelines with it.

The FID of a quantized model to full precision is taken over the same noise, so equal models are at distance 0, below the floor; a
value below the floor says that quantization moves the distribution less than drawing the samples again does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from diffquant.engines.base import engine_of
from diffquant.errors import EvaluationError
from diffquant.evaluation.accumulation import Accumulation, accumulation
from diffquant.evaluation.distances import Distances, distances
from diffquant.evaluation.features import (
    DataStatistics,
    FeatureExtractor,
    accuracy,
    clip_score,
    extract,
    interval_generator,
    legibility,
    mean,
)
from diffquant.evaluation.metrics import (
    Interval,
    bootstrap_mean,
    bootstrap_median,
    bootstrap_ratio_of_means,
    mean_squared_error,
    pooled_psnr,
    psnr,
    relative_l2,
    ssim,
)
from diffquant.evaluation.observers import Differ, Snapshots
from diffquant.evaluation.reference import ReferenceRun, run_reference, snapshot_steps
from diffquant.evaluation.sampling import OnProgress, sample
from diffquant.evaluation.sampling_protocol import SamplingProtocol, scheduler_config
from diffquant.host.pipeline import Host, Pipeline, has_step_cache


@dataclass(frozen=True)
class StepDistances:
    """Distances of the noisy samples after `steps` sampling steps from full precision's, and of those from other noise."""

    steps: int
    to_reference: Distances
    floor: Distances


@dataclass(frozen=True)
class Comparison:
    """What a quantized model does to the samples of a reference run.

    `drift` is the mean relative L2 of the latents after each step, `noise_sqnr_db` the mean SQNR of the predicted noise; both over
    the samples whose trajectories are kept, and both with what earlier steps did to the input. `final_errors` is the relative L2 of
    every last sample, paired with the reference's noise. PSNR is pooled over pairs. `to_data_change` is how much larger FID to the
    data is than full precision's (without the bias of n), `legibility_change` how much larger mean legibility is, both paired by
    noise. `accuracy` is the share of pictures that show what was asked for, where the extractor can tell; `clip` the mean CLIP
    score. `engine` is what the model computed with.
    """

    name: str
    timesteps: tuple[float, ...]
    drift: tuple[float, ...]
    noise_sqnr_db: tuple[float, ...]
    final_errors: Float[Tensor, " n"]
    final_error: Interval
    final_error_median: Interval
    psnr: Interval
    psnr_median: float
    ssim: Interval
    to_reference: Distances | None
    to_data: Distances | None
    legibility: Interval | None
    pictures: UInt8[Tensor, "n c h w"]
    seconds: float
    to_data_change: Interval | None = None
    legibility_change: Interval | None = None
    accuracy: Interval | None = None
    clip: Interval | None = None
    engine: str = ""
    by_step: tuple[StepDistances, ...] = ()
    accumulation: Accumulation | None = None


def compare(
    reference_pipe: Pipeline,
    quantized_pipe: Pipeline,
    protocol: SamplingProtocol,
    *,
    name: str = "quantized",
    features: FeatureExtractor | None = None,
    data: DataStatistics | None = None,
    progress: OnProgress | None = None,
) -> Comparison:
    """Send the same noise through both pipelines and compare: `run_reference`, then `compare_to`."""
    reference = run_reference(reference_pipe, protocol, features=features, data=data, progress=progress)
    return compare_to(reference, quantized_pipe, name=name, progress=progress)


def compare_to(
    reference: ReferenceRun, quantized_pipe: Pipeline, *, name: str = "quantized", progress: OnProgress | None = None
) -> Comparison:
    """Send the noise of a reference run through a quantized pipeline and compare.

    Raises EvaluationError if the two schedulers differ, or if samples are not finite.
    """
    protocol = reference.protocol
    _check_schedulers(reference, scheduler_config(quantized_pipe, protocol), name)
    differ = Differ(name, reference.trajectory)
    snapshots = Snapshots(differ, snapshot_steps(quantized_pipe, protocol, reference.extractor))
    drawn = sample(quantized_pipe, protocol, on_step=snapshots, progress=progress, name=name)
    pictures = drawn.pictures
    final_errors = relative_l2(reference.last_samples, drawn.last_samples)

    to_reference = to_data = to_data_change = legible = legible_change = accurate = None
    if reference.extractor is not None and reference.features is not None:
        extracted = extract(reference.extractor, pictures)
        to_reference = distances(extracted, reference.features, "paired", interval_generator())
        legible, accurate = legibility(reference.extractor, pictures), accuracy(reference.extractor, pictures, protocol)
        if reference.data is not None:
            to_data = reference.data.distances(extracted)
            to_data_change = reference.data.change(extracted, reference.features)
        if legible is not None and reference.legible is not None:
            legible_change = legible - reference.legible
    return Comparison(
        name=name,
        timesteps=reference.trajectory.timesteps,
        drift=tuple(differ.drift.mean(dim=1).tolist()),
        noise_sqnr_db=tuple(differ.noise_sqnr_db.mean(dim=1).tolist()),
        final_errors=final_errors,
        final_error=bootstrap_mean(final_errors, interval_generator()),
        final_error_median=bootstrap_median(final_errors, interval_generator()),
        psnr=pooled_psnr(bootstrap_mean(mean_squared_error(reference.pictures, pictures), interval_generator())),
        psnr_median=float(psnr(reference.pictures, pictures).median()),
        ssim=bootstrap_mean(ssim(reference.pictures, pictures), interval_generator()),
        to_reference=to_reference,
        to_data=to_data,
        legibility=mean(legible),
        to_data_change=to_data_change,
        legibility_change=mean(legible_change),
        accuracy=accurate,
        by_step=_by_step(reference, snapshots.pictures()),
        accumulation=_accumulation(reference, quantized_pipe, name, progress),
        clip=clip_score(reference.scorer, pictures, protocol),
        pictures=pictures,
        seconds=drawn.seconds,
        engine=engine_of(Host(quantized_pipe).denoiser),
    )


def _by_step(reference: ReferenceRun, noisy: dict[int, Tensor]) -> tuple[StepDistances, ...]:
    if reference.extractor is None:
        return ()
    found = {steps: extract(reference.extractor, pictures) for steps, pictures in noisy.items()}
    return tuple(
        StepDistances(steps, distances(found[steps], features, "paired", interval_generator()), floor)
        for steps, (features, floor) in reference.step_features.items()
    )


def final_error_ratio(numerator: Comparison, denominator: Comparison) -> Interval:
    """Mean final error of one quantized model over that of another, paired by noise: below 1, the first is nearer.

    Both have to come from the same reference run. Raises EvaluationError if they hold different numbers of samples.
    """
    if len(numerator.final_errors) != len(denominator.final_errors):
        counts = f"{len(numerator.final_errors)} and {len(denominator.final_errors)}"
        raise EvaluationError(f"final_error_ratio: {counts} samples; compare both with one reference run")
    return bootstrap_ratio_of_means(numerator.final_errors, denominator.final_errors, interval_generator())


def _accumulation(reference: ReferenceRun, pipe: Pipeline, name: str, progress: OnProgress | None) -> Accumulation | None:
    host = Host(pipe)
    denoiser = host.denoiser
    if reference.traced is None or has_step_cache(denoiser):
        return None
    with host.evaluating():
        return accumulation(reference.traced, denoiser, name=name, progress=progress)


def _check_schedulers(reference: ReferenceRun, config: dict[str, Any], name: str) -> None:
    keys = sorted(key for key in reference.scheduler.keys() | config.keys() if reference.scheduler.get(key) != config.get(key))
    if keys:
        found = ", ".join(f"{key} {config.get(key)} (full precision: {reference.scheduler.get(key)})" for key in keys)
        raise EvaluationError(f"{name}: its scheduler differs: {found}; give both pipelines the same scheduler")

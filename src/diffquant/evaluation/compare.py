"""The same noise through a full-precision and a quantized pipeline, and what differs.

`run_reference` samples full precision once, twice where features are given: the second time through other noise, for the floor, the
distance that full precision has from itself. `compare_to` then compares any number of quantized pipelines with it.

The FID of a quantized model to full precision is taken over the same noise, so equal models are at distance 0, below the floor; a
value below the floor says that quantization moves the distribution less than drawing the samples again does.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffquant.calibration.observe import Pipeline, evaluation_mode, find_denoiser
from diffquant.calibration.rollout import Rollout
from diffquant.calibration.trajectory import model_hash
from diffquant.core.spec import CalibrationError, EvaluationError
from diffquant.evaluation.accumulation import Accumulation, accumulation, trace
from diffquant.evaluation.metrics import (
    Distances,
    Interval,
    bootstrap_mean,
    bootstrap_median,
    bootstrap_ratio_of_means,
    distances,
    mean_squared_error,
    pooled_psnr,
    psnr,
    relative_l2,
    ssim,
    to_uint8,
    within_sums,
)
from diffquant.evaluation.observers import Differ, Keeper, Trajectory, finite_only
from diffquant.evaluation.sampling import (
    OnProgress,
    OnStep,
    SamplingProtocol,
    StepResult,
    conditions_of,
    is_unconditional,
    resolved,
    sample,
    scheduler_of,
)
from diffquant.runtime.engines import engine_of

INTERVAL_SEED = 0  # of bootstrap draws and of jackknife groups
FEATURE_BATCH = 256  # pictures per call of an extractor
SNAPSHOTS = (0.2, 0.4, 0.6, 0.8)  # shares of the sampling steps after which pixel models are compared as sets of pictures


@runtime_checkable
class FeatureExtractor(Protocol):
    """What turns pictures into features; given to the evaluation from outside."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of its weights."""
        ...

    def features(self, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Features of each picture."""
        ...

    def confidence(self, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " n"] | None:
        """Largest class probability of each picture, or None if the extractor is no classifier."""
        ...

    def agreement(self, pictures: UInt8[Tensor, "n c h w"], conditions: Sequence[str | int]) -> Float[Tensor, " n"] | None:
        """1 for a picture of what its prompt or class label asked for, else 0; None if the extractor cannot tell."""
        ...


@runtime_checkable
class PromptScorer(Protocol):
    """What scores the agreement of pictures with their prompts (`clip.ClipScore`); given to the evaluation from outside."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of its weights."""
        ...

    def score(self, pictures: UInt8[Tensor, "n c h w"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """The score of each picture."""
        ...


@dataclass(frozen=True)
class DataStatistics:
    """Features of real pictures under the extractor, and the hash that names the data."""

    features: Float[Tensor, "n d"]
    sha256: str

    @functools.cached_property
    def within(self) -> Float[Tensor, " n"]:
        """What `metrics.kid` sums over the data alone: the same for every comparison, and the most of its time."""
        return within_sums(self.features)

    def distances(self, extracted: Float[Tensor, "m d"]) -> Distances:
        """FID and KID of pictures with these features to the data."""
        return distances(extracted, self.features, "fixed", _generator(), self.within)


@dataclass(frozen=True)
class StepDistances:
    """Distances of the noisy samples after `steps` sampling steps from full precision's, and of those from other noise."""

    steps: int
    to_reference: Distances
    floor: Distances


@dataclass(frozen=True)
class ReferenceRun:
    """Full precision, sampled once; everything that quantized models are compared with.

    `floor` is the distance of its samples from those of other noise. `floor_to_data` is the distance of the latter from the data.
    `step_features` are features and floor of its samples after some of the steps (pixel models only). `traced` are trajectories for
    `accumulation`, None where they are not asked for, or for the reason in `untraced`.
    """

    name: str
    protocol: SamplingProtocol
    scheduler: dict[str, Any]
    weights_sha256: str
    device: str
    dtype: str
    pictures: UInt8[Tensor, "n c h w"]
    last_samples: Float[Tensor, "n *shape"]
    trajectory: Trajectory
    seconds: float
    extractor: FeatureExtractor | None
    data: DataStatistics | None
    features: Float[Tensor, "n d"] | None
    floor: Distances | None
    to_data: Distances | None
    floor_to_data: Distances | None
    legibility: Interval | None
    accuracy: Interval | None = None
    step_features: dict[int, tuple[Tensor, Distances]] = field(default_factory=dict)
    traced: Rollout | None = None
    untraced: str | None = None
    scorer: PromptScorer | None = None
    clip: Interval | None = None


@dataclass(frozen=True)
class Comparison:
    """What a quantized model does to the samples of a reference run.

    `drift` is the mean relative L2 of the latents after each step, `noise_sqnr_db` the mean SQNR of the predicted noise; both over
    the samples whose trajectories are kept, and both with what earlier steps did to the input. `final_errors` is the relative L2 of
    every last sample, paired with the reference's noise. PSNR is pooled over pairs. `accuracy` is the share of pictures that show
    what was asked for, where the extractor can tell; `clip` the mean CLIP score. `engine` is what the model computed with.
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


def run_reference(
    pipe: Pipeline,
    protocol: SamplingProtocol,
    *,
    name: str = "full precision",
    features: FeatureExtractor | None = None,
    data: DataStatistics | None = None,
    clip: PromptScorer | None = None,
    progress: OnProgress | None = None,
) -> ReferenceRun:
    """Sample full precision, and keep what comparisons need.

    Raises EvaluationError on non-finite samples, on data without an extractor, on a scorer of prompts where there are none, and
    where trajectories would take more than `MEMORY_LIMIT` bytes.
    """
    if data is not None and features is None:
        raise EvaluationError("data: statistics are given without an extractor; pass the extractor that made them")
    _, denoiser = find_denoiser(pipe)
    protocol = resolved(pipe, protocol)
    if clip is not None and protocol.prompts is None:
        raise EvaluationError(f"clip: {type(pipe).__name__} takes no prompts to compare pictures with; leave it out")
    keeper = Keeper(name, protocol)
    snapshots = _Snapshots(keeper, pipe, protocol, features)
    drawn = sample(pipe, protocol, on_step=snapshots, progress=progress, name=name)
    pictures = drawn.pictures
    with scheduler_of(pipe, protocol) as scheduler:
        scheduler_config = _scheduler_config(scheduler)

    extracted = floor = to_data = floor_to_data = legibility = accuracy = None
    step_features: dict[int, tuple[Tensor, Distances]] = {}
    if features is not None:
        others = _Snapshots(finite_only(name), pipe, protocol, features)
        other = sample(pipe, protocol, seed=protocol.floor_seed, on_step=others, progress=progress, name=f"{name}, other noise")
        for (steps, mine), theirs in zip(snapshots.features().items(), others.features().values(), strict=True):
            step_features[steps] = mine, distances(mine, theirs, "independent", _generator())
        extracted, other_extracted = (_extract(features, p) for p in (pictures, other.pictures))
        floor = distances(extracted, other_extracted, "independent", _generator())
        legibility, accuracy = _legibility(features, pictures), _accuracy(features, pictures, protocol)
        if data is not None:
            to_data, floor_to_data = data.distances(extracted), data.distances(other_extracted)
    traced, untraced = _trace(pipe, protocol)
    return ReferenceRun(
        name=name,
        protocol=protocol,
        scheduler=scheduler_config,
        weights_sha256=model_hash(denoiser),
        device=_device(pipe),
        dtype=str(denoiser.dtype).removeprefix("torch."),
        pictures=pictures,
        last_samples=drawn.last_samples,
        trajectory=keeper.trajectory(),
        seconds=drawn.seconds,
        extractor=features,
        data=data,
        features=extracted,
        floor=floor,
        to_data=to_data,
        floor_to_data=floor_to_data,
        legibility=legibility,
        accuracy=accuracy,
        step_features=step_features,
        traced=traced,
        untraced=untraced,
        scorer=clip,
        clip=_clip(clip, pictures, protocol),
    )


def compare_to(
    reference: ReferenceRun, quantized_pipe: Pipeline, *, name: str = "quantized", progress: OnProgress | None = None
) -> Comparison:
    """Send the noise of a reference run through a quantized pipeline and compare.

    Raises EvaluationError if the two schedulers differ, or if samples are not finite.
    """
    protocol = reference.protocol
    with scheduler_of(quantized_pipe, protocol) as scheduler:
        _check_schedulers(reference, _scheduler_config(scheduler), name)
    differ = Differ(name, reference.trajectory)
    snapshots = _Snapshots(differ, quantized_pipe, protocol, reference.extractor)
    drawn = sample(quantized_pipe, protocol, on_step=snapshots, progress=progress, name=name)
    pictures = drawn.pictures
    final_errors = relative_l2(reference.last_samples, drawn.last_samples)

    to_reference = to_data = legibility = accuracy = None
    if reference.extractor is not None and reference.features is not None:
        extracted = _extract(reference.extractor, pictures)
        to_reference = distances(extracted, reference.features, "paired", _generator())
        legibility, accuracy = _legibility(reference.extractor, pictures), _accuracy(reference.extractor, pictures, protocol)
        if reference.data is not None:
            to_data = reference.data.distances(extracted)
    return Comparison(
        name=name,
        timesteps=reference.trajectory.timesteps,
        drift=tuple(differ.drift.mean(dim=1).tolist()),
        noise_sqnr_db=tuple(differ.noise_sqnr_db.mean(dim=1).tolist()),
        final_errors=final_errors,
        final_error=bootstrap_mean(final_errors, _generator()),
        final_error_median=bootstrap_median(final_errors, _generator()),
        psnr=pooled_psnr(bootstrap_mean(mean_squared_error(reference.pictures, pictures), _generator())),
        psnr_median=float(psnr(reference.pictures, pictures).median()),
        ssim=bootstrap_mean(ssim(reference.pictures, pictures), _generator()),
        to_reference=to_reference,
        to_data=to_data,
        legibility=legibility,
        accuracy=accuracy,
        by_step=tuple(
            StepDistances(steps, distances(found, reference.step_features[steps][0], "paired", _generator()), floor)
            for (steps, found), (_, floor) in zip(snapshots.features().items(), reference.step_features.values(), strict=True)
        ),
        accumulation=_accumulation(reference, quantized_pipe, name, progress),
        clip=_clip(reference.scorer, pictures, protocol),
        pictures=pictures,
        seconds=drawn.seconds,
        engine=engine_of(find_denoiser(quantized_pipe)[1]),
    )


def final_error_ratio(numerator: Comparison, denominator: Comparison) -> Interval:
    """Mean final error of one quantized model over that of another, paired by noise: below 1, the first is nearer.

    Both have to come from the same reference run. Raises EvaluationError if they hold different numbers of samples.
    """
    if len(numerator.final_errors) != len(denominator.final_errors):
        counts = f"{len(numerator.final_errors)} and {len(denominator.final_errors)}"
        raise EvaluationError(f"final_error_ratio: {counts} samples; compare both with one reference run")
    return bootstrap_ratio_of_means(numerator.final_errors, denominator.final_errors, _generator())


class _Snapshots:
    """Observer that passes every step on, and keeps the noisy samples after some steps, as pictures, where they are pictures."""

    def __init__(self, inner: OnStep, pipe: Pipeline, protocol: SamplingProtocol, extractor: FeatureExtractor | None) -> None:
        self.inner, self.extractor = inner, extractor
        wanted = sorted({round(share * protocol.steps) for share in SNAPSHOTS} - {0, protocol.steps})
        self.pictures: dict[int, list[Tensor]] = {steps: [] for steps in wanted if extractor is not None and is_unconditional(pipe)}

    def __call__(self, indices: range, result: StepResult) -> None:
        self.inner(indices, result)
        if result.step + 1 in self.pictures:
            self.pictures[result.step + 1].append(to_uint8(result.sample_after.float().cpu()))

    def features(self) -> dict[int, Tensor]:
        """Features of all samples, by the number of steps done."""
        if self.extractor is None:
            return {}
        return {steps: _extract(self.extractor, torch.cat(batches)) for steps, batches in self.pictures.items()}


def _trace(pipe: Pipeline, protocol: SamplingProtocol) -> tuple[Rollout | None, str | None]:
    """Trajectories to accumulate errors along, or why there are none."""
    if protocol.accumulation_samples == 0:
        return None, None
    try:
        return trace(pipe, protocol), None
    except CalibrationError as error:
        return None, str(error)


def _accumulation(reference: ReferenceRun, pipe: Pipeline, name: str, progress: OnProgress | None) -> Accumulation | None:
    if reference.traced is None:
        return None
    with evaluation_mode(pipe):
        return accumulation(reference.traced, find_denoiser(pipe)[1], name=name, progress=progress)


def _scheduler_config(scheduler: Any) -> dict[str, Any]:
    """The scheduler's class and configuration as JSON values, without where and by which version it was written."""
    config: dict[str, Any] = json.loads(scheduler.to_json_string())
    return {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}


def _check_schedulers(reference: ReferenceRun, config: dict[str, Any], name: str) -> None:
    keys = sorted(key for key in reference.scheduler.keys() | config.keys() if reference.scheduler.get(key) != config.get(key))
    if keys:
        found = ", ".join(f"{key} {config.get(key)} (full precision: {reference.scheduler.get(key)})" for key in keys)
        raise EvaluationError(f"{name}: its scheduler differs: {found}; give both pipelines the same scheduler")


def _extract(extractor: FeatureExtractor, pictures: Tensor) -> Tensor:
    return torch.cat([extractor.features(batch).cpu().double() for batch in _batches(pictures)])


def _batches(pictures: Tensor) -> list[Tensor]:
    return [pictures[start : start + FEATURE_BATCH] for start in range(0, len(pictures), FEATURE_BATCH)]


def _legibility(extractor: FeatureExtractor, pictures: Tensor) -> Interval | None:
    scores = [extractor.confidence(batch) for batch in _batches(pictures)]
    present = [score.cpu() for score in scores if score is not None]
    return bootstrap_mean(torch.cat(present), _generator()) if present else None


def _accuracy(extractor: FeatureExtractor, pictures: Tensor, protocol: SamplingProtocol) -> Interval | None:
    asked = conditions_of(protocol)
    if not asked:
        return None
    parts = zip(_batches(pictures), (asked[i : i + FEATURE_BATCH] for i in range(0, len(asked), FEATURE_BATCH)), strict=True)
    found = [extractor.agreement(batch, wanted) for batch, wanted in parts]
    present = [share.cpu() for share in found if share is not None]
    return bootstrap_mean(torch.cat(present), _generator()) if present else None


def _clip(scorer: PromptScorer | None, pictures: Tensor, protocol: SamplingProtocol) -> Interval | None:
    if scorer is None:
        return None
    prompts = [str(prompt) for prompt in conditions_of(protocol)]
    return bootstrap_mean(scorer.score(pictures, prompts).double().cpu(), _generator())


def _device(pipe: Pipeline) -> str:
    return f"cuda ({torch.cuda.get_device_name(pipe.device)})" if pipe.device.type == "cuda" else str(pipe.device)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(INTERVAL_SEED)

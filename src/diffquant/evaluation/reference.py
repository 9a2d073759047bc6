"""Full precision, sampled once, and everything that quantized models are compared with."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffquant.calibration.recording import model_hash
from diffquant.calibration.rollout import Rollout
from diffquant.errors import CalibrationError, EvaluationError
from diffquant.evaluation.accumulation import trace
from diffquant.evaluation.distances import Distances, distances
from diffquant.evaluation.draws import draw
from diffquant.evaluation.features import (
    DataStatistics,
    FeatureExtractor,
    PromptScorer,
    accuracy,
    clip_score,
    extract,
    interval_generator,
    legibility,
    mean,
)
from diffquant.evaluation.metrics import Interval
from diffquant.evaluation.observers import Trajectory
from diffquant.evaluation.sampling import OnProgress
from diffquant.evaluation.sampling_protocol import SamplingProtocol, is_unconditional, resolved, scheduler_config
from diffquant.host.pipeline import Host, Pipeline

SNAPSHOTS = (0.2, 0.4, 0.6, 0.8)  # shares of the sampling steps after which pixel models are compared as sets of pictures


@dataclass(frozen=True)
class ReferenceRun:
    """Full precision, sampled once; everything that quantized models are compared with.

    `floor` is the distance of its samples from those of other noise. `floor_to_data` is the distance of the latter from the data.
    `legible` is the legibility of each picture.
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
    last_samples: Float[Tensor, n * shape]
    trajectory: Trajectory
    seconds: float | None
    extractor: FeatureExtractor | None
    data: DataStatistics | None
    features: Float[Tensor, "n d"] | None
    floor: Distances | None
    to_data: Distances | None
    floor_to_data: Distances | None
    legibility: Interval | None
    legible: Float[Tensor, " n"] | None = None
    accuracy: Interval | None = None
    step_features: dict[int, tuple[Tensor, Distances]] = field(default_factory=dict)
    traced: Rollout | None = None
    untraced: str | None = None
    scorer: PromptScorer | None = None
    clip: Interval | None = None


def run_reference(
    pipe: Pipeline,
    protocol: SamplingProtocol,
    *,
    name: str = "full precision",
    features: FeatureExtractor | None = None,
    data: DataStatistics | None = None,
    clip: PromptScorer | None = None,
    folder: Path | None = None,
    progress: OnProgress | None = None,
) -> ReferenceRun:
    """Sample full precision, twice where features are given (the second time through other noise, for the floor).

    With a `folder` what was drawn stays there, and is taken from there the next time.

    Raises EvaluationError on non-finite samples, on data without an extractor, on a scorer of prompts where there are none, and
    where trajectories would take more than `MEMORY_LIMIT` bytes.
    """
    if data is not None and features is None:
        raise EvaluationError("data: statistics are given without an extractor; pass the extractor that made them")
    denoiser = Host(pipe).denoiser
    protocol = resolved(pipe, protocol)
    if clip is not None and protocol.prompts is None:
        raise EvaluationError(f"clip: {type(pipe).__name__} takes no prompts to compare pictures with; leave it out")
    snapshots = snapshot_steps(pipe, protocol, features)
    drawing = functools.partial(draw, pipe, protocol, snapshots=snapshots, folder=folder, progress=progress)
    drawn = drawing(seed=protocol.seed, name=name, trajectory=True)
    assert drawn.trajectory is not None

    extracted = floor = to_data = floor_to_data = legible = accurate = None
    step_features: dict[int, tuple[Tensor, Distances]] = {}
    if features is not None:
        other = drawing(seed=protocol.floor_seed, name=f"{name}, other noise")
        for steps in drawn.noisy:
            mine, theirs = (extract(features, each.noisy[steps]) for each in (drawn, other))
            step_features[steps] = mine, distances(mine, theirs, "independent", interval_generator())
        extracted, other_extracted = (extract(features, each.pictures) for each in (drawn, other))
        floor = distances(extracted, other_extracted, "independent", interval_generator())
        legible, accurate = legibility(features, drawn.pictures), accuracy(features, drawn.pictures, protocol)
        if data is not None:
            to_data, floor_to_data = data.distances(extracted), data.distances(other_extracted)
    traced, untraced = _trace(pipe, protocol)
    return ReferenceRun(
        name=name,
        protocol=protocol,
        scheduler=scheduler_config(pipe, protocol),
        weights_sha256=model_hash(denoiser),
        device=_device(pipe),
        dtype=str(denoiser.dtype).removeprefix("torch."),
        pictures=drawn.pictures,
        last_samples=drawn.last_samples,
        trajectory=drawn.trajectory,
        seconds=drawn.seconds,
        extractor=features,
        data=data,
        features=extracted,
        floor=floor,
        to_data=to_data,
        floor_to_data=floor_to_data,
        legibility=mean(legible),
        legible=legible,
        accuracy=accurate,
        step_features=step_features,
        traced=traced,
        untraced=untraced,
        scorer=clip,
        clip=clip_score(clip, drawn.pictures, protocol),
    )


def snapshot_steps(pipe: Pipeline, protocol: SamplingProtocol, extractor: FeatureExtractor | None) -> list[int]:
    """After how many steps noisy samples are compared; none where they are no pictures, or nothing compares them."""
    if extractor is None or not is_unconditional(pipe):
        return []
    return sorted({round(share * protocol.steps) for share in SNAPSHOTS} - {0, protocol.steps})


def _trace(pipe: Pipeline, protocol: SamplingProtocol) -> tuple[Rollout | None, str | None]:
    """Trajectories to accumulate errors along, or why there are none."""
    if protocol.accumulation_samples == 0:
        return None, None
    try:
        return trace(pipe, protocol), None
    except CalibrationError as error:
        return None, str(error)


def _device(pipe: Pipeline) -> str:
    return f"cuda ({torch.cuda.get_device_name(pipe.device)})" if pipe.device.type == "cuda" else str(pipe.device)

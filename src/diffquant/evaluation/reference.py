"""`run_reference`: full precision, sampled once, and what metrics compute from it once."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from diffquant.errors import EvaluationError
from diffquant.evaluation.features import DataStatistics, FeatureExtractor, PromptScorer
from diffquant.evaluation.metrics import registered
from diffquant.evaluation.provenance import protocol_of
from diffquant.evaluation.runs import Reference, Samples
from diffquant.host.pipeline import Host, Pipeline
from diffquant.sampling.cache import draw
from diffquant.sampling.protocol import SamplingProtocol, resolved
from diffquant.sampling.sample import OnProgress

SNAPSHOTS = (0.2, 0.4, 0.6, 0.8)  # shares of the sampling steps after which pixel models are compared as sets of pictures


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
) -> Reference:
    """Sample full precision, twice where features are given (the second time through other noise, for the floor).

    With a `folder` what was drawn stays there, and is taken from there the next time.

    Raises EvaluationError on non-finite samples, on data without an extractor, on a scorer of prompts where there are none, and
    where trajectories would take more than `MEMORY_LIMIT` bytes.
    """
    if data is not None and features is None:
        raise EvaluationError("data: statistics are given without an extractor; pass the extractor that made them")
    protocol = resolved(pipe, protocol)
    if clip is not None and protocol.prompts is None:
        raise EvaluationError(f"clip: {type(pipe).__name__} takes no prompts to compare pictures with; leave it out")
    snapshots: list[int] = []
    if features is not None and Host(pipe).unconditional:
        snapshots = sorted({round(share * protocol.steps) for share in SNAPSHOTS} - {0, protocol.steps})
    drawing = functools.partial(draw, pipe, protocol, snapshots=snapshots, folder=folder, progress=progress)
    drawn = drawing(seed=protocol.seed, name=name, trajectory=True)
    assert drawn.trajectory is not None
    other = None
    if features is not None:
        beside = drawing(seed=protocol.floor_seed, name=f"{name}, other noise")
        other = Samples(beside.pictures, beside.last_samples, beside.noisy, features)
    reference = Reference(
        pipe=pipe,
        protocol=protocol_of(name, pipe, protocol, features, data, clip),
        samples=Samples(drawn.pictures, drawn.last_samples, drawn.noisy, features),
        trajectory=drawn.trajectory,
        seconds=drawn.seconds,
        data=data,
        scorer=clip,
    )
    prepared = {metric.name: metric.prepare(reference, other) for metric in registered().values()}
    return dataclasses.replace(reference, prepared=prepared)

"""The same noise through full precision and quantized models, and what differs.

`run_reference` samples full precision, `compare_to` then compares any number of quantized pipelines with it, and
`measure_reference` has the figures of full precision itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from diffquant.engines.base import engine_of
from diffquant.errors import EvaluationError
from diffquant.evaluation.features import DataStatistics, FeatureExtractor, PromptScorer
from diffquant.evaluation.measurement import Measurement
from diffquant.evaluation.metrics import registered
from diffquant.evaluation.provenance import protocol_of
from diffquant.evaluation.runs import Differ, Reference, Run, Samples
from diffquant.host.pipeline import Host, Pipeline
from diffquant.sampling.cache import Draw, draw
from diffquant.sampling.observers import Snapshots
from diffquant.sampling.protocol import SamplingProtocol, resolved, scheduler_config
from diffquant.sampling.sample import OnProgress, sample

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
    """Sample full precision; with an extractor also through other noise, for the floor.

    `folder` caches what was drawn.
    Raises EvaluationError for samples that are not finite, data without an extractor, a scorer of prompts where there are none, and
    trajectories of more than `MEMORY_LIMIT` bytes.
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
        other = _samples(drawing(seed=protocol.floor_seed, name=f"{name}, other noise"), features)
    reference = Reference(
        pipe=pipe,
        protocol=protocol_of(name, pipe, protocol, features, data, clip),
        samples=_samples(drawn, features),
        trajectory=drawn.trajectory,
        seconds=drawn.seconds,
        data=data,
        scorer=clip,
    )
    prepared = {metric.name: metric.prepare(reference, other) for metric in registered().values()}
    return replace(reference, prepared=prepared)


def _samples(drawn: Draw, features: FeatureExtractor | None) -> Samples:
    return Samples(drawn.pictures, drawn.last_samples, drawn.noisy, features)


@dataclass(frozen=True)
class Comparison:
    """What was measured of a model, and what is not part of a report.

    `final_errors` is the relative L2 of every last sample, paired with full precision's of the same noise.
    """

    measurement: Measurement
    pictures: UInt8[Tensor, "n c h w"]
    final_errors: Float[Tensor, " n"]

    @property
    def figures(self) -> dict[str, Any]:
        """What was measured, by the metric's name."""
        return self.measurement.figures


def measure_reference(reference: Reference) -> Comparison:
    """The figures of full precision itself."""
    return _measured(Run(reference.name, reference.pipe, reference, reference.samples), reference.seconds)


def compare_to(
    reference: Reference, quantized_pipe: Pipeline, *, name: str = "quantized", progress: OnProgress | None = None
) -> Comparison:
    """Send the noise of a reference run through a quantized pipeline and compare.

    Raises EvaluationError if the two schedulers differ, or if samples are not finite.
    """
    protocol = reference.protocol.sampling
    full, config = reference.protocol.scheduler, scheduler_config(quantized_pipe, protocol)
    if keys := sorted(key for key in full.keys() | config.keys() if full.get(key) != config.get(key)):
        values = ", ".join(f"{key} {config.get(key)} (full precision: {full.get(key)})" for key in keys)
        raise EvaluationError(f"{name}: its scheduler differs: {values}; give both pipelines the same scheduler")
    differ = Differ(name, reference.trajectory)
    snapshots = Snapshots(name, list(reference.samples.noisy), differ)
    drawn = sample(quantized_pipe, protocol, on_step=snapshots, progress=progress, name=name)
    samples = Samples(drawn.pictures, drawn.last_samples, snapshots.pictures(), reference.extractor)
    engine = engine_of(Host(quantized_pipe).denoiser)
    return _measured(Run(name, quantized_pipe, reference, samples, differ, progress), drawn.seconds, engine)


def _measured(run: Run, seconds: float | None, engine: str = "") -> Comparison:
    """All figures that apply to a run."""
    metrics, figures = registered(), {}
    for name, prepared in run.reference.prepared.items():
        if run.steps is not None or metrics[name].of_reference:
            figure = metrics[name].compute(run, prepared)
            if figure is not None:
                figures[name] = figure
    measurement = Measurement(name=run.name, engine=engine, seconds=seconds, figures=figures)
    return Comparison(measurement, run.samples.pictures, run.final_errors)

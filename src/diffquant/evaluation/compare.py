"""The same noise through full precision and quantized models, and what differs.

`run_reference` samples full precision, `compare_to` then compares any number of quantized pipelines with it, and
`measure_reference` has the figures of full precision itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from diffquant.engines.base import engine_of
from diffquant.errors import EvaluationError
from diffquant.evaluation.differ import Differ
from diffquant.evaluation.intervals import Interval, bootstrap_ratio_of_means, interval_generator
from diffquant.evaluation.measurement import Measurement
from diffquant.evaluation.metrics import registered
from diffquant.evaluation.runs import Reference, Run, Samples
from diffquant.host.pipeline import Host, Pipeline
from diffquant.sampling.observers import Snapshots
from diffquant.sampling.protocol import scheduler_config
from diffquant.sampling.sample import OnProgress, sample


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
    _check_schedulers(reference.protocol.scheduler, scheduler_config(quantized_pipe, protocol), name)
    differ = Differ(name, reference.trajectory)
    snapshots = Snapshots(differ, list(reference.samples.noisy))
    drawn = sample(quantized_pipe, protocol, on_step=snapshots, progress=progress, name=name)
    samples = Samples(drawn.pictures, drawn.last_samples, snapshots.pictures(), reference.extractor)
    engine = engine_of(Host(quantized_pipe).denoiser)
    return _measured(Run(name, quantized_pipe, reference, samples, differ, progress), drawn.seconds, engine)


def final_error_ratio(numerator: Comparison, denominator: Comparison) -> Interval:
    """Mean final error of one quantized model over that of another, paired by noise: below 1, the first is nearer.

    Both have to come from the same reference run. Raises EvaluationError if they hold different numbers of samples.
    """
    if len(numerator.final_errors) != len(denominator.final_errors):
        counts = f"{len(numerator.final_errors)} and {len(denominator.final_errors)}"
        raise EvaluationError(f"final_error_ratio: {counts} samples; compare both with one reference run")
    return bootstrap_ratio_of_means(numerator.final_errors, denominator.final_errors, interval_generator())


def _measured(run: Run, seconds: float | None, engine: str = "") -> Comparison:
    """All figures that apply to a run."""
    metrics, prepared = registered(), run.reference.prepared
    of_reference = run.steps is None
    figures = {
        name: metrics[name].compute(run, prepared[name]) for name in prepared if metrics[name].of_reference or not of_reference
    }
    measured = {name: figure for name, figure in figures.items() if figure is not None}
    measurement = Measurement(name=run.name, engine=engine, seconds=seconds, figures=measured)
    return Comparison(measurement, run.samples.pictures, run.final_errors)


def _check_schedulers(full: dict[str, Any], config: dict[str, Any], name: str) -> None:
    keys = sorted(key for key in full.keys() | config.keys() if full.get(key) != config.get(key))
    if keys:
        values = ", ".join(f"{key} {config.get(key)} (full precision: {full.get(key)})" for key in keys)
        raise EvaluationError(f"{name}: its scheduler differs: {values}; give both pipelines the same scheduler")

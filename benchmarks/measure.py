"""Figures of one quantized model against full precision: what the studies and scripts share, and where they reach into the package.

`figures_of` is the only place that knows the measurements of a report, `compared` the only one that knows single samples.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import rows
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import diffquant as dq
from diffquant import zoo
from diffquant.calibration.rollout import Rollout
from diffquant.checkpoint.folder import file_size
from diffquant.evaluation.compare import compare_to, measure_reference, run_reference
from diffquant.evaluation.report import make_report
from diffquant.evaluation.runs import Reference
from diffquant.host.pipeline import Host
from diffquant.methods.noise_correction import by_channel
from diffquant.sampling.correction import attachment_of
from diffquant.sampling.protocol import scheduler_config

OnProgress = Callable[[str, int, int], None]


class Measured(NamedTuple):
    """Columns of a row, and the relative error of every last sample."""

    figures: rows.Row
    errors: Tensor


def denoiser_of(pipe: Any) -> nn.Module:
    """The model of a pipeline that is quantized."""
    denoiser: nn.Module = Host(pipe).denoiser
    return denoiser


def protocol_of(pipe: Any, protocol: dq.SamplingProtocol) -> str:
    """The text of the column `protocol`."""
    scheduler = scheduler_config(pipe, protocol)
    return rows.protocol_text(
        sampler=scheduler["_class_name"].removesuffix("Scheduler"),
        steps=protocol.steps,
        eta=protocol.eta,
        guidance="default" if protocol.guidance_scale is None else float(protocol.guidance_scale),
        clip="yes" if scheduler.get("clip_sample") and clips(scheduler["_class_name"]) else "no",
        seed=protocol.seed,
    )


def clips(scheduler: str) -> bool:
    """Whether schedulers of a class can clip; others keep the option of the configuration that they were built from unused."""
    return "clip_sample" in inspect.signature(getattr(diffusers, scheduler)).parameters


def full_precision(pipe: Any, protocol: dq.SamplingProtocol, folder: Path, progress: OnProgress | None = None) -> Reference:
    """Full precision sampled once, or taken from `folder`."""
    classifier, data = zoo.load("glyph-classifier"), zoo.load_statistics()
    return run_reference(pipe, protocol, features=classifier, data=data, folder=folder, progress=progress)


def compared(reference: Reference, pipe: Any, folder: Path, progress: OnProgress | None = None) -> Measured:
    """A quantized pipeline against full precision, on the same noise; `folder` is its checkpoint's."""
    comparison = compare_to(reference, pipe, name="quantized", progress=progress)
    report = make_report(reference.protocol, [measure_reference(reference), comparison], {"quantized": file_size(folder)})
    figures = figures_of(report.measurements[1], reference.protocol.sampling.samples)
    legibility = report.measurements[0].figures.get("legibility")
    if legibility is not None:
        figures["legibility_full_precision"] = legibility.mean.value
    return Measured(figures, comparison.final_errors)


def figures_of(measurement: Any, samples: int) -> rows.Row:
    """The columns that a measurement of a report fills."""
    figures: rows.Row = {}
    measured = measurement.figures
    fid, to_data, legibility = (measured.get(name) for name in ("fid_to_reference", "fid_to_data", "legibility"))
    for column, interval in (
        ("final_error", measured.get("final_error")),
        ("final_error_median", measured.get("final_error_median")),
        ("psnr", measured.get("psnr")),
        ("fid_to_data_change", to_data and to_data.change),
        ("legibility", legibility and legibility.mean),
        ("legibility_change", legibility and legibility.change),
        ("accuracy", measured.get("accuracy")),
    ):
        if interval is not None:
            figures |= {column: interval.value, f"{column}_low": interval.low, f"{column}_high": interval.high}
    for column, distances in (("fid", fid), ("fid_to_data", to_data)):
        if distances is not None:
            figures |= fid_columns(column, distances.distance)
    if fid is not None:
        figures["fid_floor"] = fid.floor.value
    if measurement.seconds is not None:
        figures["seconds_a_picture"] = measurement.seconds / samples
    drift = measured["drift"].values
    shown = " ".join(f"{value:.4g}" for value in drift[:: max(1, len(drift) // 10)])
    return figures | {"drift": shown, "bytes": measurement.file_bytes, "engine": measurement.engine}


def fid_columns(column: str, fid: Any) -> rows.Row:
    """An FID, and its extrapolation to infinitely many samples with the interval, where there is one."""
    if fid.extrapolated is None:
        return {column: fid.value}
    interval = {"": fid.extrapolated, "_low": fid.low, "_high": fid.high}
    return {column: fid.value} | {f"{column}_extrapolated{end}": value for end, value in interval.items()}


def single_steps(rollout: Rollout, pipe: Any, trajectories: int) -> rows.Row:
    """Columns of the squared error of single steps; none for a pipeline with a correction while sampling."""
    if trajectories == 0 or attachment_of(pipe) is not None:
        return {}
    error, mean = squared_error(rollout, denoiser_of(pipe), 1, trajectories)
    return {"single_step_error": error, "single_step_mean": mean}


def squared_error(rollout: Rollout, model: nn.Module, steps: int, trajectories: int) -> tuple[float, float]:
    """Summed over segments of `steps` steps, started in full precision: the mean squared distance at their ends, and the mean's."""
    along, total, shifted = rollout.through(model), 0.0, 0.0
    with torch.no_grad():
        for segment in track(
            rollout.segments(steps), f"M = {steps}", transient=True, console=Console(stderr=True), disable=steps == 1
        ):
            chain = along.chain(torch.arange(trajectories), segment)
            latents, _ = chain.run()
            distance = by_channel(latents[-1] - chain.recorded(len(segment)))
            total += float(distance.square().mean())
            shifted += float(distance.mean(dim=1).square().mean())
    return total, shifted


def rollout_of(pipe: Any, data: dq.Trajectory) -> Rollout:
    """Recorded trajectories, to run models along."""
    return Rollout(denoiser_of(pipe), data)

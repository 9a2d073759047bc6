"""`evaluate`: quantized models against full precision in one call, as a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffquant.checkpoint.folder import file_size, float32_size, load
from diffquant.evaluation.compare import compare_to, measure_reference
from diffquant.evaluation.extra import require_extra
from diffquant.evaluation.features import DataStatistics, FeatureExtractor, PromptScorer
from diffquant.evaluation.reference import run_reference
from diffquant.evaluation.report import Report, make_report
from diffquant.host.pipeline import Host, Pipeline
from diffquant.sampling.protocol import SamplingProtocol
from diffquant.sampling.sample import OnProgress


def evaluate(
    quantized: Pipeline | str | Path | Mapping[str, Pipeline | str | Path],
    reference: Pipeline | str | Path,
    *,
    protocol: SamplingProtocol | None = None,
    samples: int | None = None,
    features: FeatureExtractor | None = None,
    data: DataStatistics | None = None,
    clip: PromptScorer | None = None,
    out: str | Path | None = None,
    work: str | Path | None = None,
    progress: OnProgress | None = None,
) -> Report:
    """Send the same noise through `reference` and every model of `quantized`, and report what was lost.

    Models are pipelines, or folders to load them from (then the report has their file sizes); several are given by name, and none
    by an empty mapping, which reports full precision alone. `samples` is short for a protocol that differs from the default in
    nothing else. `clip` scores pictures by their prompts
    (`diffquant.evaluation.clip.ClipScore`). With `out` the report is written there:
    ``report.json``, ``report.md``, ``pairs.png``, ``drift.png``, ``accumulation.png``.

    With `work` full precision's samples and trajectories are kept in that folder, and taken from it where nothing that decides them
    has changed; the report then has no sampling time of full precision.

    Raises `EvaluationError` where samples are not finite, the schedulers differ, or the extra ``evaluate`` is not installed.
    """
    require_extra()
    protocol = protocol or (SamplingProtocol() if samples is None else SamplingProtocol(samples=samples))
    named = dict(quantized) if isinstance(quantized, Mapping) else {"quantized": quantized}
    full = load(reference) if isinstance(reference, str | Path) else reference
    folder = None if work is None else Path(work)
    run = run_reference(full, protocol, features=features, data=data, clip=clip, folder=folder, progress=progress)
    sizes = {run.name: float32_size(Host(full).denoiser)}
    comparisons = [measure_reference(run)]
    for name, model in named.items():
        if isinstance(model, str | Path):
            sizes[name] = file_size(model)
        pipe = load(model) if isinstance(model, str | Path) else model
        comparisons.append(compare_to(run, pipe, name=name, progress=progress))
        del pipe
    report = make_report(run.protocol, comparisons, sizes)
    if out is not None:
        report.write(Path(out))
    return report

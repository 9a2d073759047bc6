"""`evaluate`: quantized models against full precision in one call, as a report."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from diffquant.checkpoint.folder import file_size, float32_size, load
from diffquant.errors import EvaluationError
from diffquant.evaluation.compare import compare_to, measure_reference, run_reference
from diffquant.evaluation.features import DataStatistics, FeatureExtractor, PromptScorer
from diffquant.evaluation.report import Report, make_report
from diffquant.host.pipeline import Host, Pipeline
from diffquant.sampling.protocol import SamplingProtocol
from diffquant.sampling.sample import OnProgress

Model = Pipeline | str | Path  # a pipeline, or the folder that it is loaded from
PACKAGES = {"skimage": "scikit-image", "scipy": "scipy", "matplotlib": "matplotlib"}


def require_extra() -> None:
    """Raise `EvaluationError` if a package of the extra ``evaluate`` is not installed."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise EvaluationError(f"{', '.join(missing)}: not installed; pip install 'diffquant[evaluate]'")


def models_by_name(quantized: Model | Mapping[str, Model]) -> dict[str, Model]:
    """Models by the names that reports call them by."""
    return dict(quantized) if isinstance(quantized, Mapping) else {"quantized": quantized}


def opened(model: Model) -> Pipeline:
    """A pipeline, loaded where `model` is a folder."""
    return load(model) if isinstance(model, str | Path) else model


def evaluate(
    quantized: Model | Mapping[str, Model],
    reference: Model,
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

    Models are pipelines, or folders to load them from (then the report has their file sizes). Several are passed by name; an empty
    mapping reports full precision alone. `samples` is short for the default protocol with another number of samples. `clip` scores
    pictures by their prompts (`diffquant.evaluation.clip.ClipScore`).

    `out` is the folder of the report: ``report.json``, ``report.md``, ``pairs.png``, ``drift.png``, ``accumulation.png``.
    `work` caches samples and trajectories of full precision. They are used again if nothing that decides them has changed; the
    report then has no sampling time of full precision.

    Raises `EvaluationError` if samples are not finite, the schedulers differ, or the extra ``evaluate`` is not installed.
    """
    require_extra()
    protocol = protocol or (SamplingProtocol() if samples is None else SamplingProtocol(samples=samples))
    full = opened(reference)
    folder = None if work is None else Path(work)
    run = run_reference(full, protocol, features=features, data=data, clip=clip, folder=folder, progress=progress)
    sizes = {run.name: float32_size(Host(full).denoiser)}
    comparisons = [measure_reference(run)]
    for name, model in models_by_name(quantized).items():
        if isinstance(model, str | Path):
            sizes[name] = file_size(model)
        comparisons.append(compare_to(run, opened(model), name=name, progress=progress))
    report = make_report(run.protocol, comparisons, sizes)
    if out is not None:
        report.write(Path(out))
    return report

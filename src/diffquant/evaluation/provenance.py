"""The provenance of a report's figures: sampling, models, extractor, device and versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from diffquant.calibration.manifest import model_hash
from diffquant.evaluation.distances import GROUPS
from diffquant.evaluation.features import DataStatistics, FeatureExtractor, PromptScorer
from diffquant.evaluation.intervals import RESAMPLES
from diffquant.evaluation.pairs import SSIM_RULE
from diffquant.host.pipeline import Host, Pipeline
from diffquant.sampling.pictures import UINT8_RULE
from diffquant.sampling.protocol import SamplingProtocol, scheduler_config

PACKAGES = ("diffquant", "torch", "diffusers", "numpy", "scipy")
INTERVALS = f"95 %; paired: percentile bootstrap, {RESAMPLES} resamples; FID: delete-a-group jackknife, {GROUPS} groups"


class Protocol(BaseModel):
    """The provenance of a report's figures. Figures of two reports compare only if all of it is equal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampling: SamplingProtocol
    floor_seed: int
    scheduler: dict[str, Any]
    reference: str
    reference_sha256: str
    extractor: str | None
    extractor_sha256: str | None
    data_sha256: str | None
    data_samples: int | None
    clip: str | None = None
    clip_sha256: str | None = None
    uint8_rule: str
    ssim_rule: str
    intervals: str
    versions: dict[str, str]
    device: str
    dtype: str


def protocol_of(
    name: str,
    pipe: Pipeline,
    sampling: SamplingProtocol,
    extractor: FeatureExtractor | None,
    data: DataStatistics | None,
    scorer: PromptScorer | None,
) -> Protocol:
    """The protocol of an evaluation that compares with `pipe`, called `name`."""
    denoiser = Host(pipe).denoiser
    return Protocol(
        sampling=sampling,
        floor_seed=sampling.floor_seed,
        scheduler=scheduler_config(pipe, sampling),
        reference=name,
        reference_sha256=model_hash(denoiser),
        extractor=extractor.name if extractor else None,
        extractor_sha256=extractor.sha256 if extractor else None,
        data_sha256=data.sha256 if data else None,
        data_samples=len(data.features) if data else None,
        clip=scorer.name if scorer else None,
        clip_sha256=scorer.sha256 if scorer else None,
        uint8_rule=UINT8_RULE,
        ssim_rule=SSIM_RULE,
        intervals=INTERVALS,
        versions={package: _version(package) for package in PACKAGES},
        device=f"cuda ({torch.cuda.get_device_name(pipe.device)})" if pipe.device.type == "cuda" else str(pipe.device),
        dtype=str(denoiser.dtype).removeprefix("torch."),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # imported from a source tree

"""What a report holds: the protocol of an evaluation, and a row of figures for each model."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from diffquant.evaluation.accumulation import Accumulation
from diffquant.evaluation.compare import StepDistances
from diffquant.evaluation.distances import Distances
from diffquant.evaluation.metrics import Interval
from diffquant.evaluation.sampling_protocol import SamplingProtocol


class Protocol(BaseModel):
    """How the figures of a report came about; figures of two reports compare only if all of it is equal."""

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


class Row(BaseModel):
    """The figures of one model; the row of the full-precision model has no paired figures.

    `to_reference` is the distance from the full-precision samples of the same noise and `floor` that of full precision from itself
    with other noise; `floor_to_data` is the distance of full precision with other noise from the data. `to_data_change` and
    `legibility_change` are those of `Comparison`. `drift` and `noise_sqnr_db` are per step. `ratio` is `file_bytes` over those of
    full precision.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    name: str
    file_bytes: int | None = None
    ratio: float | None = None
    final_error: Interval | None = None
    final_error_median: Interval | None = None
    psnr: Interval | None = None
    psnr_median: float | None = None
    ssim: Interval | None = None
    to_reference: Distances | None = None
    floor: Distances | None = None
    to_data: Distances | None = None
    floor_to_data: Distances | None = None
    legibility: Interval | None = None
    to_data_change: Interval | None = None
    legibility_change: Interval | None = None
    accuracy: Interval | None = None
    clip: Interval | None = None
    seconds: float | None
    engine: str = ""
    timesteps: tuple[float, ...] = ()
    drift: tuple[float, ...] = ()
    noise_sqnr_db: tuple[float, ...] = ()
    by_step: tuple[StepDistances, ...] = ()
    accumulation: Accumulation | None = None

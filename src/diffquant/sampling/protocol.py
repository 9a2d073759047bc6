"""`SamplingProtocol`: everything that decides which samples are drawn; and the scheduler and conditions of a pipeline under it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from diffquant.errors import CalibrationError, EvaluationError
from diffquant.host.conditions import Calibration
from diffquant.host.pipeline import Host, Pipeline
from diffquant.host.scheduler import SCHEDULERS, clipping, is_flow_matching, of_class
from diffquant.sampling.correction import attachment_of

SAMPLERS = ("pipeline", *SCHEDULERS)


@dataclass(frozen=True)
class SamplingProtocol:
    """Everything that decides which samples are drawn.

    `sampler` "pipeline" is the pipeline's own scheduler. The others are built from its configuration, unless it is of that class
    already; an attached correction goes with them. `eta` scales the noise that DDIM injects. `clip_sample`: whether the scheduler
    clips the sample that it predicts; None: as configured. None for `guidance_scale`, `height` and `width` (of the pictures, in
    pixels) is the pipeline's default. Prompts and class labels are cycled over the samples; None means those that calibration uses.
    Single steps are compared on the first `trajectory_samples` samples, last samples on all. How errors accumulate is measured on
    `accumulation_samples` trajectories, which takes about ten times their sampling; 0 leaves it out.
    """

    samples: int = 1000
    steps: int = 50
    seed: int = 0
    sampler: str = "pipeline"
    eta: float = 0.0
    clip_sample: bool | None = None
    batch_size: int = 64
    guidance_scale: float | None = None
    prompts: tuple[str, ...] | None = None
    class_labels: tuple[int, ...] | None = None
    trajectory_samples: int = 256
    accumulation_samples: int = 32
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("samples", 1),
            ("steps", 1),
            ("seed", 0),
            ("batch_size", 1),
            ("trajectory_samples", 1),
            ("accumulation_samples", 0),
            ("height", 1),
            ("width", 1),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise EvaluationError(f"protocol.{name}: is {value}; at least {least} is allowed")
        if (self.height is None) != (self.width is None):  # pipelines take one alone for none
            raise EvaluationError(f"protocol.height, width: are {self.height} and {self.width}; give both, or neither")
        if self.sampler not in SAMPLERS:
            raise EvaluationError(f'protocol.sampler: is "{self.sampler}"; allowed: {", ".join(SAMPLERS)}')
        if not 0.0 <= self.eta <= 1.0:
            raise EvaluationError(f"protocol.eta: is {self.eta}; it must lie in [0, 1]")
        for name in ("prompts", "class_labels"):
            if getattr(self, name) is not None and len(getattr(self, name)) == 0:
                raise EvaluationError(f"protocol.{name}: is empty; give at least one, or None for the default")

    @property
    def floor_seed(self) -> int:
        """The seed of the other noise through which full precision is compared with itself."""
        return self.seed + 1


def resolved(pipe: Pipeline, protocol: SamplingProtocol) -> SamplingProtocol:
    """The protocol with the default conditions of `pipe` written into it, so that other pipelines take the same."""
    if Host(pipe).unconditional:
        return protocol
    conditions = Host(pipe).conditions(calibration_of(protocol), range(protocol.samples))
    prompts, class_labels = (tuple(conditions[name]) if name in conditions else None for name in ("prompt", "class_labels"))
    return replace(protocol, prompts=prompts, class_labels=class_labels)


def scheduler_config(pipe: Pipeline, protocol: SamplingProtocol) -> dict[str, Any]:
    """Class and configuration of the scheduler that samples, as JSON values, without paths and versions."""
    with scheduler_of(pipe, protocol) as scheduler:
        config: dict[str, Any] = json.loads(scheduler.to_json_string())
    return {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}


def conditions_of(protocol: SamplingProtocol) -> list[str | int]:
    """The prompt or class label of every sample of a resolved protocol; empty where it has neither."""
    values = protocol.prompts or protocol.class_labels or ()
    return [values[index % len(values)] for index in range(protocol.samples)] if values else []


def calibration_of(protocol: SamplingProtocol) -> Calibration:
    """Prompts and class labels in the form that `Host.conditions` takes."""
    return Calibration(samples=protocol.samples, prompts=protocol.prompts, class_labels=protocol.class_labels)


@contextmanager
def scheduler_of(pipe: Pipeline, protocol: SamplingProtocol) -> Iterator[Any]:
    """Give the pipeline the scheduler that the protocol names while the block runs.

    Raises EvaluationError for more steps than the model was trained with, for a sampler other than a flow-matching model's own, and
    for a scheduler that cannot clip as the protocol says.
    """
    own = pipe.scheduler
    if is_flow_matching(own) and protocol.sampler != "pipeline" and SCHEDULERS[protocol.sampler] is not type(own):
        raise EvaluationError(  # it predicts a velocity, which the others would take for noise
            f'protocol.sampler: is "{protocol.sampler}"; {type(pipe).__name__} is a flow-matching model; use sampler "pipeline"'
        )
    scheduler = own if protocol.sampler == "pipeline" else of_class(own, SCHEDULERS[protocol.sampler])
    if protocol.clip_sample is not None:
        try:
            scheduler = clipping(scheduler, protocol.clip_sample)
        except CalibrationError as error:
            raise EvaluationError(f"protocol.{error}") from error
    trained = scheduler.config.get("num_train_timesteps", protocol.steps)
    if protocol.steps > trained:
        raise EvaluationError(f"protocol.steps: is {protocol.steps}; {type(scheduler).__name__} has {trained} timesteps")
    attachment = attachment_of(pipe)
    with Host(pipe).sampling_with(scheduler), nullcontext() if attachment is None else attachment.moved_to(scheduler):
        yield scheduler

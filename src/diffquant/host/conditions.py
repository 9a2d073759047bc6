"""What a pipeline samples: how many samples, from which seed, under which prompts or class labels."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffquant.errors import CalibrationError

PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a bowl of oranges on a wooden table, still life, oil on canvas",
    "a red double-decker bus in heavy rain at night",
    "portrait of an old fisherman, studio light, 85 mm",
    "a lighthouse on a cliff, watercolour",
    "two cats asleep on a blue sofa",
    "a street market in Marrakesh at noon",
    "macro photograph of a dew drop on a leaf",
    "the skyline of a city made of glass, isometric drawing",
    "a steam locomotive crossing a stone bridge in winter",
    "a child flying a kite on an empty beach",
    "a plate of sushi, view from above",
    "a medieval map of an island with mountains and a harbour",
    "a brown bear catching a salmon in a river",
    "a minimal poster with one black circle on white",
    "an astronomer's desk with books, a globe and a brass telescope",
)


@dataclass(frozen=True)
class Calibration:
    """What to record: how many trajectories, from which seed, under which conditions.

    `samples` counts trajectories, `steps` sampling steps, `budget_gib` what may be written to disk. Conditions are cycled
    over the trajectories; None means a built-in list of prompts, or class labels spread evenly over the classes. None for
    `guidance_scale` and `eta` means the pipeline's default; `eta` is passed only where the pipeline accepts it. `clip_sample` says
    whether the scheduler clips the sample it predicts; None leaves that as it is configured.
    """

    samples: int = 256
    steps: int = 20
    seed: int = 0
    batch_size: int = 32
    prompts: tuple[str, ...] | None = None
    class_labels: tuple[int, ...] | None = None
    guidance_scale: float | None = None
    eta: float | None = None
    clip_sample: bool | None = None
    budget_gib: float = 4.0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("steps", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise CalibrationError(f"calibration.{name}: is {getattr(self, name)}; at least {least} is allowed")
        if not self.budget_gib > 0:
            raise CalibrationError(f"calibration.budget_gib: is {self.budget_gib}; it must be greater than 0")
        for name in ("prompts", "class_labels"):
            if getattr(self, name) is not None and len(getattr(self, name)) == 0:
                raise CalibrationError(f"calibration.{name}: is empty; give at least one, or None for the default")


def conditions(pipe: Any, denoiser: nn.Module, calibration: Calibration, trajectories: range) -> dict[str, Any]:
    """The batch's prompts, class labels or size, under the names of the pipeline's arguments."""
    accepted = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {}
    if "prompt" in accepted or calibration.prompts is not None:
        prompts = calibration.prompts or default_prompts(pipe)
        arguments["prompt"] = [prompts[i % len(prompts)] for i in trajectories]
    required = "class_labels" in accepted and accepted["class_labels"].default is inspect.Parameter.empty
    if required or calibration.class_labels is not None:
        labels = calibration.class_labels or _default_labels(pipe, denoiser, calibration.samples)
        arguments["class_labels"] = [labels[i % len(labels)] for i in trajectories]
    if "batch_size" in accepted:
        arguments["batch_size"] = len(trajectories)
    return arguments


def default_prompts(pipe: Any) -> tuple[str, ...]:
    """The prompts that a pipeline brings, or a built-in list.

    Its own are the attribute ``default_prompts`` of the pipeline, or what its tokenizer was made with under that name, which goes
    with the tokenizer's files (as that of ``glyph-sd`` does).
    """
    of_tokenizer = getattr(getattr(pipe, "tokenizer", None), "init_kwargs", {}).get("default_prompts")
    return tuple(getattr(pipe, "default_prompts", None) or of_tokenizer or PROMPTS)


def _default_labels(pipe: Any, denoiser: nn.Module, samples: int) -> tuple[int, ...]:
    """Labels spread evenly over the classes that the pipeline names: the first `samples` of ImageNet's would all be animals."""
    config: Any = denoiser.config
    named = sorted({int(label) for label in class_names(pipe)})
    labels = named or range(config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 0)
    if not labels:
        raise CalibrationError(
            f"{type(pipe).__name__}: the number of classes of {type(denoiser).__name__} is not in its config; give class_labels"
        )
    count = min(samples, len(labels))
    return tuple(labels[i * len(labels) // count] for i in range(count))


def class_names(pipe: Any) -> dict[str, str]:
    """Names of a pipeline's classes by label, synonyms separated by commas, as ``id2label`` of `DiTPipeline`; empty for others.

    A pipeline made with names has them in its configuration; a loaded one only by name, in ``labels``.
    """
    configured = dict(getattr(pipe, "config", {})).get("id2label") or {}
    names = {str(label): str(name) for label, name in configured.items()}
    by_name = getattr(pipe, "labels", None)
    if names or not isinstance(by_name, dict):
        return names
    for name, label in by_name.items():
        names[str(label)] = f"{names[str(label)]}, {name}" if str(label) in names else name
    return names

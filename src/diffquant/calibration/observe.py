"""The two seams through which a diffusers pipeline is watched: its denoiser's forward and its scheduler's step.

Nothing of a pipeline is copied or subclassed. `run_pipeline` runs one on its own terms: it reads what the pipeline's `__call__`
accepts and passes a seeded generator, a number of steps and conditions. Every hook is gone when its `with` block ends.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffquant.core.spec import CalibrationError

Pipeline: TypeAlias = Any  # a DiffusionPipeline: its components are attributes that its class does not declare
OnStep: TypeAlias = Callable[[Tensor, Any, Tensor, Tensor, dict[str, Any]], None]
OnTimetable: TypeAlias = Callable[[dict[str, Any]], None]

DENOISER_NAMES = ("unet", "transformer")  # components that predict the noise, in diffusers' naming
TIMESTEP_NAMES = ("timestep", "timesteps", "t")  # 90 of the 99 denoisers of diffusers 0.42.1 use the first
STEP_ARGUMENTS = ("model_output", "timestep", "sample")  # of `scheduler.step`: 44 of 49 schedulers

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


def find_denoiser(pipe: Pipeline) -> tuple[str, nn.Module]:
    """Return the name and the module of the pipeline's component that predicts the noise.

    Raises CalibrationError if the pipeline has neither a `unet` nor a `transformer`, or several of them.
    """
    names = (*DENOISER_NAMES, *(f"{name}_2" for name in DENOISER_NAMES))
    found = [(name, module) for name in names if isinstance(module := getattr(pipe, name, None), nn.Module)]
    if len(found) > 1:
        several = " and ".join(name for name, _ in found)
        raise CalibrationError(f"{type(pipe).__name__}: has several denoisers, {several}; pipelines with one can be calibrated")
    if found:
        return found[0]
    components = ", ".join(getattr(pipe, "components", {})) or "none"
    raise CalibrationError(
        f"{type(pipe).__name__}: has no denoiser named {' or '.join(DENOISER_NAMES)}; its components are: {components}"
    )


def has_step_cache(denoiser: nn.Module) -> bool:
    """Whether one of diffusers' step caches is on, so that calls answer with what earlier ones left."""
    return bool(getattr(denoiser, "is_cache_enabled", False))


def check_step_cache(denoiser: nn.Module) -> None:
    """Raise CalibrationError for a denoiser with a step cache on."""
    if has_step_cache(denoiser):
        raise CalibrationError(
            f"{type(denoiser).__name__}: its step cache is on, which answers calls with what earlier ones left; "
            "disable_cache() first, enable_cache() on the quantized model"
        )


def timestep_name(denoiser: nn.Module) -> str:
    """Return the name of the forward argument that carries the timestep.

    Raises CalibrationError if there is none that is known.
    """
    parameters = inspect.signature(denoiser.forward).parameters
    for name in TIMESTEP_NAMES:
        if name in parameters:
            return name
    raise CalibrationError(
        f"{type(denoiser).__name__}.forward: has no argument named {', '.join(TIMESTEP_NAMES)}; it has: {', '.join(parameters)}"
    )


@contextmanager
def observe(
    pipe: Pipeline,
    *,
    on_call: Callable[[dict[str, Any], Tensor], None] | None = None,
    on_step: OnStep | None = None,
    on_timetable: OnTimetable | None = None,
) -> Iterator[None]:
    """Report every denoiser forward and every scheduler step while the block runs.

    `on_call(arguments, output)`: arguments by the parameter names of the denoiser's forward, only those the pipeline passed;
    output is the predicted tensor. `on_step(model_output, timestep, sample, prev_sample, options)`: as the scheduler saw and
    returned them, and whatever else it was called with. `on_timetable(arguments)`: what the scheduler's `set_timesteps` was called
    with. Tensors are those of the pipeline, not copies. The scheduler is the object the pipeline holds at entry: one that it
    builds later is not observed.

    Raises CalibrationError for a scheduler whose `step` is not (model_output, timestep, sample, ...).
    """
    with _observed_calls(pipe, on_call), _observed_steps(pipe, on_step), _observed_timetable(pipe, on_timetable):
        yield


class _Enough(Exception):
    """The first call was seen."""


def first_call(pipe: Pipeline, sample: Callable[[], object]) -> tuple[dict[str, Any], Tensor] | None:
    """Arguments and output of the first denoiser call that `sample` makes, which is ended there; None where it makes none."""
    seen: list[tuple[dict[str, Any], Tensor]] = []

    def keep(arguments: dict[str, Any], output: Tensor) -> None:
        seen.append((arguments, output))
        raise _Enough

    with suppress(_Enough), observe(pipe, on_call=keep):
        sample()
    return seen[0] if seen else None


@contextmanager
def _observed_calls(pipe: Pipeline, on_call: Callable[[dict[str, Any], Tensor], None] | None) -> Iterator[None]:
    if on_call is None:
        yield
        return
    _, denoiser = find_denoiser(pipe)
    signature = inspect.signature(denoiser.forward)
    extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        arguments.update(arguments.pop(extra, {}) if extra else {})
        on_call(arguments, predicted(module, output))

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def predicted(module: nn.Module, output: Any) -> Tensor:
    """The tensor in what a denoiser returned: `.sample` of its output class, or the first of a tuple."""
    if isinstance(output, tuple):
        output = output[0]
    output = getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise CalibrationError(f"{type(module).__name__}: returned a {type(output).__name__}; only a tensor can be recorded")
    return output


@contextmanager
def _observed_steps(pipe: Pipeline, on_step: OnStep | None) -> Iterator[None]:
    if on_step is None:
        yield
        return
    scheduler = pipe.scheduler
    names = tuple(inspect.signature(scheduler.step).parameters)
    if names[:3] != STEP_ARGUMENTS:
        raise CalibrationError(
            f"{type(scheduler).__name__}.step: takes ({', '.join(names)}); only schedulers whose step is "
            f"({', '.join(STEP_ARGUMENTS)}, ...) can be recorded; sample with another scheduler"
        )

    def report(arguments: dict[str, Any], result: Any) -> None:
        prev_sample = result.prev_sample if hasattr(result, "prev_sample") else result[0]
        options = {name: value for name, value in arguments.items() if name not in STEP_ARGUMENTS}
        on_step(arguments["model_output"], arguments["timestep"], arguments["sample"], prev_sample, options)

    with _reported(scheduler, "step", report):
        yield


@contextmanager
def _observed_timetable(pipe: Pipeline, on_timetable: OnTimetable | None) -> Iterator[None]:
    if on_timetable is None or not hasattr(pipe.scheduler, "set_timesteps"):
        yield
        return
    with _reported(pipe.scheduler, "set_timesteps", lambda arguments, result: on_timetable(arguments)):
        yield


@contextmanager
def _reported(scheduler: Any, name: str, report: Callable[[dict[str, Any], Any], None]) -> Iterator[None]:
    """While the block runs, `report` gets the arguments by name, and the result, of every call of the scheduler's method `name`."""
    original = getattr(scheduler, name)
    signature = inspect.signature(original)

    @functools.wraps(original)  # pipelines ask inspect.signature what they may pass
    def method(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        report(dict(signature.bind(*args, **kwargs).arguments), result)
        return result

    outer = vars(scheduler).get(name)  # of another observer or of a sampling-time correction
    setattr(scheduler, name, method)
    try:
        yield
    finally:
        if outer is None:
            delattr(scheduler, name)
        else:
            setattr(scheduler, name, outer)


@contextmanager
def evaluation_mode(pipe: Pipeline) -> Iterator[None]:
    """Run the pipeline's modules in eval mode, without gradients; the mode of every submodule is restored."""
    components = (getattr(pipe, name) for name in getattr(pipe, "components", {}))
    training = [m for c in components if isinstance(c, nn.Module) for m in c.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def run_pipeline(pipe: Pipeline, calibration: Calibration, generator: torch.Generator, trajectories: range) -> Any:
    """Run the pipeline once on a batch of trajectories and return what it returned.

    The trajectories' numbers choose their prompts or class labels. Decoding is skipped where the pipeline can.

    Raises CalibrationError where the pipeline cannot be called with what `calibration` says.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {"num_inference_steps": calibration.steps, "generator": generator}
    arguments |= conditions(pipe, calibration, trajectories)
    if calibration.guidance_scale is not None:
        arguments["guidance_scale"] = calibration.guidance_scale
    if calibration.eta is not None and "eta" in accepted:
        arguments["eta"] = calibration.eta
    if "output_type" in accepted:
        latent = hasattr(pipe, "vae") and (hasattr(pipe, "image_processor") or hasattr(pipe, "video_processor"))
        arguments["output_type"] = "latent" if latent else "np"

    unknown = [name for name in arguments if name not in accepted]
    missing = [
        p.name
        for p in accepted.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in arguments
    ]
    if unknown or missing:
        wrong = f"does not take {', '.join(unknown)}" if unknown else f"also needs {', '.join(missing)}"
        raise CalibrationError(
            f"{type(pipe).__name__}: {wrong}; change the calibration, or pass `run`, a function that calls the pipeline"
        )
    return pipe(**arguments)


def conditions(pipe: Pipeline, calibration: Calibration, trajectories: range) -> Mapping[str, Any]:
    """Return the batch's prompts, class labels or size, under the names of the pipeline's arguments."""
    accepted = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {}
    if "prompt" in accepted or calibration.prompts is not None:
        prompts = calibration.prompts or default_prompts(pipe)
        arguments["prompt"] = [prompts[i % len(prompts)] for i in trajectories]
    required = "class_labels" in accepted and accepted["class_labels"].default is inspect.Parameter.empty
    if required or calibration.class_labels is not None:
        labels = calibration.class_labels or _default_labels(pipe, calibration.samples)
        arguments["class_labels"] = [labels[i % len(labels)] for i in trajectories]
    if "batch_size" in accepted:
        arguments["batch_size"] = len(trajectories)
    return arguments


def default_prompts(pipe: Pipeline) -> tuple[str, ...]:
    """The prompts that a pipeline brings, or a built-in list.

    Its own are the attribute ``default_prompts`` of the pipeline, or what its tokenizer was made with under that name, which goes
    with the tokenizer's files (as that of ``glyph-sd`` does).
    """
    of_tokenizer = getattr(getattr(pipe, "tokenizer", None), "init_kwargs", {}).get("default_prompts")
    return tuple(getattr(pipe, "default_prompts", None) or of_tokenizer or PROMPTS)


def _default_labels(pipe: Pipeline, samples: int) -> tuple[int, ...]:
    """Labels spread evenly over the classes that the pipeline names: the first `samples` of ImageNet's would all be animals."""
    _, denoiser = find_denoiser(pipe)
    config: Any = denoiser.config
    named = sorted({int(label) for label in class_names(pipe)})
    labels = named or range(config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 0)
    if not labels:
        raise CalibrationError(
            f"{type(pipe).__name__}: the number of classes of {type(denoiser).__name__} is not in its config; give class_labels"
        )
    count = min(samples, len(labels))
    return tuple(labels[i * len(labels) // count] for i in range(count))


def class_names(pipe: Pipeline) -> dict[str, str]:
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

"""Host: a diffusers pipeline with its denoiser, one run of it, its first call, and observers of its calls and steps.

Nothing of a pipeline is copied or subclassed. It is watched at two seams, its denoiser's forward and its scheduler's step, and run
on its own terms: what its ``__call__`` accepts is read, and a seeded generator, a number of steps and conditions are passed.
Everything is as it was when a `with` block ends.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeAlias

import torch
from diffusers import DDIMPipeline, DDPMPipeline
from diffusers.utils import logging
from torch import Tensor, nn

from diffquant.core.watch import Enough, watching
from diffquant.errors import CalibrationError
from diffquant.host.conditions import Calibration, conditions

Pipeline: TypeAlias = Any  # a DiffusionPipeline: its components are attributes that its class does not declare
Call: TypeAlias = tuple[dict[str, Any], Tensor]  # arguments and output of a denoiser
OnCall: TypeAlias = Callable[[dict[str, Any], Tensor], None]
OnStep: TypeAlias = Callable[[Tensor, Any, Tensor, Tensor, dict[str, Any]], None]
OnTimetable: TypeAlias = Callable[[dict[str, Any]], None]

DENOISER_NAMES = ("unet", "transformer")  # components that predict the noise, in diffusers' naming
STEP_ARGUMENTS = ("model_output", "timestep", "sample")  # of `scheduler.step`: 44 of 49 schedulers


class Host:
    """A pipeline: ``denoiser`` is its component that predicts the noise, called ``name`` there.

    Raises `CalibrationError` if the pipeline has neither a `unet` nor a `transformer`, or several of them.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe
        self.kind = type(pipe).__name__
        self.name, self.denoiser = _find_denoiser(pipe)

    @property
    def unconditional(self) -> bool:
        """Whether it draws pictures from noise alone, in a loop that accepts few schedulers, so that evaluation has its own."""
        return isinstance(self.pipe, DDIMPipeline | DDPMPipeline)

    @property
    def takes_ddim_only(self) -> bool:
        """Whether it builds a DDIM scheduler of its own, whatever it is given."""
        return isinstance(self.pipe, DDIMPipeline)

    @property
    def accepted(self) -> dict[str, inspect.Parameter]:
        """The parameters of its ``__call__`` by name."""
        return dict(inspect.signature(self.pipe.__call__).parameters)

    def conditions(self, calibration: Calibration, trajectories: range) -> dict[str, Any]:
        """Prompts, class labels or number of the trajectories, by the names of its arguments."""
        return conditions(self.pipe, self.denoiser, calibration, trajectories)

    def run(self, calibration: Calibration, generator: torch.Generator, trajectories: range) -> Any:
        """Run the pipeline once on a batch of trajectories and return its output.

        The trajectories' numbers choose their prompts or class labels. Decoding is skipped where the pipeline can.

        Raises CalibrationError where the pipeline cannot be called with what `calibration` says.
        """
        pipe, accepted = self.pipe, self.accepted
        arguments: dict[str, Any] = {"num_inference_steps": calibration.steps, "generator": generator}
        arguments |= self.conditions(calibration, trajectories)
        if calibration.guidance_scale is not None:
            arguments["guidance_scale"] = calibration.guidance_scale
        if calibration.eta is not None and "eta" in accepted:
            arguments["eta"] = calibration.eta
        if "output_type" in accepted:
            latent = hasattr(pipe, "vae") and (hasattr(pipe, "image_processor") or hasattr(pipe, "video_processor"))
            arguments["output_type"] = "latent" if latent else "np"
        unknown, missing = self.misfits(arguments)
        if unknown or missing:
            wrong = f"does not take {', '.join(unknown)}" if unknown else f"also needs {', '.join(missing)}"
            raise CalibrationError(
                f"{self.kind}: {wrong}; change the calibration, or pass `run`, a function that calls the pipeline"
            )
        return pipe(**arguments)

    def misfits(self, arguments: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Which of the arguments its ``__call__`` does not take, and which others it needs."""
        named = (p for p in self.accepted.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
        return [name for name in arguments if name not in self.accepted], missing

    def first_call(self, sample: Callable[[], object]) -> Call | None:
        """Arguments and output of the first denoiser call that `sample` makes, which is ended there; None where it makes none."""
        calls: list[Call] = []

        def end(arguments: dict[str, Any], output: Tensor) -> None:
            calls.append((arguments, output))
            raise Enough

        with suppress(Enough), self.observed(on_call=end):
            sample()
        return calls[0] if calls else None

    def example_call(self, steps: int) -> Call:
        """Arguments and output of the first denoiser call of a run that draws one sample in `steps` steps."""
        calibration, generator = Calibration(samples=1, steps=steps, batch_size=1), torch.Generator().manual_seed(0)
        with self.evaluating(), self.quiet():
            call = self.first_call(lambda: self.run(calibration, generator, range(1)))
        if call is None:
            raise CalibrationError(f"{self.kind}: ran without calling its denoiser")
        return call

    @contextmanager
    def observed(
        self, *, on_call: OnCall | None = None, on_step: OnStep | None = None, on_timetable: OnTimetable | None = None
    ) -> Iterator[None]:
        """Report every denoiser forward and every scheduler step while the block runs.

        `on_call(arguments, output)`: arguments by the parameter names of the denoiser's forward, only those the pipeline passed;
        output is the predicted tensor. `on_step(model_output, timestep, sample, prev_sample, options)`: as the scheduler saw and
        returned them, and whatever else it was called with. `on_timetable(arguments)`: what the scheduler's `set_timesteps` was
        called with. Tensors are those of the pipeline, not copies. The scheduler is the object the pipeline holds at entry: one
        that it builds later is not observed.

        Raises CalibrationError for a scheduler whose `step` is not (model_output, timestep, sample, ...).
        """
        hooks = {} if on_call is None else {self.denoiser: _reporting(self.denoiser, on_call)}
        scheduler = getattr(self.pipe, "scheduler", None)
        with ExitStack() as stack:
            stack.enter_context(watching(hooks, keywords=True))
            if on_step is not None:
                stack.enter_context(_reported(scheduler, "step", _step_report(scheduler, on_step)))
            if on_timetable is not None and hasattr(scheduler, "set_timesteps"):
                stack.enter_context(_reported(scheduler, "set_timesteps", lambda arguments, result: on_timetable(arguments)))
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the pipeline's modules in eval mode, without gradients; the mode of every submodule is restored."""
        components = (getattr(self.pipe, name) for name in getattr(self.pipe, "components", {}))
        training = [m for c in components if isinstance(c, nn.Module) for m in c.modules() if m.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Switch the pipeline's own progress bar off while the block runs."""
        before = dict(getattr(self.pipe, "_progress_bar_config", {}))  # diffusers has a setter only
        self.pipe.set_progress_bar_config(**(before | {"disable": True}))
        try:
            yield
        finally:
            self.pipe.set_progress_bar_config(**before)

    @contextmanager
    def sampling_with(self, scheduler: Any) -> Iterator[None]:
        """Give the pipeline another scheduler while the block runs."""
        own = self.pipe.scheduler
        self.pipe.scheduler = scheduler
        try:
            yield
        finally:
            self.pipe.scheduler = own


def _find_denoiser(pipe: Pipeline) -> tuple[str, nn.Module]:
    names = (*DENOISER_NAMES, *(f"{name}_2" for name in DENOISER_NAMES))
    present = [(name, module) for name in names if isinstance(module := getattr(pipe, name, None), nn.Module)]
    if len(present) > 1:
        several = " and ".join(name for name, _ in present)
        raise CalibrationError(f"{type(pipe).__name__}: has several denoisers, {several}; pipelines with one can be calibrated")
    if present:
        return present[0]
    components = ", ".join(getattr(pipe, "components", {})) or "none"
    raise CalibrationError(
        f"{type(pipe).__name__}: has no denoiser named {' or '.join(DENOISER_NAMES)}; its components are: {components}"
    )


def quiet_diffusers() -> None:
    """Let diffusers say errors alone, and show no bars of its own."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


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


def predicted(module: nn.Module, output: Any) -> Tensor:
    """The tensor in what a denoiser returned: `.sample` of its output class, or the first of a tuple."""
    if isinstance(output, tuple):
        output = output[0]
    output = getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise CalibrationError(f"{type(module).__name__}: returned a {type(output).__name__}; only a tensor can be recorded")
    return output


def _reporting(denoiser: nn.Module, on_call: OnCall) -> Callable[..., None]:
    """A forward hook that calls `on_call`."""
    signature = inspect.signature(denoiser.forward)
    extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        arguments = dict(signature.bind(*positional, **keywords).arguments)
        arguments.update(arguments.pop(extra, {}) if extra else {})
        on_call(arguments, predicted(module, output))

    return hook


def _step_report(scheduler: Any, on_step: OnStep) -> Callable[[dict[str, Any], Any], None]:
    """What reports the calls of the scheduler's `step` to `on_step`."""
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

    return report


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

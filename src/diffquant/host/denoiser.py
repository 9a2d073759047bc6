"""A denoiser of diffusers made quantizable: its timestep argument, the hooks that set its clock, and its state."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from diffquant.core.attention import attach_products
from diffquant.core.clock import StepClock
from diffquant.core.correction import Correction
from diffquant.core.layers import make_quantizable, release_forward
from diffquant.core.model import ModelState, ensured_state, is_quantizable
from diffquant.core.spec import AttentionSpec
from diffquant.errors import SpecError
from diffquant.host.structure import PlannedLayer, first_with_guidance_sets

TIMESTEP_NAMES = ("timestep", "timesteps", "t")  # 90 of the 99 denoisers of diffusers 0.42.1 use the first
CHECKPOINT = "_gradient_checkpointing_func"  # attribute of modules of diffusers: what they checkpoint a block with


def timestep_argument(model: nn.Module) -> tuple[str, int]:
    """Name and position of the timestep among the arguments of a denoiser's forward; `SpecError` where there is none."""
    names = list(inspect.signature(model.forward).parameters)
    for name in TIMESTEP_NAMES:
        if name in names:
            return name, names.index(name)
    raise SpecError(
        f"{type(model).__name__}.forward: arguments {names}; a denoiser has one named {' or '.join(TIMESTEP_NAMES)}; "
        "pass the pipeline's unet or transformer"
    )


def input_name(model: nn.Module) -> str:
    """The name of the argument of a denoiser's forward that holds the latents: its first."""
    return next(iter(inspect.signature(model.forward).parameters))


def prepare(
    model: nn.Module, rows: Sequence[PlannedLayer], timesteps: Sequence[float] = (), conditional: int | None = None
) -> None:
    """Make the planned layers of `model` quantizable in place, give it its state and the hooks that set its clock.

    Quantizers start off and uncalibrated: the model still computes exactly what it did. A layer gets at most one parameter set per
    timestep; without `timesteps`, one; with `guidance_sets` as many for each half of a guided call, of which `conditional` (0 or 1)
    is the conditional half. Raises `SpecError` when it already is quantizable, when rows name layers that it does not have, or ask
    for sets of halves that are not known.
    """
    if is_quantizable(model):
        raise SpecError(f"{type(model).__name__}: already quantizable; load the full-precision model again to start over")
    argument = timestep_argument(model)
    modules = dict(model.named_modules())
    clock = StepClock(timesteps, conditional)
    if conditional is None and (wanting := first_with_guidance_sets(rows)) is not None:
        raise SpecError(f"layer {wanting!r}: guidance_sets, but no half of a call is known as the conditional one")
    planned = [row for row in rows if row.spec is not None]
    for row in planned:  # all are checked before any is changed
        if row.name not in modules:
            raise SpecError(f"layer {row.name!r}: not in this {type(model).__name__}")
        if not release_forward(modules[row.name]):
            raise SpecError(
                f"layer {row.name!r}: its forward is replaced on the instance, as offloading with accelerate does; call the "
                f"pipeline's remove_all_hooks (a model's: accelerate.hooks.remove_hook_from_submodules), quantize, then offload"
            )
    for row in planned:
        assert row.spec is not None
        sets = {"sets": min(row.spec.sets, clock.times)}  # more would never be used, and stay uncalibrated
        if isinstance(row.spec, AttentionSpec):
            attach_products(modules[row.name], row.spec.model_copy(update=sets), clock)
        else:
            make_quantizable(modules[row.name], row.spec.model_copy(update=sets), clock)
    state = ensured_state(model)
    state.clock, state.timestep = clock, argument
    model.register_forward_pre_hook(tick, with_kwargs=True)
    model.register_forward_hook(tock, always_call=True)


# ---- the clock follows the calls


def tick(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Forward pre-hook of a denoiser: set its clock from the timestep argument."""
    state = model.diffquant
    assert isinstance(state, ModelState) and state.timestep is not None
    clock, (name, position) = state.clock, state.timestep
    if not torch.compiler.is_compiling():
        clock.begin()
    timestep = keywords.get(name, arguments[position] if position < len(arguments) else None)
    if timestep is None:
        raise SpecError(f"{type(model).__name__}: called without {name}; the quantizers need it to choose their parameters")
    halves = None
    if clock.conditional is not None:
        halves = clock.halves(arguments[0] if arguments else keywords[input_name(model)])
    clock.set_timestep(timestep, halves)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        bind_checkpoints(model, clock)


def tock(model: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a denoiser, also where its forward failed: its call is over."""
    state = model.diffquant
    assert isinstance(state, ModelState)
    if not torch.compiler.is_compiling():
        state.clock.end()


def give_correction(model: nn.Module, correction: Correction) -> None:
    """Give `model` a correction, which is saved with it."""
    ensured_state(model).correction = correction


def warn_unless_attached(model: nn.Module, arguments: Any) -> None:
    """Forward pre-hook of a finished model: warns once when it is called and nothing applies its correction."""
    state = model.diffquant
    assert isinstance(state, ModelState)
    if state.attachment is None and not state.warned:
        state.warned = True
        warnings.warn(
            f"{type(model).__name__}: has a sampling-time correction that nothing applies; call diffquant.attach(pipe)",
            stacklevel=2,
        )


class _Bound:
    """A function of diffusers that checkpoints a block; recomputation takes place in the interval of the first call."""

    def __init__(self, checkpoint: Callable[..., Any], clock: StepClock) -> None:
        self.checkpoint, self.clock = checkpoint, clock

    def __call__(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        interval = self.clock.interval

        def again(*arguments: Any, **keywords: Any) -> Any:
            with self.clock.at(interval):
                return function(*arguments, **keywords)

        return self.checkpoint(again, *arguments, **keywords)


def bind_checkpoints(model: nn.Module, clock: StepClock) -> None:
    """Bind the functions that modules of `model` checkpoint with, where gradient checkpointing is on, to their calls' intervals.

    They run again in a backward pass, perhaps of another thread and after other calls, where no timestep is given.
    """
    for module in model.modules():
        checkpoint = vars(module).get(CHECKPOINT)
        if checkpoint is not None and not isinstance(checkpoint, _Bound) and getattr(module, "gradient_checkpointing", False):
            setattr(module, CHECKPOINT, _Bound(checkpoint, clock))

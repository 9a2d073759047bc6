"""A scheduler without its pipeline: built from a recording, its state put aside and back, the noise it injects given.

A multistep solver's state holds a history of latents or predictions; of everything else in a state nothing is assumed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor

from diffquant.calibration.trajectory import Trajectory
from diffquant.core.spec import CalibrationError

State = Mapping[str, Any]  # the attributes of a scheduler; lists are copies
Key = tuple[str, int | None]  # a tensor of a state: its attribute, and its place in it where that is a list


def build_scheduler(data: Trajectory) -> Any:
    """The scheduler of a recording, from its configuration. Raises `CalibrationError` where it is not one of diffusers'."""
    described = data.manifest["scheduler"]
    kind = getattr(diffusers, described["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        where = f"{data.manifest['pipeline']} with {described['class']}"
        raise CalibrationError(f"{where}: the scheduler is not one of diffusers'; its steps cannot be replayed")
    scheduler: Any = kind.from_config(described["config"])  # type: ignore[attr-defined]
    return scheduler


def clipping(scheduler: Any, clip_sample: bool) -> Any:
    """The scheduler, or one like it that clips the sample it predicts, or does not. `CalibrationError` where it cannot."""
    can = "clip_sample" in inspect.signature(type(scheduler).__init__).parameters  # a configuration keeps what other classes had
    if not can and clip_sample:
        raise CalibrationError(f"clip_sample: is true; {type(scheduler).__name__} has no such option")
    if not can or scheduler.config.clip_sample == clip_sample:
        return scheduler
    return type(scheduler).from_config(scheduler.config, clip_sample=clip_sample)


def scale_model_input(scheduler: Any, sample: Tensor, timestep: Tensor) -> Tensor:
    """What the model is given for `sample`; flow-matching schedulers scale nothing."""
    scale = getattr(scheduler, "scale_model_input", None)
    scaled: Tensor = sample if scale is None else scale(sample, timestep)
    return scaled


def snapshot(scheduler: Any) -> State:
    """The scheduler's state: its attributes, lists copied."""
    return {name: list(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}


def restore(scheduler: Any, state: State) -> None:
    """Put back a `snapshot`; the scheduler may go on changing its lists, and the latents in it (PNDM adds to one in place)."""
    vars(scheduler).clear()
    vars(scheduler).update({name: _own(value) for name, value in state.items()})


def _own(value: Any) -> Any:
    """A copy of a list and of what is shaped like a batch; a copied tensor keeps its graph."""
    if isinstance(value, list):
        return [_own(member) for member in value]
    return value.clone() if isinstance(value, Tensor) and value.dim() > 1 else value


def history(state: State, shape: torch.Size) -> dict[Key, Tensor]:
    """The tensors of a state that have the shape of the latent: what a multistep solver remembers of earlier steps."""
    entries: list[tuple[Key, Any]] = []
    for name, value in state.items():
        entries += [((name, j), member) for j, member in enumerate(value)] if isinstance(value, list) else [((name, None), value)]
    return {
        key: value for key, value in entries if isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
    }


def with_history(state: State, tensors: Mapping[Key, Tensor]) -> State:
    """The state with some of its `history` replaced."""
    changed = {name: list(value) if isinstance(value, list) else value for name, value in state.items()}
    for (name, place), tensor in tensors.items():
        if place is None:
            changed[name] = tensor
        else:
            changed[name][place] = tensor
    return changed


@contextmanager
def noise_is(scheduler: Any, noise: Tensor | float) -> Iterator[list[tuple[int, ...]]]:
    """While the block runs, the scheduler's own draws of noise return `noise`; the shapes drawn are listed."""
    module = sys.modules[type(scheduler).__module__]
    draws: list[tuple[int, ...]] = []
    if not hasattr(module, "randn_tensor"):
        yield draws
        return

    def drawn(shape: tuple[int, ...], generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
        draws.append(tuple(shape))
        return torch.zeros(tuple(shape), device=device, dtype=dtype) + torch.as_tensor(noise, device=device, dtype=dtype)

    with mock.patch.object(module, "randn_tensor", drawn):
        yield draws

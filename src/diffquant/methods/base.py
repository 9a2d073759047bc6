"""Pass: a frozen options object whose one method transforms a quantizable model and returns figures."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from diffquant.calibration.fit import Run
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.timing import Work
from diffquant.core.model import device_of, quantized_layers, quantizers
from diffquant.core.spec import LayerSpec
from diffquant.errors import SpecError
from diffquant.host.structure import PlannedLayer
from diffquant.registry import load, register

Figures = dict[str, Any]
EFFORT = {
    "iterations": 20,
    "samples": 64,
    "rounds": 16,
    "images": 64,
    "trajectories": 8,
}  # options that cost time: the least of each
_passes: dict[str, type[Pass]] = {}
OF_LAYERS = ("smooth", "offset")  # buffers that passes change


class Pass(BaseModel, ABC):
    """Options of one pass of a recipe; subclasses are final and add `apply`. A recipe names them by their class.

    A pass leaves quantizers switched on or off as they were, and leaves no hook, gradient or observer behind.
    ``before_ranges``: it changes what ranges are calibrated on, so `CalibrateRanges` has to come after it. ``weights_only``: it
    changes quantizers of weights alone, and its result does not depend on those of activations.
    """

    before_ranges: ClassVar[bool] = False
    weights_only: ClassVar[bool] = False

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def weight_options(self) -> dict[str, Any] | None:
        """The options that its effect on weights depends on ({}: it has none); None if activation quantizers may matter too."""
        return None

    @property
    def needs(self) -> Literal["smooth", "shift"] | None:
        """The vector that a rule of the recipe has to give some layer."""
        return None

    @classmethod
    def __pydantic_init_subclass__(cls, **keywords: Any) -> None:
        super().__pydantic_init_subclass__(**keywords)
        if not inspect.isabstract(cls):
            register(_passes, cls.__name__, cls)

    def check(self, model: nn.Module, rows: Sequence[PlannedLayer], data: Trajectory) -> None:
        """Raise what `apply` would, of what can be known before anything is learned.

        `model` is not quantizable yet, `rows` are its plan, and `data` may be a single trajectory.
        """

    @abstractmethod
    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Change the quantizers of `model` in place; return figures that JSON can hold, ``layers`` among them a row per layer."""

    def thinned(self, share: float) -> Pass:
        """The same pass with a `share` of its iterations and samples, but not less than `EFFORT`."""
        effort = {name: getattr(self, name) for name in EFFORT if name in type(self).model_fields}
        return self.model_copy(update={name: max(min(EFFORT[name], n), round(n * share)) for name, n in effort.items()})

    @abstractmethod
    def work(self, blocks: int) -> Work:
        """About how many times one sample goes through a model of `blocks` units: for estimates of time."""


def registered() -> dict[str, type[Pass]]:
    """Every pass by the name of its class: those of this package, and those that others have defined."""
    load(__package__)
    return dict(sorted(_passes.items()))


def scaled_layers(rows: Sequence[PlannedLayer]) -> set[str]:
    """Layers of a plan that equivalent scaling applies to: they have the vector, and both operands are quantized."""
    specs = {row.name: row.spec for row in rows if isinstance(row.spec, LayerSpec)}
    return {name for name, spec in specs.items() if spec.smooth and spec.weight is not None and spec.input is not None}


def require_smooth(kind: str, layers: Collection[object]) -> None:
    """Raise `SpecError` where a pass called `kind` has no layers with the vector."""
    if not layers:
        raise SpecError(f"{kind}: no layer has smooth: true and quantizes both operands; add it to a rule")


def draw_seed(generator: torch.Generator) -> int:
    """A seed for everything a pass draws, itself drawn from the run's generator."""
    return int(torch.randint(2**31, (1,), generator=generator))


def quantizer_state(model: nn.Module, weights_only: bool = False) -> dict[str, Tensor]:
    """All that passes change, by full name: buffers and bits of quantizers (of weights, on demand), vectors of layers."""
    named = [(name, quantizer) for name, quantizer in quantizers(model) if not weights_only or quantizer.clock is None]
    state = {
        f"{name}.{buffer}": value for name, quantizer in named for buffer, value in quantizer._buffers.items() if value is not None
    }
    state |= {f"{name}.bits": torch.tensor(quantizer.spec.bits) for name, quantizer in named}
    for name, layer in quantized_layers(model):
        state |= {f"{name}.{buffer}": value for buffer in OF_LAYERS if (value := layer._buffers[buffer]) is not None}
    return state


def restore_quantizers(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore a `quantizer_state`. Buffers that it lacks become None; quantizers that it does not name stay as they are."""
    for name, quantizer in quantizers(model):
        if f"{name}.scale" not in state:
            continue
        if f"{name}.bits" in state:
            quantizer.spec = quantizer.spec.model_copy(update={"bits": int(state[f"{name}.bits"])})
        for buffer in list(quantizer._buffers):
            value = state.get(f"{name}.{buffer}")
            quantizer._buffers[buffer] = None if value is None else value.to(quantizer.scale.device)
    for name, layer in quantized_layers(model):
        for buffer in OF_LAYERS:
            value = state.get(f"{name}.{buffer}")
            layer._buffers[buffer] = None if value is None else value.to(device_of(layer))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with its parameters not requiring gradients; as it was afterwards."""
    training = model.training
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter, state in required:
            parameter.requires_grad_(state)

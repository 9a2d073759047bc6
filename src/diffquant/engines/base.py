"""Engines: what a frozen model computes with. The simulation in floating point is their specification, and runs anywhere.

An engine is a subclass of `Engine` in a file of its own; it registers itself when its class is defined. Nothing outside of its file
names it.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

from torch import nn

from diffquant.core.attention import ATTRIBUTE as PRODUCTS
from diffquant.core.attention import AttentionProducts
from diffquant.core.layers import QuantizedLayer
from diffquant.core.model import is_frozen, quantized_layers, state_of
from diffquant.errors import CheckpointError
from diffquant.registry import load, register

VARIABLE = "DIFFQUANT_ENGINE"  # of the environment: the engine of models for which none is asked
FLOAT = "float"  # what a model without quantized layers computes with
FALLBACK = "simulate"

_engines: dict[str, type[Engine]] = {}
_requested: ContextVar[str | None] = ContextVar("engine", default=None)
_log = logging.getLogger(__name__)


class Lowered(NamedTuple):
    """One layer or attention: `reason` says why it does not compute with integers; empty where it does."""

    name: str
    reason: str


class Engine(ABC):
    """One way to compute a frozen model. An instance computes one model, and holds what it made for it.

    Integers are those of the simulation; codes on a rounding edge may differ by one. What cannot be exact on this machine is
    computed another way or refused, never silently. ``rank``: in listings, small first.
    """

    name: ClassVar[str]
    rank: ClassVar[int] = 50

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" in vars(cls):
            register(_engines, cls.name, cls)

    @classmethod
    @abstractmethod
    def unsupported(cls) -> str:
        """Why it does not run on this machine; empty where it does. Raises `CheckpointError` where a package is missing."""

    @classmethod
    @abstractmethod
    def explained(cls) -> str:
        """How exactly it computes on this machine, in words; it runs here."""

    @classmethod
    def speed(cls) -> float:
        """How much faster than float32 one large product is here; at most 1 where the engine is not to be chosen by itself."""
        return 0.0

    @abstractmethod
    def install(self, model: nn.Module) -> list[Lowered]:
        """Let a frozen `model` compute with it, in place; a row for each layer and attention."""

    @abstractmethod
    def uninstall(self, model: nn.Module) -> None:
        """Undo `install`: every layer holds its codes again and computes with them in floating point."""

    def take(self, layer: QuantizedLayer) -> None:  # noqa: B027 (most engines have nothing to do)
        """While a model is loaded: `layer` has its codes, the next layers do not yet. `install` follows when all have."""


def engine_names() -> list[str]:
    """The engines there are; modules of this package register theirs when they are imported."""
    load(__package__)
    return [name for name, _ in sorted(_engines.items(), key=lambda item: (item[1].rank, item[0]))]


def engine_class(name: str) -> type[Engine]:
    """The engine of that name, which may not run here. Raises `CheckpointError` for one that is unknown."""
    if name not in engine_names():
        raise CheckpointError(f"engine: {name!r}; allowed are {', '.join(engine_names())}")
    return _engines[name]


def check_engine(name: str | None) -> None:
    """Raises `CheckpointError` for an engine that is unknown, or that this machine cannot run; None is the default engine."""
    if name is not None and (reason := engine_class(name).unsupported()):
        kin = name.partition("-")[0]  # such as openvino of openvino-bf16
        other = kin if kin != name and kin in _engines and not _engines[kin].unsupported() else FALLBACK
        raise CheckpointError(f"engine: {name!r}, but {reason}; use engine={other!r}")


@contextmanager
def engine(name: str | None) -> Iterator[None]:
    """Models loaded inside this context get engine `name`.

    None chooses: what the environment's variable DIFFQUANT_ENGINE says, else `default`.
    Raises `CheckpointError` for an engine that is unknown, or that this machine cannot run.
    """
    check_engine(name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def default() -> tuple[str, str]:
    """The engine of this machine where nobody asks for another one, and why.

    The fastest of those that offer themselves by a `speed`, where it is exact and faster than float32.
    """
    offers = {name: kind for name in engine_names() if (kind := _engines[name]).speed.__func__ is not Engine.speed.__func__}  # type: ignore[attr-defined]
    refusals = {name: reason for name, kind in offers.items() if (reason := kind.unsupported())}
    speeds = {name: kind.speed() for name, kind in offers.items() if name not in refusals}
    if not speeds:
        return FALLBACK, next(iter(refusals.values()), "no engine multiplies integers here")
    name = max(speeds, key=lambda each: speeds[each])
    if speeds[name] <= 1:
        return FALLBACK, f"integer products of engine {name!r} take longer here than those of float32"
    return name, f"exact, and up to {speeds[name]:.1f} times as fast as float32 on one large product"


def requested() -> Engine:
    """The engine that a model loaded now gets, not installed yet: that of the context, of `VARIABLE`, or the default."""
    name = _requested.get() or os.environ.get(VARIABLE)
    if name:
        check_engine(name)
        return _engines[name]()
    name, why = default()
    if name == FALLBACK:
        _log.warning("%s; quantized models are simulated in floating point, no faster than the original", why)
    return _engines[name]()


def engine_of(model: nn.Module) -> str:
    """What `model` computes with: an engine's name, or "float" where no layer of it is quantized."""
    if next(quantized_layers(model), None) is None:
        return FLOAT
    state = state_of(model)
    return FALLBACK if state is None or state.engine is None else str(state.engine.name)


def install(model: nn.Module, chosen: Engine) -> list[Lowered]:
    """Let a frozen denoiser compute with an engine, in the place of the one it has."""
    state = state_of(model)
    assert state is not None
    if state.engine is not None and type(state.engine) is not type(chosen):
        state.engine.uninstall(model)
    state.engine = None
    rows = chosen.install(model)
    state.engine = chosen
    return rows


def use_engine(pipe_or_model: Any, name: str | None = None) -> list[Lowered]:
    """Let a pipeline's quantized models, or one frozen model, compute with engine `name` from now on; None chooses.

    Returns a row for each layer and attention: its name, and the reason where it is simulated. Codes are unpacked and laid out
    again, so nothing is lost. Raises `CheckpointError` for an engine that is unknown or that this machine cannot run, and where
    nothing is quantized.
    """
    with engine(name):
        name = requested().name
    parts = [pipe_or_model] if isinstance(pipe_or_model, nn.Module) else list(pipe_or_model.components.values())
    models = [part for part in parts if isinstance(part, nn.Module) and is_frozen(part)]
    if not models:
        raise CheckpointError(f"{type(pipe_or_model).__name__}: holds no quantized model; quantize or load one first")
    return [row for model in models for row in install(model, _engines[name]())]


def layer_rows(model: nn.Module) -> list[Lowered]:
    """A row for each layer, with the reason where it has float operands, and for each attention."""
    rows = [Lowered(name, float_operand(layer)) for name, layer in quantized_layers(model)]
    return [*rows, *(Lowered(name, "") for name in attentions(model))]


def attentions(model: nn.Module) -> dict[str, AttentionProducts]:
    """The quantized attentions of a model, by the name of the attention module."""
    products = {name: module for name, module in model.named_modules() if isinstance(module, AttentionProducts)}
    return {name.removesuffix(f".{PRODUCTS}"): module for name, module in products.items()}


def float_operand(layer: QuantizedLayer) -> str:
    """Which operand of a layer stays in floating point, in words; empty where both are quantized."""
    if not layer.multiplies:
        return "it multiplies nothing"
    if layer.weight_quantizer is None:
        return "its weight stays in floating point"
    return "its input stays in floating point" if layer.input_quantizer is None else ""

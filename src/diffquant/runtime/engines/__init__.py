"""Engines: what a frozen model computes with. The simulation in floating point is their specification, and runs anywhere.

``int8``: PyTorch's integer kernels on a CPU (`int8_cpu`); the default where they are exact and faster than float32, which every
machine is asked (`exactness`). ``openvino``: those of OpenVINO, on a CPU; needs the package of that name, and converts a model at
its first call; ``openvino-bf16``: the same, with bfloat16 between them. ``simulate``: quantized values in floating point, on any
device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from diffquant.core.spec import CheckpointError
from diffquant.core.surgery import is_frozen, quantized_layers
from diffquant.runtime.engines import int8_cpu, openvino
from diffquant.runtime.engines.exactness import answer_of
from diffquant.runtime.engines.int8_cpu import Lowered

VARIABLE = "DIFFQUANT_ENGINE"
ENGINES = ("int8", *openvino.PRECISIONS, "simulate")

_requested: ContextVar[str | None] = ContextVar("engine", default=None)
_log = logging.getLogger(__name__)


def check_engine(engine: str | None) -> None:
    """Raises `CheckpointError` for an engine that is unknown, or that this machine cannot run; None is the default engine."""
    if engine is not None and engine not in ENGINES:
        raise CheckpointError(f"engine: {engine!r}; allowed are {', '.join(ENGINES)}")
    if engine == "int8" and (reason := int8_cpu.unsupported()):
        raise CheckpointError(f"engine: 'int8', but {reason}; use engine='simulate'")
    if engine in openvino.PRECISIONS and (reason := openvino.unsupported(openvino.PRECISIONS[engine])):
        other = "openvino" if not openvino.unsupported("f32") else "simulate"
        raise CheckpointError(f"engine: {engine!r}, but {reason}; use engine={other!r}")


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

    int8, where PyTorch's kernels multiply exactly and faster than float32. Not openvino: it converts each model at its first call,
    for a minute where the model is large, compiles for each batch size, and refuses parameter sets that int8 computes.
    """
    answers = [answer_of(kernel) for kernel in int8_cpu.KERNELS]
    if reason := int8_cpu.unsupported():
        return "simulate", reason
    fastest = max(answer.speed for answer in answers if answer.usable)
    if fastest <= 1:
        return "simulate", "PyTorch's integer products take longer here than those of float32"
    return "int8", f"exact, and up to {fastest:.1f} times as fast as float32 on one large product"


def requested() -> str:
    """The engine that a model loaded now gets: that of the context, of the environment's `VARIABLE`, or the default."""
    name = _requested.get() or os.environ.get(VARIABLE)
    if name:
        check_engine(name)
        return name
    name, why = default()
    if name == "simulate":
        _log.warning("%s; quantized models are simulated in floating point, no faster than the original", why)
    return name


def engine_of(model: nn.Module) -> str:
    """What `model` computes with: an engine's name, or "float" where no layer of it is quantized."""
    if (precision := openvino.precision_of(model)) is not None:
        return next(name for name, each in openvino.PRECISIONS.items() if each == precision)
    layers = [layer for _, layer in quantized_layers(model)]
    if any(int8_cpu.is_lowered(layer) for layer in layers):
        return "int8"
    return "simulate" if layers else "float"


def use_engine(pipe_or_model: Any, name: str | None = None) -> list[Lowered]:
    """Let a pipeline's quantized models, or one frozen model, compute with engine `name` from now on; None chooses.

    Returns a row for each layer and attention: its name, and the reason where it is simulated. Codes are unpacked and laid out
    again, so nothing is lost. Raises `CheckpointError` for an engine that is unknown or that this machine cannot run, and where
    nothing is quantized.
    """
    with engine(name):
        name = requested()
    parts = [pipe_or_model] if isinstance(pipe_or_model, nn.Module) else list(pipe_or_model.components.values())
    models = [part for part in parts if isinstance(part, nn.Module) and is_frozen(part)]
    if not models:
        raise CheckpointError(f"{type(pipe_or_model).__name__}: holds no quantized model; quantize or load one first")
    rows: list[Lowered] = []
    for model in models:
        openvino.uninstall(model)
        if name == "int8":
            rows += int8_cpu.lower(model)
            continue
        int8_cpu.simulate(model)
        if name in openvino.PRECISIONS:
            rows += openvino.install(model, openvino.PRECISIONS[name])
        else:
            rows += [Lowered(layer, "the engine is simulate") for layer, _ in quantized_layers(model)]
    return rows

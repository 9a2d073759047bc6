"""What an export target is: it writes the files of one consumer, reads them back and checks them. A class with a name registers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from diffquant.core.dynamic import DynamicQuantizer
from diffquant.core.model import input_quantizers
from diffquant.core.operand import OperandQuantizer
from diffquant.core.watch import watching
from diffquant.errors import CheckpointError
from diffquant.host.pipeline import Host
from diffquant.host.structure import first_adapter
from diffquant.registry import load, register

EDGE = 1e-3  # of a scale: how far values are moved across rounding edges, many times what float32 moves them
DRAWS = 3  # of such moves
MARGIN = 3.0  # over the largest error of these
ROUNDING = 1e-5  # of float32, where no code is on an edge

_targets: dict[str, type[Target]] = {}


class ExportReport(BaseModel):
    """The check of what a target wrote.

    ``file``: the main file, or the folder that the consumer is given (``.``). ``error``: relative L2 distance of its output from
    the simulation's on one call. ``dropped``: what the target cannot hold and left out; empty unless that was asked for.
    ``note``: what else there is to know; empty: nothing.
    """

    target: str
    file: str
    error: float
    dropped: list[str] = []
    note: str = ""

    def lines(self) -> list[str]:
        """What the command line prints below the name of the file."""
        dropped = [f"dropped: {each}" for each in self.dropped]
        return [f"differs from the simulation by {self.error:.2g} (relative, one call)", *dropped, *filter(None, [self.note])]


class Target(ABC):
    """A consumer to write for. ``name``: what `export` takes as ``to``."""

    name: ClassVar[str]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" in vars(cls):
            register(_targets, cls.name, cls)

    @abstractmethod
    def require(self) -> None:
        """Raise `CheckpointError` where a package that it needs is missing."""

    @abstractmethod
    def write(self, host: Host, folder: Path, form: str, lossy: bool) -> ExportReport:
        """Write the quantized pipeline or its denoiser into the empty `folder`, read it back, check it, and describe it.

        The denoiser computes with the simulation and is not changed. The folder gets its final name after this returns; where it
        raises, nothing is kept. `form` is as of `export`; what it does not concern leaves it out. What the consumer cannot hold is
        refused in one line that lists it, or with `lossy` dropped and listed in the report.
        """


def relative_error(output: Tensor, expected: Tensor) -> float:
    """The L2 distance of two outputs, relative to the norm of `expected`."""
    return float((output - expected).norm() / expected.norm())


def allowed_error(denoiser: nn.Module, arguments: dict[str, Any], expected: Tensor) -> float:
    """The relative error of one call that codes on rounding edges explain, measured with the simulation itself.

    Every value is moved by up to `EDGE` of its scale before it is quantized, so that codes near an edge change, as they may between
    two exact engines; the largest error of a few draws, with a margin, is allowed.
    """
    generator = torch.Generator().manual_seed(0)

    def move(quantizer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert isinstance(quantizer, OperandQuantizer)
        (x,) = arguments
        noise = torch.rand(x.shape, generator=generator).to(x.device, x.dtype) * 2 - 1
        return (x + noise * EDGE * quantizer.operands(x)[0],)

    with torch.no_grad(), watching(dict.fromkeys(input_quantizers(denoiser), move), before=True):
        outputs = [denoiser(**arguments) for _ in range(DRAWS)]
    predictions = [output if isinstance(output, Tensor) else output[0] for output in outputs]
    return ROUNDING + MARGIN * max(relative_error(prediction, expected) for prediction in predictions)


def refuse_adapter(denoiser: nn.Module) -> None:
    """Raise `CheckpointError` where a LoRA adapter is loaded, which takes the place of layers."""
    if (adapted := first_adapter(denoiser)) is not None:
        raise CheckpointError(f"layer {adapted!r}: a LoRA adapter is loaded; unload it (unload_lora_weights) to export")


def refuse_difference(output: Tensor, expected: Tensor, allowed: float, instead: str = "") -> float:
    """The error of an output. Raises `CheckpointError` where it is more than `allowed`; `instead`: what to do then."""
    error = relative_error(output, expected)
    if not (torch.isfinite(output).all() and error <= allowed):
        raise CheckpointError(
            f"export: the file's output differs from the simulation's by {error:.2g}, where rounding explains {allowed:.2g}; "
            f"nothing was written{instead}"
        )
    return error


def refuse_dropped(name: str, dropped: list[str], lossy: bool, instead: str = "") -> None:
    """Raise `CheckpointError` where there is something that target `name` cannot hold, unless `lossy`.

    ``instead``: how to quantize so that it can.
    """
    if dropped and not lossy:
        raise CheckpointError(f"export: {name} cannot hold {'; '.join(dropped)}{instead}; --lossy drops that and states the error")


def unlike_rows(quantizer: DynamicQuantizer) -> str:
    """What consumers that quantize each row of an input symmetrically to 8 bits do not hold of its scales; empty: they hold all."""
    if quantizer.spec.bits < 8:
        return "inputs of fewer than 8 bits"
    if quantizer.per_sample:
        return "inputs with a scale for each sample"
    return "" if quantizer.spec.symmetric else "zero points of inputs with a scale for each row"


def counted(what: str, names: Sequence[str]) -> str:
    """What is dropped of some layers, with their number and the first of their names."""
    return f"{what} ({len(names)}: {names[0]}{', ...' if len(names) > 1 else ''})"


def target_names() -> list[str]:
    """The targets there are."""
    load(__package__)
    return sorted(_targets)


def target(name: str) -> Target:
    """The target of that name. Raises `CheckpointError` for one that is unknown."""
    if name not in target_names():
        raise CheckpointError(f"export: target {name!r}; allowed are {', '.join(target_names())}")
    return _targets[name]()

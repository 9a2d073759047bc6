"""What an export target is: it writes the files of one consumer, reads them back and checks them. A class with a name registers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel
from torch import Tensor

from diffquant.errors import CheckpointError
from diffquant.host.pipeline import Host
from diffquant.registry import load, register

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


def refuse_dropped(name: str, dropped: list[str], lossy: bool) -> None:
    """Raise `CheckpointError` where there is something that target `name` cannot hold, unless `lossy`."""
    if dropped and not lossy:
        raise CheckpointError(f"export: {name} cannot hold {'; '.join(dropped)}; --lossy drops that and states the error")


def target_names() -> list[str]:
    """The targets there are."""
    load(__package__)
    return sorted(_targets)


def target(name: str) -> Target:
    """The target of that name. Raises `CheckpointError` for one that is unknown."""
    if name not in target_names():
        raise CheckpointError(f"export: target {name!r}; allowed are {', '.join(target_names())}")
    return _targets[name]()

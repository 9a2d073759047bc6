"""What an export target is: a runtime whose files are written, read again and run. A class with a name registers itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from diffquant.errors import CheckpointError
from diffquant.registry import load, register

_targets: dict[str, type[Target]] = {}


class Target(ABC):
    """A runtime to write for. ``file``: the name of the main file in a folder."""

    name: ClassVar[str]
    file: ClassVar[str]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" in vars(cls):
            register(_targets, cls.name, cls)

    @abstractmethod
    def require(self) -> None:
        """Raise `CheckpointError` where a package that it needs is missing."""

    @abstractmethod
    def build(self, model: nn.Module, example: Mapping[str, Any], form: str = "exact") -> Any:
        """The graph of a frozen `model`; `example` holds arguments of its forward by name, `form` is as of `export`.

        The batch is left open, other sizes are those of the example. Inputs have the names of the arguments, of nested ones joined
        by dots, in the order of the forward's signature; the timestep is one per sample; `interval` comes last where the model has
        parameter sets (one per sample, or one for all). Raises `SpecError` where the model cannot be put so, `CheckpointError`
        where a package is missing.
        """

    @abstractmethod
    def pair(self, graph: Any) -> int:
        """The largest sum of two products of an unsigned code and a signed integer in a graph of `build`."""

    @abstractmethod
    def signed_weights(self, graph: Any) -> bool:
        """Whether every quantized weight of a graph is int8."""

    @abstractmethod
    def save(self, graph: Any, folder: Path) -> None:
        """Write a graph into a new `folder`."""

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """What `save` wrote, compiled by the runtime for the CPU with as many threads as PyTorch has."""

    @abstractmethod
    def run(self, compiled: Any, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The outputs for a call of `model` with `arguments`, at the present interval of its clock."""

    @abstractmethod
    def products(self, compiled: Any) -> Iterator[tuple[str, bool]]:
        """Name of the layer of each product that the runtime computes, and whether it is one of 8-bit integers."""

    def note(self, symmetric: bool) -> str:
        """What a user should know of the file; empty: nothing. ``symmetric``: every operand is int8 with a zero point of 0."""
        return ""


def target_names() -> list[str]:
    """The targets there are."""
    load(__package__)
    return sorted(_targets)


def target(name: str) -> Target:
    """The target of that name. Raises `CheckpointError` for one that is unknown."""
    if name not in target_names():
        raise CheckpointError(f"export: target {name!r}; allowed are {', '.join(target_names())}")
    return _targets[name]()

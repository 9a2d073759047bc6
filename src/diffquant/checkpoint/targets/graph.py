"""Targets that are runtimes: the denoiser as a graph, whose integer products are counted.

The graph gets its sizes from the first call that the pipeline makes; the batch is left open. What is written is read again, run on
that call and compared with the simulation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from diffquant.checkpoint.targets.base import ExportReport, Target, allowed_error, refuse_difference
from diffquant.core.model import quantized_layers
from diffquant.engines.base import attentions
from diffquant.engines.exactness import PAIR
from diffquant.engines.graph import integer_layers, signed
from diffquant.errors import CheckpointError
from diffquant.host.pipeline import Host


class GraphReport(ExportReport):
    """The check of an exported graph.

    ``allowed``: what codes on rounding edges may explain of the error. ``pair``: the largest sum of two products of an unsigned
    code and a signed weight; up to 32767 it fits 16 bits, and the file is exact on processors that add products so. ``integer``,
    ``floating``: products computed from 8-bit integers, and not. ``floating_layers``: quantized layers and attentions with a
    product that is not. ``symmetric``: every operand is int8 with a zero point of 0, which TensorRT asks for.
    """

    form: str
    allowed: float
    pair: int
    integer: int
    floating: int
    floating_layers: list[str]
    symmetric: bool

    def lines(self) -> list[str]:
        """As of every report, and how many products are computed from integers."""
        error, *others = super().lines()
        products = [f"{self.integer} products of integers, {self.floating} in floating point"]
        if self.floating_layers:
            products.append(f"quantized, but computed in floating point there: {', '.join(self.floating_layers)}")
        return [f"{error}; rounding explains {self.allowed:.2g}", *products, *others]


class GraphTarget(Target):
    """A runtime that computes with a graph. ``file``: the name of the main file in a folder."""

    file: ClassVar[str]

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
        """Write a graph into `folder`, which is made where it does not exist."""

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

    def write(self, host: Host, folder: Path, form: str, lossy: bool) -> GraphReport:
        """Build, save, load and check a graph. Nothing is dropped: `build` refuses what the graph cannot hold.

        Raises `CheckpointError` when the written file does not compute what the simulation does here or multiplies no integers.
        """
        arguments, expected = host.example_call(steps=1)
        graph = self.build(host.denoiser, arguments, form)
        symmetric = signed(host.denoiser) and self.signed_weights(graph)
        facts = {"form": form, "pair": self.pair(graph), "symmetric": symmetric, "note": self.note(symmetric)}
        self.save(graph, folder)
        return self.check(folder, host.denoiser, arguments, expected, facts)

    def check(
        self, folder: Path, denoiser: nn.Module, arguments: dict[str, Any], expected: Tensor, facts: dict[str, Any]
    ) -> GraphReport:
        """Run the written file on the call that it was made from; `facts` of the graph go into the report."""
        compiled = self.load(folder)
        output = self.run(compiled, denoiser, arguments)[0]
        products = list(self.products(compiled))
        integer = sum(integer for _, integer in products)
        quantized = {name for name, _ in quantized_layers(denoiser)} | set(attentions(denoiser))
        allowed = allowed_error(denoiser, arguments, expected)
        error = refuse_difference(output, expected, allowed, "; use form='exact'" if facts["pair"] > PAIR else "")
        if not integer:
            raise CheckpointError("export: the runtime would multiply no integers; nothing was written")
        return GraphReport(
            target=self.name,
            file=self.file,
            error=error,
            allowed=allowed,
            integer=integer,
            floating=len(products) - integer,
            floating_layers=sorted(name for name, whole in integer_layers(products).items() if not whole and name in quantized),
            **facts,
        )

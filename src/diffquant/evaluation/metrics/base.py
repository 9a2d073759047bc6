"""The base of all metrics: a figure of a model's samples, and its text in reports. A class with a name registers itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from PIL import Image

from diffquant.evaluation import text
from diffquant.evaluation.intervals import Interval
from diffquant.evaluation.provenance import Protocol
from diffquant.evaluation.runs import Reference, Run, Samples
from diffquant.registry import load, register

F = TypeVar("F")
REGISTRY: dict[str, type[Metric[Any]]] = {}  # by name, in the order of definition


class Metric(ABC, Generic[F]):
    """A figure of a model's samples. Defining a class with a `name` registers it.

    Only `name` and `compute` are required. The defaults of the others suit an `Interval`, or a number in a column of its own.

    `name`           key of the figure in report.json
    `title`          heading of its column; empty: it has no column
    `figure`         type of the figure: pydantic checks what `compute` returns, and reads it back from JSON
    `form`           how a number in a cell is written
    `place`          columns and sections stand in this order
    `in_terminal`    whether the table for a terminal has the column; that of report.md has all
    `of_reference`   whether full precision has the figure too; else it says how far a model is from full precision
    `under_settings` heading of its table in the report of `robustness`; empty: it has none
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    figure: ClassVar[Any] = Interval
    form: ClassVar[str] = "{:.3g}"
    place: ClassVar[int] = 1000
    in_terminal: ClassVar[bool] = True
    of_reference: ClassVar[bool] = False
    under_settings: ClassVar[str] = ""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" in vars(cls):
            register(REGISTRY, cls.name, cls)

    def prepare(self, reference: Reference, other: Samples | None) -> Any:
        """Compute once from full precision what every `compute` gets as `prepared`.

        `other`: full precision's samples of other noise; None without an extractor of features.
        """
        return None

    @abstractmethod
    def compute(self, run: Run, prepared: Any) -> F | None:
        """The figure of a model, or None if the metric does not apply."""

    def format(self, figure: F, newline: str) -> str:
        """The figure as the text of a cell; `newline` separates its lines."""
        return text.interval(figure, self.form, newline) if isinstance(figure, Interval) else self.form.format(figure)

    def change(self, figure: F) -> Interval | None:
        """The difference of the figure from full precision's, if that was measured."""
        return None

    def under_setting(self, figure: F, reference: F | None) -> str:
        """The figure as a cell of its table under several settings; `reference` is full precision's."""
        return self.format(figure, " ")

    def legend(self, protocol: Protocol) -> str:
        """Sentences below a table that has the column."""
        return ""

    def section(self, figures: Mapping[str, F]) -> list[str]:
        """Paragraphs of report.md on the figures of all models that have one, by the model's name."""
        return []

    def picture(self, figures: Mapping[str, F]) -> Image.Image | None:
        """The picture that is written beside the report as ``NAME.png``, if there is one."""
        return None


def registered() -> dict[str, Metric[Any]]:
    """All metrics by name, in the order of their columns."""
    load(__package__)
    return {kind.name: kind() for kind in sorted(REGISTRY.values(), key=lambda kind: kind.place)}

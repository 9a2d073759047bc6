"""Figures and tables as text, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from diffquant.evaluation.intervals import Interval


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3g}"


def interval(measured: Interval | None, form: str, newline: str) -> str:
    """A value and its interval, or a dash."""
    if measured is None:
        return "-"
    return f"{form.format(measured.value)}{newline}[{form.format(measured.low)}, {form.format(measured.high)}]"


def plain_table(header: Sequence[str], lines: Sequence[Sequence[str]], legend: str, title: str | None = None) -> Table:
    """A table for a terminal, with a legend below; the columns of one with a title are numbers but for the first."""
    table = Table(
        title=title,
        title_justify="left",
        caption=legend,
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for index, column in enumerate(header):
        table.add_column(escape(column), justify="right" if title and index else "left")
    for line in lines:
        table.add_row(*(escape(text) for text in line))
    return table


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown, the first `left` columns set to the left."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (header, rule, *lines))

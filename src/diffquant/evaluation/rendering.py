"""A report as people read it: a table for the terminal, and Markdown.

Intervals stand below their values; columns in which nothing was measured are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from diffquant.evaluation.measurement import Measurement
from diffquant.evaluation.metrics import Metric, registered
from diffquant.evaluation.provenance import Protocol
from diffquant.evaluation.text import interval, markdown_table, plain_table


def table(protocol: Protocol, measurements: Sequence[Measurement]) -> Table:
    """The figures for a terminal, without the columns that stand in report.md only, so that it fits."""
    metrics = [metric for metric in _columns(measurements) if metric.in_terminal]
    return plain_table(*_cells(metrics, measurements, "\n"), _legend(protocol, measurements), _title(protocol))


def markdown(protocol: Protocol, measurements: Sequence[Measurement], pictures: bool) -> str:
    """The figures as Markdown: the table, the pictures where there are any, and the protocol."""
    parts = [
        "# Evaluation",
        _title(protocol),
        markdown_table(*_cells(_columns(measurements), measurements, "<br>")),
        _legend(protocol, measurements),
    ]
    if pictures:
        parts.append("![The same noise through every model, one column per noise](pairs.png)")
    for metric, figures in measured(measurements):
        parts += metric.section(figures)
    parts += _change_section(measurements)
    fields = _flatten("", protocol.model_dump(mode="json"))
    parts += ["## Protocol", markdown_table(("field", "value"), fields, left=2)]
    return "\n\n".join(parts) + "\n"


def measured(measurements: Sequence[Measurement]) -> list[tuple[Metric[Any], dict[str, Any]]]:
    """Every metric of which there are figures, with these by the model's name."""
    every = [
        (metric, {each.name: each.figures[name] for each in measurements if name in each.figures})
        for name, metric in registered().items()
    ]
    return [(metric, figures) for metric, figures in every if figures]


def caption(measurement: Measurement) -> str:
    """What stands beside a model's row of pictures."""
    psnr = measurement.figures.get("psnr")
    return "" if psnr is None else "identical" if math.isinf(psnr.value) else f"PSNR {psnr.value:.1f} dB"


def _columns(measurements: Sequence[Measurement]) -> list[Metric[Any]]:
    return [metric for metric, _ in measured(measurements) if metric.title]


def _cells(metrics: Sequence[Metric[Any]], measurements: Sequence[Measurement], newline: str) -> tuple[list[str], list[list[str]]]:
    """Column names and the text of every model; columns in which nothing was measured are left out."""
    columns = {"model": [each.name for each in measurements], "file": [_file(each, newline) for each in measurements]}
    for metric in metrics:
        figures = [each.figures.get(metric.name) for each in measurements]
        columns[metric.title] = ["-" if figure is None else metric.format(figure, newline) for figure in figures]
    columns["seconds"] = [_seconds(each, newline) for each in measurements]
    shown = {title: cells for title, cells in columns.items() if any(cell != "-" for cell in cells)}
    return list(shown), [list(line) for line in zip(*shown.values(), strict=True)]


def _change_section(measurements: Sequence[Measurement]) -> list[str]:
    """How far quality is from full precision's, or nothing."""
    columns: dict[str, dict[str, str]] = {}
    for metric, figures in measured(measurements):
        changes = {name: metric.change(figure) for name, figure in figures.items()}
        if any(changes.values()):
            columns[metric.title] = {name: interval(change, "{:+.3g}", " ") for name, change in changes.items() if change}
    lines = [
        [each.name, *(column.get(each.name, "-") for column in columns.values())]
        for each in measurements
        if any(each.name in column for column in columns.values())
    ]
    if not lines:
        return []
    return [
        "## Change from full precision",
        "Paired by noise; FID without the bias of n. A model is as good as full precision to within a margin where its whole "
        "interval is.",
        markdown_table(["model", *columns], lines),
    ]


def _flatten(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flatten(f"{prefix}.{key}".lstrip("."), inner)]
    return [(prefix, "-" if value is None else str(value))]


def _title(protocol: Protocol) -> str:
    sampling = protocol.sampling
    scheduler = protocol.scheduler.get("_class_name", sampling.sampler)
    return f"{sampling.samples} samples, {scheduler}, {sampling.steps} steps, eta {sampling.eta:g}, seed {sampling.seed}"


def _legend(protocol: Protocol, measurements: Sequence[Measurement]) -> str:
    metrics = registered()
    unknown = sorted({name for each in measurements for name in each.figures if name not in metrics})
    lines = ["Brackets: 95 % intervals.", *(metric.legend(protocol) for metric in _columns(measurements))]
    if unknown:
        lines.append(f"Not shown, since nothing here defines these metrics: {', '.join(unknown)}.")
    return " ".join(dict.fromkeys(line for line in lines if line))


def _seconds(measurement: Measurement, newline: str) -> str:
    engine = newline + measurement.engine if measurement.engine else ""
    return "-" if measurement.seconds is None else f"{measurement.seconds:.1f}{engine}"


def _file(measurement: Measurement, newline: str) -> str:
    if measurement.file_bytes is None:
        return "-"
    large = measurement.file_bytes >= 2**20
    size = f"{measurement.file_bytes / 2**20:.2f} MiB" if large else f"{measurement.file_bytes / 2**10:.1f} KiB"
    return size if measurement.ratio is None else f"{size}{newline}{measurement.ratio:.3f}x"

"""A report as people read it: a table for the terminal, and Markdown.

Intervals stand below their values; columns in which nothing was measured are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from diffquant.evaluation.distances import Distances
from diffquant.evaluation.metrics import Interval
from diffquant.evaluation.rows import Protocol, Row

NOT_IN_TERMINAL = ("SSIM", "KID to full precision", "KID to data")


def table(protocol: Protocol, rows: Sequence[Row]) -> Table:
    """The figures for a terminal; KID and SSIM are in report.md only, so that it fits."""
    shown = Table(
        title=_title(protocol),
        title_justify="left",
        caption=_legend(protocol),
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    columns, lines = _cells(rows, "\n")
    kept = [index for index, column in enumerate(columns) if column not in NOT_IN_TERMINAL]
    for index in kept:
        shown.add_column(escape(columns[index]), justify="left" if index == 0 else "right")
    for line in lines:
        shown.add_row(*(escape(line[index]) for index in kept))
    return shown


def markdown(protocol: Protocol, rows: Sequence[Row], pictures: bool) -> str:
    """The figures as Markdown: the table, the pictures where there are any, and the protocol."""
    columns, lines = _cells(rows, "<br>")
    parts = [
        "# Evaluation",
        _title(protocol),
        markdown_table(columns, lines),
        _legend(protocol),
    ]
    if pictures:
        parts.append("![The same noise through every model, one column per noise](pairs.png)")
    if any(row.drift for row in rows):
        parts.append("![Relative L2 distance of the latents from full precision, over sampling steps](drift.png)")
    parts += _change_section(rows) + _accumulation_sections(rows)
    fields = _flatten("", protocol.model_dump(mode="json"))
    parts += ["## Protocol", "\n".join(_markdown_row(cells) for cells in (("field", "value"), ("---", "---"), *fields))]
    return "\n\n".join(parts) + "\n"


def _change_section(rows: Sequence[Row]) -> list[str]:
    """How far quality is from full precision's, or nothing."""
    changes = {
        "FID to data": {row.name: row.to_data_change for row in rows},
        "legibility": {row.name: row.legibility_change for row in rows},
    }
    columns = [name for name, found in changes.items() if any(found.values())]
    if not columns:
        return []
    lines = [
        [row.name, *(interval(changes[name][row.name], "{:+.3g}", " ") for name in columns)]
        for row in rows
        if any(changes[name][row.name] for name in columns)
    ]
    return [
        "## Change from full precision",
        "Paired by noise; FID without the bias of n. A model is as good as full precision to within a margin where its whole "
        "interval is.",
        markdown_table(["model", *columns], lines),
    ]


def _accumulation_sections(rows: Sequence[Row]) -> list[str]:
    """What is known of how errors add up: two tables and a picture, or nothing."""
    sections = []
    stepped = [row for row in rows if row.by_step]
    if stepped:
        header = ["after steps", *(str(at.steps) for at in stepped[0].by_step)]
        lines = [[row.name, *(_number(at.to_reference.fid.value) for at in row.by_step)] for row in stepped]
        lines.append(["floor", *(_number(at.floor.fid.value) for at in stepped[0].by_step)])
        sections += ["## FID to full precision on the way", markdown_table(header, lines)]
    traced = [(row.name, row.accumulation) for row in rows if row.accumulation is not None]
    if traced:
        header = ["steps quantized", *(name for name, _ in traced)]
        stretches = zip(*(found.stretches for _, found in traced), strict=True)
        lines = [
            [f"{row[0].first + 1} to {row[0].last + 1}", *(_number(one.final_error.value) for one in row)] for row in stretches
        ]
        lines.append(["all", *(_number(found.accumulated[-1]) for _, found in traced)])
        lines.append(["all, as local errors predict", *(_number(found.predicted[-1]) for _, found in traced)])
        sections += [
            "## How errors add up",
            f"Final error (relative L2, mean of {traced[0][1].samples} trajectories) when only some steps are quantized. "
            "Predicted: the error of each single step, carried on by full precision's Jacobian.",
            markdown_table(header, lines),
            "![Local, accumulated and predicted error over sampling steps, and the final error of each tenth](accumulation.png)",
        ]
    return sections


def plain_table(header: Sequence[str], lines: Sequence[Sequence[str]], legend: str) -> Table:
    """A table for a terminal, with a legend below."""
    shown = Table(caption=legend, caption_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in header:
        shown.add_column(escape(column))
    for line in lines:
        shown.add_row(*(escape(text) for text in line))
    return shown


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown, the first `left` columns set to the left."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(_markdown_row(cells) for cells in (header, rule, *lines))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _flatten(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flatten(f"{prefix}.{key}".lstrip("."), inner)]
    return [(prefix, "-" if value is None else str(value))]


def _title(protocol: Protocol) -> str:
    sampling = protocol.sampling
    scheduler = protocol.scheduler.get("_class_name", sampling.sampler)
    return f"{sampling.samples} samples, {scheduler}, {sampling.steps} steps, eta {sampling.eta:g}, seed {sampling.seed}"


def _legend(protocol: Protocol) -> str:
    lines = ["Brackets: 95 % intervals. Final error: mean relative L2 of the last sample to that of full precision, same noise."]
    if protocol.extractor is not None:
        n = protocol.sampling.samples
        lines.append(
            f"FID and KID on features of {protocol.extractor}: at n = {n}, and FID without the bias of n (inf). "
            "Floor: the same distance for full precision with other noise."
        )
    return " ".join(lines)


def _cells(rows: Sequence[Row], newline: str) -> tuple[list[str], list[list[str]]]:
    """Column names and the text of every row; columns in which nothing was measured are left out."""
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda row: row.name,
        "file": lambda row: _file(row, newline),
        "final error": lambda row: interval(row.final_error, "{:.3g}", newline),
        "PSNR dB": lambda row: interval(row.psnr, "{:.2f}", newline),
        "SSIM": lambda row: interval(row.ssim, "{:.3f}", newline),
        "FID to full precision": lambda row: _fid(row.to_reference, row.floor, newline),
        "FID to data": lambda row: _fid(row.to_data, row.floor_to_data, newline),
        "KID to full precision": lambda row: _kid(row.to_reference, row.floor, newline),
        "KID to data": lambda row: _kid(row.to_data, row.floor_to_data, newline),
        "legibility": lambda row: interval(row.legibility, "{:.3f}", newline),
        "accuracy": lambda row: interval(row.accuracy, "{:.3f}", newline),
        "CLIP": lambda row: interval(row.clip, "{:.2f}", newline),
        "seconds": lambda row: _seconds(row, newline),
    }
    texts = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    shown = [name for name, cells in texts.items() if any(cell != "-" for cell in cells)]
    return shown, [[texts[name][index] for name in shown] for index in range(len(rows))]


def _seconds(row: Row, newline: str) -> str:
    return "-" if row.seconds is None else f"{row.seconds:.1f}{newline + row.engine if row.engine else ''}"


def _file(row: Row, newline: str) -> str:
    if row.file_bytes is None:
        return "-"
    size = f"{row.file_bytes / 2**20:.2f} MiB" if row.file_bytes >= 2**20 else f"{row.file_bytes / 2**10:.1f} KiB"
    return size if row.ratio is None else f"{size}{newline}{row.ratio:.3f}x"


def interval(found: Interval | None, form: str, newline: str) -> str:
    """A value and its interval, or a dash."""
    if found is None:
        return "-"
    return f"{form.format(found.value)}{newline}[{form.format(found.low)}, {form.format(found.high)}]"


def beside(found: Interval | None, full: Interval | None) -> str:
    """A value, and full precision's in brackets."""
    return "-" if found is None or full is None else f"{found.value:.3f} ({full.value:.3f})"


def fid_beside_floor(measured: Distances | None, floor: Distances | None) -> str:
    """An FID, and its floor in brackets."""
    return "-" if measured is None or floor is None else f"{_number(measured.fid.value)} ({_number(floor.fid.value)})"


def _fid(measured: Distances | None, floor: Distances | None, newline: str) -> str:
    if measured is None:
        return "-"
    fid = measured.fid
    lines = [_number(fid.value)]
    if floor is not None:
        lines.append(f"floor {_number(floor.fid.value)}")
    if fid.extrapolated is None:
        lines.append("inf: n too small")
    else:
        lines += [f"inf {_number(fid.extrapolated)}", f"[{_number(fid.low)}, {_number(fid.high)}]"]
    return newline.join(lines)


def _kid(measured: Distances | None, floor: Distances | None, newline: str) -> str:
    if measured is None:
        return "-"
    lines = [f"{kid.value:.2g} ± {kid.standard_error:.1g}" for kid in (measured.kid, *([floor.kid] if floor else []))]
    return f"{newline}floor ".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def caption(row: Row) -> str:
    """What stands beside a model's row of pictures."""
    return "" if row.psnr is None else "identical" if math.isinf(row.psnr.value) else f"PSNR {row.psnr.value:.1f} dB"

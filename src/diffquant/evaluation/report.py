"""What an evaluation found, with everything needed to judge it: JSON, Markdown, a grid of pairs and a plot of drift.

Every report carries its protocol. Reports whose protocols differ in any field are not compared. In JSON, an infinite value (the
PSNR of equal pictures) is the string "Infinity"; null is what was not measured.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from diffquant.core.spec import EvaluationError
from diffquant.evaluation.accumulation import Accumulation
from diffquant.evaluation.compare import Comparison, StepDistances
from diffquant.evaluation.drawing import draw_accumulation, draw_drift, draw_pairs
from diffquant.evaluation.metrics import GROUPS, RESAMPLES, SSIM_RULE, UINT8_RULE, Distances, Interval
from diffquant.evaluation.reference import ReferenceRun
from diffquant.evaluation.sampling import SamplingProtocol

FORMAT = 1  # of report.json
PAIRS = 12  # columns of pairs.png
NOT_IN_TERMINAL = ("SSIM", "KID to full precision", "KID to data")
PACKAGES = ("diffquant", "torch", "diffusers", "numpy")
INTERVALS = f"95 %; paired: percentile bootstrap, {RESAMPLES} resamples; FID: delete-a-group jackknife, {GROUPS} groups"


class Protocol(BaseModel):
    """How the figures of a report came about; figures of two reports compare only if all of it is equal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampling: SamplingProtocol
    floor_seed: int
    scheduler: dict[str, Any]
    reference: str
    reference_sha256: str
    extractor: str | None
    extractor_sha256: str | None
    data_sha256: str | None
    data_samples: int | None
    clip: str | None = None
    clip_sha256: str | None = None
    uint8_rule: str
    ssim_rule: str
    intervals: str
    versions: dict[str, str]
    device: str
    dtype: str


class Row(BaseModel):
    """The figures of one model; the row of the full-precision model has no paired figures.

    `to_reference` is the distance from the full-precision samples of the same noise and `floor` that of full precision from itself
    with other noise; `floor_to_data` is the distance of full precision with other noise from the data. `drift` and `noise_sqnr_db`
    are per step. `ratio` is `file_bytes` over those of full precision.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    name: str
    file_bytes: int | None = None
    ratio: float | None = None
    final_error: Interval | None = None
    final_error_median: Interval | None = None
    psnr: Interval | None = None
    psnr_median: float | None = None
    ssim: Interval | None = None
    to_reference: Distances | None = None
    floor: Distances | None = None
    to_data: Distances | None = None
    floor_to_data: Distances | None = None
    legibility: Interval | None = None
    accuracy: Interval | None = None
    clip: Interval | None = None
    seconds: float | None
    engine: str = ""
    timesteps: tuple[float, ...] = ()
    drift: tuple[float, ...] = ()
    noise_sqnr_db: tuple[float, ...] = ()
    by_step: tuple[StepDistances, ...] = ()
    accumulation: Accumulation | None = None


class Report(BaseModel):
    """A protocol and one row per model, full precision first.

    `pictures` holds the first pictures of each model by name, for the grid; it is not part of the JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    protocol: Protocol
    rows: tuple[Row, ...]
    pictures: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)

    def write(self, folder: Path) -> None:
        """Write report.json, report.md, drift.png and, where they were measured, pairs.png and accumulation.png; each whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.pictures:
            captions = {row.name: _caption(row) for row in self.rows}
            _write(folder / "pairs.png", _save_image(draw_pairs(self.pictures, captions)))
        lines = {row.name: row.drift for row in self.rows if row.drift}
        if lines:
            _write(folder / "drift.png", _save_image(draw_drift(lines)))
        traced = {row.name: row.accumulation for row in self.rows if row.accumulation is not None}
        if traced:
            _write(folder / "accumulation.png", _save_image(draw_accumulation(traced)))
        _write(folder / "report.md", lambda path: path.write_text(markdown(self), encoding="utf-8"))
        _write(folder / "report.json", lambda path: path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8"))


def make_report(reference: ReferenceRun, comparisons: Sequence[Comparison], file_bytes: Mapping[str, int] | None = None) -> Report:
    """The report of models that were compared with one reference run; `file_bytes` is by name, full precision's included."""
    sizes = dict(file_bytes or {})
    full = sizes.get(reference.name)
    rows = [
        Row(
            name=reference.name,
            file_bytes=full,
            ratio=1.0 if full else None,
            floor=reference.floor,
            to_data=reference.to_data,
            floor_to_data=reference.floor_to_data,
            legibility=reference.legibility,
            accuracy=reference.accuracy,
            clip=reference.clip,
            seconds=reference.seconds,
        )
    ]
    shared = {field.name for field in dataclasses.fields(Comparison)} & set(Row.model_fields)
    for comparison in comparisons:
        size = sizes.get(comparison.name)
        rows.append(
            Row(
                **{name: getattr(comparison, name) for name in shared},
                file_bytes=size,
                ratio=size / full if size and full else None,
                floor=reference.floor,
                floor_to_data=reference.floor_to_data,
            )
        )
    _check_names([row.name for row in rows])
    pictures = {reference.name: reference.pictures} | {comparison.name: comparison.pictures for comparison in comparisons}
    return Report(
        protocol=_protocol(reference), rows=tuple(rows), pictures={name: p[:PAIRS].numpy() for name, p in pictures.items()}
    )


def read(path: Path) -> Report:
    """Read a report.json, or that of a folder. Its pictures are not there.

    Raises EvaluationError if the file is missing, of another format, or damaged.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise EvaluationError(f"{path}: is of format {found}; this version reads {FORMAT}; evaluate again")
        return Report.model_validate_json(json.dumps(content))
    except FileNotFoundError:
        raise EvaluationError(f"{path}: no such report; `diffquant evaluate` writes one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: is not JSON ({error}); evaluate again") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise EvaluationError(f"{path}: {field}: {first['msg']}; evaluate again") from None


def check_comparable(a: Report, b: Report) -> None:
    """Raise EvaluationError, naming every field of the protocol that differs, unless figures of both reports may be compared."""
    differences = _differences("", a.protocol.model_dump(mode="json"), b.protocol.model_dump(mode="json"))
    if differences:
        raise EvaluationError(f"reports: protocols differ in {'; '.join(differences)}; evaluate both under one protocol")


def _differences(prefix: str, a: Any, b: Any) -> list[str]:
    """`field: value and value` for every leaf of two nested dicts that differs."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [line for key in keys for line in _differences(f"{prefix}.{key}".lstrip("."), a.get(key), b.get(key))]
    return [] if a == b else [f"{prefix}: {a} and {b}"]


def table(report: Report) -> Table:
    """The report for a terminal, intervals below their values; KID and SSIM are in report.md only, so that it fits."""
    shown = Table(
        title=_title(report),
        title_justify="left",
        caption=_legend(report),
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    columns, lines = _cells(report, "\n")
    kept = [index for index, column in enumerate(columns) if column not in NOT_IN_TERMINAL]
    for index in kept:
        shown.add_column(escape(columns[index]), justify="left" if index == 0 else "right")
    for line in lines:
        shown.add_row(*(escape(line[index]) for index in kept))
    return shown


def markdown(report: Report) -> str:
    """The report as Markdown: the table, the pictures, and the protocol."""
    columns, lines = _cells(report, "<br>")
    parts = [
        "# Evaluation",
        _title(report),
        _markdown_table(columns, lines),
        _legend(report),
    ]
    if report.pictures:
        parts.append("![The same noise through every model, one column per noise](pairs.png)")
    if any(row.drift for row in report.rows):
        parts.append("![Relative L2 distance of the latents from full precision, over sampling steps](drift.png)")
    parts += _accumulation_sections(report)
    fields = _flatten("", report.protocol.model_dump(mode="json"))
    parts += ["## Protocol", "\n".join(_markdown_row(cells) for cells in (("field", "value"), ("---", "---"), *fields))]
    return "\n\n".join(parts) + "\n"


def _accumulation_sections(report: Report) -> list[str]:
    """What is known of how errors add up: two tables and a picture, or nothing."""
    sections = []
    stepped = [row for row in report.rows if row.by_step]
    if stepped:
        header = ["after steps", *(str(at.steps) for at in stepped[0].by_step)]
        lines = [[row.name, *(_number(at.to_reference.fid.value) for at in row.by_step)] for row in stepped]
        lines.append(["floor", *(_number(at.floor.fid.value) for at in stepped[0].by_step)])
        sections += ["## FID to full precision on the way", _markdown_table(header, lines)]
    traced = [(row.name, row.accumulation) for row in report.rows if row.accumulation is not None]
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
            _markdown_table(header, lines),
            "![Local, accumulated and predicted error over sampling steps, and the final error of each tenth](accumulation.png)",
        ]
    return sections


def _markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(_markdown_row(cells) for cells in (header, ["---"] + ["---:"] * (len(header) - 1), *lines))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _flatten(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flatten(f"{prefix}.{key}".lstrip("."), inner)]
    return [(prefix, "-" if value is None else str(value))]


def _title(report: Report) -> str:
    sampling = report.protocol.sampling
    scheduler = report.protocol.scheduler.get("_class_name", sampling.sampler)
    return f"{sampling.samples} samples, {scheduler}, {sampling.steps} steps, eta {sampling.eta:g}, seed {sampling.seed}"


def _legend(report: Report) -> str:
    lines = ["Brackets: 95 % intervals. Final error: mean relative L2 of the last sample to that of full precision, same noise."]
    if report.protocol.extractor is not None:
        n = report.protocol.sampling.samples
        lines.append(
            f"FID and KID on features of {report.protocol.extractor}: at n = {n}, and FID without the bias of n (inf). "
            "Floor: the same distance for full precision with other noise."
        )
    return " ".join(lines)


def _cells(report: Report, newline: str) -> tuple[list[str], list[list[str]]]:
    """Column names and the text of every row; columns in which nothing was measured are left out."""
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda row: row.name,
        "file": lambda row: _file(row, newline),
        "final error": lambda row: _interval(row.final_error, "{:.3g}", newline),
        "PSNR dB": lambda row: _interval(row.psnr, "{:.2f}", newline),
        "SSIM": lambda row: _interval(row.ssim, "{:.3f}", newline),
        "FID to full precision": lambda row: _fid(row.to_reference, row.floor, newline),
        "FID to data": lambda row: _fid(row.to_data, row.floor_to_data, newline),
        "KID to full precision": lambda row: _kid(row.to_reference, row.floor, newline),
        "KID to data": lambda row: _kid(row.to_data, row.floor_to_data, newline),
        "legibility": lambda row: _interval(row.legibility, "{:.3f}", newline),
        "accuracy": lambda row: _interval(row.accuracy, "{:.3f}", newline),
        "CLIP": lambda row: _interval(row.clip, "{:.2f}", newline),
        "seconds": lambda row: _seconds(row, newline),
    }
    texts = {name: [cell(row) for row in report.rows] for name, cell in columns.items()}
    shown = [name for name, cells in texts.items() if any(cell != "-" for cell in cells)]
    return shown, [[texts[name][index] for name in shown] for index in range(len(report.rows))]


def _seconds(row: Row, newline: str) -> str:
    return "-" if row.seconds is None else f"{row.seconds:.1f}{newline + row.engine if row.engine else ''}"


def _file(row: Row, newline: str) -> str:
    if row.file_bytes is None:
        return "-"
    size = f"{row.file_bytes / 2**20:.2f} MiB" if row.file_bytes >= 2**20 else f"{row.file_bytes / 2**10:.1f} KiB"
    return size if row.ratio is None else f"{size}{newline}{row.ratio:.3f}x"


def _interval(interval: Interval | None, form: str, newline: str) -> str:
    if interval is None:
        return "-"
    return f"{form.format(interval.value)}{newline}[{form.format(interval.low)}, {form.format(interval.high)}]"


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


def _caption(row: Row) -> str:
    return "" if row.psnr is None else "identical" if math.isinf(row.psnr.value) else f"PSNR {row.psnr.value:.1f} dB"


def _protocol(reference: ReferenceRun) -> Protocol:
    return Protocol(
        sampling=reference.protocol,
        floor_seed=reference.protocol.floor_seed,
        scheduler=reference.scheduler,
        reference=reference.name,
        reference_sha256=reference.weights_sha256,
        extractor=reference.extractor.name if reference.extractor else None,
        extractor_sha256=reference.extractor.sha256 if reference.extractor else None,
        data_sha256=reference.data.sha256 if reference.data else None,
        data_samples=len(reference.data.features) if reference.data else None,
        clip=reference.scorer.name if reference.scorer else None,
        clip_sha256=reference.scorer.sha256 if reference.scorer else None,
        uint8_rule=UINT8_RULE,
        ssim_rule=SSIM_RULE,
        intervals=INTERVALS,
        versions={name: _version(name) for name in PACKAGES},
        device=reference.device,
        dtype=reference.dtype,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # imported from a source tree


def _check_names(names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise EvaluationError(f"report: {', '.join(repeated)} names more than one model; give every comparison its own name")


def _save_image(image: Image.Image) -> Callable[[Path], object]:
    return lambda path: image.save(path, format="PNG")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name, then rename: a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

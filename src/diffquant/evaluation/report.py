"""What an evaluation measured, with everything needed to judge it: JSON, Markdown, a grid of pairs and plots.

Every report carries its protocol; figures of two reports compare only if their protocols are equal. In JSON, an infinite value (the
PSNR of equal pictures) is the string "Infinity"; null is what was not measured. In tables intervals stand below their values, and
columns in which nothing was measured are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table

from diffquant.errors import EvaluationError
from diffquant.evaluation.compare import Comparison
from diffquant.evaluation.grids import draw_pairs
from diffquant.evaluation.measurement import Measurement
from diffquant.evaluation.metrics import Metric, registered
from diffquant.evaluation.provenance import Protocol
from diffquant.evaluation.text import interval, markdown_table, plain_table
from diffquant.files import renamed_when_done, write_text

FORMAT = 2  # of report.json
PAIRS = 12  # columns of pairs.png


class Report(BaseModel):
    """A protocol and what was measured of each model, full precision first.

    `pictures` holds the first pictures of each model by name, for the grid; it is not part of the JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    protocol: Protocol
    measurements: tuple[Measurement, ...]
    pictures: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)

    def table(self) -> Table:
        """The figures for a terminal, without the columns that stand in report.md only, so that it fits."""
        metrics = [metric for metric in self._columns() if metric.in_terminal]
        return plain_table(*self._cells(metrics, "\n"), self._legend(), self._title())

    def markdown(self) -> str:
        """What report.md holds: the table, the pictures where there are any, and the protocol."""
        parts = ["# Evaluation", self._title(), markdown_table(*self._cells(self._columns(), "<br>")), self._legend()]
        if self.pictures:
            parts.append("![The same noise through every model, one column per noise](pairs.png)")
        for metric, figures in self._figures():
            parts += metric.section(figures)
        parts += self._change_section()
        fields = _flatten("", self.protocol.model_dump(mode="json"))
        parts += ["## Protocol", markdown_table(("field", "value"), fields, left=2)]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        """Write report.json, report.md, pairs.png where there are pictures, and the pictures of metrics; each whole."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.pictures:
            captions = {each.name: _caption(each) for each in self.measurements}
            write_image(draw_pairs(self.pictures, captions), folder / "pairs.png")
        for metric, figures in self._figures():
            if (picture := metric.picture(figures)) is not None:
                write_image(picture, folder / f"{metric.name}.png")
        write_text(folder / "report.md", self.markdown())
        write_text(folder / "report.json", self.model_dump_json(indent=2) + "\n")

    def _figures(self) -> list[tuple[Metric[Any], dict[str, Any]]]:
        """Every metric that was measured, with its figures by the model's name."""
        every = [
            (metric, {each.name: each.figures[name] for each in self.measurements if name in each.figures})
            for name, metric in registered().items()
        ]
        return [(metric, figures) for metric, figures in every if figures]

    def _columns(self) -> list[Metric[Any]]:
        return [metric for metric, _ in self._figures() if metric.title]

    def _cells(self, metrics: Sequence[Metric[Any]], newline: str) -> tuple[list[str], list[list[str]]]:
        """Column names, and a line of text for each model."""
        columns = {
            "model": [each.name for each in self.measurements],
            "file": [_file(each, newline) for each in self.measurements],
        }
        for metric in metrics:
            figures = [each.figures.get(metric.name) for each in self.measurements]
            columns[metric.title] = ["-" if figure is None else metric.format(figure, newline) for figure in figures]
        columns["seconds"] = [_seconds(each, newline) for each in self.measurements]
        measured = {title: cells for title, cells in columns.items() if any(cell != "-" for cell in cells)}
        return list(measured), [list(line) for line in zip(*measured.values(), strict=True)]

    def _change_section(self) -> list[str]:
        """How far quality is from full precision's, or nothing."""
        columns: dict[str, dict[str, str]] = {}
        for metric, figures in self._figures():
            changes = {name: metric.change(figure) for name, figure in figures.items()}
            if any(changes.values()):
                columns[metric.title] = {name: interval(change, "{:+.3g}", " ") for name, change in changes.items() if change}
        lines = [
            [each.name, *(column.get(each.name, "-") for column in columns.values())]
            for each in self.measurements
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

    def _title(self) -> str:
        sampling = self.protocol.sampling
        scheduler = self.protocol.scheduler.get("_class_name", sampling.sampler)
        return f"{sampling.samples} samples, {scheduler}, {sampling.steps} steps, eta {sampling.eta:g}, seed {sampling.seed}"

    def _legend(self) -> str:
        lines = ["Brackets: 95 % intervals.", *(metric.legend(self.protocol) for metric in self._columns())]
        if unknown := sorted({name for each in self.measurements for name in each.figures} - registered().keys()):
            lines.append(f"Not shown, since nothing here defines these metrics: {', '.join(unknown)}.")
        return " ".join(dict.fromkeys(line for line in lines if line))


def make_report(protocol: Protocol, comparisons: Sequence[Comparison], file_bytes: Mapping[str, int] | None = None) -> Report:
    """The report of models that were compared under one protocol, full precision first; `file_bytes` is by the model's name."""
    sizes = file_bytes or {}
    full = sizes.get(protocol.reference)
    names = [comparison.measurement.name for comparison in comparisons]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise EvaluationError(f"report: {', '.join(repeated)} names more than one model; give every comparison its own name")
    measurements = []
    for comparison in comparisons:
        size = sizes.get(comparison.measurement.name)
        ratio = size / full if size and full else None
        measurements.append(comparison.measurement.model_copy(update={"file_bytes": size, "ratio": ratio}))
    pictures = {name: comparison.pictures[:PAIRS].numpy() for name, comparison in zip(names, comparisons, strict=True)}
    return Report(protocol=protocol, measurements=tuple(measurements), pictures=pictures)


def read(path: Path) -> Report:
    """Read a report.json, or that of a folder. Its pictures are not there.

    Raises EvaluationError if the file is missing, of another format, or damaged.
    """
    path = path / "report.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        number = content.get("format") if isinstance(content, dict) else None
        if number != FORMAT:
            raise EvaluationError(f"{path}: is of format {number}; this version reads {FORMAT}; evaluate again")
        return Report.model_validate_json(json.dumps(content))
    except FileNotFoundError:
        raise EvaluationError(f"{path}: no such report; `diffquant evaluate` writes one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: is not JSON ({error}); evaluate again") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise EvaluationError(f"{path}: {field}: {first['msg']}; evaluate again") from None


def write_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with renamed_when_done(path) as partial:
        image.save(partial, format="PNG")


def _caption(measurement: Measurement) -> str:
    """What stands beside a model's row of pictures."""
    psnr = measurement.figures.get("psnr")
    return "" if psnr is None else "identical" if math.isinf(psnr.value) else f"PSNR {psnr.value:.1f} dB"


def _flatten(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flatten(f"{prefix}.{key}".lstrip("."), inner)]
    return [(prefix, "-" if value is None else str(value))]


def _seconds(measurement: Measurement, newline: str) -> str:
    engine = newline + measurement.engine if measurement.engine else ""
    return "-" if measurement.seconds is None else f"{measurement.seconds:.1f}{engine}"


def _file(measurement: Measurement, newline: str) -> str:
    if measurement.file_bytes is None:
        return "-"
    large = measurement.file_bytes >= 2**20
    size = f"{measurement.file_bytes / 2**20:.2f} MiB" if large else f"{measurement.file_bytes / 2**10:.1f} KiB"
    return size if measurement.ratio is None else f"{size}{newline}{measurement.ratio:.3f}x"

"""What an evaluation measured, with everything needed to judge it: JSON, Markdown, a grid of pairs and plots.

Every report carries its protocol; figures of two reports compare only if their protocols are equal. In JSON, an infinite value (the
PSNR of equal pictures) is the string "Infinity"; null is what was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table

from diffquant.errors import EvaluationError
from diffquant.evaluation import rendering
from diffquant.evaluation.compare import Comparison
from diffquant.evaluation.grids import draw_pairs
from diffquant.evaluation.measurement import Measurement
from diffquant.evaluation.provenance import Protocol
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
        """The figures for a terminal."""
        return rendering.table(self.protocol, self.measurements)

    def markdown(self) -> str:
        """What report.md holds."""
        return rendering.markdown(self.protocol, self.measurements, bool(self.pictures))

    def write(self, folder: Path) -> None:
        """Write report.json, report.md, pairs.png where there are pictures, and the pictures of metrics; each whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.pictures:
            captions = {measurement.name: rendering.caption(measurement) for measurement in self.measurements}
            write_image(draw_pairs(self.pictures, captions), folder / "pairs.png")
        for metric, figures in rendering.measured(self.measurements):
            if (picture := metric.picture(figures)) is not None:
                write_image(picture, folder / f"{metric.name}.png")
        write_text(folder / "report.md", self.markdown())
        write_text(folder / "report.json", self.model_dump_json(indent=2) + "\n")


def make_report(protocol: Protocol, comparisons: Sequence[Comparison], file_bytes: Mapping[str, int] | None = None) -> Report:
    """The report of models that were compared under one protocol, full precision first; `file_bytes` is by the model's name."""
    sizes, full = dict(file_bytes or {}), (file_bytes or {}).get(protocol.reference)
    names = [comparison.measurement.name for comparison in comparisons]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise EvaluationError(f"report: {', '.join(repeated)} names more than one model; give every comparison its own name")
    measurements = []
    for comparison in comparisons:
        size = sizes.get(comparison.measurement.name)
        known = {"file_bytes": size, "ratio": size / full if size and full else None}
        measurements.append(comparison.measurement.model_copy(update=known))
    pictures = {name: comparison.pictures[:PAIRS].numpy() for name, comparison in zip(names, comparisons, strict=True)}
    return Report(protocol=protocol, measurements=tuple(measurements), pictures=pictures)


def read(path: Path) -> Report:
    """Read a report.json, or that of a folder. Its pictures are not there.

    Raises EvaluationError if the file is missing, of another format, or damaged.
    """
    path = Path(path)
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

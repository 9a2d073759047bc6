"""What an evaluation found, with everything needed to judge it: JSON, Markdown, a grid of pairs and a plot of drift.

Every report carries its protocol. Reports whose protocols differ in any field are not compared. In JSON, an infinite value (the
PSNR of equal pictures) is the string "Infinity"; null is what was not measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table

from diffquant.errors import EvaluationError
from diffquant.evaluation import rendering
from diffquant.evaluation.compare import Comparison
from diffquant.evaluation.distances import GROUPS
from diffquant.evaluation.grids import draw_pairs
from diffquant.evaluation.metrics import RESAMPLES, SSIM_RULE, UINT8_RULE
from diffquant.evaluation.reference import ReferenceRun
from diffquant.evaluation.rows import Protocol, Row

FORMAT = 1  # of report.json
PAIRS = 12  # columns of pairs.png
PACKAGES = ("diffquant", "torch", "diffusers", "numpy")
INTERVALS = f"95 %; paired: percentile bootstrap, {RESAMPLES} resamples; FID: delete-a-group jackknife, {GROUPS} groups"


class Report(BaseModel):
    """A protocol and one row per model, full precision first.

    `pictures` holds the first pictures of each model by name, for the grid; it is not part of the JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    protocol: Protocol
    rows: tuple[Row, ...]
    pictures: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)

    def table(self) -> Table:
        """The figures for a terminal."""
        return rendering.table(self.protocol, self.rows)

    def markdown(self) -> str:
        """What report.md holds."""
        return rendering.markdown(self.protocol, self.rows, bool(self.pictures))

    def write(self, folder: Path) -> None:
        """Write report.json, report.md, drift.png and, where they were measured, pairs.png and accumulation.png; each whole."""
        from diffquant.evaluation.drawing import draw_accumulation, draw_drift  # matplotlib comes with an extra

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.pictures:
            captions = {row.name: rendering.caption(row) for row in self.rows}
            write_whole(folder / "pairs.png", save_image(draw_pairs(self.pictures, captions)))
        lines = {row.name: row.drift for row in self.rows if row.drift}
        if lines:
            write_whole(folder / "drift.png", save_image(draw_drift(lines)))
        traced = {row.name: row.accumulation for row in self.rows if row.accumulation is not None}
        if traced:
            write_whole(folder / "accumulation.png", save_image(draw_accumulation(traced)))
        write_whole(folder / "report.md", lambda path: path.write_text(self.markdown(), encoding="utf-8"))
        write_whole(folder / "report.json", lambda path: path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8"))


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


def save_image(image: Image.Image) -> Callable[[Path], object]:
    """What writes the picture to a path whatever its suffix."""
    return lambda path: image.save(path, format="PNG")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name, then rename: a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

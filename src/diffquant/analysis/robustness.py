"""`robustness`: what quantized models lose under other samplers, step counts, guidance or picture sizes.

Models are calibrated under one setting and used under others. Every combination of settings is an evaluation of its own, of full
precision and quantized models on the same noise: it says what quantization costs there, not what the sampler does. The result lists
combinations that the pipeline cannot be sampled with, and the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

from diffquant.errors import DiffquantError, EvaluationError
from diffquant.evaluation.evaluate import Model, evaluate, models_by_name, opened, require_extra
from diffquant.evaluation.features import FeatureExtractor
from diffquant.evaluation.metrics import Metric, registered
from diffquant.evaluation.report import Report, write_image
from diffquant.evaluation.text import markdown_table, plain_table
from diffquant.files import write_text
from diffquant.sampling.cache import identity
from diffquant.sampling.protocol import SamplingProtocol
from diffquant.sampling.sample import OnProgress

FORMAT = 2  # of robustness.json
FILE = "robustness.json"
VARIED = ("sampler", "steps", "eta", "clip_sample", "guidance_scale", "height", "width", "seed")  # what can be varied
DEFAULT: dict[str, tuple[Any, ...]] = {"sampler": ("pipeline", "dpm-solver++", "euler", "unipc"), "steps": (10, 20, 50)}
SAMPLES = 64

MAIN = "final_error"  # the metric of the table for a terminal, and of the picture
LEGEND = "Final error: mean relative L2 of the last sample to full precision's, same noise and settings. Brackets: 95 % intervals."


class Cell(BaseModel):
    """One combination of settings: its report, or why the pipeline cannot be sampled so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any]
    report: Report | None = None
    refused: str | None = None

    @property
    def name(self) -> str:
        """Such as ``sampler=euler,steps=10``, which is also the folder of its report."""
        return ",".join(f"{name}={value}" for name, value in self.settings.items())

    def figure(self, metric: str, model: str) -> Any:
        """A metric's figure of a model; None if there is none."""
        measurements = () if self.report is None else self.report.measurements
        return next((each.figures.get(metric) for each in measurements if each.name == model), None)


class Robustness(BaseModel):
    """The cells of all combinations of `varied` settings, the last one changing fastest; an unfinished run has fewer.

    Cells of earlier runs in the same folder with other values follow them; they are not shown.
    `key` is a hash of all else that decides the figures: models, protocol, extractor, versions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    key: str
    varied: dict[str, tuple[Any, ...]]
    cells: tuple[Cell, ...]

    @property
    def models(self) -> list[str]:
        """Names of the quantized models, in order."""
        reports = [cell.report for cell in self._combinations() if cell.report]
        return list(dict.fromkeys(each.name for report in reports for each in report.measurements[1:]))

    def refusals(self) -> dict[str, list[str]]:
        """Names of the combinations that were left out, by the reason."""
        names: dict[str, list[str]] = {}
        for cell in self._combinations():
            if cell.refused is not None:
                names.setdefault(cell.refused, []).append(cell.name)
        return names

    def table(self) -> Table:
        """Final errors for a terminal."""
        return plain_table(*self._lines(registered()[MAIN]), LEGEND)

    def markdown(self) -> str:
        """What robustness.md holds: a table for every figure that was measured."""
        reports = [cell.report for cell in self._combinations() if cell.report]
        samples = f"{reports[0].protocol.sampling.samples} samples. " if reports else ""
        parts = ["# Robustness", f"{samples}{LEGEND} The whole protocol is in the report of each combination."]
        for metric in (each for each in registered().values() if each.under_settings):
            header, lines = self._lines(metric)
            if any(text != "-" for line in lines for text in line[len(self.varied) :]):
                parts += [f"## {metric.under_settings}", markdown_table(header, lines, left=len(self.varied))]
        if self.models:
            parts.append("![Final error for every combination](robustness.png)")
        if refused := self.refusals():
            parts += ["## Left out", "\n".join(f"- {', '.join(names)}: {reason}" for reason, names in refused.items())]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        """Write robustness.json, robustness.md and, where anything was measured, robustness.png; each whole."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.models:
            from diffquant.analysis.drawing import draw_matrix  # matplotlib comes with an extra

            *fixed, last = self.varied
            errors = {
                model: [[getattr(cell.figure(MAIN, model), "value", None) for cell in row] for row in self._rows()]
                for model in self.models
            }
            rows = [", ".join(str(row[0].settings[name]) for name in fixed) for row in self._rows()]
            columns = [str(value) for value in self.varied[last]]
            write_image(draw_matrix(errors, (", ".join(fixed), rows), (last, columns)), folder / "robustness.png")
        write_text(folder / "robustness.md", self.markdown())
        write_text(folder / FILE, self.model_dump_json(indent=1) + "\n")

    def _combinations(self) -> list[Cell]:
        """A cell for each combination of the varied settings, empty where it is not measured yet."""
        cells = {cell.name: cell for cell in self.cells}
        return [cells.get(cell.name, cell) for cell in empty_cells(self.varied)]

    def _rows(self) -> list[list[Cell]]:
        """The cells of each combination of all settings but the last."""
        cells, width = self._combinations(), len([*self.varied.values()][-1])
        return [cells[start : start + width] for start in range(0, len(cells), width)]

    def _lines(self, metric: Metric[Any]) -> tuple[list[str], list[list[str]]]:
        """A table: a line for each row of cells and each model, a column for each value of the last setting."""

        def text(cell: Cell, model: str) -> str:
            figure = cell.figure(metric.name, model)
            if cell.report is None or figure is None:
                return "-"
            return metric.under_setting(figure, cell.report.measurements[0].figures.get(metric.name))

        *fixed, last = self.varied
        header = [*fixed, "model", *(f"{last}={value}" for value in self.varied[last])]
        lines = []
        for row in self._rows():
            settings = [str(row[0].settings[name]) for name in fixed]
            for model in self.models:
                lines.append([*settings, model, *(text(cell, model) for cell in row)])
                settings = [""] * len(fixed)
        return header, lines


def empty_cells(varied: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """A cell for each combination of the values, without a report."""
    return [Cell(settings=dict(zip(varied, values, strict=True))) for values in itertools.product(*varied.values())]


def robustness(
    quantized: Model | Mapping[str, Model],
    reference: Model,
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
    protocol: SamplingProtocol | None = None,
    features: FeatureExtractor | None = None,
    out: str | Path | None = None,
    progress: OnProgress | None = None,
) -> Robustness:
    """Evaluate under all combinations of the values in `vary`, by field of the protocol; the rest is as `protocol` says.

    Models are passed as to `evaluate`. The default of `vary` is four samplers at 10, 20 and 50 steps, and of `protocol` 64 samples.
    How errors accumulate is not measured. The result is written to `out` after every combination, and each report to a folder of
    its own. An interrupted run resumes, and other values can be added.

    Raises `EvaluationError` for fields that cannot be varied, for values that no protocol has, and if `out` holds the result of
    other models or another protocol. Combinations that the pipeline cannot be sampled with are part of the result.
    """
    require_extra()
    varied = {name: tuple(values) for name, values in (vary or DEFAULT).items()}
    _check(varied)
    base = dataclasses.replace(protocol or SamplingProtocol(samples=SAMPLES), accumulation_samples=0)
    combinations = empty_cells(varied)
    protocols = [dataclasses.replace(base, **cell.settings) for cell in combinations]
    named, full = models_by_name(quantized), opened(reference)
    models = {name: identity(opened(model)) for name, model in named.items()}
    about = [models, identity(full), dataclasses.asdict(base), features and features.sha256]
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    folder = None if out is None else Path(out)
    saved = {} if folder is None else {cell.name: cell for cell in _saved_cells(folder / FILE, key)}
    others = [cell for cell in saved.values() if cell.settings not in [each.settings for each in combinations]]
    cells: list[Cell] = []
    for empty, chosen in zip(combinations, protocols, strict=True):
        cell = saved.get(empty.name)
        if cell is None:
            place = None if folder is None else folder / empty.name
            try:
                report = evaluate(named, full, protocol=chosen, features=features, out=place, progress=progress)
                cell = empty.model_copy(update={"report": report})
            except DiffquantError as error:  # the pipeline cannot follow the protocol, or a correction was fitted for another
                cell = empty.model_copy(update={"refused": str(error)})
        cells.append(cell)
        result = Robustness(key=key, varied=varied, cells=(*cells, *others))
        if folder is not None:
            result.write(folder)
        if progress is not None:
            progress("combinations", len(cells), len(combinations))
    return result


def _check(varied: Mapping[str, Sequence[Any]]) -> None:
    for name, values in varied.items():
        if name not in VARIED:
            raise EvaluationError(f"vary.{name}: cannot be varied; allowed are {', '.join(VARIED)}")
        if not values or len(set(values)) < len(values):
            raise EvaluationError(f"vary.{name}: is {', '.join(map(str, values)) or 'empty'}; give values that differ")


def _saved_cells(path: Path, key: str) -> tuple[Cell, ...]:
    """The cells of an earlier run. Raises `EvaluationError` where the file holds something else."""
    if not path.exists():
        return ()
    try:
        saved = Robustness.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise EvaluationError(f"{path}: is damaged or of another version; choose a new folder") from error
    if saved.key != key:
        raise EvaluationError(f"{path}: is of other models or another protocol; choose a new folder")
    return saved.cells

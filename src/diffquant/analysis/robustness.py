"""`robustness`: what quantized models lose under other samplers, step counts, guidance or picture sizes.

Calibration sees one way of sampling, and users choose others. Every combination of settings is an evaluation of its own: full
precision and quantized models on the same noise with the same settings, so it says what quantization costs there, not what the
sampler does. Combinations that the pipeline cannot be sampled with are listed with the reason.
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

from diffquant.checkpoint.folder import load
from diffquant.errors import DiffquantError, EvaluationError
from diffquant.evaluation.evaluate import evaluate
from diffquant.evaluation.extra import require_extra
from diffquant.evaluation.features import FeatureExtractor
from diffquant.evaluation.metrics import Metric, registered
from diffquant.evaluation.report import Report, write_image
from diffquant.evaluation.text import markdown_table, plain_table
from diffquant.files import write_text
from diffquant.host.pipeline import Pipeline
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


class Robustness(BaseModel):
    """The cells of all combinations of `varied` settings, the last one changing fastest; an unfinished run has fewer.

    Behind them, shown nowhere, are those of earlier runs in the same folder that were asked for otherwise.
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
        return list(dict.fromkeys(row.name for cell in self._asked() if cell.report for row in cell.report.measurements[1:]))

    def refusals(self) -> dict[str, list[str]]:
        """Why combinations were left out, and which."""
        found: dict[str, list[str]] = {}
        for cell in self._asked():
            if cell.refused is not None:
                found.setdefault(cell.refused, []).append(cell.name)
        return found

    def table(self) -> Table:
        """Final errors for a terminal."""
        return plain_table(*self._lines(registered()[MAIN]), LEGEND)

    def markdown(self) -> str:
        """What robustness.md holds: a table for every figure that was measured."""
        samples = next((f"{cell.report.protocol.sampling.samples} samples. " for cell in self._asked() if cell.report), "")
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
            from diffquant.analysis.drawing import draw_matrix

            *fixed, last = self.varied
            rows = [", ".join(str(value) for value in values) for values in self._combinations(fixed)]
            columns = [str(value) for value in self.varied[last]]
            picture = draw_matrix(self._final_errors(), (", ".join(fixed), rows), (last, columns))
            write_image(picture, folder / "robustness.png")
        write_text(folder / "robustness.md", self.markdown())
        write_text(folder / FILE, self.model_dump_json(indent=1) + "\n")

    def _asked(self) -> list[Cell]:
        wanted = [dict(zip(self.varied, values, strict=True)) for values in self._combinations(tuple(self.varied))]
        return [cell for cell in self.cells if cell.settings in wanted]

    def _lines(self, metric: Metric[Any]) -> tuple[list[str], list[list[str]]]:
        """A table: a line for each combination of all settings but the last and each model, a column for each value of the last."""
        *fixed, last = self.varied
        header = [*fixed, "model", *(f"{last}={value}" for value in self.varied[last])]
        lines = []
        for values in self._combinations(fixed):
            before = [str(value) for value in values]
            for model in self.models:
                pairs = [self._figures(metric.name, model, (*values, value)) for value in self.varied[last]]
                lines.append([*before, model, *("-" if one is None else metric.under_setting(one, full) for one, full in pairs)])
                before = [""] * len(before)
        return header, lines

    def _final_errors(self) -> dict[str, list[list[float | None]]]:
        """By model and in the order of its lines and columns."""
        *fixed, last = self.varied

        def of(model: str, values: tuple[Any, ...]) -> float | None:
            error, _ = self._figures(MAIN, model, values)
            return None if error is None else float(error.value)

        return {
            model: [[of(model, (*values, value)) for value in self.varied[last]] for values in self._combinations(fixed)]
            for model in self.models
        }

    def _combinations(self, names: Sequence[str]) -> list[tuple[Any, ...]]:
        return list(itertools.product(*(self.varied[name] for name in names)))

    def _figures(self, metric: str, model: str, values: tuple[Any, ...]) -> tuple[Any, Any]:
        """A metric's figure of a model and of full precision, where the combination was measured and they have one."""
        settings = dict(zip(self.varied, values, strict=True))
        report = next((cell.report for cell in self.cells if cell.settings == settings), None)
        if report is None:
            return None, None
        figures = {measurement.name: measurement.figures for measurement in report.measurements}
        return figures[model].get(metric), report.measurements[0].figures.get(metric)


def robustness(
    quantized: Pipeline | str | Path | Mapping[str, Pipeline | str | Path],
    reference: Pipeline | str | Path,
    *,
    vary: Mapping[str, Sequence[Any]] | None = None,
    protocol: SamplingProtocol | None = None,
    features: FeatureExtractor | None = None,
    out: str | Path | None = None,
    progress: OnProgress | None = None,
) -> Robustness:
    """Evaluate under all combinations of the values in `vary`, by field of the protocol; the rest is as `protocol` says.

    Models are given as for `evaluate`. `vary` is by default four samplers at 10, 20 and 50 steps, `protocol` 64 samples; how errors
    accumulate is not measured. With `out` the result is written there after every combination, its report in a folder of its own,
    and what an earlier run has finished there is not measured again.

    Raises `EvaluationError` for fields that cannot be varied, for values that no protocol has, and where `out` holds the result of
    other models or another protocol. Combinations with which the pipeline cannot be sampled are part of the result.
    """
    require_extra()
    varied = {name: tuple(values) for name, values in (vary or DEFAULT).items()}
    base = dataclasses.replace(protocol or SamplingProtocol(samples=SAMPLES), accumulation_samples=0)
    asked = [Cell(settings=settings) for settings in _checked(varied)]
    protocols = [dataclasses.replace(base, **cell.settings) for cell in asked]
    named = dict(quantized) if isinstance(quantized, Mapping) else {"quantized": quantized}
    full = load(reference) if isinstance(reference, str | Path) else reference
    key = _key(named, full, base, features)
    folder = None if out is None else Path(out)
    done = {} if folder is None else {cell.name: cell for cell in _finished(folder / FILE, key)}
    others = [cell for cell in done.values() if cell.settings not in [one.settings for one in asked]]
    cells: list[Cell] = []
    for cell, chosen in zip(asked, protocols, strict=True):
        place = None if folder is None else folder / cell.name
        cells.append(done.get(cell.name) or _measured(cell, named, full, chosen, features, place, progress))
        found = Robustness(key=key, varied=varied, cells=(*cells, *others))
        if folder is not None:
            found.write(folder)
        if progress is not None:
            progress("combinations", len(cells), len(asked))
    return found


def _measured(
    cell: Cell,
    named: Mapping[str, Pipeline | str | Path],
    full: Pipeline,
    protocol: SamplingProtocol,
    features: FeatureExtractor | None,
    folder: Path | None,
    progress: OnProgress | None,
) -> Cell:
    try:
        report = evaluate(named, full, protocol=protocol, features=features, out=folder, progress=progress)
    except DiffquantError as error:  # a protocol that the pipeline cannot follow, or a correction that was fitted for another
        return cell.model_copy(update={"refused": str(error)})
    return cell.model_copy(update={"report": report})


def _checked(varied: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination, by field."""
    for name, values in varied.items():
        if name not in VARIED:
            raise EvaluationError(f"vary.{name}: cannot be varied; allowed are {', '.join(VARIED)}")
        if not values or len(set(values)) < len(values):
            raise EvaluationError(f"vary.{name}: is {', '.join(map(str, values)) or 'empty'}; give values that differ")
    return [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]


def _key(
    named: Mapping[str, Pipeline | str | Path],
    full: Pipeline,
    protocol: SamplingProtocol,
    features: FeatureExtractor | None,
) -> str:
    pipes = {name: identity(load(model) if isinstance(model, str | Path) else model) for name, model in named.items()}
    about = [pipes, identity(full), dataclasses.asdict(protocol), features and features.sha256]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _finished(path: Path, key: str) -> tuple[Cell, ...]:
    """The cells of an earlier run. Raises `EvaluationError` where the file holds something else."""
    if not path.exists():
        return ()
    try:
        found = Robustness.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise EvaluationError(f"{path}: is damaged or of another version; choose a new folder") from error
    if found.key != key:
        raise EvaluationError(f"{path}: is of other models or another protocol; choose a new folder")
    return found.cells

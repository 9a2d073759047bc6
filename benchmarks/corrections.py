"""Corrections while sampling, on one quantized model and, as control, on full precision: what a study with `corrections` runs.

    python benchmarks/run.py benchmarks/studies/corrections.yaml
    python benchmarks/corrections.py benchmarks/results/corrections.csv
    python benchmarks/corrections.py benchmarks/results/corrections.csv --picture docs/images/corrections.png

The second line prints tables, the third draws how far mean and deviation of the latents are from full precision's. Corrections
are fitted to one model and attached to it in turn, fitted on trajectories of the eta that is sampled with; the model is calibrated
on those without noise at any eta. On full precision, all that the run-time estimate changes is its own bias. Rows of more steps
spend a correction's further denoiser calls on steps instead; where noise is injected theirs is other noise, so the tables have no
final error for them. The `.npz` holds mean and deviation of the latents after each step, by row.
"""

import argparse
import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import measure
import rows
import study as studies
import torch
from matplotlib import pyplot
from rich.console import Console
from study import Cell, Setting, Study
from tables import over, printed
from torch import Tensor, nn

import diffquant as dq
from diffquant import zoo
from diffquant.calibration import fit
from diffquant.calibration.progress import Bars, bars
from diffquant.core.model import enable, freeze
from diffquant.engines.base import engine_of
from diffquant.evaluation.distances import fid
from diffquant.evaluation.intervals import bootstrap_mean, bootstrap_median
from diffquant.evaluation.pairs import relative_l2
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan
from diffquant.methods.base import registered
from diffquant.quantization import pass_names, restore_passes
from diffquant.sampling.sample import Sampled, StepResult, sample

FULL = "full precision"
NONE = "none"


def recording_text(recording: studies.Recording) -> str:
    """The column `recording`."""
    options = {"guidance": recording.guidance, "eta": recording.eta or None, **recording.scheduler}
    changes = {name: value for name, value in options.items() if value is not None}
    return rows.protocol_text(samples=recording.samples, steps=recording.steps, **changes)


def quantized(cell: Cell, study: Study, work: Path, progress: Any) -> tuple[Any, dq.Trajectory]:
    """A pipeline after an arm's passes, its weights still there so that full precision can run beside it."""
    pipe = studies.pipeline(study.model, study.recording.scheduler)
    model = measure.denoiser_of(pipe)
    data = studies.recording(pipe, study.model, study.recording, cell.seed, work, progress)
    recipe = studies.recipe_of(cell.arm, cell.bits)
    folder = work / study.recording.folder_name(study.model) / f"passes-{cell.seed}"
    dq.quantize(copy.deepcopy(pipe), recipe, data, seed=cell.seed, folder=folder, progress=progress)
    layers = plan(model, recipe.layers)
    prepare(model, layers, data.timesteps)
    restore_passes(model, folder, pass_names(recipe, layers, cell.seed, data))
    enable(model)
    return pipe, data


def fitted(options: dict[str, Any], model: nn.Module, data: dq.Trajectory) -> Any:
    """The correction that a pass fits to a quantized model."""
    kind, settings = options["pass"], {name: value for name, value in options.items() if name != "pass"}
    with fit.run() as run:
        registered()[kind](**settings).apply(model, data, torch.Generator().manual_seed(0), run)
    correction = model.diffquant.correction
    del model.diffquant.correction
    return correction


class Drawn(NamedTuple):
    """What a pipeline drew: its samples, mean and deviation of the latents after each step, and denoiser calls a trajectory."""

    sampled: Sampled
    moments: Tensor  # [2, steps]
    calls: float


@contextmanager
def attached(pipe: Any, correction: Any) -> Iterator[None]:
    """The pipeline with a correction while the block runs."""
    if correction is not None:
        dq.attach(pipe, correction)
    try:
        yield
    finally:
        dq.detach(pipe)


def drawn(pipe: Any, protocol: dq.SamplingProtocol, correction: Any = None) -> Drawn:
    """Sample with a correction attached."""
    sums: dict[int, list[tuple[float, float]]] = {}
    calls = []

    def see(indices: range, result: StepResult) -> None:
        after = result.sample_after
        sums.setdefault(result.step, []).append((float(after.mean()), float(after.square().mean())))

    handle = measure.denoiser_of(pipe).register_forward_hook(lambda *_: calls.append(1))
    try:
        with attached(pipe, correction):
            sampled = sample(pipe, protocol, on_step=see)
    finally:
        handle.remove()
    means, squares = torch.tensor([sums[step] for step in sorted(sums)], dtype=torch.float64).mean(dim=1).T
    moments = torch.stack((means, (squares - means.square()).sqrt()))
    return Drawn(sampled, moments, len(calls) / math.ceil(protocol.samples / protocol.batch_size))


def columns_of(result: Drawn, reference: Drawn) -> rows.Row:
    """Figures against full precision and, where the noise is the same, its samples one by one."""
    classifier, data = zoo.load("glyph-classifier"), zoo.load_statistics()
    generator = torch.Generator().manual_seed(0)
    pictures, full_pictures = result.sampled.pictures, reference.sampled.pictures
    features = classifier.features(pictures)
    errors = relative_l2(reference.sampled.last_samples, result.sampled.last_samples)
    figures: rows.Row = {}
    for column, interval in (
        ("final_error", bootstrap_mean(errors, generator)),
        ("final_error_median", bootstrap_median(errors, generator)),
        ("legibility", bootstrap_mean(classifier.confidence(pictures), generator)),
    ):
        figures |= {column: interval.value, f"{column}_low": interval.low, f"{column}_high": interval.high}
    figures |= measure.fid_columns("fid", fid(features, classifier.features(full_pictures), "paired", generator))
    figures |= measure.fid_columns("fid_to_data", fid(features, data.features, "fixed", generator))
    mean, deviation = (float(moment[-1]) for moment in result.moments)
    return figures | {"calls": result.calls, "latent_mean": mean, "latent_deviation": deviation}


class Run:
    """A study of corrections, under way: rows that its file has are not measured again."""

    def __init__(self, study: Study, file: Path, work: Path, shown: Bars) -> None:
        assert study.corrections is not None
        self.study, self.file, self.work, self.shown = study, file, work, shown
        self.corrections = study.corrections
        self.full = studies.pipeline(study.model, study.recording.scheduler)
        self.references: dict[dq.SamplingProtocol, Drawn] = {}

    def at(self, eta: float) -> None:
        """Everything at one eta."""
        protocol = self.study.protocol(Setting("pipeline", eta, self.study.evaluation.steps))
        self._measure(None, NONE, protocol, lambda: self._reference(protocol), protocol, "float32")
        if self.corrections.control:
            self._control(eta, protocol)
        cells = list(self.study.cells())
        for index, cell in enumerate(cells):
            with self.shown.part(" ".join(map(str, cell)), index / len(cells), (index + 1) / len(cells)):
                self._cell(cell, eta, protocol)

    def _control(self, eta: float, protocol: dq.SamplingProtocol) -> None:
        for name, step in self.corrections.passes.items():
            if step["pass"] == "RuntimeNoiseEstimate" and not self._finished(None, name, protocol):
                data = self._recording(eta, self.study.seeds[0])
                correction = fitted(step, measure.denoiser_of(self.full), data)
                self._measure(None, name, protocol, partial(drawn, self.full, protocol, correction), protocol, "float32")

    def _cell(self, cell: Cell, eta: float, protocol: dq.SamplingProtocol) -> None:
        seeds = self.corrections.seeds
        passes = {name: step for name, step in self.corrections.passes.items() if cell.seed in seeds.get(name, (cell.seed,))}
        asked = [name for name in (NONE, *passes) if not self._finished(cell, name, protocol)]
        if not asked and not self._longer(cell, passes, protocol):
            return
        pipe, _ = quantized(cell, self.study, self.work, self.shown)
        model = measure.denoiser_of(pipe)
        data = self._recording(eta, cell.seed)
        ready = {name: fitted(passes[name], model, data) for name in asked if name != NONE}
        freeze(model)
        dq.use_engine(pipe, self.study.evaluation.engine)
        for name in asked:
            self._measure(cell, name, protocol, partial(drawn, pipe, protocol, ready.get(name)), protocol, engine_of(model))
        for changed in self._longer(cell, passes, protocol):
            self._measure(cell, NONE, changed, partial(drawn, pipe, changed), protocol, engine_of(model))

    def _reference(self, protocol: dq.SamplingProtocol) -> Drawn:
        """Full precision, sampled when it is first needed."""
        if protocol not in self.references:
            self.references[protocol] = drawn(self.full, protocol)
        return self.references[protocol]

    def _longer(self, cell: Cell, passes: dict[str, Any], protocol: dq.SamplingProtocol) -> list[dq.SamplingProtocol]:
        """Protocols of as many steps as the corrections with further calls took calls, that are not measured yet."""
        if not self.corrections.more_steps:
            return []
        present = rows.read(self.file)
        calls = {round(row["calls"]) for name in passes if (row := rows.finished(present, self._key(cell, name, protocol)))}
        changed = [replace(protocol, steps=steps) for steps in sorted(calls - {protocol.steps})]
        return [each for each in changed if rows.finished(present, self._key(cell, NONE, each)) is None]

    def _recording(self, eta: float, seed: int) -> dq.Trajectory:
        noisy = self.study.recording.model_copy(update={"eta": eta})
        return studies.recording(self.full, self.study.model, noisy, seed, self.work, self.shown)

    def _key(self, cell: Cell | None, name: str, protocol: dq.SamplingProtocol) -> rows.Row:
        recipe, _, options = cell.arm.partition(" ") if cell else (FULL, "", "")
        return {
            "model": self.study.model,
            "recipe": recipe,
            "options": options,
            "bits": cell.bits if cell else "",
            "seed": cell.seed if cell else "",
            "correction": name,
            "protocol": measure.protocol_of(self.full, protocol),
            "recording": recording_text(self.study.recording),
            "samples": self.study.evaluation.samples,
        }

    def _finished(self, cell: Cell | None, name: str, protocol: dq.SamplingProtocol) -> bool:
        return rows.finished(rows.read(self.file), self._key(cell, name, protocol)) is not None

    def _measure(
        self,
        cell: Cell | None,
        name: str,
        protocol: dq.SamplingProtocol,
        draw: Callable[[], Drawn],
        reference: dq.SamplingProtocol,
        engine: str,
    ) -> None:
        """Write a row, unless it is there; `reference` is the protocol of full precision that it is compared with."""
        if self._finished(cell, name, protocol):
            return
        result = draw()
        figures = columns_of(result, self._reference(reference))
        row = self._key(cell, name, protocol) | figures | rows.provenance() | {"engine": engine}
        rows.append_errors(self.file, {moments_label(row): result.moments})
        rows.append(self.file, row)


def run(study: Study, file: Path, work: Path, progress: bool = True) -> None:
    """Measure what `file` does not hold yet."""
    assert study.corrections is not None
    with bars(progress) as shown:
        job = Run(study, file, work, shown)
        etas = study.corrections.eta
        for index, eta in enumerate(etas):
            with shown.part(f"eta {eta:g}", index / len(etas), (index + 1) / len(etas)):
                job.at(eta)


def moments_label(row: rows.Row) -> str:
    """The name of a row's moments in the `.npz`."""
    return f"{rows.label(row)} {row['protocol']}"


class Model(NamedTuple):
    """What rows are put together by."""

    name: str
    eta: str


Grouped = dict[Model, dict[str, dict[str, rows.Row]]]  # then by correction, then by calibration seed


def grouped(table: list[rows.Row]) -> Grouped:
    """Rows by model and eta. Raises `ResultsError` where protocols differ in more than eta and steps."""
    rows.check_same(table, ignoring=("eta", "steps"))
    models: Grouped = defaultdict(lambda: defaultdict(dict))
    first = rows.protocol_fields(table[0]["protocol"])["steps"]
    for row in table:
        fields = rows.protocol_fields(row["protocol"])
        name = row["correction"] if fields["steps"] == first else f"none, {fields['steps']} steps"
        models[Model(f"{row.get('bits', '')} {rows.arm(row)}".strip(), fields["eta"])][name][str(row.get("seed", ""))] = row
    return models


def table_of(table: list[rows.Row]) -> str:
    """A Markdown table for each eta: means over the calibration seeds, least and largest in brackets."""
    models = grouped(table)
    lines = []
    for eta in dict.fromkeys(model.eta for model in models):
        full = models[Model(FULL, eta)][NONE][""]
        moments = f"{full['latent_mean']:.3f}, {full['latent_deviation']:.3f}"
        lines.append(f"\neta {eta}; full precision: last latents {moments}, data FID {full['fid_to_data']:.1f}\n")
        header = ("model", "correction", "calls", "seeds", "final error", "to none", "FID", "mean and deviation")
        cells = []
        for model in (model for model in models if model.eta == eta):
            plain = models[model].get(NONE, {})
            for name, seeds in models[model].items():
                if (model.name, name) == (FULL, NONE):
                    continue
                errors = {seed: row["final_error"] for seed, row in seeds.items()}
                shown = model.name != FULL and name != NONE
                ratios = [error / plain[seed]["final_error"] for seed, error in errors.items() if shown and seed in plain]
                other_noise = name.startswith("none, ") and float(eta) > 0
                last = (fmean(row[column] for row in seeds.values()) for column in ("latent_mean", "latent_deviation"))
                cells.append(
                    (
                        model.name,
                        name,
                        f"{next(iter(seeds.values()))['calls']:.0f}",
                        " ".join(sorted(seeds)),
                        "" if other_noise else over(errors.values()),
                        "" if other_noise else over(ratios),
                        over(row["fid"] for row in seeds.values()),
                        ", ".join(f"{value:.3f}" for value in last),
                    )
                )
        lines.append(printed(header, cells))
    return "\n".join(lines)


def draw(file: Path, picture: Path) -> None:
    """How far the latents' mean and deviation are from full precision's over the steps, means over calibration seeds.

    A row of panels for each model and eta, a colour for each correction.
    """
    moments = rows.errors_of(file)
    models = grouped(rows.read(file))
    shown = {model: corrections for model, corrections in models.items() if model.name != FULL}
    names = dict.fromkeys(name for corrections in shown.values() for name in corrections)
    colour = {name: f"C{index}" for index, name in enumerate(names)}
    figure, panels = pyplot.subplots(len(shown), 2, figsize=(10, 2.7 * len(shown)), squeeze=False, layout="constrained")
    for (model, corrections), pair in zip(shown.items(), panels, strict=True):
        full = moments[moments_label(models[Model(FULL, model.eta)][NONE][""])]
        for panel, moment, title in zip(pair, (0, 1), ("mean", "deviation"), strict=True):
            panel.axhline(0, color="0.75", linewidth=4)
            for name, seeds in corrections.items():
                lines = [moments[moments_label(row)][moment] for row in seeds.values()]
                if lines[0].shape == full[moment].shape:
                    panel.plot(torch.stack(lines).mean(dim=0) - full[moment], color=colour[name], linewidth=1.2, label=name)
            panel.set(title=f"{model.name}, eta {model.eta}: {title} of the latents", ylabel="off by")
    panels[0, 0].legend(frameon=False, fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the results of a study with corrections")
    parser.add_argument("--picture", type=Path, help="draw to this file in place of the tables")
    arguments = parser.parse_args()
    try:
        if arguments.picture:
            draw(arguments.file, arguments.picture)
        else:
            Console(width=1000, highlight=False, markup=False).print(table_of(rows.read(arguments.file)))
    except rows.ResultsError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()

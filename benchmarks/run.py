"""Run a study: quantize its arms, measure them, and write a row for each to `results/NAME.csv`.

    python benchmarks/run.py benchmarks/studies/glyph-sd.yaml
    python benchmarks/run.py benchmarks/studies/smoke.yaml --set recording.samples=2 --results /tmp/results --work /tmp/work
    python benchmarks/run.py benchmarks/studies/accuquant.yaml --status

A killed run goes on where it stopped: arms that the CSV file has are not measured again; recordings, finished passes and
checkpoints are in --work. Studies with the same model and recording share them. study.py says what a study holds; tables.py prints
the results.
"""

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import corrections
import diffusers
import measure
import rows
import study as studies
import transformers
from rich.console import Console
from study import Cell, Setting, Study

import diffquant as dq
from diffquant.calibration.progress import Bars, bars


class Job(NamedTuple):
    """A row that is still to be measured."""

    setting: Setting
    cell: Cell
    key: rows.Row


def pipelines(study: Study) -> tuple[Any, Any]:
    """Full precision as it is recorded, and as it is sampled."""
    recorded = studies.pipeline(study.model, study.recording.scheduler)
    if study.evaluation.scheduler is None:
        return recorded, recorded
    return recorded, studies.pipeline(study.model, study.evaluation.scheduler)


def jobs(study: Study, sampled: Any) -> list[Job]:
    """Every row of a study, finished or not; models of the same setting one after the other."""
    every = []
    for setting in study.settings():
        protocol = measure.protocol_of(sampled, study.protocol(setting))
        for cell in study.cells():
            recipe, _, options = cell.arm.partition(" ")
            key = {
                "model": study.model,
                "recipe": recipe,
                "options": options,
                "bits": cell.bits,
                "seed": cell.seed,
                "protocol": protocol,
                "recording": corrections.recording_text(study.recording),
                "samples": study.evaluation.samples,
            }
            every.append(Job(setting, cell, key))
    return every


def pending(study: Study, file: Path, sampled: Any) -> list[Job]:
    """The rows that the file has not yet."""
    present = rows.read(file)
    return [job for job in jobs(study, sampled) if rows.finished(present, job.key) is None]


def run(study: Study, file: Path, work: Path = studies.WORK, progress: bool = True) -> None:
    """Measure what `file` does not hold yet."""
    if study.corrections is not None:
        corrections.run(study, file, work, progress)
        return
    recorded, sampled = pipelines(study)
    asked = pending(study, file, sampled)
    base = work / study.recording.folder_name(study.model)
    reference, setting = None, None
    with bars(progress) as shown:
        for index, job in enumerate(asked):
            with shown.part(f"{index + 1} of {len(asked)}: {rows.label(job.key)}", index / len(asked), (index + 1) / len(asked), 3):
                data = studies.recording(recorded, study.model, study.recording, job.cell.seed, work, shown)
                folder = checkpoint(job.cell, recorded, data, base, shown)
                if job.setting != setting:
                    setting = job.setting
                    reference = full_precision(study, setting, sampled, base, shown)
                if reference is None:
                    continue
                pipe = dq.load(folder, engine=study.evaluation.engine)
                if study.evaluation.scheduler is not None:
                    pipe.scheduler = sampled.scheduler
                measured = measure.compared(reference, pipe, folder, shown.show)
                steps = measure.single_steps(measure.rollout_of(recorded, data), pipe, study.evaluation.single_steps)
                row = job.key | measured.figures | steps | calibration_columns(folder) | rows.provenance()
                if study.evaluation.keep_errors:
                    rows.append_errors(file, {rows.label(row): measured.errors})
                rows.append(file, row)


def full_precision(study: Study, setting: Setting, sampled: Any, base: Path, shown: Bars) -> Any:
    """Full precision under a setting; None, with the reason on the console, for a sampler that the pipeline cannot take."""
    try:
        return measure.full_precision(sampled, study.protocol(setting), base / "full-precision", shown.show)
    except dq.DiffquantError as error:
        if setting.sampler == "pipeline":
            raise
        shown.console.print(f"{study.model}, {setting.sampler}, {setting.steps} steps: left out: {error}")
        return None


def checkpoint(cell: Cell, pipe: Any, data: dq.Trajectory, base: Path, shown: Bars) -> Path:
    """The folder of an arm's checkpoint, quantized if it is not there yet; its report, which is written last, lies in it."""
    recipe = studies.recipe_of(cell.arm, cell.bits)
    digest = hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:8]
    name = f"{cell.bits} {cell.arm} seed {cell.seed}".replace(" ", "_").replace("/", "-")
    folder = base / "checkpoints" / f"{name[:150]}-{digest}"
    if not (folder / "quantization.json").exists():
        quantized = copy.deepcopy(pipe)
        report = dq.quantize(quantized, recipe, data, seed=cell.seed, folder=base / f"passes-{cell.seed}", progress=shown)
        dq.save(quantized, folder, recipe_name=f"{cell.arm} {cell.bits}")
        report.write(folder / "quantization.json")
    return folder


def calibration_columns(folder: Path) -> rows.Row:
    """What a checkpoint's report says of its passes: seconds, and updates of the last."""
    passes = json.loads((folder / "quantization.json").read_text())["passes"]
    columns: rows.Row = {
        "seconds_calibration": float(sum(step["seconds"] for step in passes)),
        "seconds_last_pass": float(passes[-1]["seconds"]),
    }
    return columns | {"updates": passes[-1]["options"].get("iterations")}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a YAML file")
    parser.add_argument(
        "--set", nargs="+", default=[], action="extend", dest="overrides", metavar="PATH=VALUE", help="of the study"
    )
    parser.add_argument("--work", type=Path, default=studies.WORK, help="recordings, passes and checkpoints")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    parser.add_argument("--status", action="store_true", help="only say how many rows are there")
    chosen = parser.parse_args(arguments)
    console = Console(stderr=True)
    begun = time.monotonic()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        study = studies.load(chosen.study, chosen.overrides)
        file = chosen.results / f"{study.name}.csv"
        if not chosen.status:
            run(study, file, chosen.work)
            console.print(f"{file}: {len(rows.read(file))} rows, {time.monotonic() - begun:.0f} s")
        elif study.corrections is not None:
            console.print(f"{file}: {len(rows.read(file))} rows")
        else:
            sampled = pipelines(study)[1]
            console.print(f"{file}: {len(pending(study, file, sampled))} of {len(jobs(study, sampled))} rows to measure")
    except dq.DiffquantError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()

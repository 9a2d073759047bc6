"""The demonstration: the shipped model, four recipes at small budgets, one report."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from diffquant import zoo
from diffquant.calibration.observe import Calibration
from diffquant.calibration.record import record
from diffquant.evaluation.evaluate import evaluate
from diffquant.evaluation.sampling import OnProgress
from diffquant.evaluation.sampling_protocol import SamplingProtocol
from diffquant.quantization import quantize
from diffquant.recipe import load_recipe
from diffquant.runtime.checkpoint import save

CALIBRATION = Calibration(samples=64, steps=20)
_ROUNDING = ("passes.0.samples=128", "passes.1.samples=128", "passes.1.iterations=80", "passes.1.rate=0.05")
BUDGETS: dict[str, tuple[str, ...]] = {
    "minmax-w8a8": ("passes.0.samples=128",),
    "mse-w4a8": ("passes.0.samples=128",),
    "brecq-w4a8": (*_ROUNDING, "passes.2.samples=128", "passes.2.iterations=40"),
    "accuquant-w4a8": (*_ROUNDING, "passes.2.iterations=24", "passes.2.cosines=false"),
}
EVALUATION = SamplingProtocol(samples=160, steps=20, seed=1000, accumulation_samples=4)


def run_demo(out: Path, seed: int, console: Console) -> None:
    """Record, quantize, save, load and compare ``glyph-ddim``; checkpoints and the report go to `out`.

    Finished passes are kept in ``out/passes``: the last two recipes share their first two passes, and a second run only compares.
    """
    begun = time.monotonic()
    console.print("[bold]diffquant demo[/]: glyph-ddim, a diffusion model of capital letters, quantized four ways")
    console.print("budgets, smaller than the recipes' own:")
    console.print(f"  calibration on {CALIBRATION.samples} trajectories of {CALIBRATION.steps} steps", highlight=False)
    console.print(f"  comparison on {EVALUATION.samples} samples of {EVALUATION.steps} steps", highlight=False)
    for name, overrides in BUDGETS.items():
        console.print(f"  {name}: {', '.join(overrides)}", highlight=False)
    pipe = zoo.load("glyph-ddim")
    data = record(pipe, replace(CALIBRATION, seed=seed))
    checkpoints: dict[str, Path] = {}
    for name, overrides in BUDGETS.items():
        quantized = copy.deepcopy(pipe)
        report = quantize(quantized, load_recipe(name, overrides), data, seed=seed, folder=out / "passes")
        save(quantized, out / name, recipe_name=name)
        report.write(out / name / "quantization.json")
        checkpoints[name] = out / name
        console.print(f"  {name}: packed checkpoint in {out / name}, after {time.monotonic() - begun:.0f} s", highlight=False)
    with progress_bars(console) as show:
        result = evaluate(
            dict(checkpoints),
            pipe,
            protocol=EVALUATION,
            features=zoo.load("glyph-classifier"),
            data=zoo.load_statistics(),
            out=out,
            progress=show,
        )
    console.print(result.table())
    console.print(f"pictures: {out / 'pairs.png'}, drift: {out / 'drift.png'}, report: {out / 'report.md'}")
    console.print(f"{time.monotonic() - begun:.0f} s in all")


@contextmanager
def progress_bars(console: Console) -> Iterator[OnProgress]:
    """A bar for everything that is sampled, as the evaluation reports it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield show

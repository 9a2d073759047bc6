"""The demonstration: the shipped model, three recipes at small budgets, one report."""

from __future__ import annotations

import copy
import itertools
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from diffquant import zoo
from diffquant.calibration.progress import bars
from diffquant.calibration.record import record
from diffquant.checkpoint.folder import save
from diffquant.evaluation.evaluate import evaluate, require_extra
from diffquant.evaluation.grids import draw_pairs
from diffquant.host.conditions import Calibration
from diffquant.quantization import quantize
from diffquant.recipe import load_recipe
from diffquant.sampling.protocol import SamplingProtocol
from diffquant.sampling.sample import sample

CALIBRATION = Calibration(samples=64, steps=20)
BUDGETS: dict[str, tuple[str, ...]] = {
    "minmax-w8a8": ("passes.0.samples=128",),
    "mse-w4a8": ("passes.0.samples=128",),
    "accuquant-w4a8": (
        "passes.0.samples=128",
        "passes.1.samples=128",
        "passes.1.iterations=80",
        "passes.1.rate=0.05",
        "passes.2.iterations=24",
        "passes.2.cosines=false",
    ),
}
EVALUATION = SamplingProtocol(samples=160, steps=20, seed=1000, accumulation_samples=4)
FIRST = 8  # samples of the first picture
SHARES = {"recording": 0.03, "minmax-w8a8": 0.02, "mse-w4a8": 0.02, "accuquant-w4a8": 0.53, "comparing": 0.4}  # of the time
SAMPLINGS = 2 + 2 * len(BUDGETS)  # full precision on two noises; each model, and step by step


def run_demo(out: Path, seed: int, console: Console) -> None:
    """Record, quantize, save, load and compare ``glyph-ddim``; checkpoints and the report go to `out`.

    ``out/passes`` caches finished passes: a second run only compares.
    """
    require_extra()
    begun = time.monotonic()
    console.print("[bold]diffquant demo[/]: glyph-ddim, a diffusion model of capital letters, quantized three ways")
    console.print("budgets, smaller than the recipes' own:")
    console.print(f"  calibration on {CALIBRATION.samples} trajectories of {CALIBRATION.steps} steps", highlight=False)
    console.print(f"  comparison on {EVALUATION.samples} samples of {EVALUATION.steps} steps", highlight=False)
    for name, overrides in BUDGETS.items():
        console.print(f"  {name}: {', '.join(overrides)}", highlight=False)
    ends = dict(zip(SHARES, itertools.accumulate(SHARES.values()), strict=True))
    pipe = zoo.load("glyph-ddim")
    with bars(True) as bar:
        with bar.part("", 0.0, ends["recording"]):
            data = record(pipe, replace(CALIBRATION, seed=seed), progress=bar)
        checkpoints: dict[str, Path] = {}
        for name, overrides in BUDGETS.items():
            quantized = copy.deepcopy(pipe)
            with bar.part("", ends[name] - SHARES[name], ends[name]):
                report = quantize(quantized, load_recipe(name, overrides), data, seed=seed, folder=out / "passes", progress=bar)
            save(quantized, out / name, recipe_name=name)
            report.write(out / name / "quantization.json")
            checkpoints[name] = out / name
            bar.console.print(f"  {name}: packed checkpoint in {out / name}, after {time.monotonic() - begun:.0f} s")
            if len(checkpoints) == 1:
                _first_picture({"full precision": pipe, name: quantized}, out / "first.png")
                bar.console.print(f"  first picture: {out / 'first.png'}, after {time.monotonic() - begun:.0f} s")
        with bar.part("comparing", ends["comparing"] - SHARES["comparing"], 1.0, SAMPLINGS):
            result = evaluate(
                checkpoints,
                pipe,
                protocol=EVALUATION,
                features=zoo.load("glyph-classifier"),
                data=zoo.load_statistics(),
                out=out,
                progress=bar.show,
            )
    console.print(result.table())
    console.print(f"pictures: {out / 'pairs.png'}, drift: {out / 'drift.png'}, report: {out / 'report.md'}")
    console.print(f"{time.monotonic() - begun:.0f} s in all")
    console.print("next, your own model (a directory or a hub id): diffquant quantize MODEL --out out/", soft_wrap=True)


def _first_picture(pipes: dict[str, object], path: Path) -> None:
    """The same noise through each, as a grid."""
    protocol = replace(EVALUATION, samples=FIRST)
    draw_pairs({name: sample(pipe, protocol).pictures.numpy() for name, pipe in pipes.items()}, {}).save(path)

"""Recipes and variants of them on a reference model, on the same noise, over bits and calibration seeds.

    python benchmarks/compare.py --bits w4a6 --seeds 0 1 2 --arms brecq dmq "dmq LearnEquivalentScaling.shrink=true"
    python benchmarks/compare.py --bits w4a6 --arms "dmq drop=PowerOfTwoScaling" "brecq layers.0.sets=1000"
    python benchmarks/compare.py --bits w4a6 --arms "dmq insert=PowerOfTwoScaling:LearnScales,iterations=250,samples=512"
    python benchmarks/compare.py --model glyph-sd --guidance 3 --bits w4a8 w4a6 --seeds 0 1 2 --arms brecq accuquant
    python benchmarks/compare.py --scheduler clip_sample=false --bits w4a8 --arms brecq accuquant

An arm is a recipe and what is changed in it: an option of a pass (PASS.option=value), a path as of --set, drop=PASS, or
insert=BEFORE:PASS,option=value. The first arm is the baseline of the ratios. Recordings, finished passes and checkpoints stay in
--work, so a killed run goes on where it stopped, and arms whose first passes are the same share them. Arms that differ in
activations only share learned rounding, unless a pass before it looked at activations.

Beside the last samples, every arm without a correction while sampling has a `single_step` error: squared, from full-precision
latents, on some of the trajectories that it was calibrated on, with the share of the mean (see coherence.py).
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import track
from torch import nn

import diffquant as dq
from diffquant import zoo
from diffquant.calibration.progress import bars
from diffquant.calibration.rollout import Rollout
from diffquant.checkpoint.folder import file_size, float32_size
from diffquant.evaluation.compare import compare_to, final_error_ratio, measure_reference
from diffquant.evaluation.reference import run_reference
from diffquant.evaluation.report import make_report
from diffquant.host.pipeline import Host
from diffquant.methods.noise_correction import by_channel
from diffquant.sampling.correction import attachment_of

STEPS = 50
TRAJECTORIES = 96
ALONG = 32  # of them, for errors of single steps
CONSOLE = Console(stderr=True)


def recording(
    pipe: Any, work: Path, seed: int, guidance: float | None = None, steps: int = STEPS, eta: float = 0.0
) -> dq.Trajectory:
    calibration = dq.Calibration(samples=TRAJECTORIES, steps=steps, seed=seed, guidance_scale=guidance, eta=eta or None)
    return dq.record(pipe, calibration, folder=work / (f"recording-{seed}-eta-{eta:g}" if eta else f"recording-{seed}"))


def with_scheduler(pipe: Any, overrides: list[str]) -> Any:
    """The pipeline with changed options of its scheduler."""
    changes = {key: yaml.safe_load(value) for key, _, value in (override.partition("=") for override in overrides)}
    if unknown := sorted(changes.keys() - pipe.scheduler.config.keys()):
        raise SystemExit(f"--scheduler: {type(pipe.scheduler).__name__} has no {', '.join(unknown)}")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    return pipe


def recipe_of(arm: str, bits: str, arguments: argparse.Namespace) -> dq.Recipe:
    """The recipe that an arm describes."""
    name, *changes = arm.split()
    recipe = dq.load_recipe(f"{name}-{bits}")
    places = {options["pass"]: index for index, options in enumerate(recipe.passes)}
    dropped, inserted, given = set(), [], list(arguments.overrides)
    for change in changes:
        path, _, value = change.partition("=")
        first, _, rest = path.partition(".")
        named, _, described = value.partition(":")
        if path in ("drop", "insert") and named not in places:
            raise SystemExit(f"arm {arm!r}: {name} has no pass {named}; it has {', '.join(places)}")
        if path == "drop":
            dropped.add(named)
        elif path == "insert":
            inserted.append((named, described.split(",")))
        else:
            given.append(f"passes.{places[first]}.{rest}={value}" if first in places else change)
    recipe = dq.load_recipe(f"{name}-{bits}", given)
    passes = [options for options in recipe.passes if options["pass"] not in dropped]
    for before, (kind, *options) in inserted:
        index = next(i for i, found in enumerate(passes) if found["pass"] == before)
        passes.insert(index, {"pass": kind} | {key: yaml.safe_load(value) for key, _, value in (o.partition("=") for o in options)})
    return recipe.model_copy(update={"passes": tuple(passes)})


def squared_error(rollout: Rollout, model: nn.Module, steps: int, trajectories: int) -> tuple[float, float]:
    """Summed over segments of `steps` steps, started in full precision: the mean squared distance at their ends, and the mean's."""
    along, total, shifted = rollout.through(model), 0.0, 0.0
    with torch.no_grad():
        for segment in track(rollout.segments(steps), f"M = {steps}", transient=True, console=Console(stderr=True)):
            chain = along.chain(torch.arange(trajectories), segment)
            latents, _ = chain.run()
            distance = by_channel(latents[-1] - chain.recorded(len(segment)))
            total += float(distance.square().mean())
            shifted += float(distance.mean(dim=1).square().mean())
    return total, shifted


def compare(arguments: argparse.Namespace, recipe_of: Callable[[str, str, argparse.Namespace], dq.Recipe]) -> None:
    """Every arm at every bits and seed, on the same noise; the JSON file and the report grow with every arm."""
    pipe = with_scheduler(zoo.load(arguments.model), arguments.scheduler)
    protocol = dq.SamplingProtocol(
        samples=arguments.samples,
        steps=arguments.steps,
        seed=1000,
        guidance_scale=arguments.guidance,
        accumulation_samples=arguments.accumulation,
    )
    reference = None
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"arms": {}}
    comparisons = {}
    for bits in arguments.bits:
        for seed in arguments.seeds:
            data = recording(pipe, arguments.work, seed, arguments.guidance, arguments.steps)
            rollout = Rollout(Host(pipe).denoiser, data)
            for arm in arguments.arms:
                label = f"{bits} {arm} seed {seed}"
                folder = arguments.work / "checkpoints" / label.replace(" ", "_")
                if not (folder / "model_index.json").exists():
                    quantized = copy.deepcopy(pipe)
                    begun = time.monotonic()
                    report = dq.quantize(
                        quantized, recipe_of(arm, bits, arguments), data, seed=seed, folder=arguments.work / f"passes-{seed}"
                    )
                    dq.save(quantized, folder, recipe_name=f"{arm} {bits}")
                    report.write(folder / "quantization.json")
                    print(f"{label}: quantized in {time.monotonic() - begun:.0f} s", flush=True)
                if reference is None:
                    classifier, statistics = zoo.load("glyph-classifier"), zoo.load_statistics()
                    draws = arguments.work / "full-precision"
                    reference = run_reference(pipe, protocol, features=classifier, data=statistics, folder=draws)
                loaded = dq.load(folder)
                with bars(True) as shown:
                    comparisons[label] = compare_to(reference, loaded, name=label, progress=shown.show)
                single_step = {}
                if attachment_of(loaded) is None:
                    error, shifted = squared_error(rollout, Host(loaded).denoiser, 1, ALONG)
                    single_step = {"single_step": {"error": error, "mean": shifted}}
                passes = json.loads((folder / "quantization.json").read_text())["passes"]
                result = comparisons[label]
                figures = result.figures
                final_error, to_reference, to_data = (figures[key] for key in ("final_error", "fid_to_reference", "fid_to_data"))
                found["arms"][label] = {
                    "final_error": asdict(final_error),
                    "median": asdict(figures["final_error_median"]),
                    "fid": asdict(to_reference.distance),
                    "floor": to_reference.floor.value,
                    "to_data": asdict(to_data.distance),
                    **({} if to_data.change is None else {"to_data_change": asdict(to_data.change)}),
                    "legibility": asdict(figures["legibility"].mean),
                    "legibility_change": asdict(figures["legibility"].change),
                    **({"accuracy": asdict(figures["accuracy"])} if "accuracy" in figures else {}),
                    **single_step,
                    "drift": figures["drift"].values[:: max(1, arguments.steps // 10)],
                    "bytes": file_size(folder),
                    "seconds": {row["pass"]: row["seconds"] for row in passes},
                    "options": {row["pass"]: row["options"] for row in passes},
                    "errors": [round(float(error), 5) for error in result.final_errors],
                }
                print(
                    f"{label}: final error {final_error.value:.4f} [{final_error.low:.4f}, "
                    f"{final_error.high:.4f}], median {figures['final_error_median'].value:.4f}, FID to full precision "
                    f"{to_reference.distance.value:.3f} (floor {to_reference.floor.value:.2f}), "
                    f"last pass {passes[-1]['seconds']:.0f} s",
                    flush=True,
                )
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(found, indent=1))
            base = comparisons[f"{bits} {arguments.arms[0]} seed {seed}"]
            for arm in arguments.arms[1:]:
                ratio = final_error_ratio(comparisons[f"{bits} {arm} seed {seed}"], base)
                print(
                    f"{bits} seed {seed}: {arm} / {arguments.arms[0]} = {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
                    flush=True,
                )
    if reference is not None:
        sizes = {reference.name: float32_size(Host(pipe).denoiser)}
        every = [measure_reference(reference), *comparisons.values()]
        make_report(reference.protocol, every, sizes).write(arguments.out.with_suffix(""))


def add_arguments(parser: argparse.ArgumentParser, work: Path, arms: list[str]) -> None:
    """The options of a comparison."""
    parser.add_argument("--out", type=Path, help="a JSON file that grows with every arm; the report lies beside it")
    parser.add_argument("--work", type=Path, default=work, help="of one model")
    parser.add_argument("--model", choices=zoo.models.PIPELINES, default="glyph-ddim")
    parser.add_argument("--guidance", type=float, help="guidance scale of recordings and samples; default: the pipeline's")
    parser.add_argument("--bits", nargs="+", default=["w4a6"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", default=arms, help="the first is the baseline")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, default=STEPS, help="of recordings and samples; with a --work of their own")
    parser.add_argument("--accumulation", type=int, default=0)
    parser.add_argument(
        "--scheduler", nargs="*", default=[], metavar="OPTION=VALUE", help="of recordings and samples; with a --work of their own"
    )
    parser.add_argument("--set", nargs="*", default=[], dest="overrides")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, Path("benchmarks/work/compare"), ["brecq", "dmq"])
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path("benchmarks/results/compare.json")
    compare(arguments, recipe_of)


if __name__ == "__main__":
    main()

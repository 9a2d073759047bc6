"""Commands that measure and show: sample, evaluate, robustness, inspect, info and zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import diffquant as dq
from diffquant import zoo
from diffquant.analysis.robustness import SAMPLES, VARIED
from diffquant.analysis.sensitivity import TRAJECTORIES
from diffquant.calibration.progress import bars
from diffquant.cli.shared import (
    RECIPE_HELP,
    Guidance,
    Inception,
    Load,
    Model,
    Prompts,
    Protocol,
    Seed,
    Set,
    console,
    load_model,
    say,
)
from diffquant.errors import DiffquantError
from diffquant.evaluation.evaluate import require_extra
from diffquant.evaluation.features import FeatureExtractor, statistics_of
from diffquant.evaluation.grids import draw_grid
from diffquant.evaluation.inception import InceptionFeatures
from diffquant.files import shipped
from diffquant.quantization import DEFAULT_RECIPE
from diffquant.sampling.pictures import check_place, write_pictures
from diffquant.sampling.protocol_files import load_protocol, varied_fields
from diffquant.zoo import models

VARY_HELP = (
    f"A field of the protocol and its values, such as steps=10,20,50, of {', '.join(VARIED)}; repeat for all combinations "
    "(default: four samplers at 10, 20 and 50 steps)."
)


def sample(
    model: Model,
    out: Annotated[Path, typer.Option(help="PNG file for a grid of pictures; .npz, or a folder of PNG files, for each of them.")],
    count: Annotated[int, typer.Option(help="Pictures to draw.")] = 16,
    steps: Annotated[int | None, typer.Option(help="Sampling steps (default: the protocol's, or 50).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise (default: the protocol's, or 0).")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddim, ddpm, pndm, dpm-solver++, euler, unipc, or pipeline (its own, the default).")
    ] = None,
    prompts: Prompts = None,
    guidance: Guidance = None,
    protocol: Protocol = None,
    load: Load = None,
) -> None:
    """Draw pictures with a pipeline, quantized or not."""
    check_place(out)
    conditions = load_protocol(
        protocol or (),
        prompts=prompts,
        guidance_scale=guidance,
        samples=count,
        batch_size=min(count, 16),
        steps=steps,
        seed=seed,
        sampler=sampler,
    )
    pipe = load_model(model, load)
    with bars(True) as progress:
        drawn = dq.sample(pipe, conditions.sampling, progress=progress.show)
    pictures = drawn.pictures
    if out.suffix in ("", ".npz"):
        write_pictures(pictures, out)
    else:
        draw_grid(pictures.numpy()).save(out)
    say(f"{count} pictures in {out}, {drawn.seconds / count:.2f} s each")


def evaluate(
    reference: Annotated[str, typer.Option(help="The full-precision model.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    model: Annotated[
        list[str] | None, typer.Argument(help="Quantized checkpoints to compare; none: full precision's own figures.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Samples to draw from each model (default: the protocol's, or 1000).")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps (default: the protocol's, or 50).")] = None,
    prompts: Prompts = None,
    inception: Inception = None,
    clip: Annotated[Path | None, typer.Option(help="Directory of a CLIP model for the CLIP score of text pipelines.")] = None,
    protocol: Protocol = None,
    load: Load = None,
) -> None:
    """Send the same noise and prompts through full precision and quantized models; write what was lost."""
    conditions = load_protocol(protocol or (), samples=samples, steps=steps, prompts=prompts)
    scorer = None
    if clip is not None:
        from diffquant.evaluation.clip import ClipScore  # imports transformers' CLIP, which nothing else needs

        scorer = ClipScore.from_directory(clip)
    features = _features(reference, inception)
    data = zoo.load_statistics() if reference in models.PIPELINES and inception is None else None
    if conditions.data is not None:
        if features is None:
            raise DiffquantError("protocol.data: FID to pictures needs an extractor; give --inception FILE (docs/evaluation.md)")
        data = statistics_of(conditions.data, features)
    with bars(True) as progress:
        report = dq.evaluate(
            _named(model or []),
            load_model(reference, load),
            protocol=conditions.sampling,
            features=features,
            data=data,
            clip=scorer,
            out=out,
            progress=progress.show,
        )
    console.print(report.table())
    say(f"report.md, report.json and pictures in {out}")


def robustness(
    model: Annotated[list[str], typer.Argument(help="Quantized checkpoints to compare.")],
    reference: Annotated[str, typer.Option(help="The full-precision model.")],
    out: Annotated[Path, typer.Option(help="Folder of the result; a killed run goes on, and other values can be added.")],
    vary: Annotated[list[str] | None, typer.Option(help=VARY_HELP)] = None,
    samples: Annotated[int, typer.Option(help="Samples of each model for every combination.")] = SAMPLES,
    prompts: Prompts = None,
    inception: Inception = None,
    protocol: Protocol = None,
    load: Load = None,
) -> None:
    """Evaluate under other samplers, step counts, guidance or picture sizes than the model was calibrated with."""
    conditions = load_protocol(protocol or (), samples=samples, prompts=prompts)
    with bars(True) as progress:
        result = dq.robustness(
            _named(model),
            load_model(reference, load),
            vary=varied_fields(vary) if vary else None,
            protocol=conditions.sampling,
            features=_features(reference, inception),
            out=out,
            progress=progress.show,
        )
    if result.models:
        console.print(result.table())
    for reason, names in result.refusals().items():
        say(f"left out: {', '.join(names)}: {reason}")
    say(f"robustness.md, robustness.json, robustness.png and a report of each combination in {out}")


def inspect(
    model: Model,
    recipe: Annotated[str, typer.Option(help=RECIPE_HELP)] = DEFAULT_RECIPE,
    sensitivity: Annotated[
        Path | None, typer.Option(help="New folder: also measure what each layer adds to the last sample's error, and draw a map.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Recording to measure on (default: --work's, or a new one of 20 steps).")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of finished passes, as of quantize: measure what these leave.")] = None,
    trajectories: Annotated[int, typer.Option(min=1, help="Recorded trajectories to measure on.")] = TRAJECTORIES,
    seed: Seed = 0,
    set_: Set = None,
    load: Load = None,
) -> None:
    """Show what a recipe will do to every layer, and the file, memory and time it will take."""
    rules = dq.load_recipe(recipe, set_ or ())
    if sensitivity is not None:
        require_extra()
    pipe = load_model(model, load)
    inspection = dq.inspect(pipe, rules)
    measured = None
    if sensitivity is not None:
        from diffquant.analysis.drawing import draw_sensitivity

        if place := data or (work and work / "recording"):
            recording = dq.Trajectory.open(place)
        else:
            calibration = dq.Calibration(samples=trajectories, seed=seed)
            recording = dq.record(pipe, calibration, folder=sensitivity / "recording")
        measured = dq.sensitivity(pipe, rules, recording, trajectories=trajectories, seed=seed, folder=work or sensitivity)
        measured.write(sensitivity / "sensitivity.json")
        draw_sensitivity(measured).save(sensitivity / "sensitivity.png")
    console.print(inspection.table(measured))
    if measured is not None:
        learned = ", ".join(measured.passes) or "ranges alone, weights rounded to nearest"
        console.print(
            f"errors after {learned}: parts of the last sample's squared error, each quantizer alone; {measured.trajectories} "
            f"trajectories leave {measured.uncertainty:.0%} of a share open",
            soft_wrap=True,
        )
        say(f"by sampling step: sensitivity.json and sensitivity.png in {sensitivity}")
    size = inspection.file_bytes
    console.print(f"file {size / 1e6:.2f} MB, {size / inspection.float32_bytes:.3f} of float32")
    memory, minutes = inspection.memory_bytes / 1e9, inspection.seconds / 60
    console.print(f"peak memory about {memory:.2f} GB, calibration about {minutes:.1f} minutes here")


def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show this machine: what its kernels multiply exactly, the engines that run, and the default."""
    machine = dq.info()
    if as_json:
        console.print_json(machine.model_dump_json())
    else:
        console.print(machine.table())


def zoo_list() -> None:
    """Name the reference models, and the recipes and protocols that come with the package."""
    console.print(f"models: {', '.join(models.NAMES)}")
    console.print(f"recipes: {', '.join(shipped('recipes'))} (with bits, as in brecq-w4a8)")
    console.print(f"protocols: {', '.join(shipped('protocols'))}")


def _features(reference: str, inception: Path | None) -> FeatureExtractor | None:
    """The extractor of a file, or that of the reference models."""
    if inception is not None:
        return InceptionFeatures.from_file(inception)
    return zoo.load("glyph-classifier") if reference in models.PIPELINES else None


def _named(folders: list[str]) -> dict[str, str]:
    """Folders by their last name, or by the whole path where two share it."""
    short = [Path(folder).name for folder in folders]
    return dict(zip(short if len(set(short)) == len(short) else folders, folders, strict=True))

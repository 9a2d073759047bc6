"""Commands that make quantized models: record, quantize, export, reproduce and demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import diffquant as dq
from diffquant.analysis.estimate import check_space
from diffquant.checkpoint.folder import check_replaceable, file_size, float32_size
from diffquant.checkpoint.targets.base import target_names
from diffquant.cli.shared import (
    MINUTES_HELP,
    RECIPE_HELP,
    Guidance,
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
from diffquant.demo import run_demo
from diffquant.errors import DiffquantError
from diffquant.host.pipeline import Host
from diffquant.quantization import DEFAULT_RECIPE
from diffquant.reproduce import RELEASED, SAMPLES
from diffquant.reproduce import reproduce as reproduce_released
from diffquant.sampling.protocol_files import load_protocol, recording_scheduler

FORM_HELP = (
    "exact: right on every processor, also on those that add products of 8-bit operands in 16 bits. single: one product for each "
    "8-bit weight, as TensorRT reads it; wrong on such processors, and refused where this one is one of them."
)
LOSSY_HELP = "Drop what the target cannot hold, list it, and state the error; without it such a model is refused."


def record(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the recording; a killed recording goes on where it stopped.")],
    samples: Annotated[int | None, typer.Option(help="Trajectories to record (default: the protocol's, or 64).")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps of a trajectory (default: the protocol's, or 20).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything drawn at random (default: the protocol's, or 0).")] = None,
    prompts: Prompts = None,
    guidance: Guidance = None,
    budget: Annotated[
        float | None, typer.Option(help="GiB that the recording may take on disk (default: the protocol's, or 4).")
    ] = None,
    protocol: Protocol = None,
    load: Load = None,
) -> None:
    """Run a pipeline in full precision and record what its denoiser sees: the calibration data."""
    conditions = load_protocol(
        protocol or (),
        prompts=prompts,
        guidance_scale=guidance,
        calibration__samples=samples,
        calibration__steps=steps,
        calibration__seed=seed,
        calibration__budget_gib=budget,
    )
    pipe = load_model(model, load)
    with recording_scheduler(pipe, conditions):
        data = dq.record(pipe, conditions.calibration, folder=out)
    say(f"{len(data)} denoiser calls at {len(data.timesteps)} timesteps in {out}")


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory of the packed checkpoint.")],
    recipe: Annotated[str | None, typer.Option(help=f"{RECIPE_HELP} Default: {DEFAULT_RECIPE}.")] = None,
    minutes: Annotated[float | None, typer.Option(help=MINUTES_HELP)] = None,
    data: Annotated[Path | None, typer.Option(help="Recording to calibrate on; without it 64 trajectories are recorded.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder that keeps finished passes: a killed run goes on, other recipes share them.")
    ] = None,
    memory: Annotated[float, typer.Option(help="GiB for a block's recorded inputs; more of them go to files.")] = 2.0,
    seed: Seed = 0,
    set_: Set = None,
    protocol: Protocol = None,
    load: Load = None,
) -> None:
    """Quantize a pipeline and write a packed checkpoint that diffusers loads."""
    rules = dq.load_recipe(recipe or DEFAULT_RECIPE, set_ or ())
    recorded = load_protocol(protocol or (), **({} if protocol else {"calibration__seed": seed}))
    check_replaceable(out)  # before hours of calibration, not after them
    pipe = load_model(model, load)
    check_space(pipe, rules, out)
    with recording_scheduler(pipe, recorded):
        calibration = dq.Trajectory.open(data) if data else recorded.calibration
        fixed = rules if recipe or set_ else None  # a default recipe may give way to ranges alone
        result = dq.quantize(pipe, fixed, calibration, seed=seed, folder=work, memory_gib=memory, minutes=minutes)
    dq.save(pipe, out)
    result.write(out / "quantization.json")
    written, full = file_size(out), float32_size(Host(pipe).denoiser)
    say(f"{out}: {written / 1e6:.2f} MB, {written / full:.3f} of float32 ({full / 1e6:.2f} MB)")


def export(
    model: Annotated[str, typer.Argument(help="Directory of a quantized checkpoint.")],
    out: Annotated[Path, typer.Option(help="New folder for the files and for export.json.")],
    to: Annotated[str, typer.Option(help=f"What to write for: {', '.join(target_names())}.")] = "openvino",
    form: Annotated[str, typer.Option(help=FORM_HELP)] = "exact",
    lossy: Annotated[bool, typer.Option("--lossy", help=LOSSY_HELP)] = False,
) -> None:
    """Write a quantized pipeline or its denoiser for another program, and check the files by running them."""
    report = dq.export(model, out, to, form, lossy)
    first, *others = report.lines()
    say(f"{out / report.file}: {first}")
    for line in others:
        say(line)


def reproduce(
    name: Annotated[str, typer.Argument(help=f"Released checkpoint: {', '.join(RELEASED)}.")],
    out: Annotated[Path, typer.Option(help="Folder of the recording, the checkpoint and the report; a killed run goes on.")],
    model: Annotated[str | None, typer.Option(help="Directory or hub id to take in its place.")] = None,
    recipe: Annotated[str, typer.Option(help=RECIPE_HELP)] = DEFAULT_RECIPE,
    samples: Annotated[int, typer.Option(help="Samples of the comparison.")] = SAMPLES,
    minutes: Annotated[float | None, typer.Option(help=MINUTES_HELP)] = None,
    set_: Set = None,
    protocol: Protocol = None,
    load: Load = None,
) -> None:
    """Quantize a released checkpoint by its protocol and compare: record, quantize, save and evaluate in one command."""
    if name not in RELEASED:
        raise DiffquantError(f"reproduce {name!r}: unknown; allowed are {', '.join(RELEASED)}")
    released = RELEASED[name]
    report = reproduce_released(
        lambda: load_model(model or released.model, load),
        dq.load_recipe(recipe, set_ or ()),
        out,
        protocol=[released.protocol, *(protocol or [])],
        samples=samples,
        minutes=minutes,
    )
    console.print(report.table())
    say(f"checkpoint: {out / 'checkpoint'}, report: {out / 'report' / 'report.md'}")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the report.")] = Path("demo-output"),
    seed: Seed = 0,
) -> None:
    """Quantize the shipped model three ways in a few minutes, and show what was lost."""
    run_demo(out, seed, console)

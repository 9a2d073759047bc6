"""The command line: the public verbs with arguments, and no logic of its own.

A model is a directory, a hub id, or the name of a reference model (``glyph-ddim``, ``glyph-sd``, ``glyph-dit``).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from safetensors import SafetensorError

import diffquant as dq
from diffquant import zoo
from diffquant.analysis.estimate import check_space
from diffquant.analysis.plan import plan_table
from diffquant.analysis.robustness import SAMPLES, VARIED
from diffquant.analysis.sensitivity import TRAJECTORIES
from diffquant.calibration.progress import bars
from diffquant.checkpoint.folder import check_replaceable, file_size, float32_size
from diffquant.checkpoint.targets.base import target_names
from diffquant.demo import run_demo
from diffquant.engines import engine_names
from diffquant.errors import DiffquantError
from diffquant.evaluation.data import statistics_of
from diffquant.evaluation.extra import require_extra
from diffquant.evaluation.features import FeatureExtractor
from diffquant.evaluation.grids import draw_grid
from diffquant.evaluation.inception import InceptionFeatures
from diffquant.files import shipped
from diffquant.host.pipeline import Host, quiet_diffusers
from diffquant.quantization import DEFAULT_RECIPE
from diffquant.reproduce import RELEASED, reproduce
from diffquant.reproduce import SAMPLES as COMPARED
from diffquant.sampling.pictures import check_place, write_pictures
from diffquant.sampling.protocol_files import load_protocol, recording_scheduler, varied_fields
from diffquant.sampling.sample import sample
from diffquant.zoo import models
from diffquant.zoo.named import load_named

HELP = (
    "Post-training quantization for diffusion models: calibrate on a pipeline's own sampling, pack, sample, compare. "
    "A model is a directory, a hub id, or a reference model (glyph-ddim, glyph-sd, glyph-dit). "
    f"What quantized models compute with is chosen by asking the machine (info), or by the variable DIFFQUANT_ENGINE: "
    f"{', '.join(engine_names())}."
)
WIDE = 200  # columns where nothing says how many: in a pipe or a file
app = typer.Typer(help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
zoo_app = typer.Typer(help="Reference models that come with the package.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)
errors = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Pipeline directory, hub id, or reference model (glyph-ddim, glyph-sd, glyph-dit).")]
Seed = Annotated[int, typer.Option(help="Seed of everything drawn at random.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override in the recipe by path, e.g. AccuQuant.iterations=100, passes.1.samples=64."),
]
PROTOCOL_HELP = (
    "How to sample: a shipped protocol (stable-diffusion-coco), a .yaml file, or an assignment such as sampler=ddim, eta=1, "
    "seed=3, guidance_scale=3; repeat to change more (docs/reproduce.md)."
)
Protocol = Annotated[list[str] | None, typer.Option(help=PROTOCOL_HELP)]
Prompts = Annotated[Path | None, typer.Option(help="Text file, a prompt a line (default: the protocol's, or a built-in list).")]
Inception = Annotated[Path | None, typer.Option(help="Inception weights for FID and KID, see docs/evaluation.md.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale (default: the protocol's, or the pipeline's).")]
VARY_HELP = (
    f"A field of the protocol and its values, such as steps=10,20,50, of {', '.join(VARIED)}; repeat for all combinations "
    "(default: four samplers at 10, 20 and 50 steps)."
)
FORM_HELP = (
    "exact: right on every processor, also on those that add products of 8-bit operands in 16 bits. single: one product for each "
    "8-bit weight, as TensorRT reads it; wrong on such processors, and refused where this one is one of them."
)
Load = Annotated[
    list[str] | None,
    typer.Option(
        "--load",
        help="Argument of from_pretrained, such as dtype=float16 or variant=fp16; repeat for more (default: float32 on a CPU).",
    ),
]
MINUTES_HELP = "Take at most about so many minutes, recording included: fewer iterations and samples, as far as needed."
RECIPE_HELP = "Recipe with bits, e.g. brecq-w4a8 (weights 4, activations 8; a32 is weight-only), or a .yaml file."


@app.callback()
def main_options(debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False) -> None:
    """Post-training quantization for diffusion models."""
    quiet_diffusers()


@app.command()
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
    chosen = load_protocol(
        protocol or (),
        prompts=prompts,
        guidance_scale=guidance,
        calibration__samples=samples,
        calibration__steps=steps,
        calibration__seed=seed,
        calibration__budget_gib=budget,
    )
    pipe = _load(model, load)
    with recording_scheduler(pipe, chosen):
        data = dq.record(pipe, chosen.calibration, folder=out)
    say(f"{len(data)} denoiser calls at {len(data.timesteps)} timesteps in {out}")


@app.command()
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
    given = dq.load_recipe(recipe or DEFAULT_RECIPE, set_ or ())
    chosen = given if recipe or set_ else None
    recorded = load_protocol(protocol or (), **({} if protocol else {"calibration__seed": seed}))
    check_replaceable(out)  # before hours of calibration, not after them
    pipe = _load(model, load)
    check_space(pipe, given, out)
    with recording_scheduler(pipe, recorded):
        calibration = dq.Trajectory.open(data) if data else recorded.calibration
        result = dq.quantize(pipe, chosen, calibration, seed=seed, folder=work, memory_gib=memory, minutes=minutes)
    dq.save(pipe, out)
    result.write(out / "quantization.json")
    written, full = file_size(out), float32_size(Host(pipe).denoiser)
    say(f"{out}: {written / 1e6:.2f} MB, {written / full:.3f} of float32 ({full / 1e6:.2f} MB)")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Directory of a quantized checkpoint.")],
    out: Annotated[Path, typer.Option(help="New folder for the file and for export.json.")],
    to: Annotated[
        str, typer.Option(help=f"Runtime to write for: {', '.join(target_names())} (onnx for TensorRT too).")
    ] = "openvino",
    form: Annotated[str, typer.Option(help=FORM_HELP)] = "exact",
) -> None:
    """Write a quantized denoiser for another runtime, and check the file by running it."""
    report = dq.export(model, out, to, form)
    say(
        f"{out / report.file}: differs from the simulation by {report.error:.2g} (relative, one call); rounding explains "
        f"{report.allowed:.2g}"
    )
    console.print(f"{report.integer} products of integers, {report.floating} in floating point")
    if report.floating_layers:
        console.print(f"quantized, but computed in floating point there: {', '.join(report.floating_layers)}")
    if report.note:
        say(report.note)


@app.command(name="sample")
def sample_pictures(
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
    given: dict[str, Any] = {"samples": count, "batch_size": min(count, 16), "steps": steps, "seed": seed, "sampler": sampler}
    check_place(out)
    chosen = load_protocol(protocol or (), prompts=prompts, guidance_scale=guidance, **given)
    pipe = _load(model, load)
    with bars(True) as shown:
        drawn = sample(pipe, chosen.sampling, progress=shown.show)
    pictures = drawn.pictures
    if out.suffix in ("", ".npz"):
        write_pictures(pictures, out)
    else:
        draw_grid(pictures.numpy()).save(out)
    say(f"{count} pictures in {out}, {drawn.seconds / count:.2f} s each")


@app.command()
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
    chosen = load_protocol(protocol or (), samples=samples, steps=steps, prompts=prompts)
    scorer = None
    if clip is not None:
        from diffquant.evaluation.clip import ClipScore  # takes transformers' CLIP along, which nothing else needs

        scorer = ClipScore.from_directory(clip)
    features = _features(reference, inception)
    data = zoo.load_statistics() if reference in models.PIPELINES and inception is None else None
    if chosen.data is not None:
        if features is None:
            raise DiffquantError("protocol.data: FID to pictures needs an extractor; give --inception FILE (docs/evaluation.md)")
        data = statistics_of(chosen.data, features)
    with bars(True) as shown:
        report = dq.evaluate(
            _named(model or []),
            _load(reference, load),
            protocol=chosen.sampling,
            features=features,
            data=data,
            clip=scorer,
            out=out,
            progress=shown.show,
        )
    console.print(report.table())
    say(f"report.md, report.json and pictures in {out}")


@app.command()
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
    chosen = load_protocol(protocol or (), samples=samples, prompts=prompts)
    with bars(True) as shown:
        found = dq.robustness(
            _named(model),
            _load(reference, load),
            vary=varied_fields(vary) if vary else None,
            protocol=chosen.sampling,
            features=_features(reference, inception),
            out=out,
            progress=shown.show,
        )
    if found.models:
        console.print(found.table())
    for reason, names in found.refusals().items():
        say(f"left out: {', '.join(names)}: {reason}")
    say(f"robustness.md, robustness.json, robustness.png and a report of each combination in {out}")


@app.command()
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
    chosen = dq.load_recipe(recipe, set_ or ())
    if sensitivity is not None:
        require_extra()
    pipe = _load(model, load)
    found = dq.inspect(pipe, chosen)
    measured = None
    if sensitivity is not None:
        from diffquant.analysis.drawing import draw_sensitivity

        place = data or _below(work)
        own = dq.Calibration(samples=trajectories, seed=seed)
        recorded = dq.Trajectory.open(place) if place else dq.record(pipe, own, folder=sensitivity / "recording")
        measured = dq.sensitivity(pipe, chosen, recorded, trajectories=trajectories, seed=seed, folder=work or sensitivity)
        measured.write(sensitivity / "sensitivity.json")
        draw_sensitivity(measured).save(sensitivity / "sensitivity.png")
    console.print(plan_table(found, measured))
    if measured is not None:
        learned = ", ".join(measured.passes) or "ranges alone, weights rounded to nearest"
        console.print(
            f"errors after {learned}: parts of the last sample's squared error, each quantizer alone; {measured.trajectories} "
            f"trajectories leave {measured.uncertainty:.0%} of a share open",
            soft_wrap=True,
        )
        say(f"by sampling step: sensitivity.json and sensitivity.png in {sensitivity}")
    console.print(f"file {found.file_bytes / 1e6:.2f} MB, {found.file_bytes / found.float32_bytes:.3f} of float32")
    console.print(f"peak memory about {found.memory_bytes / 1e9:.2f} GB, calibration about {found.seconds / 60:.1f} minutes here")


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show this machine: what its kernels multiply exactly, the engines that run, and the default."""
    found = dq.info()
    if as_json:
        console.print_json(found.model_dump_json())
    else:
        console.print(found.table())


@zoo_app.command(name="list")
def zoo_list() -> None:
    """Name the reference models, and the recipes and protocols that come with the package."""
    console.print(f"models: {', '.join(models.NAMES)}")
    console.print(f"recipes: {', '.join(shipped('recipes'))} (with bits, as in brecq-w4a8)")
    console.print(f"protocols: {', '.join(shipped('protocols'))}")


@app.command(name="reproduce")
def reproduce_released(
    name: Annotated[str, typer.Argument(help=f"Released checkpoint: {', '.join(RELEASED)}.")],
    out: Annotated[Path, typer.Option(help="Folder of the recording, the checkpoint and the report; a killed run goes on.")],
    model: Annotated[str | None, typer.Option(help="Directory or hub id to take in its place.")] = None,
    recipe: Annotated[str, typer.Option(help=RECIPE_HELP)] = DEFAULT_RECIPE,
    samples: Annotated[int, typer.Option(help="Samples of the comparison.")] = COMPARED,
    minutes: Annotated[float | None, typer.Option(help=MINUTES_HELP)] = None,
    set_: Set = None,
    protocol: Protocol = None,
    load: Load = None,
) -> None:
    """Quantize a released checkpoint by its protocol and compare: record, quantize, save and evaluate in one command."""
    if name not in RELEASED:
        raise DiffquantError(f"reproduce {name!r}: unknown; allowed are {', '.join(RELEASED)}")
    released = RELEASED[name]
    report = reproduce(
        lambda: _load(model or released.model, load),
        dq.load_recipe(recipe, set_ or ()),
        out,
        protocol=[released.protocol, *(protocol or [])],
        samples=samples,
        minutes=minutes,
    )
    console.print(report.table())
    say(f"checkpoint: {out / 'checkpoint'}, report: {out / 'report' / 'report.md'}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the report.")] = Path("demo-output"),
    seed: Seed = 0,
) -> None:
    """Quantize the shipped model three ways in a few minutes, and show what was lost."""
    run_demo(out, seed, console)


def main() -> None:
    """Entry point: errors that are the user's to mend are one line and exit code 1."""
    try:
        app()
    except (DiffquantError, OSError, SafetensorError) as error:
        if "--debug" in sys.argv:
            raise
        errors.print(f"error: {' '.join(str(error).split())}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


def _load(model: str, load: list[str] | None = None) -> Any:
    return load_named(model, load or (), lambda text: say(text, errors))


def say(text: str, to: Console | None = None) -> None:
    """Print a line as it is: brackets of a path are no markup, and long paths are not wrapped."""
    (to or console).print(text, soft_wrap=True, highlight=False, markup=False)


def _features(reference: str, inception: Path | None) -> FeatureExtractor | None:
    """The extractor of a file, or that of the reference models."""
    if inception is not None:
        return InceptionFeatures.from_file(inception)
    return zoo.load("glyph-classifier") if reference in models.PIPELINES else None


def _named(folders: list[str]) -> dict[str, str]:
    """Folders by their last name, or by the whole path where two share it."""
    short = [Path(folder).name for folder in folders]
    return dict(zip(short if len(set(short)) == len(short) else folders, folders, strict=True))


def _below(work: Path | None) -> Path | None:
    return None if work is None else work / "recording"

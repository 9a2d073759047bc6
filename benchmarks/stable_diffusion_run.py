"""A model of real size from recording to sampling on integers: peak memory and time of every stage, and what a full run would take.

    python benchmarks/stable_diffusion_run.py
    python benchmarks/stable_diffusion_run.py --model sdxl

The UNet has the configuration of Stable Diffusion 1.5 (860 M parameters, float32) or XL (2.6 B, bfloat16) and random weights;
autoencoder and text encoders are small, of the widths that the UNet needs. Budgets are the least that exercise every stage, so
nothing is said about quality. SDXL goes through ranges, packing and loading only.

Each stage is a process of its own that loads what it needs; finished ones are kept in the work folder, and a run that was stopped
goes on. `peak`: largest resident memory, pages of mapped files included, which the system may drop; `own`: largest memory that is
not backed by a file, sampled 20 times a second. `forwards`: samples that entered the denoiser.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rows as results
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import diffquant as dq
from diffquant.calibration import memory
from diffquant.checkpoint.folder import file_size
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan, units
from diffquant.recipe import Recipe

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
STAGES = {
    "sd15": ("build", "record", "ranges", "rounding", "accuquant", "save", "sample"),
    "sdxl": ("build", "record", "ranges", "save", "sample"),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "sd15": {"latents": 64, "trajectories": 2, "steps": 4, "weights": "mse"},
    "sdxl": {"latents": 32, "trajectories": 1, "steps": 2, "weights": "minmax"},
}
PASSES = ("ranges", "rounding", "accuquant")  # of recipe accuquant, in order
FULL = {"trajectories": 64, "steps": 20}  # recorded for a full run
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"


def unet(name: str, latents: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=latents, **UNETS[name])


def build(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Write the float pipeline, in several files so that writing takes no second copy."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype_of(options))
    tokenizer = spelling_tokenizer(work / "tokenizer")
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    denoiser = unet(options.model, options.latents)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    if options.model == "sd15":
        pipe = StableDiffusionPipeline(
            vae, text_encoder(tokenizer, 768, CLIPTextModel), tokenizer, denoiser, DDIMScheduler(**schedule, clip_sample=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    else:
        encoders = text_encoder(tokenizer, 768, CLIPTextModel), text_encoder(tokenizer, 1280, CLIPTextModelWithProjection)
        scheduler = EulerDiscreteScheduler(**schedule, timestep_spacing="leading")
        pipe = StableDiffusionXLPipeline(vae, *encoders, tokenizer, tokenizer, denoiser, scheduler, add_watermarker=False)
    pipe.save_pretrained(work / "float", max_shard_size="1GB")
    return {"parameters": parameters, "file": file_size(work / "float")}


def text_encoder(tokenizer: CLIPTokenizer, width: int, kind: type[Any]) -> Any:
    """Two layers, so that the one before the last, which SDXL reads, exists."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=8, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return kind(config)


def spelling_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows letters and no merges, made without a download."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    return torch.float32 if options.model == "sd15" else torch.bfloat16


def load(options: argparse.Namespace, work: Path) -> Any:
    """The float pipeline with its weights mapped from the files, as diffusers does for safetensors of the dtype asked for."""
    return DiffusionPipeline.from_pretrained(work / "float", dtype=dtype_of(options))


def calibration(options: argparse.Namespace) -> dq.Calibration:
    return dq.Calibration(samples=options.trajectories, steps=options.steps, batch_size=1, guidance_scale=7.5)


def recipe(options: argparse.Namespace, passes: int) -> Recipe:
    """The first passes of recipe accuquant, at the least budgets."""
    sets = [
        f"passes.0.weights={options.weights}",
        f"passes.0.samples={options.range_samples}", "passes.0.batch_size=1", f"passes.0.candidates={options.candidates}",
        f"passes.1.samples={options.samples}", "passes.1.batch_size=1", f"passes.1.iterations={options.iterations}",
        f"passes.2.iterations={options.accuquant_iterations}", "passes.2.batch_size=1", "passes.2.cosines=false",
        "passes.2.steps_per_segment=2", "passes.2.checkpointing=true", "passes.2.split_guidance=true",
    ]  # fmt: skip
    whole = dq.load_recipe("accuquant-w4a8", sets)
    return whole.model_copy(update={"passes": whole.passes[:passes]})


def run_passes(options: argparse.Namespace, work: Path, passes: int, then: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """Record (or read what was recorded), and run the first `passes` passes, of which finished ones are read back; 0: none."""
    pipe = load(options, work)
    counted = 0

    def count(module: Any, arguments: Any, keywords: Any) -> None:
        nonlocal counted
        counted += len(arguments[0] if arguments else keywords["sample"])

    pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    data = dq.record(pipe, calibration(options), folder=work / "data")
    figures: dict[str, Any] = {"recorded": directory_size(work / "data")}
    if passes:
        original, spilled = memory.mapped, []

        def mapped(*arguments: Any) -> torch.Tensor:
            tensor = original(*arguments)
            spilled.append(tensor.nbytes)
            return tensor

        memory.mapped = mapped  # only to count
        report = dq.quantize(pipe, recipe(options, passes), data, folder=work / "passes", memory_gib=options.memory_gib)
        last = report.passes[-1]
        figures = {"pass_seconds": last["seconds"], "spilled": sum(spilled)}
        if last["pass"] == "ReconstructRounding":
            rows = last["figures"]["layers"]
            figures["units"] = len(rows)
        if last["pass"] == "AccuQuant":
            figures["segments"], figures["kept"] = last["figures"]["segments"], last["figures"]["kept"]
    if then is not None:
        figures = then(pipe)
    return figures | {"forwards": counted}


def save(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    def write(pipe: Any) -> dict[str, Any]:
        written = file_size(dq.save(pipe, work / "packed"))
        return {"file": written, "of_stored": written / file_size(work / "float")}

    return run_passes(options, work, len([stage for stage in STAGES[options.model] if stage in PASSES]), write)


def sample(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Load on the int8 engine and take one guided step."""
    begun = time.perf_counter()
    pipe = dq.load(work / "packed", engine="int8", dtype=dtype_of(options))
    loaded = time.perf_counter()
    arguments = {"num_inference_steps": 1, "guidance_scale": 7.5, "generator": torch.Generator().manual_seed(0)}
    latent = pipe("a lighthouse on a cliff", output_type="latent", **arguments).images
    return {
        "load_seconds": loaded - begun,
        "step_seconds": time.perf_counter() - loaded,
        "finite": bool(torch.isfinite(latent).all()),
    }


def directory_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def status(key: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)) * 1024


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Peaks of resident memory, and of the part that no file backs, while the block runs; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    peaks, done = {"own": 0}, threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            peaks["own"] = max(peaks["own"], status("RssAnon"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()
        peaks["peak"] = status("VmHWM")


def run_stage(options: argparse.Namespace, work: Path) -> None:
    """One stage, in this process; its figures go to a file."""
    name = options.stage
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "build": lambda: build(options, work),
        "record": lambda: run_passes(options, work, 0),
        "save": lambda: save(options, work),
        "sample": lambda: sample(options, work),
    }
    stages |= {stage: lambda stage=stage: run_passes(options, work, PASSES.index(stage) + 1) for stage in PASSES}  # type: ignore[misc]
    begun = time.perf_counter()
    with watched() as peaks, torch.no_grad() if name in ("build", "sample") else torch.enable_grad():
        figures = stages[name]()
    row = {"stage": name, "seconds": time.perf_counter() - begun} | peaks | figures
    (work / f"{name}.json").write_text(json.dumps(row, indent=1))


def estimate(options: argparse.Namespace) -> dict[str, Any]:
    """Forward passes of the recipe at its own budgets, and hours at a stated rate; the model is only described, not computed."""
    whole = dq.load_recipe("accuquant-w4a8", ["passes.2.checkpointing=true"])  # a graph of its whole batch fits no GPU
    latents = {"sd15": 64, "sdxl": 128}[options.model]
    with torch.device("meta"):
        model = unet(options.model, latents)
        given: dict[str, Any] = {"encoder_hidden_states": torch.empty(1, 77, UNETS[options.model]["cross_attention_dim"])}
        if options.model == "sdxl":
            given["added_cond_kwargs"] = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 4, latents, latents), torch.tensor(1), **given)
        prepare(model, plan(model, whole.layers))
    blocks = len(units(model))
    forwards: dict[str, float] = {"record": 2.0 * FULL["trajectories"] * FULL["steps"]}
    for step in whole.built_passes():
        work = step.work(blocks)
        count = work.forwards + 2 * work.backwards
        guided = 2.0 if type(step).__name__ == "AccuQuant" else 1.0  # its samples are trajectories
        forwards[type(step).__name__] = count * guided
    teraflops = counter.get_total_flops() / 1e12
    total = sum(forwards.values())
    return {
        "teraflop_per_forward": teraflops,
        "latents": latents,
        "units": blocks,
        "forwards": forwards,
        "total": total,
        "assumed_teraflops": options.teraflops,
        "hours": total * teraflops / options.teraflops / 3600,
    }


def show(rows: list[dict[str, Any]], estimated: dict[str, Any], console: Console) -> None:
    table = Table("stage", "seconds", "peak GiB", "own GiB", "forwards", "more")
    for row in rows:
        shown = {"stage", "seconds", "peak", "own", "forwards", "segments"}
        more = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items() if key not in shown
        )
        sizes = [f"{row[key] / 2**30:.2f}" for key in ("peak", "own")]
        table.add_row(row["stage"], f"{row['seconds']:.0f}", *sizes, str(row.get("forwards", "")), more)
    console.print(table)
    side, rate = estimated["latents"], estimated["assumed_teraflops"]
    console.print(
        f"full run of accuquant-w4a8 on {FULL['trajectories']} trajectories of {FULL['steps']} guided steps, latents of "
        f"{side}x{side}: {estimated['total']:.3g} forwards of {estimated['teraflop_per_forward']:.2f} TFLOP, "
        f"{estimated['hours']:.1f} hours at {rate:g} TFLOP/s"
    )


def table_of(stages: list[dict[str, Any]], estimated: dict[str, Any], options: argparse.Namespace) -> list[results.Row]:
    """A row for each stage, and one for the estimate of a full run."""
    passed = {key: value for key, value in vars(options).items() if key not in ("model", "stage", "until", "again", "work")}
    base = {"model": options.model, "options": results.protocol_text(**passed), "threads": torch.get_num_threads()}
    table = [
        base | {key: json.dumps(value) if isinstance(value, list) else value for key, value in stage.items()} for stage in stages
    ]
    full = {key: value for key, value in estimated.items() if key not in ("forwards", "total")}
    full |= {f"forwards_{name}": count for name, count in estimated["forwards"].items()} | {"forwards": estimated["total"]}
    return [row | results.provenance() for row in (*table, base | {"stage": "estimate of a full run"} | full)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=UNETS, default="sd15")
    parser.add_argument("--stage", choices=sorted({stage for names in STAGES.values() for stage in names}), help="only this, here")
    parser.add_argument("--until", choices=[*STAGES["sd15"]], default="sample", help="the last stage to run")
    parser.add_argument("--latents", type=int, help="side of the latents (default: 64, sdxl 32, to save time)")
    parser.add_argument("--trajectories", type=int, help="recorded (default: 2, sdxl 1)")
    parser.add_argument("--steps", type=int, help="of a trajectory (default: 4, sdxl 2)")
    parser.add_argument("--weights", choices=("minmax", "mse"), help="ranges of weights (default: mse, sdxl minmax, to save time)")
    parser.add_argument("--range-samples", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--samples", type=int, default=1, help="of every block's reconstruction")
    parser.add_argument("--iterations", type=int, default=2, help="of every block's reconstruction")
    parser.add_argument("--accuquant-iterations", type=int, default=1)
    parser.add_argument("--memory-gib", type=float, default=0.01, help="for a block's recorded inputs; more goes to files")
    parser.add_argument("--teraflops", type=float, default=20.0, help="rate that the estimate assumes of a GPU")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    parser.add_argument("--again", action="store_true", help="forget finished stages but the float pipeline")
    options = parser.parse_args()
    for name, value in DEFAULTS[options.model].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    work = options.work / f"{options.model}-{options.latents}"
    work.mkdir(parents=True, exist_ok=True)
    if options.stage:
        run_stage(options, work)
        return
    console = Console(width=160)
    if options.again:
        for stage in STAGES[options.model][1:]:
            (work / f"{stage}.json").unlink(missing_ok=True)
        for folder in ("data", "passes", "packed"):
            shutil.rmtree(work / folder, ignore_errors=True)
    rows = []
    for stage in STAGES[options.model][: STAGES[options.model].index(options.until) + 1]:
        if not (work / f"{stage}.json").exists():
            given = [argument for argument in sys.argv[1:] if argument != "--again"]
            begun = time.strftime("%H:%M:%S")
            console.print(f"{begun} {stage}")
            subprocess.run([sys.executable, "-W", "ignore", __file__, *given, "--stage", stage], check=True, env=os.environ)
        rows.append(json.loads((work / f"{stage}.json").read_text()))
    estimated = estimate(options)
    show(rows, estimated, console)
    results.put(results.RESULTS / "stable-diffusion-run.csv", table_of(rows, estimated, options), ("model", "stage"))


if __name__ == "__main__":
    main()

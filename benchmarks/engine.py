"""The int8 engine: time per step against floating point, its layers against the simulation, and memory while loading.

    python benchmarks/engine.py speed --models glyph-ddim ddpm-cifar10 dit-s --engines openvino --compile --peers "openvino float32"
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/engine.py speed ...
    python benchmarks/engine.py shown
    python benchmarks/engine.py layers --bits 4
    python benchmarks/engine.py memory --bits 4

`speed`: the runtimes take turns, a few calls each after one to warm up, for several rounds; medians over the rounds, and ratios to
the default engine within a round, at 4 and 8 bits of the weights. One row of `results/engine-speed.csv` is one runtime of one model
on one machine; `shown` prints them. The switches in the second line give PyTorch and OpenVINO the kernels of an older processor.
`layers`: every layer of glyph-ddim in one call, fed what the simulation feeds it. `memory`: Stable Diffusion 1.5's UNet, loaded in
a process of its own. All weights but glyph-ddim's are random.
"""

import argparse
import copy
import csv
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import peers
import rows as results
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stable_diffusion_size import frozen_unet
from torch import Tensor, nn

import diffquant as dq
from diffquant import zoo
from diffquant.checkpoint.folder import file_size, float32_size
from diffquant.core.affine import scale_from_range
from diffquant.core.model import freeze, quantizers
from diffquant.engines.int8 import nibbles
from diffquant.engines.int8.float_layers import FloatLinear
from diffquant.engines.int8.integer_layers import INTEGER, PackedCodes
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan

SPEED = results.RESULTS / "engine-speed.csv"
KEYS = ("processor", "kernels", "threads", "model", "batch", "runtime")  # of a row that a new one replaces
SWITCHES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
Call = Callable[[nn.Module], Tensor]
Run = Callable[[], object]


def ddpm_cifar10() -> UNet2DModel:
    """The configuration of google/ddpm-cifar10-32."""
    return UNet2DModel(
        sample_size=32, layers_per_block=2, block_out_channels=(128, 256, 256, 256), norm_eps=1e-6, downsample_padding=0,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1,
    )  # fmt: skip


def dit(heads: int, width: int, layers: int) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(heads, width, in_channels=4, out_channels=8, num_layers=layers, sample_size=32, patch_size=2)


def stable_diffusion() -> UNet2DConditionModel:
    """The configuration of Stable Diffusion 1.5."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "glyph-ddim": (lambda: zoo.load("glyph-ddim").unet, 64),
    "ddpm-cifar10": (ddpm_cifar10, 1),
    "ddpm-cifar10-8": (ddpm_cifar10, 8),
    "dit-s": (lambda: dit(6, 64, 12), 1),
    "dit-xl": (lambda: dit(16, 72, 28), 1),
    "sd15": (stable_diffusion, 2),
}


def inputs(model: Any, batch: int) -> dict[str, Tensor]:
    """Fixed arguments for one call of a denoiser at its own size."""
    generator = torch.Generator().manual_seed(0)
    size, channels = model.config.sample_size, model.config.in_channels
    given = {"timestep": torch.full((batch,), 500)}
    if isinstance(model, UNet2DConditionModel):
        given["encoder_hidden_states"] = torch.randn(batch, 77, 768, generator=generator)
    if isinstance(model, DiTTransformer2DModel):
        given["class_labels"] = torch.zeros(batch, dtype=torch.long)
    first = "hidden_states" if isinstance(model, DiTTransformer2DModel) else "sample"
    return {first: torch.randn(batch, channels, size, size, generator=generator)} | given


def denoise(batch: int) -> Call:
    """One call of a denoiser at its own size, on fixed inputs."""

    def call(model: Any) -> Tensor:
        output: Tensor = model(**inputs(model, batch)).sample
        return output

    return call


def quantize(model: nn.Module, call: Call, bits: int, overrides: Sequence[str] = ()) -> nn.Module:
    """`model` frozen with the layers of recipe minmax, its ranges those of one call."""
    calibrated(model, call, f"minmax-w{bits}a8", overrides)
    freeze(model)
    return model


def calibrated(model: nn.Module, call: Call, recipe: str, overrides: Sequence[str] = (), timesteps: tuple[float, ...] = ()) -> None:
    """Make `model` quantizable with the layers of a recipe, its ranges those of one call, the same for all parameter sets."""
    prepare(model, plan(model, dq.load_recipe(recipe, list(overrides)).layers), timesteps)
    modules = dict(model.named_modules())
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def observer(name: str) -> Callable[[Tensor], None]:
        return lambda x: ranges.__setitem__(name, x.aminmax())  # type: ignore[func-returns-value]

    for name, quantizer in quantizers(model):
        quantizer.observer = None if quantizer.clock is None else observer(name)
    call(model)
    for name, quantizer in quantizers(model):
        quantizer.observer = None
        if quantizer.clock is None:
            weight = modules[name.rpartition(".")[0]].weight.detach().flatten(1)
            ranges[name] = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scale, zero_point = scale_from_range(*ranges[name], quantizer.spec)
        quantizer.scale.copy_(scale)
        quantizer.zero_point.copy_(zero_point)


def machine() -> dict[str, Any]:
    """What the timings depend on; `kernels` says what was asked of the machine, and the set that PyTorch computes with."""
    said = dq.info()
    largest = next(kernel.largest_weight[8] for kernel in said.kernels if kernel.name == "torch linear")
    switches = " ".join(f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ)
    return {
        "processor": said.processor,
        "kernels": f"{torch.backends.cpu.get_cpu_capability()}, exact to {largest}" + (f" ({switches})" if switches else ""),
        "threads": torch.get_num_threads(),
        "torch": said.versions["torch"],
        "openvino": said.versions.get("openvino", ""),
    }


def held(model: nn.Module) -> float:
    """Bytes that a model's weights take in memory, in parts of what float32 takes; scratch that layers share counts once."""
    scratches: dict[int, int] = {}
    total = sum(tensor.numel() * tensor.element_size() for tensor in chain(model.parameters(), buffers_of(model)))
    for module in model.modules():
        if isinstance(module, FloatLinear):
            total += 4 * module.in_features * module.out_features
        if not isinstance(module, PackedCodes):
            continue
        for packed in (digit for row in module.packed for part in row for digit in part):
            for part in (part for half in packed.halves for part in half):
                if isinstance(part.weight, nibbles.Nibbles):
                    total += part.weight.held
                    scratches[id(part.weight.scratch)] = len(part.weight.scratch.bytes)
                else:
                    with part.weight as weight:
                        total += torch.ops.mkldnn._nbytes(weight)
    return (total + sum(scratches.values())) / float32_size(model)


def buffers_of(model: nn.Module) -> Iterator[Tensor]:
    """Its buffers, but for codes that are unpacked when they are looked at."""
    return (tensor for module in model.modules() for tensor in module._buffers.values() if tensor is not None)


def in_bytes(model: nn.Module) -> nn.Module:
    """A copy of a simulated model that computes with int8, 4-bit weights held in a byte each."""
    copied, least = copy.deepcopy(model), nibbles.LEAST
    nibbles.LEAST = sys.maxsize
    try:
        dq.use_engine(copied, "int8")
    finally:
        nibbles.LEAST = least
    return copied


def runtimes(name: str, arguments: argparse.Namespace) -> tuple[dict[str, tuple[Run, str]], dict[str, nn.Module]]:
    """What computes one call of a model, each with torch's float32 precision; and the models that compute with int8."""
    make, batch = MODELS[name]
    torch.manual_seed(0)
    full = make().eval().requires_grad_(False)
    given = inputs(full, batch)
    models = {"float32": full, "float32 medium": full}
    if arguments.bfloat16:
        models["bfloat16"] = copy.deepcopy(full).to(torch.bfloat16)
    lowered: dict[str, nn.Module] = {}
    for bits in (4, 8):
        quantized = quantize(copy.deepcopy(full), denoise(batch), bits, arguments.overrides)
        lowered[f"int8 w{bits}a8"] = copy.deepcopy(quantized)
        dq.use_engine(lowered[f"int8 w{bits}a8"], "int8")
        if bits == 4:
            lowered["int8 w4a8 in bytes"] = in_bytes(quantized)
        for engine in arguments.engines:
            models[f"{engine} w{bits}a8"] = copy.deepcopy(quantized)
            dq.use_engine(models[f"{engine} w{bits}a8"], engine)
    models |= lowered
    for runtime in ("float32", "int8 w4a8") if arguments.compile else ():
        models[f"{runtime} compiled"] = copy.deepcopy(models[runtime])
        models[f"{runtime} compiled"].compile()

    def run(model: nn.Module) -> Run:
        dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
        cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
        return lambda: model(**cast)

    found = {runtime: (run(model), "medium" if "medium" in runtime else "highest") for runtime, model in models.items()}
    for peer in arguments.peers:
        found[peer] = (peers.PEERS[peer](full, given), "highest")
    if arguments.onnx:
        found["onnx w8a8"] = (peers.onnx_export(quantized, given), "highest")
    return found, lowered


def time_model(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each runtime: the median of `calls` calls in each of `rounds` rounds, and its ratios to the default engine."""
    found, lowered = runtimes(name, arguments)
    times: dict[str, list[float]] = {runtime: [] for runtime in found}
    for _ in track(range(arguments.rounds), description=name, console=Console(stderr=True)):
        for runtime, (run, precision) in found.items():
            torch.set_float32_matmul_precision(precision)
            run()
            taken = []
            for _ in range(arguments.calls):
                start = time.perf_counter()
                run()
                taken.append(time.perf_counter() - start)
            times[runtime].append(statistics.median(taken))
    torch.set_float32_matmul_precision("highest")
    rows = []
    for runtime, taken in times.items():
        row = {"model": " ".join([name, *arguments.overrides]), "batch": MODELS[name][1], "runtime": runtime}
        row |= {"rounds": len(taken), "milliseconds": f"{statistics.median(taken) * 1e3:.1f}"}
        for bits in (4, 8):
            ratios = sorted(a / b for a, b in zip(taken, times[f"int8 w{bits}a8"], strict=True))
            row |= {f"over w{bits}a8": f"{statistics.median(ratios):.3f}", f"low {bits}": f"{ratios[0]:.3f}"}
            row[f"high {bits}"] = f"{ratios[-1]:.3f}"
        row["held"] = f"{held(lowered[runtime]):.3f}" if runtime in lowered else ""
        rows.append(row)
    return rows


def speed(arguments: argparse.Namespace) -> None:
    """Time every model, and write its rows at once in the place of those of the same machine, model and runtime."""
    place = {"date": datetime.date.today().isoformat(), "commit": commit(), **machine()}
    for name in arguments.models:
        rows = [{**place, **row} for row in time_model(name, arguments)]
        kept = [row for row in read_rows() if not any(all(row[key] == str(new[key]) for key in KEYS) for new in rows)]
        write_rows([*kept, *rows])
        table = Table("model", "runtime", "ms", "times int8 w4a8", "times int8 w8a8", "held")
        for row in rows:
            extent = [f"{row[f'over w{bits}a8']} [{row[f'low {bits}']}, {row[f'high {bits}']}]" for bits in (4, 8)]
            table.add_row(name, row["runtime"], row["milliseconds"], *extent, row["held"])
        Console(width=140).print(table)


def commit() -> str:
    """The commit that is measured, with a plus where files differ from it."""
    run = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return run.stdout.strip()


def read_rows() -> list[dict[str, str]]:
    if not SPEED.exists():
        return []
    with SPEED.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    temporary = SPEED.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(SPEED)


def shown() -> None:
    """What the file holds, as Markdown: a table for each machine, a row for each model."""
    machines: dict[tuple[str, str, str], dict[tuple[str, str], dict[str, dict[str, str]]]] = {}
    for row in read_rows():
        models = machines.setdefault((row["processor"], row["kernels"], row["threads"]), {})
        models.setdefault((row["model"], row["batch"]), {})[row["runtime"]] = row
    for (processor, kernels, threads), models in machines.items():
        print(f"\n{processor}, {kernels}, {threads} threads\n")
        print("| model, batch | ms W4A8, W8A8 | torch, eager | compiled | OpenVINO float32 | `openvino` | in bytes | memory |")
        print("|---|---|---|---|---|---|---|---|")
        for (model, batch), rows in models.items():

            def over(runtimes: Sequence[str], bits: int, rows: dict[str, dict[str, str]] = rows) -> str:
                ratios = [float(rows[runtime][f"over w{bits}a8"]) for runtime in runtimes if runtime in rows]
                return f"{min(ratios):.2f}" if ratios else "-"

            both = [
                f"{over(runtimes, 4)}, {over(runtimes, 8)}"
                for runtimes in (["float32", "float32 medium"], ["float32 compiled"], ["openvino float32"])
            ]
            engine = f"{over(['openvino w4a8'], 4)}, {over(['openvino w8a8'], 8)}"
            ours = [rows[f"int8 w{bits}a8"] for bits in (4, 8)]
            times = ", ".join(f"{float(row['milliseconds']):.0f}" for row in ours)
            memory = ", ".join(row["held"] for row in ours)
            print(f"| {model}, {batch} | {times} | {' | '.join(both)} | {engine} | {over(['int8 w4a8 in bytes'], 4)} | {memory} |")


def layers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Codes and outputs of every lowered layer of glyph-ddim, on what the simulation feeds it in one call."""
    call = denoise(8)
    model = quantize(zoo.load("glyph-ddim").unet.requires_grad_(False), call, arguments.bits)
    inputs: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, given, output: inputs.__setitem__(name, (given[0].clone(), output.clone()))  # type: ignore[func-returns-value]

    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "weight_quantizer")]
    hooks = [module.register_forward_hook(keep(name)) for name, module in found]
    call(model)
    for hook in hooks:
        hook.remove()
    dq.use_engine(model, "int8")
    codes = off = 0
    errors = []
    for name, layer in found:
        x, simulated = inputs[name]
        if not isinstance(layer, INTEGER) or layer.input_quantizer is None:
            continue
        ours = layer.product.codes(x, 0)[0].float()
        theirs = layer.input_quantizer.quantize(x) - layer.input_quantizer.spec.code_min
        codes, off = codes + ours.numel(), off + int((ours != theirs).sum())
        errors.append(float((layer(x) - simulated).norm() / simulated.norm()))
    row = {
        "model": "glyph-ddim",
        "bits": arguments.bits,
        "layers": len(errors),
        "codes": codes,
        "off_by_one": off,
        "share": off / codes,
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
    }
    Console().print_json(data=row)
    return row


RESIDENT = """
import sys, threading, time, torch
from diffusers import UNet2DConditionModel
import diffquant as dq

def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(sys.argv[1] + "/tiny"))
torch.ops.onednn.qlinear_prepack(torch.zeros(8, 8, dtype=torch.int8), None)
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
with dq.engine("int8"):
    model = UNet2DConditionModel.from_pretrained(sys.argv[1] + "/unet")
print(resident("VmRSS") - before, resident("VmHWM") - before)
"""


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """File, resident memory after loading and its peak, of Stable Diffusion 1.5's UNet; relative to its float32 weights."""
    row: dict[str, Any] = {"model": "sd15", "bits": arguments.bits}
    with tempfile.TemporaryDirectory() as folder:
        UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 32, 32, 32), cross_attention_dim=8, attention_head_dim=8
        ).save_config(f"{folder}/tiny")
        model = frozen_unet(arguments.bits)
        float32 = float32_size(model)
        dq.save(model, Path(folder) / "unet")
        del model
        row["file"] = file_size(Path(folder) / "unet") / float32
        command = [sys.executable, "-W", "ignore", "-c", RESIDENT, folder]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        row |= {"resident": int(printed[0]) / float32, "peak": int(printed[1]) / float32, "float32": float32}
    Console().print_json(data=row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("speed")
    one.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    one.add_argument("--compile", action="store_true", help="with torch.compile too; takes minutes for each model")
    one.add_argument("--bfloat16", action="store_true", help="with torch's bfloat16")
    one.add_argument(
        "--engines", nargs="*", choices=["openvino", "openvino-bf16"], default=[], help="other engines; converting takes minutes"
    )
    one.add_argument("--onnx", action="store_true", help="with the exported ONNX file in ONNX Runtime")
    one.add_argument("--peers", nargs="*", choices=peers.PEERS, default=[], help="with other runtimes")
    one.add_argument("--set", nargs="*", default=[], dest="overrides", help="changes of the recipe, as of the command line")
    one.add_argument("--rounds", type=int, default=5)
    one.add_argument("--calls", type=int, default=3)
    commands.add_parser("shown", help="the results of speed as Markdown")
    for name in ("layers", "memory"):
        commands.add_parser(name).add_argument("--bits", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.command == "shown":
        shown()
        return
    with torch.no_grad():
        if arguments.command == "speed":
            speed(arguments)
            return
        row = {"layers": layers, "memory": memory}[arguments.command](arguments)
    file = results.RESULTS / f"engine-{arguments.command}.csv"
    results.put(file, [row | results.provenance() | {"engine": "int8"}], ("model", "bits"))


if __name__ == "__main__":
    main()

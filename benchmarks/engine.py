"""The int8 engine: time per step against torch's own floating point, its layers against the simulation, and memory while loading.

    python benchmarks/engine.py speed --models glyph-ddim ddpm-cifar10 dit-s dit-xl sd15 --openvino --compile
    python benchmarks/engine.py speed --models ddpm-cifar10 --openvino --peers "openvino float32" "openvino nncf"
    python benchmarks/engine.py speed --models dit-s --set layers.1.input_symmetric=true --openvino --peers "openvino nncf"
    python benchmarks/engine.py layers --bits 4
    python benchmarks/engine.py memory --bits 4

`speed`: the runtimes take turns, a few calls each after one to warm up, for several rounds; medians over the rounds, and the ratios
of floating point to the engine within a round. `layers`: every layer of glyph-ddim in one call, fed what the simulation feeds it.
`memory`: Stable Diffusion 1.5's UNet, loaded in a process of its own. All weights but glyph-ddim's are random.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peers
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stable_diffusion_size import frozen_unet
from torch import Tensor, nn

import diffquant as dq
from diffquant import zoo
from diffquant.core.affine import scale_from_range
from diffquant.core.planning import plan
from diffquant.core.surgery import freeze, prepare, quantizers
from diffquant.runtime.checkpoint import file_size, float32_size
from diffquant.runtime.engines import openvino
from diffquant.runtime.engines.integer_layers import INTEGER

RESULTS = Path("benchmarks/results")
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
    capabilities = dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}
    named = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return {
        "cpu": capabilities.get("cpu_name", platform.processor()),
        "instructions": [name for name in named if capabilities.get(name)],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def runtimes(name: str, arguments: argparse.Namespace) -> tuple[dict[str, tuple[Run, str]], dict[str, str]]:
    """What computes one call of a model, each with torch's float32 precision; and the layers that the engine simulates."""
    make, batch = MODELS[name]
    torch.manual_seed(0)
    full = make().eval().requires_grad_(False)
    given = inputs(full, batch)
    quantized = quantize(copy.deepcopy(full), denoise(batch), 8, arguments.overrides)
    simulated = dq.use_engine(quantized, "int8")
    models = {"float32": full, "float32 medium": full, "int8": quantized}
    if not arguments.no_bfloat16:
        models["bfloat16"] = copy.deepcopy(full).to(torch.bfloat16)
    for engine in openvino.PRECISIONS if arguments.openvino else ():
        if not (engine.endswith("bf16") and arguments.no_bfloat16):
            models[engine] = copy.deepcopy(quantized)
            dq.use_engine(models[engine], engine)
    for runtime in ("float32", "bfloat16", "int8") if arguments.compile else ():
        if runtime in models:
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
        exported = copy.deepcopy(quantized)
        dq.use_engine(exported, "simulate")
        found["onnx"] = (peers.onnx_export(exported, given), "highest")
    return found, {layer: reason for layer, reason in simulated if reason}


def time_model(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of `calls` calls in each of `rounds` rounds, and the ratios of every runtime to the engines in every round."""
    found, simulated = runtimes(name, arguments)
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
    row: dict[str, Any] = {"batch": MODELS[name][1]}
    row["seconds"] = {runtime: statistics.median(taken) for runtime, taken in times.items()}
    row["ratios"] = {
        f"{runtime} / {engine}": sorted(a / b for a, b in zip(times[runtime], times[engine], strict=True))
        for engine in ("int8", "int8 compiled", *openvino.PRECISIONS)
        for runtime in times
        if engine in times and runtime != engine
    }
    row["simulated"] = simulated
    return row


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """A row for each model; what is measured is written at once, beside what the file holds of the same machine.

    With `--add`, what the file holds of other runtimes stays: a ratio is of the run that measured both either way.
    """
    file = RESULTS / "engine-speed.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    result = {"machine": machine(), "models": kept["models"] if kept.get("machine") == machine() else {}}
    table = Table("model", "batch", "runtime", "ms", "times as long as int8", "slowest and fastest round")
    for name in arguments.models:
        row, key = time_model(name, arguments), " ".join([name, *arguments.overrides])
        earlier = result["models"].get(key, {}) if arguments.add else {}
        result["models"][key] = {**row, **{part: earlier.get(part, {}) | row[part] for part in ("seconds", "ratios")}}
        write(file, result)
        for runtime, seconds in row["seconds"].items():
            ratios = row["ratios"].get(f"{runtime} / int8", [row["seconds"][runtime] / row["seconds"]["int8"]])
            extent = f"{ratios[0]:.2f} to {ratios[-1]:.2f}" if len(ratios) > 1 else ""
            table.add_row(name, str(row["batch"]), runtime, f"{seconds * 1e3:.0f}", f"{statistics.median(ratios):.2f}", extent)
    Console().print(table)
    return result


def shown() -> None:
    """What the file holds, as Markdown: medians over rounds in parts of the `int8` engine's time, a column for each model."""
    models = json.loads((RESULTS / "engine-speed.json").read_text())["models"]
    names = list(dict.fromkeys(runtime for row in models.values() for runtime in row["seconds"]))
    print("| computed by | " + " | ".join(f"{name}, {row['batch']}" for name, row in models.items()) + " |")
    print("|---|" + "---|" * len(models))
    for runtime in names:
        cells = []
        for row in models.values():
            found = row["ratios"].get(f"{runtime} / int8", [1.0] if runtime == "int8" else [])
            cells.append(f"{statistics.median(found):.2f}" if found else "")
        print(f"| {runtime} | {' | '.join(cells)} |")
    for name, row in models.items():
        beside = {key: values for key, values in row["ratios"].items() if key.partition(" / ")[2] in openvino.PRECISIONS}
        print(f"{name}: " + ", ".join(f"{key} {statistics.median(v):.2f} [{v[0]:.2f}, {v[-1]:.2f}]" for key, v in beside.items()))


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
        "layers": len(errors),
        "codes": codes,
        "off by one": off,
        "share": off / codes,
        "median error": statistics.median(errors),
    }
    row["largest error"] = max(errors)
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
    row: dict[str, Any] = {}
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
    one.add_argument("--no-bfloat16", action="store_true", help="leave it out where the CPU has no such instructions")
    one.add_argument(
        "--openvino", action="store_true", help="with the OpenVINO engines too; converting takes minutes for large models"
    )
    one.add_argument("--onnx", action="store_true", help="with the exported ONNX file in ONNX Runtime")
    one.add_argument("--peers", nargs="*", choices=peers.PEERS, default=[], help="with other runtimes")
    one.add_argument("--set", nargs="*", default=[], dest="overrides", help="changes of the recipe, as of the command line")
    one.add_argument("--add", action="store_true", help="keep what the file holds of a model's other runtimes")
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
        result = {"speed": speed, "layers": layers, "memory": memory}[arguments.command](arguments)
    write(RESULTS / f"engine-{arguments.command}.json", result)


def write(file: Path, result: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

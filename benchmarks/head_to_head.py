"""Other tools on the reference models, by their public interfaces and recommended settings, beside ours: same noise, same prompts.

    python benchmarks/head_to_head.py --models glyph-sd --arms torchao-int8-dynamic diffquant-mse-w4a8
    python benchmarks/head_to_head.py                     # every arm on every model, those that are finished left out

Each tool is used in an environment of its own, which has this package's environment below it (benchmarks/README.md); what is not
installed in the present one is left for another run. A tool that cannot take a model is a row with its reason. Rows are in
results/compared.csv.
"""

import argparse
import copy
import gc
import hashlib
import inspect
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import measure
import rows
import torch
import yaml
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffquant as dq
from diffquant import zoo
from diffquant.calibration.rollout import Rollout
from diffquant.checkpoint.comfy_layout import marked_layers
from diffquant.engines.base import engine_of
from diffquant.host.conditions import Calibration
from diffquant.host.pipeline import Host
from diffquant.recipe import load_recipe

STUDY = Path(__file__).parent / "peers.yaml"
KEY = ("model", "tool", "setting", "samples")
NARROW = "linear layers whose width is no multiple of 32"
CONSOLE = Console(stderr=True)


class Own(BaseModel):
    """An arm of this package: a recipe, and what is changed in it; of all models or of some."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    recipe: str
    name: str = ""
    overrides: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


class Model(BaseModel):
    """How a model is sampled: its guidance, and changed options of its scheduler."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    guidance: float | None = None
    scheduler: dict[str, Any] = {}


class Peers(BaseModel):
    """What `peers.yaml` says: models, samples and steps of recording and comparison alike, the arms of this package."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    question: str
    models: dict[str, Model]
    samples: int
    steps: int
    seed: int
    own: tuple[Own, ...]


PEERS = Peers.model_validate(yaml.safe_load(STUDY.read_text(encoding="utf-8")))
STEPS = PEERS.steps


@dataclass(frozen=True)
class Context:
    """What an arm may use: calibration data, one call of the denoiser, where to keep files."""

    model: str
    data: dq.Trajectory
    call: dict[str, Any]
    work: Path


@dataclass(frozen=True)
class Outcome:
    """What an arm made of a pipeline: how it computes, in words, the bytes of its weights, and what it left alone."""

    runs: str
    bytes: int
    left: str = ""
    seconds: float | None = None  # of calibration, where an earlier run has done some of it


@dataclass(frozen=True)
class Arm:
    """One setting of one tool. `lines` are those that a user writes, imports included, from the pipeline to the quantized one."""

    tool: str
    package: str
    setting: str
    apply: Callable[[Any, Context], Outcome]
    models: tuple[str, ...] = ()  # empty: all

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.tool}-{self.setting}".replace(" ", "-")

    @property
    def lines(self) -> int:
        """Lines that end with ``# user`` in the function, and in the helper that it calls."""
        own = inspect.getsource(self.apply)
        helpers = (quanto, sdnq, nncf_quantized, nncf_compressed, modelopt, ours)
        sources = [own, *(inspect.getsource(each) for each in helpers if f"{each.__name__}(" in own)]
        return sum(line.rstrip().endswith("# user") or "# user:" in line for text in sources for line in text.splitlines())


ARMS: list[Arm] = []


Apply = Callable[[Any, Context], Outcome]


def arm(tool: str, package: str, setting: str, models: tuple[str, ...] = ()) -> Callable[[Apply], Apply]:
    """Register a function as an arm; its lines that a user would write end with ``# user``."""

    def register(apply: Apply) -> Apply:
        ARMS.append(Arm(tool, package, setting, apply, models))
        return apply

    return register


# ---- torchao


@arm("torchao", "torchao", "int8 weights")
def torchao_weights(pipe: Any, context: Context) -> Outcome:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # user

    denoiser = Host(pipe).denoiser
    quantize_(denoiser, Int8WeightOnlyConfig())  # user
    return Outcome("float32 on dequantized weights", stored(denoiser), convolutions_left(denoiser))


@arm("torchao", "torchao", "int8 dynamic")
def torchao_dynamic(pipe: Any, context: Context) -> Outcome:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_  # user

    denoiser = Host(pipe).denoiser
    quantize_(denoiser, Int8DynamicActivationInt8WeightConfig())  # user
    return Outcome("integers in linear layers, a scale for each row", stored(denoiser), convolutions_left(denoiser))


@arm("torchao", "torchao", "int8 static")
def torchao_static(pipe: Any, context: Context) -> Outcome:
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_  # user

    host, largest = Host(pipe), {}  # user: torchao has no observer of its own for this
    linear = {name: layer for name, layer in host.denoiser.named_modules() if isinstance(layer, nn.Linear)}

    def observe(name: str) -> Callable[..., None]:  # user
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # user
            (x,) = inputs
            before = largest.get(name, torch.zeros([1] * x.dim()))  # user
            largest[name] = torch.maximum(before, x.abs().amax().view([1] * x.dim()))  # user

        return hook  # user

    handles = [layer.register_forward_pre_hook(observe(name)) for name, layer in linear.items()]  # user
    with torch.no_grad():  # user
        host.run(Calibration(samples=16, steps=STEPS, batch_size=16), torch.Generator().manual_seed(0), range(16))  # user
    for handle in handles:  # user
        handle.remove()  # user
    for name, high in largest.items():  # user
        config = Int8StaticActivationInt8WeightConfig(high / 127, granularity=[PerTensor(), PerRow()])  # user
        quantize_(host.denoiser, config, filter_fn=lambda layer, path, name=name: path == name)  # user
    return Outcome("integers in linear layers, a scale for each input", stored(host.denoiser), convolutions_left(host.denoiser))


@arm("torchao", "torchao", "int4 weights by groups of 32")
def torchao_int4(pipe: Any, context: Context) -> Outcome:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_  # user
    from torchao.quantization.granularity import PerGroup  # user

    denoiser, left = Host(pipe).denoiser, []

    def fits(module: nn.Module, name: str) -> bool:
        if isinstance(module, nn.Linear) and module.in_features % 32:
            left.append(name)
        return isinstance(module, nn.Linear) and not module.in_features % 32

    quantize_(denoiser, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), filter_fn=fits)  # user
    return Outcome(
        "float32 on dequantized weights",
        stored(denoiser),
        f"convolutions; {len(left)} linear layers whose width is no multiple of 32",
    )


# ---- optimum-quanto


def quanto(pipe: Any, context: Context, weights: str, activations: str | None) -> Outcome:
    from optimum import quanto as tool  # user

    denoiser = Host(pipe).denoiser
    kinds = {"weights": getattr(tool, weights), **({} if activations is None else {"activations": getattr(tool, activations)})}
    tool.quantize(denoiser, **kinds)  # user
    if activations is not None:
        with tool.Calibration(), torch.no_grad():  # user
            for _ in range(4):
                Host(pipe).run(
                    Calibration(samples=8, steps=STEPS, batch_size=8), torch.Generator().manual_seed(0), range(8)
                )  # user
    tool.freeze(denoiser)  # user
    return Outcome("float32 on dequantized weights" if activations is None else "float32 on quantized values", stored(denoiser))


@arm("quanto", "optimum-quanto", "int8 weights")
def quanto_w8(pipe: Any, context: Context) -> Outcome:
    return quanto(pipe, context, "qint8", None)


@arm("quanto", "optimum-quanto", "int8 weights and activations")
def quanto_w8a8(pipe: Any, context: Context) -> Outcome:
    return quanto(pipe, context, "qint8", "qint8")


@arm("quanto", "optimum-quanto", "int4 weights")
def quanto_w4(pipe: Any, context: Context) -> Outcome:
    return quanto(pipe, context, "qint4", None)


# ---- SDNQ


def sdnq(pipe: Any, weights: str, **options: Any) -> Outcome:
    from sdnq import sdnq_post_load_quant  # user

    host = Host(pipe)
    setattr(pipe, host.name, sdnq_post_load_quant(host.denoiser, weights_dtype=weights, **options))  # user
    multiplied = options.get("use_quantized_matmul")
    return Outcome(
        "integers, a scale for each row" if multiplied else "float32 on dequantized weights", stored(Host(pipe).denoiser)
    )


@arm("sdnq", "sdnq", "int8 weights")
def sdnq_int8(pipe: Any, context: Context) -> Outcome:
    return sdnq(pipe, "int8", quant_conv=True)


@arm("sdnq", "sdnq", "int8 linear layers")
def sdnq_int8_matmul(pipe: Any, context: Context) -> Outcome:
    return sdnq(pipe, "int8", use_quantized_matmul=True)


@arm("sdnq", "sdnq", "int8 with convolutions")
def sdnq_int8_conv(pipe: Any, context: Context) -> Outcome:
    return sdnq(pipe, "int8", use_quantized_matmul=True, quant_conv=True, use_quantized_matmul_conv=True)


@arm("sdnq", "sdnq", "4-bit weights by groups")
def sdnq_int4(pipe: Any, context: Context) -> Outcome:
    return sdnq(pipe, "uint4", quant_conv=True)


# ---- NNCF, on OpenVINO's graph


def in_graph(pipe: Any, context: Context, change: Callable[[Any, list[tuple[Any, ...]]], Any], samples: int) -> int:
    """Let the denoiser compute with an OpenVINO graph that `change` made of its own; the bytes of the constants."""
    import openvino

    host, names = Host(pipe), list(context.call)
    tensors = tuple(torch.as_tensor(context.call[name]) for name in names)
    graph = openvino.convert_model(_Positional(host.denoiser, names), example_input=tensors)
    graph.reshape({index: [-1 if size == len(tensors[0]) else size for size in t.shape] for index, t in enumerate(tensors)})
    calls = [] if samples == 0 else _recorded(context, names, samples)
    graph = change(graph, calls)
    place = context.work / "graph.xml"
    openvino.save_model(graph, place, compress_to_fp16=False)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(graph, "CPU", settings)
    kind = inspect.signature(host.denoiser.forward)

    def forward(*arguments: Any, return_dict: bool = True, **keywords: Any) -> Any:
        given = kind.bind(*arguments, **keywords).arguments
        count = len(given[names[0]])
        inputs = [torch.as_tensor(given[name]).reshape(-1).expand(count) if name == "timestep" else given[name] for name in names]
        prediction = torch.from_numpy(compiled([tensor.detach().contiguous().numpy() for tensor in inputs])[0])
        return (prediction,) if not return_dict else _Output(prediction)

    host.denoiser.forward = forward  # type: ignore[method-assign]
    return place.with_suffix(".bin").stat().st_size


class _Output(tuple[Tensor]):
    def __new__(cls, sample: Tensor) -> Any:
        return super().__new__(cls, (sample,))

    @property
    def sample(self) -> Tensor:
        return self[0]


class _Positional(nn.Module):
    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        prediction: Tensor = self.model(**dict(zip(self.names, tensors, strict=True)), return_dict=False)[0]
        return prediction


def _recorded(context: Context, names: list[str], samples: int) -> list[tuple[Any, ...]]:
    """Calls of the recording, one sample each."""
    picked = context.data.subset(min(samples, len(context.data)), torch.Generator().manual_seed(0))
    calls = []
    for index in picked.split(1):
        arguments, _ = context.data.batch(index)
        calls.append(tuple(torch.as_tensor(arguments[name]).contiguous().numpy() for name in names))
    return calls


def nncf_quantized(pipe: Any, context: Context, samples: int) -> Outcome:
    import nncf  # user

    kind = nncf.ModelType.TRANSFORMER if context.model == "glyph-dit" else None

    def change(graph: Any, calls: list[tuple[Any, ...]]) -> Any:
        return nncf.quantize(graph, nncf.Dataset(calls), model_type=kind, subset_size=len(calls))  # user

    size = in_graph(pipe, context, change, samples)  # user: convert_model, compile_model and a forward that calls it: 6 lines
    return Outcome("integers (OpenVINO)", size)


@arm("nncf", "nncf", "quantize, defaults")
def nncf_default(pipe: Any, context: Context) -> Outcome:
    return nncf_quantized(pipe, context, 300)


def nncf_compressed(pipe: Any, context: Context, mode: str, **options: Any) -> Outcome:
    import nncf  # user

    def change(graph: Any, calls: list[tuple[Any, ...]]) -> Any:
        return nncf.compress_weights(graph, mode=getattr(nncf.CompressWeightsMode, mode), **options)  # user

    return Outcome("float32 on dequantized weights (OpenVINO)", in_graph(pipe, context, change, 0))


@arm("nncf", "nncf", "int8 weights")
def nncf_int8(pipe: Any, context: Context) -> Outcome:
    return nncf_compressed(pipe, context, "INT8_SYM")


@arm("nncf", "nncf", "int4 weights by groups of 16")
def nncf_int4(pipe: Any, context: Context) -> Outcome:
    return nncf_compressed(pipe, context, "INT4_SYM", group_size=16)


# ---- GGUF


def gguf(pipe: Any, kind: str) -> Outcome:
    """Weights as the gguf package rounds them, dequantized: diffusers reads such files for model families that these are not of."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    denoiser, left, size = Host(pipe).denoiser, 0, 0
    kept = {id(parameter) for module in denoiser.modules() if isinstance(module, nn.Linear) for parameter in [module.weight]}
    for parameter in denoiser.parameters():
        if id(parameter) in kept and not parameter.shape[1] % 32:
            blocks = quantize(parameter.detach().numpy(), GGMLQuantizationType[kind])
            parameter.data = torch.from_numpy(dequantize(blocks, GGMLQuantizationType[kind])).reshape(parameter.shape)
            size += blocks.nbytes
        else:
            left, size = left + (id(parameter) in kept), size + parameter.nbytes
    return Outcome(
        "float32 on dequantized weights (simulated)", size, f"convolutions; {left} linear layers whose width is no multiple of 32"
    )


@arm("gguf", "gguf", "Q8_0")
def gguf_q8(pipe: Any, context: Context) -> Outcome:
    return gguf(pipe, "Q8_0")


@arm("gguf", "gguf", "Q4_0")
def gguf_q4(pipe: Any, context: Context) -> Outcome:
    return gguf(pipe, "Q4_0")


# ---- ModelOpt, simulated


def modelopt(pipe: Any, context: Context, name: str) -> Outcome:
    import modelopt.torch.quantization as mtq  # user

    host = Host(pipe)

    def forward(model: nn.Module) -> None:  # user
        with torch.no_grad():
            host.run(Calibration(samples=16, steps=STEPS, batch_size=16), torch.Generator().manual_seed(0), range(16))  # user

    setattr(pipe, host.name, mtq.quantize(host.denoiser, getattr(mtq, name), forward))  # user
    size = sum(p.numel() for p in Host(pipe).denoiser.parameters())
    return Outcome("float32 on quantized values (simulated)", size)


@arm("modelopt", "nvidia-modelopt", "INT8")
def modelopt_int8(pipe: Any, context: Context) -> Outcome:
    return modelopt(pipe, context, "INT8_DEFAULT_CFG")


@arm("modelopt", "nvidia-modelopt", "INT8 SmoothQuant")
def modelopt_smooth(pipe: Any, context: Context) -> Outcome:
    return modelopt(pipe, context, "INT8_SMOOTHQUANT_CFG")


# ---- convert_to_quant, which learns rounding for files of ComfyUI


@arm("convert_to_quant", "convert-to-quant", "int8 linear weights, learned rounding")
def convert_to_quant(pipe: Any, context: Context) -> Outcome:
    """Its file, dequantized: ComfyUI would quantize every row of an input too. It also imports triton and prodigyplus."""
    denoiser, source, file = Host(pipe).denoiser, context.work / "float.safetensors", context.work / "learned.safetensors"
    save_file(denoiser.state_dict(), source)
    command = [str(Path(sys.executable).with_name("convert_to_quant")), "-i", str(source), "-o", str(file)]  # user
    settings = ["--comfy_quant", "--int8", "--scaling_mode", "row", "--device", "cpu", "--manual_seed", "0"]  # user
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    tensors = load_file(file)
    state = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith(("weight_scale", "comfy_quant"))}
    for name in marked_layers(tensors):
        state[f"{name}.weight"] *= tensors[f"{name}.weight_scale"].view(-1, 1)
    denoiser.load_state_dict(state)
    return Outcome("float32 on dequantized weights (simulated)", file.stat().st_size, convolutions_left(denoiser))


# ---- ours


def ours(pipe: Any, context: Context, recipe: str, overrides: tuple[str, ...]) -> Outcome:
    name = recipe if not overrides else f"{recipe}-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:8]}"
    report = dq.quantize(pipe, load_recipe(recipe, overrides), context.data, folder=context.work / "passes")  # user
    if not (context.work / name / "model_index.json").exists():
        dq.save(pipe, context.work / name)  # user
    loaded = dq.load(context.work / name)  # user
    denoiser = Host(loaded).denoiser
    setattr(pipe, Host(pipe).name, denoiser)
    rows = report.layers
    inputs = [row["spec"]["input"] for row in rows if row["spec"] and "input" in row["spec"]]
    left = [row["name"] for row in rows if row["spec"] is None and len(row["shape"]) >= 2]
    return Outcome(
        "integers" if inputs and engine_of(denoiser) == "int8" else "float32 on dequantized weights",
        measure.file_size(context.work / name),
        f"{len(left)} layers" if left else "",
        sum(each["seconds"] for each in report.passes),
    )


def _ours(one: Own) -> None:
    @arm("diffquant", "diffquant", one.name or one.recipe, one.models)
    def apply(pipe: Any, context: Context) -> Outcome:
        return ours(pipe, context, one.recipe, one.overrides)


for _own in PEERS.own:
    _ours(_own)


# ---- measuring


def stored(model: nn.Module) -> int:
    """Bytes of all tensors of a model, those inside of tensor subclasses included."""

    def size(tensor: Any) -> int:
        if hasattr(tensor, "__tensor_flatten__"):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return int(tensor.nbytes)

    return sum(size(tensor) for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())


def convolutions_left(model: nn.Module) -> str:
    """How many convolutions a tool that takes linear layers left alone."""
    count = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return f"{count} convolutions" if count else ""


def seconds_ratio(pipe: Any, full: Any, context: Context) -> float:
    """Time of a call of the denoiser over that of float32, medians of turns in this process."""
    models = [Host(each).denoiser for each in (pipe, full)]
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for turn in range(6):
            for model, taken in zip(models, times, strict=True):
                begun = time.perf_counter()
                model(**context.call)
                if turn:
                    taken.append(time.perf_counter() - begun)
    ours_, theirs = (sorted(taken)[len(taken) // 2] for taken in times)
    return ours_ / theirs


def single_step(pipe: Any, full: Any, context: Context) -> float:
    """Squared error of single steps from full-precision latents."""
    rollout = Rollout(Host(full).denoiser, context.data)
    return measure.squared_error(rollout, Host(pipe).denoiser, 1, 16)[0]


def measured(each: Arm, full: Any, reference: Any, context: Context, classifier: Any) -> rows.Row:
    """The row of an arm."""
    pipe = copy.deepcopy(full)
    begun = time.monotonic()
    outcome = each.apply(pipe, context)
    minutes = (time.monotonic() - begun if outcome.seconds is None else outcome.seconds) / 60
    comparison = measure.compare_to(reference, pipe, name=each.name)
    figures = measure.figures_of(comparison.measurement, reference.protocol.sampling.samples)
    columns = ("final_error", "final_error_low", "final_error_high", "fid", "fid_floor", "accuracy", "seconds_a_picture")
    row = {name: figures[name] for name in columns if name in figures}
    row |= {"single_step_error": single_step(pipe, full, context), "seconds_ratio": seconds_ratio(pipe, full, context)}
    engine = engine_of(Host(pipe).denoiser) if each.tool == "diffquant" else each.tool
    return row | {"runs": outcome.runs, "engine": engine, "bytes": outcome.bytes, "minutes": minutes, "left_in_float": outcome.left}


def run(models: list[str], names: list[str], file: Path, work: Path, samples: int) -> None:
    """Measure what `file` does not hold yet and the present environment has."""
    chosen = [each for each in ARMS if not names or each.name in names]
    for model in models:
        full, how = zoo.load(model), PEERS.models[model]
        if how.scheduler:
            full.scheduler = type(full.scheduler).from_config(full.scheduler.config, **how.scheduler)
        protocol = dq.SamplingProtocol(
            samples=samples, steps=STEPS, seed=PEERS.seed, guidance_scale=how.guidance, accumulation_samples=0
        )
        calibration = Calibration(samples=PEERS.samples, steps=STEPS, guidance_scale=how.guidance)
        data = dq.record(full, calibration, folder=work / model / "recording")
        call = {name: value for name, value in Host(full).example_call(STEPS)[0].items() if isinstance(value, Tensor)}
        call["timestep"] = torch.as_tensor(call["timestep"]).reshape(-1).expand(len(next(iter(call.values()))))
        context = Context(model, data, call, work / model)
        reference = measure.full_precision(full, protocol, work / model / "full-precision")
        size = stored(Host(full).denoiser)
        for each in chosen:
            if each.models and model not in each.models:
                continue
            key = {"model": model, "tool": each.tool, "setting": each.setting, "samples": samples}
            if any(all(str(row.get(name)) == str(key[name]) for name in KEY) for row in rows.read(file)):
                continue
            if not _installed(each.package):
                CONSOLE.print(f"{each.name}: {each.package} is not installed here")
                continue
            about = {
                "version": _version(each.package),
                "lines": each.lines,
                "float32_bytes": size,
                "threads": torch.get_num_threads(),
            }
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    row = measured(each, full, reference, context, None)
            except Exception as error:  # whatever a tool raises, the reader learns that it does not take the model
                row = {
                    "engine": each.tool,
                    "reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200],
                }
            rows.put(file, [key | about | row | rows.provenance()], KEY)
            CONSOLE.print(f"{model} {each.name}: {row.get('final_error', row.get('reason'))}")
            gc.collect()


def _installed(package: str) -> bool:
    modules = {"optimum-quanto": "optimum.quanto", "nvidia-modelopt": "modelopt", "convert-to-quant": "convert_to_quant"}
    try:
        return find_spec(modules.get(package, package)) is not None
    except ModuleNotFoundError:
        return False


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(PEERS.models), choices=list(PEERS.models))
    parser.add_argument("--arms", nargs="*", default=[], choices=[each.name for each in ARMS])
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "compared.csv")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/compared"))
    parser.add_argument("--samples", type=int, default=PEERS.samples)
    arguments = parser.parse_args()
    run(arguments.models, arguments.arms, arguments.out, arguments.work, arguments.samples)


if __name__ == "__main__":
    main()

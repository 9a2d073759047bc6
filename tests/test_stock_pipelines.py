"""record -> quantize -> save -> from_pretrained -> sample, on small stock pipelines of every supported kind."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, FirstBlockCacheConfig, FluxPipeline
from torch import nn

import diffquant as dq
from diffquant.core.layers import QUANTIZABLE, QuantizedConv2d, QuantizedLinear
from diffquant.engines.int8.engine import Int8
from diffquant.errors import CalibrationError
from diffquant.host.pipeline import Host
from tests import pipelines

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # schedulers of diffusers
PIPELINES = (
    "ddpm",
    "ddim",
    "ldm",
    "dit",
    "stable_diffusion",
    "stable_diffusion_2",
    "stable_diffusion_xl",
    "pixart",
    "stable_diffusion_3",
    "flux",
    "cogvideox",
)
RANGES = ("passes.0.samples=8", "passes.0.candidates=4")
LEARNED = (*RANGES, *(f"passes.{index}.{option}" for index in (1, 2) for option in ("samples=4", "iterations=1")))
RECIPES = {"dit": ("brecq-w4a8", LEARNED)}  # transformer blocks as units; residual ones are learned in other tests


@pytest.mark.parametrize("kind", PIPELINES)
def test_round_trip(kind, tmp_path):
    pipe = pipelines.build(kind, tmp_path)
    pipe.set_progress_bar_config(disable=True)
    calibration = dq.Calibration(samples=2, steps=2, batch_size=2)
    data = dq.record(pipe, calibration, progress=False)
    denoiser = Host(pipe).denoiser
    kinds = [of for of, kind in QUANTIZABLE.items() if kind.multiplies]
    layers = {layer for layer, module in denoiser.named_modules() if type(module) in kinds}
    heavy = {
        layer
        for layer, module in denoiser.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() > 1
    }
    report = dq.quantize(pipe, dq.load_recipe(*RECIPES.get(kind, ("mse-w4a8", RANGES))), data, progress=False)

    named = {row["name"]: row for row in report.layers}
    assert heavy <= named.keys()
    assert all(named[layer]["spec"] is not None for layer in layers)
    assert all(row["reason"] for row in report.layers)
    assert all(isinstance(denoiser.get_submodule(layer), QuantizedConv2d | QuantizedLinear) for layer in layers)

    before = _sample(pipe, calibration)
    dq.save(pipe, tmp_path / "packed")
    with dq.engine("simulate"):
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "packed")
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(_sample(loaded, calibration), before)
    dq.verify(tmp_path / "packed")
    if not Int8.unsupported():
        rows = dq.use_engine(loaded, "int8")
        assert {row.name for row in rows} == {row["name"] for row in report.layers if row["spec"] is not None}
        assert pipelines.not_integer(rows) == []
        assert np.isfinite(_sample(loaded, calibration)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_pipeline(dtype, tmp_path):
    """Frozen in float32 from its half weights; loaded in either dtype, its codes and steps are the same."""
    pipelines.stable_diffusion(tmp_path).save_pretrained(tmp_path / "float")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "float", dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    calibration = dq.Calibration(samples=2, steps=2, batch_size=2)
    data = dq.record(pipe, calibration, progress=False)
    weight = pipe.unet.conv_in.weight.detach().float()
    dq.quantize(pipe, dq.load_recipe("mse-w4a8", RANGES), data, progress=False)
    layer = pipe.unet.conv_in.weight_quantizer
    assert (layer.scale.dtype, data.step(torch.arange(2), 0).model_output.dtype) == (torch.float32, dtype)
    assert (layer.dequantized_codes() - weight).abs().max() <= weight.abs().max() / 127

    before = _sample(pipe, calibration)
    dq.save(pipe, tmp_path / "packed")
    for wanted in (dtype, torch.float32):
        with dq.engine("simulate"):
            loaded = DiffusionPipeline.from_pretrained(tmp_path / "packed", dtype=wanted)
        loaded.set_progress_bar_config(disable=True)
        after = _sample(loaded, calibration)
        state, original = loaded.unet.state_dict(), pipe.unet.state_dict()
        assert all(torch.equal(state[name], value) for name, value in original.items() if "quantizer" in name)
        assert np.array_equal(after, before) if wanted == dtype else np.isfinite(after).all()


def test_a_loaded_pipeline_is_offloaded(tmp_path):
    """By model and by module, to the CPU: a float pipeline's `enable_sequential_cpu_offload` fails there inside accelerate."""
    packed = dq.save(DDIMPipeline(pipelines.freeze_by_hand(pipelines.unet()), DDIMScheduler()), tmp_path / "packed")
    calibration = dq.Calibration(samples=2, steps=2)
    for offload in (
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: accelerate.cpu_offload(pipe.unet, torch.device("cpu")),
    ):
        pipe = DiffusionPipeline.from_pretrained(packed)
        pipe.set_progress_bar_config(disable=True)
        before = _sample(pipe, calibration)
        offload(pipe)
        assert np.array_equal(_sample(pipe, calibration), before)


def test_a_step_cache_is_for_the_quantized_model_only(tmp_path):
    """diffusers' caches answer a call with what earlier calls left: replayed calls, in any order, would be of no model."""
    pipe = pipelines.build("flux", tmp_path)
    pipe.set_progress_bar_config(disable=True)
    full = copy.deepcopy(pipe)
    calibration = dq.Calibration(samples=2, steps=4)
    data = dq.record(pipe, calibration, progress=False)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    message = r"FluxTransformer2DModel: its step cache is on, .* disable_cache\(\) first, enable_cache\(\) on the quantized model"
    with pytest.raises(CalibrationError, match=message):
        dq.record(pipe, calibration, progress=False)
    with pytest.raises(CalibrationError, match=message):
        dq.quantize(pipe, "minmax-w8a8", data, progress=False)
    pipe.transformer.disable_cache()
    dq.quantize(pipe, "minmax-w8a8", data, progress=False)
    before = _sample(pipe, calibration)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    assert not np.array_equal(_sample(pipe, calibration), before)
    protocol = dq.SamplingProtocol(samples=2, steps=4, accumulation_samples=2)
    figures = dq.evaluate(pipe, full, protocol=protocol).measurements[1].figures
    assert figures["final_error"].value > 0 and "accumulation" not in figures
    pipe.transformer.disable_cache()
    assert np.array_equal(_sample(pipe, calibration), before)
    assert "accumulation" in dq.evaluate(pipe, full, protocol=protocol).measurements[1].figures


COMPILED = """
import sys
import threading
from pathlib import Path

import torch
import diffquant as dq
from diffquant.core.model import quantizers
from tests import pipelines

pipe = pipelines.stable_diffusion(Path(sys.argv[1]))
pipe.set_progress_bar_config(disable=True)
calibration = dq.Calibration(samples=2, steps=2, batch_size=2)
options = ["passes.0.samples=8", "passes.0.candidates=4", "layers.0.sets=2", "layers.1.sets=2"]
dq.quantize(pipe, dq.load_recipe("mse-w4a8", options), dq.record(pipe, calibration, progress=False), progress=False)

def sample():
    return pipe("a letter", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images

given = []
handle = pipe.unet.register_forward_pre_hook(lambda module, *call: given.append(call), with_kwargs=True)
before = sample()
handle.remove()
(x, *_), options = given[0]
times = [arguments[1] for arguments, _ in given]
pipe.unet.compile(backend="eager", fullgraph=True)
assert (sample() == before).all()

for _, quantizer in quantizers(pipe.unet):
    if quantizer.rows == 2:
        quantizer.scale.mul_(torch.tensor([1.0, 3.0])[:, None])

def called(timestep):
    with torch.no_grad():
        return pipe.unet(x, timestep, **options)[0]

alone = [called(timestep) for timestep in times]
assert not torch.equal(*alone)
wrong = []

def calls(timestep, expected):
    wrong.extend(1 for _ in range(10) if not torch.equal(called(timestep), expected))

sys.setswitchinterval(1e-5)
threads = [threading.Thread(target=calls, args=pair) for pair in zip(times, alone)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert not wrong, len(wrong)
"""


def test_the_simulation_compiles_as_one_graph(tmp_path):
    """With a parameter set for each timestep, two of which are sampled at, also by threads; no code is generated.

    In a process of its own: the shape checks of these tests cannot be compiled.
    """
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    subprocess.run([sys.executable, "-c", COMPILED, str(tmp_path)], env=environment, check=True, timeout=240)


def _sample(pipe, calibration: dq.Calibration) -> np.ndarray:
    if isinstance(pipe, FluxPipeline):
        pipelines.small(pipe)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        result = Host(pipe).run(calibration, torch.Generator().manual_seed(0), range(2))
    return torch.as_tensor(result[0]).float().numpy()

"""record -> quantize -> save -> from_pretrained -> sample, on small stock pipelines of every supported kind."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import diffquant as dq
from diffquant.calibration.observe import find_denoiser, run_pipeline
from diffquant.core.layers import QUANTIZABLE, QuantizedConv2d, QuantizedLinear
from tests import pipelines

BUILDERS = {
    "ddpm": lambda folder: pipelines.ddpm(),
    "ddim": lambda folder: pipelines.ddim(),
    "ldm": lambda folder: pipelines.ldm(),
    "dit": lambda folder: pipelines.dit(),
    "stable-diffusion": lambda folder: pipelines.stable_diffusion(folder),
}
RANGES = ("passes.0.samples=8", "passes.0.candidates=4")
LEARNED = (*RANGES, *(f"passes.{index}.{option}" for index in (1, 2) for option in ("samples=4", "iterations=1")))
RECIPES = {"dit": ("brecq-w4a8", LEARNED)}  # transformer blocks as units; residual ones are learned in other tests


@pytest.mark.parametrize("kind", BUILDERS)
def test_round_trip(kind, tmp_path):
    pipe = BUILDERS[kind](tmp_path)
    pipe.set_progress_bar_config(disable=True)
    calibration = dq.Calibration(samples=2, steps=2, batch_size=2)
    data = dq.record(pipe, calibration, progress=False)
    _, denoiser = find_denoiser(pipe)
    layers = {layer for layer, module in denoiser.named_modules() if type(module) in QUANTIZABLE}
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


def _sample(pipe, calibration: dq.Calibration) -> np.ndarray:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = run_pipeline(pipe, calibration, torch.Generator().manual_seed(0), range(2))
    return np.asarray(result.images if hasattr(result, "images") else result[0])

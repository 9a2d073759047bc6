"""Checkpoints that earlier versions wrote load with equal integers and scales, and compute the same (`checkpoints/make.py`)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffquant as dq
from diffquant.core.model import quantized_layers, quantizers

FOLDER = Path(__file__).parents[1] / "checkpoints"
BUFFERS = ("codes", "scale", "zero_point", "table", "shift")


@pytest.mark.parametrize("name", ["static", "sets", "shifts", "correction"])
@pytest.mark.parametrize("version", ["v0.1.0"])
def test_a_checkpoint_of_an_earlier_version(version: str, name: str) -> None:
    folder = FOLDER / version / name
    expected = load_file(folder / "expected.safetensors")
    x, timesteps, output = (expected.pop(f"given.{each}") for each in ("x", "timesteps", "output"))
    dq.verify(folder)
    pipe = dq.load(folder, engine="simulate")
    found = {}
    for quantizer_name, quantizer in quantizers(pipe.unet):
        values = {buffer: getattr(quantizer, buffer, None) for buffer in BUFFERS}
        found |= {f"{quantizer_name}.{buffer}": value for buffer, value in values.items() if value is not None}
    found |= {f"{layer_name}.smooth": layer.smooth for layer_name, layer in quantized_layers(pipe.unet) if layer.smooth is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[key].to(value.dtype)) for key, value in expected.items())
    assert (pipe.unet.diffquant.correction is not None) == (name == "correction")
    with torch.no_grad():
        again = pipe.unet(x, timesteps).sample
    assert (again - output).norm() <= 1e-5 * output.norm()  # sums of floats in another order

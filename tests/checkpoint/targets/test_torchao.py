"""Folders with torchao's tensors, loaded by diffusers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DiTPipeline

import diffquant as dq
import pipelines
from diffquant.checkpoint.targets import torchao
from diffquant.core.model import quantized_layers, quantizers
from diffquant.core.spec import LayerRule
from diffquant.errors import CheckpointError

IN_FLOAT = [
    LayerRule(match="@conv", input_bits="float"),
    LayerRule(match="@attention", input_bits="float", softmax_bits="float"),
]
LOADING = """
import sys, numpy, torch
from diffusers import DiTPipeline
pipe = DiTPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
images = pipe([1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
assert "diffquant" not in sys.modules
numpy.save(sys.argv[2], images)
"""


@pytest.fixture
def package() -> Any:
    return pytest.importorskip("torchao", reason="needs the package torchao")


def quantized(*rules: LayerRule, weight_bits: int = 4, sets: int = 1) -> DiTPipeline:
    """A transformer with all layers quantized, as `rules` say."""
    pipe = pipelines.dit()
    pipelines.freeze_by_hand(pipe.transformer, weight_bits, sets, rules)
    return pipe


def test_diffusers_alone_draws_the_pictures_of_the_simulation(package: Any, tmp_path: Path) -> None:
    """Four bits: with eight the test would have to know whether the processor adds in 16 bits."""
    pipe = quantized(LayerRule(match="@all", smooth=True), *IN_FLOAT)
    smooth = torch.Generator().manual_seed(0)
    for _, layer in quantized_layers(pipe.transformer):
        layer.smooth = torch.rand(layer.input_channels, generator=smooth) + 0.5
    report = dq.export(pipe, tmp_path / "ao", to="torchao")
    assert report.dropped == [] and report.error < 1e-5  # 5e-7
    assert json.loads((tmp_path / "ao" / "export.json").read_text()) == report.model_dump()
    assert set(report.layers.values()) == {torchao.STATIC, torchao.FLOAT}
    command = [sys.executable, "-c", LOADING, str(tmp_path / "ao"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pipe.set_progress_bar_config(disable=True)
    ours = pipe([1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert np.abs(np.load(tmp_path / "images.npy") - ours).max() < 1e-3  # a code on an edge may change others


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_of_inputs_and_weights_are_held(package: Any, tmp_path: Path, symmetric: bool) -> None:
    pipe = quantized(LayerRule(match="@all", input_symmetric=symmetric, weight_symmetric=symmetric), *IN_FLOAT)
    for name, quantizer in quantizers(pipe.transformer):
        if not symmetric:
            quantizer.zero_point.fill_(9 if name.endswith("weight_quantizer") else 100)
    assert dq.export(pipe, tmp_path / "ao", to="torchao").error < 1e-5  # 5e-7


def test_a_unet(package: Any, tmp_path: Path) -> None:
    """No tensor of torchao holds a convolution: its weight is dequantized, its input is not quantized."""
    pipe = DDIMPipeline(pipelines.freeze_by_hand(pipelines.micro().unet), pipelines.micro().scheduler)
    before = {name: quantizer.enabled for name, quantizer in quantizers(pipe.unet)}
    report = dq.export(pipe, tmp_path / "ao", to="torchao", lossy=True)
    assert {report.layers[name] for name, layer in quantized_layers(pipe.unet) if isinstance(layer, torch.nn.Conv2d)} == {
        torchao.FLOAT
    }
    assert 1e-3 < report.error < 0.5  # 0.06: what the inputs of convolutions and attentions add
    assert {name: quantizer.enabled for name, quantizer in quantizers(pipe.unet)} == before
    assert not any(layer.weight_was_read for _, layer in quantized_layers(pipe.unet))


def test_what_is_lost_is_refused_or_listed(package: Any, tmp_path: Path) -> None:
    pipe = quantized(sets=3)
    lost = (
        "inputs of convolutions (1: pos_embed.proj)",
        "parameter sets of inputs, quantized to 8 bits per row instead (20: transformer_blocks.0.norm1.emb.timestep_embedder."
        "linear_1, ...)",
        "operands of attention products (2: transformer_blocks.0.attn1, ...)",
    )
    with pytest.raises(CheckpointError) as error:
        dq.export(pipe, tmp_path / "ao", to="torchao")
    assert str(error.value) == f"export: torchao cannot hold {'; '.join(lost)}; --lossy drops that and states the error"
    assert list(tmp_path.iterdir()) == []
    report = dq.export(pipe, tmp_path / "ao", to="torchao", lossy=True)
    assert report.dropped == list(lost) and 0 < report.error < 0.5
    assert [line for line in report.lines() if line.startswith("dropped")] == [f"dropped: {each}" for each in lost]
    assert type(pipe.transformer).__name__ == "DiTTransformer2DModel" and dq.save(pipe, tmp_path / "still-quantized").is_dir()


@pytest.mark.parametrize(
    ("rule", "how", "loss"),
    [
        (LayerRule(match="@all", input_bits="float"), torchao.WEIGHT, ""),
        (LayerRule(match="@all", input_bits=6), torchao.DYNAMIC, "inputs of fewer than 8 bits"),
        (LayerRule(match="@all", weight_bits="float"), torchao.FLOAT, "inputs of layers whose weight is not int8"),
        (
            LayerRule(match="@all", weight_symmetric=False, weight_bits=8),
            torchao.FLOAT,
            "inputs of layers whose weight is not int8",
        ),
        (LayerRule(match="@all"), torchao.STATIC, ""),
        (LayerRule(match="@all", input_scale="dynamic-row", input_symmetric=True), torchao.DYNAMIC, ""),
        (
            LayerRule(match="@all", input_scale="dynamic-row", input_symmetric=False),
            torchao.DYNAMIC,
            "zero points of inputs with a scale for each row",
        ),
        (LayerRule(match="@all", input_scale="dynamic-sample"), torchao.DYNAMIC, "inputs with a scale for each sample"),
    ],
)
def test_how_a_linear_layer_is_written(rule: LayerRule, how: str, loss: str) -> None:
    (layer, *_) = [layer for name, layer in quantized_layers(quantized(rule).transformer) if name.endswith("to_q")]
    if layer.weight_quantizer is not None and not layer.weight_quantizer.spec.symmetric:
        layer.weight_quantizer.codes[0, 0] = 255  # 255 above the zero point
    held = torchao.held_as(layer, {3})
    assert (held.how, held.loss) == (how, loss)
    assert torchao.held_as(layer, {2, 3}).how == (torchao.DYNAMIC if how == torchao.STATIC else how)


def shifted(layer: Any) -> None:
    layer.input_quantizer.shift = torch.ones(1, layer.input_channels, dtype=torch.int8)


def split(layer: Any) -> None:
    layer.weight_quantizer.splits = layer.input_quantizer.splits = (8, 8)


@pytest.mark.parametrize(
    ("change", "how", "loss"),
    [(shifted, torchao.DYNAMIC, "shifts of input channels"), (split, torchao.FLOAT, "inputs with splits")],
)
def test_what_int8_tensors_have_no_place_for(change: Callable[[Any], None], how: str, loss: str) -> None:
    (layer, *_) = [layer for name, layer in quantized_layers(quantized().transformer) if name.endswith("to_q")]
    change(layer)
    held = torchao.held_as(layer, {3})
    assert (held.how, held.loss) == (how, loss)


def test_another_weight_is_refused(package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torchao._tensor

    def altered(*arguments: Any) -> Any:
        made = tensor(*arguments)
        made.qdata[0, 0] ^= 1
        return made

    monkeypatch.setattr(torchao, "_tensor", altered)
    with pytest.raises(CheckpointError, match="linear_1': diffusers loads another weight than was written; nothing was written"):
        dq.export(quantized(*IN_FLOAT), tmp_path / "ao", to="torchao")
    assert list(tmp_path.iterdir()) == []


def test_another_output_is_refused_also_where_something_was_dropped(
    package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torchao._tensor

    def altered(*arguments: Any) -> Any:
        made = tensor(*arguments)
        made.act_quant_scale = made.act_quant_scale * 4
        return made

    monkeypatch.setattr(torchao, "_tensor", altered)
    with pytest.raises(
        CheckpointError, match="output differs from the simulation's by .*, where rounding explains .*; nothing was"
    ):
        dq.export(quantized(), tmp_path / "ao", to="torchao", lossy=True)


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(CheckpointError) as error:
        dq.export(quantized(), tmp_path / "ao", to="torchao")
    assert str(error.value) == "torchao: the package torchao is missing; pip install 'diffquant[torchao]'"

"""Exports for ComfyUI of whole small pipelines, read by comfy-kitchen."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffquant as dq
import pipelines
from diffquant.checkpoint.comfy_layout import float_tensors
from diffquant.checkpoint.original_names import original_names
from diffquant.checkpoint.targets import comfyui
from diffquant.checkpoint.targets.base import relative_error, target
from diffquant.core.correction import NoiseEstimate
from diffquant.core.model import ensured_state, quantized_layers
from diffquant.core.spec import LayerRule
from diffquant.core.watch import watching
from diffquant.errors import CheckpointError
from diffquant.host.pipeline import Host

FLOAT_INPUT = LayerRule(match="@all", input_bits="float")
FLOAT_PRODUCTS = LayerRule(match="@attention", input_bits="float", softmax_bits="float")


def stable_diffusion(folder: Path, rules: Sequence[LayerRule] = (), **options: Any) -> Any:
    pipe = pipelines.stable_diffusion(folder / "tokenizer")
    pipelines.freeze_by_hand(pipe.unet, rules=rules, **options)
    return pipe


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen.tensor", None)
    with pytest.raises(CheckpointError, match=r"ComfyUI: the package comfy-kitchen is missing; pip install 'diffquant\[comfyui\]'"):
        dq.export(pipelines.micro(), tmp_path / "out", to="comfyui")


@pytest.fixture
def kitchen() -> None:
    pytest.importorskip("comfy_kitchen", reason="needs the package comfy-kitchen")


@pytest.mark.usefixtures("kitchen")
def test_what_the_layout_cannot_hold_is_refused_or_dropped(tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path, sets=2)
    ensured_state(pipe.unet).correction = NoiseEstimate()
    with pytest.raises(CheckpointError) as refused:
        dq.export(pipe, tmp_path / "out", to="comfyui")
    assert not (tmp_path / "out").exists()
    for kind in (
        r"export: comfyui cannot hold calibrated scales of inputs, which ComfyUI scales row by row (time_embedding.linear_1, ",
        "quantized inputs of layers that compute in floating point there (conv_in, ",
        "quantized attention products (down_blocks.1.attentions.0.transformer_blocks.0.attn1, ",
        "parameter sets (",
        "a correction while sampling (noise-estimate); --lossy drops that and states the error",
    ):
        assert kind in str(refused.value)
    enabled = {name: layer.input_quantizer.enabled for name, layer in quantized_layers(pipe.unet)}
    report: Any = dq.export(pipe, tmp_path / "out", to="comfyui", lossy=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {report.file, "export.json"}
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == report.model_dump()
    assert len(report.dropped) == 5 and report.int8 == 50 and set(report.floating.values()) == {"convolution"}
    assert 1e-4 < report.error < 0.3  # 0.046: activations of the simulation, whose steps are set by hand, are coarse
    assert any(line.startswith("dequantized in the file (convolution): conv_in, ") for line in report.lines())
    assert all(enabled.values()) and all(layer.input_quantizer.enabled for _, layer in quantized_layers(pipe.unet))
    assert not any(layer._forward_pre_hooks for _, layer in quantized_layers(pipe.unet))


@pytest.mark.usefixtures("kitchen")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_weights_alone_are_held_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    pipe = pipelines.stable_diffusion(tmp_path / "tokenizer").to(dtype)
    pipelines.freeze_by_hand(pipe.unet, rules=[FLOAT_INPUT, FLOAT_PRODUCTS])
    report: Any = dq.export(pipe, tmp_path / "out", to="comfyui")
    assert report.dropped == [] and report.error == 0
    tensors = load_file(tmp_path / "out" / report.file)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
    layer: Any = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    weight = comfyui.kitchen_weight(tensors, name, torch.float32)
    assert torch.equal(weight.dequantize(), layer.weight_quantizer.dequantized_codes())
    assert tensors["model.diffusion_model.input_blocks.0.0.weight"].dtype == dtype


@pytest.mark.usefixtures("kitchen")
def test_the_error_is_that_of_a_float_model_with_the_tensors_of_comfy_kitchen(tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path, weight_bits=8)
    report: Any = dq.export(pipe, tmp_path / "out", to="comfyui", lossy=True)
    tensors = load_file(tmp_path / "out" / report.file)
    origins = original_names(pipe.unet, {name: source.rows for name, source in float_tensors(pipe.unet).items()})
    ours = {parts[0].name: original for original, parts in origins.items()}  # nothing is fused in a UNet
    twin: Any = UNet2DConditionModel.from_config(pipe.unet.config).eval().requires_grad_(False)
    for name, parameter in list(twin.named_parameters()):
        module, original = twin.get_submodule(name.rpartition(".")[0]), ours[name]
        if original.removesuffix("weight") + "comfy_quant" in tensors:
            weight = comfyui.kitchen_weight(tensors, original.removesuffix(".weight"), torch.float32)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
        else:
            parameter.copy_(tensors[original])
    arguments, expected = Host(pipe).example_call(steps=1)
    arguments = {name: value for name, value in arguments.items() if name != "return_dict"}
    layers = {name: layer for name, layer in quantized_layers(pipe.unet) if isinstance(layer, torch.nn.Linear)}
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = {
        twin.get_submodule(name): lambda _, inputs, output, name=name: calls.update({name: (inputs[0], output)}) for name in layers
    }
    with watching(hooks):
        output = twin(**arguments).sample
    with comfyui.as_comfyui(pipe.unet, list(layers)):
        errors = [relative_error(layers[name](x), theirs) for name, (x, theirs) in calls.items()]
    assert len(errors) == 50 and max(errors) < 1e-6  # 2e-7: sums in another order; 1e-2 with inputs in floating point
    assert abs(relative_error(output, expected) - report.error) < 0.05 * report.error  # two codes are on an edge


@pytest.mark.usefixtures("kitchen")
def test_flux_and_its_fused_layers(tmp_path: Path) -> None:
    pipe = pipelines.flux(tmp_path / "tokenizer")
    pipelines.freeze_by_hand(pipe.transformer, weight_bits=8)
    report: Any = dq.export(pipe, tmp_path / "out", to="comfyui", lossy=True)
    assert report.floating == {} and report.int8 == 30
    tensors = load_file(tmp_path / "out" / report.file)
    x, name = torch.randn(3, 16), "double_blocks.0.img_attn.qkv"
    product = torch.nn.functional.linear(x, comfyui.kitchen_weight(tensors, name, torch.float32))  # by int8_linear
    attention = pipe.transformer.transformer_blocks[0].attn
    parts = [layer.weight_quantizer.dequantized_codes() for layer in (attention.to_q, attention.to_k, attention.to_v)]
    scale = x.abs().amax(1, keepdim=True) / 127
    expected = ((x / scale).round() * scale) @ torch.cat(parts).T
    assert float((product - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.usefixtures("kitchen")
@pytest.mark.parametrize("which", ["weight", "weight_scale", "bias"])
def test_a_file_that_does_not_reproduce_the_model_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    name = f"model.diffusion_model.time_embed.2.{which}"

    def save_altered(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        altered = tensors[name].clone()
        altered[0] += 1
        save_file(tensors | {name: altered}, file, metadata)

    monkeypatch.setattr(comfyui, "save_file", save_altered)
    tensor = name.replace("_scale", "")
    with pytest.raises(CheckpointError, match=f"'{tensor}' was not reproduced by the written file; nothing was written"):
        dq.export(stable_diffusion(tmp_path), tmp_path / "out", to="comfyui", lossy=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("kitchen")
def test_models_that_are_none_for_the_layout(tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path, rules=[LayerRule(match="@all", weight_symmetric=False)], weight_bits=8)
    for _, layer in quantized_layers(pipe.unet):
        layer.weight_quantizer.codes.flatten()[0] = 255
    why = "no weight is one for ComfyUI's int8 layout .asymmetric codes of 8 bits; convolution.; it takes linear layers"
    with pytest.raises(CheckpointError, match=why):
        dq.export(pipe, tmp_path / "out", to="comfyui", lossy=True)
    pipe = pipelines.dit()
    pipelines.freeze_by_hand(pipe.transformer)
    with pytest.raises(CheckpointError, match="DiTTransformer2DModel: the original names of its tensors are not known"):
        dq.export(pipe, tmp_path / "out", to="comfyui", lossy=True)
    assert target("comfyui").name == "comfyui"

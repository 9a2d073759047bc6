"""Symmetric ONNX files, run in ONNX Runtime. TensorRT itself is not here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline

import diffquant as dq
import pipelines
from diffquant.checkpoint.targets import tensorrt
from diffquant.checkpoint.targets.onnx import Onnx, load_file
from diffquant.cli import quantizing
from diffquant.core.model import activation_quantizers, quantized_layers, quantizers
from diffquant.core.spec import LayerRule
from diffquant.errors import CheckpointError, SpecError
from diffquant.host.pipeline import Host

onnx = pytest.importorskip("onnx")
SYMMETRIC = [LayerRule(match="@all", input_symmetric=True), LayerRule(match="@attention", input_symmetric=True, softmax_bits=7)]


def quantized(*rules: LayerRule, sets: int = 1, conditional: int | None = None) -> DDIMPipeline:
    pipe = pipelines.micro()
    pipelines.freeze_by_hand(pipe.unet, sets=sets, rules=rules, conditional=conditional)
    return pipe


def values(pipe: DDIMPipeline) -> dict[str, Any]:
    """What the quantizers hold."""
    tensors = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    return tensors | {name: quantizer.spec for name, quantizer in quantizers(pipe.unet)}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(each, theirs[name]) if isinstance(each, torch.Tensor) else each == theirs[name] for name, each in ours.items()
    )


def constants(file: Path, kind: str) -> list[Any]:
    """The zero points of the nodes of a kind in a file."""
    graph = onnx.load(file).graph
    named = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    return [named[node.input[2]] for node in graph.node if node.op_type == kind]


def test_a_symmetric_model_is_written_without_loss_and_takes_any_batch(tmp_path: Path) -> None:
    pipe = quantized(*SYMMETRIC)
    report = dq.export(pipe, tmp_path / "trt", to="tensorrt")
    assert {path.name for path in (tmp_path / "trt").iterdir()} == {"model.onnx", "export.json"}
    assert report.dropped == [] and report.error <= report.allowed and report.files == {}
    zeros = [zero for kind in ("QuantizeLinear", "DequantizeLinear") for zero in constants(tmp_path / "trt" / "model.onnx", kind)]
    assert len(zeros) == report.quantizers > 20 and all(zero.dtype == "int8" and not zero.any() for zero in zeros)
    channels = [zero for zero in constants(tmp_path / "trt" / "model.onnx", "DequantizeLinear") if zero.ndim == 1]
    assert len(channels) == len(list(quantized_layers(pipe.unet)))  # weights, with a scale for each output channel
    arguments = {"sample": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), "timestep": torch.tensor(900)}
    output = Onnx().run(load_file(tmp_path / "trt" / "model.onnx"), pipe.unet, arguments)[0]
    with torch.no_grad():
        expected = pipe.unet(**arguments).sample
    assert (output - expected).norm() / expected.norm() <= report.allowed


def test_zero_points_are_refused_or_become_larger_scales(tmp_path: Path) -> None:
    pipe = quantized()
    before = values(pipe)
    with pytest.raises(CheckpointError) as error:
        dq.export(pipe, tmp_path / "trt", to="tensorrt")
    assert str(error.value) == (
        "export: tensorrt cannot hold zero points of inputs, which become int8 with a scale that covers the range "
        "(1: down_blocks.0.attentions.0.attention_products.softmax); quantize with --set layers.N.input_symmetric=true for every "
        "rule N that has input_bits, and softmax_bits of 7 or fewer (or float); --lossy drops that and states the error"
    )
    for _, quantizer in quantizers(pipe.unet):
        if not quantizer.spec.symmetric:
            quantizer.zero_point.fill_(100)
    before = values(pipe)
    report = dq.export(pipe, tmp_path / "trt", to="tensorrt", lossy=True)
    inputs = activation_quantizers(pipe.unet)
    assert report.dropped == [
        f"zero points of inputs, which become int8 with a scale that covers the range ({len(inputs)}: {next(iter(inputs))}, ...)"
    ]
    with tensorrt._symmetric(pipe.unet, 0):
        scales = {float(inputs[name].scale) for name in inputs if not name.endswith("softmax")}
    assert scales == {float(torch.tensor(0.02) * 155 / 127)}  # codes up to 155 above the zero point
    assert 1e-3 < report.error < 0.5 and same(before, values(pipe))


def test_the_command_says_what_was_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dq.save(quantized(), tmp_path / "packed")
    quantizing.export(str(tmp_path / "packed"), tmp_path / "trt", "tensorrt", lossy=True)
    first, held, dropped = capsys.readouterr().out.splitlines()
    assert "trt/model.onnx: differs from the simulation by" in first and held.startswith("files: 1, with ")
    assert dropped.startswith("dropped: zero points of inputs, which become int8")


def test_parameter_sets_become_files(tmp_path: Path) -> None:
    """Sets with zero points of their own, which one graph cannot have."""
    pipe = quantized(*SYMMETRIC, LayerRule(match="conv_in", input_symmetric=False, input_bits=6), sets=2)
    pipe.unet.conv_in.input_quantizer.zero_point.copy_(torch.tensor([[32.0], [20.0]]))
    before = values(pipe)
    report = dq.export(pipe, tmp_path / "trt", to="tensorrt")
    assert same(before, values(pipe)) and report.dropped == [] and report.error <= report.allowed < 0.2
    files = json.loads((tmp_path / "trt" / "timesteps.json").read_text())
    assert files == report.files == {"model-000.onnx": [900.0, 500.0], "model-001.onnx": [100.0]}
    assert {path.name for path in (tmp_path / "trt").iterdir()} == {*files, "timesteps.json", "export.json"}
    arguments, _ = Host(pipe).example_call(steps=1)
    outputs = []
    for file, timesteps in files.items():
        call = {**arguments, "timestep": torch.tensor(int(timesteps[-1]))}
        outputs.append(Onnx().run(load_file(tmp_path / "trt" / file), pipe.unet, call)[0])
        with torch.no_grad():
            expected = pipe.unet(**call).sample
        assert (outputs[-1] - expected).norm() / expected.norm() <= 0.05
    call = {**arguments, "timestep": torch.tensor(100)}
    other = Onnx().run(load_file(tmp_path / "trt" / "model-000.onnx"), pipe.unet, call)[0]
    assert not torch.equal(other, outputs[1])


def test_weights_beside_float_inputs_are_stored_in_float(tmp_path: Path) -> None:
    pipe = quantized(*SYMMETRIC, LayerRule(match="@conv", input_bits="float"))
    dq.export(pipe, tmp_path / "trt", to="tensorrt")
    graph = onnx.load(tmp_path / "trt" / "model.onnx").graph
    integers = {each.name for each in graph.initializer if each.data_type == onnx.TensorProto.INT8}
    assert integers and not [node.name for node in graph.node if node.op_type == "Cast" and node.input[0] in integers]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="export: no input is quantized, so that the file would hold no quantizer; nothing"):
        dq.export(
            quantized(
                LayerRule(match="@all", input_bits="float"), LayerRule(match="@attention", input_bits="float", softmax_bits="float")
            ),
            tmp_path / "trt",
            to="tensorrt",
        )
    with pytest.raises(SpecError, match="UNet2DModel: has parameter sets for each half of a guided call .*; quantize without"):
        dq.export(quantized(LayerRule(match="@all", guidance_sets=True), conditional=1), tmp_path / "trt", to="tensorrt")
    asymmetric = quantized(LayerRule(match="@attention", input_bits="float", softmax_bits="float"))
    for _, quantizer in quantizers(asymmetric.unet):
        if not quantizer.spec.symmetric:
            quantizer.zero_point.fill_(100)
    dq.export(asymmetric, tmp_path / "onnx", to="onnx", form="single")
    with pytest.raises(CheckpointError, match="export: node '/.*Linear' has a zero point that is not an int8 0; nothing was"):
        tensorrt._check_quantizers(tmp_path / "onnx" / "model.onnx")
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    for each in model.graph.initializer:  # int8 zero points too
        if each.data_type == onnx.TensorProto.UINT8:
            each.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(each).astype("int8"), each.name))
    onnx.save_model(model, tmp_path / "onnx" / "model.onnx")
    with pytest.raises(CheckpointError, match="zero point that is not an int8 0"):
        tensorrt._check_quantizers(tmp_path / "onnx" / "model.onnx")

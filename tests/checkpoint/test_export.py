"""Exports of whole small pipelines, each run after it was written."""

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn

import diffquant as dq
import pipelines
from diffquant.checkpoint.targets.base import target
from diffquant.cli import quantizing
from diffquant.core.model import quantized_layers
from diffquant.core.spec import LayerRule
from diffquant.engines.int8.engine import Int8
from diffquant.engines.openvino import OpenVino
from diffquant.errors import CheckpointError

pytest.importorskip("openvino")
pytest.importorskip("onnx")
FILES = {"openvino": {"openvino_model.xml", "openvino_model.bin"}, "onnx": {"model.onnx"}}
on_each_target = pytest.mark.parametrize("to", FILES)


@pytest.fixture
def pipe() -> DDIMPipeline:
    symmetric = LayerRule(match="@attention", input_symmetric=True)
    return DDIMPipeline(pipelines.freeze_by_hand(pipelines.micro().unet, rules=[symmetric]), DDIMScheduler())


@on_each_target
def test_an_export_is_run_and_described(pipe: DDIMPipeline, tmp_path: Path, to: str) -> None:
    dq.save(pipe, tmp_path / "packed")
    report = dq.export(tmp_path / "packed", tmp_path / "ir", to)
    assert {path.name for path in (tmp_path / "ir").iterdir()} == FILES[to] | {"export.json"}
    assert json.loads((tmp_path / "ir" / "export.json").read_text()) == report.model_dump()
    assert report.target == to and report.form == "exact" and report.error <= report.allowed < 0.1
    assert report.integer >= 11 and report.pair <= 32767 and not report.symmetric
    in_float = {name for name, layer in quantized_layers(pipe.unet) if to == "onnx" and isinstance(layer, nn.Conv2d)}
    if to == "openvino":  # softmax and values of 8 bits, whose products may saturate
        in_float.add("down_blocks.0.attentions.0")
    assert set(report.floating_layers) == in_float and report.floating == len(in_float) + (to == "openvino")
    assert {path.name for path in tmp_path.iterdir()} == {"packed", "ir"}
    with pytest.raises(CheckpointError, match="ir: exists; an export makes a new folder"):
        dq.export(pipe, tmp_path / "ir")


@on_each_target
def test_a_file_that_computes_something_else_is_not_kept(
    pipe: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    kind: Any = type(target(to))
    run = kind.run
    monkeypatch.setattr(kind, "run", lambda *arguments: tuple(-output for output in run(*arguments)))
    with pytest.raises(
        CheckpointError, match="differs from the simulation's by 2, where rounding explains 0.*; nothing was written"
    ):
        dq.export(pipe, tmp_path / "ir", to)
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="export: target 'cloud'; allowed are comfyui, gguf, onnx, .*torchao"):
        dq.export(pipelines.ddim(), tmp_path / "ir", to="cloud")
    with pytest.raises(CheckpointError, match="DDIMPipeline: holds no quantized model"):
        dq.export(pipelines.ddim(), tmp_path / "ir")


@on_each_target
@pytest.mark.parametrize("kind", ["dit", "stable-diffusion"])
def test_other_denoisers(kind: str, tmp_path: Path, to: str) -> None:
    pipe = pipelines.dit() if kind == "dit" else pipelines.stable_diffusion(tmp_path / "tokenizer")
    pipelines.freeze_by_hand(pipe.transformer if kind == "dit" else pipe.unet)
    report = dq.export(pipe, tmp_path / "ir", to)
    assert report.error <= report.allowed < 0.2 and report.pair <= 32767


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_command_says_what_tensorrt_asks_for(symmetric: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = [LayerRule(match="@all", input_symmetric=True), LayerRule(match="@attention", input_symmetric=True, softmax_bits=7)]
    pipe = DDIMPipeline(pipelines.freeze_by_hand(pipelines.micro().unet, rules=rules if symmetric else ()), DDIMScheduler())
    dq.save(pipe, tmp_path / "packed")
    quantizing.export(str(tmp_path / "packed"), tmp_path / "onnx", "onnx", "single" if symmetric else "exact")
    assert json.loads((tmp_path / "onnx" / "export.json").read_text())["symmetric"] is symmetric
    assert ("--set layers.N.input_symmetric=true" in capsys.readouterr().out) is not symmetric


def test_the_pipeline_computes_with_openvino(pipe: DDIMPipeline, tmp_path: Path) -> None:
    dq.save(pipe, tmp_path / "packed")
    loaded = dq.load(tmp_path / "packed", engine="openvino")
    loaded.set_progress_bar_config(disable=True)
    images = loaded(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3) and loaded.unet.diffquant.engine.graphs.compiled
    dq.save(loaded, tmp_path / "again")
    rows = dq.use_engine(loaded, "int8") if not Int8.unsupported() else []
    assert not any(row.reason for row in rows) and type(loaded.unet.diffquant.engine) is not OpenVino

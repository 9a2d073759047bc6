"""Exports of whole small pipelines, each run after it was written."""

import json
from pathlib import Path

import pytest
from diffusers import DDIMPipeline, DDIMScheduler

import diffquant as dq
import pipelines
from diffquant.core.spec import CheckpointError, LayerRule
from diffquant.runtime import export as exports

pytest.importorskip("openvino")


@pytest.fixture
def pipe() -> DDIMPipeline:
    symmetric = LayerRule(match="@attention", input_symmetric=True)
    return DDIMPipeline(pipelines.freeze_by_hand(pipelines.micro().unet, rules=[symmetric]), DDIMScheduler())


def test_an_export_is_run_and_described(pipe: DDIMPipeline, tmp_path: Path) -> None:
    dq.save(pipe, tmp_path / "packed")
    report = dq.export(tmp_path / "packed", tmp_path / "ir")
    assert {path.name for path in (tmp_path / "ir").iterdir()} == {"openvino_model.xml", "openvino_model.bin", "export.json"}
    assert json.loads((tmp_path / "ir" / "export.json").read_text()) == report.model_dump()
    assert report.error < 0.05 and report.integer >= 13 and report.floating_layers == []
    assert {path.name for path in tmp_path.iterdir()} == {"packed", "ir"}
    with pytest.raises(CheckpointError, match="ir: exists; an export makes a new folder"):
        dq.export(pipe, tmp_path / "ir")


def test_a_file_that_computes_something_else_is_not_kept(
    pipe: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = exports.openvino.run
    monkeypatch.setattr(exports.openvino, "run", lambda *given: tuple(-output for output in run(*given)))
    with pytest.raises(CheckpointError, match="differs from the simulation's by 2; nothing was written"):
        dq.export(pipe, tmp_path / "ir")
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="export: target 'tensorrt'; allowed are openvino"):
        dq.export(pipelines.ddim(), tmp_path / "ir", to="tensorrt")
    with pytest.raises(CheckpointError, match="DDIMPipeline: holds no quantized model"):
        dq.export(pipelines.ddim(), tmp_path / "ir")


@pytest.mark.parametrize("kind", ["dit", "stable-diffusion"])
def test_other_denoisers(kind: str, tmp_path: Path) -> None:
    pipe = pipelines.dit() if kind == "dit" else pipelines.stable_diffusion(tmp_path / "tokenizer")
    pipelines.freeze_by_hand(pipe.transformer if kind == "dit" else pipe.unet)
    assert dq.export(pipe, tmp_path / "ir").error < 0.1


def test_the_pipeline_computes_with_openvino(pipe: DDIMPipeline, tmp_path: Path) -> None:
    dq.save(pipe, tmp_path / "packed")
    loaded = dq.load(tmp_path / "packed", engine="openvino")
    loaded.set_progress_bar_config(disable=True)
    images = loaded(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3) and loaded.unet.openvino_graphs.compiled
    dq.save(loaded, tmp_path / "again")
    rows = dq.use_engine(loaded, "int8") if not dq.runtime.engines.int8_cpu.unsupported() else []
    assert not any(row.reason for row in rows) and not hasattr(loaded.unet, "openvino_graphs")

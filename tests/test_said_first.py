"""What will fail is said before the time is spent: the plan, every pass, the disk and what is never called, on one trajectory."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import diffquant as dq
import pipelines
from diffquant.analysis.estimate import check_space
from diffquant.calibration import recorded_batch
from diffquant.errors import CalibrationError, CheckpointError, SpecError
from diffquant.files import shipped
from diffquant.recipe import Recipe

FEW = dq.Calibration(samples=6, steps=3, batch_size=2)


def small(name: str, **options: Any) -> Recipe:
    """A shipped recipe that takes a moment on the pipelines here."""
    recipe = dq.load_recipe(name, pipelines.small_budget(name))
    return recipe.model_copy(update=options)


def counted(model: nn.Module) -> list[int]:
    """Rows of every call of `model` from now on."""
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])) if arguments else None)
    return rows


class Blended(DDIMScheduler):
    """Adds to every step what was predicted before the last, which no replay of single steps gives."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
        found = super().step(model_output, timestep, sample, **options)
        found.prev_sample = found.prev_sample + 0.1 * torch.rand_like(sample)
        return found


def test_a_scheduler_that_cannot_be_replayed_is_refused_on_one_trajectory() -> None:
    pipe = pipelines.micro()
    pipe.scheduler = Blended()
    rows = counted(pipe.unet)
    with pytest.raises(CalibrationError, match="not one of diffusers'"):
        dq.quantize(pipe, small("accuquant-w4a8"), FEW, progress=False)
    assert not hasattr(pipe.unet, "diffquant")
    assert sum(rows) <= FEW.steps + 2  # one trajectory, and the call that shows what is per sample


@pytest.mark.parametrize(
    ("build", "recipe", "message"),
    [
        ("dit", "qncd-w4a8", "EmbeddingSmoothing: no residual block with a time embedding"),
        ("micro", "brecq-w4a8", "PASS: no layer has smooth"),
    ],
)
def test_what_a_pass_needs_of_the_model(build: str, recipe: str, message: str, tmp_path: Path) -> None:
    pipe = pipelines.build(build, tmp_path)
    chosen = small(recipe)
    if "PASS" in message:
        scaling = ({"pass": "LearnEquivalentScaling", "iterations": 1}, *chosen.passes)
        chosen = chosen.model_copy(update={"passes": scaling})
        message = message.replace("PASS", "LearnEquivalentScaling")
    rows = counted(pipe.unet if build == "micro" else pipe.transformer)
    with pytest.raises(SpecError, match=message):
        dq.quantize(pipe, chosen, FEW, progress=False)
    assert sum(rows) <= 2 * FEW.steps + 6


def test_dmq_leaves_out_the_shortcuts_of_a_model_without_them(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipelines.dit()
    report = dq.quantize(pipe, small("dmq-w4a8"), dataclasses.replace(FEW, steps=2), progress=False)
    assert report.passes[-1]["figures"]["note"].startswith("the model has none of the layers")
    assert "nothing is scaled" in caplog.text


def test_what_is_never_called_stays_in_floating_point(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    pipe = pipelines.micro()
    pipe.unet.spare = nn.Linear(4, 4)
    weight = pipe.unet.spare.weight.clone()
    report = dq.quantize(pipe, small("minmax-w4a8"), FEW, progress=False)
    assert "left in floating point: spare" in caplog.text
    assert type(pipe.unet.spare) is nn.Linear and torch.equal(pipe.unet.spare.weight, weight)
    (row,) = [row for row in report.layers if row["name"] == "spare"]
    assert row["spec"] is None and "never called" in row["reason"]


@pytest.mark.parametrize("name", shipped("recipes"))
def test_a_model_sampled_in_one_step_gets_one_set(name: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipelines.ddim()
    with caplog.at_level(logging.WARNING):
        dq.quantize(pipe, small(f"{name}-w4a8"), dataclasses.replace(FEW, steps=1), progress=False)
    assert pipe.unet.diffquant.clock.times == 1
    several = {"adp-dm": 8, "dmq": 1000}
    assert ("parameter sets asked; the recording has timesteps for 1" in caplog.text) == (name in several)
    assert f"up to {several.get(name, '')}" in caplog.text or name not in several
    assert torch.isfinite(pipe.unet(torch.randn(1, 3, 8, 8), 500).sample).all()


def test_a_recording_that_will_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recorded_batch, "free_bytes", lambda place: 1000)
    with pytest.raises(CalibrationError, match=r"a recording of 6 trajectories needs about .* GiB; 9.31e-07 GiB are free"):
        dq.record(pipelines.micro(), FEW, folder=tmp_path / "rec", progress=False)
    assert not (tmp_path / "rec").exists()


def test_a_checkpoint_that_will_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe, recipe = pipelines.ldm(), dq.load_recipe("mse-w4a8")
    check_space(pipe, recipe, tmp_path / "a" / "b")
    autoencoder = sum(value.nbytes for value in pipe.vqvae.state_dict().values())
    monkeypatch.setattr("diffquant.analysis.estimate.free_bytes", lambda place: autoencoder)
    with pytest.raises(CheckpointError, match=r"the checkpoint will take about .* GiB; .* are free"):
        check_space(pipe, recipe, tmp_path / "out")


def test_a_recording_that_was_begun_is_not_tried_again(tmp_path: Path) -> None:
    pipe = pipelines.micro()
    dq.record(pipe, FEW, folder=tmp_path / "recording", progress=False)
    rows = counted(pipe.unet)
    dq.quantize(pipe, small("minmax-w8a8"), FEW, folder=tmp_path, progress=False)
    assert not rows  # recorded calls are made again by keyword

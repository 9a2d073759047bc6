"""The command line on the shipped model: every verb, every recipe, and one line for what goes wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.nn import Conv2d, Linear

from diffquant import cli, zoo
from diffquant.calibration.recording import Trajectory
from diffquant.cli import quantizing, shared
from tests import pipelines


def run(*arguments: object) -> int:
    """Exit code of the command line."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["diffquant", *map(str, arguments)])
        cli.main()
        raise SystemExit(0)
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "recording"
    assert run("record", "glyph-ddim", "--out", folder, "--samples", 2, "--steps", 2) == 0
    return folder


def test_quantize_sample_and_evaluate(recording, tmp_path, capsys):
    """With one recipe; all are run in test_recipe.py."""
    sets = [part for option in pipelines.small_budget("mse-w4a8") for part in ("--set", option)]
    out = tmp_path / "out"
    assert run("quantize", "glyph-ddim", "--recipe", "mse-w4a8", "--data", recording, "--out", out, *sets) == 0
    printed = capsys.readouterr().out
    ratio = float(printed.split(" of float32")[0].split()[-1])
    assert ratio <= 0.16
    assert DiffusionPipeline.from_pretrained(out).unet.is_quantized
    assert json.loads((out / "quantization.json").read_text())["recipe"] == "mse-w4a8"
    assert run("sample", out, "--out", tmp_path / "grid.png", "--count", 2, "--steps", 2) == 0
    assert (tmp_path / "grid.png").stat().st_size > 0
    report = tmp_path / "report"
    few = ("--samples", 70, "--steps", 2, "--protocol", "accumulation_samples=2", "--protocol", "trajectory_samples=2")
    assert run("evaluate", out, "--reference", "glyph-ddim", "--out", report, *few) == 0
    assert {path.name for path in report.iterdir()} == {"report.json", "report.md", "pairs.png", "drift.png", "accumulation.png"}
    capsys.readouterr()
    few = ("--samples", 4, "--vary", "steps=2,3", "--vary", "eta=0,1", "--protocol", "trajectory_samples=2")
    assert run("robustness", out, "--reference", "glyph-ddim", "--out", report / "matrix", *few, "--vary", "sampler=ddpm") == 0
    printed = capsys.readouterr().out
    assert "left out: steps=2,eta=1.0,sampler=ddpm, steps=3,eta=1.0,sampler=ddpm: protocol.eta: is 1.0" in printed
    cells = json.loads((report / "matrix" / "robustness.json").read_text())["cells"]
    assert [cell["refused"] is None for cell in cells] == [True, False, True, False]


def test_evaluate_without_checkpoints_shows_full_precision(tmp_path, capsys):
    few = ("--samples", 70, "--steps", 2, "--protocol", "accumulation_samples=0", "--protocol", "trajectory_samples=2")
    assert run("evaluate", "--reference", "glyph-ddim", "--out", tmp_path, *few) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "pairs.png"}
    (measurement,) = json.loads((tmp_path / "report.json").read_text())["measurements"]
    figures = measurement["figures"]
    assert figures["fid_to_data"]["distance"]["value"] > 0 and figures["legibility"]["mean"]["value"] > 0


def test_inspect_names_every_layer_and_the_cost(capsys, monkeypatch):
    monkeypatch.setattr(shared.console, "width", shared.WIDE)  # pytest-xdist sets COLUMNS
    assert run("inspect", "glyph-ddim", "--recipe", "q-diffusion-w4a8") == 0
    printed = capsys.readouterr().out
    assert "of float32" in printed and "peak memory about" in printed
    for name, module in zoo.load("glyph-ddim").unet.named_modules():
        if type(module) in (Conv2d, Linear):
            assert f" {name} " in printed  # whole: long names differ at their ends


def test_inspect_measures_what_each_layer_adds(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shared.console, "width", shared.WIDE)
    pipelines.micro().save_pretrained(tmp_path / "model")
    assert run("record", tmp_path / "model", "--out", tmp_path / "data", "--samples", 2, "--steps", 3) == 0
    options = ("--data", tmp_path / "data", "--sensitivity", tmp_path / "map", "--trajectories", 2)
    assert run("inspect", tmp_path / "model", "--recipe", "mse-w4a6", *options) == 0
    printed = capsys.readouterr().out
    assert "error of weight" in printed and "2 trajectories leave 100% of a share open" in printed
    sensitivity = json.loads((tmp_path / "map" / "sensitivity.json").read_text())
    assert len(sensitivity["timesteps"]) == 3 and (tmp_path / "map" / "sensitivity.png").stat().st_size > 0
    (tmp_path / "data").rename(tmp_path / "recording")  # where quantize --work keeps its own
    options = ("--work", tmp_path, "--sensitivity", tmp_path / "again", "--trajectories", 2)
    assert run("inspect", tmp_path / "model", "--recipe", "mse-w4a6", *options) == 0
    assert json.loads((tmp_path / "again" / "sensitivity.json").read_text()) == sensitivity


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A pipeline saved in float16, plain and as a variant."""
    folder = tmp_path_factory.mktemp("half")
    pipe = pipelines.micro().to(torch.float16)
    pipe.save_pretrained(folder / "plain")
    pipe.save_pretrained(folder / "variant", variant="fp16")
    return folder


def test_a_half_precision_checkpoint_is_computed_in_float32_on_a_cpu(half, tmp_path, capsys):
    assert run("record", half / "plain", "--out", tmp_path / "r", "--samples", 2, "--steps", 2) == 0
    assert "plain: saved in float16, computed in float32 on a CPU" in capsys.readouterr().err
    data = Trajectory.open(tmp_path / "r")
    assert data.batch(torch.tensor([0]))[1].dtype == torch.float32
    assert run("inspect", half / "variant") == 1
    assert capsys.readouterr().err.strip().endswith("it has the variant fp16, give --load variant=fp16")
    assert run("inspect", half / "variant", "--load", "variant=fp16", "--load", "dtype=float32") == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("dtype=int4", "--load 'dtype=int4': dtypes are float32, bfloat16, float16"),
        ("variant", "--load 'variant': not key=value; for example dtype=float16, variant=fp16, revision=main"),
    ],
)
def test_what_load_takes(value, message, half, capsys):
    assert run("inspect", half / "plain", "--load", value) == 1
    assert message in capsys.readouterr().err


def test_brackets_and_spaces_of_a_path_are_printed(recording, tmp_path, capsys):
    out = tmp_path / "sweep[w8] a" / "out"
    sets = ("--set", "passes.0.samples=4")
    assert run("quantize", "glyph-ddim", "--recipe", "minmax-w8a8", "--data", recording, "--out", out, *sets) == 0
    assert capsys.readouterr().out.strip().startswith(f"{out}: ")
    for command in (("inspect", out), ("record", out, "--out", tmp_path / "r", "--samples", 2, "--steps", 2)):
        assert run(*command) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "UNet2DModel: is quantized" in line and "full-precision" in line
    assert run("sample", out / "unet", "--out", tmp_path / "x.png") == 1
    assert "holds no pipeline (no model_index.json); give the folder that holds unet/" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(recording, capsys, monkeypatch):
    monkeypatch.setattr(quantizing, "load_model", lambda *arguments: pytest.fail("the model was loaded"))
    assert run("quantize", "glyph-ddim", "--recipe", "minmax-w8a8", "--data", recording, "--out", recording) == 1
    assert "holds files that are no checkpoint" in capsys.readouterr().err


def test_a_full_disk_is_one_line(recording, tmp_path):
    """Files of 100 KiB and more cannot be written, in a process of its own."""
    sets = [part for option in pipelines.small_budget("mse-w4a8") for part in ("--set", option)]
    command = [
        Path(sys.executable).with_name("diffquant"),
        "quantize",
        "glyph-ddim",
        "--recipe",
        "mse-w4a8",
        "--data",
        recording,
        *sets,
    ]
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *command, "--out", tmp_path / "o", "--work", tmp_path / "w"]
    done = subprocess.run(list(map(str, limited)), capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(lines) == 1 and "cannot be written" in lines[0] and "free some space and run again" in lines[0]


def test_zoo_list(capsys):
    assert run("zoo", "list") == 0
    text = " ".join(capsys.readouterr().out.split())  # a narrow terminal folds lines
    assert text.startswith("models: glyph-ddim, glyph-sd, glyph-dit, glyph-classifier recipes: accuquant, ")
    assert "protocols: bedrooms-ldm4, " in text and "stable-diffusion-coco" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "glyph-ddim", "--recipe", "brec-w4a8", "--out", "x"), 'did you mean "brecq"'),
        (("quantize", "glyph-ddim", "--recipe", "brecq-w4a8", "--out", "x", "--data", "nowhere"), "nowhere"),
        (("sample", "./no-such-model", "--out", "x.png"), "no-such-model"),
        (("export", "glyph-ddim", "--out", "x", "--to", "cloud"), "export: target 'cloud'"),
        (("export", "./no-such-model", "--out", "x"), "no-such-model"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1 and "Traceback" not in printed.err
    assert not (tmp_path / "x").exists()


def test_usage_errors_exit_with_two(capsys):
    assert run("quantize", "glyph-ddim") == 2
    assert "Missing option" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb", ["record", "quantize", "sample", "evaluate", "inspect", "export", "robustness", "demo", "reproduce", "zoo"]
)
def test_help(verb, capsys):
    assert run(verb, "--help") == 0
    assert len(capsys.readouterr().out) > 200

"""A released checkpoint from weights to report in one command, on a small model of the class."""

from pathlib import Path

import pytest

import pipelines
from diffquant.reproduce import RELEASED
from diffquant.sampling.protocol_files import load_protocol
from test_cli import run

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize(("name", "build"), [("sd15", "stable_diffusion"), ("sdxl", "stable_diffusion_xl")])
def test_from_weights_to_report_and_again(name: str, build: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    pipelines.build(build, tmp_path / "words").save_pretrained(model)
    sets = [part for option in pipelines.small_budget("mse-w4a8") for part in ("--set", option)]
    few = ["calibration.samples=2", "calibration.steps=5", "steps=5", "trajectory_samples=2"]
    few = [part for option in few for part in ("--protocol", option)]
    arguments = ("reproduce", name, "--model", model, "--out", out, "--recipe", "mse-w4a8", "--samples", 2, *sets, *few)
    assert run(*arguments) == 0
    assert (out / "report" / "report.md").is_file() and (out / "checkpoint" / "unet").is_dir()
    batch = next((out / "work" / "recording").glob("batch-*")).stat().st_mtime_ns
    capsys.readouterr()
    assert run(*["minmax-w8a8" if each == "mse-w4a8" else each for each in arguments]) == 0
    assert next((out / "work" / "recording").glob("batch-*")).stat().st_mtime_ns == batch
    assert "minmax-w8a8" in capsys.readouterr().out  # and not what the first run left
    assert '"recipe": "minmax-w8a8"' in (out / "checkpoint" / "unet" / "config.json").read_text()


def test_every_released_checkpoint_has_its_protocol() -> None:
    for released in RELEASED.values():
        assert load_protocol([released.protocol]).sampling.guidance_scale is not None
    assert run("reproduce", "sd9", "--out", "x") == 1

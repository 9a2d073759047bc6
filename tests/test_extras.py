"""What the package needs for which work: quantizing and running without plots and metrics, and a line where these are missing."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTIONAL = (
    "matplotlib",
    "skimage",
    "fontTools",
    "torchmetrics",
    "openvino",
    "onnx",
    "onnxruntime",
    "peft",
    "scipy",
    "pytest",
    "comfy_kitchen",
)
SCRIPT = """
import sys
from importlib.abc import MetaPathFinder
class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in %r else real(name, package)
import torch
torch.set_num_threads(1)
from diffquant import cli
for arguments in %r:
    sys.argv = ["diffquant", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        print("ended with", end.code)
"""


def without(*commands: list[str]) -> str:
    """What the commands print, one after the other, where no optional package is installed."""
    script = SCRIPT % (OPTIONAL, OPTIONAL, list(commands))
    wide = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False, env=wide)
    return done.stdout + done.stderr


def test_quantize_and_sample_need_no_extra(tmp_path: Path) -> None:
    out, report = str(tmp_path / "out"), str(tmp_path / "report")
    few = ["--set", "passes.0.samples=4", "--set", "passes.0.candidates=2", "--protocol", "calibration.samples=2"]
    printed = without(
        ["info"],
        ["quantize", "glyph-ddim", "--recipe", "mse-w4a8", "--out", out, *few, "--protocol", "steps=2"],
        ["sample", out, "--out", str(tmp_path / "grid.png"), "--count", "2", "--steps", "2"],
        ["evaluate", out, "--reference", "glyph-ddim", "--out", report, "--samples", "2"],
    )
    assert (tmp_path / "grid.png").is_file(), printed
    assert printed.count("ended with 0") == 3 and "ended with 1" in printed, printed
    assert "error: scikit-image, scipy, matplotlib: not installed; pip install 'diffquant[evaluate]'" in printed
    assert not (tmp_path / "report").exists()
    assert "the package openvino is missing; pip install 'diffquant[openvino]'" in printed  # brackets are no markup


@pytest.mark.parametrize("name", ["evaluate", "openvino", "onnx", "comfyui", "dev"])
def test_extras_that_messages_name_exist(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert name in project["optional-dependencies"]
    base = {requirement.split(">")[0].split("[")[0] for requirement in project["dependencies"]}
    assert not base & {"matplotlib", "scikit-image", "torchmetrics", "openvino", "onnx", "pytest"}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_names_a_python_that_is_too_old(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")  # as 3.10 answers the question for 3.11
    (tmp_path / "python3").chmod(0o755)
    for file in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, tmp_path)
    old = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["make", "demo"], cwd=tmp_path, capture_output=True, text=True, check=False, env=old)
    assert done.returncode != 0 and "python3 here is older than 3.11" in done.stdout and "uv venv --seed" in done.stdout
    assert not (tmp_path / ".venv").exists()

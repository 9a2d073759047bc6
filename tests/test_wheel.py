"""The wheel: what is in it, and that it quantizes by itself where nothing else of the repository is. Nothing is downloaded."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
LARGEST = 20_000_000  # bytes
OFFLINE = {**os.environ, "PIP_NO_INDEX": "1", "COLUMNS": "200"}
ALONE = {key: value for key, value in OFFLINE.items() if key != "PYTHONPATH"}  # does not see the repository
TRAINING = re.compile(r"^\s*def (?:test|train)_\w*|^\s*(?:import|from) (?:fontTools|pytest|tools|tests)\b.*", re.MULTILINE)
QUANTIZE = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import diffquant as dq
from diffquant import zoo
assert Path(dq.__file__).is_relative_to(sys.prefix), dq.__file__
pipe = zoo.load("glyph-ddim")
dq.quantize(pipe, "mse-w4a8", dq.record(pipe, dq.Calibration(samples=2, steps=2, batch_size=2)))
dq.save(pipe, "out")
"""


def run(*command: str | Path, folder: Path, variables: dict[str, str]) -> str:
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds of the repository, with the build backend that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*build, "--wheel-dir", folder, ROOT, folder=folder, variables=OFFLINE)
    (file,) = folder.glob("diffquant-*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that holds the wheel, and sees the packages that are installed here.

    A path file inside of a folder that another path file names is not read, so an editable diffquant of these is not seen.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    programs = folder / "bin"
    install = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-deps"]
    run(*install, wheel, folder=folder, variables=OFFLINE)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "installed_here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.stat().st_size <= LARGEST
    with zipfile.ZipFile(wheel) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        code = "\n".join(archive.read(name).decode() for name in sizes if name.endswith(".py"))
    assert max(sizes.values()) <= LARGEST
    (information,) = {name.split("/")[0] for name in sizes} - {"diffquant"}
    assert information.endswith(".dist-info")
    source = ROOT / "src"
    files = {str(path.relative_to(source)) for path in (source / "diffquant").rglob("*") if path.is_file()}
    assert {name for name in sizes if name.startswith("diffquant/")} == {name for name in files if "__pycache__" not in name}
    for name in ("py.typed", "recipes/brecq.yaml", "protocols/stable-diffusion-coco.yaml", "zoo/weights/hashes.json"):
        assert f"diffquant/{name}" in sizes
    weights = [name for name in sizes if name.startswith("diffquant/zoo/weights/") and name.endswith(".safetensors")]
    assert {name.split("/")[3] for name in weights} == {"glyph-ddim", "glyph-sd", "glyph-dit", "glyph-classifier"}
    assert not TRAINING.findall(code)


def test_its_command_lists_what_it_holds(environment: Path, tmp_path: Path) -> None:
    models, recipes, protocols = run(environment / "diffquant", "zoo", "list", folder=tmp_path, variables=ALONE).splitlines()
    assert models == "models: glyph-ddim, glyph-sd, glyph-dit, glyph-classifier"
    assert "brecq" in recipes and "stable-diffusion-coco" in protocols


def test_it_quantizes_a_shipped_model(environment: Path, tmp_path: Path) -> None:
    run(environment / "python", "-c", QUANTIZE, folder=tmp_path, variables=ALONE)
    assert (tmp_path / "out" / "model_index.json").is_file()

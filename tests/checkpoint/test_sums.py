"""Digests of a checkpoint's files: all of them when it is verified, the config when it is loaded, one line for what is damaged."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffquant as dq
import pipelines
from diffquant.checkpoint.quantizer import CONFIG_DIGEST
from diffquant.checkpoint.sums import NAME
from diffquant.errors import CheckpointError

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = pipelines.ldm()
    pipelines.freeze_by_hand(pipe.unet)
    return dq.save(pipe, tmp_path_factory.mktemp("sums") / "pipe")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "pipe"))


def changed(file: Path, *keys: str, to: Any) -> None:
    whole = json.loads(file.read_text())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    file.write_text(json.dumps(whole))


def test_every_file_is_listed_as_a_known_command_reads_it(written: Path) -> None:
    lines = (written / NAME).read_text().splitlines()
    files = {str(file.relative_to(written)) for file in written.rglob("*") if file.is_file()} - {NAME}
    assert {line.split("  ", 1)[1] for line in lines} == files
    if checker := shutil.which("sha256sum"):
        assert subprocess.run([checker, "--check", "--quiet", NAME], cwd=written, check=False).returncode == 0
    dq.verify(written)


@pytest.mark.parametrize("name", ["vqvae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json", WEIGHTS])
def test_a_byte_of_any_file(name: str, folder: Path) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1  # of a tensor, where there are any
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(
        CheckpointError, match="its tensors are not those" if name == WEIGHTS else f"{name} is not the file that was"
    ):
        dq.verify(folder)


def test_files_that_went_or_came(folder: Path) -> None:
    (folder / "README.md").write_text("what the hub shows")
    dq.verify(folder)
    shutil.copy(folder / WEIGHTS, folder / "unet" / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"unet/more.safetensors was not there when it was saved"):
        dq.verify(folder)
    (folder / "unet" / "more.safetensors").unlink()
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"scheduler/scheduler_config.json is missing"):
        dq.verify(folder)
    (folder / NAME).write_text("nonsense\n")
    with pytest.raises(CheckpointError, match=f"{NAME}: damaged"):
        dq.verify(folder)


def test_checkpoints_without_sums_are_read(folder: Path) -> None:
    """As version 0.1 wrote them, and as diffusers does."""
    (folder / NAME).unlink()
    tensors = load_file(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        metadata = opened.metadata()
    del metadata[CONFIG_DIGEST]
    save_file(tensors, folder / WEIGHTS, metadata)
    dq.verify(folder)
    dq.load(folder)


@pytest.mark.parametrize("read", [dq.load, dq.verify, DiffusionPipeline.from_pretrained])
@pytest.mark.parametrize(("keys", "value"), [(("timesteps",), [901.0, 500.0, 100.0]), (("recipe",), "another")])
def test_a_config_that_fits_but_is_another(read: Any, keys: tuple[str, ...], value: Any, folder: Path) -> None:
    (folder / NAME).unlink()
    changed(folder / "unet" / "config.json", "quantization_config", *keys, to=value)
    with pytest.raises(CheckpointError, match=r"the quantization_config of config.json is not the one that was written"):
        read(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model_index.json", "{"),
        ("model_index.json", "[]"),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": "many"}'),
        ("scheduler/scheduler_config.json", "\x00\x01"),
        ("vqvae/config.json", "{}"),
    ],
)
def test_damage_beside_the_denoiser_is_one_line(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        dq.load(folder)
    assert f"{name} is not the file that was saved" in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_loaded_says_why_without_sums(folder: Path) -> None:
    (folder / NAME).unlink()
    (folder / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(CheckpointError, match="not loaded: AttributeError: .*NoSuchPipeline"):
        dq.load(folder)

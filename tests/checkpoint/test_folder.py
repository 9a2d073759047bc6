"""Folders: what is written, refused, replaced and left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, DiTPipeline, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffquant as dq
import pipelines
from diffquant.checkpoint import folder as checkpoint
from diffquant.checkpoint.folder import file_size, float32_size, load, save, verify
from diffquant.checkpoint.quantizer import CONFIG_DIGEST
from diffquant.core.affine import scale_from_range
from diffquant.core.layers import QuantizedLinear
from diffquant.core.model import freeze, quantized_layers, quantizers
from diffquant.core.spec import LayerRule
from diffquant.errors import CheckpointError, SpecError
from diffquant.host.conditions import Calibration
from diffquant.host.denoiser import prepare
from diffquant.host.pipeline import Host
from diffquant.host.structure import plan

WEIGHTS = "diffusion_pytorch_model.safetensors"
W4A8 = (
    LayerRule(match="@all", weight_bits=4, input_bits=8),
    LayerRule(match="@first", weight_bits=8),
    LayerRule(match="@last", weight_bits=8),
)


def unet(channels: tuple[int, ...] = (8, 8), layers: int = 1) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()


def quantize_by_hand(model: UNet2DModel) -> UNet2DModel:
    prepare(model, plan(model, W4A8), (800, 200))
    for _, quantizer in quantizers(model):
        scale, zero_point = scale_from_range(torch.tensor(-3.0), torch.tensor(4.0), quantizer.spec)
        quantizer.scale.fill_(scale)
        quantizer.zero_point.fill_(zero_point)
    for _, layer in quantized_layers(model):
        largest = layer.weight.detach().abs().reshape(len(layer.weight), -1).amax(dim=1, keepdim=True)
        layer.weight_quantizer.scale.copy_(scale_from_range(-largest, largest, layer.weight_quantizer.spec)[0])
    freeze(model)
    return model


@pytest.fixture(scope="module")
def pipe() -> DDIMPipeline:
    return DDIMPipeline(quantize_by_hand(unet()), DDIMScheduler(num_train_timesteps=1000))


@pytest.fixture(scope="module")
def written(pipe: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(pipe, tmp_path_factory.mktemp("written") / "pipe", recipe_name="mse-w4a8")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to be spoiled."""
    return Path(shutil.copytree(written, tmp_path / "pipe"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tensor_bytes(folder: Path) -> bytes:
    """All of the file but its header, whose keys the library writes in any order."""
    data = (folder / "unet" / WEIGHTS).read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], digest: bool = True) -> None:
    file = folder / "unet" / WEIGHTS
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, file, metadata if digest else {"format": "pt"})


def test_save_then_load(pipe: DDIMPipeline, written: Path) -> None:
    assert [path.name for path in written.parent.iterdir()] == ["pipe"]
    verify(written)
    verify(written / "unet")
    loaded = load(written)
    assert isinstance(loaded, DDIMPipeline) and isinstance(load(written / "unet"), UNet2DModel)
    ours, theirs = pipe.unet.state_dict(), loaded.unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert load(written, dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    x = torch.zeros(1, 3, 8, 8)
    assert torch.equal(load(written, engine="simulate").unet(x, 500).sample, pipe.unet(x, 500).sample)


def test_class_names_stay_with_every_copy(tmp_path: Path) -> None:
    """diffusers' pipeline forgets them when it is saved a second time; they also say which labels there are to calibrate on."""
    pipe = pipelines.dit()
    pipe.register_to_config(id2label={"2": "A, a", "5": "B"})
    pipe.save_pretrained(tmp_path / "first")
    pipe = DiTPipeline.from_pretrained(tmp_path / "first")
    pipelines.freeze_by_hand(pipe.transformer)
    for name in ("second", "third"):
        pipe = load(save(pipe, tmp_path / name), engine="simulate")
        assert pipe.get_label_ids(["A", "a", "B"]) == [2, 2, 5]
        assert Host(pipe).conditions(Calibration(samples=3), range(3)) == {"class_labels": [2, 5, 2]}


def test_saving_again_keeps_bytes_and_recipe(written: Path, tmp_path: Path) -> None:
    loaded = load(written)
    save(loaded, tmp_path / "again")
    assert tensor_bytes(tmp_path / "again") == tensor_bytes(written)
    assert json.loads((tmp_path / "again/unet/config.json").read_text())["quantization_config"]["recipe"] == "mse-w4a8"
    save(loaded.unet, tmp_path / "model", recipe_name="other")
    assert json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]["recipe"] == "other"
    verify(tmp_path / "model")


def test_shards(pipe: DDIMPipeline, tmp_path: Path) -> None:
    path = save(pipe, tmp_path / "a" / "b", max_shard_size=8000)
    files = sorted((path / "unet").glob("*.safetensors"))
    assert len(files) > 1 and file_size(path) == sum(file.stat().st_size for file in files)
    verify(path)
    files[1].write_bytes(files[1].read_bytes()[:-10])
    for read in (verify, load, DiffusionPipeline.from_pretrained):
        with pytest.raises(
            CheckpointError, match=rf"{files[1].name}: truncated or damaged \(.*\); copy or save the checkpoint again"
        ):
            read(path)


def test_size_is_that_of_the_codes(tmp_path: Path) -> None:
    """Per tensor a safetensors file spends some 120 bytes; on 5 million parameters that shows, but stays below 3 %."""
    model = unet(channels=(64, 128, 160), layers=1)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    whole = float32_size(model)
    quantize_by_hand(model)
    assert float32_size(model) == whole == 4 * parameters
    wanted = 0
    for name, tensor in model.state_dict().items():
        own = name.rpartition(".")[2]
        if own == "codes":
            bits = model.get_submodule(name.removesuffix(".codes")).spec.bits
            wanted += -(-tensor.numel() * bits // 8)
        elif own != "zero_point":
            wanted += 4 * tensor.numel()
    size = file_size(save(model, tmp_path / "model"))
    assert parameters > 4_500_000 and wanted < size <= 1.03 * wanted
    assert size < 0.16 * whole


def test_size_of_a_float_checkpoint(tmp_path: Path) -> None:
    model = unet()
    DDIMPipeline(model, DDIMScheduler()).save_pretrained(tmp_path)
    assert file_size(tmp_path) == file_size(tmp_path / "unet") == (tmp_path / "unet" / WEIGHTS).stat().st_size
    with pytest.raises(CheckpointError, match="holds no model that diffquant quantized"):
        verify(tmp_path)


def test_only_frozen_models_are_saved(tmp_path: Path) -> None:
    pipe = DDIMPipeline(unet(), DDIMScheduler())
    with pytest.raises(CheckpointError, match="DDIMPipeline: no component of it is quantized; quantize first"):
        save(pipe, tmp_path / "x")
    with pytest.raises(CheckpointError, match="UNet2DModel: its weights are not integer codes; quantize first"):
        save(pipe.unet, tmp_path / "x")
    prepare(pipe.unet, plan(pipe.unet, W4A8))
    with pytest.raises(CheckpointError, match="UNet2DModel: its weights are not integer codes; quantize first"):
        save(pipe, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_replaced(pipe: DDIMPipeline, folder: Path, tmp_path: Path) -> None:
    (folder / "old.txt").write_text("of the old checkpoint")
    save(pipe, folder)
    assert not (folder / "old.txt").exists()
    (tmp_path / "empty").mkdir()
    save(pipe.unet, tmp_path / "empty")
    for name, text in (("notes.txt", "mine"), ("config.json", "{}"), ("model_index.json", "[1]")):
        other = tmp_path / f"other-{name}"
        other.mkdir()
        (other / name).write_text(text)
        with pytest.raises(CheckpointError, match="holds files that are no checkpoint; save replaces the whole folder"):
            save(pipe, other)
        assert (other / name).read_text() == text
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a folder"):
        save(pipe, other / name)


def fail_while_writing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def write(tensors: Any, path: str, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", write)


def fail_while_renaming(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)


def fail_while_checking(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def check(model: Any, folder: Path) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "_check_reproduced", check)


@pytest.mark.parametrize("fail", [fail_while_writing, fail_while_renaming, fail_while_checking])
@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (OSError(28, "No space left on device"), CheckpointError, "cannot be written .*No space left on device"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_save_that_fails_leaves_the_old_checkpoint(
    pipe: DDIMPipeline,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail: Any,
    error: BaseException,
    raised: Any,
    text: str | None,
) -> None:
    before = contents(folder)
    with monkeypatch.context() as patch:
        fail(patch, error)
        with pytest.raises(raised, match=text):
            save(pipe, folder)
        with pytest.raises(raised, match=text):
            save(pipe, folder.with_name("new"))
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["pipe"]


def test_a_checkpoint_that_does_not_reproduce_the_model_is_not_kept(
    pipe: DDIMPipeline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)
    read = checkpoint._read

    def altered(folder: Path, model_class: Any) -> torch.nn.Module:
        model = read(folder, model_class)
        layer = next(layer for _, layer in quantized_layers(model) if isinstance(layer, QuantizedLinear))
        layer.weight_quantizer.codes[0, 0] ^= 1
        return model

    monkeypatch.setattr(checkpoint, "_read", altered)
    with pytest.raises(CheckpointError, match=r"unet: tensor 'time_embedding.*codes' was not reproduced"):
        save(pipe, folder)
    assert contents(folder) == before and len(list(folder.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("conv_in.weight_quantizer.scale"), "tensor 'conv_in.weight_quantizer.scale' is missing; config.json asks"),
        (lambda t: t.pop("conv_norm_out.bias"), "tensor 'conv_norm_out.bias' is missing"),
        (lambda t: t.update(more=torch.ones(1)), "tensor 'more' is unknown to this UNet2DModel"),
        (
            lambda t: t.update({"conv_in.weight_quantizer.codes": torch.zeros(7, dtype=torch.uint8)}),
            r"tensor 'conv_in.weight_quantizer.codes': uint8 \[7\]; must be uint8 \[216\]",
        ),
        (
            lambda t: t.update({"conv_in.weight_quantizer.scale": torch.ones(8, 1).half()}),
            r"tensor 'conv_in.weight_quantizer.scale': float16 \[8, 1\]; must be float32 \[8, 1\]",
        ),
        (lambda t: t["conv_in.weight_quantizer.scale"].fill_(torch.nan), "'conv_in.weight_quantizer.scale': holds inf or nan"),
        (lambda t: t["conv_in.bias"].fill_(torch.inf), "tensor 'conv_in.bias': holds inf or nan"),
        (lambda t: t["conv_in.bias"].add_(1), "unet: its tensors are not those that were written"),
    ],
)
def test_edited_files(folder: Path, change: Any, text: str) -> None:
    edit(folder, change)
    for read in (verify, load, DiffusionPipeline.from_pretrained):
        with pytest.raises(CheckpointError, match=text) as error:
            read(folder)
        assert "\n" not in str(error.value) and str(error.value).endswith("copy or save the checkpoint again")


def test_a_code_out_of_place(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="unet: its tensors are not those that were written"):
        DiffusionPipeline.from_pretrained(folder)


def test_files_of_others(folder: Path) -> None:
    edit(folder, lambda tensors: None, digest=False)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: has no digest of its contents; it was not written by diffquant"):
        verify(folder)
    (folder / "unet" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="unet: holds no safetensors file"):
        load(folder)
    with pytest.raises(CheckpointError, match="nowhere: no such folder; give the folder of a pipeline or a model"):
        load(folder / "nowhere")


def test_truncated_file(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    for read in (verify, load):
        with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: truncated or damaged \(.*\); copy or save the checkpoint again"):
            read(folder)
    with pytest.raises(OSError, match=f"Unable to load weights from checkpoint file for '.*{WEIGHTS}'"):
        DiffusionPipeline.from_pretrained(folder)  # diffusers opens a single file before it asks us


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(version=7), "quantization_config.version: 7; this diffquant reads version 1"),
        (
            lambda c: c["layers"][0]["names"].append("conv_inn"),
            "config.json does not fit the model: layer 'conv_inn': not in this UNet2DModel",
        ),
        (lambda c: c["layers"][0]["spec"]["weight"].update(bits=3), r"codes': uint8 \[.*\]; must be uint8 \[.*\]"),
        (lambda c: c["layers"][0]["names"].pop(), "tensor '.*weight' is missing"),
    ],
)
def test_edited_config(folder: Path, change: Any, text: str) -> None:
    """Of a file of version 0.1, which states no digest of the config."""
    file = folder / "unet" / WEIGHTS
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, {name: value for name, value in metadata.items() if name != CONFIG_DIGEST})
    edit_config(folder, change)
    for read in (verify, DiffusionPipeline.from_pretrained):
        with pytest.raises(CheckpointError, match=text) as error:
            read(folder)
        assert "\n" not in str(error.value)


def test_broken_json(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not JSON \("):
        load(folder)


def test_inputs_with_scales_of_each_call_are_loaded_again(tmp_path: Path) -> None:
    pipe = pipelines.micro()
    rules = ["layers.0.input_scale=dynamic-row", *pipelines.small_budget("mse-w4a8")]
    dq.quantize(pipe, dq.load_recipe("mse-w4a8", rules), Calibration(samples=2, steps=2))
    save(pipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["quantization_config"]
    assert {group["spec"].get("input_scale") for group in config["layers"]} == {"dynamic-row", "dynamic-sample"}
    assert not any("input_quantizer" in name for name in load_file(tmp_path / "out" / "unet" / WEIGHTS))
    arguments, expected = Host(pipe).example_call(steps=1)
    loaded = load(tmp_path / "out", engine="simulate")
    with torch.no_grad():
        assert torch.equal(Host(loaded).denoiser(**arguments)[0], expected)
    with pytest.raises(SpecError, match=r"input_quantizer: has scales of each call, which .* graphs do not"):
        dq.export(loaded, tmp_path / "exported", to="onnx")


def test_tables_of_embeddings_are_quantized_where_a_rule_says_so(tmp_path: Path) -> None:
    pipe = pipelines.dit()
    tables = [name for name, module in pipe.transformer.named_modules() if type(module) is torch.nn.Embedding]
    assert tables
    rules = ['layers.+={match: "@lookup", weight_bits: 8}', *pipelines.small_budget("mse-w4a8")]
    dq.quantize(pipe, dq.load_recipe("mse-w4a8", rules), Calibration(samples=2, steps=2))
    save(pipe, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    assert all(f"{name}.weight_quantizer.codes" in stored and f"{name}.weight" not in stored for name in tables)
    arguments, expected = Host(pipe).example_call(steps=1)
    loaded = load(tmp_path / "out", engine="simulate")
    with torch.no_grad():
        assert torch.equal(Host(loaded).denoiser(**arguments)[0], expected)

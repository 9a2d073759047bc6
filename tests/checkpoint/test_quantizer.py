"""diffusers loads and saves what was quantized, with every feature that a quantizer has."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.quantizers import DiffusersAutoQuantizer
from safetensors.torch import load_file

from diffquant.checkpoint.config import Method, QuantizationConfig, describe
from diffquant.checkpoint.packing import packed_state
from diffquant.checkpoint.quantizer import DiffquantQuantizer, mark_quantized
from diffquant.core.affine import scale_from_range
from diffquant.core.model import freeze, quantized_layers, quantizers
from diffquant.core.quantizer import Quantizer
from diffquant.core.spec import LayerRule, LayerSpec, QuantSpec
from diffquant.engines.base import engine
from diffquant.errors import CheckpointError
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan

TIMESTEPS = (900.0, 700.5, 400.0, 100.0)
WEIGHTS = "diffusion_pytorch_model.safetensors"
EVERYTHING = (
    LayerRule(match="@all", weight_bits=4, input_bits=8, sets=2, split_skips=True),
    LayerRule(match="@attention", input_bits=6, softmax_bits=8, sets=2),
    LayerRule(match="@first", weight_bits=8, input_bits="float"),
    LayerRule(match="@last", weight_bits=8, input_symmetric=True),
    LayerRule(match="down_blocks.0.resnets.0.conv1", weight_bits=2, smooth=True),
    LayerRule(match="down_blocks.0.resnets.0.conv2", weight_bits=3, weight_symmetric=False, shift=True),
    LayerRule(match="mid_block.resnets.0.conv1", weight_bits=5, weight_granularity="tensor", sets=4),
    LayerRule(match="mid_block.resnets.0.conv2", weight_bits=6, weight_symmetric=False, smooth=True, shift=True),
    LayerRule(match="*.to_q", weight_bits=7, weight_symmetric=False, weight_granularity="tensor"),
    LayerRule(match="up_blocks.0.resnets.0.conv1", weight_bits=8, weight_symmetric=False),
    LayerRule(match="time_embedding.*", weight_bits="float", input_bits="float", reason="stays"),
)  # fmt: skip


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


def set_parameters(quantizer: Quantizer, low: torch.Tensor, high: torch.Tensor) -> None:
    scale, zero_point = scale_from_range(low, high, quantizer.spec)
    quantizer.scale.copy_(scale.expand_as(quantizer.scale))
    quantizer.zero_point.copy_(zero_point.expand_as(quantizer.zero_point))


def calibrate_by_hand(model: UNet2DModel) -> None:
    """Weights from their extremes per row, inputs from fixed ranges that differ between sets and parts."""
    weights = {}
    for name, layer in quantized_layers(model):
        if layer.smooth is not None:
            layer.smooth.copy_(torch.linspace(0.5, 1.7, layer.smooth.numel()))
        weights[f"{name}.weight_quantizer"] = layer.weight.detach()
    for name, quantizer in quantizers(model):
        if name in weights:
            rows = weights[name].reshape(quantizer.rows, -1)
            low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
            set_parameters(quantizer, low.expand_as(quantizer.scale), high.expand_as(quantizer.scale))
        else:
            high = torch.linspace(3, 4.7, quantizer.scale.numel()).view_as(quantizer.scale)
            set_parameters(quantizer, -0.7 * high, high)
        if quantizer.shift is not None:
            quantizer.shift.copy_((torch.arange(quantizer.shift.numel()) % 3).view_as(quantizer.shift))
        if quantizer.table is not None and quantizer.rows == 2:
            quantizer.table.copy_(torch.tensor([1, 0, 0, 1]))


@pytest.fixture(scope="module")
def frozen() -> UNet2DModel:
    model = tiny_unet()
    prepare(model, plan(model, EVERYTHING), TIMESTEPS)
    calibrate_by_hand(model)
    freeze(model)
    model.diffquant.recipe = "everything"
    mark_quantized(model)
    return model


@pytest.fixture(scope="module")
def saved(frozen: UNet2DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    DDIMPipeline(frozen, DDIMScheduler(num_train_timesteps=1000)).save_pretrained(folder)
    return folder


def outputs(model: UNet2DModel, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One call, the same sample in each interval of the clock."""
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype).expand(4, 3, 8, 8)
    with torch.no_grad():
        output: torch.Tensor = model(x, torch.tensor([990, 650, 390, 3])).sample
    return output


@pytest.fixture(scope="module")
def before(frozen: UNet2DModel) -> torch.Tensor:
    """What the model puts out before it is saved."""
    return outputs(frozen)


def parameters_of_quantizers(model: UNet2DModel) -> dict[str, torch.Tensor]:
    own = ("codes", "scale", "zero_point", "table", "shift", "smooth")
    return {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2] in own}


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file; the library writes the header's keys in any order."""
    contents = file.read_bytes()
    size = 8 + int.from_bytes(contents[:8], "little")
    return json.loads(contents[8:size]), contents[size:]


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def test_the_fixture_has_every_feature(frozen: UNet2DModel, before: torch.Tensor) -> None:
    found = list(quantizers(frozen))
    assert {quantizer.spec.bits for _, quantizer in found} == set(range(2, 9))
    assert any(len(quantizer.splits) == 2 for _, quantizer in found)
    assert any(quantizer.rows == 4 and quantizer.table is not None for _, quantizer in found)
    assert any(name.endswith("attention_products.softmax") for name, _ in found)
    assert any(layer.smooth is not None for _, layer in quantized_layers(frozen))
    assert any(layer.input_quantizer is None for _, layer in quantized_layers(frozen))
    assert len(before.unique(dim=0)) == 4  # the clock matters


def test_pipeline_and_model_load_bit_equal(frozen: UNet2DModel, saved: Path, before: torch.Tensor) -> None:
    with engine("simulate"):
        pipe = DiffusionPipeline.from_pretrained(saved)
        model = UNet2DModel.from_pretrained(saved / "unet")
    for loaded in (pipe.unet, model):
        assert_same_tensors(frozen.state_dict(), loaded.state_dict())
        assert torch.equal(outputs(loaded), before)
        assert all(tensor.device.type == "cpu" for tensor in loaded.state_dict().values())
        assert loaded.diffquant.clock.timesteps == TIMESTEPS and not loaded.training
        assert loaded.hf_quantizer._load is None
    image = pipe(batch_size=1, num_inference_steps=1, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert image.shape == (1, 8, 8, 3)


@pytest.mark.parametrize(("dtype", "shard"), [(torch.bfloat16, "10GB"), (torch.bfloat16, 9000), (torch.float16, 9000)])
def test_half_precision_leaves_quantization_parameters_alone(
    frozen: UNet2DModel, tmp_path: Path, dtype: torch.dtype, shard: int | str
) -> None:
    frozen.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard == 9000)
    loaded = UNet2DModel.from_pretrained(tmp_path, dtype=dtype)
    assert_same_tensors(parameters_of_quantizers(frozen), parameters_of_quantizers(loaded))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype} and loaded.dtype == dtype
    assert torch.isfinite(outputs(loaded, dtype)).all()


def test_saving_a_loaded_model_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    once = UNet2DModel.from_pretrained(saved / "unet")
    once.save_pretrained(tmp_path)
    assert parts(tmp_path / WEIGHTS) == parts(saved / "unet" / WEIGHTS)
    first, again = (json.loads((folder / "config.json").read_text()) for folder in (saved / "unet", tmp_path))
    assert first["quantization_config"] == again["quantization_config"]
    half = UNet2DModel.from_pretrained(saved / "unet", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    ours, theirs = load_file(saved / "unet" / WEIGHTS), load_file(tmp_path / "half" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) or (theirs[name].dtype == torch.bfloat16 and "quantizer" not in name)


def test_sharded_files_load_bit_equal(frozen: UNet2DModel, tmp_path: Path, before: torch.Tensor) -> None:
    frozen.save_pretrained(tmp_path, max_shard_size=9000)
    with engine("simulate"):
        assert torch.equal(outputs(UNet2DModel.from_pretrained(tmp_path)), before)


def test_what_a_file_holds(frozen: UNet2DModel, saved: Path) -> None:
    stored = load_file(saved / "unet" / WEIGHTS)
    memory = frozen.state_dict()
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in saved.rglob("*"))
    gone = memory.keys() - stored.keys()
    assert gone and all(name.endswith("zero_point") and not memory[name].any() for name in gone)
    assert stored.keys() <= memory.keys()
    conv = stored["down_blocks.0.resnets.0.conv1.weight_quantizer.codes"]
    assert conv.dtype == torch.uint8 and conv.shape == (8 * 8 * 9 * 2 // 8,)
    assert all(tensor.dtype == torch.uint8 for name, tensor in stored.items() if name.endswith("zero_point"))
    config = json.loads((saved / "unet" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"], config["recipe"]) == ("diffquant", 1, "everything")
    assert config["timesteps"] == list(TIMESTEPS)
    assert sum(len(group["names"]) for group in config["layers"]) == len(list(quantized_layers(frozen)))
    specs = [json.dumps(group["spec"]) for group in config["layers"]]
    assert len(set(specs)) == len(specs)


def test_a_copy_of_a_loaded_model_is_its_own(saved: Path, before: torch.Tensor) -> None:
    with engine("simulate"):
        loaded = UNet2DModel.from_pretrained(saved / "unet")
    twin = copy.deepcopy(loaded)
    assert torch.equal(outputs(twin), before)
    twin.diffquant.clock.set_interval(2)
    assert loaded.diffquant.clock.interval == 0 and loaded.diffquant.clock is not twin.diffquant.clock
    assert all(quantizer.clock in (None, twin.diffquant.clock) for _, quantizer in quantizers(twin))


def test_a_loaded_model_moves_but_is_not_cast(saved: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(saved).to("cpu")
    with pytest.raises(ValueError, match="Casting a quantized model"):
        pipe.unet.to(torch.float16)


def test_device_map_of_one_device(saved: Path, frozen: UNet2DModel) -> None:
    loaded = UNet2DModel.from_pretrained(saved / "unet", device_map={"": "cpu"})
    assert_same_tensors(frozen.state_dict(), loaded.state_dict())
    with pytest.raises(CheckpointError, match="device_map: has parts on disk"):
        UNet2DModel.from_pretrained(saved / "unet", device_map={"": "disk"})


def test_config_round_trip_and_equality() -> None:
    layers = {name: LayerSpec(weight=QuantSpec(bits=4, symmetric=True)) for name in ("a", "b")}
    layers["c"] = LayerSpec(weight=QuantSpec(bits=3), splits=(3, 5))
    config = QuantizationConfig(layers=layers, timesteps=(1.5, 0.1), recipe="mse-w4a8")
    values = json.loads(json.dumps(config.to_dict()))
    assert [group["names"] for group in values["layers"]] == [["a", "b"], ["c"]]
    assert QuantizationConfig.from_dict(values) == config == DiffusersAutoQuantizer.from_dict(values)
    assert QuantizationConfig.from_dict(values) != QuantizationConfig()
    assert dict(config) == values and "mse-w4a8" in repr(config)
    assert isinstance(DiffusersAutoQuantizer.from_config(config), DiffquantQuantizer)
    assert config.quant_method is Method.DIFFQUANT


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 2}, "quantization_config.version: 2; this diffquant reads version 1; "),
        ({"version": None}, "quantization_config.version: None; this diffquant reads version 1; "),
        ({"extra": 1}, "quantization_config.extra: Extra inputs are not permitted; "),
        ({"timesteps": ["x"]}, "quantization_config.timesteps[0]: Input should be a valid number"),
        (
            {"layers": [{"spec": {"weight": {"bits": 9}}, "names": []}]},
            "quantization_config.layers[0].spec.weight.bits: Input should be less than or equal to 8; ",
        ),
    ],
)
def test_configs_that_are_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(CheckpointError) as error:
        QuantizationConfig.from_dict({**QuantizationConfig().to_dict(), **change})
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


def test_float_checkpoints_are_not_quantized_while_loading(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=QuantizationConfig())


def test_never_pickle(frozen: UNet2DModel, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safe_serialization: False; diffquant never writes pickles"):
        frozen.save_pretrained(tmp_path / "a", safe_serialization=False)
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "config.json").write_bytes((saved / "unet" / "config.json").read_bytes())
    torch.save(load_file(saved / "unet" / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.bin: not a safetensors file; diffquant never reads pickles"):
        UNet2DModel.from_pretrained(folder)


def test_only_a_frozen_model_is_marked() -> None:
    model = tiny_unet()
    prepare(model, plan(model, EVERYTHING), TIMESTEPS)
    for call in (describe, mark_quantized):
        with pytest.raises(CheckpointError, match="UNet2DModel: its weights are not integer codes; quantize first"):
            call(model)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("mid_block.resnets.0.conv1.weight_quantizer.scale", torch.nan, "holds inf or nan"),
        ("mid_block.resnets.0.conv1.weight_quantizer.scale", 0.0, "holds 0; must be positive"),
        ("mid_block.resnets.0.conv1.bias", torch.inf, "holds inf or nan"),
        ("mid_block.resnets.0.conv1.input_quantizer.table", 4, "holds 4; parameter sets are 0 to 3"),
        ("mid_block.resnets.0.conv2.input_quantizer.shift", -1, "holds -1; must not be negative"),
        ("mid_block.resnets.0.conv2.smooth", -1.0, "holds -1; must be positive"),
        ("mid_block.resnets.0.conv2.weight_quantizer.zero_point", 64.0, "zero_point: outside the codes of uint6/channel"),
        ("mid_block.resnets.0.conv1.weight_quantizer.zero_point", 1.0, "zero_point: outside the codes of int5/tensor"),
        (
            "mid_block.resnets.0.conv1.weight_quantizer.codes",
            16,
            r"conv1.weight_quantizer: codes: from .* to 16; 5 bits hold -16 to 15",
        ),
    ],
)
def test_values_that_no_file_may_hold(frozen: UNet2DModel, name: str, value: float, text: str) -> None:
    state = {key: tensor.clone() for key, tensor in frozen.state_dict().items()}
    state[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=text):
        packed_state(state, describe(frozen).quantizer_specs())

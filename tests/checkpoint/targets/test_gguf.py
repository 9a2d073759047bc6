"""GGUF files of small models, loaded by diffusers and read by gguf."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffquant as dq
import pipelines
from diffquant.checkpoint.targets import gguf
from diffquant.core.model import quantized_layers
from diffquant.core.spec import LayerRule
from diffquant.errors import CheckpointError

WEIGHTS_ONLY = [
    LayerRule(match="@all", input_bits="float"),
    LayerRule(match="@attention", input_bits="float", softmax_bits="float"),
]


@pytest.fixture
def package() -> Any:
    return pytest.importorskip("gguf", reason="needs the package gguf")


def quantized(kind: str, folder: Path, *rules: LayerRule, weight_bits: int = 4) -> Any:
    pipe = pipelines.build(kind, folder / "tokenizer")
    pipelines.freeze_by_hand(getattr(pipe, "transformer", None) or pipe.unet, weight_bits, rules=rules)
    return pipe


def linear(folder: Path, **options: Any) -> Any:
    """A layer of 32 inputs of the UNet."""
    pipe = quantized("stable_diffusion", folder, LayerRule(match="@all", **options))
    return next(layer for name, layer in quantized_layers(pipe.unet) if name.endswith("ff.net.2"))


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("kind", ["stable_diffusion", "flux"])
def test_the_file_holds_the_codes(package: Any, tmp_path: Path, kind: str, weight_bits: int) -> None:
    pipe = quantized(kind, tmp_path, *WEIGHTS_ONLY, weight_bits=weight_bits)
    denoiser = pipe.transformer if kind == "flux" else pipe.unet
    report = dq.export(pipe, tmp_path / "out", to="gguf")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "config.json", "export.json"}
    assert report.dropped == [] and 0 < report.error < 1e-3  # scales and products in float16
    layers, count = dict(quantized_layers(denoiser)), 0
    for tensor in package.GGUFReader(tmp_path / "out" / "model.gguf").tensors:
        name = tensor.name.removesuffix(".weight")
        if tensor.tensor_type.name in gguf.LARGEST:
            weight = layers[name].weight_quantizer
            assert (
                tensor.tensor_type.name == ("Q4_0" if weight_bits == 4 else "Q8_0")
                and f"{tensor.tensor_type.name} weight" in (report.layers[name])
            )
            values = package.quants.dequantize(tensor.data, tensor.tensor_type)
            expected = weight.codes.float() * weight.scale.half().float()
            assert np.array_equal(values.reshape(expected.shape), expected.numpy())
            count += 1
    assert count == (13 if kind == "stable_diffusion" else 4)


def test_activations_are_refused_or_listed(package: Any, tmp_path: Path) -> None:
    pipe = quantized("stable_diffusion", tmp_path)
    lost = (
        "inputs (83: conv_in, ...)",
        "operands of attention products (8: down_blocks.1.attentions.0.transformer_blocks.0.attn1, ...)",
    )
    with pytest.raises(CheckpointError) as error:
        dq.export(pipe, tmp_path / "out", to="gguf")
    assert str(error.value) == f"export: gguf cannot hold {'; '.join(lost)}; --lossy drops that and states the error"
    report = dq.export(pipe, tmp_path / "out", to="gguf", lossy=True)
    assert report.dropped == list(lost) and 1e-3 < report.error < 0.5
    assert not any(layer.weight_was_read for _, layer in quantized_layers(pipe.unet))


def test_what_is_written_in_floating_point(tmp_path: Path) -> None:
    layer = linear(tmp_path)
    blocks = gguf.blocks_of(layer)
    assert blocks is not None and blocks.kind == "Q4_0"
    layer.weight_quantizer.codes[0, 0] = 8
    assert gguf.blocks_of(layer).kind == "Q8_0"  # type: ignore[union-attr]
    layer.weight_quantizer.scale[0] = 1e-5
    assert gguf.blocks_of(layer) is None
    layer.weight_quantizer.scale[0] = 1e5
    assert gguf.blocks_of(layer) is None
    layer = linear(tmp_path, smooth=True)
    assert gguf.blocks_of(layer) is None
    layer.smooth, layer.weight_quantizer.codes = None, layer.weight_quantizer.codes[:, 1:]
    assert gguf.blocks_of(layer) is None  # 31 inputs


def test_a_class_that_diffusers_cannot_read(package: Any, tmp_path: Path) -> None:
    pipe = quantized("dit", tmp_path, *WEIGHTS_ONLY)
    with pytest.raises(CheckpointError, match="export: diffusers reads no GGUF file of a DiTTransformer2DModel; allowed are"):
        dq.export(pipe, tmp_path / "out", to="gguf")


def test_another_weight_is_refused(package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gguf.Blocks.packed
    monkeypatch.setattr(gguf.Blocks, "packed", lambda blocks: packed(blocks) ^ 1)
    with pytest.raises(CheckpointError, match="export: diffusers loads another '.*weight' than was written; nothing was written"):
        dq.export(quantized("flux", tmp_path, *WEIGHTS_ONLY), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_another_output_is_refused(package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = gguf._load

    def altered(*arguments: Any) -> Any:
        model = load(*arguments)
        model.proj_out.register_forward_hook(lambda module, given, output: -output)
        return model

    monkeypatch.setattr(gguf, "_load", altered)
    with pytest.raises(
        CheckpointError, match="the file's output differs from the simulation's by 2, where rounding explains 1e-05"
    ):
        dq.export(quantized("flux", tmp_path, *WEIGHTS_ONLY), tmp_path / "out", to="gguf")


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError) as error:
        dq.export(pipelines.ddim(), tmp_path / "out", to="gguf")
    assert str(error.value) == "gguf: the package gguf is missing; pip install 'diffquant[gguf]'"


def test_blocks_keep_the_order_of_codes() -> None:
    """Code i is in the lower half of byte i, code i + 16 in the upper one."""
    integers = (torch.arange(64) % 16 - 8).view(1, 64).to(torch.int8)
    integers[0, 16:32] = 7
    packed = gguf.Blocks("Q4_0", integers, torch.tensor([[1.0]], dtype=torch.float16)).packed()
    assert packed.shape == (1, 36) and packed[0, :2].tobytes() == np.float16(1).tobytes()
    assert packed[0, 2:18].tolist() == [240 + code for code in range(16)]

"""The tensors of ComfyUI's int8 layout, read by a reader that is written down here."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

import pipelines
from diffquant.checkpoint.comfy_layout import Layout, Rows, float_tensors, layout, rows_of
from diffquant.checkpoint.original_names import original_names
from diffquant.checkpoint.targets.stock import float_weight
from diffquant.core.clock import StepClock
from diffquant.core.layers import make_quantizable
from diffquant.core.model import quantized_layers
from diffquant.core.spec import LayerRule, LayerSpec, QuantSpec

FLOAT_INPUT = LayerRule(match="@all", input_bits="float")
FLOAT_PRODUCTS = LayerRule(match="@attention", input_bits="float", softmax_bits="float")
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "flux-2": lambda: Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=1,
        in_channels=16,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 2, 2),
    ),
    "wan": lambda: WanTransformer3DModel(
        num_layers=1, attention_head_dim=8, num_attention_heads=4, ffn_dim=64, text_dim=16, image_dim=16, added_kv_proj_dim=32
    ),
    "qwen": lambda: QwenImageTransformer2DModel(num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16),
    "z-image": lambda: ZImageTransformer2DModel(
        n_layers=1, n_refiner_layers=1, dim=64, n_heads=4, n_kv_heads=4, cap_feat_dim=32, axes_dims=[4, 4, 8]
    ),
}
QKV = [f"single_transformer_blocks.0.{layer}" for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return pipelines._conditional_unet(attention_head_dim=2)


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return pipelines.flux_transformer()


def written(denoiser: nn.Module) -> Layout:
    sources = float_tensors(denoiser)
    return layout(denoiser, sources, original_names(denoiser, {name: source.rows for name, source in sources.items()}))


def read(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file in floating point: a code times the scale of its row, one row after the other."""
    found = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and f"{layer}.comfy_quant" in tensors:
            assert json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist()))["format"] == "int8_tensorwise"
            scales = tensors[f"{layer}.weight_scale"]
            assert tensor.dtype == torch.int8 and scales.dtype == torch.float32 and scales.shape == (len(tensor), 1)
            tensor = torch.stack([row.float() * float(scale) for row, scale in zip(tensor, scales, strict=True)])
        if leaf not in ("comfy_quant", "weight_scale"):
            found[name] = tensor
    return found


def mark(made: Layout, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(bytes(made.tensors[f"{name}.comfy_quant"].tolist()))
    return value


def test_a_float_model_with_the_tensors_of_the_file_computes_as_the_simulation_does() -> None:
    denoiser = pipelines.freeze_by_hand(unet(), rules=[FLOAT_INPUT, FLOAT_PRODUCTS])
    made = written(denoiser)
    linear = {name for name, layer in quantized_layers(denoiser) if isinstance(layer, nn.Linear)}
    assert set(made.int8) == linear and len(linear) == 50 and set(made.floating.values()) == {"convolution"}
    twin: Any = UNet2DConditionModel.from_config(denoiser.config).eval()
    converter = SINGLE_FILE_LOADABLE_CLASSES["UNet2DConditionModel"]["checkpoint_mapping_fn"]
    twin.load_state_dict(converter(read(made.tensors), config=dict(twin.config)))
    call = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(500), "encoder_hidden_states": torch.randn(2, 5, 16)}
    with torch.no_grad():
        ours, theirs = denoiser(**call).sample, twin(**call).sample
    assert float((ours - theirs).norm() / ours.norm()) < 1e-6 and torch.isfinite(ours).all()  # sums in another order
    assert mark(made, "model.diffusion_model.time_embed.0") == {"format": "int8_tensorwise", "full_precision_matrix_mult": True}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_are_read_by_their_converters(kind: str) -> None:
    torch.manual_seed(0)
    denoiser: Any = pipelines.freeze_by_hand(OTHERS[kind]().eval())
    made = written(denoiser)
    linear = {name for name, layer in quantized_layers(denoiser) if isinstance(layer, nn.Linear)}
    assert set(made.int8) == linear and len(linear) >= 18
    converter = SINGLE_FILE_LOADABLE_CLASSES[type(denoiser).__name__]["checkpoint_mapping_fn"]
    found, expected = converter(read(made.tensors), config=dict(denoiser.config)), float_tensors(denoiser)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name].read()) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_fused_layer_keep_their_codes_and_scales(dtype: torch.dtype) -> None:
    rules = [LayerRule(match=QKV[1], weight_bits=8)]
    denoiser: Any = pipelines.freeze_by_hand(flux().to(dtype), rules=rules)
    made, layers = written(denoiser), dict(quantized_layers(denoiser))
    fused = "single_blocks.0.linear1"
    assert mark(made, fused) == {"format": "int8_tensorwise"} and set(QKV) <= set(made.int8) and not made.floating
    expected = torch.cat([layers[name].weight_quantizer.dequantized_codes() for name in QKV])
    assert torch.equal(read(made.tensors)[f"{fused}.weight"], expected) and expected.shape == (7 * 16, 16)
    assert made.tensors[f"{fused}.weight"][:16].abs().max() == 7 and made.tensors[f"{fused}.weight"][16:32].abs().max() == 127
    assert torch.equal(made.tensors[f"{fused}.bias"], torch.cat([layers[name].bias for name in QKV]))
    swapped, last = read(made.tensors)["final_layer.adaLN_modulation.1.weight"], layers["norm_out.linear"].weight_quantizer
    assert torch.equal(torch.cat(swapped.chunk(2)[::-1]), last.dequantized_codes())
    floats = {tensor.dtype for name, tensor in made.tensors.items() if name.endswith(("bias", "norm.scale"))}
    assert floats == {dtype}


@pytest.mark.parametrize("what", ["asymmetric codes of 8 bits", "smoothing", "a float weight"])
def test_a_fused_layer_with_a_part_that_the_layout_does_not_hold_is_dequantized(what: str) -> None:
    rule = {
        "asymmetric codes of 8 bits": LayerRule(match=QKV[1], weight_symmetric=False, weight_bits=8),
        "smoothing": LayerRule(match=QKV[1], smooth=True),
        "a float weight": LayerRule(match=QKV[1], weight_bits="float"),
    }[what]
    denoiser: Any = pipelines.freeze_by_hand(flux(), rules=[rule])
    layers = dict(quantized_layers(denoiser))
    layer = layers[QKV[1]]
    if what == "asymmetric codes of 8 bits":
        layer.weight_quantizer.codes[0, 0] = 255
    if what == "smoothing":
        assert isinstance(rows_of(layer), Rows)  # ones change nothing
        layer.smooth.uniform_(0.5, 2)
    made = written(denoiser)
    others = dict.fromkeys([QKV[0], *QKV[2:]], f"fusing with {QKV[1]}")
    assert made.floating == (others if what == "a float weight" else {QKV[1]: what} | others)
    assert "single_blocks.0.linear1.comfy_quant" not in made.tensors and not set(QKV) & set(made.int8)
    found = made.tensors["single_blocks.0.linear1.weight"].split([16, 16, 16, 64])
    assert all(torch.equal(rows, float_weight(layers[name])) for rows, name in zip(found, QKV, strict=True))
    if what == "smoothing":  # quantize(W * smooth) / smooth, for inputs that are not smoothed
        assert torch.equal(found[1], layer.weight_quantizer.dequantized_codes() / layer.smooth)
    assert not layer.weight_was_read


def test_the_input_of_a_fused_layer_is_floating_where_that_of_a_part_is() -> None:
    made = written(pipelines.freeze_by_hand(flux(), rules=[LayerRule(match=QKV[1], input_bits="float")]))
    assert mark(made, "single_blocks.0.linear1")["full_precision_matrix_mult"] is True
    assert set(made.int8) - set(made.by_rows) == set(QKV)


def test_codes_of_4_bits_lose_their_zero_points() -> None:
    denoiser: Any = pipelines.freeze_by_hand(flux(), rules=[LayerRule(match="@all", weight_symmetric=False)])
    for _, layer in quantized_layers(denoiser):
        layer.weight_quantizer.zero_point.copy_(torch.arange(len(layer.weight_quantizer.zero_point))[:, None] % 16)
    made = written(denoiser)
    expected = torch.cat([dict(quantized_layers(denoiser))[name].weight_quantizer.dequantized_codes() for name in QKV])
    assert not made.floating and torch.equal(read(made.tensors)["single_blocks.0.linear1.weight"], expected)
    assert int(made.tensors["single_blocks.0.linear1.weight"].min()) == -15


@pytest.mark.parametrize("kind", ["split", "one scale"])
def test_scales_that_are_not_of_rows(kind: str) -> None:
    layer: Any = nn.Linear(8, 4)
    weight = QuantSpec(bits=8, symmetric=True, granularity="channel" if kind == "split" else "tensor")
    make_quantizable(layer, LayerSpec(weight=weight, splits=(4, 4) if kind == "split" else ()), StepClock())
    layer.weight_quantizer.scale.fill_(0.01)
    layer.weight_quantizer.zero_point.zero_()
    layer.freeze()
    found = rows_of(layer)
    if kind == "split":
        assert found == "split input channels"
    else:
        assert isinstance(found, Rows) and found.scale.shape == (4, 1)
        assert torch.equal(found.codes * found.scale, layer.weight_quantizer.dequantized_codes())

"""Original names of tensors: against diffusers' converters, and names as released files have them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

from diffquant.checkpoint import original_names
from diffquant.checkpoint.original_names import FAMILIES, Origins
from diffquant.errors import CheckpointError

LEVELS = {"norm_num_groups": 8, "cross_attention_dim": 16, "attention_head_dim": 8}
XL = {
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
MODELS: dict[str, Callable[[], nn.Module]] = {  # as deep as those that are released, Flux as wide, transformers of few blocks
    "sd": lambda: UNet2DConditionModel(block_out_channels=(8, 16, 32, 32), **LEVELS),
    "xl": lambda: UNet2DConditionModel(**XL, **LEVELS),
    "flux": lambda: FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True),
    "flux-2": lambda: Flux2Transformer2DModel(num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=4),
    "wan": lambda: WanTransformer3DModel(num_layers=2, attention_head_dim=8, num_attention_heads=4, ffn_dim=64),
    "wan-image": lambda: WanTransformer3DModel(
        num_layers=1, attention_head_dim=8, num_attention_heads=4, ffn_dim=64, image_dim=16, added_kv_proj_dim=32
    ),
    "qwen": lambda: QwenImageTransformer2DModel(num_layers=2, attention_head_dim=16, num_attention_heads=2),
    "z-image": lambda: ZImageTransformer2DModel(n_layers=2, dim=64, n_heads=4, n_kv_heads=4, cap_feat_dim=32, axes_dims=[4, 4, 8]),
}
RELEASED = {  # names of each model's file, as its authors released it
    "sd": "time_embed.0.weight input_blocks.0.0.bias input_blocks.1.0.in_layers.2.weight input_blocks.1.0.emb_layers.1.bias "
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight input_blocks.3.0.op.weight input_blocks.4.0.skip_connection.weight "
    "input_blocks.11.0.out_layers.3.bias middle_block.1.proj_in.weight middle_block.2.out_layers.0.weight "
    "output_blocks.0.0.in_layers.0.weight output_blocks.2.1.conv.weight output_blocks.5.2.conv.weight "
    "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight out.0.weight out.2.bias",
    "xl": "label_emb.0.0.weight label_emb.0.2.bias input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight "
    "input_blocks.8.1.transformer_blocks.9.norm3.weight middle_block.1.transformer_blocks.9.attn1.to_out.0.bias "
    "output_blocks.2.2.conv.weight output_blocks.5.1.proj_out.weight",
    "flux": "img_in.weight guidance_in.in_layer.weight vector_in.out_layer.bias double_blocks.1.img_attn.qkv.weight "
    "double_blocks.0.txt_attn.norm.key_norm.scale double_blocks.0.img_mod.lin.bias double_blocks.0.txt_mlp.2.weight "
    "single_blocks.1.linear1.weight single_blocks.0.linear2.bias single_blocks.0.norm.query_norm.scale "
    "single_blocks.0.modulation.lin.weight final_layer.linear.weight final_layer.adaLN_modulation.1.bias",
    "flux-2": "double_stream_modulation_img.lin.weight double_blocks.0.img_attn.qkv.weight single_blocks.0.linear1.weight "
    "final_layer.adaLN_modulation.1.weight guidance_in.out_layer.weight",
    "wan": "patch_embedding.weight text_embedding.0.weight time_embedding.2.bias time_projection.1.weight "
    "blocks.0.self_attn.q.weight blocks.1.cross_attn.o.bias blocks.0.self_attn.norm_q.weight blocks.0.norm3.weight "
    "blocks.0.ffn.0.weight blocks.0.modulation head.modulation head.head.weight",
    "wan-image": "img_emb.proj.0.weight img_emb.proj.1.weight blocks.0.cross_attn.k_img.weight "
    "blocks.0.cross_attn.norm_k_img.weight",
    "qwen": "img_in.weight transformer_blocks.0.attn.add_q_proj.weight transformer_blocks.1.img_mod.1.weight norm_out.linear.bias",
    "z-image": "x_embedder.weight cap_embedder.1.weight layers.0.attention.qkv.weight context_refiner.0.attention.out.weight "
    "noise_refiner.1.attention.q_norm.weight layers.1.feed_forward.w1.weight final_layer.linear.weight x_pad_token",
}


def model(name: str) -> Any:
    with torch.device("meta"):
        return MODELS[name]()


def counted(denoiser: nn.Module) -> dict[str, int]:
    return {name: len(tensor) for name, tensor in denoiser.state_dict().items()}


def joined(origins: Origins, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([part.of(tensors[part.name]) for part in parts]) for name, parts in origins.items()}


def convert(denoiser: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    read = SINGLE_FILE_LOADABLE_CLASSES[type(denoiser).__name__]["checkpoint_mapping_fn"]
    return dict(read(dict(tensors), config=dict(denoiser.config)))


@pytest.mark.parametrize("name", MODELS)
def test_a_file_with_original_names_is_read_and_made_again(name: str) -> None:
    denoiser = model(name)
    rows = counted(denoiser)
    tensors = {each: torch.randn(count, 2) for each, count in rows.items()}
    original = joined(original_names.original_names(denoiser, rows), tensors)
    prefix = "model.diffusion_model." if name in ("sd", "xl") else ""
    assert {prefix + each for each in RELEASED[name].split()} <= set(original)
    read = convert(denoiser, original)  # by diffusers, with no part in how the names were made
    assert read.keys() == rows.keys() and all(torch.equal(read[each], tensors[each]) for each in rows)
    again = joined(original_names.original_names(denoiser, {each: len(tensor) for each, tensor in read.items()}), read)
    assert again.keys() == original.keys() and all(torch.equal(again[each], original[each]) for each in original)


def test_every_tensor_of_a_fused_one_is_in_its_place() -> None:
    tensors = {name: torch.full((count, 1), float(index)) for index, (name, count) in enumerate(counted(model("flux")).items())}
    order = list(tensors)
    original = joined(
        original_names.original_names(model("flux"), {name: len(tensor) for name, tensor in tensors.items()}), tensors
    )
    pieces = [f"single_transformer_blocks.0.{layer}.weight" for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    found = original["single_blocks.0.linear1.weight"].flatten().split([3072, 3072, 3072, 4 * 3072])
    assert [int(rows.unique()) for rows in found] == [order.index(name) for name in pieces]
    last = torch.arange(6144)[:, None]  # scale, then shift
    tensors["norm_out.linear.weight"] = last
    origins = original_names.original_names(model("flux"), {name: len(tensor) for name, tensor in tensors.items()})
    assert torch.equal(joined(origins, tensors)["final_layer.adaLN_modulation.1.weight"], torch.cat([last[3072:], last[:3072]]))


def test_a_model_narrower_than_the_converter_knows_is_checked_as_well() -> None:
    with torch.device("meta"):
        narrow = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2)
    assert "single_blocks.0.linear1.weight" in original_names.original_names(narrow, counted(narrow))


def test_a_table_with_rows_in_another_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = FAMILIES["ZImageTransformer2DModel"]

    def exchanged(names: list[str]) -> Origins:
        return {original: parts[::-1] for original, parts in wrong.origins(names).items()}

    monkeypatch.setitem(FAMILIES, "ZImageTransformer2DModel", wrong._replace(origins=exchanged))
    denoiser = model("z-image")
    with pytest.raises(CheckpointError, match="12 tensors would not come back from their original names, first 'context_refiner.0"):
        original_names.original_names(denoiser, counted(denoiser))


def test_models_without_known_names_are_refused() -> None:
    with pytest.raises(
        CheckpointError, match="DiTTransformer2DModel: the original names .* known are Stable Diffusion 1, 2 and XL"
    ):
        original_names.original_names(DiTTransformer2DModel(num_layers=1, attention_head_dim=8, num_attention_heads=2), {})
    with torch.device("meta"):
        both = UNet2DConditionModel(**XL, **LEVELS, class_embed_type="timestep")  # two embeddings, of one name in the original
    with pytest.raises(
        CheckpointError, match="8 tensors would not come back .*; it is no model of Stable Diffusion 1, 2 and XL as"
    ):
        original_names.original_names(both, counted(both))

"""Small, randomly initialised stock pipelines, built from diffusers' own classes without a download.

Weights depend on a fixed seed only. Widths are a few channels and images 8 or 16 pixels, so that a call takes milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffquant.core.spec import LayerRule
from diffquant.core.surgery import freeze, plan, prepare, quantized_layers, quantizers

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"


def unet(channels: int = 3, seed: int = 0) -> UNet2DModel:
    """Two levels with attention and concatenated skips, 8x8."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()


def micro(seed: int = 0) -> DDIMPipeline:
    """The least that has a residual block, an attention and a concatenated skip: for what walks over all units."""
    torch.manual_seed(seed)
    denoiser = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        attention_head_dim=8,
        add_attention=False,
    )
    return DDIMPipeline(denoiser.eval(), DDIMScheduler())


def ddim(seed: int = 0) -> DDIMPipeline:
    return DDIMPipeline(unet(seed=seed), DDIMScheduler())


def ddpm(seed: int = 0) -> DDPMPipeline:
    return DDPMPipeline(unet(seed=seed), DDPMScheduler())


def ldm(seed: int = 0) -> LDMPipeline:
    denoiser = unet(seed=seed)
    vqvae = VQModel(block_out_channels=(8,), latent_channels=3, norm_num_groups=4, num_vq_embeddings=16)
    return LDMPipeline(vqvae.eval(), denoiser, DDIMScheduler())


def dit(seed: int = 0) -> DiTPipeline:
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # noise and variance, as the published models
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    # DDIM, as the pipeline has it by default; Euler does not work with DiTPipeline (it feeds scaled latents to the scheduler)
    return DiTPipeline(transformer.eval(), _autoencoder(), DDIMScheduler())


def stable_diffusion(folder: Path, seed: int = 0) -> StableDiffusionPipeline:
    """`folder` takes the tokenizer's vocabulary; guidance is on by the pipeline's default."""
    torch.manual_seed(seed)
    denoiser = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    )
    tokenizer = _tokenizer(folder)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(text_config).eval(),
        tokenizer=tokenizer,
        unet=denoiser.eval(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, **_two_levels()).eval()


def _two_levels() -> dict[str, tuple[str, str]]:
    return {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows letters and no merges: it spells."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def freeze_by_hand(model: nn.Module, weight_bits: int = 4, sets: int = 1, rules: Sequence[LayerRule] = ()) -> nn.Module:
    """`model` frozen in place, attention quantized too, ranges set by hand; several sets differ in their steps."""
    everything = [
        LayerRule(match="@all", weight_bits=weight_bits, input_bits=8, sets=sets),
        LayerRule(match="@attention", input_bits=8, softmax_bits=8, sets=sets),
    ]
    prepare(model, plan(model, [*everything, *rules]), (900.0, 500.0, 100.0))
    for _, layer in quantized_layers(model):
        if layer.weight_quantizer is not None:
            weight = layer.weight_quantizer
            weight.scale.copy_(layer.weight.detach().flatten(1).abs().amax(1, keepdim=True) / weight.spec.code_max)
    for name, quantizer in quantizers(model):
        if quantizer.clock is not None:
            quantizer.scale.copy_(torch.linspace(0.02, 0.03, quantizer.rows)[:, None])
            quantizer.zero_point.fill_(0 if quantizer.spec.symmetric else 128)
        if name.endswith("softmax"):
            quantizer.scale.fill_(1 / quantizer.spec.code_max)
            quantizer.zero_point.zero_()
    freeze(model)
    return model.requires_grad_(False)

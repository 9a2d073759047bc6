"""Small, randomly initialised stock pipelines, built from diffusers' own classes without a download.

Weights depend on a fixed seed only. Widths are a few channels and images 8 or 16 pixels, so that a call takes milliseconds.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffquant.calibration.recording import Trajectory
from diffquant.core.model import freeze, quantized_layers, quantizers
from diffquant.core.spec import LayerRule
from diffquant.engines.base import Lowered
from diffquant.engines.exactness import ALL, answer_of
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan
from diffquant.recipe import load_recipe
from diffquant.sampling.sample import sample_unconditional

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


def own_loop(pipe, generator, batch, eta=0.0):
    """Sample a micro pipeline with whatever scheduler it holds."""
    noise = torch.randn(batch, 3, 8, 8, generator=generator, dtype=pipe.unet.dtype)
    for _ in sample_unconditional(pipe.unet, pipe.scheduler, noise, 6, eta, generator):
        pass


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
    tokenizer = _tokenizer(folder)
    return StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        unet=_conditional_unet(attention_head_dim=2),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_2(folder: Path, seed: int = 0) -> StableDiffusionPipeline:
    """As `stable_diffusion`, with what version 2 changed: v prediction, linear projections, another head width per level."""
    pipe = stable_diffusion(folder, seed)
    pipe.unet = _conditional_unet(attention_head_dim=(2, 4), use_linear_projection=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def stable_diffusion_xl(folder: Path, seed: int = 0) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    tokenizer = _tokenizer(folder)
    return StableDiffusionXLPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(_text_config(tokenizer, layers=2)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, layers=2)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_conditional_unet(
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            cross_attention_dim=32,  # of both text encoders
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,  # pooled text, and six sizes
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def pixart_transformer() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # noise and variance
        num_layers=1,
        cross_attention_dim=16,
        sample_size=32,
        patch_size=4,
        caption_channels=16,
        use_additional_conditions=False,
    ).eval()


def pixart(seed: int = 0) -> PixArtSigmaPipeline:
    """Latents of 32x32: the pipeline bins resolutions, and knows none below 256 pixels."""
    torch.manual_seed(seed)
    return PixArtSigmaPipeline(
        tokenizer=_tokenizer_t5(),
        text_encoder=_text_encoder_t5(),
        vae=_autoencoder(levels=4),
        transformer=pixart_transformer(),
        scheduler=DPMSolverMultistepScheduler(),
    )


def stable_diffusion_3_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,  # the last one has no text stream after its attention
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,  # of both CLIP encoders, and of T5
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def stable_diffusion_3(folder: Path, seed: int = 0) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    tokenizer = _tokenizer(folder)
    clip = _text_config(tokenizer, layers=2)
    return StableDiffusion3Pipeline(
        transformer=stable_diffusion_3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(),
        text_encoder=CLIPTextModelWithProjection(clip).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip).eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=_text_encoder_t5(32),
        tokenizer_3=_tokenizer_t5(),
    )


def flux_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,  # 2x2 patches of 4 channels
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def flux(folder: Path, seed: int = 0) -> FluxPipeline:
    """As FLUX.1-dev: guidance is an input of the model, timesteps are shifted by the number of image tokens."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(folder)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=_text_encoder_t5(),
        tokenizer_2=_tokenizer_t5(),
        transformer=flux_transformer(),
    )
    return small(pipe)


def cogvideox(seed: int = 0) -> CogVideoXPipeline:
    """Two latent frames of 4x4: latents have five dimensions, rotary positions are a tuple."""
    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
    )
    return CogVideoXPipeline(
        tokenizer=_tokenizer_t5(),
        text_encoder=_text_encoder_t5(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=CogVideoXDDIMScheduler(),
    )


def build(name: str, folder: Path) -> Any:
    """The pipeline that the function `name` builds; `folder` takes what it has to write."""
    builder = globals()[name]
    return builder(folder) if "folder" in inspect.signature(builder).parameters else builder()


def small(pipe: FluxPipeline) -> FluxPipeline:
    """The pipeline with latents of 8x8, where nothing else is asked for: their size is not in its configuration."""
    pipe.default_sample_size = 8
    return pipe


def _conditional_unet(**options: Any) -> UNet2DConditionModel:
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(in_channels=4, out_channels=4, **sizes, **blocks, **{"cross_attention_dim": 16, **options}).eval()


def _text_config(tokenizer: CLIPTokenizer, layers: int = 1) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _text_encoder_t5(width: int = 16) -> T5EncoderModel:
    config = T5Config(vocab_size=len(LETTERS) + 4, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def _tokenizer_t5() -> T5Tokenizer:
    """A T5 tokenizer that knows letters and no pieces: it spells."""
    tokens = ["<pad>", "</s>", "<unk>", "\N{LOWER ONE EIGHTH BLOCK}", *LETTERS]  # the block is its mark of a word's beginning
    return T5Tokenizer(vocab=[(token, 0.0) for token in tokens], extra_ids=0)


def _autoencoder(levels: int = 2) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        latent_channels=4,
        shift_factor=0.0,  # which Stable Diffusion 3 and Flux add
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    ).eval()


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows letters and no merges: it spells."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


SMALL = {
    "samples": 4,
    "iterations": 1,
    "batch_size": 2,
    "candidates": 4,
    "cosines": "false",
    "images": 8,
    "rounds": 4,
    "updates": 1,
}


def small_budget(recipe: str, samples: int = 4) -> list[str]:
    """Overrides that make every pass of a recipe as short as it can be; ranges look at `samples` recorded calls."""
    options = SMALL | {"samples": samples}
    passes = enumerate(load_recipe(recipe).built_passes())
    return [f"passes.{i}.{key}={value}" for i, step in passes for key, value in options.items() if key in type(step).model_fields]


def not_integer(rows: Sequence[Lowered]) -> list[Lowered]:
    """The layers that the int8 engine does not compute with integers although they are not better in floating point here."""
    here = "" if answer_of("torch linear").largest() == ALL else "2 products of integers would take longer here"
    return [row for row in rows if row.reason and not (here and row.reason.startswith(here))]


def freeze_by_hand(
    model: nn.Module, weight_bits: int = 4, sets: int = 1, rules: Sequence[LayerRule] = (), conditional: int | None = None
) -> nn.Module:
    """`model` frozen in place, attention quantized too, ranges set by hand; several sets differ in their steps."""
    everything = [
        LayerRule(match="@all", weight_bits=weight_bits, input_bits=8, sets=sets),
        LayerRule(match="@attention", input_bits=8, softmax_bits=8, sets=sets),
    ]
    prepare(model, plan(model, [*everything, *rules]), (900.0, 500.0, 100.0), conditional)
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


def recorded_calls(data: Trajectory) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Arguments and output of every recorded denoiser call, whole."""
    sizes = [call["rows"] for layout in data._layouts for call in layout["calls"]]
    for indices in torch.arange(len(data)).split(sizes):
        yield data.batch(indices)

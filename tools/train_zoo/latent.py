"""The latent reference models: an autoencoder, and on its latents the pipelines ``glyph-sd`` (prompts) and ``glyph-dit`` (classes).

Both are stock diffusers pipelines that draw 64x64 pictures. Their weights are stored as float16, and the rounded weights are the
reference; those of the autoencoder are rounded before a denoiser is trained on its latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from jaxtyping import Float, Int, UInt8
from rich.progress import track
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffquant.calibration.fit import run
from diffquant.zoo.prompts import LETTERS
from tools.train_zoo.letters import LARGE_SIZE, Letters, rgb_samples
from tools.train_zoo.loop import train, two_rounds
from tools.train_zoo.losses import Condition, denoising_loss, hybrid_loss, reconstruction_loss
from tools.train_zoo.prompts import PROMPT_TOKENS, prompt_of, tokenize, tokenizer

LATENT_SIZE = 16
LATENT_CHANNELS = 4
TEXT_WIDTH = 64
NULL_LABEL = 1000  # of `DiTPipeline`, whatever the number of classes
STYLE_DROP = 0.3  # share of training prompts that name the letter only
PROMPT_DROP = 0.1  # share of empty training prompts, for guidance
LABEL_DROP = 0.1  # share of training samples with the null label, for guidance
ENCODE_BATCH = 64


def glyph_vae() -> AutoencoderKL:
    """The autoencoder of both pipelines: 64x64x3 to 16x16x4, 0.41 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
        sample_size=LARGE_SIZE,
    )


def glyph_sd(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """``glyph-sd``, untrained: UNet of 1.8 M parameters with attention at 8x8, text encoder of 0.1 M."""
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(48, 80),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,  # the number of heads, as diffusers reads it here
        cross_attention_dim=TEXT_WIDTH,
        resnet_time_scale_shift="scale_shift",
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(words)),
        tokenizer=words,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _text_config(words: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def glyph_dit(vae: AutoencoderKL) -> DiTPipeline:
    """``glyph-dit``, untrained: 2.2 M parameters in use; 974 rows of each label table belong to no class and are zero."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=36,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,  # noise and variance
        num_layers=5,
        sample_size=LATENT_SIZE,
        patch_size=2,
        num_embeds_ada_norm=NULL_LABEL,
    )
    _initialise(transformer)
    pipe = DiTPipeline(transformer, vae, DDIMScheduler(beta_schedule="linear", clip_sample=False))
    pipe.register_to_config(id2label=dict(enumerate(LETTERS)))
    return pipe


@torch.no_grad()
def _initialise(transformer: DiTTransformer2DModel) -> None:
    """Blocks start as the identity and the output at zero. Source: Peebles & Xie 2023 (arXiv 2212.09748), section 3.2 and code."""
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    for layer in (*modulations, transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in transformer.transformer_blocks:
        labels = block.norm1.emb.class_embedder.embedding_table.weight  # [1001, width]
        nn.init.normal_(labels, std=0.02)
        labels[len(LETTERS) : NULL_LABEL] = 0


@final
class TextDenoiser(nn.Module):
    """Text encoder and UNet as one model, to be trained together."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        super().__init__()
        self.unet, self.text_encoder = pipe.unet, pipe.text_encoder

    def forward(self, noisy: Float[Tensor, "n 4 16 16"], timestep: Int[Tensor, " n"], tokens: Int[Tensor, "n 16"]) -> Any:
        """The UNet's output for prompts of `tokens`."""
        return self.unet(noisy, timestep, self.text_encoder(tokens)[0])


@final
class LabelDenoiser(nn.Module):
    """The transformer, with its labels as third argument. In evaluation mode: else each block would drop labels of its own."""

    def __init__(self, pipe: DiTPipeline) -> None:
        super().__init__()
        self.transformer = pipe.transformer.eval()

    def forward(self, noisy: Float[Tensor, "n 4 16 16"], timestep: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> Any:
        """The transformer's output for `labels`."""
        return self.transformer(noisy, timestep, class_labels=labels)


def prompt_condition(letters: Letters, words: CLIPTokenizer) -> Condition:
    """Tokens of each letter's prompt; its style is left out with probability `STYLE_DROP`, all of it with `PROMPT_DROP`."""
    styles = sorted({*letters.styles, ""})  # the empty style first, so that row `label` is the bare letter
    prompts = [prompt_of(style, label) for style in styles for label in range(len(LETTERS))]
    tokens = tokenize(words, [*prompts, ""])
    style_of_font = torch.tensor([styles.index(style) for style in letters.styles])
    full = style_of_font[letters.fonts] * len(LETTERS) + letters.labels

    def condition(picked: Int[Tensor, " k"], generator: torch.Generator) -> Int[Tensor, "k 16"]:
        style_draw, prompt_draw = torch.rand(2, len(picked), generator=generator)
        row = torch.where(style_draw < STYLE_DROP, letters.labels[picked], full[picked])
        return tokens[row.masked_fill(prompt_draw < PROMPT_DROP, len(prompts))]

    return condition


def label_condition(letters: Letters) -> Condition:
    """Each letter's label, replaced by the null label with probability `LABEL_DROP`."""

    def condition(picked: Int[Tensor, " k"], generator: torch.Generator) -> Int[Tensor, " k"]:
        return letters.labels[picked].masked_fill(torch.rand(len(picked), generator=generator) < LABEL_DROP, NULL_LABEL)

    return condition


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: UInt8[Tensor, "n 64 64"]) -> Float[Tensor, "n 4 16 16"]:
    """Means of the latents of `pictures`, scaled as a denoiser sees them, in float16."""
    parts = track(pictures.split(ENCODE_BATCH), description="encoding")
    latents = [vae.encode(rgb_samples(part)).latent_dist.mean * vae.config.scaling_factor for part in parts]
    return torch.cat([part.half() for part in latents])


def train_glyph_vae(letters: Letters, out: Path, steps: int, seed: int) -> dict[str, float]:
    """Train the autoencoder, write it to ``out/glyph-vae``, and return the error of its reconstructions on held-out fonts."""
    torch.manual_seed(seed)
    training, held_out = letters.split()
    vae = glyph_vae().to(memory_format=torch.channels_last)
    with run(out / "training" / "glyph-vae") as where:
        train(vae, reconstruction_loss(training.pictures, batch=16), steps=steps, peak_lr=1e-3, seed=seed, run=where)
    vae.eval().half().float()  # rounded to what is stored
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=1 / float(encode(vae, training.pictures).float().std()))
    with torch.no_grad():
        parts = [rgb_samples(part) for part in held_out.pictures.split(ENCODE_BATCH)]
        error = torch.cat([(vae(part).sample - part).abs().mean(dim=(1, 2, 3)) for part in parts]).mean()
    _as_stored(vae).save_pretrained(out / "glyph-vae")
    return {"scaling_factor": vae.config.scaling_factor, "held_out_l1": float(error)}


def train_glyph_sd(letters: Letters, out: Path, steps: int, seed: int) -> None:
    """Train UNet and text encoder on the latents of ``out/glyph-vae``, and write the pipeline to ``out/glyph-sd``."""
    training = letters.split()[0]
    torch.manual_seed(seed)
    pipe = glyph_sd(trained_vae(out))
    pipe.unet.to(memory_format=torch.channels_last)
    condition = prompt_condition(training, pipe.tokenizer)
    loss = denoising_loss(encode(pipe.vae, training.pictures), pipe.scheduler.alphas_cumprod, batch=32, condition=condition)
    with run(out / "training" / "glyph-sd") as where:
        train(TextDenoiser(pipe), loss, steps=steps, peak_lr=1e-3, seed=seed, run=where)
    save(pipe, out / "glyph-sd")


def train_glyph_dit(letters: Letters, out: Path, steps: int, seed: int) -> None:
    """Train the transformer on the latents of ``out/glyph-vae``, and write the pipeline to ``out/glyph-dit``."""
    training = letters.split()[0]
    torch.manual_seed(seed)
    pipe = glyph_dit(trained_vae(out))
    latents = encode(pipe.vae, training.pictures)
    loss = hybrid_loss(latents, pipe.scheduler.alphas_cumprod, batch=64, condition=label_condition(training))
    with run(out / "training" / "glyph-dit") as where:
        train(LabelDenoiser(pipe), loss, steps=steps, peak_lr=1e-3, seed=seed, run=where, schedule=two_rounds)
    save(pipe, out / "glyph-dit")


def trained_vae(out: Path) -> AutoencoderKL:
    """The autoencoder of ``out/glyph-vae``, which computes in float32."""
    vae = AutoencoderKL.from_pretrained(out / "glyph-vae", dtype=torch.float32).to(memory_format=torch.channels_last)
    vae.register_to_config(_name_or_path="glyph-vae")  # not where it lay, which a pipeline would carry on
    return vae


def save(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline that stock diffusers loads as float32; its weights are stored as float16."""
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            _as_stored(module)
    pipe.save_pretrained(folder)
    if isinstance(pipe, StableDiffusionPipeline):  # transformers computes in the dtype that the configuration names
        pipe.text_encoder.config.dtype = torch.float32
        pipe.text_encoder.config.save_pretrained(folder / "text_encoder")


def _as_stored(model: Any) -> Any:
    return model.to(memory_format=torch.contiguous_format).half()

"""The pixel-space reference model ``glyph-ddim``, a stock `DDIMPipeline` that draws 32x32 letters."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from diffquant.calibration.fit import run
from tools.train_zoo.letters import Letters
from tools.train_zoo.loop import train, two_rounds
from tools.train_zoo.losses import denoising_loss


def glyph_unet() -> UNet2DModel:
    """The architecture of ``glyph-ddim``: 1.8 M parameters, three resolutions with skips, attention at 8x8."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )


def train_glyph_ddim(letters: Letters, out: Path, steps: int, seed: int, compiled: bool = False) -> None:
    """Train the denoiser on the letters and write it as a stock `DDIMPipeline` directory; resumes what `out` holds.

    `compiled` trains through `torch.compile`: 1.4 times as fast on 2 cores, and needs a C++ compiler.
    """
    torch.manual_seed(seed)
    unet = glyph_unet().to(memory_format=torch.channels_last)
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True)
    if compiled:
        unet.compile()
    loss = denoising_loss(letters.split()[0].samples(), scheduler.alphas_cumprod, batch=32)
    with run(out / "training") as where:
        train(unet, loss, steps=steps, peak_lr=1e-3, seed=seed, run=where, schedule=two_rounds)
    DDIMPipeline(unet=unet.to(memory_format=torch.contiguous_format), scheduler=scheduler).save_pretrained(out / "glyph-ddim")

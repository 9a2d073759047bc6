"""What each reference model minimises in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from tools.train_zoo.letters import rgb_samples
from tools.train_zoo.loop import StepLoss

SNR_CAP = 5.0  # gamma of min-SNR weighting
EDGE_WEIGHT = 1.0  # of the error of horizontal and vertical differences, beside that of the pixels
KL_WEIGHT = 1e-3  # of the mean over latent elements: they stay near unit variance, and neighbours stay decodable
VARIANCE_WEIGHT = 1e-3  # lambda of the hybrid loss, on the sum of the variational terms of all timesteps

Condition = Callable[[Int[Tensor, " k"], torch.Generator], Tensor]  # rows of the picked samples to what the model is told of them


@dataclass(frozen=True)
class Noised:
    """Samples at random timesteps, and what the model is asked about them."""

    timestep: Int[Tensor, " k"]
    noise: Float[Tensor, "k c h w"]
    noisy: Float[Tensor, "k c h w"]
    conditions: tuple[Tensor, ...]


def add_noise(
    samples: Float[Tensor, "n c h w"],
    alphas_cumprod: Float[Tensor, " t"],
    batch: int,
    generator: torch.Generator,
    condition: Condition | None = None,
) -> Noised:
    """`batch` of the samples, each at a timestep of its own. Source: Ho et al. 2020 (arXiv 2006.11239), eq. 4."""
    picked = torch.randint(len(samples), (batch,), generator=generator)
    timestep = torch.randint(len(alphas_cumprod), (batch,), generator=generator)
    clean = samples[picked].float()
    noise = torch.randn(clean.shape, generator=generator)
    signal = alphas_cumprod[timestep].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    return Noised(timestep, noise, noisy, () if condition is None else (condition(picked, generator),))


def denoising_loss(
    samples: Float[Tensor, "n c h w"], alphas_cumprod: Float[Tensor, " t"], batch: int, condition: Condition | None = None
) -> StepLoss:
    """Squared error of the predicted noise at random timesteps, with min-SNR weights.

    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 14; weights from Hang et al. 2023 (arXiv 2303.09556).
    """

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        drawn = add_noise(samples, alphas_cumprod, batch, generator, condition)
        predicted = model(drawn.noisy, drawn.timestep, *drawn.conditions).sample
        return _noise_error(predicted, drawn, alphas_cumprod)

    return loss


def _noise_error(predicted: Float[Tensor, "k c h w"], drawn: Noised, alphas_cumprod: Float[Tensor, " t"]) -> Tensor:
    snr = (alphas_cumprod / (1 - alphas_cumprod))[drawn.timestep]
    weight = snr.clamp(max=SNR_CAP) / snr
    mean: Tensor = (weight * (predicted - drawn.noise).square().mean(dim=(1, 2, 3))).mean()
    return mean


def hybrid_loss(
    samples: Float[Tensor, "n c h w"], alphas_cumprod: Float[Tensor, " t"], batch: int, condition: Condition
) -> StepLoss:
    """`denoising_loss`, and the variational bound of the variance; the model returns noise and variance, stacked along channels.

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 16: the bound is the sum over timesteps, here of one timestep times their
    number, and moves the variance only.
    """

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        drawn = add_noise(samples, alphas_cumprod, batch, generator, condition)
        noise, variance = model(drawn.noisy, drawn.timestep, *drawn.conditions).sample.chunk(2, dim=1)
        bound = variance_term(drawn.noise, noise.detach(), variance, drawn.timestep, alphas_cumprod).mean()
        return _noise_error(noise, drawn, alphas_cumprod) + VARIANCE_WEIGHT * len(alphas_cumprod) * bound

    return loss


def variance_term(
    noise: Float[Tensor, "k c h w"],
    predicted: Float[Tensor, "k c h w"],
    variance: Float[Tensor, "k c h w"],
    timestep: Int[Tensor, " k"],
    alphas_cumprod: Float[Tensor, " t"],
) -> Float[Tensor, "k c h w"]:
    """KL in nats of the denoising step's normal distribution from the true one, for the noise and the variance that were predicted.

    `variance` in [-1, 1] interpolates the logarithm between the posterior variance and beta.
    Source: Nichol & Dhariwal 2021, eq. 4 and 15. Both means are affine in the noise with the same factor, so only its error counts.
    *Differs*: 0 at timestep 0, whose term is a likelihood of 8-bit pixels; latents have none, and the last step draws no noise.
    """
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    beta = 1 - alphas_cumprod / before
    posterior = beta * (1 - before) / (1 - alphas_cumprod)  # 0 at timestep 0
    posterior[0] = posterior[1]

    def at(schedule: Tensor) -> Tensor:
        return schedule[timestep].view(-1, 1, 1, 1)

    share = (variance + 1) / 2
    log_variance = share * at(beta.log()) + (1 - share) * at(posterior.log())
    offset = at(beta / ((1 - alphas_cumprod).sqrt() * (1 - beta).sqrt())) * (predicted - noise)  # between the two means
    log_ratio = log_variance - at(posterior.log())
    divergence = 0.5 * (log_ratio - 1 + (-log_ratio).exp() + offset.square() * (-log_variance).exp())
    return divergence * (timestep > 0).view(-1, 1, 1, 1)


def classification_loss(samples: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], batch: int) -> StepLoss:
    """Cross-entropy on pictures shifted by up to two pixels and with a little noise, so that confidence is not brittle."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(samples), (batch,), generator=generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        pictures = samples[picked].roll(shift, dims=(2, 3))
        pictures = pictures + 0.1 * torch.rand(1, generator=generator) * torch.randn(pictures.shape, generator=generator)
        return nn.functional.cross_entropy(model(pictures), labels[picked], label_smoothing=0.02)

    return loss


def reconstruction_loss(pictures: UInt8[Tensor, "n size size"], batch: int) -> StepLoss:
    """Absolute error of pixels and of their differences, and the divergence of the latents from a standard normal.

    Source: Rombach et al. 2022 (arXiv 2112.10752), appendix G. *Differs*: no perceptual and no adversarial loss, which are for the
    texture of photographs; the error of differences keeps the edges of letters sharp.
    """

    def loss(model: Any, generator: torch.Generator) -> Tensor:
        clean = rgb_samples(pictures[torch.randint(len(pictures), (batch,), generator=generator)])
        posterior = model.encode(clean).latent_dist
        error = model.decode(posterior.sample(generator=generator)).sample - clean
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        total: Tensor = error.abs().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * divergence
        return total

    return loss

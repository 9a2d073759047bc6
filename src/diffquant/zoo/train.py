"""Training of the reference models: what each minimises, on the project's one optimisation loop.

A moving average of the weights is what is kept. A run that was killed and resumed is the same run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffquant.calibration.fit import Run, Schedule, fit

WARM_UP = 200  # steps
DECAY_SHARE = 0.2  # of the steps, at the end
FIRST_ROUND = 0.4  # of the steps, where there are two rounds
SECOND_PEAK = 0.5  # of the peak rate
EMA_DECAY = 0.999
SNR_CAP = 5.0  # gamma of min-SNR weighting
CURVE_STRIDE = 250  # steps over which the written loss curve is averaged

StepLoss = Callable[[nn.Module, torch.Generator], Tensor]


def warm_constant_decay(step: int, steps: int) -> float:
    """Warm-up, constant, linear decay over the last `DECAY_SHARE` of the steps; a share of the peak rate."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / max(1.0, DECAY_SHARE * steps))


def two_rounds(step: int, steps: int) -> float:
    """`warm_constant_decay` over the first round, then warm-up to half of the peak rate and a linear fall to zero."""
    first = round(FIRST_ROUND * steps)
    if step < first:
        return warm_constant_decay(step, first)
    return SECOND_PEAK * min((step - first + 1) / WARM_UP, (steps - step) / (steps - first))


def train(
    model: nn.Module,
    loss: StepLoss,
    *,
    steps: int,
    peak_rate: float,
    seed: int,
    run: Run,
    schedule: Schedule = warm_constant_decay,
) -> None:
    """Train `model` in place; it ends holding the moving average of its weights. `run.folder` keeps the state and ``losses.json``.

    Raises `CalibrationError` when the loss is not finite.
    """
    parameters = dict(model.named_parameters())
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def move_average(step: int) -> None:
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for name, parameter in parameters.items():
            average[name].lerp_(parameter.detach(), 1 - decay)

    curve = fit(
        [(parameter, peak_rate) for parameter in parameters.values()],
        lambda _, generator: loss(model, generator),
        iterations=steps,
        seed=seed,
        run=run,
        label="training",
        schedule=schedule,
        after_step=move_average,
        optimizer_type=partial(torch.optim.AdamW, weight_decay=1e-4),
        clip_norm=1.0,
        also_kept=average,
        save_every=CURVE_STRIDE,
    )
    if run.folder is not None:
        means = torch.tensor(curve).split(CURVE_STRIDE)
        rows = [{"step": index * CURVE_STRIDE + len(part), "loss": float(part.mean())} for index, part in enumerate(means)]
        (run.folder / "losses.json").write_text(json.dumps(rows, indent=1))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])


def denoising_loss(samples: Float[Tensor, "n c h w"], alphas_cumprod: Float[Tensor, " t"], batch: int) -> StepLoss:
    """Squared error of the predicted noise at random timesteps, with min-SNR weights.

    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 14; weights from Hang et al. 2023 (arXiv 2303.09556).
    """

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(samples), (batch,), generator=generator)
        timestep = torch.randint(len(alphas_cumprod), (batch,), generator=generator)
        clean = samples[picked]
        noise = torch.randn(clean.shape, generator=generator)
        signal = alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        snr = alphas_cumprod[timestep] / (1 - alphas_cumprod[timestep])
        weight = snr.clamp(max=SNR_CAP) / snr
        error = (model(noisy, timestep).sample - noise).square().mean(dim=(1, 2, 3))
        mean: Tensor = (weight * error).mean()
        return mean

    return loss


def classification_loss(samples: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], batch: int) -> StepLoss:
    """Cross-entropy on pictures shifted by up to two pixels and with a little noise, so that confidence is not brittle."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(samples), (batch,), generator=generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        pictures = samples[picked].roll(shift, dims=(2, 3))
        pictures = pictures + 0.1 * torch.rand(1, generator=generator) * torch.randn(pictures.shape, generator=generator)
        return nn.functional.cross_entropy(model(pictures), labels[picked], label_smoothing=0.02)

    return loss

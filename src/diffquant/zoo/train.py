"""Training of the reference models: one resumable loop, and what each model minimises.

Every random draw of a step comes from a generator seeded with (seed, step), so a run that was killed and resumed is the same run.
The learning rate warms up, stays constant, and falls linearly to zero over the last fifth of the steps; a moving average of the
weights is what is kept.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffquant.core.spec import ZooError

WARM_UP = 200  # steps
DECAY_SHARE = 0.2  # of the steps, at the end
EMA_DECAY = 0.999
SNR_CAP = 5.0  # min-SNR weighting, Hang et al. 2023 (arXiv 2303.09556), gamma = 5

StepLoss = Callable[[nn.Module, torch.Generator], Tensor]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, constant, linear decay over the last `DECAY_SHARE` of the steps."""
    warm = min(1.0, (step + 1) / WARM_UP)
    decay = min(1.0, (steps - step) / max(1.0, DECAY_SHARE * steps))
    return peak * min(warm, decay)


def train(
    model: nn.Module,
    loss: StepLoss,
    *,
    steps: int,
    peak_rate: float,
    seed: int,
    folder: Path,
    save_every: int = 500,
) -> nn.Module:
    """Train `model` in place for `steps` steps and return it holding the moving average of its weights.

    The state is kept in ``folder/state.safetensors`` every `save_every` steps and picked up again by the next call; the mean loss of
    each stretch is appended to ``folder/losses.jsonl``. Raises `ZooError` when the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, weight_decay=1e-4)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = _resume(folder, model, average, optimizer)
    total, begun = 0.0, time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(f"training {folder.name}", total=steps, completed=first)
        for step in range(first, steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak_rate)
            value = loss(model, torch.Generator().manual_seed(seed * 1_000_003 + step))
            if not torch.isfinite(value):
                raise ZooError(f"{folder.name}: loss is {value.item()} at step {step}; lower the learning rate")
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            for name, parameter in model.named_parameters():
                average[name].lerp_(parameter.detach(), 1 - decay)
            total += value.item()
            progress.update(task, completed=step + 1)
            if (step + 1) % save_every == 0 or step + 1 == steps:
                _save(folder, step + 1, model, average, optimizer)
                row = {"step": step + 1, "loss": total / save_every, "seconds": round(time.monotonic() - begun)}
                with (folder / "losses.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                total = 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(average[name])
    return model


def _save(folder: Path, step: int, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    temporary = folder / "state.safetensors.tmp"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"step": str(step)})
    os.replace(temporary, folder / "state.safetensors")
    (folder / "step.json").write_text(json.dumps({"step": step}))


def _resume(folder: Path, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put back a saved state; return the step to go on from (0 where nothing was saved)."""
    if not (folder / "state.safetensors").exists():
        return 0
    tensors = load_file(folder / "state.safetensors")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
            average[name].copy_(tensors[f"average.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, field = key.split(".")
            state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(state[0]["step"].item())


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
        return (weight * error).mean()

    return loss


def classification_loss(samples: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], batch: int) -> StepLoss:
    """Cross-entropy on pictures that are shifted by up to two pixels and carry a little noise, so that confidence is not brittle."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(samples), (batch,), generator=generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        pictures = samples[picked].roll(shift, dims=(2, 3))
        pictures = pictures + 0.1 * torch.rand(1, generator=generator) * torch.randn(pictures.shape, generator=generator)
        return nn.functional.cross_entropy(model(pictures), labels[picked], label_smoothing=0.02)

    return loss

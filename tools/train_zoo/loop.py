"""How the reference models are trained: the project's one optimisation loop with a learning rate schedule and averaged weights.

A moving average of the weights is the result. A run that was killed and resumed is the same run.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffquant.calibration.fit import Run, Schedule, fit

WARM_UP = 200  # steps
DECAY_SHARE = 0.2  # of the steps, at the end
FIRST_ROUND = 0.4  # of the steps, where there are two rounds
SECOND_PEAK = 0.5  # of the peak learning rate
EMA_DECAY = 0.999
CLIP_NORM, WEIGHT_DECAY = 1.0, 1e-4  # of gradients, and of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)
CURVE_STRIDE = 250  # steps over which the written loss curve is averaged

StepLoss = Callable[[nn.Module, torch.Generator], Tensor]


def warm_constant_decay(step: int, steps: int) -> float:
    """Warm-up, constant, linear decay over the last `DECAY_SHARE` of the steps; a share of the peak learning rate."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / max(1.0, DECAY_SHARE * steps))


def two_rounds(step: int, steps: int) -> float:
    """`warm_constant_decay` over the first round, then warm-up to half of the peak learning rate and a linear fall to zero."""
    first = round(FIRST_ROUND * steps)
    if step < first:
        return warm_constant_decay(step, first)
    return SECOND_PEAK * min((step - first + 1) / WARM_UP, (steps - step) / (steps - first))


def train(
    model: nn.Module,
    loss: StepLoss,
    *,
    steps: int,
    peak_lr: float,
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

    def clipped_and_decayed(iteration: int, generator: torch.Generator) -> Tensor:
        """The loss, after its clipped gradient and AdamW's weight decay were applied to the parameters."""
        value = loss(model, generator)
        value.backward()
        nn.utils.clip_grad_norm_(parameters.values(), CLIP_NORM)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(1 - peak_lr * schedule(iteration, steps) * WEIGHT_DECAY)
        return value.detach()

    curve = fit(
        [(parameter, peak_lr) for parameter in parameters.values()],
        clipped_and_decayed,
        iterations=steps,
        seed=seed,
        run=run,
        label="training",
        schedule=schedule,
        after_iteration=move_average,
        also_saved=average,
        save_every=CURVE_STRIDE,
    )
    if run.folder is not None:
        means = torch.tensor(curve).split(CURVE_STRIDE)
        rows = [{"step": index * CURVE_STRIDE + len(part), "loss": float(part.mean())} for index, part in enumerate(means)]
        (run.folder / "losses.json").write_text(json.dumps(rows, indent=1))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])

"""Which layers a quantized model will pay for, and when: what each quantizer alone adds to the last sample, by sampling step.

It takes ranges and a few trajectories, so it comes before the hours of learning that a recipe may take; or after some of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from diffquant.calibration import fit
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.rollout import conditional_half
from diffquant.core.attention import ATTRIBUTE as PRODUCTS
from diffquant.core.model import quantizers
from diffquant.core.quantizer import Quantizer
from diffquant.files import write_text
from diffquant.host.denoiser import prepare
from diffquant.host.pipeline import Host, Pipeline
from diffquant.host.structure import first_with_guidance_sets
from diffquant.methods.ranges import CalibrateRanges
from diffquant.methods.sensitivity import changes_of_last_samples, relative
from diffquant.quantization import pass_names, plan_on, restore_passes
from diffquant.recipe import Recipe, load_recipe

TRAJECTORIES = 16


@dataclass(frozen=True)
class QuantizerSensitivity:
    """What one quantizer alone does to the last sample, squared, in parts of the sum over all quantizers.

    ``share``: at all steps; the shares of all quantizers sum to 1. ``by_step``: at each step alone, in the same parts. Where the
    errors of steps are independent these sum to ``share``; where they point the same way ``share`` is larger.
    """

    layer: str
    operand: str
    bits: int
    share: float
    by_step: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """Every quantizer of a recipe's plan in the model's order, and the timesteps of the sampling steps.

    ``passes``: what was learned before. What is learned together, such as the rounding of a block, makes up for each other's
    errors, which shares of single quantizers do not show.
    """

    recipe: str
    passes: tuple[str, ...]
    trajectories: int
    timesteps: tuple[float, ...]
    rows: tuple[QuantizerSensitivity, ...]

    @property
    def uncertainty(self) -> float:
        """Relative standard deviation of a share, as one random direction for each trajectory leaves it."""
        return math.sqrt(2 / self.trajectories)

    def of_layer(self, name: str, weight: bool) -> float | None:
        """The share of a layer's weight, or of its inputs together; None where those are not quantized."""
        found = [row.share for row in self.rows if row.layer == name and (row.operand == "weight") == weight]
        return sum(found) if found else None

    def write(self, path: Path) -> None:
        """Write it as JSON, shares to four digits."""
        rows = [
            asdict(row) | {"share": _rounded(row.share), "by_step": [_rounded(one) for one in row.by_step]} for row in self.rows
        ]
        write_text(path, json.dumps(asdict(self) | {"rows": rows}))


def sensitivity(
    pipe: Pipeline,
    recipe: str | Recipe,
    data: Trajectory,
    *,
    trajectories: int = TRAJECTORIES,
    checkpointing: bool = False,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """What each quantizer that `recipe` plans adds to the last samples of recorded `trajectories`, to first order.

    Ranges are those of the recipe's first `CalibrateRanges`, and weights round to nearest, where the recipe may learn better; with
    a `folder` in which `quantize` has finished passes of the recipe, on the same `data` and `seed`, what these left is measured.
    Each trajectory takes about three forward passes a step. The model of `pipe` stays as it is: a copy of its denoiser is measured,
    with ``checkpointing`` in the memory of one block's graph more. With `folder` a killed run goes on where it stopped.

    Raises `SpecError` where a pattern of the recipe matches nothing, `CalibrationError` when `data` was recorded with another model
    or cannot be replayed.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    model = Host(pipe).denoiser
    data.verify(model)
    rows = plan_on(model, recipe, data)
    conditional = None if first_with_guidance_sets(rows) is None else conditional_half(data)
    model = copy.deepcopy(model)
    prepare(model, rows, data.timesteps, conditional)
    names = pass_names(recipe, rows, seed, data)
    done = [] if folder is None else list(takewhile(lambda name: (folder / f"{name}.safetensors").exists(), names))
    generator = torch.Generator().manual_seed(seed)
    found = dict(quantizers(model))
    steps = recipe.steps()
    with fit.run(folder, progress) as run:
        if folder is not None:
            restore_passes(model, folder, done)
        if not any(isinstance(step, CalibrateRanges) for step in steps[: len(done)]):
            ranges = next((step for step in steps if isinstance(step, CalibrateRanges)), CalibrateRanges())
            ranges.apply(model, data, generator, run)
        given = [names[:1], done, trajectories, *(repr(quantizer.spec) for quantizer in found.values())]
        below = run.below(f"sensitivity-{hashlib.sha256(json.dumps(given).encode()).hexdigest()[:12]}")
        changes = changes_of_last_samples(model, found, data, trajectories, generator, below, checkpointing)
    return Sensitivity(
        recipe=recipe.full_name,
        passes=tuple(type(step).__name__ for step in steps[: len(done)]),
        trajectories=len(changes),
        timesteps=tuple(data.step_timesteps),
        rows=_rows(found, changes),
    )


def _rounded(share: float) -> float:
    return float(f"{share:.4g}")


def _rows(found: dict[str, Quantizer], changes: Float[Tensor, "trajectories quantizers steps"]) -> tuple[QuantizerSensitivity, ...]:
    """Trajectories count alike, however far one of them magnifies errors."""
    parts = relative(changes)
    share, by_step = parts.sum(dim=2).square().mean(dim=0), parts.square().mean(dim=0)
    rows = []
    for (name, quantizer), all_steps, steps in zip(found.items(), share.tolist(), by_step.tolist(), strict=True):
        layer, _, operand = name.rpartition(".")
        layer, operand = layer.removesuffix(f".{PRODUCTS}"), operand.removesuffix("_quantizer")
        rows.append(QuantizerSensitivity(layer, operand, quantizer.spec.bits, all_steps, tuple(steps)))
    return tuple(rows)

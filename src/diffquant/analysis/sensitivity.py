"""Sensitivity: the error of the last sample that each quantizer alone causes, by sampling step.

It takes ranges and a few trajectories, so it can be measured before the hours of learning that a recipe may take, or after some.
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
from diffquant.calibration.replay import conditional_half
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
    """The squared error of the last sample that one quantizer alone causes, relative to the sum over all quantizers.

    ``share``: at all steps; the shares of all quantizers sum to 1. ``by_step``: at each step alone, relative to the same sum. These
    sum to ``share`` if the errors of steps are independent; if they point in one direction ``share`` is larger.
    """

    layer: str
    operand: str
    bits: int
    share: float
    by_step: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """Every quantizer of a recipe's plan in the model's order, and the timesteps of the sampling steps.

    ``passes``: the passes that were applied before. Parameters that are learned together, such as the rounding of a block,
    compensate each other's errors, which shares of single quantizers do not show.
    """

    recipe: str
    passes: tuple[str, ...]
    trajectories: int
    timesteps: tuple[float, ...]
    rows: tuple[QuantizerSensitivity, ...]

    @property
    def uncertainty(self) -> float:
        """Relative standard deviation of a share, from one random direction for each trajectory."""
        return math.sqrt(2 / self.trajectories)

    def of_layer(self, name: str, weight: bool) -> float | None:
        """The share of a layer's weight, or of its inputs together; None if those are not quantized."""
        shares = [row.share for row in self.rows if row.layer == name and (row.operand == "weight") == weight]
        return sum(shares) if shares else None

    def write(self, path: Path) -> None:
        """Write it as JSON, shares to four digits."""

        def rounded(share: float) -> float:
            return float(f"{share:.4g}")

        rows = [asdict(row) | {"share": rounded(row.share), "by_step": [*map(rounded, row.by_step)]} for row in self.rows]
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
    """The error of the last samples of recorded `trajectories` that each quantizer of `recipe` causes, to first order.

    Ranges are those of the recipe's first `CalibrateRanges`, and weights round to nearest. If `quantize` has finished passes of the
    recipe in `folder`, on the same `data` and `seed`, their result is measured instead. Each trajectory takes about three forward
    passes a step. A copy of the denoiser is measured; ``checkpointing`` limits the additional memory to the graph of one block. An
    interrupted run with a `folder` resumes.

    Raises `SpecError` if a pattern of the recipe matches nothing, and `CalibrationError` if `data` was recorded with another model
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
    by_name = dict(quantizers(model))
    passes = recipe.built_passes()
    with fit.run(folder, progress) as run:
        if folder is not None:
            restore_passes(model, folder, done)
        if not any(isinstance(each, CalibrateRanges) for each in passes[: len(done)]):
            ranges = next((each for each in passes if isinstance(each, CalibrateRanges)), CalibrateRanges())
            ranges.apply(model, data, generator, run)
        key = [names[:1], done, trajectories, *(repr(quantizer.spec) for quantizer in by_name.values())]
        below = run.below(f"sensitivity-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}")
        changes = changes_of_last_samples(model, by_name, data, trajectories, generator, below, checkpointing)
    return Sensitivity(
        recipe=recipe.full_name,
        passes=tuple(type(each).__name__ for each in passes[: len(done)]),
        trajectories=len(changes),
        timesteps=tuple(data.step_timesteps),
        rows=_rows(by_name, changes),
    )


def _rows(
    by_name: dict[str, Quantizer], changes: Float[Tensor, "trajectories quantizers steps"]
) -> tuple[QuantizerSensitivity, ...]:
    """Trajectories have equal weight, however much they amplify errors."""
    parts = relative(changes)
    share, by_step = parts.sum(dim=2).square().mean(dim=0), parts.square().mean(dim=0)
    rows = []
    for (name, quantizer), all_steps, steps in zip(by_name.items(), share.tolist(), by_step.tolist(), strict=True):
        layer, _, operand = name.rpartition(".")
        layer, operand = layer.removesuffix(f".{PRODUCTS}"), operand.removesuffix("_quantizer")
        rows.append(QuantizerSensitivity(layer, operand, quantizer.spec.bits, all_steps, tuple(steps)))
    return tuple(rows)

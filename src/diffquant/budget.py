"""A recipe and a recording that fit into a number of minutes, by what one call of the model takes here; and what that gives up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from diffquant.calibration.timing import Timing
from diffquant.errors import CalibrationError
from diffquant.files import digest_of_json, renamed_when_done
from diffquant.host.conditions import Calibration
from diffquant.host.structure import unit_count
from diffquant.recipe import Recipe, load_recipe

SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.18, 0.125)  # of iterations, samples and trajectories; with fewer, ranges alone do as well
LEAST_TRAJECTORIES = 16
FALLBACK = "mse"  # the recipe that learns nothing


class Budget(BaseModel):
    """A recipe, how to record for it (None: that is done), about how many seconds both take, and what was given up, in words."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    recipe: Recipe
    calibration: Calibration | None
    seconds: float
    given_up: tuple[str, ...]


def recipe_forwards(recipe: Recipe, model: nn.Module) -> float:
    """About how many times one sample goes through `model` in the passes of `recipe`."""
    return sum(step.sample_forwards(unit_count(model)) for step in recipe.steps())


def within(
    minutes: float, recipe: Recipe, calibration: Calibration | None, model: nn.Module, timing: Timing, exchange: bool
) -> Budget:
    """The most of `recipe` and `calibration` that fits into `minutes`; with `exchange`, failing that, ranges alone.

    `calibration` is None where a recording is given. Raises `CalibrationError` where nothing fits, naming what would.
    """
    recipes = [recipe]
    if exchange:
        recipes.append(load_recipe(f"{FALLBACK}-{recipe.bits}"))
    least = float("inf")
    for budget in _budgets(recipes, calibration, model, timing):
        if budget.seconds <= 60 * minutes:
            return budget
        least = min(least, budget.seconds)
    raise CalibrationError(f"minutes: {minutes:g} are too few for {recipe.full_name} here; about {least / 60:.2g} are the least")


def remembered(path: Path | None, asked: dict[str, Any], found: Callable[[], Budget]) -> Budget:
    """What was `found` for what is `asked`, or in an earlier run: times differ, and a killed run has to go on with the same.

    Raises `CalibrationError` where `path` cannot be read.
    """
    key = digest_of_json(asked)
    if path is not None and path.is_file():
        try:
            kept = json.loads(path.read_text())
            if kept["asked"] == key:
                return Budget.model_validate(kept["budget"])
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{path}: damaged ({type(error).__name__}); delete it to choose again") from error
    budget = found()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with renamed_when_done(path) as partial:
            partial.write_text(json.dumps({"asked": key, "budget": budget.model_dump(mode="json")}))
    return budget


def _budgets(recipes: list[Recipe], calibration: Calibration | None, model: nn.Module, timing: Timing) -> Iterator[Budget]:
    whole = recipe_forwards(recipes[0], model) * timing.seconds
    for recipe in recipes:
        exchanged = () if recipe is recipes[0] else (f"{recipes[0].full_name}, which takes {whole / 60:.2g} minutes",)
        for share in SHARES:
            thinned = recipe.thinned(share)
            recorded = calibration if calibration is None else _fewer(calibration, share)
            given_up = [*exchanged, *_differences(recipe, thinned)]
            if recorded is not None and calibration is not None and recorded.samples < calibration.samples:
                given_up.append(f"recording: {recorded.samples} of {calibration.samples} trajectories")
            seconds = recipe_forwards(thinned, model) * timing.seconds
            seconds += 0.0 if recorded is None else timing.recording(recorded)
            yield Budget(recipe=thinned, calibration=recorded, seconds=seconds, given_up=tuple(given_up))


def _fewer(calibration: Calibration, share: float) -> Calibration:
    samples = min(calibration.samples, max(LEAST_TRAJECTORIES, round(calibration.samples * share)))
    return dataclasses.replace(calibration, samples=samples)


def _differences(whole: Recipe, thinned: Recipe) -> Iterator[str]:
    for index, (before, after) in enumerate(zip(whole.steps(), thinned.steps(), strict=True)):
        changed = [f"{name} {getattr(after, name)} of {value}" for name, value in before if getattr(after, name) != value]
        if changed:
            yield f"passes.{index} {type(before).__name__}: {', '.join(changed)}"

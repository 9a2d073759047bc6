"""A recipe and a recording that fit into a number of minutes, by what one call of the model takes here; and what that gives up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from diffquant.calibration.timing import Timing, Work
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


def recipe_work(recipe: Recipe, model: nn.Module) -> Work:
    """About how many times one sample goes through `model` in the passes of `recipe`."""
    return sum((each.work(unit_count(model)) for each in recipe.built_passes()), start=Work())


def within(
    minutes: float, recipe: Recipe, calibration: Calibration | None, model: nn.Module, timing: Timing, exchange: bool
) -> Budget:
    """The most of `recipe` and `calibration` that fits into `minutes`; with `exchange`, failing that, ranges alone.

    `calibration` is None where a recording is given. Raises `CalibrationError` where nothing fits, naming what would.
    """
    budgets = list(_budgets(recipe, exchange, calibration, model, timing))
    for budget in budgets:
        if budget.seconds <= 60 * minutes:
            return budget
    least = min(budget.seconds for budget in budgets) / 60
    raise CalibrationError(f"minutes: {minutes:g} are too few for {recipe.full_name} here; about {least:.2g} are the least")


def remembered(path: Path | None, request: dict[str, Any], choose: Callable[[], Budget]) -> Budget:
    """The budget of an earlier run in `path` for the same `request`, so that a killed run goes on with it, or what `choose` gives.

    Raises `CalibrationError` where `path` cannot be read.
    """
    key = digest_of_json(request)
    if path is not None and path.is_file():
        try:
            saved = json.loads(path.read_text())
            if saved["asked"] == key:
                return Budget.model_validate(saved["budget"])
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{path}: damaged ({type(error).__name__}); delete it to choose again") from error
    budget = choose()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with renamed_when_done(path) as partial:
            partial.write_text(json.dumps({"asked": key, "budget": budget.model_dump(mode="json")}))
    return budget


def _budgets(whole: Recipe, exchange: bool, calibration: Calibration | None, model: nn.Module, timing: Timing) -> Iterator[Budget]:
    """The shares of `whole`, then with `exchange` those of ranges alone."""
    takes = f"{whole.full_name}, which takes {timing.seconds(recipe_work(whole, model)) / 60:.2g} minutes"
    recipes: list[tuple[Recipe, list[str]]] = [(whole, [])]
    if exchange:
        recipes.append((load_recipe(f"{FALLBACK}-{whole.bits}"), [takes]))
    for recipe, exchanged in recipes:
        for share in SHARES:
            thinned, fewer = recipe.thinned(share), calibration
            given_up = [*exchanged, *_differences(recipe, thinned)]
            seconds = timing.seconds(recipe_work(thinned, model))
            if calibration is not None:
                samples = min(calibration.samples, max(LEAST_TRAJECTORIES, round(calibration.samples * share)))
                fewer = dataclasses.replace(calibration, samples=samples)
                seconds += timing.recording(fewer)
                if samples < calibration.samples:
                    given_up.append(f"recording: {samples} of {calibration.samples} trajectories")
            yield Budget(recipe=thinned, calibration=fewer, seconds=seconds, given_up=tuple(given_up))


def _differences(whole: Recipe, thinned: Recipe) -> Iterator[str]:
    for index, (before, after) in enumerate(zip(whole.built_passes(), thinned.built_passes(), strict=True)):
        changed = [f"{name} {getattr(after, name)} of {value}" for name, value in before if getattr(after, name) != value]
        if changed:
            yield f"passes.{index} {type(before).__name__}: {', '.join(changed)}"

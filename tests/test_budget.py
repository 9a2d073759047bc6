"""Recipes that fit into minutes: what is thinned, what gives way, and that a killed run goes on with what it had."""

import json
import logging
from pathlib import Path

import pytest

import diffquant as dq
import pipelines
from diffquant.budget import LEAST_TRAJECTORIES, Budget, recipe_work, remembered, within
from diffquant.calibration.timing import Timing, timed
from diffquant.errors import CalibrationError

SLOW = Timing(forward=0.1, backward=0.3, activation_bytes=0.0, operations={}, rows=1)
RECORDED = dq.Calibration(samples=64)


def found(minutes: float, exchange: bool = True, calibration: dq.Calibration | None = RECORDED) -> Budget:
    return within(minutes, dq.load_recipe("brecq-w4a8"), calibration, pipelines.micro().unet, SLOW, exchange)


def test_with_time_enough_nothing_is_given_up() -> None:
    budget = found(10_000)
    assert not budget.given_up and budget.calibration == RECORDED
    assert budget.recipe.built_passes() == dq.load_recipe("brecq-w4a8").built_passes()
    work = recipe_work(budget.recipe, pipelines.micro().unet)
    assert work.forwards > work.backwards > 0
    assert budget.seconds == pytest.approx(0.1 * (work.forwards + 64 * 20) + 0.3 * work.backwards)  # the same sum


def test_with_less_it_is_thinner_and_says_so() -> None:
    whole = found(10_000).seconds / 60
    budget = found(whole / 2)
    assert budget.recipe.full_name == "brecq-w4a8" and whole / 8 < budget.seconds / 60 <= whole / 2
    first, learned = budget.recipe.passes[0], budget.recipe.passes[1]
    assert learned["iterations"] < 500 and first["samples"] < 512
    assert f"passes.1 ReconstructRounding: iterations {learned['iterations']} of 500" in "; ".join(budget.given_up)
    assert budget.calibration is not None and LEAST_TRAJECTORIES <= budget.calibration.samples < 64
    assert f"recording: {budget.calibration.samples} of 64 trajectories" in budget.given_up


def test_learning_gives_way_only_in_a_recipe_that_was_not_asked_for() -> None:
    budget = found(1.0)
    assert budget.recipe.full_name == "mse-w4a8" and budget.given_up[0].startswith("brecq-w4a8, which takes")
    with pytest.raises(CalibrationError, match=r"minutes: 1 are too few for brecq-w4a8 here; about .* are the least"):
        found(1.0, exchange=False)
    assert found(1.0, calibration=None).calibration is None


def test_a_later_run_takes_what_the_first_one_found(tmp_path: Path) -> None:
    place, budgets = tmp_path / "a" / "minutes.json", iter([found(10_000), found(100)])
    first = remembered(place, {"minutes": 5}, lambda: next(budgets))
    assert remembered(place, {"minutes": 5}, lambda: next(budgets)) == first
    assert remembered(place, {"minutes": 6}, lambda: next(budgets)) != first
    place.write_text(json.dumps({"asked": 1}))
    remembered(tmp_path / "b.json", {}, lambda: first)
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(CalibrationError, match="damaged"):
        remembered(tmp_path / "b.json", {}, lambda: first)


def test_quantize_within_minutes(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    pipe = pipelines.micro()
    whole = timed(pipe).seconds(recipe_work(dq.load_recipe("brecq-w4a8"), pipe.unet)) / 60
    few = dq.Calibration(samples=4, steps=2, batch_size=4)
    with caplog.at_level(logging.WARNING):
        report = dq.quantize(pipe, data=few, minutes=whole / 40, folder=tmp_path, progress=False)
    assert report.given_up and "given up: " in caplog.text and f"of {whole / 40:g} minutes here" in caplog.text
    assert (tmp_path / "minutes.json").is_file()
    with pytest.raises(CalibrationError, match="is no pipeline, whose calls could be timed"):
        dq.quantize(pipelines.micro().unet, data=dq.record(pipelines.micro(), few, progress=False), minutes=1)


def test_timing_counts_the_halves_of_a_guided_call(tmp_path: Path) -> None:
    assert timed(pipelines.micro()).rows == 1
    assert timed(pipelines.stable_diffusion(tmp_path)).rows == 2

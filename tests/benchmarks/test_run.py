"""The runner of studies: a small study runs, goes on where it was killed, and its rows say what they are of."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STUDIES = sorted((BENCHMARKS / "studies").glob("*.yaml"))
SMALL = ["recording.samples=2", "recording.steps=4", "evaluation.samples=4", "evaluation.steps=4", "evaluation.single_steps=1"]


@pytest.fixture
def module(monkeypatch):
    """Modules of benchmarks/ by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def refuse(*arguments, **options):
    raise AssertionError("is done again")


def test_a_study_runs_and_goes_on_where_it_was_killed(module, tmp_path, monkeypatch):
    run, rows, measure = module("run"), module("rows"), module("measure")
    command = [
        str(BENCHMARKS / "studies" / "smoke.yaml"),
        "--results",
        str(tmp_path),
        "--work",
        str(tmp_path / "work"),
        "--set",
        *SMALL,
    ]
    run.main(command)
    file = tmp_path / "smoke.csv"
    written = file.read_bytes()
    minmax, mse = rows.read(file)
    assert (minmax["recipe"], mse["options"]) == ("minmax", "CalibrateRanges.samples=32 CalibrateRanges.candidates=10")
    assert minmax["protocol"] == "sampler=DDIM steps=4 eta=0 guidance=default clip=yes seed=1000"
    assert minmax["recording"] == "samples=2 steps=4" and minmax["samples"] == 4
    for row in (minmax, mse):
        assert all(row[column] for column in rows.PROVENANCE) and "torch" in row["versions"]
        assert row["final_error_low"] <= row["final_error"] <= row["final_error_high"]
        assert row["seconds_calibration"] > 0 and row["seconds_a_picture"] > 0 and row["single_step_error"] > 0
        # half precision has eleven bits
        assert float(rows.errors_of(file)[rows.label(row)].mean()) == pytest.approx(row["final_error"], rel=2**-11)

    monkeypatch.setattr(run.dq, "quantize", refuse)  # finished arms are in the CSV file
    with monkeypatch.context() as patched:
        patched.setattr(measure, "compared", refuse)
        run.main(command)
    assert file.read_bytes() == written

    rows.write(file, [minmax])  # killed before the second row: its checkpoint is in --work
    run.main(command)
    again = rows.read(file)
    assert [row["recipe"] for row in again] == ["minmax", "mse"]
    assert again[1]["final_error"] == mse["final_error"]


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_study_describes_arms_that_exist(file, module):
    study = module("study")
    described = study.load(file)
    assert described.name == file.stem and described.question.endswith("?")
    for cell in described.cells():
        study.recipe_of(cell.arm, cell.bits)


def test_what_a_study_or_an_arm_has_not_is_said(module, tmp_path):
    study = module("study")
    smoke = BENCHMARKS / "studies" / "smoke.yaml"
    with pytest.raises(study.StudyError, match="recording.sample: Extra inputs.*the keys of a study are those of"):
        study.load(smoke, ["recording.sample=2"])
    with pytest.raises(study.StudyError, match="--set 'name.a=1': leads to no key"):
        study.load(smoke, ["name.a=1"])
    with pytest.raises(study.StudyError, match="no pass LearnScales; it has CalibrateRanges; name one of them"):
        study.recipe_of("mse drop=LearnScales", "w4a8")
    with pytest.raises(study.StudyError, match="DDIMScheduler has no clip"):
        study.pipeline("glyph-ddim", {"clip": False})


def test_arms_drop_insert_and_change(module):
    study = module("study")
    recipe = study.recipe_of("brecq insert=LearnScales:AccuQuant,iterations=3 drop=ReconstructRounding layers.0.sets=5", "w4a6")
    assert [options["pass"] for options in recipe.passes] == ["CalibrateRanges", "AccuQuant", "LearnScales"]
    assert recipe.passes[1]["iterations"] == 3 and recipe.layers[0].sets == 5 and str(recipe.bits) == "w4a6"

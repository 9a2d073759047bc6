"""Evaluations under many settings: each as if alone, resumed, refused where a pipeline cannot be sampled so."""

from __future__ import annotations

import copy
import dataclasses
import io
import json

import pytest
import torch
from PIL import Image
from rich.console import Console

import diffquant as dq
from diffquant.analysis import robustness as module
from diffquant.analysis.drawing import draw_matrix
from diffquant.analysis.robustness import Robustness
from diffquant.errors import EvaluationError, SpecError
from diffquant.sampling.protocol_files import varied_fields
from tests import pipelines

PROTOCOL = dq.SamplingProtocol(samples=4, batch_size=4, seed=3, trajectory_samples=2)
VARY = {"sampler": ("pipeline", "ddpm"), "eta": (0.0, 1.0), "steps": (2, 3)}


@pytest.fixture(scope="module")
def full():
    return pipelines.micro()


@pytest.fixture(scope="module")
def worse(full):
    other = copy.deepcopy(full)
    with torch.no_grad():
        other.unet.conv_out.weight *= 1.1
    return other


@pytest.fixture(scope="module")
def finished(full, worse, tmp_path_factory) -> tuple[Robustness, object]:
    out = tmp_path_factory.mktemp("robustness")
    return dq.robustness({"same": full, "worse": worse}, full, vary=VARY, protocol=PROTOCOL, out=out), out


def test_every_combination_is_an_evaluation_of_its_own(finished, full, worse):
    result, _ = finished
    assert [tuple(cell.settings.values()) for cell in result.cells] == [
        (sampler, eta, steps) for sampler in VARY["sampler"] for eta in VARY["eta"] for steps in VARY["steps"]
    ]
    protocol = dq.SamplingProtocol(
        samples=4, batch_size=4, seed=3, trajectory_samples=2, accumulation_samples=0, sampler="ddpm", steps=3
    )
    alone = dq.evaluate({"same": full, "worse": worse}, full, protocol=protocol)
    (cell,) = (cell for cell in result.cells if cell.settings == {"sampler": "ddpm", "eta": 0.0, "steps": 3})
    assert cell.report.protocol == alone.protocol
    assert [row.figures for row in cell.report.measurements] == [row.figures for row in alone.measurements]
    same, other = (row.figures["final_error"] for row in cell.report.measurements[1:])
    assert same.value == 0 < other.value


def test_what_the_pipeline_cannot_do_is_part_of_the_result(finished):
    result, _ = finished
    assert result.refusals() == {
        "protocol.eta: is 1.0; DDPMScheduler takes none; use sampler ddim, or eta 0": [
            "sampler=ddpm,eta=1.0,steps=2",
            "sampler=ddpm,eta=1.0,steps=3",
        ]
    }
    assert "- sampler=ddpm,eta=1.0,steps=2, sampler=ddpm,eta=1.0,steps=3: protocol.eta: is 1.0;" in result.markdown()


def test_tables_have_a_column_for_each_value_of_the_last_setting(finished):
    result, _ = finished
    lines = result.markdown().splitlines()
    assert lines[2].startswith("4 samples. Final error: mean relative L2") and lines[4] == "## Final error"
    assert "| sampler | eta | model | steps=2 | steps=3 |" in lines
    assert "| --- | --- | --- | ---: | ---: |" in lines
    error = result.cells[1].report.measurements[2].figures["final_error"]
    row = next(line for line in lines if line.startswith("|  |  | worse |"))
    assert row.endswith(f"| {error.value:.3f} [{error.low:.3f}, {error.high:.3f}] |")
    assert "| ddpm | 1.0 | same | - | - |" in lines
    assert "FID" not in result.markdown()  # nothing measured it
    printed = io.StringIO()
    Console(file=printed, width=120).print(result.table())
    assert "steps=3" in printed.getvalue() and "worse" in printed.getvalue()


def test_what_is_written(finished):
    result, out = finished
    names = {path.name for path in out.iterdir()}
    measured = {cell.name for cell in result.cells if cell.report}
    assert names == {"robustness.json", "robustness.md", "robustness.png"} | measured and len(measured) == 6
    assert (out / "sampler=ddpm,eta=0.0,steps=2" / "pairs.png").exists()
    assert (out / "robustness.md").read_text() == result.markdown()
    back = Robustness.model_validate_json((out / "robustness.json").read_text())
    assert back.markdown() == result.markdown()
    same = json.loads((out / "robustness.json").read_text())["cells"][0]["report"]["measurements"][1]
    assert same["figures"]["psnr"]["value"] == "Infinity"  # JSON has no number for it


def test_a_killed_run_goes_on(full, worse, tmp_path, monkeypatch):
    calls = []

    def evaluate(named, reference, *, protocol, **options):
        calls.append(protocol.steps)
        if protocol.steps == stop:
            raise KeyboardInterrupt
        return dq.evaluate(named, reference, protocol=protocol, **options)

    monkeypatch.setattr(module, "evaluate", evaluate)
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        dq.robustness(worse, full, vary={"steps": (2, 3)}, protocol=PROTOCOL, out=tmp_path)
    saved = Robustness.model_validate_json((tmp_path / "robustness.json").read_text())
    assert [cell.settings for cell in saved.cells] == [{"steps": 2}] and "steps=3" in saved.markdown()
    stop = None
    whole = dq.robustness(worse, full, vary={"steps": (2, 3, 4)}, protocol=PROTOCOL, out=tmp_path)
    assert calls == [2, 3, 3, 4] and whole.cells[0] == saved.cells[0]
    fewer = dq.robustness(worse, full, vary={"steps": (4,)}, protocol=PROTOCOL, out=tmp_path)
    assert calls == [2, 3, 3, 4] and "steps=3" not in fewer.markdown() + str(fewer.refusals())
    assert {cell.name for cell in fewer.cells} == {"steps=2", "steps=3", "steps=4"}  # for the next run
    written = (tmp_path / "robustness.json").read_text()
    for model, protocol in ((full, PROTOCOL), (worse, dataclasses.replace(PROTOCOL, samples=3))):
        with pytest.raises(EvaluationError, match="robustness.json: is of other models or another protocol; choose a new folder"):
            dq.robustness(model, full, vary={"steps": (2,)}, protocol=protocol, out=tmp_path)
    assert calls == [2, 3, 3, 4] and (tmp_path / "robustness.json").read_text() == written
    (tmp_path / "robustness.json").write_text("{}")
    with pytest.raises(EvaluationError, match="robustness.json: is damaged or of another version; choose a new folder"):
        dq.robustness(worse, full, vary={"steps": (2,)}, protocol=PROTOCOL, out=tmp_path)


def test_one_setting_alone(full, worse):
    result = dq.robustness(worse, full, vary={"seed": (1, 2)}, protocol=PROTOCOL)
    assert result.markdown().splitlines()[6].startswith("| model | seed=1 | seed=2 |")
    first, second = (cell.report.measurements[1].figures["final_error"] for cell in result.cells)
    assert first != second


def test_a_correction_that_was_fitted_elsewhere_is_part_of_the_result(full, worse, monkeypatch):
    def refuse(*arguments, **options):
        raise SpecError("correction: it was fitted on DDIMScheduler, 4 steps")

    monkeypatch.setattr(module, "evaluate", refuse)
    result = dq.robustness(worse, full, vary={"steps": (2, 3)}, protocol=PROTOCOL)
    assert result.refusals() == {"correction: it was fitted on DDIMScheduler, 4 steps": ["steps=2", "steps=3"]}
    assert result.models == []


def test_sizes(full, worse):
    result = dq.robustness(worse, full, vary={"height": (8, 16), "width": (16,)}, protocol=PROTOCOL)
    assert [cell.report.pictures["quantized"].shape[2:] for cell in result.cells] == [(8, 16), (16, 16)]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({"samples": (1, 2)}, "vary.samples: cannot be varied; allowed are sampler, steps, eta"),
        ({"steps": ()}, "vary.steps: is empty; give values that differ"),
        ({"steps": (2, 2)}, "vary.steps: is 2, 2; give values that differ"),
        ({"sampler": ("pipeline", "eular")}, 'protocol.sampler: is "eular"; allowed: pipeline, ddim'),
    ],
)
def test_what_cannot_be_varied(vary, message, full, monkeypatch):
    monkeypatch.setattr(module, "evaluate", lambda *arguments, **options: pytest.fail("evaluated before all was checked"))
    with pytest.raises(EvaluationError, match=message):
        dq.robustness(full, full, vary=vary)


def test_values_of_the_command_line():
    assert varied_fields(["steps=10, 20", "sampler=ddpm", "eta=0,1", "clip_sample=false"]) == {
        "steps": (10, 20),
        "sampler": ("ddpm",),
        "eta": (0.0, 1.0),
        "clip_sample": (False,),
    }
    for text, message in {
        "steps": "--vary 'steps': a field and its values are allowed, such as steps=10,20,50",
        "steps=": "--vary 'steps=': a field",
        "steps=10,a": "--vary steps: is 10,a: Input should be a valid integer",
        "calibration.steps=1": "--vary calibration.steps: is no field of a protocol; allowed are samples, steps",
    }.items():
        with pytest.raises(EvaluationError, match=message):
            varied_fields([text])
    with pytest.raises(EvaluationError, match="--vary steps: is given twice"):
        varied_fields(["steps=1", "steps=2"])


def test_blank_cells_are_drawn():
    picture = draw_matrix(
        {"a": [[0.1, None], [0.2, 0.4]], "b": [[None, None], [None, None]]}, ("sampler", ["x", "y"]), ("steps", ["1", "2"])
    )
    assert isinstance(picture, Image.Image) and picture.width > 300
    colors = {pixel for _, pixel in picture.getcolors(picture.width * picture.height)}
    assert (8, 48, 107) in colors  # the end of the scale, for the largest error

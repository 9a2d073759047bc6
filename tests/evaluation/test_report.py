"""Reports: written, read back, refused where they do not compare."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from diffquant import files
from diffquant.errors import CalibrationError, EvaluationError
from diffquant.evaluation import drawing, grids
from diffquant.evaluation.accumulation import Accumulation, Stretch
from diffquant.evaluation.compare import Comparison
from diffquant.evaluation.distances import FrechetDistance, KernelDistance
from diffquant.evaluation.intervals import Interval
from diffquant.evaluation.measurement import Measurement
from diffquant.evaluation.metrics.fid import Fid
from diffquant.evaluation.metrics.fid_by_step import StepDistance
from diffquant.evaluation.metrics.kid import Kid
from diffquant.evaluation.metrics.legibility import Confidence
from diffquant.evaluation.metrics.over_steps import OverSteps
from diffquant.evaluation.provenance import Protocol, protocol_of
from diffquant.evaluation.report import Report, make_report, read
from diffquant.sampling.protocol import SamplingProtocol
from tests import pipelines

NEAR, SHORT = FrechetDistance(1.5, 1.25, 1.0, 1.5), FrechetDistance(0.7, None, None, None)
SETS = {
    "fid_to_reference": Fid(NEAR, SHORT),
    "kid_to_reference": Kid(KernelDistance(0.01, 0.002), KernelDistance(0.0, 0.001)),
    "legibility": Confidence(Interval(0.5, 0.4, 0.6)),
}


class Extractor:
    name = "letters"
    sha256 = "e0"

    def features(self, pictures):
        raise NotImplementedError

    confidence = agreement = features


def provenance_of(features: bool = True, **protocol) -> Protocol:
    sampling = SamplingProtocol(samples=3, steps=2, trajectory_samples=3, **protocol)
    return protocol_of("full precision", pipelines.micro(), sampling, Extractor() if features else None, None, None)


def compared(name: str, figures: dict) -> Comparison:
    pictures = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    return Comparison(Measurement(name=name, seconds=1.0, figures=figures), pictures, torch.zeros(3))


def full_precision(features: bool = True) -> Comparison:
    return compared("full precision", {"legibility": Confidence(Interval(0.9, 0.8, 1.0))} if features else {})


def comparison(name: str, error: float, psnr: float, features: bool = True, **more) -> Comparison:
    figures = {
        "final_error": Interval(error, error, error),
        "psnr": Interval(psnr, psnr, psnr),
        "ssim": Interval(1.0, 1.0, 1.0),
        "drift": OverSteps((500.0, 0.0), (error / 2, error)),
        "noise_sqnr_db": OverSteps((500.0, 0.0), (psnr, psnr)),
    }
    return compared(name, figures | (SETS if features else {}) | more)


def report(**protocol) -> Report:
    comparisons = [full_precision(), comparison("same", 0.0, math.inf), comparison("mse-w4a8", 0.25, 20.0)]
    return make_report(provenance_of(**protocol), comparisons, {"full precision": 4_000_000, "mse-w4a8": 600_000})


ADDED_UP = Accumulation(3, (500.0, 0.0), (0.1, 0.2), (0.1, 0.5), (0.1, 0.4), (Stretch(0, 0, Interval(0.3, 0.2, 0.4)),))


def test_how_errors_add_up_is_in_the_report(tmp_path):
    quantized = comparison("mse-w4a8", 0.25, 20.0, accumulation=ADDED_UP, fid_by_step=(StepDistance(1, NEAR, SHORT),))
    written = make_report(provenance_of(), [full_precision(), quantized])
    written.write(tmp_path)
    assert (tmp_path / "accumulation.png").exists()
    assert read(tmp_path).measurements == written.measurements
    text = (tmp_path / "report.md").read_text()
    assert "| 1 to 1 | 0.3 |" in text and "| all | 0.5 |" in text and "| all, as local errors predict | 0.4 |" in text
    assert "## FID to full precision on the way" in text and "| mse-w4a8 | 1.5 |" in text and "| floor | 0.7 |" in text


def test_a_report_is_read_back_as_it_was_written(tmp_path):
    written = report()
    written.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "pairs.png", "drift.png"}
    for path in (tmp_path, tmp_path / "report.json"):
        back = read(path)
        assert back.measurements == written.measurements and back.protocol == written.protocol and back.pictures == {}
    assert back.measurements[1].figures["psnr"] == Interval(math.inf, math.inf, math.inf) and back.measurements[2].ratio == 0.15


def test_json_names_infinite_and_missing_values(tmp_path):
    report().write(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    full, same, _ = content["measurements"]
    figures = same["figures"]
    assert figures["psnr"]["value"] == "Infinity" and figures["noise_sqnr_db"]["values"] == ["Infinity", "Infinity"]
    assert "psnr" not in full["figures"] and same["file_bytes"] is None
    assert figures["fid_to_reference"]["floor"]["extrapolated"] is None


def test_the_protocol_says_how_figures_came_about():
    protocol = report(seed=4, eta=0.5).protocol
    assert protocol.sampling.seed == 4 and protocol.floor_seed == 5 and protocol.sampling.eta == 0.5
    assert protocol.extractor == "letters" and protocol.extractor_sha256 == "e0" and protocol.data_sha256 is None
    assert protocol.uint8_rule == "round(127.5 * (x + 1)) clamped to [0, 255], half to even"
    assert protocol.versions["torch"] == torch.__version__.partition("+")[0] or protocol.versions["torch"] == torch.__version__
    assert set(protocol.versions) == {"diffquant", "torch", "diffusers", "numpy", "scipy"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"report.json: is not JSON"),
        ('{"format": 99}', r"is of format 99; this version reads 2; evaluate again"),
        ('{"format": 1, "rows": []}', r"is of format 1; this version reads 2; evaluate again"),
        ("[1]", r"is of format None"),
        ('{"format": 2, "measurements": []}', r"protocol: Field required"),
    ],
)
def test_damaged_reports_are_refused(tmp_path, content, message):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        read(tmp_path)


def test_unknown_keys_and_missing_files_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="no such report"):
        read(tmp_path)
    report().write(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    for place, key, value, message in (
        (content["measurements"][0], "fidd", 1, r"measurements.0.fidd: Extra inputs are not permitted"),
        (content["measurements"][2]["figures"]["psnr"], "high", "much", r"measurements.2.figures: psnr.high: Input should be a"),
        (content["measurements"][2]["figures"]["psnr"], "middle", 1, r"measurements.2.figures: psnr.middle: Unexpected keyword"),
    ):
        before = dict(place)
        place[key] = value
        (tmp_path / "report.json").write_text(json.dumps(content))
        with pytest.raises(EvaluationError, match=message):
            read(tmp_path)
        place.clear()
        place.update(before)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    report().write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(CalibrationError, match=r"pairs.png: cannot be written: No space left"):
        report(seed=4).write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_models_of_one_name_are_refused():
    with pytest.raises(EvaluationError, match="mse-w4a8 names more than one model"):
        make_report(provenance_of(), [full_precision(), *[comparison("mse-w4a8", 0.1, 20.0)] * 2])


def test_the_table_shows_every_model_with_its_floor():
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(report().table())
    text = console.export_text()
    assert "mse-w4a8" in text and "0.150x" in text and "inf 1.25" in text and "[1, 1.5]" in text and "20.00" in text
    assert "floor 0.7" in text and "SSIM" not in text and "3 samples, DDIMScheduler, 2 steps" in text
    assert "FID to data" not in text  # nothing was measured there


def test_markdown_says_how_far_quality_is_from_full_precision():
    changed = comparison("q", 0.1, 20.0, fid_to_data=Fid(NEAR, SHORT, Interval(1.25, 0.5, 2.0)))
    text = make_report(provenance_of(), [full_precision(), changed, comparison("unknown", 0.1, 20.0)]).markdown()
    assert "| model | FID to data |" in text and "| q | +1.25 [+0.5, +2] |" in text and "| unknown | +" not in text
    assert "## Change from full precision" not in report().markdown()


def test_markdown_holds_table_pictures_and_protocol():
    text = report().markdown()
    assert "| mse-w4a8 | 585.9 KiB<br>0.150x | 0.25<br>[0.25, 0.25] | 20.00<br>[20.00, 20.00] |" in text
    assert "| 1.5<br>floor 0.7<br>inf 1.25<br>[1, 1.5] | 0.01 ± 0.002<br>floor 0 ± 0.001 |" in text
    assert "(pairs.png)" in text and "(drift.png)" in text
    assert "| sampling.steps | 2 |" in text and "| scheduler.beta_end | 0.02 |" in text
    bare = make_report(
        provenance_of(features=False), [full_precision(features=False), comparison("q", 0.1, 20.0, features=False)]
    ).markdown()
    assert "FID" not in bare.split("## Protocol")[0] and "legibility" not in bare


@pytest.mark.parametrize("channels", [1, 3])
def test_pairs_are_enlarged_without_smoothing(channels):
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (2, channels, 32, 32), generator=generator, dtype=torch.uint8).numpy()
    image = np.asarray(grids.draw_pairs({"full precision": batch, "q": 255 - batch}, {"q": "PSNR 3.0 dB"}))
    right, bottom = image.shape[1] - 12, image.shape[0] - 12  # margins
    cell = image[bottom - 96 : bottom, right - 96 : right]  # last model, last noise
    expected = np.broadcast_to((255 - batch[1]).transpose(1, 2, 0), (32, 32, 3)).repeat(3, axis=0).repeat(3, axis=1)
    assert np.array_equal(cell, expected)
    gap = image[bottom - 96 : bottom, right - 98 : right - 96]
    assert (gap == 0xDD).all()


def test_names_at_line_ends_are_moved_apart():
    assert drawing._spread([0.0, 100.0], 25) == [0.0, 100.0]
    assert drawing._spread([51.0, 50.0, 52.0, 200.0], 25) == [51.0, 26.0, 76.0, 200.0]


LONG = "w4a6 dmq CalibrateRanges.activations=mse insert=PowerOfTwoScaling:LearnScales,iterations=250,samples=512 seed "


def test_long_names_leave_room_for_the_pictures(recwarn):
    """A name of a few words takes no more width than 34 letters, and the last words, which tell models apart, are there."""
    assert grids.folded("brecq-w4a8") == ["brecq-w4a8"]
    folded = grids.folded(LONG + "0")
    assert len(folded) <= grids.NAME_LINES and all(len(line) <= grids.NAME_WIDTH for line in folded)
    assert folded[-1].endswith("seed 0")
    picture = np.asarray(drawing.draw_drift({f"{LONG}{n}": [0.01, 0.02, 0.03 + n / 100] for n in range(8)}))
    rules = np.flatnonzero((picture == 0xDD).all(axis=2).any(axis=0))
    assert np.ptp(rules) > 0.5 * picture.shape[1]
    assert not [str(warning.message) for warning in recwarn if "constrained_layout" in str(warning.message)]
    batch = np.zeros((2, 3, 32, 32), dtype=np.uint8)
    assert grids.draw_pairs({LONG + "0": batch}, {}).width < 2 * grids.CELL + 350


@pytest.mark.parametrize("lines", [{"a": [0.0, 0.0]}, {"a": [0.1]}, {"a": [0.1, 0.2], "b": [0.0, 0.3]}])
def test_drift_is_drawn_whatever_the_values(lines):
    image = drawing.draw_drift(lines)
    assert isinstance(image, Image.Image) and image.size == (1200, 690)

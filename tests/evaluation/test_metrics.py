"""A metric is a class: of a file of the package or of somebody else's, it is computed, shown and read back like the others."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from typing import final

import pytest
from rich.console import Console

import diffquant as dq
from diffquant.errors import DiffquantError
from diffquant.evaluation import metrics
from diffquant.evaluation.intervals import Interval
from diffquant.evaluation.metrics import base
from diffquant.evaluation.metrics.base import Metric
from diffquant.evaluation.report import read
from tests import pipelines

PROTOCOL = dq.SamplingProtocol(samples=3, steps=2, batch_size=3, trajectory_samples=2, accumulation_samples=0)
IN_THE_PACKAGE = """
from typing import final
from diffquant.evaluation.metrics.base import Metric

@final
class Constant(Metric[float]):
    name, title, figure = "constant", "always one", float

    def compute(self, run, prepared):
        return 1.0
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The metrics as they were, after the test."""
    metrics.registered()
    monkeypatch.setattr(base, "REGISTRY", dict(base.REGISTRY))


@dataclass(frozen=True)
class Grey:
    mean: float
    above: Interval | None


def define():
    """A metric from outside of the package: how bright pictures are."""

    @final
    class Brightness(Metric[Grey]):
        name, title, figure, place = "brightness", "brightness", Grey, 15
        of_reference = True

        def prepare(self, reference, other):
            return float(reference.samples.pictures.double().mean())

        def compute(self, run, prepared):
            mean = float(run.samples.pictures.double().mean())
            return Grey(mean, None if run.steps is None else Interval(mean - prepared, -1.0, float("inf")))

        def format(self, figure, newline):
            return f"{figure.mean:.1f}{newline}grey"

        def change(self, figure):
            return figure.above

        def section(self, figures):
            return [f"## Brightness of {', '.join(figures)}"]

    return Brightness


@pytest.fixture
def report(tmp_path):
    define()
    return dq.evaluate(pipelines.micro(seed=1), pipelines.micro(), protocol=PROTOCOL, out=tmp_path)


def shown(report) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table())
    return console.export_text()


def test_a_metric_from_outside_is_shown_and_read_back(report, tmp_path):
    full, quantized = (measurement.figures["brightness"] for measurement in report.measurements)
    assert full.above is None and quantized.above.value == pytest.approx(quantized.mean - full.mean) and quantized.mean != full.mean
    assert "brightness" in shown(report) and f"{quantized.mean:.1f}" in shown(report)
    text = (tmp_path / "report.md").read_text()
    assert "| final error | brightness | PSNR dB |" in text and f"| {full.mean:.1f}<br>grey |" in text
    assert "## Brightness of full precision, quantized" in text
    assert f"| quantized | {quantized.above.value:+.3g} [-1, +inf] |" in text
    assert read(tmp_path).measurements == report.measurements
    assert '"high": "Infinity"' in (tmp_path / "report.json").read_text()


def test_a_report_is_read_where_its_metric_is_not_defined(report, tmp_path):
    del base.REGISTRY["brightness"]
    back = read(tmp_path)
    assert "Not shown, since nothing here defines these metrics: brightness." in back.markdown()
    assert "| brightness |" not in back.markdown() and "final error" in shown(back)
    back.write(tmp_path / "again")
    define()
    assert read(tmp_path / "again").measurements == report.measurements  # nothing is lost on the way


def test_a_file_of_the_package_is_a_metric(tmp_path, monkeypatch):
    (tmp_path / "constant.py").write_text(IN_THE_PACKAGE)
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    try:
        assert list(metrics.registered())[-1] == "constant"
        report = dq.evaluate({}, pipelines.micro(), protocol=PROTOCOL)
        assert "constant" not in report.measurements[0].figures  # it says how far a model is from full precision
        report = dq.evaluate(pipelines.micro(), pipelines.micro(), protocol=PROTOCOL)
        assert report.measurements[1].figures["constant"] == 1.0 and "always one" in shown(report)
    finally:
        sys.modules.pop("diffquant.evaluation.metrics.constant")


def test_a_name_is_taken_once():
    with pytest.raises(DiffquantError, match=r"'psnr': is the name of diffquant.*Psnr and .*Mine; one class is allowed"):

        class Mine(Metric[float]):
            name = "psnr"

    first = define()
    again = define()  # such as a cell of a notebook that runs twice
    assert base.REGISTRY["brightness"] is again is not first


def test_a_figure_of_another_type_is_refused():
    @final
    class Wrong(Metric[float]):
        name, figure = "wrong", float

        def compute(self, run, prepared):
            return "much"

    with pytest.raises(ValueError, match=r"wrong: Input should be a valid number"):
        dq.evaluate(pipelines.micro(), pipelines.micro(), protocol=PROTOCOL)

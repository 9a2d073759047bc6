"""Runs the Python of how-to pages and looks at what it made: ``python how_to.py RESULTS PAGE...``, in a process of its own.

A page defines classes that register themselves, so each is run in a fork of a process that has imported the package once: an import
takes longer than all pages. Not a test itself; `test_how_to.py` starts it and reads RESULTS, a folder with a file for each page.
"""

import json
import os
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffquant.core.model import activation_quantizers, quantized_layers

Names = dict[str, Any]  # what a page has defined
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)


def method(names: Names) -> None:
    """The pass ran as an object and by its name, with the option changed, on every activation."""
    report, named = names["report"], names["named"]
    assert [row["pass"] for row in report.passes] == [row["pass"] for row in named.passes] == ["CalibrateRanges", "NarrowRanges"]
    assert named.recipe == "narrow-w4a8" and named.passes[1]["options"] == {"share": 0.7}
    narrow, narrower = (activation_quantizers(pipe.unet) for pipe in (names["pipe"], names["other"]))
    assert len(report.passes[1]["figures"]["layers"]) == len(narrow) == len(narrower) > 10
    for name, quantizer in narrow.items():  # two roundings of float32
        assert torch.allclose(narrower[name].scale / quantizer.scale, torch.tensor(0.7 / 0.9), rtol=1e-5)


def engine(names: Names) -> None:
    """Another engine computed the same model, is listed, and went without a trace."""
    assert names["used"] == ["simulate", "toy", "simulate"]
    before, toy, after = names["outputs"]
    assert torch.equal(before, after)
    assert 0 < float((toy - before).norm() / before.norm()) < 1e-2  # a code on an edge may change others after it
    assert "toy" in names["listed"] and names["says"] == ["float64 products of dequantized codes, to compare with"]


def target(names: Names) -> None:
    """The folder holds the codes of the model."""
    report = names["report"]
    assert report.target == "npz" and report.error == 0 and report.dropped == []
    assert json.loads(Path("exported/export.json").read_text())["file"] == "codes.npz"
    with np.load("exported/codes.npz") as codes:
        assert len(codes) > 10
        for name, layer in quantized_layers(names["pipe"].unet):
            assert torch.equal(torch.from_numpy(codes[name]), layer.weight_quantizer.codes)


def metric(names: Names) -> None:
    """The figure is right, and stands in the table and in the file."""
    report = names["report"]
    ours, full = (report.pictures[name].astype(float).mean() for name in ("quantized", "full precision"))
    assert abs(names["brightness"].value - (ours - full)) < 1e-9 and ours != full
    assert "| brightness |" in Path("report/report.md").read_text() and '"brightness"' in Path("report/report.json").read_text()


def layer_kind(names: Names) -> None:
    """The layers were quantized, saved, and loaded as quantized ones; engines say why they are simulated."""
    kinds = {row["name"]: row["kind"] for row in names["report"].layers if row["spec"] is not None}
    assert names["quantized"] == {"Conv1d", "Linear"} == set(kinds.values())
    reasons = {row.reason for row in names["rows"] if kinds[row.name] == "Conv1d"}
    assert reasons <= {"PyTorch has no integer kernel for Conv1d", "the engine is simulate"} and len(names["rows"]) == len(kinds)


def pipeline(names: Names) -> None:
    """Nothing is missing, guidance doubles the batch, and the loaded pipeline draws the same picture."""
    assert names["unknown"] == names["missing"] == [] and names["conditions"] == {"class_labels": [0, 500]}
    assert (names["timestep"], names["position"]) == ("timestep", 1) and names["prediction"].shape == (2, 8, 8, 8)
    assert "transformer_blocks.0" in names["fitted"] and any(row.spec for row in names["layers"])
    quantized, loaded = names["pictures"]
    assert (quantized == loaded).all()


CHECKS: dict[str, Callable[[Names], None]] = {
    "add-a-method": method,
    "add-an-engine": engine,
    "add-an-export-target": target,
    "add-a-metric": metric,
    "add-a-layer-kind": layer_kind,
    "add-a-pipeline": pipeline,
}


def run(page: Path, folder: Path) -> str:
    """Run the one Python block of a page in `folder`; the traceback where it or its check fails, else nothing."""
    folder.mkdir()
    os.chdir(folder)
    warnings.simplefilter("error")
    try:
        (code,) = BLOCK.findall(page.read_text())
        source = folder / f"{page.stem}.py"
        source.write_text(code)
        CHECKS[page.stem](runpy.run_path(str(source), run_name="page"))
    except Exception:
        return traceback.format_exc()
    return ""


def main(results: Path, pages: list[Path]) -> None:
    """Run the pages one after the other, each in a process of its own that knows the package already."""
    for page in pages:
        child = os.fork()
        if child == 0:
            text = run(page, results / page.stem)
            (results / f"{page.stem}.txt").write_text(text)
            os._exit(0)  # nothing of the parent's is to be finished here
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])

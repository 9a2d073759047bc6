"""What the targets of `diffquant export` hold of quantized reference models: the error of one call, files, what is dropped.

    python benchmarks/exports.py

Rows are in results/exports.csv. A target whose package is missing here is left for another run. Models are calibrated by ranges
alone, which changes what is held no more than learned codes do.
"""

import argparse
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import rows
import torch
from rich.console import Console

import diffquant as dq
from diffquant import zoo
from diffquant.checkpoint.targets.base import target, target_names
from diffquant.errors import CheckpointError, DiffquantError
from diffquant.host.conditions import Calibration
from diffquant.recipe import load_recipe

MODELS = ("glyph-sd", "glyph-dit")
KEY = ("model", "recipe", "options", "target")
IN_FLOAT = 'layers.+={match: "@attention", input_bits: float, softmax_bits: float}'
SYMMETRIC = ["layers.0.input_symmetric=true", "layers.1.input_symmetric=true", "layers.1.softmax_bits=7"]
ROWS = ["layers.0.input_scale=dynamic-row", "layers.0.input_symmetric=true", IN_FLOAT]
LINEAR_ONLY = 'layers.+={match: "@conv", input_bits: float}'
SETTINGS: tuple[tuple[str, list[str]], ...] = (
    ("mse-w8a32", []),
    ("mse-w4a32", []),
    ("mse-w8a8", []),
    ("mse-w4a8", []),
    ("mse-w8a8", SYMMETRIC),
    ("mse-w8a8", [IN_FLOAT, LINEAR_ONLY]),
    ("mse-w8a8", [*ROWS, LINEAR_ONLY]),
)
PACKAGES = {"comfyui": "comfy-kitchen", "tensorrt": "onnxruntime", "onnx": "onnxruntime"}
CONSOLE = Console(stderr=True)


def exported(pipe: object, to: str, key: rows.Row) -> rows.Row:
    """The row of one export; where it is refused, the line that says why."""
    try:
        consumer = version(PACKAGES.get(to, to))
    except PackageNotFoundError:
        consumer = ""
    row = key | {"consumer": consumer, "threads": torch.get_num_threads()}
    lossy = to not in ("onnx", "openvino")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = dq.export(pipe, Path(folder) / "out", to=to, lossy=lossy)
        except DiffquantError as error:
            return row | {"reason": str(error).splitlines()[0]}
        size = sum(file.stat().st_size for file in (Path(folder) / "out").rglob("*") if file.is_file())
    dropped = "; ".join(each.partition(" (")[0] for each in report.dropped)
    return row | {"error": report.error, "dropped": dropped, "bytes": size, "seconds": time.monotonic() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "exports.csv")
    file = parser.parse_args().out
    present = []
    for to in target_names():
        try:
            target(to).require()
            present.append(to)
        except CheckpointError as missing:
            CONSOLE.print(str(missing))
    for model in MODELS:
        data = dq.record(zoo.load(model), Calibration(samples=16, steps=10))
        for recipe, options in SETTINGS:
            key = {"model": model, "recipe": recipe, "options": " ".join(options)}
            done = {row["target"] for row in rows.read(file) if all(row.get(name, "") == value for name, value in key.items())}
            if not (wanted := [to for to in present if to not in done]):
                continue
            pipe = zoo.load(model)
            dq.quantize(pipe, load_recipe(recipe, options), data)
            for to in wanted:
                row = exported(pipe, to, key | {"target": to})
                rows.put(file, [row | rows.provenance() | {"engine": to}], KEY)
                CONSOLE.print(f"{model} {recipe} {to}: {row.get('error', row.get('reason'))}")


if __name__ == "__main__":
    main()

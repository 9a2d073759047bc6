"""Exports: a quantized denoiser as a file for another runtime, checked by running that file.

The graph gets its sizes from the first call that the pipeline makes; the batch is left open. What is written is read again, run on
that call and compared with the simulation, and its integer primitives are counted, before it gets its name.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from diffquant.calibration.observe import Calibration, Pipeline, evaluation_mode, find_denoiser, observe, run_pipeline
from diffquant.core.spec import CheckpointError
from diffquant.core.surgery import quantized_layers
from diffquant.runtime import engines
from diffquant.runtime.checkpoint import load
from diffquant.runtime.engines import onnx, openvino
from diffquant.runtime.engines.graph import integer_layers, signed

SUFFIX = ".attention_products"
LARGEST_ERROR = 0.2  # codes on a rounding edge, carried through a whole model, gave up to 0.02; a wrong kernel gives about 1


class Target(NamedTuple):
    """A runtime to write for; `engine` is a module with FILE, package, build, run and products."""

    engine: ModuleType
    save: Callable[[Any, Path], Any]
    load: Callable[[Path], Any]


TARGETS = {
    "openvino": Target(openvino, openvino.save_ir, lambda folder: openvino.compile_graph(openvino.load_ir(folder))),
    "onnx": Target(onnx, onnx.save_onnx, onnx.load_onnx),
}


class ExportReport(BaseModel):
    """What an exported file was seen to do.

    ``error``: relative L2 distance of its output from the simulation's on one call. ``integer``, ``floating``: products computed
    from 8-bit integers, and not. ``floating_layers``: quantized layers and attentions with a product that is not. ``symmetric``:
    every operand is int8 with a zero point of 0, which TensorRT asks for.
    """

    target: str
    file: str
    error: float
    integer: int
    floating: int
    floating_layers: list[str]
    symmetric: bool


class _Enough(Exception):
    """The first call was seen."""


def export(model: Pipeline | str | Path, folder: str | Path, to: str = "openvino") -> ExportReport:
    """Write the quantized denoiser of a pipeline (or of its folder) into a new `folder`, for `to`.

    The report is returned, and written beside the file as ``export.json``. The pipeline computes with the simulation afterwards.
    Raises `CheckpointError` for another target, where nothing is quantized, where `folder` exists, and when the written file does
    not compute what the simulation does or multiplies no integers; `SpecError` for parameter sets that the target cannot have.
    """
    if to not in TARGETS:
        raise CheckpointError(f"export: target {to!r}; allowed are {', '.join(TARGETS)}")
    target = TARGETS[to]
    target.engine.package()
    folder = Path(folder).expanduser().resolve()
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; an export makes a new folder; choose another name")
    pipe = load(model, engine="simulate") if isinstance(model, str | Path) else model
    engines.use_engine(pipe, "simulate")
    _, denoiser = find_denoiser(pipe)
    arguments, expected = first_call(pipe)
    graph = target.engine.build(denoiser, arguments)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        target.save(graph, temporary)
        report = _check(to, temporary, denoiser, arguments, expected)
        (temporary / "export.json").write_text(json.dumps(report.model_dump(), indent=1) + "\n")
        temporary.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def first_call(pipe: Pipeline) -> tuple[dict[str, Any], Tensor]:
    """Arguments and output of the first denoiser call of a pipeline that draws one sample."""
    seen: list[tuple[dict[str, Any], Tensor]] = []

    def keep(arguments: dict[str, Any], output: Tensor) -> None:
        seen.append((arguments, output))
        raise _Enough

    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        with evaluation_mode(pipe), observe(pipe, on_call=keep):
            run_pipeline(pipe, Calibration(samples=1, steps=1), torch.Generator().manual_seed(0), range(1))
    except _Enough:
        pass
    finally:
        pipe.set_progress_bar_config(**({"disable": False} | bar))
    return seen[0]


def _check(to: str, written: Path, denoiser: nn.Module, arguments: dict[str, Any], expected: Tensor) -> ExportReport:
    """Run the written file on the call that it was made from."""
    target = TARGETS[to]
    compiled = target.load(written)
    output = target.engine.run(compiled, denoiser, arguments)[0]
    products = list(target.engine.products(compiled))
    integer = sum(integer for _, integer in products)
    error = float((output - expected).norm() / expected.norm())
    quantized = {name for name, _ in quantized_layers(denoiser)}
    quantized |= {name.removesuffix(SUFFIX) for name, _ in denoiser.named_modules() if name.endswith(SUFFIX)}
    if not (torch.isfinite(output).all() and error <= LARGEST_ERROR):
        raise CheckpointError(f"export: the file's output differs from the simulation's by {error:.2g}; nothing was written")
    if not integer:
        raise CheckpointError("export: the runtime would multiply no integers; nothing was written")
    return ExportReport(
        target=to,
        file=target.engine.FILE,
        error=error,
        integer=integer,
        floating=len(products) - integer,
        floating_layers=sorted(name for name, integers in integer_layers(products).items() if not integers and name in quantized),
        symmetric=signed(denoiser),
    )

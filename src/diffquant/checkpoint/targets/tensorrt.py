"""ONNX files as TensorRT reads them: every QuantizeLinear and DequantizeLinear is int8 with a zero point of 0.

Scales are constants, of weights one for each output channel; the batch is open. A graph has no parameter sets: a model that has
some becomes one file for each of their combinations, and ``timesteps.json`` says which file is for which timesteps. Weights beside
an input in floating point are stored in float32.

The files are checked with ONNX Runtime; TensorRT itself has not been run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from diffquant.checkpoint.targets.base import (
    ExportReport,
    Target,
    allowed_error,
    counted,
    refuse_difference,
    refuse_dropped,
    relative_error,
)
from diffquant.checkpoint.targets.onnx import SYMMETRIC, Onnx, load_file, save_file
from diffquant.core.affine import scale_from_range
from diffquant.core.model import activation_quantizers, clock_of, correction_of
from diffquant.core.quantizer import Quantizer
from diffquant.engines.graph_call import Call
from diffquant.engines.graph_operands import grids_of
from diffquant.engines.onnx_graph import TENSORRT, convert, package
from diffquant.errors import CheckpointError, SpecError
from diffquant.host.denoiser import timestep_argument
from diffquant.host.pipeline import Host, predicted

SATURATED = "; where this processor adds products of 8-bit operands in 16 bits, export on another one"
INDEX = "timesteps.json"


class TensorRtReport(ExportReport):
    """``error`` is the largest of the files', ``allowed`` what codes on rounding edges may explain in that file.

    ``files``: each with the timesteps that it is for; a call belongs to the file with the timestep nearest to its own. None where
    one file is for all. ``quantizers``: QuantizeLinear and DequantizeLinear of the first file, all with a zero point of 0.
    """

    allowed: float
    files: dict[str, list[float]]
    quantizers: int

    def lines(self) -> list[str]:
        """As of every report, and what the files hold."""
        error, *others = super().lines()
        held = f"files: {max(1, len(self.files))}, with {self.quantizers} quantizers each, int8 with a zero point of 0"
        return [f"{error}; rounding explains {self.allowed:.2g} of what is held", held, *others]


@final
class TensorRt(Target):
    """Symmetric ONNX files, one for each combination of parameter sets."""

    name = "tensorrt"

    def require(self) -> None:
        package()

    def write(self, host: Host, folder: Path, form: str, lossy: bool) -> TensorRtReport:
        """As of every target; `form` is always ``single``.

        Raises `SpecError` for parameter sets of the halves of a guided call.
        """
        denoiser = host.denoiser
        if clock_of(denoiser).conditional is not None:
            raise SpecError(
                f"{type(denoiser).__name__}: has parameter sets for each half of a guided call (guidance_sets), which a graph "
                "cannot tell apart; quantize without guidance_sets"
            )
        asymmetric = [name for name, quantizer in activation_quantizers(denoiser).items() if not _signed(quantizer)]
        dropped = []
        if asymmetric:
            dropped.append(counted("zero points of inputs, which become int8 with a scale that covers the range", asymmetric))
        if correction_of(denoiser) is not None:
            dropped.append("the correction while sampling")
        refuse_dropped(self.name, dropped, lossy, f"; {SYMMETRIC}" if asymmetric else "")
        arguments, expected = host.example_call(steps=1)
        combinations = _combinations(denoiser)
        reports = []
        for index, intervals in enumerate(combinations):
            name = "model.onnx" if len(combinations) == 1 else f"model-{index:03}.onnx"
            call = dict(arguments)
            if len(combinations) > 1:
                call, expected = _at(denoiser, arguments, clock_of(denoiser).timesteps[intervals[0]])
            reports.append(self._write_file(denoiser, call, expected, folder / name, intervals[0], dropped))
        worst = max(reports, key=lambda report: report.error)
        if len(combinations) == 1:
            return worst
        times = clock_of(denoiser).timesteps
        files = {report.file: [times[each] for each in intervals] for report, intervals in zip(reports, combinations, strict=True)}
        (folder / INDEX).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
        return worst.model_copy(update={"file": INDEX, "files": files, "quantizers": reports[0].quantizers})

    def _write_file(
        self, denoiser: nn.Module, arguments: dict[str, Any], expected: Tensor, file: Path, interval: int, dropped: list[str]
    ) -> TensorRtReport:
        """One file, and its check: run on one call, beside the simulation with the quantizers that the file has."""
        with _symmetric(denoiser, interval):
            graph = convert(denoiser, Call(denoiser, (), dict(arguments)), TENSORRT)
            save_file(graph, file)
            count = _check_quantizers(file)
            output = Onnx().run(load_file(file), denoiser, arguments)[0]
            with torch.no_grad():
                held = predicted(denoiser, denoiser(**arguments))
            allowed = allowed_error(denoiser, arguments, held)
        refuse_difference(output, held, allowed, SATURATED)
        error = relative_error(output, expected)
        return TensorRtReport(
            target=self.name, file=file.name, error=error, allowed=allowed, files={}, quantizers=count, dropped=dropped
        )


def _signed(quantizer: Quantizer) -> bool:
    """Whether the codes minus the zero point fit int8 in every parameter set that is used."""
    if quantizer.table is None:
        return all(grid.signed for grid in grids_of(quantizer))
    spec, points = quantizer.spec, quantizer.zero_point[quantizer.table.long().unique()]
    return bool(((spec.code_min - points) >= -128).all() and ((spec.code_max - points) <= 127).all())


def _combinations(denoiser: nn.Module) -> list[list[int]]:
    """The intervals of the timestep axis, those with the same parameter set of every quantizer together."""
    tables = [quantizer.table for quantizer in activation_quantizers(denoiser).values() if quantizer.table is not None]
    if not tables:
        return [[0]]
    together: dict[tuple[int, ...], list[int]] = {}
    for interval, rows in enumerate(torch.stack([table.long() for table in tables], dim=1).tolist()):
        together.setdefault(tuple(rows), []).append(interval)
    return list(together.values())


def _at(denoiser: nn.Module, arguments: dict[str, Any], timestep: float) -> tuple[dict[str, Any], Tensor]:
    """The same call at another timestep, and the simulation's output."""
    name, _ = timestep_argument(denoiser)
    before = torch.as_tensor(arguments[name])
    call = {**arguments, name: torch.full_like(before, timestep)}
    with torch.no_grad():
        return call, predicted(denoiser, denoiser(**call))


@contextmanager
def _symmetric(denoiser: nn.Module, interval: int) -> Iterator[None]:
    """While the block runs, activations have one parameter set, that of `interval`, and codes that fit int8 around 0."""
    names = ("spec", "scale", "zero_point", "shift", "table")
    every = activation_quantizers(denoiser).values()
    before = [(quantizer, {name: getattr(quantizer, name) for name in names}) for quantizer in every]
    try:
        for quantizer in every:
            if quantizer.table is not None:
                row = slice(int(quantizer.table[interval]), int(quantizer.table[interval]) + 1)
                quantizer.scale, quantizer.zero_point = quantizer.scale[row], quantizer.zero_point[row]
                quantizer.shift = None if quantizer.shift is None else quantizer.shift[row]
                quantizer.table = None
            if not _signed(quantizer):
                spec = quantizer.spec
                low, high = ((end - quantizer.zero_point) * quantizer.scale for end in (spec.code_min, spec.code_max))
                quantizer.spec = spec.model_copy(update={"symmetric": True})
                quantizer.scale, quantizer.zero_point = scale_from_range(low, high, quantizer.spec)
        yield
    finally:
        for quantizer, values in before:
            for name, value in values.items():
                setattr(quantizer, name, value)


def _check_quantizers(file: Path) -> int:
    """How many quantizers a written file has. Raises `CheckpointError` for none, and for a zero point that is not an int8 0."""
    onnx = package()
    graph = onnx.load(file, load_external_data=False).graph
    constants = {each.name: each for each in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in nodes:
        zero_point = constants[node.input[2]]
        values = onnx.numpy_helper.to_array(zero_point, base_dir=str(file.parent))
        if zero_point.data_type != onnx.TensorProto.INT8 or values.any():
            raise CheckpointError(f"export: node {node.name!r} has a zero point that is not an int8 0; nothing was written")
    if not nodes:
        raise CheckpointError("export: no input is quantized, so that the file would hold no quantizer; nothing was written")
    return len(nodes)

"""Exports: a quantized denoiser as a file for another runtime, checked by running that file.

The graph gets its sizes from the first call that the pipeline makes; the batch is left open. What is written is read again, run on
that call and compared with the simulation, and its integer primitives are counted, before it gets its name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from diffquant.checkpoint.folder import load
from diffquant.checkpoint.targets.base import Target, target
from diffquant.core.model import activation_quantizers, quantized_layers
from diffquant.core.quantizer import Quantizer
from diffquant.core.watch import watching
from diffquant.engines.base import attentions, use_engine
from diffquant.engines.exactness import PAIR
from diffquant.engines.graph import integer_layers, signed
from diffquant.errors import CheckpointError
from diffquant.files import folder_when_done, write_text
from diffquant.host.pipeline import Host, Pipeline

FORMS = ("exact", "single")
EDGE = 1e-3  # of a scale: how far values are moved across rounding edges, many times what float32 moves them
DRAWS = 3  # of such moves
MARGIN = 3.0  # over the largest error of these
ROUNDING = 1e-5  # of float32, where no code is on an edge


class ExportReport(BaseModel):
    """The check of an exported file.

    ``error``: relative L2 distance of its output from the simulation's on one call; ``allowed``: what codes on rounding edges may
    explain of it. ``pair``: the largest sum of two products of an unsigned code and a signed weight; up to 32767 it fits 16 bits,
    and the file is exact on processors that add products so. ``integer``, ``floating``: products computed from 8-bit integers, and
    not. ``floating_layers``: quantized layers and attentions with a product that is not. ``symmetric``: every operand is int8 with
    a zero point of 0, which TensorRT asks for. ``note``: what else there is to know of the file; empty: nothing.
    """

    target: str
    form: str
    file: str
    error: float
    allowed: float
    pair: int
    integer: int
    floating: int
    floating_layers: list[str]
    symmetric: bool
    note: str


def export(model: Pipeline | str | Path, folder: str | Path, to: str = "openvino", form: str = "exact") -> ExportReport:
    """Write the quantized denoiser of a pipeline (or of its folder) into a new `folder`, for `to`.

    `form` ``exact`` writes a file that is right on every processor, also where products of 8-bit operands are added in 16 bits;
    ``single`` one product for every 8-bit weight, which is shorter, and wrong on such processors. The report is returned, and
    written beside the file as ``export.json``. The pipeline computes with the simulation afterwards. Raises `CheckpointError` for
    another target or form, where nothing is quantized, where `folder` exists, and when the written file does not compute what the
    simulation does here or multiplies no integers; `SpecError` for parameter sets that the target cannot have.
    """
    runtime = target(to)
    if form not in FORMS:
        raise CheckpointError(f"export: form {form!r}; allowed are {', '.join(FORMS)}")
    runtime.require()
    folder = Path(folder).expanduser().resolve()
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; an export makes a new folder; choose another name")
    pipe = load(model, engine="simulate") if isinstance(model, str | Path) else model
    use_engine(pipe, "simulate")
    host = Host(pipe)
    denoiser = host.denoiser
    arguments, expected = host.example_call(steps=1)
    graph = runtime.build(denoiser, arguments, form)
    symmetric = signed(denoiser) and runtime.signed_weights(graph)
    facts = {"form": form, "pair": runtime.pair(graph), "symmetric": symmetric, "note": runtime.note(symmetric)}
    with folder_when_done(folder) as temporary:
        runtime.save(graph, temporary)
        report = _check(runtime, temporary, denoiser, arguments, expected, facts)
        write_text(temporary / "export.json", json.dumps(report.model_dump(), indent=1) + "\n")
    return report


def allowed_error(denoiser: nn.Module, arguments: dict[str, Any], expected: Tensor) -> float:
    """The relative error of one call that codes on rounding edges explain, measured with the simulation itself.

    Every value is moved by up to `EDGE` of its scale before it is quantized, so that codes near an edge change, as they may between
    two exact engines; the largest error of a few draws, with a margin, is allowed.
    """
    generator = torch.Generator().manual_seed(0)

    def move(quantizer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert isinstance(quantizer, Quantizer)
        (x,) = arguments
        noise = torch.rand(x.shape, generator=generator).to(x.device, x.dtype) * 2 - 1
        return (x + noise * EDGE * quantizer.operands(x)[0],)

    with torch.no_grad(), watching(dict.fromkeys(activation_quantizers(denoiser).values(), move), before=True):
        outputs = [denoiser(**arguments) for _ in range(DRAWS)]
    predictions = [output if isinstance(output, Tensor) else output[0] for output in outputs]
    return ROUNDING + MARGIN * max(float((prediction - expected).norm() / expected.norm()) for prediction in predictions)


def _check(
    runtime: Target, written: Path, denoiser: nn.Module, arguments: dict[str, Any], expected: Tensor, facts: dict[str, Any]
) -> ExportReport:
    """Run the written file on the call that it was made from; `facts` of the graph go into the report."""
    compiled = runtime.load(written)
    output = runtime.run(compiled, denoiser, arguments)[0]
    products = list(runtime.products(compiled))
    integer = sum(integer for _, integer in products)
    error = float((output - expected).norm() / expected.norm())
    quantized = {name for name, _ in quantized_layers(denoiser)} | set(attentions(denoiser))
    allowed = allowed_error(denoiser, arguments, expected)
    if not (torch.isfinite(output).all() and error <= allowed):
        instead = "; use form='exact'" if facts["pair"] > PAIR else ""
        raise CheckpointError(
            f"export: the file's output differs from the simulation's by {error:.2g}, where rounding explains {allowed:.2g}; "
            f"nothing was written{instead}"
        )
    if not integer:
        raise CheckpointError("export: the runtime would multiply no integers; nothing was written")
    return ExportReport(
        target=runtime.name,
        allowed=allowed,
        file=runtime.file,
        error=error,
        integer=integer,
        floating=len(products) - integer,
        floating_layers=sorted(name for name, integers in integer_layers(products).items() if not integers and name in quantized),
        **facts,
    )

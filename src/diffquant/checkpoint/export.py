"""Exports: a quantized pipeline or its denoiser as files for another consumer, which the target writes and checks.

What is written gets its name when the check has passed.
"""

from __future__ import annotations

import json
from pathlib import Path

from diffquant.checkpoint.folder import load
from diffquant.checkpoint.targets.base import ExportReport, target
from diffquant.core.model import is_frozen
from diffquant.engines.base import use_engine
from diffquant.errors import CheckpointError
from diffquant.files import folder_when_done, write_text
from diffquant.host.pipeline import Host, Pipeline

FORMS = ("exact", "single")


def export(
    model: Pipeline | str | Path, folder: str | Path, to: str = "openvino", form: str = "exact", lossy: bool = False
) -> ExportReport:
    """Write the quantized denoiser of a pipeline (or of its folder) into a new `folder`, for the target `to`.

    `form` concerns targets that are graphs: ``exact`` writes a file that is right on every processor, also where products of 8-bit
    operands are added in 16 bits; ``single`` one product for every 8-bit weight, which is shorter, and wrong on such processors.
    `lossy`: what the target cannot hold is dropped and listed in the report, where it would be refused otherwise. The report is
    returned, and written beside the files as ``export.json``. The pipeline computes with the simulation afterwards.

    Raises `CheckpointError` for another target or form, where nothing is quantized, where `folder` exists, for what the target
    cannot hold, and when the check of the written files fails; `SpecError` for parameter sets that a graph cannot have.
    """
    consumer = target(to)
    if form not in FORMS:
        raise CheckpointError(f"export: form {form!r}; allowed are {', '.join(FORMS)}")
    consumer.require()
    folder = Path(folder).expanduser().resolve()
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; an export makes a new folder; choose another name")
    pipe = load(model, engine="simulate") if isinstance(model, str | Path) else model
    use_engine(pipe, "simulate")
    host = Host(pipe)
    if not is_frozen(host.denoiser):
        raise CheckpointError(f"{type(host.denoiser).__name__}: its weights are not integer codes; quantize first")
    with folder_when_done(folder) as temporary:
        temporary.mkdir(parents=True)
        report = consumer.write(host, temporary, form, lossy)
        write_text(temporary / "export.json", json.dumps(report.model_dump(), indent=1) + "\n")
    return report

"""`reproduce`: quantize a released checkpoint and compare it with full precision. An interrupted run resumes.

It is tested on small models of the same classes, not on released checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.analysis.estimate import check_space
from diffquant.calibration.progress import bars
from diffquant.checkpoint.folder import save
from diffquant.evaluation.evaluate import evaluate, require_extra
from diffquant.evaluation.report import Report
from diffquant.quantization import quantize
from diffquant.recipe import Recipe
from diffquant.sampling.protocol_files import load_protocol, recording_scheduler


@dataclass(frozen=True)
class Released:
    """A released checkpoint: its id on the hub, and the shipped protocol it is sampled by."""

    model: str
    protocol: str


RELEASED = {
    "sd15": Released("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-coco"),
    "sdxl": Released("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl"),
}
SAMPLES = 64  # of the comparison: final error and PSNR are paired and need few; FID needs thousands


def reproduce(
    load: Callable[[], Any],
    recipe: Recipe,
    out: Path,
    *,
    protocol: Sequence[str],
    samples: int = SAMPLES,
    minutes: float | None = None,
) -> Report:
    """Record, quantize, save and evaluate the pipeline that `load` returns, in the folders ``work``, ``checkpoint`` and ``report``.

    Recordings, passes and samples of an earlier run in `out` are used again. Raises as `record`, `quantize`, `save` and `evaluate`.
    """
    require_extra()
    conditions = load_protocol(protocol, samples=samples)
    checkpoint, work = out / "checkpoint", out / "work"
    pipe = load()
    check_space(pipe, recipe, checkpoint)
    with recording_scheduler(pipe, conditions):
        result = quantize(pipe, recipe, conditions.calibration, folder=work, minutes=minutes)
    save(pipe, checkpoint)
    result.write(checkpoint / "quantization.json")
    del pipe  # frees its memory before full precision is loaded again
    with bars(True) as progress:
        return evaluate(
            {recipe.full_name: checkpoint},
            load(),
            protocol=conditions.sampling,
            out=out / "report",
            work=work / "samples",
            progress=progress.show,
        )

"""A released checkpoint from its weights to a report, in one command that goes on where it was stopped.

No released checkpoint could be downloaded where this is developed, so what it prints for one is not known here; it is tested on
small models of the same classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.analysis.estimate import check_space
from diffquant.calibration.progress import bars
from diffquant.checkpoint.folder import save
from diffquant.evaluation.evaluate import evaluate
from diffquant.evaluation.extra import require_extra
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
    """Record, quantize, save and evaluate the pipeline that `load` gives, below `out`: ``work``, ``checkpoint``, ``report``.

    What an earlier run has recorded, learned and drawn there is taken over. Raises as `record`, `quantize`, `save` and
    `evaluate` do.
    """
    require_extra()
    chosen = load_protocol(protocol, samples=samples)
    checkpoint, work = out / "checkpoint", out / "work"
    pipe = load()
    check_space(pipe, recipe, checkpoint)
    with recording_scheduler(pipe, chosen):
        result = quantize(pipe, recipe, chosen.calibration, folder=work, minutes=minutes)
    save(pipe, checkpoint)
    result.write(checkpoint / "quantization.json")
    del pipe  # before full precision is there once more
    with bars(True) as shown:
        return evaluate(
            {recipe.full_name: checkpoint},
            load(),
            protocol=chosen.sampling,
            out=out / "report",
            work=work / "samples",
            progress=shown.show,
        )

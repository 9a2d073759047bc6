"""How errors of single steps become the error of the last sample; `evaluation.accumulation` has the mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from PIL import Image

from diffquant.calibration.rollout import Rollout
from diffquant.errors import CalibrationError
from diffquant.evaluation.accumulation import Accumulation, accumulation, trace
from diffquant.evaluation.metrics.base import Metric
from diffquant.evaluation.runs import Reference, Run, Samples
from diffquant.evaluation.text import markdown_table, number
from diffquant.host.pipeline import Host, has_step_cache


@final
class ErrorAccumulation(Metric[Accumulation]):
    """Local, accumulated and predicted errors over steps, where the pipeline's steps can be replayed."""

    name, figure, place = "accumulation", Accumulation, 210

    def prepare(self, reference: Reference, other: Samples | None) -> Rollout | None:
        if reference.protocol.sampling.accumulation_samples == 0:
            return None
        try:
            return trace(reference.pipe, reference.protocol.sampling)
        except CalibrationError:  # steps that cannot be replayed: models are compared without
            return None

    def compute(self, run: Run, prepared: Rollout | None) -> Accumulation | None:
        denoiser = Host(run.pipe).denoiser
        if prepared is None or has_step_cache(denoiser):
            return None
        with Host(run.pipe).evaluating():
            return accumulation(prepared, denoiser, name=run.name, progress=run.progress)

    def section(self, figures: Mapping[str, Accumulation]) -> list[str]:
        stretches = zip(*(figure.stretches for figure in figures.values()), strict=True)
        lines = [
            [f"{row[0].first + 1} to {row[0].last + 1}", *(number(stretch.final_error.value) for stretch in row)]
            for row in stretches
        ]
        lines.append(["all", *(number(figure.accumulated[-1]) for figure in figures.values())])
        lines.append(["all, as local errors predict", *(number(figure.predicted[-1]) for figure in figures.values())])
        return [
            "## How errors add up",
            f"Final error (relative L2, mean of {next(iter(figures.values())).samples} trajectories) when only some steps are "
            "quantized. Predicted: the error of each single step, carried on by full precision's Jacobian.",
            markdown_table(["steps quantized", *figures], lines),
            "![Local, accumulated and predicted error over sampling steps, and the final error of each tenth](accumulation.png)",
        ]

    def picture(self, figures: Mapping[str, Accumulation]) -> Image.Image:
        from diffquant.evaluation.drawing import draw_accumulation  # matplotlib comes with an extra

        return draw_accumulation(figures)

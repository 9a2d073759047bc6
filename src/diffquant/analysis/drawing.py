"""The plots of an analysis: errors by settings, and the map of sensitivities. Needs matplotlib, of the extra ``evaluate``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image

from diffquant.analysis.sensitivity import Sensitivity
from diffquant.evaluation.drawing import LINES, rendered
from diffquant.evaluation.grids import GREY, INK, folded

MAP_LINES, MAP_RANGE = 36, 1e4  # of a sensitivity map: quantizers shown, and the ratio of the ends of its scale of colours


def draw_matrix(
    panels: Mapping[str, Sequence[Sequence[float | None]]], rows: tuple[str, Sequence[str]], columns: tuple[str, Sequence[str]]
) -> Image.Image:
    """Final errors by settings, a panel for each model on one scale of colours; None is left blank.

    `rows` and `columns` are what varies along them, and its values.
    """
    cells = [np.array([[math.nan if value is None else value for value in row] for row in panel]) for panel in panels.values()]
    largest = max((float(np.nanmax(panel)) for panel in cells if not np.isnan(panel).all()), default=0.0) or 1.0
    width, height = 1.6 + len(panels) * (0.5 + 0.8 * len(columns[1])), 1.6 + 0.36 * len(rows[1])
    figure = Figure(figsize=(max(width, 5), height), dpi=150, layout="constrained")
    for axes, name, panel in zip(figure.subplots(1, len(cells), sharey=True, squeeze=False)[0], panels, cells, strict=True):
        axes.imshow(panel, aspect="auto", cmap="Blues", vmin=0, vmax=largest, interpolation="nearest")
        for (row, column), value in np.ndenumerate(panel):
            if not math.isnan(value):
                color = "white" if value > 0.6 * largest else INK
                axes.annotate(f"{value:.3f}", (column, row), ha="center", va="center", fontsize=9, color=color)
        axes.set_xticks(range(len(columns[1])), columns[1], fontsize=9)
        axes.set_yticks(range(len(rows[1])), rows[1], fontsize=9)
        axes.set_xlabel(columns[0], color=GREY)
        axes.set_title("\n".join(folded(name)), loc="left", fontsize=11, color=INK)
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)
    figure.supylabel(rows[0], fontsize=10, color=GREY)
    figure.supxlabel("final error: relative L2 distance of the last sample from full precision's", fontsize=9, color=GREY)
    return rendered(figure)


def draw_sensitivity(sensitivity: Sensitivity) -> Image.Image:
    """The most sensitive quantizers in the model's order: their share of the last sample's error by step, and at all steps."""
    chosen = set(sorted(range(len(sensitivity.rows)), key=lambda index: -sensitivity.rows[index].share)[:MAP_LINES])
    lines = [row for index, row in enumerate(sensitivity.rows) if index in chosen]
    names = [f"{row.layer}  {row.operand} {row.bits}" for row in lines]
    largest = max((value for row in lines for value in row.by_step), default=0.0) or 1.0
    title = f"{sensitivity.recipe} after {sensitivity.passes[-1]}" if sensitivity.passes else f"{sensitivity.recipe}, ranges alone"
    figure = Figure(figsize=(12, 1.6 + 0.21 * len(lines)), dpi=150, layout="constrained")
    by_step, total = figure.subplots(1, 2, width_ratios=(5, 1), sharey=True)
    cells = np.maximum(np.array([row.by_step for row in lines]), largest / MAP_RANGE)
    image = by_step.imshow(cells, aspect="auto", cmap="Blues", norm=LogNorm(largest / MAP_RANGE, largest), interpolation="nearest")
    by_step.set_yticks(range(len(lines)), names, fontsize=8)
    places = np.unique(np.linspace(0, len(sensitivity.timesteps) - 1, min(9, len(sensitivity.timesteps))).round().astype(int))
    by_step.set_xticks(places, [f"{sensitivity.timesteps[place]:g}" for place in places])
    by_step.set_xlabel("timestep, in the order of sampling", color=GREY)
    by_step.set_title(f"{title}: what each quantizer adds to the last sample, by step", loc="left", fontsize=11, color=INK)
    by_step.tick_params(colors=GREY, length=0)
    by_step.tick_params(axis="y", labelcolor=INK)
    by_step.spines[:].set_visible(False)
    figure.colorbar(image, ax=by_step, location="bottom", shrink=0.5, aspect=40, label="share of the last sample's squared error")
    weights = sum(row.share for row in sensitivity.rows if row.operand == "weight")
    colors = [LINES[0] if row.operand == "weight" else LINES[1] for row in lines]
    total.barh(range(len(lines)), [row.share for row in lines], color=colors, height=0.7)
    for place, row in enumerate(lines):
        total.annotate(f" {row.share:.1%}", (row.share, place), va="center", fontsize=8, color=GREY)
    for height, text, color in ((16, f"weights: {weights:.0%}", LINES[0]), (3, f"inputs: {1 - weights:.0%}", LINES[1])):
        total.annotate(text, (0, 1), (0, height), "axes fraction", "offset points", fontsize=10, color=color)
    total.set_axis_off()
    rest = [row.share for index, row in enumerate(sensitivity.rows) if index not in chosen]
    if rest:
        figure.supxlabel(f"{len(rest)} more quantizers together: {sum(rest):.1%}", x=0.99, ha="right", fontsize=9, color=GREY)
    return rendered(figure)

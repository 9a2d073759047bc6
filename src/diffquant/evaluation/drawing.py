"""The plots of an evaluation: errors over the steps, by settings and by layer. Needs matplotlib, of the extra ``evaluate``."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from diffquant.analysis.sensitivity import Sensitivity
from diffquant.evaluation.accumulation import Accumulation
from diffquant.evaluation.grids import GREY, INK, RULE, folded

LABEL_GAP = 25.0  # pixels between the names of lines: their height at 150 dots an inch
MAP_LINES, MAP_RANGE = 36, 1e4  # of a sensitivity map: quantizers shown, and largest value over the least that is told apart
LINES = ("#0b62a4", "#d1495b", "#2e8540", "#b8860b", "#7b4fa3", "#007c89", "#8c564b", "#555555")


def draw_drift(lines: Mapping[str, Sequence[float]]) -> Image.Image:
    """Relative L2 of the latents over steps, one line per model, named at its end, or beside the plot where names are long.

    Zeros have no place on a logarithmic axis.
    """
    names = {name: folded(name) for name in lines}
    rows = sum(len(name) + 1 for name in names.values())  # of text, where names are long
    beside = any(len(name) > 1 for name in names.values())
    figure = Figure(figsize=(8, max(4.6, rows * LABEL_GAP / 150) if beside else 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    longest = max(len(line) for line in lines.values())
    ends: list[tuple[str, str, int, float]] = []
    for index, (name, line) in enumerate(lines.items()):
        color = LINES[index % len(LINES)]
        values = [value if value > 0 else math.nan for value in line]
        if all(math.isnan(value) for value in values):
            axes.plot([], [], color=color, label="\n".join(names[name]) + ": identical")
            continue
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=color, linewidth=1.8, marker="o" if longest <= 30 else None, markersize=3, clip_on=False)
        last = max(step for step, value in zip(steps, values, strict=True) if not math.isnan(value))
        ends.append((name, color, last, values[last - 1]))
    _logarithmic(axes)
    axes.set_xlim(1 if longest > 1 else 0.5, max(longest, 1.5))
    positive = [value for line in lines.values() for value in line if value > 0]
    if positive and max(positive) < 10 * min(positive):  # less than a decade: show the whole one, or two, for marks on the axis
        axes.set_ylim(10 ** math.floor(math.log10(min(positive))), 10 ** math.ceil(math.log10(max(positive)) + 1e-9))
    dress(axes, "Relative L2 distance of the latents from full precision", "sampling steps done")
    if beside:
        for name, color, _, _ in sorted(ends, key=lambda end: -end[3]):  # in the order of the lines' ends
            axes.plot([], [], color=color, label="\n".join(names[name]))
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), labelspacing=1.0, fontsize=10)
        return rendered(figure)
    if len(ends) < len(lines):
        axes.legend(frameon=False, loc="upper left")
    figure.draw_without_rendering()  # fixes the axes' place, which the names at the ends of lines need
    heights = [float(axes.transData.transform((step, value))[1]) for _, _, step, value in ends]
    for (name, color, _, _), height in zip(ends, _spread(heights, LABEL_GAP), strict=True):
        place = (1.01, axes.transAxes.inverted().transform((0, height))[1])
        axes.annotate(name, place, xycoords="axes fraction", color=color, va="center", fontsize=10)
    return rendered(figure)


def draw_accumulation(traced: Mapping[str, Accumulation]) -> Image.Image:
    """Left: local, accumulated and predicted error over steps. Right: final error when only one stretch of steps is quantized."""
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    over_steps, by_stretch = figure.subplots(1, 2, width_ratios=(3, 2))
    for index, (name, found) in enumerate(traced.items()):
        color = LINES[index % len(LINES)]
        steps = range(1, len(found.timesteps) + 1)
        for values, style, width in ((found.accumulated, "-", 1.8), (found.predicted, "--", 1.2), (found.local, ":", 1.2)):
            over_steps.plot(steps, [value if value > 0 else math.nan for value in values], style, color=color, linewidth=width)
        middles = [(one.first + one.last) / 2 + 1 for one in found.stretches]
        by_stretch.plot(
            middles,
            [one.final_error.value for one in found.stretches],
            "o-",
            color=color,
            markersize=4,
            label="\n".join(folded(name)),
        )
    for style, what in (("-", "accumulated"), ("--", "as local errors predict"), (":", "local: one step")):
        over_steps.plot([], [], style, color=GREY, label=what)
    _logarithmic(over_steps)
    by_stretch.set_ylim(bottom=0)
    dress(over_steps, "Error after each step", "sampling steps done")
    dress(by_stretch, "Final error, only one stretch quantized", "middle of the stretch, sampling steps")
    for axes in (over_steps, by_stretch):
        axes.legend(frameon=False, fontsize=9)
    return rendered(figure)


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


def draw_sensitivity(found: Sensitivity) -> Image.Image:
    """The most sensitive quantizers in the model's order: their part in the last sample's error by step, and at all steps."""
    chosen = set(sorted(range(len(found.rows)), key=lambda index: -found.rows[index].share)[:MAP_LINES])
    lines = [row for index, row in enumerate(found.rows) if index in chosen]
    names = [f"{row.layer}  {row.operand} {row.bits}" for row in lines]
    largest = max((value for row in lines for value in row.by_step), default=0.0) or 1.0
    title = f"{found.recipe} after {found.passes[-1]}" if found.passes else f"{found.recipe}, ranges alone"
    figure = Figure(figsize=(12, 1.6 + 0.21 * len(lines)), dpi=150, layout="constrained")
    by_step, total = figure.subplots(1, 2, width_ratios=(5, 1), sharey=True)
    cells = np.maximum(np.array([row.by_step for row in lines]), largest / MAP_RANGE)
    image = by_step.imshow(cells, aspect="auto", cmap="Blues", norm=LogNorm(largest / MAP_RANGE, largest), interpolation="nearest")
    by_step.set_yticks(range(len(lines)), names, fontsize=8)
    places = np.unique(np.linspace(0, len(found.timesteps) - 1, min(9, len(found.timesteps))).round().astype(int))
    by_step.set_xticks(places, [f"{found.timesteps[place]:g}" for place in places])
    by_step.set_xlabel("timestep, in the order of sampling", color=GREY)
    by_step.set_title(f"{title}: what each quantizer adds to the last sample, by step", loc="left", fontsize=11, color=INK)
    by_step.tick_params(colors=GREY, length=0)
    by_step.tick_params(axis="y", labelcolor=INK)
    by_step.spines[:].set_visible(False)
    figure.colorbar(image, ax=by_step, location="bottom", shrink=0.5, aspect=40, label="share of the last sample's squared error")
    weights = sum(row.share for row in found.rows if row.operand == "weight")
    colors = [LINES[0] if row.operand == "weight" else LINES[1] for row in lines]
    total.barh(range(len(lines)), [row.share for row in lines], color=colors, height=0.7)
    for place, row in enumerate(lines):
        total.annotate(f" {row.share:.1%}", (row.share, place), va="center", fontsize=8, color=GREY)
    for height, text, color in ((16, f"weights: {weights:.0%}", LINES[0]), (3, f"inputs: {1 - weights:.0%}", LINES[1])):
        total.annotate(text, (0, 1), (0, height), "axes fraction", "offset points", fontsize=10, color=color)
    total.set_axis_off()
    rest = [row.share for index, row in enumerate(found.rows) if index not in chosen]
    if rest:
        figure.supxlabel(f"{len(rest)} more quantizers together: {sum(rest):.1%}", x=0.99, ha="right", fontsize=9, color=GREY)
    return rendered(figure)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")


def dress(axes: Axes, title: str, horizontal: str) -> None:
    """The look that all plots share: a title at the left, horizontal rules, no frame."""
    axes.set_xlabel(horizontal, color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.grid(axis="y", which="major", color=RULE, linewidth=0.8)
    axes.tick_params(colors=GREY, which="both", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def rendered(figure: Figure) -> Image.Image:
    """The figure as a picture."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Image.open(png).convert("RGB")


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved apart until neighbours are `gap` pixels from each other, each cluster around its own middle."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    clusters: list[list[int]] = []
    starts: list[float] = []
    for index in order:
        members, start = [index], heights[index]
        while clusters and starts[-1] + gap * len(clusters[-1]) > start:
            members = clusters.pop() + members
            starts.pop()
            start = sum(heights[i] for i in members) / len(members) - gap * (len(members) - 1) / 2
        clusters.append(members)
        starts.append(start)
    placed = {i: start + gap * n for members, start in zip(clusters, starts, strict=True) for n, i in enumerate(members)}
    return [placed[i] for i in range(len(heights))]

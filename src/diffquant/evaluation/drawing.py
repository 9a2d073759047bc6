"""The plots of an evaluation: errors over the steps, by settings and by layer. Needs matplotlib, of the extra ``evaluate``."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from diffquant.evaluation.accumulation import Accumulation
from diffquant.evaluation.grids import GREY, INK, RULE, folded

LABEL_GAP = 25.0  # pixels between the names of lines: their height at 150 dots an inch
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
    for index, (name, errors) in enumerate(traced.items()):
        color = LINES[index % len(LINES)]
        steps = range(1, len(errors.timesteps) + 1)
        for values, style, width in ((errors.accumulated, "-", 1.8), (errors.predicted, "--", 1.2), (errors.local, ":", 1.2)):
            over_steps.plot(steps, [value if value > 0 else math.nan for value in values], style, color=color, linewidth=width)
        middles = [(stretch.first + stretch.last) / 2 + 1 for stretch in errors.stretches]
        ends = [stretch.final_error.value for stretch in errors.stretches]
        by_stretch.plot(middles, ends, "o-", color=color, markersize=4, label="\n".join(folded(name)))
    for style, what in (("-", "accumulated"), ("--", "as local errors predict"), (":", "local: one step")):
        over_steps.plot([], [], style, color=GREY, label=what)
    _logarithmic(over_steps)
    by_stretch.set_ylim(bottom=0)
    dress(over_steps, "Error after each step", "sampling steps done")
    dress(by_stretch, "Final error, only one stretch quantized", "middle of the stretch, sampling steps")
    for axes in (over_steps, by_stretch):
        axes.legend(frameon=False, fontsize=9)
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

"""Final error of AccuQuant over updates and over wall time of its last stage, from runs of several lengths.

    python benchmarks/accuquant.py compare --bits w4a6 --evaluations 600 --arms brecq M=1 M=5 "M=1 evaluations=150" ...
    python benchmarks/curves.py benchmarks/results/accuquant-compare.json --bits w4a6 --seed 0 --arms M=1 M=5

Every point is a whole run of its length (the rate falls to zero over it), not a state on the way of a longer one. Bars are 95 %
intervals of the mean over samples; brecq, where it is there, is a line at its error.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from tables import parts

from diffquant.evaluation.drawing import GREY, LINES, dress, rendered

Point = tuple[int, float, dict[str, float]]  # updates, seconds, final error


def points(found: dict[str, Any], bits: str, seed: int, arms: list[str]) -> dict[str, list[Point]]:
    """The runs of each arm, shortest first; `evaluations=N` in a label is a length of the same arm."""
    runs: dict[str, list[Point]] = defaultdict(list)
    for label, row in found.items():
        its_bits, arm, its_seed = parts(label)
        name = " ".join(option for option in arm.split() if not option.startswith("evaluations="))
        if (its_bits, its_seed) == (bits, seed) and name in arms:
            runs[name].append((row["options"]["AccuQuant"]["iterations"], row["seconds"]["AccuQuant"], row["final_error"]))
    return {arm: sorted(runs[arm], key=lambda point: point[0]) for arm in arms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--bits", default="w4a6")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", default=["M=1", "M=5"])
    parser.add_argument("--out", type=Path, default=Path("docs/images/accuquant-curves.png"))
    arguments = parser.parse_args()
    found = json.loads(arguments.file.read_text())["arms"]
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    sides = figure.subplots(1, 2, sharey=True)
    for color, (arm, runs) in zip(LINES, points(found, arguments.bits, arguments.seed, arguments.arms).items(), strict=False):
        if not runs:
            raise SystemExit(f"{arguments.file}: no run of {arm} at {arguments.bits} with seed {arguments.seed}")
        values = [error["value"] for _, _, error in runs]
        bars = [[error["value"] - error["low"] for _, _, error in runs], [error["high"] - error["value"] for _, _, error in runs]]
        for axes, places in zip(sides, ([run[0] for run in runs], [run[1] for run in runs]), strict=True):
            axes.errorbar(places, values, yerr=bars, color=color, marker="o", markersize=4, capsize=2, label=arm)
        for updates, seconds, error in runs:
            print(f"{arm}: {updates} updates, {seconds:.0f} s: {error['value']:.3f} [{error['low']:.3f}, {error['high']:.3f}]")
    brecq = found.get(f"{arguments.bits} brecq seed {arguments.seed}")
    for axes, what in zip(sides, ("updates", "seconds of the last stage, one thread"), strict=True):
        axes.set_xscale("log")
        dress(axes, f"Final error, {arguments.bits.upper()}" if what == "updates" else "", what)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        if brecq is not None:
            axes.axhline(brecq["final_error"]["value"], color=GREY, linestyle="--", linewidth=1.2, label="brecq")
        axes.set_ylim(bottom=0)
    sides[0].legend(frameon=False)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rendered(figure).save(arguments.out)


if __name__ == "__main__":
    main()

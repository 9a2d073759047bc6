"""Final error of AccuQuant over updates and over wall time of its last stage, from runs of several lengths.

    python benchmarks/run.py benchmarks/studies/accuquant.yaml
    python benchmarks/curves.py benchmarks/results/accuquant.csv --bits w4a6 --seed 0

Every point is a whole run of its length (the rate falls to zero over it), not a state on the way of a longer one. Bars are 95 %
intervals of the mean over samples; brecq, where it is there, is a line at its error.
"""

import argparse
from pathlib import Path

import rows
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console

from diffquant.evaluation.drawing import LINES, dress, rendered
from diffquant.evaluation.grids import GREY

LENGTH = "AccuQuant.iterations="
STEPS = "AccuQuant.steps_per_segment="
OWN_STEPS = 5  # of the recipe


def steps_of(row: rows.Row) -> str:
    """`M=5`, for a row that differs from the recipe in M and the length only; else nothing."""
    options = row.get("options", "").split()
    if row["recipe"] != "accuquant" or any(not option.startswith((LENGTH, STEPS)) for option in options):
        return ""
    return "M=" + next((option.removeprefix(STEPS) for option in options if option.startswith(STEPS)), str(OWN_STEPS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--bits", default="w4a6")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", default=["M=1", "M=5"], help="steps at once")
    parser.add_argument("--out", type=Path, default=Path("docs/images/accuquant-curves.png"))
    arguments = parser.parse_args()
    console = Console(highlight=False)
    table = [row for row in rows.read(arguments.file) if (row["bits"], row["seed"]) == (arguments.bits, arguments.seed)]
    rows.check_same(table)
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    sides = figure.subplots(1, 2, sharey=True)
    for color, arm in zip(LINES, arguments.arms, strict=False):
        runs = sorted((row for row in table if steps_of(row) == arm), key=lambda row: row["updates"])
        if not runs:
            raise SystemExit(f"{arguments.file}: no run of {arm} at {arguments.bits} with seed {arguments.seed}")
        values = [row["final_error"] for row in runs]
        bars = [
            [row["final_error"] - row["final_error_low"] for row in runs],
            [row["final_error_high"] - row["final_error"] for row in runs],
        ]
        for axes, column in zip(sides, ("updates", "seconds_last_pass"), strict=True):
            places = [row[column] for row in runs]
            axes.errorbar(places, values, yerr=bars, color=color, marker="o", markersize=4, capsize=2, label=arm)
        for row in runs:
            interval = f"{row['final_error']:.3f} [{row['final_error_low']:.3f}, {row['final_error_high']:.3f}]"
            console.print(f"{arm}: {row['updates']} updates, {row['seconds_last_pass']:.0f} s: {interval}", markup=False)
    brecq = next((row for row in table if rows.arm(row) == "brecq"), None)
    for axes, what in zip(sides, ("updates", "seconds of the last stage, one thread"), strict=True):
        axes.set_xscale("log")
        dress(axes, f"Final error, {arguments.bits.upper()}" if what == "updates" else "", what)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        if brecq is not None:
            axes.axhline(brecq["final_error"], color=GREY, linestyle="--", linewidth=1.2, label="brecq")
        axes.set_ylim(bottom=0)
    sides[0].legend(frameon=False)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rendered(figure).save(arguments.out)


if __name__ == "__main__":
    main()

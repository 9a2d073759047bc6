"""Tables of what `compare.py` and `accuquant.py compare` wrote, every arm beside a baseline of the same bits and seed.

    python benchmarks/tables.py benchmarks/results/accuquant-compare.json --bits w4a6 --base brecq
    python benchmarks/tables.py benchmarks/results/accuquant-compare.json benchmarks/results/mixed-compare.json --over-seeds
    python benchmarks/tables.py benchmarks/results/dmq-compare.json --base "brecq layers.0.sets=1000 layers.1.sets=1000"
    python benchmarks/tables.py benchmarks/results/qncd-compare.json --quality

Ratios of mean final errors are paired by noise; intervals are 95 % bootstrap intervals of the mean over those samples. Of several
calibration seeds the last column has the mean of the ratios and the least and largest of them. `single steps` is the squared error
of single steps from full-precision latents, in thousandths. With --over-seeds there is one line for each arm: means over its seeds,
least and largest in brackets, and single steps as ratios. With --quality, FID to the data and legibility, and how far both are from
full precision's, paired by noise and without FID's bias of n.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from diffquant.evaluation.intervals import Interval, bootstrap_ratio_of_means, interval_generator

COLUMNS = ("seed", "arm", "final error", "median", "single steps", "FID (floor)", "ratio", "over seeds")
QUALITY = ("seed", "arm", "FID to data", "change", "legibility", "change")
OVER_SEEDS = ("arm", "seeds", "final error", "median", "FID", "ratio", "single steps")


def parts(label: str) -> tuple[str, str, int]:
    """Bits, arm and seed of a label "w4a6 M=5 exact seed 0"."""
    rest, _, seed = label.rpartition(" seed ")
    bits, _, arm = rest.partition(" ")
    return bits, arm, int(seed)


def written(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def ratio(row: dict[str, Any], base: dict[str, Any]) -> Interval:
    errors = (torch.tensor(each["errors"], dtype=torch.float64) for each in (row, base))
    return bootstrap_ratio_of_means(*errors, interval_generator())


def arms(found: dict[str, dict[str, Any]], base: str, bits: str, only: list[str] | None) -> dict[str, dict[int, dict[str, Any]]]:
    """Results of the arms at some bits, by arm and seed."""
    rows: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for label, row in found.items():
        its_bits, arm, seed = parts(label)
        if its_bits == bits and (only is None or arm in {*only, base}):
            rows[arm][seed] = row
    return rows


def ratios(rows: dict[str, dict[int, dict[str, Any]]], arm: str, base: str) -> dict[int, Interval]:
    """An arm's ratio to the baseline, for the seeds that have both."""
    compared_to = {} if arm == base else rows.get(base, {})
    return {seed: ratio(row, compared_to[seed]) for seed, row in rows[arm].items() if seed in compared_to}


def table(rows: dict[str, dict[int, dict[str, Any]]], base: str) -> list[tuple[str, ...]]:
    """A line for each arm and seed."""
    lines = []
    for arm, seeds in rows.items():
        compared = ratios(rows, arm, base)
        pooled = over(each.value for each in compared.values()) if len(compared) > 1 else ""
        for seed, row in sorted(seeds.items()):
            error, median, fid = Interval(**row["final_error"]), row["median"]["value"], row["fid"]["value"]
            its = f"{compared[seed].value:.2f} [{compared[seed].low:.2f}, {compared[seed].high:.2f}]" if seed in compared else ""
            steps = f"{1e3 * row['single_step']['error']:.2f}" if "single_step" in row else ""
            lines.append((str(seed), arm, written(error), f"{median:.3f}", steps, f"{fid:.2f} ({row['floor']:.1f})", its, pooled))
            pooled = ""
    return lines


def table_over_seeds(rows: dict[str, dict[int, dict[str, Any]]], base: str) -> list[tuple[str, ...]]:
    """A line for each arm."""
    lines = []
    for arm, seeds in rows.items():
        measured = [over(row[name]["value"] for row in seeds.values()) for name in ("final_error", "median", "fid")]
        compared = over(each.value for each in ratios(rows, arm, base).values())
        steps = over(
            row["single_step"]["error"] / rows[base][seed]["single_step"]["error"]
            for seed, row in seeds.items()
            if arm != base and "single_step" in row and "single_step" in rows.get(base, {}).get(seed, {})
        )
        lines.append((arm, " ".join(str(seed) for seed in sorted(seeds)), *measured, compared, steps))
    return lines


def table_of_quality(rows: dict[str, dict[int, dict[str, Any]]], base: str) -> list[tuple[str, ...]]:
    """A line for each arm and seed."""
    found = [(str(seed), arm, row) for arm, seeds in rows.items() for seed, row in sorted(seeds.items())]
    return [
        (
            seed,
            arm,
            f"{row['to_data']['value']:.2f}",
            written(Interval(**row["to_data_change"])),
            f"{row['legibility']['value']:.3f}",
            written(Interval(**row["legibility_change"])),
        )
        for seed, arm, row in found
        if "to_data_change" in row
    ]


def over(values: Iterable[float]) -> str:
    """Mean, least and largest; nothing of nothing."""
    given = list(values)
    spread = f" ({min(given):.3f} to {max(given):.3f})" if len(given) > 1 else ""
    return f"{statistics.mean(given):.3f}{spread}" if given else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--base", default="brecq", help="the arm that ratios are to")
    parser.add_argument("--bits", nargs="+", help="default: all in the files")
    parser.add_argument("--arms", nargs="+", help="default: all in the files")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--over-seeds", action="store_true", help="one line for each arm")
    kind.add_argument("--quality", action="store_true", help="FID to the data and legibility")
    arguments = parser.parse_args()
    columns, lines_of = (COLUMNS, table)
    if arguments.over_seeds:
        columns, lines_of = OVER_SEEDS, table_over_seeds
    elif arguments.quality:
        columns, lines_of = QUALITY, table_of_quality
    found: dict[str, dict[str, Any]] = {}
    for file in arguments.files:
        found |= json.loads(file.read_text())["arms"]
    for bits in arguments.bits or sorted({parts(label)[0] for label in found}):
        print(f"\n{bits}, ratio to {arguments.base}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for line in lines_of(arms(found, arguments.base, bits, arguments.arms), arguments.base):
            print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()

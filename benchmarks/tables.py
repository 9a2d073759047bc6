"""Tables of what `compare.py` and `accuquant.py compare` wrote, every arm beside a baseline of the same bits and seed.

    python benchmarks/tables.py benchmarks/results/accuquant-compare.json --bits w4a6 --base brecq
    python benchmarks/tables.py benchmarks/results/dmq-compare.json --base "brecq layers.0.sets=1000 layers.1.sets=1000"

Ratios of mean final errors are paired by noise; intervals are 95 % bootstrap intervals of the mean over those samples. Of several
calibration seeds the last column has the mean of the ratios and the least and largest of them.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from diffquant.evaluation.features import interval_generator
from diffquant.evaluation.metrics import Interval, bootstrap_ratio_of_means

COLUMNS = ("seed", "arm", "final error", "median", "FID (floor)", "ratio", "over seeds")


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


def table(found: dict[str, dict[str, Any]], base: str, bits: str, only: list[str] | None) -> list[tuple[str, ...]]:
    """Rows of the arms at some bits; an arm's ratio is left empty where its seed lacks the baseline."""
    rows: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for label, row in found.items():
        its_bits, arm, seed = parts(label)
        if its_bits == bits and (only is None or arm in {*only, base}):
            rows[arm][seed] = row
    lines = []
    for arm, seeds in rows.items():
        compared_to = {} if arm == base else rows.get(base, {})
        ratios = {seed: ratio(row, compared_to[seed]) for seed, row in seeds.items() if seed in compared_to}
        values = [each.value for each in ratios.values()]
        pooled = f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        for seed, row in sorted(seeds.items()):
            error, median, fid = Interval(**row["final_error"]), row["median"]["value"], row["fid"]["value"]
            compared = f"{ratios[seed].value:.2f} [{ratios[seed].low:.2f}, {ratios[seed].high:.2f}]" if seed in ratios else ""
            lines.append((str(seed), arm, written(error), f"{median:.3f}", f"{fid:.2f} ({row['floor']:.1f})", compared, pooled))
            pooled = ""
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--base", default="brecq", help="the arm that ratios are to")
    parser.add_argument("--bits", nargs="+", help="default: all in the files")
    parser.add_argument("--arms", nargs="+", help="default: all in the files")
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for file in arguments.files:
        found |= json.loads(file.read_text())["arms"]
    for bits in arguments.bits or sorted({parts(label)[0] for label in found}):
        print(f"\n{bits}, ratio to {arguments.base}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for line in table(found, arguments.base, bits, arguments.arms):
            print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()

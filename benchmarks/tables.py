"""Tables of the results of studies, every arm beside a baseline of the same bits and seed.

    python benchmarks/tables.py benchmarks/results/accuquant.csv --bits w4a6 --base brecq
    python benchmarks/tables.py benchmarks/results/accuquant.csv benchmarks/results/mixed.csv --over-seeds
    python benchmarks/tables.py benchmarks/results/dmq.csv --base "brecq layers.0.sets=1000 layers.1.sets=1000"
    python benchmarks/tables.py benchmarks/results/qncd.csv --quality
    python benchmarks/tables.py benchmarks/results/samplers-glyph-sd.csv --samplers

Ratios of mean final errors are paired by noise; intervals are 95 % bootstrap intervals of the mean over those samples. Of several
calibration seeds the last column has the mean of the ratios and the least and largest of them. `single steps` is the squared error
of single steps from full-precision latents, in thousandths. With --over-seeds there is one line for each arm: means over its seeds,
least and largest in brackets, and single steps as ratios. With --quality, FID to the data and legibility, and how far both are from
full precision's, paired by noise and without FID's bias of n. With --samplers, final errors by sampler and number of steps. Rows of
different models or protocols are refused beside each other.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import rows
from rich.console import Console

from diffquant.evaluation.intervals import Interval

COLUMNS = ("seed", "arm", "final error", "median", "single steps", "FID (floor)", "ratio", "over seeds")
QUALITY = ("seed", "arm", "FID to data", "change", "legibility", "change")
OVER_SEEDS = ("arm", "seeds", "final error", "median", "FID", "ratio", "single steps")


class Source(NamedTuple):
    """A row and the file that it is from, where its errors lie."""

    row: rows.Row
    file: Path


Arms = dict[str, dict[int, Source]]  # by arm and seed


def arms(sources: Iterable[Source], base: str, bits: str, only: Sequence[str] | None) -> Arms:
    """The arms at some bits. Raises `ResultsError` for rows that do not belong side by side, and for an arm that is there twice."""
    chosen = [source for source in sources if source.row.get("bits") == bits]
    chosen = [source for source in chosen if only is None or rows.arm(source.row) in {*only, base}]
    rows.check_same(row for row, _ in chosen)
    table: Arms = defaultdict(dict)
    for row, file in chosen:
        if twin := table[rows.arm(row)].get(row["seed"]):
            places = " and ".join(dict.fromkeys((twin.file.name, file.name)))
            raise rows.ResultsError(
                f"{rows.label(row)!r}: is in {places} twice; an arm has one row; leave one file out, or choose --arms"
            )
        table[rows.arm(row)][row["seed"]] = Source(row, file)
    return table


def ratios(table: Arms, arm: str, base: str) -> dict[int, Interval]:
    """An arm's ratio to the baseline, for the seeds that have both."""
    compared = {}
    for seed, source in table[arm].items():
        other = None if arm == base else table.get(base, {}).get(seed)
        if other is not None and (ratio := rows.ratio(source.file, source.row, other.file, other.row)) is not None:
            compared[seed] = ratio
    return compared


def interval(row: rows.Row, column: str) -> str:
    """A figure and its interval."""
    return f"{row[column]:.3f} [{row[f'{column}_low']:.3f}, {row[f'{column}_high']:.3f}]"


def table_of_arms(table: Arms, base: str) -> list[tuple[str, ...]]:
    """A line for each arm and seed."""
    lines = []
    for arm, seeds in table.items():
        compared = ratios(table, arm, base)
        pooled = over(each.value for each in compared.values()) if len(compared) > 1 else ""
        for seed, (row, _) in sorted(seeds.items()):
            ratio = compared.get(seed)
            paired = "" if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            steps = f"{1e3 * row['single_step_error']:.2f}" if "single_step_error" in row else ""
            fid = f"{row['fid']:.2f} ({row['fid_floor']:.1f})"
            median = f"{row['final_error_median']:.3f}"
            lines.append((str(seed), arm, interval(row, "final_error"), median, steps, fid, paired, pooled))
            pooled = ""
    return lines


def table_over_seeds(table: Arms, base: str) -> list[tuple[str, ...]]:
    """A line for each arm."""
    lines = []
    for arm, seeds in table.items():
        measured = [over(row[name] for row, _ in seeds.values()) for name in ("final_error", "final_error_median", "fid")]
        compared = over(each.value for each in ratios(table, arm, base).values())
        steps = over(
            row["single_step_error"] / table[base][seed].row["single_step_error"]
            for seed, (row, _) in seeds.items()
            if arm != base
            and "single_step_error" in row
            and seed in table.get(base, {})
            and "single_step_error" in table[base][seed].row
        )
        lines.append((arm, " ".join(str(seed) for seed in sorted(seeds)), *measured, compared, steps))
    return lines


def table_of_quality(table: Arms, base: str) -> list[tuple[str, ...]]:
    """A line for each arm and seed."""
    every = [(str(seed), arm, row) for arm, seeds in table.items() for seed, (row, _) in sorted(seeds.items())]
    return [
        (
            seed,
            arm,
            f"{row['fid_to_data']:.2f}",
            interval(row, "fid_to_data_change"),
            f"{row['legibility']:.3f}",
            interval(row, "legibility_change"),
        )
        for seed, arm, row in every
        if "fid_to_data_change" in row
    ]


def table_of_samplers(sources: Sequence[Source]) -> str:
    """Final errors, a column for each number of steps."""
    rows.check_same((row for row, _ in sources), ignoring=("sampler", "steps", "eta", "clip"))
    cells: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for row, _ in sources:
        fields = rows.protocol_fields(row["protocol"])
        eta, clips = f" eta {fields['eta']}" if fields["eta"] != "0" else "", " (clips)" if fields["clip"] == "yes" else ""
        options = row.get("recording", "").partition("clip_sample=False")[1] and ", recorded without clipping"
        name = f"{row.get('bits', '')} {rows.arm(row)} seed {row.get('seed', '')}{options}"
        cells[f"{fields['sampler']}{eta}{clips}", name][int(fields["steps"])] = interval(row, "final_error")
    steps = sorted({count for line in cells.values() for count in line})
    lines, last = [], ""
    for (sampler, name), line in sorted(
        cells.items(), key=lambda item: list(dict.fromkeys(key[0] for key in cells)).index(item[0][0])
    ):
        lines.append(("" if sampler == last else sampler, name, *(line.get(count, "") for count in steps)))
        last = sampler
    return printed(("sampler", "", *(f"{count} steps" for count in steps)), lines)


def over(values: Iterable[float]) -> str:
    """Mean, least and largest; nothing of nothing."""
    every = list(values)
    spread = f" ({min(every):.3f} to {max(every):.3f})" if len(every) > 1 else ""
    return f"{statistics.mean(every):.3f}{spread}" if every else ""


def printed(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join([f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(line)} |" for line in lines)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--base", default="brecq", help="the arm that ratios are to")
    parser.add_argument("--bits", nargs="+", help="default: all in the files")
    parser.add_argument("--arms", nargs="+", help="default: all in the files")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--over-seeds", action="store_true", help="one line for each arm")
    kind.add_argument("--quality", action="store_true", help="FID to the data and legibility")
    kind.add_argument("--samplers", action="store_true", help="final errors by sampler and number of steps")
    chosen = parser.parse_args(arguments)
    console = Console(width=1000, highlight=False, markup=False)
    try:
        if missing := [str(file) for file in chosen.files if not file.exists()]:
            raise rows.ResultsError(f"{', '.join(missing)}: no such file; results are in {rows.RESULTS.name}/NAME.csv")
        sources = [Source(row, file) for file in chosen.files for row in rows.read(file)]
        if chosen.samplers:
            console.print(table_of_samplers(sources))
            return
        columns, lines_of = (COLUMNS, table_of_arms)
        if chosen.over_seeds:
            columns, lines_of = OVER_SEEDS, table_over_seeds
        elif chosen.quality:
            columns, lines_of = QUALITY, table_of_quality
        for bits in chosen.bits or sorted({row["bits"] for row, _ in sources if "bits" in row}):
            table = arms(sources, chosen.base, bits, chosen.arms)
            console.print(f"\n{bits}, ratio to {chosen.base}\n\n{printed(columns, lines_of(table, chosen.base))}")
    except rows.ResultsError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()

"""The tables of docs/compared.md, from results/compared.csv.

    python benchmarks/compared_page.py            # writes what stands between the two marks of the page
    python benchmarks/compared_page.py --check    # fails where the page is not what the rows say

The text around the tables is written by hand.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import rows

PAGE = Path(__file__).parents[1] / "docs" / "compared.md"
BEGIN, END = "<!-- tables: benchmarks/compared_page.py -->", "<!-- end of tables -->"
OWN = "diffquant"
FOUR_BITS = ("int4", "4-bit", "Q4")
SAME = 1.02  # files that differ by less have one size
HEADER = (
    *("tool, setting", "computes with", "final error", "single step", "FID", "file, MB", "call"),
    *("minutes", "lines"),
)
AT_SIZE = ("tool, setting", "file, MB", "final error", "ours at that size", "file, MB", "final error", "ratio")


def table(header: Sequence[str], cells: Iterable[Sequence[str]], words: int) -> str:
    """A table of Markdown whose first `words` columns are text."""
    lines = [header, [*["---"] * words, *["---:"] * (len(header) - words)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def name_of(row: rows.Row) -> str:
    version = "" if row["tool"] == OWN else f" {row.get('version', '')}"
    return f"{row['tool']}{version}, {row['setting']}"


def megabytes(row: rows.Row) -> str:
    return f"{row['bytes'] / 1e6:.2f}"


def line(row: rows.Row) -> list[str]:
    """The cells of a row."""
    if "final_error" not in row:
        return [name_of(row), row.get("reason", ""), *[""] * (len(HEADER) - 2)]
    left = f"; in floating point: {row['left_in_float']}" if row.get("left_in_float") else ""
    return [
        name_of(row),
        row["runs"] + left,
        f"{row['final_error']:.3g} [{row['final_error_low']:.2g}, {row['final_error_high']:.2g}]",
        f"{row['single_step_error']:.1e}",
        f"{row['fid']:.1f}" if row["fid"] > row["fid_floor"] else "",
        megabytes(row),
        f"{row['seconds_ratio']:.2f}",
        f"{row['minutes']:.1f}",
        str(row["lines"]),
    ]


def best_at(size: float, own: Sequence[rows.Row]) -> rows.Row | None:
    """The best of our arms whose file is not larger."""
    return min((row for row in own if row["bytes"] <= SAME * size), key=lambda row: row["final_error"], default=None)


def at_equal_size(own: Sequence[rows.Row], others: Sequence[rows.Row]) -> str:
    """Every other tool beside the best of our arms at its file size, and the largest ratios."""
    cells, ratios = [], dict[str, list[float]]()
    for row in sorted(others, key=lambda each: each["bytes"]):
        theirs = [name_of(row), megabytes(row), f"{row['final_error']:.3g}"]
        if (best := best_at(row["bytes"], own)) is None:
            cells.append([*theirs, "no arm is so small", "", "", ""])
            continue
        ratio = best["final_error"] / row["final_error"] if row["final_error"] else None  # 0: it quantized nothing
        if ratio is not None:
            bits = "4" if any(word in row["setting"] for word in FOUR_BITS) else "8"
            ratios.setdefault(bits, []).append(ratio)
        shown = "" if ratio is None else f"{ratio:.2f}"
        cells.append([*theirs, best["setting"], megabytes(best), f"{best['final_error']:.3g}", shown])
    largest = ", ".join(f"{max(ratios[bits]):.2f} of tools with {bits}-bit weights" for bits in sorted(ratios))
    return f"{table(AT_SIZE, cells, 1)}\n\nThe largest ratio is {largest}."


def tables() -> str:
    """For each model: at equal size, then every arm, best final error first, tools that do not take it last."""
    every, parts = rows.read(rows.RESULTS / "compared.csv"), []
    for model in dict.fromkeys(row["model"] for row in every):
        arms = [row for row in every if row["model"] == model]
        done = [row for row in arms if "final_error" in row]
        own, others = [row for row in done if row["tool"] == OWN], [row for row in done if row["tool"] != OWN]
        ordered = sorted(arms, key=lambda row: row.get("final_error", float("inf")))
        parts.append(
            f"## {model}\n\nIn float32 {arms[0]['float32_bytes'] / 1e6:.2f} MB, FID's floor {done[0]['fid_floor']:.1f}.\n\n"
            f"### At equal file size\n\n{at_equal_size(own, others)}\n\n### Every arm\n\n{table(HEADER, map(line, ordered), 2)}"
        )
    machines = sorted({f"{row['cpu']} ({row['instructions']}), {row['threads']} thread" for row in every})
    return "\n\n".join([*parts, f"{every[0]['samples']} samples for each arm. Machines: {'; '.join(machines)}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    written = f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"
    if parser.parse_args().check:
        sys.exit(0 if written == text else f"{PAGE.name}: not what the rows say; run python benchmarks/compared_page.py")
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The tables of docs/compared.md, from results/compared.csv.

    python benchmarks/compared_page.py

What stands between the two marks of the page is replaced; the text around them is written by hand.
"""

from pathlib import Path

import rows

PAGE = Path(__file__).parents[1] / "docs" / "compared.md"
BEGIN, END = "<!-- tables: benchmarks/compared_page.py -->", "<!-- end of tables -->"
HEADER = (
    "tool, setting",
    "final error",
    "single step",
    "weights, of float32",
    "time of a call, of float32",
    "minutes",
    "lines",
    "computes with",
)


def line(row: rows.Row) -> list[str]:
    """The cells of a row."""
    name = f"{row['tool']} {row.get('version', '')}, {row['setting']}"
    if "final_error" not in row:
        return [name, row.get("reason", ""), *[""] * (len(HEADER) - 2)]
    left = f"; left in float: {row['left_in_float']}" if row.get("left_in_float") else ""
    return [
        name,
        f"{row['final_error']:.3f} [{row['final_error_low']:.3f}, {row['final_error_high']:.3f}]",
        f"{row['single_step_error']:.2g}",
        f"{row['bytes'] / row['float32_bytes']:.2f}",
        f"{row['seconds_ratio']:.2f}",
        f"{row['minutes']:.1f}",
        str(row["lines"]),
        row["runs"] + left,
    ]


def tables() -> str:
    """A table for each model, best final error first, tools that do not take it last."""
    parts = []
    every = rows.read(rows.RESULTS / "compared.csv")
    for model in dict.fromkeys(row["model"] for row in every):
        own = sorted((row for row in every if row["model"] == model), key=lambda row: row.get("final_error", 1e9))
        cells = [HEADER, ("---", *["---:"] * 6, "---"), *map(line, own)]
        parts.append(f"## {model}\n\n" + "\n".join("| " + " | ".join(each) + " |" for each in cells))
    machine = next(iter(every), {})
    parts.append(
        f"{machine.get('samples')} samples, {machine.get('cpu')}, {machine.get('threads')} thread, {machine.get('versions')}."
    )
    return "\n\n".join(parts)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

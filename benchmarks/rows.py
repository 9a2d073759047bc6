"""Results as CSV: one row for each arm of a study, with what it ran on; and per-sample errors beside them, for paired ratios.

An arm is a recipe and what is changed in it, at some bits, with one calibration seed, measured under one protocol. `COLUMNS` are
its columns; a column that no row fills is left out of the file. Results that are no arms (layers, steps, groups) are tables with
columns of their own and the same provenance. Every file is written whole, under a temporary name that is then renamed. What is not
known is "not recorded".

`NAME.npz` holds an array for each arm, by its label, where arms of `NAME.csv` were measured on the same noise. Its values are half
precision; ratios of their means differ from those of single precision by less than one in a thousand.
"""

import csv
import functools
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

import diffquant as dq
from diffquant.evaluation.intervals import Interval, bootstrap_ratio_of_means, interval_generator

RESULTS = Path(__file__).parent / "results"
UNKNOWN = "not recorded"

INTERVALS = ("final_error", "final_error_median", "psnr", "fid_to_data_change", "legibility", "legibility_change", "accuracy")
KEY = ("model", "recipe", "options", "bits", "seed", "correction", "protocol", "recording", "samples")
PROVENANCE = ("commit", "versions", "cpu", "instructions", "engine")
TEXT = (*KEY[:-1], "drift", *PROVENANCE)


def bounded(*names: str) -> tuple[str, ...]:
    """A column for each figure, and those of the ends of its 95 % interval."""
    return tuple(column for name in names for column in (name, f"{name}_low", f"{name}_high"))


COLUMNS = (
    *KEY,
    *bounded("final_error", "final_error_median", "psnr"),
    "fid",
    *bounded("fid_extrapolated"),  # to infinitely many samples; the interval belongs to it, not to `fid`
    "fid_floor",
    "fid_to_data",
    *bounded("fid_to_data_extrapolated", "fid_to_data_change", "legibility", "legibility_change"),
    "legibility_full_precision",
    *bounded("accuracy"),
    "single_step_error",  # squared, from full-precision latents
    "single_step_mean",  # the share of it that shifts all values of all pictures alike
    "drift",  # relative distance of the latents, after about ten steps over the trajectory
    "calls",  # of the denoiser, a trajectory
    "latent_mean",  # of the last latents
    "latent_deviation",
    "updates",  # of the last pass
    "bytes",
    "seconds_calibration",
    "seconds_last_pass",
    "seconds_a_picture",
    *PROVENANCE,
)

Row = dict[str, Any]


class ResultsError(dq.DiffquantError):
    """Results that are damaged, or that do not belong side by side."""


def read(file: Path) -> list[Row]:
    """The rows of a file, numbers as numbers; an empty cell is left out. No rows if there is no such file."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        return [{key: _value(key, cell) for key, cell in row.items() if cell} for row in csv.DictReader(opened)]


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file: columns of arms in the order of `COLUMNS`, others before provenance, as they first occur."""
    filled = {key for row in rows for key, value in row.items() if value not in (None, "")}
    present = [key for key in dict.fromkeys(key for row in rows for key in row) if key in filled]
    known = [column for column in COLUMNS if column in present and column not in PROVENANCE]
    arms = set(present) <= set(COLUMNS)
    ours = known if arms else [column for column in present if column not in PROVENANCE]
    columns = [*ours, *(column for column in PROVENANCE if column in present)]

    def save(opened: BinaryIO) -> None:
        lines = (",".join(_quoted(_cell(row.get(column))) for column in columns) for row in rows)
        opened.write("".join(f"{line}\n" for line in (",".join(_quoted(column) for column in columns), *lines)).encode())

    _whole(file, save)


def append(file: Path, row: Row) -> None:
    """Add the row of an arm to a study, or replace it. Raises `ResultsError` for a column that is none of `COLUMNS`."""
    if unknown := sorted(row.keys() - set(COLUMNS)):
        raise ResultsError(f"{file}: columns {', '.join(unknown)}; allowed are those of rows.COLUMNS; add them there")
    put(file, [row], KEY)


def put(file: Path, new: Iterable[Row], key: Sequence[str]) -> None:
    """Add rows to a table of any columns; those with the same `key` are replaced."""
    table = {_key(row, key): row for row in read(file)}
    for row in new:
        table[_key(row, key)] = row
    write(file, list(table.values()))


def finished(rows: Iterable[Row], wanted: Mapping[str, Any]) -> Row | None:
    """The row of an arm that was measured already: all of `KEY` is equal."""
    return next((row for row in rows if _key(row, KEY) == _key(wanted, KEY)), None)


def label(row: Mapping[str, Any]) -> str:
    """An arm in one line: the name of its errors in the `.npz`."""
    words = (row.get("bits"), arm(row), f"seed {row['seed']}" if row.get("seed") not in (None, "") else "", row.get("correction"))
    return " ".join(str(word) for word in words if word)


def arm(row: Mapping[str, Any]) -> str:
    """The recipe and its options."""
    return f"{row['recipe']} {row.get('options', '')}".strip()


def errors_of(file: Path) -> dict[str, torch.Tensor]:
    """The per-sample errors beside a CSV file, by label; empty if there are none."""
    beside = file.with_suffix(".npz")
    if not beside.exists():
        return {}
    with np.load(beside, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name].astype(np.float64)) for name in arrays.files}


def append_errors(file: Path, arrays: Mapping[str, torch.Tensor]) -> None:
    """Add arrays to the `.npz` beside a CSV file."""
    beside = file.with_suffix(".npz")
    present: dict[str, Any] = {}
    if beside.exists():
        with np.load(beside, allow_pickle=False) as stored:
            present = {name: stored[name] for name in stored.files}
    present |= {name: values.cpu().numpy().astype(np.float16) for name, values in arrays.items()}
    _whole(beside, lambda opened: np.savez_compressed(opened, **present))


def ratio(file: Path, row: Row, base_file: Path, base: Row) -> Interval | None:
    """Mean final error of one arm over that of another, paired by noise; None if the errors of either were not kept.

    Raises `ResultsError` for different protocols, models or numbers of samples.
    """
    check_same([row, base])
    errors, base_errors = errors_of(file).get(label(row)), errors_of(base_file).get(label(base))
    if errors is None or base_errors is None:
        return None
    return bootstrap_ratio_of_means(errors, base_errors, interval_generator())


def check_same(rows: Iterable[Row], ignoring: Sequence[str] = ()) -> None:
    """Raise `ResultsError`, naming the fields, for rows whose figures cannot stand side by side."""
    rows = list(rows)
    if not rows:
        return
    fields = [_comparable(row) for row in rows]
    for row, each in zip(rows[1:], fields[1:], strict=True):
        different = [
            f"{name} {fields[0].get(name, 'none')} and {each.get(name, 'none')}"
            for name in dict.fromkeys([*fields[0], *each])
            if name not in ignoring and fields[0].get(name) != each.get(name)
        ]
        if different:
            raise ResultsError(
                f"{label(rows[0])!r} beside {label(row)!r}: {', '.join(different)}; "
                "only rows of one model and protocol are comparable; choose rows that agree"
            )


def protocol_text(**fields: Any) -> str:
    """A protocol as text: `sampler=DDIM steps=50 ...`."""
    return " ".join(f"{name}={_cell(value)}" for name, value in fields.items())


def protocol_fields(text: str) -> dict[str, str]:
    """The fields of such a text."""
    return {name: value for name, _, value in (word.partition("=") for word in text.split())}


@functools.cache
def provenance() -> Row:
    """What every row says about the code and the machine that made it; the engine is a row's own."""
    machine = dq.info()
    packages = ("torch", "diffusers", "diffquant")
    return {
        "commit": commit(),
        "versions": ", ".join(f"{name} {_version(name)}" for name in packages),
        "cpu": machine.processor,
        "instructions": " ".join(machine.instructions),
    }


def commit() -> str:
    """The commit of the working tree, with a note of changes to the package that are not committed."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=7", "HEAD") + (" and changes" if git("status", "--porcelain", "--", "../src") else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def _comparable(row: Row) -> dict[str, str]:
    return {
        "model": row.get("model", ""),
        **protocol_fields(row.get("protocol", "")),
        "samples": _cell(row.get("samples")),
    }


def _key(row: Mapping[str, Any], key: Sequence[str]) -> tuple[str, ...]:
    return tuple(_cell(row.get(name)) for name in key)


def _value(column: str, cell: str) -> Any:
    if column in TEXT and column != "seed":
        return cell
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if any(mark in cell for mark in ',"\n') else cell


def _whole(file: Path, save: Callable[[BinaryIO], object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    try:
        with partial.open("wb") as opened:
            save(opened)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return UNKNOWN

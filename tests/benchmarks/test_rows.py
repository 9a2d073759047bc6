"""Rows of results: written whole, read back, found again, and refused beside those of another protocol."""

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.csv"))
ROW = {
    "model": "glyph-ddim",
    "recipe": "brecq",
    "options": "",
    "bits": "w4a6",
    "seed": 0,
    "correction": "",
    "protocol": "sampler=DDIM steps=50 seed=1000",
    "samples": 4,
    "final_error": 0.25,
}


@pytest.fixture
def module(monkeypatch):
    """Modules of benchmarks/ by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def rows(module):
    return module("rows")


def test_rows_are_read_as_they_were_written(rows, tmp_path):
    file = tmp_path / "study.csv"
    other = ROW | {"options": 'passes.+={"pass":"FitProportional"} a=1,b=2', "commit": "1234567", "fid": 1 / 3}
    rows.append(file, ROW)
    rows.append(file, other)
    filled = [{key: value for key, value in row.items() if value != ""} for row in (ROW, other | {"fid": 0.333333})]
    assert rows.read(file) == filled
    header = file.read_text().splitlines()[0].split(",")
    assert header == ["model", "recipe", "options", "bits", "seed", "protocol", "samples", "final_error", "fid", "commit"]
    assert [path.name for path in tmp_path.iterdir()] == ["study.csv"]
    rows.append(file, ROW | {"final_error": 0.5})
    assert [row["final_error"] for row in rows.read(file)] == [0.5, 0.25]
    with pytest.raises(rows.ResultsError, match="columns figure; allowed are those of rows.COLUMNS; add them there"):
        rows.append(file, ROW | {"figure": 1})


def test_an_arm_is_finished_if_all_that_decides_it_is_equal(rows):
    table = [{key: value for key, value in ROW.items() if value != ""}]
    assert rows.finished(table, ROW) == table[0]
    for change in ({"seed": 1}, {"options": "a=1"}, {"samples": 8}, {"protocol": "sampler=DDIM steps=20 seed=1000"}):
        assert rows.finished(table, ROW | change) is None


def test_a_file_that_cannot_be_written_stays_as_it_was(rows, tmp_path, monkeypatch):
    file = tmp_path / "study.csv"
    rows.append(file, ROW)
    before = file.read_bytes()

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(rows.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        rows.append(file, ROW | {"seed": 1})
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["study.csv"]


def test_ratios_are_paired_and_of_one_protocol(rows, tmp_path):
    file = tmp_path / "study.csv"
    other = ROW | {"recipe": "dmq"}
    rows.append_errors(file, {rows.label(ROW): torch.tensor([1.0, 2.0, 3.0, 2.0])})
    assert rows.ratio(file, other, file, ROW) is None
    rows.append_errors(file, {rows.label(other): torch.tensor([0.5, 1.0, 1.5, 1.0])})
    ratio = rows.ratio(file, other, file, ROW)
    assert (ratio.value, ratio.low, ratio.high) == (0.5, 0.5, 0.5)
    longer = other | {"protocol": "sampler=DDIM steps=20 seed=1000", "samples": 8}
    message = "'w4a6 dmq seed 0' beside 'w4a6 brecq seed 0': steps 20 and 50, samples 8 and 4; only rows of one model and protocol"
    with pytest.raises(rows.ResultsError, match=message):
        rows.ratio(file, longer, file, ROW)


def test_tables_refuse_rows_of_different_protocols(module, capsys):
    tables = module("tables")
    two = [str(BENCHMARKS / "results" / f"{name}.csv") for name in ("accuquant", "accuquant-unclipped")]
    with pytest.raises(SystemExit, match="clip yes and no; only rows of one model and protocol are comparable"):
        tables.main([*two, "--bits", "w4a6"])
    with pytest.raises(SystemExit, match="clip yes and no"):
        tables.main([*two, "--bits", "w4a6", "--base", "accuquant", "--arms", "accuquant"])
    twice = [str(BENCHMARKS / "results" / f"{name}.csv") for name in ("dmq", "dmq-seeds")]
    with pytest.raises(SystemExit, match="seed 0': is in dmq.csv and dmq-seeds.csv twice; an arm has one row; leave one file out"):
        tables.main(twice)
    tables.main([two[0], "--bits", "w4a8", "--arms", "accuquant"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 0 | accuquant |"))
    assert "| 0.135 [0.120, 0.151] | 0.083 |" in line and "| 2.46 (15.5) | 0.95 [0.90, 1.00] |" in line  # as in docs/methods


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_results_say_where_they_are_from(file, rows):
    table = rows.read(file)
    assert table and all(row["commit"] for row in table)
    if file.name == "engine-speed.csv":  # has columns of its own for the machine
        return
    assert all(row[column] for row in table for column in rows.PROVENANCE)
    if file.with_suffix(".npz").exists() and not table[0].get("correction"):
        assert set(rows.errors_of(file)) == {rows.label(row) for row in table}


def test_results_are_small():
    files = [file for file in (BENCHMARKS / "results").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".csv", ".npz"}
    assert sum(file.stat().st_size for file in files) < 1.5e6

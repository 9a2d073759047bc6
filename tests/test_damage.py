"""Damaged files and killed runs: a few of each (`fuzzing.py` and `kills.py` are the commands for thousands)."""

from collections import Counter
from pathlib import Path

import pytest

import fuzzing
import kills


def test_nothing_damaged_is_taken_for_whole(tmp_path: Path) -> None:
    counts = fuzzing.run(100, 7, tmp_path, show=False)
    assert not fuzzing.faults(7, tmp_path)
    assert counts["refused"] > 50
    assert fuzzing.run(100, 7, tmp_path, show=False) == counts  # taken from what was kept


@pytest.mark.long
def test_nothing_damaged_is_taken_for_whole_a_thousand_times(tmp_path: Path) -> None:
    fuzzing.run(1000, 1, tmp_path, show=False)
    assert not fuzzing.faults(1, tmp_path)


@pytest.mark.long
def test_killed_runs_lose_nothing(tmp_path: Path) -> None:
    results = kills.run(10, 0, tmp_path, show=False)
    assert not [result for result in results if result["wrong"]]
    assert Counter(result["killed"] for result in results)[True] > 5

"""What the documents name of benchmarks/ exists: results, studies, scripts."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
PAGES = (ROOT / "README.md", BENCHMARKS / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
AT_A_TAG = {"accuquant.py", "compare.py"}  # scripts that pages of old studies name, where the tag has them


def named(pattern: str) -> set[str]:
    """Every name that the pages have after a folder's."""
    return {name for page in PAGES for name in re.findall(pattern, page.read_text())}


def test_results_that_the_documents_name_exist():
    names = named(r"results/([a-z0-9-]+\.[a-z]+)")
    assert len(names) > 40
    assert not {name for name in names if not (BENCHMARKS / "results" / name).exists()}
    unnamed = {file.name for file in (BENCHMARKS / "results").glob("*.csv")} - names
    assert not unnamed, f"no page names {unnamed}"


def test_studies_and_scripts_that_the_documents_name_exist():
    studies = named(r"studies/([a-z0-9-]+\.yaml)")
    assert len(studies) > 15
    assert not {name for name in studies if not (BENCHMARKS / "studies" / name).exists()}
    scripts = named(r"benchmarks/([a-z_]+\.py)") - AT_A_TAG
    assert len(scripts) > 10
    assert not {name for name in scripts if not (BENCHMARKS / name).exists()}


def test_every_study_is_in_the_readme():
    readme = (BENCHMARKS / "README.md").read_text()
    for file in (BENCHMARKS / "studies").glob("*.yaml"):
        assert f"`{file.stem}`" in readme or file.name in readme, file.name


def test_the_tables_of_the_comparison_are_what_the_rows_say(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    page = importlib.import_module("compared_page")
    assert page.tables() in page.PAGE.read_text(encoding="utf-8")

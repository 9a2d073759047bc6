"""The how-to pages: their Python runs and shows what they say. What they promise of the package: names stand in one place."""

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffquant import engines
from diffquant.engines.base import FALLBACK
from diffquant.evaluation import metrics
from tests.test_layering import ORDER

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "diffquant"
EVERY_PAGE = sorted((ROOT / "docs" / "how-to").glob("*.md"))
PAGES = [page for page in EVERY_PAGE if page.stem.startswith("add-")]  # their one block of Python is run
LONGEST = 90  # lines of a page on a seam

ENGINE_NAMES = {name for name in engines.engine_names() if name != FALLBACK}  # the simulation is what the others are compared with
ENGINE_ALLOWED = {
    ("checkpoint/export.py", "openvino"): "the export target that is written by default, a file format",
    ("cli/quantizing.py", "openvino"): "the same default on the command line",
    ("checkpoint/targets/openvino.py", "openvino"): "the name of the export target",
}
ENGINE_MODULES_ALLOWED = {
    "checkpoint/targets/openvino.py": "what it writes is the graph that the engine makes",
    "checkpoint/targets/onnx.py": "what it writes and checks is the graph in engines/",
    "checkpoint/targets/tensorrt.py": "the same graph, with symmetric quantizers",
}
METRIC_ALLOWED = {
    ("analysis/robustness.py", "final_error"): "the figure of its picture: one had to be chosen",
    ("evaluation/report.py", "psnr"): "the caption of a row of pictures",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the traceback of each page, empty where it ran."""
    folder = tmp_path_factory.mktemp("how-to")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "how_to.py"), str(folder), *map(str, PAGES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="pages run in forks of one process")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_and_shows_what_it_says(page: Path, results: Path) -> None:
    file = results / f"{page.stem}.txt"
    assert file.exists(), "the process ended"
    assert file.read_text() == ""


def test_there_is_a_page_for_each_seam() -> None:
    seams = {"method", "engine", "export-target", "metric", "layer-kind", "pipeline"}
    assert {re.sub("add-an?-", "", page.stem) for page in PAGES} == seams


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.stem)
def test_a_page_is_short_and_what_it_links_to_exists(page: Path) -> None:
    text = page.read_text()
    assert page not in PAGES or len(text.splitlines()) <= LONGEST
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:src|tests|docs)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    for path, name in re.findall(r"`([A-Z_]+)` of\s+`(tests/[\w/.]+)`", text):
        assert re.search(rf"^{path}\b", (ROOT / name).read_text(), flags=re.MULTILINE), f"{path} of {name}"


def test_the_lines_of_the_example_in_the_tree() -> None:
    text = (ROOT / "docs" / "how-to" / "add-a-layer-kind.md").read_text()
    (lines,) = re.findall(r"\[lines\s(\d+)\sto\s(\d+)\sof\s`core/layers.py`\]\(.*/layers.py#L\1-L\2\)", text)
    first, last = map(int, lines)
    classes = {node.name: node for node in trees()["core/layers.py"].body if isinstance(node, ast.ClassDef)}
    example = classes["QuantizedConv3d"]
    assert (example.lineno, example.end_lineno) == (first, last)


def test_what_the_page_on_pipelines_names_is_in_its_file() -> None:
    text = (ROOT / "docs" / "how-to" / "add-a-pipeline.md").read_text()
    rows = re.findall(r"^\| `(\w+)\.py` \|.*\|(.*)\|$", text, flags=re.MULTILINE)
    assert {name for name, _ in rows} == {path.stem for path in (SOURCE / "host").glob("*.py")} - {"__init__"}
    for name, cell in rows:
        module = importlib.import_module(f"diffquant.host.{name}")
        assert all(hasattr(module, constant) for constant in re.findall(r"`([A-Z_]{3,})`", cell)), name


# ---- what CONTRIBUTING.md says of the package


def contributing(heading: str) -> list[list[str]]:
    """The rows of the table in a section, their cells without backticks."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in row] for row in rows[1:]]


def test_the_rooms_are_listed_in_their_order() -> None:
    rooms = contributing("Where things go")
    assert tuple(room for room, *_ in rooms) == ORDER
    importing = {path.split("/")[0].removesuffix(".py") for path, tree in trees().items() if "diffusers" in packages(tree)}
    assert {room for room, _, imports in rooms if imports == "yes"} == importing


def packages(tree: ast.Module) -> set[str]:
    """The packages that a module imports."""
    nodes = list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_every_stop_of_the_walk_exists() -> None:
    stops = contributing("A walk")
    assert 5 < len(stops) <= 10 and [number for number, *_ in stops] == [str(number + 1) for number in range(len(stops))]
    for _, file, function, text in stops:
        body: list[ast.stmt] = trees()[file].body
        for name in function.split("."):
            named = {node.name: node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
            assert name in named, f"{file}: {function}"
            body = named[name].body
        for path in re.findall(r"`([\w/]+\.\w+)`", text):
            assert (SOURCE / path).exists(), path


# ---- names that stand in one place


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Every file of the package, parsed."""
    return {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}


def constants(tree: ast.Module) -> Iterator[str]:
    """The string constants of a module that are no docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, documented)]
    docstrings = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def named_outside(names: set[str], room: str) -> set[tuple[str, str]]:
    """The files outside of `room` that have one of the names as a string, and which."""
    outside = {path: tree for path, tree in trees().items() if not path.startswith(f"{room}/")}
    return {(path, text) for path, tree in outside.items() for text in constants(tree) if text in names}


def test_no_engine_is_named_outside_of_the_engines() -> None:
    assert {"int8", "openvino"} <= ENGINE_NAMES
    assert named_outside(ENGINE_NAMES, "engines") == set(ENGINE_ALLOWED)


def test_no_engine_is_imported_outside_of_the_engines() -> None:
    shared = {"base", "info", "exactness", "graph"}  # of all engines
    importing = set()
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("diffquant.engines"):
                parts = node.module.split(".")[2:3] or [alias.name for alias in node.names]
                if not set(parts) <= shared | set(engines.__all__):
                    importing.add(path)
    assert {path for path in importing if not path.startswith("engines/")} == set(ENGINE_MODULES_ALLOWED)


def test_no_metric_is_named_outside_of_the_metrics() -> None:
    names = {name for name, metric in metrics.registered().items() if type(metric).__module__.startswith("diffquant.")}
    assert {"final_error", "psnr", "fid_to_data"} <= names
    assert named_outside(names, "evaluation/metrics") == set(METRIC_ALLOWED)

"""Imports point downwards only, and nothing in the package pickles or prints."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "diffquant"
ORDER = (
    "errors",
    "registry",
    "files",
    "core",
    "host",
    "calibration",
    "methods",
    "recipe",
    "budget",
    "engines",
    "sampling",
    "checkpoint",
    "quantization",
    "evaluation",
    "analysis",
    "zoo",
    "demo",
    "reproduce",
    "cli",
)
OUTSIDE = {"tools", "tests", "benchmarks"}  # they import the package
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Full names of what a module imports, each as far as it may be a module; relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                base = ".".join([*parts[: len(parts) - node.level + is_package], *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What in a module's source is against the rules, one line each."""
    tree = ast.parse(source)
    found = []
    room = module.split(".")[1] if "." in module else None  # the package's own __init__ stands above every room
    for name in imported(tree, module, is_package):
        parts = name.split(".")
        if parts[0] in PICKLING:
            found.append(f"imports {name}")
        if parts[0] in OUTSIDE:
            found.append(f"imports {name}, which is not in the package")
        if name in ("torch.load", "torch.save", "rich.print"):
            found.append(f"imports {name}")
        if parts[0] == "diffquant" and room is not None:
            if parts == ["diffquant"] and room == "cli":
                continue  # the command line speaks the public interface
            if len(parts) < 2 or parts[1] not in ORDER:
                found.append(f"imports {name}, which is in no room")
            elif ORDER.index(parts[1]) > ORDER.index(room):
                found.append(f"{room} imports {name} from above")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            found.append(f"uses {ast.unparse(node)}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            found.append("prints")
    return found


def module_name(path: Path) -> str:
    parts = ("diffquant", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_file_stands_in_a_room() -> None:
    rooms = {module_name(path).split(".")[1] for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"}
    assert rooms and rooms <= set(ORDER)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=module_name)
def test_imports_point_downwards_and_nothing_pickles_or_prints(path: Path) -> None:
    assert violations(path.read_text(), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from diffquant.methods.ranges import CalibrateRanges", "diffquant.core.affine"),
        ("import diffquant.cli", "diffquant.zoo.models"),
        ("import diffquant", "diffquant.core.affine"),
        ("from diffquant import zoo", "diffquant.recipe"),
        ("from ..runtime import packing", "diffquant.core.affine"),
        ("from .. import runtime", "diffquant.methods.ranges"),
        ("def f():\n    from diffquant.zoo import load", "diffquant.evaluation.report"),
        ("from tools.train_zoo import latent", "diffquant.zoo.models"),
        ("import pickle", "diffquant"),
        ("from pickle import loads", "diffquant.checkpoint.folder"),
        ("from torch import save", "diffquant.checkpoint.folder"),
        ("import torch\ntorch.load('x')", "diffquant.checkpoint.folder"),
        ("print('x')", "diffquant.cli"),
    ],
)
def test_a_violation_is_seen(source: str, module: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("from diffquant.core.spec import SpecError", "diffquant.core.affine", False),
        ("from .spec import SpecError", "diffquant.core.affine", False),
        ("from .affine import quantize", "diffquant.core", True),
        ("from ..core import affine", "diffquant.checkpoint.packing", False),
        ("from diffquant.cli import main", "diffquant", True),
        ("import diffquant as dq", "diffquant.cli", False),
        ("from rich.console import Console\nConsole().print('x')", "diffquant.cli", False),
    ],
)
def test_what_is_allowed_passes(source: str, module: str, is_package: bool) -> None:
    assert violations(source, module, is_package) == []

"""Text files as people write them."""

from __future__ import annotations

from importlib.resources.abc import Traversable
from pathlib import Path

from diffquant.core.spec import DiffquantError


def read_text(source: Path | Traversable, where: str, error: type[DiffquantError]) -> str:
    """The text in a file. Raises `error`, beginning with `where`, for one that is not UTF-8."""
    try:
        return source.read_text(encoding="utf-8")
    except UnicodeDecodeError as wrong:
        raise error(f"{where}: not a text in UTF-8 ({wrong.reason} at byte {wrong.start})") from wrong

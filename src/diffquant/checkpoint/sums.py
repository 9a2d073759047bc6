"""SHA-256 of every file of a checkpoint, in a file of their own that ``sha256sum --check SHA256SUMS`` reads too."""

from __future__ import annotations

import hashlib
from pathlib import Path

from diffquant.errors import CheckpointError

NAME = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Write down the files that are in `folder` and below."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    (folder / NAME).write_text("".join(f"{_sum(file)}  {file.relative_to(folder).as_posix()}\n" for file in files))


def altered(folder: Path, suffixes: tuple[str, ...] = ("",)) -> str | None:
    """How `folder` first differs from what was written, in words, in files that end in one of `suffixes`; None: not at all.

    Folders without sums, as version 0.1 wrote them and diffusers does, have nothing to compare with. A file that came later is
    named only where it holds weights, which a loader would read. Raises `CheckpointError` for sums that cannot be read.
    """
    if not (folder / NAME).is_file():
        return None
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
        saved = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except ValueError as error:
        raise CheckpointError(f"{folder / NAME}: damaged; copy or save the checkpoint again") from error
    for name, digest in saved.items():
        if not name.endswith(suffixes):
            continue
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sum(folder / name) != digest:
            return f"{name} is not the file that was saved"
    later = (file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.safetensors")))
    return next((f"{name} was not there when it was saved" for name in later if name not in saved), None)


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

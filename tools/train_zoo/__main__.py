"""The command line of training: ``python -m tools.train_zoo NAME --out FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffquant.errors import DiffquantError
from tools.train_zoo import models
from tools.train_zoo.letters import render_letters

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
console, errors = Console(), Console(stderr=True)


@app.command()
def train(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(models.TRAINABLE)}.")],
    out: Annotated[Path, typer.Option(help="Folder of the trained model and of the training state; a killed run goes on.")],
    steps: Annotated[int | None, typer.Option(help="Training steps (default: those of the shipped model).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn at random.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="Train glyph-ddim compiled: faster, needs a C++ compiler.")] = False,
) -> None:
    """Train a reference model on letters rendered from the installed fonts."""
    letters = render_letters(size=models.picture_size(name))
    console.print(f"{len(letters.labels)} letters of {len(letters.names)} fonts, sha256 {letters.digest()[:16]}")
    console.print_json(data=models.train_model(name, letters, out, steps, seed, compiled))


def main() -> None:
    """Entry point: an error that the user can mend is one line and exit code 1."""
    try:
        app(prog_name="python -m tools.train_zoo")
    except (DiffquantError, OSError) as error:
        errors.print(f"error: {' '.join(str(error).split())}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

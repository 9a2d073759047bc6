"""What the commands share: options, the consoles they print on, and loading a model by its name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from diffquant.zoo.named import load_named

WIDE = 200  # columns in a pipe or a file
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)
errors = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Pipeline directory, hub id, or reference model (glyph-ddim, glyph-sd, glyph-dit).")]
Seed = Annotated[int, typer.Option(help="Seed of everything drawn at random.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override in the recipe by path, e.g. AccuQuant.iterations=100, passes.1.samples=64."),
]
PROTOCOL_HELP = (
    "How to sample: a shipped protocol (stable-diffusion-coco), a .yaml file, or an assignment such as sampler=ddim, eta=1, "
    "seed=3, guidance_scale=3; repeat to change more (docs/reproduce.md)."
)
Protocol = Annotated[list[str] | None, typer.Option(help=PROTOCOL_HELP)]
Prompts = Annotated[Path | None, typer.Option(help="Text file, a prompt a line (default: the protocol's, or a built-in list).")]
Inception = Annotated[Path | None, typer.Option(help="Inception weights for FID and KID, see docs/evaluation.md.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale (default: the protocol's, or the pipeline's).")]
Load = Annotated[
    list[str] | None,
    typer.Option(
        "--load",
        help="Argument of from_pretrained, such as dtype=float16 or variant=fp16; repeat for more (default: float32 on a CPU).",
    ),
]
MINUTES_HELP = "Take at most about so many minutes, recording included: fewer iterations and samples, as far as needed."
RECIPE_HELP = "Recipe with bits, e.g. brecq-w4a8 (weights 4, activations 8; a32 is weight-only), or a .yaml file."


def load_model(model: str, load: list[str] | None = None) -> Any:
    """The pipeline called `model`, with `load` arguments of `from_pretrained`."""
    return load_named(model, load or (), lambda text: say(text, errors))


def say(text: str, to: Console | None = None) -> None:
    """Print a line as it is: brackets of a path are no markup, and long paths are not wrapped."""
    (to or console).print(text, soft_wrap=True, highlight=False, markup=False)

"""The command line: the public verbs with arguments, and no logic of its own.

A model is a directory, a hub id, or the name of a reference model (``glyph-ddim``, ``glyph-sd``, ``glyph-dit``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from safetensors import SafetensorError

from diffquant.cli import measuring, quantizing
from diffquant.cli.shared import errors
from diffquant.engines import engine_names
from diffquant.errors import DiffquantError
from diffquant.host.pipeline import quiet_diffusers

HELP = (
    "Post-training quantization for diffusion models: calibrate on a pipeline's own sampling, pack, sample, compare. "
    "A model is a directory, a hub id, or a reference model (glyph-ddim, glyph-sd, glyph-dit). "
    f"What quantized models compute with is chosen by asking the machine (info), or by the variable DIFFQUANT_ENGINE: "
    f"{', '.join(engine_names())}."
)
app = typer.Typer(help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
zoo_app = typer.Typer(help="Reference models that come with the package.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")
COMMANDS: dict[str, Callable[..., None]] = {  # in the order of the help text
    "record": quantizing.record,
    "quantize": quantizing.quantize,
    "export": quantizing.export,
    "sample": measuring.sample,
    "evaluate": measuring.evaluate,
    "robustness": measuring.robustness,
    "inspect": measuring.inspect,
    "info": measuring.info,
    "reproduce": quantizing.reproduce,
    "demo": quantizing.demo,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
zoo_app.command("list")(measuring.zoo_list)


@app.callback()
def main_options(debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False) -> None:
    """Post-training quantization for diffusion models."""
    quiet_diffusers()


def main() -> None:
    """Entry point: errors that are the user's to mend are one line and exit code 1."""
    try:
        app()
    except (DiffquantError, OSError, SafetensorError) as error:
        if "--debug" in sys.argv:
            raise
        errors.print(f"error: {' '.join(str(error).split())}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)

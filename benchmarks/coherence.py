"""How far the errors of neighbouring sampling steps point the same way: what only calibration over several steps can see.

    python benchmarks/coherence.py CHECKPOINT ... --steps 1 5 10 25

Every checkpoint is sent along recorded full-precision trajectories, M steps at a time from full-precision latents. `squared error`
is the sum, over all segments, of the mean squared distance at a segment's end; `ratio` is to the same sum with M = 1. Where steps
only carried errors on, it would be 1 for independent errors and M for equal ones. `of the mean` is the share of it that shifts all
values of all pictures alike: the squared mean distance of each channel.

Checkpoints are folders, or NAME=FOLDER. Rows of `results/coherence.csv` are of one checkpoint, recording and M.
"""

import argparse
from pathlib import Path

import measure
import rows
import study as studies
from corrections import recording_text
from rich.console import Console
from rich.table import Table
from study import Recording

import diffquant as dq
from diffquant import zoo

KEY = ("model", "checkpoint", "recording", "recording_seed", "trajectories", "steps")


def checkpoint(text: str) -> tuple[str, Path]:
    """A checkpoint's name in the results and its folder."""
    name, equals, folder = text.partition("=")
    return (name, Path(folder)) if equals and "/" not in name else (Path(text).name, Path(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=checkpoint, metavar="CHECKPOINT")
    parser.add_argument("--model", choices=zoo.models.PIPELINES, default="glyph-ddim", help="the reference model in full precision")
    parser.add_argument("--work", type=Path, default=studies.WORK, help="that of the studies, where its recording is, or will be")
    parser.add_argument("--seed", type=int, default=0, help="of the recording")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--scheduler", nargs="*", default=[], metavar="OPTION=VALUE", help="of the recording")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 5, 10, 25], help="M, with 1 first")
    parser.add_argument("--trajectories", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.steps[0] != 1:
        parser.error("--steps begins with 1, which the ratios are to")
    settings = Recording(guidance=arguments.guidance, scheduler=studies.options_of(arguments.scheduler))
    pipe = studies.pipeline(arguments.model, settings.scheduler)
    rollout = measure.rollout_of(pipe, studies.recording(pipe, arguments.model, settings, arguments.seed, arguments.work))
    key = {"model": arguments.model, "recording": recording_text(settings), "recording_seed": arguments.seed}
    table = Table("checkpoint", "M", "squared error", "ratio", "of the mean")
    for name, folder in arguments.checkpoints:
        loaded = dq.load(folder)
        first = 0.0
        for steps in arguments.steps:
            error, shifted = measure.squared_error(rollout, measure.denoiser_of(loaded), steps, arguments.trajectories)
            first = first or error
            table.add_row(name, str(steps), f"{error:.2e}", f"{error / first:.2f}", f"{shifted / error:.2f}")
            row = key | {"checkpoint": name, "trajectories": arguments.trajectories, "steps": steps, "squared_error": error}
            row |= {"squared_mean": shifted} | rows.provenance()
            rows.put(rows.RESULTS / "coherence.csv", [row], KEY)
    Console().print(table)


if __name__ == "__main__":
    main()

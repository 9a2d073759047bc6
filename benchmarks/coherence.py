"""How far the errors of neighbouring sampling steps point the same way: what only calibration over several steps can see.

    python benchmarks/coherence.py CHECKPOINT ... --work benchmarks/work/accuquant --steps 1 5 10 25

Every checkpoint is sent along recorded full-precision trajectories, M steps at a time from full-precision latents. `squared error`
is the sum, over all segments, of the mean squared distance at a segment's end; `ratio` is to the same sum with M = 1. Where steps
only carried errors on, it would be 1 for independent errors and M for equal ones. `of the mean` is the share of it that shifts all
values of all pictures alike: the squared mean distance of each channel.
"""

import argparse
import json
from pathlib import Path

from compare import STEPS, recording, squared_error, with_scheduler
from rich.console import Console
from rich.table import Table

import diffquant as dq
from diffquant import zoo
from diffquant.calibration.rollout import Rollout
from diffquant.host.pipeline import Host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--model", choices=zoo.models.PIPELINES, default="glyph-ddim", help="the reference model in full precision")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/accuquant"), help="where its recording is, or will be")
    parser.add_argument("--seed", type=int, default=0, help="of the recording")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--scheduler", nargs="*", default=[], metavar="OPTION=VALUE", help="of the recording")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 5, 10, 25], help="M, with 1 first")
    parser.add_argument("--trajectories", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/coherence.json"))
    arguments = parser.parse_args()
    if arguments.steps[0] != 1:
        parser.error("--steps begins with 1, which the ratios are to")
    pipe = with_scheduler(zoo.load(arguments.model), arguments.scheduler)
    data = recording(pipe, arguments.work, arguments.seed, arguments.guidance, STEPS)
    rollout = Rollout(Host(pipe).denoiser, data)
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    table = Table("checkpoint", "M", "squared error", "ratio", "of the mean")
    for checkpoint in arguments.checkpoints:
        model = Host(dq.load(checkpoint)).denoiser
        row = {steps: squared_error(rollout, model, steps, arguments.trajectories) for steps in arguments.steps}
        for steps, (error, shifted) in row.items():
            table.add_row(checkpoint.name, str(steps), f"{error:.2e}", f"{error / row[1][0]:.2f}", f"{shifted / error:.2f}")
        found[checkpoint.name] = {steps: error for steps, (error, _) in row.items()} | {
            f"{steps}, mean": shifted for steps, (_, shifted) in row.items()
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1))
    Console().print(table)


if __name__ == "__main__":
    main()

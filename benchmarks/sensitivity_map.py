"""Whether a sensitivity map is right: the final error that groups of quantizers make alone, beside the map's share of them.

    python benchmarks/sensitivity_map.py --recipe brecq-w4a6 --trajectories 32 --samples 48 --groups 24

The groups are those of sensitivity.py, weights and inputs apart: the `--groups` largest of the map are measured, and all others
together. Weights round to nearest and ranges are searched, in both. Groups that the results hold already are not measured again.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from compare import STEPS, recording, with_scheduler
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sensitivity import errors, group_of

import diffquant as dq
from diffquant import zoo
from diffquant.calibration import fit
from diffquant.core.model import enable, quantizers
from diffquant.evaluation.sampling import sample
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan
from diffquant.methods.ranges import CalibrateRanges

OTHERS = "all others"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="brecq-w4a6")
    parser.add_argument("--seed", type=int, default=0, help="of the recording")
    parser.add_argument("--trajectories", type=int, default=32, help="of the map")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--groups", type=int, default=24, help="how many are measured")
    parser.add_argument(
        "--scheduler", nargs="*", default=[], metavar="OPTION=VALUE", help="of recording and samples; with a --work of their own"
    )
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/accuquant"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sensitivity-map.json"))
    arguments = parser.parse_args()
    pipe = with_scheduler(zoo.load("glyph-ddim"), arguments.scheduler)
    data, recipe = recording(pipe, arguments.work, arguments.seed), dq.load_recipe(arguments.recipe)
    folder = arguments.work / f"sensitivity-{arguments.seed}"
    drawn = dq.sensitivity(pipe, recipe, data, trajectories=arguments.trajectories, seed=arguments.seed, folder=folder)
    quantized = copy.deepcopy(pipe)
    prepare(quantized.unet, plan(quantized.unet, recipe.layers), data.timesteps)
    with fit.run() as run:
        ranges = next(step for step in recipe.steps() if isinstance(step, CalibrateRanges))
        ranges.apply(quantized.unet, data, torch.Generator().manual_seed(arguments.seed), run)
    enable(quantized.unet)
    names = [name for name, _ in quantizers(quantized.unet)]
    members: dict[str, list[str]] = {}
    shares: dict[str, float] = {}
    for name, row in zip(names, drawn.rows, strict=True):
        group = f"{group_of(name)}, {'weight' if row.operand == 'weight' else 'input'}"
        members.setdefault(group, []).append(name)
        shares[group] = shares.get(group, 0.0) + row.share
    order = sorted(shares, key=shares.__getitem__, reverse=True)
    measured, rest = order[: arguments.groups], order[arguments.groups :]
    members[OTHERS] = [name for group in rest for name in members[group]]
    shares[OTHERS] = sum(shares[group] for group in rest)
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    named = " ".join([arguments.recipe, *arguments.scheduler])
    label = f"glyph-ddim {named}, {STEPS} steps, {arguments.samples} samples, seed {arguments.seed}"
    rows: dict[str, dict[str, Any]] = found.setdefault(label, {})
    protocol = dq.SamplingProtocol(
        samples=arguments.samples, batch_size=arguments.samples, steps=STEPS, seed=1000, accumulation_samples=0
    )
    asked = [group for group in (*measured, OTHERS) if group not in rows]
    wanted = sample(pipe, protocol).last_samples if asked else torch.empty(0)
    for group in track(asked, description=label, console=Console(stderr=True)):
        for name, one in quantizers(quantized.unet):
            one.enabled = name in members[group]
        rows[group] = {"share": shares[group], "quantizers": len(members[group]), "errors": errors(quantized, protocol, wanted)}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1))
    squares = {group: sum(error**2 for error in row["errors"]) / len(row["errors"]) for group, row in rows.items()}
    table = Table(label, "quantizers", "share by the map", "measured share", "final error, mean")
    for group in sorted(rows, key=lambda group: -rows[group]["share"]):
        row = rows[group]
        error = sum(row["errors"]) / len(row["errors"])
        table.add_row(
            group, str(row["quantizers"]), f"{row['share']:.3f}", f"{squares[group] / sum(squares.values()):.3f}", f"{error:.3f}"
        )
    Console(width=120).print(table)
    compared = [row["share"] for row in rows.values()], list(squares.values())
    ranks = [torch.tensor(values).argsort().argsort().double() for values in compared]
    print(f"rank correlation {float(torch.corrcoef(torch.stack(ranks))[0, 1]):.2f}")


if __name__ == "__main__":
    main()

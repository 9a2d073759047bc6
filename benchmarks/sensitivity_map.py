"""Whether a sensitivity map is right: the final error that groups of quantizers make alone, beside the map's share of them.

    python benchmarks/sensitivity_map.py --recipe brecq-w4a6 --trajectories 32 --samples 48 --groups 24

The groups are those of sensitivity.py, weights and inputs apart: the `--groups` largest of the map are measured, and all others
together. Weights round to nearest and ranges are searched, in both. Groups that the results hold already are not measured again.
"""

import argparse
import copy
from pathlib import Path

import measure
import rows
import study as studies
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sensitivity import errors, group_of, measured
from study import STEPS, Recording

import diffquant as dq
from diffquant.calibration import fit
from diffquant.core.model import enable, quantizers
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan
from diffquant.methods.ranges import CalibrateRanges
from diffquant.sampling.sample import sample

OTHERS = "all others"
FILE = rows.RESULTS / "sensitivity-map.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="brecq-w4a6")
    parser.add_argument("--seed", type=int, default=0, help="of the recording")
    parser.add_argument("--trajectories", type=int, default=32, help="of the map")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--groups", type=int, default=24, help="how many are measured")
    parser.add_argument("--scheduler", nargs="*", default=[], metavar="OPTION=VALUE", help="of recording and samples")
    parser.add_argument("--work", type=Path, default=studies.WORK, help="that of the studies")
    arguments = parser.parse_args()
    settings, recipe = Recording(scheduler=studies.options_of(arguments.scheduler)), dq.load_recipe(arguments.recipe)
    pipe = studies.pipeline("glyph-ddim", settings.scheduler)
    data = studies.recording(pipe, "glyph-ddim", settings, arguments.seed, arguments.work)
    folder = arguments.work / settings.folder_name("glyph-ddim") / f"sensitivity-{arguments.seed}"
    drawn = dq.sensitivity(pipe, recipe, data, trajectories=arguments.trajectories, seed=arguments.seed, folder=folder)
    quantized = copy.deepcopy(pipe)
    prepare(quantized.unet, plan(quantized.unet, recipe.layers), data.timesteps)
    with fit.run() as run:
        ranges = next(step for step in recipe.built_passes() if isinstance(step, CalibrateRanges))
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
    largest, rest = order[: arguments.groups], order[arguments.groups :]
    members[OTHERS] = [name for group in rest for name in members[group]]
    shares[OTHERS] = sum(shares[group] for group in rest)
    protocol = dq.SamplingProtocol(
        samples=arguments.samples, batch_size=arguments.samples, steps=STEPS, seed=1000, accumulation_samples=0
    )
    method, _, bits = arguments.recipe.rpartition("-")
    key = {
        "model": "glyph-ddim",
        "recipe": method,
        "bits": bits,
        "seed": arguments.seed,
        "protocol": measure.protocol_of(pipe, protocol),
        "samples": arguments.samples,
    }
    label = " ".join(str(value) for value in key.values())
    asked = [group for group in (*largest, OTHERS) if group not in measured(FILE, key)]
    exact = sample(pipe, protocol).last_samples if asked else torch.empty(0)
    for group in track(asked, description=label, console=Console(stderr=True)):
        for name, quantizer in quantizers(quantized.unet):
            quantizer.enabled = name in members[group]
        row = key | {"group": group, "quantizers": len(members[group]), "share": shares[group]}
        row |= errors(quantized, protocol, exact) | rows.provenance() | {"engine": "simulate"}
        rows.put(FILE, [row], (*key, "group"))
    present = measured(FILE, key)
    total = sum(row["mean_square"] for row in present.values())
    table = Table(label, "quantizers", "share by the map", "measured share", "final error, mean")
    for group, row in sorted(present.items(), key=lambda item: -item[1]["share"]):
        figures = f"{row['share']:.3f}", f"{row['mean_square'] / total:.3f}", f"{row['final_error']:.3f}"
        table.add_row(group, str(row["quantizers"]), *figures)
    console = Console(width=120)
    console.print(table)
    compared = ([row[column] for row in present.values()] for column in ("share", "mean_square"))
    ranks = [torch.tensor(values).argsort().argsort().double() for values in compared]
    console.print(f"rank correlation {float(torch.corrcoef(torch.stack(ranks))[0, 1]):.2f}")


if __name__ == "__main__":
    main()

"""Which inputs a quantized model pays for: the final error when only one group of layers has its inputs quantized.

    python benchmarks/sensitivity.py CHECKPOINT --model glyph-ddim --samples 48

CHECKPOINT is a folder that `diffquant quantize` or a comparison wrote; its weights are quantized in every row. A group is the
layers of one name in one block; attention is a group of its own. `added` is the mean square of the relative final error beyond
that with no input quantized: where groups err independently, theirs add up to that of all inputs. Groups that the results hold
already are not measured again.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import measure
import rows
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import diffquant as dq
from diffquant import zoo
from diffquant.core.model import quantizers
from diffquant.evaluation.pairs import relative_l2
from diffquant.sampling.sample import sample

FILE = rows.RESULTS / "sensitivity.csv"


def group_of(quantizer: str) -> str:
    """`up_blocks.2.resnets.1.conv2.input_quantizer` -> `up_blocks.2 conv2`; what is outside of blocks keeps its layer's name."""
    layer = quantizer.rpartition(".")[0]
    block = re.match(r"(down_blocks\.\d+|up_blocks\.\d+|mid_block|transformer_blocks\.\d+)\.(.+)", layer)
    if block is None:
        return layer
    parts = [part for part in block[2].split(".") if not part.isdigit()]
    return f"{block[1]} {'attention' if 'attention' in ' '.join(parts) or 'attn' in ' '.join(parts) else parts[-1]}"


def errors(pipe: Any, protocol: dq.SamplingProtocol, full_precision: Tensor) -> rows.Row:
    """Mean, median and mean square of the relative errors of the last samples."""
    values = relative_l2(full_precision, sample(pipe, protocol).last_samples)
    return {
        "final_error": float(values.mean()),
        "final_error_median": float(values.median()),
        "mean_square": float(values.square().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", default="glyph-ddim", help="the reference model in full precision")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the pipeline's")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--groups", nargs="+", default=[], help="default: all")
    arguments = parser.parse_args()
    protocol = dq.SamplingProtocol(
        samples=arguments.samples,
        batch_size=48,
        steps=arguments.steps,
        seed=1000,
        guidance_scale=arguments.guidance,
        accumulation_samples=0,
    )
    pipe = dq.load(arguments.checkpoint, engine="simulate")
    inputs = {name: quantizer for name, quantizer in quantizers(measure.denoiser_of(pipe)) if quantizer.clock is not None}
    groups: dict[str, list[str]] = {"no input": [], "all inputs": list(inputs)}
    for name in inputs:
        groups.setdefault(group_of(name), []).append(name)
    full = zoo.load(arguments.model)
    key = {
        "model": arguments.model,
        "checkpoint": arguments.checkpoint.name,
        "protocol": measure.protocol_of(full, protocol),
        "samples": arguments.samples,
    }
    label = " ".join(str(value) for value in key.values())
    asked = [group for group in groups if group not in measured(FILE, key) and group in (arguments.groups or groups)]
    exact = sample(full, protocol).last_samples if asked else torch.empty(0)
    for group in track(asked, description=label, console=Console(stderr=True)):
        for name, quantizer in inputs.items():
            quantizer.enabled = name in groups[group]
        row = key | {"group": group} | errors(pipe, protocol, exact) | rows.provenance() | {"engine": "simulate"}
        rows.put(FILE, [row], (*key, "group"))
    table = Table(label, "quantizers", "final error, mean", "median", "added")
    present = measured(FILE, key)
    plain = present["no input"]["mean_square"] if "no input" in present else 0.0
    for group, row in sorted(present.items(), key=lambda item: -item[1]["mean_square"]):
        figures = f"{row['final_error']:.4f}", f"{row['final_error_median']:.4f}", f"{row['mean_square'] - plain:+.4f}"
        table.add_row(group, str(len(groups[group])), *figures)
    Console(width=120).print(table)


def measured(file: Path, key: rows.Row) -> dict[str, rows.Row]:
    """The rows of `key` in a file, by group."""
    return {row["group"]: row for row in rows.read(file) if all(row.get(name) == value for name, value in key.items())}


if __name__ == "__main__":
    main()

"""Which inputs a quantized model pays for: the final error when only one group of layers has its inputs quantized.

    python benchmarks/sensitivity.py CHECKPOINT --model glyph-ddim --samples 48

CHECKPOINT is a folder that `diffquant quantize` or a comparison wrote; its weights are quantized in every row. A group is the
layers of one name in one block; attention is a group of its own. `added` is the mean square of the relative final error beyond
that with no input quantized: where groups err independently, theirs add up to that of all inputs. Groups that the results hold
already are not measured again.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import diffquant as dq
from diffquant import zoo
from diffquant.core.model import quantizers
from diffquant.evaluation.pairs import relative_l2
from diffquant.evaluation.sampling import sample
from diffquant.host.pipeline import Host


def group_of(quantizer: str) -> str:
    """`up_blocks.2.resnets.1.conv2.input_quantizer` -> `up_blocks.2 conv2`; what is outside of blocks keeps its layer's name."""
    layer = quantizer.rpartition(".")[0]
    block = re.match(r"(down_blocks\.\d+|up_blocks\.\d+|mid_block|transformer_blocks\.\d+)\.(.+)", layer)
    if block is None:
        return layer
    parts = [part for part in block[2].split(".") if not part.isdigit()]
    return f"{block[1]} {'attention' if 'attention' in ' '.join(parts) or 'attn' in ' '.join(parts) else parts[-1]}"


def errors(pipe: Any, protocol: dq.SamplingProtocol, wanted: Tensor) -> list[float]:
    return [float(value) for value in relative_l2(wanted, sample(pipe, protocol).last_samples)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", default="glyph-ddim", help="the reference model in full precision")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the pipeline's")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--groups", nargs="+", default=[], help="default: all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sensitivity.json"))
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
    inputs = {name: one for name, one in quantizers(Host(pipe).denoiser) if one.clock is not None}
    groups: dict[str, list[str]] = {"no input": [], "all inputs": list(inputs)}
    for name in inputs:
        groups.setdefault(group_of(name), []).append(name)
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    label = f"{arguments.model} {arguments.checkpoint.name}, {arguments.steps} steps, {arguments.samples} samples"
    rows: dict[str, list[float]] = found.setdefault(label, {})
    asked = [group for group in groups if group not in rows and (not arguments.groups or group in arguments.groups)]
    wanted = sample(zoo.load(arguments.model), protocol).last_samples if asked else torch.empty(0)
    for group in track(asked, description=label, console=Console(stderr=True)):
        for name, one in inputs.items():
            one.enabled = name in groups[group]
        rows[group] = errors(pipe, protocol, wanted)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1))
    squares = {group: sum(error**2 for error in row) / len(row) for group, row in rows.items()}
    table = Table(label, "quantizers", "final error, mean", "median", "added")
    for group in sorted(squares, key=squares.__getitem__, reverse=True):
        row = torch.tensor(rows[group])
        added = squares[group] - squares.get("no input", 0.0)
        table.add_row(group, str(len(groups[group])), f"{row.mean():.4f}", f"{row.median():.4f}", f"{added:+.4f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

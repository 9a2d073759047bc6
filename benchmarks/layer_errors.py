"""Cosine and SQNR of every layer's output, quantized against full precision on the same recorded calls.

    python benchmarks/layer_errors.py --bits w4a8 w4a6 --arms mse "qncd drop=ReconstructRounding drop=LearnScales"
    python benchmarks/layer_errors.py --model glyph-sd --guidance 3 --picture docs/images/qncd-layers.png

Arms are those of studies. Layers that `results/layer-errors.csv` has are not measured again; recordings and passes are those of the
studies, in --work. The picture has the layers' SQNR in the order of the model, a line for each arm.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import measure
import rows
import torch
from corrections import quantized
from matplotlib import pyplot
from rich.console import Console
from study import WORK, Arm, Cell, Recording, Study
from torch import Tensor, nn

import diffquant as dq
from diffquant import zoo
from diffquant.core.model import full_precision, quantized_layers
from diffquant.host.structure import residual_blocks

CALLS = 64  # recorded calls over which layers are compared
ARMS = (
    "mse",
    "qncd drop=ReconstructRounding drop=LearnScales",
    "qncd drop=ReconstructRounding drop=LearnScales EmbeddingSmoothing.guard=false",
)
FILE = rows.RESULTS / "layer-errors.csv"
KEY = ("model", "recipe", "options", "bits", "seed", "layer")


def layer_errors(model: nn.Module, data: dq.Trajectory) -> dict[str, dict[str, float]]:
    """By layer, over the recorded calls of all timesteps."""
    indices = data.subset(CALLS, torch.Generator().manual_seed(0))
    outputs: list[dict[str, Tensor]] = []
    for on in (False, True):
        seen: dict[str, Tensor] = {}

        def keep(name: str, seen: dict[str, Tensor] = seen) -> Callable[..., None]:
            return lambda module, inputs, output: seen.__setitem__(name, output.detach().flatten(1))

        handles = [layer.register_forward_hook(keep(name)) for name, layer in quantized_layers(model)]
        with torch.no_grad():
            if on:
                model(**data.batch(indices)[0])
            else:
                with full_precision(model):
                    model(**data.batch(indices)[0])
        for handle in handles:
            handle.remove()
        outputs.append(seen)
    errors = {}
    for name, exact in outputs[0].items():
        output = outputs[1][name]
        cosine = torch.nn.functional.cosine_similarity(output, exact, dim=1).mean()
        sqnr = 10 * torch.log10(exact.square().sum() / (output - exact).square().sum())
        errors[name] = {"cosine": float(cosine), "sqnr_db": float(sqnr)}
    return errors


def draw(table: list[rows.Row], path: Path) -> None:
    """A picture for each bits, a line for each arm; a mark after each embedding."""
    bits = sorted({row["bits"] for row in table})
    figure, panels = pyplot.subplots(len(bits), 1, figsize=(9, 3.2 * len(bits)), squeeze=False, sharex=True, layout="constrained")
    for panel, each in zip(panels[:, 0], bits, strict=True):
        of_bits = [row for row in table if row["bits"] == each]
        for arm in dict.fromkeys(rows.arm(row) for row in of_bits):
            panel.plot([row["sqnr_db"] for row in of_bits if rows.arm(row) == arm], linewidth=1.2, label=arm)
        for index, name in enumerate(dict.fromkeys(row["layer"] for row in of_bits)):
            if name.endswith("conv2"):
                panel.axvline(index, color="0.85", linewidth=3, zorder=0)
        panel.set(title=each, ylabel="SQNR of the output, dB")
    panels[0, 0].legend(frameon=False, fontsize=8)
    panels[-1, 0].set_xlabel("layer; grey: convolution after an embedding")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=zoo.models.PIPELINES, default="glyph-ddim")
    parser.add_argument("--guidance", type=float, help="guidance scale of the recording; default: the pipeline's")
    parser.add_argument("--bits", nargs="+", default=["w4a6", "w4a8"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--work", type=Path, default=WORK, help="that of the studies")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    console = Console(width=200)
    chosen: list[rows.Row] = []
    for bits in arguments.bits:
        for arm in arguments.arms:
            recipe, _, options = arm.partition(" ")
            key = {"model": arguments.model, "recipe": recipe, "options": options, "bits": bits, "seed": arguments.seed}
            present = [row for row in rows.read(FILE) if all(row.get(name, "") == value for name, value in key.items())]
            if not present:
                study = Study(
                    name="layer-errors",
                    question="",
                    model=arguments.model,
                    bits=(bits,),
                    arms=(Arm(arm=arm),),
                    recording=Recording(guidance=arguments.guidance),
                )
                pipe, data = quantized(Cell(arm, bits, arguments.seed), study, arguments.work, True)
                errors = layer_errors(measure.denoiser_of(pipe), data)
                rows.put(FILE, [key | {"layer": name} | row | rows.provenance() for name, row in errors.items()], KEY)
                present = [row for row in rows.read(FILE) if all(row.get(name, "") == value for name, value in key.items())]
            chosen += present
            after = {f"{name}.conv2" for name in residual_blocks(measure.denoiser_of(zoo.load(arguments.model)))}
            embedded = [row for row in present if row["layer"] in after]
            console.print(
                f"{bits} {arm}: least cosine {min(row['cosine'] for row in present):.4f}, of convolutions after an embedding "
                f"{min(row['cosine'] for row in embedded):.4f}, their mean SQNR "
                f"{sum(row['sqnr_db'] for row in embedded) / len(embedded):.2f} dB"
            )
    if arguments.picture:
        draw(chosen, arguments.picture)


if __name__ == "__main__":
    main()

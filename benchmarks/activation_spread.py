"""How far a reference model's activations spread over channels and timesteps, layer by layer: has it what methods are made for?

    python benchmarks/activation_spread.py
    python benchmarks/activation_spread.py --model glyph-sd

`channels`: largest over median of the channels' largest magnitudes. `timesteps`: largest over smallest of the timesteps' largest
magnitudes. `peak`: largest magnitude over standard deviation.
"""

import argparse

import rows
import torch
from rich.console import Console

import diffquant as dq
from diffquant import zoo
from diffquant.core.layers import QUANTIZABLE
from diffquant.host.pipeline import Host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="glyph-ddim")
    arguments = parser.parse_args()
    pipe = zoo.load(arguments.model)
    model = Host(pipe).denoiser
    data = dq.record(pipe, dq.Calibration(samples=32, steps=20, seed=0))
    seen: dict[str, list[dict[str, torch.Tensor]]] = {}

    def watch(name: str):
        def hook(module, inputs):
            x = inputs[0].transpose(0, 1 if isinstance(module, torch.nn.Conv2d) else -1).flatten(1)  # [channels, values]
            seen.setdefault(name, []).append({"channels": x.abs().amax(1), "std": x.std()})

        return hook

    layers = {name: module for name, module in model.named_modules() if type(module) in QUANTIZABLE}
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    with torch.no_grad():
        for timestep in data.timesteps:
            calls = (data.timestep_of == timestep).nonzero()[:, 0]
            model(**data.batch(calls)[0])
    for handle in handles:
        handle.remove()
    table = []
    for name, steps in seen.items():
        channels = torch.stack([step["channels"] for step in steps])  # [timesteps, channels]
        std = torch.stack([step["std"] for step in steps]).mean()
        largest = channels.amax(0)
        table.append(
            {
                "model": arguments.model,
                "layer": name,
                "channels": float(largest.max() / largest.median()),
                "timesteps": float(channels.amax(1).max() / channels.amax(1).min()),
                "peak": float(largest.max() / std),
            }
        )
    rows.put(rows.RESULTS / "activation-spread.csv", [row | rows.provenance() for row in table], ("model", "layer"))
    console = Console(width=132)
    for row in sorted(table, key=lambda row: -row["channels"]):
        console.print(
            f"{row['layer']:45s} channels {row['channels']:6.1f}  timesteps {row['timesteps']:6.1f}  peak {row['peak']:6.1f}"
        )


if __name__ == "__main__":
    main()

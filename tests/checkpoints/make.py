"""How the checkpoints in this folder were made, with the code of the tag that names theirs.

    git worktree add ../v0.1.0 v0.1.0
    PYTHONPATH=../v0.1.0/src:../v0.1.0 python tests/checkpoints/make.py tests/checkpoints/v0.1.0

Four small pipelines with random weights: `static`, one parameter set for each input; `sets`, three, as a search divided the
timesteps; `shifts`, smoothed and with power-of-two factors; `correction`, with one for the sampler. Beside each is
`expected.safetensors`: what that code loaded (codes, scales, zero points, tables), and what it computed for one call by simulation.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import diffquant as dq
from diffquant.core.layers import QuantizedConv2d, QuantizedLinear
from diffquant.core.quantizer import Quantizer
from tests import pipelines

RECIPES = {
    "static": ("brecq-w4a8", []),
    "sets": ("adp-dm-w3a6", ["layers.0.sets=3", "layers.1.sets=3"]),
    "shifts": ("dmq-w4a6", []),
    "correction": ("mse-w4a8", ["passes.+={pass: FitCoefficients, samples: 4}"]),
}


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that the loaded model computes with, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            for buffer in ("codes", "scale", "zero_point", "table", "shift"):
                value = getattr(module, buffer, None)
                if value is not None:
                    found[f"{name}.{buffer}"] = value.detach().clone().contiguous()
        if isinstance(module, QuantizedConv2d | QuantizedLinear) and module.smooth is not None:
            found[f"{name}.smooth"] = module.smooth.detach().clone()
    return found


def main() -> None:
    out = Path(sys.argv[1])
    for name, (recipe, changes) in RECIPES.items():
        pipe = pipelines.micro()
        data = dq.record(pipe, dq.Calibration(samples=6, steps=4, batch_size=6), progress=False)
        chosen = dq.load_recipe(recipe, [*pipelines.small_budget(recipe), *changes])
        dq.quantize(pipe, chosen, data, progress=False)
        dq.save(pipe, out / name, recipe_name=recipe)
        model = dq.load(out / name, engine="simulate").unet
        x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        timesteps = torch.tensor([900, 500, 100])
        with torch.no_grad():
            output = model(x, timesteps).sample
        save_file(
            state(model) | {"given.x": x, "given.timesteps": timesteps, "given.output": output}, out / name / "expected.safetensors"
        )


if __name__ == "__main__":
    main()

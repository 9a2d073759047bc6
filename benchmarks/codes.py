"""A digest of what every shipped recipe makes of two small models, for changes of code that must not change a result.

python benchmarks/codes.py > before.txt      # then change the code, on the same machine
python benchmarks/codes.py | diff before.txt -
"""

import hashlib
import sys
from pathlib import Path

import torch
from torch import nn

import diffquant as dq
from diffquant.files import shipped

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import pipelines

ITERATIONS = {"iterations": 6, "samples": 16, "images": 16, "rounds": 3, "updates": 2, "trajectories": 2, "candidates": 12}


def digest(model: nn.Module) -> str:
    """Of every tensor of a quantized model."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    torch.set_num_threads(1)
    calibration = dq.Calibration(samples=8, steps=6, batch_size=4)
    for build in ("ddim", "dit"):
        for name in shipped("recipes"):
            pipe = pipelines.build(build, Path())
            recipe = dq.load_recipe(f"{name}-w4a6")
            passes = [{**each, **_few(each, step)} for each, step in zip(recipe.passes, recipe.built_passes(), strict=True)]
            try:
                dq.quantize(pipe, recipe.model_copy(update={"passes": tuple(passes)}), calibration, progress=False)
            except dq.DiffquantError as error:
                print(build, name, str(error)[:60])
                continue
            print(build, name, digest(pipe.unet if build == "ddim" else pipe.transformer), flush=True)


def _few(options: dict[str, object], step: object) -> dict[str, int]:
    return {name: value for name, value in ITERATIONS.items() if name in type(step).model_fields}


if __name__ == "__main__":
    main()

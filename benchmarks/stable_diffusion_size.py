"""The packed file of Stable Diffusion 1.5's UNet (its real configuration, random weights) against the bytes it has to hold.

    python benchmarks/stable_diffusion_size.py --bits 4

Ranges are min-max for weights and fixed for inputs: neither changes the size.
"""

import argparse
import tempfile
from pathlib import Path

import rows as results
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console

import diffquant as dq
from diffquant.checkpoint.folder import file_size, float32_size
from diffquant.core.affine import scale_from_range
from diffquant.core.model import freeze, quantizers
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan


def frozen_unet(bits: int) -> UNet2DConditionModel:
    """The quantized UNet, with the layers of recipe minmax."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    prepare(model, plan(model, dq.load_recipe(f"minmax-w{bits}a8").layers))
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, quantizer in quantizers(model):
            low, high = torch.tensor([[-4.0]]), torch.tensor([[4.0]])
            if quantizer.clock is None:
                weight = modules[name.rpartition(".")[0]].weight.flatten(1)
                low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
            scale, zero_point = scale_from_range(low, high, quantizer.spec)
            quantizer.scale.copy_(scale)
            quantizer.zero_point.copy_(zero_point)
    freeze(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    arguments = parser.parse_args()
    model = frozen_unet(arguments.bits)
    codes = scales = 0
    for _, quantizer in quantizers(model):
        scales += quantizer.scale.numel() * 4 + (0 if quantizer.spec.symmetric else quantizer.zero_point.numel())
        codes += 0 if quantizer.codes is None else (quantizer.codes.numel() * quantizer.spec.bits + 7) // 8
    stay = 4 * sum(parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        dq.save(model, Path(folder) / "unet")
        written = file_size(Path(folder) / "unet")
    float32 = float32_size(model)
    row = {
        "model": "sd15",
        "bits": arguments.bits,
        "file": written,
        "needed": codes + scales + stay,
        "over": written / (codes + scales + stay),
    }
    row |= {"float32": float32, "of_float32": written / float32}
    results.put(results.RESULTS / "stable-diffusion-size.csv", [row | results.provenance()], ("model", "bits"))
    Console().print_json(data=row)


if __name__ == "__main__":
    main()

"""The same noise through a reference model and through quantized ones, a row of pictures for each: the pictures of the README.

python benchmarks/pictures.py glyph-sd mse-w8a8=CHECKPOINT brecq-w4a8=CHECKPOINT --guidance 3 --out docs/images/glyph-sd.png
"""

import argparse
from pathlib import Path

import diffquant as dq
from diffquant import zoo
from diffquant.evaluation.grids import draw_pairs
from diffquant.evaluation.pairs import psnr
from diffquant.sampling.protocol import SAMPLERS, resolved
from diffquant.sampling.sample import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=zoo.models.PIPELINES)
    parser.add_argument("checkpoints", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", default="pipeline", choices=SAMPLERS)
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the pipeline's")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    protocol = dq.SamplingProtocol(
        samples=arguments.count,
        steps=arguments.steps,
        seed=arguments.seed,
        sampler=arguments.sampler,
        guidance_scale=arguments.guidance,
    )
    full = zoo.load(arguments.model)
    protocol = resolved(full, protocol)  # its prompts, for all of them
    drawn = {"full precision": sample(full, protocol).pictures}
    captions = {}
    for checkpoint in arguments.checkpoints:
        name, _, folder = checkpoint.partition("=")
        drawn[name] = sample(dq.load(folder), protocol).pictures
        captions[name] = f"PSNR {float(psnr(drawn['full precision'], drawn[name]).median()):.1f} dB (median)"
        print(f"{name}: {captions[name]}")
    draw_pairs({name: pictures.numpy() for name, pictures in drawn.items()}, captions).save(arguments.out)


if __name__ == "__main__":
    main()

"""A quantized model sampled with other schedulers and step counts than it was calibrated on.

    python benchmarks/samplers.py CHECKPOINT --steps 10 20 50 100

CHECKPOINT is a folder that `diffquant quantize` or a comparison wrote, or NAME=FOLDER; full precision is the reference model it was
made from.
Every row compares the two on the same noise with the same sampler. Rows that the results hold already are not measured again. A
sampler that the pipeline cannot be sampled with is left out, with the reason.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare import with_scheduler

import diffquant as dq
from diffquant import zoo
from diffquant.errors import EvaluationError
from diffquant.evaluation.compare import compare_to, measure_reference
from diffquant.evaluation.reference import run_reference

SAMPLERS = ("ddim", "ddim eta 1", "ddpm", "pndm", "dpm-solver++", "euler", "unipc")


def protocol(sampler: str, steps: int, arguments: argparse.Namespace) -> dq.SamplingProtocol:
    kind, _, eta = sampler.partition(" eta ")
    return dq.SamplingProtocol(
        samples=arguments.samples,
        steps=steps,
        seed=1000,
        sampler=kind,
        eta=float(eta or 0),
        guidance_scale=arguments.guidance,
        accumulation_samples=0,
    )


def named(text: str) -> tuple[str, Path]:
    """A checkpoint's name in the results and its folder."""
    name, equals, folder = text.partition("=")
    return (name, Path(folder)) if equals and "/" not in name else (Path(text).name, Path(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=named, metavar="CHECKPOINT")
    parser.add_argument("--model", default="glyph-ddim", help="the reference model in full precision")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the pipeline's")
    parser.add_argument("--scheduler", nargs="*", default=[], metavar="OPTION=VALUE", help="changed options of the samplers")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 20, 50, 100])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/samplers.json"))
    arguments = parser.parse_args()
    full = with_scheduler(zoo.load(arguments.model), arguments.scheduler)
    classifier, data = zoo.load("glyph-classifier"), zoo.load_statistics()
    options = "".join(f" {override}" for override in arguments.scheduler)
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for sampler in arguments.samplers:
        for steps in arguments.steps:
            labels = {
                folder: f"{arguments.model} {name}, {sampler}{options}, {steps} steps" for name, folder in arguments.checkpoints
            }
            if all(found.get(label, {}).get("samples") == arguments.samples for label in labels.values()):
                continue
            try:
                reference = run_reference(full, protocol(sampler, steps, arguments), features=classifier, data=data)
            except EvaluationError as error:
                print(f"{arguments.model}, {sampler}: {error}", flush=True)
                break
            full_figures = measure_reference(reference).figures
            for folder, label in labels.items():
                pipe = dq.load(folder)
                pipe.scheduler = full.scheduler
                figures = compare_to(reference, pipe, name=label).figures
                error, fid = figures["final_error"], figures["fid_to_reference"]
                found[label] = {
                    "samples": arguments.samples,
                    "final_error": asdict(error),
                    "median": asdict(figures["final_error_median"]),
                    "fid": asdict(fid.distance),
                    "floor": fid.floor.value,
                    "accuracy": asdict(figures["accuracy"]) if "accuracy" in figures else None,
                    "legibility": asdict(figures["legibility"].mean) if "legibility" in figures else None,
                    "legibility_full_precision": asdict(full_figures["legibility"].mean) if full_figures else None,
                }
                print(f"{label}: final error {error.value:.3f}, FID {fid.distance.value:.2f}", flush=True)
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(found, indent=1))
    print(f"\n| sampler | | {' | '.join(f'{steps} steps' for steps in arguments.steps)} |\n|{'---|' * (2 + len(arguments.steps))}")
    for sampler in arguments.samplers:
        first = f"{sampler}{options}"
        for name, _ in arguments.checkpoints:
            label = f"{arguments.model} {name}, {sampler}{options}"
            rows = [found.get(f"{label}, {steps} steps") for steps in arguments.steps]
            if any(rows):
                print(f"| {first} | {name} | {' | '.join(shown(row) if row else '' for row in rows)} |")
                first = ""


def shown(row: dict[str, Any]) -> str:
    error = row["final_error"]
    return f"{error['value']:.3f} [{error['low']:.3f}, {error['high']:.3f}]"


if __name__ == "__main__":
    main()

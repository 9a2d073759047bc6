"""Baselines on glyph-ddim: mse against brecq at full budgets, over calibration seeds; the numbers of the README.

    python benchmarks/baselines.py --out benchmarks/results/baselines.json

Checkpoints and finished passes stay in --work, so a killed run goes on where it stopped.
"""

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path

import diffquant as dq
from diffquant import zoo
from diffquant.evaluation.compare import compare_to, final_error_ratio, run_reference
from diffquant.evaluation.report import make_report
from diffquant.runtime.checkpoint import file_size, float32_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/baselines.json"))
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/baselines"))
    parser.add_argument("--recipes", nargs="+", default=["mse-w4a8", "brecq-w4a8"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--set", nargs="*", default=[], dest="overrides")
    arguments = parser.parse_args()

    pipe = zoo.load("glyph-ddim")
    protocol = dq.SamplingProtocol(samples=arguments.samples, steps=arguments.steps, seed=1000)
    checkpoints = {}
    for seed in arguments.seeds:
        calibration = dq.Calibration(samples=64, steps=20, seed=seed)
        data = dq.record(pipe, calibration, folder=arguments.work / f"recording-{seed}")
        for name in arguments.recipes:
            folder = arguments.work / f"{name}-seed{seed}"
            if not (folder / "model_index.json").exists():
                quantized = copy.deepcopy(pipe)
                recipe = dq.load_recipe(name, arguments.overrides if name.startswith("brecq") else ())
                report = dq.quantize(quantized, recipe, data, seed=seed, folder=arguments.work / f"passes-{name}-{seed}")
                dq.save(quantized, folder, recipe_name=name)
                report.write(folder / "quantization.json")
            checkpoints[f"{name} seed {seed}"] = folder

    reference = run_reference(pipe, protocol, features=zoo.load("glyph-classifier"), data=zoo.load_statistics())
    comparisons = {name: compare_to(reference, dq.load(folder), name=name) for name, folder in checkpoints.items()}
    sizes = {reference.name: float32_size(pipe.unet)} | {name: file_size(folder) for name, folder in checkpoints.items()}
    report = make_report(reference, list(comparisons.values()), sizes)
    ratios = {}
    for seed in arguments.seeds:
        base = comparisons[f"{arguments.recipes[0]} seed {seed}"]
        for name in arguments.recipes[1:]:
            ratio = final_error_ratio(comparisons[f"{name} seed {seed}"], base)
            ratios[f"{name} / {arguments.recipes[0]}, seed {seed}"] = asdict(ratio)
    report.write(arguments.out.with_suffix(""))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"final_error_ratio": ratios, "report": json.loads(report.model_dump_json())}, indent=1))
    print(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    main()

"""AccuQuant on glyph-ddim: memory, gradients, and arms against brecq; the numbers of docs/methods/accuquant.md.

    python benchmarks/accuquant.py memory
    python benchmarks/accuquant.py cosines --bits w4a6
    python benchmarks/accuquant.py compare --bits w4a8 w4a6 w3a6 --seeds 0 1 2
    python benchmarks/accuquant.py compare --bits w4a6 --arms "M=5 exact" "M=5 accumulate"     # one or several arms

Arms share recordings and stage one (ranges and rounding) in --work; finished passes and checkpoints stay there, so a killed run
goes on where it stopped. An arm is written NAME: mse, brecq, or "M=5", with options after it: identity, exact, accumulate, chain,
quantized (start), sets (one parameter set per segment), rounding, evaluations=N, or any option of the pass: "M=5 rate=0.004".
"""

import argparse
import copy
import gc
import json
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import diffquant as dq
from diffquant import zoo
from diffquant.calibration.fit import load_tensors
from diffquant.calibration.rollout import Rollout
from diffquant.core.surgery import enable, plan, prepare
from diffquant.demo import progress_bars
from diffquant.evaluation.compare import compare_to, final_error_ratio, run_reference
from diffquant.evaluation.report import make_report
from diffquant.methods.accuquant import AccuQuant, gradient_of
from diffquant.methods.passes import evaluating, restore_quantizers
from diffquant.recipe import pass_names
from diffquant.runtime.checkpoint import float32_size

STEPS = 50
TRAJECTORIES = 96
STAGE_TWO = 2  # position of the last pass in both recipes
CONSOLE = Console(stderr=True)


def recording(pipe: Any, work: Path, seed: int) -> dq.Trajectory:
    return dq.record(pipe, dq.Calibration(samples=TRAJECTORIES, steps=STEPS, seed=seed), folder=work / f"recording-{seed}")


def stage_one(bits: str, arguments: argparse.Namespace, seed: int = 0) -> tuple[Any, dq.Trajectory]:
    """A quantizable denoiser with ranges and rounding as all arms start from, quantizers on, and its recording."""
    pipe = zoo.load("glyph-ddim")
    data = recording(pipe, arguments.work, seed)
    recipe = dq.load_recipe(f"accuquant-{bits}", arguments.overrides)
    short = recipe.model_copy(update={"passes": recipe.passes[:STAGE_TWO]})
    dq.quantize(copy.deepcopy(pipe), short, data, seed=seed, folder=arguments.work / f"passes-{seed}")
    last = arguments.work / f"passes-{seed}" / f"{pass_names(short, short.steps(), seed, data)[-1]}.safetensors"
    model = pipe.unet
    prepare(model, plan(model, recipe.layers), data.timesteps)
    restore_quantizers(model, load_tensors(last)[0])
    enable(model)
    return model, data


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak minus resting memory of one calibration iteration: resident bytes, and bytes that autograd saves.

    Every row is measured in a process of its own: an allocator keeps what an earlier row needed.
    """
    stage_one("w4a8", arguments)
    rows = []
    for gradient in ("identity", "exact", "accumulate", "chain"):
        for steps in (1, 2, 5, 10, 20):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(memory_of, (arguments, gradient, steps)))
            print(json.dumps(rows[-1]), flush=True)
    return {"batch": arguments.batch, "rows": rows}


def memory_of(arguments: argparse.Namespace, gradient: str, steps: int) -> dict[str, Any]:
    """One row, after a forward pass without gradients."""
    model, data = stage_one("w4a8", arguments)
    learned = AccuQuant()._learned(model)
    with evaluating(model):
        chain = Rollout(model, data).chain(torch.arange(arguments.batch), range(STEPS - steps, STEPS))
        chain.run()
        resident = resident_bytes(lambda: gradient_of(chain, gradient, learned))
        saved = saved_bytes(lambda: gradient_of(chain, gradient, learned))
    return {"gradient": gradient, "M": steps, "saved": saved, "resident": resident}


def saved_bytes(run: Callable[[], object]) -> int:
    """The most bytes that autograd kept at one time, weights counted once per use."""
    alive = most = 0

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal alive, most
            self.tensor = tensor
            alive += tensor.nbytes
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        run()
    return most


def resident_bytes(run: Callable[[], object]) -> int:
    """Peak minus resting resident memory, sampled every millisecond."""
    gc.collect()
    page = resource.getpagesize()

    def now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    resting = most = now()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, now())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return most - resting


def cosines(arguments: argparse.Namespace) -> dict[str, Any]:
    """Cosine of the approximate and the exact gradient over M, mean and least over segments."""
    rows = []
    for bits in arguments.bits:
        model, data = stage_one(bits, arguments)
        rollout = Rollout(model, data)
        learned = AccuQuant()._learned(model)
        with evaluating(model):
            for steps in (2, 5, 10, 25):
                for gradient in ("identity", "accumulate"):
                    found = []
                    for segment in rollout.segments(steps):
                        chain = rollout.chain(torch.arange(16), segment)
                        pair = [gradient_of(chain, kind, learned) for kind in (gradient, "exact")]
                        found.append(float(torch.nn.functional.cosine_similarity(pair[0], pair[1], dim=0)))
                    mean = sum(found) / len(found)
                    rows.append({"bits": bits, "M": steps, "gradient": gradient, "mean": mean, "least": min(found), "all": found})
                    print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


def recipe_of(arm: str, bits: str, arguments: argparse.Namespace) -> dq.Recipe:
    """The recipe of an arm; denoiser evaluations with a gradient are the same for all M unless an arm says otherwise."""
    name, *options = arm.split()
    if name == "mse":
        return dq.load_recipe(f"mse-{bits}")
    if name == "brecq":
        given = [f"passes.{STAGE_TWO}.{option}" for option in options]
        return dq.load_recipe(f"brecq-{bits}", [*arguments.overrides, *given])
    steps = int(name.removeprefix("M="))
    evaluations = next((int(o.split("=")[1]) for o in options if o.startswith("evaluations=")), arguments.evaluations)
    settings = {"steps_per_segment": steps, "iterations": max(1, evaluations // steps)}
    for option in options:
        if option in ("identity", "exact", "accumulate", "chain"):
            settings["gradient"] = option
        elif option == "quantized":
            settings["start"] = "quantized"
        elif option == "rounding":
            settings["rounding"] = "true"
        elif option == "sets":
            settings["per_segment"] = "true"
        elif not option.startswith("evaluations="):
            key, _, value = option.partition("=")
            settings[key] = value
    given = [f"passes.{STAGE_TWO}.{key}={value}" for key, value in settings.items()]
    return dq.load_recipe(f"accuquant-{bits}", [*arguments.overrides, *given])


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every arm at every bits and seed, on the same noise."""
    pipe = zoo.load("glyph-ddim")
    protocol = dq.SamplingProtocol(samples=arguments.samples, steps=STEPS, seed=1000, accumulation_samples=arguments.accumulation)
    reference = None
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"arms": {}}
    comparisons = {}
    for bits in arguments.bits:
        for seed in arguments.seeds:
            data = recording(pipe, arguments.work, seed)
            for arm in arguments.arms:
                label = f"{bits} {arm} seed {seed}"
                folder = arguments.work / "checkpoints" / label.replace(" ", "_")
                if not (folder / "model_index.json").exists():
                    quantized = copy.deepcopy(pipe)
                    begun = time.monotonic()
                    report = dq.quantize(
                        quantized, recipe_of(arm, bits, arguments), data, seed=seed, folder=arguments.work / f"passes-{seed}"
                    )
                    dq.save(quantized, folder, recipe_name=f"{arm} {bits}")
                    report.write(folder / "quantization.json")
                    print(f"{label}: quantized in {time.monotonic() - begun:.0f} s", flush=True)
                if reference is None:
                    reference = run_reference(pipe, protocol, features=zoo.load("glyph-classifier"), data=zoo.load_statistics())
                with progress_bars(CONSOLE) as progress:
                    comparisons[label] = compare_to(reference, dq.load(folder), name=label, progress=progress)
                last = json.loads((folder / "quantization.json").read_text())["passes"][-1]
                result = comparisons[label]
                found["arms"][label] = {
                    "final_error": asdict(result.final_error),
                    "median": asdict(result.final_error_median),
                    "fid": asdict(result.to_reference.fid),
                    "floor": reference.floor.fid.value,
                    "drift": result.drift[:: max(1, STEPS // 10)],
                    "stage_two_seconds": last["seconds"],
                    "options": last["options"],
                    "errors": [round(float(error), 5) for error in result.final_errors],
                }
                print(
                    f"{label}: final error {result.final_error.value:.4f} [{result.final_error.low:.4f}, "
                    f"{result.final_error.high:.4f}], median {result.final_error_median.value:.4f}, FID to full precision "
                    f"{result.to_reference.fid.value:.3f} (floor {reference.floor.fid.value:.2f}), {last['seconds']:.0f} s",
                    flush=True,
                )
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(found, indent=1))
            base = comparisons[f"{bits} {arguments.arms[0]} seed {seed}"]
            for arm in arguments.arms[1:]:
                ratio = final_error_ratio(comparisons[f"{bits} {arm} seed {seed}"], base)
                print(
                    f"{bits} seed {seed}: {arm} / {arguments.arms[0]} = {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
                    flush=True,
                )
    if reference is not None:
        sizes = {reference.name: float32_size(pipe.unet)}
        make_report(reference, list(comparisons.values()), sizes).write(arguments.out.with_suffix(""))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "cosines", "compare"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/accuquant"))
    parser.add_argument("--bits", nargs="+", default=["w4a6"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", default=["brecq", "M=1", "M=2", "M=5", "M=10"], help="the first is the baseline")
    parser.add_argument("--evaluations", type=int, default=1000, help="denoiser evaluations with a gradient of stage two")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--accumulation", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="memory: trajectories at once")
    parser.add_argument("--set", nargs="*", default=[], dest="overrides")
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path(f"benchmarks/results/accuquant-{arguments.what}.json")
    found = {"memory": memory, "cosines": cosines, "compare": compare}[arguments.what](arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

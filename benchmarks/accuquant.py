"""AccuQuant on glyph-ddim: memory, gradients, and arms against brecq; the numbers of docs/methods/accuquant.md.

    python benchmarks/accuquant.py memory
    python benchmarks/accuquant.py cosines --bits w4a6
    python benchmarks/accuquant.py compare --bits w4a8 w4a6 w3a6 --seeds 0 1 2
    python benchmarks/accuquant.py compare --bits w4a6 --arms "M=5 exact" "M=5 rounding"     # one or several arms

Arms share recordings and stage one (ranges and rounding) in --work; finished passes and checkpoints stay there, so a killed run
goes on where it stopped. An arm is written NAME: mse, brecq, or "M=5", with options after it: identity (default), exact,
sets (one parameter set per segment), rounding, evaluations=N, or any option of the pass: "M=5 exact rate=0.006". Other options
that rows of the results name are those of the tag v0.1.0.
"""

import argparse
import copy
import gc
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare import STEPS, add_arguments, compare, recording

import diffquant as dq
from diffquant import zoo
from diffquant.calibration.rollout import Rollout
from diffquant.core.model import enable
from diffquant.engines.int8.engine import release_freed_memory
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan
from diffquant.methods.accuquant import AccuQuant
from diffquant.methods.base import evaluating
from diffquant.methods.gradients import gradient_of
from diffquant.quantization import pass_names, restore_passes

STAGE_TWO = 2  # position of the last pass in both recipes


def stage_one(bits: str, arguments: argparse.Namespace, seed: int = 0) -> tuple[Any, dq.Trajectory]:
    """A quantizable denoiser with ranges and rounding as all arms start from, quantizers on, and its recording."""
    pipe = zoo.load("glyph-ddim")
    data = recording(pipe, arguments.work, seed)
    recipe = dq.load_recipe(f"accuquant-{bits}", arguments.overrides)
    short = recipe.model_copy(update={"passes": recipe.passes[:STAGE_TWO]})
    dq.quantize(copy.deepcopy(pipe), short, data, seed=seed, folder=arguments.work / f"passes-{seed}")
    model = pipe.unet
    rows = plan(model, recipe.layers)
    prepare(model, rows, data.timesteps)
    restore_passes(model, arguments.work / f"passes-{seed}", pass_names(short, rows, seed, data))
    enable(model)
    return model, data


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak minus resting memory of one calibration iteration: resident bytes, and bytes that autograd saves.

    Every row is measured in a process of its own: an allocator keeps what an earlier row needed. `given_back`: with glibc told to
    give every large tensor back when it is freed (MALLOC_MMAP_THRESHOLD_), so that no holes are counted.
    """
    stage_one(arguments.bits[0], arguments)
    rows = []
    for given_back in (False, True):
        if given_back:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read when a process starts
        for gradient in ("identity", "exact"):
            for steps in (1, 2, 5, 10, 20):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    rows.append({"given_back": given_back, **pool.apply(memory_of, (arguments, gradient, steps))})
                print(json.dumps(rows[-1]), flush=True)
    return {"batch": arguments.batch, "rows": rows}


def memory_of(arguments: argparse.Namespace, gradient: str, steps: int) -> dict[str, Any]:
    """One row: of an iteration after the first, as all but one of a calibration are; before it, what was freed is given back."""
    model, data = stage_one(arguments.bits[0], arguments)
    learned = AccuQuant()._learned(model)
    with evaluating(model):
        chain = Rollout(model, data).chain(torch.arange(arguments.batch), range(STEPS - steps, STEPS))
        gradient_of(chain, gradient, learned)
        release_freed_memory()
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
    """Peak minus resting resident memory, sampled every millisecond; without pages of the recording's files."""
    gc.collect()

    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

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
                cosine: dict[str, list[float]] = {"identity": [], "accumulate": []}
                for segment in rollout.segments(steps):
                    chain = rollout.chain(torch.arange(16), segment)
                    exact = gradient_of(chain, "exact", learned)
                    for gradient, found in cosine.items():
                        given = gradient_of(chain, gradient, learned)
                        found.append(float(torch.nn.functional.cosine_similarity(given, exact, dim=0)))
                for gradient, found in cosine.items():
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
    settings: dict[str, object] = {"steps_per_segment": steps, "iterations": max(1, evaluations // steps)}
    settings |= {"gradient": "identity", "rate": 0.002}
    for option in options:
        if option in ("identity", "exact"):
            settings["gradient"] = option
        elif option == "rounding":
            settings["rounding"] = "true"
        elif option == "sets":
            settings["per_segment"] = "true"
        elif not option.startswith("evaluations="):
            key, _, value = option.partition("=")
            settings[key] = value
    given = [f"passes.{STAGE_TWO}.{key}={value}" for key, value in settings.items()]
    return dq.load_recipe(f"accuquant-{bits}", [*arguments.overrides, *given])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "cosines", "compare"])
    add_arguments(parser, Path("benchmarks/work/accuquant"), ["brecq", "M=1", "M=2", "M=5", "M=10"])
    parser.add_argument("--evaluations", type=int, default=1000, help="denoiser evaluations with a gradient of stage two")
    parser.add_argument("--batch", type=int, default=16, help="memory: trajectories at once")
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path(f"benchmarks/results/accuquant-{arguments.what}.json")
    if arguments.what == "compare":
        compare(arguments, recipe_of)
        return
    found = {"memory": memory, "cosines": cosines}[arguments.what](arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

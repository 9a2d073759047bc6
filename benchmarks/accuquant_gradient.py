"""Gradients of AccuQuant on glyph-ddim: the memory of an iteration, and how far the approximate gradient is from the exact one.

    python benchmarks/accuquant_gradient.py memory
    python benchmarks/accuquant_gradient.py cosines --bits w4a6

Recordings and stage one (ranges and rounding) are those of the studies, in --work. Rows: `results/accuquant-memory.csv`, one for
each gradient and number of steps, and `results/accuquant-cosines.csv`, one for each segment.
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

import rows
import study as studies
import torch
from rich.console import Console

import diffquant as dq
from diffquant.calibration.rollout import Rollout
from diffquant.core.memory import release_freed_memory
from diffquant.core.model import enable
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan
from diffquant.methods.accuquant import AccuQuant
from diffquant.methods.base import evaluating
from diffquant.methods.gradients import gradient_of
from diffquant.quantization import pass_names, restore_passes

STAGE_TWO = 2  # position of the last pass in both recipes
CONSOLE = Console(stderr=True)


def stage_one(bits: str, arguments: argparse.Namespace, seed: int = 0) -> tuple[Any, dq.Trajectory]:
    """A quantizable denoiser with ranges and rounding as all arms start from, quantizers on, and its recording."""
    pipe, settings = studies.pipeline("glyph-ddim"), studies.Recording()
    data = studies.recording(pipe, "glyph-ddim", settings, seed, arguments.work)
    recipe = dq.load_recipe(f"accuquant-{bits}", arguments.overrides)
    short = recipe.model_copy(update={"passes": recipe.passes[:STAGE_TWO]})
    folder = arguments.work / settings.folder_name("glyph-ddim") / f"passes-{seed}"
    dq.quantize(copy.deepcopy(pipe), short, data, seed=seed, folder=folder)
    model = pipe.unet
    layers = plan(model, recipe.layers)
    prepare(model, layers, data.timesteps)
    restore_passes(model, folder, pass_names(short, layers, seed, data))
    enable(model)
    return model, data


def memory(arguments: argparse.Namespace) -> None:
    """Peak minus resting memory of one calibration iteration: resident bytes, and bytes that autograd saves.

    Every row is measured in a process of its own: an allocator keeps what an earlier row needed. `given_back`: with glibc told to
    give every large tensor back when it is freed (MALLOC_MMAP_THRESHOLD_), so that no holes are counted.
    """
    stage_one(arguments.bits[0], arguments)
    for given_back in ("false", "true"):
        if given_back == "true":
            os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read when a process starts
        for gradient in ("identity", "exact"):
            for steps in (1, 2, 5, 10, 20):
                key = {
                    "model": "glyph-ddim",
                    "batch": arguments.batch,
                    "given_back": given_back,
                    "gradient": gradient,
                    "steps": steps,
                }
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row = key | pool.apply(memory_of, (arguments, gradient, steps))
                rows.put(rows.RESULTS / "accuquant-memory.csv", [row | rows.provenance()], tuple(key))
                CONSOLE.print(json.dumps(row))


def memory_of(arguments: argparse.Namespace, gradient: str, steps: int) -> dict[str, Any]:
    """One row: of an iteration after the first, as all but one of a calibration are; before it, what was freed is given back."""
    model, data = stage_one(arguments.bits[0], arguments)
    learned = AccuQuant()._learned(model)
    with evaluating(model):
        chain = Rollout(model, data).chain(torch.arange(arguments.batch), range(studies.STEPS - steps, studies.STEPS))
        gradient_of(chain, gradient, learned)
        release_freed_memory()
        resident = resident_bytes(lambda: gradient_of(chain, gradient, learned))
        saved = saved_bytes(lambda: gradient_of(chain, gradient, learned))
    return {"saved_bytes": saved, "resident_bytes": resident}


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


def cosines(arguments: argparse.Namespace) -> None:
    """Cosine of the approximate and the exact gradient over M, for every segment."""
    for bits in arguments.bits:
        model, data = stage_one(bits, arguments)
        rollout = Rollout(model, data)
        learned = AccuQuant()._learned(model)
        with evaluating(model):
            for steps in (2, 5, 10, 25):
                cosine = []
                for segment in rollout.segments(steps):
                    chain = rollout.chain(torch.arange(16), segment)
                    exact, approximate = (gradient_of(chain, gradient, learned) for gradient in ("exact", "identity"))
                    cosine.append(float(torch.nn.functional.cosine_similarity(approximate, exact, dim=0)))
                key = {"model": "glyph-ddim", "bits": bits, "gradient": "identity", "steps": steps}
                table = [key | {"segment": place, "cosine": value} | rows.provenance() for place, value in enumerate(cosine)]
                rows.put(rows.RESULTS / "accuquant-cosines.csv", table, (*key, "segment"))
                CONSOLE.print(f"{bits}, M = {steps}: mean {sum(cosine) / len(cosine):.4f}, least {min(cosine):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "cosines"])
    parser.add_argument("--bits", nargs="+", default=["w4a6"])
    parser.add_argument("--batch", type=int, default=16, help="memory: trajectories at once")
    parser.add_argument("--work", type=Path, default=studies.WORK, help="that of the studies")
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", help="of the recipe")
    arguments = parser.parse_args()
    {"memory": memory, "cosines": cosines}[arguments.what](arguments)


if __name__ == "__main__":
    main()

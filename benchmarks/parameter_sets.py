"""What parameter sets over the timesteps cost when sampling: time of a step with G sets for every activation, against one.

    python benchmarks/parameter_sets.py --models glyph-ddim dit-s --sets 8 50

All variants hold the same ranges, the sets' scales differing by a percent from one to the next, and take turns at every one of 50
timesteps, each of which takes another set than the one before. Ratios are of the sums of a round, in processor time of one thread,
which other processes on the machine change least.
"""

import argparse
import copy
import statistics
import time
from typing import Any

import rows as results
import torch
from engine import MODELS, calibrated, inputs
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import diffquant as dq
from diffquant.core.model import freeze, quantizers

TIMESTEPS = tuple(float(timestep) for timestep in range(980, -1, -20))


def with_sets(model: nn.Module, given: dict[str, Tensor], sets: int) -> nn.Module:
    """`model` frozen at 8 bits with `sets` sets, timestep k taking set k modulo `sets`."""
    calibrated(
        model, lambda model: model(**given).sample, "minmax-w8a8", [f"layers.{rule}.sets={sets}" for rule in (0, 1)], TIMESTEPS
    )
    for _, quantizer in quantizers(model):
        if quantizer.table is not None:
            quantizer.scale = quantizer.scale * (1 + 0.01 * torch.arange(quantizer.rows)[:, None])
            quantizer.table = (torch.arange(len(quantizer.table)) % sets).to(quantizer.table)
    freeze(model)
    return model


def sweep(models: dict[int, nn.Module], given: dict[str, Tensor]) -> dict[int, float]:
    """Processor seconds of each model for one call at each timestep; they take turns at each."""
    taken = dict.fromkeys(models, 0.0)
    for timestep in TIMESTEPS:
        arguments = given | {"timestep": torch.full_like(given["timestep"], int(timestep))}
        for sets, model in models.items():
            start = time.process_time()
            model(**arguments)
            taken[sets] += time.process_time() - start
    return taken


def one_model(name: str, engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    make, _ = MODELS[name]
    torch.manual_seed(0)
    full = make().eval().requires_grad_(False)
    given = inputs(full, arguments.batch)
    models = {sets: with_sets(copy.deepcopy(full), given, sets) for sets in (1, *arguments.sets)}
    for model in models.values():
        dq.use_engine(model, engine)
        model(**given)
    times: dict[int, list[float]] = {sets: [] for sets in models}
    for _ in range(arguments.rounds):
        for sets, seconds in sweep(models, given).items():
            times[sets].append(seconds)
    ratios = {sets: sorted(a / b for a, b in zip(times[sets], times[1], strict=True)) for sets in arguments.sets}
    return {"seconds": {sets: statistics.median(taken) for sets, taken in times.items()}, "ratios": ratios}


def rows_of(name: str, engine: str, batch: int, row: dict[str, Any]) -> list[results.Row]:
    """A row for each number of sets."""
    shared = {"threads": torch.get_num_threads()} | results.provenance() | {"engine": engine}
    table = []
    for sets, seconds in row["seconds"].items():
        line = {"model": name, "batch": batch, "sets": sets, "seconds": seconds}
        if ratios := row["ratios"].get(sets):
            line |= {"rounds": len(ratios), "ratio": statistics.median(ratios)}
            line |= {"ratio_least": ratios[0], "ratio_largest": ratios[-1]}
        table.append(line | shared)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["glyph-ddim", "dit-s"])
    parser.add_argument("--engines", nargs="+", choices=["int8", "simulate"], default=["int8", "simulate"])
    parser.add_argument("--sets", nargs="+", type=int, default=[8, 50])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    file = results.RESULTS / "parameter-sets.csv"
    table = Table("model", "engine", "sets", "time with one set = 1", "least and largest round")
    torch.set_num_threads(1)
    with torch.no_grad():
        for name in arguments.models:
            for engine in arguments.engines:
                row = one_model(name, engine, arguments)
                results.put(file, rows_of(name, engine, arguments.batch, row), ("model", "engine", "batch", "sets"))
                for sets, ratios in row["ratios"].items():
                    middle, extent = statistics.median(ratios), f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
                    table.add_row(name, engine, str(sets), f"{middle:.3f}", extent)
    Console().print(table)


if __name__ == "__main__":
    main()

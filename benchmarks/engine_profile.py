"""Where the int8 engine's time goes, operator by operator, and how far that is from what the machine could do.

    python benchmarks/engine_profile.py --models dit-s ddpm-cifar10 glyph-ddim sd15

The floor of a call: the model's products (torch's own count) at the rate of a large integer product, and one pass over memory, to
read float32 and to write it, for each normalization and activation. Both rates are measured in the same process. What attention
does to its scores is not in the floor: they need not be in memory.
"""

import argparse
import copy
import functools
import math
import statistics
import time
from collections import defaultdict
from typing import Any

import rows as results
import torch
from engine import MODELS, Run, denoise, inputs, quantize
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import diffquant as dq

KINDS = {
    "integer products": ("onednn::qconv2d_pointwise", "onednn::qlinear_pointwise", "aten::_int_mm"),
    "floating-point products": ("aten::bmm", "aten::mm", "aten::addmm", "aten::mkldnn_convolution", "aten::baddbmm"),
    "quantizing": ("aten::quantize_per_tensor", "aten::clamp_", "aten::round_"),
    "softmax": ("aten::_softmax",),
    "normalizations": ("aten::native_group_norm", "aten::native_layer_norm"),
    "activations": ("aten::silu", "aten::silu_", "aten::gelu", "aten::sigmoid"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone"),
    "sums and factors": (
        "aten::add",
        "aten::add_",
        "aten::mul",
        "aten::mul_",
        "aten::sub",
        "aten::sub_",
        "aten::div",
        "aten::div_",
    ),
}
PASSES = ("aten::native_group_norm", "aten::native_layer_norm", "aten::silu", "aten::gelu")
SIDE = 2048  # of the large product
COPIED = 1 << 26  # float32 values


def median_time(run: Run, calls: int = 7) -> float:
    run()
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def product_rate() -> float:
    """Integer operations (two for each product and sum) per second in a large linear layer."""
    codes = torch.randint(0, 256, (SIDE, SIDE), dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 128, (SIDE, SIDE), dtype=torch.int8), None)
    scale, zero_point = torch.ones(SIDE), torch.zeros(SIDE, dtype=torch.int32)

    def run() -> Tensor:
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, weight, scale, zero_point, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product

    return 2 * SIDE**3 / median_time(run)


def bandwidth() -> float:
    """Bytes read and written per second in a copy."""
    source, target = torch.ones(COPIED), torch.empty(COPIED)
    return 8 * COPIED / median_time(lambda: target.copy_(source))


def operators(run: Run, calls: int) -> list[Any]:
    """Events of every operator, with the shapes of what it is given."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as events:
        for _ in range(calls):
            run()
    return list(events.key_averages(group_by_input_shape=True))


def one_model(name: str, calls: int, rates: tuple[float, float]) -> dict[str, Any]:
    make, batch = MODELS[name]
    torch.manual_seed(0)
    full = make().eval().requires_grad_(False)
    given = inputs(full, batch)
    with FlopCounterMode(display=False) as counted:
        full(**given)
    events = operators(functools.partial(full, **given), 1)
    passes = sum(event.count * math.prod(event.input_shapes[0]) for event in events if event.key in PASSES)
    quantized: nn.Module = quantize(copy.deepcopy(full), denoise(batch), 8)
    del full
    dq.use_engine(quantized, "int8")
    seconds = median_time(lambda: quantized(**given), calls)
    spent: dict[str, float] = defaultdict(float)
    kind_of = {operator: kind for kind, names in KINDS.items() for operator in names}
    for event in operators(lambda: quantized(**given), calls):
        spent[kind_of.get(event.key, "other operators and Python")] += event.self_cpu_time_total / 1e6 / calls
    spent["other operators and Python"] += max(0.0, seconds - sum(spent.values()))
    floor = {"products": counted.get_total_flops() / rates[0], "passes over memory": 8 * passes / rates[1]}
    return {"batch": batch, "seconds": seconds, "spent": dict(spent), "floor": floor, "of floor": seconds / sum(floor.values())}


def table_of(name: str, row: dict[str, Any], rates: tuple[float, float]) -> list[results.Row]:
    """A row for each part of the time and of the floor, and one for the whole call."""
    of_call = {"of_floor": row["of floor"], "operations_a_second": rates[0], "bytes_a_second": rates[1]}
    parts = [("spent", part, seconds, {}) for part, seconds in row["spent"].items()]
    parts += [("floor", part, seconds, {}) for part, seconds in row["floor"].items()]
    parts.append(("total", "whole call", row["seconds"], of_call))
    shared = {"threads": torch.get_num_threads()} | results.provenance() | {"engine": "int8"}
    return [
        {"model": name, "batch": row["batch"], "part": part, "kind": kind, "seconds": seconds} | more | shared
        for kind, part, seconds, more in parts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--calls", type=int, default=5)
    arguments = parser.parse_args()
    with torch.no_grad():
        rates = product_rate(), bandwidth()
        for name in arguments.models:
            row = one_model(name, arguments.calls, rates)
            table = Table(f"{name}, batch {row['batch']}: {row['seconds'] * 1e3:.0f} ms", "ms", "share")
            total = sum(row["spent"].values())
            for kind, seconds in sorted(row["spent"].items(), key=lambda item: -item[1]):
                table.add_row(kind, f"{seconds * 1e3:.1f}", f"{seconds / total:.0%}")
            table.add_section()
            for part, seconds in row["floor"].items():
                table.add_row(f"floor: {part}", f"{seconds * 1e3:.1f}", "")
            table.add_row("times the floor", f"{row['of floor']:.2f}", "")
            Console().print(table)
            results.put(results.RESULTS / "engine-profile.csv", table_of(name, row, rates), ("model", "kind", "part"))


if __name__ == "__main__":
    main()

"""What this machine is, what its kernels multiply exactly, and which engine quantized models get on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch
from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from diffquant.engines.base import VARIABLE, check_engine, default, engine_class, engine_names
from diffquant.engines.exactness import CODES, KERNELS, answer_of
from diffquant.errors import DiffquantError

PACKAGES = ("diffquant", "torch", "diffusers", "transformers", "openvino", "onnx", "onnxruntime")
SETS = ("avx2", "avx512_f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "sve", "dot", "i8mm")


class Kernel(BaseModel):
    """What one kernel multiplies: the largest exact weight beside codes of 2 to 8 bits, and the time of float32 over its own.

    ``speed`` is None where it was not measured. ``reason``: why it does not run here; empty where it does.
    """

    name: str
    largest_weight: dict[int, int]
    speed: float | None
    reason: str


class EngineInfo(BaseModel):
    """Whether an engine runs here; ``says``: how exactly, or why not."""

    name: str
    runs: bool
    says: str


class Info(BaseModel):
    """The machine as quantized models meet it. ``instructions``: as PyTorch names them; nothing is decided by them."""

    processor: str
    architecture: str
    system: str
    cores: int
    threads: int
    memory_gib: float
    instructions: list[str]
    versions: dict[str, str]
    kernels: list[Kernel]
    engines: list[EngineInfo]
    default: str
    why: str

    def table(self) -> RenderableType:
        """For a terminal."""
        headers = "kernel", "largest weight\nbeside 8 bits", "beside\n7 bits", "times as fast\nas float32"
        kernels = Table(*headers, title="kernels")
        if any(kernel.reason for kernel in self.kernels):
            kernels.add_column("does not run")
        for kernel in self.kernels:
            speed = "" if kernel.speed is None else f"{kernel.speed:.1f}"
            cells = kernel.name, str(kernel.largest_weight[8]), str(kernel.largest_weight[7]), speed, kernel.reason
            kernels.add_row(*map(escape, cells[: len(kernels.columns)]))
        rows = Table("engine", "runs", "what it does here", title="engines")
        for engine in self.engines:
            rows.add_row(engine.name, "yes" if engine.runs else "no", escape(engine.says))
        sets = ", ".join(self.instructions) or "no known sets"
        lines = [
            f"{self.processor}, {self.architecture}, {self.system}",
            f"{self.cores} cores, {self.threads} threads, {self.memory_gib:.0f} GiB; {sets}",
            ", ".join(f"{name} {number}" for name, number in self.versions.items()),
        ]
        return Group(*lines, kernels, rows, f"default engine: {self.default} ({self.why})")


def info() -> Info:
    """Ask this machine; takes a second or two, as every kernel computes."""
    chosen, why = default()
    if name := os.environ.get(VARIABLE):
        chosen, why = name, f"the environment says {VARIABLE}={name}"
    return Info(
        processor=str(_capabilities().get("cpu_name") or platform.processor() or platform.machine()),
        architecture=platform.machine(),
        system=f"{platform.system()} {platform.release()}",
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_gib=psutil.virtual_memory().total / 2**30,
        instructions=[name for name in SETS if _capabilities().get(name)],
        versions={name: number for name in PACKAGES if (number := _version(name))},
        kernels=[_kernel(name) for name in KERNELS],
        engines=[_engine(name) for name in engine_names()],
        default=chosen,
        why=why,
    )


def _capabilities() -> dict[str, Any]:
    """What PyTorch knows of the processor; empty where it does not say."""
    ask: Callable[[], Any] | None = getattr(torch.cpu, "get_capabilities", None)
    try:
        return dict(ask()) if ask is not None else {}
    except (RuntimeError, TypeError, ValueError):
        return {}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _kernel(name: str) -> Kernel:
    answer = answer_of(name)
    largest = {last.bit_length(): bound for last, bound in zip(CODES, answer.exact, strict=True)}
    return Kernel(name=name, largest_weight=largest, speed=answer.speed or None, reason=answer.reason)


def _engine(name: str) -> EngineInfo:
    try:
        check_engine(name)
    except DiffquantError as error:
        return EngineInfo(name=name, runs=False, says=str(error))
    return EngineInfo(name=name, runs=True, says=engine_class(name).explained())

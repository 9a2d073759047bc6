"""Less memory for fitting a large model: tensors in files, and graphs that are computed again. Results are equal bit for bit."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffquant.core.clock import StepClock
from diffquant.core.model import state_of
from diffquant.errors import CalibrationError
from diffquant.host.structure import units

GIB = 2**30
BUDGET = 2 * GIB  # bytes of a unit's recorded inputs and outputs that are held in memory

Key = tuple[str, int | str]  # of a column: "argument", "keyword" or "output", and its place or name


def mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None = None) -> Tensor:
    """A tensor of zeros in a file without a name in `folder` (default: that of temporary files).

    The file goes when the tensor does, and with the process, however that ends. Raises `CalibrationError` where the disk is full.
    """
    size = math.prod(shape) * dtype.itemsize
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and the end of the process at a later write
                os.posix_fallocate(file.fileno(), 0, size)
            buffer = mmap.mmap(file.fileno(), size)
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise CalibrationError(
            f"{where}: a unit's inputs need {size / GIB:.2f} GiB there ({error}); free some space, or raise memory_gib"
        ) from error
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


class Columns:
    """Values of many calls put together batch by batch: tensors that have a row per sample, lists of other tensors, constants.

    Where the rows of all tensors together would take more than `budget` bytes they are `mapped` into `folder`, on the CPU.
    """

    def __init__(self, rows: int, budget: float = math.inf, folder: Path | None = None) -> None:
        self.rows, self.budget, self.folder = rows, budget, folder
        self.filled = 0
        self.values: dict[Key, Any] = {}

    def add(self, count: int, batch: dict[Key, Any]) -> None:
        """Take over the values of a call of `count` samples. Raises `CalibrationError` where calls differ in their shapes."""
        if not self.values:
            self._allocate(count, batch)
        for key, value in batch.items():
            column = self.values[key]
            if isinstance(column, list):
                column.append(value.detach())
            elif isinstance(column, Tensor) and column.dim() > 0:
                if value.shape != (count, *column.shape[1:]):
                    raise CalibrationError(
                        f"{' '.join(map(str, key))}: has shape {tuple(value.shape)} after {(count, *column.shape[1:])}; "
                        f"calls of different shapes cannot be put together"
                    )
                column[self.filled : self.filled + count].copy_(value.detach())
        self.filled += count

    def of(self, kind: str) -> dict[int | str, Any]:
        """The columns of one kind by place or name; lists of tensors as one."""
        return {
            place: torch.cat(value) if isinstance(value, list) else value
            for (what, place), value in self.values.items()
            if what == kind
        }

    def _allocate(self, count: int, batch: dict[Key, Any]) -> None:
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
        by_row = {key: value for key, value in tensors.items() if value.shape[0] == count}
        spill = sum(value[0].nbytes for value in by_row.values()) * self.rows > self.budget
        for key, value in batch.items():
            if key not in by_row:
                self.values[key] = [] if key in tensors else value
                continue
            shape = (self.rows, *value.shape[1:])
            to_file = spill and math.prod(shape) > 0
            self.values[key] = mapped(shape, value.dtype, self.folder) if to_file else value.new_empty(shape)


@contextmanager
def checkpointed(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Forward passes in this block keep no graph of `model`'s units: each is computed again when it is back-propagated through.

    Backward passes may come later. Nothing changes for `on` False, and where gradients are off.
    """
    state = state_of(model)
    clock = None if state is None else state.clock
    modules = [unit.module for unit in units(model)] if on else []
    for module in modules:
        module.forward = recomputed(module.forward, clock)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def recomputed(forward: Callable[..., Any], clock: StepClock | None) -> Callable[..., Any]:
    """`forward` without its graph, which is built when it is needed, at the interval of `clock` that the call was made at.

    Source: Chen et al. 2016, arXiv 1604.06174. Dropout is not supported: models are in evaluation mode.
    """

    def call(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        interval = 0 if clock is None else clock.interval
        again = False

        def at_its_interval(*arguments: Any, **keywords: Any) -> Any:
            nonlocal again
            if clock is None or not again:  # the first time the clock is right, and goes on from here
                again = True
                return forward(*arguments, **keywords)
            present = clock.interval
            clock.set_interval(interval)
            try:
                return forward(*arguments, **keywords)
            finally:
                clock.set_interval(present)

        return checkpoint(at_its_interval, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)

    return call

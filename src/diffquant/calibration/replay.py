"""Recorded calls made again: of the whole model, or as far as its units, whose inputs and outputs are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffquant.calibration.memory import Columns, Key
from diffquant.calibration.recording import Trajectory
from diffquant.core.model import clock_of, device_of, state_of
from diffquant.core.watch import Enough, watching


@contextmanager
def rows_of(model: nn.Module, data: Trajectory, picked: Int[Tensor, " n"]) -> Iterator[None]:
    """While the block runs, calls of `model` are of the recorded samples `picked`: its clock knows the guided half of each."""
    state = state_of(model)
    if state is None or state.clock.conditional is None:
        yield
        return
    with state.clock.rows_are(data.half_of()[picked]):
        yield


def call_recorded(model: nn.Module, data: Trajectory, picked: Int[Tensor, " n"]) -> Any:
    """What `model` returns for the recorded samples `picked`."""
    with rows_of(model, data, picked):
        return model(**data.batch(picked, device_of(model))[0])


def never_called(model: nn.Module, names: Sequence[str], data: Trajectory) -> list[str]:
    """Which of the modules `names` of `model` no recorded call of the first trajectory reaches."""
    left, modules = dict.fromkeys(names), dict(model.named_modules())
    own = (data.trajectory_of() == 0).nonzero()[:, 0]
    calls = data.call_of()[own]
    with torch.no_grad(), watching({modules[name]: partial(_strike_out, left, name) for name in names}, before=True):
        for call in calls.unique():
            if left:
                call_recorded(model, data, own[calls == call])
    return list(left)


def _strike_out(left: dict[str, None], name: str, module: nn.Module, arguments: Any) -> None:
    left.pop(name, None)


@dataclass
class UnitInputs:
    """The recorded calls of one unit: arguments with a leading axis of samples, constants, the interval of each sample.

    ``counts``: what the errors of a sample's outputs are multiplied by where they are compared; None: 1.
    ``device``: where the unit computes; the tensors may be elsewhere, in files.
    """

    arguments: list[Any] = field(default_factory=list)
    keywords: dict[str, Any] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    intervals: Int[Tensor, " n"] | None = None
    counts: Float[Tensor, " n"] | None = None
    device: torch.device | None = None

    def rows(self, picked: Int[Tensor, " k"]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments of the picked samples."""

        def pick(value: Any) -> Any:
            return self.pick(value, picked) if isinstance(value, Tensor) and value.dim() > 0 else value

        return [pick(value) for value in self.arguments], {name: pick(value) for name, value in self.keywords.items()}

    def targets(self, picked: Int[Tensor, " k"]) -> list[Tensor]:
        """Outputs of the picked samples."""
        return [self.pick(tensor, picked) for tensor in self.outputs]

    def counted(self, values: list[Tensor], picked: Int[Tensor, " k"]) -> list[Tensor]:
        """Outputs of the picked samples, times what their errors count."""
        if self.counts is None:
            return values
        factors = self.counts[picked]
        return [value * factors.to(value.device).view(-1, *[1] * (value.dim() - 1)) for value in values]

    def pick(self, tensor: Tensor, picked: Int[Tensor, " k"]) -> Tensor:
        """The picked rows of one of its tensors, where the unit computes."""
        rows = tensor[picked]
        return rows if self.device is None else rows.to(self.device)


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors of a unit's output: itself, or the tensor members of a tuple."""
    members = output if isinstance(output, tuple) else (output,)
    return [member for member in members if isinstance(member, Tensor)]


def observe_unit(
    model: nn.Module,
    unit: nn.Module,
    data: Trajectory,
    indices: Int[Tensor, " n"],
    batch_size: int = 32,
    *,
    memory: float = math.inf,
    folder: Path | None = None,
    outputs: bool = True,
) -> UnitInputs:
    """Run `model` on the recorded samples `indices` as far as `unit`, and keep what goes in and, with `outputs`, comes out of it.

    The model runs as it is switched: quantizers on give the inputs of the quantized prefix, off those of full precision. What would
    take more than `memory` bytes is kept in files in `folder` (see `memory.mapped`).
    """
    return _observed(model, [unit], data, indices, batch_size, memory, folder, True, outputs)[0]


def observe_outputs(
    model: nn.Module,
    modules: Sequence[nn.Module],
    data: Trajectory,
    indices: Int[Tensor, " n"],
    batch_size: int = 32,
    *,
    memory: float = math.inf,
    folder: Path | None = None,
) -> list[UnitInputs]:
    """As `observe_unit`, but what comes out of each of `modules`, given in the order the model runs them, and nothing else.

    `memory` bytes are for each of them.
    """
    return _observed(model, modules, data, indices, batch_size, memory, folder, False, True)


def _observed(
    model: nn.Module,
    modules: Sequence[nn.Module],
    data: Trajectory,
    indices: Int[Tensor, " n"],
    batch_size: int,
    memory: float,
    folder: Path | None,
    inputs: bool,
    outputs: bool,
) -> list[UnitInputs]:
    """The first call of each of `modules` in every call of the model, which ends with that of the last."""
    columns = {module: Columns(len(indices), memory, folder) for module in modules}
    seen: set[nn.Module] = set()  # in the present call of the model

    def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        batch: dict[Key, Any] = {}
        if inputs:
            batch |= {("argument", i): value for i, value in enumerate(arguments)}
            batch |= {("keyword", name): value for name, value in keywords.items()}
        if outputs:
            batch |= {("output", i): value for i, value in enumerate(output_tensors(output))}
        if module not in seen:
            seen.add(module)
            columns[module].add(len(picked), batch)
        if module is modules[-1]:
            raise Enough

    intervals = []
    with torch.no_grad(), watching(dict.fromkeys(modules, keep), keywords=True):
        for picked in indices.split(batch_size):
            seen.clear()
            with suppress(Enough):
                call_recorded(model, data, picked)
            intervals.append(torch.as_tensor(clock_of(model).interval).expand(len(picked)).clone())
    return [
        UnitInputs(
            arguments=list(found.of("argument").values()),
            keywords={str(name): value for name, value in found.of("keyword").items()},
            outputs=list(found.of("output").values()),
            intervals=torch.cat(intervals),
            device=device_of(model),
        )
        for found in columns.values()
    ]

"""Recorded calls made again: of the whole model, or as far as its units, whose inputs and outputs are stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffquant.calibration.memory import Columns, Key
from diffquant.calibration.recording import Trajectory
from diffquant.core.model import clock_of, device_of, state_of
from diffquant.core.watch import Enough, watching
from diffquant.errors import CalibrationError
from diffquant.host.guidance import guidance_weight, leading_channels


@contextmanager
def rows_of(model: nn.Module, data: Trajectory, picked: Int[Tensor, " n"]) -> Iterator[None]:
    """While the block runs, calls of `model` are of the recorded samples `picked`: its clock knows the guided half of each."""
    state = state_of(model)
    if state is None or state.clock.conditional is None:
        yield
        return
    with state.clock.rows_are(data.half_of[picked]):
        yield


def conditional_half(data: Trajectory) -> int:
    """Which half of the recorded guided calls is the conditional one, 0 or 1.

    Guidance with a scale of 1 or more weights the conditional half positively, the other with zero or negatively. Raises
    `CalibrationError` where the recording was not guided by calls with a doubled batch.
    """
    where = f"guidance_sets: {data.manifest['pipeline']}"
    half, call = data.half_of, data.call_of
    if int(half.max()) != 1 or int(call.max()) + 1 != data.step_count:
        raise CalibrationError(
            f"{where}: {int(call.max()) + 1} calls of the denoiser with up to {int(half.max().clamp(min=0)) + 1} rows a sample for "
            f"{data.step_count} steps; a doubled batch a step is needed: record with a guidance scale above 1, or leave it out"
        )
    first_batch = data.trajectory_of < data.manifest["calibration"]["batch_size"]
    first_call = int(call[half == 0].min())
    rows = [(first_batch & (call == first_call) & (half == which)).nonzero()[:, 0] for which in (0, 1)]
    step = data.step(data.trajectory_of[rows[0]], first_call)
    first, second = (leading_channels(data.batch(each)[1], step.model_output) for each in rows)
    weight, _ = guidance_weight(first, second, step.model_output)
    return int(weight > 0.5)


def call_recorded(model: nn.Module, data: Trajectory, picked: Int[Tensor, " n"]) -> Any:
    """What `model` returns for the recorded samples `picked`."""
    with rows_of(model, data, picked):
        return model(**data.batch(picked, device_of(model))[0])


def never_called(model: nn.Module, names: Sequence[str], data: Trajectory) -> list[str]:
    """Which of the modules `names` of `model` no recorded call of the first trajectory reaches."""
    modules = dict(model.named_modules())
    left = {modules[name]: name for name in names}

    def strike_out(module: nn.Module, arguments: Any) -> None:
        left.pop(module, None)

    first = (data.trajectory_of == 0).nonzero()[:, 0]
    calls = data.call_of[first]
    with torch.no_grad(), watching(dict.fromkeys(left, strike_out), before=True):
        for call in calls.unique():
            if left:
                call_recorded(model, data, first[calls == call])
    return list(left.values())


@dataclass
class UnitInputs:
    """Recorded calls of one unit: arguments and target outputs with a leading axis of samples, and the samples' intervals.

    ``counts``: weight of the errors of each sample's outputs; None: 1. ``device``: where the unit computes; tensors may be
    elsewhere, in files.
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

    def weighted(self, values: Sequence[Tensor], picked: Int[Tensor, " k"]) -> list[Tensor]:
        """Outputs or targets of the picked samples, times the weight of their errors."""
        if self.counts is None:
            return list(values)
        weights = self.counts[picked]
        return [value * weights.to(value.device).view(-1, *[1] * (value.dim() - 1)) for value in values]

    def pick(self, tensor: Tensor, picked: Int[Tensor, " k"]) -> Tensor:
        """The picked rows of one of its tensors, where the unit computes."""
        rows = tensor[picked]
        return rows if self.device is None else rows.to(self.device)


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors of a unit's output: itself, or the tensor members of a tuple."""
    members = output if isinstance(output, tuple) else (output,)
    return [member for member in members if isinstance(member, Tensor)]


def observe(
    model: nn.Module,
    modules: Sequence[nn.Module],
    data: Trajectory,
    indices: Int[Tensor, " n"],
    batch_size: int = 32,
    *,
    memory: float = math.inf,
    folder: Path | None = None,
    inputs: bool = True,
    outputs: bool = True,
) -> list[UnitInputs]:
    """Run `model` on the recorded samples `indices`; store `inputs` and `outputs` of each of `modules`, listed in running order.

    The model runs as it is switched: with quantizers on, inputs come through the quantized layers before the module. Only a
    module's first call in every call of the model counts. Tensors of a module beyond `memory` bytes are stored in files in `folder`
    (`memory.mapped`).
    """
    columns = {module: Columns(len(indices), memory, folder) for module in modules}
    reached: set[nn.Module] = set()  # in the present call of the model

    def store(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        batch: dict[Key, Any] = {}
        if inputs:
            batch |= {("argument", i): value for i, value in enumerate(arguments)}
            batch |= {("keyword", name): value for name, value in keywords.items()}
        if outputs:
            batch |= {("output", i): value for i, value in enumerate(output_tensors(output))}
        if module not in reached:
            reached.add(module)
            columns[module].add(len(picked), batch)
        if module is modules[-1]:
            raise Enough

    intervals = []
    with torch.no_grad(), watching(dict.fromkeys(modules, store), keywords=True):
        for picked in indices.split(batch_size):
            reached.clear()
            with suppress(Enough):
                call_recorded(model, data, picked)
            intervals.append(torch.as_tensor(clock_of(model).interval).expand(len(picked)).clone())
    return [
        UnitInputs(
            arguments=list(stored.of("argument").values()),
            keywords={str(name): value for name, value in stored.of("keyword").items()},
            outputs=list(stored.of("output").values()),
            intervals=torch.cat(intervals),
            device=device_of(model),
        )
        for stored in columns.values()
    ]

"""The calls and steps of one batch of trajectories on their way to a file, in the format of `Trajectory`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffquant.calibration.arguments import flatten, is_json
from diffquant.calibration.memory import GIB
from diffquant.errors import CalibrationError
from diffquant.files import content_name, renamed_when_done, with_digest
from diffquant.host.conditions import Calibration
from diffquant.host.denoiser import timestep_argument


def free_bytes(place: Path) -> int:
    """Bytes that are free where `place` is, or will be made."""
    place = place.resolve()
    return shutil.disk_usage(next(above for above in (place, *place.parents) if above.exists())).free


@dataclass
class BudgetCheck:
    """Refuses a recording that would not fit: estimated at its second step, exact (for its batch) at the end of the batch."""

    calibration: Calibration
    rows: int
    folder: Path  # where the recording goes
    first: int = 0  # bytes after the first step, with all that is stored once

    def after_step(self, steps: int, size: int) -> None:
        """The batch has `size` bytes after `steps` steps."""
        if steps == 1:
            self.first = size
        elif steps == 2:
            self.require(self.first + (size - self.first) * (self.calibration.steps - 1))

    def require(self, batch_size: int) -> None:
        """Raise `CalibrationError` where batches of `batch_size` bytes are too many for the budget."""
        needed = batch_size * self.calibration.samples / self.rows / GIB
        if needed > self.calibration.budget_gib:
            raise CalibrationError(
                f"calibration.budget_gib: {self.calibration.samples} trajectories of {self.calibration.steps} steps need about "
                f"{needed:.3g} GiB; the budget is {self.calibration.budget_gib:g} GiB; record fewer samples or steps, or raise it"
            )
        free = free_bytes(self.folder) / GIB
        if needed > free:
            raise CalibrationError(
                f"{self.folder}: a recording of {self.calibration.samples} trajectories needs about {needed:.3g} GiB; "
                f"{free:.3g} GiB are free; free some space, record fewer, or record elsewhere"
            )


class Shapes(NamedTuple):
    """A call of the denoiser for another number of samples: its rows, and the shape of each tensor argument.

    A tensor whose axis is as long as the call has rows in both calls has its samples there. By one call alone, a list of layers or
    a table of positions that happens to be as long as the batch would be taken for samples.
    """

    rows: int
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, int | None]  # of each tensor, once a call of other rows has shown it

    @classmethod
    def of(cls, denoiser: nn.Module, arguments: Mapping[str, Any], output: Tensor) -> Shapes:
        """Those of a call that was observed."""
        where = f"call 0 of batch 0 of {type(denoiser).__name__}"
        flat = flatten({name: value for name, value in arguments.items() if name != "return_dict"}, where)
        shapes = {name: tuple(value.shape) for name, value in flat.items() if isinstance(value, Tensor)}
        return cls(len(output), shapes, {})

    def axis_of_samples(self, name: str, value: Tensor, rows: int) -> int | None:
        """The axis of `value` that has a place for each of the call's `rows`, None where none has."""
        other, by_length = self.shapes.get(name), 0 if value.ndim and len(value) == rows else None
        if other is None or len(other) != value.ndim:
            return by_length
        if rows == self.rows:
            return self.axes.get(name, by_length)
        following = [axis for axis, size in enumerate(value.shape) if size == rows and other[axis] == self.rows]
        self.axes[name] = following[0] if following else None
        return self.axes[name]


class RecordedBatch:
    """The calls and steps of one batch on their way to a file."""

    def __init__(self, denoiser: nn.Module, rows: int, number: int, budget: BudgetCheck | None, shapes: Shapes) -> None:
        self.denoiser_name, self.timestep_name = type(denoiser).__name__, timestep_argument(denoiser)[0]
        self.rows, self.number, self.budget, self.shapes = rows, number, budget, shapes
        self.tensors: dict[str, Tensor] = {}
        self.calls: list[dict[str, Any]] = []
        self.steps: list[dict[str, str]] = []
        self.step_options: list[dict[str, Any]] = []
        self.timetable: dict[str, Any] = {}

    def add_call(self, arguments: dict[str, Any], output: Tensor) -> None:
        """Arguments and output of a denoiser call. Raises `CalibrationError` where they cannot be stored, or are not finite."""
        where = f"call {len(self.calls)} of batch {self.number} of {self.denoiser_name}"
        rows = len(output)
        if rows % self.rows:
            raise CalibrationError(f"{where}: has {rows} rows for {self.rows} trajectories; a multiple is allowed")
        if self.timestep_name not in arguments:
            raise CalibrationError(f"{where}: was made without {self.timestep_name}; such a model cannot be calibrated by timestep")
        arguments = flatten({name: value for name, value in arguments.items() if name != "return_dict"}, where)
        timestep = torch.as_tensor(arguments[self.timestep_name])
        if timestep.numel() not in (1, rows):
            shape = tuple(timestep.shape)
            raise CalibrationError(f"{where}: {self.timestep_name} has shape {shape}; one number, or one per row, is allowed")
        by_row = self._by_row(arguments, rows, where)
        arguments[self.timestep_name] = timestep = timestep.reshape(-1).expand(rows)
        timesteps = timestep.double().tolist()
        self._require_finite(output, f"{where} (timestep {timesteps[0]:g})", "output")

        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        self.calls.append(
            {
                "rows": rows,
                "timesteps": timesteps if len(set(timesteps)) > 1 else timesteps[:1],
                "tensors": {name: self._store(value) for name, value in tensors.items()},
                "by_row": [name for name in tensors if name in by_row or name == self.timestep_name],
                "constants": {name: value for name, value in arguments.items() if name not in tensors},
                "output": self._store(output),
            }
        )

    def add_step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, prev_sample: Tensor, options: Mapping[str, Any]
    ) -> None:
        """Arguments and result of a step of the scheduler. Raises `CalibrationError` where the result is not finite."""
        self._require_finite(prev_sample, f"step {len(self.steps)} of batch {self.number}", "prev_sample")
        step = {
            "model_output": model_output,
            "timestep": torch.as_tensor(timestep),
            "sample": sample,
            "prev_sample": prev_sample,
        }
        self.steps.append({name: self._store(value) for name, value in step.items()})
        self.step_options.append({name: value for name, value in options.items() if name != "return_dict" and is_json(value)})
        if self.budget:
            self.budget.after_step(len(self.steps), self._size())

    def add_timetable(self, arguments: Mapping[str, Any]) -> None:
        """Arguments of `set_timesteps` before the first step; arrays as lists, without the device."""
        if not self.steps:
            plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in arguments.items()}
            self.timetable = {name: value for name, value in plain.items() if name != "device" and is_json(value)}

    def check(self, pipeline: str) -> None:
        """Refuse a batch that recorded nothing, or whose recording would not fit as a whole."""
        for what, records in (("denoiser was called", self.calls), ("scheduler made a step", self.steps)):
            if not records:
                raise CalibrationError(
                    f"{pipeline}: no {what} while it ran; pass `run`, a function that samples with its own denoiser and scheduler"
                )
        if self.budget:
            self.budget.require(self._size())

    def write(self, path: Path, recording: str) -> None:
        """All of it, as a part of `recording` (`identity`), under a temporary name first."""
        layout = {"of": {"recording": recording, "batch": self.number}} | {
            "calls": self.calls,
            "steps": self.steps,
            "step_options": self.step_options,
            "timetable": self.timetable,
        }
        with renamed_when_done(path) as partial:
            save_file(self.tensors, partial, metadata={"layout": json.dumps(with_digest(layout))})

    def _store(self, tensor: Tensor) -> str:
        """Store a copy of the tensor unless an equal one is there already; return its name."""
        tensor = tensor.detach().cpu().contiguous()
        name = content_name(tensor)
        if name not in self.tensors:
            self.tensors[name] = tensor.clone()
        return name

    def _size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _by_row(self, arguments: Mapping[str, Any], rows: int, where: str) -> set[str]:
        """The names of the tensors that have a row for each row of the call; the others belong to the call as a whole."""
        names = set()
        for name, value in arguments.items():
            if not isinstance(value, Tensor) or name == self.timestep_name:  # which is one, or one for each row
                continue
            axis = self.shapes.axis_of_samples(name, value, rows)
            if axis:
                raise CalibrationError(
                    f"{where}: argument {name} of shape {tuple(value.shape)} has its samples on axis {axis}; on axis 0 they can be "
                    "recorded"
                )
            if axis == 0:
                names.add(name)
        return names

    @staticmethod
    def _require_finite(tensor: Tensor, where: str, what: str) -> None:
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CalibrationError(
                f"{where}: {bad} of {tensor.numel()} values of the {what} are not finite; check the weights, or use a wider dtype"
            )

"""Recorded trajectories of a pipeline: arguments and outputs of its full-precision denoiser, and the steps of its scheduler.

A recording is a folder with a manifest (`calibration.manifest`) and one safetensors file per batch. A file holds every distinct
tensor once, named by a hash of its content: an unguided pipeline's `prev_sample` is also the next call's `sample`, and a prompt's
embedding is the same in all calls. The file's metadata say which tensor is which.

A row of a denoiser call is one sample of the recording, numbered over batches, then calls, then rows. A guided pipeline calls
with a doubled batch, so two of its rows may belong to one trajectory.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffquant.calibration.arguments import unflatten
from diffquant.calibration.manifest import batch_path, identity, model_hash, read_manifest
from diffquant.errors import CalibrationError
from diffquant.files import content_name, has_its_digest
from diffquant.host.pipeline import check_step_cache


@dataclasses.dataclass(frozen=True)
class RecordedStep:
    """One `scheduler.step` of n trajectories; `options` are the other plain values that it was called with, such as ``eta``."""

    model_output: Float[Tensor, "n *output"]
    timestep: Tensor
    sample: Float[Tensor, "n *shape"]
    prev_sample: Float[Tensor, "n *shape"]
    options: dict[str, Any]

    def to(self, device: torch.device) -> RecordedStep:
        """The same step with its tensors on `device` (the timestep stays where schedulers look it up)."""
        moved = {name: getattr(self, name).to(device) for name in ("model_output", "sample", "prev_sample")}
        return dataclasses.replace(self, **moved)


class Trajectory:
    """A recording, opened for reading by `record` or `Trajectory.open`; tensors are read from memory-mapped files on demand.

    For every sample, ``[n]`` each: ``timestep_of`` (float64, an entry of ``timesteps``), ``trajectory_of`` (0 to samples - 1),
    ``call_of`` (number of the denoiser call within its batch, 0 is the noisiest) and ``half_of`` (0 or 1 in a guided call, -1 in a
    call with one row a trajectory).
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        calibration = manifest["calibration"]
        self.batches = math.ceil(calibration["samples"] / calibration["batch_size"])
        self._files, self._layouts = [], []
        self._intact: set[tuple[int, str]] = set()  # tensors that were read and are what their names say
        for b in range(self.batches):
            file, layout = _open_batch(batch_path(folder, b))
            if layout.get("of", own := {"recording": identity(manifest), "batch": b}) != own:
                raise CalibrationError(f"{batch_path(folder, b)}: is another batch, or of another recording; record again")
            self._files.append(file)
            self._layouts.append(layout)
        places = [(b, c, call) for b, layout in enumerate(self._layouts) for c, call in enumerate(layout["calls"])]
        rows = torch.tensor([call["rows"] for _, _, call in places])
        self._batch = torch.tensor([b for b, _, _ in places]).repeat_interleave(rows)
        self.call_of = torch.tensor([c for _, c, _ in places]).repeat_interleave(rows)
        self._row = torch.cat([torch.arange(n) for n in rows.tolist()])
        timesteps = [torch.tensor(call["timesteps"], dtype=torch.float64).expand(call["rows"]) for _, _, call in places]
        self.timestep_of = torch.cat(timesteps)
        self.timesteps: list[float] = sorted(set(self.timestep_of.tolist()), reverse=True)
        first = self._batch * calibration["batch_size"]
        sizes = (calibration["samples"] - first).clamp(max=calibration["batch_size"])  # the last batch may be smaller
        self.trajectory_of = first + self._row % sizes
        self.half_of = torch.where(rows.repeat_interleave(rows) > sizes, self._row // sizes, -1)

    @classmethod
    def open(cls, folder: Path | str) -> Trajectory:
        """Open a complete recording.

        Raises CalibrationError if there is none, or if it is unfinished, damaged or of another format version.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            raise CalibrationError(f"{folder}: the recording is not complete; record again with the same settings to finish it")
        return cls(folder, manifest)

    def __len__(self) -> int:
        """The number of rows of all recorded denoiser calls."""
        return len(self._row)

    def verify(self, model: nn.Module) -> None:
        """Raise CalibrationError unless `model` has the weights that were recorded, and no step cache on."""
        check_step_cache(model)
        own = model_hash(model)
        if own != self.manifest["model_hash"]:
            raise CalibrationError(
                f"{self.folder}: calibration data of another model: {self.manifest['denoiser']['class']} "
                f"{self.manifest['model_hash'][:12]}, not {type(model).__name__} {own[:12]}; record this model"
            )

    def subset(self, count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
        """Draw `count` distinct samples, spread evenly over timesteps, in random order.

        Every timestep gives count // len(timesteps); which of them give one more is random. One that has fewer gives all.

        Raises CalibrationError if fewer than `count` were recorded.
        """
        if not 1 <= count <= len(self):
            raise CalibrationError(f"subset: {count} samples asked; 1 to {len(self)} are recorded in {self.folder}")
        shuffled = torch.randperm(len(self), generator=generator)
        shuffled = shuffled[self.timestep_of[shuffled].argsort(stable=True)]  # grouped by timestep, random within
        sizes = Counter(self.timestep_of[shuffled].tolist())  # in the same order
        rank = torch.cat([torch.arange(n) for n in sizes.values()])  # within its timestep
        tie = torch.rand(len(self), generator=generator, dtype=torch.float64)
        chosen = shuffled[(rank + tie).argsort()[:count]]
        return chosen[torch.randperm(count, generator=generator)]

    def batch(self, indices: Int[Tensor, " n"], device: torch.device | None = None) -> tuple[dict[str, Any], Tensor]:
        """Gather samples, in order, as the arguments of one denoiser call and the recorded output [n ...], on `device`.

        Tensors that have one row per sample are gathered by row, the timestep [n] always; other arguments must be equal in
        all the calls that the samples come from.

        Raises CalibrationError for an index out of range, or if the calls cannot be put together.
        """
        if len(indices) == 0 or int(indices.min()) < 0 or int(indices.max()) >= len(self):
            raise CalibrationError(f"batch: indices must be between 0 and {len(self) - 1}, and at least one")
        places = torch.stack([self._batch[indices], self.call_of[indices], self._row[indices]], dim=1).tolist()
        calls = [(b, row, self._layouts[b]["calls"][c]) for b, c, row in places]
        first_batch, _, first = calls[0]
        names = [*first["tensors"], *first["constants"]]
        differing = {name for _, _, call in calls for name in {*call["tensors"], *call["constants"]} ^ set(names)}
        if differing:
            raise CalibrationError(f"batch: only some of the samples' calls have {', '.join(sorted(differing))}; take fewer")

        arguments: dict[str, Any] = {}
        for name in names:
            if name == self.manifest["denoiser"]["timestep"] or all(name in call["by_row"] for _, _, call in calls):
                arguments[name] = self._rows([(b, call["tensors"][name], row) for b, row, call in calls])
                continue
            # tensors are named by their content: equal names are equal tensors
            values = [call["tensors"].get(name, call["constants"].get(name)) for _, _, call in calls]
            if any(value != values[0] or type(value) is not type(values[0]) for value in values):
                raise CalibrationError(f"batch: {name} differs between the samples' calls and has no row per sample; take fewer")
            arguments[name] = self._tensor(first_batch, values[0]).clone() if name in first["tensors"] else copy.deepcopy(values[0])
        output = self._rows([(b, call["output"], row) for b, row, call in calls])
        arguments = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
        return unflatten(arguments), output.to(device)

    @property
    def step_count(self) -> int:
        """Number of scheduler steps of a trajectory."""
        return len(self._layouts[0]["steps"])

    @functools.cached_property
    def step_timesteps(self) -> list[float]:
        """The timestep of every scheduler step, noisy first; a solver may take one twice."""
        first = torch.zeros(1, dtype=torch.long)
        return [float(self.step(first, k).timestep) for k in range(self.step_count)]

    @property
    def timetable(self) -> dict[str, Any]:
        """Plain arguments of the scheduler's `set_timesteps`, without the device."""
        return dict(self._layouts[0]["timetable"]) or {"num_inference_steps": self.manifest["calibration"]["steps"]}

    def step(self, trajectories: Int[Tensor, " n"], number: int) -> RecordedStep:
        """Scheduler step `number` (0 is the noisiest) of the trajectories, in order.

        Raises CalibrationError for numbers out of range, or if the trajectories' batches were sampled at different timesteps.
        """
        calibration = self.manifest["calibration"]
        inside = len(trajectories) and int(trajectories.min()) >= 0 and int(trajectories.max()) < calibration["samples"]
        if not inside or not 0 <= number < self.step_count:
            raise CalibrationError(f"step: {self.step_count} steps of {calibration['samples']} trajectories are in {self.folder}")
        size = calibration["batch_size"]
        places = [(j // size, j % size) for j in trajectories.tolist()]
        batches = sorted({b for b, _ in places})
        names = {b: self._layouts[b]["steps"][number] for b in batches}
        options = self._layouts[batches[0]]["step_options"][number]
        timestep = self._tensor(batches[0], names[batches[0]]["timestep"])
        if any(not torch.equal(self._tensor(b, names[b]["timestep"]), timestep) for b in batches):
            raise CalibrationError(f"step: step {number} was taken at several timesteps in {self.folder}; record one timetable")
        rows = {
            name: self._rows([(b, names[b][name], row) for b, row in places]) for name in ("model_output", "sample", "prev_sample")
        }
        return RecordedStep(timestep=timestep, options=options, **rows)

    def _tensor(self, batch: int, key: str) -> Tensor:
        try:
            tensor: Tensor = self._files[batch].get_tensor(key)
        except SafetensorError as error:
            raise CalibrationError(f"{batch_path(self.folder, batch)}: damaged ({error}); delete it and record again") from error
        if (batch, key) not in self._intact:
            if content_name(tensor) != key:
                raise CalibrationError(
                    f"{batch_path(self.folder, batch)}: damaged: tensor {key} is not what was recorded; delete it and record again"
                )
            self._intact.add((batch, key))
        return tensor

    def _rows(self, places: list[tuple[int, str, int]]) -> Tensor:
        """Gather rows (file, tensor, row); a tensor is mapped once however many of its rows are asked for."""
        mapped = {(b, key): self._tensor(b, key) for b, key in {(b, key) for b, key, _ in places}}
        rows = [mapped[b, key][row] for b, key, row in places]
        if any(row.shape != rows[0].shape for row in rows):
            raise CalibrationError(f"batch: rows of shapes {sorted({tuple(row.shape) for row in rows})} cannot be put in one batch")
        return torch.stack(rows)


def _open_batch(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        file: Any = safe_open(path, framework="pt")
        metadata = file.metadata() or {}
        layout = json.loads(metadata["layout"])
        if not has_its_digest(layout):
            raise ValueError("its layout is not the one that was written")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CalibrationError(
            f"{path}: missing, truncated or damaged ({type(error).__name__}: {error}); delete it and record again"
        ) from error
    return file, layout

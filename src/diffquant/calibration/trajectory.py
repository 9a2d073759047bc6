"""Recorded trajectories of a pipeline: what its full-precision denoiser was given and answered, and what the scheduler did.

A recording is a folder: `manifest.json` (of which model, how, with which versions) and one safetensors file per batch. A file
holds every distinct tensor once, named by a hash of its content: an unguided pipeline's `prev_sample` is also the next call's
`sample`, and a prompt's embedding is the same in all calls. The file's metadata say which tensor is which.

A row of a denoiser call is one sample of the recording, numbered over batches, then calls, then rows. A guided pipeline calls
with a doubled batch, so two of its rows may belong to one trajectory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffquant.calibration.observe import (
    Calibration,
    Pipeline,
    evaluation_mode,
    find_denoiser,
    observe,
    run_pipeline,
    timestep_name,
)
from diffquant.core.spec import CalibrationError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
PARTIAL = ".partial"  # suffix of a file that is being written
GIB = 2**30

Run: TypeAlias = Callable[[Pipeline, torch.Generator, int], Any]


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


def model_hash(model: nn.Module) -> str:
    """SHA-256 of names, shapes, dtypes and values of the floating-point parameters.

    Buffers do not count, so attaching or fitting quantizers does not change it; nor does the device.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_floating_point():
            digest.update(f"{name} ".encode())
            _update(digest, parameter.detach().cpu())
    return digest.hexdigest()


def record(
    pipe: Pipeline,
    calibration: Calibration = Calibration(),  # noqa: B008 (frozen)
    *,
    folder: Path | str | None = None,
    run: Run | None = None,
    progress: bool = True,
) -> Trajectory:
    """Run the pipeline and keep every denoiser call and scheduler step on disk.

    Batch b of a seed is the same whether recorded in one go or after being killed: it has its own generator, and finished
    batches in `folder` are kept. Without a folder the recording lives in a temporary one, as long as the returned object.
    `run(pipe, generator, batch)` replaces the call of the pipeline for `batch` trajectories; the generator is on the CPU.

    Raises CalibrationError if the folder holds another recording, if the estimate exceeds `calibration.budget_gib` (nothing is
    written then), if an output is not finite, or if a file cannot be written.
    """
    temporary = folder is None
    folder = Path(tempfile.mkdtemp(prefix="diffquant-")) if folder is None else Path(folder)
    try:
        _record(pipe, calibration, folder, run, progress)
        trajectory = Trajectory.open(folder)
    except BaseException:
        if temporary:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if temporary:
        weakref.finalize(trajectory, shutil.rmtree, folder, ignore_errors=True)
    return trajectory


def _record(pipe: Pipeline, calibration: Calibration, folder: Path, run: Run | None, progress: bool) -> None:
    manifest = _describe(pipe, calibration, run)
    _prepare(folder, manifest)
    count = math.ceil(calibration.samples / calibration.batch_size)
    missing = [b for b in range(count) if not _batch_path(folder, b).exists()]
    if not missing and _read_manifest(folder)["complete"]:
        return

    columns = TextColumn("recording"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), disable=not progress)
    with bar, evaluation_mode(pipe), _quiet(pipe):
        task = bar.add_task("", total=count, completed=count - len(missing))
        for b in missing:
            rows = _rows_of_batch(calibration, b)
            batch = _Batch(find_denoiser(pipe)[1], rows, b, _BudgetCheck(calibration, rows) if b == missing[0] else None)
            generator = torch.Generator().manual_seed(_seed(calibration.seed, b))
            with observe(pipe, on_call=batch.add_call, on_step=batch.add_step), _global_seed(generator.initial_seed()):
                if run is None:
                    run_pipeline(pipe, calibration, generator, range(b * calibration.batch_size, b * calibration.batch_size + rows))
                else:
                    run(pipe, generator, rows)
            batch.check(type(pipe).__name__)
            if not (folder / MANIFEST).exists():  # a refused recording leaves nothing behind
                folder.mkdir(parents=True, exist_ok=True)
                _write_manifest(folder, manifest)
            batch.write(_batch_path(folder, b))
            bar.advance(task)
    timesteps = Trajectory(folder, manifest).timesteps
    _write_manifest(folder, manifest | {"complete": True, "timesteps": timesteps})


def _describe(pipe: Pipeline, calibration: Calibration, run: Run | None) -> dict[str, Any]:
    """The manifest of a recording that is about to be made."""
    name, denoiser = find_denoiser(pipe)
    if getattr(pipe, "scheduler", None) is None:
        raise CalibrationError(f"{type(pipe).__name__}: has no scheduler; only pipelines that hold one can be recorded")
    config = json.loads(pipe.scheduler.to_json_string())
    config.pop("_diffusers_version", None)
    try:
        own_version = metadata.version("diffquant")
    except metadata.PackageNotFoundError:  # run from a source tree
        own_version = "not installed"
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "complete": False,
        "model_hash": model_hash(denoiser),
        "pipeline": type(pipe).__name__,
        "denoiser": {"component": name, "class": type(denoiser).__name__, "timestep": timestep_name(denoiser)},
        "scheduler": {"class": type(pipe.scheduler).__name__, "config": config},
        "calibration": dataclasses.asdict(calibration),
        "run": "pipeline" if run is None else getattr(run, "__qualname__", type(run).__name__),
        "versions": {"torch": torch.__version__, "diffusers": metadata.version("diffusers"), "diffquant": own_version},
        "timesteps": [],
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(manifest))  # tuples become lists
    return as_read_back


def _prepare(folder: Path, manifest: dict[str, Any]) -> None:
    """Make the folder ready to be written, or refuse it because it holds something else."""
    for partial in folder.glob(f"*{PARTIAL}"):  # of a recording that was killed
        partial.unlink()
    if not (folder / MANIFEST).exists():
        if any(folder.glob("batch-*.safetensors")):
            raise CalibrationError(f"{folder}: has batches but no {MANIFEST}; record into another folder, or delete them")
        return
    found = _read_manifest(folder)
    ignored = {"complete", "timesteps", "calibration.budget_gib"} | ({"versions"} if found["complete"] else set())
    field = _first_difference(found, manifest, ignored)
    if field is not None:
        name, old, new = field
        raise CalibrationError(
            f"{folder}: holds a recording whose {name} is {old}, not {new}; record into another folder, or delete this one"
        )


def _first_difference(found: Any, wanted: Any, ignored: set[str], name: str = "") -> tuple[str, Any, Any] | None:
    """The dotted name and both values of the first field that differs."""
    if name in ignored or found == wanted:
        return None
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return name, found, wanted
    for key in sorted(found.keys() | wanted.keys()):
        difference = _first_difference(found.get(key), wanted.get(key), ignored, f"{name}.{key}" if name else key)
        if difference:
            return difference
    return None


@dataclasses.dataclass
class _BudgetCheck:
    """Refuses a recording that would not fit: estimated at its second step, exact (for its batch) at the end of the batch."""

    calibration: Calibration
    rows: int
    first: int = 0  # bytes after the first step, with all that is stored once

    def after_step(self, steps: int, size: int) -> None:
        if steps == 1:
            self.first = size
        elif steps == 2:
            self.require(self.first + (size - self.first) * (self.calibration.steps - 1))

    def require(self, batch_size: int) -> None:
        needed = batch_size * self.calibration.samples / self.rows / GIB
        if needed > self.calibration.budget_gib:
            raise CalibrationError(
                f"calibration.budget_gib: {self.calibration.samples} trajectories of {self.calibration.steps} steps need about "
                f"{needed:.3g} GiB; the budget is {self.calibration.budget_gib:g} GiB; record fewer samples or steps, or raise it"
            )


class _Batch:
    """The calls and steps of one batch on their way to a file."""

    def __init__(self, denoiser: nn.Module, rows: int, number: int, budget: _BudgetCheck | None) -> None:
        self.denoiser_name, self.timestep_name = type(denoiser).__name__, timestep_name(denoiser)
        self.rows, self.number, self.budget = rows, number, budget
        self.tensors: dict[str, Tensor] = {}
        self.calls: list[dict[str, Any]] = []
        self.steps: list[dict[str, str]] = []
        self.step_options: list[dict[str, Any]] = []

    def add_call(self, arguments: dict[str, Any], output: Tensor) -> None:
        where = f"call {len(self.calls)} of batch {self.number} of {self.denoiser_name}"
        rows = len(output)
        if rows % self.rows:
            raise CalibrationError(f"{where}: has {rows} rows for {self.rows} trajectories; a multiple is allowed")
        if self.timestep_name not in arguments:
            raise CalibrationError(f"{where}: was made without {self.timestep_name}; such a model cannot be calibrated by timestep")
        arguments = _flatten({name: value for name, value in arguments.items() if name != "return_dict"}, where)
        timestep = torch.as_tensor(arguments[self.timestep_name])
        if timestep.numel() not in (1, rows):
            shape = tuple(timestep.shape)
            raise CalibrationError(f"{where}: {self.timestep_name} has shape {shape}; one number, or one per row, is allowed")
        arguments[self.timestep_name] = timestep = timestep.reshape(-1).expand(rows)
        timesteps = timestep.double().tolist()
        self._require_finite(output, f"{where} (timestep {timesteps[0]:g})", "output")

        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        self.calls.append(
            {
                "rows": rows,
                "timesteps": timesteps if len(set(timesteps)) > 1 else timesteps[:1],
                "tensors": {name: self._keep(value) for name, value in tensors.items()},
                "by_row": [name for name, value in tensors.items() if value.ndim and len(value) == rows],
                "constants": {name: value for name, value in arguments.items() if name not in tensors},
                "output": self._keep(output),
            }
        )

    def add_step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, prev_sample: Tensor, options: Mapping[str, Any]
    ) -> None:
        self._require_finite(prev_sample, f"step {len(self.steps)} of batch {self.number}", "prev_sample")
        step = {
            "model_output": model_output,
            "timestep": torch.as_tensor(timestep),
            "sample": sample,
            "prev_sample": prev_sample,
        }
        self.steps.append({name: self._keep(value) for name, value in step.items()})
        self.step_options.append({name: value for name, value in options.items() if name != "return_dict" and _is_json(value)})
        if self.budget:
            self.budget.after_step(len(self.steps), self._size())

    def check(self, pipeline: str) -> None:
        """Refuse a batch that recorded nothing, or whose recording would not fit as a whole."""
        for what, seen in (("denoiser was called", self.calls), ("scheduler made a step", self.steps)):
            if not seen:
                raise CalibrationError(
                    f"{pipeline}: no {what} while it ran; pass `run`, a function that samples with its own denoiser and scheduler"
                )
        if self.budget:
            self.budget.require(self._size())

    def write(self, path: Path) -> None:
        layout = json.dumps({"calls": self.calls, "steps": self.steps, "step_options": self.step_options})
        with _renamed_when_done(path) as partial:
            save_file(self.tensors, partial, metadata={"layout": layout})

    def _keep(self, tensor: Tensor) -> str:
        """Store a copy of the tensor unless an equal one is there already; return its name."""
        tensor = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256()
        _update(digest, tensor)
        name = digest.hexdigest()[:24]
        if name not in self.tensors:
            self.tensors[name] = tensor.clone()
        return name

    def _size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @staticmethod
    def _require_finite(tensor: Tensor, where: str, what: str) -> None:
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CalibrationError(
                f"{where}: {bad} of {tensor.numel()} values of the {what} are not finite; check the weights, or use a wider dtype"
            )


class Trajectory:
    """A recording, opened for reading; tensors are read from memory-mapped files as they are asked for.

    Obtained from `record` or `Trajectory.open`.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        calibration = manifest["calibration"]
        self.batches = math.ceil(calibration["samples"] / calibration["batch_size"])
        self._files, self._layouts = [], []
        for b in range(self.batches):
            file, layout = _open_batch(_batch_path(folder, b))
            self._files.append(file)
            self._layouts.append(layout)
        places = [(b, c, call) for b, layout in enumerate(self._layouts) for c, call in enumerate(layout["calls"])]
        rows = torch.tensor([call["rows"] for _, _, call in places])
        self._batch = torch.tensor([b for b, _, _ in places]).repeat_interleave(rows)
        self._call = torch.tensor([c for _, c, _ in places]).repeat_interleave(rows)
        self._row = torch.cat([torch.arange(n) for n in rows.tolist()])
        timesteps = [torch.tensor(call["timesteps"], dtype=torch.float64).expand(call["rows"]) for _, _, call in places]
        self._timestep = torch.cat(timesteps)
        self.timesteps: list[float] = sorted(set(self._timestep.tolist()), reverse=True)
        self._rows_of_calls: list[int] = rows.tolist()

    @classmethod
    def open(cls, folder: Path | str) -> Trajectory:
        """Open a complete recording.

        Raises CalibrationError if there is none, or if it is unfinished, damaged or of another format version.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        if not manifest["complete"]:
            raise CalibrationError(f"{folder}: the recording is not complete; record again with the same settings to finish it")
        return cls(folder, manifest)

    def __len__(self) -> int:
        """The number of rows of all recorded denoiser calls."""
        return len(self._row)

    def verify(self, model: nn.Module) -> None:
        """Raise CalibrationError unless `model` has the weights that were recorded."""
        found = model_hash(model)
        if found != self.manifest["model_hash"]:
            raise CalibrationError(
                f"{self.folder}: calibration data of another model: {self.manifest['denoiser']['class']} "
                f"{self.manifest['model_hash'][:12]}, not {type(model).__name__} {found[:12]}; record this model"
            )

    def timestep_of(self) -> Float[Tensor, " n"]:
        """Timestep of every sample, float64: equal to its entry in `timesteps`."""
        return self._timestep.clone()

    def trajectory_of(self) -> Int[Tensor, " n"]:
        """Number of the trajectory (0 to samples - 1) that every sample belongs to."""
        calibration = self.manifest["calibration"]
        first = self._batch * calibration["batch_size"]
        sizes = (calibration["samples"] - first).clamp(max=calibration["batch_size"])  # the last batch may be smaller
        numbers: Tensor = first + self._row % sizes
        return numbers

    def batch_of(self) -> Int[Tensor, " n"]:
        """Number of the recorded batch of every sample."""
        return self._batch.clone()

    def call_of(self) -> Int[Tensor, " n"]:
        """Number of the denoiser call, within its batch, of every sample; 0 is the noisiest."""
        return self._call.clone()

    def row_of(self) -> Int[Tensor, " n"]:
        """Row of every sample within its denoiser call."""
        return self._row.clone()

    def subset(self, count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
        """Draw `count` distinct samples, spread evenly over timesteps, in random order.

        Every timestep gives count // len(timesteps); which of them give one more is random. One that has fewer gives all.

        Raises CalibrationError if fewer than `count` were recorded.
        """
        if not 1 <= count <= len(self):
            raise CalibrationError(f"subset: {count} samples asked; 1 to {len(self)} are recorded in {self.folder}")
        shuffled = torch.randperm(len(self), generator=generator)
        shuffled = shuffled[self._timestep[shuffled].argsort(stable=True)]  # grouped by timestep, random within
        sizes = Counter(self._timestep[shuffled].tolist())  # in the same order
        rank = torch.cat([torch.arange(n) for n in sizes.values()])  # within its timestep
        tie = torch.rand(len(self), generator=generator, dtype=torch.float64)
        chosen = shuffled[(rank + tie).argsort()[:count]]
        return chosen[torch.randperm(count, generator=generator)]

    def batch(self, indices: Int[Tensor, " n"]) -> tuple[dict[str, Any], Tensor]:
        """Gather samples, in order, as the arguments of one denoiser call and the recorded output [n ...].

        Tensors that have one row per sample are gathered by row, the timestep [n] always; other arguments must be equal in
        all the calls that the samples come from.

        Raises CalibrationError for an index out of range, or if the calls cannot be put together.
        """
        if len(indices) == 0 or int(indices.min()) < 0 or int(indices.max()) >= len(self):
            raise CalibrationError(f"batch: indices must be between 0 and {len(self) - 1}, and at least one")
        places = torch.stack([self._batch[indices], self._call[indices], self._row[indices]], dim=1).tolist()
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
            arguments[name] = self._tensor(first_batch, values[0]).clone() if name in first["tensors"] else values[0]
        output = self._rows([(b, call["output"], row) for b, row, call in calls])
        return _unflatten(arguments), output

    def calls(self, *, timesteps: list[float] | None = None) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield every recorded call whole, as `batch` would, in the order recorded; only those at `timesteps` if given."""
        for indices in torch.split(torch.arange(len(self)), self._rows_of_calls):
            if timesteps is None or self._timestep[indices[0]].item() in timesteps:
                yield self.batch(indices)

    def steps(self, batch_index: int) -> list[dict[str, Tensor]]:
        """The scheduler steps of a recorded batch in order: model_output, timestep (no dimension), sample, prev_sample."""
        if not 0 <= batch_index < self.batches:
            raise CalibrationError(f"steps: batch {batch_index} asked; 0 to {self.batches - 1} are recorded in {self.folder}")
        steps = self._layouts[batch_index]["steps"]
        return [{name: self._tensor(batch_index, key).clone() for name, key in step.items()} for step in steps]

    @property
    def step_count(self) -> int:
        """Number of scheduler steps of a trajectory."""
        return len(self._layouts[0]["steps"])

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
        tensor: Tensor = self._files[batch].get_tensor(key)
        return tensor

    def _rows(self, places: list[tuple[int, str, int]]) -> Tensor:
        """Gather rows (file, tensor, row); a tensor is mapped once however many of its rows are asked for."""
        mapped = {(b, key): self._tensor(b, key) for b, key in {(b, key) for b, key, _ in places}}
        rows = [mapped[b, key][row] for b, key, row in places]
        if any(row.shape != rows[0].shape for row in rows):
            raise CalibrationError(f"batch: rows of shapes {sorted({tuple(row.shape) for row in rows})} cannot be put in one batch")
        return torch.stack(rows)


def _flatten(arguments: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to dotted names; refuses what a file cannot hold."""
    flat: dict[str, Any] = {}
    for key, value in arguments.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str) or "." in key:
            raise CalibrationError(f"{where}: argument {name}: a dict's keys must be strings without a dot to be recorded")
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, where, f"{name}.")
        elif isinstance(value, Tensor) or _is_json(value):
            flat[name] = value
        else:
            raise CalibrationError(
                f"{where}: argument {name} is a {type(value).__name__}; tensors, plain values and dicts of them can be recorded"
            )
    return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return nested


def _is_json(value: Any) -> bool:
    """Whether JSON gives back an equal value."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def _update(digest: Any, tensor: Tensor) -> None:
    """Add shape, dtype and bytes of a CPU tensor to a hashlib digest."""
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _seed(seed: int, batch: int) -> int:
    """A seed for one batch's generator: neighbouring seeds and batches share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:7], "big")


def _rows_of_batch(calibration: Calibration, batch: int) -> int:
    return min(calibration.batch_size, calibration.samples - batch * calibration.batch_size)


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed the global random state, for pipelines and schedulers that draw from it, and put it back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet(pipe: Pipeline) -> Iterator[None]:
    """Switch the pipeline's own progress bar off."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**(before | {"disable": True}))
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


@contextmanager
def _renamed_when_done(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name if the block ends well, and is deleted if it does not."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path}: cannot be written: {error}; free some space, or record into another folder") from error
    finally:
        partial.unlink(missing_ok=True)


def _batch_path(folder: Path, batch: int) -> Path:
    return folder / f"batch-{batch:05d}.safetensors"


def _open_batch(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        file: Any = safe_open(path, framework="pt")
        layout = json.loads((file.metadata() or {})["layout"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CalibrationError(
            f"{path}: missing, truncated or damaged ({type(error).__name__}: {error}); delete it and record again"
        ) from error
    return file, layout


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with _renamed_when_done(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1) + "\n")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{path}: is not a recording's manifest ({type(error).__name__}); record again") from error
    if version != FORMAT_VERSION:
        raise CalibrationError(f"{path}: format_version is {version}; {FORMAT_VERSION} is supported; record again")
    return manifest

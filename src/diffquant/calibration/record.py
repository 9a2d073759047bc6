"""Recording a pipeline while it samples: every denoiser call and scheduler step, on disk, in the format of `Trajectory`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
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
from diffquant.calibration.trajectory import (
    FORMAT_VERSION,
    MANIFEST,
    PARTIAL,
    PLACE,
    Trajectory,
    batch_path,
    digest_tensor,
    model_hash,
    read_manifest,
    renamed_when_done,
    write_manifest,
)
from diffquant.core.spec import CalibrationError

GIB = 2**30

Run: TypeAlias = Callable[[Pipeline, torch.Generator, int], Any]


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
    missing = [b for b in range(count) if not batch_path(folder, b).exists()]
    if not missing and read_manifest(folder)["complete"]:
        return

    columns = TextColumn("recording"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), disable=not progress)
    with bar, evaluation_mode(pipe), _quiet(pipe):
        task = bar.add_task("", total=count, completed=count - len(missing))
        for b in missing:
            rows = _rows_of_batch(calibration, b)
            batch = _Batch(find_denoiser(pipe)[1], rows, b, _BudgetCheck(calibration, rows) if b == missing[0] else None)
            generator = torch.Generator().manual_seed(_seed(calibration.seed, b))
            watched = observe(pipe, on_call=batch.add_call, on_step=batch.add_step, on_timetable=batch.add_timetable)
            with watched, _global_seed(generator.initial_seed()):
                if run is None:
                    run_pipeline(pipe, calibration, generator, range(b * calibration.batch_size, b * calibration.batch_size + rows))
                else:
                    run(pipe, generator, rows)
            batch.check(type(pipe).__name__)
            if not (folder / MANIFEST).exists():  # a refused recording leaves nothing behind
                folder.mkdir(parents=True, exist_ok=True)
                write_manifest(folder, manifest)
            batch.write(batch_path(folder, b))
            bar.advance(task)
    timesteps = Trajectory(folder, manifest).timesteps
    write_manifest(folder, manifest | {"complete": True, "timesteps": timesteps})


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
    found = read_manifest(folder)
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
        self.timetable: dict[str, Any] = {}

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
        self._require_clear_rows(arguments, rows, where)
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

    def add_timetable(self, arguments: Mapping[str, Any]) -> None:
        """What `set_timesteps` was called with, before the first step; arrays as lists, and without the device."""
        if not self.steps:
            plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in arguments.items()}
            self.timetable = {name: value for name, value in plain.items() if name != "device" and _is_json(value)}

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
        layout = {"calls": self.calls, "steps": self.steps, "step_options": self.step_options, "timetable": self.timetable}
        with renamed_when_done(path) as partial:
            save_file(self.tensors, partial, metadata={"layout": json.dumps(layout)})

    def _keep(self, tensor: Tensor) -> str:
        """Store a copy of the tensor unless an equal one is there already; return its name."""
        tensor = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256()
        digest_tensor(digest, tensor)
        name = digest.hexdigest()[:24]
        if name not in self.tensors:
            self.tensors[name] = tensor.clone()
        return name

    def _size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @staticmethod
    def _require_clear_rows(arguments: Mapping[str, Any], rows: int, where: str) -> None:
        """Refuse tables of [tokens, width], such as positions, where they could be taken for [rows, width]."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and rows > 1}
        if not any(value.ndim == 3 and value.shape[:2] == (rows, rows) for value in tensors.values()):
            return
        for name, value in tensors.items():
            if value.ndim == 2 and len(value) == rows:
                raise CalibrationError(
                    f"{where}: argument {name} has {rows} rows, the number of samples and of tokens; change calibration.batch_size"
                )

    @staticmethod
    def _require_finite(tensor: Tensor, where: str, what: str) -> None:
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CalibrationError(
                f"{where}: {bad} of {tensor.numel()} values of the {what} are not finite; check the weights, or use a wider dtype"
            )


def _flatten(arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Nested dicts, lists and tuples to dotted names (`unflatten` reverses it); refuses what a file cannot hold."""
    flat: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, member in value.items():
                if not isinstance(key, str) or "." in key or PLACE.fullmatch(key):
                    raise CalibrationError(
                        f"{where}: argument {name} has the key {key!r}; strings without dots or brackets can be recorded"
                    )
                add(f"{name}.{key}", member)
        elif isinstance(value, Tensor) or _is_json(value):
            flat[name] = value
        elif type(value) in (list, tuple) and value:
            for i, member in enumerate(value):
                add(f"{name}.[{i}]" if isinstance(value, list) else f"{name}.({i})", member)
        else:
            raise CalibrationError(
                f"{where}: argument {name} is a {type(value).__name__}; only tensors, plain values, and dicts, lists and tuples of "
                f"them can be recorded"
            )

    for name, value in arguments.items():
        add(name, value)
    return flat


def _is_json(value: Any) -> bool:
    """Whether JSON gives back an equal value."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


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

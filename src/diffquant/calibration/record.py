"""Recording a pipeline while it samples: every denoiser call and scheduler step, on disk, in the format of `Trajectory`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import torch

from diffquant.calibration.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    batch_path,
    identity,
    model_hash,
    read_manifest,
    write_manifest,
)
from diffquant.calibration.progress import Shown, bars
from diffquant.calibration.recorded_batch import BudgetCheck, RecordedBatch, Shapes
from diffquant.calibration.recording import Trajectory
from diffquant.core.model import is_frozen, is_quantizable
from diffquant.errors import CalibrationError
from diffquant.files import PARTIAL
from diffquant.host.conditions import Calibration
from diffquant.host.denoiser import timestep_argument
from diffquant.host.pipeline import Host, Pipeline, check_step_cache
from diffquant.host.scheduler import clipping

Run: TypeAlias = Callable[[Pipeline, torch.Generator, int], Any]


def record(
    pipe: Pipeline,
    calibration: Calibration = Calibration(),  # noqa: B008 (frozen)
    *,
    folder: Path | str | None = None,
    run: Run | None = None,
    progress: Shown = True,
) -> Trajectory:
    """Run the pipeline and write every denoiser call and scheduler step to disk.

    Each batch has its own generator, and finished batches in `folder` are reused, so a recording that was killed and resumed is the
    same. Without a folder the recording lives in a temporary one, as long as the returned object. `run(pipe, generator, batch)`
    replaces the call of the pipeline for `batch` trajectories; the generator is on the CPU. The pipeline is first run up to its
    first call for another number of samples, which shows the tensors that have an axis of samples.

    Raises CalibrationError if the folder holds another recording, if the scheduler cannot clip as asked, if the estimate exceeds
    `calibration.budget_gib` (nothing is written then), if an output is not finite, or if a file cannot be written.
    """
    temporary = folder is None
    folder = Path(tempfile.mkdtemp(prefix="diffquant-")) if folder is None else Path(folder)
    try:
        host = Host(pipe)
        own, clip = getattr(pipe, "scheduler", None), calibration.clip_sample
        with nullcontext() if own is None or clip is None else host.sampling_with(clipping(own, clip)):
            _record(host, calibration, folder, run, progress)
        trajectory = Trajectory.open(folder)
    except BaseException:
        if temporary:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if temporary:
        weakref.finalize(trajectory, shutil.rmtree, folder, ignore_errors=True)
    return trajectory


def _record(host: Host, calibration: Calibration, folder: Path, run: Run | None, progress: Shown) -> None:
    manifest = _describe(host, calibration, run)
    _prepare(folder, manifest)
    count = math.ceil(calibration.samples / calibration.batch_size)
    missing = [b for b in range(count) if not batch_path(folder, b).exists()]
    if not missing and read_manifest(folder)["complete"]:
        return

    with bars(progress) as bar, bar.part("recording", 0.0, 1.0), host.evaluating(), host.quiet():
        task = bar.add_task("batches", total=count, completed=count - len(missing))
        shapes = _shapes_of_another_size(host, calibration, run, _rows_of_batch(calibration, missing[0])) if missing else NO_SHAPES
        for b in missing:
            rows = _rows_of_batch(calibration, b)
            budget = BudgetCheck(calibration, rows, folder) if b == missing[0] else None
            batch = RecordedBatch(host.denoiser, rows, b, budget, shapes)
            with host.observed(on_call=batch.add_call, on_step=batch.add_step, on_timetable=batch.add_timetable):
                _sample(host, calibration, run, b, rows)
            batch.check(host.kind)
            if not (folder / MANIFEST).exists():  # a refused recording leaves nothing behind
                folder.mkdir(parents=True, exist_ok=True)
                write_manifest(folder, manifest)
            batch.write(batch_path(folder, b), identity(manifest))
            bar.advance(task)
        bar.remove_task(task)
    timesteps = Trajectory(folder, manifest).timesteps
    write_manifest(folder, manifest | {"complete": True, "timesteps": timesteps})


def _sample(host: Host, calibration: Calibration, run: Run | None, batch: int, rows: int) -> None:
    """Run the pipeline on the first `rows` trajectories of a batch, with random states of its own."""
    digest = hashlib.sha256(f"{calibration.seed}/{batch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    with torch.random.fork_rng():  # from which pipelines and schedulers may draw
        torch.manual_seed(generator.initial_seed())
        if run is None:
            first = batch * calibration.batch_size
            host.run(calibration, generator, range(first, first + rows))
        else:
            run(host.pipe, generator, rows)


def _shapes_of_another_size(host: Host, calibration: Calibration, run: Run | None, rows: int) -> Shapes:
    """Shapes of the first denoiser call for another number of samples than `rows`, which show the axes of samples."""
    call = host.first_call(lambda: _sample(host, calibration, run, 0, 2 if rows == 1 else 1))
    return NO_SHAPES if call is None else Shapes.of(host.denoiser, *call)


NO_SHAPES = Shapes(0, {}, {})


def _describe(host: Host, calibration: Calibration, run: Run | None) -> dict[str, Any]:
    """The manifest of a recording that is about to be made."""
    pipe, denoiser = host.pipe, host.denoiser
    check_step_cache(denoiser)
    if is_quantizable(denoiser) and is_frozen(denoiser):
        raise CalibrationError(f"{type(denoiser).__name__}: is quantized; record the full-precision pipeline that it came from")
    if getattr(pipe, "scheduler", None) is None:
        raise CalibrationError(f"{host.kind}: has no scheduler; only pipelines that hold one can be recorded")
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
        "pipeline": host.kind,
        "denoiser": {"component": host.name, "class": type(denoiser).__name__, "timestep": timestep_argument(denoiser)[0]},
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
    present = read_manifest(folder)
    ignored = {"complete", "timesteps", "calibration.budget_gib"} | ({"versions"} if present["complete"] else set())
    difference = _first_difference(present, manifest, ignored)
    if difference is not None:
        name, old, new = difference
        raise CalibrationError(
            f"{folder}: holds a recording whose {name} is {old}, not {new}; record into another folder, or delete this one"
        )


def _first_difference(old: Any, new: Any, ignored: set[str], name: str = "") -> tuple[str, Any, Any] | None:
    """The dotted name and both values of the first field that differs."""
    if name in ignored or old == new:
        return None
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return name, old, new
    for key in sorted(old.keys() | new.keys()):
        difference = _first_difference(old.get(key), new.get(key), ignored, f"{name}.{key}" if name else key)
        if difference:
            return difference
    return None


def _rows_of_batch(calibration: Calibration, batch: int) -> int:
    return min(calibration.batch_size, calibration.samples - batch * calibration.batch_size)

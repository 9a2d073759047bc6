"""Recording a pipeline while it samples: every denoiser call and scheduler step, on disk, in the format of `Trajectory`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import torch

from diffquant.calibration.progress import Shown, bars
from diffquant.calibration.recorded_batch import BudgetCheck, RecordedBatch, Shapes
from diffquant.calibration.recording import (
    FORMAT_VERSION,
    MANIFEST,
    Trajectory,
    batch_path,
    identity,
    model_hash,
    read_manifest,
    write_manifest,
)
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
    """Run the pipeline and keep every denoiser call and scheduler step on disk.

    Batch b of a seed is the same whether recorded in one go or after being killed: it has its own generator, and finished
    batches in `folder` are kept. Without a folder the recording lives in a temporary one, as long as the returned object.
    `run(pipe, generator, batch)` replaces the call of the pipeline for `batch` trajectories; the generator is on the CPU. Before
    the first batch the pipeline is begun for another number of samples, up to its first call: the two show what is per sample.

    Raises CalibrationError if the folder holds another recording, if the scheduler cannot clip as asked, if the estimate exceeds
    `calibration.budget_gib` (nothing is written then), if an output is not finite, or if a file cannot be written.
    """
    temporary = folder is None
    folder = Path(tempfile.mkdtemp(prefix="diffquant-")) if folder is None else Path(folder)
    try:
        host = Host(pipe)
        with _clipping(host, calibration.clip_sample):
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
    """Run the pipeline on the first `rows` trajectories of a batch."""
    generator = torch.Generator().manual_seed(_seed(calibration.seed, batch))
    with _global_seed(generator.initial_seed()):
        if run is None:
            first = batch * calibration.batch_size
            host.run(calibration, generator, range(first, first + rows))
        else:
            run(host.pipe, generator, rows)


def _shapes_of_another_size(host: Host, calibration: Calibration, run: Run | None, rows: int) -> Shapes:
    """What the first denoiser call is given for another number of samples than `rows`: which axes follow it."""
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
def _clipping(host: Host, clip_sample: bool | None) -> Iterator[None]:
    """Give the pipeline a scheduler that clips, or does not clip, while the block runs; None leaves it as it is."""
    own = getattr(host.pipe, "scheduler", None)
    if own is None or clip_sample is None:
        yield
        return
    with host.sampling_with(clipping(own, clip_sample)):
        yield

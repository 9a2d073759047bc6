"""The optimisation loop, its progress and its saved state.

Each iteration draws from a generator seeded with (seed, iteration). A fit that was killed and resumed is therefore the same fit,
bit for bit at an equal number of threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffquant.calibration.memory import BUDGET
from diffquant.calibration.progress import Bars, Shown, bars
from diffquant.errors import CalibrationError
from diffquant.files import DIGEST, digest_tensor, renamed_when_done

Schedule = Callable[[int, int], float]
T = TypeVar("T")

SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Run:
    """Where a pass reports its progress, and the folder it may save its state in (None: nothing is saved).

    ``memory``: bytes that a unit's recorded inputs and outputs may take; more go to files, in the folder or a temporary one.
    """

    progress: Bars
    folder: Path | None = None
    memory: float = BUDGET

    def track(self, items: Sequence[T], label: str, done: int = 0) -> Iterator[T]:
        """The items one by one, without the first `done`, with a bar that counts them."""
        task = self.progress.add_task(label, total=len(items), completed=done)
        try:
            for item in items[done:]:
                yield item
                self.progress.advance(task)
        finally:
            self.progress.remove_task(task)

    def below(self, name: str) -> Run:
        """The same run with a folder of its own for one pass or unit."""
        return replace(self, folder=None if self.folder is None else self.folder / name)


@contextmanager
def run(folder: Path | None = None, show: Shown = True, memory: float = BUDGET) -> Iterator[Run]:
    """A `Run` with live progress bars, silent ones, or those of a larger job."""
    with bars(show) as progress:
        yield Run(progress, folder, memory)


def constant(iteration: int, iterations: int) -> float:
    """The peak learning rate throughout."""
    return 1.0


def cosine(iteration: int, iterations: int) -> float:
    """From the peak learning rate to zero along half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def iteration_generator(seed: int, iteration: int) -> torch.Generator:
    """The generator of one iteration, independent of what other iterations draw."""
    return torch.Generator().manual_seed((seed * 1_000_003 + iteration) % 2**63)


def fit(
    parameters: Sequence[tuple[Tensor, float]],
    loss: Callable[[int, torch.Generator], Tensor],
    *,
    iterations: int,
    seed: int,
    run: Run,
    label: str,
    schedule: Schedule = constant,
    after_iteration: Callable[[int], None] | None = None,
    also_saved: Mapping[str, Tensor] | None = None,
    save_every: int = 500,
) -> list[float]:
    """Minimise `loss(iteration, generator)` over `parameters`, pairs of a leaf and its peak learning rate; return the loss curve.

    A loss without a graph has set the parameters' ``grad`` itself, and is only reported. Parameters require gradients while the
    loop runs; afterwards they are as before. `after_iteration` runs without gradients after each update.

    With a folder in `run` the state (parameters, optimizer, `also_saved`, loss curve) is saved every `save_every` iterations and
    every minute; the next call resumes from it.

    Raises `CalibrationError` when the loss is not finite.
    """
    tensors = [tensor for tensor, _ in parameters]
    state = {f"parameter.{index}": tensor for index, tensor in enumerate(tensors)}
    state |= {f"kept.{name}": tensor for name, tensor in (also_saved or {}).items()}
    with _requiring_gradients(tensors):
        optimizer = torch.optim.Adam([{"params": [tensor], "lr": lr} for tensor, lr in parameters])
        curve = _resume(run.folder, state, optimizer)
        saved = time.monotonic()
        for iteration in run.track(range(iterations), label, len(curve)):
            for group, (_, lr) in zip(optimizer.param_groups, parameters, strict=True):
                group["lr"] = lr * schedule(iteration, iterations)
            optimizer.zero_grad()
            with torch.enable_grad():
                value = loss(iteration, iteration_generator(seed, iteration))
            if not torch.isfinite(value):
                raise CalibrationError(f"{label}: loss is {value.item()} at iteration {iteration}; lower the rate")
            if value.requires_grad:
                value.backward()
            optimizer.step()
            if after_iteration is not None:
                with torch.no_grad():
                    after_iteration(iteration)
            curve.append(value.item())
            due = (iteration + 1) % save_every == 0 or iteration + 1 == iterations or time.monotonic() - saved >= SAVE_SECONDS
            if run.folder is not None and due:
                _save(run.folder, state, optimizer, curve)
                saved = time.monotonic()
    return curve


@contextmanager
def _requiring_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    before = [tensor.requires_grad for tensor in tensors]
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor, required in zip(tensors, before, strict=True):
            tensor.grad = None
            tensor.requires_grad_(required)


def _save(folder: Path, state: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, curve: list[float]) -> None:
    tensors = dict(state)
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in moments.items()}
    save_tensors(folder / "fit.safetensors", tensors, {"curve": json.dumps(curve)})


def _resume(folder: Path | None, state: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> list[float]:
    """Restore a saved state; return its loss curve, empty where nothing was saved."""
    if folder is None or not (folder / "fit.safetensors").exists():
        return []
    tensors, metadata = load_tensors(folder / "fit.safetensors")
    moments: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key in state:
                state[key].copy_(tensor)
            else:
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return list(json.loads(metadata["curve"]))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name and rename it: a kill leaves the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed_when_done(path) as partial:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata | {DIGEST: _digest(contiguous, metadata)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; `CalibrationError` where it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
        stated = metadata.pop(DIGEST, None)  # which version 0.1 did not write
        if stated not in (None, _digest(tensors, metadata)):
            raise ValueError("its contents are not those that were written")
        return tensors, metadata
    except (OSError, SafetensorError, ValueError) as error:
        raise CalibrationError(f"{path}: damaged ({error}); delete it to start this stage again") from error


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest_tensor(digest, tensors[name])
    return digest.hexdigest()

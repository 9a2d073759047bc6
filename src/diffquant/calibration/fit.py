"""The one optimisation loop, what it may keep and where, and its progress.

Every random draw of an iteration comes from a generator seeded with (seed, iteration), so a fit that was killed and resumed is the
same fit, bit for bit at an equal number of threads.
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
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffquant.calibration.memory import BUDGET
from diffquant.calibration.progress import Bars, Shown, bars
from diffquant.errors import CalibrationError
from diffquant.files import DIGEST, digest_tensor, renamed_when_done

Schedule = Callable[[int, int], float]
T = TypeVar("T")

SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Run:
    """Where a pass reports its progress, and the folder it may keep its state in (None: nothing is kept).

    ``memory``: bytes that the recorded inputs and outputs of a unit may take; more go to files, in the folder or a temporary one.
    """

    progress: Bars
    folder: Path | None = None
    memory: float = BUDGET

    def track(self, items: Sequence[T], label: str) -> Iterator[T]:
        """The items one by one, with a bar that says how many are done."""
        task = self.progress.add_task(label, total=len(items))
        try:
            for item in items:
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


def constant(step: int, steps: int) -> float:
    """The peak rate throughout."""
    return 1.0


def cosine(step: int, steps: int) -> float:
    """From the peak rate to zero along half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def iteration_generator(seed: int, iteration: int) -> torch.Generator:
    """The generator of one iteration: nothing drawn in another iteration changes it."""
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
    after_step: Callable[[int], None] | None = None,
    optimizer_type: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    clip_norm: float | None = None,
    also_kept: Mapping[str, Tensor] | None = None,
    save_every: int = 500,
) -> list[float]:
    """Minimise `loss(iteration, generator)` over `parameters`, pairs of a leaf tensor and its peak rate; return the loss curve.

    A loss that has no graph has put the gradients into the parameters' ``grad`` itself, and is only reported.
    The tensors need not be `nn.Parameter`: they require a gradient while the loop runs and are plain again afterwards.
    `after_step` runs without gradients, after each update, to project parameters.

    Where `run` has a folder the state (parameters, optimizer, `also_kept` tensors, loss curve) is saved there every `save_every`
    iterations, and every minute where those take longer, and picked up by the next call.

    Raises `CalibrationError` when the loss is not finite.
    """
    tensors = [tensor for tensor, _ in parameters]
    before = [tensor.requires_grad for tensor in tensors]
    for tensor in tensors:
        tensor.requires_grad_(True)
    optimizer = optimizer_type([{"params": [tensor], "lr": rate} for tensor, rate in parameters])
    kept = {f"parameter.{index}": tensor for index, tensor in enumerate(tensors)} | {
        f"kept.{name}": tensor for name, tensor in (also_kept or {}).items()
    }
    curve = _resume(run.folder, kept, optimizer)
    task = run.progress.add_task(label, total=iterations, completed=len(curve))
    saved = time.monotonic()
    try:
        for iteration in range(len(curve), iterations):
            for group, (_, rate) in zip(optimizer.param_groups, parameters, strict=True):
                group["lr"] = rate * schedule(iteration, iterations)
            optimizer.zero_grad()
            with torch.enable_grad():
                value = loss(iteration, iteration_generator(seed, iteration))
            if not torch.isfinite(value):
                raise CalibrationError(f"{label}: loss is {value.item()} at iteration {iteration}; lower the rate")
            if value.requires_grad:
                value.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(tensors, clip_norm)
            optimizer.step()
            if after_step is not None:
                with torch.no_grad():
                    after_step(iteration)
            curve.append(value.item())
            run.progress.update(task, completed=iteration + 1)
            due = (iteration + 1) % save_every == 0 or iteration + 1 == iterations or time.monotonic() - saved >= SAVE_SECONDS
            if run.folder is not None and due:
                _save(run.folder, kept, optimizer, curve)
                saved = time.monotonic()
    finally:
        for tensor, required in zip(tensors, before, strict=True):
            tensor.grad = None
            tensor.requires_grad_(required)
        run.progress.remove_task(task)
    return curve


def _save(folder: Path, kept: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, curve: list[float]) -> None:
    tensors = dict(kept)
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    save_tensors(folder / "fit.safetensors", tensors, {"curve": json.dumps(curve)})


def _resume(folder: Path | None, kept: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> list[float]:
    """Put back a saved state and return its loss curve (empty where nothing was saved)."""
    if folder is None or not (folder / "fit.safetensors").exists():
        return []
    tensors, metadata = load_tensors(folder / "fit.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key in kept:
                kept[key].copy_(tensor)
            else:
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return list(json.loads(metadata["curve"]))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name and rename it: a kill leaves the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed_when_done(path) as partial:
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(kept, partial, metadata | {DIGEST: _digest(kept, metadata)})


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


def lp_loss(output: list[Float[Tensor, "n ..."]], target: list[Float[Tensor, "n ..."]], power: float = 2.0) -> Tensor:
    """Sum over axis 1 of the mean error to the `power`: BRECQ's reconstruction loss (Li et al. 2021, arXiv 2102.05426)."""
    total = torch.zeros(())
    for value, wanted in zip(output, target, strict=True):
        total = total + (value.float() - wanted.float()).abs().pow(power).sum(dim=1).mean()
    return total

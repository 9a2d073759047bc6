"""The one optimisation loop, and what it is fed: the inputs and outputs of a unit, recorded through the model.

Every random draw of an iteration comes from a generator seeded with (seed, iteration), so a fit that was killed and resumed is the
same fit, bit for bit at an equal number of threads.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffquant.calibration.memory import BUDGET, Columns, Key
from diffquant.calibration.trajectory import Trajectory
from diffquant.core.spec import CalibrationError
from diffquant.core.surgery import device_of

Schedule = Callable[[int, int], float]

SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Run:
    """Where a pass reports its progress, and the folder it may keep its state in (None: nothing is kept).

    ``memory``: bytes that the recorded inputs and outputs of a unit may take; more go to files, in the folder or a temporary one.
    """

    progress: Progress
    folder: Path | None = None
    memory: float = BUDGET

    def below(self, name: str) -> Run:
        """The same run with a folder of its own for one pass or unit."""
        return replace(self, folder=None if self.folder is None else self.folder / name)


@contextmanager
def run(folder: Path | None = None, show: bool = True, memory: float = BUDGET) -> Iterator[Run]:
    """A `Run` with a live progress bar (or a silent one)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show, transient=False) as progress:
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
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; `CalibrationError` where it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise CalibrationError(f"{path}: damaged ({error}); delete it to start this stage again") from error


@contextmanager
def rows_of(model: nn.Module, data: Trajectory, picked: Int[Tensor, " n"]) -> Iterator[None]:
    """While the block runs, calls of `model` are of the recorded samples `picked`: its clock knows the guided half of each."""
    clock = getattr(model, "step_clock", None)
    if clock is None or clock.conditional is None:
        yield
        return
    with clock.rows_are(data.half_of()[picked]):
        yield


def call_recorded(model: nn.Module, data: Trajectory, picked: Int[Tensor, " n"]) -> Any:
    """What `model` returns for the recorded samples `picked`."""
    with rows_of(model, data, picked):
        return model(**data.batch(picked, device_of(model))[0])


class _Stop(Exception):
    """Raised inside a forward pass to end it: everything that was wanted has been seen."""


@dataclass
class UnitInputs:
    """The recorded calls of one unit: arguments with a leading axis of samples, constants, the interval of each sample.

    ``device``: where the unit computes; the tensors may be elsewhere, in files.
    """

    arguments: list[Any] = field(default_factory=list)
    keywords: dict[str, Any] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    intervals: Int[Tensor, " n"] | None = None
    device: torch.device | None = None

    def rows(self, picked: Int[Tensor, " k"]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments of the picked samples."""

        def pick(value: Any) -> Any:
            return self.pick(value, picked) if isinstance(value, Tensor) and value.dim() > 0 else value

        return [pick(value) for value in self.arguments], {name: pick(value) for name, value in self.keywords.items()}

    def targets(self, picked: Int[Tensor, " k"]) -> list[Tensor]:
        """Outputs of the picked samples."""
        return [self.pick(tensor, picked) for tensor in self.outputs]

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
            raise _Stop

    intervals = []
    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        for picked in indices.split(batch_size):
            seen.clear()
            clock = model.step_clock
            with torch.no_grad(), suppress(_Stop):
                call_recorded(model, data, picked)
            interval = clock.interval  # type: ignore[union-attr]
            intervals.append(torch.as_tensor(interval).expand(len(picked)).clone())
    finally:
        for handle in handles:
            handle.remove()
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


def lp_loss(output: list[Float[Tensor, "n ..."]], target: list[Float[Tensor, "n ..."]], power: float = 2.0) -> Tensor:
    """Sum over axis 1 of the mean error to the `power`: BRECQ's reconstruction loss (Li et al. 2021, arXiv 2102.05426)."""
    total = torch.zeros(())
    for value, wanted in zip(output, target, strict=True):
        total = total + (value.float() - wanted.float()).abs().pow(power).sum(dim=1).mean()
    return total

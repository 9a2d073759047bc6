"""How much each quantizer of a model alone changes the model's output, or the last sample of a trajectory.

Quantizing an operand with the error d changes the model's output, to first order, by J d, where J is the Jacobian of the output by
that operand. One backward pass from a random direction v of unit covariance gives v . J d for all quantizers at once, and the mean
square of that over directions is |J d|^2 (Hutchinson's estimator).

For the last sample the backward pass goes through the whole trajectory, a step at a time. Errors that point the same way at every
step, as those of a weight may, then add up, and errors of the first steps are changed by the later steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import Run, iteration_generator, load_tensors, save_tensors
from diffquant.calibration.memory import checkpointed
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import call_recorded
from diffquant.calibration.rollout import Chain, Rollout
from diffquant.calibration.timing import Work
from diffquant.core.model import full_precision, switched
from diffquant.core.quantizer import Quantizer
from diffquant.core.watch import observing, watching
from diffquant.host.pipeline import predicted
from diffquant.host.structure import PlannedLayer
from diffquant.methods.base import Pass, draw_seed, evaluating
from diffquant.methods.gradients import carried_back

DIRECTIONS = 2  # for each batch


class SensitivityPass(Pass):
    """A pass that measures sensitivities first, ``of`` the model's prediction in recorded calls or of the last sample.

    Of the prediction: ``samples`` calls in batches of ``batch_size``, two random directions for each batch. Of the last
    sample: ``trajectories``, one by one, a direction each; they count alike, however far one of them magnifies errors. The
    estimate's relative standard deviation is about the square root of 2 over all directions. ``checkpointing`` where the model's
    graph does not fit: see `AccuQuant`.
    """

    of: Literal["prediction", "sample"] = "prediction"
    trajectories: int = Field(default=32, ge=1)
    samples: int = Field(default=256, ge=1)
    batch_size: int = Field(default=8, ge=1)
    checkpointing: bool = False

    def work(self, blocks: int) -> Work:
        """A forward pass, and a backward pass for each direction; of trajectories, two forwards and one backwards a step of 50."""
        if self.of == "prediction":
            return Work(self.samples, self.samples * DIRECTIONS)
        return Work(100.0 * self.trajectories, 50.0 * self.trajectories)

    def check(self, model: nn.Module, rows: Sequence[PlannedLayer], data: Trajectory) -> None:
        """Raise `CalibrationError` where trajectories are needed and cannot be replayed."""
        if self.of == "sample":
            Rollout(model, data).verify(trajectories=1)

    def squares(
        self, model: nn.Module, quantizers: Mapping[str, Quantizer], data: Trajectory, generator: torch.Generator, run: Run
    ) -> dict[str, float]:
        """By quantizer: its squared change of what is asked for, a mean over directions.

        Of the prediction that is of a whole batch; of the last sample in parts of what all quantizers change. Raises `SpecError`
        where ranges were not calibrated, `CalibrationError` where a trajectory cannot be replayed.
        """
        if self.of == "sample":
            changes = changes_of_last_samples(model, quantizers, data, self.trajectories, generator, run, self.checkpointing)
            return dict(zip(quantizers, relative(changes).sum(dim=2).square().mean(dim=0).tolist(), strict=True))
        batches = data.subset(min(self.samples, len(data)), generator).split(self.batch_size)
        squares = dict.fromkeys(quantizers, 0.0)
        with (
            evaluating(model),
            switched(model, True),  # refuses where ranges are missing
            full_precision(model),
            gated(quantizers) as gates,
            checkpointed(model, self.checkpointing),
        ):
            for picked in run.track(batches, "sensitivity"):
                with torch.enable_grad():
                    output = predicted(model, call_recorded(model, data, picked)).float()
                for i in range(DIRECTIONS):
                    direction = torch.randn(output.shape, generator=generator).to(output.device)
                    derivatives = torch.autograd.grad(
                        output, list(gates.values()), direction, retain_graph=i + 1 < DIRECTIONS, allow_unused=True
                    )
                    for name, value in zip(gates, derivatives, strict=True):
                        squares[name] += 0.0 if value is None else float(value) ** 2
        calls = len(batches) * DIRECTIONS
        return {name: value / calls for name, value in squares.items()}


def changes_of_last_samples(
    model: nn.Module,
    quantizers: Mapping[str, Quantizer],
    data: Trajectory,
    trajectories: int,
    generator: torch.Generator,
    run: Run,
    checkpointing: bool = False,
) -> Float[Tensor, "trajectories quantizers steps"]:
    """How far the errors of each quantizer at each step move the last sample in a random direction, one for each trajectory.

    To first order, so what a quantizer does at several steps is their sum. Trajectories that a killed run has finished are taken
    over. Raises `SpecError` where ranges were not calibrated, `CalibrationError` where a trajectory cannot be replayed.
    """
    rollout = Rollout(model, data, checkpointing=checkpointing)
    rollout.verify()
    picked = torch.randperm(rollout.trajectories, generator=generator)[:trajectories]
    seed = draw_seed(generator)
    path = None if run.folder is None else run.folder / "changes.safetensors"
    changes = [] if path is None or not path.exists() else list(load_tensors(path)[0]["changes"])
    with evaluating(model), switched(model, True), full_precision(model), gated(quantizers) as gates:
        for i in run.track(range(len(picked)), "sensitivity", len(changes)):
            chain = rollout.chain(picked[i : i + 1], range(rollout.steps))
            direction = torch.randn(chain.recorded(rollout.steps).shape, generator=iteration_generator(seed, i))
            changes.append(changes_along(direction, chain, gates))
            if path is not None:
                save_tensors(path, {"changes": torch.stack(changes)}, {})
    return torch.stack(changes)


def changes_along(
    direction: Float[Tensor, "n ..."], chain: Chain, gates: Mapping[str, Tensor]
) -> Float[Tensor, "quantizers steps"]:
    """How far the errors of each quantizer at each step move the end of `chain` in a direction, to first order; float64."""
    steps: list[list[float]] = []  # the last first

    def store() -> None:
        steps.append([0.0 if gate.grad is None else float(gate.grad) for gate in gates.values()])
        for gate in gates.values():
            gate.grad = None

    carried_back(chain, direction, after_step=store)
    return torch.tensor(steps[::-1], dtype=torch.float64).T


def relative(changes: Float[Tensor, "trajectories quantizers steps"]) -> Float[Tensor, "trajectories quantizers steps"]:
    """Changes whose squares, of each quantizer's sum over the steps, sum to 1 over the quantizers in every trajectory."""
    whole: Tensor = torch.linalg.vector_norm(changes.sum(dim=2), dim=1).clamp(min=1e-15)
    return changes / whole[:, None, None]


@contextmanager
def gated(quantizers: Mapping[str, Quantizer]) -> Iterator[dict[str, Tensor]]:
    """While the block runs, what enters each quantizer has ``gate * (its quantization error)`` added, of a gate that is 0."""
    gates = {name: torch.zeros((), device=each.scale.device, requires_grad=True) for name, each in quantizers.items()}
    hooks = {quantizer: _added_error(gates[name]) for name, quantizer in quantizers.items()}
    observers = dict.fromkeys(quantizers.values(), lambda x: None)  # observed, a quantizer that is off is called
    with observing(observers), watching(hooks):
        yield gates


def _added_error(gate: Tensor) -> Callable[[Quantizer, Any, Tensor], Tensor]:
    def hook(quantizer: Quantizer, arguments: Any, output: Tensor) -> Tensor:
        with torch.no_grad():
            x = output.float()
            error = quantizer.simulated(x) - x
        return output + (gate * error).to(output.dtype)

    return hook

"""Several denoising steps in a row, from a recorded latent, through the model as it is switched and the pipeline's own scheduler.

Everything a step needs is read from the recording: conditions, timesteps, arguments of ``scheduler.step``, the weight of guidance,
and the noise that the scheduler injected. The scheduler is built from its recorded configuration; the history of multistep solvers
is rebuilt by stepping along the recorded trajectory. `Rollout.verify` replays recorded stretches in full precision, and refuses a
recording that does not come out as recorded.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffquant.calibration.memory import checkpointed, recomputed
from diffquant.calibration.recording import RecordedStep, Trajectory
from diffquant.calibration.replay import rows_of
from diffquant.core.model import device_of, full_precision, state_of
from diffquant.errors import CalibrationError
from diffquant.host.denoiser import input_name
from diffquant.host.guidance import guidance_weight, guided, leading_channels
from diffquant.host.pipeline import predicted
from diffquant.host.scheduler import State, build_scheduler, noise_is, restore, scale_model_input, snapshot

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}  # relative L2 of a replayed stretch; other dtypes: HALF_TOLERANCE
HALF_TOLERANCE = 5e-2
VERIFIED_STEPS = 5  # of the replayed stretches: one at the start, one in the middle, one at the end


class Rollout:
    """Chains of steps through `model`, along the trajectories of `data`. `guidance[k]` weighs a guided call's second half.

    ``checkpointing`` keeps no graph of the model's units, ``split_guidance`` calls the model for the halves of a guided call one
    after the other, with one half's graph at a time: less memory, for another forward pass where gradients are taken.

    Raises `CalibrationError`, naming pipeline and scheduler, where the recording cannot be replayed.
    """

    def __init__(self, model: nn.Module, data: Trajectory, *, checkpointing: bool = False, split_guidance: bool = False) -> None:
        self.model, self.data = model, data
        self.checkpointing, self.split_guidance = checkpointing, split_guidance
        self.where = f"{data.manifest['pipeline']} with {data.manifest['scheduler']['class']}"
        self.steps: int = data.step_count
        self.scheduler = self._build_scheduler()
        self._initial = snapshot(self.scheduler)
        self._rows = self._rows_of_calls()
        self._input_name = input_name(model)
        probe = torch.arange(self._rows.shape[1])[: data.manifest["calibration"]["batch_size"]]
        recorded = [data.step(probe, k) for k in range(self.steps)]
        self._stochastic = self._injects_noise(recorded)
        self._stateful = self._keeps_history(recorded)
        self.guidance = [self._guidance_weight(step, probe, k) for k, step in enumerate(recorded)]

    @property
    def trajectories(self) -> int:
        """Number of recorded trajectories."""
        return self._rows.shape[1]

    def segments(self, steps_per_segment: int) -> list[range]:
        """The sampling steps cut into consecutive segments of equal length; the last may be shorter."""
        return [range(k, min(k + steps_per_segment, self.steps)) for k in range(0, self.steps, steps_per_segment)]

    def chain(self, trajectories: Int[Tensor, " n"], steps: range) -> Chain:
        """The steps `steps` of the recorded `trajectories`."""
        return Chain(self, trajectories, steps, self._state_before(trajectories, steps.start))

    def finish(
        self, trajectories: Int[Tensor, " n"], k: int, latent: Float[Tensor, "n ..."], state: State
    ) -> Float[Tensor, "n ..."]:
        """The last latent of `trajectories` when steps `k` and later are taken from `latent` and the scheduler's `state`."""
        return Chain(self, trajectories, range(k, self.steps), state).run(latent)[0][-1]

    def through(self, model: nn.Module) -> Rollout:
        """The same recording through another model: one that takes the same calls, such as the quantized one after `freeze`."""
        other = copy.copy(self)
        other.model = model
        return other

    def verify(self, trajectories: int | None = None) -> None:
        """Replay recorded stretches in full precision, of the first batch or the first `trajectories`.

        Raises `CalibrationError` where they do not come out as recorded.
        """
        probe = torch.arange(min(self.trajectories, trajectories or self.data.manifest["calibration"]["batch_size"]))
        middle, last = self.steps // 2, max(0, self.steps - VERIFIED_STEPS)
        if self._stochastic:
            self._check_additive(probe)
        for start in sorted({0, middle, last}):
            chain = self.chain(probe, range(start, min(start + VERIFIED_STEPS, self.steps)))
            with full_precision(self.model):
                end, _ = chain.run()
            recorded = chain.recorded(len(chain.steps))
            error = float((end[-1] - recorded).norm() / recorded.norm().clamp(min=1e-12))
            dtype = self.data.step(probe[:1], start).sample.dtype
            if not error <= TOLERANCE.get(dtype, HALF_TOLERANCE):
                raise CalibrationError(
                    f"{self.where}: steps {start} to {chain.steps.stop - 1} replayed from the recording end {error:.2g} (relative) "
                    f"away from what was recorded; use a recipe that matches single steps"
                )

    def _build_scheduler(self) -> Any:
        scheduler = build_scheduler(self.data.manifest)
        scheduler.set_timesteps(**self.data.timetable)
        if scheduler.timesteps.double().tolist() != self.data.step_timesteps:
            raise CalibrationError(
                f"{self.where}: the recorded timesteps are not those of the scheduler's set_timesteps; they cannot be replayed"
            )
        return scheduler

    def _rows_of_calls(self) -> Int[Tensor, "steps trajectories halves"]:
        """The recording's rows for every step and trajectory: one, or two where a guided call has a doubled batch."""
        data, half = self.data, self.data.half_of.clamp(min=0)
        halves = int(half.max()) + 1
        rows = torch.full((int(data.call_of.max()) + 1, data.manifest["calibration"]["samples"], halves), -1)
        rows[data.call_of, data.trajectory_of, half] = torch.arange(len(data))
        if len(rows) != self.steps or halves > 2 or bool((rows < 0).any()):
            raise CalibrationError(
                f"{self.where}: {len(rows)} calls of the denoiser with up to {halves} rows a sample for {self.steps} steps; "
                f"only one call a step, with one row a sample or two for guidance, can be replayed"
            )
        return rows

    def _guidance_weight(self, step: RecordedStep, trajectories: Tensor, k: int) -> float:
        """The w for which first + w (second - first) of the recorded halves is what reached the scheduler (least squares).

        Raises `CalibrationError` where no w gives it.
        """
        if self._rows.shape[2] == 1:
            return 1.0
        _, output = self.data.batch(self._rows[k, trajectories].T.reshape(-1))
        first, second = leading_channels(output, step.model_output).chunk(2)
        weight, missed = guidance_weight(first, second, step.model_output)
        if missed > (1e-5 if step.model_output.dtype in TOLERANCE else HALF_TOLERANCE):
            raise CalibrationError(
                f"{self.where}: the guided prediction of step {k} is {missed:.2g} (relative) away from every weighted sum of its "
                f"halves; only such sums can be replayed; sample without guidance_rescale and the like"
            )
        return weight

    def _injects_noise(self, recorded: list[RecordedStep]) -> bool:
        """Whether the scheduler added noise. Raises `CalibrationError` where a recorded step differs from its own otherwise."""
        state = self._initial
        for k, step in enumerate(recorded):
            prev_sample, state = self._step(step.model_output, step.sample, step, state)
            if self._drew and not torch.allclose(prev_sample, step.prev_sample, rtol=1e-4, atol=1e-4):
                return True
            missed = float((prev_sample - step.prev_sample).norm() / step.prev_sample.norm().clamp(min=1e-12))
            if not missed <= TOLERANCE.get(step.sample.dtype, HALF_TOLERANCE):
                raise CalibrationError(
                    f"{self.where}: the scheduler's own step {k} ends {missed:.2g} (relative) away from what was recorded; "
                    f"its steps cannot be replayed"
                )
        return False

    def _keeps_history(self, recorded: list[RecordedStep]) -> bool:
        """Whether a step depends on the steps before it, found by leaving them out."""
        state = self._initial
        for step in recorded:
            model_output, sample = step.model_output[:1], step.sample[:1]
            try:
                alone, _ = self._step(model_output, sample, step, self._initial)
            except Exception:  # a scheduler that cannot start in the middle says so in its own ways
                return True
            prev_sample, state = self._step(model_output, sample, step, state)
            if not torch.equal(alone, prev_sample):
                return True
        return False

    def _check_additive(self, trajectories: Tensor) -> None:
        """Raise `CalibrationError` unless the noise that the scheduler injects is added, whatever the latent and the prediction."""
        step = self.data.step(trajectories, self.steps // 2)
        state = self._state_before(trajectories, self.steps // 2)
        noise = torch.randn(step.sample.shape, generator=torch.Generator().manual_seed(0)).to(step.sample.dtype)
        added = []
        for factor in (1.0, 0.5):
            mean, _ = self._step(step.model_output * factor, step.sample, step, state)
            drawn, _ = self._step(step.model_output * factor, step.sample, step, state, noise)
            added.append(drawn - mean)
        if not torch.allclose(added[0], added[1], rtol=1e-3, atol=1e-3):
            raise CalibrationError(
                f"{self.where}: the noise that the scheduler injects depends on the prediction; it cannot be replayed"
            )

    def _state_before(self, trajectories: Tensor, k: int) -> State:
        """The scheduler's state before step `k` of the recorded trajectories."""
        state = self._initial
        if self._stateful:
            with torch.no_grad():
                for j in range(k):
                    step = self.data.step(trajectories, j).to(self._device)
                    _, state = self._step(step.model_output, step.sample, step, state)
        return state

    @property
    def _device(self) -> torch.device:
        return device_of(self.model)

    def _step(
        self, model_output: Tensor, sample: Tensor, recorded: RecordedStep, state: State, noise: Tensor | float = 0.0
    ) -> tuple[Tensor, State]:
        """The scheduler's own step from `state`, with `noise` in place of what it would draw, and the state it leaves."""
        scheduler = self.scheduler
        restore(scheduler, state)
        with noise_is(scheduler, noise) as draws:
            scale_model_input(scheduler, sample, recorded.timestep)  # some schedulers insist on it before a step
            result = scheduler.step(model_output, recorded.timestep, sample, **recorded.options)
        self._drew = bool(draws)
        return result.prev_sample, snapshot(scheduler)


@dataclass(frozen=True)
class Chain:
    """Consecutive steps of a batch of trajectories. Latents are ``[n, ...]``; step i of the chain is sampling step `steps[i]`."""

    rollout: Rollout
    trajectories: Int[Tensor, " n"]
    steps: range
    state: State

    def recorded(self, i: int) -> Float[Tensor, "n ..."]:
        """The recorded full-precision latent before step `i`, or after the last step for ``i == len(steps)``, float32 or wider."""
        last = i == len(self.steps)
        step = self.rollout.data.step(self.trajectories, self.steps[i - 1 if last else i])
        latent = step.prev_sample if last else step.sample
        return latent.to(self.rollout._device, torch.promote_types(latent.dtype, torch.float32))

    def predict(self, latent: Float[Tensor, "n ..."], i: int, state: State) -> Tensor:
        """The prediction that reaches the scheduler at step `i` for `latent`, guided as the pipeline guided it."""
        rollout, k = self.rollout, self.steps[i]
        restore(rollout.scheduler, state)
        scaled = scale_model_input(rollout.scheduler, latent, self._recorded_step(i).timestep)
        rows = rollout._rows[k, self.trajectories].T  # [halves, n]
        if len(rows) == 1:
            return self._output(scaled, i, rows[0])
        if rollout.split_guidance:
            first, second = (self._output(scaled, i, half) for half in rows)
            return first + rollout.guidance[k] * (second - first)
        return guided(self._output(scaled, i, rows.reshape(-1)), rollout.guidance[k])

    def _output(self, scaled: Tensor, i: int, rows: Int[Tensor, " m"]) -> Tensor:
        """The model's prediction in the recorded calls `rows` with `scaled`, once or twice, in place of the latents."""
        rollout = self.rollout
        arguments, _ = rollout.data.batch(rows, rollout._device)
        recorded = arguments[rollout._input_name]
        placed = torch.cat([scaled.to(recorded.dtype)] * (len(rows) // len(scaled)))
        beside = recorded[:, scaled.shape[1] :]  # channels that are not the latent's, such as a mask
        arguments[rollout._input_name] = torch.cat([placed, beside], dim=1) if beside.shape[1] else placed

        def call(**arguments: Any) -> Any:
            with rows_of(rollout.model, rollout.data, rows):
                return rollout.model(**arguments)

        again = rollout.split_guidance and not rollout.checkpointing
        state = state_of(rollout.model)
        run = recomputed(call, None if state is None else state.clock) if again else call
        with checkpointed(rollout.model, rollout.checkpointing):
            output = predicted(rollout.model, run(**arguments))
        return leading_channels(output, self._recorded_step(i).model_output)

    def step(self, model_output: Tensor, latent: Tensor, i: int, state: State) -> tuple[Tensor, State]:
        """Latent and scheduler state after step `i`, with the noise that was injected when it was recorded; differentiable."""
        recorded = self._recorded_step(i)
        prev_sample, after = self.rollout._step(model_output, latent, recorded, state)
        return prev_sample + self._noise(i) if self.rollout._stochastic else prev_sample, after

    def run(self, start: Tensor | None = None, steps: int | None = None) -> tuple[list[Tensor], list[State]]:
        """Latents and scheduler states before the first and after each of the first `steps` steps (default: all).

        No gradients are kept. `start` replaces the recorded latent.
        """
        latents, states = [self.recorded(0) if start is None else start], [self.state]
        with torch.no_grad():
            for i in range(len(self.steps) if steps is None else steps):
                output = self.predict(latents[i], i, states[i])
                latent, state = self.step(output, latents[i], i, states[i])
                latents.append(latent)
                states.append(state)
        return latents, states

    def _recorded_step(self, i: int) -> RecordedStep:
        return self.rollout.data.step(self.trajectories, self.steps[i]).to(self.rollout._device)

    def _noise(self, i: int) -> Tensor:
        """The noise injected at step `i`: the recorded result minus that of the step without noise."""
        step = self._recorded_step(i)
        with torch.no_grad():
            state = self.rollout._state_before(self.trajectories, self.steps[i])
            mean, _ = self.rollout._step(step.model_output, step.sample, step, state)
        return step.prev_sample - mean

"""StepClock: the interval of the timestep axis that the present call of the model is in."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from diffquant.errors import SpecError

Interval = int | Int[Tensor, " batch"]


class _OfThread(threading.local):
    """The clock in one thread."""

    def __init__(self) -> None:
        self.interval: Interval | None = None
        self.calls: list[Interval | None] = []  # the interval before each call that has not ended
        with torch.inference_mode(False):  # it is written at every call, also outside of inference mode
            self.position = torch.zeros(1, dtype=torch.long)  # the interval as a tensor, which compiled code reads


class StepClock:
    """The present interval of the model's own timestep axis, shared by all quantizers of a model.

    The interval belongs to the call: threads that call one model at the same time have intervals of their own, and a call inside
    another one leaves the outer one's as it was. What is computed again for a backward pass is bound to its call
    (`host.denoiser`).

    ``timesteps`` are the recorded ones, noisy (large) first; interval i belongs to ``timesteps[i]`` and reaches to the midpoints of
    its neighbours (``edges``, ascending), the outermost intervals without end. Without timesteps there is one interval.

    With ``conditional`` the two halves of a guided call have intervals of their own, those of the second half after those of the
    first: ``half * len(timesteps) + i``. It is the half that was conditional, whose intervals a call without guidance takes.
    """

    def __init__(self, timesteps: Sequence[float] = (), conditional: int | None = None) -> None:
        self.conditional = conditional
        self.row_halves: Int[Tensor, " batch"] | None = None  # of the rows of a call, while calibration says so
        self._last: Interval = 0  # of whatever thread
        self._mine = _OfThread()
        self.divide(timesteps)

    @property
    def interval(self) -> Interval:
        """The present interval of this thread; of a thread that set none, the last one that any did."""
        own = self._mine.interval
        return self._last if own is None else own

    @interval.setter
    def interval(self, interval: Interval) -> None:
        self._last = self._mine.interval = interval

    @property
    def position(self) -> Int[Tensor, " 1"]:
        """The present interval of this thread as a tensor, so that compiled code follows it."""
        return self._mine.position

    @contextmanager
    def at(self, interval: Interval) -> Iterator[None]:
        """While the block runs, this thread is in `interval`."""
        before, self._mine.interval = self._mine.interval, interval
        try:
            yield
        finally:
            self._mine.interval = before

    def begin(self) -> None:
        """A call of the model begins in this thread, perhaps inside another one."""
        self._mine.calls.append(self._mine.interval)

    def end(self) -> None:
        """The call that began last is over; the one around it, if there is one, is in its own interval again."""
        before = self._mine.calls.pop() if self._mine.calls else None
        if self._mine.calls:
            self._mine.interval = before

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_mine"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._mine = _OfThread()

    def divide(self, timesteps: Sequence[float]) -> None:
        """Cut the axis anew around `timesteps` (any order, floats allowed); the present interval becomes 0."""
        self.timesteps = tuple(sorted({float(timestep) for timestep in timesteps}, reverse=True))
        ascending = torch.tensor(self.timesteps[::-1], dtype=torch.float64)
        self.edges = (ascending[1:] + ascending[:-1]) / 2  # [intervals - 1], float64 so that integers stay exact
        self.set_interval(0)

    @property
    def intervals(self) -> int:
        """Number of intervals, at least 1; of both halves, where they have their own."""
        return self.branches * self.times

    @property
    def times(self) -> int:
        """Number of intervals of the timestep axis, at least 1."""
        return max(1, len(self.timesteps))

    @property
    def branches(self) -> int:
        """2 where the halves of a guided call have intervals of their own, else 1."""
        return 1 if self.conditional is None else 2

    def table(self, rows: int, per_branch: bool) -> Int[Tensor, " intervals"]:
        """The set of each interval: `rows` in equal shares over the timesteps, the same for both halves unless `per_branch`."""
        return spread(rows, self.intervals) if per_branch else spread(rows, self.times).repeat(self.branches)

    def halves(self, sample: Tensor) -> Int[Tensor, " batch"]:
        """The half of a guided call that each row of `sample` belongs to; a call without guidance is all ``conditional``.

        Pipelines guide by doubling the batch: both halves are of the same latents (diffusers 0.42.1: ``torch.cat([latents] * 2)``).
        """
        assert self.conditional is not None
        count = len(sample)
        if self.row_halves is not None:
            if len(self.row_halves) != count:
                raise SpecError(f"clock: a batch of {count} where {len(self.row_halves)} rows of the recording were announced")
            return torch.where(self.row_halves < 0, self.conditional, self.row_halves)
        if count % 2 == 0 and torch.equal(sample[: count // 2], sample[count // 2 :]):
            return torch.arange(count) // (count // 2)
        return torch.full((count,), self.conditional)

    @contextmanager
    def rows_are(self, halves: Int[Tensor, " batch"]) -> Iterator[None]:
        """While the block runs, the rows of a call belong to `halves` of guided calls (0, 1; -1: of a call without guidance)."""
        before, self.row_halves = self.row_halves, halves
        try:
            yield
        finally:
            self.row_halves = before

    def set_timestep(self, timestep: Tensor | float, halves: Int[Tensor, " batch"] | None = None) -> None:
        """Set the interval from a timestep (scalar, or one per sample; inside `torch.compile` the same for all samples).

        `halves` says which half of a guided call each sample is of, where the halves have intervals of their own.
        """
        values = torch.as_tensor(timestep).detach().to("cpu", torch.float64).reshape(-1)
        ascending = torch.bucketize(values, self.edges)
        index = self.times - 1 - ascending
        if self.conditional is not None:
            if torch.compiler.is_compiling():
                raise SpecError("guidance_sets: the halves of a call are told by its values, which torch.compile cannot follow")
            index = index + self.times * (torch.tensor([self.conditional]) if halves is None else halves)
        if torch.compiler.is_compiling():
            self.position.copy_(index[:1])  # in place: dynamo does not set attributes of a thread's own
        else:
            self.set_interval(index)

    def set_interval(self, interval: int | Int[Tensor, " batch"]) -> None:
        """Set the interval itself, one for all samples or one per sample."""
        if isinstance(interval, Tensor):
            same = bool((interval == interval[0]).all())
            self.interval = int(interval[0]) if same else interval
        else:
            self.interval = interval
        if isinstance(self.interval, int):
            self.position.fill_(self.interval)


def spread(rows: int, intervals: int) -> Int[Tensor, " intervals"]:
    """The table that gives consecutive intervals to `rows` sets in equal shares; the identity where there is a row per interval."""
    return torch.arange(intervals) * rows // intervals

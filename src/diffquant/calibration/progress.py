"""Progress bars of a long job: one for the whole job with the time left, and one for each task at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text


class _Count(ProgressColumn):
    """How much is done; of the whole job also the time left, at the pace so far."""

    def render(self, task: Task) -> Text:
        if not task.fields.get("whole"):
            return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")
        done, elapsed = task.completed, task.elapsed or 0.0
        if done >= 1:
            return Text(f"100 %, {_clock(elapsed)}")
        return Text(f"{done:.0%}, {_clock(elapsed * (1 - done) / done)} left" if done > 0.01 else f"{done:.0%}")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")


class Bars(Progress):
    """Bars of tasks below a bar of the whole job.

    `part` says which stretch of the whole the following block is; parts may have parts. Within the innermost part the whole moves
    with the first tasks that are added, as many as `part` says.
    """

    def __init__(self, show: bool) -> None:
        super().__init__(TextColumn("{task.description}"), BarColumn(), _Count(), console=Console(stderr=True), disable=not show)
        self._whole: TaskID | None = None
        self._parts: list[tuple[str, float, float]] = []
        self._within: list[TaskID] = []  # of the innermost part: the tasks that move the whole,
        self._tasks_of_part = 1  # and how many they will be
        self._named: dict[str, TaskID] = {}

    @contextmanager
    def part(self, description: str, low: float, high: float, tasks: int = 1) -> Iterator[None]:
        """The block is the stretch from `low` to `high`, 0 to 1, of the part around it or of the whole, in so many `tasks`."""
        _, start, end = self._parts[-1] if self._parts else ("", 0.0, 1.0)
        self._parts.append((description, start + (end - start) * low, start + (end - start) * high))
        self._within, self._tasks_of_part = [], tasks
        if self._whole is None:
            self._whole = self.add_task("", total=1.0, whole=True)
        self.reach(0.0)
        try:
            yield
            self.reach(1.0)
        finally:
            self._parts.pop()
            self._within, self._tasks_of_part = [], 1

    def reach(self, share: float) -> None:
        """Show that a `share` of the innermost part is done."""
        if self._whole is None or not self._parts:
            return
        _, start, end = self._parts[-1]
        description = ", ".join(name for name, _, _ in self._parts if name)
        done = max(start + (end - start) * share, self._tasks[self._whole].completed)
        self.update(self._whole, description=description, completed=done)

    def add_task(self, description: str, *args: object, **kwargs: object) -> TaskID:
        """As of `Progress`; inside a part its first tasks move the whole."""
        task = super().add_task(description, *args, **kwargs)  # type: ignore[arg-type]
        if self._whole is not None and len(self._within) < self._tasks_of_part:
            self._within.append(task)
        return task

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As of `Progress`."""
        super().advance(task_id, advance)
        if task_id in self._within and (total := self._tasks[task_id].total):
            before = self._within.index(task_id)
            self.reach((before + self._tasks[task_id].completed / total) / self._tasks_of_part)

    def show(self, name: str, done: int, total: int) -> None:
        """Move the bar called `name`, which the first call makes: what evaluations report to."""
        if name not in self._named:
            self._named[name] = self.add_task(name, total=total)
        self.advance(self._named[name], done - self._tasks[self._named[name]].completed)


Shown: TypeAlias = bool | Bars  # whether a job shows bars, or those of the job that it is a part of


@contextmanager
def bars(progress: Shown) -> Iterator[Bars]:
    """Live bars, or silent ones; those that are given are left as they are."""
    if isinstance(progress, Bars):
        yield progress
        return
    with Bars(progress) as shown:
        yield shown

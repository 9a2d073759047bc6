"""The bar of a whole job: it moves with its parts, never back, and says what time is left."""

import io

from rich.console import Console

from diffquant.calibration.progress import Bars, bars


def shown(job: Bars) -> tuple[str, float]:
    (whole,) = [task for task in job.tasks if task.fields.get("whole")]
    return whole.description, round(whole.completed, 6)


def test_parts_of_parts() -> None:
    with bars(False) as job:
        with job.part("recording", 0.0, 0.2):
            task = job.add_task("batches", total=4)
            job.advance(task)
            assert shown(job) == ("recording", 0.05)
            other = job.add_task("something inside", total=2)
            job.advance(other)
            assert shown(job) == ("recording", 0.05)
        with job.part("", 0.2, 1.0), bars(job) as same:
            assert same is job
            with same.part("pass 1 of 2", 0.0, 0.5):
                task = same.add_task("units", total=2)
                same.advance(task)
                assert shown(job) == ("pass 1 of 2", 0.4)
            with same.part("pass 2 of 2", 0.5, 1.0, tasks=2):
                for name in ("one", "two"):
                    same.show(name, 1, 2)
                    same.show(name, 2, 2)
                    assert shown(job)[1] == {"one": 0.8, "two": 1.0}[name]
        assert shown(job)[1] == 1.0


def test_it_says_what_time_is_left() -> None:
    now = [0.0]
    job = Bars(True)
    job.live.console = Console(file=io.StringIO(), force_terminal=True, width=100)
    job.get_time = lambda: now[0]
    with job.part("comparing", 0.0, 1.0):
        task = job.add_task("pictures", total=4)
        now[0] = 30.0
        job.advance(task)
        text = io.StringIO()
        Console(file=text, width=100).print(job.get_renderable())
    assert "comparing" in text.getvalue() and "25%, 01:30 left" in text.getvalue() and "1/4" in text.getvalue()

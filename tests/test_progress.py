"""The progress bar: rate, unit, time that is left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress, Task

from slitlamp.progress import LeftColumn, RateColumn, progress_bar, working


def rendered(seconds: float, done: int) -> tuple[str, str]:
    """Rate and time left of a task of 100 that has done so many items, one after the other, in so many seconds."""
    now = [0.0]
    bar = Progress(get_time=lambda: now[0], disable=True, speed_estimate_period=1e6)
    bar.add_task("", total=100)
    task: Task = bar.tasks[0]
    for _ in range(done):
        now[0] += seconds / done
        bar.advance(task.id)
    left = LeftColumn().render(task)
    return RateColumn("items").render(task).plain, left.plain


def test_rate_and_time_left() -> None:
    assert rendered(10.0, 20) == ("2 items/s", "0:00:40 left")
    assert rendered(100.0, 10) == ("6 items/min", "0:15:00 left")
    assert rendered(0.0, 0)[0] == ""
    assert rendered(75.0, 100)[1] == "0:01:15"


def test_a_bar_that_is_not_shown_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (False, True):
        with progress_bar(shown, unit="runs") as bar:
            bar.advance(bar.add_task("causal check", total=1))
        with working(shown, "scores"):
            pass
        written = capsys.readouterr()
        assert written.out == ""
        assert ("causal check" in written.err) == shown


def test_columns_fit_a_terminal() -> None:
    bar = progress_bar(False)
    bar.advance(bar.add_task("head_reinforcement_random · emoji_scenes/pope_adversarial", total=1000), 500)
    stream = io.StringIO()
    Console(file=stream, width=80).print(bar.make_tasks_table(bar.tasks))
    (line,) = stream.getvalue().strip().splitlines()
    assert "500/1000" in line
    assert "left" in line

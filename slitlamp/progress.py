"""The progress bar of anything that takes longer than two seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text


class RateColumn(ProgressColumn):
    """How many a second; of slow work, how many a minute; nothing before the first."""

    def __init__(self, unit: str) -> None:
        super().__init__(Column(no_wrap=True))
        self._unit = unit

    def render(self, task: Task) -> Text:
        """As in "3.2 items/s"."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        often = f"{speed:.3g} {self._unit}/s" if speed >= 0.5 else f"{60 * speed:.3g} {self._unit}/min"
        return Text(often, style="progress.data.speed")


class LeftColumn(TimeRemainingColumn):
    """The time that is left; once it is done, the time it took."""

    def render(self, task: Task) -> Text:
        """As in "0:01:30 left"."""
        if task.finished:
            return Text(str(timedelta(seconds=int(task.finished_time or 0))), style="progress.elapsed")
        return super().render(task).append(" left")


@contextmanager
def working(shown: bool, what: str) -> Iterator[None]:
    """Say what is going on while something runs whose length is not known: a spinner, and for how long it has been."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        bar.add_task(what, total=None)
        yield


def progress_bar(shown: bool, *more: ProgressColumn, unit: str = "items") -> Progress:
    """A progress bar on standard error with the rate and the time that is left, or one that draws nothing.

    Args:
        shown: whether it draws.
        more: columns before the times.
        unit: what is counted.
    """
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=28)),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        RateColumn(unit),
        *more,
        LeftColumn(table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        disable=not shown,
        speed_estimate_period=120.0,  # a batch may take a minute
    )

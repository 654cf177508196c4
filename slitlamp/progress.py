"""The progress bar of anything that takes longer than two seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
from rich.text import Text


class RateColumn(ProgressColumn):
    """How many a second; of slow work, how many a minute; nothing before the first."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """As in "3.2 items/s"."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        often = f"{speed:.3g} {self._unit}/s" if speed >= 0.5 else f"{60 * speed:.3g} {self._unit}/min"
        return Text(often, style="progress.data.speed")


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
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(unit),
        *more,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
        speed_estimate_period=120.0,  # a batch may take a minute
    )

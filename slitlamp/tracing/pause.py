"""Pausing a run: what it attached to the model lies idle while the model runs over something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Pause:
    """Whether the hooks of one run lie idle.

    A run that is paused records nothing, edits nothing and counts no forward call. What needs more than a look at `on` (the
    attention tap, which holds who watches a module) is told of every change.

    Args:
        on: whether the run is paused from the start.
    """

    def __init__(self, on: bool = False) -> None:
        self.on = on
        self._told: list[Callable[[bool], None]] = []

    def tell(self, function: Callable[[bool], None]) -> None:
        """Call a function with True when the run is paused and with False when it goes on."""
        self._told.append(function)

    def forget(self, function: Callable[[bool], None]) -> None:
        """Tell a function no more."""
        self._told.remove(function)

    def idle(self) -> bool:
        """Whether the run is paused."""
        return self.on

    def over(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that does nothing (gives None) while the run is paused."""

        def hook(*args: Any) -> Any:
            return None if self.on else function(*args)

        return hook

    @contextmanager
    def set(self, on: bool) -> Iterator[None]:
        """Pause the run, or let it go on, for the time of a `with`."""
        before = self.on
        self._turn(on)
        try:
            yield
        finally:
            self._turn(before)

    def _turn(self, on: bool) -> None:
        if on != self.on:
            self.on = on
            for function in self._told:
                function(on)

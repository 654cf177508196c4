"""What draws, reports and shows results lies above the packages that hold them, so it is found by entry point."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any, Final

from slitlamp.errors import UnsupportedError

REPORTERS: Final = "slitlamp.reporters"


def reporter(name: str) -> Callable[..., Any]:
    """The reporter of a name, from the entry points `slitlamp.reporters`.

    Raises:
        UnsupportedError: no installed package provides it.
    """
    found = _find(name)
    if found is None:
        raise UnsupportedError(
            f"no installed package provides {name!r} in the entry points {REPORTERS!r}; install slitlamp (pip install -e .)"
        )
    return found


def html_of(name: str, value: object) -> str | None:
    """A value as HTML for Jupyter; None, for which Jupyter shows its text, where no installed package provides it."""
    found = _find(name)
    return None if found is None else str(found(value))


def _find(name: str) -> Callable[..., Any] | None:
    for point in metadata.entry_points(group=REPORTERS, name=name):
        loaded: Callable[..., Any] = point.load()
        return loaded
    return None

"""The errors that slitlamp raises. Each message says what was wrong, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SlitlampError(Exception):
    """Any error that slitlamp raises on purpose."""


class InputError(SlitlampError, ValueError):
    """Something that the user gave cannot be used: an image, a prompt, a file, a parameter."""


class UnknownNameError(InputError):
    """A name that slitlamp does not know; the message lists the nearest known ones."""


class MissingModelError(InputError):
    """A model that is named by a folder that is not there."""


class UnsupportedError(SlitlampError, ValueError):
    """A model family, a module or a combination that slitlamp does not support."""


class RunFolderError(SlitlampError, ValueError):
    """A run folder that cannot be written, or that another configuration made."""


class StoreError(SlitlampError, ValueError):
    """An activation store that cannot be read or written, or that another model or other sites made."""


class NonFiniteError(SlitlampError, ArithmeticError):
    """NaN or infinity among recorded activations."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known names that resemble `name` most, best first; empty if none does."""
    return difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for an unknown name of some kind (a site, a key, a probe), with the nearest known names."""
    names = sorted(known)
    close = nearest(name, names)
    hint = f"did you mean {' or '.join(repr(one) for one in close)}?" if close else f"known: {', '.join(names)}"
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}")

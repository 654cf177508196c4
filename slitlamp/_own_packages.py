"""The check that `probes` and `interventions` are this distribution's own, not others of the same name."""

from __future__ import annotations

import importlib.util
import os
from importlib.machinery import ModuleSpec

HOME = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
"""The folder that holds slitlamp/, probes/ and interventions/: site-packages, or the root of a repository."""


def _location(spec: ModuleSpec) -> str | None:
    """The folder of a package or the file of a module; None for what has neither (a built-in, an empty namespace)."""
    if spec.submodule_search_locations:
        return os.path.realpath(next(iter(spec.submodule_search_locations)))
    return os.path.realpath(spec.origin) if spec.has_location and spec.origin else None


def check_own(name: str) -> None:
    """Raise ImportError when `import name` would find something else than this distribution's package.

    Nothing is imported. The names are common ones, and a folder `probes/` in the working directory, or another
    distribution's, comes first on `sys.path` without a word: what follows would be an AttributeError far away.

    Args:
        name: a top-level package of this distribution.

    Raises:
        ImportError: names the file or folder that is in the way and what to do.
    """
    own = os.path.join(HOME, name)
    spec = importlib.util.find_spec(name)
    found = None if spec is None else _location(spec)
    if spec is None or found is None:
        # Nothing hides it: it is not on the path at all, and `import probes` says so in Python's own words.
        return
    if found == own:
        return
    raise ImportError(
        f"slitlamp's package '{name}' ({own}) is hidden by {found}: Python finds that one first, through "
        f"{os.path.dirname(found)} on sys.path. Rename it, or start Python from another folder."
    )

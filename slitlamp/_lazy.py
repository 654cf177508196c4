"""Names of a package that are imported when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slitlamp.errors import nearest


def lazy_names(
    package: str, public: Sequence[str], places: Mapping[str, tuple[str, str | None]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
        package: its name.
        public: what tab completion shows.
        places: public name -> module and attribute, or None for the module itself.
    """

    def get(name: str) -> Any:
        if name not in places:
            near = nearest(name, places, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise AttributeError(f"module '{package}' has no attribute '{name}'{hint}")
        module_name, attribute = places[name]
        module = importlib.import_module(module_name)
        value = module if attribute is None else getattr(module, attribute)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted(public)

"""Names of conditions and data sets: they become names of files, so they are checked."""

from __future__ import annotations

import re

from slitlamp.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*(/[A-Za-z0-9][A-Za-z0-9_.+-]*)*")


def check_name(kind: str, name: str, *, folders: bool = False) -> str:
    """Return the name; raise InputError if it cannot be part of a file's name. `folders` allows '/' between parts."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ("/" in name and not folders):
        raise InputError(
            f"{kind} {name!r}: a name holds letters, digits and _ . + -, and starts with a letter or digit"
        )
    return name

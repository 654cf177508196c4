"""Reading JSON, JSON Lines and their mistakes: every error names the file and the line."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slitlamp.errors import InputError


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file (with or without a byte order mark)."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def read_json(path: str | Path) -> Any:
    """The value in a JSON file."""
    return _decode(path, read_text(path))


def read_records(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file, or of one JSON array over any number of lines, each with its line number.

    In an array the number is the line on which the object begins. Blank lines are skipped; an empty file is an error.
    """
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: is empty; expected JSON Lines or a JSON array")
    records = _array(path, text) if text.lstrip().startswith("[") else _lines(path, text)
    for line, value in records:
        if not isinstance(value, dict):
            raise InputError(f"{path}:{line}: expected a JSON object, found {type(value).__name__}")
    return records


def write_lines(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSON Lines file, whole or not at all."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file with LF line ends, whole or not at all."""
    target = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile("wb", dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(text.encode("utf-8"))
        # NamedTemporaryFile makes private files; a data file gets the rights that open() would give it.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(target)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _decode(path: str | Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{first_line + error.lineno - 1}: is not valid JSON: {error.msg}") from error


def _lines(path: str | Path, text: str) -> list[tuple[int, Any]]:
    # Only LF and CRLF end a line: str.splitlines would also cut at separators that JSON strings may hold.
    return [(i, _decode(path, line, i)) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _array(path: str | Path, text: str) -> list[tuple[int, Any]]:
    """The elements of a JSON array, decoded one by one so that each has its line."""
    values = _decode(path, text)
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    records = []
    for _ in values:
        while text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        value, position = decoder.raw_decode(text, position)
        records.append((line, value))
    return records

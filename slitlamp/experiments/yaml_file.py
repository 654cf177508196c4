"""YAML files with the line of every key, so that an error can say where it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from slitlamp.errors import InputError

Key = tuple[str, ...]


@dataclass
class YamlFile:
    """The content of a YAML file and the line (from 1) of every entry.

    Attributes:
        name: how messages call the file.
        values: mappings, lists and scalars (`yaml.safe_load`).
        lines: line of the entry at each path of keys; items of a list have their index as key.
        overridden: what `set_value` changed, as the user wrote it.
    """

    name: str
    values: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)
    overridden: dict[Key, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> YamlFile:
        """Read a file. Raises InputError, with file and line, when it is missing, malformed or repeats a key."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise InputError(f"no such file: {path}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, name: str = "<text>") -> YamlFile:
        """The same from a text."""
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{name}:{mark.line + 1}" if mark else name
            raise InputError(f"{place}: malformed YAML: {getattr(error, 'problem', None) or error}") from error
        if not isinstance(values, dict):
            raise InputError(f"{name}: expected keys and values, found {type(values).__name__}")
        lines: dict[Key, int] = {}
        for key, line in _walk(node, (), name):
            lines[key] = line
        return cls(name, values, lines)

    def place(self, key: Sequence[str | int]) -> str:
        """'file:line' of an entry, or of the nearest entry around it; what `--set` changed is named as such."""
        path = tuple(str(part) for part in key)
        for n in range(len(path), -1, -1):
            if path[:n] in self.overridden:
                return f"--set {self.overridden[path[:n]]}"
            if path[:n] in self.lines:
                return f"{self.name}:{self.lines[path[:n]]}"
        return self.name

    def set_value(self, assignment: str) -> None:
        """Apply an override 'a.b=value'; the value is YAML, a number in the path is an index into a list."""
        path, separator, text = assignment.partition("=")
        keys = tuple(path.strip().split("."))
        if not separator or not all(keys):
            raise InputError(f"--set {assignment!r}: expected key=value, for example --set batch_size=8")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--set {assignment}: the value is malformed YAML") from error
        holder: Any = self.values
        for depth, key in enumerate(keys):
            last = depth == len(keys) - 1
            if isinstance(holder, dict):
                if last:
                    holder[key] = value
                else:
                    if holder.get(key) is None:
                        holder[key] = {}
                    holder = holder[key]
            elif isinstance(holder, list) and key.isdigit() and int(key) < len(holder):
                if last:
                    holder[int(key)] = value
                else:
                    holder = holder[int(key)]
            else:
                here = ".".join(keys[:depth])
                kind = f"a list of {len(holder)}" if isinstance(holder, list) else f"{holder!r}"
                raise InputError(f"--set {assignment}: {here!r} is {kind} and has no entry {key!r}")
        self.overridden[keys] = assignment


def _walk(node: yaml.Node | None, path: Key, name: str) -> Iterator[tuple[Key, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise InputError(f"{name}:{line}: the key {key!r} is here twice; the first is in line {seen[key]}")
            seen[key] = line
            yield (*path, key), line
            yield from _walk(value_node, (*path, key), name)
    elif isinstance(node, yaml.SequenceNode):
        for i, entry in enumerate(node.value):
            yield (*path, str(i)), entry.start_mark.line + 1
            yield from _walk(entry, (*path, str(i)), name)

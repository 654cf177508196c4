"""Probes and interventions by name, through the entry points `slitlamp.probes` and `slitlamp.interventions`.

A package of anybody adds its own by declaring an entry point in its pyproject.toml:

    [project.entry-points."slitlamp.probes"]
    MyProbe = "my_package.my_probe:MyProbe"
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from slitlamp.errors import InputError, unknown
from slitlamp.experiments.places import inside, recorded

GROUPS = {"probe": "slitlamp.probes", "intervention": "slitlamp.interventions"}


def names(kind: str) -> list[str]:
    """The names of all installed probes or interventions; nothing is imported."""
    return sorted(_points(kind))


def _points(kind: str) -> dict[str, metadata.EntryPoint]:
    points: dict[str, metadata.EntryPoint] = {}
    for point in metadata.entry_points(group=GROUPS[kind]):
        other = points.setdefault(point.name, point)
        if other.value != point.value:
            raise InputError(
                f"two packages provide a {kind} named {point.name!r}: {other.value} ({_package(other)}) and "
                f"{point.value} ({_package(point)}); uninstall one of them"
            )
    return points


def _package(point: metadata.EntryPoint) -> str:
    return str(point.dist.metadata["Name"]) if point.dist else "unknown package"


def find(kind: str, name: str) -> type[Any]:
    """The class of a probe or intervention.

    Raises UnknownNameError, with the nearest names, or InputError when it cannot be imported.
    """
    points = _points(kind)
    if name not in points:
        raise unknown(kind, name, points)
    try:
        found = points[name].load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"the {kind} {name!r} ({points[name].value}) cannot be imported: {error}") from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise InputError(f"the {kind} {name!r} ({points[name].value}) is not a dataclass")
    return found


def create(
    kind: str, name: str, parameters: Mapping[str, Any] | None = None, folders: Sequence[Path] | None = None
) -> Any:
    """A probe or intervention by name, its parameters checked against the dataclass: names first, then types.

    With `folders`, parameters that may be a `Path` are files inside one of them; see `places.inside`.
    """
    return build(kind, name, find(kind, name), parameters or {}, folders)


def build(
    kind: str, name: str, cls: type[Any], parameters: Mapping[str, Any], folders: Sequence[Path] | None = None
) -> Any:
    """An instance of a dataclass from plain values (those of a YAML file)."""
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in parameters:
        if key not in known:
            raise unknown(f"parameter of the {kind} {name}:", key, known)
    hints = _hints(cls)
    values = {key: _checked(kind, name, key, value, hints.get(key)) for key, value in parameters.items()}
    if folders is not None:
        for key in _files(values, hints):
            values[key] = inside(values[key], folders, f"{kind} {name}, {key}")
            if not values[key].exists():
                raise InputError(f"{kind} {name}, {key}: no such file: {values[key]}")
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError(f"{kind} {name}: {error}") from error


def _hints(cls: type[Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a hint imported for type checkers only: the class itself has to check that parameter
        return {}


def _files(values: Mapping[str, Any], hints: Mapping[str, Any]) -> list[str]:
    """The parameters whose values name a file."""
    return [
        key
        for key, value in values.items()
        if isinstance(value, str | Path) and Path in (hints.get(key), *typing.get_args(hints.get(key)))
    ]


def files_of(component: Any) -> Iterator[Path]:
    """The files that a probe or an intervention reads."""
    values = {field.name: getattr(component, field.name) for field in dataclasses.fields(component) if field.init}
    yield from (Path(values[key]) for key in _files(values, _hints(type(component))))


def _checked(kind: str, name: str, key: str, value: Any, hint: Any) -> Any:
    if hint is None:
        return value
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{kind} {name}, parameter {key!r}: {first['msg']}; found {value!r}") from error


def describe(component: Any) -> dict[str, dict[str, Any]]:
    """A probe or intervention as plain values, `{class name: {parameter: value}}`: what a configuration file holds."""
    fields = {
        field.name: _plain(getattr(component, field.name)) for field in dataclasses.fields(component) if field.init
    }
    return {type(component).__name__: fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, set | frozenset | range):
        return [_plain(entry) for entry in sorted(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return recorded(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return repr(value)

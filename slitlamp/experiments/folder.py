"""The folder of a run: which configuration made it, which units of work are done, and who may write to it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from slitlamp.errors import RunFolderError
from slitlamp.experiments import storage

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
PREDICTIONS = "predictions.parquet"
PARTS = "parts"
TABLES = "tables"
STATES = "states"
MODELS = "models"
FIGURES = "figures"
SHOWCASE = "showcase"
VIEWER = "viewer"
REPORT = "report.html"
_MARKER = ".slitlamp-run"
_WRITE_TEST = ".write-test."
_OURS = (CONFIG, ENVIRONMENT, PREDICTIONS, PARTS, TABLES, STATES, MODELS, FIGURES, SHOWCASE, VIEWER, REPORT)


@dataclass
class Unit:
    """One piece of work that is done or not: a chunk of the items of a data set under one condition."""

    condition: str
    dataset: str
    chunk: int

    @property
    def file(self) -> str:
        """The path below parts/."""
        return f"{self.condition}/{self.dataset.replace('/', '.')}/{self.chunk:06d}.safetensors"


@dataclass
class UnitResult:
    """What a unit left behind: the rows of its predictions, the states of the probes, and what it cost."""

    predictions: list[dict[str, Any]]
    states: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class RunFolder:
    """A run folder being written. `open` before writing; every file in it is whole or absent."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check_writable(self) -> None:
        """Raise RunFolderError when the folder, or the nearest existing folder above it, cannot be written."""
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"the output {self.path} is a file; a run needs a folder")
        existing = self.path
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise RunFolderError(f"cannot create the run folder {self.path}: {existing} is not a folder")
        probe = existing / f"{_WRITE_TEST}{os.getpid()}"
        try:
            probe.touch()
            probe.unlink(missing_ok=True)  # a process of the same number on another machine may have been faster
        except OSError as error:
            raise RunFolderError(
                f"cannot write to {existing} (for the run folder {self.path}): {error.strerror}"
            ) from error
        if self.path.is_dir() and self._holds_files() and not (self.path / _MARKER).exists():
            raise RunFolderError(
                f"{self.path} holds files and was not made by slitlamp; choose another output folder or an empty one"
            )

    def _holds_files(self) -> bool:
        return any(not one.name.startswith(_WRITE_TEST) for one in self.path.iterdir())  # another process's test

    def check_config(self, config: Mapping[str, Any], title: str = "configuration") -> None:
        """Raise RunFolderError, with what differs, when another configuration made this folder."""
        path = self.path / CONFIG
        if path.exists():
            found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            self._refuse(differences(found, _plain(config)), title)

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """The same for what is not in the configuration: data, weights, versions."""
        path = self.path / ENVIRONMENT
        if path.exists():
            known = storage.read_json(path)
            found = {key: known[key] for key in identity if key in known}
            self._refuse(differences(found, _plain(identity)), "identity (data, weights, versions)")

    def _refuse(self, different: list[str], title: str) -> None:
        if not different:
            return
        shown = "\n  ".join(different[:8]) + (f"\n  ... and {len(different) - 8} more" if len(different) > 8 else "")
        raise RunFolderError(
            f"the run folder {self.path} was made with another {title}:\n  {shown}\n"
            "choose another output folder, or overwrite this one (overwrite=True, --overwrite)"
        )

    @contextlib.contextmanager
    def open(self, config: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[None]:
        """Hold the folder for this process: create it, check the configuration, clear what a kill left half-written."""
        self.check_writable()
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / _MARKER).touch()
        with self._lock():
            if overwrite:
                self.clear()
            self.check_config(config)
            storage.remove_partial(self.path)
            storage.write_yaml(self.path / CONFIG, _plain(config))
            yield

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            import fcntl
        except ImportError:  # Windows: no advisory lock; every file is still written whole
            yield
            return
        with (self.path / _MARKER).open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunFolderError(f"another process is writing to the run folder {self.path}") from error
            yield  # the lock goes with the process, a SIGKILL included

    def clear(self) -> None:
        """Delete the files of an earlier run, and nothing else."""
        for name in _OURS:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def unit_path(self, unit: Unit) -> Path:
        """The file of a finished unit."""
        return self.path / PARTS / unit.file

    def write_part(self, unit: Unit, part: UnitResult) -> None:
        """Store a finished unit in one step."""
        arrays = {f"array/{name}": value for name, value in part.arrays.items()}
        for name, state in part.states.items():
            arrays |= {f"state/{name}/{key}": value for key, value in state.items()}
        metadata = {
            "predictions": json.dumps(part.predictions, ensure_ascii=False),
            "states": json.dumps(sorted(part.states)),
            "seconds": json.dumps(part.seconds),
        }
        storage.write_arrays(self.unit_path(unit), arrays, metadata)

    def read_part(self, unit: Unit) -> UnitResult:
        """Read a finished unit."""
        arrays, metadata = storage.read_arrays(self.unit_path(unit))
        part = UnitResult(
            predictions=json.loads(metadata["predictions"]),
            states={name: {} for name in json.loads(metadata["states"])},
            seconds=json.loads(metadata["seconds"]),
        )
        for key, value in arrays.items():
            kind, _, rest = key.partition("/")
            if kind == "array":
                part.arrays[rest] = value
            else:
                name, _, entry = rest.partition("/")
                part.states[name][entry] = value
        return part

    def has_part(self, unit: Unit) -> bool:
        """Whether a unit is done."""
        return self.unit_path(unit).exists()

    def remove_parts(self) -> None:
        """Delete the files of all units, once the tables hold what was in them."""
        shutil.rmtree(self.path / PARTS, ignore_errors=True)

    def state_path(self, key: str, condition: str, dataset: str) -> Path:
        """The file of what a probe took in under a condition on a data set."""
        return self.path / STATES / f"{key}.{condition}.{dataset.replace('/', '.')}.safetensors"

    def write_table(self, name: str, frame: pd.DataFrame) -> None:
        """Write tables/<name>.parquet."""
        storage.write_table(self._table_path(name), frame)

    def has_table(self, name: str) -> bool:
        """Whether tables/<name>.parquet is there."""
        return self._table_path(name).exists()

    def read_table(self, name: str) -> pd.DataFrame:
        """Read tables/<name>.parquet."""
        return storage.read_table(self._table_path(name))

    def _table_path(self, name: str) -> Path:
        return self.path / TABLES / f"{name}.parquet"


def _plain(value: Any) -> Any:
    """What a value is after a round trip through YAML or JSON: mappings, lists and scalars."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """The entries in which two configurations differ, as lines 'a.b: the folder has 1, this run has 2'."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        keys = [*found, *(key for key in wanted if key not in found)]
        nothing = object()
        lines: list[str] = []
        for key in keys:
            below = f"{path}.{key}" if path else str(key)
            one, two = found.get(key, nothing), wanted.get(key, nothing)
            if one is nothing:
                lines.append(f"{below}: the folder has nothing, this run has {two!r}")
            elif two is nothing:
                lines.append(f"{below}: the folder has {one!r}, this run has nothing")
            else:
                lines += differences(one, two, below)
        return lines
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        return [
            line
            for i, (a, b) in enumerate(zip(found, wanted, strict=True))
            for line in differences(a, b, f"{path}.{i}")
        ]
    return [] if found == wanted else [f"{path}: the folder has {found!r}, this run has {wanted!r}"]

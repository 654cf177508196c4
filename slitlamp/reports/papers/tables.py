"""The tables of a run folder, or of its published copy, read when they are asked for; and which experiment it is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd
import yaml

from slitlamp.experiments import storage
from slitlamp.experiments.folder import CONFIG, ENVIRONMENT, TABLES
from slitlamp.experiments.places import data_folders
from slitlamp.reports.papers.claims import Claim

TIMING: Final = "timing"


class FolderTables(Mapping[str, pd.DataFrame]):
    """Tables by name, of parquet files (a run) or CSV files (a published copy); and `timing`: columns step, seconds."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = {
            path.stem: path
            for ending in ("csv", "parquet")
            for path in sorted((self.folder / TABLES).glob(f"*.{ending}"))
        }
        self._read: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self._read:
            self._read[name] = self._timing() if name == TIMING else _table(self._files[name])
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        yield from (*self._files, TIMING)

    def __len__(self) -> int:
        return len(self._files) + 1

    def _timing(self) -> pd.DataFrame:
        path = self.folder / ENVIRONMENT
        timing: dict[str, Any] = storage.read_json(path).get("timing", {}) if path.is_file() else {}
        return pd.DataFrame(list(timing.items()), columns=["step", "seconds"])


def _table(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        return storage.read_table(path)
    return pd.read_csv(path, keep_default_na=False, na_values=[""])  # "none" and the like are names here


def experiment_of(folder: str | Path, claims: Sequence[Claim]) -> str:
    """The experiment with claims that a run is of: by the folder's name, else by the title of its configuration; "" for none."""
    names = {claim.experiment for claim in claims}
    name = Path(folder).resolve().name
    if name in names:
        return name
    title = _title(Path(folder) / CONFIG)
    for known in data_folders("experiments"):
        for one in sorted(names):
            if title and _title(known / f"{one}.yaml") == title:
                return one
    return ""


def _title(path: Path) -> str:
    """The title in a configuration; "" where there is none."""
    if not path.is_file():
        return ""
    return str((yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("title") or "")

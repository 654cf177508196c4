"""What a report reads of a run folder: its tables, configuration and environment, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from slitlamp.errors import RunFolderError
from slitlamp.reports.style import ConditionStyle, condition_styles, short_names

MANY = 24
"""Conditions beyond which figures of all conditions leave controls to those of verdicts, and, of more without controls, no curves
are drawn: nobody could tell them apart.
"""


@dataclass(frozen=True)
class Condition:
    """One condition: its role (reference, treatment, control or pair), whose control it is, and what it does in words."""

    name: str
    role: str
    control_of: str | None = None
    description: str = ""


@dataclass
class RunData:
    """The contents of a run folder, read when they are asked for. A table that is not there is None."""

    folder: Path
    _tables: dict[str, pd.DataFrame | None] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        if not self.folder.is_dir():
            raise RunFolderError(f"no run folder at {self.folder}")
        if not (self.folder / "tables").is_dir() and not (self.folder / "config.yaml").exists():
            raise RunFolderError(f"{self.folder} is not a finished run: it has neither tables/ nor config.yaml")
        if self.environment.get("finished") is False:
            raise RunFolderError(f"the run in {self.folder} has not ended; run it again to finish it")

    def table(self, name: str, *needed: str) -> pd.DataFrame | None:
        """A table by name; None where it is missing, empty, or lacks a needed column."""
        if name not in self._tables:
            path = self.folder / "tables" / f"{name}.parquet"
            self._tables[name] = _read(path) if path.is_file() else None
        frame = self._tables[name]
        if frame is None or frame.empty or any(column not in frame.columns for column in needed):
            return None
        return frame

    def probe_table(self, kind: str, *needed: str) -> pd.DataFrame | None:
        """A table of a head divergence probe ("heads", "tokens", "t_vhd"), of the reference and, if there is one, on captions."""
        ending = f"_{kind}"
        names = [one for one in self.table_names if one.startswith("head_divergence") and one.endswith(ending)]
        for name in sorted(names, key=len):
            frame = self.table(name, *needed)
            if frame is None or "model" in frame.columns:
                continue
            if "condition" in frame.columns:
                known = list(frame["condition"].astype(str).unique())
                frame = frame[
                    frame["condition"].astype(str) == (self.reference if self.reference in known else known[0])
                ]
            if "dataset" in frame.columns:
                names = list(frame["dataset"].astype(str).unique())
                frame = frame[
                    frame["dataset"].astype(str) == next((one for one in names if "caption" in one), names[0])
                ]
            if not frame.empty:
                return frame.reset_index(drop=True)
        return None

    def tokens(self) -> pd.DataFrame | None:
        """T-VHD per generated word, where it was measured."""
        frame = self.probe_table("tokens", "label")
        return frame if frame is not None and any(str(name).startswith("t_vhd_") for name in frame.columns) else None

    @cached_property
    def table_names(self) -> list[str]:
        """Names of all tables of the run."""
        return sorted(path.stem for path in (self.folder / "tables").glob("*.parquet"))

    @cached_property
    def config_text(self) -> str:
        """The configuration as written."""
        path = self.folder / "config.yaml"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration; empty where there is none."""
        loaded = yaml.safe_load(self.config_text) if self.config_text else {}
        return dict(loaded) if isinstance(loaded, Mapping) else {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, model, device and seed of the run; empty where they were not written."""
        from slitlamp.experiments.storage import read_json

        path = self.folder / "environment.json"
        loaded = read_json(path) if path.is_file() else {}
        return dict(loaded) if isinstance(loaded, Mapping) else {}

    @property
    def level(self) -> str:
        """The level of the intervals, as "95 %"."""
        level = self.config.get("level", 0.95)
        return f"{100 * level:.4g} %" if isinstance(level, int | float) else "95 %"

    def fact(self, key: str) -> Any:
        """An entry of the environment, wherever it stands; None where it was not written."""
        identity = self.environment.get("identity")
        return self.environment.get(key, identity.get(key) if isinstance(identity, Mapping) else None)

    @cached_property
    def conditions(self) -> list[Condition]:
        """The conditions in the order of the run, the reference first."""
        info = self.table("condition_info", "condition")
        rows = info.to_dict("records") if info is not None else self.environment.get("conditions")
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) and "condition" in row for row in rows):
            return [_condition(row, first=i == 0) for i, row in enumerate(rows)]
        return self._inferred_conditions()

    def _inferred_conditions(self) -> list[Condition]:
        """Without a list of them: what the tables name. A reference other than the first is a control."""
        names: list[str] = []
        for table in ("conditions", "chair_rows", "chair_mentions", "pope_items", "recall_curve"):
            frame = self.table(table, "condition")
            if frame is not None:
                names += [str(name) for name in frame["condition"].unique() if str(name) not in names]
        control_of: dict[str, str] = {}
        differences = self.table("differences", "condition", "reference")
        if differences is not None:
            for one, other in differences[["condition", "reference"]].drop_duplicates().itertuples(index=False):
                if names and other != names[0]:
                    control_of.setdefault(str(other), str(one))
        return [
            Condition(
                name, "reference" if i == 0 else "control" if name in control_of else "treatment", control_of.get(name)
            )
            for i, name in enumerate(names)
        ]

    @property
    def condition_names(self) -> list[str]:
        """Names of the conditions, the reference first."""
        return [condition.name for condition in self.conditions]

    @property
    def drawn(self) -> list[str]:
        """Names of the conditions that are in figures of all conditions: no pairs, and of more than `MANY` no controls."""
        alone = [one for one in self.conditions if one.role != "pair"]
        return [one.name for one in alone if len(alone) <= MANY or one.role != "control"]

    def drawn_table(self, name: str, *needed: str) -> pd.DataFrame | None:
        """The rows of a table that are of the conditions of `drawn`; None where there is none."""
        frame = self.table(name, "condition", *needed)
        if frame is None:
            return None
        kept = frame[frame["condition"].astype(str).isin(self.drawn)]
        return None if kept.empty else kept

    @property
    def reference(self) -> str | None:
        """The condition that the others are compared with."""
        return next((one.name for one in self.conditions if one.role == "reference"), None)

    @cached_property
    def styles(self) -> dict[str, ConditionStyle]:
        """How every condition is drawn in every figure of this run."""
        return condition_styles(self.condition_names, {one.name: one.role for one in self.conditions})

    @cached_property
    def short(self) -> dict[str, str]:
        """Names of conditions for axes and legends."""
        return short_names(self.condition_names)

    def image(self, relative: str) -> Path | None:
        """The path of an image of this folder; None where it is missing or lies outside of the folder."""
        path = (self.folder / str(relative)).resolve()
        return path if path.is_relative_to(self.folder.resolve()) and path.is_file() else None


def _condition(row: Mapping[str, Any], first: bool) -> Condition:
    def text(key: str) -> str:
        value = row.get(key)
        return "" if value is None or (isinstance(value, float) and pd.isna(value)) else str(value)

    role = text("role") or ("reference" if first else "treatment")
    return Condition(text("condition"), role, text("control_of") or None, text("description"))


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"cannot read the table {path.name} of the run {path.parent.parent}: {error}") from error

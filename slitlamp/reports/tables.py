"""The tables of a report: conditions with intervals and differences, comparisons with controls, and whole tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from slitlamp.reports import findings
from slitlamp.reports.data import RunData
from slitlamp.reports.metrics import Metric, metric, split_name
from slitlamp.reports.wording import Estimate, number

MAX_ROWS = 400
"""Rows of a whole table that the report shows; the parquet file has them all."""


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and under it a second line (a difference), which stands out where it excludes zero."""

    text: str
    below: str = ""
    strong: bool = False


@dataclass
class Table:
    """A table for the template: a caption, the heads of its columns, and rows that begin with a name."""

    caption: str
    heads: list[str]
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)


def headline_columns(data: RunData) -> list[tuple[str, Metric, str]]:
    """The columns of the headline table: data set, metric, head."""
    columns: list[tuple[str, Metric, str]] = []
    for dataset in findings.caption_datasets(data)[:1]:
        for name in ("chair_i", "chair_s", "recall", "mean_words"):
            columns.append((dataset, metric(name), metric(name).label))
    for dataset in findings.pope_datasets(data):
        columns.append((dataset, metric("accuracy"), f"POPE accuracy, {split_name(dataset)}"))
    table = data.table("conditions", "dataset", "metric")
    known = set() if table is None else set(zip(table["dataset"].astype(str), table["metric"], strict=True))
    return [(dataset, info, head) for dataset, info, head in columns if (dataset, info.name) in known]


def headline_table(data: RunData) -> Table | None:
    """Every condition with its numbers, and under each number the paired difference to the reference."""
    scores, columns = (
        data.table("conditions", "condition", "dataset", "metric", "value", "low", "high"),
        headline_columns(data),
    )
    if scores is None or not columns:
        return None
    arrows = {"lower": " ↓", "higher": " ↑"}
    table = Table(
        f"Conditions: value [{data.level} interval], and below it the paired difference Δ to “{data.reference}” (bold "
        "where its interval excludes zero). ↓ lower is better, ↑ higher is better.",
        ["condition", *(head + arrows.get(info.better, "") for _, info, head in columns)],
    )
    for name in data.condition_names:
        cells = []
        for dataset, info, _ in columns:
            value = findings.estimate(scores, condition=name, dataset=dataset, metric=info.name)
            change = None
            if data.reference is not None and name != data.reference:
                change = findings.difference(data, name, data.reference, dataset, info.name)
            cells.append(_cell(value, change, info.digits))
        table.rows.append((name, cells))
    return table


def control_table(data: RunData) -> Table | None:
    """Every treatment minus each of its controls."""
    columns = headline_columns(data)
    table = Table(
        f"Treatments minus their controls: paired difference [{data.level} interval], bold where it excludes zero.",
        ["comparison", *(head for _, _, head in columns)],
    )
    for control in (one for one in data.conditions if one.role == "control" and one.control_of):
        cells = []
        for dataset, info, _ in columns:
            direct = findings.difference(data, str(control.control_of), control.name, dataset, info.name)
            text = "–" if direct is None else direct.text(info.digits, signed=True)
            cells.append(Cell(text, strong=direct is not None and direct.excludes(0.0)))
        if any(cell.text != "–" for cell in cells):
            table.rows.append((f"{control.control_of} − {control.name}", cells))
    return table if table.rows else None


def whole_table(data: RunData, name: str) -> Table | None:
    """A table of the run as it is, its first rows."""
    frame = data.table(name)
    if frame is None:
        return None
    shown = f", the first {MAX_ROWS:,} of {len(frame):,} rows" if len(frame) > MAX_ROWS else ""
    table = Table(f"{name}{shown}", [str(column) for column in frame.columns])
    for row in frame.head(MAX_ROWS).itertuples(index=False):
        texts = [_plain(value) for value in row]
        table.rows.append((texts[0], [Cell(text) for text in texts[1:]]))
    return table


def facts(entries: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested entries as lines of name and text, in their order."""
    lines: list[tuple[str, str]] = []
    for key, value in entries.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            lines += facts(value, f"{name}.")
        elif isinstance(value, list):
            lines.append((name, ", ".join(_plain(one) for one in value) or "–"))
        else:
            lines.append((name, _plain(value)))
    return lines


def _cell(value: Estimate | None, change: Estimate | None, digits: int) -> Cell:
    text = "–" if value is None or not value.defined else value.text(digits)
    if change is None or not change.defined:
        return Cell(text)
    return Cell(text, f"Δ {change.text(digits, signed=True)}", change.excludes(0.0))


def _plain(value: Any) -> str:
    if value is None or value is pd.NA or value is pd.NaT:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return (
            number(float(value), 4)
            if np.isfinite(value) and not float(value).is_integer()
            else f"{value:g}"
            if np.isfinite(value)
            else "–"
        )
    if isinstance(value, np.ndarray | list | tuple):
        return ", ".join(_plain(one) for one in value)
    return str(value)

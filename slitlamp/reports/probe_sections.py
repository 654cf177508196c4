"""The figures of a run's probes, as figures of the run: drawn from its tables by what each probe declares."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, Final

import pandas as pd

from slitlamp.reports import causal
from slitlamp.reports.data import RunData
from slitlamp.reports.drawing import Drawing, Tables

FIRST: Final = "token_ledger"
"""The probe whose figures come before all others."""
_DRAWN_ELSEWHERE: Final = {"head_divergence": {"head_map", "head_intervals", "t_vhd_histogram"}}
"""Figures that the report draws itself, together with others."""
_NAMED: Final = 3
"""Most parameters that a title names."""


def probe_keys(data: RunData) -> list[str]:
    """The names that the tables of the run's probes start with, in the order of its configuration."""
    known = data.environment.get("probes")
    keys = list(known) if isinstance(known, dict) else []
    return sorted(keys, key=lambda key: not key.startswith(FIRST))


def drawings(key: str) -> dict[str, Drawing]:
    """What the probe behind a key declares; a second probe of a name has a number after it."""
    for name in (key, key.rstrip("0123456789").rstrip("_")):
        found: dict[str, Drawing] = {}
        for point in entry_points(group="slitlamp.probe_figures", name=name):
            found |= point.load()
        if found:
            hidden = _DRAWN_ELSEWHERE.get(name, set())
            return {one: drawing for one, drawing in found.items() if one not in hidden}
    return {}


def probe_tables(data: RunData, key: str) -> dict[str, pd.DataFrame]:
    """The tables of a probe by its own names for them, of the first condition and data set that it measured, and those of its
    comparisons; in a run on several models, the latter alone.
    """
    longer = [one for one in probe_keys(data) if one != key and one.startswith(f"{key}_")]
    compared = f"{key}_compare_"
    tables: dict[str, pd.DataFrame] = {}
    for name in data.table_names:
        if not name.startswith(f"{key}_") or any(name.startswith(f"{one}_") for one in longer):
            continue
        frame = data.table(name)
        if frame is None:
            continue
        if name.startswith(compared):
            tables[name.removeprefix(compared)] = frame
        elif "model" not in frame.columns or "condition" not in frame.columns:
            tables.setdefault(name.removeprefix(f"{key}_"), _first_part(frame))
    return tables


def _first_part(frame: pd.DataFrame) -> pd.DataFrame:
    for column in ("condition", "dataset"):
        if column in frame.columns:
            frame = frame[frame[column] == frame[column].iloc[0]].drop(columns=column)
    return frame.reset_index(drop=True)


def part_text(data: RunData, key: str) -> str:
    """Which condition and data set `probe_tables` shows, for a caption; empty where that is plain."""
    summary = data.table(f"{key}_summary", "condition", "dataset")
    if summary is None or "model" in summary.columns or len(summary) < 2:
        return ""
    one = summary.iloc[0]
    return f" Shown: {one['dataset']}, condition {one['condition']}."


def summary_text(data: RunData, key: str) -> list[str]:
    """What the probe found, in its own words; where it compared parts, what it found in that too."""
    lines = []
    for name in (f"{key}_summary", f"{key}_compare_summary"):
        frame = data.table(name, "summary")
        if frame is not None and not ("model" in frame.columns and name == f"{key}_summary"):
            said = [str(text).partition(" Causal check: ")[0] for text in frame["summary"]]  # that has its own figure
            lines += [text for text in said if text][:1]
    return lines


def declared(data: RunData) -> dict[str, tuple[Drawing, str, list[str]]]:
    """Name of the figure -> (drawing, key of the probe, sentences on what it shows)."""
    found: dict[str, tuple[Drawing, str, list[str]]] = {}
    for key in probe_keys(data):
        said = summary_text(data, key)
        for name, drawing in {**drawings(key), "causal": causal.DRAWING}.items():
            lines = causal.sentences(probe_tables(data, key)) if name == "causal" else said
            found[f"{key}_{name}"] = (drawing, key, lines)
            if name != "causal":
                said = []
    return found


def tables_of(data: RunData, key: str) -> Tables:
    """`probe_tables`, kept for the time of a report."""
    cache: dict[str, Tables] = data.__dict__.setdefault("_probe_tables", {})
    if key not in cache:
        cache[key] = probe_tables(data, key)
    return cache[key]


def difference(data: RunData, key: str) -> str:
    """How a probe differs from the others of its kind in the run, by its parameters; empty where it is the only one."""
    places, entries = data.environment.get("probes"), data.config.get("probes")
    if not isinstance(places, dict) or not isinstance(entries, list):
        return ""
    given = {one: _entry(entries[place]) for one, place in places.items() if place < len(entries)}
    kind, mine = given.get(key, ("", {}))
    others = [parameters for one, (name, parameters) in given.items() if name == kind and one != key]
    differing = [name for name, value in mine.items() if any(other.get(name) != value for other in others)]
    return ", ".join(f"{name.replace('_', ' ')}: {_said(mine[name])}" for name in differing[:_NAMED])


def _entry(entry: Any) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a probe in a configuration: `Name`, `{Name: {...}}` or `{name: Name, parameters: {...}}`."""
    if not isinstance(entry, dict):
        return str(entry), {}
    if "name" in entry:
        return str(entry["name"]), dict(entry.get("parameters") or {})
    ((name, parameters),) = entry.items()
    return str(name), dict(parameters or {})


def _said(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(str, value))
    return "not set" if value is None else str(value).replace("_", " ")


def headline(data: RunData) -> list[str]:
    """The sentences at the top of the report that come from probes: those of the token ledger."""
    from slitlamp.reports.token_ledger import ledger_headline

    keys = [key for key in probe_keys(data) if key.startswith(FIRST)]
    return ledger_headline(tables_of(data, keys[0])) if keys else []

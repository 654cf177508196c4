"""What a run found, in a few plain lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from slitlamp.experiments.run import Run
from slitlamp.experiments.verdicts import VERDICTS

FEW = 3
"""Most treatments with lines of their own; of more, the verdicts are said."""


def summary(run: Run) -> list[str]:
    """One line each: POPE of the reference, CHAIR of the reference, what every treatment changes, and what its controls do.

    Of more than `FEW` treatments, which verdict each has, metric by metric.

    Numbers carry their 95 % intervals over images (or those of the run's level).
    """
    if "conditions" not in run.table_names:
        return _probes(run)
    scores, info = run.table("conditions"), run.table("condition_info")
    reference = str(info["condition"].iloc[0])
    lines = [line for task in ("pope", "captions") if (line := _level(scores, reference, task))]
    if "differences" not in run.table_names:
        return lines + _probes(run)
    verdicts = run.table("verdicts") if "verdicts" in run.table_names else None
    if verdicts is not None and verdicts["treatment"].nunique() > FEW:
        return lines + _verdicts(verdicts) + _probes(run)
    differences = run.table("differences")
    for treatment in info.loc[info["role"] == "treatment", "condition"].astype(str):
        controls = [str(one) for one in info.loc[info["control_of"] == treatment, "condition"]]
        lines += _changes(differences, treatment, reference, controls)
    return lines + _probes(run)


def _probes(run: Run) -> list[str]:
    """What each probe found, in its own words; with several models or data sets, what it found in comparing them."""
    lines = []
    for key in dict.fromkeys(name.rsplit("_summary", 1)[0] for name in run.table_names if name.endswith("_summary")):
        if not key.endswith("_compare"):
            compared = f"{key}_compare_summary" in run.table_names
            frame = run.table(f"{key}_compare_summary" if compared else f"{key}_summary")
            lines += [f"{key}: {text}" for text in frame["summary"].astype(str) if text]
    return lines


def _level(scores: pd.DataFrame, condition: str, task: str) -> str | None:
    rows = scores[(scores["condition"] == condition) & (scores["task"] == task)]
    if rows.empty:
        return None
    dataset = _main_dataset(rows)
    rows = rows[rows["dataset"] == dataset].set_index("metric")
    if task == "pope":
        shown = (f"accuracy {_text(rows.loc['accuracy'])}", f"yes ratio {_text(rows.loc['yes_ratio'])}")
        n = f"{int(rows['n_questions'].iloc[0])} questions on {int(rows['n_images'].iloc[0])} images"
    else:
        shown = (f"CHAIR_i {_text(rows.loc['chair_i'])}", f"recall {_text(rows.loc['recall'])}")
        n = f"{int(rows['n_images'].iloc[0])} captions"
    return f"{condition} on {dataset}: {', '.join(shown)} ({n})"


def _changes(differences: pd.DataFrame, treatment: str, reference: str, controls: list[str]) -> list[str]:
    lines = []
    for task, metric, name in (("captions", "chair_i", "CHAIR_i"), ("pope", "accuracy", "POPE accuracy")):
        rows = differences[(differences["task"] == task) & (differences["metric"] == metric)]
        if rows.empty:
            continue
        rows = rows[rows["dataset"] == _main_dataset(rows)].set_index(["condition", "reference"])
        parts = [f"{one} {_text(rows.loc[one, reference], sign=True)}" for one in (treatment, *controls)]
        lines.append(f"{name} against {reference}: {'; '.join(parts)}")
        if controls and metric == "chair_i":
            parts = [f"{one} {_text(rows.loc[treatment, one], sign=True)}" for one in controls]
            lines.append(f"{name} of {treatment} beyond its controls: {'; '.join(parts)}")
    return lines


def _verdicts(table: pd.DataFrame) -> list[str]:
    """A line per metric: the treatments by verdict, the best first."""
    lines = []
    for metric, name in (("chair_i", "CHAIR_i"), ("chair_i_matched", "CHAIR_i at equal recall"), ("f1", "POPE F1")):
        rows = table[table["metric"] == metric]
        if rows.empty:
            continue
        rows = rows[rows["dataset"] == _main_dataset(rows)]
        found = {one: ", ".join(rows.loc[rows["verdict"] == one, "treatment"].astype(str)) for one in VERDICTS}
        lines.append(f"{name}: {'; '.join(f'{one}: {names}' for one, names in found.items() if names)}")
    return lines


def _main_dataset(rows: pd.DataFrame) -> str:
    """The splits together where they are; otherwise the first."""
    names = [str(name) for name in rows["dataset"].unique()]
    return next((name for name in names if name.endswith("pope_all")), names[0])


def _text(row: Mapping[str, Any] | pd.Series, *, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    if pd.isna(row["low"]):
        return f"{row['value']:{form}} (too few images for an interval)"
    return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"

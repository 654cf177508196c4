"""Verdicts: what every treatment does against the reference, and whether that goes beyond what its matched controls do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd

from slitlamp.evaluation.statistics import holm

METRICS: Final = {"captions": ("chair_i", "chair_i_matched", "chair_s", "recall"), "pope": ("accuracy", "f1")}
"""The metrics of a verdict, by task; `chair_i_matched` is CHAIR_i at the highest recall that both sides reach."""
LOWER_IS_BETTER: Final = frozenset({"chair_i", "chair_i_matched", "chair_s"})

BEATS_ALL: Final = "beats the reference and every control"
NOT_ALL: Final = "beats the reference, not every control"
NO_CONTROL: Final = "beats the reference, no control run"
NOTHING: Final = "nothing shown"
HARMS: Final = "harms"
VERDICTS: Final = (BEATS_ALL, NOT_ALL, NO_CONTROL, NOTHING, HARMS)
"""What a verdict can be, best first."""

_SCORES = ("value", "low", "high", "p", "n_images")
_Row = dict[str, Any]


def verdict_tables(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The verdicts on a run, from its tables; nothing is resampled anew.

    A treatment beats the reference where the interval of treatment - reference lies beyond zero on the good side, and harms
    where it lies beyond zero on the other. It beats its controls where the same holds of treatment - control for every control
    that was run. Intervals are not corrected for the number of treatments; p_holm is (Holm, over the treatments of a data set
    and metric).

    Args:
        tables: of a run: condition_info, differences, and matched_differences where there are captions.

    Returns:
        verdicts: a row per data set, metric and treatment: treatment, dataset, task, metric, better ("lower" or "higher"), value,
        low, high, p, p_holm (against the reference), n_images, n_controls, control (the strongest: the one whose difference to
        the treatment is least on the good side; None without controls), control_value, control_low, control_high, control_p
        (treatment - that control), beats_reference, beats_controls (missing without controls), verdict (one of `VERDICTS`).
        verdict_controls: a row per data set, metric, treatment and control: treatment, dataset, task, metric, control, and value,
        low, high, p, n_images of treatment - control.
        Neither where the run compares no treatment.
    """
    info = tables["condition_info"]
    reference = str(info["condition"].iloc[0])
    names = info.loc[info["role"] == "treatment", "condition"].astype(str).tolist()
    controls = {name: info.loc[info["control_of"] == name, "condition"].astype(str).tolist() for name in names}
    rows: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = []
    for (dataset, task, metric), found in _effects(tables).items():
        for name in names:
            if (name, reference) not in found:
                continue
            here = {"treatment": name, "dataset": dataset, "task": task, "metric": metric}
            against = {one: found[name, one] for one in controls[name] if (name, one) in found}
            beside += [{**here, "control": one, **row} for one, row in against.items()]
            rows.append(here | _verdict(metric, found[name, reference], against))
    if not rows:
        return {}
    verdicts = pd.DataFrame(rows).astype({"beats_controls": "boolean", "control": object})
    adjusted = verdicts.groupby(["dataset", "metric"], sort=False)["p"].transform(holm)
    verdicts.insert(verdicts.columns.get_loc("p") + 1, "p_holm", adjusted)
    return {"verdicts": verdicts} | ({"verdict_controls": pd.DataFrame(beside)} if beside else {})


def _effects(tables: Mapping[str, pd.DataFrame]) -> dict[tuple[str, str, str], dict[tuple[str, str], _Row]]:
    """By data set, task and metric: (condition, reference) -> the paired difference."""
    parts = [tables["differences"]] if "differences" in tables else []
    if "matched_differences" in tables:
        parts.append(tables["matched_differences"].assign(task="captions", metric="chair_i_matched"))
    rows = [row for part in parts for row in part.to_dict("records")]
    found: dict[tuple[str, str, str], dict[tuple[str, str], _Row]] = {}
    for dataset, task in dict.fromkeys((str(row["dataset"]), str(row["task"])) for row in rows):
        for metric in METRICS[task]:
            own = {
                (str(row["condition"]), str(row["reference"])): {key: row[key] for key in _SCORES}
                for row in rows
                if (row["dataset"], row["task"], row["metric"]) == (dataset, task, metric)
            }
            if own:
                found[dataset, task, metric] = own
    return found


def _verdict(metric: str, effect: _Row, against: Mapping[str, _Row]) -> _Row:
    """The columns of `verdicts` that follow from a treatment's difference to the reference and to each of its controls."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    beats, harms = (_beyond_zero(effect, side) for side in (sign, -sign))
    beats_controls = all(_beyond_zero(row, sign) for row in against.values()) if against else None
    # A difference that is not defined is no gain: such a control counts as the strongest.
    strongest = min(against, key=lambda one: np.nan_to_num(sign * against[one]["value"], nan=-np.inf), default=None)
    least = against[strongest] if strongest is not None else dict.fromkeys(_SCORES, np.nan)
    if beats:
        verdict = NO_CONTROL if beats_controls is None else BEATS_ALL if beats_controls else NOT_ALL
    else:
        verdict = HARMS if harms else NOTHING
    return {
        "better": "lower" if sign < 0 else "higher",
        **effect,
        "n_controls": len(against),
        "control": strongest,
        **{f"control_{key}": least[key] for key in _SCORES if key != "n_images"},
        "beats_reference": beats,
        "beats_controls": beats_controls,
        "verdict": verdict,
    }


def _beyond_zero(row: _Row, sign: int) -> bool:
    """Whether an interval lies beyond zero on one side; False where there is none."""
    return bool(row["low"] > 0) if sign > 0 else bool(row["high"] < 0)

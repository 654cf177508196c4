"""Verdicts from made-up tables: what each is follows from the signs of its intervals, which are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from slitlamp.experiments import verdicts as known
from slitlamp.experiments.verdicts import VERDICTS, verdict_tables

CAPTIONS = "scenes/captions"


def info(*treatments: str, **controls: list[str]) -> pd.DataFrame:
    rows: list[tuple[str, str, str | None]] = [("base", "reference", None)]
    for name in treatments:
        rows += [(name, "treatment", None), *((f"{name}_{one}", "control", name) for one in controls.get(name, []))]
    rows.append(("a+b", "pair", None))
    return pd.DataFrame(rows, columns=["condition", "role", "control_of"])


def difference(condition: str, reference: str, low: float, high: float, **more: Any) -> dict[str, Any]:
    row = {"condition": condition, "reference": reference, "dataset": CAPTIONS, "task": "captions", "metric": "chair_i"}
    value = (low + high) / 2
    return {
        **row,
        "value": value,
        "low": low,
        "high": high,
        "p": 0.01 if low * high > 0 else 0.4,
        "n_images": 9,
        **more,
    }


def one_verdict(effect: tuple[float, float], *controls: tuple[float, float], metric: str = "chair_i") -> pd.Series:
    names = [f"c{number}" for number in range(len(controls))]
    rows = [difference("a", "base", *effect, metric=metric)]
    rows += [difference("a", f"a_{name}", *ends, metric=metric) for name, ends in zip(names, controls, strict=True)]
    rows += [difference(f"a_{name}", "base", -1, 1, metric=metric) for name in names]
    rows.append(difference("a+b", "base", -3, -2, metric=metric))
    table = verdict_tables({"condition_info": info("a", a=names), "differences": pd.DataFrame(rows)})["verdicts"]
    assert len(table) == 1
    return table.iloc[0]


@pytest.mark.parametrize(
    ("effect", "controls", "verdict"),
    [
        ((-3, -1), [(-2, -1), (-9, -0.1)], known.BEATS_ALL),
        ((-3, -1), [(-2, -1), (-9, 0.1)], known.NOT_ALL),
        ((-3, -1), [(-2, -1), (1, 2)], known.NOT_ALL),
        ((-3, -1), [(-2, -1), (np.nan, np.nan)], known.NOT_ALL),
        ((-3, -1), [], known.NO_CONTROL),
        ((-3, 1), [(-2, -1)], known.NOTHING),
        ((-3, 0), [(-2, -1)], known.NOTHING),
        ((np.nan, np.nan), [(-2, -1)], known.NOTHING),
        ((1, 3), [(-2, -1)], known.HARMS),
    ],
)
def test_the_verdict_follows_from_the_intervals(
    effect: tuple[float, float], controls: list[tuple[float, float]], verdict: str
) -> None:
    """And for a metric of which more is better, from the same intervals turned over."""
    turned = [(-high, -low) for low, high in [effect, *controls]]
    for row in (one_verdict(effect, *controls), one_verdict(turned[0], *turned[1:], metric="recall")):
        assert row["verdict"] == verdict
        assert verdict in VERDICTS
        assert row["beats_reference"] == (effect[1] < 0)
        if controls:
            assert row["beats_controls"] == all(high < 0 for _, high in controls)
        else:
            assert row["beats_controls"] is pd.NA
        assert row["n_controls"] == len(controls)


def test_the_strongest_control_is_the_one_that_is_closest_or_ahead() -> None:
    row = one_verdict((-3, -1), (-9, -1), (-2, 3), (-2, -1))
    assert (row["better"], row["control"]) == ("lower", "a_c1")
    assert (row["control_value"], row["control_low"], row["control_high"]) == (0.5, -2, 3)
    assert one_verdict((1, 3), (1, 9), (-2, 3), (1, 2), metric="recall")["control"] == "a_c1"
    assert one_verdict((-3, -1), (-9, -1), (np.nan, np.nan))["control"] == "a_c1"
    none = one_verdict((-3, -1))
    assert none["control"] is None
    assert np.isnan(none["control_value"])


def test_p_is_adjusted_over_the_treatments_of_a_metric() -> None:
    rows = [difference(name, "base", -1, 1, p=p) for name, p in (("a", 0.03), ("b", 0.01), ("c", 0.04))]
    rows += [difference("a", "base", -1, 1, metric="recall", p=0.02)]
    rows += [
        difference("a", "base", -1, 1, dataset="other", p=0.5),
        difference("b", "base", -1, 1, dataset="other", p=0.1),
    ]
    table = verdict_tables({"condition_info": info("a", "b", "c"), "differences": pd.DataFrame(rows)})["verdicts"]
    found = table.set_index(["dataset", "metric", "treatment"])["p_holm"].sort_index()
    assert found[CAPTIONS, "chair_i"].to_dict() == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert found[CAPTIONS, "recall"].to_dict() == pytest.approx({"a": 0.02})
    assert found["other", "chair_i"].to_dict() == pytest.approx({"a": 0.5, "b": 0.2})


def test_controls_have_rows_of_their_own_and_recall_is_matched() -> None:
    rows = [difference("a", "base", -3, -1), difference("a", "a_x", -2, 1), difference("a", "a_y", -2, -1)]
    matched = [difference("a", "base", -2, 1), difference("a", "a_x", -1, 3), difference("a", "a_y", -5, -4)]
    tables = verdict_tables(
        {
            "condition_info": info("a", a=["x", "y"]),
            "differences": pd.DataFrame(rows),
            "matched_differences": pd.DataFrame(matched).drop(columns=["task", "metric"]).assign(recall=0.5),
        }
    )
    verdicts, controls = tables["verdicts"], tables["verdict_controls"]
    assert verdicts["metric"].tolist() == ["chair_i", "chair_i_matched"]
    assert verdicts["verdict"].tolist() == [known.NOT_ALL, known.NOTHING]
    shown = controls[["metric", "control", "low", "high"]].to_records(index=False).tolist()
    assert shown == [
        ("chair_i", "a_x", -2, 1),
        ("chair_i", "a_y", -2, -1),
        ("chair_i_matched", "a_x", -1, 3),
        ("chair_i_matched", "a_y", -5, -4),
    ]


def test_a_run_without_treatments_or_scores_has_no_verdicts() -> None:
    assert verdict_tables({"condition_info": info()}) == {}
    assert verdict_tables({"condition_info": info("a")}) == {}
    pairs = pd.DataFrame([difference("a+b", "base", -1, 1)])
    assert verdict_tables({"condition_info": info(), "differences": pairs}) == {}

"""Figures that compare conditions: POPE, CHAIR, and paired differences. Each draws one panel on one Axes."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from slitlamp.reports.draw import (
    Names,
    Styles,
    category_axis,
    interval_point,
    need,
    pad_limits,
    reference_line,
    styles_and_names,
)
from slitlamp.reports.metrics import Metric, metric, split_name
from slitlamp.reports.style import GREY, axes_or_new, styled
from slitlamp.reports.wording import Estimate


@styled
def conditions_panel(
    table: pd.DataFrame,
    measure: Metric | str,
    ax: Axes | None = None,
    *,
    styles: Styles | None = None,
    names: Names | None = None,
    reference: str | None = None,
    title: str = "",
) -> Axes:
    """One number of every condition with its interval; a dashed line at the reference condition.

    Args:
        table: columns condition, value, low, high (and metric: rows of other metrics are left out).
        measure: the metric, or its name.
        ax: where to draw; a new figure if None.
        styles: look of each condition.
        names: short names of conditions.
        reference: the condition whose value is marked by the line; none if None.
        title: title of the panel; the name of the metric if empty.
    """
    need(table, "condition", "value", "low", "high")
    info = metric(measure) if isinstance(measure, str) else measure
    rows = table[table["metric"] == info.name] if "metric" in table else table
    styles, names = styles_and_names(rows["condition"], styles, names)
    ax = axes_or_new(ax, height=0.6 + 0.3 * max(len(rows), 1))
    order = [str(name) for name in rows["condition"]]
    for position, row in enumerate(rows.to_dict("records")):
        name = str(row["condition"])
        interval_point(ax, position, Estimate.of(row), styles[name])
        if name == reference and math.isfinite(float(row["value"])):
            reference_line(ax, float(row["value"]))
    category_axis(ax, [names.get(name, name) for name in order])
    pad_limits(ax, *extremes(rows))
    ax.xaxis.set_major_locator(locator())
    ax.set_title(title or info.label)
    ax.set_xlabel(info.unit)
    return ax


@styled
def pope_panel(
    table: pd.DataFrame,
    measure: Metric | str = "accuracy",
    ax: Axes | None = None,
    *,
    styles: Styles | None = None,
    names: Names | None = None,
) -> Axes:
    """One POPE number by split (rows) and condition (markers), with intervals and the line of chance.

    Args:
        table: columns condition, dataset, metric, value, low, high.
        measure: the metric, or its name.
        ax: where to draw; a new figure if None.
        styles: look of each condition.
        names: short names of conditions.
    """
    need(table, "condition", "dataset", "metric", "value", "low", "high")
    info = metric(measure, "pope") if isinstance(measure, str) else measure
    rows = table[table["metric"] == info.name]
    styles, names = styles_and_names(table["condition"], styles, names)
    conditions = list(dict.fromkeys(str(name) for name in rows["condition"]))
    datasets = list(dict.fromkeys(str(name) for name in rows["dataset"]))
    ax = axes_or_new(ax, height=0.7 + 0.16 * max(len(rows), 1))
    step = 0.72 / max(len(conditions), 1)
    for row in rows.to_dict("records"):
        offset = (conditions.index(str(row["condition"])) - (len(conditions) - 1) / 2) * step
        interval_point(
            ax, datasets.index(str(row["dataset"])) + offset, Estimate.of(row), styles[str(row["condition"])]
        )
    for border in range(1, len(datasets)):
        ax.axhline(border - 0.5, color="#e6e6e6", linewidth=0.8, zorder=0)
    chance = math.nan if info.chance is None else info.chance
    reference_line(ax, chance, info.chance_name, kind="chance")
    category_axis(ax, [split_name(name) for name in datasets])
    pad_limits(ax, *extremes(rows), include=(chance,))
    ax.xaxis.set_major_locator(locator())
    ax.set_title(info.label, pad=15 if info.chance is not None else None)
    ax.set_xlabel(info.unit)
    return ax


@styled
def differences_panel(
    table: pd.DataFrame,
    measure: Metric | str,
    ax: Axes | None = None,
    *,
    styles: Styles | None = None,
    names: Names | None = None,
    title: str = "",
) -> Axes:
    """Paired differences of one number to the reference, with the line of no difference.

    The bar is thick where the interval excludes zero and thin where it does not.

    Args:
        table: columns condition, value, low, high (and metric: rows of other metrics are left out).
        measure: the metric, or its name.
        ax: where to draw; a new figure if None.
        styles: look of each condition.
        names: short names of conditions.
        title: title of the panel; the name of the metric if empty.
    """
    need(table, "condition", "value", "low", "high")
    info = metric(measure) if isinstance(measure, str) else measure
    rows = table[table["metric"] == info.name] if "metric" in table else table
    styles, names = styles_and_names(rows["condition"], styles, names)
    ax = axes_or_new(ax, height=0.6 + 0.3 * max(len(rows), 1))
    for position, row in enumerate(rows.to_dict("records")):
        estimate = Estimate.of(row)
        interval_point(ax, position, estimate, styles[str(row["condition"])], strong=estimate.excludes(0.0))
    reference_line(ax, 0.0, kind="zero")
    category_axis(ax, [names.get(str(name), str(name)) for name in rows["condition"]])
    pad_limits(ax, *extremes(rows), include=(0.0,))
    ax.xaxis.set_major_locator(locator())
    ax.set_title(title or info.label, pad=15)
    better_way(ax, info)
    ax.set_xlabel(f"difference ({info.unit})" if info.unit else "difference")
    return ax


def better_way(ax: Axes, info: Metric) -> None:
    """Above the right corner, which way is better, where one is."""
    better = {"lower": "← better", "higher": "better →"}.get(info.better, "")
    ax.annotate(
        better, (1, 1), xycoords="axes fraction", xytext=(0, 3), textcoords="offset points", ha="right", va="bottom",
        fontsize=8, color=GREY, label="_better",
    )  # fmt: skip


def extremes(rows: pd.DataFrame) -> tuple[float, float]:
    """The least and the greatest of value, low and high; NaN where there is none."""
    values = rows[["value", "low", "high"]].to_numpy(dtype=np.float64)
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (math.nan, math.nan)


def locator(n: int = 4) -> MaxNLocator:
    """Few, round ticks."""
    return MaxNLocator(nbins=n, steps=[1, 2, 2.5, 5, 10])

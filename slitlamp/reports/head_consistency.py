"""Whether the vision-aware heads are the same everywhere (figure 10 of VHR), and under every way of removing the image."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slitlamp.reports import heads
from slitlamp.reports.draw import (
    category_axis,
    heat_map,
    interval_point,
    is_narrow,
    need,
    outer_labels,
    panel_grid,
    reference_line,
)
from slitlamp.reports.drawing import Tables
from slitlamp.reports.style import BLUE, GREEN, GREY, VERMILLION, ConditionStyle, axes_or_new, new_figure, styled
from slitlamp.reports.wording import Estimate, number

RANK, OVERLAP = ConditionStyle(BLUE, "o", "-", True), ConditionStyle(VERMILLION, "s", "-", False)


@styled
def agreement_panel(rows: pd.DataFrame, labels: list[str], value: str, ax: Axes | None = None) -> Axes:
    """Rank correlation ("spearman") or overlap of the top heads ("overlap") of several pairs of maps, against chance.

    Args:
        rows: columns spearman, low, high, overlap, overlap_low, overlap_high, overlap_chance, k.
        labels: of the rows.
        value: which.
        ax: where to draw; a new figure if None.
    """
    prefix = "" if value == "spearman" else "overlap_"
    need(rows, value, f"{prefix}low", f"{prefix}high", "overlap_chance", "k")
    ax = axes_or_new(ax, height=0.8 + 0.26 * len(rows))
    look = RANK if value == "spearman" else OVERLAP
    for place, row in enumerate(rows.to_dict("records")):
        interval_point(ax, place, Estimate(row[value], row[f"{prefix}low"], row[f"{prefix}high"]), look)
    chance = 0.0 if value == "spearman" else float(rows["overlap_chance"].iloc[0])
    reference_line(ax, chance, "chance", kind="chance")
    category_axis(ax, labels)
    ax.set_xlim(min(-0.05, float(np.nanmin([*rows[f"{prefix}low"], *rows[value], 0.0])) - 0.05), 1.02)
    ax.set_xlabel("rank correlation" if value == "spearman" else f"overlap of top {int(rows['k'].iloc[0])} heads")
    return ax


@styled
def _agreement(rows: pd.DataFrame, labels: list[str], width: float) -> Figure:
    tall = 0.85 + 0.3 * len(rows) * (1 + 0.5 * any("\n" in one for one in labels))
    figure, axes = panel_grid(width, 2, tall, extra=0)
    agreement_panel(rows, labels, "spearman", axes[0])
    agreement_panel(rows, labels, "overlap", axes[1])
    if not is_narrow(width):
        axes[1].set_yticklabels([])
    return figure


SHORT = {
    "first token, between items": "first token,\nbetween items",
    "object mentions, between items": "objects,\nbetween items",
    "object mentions, within an item": "objects,\nwithin an item",
    "first token against object mentions, of an item": "first token / objects,\nof an item",
    "first token against object mentions, mean maps": "first token / objects,\nmean maps",
}


def consistency(tables: Tables, width: float) -> Figure | None:
    """Agreement of the maps of heads between items, mentions and measuring points of one data set."""
    rows = tables.get("consistency")
    if rows is None or "overlap" not in rows or not rows["spearman"].notna().any():
        return None  # nothing, or a run of an earlier version, without intervals
    return _agreement(rows, [SHORT.get(str(one), str(one)) for one in rows["comparison"]], width)


def consistency_caption(tables: Tables) -> str:
    """What is drawn."""
    row = tables["consistency"].iloc[0]
    return (
        "How far two maps of all heads' VHD agree: rank correlation (left), and the heads in both top sets over the heads "
        f"in either (right). Measured between and within {int(row['n_items'])} items, with bootstrap intervals over items. "
        "Dashed: what random maps would give. Mean maps agree more than single ones, for they hold less noise."
    )


@styled
def steps_map(steps: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Rank correlation between decoding steps: above the diagonal of one caption, on and below it of different captions.

    Args:
        steps: columns step (0: the first token; 1, 2, ...: the mentions of objects), other, same_item, spearman.
        ax: where to draw; a new figure if None.
    """
    need(steps, "step", "other", "same_item", "spearman")
    ax = axes_or_new(ax, width=4.2, height=3.6)
    known = sorted({*steps["step"], *steps["other"]})
    grid = pd.DataFrame(np.nan, index=known, columns=known)
    for row in steps.to_dict("records"):
        one, two = int(row["step"]), int(row["other"])
        grid.loc[(one, two) if row["same_item"] else (two, one)] = row["spearman"]
    names = ["first\ntoken" if one == 0 else f"object {one}" for one in known]
    notes = grid.map(lambda one: number(one, 2))
    heat_map(grid, ax, 0, 1, notes=notes, square=True, label="rank correlation (chance 0)", shrink=0.8)
    ax.set_xticklabels(names, rotation=90)
    ax.set_yticklabels(names, rotation=0)
    ax.set_title("above: same caption; below: others", fontsize=8.5, fontweight="normal")
    return ax


@styled
def consistency_steps(tables: Tables, width: float) -> Figure | None:
    """The map of steps by steps."""
    steps = tables.get("consistency_steps")
    if steps is None or steps["step"].nunique() < 2 or not steps["spearman"].notna().any():
        return None
    figure = new_figure(min(width, 4.6), 3.6 if is_narrow(width) else 4.0)
    steps_map(steps, figure.add_subplot())
    return figure


def steps_caption(tables: Tables) -> str:
    """What is drawn."""
    rows = tables["consistency_steps"]
    return (
        "Rank correlation of single maps of the heads' VHD between the first token and the first, second, ... object that "
        f"a caption names. Above the diagonal the two steps are of one caption; on it and below, of different ones. Up to "
        f"{int(rows['n_items'].max())} captions; the table holds the intervals. 0 is chance."
    )


def contrasts(tables: Tables, width: float) -> Figure | None:
    """Agreement of the ways of removing the image, pair by pair."""
    rows = tables.get("contrasts")
    if rows is None or not rows["spearman"].notna().any():
        return None
    rows = rows[rows["level"] == "mean maps"]
    return _agreement(rows, [f"{row.contrast} / {row.other}" for row in rows.itertuples()], width)


def contrasts_caption(tables: Tables) -> str:
    """What is drawn."""
    rows = tables["contrasts"]
    return (
        "How far the mean VHD maps of two ways of removing the image agree at the first token: rank correlation, and overlap "
        f"of the top heads, over {int(rows['n_items'].iloc[0])} items; dashed, what random maps would give."
    )


@styled
def contrast_maps(tables: Tables, width: float) -> Figure | None:
    """The map of heads under every way of removing the image; a ring marks the heads that reinforcement would pick."""
    table = tables.get("contrast_maps")
    if table is None:
        return None
    names = list(dict.fromkeys(table["contrast"]))
    figure, axes = panel_grid(width, len(names), min(0.95 + 0.27 * table["layer"].nunique(), 5.0), columns=2, extra=0)
    for ax, name in zip(axes, names, strict=True):
        heads.head_map(table[table["contrast"] == name].reset_index(drop=True), ax).set_title(f"image {name}")
    outer_labels(axes)
    return figure


def contrast_maps_caption(tables: Tables) -> str:
    """What is drawn."""
    n = int(tables["contrast_maps"]["n_items"].iloc[0])
    return (
        f"Mean VHD of every head at the first token over {n} items, for each way of removing the image; each map has its own "
        "scale. Rings: heads that reinforcement would pick in at least half of the items."
    )


def points(tables: Tables, width: float) -> Figure | None:
    """Agreement between measuring points, data sets, conditions or models (the table of `compare`)."""
    rows = tables.get("points")
    if rows is None or not rows["spearman"].notna().any():
        return None
    labels = [
        f"{row['place']}\n{row['other_place']}"
        if row["varied"] == "place"
        else f"{row[row['varied']]} / {row['other_' + row['varied']]}\n{row['place']}"
        for row in rows.to_dict("records")
    ]
    return _agreement(rows, [one.replace("emoji_scenes/", "") for one in labels], width)


def points_caption(tables: Tables) -> str:
    """What is drawn."""
    rows = tables["points"]
    return (
        f"How far the mean VHD maps of two measuring points agree ({len(rows)} pairs that differ in one thing): rank "
        "correlation, and overlap of the top heads, with bootstrap intervals over items; dashed, what random maps would give."
    )


@styled
def outlier_rows(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Heads that the outlier rule zeroes per layer, with intervals; a cross where chance alone would put them.

    Args:
        table: columns layer, zeroed, low, high, expected; one contrast.
        ax: where to draw; a new figure if None.
    """
    need(table, "layer", "zeroed", "low", "high", "expected")
    ax = axes_or_new(ax, height=2.4)
    look = ConditionStyle(GREEN, "o", "-", True)
    for place, row in enumerate(table.to_dict("records")):
        interval_point(ax, place, Estimate(row["zeroed"], row["low"], row["high"]), look, horizontal=False)
        ax.plot(place, row["expected"], marker="x", color=GREY, linestyle="none", markersize=5, label="_expected")
    layers = [str(one) for one in table["layer"]]
    ax.set_xticks(range(len(layers)), labels=layers)
    if len(layers) > 16:
        for place, label in enumerate(ax.get_xticklabels()):
            label.set_visible(place % 4 == 0)
    ax.set_ylim(bottom=min(-0.03, -0.03 * float(table["high"].fillna(table["zeroed"]).max())))
    ax.set_xlabel("layer")
    ax.set_ylabel("heads zeroed")
    return ax


@styled
def outliers(tables: Tables, width: float) -> Figure | None:
    """The outlier rule by layer, one panel per way of removing the image."""
    table = tables.get("outliers")
    if table is None:
        return None
    names = list(dict.fromkeys(table["contrast"]))
    figure, axes = panel_grid(width, len(names), 2.0, columns=2, extra=0)
    for ax, name in zip(axes, names, strict=True):
        outlier_rows(table[table["contrast"] == name], ax).set_title(f"image {name}")
    outer_labels(axes)
    return figure


def outliers_caption(tables: Tables) -> str:
    """What is drawn."""
    row = tables["outliers"].iloc[0]
    return (
        f"How many of the {int(row['n_heads'])} heads of a layer the outlier rule sets to zero in an item (mean over "
        f"{int(row['n_items'])} items, bootstrap interval). Crosses: how many it would if a high VHD and a high activation "
        "without the image had nothing to do with each other."
    )

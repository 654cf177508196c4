"""The figures of `Subnetworks`: overlap of the weights that image and text tokens activate, and between tasks."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slitlamp.errors import InputError
from slitlamp.reports.draw import (
    band,
    category_axis,
    heat_map,
    interval_point,
    is_narrow,
    layer_axis,
    legend_below,
    need,
    outer_labels,
    panel_grid,
    reference_line,
)
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    ConditionStyle,
    axes_or_new,
    new_figure,
    styled,
)
from slitlamp.reports.wording import Estimate, number

LABEL: Final = "IoU"
FOUND: Final = ConditionStyle(BLUE, "o", "-", True)
CONTROLS: Final = {
    "image_halves": ("two halves of the items, image tokens", ConditionStyle(GREEN, "^", (0, (6, 1.5)), False)),
    "text_halves": ("two halves of the items, text tokens", ConditionStyle(PURPLE, "v", (0, (4, 1.5, 1, 1.5)), False)),
    "shuffled": ("same weights, shuffled text norms", ConditionStyle(ORANGE, "s", (0, (2, 1.2)), False)),
}
MAX_ANNOTATED: Final = 12
"""Largest number of rows of a heat map whose values are written into it."""


def _handles(found: str) -> list[Line2D]:
    looks = [(found, FOUND), *CONTROLS.values()]
    lines = [
        Line2D(
            [], [], color=look.colour, marker=look.marker, markerfacecolor=look.face, linestyle=look.line, markersize=5,
            label=name,
        )
        for name, look in looks
    ]  # fmt: skip
    return [*lines, Line2D([], [], color=GREY, linestyle=(0, (4, 2)), linewidth=1.0, label="random masks")]


@styled
def overlap_by_layer(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """IoU of one type of linear map by layer, with the band of its interval and its controls.

    Args:
        rows: of one type and sparsity: layer, iou, low, high, random, shuffled, image_halves, text_halves.
        ax: where to draw; a new figure if None.
    """
    need(rows, "layer", "iou", "low", "high", "random", *CONTROLS)
    ax, rows = axes_or_new(ax), rows.sort_values("layer")
    for column, (_, look) in CONTROLS.items():
        ax.plot(
            rows["layer"], rows[column], color=look.colour, linestyle=look.line, marker=look.marker, markersize=3.5,
            markerfacecolor="white", linewidth=1.1, label=f"_{column}",
        )  # fmt: skip
    band(ax, rows["layer"], rows["low"], rows["high"], BLUE, alpha=0.25)
    ax.plot(rows["layer"], rows["iou"], color=BLUE, marker="o", markersize=4, label="_iou")
    reference_line(ax, float(rows["random"].iloc[0]), horizontal=True, kind="chance")
    ax.set_ylim(0, 1.03)
    layer_axis(ax)
    ax.set_ylabel(LABEL)
    return ax


@styled
def overlap_by_type(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Mean IoU of each type of linear map, with its interval and its controls.

    Args:
        rows: of one sparsity: type, iou, low, high, random, shuffled, image_halves, text_halves.
        ax: where to draw; a new figure if None.
    """
    need(rows, "type", "iou", "low", "high", "random", *CONTROLS)
    ax = axes_or_new(ax, height=0.6 + 0.3 * len(rows))
    for place, row in enumerate(rows.to_dict("records")):
        for column, (_, look) in CONTROLS.items():
            interval_point(ax, place, Estimate(row[column], np.nan, np.nan), look)
        interval_point(ax, place, Estimate.of({**row, "value": row["iou"]}), FOUND)
    reference_line(ax, float(rows["random"].iloc[0]), kind="chance")
    category_axis(ax, [str(one) for one in rows["type"]])
    ax.set_xlim(0, 1.03)
    ax.set_xlabel(LABEL)
    return ax


@styled
def overlap_map(square: pd.DataFrame, ax: Axes | None = None, *, random: float = 0.0, small: bool = False) -> Axes:
    """IoU of every two sets of tokens; the colours begin at random masks.

    Args:
        square: names of the sets as index and columns.
        ax: where to draw; a new figure if None.
        random: the IoU of random masks.
        small: numbers in place of names below, the scale below the map, and no values in it.
    """
    if square.empty:
        raise InputError("this figure needs at least one row; the table is empty")
    ax = axes_or_new(ax, height=1.2 + 0.4 * len(square))
    notes = square.map(lambda one: number(one, 2)) if len(square) <= MAX_ANNOTATED and not small else None
    where = (
        {"label": LABEL, "location": "bottom", "pad": 0.06} if small else {"label": f"IoU (random masks: {random:.2f})"}
    )
    heat_map(square, ax, random, 1, notes=notes, shrink=0.85, **where)
    names = [str(one) for one in square.index]
    numbered = [f"{name}  {number}" for number, name in enumerate(names, 1)]
    ax.set_yticks(np.arange(len(names)) + 0.5, labels=numbered if small else names, rotation=0)
    if small:
        ax.set_xticks(
            np.arange(len(names)) + 0.5, labels=[str(number) for number in range(1, len(names) + 1)], rotation=0
        )
    else:
        ax.set_xticks(np.arange(len(names)) + 0.5, labels=names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_xlabel("")
    ax.set_ylabel("")
    return ax


@styled
def overlap_by_kind(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Mean IoU over the pairs of each kind, with its interval and the line of random masks.

    Args:
        rows: of one sparsity and all types: kind, iou, low, high, random, n_pairs.
        ax: where to draw; a new figure if None.
    """
    need(rows, "kind", "iou", "low", "high", "random", "n_pairs")
    ax = axes_or_new(ax, height=0.6 + 0.3 * len(rows))
    for place, row in enumerate(rows.to_dict("records")):
        look = FOUND if str(row["kind"]).startswith("image and text") else ConditionStyle(VERMILLION, "D", "-", True)
        interval_point(ax, place, Estimate.of({**row, "value": row["iou"]}), look)
    reference_line(ax, float(rows["random"].iloc[0]), "random masks", kind="chance")
    category_axis(ax, [f"{row['kind']} ({int(row['n_pairs'])})" for row in rows.to_dict("records")])
    ax.set_xlim(0, 1.03)
    ax.set_xlabel(LABEL)
    return ax


def _highest(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["sparsity"] == table["sparsity"].max()]


@styled
def _by_layer(tables: Tables, width: float) -> Figure | None:
    table = tables.get("iou")
    if table is None:
        return None
    rows = _highest(table)
    types = list(dict.fromkeys(rows["type"]))
    figure, axes = panel_grid(
        width, len(types), 1.45, columns=4, narrow_columns=2, extra=1.3 if is_narrow(width) else 0.8, sharey=True
    )
    for ax, name in zip(axes, types, strict=True):
        overlap_by_layer(rows[rows["type"] == name], ax).set_title(str(name))
    outer_labels(axes)
    legend_below(figure, _handles("image against text tokens"), columns=1 if is_narrow(width) else 2)
    return figure


@styled
def _by_type(tables: Tables, width: float) -> Figure | None:
    table = tables.get("iou_by_type")
    if table is None:
        return None
    sparsities = sorted(table["sparsity"].unique())
    figure, axes = panel_grid(width, len(sparsities), 0.6 + 0.24 * table["type"].nunique(), extra=0.8)
    for ax, sparsity in zip(axes, sparsities, strict=True):
        overlap_by_type(table[table["sparsity"] == sparsity], ax).set_title(f"{100 * sparsity:g} % of each row dropped")
    outer_labels(axes)
    legend_below(figure, _handles("image against text tokens"), columns=1 if is_narrow(width) else 2)
    return figure


def square_of(table: pd.DataFrame) -> pd.DataFrame | None:
    """The sets of tokens of one model and condition against each other, all types together, at the highest sparsity."""
    rows = _highest(table[table["type"] == "all"])
    rows = rows[(rows["model_a"] == rows["model_b"]) & (rows["condition_a"] == rows["condition_b"])]
    if rows.empty:
        return None
    first = rows[["model_a", "condition_a"]].iloc[0]
    rows = rows[(rows["model_a"] == first["model_a"]) & (rows["condition_a"] == first["condition_a"])]
    a = [f"{_short(one['dataset_a'])}, {one['tokens_a']}" for one in rows.to_dict("records")]
    b = [f"{_short(one['dataset_b'])}, {one['tokens_b']}" for one in rows.to_dict("records")]
    names = sorted({*a, *b}, key=lambda name: (name.rpartition(", ")[2], [*a, *b].index(name)))
    square = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
    square[square == 0] = np.nan
    for one, other, value in zip(a, b, rows["iou"], strict=True):
        square.loc[one, other] = square.loc[other, one] = value
    return square


def _short(dataset: object) -> str:
    """A data set without the collection it is from."""
    return str(dataset).rpartition("/")[2].replace("pope_", "POPE ")


@styled
def _tasks(tables: Tables, width: float) -> Figure | None:
    table = tables.get("tasks")
    square = None if table is None else square_of(table)
    if table is None or square is None or len(square) < 3:
        return None
    narrow = is_narrow(width)
    figure = new_figure(width, (0.26 if narrow else 0.36) * len(square) + (1.0 if narrow else 1.6))
    overlap_map(square, figure.add_subplot(), random=float(_highest(table)["random"].iloc[0]), small=narrow)
    return figure


@styled
def _kinds(tables: Tables, width: float) -> Figure | None:
    table = tables.get("tasks_by_kind")
    if table is None:
        return None
    rows = _highest(table[table["type"] == "all"])
    figure = new_figure(width, 0.9 + 0.27 * len(rows))
    overlap_by_kind(rows, figure.add_subplot())
    return figure


def _items(table: pd.DataFrame) -> str:
    return f"{int(table['n_items'].max())} items"


def _controls_text() -> str:
    return (
        " Open markers are controls: halves of the items within one kind of tokens (what the number of items allows), and the "
        "same weights with the text's norms dealt out at random to the inputs (what sharing the weights alone gives). The dashed "
        "line is the IoU of random masks."
    )


FIGURES: Final = {
    "iou_by_layer": Drawing(
        "Overlap of the weights that image and text tokens activate",
        lambda tables: (
            f"IoU of the weights with the highest Wanda scores ({100 * float(tables['iou']['sparsity'].max()):g} % of each row "
            f"dropped) for image and for text tokens, by linear map and layer; jackknife bands over {_items(tables['iou'])}."
            + _controls_text()
        ),
        _by_layer,
    ),
    "iou_by_type": Drawing(
        "Overlap by type of linear map",
        lambda tables: (
            f"Mean over layers of the IoU of the weights that image and text tokens activate, with jackknife intervals over "
            f"{_items(tables['iou_by_type'])}." + _controls_text()
        ),
        _by_type,
    ),
    "task_overlap": Drawing(
        "Overlap between tasks",
        lambda tables: (
            "Mean IoU over all linear maps of the weights that the image or text tokens of one data set and of another "
            "activate, at the highest sparsity. The colours begin at the IoU of random masks, which the same weights exceed "
            "whatever the tokens are. Image tokens before the text do not depend on it: tasks that share images share them."
        ),
        _tasks,
    ),
    "overlap_by_kind": Drawing(
        "Overlap between kinds of tokens, tasks and models",
        lambda tables: (
            "Mean IoU over all linear maps and over the pairs of each kind (their number in brackets), at the highest sparsity, "
            f"with jackknife intervals over {_items(tables['tasks_by_kind'])}; the dashed line is the IoU of random masks."
        ),
        _kinds,
    ),
}

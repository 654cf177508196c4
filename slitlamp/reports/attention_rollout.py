"""The figures of `AttentionRollout`: what falls inside of the object's box, and how it changes with depth."""

from __future__ import annotations

from typing import Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from slitlamp.reports.draw import (
    band,
    category_axis,
    interval_point,
    is_narrow,
    layer_axis,
    legend_below,
    need,
    outer_labels,
    panel_grid,
)
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    VERMILLION,
    ConditionStyle,
    axes_or_new,
    new_figure,
    styled,
)
from slitlamp.reports.wording import Estimate

LOOKS: Final = {
    "rollout": ConditionStyle(BLUE, "o", "-", True),
    "attention": ConditionStyle(VERMILLION, "s", (0, (5, 1.5)), True),
    "last layer": ConditionStyle(ORANGE, "D", "-", True),
    "uniform causal": ConditionStyle(GREY, "v", "-", False),
    "flow": ConditionStyle(GREEN, "^", "-", True),
}
NAMES: Final = {
    "rollout": "rollout",
    "attention": "attention, mean of layers",
    "last layer": "attention, last layer",
    "uniform causal": "rollout of uniform attention",
    "flow": "flow",
}
MAX_PLACES: Final = 3


@styled
def inside_panel(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The share inside of the boxes by method, with the boxes' area (dashed) and the share in the turned boxes (crosses).

    Args:
        rows: columns method, inside, inside_low, inside_high, area, opposite; one place.
        ax: where to draw; a new figure if None.
    """
    need(rows, "method", "inside", "inside_low", "inside_high", "area", "opposite")
    ax = axes_or_new(ax, height=2.0)
    for place, row in enumerate(rows.to_dict("records")):
        one = Estimate(row["inside"], row["inside_low"], row["inside_high"])
        interval_point(ax, place, one, LOOKS[str(row["method"])])
        ax.plot([row["area"]] * 2, [place - 0.35, place + 0.35], color=GREY, linestyle=(0, (2, 1)), label="_area")
        ax.plot(row["opposite"], place, marker="x", color=INK, markersize=4.5, linestyle="none", label="_opposite")
    category_axis(ax, [NAMES[str(one)] for one in rows["method"]])
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_xlabel("share inside of the box")
    return ax


@styled
def inside(tables: Tables, width: float) -> Figure | None:
    """The share inside of the boxes, a panel for each kind of place, and for the vision tower."""
    panels: dict[str, pd.DataFrame] = {}
    for name in ("shares", "vision"):
        table = tables.get(name)
        if table is None:
            continue
        for place, rows in table[table["n_boxes"] > 0].groupby("place", sort=False):
            panels[f"{'vision tower: ' if name == 'vision' else ''}{place}"] = rows
    if not panels:
        return None
    tall = 0.95 + 0.24 * max(len(one) for one in panels.values())
    figure, axes = panel_grid(width, len(panels), tall, columns=2, extra=0)
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        inside_panel(rows, ax).set_title(title)
    outer_labels(axes, names=len({len(one) for one in panels.values()}) == 1)
    return figure


def inside_caption(tables: Tables) -> str:
    """What is drawn."""
    n = int(tables["shares"]["n_images"].max())
    return (
        "Of the weight that falls on the image, the share inside of the boxes of the object that is named (from the last prompt "
        f"token and the vision tower: of all objects that are named truly); {n} images, bootstrap intervals over them. Dashed: "
        "the boxes' share of the image, which is chance. Crosses: the same weights in the boxes turned by 180 degrees. The "
        "rollout of uniform attention shows what the product of causal matrices favours by itself."
    )


@styled
def depth_panel(rows: pd.DataFrame, value: str, label: str, ax: Axes | None = None) -> Axes:
    """Rollout up to a layer, and raw attention in it, by layer.

    Args:
        rows: columns method, layer, `value`, with _low and _high, and area; one place.
        value: "image" or "inside".
        label: of the axis.
        ax: where to draw; a new figure if None.
    """
    need(rows, "method", "layer", value, f"{value}_low", f"{value}_high")
    ax = axes_or_new(ax, height=2.4)
    for method, own in rows.groupby("method", sort=False):
        look = LOOKS[str(method)]
        x, y = own["layer"], own[value].astype(float)
        band(ax, x, own[f"{value}_low"], own[f"{value}_high"], look.colour)
        ax.plot(x, y, color=look.colour, linestyle=look.line, marker=look.marker, markersize=4, label=f"_{method}")
    if value == "inside":
        ax.axhline(float(rows["area"].iloc[0]), color=GREY, linestyle=(0, (2, 1)), linewidth=1.2, label="_area")
    layer_axis(ax)
    ax.set_ylim(bottom=0)
    ax.set_ylabel(label)
    return ax


@styled
def depths(tables: Tables, width: float) -> Figure | None:
    """Weight on the image and inside of the boxes by depth, a row for each kind of place."""
    table = tables.get("depths")
    if table is None:
        return None
    kinds = list(dict.fromkeys(table["place"]))[:MAX_PLACES]
    panels = [(kind, value) for kind in kinds for value in ("image", "inside")]
    panels = [(kind, value) for kind, value in panels if table.loc[table["place"] == kind, value].notna().any()]
    columns = 1 if is_narrow(width) else 2
    rows_of = len(panels) if columns == 1 else len(kinds)
    figure = new_figure(width, 2.2 * rows_of + 0.5)
    for number, (kind, value) in enumerate(panels):
        place = number + 1 if columns == 1 else 2 * kinds.index(kind) + 1 + (value == "inside")
        ax = figure.add_subplot(rows_of, columns, place)
        depth_panel(
            table[table["place"] == kind], value, f"share {'on' if value == 'image' else 'in'} the {LABELS[value]}", ax
        )
        ax.set_title(kind)
    names = {"rollout": "rollout of the layers up to this one", "attention": "attention of this layer"}
    handles = [
        Line2D([], [], color=LOOKS[one].colour, marker=LOOKS[one].marker, linestyle=LOOKS[one].line, label=name)
        for one, name in names.items()
    ]
    legend_below(figure, handles)
    return figure


LABELS: Final = {"image": "image", "inside": "box"}


def depths_caption(tables: Tables) -> str:
    """What is drawn."""
    n = int(tables["depths"]["n_images"].max())
    return (
        f"Left: the weight on image tokens, of rollout over the layers up to each and of attention in it. Right: the share of "
        f"that weight inside of the boxes; dashed, the boxes' share of the image. {n} images, bootstrap intervals over them."
    )


FIGURES: Final = {
    "inside": Drawing("Does attention, rolled out, find the object?", inside_caption, inside),
    "depths": Drawing("Rollout by depth", depths_caption, depths),
}

"""The figures of `TokenAblation`."""

from __future__ import annotations

from typing import Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slitlamp.reports.draw import (
    category_axis,
    interval_point,
    is_narrow,
    legend_below,
    need,
    outer_labels,
    panel_grid,
    reference_line,
)
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import GREY, ORANGE, VERMILLION, ConditionStyle, axes_or_new, styled
from slitlamp.reports.wording import Estimate

LOOKS: Final = {
    "set": ConditionStyle(VERMILLION, "s", "-", True),
    "random": ConditionStyle(GREY, "o", "-", False),
    "shifted": ConditionStyle(ORANGE, "v", "-", False),
}
NAMES: Final = {"set": "the set", "random": "random tokens, as many", "shifted": "the set's shape elsewhere"}
LABELS: Final = {"change": "change of log p (nats)", "flipped": "changed predictions (share)"}
SET_NAMES: Final = {
    "object": "object",
    "object + 1": "object, 1 cell more",
    "object + 2": "object, 2 cells more",
    "encoder": "first in encoder",
    "register": "outlying norm",
    "integrated gradients": "integrated gradients",
}


@styled
def effect_points(effects: pd.DataFrame, columns: tuple[str, str, str], ax: Axes | None = None) -> Axes:
    """One quantity by set, for the set and its controls, with intervals; a dashed line at zero.

    Args:
        effects: of one role: columns set, ablated and `columns`.
        columns: of the value and its interval: ("change", "low", "high") or ("flipped", "flipped_low", "flipped_high").
        ax: where to draw; a new figure if None.
    """
    need(effects, "set", "ablated", *columns)
    ax = axes_or_new(ax, height=0.8 + 0.34 * effects["set"].nunique())
    sets = list(dict.fromkeys(effects["set"]))
    for place, name in enumerate(sets):
        for row in effects[effects["set"] == name].to_dict("records"):
            shift = {"set": -0.22, "random": 0.0, "shifted": 0.22}[row["ablated"]]
            interval_point(ax, place + shift, Estimate(*(float(row[one]) for one in columns)), LOOKS[row["ablated"]])
    reference_line(ax, 0.0)
    category_axis(ax, [SET_NAMES[str(one)] for one in sets])
    ax.set_xlabel(LABELS[columns[0]])
    return ax


@styled
def _panels(tables: Tables, width: float, columns: tuple[str, str, str]) -> Figure | None:
    """A panel per kind of token, those of the object first; stacked where it is narrow."""
    effects = tables.get("effects")
    if effects is None:
        return None
    answers = effects["role"].str.startswith("answer")
    shown = effects[answers] if answers.any() else effects[effects["role"] != "other words"]
    roles = list(dict.fromkeys(shown["role"])) or list(dict.fromkeys(effects["role"]))
    shown = effects[effects["role"].isin(roles)]
    narrow = is_narrow(width)
    figure, axes = panel_grid(
        width, len(roles), 0.34 * effects["set"].nunique() + 0.75, extra=0.4 if narrow else 0.6, sharex=True
    )
    for ax, role in zip(axes, roles, strict=True):
        effect_points(shown[shown["role"] == role], columns, ax).set_title(str(role), fontsize=8.5)
        if not narrow and ax is not axes[len(axes) // 2]:  # one label for all, in the middle
            ax.set_xlabel("")
    outer_labels(axes, names=True)
    kinds = [one for one in LOOKS if (shown["ablated"] == one).any()]
    legend_below(figure, [_handle(one) for one in kinds])
    return figure


def _handle(kind: str) -> Line2D:
    look = LOOKS[kind]
    return Line2D(
        [], [], linestyle="none", marker=look.marker, color=look.colour, markerfacecolor=look.face, label=NAMES[kind]
    )


def _caption(tables: Tables, what: str) -> str:
    effects, sets = tables["effects"], tables["sets"]
    sizes = ", ".join(f"{SET_NAMES[str(one.set)]} {one.tokens:.0f}" for one in sets.itertuples() if one.n_items)
    return (
        f"{what} when the inputs of the language model at some image tokens are replaced; means over up to "
        f"{int(effects['n_items'].max())} items with 95 % intervals. Squares: the set; circles: as many random tokens outside "
        f"it; triangles: its shape moved elsewhere. Mean sizes in tokens: {sizes}."
    )


FIGURES: Final = {
    "change": Drawing(
        "What replacing image tokens does to what was said",
        lambda tables: _caption(tables, "Change of the log probability of the given tokens (nats)"),
        lambda tables, width: _panels(tables, width, ("change", "low", "high")),
    ),
    "flipped": Drawing(
        "How often replacing image tokens changes the next word",
        lambda tables: _caption(tables, "Share of tokens whose most likely word changes"),
        lambda tables, width: _panels(tables, width, ("flipped", "flipped_low", "flipped_high")),
    ),
}

"""The figures of `TokenAblation`."""

from __future__ import annotations

from typing import Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slitlamp.reports.draw import category_axis, interval_point, is_narrow, legend_below, reference_line
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import GREY, ORANGE, VERMILLION, ConditionStyle, new_figure, styled
from slitlamp.reports.wording import Estimate

LOOKS: Final = {
    "set": ConditionStyle(VERMILLION, "s", "-", True),
    "random": ConditionStyle(GREY, "o", "-", False),
    "shifted": ConditionStyle(ORANGE, "v", "-", False),
}
NAMES: Final = {"set": "the set", "random": "random tokens, as many", "shifted": "the set's shape elsewhere"}
SET_NAMES: Final = {
    "object": "object",
    "object + 1": "object, 1 cell more",
    "object + 2": "object, 2 cells more",
    "encoder": "first in encoder",
    "register": "outlying norm",
    "integrated gradients": "integrated gradients",
}


@styled
def effect_points(effects: pd.DataFrame, columns: tuple[str, str, str], ax: Axes) -> Axes:
    """One quantity by set, for the set and its controls, with intervals; a dashed line at zero.

    Args:
        effects: rows of the table `effects` of one role.
        columns: of the value and its interval.
        ax: where to draw.
    """
    sets = list(dict.fromkeys(effects["set"]))
    for place, name in enumerate(sets):
        for row in effects[effects["set"] == name].to_dict("records"):
            shift = {"set": -0.22, "random": 0.0, "shifted": 0.22}[row["ablated"]]
            interval_point(ax, place + shift, Estimate(*(float(row[one]) for one in columns)), LOOKS[row["ablated"]])
    reference_line(ax, 0.0)
    category_axis(ax, [SET_NAMES[str(one)] for one in sets])
    return ax


@styled
def _panels(tables: Tables, width: float, columns: tuple[str, str, str], label: str) -> Figure | None:
    """A panel per kind of token, those of the object first; stacked where it is narrow."""
    effects = tables.get("effects")
    if effects is None:
        return None
    answers = effects["role"].str.startswith("answer")
    shown = effects[answers] if answers.any() else effects[effects["role"] != "other words"]
    roles = list(dict.fromkeys(shown["role"])) or list(dict.fromkeys(effects["role"]))
    shown = effects[effects["role"].isin(roles)]
    n_sets = effects["set"].nunique()
    height = 0.34 * n_sets + 0.75
    figure = new_figure(width, height * len(roles) + 0.4 if is_narrow(width) else height + 0.6)
    axes = figure.subplots(
        *((len(roles), 1) if is_narrow(width) else (1, len(roles))), squeeze=False, sharex=True
    ).ravel()
    for number, (ax, role) in enumerate(zip(axes, roles, strict=True)):
        rows = shown[shown["role"] == role]
        effect_points(rows, columns, ax)
        ax.set_title(f"{role}", fontsize=8.5)
        if not is_narrow(width) and number:
            ax.set_yticklabels([])
        if is_narrow(width) and number < len(roles) - 1:
            ax.tick_params(axis="x", labelbottom=False)
        if (not is_narrow(width) and number == len(roles) // 2) or (number == len(roles) - 1 and is_narrow(width)):
            ax.set_xlabel(label)
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
        lambda tables, width: _panels(tables, width, ("change", "low", "high"), "change of log p (nats)"),
    ),
    "flipped": Drawing(
        "How often replacing image tokens changes the next word",
        lambda tables: _caption(tables, "Share of tokens whose most likely word changes"),
        lambda tables, width: _panels(
            tables, width, ("flipped", "flipped_low", "flipped_high"), "changed predictions (share)"
        ),
    ),
}

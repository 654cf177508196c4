"""The figures of `ActivationPatching`."""

from __future__ import annotations

from typing import Any, Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slitlamp.reports.draw import (
    band,
    heat_map,
    is_narrow,
    layer_axis,
    legend_below,
    need,
    outer_labels,
    panel_grid,
    reference_line,
)
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION, axes_or_new, styled

_ROLES: Final[dict[str, tuple[str, str, Any, str]]] = {
    "object": (VERMILLION, "s", "-", "image tokens of the object"),
    "other_image": (ORANGE, "D", (0, (5, 2)), "other image tokens"),
    "question_object": (GREEN, "^", (0, (4, 1.5, 1, 1.5)), "the object's name"),
    "other_text": (PURPLE, "v", (0, (1, 1.2)), "other text"),
    "last": (BLUE, "o", "-", "last position"),
}
_WHAT: Final = {"denoising": "restored (denoising)", "noising": "taken away (noising)"}


@styled
def position_panel(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Effect of patching each role by layer, with its interval; a thin dotted line with small white markers is its control.

    Args:
        rows: of one direction: columns role, layer, effect (with _low and _high), control.
        ax: where to draw; a new figure if None.
    """
    need(rows, "role", "layer", "effect", "effect_low", "effect_high", "control")
    ax = axes_or_new(ax)
    for at in (0, 1):
        reference_line(ax, at, horizontal=True)
    for role, (colour, marker, line, _) in _ROLES.items():
        some = rows[rows["role"] == role].sort_values("layer")
        if not len(some):
            continue
        band(ax, some["layer"], some["effect_low"], some["effect_high"], colour)
        ax.plot(some["layer"], some["effect"], color=colour, marker=marker, linestyle=line, label=f"_{role}")
        if role in ("object", "last"):
            ax.plot(
                some["layer"], some["control"], color=colour, linestyle=(0, (1, 1)), linewidth=1.2, marker=marker,
                markersize=3, markerfacecolor="white", label="_control",
            )  # fmt: skip
    layer_axis(ax)
    ax.set_ylabel("share of LD")
    return ax


def _panels(
    tables: Tables, name: str, width: float, narrow: float, wide: float
) -> tuple[Figure, dict[str, Axes]] | None:
    """A figure with one panel per direction that a table has, and as many inches high as given for each width."""
    table = tables.get(name)
    if table is None or not len(table):
        return None
    directions = [one for one in _WHAT if (table["direction"] == one).any()]
    figure, axes = panel_grid(
        width, len(directions), narrow if is_narrow(width) else wide - 0.9, extra=0.9, sharex=True, sharey=True
    )
    return figure, dict(zip(directions, axes, strict=True))


@styled
def _positions(tables: Tables, width: float) -> Figure | None:
    made = _panels(tables, "positions", width, 2.3, 3.7)
    if made is None:
        return None
    figure, panels = made
    table = tables["positions"]
    for direction, ax in panels.items():
        position_panel(table[table["direction"] == direction], ax).set_title(_WHAT[direction])
    outer_labels(list(panels.values()))
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle=line, label=name)
        for role, (colour, marker, line, name) in _ROLES.items()
        if (table["role"] == role).any()
    ]
    control = Line2D([], [], color=GREY, linestyle=(0, (1, 1)), linewidth=1.2, label="as many random positions")
    legend_below(figure, [*handles, control], columns=1 if is_narrow(width) else 3)
    return figure


@styled
def _heads(tables: Tables, width: float) -> Figure | None:
    made = _panels(tables, "heads", width, 2.4, 3.1)
    if made is None:
        return None
    figure, panels = made
    table = tables["heads"]
    for direction, ax in panels.items():
        some = table[table["direction"] == direction]
        head_panel(some, ax, limit=float(table["effect"].abs().max())).set_title(_WHAT[direction])
    outer_labels(list(panels.values()))
    return figure


@styled
def head_panel(heads: pd.DataFrame, ax: Axes | None = None, *, limit: float | None = None) -> Axes:
    """Map of the effect of patching each head; a ring marks heads above the mean of all others.

    Args:
        heads: of one direction: columns layer, head, effect, p_adjusted.
        ax: where to draw; a new figure if None.
        limit: of the colours, on both sides of zero; the largest effect if None.
    """
    need(heads, "layer", "head", "effect", "p_adjusted")
    ax = axes_or_new(ax)
    limit = max(float(heads["effect"].abs().max()) if limit is None else limit, 1e-6)
    grid = heads.pivot(index="layer", columns="head", values="effect").sort_index().sort_index(axis=1)
    heat_map(grid, ax, -limit, limit, label="share of LD")
    found = heads[heads["p_adjusted"] < 0.05]
    columns, rows = list(grid.columns), list(grid.index)
    x = [columns.index(one) + 0.5 for one in found["head"]]
    y = [rows.index(one) + 0.5 for one in found["layer"]]
    ax.scatter(x, y, s=22, c="white", edgecolors="black", linewidths=0.9, label="_found", zorder=4)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    return ax


@styled
def _attribution(tables: Tables, width: float) -> Figure | None:
    if "agreement" not in tables:
        return None
    made = _panels(tables, "attribution", width, 2.4, 3.3)
    if made is None:
        return None
    figure, panels = made
    table, agreement = tables["attribution"], tables["agreement"]
    for direction, ax in panels.items():
        estimate_panel(table[table["direction"] == direction], ax)
        pearson = agreement.query("method == 'pearson' and direction == @direction")
        said = [
            f"r {one.correlation:.2f} [{one.low:.2f}, {one.high:.2f}] {one.component}" for one in pearson.itertuples()
        ]
        ax.set_title("\n".join([direction, *said]), fontweight="normal", fontsize=8.5)
    outer_labels(list(panels.values()))
    handles = [
        Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle="none", label=name)
        for name, (colour, marker, face) in _KINDS.items()
        if (table["component"] == name).any()
    ]
    legend_below(figure, [*handles, Line2D([], [], color=GREY, linestyle=(0, (4, 2)), label="equal")])
    return figure


_KINDS: Final = {"positions": (BLUE, "o", "white"), "heads": (VERMILLION, "x", VERMILLION)}


@styled
def estimate_panel(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """First-order estimates against exact effects, one point per place; dashed where they are equal.

    Args:
        rows: of one direction: columns component, effect (the estimate), exact.
        ax: where to draw; a new figure if None.
    """
    need(rows, "component", "effect", "exact")
    ax = axes_or_new(ax)
    ends = [float(rows[["effect", "exact"]].min(axis=None)), float(rows[["effect", "exact"]].max(axis=None))]
    ax.plot(ends, ends, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)), label="_equal", zorder=1)
    for name, (colour, marker, face) in _KINDS.items():
        some = rows[rows["component"] == name]
        ax.plot(
            some["exact"], some["effect"], linestyle="none", marker=marker, color=colour, markerfacecolor=face,
            markersize=4.5, label=f"_{name}", zorder=2,
        )  # fmt: skip
    ax.set_xlabel("exact effect")
    ax.set_ylabel("first-order estimate")
    return ax


def _caption(tables: Tables) -> str:
    return (
        "LD is the logit of the right answer less that of its rival. Share of LD(clean) - LD(corrupt) that patching restores in "
        f"the corrupt run, or takes away in the clean one, over {len(tables['items'])} items"
    )


FIGURES: Final = {
    "positions": Drawing(
        "Where the answer is, position by position",
        lambda tables: (
            f"{_caption(tables)}: the residual stream after each block, by the role of the positions that are "
            "patched. Bands are 95 % bootstrap intervals over images; dotted lines are as many random other positions. 1 at the "
            "last position of the last layer is so by construction."
        ),
        _positions,
    ),
    "heads": Drawing(
        "Which heads carry the answer",
        lambda tables: (
            f"{_caption(tables)}: the output of one head at all positions. Rings: above the mean of all other heads "
            "(Benjamini-Hochberg, 5 %)."
        ),
        _heads,
    ),
    "attribution": Drawing(
        "Is the first-order estimate right?",
        lambda tables: (
            f"{_caption(tables)}, estimated as gradient times difference (attribution patching), against the exact "
            "effect of patching; one point per role or head and layer. r: Pearson correlation over these places, 95 % interval."
        ),
        _attribution,
    ),
}

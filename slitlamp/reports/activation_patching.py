"""The figures of `ActivationPatching`."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from slitlamp.reports.draw import is_narrow, legend_below, reference_line
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILLION, new_figure, styled

_ROLES: Final[dict[str, tuple[str, str, Any, str]]] = {
    "object": (VERMILLION, "s", "-", "image tokens of the object"),
    "other_image": (ORANGE, "D", (0, (5, 2)), "other image tokens"),
    "question_object": (GREEN, "^", (0, (4, 1.5, 1, 1.5)), "the object's name"),
    "other_text": (PURPLE, "v", (0, (1, 1.2)), "other text"),
    "last": (BLUE, "o", "-", "last position"),
}
_WHAT: Final = {"denoising": "restored (denoising)", "noising": "taken away (noising)"}
_DIRECTIONS: Final = tuple(_WHAT)


@styled
def position_panel(rows: pd.DataFrame, ax: Axes) -> Axes:
    """Effect of patching each role by layer, with its interval; a thin dotted line is the control of the same colour.

    Args:
        rows: of one direction: columns role, layer, effect (with _low and _high), control.
        ax: where to draw.
    """
    for at in (0, 1):
        reference_line(ax, at, horizontal=True)
    for role, (colour, marker, line, _) in _ROLES.items():
        some = rows[rows["role"] == role].sort_values("layer")
        if not len(some):
            continue
        ax.fill_between(
            some["layer"],
            some["effect_low"],
            some["effect_high"],
            color=colour,
            alpha=0.15,
            linewidth=0,
            label="_interval",
        )
        ax.plot(some["layer"], some["effect"], color=colour, marker=marker, linestyle=line, label=f"_{role}")
        if role in ("object", "last"):
            ax.plot(
                some["layer"], some["control"], color=colour, linestyle=(0, (1, 1)), linewidth=1.2, label="_control"
            )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    return ax


@styled
def _panels(
    tables: Tables, name: str, width: float, tall: float, wide: float
) -> tuple[Figure, list[tuple[str, Axes]]] | None:
    """A figure with one panel per direction that a table has."""
    table = tables.get(name)
    if table is None or not len(table):
        return None
    directions = [one for one in _DIRECTIONS if (table["direction"] == one).any()]
    narrow = is_narrow(width)
    figure = new_figure(width, 0.9 + tall * len(directions) if narrow else wide)
    shape = (len(directions), 1) if narrow else (1, len(directions))
    axes = np.atleast_1d(figure.subplots(*shape, sharex=True, sharey=True))
    return figure, list(zip(directions, axes, strict=True))


@styled
def _positions(tables: Tables, width: float) -> Figure | None:
    made = _panels(tables, "positions", width, 2.3, 3.7)
    if made is None:
        return None
    figure, panels = made
    table = tables["positions"]
    for number, (direction, ax) in enumerate(panels):
        position_panel(table[table["direction"] == direction], ax)
        ax.set_title(_WHAT[direction])
        if number == 0 or is_narrow(width):
            ax.set_ylabel("share of LD")
        if number == len(panels) - 1 or not is_narrow(width):
            ax.set_xlabel("layer")
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
    limit = max(float(table["effect"].abs().max()), 1e-6)
    for number, (direction, ax) in enumerate(panels):
        some = table[table["direction"] == direction]
        head_panel(some, limit, ax)
        ax.set_title(_WHAT[direction])
        ax.set_ylabel("layer" if number == 0 or is_narrow(width) else "")
        ax.set_xlabel("head" if number == len(panels) - 1 or not is_narrow(width) else "")
    return figure


@styled
def head_panel(heads: pd.DataFrame, limit: float, ax: Axes) -> Axes:
    """Map of the effect of patching each head; a ring marks heads above the mean of all others.

    Args:
        heads: of one direction: columns layer, head, effect, p_adjusted.
        limit: of the colours, on both sides of zero.
        ax: where to draw.
    """
    grid = heads.pivot(index="layer", columns="head", values="effect").sort_index().sort_index(axis=1)
    seaborn.heatmap(
        grid.astype(float), ax=ax, cmap="RdBu", center=0, vmin=-limit, vmax=limit, linewidths=0.6, linecolor="white",
        cbar_kws={"label": "share of LD", "pad": 0.02},
    )  # fmt: skip
    found = heads[heads["p_adjusted"] < 0.05]
    columns, rows = list(grid.columns), list(grid.index)
    x = [columns.index(one) + 0.5 for one in found["head"]]
    y = [rows.index(one) + 0.5 for one in found["layer"]]
    ax.scatter(x, y, s=22, c="white", edgecolors="black", linewidths=0.9, label="_found", zorder=4)
    ax.tick_params(length=0)
    ax.set_yticks(np.arange(len(rows)) + 0.5, labels=[str(one) for one in rows], rotation=0)
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
    for number, (direction, ax) in enumerate(panels):
        some = table[table["direction"] == direction]
        agreement_panel(some, ax)
        pearson = agreement.query("method == 'pearson' and direction == @direction")
        said = [
            f"r {one.correlation:.2f} [{one.low:.2f}, {one.high:.2f}] {one.component}" for one in pearson.itertuples()
        ]
        ax.set_title("\n".join([direction, *said]), fontweight="normal", fontsize=8.5)
        if number == 0 or is_narrow(width):
            ax.set_ylabel("first-order estimate")
        if number == len(panels) - 1 or not is_narrow(width):
            ax.set_xlabel("exact effect")
    handles = [
        Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle="none", label=name)
        for name, (colour, marker, face) in _KINDS.items()
        if (table["component"] == name).any()
    ]
    legend_below(figure, [*handles, Line2D([], [], color=GREY, linestyle=(0, (4, 2)), label="equal")])
    return figure


_KINDS: Final = {"positions": (BLUE, "o", "white"), "heads": (VERMILLION, "x", VERMILLION)}


@styled
def agreement_panel(rows: pd.DataFrame, ax: Axes) -> Axes:
    """First-order estimates against exact effects, one point per place; dashed where they are equal.

    Args:
        rows: of one direction: columns component, effect (the estimate), exact.
        ax: where to draw.
    """
    ends = [float(rows[["effect", "exact"]].min(axis=None)), float(rows[["effect", "exact"]].max(axis=None))]
    ax.plot(ends, ends, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)), label="_equal", zorder=1)
    for name, (colour, marker, face) in _KINDS.items():
        some = rows[rows["component"] == name]
        ax.plot(
            some["exact"], some["effect"], linestyle="none", marker=marker, color=colour, markerfacecolor=face,
            markersize=4.5, label=f"_{name}", zorder=2,
        )  # fmt: skip
    ax.spines["left"].set_color(INK)
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

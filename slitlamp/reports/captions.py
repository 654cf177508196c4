"""Figures about captions: CHAIR_i against recall, and CHAIR_i by the order of mention."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from slitlamp.reports.draw import Names, Styles, band, need, reference_line, styles_and_names
from slitlamp.reports.style import axes_or_new, styled


@styled
def recall_curve(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    matched: float = math.nan,
    styles: Styles | None = None,
    names: Names | None = None,
) -> Axes:
    """CHAIR_i against recall when captions are cut after their k-th mention, one line per condition.

    Args:
        table: columns condition, cut, recall, chair_i (and low, high for a band).
        ax: where to draw; a new figure if None.
        matched: the recall at which conditions are compared, for a dashed line.
        styles: look of each condition.
        names: short names of conditions.
    """
    need(table, "condition", "cut", "recall", "chair_i")
    styles, names = styles_and_names(table["condition"], styles, names)
    ax = axes_or_new(ax, height=3.4)
    for condition, group in table.groupby("condition", sort=False):
        look, rows = styles[str(condition)], group.sort_values("cut")
        ax.plot(
            rows["recall"], rows["chair_i"], color=look.colour, linestyle=look.line, marker=look.marker, markersize=3.8,
            markerfacecolor=look.face, markeredgewidth=0.9, linewidth=1.3,
            label="_curve",
        )  # fmt: skip
        if {"low", "high"} <= set(rows.columns):
            band(ax, rows["recall"], rows["low"], rows["high"], look.colour, alpha=0.12, label="_band")
    reference_line(ax, matched, kind="matched")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("recall (share of objects named)", loc="right")  # long beside the long names of another panel
    ax.set_ylabel("CHAIR_i (share of mentions)")
    return ax


@styled
def mention_index(
    shares: pd.DataFrame,
    ax: Axes | None = None,
    *,
    overall: float = math.nan,
    bands: tuple[str, ...] | None = None,
    styles: Styles | None = None,
    names: Names | None = None,
) -> Axes:
    """CHAIR_i of the first, second, ... object that a caption names, with interval bands.

    Args:
        shares: what `summaries.mention_index_shares` returns.
        ax: where to draw; a new figure if None.
        overall: the level of a dashed line: CHAIR_i of the reference over all mentions.
        bands: conditions drawn with their band; all if None.
        styles: look of each condition.
        names: short names of conditions.
    """
    need(shares, "condition", "index", "value", "low", "high", "n")
    styles, names = styles_and_names(shares["condition"], styles, names)
    ax = axes_or_new(ax, height=3.2)
    for condition, group in shares.groupby("condition", sort=False):
        look, rows = styles[str(condition)], group.sort_values("index")
        banded = bands is None or str(condition) in bands
        if banded:
            band(ax, rows["index"], rows["low"], rows["high"], look.colour, alpha=0.15, label="_band")
        ax.plot(
            rows["index"], rows["value"], color=look.colour, linestyle=look.line, marker=look.marker,
            markersize=5 if banded else 4, markerfacecolor=look.face, linewidth=1.7 if banded else 1.0, label="_curve",
        )  # fmt: skip
    reference_line(ax, overall, "all mentions", horizontal=True, kind="overall")
    first = shares[shares["condition"] == shares["condition"].iloc[0]].set_index("index")["n"]
    ticks = sorted(int(index) for index in shares["index"].unique())
    ax.set_xticks(ticks, labels=[f"{index}\n{int(first[index])}" if index in first else str(index) for index in ticks])
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.set_ylim(
        0, max(0.05, float(np.nanmax(shares[["value", "high"]].to_numpy(dtype=np.float64), initial=0.05)) * 1.08)
    )
    ax.set_xlim(ticks[0] - 0.3, ticks[-1] + 0.3)
    ax.set_xlabel("order of the mention (below it: n)")
    ax.set_ylabel("CHAIR_i (share of mentions)")
    return ax

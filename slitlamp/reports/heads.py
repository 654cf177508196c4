"""Figures of head divergence: the layer x head map, the heads with their intervals, and T-VHD by kind of word."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.ticker import MaxNLocator

from slitlamp.reports.draw import heat_map, need
from slitlamp.reports.style import (
    BLUE,
    GREY,
    INK,
    TOKEN_COLOURS,
    TOKEN_HATCHES,
    TOKEN_LABELS,
    TOKEN_LINES,
    TOKEN_MARKERS,
    TOKEN_NAMES,
    axes_or_new,
    styled,
)
from slitlamp.reports.summaries import picked
from slitlamp.reports.wording import count

MAX_ANNOTATED = 96
"""Largest number of cells whose values are written into the map."""


@styled
def head_map(heads: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Map of mean VHD, layers down and heads across; a ring marks the heads that reinforcement picks in most items.

    Args:
        heads: columns layer, head, vhd (and selected, the share of items in which the head is picked); one row per head.
        ax: where to draw; a new figure if None.
    """
    need(heads, "layer", "head", "vhd")
    grid = heads.pivot(index="layer", columns="head", values="vhd").sort_index().sort_index(axis=1)
    ax = axes_or_new(ax, height=1.0 + 0.32 * len(grid))
    annotate = grid.size <= MAX_ANNOTATED
    notes = grid.map("{:.1f}".format) if annotate else None
    heat_map(
        grid, ax, 0, float(grid.max(axis=None)), notes=notes, lines=annotate, label="VHD (L2 distance)", shrink=0.9
    )
    high = heads[picked(heads)]
    columns, rows = list(grid.columns), list(grid.index)
    x = np.array([columns.index(head) for head in high["head"]]) + (0.86 if annotate else 0.5)
    y = np.array([rows.index(layer) for layer in high["layer"]]) + (0.18 if annotate else 0.5)
    ax.scatter(x, y, s=16 if annotate else 10, c="white", edgecolors="black", linewidths=0.9, label="_picked", zorder=4)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    return ax


@styled
def head_intervals(heads: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Every head's VHD with its interval, layer by layer; a short dashed line is the median of the layer.

    Args:
        heads: columns layer, head, vhd, low, high.
        ax: where to draw; a new figure if None.
    """
    need(heads, "layer", "head", "vhd", "low", "high")
    ax = axes_or_new(ax, height=3.0)
    layers = sorted(heads["layer"].unique())
    above = picked(heads)
    for position, layer in enumerate(layers):
        rows = heads[heads["layer"] == layer].sort_values("vhd")
        offsets = position + np.linspace(-0.34, 0.34, len(rows)) if len(rows) > 1 else np.array([float(position)])
        chosen = above[heads.index.get_indexer(rows.index)]
        ax.vlines(
            offsets,
            rows["low"],
            rows["high"],
            colors=[BLUE if one else GREY for one in chosen],
            linewidth=1.2,
            label="_interval",
        )
        for kind, colour, face, marker in ((True, BLUE, BLUE, "o"), (False, GREY, "white", "v")):
            pick = chosen == kind
            ax.plot(
                offsets[pick], rows["vhd"].to_numpy(dtype=np.float64)[pick], marker=marker, linestyle="none", color=colour,
                markerfacecolor=face, markersize=4, label="_value",
            )  # fmt: skip
        ends, median = [position - 0.44, position + 0.44], float(rows["vhd"].median())
        ax.plot(ends, [median, median], color=INK, linewidth=1.0, linestyle=(0, (3, 1.5)), label="_median")
    ax.set_xticks(range(len(layers)), labels=[str(layer) for layer in layers])
    ax.xaxis.set_major_locator(
        ax.xaxis.get_major_locator() if len(layers) <= 16 else MaxNLocator(nbins=10, integer=True)
    )
    ax.set_ylim(bottom=0)
    ax.set_xlabel("layer")
    ax.set_ylabel("VHD (L2 distance)")
    return ax


@styled
def t_vhd_histogram(
    tokens: pd.DataFrame,
    column: str,
    means: pd.DataFrame | None = None,
    ax: Axes | None = None,
    *,
    bins: int = 24,
    unit: str = "word",
    names: Mapping[str, str] = TOKEN_NAMES,
) -> Axes:
    """Histogram of T-VHD by kind of word, each kind as shares of its own words, with means and their intervals above.

    Args:
        tokens: columns label and `column`; one row per word.
        column: which T-VHD, such as "t_vhd_4".
        means: columns label, mean, low, high.
        ax: where to draw; a new figure if None.
        bins: number of bins over the range of all words.
        unit: what a row is.
        names: of the kinds.
    """
    need(tokens, "label", column)
    ax = axes_or_new(ax, height=3.2)
    finite = tokens[np.isfinite(tokens[column].to_numpy(dtype=np.float64))]
    edges = np.histogram_bin_edges(finite[column], bins=bins) if len(finite) else np.linspace(0, 1, bins + 1)
    top = 0.0
    present = [label for label in TOKEN_LABELS if (finite["label"] == label).any()]
    for label in present:
        values = finite.loc[finite["label"] == label, column].to_numpy(dtype=np.float64)
        share = np.histogram(values, edges)[0] / len(values)
        top = max(top, float(share.max()))
        ax.stairs(
            share, edges, fill=True, facecolor=to_rgba(TOKEN_COLOURS[label], 0.14), edgecolor=TOKEN_COLOURS[label],
            hatch=TOKEN_HATCHES[label], linewidth=0, label="_fill",
        )  # fmt: skip
        ax.stairs(
            share, edges, color=TOKEN_COLOURS[label], linestyle=TOKEN_LINES[label], linewidth=1.7,
            label=f"{names[label]}, {count(len(values), unit)}",
        )  # fmt: skip
    rows = {} if means is None else {str(row["label"]): row for row in means.to_dict("records")}
    for i, label in enumerate(label for label in present if label in rows):
        row, height = rows[label], top * (1.08 + 0.07 * i)
        if not math.isfinite(float(row["mean"])):
            continue
        ax.plot([row["low"], row["high"]], [height] * 2, color=TOKEN_COLOURS[label], linewidth=2.2, label="_interval")
        ax.plot(
            row["mean"], height, marker=TOKEN_MARKERS[label], markersize=5, color=TOKEN_COLOURS[label], label="_mean"
        )
    ax.set_ylim(0, (top or 1.0) * (1.15 + 0.07 * len(rows)))
    ax.set_xlabel(f"T-VHD of the {unit} (L2 distances)")
    ax.set_ylabel(f"share of the {unit}s of its kind")
    return ax

"""Maps of the token ledger: which signals say the same, and one caption word by word."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import rankdata

from slitlamp.reports.draw import need
from slitlamp.reports.ledger_drawings import FALSE, oriented
from slitlamp.reports.style import GREY, MAP, TOKEN_COLOURS, WORDS, axes_or_new, contrast_ink, styled
from slitlamp.reports.wording import number


def correlation_grid(
    redundancy: pd.DataFrame, signs: dict[str, int]
) -> tuple[list[str], NDArray[np.float64], NDArray[np.bool_]]:
    """The correlations as a matrix, in an order that puts signals beside those they agree with.

    Args:
        redundancy: columns signal_a, signal_b, spearman, low, high.
        signs: expected sign of each signal; correlations are those of the signals turned towards hallucination.

    Returns:
        (names in order, correlation [row, column], whether the interval excludes 0 [row, column]).
    """
    names = list(dict.fromkeys([*redundancy["signal_a"], *redundancy["signal_b"]]))
    place = {name: i for i, name in enumerate(names)}
    values, clear = np.eye(len(names)), np.ones((len(names), len(names)), dtype=bool)
    for row in redundancy.to_dict("records"):
        one, other = str(row["signal_a"]), str(row["signal_b"])
        cell = place[one], place[other]
        turn = (signs.get(one) or 1) * (signs.get(other) or 1)
        values[cell] = values[cell[::-1]] = turn * float(row["spearman"])
        clear[cell] = clear[cell[::-1]] = row["low"] > 0 or row["high"] < 0
    if len(names) < 3:
        return names, values, clear
    distance = squareform(1 - np.nan_to_num(values), checks=False)
    order = leaves_list(linkage(distance, method="average", optimal_ordering=True))
    return [names[i] for i in order], values[np.ix_(order, order)], clear[np.ix_(order, order)]


@styled
def redundancy_panel(
    redundancy: pd.DataFrame, signs: dict[str, int], ax: Axes | None = None, *, annotate: bool = True
) -> Axes:
    """Lower triangle of the rank correlations between signals; empty cells are not distinguishable from zero.

    Args:
        redundancy: columns signal_a, title_a, signal_b, title_b, spearman, low, high.
        signs: expected sign of each signal.
        ax: where to draw; a new figure if None.
        annotate: whether to write the correlations into the cells.
    """
    need(redundancy, "signal_a", "title_a", "signal_b", "title_b", "spearman", "low", "high")
    ax = axes_or_new(ax, height=5.5)
    titles = dict(zip(redundancy["signal_a"], redundancy["title_a"], strict=True))
    titles |= dict(zip(redundancy["signal_b"], redundancy["title_b"], strict=True))
    names, values, clear = correlation_grid(redundancy, signs)
    below = np.tril(np.ones_like(clear), k=-1)
    shown = np.where(below & clear, values, np.nan)[1:, :-1]
    image = ax.imshow(np.ma.masked_invalid(shown), cmap=MAP, vmin=-1, vmax=1, aspect="equal", interpolation="none")
    colours = colormaps[MAP]
    for row, column in np.argwhere(below[1:, :-1]):
        value = values[row + 1, column]
        if annotate and clear[row + 1, column]:
            ink = contrast_ink(colours((value + 1) / 2))
            ax.text(column, row, number(value, 1), ha="center", va="center", fontsize=7, color=ink)
        elif not clear[row + 1, column]:
            ax.plot([column], [row], marker=".", markersize=2, color=GREY, label="_unclear")
    columns, lines = [titles[name] for name in names[:-1]], [titles[name] for name in names[1:]]
    if not annotate:  # no room for every name twice
        columns = [str(place) if place % 2 else "" for place in range(1, len(names))]  # room for every second
        lines = [f"{title}  {place}" for place, title in enumerate(lines, start=2)]
    ax.set_xticks(range(len(names) - 1), columns, rotation=90 if annotate else 0)
    ax.set_yticks(range(len(names) - 1), lines)
    ax.tick_params(length=0, labelsize=8 if annotate else 7)
    if not annotate:
        ax.set_xlabel(f"1: {titles[names[0]]}", fontsize=7.5, loc="left")
    ax.set_xticks(np.arange(-0.5, len(names) - 1), minor=True)
    ax.set_yticks(np.arange(-0.5, len(names) - 1), minor=True)
    ax.grid(which="minor", color="white", linewidth=0.8)
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_visible(False)
    corner = ax.inset_axes((0.55, 0.93, 0.36, 0.03))  # the upper triangle is empty
    bar = ax.figure.colorbar(image, cax=corner, orientation="horizontal", ticks=[-1, 0, 1])
    bar.set_label("Spearman correlation" if annotate else "Spearman", fontsize=9 if annotate else 7)
    corner.tick_params(labelsize=8 if annotate else 7)
    bar.outline.set_visible(False)
    return ax


def telling_item(ledger: pd.DataFrame) -> str:
    """The caption to show: the one with the most of the rarer kind of objects, then the most objects, then the first."""
    false = ledger["label"].isin(FALSE)
    counts = pd.DataFrame({"item": ledger["item"], "false": false, "true": ~false}).groupby("item", sort=False).sum()
    counts["least"], counts["all"] = counts.min(axis=1), counts.sum(axis=1)
    return str(counts.sort_values(["least", "all"], ascending=False, kind="stable").index[0])


@styled
def strip_panel(
    ledger: pd.DataFrame, item: str, rows: pd.DataFrame, ax: Axes | None = None, *, annotate: bool = True
) -> Axes:
    """The objects of one caption (across) and what each signal says of them (down): the darker, the more it warns.

    Args:
        ledger: columns item, word, label and one per signal.
        item: which caption.
        rows: columns signal, title, sign, from top to bottom.
        ax: where to draw; a new figure if None.
        annotate: whether to write the percentiles into the cells.
    """
    need(ledger, "item", "word", "label", *rows["signal"])
    mine = (ledger["item"] == item).to_numpy()
    words = ledger[mine]
    grid = np.full((len(rows), len(words)), np.nan)
    for place, row in enumerate(rows.to_dict("records")):
        values = oriented(ledger[str(row["signal"])].to_numpy(dtype=np.float64), int(row["sign"]))
        known = np.isfinite(values)
        share = np.full(len(values), np.nan)
        share[known] = (rankdata(values[known]) - 0.5) / max(int(known.sum()), 1)
        grid[place] = share[mine]
    ax = axes_or_new(ax, height=1.2 + 0.24 * len(rows))
    image = ax.imshow(np.ma.masked_invalid(grid), cmap=WORDS, vmin=0, vmax=1, aspect="auto", interpolation="none")
    if annotate:
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                ink = contrast_ink(WORDS(value))
                ax.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=ink)
    false = words["label"].isin(FALSE).to_numpy()
    labels = [f"{word} ✗" if wrong else str(word) for word, wrong in zip(words["word"], false, strict=True)]
    ax.set_xticks(range(len(words)), labels, rotation=35 if annotate else 90, ha="left" if annotate else "center")
    ax.xaxis.tick_top()
    if annotate:
        for label in ax.get_xticklabels():
            label.set_rotation_mode("anchor")
    for label, wrong in zip(ax.get_xticklabels(), false, strict=True):
        label.set_color(TOKEN_COLOURS["hallucinated" if wrong else "object"])
        label.set_fontweight("bold" if wrong else "normal")
    ax.set_yticks(range(len(rows)), list(rows["title"]))
    ax.set_xticks(np.arange(-0.5, len(words)), minor=True)
    ax.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    ax.grid(which="minor", color="white", linewidth=1.2)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    where: dict[str, Any] = {"shrink": 0.6, "pad": 0.02} if annotate else {"location": "bottom", "pad": 0.02}
    bar = ax.figure.colorbar(
        image, ax=ax, aspect=18, ticks=[0, 0.5, 1], format=lambda value, place: f"{100 * value:.0f}", **where
    )
    bar.set_label("percentile towards hallucination", loc="center" if annotate else "right")
    bar.outline.set_visible(False)
    return ax

"""Panels of the figures of outlier tokens: overlap, influence, definitions, norms, concentration."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from slitlamp.reports.draw import band, category_axis, interval_point, layer_axis, need, reference_line
from slitlamp.reports.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    TOKEN_COLOURS,
    TOKEN_MARKERS,
    VERMILLION,
    ConditionStyle,
    axes_or_new,
    styled,
)
from slitlamp.reports.wording import Estimate

FloatArray = NDArray[np.float64]

SHORT: Final = {
    "first in the encoder's attention": "encoder",
    "norm above mean + sd": "norm",
    "norm above the threshold": "threshold",
    "attention sink of the decoder": "sink",
}
KINDS: Final = {"influence": "first in the encoder", "matched": "matched in decoder", "random": "random"}
"""The tokens of which F is measured: those of the encoder, and both controls."""
COMPARED: Final = (
    ("within images", INK, "d", True, -0.22),
    ("between images", GREEN, "D", False, 0.0),
    ("between true neighbours", ORANGE, "v", False, 0.22),
)
"""How hallucinated and true objects are compared: name, colour, marker, filled, shift."""

LOOKS = {
    "end of the prompt": (INK, "-", "o"),
    "true objects": (BLUE, (0, (6, 1.5)), "s"),
    "hallucinated objects": (VERMILLION, (0, (2, 1.2)), "X"),
}


@styled
def overlap_curves(overlap: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """H_i against i with interval bands, by the decoder's query; chance and the next image's attention beside it.

    Args:
        overlap: of one layer of the encoder: columns query, i, overlap, low, high, chance, other_image.
        ax: where to draw; a new figure if None.
    """
    need(overlap, "query", "i", "overlap", "low", "high", "chance", "other_image")
    ax = axes_or_new(ax)
    for query, rows in overlap.groupby("query", sort=False):
        colour, line, marker = LOOKS[str(query)]
        band(ax, rows["i"], rows["low"], rows["high"], colour, alpha=0.15)
        ax.plot(
            rows["i"],
            rows["overlap"],
            color=colour,
            linestyle=line,
            marker=marker,
            markevery=8,
            markersize=4,
            label=query,
        )
    first = overlap[overlap["query"] == overlap["query"].iloc[0]]
    ax.plot(first["i"], first["chance"], color=GREY, linewidth=1.0, linestyle=(0, (4, 2)), label="chance, i / n")
    if first["other_image"].notna().any():
        ax.plot(
            first["i"],
            first["other_image"],
            color=ORANGE,
            linewidth=1.2,
            linestyle=(0, (1, 1)),
            label="the next image's attention",
        )
    ax.set_xlabel("i, number of tokens")
    ax.set_ylabel("overlap H_i")
    ax.set_xlim(0, float(first["i"].max()))
    ax.set_ylim(0, 1)
    return ax


@styled
def influence_points(influence: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """F at true and hallucinated objects for the first tokens and for both controls.

    Args:
        influence: columns label, chance, and influence, matched and random, each with _low and _high.
        ax: where to draw; a new figure if None.
    """
    need(influence, "label", "chance", *(f"{one}{end}" for one in KINDS for end in ("", "_low", "_high")))
    ax = axes_or_new(ax, height=2.2)
    for place, kind in enumerate(KINDS):
        for shift, label in ((-0.15, "object"), (0.15, "hallucinated")):
            rows = influence[influence["label"] == label]
            if len(rows):
                row = rows.iloc[0]
                look = ConditionStyle(TOKEN_COLOURS[label], TOKEN_MARKERS[label], "-", True)
                estimate = Estimate(float(row[kind]), float(row[f"{kind}_low"]), float(row[f"{kind}_high"]))
                interval_point(ax, place + shift, estimate, look)
    reference_line(ax, float(influence["chance"].iloc[0]), "chance")
    category_axis(ax, list(KINDS.values()))
    ax.set_xlim(left=0)
    ax.set_xlabel("F (share of attention)")
    return ax


@styled
def difference_points(differences: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """F at hallucinated minus true objects, in the ways of `COMPARED`.

    Args:
        differences: columns tokens, compared, difference, low, high.
        ax: where to draw; a new figure if None.
    """
    need(differences, "tokens", "compared", "difference", "low", "high")
    ax = axes_or_new(ax, height=2.2)
    looks = {name: (colour, marker, filled, shift) for name, colour, marker, filled, shift in COMPARED}
    for place, kind in enumerate(KINDS):
        for how, (colour, marker, filled, shift) in looks.items():
            rows = differences[(differences["tokens"] == kind) & (differences["compared"] == how)]
            if len(rows):
                row = rows.iloc[0]
                estimate = Estimate(float(row["difference"]), float(row["low"]), float(row["high"]))
                interval_point(ax, place + shift, estimate, ConditionStyle(colour, marker, "-", filled))
    reference_line(ax, 0.0)
    category_axis(ax, list(KINDS.values()))
    ax.set_xlabel("hallucinated minus true, in F")
    return ax


@styled
def jaccard_points(agreement: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Jaccard index of every two definitions, with a cross at its chance level.

    Args:
        agreement: columns first, second, n_items, jaccard, low, high, chance.
        ax: where to draw; a new figure if None.
    """
    need(agreement, "first", "second", "n_items", "jaccard", "low", "high", "chance")
    ax = axes_or_new(ax, height=2.2)
    labels = []
    for place, row in enumerate(agreement.itertuples()):
        labels.append(f"{SHORT[str(row.first)]} / {SHORT[str(row.second)]}")
        if row.n_items:
            interval_point(
                ax,
                place,
                Estimate(float(row.jaccard), float(row.low), float(row.high)),
                ConditionStyle(BLUE, "o", "-", True),
            )
            _cross(ax, float(row.chance), place)
        else:
            ax.text(0.02, place, "one of them is empty", va="center", fontsize=8, color="#595959")
    category_axis(ax, labels)
    ax.set_xlim(-0.03, 1)
    ax.set_xlabel("Jaccard (cross: chance)")
    return ax


@styled
def count_points(outliers: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How much of the decoder's attention the outliers of each definition hold, with a cross at their share of the tokens.

    Args:
        outliers: columns definition, tokens, share, attention, attention_low, attention_high.
        ax: where to draw; a new figure if None.
    """
    need(outliers, "definition", "tokens", "share", "attention", "attention_low", "attention_high")
    ax = axes_or_new(ax, height=2.2)
    for place, row in enumerate(outliers.itertuples()):
        estimate = Estimate(float(row.attention), float(row.attention_low), float(row.attention_high))
        interval_point(ax, place, estimate, ConditionStyle(VERMILLION, "s", "-", True))
        _cross(ax, float(row.share), place)
    category_axis(ax, [f"{SHORT[str(row.definition)]} ({row.tokens:.1f} per image)" for row in outliers.itertuples()])
    ax.set_xlim(left=-0.005)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_xlabel("attention held (cross: chance)", loc="right")  # long beside long names
    return ax


@styled
def norm_densities(histogram: pd.DataFrame, norms: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Histograms of norms by layer, from pale to dark with depth; a dashed line where there is a valley.

    Args:
        histogram: of one stream: columns layer, from, to, share.
        norms: of the same: columns layer, valley.
        ax: where to draw; a new figure if None.
    """
    need(histogram, "layer", "from", "to", "share")
    need(norms, "layer", "valley")
    ax = axes_or_new(ax)
    layers = sorted(histogram["layer"].unique())
    shades = np.linspace(0.82, 0.0, len(layers)) if len(layers) > 1 else np.array([0.0])
    for shade, layer in zip(shades, layers, strict=True):
        rows = histogram[histogram["layer"] == layer]
        colour = (shade, shade, min(1.0, shade + 0.25))
        ax.stairs(*_without_gaps(rows), color=colour, linewidth=1.3, label=f"layer {int(layer)}")
        valley = float(norms[norms["layer"] == layer]["valley"].iloc[0])
        reference_line(ax, valley, "valley" if np.isfinite(valley) else "")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("L2 norm of an image token")
    ax.set_ylabel("share of tokens")
    return ax


@styled
def norm_ratios(norms: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Largest over median norm by layer, with intervals.

    Args:
        norms: of one stream: columns layer, max_over_median, low, high, largest_ratio.
        ax: where to draw; a new figure if None.
    """
    need(norms, "layer", "max_over_median", "low", "high", "largest_ratio")
    ax = axes_or_new(ax)
    band(ax, norms["layer"], norms["low"], norms["high"], BLUE, alpha=0.15)
    ax.plot(norms["layer"], norms["max_over_median"], color=BLUE, marker="o", label="mean over images")
    ax.plot(
        norms["layer"], norms["largest_ratio"], color=GREY, marker="v", linestyle=(0, (2, 1.2)), label="largest of all"
    )
    ax.set_ylim(bottom=1)
    layer_axis(ax)
    ax.set_ylabel("largest / median norm")
    return ax


@styled
def concentration_lines(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of the encoder's attention on the first patches and on objects, by layer, with chance and area.

    Args:
        table: columns layer, encoder, top_share, low, high, chance, on_objects (with _low and _high), area.
        ax: where to draw; a new figure if None.
    """
    need(table, "layer", "encoder", "top_share", "low", "high", "chance", "on_objects", "area")
    ax = axes_or_new(ax)
    looks: list[tuple[str, str, str, str, str, Any, str]] = [
        ("top_share", "low", "high", VERMILLION, "s", "-", "first patches")
    ]
    if table["on_objects"].notna().any():
        looks.append(("on_objects", "on_objects_low", "on_objects_high", BLUE, "o", (0, (6, 1.5)), "named objects"))
    for column, low, high, colour, marker, line, name in looks:
        band(ax, table["layer"], table[low], table[high], colour, alpha=0.15)
        ax.plot(table["layer"], table[column], color=colour, marker=marker, linestyle=line, label=f"on {name}")
    for column, line, name in (("chance", (0, (1, 1.5)), "as many patches"), ("area", (0, (4, 2)), "area of objects")):
        if table[column].notna().any():
            ax.axhline(float(table[column].iloc[0]), color=GREY, linewidth=1.2, linestyle=line, label=name)
    ax.set_ylim(0, 1)
    layer_axis(ax, "layer of the tower")
    ax.set_ylabel(f"share of {table['encoder'].iloc[0]}")
    return ax


def _cross(ax: Axes, at: float, place: float) -> None:
    """Where chance lies."""
    ax.plot([at], [place], marker="x", color=GREY, linestyle="none", markeredgewidth=1.6, zorder=4, label="_chance")


def _without_gaps(rows: pd.DataFrame) -> tuple[FloatArray, FloatArray]:
    """Shares and edges of all bins between the first and the last, empty ones too; bins are alike on a log scale."""
    ratio = float((rows["to"] / rows["from"]).iloc[0])
    first = float(rows["from"].min())
    place = np.rint(np.log(rows["from"] / first) / np.log(ratio)).astype(int).to_numpy()
    shares = np.zeros(place.max() + 1)
    shares[place] = rows["share"]
    edges = np.asarray(first * ratio ** np.arange(len(shares) + 1), dtype=np.float64)
    return shares, edges

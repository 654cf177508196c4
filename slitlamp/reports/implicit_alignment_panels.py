"""Panels of the figures of implicit alignment: curves over layers, tokens in two dimensions, bars of the vocabulary, scatters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from slitlamp.reports.draw import band, layer_axis, need, reference_line
from slitlamp.reports.style import BLUE, GREEN, GREY, INK, MAP, ORANGE, PURPLE, SKY, VERMILLION, axes_or_new, styled


class Look(NamedTuple):
    """How a curve is drawn: colour, line, marker, and its name in the legend."""

    colour: str
    line: Any
    marker: str
    name: str


DASHED, DOTTED, MIXED = (0, (6, 1.5)), (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5))

PAIRS: Final = {
    "image-image": Look(BLUE, DASHED, "s", "image-image"),
    "text-text": Look(GREEN, MIXED, "D", "text-text"),
    "image-text": Look(VERMILLION, "-", "o", "image-text, same layer"),
    "input image-text": Look(PURPLE, (0, (2, 1.2)), "^", "input image-text"),
    "mean image-text": Look(GREY, DOTTED, "", "mean of all images-text"),
}
MODALITIES: Final = {
    "image": Look(BLUE, "-", "o", "image tokens"),
    "text": Look(VERMILLION, DASHED, "s", "text tokens"),
}
TAPS: Final = {
    "ln1": Look(SKY, DOTTED, "v", "norm 1"),
    "attn_out": Look(BLUE, DASHED, "s", "attention"),
    "resid_mid": Look(INK, "-", "o", "after attention"),
    "ln2": Look(ORANGE, DOTTED, "^", "norm 2"),
    "mlp_post": Look(GREEN, MIXED, "P", "MLP hidden"),
    "mlp_out": Look(VERMILLION, DASHED, "D", "MLP"),
    "resid_post": Look(PURPLE, "-", "X", "after MLP"),
}
KL: Final = {
    "image to text": Look(VERMILLION, "-", "o", "image to text"),
    "image halves": Look(BLUE, DOTTED, "s", "control: image halves"),
    "text halves": Look(GREEN, MIXED, "D", "control: text halves"),
}
CONTROL_LINES: Final[dict[str, Any]] = {"image": DOTTED, "text": (0, (3, 1.5))}
"""Of what stands beside a modality without markers."""
HATCHES: Final = {"image": "", "text": "////"}
METRICS: Final = {"accuracy": "accuracy", "recall": "recall", "chair_i": "CHAIR_i", "chair_s": "CHAIR_s"}
VARIANTS: Final = {
    "raw": "raw",
    "removed": "no massive dimensions",
    "standardised": "standardised",
}


def log_axis(ax: Axes) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


@styled
def alignment_curve(
    rows: pd.DataFrame,
    look: Look,
    ax: Axes | None = None,
    *,
    column: str = "value",
    spread: bool = False,
    faint: bool = False,
) -> Axes:
    """One column over the layers with its interval; with `spread`, also plus and minus one standard deviation of the grid.

    Args:
        rows: columns layer, `column`, its interval (low and high of "value", else `column`_low and `column`_high), and sd.
        look: of the curve.
        ax: where to draw; a new figure if None.
        column: which one.
        spread: whether to draw the band of the standard deviation.
        faint: thinner, for controls.
    """
    low, high = ("low", "high") if column == "value" else (f"{column}_low", f"{column}_high")
    need(rows, "layer", column, low, high)
    ax = axes_or_new(ax)
    rows = rows.sort_values("layer")
    x = rows["layer"].to_numpy(dtype=float)
    if spread and "sd" in rows:
        band(ax, x, rows[column] - rows["sd"], rows[column] + rows["sd"], look.colour, alpha=0.10, label="_spread")
    band(ax, x, rows[low], rows[high], look.colour, alpha=0.30)
    ax.plot(
        x,
        rows[column],
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        markersize=3.0 if faint else 4.0,
        linewidth=1.0 if faint else 1.5,
        label=look.name,
    )
    layer_axis(ax)
    return ax


@styled
def alignment_curves(
    table: pd.DataFrame,
    by: str,
    looks: Mapping[str, Look],
    ax: Axes | None = None,
    *,
    zero: bool = False,
    column: str = "value",
    spread: bool = False,
    faint: bool = False,
) -> Axes:
    """A curve for each value of a column that has a look.

    Args:
        table: columns `by` and those of `alignment_curve`.
        by: which column.
        looks: by its values.
        ax: where to draw; a new figure if None.
        zero: whether to draw the line of zero.
        column, spread, faint: as in `alignment_curve`.
    """
    need(table, by, "layer")
    ax = axes_or_new(ax)
    if zero:
        reference_line(ax, 0.0, horizontal=True)
    for name, look in looks.items():
        rows = table[table[by] == name]
        if len(rows):
            alignment_curve(rows, look, ax, column=column, spread=spread, faint=faint)
    return ax


@styled
def scatter_tokens(points: pd.DataFrame, x: str, y: str, ax: Axes | None = None) -> Axes:
    """Tokens of both modalities in two dimensions; the axes have no scale.

    Args:
        points: columns modality, `x`, `y` (and layer, for the title, if all points are of one).
        x, y: which columns.
        ax: where to draw; a new figure if None.
    """
    need(points, "modality", x, y)
    ax = axes_or_new(ax, width=3.0, height=3.0)
    for name, look in MODALITIES.items():
        rows = points[points["modality"] == name]
        ax.scatter(
            rows[x],
            rows[y],
            s=9,
            marker="o" if name == "image" else "x",
            facecolors=look.colour if name == "text" else "none",
            edgecolors=None if name == "text" else look.colour,
            linewidths=0.8,
            alpha=0.8,
            label=look.name,
        )
    ax.set_xticks([])
    ax.set_yticks([])
    if "layer" in points and points["layer"].nunique() == 1:
        ax.set_title(f"layer {int(points['layer'].iloc[0])}")
    return ax


@styled
def vocabulary_bars(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The most frequent words and the share of tokens that are read as them.

    Args:
        rows: of one modality and layer: columns modality, rank, token, value, low, high.
        ax: where to draw; a new figure if None.
    """
    need(rows, "modality", "rank", "token", "value", "low", "high")
    ax = axes_or_new(ax, height=0.6 + 0.2 * len(rows))
    modality = str(rows["modality"].iloc[0])
    colour, hatch = MODALITIES[modality].colour, HATCHES[modality]
    rows = rows.sort_values("rank")
    place = np.arange(len(rows))
    value = rows["value"].to_numpy()
    error = np.nan_to_num(np.vstack([value - rows["low"], rows["high"] - value]).clip(min=0))
    ax.barh(place, value, color=colour, alpha=0.75, hatch=hatch, edgecolor="white", linewidth=0)
    ax.errorbar(value, place, xerr=error, fmt="none", ecolor=INK, elinewidth=0.8)
    names = [" ".join(str(one).split()) or "(blank)" for one in rows["token"]]
    ax.set_yticks(place, labels=[one if len(one) <= 12 else one[:11] + "…" for one in names], fontsize=7.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.set_xlabel("share of tokens")
    return ax


def model_looks(models: Sequence[str], names: Sequence[str]) -> dict[str, Look]:
    """Light to dark in the order of the models, with a marker that changes too."""
    shades = colormaps[MAP](np.linspace(0.92, 0.0, len(models)))
    return {
        model: Look(shade, "-", "osD^vP"[place % 6], name)
        for place, (model, shade, name) in enumerate(zip(models, shades, names, strict=True))
    }


_OTHERS: Final = ("s", "D", "^", "P", "v", "X")


@styled
def score_scatter(rows: pd.DataFrame, names: Mapping[str, str], ax: Axes | None = None) -> Axes:
    """A score of every model against its alignment, with intervals in both directions; checkpoints of a training (circles) are
    joined in their order, the first and the last named; other models have markers of their own, for a legend.

    Args:
        rows: one row per model: columns model, order, step (NaN: no checkpoint), value, low, high (alignment), score, score_low,
            score_high, metric.
        names: short names of the models.
        ax: where to draw; a new figure if None.
    """
    need(rows, "model", "order", "step", "value", "low", "high", "score", "score_low", "score_high", "metric")
    ax = axes_or_new(ax)
    rows = rows.sort_values("order")
    x, y = rows["value"].to_numpy(), rows["score"].to_numpy()
    bars = [
        np.nan_to_num(np.vstack([rows[mid] - rows[low], rows[high] - rows[mid]]).clip(min=0))
        for mid, low, high in (("value", "low", "high"), ("score", "score_low", "score_high"))
    ]
    ax.errorbar(x, y, xerr=bars[0], yerr=bars[1], fmt="none", ecolor=GREY, elinewidth=0.9)
    stepped = rows["step"].notna().to_numpy()
    ax.plot(x[stepped], y[stepped], color="#bbbbbb", linewidth=0.8, zorder=1)
    shades = colormaps[MAP](np.linspace(0.92, 0.0, max(len(rows), 2)))[: len(rows)]
    ax.scatter(x[stepped], y[stepped], c=shades[stepped], s=26, edgecolors=INK, linewidths=0.6, zorder=3)
    short = [names[str(one)] for one in rows["model"]]
    for number, place in enumerate(np.flatnonzero(~stepped)):
        ax.scatter(
            x[place], y[place], color=shades[place], s=30, marker=_OTHERS[number % len(_OTHERS)], edgecolors=INK, linewidths=0.6,
            zorder=4, label=short[place],
        )  # fmt: skip
    if str(rows["metric"].iloc[0]) == "accuracy":
        reference_line(ax, 0.5, "chance", horizontal=True, kind="chance")
    ends = np.flatnonzero(stepped)
    for place in sorted({*ends[:1], *ends[-1:]}):
        ax.annotate(
            short[place],
            (x[place], y[place]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7.5,
        )
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.set_xlabel("image-text cosine")
    ax.set_ylabel(METRICS.get(str(rows["metric"].iloc[0]), str(rows["metric"].iloc[0])))
    return ax

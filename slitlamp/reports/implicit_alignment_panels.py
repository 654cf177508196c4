"""Panels of the figures of implicit alignment: curves over layers, tokens in two dimensions, bars of the vocabulary, scatters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from slitlamp.reports.draw import reference_line
from slitlamp.reports.style import BLUE, GREEN, GREY, INK, MAP, ORANGE, PURPLE, SKY, VERMILLION, styled


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
VARIANTS: Final = {
    "raw": "raw",
    "removed": "no massive dimensions",
    "standardised": "standardised",
}


def layer_axis(ax: Axes, label: str = "layer") -> None:
    """Whole layers below."""
    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def log_axis(ax: Axes) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


@styled
def curve(
    ax: Axes,
    rows: pd.DataFrame,
    look: Look,
    *,
    column: str = "value",
    spread: bool = False,
    faint: bool = False,
) -> Axes:
    """One column over the layers with its interval; with `spread`, also plus and minus one standard deviation of the grid."""
    low, high = ("low", "high") if column == "value" else (f"{column}_low", f"{column}_high")
    rows = rows.sort_values("layer")
    x = rows["layer"].to_numpy(dtype=float)
    if spread and "sd" in rows:
        ax.fill_between(
            x, rows[column] - rows["sd"], rows[column] + rows["sd"], color=look.colour, alpha=0.10, linewidth=0
        )
    ax.fill_between(x, rows[low], rows[high], color=look.colour, alpha=0.30, linewidth=0)
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
def curves(
    ax: Axes,
    table: pd.DataFrame,
    by: str,
    looks: Mapping[str, Look],
    *,
    zero: bool = False,
    column: str = "value",
    spread: bool = False,
    faint: bool = False,
) -> Axes:
    """A curve for each value of a column that has a look."""
    if zero:
        reference_line(ax, 0.0, horizontal=True)
    for name, look in looks.items():
        rows = table[table[by] == name]
        if len(rows):
            curve(ax, rows, look, column=column, spread=spread, faint=faint)
    return ax


@styled
def scatter_tokens(ax: Axes, points: pd.DataFrame, x: str, y: str) -> Axes:
    """Tokens of both modalities in two dimensions; the axes have no scale."""
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
    return ax


@styled
def vocabulary_bars(ax: Axes, rows: pd.DataFrame, colour: str, hatch: str) -> Axes:
    """The most frequent ids and the share of tokens that are read as them."""
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
    return ax


def model_looks(models: Sequence[str], names: Sequence[str]) -> dict[str, Look]:
    """Light to dark in the order of the models, with a marker that changes too."""
    shades = colormaps[MAP](np.linspace(0.92, 0.0, len(models)))
    return {
        model: Look(shade, "-", "osD^vP"[place % 6], name)
        for place, (model, shade, name) in enumerate(zip(models, shades, names, strict=True))
    }


@styled
def score_scatter(ax: Axes, rows: pd.DataFrame, names: Mapping[str, str]) -> Axes:
    """A score of every model against its alignment, with intervals in both directions; models joined in their order."""
    rows = rows.sort_values("order")
    x, y = rows["value"].to_numpy(), rows["score"].to_numpy()
    bars = [
        np.nan_to_num(np.vstack([rows[mid] - rows[low], rows[high] - rows[mid]]).clip(min=0))
        for mid, low, high in (("value", "low", "high"), ("score", "score_low", "score_high"))
    ]
    ax.errorbar(x, y, xerr=bars[0], yerr=bars[1], fmt="none", ecolor=GREY, elinewidth=0.9)
    ax.plot(x, y, color="#bbbbbb", linewidth=0.8, zorder=1)
    shades = colormaps[MAP](np.linspace(0.92, 0.0, max(len(rows), 2)))[: len(rows)]
    ax.scatter(x, y, c=shades, s=26, edgecolors=INK, linewidths=0.6, zorder=3)
    for place in {0, len(rows) - 1}:
        ax.annotate(
            names[str(rows["model"].iloc[place])],
            (x[place], y[place]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7.5,
        )
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    return ax

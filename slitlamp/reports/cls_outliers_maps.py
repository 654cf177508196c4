"""Maps of outlier tokens over the image: the picture, the encoder's and the decoder's attention, and what is an outlier."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slitlamp.reports.draw import bare, is_narrow, legend_below, need
from slitlamp.reports.drawing import Tables
from slitlamp.reports.style import BLUE, GREEN, MAP, PURPLE, VERMILLION, axes_or_new, new_figure, styled

MARKS = {
    "first in the encoder's attention": (VERMILLION, "s", 1.0),
    "norm above mean + sd": (BLUE, "o", 0.72),
    "norm above the threshold": (GREEN, "^", 0.5),
    "attention sink of the decoder": (PURPLE, "X", 0.5),
}
"""Colour, marker and size (1 fills a cell) of the outliers of each definition, drawn over each other."""


@styled
def token_map(table: pd.DataFrame, column: str, ax: Axes | None = None) -> Axes:
    """One quantity of the image tokens of one item by row and column.

    Args:
        table: columns row, column and `column`; one row per image token.
        column: which quantity, from zero.
        ax: where to draw; a new figure if None.
    """
    need(table, "row", "column", column)
    ax = axes_or_new(ax, width=2.4, height=2.6)
    grid = table.pivot(index="row", columns="column", values=column).to_numpy(dtype=np.float64)
    ax.imshow(grid, cmap=MAP, vmin=0, aspect="equal", interpolation="nearest")
    ax.set_title(column.replace("_", " "), fontsize=9, fontweight="normal")
    return bare(ax)


@styled
def outlier_picture(pixels: pd.DataFrame, table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The image of one item, and on it the outliers of every definition.

    Args:
        pixels: columns y, x, red, green, blue (0 to 255); one row per pixel.
        table: columns row, column and those of `MARKS` that are known (whether the token is one); one row per image token.
        ax: where to draw; a new figure if None.
    """
    need(pixels, "y", "x", "red", "green", "blue")
    need(table, "row", "column")
    ax = axes_or_new(ax, width=2.4, height=2.6)
    height, width = int(pixels["y"].max()) + 1, int(pixels["x"].max()) + 1
    colours = pixels.sort_values(["y", "x"])[["red", "green", "blue"]].to_numpy(dtype=np.uint8)
    rows, columns = int(table["row"].max()) + 1, int(table["column"].max()) + 1
    ax.imshow(
        colours.reshape(height, width, 3), extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), interpolation="nearest",
        alpha=0.75,
    )  # fmt: skip
    cell = 72 * ax.get_figure(root=True).get_figwidth() / 3.6 / columns  # type: ignore[union-attr]
    for name, (colour, marker, size) in MARKS.items():
        if name in table and table[name].any():
            chosen = table[table[name].astype(bool)]
            ax.scatter(
                chosen["column"], chosen["row"], marker=marker, s=(0.62 * size * cell) ** 2 * 0.5, facecolors="none",
                edgecolors=colour, linewidths=1.6, label=f"_{name}",
            )  # fmt: skip
    ax.set_title("image", fontsize=9, fontweight="normal")
    return bare(ax)


@styled
def maps(tables: Tables, width: float) -> Figure | None:
    """A row per item: the picture with outliers, the encoder's attention, the decoder's."""
    values, pixels = tables.get("maps"), tables.get("pictures")
    if values is None or pixels is None:
        return None
    items = list(dict.fromkeys(values["item"]))[: 2 if is_narrow(width) else 3]
    encoder = next(str(name) for name in values if str(name).startswith("encoder_"))
    side = width / 3
    figure = new_figure(width, side * len(items) + 0.9)
    panels = figure.subplots(len(items), 3, squeeze=False)
    kind = str(values["encoder"].iloc[0])
    layer = encoder.removeprefix("encoder_")
    wide = not is_narrow(width)
    titles = ["image", f"{kind},\nlayer {layer}", "decoder,\nend of the prompt" if wide else "decoder"]
    if not wide:
        titles[1] = f"encoder,\nlayer {layer}"
    for row, item in zip(panels, items, strict=True):
        table = values[values["item"] == item]
        outlier_picture(pixels[pixels["item"] == item], table, row[0])
        token_map(table, encoder, row[1])
        token_map(table, "decoder", row[2])
    for place, row in enumerate(panels):
        for ax, title in zip(row, titles, strict=True):
            ax.set_title("" if place else title, fontsize=9, fontweight="normal")
    legend_below(figure, _handles(values))
    return figure


def _handles(table: pd.DataFrame) -> list[Line2D]:
    return [
        Line2D([], [], linestyle="none", marker=marker, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.6,
               label=name)
        for name, (colour, marker, _) in MARKS.items() if name in table and table[name].any()
    ]  # fmt: skip

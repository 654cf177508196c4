"""The figures of `ClsOutliers`."""

from __future__ import annotations

from typing import Final

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slitlamp.reports import cls_outliers_panels as panels
from slitlamp.reports.cls_outliers_maps import maps
from slitlamp.reports.draw import is_narrow, legend_below, outer_labels, own_legend, panel_grid
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import (
    TOKEN_COLOURS,
    TOKEN_MARKERS,
    TOKEN_NAMES,
    new_figure,
    styled,
)


@styled
def _overlap(tables: Tables, width: float) -> Figure | None:
    table = tables.get("overlap")
    if table is None:
        return None
    layers = list(dict.fromkeys(table["encoder_layer"]))[:2]
    figure, axes = panel_grid(width, len(layers), 2.8)
    for ax, layer in zip(axes, layers, strict=True):
        rows = table[table["encoder_layer"] == layer]
        panels.overlap_curves(rows, ax)
        ax.set_title(f"tower layer {layer}" + (" (features)" if rows["features"].iloc[0] else ""))
    outer_labels(axes)
    own_legend(figure, axes[:1])
    return figure


@styled
def _influence(tables: Tables, width: float) -> Figure | None:
    table, differences = tables.get("influence"), tables.get("influence_difference")
    if table is None:
        return None
    figure, axes = panel_grid(width, 1 if differences is None else 2, 2.1, extra=0.7)
    panels.influence_points(table[table["features"]], axes[0])
    labels = [one for one in ("object", "hallucinated") if (table["label"] == one).any()]
    handles = [_point(TOKEN_COLOURS[one], TOKEN_MARKERS[one], TOKEN_NAMES[one]) for one in labels]
    if differences is not None:
        panels.difference_points(differences[differences["features"]], axes[1])
        outer_labels(axes, names=True)
        shown = set(differences["compared"])
        handles += [
            _point(colour, marker, name, filled=filled)
            for name, colour, marker, filled, _ in panels.COMPARED
            if name in shown
        ]
    legend_below(figure, handles)
    return figure


def _point(colour: str, marker: str, name: str, *, filled: bool = True) -> Line2D:
    face = colour if filled else "white"
    return Line2D([], [], linestyle="none", marker=marker, color=colour, markerfacecolor=face, label=name)


@styled
def _definitions(tables: Tables, width: float) -> Figure | None:
    outliers, agreement = tables.get("outliers"), tables.get("agreement")
    if outliers is None or agreement is None:
        return None
    figure, axes = panel_grid(width, 2, 2.3, extra=0.1)
    panels.count_points(outliers, axes[0])
    panels.jaccard_points(agreement, axes[1])
    return figure


@styled
def _norms(tables: Tables, width: float) -> Figure | None:
    table, histogram = tables.get("norms"), tables.get("norm_histogram")
    if table is None or histogram is None:
        return None
    figure, axes = panel_grid(width, 4, 2.3 if is_narrow(width) else 2.4, columns=2, extra=0.6)
    for place, stream in enumerate(("tower", "decoder")):
        rows, bins = table[table["stream"] == stream], histogram[histogram["stream"] == stream]
        densities, ratios = axes[2 * place : 2 * place + 2]
        panels.norm_densities(bins, rows, densities)
        panels.norm_ratios(rows, ratios)
        densities.set_title(stream)
    handles = list(axes[1].get_legend_handles_labels()[0])
    shades = axes[0].patches
    for number, name in {0: "first layer", len(shades) // 2: "middle layer", len(shades) - 1: "last layer"}.items():
        handles.append(Line2D([], [], color=shades[number].get_edgecolor(), label=name))
    legend_below(figure, handles)
    return figure


@styled
def _concentration(tables: Tables, width: float) -> Figure | None:
    table = tables.get("concentration")
    if table is None:
        return None
    figure = new_figure(width, 3.2)
    ax = figure.add_subplot()
    panels.concentration_lines(table, ax)
    own_legend(figure, [ax])
    return figure


def _n(table: pd.DataFrame) -> str:
    return f"{int(table['n_items'].max())} items"


FIGURES: Final = {
    "overlap": Drawing(
        "Do encoder and decoder look at the same tokens?",
        lambda tables: (
            f"Overlap H_i of the i image tokens first in the encoder's attention ({tables['overlap']['encoder'].iloc[0]}) and "
            f"the i first in the decoder's, over {_n(tables['overlap'])}, with 95 % intervals. Dashed: chance. Dotted orange: "
            "the decoder's attention on the next image, which shows what is common to all images."
        ),
        _overlap,
    ),
    "influence": Drawing(
        "Does the decoder lean on the encoder's first tokens where it hallucinates?",
        lambda tables: (
            "F: share of the decoder's attention to image tokens that falls on the tokens first in the encoder's attention, at "
            "object words, with 95 % intervals over images. Controls: as many random tokens, and as many others that get the "
            "most similar attention at the end of the prompt. Between true neighbours: against the true objects named before "
            "and after, so that the place in the text is the same. Dashed: chance, and no difference."
        ),
        _influence,
    ),
    "maps": Drawing(
        "Where encoder and decoder look",
        lambda tables: (
            "The first images with the outliers of every definition, the encoder's attention and the decoder's; bright is much, "
            "each map on a scale of its own."
        ),
        maps,
    ),
    "definitions": Drawing(
        "Definitions of outliers beside each other",
        lambda tables: (
            f"Left: how much of the decoder's attention the outliers of each definition hold, over {_n(tables['outliers'])}. "
            "Right: Jaccard index of every two definitions, over the items in which both mark a token. Crosses: share of the "
            "tokens, and the mean index of random sets of the same sizes."
        ),
        _definitions,
    ),
    "norms": Drawing(
        "Norms of image tokens",
        lambda tables: (
            f"Histograms of norms by layer (dark is deep), and the largest over the median norm of an image, over "
            f"{_n(tables['norms'])}. Tokens of high norm would make a second mode, whose valley is drawn dashed; "
            + _modes(tables["norms"])
        ),
        _norms,
    ),
    "concentration": Drawing(
        "How concentrated the encoder's attention is, and on what",
        lambda tables: (
            f"Share of the encoder's attention on the few patches that get most, over {_n(tables['concentration'])}, and on the "
            "objects that are named in the captions, with 95 % intervals; dashed: what an even attention would give."
        ),
        _concentration,
    ),
}


def _modes(norms: pd.DataFrame) -> str:
    found = int(norms["valley"].notna().sum())
    return f"{found} of {len(norms)} layers have one." if found else "no layer has one."

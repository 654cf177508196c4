"""The figures of `SteeringVectors`."""

from __future__ import annotations

from typing import Any, Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slitlamp.reports.draw import band, layer_axis, need, own_legend, reference_line
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import BLUE, GREEN, INK, VERMILLION, axes_or_new, new_figure, styled

STYLES: Final[dict[str, tuple[str, str, str, Any]]] = {
    "difference_of_means": ("difference of means", BLUE, "o", "-"),
    "paired_component": ("first component of paired differences", VERMILLION, "s", (0, (6, 1.5))),
    "logistic": ("normal of a logistic regression", GREEN, "D", (0, (4, 1.5, 1, 1.5))),
}


@styled
def steering_curves(layers: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """AUROC of the projection on each method's vector by layer with its interval, random directions, and chance.

    Args:
        layers: columns method, layer, auroc, low, high, random.
        ax: where to draw; a new figure if None.
    """
    need(layers, "method", "layer", "auroc", "low", "high", "random")
    ax = axes_or_new(ax)
    for method, rows in layers.groupby("method", sort=False):
        name, colour, marker, line = STYLES[str(method)]
        ax.plot(rows["layer"], rows["auroc"], color=colour, marker=marker, linestyle=line, markersize=4.5, label=name)
        band(ax, rows["layer"], rows["low"], rows["high"], colour, alpha=0.13)
    first = layers[layers["method"] == layers["method"].iloc[0]]
    ax.plot(
        first["layer"], first["random"], color=INK, linestyle=(0, (1, 1.2)), linewidth=1.1,
        label="random directions, either way",
    )  # fmt: skip
    reference_line(ax, 0.5, horizontal=True, kind="chance")
    layer_axis(ax)
    ax.set_ylabel("AUROC of left-out images")
    return ax


def _layers(tables: Tables, width: float) -> Figure | None:
    layers = tables.get("layers")
    if layers is None:
        return None
    figure = new_figure(width, 3.3)
    own_legend(figure, [steering_curves(layers, figure.add_subplot())])
    return figure


def _caption(tables: Tables) -> str:
    first = tables["layers"].iloc[0]
    return (
        f"AUROC of projections on steering vectors for {first['positive']} against the rest, on images that the vector was not "
        f"made of, with 95 % bootstrap intervals over {int(first['n_images'])} images. Dotted: the mean distance of random "
        "directions from chance, which have no sign of their own. Grey line: chance."
    )


FIGURES: Final = {"layers": Drawing("How well steering vectors tell the classes apart", _caption, _layers)}

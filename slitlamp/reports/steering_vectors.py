"""The figures of `SteeringVectors`."""

from __future__ import annotations

from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from slitlamp.reports.draw import legend_below, reference_line
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import BLUE, GREEN, INK, VERMILLION, new_figure, styled

STYLES: Final[dict[str, tuple[str, str, str, Any]]] = {
    "difference_of_means": ("difference of means", BLUE, "o", "-"),
    "paired_component": ("first component of paired differences", VERMILLION, "s", (0, (6, 1.5))),
    "logistic": ("logistic normal", GREEN, "D", (0, (4, 1.5, 1, 1.5))),
}
RANDOM: Final[Any] = (0, (1, 1.2))


@styled
def _layers(tables: Tables, width: float) -> Figure | None:
    layers = tables.get("layers")
    if layers is None:
        return None
    figure = new_figure(width, 3.3)
    ax = figure.add_subplot()
    handles = []
    for method, rows in layers.groupby("method", sort=False):
        name, colour, marker, line = STYLES[str(method)]
        ax.plot(
            rows["layer"], rows["auroc"], color=colour, marker=marker, linestyle=line, markersize=4.5, label="_curve"
        )
        ax.fill_between(rows["layer"], rows["low"], rows["high"], color=colour, alpha=0.13, linewidth=0)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle=line, markersize=4.5, label=name))
    first = layers[layers["method"] == layers["method"].iloc[0]]
    ax.plot(first["layer"], first["random"], color=INK, linestyle=RANDOM, linewidth=1.1, label="_random")
    handles.append(Line2D([], [], color=INK, linestyle=RANDOM, linewidth=1.1, label="random directions, either way"))
    reference_line(ax, 0.5, "", horizontal=True)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.set_xlabel("layer")
    ax.set_ylabel("AUROC of left-out images")
    legend_below(figure, handles)
    return figure


def _caption(tables: Tables) -> str:
    first = tables["layers"].iloc[0]
    return (
        f"AUROC of projections on steering vectors for {first['positive']} against the rest, on images that the vector was not "
        f"made of, with 95 % bootstrap intervals over {int(first['n_images'])} images. Dotted: the mean distance of random "
        "directions from chance, which have no sign of their own. Grey line: chance."
    )


FIGURES: Final = {"layers": Drawing("How well steering vectors tell the classes apart", _caption, _layers)}

"""The figures of `LinearProbe`."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slitlamp.reports.draw import band, layer_axis, legend_below, need, panel_grid, reference_line
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    VERMILLION,
    axes_or_new,
    short_names,
    styled,
)

COLOURS: Final = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE)
MARKERS: Final = ("o", "s", "D", "^", "P")
LINES: Final[tuple[Any, ...]] = ("-", (0, (6, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (2, 1.2)), (0, (7, 3)))
CONTROL: Final = "control labels"
NULL: Final = "95 % of permuted labels"


@styled
def probe_curves(layers: pd.DataFrame, value: str, ax: Axes | None = None) -> Axes:
    """A column against the layer for each class with its interval; beside AUROC control labels and permutations.

    Args:
        layers: columns layer, positive, `value` with its interval, control, control_low, control_high, null_high.
        value: "auroc" or "selectivity".
        ax: where to draw; a new figure if None.
    """
    low, high = ("low", "high") if value == "auroc" else (f"{value}_low", f"{value}_high")
    need(layers, "layer", "positive", value, low, high, "control", "control_low", "control_high", "null_high")
    ax = axes_or_new(ax)
    for place, (_, rows) in enumerate(layers.groupby("positive", sort=False)):
        colour, marker, line = (kind[place % len(kind)] for kind in (COLOURS, MARKERS, LINES))
        ax.plot(rows["layer"], rows[value], color=colour, marker=marker, linestyle=line, markersize=4.5, label="_curve")
        band(ax, rows["layer"], rows[low], rows[high], colour)
        if value == "auroc" and place == 0:
            ax.fill_between(
                rows["layer"],
                rows["control_low"],
                rows["control_high"],
                color=INK,
                alpha=0.1,
                linewidth=0,
                hatch="....",
            )
            ax.plot(rows["layer"], rows["control"], color=INK, linestyle=(0, (1, 1.2)), linewidth=1.1, label="_control")
            ax.plot(rows["layer"], rows["null_high"], color=INK, linestyle=(0, (5, 2)), linewidth=0.9, label="_null")
    reference_line(ax, 0.5 if value == "auroc" else 0.0, "", horizontal=True)
    layer_axis(ax)
    ax.set_ylabel("AUROC of left-out images" if value == "auroc" else "selectivity (AUROC - control)")
    return ax


@styled
def _layers(tables: Tables, width: float) -> Figure | None:
    layers = tables.get("layers")
    if layers is None or "selectivity" not in layers:
        return None
    both = bool(layers["selectivity"].notna().any())
    values = ["auroc", "selectivity"] if both else ["auroc"]
    figure, axes = panel_grid(width, len(values), 2.3, extra=0.9)
    for ax, value in zip(axes, values, strict=True):
        probe_curves(layers, value, ax)
    legend_below(figure, _handles(layers))
    return figure


def _handles(layers: pd.DataFrame) -> list[Line2D]:
    names = list(dict.fromkeys(layers["positive"]))
    short = short_names(names)
    handles = [
        Line2D(
            [], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], linestyle=LINES[i % len(LINES)],
            markersize=4.5, label=short[name],
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    of = f" of {short[names[0]]}" if len(names) > 1 else ""
    if layers["control"].notna().any():
        handles.append(Line2D([], [], color=INK, linestyle=(0, (1, 1.2)), linewidth=1.1, label=CONTROL + of))
    if layers["null_high"].notna().any():
        handles.append(Line2D([], [], color=INK, linestyle=(0, (5, 2)), linewidth=0.9, label=NULL + of))
    return handles


def _caption(tables: Tables) -> str:
    layers = tables["layers"]
    first = layers.iloc[0]
    n_folds = int(np.max(layers["n_folds"]))
    return (
        f"AUROC of linear probes for {first['target']} ({', '.join(dict.fromkeys(map(str, layers['positive'])))} against the "
        f"rest) on images they were not fitted on ({n_folds} folds over {int(first['n_images'])} images), with 95 % bootstrap "
        "intervals over images. Control labels are drawn at random per type (mean and range of the draws); selectivity is the "
        "difference, its band from the interval and the range. Grey line: chance."
    )


FIGURES: Final = {"layers": Drawing("What a linear probe reads at each layer", _caption, _layers)}

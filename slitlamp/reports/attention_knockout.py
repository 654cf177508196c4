"""The figures of `AttentionKnockout`."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slitlamp.reports.draw import (
    band,
    is_narrow,
    layer_axis,
    legend_below,
    need,
    outer_labels,
    panel_grid,
    reference_line,
)
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import BLUE, GREEN, GREY, INK, ORANGE, VERMILLION, axes_or_new, styled

_COLOURS: Final = {
    "image_to_question": GREEN,
    "image_to_last": BLUE,
    "question_to_last": VERMILLION,
    "image_to_generated": ORANGE,
}
_MARKERS: Final = {"image_to_question": "D", "image_to_last": "o", "question_to_last": "s", "image_to_generated": "^"}


@styled
def knockout_panel(effects: pd.DataFrame, flow: str, ax: Axes | None = None) -> Axes:
    """Change of the answer's probability by the layer on which the window is centred, with the control's.

    Args:
        effects: columns flow, layer, change, control (each with _low and _high), p_adjusted.
        flow: which one.
        ax: where to draw; a new figure if None.
    """
    need(
        effects,
        "flow",
        "layer",
        "change",
        "change_low",
        "change_high",
        "control",
        "control_low",
        "control_high",
        "p_adjusted",
    )
    ax = axes_or_new(ax)
    rows = effects[effects["flow"] == flow].sort_values("layer")
    layers = rows["layer"].to_numpy()
    reference_line(ax, 0, horizontal=True)
    for name, colour, line in (("control", GREY, (0, (2, 1.2))), ("change", _COLOURS.get(flow, BLUE), "-")):
        value, low, high = (100 * rows[one].to_numpy(dtype=np.float64) for one in (name, f"{name}_low", f"{name}_high"))
        band(ax, layers, low, high, colour, label=f"_{name}_interval")
        ax.plot(layers, value, color=colour, linestyle=line, label=f"_{name}")
    found = (rows["p_adjusted"] < 0.05).to_numpy()
    for chosen, face in ((found, _COLOURS.get(flow, BLUE)), (~found, "white")):
        ax.plot(
            layers[chosen], 100 * rows["change"].to_numpy(dtype=np.float64)[chosen], linestyle="none",
            marker=_MARKERS.get(flow, "o"), color=_COLOURS.get(flow, BLUE), markerfacecolor=face, label="_found", zorder=3,
        )  # fmt: skip
    ax.set_title(flow.replace("_to_", " → "))
    layer_axis(ax, "layer (centre of the window)")
    ax.set_ylabel("change of p, %")
    return ax


@styled
def _knockout(tables: Tables, width: float) -> Figure | None:
    effects = tables.get("effects")
    if effects is None or not len(effects):
        return None
    flows = list(dict.fromkeys(effects["flow"]))
    narrow = is_narrow(width)
    figure, axes = panel_grid(width, len(flows), 1.9 if narrow else 2.3, extra=0.7, sharex=True, sharey=True)
    for ax, flow in zip(axes, flows, strict=True):
        knockout_panel(effects, flow, ax)
    outer_labels(axes)
    handles = [
        Line2D([], [], color=INK, marker="o", label="flow cut (filled: beyond the control, BH 5 %)"),
        Line2D([], [], color=GREY, linestyle=(0, (2, 1.2)), label="as many random pairs cut"),
    ]
    legend_below(figure, handles, columns=1 if narrow else 2)
    return figure


def _caption(tables: Tables) -> str:
    effects = tables["effects"]
    width = int((effects["last_layer"] - effects["first_layer"]).max()) + 1
    return (
        f"Relative change of the probability of the answer's first token when positions may not attend to others in windows of "
        f"{width} layer{'s' if width > 1 else ''} (cut off at the ends), over {int(effects['n_items'].max())} right answers; "
        "bands are 95 % bootstrap intervals over images. Dashed: as many random pairs of other positions cut in the same layers. "
        "The further below the dashed line, the more the answer needs the flow there."
    )


FIGURES: Final = {"knockout": Drawing("Which flows the answer needs, by layer", _caption, _knockout)}

"""The figures of `LogitLens`."""

from __future__ import annotations

import math
from typing import Any, Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slitlamp.reports.draw import band, is_narrow, layer_axis, legend_below, need, panel_grid, reference_line
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import BLUE, GREY, INK, ORANGE, VERMILLION, axes_or_new, styled

Looks = dict[str, tuple[str, str, Any, str]]
_KINDS: Final[Looks] = {
    "all": (INK, "d", "-", "all tokens"),
    "object": (BLUE, "o", "-", "object in the image"),
    "hallucinated": (VERMILLION, "X", (0, (5, 2)), "hallucinated object"),
    "correct": (BLUE, "o", "-", "right answer"),
    "wrong": (VERMILLION, "X", (0, (5, 2)), "wrong answer"),
}
_PLACES: Final[Looks] = {
    "inside": (BLUE, "o", "-", "in the object's boxes"),
    "outside": (ORANGE, "D", (0, (5, 2)), "outside of them"),
    "shifted": (GREY, "v", (0, (2, 1.2)), "same shape elsewhere (control)"),
}
_TEXT: Final = {"probability": "p(emitted token)", "entropy": "entropy, nats", "kl": "KL to the last, nats"}
_IMAGE: Final = {"auroc": "AUROC of the place", "probability": "p(object's name)"}


@styled
def lens_panel(
    rows: pd.DataFrame, column: str, ax: Axes | None = None, *, looks: Looks | None = None, chance: float = math.nan
) -> Axes:
    """A metric by layer for several kinds, with intervals and the chance level.

    Args:
        rows: of one metric: columns layer, value, low, high, and `column` (and metric, for the label).
        column: which column tells the kinds apart: "kind" of tokens or "place" on the image.
        ax: where to draw; a new figure if None.
        looks: by kind, its colour, marker, line and name.
        chance: NaN where there is none.
    """
    need(rows, "layer", "value", "low", "high", column)
    ax = axes_or_new(ax)
    looks = looks or (_PLACES if column == "place" else _KINDS)
    reference_line(ax, chance, horizontal=True, kind="chance")
    for kind, (colour, marker, line, _) in looks.items():
        some = rows[rows[column] == kind].sort_values("layer")
        if len(some):
            band(ax, some["layer"], some["low"], some["high"], colour, alpha=0.15)
            ax.plot(some["layer"], some["value"], color=colour, marker=marker, linestyle=line, label=f"_{kind}")
    layer_axis(ax)
    ax.margins(y=0.08)
    if "metric" in rows:
        ax.set_ylabel((_IMAGE if column == "place" else _TEXT).get(str(rows["metric"].iloc[0]), ""))
    return ax


@styled
def _draw(
    table: pd.DataFrame,
    column: str,
    looks: Looks,
    metrics: dict[str, str],
    chances: dict[str, float],
    width: float,
) -> Figure:
    narrow = is_narrow(width)
    figure, axes = panel_grid(width, len(metrics), 1.9 if narrow else 2.2, extra=0.9, sharex=True)
    for ax, metric in zip(axes, metrics, strict=True):
        lens_panel(table[table["metric"] == metric], column, ax, looks=looks, chance=chances.get(metric, math.nan))
        if narrow and ax is not axes[-1]:
            ax.set_xlabel("")
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle=line, label=name)
        for kind, (colour, marker, line, name) in looks.items()
        if (table[column] == kind).any()
    ]
    handles.append(Line2D([], [], color=GREY, linewidth=1.0, linestyle=(0, (4, 2)), label="chance"))
    legend_below(figure, handles, columns=1 if narrow else None)
    return figure


def _text(tables: Tables, width: float) -> Figure | None:
    text = tables.get("text")
    if text is None or not len(text):
        return None
    chances = {str(metric): float(some["chance"].iloc[0]) for metric, some in text.groupby("metric")}
    return _draw(text, "kind", _KINDS, _TEXT, chances, width)


def _image(tables: Tables, width: float) -> Figure | None:
    image = tables.get("image")
    if image is None or not len(image):
        return None
    image = image[(image["metric"] != "auroc") | (image["place"] != "outside")]  # it is 1 - that of the inside
    return _draw(image, "place", _PLACES, _IMAGE, {"auroc": 0.5}, width)


def _of_text(tables: Tables) -> str:
    text = tables["text"].query("kind == 'all'").iloc[0]
    return (
        f"The model's own norm and head on the residual stream after each block, at the positions that predict "
        f"{int(text['n_tokens'])} tokens of {int(text['n_items'])} items; bands are 95 % bootstrap intervals over images. Where "
        "the probability rises, the model settles on what it will say; the last layer is its prediction."
    )


def _of_image(tables: Tables) -> str:
    one = tables["image"].iloc[0]
    return (
        f"The lens at image tokens, for the names of {int(one['n_objects'])} objects in {int(one['n_items'])} images: AUROC of "
        "a place's tokens against all others, and mean probability; bands are 95 % bootstrap intervals over images. The "
        "control is the same shape at another place on the image."
    )


FIGURES: Final = {
    "text": Drawing("When the model settles on its words", _of_text, _text),
    "image": Drawing("Do image tokens name what they show?", _of_image, _image),
}

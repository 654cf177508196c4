"""The figures of `HeadDivergence`."""

from __future__ import annotations

from typing import Final

from matplotlib.figure import Figure

from slitlamp.reports import heads, summaries
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import new_figure


def _head_map(tables: Tables, width: float) -> Figure:
    figure = new_figure(width, 3.2)
    heads.head_map(tables["heads"], figure.add_subplot())
    return figure


def _head_intervals(tables: Tables, width: float) -> Figure:
    figure = new_figure(width, 3.2)
    heads.head_intervals(tables["heads"], figure.add_subplot())
    return figure


def _t_vhd_histogram(tables: Tables, width: float) -> Figure | None:
    tokens = tables.get("tokens")
    if tokens is None or not (tokens["label"] != "").any():
        return None
    column, k = summaries.t_vhd_column(tokens)
    means = tables["t_vhd"]
    figure = new_figure(width, 3.6)
    labelled = tokens[tokens["label"] != ""]
    heads.t_vhd_histogram(labelled, column, means[means["k"] == k], figure.add_subplot())
    return figure


def _items(tables: Tables) -> str:
    return f"{int(tables['heads']['n_items'].iloc[0])} items"


FIGURES: Final = {
    "head_map": Drawing(
        "Which heads read the image",
        lambda tables: f"Mean VHD of every head at the first generated token, over {_items(tables)}.",
        _head_map,
    ),
    "head_intervals": Drawing(
        "Every head with its interval",
        lambda tables: f"Mean VHD at the first generated token with its bootstrap interval over {_items(tables)}.",
        _head_intervals,
    ),
    "t_vhd_histogram": Drawing(
        "T-VHD by kind of word",
        lambda tables: "T-VHD of words that name an object in the image, of those that name another, and of the rest.",
        _t_vhd_histogram,
    ),
}

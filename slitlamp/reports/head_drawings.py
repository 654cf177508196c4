"""The figures of `HeadDivergence`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slitlamp.reports import head_areas, head_consistency, head_prior, heads, summaries
from slitlamp.reports.draw import is_narrow, own_legend
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import new_figure, styled


def _one(draw: Callable[..., Axes]) -> Callable[[Tables, float], Figure | None]:
    """A figure of one panel of all heads."""

    def figure_of(tables: Tables, width: float) -> Figure | None:
        if "heads" not in tables:
            return None
        figure = new_figure(width, 3.2)
        draw(tables["heads"], figure.add_subplot())
        return figure

    return figure_of


@styled
def _t_vhd_histogram(tables: Tables, width: float) -> Figure | None:
    tokens, means = tables.get("tokens"), tables.get("t_vhd")
    if tokens is None or means is None or not (tokens["label"] != "").any():
        return None
    column, k = summaries.t_vhd_column(tokens)
    figure = new_figure(width, 4.0 if is_narrow(width) else 3.6)
    labelled = tokens[tokens["label"] != ""]
    ax = heads.t_vhd_histogram(labelled, column, means[means["k"] == k], figure.add_subplot())
    own_legend(figure, [ax])
    return figure


def _measured(tables: Tables) -> str:
    row = tables["heads"].iloc[0]
    how = (
        f", the image {row['contrast']}" if "contrast" in row else ""
    )  # a run of an earlier version has no such column
    return f"Mean VHD of every head at the first generated token{how}, over {int(row['n_items'])} items"


def _k(tables: Tables) -> str:
    return f"k = {summaries.t_vhd_column(tables['tokens'])[1]} heads per layer"


FIGURES: Final = {
    "head_map": Drawing(
        "Which heads read the image",
        lambda tables: f"{_measured(tables)}. Rings: heads that reinforcement would pick in at least half of them.",
        _one(heads.head_map),
    ),
    "head_intervals": Drawing(
        "Every head with its interval",
        lambda tables: (
            f"{_measured(tables)}, with its bootstrap interval. Filled: heads that reinforcement would pick in at least half of "
            "them; dashed: the median of the layer."
        ),
        _one(heads.head_intervals),
    ),
    "t_vhd_histogram": Drawing(
        "T-VHD by kind of word",
        lambda tables: (
            f"T-VHD ({_k(tables)}) of words that name an object in the image, of those that name another, and of the rest. "
            "Above: means with bootstrap intervals over items."
        ),
        _t_vhd_histogram,
    ),
    "sentence_histogram": Drawing("T-VHD by sentence", head_areas.sentence_caption, head_areas.sentence_histogram),
    "t_vhd_areas": Drawing("Does low T-VHD find hallucinations?", head_areas.areas_caption, head_areas.t_vhd_areas),
    "language_prior": Drawing(
        "What the model says without the image", head_prior.language_prior_caption, head_prior.language_prior
    ),
    "consistency": Drawing(
        "Are the heads the same everywhere?", head_consistency.consistency_caption, head_consistency.consistency
    ),
    "consistency_steps": Drawing(
        "Heads along the caption", head_consistency.steps_caption, head_consistency.consistency_steps
    ),
    "contrasts": Drawing("Ways of removing the image", head_consistency.contrasts_caption, head_consistency.contrasts),
    "contrast_maps": Drawing(
        "Heads by way of removing the image", head_consistency.contrast_maps_caption, head_consistency.contrast_maps
    ),
    "outliers": Drawing("What the outlier rule zeroes", head_consistency.outliers_caption, head_consistency.outliers),
    "points": Drawing("Where VHD is measured", head_consistency.points_caption, head_consistency.points),
}

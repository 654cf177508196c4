"""How well T-VHD tells hallucinated from true objects (figure 3 of VHR), by word and by sentence."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slitlamp.reports import heads, summaries
from slitlamp.reports.draw import (
    condition_handles,
    interval_point,
    is_narrow,
    legend_below,
    need,
    outer_labels,
    panel_grid,
    reference_line,
)
from slitlamp.reports.drawing import Tables
from slitlamp.reports.style import BLUE, GREY, VERMILLION, ConditionStyle, axes_or_new, new_figure, styled
from slitlamp.reports.wording import Estimate

LOOKS = {
    "": ConditionStyle(BLUE, "o", "-", True),
    "adjusted_": ConditionStyle(VERMILLION, "s", "-", True),
    "place_": ConditionStyle(GREY, "v", "-", False),
}
NAMES = {"": "low T-VHD", "adjusted_": "T-VHD less its mean at the place", "place_": "late place alone"}


@styled
def area_panel(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """AUROC by the number of heads that T-VHD sums, beside that of the place in the caption, with chance.

    Args:
        table: columns k, auroc, low, high, and where known the same with adjusted_ and place_ in front.
        ax: where to draw; a new figure if None.
    """
    need(table, "k", "auroc", "low", "high")
    ax = axes_or_new(ax, height=2.6)
    for place, row in enumerate(table.to_dict("records")):
        for shift, (prefix, look) in zip((-0.2, 0.0, 0.2), LOOKS.items(), strict=True):
            if f"{prefix}auroc" not in row:  # a run of an earlier version
                continue
            one = Estimate(row[f"{prefix}auroc"], row[f"{prefix}low"], row[f"{prefix}high"])
            interval_point(ax, place + shift, one, look, horizontal=False)
    reference_line(ax, 0.5, horizontal=True, kind="chance")
    ax.set_xticks(range(len(table)), labels=[str(int(k)) for k in table["k"]])
    ax.set_xlim(-0.5, len(table) - 0.5)
    ax.set_xlabel("heads per layer in T-VHD")
    ax.set_ylabel("AUROC")
    return ax


@styled
def t_vhd_areas(tables: Tables, width: float) -> Figure | None:
    """AUROC of words, and of sentences under each mean."""
    words, of_sentences = tables.get("t_vhd_auroc"), tables.get("sentence_auroc")
    panels = {} if words is None else {"words": words}
    if of_sentences is not None:
        for kind, rows in of_sentences.groupby("mean_over", sort=False):
            panels[f"sentences: {'all tokens' if kind == 'tokens' else kind}"] = rows
    panels = {name: rows for name, rows in panels.items() if rows["auroc"].notna().any()}
    if not panels:
        return None
    figure, axes = panel_grid(width, len(panels), 2.3, extra=0.7, sharey=True)
    for ax, (name, rows) in zip(axes, panels.items(), strict=True):
        area_panel(rows, ax).set_title(name, fontsize=8.5)
    outer_labels(axes)
    legend_below(figure, condition_handles(list(LOOKS), LOOKS, NAMES))
    return figure


def areas_caption(tables: Tables) -> str:
    """What is drawn."""
    counts = [
        f"{int(row['n_hallucinated'])} hallucinated and {int(row['n_true'])} true {what}"
        for what, name in (("objects", "t_vhd_auroc"), ("sentences", "sentence_auroc"))
        if name in tables
        for row in [tables[name].iloc[0]]
    ]
    return (
        f"Area under the ROC curve for telling {', and '.join(counts)} apart; a sentence is hallucinated if one of its objects "
        "is. Hallucinated objects come late, where T-VHD is low for all: the grey triangles take the place in the caption "
        "alone, the squares T-VHD less its mean at that place. Dashed: chance. Bootstrap intervals over items."
    )


@styled
def sentence_histogram(tables: Tables, width: float) -> Figure | None:
    """T-VHD of sentences with and without a hallucinated object, and of sentences without an object."""
    table, means = tables.get("sentences"), tables.get("sentence_means")
    if table is None or means is None:
        return None
    kind = str(table["mean_over"].iloc[0])
    rows, means = table[table["mean_over"] == kind], means[means["mean_over"] == kind]
    column, k = summaries.t_vhd_column(rows)
    figure = new_figure(width, 4.0 if is_narrow(width) else 3.6)
    ax = heads.t_vhd_histogram(
        rows, column, means[means["k"] == k], figure.add_subplot(), unit="sentence", bins=16, names=SENTENCES
    )
    legend_below(figure, ax.get_legend_handles_labels()[0])
    return figure


SENTENCES = {"object": "true objects only", "hallucinated": "a hallucinated object", "other": "no object"}


def sentence_caption(tables: Tables) -> str:
    """What is drawn."""
    table = tables["sentences"]
    over = {"tokens": "all tokens", "objects": "the objects"}.get(str(table["mean_over"].iloc[0]), "the tokens")
    return (
        f"Mean T-VHD over {over} of a sentence: sentences that name a hallucinated object, those whose objects are all in the "
        "image, and the rest. Above: means with bootstrap intervals over items."
    )

"""The language prior (figure 1 of VHR): what of a caption stays when the image is gone."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slitlamp.reports.draw import band, category_axis, interval_point, is_narrow, need
from slitlamp.reports.drawing import Tables
from slitlamp.reports.style import (
    BLUE,
    GREY,
    INK,
    TOKEN_COLOURS,
    TOKEN_MARKERS,
    TOKEN_NAMES,
    ConditionStyle,
    axes_or_new,
    new_figure,
    styled,
)
from slitlamp.reports.wording import Estimate

MIN_TOKENS = 20
"""Fewest tokens at a place for which it is drawn."""
NAMES = {"all": "all tokens", "correct": "right answers", "wrong": "wrong answers", **TOKEN_NAMES}


@styled
def prior_by_kind(prior: pd.DataFrame, value: str, label: str, ax: Axes | None = None) -> Axes:
    """One number of the language prior by kind of word, with intervals, and its chance level as a short grey line.

    Args:
        prior: columns label, `value`, `value`_low, `value`_high, and for "same" same_chance.
        value: "kl", "same" or "gain".
        label: of the axis.
        ax: where to draw; a new figure if None.
    """
    need(prior, "label", value, f"{value}_low", f"{value}_high")
    ax = axes_or_new(ax, height=2.0)
    for place, row in enumerate(prior.to_dict("records")):
        kind = str(row["label"])
        look = ConditionStyle(TOKEN_COLOURS.get(kind, INK), TOKEN_MARKERS.get(kind, "d"), "-", True)
        interval_point(ax, place, Estimate(row[value], row[f"{value}_low"], row[f"{value}_high"]), look)
        if value == "same":
            ends = [place - 0.28, place + 0.28]
            ax.plot([row["same_chance"]] * 2, ends, color=GREY, linewidth=1.4, linestyle=(0, (2, 1)), label="_chance")
    if value != "same":
        ax.axvline(0, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1, label="_zero")
    category_axis(ax, [NAMES.get(str(one), str(one)) for one in prior["label"]])
    ax.set_xlim(left=min(0.0, *ax.get_xlim()) if value != "same" else 0, right=1 if value == "same" else None)
    ax.set_xlabel(label)
    return ax


@styled
def prior_by_place(places: pd.DataFrame, value: str, label: str, ax: Axes | None = None) -> Axes:
    """The same along the caption, with a band for the interval.

    Args:
        places: columns first, last (tokens of a bin, from 0), `value`, `value`_low, `value`_high, and for "same"
            same_chance.
        value, label, ax: as above.
    """
    need(places, "first", "last", value, f"{value}_low", f"{value}_high")
    ax = axes_or_new(ax, height=2.4)
    middle = (places["first"] + places["last"]) / 2 + 1
    band(ax, middle, places[f"{value}_low"], places[f"{value}_high"], BLUE)
    ax.plot(middle, places[value], color=BLUE, marker="o", markersize=3.5, label="_value")
    if value == "same":
        ax.plot(middle, places["same_chance"], color=GREY, linestyle=(0, (2, 1)), linewidth=1.2, label="_chance")
        ax.annotate(
            "chance", (float(middle.iloc[0]), float(places["same_chance"].iloc[0])), xytext=(2, 4),
            textcoords="offset points", fontsize=8, color="#595959",
        )  # fmt: skip
        ax.set_ylim(0, 1.03)
    else:
        ax.set_ylim(bottom=0)
    ax.set_xlabel("place of the generated token")
    ax.set_ylabel(label)
    return ax


@styled
def language_prior(tables: Tables, width: float) -> Figure | None:
    """Agreement and divergence of the predictions with and without the image, by kind of word and along the caption."""
    prior, places = tables.get("prior"), tables.get("prior_place")
    if prior is None or places is None:
        return None
    enough = places["n_tokens"] >= min(MIN_TOKENS, int(places["n_tokens"].max()))
    places = places[enough]
    narrow = is_narrow(width)
    tall = 0.75 + 0.22 * len(prior)
    heights = [tall, tall, 2.3, 2.3] if narrow else [tall, 2.3]
    figure = new_figure(width, sum(heights) + 0.2)
    axes = figure.subplots(4 if narrow else 2, 1 if narrow else 2, height_ratios=heights).ravel()
    same, kl = "share unchanged", "KL divergence (nats)"
    prior_by_kind(prior, "same", same, axes[0])
    prior_by_kind(prior, "kl", kl, axes[1])
    if not narrow:
        axes[1].set_yticklabels([])
    prior_by_place(places, "same", same, axes[2])
    prior_by_place(places, "kl", kl, axes[3])
    return figure


def language_prior_caption(tables: Tables) -> str:
    """What is drawn."""
    row = tables["prior"].iloc[0]
    return (
        f"The model continues the same {int(row['n_tokens'])} prefixes of {int(row['n_items'])} items with and without the "
        "image. Left: how often the most probable token stays the same; dashed in grey, how often it would if the two were "
        "dealt out at random among the tokens of the kind or place. Right: the divergence of the prediction with the image "
        "from that without it; 0 where the image says nothing. Bars and bands: bootstrap intervals over items."
    )

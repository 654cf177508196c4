"""Panels of the token ledger: the ranking of signals as detectors, their ROC curves, their distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from slitlamp.reports.draw import category_axis, interval_point, need, reference_line
from slitlamp.reports.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    TOKEN_COLOURS,
    TOKEN_HATCHES,
    TOKEN_LINES,
    VERMILLION,
    ConditionStyle,
    axes_or_new,
    condition_styles,
    short_names,
    styled,
)
from slitlamp.reports.wording import Estimate, number

FALSE: Final = ("hallucinated", "wrong")
FAMILY_STYLES: Final = {
    "together": ConditionStyle(INK, "h", "-", True),
    "visual dependence": ConditionStyle(BLUE, "o", "-", True),
    "states": ConditionStyle(PURPLE, "D", (0, (6, 1.5)), True),
    "attention": ConditionStyle(GREEN, "s", (0, (4, 1.5, 1, 1.5)), True),
    "certainty": ConditionStyle(VERMILLION, "^", (0, (5, 2)), True),
    "baseline": ConditionStyle(ORANGE, "P", (0, (2, 1.2)), True),
    "null": ConditionStyle(GREY, "v", (0, (1, 1.2)), False),
}
FAMILY_NAMES: Final = {
    "together": "signals together",
    "visual dependence": "what the image changes",
    "states": "hidden states",
    "attention": "attention",
    "certainty": "next-token distribution",
    "baseline": "baseline (reads no model)",
    "null": "control",
}
ARROWS: Final = {1: " ↑", -1: " ↓", 0: ""}
"""Which way a signal was expected to point in hallucinated objects."""


def row_names(rows: pd.DataFrame) -> list[str]:
    """The names of the rows of a ranking: title, expected direction, and a cross where the data are against it."""
    return [
        f"{row['title']}{ARROWS[int(row['sign'])]}{' ✗' if row.get('agrees') == 'no' else ''}"
        for row in rows.to_dict("records")
    ]


def oriented(values: NDArray[np.float64], sign: int) -> NDArray[np.float64]:
    """Values turned so that higher means hallucinated."""
    return values * (sign or 1)


@styled
def ranking_panel(rows: pd.DataFrame, ax: Axes | None = None, *, names: Sequence[str] | None = None) -> Axes:
    """AUROC of every signal with its interval, and below it, hollow and thin, the AUROC that is left when position and
    frequency are held fixed; a dashed line at chance.

    Args:
        rows: columns title, family, sign, auroc, low, high, and partial, partial_low, partial_high where they were measured.
        ax: where to draw; a new figure if None.
        names: of the rows; from the titles if None.
    """
    need(rows, "title", "family", "sign", "auroc", "low", "high")
    ax = axes_or_new(ax, height=0.8 + 0.28 * len(rows))
    for place, row in enumerate(rows.to_dict("records")):
        look = FAMILY_STYLES[str(row["family"])]
        estimate = Estimate.of(row, "auroc")
        interval_point(ax, place - (0.14 if "partial" in rows else 0), estimate, look)
        if "partial" in rows:
            hollow = ConditionStyle(look.colour, look.marker, look.line, False)
            part = Estimate.of(row, "partial", "partial_low", "partial_high")
            interval_point(ax, place + 0.2, part, hollow, strong=False)
    _bands(ax, rows)
    reference_line(ax, 0.5, "chance", kind="chance")
    category_axis(ax, row_names(rows) if names is None else list(names))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    ax.set_xlabel("AUROC, hallucinated or true object", loc="right")
    return ax


@styled
def sensitivity_panel(rows: pd.DataFrame, ax: Axes | None = None, *, names: Sequence[str] | None = None) -> Axes:
    """The share of hallucinated objects that each signal finds at a low false positive rate; a dashed line at chance.

    Args:
        rows: columns title, family, sign, tpr, tpr_low, tpr_high, fpr.
        ax: where to draw; a new figure if None.
        names: of the rows; none are written if it is empty.
    """
    need(rows, "title", "family", "tpr", "tpr_low", "tpr_high", "fpr")
    ax = axes_or_new(ax, height=0.8 + 0.28 * len(rows))
    rate = float(rows["fpr"].dropna().iloc[0])
    for place, row in enumerate(rows.to_dict("records")):
        estimate = Estimate.of(row, "tpr", "tpr_low", "tpr_high")
        interval_point(ax, place, estimate, FAMILY_STYLES[str(row["family"])])
    _bands(ax, rows)
    reference_line(ax, rate, "chance", kind="chance")
    category_axis(ax, row_names(rows) if names is None else list(names) or [""] * len(rows))
    ax.set_xlim(left=-0.01)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    ax.set_xlabel(f"found at {100 * rate:g} % false alarms", loc="right")
    return ax


def _bands(ax: Axes, rows: pd.DataFrame) -> None:
    """A faint band behind every second row, and a line below what is no single signal."""
    for place in range(0, len(rows), 2):
        ax.axhspan(place - 0.5, place + 0.5, color="#f6f6f6", linewidth=0, zorder=0, label="_band")
    together = int((rows["family"] == "together").sum())
    if 0 < together < len(rows):
        ax.axhline(together - 0.5, color=GREY, linewidth=0.8, zorder=1, label="_border")


def family_handles(rows: pd.DataFrame) -> list[Line2D]:
    """Legend entries of the families in a ranking, and of the hollow markers."""
    present = [name for name in FAMILY_STYLES if (rows["family"] == name).any()]
    handles = [
        Line2D(
            [], [], color=FAMILY_STYLES[name].colour, marker=FAMILY_STYLES[name].marker, linestyle="none", markersize=5.5,
            markerfacecolor=FAMILY_STYLES[name].face, markeredgewidth=1.2, label=FAMILY_NAMES[name],
        )
        for name in present
    ]  # fmt: skip
    if "partial" in rows and rows["partial"].notna().any():
        handles.append(
            Line2D(
                [], [], color=GREY, marker="o", markerfacecolor="white", linewidth=1.1, markersize=5.5,
                label="position, frequency held fixed",
            )
        )  # fmt: skip
    return handles


@styled
def signal_roc_panel(
    ledger: pd.DataFrame, rows: pd.DataFrame, ax: Axes | None = None, *, rate: float | None = None
) -> Axes:
    """ROC curves over a logarithmic false positive rate, so that the low rates at which a detector is used can be seen.

    Args:
        ledger: column label and one per signal.
        rows: of the ranking: columns signal, title, family, sign, and tpr, tpr_low, tpr_high where they were measured.
        ax: where to draw; a new figure if None.
        rate: the false positive rate at which the intervals of the table are drawn.
    """
    need(ledger, "label", *rows["signal"])
    ax = axes_or_new(ax, height=3.4)
    false = ledger["label"].isin(FALSE).to_numpy()
    floor = 1 / max(int((~false).sum()), 2)  # the smallest rate above 0 that can be seen
    grid = np.geomspace(floor, 1, 200)
    ax.plot(grid, grid, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)), label="chance")
    used: dict[str, int] = {}
    for place, row in enumerate(rows.to_dict("records")):
        family = str(row["family"])
        look, nth = FAMILY_STYLES[family], used.get(family, 0)
        used[family] = nth + 1
        values = oriented(ledger[str(row["signal"])].to_numpy(dtype=np.float64), int(row["sign"]))
        known = np.isfinite(values)
        fpr, tpr, _ = roc_curve(false[known], values[known], drop_intermediate=False)
        start = max(int(np.searchsorted(fpr, floor, side="right")) - 1, 0)
        x, y = np.maximum(fpr[start:], floor), tpr[start:]
        ax.step(
            x, y, where="post", color=look.colour, linestyle=look.line if nth == 0 else (0, (1, 1 + nth)),
            linewidth=2.2 if family == "together" else 1.5, label=str(row["title"]),
        )  # fmt: skip
        if rate is not None and np.isfinite(row.get("tpr_low", np.nan)):
            here = rate * 1.1 ** (place - (len(rows) - 1) / 2)  # beside each other
            ax.plot(
                [here, here], [row["tpr_low"], row["tpr_high"]], color=look.colour, linewidth=1.3, label="_interval"
            )
            ax.plot(
                [here], [row["tpr"]], marker=look.marker, color=look.colour, markersize=5, linestyle="none",
                label="_value",
            )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlim(floor, 1)
    ax.set_ylim(0, 1)
    ticks = [tick for tick in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0) if tick >= floor]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{100 * value:g} %"))
    ax.set_xlabel("true objects flagged (false positive rate)")
    ax.set_ylabel("hallucinated objects found")
    return ax


@styled
def comparison_panel(rankings: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """AUROC of every signal in several parts of a run (models, conditions, data sets), with intervals; dashed: chance.

    Signals are in the order of their mean AUROC, the random number last.

    Args:
        rankings: columns part, signal, title, family, auroc, low, high; rows without a number are left out.
        ax: where to draw; a new figure if None.
    """
    need(rankings, "part", "signal", "title", "family", "auroc", "low", "high")
    known = rankings[rankings["auroc"].notna()]
    means = known.groupby("signal")["auroc"].mean().sort_values(ascending=False)
    null = set(known.loc[known["family"] == "null", "signal"])
    order = sorted(means.index, key=lambda name: name in null)
    titles = dict(zip(known["signal"], known["title"], strict=True))
    parts = [str(one) for one in dict.fromkeys(rankings["part"])]
    looks, short = condition_styles(parts, dict.fromkeys(parts, "treatment")), short_names(parts, 34)
    ax = axes_or_new(ax, height=1.3 + 0.3 * len(order))
    step = 0.7 / len(parts)
    for row in known.to_dict("records"):
        offset = (parts.index(str(row["part"])) - (len(parts) - 1) / 2) * step
        interval_point(ax, order.index(row["signal"]) + offset, Estimate.of(row, "auroc"), looks[str(row["part"])])
    for part in parts:
        look = looks[part]
        ax.plot([], [], linestyle="none", marker=look.marker, color=look.colour, markersize=5.5, label=short[part])
    for place in range(0, len(order), 2):
        ax.axhspan(place - 0.5, place + 0.5, color="#f6f6f6", linewidth=0, zorder=0, label="_band")
    reference_line(ax, 0.5, "chance", kind="chance")
    category_axis(ax, [titles[name] for name in order])
    ax.set_xlabel("AUROC, hallucinated or true object", loc="right")
    return ax


@styled
def class_panel(
    ledger: pd.DataFrame, signal: str, title: str, ax: Axes | None = None, *, note: str = "", bins: int = 18
) -> Axes:
    """Histograms of one signal in true and in hallucinated objects, each as shares of its own, with their medians.

    Args:
        ledger: columns label and `signal`.
        signal: the column.
        title: of the panel.
        ax: where to draw; a new figure if None.
        note: put into the corner.
        bins: number of bins between the 0.5 % and the 99.5 % quantile; what lies outside is put into the outer bins.
    """
    need(ledger, "label", signal)
    ax = axes_or_new(ax, height=2.2)
    values = ledger[signal].to_numpy(dtype=np.float64)
    known = np.isfinite(values)
    false, values = ledger["label"].isin(FALSE).to_numpy()[known], values[known]
    low, high = np.quantile(values, [0.005, 0.995])
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    for label, chosen in (("object", ~false), ("hallucinated", false)):
        if not chosen.any():
            continue
        mine = np.clip(values[chosen], edges[0], edges[-1])
        share = np.histogram(mine, edges)[0] / len(mine)
        colour = TOKEN_COLOURS[label]
        ax.stairs(
            share, edges, fill=True, facecolor=colour, alpha=0.14, edgecolor=colour, hatch=TOKEN_HATCHES[label],
            linewidth=0, label="_fill",
        )  # fmt: skip
        ax.stairs(share, edges, color=colour, linestyle=TOKEN_LINES[label], linewidth=1.5, label=f"_{label}")
        ax.plot(
            [np.median(mine)], [0], marker=7, color=colour, markersize=7, clip_on=False,
            markerfacecolor=colour if label == "object" else "white",
            transform=ax.get_xaxis_transform(), linestyle="none", zorder=5, label="_median",
        )  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=3))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, place: number(value, 2)))
    ax.set_title(title)
    ax.set_ylabel("share of its kind")
    ax.text(1, 1.02, note, transform=ax.transAxes, ha="right", va="bottom", fontsize=8, color=GREY, label="_note")
    return ax


def class_handles() -> list[Line2D]:
    """Legend entries of true and hallucinated objects."""
    return [
        Line2D([], [], color=TOKEN_COLOURS[label], linestyle=TOKEN_LINES[label], label=name)
        for label, name in (("object", "object in the image"), ("hallucinated", "hallucinated object"))
    ] + [Line2D([], [], color=GREY, marker=7, linestyle="none", label="median (white: hallucinated)")]

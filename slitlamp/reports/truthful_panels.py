"""Panels of the figures of `TruthfulDirection`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from slitlamp.reports.draw import band, heat_map, need, reference_line
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
    TOKEN_MARKERS,
    TOKEN_NAMES,
    VERMILLION,
    axes_or_new,
    styled,
)
from slitlamp.reports.wording import count

METHOD_NAMES: Final = {"logistic": "logistic", "difference_of_means": "difference of means", "mlp": "perceptron"}
METHOD_COLOURS: Final = {"logistic": BLUE, "difference_of_means": VERMILLION, "mlp": GREEN}
METHOD_MARKERS: Final = {"logistic": "o", "difference_of_means": "s", "mlp": "D"}
METHOD_LINES: Final[dict[str, Any]] = {
    "logistic": "-",
    "difference_of_means": (0, (6, 1.5)),
    "mlp": (0, (4, 1.5, 1, 1.5)),
}
SCORE_NAMES: Final = {"neg_log_p": "\N{MINUS SIGN}log p of the token, nats", "mention": "mention index"}
KINDS: Final = ("object", "hallucinated")
ALIGNMENT_NAMES: Final = {"none": "unaligned", "coral": "CORAL"}


def alignment_name(name: str) -> str:
    """How an alignment is called in figures."""
    return ALIGNMENT_NAMES.get(name, name.replace("procrustes", "Procrustes"))


@styled
def truth_curve(
    layers: pd.DataFrame, method: str, ax: Axes | None = None, *, confidence: pd.Series | None = None
) -> Axes:
    """AUROC over layers with its band, the control labels with their range, chance, and the line of -log p with its band.

    Args:
        layers: columns layer, auroc, low, high, control_auroc, control_low, control_high of one method.
        method: its name.
        ax: where to draw; a new figure if None.
        confidence: auroc, low, high of -log p.
    """
    need(layers, "layer", "auroc", "low", "high", "control_auroc", "control_low", "control_high")
    ax = axes_or_new(ax)
    rows = layers.sort_values("layer")
    x = rows["layer"].to_numpy(dtype=np.float64)
    colour = METHOD_COLOURS.get(method, BLUE)
    band(ax, x, rows["low"], rows["high"], colour)
    ax.plot(
        x, rows["auroc"], color=colour, marker=METHOD_MARKERS.get(method, "o"), linestyle=METHOD_LINES.get(method, "-"),
        label="probe",
    )  # fmt: skip
    if rows["control_auroc"].notna().any():
        ax.fill_between(x, rows["control_low"], rows["control_high"], color=GREY, alpha=0.15, linewidth=0, hatch="....")
        ax.plot(
            x,
            rows["control_auroc"],
            color=GREY,
            marker="v",
            markerfacecolor="white",
            linestyle=":",
            label="random labels of objects",
        )
    if confidence is not None and np.isfinite(confidence["auroc"]):
        ax.axhspan(confidence["low"], confidence["high"], color=ORANGE, alpha=0.13, linewidth=0)
        ax.axhline(
            confidence["auroc"], color=ORANGE, linestyle=(0, (7, 2, 1.5, 2)), linewidth=1.4, label="\N{MINUS SIGN}log p"
        )
    ax.axhline(0.5, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)), label="chance")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ticks = list(x) if len(x) <= 10 else None
    if ticks is not None:
        ax.set_xticks(ticks, labels=["in" if one < 0 else f"{int(one)}" for one in ticks])
    ax.set_title(METHOD_NAMES.get(method, method))
    ax.set_xlabel("layer (in: the input)" if (x < 0).any() else "layer")
    ax.set_ylabel("AUROC")
    return ax


@styled
def score_histogram(mentions: pd.DataFrame, column: str, ax: Axes | None = None, *, bins: int = 28) -> Axes:
    """Distribution of a score for hallucinated and for true mentions, each as shares of its own.

    Args:
        mentions: columns hallucinated and `column`.
        column: the score.
        ax: where to draw; a new figure if None.
        bins: over the range of all.
    """
    need(mentions, "hallucinated", column)
    ax = axes_or_new(ax)
    values = mentions[column].to_numpy(dtype=np.float64)
    low, high = np.quantile(values, [0.002, 0.998])
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    clipped = np.clip(values, edges[0], edges[-1])
    for kind in KINDS:
        own = clipped[mentions["hallucinated"].to_numpy(dtype=bool) == (kind == "hallucinated")]
        if not len(own):
            continue
        share = np.histogram(own, edges)[0] / len(own)
        colour = TOKEN_COLOURS[kind]
        ax.stairs(share, edges, fill=True, color=colour, alpha=0.16, hatch=TOKEN_HATCHES[kind], linewidth=0)
        ax.stairs(
            share, edges, color=colour, linestyle=TOKEN_LINES[kind], linewidth=1.7,
            label=f"{TOKEN_NAMES[kind]}, {count(len(own), 'mention')}",
        )  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.set_xlabel("score" if column.startswith("score_") else SCORE_NAMES.get(column, column))
    ax.set_ylabel("share of its kind")
    return ax


@styled
def score_roc_panel(
    mentions: pd.DataFrame,
    scores: Sequence[tuple[str, str, str, Any]],
    ax: Axes | None = None,
    *,
    floor: float = 1e-3,
) -> Axes:
    """ROC curves over a logarithmic axis of false positive rates.

    Args:
        mentions: column hallucinated, and those named in `scores`.
        scores: (column, name, colour, line style) of each curve.
        ax: where to draw; a new figure if None.
        floor: the smallest rate shown.
    """
    need(mentions, "hallucinated", *(one[0] for one in scores))
    ax = axes_or_new(ax)
    label = mentions["hallucinated"].to_numpy(dtype=bool)
    n_true = max(int((~label).sum()), 1)
    floor = max(floor, 0.5 / n_true)
    for column, name, colour, line in scores:
        fpr, tpr, _ = roc_curve(label, mentions[column].to_numpy(dtype=np.float64), drop_intermediate=False)
        ax.step(np.maximum(fpr, floor), tpr, where="post", color=colour, linestyle=line, label=name)
    grid = np.geomspace(floor, 1, 200)
    ax.plot(grid, grid, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)), label="chance")
    ax.set_xscale("log")
    ticks = [one for one in (0.001, 0.01, 0.1, 1.0) if one >= floor]
    ax.set_xticks(ticks, labels=[f"{one:g}" for one in ticks])
    ax.set_xlim(floor, 1)
    ax.set_ylim(0, 1.01)
    for rate in (0.01, 0.05):
        ax.axvline(rate, color="#d9d9d9", linewidth=0.8, zorder=0)
    ax.set_xlabel("false positive rate (log scale)")
    ax.set_ylabel("true positive rate")
    return ax


@styled
def matrix_panel(
    table: pd.DataFrame, rows: list[str], columns: list[str], ax: Axes | None = None, *, bar: bool = True
) -> Axes:
    """AUROC of probes trained on the row and applied to the column, with the interval in each cell.

    Args:
        table: columns source, target, auroc, low, high.
        rows, columns: order of the names.
        ax: where to draw; a new figure if None.
        bar: whether to draw the colour bar.
    """
    need(table, "source", "target", "auroc", "low", "high")
    ax = axes_or_new(ax, height=1.2 + 0.4 * len(rows))
    grid = table.pivot_table(index="source", columns="target", values="auroc").reindex(index=rows, columns=columns)
    keyed = table.set_index(["source", "target"])
    many = grid.size > 36
    notes = grid.astype(object)
    for row in rows:
        for column in columns:
            if (row, column) in keyed.index and np.isfinite(grid.loc[row, column]):
                one = keyed.loc[(row, column)]
                text = f"{one['auroc']:.2f}".lstrip("0")
                notes.loc[row, column] = (
                    text if many else f"{text}\n{one['low']:.2f}\N{EN DASH}{one['high']:.2f}".replace("0.", ".")
                )
            else:
                notes.loc[row, column] = ""
    scale: dict[str, Any] = {"label": "AUROC (chance .5)", "shrink": 0.9, "pad": 0.03} if bar else {}
    heat_map(grid, ax, 0.4, 0.9, notes=notes, **scale)
    ax.set_xlabel("applied to")
    ax.set_ylabel("trained on")
    return ax


@styled
def component_panel(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """AUROC of subspace alignment over the number of components, beside the other alignments as lines.

    Args:
        table: rows of one pair: columns alignment, components, auroc, low, high, target_trained.
        ax: where to draw; a new figure if None.
    """
    need(table, "alignment", "components", "auroc", "low", "high", "target_trained")
    ax = axes_or_new(ax)
    swept = table[table["alignment"] == "subspace"].sort_values("components")
    x = swept["components"].to_numpy(dtype=np.float64)
    band(ax, x, swept["low"], swept["high"], BLUE)
    ax.plot(x, swept["auroc"], color=BLUE, marker="o", label="subspace")
    looks: dict[str, tuple[str, Any]] = {
        "none": (INK, (0, (1, 1.5))),
        "standardised": (VERMILLION, (0, (6, 1.5))),
        "coral": (GREEN, (0, (4, 1.5, 1, 1.5))),
    }
    for name, value in table[table["components"].isna()].groupby("alignment")["auroc"].first().items():
        colour, line = looks.get(str(name), (PURPLE, (0, (3, 1, 1, 1, 1, 1)) if "prompt" in str(name) else (0, (8, 2))))
        ax.axhline(value, color=colour, linestyle=line, linewidth=1.4, label=alignment_name(str(name)))
    ax.axhline(table["target_trained"].iloc[0], color=ORANGE, linewidth=1.6, label="trained on the target")
    ax.axhline(0.5, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)), label="chance")
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, labels=[f"{int(one)}" for one in x])
    ax.minorticks_off()
    ax.set_xlabel("components d'")
    ax.set_ylabel("AUROC on the target")
    return ax


@styled
def pmc_panel(table: pd.DataFrame, ax: Axes | None = None, *, minimum: int = 5) -> Axes:
    """Mean PMC by the number of preceding tokens of the sentence, hallucinated against true mentions, with intervals.

    Args:
        table: columns n_preceding, label, mean, low, high, n_mentions.
        ax: where to draw; a new figure if None.
        minimum: points of fewer mentions are left out.
    """
    need(table, "n_preceding", "label", "mean", "low", "high", "n_mentions")
    ax = axes_or_new(ax)
    shown = table[(table["n_mentions"] >= minimum) & table["low"].notna()]
    lengths = sorted(shown["n_preceding"].unique())
    for offset, kind in zip((-0.09, 0.09), KINDS, strict=True):
        rows = shown[shown["label"] == kind]
        x = np.array([lengths.index(one) for one in rows["n_preceding"]]) + offset
        ax.vlines(x, rows["low"], rows["high"], color=TOKEN_COLOURS[kind], linewidth=1.8)
        ax.plot(
            x,
            rows["mean"],
            color=TOKEN_COLOURS[kind],
            marker=TOKEN_MARKERS[kind],
            linestyle="none",
            label=TOKEN_NAMES[kind],
        )
    ax.set_xticks(range(len(lengths)), labels=[str(int(one)) for one in lengths])
    ax.set_xlim(-0.5, max(len(lengths), 1) - 0.5)
    ax.set_ylim(0, 1)
    ax.set_xlabel("preceding tokens of the sentence")
    ax.set_ylabel("PMC, mean over mentions")
    return ax


@styled
def pmc_difference_panel(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """PMC of hallucinated minus true mentions, without and with control of length.

    Args:
        table: columns quantity, value, low, high.
        ax: where to draw; a new figure if None.
    """
    need(table, "quantity", "value", "low", "high")
    ax = axes_or_new(ax, height=2.0)
    rows = table[table["quantity"].str.startswith("hallucinated minus true")].iloc[::-1]
    names = [one.removeprefix("hallucinated minus true").lstrip(", ") or "all mentions" for one in rows["quantity"]]
    y = np.arange(len(rows))
    ax.hlines(y, rows["low"], rows["high"], color=INK, linewidth=1.8)
    ax.plot(rows["value"], y, color=INK, marker="d", linestyle="none")
    short = {
        "equally many preceding tokens": "equally many\npreceding tokens",
        "regression on preceding tokens and place in the text": "regression on\nlength and place",
    }
    ax.set_yticks(y, labels=[short.get(one, one) for one in names])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.tick_params(axis="y", length=0)
    reference_line(ax, 0.0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=3))
    ax.set_xlabel("PMC, hallucinated \N{MINUS SIGN} true")
    return ax

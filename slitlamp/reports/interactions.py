"""Two at a time: what treatments do alone, what pairs of them do, and what a pair does beyond the sum of the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from slitlamp.errors import InputError
from slitlamp.reports import findings, notes
from slitlamp.reports.data import RunData
from slitlamp.reports.draw import Names, is_narrow, legend_below, panel_grid
from slitlamp.reports.metrics import Metric, metric, split_name
from slitlamp.reports.style import (
    BLUE,
    GREY,
    INK,
    VERMILLION,
    axes_or_new,
    contrast_ink,
    short_names,
    styled,
)
from slitlamp.reports.wording import Estimate, count, join, number, sentence

DIVERGING: Final = LinearSegmentedColormap.from_list("slitlamp_diverging", [VERMILLION, "#f7f7f7", BLUE])
"""Worse, no difference, better: told apart by all kinds of colour vision; in grey, by the signs that are written in."""
Pairs = Mapping[tuple[str, str], Estimate]
_HATCH: Final = "////"
_SIGNS: Final = {-1: "\N{MINUS SIGN}", 0: "0", 1: "+"}
SMALLEST: Final = 7.0
"""Points: the smallest letters of a figure."""


class Matrix(NamedTuple):
    """One metric on one data set: effects of single treatments, of pairs, and interactions, by the names of the treatments."""

    title: str
    metric: Metric
    single: dict[str, Estimate]
    both: dict[tuple[str, str], Estimate]
    interaction: dict[tuple[str, str], Estimate]
    rows: pd.DataFrame


def matrices(data: RunData) -> tuple[list[str], set[tuple[str, str]], list[Matrix]]:
    """The treatments that were paired, in order; the pairs that were refused; and CHAIR_i, recall and F1 of POPE where they are.

    CHAIR_i and recall are of the first caption data set, F1 of POPE's splits together or of the last one.
    """
    table, differences = (
        data.table("interactions", "condition", "first", "second"),
        data.table("differences", "reference"),
    )
    if table is None or differences is None:
        return [], set(), []
    gone = data.table("refused_pairs", "first", "second")
    refused = set() if gone is None else set(zip(gone["first"].astype(str), gone["second"].astype(str), strict=True))
    paired = {*table["first"].astype(str), *table["second"].astype(str), *(name for pair in refused for name in pair)}
    order = [name for name in findings.treatments(data) if name in paired]
    wanted = [
        (metric(name).label, metric(name), one)
        for one in findings.caption_datasets(data)[:1]
        for name in ("chair_i", "recall")
    ]
    splits = findings.pope_datasets(data)
    for one in ([name for name in splits if split_name(name) == "all"] or splits)[-1:]:
        wanted.append((f"POPE F1 ({split_name(one)})", metric("f1", "pope"), one))
    found = []
    for title, info, dataset in wanted:
        rows = table[(table["dataset"] == dataset) & (table["metric"] == info.name)]
        if rows.empty:
            continue
        alone = differences[
            (differences["dataset"] == dataset)
            & (differences["metric"] == info.name)
            & (differences["reference"].astype(str) == str(data.reference))
        ]
        single = {str(row["condition"]): Estimate.of(row) for row in alone.to_dict("records")}
        records = rows.to_dict("records")
        both = {
            (str(row["first"]), str(row["second"])): Estimate.of(row, "both_value", "both_low", "both_high")
            for row in records
        }
        beyond = {(str(row["first"]), str(row["second"])): Estimate.of(row) for row in records}
        found.append(Matrix(title, info, {one: single[one] for one in order if one in single}, both, beyond, rows))
    return order, refused, found


@styled
def interaction_panel(
    order: Sequence[str],
    single: Mapping[str, Estimate],
    both: Pairs,
    interaction: Pairs,
    measure: Metric | str,
    ax: Axes | None = None,
    *,
    refused: set[tuple[str, str]] | None = None,
    names: Names | None = None,
    title: str = "",
) -> Axes:
    """A matrix of treatments: effects alone on the diagonal, of pairs below it, interactions above it.

    Blue is better and red worse, by the sign of the number and what is better in this metric; the scale is the same on both
    sides of zero. Where cells are too small for numbers, they hold the sign
    alone. A number in bold with a star has an interval that excludes zero; hatched cells are pairs that were refused.

    Args:
        order: the treatments.
        single: the difference of each to the reference.
        both: the difference of each pair to the reference, by (first, second) in `order`.
        interaction: of each pair: its effect minus those of its two treatments.
        measure: the metric, or its name.
        ax: where to draw; a new figure if None.
        refused: pairs that do not run together.
        names: short names of treatments.
        title: title of the panel; the name of the metric if empty.
    """
    if not order:
        raise InputError("this figure needs at least one treatment; `order` is empty")
    info = metric(measure) if isinstance(measure, str) else measure
    names, refused = names or short_names(order), refused or set()
    ax = axes_or_new(ax, height=1.0 + 0.34 * len(order))
    cells: dict[tuple[int, int], Estimate] = {}
    for i, name in enumerate(order):
        cells[i, i] = single.get(name, Estimate(np.nan))
        for j in range(i + 1, len(order)):
            pair = (name, order[j])
            cells[j, i], cells[i, j] = (one.get(pair, Estimate(np.nan)) for one in (both, interaction))
    known = [abs(one.value) for one in cells.values() if one.defined]
    limit = max(known, default=0.0) or 1.0
    scale, sign = Normalize(-limit, limit), -1 if info.better == "lower" else 1
    wide = ax.bbox.width / ax.figure.dpi / len(order)  # inches
    # A signed number with a star takes about as many letters as it has digits and three, each two thirds as wide as high;
    # where that would be smaller than can be read, the sign stands alone.
    digits = next((n for n in (3, 2) if 72 * wide / (0.68 * (n + 3)) >= SMALLEST), 0)
    size = float(np.clip(72 * wide / (0.68 * (digits + 3)), SMALLEST, 8.0))
    for (row, column), one in cells.items():
        colour = DIVERGING(scale(sign * one.value)) if one.defined else (1.0, 1.0, 1.0, 1.0)
        gone = row != column and (order[min(row, column)], order[max(row, column)]) in refused
        ax.add_patch(
            Rectangle(
                (column, row), 1, 1, facecolor=colour, edgecolor=GREY if gone else "white", linewidth=0.8,
                hatch=_HATCH if gone else None, label="_refused" if gone else "_cell",
            )
        )  # fmt: skip
        if one.defined:
            clear = one.excludes(0.0)
            said = number(one.value, digits, signed=True) if digits else _SIGNS[int(np.sign(one.value))]
            ax.text(
                column + 0.5, row + 0.5, said + ("*" if clear else ""), ha="center",
                va="center", fontsize=size, color=contrast_ink(colour), fontweight="bold" if clear else "normal", label="_number",
            )  # fmt: skip
    for i in range(len(order)):
        ax.add_patch(Rectangle((i, i), 1, 1, fill=False, edgecolor=INK, linewidth=1.4, label="_single", zorder=3))
    ax.set_xlim(0, len(order))
    ax.set_ylim(len(order), 0)
    ax.set_xticks(np.arange(len(order)) + 0.5, labels=[str(i + 1) for i in range(len(order))])
    ax.set_yticks(
        np.arange(len(order)) + 0.5, labels=[f"{names.get(name, name)} {i + 1}" for i, name in enumerate(order)]
    )
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title or info.label, pad=6)
    return ax


@styled
def interaction_matrix(data: RunData, width: float) -> Figure | None:
    """A matrix per metric, one under the other; None for a run without pairs."""
    order, refused, found = matrices(data)
    if not found:
        return None
    tall = 0.75 + (0.27 if is_narrow(width) else 0.31) * len(order)
    figure, axes = panel_grid(width, len(found), tall, columns=1)
    for ax, one in zip(axes, found, strict=True):
        interaction_panel(
            order,
            one.single,
            one.both,
            one.interaction,
            one.metric,
            ax,
            refused=refused,
            names=data.short,
            title=one.title,
        )
    handles = [Patch(facecolor=BLUE, label="better"), Patch(facecolor=VERMILLION, label="worse")]
    if refused:
        handles.append(Patch(facecolor="white", edgecolor=GREY, hatch=_HATCH, label="refused together"))
    legend_below(figure, handles)
    return figure


def interaction_note(data: RunData) -> str:
    """The caption of `interaction_matrix`."""
    _, refused, found = matrices(data)
    if not found:
        return ""
    sizes = join([f"{one.title}: {notes.n_text(one.rows)}" for one in found if notes.n_text(one.rows)])
    hatched = " Hatched: refused together, with the reason in the table refused_pairs." if refused else ""
    return (
        f"Columns are numbered as rows. Diagonal (framed): the difference of each treatment to “{data.reference}”. Below it: the "
        "difference of the pair of the row and the column to it. Above it: their interaction, the effect of the pair minus those "
        "of its two treatments; 0 where they add up. Blue is better, red worse, each matrix on a scale of its own around zero. "
        f"Bold with a star: the {data.level} interval by image, of all four conditions resampled together, excludes zero; not "
        f"corrected for the {count(len(found[0].interaction), 'pair')} (the table interactions has p_holm).{hatched} {sizes}."
    )


def interaction_findings(data: RunData) -> list[str]:
    """For every metric: the pairs that are more or less than the sum of the two; and the pairs that were refused."""
    _, _, found = matrices(data)
    share = 1 - float(data.config.get("level", 0.95))
    sentences = []
    for one in found:
        clear = {pair: each for pair, each in one.interaction.items() if each.excludes(0.0)}
        of = f"of the {count(len(one.interaction), 'pair')}" if len(one.interaction) > 1 else "of one pair"
        by_chance = f"about {number(share * len(one.interaction), 1)} would by chance"
        if not clear:
            sentences.append(
                sentence(f"{of}, none has an interaction in {one.title} that is distinguishable from zero")
            )
            continue
        better = -1 if one.metric.better == "lower" else 1
        parts = [
            f"{findings.quoted(first)} with {findings.quoted(second)} "
            f"({each.text(signed=True)}, {'better' if each.value * better > 0 else 'worse'} than the sum)"
            for (first, second), each in clear.items()
        ]
        sentences.append(
            sentence(
                f"{of}, {len(clear)} {'has' if len(clear) == 1 else 'have'} an interaction in {one.title} whose interval "
                f"excludes zero ({by_chance}): {join(parts)}"
            )
        )
        kept = one.rows[one.rows["p_holm"] < share]
        which = join([findings.quoted(str(name)) for name in kept["condition"]]) or "none"
        sentences.append(
            sentence(f"corrected for the number of pairs (Holm), {which} {'stands' if len(kept) < 2 else 'stand'}")
        )
    gone = data.table("refused_pairs", "first", "second", "reason")
    if gone is not None:
        for row in gone.to_dict("records"):
            pair = f"{findings.quoted(str(row['first']))} and {findings.quoted(str(row['second']))}"
            sentences.append(sentence(f"{pair} do not run together: {row['reason']}"))
    return sentences

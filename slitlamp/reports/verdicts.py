"""Does it beat its control? Every treatment against the reference and against the strongest of its matched controls."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slitlamp.experiments.verdicts import BEATS_ALL, HARMS, NO_CONTROL, NOT_ALL, NOTHING
from slitlamp.reports import findings, notes
from slitlamp.reports.conditions import better_way, extremes, locator
from slitlamp.reports.data import RunData
from slitlamp.reports.draw import (
    Names,
    category_axis,
    interval_point,
    is_narrow,
    legend_below,
    need,
    pad_limits,
    panel_grid,
    reference_line,
)
from slitlamp.reports.metrics import Metric, metric, split_name
from slitlamp.reports.style import BLUE, INK, VERMILLION, ConditionStyle, axes_or_new, short_names, styled
from slitlamp.reports.tables import Cell, Table
from slitlamp.reports.wording import Estimate, count, join, number, sentence

REFERENCE_LOOK: Final = ConditionStyle(BLUE, "o", "-", True)
CONTROL_LOOK: Final = ConditionStyle(VERMILLION, "v", "-", False)
STAR: Final = "★"
FEW_TREATMENTS: Final = 3
"""With more, the sentences at the top of the report are the verdicts alone."""
_NAMED: Final = 6
"""Most treatments of which nothing is shown that a sentence names; the table has them all."""
_BAND: Final = "#f2f2f0"
_COLUMNS: Final = ("treatment", "dataset", "metric", "value", "low", "high", "verdict")


class Shown(NamedTuple):
    """A metric on a data set: what one panel, one table and one paragraph are about."""

    title: str
    metric: Metric
    rows: pd.DataFrame


def shown(data: RunData) -> list[Shown]:
    """CHAIR_i and CHAIR_i at equal recall of the first caption data set, and F1 of POPE (its splits together, or the last one).

    The treatments are in one order, the best at CHAIR_i at equal recall first, or, without captions, at F1.
    """
    table = data.table("verdicts", *_COLUMNS)
    if table is None:
        return []
    found = []
    for dataset in findings.caption_datasets(data)[:1]:
        found += [(metric(name).label, metric(name), dataset) for name in ("chair_i", "chair_i_matched")]
    splits = findings.pope_datasets(data)
    for dataset in ([name for name in splits if split_name(name) == "all"] or splits)[-1:]:
        found.append((f"POPE F1 ({split_name(dataset)})", metric("f1", "pope"), dataset))
    parts = [
        Shown(title, info, table[(table["dataset"] == dataset) & (table["metric"] == info.name)])
        for title, info, dataset in found
    ]
    parts = [one for one in parts if len(one.rows)]
    if not parts:
        return []
    deciding = next((one for one in parts if one.metric.name == "chair_i_matched"), parts[0])
    ordered = deciding.rows.sort_values("value", ascending=deciding.metric.better == "lower", kind="stable")
    order = {name: place for place, name in enumerate(ordered["treatment"])}
    return [one._replace(rows=one.rows.sort_values("treatment", key=lambda names: names.map(order))) for one in parts]


@styled
def verdict_panel(
    table: pd.DataFrame, measure: Metric | str, ax: Axes | None = None, *, names: Names | None = None, title: str = ""
) -> Axes:
    """Differences of one number between every treatment and the reference, and, below each, its strongest control.

    Bars are thick where the interval excludes zero; a star at the right edge marks treatments that beat the reference and every
    control.

    Args:
        table: a row per treatment, in the order of the panel: treatment, value, low, high, control_value, control_low,
            control_high, verdict.
        measure: the metric, or its name.
        ax: where to draw; a new figure if None.
        names: short names of treatments.
        title: title of the panel; the name of the metric if empty.
    """
    need(table, "treatment", "value", "low", "high", "control_value", "control_low", "control_high", "verdict")
    info = metric(measure) if isinstance(measure, str) else measure
    names = names or short_names(table["treatment"].astype(str).tolist())
    ax = axes_or_new(ax, height=0.8 + 0.3 * len(table))
    for position, row in enumerate(table.to_dict("records")):
        if position % 2:
            ax.axhspan(position - 0.5, position + 0.5, color=_BAND, linewidth=0, zorder=0, label="_band")
        effect, beyond = Estimate.of(row), Estimate.of(row, "control_value", "control_low", "control_high")
        interval_point(ax, position - 0.17, effect, REFERENCE_LOOK, strong=effect.excludes(0.0))
        interval_point(ax, position + 0.19, beyond, CONTROL_LOOK, strong=beyond.excludes(0.0))
        if row["verdict"] == BEATS_ALL:
            ax.annotate(
                STAR, (1, position), xycoords=("axes fraction", "data"), xytext=(2, 0), textcoords="offset points",
                ha="left", va="center", fontsize=9, color=INK, annotation_clip=False, label="_star",
            )  # fmt: skip
    reference_line(ax, 0.0, kind="zero")
    category_axis(ax, [names.get(str(name), str(name)) for name in table["treatment"]])
    both = pd.concat(
        [
            table[["value", "low", "high"]],
            table[[f"control_{one}" for one in ("value", "low", "high")]].set_axis(["value", "low", "high"], axis=1),
        ]
    )
    pad_limits(ax, *extremes(both), include=(0.0,))
    ax.xaxis.set_major_locator(locator(3))  # signed numbers are long
    ax.set_title(title or info.label, pad=15, fontsize=8.5)
    better_way(ax, info)
    ax.set_xlabel(f"difference ({info.unit})" if info.unit else "difference")
    return ax


@styled
def verdicts(data: RunData, width: float) -> Figure | None:
    """CHAIR_i as it is and at equal recall, and F1 of POPE; None for a run without treatments."""
    parts = shown(data)
    if not parts:
        return None
    tall = 1.0 + 0.3 * len(parts[0].rows)
    figure, axes = panel_grid(width, len(parts), tall)
    for ax, one in zip(axes, parts, strict=True):
        verdict_panel(one.rows, one.metric, ax, names=data.short, title=one.title)
        if not is_narrow(width):
            ax.set_xlabel("difference")
            ax.set_yticklabels(ax.get_yticklabels() if ax is axes[0] else [])
    legend_below(figure, _handles(parts, str(data.reference)))
    return figure


def _handles(parts: list[Shown], reference: str) -> list[Line2D]:
    looks = [(REFERENCE_LOOK, f"minus {reference}")]
    if any(one.rows["control_value"].notna().any() for one in parts):
        looks.append((CONTROL_LOOK, "minus its strongest control"))
    handles = [
        Line2D(
            [], [], color=look.colour, marker=look.marker, markerfacecolor=look.face, markeredgewidth=1.2, label=name
        )
        for look, name in looks
    ]
    if any((one.rows["verdict"] == BEATS_ALL).any() for one in parts):
        star = Line2D(
            [], [], color=INK, marker="*", markersize=8, linestyle="none", label="beats both and every control"
        )
        handles.append(star)
    return handles


def verdicts_note(data: RunData) -> str:
    """The caption of `verdicts`."""
    parts = shown(data)
    sizes = [n for one in parts for n in [notes.n_text(one.rows)] if n]
    n = f" n = {join([f'{one[4:]}' for one in dict.fromkeys(sizes)])}." if sizes else ""
    return (
        f"Paired differences of every treatment to “{data.reference}” (filled) and to the strongest of its matched controls "
        f"(white; the control that comes closest to it or passes it), with {data.level} intervals by image; dashed: no "
        "difference. Thick bars exclude zero. In order of CHAIR_i at equal recall where there are captions: that is not won by "
        "naming less. A verdict asks for intervals beyond zero, which are not corrected for the number of treatments; the tables "
        f"below have p values that are (Holm).{n}"
    )


def verdict_findings(data: RunData) -> list[str]:
    """For every metric: which treatments beat the reference and all their controls, which do not, and which do harm."""
    sentences = []
    for one in shown(data):
        groups = {
            verdict: [findings.quoted(str(name)) for name in rows["treatment"]]
            for verdict, rows in one.rows.groupby("verdict", sort=False)
        }
        sentences.append(sentence(f"on {one.title}, {_clauses(groups, str(data.reference))}"))
        sentences += _corrected(one, data)
    return sentences


def _clauses(groups: dict[str, list[str]], reference: str) -> str:
    base = f"the reference {findings.quoted(reference)}"
    said = {
        BEATS_ALL: ("beats", "beat", f"{base} and every control"),
        NOT_ALL: ("beats", "beat", f"{base}, but not every control"),
        NO_CONTROL: ("beats", "beat", f"{base}, but no control of it was run"),
        HARMS: ("makes", "make", "it worse"),
    }
    clauses = [
        f"{join(groups[verdict])} {one if len(groups[verdict]) == 1 else several} {rest}"
        for verdict, (one, several, rest) in said.items()
        if verdict in groups
    ]
    if BEATS_ALL not in groups:
        clauses.insert(0, f"no treatment beats {base} and every control")
    if NOTHING in groups:
        others = groups[NOTHING]
        named = join(others) if len(others) <= _NAMED else f"{'the other' if len(groups) > 1 else 'all'} {len(others)}"
        clauses.append(f"of {named} nothing is shown")
    return "; ".join(clauses)


def _corrected(one: Shown, data: RunData) -> list[str]:
    """Which differences to the reference stand a correction for the number of treatments."""
    rows = one.rows[one.rows["p_holm"].notna()] if "p_holm" in one.rows else one.rows.iloc[:0]
    clear = rows[(rows["low"] > 0) | (rows["high"] < 0)]
    if len(rows) < 2 or clear.empty:
        return []
    alpha = 1 - float(data.config.get("level", 0.95))
    kept = [findings.quoted(str(name)) for name in clear.loc[clear["p_holm"] < alpha, "treatment"]]
    which = "all of them" if len(kept) == len(clear) else f"that of {join(kept)} alone" if kept else "none of them"
    what = "the one difference" if len(clear) == 1 else f"of the {len(clear)} differences"
    if len(clear) == 1:
        return [
            f"Corrected for {count(len(rows), 'treatment')} (Holm), {what} to the reference that excludes zero "
            f"{'stands' if kept else 'does not stand'} (p < {number(alpha)})."
        ]
    verb = "stand" if len(kept) == len(clear) else "stands"
    return [
        f"Corrected for {count(len(rows), 'treatment')} (Holm), {what} to the reference that exclude zero {which} "
        f"{verb} (p < {number(alpha)})."
    ]


def headline(data: RunData) -> list[str]:
    """The verdicts, for a run with so many treatments that a sentence on each would be no summary; otherwise none."""
    return verdict_findings(data) if len(findings.treatments(data)) > FEW_TREATMENTS else []


def verdict_tables(data: RunData) -> list[Table]:
    """A table per panel: every treatment with its two differences and the verdict."""
    made = []
    for one in shown(data):
        table = Table(
            f"{one.title}: treatment minus “{data.reference}” and minus its strongest control [{data.level} intervals, bold "
            "where they exclude zero].",
            [
                "treatment",
                "verdict",
                f"Δ to {data.reference}",
                "p, Holm",
                "Δ to its strongest control",
                "which control",
            ],
        )
        for row in one.rows.to_dict("records"):
            effect, beyond = Estimate.of(row), Estimate.of(row, "control_value", "control_low", "control_high")
            control = str(row["control"]) if isinstance(row.get("control"), str) else "–"
            table.rows.append(
                (
                    str(row["treatment"]),
                    [
                        Cell(str(row["verdict"]), strong=row["verdict"] == BEATS_ALL),
                        Cell(effect.text(signed=True), strong=effect.excludes(0.0)),
                        Cell(_p(row.get("p_holm"))),
                        Cell("–" if control == "–" else beyond.text(signed=True), strong=beyond.excludes(0.0)),
                        Cell(control),
                    ],
                )
            )
        made.append(table)
    return made


def _p(value: float | None) -> str:
    return "–" if value is None or not np.isfinite(value) else number(value)

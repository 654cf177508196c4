"""The figure of a causal check: what changing the place a probe points at does, beside matched random places."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from slitlamp.causal import causal_sentences
from slitlamp.reports.draw import is_narrow, need, own_legend, panel_grid, reference_line
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import BLUE, GREEN, GREY, ORANGE, axes_or_new, styled
from slitlamp.reports.wording import count

OUTCOMES: Final = {
    "kl": ("next token changed", "KL (nats)"),
    "true_logprob": ("true objects, right answers", "change of log p (nats)"),
    "false_logprob": ("hallucinated, wrong answers", "change of log p (nats)"),
    "gap": ("true minus false", "change of log p (nats)"),
}


_CONTROLS: Final = ((GREY, "v"), (ORANGE, "^"), (GREEN, "D"))
"""Colour and marker of the first, second and third kind of random targets."""


@styled
def causal_panel(rows: pd.DataFrame, ax: Axes | None = None, *, names: bool = True) -> Axes:
    """One outcome: every target (filled), and under it the mean of each kind of random targets (open), with intervals, and as a
    thin line from the least to the largest of them.

    Args:
        rows: of one outcome (of a name, if the column is there): target, control, effect, low, high, control_effect, control_low,
            control_high, draws_min, draws_max.
        ax: where to draw; a new figure if None.
        names: whether the targets are named at the axis.
    """
    need(rows, "target", "control", "effect", "low", "high", "control_effect", "control_low", "control_high")
    targets, kinds = list(dict.fromkeys(rows["target"])), list(dict.fromkeys(rows["control"]))
    ax = axes_or_new(ax, height=1.0 + _row_height(rows) * len(targets))
    shared = len(rows) == len(targets) * len(kinds)  # every target against every kind
    for place, (_, mine) in enumerate(rows.groupby("target", sort=False)):
        step = 0.7 / (1 + len(mine))
        top = len(targets) - 1 - place + 0.5 * step * len(mine)
        for number, row in enumerate(mine.to_dict("records")):
            if not number:
                _mark(ax, row, "", top, BLUE, "o", BLUE, "what the probe points at")
            kind = kinds.index(row["control"]) if shared else number
            colour, marker = _CONTROLS[kind % len(_CONTROLS)]
            name = str(row["control"]) if shared else "matched random targets"
            y = top - step * (number + 1)
            if "draws_min" in row:  # runs of earlier versions have not kept them
                ax.plot([row["draws_min"], row["draws_max"]], [y, y], color=colour, linewidth=0.8, label="_draws")
            _mark(ax, row, "control_", y, colour, marker, "white", name)
    reference_line(ax, 0.0)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_yticks(range(len(targets)), labels=[_wrapped(one) for one in reversed(targets)] if names else [])
    ax.set_ylim(-0.6, len(targets) - 0.4)
    if "outcome" in rows:
        title, unit = OUTCOMES.get(str(rows["outcome"].iloc[0]), ("", "effect"))
        ax.set_title(title)
        ax.set_xlabel(unit)
    return ax


def _mark(
    ax: Axes, row: Mapping[Any, Any], prefix: str, y: float, colour: str, marker: str, face: str, name: str
) -> None:
    ax.plot([row[f"{prefix}low"], row[f"{prefix}high"]], [y, y], color=colour, linewidth=2.0, label="_interval")
    ax.plot(
        row[f"{prefix}effect"], y, marker=marker, linestyle="none", color=colour, markerfacecolor=face, markersize=5.5,
        label=name,
    )  # fmt: skip


def _wrapped(text: str, width: int = 26) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _row_height(rows: pd.DataFrame) -> float:
    """Inches that a target takes: room for its name, and for the kinds of random targets under it."""
    lines = max(_wrapped(one).count("\n") + 1 for one in rows["target"])
    return max(0.3 + 0.2 * int(rows.groupby("target").size().max()), 0.17 * lines + 0.1)


@styled
def _figure(tables: Tables, width: float) -> Figure | None:
    table = tables.get("causal")
    if table is None or table.empty:
        return None
    shown = [one for one in OUTCOMES if (table["outcome"] == one).any()]
    height = _row_height(table[table["outcome"] == shown[0]]) * table["target"].nunique()
    figure, axes = panel_grid(width, len(shown), 0.95 + height, columns=2, extra=0.4)
    for place, (ax, outcome) in enumerate(zip(axes, shown, strict=True)):
        causal_panel(table[table["outcome"] == outcome], ax, names=is_narrow(width) or place % 2 == 0)
        if is_narrow(width):
            ax.set_title(_wrapped(ax.get_title(loc="left"), 20))
    own_legend(figure, axes[:1])
    return figure


def _caption(tables: Tables) -> str:
    table = tables["causal"]
    controls = "; ".join(dict.fromkeys(table["control"].astype(str)))
    n_tokens, n_images = (int(table[column].max()) for column in ("n_tokens", "n_groups"))
    return (
        "What intervening on the finding does to the next token, given the same text, at "
        f"{count(n_tokens, 'token')} of {count(n_images, 'image')}, with bootstrap intervals by image. Below it the mean of "
        f"{count(int(table['n_draws'].max()), 'random draw')} at most, and as a thin line their range: {controls}. Above zero, "
        "the tokens become more likely."
    )


def sentences(tables: Tables) -> list[str]:
    """Whether each target does more than random ones."""
    table = tables.get("causal")
    return [] if table is None else causal_sentences(table)


DRAWING: Final = Drawing("Is it causal?", _caption, _figure)

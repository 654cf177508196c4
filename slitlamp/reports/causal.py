"""The figure of a causal check: what changing the place a probe points at does, beside matched random places."""

from __future__ import annotations

from typing import Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slitlamp.causal import causal_sentences
from slitlamp.reports.draw import is_narrow, legend_below, reference_line
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import BLUE, GREY, axes_or_new, new_figure, styled
from slitlamp.reports.wording import count

OUTCOMES: Final = {
    "kl": ("next token changed", "KL (nats)"),
    "true_logprob": ("true objects, right answers", "change of log p (nats)"),
    "false_logprob": ("hallucinated, wrong answers", "change of log p (nats)"),
    "gap": ("true minus false", "change of log p (nats)"),
}


@styled
def causal_panel(rows: pd.DataFrame, ax: Axes | None = None, *, names: bool = True) -> Axes:
    """One outcome: every target (filled) and the mean of its random targets (open) with their intervals.

    Args:
        rows: of one outcome: target, effect, low, high, control_effect, control_low, control_high.
        ax: where to draw; a new figure if None.
        names: whether the targets are named at the axis.
    """
    ax = axes_or_new(ax, height=1.0 + 0.5 * len(rows))
    for place, row in enumerate(rows.to_dict("records")):
        pairs = ((0.12, "", BLUE, "o", BLUE), (-0.12, "control_", GREY, "v", "white"))
        for offset, prefix, colour, marker, face in pairs:
            value = row["effect"] if not prefix else row["control_effect"]
            y = len(rows) - 1 - place + offset
            ax.plot([row[f"{prefix}low"], row[f"{prefix}high"]], [y, y], color=colour, linewidth=2.0, label="_interval")
            ax.plot(
                value, y, marker=marker, linestyle="none", color=colour, markerfacecolor=face, markersize=5.5,
                label="what the probe points at" if not prefix else "matched random targets",
            )  # fmt: skip
    reference_line(ax, 0.0)
    ax.set_yticks(range(len(rows)), labels=[_wrapped(one) for one in rows["target"].iloc[::-1]] if names else [])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    return ax


def _wrapped(text: str, width: int = 26) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


@styled
def _figure(tables: Tables, width: float) -> Figure | None:
    table = tables.get("causal")
    if table is None or table.empty:
        return None
    shown = [one for one in OUTCOMES if (table["outcome"] == one).any()]
    narrow = is_narrow(width)
    columns = 1 if narrow else min(2, len(shown))
    rows = -(-len(shown) // columns)
    n_targets = table["target"].nunique()
    figure = new_figure(width, rows * (0.95 + 0.5 * n_targets) + 0.4)
    for place, outcome in enumerate(shown):
        ax = figure.add_subplot(rows, columns, place + 1)
        causal_panel(table[table["outcome"] == outcome], ax, names=place % columns == 0)
        title, unit = OUTCOMES[outcome]
        ax.set_title(title)
        ax.set_xlabel(unit)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    seen = dict(zip(labels, handles, strict=True))
    legend_below(figure, list(seen.values()))
    return figure


def _caption(tables: Tables) -> str:
    table = tables["causal"]
    controls = "; ".join(dict.fromkeys(table["control"].astype(str)))
    n_tokens, n_images = (int(table[column].max()) for column in ("n_tokens", "n_groups"))
    return (
        "What intervening on the finding does to the next token, given the same text, at "
        f"{count(n_tokens, 'token')} of {count(n_images, 'image')}, with bootstrap intervals by image. Beside it the mean of "
        f"{count(int(table['n_draws'].max()), 'random draw')} at most: {controls}. Above zero, the tokens become more likely."
    )


def sentences(tables: Tables) -> list[str]:
    """Whether each target does more than random ones."""
    table = tables.get("causal")
    return [] if table is None else causal_sentences(table)


DRAWING: Final = Drawing("Is it causal?", _caption, _figure)

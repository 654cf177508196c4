"""What several figures share: interval bars, lines of reference, legends of conditions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slitlamp.reports.style import GREY, NARROW, ConditionStyle, condition_styles, short_names, style
from slitlamp.reports.wording import Estimate

Styles = Mapping[str, ConditionStyle]
Names = Mapping[str, str]


def styles_and_names(conditions: Iterable[object], styles: Styles | None, names: Names | None) -> tuple[Styles, Names]:
    """The given styles and short names, or plain ones for the conditions of a table."""
    found = list(dict.fromkeys(str(one) for one in conditions))
    return styles or condition_styles(found), names or short_names(found)


def interval_point(
    ax: Axes, position: float, estimate: Estimate, look: ConditionStyle, *, horizontal: bool = True, strong: bool = True
) -> None:
    """A marker with its interval bar; nothing where the value is not defined, no bar where there is no interval."""
    if not estimate.defined:
        return
    if estimate.has_interval:
        ends, here = [estimate.low, estimate.high], [position, position]
        bar = (ends, here) if horizontal else (here, ends)
        ax.plot(
            *bar,
            color=look.colour,
            linewidth=2.2 if strong else 1.1,
            solid_capstyle="butt",
            label="_interval",
            zorder=2,
        )
    point = ([estimate.value], [position]) if horizontal else ([position], [estimate.value])
    ax.plot(
        *point, marker=look.marker, markersize=5.5, linestyle="none", color=look.colour,
        markerfacecolor=look.face, markeredgecolor=look.colour, markeredgewidth=1.2, label="_value", zorder=3,
    )  # fmt: skip


def reference_line(ax: Axes, at: float, name: str = "", *, horizontal: bool = False, kind: str = "reference") -> None:
    """A thin dashed line for chance, zero or the reference, named at its end where there is a name."""
    if not math.isfinite(at):
        return
    draw = ax.axhline if horizontal else ax.axvline
    draw(at, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1, label=f"_{kind}")
    if not name:
        return
    if horizontal:
        ax.annotate(
            name, (0, at), xycoords=("axes fraction", "data"), xytext=(3, 2), textcoords="offset points",
            ha="left", va="bottom", fontsize=8, color="#595959",
        )  # fmt: skip
    else:
        ax.annotate(
            name, (at, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
            ha="center", va="bottom", fontsize=8, color="#595959",
        )  # fmt: skip


def category_axis(ax: Axes, labels: Sequence[str]) -> None:
    """Rows from top to bottom at 0, 1, 2, ... with their labels."""
    ax.set_yticks(range(len(labels)), labels=list(labels))
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)


def pad_limits(ax: Axes, low: float, high: float, *, include: Sequence[float] = (), share: float = 0.08) -> None:
    """Horizontal limits around the finite values, with a margin."""
    values = [value for value in (low, high, *include) if math.isfinite(value)]
    if not values:
        ax.set_xlim(0, 1)
        return
    margin = (max(values) - min(values)) * share or 0.05
    ax.set_xlim(min(values) - margin, max(values) + margin)


def condition_handles(conditions: Sequence[str], styles: Styles, names: Names, *, lines: bool = False) -> list[Line2D]:
    """Entries of a legend of conditions."""
    return [
        Line2D(
            [], [], color=styles[name].colour, marker=styles[name].marker, markerfacecolor=styles[name].face, markersize=5.5,
            markeredgewidth=1.2, linestyle=styles[name].line if lines else "none", label=names.get(name, name),
        )
        for name in conditions
    ]  # fmt: skip


def legend_below(figure: Figure, handles: Sequence[Artist], *, columns: int | None = None) -> None:
    """A legend under all panels, in as many columns as the width allows."""
    if not handles:
        return
    width = float(figure.get_figwidth())
    longest = max(len(str(handle.get_label())) for handle in handles)
    fitting = max(1, int(width / (0.55 + 0.075 * longest)))
    with style():
        figure.legend(
            handles=list(handles),
            loc="outside lower center",
            ncols=columns or min(len(handles), fitting),
            columnspacing=1.4,
        )


def is_narrow(width: float) -> bool:
    """Whether panels have to be stacked."""
    return width <= NARROW + 0.5

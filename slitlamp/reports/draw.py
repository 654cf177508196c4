"""What several figures share: interval bars and bands, lines of reference, axes of layers, grids of panels, legends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from slitlamp.errors import InputError
from slitlamp.reports.style import (
    GREY,
    MAP,
    NARROW,
    ConditionStyle,
    condition_styles,
    contrast_ink,
    new_figure,
    short_names,
    style,
)
from slitlamp.reports.wording import Estimate

Styles = Mapping[str, ConditionStyle]
Names = Mapping[str, str]


def need(table: pd.DataFrame, *columns: str) -> None:
    """Raise InputError where a table cannot be drawn."""
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(
            f"this figure needs the column(s) {', '.join(missing)}; found {', '.join(map(str, table.columns))}"
        )
    if table.empty:
        raise InputError("this figure needs at least one row; the table is empty")


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


def band(ax: Axes, x: Any, low: Any, high: Any, colour: str, *, alpha: float = 0.18, label: str = "_interval") -> None:
    """The interval along a curve; a bar where the curve is a single point, at which a band would have no width."""
    x, low, high = (pd.Series(one).to_numpy(dtype=float) for one in (x, low, high))
    if len(x) == 1:
        ax.vlines(x, low, high, color=colour, linewidth=1.6, label=label)
    else:
        ax.fill_between(x, low, high, color=colour, alpha=alpha, linewidth=0, label=label)


def layer_axis(ax: Axes, label: str = "layer") -> None:
    """Whole layers across."""
    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def bare(ax: Axes) -> Axes:
    """No ticks and no frame, for images."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return ax


def heat_map(
    grid: pd.DataFrame,
    ax: Axes,
    low: float,
    high: float,
    *,
    notes: pd.DataFrame | None = None,
    lines: bool = True,
    square: bool = False,
    **bar: Any,
) -> Axes:
    """A grid of values in the colours of the style sheet; NaN is white.

    Args:
        grid: values by row and column.
        ax: where to draw.
        low, high: ends of the colours.
        notes: what is written into the cells, of the same shape; nothing if None.
        lines: whether white lines part the cells.
        square: whether cells are.
        bar: of the scale beside it, as `Figure.colorbar` takes them, with its label; no scale if there is none.
    """
    seaborn.heatmap(
        grid.astype(float), ax=ax, cmap=MAP, vmin=low, vmax=high, annot=False if notes is None else notes, fmt="",
        annot_kws={"fontsize": 7.5}, linewidths=0.6 if lines else 0, linecolor="white", square=square, cbar=bool(bar),
        cbar_kws={"pad": 0.02, **bar},
    )  # fmt: skip
    if notes is not None:
        mesh, values = ax.collections[0], grid.to_numpy(dtype=float)
        for text in ax.texts:
            column, row = (int(one) for one in text.get_position())
            text.set_color(contrast_ink(tuple(mesh.cmap(mesh.norm(values[row, column])))))
    ax.tick_params(length=0)
    ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
    return ax


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


def panel_grid(
    width: float,
    n: int,
    height: float,
    *,
    columns: int | None = None,
    narrow_columns: int = 1,
    extra: float = 0.5,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure of n panels in rows.

    Args:
        width: in inches.
        n: number of panels.
        height: of a panel in inches.
        columns: panels beside each other on a page; all if None.
        narrow_columns: the same where it is narrow.
        extra: inches for what stands below all panels.
        sharex, sharey: whether panels share an axis.
    """
    across = max(1, min(n, narrow_columns if is_narrow(width) else columns or n))
    down = -(-n // across)
    figure = new_figure(width, height * down + extra)
    axes = figure.subplots(down, across, sharex=sharex, sharey=sharey, squeeze=False).ravel().tolist()
    for ax in axes[n:]:
        ax.remove()
    return figure, axes[:n]


def outer_labels(axes: Sequence[Axes], *, names: bool = False) -> None:
    """Keep the labels of axes at the left edge and below the last panel of each column; with `names`, those of rows too."""
    for ax in axes:
        place = ax.get_subplotspec()
        if place is None:
            continue
        if place.colspan.start:
            ax.set_ylabel("")
            if names:
                ax.tick_params(axis="y", labelleft=False)
        others = [one.get_subplotspec() for one in axes]
        if any(
            one is not None and one.colspan.start == place.colspan.start and one.rowspan.start > place.rowspan.start
            for one in others
        ):
            ax.set_xlabel("")


def own_legend(figure: Figure, axes: Iterable[Axes], *, columns: int | None = None) -> None:
    """The named lines of panels under the figure, each name once."""
    entries: dict[str, Artist] = {}
    for ax in axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    legend_below(figure, list(entries.values()), columns=columns)


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

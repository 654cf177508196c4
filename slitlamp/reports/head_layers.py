"""Head reinforcement by the number of layers (figure 5 of VHR) and by its time (figure 6), from a run's conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slitlamp.reports import findings
from slitlamp.reports.data import RunData
from slitlamp.reports.draw import (
    Names,
    Styles,
    band,
    category_axis,
    condition_handles,
    legend_below,
    need,
    panel_grid,
    styles_and_names,
)
from slitlamp.reports.metrics import metric
from slitlamp.reports.style import BLUE, GREY, INK, ORANGE, ConditionStyle, axes_or_new, new_figure, styled

METRICS = ("chair_i", "recall")
LOOKS = {
    "": ConditionStyle(BLUE, "o", "-", True),
    "random": ConditionStyle(ORANGE, "v", (0, (2, 1.2)), False),
    "least": ConditionStyle(GREY, "^", (0, (5, 1.5, 1, 1.5)), False),
    "all": ConditionStyle(INK, "s", (0, (1, 1.2)), False),
}
NAMES = {
    "": "heads that react to the image",
    "random": "control: random heads",
    "least": "control: least reacting heads",
    "all": "control: all heads, same mean factor",
}


def last_layers(conditions: Mapping[str, Any], n_layers: int) -> dict[str, int]:
    """The conditions that reinforce the last n layers alone, with their n; 0 for those that change nothing.

    Args:
        conditions: of a run's configuration: name -> a list of one-entry mappings of intervention to parameters.
        n_layers: of the model.
    """
    found: dict[str, int] = {}
    for name, interventions in conditions.items():
        if not interventions:
            found[str(name)] = 0
            continue
        one = interventions[0] if isinstance(interventions, list) and len(interventions) == 1 else None
        parameters = one.get("HeadReinforcement") if isinstance(one, Mapping) else None
        layers = parameters.get("layers") if isinstance(parameters, Mapping) else None
        counted = sorted(layer + n_layers if layer < 0 else layer for layer in layers or ())
        if counted and counted == list(range(n_layers - len(counted), n_layers)):
            found[str(name)] = len(counted)
    return found


def layer_scores(data: RunData) -> pd.DataFrame | None:
    """Scores by the number of last layers reinforced: n_layers, control ("" for none), metric, value, low, high.

    None where the run has no two such numbers beside the unchanged model.
    """
    scores = data.table("conditions", "condition", "dataset", "metric", "value", "low", "high")
    datasets = findings.caption_datasets(data)
    conditions, n_layers = data.config.get("conditions"), data.environment.get("n_layers")
    if scores is None or not datasets or not isinstance(conditions, Mapping) or not isinstance(n_layers, int):
        return None
    treated = last_layers(conditions, n_layers)
    if len({n for n in treated.values() if n}) < 2:
        return None
    places = {name: (n, "") for name, n in treated.items()}
    for one in data.conditions:
        if one.control_of in treated:
            places[one.name] = treated[one.control_of], one.name.removeprefix(f"{one.control_of}_")
    rows = scores[(scores["dataset"].astype(str) == datasets[0]) & scores["condition"].astype(str).isin(places)]
    names = rows["condition"].astype(str)
    return rows.assign(
        n_layers=names.map(lambda name: places[name][0]), control=names.map(lambda name: places[name][1])
    ).sort_values(["control", "n_layers"])


@styled
def reinforcement_curve(table: pd.DataFrame, name: str, ax: Axes | None = None) -> Axes:
    """One score against the number of last layers reinforced, the method and its controls, with bands of intervals.

    Args:
        table: of `layer_scores`.
        name: the metric.
        ax: where to draw; a new figure if None.
    """
    need(table, "n_layers", "control", "metric", "value", "low", "high")
    ax = axes_or_new(ax, height=2.8)
    rows = table[table["metric"] == name]
    baseline = rows[(rows["control"] == "") & (rows["n_layers"] == 0)]
    for control in _controls(rows):
        look = LOOKS.get(control, LOOKS["random"])
        own = pd.concat([baseline, rows[(rows["control"] == control) & (rows["n_layers"] > 0)]])
        x = own["n_layers"].to_numpy(dtype=float)
        low, high = (own[end].to_numpy(dtype=float) for end in ("low", "high"))
        if not control:
            band(ax, x, low, high, look.colour, label="_band")
        ax.plot(
            x, own["value"].to_numpy(dtype=float), color=look.colour, marker=look.marker, markerfacecolor=look.face,
            linestyle=look.line, label=f"_{control or 'method'}",
        )  # fmt: skip
    ax.set_xticks(sorted(rows["n_layers"].unique()))
    ax.set_xlabel("last layers reinforced")
    ax.set_ylabel(metric(name).label)
    return ax


def _controls(table: pd.DataFrame) -> list[str]:
    return [one for one in dict.fromkeys(["", *LOOKS, *table["control"]]) if (table["control"] == one).any()]


@styled
def reinforced_layers(data: RunData, width: float) -> Figure | None:
    """CHAIR_i and recall by the number of last layers reinforced; None for a run of other conditions."""
    table = layer_scores(data)
    if table is None:
        return None
    shown = [name for name in METRICS if (table["metric"] == name).any()]
    figure, axes = panel_grid(width, len(shown), 2.6, extra=0.8)
    for ax, name in zip(axes, shown, strict=True):
        reinforcement_curve(table, name, ax)
    names = {**{one: f"control: {one}" for one in _controls(table)}, **NAMES}
    looks = {one: LOOKS.get(one, LOOKS["random"]) for one in _controls(table)}
    legend_below(figure, condition_handles(_controls(table), looks, names, lines=True))
    return figure


def reinforced_layers_note(data: RunData) -> str:
    """The caption of `reinforced_layers`."""
    return (
        "The last n layers reinforced, at n = 0 none: the share of named objects that are not in the image, and the share of "
        "the objects in the image that are named. The band is the bootstrap interval over images; the controls scale as many "
        "other heads in the same layers. The paper finds the least CHAIR at a middle number. Less recall is no success."
    )


def generation_times(data: RunData) -> pd.DataFrame | None:
    """Seconds of generation by condition, from the run's environment: condition, seconds, ratio (to the reference), and
    image_tokens (the mean number that the language model was given) where conditions differ in it.
    """
    timing = data.environment.get("timing")
    if not isinstance(timing, Mapping):
        return None
    found = {name: timing.get(f"generate {name}") for name in data.drawn}
    rows = [(name, float(seconds)) for name, seconds in found.items() if isinstance(seconds, int | float)]
    if len(rows) < 2 or rows[0][1] <= 0:
        return None
    table = pd.DataFrame(rows, columns=["condition", "seconds"])
    table = table.assign(ratio=table["seconds"] / table["seconds"].iloc[0])
    counts = data.table("token_counts", "condition", "n_items", "image_tokens")
    if counts is None:
        return table
    sums = (counts["image_tokens"] * counts["n_items"]).groupby(counts["condition"].astype(str)).sum()
    means = sums / counts["n_items"].groupby(counts["condition"].astype(str)).sum()
    given = table["condition"].map(means)
    return table.assign(image_tokens=given) if given.nunique() > 1 else table


@styled
def time_bars(
    table: pd.DataFrame, ax: Axes | None = None, *, styles: Styles | None = None, names: Names | None = None
) -> Axes:
    """Time of generation by condition, as bars with their ratio to the reference, which is the first.

    Args:
        table: columns condition, seconds, ratio (and image_tokens).
        ax: where to draw; a new figure if None.
        styles: look of each condition.
        names: short names of conditions.
    """
    need(table, "condition", "seconds", "ratio")
    styles, names = styles_and_names(table["condition"], styles, names)
    ax = axes_or_new(ax, height=0.9 + 0.3 * len(table))
    for place, row in enumerate(table.to_dict("records")):
        look = styles[str(row["condition"])]
        ax.barh(
            place, row["seconds"], height=0.62, facecolor=look.colour if look.filled else "white", edgecolor=look.colour,
            hatch="" if look.filled else "////", linewidth=1.0, label="_time",
        )  # fmt: skip
        tokens = f" ({row['image_tokens']:.0f} tokens)" if "image_tokens" in row else ""
        ax.annotate(
            f"×{row['ratio']:.2f}{tokens}", (row["seconds"], place), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    category_axis(ax, [names.get(str(name), str(name)) for name in table["condition"]])
    # The ratio stands right of the longest bar: about .07 inches a letter, of an axis of about half of the figure.
    letters = 17 if "image_tokens" in table else 6
    room = min(0.7, 0.07 * letters / (0.52 * ax.figure.get_figwidth()))  # type: ignore[union-attr]
    ax.set_xlim(0, float(table["seconds"].max()) / (1 - room))
    ax.set_xlabel(f"generation, seconds in all{' (image tokens)' if 'image_tokens' in table else ''}")
    return ax


@styled
def generation_time(data: RunData, width: float) -> Figure | None:
    """Time of generation by condition; None without timings of two conditions."""
    table = generation_times(data)
    if table is None:
        return None
    figure = new_figure(width, 0.9 + 0.3 * len(table))
    time_bars(table, figure.add_subplot(), styles=data.styles, names=data.short)
    return figure


def generation_time_note(data: RunData) -> str:
    """The caption of `generation_time`."""
    device = str(data.environment.get("device", "this machine"))
    table = generation_times(data)
    tokens = (
        ", and beside it the mean number of image tokens that were left"
        if table is not None and "image_tokens" in table
        else ""
    )
    return (
        f"Wall-clock time of generation over all data sets of the run, on {device}, once and so without an interval; what "
        f"else the machine did counts too. The number is the ratio to {data.reference!r}{tokens}. Longer captions take longer: "
        "compare their mean length."
    )

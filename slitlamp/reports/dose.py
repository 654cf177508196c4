"""Dose and response: scores against the strength of one method, from a run whose conditions differ in that strength alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from slitlamp.reports import findings
from slitlamp.reports.data import RunData
from slitlamp.reports.draw import band, condition_handles, legend_below, need, panel_grid
from slitlamp.reports.metrics import metric
from slitlamp.reports.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    ConditionStyle,
    axes_or_new,
    styled,
)

FEWEST = 3
"""Fewest strengths that make a curve."""
CAPTIONS = ("chair_i", "chair_s", "recall", "mean_words", "perplexity")
WIDE = 30.0
"""Ratio of perplexities beyond which their axis is logarithmic."""
METHOD = ConditionStyle(BLUE, "o", "-", True)
CONTROLS = (
    ConditionStyle(ORANGE, "v", (0, (2, 1.2)), False),
    ConditionStyle(GREEN, "^", (0, (5, 1.5, 1, 1.5)), False),
    ConditionStyle(PURPLE, "s", (0, (1, 1.2)), False),
    ConditionStyle(GREY, "D", (0, (4, 1.5)), False),
)


class Doses(NamedTuple):
    """The method, the parameter that is swept, and its value by condition; of nested lists, their length."""

    method: str
    parameter: str
    of: dict[str, float]


def doses(conditions: Mapping[str, Any]) -> Doses | None:
    """What a run sweeps; None where its conditions are not one method at several strengths.

    Args:
        conditions: of a run's configuration: name -> a list of one-entry mappings of intervention to parameters.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, interventions in conditions.items():
        if not interventions:
            continue
        if not isinstance(interventions, list) or len(interventions) != 1 or not isinstance(interventions[0], Mapping):
            return None
        ((method, parameters),) = interventions[0].items()
        found[str(name)] = str(method), dict(parameters or {})
    if len(found) < FEWEST or len({method for method, _ in found.values()}) > 1:
        return None
    first = next(iter(found.values()))[1]
    varied = [key for key in first if any(parameters.get(key) != first[key] for _, parameters in found.values())]
    if len(varied) != 1:
        return None
    values = [parameters.get(varied[0]) for _, parameters in found.values()]
    method, parameter = next(iter(found.values()))[0], varied[0]
    if all(isinstance(one, list) for one in values):
        if not _nested(values):
            return None
        values, parameter = [len(one) for one in values if isinstance(one, list)], f"number of {parameter}"
    if len(set(map(str, values))) < len(values):
        return None
    numbers = [float(one) for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(numbers) < len(values):
        return None
    return Doses(method, parameter, dict(zip(found, numbers, strict=True)))


def _nested(sets: list[Any]) -> bool:
    """Whether each set is part of the next larger one: their number alone is then what differs."""
    ordered = sorted((set(map(str, one)) for one in sets), key=len)
    return all(small <= large for small, large in itertools.pairwise(ordered))


def dose_scores(data: RunData) -> pd.DataFrame | None:
    """Scores by strength: dose (NaN for the unmodified model), control ("" for the method), metric, value, low, high.

    CHAIR, recall, length and perplexity of the first caption data set, and F1 of POPE (of all splits together where there are
    several). None where the run is no sweep.
    """
    scores = data.table("conditions", "condition", "dataset", "metric", "value", "low", "high")
    conditions = data.config.get("conditions")
    found = doses(conditions) if isinstance(conditions, Mapping) else None
    if scores is None or found is None:
        return None
    places = {name: (dose, "") for name, dose in found.of.items()}
    for one in data.conditions:
        if one.control_of in found.of:
            places[one.name] = found.of[one.control_of], one.name.removeprefix(f"{one.control_of}_")
    places |= {name: (float("nan"), "") for name in _unmodified(data)}
    captions, pope = findings.caption_datasets(data)[:1], findings.pope_datasets(data)[-1:]
    dataset, name = scores["dataset"].astype(str), scores["metric"].astype(str)
    wanted = (dataset.isin(captions) & name.isin(CAPTIONS)) | (dataset.isin(pope) & (name == "f1"))
    rows = scores[wanted & scores["condition"].astype(str).isin(places)]
    names = rows["condition"].astype(str)
    return rows.assign(
        dose=names.map(lambda one: places[one][0]), control=names.map(lambda one: places[one][1])
    ).sort_values(["control", "dose"])


@styled
def dose_curve(table: pd.DataFrame, name: str, parameter: str, ax: Axes | None = None) -> Axes:
    """One score against the strength, of the method and its controls, with bands of intervals; dashed: the unmodified model.

    Args:
        table: of `dose_scores`.
        name: the metric.
        parameter: what is swept, for the axis.
        ax: where to draw; a new figure if None.
    """
    need(table, "dose", "control", "metric", "value", "low", "high")
    ax = axes_or_new(ax, height=2.6)
    rows = table[table["metric"] == name]
    for value in rows.loc[rows["dose"].isna(), "value"]:
        ax.axhline(value, color=INK, linestyle="--", linewidth=0.9, label="_unmodified")
    for control, look in looks(table).items():
        own = rows[(rows["control"] == control) & rows["dose"].notna()]
        x, value, low, high = (own[one].to_numpy(dtype=float) for one in ("dose", "value", "low", "high"))
        if not control:
            band(ax, x, low, high, look.colour, label="_band")
        ax.plot(
            x, value, color=look.colour, marker=look.marker, markerfacecolor=look.face, linestyle=look.line,
            label=f"_{control or 'method'}",
        )  # fmt: skip
    shown = rows.loc[rows["value"] > 0, "value"]
    if name == "perplexity" and len(shown) and shown.max() > WIDE * shown.min():  # a control that breaks the model
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(parameter)
    known = metric(name)
    ax.set_ylabel("F1, POPE" if name == "f1" else known.label)
    return ax


def looks(table: pd.DataFrame) -> dict[str, ConditionStyle]:
    """How the method ("") and each of its controls are drawn."""
    controls = [str(one) for one in dict.fromkeys(table["control"]) if one]
    return {"": METHOD} | {one: CONTROLS[place % len(CONTROLS)] for place, one in enumerate(controls)}


@styled
def dose_response(data: RunData, width: float) -> Figure | None:
    """Every score against the strength; None for a run that sweeps none."""
    table = dose_scores(data)
    if table is None:
        return None
    found = doses(data.config["conditions"])
    assert found is not None  # or there were no scores
    shown = [name for name in (*CAPTIONS, "f1") if (table["metric"] == name).any()]
    figure, axes = panel_grid(width, len(shown), 2.2, columns=3, narrow_columns=2, extra=0.6)
    for ax, name in zip(axes, shown, strict=True):
        dose_curve(table, name, found.parameter, ax)
    drawn = looks(table)
    names = {one: f"control: {one}" for one in drawn} | {"": found.method}
    legend_below(figure, condition_handles(list(drawn), drawn, names, lines=True))
    return figure


def dose_response_note(data: RunData) -> str:
    """The caption of `dose_response`."""
    found = doses(data.config["conditions"])
    assert found is not None  # a note is asked for where there is a figure
    return (
        f"{found.method} at {len(found.of)} values of {found.parameter}; its controls at the same values; dashed: the unmodified "
        "model. The band is the bootstrap interval over images, of the method alone. Perplexity is that of the captions under "
        "the unmodified model. CHAIR that falls together with recall or length, or as perplexity soars, is no gain: compare at "
        "equal recall. Nor is one that the controls show as well."
    )


def dose_findings(data: RunData) -> list[str]:
    """At which strengths CHAIR_i differs from that of the unmodified model, and from that of every control."""
    found = doses(data.config["conditions"])
    captions = findings.caption_datasets(data)
    unmodified = _unmodified(data)
    if found is None or not captions or not unmodified:
        return []
    lower: list[float] = []
    beyond: list[float] = []
    for name, dose in sorted(found.of.items(), key=lambda one: one[1]):
        plain = findings.difference(data, name, unmodified[0], captions[0], "chair_i")
        if plain is None or not plain.high < 0:
            continue
        lower.append(dose)
        controls = [one.name for one in data.conditions if one.control_of == name]
        against = [findings.difference(data, name, one, captions[0], "chair_i") for one in controls]
        if against and all(one is not None and one.high < 0 for one in against):
            beyond.append(dose)
    if not lower:
        return [f"At no value of {found.parameter} is CHAIR_i below that of the unmodified model."]
    text = f"CHAIR_i is below that of the unmodified model at {found.parameter} {_listed(lower)}"
    return [
        f"{text}; below every control at {_listed(beyond)}." if beyond else f"{text}, but nowhere below every control."
    ]


def _unmodified(data: RunData) -> list[str]:
    """The reference, where it changes nothing; the reference of a run without such a condition is one of its strengths."""
    return [one for one in [data.reference] if one is not None and not data.config["conditions"].get(one)]


def _listed(values: list[float]) -> str:
    return ", ".join(f"{one:g}" for one in values)

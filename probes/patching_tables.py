"""Tables of activation patching: means over items with intervals, controls, and how exact and estimated effects agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from probes.patching_places import ROLES
from slitlamp.evaluation.statistics import (
    CorrelationMethod,
    Interval,
    benjamini_hochberg,
    cluster_bootstrap,
    cluster_sums,
    correlation_interval,
    ratio,
)
from slitlamp.tracing.probe import Array

DIRECTIONS: Final = ("denoising", "noising")


@dataclass(frozen=True)
class Gathered:
    """What activation patching has measured.

    Attributes:
        layers: 0-based.
        items: their ids.
        groups: what each item shares with items that are not independent of it: its image.
        differences: LD of the clean and the corrupt run, [item, 2].
        present: whether an item has positions of a role, [item, role].
        effects: by name: `positions_<direction>` [item, role, layer, (patched, control)], `heads_<direction>` [item, layer,
            head], `attributed_positions_<direction>` [item, role, layer], `attributed_heads_<direction>` [item, layer, head].
        unanswered, too_close: items left out: without a right answer, or with too small a difference of the runs.
        n_resamples, seed: of the bootstrap.
    """

    layers: Sequence[int]
    items: Array
    groups: Array
    differences: Array
    present: Array
    effects: Mapping[str, Array]
    unanswered: int
    too_close: int
    n_resamples: int
    seed: int

    def means(self, values: Array, weights: Array) -> list[Interval]:
        """Means over items of [item, k] where weights [item, k] is 1, with p values against zero."""
        count = values.shape[1]

        def mean(total: Array) -> Array:
            return ratio(total[..., :count], total[..., count:])

        sums = np.hstack([values * weights, weights.astype(np.float64)])
        found = cluster_bootstrap(
            cluster_sums(sums, self.groups), mean, n_resamples=self.n_resamples, seed=self.seed, p_value=True
        )
        return found if isinstance(found, list) else [found]


def tables_of(gathered: Gathered) -> dict[str, pd.DataFrame]:
    """All tables, by name."""
    tables: dict[str, pd.DataFrame] = {}
    parts = {"positions": _positions, "heads": _heads}
    for name, make in parts.items():
        found = [
            make(gathered, direction).assign(direction=direction)
            for direction in DIRECTIONS
            if f"{name}_{direction}" in gathered.effects
        ]
        if found:
            tables[name] = _adjusted(pd.concat(found, ignore_index=True))
    estimates = [
        _attributed(gathered, name, direction)
        for name in parts
        for direction in DIRECTIONS
        if f"attributed_{name}_{direction}" in gathered.effects
    ]
    if estimates:
        tables["attribution"] = pd.concat(estimates, ignore_index=True)
        agreement = _agreement(tables)
        if len(agreement):
            tables["agreement"] = agreement
    tables["items"] = pd.DataFrame(
        {"item": gathered.items, "ld_clean": gathered.differences[:, 0], "ld_corrupt": gathered.differences[:, 1]}
    )
    return tables


def _positions(gathered: Gathered, direction: str) -> pd.DataFrame:
    """One row per role and layer that some item has."""
    values = gathered.effects[f"positions_{direction}"]
    n_items, n_roles, n_layers, _ = values.shape
    pairs = np.concatenate([values, values[..., :1] - values[..., 1:]], axis=-1)  # patched, control, difference
    weights = np.broadcast_to(gathered.present[:, :, None, None], pairs.shape)
    found = gathered.means(pairs.reshape(n_items, -1), weights.reshape(n_items, -1))
    table = pd.DataFrame(
        {
            "role": np.repeat(ROLES, n_layers),
            "layer": np.tile(gathered.layers, n_roles),
            **_columns("effect", found[0::3]),
            **_columns("control", found[1::3]),
            **_columns("difference", found[2::3]),
            "p": [_p(one) for one in found[2::3]],
            "n_items": np.repeat(gathered.present.sum(axis=0), n_layers),
            "n_groups": [len(np.unique(gathered.groups[here])) for here in gathered.present.T for _ in range(n_layers)],
        }
    )
    return table[table["n_items"] > 0].reset_index(drop=True)


def _heads(gathered: Gathered, direction: str) -> pd.DataFrame:
    """One row per head; its control is the mean of all other heads."""
    values = gathered.effects[f"heads_{direction}"]
    n_items, n_layers, n_heads = values.shape
    flat = values.reshape(n_items, -1)
    others = (flat.sum(axis=1, keepdims=True) - flat) / max(flat.shape[1] - 1, 1)
    every = np.hstack([flat, others, flat - others])
    found = gathered.means(every, np.ones_like(every))
    count = flat.shape[1]
    return pd.DataFrame(
        {
            "layer": np.repeat(gathered.layers, n_heads),
            "head": np.tile(np.arange(n_heads), n_layers),
            **_columns("effect", found[:count]),
            **_columns("control", found[count : 2 * count]),
            **_columns("difference", found[2 * count :]),
            "p": [_p(one) for one in found[2 * count :]],
            "n_items": n_items,
            "n_groups": len(np.unique(gathered.groups)),
        }
    )


def _attributed(gathered: Gathered, component: str, direction: str) -> pd.DataFrame:
    """One row per place: the first-order estimate, and the exact effect where it was measured."""
    values = gathered.effects[f"attributed_{component}_{direction}"]
    n_items = len(values)
    if component == "positions":
        weights = np.broadcast_to(gathered.present[:, :, None], values.shape)
        places, layers = np.repeat(ROLES, len(gathered.layers)), np.tile(gathered.layers, len(ROLES))
    else:
        weights = np.ones_like(values)
        n_heads = values.shape[2]
        places = np.tile(np.arange(n_heads), len(gathered.layers)).astype(str)
        layers = np.repeat(gathered.layers, n_heads)
    found = gathered.means(values.reshape(n_items, -1), weights.reshape(n_items, -1))
    exact = gathered.effects.get(f"{component}_{direction}")
    columns: dict[str, object] = {
        "direction": direction,
        "component": component,
        "place": places,
        "layer": layers,
        **_columns("effect", found),
    }
    if exact is not None:
        patched = exact[..., 0] if component == "positions" else exact
        total = (patched * weights).reshape(n_items, -1).sum(axis=0)
        columns["exact"] = ratio(total, weights.reshape(n_items, -1).sum(axis=0))
    columns["n_items"] = weights.reshape(n_items, -1).sum(axis=0).astype(int)
    table = pd.DataFrame(columns)
    return table[table["n_items"] > 0].reset_index(drop=True)


def _agreement(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Correlation, over places, of first-order estimates with exact effects."""
    rows = []
    attribution = tables["attribution"]
    if "exact" not in attribution:
        return pd.DataFrame()
    for (direction, component), some in attribution.groupby(["direction", "component"], sort=False):
        both = some[["effect", "exact"]].dropna()
        methods: tuple[CorrelationMethod, ...] = ("pearson", "spearman")
        for method in methods:
            found = correlation_interval(both["effect"], both["exact"], method)
            rows.append((direction, component, method, found.value, found.low, found.high, len(both)))
    return pd.DataFrame(rows, columns=["direction", "component", "method", "correlation", "low", "high", "n_places"])


def _adjusted(table: pd.DataFrame) -> pd.DataFrame:
    """With Benjamini-Hochberg adjusted p values, over all places of one direction, and the direction in front.

    p values are one-sided: a place carries more than its control.
    """
    table["p_adjusted"] = np.nan
    for _, some in table.groupby("direction"):
        p = some["p"].to_numpy(dtype=np.float64)
        if not np.isnan(p).all():
            table.loc[some.index, "p_adjusted"] = benjamini_hochberg(p)
    first = ["direction"]
    return table[[*first, *(one for one in table.columns if one not in first)]]


def _columns(name: str, intervals: Sequence[Interval]) -> dict[str, list[float]]:
    return {
        name: [one.value for one in intervals],
        f"{name}_low": [one.low for one in intervals],
        f"{name}_high": [one.high for one in intervals],
    }


def _p(interval: Interval) -> float:
    """The one-sided p value of a mean being above zero, from the two-sided one."""
    if interval.p is None or np.isnan(interval.p):
        return float("nan")
    return interval.p / 2 if interval.value > 0 else 1 - interval.p / 2


def summary(tables: Mapping[str, pd.DataFrame], gathered: Gathered) -> str:
    """What was found, in a few sentences."""
    parts = []
    if "positions" in tables:
        parts += _said_of_positions(tables["positions"])
    if "heads" in tables:
        heads = tables["heads"]
        direction = heads["direction"].iloc[0]
        some = heads[heads["direction"] == direction]
        top = some.loc[some["difference"].idxmax()]
        n_found = int((some["p_adjusted"] < 0.05).sum())
        parts.append(
            f"The head that {_VERBS[direction]} most is {int(top['layer'])}.{int(top['head'])}: {_estimate(top, 'effect')} "
            f"({n_found} of {len(some)} heads above the mean of the others, Benjamini-Hochberg, 5 %)."
        )
    if "positions" not in tables and "heads" not in tables:
        found = tables["attribution"]
        top = found.loc[found["effect"].idxmax()]
        parts.append(
            f"The largest first-order estimate is that of {top['component']} {top['place']} in layer {int(top['layer'])}: "
            f"{_estimate(top, 'effect')}."
        )
    if "agreement" in tables:
        pearson = tables["agreement"].query("method == 'pearson'")
        each = [f"{one.correlation:.2f} ({one.direction}, {one.component})" for one in pearson.itertuples()]
        parts.append(f"First-order estimates correlate with exact effects at {', '.join(each)}.")
    parts.append(
        f"{len(gathered.items)} items; left out: {gathered.unanswered} without a right answer or true object, "
        f"{gathered.too_close} whose clean and corrupt runs hardly differ."
    )
    return " ".join(parts)


_VERBS: Final = {"denoising": "restores", "noising": "takes away"}


def _said_of_positions(table: pd.DataFrame) -> list[str]:
    """The object's tokens at their best layer, and from where on the last position carries half; that it carries all after
    the last block is so by construction.
    """
    said = []
    for direction, some in table.groupby("direction", sort=False):
        of_object, last = some[some["role"] == "object"], some[some["role"] == "last"]
        if len(of_object):
            top = of_object.loc[of_object["difference"].idxmax()]
            said.append(
                f"Patching the object's image tokens {_VERBS[str(direction)]} most after layer {int(top['layer'])}: "
                f"{_estimate(top, 'effect')} of the answer (as many random positions {_estimate(top, 'control')})."
            )
        half = last[last["effect"] >= 0.5]
        if len(half):
            said.append(
                f"From layer {int(half['layer'].iloc[0])} on, the last position {_VERBS[str(direction)]} more than half: "
                f"{_estimate(half.iloc[0], 'effect')}."
            )
    return said


def _estimate(row: pd.Series, name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"

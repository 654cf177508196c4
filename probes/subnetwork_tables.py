"""The tables of `Subnetworks`: means over linear maps with jackknife intervals, for one measurement and for several."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from probes.overlaps import Floats, TokenSet, overlaps
from probes.wanda import Matrix, random_iou, weight_of
from slitlamp.evaluation.jackknife import group_jackknife
from slitlamp.evaluation.statistics import Interval
from slitlamp.tracing import ProbeResult
from slitlamp.tracing.probe import Part

ALL = "all"
"""Of the types of linear maps: their mean."""

KINDS = {
    "image, other data": "image tokens of two data sets",
    "text, other data": "text tokens of two data sets",
    "image and text": "image and text tokens of one data set",
    "image and text, other data": "image tokens of one data set and text tokens of another",
    "image, other model": "image tokens in two models",
    "text, other model": "text tokens in two models",
    "image, other condition": "image tokens under two conditions",
    "text, other condition": "text tokens under two conditions",
}
"""What two sets of tokens that are compared have in common."""


class Named(NamedTuple):
    """A set of tokens and what it is of."""

    part: Part
    tokens: str
    found: TokenSet


def types(every: Sequence[Matrix]) -> dict[str, list[int]]:
    """The places of the matrices of each type, and of all."""
    names = list(dict.fromkeys(one.name for one in every))
    places = {name: [i for i, one in enumerate(every) if one.name == name] for name in names}
    return {**places, ALL: list(range(len(every)))}


def mean_interval(values: Floats, sizes: Floats) -> Interval:
    """The mean over matrices with its interval: values [1 + fold, matrix], and the number of items of each fold."""
    means = values.mean(axis=1)
    return group_jackknife(float(means[0]), means[1:], sizes)


def iou_tables(
    values: Floats, every: Sequence[Matrix], sizes: Floats, sparsities: Sequence[float], beside: Mapping[str, Floats]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """IoU of every linear map, and by type.

    Args:
        values: IoU [1 + fold, matrix, sparsity].
        every: the matrices.
        sizes: [fold], numbers of items.
        sparsities: of the last axis.
        beside: controls by column, [matrix, sparsity].
    """

    def rows(name: str, layer: Mapping[str, int], where: list[int]) -> list[dict[str, Any]]:
        found = []
        for place, sparsity in enumerate(sparsities):
            one = mean_interval(values[:, where, place], sizes)
            row = {"type": name, **layer, "sparsity": sparsity, "iou": one.value, "low": one.low, "high": one.high}
            row["random"] = random_iou(sparsity)
            row |= {column: float(extra[where, place].mean()) for column, extra in beside.items()}
            found.append({**row, "n_items": one.n, "n_folds": len(sizes)})
        return found

    single = [row for i, one in enumerate(every) for row in rows(one.name, {"layer": one.layer}, [i])]
    by_type = [row for name, where in types(every).items() for row in rows(name, {}, where)]
    return pd.DataFrame(single), pd.DataFrame(by_type)


def joint_table(
    density: Floats, every: Sequence[Matrix], sizes: Floats, sparsities: Sequence[float], n_sets: int
) -> pd.DataFrame:
    """The sparsity of what all of several sets keep, by type, beside that of as many independent random masks.

    Args:
        density: the share that all keep, [1 + fold, matrix, sparsity].
        every: the matrices.
        sizes: [fold], numbers of items.
        sparsities: of the last axis.
        n_sets: how many sets.
    """
    records = []
    for name, where in types(every).items():
        for place, sparsity in enumerate(sparsities):
            one = mean_interval(1 - density[:, where, place], sizes)
            records.append(
                {
                    "type": name,
                    "sparsity": sparsity,
                    "joint_sparsity": one.value,
                    "low": one.low,
                    "high": one.high,
                    "random": 1 - (1 - sparsity) ** n_sets,
                    "n_sets": n_sets,
                    "n_items": one.n,
                }
            )
    return pd.DataFrame(records)


def compare_sets(probe: str, sets: Sequence[Named], sparsities: Sequence[float]) -> ProbeResult:
    """Tables `tasks`, `tasks_by_kind` and `joint_subnet` of the sets of tokens of several measurements.

    Sets of models whose linear maps differ in number or shape are not compared with each other.
    """
    tasks, kinds, joints = [], [], []
    for members in _same_shapes(sets):
        filled = np.stack([one.found.items for one in members]).any(axis=0)
        folds = np.flatnonzero(filled).tolist()

        def sizes_of(chosen: Sequence[int], members: Sequence[Named] = members, folds: list[int] = folds) -> Floats:
            """The items of each fold, those of one part once."""
            parts = {members[i].part: members[i].found.items for i in chosen}
            return np.sum(list(parts.values()), axis=0)[folds].astype(np.float64)

        pairs = [(a, b) for a, b in itertools.combinations(range(len(members)), 2) if _kind(members[a], members[b])]
        homes = list(dict.fromkeys((one.part.model, one.part.condition) for one in members))
        groups = [[i for i, one in enumerate(members) if one.part[:2] == home] for home in homes]
        found = overlaps([one.found for one in members], pairs, sparsities, groups=groups, folds=folds)
        every = list(members[0].found.matrices.values())
        for number, (a, b) in enumerate(pairs):
            one, other = members[a], members[b]
            table = iou_tables(found.iou[:, number], every, sizes_of([a, b]), sparsities, {})[1]
            tasks.append(_beside(table, {**_names(one, "a"), **_names(other, "b"), "kind": _kind(one, other)}))
        for kind in dict.fromkeys(_kind(members[a], members[b]) for a, b in pairs):
            chosen = [i for i, (a, b) in enumerate(pairs) if _kind(members[a], members[b]) == kind]
            used = sorted({i for number in chosen for i in pairs[number]})
            values = found.iou[:, chosen].mean(axis=1)
            table = iou_tables(values, every, sizes_of(used), sparsities, {})[1]
            kinds.append(_beside(table, {"kind": kind}).assign(n_pairs=len(chosen)))
        for number, (home, group) in enumerate(zip(homes, groups, strict=True)):
            table = joint_table(found.joint[:, number], every, sizes_of(group), sparsities, len(group))
            joints.append(_beside(table, {"model": home[0], "condition": home[1]}))
    parts = {"tasks": tasks, "tasks_by_kind": kinds, "joint_subnet": joints}
    tables = {name: pd.concat(some, ignore_index=True) for name, some in parts.items() if some}
    return ProbeResult(name=probe, tables=tables, summary=_compare_summary(tables))


def _same_shapes(sets: Sequence[Named]) -> list[list[Named]]:
    """The sets by the keys and shapes of their models' linear maps."""
    by_shape: dict[tuple[Any, ...], list[Named]] = {}
    for one in sets:
        model = one.found.source.model
        shape = tuple((key, *weight_of(model, matrix).shape) for key, matrix in one.found.matrices.items())
        by_shape.setdefault(shape, []).append(one)
    return list(by_shape.values())


def _kind(one: Named, other: Named) -> str:
    """What is compared in two sets, one of `KINDS`; "" for sets that differ in more than that."""
    a, b = one.part, other.part
    if (a.model, a.condition) == (b.model, b.condition):
        if one.tokens != other.tokens:
            return "image and text" + ("" if a.dataset == b.dataset else ", other data")
        return f"{one.tokens}, other data"
    if one.tokens != other.tokens or a.dataset != b.dataset:
        return ""
    if a.condition == b.condition:
        return f"{one.tokens}, other model"
    return f"{one.tokens}, other condition" if a.model == b.model else ""


def _names(one: Named, suffix: str) -> dict[str, str]:
    return {f"{name}_{suffix}": value for name, value in {**one.part._asdict(), "tokens": one.tokens}.items()}


def _beside(table: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """The table with constant columns in front."""
    front = pd.DataFrame({name: [value] * len(table) for name, value in columns.items()})
    return pd.concat([front, table], axis=1)


def _last(table: pd.DataFrame, **wanted: str) -> pd.Series | None:
    """The row of the highest sparsity among those of all types and of the values asked for."""
    rows = table[(table["type"] == ALL) & (table[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    return None if rows.empty else rows.sort_values("sparsity").iloc[-1]


def summary(tables: Mapping[str, pd.DataFrame]) -> str:
    """One measurement in words."""
    row, kept = _last(tables["iou_by_type"]), _last(tables["alpha_subnet"])
    assert row is not None
    assert kept is not None
    return (
        f"At sparsity {row['sparsity']:g}, image and text tokens activate subnetworks with a mean IoU of {row['iou']:.3f} "
        f"[{row['low']:.3f}, {row['high']:.3f}] (n = {int(row['n_items'])}); random masks have {row['random']:.3f}, the same "
        f"weights with shuffled norms {row['shuffled']:.3f}, halves of the items {row['image_halves']:.3f} (image) and "
        f"{row['text_halves']:.3f} (text). What both keep leaves out {100 * kept['joint_sparsity']:.0f} % of the weights "
        f"[{100 * kept['low']:.0f}, {100 * kept['high']:.0f}]."
    )


def _compare_summary(tables: Mapping[str, pd.DataFrame]) -> str:
    """Several measurements in words."""
    said = []
    for kind, words in KINDS.items():
        row = _last(tables["tasks_by_kind"], kind=kind)
        if row is not None:
            said.append(f"{words} {row['iou']:.3f} [{row['low']:.3f}, {row['high']:.3f}] ({int(row['n_pairs'])} pairs)")
    row = _last(tables["tasks_by_kind"])
    assert row is not None
    return f"Mean IoU of the subnetworks at sparsity {row['sparsity']:g} (random masks: {row['random']:.3f}): {'; '.join(said)}."

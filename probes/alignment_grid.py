"""Cosines over a grid of example pairs, their reductions over tokens, and intervals that resample examples, not pairs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from slitlamp.evaluation.statistics import cluster_bootstrap, cluster_means, ratio
from slitlamp.tracing.probe import Array

Reduction = Literal["avg", "mean", "median", "max", "min", "max_mean"]
REDUCTIONS: Final[tuple[Reduction, ...]] = ("avg", "mean", "median", "max", "min", "max_mean")

_Floats = NDArray[np.float64]


def unit(values: _Floats) -> _Floats:
    """Vectors [..., d] at length 1; the zero vector stays what it is, so that its cosines are 0."""
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    result: _Floats = values / np.where(norms == 0, 1.0, norms)
    return result


def pooled_cosines(first: Array, second: Array) -> _Floats:
    """cos of every vector [a, d] with every vector [b, d], in float64: [a, b]. Of mean-pooled tokens, this is `avg`."""
    result: _Floats = unit(first.astype(np.float64)) @ unit(second.astype(np.float64)).T
    return result


def _masked_mean(values: Array, mask: Array) -> _Floats:
    """Mean over tokens: [n, token, d] and bool [n, token] to [n, d]."""
    result: _Floats = np.einsum("ntd,nt->nd", values, mask.astype(np.float64)) / mask.sum(axis=1)[:, None]
    return result


def token_cosines(
    first: Array, second: Array, first_mask: Array, second_mask: Array, reductions: Collection[Reduction] = REDUCTIONS
) -> dict[Reduction, _Floats]:
    """All token x token cosines of every pair of examples, reduced to one number a pair.

    `avg` is the cosine of mean-pooled tokens and `mean` the product of mean unit vectors (the mean of all cosines): both need
    one vector an example. The others look at the cosines themselves, a row of the grid at a time.

    Args:
        first, second: tokens, [a, token, d] and [b, token, d].
        first_mask, second_mask: which of them are real, bool [a, token] and [b, token]; at least one per example.
        reductions: which to compute. `max_mean` is the mean, over the tokens of the first, of the largest cosine with a token
            of the second.

    Returns:
        Per reduction, [a, b].
    """
    found: dict[Reduction, _Floats] = {}
    units = [unit(one.astype(np.float64)) for one in (first, second)]
    if "avg" in reductions:
        found["avg"] = pooled_cosines(_masked_mean(first, first_mask), _masked_mean(second, second_mask))
    if "mean" in reductions:
        found["mean"] = _masked_mean(units[0], first_mask) @ _masked_mean(units[1], second_mask).T
    over_tokens = [one for one in reductions if one not in ("avg", "mean")]
    if over_tokens:
        columns = torch.from_numpy(units[1]).float()
        real = torch.from_numpy(second_mask)
        rows = [
            _reduce_row(torch.from_numpy(one[mask]).float() @ columns.mT, real, over_tokens)
            for one, mask in zip(units[0], first_mask, strict=True)
        ]
        found |= {name: np.stack([row[name] for row in rows]) for name in over_tokens}
    return {name: found[name] for name in reductions}


def _reduce_row(cosines: Tensor, real: Tensor, reductions: Collection[Reduction]) -> dict[Reduction, _Floats]:
    """Cosines [b, token, token] of one example with all others, and which columns are real [b, token], to [b] each."""
    absent = ~real[:, None, :]
    high, low = cosines.masked_fill(absent, -torch.inf), cosines.masked_fill(absent, torch.inf)
    found: dict[Reduction, Tensor] = {}
    for name in reductions:
        if name == "max":
            found[name] = high.amax(dim=(1, 2))
        elif name == "min":
            found[name] = low.amin(dim=(1, 2))
        elif name == "max_mean":
            found[name] = high.amax(dim=2).mean(dim=1)
        elif name == "median":  # the mean of the two middle ones, as numpy has it
            ordered = low.flatten(1).sort(dim=1).values
            count = real.sum(dim=1) * cosines.shape[1]
            middle = torch.stack([(count - 1) // 2, count // 2], dim=1)
            found[name] = ordered.gather(1, middle).mean(dim=1)
    return {name: value.double().numpy() for name, value in found.items()}


def _group_sums(index: Array, n_groups: int, values: Array) -> _Floats:
    """Sums of values [k, n] over the groups of n: [group, k]."""
    result = np.zeros((n_groups, values.shape[0]))
    np.add.at(result, index, values.T)
    return result


def grid_intervals(
    grids: Array, rows: Array, columns: Array, *, paired: bool, n_resamples: int, seed: int
) -> pd.DataFrame:
    """Mean over a grid of pairs with the interval that follows from resampling the examples on its two sides.

    The N x N pairs are not independent: an example is in a row or a column of them. What is resampled is the group (the
    image) with all its rows and columns. To first order the mean of a grid is its mean plus what each group's row mean and
    column mean add to it (the Hajek projection of a two-sample mean), and the bootstrap runs over that: weights of groups
    never meet themselves in a product, which would double the weight of matched pairs.

    Args:
        grids: [k, a, b], k grids over the same examples.
        rows, columns: the group of every example, [a] and [b].
        paired: whether example i of the rows is example i of the columns: then the diagonal is the matched pairs.
        n_resamples, seed: of the bootstrap over groups.

    Returns:
        k rows: value (mean over the whole grid), sd (over the grid), matched (the diagonal), mismatched (pairs of different
        groups), difference (matched minus mismatched), each with its interval, n_items (of the smaller side) and n_groups.
        NaN where there are no such pairs.
    """
    k = len(grids)
    names, index = np.unique(np.concatenate([rows, columns]), return_inverse=True)
    of_rows, of_columns = index[: len(rows)], index[len(rows) :]
    other = rows[:, None] != columns[None, :]
    elsewhere = grids * other

    def gathered(values: Array, count: Array, where: Array) -> _Floats:
        return _group_sums(where, len(names), np.vstack([values, count[None]]))

    side_a, side_b = np.full(len(rows), len(columns)), np.full(len(columns), len(rows))
    blocks = [
        gathered(grids.sum(axis=2), side_a, of_rows),
        gathered(grids.sum(axis=1), side_b, of_columns),
        gathered(elsewhere.sum(axis=2), other.sum(axis=1), of_rows),
        gathered(elsewhere.sum(axis=1), other.sum(axis=0), of_columns),
    ]
    if paired:
        blocks.append(gathered(np.diagonal(grids, axis1=1, axis2=2), np.ones(len(rows)), of_rows))
    else:
        blocks.append(np.zeros((len(names), k + 1)))
    whole = grids.mean(axis=(1, 2))
    apart = ratio(elsewhere.sum(axis=(1, 2)), other.sum())

    def statistic(total: _Floats) -> _Floats:
        row, column, row_apart, column_apart, matched = (
            ratio(part[..., :-1], part[..., -1:]) for part in np.split(total, 5, axis=-1)
        )
        mismatched = row_apart + column_apart - apart
        return np.concatenate([row + column - whole, matched, mismatched, matched - mismatched], axis=-1)

    found = cluster_bootstrap(np.hstack(blocks), statistic, n_resamples=n_resamples, seed=seed)
    assert isinstance(found, list)
    table: dict[str, object] = {}
    for place, name in enumerate(("value", "matched", "mismatched", "difference")):
        prefix = "" if name == "value" else f"{name}_"
        part = found[place * k : (place + 1) * k]
        table |= {
            name: [one.value for one in part],
            f"{prefix}low": [one.low for one in part],
            f"{prefix}high": [one.high for one in part],
        }
    table["sd"] = grids.std(axis=(1, 2))
    return pd.DataFrame(table).assign(n_items=min(len(rows), len(columns)), n_groups=len(names))


def bucket_sums(pooled: Array, units: Array, buckets: Array, n_buckets: int) -> _Floats:
    """Sums of unit vectors over the examples of each bucket: what `avg` and `mean` of a whole grid follow from.

    Args:
        pooled: [n, modality, layer, d], mean-pooled tokens.
        units: [n, modality, layer, d], means of tokens at length 1.
        buckets: [n], the bucket of each example (of its group, so that no group is in two).
        n_buckets: how many there are.

    Returns:
        [bucket, reduction (avg, mean), modality, layer, d].
    """
    both = np.stack([unit(pooled.astype(np.float64)), units.astype(np.float64)], axis=1)
    result = np.zeros((n_buckets, *both.shape[1:]))
    np.add.at(result, buckets, both)
    return result


def whole_grid(sums: Array, counts: Array, *, n_resamples: int, seed: int) -> pd.DataFrame:
    """Image-text `avg` and `mean` over the grid of ALL examples, from sums of unit vectors: memory does not grow with them.

    The sum over a grid of cosines is the product of two sums of unit vectors. Intervals are those of `grid_intervals` with
    buckets of groups in place of groups.

    Args:
        sums: [bucket, reduction, modality, layer, d]; see `bucket_sums`.
        counts: [bucket], examples.
        n_resamples, seed: of the bootstrap over buckets.

    Returns:
        reduction, layer, value, low, high, n_items, n_buckets (that hold an example).
    """
    there = counts > 0
    sums, counts = sums[there], counts[there]
    first, second = sums[:, :, 0], sums[:, :, 1]  # [bucket, reduction, layer, d]
    n_items = counts.sum()
    rows = np.einsum("brld,rld->brl", first, second.sum(axis=0)).reshape(len(counts), -1) / n_items
    columns = np.einsum("rld,brld->brl", first.sum(axis=0), second).reshape(len(counts), -1) / n_items
    whole = rows.sum(axis=0) / n_items
    k = len(whole)

    def statistic(total: _Floats) -> _Floats:
        return ratio(total[..., :k] + total[..., k:-1], total[..., -1:]) - whole

    found = cluster_bootstrap(
        np.hstack([rows, columns, counts[:, None]]), statistic, n_resamples=n_resamples, seed=seed
    )
    assert isinstance(found, list)
    n_layers = k // 2
    return pd.DataFrame(
        {
            "reduction": np.repeat(["avg", "mean"], n_layers),
            "layer": np.tile(np.arange(n_layers), 2),
            "value": [one.value for one in found],
            "low": [one.low for one in found],
            "high": [one.high for one in found],
            "n_items": int(n_items),
            "n_buckets": len(counts),
        }
    )


def mean_intervals(values: Array, groups: Array, *, n_resamples: int, seed: int) -> pd.DataFrame:
    """Means over examples with their intervals, groups (images) resampled.

    Args:
        values: [n, k]; NaN where an example has no such value.
        groups: [n].
        n_resamples, seed: of the bootstrap.

    Returns:
        k rows: value, low, high, n_items.
    """
    intervals = cluster_means(values, groups, n_resamples=n_resamples, seed=seed)
    return pd.DataFrame(
        {
            "value": [one.value for one in intervals],
            "low": [one.low for one in intervals],
            "high": [one.high for one in intervals],
            "n_items": (~np.isnan(values)).sum(axis=0),
        }
    )

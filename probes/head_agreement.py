"""How far maps of heads agree: rank correlation, and overlap of the top heads, with intervals over items and chance levels.

A map is one number per head, [layer, head] laid out flat. Chance is 0 for the rank correlation. For the overlap of two
sets of k heads (Jaccard index: heads in both over heads in either) it is its mean over random sets of that size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom, rankdata

from slitlamp.evaluation.statistics import Interval, cluster_bootstrap, ratio

FloatArray = NDArray[np.float64]
Groups = NDArray[Any]


@dataclass(frozen=True)
class Agreement:
    """Rank correlation and top-k overlap of maps, with the overlap of random sets, and from how many maps of how many items."""

    spearman: Interval
    overlap: Interval
    chance: float
    k: int
    n_maps: int
    n_items: int

    def columns(self) -> dict[str, float]:
        """The columns of a tidy table."""
        return {
            "spearman": self.spearman.value,
            "low": self.spearman.low,
            "high": self.spearman.high,
            "overlap": self.overlap.value,
            "overlap_low": self.overlap.low,
            "overlap_high": self.overlap.high,
            "overlap_chance": self.chance,
            "k": self.k,
            "n_maps": self.n_maps,
            "n_items": self.n_items,
        }


def chance_overlap(n_heads: int, k: int) -> float:
    """The mean Jaccard index of two random sets of k of n heads."""
    shared = np.arange(k + 1)
    return float(np.sum(hypergeom(n_heads, k, k).pmf(shared) * shared / (2 * k - shared)))


def top_heads(maps: FloatArray, k: int) -> NDArray[np.bool_]:
    """Which k heads are largest, [..., head]; of equal ones the first."""
    order = np.argsort(-maps, axis=-1, kind="stable")[..., :k]
    chosen = np.zeros(maps.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=-1)
    return chosen


def pairwise_agreement(
    maps: FloatArray,
    groups: Groups,
    others: FloatArray | None = None,
    other_groups: Groups | None = None,
    *,
    k: int,
    same_item: bool,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Mean agreement over pairs of maps; a map that is the same for all heads has no ranks and is left out.

    Args:
        maps: [map, ...], one number per head.
        groups: [map], the item of each.
        others, other_groups: what each map is paired with; by default the maps themselves, no map with itself.
        k: size of the sets of top heads.
        same_item: pairs of maps of the same item, or of different items.
        n_resamples, seed: of the bootstrap over items. In a resample a pair counts as often as its items were drawn.
    """
    first, second = _flat(maps), _flat(maps if others is None else others)
    n_heads = first.shape[1]
    names, index = np.unique(
        np.concatenate([groups, groups if other_groups is None else other_groups]), return_inverse=True
    )
    one, two = index[: len(first)], index[len(first) :]
    kept, other_kept = (np.ptp(each, axis=1) > 0 for each in (first, second))
    first, one, second, two = first[kept], one[kept], second[other_kept], two[other_kept]
    rank = _unit_ranks(first) @ _unit_ranks(second).T
    shared = top_heads(first, k).astype(np.float32) @ top_heads(second, k).astype(np.float32).T
    counted = np.ones(rank.shape)
    if others is None:
        np.fill_diagonal(counted, 0)
    sums = [_by_group(each * counted, one, two, len(names)) for each in (rank, shared / (2 * k - shared), counted)]
    diagonal = np.eye(len(names), dtype=bool)
    ranks, overlaps, pairs = (np.where(diagonal == same_item, each, 0.0) for each in sums)

    def statistic(weights: FloatArray) -> FloatArray:
        if same_item:  # an item drawn twice does not pair with its copy
            total = [weights @ np.diagonal(each) for each in (ranks, overlaps, pairs)]
        else:
            total = [np.einsum("...i,...i->...", weights @ each, weights) for each in (ranks, overlaps, pairs)]
        return np.stack([ratio(total[0], total[2]), ratio(total[1], total[2])], axis=-1)

    found = cluster_bootstrap(np.eye(len(names)), statistic, n_resamples=n_resamples, seed=seed)
    assert isinstance(found, list)
    n_maps = len(first) + (0 if others is None else len(second))
    return Agreement(found[0], found[1], chance_overlap(n_heads, k), k, n_maps, len(names))


def agreement_of_means(
    maps: FloatArray,
    groups: Groups,
    others: FloatArray,
    other_groups: Groups,
    *,
    k: int,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Agreement of two mean maps; items that both have are resampled together.

    Args:
        maps, others: [map, ...] each, one number per head.
        groups, other_groups: the item of each.
        k, n_resamples, seed: as above.
    """
    first, second = _flat(maps), _flat(others)
    n_heads = first.shape[1]
    names, index = np.unique(np.concatenate([groups, other_groups]), return_inverse=True)
    sums = np.zeros((len(names), 2 * n_heads + 2))
    for each, where, start, count in (
        (first, index[: len(first)], 0, -2),
        (second, index[len(first) :], n_heads, -1),
    ):
        np.add.at(sums[:, start : start + n_heads], where, each)
        np.add.at(sums[:, count], where, 1)

    def statistic(total: FloatArray) -> FloatArray:
        one = ratio(total[..., :n_heads], total[..., -2:-1])
        two = ratio(total[..., n_heads:-2], total[..., -1:])
        shared = (top_heads(one, k) & top_heads(two, k)).sum(axis=-1)
        overlap = np.where(np.isfinite(one + two).all(axis=-1), shared / (2 * k - shared), np.nan)
        return np.stack([(_unit_ranks(one) * _unit_ranks(two)).sum(axis=-1), overlap], axis=-1)

    found = cluster_bootstrap(sums, statistic, n_resamples=n_resamples, seed=seed)
    assert isinstance(found, list)
    return Agreement(found[0], found[1], chance_overlap(n_heads, k), k, len(first) + len(second), len(names))


def _flat(maps: FloatArray) -> FloatArray:
    return maps.reshape(len(maps), -1).astype(np.float64)


def _unit_ranks(maps: FloatArray) -> FloatArray:
    """Ranks [..., head] with mean 0 and length 1, whose products are rank correlations; NaN where all heads are equal."""
    ranks = np.asarray(rankdata(maps, axis=-1), dtype=np.float64)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    return ratio(ranks, np.linalg.norm(ranks, axis=-1, keepdims=True))


def _by_group(values: FloatArray, rows: NDArray[Any], columns: NDArray[Any], n: int) -> FloatArray:
    """Sums of [map, map] over the items of both: [item, item]."""
    by_row = np.zeros((n, values.shape[1]))
    np.add.at(by_row, rows, values)
    by_both = np.zeros((n, n))
    np.add.at(by_both, columns, by_row.T)
    return by_both.T

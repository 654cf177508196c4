"""How well a score tells two classes apart, with intervals that keep whole images together."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from slitlamp.errors import InputError
from slitlamp.evaluation.statistics import Interval, cluster_bootstrap, ratio


def auroc_interval(
    score: ArrayLike,
    positive: ArrayLike,
    cluster: ArrayLike,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Area under the ROC curve, with a bootstrap interval over clusters.

    The area is the share of (positive, negative) pairs in which the positive has the higher score, ties counting half, over
    all pairs, within and between clusters. In a resample each pair counts as often as its two clusters were drawn.

    Args:
        score: float [item], finite; higher should mean positive.
        positive: bool [item].
        cluster: [item], the cluster (image) of each item.
        level, n_resamples, seed: of the bootstrap.

    Returns:
        The area and its interval; NaN where a class is empty.

    Raises:
        InputError: vectors of unequal length, or scores that are not finite.
    """
    scores = np.asarray(score, dtype=np.float64)
    labels = np.asarray(positive, dtype=bool)
    groups = np.asarray(cluster)
    if not scores.shape == labels.shape == groups.shape or scores.ndim != 1:
        raise InputError(
            f"auroc_interval needs three equally long vectors: {scores.shape}, {labels.shape}, {groups.shape}"
        )
    if not np.isfinite(scores).all():
        raise InputError("auroc_interval needs finite scores: drop the items with missing ones first")
    names, index = np.unique(groups, return_inverse=True)
    if not labels.any() or labels.all():
        return Interval(float("nan"), float("nan"), float("nan"), n=len(names), level=level)
    wins, n_positive, n_negative = _wins_by_cluster(scores, labels, index, len(names))

    def area(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        won = np.einsum("...i,ij,...j->...", weights, wins, weights, optimize=True)
        return ratio(won, (weights @ n_positive) * (weights @ n_negative))

    found = cluster_bootstrap(np.eye(len(names)), area, level=level, n_resamples=n_resamples, seed=seed)
    assert isinstance(found, Interval)
    return found


def _wins_by_cluster(
    scores: NDArray[np.float64], labels: NDArray[np.bool_], index: NDArray[Any], n_clusters: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """wins [i, j]: pairs that a positive of cluster i wins over a negative of cluster j; and the counts of both classes."""
    n_positive = np.bincount(index[labels], minlength=n_clusters).astype(np.float64)
    n_negative = np.bincount(index[~labels], minlength=n_clusters).astype(np.float64)
    ranks = rankdata(scores, method="dense")
    wins = np.zeros((n_clusters, n_clusters))
    positives, positive_cluster = ranks[labels], index[labels]
    for column in np.flatnonzero(n_negative):
        negatives = np.sort(ranks[(index == column) & ~labels])
        below = np.searchsorted(negatives, positives, side="left")
        at_or_below = np.searchsorted(negatives, positives, side="right")
        np.add.at(wins[:, column], positive_cluster, (below + at_or_below) / 2)
    return wins, n_positive, n_negative

"""How well a score tells two classes apart: areas under the ROC curve, their differences, and areas at equal covariates.

All intervals keep whole images (clusters) together. What happens at one threshold is in
`slitlamp.evaluation.operating_points`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from slitlamp.errors import InputError
from slitlamp.evaluation.statistics import Interval, Statistic, cluster_bootstrap, ratio

FloatArray = NDArray[np.float64]
_CHUNK_VALUES = 4_000_000
"""Most weights (resamples x items) held at a time: 32 MB each, of several."""


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
    scores, labels, index = checked("auroc_interval", score, positive, cluster)
    n_clusters = int(index.max()) + 1
    if not labels.any() or labels.all():
        return Interval(float("nan"), float("nan"), float("nan"), n=n_clusters, level=level)
    found = cluster_bootstrap(
        np.eye(n_clusters), _area(scores, labels, index), level=level, n_resamples=n_resamples, seed=seed
    )
    assert isinstance(found, Interval)
    return found


def auroc_difference(
    score_a: ArrayLike,
    score_b: ArrayLike,
    positive: ArrayLike,
    cluster: ArrayLike,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """AUROC of score b minus that of score a on the same items, with its interval and two-sided p value against zero.

    Both areas are taken on the same resampled clusters, so what the items have in common cancels.

    Args:
        score_a, score_b: float [item], finite; higher should mean positive.
        positive, cluster, level, n_resamples, seed: as in `auroc_interval`.

    Raises:
        InputError: as `auroc_interval`.
    """
    a, labels, index = checked("auroc_difference", score_a, positive, cluster)
    b, _, _ = checked("auroc_difference", score_b, positive, cluster)
    n_clusters = int(index.max()) + 1
    if not labels.any() or labels.all():
        return Interval(float("nan"), float("nan"), float("nan"), n=n_clusters, level=level, p=float("nan"))
    area_a, area_b = (_area(one, labels, index) for one in (a, b))
    found = cluster_bootstrap(
        np.eye(n_clusters), lambda weights: area_b(weights) - area_a(weights),
        level=level, n_resamples=n_resamples, seed=seed, p_value=True,
    )  # fmt: skip
    assert isinstance(found, Interval)
    return found


def stratified_auroc(
    score: ArrayLike,
    positive: ArrayLike,
    stratum: ArrayLike,
    cluster: ArrayLike,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """AUROC within strata of a covariate: what the score tells beyond it.

    The covariate-adjusted area of Janes and Pepe (Biometrika 96, 2009) for a discrete covariate: the mean over positives of
    the share of negatives OF THEIR STRATUM that they win, ties counting half; so the area of each stratum, weighted by its
    positives. Strata with one class only have no pairs and are left out.

    Args:
        stratum: [item], the covariate, such as the category or a bin of the position.
        score, positive, cluster, level, n_resamples, seed: as in `auroc_interval`.

    Returns:
        The area and its interval; NaN where no stratum has both classes.

    Raises:
        InputError: as `auroc_interval`.
    """
    scores, labels, index = checked("stratified_auroc", score, positive, cluster)
    strata = np.asarray(stratum)
    if strata.shape != scores.shape:
        raise InputError(f"stratified_auroc needs a stratum of each item: {strata.shape} for {scores.shape}")
    n_clusters = int(index.max()) + 1
    parts = []
    for one in np.unique(strata):
        rows = strata == one
        if labels[rows].any() and not labels[rows].all():
            parts.append(_wins_by_cluster(scores[rows], labels[rows], index[rows], n_clusters))
    if not parts:
        return Interval(float("nan"), float("nan"), float("nan"), n=n_clusters, level=level)

    def area(weights: FloatArray) -> FloatArray:
        total, share = np.zeros(weights.shape[:-1]), np.zeros(weights.shape[:-1])
        for wins, n_positive, n_negative in parts:
            negatives = weights @ n_negative
            won = np.einsum("...i,ij,...j->...", weights, wins, weights, optimize=True)
            total += np.nan_to_num(ratio(won, negatives))
            share += np.where(negatives > 0, weights @ n_positive, 0)
        return ratio(total, share)

    found = cluster_bootstrap(np.eye(n_clusters), area, level=level, n_resamples=n_resamples, seed=seed)
    assert isinstance(found, Interval)
    return found


def adjusted_auroc(
    score: ArrayLike,
    positive: ArrayLike,
    covariates: ArrayLike,
    cluster: ArrayLike,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """AUROC of what a score has beyond numeric covariates, by regression on the negatives.

    Janes and Pepe (Biometrika 96, 2009) with a linear model of the score's mean: the score is regressed on the covariates
    among NEGATIVES, and the area is that of the residuals of all items. Regression on the negatives alone is what keeps a
    real difference between the classes from being explained away. Every resample has its own regression.

    Args:
        covariates: float [item, covariate] or [item], finite, such as the position of the token and the object's frequency.
        score, positive, cluster, level, n_resamples, seed: as in `auroc_interval`.

    Returns:
        The area and its interval; NaN where a class is empty.

    Raises:
        InputError: as `auroc_interval`, and covariates that do not fit the items.
    """
    scores, labels, index = checked("adjusted_auroc", score, positive, cluster)
    given = np.asarray(covariates, dtype=np.float64)
    given = given[:, None] if given.ndim == 1 else given
    if given.ndim != 2 or len(given) != len(scores) or not np.isfinite(given).all():
        raise InputError(f"adjusted_auroc needs finite covariates [item, covariate]: {given.shape} for {scores.shape}")
    n_clusters = int(index.max()) + 1
    if not labels.any() or labels.all():
        return Interval(float("nan"), float("nan"), float("nan"), n=n_clusters, level=level)
    spread = given.std(axis=0)
    design = np.column_stack([np.ones(len(scores)), (given - given.mean(axis=0)) / np.where(spread > 0, spread, 1)])
    k = design.shape[1]
    outer = (design[:, :, None] * np.column_stack([design, scores])[:, None, :]).reshape(len(scores), -1)
    moments = np.zeros((n_clusters, outer.shape[1]))  # of the negatives: X'X and X'y per cluster
    np.add.at(moments, index[~labels], outer[~labels])

    def area(weights: FloatArray) -> FloatArray:
        flat = weights.reshape(-1, n_clusters)
        step = max(1, _CHUNK_VALUES // len(scores))
        areas = [_residual_area(flat[start : start + step]) for start in range(0, len(flat), step)]
        return np.concatenate(areas).reshape(weights.shape[:-1])

    def _residual_area(weights: FloatArray) -> FloatArray:
        both = (weights @ moments).reshape(-1, k, k + 1)
        slopes = np.einsum("bij,bj->bi", np.linalg.pinv(both[..., :-1], hermitian=True), both[..., -1])
        residual = scores - slopes @ design.T
        return weighted_auroc(residual, labels, weights[:, index])

    found = cluster_bootstrap(np.eye(n_clusters), area, level=level, n_resamples=n_resamples, seed=seed)
    assert isinstance(found, Interval)
    return found


def weighted_auroc(scores: FloatArray, labels: NDArray[np.bool_], weights: FloatArray) -> FloatArray:
    """AUROC [resample] of scores [resample, item] of items that count `weights` [resample, item] times; ties count half."""
    order = np.argsort(scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    weight = np.take_along_axis(weights, order, axis=1)
    positive = labels[order]
    below = np.cumsum(np.where(positive, 0.0, weight), axis=1)
    total = below[:, -1]
    # negatives below a run of ties, and with it: the half sum of both counts ties half
    edge = np.ones_like(positive)
    edge[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    place = np.arange(scores.shape[1])
    first = np.maximum.accumulate(np.where(edge, place, 0), axis=1)
    last_edge = np.ones_like(positive)
    last_edge[:, :-1] = edge[:, 1:]
    last = np.minimum.accumulate(np.where(last_edge, place, len(place) - 1)[:, ::-1], axis=1)[:, ::-1]
    before = np.where(first > 0, np.take_along_axis(below, np.maximum(first - 1, 0), axis=1), 0.0)
    up_to = np.take_along_axis(below, last, axis=1)
    mine = np.where(positive, weight, 0.0)
    return ratio((mine * (before + up_to) / 2).sum(axis=1), mine.sum(axis=1) * total)


def checked(
    what: str, score: ArrayLike, positive: ArrayLike, cluster: ArrayLike
) -> tuple[FloatArray, NDArray[np.bool_], NDArray[np.intp]]:
    """Scores, labels, and the place of each item's cluster among the sorted clusters.

    Raises:
        InputError: vectors of unequal length or none, or scores that are not finite.
    """
    scores = np.asarray(score, dtype=np.float64)
    labels = np.asarray(positive, dtype=bool)
    groups = np.asarray(cluster)
    if not scores.shape == labels.shape == groups.shape or scores.ndim != 1 or not scores.size:
        raise InputError(f"{what} needs three equally long vectors: {scores.shape}, {labels.shape}, {groups.shape}")
    if not np.isfinite(scores).all():
        raise InputError(f"{what} needs finite scores: drop the items with missing ones first")
    return scores, labels, np.unique(groups, return_inverse=True)[1]


def _area(scores: FloatArray, labels: NDArray[np.bool_], index: NDArray[np.intp]) -> Statistic:
    wins, n_positive, n_negative = _wins_by_cluster(scores, labels, index, int(index.max()) + 1)

    def area(weights: FloatArray) -> FloatArray:
        won = np.einsum("...i,ij,...j->...", weights, wins, weights, optimize=True)
        return ratio(won, (weights @ n_positive) * (weights @ n_negative))

    return area


def _wins_by_cluster(
    scores: FloatArray, labels: NDArray[np.bool_], index: NDArray[Any], n_clusters: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
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

"""A score used as a detector: precision and recall, rates at a chosen false-positive rate, thresholds, calibration.

An item is flagged where its score is ABOVE the threshold. All intervals resample whole clusters (images).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.signal import convolve

from slitlamp.errors import InputError
from slitlamp.evaluation.detection import checked
from slitlamp.evaluation.statistics import FloatArray, Interval, cluster_bootstrap, ratio

FPRS: tuple[float, ...] = (0.001, 0.01, 0.05)
"""False-positive rates at which TruthPrInt's detectors are compared (arXiv 2503.10602)."""

_CHUNK_VALUES = 4_000_000


def detection_table(
    score: ArrayLike,
    positive: ArrayLike,
    cluster: ArrayLike,
    *,
    fprs: Sequence[float] = FPRS,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC, AUPRC, and at each false-positive rate the threshold, the hits, the specificity and the likelihood ratio.

    At rate f the threshold is the score of the (k + 1)-th highest negative, where k = floor(f x negatives) may be flagged:
    the lowest threshold whose false positives are no more than f. It is found anew in every resample, so its uncertainty is in
    the intervals. With k = 0 (column `n_allowed`) the rate cannot be resolved: the row then holds what is found without any
    false positive, and its interval is only a rough one.

    Args:
        score: float [item], finite; higher should mean positive.
        positive: bool [item].
        cluster: [item], the image of each item.
        fprs: between 0 and 1.
        level, n_resamples, seed: of the bootstrap.

    Returns:
        One row per metric and rate: metric, fpr (NaN where it does not apply), value, low, high, chance (what a score without
        information has), n_allowed, n_positive, n_negative, n_clusters. Metrics: "auroc"; "auprc", average precision as in
        scikit-learn; "threshold"; "tpr", the share of positives above it; "specificity", the share of negatives not above it;
        "lr_plus", tpr over the false-positive rate that the threshold really has (NaN where that is 0).

    Raises:
        InputError: vectors that do not fit, scores that are not finite, an empty class, or rates outside (0, 1).
    """
    scores, labels, index = checked("detection_table", score, positive, cluster)
    if not all(0 < one < 1 for one in fprs):
        raise InputError(f"false-positive rates lie between 0 and 1: found {list(fprs)}")
    n_positive, n_negative, n_clusters = int(labels.sum()), int((~labels).sum()), int(index.max()) + 1
    if not n_positive or not n_negative:
        raise InputError(f"detection_table needs both classes: found {n_positive} positives, {n_negative} negatives")
    curve = _Curve(scores, labels, index)

    def metrics(weights: FloatArray) -> FloatArray:
        flat = weights.reshape(-1, n_clusters)
        step = max(1, _CHUNK_VALUES // len(scores))
        parts = [curve.metrics(flat[start : start + step], fprs) for start in range(0, len(flat), step)]
        return np.concatenate(parts).reshape(*weights.shape[:-1], -1)

    found = cluster_bootstrap(np.eye(n_clusters), metrics, level=level, n_resamples=n_resamples, seed=seed)
    intervals = found if isinstance(found, list) else [found]
    nan = float("nan")
    kinds = [("auroc", nan, 0.5), ("auprc", nan, n_positive / len(scores))]
    for one in fprs:
        kinds += [("threshold", one, nan), ("tpr", one, one), ("specificity", one, 1 - one), ("lr_plus", one, 1.0)]
    return pd.DataFrame(
        {
            "metric": [kind[0] for kind in kinds],
            "fpr": [kind[1] for kind in kinds],
            "value": [one.value for one in intervals],
            "low": [one.low for one in intervals],
            "high": [one.high for one in intervals],
            "chance": [kind[2] for kind in kinds],
            "n_allowed": [nan if np.isnan(kind[1]) else np.floor(_exact(kind[1] * n_negative)) for kind in kinds],
            "n_positive": n_positive,
            "n_negative": n_negative,
            "n_clusters": n_clusters,
        }
    )


def threshold_at_fpr(
    score: ArrayLike,
    positive: ArrayLike,
    cluster: ArrayLike,
    fpr: float = 0.01,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The lowest threshold with a false-positive rate of no more than `fpr`; the rest as in `detection_table`."""
    table = detection_table(score, positive, cluster, fprs=(fpr,), level=level, n_resamples=n_resamples, seed=seed)
    row = table[table["metric"] == "threshold"].iloc[0]
    return Interval(float(row["value"]), float(row["low"]), float(row["high"]), int(row["n_clusters"]), level)


def operating_point(
    score: ArrayLike,
    positive: ArrayLike,
    cluster: ArrayLike,
    threshold: float,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """What a threshold that was chosen elsewhere does on these items: a row each for tpr, fpr, specificity, precision, lr_plus.

    Returns:
        Columns metric, value, low, high, chance (the share of flagged items, as if flagged at random; precision: the share of
        positives), n_positive, n_negative, n_flagged, n_clusters. NaN where a rate has no items.

    Raises:
        InputError: as `detection_table`, but a class may be empty.
    """
    scores, labels, index = checked("operating_point", score, positive, cluster)
    flagged = scores > threshold
    counts = np.zeros((int(index.max()) + 1, 4))
    for place, rows in enumerate((flagged & labels, flagged & ~labels, ~flagged & labels, ~flagged & ~labels)):
        np.add.at(counts[:, place], index[rows], 1)

    def rates(total: FloatArray) -> FloatArray:
        hit, false, missed, passed = (total[..., place] for place in range(4))
        tpr, fpr = ratio(hit, hit + missed), ratio(false, false + passed)
        return np.stack([tpr, fpr, 1 - fpr, ratio(hit, hit + false), ratio(tpr, fpr)], axis=-1)

    found = cluster_bootstrap(counts, rates, level=level, n_resamples=n_resamples, seed=seed)
    intervals = found if isinstance(found, list) else [found]
    share = float(flagged.mean())
    return pd.DataFrame(
        {
            "metric": ["tpr", "fpr", "specificity", "precision", "lr_plus"],
            "value": [one.value for one in intervals],
            "low": [one.low for one in intervals],
            "high": [one.high for one in intervals],
            "chance": [share, share, 1 - share, float(labels.mean()), 1.0],
            "n_positive": int(labels.sum()),
            "n_negative": int((~labels).sum()),
            "n_flagged": int(flagged.sum()),
            "n_clusters": len(counts),
        }
    )


def expected_calibration_error(
    probability: ArrayLike,
    positive: ArrayLike,
    cluster: ArrayLike,
    *,
    n_bins: int = 15,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """ECE: the mean distance between probability and frequency over bins of equal width (Guo et al., ICML 2017, eq. 3).

    It cannot be negative, so noise makes it positive, in resamples once more. Beside it belongs what perfectly calibrated
    probabilities would give: `calibrated_error`. The interval is the percentiles' moved down by the resamples' mean excess
    over the value (clipped at 0), which takes out what resampling adds, not what sampling has added.

    Args:
        probability: float [item] in [0, 1].
        positive: bool [item].
        cluster: [item].
        n_bins: of equal width over [0, 1].
        level, n_resamples, seed: of the bootstrap.

    Raises:
        InputError: vectors that do not fit, probabilities outside [0, 1], or no bins.
    """
    values, labels, index = checked("expected_calibration_error", probability, positive, cluster)
    place = _bins(values, n_bins)
    gaps = np.zeros((int(index.max()) + 1, n_bins))
    np.add.at(gaps, (index, place), labels - values)
    sizes = np.bincount(index)[:, None].astype(np.float64)

    def error(total: FloatArray) -> FloatArray:
        return ratio(np.abs(total[..., :-1]).sum(axis=-1), total[..., -1])

    draws: list[FloatArray] = []

    def kept(total: FloatArray) -> FloatArray:
        found = error(total)
        if found.ndim:
            draws.append(found)
        return found

    found = cluster_bootstrap(np.hstack([gaps, sizes]), kept, level=level, n_resamples=n_resamples, seed=seed)
    assert isinstance(found, Interval)
    excess = float(np.concatenate(draws).mean()) - found.value
    low, high = (max(0.0, float(end) - excess) if np.isfinite(end) else end for end in (found.low, found.high))
    return Interval(found.value, low, high, found.n, level, "percentile, less the mean excess")


def calibrated_error(
    probability: ArrayLike, *, n_bins: int = 15, level: float = 0.95, n_draws: int = 2000, seed: int = 0
) -> Interval:
    """The ECE that these probabilities would have if they were right: its mean, exactly, and its range over labels drawn."""
    values = np.asarray(probability, dtype=np.float64)
    place = _bins(values, n_bins)
    rng = np.random.default_rng(seed)
    indicator = np.eye(n_bins)[place]
    step = max(1, _CHUNK_VALUES // len(values))
    errors = []
    for start in range(0, n_draws, step):
        drawn = rng.random((min(step, n_draws - start), len(values))) < values
        errors.append(np.abs((drawn - values) @ indicator).sum(axis=1) / len(values))
    low, high = np.quantile(np.concatenate(errors), [(1 - level) / 2, (1 + level) / 2])
    mean = sum(_mean_deviation(values[place == one]) for one in np.unique(place)) / len(values)
    return Interval(float(mean), float(low), float(high), len(values), level, "draws of calibrated labels")


def _mean_deviation(probability: FloatArray) -> float:
    """E |sum of labels - sum of probabilities| of independent labels, from the distribution of their sum."""
    parts = [np.array([1 - one, one]) for one in probability]
    while len(parts) > 1:
        pairs = [convolve(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return float(np.abs(np.arange(len(parts[0])) - probability.sum()) @ parts[0])


def calibration_curve(
    probability: ArrayLike,
    positive: ArrayLike,
    cluster: ArrayLike,
    *,
    n_bins: int = 15,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Frequency against mean probability of each bin that has items: columns bin, probability, frequency, low, high, n."""
    values, labels, index = checked("calibration_curve", probability, positive, cluster)
    place = _bins(values, n_bins)
    used, column = np.unique(place, return_inverse=True)
    n_clusters, cell = int(index.max()) + 1, index * len(used) + column
    sums = [
        np.bincount(cell, one, n_clusters * len(used)).reshape(n_clusters, -1) for one in (labels, np.ones(len(cell)))
    ]
    found = cluster_bootstrap(
        np.hstack(sums),
        lambda total: ratio(total[..., : len(used)], total[..., len(used) :]),
        level=level, n_resamples=n_resamples, seed=seed,
    )  # fmt: skip
    intervals = found if isinstance(found, list) else [found]
    sizes = np.bincount(column)
    return pd.DataFrame(
        {
            "bin": used,
            "probability": np.bincount(column, values) / sizes,
            "frequency": [one.value for one in intervals],
            "low": [one.low for one in intervals],
            "high": [one.high for one in intervals],
            "n": sizes,
        }
    )


def _bins(values: FloatArray, n_bins: int) -> NDArray[np.intp]:
    if n_bins < 1:
        raise InputError(f"n_bins must be at least 1: found {n_bins}")
    if not values.size or values.min() < 0 or values.max() > 1:
        raise InputError("probabilities lie in [0, 1]: found others, or none; scores are not probabilities")
    return np.minimum((values * n_bins).astype(np.intp), n_bins - 1)


def _exact(value: float) -> float:
    """Half a billionth more: 0.07 x 100 is 7.000000000000001, but 0.29 x 100 is 28.999999999999996."""
    return value + 5e-10


class _Curve:
    """The ROC curve of items that count several times: cumulated weights at each distinct score, from the highest down."""

    def __init__(self, scores: FloatArray, labels: NDArray[np.bool_], index: NDArray[np.intp]) -> None:
        order = np.argsort(-scores, kind="stable")
        ordered = scores[order]
        self._ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
        self._values = ordered[self._ends]
        self._labels, self._index = labels[order], index[order]

    def metrics(self, weights: FloatArray, fprs: Sequence[float]) -> FloatArray:
        """[resample, metric] of clusters that count `weights` [resample, cluster] times; NaN where a class is empty."""
        weight = weights[:, self._index]
        hits = np.cumsum(weight * self._labels, axis=1)[:, self._ends]
        flagged = np.cumsum(weight, axis=1)[:, self._ends]
        false = flagged - hits
        n_positive, n_negative = hits[:, -1], false[:, -1]
        start = np.zeros((len(weights), 1))
        gained = np.diff(hits, axis=1, prepend=start)
        before = np.hstack([start, false[:, :-1]])
        # a positive wins over the negatives below it, and over half of those at its own score
        won = (gained * (n_negative[:, None] - (before + false) / 2)).sum(axis=1)
        precise = (gained * np.nan_to_num(ratio(hits, flagged))).sum(axis=1)
        columns = [ratio(won, n_positive * n_negative), ratio(precise, n_positive)]
        defined = (n_positive > 0) & (n_negative > 0)
        rows = np.arange(len(weights))
        for fpr in fprs:
            # the last distinct score of which everything above is within the allowance; it holds a negative itself
            place = (before <= _exact(fpr) * n_negative[:, None]).sum(axis=1) - 1
            above = np.where(place > 0, hits[rows, np.maximum(place - 1, 0)], 0.0)
            tpr = ratio(above, n_positive)
            real = ratio(before[rows, place], n_negative)
            columns += [self._values[place], tpr, 1 - real, ratio(tpr, real)]
        return np.where(defined[:, None], np.stack(columns, axis=1), np.nan)

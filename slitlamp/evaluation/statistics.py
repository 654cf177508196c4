"""Intervals and tests: cluster bootstrap on sufficient statistics, paired comparisons, correlations, FDR.

Permutation tests are in `permutation`, the jackknife in `jackknife`, what rests on ranks of scores in `detection`.

A metric here is a function of summed counts (for example hallucinated mentions over mentions). Summing the counts per
image first makes resampling whole images one matrix product, and keeps the dependence within an image in the interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from slitlamp.errors import InputError, unknown

FloatArray = NDArray[np.float64]
Statistic = Callable[[FloatArray], FloatArray]
"""From summed counts `[..., k]` to one value `[...]` or several `[..., m]`; NaN where it is undefined."""
BootstrapMethod = Literal["percentile", "bca"]
CorrelationMethod = Literal["spearman", "pearson"]

INTERACTION = (1.0, -1.0, -1.0, 1.0)
"""Weights of an interaction in `contrast_bootstrap`: of the unmodified model, a, b, and both."""

_CHUNK_VALUES = 8_000_000
"""Most resampling counts held at a time (64 MB)."""
_KEPT_VALUES = 2_000_000
"""Most resampling counts of a set that is kept for the next statistic (16 MB)."""


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval.

    `n` is the number of independent units (clusters or pairs), `p` a two-sided p value against zero where one was
    computed, `n_undefined` the number of resamples in which the statistic was undefined and which were left out.
    `low` and `high` are NaN where no interval can be given.
    """

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95
    method: str = "percentile"
    p: float | None = None
    n_undefined: int = 0

    def __str__(self) -> str:
        return f"{_short(self.value)} [{_short(self.low)}, {_short(self.high)}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero; False where there is no interval."""
        return self.low > 0 or self.high < 0


def cluster_bootstrap(
    sums: ArrayLike,
    statistic: Statistic,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    method: BootstrapMethod = "percentile",
    p_value: bool = False,
) -> Interval | list[Interval]:
    """Interval of `statistic` of the summed counts when whole clusters are resampled.

    `sums` `[cluster, k]` holds the counts of each cluster (each image). A list is returned where the statistic has
    several values. With fewer than two clusters the interval is NaN. `method` "bca" is Efron's bias-corrected and
    accelerated interval (An Introduction to the Bootstrap, eq. 14.10), with the jackknife over clusters.
    `p_value` adds the two-sided p of the value against zero: twice the smaller share of resamples at or beyond zero,
    with one added to numerator and denominator, so that it is never zero; 1 where all resamples are zero.
    """
    counts = as_counts(sums)
    _check_bootstrap(level, n_resamples, method)
    observed = _evaluate(statistic, counts.sum(axis=0))
    draws = np.concatenate([_evaluate(statistic, total) for total in _resampled(counts, n_resamples, seed)])
    jackknife = _evaluate(statistic, counts.sum(axis=0) - counts) if method == "bca" else None
    intervals = _intervals(observed, draws, len(counts), level, method, jackknife, p_value)
    return intervals if observed.ndim else intervals[0]


def cluster_sums(values: ArrayLike, cluster: ArrayLike) -> FloatArray:
    """Values [item, ...] added up over the items of each cluster: [cluster, ...], clusters in the order of their names."""
    array = np.asarray(values, dtype=np.float64)
    names, index = np.unique(np.asarray(cluster), return_inverse=True)
    if index.shape != array.shape[:1]:
        raise InputError(
            f"need the cluster of every item: found {index.size} clusters for values of shape {array.shape}"
        )
    sums = np.zeros((len(names), *array.shape[1:]))
    np.add.at(sums, index, array)
    return sums


def cluster_means(
    values: ArrayLike,
    cluster: ArrayLike,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    method: BootstrapMethod = "percentile",
    p_value: bool = False,
) -> list[Interval]:
    """The mean over items of each column of [item, k], with whole clusters resampled; NaN entries are left out.

    Of an item that is measured k times as often as another, all k count. A column without a value gives NaN, and so do
    all where there is no item. The rest as in `cluster_bootstrap`.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2:
        raise InputError(f"cluster_means needs values of shape [item, k]: found shape {array.shape}")
    known = ~np.isnan(array)
    if not known.any():
        return [Interval(np.nan, np.nan, np.nan, 0, level, method, np.nan if p_value else None)] * array.shape[1]
    found = cluster_bootstrap(
        cluster_sums(np.hstack([np.where(known, array, 0.0), known]), cluster),
        lambda total: ratio(*np.split(total, 2, axis=-1)),
        level=level, n_resamples=n_resamples, seed=seed, method=method, p_value=p_value,
    )  # fmt: skip
    return found if isinstance(found, list) else [found]


def paired_bootstrap(
    sums_a: ArrayLike,
    sums_b: ArrayLike,
    statistic: Statistic,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    method: BootstrapMethod = "percentile",
) -> Interval | list[Interval]:
    """Interval and p value of statistic(b) - statistic(a), with the same resampled clusters on both sides.

    `sums_a` and `sums_b` `[cluster, k]` list the same clusters in the same order; the rest as in `cluster_bootstrap`.
    """
    return contrast_bootstrap(
        [sums_a, sums_b], [-1, 1], statistic, level=level, n_resamples=n_resamples, seed=seed, method=method
    )


def contrast_bootstrap(
    sums: Sequence[ArrayLike],
    weights: Sequence[float],
    statistic: Statistic,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    method: BootstrapMethod = "percentile",
) -> Interval | list[Interval]:
    """Interval and p value of the sum of weight x statistic over several conditions, with the same resampled clusters in all.

    With the weights `INTERACTION` it is what two changes do together beyond the sum of what each does alone.

    Args:
        sums: of each condition, `[cluster, k]`, of the same clusters in the same order.
        weights: one per condition.
        statistic: of the summed counts of one condition.
        level, n_resamples, seed, method: as in `cluster_bootstrap`.
    """
    counts = [as_counts(one) for one in sums]
    if len({one.shape for one in counts}) > 1:
        raise InputError(
            "a paired bootstrap needs the same clusters in all conditions: found shapes "
            + " and ".join(str(one.shape) for one in counts)
        )
    if not counts or len(counts) != len(weights):
        raise InputError(f"need one weight per condition: found {len(weights)} weights for {len(counts)} conditions")

    def contrast(totals: FloatArray) -> FloatArray:
        parts = np.split(totals, len(counts), axis=-1)
        values = [weight * _evaluate(statistic, part) for weight, part in zip(weights, parts, strict=True)]
        return np.sum(values, axis=0, dtype=np.float64)

    return cluster_bootstrap(
        np.hstack(counts), contrast, level=level, n_resamples=n_resamples, seed=seed, method=method, p_value=True
    )


def holm(p: ArrayLike) -> FloatArray:
    """Holm-adjusted p values (1979), of the shape of `p`; NaN entries are no tests and stay NaN.

    The least of m p values times m, the next times m - 1, and so on, none less than one before it and none above 1. Tests whose
    adjusted p is at most alpha are right together with probability 1 - alpha, however they depend on each other.
    """
    values = np.asarray(p, dtype=np.float64)
    tested = values[~np.isnan(values)]
    if tested.size and (tested.min() < 0 or tested.max() > 1):
        raise InputError(f"p values lie in [0, 1]: found {tested.min():.3g} to {tested.max():.3g}")
    order = np.argsort(tested, kind="stable")
    scaled = tested[order] * np.arange(tested.size, 0, -1)
    adjusted = np.empty_like(tested)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    result = np.full(values.shape, np.nan)
    result[~np.isnan(values)] = adjusted
    return result


def benjamini_hochberg(p: ArrayLike) -> FloatArray:
    """Benjamini-Hochberg adjusted p values, of the shape of `p`; NaN entries are no tests and stay NaN."""
    values = np.asarray(p, dtype=np.float64)
    tested = ~np.isnan(values)
    if not tested.any():
        raise InputError(f"benjamini_hochberg needs at least one p value: found none among {values.size} entries")
    if values[tested].min() < 0 or values[tested].max() > 1:
        raise InputError(f"p values lie in [0, 1]: found {values[tested].min():.3g} to {values[tested].max():.3g}")
    adjusted = np.full(values.shape, np.nan)
    adjusted[tested] = stats.false_discovery_control(values[tested], method="bh")
    return adjusted


@dataclass(frozen=True)
class McNemar:
    """Two conditions on the same `n` items: how many only one of them got right, and the exact two-sided p."""

    both: int
    only_a: int
    only_b: int
    neither: int
    p: float

    @property
    def n(self) -> int:
        """Number of items."""
        return self.both + self.only_a + self.only_b + self.neither


def mcnemar(a_correct: ArrayLike, b_correct: ArrayLike) -> McNemar:
    """McNemar's exact (binomial) test on boolean `a_correct`, `b_correct` `[item]`; p is 1 with no discordant item.

    Items are taken as independent. Questions about one image are not: prefer `paired_bootstrap` over images for them.
    """
    a, b = np.asarray(a_correct), np.asarray(b_correct)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise InputError(f"mcnemar needs two equally long, non-empty vectors: found shapes {a.shape} and {b.shape}")
    if not all(np.isin(side, (0, 1)).all() for side in (a, b)):
        raise InputError("mcnemar needs correct / not correct as booleans: found other values (or missing ones)")
    a, b = a.astype(bool), b.astype(bool)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    p = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return McNemar(int((a & b).sum()), only_a, only_b, int((~a & ~b).sum()), p)


def correlation_interval(
    x: ArrayLike, y: ArrayLike, method: CorrelationMethod = "spearman", *, level: float = 0.95
) -> Interval:
    """Correlation of `x` and `y` `[item]` with its interval and p value.

    Pearson: Fisher's z. Spearman: z with the standard error of Bonett and Wright (2000), sqrt((1 + r^2 / 2) / (n - 3)).
    Undefined (constant input) is NaN, and so is the interval with fewer than four items; missing values are an error.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"correlation needs two equally long vectors: found shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("correlation needs finite values: drop the items with missing or infinite ones first")
    if method not in ("spearman", "pearson"):
        raise unknown("correlation method", method, ("spearman", "pearson"))
    _check_level(level)
    n = len(a)
    if n < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Interval(np.nan, np.nan, np.nan, n, level, method, np.nan)
    result = stats.spearmanr(a, b) if method == "spearman" else stats.pearsonr(a, b)
    r, p = float(result.statistic), float(result.pvalue)
    if n < 4:
        return Interval(r, np.nan, np.nan, n, level, method, p)
    if 1 - abs(r) < 1e-12:
        return Interval(r, r, r, n, level, method, p)
    error = np.sqrt(((1 + r**2 / 2) if method == "spearman" else 1.0) / (n - 3))
    half = stats.norm.ppf((1 + level) / 2) * error
    return Interval(r, float(np.tanh(np.arctanh(r) - half)), float(np.tanh(np.arctanh(r) + half)), n, level, method, p)


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> FloatArray:
    """Elementwise numerator / denominator, NaN (never 0) where the denominator is zero."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    result: FloatArray = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=result, where=bottom != 0)
    return result


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 0.9995 else f"{value:.3f}"


def as_counts(sums: ArrayLike) -> FloatArray:
    """Counts [cluster, k] as floats, or an InputError."""
    counts = np.asarray(sums, dtype=np.float64)
    if counts.ndim != 2 or not counts.size:
        raise InputError(f"need counts of shape [cluster, k] with at least one cluster: found shape {counts.shape}")
    if not np.isfinite(counts).all():
        raise InputError("counts must be finite: found NaN or infinity; leave out clusters that were not measured")
    return counts


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, for example 0.95: found {level}")


def _check_bootstrap(level: float, n_resamples: int, method: str) -> None:
    _check_level(level)
    if n_resamples < 1:
        raise InputError(f"n_resamples must be at least 1: found {n_resamples}")
    if method not in ("percentile", "bca"):
        raise unknown("bootstrap method", method, ("percentile", "bca"))


def _evaluate(statistic: Statistic, sums: FloatArray) -> FloatArray:
    return np.asarray(statistic(sums), dtype=np.float64)


def _resampled(counts: FloatArray, n_resamples: int, seed: int) -> Iterator[FloatArray]:
    """Sums over resampled clusters, `[resample, k]`, in chunks."""
    n = len(counts)
    if n * n_resamples <= _KEPT_VALUES:
        yield _kept_weights(n, n_resamples, seed) @ counts
    else:
        yield from (weights @ counts for weights in _weights(n, n_resamples, seed))


def _weights(n: int, n_resamples: int, seed: int) -> Iterator[FloatArray]:
    """How often each of n clusters is drawn, `[resample, cluster]`, in chunks."""
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK_VALUES // n)
    for start in range(0, n_resamples, step):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(step, n_resamples - start)).astype(np.float64)


@lru_cache(maxsize=4)
def _kept_weights(n: int, n_resamples: int, seed: int) -> FloatArray:
    """A single chunk, kept: a table has many statistics of the same clusters, and drawing takes longer than summing."""
    return next(_weights(n, n_resamples, seed))


def _intervals(
    observed: FloatArray,
    draws: FloatArray,
    n: int,
    level: float,
    method: str,
    jackknife: FloatArray | None,
    with_p: bool,
) -> list[Interval]:
    values = np.atleast_1d(observed)
    columns = draws.reshape(len(draws), -1).T
    left_out = None if jackknife is None else jackknife.reshape(len(jackknife), -1).T
    result = []
    for i, (value, column) in enumerate(zip(values, columns, strict=True)):
        defined = column[~np.isnan(column)]
        undefined = len(column) - len(defined)
        if n < 2 or np.isnan(value) or not len(defined):
            p = np.nan if with_p else None
            result.append(Interval(float(value), np.nan, np.nan, n, level, method, p, undefined))
            continue
        tails = np.array([(1 - level) / 2, (1 + level) / 2])
        if left_out is not None:
            tails = _bca_tails(tails, float(value), defined, left_out[i])
        low, high = np.quantile(defined, tails)
        p = None
        if with_p:
            beyond = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
            p = min(1.0, 2 * (beyond + 1) / (len(defined) + 1))
        result.append(Interval(float(value), float(low), float(high), n, level, method, p, undefined))
    return result


def _bca_tails(tails: FloatArray, value: float, draws: FloatArray, left_out: FloatArray) -> FloatArray:
    """The quantiles of `draws` at which the bias-corrected and accelerated interval ends."""
    deviation = np.nanmean(left_out) - left_out[~np.isnan(left_out)]
    spread = float((deviation**2).sum()) ** 1.5
    if spread == 0 or np.ptp(draws) == 0:
        return tails
    acceleration = float((deviation**3).sum()) / (6 * spread)
    share = float(((draws < value).sum() + (draws <= value).sum()) / (2 * len(draws)))
    # A value outside all draws has no finite bias; half a draw keeps the correction finite and at its extreme.
    share = min(max(share, 0.5 / len(draws)), 1 - 0.5 / len(draws))
    bias = stats.norm.ppf(share)
    shifted = bias + stats.norm.ppf(tails)
    corrected: FloatArray = stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))
    return corrected

"""Tests by permutation: of two conditions whose clusters are kept whole, and p values of a number among drawn ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from slitlamp.errors import InputError
from slitlamp.evaluation.statistics import FloatArray, Statistic, as_counts


def exceedance_p(value: ArrayLike, draws: ArrayLike) -> FloatArray:
    """One-sided p of values [...] among draws of the null [..., draw]: (1 + draws at or above) / (1 + draws).

    The value itself counts as a draw (Phipson and Smyth 2010, "Permutation p-values should never be zero", Eq. 1), so that a
    value that is one of them has p at most a in no more than a share a of cases. Draws that equal the value up to rounding
    count as at or above; NaN where the value or a draw is NaN, or where there is no draw.
    """
    observed, drawn = np.asarray(value, dtype=np.float64), np.asarray(draws, dtype=np.float64)
    slack = 1e-12 * np.abs(observed)
    above = (drawn >= (observed - slack)[..., None]).sum(axis=-1)
    known = np.isfinite(observed) & np.isfinite(drawn).all(axis=-1) & (drawn.shape[-1] > 0)
    return np.asarray(np.where(known, (1 + above) / (1 + drawn.shape[-1]), np.nan))


@dataclass(frozen=True)
class PermutationTest:
    """statistic(b) - statistic(a), its two-sided p value, and how many permutations (all of them where `exact`)."""

    value: float
    p: float
    n_permutations: int
    exact: bool


def permutation_test(
    sums_a: ArrayLike,
    sums_b: ArrayLike,
    statistic: Statistic,
    *,
    paired: bool = True,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> PermutationTest:
    """Two-sided permutation test of statistic(b) - statistic(a) on counts `[cluster, k]`, clusters kept whole.

    Paired: the two conditions are swapped within clusters; all 2^clusters swaps are made where they are no more than
    `n_permutations`. Unpaired: clusters are dealt out again to the two groups, at random. Random permutations add the
    observed one to numerator and denominator. The statistic has one value; NaN in a permutation is an error.
    """
    a, b = as_counts(sums_a), as_counts(sums_b)
    if a.shape[1] != b.shape[1] or (paired and len(a) != len(b)):
        raise InputError(f"permutation_test needs matching counts on both sides: found shapes {a.shape} and {b.shape}")
    if n_permutations < 1:
        raise InputError(f"n_permutations must be at least 1: found {n_permutations}")
    rng = np.random.default_rng(seed)
    total = a.sum(axis=0) + b.sum(axis=0)
    exact = paired and len(a) < 63 and 2 ** len(a) <= n_permutations
    if exact:
        n_permutations = 2 ** len(a)
        swaps = (np.arange(n_permutations)[:, None] >> np.arange(len(a))) & 1
        sums = b.sum(axis=0) + swaps @ (a - b)
    elif paired:
        sums = b.sum(axis=0) + rng.integers(0, 2, size=(n_permutations, len(a))) @ (a - b)
    else:
        pooled = np.concatenate([a, b])
        member = np.zeros((n_permutations, len(pooled)))
        member[:, len(a) :] = 1
        sums = rng.permuted(member, axis=1) @ pooled
    observed = float(_value(statistic, b.sum(axis=0)) - _value(statistic, a.sum(axis=0)))
    null = _value(statistic, sums) - _value(statistic, total - sums)
    if null.ndim != 1 or np.isnan(observed) or np.isnan(null).any():
        raise InputError("permutation_test needs one value, defined in every permutation: found several, or NaN")
    # Permutations that repeat the observed split must count although their sums differ in the last bits.
    extreme = int((np.abs(null) >= abs(observed) * (1 - 1e-12) - 1e-15).sum())
    p = extreme / n_permutations if exact else (extreme + 1) / (n_permutations + 1)
    return PermutationTest(observed, p, n_permutations, exact)


def _value(statistic: Statistic, sums: FloatArray) -> FloatArray:
    return np.asarray(statistic(sums), dtype=np.float64)

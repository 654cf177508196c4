"""Intervals of what cannot be resampled often: the jackknife that leaves out one group of items at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from slitlamp.errors import InputError
from slitlamp.evaluation.statistics import Interval


def group_jackknife(value: float, left_out: ArrayLike, sizes: ArrayLike, *, level: float = 0.95) -> Interval:
    """Interval of a value from its values without each group of items.

    The delete-m_j jackknife (Busing, Meijer and van der Leeden 1999, "Delete-m jackknife for unequal m", eq. 4), around the
    value itself and with the quantiles of Student's t at one degree of freedom less than there are groups. It costs one
    evaluation per group, where a bootstrap needs thousands; the statistic should be smooth in the items.

    Args:
        value: of all items.
        left_out: [group], the value without the group.
        sizes: [group], its number of items; groups of none are left out.
        level: of the interval.

    Raises:
        InputError: not one value per group, or no items.
    """
    without, size = np.asarray(left_out, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if without.ndim != 1 or without.shape != size.shape:
        raise InputError(f"need one value and one size per group: found shapes {without.shape} and {size.shape}")
    without, size = without[size > 0], size[size > 0]
    n_groups, n_items = len(size), int(size.sum())
    if not n_groups:
        raise InputError("the jackknife needs at least one item")
    if n_groups < 2 or not np.isfinite([value, *without]).all():
        return Interval(float(value), np.nan, np.nan, n_items, level, "jackknife")
    shares = n_items / size
    pseudo = shares * value - (shares - 1) * without
    estimate = n_groups * value - ((1 - size / n_items) * without).sum()
    error = np.sqrt((np.square(pseudo - estimate) / (shares - 1)).mean())
    half = stats.t.ppf((1 + level) / 2, n_groups - 1) * error
    return Interval(float(value), float(value - half), float(value + half), n_items, level, "jackknife")

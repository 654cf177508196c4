"""The group jackknife against the interval of a mean, and its coverage where groups differ in size."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from slitlamp.errors import InputError
from slitlamp.evaluation.jackknife import group_jackknife


def test_of_a_mean_of_equal_groups_it_is_the_t_interval() -> None:
    """Leaving out one of n equal groups of a mean gives the standard error of the group means."""
    values = np.random.default_rng(0).normal(size=(7, 5))
    left_out = [np.delete(values, i, axis=0).mean() for i in range(7)]
    found = group_jackknife(values.mean(), left_out, [5] * 7)
    low, high = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values.mean(axis=1)))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.value, found.n) == (pytest.approx(values.mean()), 35)


def test_it_covers_a_ratio_of_unequal_groups() -> None:
    """95 % of 600 intervals, within four standard errors (0.036); groups of 2 to 40 items."""
    rng = np.random.default_rng(1)
    sizes = np.array([2, 5, 8, 10, 12, 20, 30, 40, 9, 15])
    group = np.repeat(np.arange(10), sizes)
    covered = 0
    for _ in range(600):
        top, bottom = rng.gamma(4.0, size=sizes.sum()), rng.gamma(8.0, size=sizes.sum())
        left_out = [top[group != i].sum() / bottom[group != i].sum() for i in range(10)]
        found = group_jackknife(top.sum() / bottom.sum(), left_out, sizes)
        covered += found.low <= 0.5 <= found.high
    assert abs(covered / 600 - 0.95) < 0.036


def test_empty_groups_and_single_groups() -> None:
    full = group_jackknife(1.0, [0.9, 1.1, 1.05], [3, 3, 3])
    assert group_jackknife(1.0, [0.9, 1.0, 1.1, 1.05], [3, 0, 3, 3]) == full
    assert np.isnan(group_jackknife(1.0, [np.nan], [4]).low)
    assert np.isnan(group_jackknife(1.0, [0.9, np.nan], [4, 4]).low)
    with pytest.raises(InputError, match="one value and one size"):
        group_jackknife(1.0, [1.0], [1, 2])
    with pytest.raises(InputError, match="at least one item"):
        group_jackknife(1.0, [1.0], [0])

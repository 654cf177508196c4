"""Means over items whose images are resampled as a whole."""

from __future__ import annotations

import numpy as np
import pytest

from probes.image_means import Images


def test_copies_of_an_image_add_no_certainty() -> None:
    """Every item ten times over: the same mean and interval, which taking the copies for items would narrow threefold."""
    values = np.random.default_rng(0).normal(size=(30, 2))
    names = np.array([f"image{one}" for one in range(30)])
    once = Images(names, 500, 0).means(values)
    copied = Images(np.repeat(names, 10), 500, 0).means(np.repeat(values, 10, axis=0))
    apart = Images(np.arange(300), 500, 0).means(np.repeat(values, 10, axis=0))
    for one, same, narrow in zip(once, copied, apart, strict=True):
        assert (same.value, same.low, same.high) == pytest.approx((one.value, one.low, one.high))
        assert same.n == 30
        assert narrow.high - narrow.low < 0.5 * (one.high - one.low)


def test_the_mean_is_that_of_items_and_leaves_out_what_is_missing() -> None:
    """Three items of one image and one of another: the mean of four, not of two; NaN is no item."""
    found = Images(np.array(["a", "a", "a", "b"]), 50, 0)
    table = found.table([[1, np.nan], [1, 4], [1, np.nan], [5, 6]], "x")
    assert table["x"].tolist() == [2, 5]
    assert table["n_items"].tolist() == [4, 2]
    assert found.sums(np.array([1.0, 2, 3, 10])).tolist() == [6, 10]
    assert found.only(np.array([True, False, False, True])).means([[3], [5]])[0].value == 4


def test_nothing_measured_is_nan() -> None:
    (one,) = Images(np.array(["a", "b"]), 50, 0).means([[np.nan], [np.nan]])
    assert np.isnan([one.value, one.low, one.high]).all()

"""AUROC with cluster intervals, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from slitlamp.errors import InputError
from slitlamp.evaluation.detection import auroc_interval


def test_value_equals_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 6, 200).astype(float), rng.random(200) < 0.3
    found = auroc_interval(score, positive, rng.integers(0, 30, 200), n_resamples=50)
    assert found.value == pytest.approx(roc_auc_score(positive, score), abs=1e-12)


def test_by_hand() -> None:
    """Positives 3 and 1, negatives 2 and 1: pairs won 1 + 1 + 0 + 1/2 of 4."""
    assert auroc_interval([3, 1, 2, 1], [1, 1, 0, 0], [0, 0, 1, 1], n_resamples=20).value == 2.5 / 4


def test_interval_equals_resampling_whole_clusters_with_scikit_learn() -> None:
    """2,000 resamples by repeating the rows; both are Monte Carlo, whose error of a 2.5 % quantile here is about .01."""
    rng = np.random.default_rng(1)
    cluster = np.repeat(np.arange(40), 4)
    positive = rng.random(160) < 0.4
    score = positive + rng.normal(size=160) + rng.normal(size=40)[cluster]
    found = auroc_interval(score, positive, cluster)
    draws = []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(cluster == one) for one in rng.integers(0, 40, 40)])
        draws.append(roc_auc_score(positive[rows], score[rows]))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)


def test_one_class_has_no_area() -> None:
    assert np.isnan(auroc_interval([1, 2], [1, 1], [0, 1]).value)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="equally long"):
        auroc_interval([1, 2], [1], [0, 1])
    with pytest.raises(InputError, match="finite"):
        auroc_interval([np.nan, 2], [1, 0], [0, 1])

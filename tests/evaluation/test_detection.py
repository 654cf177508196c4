"""Areas, operating points and calibration with cluster intervals: against scikit-learn, by hand, and on planted truths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.calibration import calibration_curve as sklearn_curve
from sklearn.linear_model import LinearRegression
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from slitlamp.errors import InputError
from slitlamp.evaluation.detection import (
    adjusted_auroc,
    auroc_difference,
    auroc_interval,
    stratified_auroc,
    weighted_auroc,
)
from slitlamp.evaluation.operating_points import (
    calibrated_error,
    calibration_curve,
    detection_table,
    expected_calibration_error,
    operating_point,
    threshold_at_fpr,
)


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


def drawn(seed: int, n_clusters: int = 60, size: int = 6, ties: bool = False) -> tuple[Any, Any, Any]:
    """Scores, labels and clusters; scores share a cluster's effect."""
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(n_clusters), size)
    positive = rng.random(len(cluster)) < 0.4
    score = positive + rng.normal(size=len(cluster)) + rng.normal(size=n_clusters)[cluster]
    return (np.round(score * 2) if ties else score), positive, cluster


def repeated(cluster: Any, seed: int) -> Any:
    """The rows of the clusters that a resample drew, each as often as it was drawn."""
    drawn_clusters = np.random.default_rng(seed).integers(0, cluster.max() + 1, cluster.max() + 1)
    return np.concatenate([np.flatnonzero(cluster == one) for one in drawn_clusters])


# -- differences and covariates -----------------------------------------------------------------------------------------


def test_the_difference_of_two_scores_is_that_of_their_areas_and_narrower_than_unpaired() -> None:
    score, positive, cluster = drawn(0)
    other = score + np.random.default_rng(1).normal(size=len(score)) * 0.3
    found = auroc_difference(other, score, positive, cluster, n_resamples=400)
    assert found.value == pytest.approx(roc_auc_score(positive, score) - roc_auc_score(positive, other))
    one = auroc_interval(score, positive, cluster, n_resamples=400)
    assert found.high - found.low < (one.high - one.low) / 2
    same = auroc_difference(score, 2 * score, positive, cluster, n_resamples=100)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_weighted_area_equals_repeating_the_rows() -> None:
    for ties in (False, True):
        score, positive, cluster = drawn(2, ties=ties)
        rows = repeated(cluster, 3)
        weights = np.bincount(rows, minlength=len(score)).astype(float)
        found = weighted_auroc(score[None], positive, weights[None])
        assert found[0] == pytest.approx(roc_auc_score(positive[rows], score[rows]), abs=1e-12)


def test_area_within_strata_by_hand() -> None:
    """Stratum a: positive 2 beats negative 1 (area 1, one positive). b: 5 and 3 against 4: area 1/2, two positives.

    The mean over positives is (1 + 1/2 + 1/2) / 3 = 2/3; stratum c has negatives only. Over all pairs it would be 10/12.
    """
    score, positive, stratum = [2, 1, 5, 3, 4, 0, 0], [1, 0, 1, 1, 0, 0, 0], list("aabbbcc")
    found = stratified_auroc(score, positive, stratum, range(7), n_resamples=20)
    assert found.value == pytest.approx(2 / 3)
    assert np.isnan(stratified_auroc(score, positive, range(7), range(7), n_resamples=20).value)


def test_a_score_that_only_knows_the_covariate_has_no_area_beyond_it() -> None:
    """Planted: the covariate decides the label and the score copies it; a second score has something of its own."""
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(150), 4)
    covariate = rng.integers(0, 4, 600)
    positive = rng.random(600) < np.array([0.1, 0.3, 0.5, 0.7])[covariate]
    copy = covariate + 0.8 * rng.normal(size=600)
    own = copy + positive
    assert auroc_interval(copy, positive, cluster, n_resamples=200).low > 0.6
    for found in (
        stratified_auroc(copy, positive, covariate, cluster, n_resamples=200),
        adjusted_auroc(copy, positive, covariate, cluster, n_resamples=200),
    ):
        assert found.low < 0.5 < found.high
    wanted = 0.812  # P(N(1, .8) > N(0, .8)) = Phi(1 / (.8 sqrt 2))
    for found in (
        stratified_auroc(own, positive, covariate, cluster, n_resamples=200),
        adjusted_auroc(own, positive, covariate, cluster, n_resamples=200),
    ):
        assert found.low < wanted < found.high


def test_adjusted_area_is_that_of_the_residuals_of_a_regression_on_the_negatives() -> None:
    score, positive, cluster = drawn(4)
    covariates = np.random.default_rng(5).normal(size=(len(score), 2)) * [1, 100] + [0, 1e4]
    line = LinearRegression().fit(covariates[~positive], score[~positive])
    found = adjusted_auroc(score, positive, covariates, cluster, n_resamples=20)
    assert found.value == pytest.approx(roc_auc_score(positive, score - line.predict(covariates)))
    constant = adjusted_auroc(score, positive, np.ones(len(score)), cluster, n_resamples=20)
    assert constant.value == pytest.approx(roc_auc_score(positive, score))


# -- operating points ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_the_table_equals_scikit_learn(ties: bool) -> None:
    score, positive, cluster = drawn(6, ties=ties)
    table = detection_table(score, positive, cluster, fprs=(0.01, 0.05, 0.2), n_resamples=30)
    values = table.set_index(["metric", "fpr"])["value"]
    assert table["value"][0] == pytest.approx(roc_auc_score(positive, score))
    assert table["value"][1] == pytest.approx(average_precision_score(positive, score))
    fpr, tpr, thresholds = roc_curve(positive, score, drop_intermediate=False)
    for one in (0.01, 0.05, 0.2):
        place = np.flatnonzero(fpr <= one)[-1]
        assert values["tpr", one] == pytest.approx(tpr[place])
        assert values["specificity", one] == pytest.approx(1 - fpr[place])
        if fpr[place]:
            assert values["lr_plus", one] == pytest.approx(tpr[place] / fpr[place])
        else:
            assert np.isnan(values["lr_plus", one])
        # scikit-learn flags from its threshold on, we flag above ours: the next lower score
        assert (score > values["threshold", one]).sum() == (score >= thresholds[place]).sum()


def test_intervals_equal_resampling_whole_clusters_with_scikit_learn() -> None:
    """Both are Monte Carlo: the quantiles of 400 resamples agree within a fifth of the interval's width."""
    score, positive, cluster = drawn(7, n_clusters=80)
    table = detection_table(score, positive, cluster, fprs=(0.2,), n_resamples=2000).set_index("metric")
    draws: dict[str, list[float]] = {"auroc": [], "auprc": [], "tpr": [], "threshold": []}
    for seed in range(400):
        rows = repeated(cluster, seed)
        y, s = positive[rows], score[rows]
        fpr, tpr, _ = roc_curve(y, s, drop_intermediate=False)
        draws["auroc"].append(roc_auc_score(y, s))
        draws["auprc"].append(average_precision_score(y, s))
        draws["tpr"].append(tpr[fpr <= 0.2].max())
        negatives = np.sort(s[~y])[::-1]
        draws["threshold"].append(negatives[int(np.floor(0.2 * len(negatives) + 1e-9))])
    for metric, values in draws.items():
        low, high = np.quantile(values, [0.025, 0.975])
        width = high - low
        assert table.loc[metric, "low"] == pytest.approx(low, abs=0.2 * width)
        assert table.loc[metric, "high"] == pytest.approx(high, abs=0.2 * width)


def test_operating_point_by_hand() -> None:
    """Ten negatives 0..9 and three positives 4, 8.5, 20. At 10 % one negative (9) may be flagged: the threshold is 8."""
    score, positive = [*range(10), 4, 8.5, 20], [*[0] * 10, 1, 1, 1]
    table = detection_table(score, positive, range(13), fprs=(0.1, 0.05), n_resamples=30)
    found = table[table["fpr"] == 0.1].set_index("metric")
    assert found["value"].to_dict() == pytest.approx(
        {"threshold": 8, "tpr": 2 / 3, "specificity": 0.9, "lr_plus": 20 / 3}
    )
    assert found["n_allowed"].tolist() == [1] * 4
    none = table[table["fpr"] == 0.05].set_index("metric")
    assert none["n_allowed"].tolist() == [0] * 4
    assert none.loc["threshold", "value"] == 9
    assert none.loc["tpr", "value"] == pytest.approx(1 / 3)
    one = threshold_at_fpr(score, positive, range(13), 0.1, n_resamples=30)
    assert (one.value, one.n) == (8, 13)
    point = operating_point(score, positive, range(13), 8, n_resamples=30).set_index("metric")
    assert point["value"].to_dict() == pytest.approx(
        {"tpr": 2 / 3, "fpr": 0.1, "specificity": 0.9, "precision": 2 / 3, "lr_plus": 20 / 3}
    )
    assert (point["n_flagged"] == 3).all()


def test_floating_point_does_not_take_an_allowed_false_positive_away() -> None:
    """0.29 x 100 is 28.999999999999996, and 29 negatives may be flagged."""
    score, positive = [*range(100), 200], [*[0] * 100, 1]
    table = detection_table(score, positive, range(101), fprs=(0.29,), n_resamples=5).set_index("metric")
    assert table.loc["specificity", "value"] == pytest.approx(0.71)
    assert table.loc["threshold", "n_allowed"] == 29


# -- calibration --------------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand_and_curve_by_scikit_learn() -> None:
    """Two bins: mean probability .2 with half of them true, and .9 with half true: 2/4 x .3 + 2/4 x .4, whatever the sign."""
    found = expected_calibration_error([0.1, 0.3, 0.8, 1.0], [0, 1, 1, 0], range(4), n_bins=2, n_resamples=50)
    assert found.value == pytest.approx(0.35)
    rng = np.random.default_rng(0)
    probability = rng.random(500)
    positive = rng.random(500) < probability
    curve = calibration_curve(probability, positive, np.arange(500) // 5, n_bins=8, n_resamples=50)
    frequency, mean = sklearn_curve(positive, probability, n_bins=8)
    np.testing.assert_allclose(curve["frequency"], frequency)
    np.testing.assert_allclose(curve["probability"], mean)
    assert curve["n"].sum() == 500


def test_the_error_of_calibrated_probabilities_by_hand() -> None:
    """Bin of .2 and .4: sums 0, 1, 2 have .48, .44, .08 and lie .6, .4, 1.4 from .6. Bin of .9: .9 or .1 off. 3 items."""
    found = calibrated_error([0.2, 0.4, 0.9], n_bins=2, n_draws=4000)
    assert found.value == pytest.approx((0.48 * 0.6 + 0.44 * 0.4 + 0.08 * 1.4 + 2 * 0.9 * 0.1) / 3)
    many = np.random.default_rng(0).random(1001)
    drawn = [
        expected_calibration_error(
            many, np.random.default_rng(seed).random(1001) < many, range(1001), n_resamples=1
        ).value
        for seed in range(200)
    ]
    assert calibrated_error(many, n_draws=10).value == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 200**0.5)


def test_calibrated_probabilities_have_the_error_that_chance_gives_them() -> None:
    rng = np.random.default_rng(1)
    probability = rng.random(400)
    chance = calibrated_error(probability, n_draws=500)
    inside = []
    for _ in range(40):
        error = expected_calibration_error(
            probability, rng.random(400) < probability, np.arange(400), n_resamples=5
        ).value
        inside.append(chance.low <= error <= chance.high)
    assert np.mean(inside) > 0.85  # 34 of 40: below has a probability of 1 in 1,000 at 95 %
    wrong = expected_calibration_error(probability**3, rng.random(400) < probability, np.arange(400), n_resamples=50)
    assert wrong.low > calibrated_error(probability**3).high


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(InputError, match="both classes"):
        detection_table([1, 2], [1, 1], [0, 1])
    with pytest.raises(InputError, match="between 0 and 1"):
        detection_table([1, 2], [1, 0], [0, 1], fprs=(1.0,))
    with pytest.raises(InputError, match="probabilities lie in"):
        expected_calibration_error([0.2, 1.2], [1, 0], [0, 1])
    with pytest.raises(InputError, match="n_bins"):
        calibrated_error([0.2], n_bins=0)
    with pytest.raises(InputError, match="stratum of each item"):
        stratified_auroc([1, 2], [1, 0], [0], [0, 1])
    with pytest.raises(InputError, match="covariates"):
        adjusted_auroc([1, 2], [1, 0], [0, np.nan], [0, 1])

"""Statistics against hand-worked values, scipy's own implementations, and simulated coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slitlamp.errors import InputError, UnknownNameError
from slitlamp.evaluation import (
    Interval,
    benjamini_hochberg,
    cluster_bootstrap,
    cluster_means,
    cluster_sums,
    contrast_bootstrap,
    correlation_interval,
    exceedance_p,
    holm,
    mcnemar,
    paired_bootstrap,
    permutation_test,
)
from slitlamp.evaluation.statistics import INTERACTION, ratio


def share(sums):
    return ratio(sums[..., 0], sums[..., 1])


def counts(rng, n, rate=0.3):
    """Counts [n, 2]: events and trials of clusters that differ in size and in rate."""
    trials = rng.integers(1, 8, size=n)
    return np.stack([rng.binomial(trials, rng.beta(rate * 8, (1 - rate) * 8, size=n)), trials], axis=1)


def test_interval_prints_like_a_paper():
    assert str(Interval(0.2418, 0.2141, 0.2709, 10)) == ".242 [.214, .271]"
    assert str(Interval(-0.036, -0.06, 0.0101, 10)) == "-.036 [-.060, .010]"
    assert str(Interval(1.0, 0.9996, 12.25, 10)) == "1.000 [1.000, 12.250]"
    assert str(Interval(float("nan"), float("nan"), float("nan"), 0)) == "nan [nan, nan]"


def test_ratio_is_nan_where_there_is_nothing_to_divide_by():
    assert ratio([1, 0, 3], [2, 0, 0]).tolist()[0] == 0.5
    assert np.isnan(ratio([1, 0, 3], [2, 0, 0])[1:]).all()


def test_cluster_bootstrap_of_two_clusters_by_hand():
    # Resamples of clusters (0 of 1) and (1 of 1): both first 1/4, one each 1/2, both second 1/4; so the 2.5 % and
    # 97.5 % quantiles are 0 and 1, and the 30 % and 70 % ones are 1/2.
    sums = [[0, 1], [1, 1]]
    wide, narrow = cluster_bootstrap(sums, share), cluster_bootstrap(sums, share, level=0.4)
    assert (wide.value, wide.low, wide.high, wide.n) == (0.5, 0.0, 1.0, 2)
    assert (narrow.value, narrow.low, narrow.high) == (0.5, 0.5, 0.5)


def test_cluster_bootstrap_resamples_clusters_and_not_items():
    # Two hundred items in two clusters are two observations.
    assert cluster_bootstrap([[0, 100], [100, 100]], share).high == 1.0


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_cluster_bootstrap_agrees_with_scipy(method):
    data = counts(np.random.default_rng(5), 40, rate=0.12)
    ours = cluster_bootstrap(data, share, method=method, n_resamples=20_000, seed=1)
    theirs = stats.bootstrap(
        (data[:, 0], data[:, 1]),
        lambda x, y, axis=-1: x.sum(axis=axis) / y.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile" if method == "percentile" else "BCa",
        rng=np.random.default_rng(2),
    )
    # A quantile at q has the Monte Carlo error sqrt(q (1 - q) / B) / density: with B = 20000, q = .025 and a normal
    # density of .058 / s there, .019 s. Two independent runs differ by sqrt(2) of it; four of those are .11 s. The
    # ends of the BCa interval move with the estimated bias as well: twice that.
    allowed = (0.11 if method == "percentile" else 0.22) * theirs.standard_error
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=allowed)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=allowed)


def test_cluster_bootstrap_does_not_depend_on_the_chunks(monkeypatch):
    data = counts(np.random.default_rng(0), 30)
    whole = cluster_bootstrap(data, share)
    monkeypatch.setattr("slitlamp.evaluation.statistics._CHUNK_VALUES", 100)
    assert cluster_bootstrap(data, share) == whole


def test_cluster_bootstrap_of_several_values_is_that_of_each():
    data = counts(np.random.default_rng(0), 30)
    both = cluster_bootstrap(data, lambda sums: np.stack([share(sums), sums[..., 1] / 30], axis=-1), seed=3)
    assert both[0] == cluster_bootstrap(data, share, seed=3)
    assert both[1] == cluster_bootstrap(data, lambda sums: sums[..., 1] / 30, seed=3)


def test_sums_and_means_by_cluster_by_hand():
    values, cluster = np.array([[1.0, np.nan], [3.0, 5.0], [8.0, 7.0]]), np.array(["b", "a", "b"])
    assert cluster_sums(values[:, :1], cluster).tolist() == [[3.0], [9.0]]  # a, b
    first, second = cluster_means(values, cluster, seed=4)
    assert (first.value, second.value, first.n) == (4.0, 6.0, 2)
    # counts of what is known beside the sums: the second column of b holds one value
    assert first == cluster_bootstrap([[3, 1], [9, 2]], share, seed=4)
    assert second == cluster_bootstrap([[5, 1], [7, 1]], share, seed=4)
    none, some = cluster_means([[np.nan, 1.0], [np.nan, 3.0]], ["a", "b"], p_value=True)
    assert np.isnan([none.value, none.low, none.p]).all()
    assert (some.value, some.n) == (2.0, 2)
    (nothing,) = cluster_means(np.zeros((0, 1)), [])
    assert np.isnan(nothing.value)
    assert nothing.n == 0
    with pytest.raises(InputError, match="cluster of every item"):
        cluster_sums(values, cluster[:2])
    with pytest.raises(InputError, match=r"\[item, k\]"):
        cluster_means(values[:, 0], cluster)


def test_p_among_draws_by_hand():
    draws = np.array([0.1, 0.2, 0.3, 0.4])
    assert exceedance_p([0.5, 0.3, 0.0], draws).tolist() == [1 / 5, 3 / 5, 1.0]
    assert exceedance_p(0.1 + 0.2, np.array([0.3])) == 1.0  # equal up to rounding
    assert np.isnan(exceedance_p([np.nan, 1.0], [[0.1], [np.nan]])).all()
    assert np.isnan(exceedance_p(1.0, []))


def test_same_seed_same_interval_other_seed_another():
    data = counts(np.random.default_rng(0), 30)
    assert cluster_bootstrap(data, share, seed=1) == cluster_bootstrap(data, share, seed=1)
    assert cluster_bootstrap(data, share, seed=1) != cluster_bootstrap(data, share, seed=2)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_bootstrap_covers_at_its_nominal_level(method):
    rng = np.random.default_rng(11)
    experiments, clusters = 600, 60
    hits = 0
    for i in range(experiments):
        interval = cluster_bootstrap(counts(rng, clusters), share, n_resamples=400, seed=i, method=method)
        hits += interval.low <= 0.3 <= interval.high
    # Binomial error of the coverage: sqrt(.95 x .05 / 600) = .0089; three of them. On the lower side the percentile
    # interval itself is short: by sqrt((n - 1) / n), normal for t quantiles and 400 resamples, together below .01.
    assert 0.95 - 3 * 0.0089 - 0.01 <= hits / experiments <= 0.95 + 3 * 0.0089


def test_paired_bootstrap_rejects_a_true_null_at_its_level():
    rng = np.random.default_rng(12)
    experiments, rejected, covered = 600, 0, 0
    for i in range(experiments):
        a, b = counts(rng, 60), counts(rng, 60)
        interval = paired_bootstrap(a, b, share, n_resamples=400, seed=i)
        rejected += interval.p <= 0.05
        covered += interval.low <= 0 <= interval.high
    assert rejected / experiments <= 0.05 + 3 * 0.0089 + 0.01
    assert covered / experiments >= 0.95 - 3 * 0.0089 - 0.01


def test_undefined_statistics_are_nan_with_their_n():
    nothing = cluster_bootstrap([[0, 0], [0, 0]], share)
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()
    assert nothing.n == 2
    assert nothing.n_undefined == 2000
    alone = cluster_bootstrap([[1, 2]], share)
    assert alone.value == 0.5
    assert np.isnan([alone.low, alone.high]).all()
    # One cluster of two has trials: a quarter of the resamples misses it.
    rare = cluster_bootstrap([[1, 2], [0, 0]], share)
    assert (rare.value, rare.low, rare.high) == (0.5, 0.5, 0.5)
    assert rare.n_undefined == pytest.approx(500, abs=4 * np.sqrt(2000 * 0.25 * 0.75))


@pytest.mark.parametrize(
    ("sums", "arguments", "message"),
    [
        ([], {}, "at least one cluster"),
        ([1, 2], {}, r"\[cluster, k\]"),
        ([[np.nan, 1]], {}, "finite"),
        ([[1, 2]], {"level": 95}, "between 0 and 1"),
        ([[1, 2]], {"n_resamples": 0}, "at least 1"),
        ([[1, 2]], {"method": "bc"}, "bca"),
    ],
)
def test_bootstrap_refuses_bad_input(sums, arguments, message):
    with pytest.raises(InputError, match=message):
        cluster_bootstrap(sums, share, **arguments)


def test_paired_bootstrap_of_identical_conditions():
    data = counts(np.random.default_rng(0), 30)
    same = paired_bootstrap(data, data, share)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert not same.excludes_zero


def test_paired_bootstrap_is_antisymmetric_and_narrower_than_unpaired():
    rng = np.random.default_rng(3)
    a = counts(rng, 60)
    b = a.copy()
    b[:, 0] = np.maximum(b[:, 0] - (rng.random(60) < 0.4), 0)
    forward, backward = paired_bootstrap(a, b, share), paired_bootstrap(b, a, share)
    assert forward.value == -backward.value == pytest.approx(share(b.sum(0)) - share(a.sum(0)))
    assert forward.low == pytest.approx(-backward.high)
    assert forward.p == backward.p == 2 / 2001  # no resample at or above zero: (0 + 1) x 2 / (2000 + 1)
    assert forward.excludes_zero
    alone = cluster_bootstrap(a, share)
    assert forward.high - forward.low < alone.high - alone.low


def test_paired_bootstrap_refuses_other_clusters():
    with pytest.raises(InputError, match=r"\(2, 2\) and \(1, 2\)"):
        paired_bootstrap([[1, 2], [1, 2]], [[1, 2]], share)


def test_benjamini_hochberg_by_hand_and_against_scipy():
    # Ranks of .01, .02, .03, .5 give .04, .04, .04, .5 (n / rank times p, then the running minimum from the right).
    assert benjamini_hochberg([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.04, 0.5, 0.04, 0.04])
    p = np.random.default_rng(0).random((6, 8)) ** 2
    assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p.ravel()).reshape(6, 8))


def test_benjamini_hochberg_leaves_missing_tests_out():
    adjusted = benjamini_hochberg([0.01, np.nan, 0.5])
    assert adjusted[[0, 2]] == pytest.approx([0.02, 0.5])
    assert np.isnan(adjusted[1])
    with pytest.raises(InputError, match="none among 1"):
        benjamini_hochberg([np.nan])
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        benjamini_hochberg([0.5, 1.2])


def test_mcnemar_by_hand():
    # Discordant 1 against 5: two-sided exact p = 2 (C(6,0) + C(6,1)) / 64 = 14 / 64.
    a = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    b = [1, 1, 0, 1, 1, 1, 1, 1, 0, 0]
    result = mcnemar(a, b)
    assert (result.both, result.only_a, result.only_b, result.neither, result.n) == (2, 1, 5, 2, 10)
    assert result.p == pytest.approx(14 / 64)
    assert mcnemar([True, False], [True, False]).p == 1


@pytest.mark.parametrize(("a", "b"), [([], []), ([1], [1, 0]), ([2], [1]), ([np.nan], [1])])
def test_mcnemar_refuses_what_is_not_right_or_wrong(a, b):
    with pytest.raises(InputError, match="mcnemar"):
        mcnemar(a, b)


def test_pearson_interval_is_scipys():
    rng = np.random.default_rng(0)
    x = rng.normal(size=50)
    y = x + rng.normal(size=50)
    expected = stats.pearsonr(x, y)
    ours = correlation_interval(x, y, "pearson")
    assert (ours.value, ours.p, ours.n) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue), 50)
    assert (ours.low, ours.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_spearman_interval_covers():
    rng = np.random.default_rng(4)
    rho = 0.6
    true = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's correlation of a bivariate normal
    experiments, hits = 1000, 0
    for _ in range(experiments):
        x, y = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=60).T
        interval = correlation_interval(x, y)
        hits += interval.low <= true <= interval.high
    # Three binomial errors of sqrt(.95 x .05 / 1000) = .0069, and .01 for the approximation.
    assert abs(hits / experiments - 0.95) <= 3 * 0.0069 + 0.01


def test_correlation_of_degenerate_data():
    constant = correlation_interval([1, 1, 1, 1], [1, 2, 3, 4])
    assert np.isnan([constant.value, constant.low, constant.high, constant.p]).all()
    assert constant.n == 4
    few = correlation_interval([1, 2, 3], [1, 3, 2])
    assert few.value == pytest.approx(0.5)
    assert np.isnan(few.low)
    perfect = correlation_interval([1, 2, 3, 4, 5], [2, 4, 6, 8, 10])
    assert (perfect.low, perfect.high) == pytest.approx((1, 1))
    with pytest.raises(InputError, match="missing"):
        correlation_interval([1, np.nan], [1, 2])
    with pytest.raises(InputError, match="equally long"):
        correlation_interval([1, 2], [1, 2, 3])
    with pytest.raises(UnknownNameError, match="pearson"):
        correlation_interval([1, 2], [1, 2], "pearsn")


def test_paired_permutations_by_hand():
    # Three clusters, b better by 1 in each: of the eight swaps only none and all are as extreme; p = 2 / 8.
    result = permutation_test([[0, 1]] * 3, [[1, 1]] * 3, share)
    assert (result.value, result.p, result.n_permutations, result.exact) == (1.0, 0.25, 8, True)


def test_permutations_agree_with_scipy():
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(9, 1)), rng.normal(0.6, size=(9, 1))

    def mean(sums):
        return sums[..., 0] / 9

    exact = permutation_test(a, b, mean)
    theirs = stats.permutation_test(
        (a[:, 0], b[:, 0]), lambda x, y, axis: y.mean(axis) - x.mean(axis), permutation_type="samples", vectorized=True
    )
    assert exact.exact
    assert (exact.value, exact.p) == (pytest.approx(theirs.statistic), pytest.approx(theirs.pvalue))
    drawn = permutation_test(a, b, mean, n_permutations=500)
    # Four binomial errors of a p estimated from 500 permutations.
    assert drawn.p == pytest.approx(exact.p, abs=4 * np.sqrt(exact.p * (1 - exact.p) / 500) + 1 / 501)
    independent = permutation_test(a, b, mean, paired=False, n_permutations=4000)
    theirs = stats.permutation_test(
        (a[:, 0], b[:, 0]),
        lambda x, y, axis: y.mean(axis) - x.mean(axis),
        vectorized=True,
        n_resamples=4000,
        rng=np.random.default_rng(1),
    )
    assert not independent.exact
    assert independent.p == pytest.approx(theirs.pvalue, abs=4 * np.sqrt(2 * 0.25 / 4000))


def test_permutation_test_refuses_bad_input():
    with pytest.raises(InputError, match="matching counts"):
        permutation_test([[1, 2]], [[1, 2], [1, 2]], share)
    with pytest.raises(InputError, match="NaN"):
        permutation_test([[0, 0]], [[1, 1]], share)
    with pytest.raises(InputError, match="at least 1"):
        permutation_test([[1, 2]], [[1, 2]], share, n_permutations=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(5, 9)), min_size=2, max_size=12), st.randoms())
def test_interval_holds_the_value_and_ignores_the_order_of_clusters_in_distribution(data, random):
    interval = cluster_bootstrap(data, share, n_resamples=300)
    assert interval.value == pytest.approx(sum(x for x, _ in data) / sum(y for _, y in data))
    rates = [x / y for x, y in data]
    assert min(rates) - 1e-12 <= interval.low <= interval.high <= max(rates) + 1e-12
    shuffled = list(data)
    random.shuffle(shuffled)
    assert cluster_bootstrap(shuffled, share, n_resamples=300).value == pytest.approx(interval.value)


def test_a_contrast_of_two_is_the_paired_bootstrap_and_of_four_is_resampled_together():
    """Against a loop over resamples that are drawn as the library draws them; counts are those of a share."""
    rng = np.random.default_rng(3)
    four = [np.column_stack([rng.integers(0, 5, 40), rng.integers(5, 9, 40)]).astype(float) for _ in range(4)]

    assert contrast_bootstrap(four[:2], [-1, 1], share) == paired_bootstrap(*four[:2], share)
    found = contrast_bootstrap(four, INTERACTION, share, n_resamples=300, seed=5)
    assert isinstance(found, Interval)

    def interaction(weights):
        base, a, b, both = ((weights @ one)[0] / (weights @ one)[1] for one in four)
        return float((both - base) - (a - base) - (b - base))

    assert found.value == pytest.approx(interaction(np.ones(40)))
    weights = np.random.default_rng(5).multinomial(40, np.full(40, 1 / 40), size=300)
    draws = [interaction(one) for one in weights.astype(float)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    beyond = min(sum(one <= 0 for one in draws), sum(one >= 0 for one in draws))
    assert found.p == pytest.approx(min(1.0, 2 * (beyond + 1) / 301))
    assert found.n == 40


def test_two_changes_that_add_up_have_no_interaction_in_any_resample():
    rng = np.random.default_rng(1)
    base, a, b = (rng.integers(0, 9, (25, 1)).astype(float) for _ in range(3))
    found = contrast_bootstrap([base, a, b, a + b - base], INTERACTION, lambda sums: sums[..., 0])
    assert found == Interval(0.0, 0.0, 0.0, 25, p=1.0)


def test_wrong_contrasts():
    counts = np.ones((3, 2))
    with pytest.raises(InputError, match=r"found shapes \(3, 2\) and \(4, 2\)"):
        contrast_bootstrap([counts, np.ones((4, 2))], [1, -1], lambda sums: sums[..., 0])
    with pytest.raises(InputError, match="found 3 weights for 2 conditions"):
        contrast_bootstrap([counts, counts], [1, -1, 1], lambda sums: sums[..., 0])


def test_holm_by_hand():
    """Three tests: .01 x 3, .02 x 2, .04 x 1, none less than one before it; NaN is no test."""
    assert holm([0.04, np.nan, 0.01, 0.02]) == pytest.approx([0.04, np.nan, 0.03, 0.04], nan_ok=True)
    assert holm([0.5, 0.6]) == pytest.approx([1, 1])
    assert holm([[0.01], [0.2]]) == pytest.approx(np.array([[0.02], [0.2]]))
    assert np.isnan(holm([np.nan])).all()
    assert holm([]).shape == (0,)
    with pytest.raises(InputError, match="lie in"):
        holm([0.5, 1.5])


def test_holm_rejects_what_the_step_down_procedure_does():
    """At every level, one after the other from the least p: reject while p <= alpha / (number left)."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, alpha = rng.beta(0.3, 2, 12), rng.uniform(0.001, 0.3)
        rejected = set()
        for step, index in enumerate(np.argsort(p)):
            if p[index] > alpha / (12 - step):
                break
            rejected.add(int(index))
        assert set(np.flatnonzero(holm(p) <= alpha).tolist()) == rejected

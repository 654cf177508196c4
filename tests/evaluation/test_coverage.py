"""Do 95 % intervals hold the truth 95 times in 100, and do tests err as often as they say? By simulation, clustered data.

Every simulation has 60 images of 5 items that share an image effect, so that items are not independent. Truths are the
means of 12 data sets of 400 images. A rate is accepted where a binomial count with the nominal rate would lie with
probability 99.8 %; a bootstrap of 60 clusters is some points below nominal (its quantiles are those of a finite sample),
which is allowed for by two points.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats

from slitlamp.evaluation.detection import adjusted_auroc, auroc_difference, auroc_interval, stratified_auroc
from slitlamp.evaluation.operating_points import (
    calibration_curve,
    detection_table,
    expected_calibration_error,
    operating_point,
)
from slitlamp.evaluation.permutation import permutation_test
from slitlamp.evaluation.statistics import (
    benjamini_hochberg,
    cluster_bootstrap,
    correlation_interval,
    mcnemar,
    paired_bootstrap,
    ratio,
)

IMAGES, PER_IMAGE, RUNS, RESAMPLES = 60, 5, 200, 200
FPR, THRESHOLD = 0.2, 1.0


def holds(hits: int, runs: int = RUNS, rate: float = 0.95, slack: float = 0.02) -> bool:
    low, high = stats.binom.ppf([0.001, 0.999], runs, [rate - slack, rate])
    return bool(low <= hits <= high)


def errs_no_more(errors: int, runs: int, rate: float = 0.05) -> bool:
    return bool(errors <= stats.binom.ppf(0.999, runs, rate))


def items(seed: int, images: int = IMAGES) -> dict[str, Any]:
    """A covariate that raises score and odds, a second, noisier score, and probabilities that are off by half."""
    rng = np.random.default_rng(seed)
    n = images * PER_IMAGE
    cluster = np.repeat(np.arange(images), PER_IMAGE)
    shared = rng.normal(size=images)[cluster]
    covariate = rng.integers(0, 3, n)
    odds = 0.8 * shared + 0.7 * (covariate - 1) - 0.3
    positive = rng.random(n) < 1 / (1 + np.exp(-odds))
    score = positive + 0.5 * shared + 0.4 * covariate + rng.normal(size=n)
    return {
        "cluster": cluster,
        "covariate": covariate,
        "positive": positive,
        "score": score,
        "other": score + rng.normal(size=n),
        "probability": 1 / (1 + np.exp(-2 * odds)),
    }


Estimates = dict[str, tuple[float, float, float]]


def areas(data: dict[str, Any], n: int) -> Estimates:
    score, positive, cluster = data["score"], data["positive"], data["cluster"]
    found = {
        "auroc": auroc_interval(score, positive, cluster, n_resamples=n),
        "difference": auroc_difference(data["other"], score, positive, cluster, n_resamples=n),
        "stratified": stratified_auroc(score, positive, data["covariate"], cluster, n_resamples=n),
        "adjusted": adjusted_auroc(score, positive, data["covariate"], cluster, n_resamples=n),
    }
    return {name: (one.value, one.low, one.high) for name, one in found.items()}


def points(data: dict[str, Any], n: int) -> Estimates:
    score, positive, cluster = data["score"], data["positive"], data["cluster"]
    table = detection_table(score, positive, cluster, fprs=(FPR,), n_resamples=n)
    point = operating_point(score, positive, cluster, THRESHOLD, n_resamples=n)
    curve = calibration_curve(data["probability"], positive, cluster, n_bins=3, n_resamples=n)
    error = expected_calibration_error(data["probability"], positive, cluster, n_bins=5, n_resamples=n)
    # the specificity is fixed by the rate, up to one negative: it has no truth of its own
    estimated = table[table["metric"] != "specificity"]
    found = {f"at FPR: {row.metric}": (row.value, row.low, row.high) for row in estimated.itertuples()}
    found |= {f"at threshold: {row.metric}": (row.value, row.low, row.high) for row in point.itertuples()}
    found |= {f"calibration, bin {row.bin}": (row.frequency, row.low, row.high) for row in curve.itertuples()}
    return found | {"ece": (error.value, error.low, error.high)}


def rates(data: dict[str, Any], n: int) -> Estimates:
    """Shares and a difference of shares by the general bootstraps."""
    places, size = data["cluster"], int(data["cluster"].max()) + 1
    flagged = data["score"] > THRESHOLD
    sums = [
        np.column_stack([np.bincount(places, one & data["positive"], size), np.bincount(places, one, size)])
        for one in (flagged, data["other"] > THRESHOLD)
    ]

    def share(total: Any) -> Any:
        return ratio(total[..., 0], total[..., 1])

    found = {
        "percentile": cluster_bootstrap(sums[0], share, n_resamples=n),
        "bca": cluster_bootstrap(sums[0], share, n_resamples=n, method="bca"),
        "paired": paired_bootstrap(*sums, share, n_resamples=n),
        "paired bca": paired_bootstrap(*sums, share, n_resamples=n, method="bca"),
    }
    return {name: (one.value, one.low, one.high) for name, one in found.items()}  # type: ignore[union-attr]


@cache
def truth(estimate: Callable[[dict[str, Any], int], Estimates]) -> dict[str, float]:
    """Mean of estimates from large data sets."""
    large = [estimate(items(10_000 + seed, 400), 1) for seed in range(12)]
    return {name: float(np.mean([one[name][0] for one in large])) for name in large[0]}


@pytest.mark.parametrize("estimate", [areas, points, rates])
def test_intervals_hold_the_truth(estimate: Callable[[dict[str, Any], int], Estimates]) -> None:
    wanted = truth(estimate)
    hits = dict.fromkeys(wanted, 0)
    for seed in range(RUNS):
        for name, (_, low, high) in estimate(items(seed), RESAMPLES).items():
            hits[name] += low <= wanted[name] <= high
    assert {name: count for name, count in hits.items() if not holds(count)} == {}


@pytest.mark.parametrize("method", ["pearson", "spearman"])
@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_correlation_intervals_hold_the_truth(method: Any, rho: float) -> None:
    """Spearman's of a bivariate normal is 6 / pi arcsin(rho / 2)."""
    rng = np.random.default_rng(3)
    wanted = rho if method == "pearson" else 6 / np.pi * np.arcsin(rho / 2)
    hits = errors = 0
    for _ in range(400):
        x, noise = rng.normal(size=(2, 40))
        found = correlation_interval(x, rho * x + np.sqrt(1 - rho**2) * noise, method)
        hits += found.low <= wanted <= found.high
        assert found.p is not None
        errors += found.p <= 0.05
    assert holds(hits, 400)
    if rho == 0:
        assert errs_no_more(errors, 400)


def flat(seed: int) -> tuple[Any, Any]:
    """Counts (right, asked) of two conditions with no difference: answers share the image's difficulty, and each other."""
    rng = np.random.default_rng(seed)
    ease = 1 / (1 + np.exp(-rng.normal(size=(40, 1))))
    one, other = (rng.random((40, PER_IMAGE)) < ease for _ in range(2))
    return tuple(np.column_stack([side.sum(axis=1), np.full(40, PER_IMAGE)]) for side in (one, other))  # type: ignore[return-value]


def share(total: Any) -> Any:
    return ratio(total[..., 0], total[..., 1])


@pytest.mark.parametrize("paired", [True, False])
def test_permutation_tests_err_at_their_rate(paired: bool) -> None:
    p = []
    for seed in range(RUNS):
        one, other = flat(seed)
        if not paired:
            other = flat(1000 + seed)[1]
        p.append(permutation_test(one, other, share, paired=paired, n_permutations=199).p)
    assert errs_no_more(int(np.sum(np.array(p) <= 0.05)), RUNS)
    assert np.mean(np.array(p) <= 0.5) > 0.35  # nor is it a test that never rejects


def test_paired_bootstrap_p_values_err_at_about_their_rate() -> None:
    """The bootstrap's p is approximate: two points more than nominal are allowed for, as for the intervals."""
    p = [paired_bootstrap(*flat(seed), share, n_resamples=RESAMPLES).p for seed in range(RUNS)]  # type: ignore[union-attr]
    errors = int(np.sum(np.array(p, dtype=float) <= 0.05))
    assert errs_no_more(errors, RUNS, 0.07)
    assert errors >= 1


def test_auroc_differences_err_at_about_their_rate() -> None:
    errors = 0
    for seed in range(RUNS):
        data = items(seed)
        first, second = np.random.default_rng([seed, 1]).normal(size=(2, len(data["score"])))
        found = auroc_difference(
            data["score"] + first, data["score"] + second, data["positive"], data["cluster"], n_resamples=RESAMPLES
        )
        assert found.p is not None
        errors += found.p <= 0.05
    assert errs_no_more(errors, RUNS, 0.07)


def test_mcnemar_errs_no_more_than_it_says_on_independent_items() -> None:
    rng = np.random.default_rng(5)
    p = [mcnemar(*(rng.random((2, 100)) < 0.7)).p for _ in range(1000)]
    assert errs_no_more(int(np.sum(np.array(p) <= 0.05)), 1000)


def test_benjamini_hochberg_keeps_the_false_discovery_rate() -> None:
    """60 nulls and 20 effects: the mean share of false ones among discoveries is at most .1 x 60 / 80, and it finds effects.

    Over 500 runs the standard error of that mean is about .003.
    """
    rng = np.random.default_rng(6)
    shares, found = [], []
    for _ in range(500):
        z = rng.normal(size=80)
        z[60:] += 3
        chosen = benjamini_hochberg(2 * stats.norm.sf(np.abs(z))) <= 0.1
        shares.append(chosen[:60].sum() / max(1, chosen.sum()))
        found.append(chosen[60:].mean())
    assert np.mean(shares) <= 0.1 * 60 / 80 + 0.01
    assert np.mean(shares) > 0.04
    assert np.mean(found) > 0.5


def test_the_check_itself_can_fail() -> None:
    """Intervals that treat the items of an image as independent hold the truth far too seldom."""
    hits = 0
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        values = np.repeat(rng.normal(size=IMAGES), PER_IMAGE) + 0.3 * rng.normal(size=IMAGES * PER_IMAGE)
        naive = cluster_bootstrap(values[:, None], lambda total: total[..., 0], n_resamples=RESAMPLES)
        assert not isinstance(naive, list)
        hits += naive.low <= 0 <= naive.high
    assert not holds(hits)

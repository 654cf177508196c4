"""Definitions of outliers by hand, against simulation, and where there is nothing to find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from probes.outlier_definitions import (
    bin_edges,
    expected_jaccard,
    massive_activations,
    matched_tokens,
    norm_histogram,
    norm_outliers,
    norm_valley,
    random_tokens,
    sink_score,
    top_tokens,
)


def test_top_tokens_by_hand() -> None:
    assert top_tokens(torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.0, 0.8]]), 2).tolist() == [
        [False, True, True],
        [True, False, True],
    ]
    assert top_tokens(torch.tensor([1.0, 2.0]), 5).all()


def test_norm_rule_by_hand() -> None:
    """Nine norms of 1 and one of 11: mean 2, sd 3, so that 11 lies above 8; with a limit of 4 sd it does not."""
    norms = torch.tensor([1.0] * 9 + [11.0])
    assert norm_outliers(norms).tolist() == [False] * 9 + [True]
    assert not norm_outliers(norms, 4.0).any()


def test_norm_rule_marks_its_stated_share_of_gaussian_norms() -> None:
    """Where nothing stands out: 2.28 % of many; with 10^6 draws the standard error is 0.015 %."""
    norms = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).double() + 30
    assert float(norm_outliers(norms).double().mean()) == pytest.approx(norm.sf(2), abs=6e-4)


def test_sink_score_by_hand() -> None:
    """RMS of (3, 4, 0, 0) is 2.5: phi is 1.2 for dimension 0, 1.6 for 0 and 1; a zero state has none."""
    states = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert sink_score(states, torch.tensor([0])).tolist() == pytest.approx([1.2, 0.0])
    assert sink_score(states, torch.tensor([0, 1])).tolist() == pytest.approx([1.6, 0.0])


def test_massive_activations_need_both_limits() -> None:
    states = torch.full((50, 20), 0.1)
    states[3, 7] = -150.0
    found = massive_activations(states)
    assert (found.largest, found.position, found.dimension) == (150.0, 3, 7)
    assert found.median == pytest.approx(0.1)
    assert found.dimensions.nonzero().flatten().tolist() == [7]
    assert not massive_activations(states * 10, value=1e4).dimensions.any()  # 1500 is 1500 x the median, but below 10^4
    assert not massive_activations(states + 1).dimensions.any()  # 149 is above 100, but not 1000 x 1.1


def test_histogram_counts_every_norm_once_in_its_bin() -> None:
    norms = torch.tensor([[0.0, 1.0, 1.5, 3.9], [1e9, 2.0, 2.0, 2.0]])
    counts = norm_histogram(norms)
    assert counts.sum(axis=1).tolist() == [4, 4]
    edges = bin_edges()
    inside = (edges[:-1] <= 1.5) & (edges[1:] > 1.5)
    assert counts[0, inside].tolist() == [1]
    assert counts[0, 0] == 1  # 0 in the first
    assert counts[1, -1] == 1  # what is too large in the last
    assert counts[1, (edges[:-1] <= 2.0) & (edges[1:] > 2.0)].tolist() == [3]


def valley_of(norms: np.ndarray) -> float:
    return norm_valley(norm_histogram(torch.from_numpy(norms)))


@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
def test_the_valley_of_two_planted_modes_parts_them(share: float) -> None:
    rng = np.random.default_rng(0)
    high = int(4000 * share)
    norms = np.concatenate([rng.normal(40, 4, 4000 - high), rng.normal(200, 25, high)])
    valley = valley_of(norms)
    assert 50 < valley < 150
    assert int((norms > valley).sum()) == pytest.approx(high, abs=2)


@pytest.mark.parametrize("kind", ["normal", "log-normal", "exponential tail", "uniform"])
@pytest.mark.parametrize("n", [64, 640, 6400])
def test_one_mode_has_no_valley(kind: str, n: int) -> None:
    """False valleys in at most 5 % of 100 unimodal samples."""
    rng = np.random.default_rng(n)
    draw = {
        "normal": lambda: np.abs(rng.normal(30, 4, n)),
        "log-normal": lambda: rng.lognormal(3, 0.4, n),
        "exponential tail": lambda: 20 + rng.exponential(6, n),
        "uniform": lambda: rng.uniform(10, 40, n),
    }[kind]
    assert sum(np.isfinite(valley_of(draw())) for _ in range(100)) <= 5


def test_too_few_norms_have_no_valley() -> None:
    assert np.isnan(valley_of(np.array([1.0, 2.0, 100.0])))
    assert np.isnan(norm_valley(np.zeros_like(norm_histogram(torch.ones(1)))))
    assert np.isnan(valley_of(np.full(100, 3.0)))


def test_chance_level_of_the_jaccard_index_is_that_of_a_simulation() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        a, b = random_tokens(20, 5, rng), random_tokens(20, 8, rng)
        found.append((a & b).sum() / (a | b).sum())
    assert expected_jaccard(5, 8, 20) == pytest.approx(np.mean(found), abs=4 * np.std(found) / 4000**0.5)
    assert expected_jaccard(20, 20, 20) == pytest.approx(1)
    assert np.isnan(expected_jaccard(0, 0, 20))


def test_matched_tokens_are_others_of_the_nearest_value() -> None:
    values = [0.9, 0.1, 0.85, 0.5, 0.12]
    chosen = [True, True, False, False, False]
    assert matched_tokens(values, chosen).tolist() == [False, False, True, False, True]
    assert matched_tokens(values, [True] * 5).sum() == 0


def test_random_tokens_avoid_what_they_can() -> None:
    rng = np.random.default_rng(0)
    avoid = np.arange(10) < 4
    assert not (random_tokens(10, 6, rng, avoid) & avoid).any()
    assert random_tokens(10, 7, rng, avoid).sum() == 7  # not enough others

"""The formulas of IMA against loops, scipy and scikit-learn, and their intervals against repeated sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.stats import entropy
from sklearn.preprocessing import StandardScaler

from probes.alignment_grid import (
    REDUCTIONS,
    bucket_sums,
    grid_intervals,
    mean_intervals,
    pooled_cosines,
    token_cosines,
    unit,
    whole_grid,
)
from probes.alignment_space import Space, massive
from probes.alignment_states import item_hash, measure, token_slots
from probes.alignment_vocabulary import divergence, pooled


def test_reductions_equal_a_loop_over_tokens() -> None:
    rng = np.random.default_rng(0)
    counts_a, counts_b = [3, 1, 4], [2, 5]
    first, second = rng.normal(size=(3, 4, 6)), rng.normal(size=(2, 5, 6))
    mask_a = np.arange(4) < np.array(counts_a)[:, None]
    mask_b = np.arange(5) < np.array(counts_b)[:, None]
    found = token_cosines(first, second, mask_a, mask_b)
    assert list(found) == list(REDUCTIONS)
    for i, n in enumerate(counts_a):
        for j, m in enumerate(counts_b):
            grid = np.array([[1 - cosine(first[i, s], second[j, t]) for t in range(m)] for s in range(n)])
            expected = {
                "avg": 1 - cosine(first[i, :n].mean(axis=0), second[j, :m].mean(axis=0)),
                "mean": grid.mean(),
                "median": np.median(grid),
                "max": grid.max(),
                "min": grid.min(),
                "max_mean": grid.max(axis=1).mean(),
            }
            for name, value in expected.items():
                # blocks of cosines are float32: 24 bits of mantissa, sums of six products
                assert found[name][i, j] == pytest.approx(value, abs=1e-6), name  # type: ignore[index]


def test_mean_and_spread_of_a_grid_follow_from_sums_over_examples() -> None:
    """What makes `avg` and `mean` exact for any number of examples: no grid is needed for either moment."""
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(20, 5)) + 1, rng.normal(size=(30, 5))
    grid = pooled_cosines(first, second)
    a, b = unit(first), unit(second)
    assert grid.mean() == pytest.approx(a.mean(axis=0) @ b.mean(axis=0), abs=1e-12)
    second_moment = np.trace((a.T @ a / len(a)) @ (b.T @ b / len(b)))
    assert grid.var() == pytest.approx(second_moment - grid.mean() ** 2, abs=1e-12)


def test_whole_grid_has_the_intervals_of_the_grid_itself() -> None:
    """With a bucket for every example, sums of unit vectors give what the cosines of all pairs give."""
    rng = np.random.default_rng(8)
    states = rng.normal(size=(30, 2, 1, 6)).astype(np.float32) + np.eye(6, dtype=np.float32)[0]
    sums = bucket_sums(states, np.zeros_like(states), np.arange(30), 31)
    counts = np.append(np.ones(30), 0)
    found = whole_grid(sums, counts, n_resamples=500, seed=0).iloc[0]
    grid = pooled_cosines(states[:, 0, 0], states[:, 1, 0])[None]
    names = np.array([f"{n:02d}" for n in range(30)])
    expected = grid_intervals(grid, names, names, paired=True, n_resamples=500, seed=0).iloc[0]
    for column in ("value", "low", "high"):
        assert found[column] == pytest.approx(expected[column], abs=1e-9)
    assert found["n_buckets"] == 30


def test_the_zero_vector_has_cosine_zero() -> None:
    assert pooled_cosines(np.zeros((1, 3)), np.ones((1, 3))).tolist() == [[0.0]]


def test_pairs_of_one_group_are_neither_matched_nor_mismatched() -> None:
    rng = np.random.default_rng(2)
    grid = rng.normal(size=(5, 5))
    groups = np.array(["a", "a", "b", "b", "c"])
    row = grid_intervals(grid[None], groups, groups, paired=True, n_resamples=200, seed=0).iloc[0]
    other = groups[:, None] != groups[None]
    assert row["value"] == pytest.approx(grid.mean())
    assert row["sd"] == pytest.approx(grid.std())
    assert row["matched"] == pytest.approx(np.diag(grid).mean())
    assert row["mismatched"] == pytest.approx(grid[other].mean())
    assert row["difference"] == pytest.approx(np.diag(grid).mean() - grid[other].mean())
    assert row["n_groups"] == 3
    unpaired = grid_intervals(grid[None, :2], groups[:2], groups, paired=False, n_resamples=200, seed=0).iloc[0]
    assert np.isnan(unpaired["matched"])
    assert unpaired["mismatched"] == pytest.approx(grid[:2, 2:].mean())


def test_interval_of_a_grid_equals_resampling_the_examples() -> None:
    """Against the bootstrap that it stands for: draw examples, take the grid of those drawn, leave out pairs of one example."""
    rng = np.random.default_rng(3)
    shared = np.eye(8)[0]
    first, second = (rng.normal(size=(60, 8)) + 1.5 * shared for _ in range(2))
    grid = pooled_cosines(first, second)
    names = np.arange(60).astype(str)
    row = grid_intervals(grid[None], names, names, paired=True, n_resamples=4000, seed=0).iloc[0]
    draws = []
    for _ in range(2000):
        chosen = rng.integers(0, 60, 60)
        apart = chosen[:, None] != chosen[None]
        draws.append(grid[np.ix_(chosen, chosen)][apart].mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    # the two ends of 2000 and 4000 draws vary by about 3 % of the width
    assert row["mismatched_high"] - row["mismatched_low"] == pytest.approx(high - low, rel=0.12)
    assert row["mismatched_low"] == pytest.approx(low, abs=0.12 * (high - low))
    wrong = grid.std() / 60 * 2 * 1.96  # what pairs taken as independent would give
    assert high - low > 1.5 * wrong


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """A planted common component: the mean cosine of all pairs of the population, found from 200 000 of them."""
    rng = np.random.default_rng(4)

    def states(n: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        return rng.normal(size=(n, 8)) + np.eye(8)[0]

    truth = np.einsum("nd,nd->n", unit(states(200_000)), unit(states(200_000))).mean()
    names = np.arange(40).astype(str)
    missed = 0
    for seed in range(100):
        grid = pooled_cosines(states(40), states(40))
        row = grid_intervals(grid[None], names, names, paired=True, n_resamples=300, seed=seed).iloc[0]
        missed += not row["low"] <= truth <= row["high"]
    assert missed <= 12  # 5 expected; 13 or more has p < .001 even at a true rate of 5 %


def test_unrelated_images_and_texts_have_no_difference_between_matched_and_mismatched() -> None:
    """The null: 95 % intervals of matched minus mismatched miss zero about 5 times in 100; a common mean is no alignment."""
    rng = np.random.default_rng(5)
    names = np.arange(40).astype(str)
    missed = 0
    for seed in range(100):
        first, second = (rng.normal(size=(40, 8)) + 2 * np.eye(8)[0] for _ in range(2))
        row = grid_intervals(
            pooled_cosines(first, second)[None], names, names, paired=True, n_resamples=300, seed=seed
        ).iloc[0]
        assert row["value"] > 0.1
        missed += not row["difference_low"] <= 0 <= row["difference_high"]
    assert missed <= 12


def test_means_skip_missing_values_and_count_the_rest() -> None:
    table = mean_intervals(np.array([[1.0, np.nan], [3.0, 5.0]]), np.array(["a", "b"]), n_resamples=50, seed=0)
    assert table["value"].tolist() == [2.0, 5.0]
    assert table["n_items"].tolist() == [2, 1]


def test_massive_activations_by_hand() -> None:
    state = torch.full((5,), 0.2)
    assert not massive(state).any()
    state[3] = 150.0
    assert massive(state).tolist() == [False, False, False, False, False]  # 750 times the median
    state[3] = 250.0
    assert massive(state).tolist() == [False, False, False, True, False]
    assert not massive(torch.tensor([0.01, 0.01, 50.0])).any()  # 5000 times the median, but below 100


def test_joint_standardisation_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(6)
    image, text = rng.normal(size=(50, 3)) * [1, 10, 0.1] + 3, rng.normal(size=(50, 3)) - 1
    moments = np.array(
        [[[one.mean(axis=0)] for one in (image, text)], [[(one**2).mean(axis=0)] for one in (image, text)]]
    )
    counts = np.zeros((1, 3))
    space = Space.of(moments, counts, 1, None, "joint")
    expected = StandardScaler().fit(np.vstack([image, text])).transform(text)
    np.testing.assert_allclose(space.apply(text, 1, 0, "standardised"), expected, atol=1e-10)
    own = Space.of(moments, counts, 1, None, "modality").apply(text, 1, 0, "standardised")
    np.testing.assert_allclose(own, StandardScaler().fit_transform(text), atol=1e-10)
    scaled = Space.of(moments, counts, 1, None, "scale").apply(text, 1, 0, "standardised")
    np.testing.assert_allclose(scaled, text / StandardScaler().fit(np.vstack([image, text])).scale_, atol=1e-10)
    top = Space.of(moments, counts, 1, 1, "joint")
    assert top.removed.tolist() == [[False, True, False]]
    assert (top.apply(text, 1, 0, "removed")[:, 1] == 0).all()


def test_what_is_kept_of_states_by_hand() -> None:
    """Two layers, one row, three image tokens (one padding) and two text tokens."""
    first = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    second = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [1.0, 1.0], [0.0, -2.0], [9.0, 9.0]]])
    masks = torch.tensor([[[True, True, False, False, False]], [[False, False, True, True, False]]])
    found = measure([first, second], masks, [1])
    np.testing.assert_allclose(found.pooled[0, :, 0], [[1.5, 2.5], [0.5, 1.0]])
    np.testing.assert_allclose(found.norm[0, :, 0], [3.0, 1.5])  # medians of 5, 1 and of 1, 2
    np.testing.assert_allclose(found.change[0, 0, :, 0], [0.5, (0.5**0.5 - 1) / 2], atol=1e-7)
    assert np.isnan(found.change[0, 0, :, 1]).all()
    np.testing.assert_allclose(found.moments[1, 0, 0], [4.5, 8.5])


def test_distributions_by_scipy() -> None:
    rng = np.random.default_rng(7)
    p, q = (rng.dirichlet(np.ones(6), size=4) for _ in range(2))
    one, other = (pooled(torch.from_numpy(np.log(each))) for each in (p, q))
    np.testing.assert_allclose(one.exp().numpy(), p.mean(axis=0), atol=1e-12)
    assert divergence(one, other) == pytest.approx(entropy(p.mean(axis=0), q.mean(axis=0)), abs=1e-12)
    assert divergence(one, one) == 0.0


def test_kept_tokens_are_drawn_by_name_alone() -> None:
    masks = torch.ones(2, 3, 50, dtype=torch.bool)
    together = token_slots(masks, ["a", "b", "c"], 7, seed=0)
    alone = token_slots(masks[:, :1], ["b"], 7, seed=0)
    np.testing.assert_array_equal(together[1], alone[0])
    assert (np.diff(together, axis=2) > 0).all()
    assert not np.array_equal(together[0], together[1])
    assert item_hash(0, "a") != item_hash(1, "a")

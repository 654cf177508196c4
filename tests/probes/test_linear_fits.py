"""Cross-validated linear fits against scikit-learn, planted directions, and nulls."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from probes import linear_fits
from probes.linear_fits import (
    Folds,
    MlpOptions,
    auroc,
    cross_validated,
    difference_of_means,
    fit_logistic,
    grouped_folds,
)
from probes.logistic_solver import Problem
from slitlamp.errors import InputError, UnknownNameError


def planted(n: int, d: int, seed: int = 0, strength: float = 2.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Correlated features of unequal mean and size, labels that follow one direction, three samples to a group."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=rng, dtype=torch.float64) / d**0.5 + torch.eye(d, dtype=torch.float64)
    x = torch.randn(n, d, generator=rng, dtype=torch.float64) @ mix
    x = x * torch.logspace(-1, 1, d, dtype=torch.float64) + torch.randn(d, generator=rng, dtype=torch.float64) * 3
    direction = torch.randn(d, generator=rng, dtype=torch.float64) / x.std(dim=0)
    score = x @ direction
    score = (score - score.mean()) / score.std()
    y = torch.rand(n, generator=rng, dtype=torch.float64) < torch.sigmoid(strength * score)
    return x, y, torch.arange(n) // 3, direction


def sklearn_fit(x: Any, y: Any, strength: float) -> Any:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / strength, tol=1e-10, max_iter=20_000))
    return model.fit(np.asarray(x), np.asarray(y))


# -- against scikit-learn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(240, 12), (60, 90)])
def test_coefficients_equal_scikit_learn(n: int, d: int) -> None:
    """Every fold and penalty, also with more features than samples. Ours stop at a gradient of 1e-10 of the mean loss.

    The loss bends by at least lambda / n, so they are within 1e-10 n / lambda, 2e-7, of the solution. scikit-learn's end
    where the loss no longer falls in float64, some 1e-6 from it.
    """
    x, y, groups, _ = planted(n, d)
    folds, strengths = grouped_folds(groups, y, 4), (0.1, 1.0, 30.0)
    found = fit_logistic(x, y, folds, strengths, tol=1e-10)
    assert found.converged.all()
    for fold, rows in enumerate(folds.train):
        for place, strength in enumerate(strengths):
            model = sklearn_fit(x[rows], y[rows], strength)
            ours = found.coefficients[0, fold, place] * found.scaling.scale[fold]
            np.testing.assert_allclose(ours.numpy(), model[-1].coef_[0], atol=1e-5)
            score = model.decision_function(x.numpy())
            np.testing.assert_allclose(found.scores(x)[0, fold, place].numpy(), score, atol=1e-4)


def test_without_standardisation_it_is_plain_logistic_regression() -> None:
    x, y, _, _ = planted(150, 5)
    found = fit_logistic(x, y, None, [2.0], standardise=False, tol=1e-10)
    model = LogisticRegression(C=0.5, tol=1e-10, max_iter=20_000).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(found.coefficients[0, 0, 0].numpy(), model.coef_[0], atol=1e-6)
    assert found.intercept.item() == pytest.approx(model.intercept_[0], abs=1e-5)


def test_float32_at_default_tolerance_has_the_same_auroc() -> None:
    """The default tolerance is scikit-learn's; what it leaves open moves an AUROC by far less than its interval."""
    x, y, groups, _ = planted(900, 40)
    folds = grouped_folds(groups, y)
    found = fit_logistic(x.float(), y, folds)
    assert found.converged.all()
    for fold, rows in enumerate(folds.test):
        for place, strength in enumerate(found.strengths.tolist()):
            score = sklearn_fit(x[~rows], y[~rows], strength).decision_function(x[rows].numpy())
            ours = found.scores(x[rows])[0, fold, place]
            assert roc_auc_score(y[rows], ours) == pytest.approx(roc_auc_score(y[rows], score), abs=0.005)


def test_the_penalty_is_chosen_inside_the_training_fold_as_a_loop_would() -> None:
    x, y, groups, _ = planted(210, 20, strength=1.0)
    strengths = tuple(np.logspace(0, 3, 7).tolist())
    found = cross_validated([x], y, groups, strengths=strengths, n_folds=4, tol=1e-9)
    test = found.folds.test.numpy()
    losses = np.full((4, 4, len(strengths)), np.nan)  # [left out, tested on, penalty]
    for f, g in combinations(range(4), 2):
        rows = ~(test[f] | test[g])
        for place, strength in enumerate(strengths):
            model = sklearn_fit(x[rows], y[rows], strength)
            for out, on in ((f, g), (g, f)):
                losses[out, on, place] = log_loss(y[test[on]], model.predict_proba(x[test[on]].numpy())[:, 1])
    chosen = np.array(strengths)[np.nanmean(losses, axis=1).argmin(axis=1)]
    own = np.array(strengths)[np.nanmean(losses, axis=0).argmin(axis=1)]  # of losses on the fold itself: a leak
    assert (own != chosen).any()
    assert len(set(chosen)) > 1
    assert found.strengths[0].tolist() == pytest.approx(chosen.tolist())
    assert found.final_strengths.item() == pytest.approx(strengths[np.nansum(losses, axis=(0, 1)).argmin()])
    probabilities = np.empty(len(y))
    for f in range(4):
        model = sklearn_fit(x[~test[f]], y[~test[f]], chosen[f])
        probabilities[test[f]] = model.predict_proba(x[test[f]].numpy())[:, 1]
    np.testing.assert_allclose(found.probabilities[0].numpy(), probabilities, atol=1e-6)
    whole = sklearn_fit(x, y, found.final_strengths.item())
    np.testing.assert_allclose(
        (x @ found.directions[0] + found.intercepts[0]).numpy(), whole.decision_function(x.numpy()), atol=1e-5
    )


def test_auroc_equals_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 5, (3, 80)).astype(float), rng.random((3, 80)) < 0.3
    expected = [roc_auc_score(one, score) for one, score in zip(labels, scores, strict=True)]
    np.testing.assert_allclose(auroc(scores, labels), expected, atol=1e-12)
    assert np.isnan(auroc(scores[0], np.ones(80, dtype=bool)))


def test_difference_of_means_by_hand() -> None:
    """Means (3, 1) and (1, 1): the plain direction is (2, 0), half way is 2, so the score is 2 x - 4."""
    x = torch.tensor([[2.0, 1.0], [4.0, 1.0], [0.0, 0.0], [2.0, 2.0]])
    y = torch.tensor([1, 1, 0, 0])
    found = difference_of_means(x, y, standardise=False)
    assert found.coefficients.flatten().tolist() == pytest.approx([2, 0], abs=1e-6)
    assert found.intercept.item() == pytest.approx(-4)
    scaled = difference_of_means(x, y)  # standardised, the difference is 2 / sd, in raw units 2 / sd^2 = 2 / 2
    assert scaled.coefficients.flatten().tolist() == pytest.approx([1, 0], abs=1e-6)
    assert scaled.intercept.item() == pytest.approx(-2)


# -- awkward data -------------------------------------------------------------------------------------------------------


def test_separable_classes_are_fitted_to_the_penalised_solution() -> None:
    x = torch.randn(80, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([[8.0]] * 40 + [[-8.0]] * 40)
    y = torch.arange(80) < 40
    found = fit_logistic(x.double(), y, None, [1e-2, 1.0], tol=1e-9, max_iter=500)
    assert found.converged.all()
    for place, strength in enumerate((1e-2, 1.0)):
        model = sklearn_fit(x, y, strength)
        ours = found.coefficients[0, 0, place] * found.scaling.scale[0]
        np.testing.assert_allclose(ours.numpy(), model[-1].coef_[0], rtol=1e-3)


def test_constant_features_have_no_weight_and_change_nothing() -> None:
    """One constant everywhere (large, so that its mean is rounded), one in the training set of the first fold alone."""
    x, y, groups, _ = planted(120, 4)
    folds = grouped_folds(groups, y, 3)
    odd = torch.where(folds.test[0], torch.randn(120, generator=torch.Generator().manual_seed(0)), 0.0)
    extended = torch.cat([x, torch.full((120, 1), 1234.567), odd[:, None]], dim=1).float()
    plain, found = (fit_logistic(one, y, folds, [1.0], tol=1e-6) for one in (x.float(), extended))
    assert found.coefficients[..., 4].abs().max() == 0
    assert found.coefficients[0, 0, 0, 5].abs() < 2e-4  # the tolerance: 80 x 1e-6, over its standard deviation of .6
    assert found.coefficients[0, 1:, 0, 5].abs().min() > 2e-3
    torch.testing.assert_close(found.scores(extended)[0, 0], plain.scores(x.float())[0, 0], rtol=0, atol=2e-3)
    for width in (2, 200):  # fewer features than samples, and more
        assert np.ptp(np.asarray(cross_validated([torch.ones(120, width)], y, groups).scores)) < 1e-3


def test_a_feature_far_from_zero_does_not_spoil_float32() -> None:
    """A mean of 1,000 standard deviations, as massive activations have, costs float32 three of its seven digits."""
    x, y, _, _ = planted(200, 6)
    x[:, 0] = x[:, 0] + 1000 * x[:, 0].std()
    half, whole = fit_logistic(x.float(), y, None, [1.0], tol=1e-6), fit_logistic(x, y, None, [1.0], tol=1e-6)
    one, other = half.coefficients * half.scaling.scale, whole.coefficients * whole.scaling.scale
    torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-3)


def test_what_cannot_be_fitted_is_refused_by_name() -> None:
    x, y, groups, _ = planted(30, 3)
    with pytest.raises(InputError, match="class True occurs in one group only"):
        grouped_folds([0, 0, 1, 1, 2], [True, True, False, False, False], 2)
    with pytest.raises(InputError, match="number of groups"):
        grouped_folds(groups, y, 11)
    with pytest.raises(InputError, match="fold 1 has no positive sample"):
        fit_logistic(x, y, torch.stack([torch.ones(30, dtype=torch.bool), ~y]))
    rare = np.array([1, 1, *[0] * 28])
    with pytest.raises(InputError, match="fewer folds"):
        cross_validated([x], rare, np.arange(30), n_folds=3)  # two positives: without their two folds there is none
    with pytest.raises(InputError, match="n_folds of at least 3"):
        cross_validated([x], y, groups, n_folds=2)
    with pytest.raises(InputError, match="positive penalties"):
        fit_logistic(x, y, None, [0.0])
    with pytest.raises(InputError, match="finite"):
        fit_logistic(x.masked_fill(x > 3, float("nan")), y)
    with pytest.raises(InputError, match="true and false"):
        fit_logistic(x, torch.full((30,), 2))
    with pytest.raises(UnknownNameError, match="logistic"):
        cross_validated([x], y, groups, method="logstic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="n_layers"):
        cross_validated(lambda layer: x, y, groups)


def test_groups_stay_whole_and_classes_are_balanced() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), rng.integers(1, 6, 60))
    labels = rng.random(len(groups)) < 0.3
    folds = grouped_folds(groups, labels)
    assert (folds.test.sum(dim=0) == 1).all()
    for test in folds.test.numpy():
        assert not set(groups[test]) & set(groups[~test])
        assert labels[test].mean() == pytest.approx(labels.mean(), abs=0.05)
    few = grouped_folds(np.arange(20), [1, 1, *[0] * 18])  # a class in fewer groups than folds raises no warning
    assert (few.test.numpy() & (np.arange(20) < 2)).any(axis=1).sum() == 2


# -- planted truth and nulls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["logistic", "difference_of_means", "mlp"])
def test_a_planted_layer_is_found_and_the_other_is_not(method: Any) -> None:
    """Labels follow layer 1 with the Bayes AUROC that the true score has; layer 0 is noise: 1/2 within three errors."""
    x, y, groups, direction = planted(900, 10, strength=3.0)
    noise = torch.randn(900, 10, generator=torch.Generator().manual_seed(5))
    options = MlpOptions(widths=(32, 16), batch_size=64)
    found = cross_validated([noise, x], y, groups, method=method, controls=1, mlp=options)
    best = roc_auc_score(y, x @ direction)
    # the difference of means leaves the features' correlations out
    assert found.auroc[1] == pytest.approx(best, abs=0.1 if method == "difference_of_means" else 0.03)
    error = (901 / (12 * int(y.sum()) * int((~y).sum()))) ** 0.5
    assert abs(found.auroc[0] - 0.5) < 3 * error
    assert found.control_auroc.sub(0.5).abs().max() < 4 * error * 3**0.5  # labels of groups of three: a third as many
    assert found.selectivity[1] > 0.3
    calibration = found.probabilities[1][y].mean() - found.probabilities[1][~y].mean()
    assert calibration > 0.3
    if method == "logistic":
        scale = x.std(dim=0)
        cosine = torch.nn.functional.cosine_similarity(found.directions[1] * scale, direction * scale, dim=0)
        assert cosine > 0.95


def test_an_mlp_finds_what_no_line_can() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(900, 4, generator=rng)
    y = (x[:, 0] > 0) ^ (x[:, 1] > 0)
    options = MlpOptions(widths=(64, 32), batch_size=64, learning_rate=3e-3)
    bent = cross_validated([x], y, torch.arange(900), method="mlp", mlp=options)
    straight = cross_validated([x], y, torch.arange(900), strengths=[1.0])
    assert bent.auroc.item() > 0.95
    assert straight.auroc.item() < 0.6
    again = cross_validated([x], y, torch.arange(900), method="mlp", mlp=options)
    assert torch.equal(bent.scores, again.scores)
    other = cross_validated([x], y, torch.arange(900), method="mlp", mlp=options, seed=1)
    assert not torch.equal(bent.scores, other.scores)
    with pytest.raises(InputError, match="two hidden layers"):
        cross_validated([x], y, torch.arange(900), method="mlp", mlp=MlpOptions(widths=(3,)))


@pytest.mark.parametrize("method", ["logistic", "difference_of_means", "mlp"])
def test_no_sample_is_scored_by_a_fit_that_saw_it(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other labels in fold 0 leave its own probabilities as they were, and change those of the other folds."""
    x, y, groups, _ = planted(120, 5)
    fixed = grouped_folds(groups, y, 4)
    monkeypatch.setattr(linear_fits, "grouped_folds", lambda *args: fixed)
    other = torch.where(fixed.test[0], ~y, y)
    one, changed = (cross_validated([x], labels, groups, method=method, n_folds=4) for labels in (y, other))
    held_out = fixed.test[0]
    torch.testing.assert_close(one.probabilities[0][held_out], changed.probabilities[0][held_out])
    assert (one.probabilities[0] - changed.probabilities[0])[~held_out].abs().max() > 1e-3


def test_control_labels_belong_to_types_and_can_be_carried_over() -> None:
    """Features that name the type let a probe learn any labeling of types (control 1, selectivity below 0)."""
    x, y, groups, _ = planted(300, 4)
    kinds = np.arange(300) % 8
    named = torch.cat([x, torch.nn.functional.one_hot(torch.from_numpy(kinds)).double()], dim=1)
    found = cross_validated([named], y, groups, controls=3, types=kinds, strengths=[1e-2])
    assert found.control_auroc.min() > 0.99
    assert found.selectivity.item() == pytest.approx(found.auroc.item() - found.control_auroc.mean().item())
    assert found.selectivity.item() < 0.1


def test_permutations_keep_groups_whole_and_the_p_value_its_size() -> None:
    """Labels that are the same within an image, features that share the image: at level 1/10 about a tenth of 60 nulls.

    More than 13 of 60 has a probability below 1 %. Labels shuffled one by one would call far more of them significant.
    """
    rng = np.random.default_rng(0)
    small = 0
    areas = []
    for _ in range(60):
        image = np.repeat(np.arange(24), 4)
        y = (rng.random(24) < 0.5)[image]
        y[:4], y[4:8], y[8:12], y[12:16], y[16:20], y[20:24] = 1, 0, 1, 0, 1, 0
        x = torch.from_numpy(rng.normal(size=(24, 3))[image] + 0.3 * rng.normal(size=(96, 3)))
        found = cross_validated([x], y, image, permutations=19, n_folds=3, strengths=[10.0], seed=int(rng.integers(99)))
        small += bool(found.p.item() <= 0.1)
        areas.append(found.null_auroc.mean().item())
    assert small <= 13
    assert found.p_any_layer.item() == found.p.item()  # one layer


def test_noise_scores_one_half_on_average() -> None:
    """Two classes of unequal size and few samples, where the folds' own intercepts would pull AUROC below 1/2."""
    rng = np.random.default_rng(1)
    areas = []
    for seed in range(60):
        x = torch.from_numpy(rng.normal(size=(60, 5)))
        y = rng.random(60) < 0.3
        y[:9] = 1
        areas.append(cross_validated([x], y, np.arange(60), strengths=[1e3], seed=seed).auroc.item())
    assert abs(np.mean(areas) - 0.5) < 3 * np.std(areas) / 60**0.5


def test_permuted_noise_is_significant_as_often_as_it_should_be_over_layers() -> None:
    x, y, groups, _ = planted(150, 4, strength=3.0)
    layers = torch.stack([torch.randn(150, 4, generator=torch.Generator().manual_seed(1)), x.float()])
    found = cross_validated(lambda layer: layers[layer], y, groups, permutations=39, strengths=[1.0], n_layers=2)
    assert found.p[1] == 1 / 40
    assert found.p_any_layer[1] == 1 / 40
    assert found.p[0] > 0.05
    assert (found.p_any_layer >= found.p).all()


def test_problems_of_very_unequal_difficulty_do_not_disturb_each_other() -> None:
    """Each of a batch is what it is alone, although those that are done leave the batch early."""
    x, y, _, _ = planted(300, 30)
    together = fit_logistic(x, y, None, [1e-4, 1.0, 1e6], tol=1e-8)
    for place, strength in enumerate((1e-4, 1.0, 1e6)):
        alone = fit_logistic(x, y, None, [strength], tol=1e-8)
        torch.testing.assert_close(
            together.coefficients[:, :, place], alone.coefficients[:, :, 0], rtol=1e-4, atol=1e-7
        )


def test_wide_features_are_solved_without_all_their_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probes.logistic_solver._MAX_RANK", 24)
    x, y, _, _ = planted(200, 60)
    state = torch.random.get_rng_state()
    found = fit_logistic(x, y, None, [1.0], tol=1e-9)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(Problem(x).spectrum()[1]) == 6
    model = sklearn_fit(x, y, 1.0)
    np.testing.assert_allclose(
        (found.coefficients * found.scaling.scale[0]).flatten().numpy(), model[-1].coef_[0], atol=1e-5
    )


def test_folds_are_a_partition_that_fits_accept() -> None:
    x, y, groups, _ = planted(60, 3)
    folds = grouped_folds(groups, y, 3)
    assert isinstance(folds, Folds)
    assert len(folds) == 3
    several = fit_logistic(x, torch.stack([y, ~y]), folds, [1.0], tol=1e-9)
    torch.testing.assert_close(several.coefficients[0], -several.coefficients[1], rtol=1e-5, atol=1e-8)


def test_problems_that_do_not_end_say_so_where_scikit_learn_warns() -> None:
    x, y, _, _ = planted(100, 50)
    assert not fit_logistic(x, y, None, [1e-6], max_iter=1, tol=1e-12).converged.any()
    with pytest.warns(ConvergenceWarning):
        LogisticRegression(C=1e6, max_iter=1, tol=1e-12).fit(x.numpy(), y.numpy())

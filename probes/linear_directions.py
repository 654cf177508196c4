"""Linear classifiers of many folds, penalties and labelings at once: logistic regression and difference of means.

Features are standardised by the mean and standard deviation of each training fold. Cross-validation with the penalty chosen
inside the fold is in `probes.linear_fits`, which gives these names too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probes.folds import Folds, check_classes, training_sets
from probes.logistic_solver import Problem, Scaling, solve
from slitlamp.errors import InputError

DEFAULT_STRENGTHS: tuple[float, ...] = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5)
"""Penalties: lambda of lambda / 2 ||w||^2 beside the SUM of log losses of standardised features; scikit-learn's 1 / C."""


@dataclass(frozen=True)
class LinearFit:
    """Linear classifiers: score = x @ coefficients + intercept, in the features' raw units; higher means positive.

    Attributes:
        coefficients: [target, fold, strength, d].
        intercept: [target, fold, strength].
        converged: bool [target, fold, strength]; false where `max_iter` came first.
        scaling: of each fold; coefficients * scale are those of standardised features.
        strengths: [strength].
        n_iter: iterations of the slowest problem.
    """

    coefficients: Tensor
    intercept: Tensor
    converged: Tensor
    scaling: Scaling
    strengths: Tensor
    n_iter: int

    def scores(self, x: Tensor) -> Tensor:
        """[target, fold, strength, sample] of features [sample, d]."""
        weights = self.coefficients.flatten(0, -2)
        return (weights @ x.to(weights).T + self.intercept.flatten()[:, None]).view(*self.intercept.shape, -1)


def fit_logistic(
    x: Tensor,
    y: Tensor,
    folds: Folds | Tensor | None = None,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    standardise: bool = True,
    *,
    tol: float = 1e-4,
    max_iter: int = 200,
) -> LinearFit:
    """L2-regularised logistic regression of every target on every fold at every strength, in one batch.

    Minimises scikit-learn's objective, sum of log losses + lambda / 2 ||w||^2 with an unpenalised intercept (lambda = 1 / C),
    on features standardised by each training fold. L-BFGS over all problems at once, started from the Newton step of
    squared error in the eigenvectors of the features' covariance, and stopped by scikit-learn's rule.

    Args:
        x: [n, d] features, any device.
        y: [n] or [target, n], true or 1 for the positive class.
        folds: `Folds` (trains on what each leaves), bool [fold, n] training sets, or None for one fit on everything.
        strengths: lambda; positive.
        standardise: by the mean and standard deviation of the training fold; else features as they are.
        tol: on the largest gradient of the mean loss, as in scikit-learn.
        max_iter: of the slowest problem.

    Raises:
        InputError: shapes, values or strengths that cannot be used, or a training set without one of the classes.
    """
    problem = Problem(x)
    n = len(problem.x)
    train = training_sets(folds, n, problem.x.device)
    targets = as_targets(y, n, problem.x.device)
    strength = as_strengths(strengths, problem.x)
    for one in targets:
        check_classes(one, train)
    shape = (len(targets), len(train), len(strength))
    target, fold, place = (index.flatten() for index in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    scaling = problem.moments(train, standardise)
    solution = solve(problem, targets, train, scaling, target, fold, strength[place], tol=tol, max_iter=max_iter)
    weights, bias = problem.to_raw(solution.weights.T.reshape(*shape, -1), solution.bias.view(shape), scaling)
    return LinearFit(
        weights, bias, solution.converged.view(shape), _raw_scaling(problem, scaling), strength, solution.n_iter
    )


def difference_of_means(
    x: Tensor, y: Tensor, folds: Folds | Tensor | None = None, standardise: bool = True
) -> LinearFit:
    """The direction from the negatives' mean to the positives', with the intercept half way: a `LinearFit` of one strength.

    Args:
        x, y, folds: as in `fit_logistic`.
        standardise: the difference of standardised means, which in raw units is (mean difference) / variance; else the
            plain difference, as steering uses it.
    """
    problem = Problem(x)
    train = training_sets(folds, len(problem.x), problem.x.device)
    targets = as_targets(y, len(problem.x), problem.x.device)
    for one in targets:
        check_classes(one, train)
    scaling = problem.moments(train, standardise)
    means = []
    for side in (targets, ~targets):
        rows = (side[:, None] & train).to(problem.x)
        means.append(rows @ problem.x / rows.sum(dim=-1, keepdim=True))  # [target, fold, d]
    positive, negative = ((one - scaling.mean) / scaling.scale for one in means)
    weights = positive - negative
    bias = -((positive + negative) / 2 * weights).sum(dim=-1)
    raw, intercept = problem.to_raw(weights[:, :, None], bias[..., None], scaling)
    nan = torch.full((1,), float("nan"))
    return LinearFit(
        raw, intercept, torch.ones_like(intercept, dtype=torch.bool), _raw_scaling(problem, scaling), nan, 0
    )


def as_targets(y: Tensor, n_samples: int, device: torch.device) -> Tensor:
    """Bool [target, sample] from [sample] or [target, sample] of true and false, or ones and zeros.

    Raises:
        InputError: another shape, or other values.
    """
    targets = torch.as_tensor(y)
    targets = targets[None] if targets.ndim == 1 else targets
    if targets.ndim != 2 or targets.shape[1] != n_samples:
        raise InputError(f"targets are [sample] or [target, sample] of {n_samples} samples: found {tuple(y.shape)}")
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise InputError("targets must be true and false, or ones and zeros")
    return targets.bool().to(device)


def as_strengths(strengths: Sequence[float], like: Tensor) -> Tensor:
    """[strength], checked.

    Raises:
        InputError: none, or one that is not positive.
    """
    if not len(strengths) or not all(np.isfinite(one) and one > 0 for one in strengths):
        raise InputError(f"strengths must be positive penalties lambda = 1 / C: found {list(strengths)}")
    return torch.tensor([float(one) for one in strengths], dtype=like.dtype, device=like.device)


def _raw_scaling(problem: Problem, scaling: Scaling) -> Scaling:
    scale = scaling.scale.double() * problem.scale
    return Scaling((problem.mean + scaling.mean.double() * problem.scale).to(scaling.mean), scale.to(scaling.scale))

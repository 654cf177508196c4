"""Logistic regressions that share their features, solved at once: L-BFGS over a batch of problems.

What scikit-learn does with a matrix and a vector per problem is here one product of two matrices for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from slitlamp.errors import InputError

_HISTORY = 10
_MAX_RANK = 2048
_MAX_HALVINGS = 30
_ROWS_PER_FEATURE = 4
"""Rows from which the covariance is estimated, per feature: a preconditioner need not be exact."""
_ROWS = 512
"""Rows whose squares are formed at a time: few enough for the cache."""


@dataclass(frozen=True)
class Scaling:
    """Mean and standard deviation of each training set: both [fold, d]; a constant feature has 1, as in scikit-learn."""

    mean: Tensor
    scale: Tensor


def as_features(x: Tensor) -> Tensor:
    """Features [sample, d] in float32 (float64 stays), checked."""
    if x.ndim != 2 or not x.numel():
        raise InputError(f"features are [sample, d]: found shape {tuple(x.shape)}")
    return x if x.dtype == torch.float64 else x.float()


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of every feature over the samples, in float64; sums are taken from the first sample on, which keeps their digits."""
    shift = x[0]
    total, square = (torch.zeros(x.shape[1], dtype=torch.float64, device=x.device) for _ in range(2))
    for rows in x.split(_ROWS):
        moved = rows - shift
        total += moved.sum(dim=0)
        square += moved.square_().sum(dim=0)
    mean = total / len(x)
    return shift.double() + mean, (square / len(x) - mean.square()).clamp_min(0)


class Problem:
    """The features of one layer, standardised once over all samples, and what the fits on any of its folds share.

    The second standardisation, by each training fold, is folded into the weights: no fold has a copy of the features.
    """

    def __init__(self, x: Tensor) -> None:
        x = as_features(x)
        mean, variance = _mean_and_variance(x)
        if not bool(torch.isfinite(variance).all()):
            raise InputError("features must be finite: found NaN or infinity; drop these samples or layers first")
        self.mean, scale = mean, variance.sqrt()
        # Rounding makes a constant feature vary by about the precision of its mean; that is no variation.
        constant = scale <= 10 * torch.finfo(x.dtype).eps * mean.abs()
        self.scale = torch.where(constant, 1.0, scale)
        factor = (1 / self.scale).masked_fill(constant, 0.0).to(x)
        self.x = torch.empty_like(x)
        for rows, out in zip(x.split(_ROWS), self.x.split(_ROWS), strict=True):
            torch.sub(rows, mean.to(x), out=out).mul_(factor)
        self._spectrum: tuple[Tensor, Tensor, float] | None = None

    def moments(self, train: Tensor, standardise: bool = True) -> Scaling:
        """Mean and scale of training sets [fold, sample], in units of `self.x`."""
        share = train.to(self.x) / train.sum(dim=1, keepdim=True)
        if not standardise:
            # raw units: the scale undoes the first standardisation
            zero = self.x.new_zeros(len(train), self.x.shape[1])
            return Scaling(zero - (self.mean / self.scale).to(self.x), zero + (1 / self.scale).to(self.x))
        blocks = [(part, rows) for part, rows in zip(share.split(_ROWS, 1), self.x.split(_ROWS), strict=True)]
        mean = sum((part @ rows for part, rows in blocks), start=torch.zeros_like(share[:, :1]))
        square = sum((part @ rows.square() for part, rows in blocks), start=torch.zeros_like(mean))
        variance = (square - mean.square()).clamp_min(0)
        flat = variance <= 100 * torch.finfo(self.x.dtype).eps * (1 + mean.square())
        return Scaling(mean, torch.where(flat, 1.0, variance.sqrt()))

    def spectrum(self) -> tuple[Tensor, Tensor, float]:
        """Leading eigenvectors [d, k] and eigenvalues [k] of the features' covariance, and the mean of the other ones."""
        if self._spectrum is None:
            x = self.x[:: max(1, len(self.x) // (_ROWS_PER_FEATURE * self.x.shape[1]))]
            n, d = x.shape
            if max(min(n, d), 1) <= _MAX_RANK:
                small = x @ x.T if n < d else x.T @ x
                values, vectors = torch.linalg.eigh(small / n)
                precision = torch.finfo(values.dtype).eps * values[-1]
                if n < d:
                    real = values > 10 * precision
                    values = values[real]
                    vectors = x.T @ vectors[:, real] / (n * values).sqrt()
                values = values.clamp_min(precision)
            else:
                generator_state = torch.random.get_rng_state()
                torch.manual_seed(0)  # the sketch only speeds up the fit; the caller's random state is given back
                _, singular, vectors = torch.svd_lowrank(x, q=_MAX_RANK // 4)
                torch.random.set_rng_state(generator_state)
                values = singular.square() / n
            # Never far below the smallest of the leading ones: the two parts are added in the precision of the larger.
            rest = float((x.square().sum() / n - values.sum()).clamp_min(0)) / max(d - len(values), 1)
            smallest = float(values.min()) if len(values) else 0.0  # none where all features are constant
            self._spectrum = (vectors, values, max(rest, smallest))
        return self._spectrum

    def to_raw(self, weights: Tensor, bias: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
        """Weights [..., fold, strength, d] of standardised features, and biases without the last axis, in raw units."""
        inner = weights / scaling.scale[:, None]
        offset = bias - (inner * scaling.mean[:, None]).sum(dim=-1)
        raw = inner.double() / self.scale
        return raw.to(weights), (offset.double() - raw @ self.mean).to(weights)


@dataclass(frozen=True)
class Solution:
    """Weights [d, problem] of the features standardised by each fold, biases [problem], and which problems converged."""

    weights: Tensor
    bias: Tensor
    converged: Tensor
    n_iter: int


@dataclass
class _Live:
    """The problems that have not converged; the last axis of everything is the problem.

    `theta` [d + 1, problem] holds weights and, last, the bias; `margin` [n, problem] is the score times the sign of the
    label, 0 where a sample is not trained on.
    """

    place: Tensor
    sign: Tensor
    mean: Tensor
    scale: Tensor
    strength: Tensor
    count: Tensor
    theta: Tensor
    margin: Tensor
    gradient: Tensor
    loss: Tensor
    miss: Tensor
    history: list[tuple[Tensor, Tensor]]

    def keep(self, chosen: Tensor) -> None:
        for name, value in vars(self).items():
            if name == "history":
                self.history = [(step[:, chosen], change[:, chosen]) for step, change in value]
            else:
                setattr(self, name, value[..., chosen])


def solve(
    problem: Problem,
    targets: Tensor,
    train: Tensor,
    scaling: Scaling,
    target: Tensor,
    fold: Tensor,
    strength: Tensor,
    *,
    tol: float = 1e-4,
    max_iter: int = 200,
) -> Solution:
    """Logistic regressions that share their features.

    Problem p fits `targets[target[p]]` (bool [target, sample]) on the samples `train[fold[p]]` with the penalty
    `strength[p]`. Per iteration there are two products with the features, [sample, d] x [d, problem] and its transpose;
    converged problems are left out of them.
    """
    x, device = problem.x, problem.x.device
    d, target, fold = x.shape[1], target.to(device), fold.to(device)
    sign = torch.where(targets, 1.0, -1.0).to(x)[target].mul_(train[fold].to(x)).T.contiguous()
    n_problems = sign.shape[1]
    positive = (sign > 0).sum(dim=0).to(x)
    count = train[fold].sum(dim=1).to(x)
    theta = x.new_zeros(d + 1, n_problems)
    theta[-1] = torch.logit((positive + 0.5) / (count + 1))
    live = _Live(
        torch.arange(n_problems, device=device), sign, scaling.mean[fold].T, scaling.scale[fold].T,
        strength, count, theta, sign * theta[-1], theta, positive, sign, [],
    )  # fmt: skip
    _look(live, x)
    found = Solution(theta.clone(), theta[-1].clone(), torch.zeros(n_problems, dtype=torch.bool, device=device), 0)
    n_iter = 0
    while True:
        done = live.gradient.abs().amax(dim=0) <= tol * live.count
        if n_iter == max_iter or bool(done.all()):
            found.weights[:, live.place], found.converged[live.place] = live.theta, done
            break
        # Moving what is left costs about as much as an iteration on it, so it waits until a good part is done.
        if float(done.float().mean()) > 0.25:
            found.weights[:, live.place[done]], found.converged[live.place[done]] = live.theta[:, done], True
            live.keep(~done)
        _step(live, problem)
        n_iter += 1
    return Solution(found.weights[:-1], found.weights[-1], found.converged, n_iter)


def _look(live: _Live, x: Tensor) -> None:
    """Loss and gradient at the margins."""
    live.loss = softplus(-live.margin).sum(dim=0, dtype=torch.float64) + _penalty(live.theta, live.strength)
    live.miss = torch.sigmoid(-live.margin)
    residual = -live.sign * live.miss
    total = residual.sum(dim=0)
    weights = (x.T @ residual - live.mean * total) / live.scale + live.strength * live.theta[:-1]
    live.gradient = torch.cat([weights, total[None]])


def _penalty(theta: Tensor, strength: Tensor) -> Tensor:
    return theta[:-1].square().sum(dim=0, dtype=torch.float64) * strength / 2


def _step(live: _Live, problem: Problem) -> None:
    """One L-BFGS step of every live problem, its length by Newton's rule along the direction, halved where that fails."""
    direction = _direction(live, problem)
    slope = (direction * live.gradient).sum(dim=0)
    inner = direction[:-1] / live.scale
    along = live.sign * (problem.x @ inner + (direction[-1] - (inner * live.mean).sum(dim=0)))
    # where a sample is not trained on, `along` is 0
    bend = (live.miss * (1 - live.miss)).mul_(along).mul_(along).sum(dim=0)
    bend = bend + live.strength * direction[:-1].square().sum(dim=0)
    length = -slope / bend.clamp_min(torch.finfo(bend.dtype).tiny)
    before, old, margin, theta = live.loss, live.gradient, live.margin, live.theta
    slack = 4 * torch.finfo(problem.x.dtype).eps * before
    for _ in range(_MAX_HALVINGS):
        live.margin = margin + length * along
        live.theta = theta + length * direction
        loss = softplus(-live.margin).sum(dim=0, dtype=torch.float64) + _penalty(live.theta, live.strength)
        worse = loss > before + 1e-4 * length * slope + slack
        if not bool(worse.any()):
            break
        length = torch.where(worse, length / 2, length)
    _look(live, problem.x)
    step, change = length * direction, live.gradient - old
    live.history = [*live.history[-_HISTORY + 1 :], (step, change)]


def _direction(live: _Live, problem: Problem) -> Tensor:
    """Minus the gradient times L-BFGS's estimate of the inverse Hessian (Nocedal and Wright, algorithm 7.4)."""
    vector = live.gradient.clone()
    shares = []
    for step, change in reversed(live.history):
        product = (step * change).sum(dim=0)
        inverse = torch.where(product > 0, 1 / product.clamp_min(torch.finfo(vector.dtype).tiny), 0.0)
        share = inverse * (step * vector).sum(dim=0)
        vector -= share * change
        shares.append((inverse, share))
    vector = _inverse_hessian(live, problem, vector)
    for (step, change), (inverse, share) in zip(live.history, reversed(shares), strict=True):
        vector += step * (share - inverse * (change * vector).sum(dim=0))
    return -vector


def _inverse_hessian(live: _Live, problem: Problem, vector: Tensor) -> Tensor:
    """The inverse of lambda + mean curvature x covariance of all samples, a good guess at that of every fold's."""
    vectors, values, rest = problem.spectrum()
    # masked samples have miss 1/2, and count for nothing
    curvature = (live.miss * (1 - live.miss) * live.sign.abs()).sum(dim=0)
    inside = 1 / (live.strength + curvature * values[:, None])
    if len(values) == len(vectors):
        weights = vectors @ (inside * (vectors.T @ vector[:-1]))
    else:
        other = 1 / (live.strength + curvature * rest)
        weights = vector[:-1] * other + vectors @ ((inside - other) * (vectors.T @ vector[:-1]))
    return torch.cat([weights, (vector[-1] / curvature.clamp_min(1e-12))[None]])

"""The fits of one layer: every fold, penalty and labeling in one batch, and the scores of the samples that each leaves out."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from probes.folds import Folds
from probes.linear_directions import difference_of_means, fit_logistic
from probes.logistic_solver import Problem, Scaling, Solution, solve
from probes.mlp_fits import MlpOptions, mlp_scores

_CHUNK_VALUES = 16_000_000
"""Most margins (samples x problems) of one batch: 64 MB each, of about eight."""


def _pairs(n_folds: int) -> list[tuple[int, int]]:
    return list(combinations(range(n_folds), 2))


def nested_training_sets(folds: Folds, inner: bool) -> Tensor:
    """The outer training sets, and after them those without two folds."""
    pairs = [~(folds.test[f] | folds.test[g]) for f, g in _pairs(len(folds))] if inner else []
    return torch.stack([*folds.train, *pairs])


def fit_layer(
    x: Tensor,
    targets: Tensor,
    folds: Folds,
    method: str,
    strengths: Tensor,
    standardise: bool,
    seed: int,
    mlp: MlpOptions,
    tol: float,
    max_iter: int,
) -> dict[str, Tensor]:
    """Scores of all targets, and of the first everything else, of one layer."""
    if method == "mlp":
        return _mlp_layer(x, targets, folds, standardise, seed, mlp)
    if method == "difference_of_means":
        return _means_layer(x, targets, folds, standardise)
    problem, targets = Problem(x), targets.to(x.device)
    held_out = Folds(folds.test.to(x.device))
    strengths = strengths.to(problem.x)
    n_pairs = len(_pairs(len(folds))) if len(strengths) > 1 else 0
    per_target = max(n_pairs * len(strengths), len(folds) + 1)
    step = max(1, _CHUNK_VALUES // (per_target * len(x)))
    parts = [
        _nested(problem, targets[start : start + step], held_out, strengths, standardise, tol, max_iter)
        for start in range(0, len(targets), step)
    ]
    return {**parts[0], "scores": torch.cat([one["scores"] for one in parts])}


def _nested(
    problem: Problem, targets: Tensor, folds: Folds, strengths: Tensor, standardise: bool, tol: float, max_iter: int
) -> dict[str, Tensor]:
    """Logistic regressions of some targets, with penalties chosen inside the training folds."""
    n_targets, n_folds, device = len(targets), len(folds), problem.x.device
    if len(strengths) > 1:
        chosen, final, inner_ends = _chosen(problem, targets, folds, strengths, standardise, tol, max_iter)
    else:
        chosen, final = strengths.expand(n_targets, n_folds), strengths.expand(n_targets)
        inner_ends = torch.ones(n_targets, dtype=torch.bool, device=device)
    train = torch.cat([folds.train, torch.ones_like(folds.train[:1])])
    scaling = problem.moments(train, standardise)
    target = torch.arange(n_targets, device=device).repeat_interleave(n_folds + 1)
    fold = torch.arange(n_folds + 1, device=device).repeat(n_targets)
    strength = torch.cat([chosen, final[:, None]], dim=1).flatten()
    found = solve(problem, targets, train, scaling, target, fold, strength, tol=tol, max_iter=max_iter)
    margin = (_projections(problem, found, scaling, fold) + found.bias).T.view(n_targets, n_folds + 1, -1)
    bias = found.bias.view(n_targets, n_folds + 1)
    own = (margin[:, :-1] * folds.test).sum(dim=1)  # every sample from its own fold
    shift = ((bias[:, :-1].mean(dim=1, keepdim=True) - bias[:, :-1])[:, :, None] * folds.test).sum(dim=1)
    weights = found.weights.T.reshape(n_targets, n_folds + 1, 1, -1)
    last = Scaling(scaling.mean[-1:], scaling.scale[-1:])
    direction, intercept = problem.to_raw(weights[:1, -1:], bias[:1, -1:, None], last)
    ends = found.converged.view(n_targets, -1).all(dim=1) & inner_ends
    return {
        "scores": (own + shift).cpu(),
        "probabilities": torch.sigmoid(own[0]).cpu(),
        "strengths": chosen[0].cpu(),
        "final_strengths": final[0].cpu(),
        "directions": direction.flatten().cpu(),
        "intercepts": intercept.flatten()[0].cpu(),
        "converged": ends[0].cpu(),
    }


def _chosen(
    problem: Problem, targets: Tensor, folds: Folds, strengths: Tensor, standardise: bool, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The penalty of each target and fold [target, fold], that of everything [target], and whether all fits ended."""
    pairs = _pairs(len(folds))
    train = torch.stack([~(folds.test[f] | folds.test[g]) for f, g in pairs])
    scaling = problem.moments(train, standardise)
    shape = (len(targets), len(pairs), len(strengths))
    indices = torch.meshgrid(*(torch.arange(one, device=problem.x.device) for one in shape), indexing="ij")
    target, pair, place = (index.flatten() for index in indices)
    found = solve(problem, targets, train, scaling, target, pair, strengths[place], tol=tol, max_iter=max_iter)
    margin = _projections(problem, found, scaling, pair) + found.bias
    sign = torch.where(targets, 1.0, -1.0).to(margin)[target].T
    loss = softplus(-sign * margin)
    sizes = folds.test.sum(dim=1).to(loss)
    per_fold = (folds.test.to(loss) @ loss).view(len(folds), *shape) / sizes[:, None, None, None]
    total = loss.new_zeros(len(targets), len(folds), len(strengths))
    for number, (f, g) in enumerate(pairs):
        total[:, f] += per_fold[g, :, number]
        total[:, g] += per_fold[f, :, number]
    strongest_first = strengths.argsort(descending=True)
    chosen = strengths[strongest_first[total[..., strongest_first].argmin(dim=-1)]]
    final = strengths[strongest_first[total.sum(dim=1)[..., strongest_first].argmin(dim=-1)]]
    return chosen, final, found.converged.view(len(targets), -1).all(dim=1)


def _projections(problem: Problem, found: Solution, scaling: Scaling, fold: Tensor) -> Tensor:
    """[sample, problem]: the scores of all samples without the bias."""
    inner = found.weights / scaling.scale[fold].T
    return problem.x @ inner - (inner * scaling.mean[fold].T).sum(dim=0)


def _means_layer(x: Tensor, targets: Tensor, folds: Folds, standardise: bool) -> dict[str, Tensor]:
    """Difference of means; probabilities by a logistic fit of each training fold's scores."""
    train = torch.cat([folds.train, torch.ones_like(folds.train[:1])]).to(x.device)
    test = folds.test.to(x.device)
    fit = difference_of_means(x, targets, train, standardise)
    score = fit.scores(x)[:, :, 0]  # [target, fold, sample]
    own = (score[:, :-1] * test).sum(dim=1)
    probability = torch.empty(len(x), dtype=score.dtype, device=score.device)
    for fold, rows in enumerate(test):
        one = fit_logistic(score[0, fold][:, None], targets[0], train[fold][None], [1e-3])
        probability[rows] = torch.sigmoid(one.scores(score[0, fold][rows, None])[0, 0, 0])
    nan = torch.tensor(float("nan"))
    return {
        "scores": own.cpu(),
        "probabilities": probability.cpu(),
        "strengths": nan.expand(len(folds)),
        "final_strengths": nan,
        "directions": fit.coefficients[0, -1, 0].cpu(),
        "intercepts": fit.intercept[0, -1, 0].cpu(),
        "converged": torch.tensor(True),
    }


def _mlp_layer(
    x: Tensor, targets: Tensor, folds: Folds, standardise: bool, seed: int, options: MlpOptions
) -> dict[str, Tensor]:
    scores = torch.stack([mlp_scores(x, one, folds, options, standardise, seed) for one in targets])
    nan = torch.tensor(float("nan"))
    return {
        "scores": scores.cpu(),
        "probabilities": torch.sigmoid(scores[0]).cpu(),
        "strengths": nan.expand(len(folds)),
        "final_strengths": nan,
        "directions": nan.expand(x.shape[1]),
        "intercepts": nan,
        "converged": torch.tensor(True),
    }

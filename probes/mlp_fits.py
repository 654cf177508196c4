"""The three-layer perceptron of TruthPrInt (arXiv 2503.10602), trained on all folds of a layer at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from probes.folds import Folds
from probes.logistic_solver import Problem
from slitlamp.errors import InputError


@dataclass(frozen=True)
class MlpOptions:
    """How the perceptron is built and trained.

    The paper's are three layers, 30 epochs and batches of 512; the rest is not stated [?].

    Attributes:
        widths: of the two hidden layers [?].
        epochs: passes over the training fold.
        batch_size: samples per step.
        learning_rate: Adam's [?].
        weight_decay: Adam's, decoupled (AdamW) [?].
    """

    widths: Sequence[int] = (256, 64)
    epochs: int = 30
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2

    def check(self) -> None:
        """Refuse what cannot be used.

        Raises:
            InputError: names the option.
        """
        if len(self.widths) != 2 or min(self.widths) < 1:
            raise InputError(f"widths are those of two hidden layers, from 1: found {list(self.widths)}")
        if self.epochs < 1 or self.batch_size < 1:
            raise InputError(f"epochs and batch_size start at 1: found {self.epochs} and {self.batch_size}")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise InputError(
                f"learning_rate must be positive and weight_decay not negative: found {self.learning_rate}, "
                f"{self.weight_decay}"
            )


def mlp_scores(
    x: Tensor, y: Tensor, folds: Folds, options: MlpOptions, standardise: bool = True, seed: int = 0
) -> Tensor:
    """Out-of-fold log-odds [sample] of a perceptron per fold, all trained together.

    Every fold starts from the same weights and takes its own training samples in its own order; both follow from `seed`
    alone, drawn on the CPU, so that the device does not change them.

    Args:
        x: [sample, d].
        y: bool [sample].
        folds: which samples are held out; each needs at least one sample left.
        options: how to build and train.
        standardise: features by the mean and standard deviation of the training fold.
        seed: of weights and order.
    """
    options.check()
    problem = Problem(x)
    device, n_folds = problem.x.device, len(folds)
    train, test = folds.train.to(device), folds.test.to(device)
    scaling = problem.moments(train, standardise)
    label = y.to(problem.x)
    generator = torch.Generator().manual_seed(seed)
    parameters = _initial((x.shape[1], *options.widths, 1), n_folds, generator, problem.x)
    optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)

    def inputs(rows: Tensor) -> Tensor:
        """[fold, row, d], standardised by the fold."""
        return (problem.x[rows] - scaling.mean[:, None]) / scaling.scale[:, None]

    with torch.enable_grad():
        for _ in range(options.epochs):
            order, weight = _order(train, generator)
            for start in range(0, order.shape[1], options.batch_size):
                rows, use = (one[:, start : start + options.batch_size] for one in (order, weight))
                loss = binary_cross_entropy_with_logits(
                    _forward(parameters, inputs(rows)), label[rows], weight=use, reduction="none"
                )
                # the mean of each fold's batch; folds do not touch each other, so their losses may be added
                total = (loss.sum(dim=1) / use.sum(dim=1).clamp_min(1)).sum()
                optimiser.zero_grad()
                total.backward()
                optimiser.step()
    scores = problem.x.new_empty(len(problem.x))
    with torch.no_grad():
        for fold, rows in enumerate(test):
            values = (problem.x[rows] - scaling.mean[fold]) / scaling.scale[fold]
            one = [parameter[fold : fold + 1] for parameter in parameters]
            scores[rows] = _forward(one, values[None])[0]
    return scores


def _initial(widths: Sequence[int], n_folds: int, generator: torch.Generator, like: Tensor) -> list[Tensor]:
    """Weights [fold, in, out] and biases [fold, 1, out] of every layer, drawn as `torch.nn.Linear` does (He, uniform)."""
    parameters = []
    for i, o in pairwise(widths):
        bound = 1 / math.sqrt(i)
        for shape in ((i, o), (1, o)):
            drawn = (torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound
            parameters.append(drawn.to(like).expand(n_folds, *shape).clone().requires_grad_())
    return parameters


def _forward(parameters: Sequence[Tensor], values: Tensor) -> Tensor:
    """Log-odds [fold, row] of [fold, row, d]."""
    w1, b1, w2, b2, w3, b3 = parameters
    hidden = torch.relu(torch.baddbmm(b1, values, w1))
    hidden = torch.relu(torch.baddbmm(b2, hidden, w2))
    return torch.baddbmm(b3, hidden, w3)[..., 0]


def _order(train: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The training samples of each fold in random order [fold, place], and 1 where a place is taken, else 0.

    Folds with fewer samples are filled up with samples of no weight.
    """
    key = torch.rand(train.shape, generator=generator).to(train.device) + (~train).float()  # held out: at the end
    longest = int(train.sum(dim=1).max())
    order = key.argsort(dim=1)[:, :longest]
    return order, train.gather(1, order).float()

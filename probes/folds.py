"""Folds that keep groups whole, and what must hold of the samples they train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from slitlamp.errors import InputError


@dataclass(frozen=True)
class Folds:
    """Which samples are held out.

    Attributes:
        test: bool [fold, sample]; every sample in exactly one fold.
    """

    test: Tensor

    @property
    def train(self) -> Tensor:
        """bool [fold, sample]: the samples that are not held out."""
        return ~self.test

    def __len__(self) -> int:
        return len(self.test)


def grouped_folds(groups: ArrayLike, labels: ArrayLike, n_folds: int = 5, seed: int = 0) -> Folds:
    """Folds that keep groups (images) whole and classes balanced where the groups allow it.

    Args:
        groups: [sample], the group of each sample.
        labels: [sample], the class of each sample.
        n_folds: how many; no more than groups.
        seed: of the order in which groups are dealt out.

    Raises:
        InputError: fewer groups than folds, vectors of unequal length, or a class whose groups all lie in one fold.
    """
    group, label = np.asarray(groups), np.asarray(labels)
    if group.shape != label.shape or group.ndim != 1 or not group.size:
        raise InputError(f"folds need a group and a label of each sample: found shapes {group.shape}, {label.shape}")
    n_groups = len(np.unique(group))
    if not 2 <= n_folds <= n_groups:
        raise InputError(
            f"n_folds must lie between 2 and the number of groups: found {n_folds} folds of {n_groups} groups"
        )
    index = np.unique(label, return_inverse=True)[1]
    for name, in_class in ((one, group[label == one]) for one in np.unique(label)):
        if len(np.unique(in_class)) < 2:
            raise InputError(
                f"class {name!s} occurs in one group only ({in_class[0]!s}): no fold can be trained and tested on it"
            )
    # Members of a class are fewer than folds only where its groups are too; scikit-learn warns or raises then, so a class
    # of few samples is repeated: only the shares of the classes per group matter to it.
    repeats = np.ones(len(label), dtype=int)
    for one, size in enumerate(np.bincount(index)):
        repeats[index == one] = -(-n_folds // size)
    rows = np.repeat(np.arange(len(label)), repeats)
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    test = np.zeros((n_folds, len(label)), dtype=bool)
    for fold, (_, held_out) in enumerate(splitter.split(rows[:, None], index[rows], group[rows])):
        test[fold, rows[held_out]] = True
    folds = Folds(torch.from_numpy(test))
    if not test.any(axis=1).all():
        raise InputError(f"{n_folds} folds leave one empty: {n_groups} groups of very unequal size; take fewer folds")
    return folds


def check_classes(labels: Tensor, train: Tensor) -> None:
    """Refuse training sets [fold, sample] that lack a class of `labels` bool [sample].

    Raises:
        InputError: names the class and the fold.
    """
    for fold, rows in enumerate(train):
        positive = int(labels[rows].sum())
        if positive in (0, int(rows.sum())):
            raise InputError(
                f"the training set of fold {fold} has no {'positive' if positive == 0 else 'negative'} sample: the class "
                "lies in too few groups for so many folds; take fewer folds, or more items"
            )


def training_sets(folds: Folds | Tensor | None, n_samples: int, device: torch.device) -> Tensor:
    """bool [fold, sample] to train on: what `folds` does not hold out, the given sets themselves, or (None) everything."""
    if folds is None:
        return torch.ones(1, n_samples, dtype=torch.bool, device=device)
    train = folds.train if isinstance(folds, Folds) else folds
    if train.ndim != 2 or train.shape[1] != n_samples or train.dtype != torch.bool:
        raise InputError(f"training sets are bool [fold, {n_samples}]: found {train.dtype} {tuple(train.shape)}")
    return train.to(device)
